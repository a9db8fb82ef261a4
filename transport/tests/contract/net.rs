//! Clusters of real sockets on loopback.

use crate::suite::{Cluster, Setup};
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tandem_proto::ids::NodeId;
use tandem_transport::{Identity, NetConfig, NetTransport, Path, Transport, Tuning};

pub(crate) type Quic = Loopback<QuicAlone>;
pub(crate) type QuicThreaded = Loopback<ThreeThreads>;
pub(crate) type QuicSmallPackets = Loopback<Ethernet>;
pub(crate) type Shm = Loopback<ShmAlone>;
pub(crate) type Tls = Loopback<TlsAlone>;
pub(crate) type TlsMany = Loopback<TlsThenQuic>;
#[cfg(feature = "rdma")]
pub(crate) type Rdma = Loopback<RdmaFirst>;
pub(crate) type Best = Loopback<Defaults>;

pub(crate) trait Shape {
    fn config() -> NetConfig;
}

/// Whatever path is best here.
pub(crate) struct Defaults;
impl Shape for Defaults {
    fn config() -> NetConfig {
        NetConfig::default()
    }
}

pub(crate) struct QuicAlone;
impl Shape for QuicAlone {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::Quic], ..NetConfig::default() }
    }
}

pub(crate) struct ShmAlone;
impl Shape for ShmAlone {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::Shm], ..NetConfig::default() }
    }
}

pub(crate) struct TlsAlone;
impl Shape for TlsAlone {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::Tls], tls_connections: 1, ..NetConfig::default() }
    }
}

pub(crate) struct TlsThenQuic;
impl Shape for TlsThenQuic {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::Tls, Path::Quic], tls_connections: 4, ..NetConfig::default() }
    }
}

/// With QUIC behind it: a lane breaks by design when a window closes under a write. Without a device, this is QUIC.
#[cfg(feature = "rdma")]
pub(crate) struct RdmaFirst;
#[cfg(feature = "rdma")]
impl Shape for RdmaFirst {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::Rdma, Path::Quic], ..NetConfig::default() }
    }
}

/// More threads and connections than cores, and an odd number against an even one.
pub(crate) struct ThreeThreads;
impl Shape for ThreeThreads {
    fn config() -> NetConfig {
        NetConfig { threads: 3, connections: 4, ..QuicAlone::config() }
    }
}

/// As between hosts: small packets, so many of them, and small windows, so that writes wait for one another.
pub(crate) struct Ethernet;
impl Shape for Ethernet {
    fn config() -> NetConfig {
        let tuning = Tuning { loopback_mtu: 1452, connection_window: 128 << 10, ..Tuning::default() };
        NetConfig { connections: 1, streams: 2, tuning, ..QuicAlone::config() }
    }
}

pub(crate) struct Loopback<S> {
    nodes: Vec<Option<NetTransport>>,
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
                let config = NetConfig {
                    write_limit: setup.write_limit,
                    connect_timeout: Duration::from_millis(1500),
                    ..S::config()
                };
                let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                Some(
                    NetTransport::bind(addr, &identity, NodeId(node + 1), config)
                        .expect("a socket can be bound"),
                )
            })
            .collect();
        let addresses = nodes.iter().flatten().map(NetTransport::local_addr).collect();
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
