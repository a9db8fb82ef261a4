//! KV on its way out: staging, writes under way, and the messages that go with them.

use crate::cache::{Arrived, Cache, LoadId, Moving};
use crate::prompt::Prompt;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use tandem_kernels::{Kernels, PackError, Ticket};
use tandem_memory::{Extent, HostRegion};
use tandem_node::{Clock, Cluster, Conversions, Inbox, NodeEvent, RouterLink};
use tandem_proto::handoff::{Push, Sender, SenderAction, SenderConfig};
use tandem_proto::ids::{ChunkIdx, LayerIdx, NodeId, PageId, RequestId, Time};
use tandem_proto::layout::KvShape;
use tandem_proto::wire::{Destination, Handoff, Message, RequestError, Sampled};
use tandem_transport::{Event, Path, SubmitError, Transport, Write};

/// Everything that goes on between two layers of a step: it never touches the engine or the page pool, and
/// leaves what concerns those (`arrived`, `ended`) for the node's loop to take.
pub struct Outbound<K: Kernels> {
    pub(crate) clock: Clock,
    cluster: Box<dyn Cluster>,
    inbox: Inbox,
    transport: Box<dyn Transport>,
    kernels: Conversions<K, Work>,
    sender: Sender,
    shape: KvShape,
    staging: Staging,
    /// What found no room in the transport's queue.
    packed: Vec<UnderWay>,
    under_way: HashMap<u64, UnderWay>,
    next_ticket: u64,
    handovers: BTreeMap<RequestId, Handover>,
    links: BTreeMap<NodeId, Link>,
    /// Peers whose transport is being cut: not dialled again before that is done.
    severing: BTreeSet<NodeId>,
    router: RouterLink,
    /// What came from the router and was not yet looked at.
    pub(crate) arrived: VecDeque<Arrival>,
    /// Requests that are over, and why if they failed. Their pages may be released once no step uses them.
    pub(crate) ended: VecDeque<(RequestId, Result<(), Option<RequestError>>)>,
    /// What is shared with the store, if the node has one.
    pub(crate) cache: Option<Cache>,
    /// What came from the store into pages.
    pub(crate) loaded: VecDeque<Arrived>,
    /// It must finish now.
    pub(crate) stopped: bool,
    events: Vec<Event>,
}

/// What a conversion is of.
pub(crate) enum Work {
    /// A layer that is being packed into a staging slot.
    Push(Push, Extent),
    /// A layer of a stored chunk, either way.
    Cache(Moving),
}

/// What the router sent, or that it is gone.
pub(crate) enum Arrival {
    /// A prompt to compute.
    Prompt(Box<Prompt>),
    /// A request is over.
    Cancelled(RequestId),
    /// The router is gone, and with it everybody who waits for its requests.
    RouterLost(NodeId),
    /// A decode node cannot be reached, and why.
    DecodeLost(NodeId, String),
}

/// A decode node, as seen from here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    /// Being dialled.
    Connecting {
        /// Whether messages can be sent.
        control: bool,
        /// Whether KV can be written.
        data: bool,
        /// When to give up.
        until: Time,
    },
    /// Can be offered prompts.
    Up,
}

/// A prompt whose KV is handed over.
struct Handover {
    pages: Arc<[PageId]>,
    begun: Time,
    /// Layers of chunks: all, and those that have landed.
    layers: u32,
    landed: u32,
    bytes: u64,
}

/// A packed layer, on its way.
struct UnderWay {
    push: Push,
    digest: u64,
    slot: Extent,
}

/// Room for packed layers that are being written.
struct Staging {
    free: Vec<Extent>,
}

impl Staging {
    fn new(region: &Arc<HostRegion>, slot_bytes: usize) -> Result<Staging, tandem_memory::RegionError> {
        let slots = region.len() / slot_bytes;
        let free = (0..slots)
            .map(|slot| region.extent(slot * slot_bytes..(slot + 1) * slot_bytes))
            .collect::<Result<_, _>>()?;
        Ok(Staging { free })
    }
}

/// Staging memory taken from the system at the start. The slot freed last is used first, so more is touched only
/// under load.
const WARM_BYTES: usize = 64 << 20;

/// How long a decode node may take to be reached.
const DIAL_TIMEOUT_US: u64 = 5_000_000;

impl<K: Kernels> Outbound<K> {
    /// Takes `staging_bytes` of memory, two layers at least, and registers it with the transport.
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
        staging_bytes: usize,
    ) -> anyhow::Result<Outbound<K>> {
        let slot_bytes = shape.packed_layer(LayerIdx(0), shape.chunk_tokens).len();
        let region = kernels.memory(staging_bytes.max(2 * slot_bytes))?;
        if let Err(error) = region.extent(0..region.len().min(WARM_BYTES))?.populate() {
            tracing::warn!(%error, "memory for staging is taken as it is used");
        }
        transport.register(Arc::clone(&region))?;
        Ok(Outbound {
            clock,
            cluster,
            inbox,
            transport,
            kernels: Conversions::new(kernels),
            sender: Sender::new(shape, SenderConfig::default()),
            shape,
            staging: Staging::new(&region, slot_bytes)?,
            packed: Vec::new(),
            under_way: HashMap::new(),
            next_ticket: 0,
            handovers: BTreeMap::new(),
            links: BTreeMap::new(),
            severing: BTreeSet::new(),
            router: RouterLink::default(),
            arrived: VecDeque::new(),
            ended: VecDeque::new(),
            cache: None,
            loaded: VecDeque::new(),
            stopped: false,
            events: Vec::new(),
        })
    }

    /// Shares chunks with a store.
    #[must_use]
    pub fn with_cache(mut self, cache: Cache) -> Outbound<K> {
        self.cache = Some(cache);
        self
    }

    /// One turn: takes in what happened, and pushes as much as there is room for.
    pub(crate) fn turn(&mut self, kv: &K::Pages) {
        while let Some(event) = self.inbox.try_next() {
            self.on_event(event);
            if self.stopped {
                break;
            }
        }
        self.poll_transport();
        let now = self.clock.now();
        self.sender.tick(now);
        self.give_up_dials(now);
        self.router.flush(&*self.cluster);
        self.act();
        self.push(kv);
        self.submit_packed();
        self.turn_cache(kv);
    }

    /// Saves wait for what is pushed.
    fn turn_cache(&mut self, kv: &K::Pages) {
        let Some(cache) = &mut self.cache else { return };
        let now = self.clock.now();
        cache.poll(now);
        cache.begin_saves(now, &mut self.kernels, kv);
        while let Some(arrived) = cache.arrived.pop_front() {
            if let Arrived::Chunk { request, chunk, .. } = arrived {
                // Its handoff need not wait for the node's loop.
                chunk_ready(&mut self.sender, request, chunk, self.shape.layers);
            }
            self.loaded.push_back(arrived);
        }
    }

    /// Brings stored chunks to pages, as much as one turn may.
    pub(crate) fn begin_loads(&mut self, kv: &mut K::Pages) {
        if let Some(cache) = &mut self.cache {
            cache.begin_loads(self.clock.now(), &mut self.kernels, kv);
        }
    }

    /// Nobody wants what is being loaded: its pages are free once it is told to be over.
    pub(crate) fn stop_load(&mut self, load: LoadId) {
        if let Some(cache) = &mut self.cache {
            cache.stop(self.clock.now(), load);
        }
    }

    /// Why the node cannot go on, if it cannot.
    pub(crate) fn failed(self) -> anyhow::Result<()> {
        self.kernels.result()
    }

    /// Waits for something to happen, until the deadline.
    pub(crate) fn wait(&self, until: Option<Time>) {
        let longest = std::time::Duration::from_secs(1);
        self.inbox.wait(until.map_or(longest, |time| self.clock.until(time)).min(longest));
    }

    /// When a turn has something to do next if nothing happens.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let dial = self.links.values().filter_map(|link| match link {
            Link::Connecting { until, .. } => Some(*until),
            Link::Up => None,
        });
        let now = self.clock.now();
        let others = dial.chain(self.router.next_flush(now)).chain(self.kernels.next_poll(now));
        let others = others.chain(self.cache.as_ref().and_then(Cache::next_timeout));
        self.sender.next_timeout().into_iter().chain(others).min()
    }

    /// The router, if it has accepted this node.
    pub(crate) fn router(&self) -> Option<NodeId> {
        self.router.router()
    }

    /// Whether the process was asked to finish.
    pub(crate) fn is_draining(&self) -> bool {
        self.router.is_draining()
    }

    /// Whether the way to a decode node is open. Begins to open it if nobody has.
    pub(crate) fn is_linked(&mut self, to: &Destination) -> bool {
        match self.links.get(&to.node) {
            Some(Link::Up) => true,
            Some(Link::Connecting { .. }) => false,
            None if self.severing.contains(&to.node) => false,
            None => {
                let until = self.clock.now().after_us(DIAL_TIMEOUT_US);
                self.links.insert(to.node, Link::Connecting { control: false, data: false, until });
                self.cluster.dial(to.node, to.control);
                self.transport.connect(to.node, to.data);
                false
            }
        }
    }

    /// The prompt has its pages: offers its KV. Chunks below `cached` tokens are in the pages already.
    pub(crate) fn begin(&mut self, prompt: &Prompt, to: NodeId, pages: Arc<[PageId]>, cached: u32) {
        let (request, tokens) = (prompt.request, prompt.tokens.len() as u32);
        tracing::debug!(%request, decode = %to, tokens, cached_tokens = cached, "KV offered");
        let layers = self.shape.chunks(tokens) * self.shape.layers;
        let begun = self.clock.now();
        self.handovers.insert(request, Handover { pages, begun, layers, landed: 0, bytes: 0 });
        self.sender.begin(request, to, tokens, prompt.deadline);
        for chunk in 0..cached / self.shape.chunk_tokens {
            self.chunk_ready(request, ChunkIdx(chunk));
        }
    }

    /// Whether KV goes to a decode node from GPU to GPU.
    pub(crate) fn is_between_gpus(&self, to: NodeId) -> bool {
        self.transport.path(to) == Some(Path::CudaIpc)
    }

    /// A layer of a chunk is in the pages.
    pub(crate) fn ready(&mut self, request: RequestId, chunk: ChunkIdx, layer: LayerIdx) {
        self.sender.ready(request, chunk, layer);
    }

    /// All layers of a chunk are in the pages.
    pub(crate) fn chunk_ready(&mut self, request: RequestId, chunk: ChunkIdx) {
        chunk_ready(&mut self.sender, request, chunk, self.shape.layers);
    }

    /// The first tokens are known: tells the decode node when all KV is there.
    pub(crate) fn first(&mut self, request: RequestId, first: Vec<Sampled>) {
        self.sender.first(request, first);
    }

    /// Ends a handoff for a reason of this node's own.
    pub(crate) fn give_up(&mut self, request: RequestId, error: Option<RequestError>) {
        self.sender.give_up(self.clock.now(), request, error);
    }

    /// Whether there is something to do for the node's loop, or for the next turn, at once.
    pub(crate) fn has_news(&self) -> bool {
        let cache = self.cache.as_ref().is_some_and(Cache::has_news) || !self.loaded.is_empty();
        cache || !self.arrived.is_empty() || !self.ended.is_empty() || self.sender.has_actions()
    }

    /// Conversions that are not over, and staging slots in use.
    pub(crate) fn staged(&self) -> usize {
        self.kernels.under_way() + self.packed.len() + self.under_way.len()
    }

    /// Handoffs that are not over.
    pub(crate) fn open_handoffs(&self) -> usize {
        self.sender.open_requests()
    }

    /// See [`RouterLink::tell`].
    pub(crate) fn tell_router(&mut self, message: Message) {
        self.router.tell(&*self.cluster, message);
    }

    /// See [`RouterLink::try_tell`].
    #[must_use]
    pub(crate) fn try_tell_router(&mut self, message: &Message) -> bool {
        self.router.try_tell(&*self.cluster, message)
    }

    fn on_event(&mut self, event: NodeEvent) {
        match event {
            NodeEvent::RouterUp { router } => self.router.up(&*self.cluster, router),
            NodeEvent::Up { peer } => self.link_up(peer, |control, _| *control = true),
            NodeEvent::DialFailed { peer, reason } => self.unlink(peer, &reason),
            NodeEvent::Down { peer, reason } if self.router.down(peer, &reason) => {
                self.arrived.push_back(Arrival::RouterLost(peer));
            }
            NodeEvent::Down { peer, reason } => self.unlink(peer, &reason),
            NodeEvent::Message { from, message } => self.on_message(from, message),
            NodeEvent::Drain => self.router.drain(&*self.cluster),
            NodeEvent::Stop => self.stopped = true,
        }
    }

    fn on_message(&mut self, from: NodeId, message: Message) {
        let now = self.clock.now();
        match message {
            Message::Submit(submit) => {
                self.arrived.push_back(Arrival::Prompt(Box::new(Prompt::new(submit, from, now))))
            }
            Message::Cancel { request } => self.arrived.push_back(Arrival::Cancelled(request)),
            Message::Handoff(handoff) => {
                if let Handoff::Grant { request, leases } = &handoff {
                    tracing::debug!(%request, decode = %from, chunks = leases.len(), "KV granted");
                }
                self.sender.message(now, from, handoff);
            }
            other => {
                tracing::warn!(peer = %from, message = ?std::mem::discriminant(&other), "not a message for a prefill node")
            }
        }
    }

    fn link_up(&mut self, peer: NodeId, part: impl FnOnce(&mut bool, &mut bool)) {
        if let Some(link @ Link::Connecting { .. }) = self.links.get_mut(&peer) {
            let Link::Connecting { control, data, .. } = link else { unreachable!("matched above") };
            part(control, data);
            if *control && *data {
                *link = Link::Up;
                tracing::debug!(decode = %peer, "linked");
            }
        }
    }

    /// The way to a decode node is closed, or could not be opened: cuts what is left of it.
    fn unlink(&mut self, peer: NodeId, why: &str) {
        if self.forget_link(peer, why) {
            self.sender.peer_lost(self.clock.now(), peer, why);
            self.sever(peer);
        }
    }

    /// Whether there was a link.
    fn forget_link(&mut self, peer: NodeId, why: &str) -> bool {
        let linked = self.links.remove(&peer).is_some();
        if linked {
            tracing::warn!(decode = %peer, why, "link to decode node lost");
            self.arrived.push_back(Arrival::DecodeLost(peer, why.to_owned()));
        }
        linked
    }

    /// `Severed` answers exactly once, so this asks only once; the next life must not be cut by mistake.
    fn sever(&mut self, peer: NodeId) {
        if self.severing.insert(peer) {
            self.transport.sever(peer);
        }
    }

    fn give_up_dials(&mut self, now: Time) {
        let late: Vec<_> = self
            .links
            .iter()
            .filter(|(_, link)| matches!(link, Link::Connecting { until, .. } if *until <= now))
            .map(|(peer, _)| *peer)
            .collect();
        for peer in late {
            self.unlink(peer, &format!("not reached within {} s", DIAL_TIMEOUT_US / 1_000_000));
        }
    }

    fn poll_transport(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        self.transport.poll(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Connected { peer } => self.link_up(peer, |_, data| *data = true),
                Event::Sent { ticket, .. } => {
                    if let Some(UnderWay { push, digest, slot }) = self.under_way.remove(&ticket) {
                        self.staging.free.push(slot);
                        self.note_landed(&push);
                        self.sender.sent(push.request, push.chunk, push.layer, digest);
                    }
                }
                Event::Failed { ticket, reason, .. } => {
                    if let Some(UnderWay { push, slot, .. }) = self.under_way.remove(&ticket) {
                        self.staging.free.push(slot);
                        self.sender.not_sent(self.clock.now(), push.request, &reason.to_string());
                    }
                }
                Event::Severed { peer, reason } => {
                    self.forget_link(peer, &reason.to_string());
                    self.severing.remove(&peer);
                    self.sender.severed(peer);
                }
                // Nobody writes to a prefill node: it opens no window.
                Event::Landed { .. } => {}
            }
        }
        self.events = events;
    }

    /// Tells of the first and the last layer of a prompt.
    fn note_landed(&mut self, push: &Push) {
        let Push { request, to, chunk, layer, len, .. } = *push;
        let Some(handover) = self.handovers.get_mut(&request) else { return };
        handover.landed += 1;
        handover.bytes += len as u64;
        let us = self.clock.now().since_us(handover.begun);
        if handover.landed == 1 {
            tracing::debug!(%request, decode = %to, %chunk, %layer, us, "first layer written");
        }
        if handover.landed == handover.layers {
            tracing::debug!(%request, decode = %to, bytes = handover.bytes, us, "last layer written");
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.sender.poll_action() {
            match action {
                SenderAction::Send { to, message } => {
                    if let Handoff::Done { request, .. } = &message {
                        tracing::debug!(%request, decode = %to, "KV done");
                    }
                    self.tell(to, message);
                }
                SenderAction::Release { request, outcome } => {
                    if let Some(Handover { begun, bytes, .. }) = self.handovers.remove(&request) {
                        let (us, delivered) = (self.clock.now().since_us(begun), outcome.is_ok());
                        tracing::debug!(%request, delivered, bytes, us, "handoff over");
                    }
                    self.ended.push_back((request, outcome));
                }
                SenderAction::Sever { peer } => self.sever(peer),
            }
        }
    }

    fn tell(&mut self, to: NodeId, handoff: Handoff) {
        if let Err(error) = self.cluster.send(to, &Message::Handoff(handoff)) {
            // What was lost may be what the peer waits for: end the connection, so that both sides know.
            tracing::warn!(decode = %to, %error, "cannot tell the decode node; closing its connection");
            self.cluster.close(to);
        }
    }

    /// Packs what there is room for in staging.
    fn push(&mut self, kv: &K::Pages) {
        while let Some(slot) = self.staging.free.pop() {
            let Some(push) = self.sender.next_push() else {
                self.staging.free.push(slot);
                break;
            };
            if let Err((slot, why)) = self.pack(push, slot, kv) {
                self.staging.free.push(slot);
                self.sender.not_sent(self.clock.now(), push.request, &why);
                self.act();
            }
        }
        let (now, packed, cache) = (self.clock.now(), &mut self.packed, &mut self.cache);
        let over = |work, digest| match (work, cache.as_mut()) {
            (Work::Push(push, slot), _) => packed.push(UnderWay { push, digest, slot }),
            (Work::Cache(moving), Some(cache)) => cache.over(now, moving, digest),
            (Work::Cache(_), None) => unreachable!("who began it is there"),
        };
        self.stopped |= !self.kernels.poll(over);
    }

    /// Begins to pack one layer; gives the slot back, and why, if that was refused.
    fn pack(&mut self, push: Push, slot: Extent, kv: &K::Pages) -> Result<(), (Extent, String)> {
        let Some(Handover { pages, .. }) = self.handovers.get(&push.request) else {
            return Err((slot, "the request is over".to_owned()));
        };
        let first = (push.chunk.0 * self.shape.chunk_tokens / self.shape.page_tokens) as usize;
        let pages = &pages[first..first + self.shape.pages(push.tokens) as usize];
        let out = slot.part(0..push.len).expect("a slot holds a layer of a full chunk");
        let begun = self.kernels.begin(Work::Push(push, slot.clone()), |kernels, ticket| {
            begin_to_pack(kernels, ticket, kv, &push, pages, &out)
        });
        begun.map_err(|(_, error)| (slot, error.to_string()))
    }

    /// Starts the writes of what is packed. What finds no room in its peer's queue is tried again later.
    fn submit_packed(&mut self) {
        for UnderWay { push, digest, slot } in std::mem::take(&mut self.packed) {
            let Push { request, to, chunk, layer, len, .. } = push;
            if self.sender.is_given_up(request) {
                self.end_unsent(request, slot, "the request was given up");
                continue;
            }
            let write = Write {
                ticket: self.next_ticket,
                source: slot.part(0..len).expect("it was packed there"),
                window: push.window,
                offset: push.offset as u64,
                immediate: push.immediate.to_bits(),
            };
            match self.transport.submit(to, write) {
                Ok(()) => {
                    let ticket = self.next_ticket;
                    tracing::trace!(%request, %chunk, %layer, bytes = len, ticket, "layer submitted");
                    self.under_way.insert(ticket, UnderWay { push, digest, slot });
                    self.next_ticket += 1;
                }
                Err(SubmitError::Full { .. }) => self.packed.push(UnderWay { push, digest, slot }),
                Err(error) => self.end_unsent(request, slot, &error.to_string()),
            }
        }
    }

    fn end_unsent(&mut self, request: RequestId, slot: Extent, why: &str) {
        self.staging.free.push(slot);
        self.sender.not_sent(self.clock.now(), request, why);
        self.act();
    }
}

fn chunk_ready(sender: &mut Sender, request: RequestId, chunk: ChunkIdx, layers: u32) {
    for layer in (0..layers).map(LayerIdx) {
        sender.ready(request, chunk, layer);
    }
}

/// Begins to pack a layer into a staging slot that was taken from the free list.
#[allow(unsafe_code)]
fn begin_to_pack<K: Kernels>(
    kernels: &mut K,
    ticket: Ticket,
    kv: &K::Pages,
    push: &Push,
    pages: &[PageId],
    out: &Extent,
) -> Result<(), PackError> {
    // SAFETY: a slot leaves the free list for one push and returns after the kernels, and then the transport, have
    // reported that they are done with it: so nobody else uses these bytes now.
    unsafe { kernels.pack(ticket, kv, push.layer, pages, push.tokens, out) }
}
