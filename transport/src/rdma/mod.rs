//! Lanes over RDMA verbs: the NIC writes from the source's memory into the window's, and no core copies a byte.
//!
//! - [`Rdma`]: the devices of this host, opened once. [`Rdma::open`] says what it found.
//! - [`Lane`]: several queue pairs with one peer, spread over all ports of both sides; made from an [`Offer`] and
//!   its answer, which any authenticated stream can carry.
//! - [`Session`]: what a lane needs of the session that it belongs to.
//!
//! A peer can write only what is open to it: each window that it writes is bound to a memory window of each of its
//! queue pairs, and invalidated before closing returns. Where there are no memory windows, on some devices and for a
//! GPU's memory by dma-buf, a window is registered by itself, and deregistered before closing returns: there a peer of
//! the cluster that guesses the key of another's open window could write that. A write anywhere else breaks the queue
//! pair, and the lane with it.
//!
//! Memory of a GPU that a region has for its twin is read and written by the NIC, where that can be ([`gpu`]).
//!
//! Bytes are not encrypted on the way: use it on networks that are trusted, as RDMA networks have to be.

mod adapter;
#[cfg(any(feature = "cuda", test))]
mod gpu;
mod incoming;
mod lane;
mod message;
mod offer;
mod outgoing;
mod registry;
mod session;
#[cfg(test)]
mod tests;
mod verbs;
mod windows;
mod worker;

use crate::net::counters::RdmaMemory;
use crate::net::header::Header;
use crate::window::Landing;
use adapter::Adapter;
use lane::Lane;
use offer::Offer;
use registry::Registry;
pub(crate) use session::{Answered, Offered};
use std::sync::Arc;
use std::time::Duration;
use verbs::{Device, Port, VerbsError};

/// The most queue pairs of a lane that carry bytes.
pub(crate) const MAX_DATA_PAIRS: usize = 8;

/// How RDMA is used.
#[derive(Clone, Debug)]
pub(crate) struct RdmaConfig {
    /// Devices by name; all if empty.
    pub(crate) devices: Vec<String>,
    /// Queue pairs that carry bytes to each peer, at least; there is one more for messages, and one for each port.
    /// Several keep a NIC's units busy; from four on there is no more to gain.
    pub(crate) queue_pairs: usize,
    /// Whether memory windows are used where a device has them.
    pub(crate) memory_windows: bool,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        RdmaConfig { devices: Vec::new(), queue_pairs: 4, memory_windows: true }
    }
}

/// The devices of this host, with the ports that can be used.
pub(crate) struct Rdma {
    /// Each with one port at least. Those near the cores that this process may run on come first.
    adapters: Vec<Arc<Adapter>>,
    registry: Arc<Registry>,
    config: RdmaConfig,
}

impl Rdma {
    /// Opens the devices. An error says what is missing: then the host is one without RDMA.
    pub(crate) fn open(config: RdmaConfig) -> Result<Rdma, VerbsError> {
        let names = if config.devices.is_empty() { verbs::names()? } else { config.devices.clone() };
        let mut devices = Vec::new();
        for name in names {
            match Device::open(&name) {
                Ok(device) => devices.push(device),
                // One that was asked for must be there.
                Err(error) if !config.devices.is_empty() => return Err(error),
                Err(error) => tracing::warn!(%error, "RDMA device not used"),
            }
        }
        // A lane spreads over all of them, and opens each window in the same way everywhere.
        let memory_windows = config.memory_windows && devices.iter().all(|device| device.memory_windows);
        let mut adapters = Vec::new();
        for device in devices {
            let adapter = Adapter::new(device)?;
            let (device, ports) = (adapter.device.name(), adapter.ports.len());
            tracing::info!(
                device,
                ports,
                numa_node = adapter.device.numa_node,
                near = adapter.device.near,
                memory_windows,
                "RDMA device found"
            );
            if ports > 0 {
                adapters.push(Arc::new(adapter));
            } else if !config.devices.is_empty() {
                return Err(VerbsError::NoDevice(format!("{device} with a port that can be used")));
            }
        }
        if adapters.is_empty() {
            return Err(VerbsError::NoDevice("with a port that can be used".into()));
        }
        // Near ones first, else in an order that is the same on equal hosts, so that equal ports are wired to each
        // other.
        adapters.sort_by_key(|adapter| {
            let device = &adapter.device;
            (!device.near, device.numa_node, device.name().to_owned())
        });
        let registry = Arc::new(Registry::new(adapters.clone(), memory_windows));
        Ok(Rdma { adapters, registry, config })
    }

    /// Registers memory ahead of its first use, which would wait for it.
    pub(crate) fn register(&self, memory: &Arc<tandem_memory::HostRegion>) -> Result<(), VerbsError> {
        self.registry.region(memory).map(drop)
    }

    /// What is registered now.
    pub(crate) fn memory(&self) -> RdmaMemory {
        self.registry.bytes()
    }

    fn rails(&self) -> Vec<(Arc<Adapter>, Port)> {
        let of = |adapter: &Arc<Adapter>| {
            let adapter = Arc::clone(adapter);
            adapter.ports.clone().into_iter().map(move |port| (Arc::clone(&adapter), port))
        };
        self.adapters.iter().flat_map(of).collect()
    }

    /// Queue pairs to be offered to a peer.
    pub(crate) fn prepare(&self) -> Result<Arc<Lane>, VerbsError> {
        let rails = self.rails();
        let pairs = self.config.queue_pairs.max(rails.len()).clamp(1, MAX_DATA_PAIRS);
        Lane::new(rails.into_iter().cycle().take(1 + pairs).collect(), &self.registry)
    }

    /// Queue pairs for an offer, each on a port of the kind that it needs. They are to be connected to it.
    pub(crate) fn prepare_for(&self, offer: &Offer) -> Result<Arc<Lane>, VerbsError> {
        let rails = self.rails();
        let mut chosen = Vec::new();
        for (at, end) in offer.ends.iter().enumerate() {
            let fitting: Vec<_> = rails.iter().filter(|(_, port)| port.link == end.link).collect();
            let Some(rail) = fitting.get(at % fitting.len().max(1)) else {
                return Err(VerbsError::NoDevice(format!("on {:?}, which the peer has", end.link)));
            };
            chosen.push((*rail).clone());
        }
        Lane::new(chosen, &self.registry)
    }
}

/// What a session says to a write of the peer's.
pub(crate) enum Arrival {
    /// It may land here.
    Open(Arc<Landing>),
    /// It has landed before, on another way.
    Landed,
    /// No such window is open to the peer.
    Refused,
}

/// The session that a lane belongs to.
pub(crate) trait Session: Send + Sync {
    /// A write of the peer's is to come.
    fn arrived(&self, header: &Header) -> Arrival;

    /// All bytes of a write have landed, `on_twin` or on the host's side of its region: reports it, and says whether it
    /// did, or the window has been closed since. None if the peer has more writes under way than it may.
    fn land(&self, landing: &Landing, header: &Header, on_twin: bool) -> Option<bool>;

    /// The peer has said what became of a write, and its source is not read any more.
    fn settle(&self, sequence: u64, landed: bool);

    /// The lane carries nothing any more: what it has not settled goes another way. Called at most once, from a
    /// thread of the lane's.
    fn failed(&self, reason: &str);

    /// Waits until more landings can be reported; false if that takes longer than `at_most`.
    fn wait_for_room(&self, at_most: Duration) -> bool;
}

/// Gives bytes to every decoder of what peers send.
pub(crate) fn fuzz(bytes: &[u8]) {
    offer::fuzz(bytes);
    message::fuzz(bytes);
}

/// Of each, one to be damaged by fuzzing.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    [offer::samples(), message::samples()].concat()
}
