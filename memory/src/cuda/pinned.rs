use super::{CudaError, Device};
use crate::HostRegion;
use cudarc::driver::sys;
use std::sync::Arc;

/// Host memory that GPUs copy from and to at full speed, and without a thread. Locked into the host's memory as
/// long as this lives.
pub struct PinnedRegion {
    // Let go before the memory is.
    _pin: Pin,
    memory: Arc<HostRegion>,
}

impl PinnedRegion {
    /// Pins memory of any kind, for all GPUs of this process.
    ///
    /// # Errors
    /// When the driver refuses: for one, when it is pinned already.
    pub fn pin(device: &Arc<Device>, memory: Arc<HostRegion>) -> Result<PinnedRegion, CudaError> {
        // SAFETY: the range is mapped as long as the region, which this holds longer than the pin.
        let pin = unsafe { Pin::new(device, memory.base(), memory.len()) }?;
        Ok(PinnedRegion { _pin: pin, memory })
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<HostRegion> {
        &self.memory
    }
}

/// A range of host memory that is pinned, and reached by a GPU.
pub(crate) struct Mapped {
    pin: Pin,
    address: u64,
}

impl Mapped {
    /// # Safety
    /// The range must be mapped as long as this lives.
    pub(crate) unsafe fn new(device: &Arc<Device>, base: *mut u8, len: usize) -> Result<Mapped, CudaError> {
        // SAFETY: the caller's promise.
        let pin = unsafe { Pin::with(device, base, len, sys::CU_MEMHOSTREGISTER_DEVICEMAP) }?;
        let mut address = 0;
        // SAFETY: the range is registered with an address for devices, and `address` is ours to write.
        let said = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut address, base.cast(), 0) };
        device.said("reach pinned memory of the host", said.result())?;
        Ok(Mapped { pin, address })
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.pin.device
    }

    /// Where the range begins, for the GPU's kernels.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

/// A range of host memory that is pinned as long as this lives.
pub(super) struct Pin {
    device: Arc<Device>,
    base: *mut u8,
}

// SAFETY: the address is not used but to name the range to the driver, from any thread.
unsafe impl Send for Pin {}
// SAFETY: as above.
unsafe impl Sync for Pin {}

impl Pin {
    /// # Safety
    /// The range must be mapped as long as this lives.
    pub(super) unsafe fn new(device: &Arc<Device>, base: *mut u8, len: usize) -> Result<Pin, CudaError> {
        // SAFETY: the caller's promise.
        unsafe { Pin::with(device, base, len, 0) }
    }

    /// # Safety
    /// As for [`Pin::new`].
    unsafe fn with(device: &Arc<Device>, base: *mut u8, len: usize, flags: u32) -> Result<Pin, CudaError> {
        device.bind()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | flags;
        // SAFETY: the caller's promise.
        let said = unsafe { sys::cuMemHostRegister_v2(base.cast(), len, flags) };
        device.said(&format!("pin {len} bytes of host memory"), said.result())?;
        Ok(Pin { device: Arc::clone(device), base })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // What is still being copied needs it.
        let context = self.device.context();
        context.record_err(context.synchronize());
        // SAFETY: registered in `new`, and once.
        context.record_err(unsafe { sys::cuMemHostUnregister(self.base.cast()).result() });
    }
}
