//! Clusters of real sockets on loopback.

use crate::members;
use crate::suite::{Cluster, Setup};
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::OnceLock;
use std::time::Duration;
use tandem_memory::HostRegion;
#[cfg(feature = "cuda")]
use tandem_memory::cuda::Device;
use tandem_proto::ids::NodeId;
use tandem_transport::{NetConfig, NetTransport, Path, Transport, Tuning};

pub(crate) type Quic = Loopback<QuicAlone>;
pub(crate) type QuicThreaded = Loopback<ThreeThreads>;
pub(crate) type QuicSmallPackets = Loopback<Ethernet>;
pub(crate) type Shm = Loopback<ShmAlone>;
pub(crate) type Tls = Loopback<TlsAlone>;
pub(crate) type TlsMany = Loopback<TlsThenQuic>;
#[cfg(feature = "rdma")]
pub(crate) type RdmaOne = Loopback<RdmaFirst<1>>;
#[cfg(feature = "rdma")]
pub(crate) type RdmaTwo = Loopback<RdmaFirst<2>>;
#[cfg(feature = "cuda")]
pub(crate) type CudaIpc = Loopback<Twins<CudaIpcAlone>>;
#[cfg(feature = "cuda")]
pub(crate) type Nccl = Loopback<Twins<NcclFirst>>;
#[cfg(feature = "cuda")]
pub(crate) type ShmTwins = Loopback<Twins<ShmAlone>>;
#[cfg(feature = "cuda")]
pub(crate) type TlsTwins = Loopback<Twins<TlsThenQuic>>;
#[cfg(feature = "cuda")]
pub(crate) type QuicTwins = Loopback<Twins<QuicAlone>>;
pub(crate) type Best = Loopback<Defaults>;

pub(crate) trait Shape {
    fn config() -> NetConfig;

    /// The path that all writes between so many nodes must take, until it fails.
    fn must_take(_nodes: usize) -> Option<Path> {
        None
    }

    /// What differs between nodes.
    fn of_node(_node: usize, config: NetConfig) -> NetConfig {
        config
    }

    fn missing() -> Option<String> {
        None
    }

    fn memory(_node: usize, len: usize) -> Arc<HostRegion> {
        HostRegion::map(len).unwrap()
    }
}

/// Whatever path is best here.
pub(crate) struct Defaults;
impl Shape for Defaults {
    fn config() -> NetConfig {
        NetConfig::default()
    }
}

#[cfg(feature = "cuda")]
pub(crate) struct CudaIpcAlone;
#[cfg(feature = "cuda")]
impl Shape for CudaIpcAlone {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::CudaIpc], ..NetConfig::default() }
    }
}

/// With TLS for nodes that share a GPU, where NCCL has room for one.
#[cfg(feature = "cuda")]
pub(crate) struct NcclFirst;
#[cfg(feature = "cuda")]
impl Shape for NcclFirst {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::Nccl, Path::Tls], ..NetConfig::default() }
    }

    fn must_take(nodes: usize) -> Option<Path> {
        (nodes <= gpus().as_ref().map_or(0, Vec::len)).then_some(Path::Nccl)
    }

    /// Making communicators takes NCCL a while.
    fn of_node(_node: usize, config: NetConfig) -> NetConfig {
        NetConfig { connect_timeout: Duration::from_secs(12), ..config }
    }

    fn missing() -> Option<String> {
        match gpus() {
            Err(missing) => Some(missing.clone()),
            Ok(gpus) if gpus.len() < 2 => Some("NCCL is between two GPUs, and here is one".into()),
            Ok(_) => {
                let config =
                    NetConfig { paths: vec![Path::Nccl], gpu: Some(Arc::clone(gpu(0))), ..Self::config() };
                let bound = NetTransport::bind((Ipv4Addr::LOCALHOST, 0).into(), members::member(0), config);
                bound.err().map(|error| error.to_string())
            }
        }
    }
}

/// With memory on GPUs, those that there are by turns.
#[cfg(feature = "cuda")]
pub(crate) struct Twins<S>(PhantomData<S>);
#[cfg(feature = "cuda")]
impl<S: Shape> Shape for Twins<S> {
    fn config() -> NetConfig {
        S::config()
    }

    fn must_take(nodes: usize) -> Option<Path> {
        let paths = S::config().paths;
        if paths[0] == Path::Nccl { S::must_take(nodes) } else { Some(paths[0]) }
    }

    fn of_node(node: usize, config: NetConfig) -> NetConfig {
        NetConfig { gpu: Some(Arc::clone(gpu(node))), ..S::of_node(node, config) }
    }

    fn missing() -> Option<String> {
        gpus().as_ref().err().cloned().or_else(S::missing)
    }

    fn memory(node: usize, len: usize) -> Arc<HostRegion> {
        HostRegion::with_twin(gpu(node), len).unwrap()
    }
}

#[cfg(feature = "cuda")]
fn gpu(node: usize) -> &'static Arc<Device> {
    let gpus = gpus().as_ref().unwrap();
    &gpus[node % gpus.len()]
}

/// Opened once, as by a node, and kept: else the driver makes and ends contexts, slowly, while tests beside it time
/// what they do.
#[cfg(feature = "cuda")]
fn gpus() -> &'static Result<Vec<Arc<Device>>, String> {
    static GPUS: OnceLock<Result<Vec<Arc<Device>>, String>> = OnceLock::new();
    GPUS.get_or_init(|| {
        let opened = Device::count().and_then(|count| (0..count).map(Device::open).collect());
        opened.map_err(|error| error.to_string())
    })
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
        NetConfig { paths: vec![Path::Tls], tls_connections: 1, tls_turns: Some(1), ..NetConfig::default() }
    }
}

pub(crate) struct TlsThenQuic;
impl Shape for TlsThenQuic {
    fn config() -> NetConfig {
        NetConfig {
            paths: vec![Path::Tls, Path::Quic],
            tls_connections: 4,
            tls_turns: Some(2),
            ..NetConfig::default()
        }
    }
}

/// With QUIC behind it: a lane breaks by design when a window closes under a write. Nodes have one device, the same
/// or by turns two. Without one, this is QUIC.
#[cfg(feature = "rdma")]
pub(crate) struct RdmaFirst<const DEVICES: usize>;
#[cfg(feature = "rdma")]
impl<const DEVICES: usize> Shape for RdmaFirst<DEVICES> {
    fn config() -> NetConfig {
        NetConfig { paths: vec![Path::Rdma, Path::Quic], ..NetConfig::default() }
    }

    fn must_take(_nodes: usize) -> Option<Path> {
        std::env::var_os("RDMA_VM").map(|_| Path::Rdma)
    }

    fn of_node(node: usize, config: NetConfig) -> NetConfig {
        let device = std::env::var(format!("RDMA_VM_DEV{}", node % DEVICES));
        NetConfig { rdma_devices: device.into_iter().collect(), ..config }
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

pub(crate) struct Loopback<S: Shape> {
    nodes: Vec<Option<NetTransport>>,
    addresses: Vec<SocketAddr>,
    shape: PhantomData<S>,
}

impl<S: Shape> Cluster for Loopback<S> {
    fn missing() -> Option<String> {
        S::missing()
    }

    fn memory(node: usize, len: usize) -> Arc<HostRegion> {
        S::memory(node, len)
    }

    fn start(setup: Setup) -> Self {
        let nodes: Vec<_> = (0..setup.nodes)
            .map(|node| {
                let config = NetConfig {
                    write_limit: setup.write_limit,
                    connect_timeout: Duration::from_millis(1500),
                    ..S::config()
                };
                let config = S::of_node(node, config);
                let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                Some(NetTransport::bind(addr, members::member(node), config).expect("a socket can be bound"))
            })
            .collect();
        let addresses = nodes.iter().flatten().map(NetTransport::local_addr).collect();
        Loopback { nodes, addresses, shape: PhantomData }
    }

    fn id(&self, node: usize) -> NodeId {
        members::id(node)
    }

    fn address(&self, node: usize) -> SocketAddr {
        self.addresses[node]
    }

    fn node(&mut self, node: usize) -> &mut dyn Transport {
        self.nodes[node].as_mut().expect("the node lives")
    }

    fn kill(&mut self, node: usize) {
        self.check_path(node);
        self.nodes[node].take().expect("the node lives").vanish();
    }

    fn wait(&mut self) {
        // Only tests wait like this: they watch several nodes at once, and time between them.
        std::thread::sleep(Duration::from_micros(300));
    }
}

impl<S: Shape> Loopback<S> {
    /// What went another way than it must, went there because that had failed.
    fn check_path(&self, node: usize) {
        let (Some(must), Some(transport)) = (S::must_take(self.nodes.len()), &self.nodes[node]) else {
            return;
        };
        let paths = transport.metrics().paths;
        let carried = |path: Path| paths[path as usize].writes_sent + paths[path as usize].writes_landed;
        let others: u64 = Path::ALL.into_iter().filter(|path| *path != must).map(carried).sum();
        let failed = paths[must as usize].failed;
        println!(
            "node {node}: {} writes over {must}, which failed {failed} times; {others} over others",
            carried(must)
        );
        assert!(others == 0 || failed > 0, "node {node}: {others} writes did not go over {must}");
    }
}

impl<S: Shape> Drop for Loopback<S> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            (0..self.nodes.len()).for_each(|node| self.check_path(node));
        }
    }
}
