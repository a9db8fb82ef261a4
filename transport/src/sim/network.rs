//! The network as tests see it: nodes, time and faults.

use super::state::{Plane, State};
use super::{SimConfig, SimTransport};
use crate::control::{ControlEvent, Lane, SendError};
use crate::net::lane::Path;
use crate::transport::{Event, Held, SubmitError, Write};
use crate::window::Windows;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use tandem_proto::ids::{NodeId, Time};

/// A handle on the simulated network. Clones are the same network.
#[derive(Clone)]
pub struct SimNetwork {
    state: Arc<Mutex<State>>,
}

impl SimNetwork {
    /// An empty network at time 0.
    #[must_use]
    pub fn new(seed: u64, config: SimConfig) -> SimNetwork {
        SimNetwork { state: Arc::new(Mutex::new(State::new(seed, config))) }
    }

    /// Adds a node, and gives it its data plane. A restarted node is a new node, with a new id.
    ///
    /// # Panics
    /// When the id was used before.
    #[must_use]
    pub fn transport(&self, node: NodeId) -> SimTransport {
        let windows = Arc::new(Windows::default());
        let added = self.with(|state| state.add(node, Arc::clone(&windows)));
        assert!(added, "{node} is in the network already: a restarted node has a new id");
        SimTransport::new(self.clone(), node, windows)
    }

    /// Where a node seems to be, for those who want an address.
    #[must_use]
    pub fn address(node: NodeId) -> SocketAddr {
        SocketAddr::from((Ipv6Addr::from((0xfd00 << 112) | u128::from(node.0)), 1))
    }

    /// The simulated time.
    #[must_use]
    pub fn now(&self) -> Time {
        self.with(|state| state.now())
    }

    /// When something happens next, if nobody does anything before.
    #[must_use]
    pub fn next_at(&self) -> Option<Time> {
        self.with(|state| state.next_at())
    }

    /// Lets everything happen that is due until `to`, in order. Never goes back.
    pub fn advance(&self, to: Time) {
        self.with(|state| state.advance(to));
    }

    /// Whether a node has events of either plane to poll.
    #[must_use]
    pub fn has_events(&self, node: NodeId) -> bool {
        self.with(|state| state.has_events(node))
    }

    /// What a node holds for its peers: for tests of what is left when they are gone.
    #[doc(hidden)]
    #[must_use]
    pub fn held(&self, node: NodeId) -> Held {
        self.with(|state| state.held(node))
    }

    /// Begins a control connection; `Up` at both or `Down` at the caller follows. Does nothing while there is
    /// one, or one is being made by either side.
    pub fn connect_control(&self, from: NodeId, to: NodeId) {
        self.with(|state| state.connect(Plane::Control, from, to));
    }

    /// Closes a control connection: `Down` at both.
    pub fn close_control(&self, node: NodeId, peer: NodeId) {
        self.with(|state| state.hang_up(Plane::Control, node, peer));
    }

    /// Sends a frame on the control channel.
    ///
    /// # Errors
    /// When there is no connection, the lane's queue is full, or the frame is too long.
    pub fn send(&self, from: NodeId, to: NodeId, lane: Lane, frame: Vec<u8>) -> Result<(), SendError> {
        self.with(|state| state.send(from, to, lane, frame))
    }

    /// Appends what the control channel of a node has to report.
    pub fn poll_control(&self, node: NodeId, events: &mut Vec<ControlEvent>) {
        self.with(|state| state.take_control(node, events));
    }

    /// The node is gone, without a word: its peers notice after a while. What it had put on the wire may
    /// still arrive.
    pub fn crash(&self, node: NodeId) {
        self.with(|state| state.crash(node));
    }

    /// Nothing passes between two nodes. Both notice after a while, unless it is healed first.
    pub fn partition(&self, a: NodeId, b: NodeId) {
        self.with(|state| state.partition(a, b));
    }

    /// Ends a partition: what was held up arrives.
    pub fn heal(&self, a: NodeId, b: NodeId) {
        self.with(|state| state.heal(a, b));
    }

    /// No loss, stall, break or flipped bit by chance from now on.
    pub fn calm(&self) {
        self.with(|state| state.calm());
    }

    /// Holds up everything from and to a node for a while. If that is longer than silence is borne, its
    /// connections break.
    pub fn stall(&self, node: NodeId, us: u64) {
        self.with(|state| state.stall(node, us));
    }

    pub(super) fn path(&self) -> Option<Path> {
        self.with(|state| state.config().path)
    }

    pub(super) fn draw(&self) -> u64 {
        self.with(State::draw)
    }

    pub(super) fn forget_landed(&self, node: NodeId, key: u64) {
        self.with(|state| state.forget_landed(node, key));
    }

    pub(super) fn connect_data(&self, node: NodeId, peer: NodeId) {
        self.with(|state| state.connect(Plane::Data, node, peer));
    }

    pub(super) fn sever(&self, node: NodeId, peer: NodeId) {
        self.with(|state| state.hang_up(Plane::Data, node, peer));
    }

    pub(super) fn submit(&self, node: NodeId, peer: NodeId, write: Write) -> Result<(), SubmitError> {
        self.with(|state| state.submit(node, peer, write))
    }

    pub(super) fn poll_data(&self, node: NodeId, events: &mut Vec<Event>) {
        self.with(|state| state.take_events(node, events));
    }

    pub(super) fn set_waker(&self, node: NodeId, waker: Waker) {
        self.with(|state| state.set_waker(node, waker));
    }

    fn with<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        let (result, to_wake) = {
            let mut state = self.lock();
            let result = act(&mut state);
            (result, state.take_wakers())
        };
        to_wake.into_iter().for_each(Waker::wake);
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere still drops its transports.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
