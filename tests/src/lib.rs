//! Whole-system tests.
//!
//! - [`simulation`]: the real node loops over a simulated network, with a model whose every token proves that
//!   the KV before it is right. Used by `tests/simulation.rs` and `tests/breaks.rs`.
//! - [`processes`]: the real binaries, on loopback or on two hosts.
//! - [`one_process`]: what they must answer.
#![deny(unsafe_code)]

pub mod one_process;
pub mod processes;
pub mod simulation;
