//! splitmix64: a seed means the same numbers for ever. For simulated chance and for window keys, which keep
//! apart what is mistaken, not what is hostile.

use std::ops::RangeInclusive;

pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Even enough for traffic: the bias of a 64-bit modulus is nothing against a simulated latency.
    pub(crate) fn within(&mut self, range: &RangeInclusive<u64>) -> u64 {
        let (low, high) = (*range.start(), *range.end());
        match high.saturating_sub(low).checked_add(1) {
            Some(span) => low + self.next() % span,
            None => self.next(),
        }
    }

    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        // Drawn also when the probability is zero, so that one knob does not shift what the others draw.
        let draw = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        draw < probability
    }
}
