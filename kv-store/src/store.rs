//! The store: packed chunks in the host pool, and in slower tiers behind it.

mod backing;
mod prefetch;
mod stats;

pub use prefetch::Coming;
pub use stats::{Latency, StoreStats, TierStats};

use crate::host::{HostPool, Refused, Tenant};
use crate::policy::EntryId;
use crate::tier::{Outcome, Ticket, Tier, TierError, Usage};
use backing::Backing;
use prefetch::{Job, JobId, Load};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use tandem_memory::Extent;
use tandem_proto::ids::Time;
use tandem_proto::keys::{ChunkKey, Fingerprint};
use tandem_proto::layout::KvShape;
use tandem_proto::stored::ChunkHeader;

/// What a store is for, and its limits.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The model. What a tier has of another is not used.
    pub fingerprint: Fingerprint,
    /// The dimensions of its KV. A slot holds one whole chunk.
    pub shape: KvShape,
    /// The most of everything that can wait.
    pub limits: StoreLimits,
}

/// The most of everything that can wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreLimits {
    /// Prefetches at a time. More are refused.
    pub prefetches: usize,
    /// Chunks of one prefetch. What is beyond is not looked for.
    pub prefetch_chunks: usize,
    /// Chunks that one tier loads at a time: at least one, and at most its share of a quarter of the pool's slots.
    pub loads: usize,
    /// Chunks that one tier stores, and others that it forgets, at a time; at least one.
    pub stores: usize,
    /// Chunks that wait for one tier to store them or are being stored: at most its share of a quarter of the pool's
    /// slots. Those beyond are not stored there.
    pub queued: usize,
    /// Chunks that one tier still has to forget. Those beyond are found there once more.
    pub removals: usize,
}

impl Default for StoreLimits {
    fn default() -> StoreLimits {
        StoreLimits {
            // As many requests as wait for a node's turn.
            prefetches: 64,
            // 262,144 tokens in chunks of 256.
            prefetch_chunks: 1024,
            // Deep enough for a disk or a network to be busy: chunks are large.
            loads: 16,
            stores: 8,
            // What one long prompt stores at once.
            queued: 512,
            removals: 1024,
        }
    }
}

/// Packed chunks in the host pool, and in slower tiers behind it, the fastest first.
///
/// It decides and never blocks: tiers work on threads of their own, and [`Store::poll`] takes in what they answered.
/// Chunks are published in the host pool and written through to every tier; those that only a slower tier has are
/// brought back by [`Store::prefetch`]. Nothing here looks at a chunk's bytes. Whoever scatters them compares the
/// checksums of [`Held::header`], and calls [`Store::discard`] if they differ.
pub struct Store {
    config: StoreConfig,
    pool: HostPool,
    backings: Vec<Backing>,
    /// Calls that tiers have not answered. Slots in them may be touched by the tier.
    calls: HashMap<Ticket, Call>,
    next_ticket: u64,
    /// Chunks that are being loaded, each once, for whoever wants them.
    loads: HashMap<ChunkKey, Load>,
    jobs: BTreeMap<JobId, Job>,
    next_job: u64,
    /// How many jobs have found a chunk in a tier and not begun to load it.
    found: HashMap<ChunkKey, usize>,
    /// [`Reserved`]s that were neither published nor abandoned.
    reserved: usize,
    /// [`Held`]s that were not released.
    held: usize,
    counts: StoreStats,
    /// Whether chunks came, or will not come, since the last poll.
    news: bool,
    answers: Vec<(Ticket, Result<Outcome, TierError>)>,
}

/// A slot to fill with a chunk. Goes back by [`Store::publish`] or [`Store::abandon`].
#[must_use = "its slot is free again only when it was published or abandoned"]
#[derive(Debug)]
pub struct Reserved {
    key: ChunkKey,
    slot: EntryId,
    extent: Extent,
}

/// A chunk in the host pool, which stays there until [`Store::release`] or [`Store::discard`].
#[must_use = "its slot stays held until it is released"]
#[derive(Debug)]
pub struct Held {
    slot: EntryId,
    extent: Extent,
    header: Arc<ChunkHeader>,
    from: Option<&'static str>,
}

#[derive(Debug)]
enum Call {
    Find { tier: usize, job: JobId },
    Load { tier: usize, key: ChunkKey, slot: EntryId, began: Time },
    Store { tier: usize, key: ChunkKey, slot: EntryId, began: Time },
    Remove { tier: usize, key: ChunkKey },
}

impl Store {
    /// A store over an empty pool and these tiers, the fastest first.
    ///
    /// # Panics
    /// When a slot is not as long as a whole chunk of the shape.
    #[must_use]
    pub fn new(mut config: StoreConfig, pool: HostPool, tiers: Vec<Box<dyn Tier>>) -> Store {
        let chunk_bytes = config.shape.packed_bytes(config.shape.chunk_tokens);
        assert_eq!(pool.slot_bytes(), chunk_bytes, "a slot of the pool must hold one chunk");
        // Whatever calls of tiers take, half of the pool is free of them.
        let share = (pool.slots() / (4 * tiers.len().max(1))).max(1);
        config.limits.loads = config.limits.loads.clamp(1, share);
        config.limits.stores = config.limits.stores.max(1);
        config.limits.queued = config.limits.queued.min(share);
        Store {
            config,
            pool,
            backings: tiers.into_iter().map(Backing::new).collect(),
            calls: HashMap::new(),
            next_ticket: 0,
            loads: HashMap::new(),
            jobs: BTreeMap::new(),
            next_job: 0,
            found: HashMap::new(),
            reserved: 0,
            held: 0,
            counts: StoreStats::default(),
            news: false,
            answers: Vec::new(),
        }
    }

    /// The longest run of `keys`, from the first on, that is in the host pool now, each chunk held for the caller.
    pub fn hold(&mut self, now: Time, keys: &[ChunkKey]) -> Vec<Held> {
        let mut run = Vec::new();
        for key in keys {
            let Some(hit) = self.pool.find(now, key) else { break };
            let from = hit.from.map(|tier| {
                self.backings[tier].counts.hits += 1;
                self.backings[tier].name()
            });
            let (extent, header) = (self.pool.extent(hit.slot), self.pool.header(hit.slot));
            run.push(Held { slot: hit.slot, extent: extent.clone(), header: Arc::clone(header), from });
        }
        self.pool.touch(&keys[..run.len()]);
        self.held += run.len();
        self.counts.hits += run.len() as u64;
        self.counts.misses += (keys.len() - run.len()) as u64;
        run
    }

    /// The caller touches the chunk's memory no more.
    pub fn release(&mut self, held: Held) {
        self.held -= 1;
        self.pool.let_go(held.slot);
    }

    /// The chunk's bytes are not those that its header tells: nobody finds it any more, in whichever tier it is. Who
    /// else holds it will notice too. A chunk that was stored anew meanwhile stays.
    pub fn discard(&mut self, now: Time, held: Held) {
        self.counts.damaged += 1;
        let key = held.header.key;
        let current = self.pool.is_published(held.slot);
        self.release(held);
        if current {
            self.forget(now, &key);
        }
    }

    /// Takes a chunk out of every tier. One that is being computed stays.
    pub fn forget(&mut self, now: Time, key: &ChunkKey) {
        self.pool.remove(key);
        self.call_off(key);
        for tier in 0..self.backings.len() {
            self.remove_from(tier, *key);
        }
        self.drive_writes(now);
        self.drive_prefetches(now);
    }

    /// A slot to fill with a chunk.
    ///
    /// # Errors
    /// When the chunk is there or somebody fills it in, or when there is no room without taking what is in use. The
    /// chunk is then not stored, and counted as such: storing delays nobody.
    pub fn reserve(&mut self, now: Time, key: ChunkKey, tenant: Tenant) -> Result<Reserved, Refused> {
        self.pool.expire(now);
        let slot = self.pool.reserve(key, tenant).inspect_err(|refused| self.counts.refuse(*refused))?;
        self.reserved += 1;
        Ok(Reserved { key, slot, extent: self.pool.extent(slot).clone() })
    }

    /// The slot is filled: the chunk is found from now on, and slower tiers store it as they find time. The header's
    /// checksums are those of the bytes in the slot.
    ///
    /// # Panics
    /// When the header is not one of this chunk.
    pub fn publish(&mut self, now: Time, reserved: Reserved, header: ChunkHeader) {
        let Reserved { key, slot, .. } = reserved;
        assert!(self.fits(&header, &key), "the header of chunk {key} is of another chunk, model or shape");
        self.reserved -= 1;
        self.counts.stored += 1;
        self.pool.publish(now, slot, Arc::new(header), None);
        for backing in &mut self.backings {
            if backing.queued() < self.config.limits.queued {
                self.pool.hold(slot);
                backing.writes.push_back((slot, key));
            } else {
                backing.counts.dropped += 1;
            }
        }
        self.drive_writes(now);
    }

    /// The slot is not filled after all.
    pub fn abandon(&mut self, reserved: Reserved) {
        self.reserved -= 1;
        self.counts.abandoned += 1;
        self.pool.abandon(reserved.slot);
    }

    /// A prompt's chunks were used: when room is needed, its last ones go first. [`Store::hold`] says so by
    /// itself.
    pub fn touch(&mut self, keys: &[ChunkKey]) {
        self.pool.touch(keys);
    }

    /// Keeps chunks from being evicted wherever they are now, or lets them go again; tells how many of them are pinned,
    /// or not any more, in the host pool. At most half of its slots are.
    pub fn pin(&mut self, now: Time, keys: &[ChunkKey], pinned: bool) -> usize {
        for backing in &mut self.backings {
            keys.iter().for_each(|key| backing.tier.pin(*key, pinned));
        }
        keys.iter().filter(|key| self.pool.pin(now, key, pinned)).count()
    }

    /// Empties the host pool, pinned chunks too, and calls off what is coming. Slower tiers keep what they have; what
    /// waits to be stored there is not stored.
    pub fn clear(&mut self) {
        self.pool.clear();
        let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
        jobs.into_iter().for_each(|job| self.end(job));
        let loads: Vec<ChunkKey> = self.loads.keys().copied().collect();
        loads.iter().for_each(|key| self.call_off(key));
        for backing in &mut self.backings {
            for (slot, _) in backing.writes.drain(..) {
                backing.counts.dropped += 1;
                self.pool.let_go(slot);
            }
        }
    }

    /// Takes in what tiers answered and what time brings, and gives tiers new work. Tells whether chunks came since the
    /// last call, or it is known that they will not.
    pub fn poll(&mut self, now: Time) -> bool {
        for tier in 0..self.backings.len() {
            let mut answers = std::mem::take(&mut self.answers);
            self.backings[tier].tier.poll(&mut answers);
            for (ticket, answer) in answers.drain(..) {
                self.handle(now, tier, ticket, answer);
            }
            self.answers = answers;
        }
        self.pool.expire(now);
        self.drive_writes(now);
        self.drive_prefetches(now);
        std::mem::take(&mut self.news)
    }

    /// When [`Store::poll`] has something to do though no tier called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.jobs.values().map(|job| job.deadline).chain(self.pool.next_expiry()).min()
    }

    /// [`Held`]s that were not given back.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// [`Reserved`]s that were not given back.
    #[must_use]
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// Prefetches that are not over.
    #[must_use]
    pub fn prefetches(&self) -> usize {
        self.jobs.len()
    }

    /// Chunks that wait for tiers to store them, or are being stored.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.backings.iter().map(Backing::queued).sum()
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &HostPool {
        &self.pool
    }

    /// What was counted so far, and what each tier holds.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let bytes = self.pool.slot_bytes() as u64;
        let pool = self.pool.counts();
        let host = Usage {
            chunks: self.pool.published() as u64,
            bytes: (self.pool.slots() - self.pool.free()) as u64 * bytes,
            budget: self.pool.slots() as u64 * bytes,
            under_way: (self.reserved + self.loads.len()) as u64,
            evicted: pool.evicted + pool.evicted_by_quota,
            expired: pool.expired,
            damaged: self.counts.damaged,
        };
        let tiers = self.backings.iter().map(Backing::stats).collect();
        StoreStats { host, pool, pinned: self.pool.pinned(), tiers, ..self.counts.clone() }
    }

    fn handle(&mut self, now: Time, tier: usize, ticket: Ticket, answer: Result<Outcome, TierError>) {
        let of = self.calls.get(&ticket).map(Call::tier);
        if of != Some(tier) {
            // Answered twice, or never asked.
            self.counts.strays += 1;
            return;
        }
        match self.calls.remove(&ticket).expect("it was just there") {
            Call::Find { job, .. } => self.searched(tier, job, answer),
            Call::Load { key, slot, began, .. } => self.loaded(now, tier, key, slot, began, answer),
            Call::Store { key, slot, began, .. } => {
                self.backings[tier].stored(&key, now.since_us(began), self.pool.slot_bytes(), answer);
                self.pool.let_go(slot);
            }
            Call::Remove { key, .. } => self.backings[tier].removed(&key, answer),
        }
    }

    /// Asks tiers to store and to forget what waits for it.
    fn drive_writes(&mut self, now: Time) {
        for tier in 0..self.backings.len() {
            while let Some(key) = self.backings[tier].next_removal(self.config.limits.stores) {
                let ticket = self.call(Call::Remove { tier, key });
                self.backings[tier].tier.remove(ticket, key);
            }
            while let Some((slot, key)) = self.backings[tier].next_write(self.config.limits.stores) {
                if !self.pool.is_published(slot) {
                    self.backings[tier].counts.dropped += 1;
                    self.pool.let_go(slot);
                    continue;
                }
                self.backings[tier].storing.insert(key);
                let (header, body) = (Arc::clone(self.pool.header(slot)), self.pool.extent(slot).clone());
                let ticket = self.call(Call::Store { tier, key, slot, began: now });
                self.backings[tier].tier.store(ticket, header, body);
            }
        }
    }

    /// Has a tier forget a chunk, and not store it if it was to.
    fn remove_from(&mut self, tier: usize, key: ChunkKey) {
        let backing = &mut self.backings[tier];
        backing.doom(key, self.config.limits.removals);
        let before = backing.writes.len();
        backing.writes.retain(|(slot, of)| {
            if *of == key {
                self.pool.let_go(*slot);
            }
            *of != key
        });
        backing.counts.dropped += (before - backing.writes.len()) as u64;
    }

    fn call(&mut self, call: Call) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.calls.insert(ticket, call);
        ticket
    }

    /// Whether a header is that of a whole chunk of this model under this key.
    fn fits(&self, header: &ChunkHeader, key: &ChunkKey) -> bool {
        let StoreConfig { fingerprint, shape, .. } = &self.config;
        header.key == *key
            && header.fingerprint == *fingerprint
            && header.shape == *shape
            && header.tokens == shape.chunk_tokens
            && header.checksums.len() == shape.layers as usize
    }
}

impl Call {
    fn tier(&self) -> usize {
        match self {
            Call::Find { tier, .. }
            | Call::Load { tier, .. }
            | Call::Store { tier, .. }
            | Call::Remove { tier, .. } => *tier,
        }
    }
}

impl Reserved {
    /// The chunk.
    #[must_use]
    pub fn key(&self) -> ChunkKey {
        self.key
    }

    /// The memory, which nobody else touches.
    #[must_use]
    pub fn extent(&self) -> &Extent {
        &self.extent
    }
}

impl Held {
    /// The chunk.
    #[must_use]
    pub fn key(&self) -> ChunkKey {
        self.header.key
    }

    /// Its packed bytes, which nobody writes.
    #[must_use]
    pub fn extent(&self) -> &Extent {
        &self.extent
    }

    /// What they are, and their checksums.
    #[must_use]
    pub fn header(&self) -> &ChunkHeader {
        &self.header
    }

    /// The tier that it was loaded from for whoever holds it first; None when it was in the host pool.
    #[must_use]
    pub fn from(&self) -> Option<&'static str> {
        self.from
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({} slots, {} tiers)", self.pool.slots(), self.backings.len())
    }
}
