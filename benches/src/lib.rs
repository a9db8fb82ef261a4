//! What several benches say of the machine that they ran on, and the KV that those of GPUs move.

#[cfg(feature = "cuda")]
pub mod kv;

/// The processor's name; empty where the system has none.
#[must_use]
pub fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name"));
    model.unwrap_or_default().trim_start_matches(['\t', ':', ' ']).into()
}
