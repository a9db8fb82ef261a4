//! What a node's loop shows of itself to whoever asks for its status.

use std::sync::{Mutex, PoisonError};
use tandem_kv_store::{Latency, StoreStats};
use tandem_proto::ids::NodeId;
use tandem_proto::wire::{CachedTokens, Load};

/// The state of a node's loop.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
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
    /// Tokens of prompts that a prefill node did not compute.
    pub reused: ReusedTokens,
    /// What a prefill node shares with its store, if it has one.
    pub cache: Option<CacheShown>,
}

/// Tokens of all prompts so far that were not computed, by where their KV was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReusedTokens {
    /// In pages.
    pub pages: u64,
    /// In host memory.
    pub host: u64,
    /// On disk.
    pub disk: u64,
    /// In a remote store.
    pub remote: u64,
}

impl ReusedTokens {
    /// One prompt more.
    pub fn add(&mut self, cached: CachedTokens) {
        self.pages += u64::from(cached.pages);
        self.host += u64::from(cached.host);
        self.disk += u64::from(cached.disk);
        self.remote += u64::from(cached.remote);
    }
}

/// A store, and what moves between it and the pages.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CacheShown {
    /// The store.
    pub store: StoreStats,
    /// Packed bytes of one chunk.
    pub chunk_bytes: u64,
    /// Prompts that wait for chunks from slower tiers.
    pub waiting: usize,
    /// Prompts whose chunks are being brought to pages.
    pub loading: usize,
    /// Chunks that are being packed, or wait for it.
    pub saving: usize,
    /// From finding a prompt's chunks until they were in pages.
    pub load_time: Latency,
    /// From a chunk's computation until it could be found.
    pub save_time: Latency,
    /// Chunks not saved since too many were being saved.
    pub dropped_queue: u64,
    /// Chunks not saved since somebody needed their pages.
    pub dropped_pages: u64,
    /// Chunks not saved since kernels refused to pack them.
    pub failed: u64,
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
