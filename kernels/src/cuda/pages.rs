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
    /// The same memory as one layer of all layers' pages.
    all_layers: DevicePages,
    /// For each layer, after the work that wrote to it last.
    written: Vec<Arc<CudaEvent>>,
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
        if shape.layers.checked_mul(pages).is_none() {
            let page_bytes = shape.layer_page_bytes() * shape.layers as usize;
            return Err(PagesError::TooLarge { pages, page_bytes });
        }
        let layout = PagedLayout::of(&shape, pages);
        let storage = DeviceRegion::take(device, len)?.extent(0..len)?;
        let stream = device.stream()?;
        // SAFETY: the memory was just taken, and nobody else has it.
        let said = unsafe { result::memset_d8_async(storage.address(), 0, len, stream.cu_stream()) };
        device.said("clear its KV pages", said.and_then(|()| stream.synchronize()))?;
        let events = (0..shape.layers).map(|_| device.context().new_event(None).map(Arc::new));
        let written = device.said("make events", events.collect::<Result<_, _>>())?;
        let of = |layout| DevicePages::new(layout, storage.clone()).expect("the storage is as long");
        let all_layers = of(PagedLayout { layers: 1, pages: shape.layers * pages, ..layout });
        Ok(KvDevicePages { shape, pages: of(layout), all_layers, written, stream })
    }

    /// Their memory and layout, for kernels.
    #[must_use]
    pub fn device_pages(&self) -> &DevicePages {
        &self.pages
    }

    /// The same memory as one layer, which has the pages of all layers: so that one launch reaches them all.
    pub(super) fn all_layers(&self) -> &DevicePages {
        &self.all_layers
    }

    /// A page of a layer, as a page of [`KvDevicePages::all_layers`].
    pub(super) fn all_layers_page(&self, layer: LayerIdx, page: PageId) -> PageId {
        PageId(layer.0 * self.pages() + page.0)
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

    /// What is to be waited for before `layer` is read, unless that is over.
    pub(super) fn not_yet_written(&self, layer: LayerIdx) -> Option<Arc<CudaEvent>> {
        let event = &self.written[layer.0 as usize];
        (!event.is_complete()).then(|| Arc::clone(event))
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
