use super::gather::{Gather, PIECES};
use super::{CudaError, Device, DeviceExtent};
use cudarc::driver::{CudaEvent, CudaStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Copies by a GPU, several at once, none of which waits for other work of the GPU, nor other work for them.
pub struct Copies {
    device: Arc<Device>,
    streams: Vec<Arc<CudaStream>>,
    next: AtomicUsize,
    gather: Gather,
    /// Streams that were given copies since the last mark, by bit: those, and then the gatherer's.
    unmarked: AtomicU64,
}

/// A point in the order of [`Copies`], or of a stream.
pub struct Mark {
    device: Arc<Device>,
    events: Vec<CudaEvent>,
}

impl Copies {
    /// Copies that one launch of [`Copies::start_all`] makes, at most.
    pub const AT_ONCE: usize = PIECES;

    /// On `at_once` streams, of at most 63, and one more.
    ///
    /// # Errors
    /// When the driver makes no streams, or is older than CUDA 12.3, or the GPU older than Ampere.
    pub fn new(device: &Arc<Device>, at_once: usize) -> Result<Copies, CudaError> {
        let streams = (0..at_once.clamp(1, 63)).map(|_| device.stream()).collect::<Result<_, _>>()?;
        let (next, unmarked) = (AtomicUsize::new(0), AtomicU64::new(0));
        Ok(Copies { device: Arc::clone(device), streams, next, gather: Gather::new(device)?, unmarked })
    }

    /// Starts a copy by an engine, which needs five microseconds beside the bytes. Either extent may be another GPU's, or
    /// another process's; both must be held until it is over.
    ///
    /// # Errors
    /// When the two have different lengths, or the driver refuses.
    pub fn start(&self, from: &DeviceExtent, to: &DeviceExtent) -> Result<(), CudaError> {
        let stream = self.next.fetch_add(1, Ordering::Relaxed) % self.streams.len();
        self.unmarked.fetch_or(1 << stream, Ordering::Relaxed);
        from.copy_to(&self.streams[stream], to)
    }

    /// Starts copies by a kernel, on 32 multiprocessors at most, after those that were started so before: one launch for
    /// each [`Copies::AT_ONCE`]. The extents must be held until it is over.
    ///
    /// # Errors
    /// When the two of one have different lengths, one is not this GPU's to use (its own memory, or imported for it), or
    /// the driver refuses.
    pub fn start_all(&self, copies: &[(DeviceExtent, DeviceExtent)]) -> Result<(), CudaError> {
        self.unmarked.fetch_or(1 << self.streams.len(), Ordering::Relaxed);
        copies.chunks(Copies::AT_ONCE).try_for_each(|copies| self.gather.start(&self.device, copies))
    }

    /// Copies to the host, after what was started before; returns when the bytes are there.
    ///
    /// # Errors
    /// When `out` has another length, or the GPU fails.
    pub fn read(&self, from: &DeviceExtent, out: &mut [u8]) -> Result<(), CudaError> {
        from.read(&self.streams[0], out)
    }

    /// Copies from the host, after what was started before; returns when the bytes are there.
    ///
    /// # Errors
    /// When `bytes` has another length, or the GPU fails.
    pub fn write(&self, to: &DeviceExtent, bytes: &[u8]) -> Result<(), CudaError> {
        to.write(&self.streams[0], bytes)
    }

    /// Names everything that was started since the last mark.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn mark(&self) -> Result<Mark, CudaError> {
        let streams = self.unmarked.swap(0, Ordering::Relaxed);
        let used = self.all().enumerate().filter(|(at, _)| streams >> at & 1 == 1);
        let events = used.map(|(_, stream)| stream.record_event(None)).collect();
        let events = self.device.said("mark its copies", events)?;
        Ok(Mark { device: Arc::clone(&self.device), events })
    }

    /// Waits until everything that was started so far is over: the driver ends every copy, if with an error.
    ///
    /// # Errors
    /// When one of the copies, or the GPU, failed.
    pub fn wait(&self) -> Result<(), CudaError> {
        // All of them, whatever becomes of one.
        let waited = self.all().map(|stream| stream.synchronize()).collect::<Vec<_>>();
        self.device.said("copy", waited.into_iter().collect())
    }

    fn all(&self) -> impl Iterator<Item = &Arc<CudaStream>> {
        self.streams.iter().chain([self.gather.stream()])
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Mark {
    /// Names everything that a stream of this GPU was given so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn on(device: &Arc<Device>, stream: &CudaStream) -> Result<Mark, CudaError> {
        let event = device.said("mark its work", stream.record_event(None))?;
        Ok(Mark { device: Arc::clone(device), events: vec![event] })
    }

    /// Has what a stream is given from now on come after it.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn precede(&self, stream: &CudaStream) -> Result<(), CudaError> {
        let wait = self.events.iter().try_for_each(|event| stream.wait(event));
        self.device.said("order its work", wait)
    }

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
