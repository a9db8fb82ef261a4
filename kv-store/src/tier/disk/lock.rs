use rustix::fs::FlockOperation;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

/// The right to a directory, which one process has. The system takes it back when that ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock(#[allow(dead_code)] File);

/// Bytes that the lock's file may take.
pub(super) const LOCK_BYTES: u64 = 4096;

impl Lock {
    /// The lock, or who has it.
    pub(super) fn take(dir: &Path) -> io::Result<Result<Lock, String>> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                file.take(LOCK_BYTES).read_to_string(&mut holder)?;
                Ok(Err(if holder.is_empty() { "another process".into() } else { holder }))
            }
            locked => {
                locked?;
                let uname = rustix::system::uname();
                let mut host = uname.nodename().to_string_lossy().into_owned();
                host.truncate(256);
                file.set_len(0)?;
                write!(file, "process {} on {host}", std::process::id())?;
                Ok(Ok(Lock(file)))
            }
        }
    }
}
