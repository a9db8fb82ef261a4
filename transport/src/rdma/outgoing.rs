//! The writer's side of a lane: writes that wait for keys, writes under way, and the slices that they are cut into.

use super::message::Message;
use super::verbs::{Local, MemoryRegion, Work};
use super::windows::Keys;
use crate::net::header::Ack;
use crate::net::lane::Job;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use tandem_memory::HostRegion;

/// Writes are cut, so that several take turns on a queue pair and its progress is seen.
const SLICE_BYTES: usize = 128 << 10;
/// Slices that are posted with one ring of the doorbell; only the end of the last is told.
const CHAIN: usize = 4;
/// A part of a write is at least as large: below, one more queue pair costs more than it brings.
const PART_BYTES: usize = 64 << 10;
/// The most windows whose keys are remembered; then all are asked for anew.
const MAX_KEYS: usize = 4096;

/// The peer broke the rules.
pub(super) type Broken = &'static str;

/// Finds or makes the registration of memory with the device of a queue pair for bytes.
pub(super) type Registrations<'a> = &'a dyn Fn(&Arc<HostRegion>, usize) -> Result<Arc<MemoryRegion>, String>;

/// What the writer's side knows.
pub(super) struct Outgoing {
    /// By the key of the window.
    keys: BTreeMap<u64, Keys>,
    /// Writes that have asked for keys, by sequence number.
    waiting: BTreeMap<u64, Job>,
    /// Writes that were announced and are not settled, by sequence number.
    flying: BTreeMap<u64, Flight>,
    /// By queue pair for bytes.
    queues: Vec<Queue>,
}

struct Flight {
    job: Job,
    /// Parts whose source may still be read.
    parts: usize,
    /// What the peer said became of it.
    fate: Option<bool>,
}

/// What waits for, and is posted on, one queue pair.
#[derive(Default)]
struct Queue {
    parts: VecDeque<Part>,
    posted: VecDeque<Chain>,
    slices: usize,
    /// Bytes of `parts`.
    bytes: usize,
    /// When the oldest posted chain was posted, or the one before it ended.
    since: Option<Instant>,
}

/// What of a write goes over one queue pair.
struct Part {
    sequence: u64,
    /// Registered with the queue pair's device.
    region: Arc<MemoryRegion>,
    /// In the region.
    at: usize,
    left: usize,
    to: u64,
    key: u32,
}

/// Slices posted together.
struct Chain {
    slices: usize,
    /// Writes of which a part ends with it.
    ends: Vec<u64>,
    /// Hold the sources registered.
    _regions: Vec<Arc<MemoryRegion>>,
}

/// What to do with a job that was taken.
pub(super) enum Taken {
    /// It was put in the queues; the peer is to be told first.
    Announce(Message),
    /// The source's memory could not be used.
    Failed(String),
}

impl Outgoing {
    pub(super) fn new(queues: usize) -> Outgoing {
        Outgoing {
            keys: BTreeMap::new(),
            waiting: BTreeMap::new(),
            flying: BTreeMap::new(),
            queues: (0..queues).map(|_| Queue::default()).collect(),
        }
    }

    /// Writes that the peer has not answered.
    pub(super) fn unanswered(&self) -> usize {
        self.waiting.len() + self.flying.len()
    }

    /// Takes a write: says it to the peer, or asks for keys first. `region` finds the registrations of the
    /// source.
    pub(super) fn take(&mut self, job: Job, region: Registrations<'_>) -> Taken {
        let header = job.header();
        if header.len == 0 {
            self.flying.insert(job.sequence, Flight { job, parts: 0, fate: None });
            return Taken::Announce(Message::Write { header, parts: 0 });
        }
        // One that is repeated may have landed: its bytes must not be written before the peer was asked.
        match self.keys.get(&header.window.key).filter(|_| job.failed.is_none()).cloned() {
            Some(keys) => self.fly(job, &keys, region),
            None => {
                self.waiting.insert(job.sequence, job);
                Taken::Announce(Message::Ask(header))
            }
        }
    }

    /// The peer has answered one that asked.
    pub(super) fn keys(
        &mut self,
        sequence: u64,
        window: u64,
        keys: Keys,
        region: Registrations<'_>,
    ) -> Result<Taken, Broken> {
        if keys.keys.len() != self.queues.len() {
            return Err("it gave keys for other queue pairs than there are");
        }
        let job = self.waiting.remove(&sequence).ok_or("it gave keys that were not asked for")?;
        if job.write.window.key != window {
            return Err("it gave keys of another window");
        }
        if self.keys.len() >= MAX_KEYS {
            self.keys.clear();
        }
        self.keys.insert(window, keys.clone());
        Ok(self.fly(job, &keys, region))
    }

    pub(super) fn shut(&mut self, window: u64) {
        self.keys.remove(&window);
    }

    /// Cuts a write into parts, each at the end of a queue.
    fn fly(&mut self, job: Job, keys: &Keys, region: Registrations<'_>) -> Taken {
        let (source, header) = (&job.write.source, job.header());
        let (mut at, mut left) = (source.offset(), source.len());
        let mut to = keys.base.wrapping_add(job.write.offset);
        let parts = (left / PART_BYTES).clamp(1, self.queues.len());
        let mut by_load: Vec<usize> = (0..self.queues.len()).collect();
        by_load.sort_by_key(|queue| self.queues[*queue].bytes);
        // Whole pages but for the last, so that none is touched by two queue pairs.
        let share = left.div_ceil(parts).next_multiple_of(4096);
        let mut count = 0;
        for queue in by_load.into_iter().take(parts) {
            let part = share.min(left);
            if part == 0 {
                break;
            }
            let region = match region(source.region(), queue) {
                Ok(region) => region,
                Err(reason) => return Taken::Failed(reason),
            };
            let key = keys.keys[queue];
            self.queues[queue].bytes += part;
            self.queues[queue].parts.push_back(Part {
                sequence: job.sequence,
                region,
                at,
                left: part,
                to,
                key,
            });
            (at, left, to) = (at + part, left - part, to.wrapping_add(part as u64));
            count += 1;
        }
        self.flying.insert(job.sequence, Flight { job, parts: count, fate: None });
        Taken::Announce(Message::Write { header, parts: count as u8 })
    }

    /// The next chain for a queue pair, while it has room: to be posted by `post`.
    pub(super) fn post(
        &mut self,
        queue: usize,
        room: usize,
        now: Instant,
        mut post: impl FnMut(&[Work<'_>]) -> Result<(), String>,
    ) -> Result<bool, String> {
        let queue = &mut self.queues[queue];
        let (mut chain, mut ends, mut regions) = (Vec::new(), Vec::new(), Vec::new());
        while chain.len() < CHAIN && queue.slices + chain.len() < room {
            let Some(part) = queue.parts.front_mut() else { break };
            let len = part.left.min(SLICE_BYTES);
            let from: Local =
                part.region.local(part.at..part.at + len).ok_or("a source leaves its region")?;
            let last = len == part.left;
            let immediate = last.then_some(part.sequence as u32);
            chain.push(Work::Write { from, to: part.to, key: part.key, immediate });
            queue.bytes -= len;
            (part.at, part.left, part.to) =
                (part.at + len, part.left - len, part.to.wrapping_add(len as u64));
            regions.push(Arc::clone(&part.region));
            if last {
                ends.push(part.sequence);
                queue.parts.pop_front();
            }
        }
        if chain.is_empty() {
            return Ok(false);
        }
        post(&chain)?;
        queue.slices += chain.len();
        queue.since.get_or_insert(now);
        queue.posted.push_back(Chain { slices: chain.len(), ends, _regions: regions });
        Ok(true)
    }

    /// The oldest chain of a queue pair is done: its sources are not read any more. Calls `settle` for the writes
    /// that this ends.
    pub(super) fn done(&mut self, queue: usize, now: Instant, mut settle: impl FnMut(Job, bool)) {
        let Some(chain) = self.queues[queue].posted.pop_front() else { return };
        self.queues[queue].slices -= chain.slices;
        self.queues[queue].since = (!self.queues[queue].posted.is_empty()).then_some(now);
        for sequence in chain.ends {
            if let Some(flight) = self.flying.get_mut(&sequence) {
                flight.parts -= 1;
            }
            self.settle(sequence, &mut settle);
        }
    }

    /// The peer has said what became of a write.
    pub(super) fn answered(&mut self, ack: Ack, mut settle: impl FnMut(Job, bool)) -> Result<(), Broken> {
        if let Some(job) = self.waiting.remove(&ack.sequence) {
            settle(job, ack.landed);
            return Ok(());
        }
        let flight = self.flying.get_mut(&ack.sequence).ok_or("it answered a write that there is not")?;
        if flight.fate.replace(ack.landed).is_some() {
            return Err("it answered a write twice");
        }
        self.settle(ack.sequence, &mut settle);
        Ok(())
    }

    /// Both the peer's answer and the end of its work must be there: until then, the NIC may send again from the
    /// source.
    fn settle(&mut self, sequence: u64, settle: &mut impl FnMut(Job, bool)) {
        if let Some(Flight { parts: 0, fate: Some(landed), .. }) = self.flying.get(&sequence) {
            let landed = *landed;
            if let Some(flight) = self.flying.remove(&sequence) {
                settle(flight.job, landed);
            }
        }
    }

    /// Since when a queue pair with work on it has ended none.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.queues.iter().filter_map(|queue| queue.since).min()
    }
}
