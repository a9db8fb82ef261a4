//! The lane as its threads and the life see it.

use super::frame::{Frame, MAX_ACKS};
use super::incoming::Incoming;
use super::join::Joined;
use super::outgoing::Outgoing;
use super::receive::{At, Receiver};
use super::send::Sender;
use super::{MAX_TURNS, TlsError};
use crate::net::NetConfig;
use crate::net::header::{ACK_BYTES, Ack};
use crate::net::lane::{Job, Lane, LaneId, Path};
use crate::net::life::Life;
use crate::net::node::Node;
use socket2::{SockRef, TcpKeepalive};
use std::collections::{BTreeMap, VecDeque};
use std::net::{Shutdown, TcpStream};
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a thread waits at most before it looks around.
pub(super) const TICK: Duration = Duration::from_secs(1);
/// How long nothing may move in the middle of something. Whether the peer lives is the session's to notice, and
/// fast; this is for networks that carry the session and not this. So it bears a peer whose node loop is busy.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Answers that wait to be sent, at most: a peer that writes must read them.
const MAX_ANSWERS: usize = 1 << 16;
/// No write has this sequence number.
const NONE: u64 = u64::MAX;

/// Locks are taken in this order: a gate, then a life's state or a window. `queue` and `sent` are held for single
/// operations only, also under a life's state.
pub(super) struct TlsLane {
    id: LaneId,
    pub(super) socket: TcpStream,
    queue: Mutex<Queue>,
    more: Condvar,
    /// Bytes pushed and not settled.
    load: AtomicU64,
    /// The gate of sources: held while one is read; true once that is over for good.
    sources: Mutex<bool>,
    /// The gate of landings: held while bytes land or are reported; true once that is over for good.
    landings: Mutex<bool>,
    /// Sealed, wholly or until the peer wished no more, and not answered: sequence → bytes. Their sources are
    /// not read any more.
    sent: Mutex<BTreeMap<u64, u64>>,
    /// The write of which the peer wants no more.
    unwanted: AtomicU64,
    /// For the threads, until they are started.
    halves: Mutex<Option<(Incoming, Outgoing)>>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    answers: Answers,
    closed: bool,
}

/// What the reading threads have the writing ones say.
#[derive(Default)]
pub(super) struct Answers {
    /// Encoded.
    acks: Vec<u8>,
    /// Bytes of them that have been said.
    said: usize,
    /// Writes of the peer's of which no more is wanted.
    stops: VecDeque<u64>,
}

/// What a writing thread is to do next.
pub(super) enum Work {
    Closed,
    /// Nothing for now.
    Rest,
    Do(Answers, Option<Job>),
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each of these guards single operations, or a turn that knows whether it broke.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many threads take turns at each direction of a connection.
fn turns(config: &NetConfig) -> usize {
    config.tls_turns.unwrap_or_else(|| {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = 2 * MAX_TURNS * config.tls_connections;
        if 2 * threads <= cores { MAX_TURNS } else { 1 }
    })
}

/// One more than its bytes, so that empty writes are spread too.
fn load_of(len: u64) -> u64 {
    len + 1
}

impl TlsLane {
    pub(super) fn new(id: LaneId, joined: Joined) -> Result<Arc<TlsLane>, TlsError> {
        let Joined { socket, incoming, outgoing } = joined;
        let options = SockRef::from(&socket);
        options.set_tcp_keepalive(&TcpKeepalive::new().with_time(PATIENCE).with_interval(PATIENCE / 4))?;
        options.set_tcp_user_timeout(Some(PATIENCE))?;
        Ok(Arc::new(TlsLane {
            id,
            socket,
            queue: Mutex::default(),
            more: Condvar::new(),
            load: AtomicU64::new(0),
            sources: Mutex::new(false),
            landings: Mutex::new(false),
            sent: Mutex::default(),
            unwanted: AtomicU64::new(NONE),
            halves: Mutex::new(Some((incoming, outgoing))),
        }))
    }

    /// Runs `say` with what sends, unless the lane has been started.
    pub(super) fn before_start(
        &self,
        say: impl FnOnce(&TcpStream, &mut Outgoing) -> Result<(), TlsError>,
    ) -> Result<(), TlsError> {
        match &mut *lock(&self.halves) {
            Some((_, outgoing)) => say(&self.socket, outgoing),
            None => Ok(()),
        }
    }

    fn run(
        self: &Arc<Self>,
        name: &str,
        node: &Arc<Node>,
        life: &Arc<Life>,
        work: impl FnOnce(&TlsLane, &Arc<Node>, &Arc<Life>) -> Result<(), TlsError> + Send + 'static,
    ) {
        let (lane, own, life_of_thread) = (Arc::clone(self), Arc::clone(node), Arc::clone(life));
        let spawned = node.spawn(format!("{name}-{}", life.peer), move || {
            let outcome = work(&lane, &own, &life_of_thread);
            if let Err(error) = outcome
                && !lane.is_closed()
            {
                own.lane_failed(&life_of_thread, &*lane, &error.to_string());
            }
        });
        if let Err(error) = spawned {
            node.lane_failed(life, &**self, &format!("no thread for it: {error}"));
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }

    /// What to send next; waits for it if `wait`.
    pub(super) fn next_work(&self, wait: bool) -> Work {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return Work::Closed;
            }
            if !queue.jobs.is_empty() || !queue.answers.is_empty() {
                let job = queue.jobs.pop_front();
                return Work::Do(std::mem::take(&mut queue.answers), job);
            }
            if !wait {
                return Work::Rest;
            }
            queue = self.more.wait_timeout(queue, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What is to be said even in the middle of a write.
    pub(super) fn take_answers(&self) -> Answers {
        std::mem::take(&mut lock(&self.queue).answers)
    }

    /// Runs `seal`, which reads a source, unless that is over.
    pub(super) fn with_source(&self, seal: impl FnOnce() -> Result<(), TlsError>) -> Result<(), TlsError> {
        let over = lock(&self.sources);
        if *over { Err(TlsError::Closed) } else { seal() }
    }

    /// Runs `land`, which writes into a window or reports that, unless that is over.
    pub(super) fn with_landing<T>(&self, land: impl FnOnce() -> Result<T, TlsError>) -> Result<T, TlsError> {
        let over = lock(&self.landings);
        if *over { Err(TlsError::Closed) } else { land() }
    }

    /// All of a write is sealed that will be. To be called before the last of it is sent.
    pub(super) fn sealed(&self, sequence: u64, len: u64) {
        lock(&self.sent).insert(sequence, len);
    }

    /// The peer told the fate of a write, which must have been sealed.
    pub(super) fn answered(&self, sequence: u64) -> Result<(), TlsError> {
        let len = lock(&self.sent)
            .remove(&sequence)
            .ok_or(TlsError::Rule("it acknowledged a write that it cannot have received"))?;
        self.load.fetch_sub(load_of(len), Ordering::Relaxed);
        Ok(())
    }

    /// To be followed by [`TlsLane::send_answers`], sooner or later.
    pub(super) fn acknowledge(&self, ack: Ack) -> Result<(), TlsError> {
        self.answer(|answers| answers.acks.extend_from_slice(&ack.encode()))
    }

    /// Tells the peer that the rest of its write is not wanted. As [`TlsLane::acknowledge`].
    pub(super) fn stop(&self, sequence: u64) -> Result<(), TlsError> {
        self.answer(|answers| answers.stops.push_back(sequence))
    }

    fn answer(&self, put: impl FnOnce(&mut Answers)) -> Result<(), TlsError> {
        let mut queue = lock(&self.queue);
        let answers = &mut queue.answers;
        put(answers);
        if answers.acks.len() > MAX_ANSWERS * ACK_BYTES || answers.stops.len() > MAX_ANSWERS {
            return Err(TlsError::Rule("it writes without reading what is answered"));
        }
        Ok(())
    }

    /// Has a writing thread send what was answered.
    pub(super) fn send_answers(&self) {
        self.more.notify_one();
    }

    pub(super) fn set_unwanted(&self, sequence: u64) {
        self.unwanted.store(sequence, Ordering::Relaxed);
    }

    pub(super) fn is_unwanted(&self, sequence: u64) -> bool {
        self.unwanted.load(Ordering::Relaxed) == sequence
    }
}

impl Lane for TlsLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn path(&self) -> Path {
        Path::Tls
    }

    fn push(&self, job: Job) {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return;
        }
        self.load.fetch_add(load_of(job.write.source.len() as u64), Ordering::Relaxed);
        queue.jobs.push_back(job);
        drop(queue);
        self.more.notify_one();
    }

    fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    fn start(self: Arc<Self>, node: &Arc<Node>, life: &Arc<Life>) {
        let Some((incoming, outgoing)) = lock(&self.halves).take() else { return };
        let timeouts = self.socket.set_read_timeout(Some(TICK));
        if let Err(error) = timeouts.and_then(|()| self.socket.set_write_timeout(Some(PATIENCE))) {
            return node.lane_failed(life, &*self, &error.to_string());
        }
        let sender = Arc::new(Sender::new(outgoing));
        let receiver = Arc::new(Receiver::new(incoming));
        for turn in 0..turns(&node.config) {
            let sender = Arc::clone(&sender);
            self.run(&format!("tls-out-{turn}"), node, life, move |lane, _, _| sender.run(lane));
            let receiver = Arc::clone(&receiver);
            self.run(&format!("tls-in-{turn}"), node, life, move |lane, node, life| {
                receiver.run(At { lane, node, life })
            });
        }
    }

    fn close(&self, _reason: &str) {
        {
            let mut queue = lock(&self.queue);
            queue.closed = true;
            queue.jobs.clear();
        }
        self.more.notify_all();
        *lock(&self.sources) = true;
        *lock(&self.landings) = true;
        // Wakes both threads; fails if the connection is gone already. Only now: the peer sees it, and repeats
        // elsewhere what a piece that was still landing here would spoil.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Answers {
    pub(super) fn is_empty(&self) -> bool {
        self.said == self.acks.len() && self.stops.is_empty()
    }

    /// What is to be said first: as many acknowledgements as a frame holds at a time.
    pub(super) fn first(&self) -> Option<Frame<'_>> {
        let acks = self.acks[self.said..].chunks(MAX_ACKS * ACK_BYTES).next();
        acks.map(Frame::Acks).or_else(|| self.stops.front().copied().map(Frame::Stop))
    }

    pub(super) fn drop_first(&mut self) {
        match self.first() {
            Some(Frame::Acks(said)) => self.said += said.len(),
            _ => drop(self.stops.pop_front()),
        }
    }
}
