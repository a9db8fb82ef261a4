//! What is under way in the network, and what happens when it arrives.

use super::SimConfig;
use super::network::SimNetwork;
use crate::control::{ControlEvent, Lane, SendError};
use crate::events::EventQueue;
use crate::lent::Lent;
use crate::rng::Rng;
use crate::transport::{Event, FailReason, Held, SeverReason, SubmitError, Write};
use crate::window::Windows;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;
use std::task::Waker;
use tandem_proto::ids::{NodeId, Time};
use tandem_proto::wire::Window;

/// How often what waits for a node to poll looks whether it has.
const UNTIL_POLLED_US: u64 = 100;

/// The network between calls.
pub(super) struct State {
    config: SimConfig,
    rng: Rng,
    now: Time,
    /// Orders what is due at the same moment; numbers connections and writes too.
    count: u64,
    due: BinaryHeap<Due>,
    nodes: BTreeMap<NodeId, Node>,
    /// Keyed with the smaller id first.
    pairs: BTreeMap<(NodeId, NodeId), Pair>,
    writes: BTreeMap<u64, Flight>,
    /// Called when the lock is free again.
    to_wake: Vec<Waker>,
    /// Kept for its memory: the piece being landed.
    piece: Vec<u8>,
}

struct Node {
    alive: bool,
    windows: Arc<Windows>,
    events: EventQueue,
    control: VecDeque<ControlEvent>,
    waker: Option<Waker>,
    stalled_until: Time,
}

/// Everything between two nodes. Arrays of two are indexed by side: the smaller id is side 0.
#[derive(Default)]
struct Pair {
    planes: [PlaneState; 2],
    /// Numbers the partition, so that one that was healed is not noticed later.
    partition: Option<u64>,
    /// What arrived during the partition, for when it heals.
    held: Vec<Travel>,
    /// When the link has carried all that this side gave it.
    busy_until: [Time; 2],
    /// The latest arrival, which later pieces may not overtake unless the network reorders.
    last_arrival: [Time; 2],
    /// Unreported writes of this side.
    writes: [usize; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Plane {
    Data,
    Control,
}

#[derive(Default)]
struct PlaneState {
    dial: Option<Dial>,
    /// The connection as each side sees it. They differ while news of a break is under way.
    sides: [Option<u64>; 2],
    /// `[sender's side][lane]`.
    lanes: [[LaneState; 2]; 2],
}

struct Dial {
    connection: u64,
    /// Who called `connect`: each is answered.
    asked: [bool; 2],
}

#[derive(Default)]
struct LaneState {
    frames: VecDeque<Vec<u8>>,
    last_arrival: Time,
}

/// A write under way.
struct Flight {
    from: NodeId,
    to: NodeId,
    connection: u64,
    ticket: u64,
    immediate: u32,
    window: Window,
    offset: u64,
    len: usize,
    source: Source,
    /// Pieces that have not arrived.
    pieces: usize,
    /// A piece was refused: nothing more of it lands.
    refused: bool,
    /// The ticket is still to be reported.
    open: bool,
}

enum Source {
    /// Read when each piece arrives.
    Lent(Lent),
    /// What was on the wire when the source was given back.
    OnTheWire { bytes: Vec<u8>, until: Time },
}

struct Due {
    at: Time,
    count: u64,
    what: What,
}

enum What {
    Arrive(Travel),
    /// A side learns that its connection is over.
    Break {
        plane: Plane,
        node: NodeId,
        peer: NodeId,
        connection: u64,
        why: &'static str,
    },
    DialTimeout {
        plane: Plane,
        pair: (NodeId, NodeId),
        connection: u64,
    },
    DialFailed {
        plane: Plane,
        node: NodeId,
        peer: NodeId,
        why: &'static str,
    },
    PartitionNoticed {
        pair: (NodeId, NodeId),
        partition: u64,
    },
}

/// Something on its way: late, held up, but never lost on a connection that lives.
struct Travel {
    from: NodeId,
    to: NodeId,
    connection: u64,
    cargo: Cargo,
}

enum Cargo {
    Dial(Plane),
    Accept(Plane),
    Piece {
        write: u64,
        start: usize,
        len: usize,
        sent: Time,
    },
    Report {
        write: u64,
        landed: bool,
    },
    /// The next frame of the lane, whichever it is: so that a lane's order always holds.
    Frame(Lane),
}

impl Cargo {
    fn plane(&self) -> Plane {
        match self {
            Cargo::Dial(plane) | Cargo::Accept(plane) => *plane,
            Cargo::Piece { .. } | Cargo::Report { .. } => Plane::Data,
            Cargo::Frame(_) => Plane::Control,
        }
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        // Reversed: the heap gives its greatest first, and the earliest is wanted.
        (other.at, other.count).cmp(&(self.at, self.count))
    }
}

fn pair_of(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

fn side_of(node: NodeId, peer: NodeId) -> usize {
    usize::from(node > peer)
}

impl State {
    pub(super) fn new(seed: u64, config: SimConfig) -> State {
        State {
            config,
            rng: Rng::new(seed),
            now: Time(0),
            count: 0,
            due: BinaryHeap::new(),
            nodes: BTreeMap::new(),
            pairs: BTreeMap::new(),
            writes: BTreeMap::new(),
            to_wake: Vec::new(),
            piece: Vec::new(),
        }
    }

    /// False if there was such a node already.
    pub(super) fn add(&mut self, node: NodeId, windows: Arc<Windows>) -> bool {
        let added = Node {
            alive: true,
            windows,
            events: EventQueue::default(),
            control: VecDeque::new(),
            waker: None,
            stalled_until: Time(0),
        };
        self.nodes.insert(node, added).is_none()
    }

    pub(super) fn config(&self) -> &SimConfig {
        &self.config
    }

    pub(super) fn now(&self) -> Time {
        self.now
    }

    pub(super) fn next_at(&self) -> Option<Time> {
        self.due.peek().map(|due| due.at)
    }

    pub(super) fn advance(&mut self, to: Time) {
        while self.due.peek().is_some_and(|due| due.at <= to) {
            if let Some(due) = self.due.pop() {
                self.now = self.now.max(due.at);
                self.happen(due.what);
            }
        }
        self.now = self.now.max(to);
    }

    pub(super) fn draw(&mut self) -> u64 {
        self.rng.next()
    }

    pub(super) fn take_wakers(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.to_wake)
    }

    pub(super) fn has_events(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|n| n.alive && !(n.events.is_empty() && n.control.is_empty()))
    }

    pub(super) fn take_events(&mut self, node: NodeId, events: &mut Vec<Event>) {
        if let Some(node) = self.nodes.get_mut(&node).filter(|n| n.alive) {
            while let Some(severed) = node.events.drain(events) {
                node.windows.close_all_of(severed);
                node.events.forget_landed_of(severed);
            }
        }
    }

    /// What the node holds for its peers.
    pub(super) fn held(&self, node: NodeId) -> Held {
        let ours = |flight: &&Flight| flight.from == node && flight.open;
        let peers = |((a, b), pair): (&(NodeId, NodeId), &Pair)| {
            let side = [*a, *b].iter().position(|id| *id == node)?;
            pair.planes[Plane::Data as usize].sides[side]
        };
        let peers = self.pairs.iter().filter_map(peers).count();
        Held {
            windows: self.nodes.get(&node).map_or(0, |node| node.windows.open_count()),
            peers,
            writes: self.writes.values().filter(ours).count(),
            connections: peers,
        }
    }

    pub(super) fn take_control(&mut self, node: NodeId, events: &mut Vec<ControlEvent>) {
        if let Some(node) = self.nodes.get_mut(&node).filter(|n| n.alive) {
            events.extend(node.control.drain(..));
        }
    }

    pub(super) fn forget_landed(&mut self, node: NodeId, key: u64) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.events.forget_landed(key);
        }
    }

    pub(super) fn set_waker(&mut self, node: NodeId, waker: Waker) {
        if let Some(node) = self.nodes.get_mut(&node) {
            if !node.events.is_empty() {
                self.to_wake.push(waker.clone());
            }
            node.waker = Some(waker);
        }
    }

    pub(super) fn partition(&mut self, a: NodeId, b: NodeId) {
        let partition = self.next_count();
        let pair = self.pair(a, b);
        if pair.partition.is_some() {
            return;
        }
        pair.partition = Some(partition);
        let at = self.after_detection();
        let pair = pair_of(a, b);
        self.schedule(at, What::PartitionNoticed { pair, partition });
    }

    pub(super) fn calm(&mut self) {
        let SimConfig { loss, stall, break_connection, corrupt, .. } = &mut self.config;
        for chance in [loss, stall, break_connection, corrupt] {
            *chance = 0.0;
        }
    }

    pub(super) fn heal(&mut self, a: NodeId, b: NodeId) {
        let pair = self.pair(a, b);
        pair.partition = None;
        for travel in std::mem::take(&mut pair.held) {
            let at = self.after_latency();
            self.schedule(at, What::Arrive(travel));
        }
    }

    fn next_count(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    fn schedule(&mut self, at: Time, what: What) {
        let count = self.next_count();
        self.due.push(Due { at, count, what });
    }

    fn pair(&mut self, a: NodeId, b: NodeId) -> &mut Pair {
        self.pairs.entry(pair_of(a, b)).or_default()
    }

    fn plane(&mut self, plane: Plane, a: NodeId, b: NodeId) -> &mut PlaneState {
        &mut self.pair(a, b).planes[plane as usize]
    }

    fn alive(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|n| n.alive)
    }

    fn draw_latency(&mut self) -> u64 {
        let lost = self.rng.chance(self.config.loss);
        self.rng.within(&self.config.latency_us) + if lost { self.config.retransmit_us } else { 0 }
    }

    fn after_latency(&mut self) -> Time {
        let latency = self.draw_latency();
        self.now.after_us(latency)
    }

    fn after_detection(&mut self) -> Time {
        self.now.after_us(self.rng.within(&self.config.detect_us))
    }

    /// When news of a break that was announced arrives; when nothing can be announced, silence tells.
    fn after_goodbye(&mut self, a: NodeId, b: NodeId) -> Time {
        if self.pair(a, b).partition.is_some() { self.after_detection() } else { self.after_latency() }
    }

    fn report_data(&mut self, node: NodeId, event: Event) {
        if let Some(node) = self.nodes.get_mut(&node).filter(|n| n.alive) {
            node.events.push(event);
            self.to_wake.extend(node.waker.clone());
        }
    }

    fn report_control(&mut self, node: NodeId, event: ControlEvent) {
        if let Some(node) = self.nodes.get_mut(&node).filter(|n| n.alive) {
            node.control.push_back(event);
            self.to_wake.extend(node.waker.clone());
        }
    }

    fn report_begin(&mut self, plane: Plane, node: NodeId, peer: NodeId) {
        match plane {
            Plane::Data => self.report_data(node, Event::Connected { peer }),
            Plane::Control => {
                self.report_control(node, ControlEvent::Up { peer, addr: SimNetwork::address(peer) });
            }
        }
    }

    fn report_end(&mut self, plane: Plane, node: NodeId, peer: NodeId, reason: SeverReason) {
        match plane {
            Plane::Data => {
                if let Some(node) = self.nodes.get(&node) {
                    node.windows.close_all_of(peer);
                    if node.events.ends_severed(peer) {
                        return;
                    }
                }
                self.report_data(node, Event::Severed { peer, reason });
            }
            Plane::Control => {
                self.report_control(node, ControlEvent::Down { peer, reason: reason.to_string() });
            }
        }
    }

    pub(super) fn connect(&mut self, plane: Plane, from: NodeId, to: NodeId) {
        if !self.alive(from) {
            return;
        }
        if from == to {
            let reason = SeverReason::Unreachable("a node does not connect to itself".into());
            return self.report_end(plane, from, to, reason);
        }
        let me = side_of(from, to);
        let connection = self.next_count();
        let state = self.plane(plane, from, to);
        if state.sides[me].is_some() {
            return;
        }
        if let Some(dial) = &mut state.dial {
            dial.asked[me] = true;
            return;
        }
        let mut asked = [false; 2];
        asked[me] = true;
        state.dial = Some(Dial { connection, asked });
        let arrival = self.after_latency();
        self.schedule(arrival, What::Arrive(Travel { from, to, connection, cargo: Cargo::Dial(plane) }));
        let deadline = self.now.after_us(*self.config.detect_us.end());
        self.schedule(deadline, What::DialTimeout { plane, pair: pair_of(from, to), connection });
    }

    pub(super) fn submit(&mut self, from: NodeId, to: NodeId, write: Write) -> Result<(), SubmitError> {
        let me = side_of(from, to);
        let alive = self.alive(from);
        let limit = self.config.write_limit;
        let pair = self.pair(from, to);
        let Some(connection) = pair.planes[Plane::Data as usize].sides[me].filter(|_| alive) else {
            return Err(SubmitError::NotConnected { peer: to });
        };
        if pair.writes[me] >= limit {
            return Err(SubmitError::Full { peer: to, limit });
        }
        pair.writes[me] += 1;

        let id = self.next_count();
        let len = write.source.len();
        let piece_bytes = self.config.piece_bytes.max(1).min(len.div_ceil(2).max(1));
        let pieces = len.div_ceil(piece_bytes).max(1);
        for piece in 0..pieces {
            let start = piece * piece_bytes;
            let len = piece_bytes.min(len - start);
            let cargo = Cargo::Piece { write: id, start, len, sent: self.carry(from, to, len) };
            let arrival = self.data_arrival(from, to, &cargo);
            self.schedule(arrival, What::Arrive(Travel { from, to, connection, cargo }));
        }
        let flight = Flight {
            from,
            to,
            connection,
            ticket: write.ticket,
            immediate: write.immediate,
            window: write.window,
            offset: write.offset,
            len,
            source: Source::Lent(Lent(write.source)),
            pieces,
            refused: false,
            open: true,
        };
        self.writes.insert(id, flight);
        self.trouble(Plane::Data, from, to, connection);
        Ok(())
    }

    /// When the link has carried `len` more bytes.
    fn carry(&mut self, from: NodeId, to: NodeId, len: usize) -> Time {
        let (now, bandwidth) = (self.now, self.config.bandwidth_bytes_per_us.max(1));
        let busy_until = &mut self.pair(from, to).busy_until[side_of(from, to)];
        *busy_until = (*busy_until).max(now).after_us((len as u64).div_ceil(bandwidth));
        *busy_until
    }

    fn data_arrival(&mut self, from: NodeId, to: NodeId, cargo: &Cargo) -> Time {
        let sent = if let Cargo::Piece { sent, .. } = cargo { *sent } else { self.now };
        let arrival = sent.after_us(self.draw_latency());
        if self.config.reorder {
            return arrival;
        }
        let last = &mut self.pair(from, to).last_arrival[side_of(from, to)];
        *last = (*last).max(arrival);
        *last
    }

    pub(super) fn send(
        &mut self,
        from: NodeId,
        to: NodeId,
        lane: Lane,
        frame: Vec<u8>,
    ) -> Result<(), SendError> {
        let me = side_of(from, to);
        let alive = self.alive(from);
        let (limit, longest) = (self.config.frame_limit, self.config.frame_bytes);
        if frame.len() > longest {
            return Err(SendError::Oversize { len: frame.len(), limit: longest });
        }
        let len = frame.len();
        let state = self.plane(Plane::Control, from, to);
        let Some(connection) = state.sides[me].filter(|_| alive) else {
            return Err(SendError::NotConnected { peer: to });
        };
        let queue = &mut state.lanes[me][lane as usize].frames;
        if queue.len() >= limit {
            return Err(SendError::Backlogged { peer: to, limit });
        }
        queue.push_back(frame);
        let arrival = self.carry(from, to, len).after_us(self.draw_latency());
        let last = &mut self.plane(Plane::Control, from, to).lanes[me][lane as usize].last_arrival;
        *last = (*last).max(arrival);
        let arrival = *last;
        self.schedule(arrival, What::Arrive(Travel { from, to, connection, cargo: Cargo::Frame(lane) }));
        self.trouble(Plane::Control, from, to, connection);
        Ok(())
    }

    /// The faults that come by chance.
    fn trouble(&mut self, plane: Plane, from: NodeId, to: NodeId, connection: u64) {
        if self.rng.chance(self.config.stall) {
            let us = self.rng.within(&self.config.stall_us);
            self.stall(from, us);
        }
        if self.rng.chance(self.config.break_connection) {
            self.break_both(plane, from, to, connection, "the connection broke");
        }
    }

    fn break_both(&mut self, plane: Plane, a: NodeId, b: NodeId, connection: u64, why: &'static str) {
        for (node, peer) in [(a, b), (b, a)] {
            let at = self.after_detection();
            self.schedule(at, What::Break { plane, node, peer, connection, why });
        }
    }

    pub(super) fn stall(&mut self, node: NodeId, us: u64) {
        let until = self.now.after_us(us);
        if let Some(node) = self.nodes.get_mut(&node) {
            node.stalled_until = node.stalled_until.max(until);
        }
        if us > *self.config.detect_us.end() {
            for (plane, peer, connection) in self.connections_of(node) {
                self.break_both(plane, node, peer, connection, "silent for too long");
            }
        }
    }

    /// Every connection that either side of it still believes in.
    fn connections_of(&self, node: NodeId) -> Vec<(Plane, NodeId, u64)> {
        let mut found = Vec::new();
        for ((a, b), pair) in &self.pairs {
            let peer = match node {
                n if n == *a => *b,
                n if n == *b => *a,
                _ => continue,
            };
            for plane in [Plane::Data, Plane::Control] {
                let sides = pair.planes[plane as usize].sides;
                found.extend(sides.iter().flatten().map(|connection| (plane, peer, *connection)));
            }
        }
        found
    }

    pub(super) fn crash(&mut self, node: NodeId) {
        if !self.alive(node) {
            return;
        }
        for (plane, peer, connection) in self.connections_of(node) {
            let at = self.after_detection();
            self.schedule(
                at,
                What::Break { plane, node: peer, peer: node, connection, why: "the peer is silent" },
            );
        }
        let flights: Vec<u64> =
            self.writes.iter().filter(|(_, f)| f.from == node && f.open).map(|(id, _)| *id).collect();
        for id in flights {
            self.give_up(id, None);
        }
        for ((a, b), pair) in &mut self.pairs {
            if *a == node || *b == node {
                for plane in &mut pair.planes {
                    plane.sides[usize::from(*b == node)] = None;
                }
            }
        }
        if let Some(node) = self.nodes.get_mut(&node) {
            node.alive = false;
            node.events = EventQueue::default();
            node.control.clear();
            node.waker = None;
        }
    }

    /// The source goes back to its owner: what is on the wire by now may still arrive, the rest never will.
    fn give_up(&mut self, id: u64, report: Option<FailReason>) {
        let now = self.now;
        let Some(flight) = self.writes.get_mut(&id) else {
            return;
        };
        if let Source::Lent(lent) = &flight.source {
            // What was refused is not looked at again.
            let bytes = if flight.refused { Vec::new() } else { lent.as_ref().to_vec() };
            flight.source = Source::OnTheWire { bytes, until: now };
        }
        flight.open = false;
        let (from, to, ticket) = (flight.from, flight.to, flight.ticket);
        if flight.pieces == 0 {
            self.writes.remove(&id);
        }
        self.pair(from, to).writes[side_of(from, to)] -= 1;
        if let Some(reason) = report {
            self.report_data(from, Event::Failed { peer: to, ticket, reason });
        }
    }

    /// `node` ends what it has with `peer`, and says so.
    pub(super) fn hang_up(&mut self, plane: Plane, node: NodeId, peer: NodeId) {
        if !self.alive(node) {
            return;
        }
        let me = side_of(node, peer);
        let state = self.plane(plane, node, peer);
        let connection = state.sides[me];
        let dial = state.dial.take_if(|dial| dial.asked[me] || Some(dial.connection) == connection);
        let remote = state.sides[1 - me];
        let why = "closed by the peer";
        if let Some(dial) = &dial
            && dial.asked[1 - me]
            && remote != Some(dial.connection)
        {
            let at = self.after_goodbye(node, peer);
            self.schedule(at, What::DialFailed { plane, node: peer, peer: node, why });
        }
        if let Some(connection) = connection.or(dial.map(|dial| dial.connection)) {
            let at = self.after_goodbye(node, peer);
            self.schedule(at, What::Break { plane, node: peer, peer: node, connection, why });
        }
        match connection {
            Some(connection) => self.end_side(plane, node, peer, connection, SeverReason::Asked),
            None => self.report_end(plane, node, peer, SeverReason::Asked),
        }
    }

    /// One side's connection is over, if it is still that one.
    fn end_side(&mut self, plane: Plane, node: NodeId, peer: NodeId, connection: u64, reason: SeverReason) {
        let me = side_of(node, peer);
        let state = self.plane(plane, node, peer);
        if state.sides[me] != Some(connection) {
            return;
        }
        state.sides[me] = None;
        state.lanes[me] = Default::default();
        if plane == Plane::Data {
            let flights: Vec<u64> = self
                .writes
                .iter()
                .filter(|(_, f)| f.from == node && f.to == peer && f.open)
                .map(|(id, _)| *id)
                .collect();
            for id in flights {
                self.give_up(id, Some(FailReason::Severed));
            }
        }
        self.report_end(plane, node, peer, reason);
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Arrive(travel) => self.arrive(travel),
            What::Break { plane, node, peer, connection, why } => {
                self.end_side(plane, node, peer, connection, SeverReason::Lost(why.into()));
            }
            What::DialTimeout { plane, pair: (a, b), connection } => {
                let state = self.plane(plane, a, b);
                let Some(dial) = state.dial.take_if(|dial| dial.connection == connection) else {
                    return;
                };
                for (node, peer) in [(a, b), (b, a)] {
                    let accepted = self.plane(plane, a, b).sides[side_of(node, peer)] == Some(connection);
                    if accepted {
                        self.end_side(plane, node, peer, connection, SeverReason::Lost("no answer".into()));
                    } else if dial.asked[side_of(node, peer)] {
                        self.report_end(plane, node, peer, SeverReason::Unreachable("no answer".into()));
                    }
                }
            }
            What::DialFailed { plane, node, peer, why } => {
                let state = self.plane(plane, node, peer);
                if state.sides[side_of(node, peer)].is_none() && state.dial.is_none() {
                    self.report_end(plane, node, peer, SeverReason::Unreachable(why.into()));
                }
            }
            What::PartitionNoticed { pair: (a, b), partition } => {
                if self.pair(a, b).partition != Some(partition) {
                    return;
                }
                for plane in [Plane::Data, Plane::Control] {
                    for connection in self.plane(plane, a, b).sides.into_iter().flatten() {
                        for (node, peer) in [(a, b), (b, a)] {
                            let reason = SeverReason::Lost("the peer is silent".into());
                            self.end_side(plane, node, peer, connection, reason);
                        }
                    }
                }
                // Everything held belongs to connections that are over now.
                for travel in std::mem::take(&mut self.pair(a, b).held) {
                    self.discard(&travel);
                }
            }
        }
    }

    fn arrive(&mut self, travel: Travel) {
        let (from, to) = (travel.from, travel.to);
        let stalled = |node| self.nodes.get(&node).map_or(Time(0), |n: &Node| n.stalled_until);
        let clear_at = stalled(from).max(stalled(to));
        if clear_at > self.now {
            return self.schedule(clear_at, What::Arrive(travel));
        }
        if self.pair(from, to).partition.is_some() {
            return self.pair(from, to).held.push(travel);
        }
        let full = |node: &Node| node.events.len() >= self.config.event_limit;
        if matches!(travel.cargo, Cargo::Piece { .. }) && self.nodes.get(&to).is_some_and(full) {
            return self.schedule(self.now.after_us(UNTIL_POLLED_US), What::Arrive(travel));
        }
        if !self.alive(to) {
            return self.discard(&travel);
        }
        let (plane, me, connection) = (travel.cargo.plane(), side_of(to, from), travel.connection);
        if let Cargo::Dial(_) = travel.cargo {
            return self.arrive_dial(plane, travel);
        }
        // Whatever comes on a connection that was dialled from here says that it was accepted.
        let state = self.plane(plane, from, to);
        if state.dial.take_if(|dial| dial.connection == connection && dial.asked[me]).is_some() {
            state.sides[me] = Some(connection);
            self.report_begin(plane, to, from);
        }
        if self.plane(plane, from, to).sides[me] != Some(connection) {
            return self.discard(&travel);
        }
        match travel.cargo {
            Cargo::Dial(_) | Cargo::Accept(_) => {}
            Cargo::Frame(lane) => {
                let lane_state = &mut self.plane(plane, from, to).lanes[1 - me][lane as usize];
                if let Some(bytes) = lane_state.frames.pop_front() {
                    self.report_control(to, ControlEvent::Frame { peer: from, lane, bytes });
                }
            }
            Cargo::Piece { write, start, len, sent } => self.arrive_piece(write, start, len, sent),
            Cargo::Report { write, landed } => {
                if landed {
                    let Some(flight) = self.writes.get_mut(&write).filter(|f| f.open) else {
                        return;
                    };
                    let event = Event::Sent { peer: flight.to, ticket: flight.ticket };
                    self.writes.remove(&write);
                    self.pair(from, to).writes[me] -= 1;
                    self.report_data(to, event);
                } else if self.writes.get(&write).is_some_and(|f| f.open) {
                    self.give_up(write, Some(FailReason::Refused));
                }
            }
        }
    }

    fn arrive_dial(&mut self, plane: Plane, travel: Travel) {
        let Travel { from, to, connection, .. } = travel;
        let me = side_of(to, from);
        let state = self.plane(plane, from, to);
        if state.dial.as_ref().is_none_or(|dial| dial.connection != connection) {
            return;
        }
        if let Some(old) = state.sides[me] {
            self.end_side(plane, to, from, old, SeverReason::Lost("the peer connected anew".into()));
        }
        let state = self.plane(plane, from, to);
        state.sides[me] = Some(connection);
        if let Some(dial) = &mut state.dial {
            dial.asked[me] = false;
        }
        self.report_begin(plane, to, from);
        let at = self.after_latency();
        let accept = Travel { from: to, to: from, connection, cargo: Cargo::Accept(plane) };
        self.schedule(at, What::Arrive(accept));
    }

    fn arrive_piece(&mut self, write: u64, start: usize, len: usize, sent: Time) {
        let Some(flight) = self.writes.get_mut(&write) else {
            return;
        };
        flight.pieces -= 1;
        let (from, to, connection) = (flight.from, flight.to, flight.connection);
        let (last, immediate, total) = (flight.pieces == 0, flight.immediate, flight.len as u64);
        let Some(receiver) = self.nodes.get_mut(&to) else {
            return;
        };
        let landing = receiver.windows.find(from, &flight.window, flight.offset, total);
        let mut landed = !flight.refused;
        let source = match &flight.source {
            Source::Lent(lent) => lent.as_ref(),
            Source::OnTheWire { bytes, until } if sent <= *until => bytes,
            Source::OnTheWire { .. } => {
                // Never sent: the write can only be incomplete.
                flight.refused = true;
                landed = false;
                &[]
            }
        };
        if landed {
            // Copied aside first: a simulated node may well land in the region that another one sends from.
            self.piece.clear();
            self.piece.extend_from_slice(&source[start..start + len]);
            if len > 0 && self.rng.chance(self.config.corrupt) {
                self.piece[0] ^= 1;
            }
            let at = flight.offset + start as u64;
            landed = landing.as_ref().is_some_and(|landing| landing.land(at, &self.piece));
        }
        let refused_now = !landed && !flight.refused;
        flight.refused |= !landed;
        let (open, complete) = (flight.open, last && !flight.refused);
        if last && !open {
            self.writes.remove(&write);
        }
        let mut acknowledge = refused_now.then_some(false);
        if complete && let Some(landing) = landing {
            let key = landing.key();
            let reported = landing.complete(|| receiver.events.push_landed(from, immediate, total, key));
            acknowledge = Some(reported);
            self.to_wake.extend(receiver.waker.clone());
        }
        if let Some(landed) = acknowledge {
            let cargo = Cargo::Report { write, landed };
            let at = self.data_arrival(to, from, &cargo);
            self.schedule(at, What::Arrive(Travel { from: to, to: from, connection, cargo }));
        }
    }

    /// It reached nobody.
    fn discard(&mut self, travel: &Travel) {
        let Cargo::Piece { write, .. } = travel.cargo else {
            return;
        };
        let Some(flight) = self.writes.get_mut(&write) else {
            return;
        };
        flight.pieces -= 1;
        flight.refused = true;
        if flight.pieces == 0 && !flight.open {
            self.writes.remove(&write);
        }
    }
}
