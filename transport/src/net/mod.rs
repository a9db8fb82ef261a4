//! The [`Transport`] of real machines: a session with each peer, and the best way for its writes.
//!
//! A pair of nodes has one *life* at a time: several QUIC connections, which authenticate, notice the dead and
//! carry writes between any two hosts ([`crate::quic`]), and beside them faster *lanes* where there are some
//! ([`crate::shm`], [`crate::tls`], [`crate::nccl`]). [`lane`] is the seam. A lane that fails is left, and what
//! it had not delivered goes by QUIC: nothing is lost, nothing lands twice. While the life goes on it is made
//! anew.
//!
//! Threads of its own do the work, those of QUIC each with a socket and a single-threaded runtime; the node
//! loop only touches queues.

pub(crate) mod counters;
pub(crate) mod handshakes;
pub(crate) mod header;
mod landed;
pub(crate) mod lane;
pub(crate) mod life;
pub(crate) mod node;
mod tickets;

use crate::endpoint::{BindError, Bound, Tuning};
use crate::handshake::{CloseCode, MAX_PORTS};
use crate::identity::Identity;
use crate::quic::{MAX_STREAMS, STREAMS};
use crate::transport::{Event, Held, RegionId, SubmitError, Transport, TransportError, Write};
use crate::{shm, tls};
use counters::{PathMetrics, PeerStatus, RdmaMemory};
use lane::Path;
use node::{Node, Worker};
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Weak, mpsc};
use std::task::Waker;
use std::thread::JoinHandle;
use std::time::Duration;
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Window;
use tokio::sync::watch;

/// How long stopping waits for the peers to be told.
const FAREWELL: Duration = Duration::from_millis(200);

/// How the transport works.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Ways that writes may take. The best that both sides have is used, and QUIC after it if it is one of
    /// these. The session itself is QUIC in any case.
    pub paths: Vec<Path>,
    /// QUIC's threads, each with a socket of its own. One carries about half a gigabyte a second; more help where
    /// there are cores to spare for them.
    pub threads: usize,
    /// QUIC connections to each peer, spread over the threads of both sides. Each recovers from loss by itself.
    pub connections: usize,
    /// TLS connections to each peer; the smaller number of both sides counts. Further ones help where there are
    /// cores to spare for them.
    pub tls_connections: usize,
    /// Threads that take turns at each direction of a TLS connection. Two seal and send, read and open, side by side: a
    /// third faster, for a fifth more processor time. None takes two where half of the cores have room for all.
    pub tls_turns: Option<usize>,
    /// Writes that are sent at once on each QUIC connection. More would only mix their bytes.
    pub streams: usize,
    /// RDMA devices to use, by name: each must be there. If empty, all that there are. Without feature `rdma` there
    /// are none.
    pub rdma_devices: Vec<String>,
    /// The GPU whose memory is registered, now or later: peers are offered lanes to it from the beginning.
    #[cfg(feature = "cuda")]
    pub gpu: Option<Arc<tandem_memory::cuda::Device>>,
    /// Unreported writes to one peer, at most.
    pub write_limit: usize,
    /// Events that the node loop has not polled, at most: when there are more, peers are kept waiting.
    pub event_limit: usize,
    /// How long connecting may take, lanes included.
    pub connect_timeout: Duration,
    /// Pauses before lanes that failed are made anew: the first, and what it doubles to.
    pub repair: RangeInclusive<Duration>,
    /// Connections with all peers, at most.
    pub connection_limit: usize,
    /// How QUIC is tuned.
    pub tuning: Tuning,
}

impl Default for NetConfig {
    fn default() -> Self {
        NetConfig {
            paths: Path::ALL.to_vec(),
            threads: 1,
            connections: 2,
            tls_connections: 1,
            tls_turns: None,
            streams: 4,
            rdma_devices: Vec::new(),
            #[cfg(feature = "cuda")]
            gpu: None,
            write_limit: 256,
            event_limit: 65_536,
            connect_timeout: Duration::from_secs(3),
            repair: Duration::from_millis(500)..=Duration::from_secs(30),
            connection_limit: 4096,
            tuning: Tuning::default(),
        }
    }
}

/// What has happened since the start. Numbers only grow, but those of RDMA's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetMetrics {
    /// By path, in the order of [`Path::ALL`].
    pub paths: [PathMetrics; Path::ALL.len()],
    /// QUIC packets sent.
    pub packets_sent: u64,
    /// QUIC packets that had to be sent again.
    pub packets_lost: u64,
    /// Peers that came to be connected.
    pub connected: u64,
    /// Sessions that this node ended.
    pub severed_asked: u64,
    /// Sessions that peers ended, or that were lost.
    pub severed_lost: u64,
    /// Peers that could not be reached.
    pub unreachable: u64,
    /// What is registered for RDMA now; none without a device.
    pub rdma_memory: Option<RdmaMemory>,
}

impl NetMetrics {
    /// Bytes that landed at peers.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.paths.iter().map(|path| path.bytes_sent).sum()
    }

    /// Bytes that landed here.
    #[must_use]
    pub fn bytes_landed(&self) -> u64 {
        self.paths.iter().map(|path| path.bytes_landed).sum()
    }

    /// Writes that were sent again because their path had failed.
    #[must_use]
    pub fn writes_repeated(&self) -> u64 {
        self.paths.iter().map(|path| path.writes_repeated).sum()
    }
}

/// Sees what a [`NetTransport`] does, from any thread, as long as there is one.
#[derive(Clone)]
pub struct NetObserver(Weak<Node>);

impl NetObserver {
    /// What has happened since the start; none once the transport is gone.
    #[must_use]
    pub fn metrics(&self) -> Option<NetMetrics> {
        self.0.upgrade().map(|node| node.metrics())
    }

    /// The peers that are connected, and those that were in the last five minutes.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.0.upgrade().map_or_else(Vec::new, |node| node.peers())
    }
}

/// The [`Transport`] between processes and hosts. Dropping it tells the peers, and stops its threads.
pub struct NetTransport {
    node: Arc<Node>,
    threads: Vec<JoinHandle<()>>,
    stop: watch::Sender<Stop>,
    addr: SocketAddr,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    No,
    /// With a word to the peers.
    Goodbye,
    /// At once.
    Silently,
}

impl NetTransport {
    /// Listens as [`Identity::node`], and takes whoever has a certificate of the cluster.
    ///
    /// # Errors
    /// When the address cannot be had, or a setting is out of bounds.
    pub fn bind(addr: SocketAddr, identity: &Identity, config: NetConfig) -> Result<NetTransport, BindError> {
        let bounds = [
            ("threads", config.threads, 1..=MAX_PORTS, "from 1 to 16"),
            ("connections", config.connections, 1..=life::MAX_PARTS, "from 1 to 64"),
            ("tls_connections", config.tls_connections, 1..=tls::MAX_CONNECTIONS, "from 1 to 16"),
            ("tls_turns", config.tls_turns.unwrap_or(1), 1..=tls::MAX_TURNS, "1 or 2"),
            ("streams", config.streams, 1..=MAX_STREAMS as usize, "from 1 to 64"),
            ("write_limit", config.write_limit, 1..=1 << 20, "from 1 to 1048576"),
            ("event_limit", config.event_limit, 1..=1 << 24, "from 1 to 16777216"),
        ];
        if config.repair.is_empty() {
            let allowed = "a pause, and one that is no shorter";
            return Err(BindError::Setting {
                name: "repair",
                value: format!("{:?}", config.repair),
                allowed,
            });
        }
        if config.paths.is_empty() {
            let allowed = "one path at least";
            return Err(BindError::Setting { name: "paths", value: "empty".into(), allowed });
        }
        for (name, value, range, allowed) in bounds {
            if !range.contains(&value) {
                return Err(BindError::Setting { name, value: value.to_string(), allowed });
            }
        }
        let (stop, stopping) = watch::channel(Stop::No);
        // Threads are started one by one, and each tells one outcome.
        let (bound_sender, bound) = mpsc::sync_channel(1);
        let mut threads = Vec::new();
        let mut workers: Vec<Worker> = Vec::new();
        let mut starts = Vec::new();
        for index in 0..config.threads {
            // Only the first socket has the address that peers are told; they learn the others' from it.
            let addr = if index == 0 { addr } else { SocketAddr::new(addr.ip(), 0) };
            let (start, started) = tokio::sync::oneshot::channel();
            let thread = Thread {
                addr,
                identity: identity.clone(),
                tuning: config.tuning.clone(),
                bound: bound_sender.clone(),
                started,
                stopping: stopping.clone(),
            };
            let spawned = std::thread::Builder::new()
                .name(format!("quic-{index}"))
                .spawn(move || thread.run())
                .map_err(BindError::Thread)?;
            threads.push(spawned);
            starts.push(start);
            let worker = bound.recv().map_err(|_| {
                BindError::Thread(std::io::Error::other("the thread ended before it had bound its socket"))
            })?;
            workers.push(worker?);
        }
        let addr = workers[0].addr;
        let seed = getrandom::u64().map_err(|e| BindError::Tls(format!("no randomness: {e}")))?;
        let of_one_host = [Path::CudaIpc, Path::Shm].iter().any(|path| config.paths.contains(path));
        let shm = of_one_host.then(|| shm::Listener::new(identity.node()));
        let shm = shm.and_then(|listener| match listener {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!(%error, "no shared memory with processes of this host");
                None
            }
        });
        // NCCL's lanes say over it what else there is to say.
        let over_tls = [Path::Tls, Path::Nccl].iter().any(|path| config.paths.contains(path));
        let tls = over_tls.then(|| tls::Listener::new(addr, identity));
        let tls = tls.and_then(|listener| match listener {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!(%error, %addr, "no TLS with peers");
                None
            }
        });
        let node = Arc::new(Node::new(identity, config, workers, shm, tls, seed)?);
        node.fetches.start(&node).map_err(BindError::Thread)?;
        if node.tls().is_some() {
            let accepting = Arc::clone(&node);
            node.spawn("tls-accept".into(), move || tls::accept(&accepting)).map_err(BindError::Thread)?;
        }
        if node.shm().is_some() {
            let accepting = Arc::clone(&node);
            node.spawn("shm-accept".into(), move || shm::accept(&accepting)).map_err(BindError::Thread)?;
        }
        for start in starts {
            // A thread that ended since will show as connections that fail.
            let _ = start.send(Arc::clone(&node));
        }
        Ok(NetTransport { node, threads, stop, addr })
    }

    /// Where peers connect to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// What has happened since the start.
    #[must_use]
    pub fn metrics(&self) -> NetMetrics {
        self.node.metrics()
    }

    /// For those who watch it.
    #[must_use]
    pub fn observer(&self) -> NetObserver {
        NetObserver(Arc::downgrade(&self.node))
    }

    /// Ends the lanes of a path to a peer, as if they had failed here: for tests of what happens then.
    #[doc(hidden)]
    pub fn fail_path(&self, peer: NodeId, path: Path) {
        self.node.fail_path(peer, path);
    }

    /// What it holds for its peers: for tests of what is left when they are gone.
    #[doc(hidden)]
    #[must_use]
    pub fn held(&self) -> Held {
        self.node.held()
    }

    /// Stops without a word to anyone, as a crash would: for tests of those who must notice.
    #[doc(hidden)]
    pub fn vanish(self) {
        self.stop.send_replace(Stop::Silently);
    }
}

impl Drop for NetTransport {
    fn drop(&mut self) {
        self.stop.send_if_modified(|stop| {
            let first = *stop == Stop::No;
            if first {
                *stop = Stop::Goodbye;
            }
            first
        });
        for thread in self.threads.drain(..) {
            // A panic there has been reported by the panic hook, and ended the connections.
            let _ = thread.join();
        }
        self.node.stop();
    }
}

impl Transport for NetTransport {
    fn register(&mut self, region: Arc<HostRegion>) -> Result<RegionId, TransportError> {
        self.node.register(region)
    }

    fn open_window(
        &mut self,
        peer: NodeId,
        region: RegionId,
        range: Range<usize>,
    ) -> Result<Window, TransportError> {
        self.node.open_window(peer, region, range)
    }

    fn close_window(&mut self, window: Window) {
        self.node.close_window(window);
    }

    fn connect(&mut self, peer: NodeId, address: SocketAddr) {
        Node::connect(&self.node, peer, address);
    }

    fn submit(&mut self, peer: NodeId, write: Write) -> Result<(), SubmitError> {
        self.node.submit(peer, write)
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        self.node.poll(events);
    }

    fn sever(&mut self, peer: NodeId) {
        self.node.sever(peer);
    }

    fn path(&self, peer: NodeId) -> Option<Path> {
        self.node.path(peer)
    }

    fn set_waker(&mut self, waker: Waker) {
        self.node.set_waker(waker);
    }
}

/// What a thread is started with.
struct Thread {
    addr: SocketAddr,
    identity: Identity,
    tuning: Tuning,
    bound: mpsc::SyncSender<Result<Worker, BindError>>,
    started: tokio::sync::oneshot::Receiver<Arc<Node>>,
    stopping: watch::Receiver<Stop>,
}

impl Thread {
    fn tell(&self, outcome: Result<Worker, BindError>) {
        // Whoever binds waits for this; if it is gone, so are the other ends that keep this thread going.
        let _ = self.bound.send(outcome);
    }

    fn run(mut self) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return self.tell(Err(BindError::Thread(error))),
        };
        runtime.block_on(async {
            let bound = match Bound::new(self.addr, &self.identity, &self.tuning, STREAMS) {
                Ok(bound) => bound,
                Err(error) => return self.tell(Err(error)),
            };
            let addr = match bound.local_addr() {
                Ok(addr) => addr,
                Err(source) => {
                    return self.tell(Err(BindError::Bind { addr: self.addr, source }));
                }
            };
            let endpoint = bound.endpoint.clone();
            let worker = Worker { runtime: tokio::runtime::Handle::current(), bound: bound.clone(), addr };
            self.tell(Ok(worker));
            let Ok(node) = (&mut self.started).await else {
                return;
            };
            let accepting = tokio::spawn(Node::accept(node, bound));
            let stop =
                self.stopping.wait_for(|stop| *stop != Stop::No).await.map_or(Stop::Silently, |stop| *stop);
            accepting.abort();
            if stop == Stop::Goodbye {
                endpoint.close(CloseCode::Goodbye.into(), b"stopped");
                let _ = tokio::time::timeout(FAREWELL, endpoint.wait_idle()).await;
            }
        });
        // Ends every task, and with them the last holders of sources and windows.
        drop(runtime);
    }
}
