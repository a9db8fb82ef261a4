//! One side of a transfer: a transport with a region of memory, in this process or in another.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_transport::{Event, Held, RegionId, SubmitError, Transport, Window, Write};

/// What a process and its transport hold. A life that is over leaves all of it as it was before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Holdings {
    pub(crate) transport: Held,
    /// Open descriptors, mappings of shared memory, and threads that belong to lanes.
    pub(crate) process: [usize; 3],
}

/// Where a write's bytes lie, and where they go.
#[derive(Clone, Debug)]
pub(crate) struct Push {
    pub(crate) ticket: u64,
    pub(crate) source: Range<usize>,
    pub(crate) window: Window,
    pub(crate) offset: u64,
}

pub(crate) trait End {
    fn id(&self) -> NodeId;
    fn connect(&mut self, peer: NodeId, addr: SocketAddr);
    fn open(&mut self, peer: NodeId, range: Range<usize>) -> Window;
    fn close(&mut self, window: Window);
    fn push(&mut self, peer: NodeId, push: &Push) -> Result<(), SubmitError>;
    fn poll(&mut self) -> Vec<Event>;
    fn sever(&mut self, peer: NodeId);
    fn holdings(&mut self) -> Holdings;
    /// Fills the region with what [`pattern`] gives; nothing may be under way.
    fn fill(&mut self, salt: u64);
    /// The region's bytes. Can be read after the end was killed, too.
    fn bytes(&self) -> Vec<u8>;
}

/// What a region is filled with.
pub(crate) fn pattern(salt: u64, bytes: &mut [u8]) {
    let mut state = salt;
    for word in bytes.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes()[..word.len()]);
    }
}

/// An end in this process.
pub(crate) struct Local<T> {
    id: NodeId,
    pub(crate) transport: T,
    pub(crate) memory: Arc<HostRegion>,
    region: RegionId,
    holdings: Box<dyn Fn(&T) -> Holdings>,
}

impl<T: Transport> Local<T> {
    pub(crate) fn new(
        id: NodeId,
        mut transport: T,
        memory: Arc<HostRegion>,
        holdings: impl Fn(&T) -> Holdings + 'static,
    ) -> Local<T> {
        let region = transport.register(Arc::clone(&memory)).unwrap();
        Local { id, transport, memory, region, holdings: Box::new(holdings) }
    }
}

impl<T: Transport> End for Local<T> {
    fn id(&self) -> NodeId {
        self.id
    }

    fn connect(&mut self, peer: NodeId, addr: SocketAddr) {
        self.transport.connect(peer, addr);
    }

    fn open(&mut self, peer: NodeId, range: Range<usize>) -> Window {
        self.transport.open_window(peer, self.region, range).unwrap()
    }

    fn close(&mut self, window: Window) {
        self.transport.close_window(window);
    }

    fn push(&mut self, peer: NodeId, push: &Push) -> Result<(), SubmitError> {
        let Push { ticket, source, window, offset } = push.clone();
        let source = self.memory.extent(source).unwrap();
        self.transport.submit(peer, Write { ticket, source, window, offset, immediate: ticket as u32 })
    }

    fn poll(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.transport.poll(&mut events);
        events
    }

    fn sever(&mut self, peer: NodeId) {
        self.transport.sever(peer);
    }

    fn holdings(&mut self) -> Holdings {
        (self.holdings)(&self.transport)
    }

    fn fill(&mut self, salt: u64) {
        let all = self.memory.extent(0..self.memory.len()).unwrap();
        // SAFETY: the caller says that nothing is under way.
        pattern(salt, unsafe { all.bytes_mut() });
        #[cfg(feature = "cuda")]
        if all.on_device().is_some() {
            all.deposit().unwrap();
            // SAFETY: as above. The host's side counts for nothing.
            unsafe { all.bytes_mut() }.fill(0xee);
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let all = self.memory.extent(0..self.memory.len()).unwrap();
        // SAFETY: a byte that is being written is seen in either state; the caller takes both.
        unsafe { all.bytes() }.to_vec()
    }
}
