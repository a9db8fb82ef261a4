//! Who owns which KV. Today: the pages of one node's pool, and which of them hold chunks that can be reused.
//!
//! It decides, and touches no KV bytes: storage is in `tandem-kernels`, arithmetic in `tandem-engine`.
//!
//! - [`PagePool`]: counts the holders of every page, and keeps finished chunks until their room is needed.
#![deny(unsafe_code)]

mod pages;
pub mod tier;

pub use pages::{PagePool, PoolStats};
