//! Compiles the CUDA kernels where nvcc is found, for the GPUs below; elsewhere takes the PTX that is checked in, which
//! the driver compiles when it is loaded. `scripts/kernels-ptx` makes that.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/cuda/gather.cu");
    println!("cargo:rerun-if-changed=src/cuda/gather.ptx");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=PATH");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let image = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("gather.image");
    if let Some(nvcc) = nvcc() {
        match compile(&nvcc, &image) {
            Ok(()) => return,
            Err(problem) => println!("cargo:warning=the checked-in PTX is used: {problem}"),
        }
    }
    let mut ptx = std::fs::read("src/cuda/gather.ptx").expect("src/cuda/gather.ptx is checked in");
    ptx.push(0); // The driver wants text to end so.
    std::fs::write(&image, ptx).expect("OUT_DIR can be written");
}

fn nvcc() -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = home.into_iter().chain(env::split_paths(&path)).chain(["/usr/local/cuda/bin".into()]);
    folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// Machine code for Ampere and Hopper, and PTX for what comes after.
fn compile(nvcc: &Path, image: &Path) -> Result<(), String> {
    let done = Command::new(nvcc)
        .args(["-fatbin", "-O3", "-std=c++17", "-Werror", "all-warnings"])
        .args(["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a"])
        .args(["-gencode", "arch=compute_80,code=compute_80", "src/cuda/gather.cu", "-o"])
        .arg(image)
        .output()
        .map_err(|error| format!("{} does not start: {error}", nvcc.display()))?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!(
        "{} failed: {}",
        nvcc.display(),
        String::from_utf8_lossy(&done.stderr).trim().replace('\n', " ")
    ))
}
