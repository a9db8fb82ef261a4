use super::pinned::Pin;
use super::{CudaError, Device, DeviceRegion};
use cudarc::driver::{CudaStream, DriverError, sys};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The memory of a GPU that belongs to a [`crate::HostRegion`], and the way between the two.
pub(crate) struct Twin {
    // Let go first: it waits for what is being copied.
    _pin: Pin,
    region: Arc<DeviceRegion>,
    base: *mut u8,
    /// Those that no thread uses now. As many as threads ever copied at once.
    streams: Mutex<Vec<Arc<CudaStream>>>,
}

// SAFETY: the host's memory is read and written by the GPU alone, in the methods below.
unsafe impl Send for Twin {}
// SAFETY: as above.
unsafe impl Sync for Twin {}

impl Twin {
    /// For the region mapped at `base`, which holds this and is unmapped later.
    pub(crate) fn new(device: &Arc<Device>, base: *mut u8, len: usize) -> Result<Twin, CudaError> {
        let region = DeviceRegion::take(device, len)?;
        // SAFETY: the region that holds this drops it before it unmaps the range.
        let pin = unsafe { Pin::new(device, base, len) }?;
        Ok(Twin { _pin: pin, region, base, streams: Mutex::default() })
    }

    pub(crate) fn region(&self) -> &Arc<DeviceRegion> {
        &self.region
    }

    /// Copies to the host, and waits for it.
    ///
    /// # Safety
    /// The range must lie in the region, and nobody else may use these bytes of the host meanwhile.
    pub(crate) unsafe fn fetch(&self, start: usize, len: usize) -> Result<(), CudaError> {
        // SAFETY: in bounds, and the host's bytes are nobody else's, by the caller's promise; waited for below.
        self.copy(len, "to the host", |stream| unsafe {
            let (to, from) = (self.base.add(start), self.region.address() + start as u64);
            sys::cuMemcpyDtoHAsync_v2(to.cast(), from, len, stream).result()
        })
    }

    /// Copies from the host, and waits for it. The range lies in the region.
    pub(crate) fn deposit(&self, start: usize, len: usize) -> Result<(), CudaError> {
        // SAFETY: extents lie in their region; the GPU reads the host's bytes, to which no reference is made, and its
        // own memory is never referred to.
        self.copy(len, "from the host", |stream| unsafe {
            let (from, to) = (self.base.add(start), self.region.address() + start as u64);
            sys::cuMemcpyHtoDAsync_v2(to, from.cast(), len, stream).result()
        })
    }

    fn copy(
        &self,
        len: usize,
        way: &str,
        start: impl FnOnce(sys::CUstream) -> Result<(), DriverError>,
    ) -> Result<(), CudaError> {
        if len == 0 {
            return Ok(());
        }
        let device = self.region.device();
        let spare = self.streams().pop();
        let stream = spare.map_or_else(|| device.stream(), Ok)?;
        device.bind()?;
        let copied = start(stream.cu_stream()).and_then(|()| stream.synchronize());
        self.streams().push(stream);
        device.said(&format!("copy {len} bytes {way}"), copied)
    }

    fn streams(&self) -> MutexGuard<'_, Vec<Arc<CudaStream>>> {
        // Guards single operations on a collection.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
