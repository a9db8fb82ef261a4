//! The KV pages of a node on a GPU.

use super::DevicePages;
use crate::layout::PagedLayout;
use crate::pages::{Paged, PagesError, both_in_pool, pool_bytes};
use cudarc::driver::{CudaEvent, CudaStream, result};
use std::sync::Arc;
use tandem_memory::cuda::{CudaError, Device, DeviceRegion};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::KvShape;

/// The KV pages of a node, for all layers, in memory of a GPU: laid out as [`crate::KvPages`].
///
/// Several streams use them. Whoever writes a layer's pages says so by [`KvDevicePages::written`], and whoever reads them
/// has its stream wait by [`KvDevicePages::after`]; neither waits itself.
pub struct KvDevicePages {
    shape: KvShape,
    pages: DevicePages,
    /// For each layer, after the work that wrote to it last.
    written: Vec<CudaEvent>,
    /// Copies of pages.
    stream: Arc<CudaStream>,
}

impl KvDevicePages {
    /// Takes memory for `pages` pages of `shape`, and fills it with zeros.
    ///
    /// # Errors
    /// When the shape is unusable or the GPU has no such memory.
    pub fn new(device: &Arc<Device>, shape: KvShape, pages: u32) -> Result<KvDevicePages, PagesError> {
        let len = pool_bytes(&shape, pages)?;
        let layout = PagedLayout::of(&shape, pages);
        let storage = DeviceRegion::take(device, len)?.extent(0..len)?;
        let stream = device.stream()?;
        // SAFETY: the memory was just taken, and nobody else has it.
        let said = unsafe { result::memset_d8_async(storage.address(), 0, len, stream.cu_stream()) };
        device.said("clear its KV pages", said.and_then(|()| stream.synchronize()))?;
        let events = (0..shape.layers).map(|_| device.context().new_event(None));
        let written = device.said("make events", events.collect::<Result<_, _>>())?;
        let pages = DevicePages::new(layout, storage).expect("the storage is as long as the layout says");
        Ok(KvDevicePages { shape, pages, written, stream })
    }

    /// Their memory and layout, for kernels.
    #[must_use]
    pub fn device_pages(&self) -> &DevicePages {
        &self.pages
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        self.pages.storage().region().device()
    }

    /// What `stream` was given so far writes `layer`: streams that are told to come after it wait for that.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Panics
    /// When the layer does not exist.
    pub fn written(&self, layer: LayerIdx, stream: &CudaStream) -> Result<(), CudaError> {
        let event = &self.written[layer.0 as usize];
        self.device().said("note that KV is written", event.record(stream))
    }

    /// Has `stream` wait for what was written to `layer` so far, before whatever it is given from now on.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Panics
    /// When the layer does not exist.
    pub fn after(&self, layer: LayerIdx, stream: &CudaStream) -> Result<(), CudaError> {
        self.device().said("wait for KV", stream.wait(&self.written[layer.0 as usize]))
    }

    fn copy(&self, from: PageId, to: PageId) -> Result<(), CudaError> {
        let len = self.shape.layer_page_bytes();
        for layer in (0..self.shape.layers).map(LayerIdx) {
            self.after(layer, &self.stream)?;
            let part = |page: PageId| {
                let start = (layer.0 as usize * self.pages() as usize + page.0 as usize) * len;
                self.pages.storage().part(start..start + len)
            };
            part(from)?.copy_to(&self.stream, &part(to)?)?;
        }
        self.device().said("copy a KV page", self.stream.synchronize())
    }
}

impl Paged for KvDevicePages {
    fn shape(&self) -> &KvShape {
        &self.shape
    }

    fn pages(&self) -> u32 {
        self.pages.layout().pages
    }

    fn copy_page(&mut self, from: PageId, to: PageId) -> Result<(), PagesError> {
        both_in_pool(from, to, self.pages())?;
        Ok(self.copy(from, to)?)
    }
}

impl std::fmt::Debug for KvDevicePages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvDevicePages({} pages of {:?} on {})", self.pages(), self.shape, self.device().name())
    }
}
