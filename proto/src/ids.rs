//! Ids and units. Each is a type of its own, so that a page is never taken for a slot.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

id! {
    /// A token of the model's vocabulary.
    TokenId(u32)
}
id! {
    /// A transformer layer, from 0.
    LayerIdx(u32)
}
id! {
    /// A page of the engine's paged KV: `page_tokens` tokens of every layer.
    PageId(u32)
}
id! {
    /// A chunk's position in its prompt, from 0.
    ChunkIdx(u32)
}
id! {
    /// A landing slot on a decode node: room for one packed chunk.
    SlotId(u32)
}
id! {
    /// Counts the leases of one slot. A write that carries another epoch than the slot's is stale.
    SlotEpoch(u32)
}
id! {
    /// One of the `n` completions of a request, from 0.
    ChoiceIdx(u32)
}

/// One incarnation of a process: a hash of its certificate's key and of a number that it draws when it starts. So a
/// restarted node is a new node, nothing addressed to the old one can reach it, and nobody without the key can take it. Its name, for people, is in [`crate::wire::Hello`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

/// A request, drawn at random by the router.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub u128);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node-{self}")
    }
}
impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}
impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "req-{self}")
    }
}

/// A moment on the caller's own monotonic clock, in microseconds. Never sent to another machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// The moment `us` microseconds later.
    #[must_use]
    pub fn after_us(self, us: u64) -> Time {
        Time(self.0.saturating_add(us))
    }

    /// Microseconds since `earlier`, 0 if it lies ahead.
    #[must_use]
    pub fn since_us(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
