//! Tiers in memory that answer late, in any order, fail, hang and lie, and watch who touches which slot.

use crate::chance::Rng;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use tandem_kv_store::tier::{Outcome, Ticket, Tier, TierError, Usage};
use tandem_memory::Extent;
use tandem_proto::ids::{LayerIdx, Time};
use tandem_proto::keys::{ChunkKey, Fingerprint};
use tandem_proto::layout::{KvDtype, KvShape};
use tandem_proto::stored::ChunkHeader;

/// 256 bytes a chunk.
pub(crate) const SHAPE: KvShape =
    KvShape { layers: 2, kv_heads: 1, head_dim: 4, page_tokens: 4, chunk_tokens: 8, dtype: KvDtype::F16 };
pub(crate) const FINGERPRINT: Fingerprint = Fingerprint([9; 32]);
/// A tier gives a call up after this.
pub(crate) const HANG_US: u64 = 1_000_000;

/// The bytes that a chunk has wherever it is right.
pub(crate) fn bytes_of(key: &ChunkKey) -> Vec<u8> {
    let mut rng = Rng(u64::from_le_bytes(*key.0.first_chunk().unwrap()) ^ 0x5eed);
    (0..SHAPE.packed_bytes(SHAPE.chunk_tokens) / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

pub(crate) fn header_of(key: &ChunkKey) -> ChunkHeader {
    let mut header = ChunkHeader {
        key: *key,
        fingerprint: FINGERPRINT,
        shape: SHAPE,
        tokens: SHAPE.chunk_tokens,
        checksums: Vec::new(),
    };
    header.checksums = checksums(&header, &bytes_of(key));
    header
}

/// What a node computes while it scatters.
pub(crate) fn checksums(header: &ChunkHeader, bytes: &[u8]) -> Vec<u64> {
    let sum = |layer| {
        let layer = &bytes[header.layer(LayerIdx(layer))];
        layer.iter().fold(0xcbf2_9ce4_8422_2325u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        })
    };
    (0..header.shape.layers).map(sum).collect()
}

pub(crate) fn read(extent: &Extent) -> Vec<u8> {
    // SAFETY: one thread runs the whole test, and the copy is over when this returns.
    unsafe { extent.bytes() }.to_vec()
}

pub(crate) fn write(extent: &Extent, bytes: &[u8]) {
    // SAFETY: one thread runs the whole test, and no slice outlives the call that made it.
    unsafe { extent.bytes_mut() }.copy_from_slice(bytes);
}

/// How often, in a thousand, a tier does what it should not, or may.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) fail: u64,
    pub(crate) busy: u64,
    pub(crate) hang: u64,
    /// Answers with what was not asked for: another chunk, another model, too much.
    pub(crate) lie: u64,
    /// Bytes of a chunk change, in the tier and for good.
    pub(crate) rot: u64,
    /// Answers that nobody asked for.
    pub(crate) stray: u64,
}

/// What all tiers and the test see.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) now: Time,
    pub(crate) violations: Vec<String>,
    /// Who may touch the slot at an offset.
    users: BTreeMap<usize, Users>,
    /// Loads of each chunk that were not called off.
    loading: HashMap<ChunkKey, (usize, Ticket)>,
    /// Calls that are not answered, and whose they are.
    open: BTreeMap<Ticket, usize>,
    /// Loads that brought wrong bytes under a right header, by the slot's offset.
    pub(crate) rotten: HashMap<usize, ChunkKey>,
    pub(crate) most: Most,
}

/// The most calls of each kind that were open at one tier at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Most {
    pub(crate) finds: usize,
    pub(crate) loads: usize,
    pub(crate) stores: usize,
    pub(crate) removals: usize,
}

#[derive(Debug, Default)]
struct Users {
    writers: Vec<String>,
    readers: Vec<String>,
}

pub(crate) type SharedSeen = Arc<Mutex<Seen>>;

impl Seen {
    /// Somebody may write the slot from now on.
    pub(crate) fn writes(&mut self, extent: &Extent, who: String) {
        let users = self.users.entry(extent.offset()).or_default();
        if !users.writers.is_empty() || !users.readers.is_empty() {
            self.violations.push(format!("{who} writes slot {} in use: {users:?}", extent.offset()));
        }
        users.writers.push(who);
    }

    /// Somebody may read the slot from now on.
    pub(crate) fn reads(&mut self, extent: &Extent, who: String) {
        let users = self.users.entry(extent.offset()).or_default();
        if !users.writers.is_empty() {
            self.violations.push(format!("{who} reads slot {} being written: {users:?}", extent.offset()));
        }
        users.readers.push(who);
    }

    /// They touch it no more.
    pub(crate) fn leaves(&mut self, extent: &Extent, who: &str) {
        let users = self.users.entry(extent.offset()).or_default();
        let list = if users.writers.iter().any(|name| name == who) {
            &mut users.writers
        } else {
            &mut users.readers
        };
        let at = list.iter().position(|name| name == who).expect("who leaves came");
        list.swap_remove(at);
    }

    pub(crate) fn slots_in_use(&self) -> usize {
        self.users.values().filter(|users| !users.writers.is_empty() || !users.readers.is_empty()).count()
    }

    /// Loads of this chunk that are under way were called off.
    pub(crate) fn called_off(&mut self, key: &ChunkKey) {
        self.loading.remove(key);
    }

    pub(crate) fn all_called_off(&mut self) {
        self.loading.clear();
    }
}

/// What a fake tier holds, for the test to look at.
#[derive(Default)]
pub(crate) struct Shelf {
    pub(crate) chunks: BTreeMap<ChunkKey, (ChunkHeader, Vec<u8>)>,
    pub(crate) pinned: std::collections::BTreeSet<ChunkKey>,
    pub(crate) faults: Faults,
    pub(crate) open: Most,
    pub(crate) loads: u64,
}

pub(crate) type SharedShelf = Arc<Mutex<Shelf>>;

pub(crate) struct FakeTier {
    id: usize,
    name: &'static str,
    budget: usize,
    rng: Rng,
    seen: SharedSeen,
    shelf: SharedShelf,
    calls: Vec<Call>,
    /// Tickets that were answered already.
    past: Vec<Ticket>,
}

struct Call {
    ticket: Ticket,
    due: Time,
    fate: Fate,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Well,
    Fail,
    Busy,
    Lie,
}

enum What {
    Find(Arc<[ChunkKey]>),
    Store(Arc<ChunkHeader>, Extent),
    Load(ChunkKey, Extent),
    Remove(ChunkKey),
}

impl FakeTier {
    pub(crate) fn new(id: usize, budget: usize, seed: u64, seen: &SharedSeen) -> (FakeTier, SharedShelf) {
        let shelf = SharedShelf::default();
        let name = ["near", "far", "farthest"][id];
        let (seen, rng) = (Arc::clone(seen), Rng(seed));
        let tier = FakeTier {
            id,
            name,
            budget,
            rng,
            seen,
            shelf: Arc::clone(&shelf),
            calls: Vec::new(),
            past: Vec::new(),
        };
        (tier, shelf)
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap()
    }

    fn take(&mut self, ticket: Ticket, what: What) {
        let faults = self.shelf().faults;
        let now = self.seen.lock().unwrap().now;
        let per_mille = self.rng.between(0, 999);
        let slow = self.rng.between(0, 9) == 0;
        let delay = self.rng.between(0, if slow { 200_000 } else { 3_000 });
        let (fate, delay) = match per_mille {
            n if n < faults.fail => (Fate::Fail, delay),
            n if n < faults.fail + faults.busy => (Fate::Busy, 0),
            n if n < faults.fail + faults.busy + faults.hang => (Fate::Fail, HANG_US),
            n if n < faults.fail + faults.busy + faults.hang + faults.lie => (Fate::Lie, delay),
            _ => (Fate::Well, delay),
        };
        let mut seen = self.seen.lock().unwrap();
        if seen.open.insert(ticket, self.id).is_some() || self.past.contains(&ticket) {
            seen.violations.push(format!("ticket {ticket} was used twice"));
        }
        let who = format!("{} {ticket}", self.name);
        let mut shelf = self.shelf.lock().unwrap();
        match &what {
            What::Find(_) => shelf.open.finds += 1,
            What::Remove(_) => shelf.open.removals += 1,
            What::Store(_, body) => {
                shelf.open.stores += 1;
                seen.reads(body, who);
            }
            What::Load(key, body) => {
                shelf.open.loads += 1;
                shelf.loads += 1;
                seen.writes(body, who);
                write(body, &vec![0xab; body.len()]);
                if let Some(before) = seen.loading.insert(*key, (self.id, ticket)) {
                    seen.violations.push(format!("{key:?} is loaded twice: {before:?}, {ticket}"));
                }
            }
        }
        let (open, most) = (shelf.open, &mut seen.most);
        most.finds = most.finds.max(open.finds);
        most.loads = most.loads.max(open.loads);
        most.stores = most.stores.max(open.stores);
        most.removals = most.removals.max(open.removals);
        self.calls.push(Call { ticket, due: now.after_us(delay), fate, what });
    }

    fn answer(&mut self, call: Call) -> Result<Outcome, TierError> {
        let Call { ticket, fate, what, .. } = call;
        let (seen, shelf) = (Arc::clone(&self.seen), Arc::clone(&self.shelf));
        let (mut seen, mut shelf) = (seen.lock().unwrap(), shelf.lock().unwrap());
        seen.open.remove(&ticket);
        self.past.push(ticket);
        let who = format!("{} {ticket}", self.name);
        match &what {
            What::Find(_) => shelf.open.finds -= 1,
            What::Remove(_) => shelf.open.removals -= 1,
            What::Store(_, body) => {
                shelf.open.stores -= 1;
                seen.leaves(body, &who);
            }
            What::Load(key, body) => {
                shelf.open.loads -= 1;
                seen.leaves(body, &who);
                seen.rotten.remove(&body.offset());
                if seen.loading.get(key) == Some(&(self.id, ticket)) {
                    seen.loading.remove(key);
                }
            }
        }
        let tier = self.name;
        match (fate, what) {
            (Fate::Busy, _) => Err(TierError::Busy { tier, limit: 1 }),
            (Fate::Fail, What::Load(_, body)) => {
                write(&body, &vec![0xcd; body.len()]);
                Err(TierError::Failed { tier, reason: "the test says so".into() })
            }
            (Fate::Fail, _) => Err(TierError::Failed { tier, reason: "the test says so".into() }),
            (Fate::Lie, What::Find(keys)) => Ok(Outcome::Found(keys.len() + 3)),
            (Fate::Lie, What::Load(key, body)) => {
                write(&body, &vec![0xef; body.len()]);
                let mut header = header_of(&key);
                match self.rng.between(0, 4) {
                    0 => header.key.0[31] ^= 1,
                    1 => header.fingerprint.0[0] ^= 1,
                    2 => header.tokens -= 1,
                    3 => drop(header.checksums.pop()),
                    _ => return Ok(Outcome::Stored),
                }
                Ok(Outcome::Loaded(header))
            }
            (Fate::Lie, _) => Ok(Outcome::Found(1)),
            (Fate::Well, What::Find(keys)) => {
                Ok(Outcome::Found(keys.iter().take_while(|key| shelf.chunks.contains_key(key)).count()))
            }
            (Fate::Well, What::Remove(key)) => {
                let gone = shelf.chunks.remove(&key);
                gone.map(|_| Outcome::Removed).ok_or(TierError::Absent { tier })
            }
            (Fate::Well, What::Load(key, body)) => {
                let rots = self.rng.between(0, 999) < shelf.faults.rot;
                let Some((header, bytes)) = shelf.chunks.get_mut(&key) else {
                    return Err(TierError::Absent { tier });
                };
                if rots {
                    bytes[self.rng.between(0, 255) as usize] ^= 1 << self.rng.between(0, 7);
                }
                if checksums(header, bytes) != header.checksums {
                    seen.rotten.insert(body.offset(), key);
                }
                write(&body, bytes);
                Ok(Outcome::Loaded(header.clone()))
            }
            (Fate::Well, What::Store(header, body)) => {
                let bytes = read(&body);
                if checksums(&header, &bytes) != header.checksums || bytes != bytes_of(&header.key) {
                    seen.violations
                        .push(format!("{who} was given other bytes than those of {:?}", header.key));
                }
                if !shelf.chunks.contains_key(&header.key) && shelf.chunks.len() >= self.budget {
                    let goes = shelf.chunks.keys().find(|key| !shelf.pinned.contains(key)).copied();
                    let Some(goes) = goes else {
                        return Err(TierError::Full { tier, bytes: 256, budget: self.budget as u64 * 256 });
                    };
                    shelf.chunks.remove(&goes);
                }
                shelf.chunks.entry(header.key).or_insert_with(|| ((*header).clone(), bytes));
                Ok(Outcome::Stored)
            }
        }
    }

    /// Answers what nobody asked: what was answered, what another tier was asked, or a number made up.
    fn stray(&mut self, answers: &mut Vec<(Ticket, Result<Outcome, TierError>)>) {
        let ticket = match self.rng.between(0, 2) {
            0 => self.past.last().copied(),
            1 => {
                let seen = self.seen.lock().unwrap();
                seen.open.iter().find(|(_, tier)| **tier != self.id).map(|(ticket, _)| *ticket)
            }
            _ => Some(Ticket(u64::MAX)),
        };
        answers.extend(ticket.map(|ticket| (ticket, Ok(Outcome::Stored))));
    }
}

impl Tier for FakeTier {
    fn name(&self) -> &'static str {
        self.name
    }

    fn find(&mut self, ticket: Ticket, keys: Arc<[ChunkKey]>) {
        self.take(ticket, What::Find(keys));
    }

    fn store(&mut self, ticket: Ticket, header: Arc<ChunkHeader>, body: Extent) {
        self.take(ticket, What::Store(header, body));
    }

    fn load(&mut self, ticket: Ticket, key: ChunkKey, body: Extent) {
        self.take(ticket, What::Load(key, body));
    }

    fn remove(&mut self, ticket: Ticket, key: ChunkKey) {
        self.take(ticket, What::Remove(key));
    }

    fn pin(&mut self, key: ChunkKey, pinned: bool) {
        let mut shelf = self.shelf();
        let _ = if pinned { shelf.pinned.insert(key) } else { shelf.pinned.remove(&key) };
    }

    fn poll(&mut self, answers: &mut Vec<(Ticket, Result<Outcome, TierError>)>) {
        let now = self.seen.lock().unwrap().now;
        let mut due: Vec<Call> = self.calls.extract_if(.., |call| call.due <= now).collect();
        while !due.is_empty() {
            let call = due.swap_remove(self.rng.between(0, due.len() as u64 - 1) as usize);
            answers.push((call.ticket, self.answer(call)));
        }
        let stray = self.shelf().faults.stray;
        if self.rng.between(0, 999) < stray {
            self.stray(answers);
        }
    }

    fn usage(&self) -> Usage {
        let chunks = self.shelf().chunks.len() as u64;
        let under_way = self.calls.len() as u64;
        Usage { chunks, bytes: chunks * 256, budget: self.budget as u64 * 256, under_way, ..Usage::default() }
    }
}
