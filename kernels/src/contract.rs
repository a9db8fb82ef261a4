//! What every implementation of [`Kernels`] must do, as a test that any backend can run.

use crate::{Kernels, PackError, checksum};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::{KvDtype, KvShape};

/// How the contract sees the pages of an implementation.
pub trait PagesUnderTest {
    /// Makes a pool.
    fn create(shape: KvShape, pages: u32) -> Self;
    /// Reads all rows of one head's keys or values in a page.
    fn read(&self, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> Vec<u8>;
    /// Writes all rows of one head's keys or values in a page.
    fn write(&mut self, layer: LayerIdx, page: PageId, kv_head: u32, value: bool, rows: &[u8]);
}

impl PagesUnderTest for crate::KvPages {
    fn create(shape: KvShape, pages: u32) -> Self {
        crate::KvPages::new(shape, pages).expect("a small pool")
    }
    fn read(&self, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> Vec<u8> {
        self.head(layer, page, kv_head, value).to_vec()
    }
    fn write(&mut self, layer: LayerIdx, page: PageId, kv_head: u32, value: bool, rows: &[u8]) {
        self.head_mut(layer, page, kv_head, value).copy_from_slice(rows);
    }
}

/// Runs the contract over `rounds` random shapes drawn from `seed`.
///
/// # Panics
/// When the implementation breaks it; the message names seed and round.
pub fn check<K: Kernels>(kernels: &K, seed: u64, rounds: u32)
where
    K::Pages: PagesUnderTest,
{
    let mut random = Random(seed);
    for round in 0..rounds {
        let shape = random_shape(&mut random);
        let case = format!("seed {seed}, round {round}, {shape:?}");
        check_shape(kernels, shape, &mut random, &case);
    }
}

fn random_shape(random: &mut Random) -> KvShape {
    let page_tokens = 1 + random.below(20);
    KvShape {
        layers: 1 + random.below(3),
        kv_heads: 1 + random.below(5),
        head_dim: 1 + random.below(70),
        page_tokens,
        chunk_tokens: page_tokens * (1 + random.below(6)),
        dtype: [KvDtype::F32, KvDtype::F16, KvDtype::Bf16][random.below(3) as usize],
    }
}

/// Random bytes through random pages, and every refusal, for one shape.
fn check_shape<K: Kernels>(kernels: &K, shape: KvShape, random: &mut Random, case: &str)
where
    K::Pages: PagesUnderTest,
{
    let pool = shape.chunk_tokens / shape.page_tokens * 2 + 1;
    let mut source = K::Pages::create(shape, pool);
    let mut target = K::Pages::create(shape, pool);
    let head_bytes = shape.page_tokens as usize * shape.row_bytes();
    for layer in 0..shape.layers {
        for page in 0..pool {
            for part in 0..2 * shape.kv_heads {
                let rows = random.bytes(head_bytes);
                source.write(LayerIdx(layer), PageId(page), part / 2, part % 2 == 1, &rows);
            }
        }
    }
    let tokens = 1 + random.below(shape.chunk_tokens);
    let needed = shape.pages(tokens) as usize;
    let (from, to) = (random.pages(pool, needed), random.pages(pool, needed));
    for layer in (0..shape.layers).map(LayerIdx) {
        let mut packed = vec![0; tokens as usize * shape.layer_token_bytes()];
        let sent = kernels.pack(&source, layer, &from, tokens, &mut packed).expect(case);
        assert_eq!(sent, checksum(&packed), "{case}: pack's checksum");
        let received = kernels.scatter(&mut target, layer, &to, tokens, &packed).expect(case);
        assert_eq!(received, sent, "{case}: scatter's checksum");
        for part in 0..2 * shape.kv_heads {
            let (head, value) = (part / 2, part % 2 == 1);
            let at = shape.packed_head_offset(head as usize, value, tokens);
            for token in 0..tokens as usize {
                let (page, row) = (token / shape.page_tokens as usize, token % shape.page_tokens as usize);
                let row = row * shape.row_bytes()..(row + 1) * shape.row_bytes();
                let want = &source.read(layer, from[page], head, value)[row.clone()];
                assert_eq!(&packed[at + token * want.len()..][..want.len()], want, "{case}: packed row");
                assert_eq!(&target.read(layer, to[page], head, value)[row], want, "{case}: scattered row");
            }
        }
    }
    check_untouched(&target, &shape, &to, tokens, case);
    check_refusals(kernels, &mut target, shape, tokens, &to, case);
}

/// What no token was scattered to still holds the zeros it began with.
fn check_untouched<P: PagesUnderTest>(pages: &P, shape: &KvShape, used: &[PageId], tokens: u32, case: &str) {
    let pool = shape.chunk_tokens / shape.page_tokens * 2 + 1;
    for page in (0..pool).map(PageId) {
        let filled = used.iter().position(|p| *p == page).map_or(0, |index| {
            (tokens - index as u32 * shape.page_tokens).min(shape.page_tokens) as usize * shape.row_bytes()
        });
        for layer in 0..shape.layers {
            for part in 0..2 * shape.kv_heads {
                let rows = pages.read(LayerIdx(layer), page, part / 2, part % 2 == 1);
                assert!(rows[filled..].iter().all(|b| *b == 0), "{case}: page {page} was overwritten");
            }
        }
    }
}

fn check_refusals<K: Kernels>(
    kernels: &K,
    pages: &mut K::Pages,
    shape: KvShape,
    tokens: u32,
    table: &[PageId],
    case: &str,
) where
    K::Pages: PagesUnderTest,
{
    let len = tokens as usize * shape.layer_token_bytes();
    let mut refuse = |layer: u32, table: &[PageId], tokens: u32, len: usize, want: fn(&PackError) -> bool| {
        let mut bytes = vec![1; len];
        let packed = kernels.pack(pages, LayerIdx(layer), table, tokens, &mut bytes);
        assert!(packed.as_ref().is_err_and(want), "{case}: pack gave {packed:?}");
        assert!(bytes.iter().all(|b| *b == 1), "{case}: a refused pack wrote");
        let scattered = kernels.scatter(pages, LayerIdx(layer), table, tokens, &bytes);
        assert!(scattered.as_ref().is_err_and(want), "{case}: scatter gave {scattered:?}");
    };
    refuse(shape.layers, table, tokens, len, |e| matches!(e, PackError::NoSuchLayer { .. }));
    refuse(0, table, 0, len, |e| matches!(e, PackError::Tokens { .. }));
    refuse(0, table, shape.chunk_tokens + 1, len, |e| matches!(e, PackError::Tokens { .. }));
    refuse(0, &table[1..], tokens, len, |e| matches!(e, PackError::Pages { .. }));
    refuse(0, table, tokens, len + 1, |e| matches!(e, PackError::Extent { .. }));
    let mut outside = table.to_vec();
    outside[0] = PageId(u32::MAX);
    refuse(0, &outside, tokens, len, |e| matches!(e, PackError::NoSuchPage { .. }));
    if table.len() > 1 {
        let twice = vec![table[0]; table.len()];
        let scattered = kernels.scatter(pages, LayerIdx(0), &twice, tokens, &vec![1; len]);
        assert!(matches!(scattered, Err(PackError::PageTwice { .. })), "{case}: scatter gave {scattered:?}");
    }
}

/// SplitMix64: the contract draws its own cases, so that backends need no test crate.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, end: u32) -> u32 {
        (self.next() % u64::from(end)) as u32
    }
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
    /// `count` distinct pages of a pool.
    fn pages(&mut self, pool: u32, count: usize) -> Vec<PageId> {
        let mut pages: Vec<PageId> = (0..pool).map(PageId).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, self.below(i as u32 + 1) as usize);
        }
        pages.truncate(count);
        pages
    }
}
