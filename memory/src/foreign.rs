use crate::RegionError;
use crate::file::MemoryFile;
use crate::region::map;
use std::os::fd::OwnedFd;

/// Memory of another process of this host, to read. Its owner may change it at any time.
pub struct ForeignRegion {
    base: *const u8,
    len: usize,
    _file: MemoryFile,
}

// SAFETY: the mapping is read through `copy_out` alone, which any thread may call at any time.
unsafe impl Send for ForeignRegion {}
// SAFETY: as above.
unsafe impl Sync for ForeignRegion {}

impl ForeignRegion {
    /// Maps what another process gave the [`crate::HostRegion::file`] of.
    ///
    /// # Errors
    /// When it is not of this length for good, or cannot be mapped.
    pub fn map(file: OwnedFd, len: usize) -> Result<ForeignRegion, RegionError> {
        let failed = |source| RegionError::Map { len, source };
        let file = MemoryFile::of_peer(file, len).map_err(failed)?;
        let base = map(len, libc::PROT_READ, libc::MAP_SHARED, file.raw()).map_err(failed)?;
        Ok(ForeignRegion { base, len, _file: file })
    }

    /// Copies the bytes from `at` on. What the owner changes meanwhile is copied in either state, byte by byte.
    ///
    /// # Errors
    /// When they leave the region.
    pub fn copy_out(&self, at: u64, to: &mut [u8]) -> Result<(), RegionError> {
        let from = self.place(at, to.len())?;
        // SAFETY: `from` is good for this length, and `to` is exclusively ours. The owner's writes are another
        // process's: no reference to the bytes is ever made.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// As [`ForeignRegion::copy_out`], for more than a cache would keep.
    ///
    /// # Errors
    /// When they leave the region.
    pub fn stream_out(&self, at: u64, to: &mut [u8]) -> Result<(), RegionError> {
        let from = self.place(at, to.len())?;
        // SAFETY: as in `copy_out`.
        unsafe { crate::stream::copy(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Where the bytes from `at` on lie; good for reading `len` of them, as the mapping's file cannot shrink.
    fn place(&self, at: u64, len: usize) -> Result<*const u8, RegionError> {
        let start = usize::try_from(at).unwrap_or(usize::MAX);
        match start.checked_add(len) {
            // SAFETY: within the mapping.
            Some(end) if end <= self.len => Ok(unsafe { self.base.add(start) }),
            end => Err(RegionError::OutOfBounds { start, end: end.unwrap_or(usize::MAX), len: self.len }),
        }
    }
}

impl Drop for ForeignRegion {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `map`.
        unsafe { libc::munmap(self.base.cast_mut().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostRegion;
    use std::os::fd::FromRawFd as _;

    #[test]
    fn another_mapping_sees_the_same_bytes() {
        let ours = HostRegion::map(10_000).unwrap();
        // SAFETY: this test is the only holder.
        unsafe { ours.base().add(5000).cast::<[u8; 3]>().write([1, 2, 3]) };
        let file = || ours.file().unwrap().try_clone_to_owned().unwrap();
        let theirs = ForeignRegion::map(file(), 10_000).unwrap();
        let mut seen = [0; 5];
        theirs.copy_out(4999, &mut seen).unwrap();
        assert_eq!(seen, [0, 1, 2, 3, 0]);
        assert!(theirs.copy_out(9996, &mut seen).is_err());
        assert!(theirs.copy_out(u64::MAX, &mut seen).is_err());
        assert!(ForeignRegion::map(file(), 10_001).is_err());
        let both = HostRegion::of_peer(file(), 10_000).unwrap();
        // SAFETY: as above.
        unsafe { *both.base() = 9 };
        theirs.copy_out(0, &mut seen[..1]).unwrap();
        assert_eq!(seen[0], 9);
    }

    #[test]
    fn what_could_shrink_is_refused() {
        let file = tempfile();
        file.set_len(4096).unwrap();
        let error = ForeignRegion::map(file.into(), 4096).err().unwrap();
        assert!(error.to_string().contains("4096 bytes"), "{error}");
    }

    /// A hole in a file of huge pages faults when it is read and no huge page is free.
    #[test]
    fn what_could_be_taken_away_is_refused() {
        let flags = libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        // SAFETY: the name is a C string; the call makes a new descriptor and touches nothing else.
        let fd = unsafe { libc::memfd_create(c"huge".as_ptr(), flags) };
        if fd < 0 {
            return println!("skipped: this system has no huge pages");
        }
        // SAFETY: the descriptor is new, and nobody else's.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        // SAFETY: the calls concern this descriptor alone.
        unsafe {
            assert_eq!(libc::ftruncate(fd, 2 << 20), 0);
            assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, seals), 0);
        }
        let error = ForeignRegion::map(file, 2 << 20).err().unwrap();
        assert!(error.to_string().contains("can take away"), "{error}");
    }

    fn tempfile() -> std::fs::File {
        let path = std::env::temp_dir().join(format!("tandem-foreign-{}", std::process::id()));
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
