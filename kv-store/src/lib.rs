//! Who owns which KV: the pages of one node's pool, which of them hold chunks that can be reused, and the chunks that are
//! stored beyond them.
//!
//! It decides, and apart from the disk tier touches no KV bytes: storage is in `tandem-kernels`, arithmetic in
//! `tandem-engine`.
//!
//! - [`PagePool`]: counts the holders of every page, and keeps finished chunks until their room is needed.
//! - [`Store`]: packed chunks in a [`HostPool`], and in slower [`tier`]s behind it.
//! - [`policy`]: what goes when room is needed.
#![deny(unsafe_code)]

mod host;
mod pages;
pub mod policy;
mod store;
pub mod tier;

pub use host::{HostPool, PoolConfig, PoolCounts, Refused, Tenant};
pub use pages::{PagePool, PoolStats};
pub use store::{Coming, Held, Latency, Reserved, Store, StoreConfig, StoreLimits, StoreStats, TierStats};
