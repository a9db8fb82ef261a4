use super::{CudaError, Device, Mapped};
use crate::{HostRegion, RegionError};
use cudarc::driver::{CudaStream, result, sys};
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Regions begin and end at multiples of this, so that no other allocation lies in what is exported of one.
const GRANULE: usize = 2 << 20;

/// Memory of a GPU: taken by this process, or another's that it exported. Shared by `Arc`; given back when the last
/// holder is gone.
pub struct DeviceRegion {
    /// Whose kernels may use the address.
    device: Arc<Device>,
    address: u64,
    len: usize,
    origin: Origin,
}

enum Origin {
    Taken,
    /// Another process's.
    Imported,
    /// The host's, which is pinned as long as its region lives.
    Host {
        _memory: Arc<HostRegion>,
    },
    /// Of this process, by the handle that it exported.
    Own {
        _held: Arc<DeviceRegion>,
    },
}

/// What this process has exported: the driver opens only other processes' handles.
static EXPORTED: Mutex<Vec<(IpcHandle, Weak<DeviceRegion>)>> = Mutex::new(Vec::new());

fn exported() -> MutexGuard<'static, Vec<(IpcHandle, Weak<DeviceRegion>)>> {
    // Nothing panics between two steps of a change.
    EXPORTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What another process of the host needs to use a region, beside its length. It is of use as long as the region
/// lives, and to any process of the same user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IpcHandle(pub [u8; 64]);

/// In hexadecimal digits.
impl std::fmt::Display for IpcHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::str::FromStr for IpcHandle {
    type Err = String;

    fn from_str(text: &str) -> Result<IpcHandle, String> {
        let wrong = || format!("{text:?} is no handle: it has 128 hexadecimal digits");
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let mut handle = IpcHandle([0; 64]);
        if pairs.len() != handle.0.len() || !rest.is_empty() {
            return Err(wrong());
        }
        for (byte, [high, low]) in handle.0.iter_mut().zip(pairs) {
            let digit = |digit: u8| char::from(digit).to_digit(16).ok_or_else(wrong);
            *byte = (digit(*high)? << 4 | digit(*low)?) as u8;
        }
        Ok(handle)
    }
}

impl DeviceRegion {
    /// Takes `len` bytes (at least one) of the GPU's memory, with what was in them before.
    ///
    /// # Errors
    /// When it has no more.
    pub fn take(device: &Arc<Device>, len: usize) -> Result<Arc<DeviceRegion>, CudaError> {
        device.bind()?;
        let len = len.max(1);
        // Plain memory: what the stream-ordered allocator gives cannot be exported, nor registered for RDMA.
        // SAFETY: asks for new memory, which is nobody else's.
        let said = unsafe { result::malloc_sync(len.next_multiple_of(GRANULE)) };
        let address = device.said(&format!("give {len} bytes of its memory"), said)?;
        Ok(Arc::new(DeviceRegion { device: Arc::clone(device), address, len, origin: Origin::Taken }))
    }

    /// Memory of the host as its GPU reaches it.
    pub(crate) fn of_host(mapped: &Mapped, memory: Arc<HostRegion>) -> Arc<DeviceRegion> {
        let (device, address, len) = (Arc::clone(mapped.device()), mapped.address(), memory.len());
        Arc::new(DeviceRegion { device, address, len, origin: Origin::Host { _memory: memory } })
    }

    /// The memory that a process exported, of this GPU or of one that `device` reaches, for `device` to use.
    ///
    /// # Errors
    /// When the handle names nothing that `device` reaches, or less than `len` bytes.
    pub fn import(
        device: &Arc<Device>,
        handle: &IpcHandle,
        len: usize,
    ) -> Result<Arc<DeviceRegion>, CudaError> {
        device.bind()?;
        let own = exported().iter().find(|(known, _)| known == handle).and_then(|(_, own)| own.upgrade());
        if let Some(own) = own {
            RegionError::check(&(0..len), own.len)?;
            device.let_use(&own.device)?;
            let (device, address) = (Arc::clone(device), own.address);
            return Ok(Arc::new(DeviceRegion { device, address, len, origin: Origin::Own { _held: own } }));
        }
        let mut address = 0;
        let handle = sys::CUipcMemHandle { reserved: handle.0.map(|byte| byte as std::ffi::c_char) };
        let lazily = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the driver checks the handle, and `address` is ours to write.
        let said = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, lazily) };
        device.said("open another process's memory", said.result())?;
        let region = DeviceRegion { device: Arc::clone(device), address, len, origin: Origin::Imported };
        let (mut base, mut size) = (0, 0);
        // SAFETY: the address is one of this context, and base and size are ours to write.
        let said = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut size, address) };
        device.said("tell the length of another process's memory", said.result())?;
        // The length comes from the peer.
        let there = usize::try_from(base + size as u64 - address).unwrap_or(0);
        if len == 0 || len > there {
            return Err(RegionError::OutOfBounds { start: 0, end: len, len: there }.into());
        }
        Ok(Arc::new(region))
    }

    /// What another process of this host needs to [`DeviceRegion::import`] the region.
    ///
    /// # Errors
    /// When the driver refuses: memory that was imported cannot be passed on.
    pub fn export(self: &Arc<Self>) -> Result<IpcHandle, CudaError> {
        self.device.bind()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the region is allocated as long as this lives, and `handle` is ours to write.
        let said = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, self.address) };
        self.device.said("export its memory to another process", said.result())?;
        let handle = IpcHandle(handle.reserved.map(|byte| byte as u8));
        let mut exported = exported();
        exported.retain(|(known, region)| *known != handle && region.strong_count() > 0);
        exported.push((handle, Arc::downgrade(self)));
        Ok(handle)
    }

    /// The region as a dma-buf, for a NIC to register: its byte 0 is the region's. The memory is not given back
    /// before the descriptor is closed and the NIC has let it go.
    ///
    /// # Errors
    /// [`CudaError::NoDmaBuf`] where this cannot be had at all.
    pub fn dma_buf(&self) -> Result<OwnedFd, CudaError> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED as SUPPORTED;
        let no = |why| CudaError::NoDmaBuf { device: self.device.name().to_owned(), why };
        if !matches!(self.origin, Origin::Taken) {
            return Err(no("the memory is another process's"));
        }
        let supported = self.device.context().attribute(SUPPORTED);
        if self.device.said("tell whether it has dma-buf", supported)? == 0 {
            return Err(no("that takes Linux 5.12 or later, and NVIDIA's open kernel modules"));
        }
        self.order_for_nics()?;
        // The driver wants whole pages of the host; regions are whole granules, and so is what is behind their last byte.
        let len = self.len.next_multiple_of(GRANULE);
        let mut fd = -1i32;
        let kind = sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        // SAFETY: the range is this allocation's whole; for this kind the handle is a descriptor, of 32 bits.
        let said =
            unsafe { sys::cuMemGetHandleForAddressRange((&raw mut fd).cast(), self.address, len, kind, 0) };
        match said {
            sys::CUresult::CUDA_ERROR_NOT_SUPPORTED => return Err(no("the driver has none for such memory")),
            said => self.device.said(&format!("export {len} bytes as a dma-buf"), said.result())?,
        }
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Where the region begins for a NIC whose driver finds memory of GPUs by its address: with nvidia-peermem.
    /// Whoever registers it lets it go before the region.
    ///
    /// # Errors
    /// [`CudaError::NoPeermem`] where this cannot be had at all.
    pub fn peermem(&self) -> Result<u64, CudaError> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED as SUPPORTED;
        let no = |why| CudaError::NoPeermem { device: self.device.name().to_owned(), why };
        if !matches!(self.origin, Origin::Taken) {
            return Err(no("the memory is another process's"));
        }
        // Without it, some kernels might find other memory at the address, or say nothing that helps.
        if !["nvidia_peermem", "nv_peer_mem"]
            .iter()
            .any(|module| Path::new("/sys/module").join(module).exists())
        {
            return Err(no("it is not loaded: modprobe nvidia-peermem"));
        }
        let supported = self.device.context().attribute(SUPPORTED);
        if self.device.said("tell whether NICs reach its memory", supported)? == 0 {
            return Err(no("the GPU has no GPUDirect RDMA"));
        }
        self.order_for_nics()?;
        Ok(self.address)
    }

    /// A copy that the driver only queued would not be seen by a NIC that reads the memory next.
    fn order_for_nics(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        let synchronous = 1u32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS;
        // SAFETY: the region is allocated as long as this lives; the attribute's value is 32 bits.
        let said =
            unsafe { sys::cuPointerSetAttribute((&raw const synchronous).cast(), attribute, self.address) };
        self.device.said("order copies for a NIC", said.result())
    }

    /// The GPU that uses it.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Where it begins, for the GPU's kernels.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes of the region.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a region has at least one byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The range as an extent that keeps the region alive.
    ///
    /// # Errors
    /// When the range leaves the region.
    pub fn extent(self: &Arc<Self>, range: Range<usize>) -> Result<DeviceExtent, CudaError> {
        let len = RegionError::check(&range, self.len)?;
        Ok(DeviceExtent { region: Arc::clone(self), start: range.start, len })
    }
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        let context = self.device.context();
        context.record_err(context.bind_to_thread());
        match &self.origin {
            Origin::Own { .. } | Origin::Host { .. } => {}
            // SAFETY: taken in `take`, and given back once. The driver waits for what still uses it.
            Origin::Taken => context.record_err(unsafe { result::free_sync(self.address) }),
            Origin::Imported => {
                // Unlike memory of our own, the driver unmaps it under work that still uses it.
                context.record_err(context.synchronize());
                // SAFETY: opened in `import`, and closed once.
                context.record_err(unsafe { sys::cuIpcCloseMemHandle(self.address).result() });
            }
        }
    }
}

impl std::fmt::Debug for DeviceRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceRegion({} bytes of {})", self.len, self.device.name())
    }
}

/// A range of a region.
#[derive(Clone, Debug)]
pub struct DeviceExtent {
    region: Arc<DeviceRegion>,
    /// Always `start + len <= region.len`.
    start: usize,
    len: usize,
}

impl DeviceExtent {
    /// Where it begins, for the GPU's kernels.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.region.address + self.start as u64
    }

    /// Bytes of the extent.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The region it lies in.
    #[must_use]
    pub fn region(&self) -> &Arc<DeviceRegion> {
        &self.region
    }

    /// A part of this extent.
    ///
    /// # Errors
    /// When `range` leaves the extent.
    pub fn part(&self, range: Range<usize>) -> Result<DeviceExtent, CudaError> {
        let len = RegionError::check(&range, self.len)?;
        Ok(DeviceExtent { region: Arc::clone(&self.region), start: self.start + range.start, len })
    }

    /// Copies its bytes to the host, after what `stream` was given before; returns when they are there.
    ///
    /// # Errors
    /// When `out` has another length, or something that the stream was given went wrong.
    pub fn read(&self, stream: &CudaStream, out: &mut [u8]) -> Result<(), CudaError> {
        self.same_length(out.len())?;
        let device = &self.region.device;
        device.bind()?;
        // SAFETY: both ranges have this length, and `out` is borrowed until the copy is over. Bytes that a kernel
        // writes meanwhile are copied in either state: nobody has a reference to memory of a GPU.
        let said = unsafe { result::memcpy_dtoh_async(out, self.address(), stream.cu_stream()) };
        device.said(&format!("copy {} bytes to the host", self.len), said.and_then(|()| stream.synchronize()))
    }

    /// Copies `bytes` from the host, after what `stream` was given before; returns when they are there.
    ///
    /// # Errors
    /// When `bytes` has another length, or something that the stream was given went wrong.
    pub fn write(&self, stream: &CudaStream, bytes: &[u8]) -> Result<(), CudaError> {
        self.same_length(bytes.len())?;
        let device = &self.region.device;
        device.bind()?;
        // SAFETY: both ranges have this length, and `bytes` is borrowed until the copy is over.
        let said = unsafe { result::memcpy_htod_async(self.address(), bytes, stream.cu_stream()) };
        device
            .said(&format!("copy {} bytes from the host", self.len), said.and_then(|()| stream.synchronize()))
    }

    /// Has the GPU copy its bytes to `to`, after what `stream` was given before; waits for nothing. Either extent may be
    /// another GPU's, or another process's.
    ///
    /// # Errors
    /// When `to` has another length, or the driver refuses.
    pub fn copy_to(&self, stream: &CudaStream, to: &DeviceExtent) -> Result<(), CudaError> {
        self.same_length(to.len)?;
        let device = &self.region.device;
        device.bind()?;
        // SAFETY: both ranges have this length, and memory is given back after the work that uses it.
        let said =
            unsafe { result::memcpy_dtod_async(to.address(), self.address(), self.len, stream.cu_stream()) };
        device.said(&format!("copy {} bytes", self.len), said)
    }

    pub(super) fn same_length(&self, len: usize) -> Result<(), CudaError> {
        if len == self.len {
            return Ok(());
        }
        Err(RegionError::OutOfBounds { start: 0, end: len, len: self.len }.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_survive_as_text() {
        let handle = IpcHandle(std::array::from_fn(|at| (at * 37) as u8));
        let text = handle.to_string();
        assert_eq!(text.parse(), Ok(handle));
        for wrong in ["", &text[1..], &format!("{text}0"), &text.replace('0', "g")] {
            assert!(wrong.parse::<IpcHandle>().is_err(), "{wrong}");
        }
    }
}
