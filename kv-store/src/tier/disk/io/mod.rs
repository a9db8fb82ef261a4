//! How bytes get between memory and files: many transfers under way, asked for and told of by one thread.
//!
//! Who gives memory to a transfer has it to itself until the transfer is told of: so a tier's caller, by the contract of
//! [`Tier`](crate::tier::Tier), and the tier with its own. A transfer holds its memory and its file until the kernel is
//! done with both, whatever else happens.

mod ring;
mod threads;

use std::fs::File;
use std::io;
use std::sync::Arc;
use tandem_memory::Extent;

pub(super) use ring::Ring;
pub(super) use threads::Threads;

/// What a transfer is called, by whoever asked for it. It names one transfer at a time.
pub(super) type Token = u64;
/// What is done off the thread, since it may take long and no ring knows how.
pub(super) type Task = Box<dyn FnOnce() -> io::Result<()> + Send>;
/// How a piece of work ended.
pub(super) type Done = (Token, io::Result<()>);

/// Bytes on their way. They are all moved, or it failed.
pub(super) struct Transfer {
    pub(super) file: Arc<File>,
    /// Where in the file.
    pub(super) at: u64,
    /// Where in memory, one after the other.
    pub(super) parts: Vec<Extent>,
    pub(super) write: bool,
}

/// A way to have it done.
pub(super) trait Io: Send {
    /// Takes a transfer in.
    fn begin(&mut self, token: Token, transfer: Transfer);
    /// Takes a task in.
    fn task(&mut self, token: Token, task: Task);
    /// Asks for a transfer to end early. It is told of all the same, and may be over as if nobody had asked.
    fn cancel(&mut self, token: Token);
    /// Hands what was taken in to the kernel.
    fn flush(&mut self);
    /// Appends what is over.
    fn reap(&mut self, done: &mut Vec<Done>);
}

impl Transfer {
    /// Leaves out what was moved. Whether there is anything left.
    fn advance(&mut self, mut moved: usize) -> bool {
        self.at += moved as u64;
        while let Some(first) = self.parts.first_mut() {
            if moved < first.len() {
                let rest = first.part(moved..first.len());
                *first = rest.expect("a part of it");
                return true;
            }
            moved -= first.len();
            self.parts.remove(0);
        }
        false
    }
}

/// What a transfer that moved nothing more says.
fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before the chunk does")
}

fn cancelled() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it was not done by the deadline")
}
