//! The thread of a lane: takes what has ended, posts what can be, and sleeps when there is neither.

use super::incoming::{Arrived, Incoming};
use super::lane::{DATA_WORK, Kind, Lane, MAX_FLYING, MESSAGE_RECEIVES, MESSAGE_WORK};
use super::message::{Envelope, MAX_ACKS, Message};
use super::outgoing::{Outgoing, Taken};
use super::verbs::{Completion, Ended, MemoryRegion, Work};
use super::windows::{Granted, Keys};
use super::{Arrival, Session};
use crate::net::header::{Ack, Header};
use crate::net::lane::Job;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;

/// Work that is posted ends within this, or the lane has failed. NICs give up after half a second, some later, and
/// soft-RoCE never while its link is down.
const STALL: Duration = Duration::from_millis(600);
/// How long it sleeps at most while work is posted, so that a stall is seen in time.
const LOOK: Duration = Duration::from_millis(50);
/// How long it sleeps at most else.
const IDLE: Duration = Duration::from_secs(1);
/// It looks for so long again before it sleeps, if looking brought something lately: waking up takes as long.
const MAX_SPIN: Duration = Duration::from_micros(40);
/// How long it waits for the node loop to take in landings before it looks at the rest again.
const ROOM: Duration = Duration::from_millis(1);
/// The peer is sent a message when it has left writes unanswered and said nothing for so long: if it is gone, that
/// fails. The bytes of a write may all be there and its answer never come.
const PROBE: Duration = Duration::from_millis(150);
/// Messages that wait, at most: a peer that keeps the rules causes fewer.
const MAX_OUTBOX: usize = 1024;
/// Messages that are posted with one ring of the doorbell.
const MESSAGE_CHAIN: usize = 16;
/// The peer is told of receives when they are so many, if no message does anyway.
const CREDITS_DUE: u16 = (MESSAGE_RECEIVES / 2) as u16;

pub(super) struct Worker {
    lane: Arc<Lane>,
    session: Arc<dyn Session>,
    outgoing: Outgoing,
    incoming: Incoming,
    outbox: VecDeque<Message>,
    acks: Vec<Ack>,
    /// Messages that the peer has receives for.
    credits: u32,
    /// Receives that the peer was not told of.
    owed: u16,
    /// Of messages, as they were posted.
    chains: VecDeque<u32>,
    posted: u32,
    /// When the oldest posted messages were posted, or those before ended.
    since: Option<Instant>,
    /// When the peer was heard last, or probed.
    heard: Instant,
    spin: Duration,
}

/// Why the lane has failed.
type Fault = String;

impl Worker {
    pub(super) fn new(lane: Arc<Lane>, session: Arc<dyn Session>) -> Worker {
        let queues = lane.pairs.len() - 1;
        Worker {
            lane,
            session,
            outgoing: Outgoing::new(queues),
            // The peer counts a write as answered when the answer has come.
            incoming: Incoming::new(2 * MAX_FLYING),
            outbox: VecDeque::new(),
            acks: Vec::new(),
            credits: MESSAGE_RECEIVES,
            owed: 0,
            chains: VecDeque::new(),
            posted: 0,
            since: None,
            heard: Instant::now(),
            spin: Duration::ZERO,
        }
    }

    pub(super) fn run(mut self) {
        let early = self.lane.early().into_iter().try_for_each(|completion| self.ended(completion));
        let reason = early.err().unwrap_or_else(|| {
            loop {
                if let Some(reason) = self.lane.fault() {
                    break reason;
                }
                if let Err(reason) = self.turn() {
                    break reason;
                }
            }
        });
        // Nothing moves any more, whatever the session does next.
        self.lane.stop(&reason);
        if !self.lane.is_closed() {
            let reason = self.lane.fault().unwrap_or(reason);
            self.session.failed(&reason);
        }
    }

    /// Looks at everything once, and sleeps if there was nothing.
    fn turn(&mut self) -> Result<(), Fault> {
        let mut busy = self.look()?;
        if !busy && !self.spin.is_zero() {
            let until = Instant::now() + self.spin;
            while !busy && Instant::now() < until {
                std::hint::spin_loop();
                busy = self.look()?;
            }
            self.spin = if busy { MAX_SPIN } else { self.spin / 2 };
            if self.spin < Duration::from_micros(1) {
                self.spin = Duration::ZERO;
            }
        }
        if busy {
            return Ok(());
        }
        // What comes from here on rings.
        self.lane.falls_asleep();
        for queue in &self.lane.completions {
            queue.arm().map_err(|error| error.to_string())?;
        }
        if self.look()? {
            return Ok(());
        }
        let working = self.posted_since().is_some() || self.outgoing.unanswered() > 0;
        let before = Instant::now();
        self.lane.sleep(if working { LOOK } else { IDLE });
        // A short sleep is one that looking would have spared.
        if before.elapsed() < MAX_SPIN {
            self.spin = MAX_SPIN;
        }
        Ok(())
    }

    /// Whether anything was there.
    fn look(&mut self) -> Result<bool, Fault> {
        let mut ended: Vec<Completion> = Vec::new();
        let lane = Arc::clone(&self.lane);
        for queue in &lane.completions {
            queue.poll(&mut ended).map_err(|error| error.to_string())?;
        }
        let mut busy = !ended.is_empty();
        // A queue pair that broke ends all of its work: the first says why.
        for completion in ended {
            self.ended(completion)?;
        }
        busy |= self.report()?;
        for window in lane.closed_windows() {
            self.outbox.push_back(Message::Shut(window));
        }
        while self.outgoing.unanswered() < MAX_FLYING {
            let Some(job) = lane.next_job() else { break };
            busy = true;
            let taken = self.outgoing.take(job, &|memory, queue| registration(&lane, memory, queue));
            self.announce(taken)?;
        }
        let now = Instant::now();
        if self.outgoing.unanswered() == 0 {
            self.heard = now;
        } else if now.saturating_duration_since(self.heard) > PROBE && self.outbox.is_empty() {
            self.heard = now;
            self.outbox.push_back(Message::Credits);
        }
        busy |= self.send()?;
        for (at, pair) in lane.pairs[1..].iter().enumerate() {
            let post = |chain: &[Work<'_>]| {
                pair.queue.post(Kind::Bytes.id(0), chain).map_err(|error| error.to_string())
            };
            while self.outgoing.post(at, DATA_WORK as usize, now, post)? {
                busy = true;
            }
        }
        if let Some(since) = self.posted_since().filter(|since| now.saturating_duration_since(*since) > STALL)
        {
            return Err(format!("posted work has not ended for {:?}", now.saturating_duration_since(since)));
        }
        Ok(busy)
    }

    /// Since when there is work of some kind of which none has ended.
    fn posted_since(&self) -> Option<Instant> {
        [self.since, self.outgoing.stalled_since(), self.lane.binding_since()].into_iter().flatten().min()
    }

    fn ended(&mut self, completion: Completion) -> Result<(), Fault> {
        let Completion { id, queue_pair, ended } = completion;
        let lane = Arc::clone(&self.lane);
        let at = lane.pair(queue_pair).ok_or("work ended on a queue pair that is not the lane's")?;
        let again = |fault: &str| format!("the peer broke the rules: {fault}");
        match ended {
            Ended::Failed { status } => {
                let pair = &lane.pairs[at].queue;
                let (device, port) = (pair.device().name(), pair.port().number);
                return Err(format!(
                    "{} (queue pair {at}, port {port} of {device})",
                    Ended::describe(status)
                ));
            }
            Ended::Message(len) => {
                let mut bytes = Vec::new();
                lane.pairs[at].queue.message(id, len, &mut bytes);
                lane.pairs[at].queue.receive(id).map_err(|error| error.to_string())?;
                self.owed += 1;
                let envelope = Envelope::decode(&bytes).ok_or_else(|| again("a message cannot be read"))?;
                self.message(envelope)?;
            }
            Ended::Immediate(low) => {
                // Posted again before the write is answered: the peer counts on it.
                lane.pairs[at].queue.receive(id).map_err(|error| error.to_string())?;
                self.incoming.part(low).map_err(again)?;
            }
            Ended::Done => match Kind::of(id) {
                Some((Kind::Messages, _)) => {
                    self.posted -= self.chains.pop_front().unwrap_or(0);
                    self.since = (!self.chains.is_empty()).then(Instant::now);
                }
                Some((Kind::Bytes, _)) => {
                    let session = Arc::clone(&self.session);
                    self.outgoing
                        .done(at - 1, Instant::now(), |job, landed| settle(&lane, &*session, &job, landed));
                }
                Some((Kind::Bind, number)) => {
                    for (sequence, window, keys) in lane.bound(number) {
                        self.answer(sequence, window, keys);
                    }
                }
                Some((Kind::Invalidate, number)) => lane.invalidated(number),
                // Of the greeting.
                None => {}
            },
        }
        Ok(())
    }

    fn message(&mut self, Envelope { credits, message }: Envelope) -> Result<(), Fault> {
        let again = |fault: &str| format!("the peer broke the rules: {fault}");
        self.heard = Instant::now();
        self.credits += u32::from(credits);
        if self.credits > MESSAGE_RECEIVES {
            return Err(again("it has more receives than there are"));
        }
        let lane = Arc::clone(&self.lane);
        match message {
            Message::Ready => return Err(again("it greeted twice")),
            Message::Credits => {}
            Message::Write { header, parts } => {
                if (parts == 0) != (header.len == 0) {
                    return Err(again("a write has no parts"));
                }
                match self.session.arrived(&header) {
                    Arrival::Open(landing) => {
                        // An empty one needs no keys, and is nowhere.
                        let place =
                            if header.len == 0 { Some(false) } else { lane.announced(header.window.key) };
                        let Some(on_twin) = place else {
                            return Err("the peer writes a window that it was given no keys for".into());
                        };
                        self.incoming
                            .announced(Arrived { header, landing, on_twin }, parts)
                            .map_err(again)?;
                    }
                    arrival if header.len == 0 => {
                        let landed = matches!(arrival, Arrival::Landed);
                        self.acks.push(Ack { sequence: header.sequence, landed });
                    }
                    // Its bytes are on their way, and must not land: the other way refuses it by itself.
                    _ => return Err("the peer writes a window that is not open".into()),
                }
            }
            Message::Ask(header) => self.asked(header)?,
            Message::Keys { sequence, window, base, keys } => {
                let keys = Keys { base, keys };
                let region = |memory: &Arc<HostRegion>, queue| registration(&lane, memory, queue);
                let taken = self.outgoing.keys(sequence, window, keys, &region).map_err(again)?;
                self.announce(taken)?;
            }
            Message::Acks(acks) => {
                for ack in acks {
                    let session = &*self.session;
                    self.outgoing
                        .answered(ack, |job, landed| settle(&lane, session, &job, landed))
                        .map_err(again)?;
                }
            }
            Message::Shut(window) => self.outgoing.shut(window),
        }
        if self.outbox.len() + self.acks.len() > MAX_OUTBOX {
            return Err(again("it asks faster than it takes the answers"));
        }
        Ok(())
    }

    /// Announced before its bytes are posted, as a rule: then they find it known.
    fn announce(&mut self, taken: Taken) -> Result<(), Fault> {
        match taken {
            Taken::Announce(message) => self.outbox.push_back(message),
            Taken::Failed(reason) => return Err(reason),
        }
        Ok(())
    }

    /// A write of the peer's wants to know where to.
    fn asked(&mut self, header: Header) -> Result<(), Fault> {
        let sequence = header.sequence;
        let landing = match self.session.arrived(&header) {
            Arrival::Open(landing) => landing,
            arrival => {
                let landed = matches!(arrival, Arrival::Landed);
                self.acks.push(Ack { sequence, landed });
                return Ok(());
            }
        };
        let lane = Arc::clone(&self.lane);
        match lane.grant(&landing, sequence).map_err(|error| error.to_string())? {
            Granted::Now(keys) => self.answer(sequence, header.window.key, keys),
            Granted::Later => {}
            Granted::Refused => self.acks.push(Ack { sequence, landed: false }),
        }
        Ok(())
    }

    fn answer(&mut self, sequence: u64, window: u64, Keys { base, keys }: Keys) {
        self.outbox.push_back(Message::Keys { sequence, window, base, keys });
    }

    /// Reports what has come completely, as far as the node loop keeps up.
    fn report(&mut self) -> Result<bool, Fault> {
        let mut busy = false;
        while self.incoming.has_arrived() && self.session.wait_for_room(ROOM) {
            let Some(Arrived { header, landing, on_twin }) = self.incoming.next() else { break };
            busy = true;
            let landed = self.lane.unless_closed(|| self.session.land(&landing, &header, on_twin));
            let Some(landed) = landed else { return Err("closed by this node".into()) };
            let landed = landed.ok_or("the peer has too many writes that are not reported")?;
            if header.len > 0 {
                self.lane.finished(header.window.key);
            }
            self.acks.push(Ack { sequence: header.sequence, landed });
        }
        Ok(busy || self.incoming.has_arrived())
    }

    /// Sends messages, as far as the peer has receives for them.
    fn send(&mut self) -> Result<bool, Fault> {
        let mut sent = false;
        loop {
            let mut chain: Vec<Vec<u8>> = Vec::new();
            // The last receive is left to messages that bring some back: so neither side ever waits for the other.
            while chain.len() < MESSAGE_CHAIN && self.posted + (chain.len() as u32) < MESSAGE_WORK {
                let message = if self.credits > 1 && !self.acks.is_empty() {
                    let count = self.acks.len().min(MAX_ACKS);
                    Message::Acks(self.acks.drain(..count).collect())
                } else if self.credits > 1
                    && let Some(message) = self.outbox.pop_front()
                {
                    message
                } else if self.credits > 0 && self.owed >= CREDITS_DUE {
                    Message::Credits
                } else {
                    break;
                };
                self.credits -= 1;
                chain.push(Envelope { credits: std::mem::take(&mut self.owed), message }.encode());
            }
            if chain.is_empty() {
                return Ok(sent);
            }
            sent = true;
            let work: Vec<Work<'_>> = chain.iter().map(|bytes| Work::Send(bytes)).collect();
            let queue = &self.lane.pairs[0].queue;
            queue.post(Kind::Messages.id(0), &work).map_err(|error| error.to_string())?;
            self.posted += chain.len() as u32;
            self.chains.push_back(chain.len() as u32);
            self.since.get_or_insert_with(Instant::now);
        }
    }
}

/// The registration of memory with the device of a queue pair for bytes.
fn registration(lane: &Lane, memory: &Arc<HostRegion>, queue: usize) -> Result<Arc<MemoryRegion>, Fault> {
    let device = lane.pairs[1 + queue].queue.device();
    let registered = lane.registry.region(memory).and_then(|registered| registered.with(device));
    registered.map_err(|error| error.to_string())
}

fn settle(lane: &Lane, session: &dyn Session, job: &Job, landed: bool) {
    lane.unload(job.write.source.len());
    session.settle(job.sequence, landed);
}
