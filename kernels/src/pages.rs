//! The storage of paged KV: `[layer][page][k|v][kv_head][token][head_dim]`.

use tandem_memory::{Extent, HostRegion, RegionError};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::{KvShape, ShapeError};

/// The KV pages of a node, for all layers. Memory is taken from the system when a page is first written.
///
/// Which page belongs to whom is the node's business: this is storage alone.
pub struct KvPages {
    shape: KvShape,
    pages: u32,
    /// Nobody else holds this extent, so borrows of `self` govern its bytes.
    storage: Extent,
}

/// A pool of pages, wherever its memory lies: what whoever hands out pages knows of it.
pub trait Paged: Send {
    /// The dimensions of the KV.
    fn shape(&self) -> &KvShape;
    /// Pages of the pool.
    fn pages(&self) -> u32;
    /// Copies all layers of page `from` to page `to`, so that two sequences may go on from one. Over when it returns.
    ///
    /// # Errors
    /// When one of them is not in the pool, or its memory fails.
    fn copy_page(&mut self, from: PageId, to: PageId) -> Result<(), PagesError>;
}

/// Why pages cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The shape makes no sense.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// No page at all was asked for.
    #[error("a KV pool needs at least one page")]
    Empty,
    /// The pool is larger than the address space.
    #[error("{pages} pages of {page_bytes} bytes do not fit the address space; ask for fewer pages")]
    TooLarge {
        /// Pages asked for.
        pages: u32,
        /// Bytes of one page in all layers.
        page_bytes: usize,
    },
    /// The system has no such memory.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// A GPU has no such memory, or failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] tandem_memory::cuda::CudaError),
    /// A page that is not there.
    #[error("page {page} lies outside the pool of {pages} pages")]
    NoSuchPage {
        /// The page.
        page: PageId,
        /// Pages of the pool.
        pages: u32,
    },
}

impl KvPages {
    /// Reserves `pages` pages of `shape`.
    ///
    /// # Errors
    /// When the shape is unusable or the system refuses the memory.
    pub fn new(shape: KvShape, pages: u32) -> Result<KvPages, PagesError> {
        let len = pool_bytes(&shape, pages)?;
        let storage = HostRegion::private(len)?.extent(0..len)?;
        Ok(KvPages { shape, pages, storage })
    }

    /// The memory of all pages in pieces of about a huge page, in the order in which pages are first used: for
    /// whoever has the system provide it beforehand ([`Extent::populate`]).
    pub fn pieces(&self) -> impl Iterator<Item = Extent> + Send + use<> {
        const PIECE_BYTES: usize = 2 << 20;
        let (storage, shape, pages) = (self.storage.clone(), self.shape, self.pages);
        let page = shape.layer_page_bytes();
        let in_piece = (PIECE_BYTES / page).max(1);
        (0..pages).step_by(in_piece).flat_map(move |first| {
            let (storage, count) = (storage.clone(), in_piece.min((pages - first) as usize));
            (0..shape.layers as usize).filter_map(move |layer| {
                let start = (layer * pages as usize + first as usize) * page;
                storage.part(start..start + count * page).ok()
            })
        })
    }

    /// The dimensions of the KV.
    #[must_use]
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Pages of the pool.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The rows of one head's keys (`value` false) or values in a page: `[token][head_dim]`.
    ///
    /// # Panics
    /// When layer, page or head do not exist.
    #[must_use]
    pub fn head(&self, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> &[u8] {
        let start = self.head_offset(layer, page, kv_head, value);
        &self.bytes()[start..start + self.shape.page_tokens as usize * self.shape.row_bytes()]
    }

    /// As [`KvPages::head`], to write.
    ///
    /// # Panics
    /// When layer, page or head do not exist.
    #[must_use]
    pub fn head_mut(&mut self, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> &mut [u8] {
        let start = self.head_offset(layer, page, kv_head, value);
        let len = self.shape.page_tokens as usize * self.shape.row_bytes();
        &mut self.bytes_mut()[start..start + len]
    }

    /// Offset in the storage of [`KvPages::head`].
    pub(crate) fn head_offset(&self, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> usize {
        assert!(
            layer.0 < self.shape.layers && page.0 < self.pages && kv_head < self.shape.kv_heads,
            "no KV at layer {layer}, page {page}, head {kv_head}"
        );
        self.page_offset(layer, page) + self.shape.page_head_offset(kv_head as usize, value)
    }

    /// Where one head's keys and values of a layer lie: bytes from the storage's start to page 0's keys,
    /// from a page to the next, and from a page's keys to its values.
    pub(crate) fn head_strides(&self, layer: LayerIdx, kv_head: u32) -> (usize, usize, usize) {
        let keys = self.head_offset(layer, PageId(0), kv_head, false);
        (keys, self.shape.layer_page_bytes(), self.head_offset(layer, PageId(0), kv_head, true) - keys)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the extent is this pool's alone, and writing it takes `&mut self`.
        unsafe { self.storage.bytes() }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the extent is this pool's alone, and `self` is borrowed exclusively.
        unsafe { self.storage.bytes_mut() }
    }

    fn page_offset(&self, layer: LayerIdx, page: PageId) -> usize {
        (layer.0 as usize * self.pages as usize + page.0 as usize) * self.shape.layer_page_bytes()
    }
}

impl Paged for KvPages {
    fn shape(&self) -> &KvShape {
        &self.shape
    }

    fn pages(&self) -> u32 {
        self.pages
    }

    fn copy_page(&mut self, from: PageId, to: PageId) -> Result<(), PagesError> {
        both_in_pool(from, to, self.pages)?;
        let len = self.shape.layer_page_bytes();
        for layer in 0..self.shape.layers {
            let source = self.page_offset(LayerIdx(layer), from);
            let target = self.page_offset(LayerIdx(layer), to);
            self.bytes_mut().copy_within(source..source + len, target);
        }
        Ok(())
    }
}

/// Bytes of a pool.
pub(crate) fn pool_bytes(shape: &KvShape, pages: u32) -> Result<usize, PagesError> {
    shape.validate()?;
    if pages == 0 {
        return Err(PagesError::Empty);
    }
    let page_bytes = shape.layer_page_bytes() * shape.layers as usize;
    page_bytes
        .checked_mul(pages as usize)
        .filter(|len| *len <= isize::MAX as usize / 2)
        .ok_or(PagesError::TooLarge { pages, page_bytes })
}

/// Refuses a copy from or to a page that is not there.
pub(crate) fn both_in_pool(from: PageId, to: PageId, pages: u32) -> Result<(), PagesError> {
    match [from, to].into_iter().find(|page| page.0 >= pages) {
        Some(page) => Err(PagesError::NoSuchPage { page, pages }),
        None => Ok(()),
    }
}

impl std::fmt::Debug for KvPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvPages({} pages of {:?})", self.pages, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_proto::layout::KvDtype;

    #[test]
    fn pieces_are_the_pool_once() {
        let check = |layers, kv_heads, pages| {
            let shape = KvShape {
                layers,
                kv_heads,
                head_dim: 64,
                page_tokens: 16,
                chunk_tokens: 256,
                dtype: KvDtype::F32,
            };
            let pool = KvPages::new(shape, pages).unwrap();
            let mut pieces: Vec<_> =
                pool.pieces().map(|piece| piece.offset()..piece.offset() + piece.len()).collect();
            let most = shape.layer_page_bytes().max(2 << 20);
            assert!(pieces.iter().all(|piece| piece.len() <= most), "{layers} layers of {pages} pages");
            pieces.sort_by_key(|piece| piece.start);
            let end = pieces.iter().fold(0, |end, piece| {
                assert_eq!(piece.start, end, "{layers} layers of {pages} pages");
                piece.end
            });
            assert_eq!(end, pool_bytes(&shape, pages).unwrap());
        };
        check(1, 1, 1);
        check(3, 8, 1000);
        // Pages longer than a piece.
        check(2, 512, 3);
    }
}
