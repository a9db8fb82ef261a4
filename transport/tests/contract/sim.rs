//! Clusters in the simulated network.

use crate::suite::{Cluster, Setup};
use std::marker::PhantomData;
use std::net::SocketAddr;
use tandem_proto::ids::NodeId;
use tandem_transport::Transport;
use tandem_transport::sim::{SimConfig, SimNetwork, SimTransport};

pub(crate) type Steady = Simulated<Healthy>;
pub(crate) type Rough = Simulated<Lossy>;

pub(crate) trait Weather {
    fn config() -> SimConfig;
}

pub(crate) struct Healthy;
impl Weather for Healthy {
    fn config() -> SimConfig {
        SimConfig { reorder: false, ..SimConfig::default() }
    }
}

pub(crate) struct Lossy;
impl Weather for Lossy {
    fn config() -> SimConfig {
        SimConfig {
            latency_us: 1..=20_000,
            piece_bytes: 10_007,
            loss: 0.1,
            stall: 0.05,
            stall_us: 1..=50_000,
            ..SimConfig::default()
        }
    }
}

pub(crate) struct Simulated<W> {
    network: SimNetwork,
    nodes: Vec<Option<SimTransport>>,
    weather: PhantomData<W>,
}

impl<W: Weather> Cluster for Simulated<W> {
    fn start(setup: Setup) -> Self {
        let network =
            SimNetwork::new(setup.seed, SimConfig { write_limit: setup.write_limit, ..W::config() });
        let nodes = (0..setup.nodes).map(|i| Some(network.transport(NodeId(i as u64 + 1)))).collect();
        Simulated { network, nodes, weather: PhantomData }
    }

    fn id(&self, node: usize) -> NodeId {
        NodeId(node as u64 + 1)
    }

    fn address(&self, node: usize) -> SocketAddr {
        SimNetwork::address(self.id(node))
    }

    fn node(&mut self, node: usize) -> &mut dyn Transport {
        self.nodes[node].as_mut().expect("the node lives")
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node] = None;
    }

    fn wait(&mut self) {
        let next = self.network.next_at().unwrap_or_else(|| self.network.now().after_us(1000));
        self.network.advance(next);
    }
}
