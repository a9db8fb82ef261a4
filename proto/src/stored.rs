//! The header of a stored chunk: what its bytes are, and how to tell that they still are.
//!
//! It stands beside the packed bytes in every tier, and travels with them. Its own digest guards it; the checksum of
//! each layer guards the bytes, and is compared while the layer is scattered, before anything is computed from it. So
//! whatever a disk, a store or a peer gives back is either what was stored under the key or is noticed.

use crate::ids::LayerIdx;
use crate::keys::{ChunkKey, Fingerprint};
use crate::layout::{KvShape, ShapeError};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The version of the header. Chunks of another one are not used.
pub const STORED_VERSION: u16 = 1;
/// The longest header that is encoded or decoded: a model has at most [`MAX_LAYERS`](crate::layout::MAX_LAYERS) layers.
pub const MAX_HEADER_BYTES: usize = 16 << 10;
/// Bytes of a header from which its length follows.
pub const HEADER_START: usize = 12;
const MAGIC: [u8; 4] = *b"tdmC";
const DIGEST: usize = 16;

/// What a stored chunk is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChunkHeader {
    /// Its name.
    pub key: ChunkKey,
    /// The model that it is of. The key hashes it too; here it says why a chunk does not fit.
    pub fingerprint: Fingerprint,
    /// The dimensions of its KV.
    pub shape: KvShape,
    /// Its tokens: `chunk_tokens` of the shape, or fewer at a prompt's end.
    pub tokens: u32,
    /// The checksum of each packed layer.
    pub checksums: Vec<u64>,
}

/// Why bytes are no header of a chunk that can be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HeaderError {
    /// It does not begin as headers do.
    #[error("this is no header of a chunk")]
    NoHeader,
    /// Written by another version.
    #[error("the chunk's header has version {0}, this build reads {STORED_VERSION}")]
    Version(u16),
    /// Its bytes are not those that were written.
    #[error("the chunk's header is damaged")]
    Damaged,
    /// The dimensions are out of bounds.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A number in it does not fit the others.
    #[error("the chunk's header says {tokens} tokens and {checksums} checksums for {layers} layers")]
    Numbers {
        /// Tokens of the chunk.
        tokens: u32,
        /// Checksums that were given.
        checksums: usize,
        /// Layers of the shape.
        layers: u32,
    },
}

impl ChunkHeader {
    /// Bytes of the packed chunk.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        self.shape.packed_bytes(self.tokens)
    }

    /// Where a layer lies in the packed chunk.
    #[must_use]
    pub fn layer(&self, layer: LayerIdx) -> Range<usize> {
        self.shape.packed_layer(layer, self.tokens)
    }

    /// The header as bytes: as many for every chunk of a shape.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(STORED_VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        let body = bincode::serde::encode_to_vec(self, config()).expect("numbers and arrays can be encoded");
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
        let digest = digest(&bytes);
        bytes.extend(digest);
        bytes
    }

    /// How long the header is that begins so: what to read before it can be decoded.
    ///
    /// # Errors
    /// For the beginning of nothing that this build decodes.
    pub fn encoded_bytes(start: &[u8; HEADER_START]) -> Result<usize, HeaderError> {
        if start[..4] != MAGIC {
            return Err(HeaderError::NoHeader);
        }
        let version = u16::from_le_bytes([start[4], start[5]]);
        if version != STORED_VERSION {
            return Err(HeaderError::Version(version));
        }
        let len = u32::from_le_bytes([start[8], start[9], start[10], start[11]]) as usize;
        if len > MAX_HEADER_BYTES { Err(HeaderError::Damaged) } else { Ok(HEADER_START + len + DIGEST) }
    }

    /// The header at the beginning of `bytes`, which may go on after it, and its length.
    ///
    /// # Errors
    /// For everything that [`ChunkHeader::encode`] does not make.
    pub fn decode(bytes: &[u8]) -> Result<(ChunkHeader, usize), HeaderError> {
        let (start, rest) = bytes.split_first_chunk().ok_or(HeaderError::NoHeader)?;
        let end = ChunkHeader::encoded_bytes(start)? - DIGEST;
        let len = end - HEADER_START;
        if rest.len() < len + DIGEST {
            return Err(HeaderError::Damaged);
        }
        if digest(&bytes[..end]) != bytes[end..end + DIGEST] {
            return Err(HeaderError::Damaged);
        }
        let body = &rest[..len];
        let decoded = bincode::serde::decode_from_slice(body, config()).map_err(|_| HeaderError::Damaged)?;
        let (header, used): (ChunkHeader, usize) = decoded;
        header.shape.validate()?;
        let (tokens, checksums) = (header.tokens, header.checksums.len());
        let layers = header.shape.layers;
        if tokens == 0 || tokens > header.shape.chunk_tokens || checksums != layers as usize || used != len {
            return Err(HeaderError::Numbers { tokens, checksums, layers });
        }
        Ok((header, end + DIGEST))
    }
}

fn config() -> impl bincode::config::Config {
    bincode::config::legacy().with_limit::<MAX_HEADER_BYTES>()
}

fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    *blake3::hash(bytes).as_bytes().first_chunk().expect("a hash has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{KvDtype, MAX_LAYERS};

    fn header(layers: u32) -> ChunkHeader {
        let dtype = KvDtype::F16;
        let shape = KvShape { layers, kv_heads: 2, head_dim: 8, page_tokens: 4, chunk_tokens: 16, dtype };
        let checksums = (0..u64::from(layers)).map(|layer| layer << 40).collect();
        let (key, fingerprint) = (ChunkKey([3; 32]), Fingerprint([4; 32]));
        ChunkHeader { key, fingerprint, shape, tokens: 16, checksums }
    }

    #[test]
    fn what_was_encoded_is_decoded_with_what_follows_left_alone() {
        for layers in [1, 32, MAX_LAYERS] {
            let mut bytes = header(layers).encode();
            let len = bytes.len();
            assert!(len <= MAX_HEADER_BYTES);
            assert_eq!(ChunkHeader::encoded_bytes(bytes.first_chunk().expect("its start")), Ok(len));
            bytes.extend([7; 100]);
            assert_eq!(ChunkHeader::decode(&bytes), Ok((header(layers), len)));
        }
    }

    #[test]
    fn a_bit_anywhere_and_an_end_anywhere_are_noticed() {
        let bytes = header(3).encode();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(ChunkHeader::decode(&flipped).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(ChunkHeader::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let wrong = |change: fn(&mut ChunkHeader)| {
            let mut header = header(3);
            change(&mut header);
            ChunkHeader::decode(&header.encode()).expect_err("it does not fit")
        };
        assert!(matches!(wrong(|header| header.tokens = 17), HeaderError::Numbers { tokens: 17, .. }));
        assert!(matches!(wrong(|header| header.tokens = 0), HeaderError::Numbers { .. }));
        assert!(matches!(wrong(|header| header.checksums.truncate(2)), HeaderError::Numbers { .. }));
        assert!(matches!(wrong(|header| header.shape.head_dim = 0), HeaderError::Shape(_)));
    }
}
