use super::{CudaError, Device, DeviceExtent};
use cudarc::driver::{CudaEvent, CudaStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Copies by a GPU's copy engines, several at once, none of which waits for other work of the GPU, nor other work for
/// them.
pub struct Copies {
    device: Arc<Device>,
    streams: Vec<Arc<CudaStream>>,
    next: AtomicUsize,
}

/// A point in the order of [`Copies`]: everything that was started before.
pub struct Mark {
    device: Arc<Device>,
    events: Vec<CudaEvent>,
}

impl Copies {
    /// On `at_once` streams: small copies overlap so much of what each costs beside its bytes.
    ///
    /// # Errors
    /// When the driver makes no streams.
    pub fn new(device: &Arc<Device>, at_once: usize) -> Result<Copies, CudaError> {
        let streams = (0..at_once.max(1)).map(|_| device.stream()).collect::<Result<_, _>>()?;
        Ok(Copies { device: Arc::clone(device), streams, next: AtomicUsize::new(0) })
    }

    /// Starts a copy. Either extent may be another GPU's, or another process's; both must be held until it is over.
    ///
    /// # Errors
    /// When the two have different lengths, or the driver refuses.
    pub fn start(&self, from: &DeviceExtent, to: &DeviceExtent) -> Result<(), CudaError> {
        let stream = self.next.fetch_add(1, Ordering::Relaxed) % self.streams.len();
        from.copy_to(&self.streams[stream], to)
    }

    /// Copies to the host, after what was started before; returns when the bytes are there.
    ///
    /// # Errors
    /// When `out` has another length, or the GPU fails.
    pub fn read(&self, from: &DeviceExtent, out: &mut [u8]) -> Result<(), CudaError> {
        from.read(&self.streams[0], out)
    }

    /// Names everything that was started so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn mark(&self) -> Result<Mark, CudaError> {
        let events = self.streams.iter().map(|stream| stream.record_event(None)).collect();
        let events = self.device.said("mark its copies", events)?;
        Ok(Mark { device: Arc::clone(&self.device), events })
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Mark {
    /// Whether all of it is over.
    ///
    /// # Errors
    /// When one of the copies, or the GPU, failed.
    pub fn is_over(&mut self) -> Result<bool, CudaError> {
        while let Some(event) = self.events.last() {
            if !self.device.said("copy", event.try_is_complete())? {
                return Ok(false);
            }
            self.events.pop();
        }
        Ok(true)
    }

    /// Waits until all of it is over: the driver ends every copy, if with an error.
    ///
    /// # Errors
    /// When one of the copies, or the GPU, failed.
    pub fn wait(self) -> Result<(), CudaError> {
        self.events.iter().try_for_each(|event| self.device.said("copy", event.synchronize()))
    }
}
