//! The kernels on a real GPU, against the CPU. Without one, each test says that it was skipped, and passes.
//! `TANDEM_SEED=N` plays other cases.

use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroU32;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_kernels::contract::{self, Random};
use tandem_kernels::cuda::{
    Chunk, CudaKernels, CudaPacker, DevicePages, KvDevicePages, Place, Plan, PlanError, PlanLimits, Share,
};
use tandem_kernels::{Kernels, Order, PackError, Paged, PagedLayout, Stored, Ticket, checksum};
use tandem_memory::cuda::{Device, DeviceExtent, DeviceRegion, IpcHandle};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::{KvDtype, KvShape};

/// A GPU with the kernels loaded.
struct Gpu {
    kernels: Arc<CudaKernels>,
    stream: Arc<cudarc::driver::CudaStream>,
}

impl Gpu {
    fn open(ordinal: usize) -> Option<Gpu> {
        let device = Device::open_or_skip(ordinal)?;
        let kernels = CudaKernels::load(&device).unwrap();
        Some(Gpu { kernels, stream: device.stream().unwrap() })
    }

    fn holding(&self, bytes: &[u8]) -> DeviceExtent {
        let region = DeviceRegion::take(self.kernels.device(), bytes.len()).unwrap();
        let extent = region.extent(0..bytes.len()).unwrap();
        extent.write(&self.stream, bytes).unwrap();
        extent
    }

    fn read(&self, extent: &DeviceExtent) -> Vec<u8> {
        let mut bytes = vec![0; extent.len()];
        extent.read(&self.stream, &mut bytes).unwrap();
        bytes
    }

    fn plan(&self, limits: PlanLimits) -> Plan {
        Plan::new(&self.kernels, &self.stream, limits).unwrap()
    }
}

fn seed() -> u64 {
    std::env::var("TANDEM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// A layout as engines have them, and some that none has.
fn layout(random: &mut Random) -> PagedLayout {
    let (stored, heads, dim) = match random.below(4) {
        0 => (Stored::Latent, 1, 576),
        1 => (Stored::KeysAndValues, 1 + random.below(5), 1 + random.below(70)),
        _ => (Stored::KeysAndValues, random.one(&[1, 2, 4, 8]), random.one(&[64, 80, 96, 128, 256])),
    };
    PagedLayout {
        layers: 1 + random.below(4),
        pages: 0,
        page_tokens: random.one(&[16, 32, 64, 128, 5]),
        heads,
        stored,
        // fp8, f16 and bf16, f32.
        row_bytes: dim * random.one(&[1, 2, 2, 4]),
        order: random.one(&[Order::Heads, Order::Tokens]),
    }
}

/// Chunks of random lengths whose pages are distinct, in pools somewhat larger.
struct Case {
    here: PagedLayout,
    there: PagedLayout,
    chunks: Vec<(u32, Vec<PageId>, Vec<PageId>)>,
}

impl Case {
    fn draw(random: &mut Random) -> Case {
        let here = layout(random);
        let tokens: Vec<u32> = (0..1 + random.below(4)).map(|_| 1 + random.below(300)).collect();
        let needed = |tokens: u32| tokens.div_ceil(here.page_tokens);
        let all: u32 = tokens.iter().copied().map(needed).sum();
        let here = PagedLayout { pages: all + 3, ..here };
        let there = PagedLayout { pages: all + 1, order: random.one(&[Order::Heads, Order::Tokens]), ..here };
        let (mut from, mut to) =
            (random.pages(here.pages, here.pages as usize), random.pages(there.pages, there.pages as usize));
        let mut take = |tokens: u32| {
            let at = needed(tokens) as usize;
            (tokens, from.drain(..at).collect(), to.drain(..at).collect())
        };
        Case { here, there, chunks: tokens.into_iter().map(&mut take).collect() }
    }

    fn limits(&self) -> PlanLimits {
        let pages = self.chunks.iter().map(|(_, pages, _)| pages.len()).sum();
        PlanLimits { chunks: self.chunks.len(), pages, layers: self.here.layers }
    }

    fn packed_bytes(&self, tokens: u32) -> usize {
        self.here.layer_bytes(tokens) * self.here.layers as usize
    }
}

/// What the CPU makes of a case.
struct Reference {
    /// Each chunk, packed.
    packed: Vec<Vec<u8>>,
    /// `[layer][chunk]`.
    sums: Vec<u64>,
}

impl Reference {
    fn of(case: &Case, pool: &[u8]) -> Reference {
        let mut packed: Vec<Vec<u8>> =
            case.chunks.iter().map(|(tokens, ..)| vec![0; case.packed_bytes(*tokens)]).collect();
        let mut sums = Vec::new();
        for layer in 0..case.here.layers {
            for ((tokens, pages, _), packed) in case.chunks.iter().zip(&mut packed) {
                let len = case.here.layer_bytes(*tokens);
                let out = &mut packed[layer as usize * len..][..len];
                sums.push(case.here.pack(pool, LayerIdx(layer), pages, *tokens, out));
            }
        }
        Reference { packed, sums }
    }

    /// A pool after the packed chunks were scattered to it.
    fn scattered(&self, case: &Case, layout: &PagedLayout, there: bool, mut pool: Vec<u8>) -> Vec<u8> {
        for ((tokens, here_pages, there_pages), packed) in case.chunks.iter().zip(&self.packed) {
            let pages = if there { there_pages } else { here_pages };
            let len = case.here.layer_bytes(*tokens);
            for layer in 0..layout.layers {
                let packed = &packed[layer as usize * len..][..len];
                layout.scatter(&mut pool, LayerIdx(layer), pages, *tokens, packed);
            }
        }
        pool
    }
}

#[test]
fn agrees_with_the_cpu() {
    let Some(gpu) = Gpu::open(0) else { return };
    let mut random = Random(seed());
    for round in 0..150 {
        let case = Case::draw(&mut random);
        let name = format!("seed {}, round {round}, {:?}", seed(), case.here);
        check(&gpu, &case, &mut random, &name);
    }
}

/// Pack, scatter, carry and digest, each of all layers at once or one by one.
fn check(gpu: &Gpu, case: &Case, random: &mut Random, name: &str) {
    let pool = random.bytes(case.here.bytes());
    let want = Reference::of(case, &pool);
    let source = DevicePages::new(case.here, gpu.holding(&pool)).unwrap();
    // Something of its own before, between and behind the chunks.
    let gap = random.one(&[16, 64, 3]);
    let mut places = Vec::new();
    let mut expected = vec![0xee; gap];
    for packed in &want.packed {
        places.push(expected.len()..expected.len() + packed.len());
        expected.extend(packed);
        expected.resize(expected.len() + gap, 0xee);
    }
    let landing = gpu.holding(&vec![0xee; expected.len()]);
    let extents: Vec<DeviceExtent> = places.into_iter().map(|place| landing.part(place).unwrap()).collect();
    let chunks: Vec<Chunk<'_>> = (case.chunks.iter().zip(&extents))
        .map(|((tokens, pages, _), extent)| Chunk { tokens: *tokens, pages, place: Place::Packed(extent) })
        .collect();
    let all = 0..case.here.layers;
    let share = Share {
        checksum: true,
        multiprocessors: random.one(&[None, NonZeroU32::new(1), NonZeroU32::new(32)]),
    };
    let mut plan = gpu.plan(case.limits());
    plan.set(&case.here, None, &chunks).unwrap();
    plan.pack(&source, all.clone(), share).unwrap();
    // Those of the layers one by one, without waiting.
    for layer in all.clone() {
        plan.fetch_checksums(layer..layer + 1).unwrap();
    }
    let again = plan.fetch_checksums(all.clone());
    assert!(matches!(again, Err(PlanError::Fetched { .. })), "{name}: asked for twice");
    let mut sums = Vec::new();
    let began = Instant::now();
    while sums.len() < want.sums.len() {
        assert!(began.elapsed() < Duration::from_secs(10), "{name}: checksums do not come");
        if let Some(some) = plan.poll_checksums().unwrap() {
            assert_eq!(some.layers.start as usize * case.chunks.len(), sums.len(), "{name}: out of order");
            sums.extend(some.sums);
        }
    }
    assert_eq!(plan.poll_checksums().unwrap(), None, "{name}: more than was asked for");
    assert_eq!(sums, want.sums, "{name}: pack's checksums");
    assert!(gpu.read(&landing) == expected, "{name}: packed");

    let blank = random.bytes(case.here.bytes());
    let target = DevicePages::new(case.here, gpu.holding(&blank)).unwrap();
    for layer in all.clone() {
        plan.scatter(&target, layer..layer + 1, share).unwrap();
    }
    assert_eq!(plan.checksums(all.clone()).unwrap(), want.sums, "{name}: scatter's checksums");
    assert!(
        gpu.read(target.storage()) == want.scattered(case, &case.here, false, blank),
        "{name}: scattered"
    );

    plan.digest(&target, all.clone()).unwrap();
    assert_eq!(plan.checksums(all.clone()).unwrap(), want.sums, "{name}: digests");

    // The same without checksums, over what is there.
    landing.write(&gpu.stream, &vec![0xee; expected.len()]).unwrap();
    plan.pack(&target, all.clone(), Share { checksum: false, ..share }).unwrap();
    assert!(gpu.read(&landing) == expected, "{name}: packed without checksums");

    let blank = random.bytes(case.there.bytes());
    let target = DevicePages::new(case.there, gpu.holding(&blank)).unwrap();
    let chunks: Vec<Chunk<'_>> = (case.chunks.iter())
        .map(|(tokens, pages, there)| Chunk { tokens: *tokens, pages, place: Place::Pages(there) })
        .collect();
    plan.set(&case.here, Some(&case.there), &chunks).unwrap();
    plan.carry(&source, &target, all.clone(), share).unwrap();
    assert_eq!(plan.checksums(all).unwrap(), want.sums, "{name}: carry's checksums");
    assert!(gpu.read(target.storage()) == want.scattered(case, &case.there, true, blank), "{name}: carried");
}

/// What cannot be moved is refused, and what was moved once is not moved again by mistake.
#[test]
fn refuses_what_makes_no_sense() {
    let Some(gpu) = Gpu::open(0) else { return };
    let layout = PagedLayout {
        layers: 2,
        pages: 4,
        page_tokens: 16,
        heads: 2,
        stored: Stored::KeysAndValues,
        row_bytes: 64,
        order: Order::Heads,
    };
    let pages = DevicePages::new(layout, gpu.holding(&vec![0; layout.bytes()])).unwrap();
    assert!(matches!(
        DevicePages::new(PagedLayout { pages: 5, ..layout }, pages.storage().clone()),
        Err(PlanError::Storage { .. })
    ));
    let packed = gpu.holding(&vec![0; layout.layer_bytes(20) * 2]);
    let mut plan = gpu.plan(PlanLimits { chunks: 1, pages: 2, layers: 2 });
    assert!(matches!(plan.pack(&pages, 0..1, Share::default()), Err(PlanError::Unset)));
    let table = [PageId(3), PageId(0)];
    let good = Chunk { tokens: 20, pages: &table, place: Place::Packed(&packed) };
    let mut refused = |chunk: Chunk<'_>, problem: &str| {
        let error = plan.set(&layout, None, &[chunk]).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    };
    refused(Chunk { tokens: 0, ..good }, "0 tokens");
    refused(Chunk { tokens: 33, ..good }, "which lie in 3");
    refused(Chunk { tokens: 19, ..good }, "but 9728 are needed");
    refused(Chunk { pages: &[PageId(3), PageId(4)], ..good }, "page 4 lies outside");
    refused(Chunk { place: Place::Pages(&table[..1]), ..good }, "1 pages given");
    assert!(matches!(plan.set(&layout, None, &[good, good]), Err(PlanError::Limit { .. })));
    plan.set(&layout, None, &[Chunk { pages: &[PageId(1), PageId(1)], ..good }]).unwrap();
    plan.pack(&pages, 0..2, Share::default()).unwrap();
    assert!(matches!(plan.scatter(&pages, 0..2, Share::default()), Err(PlanError::PageTwice { .. })));
    plan.set(&layout, None, &[good]).unwrap();
    assert!(matches!(plan.pack(&pages, 1..3, Share::default()), Err(PlanError::Layers { .. })));
    assert!(matches!(plan.carry(&pages, &pages, 0..1, Share::default()), Err(PlanError::OtherPlaces { .. })));
    let other = PagedLayout { order: Order::Tokens, ..layout };
    let other = DevicePages::new(other, pages.storage().clone()).unwrap();
    assert!(matches!(plan.pack(&other, 0..1, Share::default()), Err(PlanError::OtherLayout { .. })));
}

/// The contract of `Kernels`, on a GPU.
#[test]
fn keeps_the_contract() {
    let Some(gpu) = Gpu::open(0) else { return };
    // Its plans are to be large enough for any shape of the contract.
    let shape = KvShape {
        layers: 1,
        kv_heads: 1,
        head_dim: 1,
        page_tokens: 16,
        chunk_tokens: 16 * 6,
        dtype: KvDtype::F32,
    };
    let packer = CudaPacker::new(&gpu.kernels, &shape).unwrap();
    contract::check(&mut Packer { gpu, packer }, seed(), 60);
}

/// A [`CudaPacker`] whose pages and memory the contract can see.
struct Packer {
    gpu: Gpu,
    packer: CudaPacker,
}

fn rows(kv: &KvDevicePages, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> DeviceExtent {
    let layout = kv.device_pages().layout();
    let start = layout.row(layer, page, kv_head, u32::from(value), 0);
    let len = layout.page_tokens as usize * layout.row_bytes as usize;
    kv.device_pages().storage().part(start..start + len).unwrap()
}

impl contract::UnderTest for Packer {
    type Kernels = CudaPacker;

    fn kernels(&mut self) -> &mut CudaPacker {
        &mut self.packer
    }
    fn pool(&self, shape: KvShape, pages: u32) -> KvDevicePages {
        KvDevicePages::new(self.gpu.kernels.device(), shape, pages).unwrap()
    }
    fn read(&self, kv: &KvDevicePages, layer: LayerIdx, page: PageId, kv_head: u32, value: bool) -> Vec<u8> {
        self.gpu.read(&rows(kv, layer, page, kv_head, value))
    }
    fn write(
        &self,
        kv: &mut KvDevicePages,
        layer: LayerIdx,
        page: PageId,
        kv_head: u32,
        value: bool,
        bytes: &[u8],
    ) {
        rows(kv, layer, page, kv_head, value).write(&self.gpu.stream, bytes).unwrap();
    }
    fn packed(&self, extent: &Extent) -> Vec<u8> {
        match extent.on_device() {
            Some(twin) => self.gpu.read(&twin),
            // SAFETY: the contract has the extent to itself, and waits for what it began.
            None => unsafe { extent.bytes() }.to_vec(),
        }
    }
    fn fill(&self, extent: &Extent, bytes: &[u8]) {
        extent.on_device().unwrap().write(&self.gpu.stream, bytes).unwrap();
    }
}

/// Layers of several chunks at once, right behind what a stream writes to their pages, and a copy of a page.
#[test]
fn packs_what_is_queued() {
    let Some(gpu) = Gpu::open(0) else { return };
    let shape = KvShape {
        layers: 5,
        kv_heads: 2,
        head_dim: 64,
        page_tokens: 16,
        chunk_tokens: 64,
        dtype: KvDtype::F16,
    };
    let (device, mut random) = (gpu.kernels.device(), Random(seed()));
    let mut kv = KvDevicePages::new(device, shape, 40).unwrap();
    let mut packer = CudaPacker::new(&gpu.kernels, &shape).unwrap();
    let layer_bytes = 64 * shape.layer_token_bytes();
    let memory = packer.memory(layer_bytes * 5 * 8).unwrap();
    let pool = random.bytes(kv.device_pages().layout().bytes());
    let ready = gpu.holding(&pool);
    let pages = random.pages(40, 40);
    let chunk_of = |chunk: usize| &pages[chunk * 4..chunk * 4 + 4];
    let out = |layer: u32, chunk: usize| {
        let at = (layer as usize * 8 + chunk) * layer_bytes;
        memory.extent(at..at + layer_bytes).unwrap()
    };
    let mut done = Vec::new();
    for layer in 0..5 {
        let part = kv.device_pages().layout().bytes() / 5;
        let range = layer as usize * part..(layer as usize + 1) * part;
        let to = kv.device_pages().storage().part(range.clone()).unwrap();
        ready.part(range).unwrap().copy_to(&gpu.stream, &to).unwrap();
        kv.written(LayerIdx(layer), &gpu.stream).unwrap();
        for chunk in 0..8 {
            let ticket = Ticket(u64::from(layer) * 8 + chunk as u64);
            // SAFETY: nobody else uses the memory.
            unsafe {
                packer.pack(ticket, &kv, LayerIdx(layer), chunk_of(chunk), 64, &out(layer, chunk)).unwrap();
            }
        }
        packer.poll(&mut done).unwrap();
    }
    let until = Instant::now() + Duration::from_secs(20);
    while packer.under_way() > 0 {
        assert!(Instant::now() < until, "{} are not over", packer.under_way());
        packer.poll(&mut done).unwrap();
    }
    let layout = *kv.device_pages().layout();
    for layer in 0..5 {
        for chunk in 0..8 {
            let mut want = vec![0; layer_bytes];
            let sum = layout.pack(&pool, LayerIdx(layer), chunk_of(chunk), 64, &mut want);
            assert!(
                gpu.read(&out(layer, chunk).on_device().unwrap()) == want,
                "layer {layer}, chunk {chunk}"
            );
            let told = done.iter().find(|c| c.ticket.0 == u64::from(layer) * 8 + chunk as u64);
            assert_eq!(told.map(|told| told.checksum), Some(sum), "layer {layer}, chunk {chunk}");
        }
    }
    kv.copy_page(PageId(3), PageId(9)).unwrap();
    for layer in 0..5 {
        for part in 0..4 {
            let of = |page| gpu.read(&rows(&kv, LayerIdx(layer), PageId(page), part / 2, part % 2 == 1));
            assert_eq!(of(3), of(9));
        }
    }
    assert!(kv.copy_page(PageId(3), PageId(40)).is_err());
    let plain = HostRegion::map(layer_bytes).unwrap().extent(0..layer_bytes).unwrap();
    // SAFETY: nobody else uses the memory.
    let refused = unsafe { packer.pack(Ticket(0), &kv, LayerIdx(0), chunk_of(0), 64, &plain) };
    assert!(matches!(refused, Err(PackError::Unreached { .. })), "{refused:?}");
}

/// Begins to pack, or to scatter, one layer after the other of chunks of `pages` to `memory`; waits until all is over, and
/// tells the checksums in this order.
fn convert(
    packer: &mut CudaPacker,
    kv: &mut KvDevicePages,
    chunks: &[&[PageId]],
    memory: &Arc<HostRegion>,
    pack: bool,
) -> Vec<u64> {
    let shape = *kv.shape();
    let len = shape.packed_layer(LayerIdx(0), shape.chunk_tokens).len();
    let count = chunks.len() * shape.layers as usize;
    let (mut sums, mut done) = (vec![0; count], Vec::new());
    for ticket in 0..count {
        let name = Ticket(ticket as u64);
        let (chunk, layer) = (ticket / shape.layers as usize, LayerIdx(ticket as u32 % shape.layers));
        let extent = memory.extent(ticket * len..(ticket + 1) * len).unwrap();
        // SAFETY: nobody uses the memory before all is over.
        let begun = unsafe {
            if pack {
                packer.pack(name, kv, layer, chunks[chunk], shape.chunk_tokens, &extent)
            } else {
                packer.scatter(name, kv, layer, chunks[chunk], shape.chunk_tokens, &extent)
            }
        };
        begun.unwrap();
    }
    let until = Instant::now() + Duration::from_secs(20);
    while packer.under_way() > 0 {
        assert!(Instant::now() < until, "{} are not over", packer.under_way());
        packer.poll(&mut done).unwrap();
    }
    assert_eq!(done.len(), count);
    done.iter().for_each(|over| sums[over.ticket.0 as usize] = over.checksum);
    sums
}

/// Chunks of the 8B shape go to pinned memory of the host and back to other pages; the CPU says what they are. How fast,
/// beside plain copies of the same bytes, is printed.
#[test]
fn keeps_chunks_in_host_memory() {
    let Some(gpu) = Gpu::open(0) else { return };
    const CHUNKS: usize = 16;
    let shape = KvShape {
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        page_tokens: 16,
        chunk_tokens: 256,
        dtype: KvDtype::Bf16,
    };
    let (device, mut random) = (gpu.kernels.device(), Random(seed()));
    let per_chunk = shape.pages(shape.chunk_tokens) as usize;
    let pages = random.pages((2 * CHUNKS * per_chunk) as u32, 2 * CHUNKS * per_chunk);
    let (from, to) = pages.split_at(CHUNKS * per_chunk);
    let [from, to] = [from, to].map(|pages| pages.chunks(per_chunk).collect::<Vec<_>>());
    let mut kv = KvDevicePages::new(device, shape, pages.len() as u32).unwrap();
    let mut packer = CudaPacker::new(&gpu.kernels, &shape).unwrap();
    let bytes = CHUNKS * shape.packed_bytes(shape.chunk_tokens);
    let memory = packer.host_memory(bytes).unwrap();
    let layout = *kv.device_pages().layout();
    let pool = random.bytes(layout.bytes());
    kv.device_pages().storage().write(&gpu.stream, &pool).unwrap();

    let rate = |begun: Instant| bytes as f64 / 1e9 / begun.elapsed().as_secs_f64();
    let (mut packed, mut scattered) = (0.0f64, 0.0f64);
    let mut sums = Vec::new();
    for _ in 0..3 {
        let begun = Instant::now();
        sums = convert(&mut packer, &mut kv, &from, &memory, true);
        packed = packed.max(rate(begun));
    }
    let all = memory.extent(0..bytes).unwrap();
    // SAFETY: everything is over.
    let kept = unsafe { all.bytes() };
    let len = bytes / sums.len();
    let mut want = vec![0; len];
    for (at, sum) in sums.iter().enumerate() {
        let (chunk, layer) = (at / shape.layers as usize, LayerIdx(at as u32 % shape.layers));
        assert_eq!(layout.pack(&pool, layer, from[chunk], shape.chunk_tokens, &mut want), *sum);
        assert!(kept[at * len..(at + 1) * len] == want, "chunk {chunk}, layer {layer}");
    }
    for _ in 0..3 {
        let begun = Instant::now();
        assert_eq!(convert(&mut packer, &mut kv, &to, &memory, false), sums, "scatter's checksums");
        scattered = scattered.max(rate(begun));
    }
    for (a, b) in from.concat().into_iter().zip(to.concat()).step_by(37) {
        for (layer, part) in (0..shape.layers).flat_map(|layer| [0, 1, 14, 15].map(|part| (layer, part))) {
            let of = |page| gpu.read(&rows(&kv, LayerIdx(layer), page, part / 2, part % 2 == 1));
            assert!(of(a) == of(b), "layer {layer}, page {b}");
        }
    }
    let twin = HostRegion::with_twin(device, bytes).unwrap().extent(0..bytes).unwrap();
    let (mut fetched, mut deposited) = (0.0f64, 0.0f64);
    for _ in 0..3 {
        let begun = Instant::now();
        // SAFETY: nobody else has this memory.
        unsafe { twin.fetch() }.unwrap();
        fetched = fetched.max(rate(begun));
        let begun = Instant::now();
        twin.deposit().unwrap();
        deposited = deposited.max(rate(begun));
    }
    println!("to the host: {packed:.1} GB/s packed, {fetched:.1} copied");
    println!("from the host: {scattered:.1} GB/s scattered, {deposited:.1} copied");
    for multiprocessors in [2, 4, 8, 16, 32, 64, 128].map(NonZeroU32::new) {
        let share = Share { checksum: true, multiprocessors };
        let [pack, scatter] = host_rates(&gpu, &kv, &from, &all, share);
        println!("{multiprocessors:?} multiprocessors: {pack:.1} GB/s packed, {scatter:.1} scattered");
    }
}

/// GB/s of packing whole chunks to memory of the host and of scattering them again, with this share of the GPU.
fn host_rates(
    gpu: &Gpu,
    kv: &KvDevicePages,
    chunks: &[&[PageId]],
    memory: &Extent,
    share: Share,
) -> [f64; 2] {
    let shape = *kv.shape();
    let len = shape.packed_bytes(shape.chunk_tokens);
    let parts: Vec<DeviceExtent> = (0..chunks.len())
        .map(|chunk| memory.part(chunk * len..(chunk + 1) * len).unwrap().mapped_on_device().unwrap())
        .collect();
    let whole: Vec<Chunk<'_>> = (chunks.iter().zip(&parts))
        .map(|(pages, part)| Chunk { tokens: shape.chunk_tokens, pages, place: Place::Packed(part) })
        .collect();
    let pages = chunks.iter().map(|pages| pages.len()).sum();
    let mut plan = gpu.plan(PlanLimits { chunks: chunks.len(), pages, layers: shape.layers });
    plan.set(kv.device_pages().layout(), None, &whole).unwrap();
    [true, false].map(|pack| {
        let mut best = 0.0f64;
        for _ in 0..3 {
            let begun = Instant::now();
            match pack {
                true => plan.pack(kv.device_pages(), 0..shape.layers, share).unwrap(),
                false => plan.scatter(kv.device_pages(), 0..shape.layers, share).unwrap(),
            }
            plan.checksums(0..shape.layers).unwrap();
            best = best.max(memory.len() as f64 / 1e9 / begun.elapsed().as_secs_f64());
        }
        best
    })
}

/// The case that two processes share: both can draw it.
fn shared_case() -> (Case, Vec<u8>) {
    let mut random = Random(seed() + 1000);
    let mut case = Case::draw(&mut random);
    while !case.here.row_bytes.is_multiple_of(16) {
        case = Case::draw(&mut random);
    }
    let pool = random.bytes(case.here.bytes());
    (case, pool)
}

/// Not a test of its own: what [`packs_into_the_memory_of_another_process`] starts.
#[test]
#[ignore = "started by another test"]
fn owner() {
    let Some(gpu) = Gpu::open(Device::count().unwrap() - 1) else { return };
    let (case, pool) = shared_case();
    let packed: usize = case.chunks.iter().map(|(tokens, ..)| case.packed_bytes(*tokens)).sum();
    let landing = gpu.holding(&vec![0; packed]);
    let blank = vec![0x55; case.there.bytes()];
    let pages = gpu.holding(&blank);
    for extent in [&landing, &pages] {
        println!("handle {}", extent.region().export().unwrap());
    }
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let want = Reference::of(&case, &pool);
    assert!(gpu.read(&landing) == want.packed.concat(), "packed by the other process");
    assert!(
        gpu.read(&pages) == want.scattered(&case, &case.there, true, blank),
        "carried by the other process"
    );
    let there = DevicePages::new(case.there, pages).unwrap();
    let chunks: Vec<Chunk<'_>> = (case.chunks.iter())
        .map(|(tokens, _, pages)| Chunk { tokens: *tokens, pages, place: Place::Nowhere })
        .collect();
    let mut plan = gpu.plan(case.limits());
    plan.set(&case.there, None, &chunks).unwrap();
    plan.digest(&there, 0..case.there.layers).unwrap();
    assert_eq!(plan.checksums(0..case.there.layers).unwrap(), want.sums);
}

#[test]
fn packs_into_the_memory_of_another_process() {
    let Some(gpu) = Gpu::open(0) else { return };
    println!("from GPU 0 to GPU {}", Device::count().unwrap() - 1);
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner", "--ignored", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Heard to its end: the owner fails when it is not.
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines().map_while(Result::ok);
    let handles: Vec<IpcHandle> = (lines.by_ref())
        .filter_map(|line| Some(line.split_once("handle ")?.1.parse().unwrap()))
        .take(2)
        .collect();
    let (case, pool) = shared_case();
    let want = Reference::of(&case, &pool);
    let source = DevicePages::new(case.here, gpu.holding(&pool)).unwrap();
    let import = |handle: &IpcHandle, len: usize| {
        DeviceRegion::import(gpu.kernels.device(), handle, len).unwrap().extent(0..len).unwrap()
    };
    let landing = import(&handles[0], want.packed.iter().map(Vec::len).sum());
    let mut at = 0;
    let extents: Vec<DeviceExtent> = (want.packed.iter())
        .map(|packed| {
            at += packed.len();
            landing.part(at - packed.len()..at).unwrap()
        })
        .collect();
    let chunks: Vec<Chunk<'_>> = (case.chunks.iter().zip(&extents))
        .map(|((tokens, pages, _), extent)| Chunk { tokens: *tokens, pages, place: Place::Packed(extent) })
        .collect();
    let layers = 0..case.here.layers;
    let share = Share { checksum: true, multiprocessors: NonZeroU32::new(32) };
    let mut plan = gpu.plan(case.limits());
    plan.set(&case.here, None, &chunks).unwrap();
    plan.pack(&source, layers.clone(), share).unwrap();
    assert_eq!(plan.checksums(layers.clone()).unwrap(), want.sums);
    let there = DevicePages::new(case.there, import(&handles[1], case.there.bytes())).unwrap();
    let chunks: Vec<Chunk<'_>> = (case.chunks.iter())
        .map(|(tokens, pages, there)| Chunk { tokens: *tokens, pages, place: Place::Pages(there) })
        .collect();
    plan.set(&case.here, Some(&case.there), &chunks).unwrap();
    plan.carry(&source, &there, layers.clone(), share).unwrap();
    assert_eq!(plan.checksums(layers).unwrap(), want.sums);
    owner.stdin.take().unwrap().write_all(b"\n").unwrap();
    lines.for_each(|line| println!("owner: {line}"));
    assert!(owner.wait().unwrap().success(), "the owner found something else in its memory");
}

/// The hash of the kernels is XXH3's: one piece whose every byte counts.
#[test]
fn every_byte_counts() {
    let Some(gpu) = Gpu::open(0) else { return };
    let layout = PagedLayout {
        layers: 1,
        pages: 1,
        page_tokens: 16,
        heads: 1,
        stored: Stored::Latent,
        row_bytes: 256,
        order: Order::Heads,
    };
    let mut plan = gpu.plan(PlanLimits { chunks: 1, pages: 1, layers: 1 });
    plan.set(&layout, None, &[Chunk { tokens: 16, pages: &[PageId(0)], place: Place::Nowhere }]).unwrap();
    let mut bytes = Random(seed()).bytes(4096);
    for at in (0..4096).step_by(13) {
        bytes[at] ^= 1 << (at % 8);
        let pages = DevicePages::new(layout, gpu.holding(&bytes)).unwrap();
        plan.digest(&pages, 0..1).unwrap();
        assert_eq!(plan.checksums(0..1).unwrap(), [checksum(&bytes)], "byte {at}");
    }
}
