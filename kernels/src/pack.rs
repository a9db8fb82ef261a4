//! Paged to packed and back, on the CPU. See `tandem_proto::layout` for both shapes.

use crate::checksum::{self, Checksum};
use crate::pages::{KvPages, Paged};
use rayon::prelude::*;
use std::sync::Arc;
use tandem_memory::{Extent, HostRegion, RegionError};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::KvShape;

/// Bytes of a layer's extent from which its heads are copied on several threads. Below it, the checksum is
/// taken from each run while it is in the first-level cache, which is faster.
const PARALLEL_BYTES: usize = 8 << 20;

/// Converts between the two shapes. A conversion is begun, and later told to be over: on a GPU it takes its time.
/// Implementations run `contract::check`.
pub trait Kernels: Send {
    /// The paged KV that this implementation reads and writes.
    type Pages: Paged;
    /// Why memory cannot be had, or conversions failed for good.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Memory for packed KV that transports can move, `len` bytes.
    ///
    /// # Errors
    /// When there is no such memory.
    fn memory(&self, len: usize) -> Result<Arc<HostRegion>, Self::Error>;

    /// Memory of the host for packed KV that is kept, `len` bytes, which conversions read and write directly.
    ///
    /// # Errors
    /// When there is no such memory.
    fn host_memory(&self, len: usize) -> Result<Arc<HostRegion>, Self::Error>;

    /// Begins to gather one layer of `tokens` tokens, which lie in `pages`, into `out`, that layer's extent of a packed
    /// chunk. Comes after whatever an engine had queued for that layer by now. Pages that are written before it is over
    /// may be gathered in either state.
    ///
    /// # Safety
    /// Until [`Kernels::poll`] tells that it is over, nobody else reads or writes `out`.
    ///
    /// # Errors
    /// When lengths do not fit each other or the pool; `out` is then untouched, and nothing is begun.
    unsafe fn pack(
        &mut self,
        ticket: Ticket,
        kv: &Self::Pages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        out: &Extent,
    ) -> Result<(), PackError>;

    /// Begins the reverse of [`Kernels::pack`]. Rows of the last page beyond `tokens` keep what they hold. Nobody may use
    /// the pages before it is over.
    ///
    /// # Safety
    /// Until [`Kernels::poll`] tells that it is over, nobody writes `packed`.
    ///
    /// # Errors
    /// When lengths do not fit each other or the pool; no page is then touched, and nothing is begun.
    unsafe fn scatter(
        &mut self,
        ticket: Ticket,
        kv: &mut Self::Pages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        packed: &Extent,
    ) -> Result<(), PackError>;

    /// Appends what is over since the last call, in any order. Waits for nothing. What was begun may wait for the next
    /// call until it really begins, so that several conversions become one piece of work.
    ///
    /// # Errors
    /// When the device failed: what is under way will never be over.
    fn poll(&mut self, done: &mut Vec<Converted>) -> Result<(), Self::Error>;

    /// Conversions that were begun and not yet told to be over.
    fn under_way(&self) -> usize;
}

/// A conversion, as its caller names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// A conversion that is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Converted {
    /// Which.
    pub ticket: Ticket,
    /// The [`checksum`](crate::checksum()) of the packed bytes, as they were written or read.
    pub checksum: u64,
}

/// Why a chunk cannot be converted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PackError {
    /// The layer does not exist.
    #[error("layer {layer} lies beyond the model's {layers} layers")]
    NoSuchLayer {
        /// The layer.
        layer: LayerIdx,
        /// Layers of the model.
        layers: u32,
    },
    /// No chunk has so many tokens.
    #[error("a chunk of {tokens} tokens; chunks have 1 to {chunk_tokens}")]
    Tokens {
        /// Tokens asked for.
        tokens: u32,
        /// The most.
        chunk_tokens: u32,
    },
    /// The page table is not as long as the tokens need.
    #[error("{pages} pages given for {tokens} tokens, which lie in {needed}")]
    Pages {
        /// Pages given.
        pages: usize,
        /// Tokens of the chunk.
        tokens: u32,
        /// Pages that hold them.
        needed: u32,
    },
    /// A page is not in the pool.
    #[error("page {page} lies outside the pool of {pages} pages")]
    NoSuchPage {
        /// The page.
        page: PageId,
        /// Pages of the pool.
        pages: u32,
    },
    /// A page is named twice, so two rows would land in one place.
    #[error("page {page} is named twice")]
    PageTwice {
        /// The page.
        page: PageId,
    },
    /// The extent has another length than the tokens need.
    #[error("packed extent of {len} bytes for {tokens} tokens, which need {needed}")]
    Extent {
        /// Its length.
        len: usize,
        /// Tokens of the chunk.
        tokens: u32,
        /// The length needed.
        needed: usize,
    },
    /// The extent lies in memory that the kernels do not reach.
    #[error("packed extent in memory that {device} does not reach; take it from these kernels")]
    Unreached {
        /// Where the kernels run.
        device: String,
    },
}

/// [`pack_layer`] and [`scatter_layer`] as [`Kernels`]: a conversion is over when it was begun.
#[derive(Default, Debug)]
pub struct CpuKernels {
    done: Vec<Converted>,
}

impl Kernels for CpuKernels {
    type Pages = KvPages;
    type Error = RegionError;

    fn memory(&self, len: usize) -> Result<Arc<HostRegion>, RegionError> {
        HostRegion::map(len)
    }

    fn host_memory(&self, len: usize) -> Result<Arc<HostRegion>, RegionError> {
        HostRegion::map(len)
    }

    unsafe fn pack(
        &mut self,
        ticket: Ticket,
        kv: &KvPages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        out: &Extent,
    ) -> Result<(), PackError> {
        // SAFETY: nobody else uses these bytes, by the caller's promise.
        let checksum = pack_layer(kv, layer, pages, tokens, unsafe { out.bytes_mut() })?;
        self.done.push(Converted { ticket, checksum });
        Ok(())
    }

    unsafe fn scatter(
        &mut self,
        ticket: Ticket,
        kv: &mut KvPages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        packed: &Extent,
    ) -> Result<(), PackError> {
        // SAFETY: nobody writes these bytes, by the caller's promise.
        let checksum = scatter_layer(kv, layer, pages, tokens, unsafe { packed.bytes() })?;
        self.done.push(Converted { ticket, checksum });
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Converted>) -> Result<(), RegionError> {
        done.append(&mut self.done);
        Ok(())
    }

    fn under_way(&self) -> usize {
        self.done.len()
    }
}

/// What [`Kernels::pack`] does. Returns the [`checksum`](crate::checksum()) of `out`.
///
/// # Errors
/// As there.
pub fn pack_layer(
    kv: &KvPages,
    layer: LayerIdx,
    pages: &[PageId],
    tokens: u32,
    out: &mut [u8],
) -> Result<u64, PackError> {
    check(kv, layer, pages, tokens, out.len())?;
    let shape = *kv.shape();
    let head_bytes = tokens as usize * shape.row_bytes();
    let copy_head = |index: usize, out: &mut [u8]| {
        let (head, value) = head_of(index);
        for (page, to) in pages.iter().zip(out.chunks_mut(page_head_bytes(&shape))) {
            let from = kv.head(layer, *page, head, value);
            to.copy_from_slice(&from[..to.len()]);
        }
    };
    if out.len() >= PARALLEL_BYTES {
        out.par_chunks_mut(head_bytes).enumerate().for_each(|(index, out)| copy_head(index, out));
        return Ok(checksum::parallel(out));
    }
    let mut sum = Checksum::default();
    for (index, start) in (0..out.len()).step_by(head_bytes).enumerate() {
        copy_head(index, &mut out[start..start + head_bytes]);
        sum.ready(&out[..start + head_bytes]);
    }
    Ok(sum.finish(out))
}

/// What [`Kernels::scatter`] does. Returns the checksum of `packed` as it was read.
///
/// # Errors
/// As there.
pub fn scatter_layer(
    kv: &mut KvPages,
    layer: LayerIdx,
    pages: &[PageId],
    tokens: u32,
    packed: &[u8],
) -> Result<u64, PackError> {
    check(kv, layer, pages, tokens, packed.len())?;
    check_distinct(pages)?;
    let shape = *kv.shape();
    let head_bytes = tokens as usize * shape.row_bytes();
    if packed.len() >= PARALLEL_BYTES {
        // Pages are what threads share here: each page's rows, of every head, are one thread's alone.
        let checksum = checksum::parallel(packed);
        scatter_pages(kv, layer, pages, packed, head_bytes);
        return Ok(checksum);
    }
    let mut sum = Checksum::default();
    for (index, rows) in packed.chunks(head_bytes).enumerate() {
        sum.ready(&packed[..(index + 1) * head_bytes]);
        let (head, value) = head_of(index);
        for (page, from) in pages.iter().zip(rows.chunks(page_head_bytes(&shape))) {
            kv.head_mut(layer, *page, head, value)[..from.len()].copy_from_slice(from);
        }
    }
    Ok(sum.finish(packed))
}

/// Scatters on several threads. `pages` are distinct and in the pool.
fn scatter_pages(kv: &mut KvPages, layer: LayerIdx, pages: &[PageId], packed: &[u8], head_bytes: usize) {
    struct Base(*mut u8);
    // SAFETY: each task writes the rows of pages of its own.
    unsafe impl Sync for Base {}
    impl Base {
        fn at(&self, offset: usize) -> *mut u8 {
            // SAFETY: callers pass offsets that lie in the pool.
            unsafe { self.0.add(offset) }
        }
    }
    let base = Base(kv.bytes_mut().as_mut_ptr());
    let kv = &*kv;
    let run = page_head_bytes(kv.shape());
    pages.par_iter().enumerate().for_each(|(i, page)| {
        for (index, head) in packed.chunks(head_bytes).enumerate() {
            let (kv_head, value) = head_of(index);
            let from = &head[i * run..((i + 1) * run).min(head.len())];
            let to = base.at(kv.head_offset(layer, *page, kv_head, value));
            // SAFETY: the rows lie in this page, which is this task's alone; `kv` is used for offsets only.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        }
    });
}

/// The head and the kind of part `index` of a packed layer.
fn head_of(index: usize) -> (u32, bool) {
    ((index / 2) as u32, index % 2 == 1)
}

/// Bytes of one head's keys (or values) in a page.
fn page_head_bytes(shape: &KvShape) -> usize {
    shape.page_tokens as usize * shape.row_bytes()
}

/// Refuses what [`Kernels`] refuse of both conversions.
pub(crate) fn check(
    kv: &impl Paged,
    layer: LayerIdx,
    pages: &[PageId],
    tokens: u32,
    len: usize,
) -> Result<(), PackError> {
    let shape = kv.shape();
    if layer.0 >= shape.layers {
        return Err(PackError::NoSuchLayer { layer, layers: shape.layers });
    }
    if tokens == 0 || tokens > shape.chunk_tokens {
        return Err(PackError::Tokens { tokens, chunk_tokens: shape.chunk_tokens });
    }
    let needed = shape.pages(tokens);
    if pages.len() != needed as usize {
        return Err(PackError::Pages { pages: pages.len(), tokens, needed });
    }
    if let Some(page) = pages.iter().find(|p| p.0 >= kv.pages()) {
        return Err(PackError::NoSuchPage { page: *page, pages: kv.pages() });
    }
    let needed = tokens as usize * shape.layer_token_bytes();
    if len != needed {
        return Err(PackError::Extent { len, tokens, needed });
    }
    Ok(())
}

/// Refuses what nothing can be scattered to.
pub(crate) fn check_distinct(pages: &[PageId]) -> Result<(), PackError> {
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(PackError::PageTwice { page: pair[0] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract;
    use tandem_proto::layout::KvDtype;

    #[test]
    fn keeps_the_contract() {
        contract::check(&mut CpuKernels::default(), 1, 200);
    }

    #[test]
    fn large_extents_agree_with_small_ones() {
        let shape = KvShape {
            layers: 1,
            kv_heads: 8,
            head_dim: 128,
            page_tokens: 16,
            chunk_tokens: 1 << 11,
            dtype: KvDtype::F32,
        };
        let mut kv = KvPages::new(shape, 128).unwrap();
        let (layer, tokens) = (LayerIdx(0), shape.chunk_tokens - 3);
        let pages: Vec<PageId> = (0..128).map(|i| PageId(i * 37 % 128)).collect();
        let packed: Vec<u8> =
            (0..tokens as usize * shape.layer_token_bytes()).map(|i| ((i * 31) >> 3) as u8).collect();
        assert!(packed.len() >= PARALLEL_BYTES);
        let sum = scatter_layer(&mut kv, layer, &pages, tokens, &packed).unwrap();
        assert_eq!(sum, checksum::checksum(&packed));
        let mut out = vec![0; packed.len()];
        assert_eq!(pack_layer(&kv, layer, &pages, tokens, &mut out).unwrap(), sum);
        assert!(out == packed);
    }
}
