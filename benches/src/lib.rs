//! What several benches share: what they say of the machine that they ran on, the engine that a cluster is compared
//! with, what a cluster is asked, the pictures that they draw, and the KV that those of GPUs move.

#[cfg(feature = "cuda")]
pub mod kv;
pub mod one_process;
pub mod plot;

use anyhow::ensure;
use serde_json::json;
use std::io::BufRead as _;
use std::time::{Duration, Instant};
use tandem_proto::ids::TokenId;
use tandem_tests::processes::Cluster;

/// Every token of the answers, so that each leaves text: a made-up model's own mean nothing to a tokenizer.
const ANSWER: u32 = 300;

/// How long a cluster that others started may take until it takes requests: its nodes may be loading.
const READY: Duration = Duration::from_secs(300);

/// The processor's name; empty where the system has none.
#[must_use]
pub fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name"));
    model.unwrap_or_default().trim_start_matches(['\t', ':', ' ']).into()
}

/// The middle one.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A cluster that others started, which calls its model `bench`; waits until it takes requests.
///
/// # Errors
/// When it does not.
pub fn running_cluster(router: &str) -> anyhow::Result<Cluster> {
    Cluster::running(router, READY).ok_or_else(|| {
        anyhow::anyhow!(
            "--router {router}: no prefill node and decode node were ready there within {READY:?}; the logs of router \
             and nodes say why"
        )
    })
}

/// Has a cluster go on with a prompt for so many tokens; returns when the request was sent, and when each token came.
///
/// # Errors
/// When it does not answer so.
pub fn ask(
    cluster: &Cluster,
    prompt: &[TokenId],
    max_tokens: u32,
) -> anyhow::Result<(Instant, Vec<Instant>)> {
    let tokens: Vec<_> = prompt.iter().map(|token| token.0).collect();
    let body = json!({
        "model": "bench", "prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "logit_bias": {ANSWER.to_string(): 100},
    });
    let body = body.to_string();
    let begun = Instant::now();
    let (status, stream) = cluster.post_stream("/v1/completions", &body);
    let mut came = Vec::new();
    for line in stream.lines() {
        let line = line?;
        ensure!(status == 200, "status {status}: {line}");
        ensure!(!line.starts_with("data: {\"error\""), "{line}");
        if line.starts_with("data: {") {
            came.push(Instant::now());
        }
    }
    ensure!(status == 200, "status {status}");
    Ok((begun, came))
}
