//! A cluster whose nodes compute on GPUs: on one, and on two where there are two. Without a GPU this says that it was
//! skipped, and passes.

use std::time::{Duration, Instant};
use tandem_memory::cuda::{CudaError, Device};
use tandem_tests::one_process::{ask, assert_all_reused, assert_computes_nearly_the_same, prompts};
use tandem_tests::processes::{Cluster, ClusterOptions, metric, model};

const PROMPTS: usize = 100;
const CONCURRENT: usize = 64;
const LONGEST: usize = 2000;

/// How many GPUs there are.
fn gpus() -> usize {
    match Device::count() {
        Ok(0) => println!("skipped: there is no GPU"),
        Ok(count) => return count,
        Err(error @ CudaError::NoDriver) => println!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    }
    0
}

fn on(prefill: usize, decode: usize, transport: &str) -> ClusterOptions {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mut options = ClusterOptions::new(&model("tiny").expect("the project's own model"));
    let device = |ordinal: usize| words(&["--device", &format!("cuda:{ordinal}")]);
    options.prefill_on.node_flags = device(prefill);
    options.decode_on.node_flags = device(decode);
    options.node_flags = words(&[
        "--kv-dtype",
        "f32",
        "--kv-memory",
        "1GiB",
        "--peer-timeout",
        "10s",
        "--transport",
        transport,
    ]);
    options.router_flags = words(&["--peer-timeout", "10s", "--served-model-name", "tiny"]);
    options
}

/// Answers many prompts at once, compares them with one process's, and sees that all KV went by this
/// path, and that nothing is held afterwards.
fn check(options: &ClusterOptions, path: &str) {
    let mut cluster = Cluster::start(options);
    let prompts = prompts(PROMPTS, LONGEST);
    let answers = ask(&cluster, &prompts, CONCURRENT);
    assert_computes_nearly_the_same(&options.model, &prompts, &answers);
    cluster.wait("not everything was freed", |cluster| {
        (cluster.metric("tandem_router_requests_running")? == 0.0).then_some(())
    });
    let until = Instant::now() + Duration::from_secs(10);
    for node in ["prefill-0", "decode-0"] {
        loop {
            let (_, metrics) = cluster.node_page(node, "/metrics");
            let value = |name: &str| metric(&metrics, &format!("tandem_node_{name}"), "").expect(name);
            let free = value("kv_pages") == value("kv_pages_free")
                && value("landing_slots") == value("landing_slots_free")
                && value("handoffs") == 0.0;
            if free {
                assert_eq!(value("checksum_mismatches_total"), 0.0);
                assert!(value("gpu_memory_bytes") > value("gpu_memory_free_bytes"));
                break;
            }
            assert!(Instant::now() < until, "{node} still holds something: {metrics}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let (_, decode) = cluster.node_page("decode-0", "/metrics");
    let landed: Vec<&str> =
        decode.lines().filter(|line| line.starts_with("tandem_transport_bytes_landed_total{")).collect();
    println!("{} prompts; landed: {landed:#?}", prompts.len());
    for node in ["prefill-0", "decode-0"] {
        for line in cluster.process(node).log_lines() {
            if line["level"] == "WARN" || line["level"] == "ERROR" || line["why_not"].is_string() {
                println!("{line}");
            }
        }
    }
    let other = landed.iter().filter(|line| !line.contains(&format!("path=\"{path}\"")));
    let other: Vec<_> = other.filter(|line| !line.ends_with(" 0")).collect();
    assert!(other.is_empty(), "not all went by {path}: {other:?}");
}

#[test]
fn both_nodes_on_one_gpu() {
    if gpus() > 0 {
        check(&on(0, 0, "auto"), "cuda_ipc");
    }
}

#[test]
fn each_node_on_a_gpu_of_its_own() {
    match gpus() {
        0 => {}
        1 => println!("skipped: there is one GPU only"),
        _ => check(&on(0, 1, "auto"), "cuda_ipc"),
    }
}

/// Prompts come again after their pages went to others: their KV comes back from pinned memory of the host.
#[test]
fn what_left_the_pages_is_not_computed_again() {
    if gpus() == 0 {
        return;
    }
    let mut options = on(0, 0, "auto");
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    options.node_flags.drain(2..4);
    options.prefill_on.node_flags.extend(words(&["--kv-memory", "24MiB", "--cache-memory", "1GiB"]));
    options.decode_on.node_flags.extend(words(&["--kv-memory", "1GiB"]));
    let cluster = Cluster::start(&options);
    let prompts = prompts(40, LONGEST);
    let cold = ask(&cluster, &prompts, 1);
    assert_computes_nearly_the_same(&options.model, &prompts, &cold);
    let warm = ask(&cluster, &prompts, 8);
    assert_computes_nearly_the_same(&options.model, &prompts, &warm);
    let from_host = assert_all_reused(&prompts, &warm, "host");
    let metrics = cluster.node_page("prefill-0", "/metrics").1;
    assert_eq!(metric(&metrics, "tandem_node_cache_damaged_total", ""), Some(0.0), "{metrics}");
    println!("{from_host} tokens came back from host memory");
    assert!(from_host > 0);
}

/// Staged through memory of the host, as between hosts.
#[test]
fn through_the_hosts_memory() {
    if gpus() > 0 {
        for path in ["tls", "quic"] {
            check(&on(0, gpus() - 1, path), path);
        }
    }
}
