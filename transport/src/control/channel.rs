//! One process's end of the control channel.

use super::frame::{self, Decoder};
use super::{ControlEvent, Lane, SendError};
use crate::endpoint::{BindError, Bound, Streams, Tuning};
use crate::handshake::{CloseCode, Exchange, HandshakeError, Hello, MAX_PORTS, Standing, admits};
use crate::identity::Identity;
use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tandem_proto::ids::NodeId;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

/// Each lane is one stream. The dialler opens both.
pub(crate) const STREAMS: Streams =
    Streams { protocol: b"tandem-control/1", bidirectional: 2, unidirectional: 0, independent: 2 };

/// Ended lives that are remembered, to tell a peer which one is over.
const MAX_REMEMBERED: usize = 4096;

/// Bounds of the control channel.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The longest frame.
    pub frame_bytes: usize,
    /// Frames waiting to be sent on one lane to one peer, at most.
    pub queued_frames: usize,
    /// Bytes waiting there, at most. One frame is always taken.
    pub queued_bytes: usize,
    /// Events waiting to be received, at most: when there are more, peers are kept waiting.
    pub events: usize,
    /// Bytes of frames among them, at most; beyond that each lane of each peer holds one frame. One frame is always
    /// taken.
    pub event_bytes: usize,
    /// Peers, at most.
    pub peers: usize,
    /// How long connecting may take.
    pub handshake: Duration,
    /// How long `shutdown` waits for peers to take what is queued.
    pub farewell: Duration,
    /// How QUIC is tuned.
    pub tuning: Tuning,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            frame_bytes: tandem_proto::wire::MAX_FRAME_BYTES,
            queued_frames: 4096,
            queued_bytes: 64 << 20,
            events: 1024,
            event_bytes: 64 << 20,
            peers: 1024,
            handshake: Duration::from_secs(3),
            farewell: Duration::from_secs(1),
            tuning: Tuning::default(),
        }
    }
}

/// Why there is no connection to a peer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It did not answer in time.
    #[error("{addr} did not answer within {within:?}: is the process running there?")]
    Deadline {
        /// Which address.
        addr: SocketAddr,
        /// How long was waited.
        within: Duration,
    },
    /// It answered, and no connection came of it.
    #[error("cannot connect to {addr}: {reason}")]
    Failed {
        /// Which address.
        addr: SocketAddr,
        /// Why.
        reason: String,
    },
    /// This very process answered.
    #[error("{addr} is this process itself")]
    Itself {
        /// Which address.
        addr: SocketAddr,
    },
}

/// What has happened since the start. Numbers only grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ControlMetrics {
    /// Connections that came up.
    pub ups: u64,
    /// Connections that ended.
    pub downs: u64,
    /// Frames sent.
    pub frames_sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
    /// Frames received.
    pub frames_received: u64,
    /// Their bytes.
    pub bytes_received: u64,
    /// Frames not taken because a queue was full.
    pub backlogged: u64,
    /// Connections closed because the peer broke the rules.
    pub rule_breaks: u64,
}

#[derive(Default)]
struct Counters {
    ups: AtomicU64,
    downs: AtomicU64,
    frames_sent: AtomicU64,
    bytes_sent: AtomicU64,
    frames_received: AtomicU64,
    bytes_received: AtomicU64,
    backlogged: AtomicU64,
    rule_breaks: AtomicU64,
}

/// A handle on the control channel. Clones are the same channel, which lives until `shutdown` or the end of
/// its runtime.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    local: NodeId,
    /// Tells peers that it is the node `local`.
    nonce: u64,
    bound: Bound,
    addr: SocketAddr,
    limits: Limits,
    peers: Mutex<BTreeMap<NodeId, Peer>>,
    /// Told whenever a peer's state changes.
    changed: Notify,
    events: mpsc::Sender<Waiting>,
    /// Room for frames in `events`, by the byte. First come, first served, so no peer takes all of it from the others.
    room: Arc<Semaphore>,
    counters: Counters,
}

#[derive(Default)]
struct Peer {
    state: State,
    /// The life that ended last.
    last_ended: u64,
    /// Serves the life before: its `Down` comes before the next one's `Up`.
    serving: Option<JoinHandle<()>>,
}

#[derive(Default)]
enum State {
    #[default]
    Nothing,
    Dialling {
        life: u64,
    },
    Life(Life),
}

struct Life {
    life: u64,
    dialled_here: bool,
    connection: Connection,
    /// By lane. None while the connection is not up, and when it is being shut down.
    lanes: Option<[LaneQueue; 2]>,
}

/// An event that nobody has taken yet, and the room that its bytes take up.
type Waiting = (ControlEvent, Option<OwnedSemaphorePermit>);

/// What happens on a control channel, in order.
pub struct ControlEvents(mpsc::Receiver<Waiting>);

impl ControlEvents {
    /// Waits for the next event; none when the channel has ended. May be given up and begun anew.
    pub async fn recv(&mut self) -> Option<ControlEvent> {
        self.0.recv().await.map(|(event, _room)| event)
    }

    /// The next event if there is one already.
    pub fn try_recv(&mut self) -> Option<ControlEvent> {
        self.0.try_recv().ok().map(|(event, _room)| event)
    }
}

#[derive(Clone)]
struct LaneQueue {
    frames: mpsc::Sender<Vec<u8>>,
    /// Bytes in `frames`.
    queued_bytes: Arc<AtomicUsize>,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Control {
    /// Listens as [`Identity::node`], and takes whoever has a certificate of the cluster. Must be called within a tokio runtime,
    /// which then does the work; the events come in order.
    ///
    /// # Errors
    /// When the address cannot be had, or a setting is out of bounds.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        limits: Limits,
    ) -> Result<(Control, ControlEvents), BindError> {
        let bound = Bound::new(addr, identity, &limits.tuning, STREAMS)?;
        let addr = bound.local_addr().map_err(|source| BindError::Bind { addr, source })?;
        let (events, receiver) = mpsc::channel(limits.events.max(1));
        let room = Arc::new(Semaphore::new(limits.event_bytes.clamp(1, Semaphore::MAX_PERMITS)));
        let shared = Arc::new(Shared {
            local: identity.node(),
            nonce: identity.nonce(),
            bound,
            addr,
            limits,
            peers: Mutex::default(),
            changed: Notify::new(),
            events,
            room,
            counters: Counters::default(),
        });
        tokio::spawn(Arc::clone(&shared).accept());
        Ok((Control { shared }, ControlEvents(receiver)))
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// Connects, unless there is a connection already, and says who is there.
    ///
    /// # Errors
    /// When nobody answers in time, or no connection comes of it.
    pub async fn connect(&self, addr: SocketAddr) -> Result<NodeId, ConnectError> {
        let within = self.shared.limits.handshake;
        match timeout(within, Arc::clone(&self.shared).dial(addr)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ConnectError::Deadline { addr, within }),
        }
    }

    /// Queues a frame. Never blocks.
    ///
    /// # Errors
    /// When there is no connection, the lane's queue is full, or the frame is too long.
    pub fn send(&self, peer: NodeId, lane: Lane, frame: Vec<u8>) -> Result<(), SendError> {
        let limits = &self.shared.limits;
        let len = frame.len();
        if len > limits.frame_bytes {
            return Err(SendError::Oversize { len, limit: limits.frame_bytes });
        }
        let peers = self.shared.peers();
        let Some(Peer { state: State::Life(Life { lanes: Some(lanes), .. }), .. }) = peers.get(&peer) else {
            return Err(SendError::NotConnected { peer });
        };
        let queue = &lanes[lane as usize];
        let before = queue.queued_bytes.fetch_add(len, Ordering::Relaxed);
        let outcome = if before > 0 && before + len > limits.queued_bytes {
            Err(SendError::Backlogged { peer, limit: limits.queued_frames })
        } else {
            queue.frames.try_send(frame).map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => {
                    SendError::Backlogged { peer, limit: limits.queued_frames }
                }
                mpsc::error::TrySendError::Closed(_) => SendError::NotConnected { peer },
            })
        };
        if let Err(error) = outcome {
            queue.queued_bytes.fetch_sub(len, Ordering::Relaxed);
            if matches!(error, SendError::Backlogged { .. }) {
                add(&self.shared.counters.backlogged, 1);
            }
        }
        outcome
    }

    /// Closes the connection to a peer at once; what is queued is lost. `Down` follows if it was up.
    pub fn close(&self, peer: NodeId) {
        if let Some(Peer { state: State::Life(life), .. }) = self.shared.peers().get(&peer) {
            life.connection.close(CloseCode::Goodbye.into(), b"closed");
        }
    }

    /// Sends what is queued, then closes every connection and stops listening. Takes no longer than
    /// [`Limits::farewell`].
    pub async fn shutdown(&self) {
        let mut waiting = JoinSet::new();
        for peer in self.shared.peers().values_mut() {
            if let State::Life(life) = &mut peer.state {
                // With its queues closed, each lane sends what it has, then ends the connection.
                life.lanes = None;
                let connection = life.connection.clone();
                waiting.spawn(async move { connection.closed().await });
            }
        }
        let _ = timeout(self.shared.limits.farewell, async { while waiting.join_next().await.is_some() {} })
            .await;
        self.shared.bound.endpoint.close(CloseCode::Goodbye.into(), b"stopped");
        let _ = timeout(self.shared.limits.farewell, self.shared.bound.endpoint.wait_idle()).await;
    }

    /// What has happened since the start.
    #[must_use]
    pub fn metrics(&self) -> ControlMetrics {
        let c = &self.shared.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ControlMetrics {
            ups: get(&c.ups),
            downs: get(&c.downs),
            frames_sent: get(&c.frames_sent),
            bytes_sent: get(&c.bytes_sent),
            frames_received: get(&c.frames_received),
            bytes_received: get(&c.bytes_received),
            backlogged: get(&c.backlogged),
            rule_breaks: get(&c.rule_breaks),
        }
    }
}

/// Takes back a dial that came to nothing, however it ended.
struct Dialling {
    shared: Arc<Shared>,
    peer: NodeId,
    life: u64,
}

impl Drop for Dialling {
    fn drop(&mut self) {
        if let Some(peer) = self.shared.peers().get_mut(&self.peer)
            && matches!(peer.state, State::Dialling { life } if life == self.life)
        {
            peer.state = State::Nothing;
        }
        self.shared.changed.notify_waiters();
    }
}

/// Both lanes of an admitted connection, and their queues' other ends.
struct Lanes {
    streams: [(SendStream, RecvStream); 2],
    queues: [LaneQueue; 2],
    waiting: [mpsc::Receiver<Vec<u8>>; 2],
}

impl Shared {
    fn peers(&self) -> MutexGuard<'_, BTreeMap<NodeId, Peer>> {
        // Nothing panics between two steps of a change to a peer.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hello(&self, life: u64) -> Hello {
        Hello { nonce: self.nonce, life, part: 0, parts: 1, ports: [0; MAX_PORTS] }
    }

    async fn dial(self: Arc<Self>, addr: SocketAddr) -> Result<NodeId, ConnectError> {
        let failed = |reason: String| ConnectError::Failed { addr, reason };
        let connecting = self.bound.connect(addr).map_err(|e| failed(e.to_string()))?;
        let connection = connecting.await.map_err(|e| failed(e.to_string()))?;
        let life = getrandom::u64().map_err(|e| failed(e.to_string()))?;
        let mut exchange =
            Exchange::dial(&connection, &self.hello(life)).await.map_err(|e| failed(e.to_string()))?;
        let node = exchange.node;
        if node == self.local {
            return Err(ConnectError::Itself { addr });
        }
        let last_ended = {
            let mut peers = self.peers();
            let peer = peers.entry(node).or_default();
            match peer.state {
                State::Life(_) | State::Dialling { .. } => None,
                State::Nothing => {
                    peer.state = State::Dialling { life };
                    Some(peer.last_ended)
                }
            }
        };
        if let Some(last_ended) = last_ended {
            let dialling = Dialling { shared: Arc::clone(&self), peer: node, life };
            let admitted = exchange.confirm(last_ended).await.map_err(|e| failed(e.to_string()))?;
            if admitted {
                let (mut send, recv) = connection.open_bi().await.map_err(|e| failed(e.to_string()))?;
                // The peer sees the stream only when something is on it.
                send.write_all(&[Lane::Urgent as u8]).await.map_err(|e| failed(e.to_string()))?;
                let lanes = self.lanes((exchange.send, exchange.recv), (send, recv));
                let mut peers = self.peers();
                let peer = peers.entry(node).or_default();
                if matches!(peer.state, State::Dialling { life: mine } if mine == life) {
                    let queues = Some(lanes.queues.clone());
                    peer.state = State::Life(Life {
                        life,
                        dialled_here: true,
                        connection: connection.clone(),
                        lanes: queues,
                    });
                    let serve = Arc::clone(&self).serve(node, life, connection, lanes, peer.serving.take());
                    peer.serving = Some(tokio::spawn(serve));
                    drop(peers);
                    self.changed.notify_waiters();
                    return Ok(node);
                }
            } else {
                // The peer's own dial wins: it is on its way.
                connection.close(CloseCode::Settled.into(), b"another connection is kept");
                self.until_up(node).await;
                drop(dialling);
                return Ok(node);
            }
        }
        connection.close(CloseCode::Settled.into(), b"another connection is kept");
        self.until_up(node).await;
        Ok(node)
    }

    async fn until_up(&self, node: NodeId) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let up = matches!(
                self.peers().get(&node),
                Some(Peer { state: State::Life(Life { lanes: Some(_), .. }), .. })
            );
            if up {
                return;
            }
            changed.await;
        }
    }

    async fn accept(self: Arc<Self>) {
        while let Some(incoming) = self.bound.endpoint.accept().await {
            if self.bound.endpoint.open_connections() >= self.limits.peers {
                tracing::warn!(from = %incoming.remote_address(), peers = self.limits.peers, "refused: too many peers");
                incoming.refuse();
                continue;
            }
            let from = incoming.remote_address();
            let shared = Arc::clone(&self);
            tokio::spawn(async move {
                let connecting = match shared.bound.accept(incoming) {
                    Ok(connecting) => connecting,
                    Err(error) => return tracing::debug!(%from, %error, "not accepted"),
                };
                let within = shared.limits.handshake;
                match timeout(within, Arc::clone(&shared).admit(connecting)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!(%from, %error, "control connection refused"),
                    Err(_) => tracing::warn!(%from, ?within, "control handshake took too long"),
                }
            });
        }
    }

    async fn admit(self: Arc<Self>, connecting: quinn::Connecting) -> Result<(), HandshakeError> {
        let connection = connecting.await?;
        let mut exchange = Exchange::answer(&connection, &self.hello(0)).await?;
        let (node, life) = (exchange.node, exchange.peer.life);
        let last_ended = exchange.confirmation().await?;
        let admitted = node != self.local && {
            let mut peers = self.peers();
            let peer = peers.entry(node).or_default();
            let standing = match &peer.state {
                State::Nothing => Standing::Nothing,
                State::Dialling { .. } => Standing::Dialling { confirmed: true },
                State::Life(held) => Standing::Life { life: held.life, dialled_here: held.dialled_here },
            };
            let admitted = admits(self.local, node, standing, last_ended);
            if admitted {
                let next = Life { life, dialled_here: false, connection: connection.clone(), lanes: None };
                if let State::Life(old) = std::mem::replace(&mut peer.state, State::Life(next)) {
                    peer.last_ended = old.life;
                    old.connection.close(CloseCode::Settled.into(), b"replaced");
                }
            }
            admitted
        };
        if !admitted {
            exchange.verdict(false).await?;
            // The dialler closes it; the deadline of this handshake bounds that.
            connection.closed().await;
            return Ok(());
        }
        // If anything fails from here on, also by the deadline, the life ends again.
        let mut forming =
            Forming { shared: Arc::clone(&self), node, life, connection: connection.clone(), up: false };
        exchange.verdict(true).await?;
        let (send, mut recv) = connection.accept_bi().await?;
        let mut opening = [0];
        recv.read_exact(&mut opening).await?;
        let lanes = self.lanes((exchange.send, exchange.recv), (send, recv));
        {
            let mut peers = self.peers();
            let Some(peer) = peers.get_mut(&node) else {
                return Ok(());
            };
            let State::Life(held) = &mut peer.state else {
                return Ok(());
            };
            if held.life != life {
                return Ok(());
            }
            held.lanes = Some(lanes.queues.clone());
            let serve = Arc::clone(&self).serve(node, life, connection, lanes, peer.serving.take());
            peer.serving = Some(tokio::spawn(serve));
        }
        forming.up = true;
        drop(forming);
        self.changed.notify_waiters();
        Ok(())
    }

    fn lanes(&self, main: (SendStream, RecvStream), urgent: (SendStream, RecvStream)) -> Lanes {
        let queue = || {
            let (frames, waiting) = mpsc::channel(self.limits.queued_frames.max(1));
            (LaneQueue { frames, queued_bytes: Arc::default() }, waiting)
        };
        let ((main_queue, main_waiting), (urgent_queue, urgent_waiting)) = (queue(), queue());
        Lanes {
            streams: [main, urgent],
            queues: [main_queue, urgent_queue],
            waiting: [main_waiting, urgent_waiting],
        }
    }

    /// A connection's whole life: `Up`, frames both ways, `Down`.
    async fn serve(
        self: Arc<Self>,
        node: NodeId,
        life: u64,
        connection: Connection,
        lanes: Lanes,
        before: Option<JoinHandle<()>>,
    ) {
        if let Some(before) = before {
            let _ = before.await;
        }
        add(&self.counters.ups, 1);
        let up = ControlEvent::Up { peer: node, addr: connection.remote_address() };
        let _ = self.events.send((up, None)).await;
        let mut readers = JoinSet::new();
        let mut writers = JoinSet::new();
        // What is urgent leaves before what was queued earlier. Only a connection that is lost refuses this.
        let _ = lanes.streams[Lane::Urgent as usize].0.set_priority(1);
        let parts = Lane::ALL.into_iter().zip(lanes.streams).zip(lanes.queues).zip(lanes.waiting);
        for (((lane, (send, recv)), queue), waiting) in parts {
            writers.spawn(Arc::clone(&self).write(send, waiting, queue.queued_bytes));
            readers.spawn(Arc::clone(&self).read(node, lane, connection.clone(), recv));
        }
        let goodbye = connection.clone();
        let finishing = tokio::spawn(async move {
            let mut finished = true;
            while let Some(outcome) = writers.join_next().await {
                finished &= matches!(outcome, Ok(true));
            }
            if finished {
                goodbye.close(CloseCode::Goodbye.into(), b"stopped");
            }
        });
        let reason = self.bound.silence.until_ended(&connection).await;
        finishing.abort();
        self.ended(node, life);
        // What has arrived is still handed over.
        while readers.join_next().await.is_some() {}
        add(&self.counters.downs, 1);
        let _ = self.events.send((ControlEvent::Down { peer: node, reason }, None)).await;
    }

    fn ended(&self, node: NodeId, life: u64) {
        let mut peers = self.peers();
        if let Some(peer) = peers.get_mut(&node)
            && matches!(&peer.state, State::Life(held) if held.life == life)
        {
            peer.state = State::Nothing;
            peer.last_ended = life;
        }
        if peers.len() > MAX_REMEMBERED {
            peers.retain(|_, peer| {
                let idle = matches!(peer.state, State::Nothing);
                !idle || peer.serving.as_ref().is_some_and(|serving| !serving.is_finished())
            });
        }
        drop(peers);
        self.changed.notify_waiters();
    }

    /// Sends a lane's frames until its queue is closed and everything has been acknowledged (true), or the
    /// connection ends.
    async fn write(
        self: Arc<Self>,
        mut send: SendStream,
        mut waiting: mpsc::Receiver<Vec<u8>>,
        queued_bytes: Arc<AtomicUsize>,
    ) -> bool {
        while let Some(body) = waiting.recv().await {
            let len = body.len();
            let mut chunks = [Bytes::copy_from_slice(&frame::header(len)), Bytes::from(body)];
            if send.write_all_chunks(&mut chunks).await.is_err() {
                return false;
            }
            queued_bytes.fetch_sub(len, Ordering::Relaxed);
            add(&self.counters.frames_sent, 1);
            add(&self.counters.bytes_sent, len as u64);
        }
        send.finish().is_ok() && send.stopped().await.is_ok()
    }

    async fn read(self: Arc<Self>, node: NodeId, lane: Lane, connection: Connection, mut recv: RecvStream) {
        let mut decoder = Decoder::new(self.limits.frame_bytes);
        while let Ok(Some(chunk)) = recv.read_chunk(usize::MAX, true).await {
            decoder.push(&chunk.bytes);
            loop {
                match decoder.pop() {
                    Ok(Some(bytes)) => {
                        add(&self.counters.frames_received, 1);
                        add(&self.counters.bytes_received, bytes.len() as u64);
                        // As much as there can ever be, for one that is longer.
                        let room = bytes.len().min(self.limits.event_bytes.max(1));
                        let room = u32::try_from(room).unwrap_or(u32::MAX);
                        let Ok(room) = Arc::clone(&self.room).acquire_many_owned(room).await else { return };
                        let frame = ControlEvent::Frame { peer: node, lane, bytes };
                        if self.events.send((frame, Some(room))).await.is_err() {
                            // Nobody listens any more.
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        add(&self.counters.rule_breaks, 1);
                        tracing::warn!(peer = %node, %error, "closed: malformed frame");
                        connection.close(CloseCode::Rules.into(), error.to_string().as_bytes());
                        return;
                    }
                }
            }
        }
    }
}

/// A life that was admitted: ends when this is dropped before it is up.
struct Forming {
    shared: Arc<Shared>,
    node: NodeId,
    life: u64,
    connection: Connection,
    up: bool,
}

impl Drop for Forming {
    fn drop(&mut self) {
        if self.up {
            return;
        }
        self.connection.close(CloseCode::Goodbye.into(), b"handshake failed");
        self.shared.ended(self.node, self.life);
    }
}
