//! The transport, held to one path. Each extent of a message is a write.

use crate::PATIENCE;
use crate::end::{End, Landings, Memory};
use crate::pattern::Slots;
use anyhow::{Context, bail, ensure};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};
use tandem_proto::ids::NodeId;
use tandem_transport::{
    Event, Identity, NetConfig, NetTransport, Path, RegionId, Transport, Tuning, Window, Write,
};

pub(crate) fn config(path: Path, tuning: Tuning, connections: usize) -> NetConfig {
    let config = NetConfig { paths: vec![path], tuning, write_limit: 1 << 20, ..NetConfig::default() };
    match path {
        Path::Quic => NetConfig { threads: connections, connections, ..config },
        Path::Tls => NetConfig { tls_connections: connections, ..config },
        // Communicators take NCCL a while, for the first time in a process above all.
        Path::Nccl => NetConfig { connect_timeout: Duration::from_secs(12), ..config },
        Path::CudaIpc | Path::Shm | Path::Rdma => config,
    }
}

/// The immediate of messages that are sent one at a time: those of a run may be seen after its end.
const LONE: u32 = 1;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A node, driven by a thread of its own that takes in what lands, as a node's loop does; while messages are sent,
/// by the thread that sends them.
pub(crate) struct Ours {
    node: Arc<Mutex<Node>>,
    hello: String,
    idle: Thread,
}

struct Node {
    transport: NetTransport,
    /// Where messages land.
    region: RegionId,
    /// Those that messages are sent to, and what each opened.
    peers: Vec<(NodeId, Window)>,
    connected: BTreeSet<NodeId>,
    memory: Memory,
    events: Vec<Event>,
    landings: Arc<Landings>,
}

impl Ours {
    pub(crate) fn new(
        identity: &Identity,
        listen: SocketAddr,
        config: NetConfig,
        memory: Memory,
        landings: Arc<Landings>,
    ) -> anyhow::Result<Ours> {
        #[cfg(feature = "cuda")]
        let config = NetConfig { gpu: memory.landing.twin().map(|twin| Arc::clone(twin.device())), ..config };
        let mut transport = NetTransport::bind(listen, identity, config)?;
        transport.register(Arc::clone(&memory.source))?;
        let region = transport.register(Arc::clone(&memory.landing))?;
        let hello = format!("{} {}", identity.node().0, transport.local_addr());
        let node = Node {
            transport,
            region,
            peers: Vec::new(),
            connected: BTreeSet::new(),
            memory,
            events: Vec::new(),
            landings,
        };
        let node = Arc::new(Mutex::new(node));
        let taken = Arc::clone(&node);
        let idle = std::thread::spawn(move || {
            loop {
                let outcome = lock(&taken).take_in();
                if let Err(error) = outcome {
                    return eprintln!("{error:#}");
                }
                std::thread::park_timeout(PATIENCE);
            }
        });
        Ok(Ours { node, hello, idle: idle.thread().clone() })
    }

    /// Does something with the node, and leaves it to its thread again.
    fn with<T>(&self, what: impl FnOnce(&mut Node) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let mut node = lock(&self.node);
        node.be_woken();
        let outcome = what(&mut node);
        drop(node);
        self.idle.unpark();
        outcome
    }
}

fn lock(node: &Mutex<Node>) -> MutexGuard<'_, Node> {
    node.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Has this thread woken by what happens.
    fn be_woken(&mut self) {
        self.transport.set_waker(Waker::from(Arc::new(Unpark(std::thread::current()))));
    }

    fn take_in(&mut self) -> anyhow::Result<()> {
        self.be_woken();
        self.transport.poll(&mut self.events);
        while let Some(event) = self.events.pop() {
            match event {
                Event::Landed { immediate: LONE, .. } => self.landings.note(1),
                Event::Landed { .. } => {}
                Event::Connected { peer } => _ = self.connected.insert(peer),
                // The other process ended; so will this one.
                Event::Severed { .. } => {}
                other => bail!("{other:?}"),
            }
        }
        Ok(())
    }

    fn next(&mut self) -> anyhow::Result<Event> {
        // The clock is not asked for each of many.
        if let Some(event) = self.events.pop() {
            return Ok(event);
        }
        let until = Instant::now() + PATIENCE;
        loop {
            self.transport.poll(&mut self.events);
            if let Some(event) = self.events.pop() {
                return Ok(event);
            }
            let left = until.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "nothing happened for {PATIENCE:?}");
            std::thread::park_timeout(left);
        }
    }

    /// Waits until a write of this side's is reported; returns which peer's.
    fn next_sent(&mut self) -> anyhow::Result<usize> {
        loop {
            match self.next()? {
                Event::Sent { peer, .. } => {
                    let index = self.peers.iter().position(|(id, _)| *id == peer);
                    return index.with_context(|| format!("{peer} is no peer"));
                }
                Event::Landed { .. } => {}
                other => bail!("{other:?}"),
            }
        }
    }

    fn submit(&mut self, slots: Slots, peer: usize, message: u64, immediate: u32) -> anyhow::Result<()> {
        let (peer, window) = self.peers[peer];
        for extent in slots.message(message) {
            let offset = extent.start as u64;
            let source = self.memory.source.extent(extent)?;
            let write = Write { ticket: message, offset, source, window, immediate };
            self.transport.submit(peer, write)?;
        }
        Ok(())
    }
}

impl End for Ours {
    fn hello(&self) -> String {
        self.hello.clone()
    }

    fn open(&mut self, hello: &str) -> anyhow::Result<String> {
        let (id, _) = hello.split_once(' ').context("an id and an address")?;
        let writer = NodeId(id.parse()?);
        self.with(|node| {
            let all = 0..node.memory.landing.len();
            let Window { region, key, offset, len } = node.transport.open_window(writer, node.region, all)?;
            Ok(format!("{region} {key} {offset} {len}"))
        })
    }

    fn connect(&mut self, peers: &[&str]) -> anyhow::Result<()> {
        self.with(|node| {
            for said in peers {
                let [id, addr, region, key, offset, len] = said.split(' ').collect::<Vec<_>>()[..] else {
                    bail!("{said}: no id, address and window");
                };
                let peer = NodeId(id.parse()?);
                let window = Window {
                    region: region.parse()?,
                    key: key.parse()?,
                    offset: offset.parse()?,
                    len: len.parse()?,
                };
                node.peers.push((peer, window));
                node.transport.connect(peer, addr.parse()?);
                while !node.connected.contains(&peer) {
                    match node.next()? {
                        Event::Connected { peer } => _ = node.connected.insert(peer),
                        other => bail!("{other:?}"),
                    }
                }
            }
            Ok(())
        })
    }

    fn one(&mut self, slots: Slots, peer: usize, message: u64) -> anyhow::Result<()> {
        self.with(|node| {
            node.submit(slots, peer, message, LONE)?;
            for _ in 0..slots.extents {
                node.next_sent()?;
            }
            Ok(())
        })
    }

    fn run(&mut self, slots: Slots, peers: usize, time: Duration) -> anyhow::Result<u64> {
        self.with(|node| {
            let begun = Instant::now();
            let writes = slots.extents;
            let mut flows = vec![Flow { messages: 0, under_way: 0 }; peers];
            loop {
                let mut busy = false;
                for (peer, flow) in flows.iter_mut().enumerate() {
                    let more = begun.elapsed() < time || flow.messages <= slots.count as u64;
                    if more && flow.under_way + writes <= slots.depth() * writes {
                        node.submit(slots, peer, flow.messages, 0)?;
                        flow.messages += 1;
                        flow.under_way += writes;
                        busy = true;
                    }
                }
                if busy {
                    continue;
                }
                if flows.iter().all(|flow| flow.under_way == 0) {
                    return Ok(flows.iter().map(|flow| flow.messages).sum());
                }
                flows[node.next_sent()?].under_way -= 1;
            }
        })
    }
}

/// What is sent to one peer.
#[derive(Clone)]
struct Flow {
    messages: u64,
    /// Writes without a report.
    under_way: usize,
}
