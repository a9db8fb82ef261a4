use super::Immediate;
use crate::ids::{ChunkIdx, LayerIdx, NodeId, RequestId, Time};
use crate::layout::KvShape;
use crate::wire::{Handoff, Lease, RequestError, Sampled, Window};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Limits of a [`Sender`].
#[derive(Clone, Copy, Debug)]
pub struct SenderConfig {
    /// How long writes that are in flight may take to end once their request is given up. Then the peer is severed.
    pub drain_timeout_us: u64,
}

impl Default for SenderConfig {
    fn default() -> Self {
        SenderConfig { drain_timeout_us: 2_000_000 }
    }
}

/// The prefill node's side of every handoff it has begun.
///
/// The node calls in with what happened, takes [`Sender::next_push`] whenever it has room to pack another
/// extent, and carries out what [`Sender::poll_action`] says, in order.
pub struct Sender {
    shape: KvShape,
    config: SenderConfig,
    requests: BTreeMap<RequestId, Outgoing>,
    /// Chunks that may have a layer to push, in the order in which they became pushable.
    pushable: VecDeque<(RequestId, ChunkIdx)>,
    /// Peers that are being severed: nothing new is begun with them until that is done.
    severing: BTreeSet<NodeId>,
    actions: VecDeque<SenderAction>,
}

/// What the node has to do.
#[derive(Clone, PartialEq, Debug)]
pub enum SenderAction {
    /// Send a message.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: Handoff,
    },
    /// The request needs its KV no longer: nothing is in flight and nothing will be pushed.
    Release {
        /// Which request.
        request: RequestId,
        /// Whether all of it was delivered.
        outcome: Result<(), Option<RequestError>>,
    },
    /// Cut the transport to this peer, then call [`Sender::severed`].
    Sever {
        /// Which peer.
        peer: NodeId,
    },
}

/// One extent to pack and write.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Push {
    /// Whose KV.
    pub request: RequestId,
    /// Where to.
    pub to: NodeId,
    /// Which chunk.
    pub chunk: ChunkIdx,
    /// Tokens of the chunk.
    pub tokens: u32,
    /// Which layer.
    pub layer: LayerIdx,
    /// The window of the chunk's lease.
    pub window: Window,
    /// Where in the window the layer begins.
    pub offset: usize,
    /// Bytes of the layer.
    pub len: usize,
    /// What arrives with it.
    pub immediate: Immediate,
}

struct Outgoing {
    to: NodeId,
    deadline: Time,
    chunks: Vec<OutgoingChunk>,
    /// Pushes taken by the node whose end was not reported yet. No `Fenced` leaves before this is 0.
    in_flight: u32,
    chunks_done: u32,
    first: Option<Vec<Sampled>>,
    /// Set once nothing more may be pushed.
    draining: Option<Draining>,
}

struct OutgoingChunk {
    tokens: u32,
    lease: Option<Lease>,
    /// Layers below this are computed.
    ready: u32,
    /// Layers below this were taken by the node. Never above `ready`.
    pushed: u32,
    /// Layers whose bytes have landed.
    sent: u32,
    digests: Vec<u64>,
}

struct Draining {
    until: Time,
    error: Option<RequestError>,
}

impl Sender {
    /// A sender of KV of this shape.
    #[must_use]
    pub fn new(shape: KvShape, config: SenderConfig) -> Sender {
        Sender {
            shape,
            config,
            requests: BTreeMap::new(),
            pushable: VecDeque::new(),
            severing: BTreeSet::new(),
            actions: VecDeque::new(),
        }
    }

    /// The prompt of `tokens` tokens has its pages and is about to be computed: offers its KV to `to`.
    pub fn begin(&mut self, request: RequestId, to: NodeId, tokens: u32, deadline: Time) {
        if self.severing.contains(&to) {
            let error = RequestError::PeerLost(format!("decode node {to} is being severed"));
            self.actions.push_back(SenderAction::Release { request, outcome: Err(Some(error)) });
            return;
        }
        let chunks = (0..self.shape.chunks(tokens))
            .map(|chunk| OutgoingChunk {
                tokens: self.shape.chunk_span(ChunkIdx(chunk), tokens).len() as u32,
                lease: None,
                ready: 0,
                pushed: 0,
                sent: 0,
                digests: vec![0; self.shape.layers as usize],
            })
            .collect();
        let outgoing =
            Outgoing { to, deadline, chunks, in_flight: 0, chunks_done: 0, first: None, draining: None };
        let before = self.requests.insert(request, outgoing);
        debug_assert!(before.is_none(), "{request:?} was begun twice");
        self.send(to, Handoff::Offer { request, tokens });
    }

    /// The layer's KV of the whole chunk is in the pages. Layers of a chunk become ready in order.
    pub fn ready(&mut self, request: RequestId, chunk: ChunkIdx, layer: LayerIdx) {
        let Some(outgoing) = self.requests.get_mut(&request) else {
            return;
        };
        let Some(state) = outgoing.chunks.get_mut(chunk.0 as usize) else {
            return;
        };
        debug_assert_eq!(state.ready, layer.0, "layers become ready in order");
        state.ready = layer.0 + 1;
        if state.lease.is_some() && outgoing.draining.is_none() {
            self.pushable.push_back((request, chunk));
        }
    }

    /// The first token of each choice is known.
    pub fn first(&mut self, request: RequestId, first: Vec<Sampled>) {
        if let Some(outgoing) = self.requests.get_mut(&request) {
            outgoing.first = Some(first);
            self.finish_if_complete(request);
        }
    }

    /// The next extent to pack and write, if there is one. Its end must be reported by [`Sender::sent`] or
    /// [`Sender::not_sent`], whatever happens to the request meanwhile.
    pub fn next_push(&mut self) -> Option<Push> {
        while let Some((request, chunk)) = self.pushable.pop_front() {
            let Some(outgoing) = self.requests.get_mut(&request) else {
                continue;
            };
            if outgoing.draining.is_some() {
                continue;
            }
            let state = &mut outgoing.chunks[chunk.0 as usize];
            let Some(lease) = state.lease.filter(|_| state.pushed < state.ready) else {
                continue;
            };
            let layer = LayerIdx(state.pushed);
            state.pushed += 1;
            if state.pushed < state.ready {
                self.pushable.push_back((request, chunk));
            }
            outgoing.in_flight += 1;
            let extent = self.shape.packed_layer(layer, state.tokens);
            return Some(Push {
                request,
                to: outgoing.to,
                chunk,
                tokens: state.tokens,
                layer,
                window: lease.window,
                offset: extent.start,
                len: extent.len(),
                immediate: Immediate::new(lease.token.slot, layer, lease.token.epoch),
            });
        }
        None
    }

    /// Whether the request was given up, or is over: what is not yet written of it need not be.
    #[must_use]
    pub fn is_given_up(&self, request: RequestId) -> bool {
        self.requests.get(&request).is_none_or(|outgoing| outgoing.draining.is_some())
    }

    /// A push has landed; `digest` is the checksum of the bytes that were written.
    pub fn sent(&mut self, request: RequestId, chunk: ChunkIdx, layer: LayerIdx, digest: u64) {
        let layers = self.shape.layers;
        let Some(outgoing) = self.requests.get_mut(&request) else {
            return;
        };
        outgoing.in_flight -= 1;
        if outgoing.draining.is_some() {
            self.release_if_drained(request);
            return;
        }
        let state = &mut outgoing.chunks[chunk.0 as usize];
        state.digests[layer.0 as usize] = digest;
        state.sent += 1;
        if state.sent < layers {
            return;
        }
        outgoing.chunks_done += 1;
        if let Some(lease) = state.lease {
            let message =
                Handoff::ChunkDone { token: lease.token, digests: std::mem::take(&mut state.digests) };
            let to = outgoing.to;
            self.send(to, message);
        }
        self.finish_if_complete(request);
    }

    /// A push ended without landing.
    pub fn not_sent(&mut self, now: Time, request: RequestId, why: &str) {
        let Some(outgoing) = self.requests.get_mut(&request) else {
            return;
        };
        outgoing.in_flight -= 1;
        let error = RequestError::PeerLost(format!("a write to decode node {} failed: {why}", outgoing.to));
        self.give_up(now, request, Some(error));
    }

    /// Stops a request for a reason of this node's own, or because the router said so (`error` None).
    pub fn give_up(&mut self, now: Time, request: RequestId, error: Option<RequestError>) {
        let Some(outgoing) = self.requests.get_mut(&request) else {
            return;
        };
        if outgoing.draining.is_none() {
            outgoing.draining = Some(Draining { until: now.after_us(self.config.drain_timeout_us), error });
        }
        self.release_if_drained(request);
    }

    /// A message of a decode node.
    pub fn message(&mut self, now: Time, from: NodeId, message: Handoff) {
        match message {
            Handoff::Grant { request, leases } => {
                if self.requests.get(&request).is_none_or(|outgoing| outgoing.to != from) {
                    // Over already, or never begun: nothing was or will be written under these leases.
                    self.send(from, Handoff::Fenced { request, error: None });
                    return;
                }
                if let Err(why) = self.granted(request, &leases) {
                    self.give_up(now, request, Some(RequestError::Internal(why)));
                }
            }
            Handoff::Cancel { request } => {
                if self.requests.get(&request).is_some_and(|outgoing| outgoing.to == from) {
                    self.give_up(now, request, None);
                } else {
                    self.send(from, Handoff::Fenced { request, error: None });
                }
            }
            // Not for a sender: a peer that says them is confused, and no state of ours depends on it.
            Handoff::Offer { .. }
            | Handoff::ChunkDone { .. }
            | Handoff::Done { .. }
            | Handoff::Fenced { .. } => {}
        }
    }

    /// The peer is gone, or its control connection is: ends every handoff to it.
    pub fn peer_lost(&mut self, now: Time, peer: NodeId, why: &str) {
        let until = now.after_us(self.config.drain_timeout_us);
        let mut any = false;
        for outgoing in self.requests.values_mut().filter(|outgoing| outgoing.to == peer) {
            any = true;
            let error = Some(RequestError::PeerLost(format!("decode node {peer}: {why}")));
            outgoing.draining.get_or_insert(Draining { until, error });
        }
        if any {
            self.sever(peer);
        }
    }

    /// The transport to `peer` is cut: nothing of ours can reach its memory any more.
    pub fn severed(&mut self, peer: NodeId) {
        self.severing.remove(&peer);
        let gone: Vec<_> = self
            .requests
            .iter()
            .filter(|(_, outgoing)| outgoing.to == peer)
            .map(|(request, _)| *request)
            .collect();
        for request in gone {
            let outgoing = self.requests.remove(&request).expect("just listed");
            let error = outgoing.draining.map_or_else(
                || Some(RequestError::PeerLost(format!("decode node {peer} was severed"))),
                |draining| draining.error,
            );
            self.send(peer, Handoff::Fenced { request, error: error.clone() });
            self.actions.push_back(SenderAction::Release { request, outcome: Err(error) });
        }
    }

    /// Acts on every deadline that has passed.
    pub fn tick(&mut self, now: Time) {
        let late: Vec<_> = self
            .requests
            .iter()
            .filter(|(_, outgoing)| outgoing.due() <= now && !self.severing.contains(&outgoing.to))
            .map(|(request, outgoing)| (*request, outgoing.to, outgoing.draining.is_some()))
            .collect();
        for (request, peer, draining) in late {
            if draining {
                self.sever(peer);
            } else {
                let error = RequestError::Deadline("the handoff was not complete".into());
                self.give_up(now, request, Some(error));
            }
        }
    }

    /// When [`Sender::tick`] has something to do next.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        let waiting = self.requests.values().filter(|outgoing| !self.severing.contains(&outgoing.to));
        waiting.map(Outgoing::due).min()
    }

    /// What the node has to do next.
    pub fn poll_action(&mut self) -> Option<SenderAction> {
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
        self.requests.len()
    }

    fn send(&mut self, to: NodeId, message: Handoff) {
        self.actions.push_back(SenderAction::Send { to, message });
    }

    fn sever(&mut self, peer: NodeId) {
        if self.severing.insert(peer) {
            self.actions.push_back(SenderAction::Sever { peer });
        }
    }

    fn granted(&mut self, request: RequestId, leases: &[Lease]) -> Result<(), String> {
        let outgoing = self.requests.get_mut(&request).expect("the caller looked it up");
        for lease in leases {
            let chunk = lease.chunk;
            let Some(state) = outgoing.chunks.get_mut(chunk.0 as usize) else {
                return Err(format!("decode node granted chunk {chunk} of {}", outgoing.chunks.len()));
            };
            let bytes = self.shape.packed_bytes(state.tokens) as u64;
            if lease.token.request != request
                || lease.window.len != bytes
                || lease.token.slot.0 >= super::MAX_SLOTS
            {
                return Err(format!(
                    "decode node granted chunk {chunk} a window of {} bytes for {bytes}",
                    lease.window.len
                ));
            }
            if state.lease.is_some() {
                return Err(format!("decode node granted chunk {chunk} twice"));
            }
            state.lease = Some(*lease);
            if outgoing.draining.is_none() && state.ready > 0 {
                self.pushable.push_back((request, chunk));
            }
        }
        Ok(())
    }

    fn finish_if_complete(&mut self, request: RequestId) {
        let Some(outgoing) = self.requests.get_mut(&request) else {
            return;
        };
        if outgoing.draining.is_some() || outgoing.chunks_done as usize != outgoing.chunks.len() {
            return;
        }
        let Some(first) = outgoing.first.take() else {
            return;
        };
        let to = outgoing.to;
        self.requests.remove(&request);
        self.send(to, Handoff::Done { request, first });
        self.actions.push_back(SenderAction::Release { request, outcome: Ok(()) });
    }

    fn release_if_drained(&mut self, request: RequestId) {
        let Some(outgoing) = self.requests.get(&request) else {
            return;
        };
        if outgoing.in_flight > 0 || self.severing.contains(&outgoing.to) {
            return;
        }
        let outgoing = self.requests.remove(&request).expect("just found");
        let error = outgoing.draining.and_then(|draining| draining.error);
        self.send(outgoing.to, Handoff::Fenced { request, error: error.clone() });
        self.actions.push_back(SenderAction::Release { request, outcome: Err(error) });
    }
}

impl Outgoing {
    /// When it has to be over, or drained.
    fn due(&self) -> Time {
        self.draining.as_ref().map_or(self.deadline, |draining| draining.until)
    }
}
