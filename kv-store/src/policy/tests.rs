//! Each policy against a model that is a plain list, searched from one end to the other.

use super::*;

/// What a policy should do, as a list in the order in which entries came.
#[derive(Debug, Default)]
struct Model {
    entries: Vec<Known>,
    gone: Vec<u64>,
    clock: u64,
    age: u64,
}

#[derive(Clone, Debug)]
struct Known {
    id: EntryId,
    name: u64,
    used: u64,
    uses: u64,
    weight: u64,
    main: bool,
    shielded: bool,
}

impl Model {
    fn at(&self, id: EntryId) -> usize {
        self.entries.iter().position(|entry| entry.id == id).expect("the test names what is there")
    }

    fn insert(&mut self, kind: PolicyKind, id: EntryId, name: u64) {
        self.clock += 1;
        let main = self.gone.contains(&name);
        self.gone.retain(|gone| *gone != name);
        let uses = u64::from(kind != PolicyKind::S3Fifo);
        let weight = self.age + uses;
        self.entries.push(Known { id, name, used: self.clock, uses, weight, main, shielded: false });
    }

    fn touch(&mut self, id: EntryId) {
        self.clock += 1;
        let (at, age) = (self.at(id), self.age);
        let entry = &mut self.entries[at];
        entry.used = self.clock;
        entry.uses += 1;
        entry.weight = age + entry.uses;
    }

    fn evict(&mut self, kind: PolicyKind) -> Option<EntryId> {
        match kind {
            PolicyKind::Lru => self.lightest(|entry| (0, entry.used)),
            PolicyKind::Lfu => self.lightest(|entry| (entry.weight, entry.used)),
            PolicyKind::S3Fifo => self.first_unused(),
        }
    }

    fn lightest(&mut self, weight: fn(&Known) -> (u64, u64)) -> Option<EntryId> {
        let free = self.entries.iter().filter(|entry| !entry.shielded);
        let id = free.min_by_key(|entry| weight(entry))?.id;
        let entry = self.entries.remove(self.at(id));
        self.age = self.age.max(entry.weight);
        Some(id)
    }

    fn first_unused(&mut self) -> Option<EntryId> {
        loop {
            let free: Vec<_> = self.entries.iter().filter(|entry| !entry.shielded).cloned().collect();
            let small = free.iter().filter(|entry| !entry.main).count();
            let main = small <= free.len() / 10 && small < free.len();
            let id = free.iter().find(|entry| entry.main == main)?.id;
            let mut entry = self.entries.remove(self.at(id));
            if entry.uses == 0 {
                if !main {
                    self.gone.retain(|gone| *gone != entry.name);
                    self.gone.push(entry.name);
                    let beyond = self.gone.len().saturating_sub(self.entries.len().max(1));
                    self.gone.drain(..beyond);
                }
                return Some(id);
            }
            entry.uses = if main { entry.uses.min(3) - 1 } else { 0 };
            entry.main = true;
            self.entries.push(entry);
        }
    }
}

fn check(kind: PolicyKind) {
    for seed in 0..200u64 {
        let mut rng = seed;
        let mut random = |n: u64| {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (rng >> 33) % n
        };
        let (mut policy, mut model) = (kind.build(), Model::default());
        let mut unused: Vec<EntryId> = (0..40).map(EntryId).collect();
        for step in 0..1_500 {
            let some = (!model.entries.is_empty())
                .then(|| model.entries[random(model.entries.len() as u64) as usize].clone());
            match (random(16), some) {
                (0..4, _) if !unused.is_empty() => {
                    let id = unused.swap_remove(random(unused.len() as u64) as usize);
                    let name = random(80);
                    policy.insert(id, name);
                    model.insert(kind, id, name);
                }
                (4..9, Some(entry)) => {
                    policy.touch(entry.id);
                    model.touch(entry.id);
                }
                (9..12, Some(entry)) => {
                    policy.shield(entry.id, !entry.shielded);
                    let at = model.at(entry.id);
                    model.entries[at].shielded = !entry.shielded;
                }
                (12, Some(entry)) => {
                    policy.remove(entry.id);
                    let at = model.at(entry.id);
                    model.entries.remove(at);
                    unused.push(entry.id);
                }
                _ => {
                    let before = model.entries.clone();
                    let chosen = policy.evict();
                    assert_eq!(chosen, model.evict(kind), "{kind:?}, seed {seed}, step {step}");
                    assert!(!before.iter().any(|entry| entry.shielded && Some(entry.id) == chosen));
                    unused.extend(chosen);
                }
            }
            let free = model.entries.iter().filter(|entry| !entry.shielded).count();
            assert_eq!(policy.evictable(), free, "{kind:?}, seed {seed}, step {step}");
        }
    }
}

#[test]
fn lru_agrees_with_a_list() {
    check(PolicyKind::Lru);
}

#[test]
fn lfu_agrees_with_a_list() {
    check(PolicyKind::Lfu);
}

#[test]
fn s3_fifo_agrees_with_a_list() {
    check(PolicyKind::S3Fifo);
}

/// How many of `accesses` find what they name among `room` entries.
fn hits(kind: PolicyKind, room: u32, accesses: impl Iterator<Item = u64>) -> usize {
    let mut policy = kind.build();
    let mut held = std::collections::HashMap::new();
    let mut names = std::collections::HashMap::new();
    let mut free: Vec<EntryId> = (0..room).map(EntryId).collect();
    let mut hits = 0;
    for name in accesses {
        if let Some(id) = held.get(&name) {
            policy.touch(*id);
            hits += 1;
            continue;
        }
        let id = free.pop().or_else(|| policy.evict()).expect("nothing is shielded");
        if let Some(before) = names.insert(id, name) {
            held.remove(&before);
        }
        held.insert(name, id);
        policy.insert(id, name);
    }
    hits
}

/// 50 names that come back every 150 accesses, among names that never do, with room for 100.
#[test]
fn a_flood_washes_out_lru_and_not_s3_fifo() {
    let accesses = || (0..15_000u64).map(|n| if n % 3 == 0 { n / 3 % 50 } else { 1_000 + n });
    assert_eq!(hits(PolicyKind::Lru, 100, accesses()), 0);
    let hits = hits(PolicyKind::S3Fifo, 100, accesses());
    assert!(hits > 4_500, "{hits} of 5,000");
}

/// Names that were popular once make room for those that are popular now.
#[test]
fn what_was_popular_once_goes() {
    let then = (0..5_000u64).map(|n| n % 50);
    let now = (0..5_000u64).map(|n| 100 + n % 50);
    for kind in [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo] {
        let hits = hits(kind, 60, then.clone().chain(now.clone()));
        assert!(hits > 8_500, "{kind:?}: {hits} of 10,000");
    }
}

#[test]
#[should_panic(expected = "is not there")]
fn what_is_not_there_cannot_be_used() {
    PolicyKind::Lru.build().touch(EntryId(7));
}

#[test]
fn policies_are_called_by_their_names() {
    for kind in [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo] {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    assert!("fifo".parse::<PolicyKind>().is_err());
}
