use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// The right to a directory, which one process has. The system takes it back when that ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "it is held")] File);

/// Bytes that the lock's file may take.
pub(super) const LOCK_BYTES: u64 = 4096;

impl Lock {
    /// The lock, or who has it.
    pub(super) fn take(dir: &Path) -> io::Result<Result<Lock, String>> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(path)?;
        // A process that is ending, or a child that it had begun to start, may hold it for a moment more.
        let until = Instant::now() + Duration::from_secs(1);
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(Errno::WOULDBLOCK) => {
                    let mut holder = String::new();
                    file.take(LOCK_BYTES).read_to_string(&mut holder)?;
                    return Ok(Err(if holder.is_empty() { "another process".into() } else { holder }));
                }
                locked => break locked?,
            }
        }
        let uname = rustix::system::uname();
        let mut host = uname.nodename().to_string_lossy().into_owned();
        host.truncate(256);
        file.set_len(0)?;
        write!(file, "process {} on {host}", std::process::id())?;
        Ok(Ok(Lock(file)))
    }
}
