//! Where stored chunks lie beyond this process's memory: on disk, in a remote store, at a peer.

// The contract's test owns the memory that it gives to calls.
#[allow(unsafe_code)]
pub mod contract;
pub mod disk;

use std::fmt;
use std::sync::Arc;
use tandem_memory::Extent;
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;

/// A place for chunks. Chunks go in whole and come out whole, as header and packed bytes.
///
/// Calls never block: work is done on threads of the tier's own, and each call that names a ticket is answered once, by
/// [`Tier::poll`], in any order. Its contract:
/// 1. A chunk is found only after all of it is stored, and then as it was given, or not at all: whatever happens to the
///    process, the machine or the place meanwhile.
/// 2. Memory that was given to a call is neither read nor written after the call was answered.
/// 3. Every call is answered: a place that hangs is given up after the tier's deadline, unless it may still touch the
///    memory, which is then kept until it cannot.
/// 4. It never holds more bytes than its budget, headers and its own bookkeeping counted; what must go is chosen by
///    its policy, and pinned chunks do not go. What finds no room is refused. A store that others fill too sets its own
///    bounds, and pins nothing.
/// 5. Queues are bounded: a call beyond is answered at once with [`TierError::Busy`].
/// 6. A header is told only when it decodes and names the key that was asked for. Packed bytes are compared with its
///    checksums by whoever uses them, and [`Tier::remove`]d if they differ.
pub trait Tier: Send {
    /// As it is called in options, logs and metrics.
    fn name(&self) -> &'static str;

    /// Which of these keys, from the first on, it holds: answered with [`Outcome::Found`].
    fn find(&mut self, ticket: Ticket, keys: Arc<[ChunkKey]>);

    /// Stores a chunk. One that is there already is kept as it is, and counts as stored.
    fn store(&mut self, ticket: Ticket, header: Arc<ChunkHeader>, body: Extent);

    /// Brings a chunk into `body`, which must be as long as its packed bytes.
    fn load(&mut self, ticket: Ticket, key: ChunkKey, body: Extent);

    /// Forgets a chunk.
    fn remove(&mut self, ticket: Ticket, key: ChunkKey);

    /// Keeps a chunk from being evicted, or lets it go again. Pins are counted by nobody: the last call holds.
    fn pin(&mut self, key: ChunkKey, pinned: bool);

    /// Appends what was answered since the last call.
    fn poll(&mut self, answers: &mut Vec<(Ticket, Result<Outcome, TierError>)>);

    /// What it holds now, and has counted.
    fn usage(&self) -> Usage;
}

/// A call, as its caller names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// How a call ended well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// How many of the keys, from the first on, are there.
    Found(usize),
    /// The chunk is stored.
    Stored,
    /// The chunk's bytes are in the memory that was given.
    Loaded(ChunkHeader),
    /// The chunk is gone.
    Removed,
}

/// Why a call did not end well.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TierError {
    /// The chunk is not there, or not any more.
    #[error("{tier} has no such chunk")]
    Absent {
        /// The tier.
        tier: &'static str,
    },
    /// Too much is under way.
    #[error("{tier} has {limit} calls under way and takes no more")]
    Busy {
        /// The tier.
        tier: &'static str,
        /// Calls that may be under way.
        limit: usize,
    },
    /// There is no room for the chunk.
    #[error("{tier} has no room for {bytes} bytes in its {budget}")]
    Full {
        /// The tier.
        tier: &'static str,
        /// What the chunk needs.
        bytes: u64,
        /// What the tier may hold.
        budget: u64,
    },
    /// What is there is not what was stored.
    #[error("{tier}: chunk {key} is damaged: {reason}")]
    Damaged {
        /// The tier.
        tier: &'static str,
        /// The chunk.
        key: ChunkKey,
        /// What is wrong.
        reason: String,
    },
    /// The place failed, or did not answer in time.
    #[error("{tier}: {reason}")]
    Failed {
        /// The tier.
        tier: &'static str,
        /// What it said.
        reason: String,
    },
}

/// What a tier holds and has counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Chunks that can be found; 0 if nobody counts them, as in a store that others fill too.
    pub chunks: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Bytes that it may take; 0 if its place sets its own bounds. Then bytes and chunks are 0 too.
    pub budget: u64,
    /// Calls that are not answered.
    pub under_way: u64,
    /// Chunks that went to make room.
    pub evicted: u64,
    /// Chunks that went because they were too old.
    pub expired: u64,
    /// Chunks that were found damaged.
    pub damaged: u64,
}

/// Called from a tier's threads whenever [`Tier::poll`] has something to tell.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
