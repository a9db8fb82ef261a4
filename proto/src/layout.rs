//! The two shapes of KV and where each byte of them lies. The only place where dimensions become bytes.
//!
//! - **Paged**: for each layer, pages of `page_tokens` tokens: `[page][k|v][kv_head][token][head_dim]`.
//! - **Packed**: one chunk of up to `chunk_tokens` tokens: `[layer][kv_head][k|v][token][head_dim]`,
//!   contiguous. A partial last chunk of `n` tokens has the same form with `n` tokens in place of
//!   `chunk_tokens`, and so is shorter.

use crate::ids::{ChunkIdx, LayerIdx};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The version of the packed layout. Part of every fingerprint, so KV of another version never matches.
pub const PACKED_LAYOUT_VERSION: u32 = 1;

/// The most layers a model may have: layers travel in ten bits of an immediate.
pub const MAX_LAYERS: u32 = 1 << 10;

/// How one KV element is stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::Bf16 => 2,
        }
    }
}

/// The dimensions of a model's KV, equal on both sides of a handoff.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct KvShape {
    /// Transformer layers.
    pub layers: u32,
    /// KV heads of each layer.
    pub kv_heads: u32,
    /// Elements of one head's key or value.
    pub head_dim: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Tokens of a full chunk; a multiple of `page_tokens`.
    pub chunk_tokens: u32,
    /// How an element is stored.
    pub dtype: KvDtype,
}

/// Why a shape cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShapeError {
    /// A dimension is zero or beyond its cap.
    #[error("KV shape: {name} is {value}, must be from 1 to {max}")]
    Dimension {
        /// The field's name.
        name: &'static str,
        /// Its value.
        value: u32,
        /// The largest value allowed.
        max: u32,
    },
    /// Chunks must consist of whole pages.
    #[error("KV shape: chunk_tokens {chunk_tokens} is not a multiple of page_tokens {page_tokens}")]
    ChunkNotPages {
        /// Tokens of a chunk.
        chunk_tokens: u32,
        /// Tokens of a page.
        page_tokens: u32,
    },
}

impl KvShape {
    /// Checks every dimension. Everything else here assumes that this passed.
    ///
    /// # Errors
    /// Names the first dimension that is out of bounds.
    pub fn validate(&self) -> Result<(), ShapeError> {
        let dims = [
            ("layers", self.layers, MAX_LAYERS),
            ("kv_heads", self.kv_heads, 1 << 10),
            ("head_dim", self.head_dim, 1 << 12),
            ("page_tokens", self.page_tokens, 1 << 10),
            ("chunk_tokens", self.chunk_tokens, 1 << 14),
        ];
        for (name, value, max) in dims {
            if value == 0 || value > max {
                return Err(ShapeError::Dimension { name, value, max });
            }
        }
        if !self.chunk_tokens.is_multiple_of(self.page_tokens) {
            return Err(ShapeError::ChunkNotPages {
                chunk_tokens: self.chunk_tokens,
                page_tokens: self.page_tokens,
            });
        }
        Ok(())
    }

    /// Bytes of one token's key (or value) in one head.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.head_dim as usize * self.dtype.size_bytes()
    }

    /// Bytes of one token's KV in all layers.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.layers as usize * self.layer_token_bytes()
    }

    /// Bytes of one token's KV in one layer.
    #[must_use]
    pub fn layer_token_bytes(&self) -> usize {
        2 * self.kv_heads as usize * self.row_bytes()
    }

    /// Bytes of one page in one layer.
    #[must_use]
    pub fn layer_page_bytes(&self) -> usize {
        self.page_tokens as usize * self.layer_token_bytes()
    }

    /// Offset, inside a page of one layer, of the rows of `kv_head`'s keys (`value` false) or values.
    #[must_use]
    pub fn page_head_offset(&self, kv_head: usize, value: bool) -> usize {
        (usize::from(value) * self.kv_heads as usize + kv_head) * self.page_tokens as usize * self.row_bytes()
    }

    /// Bytes of a packed chunk of `tokens` tokens.
    #[must_use]
    pub fn packed_bytes(&self, tokens: u32) -> usize {
        tokens as usize * self.token_bytes()
    }

    /// Where `layer` lies in a packed chunk of `tokens` tokens: the extent that travels as one write.
    #[must_use]
    pub fn packed_layer(&self, layer: LayerIdx, tokens: u32) -> Range<usize> {
        let len = tokens as usize * self.layer_token_bytes();
        let start = layer.0 as usize * len;
        start..start + len
    }

    /// Offset, inside one packed layer of `tokens` tokens, of the rows of `kv_head`'s keys or values.
    #[must_use]
    pub fn packed_head_offset(&self, kv_head: usize, value: bool, tokens: u32) -> usize {
        (kv_head * 2 + usize::from(value)) * tokens as usize * self.row_bytes()
    }

    /// Chunks of a prompt of `tokens` tokens, the last of which may be partial.
    #[must_use]
    pub fn chunks(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.chunk_tokens)
    }

    /// Pages that hold `tokens` tokens.
    #[must_use]
    pub fn pages(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.page_tokens)
    }

    /// The tokens of chunk `chunk` in a prompt of `tokens` tokens, as a range of positions.
    #[must_use]
    pub fn chunk_span(&self, chunk: ChunkIdx, tokens: u32) -> Range<u32> {
        let start = chunk.0.saturating_mul(self.chunk_tokens).min(tokens);
        start..start.saturating_add(self.chunk_tokens).min(tokens)
    }

    /// The pages of chunk `chunk`, as a range of indices into the sequence's page table.
    #[must_use]
    pub fn chunk_pages(&self, chunk: ChunkIdx, tokens: u32) -> Range<usize> {
        let span = self.chunk_span(chunk, tokens);
        (span.start / self.page_tokens) as usize..self.pages(span.end) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape =
        KvShape { layers: 3, kv_heads: 2, head_dim: 4, page_tokens: 4, chunk_tokens: 8, dtype: KvDtype::F32 };

    #[test]
    fn packed_extents_tile_the_chunk() {
        for tokens in 1..=SHAPE.chunk_tokens {
            let mut end = 0;
            for layer in 0..SHAPE.layers {
                let extent = SHAPE.packed_layer(LayerIdx(layer), tokens);
                assert_eq!(extent.start, end);
                end = extent.end;
            }
            assert_eq!(end, SHAPE.packed_bytes(tokens));
        }
    }

    #[test]
    fn spans_cover_the_prompt_once() {
        for tokens in 0..40 {
            let mut next = 0;
            for chunk in 0..SHAPE.chunks(tokens) {
                let span = SHAPE.chunk_span(ChunkIdx(chunk), tokens);
                assert_eq!(span.start, next);
                assert!(!span.is_empty());
                next = span.end;
            }
            assert_eq!(next, tokens);
        }
    }

    #[test]
    fn zero_and_ragged_shapes_are_refused() {
        assert!(SHAPE.validate().is_ok());
        assert!(KvShape { layers: 0, ..SHAPE }.validate().is_err());
        assert!(KvShape { chunk_tokens: 9, ..SHAPE }.validate().is_err());
    }
}
