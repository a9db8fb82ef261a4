//! Prompts that are sent again after their pages went to others: their KV comes back from where it is stored, and the
//! answers are those of one process that computes everything, to the last bit.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
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

/// Chunks of one node after the other, on disk; gone when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let dir = std::env::temp_dir().join(format!("tandem-cached-{name}-{}", std::process::id()));
        // Of an earlier process of this number.
        let _ = fs::remove_dir_all(&dir);
        Folder(dir)
    }

    /// Nodes that keep chunks there, as their disk.
    fn as_disk(&self) -> ClusterOptions {
        let mut options = options();
        let dir = self.0.display().to_string();
        options.prefill_on.node_flags.extend(["--cache-disk".into(), dir]);
        options.prefill_on.node_flags.extend(["--cache-disk-size", "1GiB"].map(String::from));
        options
    }

    /// Nodes that keep chunks there, as a store that all share.
    fn as_remote(&self) -> ClusterOptions {
        let mut options = options();
        options.prefill_on.node_flags.extend(["--cache-remote".into(), format!("fs://{}", self.0.display())]);
        options
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Left behind at worst.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A node computes prompts and goes; the one after it has nothing to compute, and finds chunks in `tier`.
fn check(options: &ClusterOptions, tier: &str) {
    let prompts = prompts(PROMPTS, MAX_PROMPT);
    let mut cluster = Cluster::start(options);
    let cold = ask(&cluster, &prompts, 1);
    assert_computes_the_same(&options.model, &prompts, &cold);
    assert!(cluster.process("prefill-0").terminate(Duration::from_secs(60)), "it drains");
    drop(cluster);
    let cluster = Cluster::start(options);
    let warm = ask(&cluster, &prompts, 1);
    assert_computes_the_same(&options.model, &prompts, &warm);
    let from_tier = assert_all_reused(&prompts, &warm, tier);
    assert!(from_tier > 0);
    println!("{from_tier} tokens came back from {tier}");
}

#[test]
fn a_restarted_node_finds_what_is_on_disk() {
    check(&Folder::new("disk").as_disk(), "disk");
}

#[test]
fn a_node_finds_what_another_stored() {
    check(&Folder::new("remote").as_remote(), "remote");
}

/// Flips a bit in every 16 KiB of a file.
fn damage(file: &Path) {
    let mut bytes = fs::read(file).expect("a file of the tier's");
    for at in (8192..bytes.len()).step_by(16 << 10) {
        bytes[at] ^= 4;
    }
    fs::write(file, bytes).expect("a file of the tier's");
}

#[test]
fn what_is_damaged_on_disk_is_computed() {
    let folder = Folder::new("damaged");
    let options = folder.as_disk();
    let prompts = prompts(6, MAX_PROMPT);
    let mut cluster = Cluster::start(&options);
    let cold = ask(&cluster, &prompts, 1);
    assert!(cluster.process("prefill-0").terminate(Duration::from_secs(60)), "it drains");
    drop(cluster);
    let files = fs::read_dir(&folder.0).expect("its folder").map(|entry| entry.expect("an entry").path());
    let slabs = files.filter(|file| file.metadata().is_ok_and(|data| data.is_file() && data.len() > 1 << 20));
    let damaged = slabs.map(|slab| damage(&slab)).count();
    assert!(damaged > 0, "there are slabs");
    let cluster = Cluster::start(&options);
    let warm = ask(&cluster, &prompts, 1);
    assert_computes_the_same(&options.model, &prompts, &warm);
    assert_eq!(cold.len(), warm.len());
    let metrics = cluster.node_page("prefill-0", "/metrics").1;
    let found = metric(&metrics, "tandem_node_cache_damaged_total", "");
    assert!(found > Some(0.0), "{metrics}");
    let reused = metric(&metrics, "tandem_node_cache_reused_tokens_total", "tier=\"disk\"");
    assert_eq!(reused, Some(0.0), "{metrics}");
}
