//! Memory of NVIDIA GPUs. NVIDIA's driver is opened when it is first asked for: without one, everything here is
//! refused with [`CudaError::NoDriver`], and nothing else happens.

mod copies;
mod device;
mod gather;
mod pinned;
mod region;
mod twin;

pub use copies::{Copies, Mark};
pub use device::Device;
pub(crate) use pinned::Mapped;
pub use pinned::PinnedRegion;
pub use region::{DeviceExtent, DeviceRegion, IpcHandle};
pub(crate) use twin::Twin;

use crate::RegionError;
use cudarc::driver::DriverError;

/// Why a GPU, or its memory, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The system has no libcuda.
    #[error("no GPU can be used: NVIDIA's driver (libcuda) was not found; install it, or use the CPU")]
    NoDriver,
    /// There is no such GPU.
    #[error("GPU {ordinal} does not exist: this system shows {count}")]
    NoDevice {
        /// Which was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU, the driver or the kernel cannot export memory as a dma-buf.
    #[error("{device} exports no dma-buf: {why}")]
    NoDmaBuf {
        /// The GPU.
        device: String,
        /// What is missing.
        why: &'static str,
    },
    /// A NIC's driver cannot find the GPU's memory by its address.
    #[error("{device} is not reached by nvidia-peermem: {why}")]
    NoPeermem {
        /// The GPU.
        device: String,
        /// What is missing.
        why: &'static str,
    },
    /// A NIC may not write the GPU's memory.
    #[error("{device} does not tell when it sees what a NIC has written to its memory")]
    NoRemoteWrites {
        /// The GPU.
        device: String,
    },
    /// Another process's GPU cannot be read by this one.
    #[error("{device} does not reach the peer's GPU: {why}")]
    OutOfReach {
        /// The GPU.
        device: String,
        /// What is missing.
        why: String,
    },
    /// The range leaves its memory.
    #[error(transparent)]
    Bounds(#[from] RegionError),
    /// NVIDIA's driver refused.
    #[error("{device} cannot {what}: {source}")]
    Driver {
        /// The GPU.
        device: String,
        /// What it was asked to do.
        what: String,
        /// What it said.
        #[source]
        source: DriverError,
    },
}
