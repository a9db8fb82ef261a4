//! What the node loop and the threads share: peers, windows, and events on their way to `poll`.

use super::life::{Life, MAX_PARTS, Phase, Remains};
use super::link::Link;
use super::{QuicConfig, QuicMetrics};
use crate::endpoint::Bound;
use crate::events::EventQueue;
use crate::handshake::{CloseCode, Exchange, HandshakeError, Hello, MAX_PORTS, Standing, admits};
use crate::rng::Rng;
use crate::transport::{Event, FailReason, RegionId, SeverReason, SubmitError, TransportError, Write};
use crate::window::Windows;
use quinn::Connection;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Window;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::timeout;

/// Ended lives that are remembered, to tell a peer which one is over.
const MAX_REMEMBERED: usize = 4096;

/// A thread with its socket.
pub(super) struct Worker {
    pub(super) runtime: Handle,
    pub(super) bound: Bound,
    pub(super) addr: SocketAddr,
}

/// Locks are taken in this order: `peers`, a life's state, a window, `outbox`.
pub(super) struct Node {
    local: NodeId,
    pub(super) config: QuicConfig,
    pub(super) windows: Windows,
    workers: Vec<Worker>,
    peers: Mutex<BTreeMap<NodeId, Peer>>,
    outbox: Mutex<Outbox>,
    polled: Notify,
    keys: Mutex<Rng>,
    counters: Counters,
}

#[derive(Default)]
struct Outbox {
    events: EventQueue,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Peer {
    state: State,
    /// The life that ended last.
    last_ended: u64,
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
    writes_sent: AtomicU64,
    bytes_sent: AtomicU64,
    writes_landed: AtomicU64,
    bytes_landed: AtomicU64,
    writes_refused: AtomicU64,
    /// Of connections that are over.
    packets_sent: AtomicU64,
    packets_lost: AtomicU64,
    connected: AtomicU64,
    severed: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two steps of a change to what these guard.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
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
    #[error("the transport is stopping")]
    Stopping,
}

impl Node {
    pub(super) fn new(local: NodeId, config: QuicConfig, workers: Vec<Worker>, seed: u64) -> Node {
        Node {
            local,
            config,
            windows: Windows::default(),
            workers,
            peers: Mutex::default(),
            outbox: Mutex::default(),
            polled: Notify::new(),
            keys: Mutex::new(Rng::new(seed)),
            counters: Counters::default(),
        }
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
        life.submit(write, self.config.write_limit)
    }

    pub(super) fn poll(&self, events: &mut Vec<Event>) {
        loop {
            // Not in the loop's condition: the lock would be held while windows close, and whoever lands
            // bytes holds a window and waits for this lock.
            let severed = lock(&self.outbox).events.drain(events);
            let Some(severed) = severed else { break };
            self.windows.close_all_of(severed);
            lock(&self.outbox).events.forget_landed_of(severed);
        }
        self.polled.notify_waiters();
    }

    /// Waits until the node loop keeps up with the events.
    pub(super) async fn until_polled(&self) {
        loop {
            let polled = self.polled.notified();
            tokio::pin!(polled);
            polled.as_mut().enable();
            if lock(&self.outbox).events.len() < self.config.event_limit {
                return;
            }
            polled.await;
        }
    }

    pub(super) fn set_waker(&self, waker: Waker) {
        let mut outbox = lock(&self.outbox);
        let due = !outbox.events.is_empty();
        outbox.waker = Some(waker.clone());
        drop(outbox);
        if due {
            waker.wake();
        }
    }

    fn report(&self, fill: impl FnOnce(&mut EventQueue)) {
        let waker = {
            let mut outbox = lock(&self.outbox);
            fill(&mut outbox.events);
            outbox.waker.clone()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(super) fn report_landed(&self, peer: NodeId, immediate: u32, len: u64, key: u64) {
        self.report(|events| events.push_landed(peer, immediate, len, key));
    }

    pub(super) fn settle(&self, life: &Life, sequence: u64, landed: bool) {
        let sent = life.settle(sequence, landed, |event| self.report(|events| events.push(event)));
        if let Some(bytes) = sent {
            add(&self.counters.writes_sent, 1);
            add(&self.counters.bytes_sent, bytes);
        }
    }

    pub(super) fn count_landed(&self, bytes: u64) {
        add(&self.counters.writes_landed, 1);
        add(&self.counters.bytes_landed, bytes);
    }

    pub(super) fn count_refused(&self) {
        add(&self.counters.writes_refused, 1);
    }

    pub(super) fn metrics(&self) -> QuicMetrics {
        let c = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut metrics = QuicMetrics {
            writes_sent: get(&c.writes_sent),
            bytes_sent: get(&c.bytes_sent),
            writes_landed: get(&c.writes_landed),
            bytes_landed: get(&c.bytes_landed),
            writes_refused: get(&c.writes_refused),
            packets_sent: get(&c.packets_sent),
            packets_lost: get(&c.packets_lost),
            connected: get(&c.connected),
            severed: get(&c.severed),
        };
        let lives: Vec<_> = lock(&self.peers)
            .values()
            .filter_map(
                |peer| {
                    if let State::Life(life) = &peer.state { Some(Arc::clone(life)) } else { None }
                },
            )
            .collect();
        for link in lives.iter().flat_map(|life| life.links()) {
            let path = link.connection.stats().path;
            metrics.packets_sent += path.sent_packets;
            metrics.packets_lost += path.lost_packets;
        }
        metrics
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
        if exchange.peer.node != peer {
            connection.close(CloseCode::Settled.into(), b"another node was meant");
            return Err(DialError::OtherNode(exchange.peer.node));
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
        let life = Arc::new(Life::new(peer, number, true, parts));
        {
            let mut peers = lock(&self.peers);
            let entry = peers.entry(peer).or_default();
            if !matches!(entry.state, State::Dialling { life, .. } if life == number) {
                settled();
                return Ok(());
            }
            entry.state = State::Life(Arc::clone(&life));
        }
        self.attach(&life, 0, connection, &worker.runtime);
        let ports: Vec<u16> = exchange.peer.ports.iter().copied().take_while(|port| *port != 0).collect();
        for part in 1..parts {
            let port = ports.get(part % ports.len().max(1)).copied().unwrap_or(addr.port());
            // The address that was given may be mapped; the first socket is reached as given.
            let port = if Some(&port) == ports.first() { addr.port() } else { port };
            let to = SocketAddr::new(addr.ip(), port);
            let worker = &self.workers[part % self.workers.len()];
            let dialling = worker.runtime.spawn(Arc::clone(&self).dial_part(Arc::clone(&life), part, to));
            dialling.await.map_err(|_| DialError::Stopping)??;
        }
        Ok(())
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
        if exchange.peer.node != life.peer {
            return Err(DialError::OtherNode(exchange.peer.node));
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
        Hello { node: self.local, life, part: part as u16, parts: parts as u16, ports }
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
        let Hello { node: peer, life: number, part, parts, .. } = exchange.peer;
        let last_ended = exchange.confirmation().await?;
        let life = if part == 0 {
            self.admit_life(peer, number, usize::from(parts), last_ended)
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
        let admitted =
            life.is_some_and(|life| self.attach(&life, part.into(), connection.clone(), &Handle::current()));
        exchange.verdict(admitted).await?;
        if !admitted {
            // The dialler closes it; the deadline of this handshake bounds that.
            connection.closed().await;
        } else {
            // Dropping the stream would be no harm, but the verdict must be out first.
            let _ = exchange.send.finish();
        }
        Ok(())
    }

    /// Decides on the first connection of a life.
    fn admit_life(
        self: &Arc<Self>,
        peer: NodeId,
        number: u64,
        parts: usize,
        last_ended: u64,
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
        let life = Arc::new(Life::new(peer, number, false, parts));
        peers.entry(peer).or_default().state = State::Life(Arc::clone(&life));
        drop(peers);
        let (node, forming, within) = (Arc::clone(self), Arc::clone(&life), self.config.connect_timeout);
        tokio::spawn(async move {
            tokio::time::sleep(within).await;
            if forming.phase() == Phase::Forming {
                let reason = format!("its other connections did not come within {within:?}");
                node.end(&mut lock(&node.peers), &forming, SeverReason::Lost(reason));
            }
        });
        Some(life)
    }

    /// Adds a connection to a life; with the last one it is up.
    fn attach(
        self: &Arc<Self>,
        life: &Arc<Life>,
        part: usize,
        connection: Connection,
        runtime: &Handle,
    ) -> bool {
        let link = Link::new(connection.clone(), runtime.clone());
        let links = {
            let mut peers = lock(&self.peers);
            let Some(links) = life.attach(part, link) else {
                connection.close(CloseCode::Settled.into(), b"no place for this connection");
                return false;
            };
            if !links.is_empty() {
                if let Some(entry) = peers.get_mut(&life.peer) {
                    entry.asked = false;
                }
                add(&self.counters.connected, 1);
                self.report(|events| events.push(Event::Connected { peer: life.peer }));
            }
            links
        };
        let (node, watched) = (Arc::clone(self), Arc::clone(life));
        runtime.spawn(async move {
            let reason = connection.closed().await.to_string();
            node.end(&mut lock(&node.peers), &watched, SeverReason::Lost(reason));
        });
        for link in links {
            link.start(Arc::clone(self), Arc::clone(life));
        }
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
        let Some(Remains { was_up, links, failed }) = life.end() else {
            return;
        };
        let peer = life.peer;
        for link in &links {
            link.close(CloseCode::Goodbye, "severed");
            let path = link.connection.stats().path;
            add(&self.counters.packets_sent, path.sent_packets);
            add(&self.counters.packets_lost, path.lost_packets);
        }
        self.windows.close_all_of(peer);
        let mut asked = false;
        if let Some(entry) = peers.get_mut(&peer)
            && matches!(&entry.state, State::Life(held) if held.number == life.number)
        {
            entry.state = State::Nothing;
            entry.last_ended = life.number;
            asked = std::mem::take(&mut entry.asked);
        }
        if peers.len() > MAX_REMEMBERED {
            peers.retain(|_, entry| !matches!(entry.state, State::Nothing));
        }
        if was_up {
            add(&self.counters.severed, 1);
            self.report(|events| {
                for ticket in failed {
                    events.push(Event::Failed { peer, ticket, reason: FailReason::Severed });
                }
                events.push(Event::Severed { peer, reason });
            });
        } else if asked {
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
