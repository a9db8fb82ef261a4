//! How fast is serving, and what does disaggregation cost? One run measures, in turns so that a noisy machine
//! disturbs all alike:
//! - the engine in this process: prefill of 512 and 2,000 tokens, decode of one stream and of eight;
//! - the peer, Hugging Face transformers, with the same threads and arithmetic, if `--peer` says where;
//! - time to first token of 2,000-token prompts through router, prefill node and decode node, beside the same
//!   engine in this process.

use anyhow::{Context, ensure};
use clap::Parser;
use serde_json::{Value, json};
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tandem_engine::single::{GenRequest, SingleProcess};
use tandem_engine::{CpuEngine, Engine, LoadOptions};
use tandem_kernels::KvPages;
use tandem_proto::ids::{ChoiceIdx, TokenId};
use tandem_proto::wire::SamplingParams;
use tandem_tests::processes::{Cluster, ClusterOptions};

/// Measures serving on this machine, beside a peer. Build the nodes first:
/// cargo build --release -p router -p prefill-node -p decode-node
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Model folder.
    #[arg(long, default_value = "models/tiny")]
    model: PathBuf,
    /// Threads of each engine and of the peer.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// How often everything is measured. Medians are reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// A Python with torch and transformers (benches/peers/requirements.txt). Without it there is no peer.
    #[arg(long, value_name = "PYTHON")]
    peer: Option<PathBuf>,
    /// Leave the cluster out.
    #[arg(long)]
    no_cluster: bool,
    /// Where to write the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const PREFILL: [usize; 2] = [512, 2000];
const DECODE_CONTEXT: usize = 512;
const DECODE_TOKENS: u32 = 96;
const STREAMS: usize = 8;
const STEP_TOKENS: usize = 512;
const TTFT_PROMPT: usize = 2000;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let load = LoadOptions { threads: options.threads, ..LoadOptions::default() };
    let engine = CpuEngine::load(&options.model, load)?;
    let kv = KvPages::new(engine.info().kv, 16_384)?;
    let mut ours = Ours { single: SingleProcess::new(engine, kv, STEP_TOKENS), prompts: 0 };
    let cluster = if options.no_cluster { None } else { Some(start_cluster(&options)?) };
    let mut figures = Figures::default();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for tokens in PREFILL {
            figures.add(format!("prefill {tokens}, tokens/s"), ours.prefill(tokens)?);
        }
        figures.add("decode, 1 stream, tokens/s".into(), ours.decode(1)?);
        figures.add(format!("decode, {STREAMS} streams, tokens/s"), ours.decode(STREAMS)?);
        if let Some(python) = &options.peer {
            measure_peer(python, &options, &mut figures)?;
        }
        if let Some(cluster) = &cluster {
            for _ in 0..3 {
                figures.add("TTFT 2000, one process, ms".into(), ours.ttft()?);
                figures.add(
                    "TTFT 2000, disaggregated, ms".into(),
                    cluster_ttft(cluster, &ours.prompt(TTFT_PROMPT))?,
                );
            }
        }
    }
    report(&options, &figures)
}

struct Ours {
    single: SingleProcess<CpuEngine>,
    prompts: u64,
}

impl Ours {
    /// A prompt that nobody has seen.
    fn prompt(&mut self, len: usize) -> Vec<TokenId> {
        self.prompts += 1;
        let vocab = u64::from(self.single.engine().info().vocab_size) - 6;
        let mut state = self.prompts.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            TokenId(((state >> 33) % vocab) as u32 + 6)
        };
        (0..len).map(|_| draw()).collect()
    }

    fn request(&mut self, len: usize, max_tokens: u32) -> GenRequest {
        GenRequest {
            prompt: self.prompt(len),
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            choice: ChoiceIdx(0),
            max_tokens,
            stop_tokens: Vec::new(),
        }
    }

    fn prefill(&mut self, tokens: usize) -> anyhow::Result<f64> {
        let request = self.request(tokens, 1);
        let begun = Instant::now();
        self.single.generate(&[request])?;
        Ok(tokens as f64 / begun.elapsed().as_secs_f64())
    }

    fn ttft(&mut self) -> anyhow::Result<f64> {
        Ok(TTFT_PROMPT as f64 / self.prefill(TTFT_PROMPT)? * 1e3)
    }

    /// Tokens a second of all streams together, from when the last of them has its first token.
    fn decode(&mut self, streams: usize) -> anyhow::Result<f64> {
        let requests: Vec<_> = (0..streams).map(|_| self.request(DECODE_CONTEXT, DECODE_TOKENS)).collect();
        let (mut first, mut counted, mut begun) = (vec![false; streams], 0u32, None);
        self.single.generate_with(&requests, &mut |request, _| {
            if begun.is_some() {
                counted += 1;
            }
            first[request] = true;
            if begun.is_none() && first.iter().all(|first| *first) {
                begun = Some(Instant::now());
            }
        })?;
        let begun = begun.context("every stream has a first token")?;
        Ok(f64::from(counted) / begun.elapsed().as_secs_f64())
    }
}

fn start_cluster(options: &Options) -> anyhow::Result<Cluster> {
    ensure!(
        options.model.join("tokenizer.json").exists(),
        "{} has no tokenizer.json",
        options.model.display()
    );
    let mut cluster = ClusterOptions::new(&options.model);
    let threads = options.threads.to_string();
    cluster.node_flags = ["--threads", &threads, "--kv-memory", "1GiB"].map(str::to_owned).to_vec();
    cluster.router_flags = vec!["--served-model-name".into(), "bench".into()];
    Ok(Cluster::start(&cluster))
}

/// Milliseconds from sending the request to the first token's text.
fn cluster_ttft(cluster: &Cluster, prompt: &[TokenId]) -> anyhow::Result<f64> {
    let tokens: Vec<_> = prompt.iter().map(|token| token.0).collect();
    let body = json!({"model": "bench", "prompt": tokens, "max_tokens": 4, "temperature": 0, "ignore_eos": true, "stream": true});
    let body = body.to_string();
    let begun = Instant::now();
    let (status, stream) = cluster.post_stream("/v1/completions", &body);
    ensure!(status == 200, "status {status}");
    let mut first = None;
    for line in stream.lines() {
        if line?.starts_with("data: {") && first.is_none() {
            first = Some(begun.elapsed());
        }
    }
    Ok(first.context("the stream has tokens")?.as_secs_f64() * 1e3)
}

fn measure_peer(python: &Path, options: &Options, figures: &mut Figures) -> anyhow::Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/hf_speed.py");
    let output = Command::new(python)
        .arg(script)
        .args(["--repeats", "3", "--threads", &options.threads.to_string(), "--model"])
        .arg(&options.model)
        .output()
        .with_context(|| format!("{}", python.display()))?;
    ensure!(output.status.success(), "the peer failed: {}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout)?;
    let speed =
        |value: &Value| value["tokens_per_s"].as_f64().context("the peer's figures have tokens_per_s");
    for tokens in PREFILL {
        figures.add(
            format!("transformers: prefill {tokens}, tokens/s"),
            speed(&found["prefill"][tokens.to_string()])?,
        );
    }
    figures.add("transformers: decode, 1 stream, tokens/s".into(), speed(&found["decode_best"])?);
    Ok(())
}

/// Every figure's measurements, in the order in which they first came.
#[derive(Default)]
struct Figures(Vec<(String, Vec<f64>)>);

impl Figures {
    fn add(&mut self, name: String, value: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name, vec![value])),
        }
    }

    fn median(&self, name: &str) -> Option<f64> {
        let (_, values) = self.0.iter().find(|(known, _)| known == name)?;
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        Some(sorted[sorted.len() / 2])
    }
}

fn report(options: &Options, figures: &Figures) -> anyhow::Result<()> {
    println!("{:<46} {:>10} {:>10} {:>10}", "figure", "median", "least", "most");
    for (name, values) in &figures.0 {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        println!("{name:<46} {:>10.1} {least:>10.1} {most:>10.1}", figures.median(name).unwrap_or(0.0));
    }
    let one = "decode, 1 stream, tokens/s";
    let many = format!("decode, {STREAMS} streams, tokens/s");
    let mut ratios: Vec<(String, f64)> = Vec::new();
    let mut ratio = |what: String, a: &str, b: &str| {
        if let (Some(a), Some(b)) = (figures.median(a), figures.median(b)) {
            ratios.push((what, a / b));
        }
    };
    for name in PREFILL.map(|tokens| format!("prefill {tokens}, tokens/s")).iter().chain([&one.to_owned()]) {
        ratio(format!("{name}: ours / transformers"), name, &format!("transformers: {name}"));
    }
    ratio(format!("decode: {STREAMS} streams / 1 stream"), &many, one);
    ratio(
        "TTFT 2000: disaggregated / one process".into(),
        "TTFT 2000, disaggregated, ms",
        "TTFT 2000, one process, ms",
    );
    println!();
    for (what, value) in &ratios {
        println!("{what:<60} {value:.3}");
    }
    if let Some(file) = &options.json {
        let values: serde_json::Map<_, _> =
            figures.0.iter().map(|(name, values)| (name.clone(), json!(values))).collect();
        let ratios: serde_json::Map<_, _> =
            ratios.into_iter().map(|(what, value)| (what, json!(value))).collect();
        let command: Vec<_> = std::env::args().collect();
        let all = json!({"cpu": tandem_benches::cpu_model(), "threads": options.threads, "model": options.model, "command": command.join(" "), "measured": values, "ratios": ratios});
        std::fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}
