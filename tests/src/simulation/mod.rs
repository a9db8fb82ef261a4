//! A cluster in one thread: real node loops, simulated network and time, seeded chance.
//!
//! [`run`] plays one seed and returns what it saw; [`Outcome::violations`] lists every rule that was broken:
//! a wrong token, a leaked page, slot, window, staging slot or hold on a stored chunk, a request open after its deadline, a write
//! refused because its slot was freed under it, a healthy peer severed, a request that failed for no reason.
//!
//! [`Break`]s are faults put between the node loops and the network, each of which makes the cluster break one
//! rule of the handoff. They show that the checker can fail.

mod breaks;
mod chance;
mod kernels;
mod model;
mod router;
mod tier;
mod world;

pub use breaks::Break;
pub use world::{Outcome, Weather, run};
