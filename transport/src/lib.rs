//! What moves bytes between the nodes of a cluster.
//!
//! - [`Transport`] moves KV: straight from memory here into memory that the peer opened for it. Its contract
//!   is written at the trait, and every backend passes the same test of it (`tests/contract`).
//! - [`NetTransport`] is the one of real machines. It takes the best [`Path`] that two nodes have: shared memory
//!   on one host, TLS over TCP where the network lets it through, QUIC between any two.
//! - [`control`] carries messages, as frames of bytes.
//! - [`Identity`] says who belongs to the cluster: nobody else is talked to, on either plane.
//! - [`sim`] is the backend of tests: one thread, simulated time, every fault, the same for a seed always.
//!
//! It never decides what is sent where, never looks into the bytes, and never waits for the node loop.
//! Unsafe code is confined to the places where leased memory becomes a slice, and shared memory an atomic.
#![deny(unsafe_code)]

mod congestion;
pub mod control;
mod endpoint;
mod events;
mod handshake;
mod identity;
mod lent;
mod net;
mod quic;
#[cfg(feature = "rdma")]
mod rdma;
mod rng;
mod shm;
pub mod sim;
mod tls;
mod transport;
mod window;

pub use congestion::Congestion;
#[doc(hidden)]
pub use endpoint::bare_endpoint;
pub use endpoint::{BindError, Tuning};
pub use identity::{Identity, IdentityError};
pub use net::counters::{PathMetrics, PeerStatus, WRITE_TIME_BOUNDS_US, WriteTimes};
pub use net::lane::Path;
pub use net::{NetConfig, NetMetrics, NetObserver, NetTransport};
pub use tandem_proto::wire::Window;
pub use transport::{
    Event, FailReason, RegionId, SeverReason, SubmitError, Transport, TransportError, Write,
};

/// Gives bytes to every decoder of what peers send, for fuzzing: none may panic, or take memory that did not
/// come in.
#[doc(hidden)]
pub fn decode_anything(bytes: &[u8]) {
    handshake::Hello::fuzz(bytes);
    handshake::Offers::fuzz(bytes);
    handshake::Choice::fuzz(bytes);
    net::fuzz(bytes);
    shm::fuzz(bytes);
    tls::fuzz(bytes);
    #[cfg(feature = "rdma")]
    rdma::fuzz(bytes);
    for cut in [1, 7, bytes.len().max(1)] {
        let mut decoder = control::frame::Decoder::new(1 << 16);
        for piece in bytes.chunks(cut) {
            decoder.push(piece);
            while let Ok(Some(frame)) = decoder.pop() {
                assert!(frame.len() <= bytes.len());
            }
        }
    }
}
