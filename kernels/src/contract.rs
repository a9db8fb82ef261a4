//! What every implementation of [`Kernels`] must do, as a test that any backend can run.

use crate::{Converted, CpuKernels, Kernels, KvPages, PackError, Ticket, checksum};
use std::time::{Duration, Instant};
use tandem_memory::Extent;
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::{KvDtype, KvShape};

/// An implementation, and how the contract sees its pages.
pub trait UnderTest {
    /// The implementation.
    type Kernels: Kernels;

    /// The implementation.
    fn kernels(&mut self) -> &mut Self::Kernels;
    /// Makes a pool of zeros.
    fn pool(&self, shape: KvShape, pages: u32) -> Pages<Self>;
    /// Reads all rows of one head's keys or values in a page.
    fn read(&self, kv: &Pages<Self>, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> Vec<u8>;
    /// Writes all rows of one head's keys or values in a page.
    fn write(
        &self,
        kv: &mut Pages<Self>,
        layer: LayerIdx,
        page: PageId,
        kv_head: u32,
        value: bool,
        rows: &[u8],
    );
    /// Reads an extent of its memory that nobody uses.
    fn packed(&self, extent: &Extent) -> Vec<u8>;
    /// Writes an extent of its memory that nobody uses.
    fn fill(&self, extent: &Extent, bytes: &[u8]);
}

/// The pages of what is tested.
pub type Pages<U> = <<U as UnderTest>::Kernels as Kernels>::Pages;

impl UnderTest for CpuKernels {
    type Kernels = CpuKernels;

    fn kernels(&mut self) -> &mut CpuKernels {
        self
    }
    fn pool(&self, shape: KvShape, pages: u32) -> KvPages {
        KvPages::new(shape, pages).expect("a small pool")
    }
    fn read(&self, kv: &KvPages, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> Vec<u8> {
        kv.head(layer, page, kv_head, value).to_vec()
    }
    fn write(&self, kv: &mut KvPages, layer: LayerIdx, page: PageId, kv_head: u32, value: bool, rows: &[u8]) {
        kv.head_mut(layer, page, kv_head, value).copy_from_slice(rows);
    }
    fn packed(&self, extent: &Extent) -> Vec<u8> {
        // SAFETY: the contract has the extent to itself, and waits for what it began.
        unsafe { extent.bytes() }.to_vec()
    }
    fn fill(&self, extent: &Extent, bytes: &[u8]) {
        // SAFETY: as above.
        unsafe { extent.bytes_mut() }.copy_from_slice(bytes);
    }
}

/// Runs the contract over `rounds` random shapes drawn from `seed`.
///
/// # Panics
/// When the implementation breaks it; the message names seed and round.
pub fn check<U: UnderTest>(tested: &mut U, seed: u64, rounds: u32) {
    let mut random = Random(seed);
    for round in 0..rounds {
        let shape = random_shape(&mut random);
        let case = format!("seed {seed}, round {round}, {shape:?}");
        check_shape(tested, shape, &mut random, &case);
    }
}

/// Waits until everything is over. What was begun is told once, and nothing else is.
fn finish<K: Kernels>(kernels: &mut K, begun: usize, case: &str) -> Vec<u64> {
    let mut sums = vec![None; begun];
    let until = Instant::now() + Duration::from_secs(20);
    let mut done = Vec::new();
    while kernels.under_way() > 0 {
        assert!(Instant::now() < until, "{case}: not over in 20 s");
        kernels.poll(&mut done).expect(case);
        for Converted { ticket, checksum } in done.drain(..) {
            let told = sums[ticket.0 as usize].replace(checksum);
            assert_eq!(told, None, "{case}: {ticket:?} was told twice");
        }
    }
    kernels.poll(&mut done).expect(case);
    assert_eq!(done, [], "{case}: told what was not begun");
    sums.into_iter().map(|sum| sum.expect(case)).collect()
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

/// Random bytes through random pages, several layers at once, and every refusal, for one shape.
fn check_shape<U: UnderTest>(tested: &mut U, shape: KvShape, random: &mut Random, case: &str) {
    let pool = shape.chunk_tokens / shape.page_tokens * 2 + 1;
    let mut source = tested.pool(shape, pool);
    let mut target = tested.pool(shape, pool);
    let head_bytes = shape.page_tokens as usize * shape.row_bytes();
    for layer in 0..shape.layers {
        for page in 0..pool {
            for part in 0..2 * shape.kv_heads {
                let rows = random.bytes(head_bytes);
                tested.write(&mut source, LayerIdx(layer), PageId(page), part / 2, part % 2 == 1, &rows);
            }
        }
    }
    let tokens = 1 + random.below(shape.chunk_tokens);
    let needed = shape.pages(tokens) as usize;
    let (from, to) = (random.pages(pool, needed), random.pages(pool, needed));
    let len = tokens as usize * shape.layer_token_bytes();
    let bytes = len * shape.layers as usize;
    let memory = match random.below(2) {
        0 => tested.kernels().memory(bytes).expect(case),
        _ => tested.kernels().host_memory(bytes).expect(case),
    };
    let layers = || (0..shape.layers).map(LayerIdx);
    let extent = |layer: LayerIdx| {
        memory.extent(layer.0 as usize * len..(layer.0 as usize + 1) * len).expect("in the memory")
    };
    for layer in layers() {
        // SAFETY: nobody uses the memory before all is over.
        unsafe {
            tested
                .kernels()
                .pack(Ticket(layer.0.into()), &source, layer, &from, tokens, &extent(layer))
                .expect(case);
        }
    }
    let sent = finish(tested.kernels(), shape.layers as usize, case);
    for layer in layers() {
        // SAFETY: as above.
        unsafe {
            tested
                .kernels()
                .scatter(Ticket(layer.0.into()), &mut target, layer, &to, tokens, &extent(layer))
                .expect(case);
        }
    }
    let received = finish(tested.kernels(), shape.layers as usize, case);
    assert_eq!(received, sent, "{case}: the checksums of scatter and of pack");
    for layer in layers() {
        let packed = tested.packed(&extent(layer));
        assert_eq!(sent[layer.0 as usize], checksum(&packed), "{case}: pack's checksum");
        for part in 0..2 * shape.kv_heads {
            let (head, value) = (part / 2, part % 2 == 1);
            let at = shape.packed_head_offset(head as usize, value, tokens);
            for token in 0..tokens as usize {
                let (page, row) = (token / shape.page_tokens as usize, token % shape.page_tokens as usize);
                let row = row * shape.row_bytes()..(row + 1) * shape.row_bytes();
                let want = &tested.read(&source, layer, from[page], head, value)[row.clone()];
                assert_eq!(&packed[at + token * want.len()..][..want.len()], want, "{case}: packed row");
                let landed = &tested.read(&target, layer, to[page], head, value)[row];
                assert_eq!(landed, want, "{case}: scattered row");
            }
        }
    }
    check_untouched(tested, &target, &shape, &to, tokens, case);
    check_refusals(tested, &mut target, shape, tokens, &to, case);
}

/// What no token was scattered to still holds the zeros it began with.
fn check_untouched<U: UnderTest>(
    tested: &U,
    pages: &Pages<U>,
    shape: &KvShape,
    used: &[PageId],
    tokens: u32,
    case: &str,
) {
    let pool = shape.chunk_tokens / shape.page_tokens * 2 + 1;
    for page in (0..pool).map(PageId) {
        let filled = used.iter().position(|p| *p == page).map_or(0, |index| {
            (tokens - index as u32 * shape.page_tokens).min(shape.page_tokens) as usize * shape.row_bytes()
        });
        for layer in 0..shape.layers {
            for part in 0..2 * shape.kv_heads {
                let rows = tested.read(pages, LayerIdx(layer), page, part / 2, part % 2 == 1);
                assert!(rows[filled..].iter().all(|b| *b == 0), "{case}: page {page} was overwritten");
            }
        }
    }
}

fn check_refusals<U: UnderTest>(
    tested: &mut U,
    pages: &mut Pages<U>,
    shape: KvShape,
    tokens: u32,
    table: &[PageId],
    case: &str,
) {
    let len = tokens as usize * shape.layer_token_bytes();
    let memory = tested.kernels().memory(len + 1).expect(case);
    let mut refuse = |layer: u32, table: &[PageId], tokens: u32, len: usize, want: fn(&PackError) -> bool| {
        let extent = memory.extent(0..len).expect("in the memory");
        tested.fill(&extent, &vec![1; len]);
        // SAFETY: nobody else uses the memory.
        let packed =
            unsafe { tested.kernels().pack(Ticket(0), pages, LayerIdx(layer), table, tokens, &extent) };
        assert!(packed.as_ref().is_err_and(want), "{case}: pack gave {packed:?}");
        // SAFETY: as above.
        let scattered =
            unsafe { tested.kernels().scatter(Ticket(0), pages, LayerIdx(layer), table, tokens, &extent) };
        assert!(scattered.as_ref().is_err_and(want), "{case}: scatter gave {scattered:?}");
        assert_eq!(tested.kernels().under_way(), 0, "{case}: what was refused was begun");
        assert!(tested.packed(&extent).iter().all(|b| *b == 1), "{case}: a refused pack wrote");
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
        let extent = memory.extent(0..len).expect("in the memory");
        // SAFETY: nobody else uses the memory.
        let scattered =
            unsafe { tested.kernels().scatter(Ticket(0), pages, LayerIdx(0), &twice, tokens, &extent) };
        assert!(matches!(scattered, Err(PackError::PageTwice { .. })), "{case}: scatter gave {scattered:?}");
    }
}

/// SplitMix64: the contract and those who test beside it draw their own cases, so that backends need no test crate.
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // It never ends, and is no iterator.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u32) -> u32 {
        (self.next() % u64::from(end)) as u32
    }
    /// One of these.
    pub fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u32) as usize]
    }
    /// Bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
    /// `count` distinct pages of a pool.
    pub fn pages(&mut self, pool: u32, count: usize) -> Vec<PageId> {
        let mut pages: Vec<PageId> = (0..pool).map(PageId).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, self.below(i as u32 + 1) as usize);
        }
        pages.truncate(count);
        pages
    }
}
