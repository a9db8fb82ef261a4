//! A plain copy inside one process: what no way between two can beat.

use crate::end::{End, Memory};
use crate::pattern::{Slots, bytes, bytes_mut};

pub(crate) struct Memcpy(pub(crate) Memory);

impl End for Memcpy {
    fn one(&mut self, slots: Slots, _peer: usize, message: u64) -> anyhow::Result<()> {
        for extent in slots.message(message) {
            bytes_mut(&self.0.landing, extent.clone()).copy_from_slice(bytes(&self.0.source, extent));
        }
        Ok(())
    }
}
