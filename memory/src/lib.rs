//! Memory that several parties touch: regions, and extents of them.
//!
//! A [`HostRegion`] is page-aligned memory that outlives every party holding it: of this process alone, or a
//! file in memory that another process of the host maps as a [`ForeignRegion`]. An [`Extent`] is a range of
//! one. Who may write an extent at a given time is decided by the lease protocol in `tandem-proto`, not by
//! the borrow checker, because the writer may be another machine: so turning an extent into a slice is
//! `unsafe`, and each caller says which lease makes it sound.
//!
//! With feature `cuda`, the module `cuda` has the same for GPUs: regions, extents, memory of other processes, and
//! pinned host memory; and a [`HostRegion`] may have a twin there, which holds its true bytes.
//!
//! This crate never decides who owns what, and never frees memory that a handle still names.

#[cfg(feature = "cuda")]
pub mod cuda;
mod file;
mod foreign;
mod region;
mod stream;

pub use foreign::ForeignRegion;
pub use region::{Extent, HostRegion, RegionError};
