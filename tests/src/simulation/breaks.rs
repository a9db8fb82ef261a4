//! Deliberate breaks of the protocol, made between the node loops and the network.

use super::chance::Rng;
use super::model::SHAPE;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;
use tandem_memory::HostRegion;
use tandem_node::{Cluster, NodeEvent, SendError, lane};
use tandem_proto::handoff::Immediate;
use tandem_proto::ids::{LayerIdx, NodeId, SlotEpoch, SlotId};
use tandem_proto::wire::{self, Handoff, LeaseToken, Message};
use tandem_transport::sim::{SimNetwork, SimTransport};
use tandem_transport::{
    Event, FailReason, Path, RegionId, SubmitError, Transport, TransportError, Window, Write, control,
};

/// One rule of the handoff that a cluster breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Break {
    /// The decode node frees its slots when it sends `Cancel`, not when `Fenced` comes.
    SlotFreedEarly,
    /// The prefill node answers `Cancel` with `Fenced` while its writes are in flight.
    FencedTooSoon,
    /// The prefill node announces a chunk when its writes were submitted, not when they have landed, and the
    /// decode node believes it.
    DoneBeforeAllBytes,
    /// The prefill node never answers `Cancel`.
    CancelUnanswered,
    /// The decode node leaves windows open when leases end, and takes writes of old leases for the current one.
    StaleEpochAccepted,
    /// The prefill node writes layers that are still being packed.
    SentBeforePacked,
    /// The decode node frees slots, and decodes from pages, while layers are still being scattered.
    SlotFreedWhileRead,
    /// The prefill node does not compare the checksums of stored chunks: those of damaged ones agree.
    ChecksumNotCompared,
}

impl Break {
    /// All of them.
    pub const ALL: [Break; 8] = [
        Break::SlotFreedEarly,
        Break::FencedTooSoon,
        Break::DoneBeforeAllBytes,
        Break::CancelUnanswered,
        Break::StaleEpochAccepted,
        Break::SentBeforePacked,
        Break::SlotFreedWhileRead,
        Break::ChecksumNotCompared,
    ];
}

/// What the wrappers below saw, and what they want done.
#[derive(Default)]
pub(super) struct Seen {
    /// `sever` calls: who cut whom.
    pub(super) severs: Vec<(NodeId, NodeId)>,
    /// Rules that somebody else saw broken.
    pub(super) violations: Vec<String>,
    /// Writes that arrived at a closed window: somebody freed memory that was still written.
    pub(super) refused: Vec<NodeId>,
    /// Nodes with events that the network does not know of.
    pub(super) poked: Vec<NodeId>,
    /// Messages to put into a node's own inbox.
    pub(super) injected: Vec<(NodeId, NodeEvent)>,
    /// Control connections, as each end knows them.
    pub(super) connected: BTreeSet<(NodeId, NodeId)>,
    /// The epoch of each slot's current lease.
    epochs: BTreeMap<(NodeId, SlotId), SlotEpoch>,
}

/// Shared by a world and all wrappers in it.
pub(super) type SharedSeen = Arc<Mutex<Seen>>;

fn lock(seen: &SharedSeen) -> MutexGuard<'_, Seen> {
    seen.lock().expect("one thread")
}

/// A node's control channel in the simulation.
pub(super) struct SimCluster {
    pub(super) node: NodeId,
    pub(super) network: SimNetwork,
    pub(super) seen: SharedSeen,
    pub(super) broken: Option<Break>,
}

impl Cluster for SimCluster {
    fn send(&self, to: NodeId, message: &Message) -> Result<(), SendError> {
        match message {
            Message::Handoff(Handoff::Fenced { .. }) if self.broken == Some(Break::CancelUnanswered) => {
                return Ok(());
            }
            Message::Handoff(Handoff::Cancel { request }) if self.broken == Some(Break::SlotFreedEarly) => {
                let fenced = Message::Handoff(Handoff::Fenced { request: *request, error: None });
                let event = NodeEvent::Message { from: to, message: fenced };
                lock(&self.seen).injected.push((self.node, event));
            }
            Message::Handoff(Handoff::Grant { leases, .. }) => {
                let mut seen = lock(&self.seen);
                for lease in leases {
                    seen.epochs.insert((self.node, lease.token.slot), lease.token.epoch);
                }
            }
            _ => {}
        }
        let frame = wire::encode(message).map_err(|error| SendError::Unsendable(error.to_string()))?;
        self.network.send(self.node, to, lane(message), frame).map_err(|error| match error {
            control::SendError::NotConnected { .. } => SendError::NotConnected,
            control::SendError::Backlogged { .. } => SendError::Backlogged,
            error => SendError::Unsendable(error.to_string()),
        })
    }

    fn dial(&self, peer: NodeId, _: SocketAddr) {
        let mut seen = lock(&self.seen);
        if seen.connected.contains(&(self.node, peer)) {
            seen.injected.push((self.node, NodeEvent::Up { peer }));
        } else {
            self.network.connect_control(self.node, peer);
        }
    }

    fn close(&self, peer: NodeId) {
        self.network.close_control(self.node, peer);
    }
}

/// A node's transport in the simulation: watches it, and breaks it if asked to.
pub(super) struct WatchedTransport {
    node: NodeId,
    inner: SimTransport,
    seen: SharedSeen,
    broken: Option<Break>,
    /// Draws which completions are noticed late, if any are.
    late: Option<Rng>,
    /// Those, and how many polls from now.
    held: Vec<(u64, NodeId, Event)>,
    /// Reports made up here.
    made_up: Arc<Mutex<Vec<Event>>>,
    /// `StaleEpochAccepted`: windows that should be closed, by place.
    left_open: BTreeMap<(u32, usize), (NodeId, Window)>,
}

impl WatchedTransport {
    pub(super) fn new(
        node: NodeId,
        network: &SimNetwork,
        seen: SharedSeen,
        broken: Option<Break>,
        late: Option<Rng>,
    ) -> WatchedTransport {
        let inner = network.transport(node);
        WatchedTransport {
            node,
            inner,
            seen,
            broken,
            late,
            held: Vec::new(),
            made_up: Arc::default(),
            left_open: BTreeMap::new(),
        }
    }

    /// Where to put events for the next poll.
    pub(super) fn made_up(&self) -> Arc<Mutex<Vec<Event>>> {
        Arc::clone(&self.made_up)
    }
}

impl WatchedTransport {
    /// Keeps some completions for later polls, as a card's completion queue may: what is said of a lease then
    /// comes after its end.
    fn hold_back(&mut self, start: usize, events: &mut Vec<Event>) {
        let Some(rng) = &mut self.late else { return };
        let mut fresh: Vec<_> = events.drain(start..).collect();
        for (polls, _, _) in &mut self.held {
            *polls -= 1;
        }
        for event in fresh.drain(..) {
            match event {
                Event::Landed { peer, .. } if rng.chance(0.1) => {
                    self.held.push((rng.between(1, 30), peer, event))
                }
                Event::Severed { peer, .. } => {
                    self.held.retain(|(_, of, _)| *of != peer);
                    events.push(event);
                }
                event => events.push(event),
            }
        }
        events.extend(self.held.extract_if(.., |(polls, _, _)| *polls == 0).map(|(_, _, event)| event));
        if !self.held.is_empty() {
            lock(&self.seen).poked.push(self.node);
        }
    }
}

/// `DoneBeforeAllBytes`, on the decode node: every layer of the lease counts as landed.
pub(super) fn claim_landed(made_up: &Mutex<Vec<Event>>, peer: NodeId, token: LeaseToken) {
    let claims = (0..SHAPE.layers).map(|layer| {
        let immediate = Immediate::new(token.slot, LayerIdx(layer), token.epoch).to_bits();
        Event::Landed { peer, immediate, len: 0 }
    });
    made_up.lock().expect("one thread").extend(claims);
}

impl Transport for WatchedTransport {
    fn register(&mut self, region: Arc<HostRegion>) -> Result<RegionId, TransportError> {
        self.inner.register(region)
    }

    fn open_window(
        &mut self,
        peer: NodeId,
        region: RegionId,
        range: Range<usize>,
    ) -> Result<Window, TransportError> {
        if self.broken != Some(Break::StaleEpochAccepted) {
            return self.inner.open_window(peer, region, range);
        }
        let place = (region.0, range.start);
        if let Some((of, window)) = self.left_open.remove(&place) {
            if of == peer && window.len == range.len() as u64 {
                self.left_open.insert(place, (of, window));
                return Ok(window);
            }
            self.inner.close_window(window);
        }
        let window = self.inner.open_window(peer, region, range)?;
        self.left_open.insert(place, (peer, window));
        Ok(window)
    }

    fn close_window(&mut self, window: Window) {
        if self.broken != Some(Break::StaleEpochAccepted) {
            self.inner.close_window(window);
        }
    }

    fn path(&self, peer: NodeId) -> Option<Path> {
        self.inner.path(peer)
    }

    fn connect(&mut self, peer: NodeId, address: SocketAddr) {
        self.inner.connect(peer, address);
    }

    fn submit(&mut self, peer: NodeId, write: Write) -> Result<(), SubmitError> {
        let ticket = write.ticket;
        self.inner.submit(peer, write)?;
        if self.broken == Some(Break::DoneBeforeAllBytes) {
            self.made_up.lock().expect("one thread").push(Event::Sent { peer, ticket });
            lock(&self.seen).poked.push(self.node);
        }
        Ok(())
    }

    fn poll(&mut self, events: &mut Vec<Event>) {
        let start = events.len();
        self.inner.poll(events);
        self.hold_back(start, events);
        let mut seen = lock(&self.seen);
        for event in &mut events[start..] {
            match event {
                Event::Failed { reason: FailReason::Refused, .. } => seen.refused.push(self.node),
                Event::Severed { peer, .. } => self.left_open.retain(|_, (of, _)| of != peer),
                Event::Landed { immediate, .. } if self.broken == Some(Break::StaleEpochAccepted) => {
                    let said = Immediate::from_bits(*immediate);
                    if let Some(epoch) = seen.epochs.get(&(self.node, said.slot)) {
                        *immediate = Immediate::new(said.slot, said.layer, *epoch).to_bits();
                    }
                }
                _ => {}
            }
        }
        if self.broken == Some(Break::DoneBeforeAllBytes) {
            let late = |event: &Event| {
                matches!(event, Event::Sent { .. } | Event::Failed { reason: FailReason::Refused, .. })
            };
            let mut at = start;
            while at < events.len() {
                if late(&events[at]) { drop(events.remove(at)) } else { at += 1 }
            }
        }
        events.append(&mut self.made_up.lock().expect("one thread"));
    }

    fn sever(&mut self, peer: NodeId) {
        lock(&self.seen).severs.push((self.node, peer));
        self.inner.sever(peer);
    }

    fn set_waker(&mut self, waker: Waker) {
        self.inner.set_waker(waker);
    }
}
