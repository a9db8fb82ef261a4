use super::stats::TierStats;
use crate::policy::EntryId;
use crate::tier::{Outcome, Tier, TierError};
use std::collections::{HashSet, VecDeque};
use tandem_proto::keys::ChunkKey;

/// A slower tier, and what waits for it.
///
/// Of one chunk, a tier is asked to store or to forget one at a time: so what was discarded is not there again by a
/// store that came before.
pub(super) struct Backing {
    pub(super) tier: Box<dyn Tier>,
    /// Chunks to store. Each holds its slot.
    pub(super) writes: VecDeque<(EntryId, ChunkKey)>,
    /// Chunks that it was asked to store. A call holds the slot of each.
    pub(super) storing: HashSet<ChunkKey>,
    /// Chunks to forget.
    removals: VecDeque<ChunkKey>,
    /// Those, and those that it was asked to forget. Nothing is loaded or stored under these keys.
    doomed: HashSet<ChunkKey>,
    /// Searches and loads that are not answered.
    pub(super) finds: usize,
    pub(super) loads: usize,
    pub(super) counts: TierStats,
}

impl Backing {
    pub(super) fn new(tier: Box<dyn Tier>) -> Backing {
        let counts = TierStats { name: tier.name(), ..TierStats::default() };
        Backing {
            tier,
            writes: VecDeque::new(),
            storing: HashSet::new(),
            removals: VecDeque::new(),
            doomed: HashSet::new(),
            finds: 0,
            loads: 0,
            counts,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        self.counts.name
    }

    /// Slots that are held until they are stored.
    pub(super) fn queued(&self) -> usize {
        self.writes.len() + self.storing.len()
    }

    pub(super) fn stats(&self) -> TierStats {
        TierStats { queued: self.queued() as u64, usage: self.tier.usage(), ..self.counts }
    }

    pub(super) fn is_doomed(&self, key: &ChunkKey) -> bool {
        self.doomed.contains(key)
    }

    /// Puts a chunk among those to forget, which are at most so many.
    pub(super) fn doom(&mut self, key: ChunkKey, limit: usize) {
        if self.doomed.len() < limit {
            if self.doomed.insert(key) {
                self.removals.push_back(key);
            }
        } else {
            self.counts.remove_failed += 1;
        }
    }

    /// The next chunk to forget, if fewer than `limit` are being forgotten.
    pub(super) fn next_removal(&mut self, limit: usize) -> Option<ChunkKey> {
        let under_way = self.doomed.len() - self.removals.len();
        if under_way >= limit {
            return None;
        }
        let at = self.removals.iter().position(|key| !self.storing.contains(key))?;
        self.removals.remove(at)
    }

    /// The next chunk to store, if fewer than `limit` are being stored.
    pub(super) fn next_write(&mut self, limit: usize) -> Option<(EntryId, ChunkKey)> {
        if self.storing.len() >= limit {
            return None;
        }
        let (doomed, storing) = (&self.doomed, &self.storing);
        let free = |(_, key): &(EntryId, ChunkKey)| !doomed.contains(key) && !storing.contains(key);
        let at = self.writes.iter().position(free)?;
        self.writes.remove(at)
    }

    pub(super) fn stored(
        &mut self,
        key: &ChunkKey,
        took_us: u64,
        bytes: usize,
        answer: Result<Outcome, TierError>,
    ) {
        self.storing.remove(key);
        match answer {
            Ok(Outcome::Stored) => {
                self.counts.stored += 1;
                self.counts.stored_bytes += bytes as u64;
                self.counts.store_time.add(took_us);
            }
            Err(TierError::Busy { .. } | TierError::Full { .. }) => self.counts.dropped += 1,
            Ok(_) | Err(_) => self.counts.store_failed += 1,
        }
    }

    pub(super) fn removed(&mut self, key: &ChunkKey, answer: Result<Outcome, TierError>) {
        self.doomed.remove(key);
        match answer {
            Ok(Outcome::Removed) | Err(TierError::Absent { .. }) => self.counts.removed += 1,
            // It is found there once more, and its bytes are compared again.
            Ok(_) | Err(_) => self.counts.remove_failed += 1,
        }
    }
}
