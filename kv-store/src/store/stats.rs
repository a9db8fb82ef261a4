use crate::host::{PoolCounts, Refused};
use crate::tier::Usage;

/// What a store has counted since it was made, and holds now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StoreStats {
    /// Chunks that [`Store::hold`](super::Store::hold) found.
    pub hits: u64,
    /// Chunks that it was asked for and did not give.
    pub misses: u64,
    /// Chunks that were published.
    pub stored: u64,
    /// Slots that were given back unfilled.
    pub abandoned: u64,
    /// Chunks not stored since they were there or being filled in.
    pub refused_known: u64,
    /// Chunks not stored since their tenant was at its quota.
    pub refused_quota: u64,
    /// Chunks not stored since every slot was in use.
    pub refused_full: u64,
    /// Chunks that were discarded since their bytes were not those of their header.
    pub damaged: u64,
    /// Prefetches that were begun.
    pub prefetches: u64,
    /// Prefetches that were not, since too many were under way.
    pub prefetches_refused: u64,
    /// Prefetches that their deadline ended.
    pub prefetches_late: u64,
    /// Prefetches that ended early since no slot was free for the next chunk.
    pub prefetches_without_room: u64,
    /// Answers of tiers to what nobody asked.
    pub strays: u64,
    /// The host pool.
    pub host: Usage,
    /// Chunks that went from it, and why.
    pub pool: PoolCounts,
    /// Chunks that are pinned there.
    pub pinned: usize,
    /// The slower tiers.
    pub tiers: Vec<TierStats>,
}

/// What a store has counted of one slower tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TierStats {
    /// The tier.
    pub name: &'static str,
    /// Chunks from here that somebody held: each counts once for each time that it was loaded.
    pub hits: u64,
    /// Chunks that were loaded.
    pub loaded: u64,
    /// Their bytes.
    pub loaded_bytes: u64,
    /// How long loads took.
    pub load_time: Latency,
    /// Loads that failed, whose chunks were gone, or that were not those asked for.
    pub load_failed: u64,
    /// Of those, chunks that were damaged or of something else.
    pub damaged: u64,
    /// Searches that failed.
    pub find_failed: u64,
    /// Chunks that were stored, or were there.
    pub stored: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// How long stores took.
    pub store_time: Latency,
    /// Chunks that were not stored since the queue or the tier was full, or they were gone before their turn.
    pub dropped: u64,
    /// Stores that failed.
    pub store_failed: u64,
    /// Chunks that it was asked to forget, and did.
    pub removed: u64,
    /// Chunks that it was to forget, and may not have.
    pub remove_failed: u64,
    /// Chunks that wait to be stored, or are being stored.
    pub queued: u64,
    /// What the tier says.
    pub usage: Usage,
}

/// How long calls took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Latency {
    /// Calls.
    pub count: u64,
    /// Their sum.
    pub total_us: u64,
    /// The longest.
    pub max_us: u64,
}

impl Latency {
    /// One more.
    pub fn add(&mut self, us: u64) {
        self.count += 1;
        self.total_us = self.total_us.saturating_add(us);
        self.max_us = self.max_us.max(us);
    }
}

impl StoreStats {
    pub(super) fn refuse(&mut self, refused: Refused) {
        *match refused {
            Refused::Known => &mut self.refused_known,
            Refused::Quota => &mut self.refused_quota,
            Refused::Full => &mut self.refused_full,
        } += 1;
    }
}
