//! A node with a region of memory, and everything that it has reported.

use crate::members::member;
use std::net::SocketAddr;
use std::sync::Arc;
use tandem_memory::HostRegion;
use tandem_transport::{Event, NetConfig, NetTransport, RegionId, Transport as _};

pub(crate) struct Node {
    pub(crate) transport: NetTransport,
    pub(crate) memory: Arc<HostRegion>,
    pub(crate) region: RegionId,
    pub(crate) events: Vec<Event>,
}

impl Node {
    pub(crate) fn start(number: usize, addr: SocketAddr, region_bytes: usize, config: NetConfig) -> Node {
        let mut transport = NetTransport::bind(addr, member(number), config).unwrap();
        let memory = HostRegion::map(region_bytes).unwrap();
        let region = transport.register(Arc::clone(&memory)).unwrap();
        Node { transport, memory, region, events: Vec::new() }
    }

    pub(crate) fn poll(&mut self) {
        self.transport.poll(&mut self.events);
    }
}
