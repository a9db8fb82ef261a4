//! AES-128-GCM on one core, records of 16 KiB, by the library that TLS and QUIC use here: what nothing encrypted can beat
//! on one core.

use crate::end::{End, Memory};
use crate::pattern::{Slots, bytes, bytes_mut};
use anyhow::anyhow;
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// The most content of a TLS record.
const RECORD: usize = 16 << 10;

pub(crate) struct Aes {
    key: LessSafeKey,
    records: u64,
    memory: Memory,
}

impl Aes {
    pub(crate) fn new(memory: Memory) -> anyhow::Result<Aes> {
        // Nobody is to be kept from these bytes.
        let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).map_err(|_| anyhow!("AES-128-GCM takes no key"))?;
        Ok(Aes { key: LessSafeKey::new(key), records: 0, memory })
    }
}

impl End for Aes {
    fn one(&mut self, slots: Slots, _peer: usize, message: u64) -> anyhow::Result<()> {
        for extent in slots.message(message) {
            let from = bytes(&self.memory.source, extent.clone()).chunks(RECORD);
            let to = bytes_mut(&self.memory.landing, extent).chunks_mut(RECORD);
            for (content, sealed) in from.zip(to) {
                let mut nonce = [0; 12];
                nonce[4..].copy_from_slice(&self.records.to_be_bytes());
                self.records += 1;
                let (nonce, head) = (Nonce::assume_unique_for_key(nonce), Aad::from([23, 3, 3, 0, 0]));
                self.key
                    .seal_out_of_place_scatter(nonce, head, content, sealed, &[23], &mut [0; 17])
                    .map_err(|_| anyhow!("a record of {} bytes was not sealed", content.len()))?;
            }
        }
        Ok(())
    }
}
