//! What a device may touch, and what a peer may write of it.

use super::{Device, VerbsError, check, refused};
use rdma_mummy_sys as ffi;
use rdma_mummy_sys::ibv_access_flags as Access;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use tandem_memory::{Extent, HostRegion};

/// Memory as devices are shown it: a region's own, or its twin on a GPU.
pub(crate) struct Memory {
    /// Keeps both mapped.
    region: Arc<HostRegion>,
    /// Where it begins for devices.
    base: u64,
    on_twin: bool,
    /// By which a device finds a twin; else the address says where the memory is.
    dma_buf: Option<OwnedFd>,
    /// What a test has in the place of a GPU's memory.
    #[cfg(test)]
    _stand_in: Option<Arc<HostRegion>>,
}

impl Memory {
    fn at(region: Arc<HostRegion>, base: u64, on_twin: bool, dma_buf: Option<OwnedFd>) -> Memory {
        Memory {
            region,
            base,
            on_twin,
            dma_buf,
            #[cfg(test)]
            _stand_in: None,
        }
    }

    pub(crate) fn host(region: Arc<HostRegion>) -> Arc<Memory> {
        let base = region.base() as u64;
        Arc::new(Memory::at(region, base, false, None))
    }

    /// As a twin that a device finds by its address, in memory of the host.
    #[cfg(test)]
    pub(crate) fn stand_in(region: Arc<HostRegion>, twin: Arc<HostRegion>) -> Arc<Memory> {
        assert_eq!(region.len(), twin.len());
        let memory = Memory::at(region, twin.base() as u64, true, None);
        Arc::new(Memory { _stand_in: Some(twin), ..memory })
    }

    /// A region's twin, by a dma-buf whose byte 0 is the twin's. For posted work it begins at `base`, which lies in its
    /// page as byte 0 does.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn dma_buf(region: Arc<HostRegion>, buffer: OwnedFd, base: u64) -> Arc<Memory> {
        Arc::new(Memory::at(region, base, true, Some(buffer)))
    }

    /// A region's twin, by its address, for devices whose driver finds memory of GPUs by that. An error says why not.
    #[cfg(feature = "cuda")]
    pub(crate) fn peermem(region: Arc<HostRegion>) -> Result<Arc<Memory>, String> {
        let twin = region.twin().ok_or("the memory is the host's alone")?;
        let base = twin.peermem().map_err(|error| error.to_string())?;
        Ok(Arc::new(Memory::at(region, base, true, None)))
    }

    pub(crate) fn region(&self) -> &Arc<HostRegion> {
        &self.region
    }

    /// Whether it is the twin: then the bytes of the region's host side are no matter.
    pub(crate) fn is_on_twin(&self) -> bool {
        self.on_twin
    }

    pub(crate) fn is_dma_buf(&self) -> bool {
        self.dma_buf.is_some()
    }

    pub(crate) fn len(&self) -> usize {
        self.region.len()
    }

    /// Where a device finds the byte. None if it is not of the memory, nor its end.
    fn address(&self, at: usize) -> Option<u64> {
        (at <= self.len()).then(|| self.base + at as u64)
    }
}

/// Who may use registered memory, beside the device's own work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rights {
    /// Nobody.
    Own,
    /// Peers, what is opened to them by memory windows.
    Windows,
    /// Peers, all of it, by its key.
    Peers,
}

/// Memory that a device may touch.
pub(crate) struct MemoryRegion {
    pub(super) raw: *mut ffi::ibv_mr,
    /// Of the memory.
    range: Range<usize>,
    device: Arc<Device>,
    /// Held as long as it is registered.
    memory: Arc<Memory>,
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
    /// Registers a range of memory, which pins it: a gigabyte of the host's takes tens of milliseconds.
    pub(crate) fn new(
        device: &Arc<Device>,
        memory: &Arc<Memory>,
        range: Range<usize>,
        rights: Rights,
    ) -> Result<MemoryRegion, VerbsError> {
        let len = range.len();
        let failed = |source: io::Error| match &memory.dma_buf {
            Some(_) => {
                let hint = match source.raw_os_error() {
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPROTONOSUPPORT) => {
                        "its driver has no dma-buf"
                    }
                    Some(libc::EBADF | libc::EINVAL) => {
                        "the descriptor is no dma-buf, or the range leaves it"
                    }
                    _ => "see dmesg",
                };
                VerbsError::DmaBuf { device: device.name().into(), len, source, hint }
            }
            None => {
                let hint = match source.raw_os_error() {
                    Some(libc::ENOMEM) => "raise `ulimit -l` (LimitMEMLOCK=infinity) or use less memory",
                    _ => "see dmesg",
                };
                VerbsError::Register { device: device.name().into(), len, source, hint }
            }
        };
        let inside = range.start < range.end && range.end <= memory.len();
        let Some(address) = memory.address(range.start).filter(|_| inside) else {
            return Err(failed(io::Error::from_raw_os_error(libc::EINVAL)));
        };
        let access = Access::IBV_ACCESS_LOCAL_WRITE.0
            | match rights {
                Rights::Own => 0,
                Rights::Windows => Access::IBV_ACCESS_MW_BIND.0,
                Rights::Peers => Access::IBV_ACCESS_REMOTE_WRITE.0,
            };
        let raw = match &memory.dma_buf {
            // SAFETY: the domain lives as long as the device, which the registration holds; the kernel checks that the
            // range is of the buffer, and keeps that as long as it is registered.
            Some(buffer) => unsafe {
                let (at, fd) = (range.start as u64, buffer.as_raw_fd());
                ffi::ibv_reg_dmabuf_mr(device.domain, at, len, address, fd, access as i32)
            },
            // SAFETY: the domain as above; the range is of memory that stays mapped, here or on its GPU, as long as the
            // region, which the registration holds too.
            None => unsafe { ffi::ibv_reg_mr(device.domain, address as *mut _, len, access as i32) },
        };
        if raw.is_null() {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(MemoryRegion { raw, range, device: Arc::clone(device), memory: Arc::clone(memory) })
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Bytes of its memory, for posted work to read. None if they leave what is registered, or are more than work can
    /// name.
    pub(crate) fn local(&self, range: Range<usize>) -> Option<Local> {
        // SAFETY: the registration lives as long as this.
        let key = unsafe { (*self.raw).lkey };
        let address = self.address_of(&range)?;
        Some(Local { address, len: u32::try_from(range.len()).ok()?, key })
    }

    /// Where the device has the range of its memory. None if it leaves what is registered.
    pub(crate) fn address_of(&self, range: &Range<usize>) -> Option<u64> {
        let inside =
            self.range.start <= range.start && range.start <= range.end && range.end <= self.range.end;
        self.memory.address(range.start).filter(|_| inside)
    }

    /// By which a peer that has the right names all that is registered.
    pub(crate) fn remote_key(&self) -> u32 {
        // SAFETY: the registration lives as long as this.
        unsafe { (*self.raw).rkey }
    }

    /// Bytes that a device wrote by posted receives.
    ///
    /// The caller is the owner of the region, and no receive is posted for the range.
    pub(super) fn read(&self, range: Range<usize>, out: &mut Vec<u8>) {
        out.clear();
        let Some(extent) = self.memory.region.extent(range).ok().filter(|_| !self.memory.on_twin) else {
            return;
        };
        // SAFETY: the queue pair that owns this region calls it between the end of a receive and the next post of
        // the same range, so no device writes it.
        out.extend_from_slice(unsafe { Extent::bytes(&extent) });
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: the registration was made once and is ended once. Work that still names it, a peer's too, is refused
        // by the device.
        let code = unsafe { ffi::ibv_dereg_mr(self.raw) };
        if let Err(error) = check(self.device.name(), "end a registration", code) {
            tracing::error!(%error, "memory stays open to a device");
        }
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
