//! What the store promises, one by one.

use crate::fake::{self, FakeTier, HANG_US, SHAPE, SharedSeen, SharedShelf};
use tandem_kv_store::policy::PolicyKind;
use tandem_kv_store::tier::Tier;
use tandem_kv_store::{Coming, Held, HostPool, PoolConfig, Refused, Store, StoreConfig, StoreLimits, Tenant};
use tandem_memory::HostRegion;
use tandem_proto::ids::Time;
use tandem_proto::keys::ChunkKey;

const TENANT: Tenant = Tenant(1);

struct Bench {
    store: Store,
    seen: SharedSeen,
    shelves: Vec<SharedShelf>,
    now: Time,
}

impl Bench {
    fn new(slots: usize, tiers: usize, config: PoolConfig) -> Bench {
        let seen = SharedSeen::default();
        let region = HostRegion::private(slots * 4096).unwrap();
        let pool = HostPool::new(&region, 256, config).unwrap();
        let (tiers, shelves): (Vec<_>, Vec<_>) = (0..tiers)
            .map(|id| FakeTier::new(id, 64, id as u64, &seen))
            .map(|(tier, shelf)| (Box::new(tier) as Box<dyn Tier>, shelf))
            .unzip();
        let limits = StoreLimits::default();
        let config = StoreConfig { fingerprint: fake::FINGERPRINT, shape: SHAPE, limits };
        Bench { store: Store::new(config, pool, tiers), seen, shelves, now: Time(0) }
    }

    fn put(&mut self, key: ChunkKey) -> Result<(), Refused> {
        let reserved = self.store.reserve(self.now, key, TENANT)?;
        fake::write(reserved.extent(), &fake::bytes_of(&key));
        self.store.publish(self.now, reserved, fake::header_of(&key));
        Ok(())
    }

    fn shelve(&mut self, tier: usize, keys: &[ChunkKey]) {
        let mut shelf = self.shelves[tier].lock().unwrap();
        shelf.chunks.extend(keys.iter().map(|key| (*key, (fake::header_of(key), fake::bytes_of(key)))));
    }

    /// Lets time pass; tiers answer meanwhile.
    fn pass(&mut self, us: u64) {
        let end = self.now.after_us(us);
        while self.now < end {
            self.now = self.now.after_us(500).min(end);
            self.seen.lock().unwrap().now = self.now;
            self.store.poll(self.now);
        }
        let violations = &self.seen.lock().unwrap().violations;
        assert!(violations.is_empty(), "{violations:#?}");
    }

    fn prefetch(&mut self, keys: &[ChunkKey], us: u64) -> bool {
        self.store.prefetch(self.now, TENANT, keys, self.now.after_us(us))
    }

    /// Which of these are there, each looked for by itself.
    fn there(&mut self, keys: &[ChunkKey]) -> Vec<usize> {
        let there = |at: &usize| {
            let run = self.store.hold(self.now, &keys[*at..=*at]);
            let found = !run.is_empty();
            run.into_iter().for_each(|held| self.store.release(held));
            found
        };
        (0..keys.len()).filter(there).collect()
    }

    fn release(&mut self, run: Vec<Held>) {
        run.into_iter().for_each(|held| self.store.release(held));
    }
}

fn keys(count: u8) -> Vec<ChunkKey> {
    (0..count).map(|n| ChunkKey([n + 1; 32])).collect()
}

fn config() -> PoolConfig {
    PoolConfig::default()
}

#[test]
fn what_is_published_is_found_and_stored_in_every_tier() {
    let mut bench = Bench::new(16, 2, config());
    let keys = keys(2);
    keys.iter().for_each(|key| bench.put(*key).unwrap());
    assert_eq!(bench.put(keys[0]), Err(Refused::Known));
    let run = bench.store.hold(bench.now, &keys);
    assert_eq!(run.len(), 2);
    for held in &run {
        assert_eq!(fake::read(held.extent()), fake::bytes_of(&held.key()));
        assert_eq!(held.from(), None);
    }
    bench.release(run);
    bench.pass(1_000_000);
    for shelf in &bench.shelves {
        assert!(shelf.lock().unwrap().chunks.keys().eq(&keys));
    }
    assert_eq!(bench.store.pool().holds(), 0);
}

#[test]
fn one_prefix_comes_from_all_tiers() {
    let mut bench = Bench::new(32, 2, config());
    let keys = keys(9);
    bench.put(keys[0]).unwrap();
    bench.put(keys[7]).unwrap();
    bench.pass(1_000_000);
    bench.shelves.iter().for_each(|shelf| shelf.lock().unwrap().chunks.clear());
    bench.shelve(0, &[keys[1], keys[2], keys[5], keys[6]]);
    bench.shelve(1, &[keys[3], keys[4]]);
    assert!(bench.prefetch(&keys, 3_000_000));
    assert!(bench.store.coming(&keys).asking);
    bench.pass(2_000_000);
    assert_eq!(bench.store.coming(&keys), Coming::default());
    assert_eq!(bench.store.prefetches(), 0);
    let run = bench.store.hold(bench.now, &keys);
    let from: Vec<_> = run.iter().map(Held::from).collect();
    let (near, far) = (Some("near"), Some("far"));
    assert_eq!(from, [None, near, near, far, far, near, near, None]);
    bench.release(run);
    // They come from the pool from now on.
    let run = bench.store.hold(bench.now, &keys);
    assert!(run.len() == 8 && run.iter().all(|held| held.from().is_none()));
    bench.release(run);
    let stats = bench.store.stats();
    assert_eq!((stats.tiers[0].hits, stats.tiers[1].hits), (4, 2));
}

#[test]
fn a_chunk_is_loaded_once_for_all_who_want_it() {
    let mut bench = Bench::new(64, 1, config());
    let keys = keys(6);
    bench.shelve(0, &keys);
    for len in [6, 3, 6, 5, 6] {
        assert!(bench.prefetch(&keys[..len], 3_000_000));
        bench.pass(500);
    }
    bench.pass(2_000_000);
    assert_eq!(bench.there(&keys).len(), 6);
    assert_eq!(bench.shelves[0].lock().unwrap().loads, 6);
    // What is there is not asked for.
    assert!(!bench.prefetch(&keys, 1_000));
}

#[test]
fn what_one_tier_fails_to_give_comes_from_the_next() {
    let mut bench = Bench::new(32, 2, config());
    let keys = keys(3);
    bench.shelve(0, &keys);
    bench.shelve(1, &keys);
    bench.prefetch(&keys, 3_000_000);
    // The search is over, the loads are not.
    while bench.store.coming(&keys).chunks == 0 {
        bench.pass(500);
    }
    bench.shelves[0].lock().unwrap().chunks.clear();
    bench.pass(2_000_000);
    assert_eq!(bench.there(&keys), [0, 1, 2]);
    let stats = bench.store.stats();
    assert!(stats.tiers[0].load_failed > 0);
    assert_eq!(stats.tiers[1].loaded, stats.tiers[0].load_failed);
}

#[test]
fn a_prefetch_ends_at_its_deadline_and_what_comes_late_is_kept() {
    let mut bench = Bench::new(32, 1, config());
    let keys = keys(3);
    bench.shelve(0, &keys);
    bench.prefetch(&keys, 250_000);
    while bench.store.coming(&keys).chunks == 0 {
        bench.pass(500);
    }
    bench.prefetch(&keys, 1);
    assert_eq!(bench.store.prefetches(), 2);
    let loading = bench.store.stats().host.under_way;
    assert!(loading > 0);
    // The tier has time enough and is not looked at.
    bench.now = Time(250_000);
    assert!(bench.store.next_timeout().unwrap() <= bench.now);
    bench.store.poll(bench.now);
    assert_eq!(bench.store.prefetches(), 0);
    assert_eq!(bench.store.next_timeout(), None);
    assert_eq!(bench.store.stats().prefetches_late, 2);
    bench.pass(1_000_000);
    assert_eq!(bench.there(&keys).len() as u64, loading);
    assert_eq!(bench.store.pool().holds(), 0);
}

/// A tier that hangs takes a quarter of the pool, and no more.
#[test]
fn storing_goes_on_while_a_tier_hangs() {
    let mut bench = Bench::new(16, 1, config());
    bench.shelves[0].lock().unwrap().faults.hang = 1_000;
    let keys = keys(60);
    for key in &keys {
        bench.put(*key).unwrap();
        assert!(bench.store.pool().holds() <= 4);
    }
    assert_eq!(bench.there(&keys).len(), 16);
    assert_eq!(bench.store.stats().tiers[0].dropped, 56);
    bench.pass(2 * HANG_US);
    assert_eq!((bench.store.pool().holds(), bench.store.stats().tiers[0].store_failed), (0, 4));
}

#[test]
fn what_is_held_or_pinned_or_filled_in_does_not_go() {
    for policy in [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo] {
        let mut bench = Bench::new(4, 0, PoolConfig { policy, ..config() });
        let keys = keys(8);
        keys[..3].iter().for_each(|key| bench.put(*key).unwrap());
        let run = bench.store.hold(bench.now, &keys[..1]);
        assert_eq!(bench.store.pin(bench.now, &keys[1..2], true), 1);
        let reserved = bench.store.reserve(bench.now, keys[3], TENANT).unwrap();
        // Chunk 2 is the only one that may go.
        bench.put(keys[4]).unwrap();
        bench.put(keys[5]).unwrap();
        assert_eq!(bench.there(&keys), [0, 1, 5]);
        assert_eq!(bench.store.pin(bench.now, &keys[5..6], true), 1);
        // Half of the pool is pinned.
        assert_eq!(bench.store.pin(bench.now, &keys[..1], true), 0);
        assert_eq!(bench.put(keys[6]), Err(Refused::Full));
        bench.release(run);
        bench.put(keys[6]).unwrap();
        assert_eq!(bench.there(&keys), [1, 5, 6]);
        bench.store.abandon(reserved);
        bench.store.pin(bench.now, &keys, false);
        bench.put(keys[7]).unwrap();
        bench.put(keys[2]).unwrap();
        assert_eq!(bench.store.pool().pinned(), 0);
    }
}

#[test]
fn the_end_of_a_prompt_goes_before_its_beginning() {
    let mut bench = Bench::new(4, 0, config());
    let keys = keys(6);
    keys[..4].iter().for_each(|key| bench.put(*key).unwrap());
    bench.store.touch(&keys[..4]);
    bench.put(keys[4]).unwrap();
    assert_eq!(
        bench.store.hold(bench.now, &keys[..4]).into_iter().map(|held| bench.store.release(held)).count(),
        3
    );
    bench.put(keys[5]).unwrap();
    assert_eq!(bench.there(&keys), [0, 1, 2, 5]);
}

#[test]
fn a_prefix_does_not_make_room_for_its_own_end() {
    let mut bench = Bench::new(8, 1, config());
    let (keys, others) = (keys(12), [ChunkKey([100; 32]), ChunkKey([101; 32])]);
    keys[..2].iter().for_each(|key| bench.put(*key).unwrap());
    others.iter().for_each(|key| bench.put(*key).unwrap());
    bench.pass(1_000_000);
    bench.shelve(0, &keys);
    bench.prefetch(&keys, 10_000_000);
    bench.pass(9_000_000);
    assert_eq!(bench.there(&keys), [0, 1, 2, 3, 4, 5, 6, 7]);
    let stats = bench.store.stats();
    assert_eq!((stats.prefetches_without_room, stats.pool.evicted), (1, 2));
    assert_eq!(bench.store.prefetches(), 0);
}

#[test]
fn a_tenant_at_its_quota_makes_room_for_itself() {
    let mut bench = Bench::new(8, 0, PoolConfig { tenant_slots: Some(3), ..config() });
    let (ours, theirs) = (keys(5), ChunkKey([100; 32]));
    let reserved = bench.store.reserve(bench.now, theirs, Tenant(2)).unwrap();
    bench.store.publish(bench.now, reserved, fake::header_of(&theirs));
    ours.iter().for_each(|key| bench.put(*key).unwrap());
    assert_eq!(bench.there(&ours), [2, 3, 4]);
    assert_eq!(bench.there(&[theirs]), [0]);
    let run = bench.store.hold(bench.now, &ours[2..]);
    assert_eq!(bench.put(ours[0]), Err(Refused::Quota));
    // A slot that somebody still reads counts until it is let go.
    bench.store.forget(bench.now, &ours[2]);
    assert_eq!(bench.put(ours[0]), Err(Refused::Quota));
    bench.release(run);
    bench.put(ours[0]).unwrap();
    assert_eq!(bench.there(&ours), [0, 3, 4]);
}

#[test]
fn chunks_expire_unless_they_are_pinned() {
    let mut bench = Bench::new(8, 0, PoolConfig { ttl_us: Some(1_000), ..config() });
    let keys = keys(3);
    keys.iter().for_each(|key| bench.put(*key).unwrap());
    bench.store.pin(bench.now, &keys[..1], true);
    let run = bench.store.hold(bench.now, &keys[1..2]);
    assert_eq!(bench.store.next_timeout(), Some(Time(1_000)));
    bench.now = Time(1_000);
    // Nobody polled.
    assert_eq!(bench.there(&keys), [0]);
    bench.pass(1);
    assert_eq!(bench.store.pool().free(), 6);
    bench.release(run);
    assert_eq!(bench.store.pool().free(), 7);
    assert_eq!(bench.store.next_timeout(), None);
    bench.store.pin(bench.now, &keys[..1], false);
    assert_eq!(bench.store.next_timeout(), Some(bench.now));
    bench.pass(1);
    assert_eq!((bench.store.pool().free(), bench.store.stats().pool.expired), (8, 3));
}

#[test]
fn a_damaged_chunk_goes_everywhere_and_its_successor_stays() {
    let mut bench = Bench::new(16, 2, config());
    let keys = keys(1);
    bench.put(keys[0]).unwrap();
    bench.pass(1_000_000);
    let mut both = bench.store.hold(bench.now, &keys);
    both.extend(bench.store.hold(bench.now, &keys));
    bench.store.discard(bench.now, both.pop().unwrap());
    assert_eq!(bench.there(&keys), []);
    bench.pass(1_000_000);
    for shelf in &bench.shelves {
        assert!(shelf.lock().unwrap().chunks.is_empty());
    }
    // Computed anew, before the other reader has noticed.
    bench.put(keys[0]).unwrap();
    bench.store.discard(bench.now, both.pop().unwrap());
    assert_eq!(bench.there(&keys), [0]);
    bench.pass(1_000_000);
    for shelf in &bench.shelves {
        assert!(shelf.lock().unwrap().chunks.contains_key(&keys[0]));
    }
    assert_eq!((bench.store.held(), bench.store.stats().damaged), (0, 2));
    // Computed anew while tiers still forget it.
    let held = bench.store.hold(bench.now, &keys).pop().unwrap();
    bench.store.discard(bench.now, held);
    bench.put(keys[0]).unwrap();
    bench.pass(1_000_000);
    for shelf in &bench.shelves {
        assert!(shelf.lock().unwrap().chunks.contains_key(&keys[0]));
    }
}

#[test]
#[should_panic(expected = "is of another chunk, model or shape")]
fn a_header_of_another_chunk_is_not_published() {
    let mut bench = Bench::new(1, 0, config());
    let reserved = bench.store.reserve(bench.now, ChunkKey([1; 32]), TENANT).unwrap();
    bench.store.publish(bench.now, reserved, fake::header_of(&ChunkKey([2; 32])));
}

#[test]
fn a_region_without_room_for_a_slot_is_refused() {
    let region = HostRegion::private(255).unwrap();
    assert!(HostPool::new(&region, 256, config()).is_err());
}
