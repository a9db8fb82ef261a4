//! The layouts of pages that engines use, and how each becomes packed KV: the reference of every kernel.

use crate::checksum::checksum;
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::KvShape;

/// How an engine lays out its pages: `[layer][page]`, and in a page as [`Order`] says. An element's type does not
/// matter here, only how long a row is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagedLayout {
    /// Layers of the model.
    pub layers: u32,
    /// Pages of the pool.
    pub pages: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// KV heads of a layer.
    pub heads: u32,
    /// What there is of each head and token.
    pub stored: Stored,
    /// Bytes of one row: one token's key or value of a head, or its latent.
    pub row_bytes: u32,
    /// The order of a page's rows.
    pub order: Order,
}

/// What is stored of a token's head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// A key and a value, as long as each other.
    KeysAndValues,
    /// One row, which keys and values are made from (MLA).
    Latent,
}

/// The order of rows in a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// `[k|v][head][token]` (HND).
    Heads,
    /// `[k|v][token][head]` (NHD).
    Tokens,
}

/// Bytes from one to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Strides {
    pub(crate) layer: usize,
    pub(crate) page: usize,
    pub(crate) value: usize,
    pub(crate) head: usize,
    pub(crate) token: usize,
}

impl PagedLayout {
    /// The layout of a [`crate::KvPages`] of `pages` pages.
    #[must_use]
    pub fn of(shape: &KvShape, pages: u32) -> PagedLayout {
        PagedLayout {
            layers: shape.layers,
            pages,
            page_tokens: shape.page_tokens,
            heads: shape.kv_heads,
            stored: Stored::KeysAndValues,
            row_bytes: shape.row_bytes() as u32,
            order: Order::Heads,
        }
    }

    /// Rows of a head and token: 2, or 1 of latents.
    #[must_use]
    pub fn values(&self) -> u32 {
        match self.stored {
            Stored::KeysAndValues => 2,
            Stored::Latent => 1,
        }
    }

    /// Bytes of the pool.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.strides().layer * self.layers as usize
    }

    /// Bytes of `tokens` tokens in one layer, in pages as in packed KV.
    #[must_use]
    pub fn layer_bytes(&self, tokens: u32) -> usize {
        tokens as usize * (self.heads * self.values()) as usize * self.row_bytes as usize
    }

    /// Where a row begins in the pool, in bytes.
    #[must_use]
    pub fn row(&self, layer: LayerIdx, page: PageId, head: u32, value: u32, token: u32) -> usize {
        let by = self.strides();
        [(layer.0, by.layer), (page.0, by.page), (value, by.value), (head, by.head), (token, by.token)]
            .into_iter()
            .map(|(index, stride)| index as usize * stride)
            .sum()
    }

    pub(crate) fn strides(&self) -> Strides {
        let row = self.row_bytes as usize;
        let (heads, tokens) = (self.heads as usize, self.page_tokens as usize);
        let (head, token) = match self.order {
            Order::Heads => (tokens * row, row),
            Order::Tokens => (row, heads * row),
        };
        let page = self.layer_bytes(self.page_tokens);
        Strides { layer: page * self.pages as usize, page, value: heads * tokens * row, head, token }
    }

    /// Gathers one layer of `tokens` tokens, which lie in `pages` of the pool, into `out`: packed,
    /// `[head][k|v][token][row]`. Returns the checksum.
    ///
    /// # Panics
    /// When something leaves the pool, or `out` has another length.
    pub fn pack(&self, pool: &[u8], layer: LayerIdx, pages: &[PageId], tokens: u32, out: &mut [u8]) -> u64 {
        assert_eq!(out.len(), self.layer_bytes(tokens), "the length of a packed layer");
        let row = self.row_bytes as usize;
        for (from, to) in self.rows(layer, pages, tokens).zip(out.chunks_mut(row)) {
            to.copy_from_slice(&pool[from..from + row]);
        }
        checksum(out)
    }

    /// The reverse of [`PagedLayout::pack`].
    ///
    /// # Panics
    /// As there.
    pub fn scatter(
        &self,
        pool: &mut [u8],
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        packed: &[u8],
    ) -> u64 {
        assert_eq!(packed.len(), self.layer_bytes(tokens), "the length of a packed layer");
        let row = self.row_bytes as usize;
        for (to, from) in self.rows(layer, pages, tokens).zip(packed.chunks(row)) {
            pool[to..to + row].copy_from_slice(from);
        }
        checksum(packed)
    }

    /// Where rows lie in the pool, in packed order.
    fn rows(&self, layer: LayerIdx, pages: &[PageId], tokens: u32) -> impl Iterator<Item = usize> {
        let parts = self.heads * self.values();
        (0..parts).flat_map(move |part| (0..tokens).map(move |token| (part, token))).map(
            move |(part, token)| {
                let page = pages[(token / self.page_tokens) as usize];
                self.row(layer, page, part / self.values(), part % self.values(), token % self.page_tokens)
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvPages, pack_layer};
    use tandem_proto::layout::KvDtype;

    #[test]
    fn agrees_with_the_pages_of_the_cpu_engine() {
        let shape = KvShape {
            layers: 2,
            kv_heads: 3,
            head_dim: 5,
            page_tokens: 4,
            chunk_tokens: 16,
            dtype: KvDtype::F16,
        };
        let layout = PagedLayout::of(&shape, 6);
        let mut kv = KvPages::new(shape, 6).unwrap();
        assert_eq!(layout.bytes(), kv.bytes().len());
        for (i, byte) in kv.bytes_mut().iter_mut().enumerate() {
            *byte = ((i * 31) >> 3) as u8;
        }
        let (layer, pages, tokens) = (LayerIdx(1), [PageId(5), PageId(0), PageId(3)], 11);
        let mut want = vec![0; layout.layer_bytes(tokens)];
        let mut have = want.clone();
        let sum = pack_layer(&kv, layer, &pages, tokens, &mut want).unwrap();
        assert_eq!(layout.pack(kv.bytes(), layer, &pages, tokens, &mut have), sum);
        assert_eq!(have, want);
    }

    #[test]
    fn every_layout_packs_to_the_same() {
        let heads = PagedLayout {
            layers: 2,
            pages: 5,
            page_tokens: 4,
            heads: 3,
            stored: Stored::KeysAndValues,
            row_bytes: 6,
            order: Order::Heads,
        };
        for stored in [Stored::KeysAndValues, Stored::Latent] {
            let from = PagedLayout { stored, ..heads };
            let to = PagedLayout { order: Order::Tokens, page_tokens: 8, ..from };
            let mut target = vec![0; to.bytes()];
            let packed: Vec<u8> = (0..from.layer_bytes(10)).map(|i| (i * 7) as u8).collect();
            let layer = LayerIdx(1);
            let sum = to.scatter(&mut target, layer, &[PageId(4), PageId(1)], 10, &packed);
            let mut out = vec![0; packed.len()];
            assert_eq!(to.pack(&target, layer, &[PageId(4), PageId(1)], 10, &mut out), sum);
            assert_eq!(out, packed);
            let mut source = vec![0; from.bytes()];
            let pages = [PageId(2), PageId(0), PageId(3)];
            assert_eq!(from.scatter(&mut source, layer, &pages, 10, &packed), sum);
            assert_ne!(source.iter().position(|b| *b != 0), target.iter().position(|b| *b != 0));
        }
    }
}
