//! A model, its pages and its kernels, on the device that the options name.

use crate::NodeOptions;
use crate::device::{Device, Shown};
use crate::warm;
use anyhow::Context;
use std::time::Instant;
use tandem_engine::{CpuEngine, Engine, LoadOptions, ModelInfo};
use tandem_kernels::{CpuKernels, Kernels, KvPages};

/// What a node needs of its device.
pub(crate) struct Loaded<E: Engine, K: Kernels<Pages = E::Pages>> {
    pub(crate) engine: E,
    pub(crate) kv: E::Pages,
    pub(crate) kernels: K,
    pub(crate) device: Shown,
    /// The one that it computes on, for the transport.
    #[cfg(feature = "cuda")]
    pub(crate) gpu: Option<std::sync::Arc<tandem_memory::cuda::Device>>,
}

/// Memory for pages on a CPU, unless the options say how much.
const CPU_KV_BYTES: usize = 1 << 30;

pub(crate) fn on_cpu(options: &NodeOptions) -> anyhow::Result<Loaded<CpuEngine, CpuKernels>> {
    let begun = Instant::now();
    if options.gpu_memory_utilization.is_some() {
        anyhow::bail!("--gpu-memory-utilization is for GPUs: say --device cuda:N, or --kv-memory instead");
    }
    let mut load = LoadOptions { format: options.load_format, ..LoadOptions::default() };
    load.kv_dtype = options.kv_dtype.0.unwrap_or(load.kv_dtype);
    if options.threads > 0 {
        load.threads = options.threads;
    }
    let engine = CpuEngine::load(&options.model, load).with_context(|| of_model(options))?;
    let info = engine.info();
    let bytes = options.kv_memory.unwrap_or(CPU_KV_BYTES);
    let pages = pages_in(bytes, info);
    let kv = KvPages::new(info.kv, pages).with_context(|| format!("--kv-memory of {bytes} bytes"))?;
    tell(info, pages, begun);
    tracing::info!(threads = load.threads, "computing on the CPU");
    warm::spawn(&kv).context("a thread to warm KV memory")?;
    let device = Shown { device: Device::Cpu, model: "CPU".to_owned(), memory: Box::new(|| None) };
    Ok(Loaded {
        engine,
        kv,
        kernels: CpuKernels::default(),
        device,
        #[cfg(feature = "cuda")]
        gpu: None,
    })
}

/// How much of a GPU's memory a node uses, unless the options say so.
#[cfg(feature = "cuda")]
const GPU_MEMORY_UTILIZATION: f64 = 0.9;

/// `packed_memory` is what the node will take for packed KV.
#[cfg(feature = "cuda")]
pub(crate) fn on_gpu(
    options: &NodeOptions,
    ordinal: usize,
    packed_memory: usize,
) -> anyhow::Result<Loaded<tandem_engine::CudaEngine, tandem_kernels::cuda::CudaPacker>> {
    use std::sync::Arc;
    use tandem_engine::{CudaEngine, CudaOptions};
    use tandem_kernels::cuda::{CudaKernels, CudaPacker, KvDevicePages};

    let begun = Instant::now();
    if options.threads > 0 {
        anyhow::bail!("--threads is for --device cpu: a GPU needs none");
    }
    let what = || format!("--device cuda:{ordinal}");
    let gpu = tandem_memory::cuda::Device::open(ordinal).with_context(what)?;
    let (free_before, all) = gpu.memory()?;
    let load =
        CudaOptions { dtype: options.kv_dtype.0, format: options.load_format, ..CudaOptions::default() };
    let engine = CudaEngine::load(&options.model, load, &gpu).with_context(|| of_model(options))?;
    let info = engine.info();
    let kernels =
        CudaPacker::new(&CudaKernels::load(&gpu).with_context(what)?, &info.kv).with_context(what)?;
    let (free, _) = gpu.memory()?;
    let share = options.gpu_memory_utilization.unwrap_or(GPU_MEMORY_UTILIZATION);
    let used = free_before.saturating_sub(free) + packed_memory;
    let bytes = options.kv_memory.unwrap_or(((all as f64 * share) as usize).saturating_sub(used));
    let pages = pages_in(bytes, info);
    anyhow::ensure!(
        pages > 0,
        "{} has {} MiB of memory, {} MiB free with the model loaded: nothing is left for KV at \
         --gpu-memory-utilization {share}; raise it, or say --kv-memory",
        gpu.name(),
        all >> 20,
        free >> 20
    );
    let kv = KvDevicePages::new(&gpu, info.kv, pages).with_context(|| {
        format!(
            "{} MiB of KV on {}, with {} MiB free: take less by --gpu-memory-utilization or --kv-memory",
            bytes >> 20,
            gpu.name(),
            free >> 20
        )
    })?;
    tell(info, pages, begun);
    tracing::info!(gpu = gpu.name(), dtype = ?info.kv.dtype, "computing on a GPU");
    let watched = Arc::clone(&gpu);
    let device = Shown {
        device: Device::Cuda(ordinal),
        model: gpu.name().to_owned(),
        memory: Box::new(move || watched.memory().ok()),
    };
    Ok(Loaded { engine, kv, kernels, device, gpu: Some(gpu) })
}

fn of_model(options: &NodeOptions) -> String {
    format!("model {}", options.model.display())
}

fn pages_in(bytes: usize, info: &ModelInfo) -> u32 {
    let page_bytes = info.kv.layers as usize * info.kv.layer_page_bytes();
    u32::try_from(bytes / page_bytes).unwrap_or(u32::MAX)
}

fn tell(info: &ModelInfo, pages: u32, begun: Instant) {
    tracing::info!(
        model = info.name,
        architecture = info.architecture,
        parameters = info.parameters,
        kv_pages = pages,
        kv_tokens = u64::from(pages) * u64::from(info.kv.page_tokens),
        seconds = begun.elapsed().as_secs_f32(),
        "model loaded"
    );
}
