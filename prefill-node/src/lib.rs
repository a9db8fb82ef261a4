//! The prefill node: computes prompts, and pushes each layer's KV to its decode node as soon as it is computed.
//!
//! - [`Node`]: the loop that admits prompts, computes steps and gives pages back.
//! - [`Outbound`]: packs layers into staging, writes them into the decode node's landing slots, and speaks
//!   with the router and the decode nodes. It goes on between the layers of a step.
//!
//! - [`Cache`]: what it shares with a store of packed chunks, in host memory and slower tiers.
//!
//! It keeps no KV longer than a handoff takes, but for whole chunks that a later prompt may begin with.
#![deny(unsafe_code)]

mod cache;
mod node;
mod outbound;
mod prompt;

pub use cache::{Cache, CacheLimits};
pub use node::{Limits, Node};
pub use outbound::Outbound;
