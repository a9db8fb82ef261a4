//! KV on its way in: landing slots, their windows, and the messages that go with them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tandem_kernels::{Kernels, PackError, Ticket};
use tandem_memory::{Extent, HostRegion};
use tandem_node::{Clock, Cluster, Conversions, Inbox, NodeEvent, RouterLink};
use tandem_proto::handoff::{Receiver, ReceiverAction, ReceiverConfig, ReceiverStats};
use tandem_proto::ids::{ChunkIdx, LayerIdx, NodeId, PageId, RequestId, Time};
use tandem_proto::layout::KvShape;
use tandem_proto::wire::{Expect, Handoff, Lease, LeaseToken, Message, RequestError, Sampled, Window};
use tandem_transport::{Event, RegionId, Transport};

/// What the node's loop has to know of.
pub(crate) enum Arrival {
    /// The router announced a request.
    Expected(Box<Expect>, NodeId),
    /// The router ended a request.
    Cancelled(RequestId),
    /// The router is gone, and with it everybody who waits for its requests.
    RouterLost(NodeId),
    /// The prompt's KV was offered: it needs pages.
    Reserve(RequestId),
    /// The prompt's KV is in the pages and verified.
    Ready(RequestId, Vec<Sampled>),
    /// The prompt's KV will not come.
    Dropped(RequestId, Option<RequestError>),
}

/// Everything between the network and the pages. What concerns the page pool and the engine is left in
/// `arrived` for the node's loop.
pub struct Inbound<K: Kernels> {
    pub(crate) clock: Clock,
    cluster: Box<dyn Cluster>,
    inbox: Inbox,
    transport: Box<dyn Transport>,
    /// Layers that are being scattered.
    scattering: Conversions<K, (LeaseToken, LayerIdx)>,
    receiver: Receiver,
    shape: KvShape,
    landing: Arc<HostRegion>,
    landing_id: RegionId,
    slot_bytes: usize,
    windows: BTreeMap<LeaseToken, Window>,
    /// The prompts that may land, and their pages once they have some.
    prompts: BTreeMap<RequestId, Landing>,
    router: RouterLink,
    pub(crate) arrived: VecDeque<Arrival>,
    /// It must finish now.
    pub(crate) stopped: bool,
    events: Vec<Event>,
}

/// Landing memory taken from the system at the start. The slot freed last is used first, so more is touched only
/// under load.
const WARM_BYTES: usize = 64 << 20;

struct Landing {
    tokens: u32,
    pages: Vec<PageId>,
    expected: Time,
    /// A layer has landed.
    begun: bool,
}

impl<K: Kernels> Inbound<K> {
    /// Takes `landing_bytes` of memory, two chunks at least, and registers it with the transport.
    ///
    /// # Errors
    /// When the memory cannot be had or registered.
    pub fn new(
        clock: Clock,
        cluster: Box<dyn Cluster>,
        inbox: Inbox,
        mut transport: Box<dyn Transport>,
        kernels: K,
        shape: KvShape,
        landing_bytes: usize,
    ) -> anyhow::Result<Inbound<K>> {
        let slot_bytes = shape.packed_bytes(shape.chunk_tokens);
        let slots = (landing_bytes / slot_bytes).clamp(2, tandem_proto::handoff::MAX_SLOTS as usize);
        let landing = kernels.memory(slots * slot_bytes)?;
        if let Err(error) = landing.extent(0..landing.len().min(WARM_BYTES))?.populate() {
            tracing::warn!(%error, "memory for landing is taken as it is used");
        }
        let landing_id = transport.register(Arc::clone(&landing))?;
        let config = ReceiverConfig { slots: slots as u32, ..ReceiverConfig::default() };
        Ok(Inbound {
            clock,
            cluster,
            inbox,
            transport,
            scattering: Conversions::new(kernels),
            receiver: Receiver::new(shape, config),
            shape,
            landing,
            landing_id,
            slot_bytes,
            windows: BTreeMap::new(),
            prompts: BTreeMap::new(),
            router: RouterLink::default(),
            arrived: VecDeque::new(),
            stopped: false,
            events: Vec::new(),
        })
    }

    /// One turn: takes in what happened, and moves what has landed to the pages.
    pub(crate) fn turn(&mut self, kv: &mut K::Pages) {
        // Completions before messages: what landed under a lease is counted before the message that ends it.
        self.poll_transport();
        while let Some(event) = self.inbox.try_next() {
            self.on_event(event);
            if self.stopped {
                break;
            }
        }
        self.receiver.tick(self.clock.now());
        self.router.flush(&*self.cluster);
        loop {
            self.act(kv);
            self.take_scattered();
            if !self.receiver.has_actions() {
                return;
            }
        }
    }

    /// Why the node cannot go on, if it cannot.
    pub(crate) fn failed(self) -> anyhow::Result<()> {
        self.scattering.result()
    }

    /// Waits for something to happen, until the deadline.
    pub(crate) fn wait(&self, until: Option<Time>) {
        let longest = std::time::Duration::from_secs(1);
        self.inbox.wait(until.map_or(longest, |time| self.clock.until(time)).min(longest));
    }

    /// When a turn has something to do next if nothing happens.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let now = self.clock.now();
        let others = self.router.next_flush(now).into_iter().chain(self.scattering.next_poll(now));
        self.receiver.next_timeout().into_iter().chain(others).min()
    }

    /// The router, if it has accepted this node.
    pub(crate) fn router(&self) -> Option<NodeId> {
        self.router.router()
    }

    /// Whether the process was asked to finish.
    pub(crate) fn is_draining(&self) -> bool {
        self.router.is_draining()
    }

    /// The node has taken pages for the prompt: it may land.
    pub(crate) fn reserved(&mut self, request: RequestId, pages: Vec<PageId>) {
        if let Some(landing) = self.prompts.get_mut(&request) {
            landing.pages = pages;
            self.receiver.reserved(request);
        }
    }

    /// Ends a handoff for a reason of this node's own, or because the router said so.
    pub(crate) fn give_up(&mut self, request: RequestId, error: Option<RequestError>) {
        self.receiver.give_up(self.clock.now(), request, error);
    }

    /// Whether there is something to do for the node's loop, or for the next turn, at once.
    pub(crate) fn has_news(&self) -> bool {
        !self.arrived.is_empty() || self.receiver.has_actions()
    }

    /// Whether layers are on their way to the request's pages: then those are not free yet.
    pub(crate) fn is_scattering(&self, request: RequestId) -> bool {
        self.receiver.is_scattering(request)
    }

    /// Layers that are being scattered.
    pub(crate) fn scattering(&self) -> usize {
        self.scattering.under_way()
    }

    /// Handoffs that are not over.
    pub(crate) fn open_handoffs(&self) -> usize {
        self.receiver.open_requests()
    }

    /// What was counted of the handoffs.
    pub(crate) fn received(&self) -> ReceiverStats {
        self.receiver.stats()
    }

    /// Windows that are open.
    pub(crate) fn open_windows(&self) -> usize {
        self.windows.len()
    }

    /// Slots, and how many of them are free.
    pub(crate) fn slots(&self) -> (usize, usize) {
        (self.receiver.slots(), self.receiver.free_slots())
    }

    /// See [`RouterLink::try_tell`].
    #[must_use]
    pub(crate) fn try_tell_router(&mut self, message: &Message) -> bool {
        self.router.try_tell(&*self.cluster, message)
    }

    /// See [`RouterLink::tell`].
    pub(crate) fn tell_router(&mut self, message: Message) {
        self.router.tell(&*self.cluster, message);
    }

    fn on_event(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::RouterUp { router } => self.router.up(&*self.cluster, router),
            NodeEvent::Down { peer, reason } if self.router.down(peer, &reason) => {
                self.arrived.push_back(Arrival::RouterLost(peer));
            }
            NodeEvent::Down { peer, reason } => self.peer_lost(peer, &reason),
            NodeEvent::Message { from, message } => self.on_message(from, message),
            // A decode node dials nobody but the router.
            NodeEvent::Up { .. } | NodeEvent::DialFailed { .. } => {}
            NodeEvent::Drain => self.router.drain(&*self.cluster),
            NodeEvent::Stop => self.stopped = true,
        }
    }

    fn on_message(&mut self, from: NodeId, message: Message) {
        let now = self.clock.now();
        match message {
            Message::Expect(expect) => self.arrived.push_back(Arrival::Expected(Box::new(expect), from)),
            Message::Cancel { request } => self.arrived.push_back(Arrival::Cancelled(request)),
            Message::Handoff(handoff) => {
                match &handoff {
                    Handoff::Offer { request, tokens } => {
                        tracing::debug!(%request, prefill = %from, tokens, "KV offered");
                    }
                    Handoff::Done { request, .. } => tracing::debug!(%request, prefill = %from, "KV done"),
                    _ => {}
                }
                self.receiver.message(now, from, handoff);
            }
            other => {
                tracing::warn!(peer = %from, message = ?std::mem::discriminant(&other), "not a message for a decode node")
            }
        }
    }

    /// The node accepted the request: its KV may be offered.
    pub(crate) fn expect(&mut self, expect: &Expect, deadline: Time) {
        let tokens = expect.prompt.len() as u32;
        let expected = self.clock.now();
        let (request, prefill) = (expect.request, expect.prefill);
        tracing::debug!(%request, %prefill, tokens, "KV expected");
        self.prompts.insert(request, Landing { tokens, pages: Vec::new(), expected, begun: false });
        self.receiver.expect(expected, expect.request, expect.prefill, tokens, deadline);
    }

    fn peer_lost(&mut self, peer: NodeId, why: &str) {
        tracing::warn!(prefill = %peer, why, "link to prefill node lost");
        self.receiver.peer_lost(self.clock.now(), peer, why);
    }

    fn poll_transport(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        self.transport.poll(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Landed { peer, immediate, .. } => self.receiver.landed(peer, immediate),
                Event::Severed { peer, reason } => {
                    tracing::debug!(prefill = %peer, %reason, "transport severed");
                    self.receiver.severed(peer);
                }
                // A decode node writes nothing.
                Event::Connected { .. } | Event::Sent { .. } | Event::Failed { .. } => {}
            }
        }
        self.events = events;
    }

    fn act(&mut self, kv: &mut K::Pages) {
        while let Some(action) = self.receiver.poll_action() {
            match action {
                ReceiverAction::Reserve { request } => self.arrived.push_back(Arrival::Reserve(request)),
                ReceiverAction::Grant { to, request, leases } => self.grant(to, request, &leases),
                ReceiverAction::Scatter { token, chunk, layer } => self.scatter(token, chunk, layer, kv),
                ReceiverAction::Close { token } => {
                    if let Some(window) = self.windows.remove(&token) {
                        self.transport.close_window(window);
                    }
                }
                ReceiverAction::Send { to, message } => self.tell(to, message),
                ReceiverAction::Ready { request, first } => {
                    if let Some(Landing { tokens, expected, .. }) = self.prompts.remove(&request) {
                        let us = self.clock.now().since_us(expected);
                        tracing::debug!(%request, tokens, us, "KV verified");
                    }
                    self.arrived.push_back(Arrival::Ready(request, first));
                }
                ReceiverAction::Drop { request, error } => {
                    self.prompts.remove(&request);
                    tracing::debug!(%request, error = error.as_ref().map(tracing::field::display), "KV does not come");
                    self.arrived.push_back(Arrival::Dropped(request, error));
                }
                ReceiverAction::Sever { peer } => self.transport.sever(peer),
            }
        }
    }

    fn grant(&mut self, to: NodeId, request: RequestId, granted: &[(ChunkIdx, LeaseToken)]) {
        let Some(tokens) = self.prompts.get(&request).map(|landing| landing.tokens) else {
            return;
        };
        let mut leases = Vec::with_capacity(granted.len());
        for (chunk, token) in granted {
            let start = token.slot.0 as usize * self.slot_bytes;
            let len = self.shape.packed_bytes(self.shape.chunk_span(*chunk, tokens).len() as u32);
            match self.transport.open_window(to, self.landing_id, start..start + len) {
                Ok(window) => {
                    self.windows.insert(*token, window);
                    leases.push(Lease { chunk: *chunk, token: *token, window });
                }
                Err(error) => {
                    self.give_up(request, Some(RequestError::Internal(error.to_string())));
                    return;
                }
            }
        }
        tracing::debug!(%request, prefill = %to, chunks = leases.len(), "KV granted");
        self.tell(to, Handoff::Grant { request, leases });
    }

    fn scatter(&mut self, token: LeaseToken, chunk: ChunkIdx, layer: LayerIdx, kv: &mut K::Pages) {
        let now = self.clock.now();
        let Some(landing) = self.prompts.get_mut(&token.request) else {
            self.receiver.not_scattered(now, token, "the request is over");
            return;
        };
        if !std::mem::replace(&mut landing.begun, true) {
            let us = now.since_us(landing.expected);
            tracing::debug!(request = %token.request, %chunk, %layer, us, "first layer landed");
        }
        let tokens = self.shape.chunk_span(chunk, landing.tokens).len() as u32;
        let start = token.slot.0 as usize * self.slot_bytes;
        let layer_range = self.shape.packed_layer(layer, tokens);
        let extent = self
            .landing
            .extent(start + layer_range.start..start + layer_range.end)
            .expect("slots lie inside the landing region");
        let pages = &landing.pages[self.shape.chunk_pages(chunk, landing.tokens)];
        let landed = Landed { layer, tokens, extent };
        let begun = self
            .scattering
            .begin((token, layer), |kernels, ticket| begin_to_scatter(kernels, ticket, kv, pages, &landed));
        if let Err((_, error)) = begun {
            self.receiver.not_scattered(now, token, &error.to_string());
        }
    }

    /// Tells the receiver what is in the pages.
    fn take_scattered(&mut self) {
        let (now, receiver) = (self.clock.now(), &mut self.receiver);
        let over = |(token, layer), checksum| receiver.scattered(now, token, layer, checksum);
        self.stopped |= !self.scattering.poll(over);
    }

    fn tell(&mut self, to: NodeId, handoff: Handoff) {
        if let Err(error) = self.cluster.send(to, &Message::Handoff(handoff)) {
            // What was lost may be what the peer waits for: end the connection, so that both sides know.
            tracing::warn!(prefill = %to, %error, "cannot tell the prefill node; closing its connection");
            self.cluster.close(to);
        }
    }
}

/// A layer of a chunk that has landed.
struct Landed {
    layer: LayerIdx,
    tokens: u32,
    extent: Extent,
}

#[allow(unsafe_code)]
fn begin_to_scatter<K: Kernels>(
    kernels: &mut K,
    ticket: Ticket,
    kv: &mut K::Pages,
    pages: &[PageId],
    landed: &Landed,
) -> Result<(), PackError> {
    // SAFETY: the write has landed, and under one lease each layer is written once: the sender counts its pushes, and
    // the slot gets no other lease before this one is over and its layers were scattered.
    unsafe { kernels.scatter(ticket, kv, landed.layer, pages, landed.tokens, &landed.extent) }
}
