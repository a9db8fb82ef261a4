//! Random traffic in simulated time. After every step, what the store promises is checked.

use crate::chance::Rng;
use crate::fake::{self, FakeTier, Faults, HANG_US, SHAPE, Seen, SharedSeen, SharedShelf};
use std::collections::BTreeSet;
use std::sync::MutexGuard;
use tandem_kv_store::policy::PolicyKind;
use tandem_kv_store::tier::Tier;
use tandem_kv_store::{
    Held, HostPool, PoolConfig, Reserved, Store, StoreConfig, StoreLimits, StoreStats, Tenant, TierStats,
};
use tandem_memory::HostRegion;
use tandem_proto::ids::Time;
use tandem_proto::keys::ChunkKey;

/// Seeds that every run of the tests plays; `TANDEM_SEEDS=FIRST..END` plays others.
fn seeds() -> std::ops::Range<u64> {
    let Ok(range) = std::env::var("TANDEM_SEEDS") else { return 0..3_000 };
    let parsed = range.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("TANDEM_SEEDS is {range:?}, expected FIRST..END"))
}

struct World {
    rng: Rng,
    store: Store,
    seen: SharedSeen,
    shelves: Vec<SharedShelf>,
    limits: StoreLimits,
    slots: usize,
    quota: Option<usize>,
    /// The tenants' prompts, which share prefixes.
    prompts: Vec<(Tenant, Vec<ChunkKey>)>,
    reserved: Vec<(Reserved, String)>,
    held: Vec<(Held, String)>,
    names: u64,
    /// The latest deadline of a prefetch.
    last_deadline: Time,
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng(seed);
        let seen = SharedSeen::default();
        let slots = rng.between(1, 32) as usize;
        let policy = [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo][rng.between(0, 2) as usize];
        let quota = rng.one_in(3).then(|| rng.between(0, slots as u64) as usize);
        let ttl_us = rng.one_in(3).then(|| rng.between(1_000, 300_000));
        // A slot may be shorter than what slots are apart.
        let region = HostRegion::private((slots - 1) * 4096 + 256).unwrap();
        let pool = HostPool::new(&region, 256, PoolConfig { policy, ttl_us, tenant_slots: quota }).unwrap();
        assert_eq!(pool.slots(), slots);
        let (mut tiers, mut shelves): (Vec<Box<dyn Tier>>, _) = (Vec::new(), Vec::new());
        let healthy = rng.one_in(5);
        for id in 0..rng.between(0, 3) as usize {
            let (tier, shelf) = FakeTier::new(id, rng.between(1, 30) as usize, rng.next(), &seen);
            if !healthy {
                shelf.lock().unwrap().faults =
                    Faults { fail: 60, busy: 30, hang: 20, lie: 40, rot: 40, stray: 20 };
            }
            tiers.push(Box::new(tier));
            shelves.push(shelf);
        }
        let limits = StoreLimits {
            prefetches: rng.between(1, 6) as usize,
            prefetch_chunks: rng.between(1, 14) as usize,
            loads: rng.between(1, 4) as usize,
            stores: rng.between(1, 4) as usize,
            queued: rng.between(1, 8) as usize,
            removals: rng.between(1, 8) as usize,
        };
        let config = StoreConfig { fingerprint: fake::FINGERPRINT, shape: SHAPE, limits };
        let prompts = prompts(&mut rng);
        let store = Store::new(config, pool, tiers);
        World {
            rng,
            store,
            seen,
            shelves,
            limits,
            slots,
            quota,
            prompts,
            reserved: Vec::new(),
            held: Vec::new(),
            names: 0,
            last_deadline: Time(0),
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    fn now(&self) -> Time {
        self.seen().now
    }

    fn name(&mut self, what: &str) -> String {
        self.names += 1;
        format!("{what} {}", self.names)
    }

    fn step(&mut self) {
        let jump = if self.rng.one_in(40) { 300_000 } else { 1_500 };
        let us = self.rng.between(0, jump);
        let now = {
            let mut seen = self.seen();
            seen.now = seen.now.after_us(us);
            seen.now
        };
        let at = self.rng.between(0, self.prompts.len() as u64 - 1) as usize;
        let (tenant, mut keys) = self.prompts[at].clone();
        keys.truncate(self.rng.between(1, keys.len() as u64) as usize);
        match self.rng.between(0, 99) {
            0..20 => {
                let deadline = now.after_us(self.rng.between(0, 100_000));
                self.last_deadline = self.last_deadline.max(deadline);
                self.store.prefetch(now, tenant, &keys, deadline);
                let coming = self.store.coming(&keys);
                assert!(coming.chunks <= keys.len());
            }
            20..35 => self.hold(now, &keys),
            35..52 => self.reserve(now, tenant, &keys),
            52..70 => (0..self.rng.between(1, 4)).for_each(|_| self.fill(now)),
            70..84 => (0..self.rng.between(1, 12)).for_each(|_| self.release()),
            84..86 => self.forget(now, keys.last().unwrap()),
            86..90 => {
                let pinned = self.rng.one_in(2);
                let count = self.store.pin(now, &keys, pinned);
                assert!(count <= keys.len() && self.store.stats().pinned <= self.slots / 2);
            }
            90..92 => {
                self.seen().all_called_off();
                self.store.clear();
                assert_eq!(self.store.pool().published(), 0);
                assert_eq!(self.store.prefetches(), 0);
            }
            92 => self.store.touch(&keys),
            _ => {}
        }
        if !self.rng.one_in(3) {
            self.poll(now);
        }
        self.check();
    }

    fn poll(&mut self, now: Time) {
        self.store.poll(now);
        // Nothing waits beyond its deadline.
        let timeout = self.store.next_timeout();
        assert!(timeout.is_none_or(|at| at > now), "{timeout:?} is over at {now:?}");
    }

    fn hold(&mut self, now: Time, keys: &[ChunkKey]) {
        let run = self.store.hold(now, keys);
        assert!(run.iter().zip(keys).all(|(held, key)| held.key() == *key), "a run of other keys");
        for held in run {
            let who = self.name("reader");
            self.seen().reads(held.extent(), who.clone());
            assert_eq!(*held.header(), fake::header_of(&held.key()));
            if self.check_bytes(&held) {
                self.held.push((held, who));
                continue;
            }
            self.seen().leaves(held.extent(), &who);
            let key = held.key();
            self.seen().called_off(&key);
            self.store.discard(now, held);
            assert!(self.store.hold(now, &[key]).is_empty(), "a discarded chunk was found");
        }
    }

    /// Whether a chunk is what was stored. If it is not, a tier brought it so.
    fn check_bytes(&self, held: &Held) -> bool {
        let bytes = fake::read(held.extent());
        let right = bytes == fake::bytes_of(&held.key());
        let sums = fake::checksums(held.header(), &bytes) == held.header().checksums;
        assert_eq!(right, sums);
        let rotten = self.seen().rotten.get(&held.extent().offset()) == Some(&held.key());
        assert!(right || rotten, "chunk {:?} has the bytes of something else", held.key());
        right
    }

    fn reserve(&mut self, now: Time, tenant: Tenant, keys: &[ChunkKey]) {
        let some = self.rng.between(1, 4) as usize;
        for key in keys.iter().take(some) {
            let Ok(reserved) = self.store.reserve(now, *key, tenant) else { continue };
            let who = self.name("writer");
            let mut seen = self.seen();
            seen.rotten.remove(&reserved.extent().offset());
            seen.writes(reserved.extent(), who.clone());
            fake::write(reserved.extent(), &[0x11; 256]);
            drop(seen);
            assert!(self.store.hold(now, &[*key]).is_empty(), "a chunk was found before it was published");
            assert!(self.store.reserve(now, *key, tenant).is_err(), "a chunk is filled in twice");
            self.reserved.push((reserved, who));
        }
    }

    fn fill(&mut self, now: Time) {
        let Some(at) = pick(&mut self.rng, self.reserved.len()) else { return };
        let (reserved, who) = self.reserved.swap_remove(at);
        let key = reserved.key();
        fake::write(reserved.extent(), &fake::bytes_of(&key));
        self.seen().leaves(reserved.extent(), &who);
        if self.rng.one_in(8) {
            self.store.abandon(reserved);
        } else {
            self.store.publish(now, reserved, fake::header_of(&key));
            let stats = self.store.stats();
            assert!(stats.host.chunks >= 1);
            self.hold(now, &[key]);
        }
    }

    fn release(&mut self) {
        let Some(at) = pick(&mut self.rng, self.held.len()) else { return };
        let (held, who) = self.held.swap_remove(at);
        self.check_bytes(&held);
        self.seen().leaves(held.extent(), &who);
        self.store.release(held);
    }

    fn forget(&mut self, now: Time, key: &ChunkKey) {
        self.seen().called_off(key);
        self.store.forget(now, key);
        assert!(self.store.hold(now, &[*key]).is_empty(), "a forgotten chunk was found");
    }

    /// What holds at any time.
    fn check(&mut self) {
        let share = (self.slots / (4 * self.shelves.len().max(1))).max(1);
        let (loads, queued) = (self.limits.loads.min(share), self.limits.queued.min(share));
        {
            let seen = self.seen();
            assert!(seen.violations.is_empty(), "{:#?}", seen.violations);
            let most = seen.most;
            assert!(most.finds <= self.limits.prefetches, "{most:?}");
            assert!(most.loads <= loads, "{most:?}");
            assert!(most.stores <= self.limits.stores, "{most:?}");
            assert!(most.removals <= self.limits.stores, "{most:?}");
        }
        let stats = self.store.stats();
        assert_eq!(self.store.held(), self.held.len());
        assert_eq!(self.store.reserved(), self.reserved.len());
        assert!(self.store.prefetches() <= self.limits.prefetches);
        assert!(stats.host.bytes <= stats.host.budget && stats.host.budget == self.slots as u64 * 256);
        assert!(stats.pinned <= self.slots / 2);
        for tier in &stats.tiers {
            assert!(tier.queued as usize <= queued, "{} chunks wait for {}", tier.queued, tier.name);
            assert!(tier.usage.bytes <= tier.usage.budget);
        }
        if let Some(quota) = self.quota
            && self.rng.one_in(8)
        {
            self.check_quota(quota);
        }
    }

    /// Finds whatever is there of each tenant, one by one.
    fn check_quota(&mut self, quota: usize) {
        let now = self.now();
        let tenants: BTreeSet<Tenant> = self.prompts.iter().map(|(tenant, _)| *tenant).collect();
        for tenant in tenants {
            let theirs = self.prompts.iter().filter(|(of, _)| *of == tenant);
            let keys: BTreeSet<ChunkKey> = theirs.flat_map(|(_, keys)| keys).copied().collect();
            let filling = self.reserved.iter().filter(|(reserved, _)| keys.contains(&reserved.key())).count();
            let mut found = 0;
            for key in keys {
                for held in self.store.hold(now, &[key]) {
                    found += 1;
                    self.store.release(held);
                }
            }
            assert!(found + filling <= quota, "{tenant:?} has {found} and {filling} slots of {quota}");
        }
    }

    /// Everybody goes home: nothing is left.
    fn wind_up(mut self) -> StoreStats {
        for (reserved, who) in std::mem::take(&mut self.reserved) {
            self.seen().leaves(reserved.extent(), &who);
            self.store.abandon(reserved);
        }
        for (held, who) in std::mem::take(&mut self.held) {
            self.check_bytes(&held);
            self.seen().leaves(held.extent(), &who);
            self.store.release(held);
        }
        // Prefetches end whether tiers answer or not.
        let mut now = self.now().max(self.last_deadline);
        self.poll(now);
        assert_eq!(self.store.prefetches(), 0);
        for shelf in &self.shelves {
            shelf.lock().unwrap().faults = Faults::default();
        }
        self.drain(&mut now);
        assert_eq!(self.seen().slots_in_use(), 0);
        assert_eq!(self.store.pool().holds(), 0, "holds leaked");
        let stats = self.store.stats();
        assert_eq!(stats.host.under_way, 0);
        assert!(stats.tiers.iter().all(|tier| tier.queued == 0), "{stats:#?}");
        let busy = self.slots - self.store.pool().free();
        assert_eq!(busy, self.store.pool().published(), "slots leaked");
        // Everything can be forgotten, everywhere.
        let keys: BTreeSet<ChunkKey> = self.prompts.iter().flat_map(|(_, keys)| keys).copied().collect();
        for key in &keys {
            self.forget(now, key);
            self.drain(&mut now);
        }
        assert_eq!(self.store.pool().free(), self.slots, "slots leaked");
        for shelf in &self.shelves {
            assert!(shelf.lock().unwrap().chunks.is_empty(), "a tier has what it was to forget");
        }
        self.check();
        stats
    }

    fn drain(&mut self, now: &mut Time) {
        // What waits for a call that hangs is answered after it.
        for _ in 0..40 {
            *now = now.after_us(HANG_US);
            self.seen().now = *now;
            self.poll(*now);
            let stats = self.store.stats();
            if stats.tiers.iter().all(|tier| tier.usage.under_way == 0 && tier.queued == 0) {
                return;
            }
        }
        panic!("tiers are still busy: {:#?}", self.store.stats());
    }
}

fn pick(rng: &mut Rng, of: usize) -> Option<usize> {
    (of > 0).then(|| rng.between(0, of as u64 - 1) as usize)
}

/// Prompts of a few tenants, half of which begin as another of the same tenant.
fn prompts(rng: &mut Rng) -> Vec<(Tenant, Vec<ChunkKey>)> {
    let mut prompts: Vec<(Tenant, Vec<ChunkKey>)> = Vec::new();
    for _ in 0..rng.between(2, 8) {
        let tenant = Tenant(rng.between(0, 2));
        let begun = prompts.iter().rfind(|(of, _)| *of == tenant);
        let mut keys = begun.filter(|_| rng.one_in(2)).map_or(Vec::new(), |(_, keys)| keys.clone());
        keys.truncate(rng.between(1, 8) as usize);
        let len = rng.between(1, 12) as usize;
        while keys.len() < len {
            keys.push(ChunkKey(std::array::from_fn(|_| rng.next() as u8)));
        }
        prompts.push((tenant, keys));
    }
    prompts
}

fn play(seed: u64) -> StoreStats {
    let mut world = World::new(seed);
    for _ in 0..300 {
        world.step();
    }
    world.wind_up()
}

#[test]
fn nothing_leaks_nothing_is_overwritten_and_nothing_waits_for_ever() {
    let mut sum = std::collections::BTreeMap::<&str, u64>::new();
    for seed in seeds() {
        let stats = std::panic::catch_unwind(|| play(seed)).unwrap_or_else(|_| panic!("seed {seed}"));
        let tiers = |of: fn(&TierStats) -> u64| stats.tiers.iter().map(of).sum::<u64>();
        for (name, count) in [
            ("hits", stats.hits),
            ("stored", stats.stored),
            ("known", stats.refused_known),
            ("quota", stats.refused_quota),
            ("full", stats.refused_full),
            ("damaged", stats.damaged),
            ("prefetches", stats.prefetches),
            ("prefetches refused", stats.prefetches_refused),
            ("prefetches late", stats.prefetches_late),
            ("prefetches without room", stats.prefetches_without_room),
            ("strays", stats.strays),
            ("evicted", stats.pool.evicted),
            ("evicted by quota", stats.pool.evicted_by_quota),
            ("expired", stats.pool.expired),
            ("removed", stats.pool.removed),
            ("tier hits", tiers(|tier| tier.hits)),
            ("tier loaded", tiers(|tier| tier.loaded)),
            ("tier load failed", tiers(|tier| tier.load_failed)),
            ("tier damaged", tiers(|tier| tier.damaged)),
            ("tier find failed", tiers(|tier| tier.find_failed)),
            ("tier stored", tiers(|tier| tier.stored)),
            ("tier dropped", tiers(|tier| tier.dropped)),
            ("tier store failed", tiers(|tier| tier.store_failed)),
            ("tier removed", tiers(|tier| tier.removed)),
            ("tier remove failed", tiers(|tier| tier.remove_failed)),
        ] {
            *sum.entry(name).or_default() += count;
        }
    }
    println!("{sum:#?}");
    // What never happened was not tested.
    let few: Vec<_> = sum.iter().filter(|(_, count)| **count < 100).collect();
    assert!(few.is_empty() || std::env::var("TANDEM_SEEDS").is_ok(), "{few:?}");
}
