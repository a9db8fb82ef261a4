//! What every implementation of [`Tier`] must do, as a test that any of them can run.
//!
//! What takes a fault to see (a place that hangs, lies or is killed) is in the tests of each tier.

use super::{Outcome, Ticket, Tier, TierError, Usage, Wake};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::keys::{ChunkKey, Fingerprint};
use tandem_proto::layout::{KvDtype, KvShape};
use tandem_proto::stored::ChunkHeader;

/// The dimensions of the chunks that the contract stores: 12 KiB each, when they are whole.
pub const SHAPE: KvShape =
    KvShape { layers: 3, kv_heads: 2, head_dim: 32, page_tokens: 4, chunk_tokens: 16, dtype: KvDtype::F16 };
/// Any call is answered in this time, on a machine that is busy with other things too.
const PATIENCE: Duration = Duration::from_secs(30);
/// Calls that the contract has under way at once where it does not test what happens beyond: a tier must take them.
const TOGETHER: usize = 8;
/// Chunks that a tier under test has room for, at least; at most it is [`MOST`].
const LEAST: u64 = 8;
/// Chunks that are stored to fill a tier under test for certain.
const MOST: u64 = 64;

/// Checks a tier against all points of its contract. `open` makes one that is empty, is nobody else's, and whose budget,
/// if it has one, has room for 8 to 60 chunks of [`SHAPE`]; it is called once for each point.
///
/// # Panics
/// When the tier breaks the contract.
pub fn check(open: &dyn Fn(Wake) -> Box<dyn Tier>) {
    whole_chunks_come_back_as_they_were(&mut Caller::new(open));
    what_is_there_is_kept_as_it_is(&mut Caller::new(open));
    only_the_first_keys_of_a_run_are_found(&mut Caller::new(open));
    memory_is_let_go_with_the_answer(&mut Caller::new(open));
    the_budget_holds_and_pins_too(&mut Caller::new(open));
    calls_beyond_the_queue_are_told_so(&mut Caller::new(open));
    what_is_not_there_is_absent(&mut Caller::new(open));
    any_order_ends_well(&mut Caller::new(open));
}

/// A chunk as the contract makes them: the bytes follow from the number.
#[must_use]
pub fn chunk(number: u64, tokens: u32) -> (ChunkHeader, Vec<u8>) {
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut key = [0; 32];
    key.chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&next().to_le_bytes()));
    let checksums = (0..SHAPE.layers).map(|_| next()).collect();
    let body = (0..SHAPE.packed_bytes(tokens) / 8).flat_map(|_| next().to_le_bytes()).collect();
    let fingerprint = Fingerprint([7; 32]);
    (ChunkHeader { key: ChunkKey(key), fingerprint, shape: SHAPE, tokens, checksums }, body)
}

/// A whole chunk of [`SHAPE`], by its number.
#[must_use]
pub fn whole(number: u64) -> (ChunkHeader, Vec<u8>) {
    chunk(number, SHAPE.chunk_tokens)
}

/// Someone who calls a tier, and holds it to answering every call once.
pub struct Caller {
    tier: Box<dyn Tier>,
    woken: Arc<(Mutex<bool>, Condvar)>,
    tickets: u64,
    waiting: HashSet<Ticket>,
    answers: HashMap<Ticket, Result<Outcome, TierError>>,
}

impl Caller {
    /// Calls the tier that `open` makes.
    pub fn new(open: &dyn Fn(Wake) -> Box<dyn Tier>) -> Caller {
        let woken = Arc::new((Mutex::new(false), Condvar::new()));
        let wake: Wake = Arc::new({
            let woken = Arc::clone(&woken);
            move || {
                *woken.0.lock().expect("nobody panics with it") = true;
                woken.1.notify_one();
            }
        });
        let (waiting, answers) = (HashSet::new(), HashMap::new());
        Caller { tier: open(wake), woken, tickets: 0, waiting, answers }
    }

    /// Begins a call.
    pub fn begin(&mut self, call: impl FnOnce(&mut dyn Tier, Ticket)) -> Ticket {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        self.waiting.insert(ticket);
        call(&mut *self.tier, ticket);
        ticket
    }

    /// The answer to a call, which is waited for: the tier must wake its caller when there is one.
    pub fn answer(&mut self, ticket: Ticket) -> Result<Outcome, TierError> {
        let until = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if let Some(answer) = self.answers.remove(&ticket) {
                return answer;
            }
            {
                let mut woken = self.woken.0.lock().expect("nobody panics with it");
                while !*woken {
                    let left = until.saturating_duration_since(Instant::now());
                    assert!(!left.is_zero(), "{}: call {ticket} is not answered", self.tier.name());
                    woken = self.woken.1.wait_timeout(woken, left).expect("nobody panics with it").0;
                }
                *woken = false;
            }
        }
    }

    fn poll(&mut self) {
        let mut answers = Vec::new();
        self.tier.poll(&mut answers);
        for (ticket, answer) in answers {
            assert!(self.waiting.remove(&ticket), "call {ticket} is answered twice, or was never made");
            self.answers.insert(ticket, answer);
        }
    }

    /// Stores a chunk from memory that nobody else has.
    pub fn begin_store(&mut self, header: &ChunkHeader, body: &[u8]) -> (Ticket, Extent) {
        let extent = memory(body.len());
        fill(&extent, body);
        let (header, given) = (Arc::new(header.clone()), extent.clone());
        (self.begin(|tier, ticket| tier.store(ticket, header, given)), extent)
    }

    /// As [`Caller::begin_store`], with its answer.
    pub fn store(&mut self, (header, body): &(ChunkHeader, Vec<u8>)) -> Result<Outcome, TierError> {
        let (ticket, _memory) = self.begin_store(header, body);
        self.answer(ticket)
    }

    /// Loads a chunk of this many bytes.
    ///
    /// # Errors
    /// As the tier says.
    pub fn load(&mut self, key: ChunkKey, bytes: usize) -> Result<(ChunkHeader, Vec<u8>), TierError> {
        let extent = memory(bytes);
        let given = extent.clone();
        let ticket = self.begin(|tier, ticket| tier.load(ticket, key, given));
        match self.answer(ticket)? {
            Outcome::Loaded(header) => Ok((header, read(&extent))),
            other => panic!("a load ends with {other:?}"),
        }
    }

    /// How many of the keys, from the first on, are found.
    pub fn found(&mut self, keys: &[ChunkKey]) -> usize {
        let ticket = self.begin(|tier, ticket| tier.find(ticket, keys.into()));
        match self.answer(ticket) {
            Ok(Outcome::Found(found)) => found,
            other => panic!("a find ends with {other:?}"),
        }
    }

    /// Removes a chunk.
    pub fn remove(&mut self, key: ChunkKey) -> Result<Outcome, TierError> {
        let ticket = self.begin(|tier, ticket| tier.remove(ticket, key));
        self.answer(ticket)
    }

    /// Pins a chunk, or lets it go.
    pub fn pin(&mut self, key: ChunkKey, pinned: bool) {
        self.tier.pin(key, pinned);
    }

    /// Whether the tier has a budget, and knows what it holds. One whose place others fill too does not.
    pub fn keeps_books(&mut self) -> bool {
        self.usage().budget > 0
    }

    /// What the tier holds.
    pub fn usage(&mut self) -> Usage {
        let usage = self.tier.usage();
        assert!(usage.bytes <= usage.budget, "{usage:?}");
        usage
    }

    /// The chunk is found and as it was stored, or absent. Whether it is there.
    pub fn intact(&mut self, chunk: &(ChunkHeader, Vec<u8>)) -> bool {
        match self.load(chunk.0.key, chunk.1.len()) {
            Ok(loaded) => {
                assert!(loaded == *chunk, "chunk {} comes back as another", chunk.0.key);
                true
            }
            Err(TierError::Absent { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Memory that begins at a page.
#[must_use]
pub fn memory(bytes: usize) -> Extent {
    HostRegion::private(bytes).and_then(|region| region.extent(0..bytes)).expect("there is memory")
}

/// Writes memory that no call has.
pub fn fill(extent: &Extent, bytes: &[u8]) {
    // SAFETY: the test made this memory, and no call that names it is under way.
    unsafe { extent.bytes_mut() }.copy_from_slice(bytes);
}

/// Reads memory that no call has.
#[must_use]
pub fn read(extent: &Extent) -> Vec<u8> {
    // SAFETY: as above.
    unsafe { extent.bytes() }.to_vec()
}

fn whole_chunks_come_back_as_they_were(caller: &mut Caller) {
    for number in 0..4 {
        let tokens = if number == 3 { 5 } else { SHAPE.chunk_tokens };
        let chunk = chunk(number, tokens);
        assert_eq!(caller.found(&[chunk.0.key]), 0, "an empty tier");
        assert_eq!(caller.store(&chunk), Ok(Outcome::Stored));
        assert_eq!(caller.found(&[chunk.0.key]), 1);
        assert!(caller.intact(&chunk));
        assert!(!caller.keeps_books() || caller.usage().chunks == number + 1);
    }
    for number in 0..3 {
        assert!(caller.intact(&whole(number)), "others do not change it");
    }
}

fn what_is_there_is_kept_as_it_is(caller: &mut Caller) {
    let first = whole(1);
    let mut second = whole(2);
    second.0.key = first.0.key;
    assert_eq!(caller.store(&first), Ok(Outcome::Stored));
    assert_eq!(caller.store(&second), Ok(Outcome::Stored));
    assert!(caller.intact(&first));
    assert_eq!(caller.remove(first.0.key), Ok(Outcome::Removed));
    assert!(!caller.intact(&first));
    assert_eq!(caller.store(&second), Ok(Outcome::Stored));
    assert!(caller.intact(&second), "what was removed leaves nothing behind");
    // Two at once: either, and whole.
    assert_eq!(caller.remove(first.0.key), Ok(Outcome::Removed));
    let stores = [caller.begin_store(&first.0, &first.1), caller.begin_store(&second.0, &second.1)];
    for (ticket, _memory) in stores {
        assert_eq!(caller.answer(ticket), Ok(Outcome::Stored));
    }
    let loaded = caller.load(first.0.key, first.1.len());
    assert!(loaded == Ok(first) || loaded == Ok(second));
}

fn only_the_first_keys_of_a_run_are_found(caller: &mut Caller) {
    let chunks: Vec<_> = (0..5).map(whole).collect();
    let keys: Vec<_> = chunks.iter().map(|(header, _)| header.key).collect();
    for index in [0, 1, 3, 4] {
        assert_eq!(caller.store(&chunks[index]), Ok(Outcome::Stored));
    }
    assert_eq!(caller.found(&[]), 0);
    assert_eq!(caller.found(&keys), 2);
    assert_eq!(caller.found(&keys[3..]), 2);
    assert_eq!(caller.found(&keys[2..]), 0);
    assert_eq!(caller.store(&chunks[2]), Ok(Outcome::Stored));
    assert_eq!(caller.found(&keys), 5);
    assert_eq!(caller.remove(keys[1]), Ok(Outcome::Removed));
    assert_eq!(caller.found(&keys), 1);
}

fn memory_is_let_go_with_the_answer(caller: &mut Caller) {
    let chunks: Vec<_> = (0..TOGETHER as u64).map(whole).collect();
    let stores: Vec<_> = chunks.iter().map(|(header, body)| caller.begin_store(header, body)).collect();
    for (ticket, memory) in stores {
        assert_eq!(caller.answer(ticket), Ok(Outcome::Stored));
        fill(&memory, &vec![0xEE; memory.len()]);
    }
    let loads: Vec<_> = chunks
        .iter()
        .map(|chunk| {
            let extent = memory(chunk.1.len());
            let (key, given) = (chunk.0.key, extent.clone());
            (caller.begin(|tier, ticket| tier.load(ticket, key, given)), chunk, extent)
        })
        .collect();
    let mut done = Vec::new();
    for (ticket, chunk, extent) in loads {
        assert_eq!(caller.answer(ticket), Ok(Outcome::Loaded(chunk.0.clone())));
        assert!(read(&extent) == chunk.1, "a source that changed after its store was answered");
        fill(&extent, &vec![0xDD; extent.len()]);
        done.push(extent);
    }
    assert!(caller.intact(&chunks[0]));
    assert!(done.iter().all(|extent| read(extent).iter().all(|byte| *byte == 0xDD)));
}

fn the_budget_holds_and_pins_too(caller: &mut Caller) {
    if !caller.keeps_books() {
        return;
    }
    let pinned = whole(0);
    assert_eq!(caller.store(&pinned), Ok(Outcome::Stored));
    caller.pin(pinned.0.key, true);
    for number in 1..MOST {
        assert_eq!(caller.store(&whole(number)), Ok(Outcome::Stored), "another goes for it");
        caller.usage();
    }
    assert!(caller.intact(&pinned));
    let usage = caller.usage();
    assert!((LEAST..MOST).contains(&usage.chunks), "{usage:?}");
    assert_eq!(usage.chunks + usage.evicted, MOST, "{usage:?}");
    let left: Vec<_> = (0..MOST).map(whole).filter(|chunk| caller.found(&[chunk.0.key]) == 1).collect();
    assert_eq!(left.len() as u64, usage.chunks);
    for chunk in &left {
        assert!(caller.intact(chunk));
        caller.pin(chunk.0.key, true);
    }
    let refused = caller.store(&whole(MOST));
    assert!(matches!(refused, Err(TierError::Full { .. })), "all is pinned: {refused:?}");
    assert!(left.iter().all(|chunk| caller.intact(chunk)));
    caller.pin(left[1].0.key, false);
    assert_eq!(caller.store(&whole(MOST)), Ok(Outcome::Stored));
    assert!(!caller.intact(&left[1]), "the only one that may go");
    assert!(caller.intact(&whole(MOST)) && caller.intact(&left[0]));
}

fn calls_beyond_the_queue_are_told_so(caller: &mut Caller) {
    let chunk = whole(0);
    assert_eq!(caller.store(&chunk), Ok(Outcome::Stored));
    let memory = memory(chunk.1.len());
    // What is loaded is always the same, so one place is enough.
    let calls: Vec<_> = (0..20_000)
        .map(|_| {
            let (key, given) = (chunk.0.key, memory.clone());
            caller.begin(|tier, ticket| tier.load(ticket, key, given))
        })
        .collect();
    let mut busy = 0;
    for ticket in calls {
        match caller.answer(ticket) {
            Ok(Outcome::Loaded(header)) => assert_eq!(header, chunk.0),
            Err(TierError::Busy { .. }) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(busy > 0, "20,000 calls at once are within its queue");
    assert_eq!(caller.usage().under_way, 0);
    assert!(caller.intact(&chunk));
}

fn what_is_not_there_is_absent(caller: &mut Caller) {
    let chunk = whole(0);
    assert!(!caller.intact(&chunk));
    assert_eq!(caller.remove(chunk.0.key), Ok(Outcome::Removed), "it is not there, as was asked");
    assert_eq!(caller.store(&chunk), Ok(Outcome::Stored));
    for wrong in [chunk.1.len() - 4096, chunk.1.len() + 4096] {
        let refused = caller.load(chunk.0.key, wrong);
        assert!(matches!(refused, Err(TierError::Failed { .. })), "{refused:?}");
        let (ticket, _memory) = caller.begin_store(&whole(1).0, &vec![0; wrong]);
        let refused = caller.answer(ticket);
        assert!(matches!(refused, Err(TierError::Failed { .. })), "{refused:?}");
    }
    assert_eq!(caller.found(&[whole(1).0.key]), 0);
    assert!(caller.intact(&chunk));
}

/// Calls of all kinds at once, so that chunks go and come while others are read.
fn any_order_ends_well(caller: &mut Caller) {
    enum Then {
        Nothing,
        Compare(u64, Extent),
    }
    let mut state = 0x5EED_u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut under_way: Vec<(Ticket, Then)> = Vec::new();
    for _ in 0..2000 {
        if under_way.len() == TOGETHER {
            let (ticket, then) = under_way.swap_remove(next(TOGETHER as u64) as usize);
            let answer = caller.answer(ticket);
            match (then, answer) {
                (Then::Compare(number, extent), Ok(Outcome::Loaded(header))) => {
                    let (expected, body) = whole(number);
                    assert!(header == expected && read(&extent) == body, "chunk {number} is another");
                }
                (Then::Compare(..), Err(TierError::Absent { .. }))
                | (_, Ok(_) | Err(TierError::Full { .. })) => {}
                (_, Err(error)) => panic!("{error}"),
            }
            caller.usage();
        }
        let number = next(MOST + MOST / 2);
        let (header, body) = whole(number);
        let key = header.key;
        under_way.push(match next(8) {
            0..3 => (caller.begin_store(&header, &body).0, Then::Nothing),
            3..6 => {
                let extent = memory(body.len());
                let given = extent.clone();
                let ticket = caller.begin(|tier, ticket| tier.load(ticket, key, given));
                (ticket, Then::Compare(number, extent))
            }
            6 => (caller.begin(|tier, ticket| tier.remove(ticket, key)), Then::Nothing),
            _ => (caller.begin(|tier, ticket| tier.find(ticket, [key].into())), Then::Nothing),
        });
    }
    for (ticket, _) in under_way {
        let _ = caller.answer(ticket);
    }
    assert_eq!(caller.usage().under_way, 0);
}
