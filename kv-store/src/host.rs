//! The host pool: slots of one chunk each, in one region of host memory. It is the first tier, and the place where
//! chunks of slower ones land.

use crate::policy::{self, EntryId, Policy, PolicyKind};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use tandem_memory::{Extent, HostRegion, RegionError};
use tandem_proto::ids::Time;
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;

/// Slots begin at multiples of this, so that disks can write them directly.
const ALIGN: usize = 4096;

/// Whose chunks count together: a hash of the salt, say.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tenant(pub u64);

/// How a pool decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolConfig {
    /// What goes when room is needed.
    pub policy: PolicyKind,
    /// How long a chunk can be found after it came, if not for ever. Pinned chunks stay.
    pub ttl_us: Option<u64>,
    /// The most slots of one tenant, if not all of them. At the limit, its own chunks make room for its new ones.
    pub tenant_slots: Option<usize>,
}

/// Slots, and which chunk each of them holds.
///
/// A slot is free; or somebody fills it; or its chunk is published and found under its key; or it is *leaving*: its
/// chunk is found no more, and the slot is free when the last holder lets go. Who holds a slot, or fills it, may touch
/// its memory; nobody else.
#[derive(Debug)]
pub struct HostPool {
    slots: Vec<Slot>,
    free: Vec<EntryId>,
    /// Slots that are being filled and those that are published. No key has two.
    index: HashMap<ChunkKey, EntryId>,
    /// Published slots; those that are held or pinned are shielded.
    policy: Box<dyn Policy>,
    /// What each tenant with a slot has; empty without a quota.
    tenants: HashMap<Tenant, Account>,
    /// When published slots without a pin expire.
    expiry: BTreeSet<(Time, EntryId)>,
    config: PoolConfig,
    slot_bytes: usize,
    published: usize,
    pinned: usize,
    holds: usize,
    counts: PoolCounts,
}

#[derive(Debug)]
struct Slot {
    extent: Extent,
    state: State,
}

#[derive(Debug)]
enum State {
    Free,
    Filling { key: ChunkKey, tenant: Tenant, pinned: bool },
    Published(Chunk),
    Leaving { tenant: Tenant, holders: u32 },
}

#[derive(Debug)]
struct Chunk {
    header: Arc<ChunkHeader>,
    tenant: Tenant,
    holders: u32,
    pinned: bool,
    since: Time,
    /// As in `expiry`: None for a chunk that stays, as a pinned one does.
    expires: Option<Time>,
    /// The tier that it was loaded from, until somebody found it.
    from: Option<usize>,
}

/// A tenant's slots in whatever state, and the order of the published ones.
#[derive(Debug)]
struct Account {
    slots: usize,
    policy: Box<dyn Policy>,
}

/// Chunks that went, by the reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolCounts {
    /// To make room for others.
    pub evicted: u64,
    /// To make room for others of the same tenant, which was at its quota.
    pub evicted_by_quota: u64,
    /// They were too old.
    pub expired: u64,
    /// Somebody said so: they were damaged, or all had to go.
    pub removed: u64,
}

/// Why there is no slot for a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// It is there, or somebody is filling a slot with it.
    #[error("the chunk is there already, or is being filled in")]
    Known,
    /// Its tenant has as much as it may have, all of it in use.
    #[error("all slots that the tenant may have are in use")]
    Quota,
    /// Every slot is in use.
    #[error("all slots of the host pool are in use")]
    Full,
}

/// What the pool has of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Absent,
    Filling,
    Published,
}

/// A chunk that somebody now holds.
pub(crate) struct Hit {
    pub(crate) slot: EntryId,
    /// The tier that it was loaded from, if this is the first time that somebody finds it.
    pub(crate) from: Option<usize>,
}

impl HostPool {
    /// As many slots of `slot_bytes` as the region has room for. A slot has exactly these bytes, and begins at a
    /// multiple of 4 KiB.
    ///
    /// # Errors
    /// When there is no room for one.
    pub fn new(
        region: &Arc<HostRegion>,
        slot_bytes: usize,
        config: PoolConfig,
    ) -> Result<HostPool, RegionError> {
        let stride = slot_bytes.max(1).next_multiple_of(ALIGN);
        let mut slots = Vec::new();
        // The last slot may end with the region, though a whole stride does not.
        let count = (region.len().saturating_sub(slot_bytes) / stride + 1).min(u32::MAX as usize);
        for slot in 0..count {
            let extent = region.extent(slot * stride..slot * stride + slot_bytes)?;
            slots.push(Slot { extent, state: State::Free });
        }
        Ok(HostPool {
            free: (0..count as u32).rev().map(EntryId).collect(),
            slots,
            index: HashMap::new(),
            policy: config.policy.build(),
            tenants: HashMap::new(),
            expiry: BTreeSet::new(),
            config,
            slot_bytes,
            published: 0,
            pinned: 0,
            holds: 0,
            counts: PoolCounts::default(),
        })
    }

    /// Slots in all.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Slots that are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Chunks that can be found.
    #[must_use]
    pub fn published(&self) -> usize {
        self.published
    }

    /// Chunks that are pinned.
    #[must_use]
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    /// Holds that were not let go.
    #[must_use]
    pub fn holds(&self) -> usize {
        self.holds
    }

    /// Bytes of a slot.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// What went, and why.
    #[must_use]
    pub fn counts(&self) -> PoolCounts {
        self.counts
    }

    pub(crate) fn extent(&self, slot: EntryId) -> &Extent {
        &self.slots[slot.0 as usize].extent
    }

    pub(crate) fn header(&self, slot: EntryId) -> &Arc<ChunkHeader> {
        match &self.slots[slot.0 as usize].state {
            State::Published(chunk) => &chunk.header,
            state => panic!("slot {} has no chunk: it is {state:?}", slot.0),
        }
    }

    pub(crate) fn place(&self, key: &ChunkKey) -> Place {
        match self.index.get(key).map(|slot| &self.slots[slot.0 as usize].state) {
            None => Place::Absent,
            Some(State::Published(_)) => Place::Published,
            Some(_) => Place::Filling,
        }
    }

    /// Takes a slot for a chunk, which the caller fills.
    pub(crate) fn reserve(&mut self, key: ChunkKey, tenant: Tenant) -> Result<EntryId, Refused> {
        if self.index.contains_key(&key) {
            return Err(Refused::Known);
        }
        self.keep_quota(tenant)?;
        if self.free.is_empty() {
            let slot = self.policy.evict().ok_or(Refused::Full)?;
            self.counts.evicted += 1;
            let chunk = self.unlist(slot);
            if let Some(account) = self.tenants.get_mut(&chunk.tenant) {
                account.policy.remove(slot);
            }
            self.vacate(slot, &chunk);
        }
        let slot = self.free.pop().expect("one was made free");
        self.slots[slot.0 as usize].state = State::Filling { key, tenant, pinned: false };
        self.index.insert(key, slot);
        if self.config.tenant_slots.is_some() {
            let policy = self.config.policy;
            let account = self.tenants.entry(tenant);
            account.or_insert_with(|| Account { slots: 0, policy: policy.build() }).slots += 1;
        }
        Ok(slot)
    }

    /// Has a tenant at its quota give up a chunk.
    fn keep_quota(&mut self, tenant: Tenant) -> Result<(), Refused> {
        let Some(quota) = self.config.tenant_slots else { return Ok(()) };
        let Some(account) = self.tenants.get_mut(&tenant) else {
            return if quota == 0 { Err(Refused::Quota) } else { Ok(()) };
        };
        if account.slots < quota {
            return Ok(());
        }
        let slot = account.policy.evict().ok_or(Refused::Quota)?;
        self.counts.evicted_by_quota += 1;
        self.policy.remove(slot);
        let chunk = self.unlist(slot);
        self.vacate(slot, &chunk);
        Ok(())
    }

    /// The slot was filled: its chunk is found from now on.
    pub(crate) fn publish(
        &mut self,
        now: Time,
        slot: EntryId,
        header: Arc<ChunkHeader>,
        from: Option<usize>,
    ) {
        let state = &mut self.slots[slot.0 as usize].state;
        let &mut State::Filling { key, tenant, pinned } = state else {
            panic!("slot {} is published, but it is {state:?}", slot.0)
        };
        assert_eq!(header.key, key, "a chunk is published under another's key");
        let expires = self.config.ttl_us.filter(|_| !pinned).map(|ttl| now.after_us(ttl));
        *state = State::Published(Chunk { header, tenant, holders: 0, pinned, since: now, expires, from });
        self.published += 1;
        self.expiry.extend(expires.map(|at| (at, slot)));
        let name = policy::name(&key);
        self.for_policies(tenant, |policy| policy.insert(slot, name));
        if pinned {
            self.for_policies(tenant, |policy| policy.shield(slot, true));
        }
    }

    /// The slot is not filled after all.
    pub(crate) fn abandon(&mut self, slot: EntryId) {
        self.detach(slot);
        self.let_go(slot);
    }

    /// Nobody shall find what is being filled in. Its filler lets go when it touches the memory no more.
    pub(crate) fn detach(&mut self, slot: EntryId) {
        let state = &mut self.slots[slot.0 as usize].state;
        let &mut State::Filling { key, tenant, pinned } = state else {
            panic!("slot {} is given up, but it is {state:?}", slot.0)
        };
        *state = State::Leaving { tenant, holders: 1 };
        self.holds += 1;
        self.pinned -= usize::from(pinned);
        self.index.remove(&key);
    }

    /// Finds a chunk and holds it, for somebody who asked for it.
    pub(crate) fn find(&mut self, now: Time, key: &ChunkKey) -> Option<Hit> {
        let slot = self.hold_key(now, key)?;
        let State::Published(chunk) = &mut self.slots[slot.0 as usize].state else {
            panic!("slot {} is held but not published", slot.0)
        };
        Some(Hit { slot, from: chunk.from.take() })
    }

    /// Holds a chunk, if it is there.
    pub(crate) fn hold_key(&mut self, now: Time, key: &ChunkKey) -> Option<EntryId> {
        let slot = *self.index.get(key)?;
        let State::Published(chunk) = &self.slots[slot.0 as usize].state else { return None };
        if chunk.expires.is_some_and(|at| at <= now) {
            self.counts.expired += 1;
            self.withdraw(slot);
            return None;
        }
        self.hold(slot);
        Some(slot)
    }

    /// One more holder of a published slot.
    pub(crate) fn hold(&mut self, slot: EntryId) {
        let State::Published(chunk) = &mut self.slots[slot.0 as usize].state else {
            panic!("slot {} has no chunk to hold", slot.0)
        };
        chunk.holders += 1;
        self.holds += 1;
        let (tenant, shield) = (chunk.tenant, chunk.holders == 1 && !chunk.pinned);
        if shield {
            self.for_policies(tenant, |policy| policy.shield(slot, true));
        }
    }

    /// One holder less.
    pub(crate) fn let_go(&mut self, slot: EntryId) {
        match &mut self.slots[slot.0 as usize].state {
            State::Published(chunk) => {
                assert!(chunk.holders > 0, "slot {} is let go, but nobody holds it", slot.0);
                chunk.holders -= 1;
                let (tenant, unshield) = (chunk.tenant, chunk.holders == 0 && !chunk.pinned);
                if unshield {
                    self.for_policies(tenant, |policy| policy.shield(slot, false));
                }
            }
            State::Leaving { tenant, holders } => {
                *holders -= 1;
                if *holders == 0 {
                    let tenant = *tenant;
                    self.set_free(slot, tenant);
                }
            }
            state => panic!("slot {} is let go, but it is {state:?}", slot.0),
        }
        self.holds -= 1;
    }

    /// The chunks were used, in the order of their prompt: the last goes first when room is needed, since it is of no
    /// use without those before it.
    pub(crate) fn touch(&mut self, keys: &[ChunkKey]) {
        for key in keys.iter().rev() {
            let Some(&slot) = self.index.get(key) else { continue };
            if let State::Published(chunk) = &self.slots[slot.0 as usize].state {
                let tenant = chunk.tenant;
                self.for_policies(tenant, |policy| policy.touch(slot));
            }
        }
    }

    /// Whether this slot's chunk can be found.
    pub(crate) fn is_published(&self, slot: EntryId) -> bool {
        matches!(self.slots[slot.0 as usize].state, State::Published(_))
    }

    /// Nobody finds a chunk any more.
    pub(crate) fn remove(&mut self, key: &ChunkKey) {
        if self.place(key) == Place::Published {
            self.counts.removed += 1;
            self.withdraw(self.index[key]);
        }
    }

    /// Nobody finds any chunk any more.
    pub(crate) fn clear(&mut self) {
        for slot in (0..self.slots.len() as u32).map(EntryId) {
            if self.is_published(slot) {
                self.counts.removed += 1;
                self.withdraw(slot);
            }
        }
    }

    /// Pins a chunk that is there or being filled in, or lets it go again; false when it is not there, or half of all
    /// slots are pinned already.
    pub(crate) fn pin(&mut self, now: Time, key: &ChunkKey, pin: bool) -> bool {
        let Some(&slot) = self.index.get(key) else { return false };
        let room = self.pinned < self.slots.len() / 2;
        let state = &mut self.slots[slot.0 as usize].state;
        let pinned = match state {
            State::Filling { pinned, .. } => pinned,
            State::Published(chunk) => &mut chunk.pinned,
            state => panic!("slot {} is in the index, but it is {state:?}", slot.0),
        };
        if *pinned == pin {
            return true;
        }
        if pin && !room {
            return false;
        }
        *pinned = pin;
        self.pinned = if pin { self.pinned + 1 } else { self.pinned - 1 };
        if let State::Published(chunk) = state {
            if let Some(at) = chunk.expires.take() {
                self.expiry.remove(&(at, slot));
            }
            // At once, if its time is over.
            let ttl = self.config.ttl_us.filter(|_| !pin);
            chunk.expires = ttl.map(|ttl| chunk.since.after_us(ttl).max(now));
            self.expiry.extend(chunk.expires.map(|at| (at, slot)));
            let (tenant, unheld) = (chunk.tenant, chunk.holders == 0);
            if unheld {
                self.for_policies(tenant, |policy| policy.shield(slot, pin));
            }
        }
        true
    }

    /// Lets go of what is too old.
    pub(crate) fn expire(&mut self, now: Time) {
        while let Some(&(at, slot)) = self.expiry.first()
            && at <= now
        {
            self.counts.expired += 1;
            self.withdraw(slot);
        }
    }

    pub(crate) fn next_expiry(&self) -> Option<Time> {
        self.expiry.first().map(|(at, _)| *at)
    }

    /// Takes a published chunk from those that are found.
    fn withdraw(&mut self, slot: EntryId) {
        let chunk = self.unlist(slot);
        self.for_policies(chunk.tenant, |policy| policy.remove(slot));
        self.vacate(slot, &chunk);
    }

    /// Takes a published chunk from everything but the policies.
    fn unlist(&mut self, slot: EntryId) -> Chunk {
        let state = std::mem::replace(&mut self.slots[slot.0 as usize].state, State::Free);
        let State::Published(chunk) = state else { panic!("slot {} is not published", slot.0) };
        self.published -= 1;
        self.index.remove(&chunk.header.key);
        self.pinned -= usize::from(chunk.pinned);
        if let Some(at) = chunk.expires {
            self.expiry.remove(&(at, slot));
        }
        chunk
    }

    /// The slot of a chunk that is not found any more is free when nobody holds it.
    fn vacate(&mut self, slot: EntryId, chunk: &Chunk) {
        let &Chunk { tenant, holders, .. } = chunk;
        if holders == 0 {
            self.set_free(slot, tenant);
        } else {
            self.slots[slot.0 as usize].state = State::Leaving { tenant, holders };
        }
    }

    fn set_free(&mut self, slot: EntryId, tenant: Tenant) {
        self.slots[slot.0 as usize].state = State::Free;
        self.free.push(slot);
        if let Some(account) = self.tenants.get_mut(&tenant) {
            account.slots -= 1;
            if account.slots == 0 {
                self.tenants.remove(&tenant);
            }
        }
    }

    fn for_policies(&mut self, tenant: Tenant, mut act: impl FnMut(&mut dyn Policy)) {
        act(&mut *self.policy);
        if let Some(account) = self.tenants.get_mut(&tenant) {
            act(&mut *account.policy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_proto::keys::Fingerprint;
    use tandem_proto::layout::{KvDtype, KvShape};

    const SHAPE: KvShape =
        KvShape { layers: 1, kv_heads: 1, head_dim: 1, page_tokens: 1, chunk_tokens: 1, dtype: KvDtype::F32 };

    fn key(n: u64) -> ChunkKey {
        ChunkKey([n as u8; 32])
    }

    fn header(key: ChunkKey) -> Arc<ChunkHeader> {
        let fingerprint = Fingerprint([0; 32]);
        Arc::new(ChunkHeader { key, fingerprint, shape: SHAPE, tokens: 1, checksums: vec![0] })
    }

    /// Every number that the pool keeps, against counting anew.
    fn recount(pool: &HostPool, holds: usize, tenants: u64) {
        let count = |of: fn(&State) -> bool| pool.slots.iter().filter(|slot| of(&slot.state)).count();
        assert_eq!(pool.free.len(), count(|state| matches!(state, State::Free)));
        assert_eq!(
            pool.index.len(),
            count(|state| matches!(state, State::Filling { .. } | State::Published(_)))
        );
        assert_eq!(pool.published, count(|state| matches!(state, State::Published(_))));
        let pinned = |state: &State| match state {
            State::Filling { pinned, .. } => *pinned,
            State::Published(chunk) => chunk.pinned,
            _ => false,
        };
        assert_eq!(pool.pinned, count(pinned));
        assert!(pool.pinned <= pool.slots.len() / 2);
        let idle =
            |state: &State| matches!(state, State::Published(chunk) if chunk.holders == 0 && !chunk.pinned);
        assert_eq!(pool.policy.evictable(), count(idle));
        let held = pool.slots.iter().map(|slot| match slot.state {
            State::Published(Chunk { holders, .. }) | State::Leaving { holders, .. } => holders as usize,
            _ => 0,
        });
        let held: usize = held.sum();
        assert_eq!((pool.holds, held), (holds, holds));
        let expiring = pool.slots.iter().filter_map(|slot| match &slot.state {
            State::Published(chunk) => chunk.expires,
            _ => None,
        });
        assert_eq!(pool.expiry.len(), expiring.count());
        for tenant in (0..tenants).map(Tenant) {
            let theirs = pool.slots.iter().filter(|slot| match &slot.state {
                State::Free => false,
                State::Filling { tenant: of, .. } | State::Leaving { tenant: of, .. } => *of == tenant,
                State::Published(chunk) => chunk.tenant == tenant,
            });
            let (theirs, quota) = (theirs.count(), pool.config.tenant_slots);
            assert!(quota.is_none_or(|quota| theirs <= quota), "{theirs} slots of {quota:?}");
            let account = pool.tenants.get(&tenant).map_or(0, |account| account.slots);
            assert_eq!(account, quota.map_or(0, |_| theirs));
        }
    }

    #[test]
    fn numbers_agree_with_a_recount() {
        let kinds = [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo];
        let mut sum = PoolCounts::default();
        for seed in 0..60u64 {
            let mut rng = seed;
            let mut random = |n: u64| {
                rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (rng >> 33) % n
            };
            let config = PoolConfig {
                policy: kinds[random(3) as usize],
                ttl_us: (random(2) == 0).then(|| random(200)),
                tenant_slots: (random(2) == 0).then(|| random(8) as usize),
            };
            let region = HostRegion::private(12 * ALIGN).unwrap();
            let mut pool = HostPool::new(&region, ALIGN, config).unwrap();
            let (mut filling, mut held) = (Vec::new(), Vec::new());
            for now in (0..3_000).map(Time) {
                let n = random(30);
                match random(12) {
                    0..4 => {
                        filling.extend(pool.reserve(key(n), Tenant(n % 3)).ok().map(|slot| (slot, key(n))))
                    }
                    4..6 if !filling.is_empty() => {
                        let (slot, key) = filling.swap_remove(random(filling.len() as u64) as usize);
                        match random(6) {
                            0 => pool.abandon(slot),
                            1 => {
                                pool.detach(slot);
                                held.push(slot);
                            }
                            _ => pool.publish(now, slot, header(key), None),
                        }
                    }
                    6 => held.extend(pool.find(now, &key(n)).map(|hit| hit.slot)),
                    7..9 if !held.is_empty() => {
                        pool.let_go(held.swap_remove(random(held.len() as u64) as usize));
                    }
                    9 => drop(pool.pin(now, &key(n), random(3) > 1)),
                    10 => pool.touch(&[key(n), key(n + 1)]),
                    11 if random(4) == 0 => pool.remove(&key(n)),
                    11 if random(100) == 0 => pool.clear(),
                    _ => pool.expire(now),
                }
                recount(&pool, held.len(), 3);
            }
            let counts = pool.counts();
            sum.evicted += counts.evicted;
            sum.evicted_by_quota += counts.evicted_by_quota;
            sum.expired += counts.expired;
            sum.removed += counts.removed;
        }
        let PoolCounts { evicted, evicted_by_quota, expired, removed } = sum;
        assert!(evicted.min(evicted_by_quota).min(expired).min(removed) > 100, "{sum:?}");
    }

    #[test]
    #[should_panic(expected = "nobody holds it")]
    fn letting_go_twice_is_caught() {
        let region = HostRegion::private(ALIGN).unwrap();
        let mut pool = HostPool::new(&region, ALIGN, PoolConfig::default()).unwrap();
        let slot = pool.reserve(key(1), Tenant(0)).unwrap();
        pool.publish(Time(0), slot, header(key(1)), None);
        pool.hold(slot);
        pool.let_go(slot);
        pool.let_go(slot);
    }
}
