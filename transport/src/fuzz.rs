//! Every decoder of what peers send, for fuzzing: none may panic, or take memory that did not come in.

use crate::handshake::{Choice, Hello, Offers};
use crate::{nccl, net, shm, tls};

/// Decoders that belong together.
pub struct Decoders {
    /// As the fuzz target is called.
    pub name: &'static str,
    /// Gives bytes to each, and panics when one breaks a rule.
    pub decode: fn(&[u8]),
    /// Messages that are right, to be damaged.
    pub samples: fn() -> Vec<Vec<u8>>,
}

/// All but those of the control channel's frames, which are public.
pub const DECODERS: &[Decoders] = &[
    Decoders {
        name: "handshake",
        decode: |bytes| {
            Hello::fuzz(bytes);
            Offers::fuzz(bytes);
            Choice::fuzz(bytes);
        },
        samples: || vec![Hello::sample(), Offers::sample()],
    },
    Decoders { name: "writes", decode: net::header::fuzz, samples: net::header::samples },
    Decoders { name: "shm", decode: shm::fuzz, samples: shm::samples },
    Decoders { name: "tls", decode: tls::fuzz, samples: tls::samples },
    Decoders { name: "nccl", decode: nccl::fuzz, samples: nccl::samples },
    #[cfg(feature = "rdma")]
    Decoders { name: "rdma", decode: crate::rdma::fuzz, samples: crate::rdma::samples },
];
