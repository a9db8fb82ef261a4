//! The faults, and what must hold whatever the backend: no wrong byte, nothing left over, noticed and free in time.

use crate::end::{End, Holdings, Push, pattern};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tandem_proto::ids::NodeId;
use tandem_transport::{Event, FailReason, SubmitError, Tuning, Window};

/// Unreported writes, and events that were not polled: few, so that a receiver is soon full.
pub(crate) const WRITE_LIMIT: usize = 32;
pub(crate) const EVENT_LIMIT: usize = 16;
/// What QUIC lets in beside that: streams that were accepted before the receiver was full, of two connections.
const ACCEPTED: usize = 2 * 65;

/// Within this a fault is noticed, and everything free after that. Time on a busy machine is not the transport's
/// alone: tests bear this much more, and the simulator nothing.
const IN_TIME: Duration = Duration::from_secs(1);
const NOISE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(20);
const DARK: Duration = Duration::from_secs(2);
/// How long nothing may move until a full receiver counts as full.
const STILL: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// Either process ends without a word, at any point of a transfer.
    Kill,
    /// Nothing passes between the two for two seconds.
    Cut,
    /// The receiver does not poll, and then opens nothing more.
    Fill,
    /// The window is closed under a write, or one side severs in its middle.
    Cancel,
}

/// A backend with two ends, each a process of its own where there are processes, and a link between them.
pub(crate) trait Stage: Sized {
    /// Bytes of each end's region.
    const REGION: usize;
    /// Whether a write that does not land leaves its place as it was or puts right bytes there. TLS puts the byte
    /// after a record's content on the first one that is still to come.
    const OLD_OR_NEW: bool;

    /// What this machine lacks for it.
    fn missing() -> Option<String> {
        None
    }
    fn start(seed: u64) -> Self;
    fn end(&mut self, end: usize) -> &mut dyn End;
    /// Where the other end finds this one.
    fn address(&self, end: usize) -> SocketAddr;
    /// The end is gone without a word.
    fn kill(&mut self, end: usize);
    /// A new one takes the place of one that was killed.
    fn revive(&mut self, end: usize);
    fn set_dark(&mut self, dark: bool);
    fn now(&self) -> Duration;
    /// Lets a little time pass.
    fn wait(&mut self);
}

/// Plays a fault so often, or as `TANDEM_FAULTS` says, and tells how long it took to be noticed and to be over.
pub(crate) fn play<S: Stage>(fault: Fault, rounds: usize) {
    if let Some(missing) = S::missing() {
        return println!("skipped: {missing}");
    }
    static ALONE: Mutex<()> = Mutex::new(());
    // Where tests share a process, those that count what processes hold take turns.
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(Tuning::default().dead_after < IN_TIME, "a dead peer is to be noticed in time");
    let wanted = |name| std::env::var(name).ok().map(|n| n.parse::<u64>().expect("it is a number"));
    let rounds = wanted("TANDEM_FAULTS").map_or(rounds, |n| n as usize);
    let seed =
        wanted("TANDEM_SEED").unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    println!("TANDEM_SEED={seed}");
    let mut random = Random(seed);
    let mut stage = S::start(random.next());
    let mut noticed = Vec::new();
    let mut freed = Vec::new();
    let mut midway = 0;
    for round in 0..rounds {
        let salt = random.next();
        let outcome = Round::begin(&mut stage, fault, Random(salt)).play();
        noticed.push(outcome.noticed);
        freed.push(outcome.freed);
        midway += usize::from(outcome.midway);
        assert!(outcome.noticed < IN_TIME + NOISE, "round {round}: noticed after {:?}", outcome.noticed);
        assert!(outcome.freed < IN_TIME + NOISE, "round {round}: free after {:?}", outcome.freed);
    }
    println!("{fault:?}: {rounds} rounds, {midway} of them in the middle of a transfer");
    for (what, mut times) in [("noticed", noticed), ("free", freed)] {
        times.sort_unstable();
        let [median, last] = [times[times.len() / 2], times[times.len() - 1]];
        println!("{fault:?}: {what} after {median:?} (median), {last:?} (at most)");
        assert!(median < IN_TIME, "{what} after {median:?}");
    }
    // Few rounds may be unlucky.
    assert!(rounds < 10 || midway * 4 >= rounds, "faults must strike in the middle of a transfer");
}

struct Outcome {
    /// From the fault until the last end that lives knows of it.
    noticed: Duration,
    /// From there until both hold what they held before.
    freed: Duration,
    /// Some of it had landed, and not all.
    midway: bool,
}

struct Round<'a, S> {
    stage: &'a mut S,
    fault: Fault,
    random: Random,
    ids: [NodeId; 2],
    alive: [bool; 2],
    writer: usize,
    reader: usize,
    before: [Holdings; 2],
    /// What each end reported.
    events: [Vec<Event>; 2],
    /// What the reader's region held, and the writer's.
    old: Vec<u8>,
    new: Vec<u8>,
    windows: Vec<Window>,
    /// Each with where it goes in the reader's region.
    pushes: Vec<(Push, Range<usize>)>,
    /// So many were taken.
    taken: usize,
}

impl<'a, S: Stage> Round<'a, S> {
    /// Connects the two, and opens windows.
    fn begin(stage: &'a mut S, fault: Fault, mut random: Random) -> Round<'a, S> {
        let (dialler, writer) = (random.below(2), random.below(2));
        let reader = 1 - writer;
        let ids = [0, 1].map(|end| stage.end(end).id());
        let before = [0, 1].map(|end| stage.end(end).holdings());
        let [mut old, mut new] = [vec![0; S::REGION], vec![0; S::REGION]];
        for (end, bytes) in [(reader, &mut old), (writer, &mut new)] {
            let salt = random.next();
            pattern(salt, bytes);
            stage.end(end).fill(salt);
        }
        let addr = stage.address(1 - dialler);
        stage.end(dialler).connect(ids[1 - dialler], addr);
        let mut round = Round {
            stage,
            fault,
            random,
            ids,
            alive: [true; 2],
            writer,
            reader,
            before,
            events: [Vec::new(), Vec::new()],
            old,
            new,
            windows: Vec::new(),
            pushes: Vec::new(),
            taken: 0,
        };
        round.until("both are connected", |round| {
            [0, 1]
                .iter()
                .all(|end| round.events[*end].contains(&Event::Connected { peer: round.ids[1 - end] }))
        });
        round.events.iter_mut().for_each(Vec::clear);
        round.plan();
        round
    }

    /// Windows with room between them that must stay as it is, and writes side by side in each.
    fn plan(&mut self) {
        let (windows, writes, largest) = match self.fault {
            Fault::Kill | Fault::Cut => (8, 6, S::REGION / 8 / 6),
            Fault::Fill => (8, 64, S::REGION / 8 / 64),
            Fault::Cancel => (1, 3, S::REGION / 3),
        };
        let room = S::REGION / windows;
        for window in 0..windows {
            let start = window * room + 1 + self.random.below(7);
            let end = (window + 1) * room - 1 - self.random.below(7);
            let peer = self.ids[self.writer];
            let opened = self.stage.end(self.reader).open(peer, start..end);
            self.windows.push(opened);
            let mut offset = self.random.below(3);
            for _ in 0..writes {
                let least = if self.fault == Fault::Cancel { largest / 2 } else { 0 };
                let len = (least + self.random.below(largest - least)).min(end - start - offset);
                let from = self.random.below(S::REGION - len);
                let push = Push {
                    ticket: self.pushes.len() as u64,
                    source: from..from + len,
                    window: opened,
                    offset: offset as u64,
                };
                self.pushes.push((push, start + offset..start + offset + len));
                offset += len;
            }
        }
    }

    fn play(mut self) -> Outcome {
        let (noticed, midway) = match self.fault {
            Fault::Kill => self.kill(),
            Fault::Cut => self.cut(),
            Fault::Fill => self.fill(),
            Fault::Cancel => self.cancel(),
        };
        let freed = self.until_free();
        self.check_bytes();
        for end in 0..2 {
            if !self.alive[end] {
                self.stage.revive(end);
            }
        }
        Outcome { noticed, freed, midway }
    }

    fn kill(&mut self) -> (Duration, bool) {
        self.transfer_for_a_while();
        let victim = self.random.below(2);
        let survivor = 1 - victim;
        let midway = self.is_midway();
        let struck = self.stage.now();
        self.stage.kill(victim);
        self.alive[victim] = false;
        self.until("the survivor notices", |round| round.has_ended(survivor));
        (self.stage.now() - struck, midway)
    }

    fn cut(&mut self) -> (Duration, bool) {
        self.transfer_for_a_while();
        let midway = self.is_midway();
        let struck = self.stage.now();
        self.stage.set_dark(true);
        self.until("both notice", |round| round.has_ended(0) && round.has_ended(1));
        let noticed = self.stage.now() - struck;
        // Free while it is still dark: nobody must hear from the other for that.
        let freed = self.until_free();
        assert!(freed < IN_TIME + NOISE, "free after {freed:?} in the dark");
        while self.stage.now() < struck + DARK {
            self.pump();
            self.stage.wait();
        }
        self.stage.set_dark(false);
        (noticed, midway)
    }

    /// The reader does not poll: the writer is told so by `Full`, and what is under way stays bounded. Then the reader
    /// either goes on, and everything lands, or has no more windows, and everything else is refused.
    fn fill(&mut self) -> (Duration, bool) {
        let began = self.stage.now();
        let mut last = began;
        while self.stage.now() - last < STILL {
            let before = (self.taken, self.events[self.writer].len());
            let full = self.push_next();
            self.pump_end(self.writer);
            if (self.taken, self.events[self.writer].len()) != before {
                last = self.stage.now();
            }
            assert!(
                full || self.taken < self.pushes.len(),
                "the writer was never told that the reader is full"
            );
            self.stage.wait();
        }
        let noticed = last - began;
        let most = WRITE_LIMIT + EVENT_LIMIT + ACCEPTED;
        assert!(self.taken <= most, "{} writes were taken, at most {most} may be", self.taken);
        let midway = self.is_midway();
        if self.random.below(2) == 0 {
            for window in self.windows.clone() {
                self.stage.end(self.reader).close(window);
            }
            let closed = self.stage.end(self.reader).bytes();
            self.until("everything is reported", |round| round.unreported().is_empty());
            assert!(self.stage.end(self.reader).bytes() == closed, "bytes landed in closed windows");
            let landed =
                self.events[self.reader].iter().filter(|e| matches!(e, Event::Landed { .. })).count();
            assert_eq!(landed, 0, "landed through closed windows");
        } else {
            self.pump_end(self.reader);
            let waiting = self.events[self.reader].len();
            assert!(waiting <= EVENT_LIMIT + ACCEPTED, "{waiting} events were queued");
            self.until("everything is sent", |round| {
                while !round.push_next() && round.taken < round.pushes.len() {}
                round.taken == round.pushes.len() && round.unreported().is_empty()
            });
            let sent = |e: &&Event| matches!(e, Event::Sent { .. });
            assert_eq!(self.events[self.writer].iter().filter(sent).count(), self.pushes.len());
            self.until("everything is landed", |round| {
                round.events[round.reader].len() == round.pushes.len()
            });
            for window in self.windows.clone() {
                self.stage.end(self.reader).close(window);
            }
        }
        self.sever();
        (noticed, midway)
    }

    fn cancel(&mut self) -> (Duration, bool) {
        while !self.push_next() && self.taken < self.pushes.len() {}
        // From microseconds on, so that fast and slow backends are met in the middle.
        let scale = 1 + self.random.below(14);
        let after = Duration::from_micros(self.random.below(1 << scale) as u64);
        let began = self.stage.now();
        while self.stage.now() - began < after {
            self.pump();
            self.stage.wait();
        }
        if self.random.below(2) == 0 {
            let struck = self.stage.now();
            let window = self.windows[0];
            self.stage.end(self.reader).close(window);
            let landed_before = self.events[self.reader].len();
            let closed = self.stage.end(self.reader).bytes();
            self.until("everything is reported", |round| round.unreported().is_empty());
            let noticed = self.stage.now() - struck;
            self.linger();
            assert!(self.stage.end(self.reader).bytes() == closed, "bytes landed in a closed window");
            assert_eq!(self.events[self.reader].len(), landed_before, "landed through a closed window");
            let refused = |e: &Event| matches!(e, Event::Failed { reason: FailReason::Refused, .. });
            let midway = self.events[self.writer].iter().any(refused);
            self.sever();
            return (noticed, midway);
        }
        let midway = !self.unreported().is_empty();
        (self.sever(), midway)
    }

    /// One side severs; returns how long it took the other to notice.
    fn sever(&mut self) -> Duration {
        let severing = self.random.below(2);
        let peer = self.ids[1 - severing];
        let struck = self.stage.now();
        self.stage.end(severing).sever(peer);
        self.until("both know that it is over", |round| round.has_ended(0) && round.has_ended(1));
        self.stage.now() - struck
    }

    /// Writes until a random number of them is sent.
    fn transfer_for_a_while(&mut self) {
        let enough = self.random.below(self.pushes.len());
        self.until("enough is sent", |round| {
            while !round.push_next() && round.taken < round.pushes.len() {}
            round.events[round.writer].len() >= enough
        });
    }

    /// Submits the next write; true if it was not taken.
    fn push_next(&mut self) -> bool {
        let Some((push, _)) = self.pushes.get(self.taken) else { return true };
        let peer = self.ids[self.reader];
        match self.stage.end(self.writer).push(peer, push) {
            Ok(()) => self.taken += 1,
            Err(SubmitError::Full { limit, .. }) => {
                assert_eq!(limit, WRITE_LIMIT);
                return true;
            }
            Err(error) => panic!("{error}"),
        }
        false
    }

    fn pump_end(&mut self, end: usize) {
        let events = self.stage.end(end).poll();
        self.events[end].extend(events);
    }

    fn pump(&mut self) {
        for end in 0..2 {
            if self.alive[end] {
                self.pump_end(end);
            }
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let began = self.stage.now();
        loop {
            self.pump();
            if done(self) {
                return;
            }
            let took = self.stage.now() - began;
            assert!(took < PATIENCE, "{what}: not within {took:?}; {:?}", self.events);
            self.stage.wait();
        }
    }

    /// Time for what must not come.
    fn linger(&mut self) {
        for _ in 0..20 {
            self.pump();
            self.stage.wait();
        }
    }

    fn has_ended(&self, end: usize) -> bool {
        matches!(self.events[end].last(), Some(Event::Severed { peer, .. }) if *peer == self.ids[1 - end])
    }

    fn is_midway(&self) -> bool {
        self.taken > 0 && !self.unreported().is_empty()
    }

    /// Tickets that were taken, and neither sent nor failed.
    fn unreported(&self) -> BTreeSet<u64> {
        let reported = self.events[self.writer].iter().filter_map(|event| match event {
            Event::Sent { ticket, .. } | Event::Failed { ticket, .. } => Some(*ticket),
            _ => None,
        });
        let reported: BTreeSet<u64> = reported.collect();
        (0..self.taken as u64).filter(|ticket| !reported.contains(ticket)).collect()
    }

    /// Waits until each end that lives holds what it held before; returns how long that took.
    fn until_free(&mut self) -> Duration {
        let began = self.stage.now();
        for end in 0..2 {
            while self.alive[end] {
                let holds = self.stage.end(end).holdings();
                if holds == self.before[end] {
                    break;
                }
                let took = self.stage.now() - began;
                let before = &self.before[end];
                assert!(took < PATIENCE, "end {end} holds {holds:?} after {took:?}, and {before:?} before");
                self.stage.wait();
            }
        }
        self.stage.now() - began
    }

    /// What was reported is true, once and in order, and no byte is wrong.
    fn check_bytes(&mut self) {
        let landed_bytes = self.stage.end(self.reader).bytes();
        self.linger();
        let bytes = self.stage.end(self.reader).bytes();
        assert!(bytes == landed_bytes, "bytes landed after the end");
        let mut fates = BTreeMap::new();
        if self.alive[self.writer] {
            let peer = self.ids[self.reader];
            for (at, event) in self.events[self.writer].iter().enumerate() {
                match event {
                    Event::Sent { ticket, peer: p } if *p == peer => {
                        assert_eq!(fates.insert(*ticket, true), None, "ticket {ticket} is reported twice");
                    }
                    Event::Failed { ticket, peer: p, .. } if *p == peer => {
                        assert_eq!(fates.insert(*ticket, false), None, "ticket {ticket} is reported twice");
                    }
                    Event::Severed { .. } if at + 1 == self.events[self.writer].len() => {}
                    other => panic!("the writer reported {other:?}"),
                }
            }
            assert_eq!(fates.len(), self.taken, "each that was taken is reported");
        }
        let mut landed = BTreeSet::new();
        for event in &self.events[self.reader] {
            match event {
                Event::Landed { immediate, len, .. } => {
                    assert!(landed.insert(u64::from(*immediate)), "write {immediate} landed twice");
                    assert_eq!(*len, self.pushes[*immediate as usize].1.len() as u64);
                }
                Event::Severed { .. } => {}
                other => panic!("the reader reported {other:?}"),
            }
        }
        // What may have landed, and what must have.
        let mut may = vec![false; bytes.len()];
        for (push, place) in &self.pushes[..self.taken] {
            let source = &self.new[push.source.clone()];
            if landed.contains(&push.ticket) || fates.get(&push.ticket) == Some(&true) {
                assert!(bytes[place.clone()] == *source, "write {} is not whole", push.ticket);
            }
            let written = bytes[place.clone()].iter().zip(source).zip(&self.old[place.clone()]);
            let wrong = written.into_iter().position(|((byte, new), old)| byte != new && byte != old);
            assert!(wrong.is_none() || !S::OLD_OR_NEW, "write {} put a wrong byte at {wrong:?}", push.ticket);
            may[place.clone()].fill(true);
        }
        let strange = (0..bytes.len()).find(|at| !may[*at] && bytes[*at] != self.old[*at]);
        assert_eq!(strange, None, "a byte changed that nobody wrote");
    }
}

/// splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}
