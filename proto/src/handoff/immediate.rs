use crate::ids::{LayerIdx, SlotEpoch, SlotId};
use crate::layout::MAX_LAYERS;

/// The most landing slots of a node: a slot travels in fourteen bits.
pub const MAX_SLOTS: u32 = 1 << 14;

const LAYER_BITS: u32 = 10;
const EPOCH_BITS: u32 = 8;

/// What the 32 bits that arrive with a write say: which layer of which lease has landed.
///
/// The epoch's low eight bits are enough to tell a late arrival of an earlier lease: it would take 256 leases
/// of one slot while one completion waits in a queue that is emptied before every message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Immediate {
    /// The slot that was written.
    pub slot: SlotId,
    /// The layer.
    pub layer: LayerIdx,
    /// Low bits of the lease's epoch.
    pub epoch: u8,
}

impl Immediate {
    /// For a write of `layer` under the lease (`slot`, `epoch`).
    #[must_use]
    pub fn new(slot: SlotId, layer: LayerIdx, epoch: SlotEpoch) -> Immediate {
        debug_assert!(slot.0 < MAX_SLOTS && layer.0 < MAX_LAYERS);
        Immediate { slot, layer, epoch: epoch.0 as u8 }
    }

    /// As it travels.
    #[must_use]
    pub fn to_bits(self) -> u32 {
        self.slot.0 << (LAYER_BITS + EPOCH_BITS) | self.layer.0 << EPOCH_BITS | u32::from(self.epoch)
    }

    /// As it arrived.
    #[must_use]
    pub fn from_bits(bits: u32) -> Immediate {
        Immediate {
            slot: SlotId(bits >> (LAYER_BITS + EPOCH_BITS)),
            layer: LayerIdx((bits >> EPOCH_BITS) & (MAX_LAYERS - 1)),
            epoch: bits as u8,
        }
    }

    /// Whether it belongs to the lease with `epoch`.
    #[must_use]
    pub fn is_of(self, epoch: SlotEpoch) -> bool {
        self.epoch == epoch.0 as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_pattern_round_trips() {
        for bits in [0, 1, u32::MAX, 0x1234_5678, 0xff, 0x3_ff00, 0xfffc_0000] {
            assert_eq!(Immediate::from_bits(bits).to_bits(), bits);
        }
        let immediate = Immediate::new(SlotId(9), LayerIdx(31), SlotEpoch(0x1_02));
        assert_eq!(Immediate::from_bits(immediate.to_bits()), immediate);
        assert!(immediate.is_of(SlotEpoch(2)) && !immediate.is_of(SlotEpoch(3)));
    }
}
