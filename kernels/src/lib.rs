//! The arithmetic of Tandem, and the only code that knows both shapes of KV.
//!
//! - [`KvPages`]: the paged KV that a node owns. [`Kernels`]: pack pages into a chunk's contiguous extent
//!   and scatter them back, with the checksum that travels beside it; [`contract`] is what every
//!   implementation passes. [`PagedLayout`]: the same for pages that other engines laid out.
//! - `cuda`, with the feature of that name: pack, scatter, and both in one, on NVIDIA GPUs.
//! - [`cpu`]: matrix products, attention over pages, norms, RoPE and the gated MLP for the CPU.
//!
//! Every number that [`cpu`] computes comes from a reduction whose order depends on its own row and on
//! absolute positions alone. Batch size, chunking, threads and the instruction set change no bit of it.
//!
//! Nothing here allocates or frees a page, and nothing waits for anything but its own threads.

mod checksum;
pub mod contract;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod layout;
mod pack;
mod pages;

pub use checksum::checksum;
pub use layout::{Order, PagedLayout, Stored};
pub use pack::{Converted, CpuKernels, Kernels, PackError, Ticket, pack_layer, scatter_layer};
pub use pages::{KvPages, Paged, PagesError};
