//! The bytes that are moved, where they lie, and whether they came.

use crate::end::Memory;
use anyhow::{Context, ensure};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use tandem_memory::HostRegion;

/// Messages under way at once to each peer on each connection.
const DEPTHS: std::ops::RangeInclusive<usize> = 4..=64;

/// Where the messages of one sample lie, in source and landing memory alike.
///
/// The extents of a message are scattered: between two of them lies one of every other message. So whoever joins
/// neighbours finds none.
#[derive(Clone, Copy)]
pub(crate) struct Slots {
    /// Bytes of a message.
    pub(crate) size: usize,
    /// Extents of a message; divides `size`.
    pub(crate) extents: usize,
    /// Messages that have a place.
    pub(crate) count: usize,
    pub(crate) seed: u64,
}

impl Slots {
    /// Two places for each message under way, where a region has room: none is written while it is read.
    pub(crate) fn new(
        size: usize,
        extents: usize,
        under_way: usize,
        connections: usize,
        region: usize,
        seed: u64,
    ) -> Slots {
        let depth = (under_way / size).clamp(*DEPTHS.start(), *DEPTHS.end()) * connections;
        Slots { size, extents, count: (region / size).min(2 * depth), seed }
    }

    /// Messages under way at once to each peer.
    pub(crate) fn depth(self) -> usize {
        (self.count / 2).max(1)
    }

    /// The bytes of source or landing memory in which all messages lie.
    pub(crate) fn footprint(self) -> usize {
        self.count * self.size
    }

    /// The place of one extent of a message.
    pub(crate) fn extent(self, message: u64, extent: usize) -> Range<usize> {
        let len = self.size / self.extents;
        let start = (extent * self.count + (message % self.count as u64) as usize) * len;
        start..start + len
    }

    /// The places of a message's extents.
    pub(crate) fn message(self, message: u64) -> impl Iterator<Item = Range<usize>> {
        (0..self.extents).map(move |extent| self.extent(message, extent))
    }

    pub(crate) fn fill(self, memory: &Memory) -> anyhow::Result<()> {
        for (index, word) in words(&memory.source, self.footprint()).iter_mut().enumerate() {
            *word = value(self.seed, index);
        }
        #[cfg(feature = "cuda")]
        memory.source.extent(0..self.footprint())?.deposit()?;
        Ok(())
    }

    pub(crate) fn verify(self, memory: &Memory) -> anyhow::Result<()> {
        // SAFETY: as in `words`.
        #[cfg(feature = "cuda")]
        unsafe { memory.landing.extent(0..self.footprint())?.fetch() }?;
        for (index, word) in words(&memory.landing, self.footprint()).iter().enumerate() {
            ensure!(*word == value(self.seed, index), "wrong bytes at {}", index * 8);
        }
        Ok(())
    }
}

impl fmt::Display for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.size, self.extents, self.count, self.seed)
    }
}

impl FromStr for Slots {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Slots> {
        let numbers: Vec<u64> = text.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [size, extents, count, seed] =
            <[u64; 4]>::try_from(numbers).ok().context("slots have four numbers")?;
        Ok(Slots { size: size as usize, extents: extents as usize, count: count as usize, seed })
    }
}

fn value(seed: u64, index: usize) -> u64 {
    (seed.wrapping_mul(0xd134_2543_de82_ef95) ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[allow(clippy::mut_from_ref)] // Being alone with the region at the time makes it exclusive.
fn words(region: &HostRegion, len: usize) -> &mut [u64] {
    assert!(len <= region.len());
    // SAFETY: in bounds and aligned, as regions begin on a page; nothing is under way between samples, and
    // a process has one thread that fills and verifies.
    unsafe { std::slice::from_raw_parts_mut(region.base().cast(), len / 8) }
}

/// Bytes of a region.
pub(crate) fn bytes(region: &HostRegion, range: Range<usize>) -> &[u8] {
    assert!(range.start <= range.end && range.end <= region.len());
    // SAFETY: in bounds; sources do not change while a sample runs.
    unsafe { std::slice::from_raw_parts(region.base().add(range.start), range.len()) }
}

/// As [`bytes()`], to write: each place is written by one connection at a time.
#[allow(clippy::mut_from_ref)]
pub(crate) fn bytes_mut(region: &HostRegion, range: Range<usize>) -> &mut [u8] {
    assert!(range.start <= range.end && range.end <= region.len());
    // SAFETY: in bounds; a sender has fewer messages under way than there are slots, or one, so no place has
    // two writers.
    unsafe { std::slice::from_raw_parts_mut(region.base().add(range.start), range.len()) }
}
