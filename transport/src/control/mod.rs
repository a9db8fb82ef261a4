//! The control channel: frames of bytes between the processes of a cluster, over QUIC with mutual TLS.
//!
//! [`Control`] keeps one connection to each peer, dialled by either side, with two [`Lane`]s of their own
//! streams. Sending never blocks: queues are bounded, and say so when they are full. A peer that is killed is
//! `Down` within [`Tuning::dead_after`](crate::Tuning).

mod channel;
pub mod frame;

#[cfg(test)]
pub(crate) use channel::STREAMS;
pub use channel::{ConnectError, Control, ControlEvents, ControlMetrics, Limits};

use std::net::SocketAddr;
use tandem_proto::ids::NodeId;

/// Which of a connection's two streams a frame takes. Order holds within a lane, never between lanes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Lane {
    /// Ordinary messages.
    Main,
    /// Cancels and heartbeats: never stuck behind ordinary messages.
    Urgent,
}

impl Lane {
    /// Both, in a fixed order.
    pub const ALL: [Lane; 2] = [Lane::Main, Lane::Urgent];
}

/// What the control channel reports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ControlEvent {
    /// The peer can be sent frames.
    Up {
        /// Which peer.
        peer: NodeId,
        /// Where it is.
        addr: SocketAddr,
    },
    /// A frame came in.
    Frame {
        /// Who sent it.
        peer: NodeId,
        /// Which lane it came on.
        lane: Lane,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// The connection is over. Frames that were sent and not yet handled by the peer may be lost.
    Down {
        /// Which peer.
        peer: NodeId,
        /// Why.
        reason: String,
    },
}

/// Why a frame was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// There is no connection.
    #[error("{peer} is not connected")]
    NotConnected {
        /// Which peer.
        peer: NodeId,
    },
    /// The lane's queue is full: the peer takes frames more slowly than they are made.
    #[error("{limit} frames wait for {peer}: slow down or close it")]
    Backlogged {
        /// Which peer.
        peer: NodeId,
        /// The limit.
        limit: usize,
    },
    /// The frame is longer than any may be.
    #[error("frame of {len} bytes is longer than {limit}")]
    Oversize {
        /// The frame's length.
        len: usize,
        /// The limit.
        limit: usize,
    },
}
