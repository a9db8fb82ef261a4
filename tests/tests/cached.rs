//! Prompts that are sent again after their pages went to others: their KV comes back from where it is stored, and the
//! answers are those of one process that computes everything, to the last bit.

use serde_json::Value;
use tandem_tests::one_process::{ask, assert_all_reused, assert_computes_the_same, prompts};
use tandem_tests::processes::{Cluster, ClusterOptions, metric, model};

const PROMPTS: usize = 24;
const MAX_PROMPT: usize = 1800;

/// Nodes with so few pages that every prompt takes those of others.
fn options() -> ClusterOptions {
    let mut options = ClusterOptions::new(&model("tiny").expect("the project's own model"));
    let flags = |flags: &[&str]| flags.iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>();
    options.node_flags = flags(&["--peer-timeout", "10s"]);
    options.router_flags = flags(&["--peer-timeout", "10s", "--served-model-name", "tiny"]);
    options.prefill_on.node_flags = flags(&["--kv-memory", "24MiB", "--cache-memory", "1GiB"]);
    options
}

#[test]
fn what_left_the_pages_is_not_computed_again() {
    let options = options();
    let cluster = Cluster::start(&options);
    let prompts = prompts(PROMPTS, MAX_PROMPT);
    let cold = ask(&cluster, &prompts, 1);
    assert_computes_the_same(&options.model, &prompts, &cold);
    let warm = ask(&cluster, &prompts, 8);
    assert_computes_the_same(&options.model, &prompts, &warm);
    let from_host = assert_all_reused(&prompts, &warm, "host");
    let metrics = cluster.node_page("prefill-0", "/metrics").1;
    let counted = metric(&metrics, "tandem_node_cache_reused_tokens_total", "tier=\"host\"");
    assert!(from_host > 0 && counted >= Some(from_host as f64), "{from_host} tokens of {counted:?}");
    assert_eq!(metric(&metrics, "tandem_node_cache_damaged_total", ""), Some(0.0), "{metrics}");
    let status: Value = serde_json::from_str(&cluster.node_page("prefill-0", "/status").1).expect("JSON");
    assert!(status["cache"]["host"]["chunks"].as_u64() > Some(0), "{status}");
    println!("{from_host} tokens came back from host memory");
}
