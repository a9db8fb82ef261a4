//! The handoff of one prompt's KV from a prefill node to a decode node, without I/O.
//!
//! ```text
//! prefill (Sender)                                decode (Receiver)
//!   begin ── Offer ─────────────────────────────────▶ has it an Expect? pages? slots?
//!   ◀───────────────────────────────────── Grant ── a lease (slot, epoch, request) for each chunk there is room for
//!   ready(chunk, layer) + lease ── write, immediate ▶ landed → scatter → digest
//!   every layer of a chunk sent ── ChunkDone ───────▶ count and digests agree → slot is free again
//!   every chunk done, first token known ── Done ────▶ every chunk verified → decode
//!   ◀───────────────────────────────────── Cancel ── at any time
//!   nothing in flight any more ── Fenced ───────────▶ its slots are free again
//! ```
//!
//! Rules that both sides keep:
//! - A slot has one lease at a time, and each lease an epoch of its own. It is freed only after `ChunkDone`
//!   with every layer landed, after `Fenced`, or after the transport severed the peer; and never while one of its layers
//!   is being scattered.
//! - Resources are taken in one order, the prefill node's pages, then the decode node's pages, then slots, and
//!   whoever holds a slot can always fill it: so no two requests wait for each other.
//! - The sender answers every `Cancel` with `Fenced`, for requests it never heard of too.
//! - Every state has a deadline. One that a silent peer could hold open ends in `sever`.
//!
//! Leases live as long as the control connection between the two nodes, whose keep-alives are their
//! heartbeats: when it goes down, `peer_lost` severs the transport and ends them all.

mod immediate;
mod receiver;
mod sender;

pub use immediate::{Immediate, MAX_SLOTS};
pub use receiver::{Receiver, ReceiverAction, ReceiverConfig, ReceiverStats};
pub use sender::{Push, Sender, SenderAction, SenderConfig};
