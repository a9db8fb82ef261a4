//! Queues in memory that two processes share.
//!
//! Each queue has one producer and one consumer. Everything in it is an atomic word, and each side keeps its
//! own position to itself: whatever the peer writes into the shared part, this side reads numbers, never out
//! of bounds, and takes no more than a queue holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use tandem_memory::HostRegion;

/// Words of a write's announcement.
pub(super) const JOB_WORDS: usize = 16;
/// Writes announced and not taken up, at most; a power of two.
const JOB_SLOTS: u64 = 1024;
/// Answers given and not read, at most; a power of two.
const ACK_SLOTS: u64 = 4096;
/// What one side writes and the other reads lies on cache lines of its own, two of them, as they are fetched.
const LINE: usize = 128;

const JOBS_AT: usize = 2 * LINE;
const ACKS_AT: usize = JOBS_AT + 2 * LINE + JOB_SLOTS as usize * JOB_WORDS * 8;
/// Bytes of one direction.
const WAY_BYTES: usize = ACKS_AT + 2 * LINE + ACK_SLOTS as usize * 8;

/// Bytes of both.
pub(super) const SHARED_BYTES: usize = 2 * WAY_BYTES;

/// The peer wrote positions that no run of the rules leads to.
#[derive(Debug)]
pub(super) struct Garbled;

/// A word of shared memory.
#[derive(Clone)]
struct Word {
    memory: Arc<HostRegion>,
    at: usize,
}

impl Word {
    #[allow(unsafe_code)] // The one place where shared memory becomes a reference.
    fn get(&self) -> &AtomicU64 {
        assert!(self.at + 8 <= self.memory.len() && self.at.is_multiple_of(8));
        // SAFETY: in bounds and aligned (regions begin on a page), alive by the Arc; both processes access
        // these words as atomics alone, and any bits are a number.
        unsafe { AtomicU64::from_ptr(self.memory.base().add(self.at).cast()) }
    }
}

/// Slots of `WORDS` words between two positions.
struct Ring<const WORDS: usize> {
    memory: Arc<HostRegion>,
    /// Where it begins: the producer's position, the consumer's position, the slots.
    at: usize,
    slots: u64,
}

impl<const WORDS: usize> Ring<WORDS> {
    fn word(&self, offset: usize) -> Word {
        Word { memory: Arc::clone(&self.memory), at: self.at + offset }
    }

    #[allow(unsafe_code)] // As in `Word::get`, without counting references for every word.
    fn slot(&self, position: u64) -> &[AtomicU64; WORDS] {
        let at = self.at + 2 * LINE + (position % self.slots) as usize * WORDS * 8;
        assert!(at + WORDS * 8 <= self.memory.len());
        // SAFETY: as in `Word::get`; an array of atomics lies as its elements do.
        unsafe { &*self.memory.base().add(at).cast::<[AtomicU64; WORDS]>() }
    }
}

/// Puts items into a queue.
pub(super) struct Producer<const WORDS: usize> {
    ring: Ring<WORDS>,
    head: Word,
    tail: Word,
    next: u64,
    /// The consumer's position, when it was read last.
    taken: u64,
}

/// Items after which a producer reads the consumer's position again although there is room: each time, the line comes
/// from the other core.
const LOOK_EVERY: u64 = 16;

impl<const WORDS: usize> Producer<WORDS> {
    fn new(ring: Ring<WORDS>) -> Producer<WORDS> {
        Producer { head: ring.word(0), tail: ring.word(LINE), ring, next: 0, taken: 0 }
    }

    pub(super) fn has_room(&mut self) -> Result<bool, Garbled> {
        if self.next.is_multiple_of(LOOK_EVERY) || self.next - self.taken == self.ring.slots {
            let taken = self.tail.get().load(Ordering::Acquire);
            if self.next.checked_sub(taken).is_none_or(|waiting| waiting > self.ring.slots) {
                return Err(Garbled);
            }
            self.taken = taken;
        }
        Ok(self.next - self.taken < self.ring.slots)
    }

    /// Adds an item, for which there is room.
    pub(super) fn push(&mut self, item: &[u64; WORDS]) {
        for (word, value) in self.ring.slot(self.next).iter().zip(item) {
            word.store(*value, Ordering::Relaxed);
        }
        self.next += 1;
        self.head.get().store(self.next, Ordering::Release);
    }
}

/// Takes items out of a queue.
pub(super) struct Consumer<const WORDS: usize> {
    ring: Ring<WORDS>,
    head: Word,
    tail: Word,
    next: u64,
    /// The producer's position, when it was read last.
    written: u64,
}

impl<const WORDS: usize> Consumer<WORDS> {
    fn new(ring: Ring<WORDS>) -> Consumer<WORDS> {
        Consumer { head: ring.word(0), tail: ring.word(LINE), ring, next: 0, written: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head.get().load(Ordering::Acquire) == self.next
    }

    pub(super) fn pop(&mut self) -> Result<Option<[u64; WORDS]>, Garbled> {
        if self.written == self.next {
            let written = self.head.get().load(Ordering::Acquire);
            if written.checked_sub(self.next).is_none_or(|waiting| waiting > self.ring.slots) {
                return Err(Garbled);
            }
            self.written = written;
            if written == self.next {
                return Ok(None);
            }
        }
        let slot = self.ring.slot(self.next);
        let item = std::array::from_fn(|i| slot[i].load(Ordering::Relaxed));
        self.next += 1;
        self.tail.get().store(self.next, Ordering::Release);
        Ok(Some(item))
    }
}

/// What one side says of itself.
pub(super) struct Sign {
    /// It will not look into its queues before it is woken.
    asleep: Word,
    /// The sources of the writes that it announces may be read.
    lends: Word,
}

impl Sign {
    fn new(memory: &Arc<HostRegion>, way: usize) -> Sign {
        let word = |at| Word { memory: Arc::clone(memory), at };
        Sign { asleep: word(way), lends: word(way + LINE) }
    }

    pub(super) fn set_asleep(&self, asleep: bool) {
        self.asleep.get().store(asleep.into(), Ordering::SeqCst);
    }

    /// Whether it must be woken to see what was just pushed; only one caller is told.
    pub(super) fn must_wake(&self) -> bool {
        // What was pushed is visible before the sign is read, as the sleeper sets the sign before it looks.
        fence(Ordering::SeqCst);
        self.asleep.get().load(Ordering::Relaxed) != 0 && self.asleep.get().swap(0, Ordering::SeqCst) != 0
    }

    pub(super) fn set_lends(&self, lends: bool) {
        self.lends.get().store(lends.into(), Ordering::SeqCst);
        // Before anything that the caller changes afterwards.
        fence(Ordering::SeqCst);
    }

    /// Whether everything that was read of its sources so far was lent.
    pub(super) fn lent_until_now(&self) -> bool {
        // After all that was read.
        fence(Ordering::SeqCst);
        self.lends.get().load(Ordering::SeqCst) == 1
    }
}

/// One side's ends of the queues.
pub(super) struct Ends {
    pub(super) jobs_out: Producer<JOB_WORDS>,
    pub(super) jobs_in: Consumer<JOB_WORDS>,
    /// Answers to the peer's writes.
    pub(super) acks_out: Producer<1>,
    pub(super) acks_in: Consumer<1>,
    pub(super) own: Sign,
    pub(super) peers: Sign,
}

impl Ends {
    /// The ends of the side that made the memory, or of the other one.
    pub(super) fn new(memory: &Arc<HostRegion>, made_here: bool) -> Ends {
        let (out, back) = if made_here { (0, WAY_BYTES) } else { (WAY_BYTES, 0) };
        let jobs = |way| Ring { memory: Arc::clone(memory), at: way + JOBS_AT, slots: JOB_SLOTS };
        let acks = |way| Ring { memory: Arc::clone(memory), at: way + ACKS_AT, slots: ACK_SLOTS };
        let own = Sign::new(memory, out);
        own.set_lends(true);
        Ends {
            jobs_out: Producer::new(jobs(out)),
            jobs_in: Consumer::new(jobs(back)),
            acks_out: Producer::new(acks(out)),
            acks_in: Consumer::new(acks(back)),
            own,
            peers: Sign::new(memory, back),
        }
    }
}

/// The peer writes positions and slots as it likes, while this side works on its ends: it reads words, takes no
/// more than a queue holds without a new position, and never leaves the memory.
pub(super) fn fuzz(bytes: &[u8]) {
    thread_local! {
        static MEMORY: Option<Arc<HostRegion>> = HostRegion::map(SHARED_BYTES).ok();
    }
    let Some(memory) = MEMORY.with(Clone::clone) else { return };
    let positions = [JOBS_AT, JOBS_AT + LINE, ACKS_AT, ACKS_AT + LINE];
    for way in [0, WAY_BYTES] {
        for at in positions {
            Word { memory: Arc::clone(&memory), at: way + at }.get().store(0, Ordering::Relaxed);
        }
    }
    let mut ends = Ends::new(&memory, true);
    for act in bytes.chunks_exact(4) {
        let [what, which, low, high] = *act else { return };
        // Positions near zero and near the end of all numbers, and those that lie a queue's length further on.
        let value = match high {
            255 => u64::MAX - u64::from(low),
            _ => u64::from(low) | u64::from(high) << 8,
        };
        match what % 6 {
            0 => {
                let at = WAY_BYTES * usize::from(which & 1) + positions[usize::from(which >> 1) % 4];
                Word { memory: Arc::clone(&memory), at }.get().store(value, Ordering::Release);
            }
            1 => {
                let mut taken = 0;
                while let Ok(Some(_)) = ends.jobs_in.pop() {
                    taken += 1;
                    assert!(taken <= JOB_SLOTS);
                }
            }
            2 => {
                let mut taken = 0;
                while let Ok(Some(_)) = ends.acks_in.pop() {
                    taken += 1;
                    assert!(taken <= ACK_SLOTS);
                }
            }
            3 if matches!(ends.jobs_out.has_room(), Ok(true)) => ends.jobs_out.push(&[value; JOB_WORDS]),
            4 if matches!(ends.acks_out.has_room(), Ok(true)) => ends.acks_out.push(&[value]),
            _ => {
                ends.own.set_asleep(which & 1 == 1);
                let _ = (ends.peers.must_wake(), ends.peers.lent_until_now(), ends.jobs_in.is_empty());
            }
        }
    }
}

/// Where a peer that made the memory says how much it has put into its queues.
#[cfg(test)]
pub(super) const JOBS_HEAD: usize = JOBS_AT;
#[cfg(test)]
pub(super) const ACKS_HEAD: usize = ACKS_AT;
/// Where its peer says how much it has answered.
#[cfg(test)]
pub(super) const ANSWERS_HEAD: usize = WAY_BYTES + ACKS_AT;
#[cfg(test)]
pub(super) const TAIL_AFTER_HEAD: usize = LINE;

#[cfg(test)]
pub(super) fn scribble(memory: &Arc<HostRegion>, at: usize, value: u64) {
    Word { memory: Arc::clone(memory), at }.get().store(value, Ordering::Release);
}

#[cfg(test)]
pub(super) fn glimpse(memory: &Arc<HostRegion>, at: usize) -> u64 {
    Word { memory: Arc::clone(memory), at }.get().load(Ordering::Acquire)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Arc<HostRegion>, Ends, Ends) {
        let memory = HostRegion::map(SHARED_BYTES).unwrap();
        let (a, b) = (Ends::new(&memory, true), Ends::new(&memory, false));
        (memory, a, b)
    }

    #[test]
    fn items_come_out_as_they_went_in() {
        let (_memory, mut a, mut b) = pair();
        let (mut sent, mut received) = (0u64, 0u64);
        for round in 0..10_000u64 {
            for _ in 0..round % 7 {
                if a.jobs_out.has_room().unwrap() {
                    a.jobs_out.push(&std::array::from_fn(|i| sent * 100 + i as u64));
                    sent += 1;
                }
            }
            for _ in 0..round % 5 {
                if let Some(item) = b.jobs_in.pop().unwrap() {
                    assert_eq!(item, std::array::from_fn(|i| received * 100 + i as u64));
                    received += 1;
                }
            }
        }
        assert!(received > 10_000 && sent - received > JOB_SLOTS - 7, "{sent} {received}");
        assert!(b.acks_in.is_empty() && a.jobs_in.is_empty());
    }

    #[test]
    fn impossible_positions_are_noticed() {
        let (memory, mut a, mut b) = pair();
        for position in [JOB_SLOTS + 1, u64::MAX, 1 << 63] {
            Word { memory: Arc::clone(&memory), at: JOBS_AT }.get().store(position, Ordering::Release);
            assert!(b.jobs_in.pop().is_err());
        }
        Word { memory, at: JOBS_AT + LINE }.get().store(1, Ordering::Release);
        assert!(a.jobs_out.has_room().is_err());
    }

    #[test]
    fn signs_are_seen_by_the_other_side() {
        let (_memory, a, b) = pair();
        assert!(a.peers.lent_until_now() && b.peers.lent_until_now());
        a.own.set_lends(false);
        assert!(!b.peers.lent_until_now());
        b.own.set_asleep(true);
        assert!(a.peers.must_wake());
        assert!(!a.peers.must_wake());
    }
}
