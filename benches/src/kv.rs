//! KV of the 8B shape on a GPU, for the benches that move it.

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUevent_flags;
use std::sync::Arc;
use tandem_kernels::cuda::{Chunk, CudaKernels, Place, Plan, PlanLimits};
use tandem_kernels::{Order, PagedLayout, Stored};
use tandem_memory::cuda::{Device, DeviceExtent, DeviceRegion};
use tandem_proto::ids::PageId;

/// Tokens of a whole chunk.
pub const CHUNK_TOKENS: u32 = 256;

/// KV of the 8B shape, in pools of twice the pages that are moved.
pub struct Shape {
    /// Of the pools.
    pub layout: PagedLayout,
    /// Tokens that are moved.
    pub tokens: u32,
}

impl Shape {
    /// Of so many tokens, in whole chunks.
    #[must_use]
    pub fn new(tokens: u32, order: Order) -> Shape {
        let layout = PagedLayout {
            layers: 32,
            pages: tokens / 16 * 2,
            page_tokens: 16,
            heads: 8,
            stored: Stored::KeysAndValues,
            row_bytes: 256,
            order,
        };
        Shape { layout, tokens }
    }

    /// Chunks that are moved.
    #[must_use]
    pub fn chunks(&self) -> usize {
        (self.tokens / CHUNK_TOKENS) as usize
    }

    /// Bytes of one, packed.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        self.layout.layer_bytes(CHUNK_TOKENS) * self.layout.layers as usize
    }

    /// Bytes of all, packed.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.chunk_bytes() * self.chunks()
    }

    /// The pages of all chunks, in an order that looks random.
    #[must_use]
    pub fn pages(&self, seed: u64) -> Vec<PageId> {
        let mut state = seed;
        let mut pages: Vec<PageId> = (0..self.layout.pages).map(PageId).collect();
        for i in (1..pages.len()).rev() {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            pages.swap(i, (state >> 33) as usize % (i + 1));
        }
        pages.truncate((self.tokens / 16) as usize);
        pages
    }
}

/// One GPU with what is needed there.
pub struct Gpu {
    /// Its kernels, loaded.
    pub kernels: Arc<CudaKernels>,
    /// What its plans go to.
    pub stream: Arc<CudaStream>,
}

impl Gpu {
    /// Opens it.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn open(ordinal: usize) -> anyhow::Result<Gpu> {
        let device = Device::open(ordinal)?;
        Ok(Gpu { kernels: CudaKernels::load(&device)?, stream: device.stream()? })
    }

    /// The same GPU with a stream of its own.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn beside(&self) -> anyhow::Result<Gpu> {
        Ok(Gpu { kernels: Arc::clone(&self.kernels), stream: self.kernels.device().stream()? })
    }

    /// Memory of it.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn take(&self, len: usize) -> anyhow::Result<DeviceExtent> {
        Ok(DeviceRegion::take(self.kernels.device(), len)?.extent(0..len)?)
    }

    /// A plan for all chunks.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn plan(&self, shape: &Shape) -> anyhow::Result<Plan> {
        let limits = PlanLimits {
            chunks: shape.chunks(),
            pages: (shape.tokens / 16) as usize,
            layers: shape.layout.layers,
        };
        Ok(Plan::new(&self.kernels, &self.stream, limits)?)
    }

    /// Microseconds on the GPU.
    ///
    /// # Errors
    /// When the GPU refuses.
    pub fn time(&self, work: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let start = event()?;
        work()?;
        Ok(f64::from(start.elapsed_ms(&event()?)?) * 1e3)
    }
}

/// Sets a plan for all chunks of `pages`, whose places are those given.
///
/// # Errors
/// When the GPU refuses.
pub fn set<'a>(
    plan: &mut Plan,
    shape: &Shape,
    pages: &'a [PageId],
    place: impl Fn(usize) -> Place<'a>,
) -> anyhow::Result<()> {
    let per_chunk = (CHUNK_TOKENS / 16) as usize;
    let chunks: Vec<Chunk<'_>> = (pages.chunks(per_chunk).enumerate())
        .map(|(index, pages)| Chunk { tokens: CHUNK_TOKENS, pages, place: place(index) })
        .collect();
    Ok(plan.set(&shape.layout, None, &chunks)?)
}

/// The place of each chunk.
///
/// # Errors
/// When the extent is too short.
pub fn parts(extent: &DeviceExtent, shape: &Shape) -> anyhow::Result<Vec<DeviceExtent>> {
    let len = shape.chunk_bytes();
    (0..shape.chunks()).map(|i| Ok(extent.part(i * len..(i + 1) * len)?)).collect()
}

/// Random bytes: of zeros, more would be moved in the same time.
///
/// # Errors
/// When the GPU refuses.
pub fn fill(gpu: &Gpu, extent: &DeviceExtent) -> anyhow::Result<()> {
    let mut state = 1u64;
    let mut block = Vec::with_capacity(64 << 20);
    while block.len() < 64 << 20 {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        block.extend((state ^ (state >> 29)).to_le_bytes());
    }
    for start in (0..extent.len()).step_by(block.len()) {
        let end = (start + block.len()).min(extent.len());
        // No two blocks alike.
        block[..8].copy_from_slice(&(start as u64).to_le_bytes());
        extent.part(start..end)?.write(&gpu.stream, &block[..end - start])?;
    }
    Ok(())
}
