//! The stage of the simulated network. Killed is gone without a word, in the middle of anything.

use crate::end::{End, Holdings, Local};
use crate::fault::Stage;
use std::net::SocketAddr;
use std::time::Duration;
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_transport::sim::{SimConfig, SimNetwork, SimTransport};

pub(crate) struct Simulated {
    network: SimNetwork,
    ends: [Local<SimTransport>; 2],
    next_id: u64,
}

fn end(network: &SimNetwork, id: NodeId) -> Local<SimTransport> {
    let of = network.clone();
    let holdings = move |_: &SimTransport| Holdings { transport: of.held(id), process: [0; 3] };
    Local::new(id, network.transport(id), HostRegion::map(Simulated::REGION).unwrap(), holdings)
}

impl Stage for Simulated {
    const REGION: usize = 256 << 10;
    const OLD_OR_NEW: bool = true;

    fn start(seed: u64) -> Simulated {
        let config = SimConfig {
            piece_bytes: 5000,
            write_limit: crate::fault::WRITE_LIMIT,
            event_limit: crate::fault::EVENT_LIMIT,
            ..SimConfig::default()
        };
        let network = SimNetwork::new(seed, config);
        let ends = [1, 2].map(|id| end(&network, NodeId(id)));
        Simulated { network, ends, next_id: 3 }
    }

    fn end(&mut self, end: usize) -> &mut dyn End {
        &mut self.ends[end]
    }

    fn address(&self, end: usize) -> SocketAddr {
        SimNetwork::address(self.ends[end].id())
    }

    fn kill(&mut self, end: usize) {
        self.network.crash(self.ends[end].id());
    }

    fn revive(&mut self, at: usize) {
        self.ends[at] = end(&self.network, NodeId(self.next_id));
        self.next_id += 1;
    }

    fn set_dark(&mut self, dark: bool) {
        let [a, b] = [0, 1].map(|end| self.ends[end].id());
        if dark { self.network.partition(a, b) } else { self.network.heal(a, b) }
    }

    fn now(&self) -> Duration {
        Duration::from_micros(self.network.now().0)
    }

    fn wait(&mut self) {
        let later = self.network.now().after_us(1000);
        let next = self.network.next_at().map_or(later, |next| next.min(later));
        self.network.advance(next.max(self.network.now().after_us(1)));
    }
}
