//! One node's data plane in the simulated network.

use super::network::SimNetwork;
use crate::net::lane::Path;
use crate::transport::{Event, RegionId, SubmitError, Transport, TransportError, Write};
use crate::window::Windows;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::task::Waker;
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Window;

/// The simulated [`Transport`]. Dropping it crashes the node.
pub struct SimTransport {
    network: SimNetwork,
    node: NodeId,
    windows: Arc<Windows>,
}

impl SimTransport {
    pub(super) fn new(network: SimNetwork, node: NodeId, windows: Arc<Windows>) -> SimTransport {
        SimTransport { network, node, windows }
    }

    /// Which node it is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }
}

impl Drop for SimTransport {
    fn drop(&mut self) {
        self.network.crash(self.node);
    }
}

impl Transport for SimTransport {
    fn register(&mut self, region: Arc<HostRegion>) -> Result<RegionId, TransportError> {
        self.windows.register(region)
    }

    fn open_window(
        &mut self,
        peer: NodeId,
        region: RegionId,
        range: Range<usize>,
    ) -> Result<Window, TransportError> {
        self.windows.open(peer, region, range, || self.network.draw())
    }

    fn close_window(&mut self, window: Window) {
        self.windows.close(window.key);
        self.network.forget_landed(self.node, window.key);
    }

    /// The address is not used: the simulation finds nodes by their id.
    fn connect(&mut self, peer: NodeId, _address: SocketAddr) {
        self.network.connect_data(self.node, peer);
    }

    fn submit(&mut self, peer: NodeId, write: Write) -> Result<(), SubmitError> {
        write.check_bounds()?;
        self.network.submit(self.node, peer, write)
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        self.network.poll_data(self.node, events);
    }

    fn sever(&mut self, peer: NodeId) {
        self.network.sever(self.node, peer);
    }

    fn path(&self, _peer: NodeId) -> Option<Path> {
        self.network.path()
    }

    fn set_waker(&mut self, waker: Waker) {
        self.network.set_waker(self.node, waker);
    }
}
