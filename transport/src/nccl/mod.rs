//! The NCCL lane, between GPUs of two hosts: NCCL's send and receive, over whatever it finds between them.
//!
//! A communicator has two ranks and no tags: what one sends next is what the other receives next. So a lane has
//! one for each direction, and what goes through it is one stream of writes, one after the other, cut into
//! *parcels* ([`order`]). The writer stages a parcel in memory of its own, hands it to NCCL and announces it
//! over a TLS connection ([`message`]), with the headers of the writes that begin in it; the reader receives it
//! into memory of its own, and then copies it through its windows. Windows and sources are never NCCL's: so
//! closing a window, or taking a source back, waits for a copy within one GPU and never for the peer, refused
//! bytes have a place to go, and a communicator can be aborted at any time ([`lane`]).
//!
//! NCCL does not encrypt, and asks nobody who they are. [`Offer::net`] says where it is used all the same.

#[cfg(feature = "cuda")]
mod join;
#[cfg(feature = "cuda")]
mod lane;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)] // Every call of NCCL.
mod library;
mod message;
mod offer;
#[cfg(feature = "cuda")]
mod order;

#[cfg(feature = "cuda")]
pub(crate) use join::{Here, admit, dial};
#[cfg(feature = "cuda")]
pub(crate) use library::until_ended;
pub(crate) use message::{fuzz, samples};
pub(crate) use offer::Offer;

#[cfg(feature = "cuda")]
use std::time::Duration;

/// Why there is no NCCL lane, or no more.
#[cfg(feature = "cuda")]
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the peer offers none")]
    NotOffered,
    #[error("this node has no memory on a GPU, or no NCCL")]
    NotHere,
    #[error("NCCL was not found: install libnccl.so.2, or name its folder in LD_LIBRARY_PATH ({0})")]
    NotFound(String),
    #[error("NCCL {0} is too old: 2.18 or newer is needed")]
    TooOld(u32),
    #[error("the peer has NCCL {theirs}, this node {ours}: it understands its own version only")]
    OtherVersion { ours: u32, theirs: u32 },
    #[error("both are on one GPU, where NCCL has room for one")]
    SameGpu,
    #[error(
        "its bytes are not encrypted: between hosts without RDMA on both it must be asked for by name, on both"
    )]
    NotTrusted,
    #[error("it did not come about {0} times: not tried again before this process is restarted")]
    Fruitless(u32),
    #[error("NCCL cannot {what}: {why}")]
    Refused { what: &'static str, why: String },
    #[error("gave up waiting for NCCL to {0}")]
    TooLong(&'static str),
    #[error("NCCL did not carry a parcel within {0:?}")]
    Stalled(Duration),
    #[error("the peer broke a rule: {0}")]
    Rule(&'static str),
    #[error("it was closed")]
    Closed,
    #[error("the session was over before it was made")]
    Gone,
    #[error("{0}")]
    Channel(#[from] crate::tls::TlsError),
    #[error("{0}")]
    Gpu(#[from] tandem_memory::cuda::CudaError),
    #[error("{0}")]
    System(#[from] std::io::Error),
}

#[cfg(feature = "cuda")]
impl Error {
    /// Whether there may be a lane later in the same session.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Error::Channel(error) => error.may_pass(),
            Error::Refused { .. } | Error::TooLong(_) | Error::Stalled(_) => true,
            Error::Gone | Error::Gpu(_) | Error::System(_) => true,
            _ => false,
        }
    }
}
