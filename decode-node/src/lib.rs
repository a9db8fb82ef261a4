//! The decode node: lets prompts' KV land, verifies it, moves it to its pages, and generates from them.
//!
//! - [`Node`]: the loop that gives pages to prompts and generates, one token a step for every completion.
//! - [`Inbound`]: grants landing slots, scatters what lands, and speaks with the router and the prefill nodes.
//!
//! No completion starts before every byte of its prompt's KV was verified.
#![deny(unsafe_code)]

mod completion;
mod inbound;
mod node;

pub use inbound::Inbound;
pub use node::{Limits, Node};
