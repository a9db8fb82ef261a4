use super::{Done, Io, Task, Threads, Token, Transfer, cancelled, ended};
use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// The token of what asks for another one's end.
const CANCEL: Token = Token::MAX;

/// Transfers by io_uring.
pub(in super::super) struct Ring {
    ring: IoUring,
    /// What the kernel has. At most as many as the ring has room for, so that no end of one is ever lost.
    under_way: HashMap<Token, UnderWay>,
    waiting: VecDeque<(Token, Transfer)>,
    room: usize,
    tasks: Threads,
}

struct UnderWay {
    /// Keeps memory and file while the kernel uses them.
    transfer: Transfer,
    /// What the kernel reads the places of memory from.
    vectors: Vec<libc::iovec>,
}

// SAFETY: the vectors point into memory that the transfer keeps, and only the kernel follows them.
unsafe impl Send for UnderWay {}

impl Ring {
    /// A ring for this many transfers at once, which rings `bell` when one is over.
    pub(in super::super) fn new(room: usize, bell: &Arc<OwnedFd>) -> io::Result<Ring> {
        // Half of the entries are for cancels.
        let ring = IoUring::new((room * 2).next_power_of_two() as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [opcode::Readv::CODE, opcode::Writev::CODE, opcode::AsyncCancel::CODE] {
            if !probe.is_supported(code) {
                return Err(io::Error::other(format!("the kernel's io_uring has no operation {code}")));
            }
        }
        ring.submitter().register_eventfd(bell.as_raw_fd())?;
        let (under_way, waiting) = (HashMap::new(), VecDeque::new());
        Ok(Ring { ring, under_way, waiting, room, tasks: Threads::new(1, bell)? })
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what the entry points to is kept in `under_way` until its end is told of, and `Drop` waits.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.flush();
        }
    }

    fn start(&mut self, token: Token, transfer: Transfer) {
        let vectors = transfer.parts.iter().map(|part| libc::iovec {
            iov_base: part.region().base().wrapping_add(part.offset()).cast(),
            iov_len: part.len(),
        });
        let under_way = UnderWay { vectors: vectors.collect(), transfer };
        let (file, count) = (types::Fd(under_way.transfer.file.as_raw_fd()), under_way.vectors.len() as u32);
        let (vectors, at) = (under_way.vectors.as_ptr(), under_way.transfer.at);
        let entry = if under_way.transfer.write {
            opcode::Writev::new(file, vectors, count).offset(at).build()
        } else {
            opcode::Readv::new(file, vectors, count).offset(at).build()
        };
        self.under_way.insert(token, under_way);
        self.push(&entry.user_data(token));
    }

    fn ended(&mut self, token: Token, result: i32) -> Option<Done> {
        if token == CANCEL {
            return None;
        }
        let mut transfer =
            self.under_way.remove(&token).expect("the kernel tells of what it was given").transfer;
        let result = if result >= 0 {
            match (result, transfer.advance(result as usize)) {
                (_, false) => Ok(()),
                (0, true) => Err(ended()),
                (_, true) => {
                    self.start(token, transfer);
                    return None;
                }
            }
        } else {
            match Errno::from_raw_os_error(-result) {
                Errno::INTR | Errno::AGAIN => {
                    self.start(token, transfer);
                    return None;
                }
                Errno::CANCELED => Err(cancelled()),
                errno => Err(errno.into()),
            }
        };
        Some((token, result))
    }
}

impl Io for Ring {
    fn begin(&mut self, token: Token, transfer: Transfer) {
        if self.under_way.len() < self.room {
            self.start(token, transfer);
        } else {
            self.waiting.push_back((token, transfer));
        }
    }

    fn task(&mut self, token: Token, task: Task) {
        self.tasks.task(token, task);
    }

    fn cancel(&mut self, token: Token) {
        if self.under_way.contains_key(&token) {
            self.push(&opcode::AsyncCancel::new(token).build().user_data(CANCEL));
        }
    }

    fn flush(&mut self) {
        // What it does not take now (interrupted, no memory) is still in the queue, and goes with the next.
        let _ = self.ring.submit();
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        self.tasks.reap(done);
        // In a block, so that the queue is let go before a transfer goes on.
        while let Some(entry) = { self.ring.completion().next() } {
            done.extend(self.ended(entry.user_data(), entry.result()));
            while self.under_way.len() < self.room
                && let Some((token, transfer)) = self.waiting.pop_front()
            {
                self.start(token, transfer);
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may write to this memory as long as anything is under way, whether the ring is there or not.
        self.waiting.clear();
        while !self.under_way.is_empty() {
            let waited = self.ring.submit_and_wait(1);
            if waited.is_err_and(|error| error.kind() != io::ErrorKind::Interrupted) {
                std::mem::forget(std::mem::take(&mut self.under_way));
                return;
            }
            self.reap(&mut Vec::new());
        }
    }
}
