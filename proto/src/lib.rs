//! The words and rules of Tandem: ids, KV layout, chunk keys, wire messages and the handoff state machines.
//!
//! Nothing here does I/O, reads a clock, spawns a thread or awaits: time is an argument, bytes come in and
//! go out. The simulator and the real nodes run exactly this code.
//!
//! - [`ids`]: what things are called, as types that do not mix.
//! - [`layout`]: the only place where KV dimensions become bytes.
//! - [`keys`]: chunk keys, the names under which KV is the same everywhere.
//! - [`wire`]: the messages and the only code that knows their bytes. [`stored`]: the header of a stored chunk.
//! - [`handoff`]: sender and receiver state machines of the KV handoff.
#![forbid(unsafe_code)]

pub mod handoff;
pub mod ids;
pub mod keys;
pub mod layout;
pub mod stored;
pub mod wire;
