use super::{Immediate, MAX_SLOTS};
use crate::ids::{ChunkIdx, LayerIdx, NodeId, RequestId, SlotEpoch, SlotId, Time};
use crate::layout::KvShape;
use crate::wire::{Handoff, LeaseToken, MAX_LEASES, RequestError, Sampled};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Limits of a [`Receiver`].
#[derive(Clone, Copy, Debug)]
pub struct ReceiverConfig {
    /// Landing slots, at most [`MAX_SLOTS`].
    pub slots: u32,
    /// How long a prefill node may take to answer `Cancel`. Then it is severed.
    pub fence_timeout_us: u64,
    /// How long an offer may wait for the router's `Expect`. Then it is refused.
    pub offer_timeout_us: u64,
    /// Offers that may wait for their `Expect`. More are refused.
    pub max_early_offers: usize,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        ReceiverConfig {
            slots: 64,
            fence_timeout_us: 5_000_000,
            offer_timeout_us: 5_000_000,
            max_early_offers: 4096,
        }
    }
}

/// What a receiver has counted since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReceiverStats {
    /// Writes that landed under no current lease, and were ignored.
    pub stale: u64,
    /// Chunks whose digests were the sender's.
    pub verified: u64,
    /// Chunks whose digests differed.
    pub corrupt: u64,
    /// Peers that were severed.
    pub severed: u64,
}

/// The decode node's side of every handoff it expects.
pub struct Receiver {
    shape: KvShape,
    config: ReceiverConfig,
    requests: BTreeMap<RequestId, Incoming>,
    early_offers: BTreeMap<RequestId, EarlyOffer>,
    slots: Vec<Slot>,
    /// The slot freed last is granted first: its memory is warm.
    free: Vec<SlotId>,
    /// Requests with pages that lack slots, first come first served.
    waiting: VecDeque<RequestId>,
    severing: BTreeSet<NodeId>,
    actions: VecDeque<ReceiverAction>,
    stats: ReceiverStats,
}

/// What the node has to do.
#[derive(Clone, PartialEq, Debug)]
pub enum ReceiverAction {
    /// Take the pages that the request needs, then call [`Receiver::reserved`]; or wait until there are some.
    Reserve {
        /// Which request.
        request: RequestId,
    },
    /// Open a window for each lease's slot and send `Grant`.
    Grant {
        /// To whom.
        to: NodeId,
        /// Which request.
        request: RequestId,
        /// A lease for each of these chunks.
        leases: Vec<(ChunkIdx, LeaseToken)>,
    },
    /// A layer has landed: move it to the pages, then call [`Receiver::scattered`] with its checksum, or
    /// [`Receiver::not_scattered`], whatever happens to the request meanwhile.
    Scatter {
        /// The lease under which it landed.
        token: LeaseToken,
        /// Which chunk.
        chunk: ChunkIdx,
        /// Which layer.
        layer: LayerIdx,
    },
    /// The slot's lease is over, or only waits for layers that are being scattered: close its window.
    Close {
        /// The lease.
        token: LeaseToken,
    },
    /// Send a message.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: Handoff,
    },
    /// Every byte of the prompt's KV is in the pages and verified: generate.
    Ready {
        /// Which request.
        request: RequestId,
        /// The first token of each choice.
        first: Vec<Sampled>,
    },
    /// The request will not arrive: tell the router why, if there is an error, and free its pages as soon as nothing of
    /// it [is scattered](Receiver::is_scattering).
    Drop {
        /// Which request.
        request: RequestId,
        /// Why, unless this node or the router wanted it.
        error: Option<RequestError>,
    },
    /// Cut the transport to this peer, then call [`Receiver::severed`].
    Sever {
        /// Which peer.
        peer: NodeId,
    },
}

struct Incoming {
    from: NodeId,
    tokens: u32,
    deadline: Time,
    phase: Phase,
    /// Chunks below this have, or had, a lease.
    granted: u32,
    /// Chunks whose every layer was scattered and has the sender's digest.
    verified: u32,
    first: Option<Vec<Sampled>>,
    /// Slots that the peer may still write. Freed only after `ChunkDone`, `Fenced` or sever.
    held: BTreeSet<SlotId>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No offer yet.
    Expected,
    /// Offered; the node looks for pages.
    Offered,
    /// Has pages; chunks are granted and land.
    Landing,
    /// Given up; its slots wait for `Fenced`, until then.
    Fencing { until: Time },
}

struct EarlyOffer {
    from: NodeId,
    tokens: u32,
    until: Time,
}

struct Slot {
    /// The current or last lease's epoch.
    epoch: SlotEpoch,
    /// Also one that is over, while its layers are scattered.
    lease: Option<Held>,
}

struct Held {
    request: RequestId,
    chunk: ChunkIdx,
    /// For each layer, whether its write has landed.
    landed: Vec<bool>,
    /// For each layer, the checksum of what was scattered.
    digests: Vec<Option<u64>>,
    /// What the sender says the checksums are.
    sent: Option<Vec<u64>>,
    /// Layers that the node was told to scatter and has not reported. The slot is not free before this is 0.
    scattering: u32,
    /// Nothing lands under the lease any more, and its request does not hold it.
    over: bool,
}

impl Receiver {
    /// A receiver of KV of this shape.
    #[must_use]
    pub fn new(shape: KvShape, config: ReceiverConfig) -> Receiver {
        let slots = config.slots.min(MAX_SLOTS);
        Receiver {
            shape,
            config,
            requests: BTreeMap::new(),
            early_offers: BTreeMap::new(),
            slots: (0..slots).map(|_| Slot { epoch: SlotEpoch(0), lease: None }).collect(),
            free: (0..slots).rev().map(SlotId).collect(),
            waiting: VecDeque::new(),
            severing: BTreeSet::new(),
            actions: VecDeque::new(),
            stats: ReceiverStats::default(),
        }
    }

    /// The router says that `from` will hand over a prompt of `tokens` tokens.
    pub fn expect(&mut self, now: Time, request: RequestId, from: NodeId, tokens: u32, deadline: Time) {
        let incoming = Incoming {
            from,
            tokens,
            deadline,
            phase: Phase::Expected,
            granted: 0,
            verified: 0,
            first: None,
            held: BTreeSet::new(),
        };
        if self.requests.contains_key(&request) {
            return;
        }
        self.requests.insert(request, incoming);
        if let Some(offer) = self.early_offers.remove(&request) {
            self.offered(now, offer.from, request, offer.tokens);
        }
    }

    /// The node holds the pages that `Reserve` asked for.
    pub fn reserved(&mut self, request: RequestId) {
        if let Some(incoming) = self.requests.get_mut(&request)
            && incoming.phase == Phase::Offered
        {
            incoming.phase = Phase::Landing;
            self.waiting.push_back(request);
            self.grant();
        }
    }

    /// A write has landed, with these immediate bits.
    pub fn landed(&mut self, from: NodeId, bits: u32) {
        let immediate = Immediate::from_bits(bits);
        let current = self.slots.get_mut(immediate.slot.0 as usize).and_then(|slot| {
            let epoch = slot.epoch;
            slot.lease.as_mut().filter(|held| immediate.is_of(epoch) && !held.over).map(|held| (epoch, held))
        });
        let Some((epoch, held)) = current else {
            self.stats.stale += 1;
            return;
        };
        let incoming = self.requests.get(&held.request).filter(|incoming| incoming.from == from);
        let landed = held.landed.get_mut(immediate.layer.0 as usize);
        let (Some(incoming), Some(landed)) = (incoming, landed.filter(|landed| !**landed)) else {
            self.stats.stale += 1;
            return;
        };
        *landed = true;
        if incoming.phase == Phase::Landing {
            held.scattering += 1;
            let token = LeaseToken { slot: immediate.slot, epoch, request: held.request };
            let action = ReceiverAction::Scatter { token, chunk: held.chunk, layer: immediate.layer };
            self.actions.push_back(action);
        }
    }

    /// The node has moved a landed layer to the pages; `digest` is the checksum of the bytes it read.
    pub fn scattered(&mut self, now: Time, token: LeaseToken, layer: LayerIdx, digest: u64) {
        if let Some(held) = self.held_mut(token) {
            held.digests[layer.0 as usize] = Some(digest);
            self.scatter_ended(token);
            self.verify(now, token);
        } else {
            self.scatter_ended(token);
        }
    }

    /// A landed layer could not be moved to the pages.
    pub fn not_scattered(&mut self, now: Time, token: LeaseToken, why: &str) {
        self.give_up(now, token.request, Some(RequestError::Internal(why.to_owned())));
        self.scatter_ended(token);
    }

    /// Whether the node was told to scatter layers to the request's pages, and has not reported all of them.
    #[must_use]
    pub fn is_scattering(&self, request: RequestId) -> bool {
        let mut leases = self.slots.iter().filter_map(|slot| slot.lease.as_ref());
        leases.any(|held| held.request == request && held.scattering > 0)
    }

    /// A message of a prefill node.
    pub fn message(&mut self, now: Time, from: NodeId, message: Handoff) {
        match message {
            Handoff::Offer { request, tokens } => {
                if self.requests.contains_key(&request) {
                    self.offered(now, from, request, tokens);
                } else if self.early_offers.len() < self.config.max_early_offers {
                    let until = now.after_us(self.config.offer_timeout_us);
                    self.early_offers.insert(request, EarlyOffer { from, tokens, until });
                } else {
                    self.send(from, Handoff::Cancel { request });
                }
            }
            Handoff::ChunkDone { token, digests } => {
                if self.is_from(token.request, from) {
                    self.chunk_done(now, token, digests);
                }
            }
            Handoff::Done { request, first } => {
                if self.is_from(request, from) {
                    self.requests.get_mut(&request).expect("just found").first = Some(first);
                    self.finish_if_complete(request);
                }
            }
            Handoff::Fenced { request, error } => {
                self.early_offers.remove(&request);
                if self.is_from(request, from) {
                    let gave_up =
                        || RequestError::Internal(format!("prefill node {from} gave the request up"));
                    self.end(request, Some(error.unwrap_or_else(gave_up)));
                }
            }
            // Not for a receiver.
            Handoff::Grant { .. } | Handoff::Cancel { .. } => {}
        }
    }

    /// Stops a request for a reason of this node's own, or because the router said so (`error` None).
    pub fn give_up(&mut self, now: Time, request: RequestId, error: Option<RequestError>) {
        let Some(incoming) = self.requests.get_mut(&request) else {
            return;
        };
        if matches!(incoming.phase, Phase::Fencing { .. }) {
            return;
        }
        let (from, offered) = (incoming.from, incoming.phase != Phase::Expected);
        self.actions.push_back(ReceiverAction::Drop { request, error });
        if incoming.held.is_empty() {
            self.requests.remove(&request);
        } else {
            incoming.phase = Phase::Fencing { until: now.after_us(self.config.fence_timeout_us) };
        }
        self.waiting.retain(|waiting| *waiting != request);
        if offered {
            self.send(from, Handoff::Cancel { request });
        }
    }

    /// The peer is gone, or its control connection is: ends every handoff from it.
    pub fn peer_lost(&mut self, now: Time, peer: NodeId, why: &str) {
        self.early_offers.retain(|_, offer| offer.from != peer);
        for request in self.requests_of(peer) {
            self.give_up(now, request, Some(RequestError::PeerLost(format!("prefill node {peer}: {why}"))));
        }
        // What is left holds slots, and nobody is there to answer for them.
        if !self.requests_of(peer).is_empty() {
            self.sever(peer);
        }
    }

    /// The transport from `peer` is cut: none of its writes can land any more.
    pub fn severed(&mut self, peer: NodeId) {
        self.severing.remove(&peer);
        for request in self.requests_of(peer) {
            self.end(request, Some(RequestError::PeerLost(format!("prefill node {peer} was severed"))));
        }
    }

    /// Acts on every deadline that has passed.
    pub fn tick(&mut self, now: Time) {
        let refused: Vec<_> = self
            .early_offers
            .iter()
            .filter(|(_, offer)| offer.until <= now)
            .map(|(request, offer)| (*request, offer.from))
            .collect();
        for (request, from) in refused {
            self.early_offers.remove(&request);
            self.send(from, Handoff::Cancel { request });
        }
        let late: Vec<_> = self
            .requests
            .iter()
            .filter(|(_, incoming)| incoming.due() <= now && !self.severing.contains(&incoming.from))
            .map(|(request, incoming)| (*request, incoming.from, incoming.phase))
            .collect();
        for (request, peer, phase) in late {
            let error = match phase {
                Phase::Fencing { .. } => {
                    self.sever(peer);
                    continue;
                }
                Phase::Expected => format!("prefill node {peer} did not offer the prompt's KV"),
                Phase::Offered => "no pages were free for the prompt's KV".into(),
                Phase::Landing => format!("prefill node {peer} did not hand over the prompt's KV"),
            };
            self.give_up(now, request, Some(RequestError::Deadline(error)));
        }
    }

    /// When [`Receiver::tick`] has something to do next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        let waiting = self.requests.values().filter(|incoming| !self.severing.contains(&incoming.from));
        waiting.map(Incoming::due).chain(self.early_offers.values().map(|offer| offer.until)).min()
    }

    /// What the node has to do next.
    pub fn poll_action(&mut self) -> Option<ReceiverAction> {
        self.actions.pop_front()
    }

    /// Whether there is something to do.
    #[must_use]
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// Handoffs that are not over.
    #[must_use]
    pub fn open_requests(&self) -> usize {
        self.requests.len() + self.early_offers.len()
    }

    /// Slots that nobody holds.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// All slots.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> ReceiverStats {
        self.stats
    }

    fn send(&mut self, to: NodeId, message: Handoff) {
        self.actions.push_back(ReceiverAction::Send { to, message });
    }

    fn sever(&mut self, peer: NodeId) {
        if self.severing.insert(peer) {
            self.stats.severed += 1;
            self.actions.push_back(ReceiverAction::Sever { peer });
        }
    }

    fn is_from(&self, request: RequestId, from: NodeId) -> bool {
        self.requests.get(&request).is_some_and(|incoming| incoming.from == from)
    }

    fn requests_of(&self, peer: NodeId) -> Vec<RequestId> {
        self.requests.iter().filter(|(_, i)| i.from == peer).map(|(request, _)| *request).collect()
    }

    /// The slot's lease, if it is still this one and not over.
    fn held_mut(&mut self, token: LeaseToken) -> Option<&mut Held> {
        self.lease_mut(token).filter(|held| !held.over)
    }

    fn lease_mut(&mut self, token: LeaseToken) -> Option<&mut Held> {
        let slot = self.slots.get_mut(token.slot.0 as usize)?;
        let current = slot.epoch == token.epoch;
        slot.lease.as_mut().filter(|held| current && held.request == token.request)
    }

    fn scatter_ended(&mut self, token: LeaseToken) {
        let Some(held) = self.lease_mut(token) else { return };
        held.scattering -= 1;
        if held.over {
            self.free_if_idle(token.slot);
            self.grant();
        }
    }

    fn offered(&mut self, now: Time, from: NodeId, request: RequestId, tokens: u32) {
        let incoming = self.requests.get_mut(&request).expect("the caller looked it up");
        if incoming.from != from || incoming.tokens != tokens {
            let (expected, peer) = (incoming.tokens, incoming.from);
            self.send(from, Handoff::Cancel { request });
            if peer == from {
                let why = format!("prefill node {from} offered {tokens} tokens, {expected} were expected");
                self.give_up(now, request, Some(RequestError::Internal(why)));
            }
        } else if incoming.phase == Phase::Expected {
            incoming.phase = Phase::Offered;
            self.actions.push_back(ReceiverAction::Reserve { request });
        }
    }

    /// Gives free slots to those that wait, the longest waiting first.
    fn grant(&mut self) {
        while let Some(request) = self.waiting.front().copied() {
            let Some(incoming) = self.requests.get_mut(&request) else {
                self.waiting.pop_front();
                continue;
            };
            let chunks = self.shape.chunks(incoming.tokens);
            let mut leases = Vec::new();
            while incoming.granted < chunks && leases.len() < MAX_LEASES {
                let Some(id) = self.free.pop() else { break };
                let slot = &mut self.slots[id.0 as usize];
                slot.epoch = SlotEpoch(slot.epoch.0.wrapping_add(1));
                let chunk = ChunkIdx(incoming.granted);
                let layers = self.shape.layers as usize;
                slot.lease = Some(Held {
                    request,
                    chunk,
                    landed: vec![false; layers],
                    digests: vec![None; layers],
                    sent: None,
                    scattering: 0,
                    over: false,
                });
                incoming.held.insert(id);
                incoming.granted += 1;
                leases.push((chunk, LeaseToken { slot: id, epoch: slot.epoch, request }));
            }
            let (to, more) = (incoming.from, incoming.granted < chunks);
            if !leases.is_empty() {
                self.actions.push_back(ReceiverAction::Grant { to, request, leases });
            }
            if more && self.free.is_empty() {
                return;
            }
            if !more {
                self.waiting.pop_front();
            }
        }
    }

    fn chunk_done(&mut self, now: Time, token: LeaseToken, digests: Vec<u64>) {
        let layers = self.shape.layers as usize;
        let Some(held) = self.held_mut(token) else { return };
        if digests.len() != layers {
            let why = format!("chunk {} has {} digests for {layers} layers", held.chunk, digests.len());
            self.give_up(now, token.request, Some(RequestError::Internal(why)));
            return;
        }
        held.sent = Some(digests);
        self.verify(now, token);
    }

    /// The sender has said what it sent to the slot: frees it once every layer has landed, was scattered, and is that.
    fn verify(&mut self, now: Time, token: LeaseToken) {
        let Some(held) = self.held_mut(token) else { return };
        let Some(sent) = &held.sent else { return };
        let chunk = held.chunk;
        let complete = held.digests.iter().all(Option::is_some);
        let differs =
            sent.iter().zip(&held.digests).position(|(sent, got)| got.is_some_and(|got| got != *sent));
        let incoming = self.requests.get_mut(&token.request).expect("it holds the slot");
        if matches!(incoming.phase, Phase::Fencing { .. }) {
            // Nothing is in flight to this slot: it need not wait for the request's `Fenced`.
            self.end_lease(token.slot);
            if self.requests[&token.request].held.is_empty() {
                self.requests.remove(&token.request);
            }
            self.grant();
        } else if let Some(layer) = differs {
            self.stats.corrupt += 1;
            let why =
                format!("chunk {chunk}, layer {layer} landed with another digest than it was sent with");
            self.give_up(now, token.request, Some(RequestError::Corrupt(why)));
        } else if complete {
            self.stats.verified += 1;
            incoming.verified += 1;
            self.end_lease(token.slot);
            self.finish_if_complete(token.request);
            self.grant();
        }
    }

    fn finish_if_complete(&mut self, request: RequestId) {
        let Some(incoming) = self.requests.get_mut(&request) else {
            return;
        };
        if incoming.phase != Phase::Landing || incoming.verified != self.shape.chunks(incoming.tokens) {
            return;
        }
        if let Some(first) = incoming.first.take() {
            self.requests.remove(&request);
            self.actions.push_back(ReceiverAction::Ready { request, first });
        }
    }

    /// Nothing more will be written for the request: frees what it holds.
    fn end(&mut self, request: RequestId, error: Option<RequestError>) {
        let Some(incoming) = self.requests.get_mut(&request) else {
            return;
        };
        let dropped = matches!(incoming.phase, Phase::Fencing { .. });
        let held = std::mem::take(&mut incoming.held);
        for slot in held {
            self.end_lease(slot);
        }
        self.requests.remove(&request);
        self.waiting.retain(|waiting| *waiting != request);
        if !dropped {
            self.actions.push_back(ReceiverAction::Drop { request, error });
        }
        self.grant();
    }

    /// The peer writes the slot no more: it is free as soon as nothing reads it here.
    fn end_lease(&mut self, id: SlotId) {
        let slot = &mut self.slots[id.0 as usize];
        let held = slot.lease.as_mut().expect("only leased slots are freed");
        held.over = true;
        let token = LeaseToken { slot: id, epoch: slot.epoch, request: held.request };
        if let Some(incoming) = self.requests.get_mut(&held.request) {
            incoming.held.remove(&id);
        }
        self.actions.push_back(ReceiverAction::Close { token });
        self.free_if_idle(id);
    }

    fn free_if_idle(&mut self, id: SlotId) {
        let slot = &mut self.slots[id.0 as usize];
        if slot.lease.take_if(|held| held.over && held.scattering == 0).is_some() {
            self.free.push(id);
        }
    }
}

impl Incoming {
    /// When it has to be over, or fenced.
    fn due(&self) -> Time {
        match self.phase {
            Phase::Fencing { until } => until,
            _ => self.deadline,
        }
    }
}
