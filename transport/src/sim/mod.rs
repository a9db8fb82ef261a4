//! A simulated network: every node in one thread, time that is told, chance that is seeded.
//!
//! [`SimNetwork`] carries both planes. [`SimNetwork::transport`] gives each node its data plane, a
//! [`Transport`](crate::Transport) like any other; [`SimNetwork::send`] and [`SimNetwork::poll_control`] are
//! the control channel. Nothing happens but in [`SimNetwork::advance`] and in the calls of the nodes, and
//! what happens depends on the seed, the configuration and those calls alone.
//!
//! Faults are those of QUIC over real links: bytes and frames are late, overtake one another (frames only
//! between lanes), or their connection breaks; they are never lost on a connection that lives. Data is
//! copied from the source when each piece arrives, so a source that changes too early, or a landing that is
//! read too early, shows as wrong bytes.

mod network;
mod state;
mod transport;

pub use network::SimNetwork;
pub use transport::SimTransport;

use crate::net::lane::Path;
use std::ops::RangeInclusive;

/// How the network behaves. The default is a healthy network with some jitter.
#[derive(Clone, PartialEq, Debug)]
pub struct SimConfig {
    /// Time on the way, drawn anew for each piece of a write and each frame.
    pub latency_us: RangeInclusive<u64>,
    /// What a link carries in each direction, in bytes per microsecond (1,000 is 1 GB/s).
    pub bandwidth_bytes_per_us: u64,
    /// A write travels in pieces of up to this many bytes, and in at least two if it can.
    pub piece_bytes: usize,
    /// Whether pieces of a direction may overtake one another.
    pub reorder: bool,
    /// How likely a piece or frame is lost once, and so arrives `retransmit_us` later.
    pub loss: f64,
    /// What a loss costs.
    pub retransmit_us: u64,
    /// How likely a write or frame stalls its sender's links.
    pub stall: f64,
    /// How long such a stall takes.
    pub stall_us: RangeInclusive<u64>,
    /// How likely a write or frame breaks the connection it travels on.
    pub break_connection: f64,
    /// How likely a piece lands with one bit flipped. QUIC never does this; memory may.
    pub corrupt: f64,
    /// How long until a dead or unreachable peer is noticed.
    pub detect_us: RangeInclusive<u64>,
    /// Unreported writes to one peer, at most.
    pub write_limit: usize,
    /// Events of the data plane that a node has not polled, at most: when there are more, bytes are kept waiting.
    pub event_limit: usize,
    /// Undelivered frames on one lane to one peer, at most.
    pub frame_limit: usize,
    /// The longest frame, in bytes.
    pub frame_bytes: usize,
    /// Which way writes are said to go: a node may choose by it when it writes.
    pub path: Option<Path>,
}

impl Default for SimConfig {
    fn default() -> Self {
        SimConfig {
            latency_us: 20..=200,
            bandwidth_bytes_per_us: 2_000,
            piece_bytes: 64 << 10,
            reorder: true,
            loss: 0.0,
            retransmit_us: 5_000,
            stall: 0.0,
            stall_us: 1_000..=100_000,
            break_connection: 0.0,
            corrupt: 0.0,
            // As the real channels: silence is death after 900 ms.
            detect_us: 450_000..=900_000,
            write_limit: 256,
            event_limit: 65_536,
            frame_limit: 1024,
            frame_bytes: tandem_proto::wire::MAX_FRAME_BYTES,
            path: None,
        }
    }
}
