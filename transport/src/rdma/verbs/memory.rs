//! What a device may touch, and what a peer may write of it.

use super::{Device, VerbsError, check, refused};
use rdma_mummy_sys as ffi;
use rdma_mummy_sys::ibv_access_flags as Access;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use tandem_memory::{Extent, HostRegion};

/// Memory that a device may touch. Peers may write it only through a [`MemoryWindow`], unless it was registered
/// for a device that has none.
pub(crate) struct MemoryRegion {
    pub(super) raw: *mut ffi::ibv_mr,
    /// Where it begins for the device.
    base: u64,
    len: usize,
    _device: Arc<Device>,
    /// Mapped as long as it is registered. None for memory of another device.
    memory: Option<Arc<HostRegion>>,
}

// SAFETY: libibverbs promises that its calls may be made from any thread, and the pointer is freed once, in drop.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

/// Registered bytes, to be read by posted work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Local {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) key: u32,
}

impl Local {
    /// No bytes.
    pub(crate) const EMPTY: Local = Local { address: 0, len: 0, key: 0 };
}

impl MemoryRegion {
    /// Registers host memory, which pins it: a gigabyte takes tens of milliseconds.
    /// With `windows`, parts of it can be opened to peers by memory windows; without, all of it is, to whoever knows
    /// its key.
    pub(crate) fn host(
        device: &Arc<Device>,
        memory: Arc<HostRegion>,
        windows: bool,
    ) -> Result<MemoryRegion, VerbsError> {
        let remote = if windows { Access::IBV_ACCESS_MW_BIND } else { Access::IBV_ACCESS_REMOTE_WRITE };
        let access = Access::IBV_ACCESS_LOCAL_WRITE.0 | remote.0;
        // SAFETY: the domain lives as long as the device, which the registration holds; the memory is mapped as
        // long as the region, which it holds too.
        let raw =
            unsafe { ffi::ibv_reg_mr(device.domain, memory.base().cast(), memory.len(), access as i32) };
        if raw.is_null() {
            let source = io::Error::last_os_error();
            let hint = match source.raw_os_error() {
                Some(libc::ENOMEM) => "raise `ulimit -l` (LimitMEMLOCK=infinity) or use less memory",
                _ => "see dmesg",
            };
            let (device, len) = (device.name().into(), memory.len());
            return Err(VerbsError::Register { device, len, source, hint });
        }
        let (base, len) = (memory.base() as u64, memory.len());
        Ok(MemoryRegion { raw, base, len, _device: Arc::clone(device), memory: Some(memory) })
    }

    /// Registers `len` bytes of a dma-buf, such as a GPU's memory, from its byte `offset` on. For posted work it
    /// begins at `address`.
    #[cfg_attr(not(test), expect(dead_code, reason = "lanes take the host's side of a GPU's memory"))]
    pub(crate) fn dma_buf(
        device: &Arc<Device>,
        buffer: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        address: u64,
    ) -> Result<MemoryRegion, VerbsError> {
        let access = Access::IBV_ACCESS_LOCAL_WRITE | Access::IBV_ACCESS_REMOTE_WRITE;
        // SAFETY: the domain lives as long as the device, which the registration holds; the kernel keeps the
        // buffer as long as it is registered.
        let raw = unsafe {
            let fd = buffer.as_raw_fd();
            ffi::ibv_reg_dmabuf_mr(device.domain, offset, len, address, fd, access.0 as i32)
        };
        if raw.is_null() {
            let source = io::Error::last_os_error();
            let hint = match source.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPROTONOSUPPORT) => {
                    "its driver has no dma-buf: use nvidia-peermem, or a buffer in host memory"
                }
                Some(libc::EBADF | libc::EINVAL) => "the descriptor is no dma-buf, or the range leaves it",
                _ => "see dmesg",
            };
            return Err(VerbsError::DmaBuf { device: device.name().into(), len, source, hint });
        }
        Ok(MemoryRegion { raw, base: address, len, _device: Arc::clone(device), memory: None })
    }

    /// The memory, where it is the host's.
    pub(crate) fn memory(&self) -> Option<&Arc<HostRegion>> {
        self.memory.as_ref()
    }

    /// Bytes of the region, for posted work to read. None if they leave it, or are more than work can name.
    pub(crate) fn local(&self, range: Range<usize>) -> Option<Local> {
        // SAFETY: the registration lives as long as this.
        let key = unsafe { (*self.raw).lkey };
        let address = self.address_of(&range)?;
        Some(Local { address, len: u32::try_from(range.len()).ok()?, key })
    }

    /// Where the device has the range. None if it leaves the region.
    pub(crate) fn address_of(&self, range: &Range<usize>) -> Option<u64> {
        (range.start <= range.end && range.end <= self.len).then(|| self.base + range.start as u64)
    }

    /// By which a peer names the whole region, on devices without memory windows.
    pub(crate) fn remote_key(&self) -> u32 {
        // SAFETY: the registration lives as long as this.
        unsafe { (*self.raw).rkey }
    }

    /// Bytes that a device wrote by posted receives.
    ///
    /// The caller is the owner of the region, and no receive is posted for the range.
    pub(super) fn read(&self, range: Range<usize>, out: &mut Vec<u8>) {
        out.clear();
        let Some(extent) = self.memory.as_ref().and_then(|memory| memory.extent(range).ok()) else {
            return;
        };
        // SAFETY: the queue pair that owns this region calls it between the end of a receive and the next post of
        // the same range, so no device writes it.
        out.extend_from_slice(unsafe { Extent::bytes(&extent) });
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: the registration was made once and is ended once. Work that still names it is refused by the
        // device. That none of a peer's writes is under way is held by windows and queue pairs, which are ended
        // before their region.
        unsafe { ffi::ibv_dereg_mr(self.raw) };
    }
}

/// A part of a region that the peer of one queue pair may write, from its binding until its invalidation.
pub(crate) struct MemoryWindow {
    pub(super) raw: *mut ffi::ibv_mw,
    /// By which the peer names it. The low byte changes with each binding.
    key: u32,
    device: Arc<Device>,
}

// SAFETY: libibverbs promises that its calls may be made from any thread, and the pointer is freed once, in drop.
unsafe impl Send for MemoryWindow {}
// SAFETY: as above.
unsafe impl Sync for MemoryWindow {}

impl MemoryWindow {
    pub(crate) fn new(device: &Arc<Device>) -> Result<MemoryWindow, VerbsError> {
        // SAFETY: the domain lives as long as the device, which the window holds.
        let raw = unsafe { ffi::ibv_alloc_mw(device.domain, ffi::ibv_mw_type::IBV_MW_TYPE_2) };
        if raw.is_null() {
            return Err(refused(device.name(), "make a memory window", io::Error::last_os_error()));
        }
        // SAFETY: the window was just made.
        let key = unsafe { (*raw).rkey };
        Ok(MemoryWindow { raw, key, device: Arc::clone(device) })
    }

    /// The key of the next binding: no key of before is valid then.
    pub(crate) fn next_key(&mut self) -> u32 {
        // SAFETY: the window lives as long as this. Providers look here for the key of the last binding, which the
        // caller of verbs keeps up to date.
        unsafe { (*self.raw).rkey = self.key };
        self.key = (self.key & !0xff) | (self.key.wrapping_add(1) & 0xff);
        self.key
    }

    pub(crate) fn key(&self) -> u32 {
        self.key
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        // SAFETY: the window was made once and is freed once. Freeing takes the peer's right to write with it.
        let code = unsafe { ffi::ibv_dealloc_mw(self.raw) };
        if let Err(error) = check(self.device.name(), "free a memory window", code) {
            tracing::warn!(%error, "a memory window is left behind");
        }
    }
}
