//! RDMA verbs as safe types: all foreign calls and all unsafe code of this backend are here.
//!
//! - [`Device`]: an opened device with its protection domain, ports and asynchronous events.
//! - [`Memory`], [`MemoryRegion`] and [`MemoryWindow`]: what a device may touch, and what a peer may write of it.
//! - [`CompletionQueue`] and [`QueuePair`]: work posted and its ends.
//!
//! Each frees itself when dropped, and holds what must outlive it. Nothing here can be made to touch memory
//! that is not registered: posted work names memory by [`Local`], which only a registration hands out, and the
//! device refuses what is not registered any more. Who may read or write registered memory *when* is decided by
//! leases (see `tandem_memory`), not here.
//!
//! libibverbs is opened when the program starts, by `rdma-mummy-sys`; where it is missing, every call says so.
#![allow(unsafe_code)] // The one module of the backend where it is allowed.

mod device;
mod memory;
mod queue;
#[cfg(test)]
pub(in crate::rdma) mod tests;
mod wait;

pub(crate) use device::{AsyncEvent, Device, LinkLayer, Port, names};
pub(crate) use memory::{Local, Memory, MemoryRegion, MemoryWindow, Rights};
#[cfg(test)]
pub(crate) use queue::Withheld;
pub(crate) use queue::{Completion, CompletionQueue, Ended, QueuePair, QueuePairLimits, Remote, Work};
pub(crate) use wait::{Bell, wait_readable};

use std::io;

/// Why verbs cannot be used, or refused something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerbsError {
    /// The library is not there.
    #[error("libibverbs.so.1 cannot be opened: install rdma-core (Debian: libibverbs1, ibverbs-providers)")]
    NoLibrary,
    /// The kernel has no verbs.
    #[error("the kernel has no RDMA: load the NIC's driver and ib_uverbs ({0})")]
    NoKernel(#[source] io::Error),
    /// No device that fits; for some of the reasons a line in the log came before.
    #[error("there is no RDMA device {0}")]
    NoDevice(String),
    /// No device of that name.
    #[error("there is no RDMA device {name:?}: this host has {}", listed(.known))]
    UnknownDevice { name: String, known: Vec<String> },
    /// A device whose GID table leads nowhere, or whose port is down.
    #[error("port {port} of {device} cannot be used: {reason}")]
    Port { device: String, port: u8, reason: String },
    /// Memory of another device (a GPU) cannot be registered.
    #[error("{device} cannot register {len} bytes of dma-buf memory: {source}; {hint}")]
    DmaBuf {
        device: String,
        len: usize,
        #[source]
        source: io::Error,
        hint: &'static str,
    },
    /// Host memory cannot be registered.
    #[error("{device} cannot register {len} bytes: {source}; {hint}")]
    Register {
        device: String,
        len: usize,
        #[source]
        source: io::Error,
        hint: &'static str,
    },
    /// Something else was refused.
    #[error("{device} refused to {what}: {source}")]
    Refused {
        device: String,
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

/// What verbs that answer with an error number said.
fn check(device: &str, what: &'static str, code: i32) -> Result<(), VerbsError> {
    match code {
        0 => Ok(()),
        // Some providers answer -1 and set errno, some the number itself, some its negative.
        -1 => Err(refused(device, what, io::Error::last_os_error())),
        code => Err(refused(device, what, io::Error::from_raw_os_error(code.abs()))),
    }
}

fn refused(device: &str, what: &'static str, source: io::Error) -> VerbsError {
    VerbsError::Refused { device: device.into(), what, source }
}
