//! What the disk tier does when: which entry a chunk goes to, what is written in which order, who goes, when a call is
//! given up. It never waits, and knows the time from whoever calls it.

use super::buffers::{self, Copies, Scratch};
use super::io::{Done, Io, Token, Transfer};
use super::lock::LOCK_BYTES;
use super::segment::{Class, Files, Place, Record, Stamp, encode_record, places, record_at};
use crate::policy::{EntryId, Policy, PolicyKind, name};
use crate::tier::{Outcome, Ticket, TierError, Usage};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tandem_memory::Extent;
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;

/// The tier's name.
pub const NAME: &str = "disk";
/// The token of the making or deleting of a segment; at most one is under way.
const SEGMENT: Token = Token::MAX - 1;
/// A segment has this part of the budget, so that little goes at once when another shape of chunks needs room.
const SEGMENTS: u64 = 16;
/// No segment is larger, so that a disk fills as it is needed.
const SEGMENT_BYTES: u64 = 16 << 30;
/// After the file system had no room for another segment, it is not asked again for so long.
const NO_ROOM: Duration = Duration::from_secs(60);
/// Entries that are looked at for their age at once, and how often.
const SWEEP: usize = 4096;
const SWEEP_EVERY: Duration = Duration::from_millis(500);
/// Entries that may wait to be emptied before the sweep goes on.
const SWEPT: usize = 64;

/// What the tier goes by.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) dir: PathBuf,
    pub(super) budget: u64,
    pub(super) ttl_s: Option<u32>,
    pub(super) depth: usize,
    pub(super) deadline: Duration,
    pub(super) policy: PolicyKind,
}

/// The time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    /// Since some moment in this process.
    pub(super) since: Duration,
    /// Since 1970.
    pub(super) unix_s: u32,
}

/// A call of the tier.
pub(super) enum Call {
    Find { ticket: Ticket, keys: Arc<[ChunkKey]> },
    Store { ticket: Ticket, header: Arc<ChunkHeader>, body: Extent },
    Load { ticket: Ticket, key: ChunkKey, body: Extent },
    Remove { ticket: Ticket, key: ChunkKey },
    Pin { key: ChunkKey, pinned: bool },
}

/// An answer to one.
pub(super) type Answer = (Ticket, Result<Outcome, TierError>);

/// All of the tier but its thread.
pub(super) struct Core {
    settings: Settings,
    io: Box<dyn Io>,
    answers: Vec<Answer>,
    /// All entries of all segments, each segment's together. The place in it is the id that policies know.
    slots: Vec<Slot>,
    /// Ids that belong to no segment.
    unused: Vec<Range<u32>>,
    segments: HashMap<u32, Segment>,
    shelves: HashMap<Class, Shelf>,
    /// Where the chunks are that can be found: their slots are [`State::Stored`], and no others are.
    found: HashMap<ChunkKey, u32>,
    /// The operations that store chunks.
    filling: HashMap<ChunkKey, u64>,
    loads: VecDeque<Load>,
    stores: VecDeque<Store>,
    /// Entries that nothing finds any more, to be emptied when nobody reads them.
    clears: VecDeque<Clear>,
    ops: HashMap<u64, Op>,
    next_op: u64,
    for_loads: Vec<Scratch>,
    for_stores: Vec<Scratch>,
    copies: Copies,
    blank: Extent,
    segment_work: Option<SegmentWork>,
    no_room_until: Duration,
    /// Bytes of all files, those that are being made or deleted too. Never more than the budget.
    bytes: u64,
    /// Counts uses, for segments.
    clock: u64,
    sequence: u64,
    next_number: u32,
    sweep_from: usize,
    sweep_at: Duration,
    /// It was said that chunks go through the system's cache.
    told_buffered: bool,
    evicted: u64,
    expired: u64,
    damaged: u64,
}

#[derive(Clone, Debug)]
struct Slot {
    record: Record,
    segment: u32,
    state: State,
    /// Loads that read it.
    readers: u32,
    pinned: bool,
    /// Its header is blank on disk, so new bytes may be written behind it.
    blank: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    /// An operation writes a chunk to it.
    Filling,
    Stored,
    /// No longer found; being emptied, or waiting for it.
    Leaving,
    /// It cannot be written.
    Lost,
}

struct Segment {
    place: Place,
    slots: Range<u32>,
    files: Files,
    bytes: u64,
    /// The clock when one of its chunks was last used.
    last_use: u64,
    /// Operations and clears that concern it.
    busy: u32,
    pinned: u32,
}

/// What there is of a class.
struct Shelf {
    policy: Box<dyn Policy>,
    free: VecDeque<u32>,
    segments: u32,
    /// As the segments'.
    busy: u32,
}

struct Load {
    ticket: Ticket,
    asked: Duration,
    key: ChunkKey,
    body: Extent,
}

struct Store {
    ticket: Ticket,
    asked: Duration,
    header: Arc<ChunkHeader>,
    body: Extent,
    encoded: Vec<u8>,
    class: Class,
    after: After,
}

/// What was asked of a chunk while it was not stored yet.
#[derive(Default)]
struct After {
    pinned: bool,
    removes: Vec<Ticket>,
}

struct Clear {
    slot: u32,
    ticket: Option<Ticket>,
    asked: Duration,
}

struct Op {
    slot: u32,
    step: Step,
    scratch: Scratch,
    asked: Duration,
    /// Whoever waits for it: nobody, once they were told that it takes too long.
    tickets: Vec<Ticket>,
    /// It is past its deadline, and whatever could be done was.
    late: bool,
    kind: Kind,
}

enum Kind {
    Load { key: ChunkKey, body: Extent, copy: Option<Extent> },
    Store { key: ChunkKey, encoded: Vec<u8>, body: Option<(Extent, Option<Extent>)>, after: After },
    Clear,
}

/// What an operation waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// A load: header and body.
    Read,
    /// A store, in this order: the entry's record says that it is empty,
    Unlist,
    /// its header is blank (a clear ends here),
    Blank,
    /// the body is written,
    Body,
    /// the header,
    Header,
    /// and the record.
    List,
}

enum SegmentWork {
    Make { place: Place, entries: u32, made: Arc<Mutex<Option<Files>>> },
    Delete { place: Place, bytes: u64 },
}

enum Room {
    Slot(u32),
    Later,
    Full,
}

/// How a directory was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Opened {
    pub(super) segments: usize,
    /// Entries whose headers were read, since their index was no help.
    pub(super) scanned: u64,
}

impl Core {
    /// What the directory holds.
    pub(super) fn open(settings: Settings, io: Box<dyn Io>) -> io::Result<(Core, Opened)> {
        let memory = || {
            let scratch = Scratch::cut(settings.depth);
            Ok((scratch?, Scratch::cut(settings.depth)?, buffers::blank()?))
        };
        let (for_loads, for_stores, blank) =
            memory().map_err(|error: tandem_memory::RegionError| io::Error::other(error))?;
        let mut core = Core {
            io,
            answers: Vec::new(),
            slots: Vec::new(),
            unused: Vec::new(),
            segments: HashMap::new(),
            shelves: HashMap::new(),
            found: HashMap::new(),
            filling: HashMap::new(),
            loads: VecDeque::new(),
            stores: VecDeque::new(),
            clears: VecDeque::new(),
            ops: HashMap::new(),
            next_op: 0,
            for_loads,
            for_stores,
            copies: Copies::default(),
            blank,
            segment_work: None,
            no_room_until: Duration::ZERO,
            bytes: LOCK_BYTES,
            clock: 0,
            sequence: 0,
            next_number: 0,
            sweep_from: 0,
            sweep_at: Duration::ZERO,
            told_buffered: false,
            evicted: 0,
            expired: 0,
            damaged: 0,
            settings,
        };
        let opened = core.recover()?;
        Ok((core, opened))
    }

    fn recover(&mut self) -> io::Result<Opened> {
        let mut opened = Opened::default();
        let mut segments = Vec::new();
        for place in places(&self.settings.dir)? {
            self.next_number = self.next_number.max(place.number + 1);
            let recovered = place.recover()?;
            let last = recovered.records.iter().flatten().map(|record| record.stamp.sequence).max();
            let bytes = place.bytes()?;
            self.bytes += bytes;
            opened.scanned += u64::from(recovered.scanned);
            segments.push((last, place, recovered, bytes));
        }
        // Those with the latest chunks first.
        segments.sort_by_key(|(last, ..)| std::cmp::Reverse(*last));
        while self.bytes > self.settings.budget || segments.last().is_some_and(|(last, ..)| last.is_none()) {
            let Some((_, place, recovered, bytes)) = segments.pop() else { break };
            drop(recovered);
            place.delete()?;
            self.bytes -= bytes;
        }
        opened.segments = segments.len();
        let mut stored = Vec::new();
        for (last, place, recovered, bytes) in segments {
            let (number, class) = (place.number, place.class);
            self.sequence = self.sequence.max(last.unwrap_or(0));
            let slots =
                self.add_segment(place, recovered.files, recovered.records.len() as u32, bytes, false);
            for (slot, record) in slots.zip(recovered.records) {
                match record {
                    Some(record) if record.body_bytes <= class.body_bytes => {
                        self.slots[slot as usize].record = record;
                        stored.push((record.stamp.sequence, number, slot));
                    }
                    _ => self.shelf(class).free.push_back(slot),
                }
            }
        }
        self.found.reserve(stored.len());
        // The latest first: of two entries with one key it stays.
        stored.sort_unstable_by_key(|(sequence, ..)| std::cmp::Reverse(*sequence));
        stored.retain(|&(_, number, slot)| {
            let key = self.slots[slot as usize].record.key;
            if self.found.contains_key(&key) {
                self.leave(slot, None, Duration::ZERO);
                return false;
            }
            self.found.insert(key, slot);
            let segment = self.segments.get_mut(&number).expect("it was added");
            segment.last_use = segment.last_use.max(self.slots[slot as usize].record.stamp.sequence);
            true
        });
        for &(_, number, slot) in stored.iter().rev() {
            let class = self.segments[&number].place.class;
            self.slots[slot as usize].state = State::Stored;
            let name = name(&self.slots[slot as usize].record.key);
            self.shelf(class).policy.insert(EntryId(slot), name);
        }
        self.clock = self.sequence + 1;
        Ok(opened)
    }

    /// Takes a call in.
    pub(super) fn call(&mut self, now: Now, call: Call) {
        let asked = now.since;
        match call {
            Call::Find { ticket, keys } => {
                let found = keys.iter().take_while(|key| self.fresh(now, key).is_some()).count();
                self.answers.push((ticket, Ok(Outcome::Found(found))));
            }
            Call::Load { ticket, key, body } => self.loads.push_back(Load { ticket, asked, key, body }),
            Call::Store { ticket, header, body } => {
                if let Err(error) = header.shape.validate() {
                    return self.fail(ticket, format!("chunk {}: {error}", header.key));
                }
                if header.body_bytes() != body.len() {
                    return self.fail(ticket, wrong_length(&header.key, header.body_bytes(), body.len()));
                }
                let encoded = header.encode();
                let class = Class::of(&header, encoded.len());
                if class.header_bytes as usize > buffers::HEADER_ROOM {
                    return self.fail(ticket, format!("chunk {}: its header is too long", header.key));
                }
                let after = After::default();
                self.stores.push_back(Store { ticket, asked, header, body, encoded, class, after });
            }
            Call::Remove { ticket, key } => {
                if let Some(slot) = self.found.get(&key).copied() {
                    self.forget(slot, Some(ticket), asked);
                } else if let Some(after) = self.after(&key) {
                    after.removes.push(ticket);
                } else {
                    self.answers.push((ticket, Ok(Outcome::Removed)));
                }
            }
            Call::Pin { key, pinned } => {
                if let Some(slot) = self.found.get(&key).copied() {
                    self.pin(slot, pinned);
                } else if let Some(after) = self.after(&key) {
                    after.pinned = pinned;
                }
            }
        }
    }

    /// What is to be done with a chunk when it is stored, if it is to be.
    fn after(&mut self, key: &ChunkKey) -> Option<&mut After> {
        if let Some(op) = self.filling.get(key) {
            let Kind::Store { after, .. } = &mut self.ops.get_mut(op)?.kind else { return None };
            return Some(after);
        }
        let waiting = self.stores.iter_mut().find(|store| store.header.key == *key)?;
        Some(&mut waiting.after)
    }

    /// Goes on with everything that can go on.
    pub(super) fn run(&mut self, now: Now) {
        let mut done = Vec::new();
        self.io.reap(&mut done);
        for (token, result) in done {
            self.done(now, (token, result));
        }
        self.give_up(now);
        self.sweep(now);
        self.begin_clears();
        self.begin_loads(now);
        self.begin_stores(now);
        self.io.flush();
    }

    /// Moves what was answered.
    pub(super) fn answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// When [`Core::run`] has something to do although nothing has happened.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        let ops = self.ops.values().filter(|op| !op.late).map(|op| op.asked);
        let waiting =
            [self.loads.front().map(|load| load.asked), self.stores.front().map(|store| store.asked)];
        let asked =
            ops.chain(waiting.into_iter().flatten()).chain(self.clears.iter().map(|clear| clear.asked));
        let late = asked.min().map(|asked| asked + self.settings.deadline);
        let sweep = self.settings.ttl_s.map(|_| self.sweep_at);
        late.into_iter().chain(sweep).min()
    }

    /// Drops what has not begun.
    pub(super) fn close(&mut self) {
        self.loads.clear();
        self.stores.clear();
    }

    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.ops.is_empty() && self.clears.is_empty() && self.segment_work.is_none()
    }

    /// What it holds and has counted. Calls are counted where they are made.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            chunks: self.found.len() as u64,
            bytes: self.bytes,
            budget: self.settings.budget,
            under_way: 0,
            evicted: self.evicted,
            expired: self.expired,
            damaged: self.damaged,
        }
    }

    fn fail(&mut self, ticket: Ticket, reason: String) {
        self.answers.push((ticket, Err(TierError::Failed { tier: NAME, reason })));
    }

    fn absent(&mut self, ticket: Ticket) {
        self.answers.push((ticket, Err(TierError::Absent { tier: NAME })));
    }

    fn shelf(&mut self, class: Class) -> &mut Shelf {
        self.shelves.get_mut(&class).expect("a class has a shelf while it has segments")
    }

    /// Where a chunk is, if it is there and not too old.
    fn fresh(&self, now: Now, key: &ChunkKey) -> Option<u32> {
        let slot = *self.found.get(key)?;
        (!self.too_old(now, &self.slots[slot as usize])).then_some(slot)
    }

    fn too_old(&self, now: Now, slot: &Slot) -> bool {
        let age_s = now.unix_s.saturating_sub(slot.record.stamp.at_s);
        !slot.pinned && self.settings.ttl_s.is_some_and(|ttl_s| age_s >= ttl_s)
    }

    fn sweep(&mut self, now: Now) {
        if self.settings.ttl_s.is_none() || now.since < self.sweep_at {
            return;
        }
        self.sweep_at = now.since + SWEEP_EVERY;
        for _ in 0..SWEEP.min(self.slots.len()) {
            if self.clears.len() >= SWEPT {
                break;
            }
            self.sweep_from = (self.sweep_from + 1) % self.slots.len();
            let slot = &self.slots[self.sweep_from];
            if slot.state == State::Stored && self.too_old(now, slot) {
                self.expired += 1;
                self.forget(self.sweep_from as u32, None, now.since);
            }
        }
    }

    fn pin(&mut self, slot: u32, pinned: bool) {
        let entry = &mut self.slots[slot as usize];
        if entry.pinned == pinned {
            return;
        }
        entry.pinned = pinned;
        let (number, read) = (entry.segment, entry.readers > 0);
        let segment = self.segments.get_mut(&number).expect("a slot has a segment");
        segment.pinned = if pinned { segment.pinned + 1 } else { segment.pinned - 1 };
        let class = segment.place.class;
        if !read {
            self.shelf(class).policy.shield(EntryId(slot), pinned);
        }
    }

    /// Takes a chunk from those that are found, and has its entry emptied.
    fn forget(&mut self, slot: u32, ticket: Option<Ticket>, asked: Duration) {
        self.pin(slot, false);
        let entry = &self.slots[slot as usize];
        self.found.remove(&entry.record.key);
        let class = self.segments[&entry.segment].place.class;
        self.shelf(class).policy.remove(EntryId(slot));
        self.leave(slot, ticket, asked);
    }

    /// Has an entry emptied that nothing finds.
    fn leave(&mut self, slot: u32, ticket: Option<Ticket>, asked: Duration) {
        self.slots[slot as usize].state = State::Leaving;
        self.busy(slot);
        self.clears.push_back(Clear { slot, ticket, asked });
    }

    fn busy(&mut self, slot: u32) {
        let number = self.slots[slot as usize].segment;
        let segment = self.segments.get_mut(&number).expect("a slot has a segment");
        segment.busy += 1;
        let class = segment.place.class;
        self.shelf(class).busy += 1;
    }

    fn idle(&mut self, slot: u32) {
        let number = self.slots[slot as usize].segment;
        let segment = self.segments.get_mut(&number).expect("a slot has a segment");
        segment.busy -= 1;
        let class = segment.place.class;
        self.shelf(class).busy -= 1;
    }

    fn begin_clears(&mut self) {
        for _ in 0..self.clears.len() {
            let Some(clear) = self.clears.pop_front() else { return };
            if self.slots[clear.slot as usize].readers > 0 || self.for_stores.is_empty() {
                self.clears.push_back(clear);
                continue;
            }
            let Some(scratch) = self.for_stores.pop() else { return };
            let Clear { slot, ticket, asked } = clear;
            let tickets = ticket.into_iter().collect();
            self.begin(Op {
                slot,
                step: Step::Unlist,
                scratch,
                asked,
                tickets,
                late: false,
                kind: Kind::Clear,
            });
        }
    }

    fn begin_loads(&mut self, now: Now) {
        while let Some(load) = self.loads.front() {
            let Some(slot) = self.fresh(now, &load.key) else {
                let ticket = load.ticket;
                self.loads.pop_front();
                self.absent(ticket);
                continue;
            };
            let record = self.slots[slot as usize].record;
            if record.body_bytes != load.body.len() as u64 {
                let (ticket, given) = (load.ticket, load.body.len());
                self.loads.pop_front();
                self.fail(ticket, wrong_length(&record.key, record.body_bytes as usize, given));
                continue;
            }
            if self.for_loads.is_empty() {
                return;
            }
            let copy = if buffers::aligned(&load.body) {
                None
            } else if let Some(copy) = self.copies.take(load.body.len()) {
                Some(copy)
            } else {
                return;
            };
            let (Some(scratch), Some(load)) = (self.for_loads.pop(), self.loads.pop_front()) else { return };
            let Load { ticket, asked, key, body } = load;
            self.read_begins(slot);
            let (kind, tickets) = (Kind::Load { key, body, copy }, vec![ticket]);
            self.begin(Op { slot, step: Step::Read, scratch, asked, tickets, late: false, kind });
        }
    }

    fn read_begins(&mut self, slot: u32) {
        self.busy(slot);
        self.clock += 1;
        let entry = &mut self.slots[slot as usize];
        entry.readers += 1;
        let shield = entry.readers == 1 && !entry.pinned;
        let segment = self.segments.get_mut(&entry.segment).expect("a slot has a segment");
        segment.last_use = self.clock;
        let class = segment.place.class;
        let policy = &mut self.shelf(class).policy;
        policy.touch(EntryId(slot));
        if shield {
            policy.shield(EntryId(slot), true);
        }
    }

    fn read_ends(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        entry.readers -= 1;
        let class = self.segments[&entry.segment].place.class;
        if entry.state == State::Stored && entry.readers == 0 && !entry.pinned {
            self.shelf(class).policy.shield(EntryId(slot), false);
        }
        self.idle(slot);
    }

    fn begin_stores(&mut self, now: Now) {
        while let Some(store) = self.stores.front() {
            let (key, class, ticket) = (store.header.key, store.class, store.ticket);
            if let Some(slot) = self.found.get(&key).copied() {
                if !self.too_old(now, &self.slots[slot as usize]) {
                    let Some(store) = self.stores.pop_front() else { return };
                    self.answers.push((ticket, Ok(Outcome::Stored)));
                    self.stored(slot, store.after, now.since);
                    continue;
                }
                self.expired += 1;
                self.forget(slot, None, now.since);
                continue;
            }
            if let Some(op) = self.filling.get(&key).copied() {
                let Some(op) = self.ops.get_mut(&op) else { return };
                let Kind::Store { after, .. } = &mut op.kind else { return };
                if op.late {
                    // It may yet end well, or not at all: this one waits, until its own deadline.
                    return;
                }
                let Some(store) = self.stores.pop_front() else { return };
                op.tickets.push(ticket);
                after.pinned |= store.after.pinned;
                after.removes.extend(store.after.removes);
                continue;
            }
            if self.for_stores.is_empty() {
                return;
            }
            let aligned = buffers::aligned(&store.body);
            let bytes = store.body.len();
            let copy = match (aligned, (!aligned).then(|| self.copies.take(bytes)).flatten()) {
                (true, _) => None,
                (false, Some(copy)) => Some(copy),
                (false, None) => return,
            };
            let slot = match self.room(now, class) {
                Room::Slot(slot) => slot,
                other => {
                    copy.into_iter().for_each(|copy| self.copies.put(copy));
                    if matches!(other, Room::Later) {
                        return;
                    }
                    let Some(store) = self.stores.pop_front() else { return };
                    let (bytes, budget) = (class.entry_bytes(), self.settings.budget);
                    self.answers.push((ticket, Err(TierError::Full { tier: NAME, bytes, budget })));
                    self.not_stored(store.after);
                    continue;
                }
            };
            let (Some(scratch), Some(store)) = (self.for_stores.pop(), self.stores.pop_front()) else {
                return;
            };
            let entry = &mut self.slots[slot as usize];
            entry.state = State::Filling;
            self.sequence += 1;
            let stamp = Stamp { sequence: self.sequence, at_s: now.unix_s };
            entry.record = Record { key, stamp, body_bytes: bytes as u64 };
            let step = if entry.blank { Step::Body } else { Step::Unlist };
            self.busy(slot);
            self.filling.insert(key, self.next_op);
            let Store { encoded, body, after, asked, .. } = store;
            let kind = Kind::Store { key, encoded, body: Some((body, copy)), after };
            self.begin(Op { slot, step, scratch, asked, tickets: vec![ticket], late: false, kind });
        }
    }

    /// An entry for a chunk: an empty one, one of a new segment, or another chunk's.
    fn room(&mut self, now: Now, class: Class) -> Room {
        if let Some(slot) = self.shelves.get_mut(&class).and_then(|shelf| shelf.free.pop_front()) {
            return Room::Slot(slot);
        }
        if self.segment_work.is_none() {
            let left = self.settings.budget.saturating_sub(self.bytes);
            let usual = (self.settings.budget / SEGMENTS).min(SEGMENT_BYTES).max(class.segment_bytes(1));
            let entries = if now.since < self.no_room_until { 0 } else { class.entries_in(left.min(usual)) };
            if entries > 0 {
                self.make_segment(class, entries);
            } else if let Some(number) = self.colder_segment(class) {
                self.drop_segment(number);
            }
        }
        match &self.segment_work {
            Some(SegmentWork::Make { place, .. }) if place.class == class => return Room::Later,
            Some(SegmentWork::Delete { .. }) => return Room::Later,
            _ => {}
        }
        let Some(shelf) = self.shelves.get_mut(&class) else {
            return if self.segment_work.is_some() { Room::Later } else { Room::Full };
        };
        if let Some(EntryId(slot)) = shelf.policy.evict() {
            self.evicted += 1;
            self.found.remove(&self.slots[slot as usize].record.key);
            return Room::Slot(slot);
        }
        if shelf.busy > 0 { Room::Later } else { Room::Full }
    }

    /// The segment of another class that was not used for longest, if all of this one's were used since.
    fn colder_segment(&self, class: Class) -> Option<u32> {
        if self.shelves.len() == usize::from(self.shelves.contains_key(&class)) {
            return None;
        }
        let (own, others): (Vec<_>, Vec<_>) =
            self.segments.values().partition(|segment| segment.place.class == class);
        let others = others.into_iter().filter(|segment| segment.busy == 0 && segment.pinned == 0);
        let coldest = others.min_by_key(|segment| segment.last_use)?;
        let own = own.iter().map(|segment| segment.last_use).min();
        own.is_none_or(|own| coldest.last_use < own).then_some(coldest.place.number)
    }

    fn make_segment(&mut self, class: Class, entries: u32) {
        let place = Place { dir: self.settings.dir.clone(), number: self.next_number, class };
        self.next_number += 1;
        self.bytes += class.segment_bytes(entries);
        let made = Arc::new(Mutex::new(None));
        let (to_make, result) = (place.clone(), Arc::clone(&made));
        self.io.task(
            SEGMENT,
            Box::new(move || {
                let files = to_make.create(entries)?;
                *result.lock().expect("nobody panics with it") = Some(files);
                Ok(())
            }),
        );
        self.segment_work = Some(SegmentWork::Make { place, entries, made });
    }

    /// Evicts all chunks of a segment that nobody uses, and deletes it.
    fn drop_segment(&mut self, number: u32) {
        let segment = self.segments.remove(&number).expect("it was chosen");
        let class = segment.place.class;
        for slot in segment.slots.clone() {
            let entry = &mut self.slots[slot as usize];
            if entry.state == State::Stored {
                self.found.remove(&entry.record.key);
                self.evicted += 1;
                self.shelves.get_mut(&class).expect("it has a segment").policy.remove(EntryId(slot));
            }
            self.slots[slot as usize].state = State::Lost;
        }
        let shelf = self.shelf(class);
        shelf.free.retain(|slot| !segment.slots.contains(slot));
        shelf.segments -= 1;
        if shelf.segments == 0 {
            self.shelves.remove(&class);
        }
        self.unused.push(segment.slots);
        let (place, bytes) = (segment.place, segment.bytes);
        let (to_delete, files) = (place.clone(), segment.files);
        self.io.task(
            SEGMENT,
            Box::new(move || {
                drop(files);
                to_delete.delete()
            }),
        );
        self.segment_work = Some(SegmentWork::Delete { place, bytes });
    }

    fn add_segment(
        &mut self,
        place: Place,
        files: Files,
        entries: u32,
        bytes: u64,
        blank: bool,
    ) -> Range<u32> {
        if !files.direct && !self.told_buffered {
            self.told_buffered = true;
            let dir = place.dir.display();
            tracing::warn!(%dir, "the disk tier's file system has no O_DIRECT: chunks go through the system's cache");
        }
        let (number, class) = (place.number, place.class);
        let slots = self.take_ids(entries);
        let record = Record { key: ChunkKey([0; 32]), stamp: Stamp::default(), body_bytes: 0 };
        for slot in slots.clone() {
            let state = State::Free;
            self.slots[slot as usize] =
                Slot { record, segment: number, state, readers: 0, pinned: false, blank };
        }
        let segment =
            Segment { place, slots: slots.clone(), files, bytes, last_use: self.clock, busy: 0, pinned: 0 };
        self.segments.insert(number, segment);
        let policy = self.settings.policy;
        let shelf = self.shelves.entry(class).or_insert_with(|| Shelf {
            policy: policy.build(),
            free: VecDeque::new(),
            segments: 0,
            busy: 0,
        });
        shelf.segments += 1;
        slots
    }

    fn take_ids(&mut self, count: u32) -> Range<u32> {
        self.unused.sort_unstable_by_key(|range| range.start);
        // Neighbours become one again.
        self.unused.dedup_by(|next, range| {
            let joined = range.end == next.start;
            if joined {
                range.end = next.end;
            }
            joined
        });
        if let Some(range) = self.unused.iter_mut().find(|range| range.len() >= count as usize) {
            let taken = range.start..range.start + count;
            range.start = taken.end;
            self.unused.retain(|range| !range.is_empty());
            return taken;
        }
        let start = self.slots.len() as u32;
        let record = Record { key: ChunkKey([0; 32]), stamp: Stamp::default(), body_bytes: 0 };
        let slot = Slot { record, segment: 0, state: State::Lost, readers: 0, pinned: false, blank: false };
        self.slots.resize(self.slots.len() + count as usize, slot);
        start..start + count
    }

    fn begin(&mut self, op: Op) {
        let id = self.next_op;
        self.next_op += 1;
        let step = op.step;
        self.ops.insert(id, op);
        self.go(id, step);
    }

    /// Begins a step of an operation.
    fn go(&mut self, id: u64, step: Step) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        op.step = step;
        let slot = &mut self.slots[op.slot as usize];
        let segment = &self.segments[&slot.segment];
        let (number, class, files) = (segment.place.number, segment.place.class, &segment.files);
        let entry = op.slot - segment.slots.start;
        let header = op.scratch.header.part(0..class.header_bytes as usize).expect("its length was checked");
        let (slab, at) = (&files.slab, class.entry(entry));
        let (file, at, parts, write) = match (step, &op.kind) {
            (Step::Unlist, _) => {
                buffers::fill(&op.scratch.record, &encode_record(number, entry, None));
                (&files.index, record_at(entry), vec![op.scratch.record.clone()], true)
            }
            (Step::List, _) => {
                buffers::fill(&op.scratch.record, &encode_record(number, entry, Some(&slot.record)));
                (&files.index, record_at(entry), vec![op.scratch.record.clone()], true)
            }
            (Step::Blank, _) => (slab, at, vec![self.blank.clone()], true),
            (Step::Read, Kind::Load { body, copy, .. }) => {
                let mut parts = vec![header];
                parts.extend(buffers::blocks(body, copy.as_ref(), &op.scratch.tail));
                (slab, at, parts, false)
            }
            (Step::Body, Kind::Store { body: Some((body, copy)), .. }) => {
                buffers::gather(body, copy.as_ref(), &op.scratch.tail);
                let parts = buffers::blocks(body, copy.as_ref(), &op.scratch.tail);
                (slab, at + u64::from(class.header_bytes), parts, true)
            }
            (Step::Header, Kind::Store { encoded, .. }) => {
                let mut bytes = encoded.clone();
                bytes.extend(slot.record.stamp.encode());
                buffers::fill(&header, &bytes);
                slot.blank = false;
                (slab, at, vec![header], true)
            }
            (Step::Read | Step::Body | Step::Header, _) => {
                unreachable!("no operation of this kind has the step")
            }
        };
        let file = Arc::clone(file);
        self.io.begin(id << 3 | step as u64, Transfer { file, at, parts, write });
    }

    fn done(&mut self, now: Now, (token, result): Done) {
        if token == SEGMENT {
            return self.segment_done(now, result);
        }
        let id = token >> 3;
        let Some(op) = self.ops.get_mut(&id) else { return };
        let slot = op.slot as usize;
        let fills = matches!(&op.kind, Kind::Store { body: Some(_), .. });
        match (op.step, result) {
            (Step::Read, result) => self.loaded(id, result, now.since),
            (Step::Unlist, Ok(())) => self.go(id, Step::Blank),
            (Step::Blank, Ok(())) => {
                self.slots[slot].blank = true;
                if fills { self.go(id, Step::Body) } else { self.end(id, State::Free, None, now.since) }
            }
            (Step::Unlist | Step::Blank, Err(error)) => self.end(id, State::Lost, Some(&error), now.since),
            (Step::Body, Ok(())) => {
                self.let_go(id);
                self.go(id, Step::Header);
            }
            (Step::Body, Err(error)) => self.end(id, State::Free, Some(&error), now.since),
            (Step::Header, Ok(())) => self.go(id, Step::List),
            (Step::Header | Step::List, Err(error)) => {
                // Whatever of it was written goes again, and nobody joins it.
                op.late = true;
                let tickets = std::mem::take(&mut op.tickets);
                for ticket in tickets {
                    self.fail(ticket, error.to_string());
                }
                self.go(id, Step::Unlist);
            }
            (Step::List, Ok(())) => self.end(id, State::Stored, None, now.since),
        }
    }

    /// Lets go of the memory of a store.
    fn let_go(&mut self, id: u64) {
        let Some(Op { kind: Kind::Store { body, .. }, .. }) = self.ops.get_mut(&id) else { return };
        if let Some((_, Some(copy))) = body.take() {
            self.copies.put(copy);
        }
    }

    /// A store or a clear is over.
    fn end(&mut self, id: u64, state: State, error: Option<&io::Error>, now: Duration) {
        self.let_go(id);
        let Some(op) = self.ops.remove(&id) else { return };
        let Op { slot, scratch, tickets, kind, .. } = op;
        self.for_stores.push(scratch);
        self.slots[slot as usize].state = state;
        let number = self.slots[slot as usize].segment;
        let class = self.segments[&number].place.class;
        if state == State::Free {
            self.shelf(class).free.push_back(slot);
        }
        for ticket in tickets {
            match (error, &kind) {
                (Some(error), _) => self.fail(ticket, error.to_string()),
                (None, Kind::Clear) => self.answers.push((ticket, Ok(Outcome::Removed))),
                (None, _) => self.answers.push((ticket, Ok(Outcome::Stored))),
            }
        }
        if let Kind::Store { key, after, .. } = kind {
            self.filling.remove(&key);
            if state == State::Stored {
                self.clock += 1;
                self.found.insert(key, slot);
                self.segments.get_mut(&number).expect("it is there").last_use = self.clock;
                self.shelf(class).policy.insert(EntryId(slot), name(&key));
                self.idle(slot);
                return self.stored(slot, after, now);
            }
            self.not_stored(after);
        }
        self.idle(slot);
    }

    /// Does what was asked of a chunk before it was stored.
    fn stored(&mut self, slot: u32, after: After, now: Duration) {
        if after.pinned {
            self.pin(slot, true);
        }
        let mut removes = after.removes.into_iter();
        if let Some(ticket) = removes.next() {
            self.forget(slot, Some(ticket), now);
        }
        self.answers.extend(removes.map(|ticket| (ticket, Ok(Outcome::Removed))));
    }

    fn not_stored(&mut self, after: After) {
        self.answers.extend(after.removes.into_iter().map(|ticket| (ticket, Ok(Outcome::Removed))));
    }

    fn loaded(&mut self, id: u64, result: io::Result<()>, now: Duration) {
        let Some(Op { slot, scratch, tickets, kind, .. }) = self.ops.remove(&id) else { return };
        let Kind::Load { key, body, copy } = kind else { return };
        let answer = match result {
            Ok(()) => match self.check(&key, &body, &scratch) {
                Ok(header) => {
                    // After the answer its memory is not touched, so nothing is copied for nobody.
                    if !tickets.is_empty() {
                        buffers::spread(&body, copy.as_ref(), &scratch.tail);
                    }
                    Ok(Outcome::Loaded(header))
                }
                Err(reason) => {
                    if self.slots[slot as usize].state == State::Stored {
                        self.damaged += 1;
                        self.forget(slot, None, now);
                    }
                    Err(TierError::Damaged { tier: NAME, key, reason })
                }
            },
            Err(error) => Err(TierError::Failed { tier: NAME, reason: format!("chunk {key}: {error}") }),
        };
        self.answers.extend(tickets.into_iter().map(|ticket| (ticket, answer.clone())));
        self.for_loads.push(scratch);
        copy.into_iter().for_each(|copy| self.copies.put(copy));
        self.read_ends(slot);
    }

    /// The header that came with a chunk, if it is the chunk's.
    fn check(&self, key: &ChunkKey, body: &Extent, scratch: &Scratch) -> Result<ChunkHeader, String> {
        let (header, _) =
            ChunkHeader::decode(buffers::read(&scratch.header)).map_err(|error| error.to_string())?;
        if header.key != *key {
            return Err(format!("its entry holds chunk {}", header.key));
        }
        if header.body_bytes() != body.len() {
            return Err(wrong_length(key, header.body_bytes(), body.len()));
        }
        Ok(header)
    }

    fn segment_done(&mut self, now: Now, result: io::Result<()>) {
        let dir = self.settings.dir.display().to_string();
        match (self.segment_work.take(), result) {
            (Some(SegmentWork::Make { place, entries, made }), Ok(())) => {
                let (class, bytes) = (place.class, place.class.segment_bytes(entries));
                let files = made.lock().expect("nobody panics with it").take().expect("it was made");
                let slots = self.add_segment(place, files, entries, bytes, true);
                self.shelf(class).free.extend(slots);
            }
            (Some(SegmentWork::Make { place, entries, .. }), Err(error)) => {
                self.bytes -= place.class.segment_bytes(entries);
                self.no_room_until = now.since + NO_ROOM;
                tracing::warn!(%error, dir, "the disk tier cannot have more room and goes on with what it has");
            }
            (Some(SegmentWork::Delete { bytes, .. }), Ok(())) => {
                self.bytes -= bytes;
                self.no_room_until = Duration::ZERO;
            }
            (Some(SegmentWork::Delete { place, .. }), Err(error)) => {
                tracing::warn!(%error, dir, segment = place.number, "the disk tier cannot delete a segment, which keeps its room");
            }
            (None, _) => {}
        }
    }

    /// Answers what is past its deadline, unless the kernel may still use its memory: then it is asked not to.
    fn give_up(&mut self, now: Now) {
        let deadline = self.settings.deadline;
        let is_late = |asked: Duration| now.since >= asked + deadline;
        let reason =
            format!("{} did not answer within {} ms", self.settings.dir.display(), deadline.as_millis());
        while self.loads.front().is_some_and(|load| is_late(load.asked)) {
            let Some(load) = self.loads.pop_front() else { break };
            self.fail(load.ticket, reason.clone());
        }
        while self.stores.front().is_some_and(|store| is_late(store.asked)) {
            let Some(store) = self.stores.pop_front() else { break };
            self.fail(store.ticket, reason.clone());
            self.not_stored(store.after);
        }
        for clear in self.clears.iter_mut().filter(|clear| is_late(clear.asked)) {
            clear.asked = Duration::MAX - deadline;
            let failed = TierError::Failed { tier: NAME, reason: reason.clone() };
            self.answers.extend(clear.ticket.take().map(|ticket| (ticket, Err(failed))));
        }
        let mut let_go = Vec::new();
        for (id, op) in self.ops.iter_mut().filter(|(_, op)| !op.late && is_late(op.asked)) {
            op.late = true;
            let lent = match &op.kind {
                Kind::Load { copy, .. } => copy.is_none(),
                Kind::Store { body, .. } => {
                    op.step == Step::Body && body.as_ref().is_some_and(|(_, copy)| copy.is_none())
                }
                Kind::Clear => false,
            };
            if lent {
                self.io.cancel(id << 3 | op.step as u64);
                continue;
            }
            if op.step != Step::Body {
                let_go.push(*id);
            }
            for ticket in op.tickets.drain(..) {
                let failed = TierError::Failed { tier: NAME, reason: reason.clone() };
                self.answers.push((ticket, Err(failed)));
            }
        }
        for id in let_go {
            self.let_go(id);
        }
    }
}

fn wrong_length(key: &ChunkKey, has: usize, given: usize) -> String {
    format!("chunk {key} has {has} bytes, and {given} were given for it")
}
