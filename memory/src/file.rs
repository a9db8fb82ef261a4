//! The files behind memory that processes of one host share.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Never shrunk, so that no reader of a mapping ever runs past its end; never grown, so that its length says
/// what it holds.
const FIXED: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// A file without a name, in memory. It is gone with its last holder, however that ends.
pub(crate) struct MemoryFile(OwnedFd);

impl MemoryFile {
    /// A file of `len` zeroed bytes.
    pub(crate) fn create(len: usize) -> io::Result<MemoryFile> {
        let file = MemoryFile::fixed(len, 0)?;
        file.add_seals(libc::F_SEAL_SEAL)?;
        Ok(file)
    }

    /// The same in huge pages; none if the system has not set enough of them aside. To be sealed once it is mapped.
    pub(crate) fn huge(len: usize) -> Option<MemoryFile> {
        if !len.is_multiple_of(HUGE_PAGE) || free_huge_pages() < len / HUGE_PAGE {
            return None;
        }
        MemoryFile::fixed(len, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB).ok()
    }

    /// From now on its content changes through mappings that exist already, and in no other way. So no page of it is
    /// ever given back while it is open: a huge page that was could be another's before it is read again, and
    /// reading it would fault.
    pub(crate) fn seal_content(&self) -> io::Result<()> {
        self.add_seals(libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL)
    }

    fn fixed(len: usize, flags: u32) -> io::Result<MemoryFile> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags;
        // SAFETY: the name is a C string; the call makes a new descriptor and touches nothing else.
        let fd = unsafe { libc::memfd_create(c"tandem".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else's.
        let file = MemoryFile(unsafe { OwnedFd::from_raw_fd(fd) });
        let size = libc::off_t::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        // SAFETY: the call concerns this descriptor alone.
        if unsafe { libc::ftruncate(fd, size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        file.add_seals(FIXED)?;
        Ok(file)
    }

    fn add_seals(&self, seals: i32) -> io::Result<()> {
        // SAFETY: the call concerns this descriptor alone.
        let sealed = unsafe { libc::fcntl(self.raw(), libc::F_ADD_SEALS, seals) };
        if sealed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// A file that another process made, if it is of this length and sealed so: else reading its mapping
    /// could fault whenever that process likes.
    pub(crate) fn of_peer(file: OwnedFd, len: usize) -> io::Result<MemoryFile> {
        // SAFETY: `stat` is plain numbers, for which zeroes are a value.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and `stat` is ours to write.
        if unsafe { libc::fstat(file.as_raw_fd(), &raw mut stat) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call concerns this descriptor alone.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        let bad = |problem| Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        if len == 0 || usize::try_from(stat.st_size) != Ok(len) || seals < 0 || seals & FIXED != FIXED {
            return bad(format!("the peer's memory is not sealed at {len} bytes, but has {}", stat.st_size));
        }
        // SAFETY: `fs` is plain numbers, for which zeroes are a value.
        let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and `fs` is ours to write.
        if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut fs) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if fs.f_type == libc::HUGETLBFS_MAGIC && seals & libc::F_SEAL_FUTURE_WRITE == 0 {
            return bad(
                "the peer's memory is of huge pages that it can take away: it must seal them".to_owned()
            );
        }
        Ok(MemoryFile(file))
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(crate) fn raw(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Huge pages that are set aside and in nobody's use; 0 if the system does not say.
fn free_huge_pages() -> usize {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
