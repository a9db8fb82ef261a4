//! Faults: what happens to a transfer when a process is killed, the link is dropped, the receiver takes nothing, or
//! the write is cancelled half way. [`fault`] says what they are and what must hold; each backend is a
//! [`fault::Stage`], and one line here. Beside them, networks and peers that do not mean well.
//!
//! `TANDEM_FAULTS=200` plays so many of each kind, and `TANDEM_SEED=N` those of a seed: each test prints its own.

mod end;
mod fault;
#[path = "../members/mod.rs"]
mod members;
mod net;
mod network;
#[path = "../members/node.rs"]
mod node;
mod process;
mod relay;
mod sim;
mod tls;

use fault::Fault;

/// Makes a test of each fault on a backend: played so often, if nobody says otherwise.
macro_rules! faults {
    ($backend:ident, $stage:ty, kill $kill:literal, cut $cut:literal, fill $fill:literal, cancel $cancel:literal) => {
        mod $backend {
            use super::*;

            #[test]
            fn a_process_is_killed() {
                fault::play::<$stage>(Fault::Kill, $kill);
            }

            #[test]
            fn the_link_is_dropped_for_two_seconds() {
                fault::play::<$stage>(Fault::Cut, $cut);
            }

            #[test]
            fn the_receiver_takes_nothing() {
                fault::play::<$stage>(Fault::Fill, $fill);
            }

            #[test]
            fn a_write_is_cancelled_half_way() {
                fault::play::<$stage>(Fault::Cancel, $cancel);
            }
        }
    };
}

faults!(over_sim, crate::sim::Simulated, kill 1000, cut 1000, fill 1000, cancel 1000);
faults!(over_shm, crate::net::Shm, kill 12, cut 2, fill 6, cancel 12);
#[cfg(feature = "cuda")]
faults!(over_cuda_ipc, crate::net::CudaIpc, kill 8, cut 2, fill 6, cancel 8);
#[cfg(feature = "cuda")]
faults!(over_nccl, crate::net::Nccl, kill 8, cut 2, fill 6, cancel 8);
faults!(over_tls, crate::net::Tls, kill 12, cut 2, fill 6, cancel 12);
faults!(over_quic, crate::net::Quic, kill 4, cut 2, fill 6, cancel 12);
faults!(over_the_best, crate::net::Best, kill 4, cut 2, fill 6, cancel 12);
