//! Memory that several parties touch: regions, and extents of them.
//!
//! A [`HostRegion`] is page-aligned anonymous memory that outlives every party holding it. An [`Extent`] is
//! a range of one. Who may write an extent at a given time is decided by the lease protocol in
//! `tandem-proto`, not by the borrow checker, because the writer may be another machine: so turning an
//! extent into a slice is `unsafe`, and each caller says which lease makes it sound.
//!
//! This crate never decides who owns what, and never frees memory that a handle still names.

mod region;

pub use region::{Extent, HostRegion, RegionError};
