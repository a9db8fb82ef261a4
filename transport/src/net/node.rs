//! What the node loop and the threads share: peers, windows, and events on their way to `poll`.

use super::counters::{PathCounters, PeerCounters, PeerStatus, RdmaMemory, Settled, add};
use super::header::Header;
use super::lane::{Generation, Lane, LaneId, Path};
use super::life::{Life, MAX_PARTS, Moved, Phase, Remains};
use super::{NetConfig, NetMetrics};
use crate::endpoint::{BindError, Bound};
use crate::events::EventQueue;
use crate::handshake::{
    Choice, CloseCode, Exchange, HandshakeError, Hello, MAX_PORTS, Offers, Standing, admits,
};
use crate::identity::Identity;
use crate::quic::Link;
#[cfg(feature = "rdma")]
use crate::rdma::{Answered, Offered, Rdma, RdmaConfig};
use crate::rng::Rng;
use crate::transport::{Event, FailReason, Held, RegionId, SeverReason, SubmitError, TransportError, Write};
use crate::twin::Fetches;
use crate::window::Windows;
use crate::{nccl, shm, tls};
use quinn::Connection;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
#[cfg(feature = "cuda")]
use tandem_memory::cuda::Device;
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Window;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::timeout;

/// Ended lives that are remembered, to tell a peer which one is over.
const MAX_REMEMBERED: usize = 4096;
/// How long a peer whose life has ended is still told of, so that what was counted last is seen, and how many such.
const TOLD_FOR: Duration = Duration::from_secs(300);
const MAX_TOLD: usize = 64;
/// How long stopping waits for communicators to end.
#[cfg(feature = "cuda")]
const LAST_WORK: Duration = Duration::from_secs(2);
/// The answerer of a life has so many times as long as connecting may take to make its part of new lanes.
const REMAKING: u32 = 3;

/// A thread with its socket.
pub(super) struct Worker {
    pub(super) runtime: Handle,
    pub(super) bound: Bound,
    pub(super) addr: SocketAddr,
}

/// Locks are taken in this order: `peers`, a life's state, a window, `outbox`.
pub(crate) struct Node {
    local: NodeId,
    /// Tells peers that it is the node `local`.
    nonce: u64,
    pub(crate) config: NetConfig,
    pub(crate) windows: Windows,
    workers: Vec<Worker>,
    peers: Mutex<BTreeMap<NodeId, Peer>>,
    outbox: Mutex<Outbox>,
    polled: Notify,
    /// As `polled`, for threads that wait. Goes with `outbox`.
    polled_too: Condvar,
    /// Takes the shared memory lanes of processes of this host; none if it cannot be had.
    shm: Option<shm::Listener>,
    /// Takes TLS connections; none if it cannot be had.
    tls: Option<tls::Listener>,
    /// The RDMA devices of this host; none if there are none.
    #[cfg(feature = "rdma")]
    rdma: Option<Arc<Rdma>>,
    /// What lanes over NCCL need; none if they cannot be had.
    #[cfg(feature = "cuda")]
    nccl: Option<nccl::Here>,
    /// Writes that wait for bytes from a GPU.
    pub(crate) fetches: Fetches,
    /// Threads of lanes, and the one that takes them.
    threads: Mutex<Vec<JoinHandle<()>>>,
    keys: Mutex<Rng>,
    counters: Counters,
}

#[derive(Default)]
struct Outbox {
    events: EventQueue,
    waker: Option<Waker>,
    /// It was woken, and has not polled since.
    woken: bool,
}

#[derive(Default)]
struct Peer {
    state: State,
    /// The life that ended last.
    last_ended: u64,
    /// When, and why.
    ended: Option<(Instant, SeverReason)>,
    counters: Arc<PeerCounters>,
    /// `connect` was called and not answered.
    asked: bool,
}

#[derive(Default)]
enum State {
    #[default]
    Nothing,
    Dialling {
        life: u64,
        confirmed: bool,
    },
    Life(Arc<Life>),
}

#[derive(Default)]
struct Counters {
    paths: [PathCounters; Path::ALL.len()],
    /// Of connections that are over.
    packets_sent: AtomicU64,
    packets_lost: AtomicU64,
    connected: AtomicU64,
    severed_asked: AtomicU64,
    severed_lost: AtomicU64,
    unreachable: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two steps of a change to what these guard.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a peer is reached.
struct Way {
    /// As it was given.
    addr: SocketAddr,
    /// The port of the peer's first socket, as the peer says.
    first_port: Option<u16>,
}

impl Way {
    /// The address that was given may be mapped; the first socket is reached as given.
    fn to(&self, port: u16) -> SocketAddr {
        let port = if self.first_port == Some(port) { self.addr.port() } else { port };
        SocketAddr::new(self.addr.ip(), port)
    }
}

/// Why a dial came to nothing.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("{0}")]
    Connect(#[from] quinn::ConnectError),
    #[error("{0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    #[error("{0} answers there")]
    OtherNode(NodeId),
    #[error("it refused one of the connections")]
    Refused,
    #[error("{0}")]
    NoPath(String),
    #[error("the transport is stopping")]
    Stopping,
}

/// What came of making lanes.
#[derive(Default)]
struct Made {
    /// The path that there is now.
    path: Option<Path>,
    /// Why it is no better one.
    why: String,
    /// The best path that did not come about for a reason that may pass.
    hope: Option<Path>,
}

impl Made {
    /// Paths are tried in their order, the best first.
    fn note(&mut self, path: Path, made: Result<(), NoLane>) {
        match made {
            Ok(()) => self.path = Some(path),
            Err(NoLane { why, may_pass }) => {
                let separator = if self.why.is_empty() { "" } else { "; " };
                self.why.push_str(&format!("{separator}{path}: {why}"));
                self.hope = self.hope.or(may_pass.then_some(path));
            }
        }
    }
}

/// Why a lane did not come about.
struct NoLane {
    why: String,
    /// Whether it may come about later in the same session.
    may_pass: bool,
}

impl From<shm::Error> for NoLane {
    fn from(error: shm::Error) -> NoLane {
        NoLane { may_pass: error.may_pass(), why: error.to_string() }
    }
}

impl From<tls::TlsError> for NoLane {
    fn from(error: tls::TlsError) -> NoLane {
        NoLane { may_pass: error.may_pass(), why: error.to_string() }
    }
}

#[cfg(feature = "cuda")]
impl From<nccl::Error> for NoLane {
    fn from(error: nccl::Error) -> NoLane {
        NoLane { may_pass: error.may_pass(), why: error.to_string() }
    }
}

/// NCCL, if it is wanted and to be had. Says why it is not; as the only path it must be there.
#[cfg(feature = "cuda")]
fn nccl(config: &NetConfig) -> Result<Option<nccl::Here>, BindError> {
    match nccl::Here::open(config) {
        Ok(here) => Ok(here),
        Err(error) if config.paths != [Path::Nccl] => {
            tracing::info!(%error, "no NCCL");
            Ok(None)
        }
        Err(error) => Err(BindError::Nccl(error.to_string())),
    }
}

/// Makes queue pairs, or waits for what they say, on a thread that may wait.
#[cfg(feature = "rdma")]
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err("the transport is stopping".into()))
}

/// The devices that are wanted, if there are any. Says which, or why there are none; those that were named must be
/// there, and one if there is no other path.
#[cfg(feature = "rdma")]
fn rdma_devices(config: &NetConfig) -> Result<Option<Arc<Rdma>>, BindError> {
    if !config.paths.contains(&Path::Rdma) {
        return Ok(None);
    }
    match Rdma::open(RdmaConfig { devices: config.rdma_devices.clone(), ..RdmaConfig::default() }) {
        Ok(rdma) => Ok(Some(Arc::new(rdma))),
        Err(error) if config.rdma_devices.is_empty() && config.paths != [Path::Rdma] => {
            tracing::info!(%error, "no RDMA");
            Ok(None)
        }
        Err(error) => Err(BindError::Rdma(error.to_string())),
    }
}

impl Node {
    pub(super) fn new(
        identity: &Identity,
        config: NetConfig,
        workers: Vec<Worker>,
        shm: Option<shm::Listener>,
        tls: Option<tls::Listener>,
        seed: u64,
    ) -> Result<Node, BindError> {
        Ok(Node {
            local: identity.node(),
            nonce: identity.nonce(),
            windows: Windows::default(),
            workers,
            peers: Mutex::default(),
            outbox: Mutex::default(),
            polled: Notify::new(),
            polled_too: Condvar::new(),
            shm,
            tls,
            #[cfg(feature = "rdma")]
            rdma: rdma_devices(&config)?,
            #[cfg(feature = "cuda")]
            nccl: nccl(&config)?,
            config,
            fetches: Fetches::default(),
            threads: Mutex::default(),
            keys: Mutex::new(Rng::new(seed)),
            counters: Counters::default(),
        })
    }

    /// Starts a thread that ends with its lane or with the node.
    pub(crate) fn spawn(&self, name: String, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let thread = std::thread::Builder::new().name(name).spawn(run)?;
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Ends every life, and waits for the threads that this ends.
    pub(super) fn stop(&self) {
        if let Some(listener) = &self.shm {
            listener.stop();
        }
        if let Some(listener) = &self.tls {
            listener.stop();
        }
        let lives = self.lives();
        for life in lives {
            self.end(&mut lock(&self.peers), &life, SeverReason::Asked);
        }
        self.fetches.stop();
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
        #[cfg(feature = "cuda")]
        if self.nccl.is_some() {
            nccl::until_ended(LAST_WORK);
        }
    }

    fn lives(&self) -> Vec<Arc<Life>> {
        let of =
            |peer: &Peer| if let State::Life(life) = &peer.state { Some(Arc::clone(life)) } else { None };
        lock(&self.peers).values().filter_map(of).collect()
    }

    pub(super) fn held(&self) -> Held {
        let lives = self.lives();
        Held {
            windows: self.windows.open_count(),
            peers: lives.len(),
            writes: lives.iter().map(|life| life.unreported()).sum(),
            connections: self.workers.iter().map(|worker| worker.bound.endpoint.open_connections()).sum(),
        }
    }

    pub(super) fn fail_path(&self, peer: NodeId, path: Path) {
        for life in self.lives().iter().filter(|life| life.peer == peer) {
            for lane in life.lanes_of(path) {
                self.lane_failed(life, &*lane, "a test wants it so");
            }
        }
    }

    pub(super) fn path(&self, peer: NodeId) -> Option<Path> {
        match &lock(&self.peers).get(&peer)?.state {
            State::Life(life) => life.path(),
            _ => None,
        }
    }

    pub(super) fn register(&self, region: Arc<HostRegion>) -> Result<RegionId, TransportError> {
        #[cfg(feature = "rdma")]
        if let Some(rdma) = self.rdma.clone() {
            // Ahead of its first use, which would wait for it.
            let region = Arc::clone(&region);
            let register = move || {
                if let Err(error) = rdma.register(&region) {
                    tracing::warn!(%error, "memory is not for RDMA: writes to it take another path");
                }
            };
            if let Err(error) = self.spawn("rdma-register".into(), register) {
                tracing::warn!(%error, "memory is registered with RDMA devices when it is used first");
            }
        }
        self.windows.register(region)
    }

    fn rdma_memory(&self) -> Option<RdmaMemory> {
        #[cfg(feature = "rdma")]
        if let Some(rdma) = &self.rdma {
            return Some(rdma.memory());
        }
        None
    }

    /// The GPU that lanes read and write, if there is one.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> Option<&Arc<Device>> {
        self.config.gpu.as_ref()
    }

    fn gpu_offer(&self) -> Option<shm::GpuOffer> {
        #[cfg(feature = "cuda")]
        if let (Some(gpu), Some(listener)) = (self.gpu(), &self.shm) {
            return Some(shm::GpuOffer { socket: listener.offer(), gpu: gpu.id() });
        }
        None
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn nccl(&self) -> Option<&nccl::Here> {
        self.nccl.as_ref()
    }

    fn nccl_offer(&self) -> Option<nccl::Offer> {
        #[cfg(feature = "cuda")]
        if let (Some(here), Some(listener)) = (&self.nccl, &self.tls) {
            return Some(here.offer(listener.port()));
        }
        None
    }

    pub(super) fn open_window(
        &self,
        peer: NodeId,
        region: RegionId,
        range: Range<usize>,
    ) -> Result<Window, TransportError> {
        self.windows.open(peer, region, range, || lock(&self.keys).next())
    }

    pub(super) fn close_window(&self, window: Window) {
        self.windows.close(window.key);
        lock(&self.outbox).events.forget_landed(window.key);
    }

    pub(super) fn submit(&self, peer: NodeId, write: Write) -> Result<(), SubmitError> {
        write.check_bounds()?;
        let life = match lock(&self.peers).get(&peer) {
            Some(Peer { state: State::Life(life), .. }) => Arc::clone(life),
            _ => return Err(SubmitError::NotConnected { peer }),
        };
        life.submit(write, self.config.write_limit, &self.fetches)
    }

    pub(super) fn poll(&self, events: &mut Vec<Event>) {
        loop {
            // Not in the loop's condition: the lock would be held while windows close, and whoever lands
            // bytes holds a window and waits for this lock.
            let severed = {
                let mut outbox = lock(&self.outbox);
                outbox.woken = false;
                outbox.events.drain(events)
            };
            let Some(severed) = severed else { break };
            self.windows.close_all_of(severed);
            lock(&self.outbox).events.forget_landed_of(severed);
        }
        self.polled.notify_waiters();
        self.polled_too.notify_all();
    }

    /// Waits until the node loop keeps up with the events.
    pub(crate) async fn until_polled(&self) {
        loop {
            let polled = self.polled.notified();
            tokio::pin!(polled);
            polled.as_mut().enable();
            if !self.is_full() {
                return;
            }
            polled.await;
        }
    }

    /// Whether there are as many events as there may be. Then the node loop is woken: who waits for it may be who would
    /// have told it of some later.
    fn is_full(&self) -> bool {
        let outbox = lock(&self.outbox);
        let full = outbox.events.len() >= self.config.event_limit;
        if full {
            Node::wake_with(outbox);
        }
        full
    }

    /// As [`Node::until_polled`], for a thread; false if that takes longer than `at_most`.
    pub(crate) fn wait_until_polled(&self, at_most: Duration) -> bool {
        if !self.is_full() {
            return true;
        }
        let outbox = lock(&self.outbox);
        let full = |outbox: &mut Outbox| outbox.events.len() >= self.config.event_limit;
        let waited = self.polled_too.wait_timeout_while(outbox, at_most, full);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    pub(super) fn set_waker(&self, waker: Waker) {
        let mut outbox = lock(&self.outbox);
        let due = !outbox.events.is_empty();
        outbox.woken = due;
        outbox.waker = Some(waker.clone());
        drop(outbox);
        if due {
            waker.wake();
        }
    }

    fn report(&self, fill: impl FnOnce(&mut EventQueue)) {
        let mut outbox = lock(&self.outbox);
        fill(&mut outbox.events);
        Node::wake_with(outbox);
    }

    /// Wakes the node loop if there is something that it does not know of.
    pub(crate) fn wake(&self) {
        Node::wake_with(lock(&self.outbox));
    }

    fn wake_with(mut outbox: MutexGuard<'_, Outbox>) {
        if outbox.woken || outbox.events.is_empty() {
            return;
        }
        outbox.woken = outbox.waker.is_some();
        let waker = outbox.waker.clone();
        drop(outbox);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The caller wakes the node loop, now or when it has more to tell: each time is a switch of threads.
    pub(crate) fn report_landed_quietly(&self, peer: NodeId, immediate: u32, len: u64, key: u64) {
        lock(&self.outbox).events.push_landed(peer, immediate, len, key);
    }

    /// The fates of a lane's writes are known, by number and whether they landed. The caller wakes the node loop, now or
    /// when it has more to tell.
    pub(crate) fn settle_quietly(&self, life: &Life, lane: &dyn Lane, fates: &[(u64, bool)]) -> Settled {
        let settled = life.settle(lane.id(), fates, |reports| {
            let mut outbox = lock(&self.outbox);
            reports.for_each(|event| outbox.events.push(event));
        });
        if settled.writes() > 0 {
            self.count(life, lane.path(), |counters| counters.settled(&settled));
        }
        settled
    }

    /// Counts something with a peer, and with all.
    fn count(&self, life: &Life, path: Path, count: impl Fn(&PathCounters)) {
        count(&self.counters.paths[path as usize]);
        count(&life.counters.paths[path as usize]);
    }

    pub(crate) fn count_landed(&self, life: &Life, path: Path, bytes: u64) {
        self.count(life, path, |counters| counters.landed(bytes));
    }

    /// A write of the peer's is not wanted: no such window is open for it.
    pub(crate) fn note_refused(&self, life: &Life, path: Path, header: &Header) {
        self.count(life, path, |counters| add(&counters.landings_refused, 1));
        // Ordinary where windows are closed under writes; else a peer that claims what it was not granted.
        let Header { window, offset, len, .. } = header;
        tracing::debug!(peer = %life.peer, ?window, offset, len, "write refused: no such window is open for its writer");
    }

    /// A lane carries nothing any more, and its generation with it: what they have not settled goes another way, and
    /// if there is none, the life is over.
    pub(crate) fn lane_failed(&self, life: &Life, lane: &dyn Lane, reason: &str) {
        lane.close(reason);
        self.generation_failed(life, lane.id().generation, lane.path(), reason);
    }

    fn generation_failed(&self, life: &Life, generation: Generation, path: Path, reason: &str) {
        for lane in life.fail(generation) {
            lane.close(reason);
        }
        let peer = life.peer;
        match life.leave(generation, &format!("{path} failed: {reason}"), &self.fetches) {
            Moved::Nothing => {}
            Moved::Repeated { lanes, writes } => {
                let now = life.path().map_or("none", Path::name);
                tracing::warn!(%peer, %path, reason, writes, now, "path failed; repeating what it had not delivered");
                self.count(life, path, |counters| {
                    add(&counters.failed, lanes as u64);
                    add(&counters.writes_repeated, writes as u64);
                });
            }
            Moved::NoneLeft { lanes } => {
                self.count(life, path, |counters| add(&counters.failed, lanes as u64));
                tracing::warn!(%peer, %path, reason, "path failed, and there is no other");
                let reason = SeverReason::Lost(format!("{path}: {reason}"));
                self.end(&mut lock(&self.peers), life, reason);
            }
        }
    }

    /// The peer says that lanes beside QUIC, up to this generation, have failed for it. When this says true, nothing
    /// lands by them any more, so that what is repeated may land. When it says false the life is over: its lanes are
    /// being closed by whoever ended it, and one may still land its last piece.
    #[must_use]
    pub(crate) fn failed_at_peer(&self, life: &Life, generation: Generation) -> bool {
        let path = life.fail(generation).first().map(|lane| lane.path());
        if let Some(path) = path {
            self.generation_failed(life, generation, path, "failed at the peer");
        }
        // Asked last: a life that goes on now had all of its lanes above.
        life.phase() != Phase::Ended
    }

    pub(super) fn metrics(&self) -> NetMetrics {
        let c = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let lives = self.lives();
        let mut queued = [(0, 0); Path::ALL.len()];
        for of_life in lives.iter().map(|life| life.queued()) {
            for ((writes, bytes), (more_writes, more_bytes)) in queued.iter_mut().zip(of_life) {
                *writes += more_writes;
                *bytes += more_bytes;
            }
        }
        let (sent, lost) = packets(&lives);
        NetMetrics {
            paths: Path::ALL.map(|path| c.paths[path as usize].metrics(path, queued[path as usize])),
            packets_sent: get(&c.packets_sent) + sent,
            packets_lost: get(&c.packets_lost) + lost,
            connected: get(&c.connected),
            severed_asked: get(&c.severed_asked),
            severed_lost: get(&c.severed_lost),
            unreachable: get(&c.unreachable),
            rdma_memory: self.rdma_memory(),
        }
    }

    /// Those that are connected, and those that were not long ago.
    pub(super) fn peers(&self) -> Vec<PeerStatus> {
        let mut found: Vec<PeerStatus> = Vec::new();
        let mut gone: Vec<PeerStatus> = Vec::new();
        for (peer, entry) in lock(&self.peers).iter() {
            let counters = &entry.counters;
            let (sent, lost) =
                [&counters.packets_sent, &counters.packets_lost].map(|c| c.load(Ordering::Relaxed)).into();
            let status =
                |path, why, since, dialled_here, queued: [(u64, u64); Path::ALL.len()], now: (u64, u64)| {
                    PeerStatus {
                        peer: *peer,
                        path,
                        why,
                        since,
                        dialled_here,
                        packets_sent: sent + now.0,
                        packets_lost: lost + now.1,
                        paths: Path::ALL
                            .map(|path| counters.paths[path as usize].metrics(path, queued[path as usize])),
                    }
                };
            match &entry.state {
                State::Life(life) if life.phase() == Phase::Up => {
                    let standing = life.standing();
                    let now = packets(std::slice::from_ref(life));
                    let since = standing.since.elapsed();
                    found.push(status(
                        standing.path,
                        standing.why,
                        since,
                        life.dialled_here,
                        life.queued(),
                        now,
                    ));
                }
                _ => {
                    if let Some((when, reason)) = &entry.ended
                        && when.elapsed() < TOLD_FOR
                    {
                        let (why, nothing) = (reason.to_string(), Default::default());
                        gone.push(status(None, why, when.elapsed(), false, nothing, (0, 0)));
                    }
                }
            }
        }
        gone.sort_by_key(|status| status.since);
        gone.truncate(MAX_TOLD);
        found.extend(gone);
        found
    }

    pub(super) fn connect(self: &Arc<Self>, peer: NodeId, addr: SocketAddr) {
        if peer == self.local {
            let reason = SeverReason::Unreachable("a node does not connect to itself".into());
            return self.report(|events| events.push(Event::Severed { peer, reason }));
        }
        let life = lock(&self.keys).next();
        {
            let mut peers = lock(&self.peers);
            let entry = peers.entry(peer).or_default();
            match &entry.state {
                State::Life(life) => {
                    entry.asked |= life.phase() == Phase::Forming;
                    return;
                }
                State::Dialling { .. } => return,
                State::Nothing => {}
            }
            entry.asked = true;
            entry.state = State::Dialling { life, confirmed: false };
        }
        let node = Arc::clone(self);
        self.workers[0].runtime.spawn(async move {
            let within = node.config.connect_timeout;
            let reason = match timeout(within, Arc::clone(&node).dial(peer, life, addr)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("{addr} did not answer within {within:?}"),
            };
            node.dial_failed(peer, life, &reason);
        });
    }

    /// Ends in a life that is up, in one that the peer dialled, or with an error.
    async fn dial(self: Arc<Self>, peer: NodeId, number: u64, addr: SocketAddr) -> Result<(), DialError> {
        let parts = self.config.connections;
        let worker = &self.workers[0];
        let connection = worker.bound.connect(addr)?.await?;
        let mut exchange = Exchange::dial(&connection, &self.hello(number, 0, parts)).await?;
        if exchange.node != peer {
            connection.close(CloseCode::Settled.into(), b"another node was meant");
            return Err(DialError::OtherNode(exchange.node));
        }
        let last_ended = {
            let mut peers = lock(&self.peers);
            match peers.get_mut(&peer) {
                Some(Peer { state: State::Dialling { life, confirmed }, last_ended, .. })
                    if *life == number =>
                {
                    *confirmed = true;
                    Some(*last_ended)
                }
                _ => None,
            }
        };
        let settled = || connection.close(CloseCode::Settled.into(), b"another connection is kept");
        let Some(last_ended) = last_ended else {
            settled();
            return Ok(());
        };
        if !exchange.confirm(last_ended).await? {
            settled();
            // The peer's own dial wins. Until it is here, the deadline runs on.
            return std::future::pending().await;
        }
        let offers = exchange.offers().await?;
        let life = {
            let mut peers = lock(&self.peers);
            let entry = peers.entry(peer).or_default();
            if !matches!(entry.state, State::Dialling { life, .. } if life == number) {
                settled();
                return Ok(());
            }
            let counters = Arc::clone(&entry.counters);
            let life = Arc::new(Life::new(peer, number, true, parts, offers.secret, counters));
            entry.state = State::Life(Arc::clone(&life));
            life
        };
        self.attach(&life, 0, connection, &worker.runtime);
        let ports: Vec<u16> = exchange.peer.ports.iter().copied().take_while(|port| *port != 0).collect();
        let way = Way { addr, first_port: ports.first().copied() };
        for part in 1..parts {
            let to = ports.get(part % ports.len().max(1)).map_or(addr, |port| way.to(*port));
            let worker = &self.workers[part % self.workers.len()];
            let dialling = worker.runtime.spawn(Arc::clone(&self).dial_part(Arc::clone(&life), part, to));
            dialling.await.map_err(|_| DialError::Stopping)??;
        }
        let wanted: Vec<Path> =
            self.config.paths.iter().copied().filter(|path| *path != Path::Quic).collect();
        let Made { path, why, hope } = self.make_lanes(&life, &offers, &wanted, &way, &mut exchange).await?;
        let mut choice = Choice { paths: path.into_iter().collect(), why };
        if self.config.paths.contains(&Path::Quic) {
            choice.paths.push(Path::Quic);
        }
        let Some(first) = choice.paths.first().copied() else {
            return Err(DialError::NoPath(choice.why));
        };
        tracing::info!(%peer, path = %first, why_not = choice.why, "path chosen");
        if !exchange.choose(&choice).await? || !self.begin(&life, &choice) {
            return Err(DialError::Refused);
        }
        if choice.paths.len() > 1 || hope.is_some() {
            let best = hope.map_or(first, |hope| hope.min(first));
            tokio::spawn(Arc::clone(&self).keep_best(life, exchange, best, way));
        }
        Ok(())
    }

    /// Opens the best of these paths that both sides have.
    async fn make_lanes(
        self: &Arc<Self>,
        life: &Arc<Life>,
        offers: &Offers,
        wanted: &[Path],
        way: &Way,
        exchange: &mut Exchange,
    ) -> Result<Made, HandshakeError> {
        let wanted = |path| wanted.contains(&path);
        let mut made = Made::default();
        if wanted(Path::CudaIpc) {
            made.note(Path::CudaIpc, self.make_cuda_ipc(life, offers).await.map_err(NoLane::from));
        }
        if made.path.is_none() && wanted(Path::Shm) {
            made.note(Path::Shm, self.make_shm(life, offers).await.map_err(NoLane::from));
        }
        if made.path.is_none() && wanted(Path::Nccl) {
            made.note(Path::Nccl, self.make_nccl(life, offers, way).await);
        }
        let rdma_offer = offers.rdma.as_deref();
        if made.path.is_none() && wanted(Path::Rdma) {
            made.note(Path::Rdma, self.make_rdma(life, &offers.secret, rdma_offer, exchange).await?);
        } else if rdma_offer.is_some() {
            exchange.answer_rdma(&[]).await?;
        }
        if made.path.is_none() && wanted(Path::Tls) {
            made.note(Path::Tls, self.make_tls(life, offers, way).await.map_err(NoLane::from));
        }
        Ok(made)
    }

    /// Makes lanes when those of a life that was dialled here have failed, or have not come about at its beginning,
    /// until it has `best`. Goes on as long as the life does.
    async fn keep_best(self: Arc<Self>, life: Arc<Life>, mut exchange: Exchange, best: Path, way: Way) {
        let peer = life.peer;
        let mut pause = *self.config.repair.start();
        let mut taken: Option<Instant> = None;
        loop {
            life.until_path(|path| path != Some(best)).await;
            if taken.take().is_some_and(|taken| taken.elapsed() > *self.config.repair.end()) {
                pause = *self.config.repair.start();
            }
            // A life that has ended has no path.
            if timeout(pause, life.until_path(|path| path.is_none())).await.is_ok() {
                return;
            }
            pause = (pause * 2).min(*self.config.repair.end());
            let within = self.config.connect_timeout * (REMAKING + 1);
            match timeout(within, self.remake_lanes(&life, &mut exchange, best, &way)).await {
                Ok(Ok(Ok(path))) => {
                    tracing::info!(%peer, %path, "better path taken");
                    taken = Some(Instant::now());
                }
                Ok(Ok(Err(why_not))) => {
                    tracing::debug!(%peer, path = %best, why_not, again_in = ?pause, "no better path yet");
                }
                outcome => {
                    for lane in life.stop_making() {
                        lane.close("lanes are not made any more");
                    }
                    if life.phase() != Phase::Ended {
                        let why = outcome.map_or_else(
                            |_| format!("the peer did not answer within {within:?}"),
                            |outcome| outcome.map_or_else(|error| error.to_string(), |_| String::new()),
                        );
                        tracing::warn!(%peer, path = %best, why, "path is not tried again in this session");
                    }
                    return;
                }
            }
        }
    }

    /// Asks the peer for new lanes, and makes the best of those that are no better than `best`, but better than what
    /// there is. The outer error is the session's, the inner one says why there are none.
    async fn remake_lanes(
        self: &Arc<Self>,
        life: &Arc<Life>,
        exchange: &mut Exchange,
        best: Path,
        way: &Way,
    ) -> Result<Result<Path, String>, HandshakeError> {
        let (generation, failed) = life.next_generation();
        exchange.ask_for_lanes(generation, failed).await?;
        let offers = exchange.offers().await?;
        if !life.make_lanes(generation, offers.secret) {
            return Err(HandshakeError::Choice);
        }
        let better = |path: &Path| *path >= best && life.path().is_some_and(|now| *path < now);
        let wanted: Vec<Path> = self.config.paths.iter().copied().filter(better).collect();
        let Made { path, why, .. } = self.make_lanes(life, &offers, &wanted, way, exchange).await?;
        let choice = Choice { paths: path.into_iter().collect(), why };
        let begun = exchange.choose(&choice).await?;
        let Some(path) = path.filter(|path| begun && self.take_better(life, *path, &choice.why)) else {
            for lane in life.stop_making() {
                lane.close("it is not wanted");
            }
            return Ok(Err(choice.why));
        };
        Ok(Ok(path))
    }

    /// Lanes that were made carry writes from now on; false if they are none any more.
    fn take_better(self: &Arc<Self>, life: &Arc<Life>, path: Path, why: &str) -> bool {
        let Some(lanes) = life.take_better(path, why) else {
            return false;
        };
        self.start(life, lanes);
        true
    }

    fn start(self: &Arc<Self>, life: &Arc<Life>, lanes: Vec<Arc<dyn Lane>>) {
        for lane in lanes {
            self.count(life, lane.path(), |counters| add(&counters.opened, 1));
            lane.start(self, life);
        }
    }

    /// Makes the answerer's part of new lanes, whenever the dialler asks, as long as the life lasts.
    async fn answer_with_lanes(self: Arc<Self>, life: Arc<Life>, mut exchange: Exchange) {
        while let Ok((generation, failed)) = exchange.asked_for_lanes().await {
            if !self.failed_at_peer(&life, failed) {
                return;
            }
            let within = self.config.connect_timeout * REMAKING;
            let why = match timeout(within, self.remake_for_peer(&life, &mut exchange, generation)).await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("the peer did not choose within {within:?}"),
            };
            for lane in life.stop_making() {
                lane.close("lanes are not made any more");
            }
            if life.phase() != Phase::Ended {
                tracing::warn!(peer = %life.peer, why, "no lanes are made any more in this session");
            }
            // The dialler sees the end of the stream.
            return;
        }
    }

    async fn remake_for_peer(
        self: &Arc<Self>,
        life: &Arc<Life>,
        exchange: &mut Exchange,
        generation: Generation,
    ) -> Result<(), HandshakeError> {
        let secret = new_secret().ok_or(HandshakeError::Choice)?;
        if !life.make_lanes(generation, secret) {
            return Err(HandshakeError::Choice);
        }
        self.offer_lanes(life, secret, exchange).await?;
        let Choice { paths, why } = exchange.chosen().await?;
        let path = match paths[..] {
            [] => None,
            [path] if path != Path::Quic && self.config.paths.contains(&path) => Some(path),
            _ => return Err(HandshakeError::Choice),
        };
        let begun = path.is_some_and(|path| self.take_better(life, path, &why));
        match path.filter(|_| begun) {
            Some(path) => tracing::info!(peer = %life.peer, %path, "better path taken by the peer"),
            None => life.stop_making().iter().for_each(|lane| lane.close("it is not wanted")),
        }
        exchange.begun(begun).await
    }

    async fn make_cuda_ipc(self: &Arc<Self>, life: &Arc<Life>, offers: &Offers) -> Result<(), shm::Error> {
        let offer = offers.cuda_ipc.clone().ok_or(shm::Error::NotOffered)?;
        let secret = offers.secret;
        self.dial_on_host(life, move |node, life| shm::dial_gpu(node, life, &offer, &secret)).await
    }

    async fn make_shm(self: &Arc<Self>, life: &Arc<Life>, offers: &Offers) -> Result<(), shm::Error> {
        let offer = offers.shm.clone().ok_or(shm::Error::NotOffered)?;
        let secret = offers.secret;
        self.dial_on_host(life, move |node, life| shm::dial(node, life, &offer, &secret)).await
    }

    async fn dial_on_host(
        self: &Arc<Self>,
        life: &Arc<Life>,
        dial: impl FnOnce(&Node, &Life) -> Result<(), shm::Error> + Send + 'static,
    ) -> Result<(), shm::Error> {
        if self.shm.is_none() {
            return Err(shm::Error::NotHere);
        }
        let (node, life) = (Arc::clone(self), Arc::clone(life));
        // It answers at once or within its own deadline, but on a thread that may wait.
        let made = tokio::task::spawn_blocking(move || dial(&node, &life)).await;
        made.map_err(|_| shm::Error::Gone)?
    }

    #[cfg(feature = "cuda")]
    async fn make_nccl(self: &Arc<Self>, life: &Arc<Life>, offers: &Offers, way: &Way) -> Result<(), NoLane> {
        let offer = offers.nccl.ok_or(nccl::Error::NotOffered)?;
        let (node, life, secret) = (Arc::clone(self), Arc::clone(life), offers.secret);
        let addr = way.to(offer.port);
        // It has a deadline of its own, but on a thread that may wait.
        let dialling = tokio::task::spawn_blocking(move || nccl::dial(&node, &life, addr, &offer, &secret));
        Ok(dialling.await.unwrap_or(Err(nccl::Error::Gone))?)
    }

    #[cfg(not(feature = "cuda"))]
    async fn make_nccl(&self, _life: &Arc<Life>, offers: &Offers, _way: &Way) -> Result<(), NoLane> {
        let why =
            if offers.nccl.is_some() { "not in this build (feature cuda)" } else { "the peer offers none" };
        Err(NoLane { why: why.into(), may_pass: false })
    }

    /// All of its connections, or none that count.
    async fn make_tls(
        self: &Arc<Self>,
        life: &Arc<Life>,
        offers: &Offers,
        way: &Way,
    ) -> Result<(), tls::TlsError> {
        let offer = offers.tls.ok_or(tls::TlsError::NotOffered)?;
        if self.tls.is_none() {
            return Err(tls::TlsError::NotHere);
        }
        let addr = way.to(offer.port);
        let dialling: Vec<_> = (0..self.config.tls_connections.min(offer.connections.into()))
            .map(|_| {
                let (node, life, secret) = (Arc::clone(self), Arc::clone(life), offers.secret);
                // It has a deadline of its own, but on a thread that may wait.
                tokio::task::spawn_blocking(move || tls::dial(&node, &life, addr, &secret))
            })
            .collect();
        let mut made = Ok(());
        for dialled in dialling {
            made = made.and(dialled.await.unwrap_or(Err(tls::TlsError::Closed)));
        }
        if made.is_err() {
            for lane in life.discard(Path::Tls) {
                lane.close("another of its connections did not come about");
            }
        }
        made
    }

    /// How long the dialler's queue pairs have to show that they work, and the answerer's twice that: then it hears
    /// the dialler's greeting if that was sent at all. It must leave time to connect without them.
    #[cfg(feature = "rdma")]
    fn greeting(&self) -> Duration {
        self.config.connect_timeout / 4
    }

    /// The outer error is the session's, the inner one says why there is no lane.
    #[cfg(feature = "rdma")]
    async fn make_rdma(
        &self,
        life: &Arc<Life>,
        secret: &[u8; 32],
        offer: Option<&[u8]>,
        exchange: &mut Exchange,
    ) -> Result<Result<(), NoLane>, HandshakeError> {
        let Some(offer) = offer else {
            return Ok(Err(NoLane { why: "the peer offers none".into(), may_pass: false }));
        };
        let Some(rdma) = self.rdma.clone() else {
            exchange.answer_rdma(&[]).await?;
            return Ok(Err(NoLane { why: "this node has no devices".into(), may_pass: false }));
        };
        let for_now = |why| NoLane { why, may_pass: true };
        if offer.is_empty() {
            exchange.answer_rdma(&[]).await?;
            return Ok(Err(for_now("the peer has devices and cannot use them now".into())));
        }
        let offer = offer.to_vec();
        let answered = blocking(move || Answered::new(&rdma, &offer)).await;
        match answered {
            Ok(answered) => {
                exchange.answer_rdma(&answered.answer()).await?;
                let (life, secret, within) = (Arc::clone(life), *secret, self.greeting());
                Ok(blocking(move || answered.join(&life, &secret, within)).await.map_err(for_now))
            }
            Err(error) => {
                exchange.answer_rdma(&[]).await?;
                Ok(Err(for_now(error)))
            }
        }
    }

    #[cfg(not(feature = "rdma"))]
    async fn make_rdma(
        &self,
        _life: &Arc<Life>,
        _secret: &[u8; 32],
        offer: Option<&[u8]>,
        exchange: &mut Exchange,
    ) -> Result<Result<(), NoLane>, HandshakeError> {
        if offer.is_some() {
            exchange.answer_rdma(&[]).await?;
        }
        Ok(Err(NoLane { why: "not in this build (feature rdma)".into(), may_pass: false }))
    }

    /// Offers lanes to the dialler of a life, and makes the one that it answers with queue pairs.
    #[cfg_attr(not(feature = "rdma"), expect(unused_variables, reason = "others are made by the dialler"))]
    async fn offer_lanes(
        &self,
        life: &Arc<Life>,
        secret: [u8; 32],
        exchange: &mut Exchange,
    ) -> Result<(), HandshakeError> {
        let wanted = |path| self.config.paths.contains(&path);
        let cuda_ipc = self.gpu_offer().filter(|_| wanted(Path::CudaIpc));
        let shm = self.shm.as_ref().filter(|_| wanted(Path::Shm)).map(|listener| listener.offer());
        let nccl = self.nccl_offer();
        let tls = self.tls.as_ref().filter(|_| wanted(Path::Tls));
        let tls = tls.map(|listener| listener.offer(self.config.tls_connections));
        #[cfg(feature = "rdma")]
        if let Some(rdma) = self.rdma.clone() {
            match blocking(move || Offered::new(&rdma)).await {
                Ok(offered) => {
                    let rdma = Some(offered.offer());
                    exchange.offer(&Offers { secret, cuda_ipc, shm, nccl, tls, rdma }).await?;
                    let answer = exchange.rdma_answer().await?;
                    if !answer.is_empty() {
                        let (peer, life, within) = (life.peer, Arc::clone(life), 2 * self.greeting());
                        if let Err(error) =
                            blocking(move || offered.join(&life, &secret, &answer, within)).await
                        {
                            tracing::warn!(%peer, error, "no RDMA lane");
                        }
                    }
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!(peer = %life.peer, error, "no RDMA lane");
                    // There may be one later.
                    let rdma = Some(Vec::new());
                    exchange.offer(&Offers { secret, cuda_ipc, shm, nccl, tls, rdma }).await?;
                    exchange.rdma_answer().await?;
                    return Ok(());
                }
            }
        }
        exchange.offer(&Offers { secret, cuda_ipc, shm, nccl, tls, rdma: None }).await
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn life(&self, peer: NodeId, number: u64) -> Option<Arc<Life>> {
        match &lock(&self.peers).get(&peer)?.state {
            State::Life(life) if life.number == number => Some(Arc::clone(life)),
            _ => None,
        }
    }

    /// A source's bytes cannot be had from its GPU, for any lane.
    #[cfg(feature = "cuda")]
    pub(crate) fn source_failed(&self, life: &Life, error: &str) {
        tracing::error!(peer = %life.peer, error, "a source cannot be read");
        self.end(
            &mut lock(&self.peers),
            life,
            SeverReason::Lost(format!("a source cannot be read: {error}")),
        );
    }

    /// The life that a lane on its way belongs to, as `secret` proves, and what the lane is called there.
    pub(crate) fn life_of_lane(
        &self,
        peer: NodeId,
        number: u64,
        secret: &[u8; 32],
    ) -> Option<(Arc<Life>, LaneId)> {
        let life = match lock(&self.peers).get(&peer) {
            Some(Peer { state: State::Life(life), .. }) if life.number == number && !life.dialled_here => {
                Arc::clone(life)
            }
            _ => return None,
        };
        let id = life.new_lane_id(secret)?;
        Some((life, id))
    }

    pub(crate) fn local(&self) -> NodeId {
        self.local
    }

    pub(crate) fn tls(&self) -> Option<&tls::Listener> {
        self.tls.as_ref()
    }

    pub(crate) fn shm(&self) -> Option<&shm::Listener> {
        self.shm.as_ref()
    }

    /// The life is up; false if something is missing.
    fn begin(self: &Arc<Self>, life: &Arc<Life>, choice: &Choice) -> bool {
        let lanes = {
            let mut peers = lock(&self.peers);
            let Some(lanes) = life.begin(&choice.paths, &choice.why) else {
                return false;
            };
            if let Some(entry) = peers.get_mut(&life.peer) {
                entry.asked = false;
            }
            add(&self.counters.connected, 1);
            self.report(|events| events.push(Event::Connected { peer: life.peer }));
            lanes
        };
        self.start(life, lanes);
        true
    }

    /// Runs on the thread that is to drive the connection.
    async fn dial_part(
        self: Arc<Self>,
        life: Arc<Life>,
        part: usize,
        addr: SocketAddr,
    ) -> Result<(), DialError> {
        let worker = &self.workers[part % self.workers.len()];
        let connection = worker.bound.connect(addr)?.await?;
        let hello = self.hello(life.number, part, self.config.connections);
        let mut exchange = Exchange::dial(&connection, &hello).await?;
        if exchange.node != life.peer {
            return Err(DialError::OtherNode(exchange.node));
        }
        if !exchange.confirm(0).await? {
            return Err(DialError::Refused);
        }
        self.attach(&life, part, connection, &worker.runtime);
        Ok(())
    }

    fn dial_failed(&self, peer: NodeId, number: u64, reason: &str) {
        let mut peers = lock(&self.peers);
        let Some(entry) = peers.get_mut(&peer) else { return };
        match &entry.state {
            State::Dialling { life, .. } if *life == number => {
                entry.state = State::Nothing;
                if std::mem::take(&mut entry.asked) {
                    add(&self.counters.unreachable, 1);
                    self.report_severed(peer, SeverReason::Unreachable(reason.into()));
                }
            }
            State::Life(life) if life.number == number => {
                let life = Arc::clone(life);
                self.end(&mut peers, &life, SeverReason::Unreachable(reason.into()));
            }
            _ => {}
        }
    }

    fn hello(&self, life: u64, part: usize, parts: usize) -> Hello {
        let mut ports = [0; MAX_PORTS];
        for (port, worker) in ports.iter_mut().zip(&self.workers) {
            *port = worker.addr.port();
        }
        // Both are at most `MAX_PARTS`.
        Hello { nonce: self.nonce, life, part: part as u16, parts: parts as u16, ports }
    }

    pub(super) async fn accept(self: Arc<Self>, bound: Bound) {
        while let Some(incoming) = bound.endpoint.accept().await {
            let from = incoming.remote_address();
            if bound.endpoint.open_connections() >= self.config.connection_limit {
                tracing::warn!(%from, limit = self.config.connection_limit, "refused: too many connections");
                incoming.refuse();
                continue;
            }
            let node = Arc::clone(&self);
            let connecting = match bound.accept(incoming) {
                Ok(connecting) => connecting,
                Err(error) => {
                    tracing::debug!(%from, %error, "not accepted");
                    continue;
                }
            };
            tokio::spawn(async move {
                let within = node.config.connect_timeout;
                match timeout(within, node.admit(connecting)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!(%from, %error, "data connection refused"),
                    Err(_) => tracing::warn!(%from, ?within, "data handshake took too long"),
                }
            });
        }
    }

    async fn admit(self: &Arc<Self>, connecting: quinn::Connecting) -> Result<(), HandshakeError> {
        let connection = connecting.await?;
        let mut exchange = Exchange::answer(&connection, &self.hello(0, 0, 0)).await?;
        let peer = exchange.node;
        let Hello { life: number, part, parts, .. } = exchange.peer;
        let last_ended = exchange.confirmation().await?;
        let secret = new_secret().ok_or(HandshakeError::Choice)?;
        if part == 0 {
            // Sessions that come and go are events too.
            self.until_polled().await;
        }
        let life = if part == 0 {
            self.admit_life(peer, number, usize::from(parts), last_ended, secret)
        } else {
            match lock(&self.peers).get(&peer) {
                Some(Peer { state: State::Life(life), .. })
                    if life.number == number && !life.dialled_here =>
                {
                    Some(Arc::clone(life))
                }
                _ => None,
            }
        };
        let life = life.filter(|life| self.attach(life, part.into(), connection.clone(), &Handle::current()));
        exchange.verdict(life.is_some()).await?;
        let Some(life) = life else {
            // The dialler closes it; the deadline of this handshake bounds that.
            connection.closed().await;
            return Ok(());
        };
        if part == 0 {
            self.offer_lanes(&life, secret, &mut exchange).await?;
            let choice = exchange.chosen().await?;
            let wanted = choice.paths.iter().all(|path| self.config.paths.contains(path));
            let best = choice.paths.first().copied().filter(|_| wanted && self.begin(&life, &choice));
            let Some(best) = best else {
                let (paths, reason) = (choice.paths, "it wants paths that are not to be had here");
                tracing::warn!(%peer, ?paths, reason, "data connection refused");
                self.end(&mut lock(&self.peers), &life, SeverReason::Lost(reason.into()));
                return Ok(());
            };
            tracing::info!(%peer, path = %best, why_not = choice.why, "path chosen by the peer");
            exchange.begun(true).await?;
            // The stream ends at once if the dialler never asks.
            tokio::spawn(Arc::clone(self).answer_with_lanes(life, exchange));
            return Ok(());
        }
        // Dropping the stream would be no harm, but what was said must be out first.
        let _ = exchange.send.finish();
        Ok(())
    }

    /// Decides on the first connection of a life.
    fn admit_life(
        self: &Arc<Self>,
        peer: NodeId,
        number: u64,
        parts: usize,
        last_ended: u64,
        secret: [u8; 32],
    ) -> Option<Arc<Life>> {
        if peer == self.local || !(1..=MAX_PARTS).contains(&parts) {
            return None;
        }
        let mut peers = lock(&self.peers);
        let entry = peers.entry(peer).or_default();
        let (standing, old) = match &entry.state {
            State::Nothing => (Standing::Nothing, None),
            State::Dialling { confirmed, .. } => (Standing::Dialling { confirmed: *confirmed }, None),
            State::Life(life) => {
                let standing = Standing::Life { life: life.number, dialled_here: life.dialled_here };
                (standing, Some(Arc::clone(life)))
            }
        };
        if !admits(self.local, peer, standing, last_ended) {
            return None;
        }
        if let Some(old) = old {
            self.end(&mut peers, &old, SeverReason::Lost("the peer connected anew".into()));
        }
        let entry = peers.entry(peer).or_default();
        let life = Arc::new(Life::new(peer, number, false, parts, secret, Arc::clone(&entry.counters)));
        entry.state = State::Life(Arc::clone(&life));
        drop(peers);
        let (node, forming, within) = (Arc::clone(self), Arc::clone(&life), self.config.connect_timeout);
        tokio::spawn(async move {
            tokio::time::sleep(within).await;
            if forming.phase() == Phase::Forming {
                let reason = format!("its other connections and lanes did not come within {within:?}");
                node.end(&mut lock(&node.peers), &forming, SeverReason::Lost(reason));
            }
        });
        Some(life)
    }

    /// Adds a connection to a life.
    fn attach(
        self: &Arc<Self>,
        life: &Arc<Life>,
        part: usize,
        connection: Connection,
        runtime: &Handle,
    ) -> bool {
        let link = Link::new(life.new_link_id(), connection.clone(), runtime.clone());
        if !life.attach_part(part, link) {
            connection.close(CloseCode::Settled.into(), b"no place for this connection");
            return false;
        }
        let (node, watched) = (Arc::clone(self), Arc::clone(life));
        let silence = self.config.tuning.silence();
        runtime.spawn(async move {
            let reason = silence.until_ended(&connection).await;
            node.end(&mut lock(&node.peers), &watched, SeverReason::Lost(reason));
        });
        true
    }

    pub(super) fn sever(&self, peer: NodeId) {
        let mut peers = lock(&self.peers);
        let entry = peers.entry(peer).or_default();
        entry.asked = false;
        match &entry.state {
            State::Life(life) => {
                let life = Arc::clone(life);
                self.end(&mut peers, &life, SeverReason::Asked);
            }
            // The dial finds out that it is not wanted any more.
            State::Dialling { .. } => entry.state = State::Nothing,
            State::Nothing => {}
        }
        self.windows.close_all_of(peer);
        self.report_severed(peer, SeverReason::Asked);
    }

    /// Ends a life, once: nothing moves on its connections any more, and everything is reported.
    fn end(&self, peers: &mut BTreeMap<NodeId, Peer>, life: &Life, reason: SeverReason) {
        let Some(Remains { was_up, links, lanes, failed }) = life.end() else {
            return;
        };
        let peer = life.peer;
        for lane in &lanes {
            lane.close("severed");
        }
        for link in &links {
            link.close("severed");
            let path = link.connection.stats().path;
            tracing::info!(
                %peer,
                sent = path.sent_packets,
                lost = path.lost_packets,
                rtt = ?path.rtt,
                mtu = path.current_mtu,
                mtu_doubted = path.black_holes_detected,
                "QUIC connection ended"
            );
        }
        // No source is read any more when its write is reported.
        self.fetches.wait();
        for (of_all, of_peer, packets) in {
            let (sent, lost) = packets_of(&links);
            let (all, own) = (&self.counters, &life.counters);
            [(&all.packets_sent, &own.packets_sent, sent), (&all.packets_lost, &own.packets_lost, lost)]
        } {
            add(of_all, packets);
            add(of_peer, packets);
        }
        for (_, path) in &failed {
            self.count(life, *path, |counters| counters.severed());
        }
        self.windows.close_all_of(peer);
        let mut asked = false;
        if let Some(entry) = peers.get_mut(&peer)
            && matches!(&entry.state, State::Life(held) if held.number == life.number)
        {
            entry.state = State::Nothing;
            entry.last_ended = life.number;
            entry.ended = was_up.then(|| (Instant::now(), reason.clone()));
            asked = std::mem::take(&mut entry.asked);
        }
        if peers.len() > MAX_REMEMBERED {
            peers.retain(|_, entry| !matches!(entry.state, State::Nothing));
        }
        if was_up {
            add(
                if reason == SeverReason::Asked {
                    &self.counters.severed_asked
                } else {
                    &self.counters.severed_lost
                },
                1,
            );
            self.report(|events| {
                for (ticket, _) in failed {
                    events.push(Event::Failed { peer, ticket, reason: FailReason::Severed });
                }
                events.push(Event::Severed { peer, reason });
            });
        } else if asked {
            add(&self.counters.unreachable, 1);
            self.report_severed(peer, SeverReason::Unreachable(reason.to_string()));
        }
    }

    /// Unless it is reported already, and not polled.
    fn report_severed(&self, peer: NodeId, reason: SeverReason) {
        self.report(|events| {
            if !events.ends_severed(peer) {
                events.push(Event::Severed { peer, reason });
            }
        });
    }
}

/// None if the system has no randomness.
fn new_secret() -> Option<[u8; 32]> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).ok().map(|()| secret)
}

/// QUIC packets sent, and lost, on connections that are up.
fn packets(lives: &[Arc<Life>]) -> (u64, u64) {
    packets_of(&lives.iter().flat_map(|life| life.links()).collect::<Vec<_>>())
}

fn packets_of(links: &[Arc<Link>]) -> (u64, u64) {
    let paths = links.iter().map(|link| link.connection.stats().path);
    paths.fold((0, 0), |(sent, lost), path| (sent + path.sent_packets, lost + path.lost_packets))
}

#[cfg(test)]
mod tests {
    use crate::hostile::{ANY, HOSTILE, Log, VICTIM};
    use crate::{Event, NetConfig, NetTransport, Path, Transport as _};
    use std::time::{Duration, Instant};

    /// What may pass is tried again: see `tests/faults`.
    #[test]
    fn what_is_not_to_be_had_is_not_tried_again() {
        let log = Log::begin();
        let pause = Duration::from_millis(1);
        let node = |identity, paths: &[Path]| {
            let config = NetConfig { paths: paths.to_vec(), repair: pause..=pause, ..NetConfig::default() };
            NetTransport::bind(ANY, identity, config).unwrap()
        };
        let mut dialler = node(&VICTIM, &[Path::Tls, Path::Quic]);
        let peer = node(&HOSTILE, &[Path::Quic]);
        dialler.connect(HOSTILE.node(), peer.local_addr());
        let (begun, mut events) = (Instant::now(), Vec::new());
        while events.is_empty() && begun.elapsed() < Duration::from_secs(10) {
            dialler.poll(&mut events);
            std::thread::sleep(pause);
        }
        assert_eq!(events, [Event::Connected { peer: HOSTILE.node() }]);
        std::thread::sleep(Duration::from_millis(200));
        log.expect(&["path chosen", "tls: the peer offers none"]);
        assert!(!log.has(&["no better path yet"]));
    }
}
