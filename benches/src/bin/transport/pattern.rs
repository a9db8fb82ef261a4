//! The bytes that are moved, and whether they came.

use anyhow::ensure;
use std::ops::Range;
use tandem_memory::HostRegion;

/// Where writes of one sample lie, in both processes alike.
#[derive(Clone, Copy)]
pub(crate) struct Slots {
    pub(crate) size: usize,
    pub(crate) count: usize,
    pub(crate) seed: u64,
}

impl Slots {
    pub(crate) fn new(size: usize, under_way: usize, connections: usize, seed: u64) -> anyhow::Result<Slots> {
        ensure!(size >= 8 && size.is_multiple_of(8) && 2 * size <= crate::REGION, "writes of {size} bytes");
        // Two for each write under way, where the region has room: none is written while it is read.
        let depth = (under_way / size).clamp(*crate::DEPTHS.start(), *crate::DEPTHS.end()) * connections;
        Ok(Slots { size, count: (crate::REGION / size).min(2 * depth), seed })
    }

    /// Writes under way at once.
    pub(crate) fn depth(self) -> usize {
        self.count / 2
    }

    /// The place of a write.
    pub(crate) fn range(self, write: u64) -> Range<usize> {
        let start = (write % self.count as u64) as usize * self.size;
        start..start + self.size
    }

    pub(crate) fn fill(self, region: &HostRegion) {
        for (index, word) in words(region, self.count * self.size).iter_mut().enumerate() {
            *word = value(self.seed, index);
        }
    }
}

pub(crate) fn verify(region: &HostRegion, slots: Slots) -> anyhow::Result<()> {
    for (index, word) in words(region, slots.count * slots.size).iter().enumerate() {
        ensure!(*word == value(slots.seed, index), "wrong bytes at {}", index * 8);
    }
    Ok(())
}

fn value(seed: u64, index: usize) -> u64 {
    (seed.wrapping_mul(0xd134_2543_de82_ef95) ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[allow(clippy::mut_from_ref)] // Being alone with the region at the time makes it exclusive.
fn words(region: &HostRegion, len: usize) -> &mut [u64] {
    assert!(len <= region.len());
    // SAFETY: in bounds and aligned, as regions begin on a page; nothing is under way between samples, and
    // this program has one thread that fills and verifies.
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
    // SAFETY: in bounds; a sender has fewer writes under way than there are slots, so no place has two writers.
    unsafe { std::slice::from_raw_parts_mut(region.base().add(range.start), range.len()) }
}

pub(crate) fn copy(from: &HostRegion, to: &HostRegion, range: Range<usize>) {
    bytes_mut(to, range.clone()).copy_from_slice(bytes(from, range));
}
