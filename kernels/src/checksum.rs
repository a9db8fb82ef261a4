//! The checksum that travels beside packed KV: the same number on a CPU and on a GPU.
//!
//! XXH3 alone is a chain through all bytes, which a GPU would follow on one thread. So an extent is cut into pieces
//! of 4 KiB, the last filled up with zeros; each has its XXH3-64, is mixed with its index, and all are added to the
//! extent's length. Pieces may be taken in any order, by anyone, and any byte that differs changes the sum with all
//! but one in 2⁶⁴ chances.

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes that are hashed as one.
pub(crate) const PIECE_BYTES: usize = 4096;

/// The checksum of an extent.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    Checksum::default().finish(bytes)
}

/// As [`checksum`], on several threads.
pub(crate) fn parallel(bytes: &[u8]) -> u64 {
    const PIECES: usize = 64;
    let sum = bytes.par_chunks(PIECES * PIECE_BYTES).enumerate().map(|(index, bytes)| {
        let mut part = Checksum { sum: 0, pieces: index * PIECES, hashed: 0 };
        part.rest(bytes);
        part.sum
    });
    sum.reduce(|| 0, u64::wrapping_add).wrapping_add(bytes.len() as u64)
}

/// The checksum of an extent while it is made, or read: so that bytes are hashed while they are in the cache.
#[derive(Default)]
pub(crate) struct Checksum {
    sum: u64,
    pieces: usize,
    /// Bytes that are in the sum: whole pieces.
    hashed: usize,
}

impl Checksum {
    /// Hashes the whole pieces of the extent's first bytes, which are all that are ready.
    pub(crate) fn ready(&mut self, bytes: &[u8]) {
        let (whole, _) = bytes[self.hashed..].as_chunks::<PIECE_BYTES>();
        for piece in whole {
            self.add(piece);
        }
        self.hashed += whole.len() * PIECE_BYTES;
    }

    /// The checksum of the whole extent.
    pub(crate) fn finish(mut self, bytes: &[u8]) -> u64 {
        self.rest(bytes);
        self.sum.wrapping_add(bytes.len() as u64)
    }

    fn rest(&mut self, bytes: &[u8]) {
        self.ready(bytes);
        let last = &bytes[self.hashed..];
        if !last.is_empty() {
            let mut piece = [0; PIECE_BYTES];
            piece[..last.len()].copy_from_slice(last);
            self.add(&piece);
        }
    }

    fn add(&mut self, piece: &[u8; PIECE_BYTES]) {
        self.pieces += 1;
        // SplitMix64 of hash and index: a sum of bare hashes would not notice pieces that changed places.
        let mut z = xxh3_64(piece).wrapping_add((self.pieces as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.sum = self.sum.wrapping_add(z ^ (z >> 31));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
    }

    #[test]
    fn does_not_depend_on_how_it_is_taken() {
        for len in [1, 4095, 4096, 4097, 64 * 4096, 300_000, 64 * 4096 * 3] {
            let bytes = bytes(len);
            let whole = checksum(&bytes);
            assert_eq!(parallel(&bytes), whole, "{len} bytes on several threads");
            for step in [1000, 4096, 10_000] {
                let mut taken = Checksum::default();
                for end in (0..len).step_by(step) {
                    taken.ready(&bytes[..end]);
                }
                assert_eq!(taken.finish(&bytes), whole, "{len} bytes in steps of {step}");
            }
        }
    }

    #[test]
    fn notices_any_change() {
        let sent = bytes(3 * 4096 + 100);
        let check = |what: &str, landed: &[u8]| assert_ne!(checksum(landed), checksum(&sent), "{what}");
        for at in [0, 4096, 8191, sent.len() - 1] {
            let mut landed = sent.clone();
            landed[at] ^= 1;
            check("a flipped bit", &landed);
        }
        let mut swapped = sent.clone();
        swapped[..8192].rotate_left(4096);
        check("pieces that changed places", &swapped);
        check("a missing byte", &sent[..sent.len() - 1]);
        check("a zero more", &[&sent[..], &[0]].concat());
        check("a missing piece", &sent[..8192]);
        assert_ne!(checksum(&[0; 4096]), checksum(&[0; 8192]));
    }

    /// Another version of this code must have the same numbers: these were made by Python's xxhash.
    #[test]
    fn is_the_checksum_of_the_wire() {
        let whole: Vec<u8> = (0..10_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        assert_eq!(checksum(&whole), 0x4fe0_e34b_3156_dc48);
    }
}
