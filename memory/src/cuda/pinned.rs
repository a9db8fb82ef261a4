use super::{CudaError, Device};
use crate::HostRegion;
use cudarc::driver::sys;
use std::sync::Arc;

/// Host memory that GPUs copy from and to at full speed, and without a thread. Locked into the host's memory as
/// long as this lives.
pub struct PinnedRegion {
    device: Arc<Device>,
    memory: Arc<HostRegion>,
}

impl PinnedRegion {
    /// Pins memory of any kind, for all GPUs of this process.
    ///
    /// # Errors
    /// When the driver refuses: for one, when it is pinned already.
    pub fn pin(device: &Arc<Device>, memory: Arc<HostRegion>) -> Result<PinnedRegion, CudaError> {
        device.bind()?;
        // SAFETY: the range is mapped as long as the region, which this holds.
        let said = unsafe {
            sys::cuMemHostRegister_v2(memory.base().cast(), memory.len(), sys::CU_MEMHOSTREGISTER_PORTABLE)
        };
        device.said(&format!("pin {} bytes of host memory", memory.len()), said.result())?;
        Ok(PinnedRegion { device: Arc::clone(device), memory })
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<HostRegion> {
        &self.memory
    }
}

impl Drop for PinnedRegion {
    fn drop(&mut self) {
        // What is still being copied needs it.
        let context = self.device.context();
        context.record_err(context.synchronize());
        // SAFETY: registered in `pin`, and once.
        context.record_err(unsafe { sys::cuMemHostUnregister(self.memory.base().cast()).result() });
    }
}
