//! Clusters of real sockets on loopback.

use crate::suite::{Cluster, Setup};
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tandem_proto::ids::NodeId;
use tandem_transport::{Identity, QuicConfig, QuicTransport, Transport, Tuning};

pub(crate) type Single = Loopback<Defaults>;
pub(crate) type Threaded = Loopback<ThreeThreads>;
pub(crate) type SmallPackets = Loopback<Ethernet>;

pub(crate) trait Shape {
    fn config() -> QuicConfig;
}

pub(crate) struct Defaults;
impl Shape for Defaults {
    fn config() -> QuicConfig {
        QuicConfig::default()
    }
}

/// More threads and connections than cores, and an odd number against an even one.
pub(crate) struct ThreeThreads;
impl Shape for ThreeThreads {
    fn config() -> QuicConfig {
        QuicConfig { threads: 3, connections: 4, ..QuicConfig::default() }
    }
}

/// As between hosts: small packets, so many of them, and small windows, so that writes wait for one another.
pub(crate) struct Ethernet;
impl Shape for Ethernet {
    fn config() -> QuicConfig {
        let tuning = Tuning {
            loopback_mtu: 1452,
            stream_window: 64 << 10,
            connection_window: 128 << 10,
            ..Tuning::default()
        };
        QuicConfig { connections: 1, streams: 2, tuning, ..QuicConfig::default() }
    }
}

pub(crate) struct Loopback<S> {
    nodes: Vec<Option<QuicTransport>>,
    addresses: Vec<SocketAddr>,
    shape: PhantomData<S>,
}

impl<S: Shape> Cluster for Loopback<S> {
    fn start(setup: Setup) -> Self {
        static CLUSTERS: AtomicU64 = AtomicU64::new(0);
        let cluster = CLUSTERS.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("tandem-contract-{}-{cluster}", std::process::id()));
        let identity = Identity::load_or_create(&dir).expect("an identity can be made");
        std::fs::remove_dir_all(&dir).expect("the directory is there");
        let nodes: Vec<_> = (0..setup.nodes as u64)
            .map(|node| {
                let config = QuicConfig {
                    write_limit: setup.write_limit,
                    connect_timeout: Duration::from_millis(1500),
                    ..S::config()
                };
                let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                Some(
                    QuicTransport::bind(addr, &identity, NodeId(node + 1), config)
                        .expect("a socket can be bound"),
                )
            })
            .collect();
        let addresses = nodes.iter().flatten().map(QuicTransport::local_addr).collect();
        Loopback { nodes, addresses, shape: PhantomData }
    }

    fn id(&self, node: usize) -> NodeId {
        NodeId(node as u64 + 1)
    }

    fn address(&self, node: usize) -> SocketAddr {
        self.addresses[node]
    }

    fn node(&mut self, node: usize) -> &mut dyn Transport {
        self.nodes[node].as_mut().expect("the node lives")
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node].take().expect("the node lives").vanish();
    }

    fn wait(&mut self) {
        // Only tests wait like this: they watch several nodes at once, and time between them.
        std::thread::sleep(Duration::from_micros(300));
    }
}
