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
#[doc(hidden)]
pub mod fuzz;
mod handshake;
#[cfg(test)]
#[allow(unsafe_code)] // Tests look into the memory that they give.
mod hostile;
mod identity;
mod lent;
mod nccl;
mod net;
mod quic;
#[cfg(feature = "rdma")]
mod rdma;
mod rng;
mod shm;
pub mod sim;
mod tls;
mod transport;
mod twin;
mod window;

pub use congestion::Congestion;
#[doc(hidden)]
pub use endpoint::bare_endpoint;
pub use endpoint::{BindError, Tuning};
pub use identity::{Identity, IdentityError};
pub use net::counters::{PathMetrics, PeerStatus, RdmaMemory, WRITE_TIME_BOUNDS_US, WriteTimes};
pub use net::lane::Path;
pub use net::{NetConfig, NetMetrics, NetObserver, NetTransport};
pub use tandem_proto::wire::Window;
#[doc(hidden)]
pub use transport::Held;
pub use transport::{
    Event, FailReason, RegionId, SeverReason, SubmitError, Transport, TransportError, Write,
};
