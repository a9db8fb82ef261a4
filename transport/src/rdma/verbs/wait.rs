//! Waiting for several descriptors, and a bell to end a wait from another thread.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Rings from any thread; whoever waits for its descriptor wakes.
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and nobody else owns it.
        Ok(Bell(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    pub(crate) fn ring(&self) {
        let one = 1u64;
        // SAFETY: the pointer is to eight readable bytes. A full counter is rung already, so errors are no harm.
        unsafe { libc::write(self.fd(), (&raw const one).cast(), 8) };
    }

    /// Makes it silent until it rings again.
    pub(crate) fn silence(&self) {
        let mut count = 0u64;
        // SAFETY: the pointer is to eight writable bytes; where it did not ring, the read says so at once.
        unsafe { libc::read(self.fd(), (&raw mut count).cast(), 8) };
    }
}

/// Waits until one of the descriptors can be read, or the time is over.
pub(crate) fn wait_readable(fds: &[RawFd], within: Duration) {
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    // Rounded up: waking before a deadline would spin until it.
    let ms = within.as_micros().div_ceil(1000).min(60_000) as i32;
    // SAFETY: the pointer is to as many entries as are named. A signal ends it early, which is no harm: whoever
    // waits looks again.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, ms) };
}

/// Makes reads of a descriptor return at once.
pub(super) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are involved.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
