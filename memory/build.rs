//! The build script of every crate with CUDA kernels: compiles `src/cuda/*.cu` where nvcc is found, for the GPUs below;
//! elsewhere takes the PTX that is checked in beside it, which the driver compiles when it is loaded.
//! `scripts/kernels-ptx` makes that.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=PATH");
    let mut sources = Vec::new();
    for entry in std::fs::read_dir("src/cuda").expect("src/cuda is there") {
        let path = entry.expect("src/cuda can be read").path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => sources.push(path.clone()),
            Some("cuh" | "ptx") => {}
            _ => continue,
        }
        println!("cargo:rerun-if-changed={}", path.display());
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let nvcc = nvcc();
    for source in sources {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
        let image = out.join(source.file_stem().expect("it has a name")).with_extension("image");
        match nvcc.as_ref().map(|nvcc| compile(nvcc, &source, &image)) {
            Some(Ok(())) => continue,
            Some(Err(problem)) => println!("cargo:warning=the checked-in PTX is used: {problem}"),
            None => {}
        }
        let ptx = source.with_extension("ptx");
        let mut ptx = std::fs::read(&ptx).unwrap_or_else(|e| panic!("{} is checked in: {e}", ptx.display()));
        ptx.push(0); // The driver wants text to end so.
        std::fs::write(&image, ptx).expect("OUT_DIR can be written");
    }
}

fn nvcc() -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = home.into_iter().chain(env::split_paths(&path)).chain(["/usr/local/cuda/bin".into()]);
    folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// Machine code for Ampere and Hopper, and PTX for what comes after.
fn compile(nvcc: &Path, source: &Path, image: &Path) -> Result<(), String> {
    let done = Command::new(nvcc)
        .args(["-fatbin", "-O3", "-std=c++17", "-Werror", "all-warnings"])
        .args(["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a"])
        .args(["-gencode", "arch=compute_80,code=compute_80"])
        .arg(source)
        .arg("-o")
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
