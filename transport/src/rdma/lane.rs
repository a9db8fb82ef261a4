//! A lane: its queue pairs, what other threads ask of it, and its end.

use super::adapter::{Adapter, Watcher};
use super::message::{Envelope, MESSAGE_BYTES, Message};
use super::offer::{End, Offer};
use super::registry::Registry;
use super::verbs::{
    AsyncEvent, Bell, Completion, CompletionQueue, Device, Ended, Local, Port, QueuePair, QueuePairLimits,
    Remote, VerbsError, Work, wait_readable,
};
use super::windows::Grants;
use super::worker::Worker;
use super::{MAX_DATA_PAIRS, Session};
use crate::net::lane::Job;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
#[cfg(feature = "cuda")]
use tandem_memory::HostRegion;

/// Writes that are under way at once; each takes at most one receive of each queue pair for bytes.
pub(super) const MAX_FLYING: usize = 64;
/// Messages that the peer may have sent and that were not taken in.
pub(super) const MESSAGE_RECEIVES: u32 = 256;
/// Messages that are posted and not known to be sent.
pub(super) const MESSAGE_WORK: u32 = 256;
/// Slices that are posted on a queue pair and not known to be done.
pub(super) const DATA_WORK: u32 = 64;
/// Bindings, and as many invalidations, that are posted on a queue pair and not known to be done. No more writes
/// than this ask at once.
pub(super) const WINDOW_WORK: u32 = MAX_FLYING as u32;
/// What the immediate of the first, empty write on each queue pair says.
const GREETING: u32 = 0x7a_11_d0_0d;

/// What posted work is, in the upper half of its id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum Kind {
    Messages = 1,
    Bytes = 2,
    Bind = 3,
    Invalidate = 4,
}

impl Kind {
    pub(super) fn id(self, number: u32) -> u64 {
        u64::from(self as u32) << 32 | u64::from(number)
    }

    pub(super) fn of(id: u64) -> Option<(Kind, u32)> {
        let kinds = [Kind::Messages, Kind::Bytes, Kind::Bind, Kind::Invalidate];
        kinds.into_iter().find(|kind| u64::from(*kind as u32) == id >> 32).map(|kind| (kind, id as u32))
    }
}

pub(super) struct Pair {
    pub(super) queue: QueuePair,
    /// Where its bytes begin to be numbered.
    packet: u32,
}

/// Several queue pairs with one peer. Locks are taken in this order: `gate`, the session's, `grants`; the others
/// alone.
pub(crate) struct Lane {
    /// The first is for messages, the others are for bytes.
    pub(super) pairs: Vec<Pair>,
    /// One for each device.
    pub(super) completions: Vec<Arc<CompletionQueue>>,
    /// What its devices know; keeps them watched.
    pub(super) registry: Arc<Registry>,
    /// Bounded by the session's limit of unreported writes.
    jobs: Mutex<VecDeque<Job>>,
    /// Bytes pushed and not settled, and one for each write.
    load: AtomicU64,
    /// What is open to the peer.
    pub(super) grants: Mutex<Grants>,
    /// Goes with `grants`: an invalidation is done, or the lane is over.
    pub(super) invalidated: Condvar,
    /// Open until the lane is closed; held while a landing is reported, so that none is after closing.
    gate: Mutex<bool>,
    /// Why it carries nothing any more.
    fault: Mutex<Option<String>>,
    /// What ended while the lane still waited for greetings, for the worker.
    early: Mutex<Vec<Completion>>,
    bell: Bell,
    /// Whether the bell must ring for the worker to see what is new.
    asleep: AtomicBool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two steps of a change to what these guard.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    /// Makes a queue pair on each of these ports.
    pub(super) fn new(
        rails: Vec<(Arc<Adapter>, Port)>,
        registry: &Arc<Registry>,
    ) -> Result<Arc<Lane>, VerbsError> {
        let mut queues: Vec<(Arc<Adapter>, Arc<CompletionQueue>)> = Vec::new();
        let mut pairs = Vec::new();
        for (adapter, port) in rails {
            let known = queues.iter().find(|(other, _)| Arc::ptr_eq(other, &adapter));
            let queue = match known {
                Some((_, queue)) => Arc::clone(queue),
                None => {
                    // All that can be posted on all queue pairs fits, so it never overruns.
                    let data = DATA_WORK + 2 * WINDOW_WORK + MAX_FLYING as u32 + 2;
                    let all = MESSAGE_RECEIVES + MESSAGE_WORK + 2 + MAX_DATA_PAIRS as u32 * data;
                    let queue = CompletionQueue::new(&adapter.device, all)?;
                    queues.push((Arc::clone(&adapter), Arc::clone(&queue)));
                    queue
                }
            };
            // One more of each for the greeting.
            let limits = if pairs.is_empty() {
                let message = MESSAGE_BYTES as u32;
                QueuePairLimits { work: MESSAGE_WORK + 1, receives: MESSAGE_RECEIVES + 1, message }
            } else {
                let work = DATA_WORK + 2 * WINDOW_WORK + 1;
                QueuePairLimits { work, receives: MAX_FLYING as u32 + 1, message: 0 }
            };
            let failed = |e| VerbsError::Refused {
                device: adapter.device.name().into(),
                what: "begin at a random packet",
                source: std::io::Error::other(e),
            };
            let packet = getrandom::u32().map_err(failed)? & 0xff_ffff;
            pairs.push(Pair { queue: QueuePair::new(&port, &queue, limits)?, packet });
        }
        let bell = Bell::new().map_err(|source| VerbsError::Refused {
            device: "the system".into(),
            what: "make a bell",
            source,
        })?;
        let lane = Arc::new(Lane {
            pairs,
            completions: queues.iter().map(|(_, queue)| Arc::clone(queue)).collect(),
            registry: Arc::clone(registry),
            jobs: Mutex::default(),
            load: AtomicU64::new(0),
            grants: Mutex::default(),
            invalidated: Condvar::new(),
            gate: Mutex::new(true),
            fault: Mutex::default(),
            early: Mutex::default(),
            bell,
            asleep: AtomicBool::new(false),
        });
        for (adapter, _) in queues {
            let watcher: Weak<Lane> = Arc::downgrade(&lane);
            adapter.watch(watcher);
        }
        Ok(lane)
    }

    /// What the peer connects to.
    pub(crate) fn offer(&self) -> Offer {
        let end = |pair: &Pair| {
            let port = pair.queue.port();
            let (number, packet) = (pair.queue.number(), pair.packet);
            End {
                link: port.link,
                remote: Remote { number, packet, lid: port.lid, gid: port.gid, mtu: port.mtu },
            }
        };
        Offer { ends: self.pairs.iter().map(end).collect() }
    }

    /// Connects to the peer's ends.
    pub(crate) fn connect(&self, peer: &Offer) -> Result<(), String> {
        if peer.ends.len() != self.pairs.len() {
            return Err(format!("the peer has {} queue pairs for our {}", peer.ends.len(), self.pairs.len()));
        }
        for (pair, end) in self.pairs.iter().zip(&peer.ends) {
            let own = pair.queue.port().link;
            if own != end.link {
                return Err(format!("the peer's port is on {:?}, ours on {own:?}", end.link));
            }
            pair.queue.connect(&end.remote, pair.packet).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Makes sure that every queue pair works in both directions. The side that was connected last, which knows
    /// that the other is ready, speaks first.
    pub(crate) fn greet(&self, speaks_first: bool, within: Duration) -> Result<(), String> {
        let deadline = Instant::now() + within;
        if speaks_first {
            self.say_hello()?;
        }
        let mut heard = vec![false; self.pairs.len()];
        let mut ended: Vec<Completion> = Vec::new();
        while heard.contains(&false) {
            for queue in &self.completions {
                queue.arm().map_err(|error| error.to_string())?;
                while queue.poll(&mut ended).map_err(|error| error.to_string())? {}
            }
            for completion in ended.drain(..) {
                let pair = self.pair(completion.queue_pair);
                match completion.ended {
                    Ended::Failed { status } => return Err(Ended::describe(status)),
                    // Of the own greeting.
                    Ended::Done => {}
                    Ended::Message(len) if pair == Some(0) && !heard[0] => {
                        let mut bytes = Vec::new();
                        self.pairs[0].queue.message(completion.id, len, &mut bytes);
                        let expected = Envelope { credits: 0, message: Message::Ready };
                        if Envelope::decode(&bytes) != Some(expected) {
                            return Err("the peer does not speak this build's language".into());
                        }
                        self.pairs[0].queue.receive(completion.id).map_err(|error| error.to_string())?;
                        heard[0] = true;
                    }
                    Ended::Immediate(GREETING) if pair.is_some_and(|pair| !heard[pair]) => {
                        let pair = pair.unwrap_or(0);
                        self.pairs[pair].queue.receive(completion.id).map_err(|error| error.to_string())?;
                        heard[pair] = true;
                    }
                    // The peer has heard everything, and begins. Bounded by the receives that are posted.
                    Ended::Message(_) | Ended::Immediate(_) if pair.is_some_and(|pair| heard[pair]) => {
                        lock(&self.early).push(completion);
                    }
                    Ended::Message(_) | Ended::Immediate(_) => {
                        return Err("the peer did not greet first".into());
                    }
                }
            }
            if heard.contains(&false) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let silent = heard.iter().filter(|heard| !**heard).count();
                    let all = heard.len();
                    return Err(format!(
                        "{silent} of {all} queue pairs are silent after {within:?}: is the peer's port in reach?"
                    ));
                }
                let fds: Vec<_> = self.completions.iter().map(|queue| queue.fd()).collect();
                wait_readable(&fds, left);
            }
        }
        if !speaks_first {
            self.say_hello()?;
        }
        Ok(())
    }

    fn say_hello(&self) -> Result<(), String> {
        let hello = Envelope { credits: 0, message: Message::Ready }.encode();
        let nothing = Local::EMPTY;
        for (at, pair) in self.pairs.iter().enumerate() {
            let work = match at {
                0 => Work::Send(&hello),
                _ => Work::Write { from: nothing, to: 0, key: 0, immediate: Some(GREETING) },
            };
            pair.queue.post(0, &[work]).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// What the lane's thread is to do, until the lane is closed or has failed.
    pub(super) fn work(self: &Arc<Self>, session: Arc<dyn Session>) -> impl FnOnce() + Send + 'static {
        let worker = Worker::new(Arc::clone(self), session);
        move || worker.run()
    }

    /// Takes a write. Never blocks.
    pub(crate) fn push(&self, job: Job) {
        // One more than its bytes, so that empty writes are spread too.
        self.load.fetch_add(job.write.source.len() as u64 + 1, Ordering::Relaxed);
        lock(&self.jobs).push_back(job);
        self.wake();
    }

    /// Whether it reads the twin of this memory: then it does so for every write that comes from it.
    #[cfg(feature = "cuda")]
    pub(crate) fn reads_twin(&self, memory: &Arc<HostRegion>) -> bool {
        self.registry.known(memory).is_some_and(|registered| registered.is_on_twin())
    }

    /// Bytes pushed and not settled.
    pub(crate) fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    pub(super) fn unload(&self, bytes: usize) {
        self.load.fetch_sub(bytes as u64 + 1, Ordering::Relaxed);
    }

    pub(super) fn early(&self) -> Vec<Completion> {
        std::mem::take(&mut lock(&self.early))
    }

    pub(super) fn next_job(&self) -> Option<Job> {
        lock(&self.jobs).pop_front()
    }

    /// When it returns, nothing lands here through this lane any more, no landing is reported, and no source is read
    /// for it.
    pub(crate) fn close(&self) {
        *lock(&self.gate) = false;
        self.stop("closed by this node");
        lock(&self.jobs).clear();
    }

    /// Runs `report` unless the lane is closed: whoever closes it waits for that.
    pub(super) fn unless_closed<T>(&self, report: impl FnOnce() -> T) -> Option<T> {
        let open = lock(&self.gate);
        open.then(report)
    }

    pub(super) fn is_closed(&self) -> bool {
        !*lock(&self.gate)
    }

    /// Nothing moves any more when it returns. The first reason stays.
    pub(super) fn stop(&self, reason: &str) {
        lock(&self.fault).get_or_insert_with(|| reason.into());
        for pair in &self.pairs {
            pair.queue.stop();
        }
        // Whoever waits for an invalidation has what it wants.
        drop(lock(&self.grants));
        self.invalidated.notify_all();
        self.bell.ring();
    }

    pub(super) fn fault(&self) -> Option<String> {
        lock(&self.fault).clone()
    }

    pub(super) fn pair(&self, number: u32) -> Option<usize> {
        self.pairs.iter().position(|pair| pair.queue.number() == number)
    }

    /// Makes the worker look for what is new.
    pub(super) fn wake(&self) {
        if self.asleep.swap(false, Ordering::AcqRel) {
            self.bell.ring();
        }
    }

    /// Announced before the worker looks for the last time.
    pub(super) fn falls_asleep(&self) {
        self.asleep.store(true, Ordering::Release);
        // What others wrote before they looked whether it sleeps is seen now.
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    pub(super) fn sleep(&self, within: Duration) {
        let mut fds: Vec<_> = self.completions.iter().map(|queue| queue.fd()).collect();
        fds.push(self.bell.fd());
        wait_readable(&fds, within);
        self.asleep.store(false, Ordering::Release);
        self.bell.silence();
    }

    /// Makes a queue pair break, as a fault of the network would.
    #[cfg(test)]
    pub(super) fn break_pair(&self, pair: usize) {
        self.pairs[pair].queue.fail();
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Queue pairs stop before memory windows are freed, so that nothing lands, and those are freed before the
        // queue pairs that they are bound to: soft-RoCE never ends destroying one that is.
        self.stop("not used any more");
        *lock(&self.grants) = Grants::default();
    }
}

impl Watcher for Lane {
    fn happened(&self, device: &Device, event: AsyncEvent) {
        let concerned =
            |pair: &&Pair| std::ptr::eq(Arc::as_ptr(pair.queue.device()), std::ptr::from_ref(device));
        let mut pairs = self.pairs.iter().filter(concerned);
        let reason = match event {
            AsyncEvent::QueuePair(number) => {
                pairs.find(|pair| pair.queue.number() == number).map(|_| "a queue pair broke".to_owned())
            }
            AsyncEvent::Port(number) => {
                pairs.find(|pair| pair.queue.port().number == number).and_then(|pair| {
                    match device.port(number) {
                        Ok(port)
                            if port.gid == pair.queue.port().gid && port.lid == pair.queue.port().lid =>
                        {
                            None
                        }
                        Ok(_) => Some(format!("port {number} of {} has another address now", device.name())),
                        Err(error) => Some(error.to_string()),
                    }
                })
            }
            AsyncEvent::Fatal => pairs.next().map(|_| format!("{} has failed", device.name())),
            AsyncEvent::Other => None,
        };
        if let Some(reason) = reason {
            self.stop(&reason);
        }
    }
}
