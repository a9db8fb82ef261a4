//! Bringing chunks of a prefix from slower tiers into the host pool.

use super::{Call, Store};
use crate::host::{Place, Tenant};
use crate::policy::EntryId;
use crate::tier::{Outcome, TierError};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use tandem_proto::ids::Time;
use tandem_proto::keys::ChunkKey;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct JobId(u64);

/// A prefetch: walks along a prefix, asks tiers in turn how much further it goes, and loads what they have.
#[derive(Debug)]
pub(super) struct Job {
    tenant: Tenant,
    keys: Arc<[ChunkKey]>,
    /// The first key that nobody has said anything of.
    at: usize,
    /// The tier to ask next.
    tier: usize,
    /// Tiers in a row that do not have the chunk at `at`.
    without: usize,
    /// Whether a tier was asked and has not answered.
    asking: bool,
    /// Nothing beyond `at` is asked for, and what is answered to an earlier question is of no use.
    closed: bool,
    /// Chunks that a tier has and that are not being loaded yet, in order.
    found: VecDeque<(ChunkKey, usize)>,
    loading: HashSet<ChunkKey>,
    /// Slots of the prefix, which shall not go to make room for the rest of it.
    held: Vec<EntryId>,
    pub(super) deadline: Time,
}

/// A chunk that is being loaded.
#[derive(Debug)]
pub(super) struct Load {
    slot: EntryId,
    /// Jobs, each of which names the chunk in its `loading`.
    waiting: Vec<JobId>,
}

/// What of a prefix is on its way into the host pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Coming {
    /// Chunks that a tier has found and that are not there yet.
    pub chunks: usize,
    /// Whether tiers are still asked for what comes after those.
    pub asking: bool,
}

impl Job {
    fn is_over(&self) -> bool {
        self.closed && self.found.is_empty() && self.loading.is_empty()
    }
}

impl Store {
    /// Begins to bring what slower tiers have of this prefix into the host pool, beyond what is there; until it is there
    /// or the deadline is over, none of it is evicted. [`Store::hold`] it after the poll that brought the last of it.
    /// Tells whether it was begun: it is not when there is nothing to bring, or too many prefetches are under way.
    pub fn prefetch(&mut self, now: Time, tenant: Tenant, keys: &[ChunkKey], deadline: Time) -> bool {
        let keys = &keys[..keys.len().min(self.config.limits.prefetch_chunks)];
        let there = keys.iter().all(|key| self.pool.place(key) == Place::Published);
        if there || deadline <= now || self.backings.is_empty() {
            return false;
        }
        if self.jobs.len() >= self.config.limits.prefetches {
            self.counts.prefetches_refused += 1;
            return false;
        }
        self.counts.prefetches += 1;
        let id = JobId(self.next_job);
        self.next_job += 1;
        let job = Job {
            tenant,
            keys: keys.into(),
            at: 0,
            tier: 0,
            without: 0,
            asking: false,
            closed: false,
            found: VecDeque::new(),
            loading: HashSet::new(),
            held: Vec::new(),
            deadline,
        };
        self.jobs.insert(id, job);
        self.drive_prefetches(now);
        true
    }

    /// What of a prefix is on its way, after the chunks of it that are there.
    #[must_use]
    pub fn coming(&self, keys: &[ChunkKey]) -> Coming {
        let mut coming = Coming::default();
        for key in keys {
            if self.pool.place(key) == Place::Published {
                continue;
            }
            if !self.loads.contains_key(key) && !self.found.contains_key(key) {
                coming.asking =
                    self.jobs.values().any(|job| !job.closed && job.keys.get(job.at) == Some(key));
                break;
            }
            coming.chunks += 1;
        }
        coming
    }

    /// Ends jobs that are late, and brings the others as far as they get.
    pub(super) fn drive_prefetches(&mut self, now: Time) {
        let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
        for id in jobs {
            if self.jobs[&id].deadline <= now {
                self.counts.prefetches_late += 1;
                self.end(id);
                continue;
            }
            self.walk(now, id);
            self.begin_loads(now, id);
            if self.jobs[&id].is_over() {
                self.end(id);
            }
        }
    }

    /// Goes along the prefix as far as is known, and asks a tier how it goes on.
    fn walk(&mut self, now: Time, id: JobId) {
        while let Some(&key) = self.jobs[&id].keys.get(self.jobs[&id].at)
            && !self.jobs[&id].closed
            && !self.jobs[&id].asking
        {
            if !self.join(now, id, key) {
                break;
            }
            let job = self.jobs.get_mut(&id).expect("the caller has it");
            job.at += 1;
            job.without = 0;
        }
        let tiers = self.backings.len();
        let job = self.jobs.get_mut(&id).expect("the caller has it");
        if job.closed || job.asking {
            return;
        }
        if job.at == job.keys.len()
            || job.without == tiers
            || self.pool.place(&job.keys[job.at]) == Place::Filling
        {
            // What somebody computes now is not in any tier, nor is what comes after.
            job.closed = true;
            return;
        }
        let tier = job.tier;
        // Searches that outlive their jobs count too.
        if self.backings[tier].finds >= self.config.limits.prefetches {
            return;
        }
        job.asking = true;
        let rest: Arc<[ChunkKey]> = job.keys[job.at..].into();
        self.backings[tier].finds += 1;
        let ticket = self.call(Call::Find { tier, job: id });
        self.backings[tier].tier.find(ticket, rest);
    }

    /// Holds a chunk that is there, or waits for one that is being loaded; false when it is neither.
    fn join(&mut self, now: Time, id: JobId, key: ChunkKey) -> bool {
        let job = self.jobs.get_mut(&id).expect("the caller has it");
        if let Some(load) = self.loads.get_mut(&key) {
            if job.loading.insert(key) {
                load.waiting.push(id);
            }
            return true;
        }
        let slot = self.pool.hold_key(now, &key);
        job.held.extend(slot);
        slot.is_some()
    }

    /// A tier said how the prefix goes on.
    pub(super) fn searched(&mut self, tier: usize, id: JobId, answer: Result<Outcome, TierError>) {
        self.backings[tier].finds -= 1;
        let found = match answer {
            Ok(Outcome::Found(found)) => found,
            Ok(_) | Err(_) => {
                self.backings[tier].counts.find_failed += 1;
                0
            }
        };
        let tiers = self.backings.len();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.asking = false;
        if job.closed {
            return;
        }
        let found = found.min(job.keys.len() - job.at);
        job.tier = (tier + 1) % tiers;
        // It does not have the chunk after those either.
        job.without = if found > 0 { 1 } else { job.without + 1 };
        for key in &job.keys[job.at..job.at + found] {
            job.found.push_back((*key, tier));
            *self.found.entry(*key).or_default() += 1;
        }
        job.at += found;
        self.news = true;
    }

    /// Begins to load what was found, as far as there is room and the tiers take it.
    fn begin_loads(&mut self, now: Time, id: JobId) {
        while let Some(&(key, tier)) = self.jobs[&id].found.front() {
            if !self.join(now, id, key) {
                if self.backings[tier].loads >= self.config.limits.loads {
                    return;
                }
                if self.backings[tier].is_doomed(&key) {
                    return self.give_up(id);
                }
                let tenant = self.jobs[&id].tenant;
                let Ok(slot) = self.pool.reserve(key, tenant) else {
                    self.counts.prefetches_without_room += 1;
                    return self.give_up(id);
                };
                self.loads.insert(key, Load { slot, waiting: vec![id] });
                self.jobs.get_mut(&id).expect("the caller has it").loading.insert(key);
                self.load(now, tier, key, slot);
            }
            self.jobs.get_mut(&id).expect("the caller has it").found.pop_front();
            self.forget_found(&key);
        }
    }

    fn load(&mut self, now: Time, tier: usize, key: ChunkKey, slot: EntryId) {
        self.backings[tier].loads += 1;
        let body = self.pool.extent(slot).clone();
        let ticket = self.call(Call::Load { tier, key, slot, began: now });
        self.backings[tier].tier.load(ticket, key, body);
    }

    /// A tier has loaded a chunk, or has not.
    pub(super) fn loaded(
        &mut self,
        now: Time,
        tier: usize,
        key: ChunkKey,
        slot: EntryId,
        began: Time,
        answer: Result<Outcome, TierError>,
    ) {
        self.backings[tier].loads -= 1;
        if self.loads.get(&key).is_none_or(|load| load.slot != slot) {
            // It was called off.
            self.pool.let_go(slot);
            return;
        }
        let damaged = match answer {
            Ok(Outcome::Loaded(header)) if self.fits(&header, &key) => {
                let counts = &mut self.backings[tier].counts;
                counts.loaded += 1;
                counts.loaded_bytes += self.pool.slot_bytes() as u64;
                counts.load_time.add(now.since_us(began));
                self.pool.publish(now, slot, Arc::new(header), Some(tier));
                self.news = true;
                for id in self.loads.remove(&key).expect("it was just there").waiting {
                    self.pool.hold(slot);
                    let job = self.jobs.get_mut(&id).expect("who waits is there");
                    job.held.push(slot);
                    job.loading.remove(&key);
                }
                return;
            }
            Ok(_) | Err(TierError::Damaged { .. }) => true,
            Err(_) => false,
        };
        let counts = &mut self.backings[tier].counts;
        counts.load_failed += 1;
        if damaged {
            counts.damaged += 1;
            self.remove_from(tier, key);
        }
        self.load_elsewhere(now, tier, key, slot);
    }

    /// Loads a chunk that one tier did not give from the next one that may have it, if somebody still waits for it.
    fn load_elsewhere(&mut self, now: Time, after: usize, key: ChunkKey, slot: EntryId) {
        let waited = !self.loads[&key].waiting.is_empty();
        let next = (after + 1..self.backings.len()).find(|tier| {
            let backing = &self.backings[*tier];
            backing.loads < self.config.limits.loads && !backing.is_doomed(&key)
        });
        match next.filter(|_| waited) {
            Some(tier) => self.load(now, tier, key, slot),
            None => {
                self.call_off(&key);
                self.pool.let_go(slot);
            }
        }
    }

    /// Whatever a chunk's load brings, nobody finds it, and nobody waits for it. Its slot is let go when the tier answers.
    pub(super) fn call_off(&mut self, key: &ChunkKey) {
        let Some(load) = self.loads.remove(key) else { return };
        self.pool.detach(load.slot);
        self.news = true;
        for id in load.waiting {
            self.jobs.get_mut(&id).expect("who waits is there").loading.remove(key);
            self.give_up(id);
        }
    }

    /// The prefix has a gap, so what comes after it is of no use.
    fn give_up(&mut self, id: JobId) {
        let job = self.jobs.get_mut(&id).expect("the caller has it");
        job.closed = true;
        for (key, _) in std::mem::take(&mut job.found) {
            self.forget_found(&key);
        }
    }

    fn forget_found(&mut self, key: &ChunkKey) {
        let jobs = self.found.get_mut(key).expect("as many as jobs name it");
        *jobs -= 1;
        if *jobs == 0 {
            self.found.remove(key);
        }
    }

    /// The job is over. What it still loads is published when it comes.
    pub(super) fn end(&mut self, id: JobId) {
        self.give_up(id);
        let job = self.jobs.remove(&id).expect("the caller has it");
        for key in &job.loading {
            let load = self.loads.get_mut(key).expect("what is waited for is being loaded");
            load.waiting.retain(|waiting| *waiting != id);
        }
        job.held.into_iter().for_each(|slot| self.pool.let_go(slot));
        self.news = true;
    }
}
