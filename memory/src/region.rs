#[cfg(feature = "cuda")]
use crate::cuda::{CudaError, Device, DeviceExtent, DeviceRegion, Mapped, Twin};
use crate::file::{HUGE_PAGE, MemoryFile};
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Page-aligned, zeroed host memory. Shared by `Arc`; unmapped when the last holder is gone.
pub struct HostRegion {
    base: *mut u8,
    len: usize,
    /// What another process of this host maps to see the same memory; none if nobody else may.
    file: Option<MemoryFile>,
    /// The memory of a GPU that holds the true bytes, if there is one.
    #[cfg(feature = "cuda")]
    twin: Option<Twin>,
    /// How a GPU reaches the bytes themselves, if it does.
    #[cfg(feature = "cuda")]
    mapped: Option<Mapped>,
}

// SAFETY: the region is plain memory; every access goes through the unsafe methods of `Extent`, whose
// callers promise that no two threads conflict.
unsafe impl Send for HostRegion {}
// SAFETY: as above.
unsafe impl Sync for HostRegion {}

/// Why memory could not be had, or an extent does not exist.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The system refused the mapping.
    #[error("cannot map {len} bytes of host memory: {source}")]
    Map {
        /// Bytes asked for.
        len: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The range leaves the region.
    #[error("extent {start}..{end} lies outside its region of {len} bytes")]
    OutOfBounds {
        /// First byte asked for.
        start: usize,
        /// One past the last byte asked for.
        end: usize,
        /// The region's length.
        len: usize,
    },
}

impl RegionError {
    /// The length of a range that lies in memory of `len` bytes.
    pub(crate) fn check(range: &Range<usize>, len: usize) -> Result<usize, RegionError> {
        let &Range { start, end } = range;
        if start > end || end > len {
            Err(RegionError::OutOfBounds { start, end, len })
        } else {
            Ok(end - start)
        }
    }
}

impl HostRegion {
    /// Memory that transports move: maps `len` zeroed bytes (at least one), which other processes of this
    /// host can map too once they are given [`HostRegion::file`]. In huge pages if the system set some aside.
    ///
    /// # Errors
    /// When the system has no such memory.
    pub fn map(len: usize) -> Result<Arc<HostRegion>, RegionError> {
        HostRegion::mapped(len.max(1)).map(Arc::new)
    }

    fn mapped(len: usize) -> Result<HostRegion, RegionError> {
        if let Some(region) = HostRegion::huge(len) {
            return Ok(region);
        }
        let file = MemoryFile::create(len).map_err(|source| RegionError::Map { len, source })?;
        HostRegion::of_file(file, len)
    }

    /// As [`HostRegion::map`], with a *twin*: memory of a GPU, of the same length, which holds the region's true bytes.
    /// Whoever cannot reach the GPU uses the host's side, which is pinned, after [`Extent::fetch`] or before
    /// [`Extent::deposit`]. The twin holds what was in that memory before.
    ///
    /// # Errors
    /// When the system, or the GPU, has no such memory, or the host's cannot be pinned.
    #[cfg(feature = "cuda")]
    pub fn with_twin(device: &Arc<Device>, len: usize) -> Result<Arc<HostRegion>, CudaError> {
        let mut region = HostRegion::mapped(len.max(1))?;
        region.twin = Some(Twin::new(device, region.base, region.len)?);
        Ok(Arc::new(region))
    }

    /// As [`HostRegion::map`], pinned, and reached by a GPU where it is: its kernels read and write it over their link to
    /// the host.
    ///
    /// # Errors
    /// When the system has no such memory, or it cannot be pinned.
    #[cfg(feature = "cuda")]
    pub fn pinned(device: &Arc<Device>, len: usize) -> Result<Arc<HostRegion>, CudaError> {
        let mut region = HostRegion::mapped(len.max(1))?;
        // SAFETY: the region drops this before it unmaps the range.
        region.mapped = Some(unsafe { Mapped::new(device, region.base, region.len) }?);
        Ok(Arc::new(region))
    }

    /// The region's twin, if it has one.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn twin(&self) -> Option<&Arc<DeviceRegion>> {
        self.twin.as_ref().map(Twin::region)
    }

    /// Memory of this process alone: maps `len` zeroed bytes (at least one), asking for transparent huge
    /// pages. Taken from the system as it is touched.
    ///
    /// # Errors
    /// When the system has no such memory.
    pub fn private(len: usize) -> Result<Arc<HostRegion>, RegionError> {
        let len = len.max(1);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let base = map(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
            .map_err(|source| RegionError::Map { len, source })?;
        // SAFETY: the range was just mapped; the advice changes no content, and failing it is harmless.
        unsafe { libc::madvise(base.cast(), len, libc::MADV_HUGEPAGE) };
        Ok(Arc::new(HostRegion::at(base, len, None)))
    }

    /// The memory that another process of this host mapped and gave the file of, to read and write: both see
    /// what either writes, whenever it likes. Access it through atomics or not at all.
    ///
    /// # Errors
    /// When it is not of this length for good, or cannot be mapped.
    pub fn of_peer(file: OwnedFd, len: usize) -> Result<Arc<HostRegion>, RegionError> {
        let file = MemoryFile::of_peer(file, len).map_err(|source| RegionError::Map { len, source })?;
        HostRegion::of_file(file, len).map(Arc::new)
    }

    fn huge(len: usize) -> Option<HostRegion> {
        let region = HostRegion::of_file(MemoryFile::huge(len)?, len).ok()?;
        region.file.as_ref()?.seal_content().ok()?;
        Some(region)
    }

    fn of_file(file: MemoryFile, len: usize) -> Result<HostRegion, RegionError> {
        let base = map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.raw())
            .map_err(|source| RegionError::Map { len, source })?;
        Ok(HostRegion::at(base, len, Some(file)))
    }

    fn at(base: *mut u8, len: usize, file: Option<MemoryFile>) -> HostRegion {
        HostRegion {
            base,
            len,
            file,
            #[cfg(feature = "cuda")]
            twin: None,
            #[cfg(feature = "cuda")]
            mapped: None,
        }
    }

    /// What another process of this host needs to map the region: the file, and the [`HostRegion::len`].
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(MemoryFile::fd)
    }

    /// Where the region begins. What may be done with the pointer, and when, is for whoever dereferences it
    /// to know.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base
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
    pub fn extent(self: &Arc<Self>, range: Range<usize>) -> Result<Extent, RegionError> {
        let len = RegionError::check(&range, self.len)?;
        Ok(Extent { region: Arc::clone(self), start: range.start, len })
    }
}

impl Drop for HostRegion {
    fn drop(&mut self) {
        // What was pinned is let go while it is mapped.
        #[cfg(feature = "cuda")]
        drop((self.twin.take(), self.mapped.take()));
        // SAFETY: base and len are those of the mapping made in `map`, and no extent is left: each holds an Arc.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Maps `len` bytes at an address of the kernel's choice.
pub(crate) fn map(len: usize, access: i32, flags: i32, fd: i32) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing else.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
    if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(base.cast()) }
}

impl std::fmt::Debug for HostRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostRegion({} bytes)", self.len)
    }
}

/// A range of a region.
#[derive(Clone, Debug)]
pub struct Extent {
    region: Arc<HostRegion>,
    /// Always `start + len <= region.len`.
    start: usize,
    len: usize,
}

impl Extent {
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

    /// Offset of its first byte in the region.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.start
    }

    /// The region it lies in.
    #[must_use]
    pub fn region(&self) -> &Arc<HostRegion> {
        &self.region
    }

    /// A part of this extent.
    ///
    /// # Errors
    /// When `range` leaves the extent.
    pub fn part(&self, range: Range<usize>) -> Result<Extent, RegionError> {
        let len = RegionError::check(&range, self.len)?;
        Ok(Extent { region: Arc::clone(&self.region), start: self.start + range.start, len })
    }

    /// The same range of the region's twin, if it has one.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn on_device(&self) -> Option<DeviceExtent> {
        self.region.twin()?.extent(self.start..self.start + self.len).ok()
    }

    /// The extent's own bytes, as the GPU that the region was pinned for reaches them; none if it was not.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn mapped_on_device(&self) -> Option<DeviceExtent> {
        let mapped = self.region.mapped.as_ref()?;
        let whole = DeviceRegion::of_host(mapped, Arc::clone(&self.region));
        whole.extent(self.start..self.start + self.len).ok()
    }

    /// Copies the twin's bytes to the host's side, after whatever the GPU was given before for them is over. Returns when
    /// they are there; does nothing without a twin.
    ///
    /// # Safety
    /// As for [`Extent::bytes_mut`], until it returns.
    ///
    /// # Errors
    /// When the GPU fails.
    #[cfg(feature = "cuda")]
    pub unsafe fn fetch(&self) -> Result<(), CudaError> {
        let Some(twin) = &self.region.twin else { return Ok(()) };
        // SAFETY: the range lies in both by the field's invariant; the caller has the host's bytes to itself.
        unsafe { twin.fetch(self.start, self.len) }
    }

    /// Copies the host's bytes to the twin. Returns when they are there; does nothing without a twin. Bytes that are
    /// written meanwhile are copied in either state.
    ///
    /// # Errors
    /// When the GPU fails.
    #[cfg(feature = "cuda")]
    pub fn deposit(&self) -> Result<(), CudaError> {
        self.region.twin.as_ref().map_or(Ok(()), |twin| twin.deposit(self.start, self.len))
    }

    /// Has the system provide the memory now rather than when it is first touched, which can take a hundred
    /// times as long as using it. Changes no byte; may be called while others use the memory.
    ///
    /// # Errors
    /// When the system has no more, or is too old to know how (before Linux 5.14).
    pub fn populate(&self) -> io::Result<()> {
        let page = 4096;
        let mut at = self.start / page * page;
        let end = self.start + self.len;
        while at < end {
            // The system holds a lock over all of the process's memory for as long as a call takes, and whoever maps
            // some meanwhile waits, and behind him whoever touches a new page. So a call is for one huge page.
            let len = (HUGE_PAGE - (self.region.base.addr() + at) % HUGE_PAGE).min(end - at);
            // SAFETY: the range, widened to whole pages, lies in the mapping; populating changes no content.
            let done =
                unsafe { libc::madvise(self.region.base.add(at).cast(), len, libc::MADV_POPULATE_WRITE) };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
            at += len;
        }
        Ok(())
    }

    /// The bytes, to read.
    ///
    /// # Safety
    /// While the slice lives, nobody may write these bytes: the caller owns the extent's lease, or its
    /// content is published and no longer changes.
    #[must_use]
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: in bounds by the field's invariant, alive by the Arc, not written by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.region.base.add(self.start), self.len) }
    }

    /// The bytes, to write.
    ///
    /// # Safety
    /// While the slice lives, nobody else may read or write these bytes: the caller owns the extent's lease.
    #[must_use]
    #[allow(clippy::mut_from_ref)] // The lease, not the borrow, makes it exclusive.
    pub unsafe fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: in bounds by the field's invariant, alive by the Arc, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.region.base.add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_stay_inside() {
        let region = HostRegion::map(4096).unwrap();
        assert!(region.extent(0..4096).is_ok());
        assert!(region.extent(1..4097).is_err());
        let extent = region.extent(100..200).unwrap();
        assert!(extent.part(0..101).is_err());
        let part = extent.part(10..20).unwrap();
        part.populate().unwrap();
        // SAFETY: this test is the only holder.
        unsafe { part.bytes_mut() }.fill(7);
        // SAFETY: as above.
        assert_eq!(unsafe { extent.bytes() }[9..21], [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
    }

    /// Every page of the extent is there, wherever it begins and ends.
    #[test]
    fn populated_is_there() {
        const PAGE: usize = 4096;
        let check = |range: Range<usize>| {
            let region = HostRegion::map(3 * HUGE_PAGE + PAGE).unwrap();
            region.extent(range.clone()).unwrap().populate().unwrap();
            let mut there = vec![0u8; region.len() / PAGE];
            // SAFETY: the range is the mapping, and there is a byte for each of its pages.
            let told = unsafe { libc::mincore(region.base.cast(), region.len(), there.as_mut_ptr()) };
            assert_eq!(told, 0, "{}", io::Error::last_os_error());
            let pages = &there[range.start / PAGE..range.end.div_ceil(PAGE)];
            assert_eq!(pages.iter().position(|there| there & 1 == 0), None, "{range:?}");
        };
        check(0..3 * HUGE_PAGE + PAGE);
        check(PAGE + 5..PAGE + 6);
        check(HUGE_PAGE - 1..2 * HUGE_PAGE + 1);
        check(5..3 * HUGE_PAGE + 1);
    }
}
