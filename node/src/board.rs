//! What a node's loop shows of itself to whoever asks for its status.

use std::sync::{Mutex, PoisonError};
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Load;

/// The state of a node's loop.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shown {
    /// The router, if it has accepted the node.
    pub router: Option<NodeId>,
    /// It takes nothing new.
    pub draining: bool,
    /// How much it has to do.
    pub load: Load,
    /// Handoffs that are not over.
    pub handoffs: usize,
    /// Chunks that landed and are what was sent.
    pub chunks_verified: u64,
    /// Chunks that landed and are not what was sent.
    pub checksum_mismatches: u64,
    /// Writes that landed when their lease was over, and were ignored.
    pub stale_writes: u64,
}

/// Where a node's loop shows its state, and others read it.
#[derive(Debug, Default)]
pub struct Board(Mutex<Shown>);

impl Board {
    /// Shows this from now on.
    pub fn show(&self, shown: Shown) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    }

    /// What was shown last.
    #[must_use]
    pub fn read(&self) -> Shown {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
