//! Which chunks lie where, told to the GPU once, and moved layer by layer.

use super::{BLOCK, CudaKernels, DevicePages, Kernel, LARGE_BLOCK};
use crate::checksum::PIECE_BYTES;
use crate::layout::PagedLayout;
use cudarc::driver::{CudaEvent, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg, result};
use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use tandem_memory::cuda::{CudaError, DeviceExtent, DeviceRegion, PinnedRegion};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::ids::PageId;

/// A chunk to be moved.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Its tokens.
    pub tokens: u32,
    /// The pages they lie in, or shall lie in.
    pub pages: &'a [PageId],
    /// Where they go, or come from.
    pub place: Place<'a>,
}

/// The other side of a chunk's pages.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// Packed: all layers of the chunk, in memory that the GPU reaches.
    Packed(&'a DeviceExtent),
    /// Other pages.
    Pages(&'a [PageId]),
    /// None: the pages are only read.
    Nowhere,
}

/// The kind of all places of a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlacesOf {
    /// [`Place::Packed`].
    Packed,
    /// [`Place::Pages`].
    Pages,
    /// [`Place::Nowhere`].
    Nowhere,
}

impl Place<'_> {
    fn kind(&self) -> PlacesOf {
        match self {
            Place::Packed(_) => PlacesOf::Packed,
            Place::Pages(_) => PlacesOf::Pages,
            Place::Nowhere => PlacesOf::Nowhere,
        }
    }
}

/// How much of the GPU a launch takes, and whether it computes checksums.
#[derive(Clone, Copy, Default, Debug)]
pub struct Share {
    /// Whether [`Plan::checksums`] is to know what was moved.
    pub checksum: bool,
    /// The most multiprocessors to use; all, if none is given. A link to another GPU needs a few only.
    pub multiprocessors: Option<NonZeroU32>,
}

/// What was moved of some layers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checksums {
    /// The layers.
    pub layers: Range<u32>,
    /// Their checksums, `[layer][chunk]`.
    pub sums: Vec<u64>,
}

/// What a plan can hold.
#[derive(Clone, Copy, Debug)]
pub struct PlanLimits {
    /// Chunks.
    pub chunks: usize,
    /// Pages of all chunks, on each side.
    pub pages: usize,
    /// Layers of the model.
    pub layers: u32,
}

/// Why chunks cannot be moved.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Pages and their memory differ in length.
    #[error("pages of {needed} bytes in memory of {len}")]
    Storage {
        /// Bytes of the memory.
        len: usize,
        /// Bytes of the pages.
        needed: usize,
    },
    /// The plan is too small.
    #[error("{what} are {count}, and the plan was made for {limit}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        count: usize,
        /// The most.
        limit: usize,
    },
    /// A chunk makes no sense.
    #[error("chunk {chunk}: {problem}")]
    Chunk {
        /// Its index in the plan.
        chunk: usize,
        /// What is wrong.
        problem: String,
    },
    /// A page is named twice, so two rows would land in one place.
    #[error("page {page} is named twice")]
    PageTwice {
        /// The page.
        page: PageId,
    },
    /// The layers do not exist.
    #[error("layers {}..{} of a model that has {layers}", range.start, range.end)]
    Layers {
        /// The layers asked for.
        range: Range<u32>,
        /// Layers of the model.
        layers: u32,
    },
    /// Pages of another layout than the plan was set for.
    #[error("{what} are {given:?}, and the plan was set for {set:?}")]
    OtherLayout {
        /// Which pages.
        what: &'static str,
        /// Their layout.
        given: Box<PagedLayout>,
        /// What it should be.
        set: Box<PagedLayout>,
    },
    /// The chunks have places of another kind than is needed.
    #[error("the plan's chunks go to or come from {places:?}, which this cannot do")]
    OtherPlaces {
        /// Of which kind they are.
        places: PlacesOf,
    },
    /// Checksums of a layer are under way already.
    #[error("checksums of layers {}..{} were asked for, and those of {}..{} are not taken yet", range.start, range.end, earlier.start, earlier.end)]
    Fetched {
        /// The layers asked for.
        range: Range<u32>,
        /// Those that were asked for before.
        earlier: Range<u32>,
    },
    /// The plan was never set, or not without an error.
    #[error("the plan has no chunks: set it first")]
    Unset,
    /// The GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Chunks whose pages and places the GPU knows. All its work goes to one stream, in order.
pub struct Plan {
    kernels: Arc<CudaKernels>,
    stream: Arc<CudaStream>,
    limits: PlanLimits,
    /// `[chunks][page table here][page table there]`, as long as the chunks set need, then `[layer][chunk]` sums at
    /// `sums`.
    device: Arc<DeviceRegion>,
    /// The same in host memory. Not written while a copy from it may be under way: until `sent`.
    host: PinnedRegion,
    sent: CudaEvent,
    /// Where the sums begin.
    sums: usize,
    set: Option<Set>,
    /// Of layers that do not overlap, in the stream's order.
    fetches: VecDeque<Fetch>,
}

/// Checksums on their way to the host.
struct Fetch {
    layers: Range<u32>,
    over: CudaEvent,
}

/// What the plan is set for.
struct Set {
    here: PagedLayout,
    there: Option<PagedLayout>,
    places: PlacesOf,
    tokens: Vec<u32>,
    /// Hold the memory that launches touch.
    _packed: Vec<DeviceExtent>,
    pages: usize,
    /// A page that is named twice: then nothing can be scattered to them.
    twice_here: Option<PageId>,
    twice_there: Option<PageId>,
    /// Whether every packed place begins at a multiple of 16 bytes.
    aligned: bool,
}

/// `n / divisor` for n below 2^31 by a multiplication.
#[repr(C)]
#[derive(Clone, Copy)]
struct Divisor {
    divisor: u32,
    magic: u32,
    shift: u32,
}

impl Divisor {
    fn new(divisor: u32) -> Divisor {
        let shift = divisor.next_power_of_two().trailing_zeros();
        let magic = ((1u64 << 32) * ((1 << shift) - u64::from(divisor)) / u64::from(divisor) + 1) as u32;
        Divisor { divisor, magic, shift }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawPages {
    base: u64,
    layer: u64,
    page: u64,
    head: u64,
    value: u64,
    token: u64,
    table: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawChunk {
    packed: u64,
    layer_bytes: u64,
    pages: u32,
    tokens: Divisor,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawJob {
    source: RawPages,
    target: RawPages,
    chunks: u64,
    sums: u64,
    row: Divisor,
    page_tokens: Divisor,
    pieces_of: Divisor,
    chunks_of: Divisor,
    values_log2: u32,
    first_layer: u32,
    pieces: u32,
}

// SAFETY: plain numbers, laid out as `Job` in `convert.cu`.
unsafe impl DeviceRepr for RawJob {}

/// The pages of a launch. What is not pages is the chunks' packed places, or nowhere.
struct Sides<'a> {
    source: Option<&'a DevicePages>,
    target: Option<&'a DevicePages>,
}

impl Plan {
    /// A plan whose work goes to `stream`.
    ///
    /// # Errors
    /// When the GPU or the host has no memory for it.
    pub fn new(
        kernels: &Arc<CudaKernels>,
        stream: &Arc<CudaStream>,
        limits: PlanLimits,
    ) -> Result<Plan, PlanError> {
        let device = &kernels.device;
        let sums = (limits.chunks * size_of::<RawChunk>() + limits.pages * 8).next_multiple_of(16);
        let len = sums + limits.layers as usize * limits.chunks * 8;
        let host = HostRegion::private(len).map_err(CudaError::from)?;
        Ok(Plan {
            kernels: Arc::clone(kernels),
            stream: Arc::clone(stream),
            limits,
            device: DeviceRegion::take(device, len)?,
            host: PinnedRegion::pin(device, host)?,
            sent: device.said("make an event", device.context().new_event(None))?,
            sums,
            set: None,
            fetches: VecDeque::new(),
        })
    }

    /// Sets the chunks to be moved next, between pages of layout `here` and their places, all of one kind; those at
    /// [`Place::Pages`] are of layout `there`, or of the same. What was launched before is not disturbed; checksums that
    /// were asked for and not taken are lost. Waits until the GPU has taken in what was set before, which comes after all
    /// that the stream was given by then.
    ///
    /// # Errors
    /// When something leaves its pool or has another length than it needs; then the plan has no chunks.
    pub fn set(
        &mut self,
        here: &PagedLayout,
        there: Option<&PagedLayout>,
        chunks: &[Chunk<'_>],
    ) -> Result<(), PlanError> {
        self.set = None;
        self.fetches.clear();
        let pages: usize = chunks.iter().map(|chunk| chunk.pages.len()).sum();
        for (what, count, limit) in [
            ("chunks", chunks.len(), self.limits.chunks),
            ("pages", pages, self.limits.pages),
            ("layers", here.layers as usize, self.limits.layers as usize),
        ] {
            if count > limit {
                return Err(PlanError::Limit { what, count, limit });
            }
        }
        let places = chunks.first().map_or(PlacesOf::Nowhere, |chunk| chunk.place.kind());
        for (index, chunk) in chunks.iter().enumerate() {
            check_chunk(here, there.unwrap_or(here), chunk, places)
                .map_err(|problem| PlanError::Chunk { chunk: index, problem })?;
        }
        // Copies from the host's side may still be under way.
        let device = &self.kernels.device;
        device.said("wait for an upload", self.sent.synchronize())?;
        let tables_at = chunks.len() * size_of::<RawChunk>();
        let used = tables_at + pages * 8;
        let extent = self.host.memory().extent(0..used).map_err(CudaError::from)?;
        // SAFETY: the memory is this plan's alone, and no copy from it is under way.
        let bytes = unsafe { extent.bytes_mut() };
        let (raw_chunks, tables) = bytes.split_at_mut(tables_at);
        let (here_table, there_table) = tables.split_at_mut(pages * 4);
        let mut first = 0;
        for (chunk, raw) in chunks.iter().zip(raw_chunks.chunks_exact_mut(size_of::<RawChunk>())) {
            write_table(&mut here_table[first * 4..], chunk.pages);
            if let Place::Pages(pages) = chunk.place {
                write_table(&mut there_table[first * 4..], pages);
            }
            let packed = if let Place::Packed(extent) = chunk.place { extent.address() } else { 0 };
            let tokens = Divisor::new(chunk.tokens);
            let value = RawChunk {
                packed,
                layer_bytes: here.layer_bytes(chunk.tokens) as u64,
                pages: first as u32,
                tokens,
            };
            // SAFETY: the slice is exactly as long, and the type is plain numbers without gaps.
            unsafe { raw.as_mut_ptr().cast::<RawChunk>().write_unaligned(value) };
            first += chunk.pages.len();
        }
        // SAFETY: pinned memory that is not written before `sent`; the device's side is as long.
        let said =
            unsafe { result::memcpy_htod_async(self.device.address(), bytes, self.stream.cu_stream()) };
        device.said("upload a plan", said.and_then(|()| self.sent.record(&self.stream)))?;
        let packed: Vec<DeviceExtent> = chunks
            .iter()
            .filter_map(
                |chunk| if let Place::Packed(extent) = chunk.place { Some(extent.clone()) } else { None },
            )
            .collect();
        let there_pages =
            chunks.iter().filter_map(|c| if let Place::Pages(pages) = c.place { Some(pages) } else { None });
        self.set = Some(Set {
            here: *here,
            there: there.copied(),
            places,
            tokens: chunks.iter().map(|chunk| chunk.tokens).collect(),
            aligned: packed.iter().all(|extent| extent.address() % 16 == 0),
            _packed: packed,
            pages,
            twice_here: twice(chunks.iter().map(|chunk| chunk.pages)),
            twice_there: twice(there_pages),
        });
        Ok(())
    }

    /// Packs `layers` of every chunk from `from`, by one launch.
    ///
    /// # Errors
    /// When a chunk's place is not packed, or pages or layers are not those that the plan was set for.
    pub fn pack(&mut self, from: &DevicePages, layers: Range<u32>, share: Share) -> Result<(), PlanError> {
        let set = self.set_for(PlacesOf::Packed)?;
        same("the pages", &set.here, from)?;
        self.launch(&self.kernels.pack, Sides { source: Some(from), target: None }, layers, share)
    }

    /// The reverse of [`Plan::pack`]. Rows of a chunk's last page beyond its tokens keep what they hold.
    ///
    /// # Errors
    /// As there, and when a page is named twice.
    pub fn scatter(&mut self, to: &DevicePages, layers: Range<u32>, share: Share) -> Result<(), PlanError> {
        let set = self.set_for(PlacesOf::Packed)?;
        same("the pages", &set.here, to)?;
        once(set.twice_here)?;
        self.launch(&self.kernels.scatter, Sides { source: None, target: Some(to) }, layers, share)
    }

    /// Moves `layers` of every chunk from its pages in `from` to its pages in `to`, which may be another GPU's. The
    /// checksums are those of the packed chunks.
    ///
    /// # Errors
    /// When a chunk's place is not pages, a page of `to` is named twice, or pages or layers are not those that the
    /// plan was set for.
    pub fn carry(
        &mut self,
        from: &DevicePages,
        to: &DevicePages,
        layers: Range<u32>,
        share: Share,
    ) -> Result<(), PlanError> {
        let set = self.set_for(PlacesOf::Pages)?;
        same("the pages to read", &set.here, from)?;
        same("the pages to write", set.there.as_ref().unwrap_or(&set.here), to)?;
        once(set.twice_there)?;
        self.launch(&self.kernels.carry, Sides { source: Some(from), target: Some(to) }, layers, share)
    }

    /// Computes the checksums of `layers` of every chunk as its pages in `from` are, and moves nothing.
    ///
    /// # Errors
    /// When pages or layers are not those that the plan was set for.
    pub fn digest(&mut self, from: &DevicePages, layers: Range<u32>) -> Result<(), PlanError> {
        let set = self.set.as_ref().ok_or(PlanError::Unset)?;
        same("the pages", &set.here, from)?;
        let share = Share { checksum: true, multiprocessors: None };
        self.launch(&self.kernels.digest, Sides { source: Some(from), target: None }, layers, share)
    }

    /// The checksums, `[layer][chunk]`, of what the last launches with a checksum of `layers` moved. Waits for
    /// everything that the stream was given.
    ///
    /// # Errors
    /// As [`Plan::fetch_checksums`], or when anything that the stream was given went wrong.
    pub fn checksums(&mut self, layers: Range<u32>) -> Result<Vec<u64>, PlanError> {
        self.fetch_checksums(layers)?;
        let said = self.stream.synchronize();
        self.kernels.device.said("bring checksums", said)?;
        let fetch = self.fetches.pop_back().ok_or(PlanError::Unset)?;
        self.fetched(fetch.layers)
    }

    /// Asks for the same without waiting: [`Plan::poll_checksums`] gives them when they have come.
    ///
    /// # Errors
    /// When the layers do not exist, or some were asked for already and not taken.
    pub fn fetch_checksums(&mut self, layers: Range<u32>) -> Result<(), PlanError> {
        let set = self.set.as_ref().ok_or(PlanError::Unset)?;
        check_layers(&layers, &set.here)?;
        let overlaps = |other: &Range<u32>| other.start < layers.end && layers.start < other.end;
        if let Some(earlier) = self.fetches.iter().find(|fetch| overlaps(&fetch.layers)) {
            return Err(PlanError::Fetched { range: layers, earlier: earlier.layers.clone() });
        }
        let device = &self.kernels.device;
        let extent = self.sums_of(&layers, set)?;
        // SAFETY: the memory is this plan's alone. Nothing else is copied to it before these sums are taken, and nobody
        // reads it before the copy is over.
        let bytes = unsafe { extent.bytes_mut() };
        let from = self.device.address() + extent.offset() as u64;
        // SAFETY: pinned memory, which the plan holds until the copy is over; the device's side is as long.
        let said = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) };
        let said = said.and_then(|()| self.stream.record_event(None));
        let over = device.said("bring checksums", said)?;
        self.fetches.push_back(Fetch { layers, over });
        Ok(())
    }

    /// The layers that were asked for first, with their checksums, if they have come. Does not wait.
    ///
    /// # Errors
    /// When anything that the stream was given before went wrong.
    pub fn poll_checksums(&mut self) -> Result<Option<Checksums>, PlanError> {
        let Some(fetch) = self.fetches.front() else { return Ok(None) };
        if !self.kernels.device.said("bring checksums", fetch.over.try_is_complete())? {
            return Ok(None);
        }
        let layers = fetch.layers.clone();
        self.fetches.pop_front();
        Ok(Some(Checksums { sums: self.fetched(layers.clone())?, layers }))
    }

    /// Sums whose copy is over.
    fn fetched(&self, layers: Range<u32>) -> Result<Vec<u64>, PlanError> {
        let set = self.set.as_ref().ok_or(PlanError::Unset)?;
        let extent = self.sums_of(&layers, set)?;
        // SAFETY: nothing is copied to these sums any more, and a new fetch needs this plan exclusively.
        let (sums, _) = unsafe { extent.bytes() }.as_chunks::<8>();
        let lens = set.tokens.iter().map(|tokens| set.here.layer_bytes(*tokens) as u64).cycle();
        Ok(sums.iter().zip(lens).map(|(sum, len)| u64::from_le_bytes(*sum).wrapping_add(len)).collect())
    }

    /// Where the sums of these layers lie in host memory; at the same place in the device's.
    fn sums_of(&self, layers: &Range<u32>, set: &Set) -> Result<Extent, PlanError> {
        let row = set.tokens.len() * 8;
        let at = self.sums + layers.start as usize * row;
        Ok(self.host.memory().extent(at..at + layers.len() * row).map_err(CudaError::from)?)
    }

    fn set_for(&self, places: PlacesOf) -> Result<&Set, PlanError> {
        let set = self.set.as_ref().ok_or(PlanError::Unset)?;
        if set.places == places { Ok(set) } else { Err(PlanError::OtherPlaces { places: set.places }) }
    }

    fn launch(
        &self,
        kernel: &Kernel,
        sides: Sides<'_>,
        layers: Range<u32>,
        share: Share,
    ) -> Result<(), PlanError> {
        let set = self.set.as_ref().ok_or(PlanError::Unset)?;
        check_layers(&layers, &set.here)?;
        let Sides { source, target } = sides;
        let chunks = set.tokens.len();
        let longest = set.tokens.iter().copied().max().unwrap_or(0);
        let pieces_of = set.here.layer_bytes(longest).div_ceil(PIECE_BYTES);
        let pieces = pieces_of * chunks * layers.len();
        if pieces == 0 {
            return Ok(());
        }
        let pieces = u32::try_from(pieces).ok().filter(|n| *n < 1 << 31);
        let pieces =
            pieces.ok_or(PlanError::Limit { what: "pieces of 4 KiB", count: pieces_of, limit: 1 << 31 })?;
        let aligned = set.aligned
            && [source, target].into_iter().flatten().all(|pages| pages.storage.address() % 16 == 0);
        let (unit, function) = match (set.here.row_bytes, &kernel.plain) {
            (row, _) if !aligned || !row.is_multiple_of(16) => (1, &kernel.bytes_sum),
            (row, _) if !row.is_multiple_of(128) => (16, &kernel.units_sum),
            (_, Some(plain)) if !share.checksum => (128, plain),
            _ => (128, &kernel.sum),
        };
        let device = &self.kernels.device;
        let base = self.device.address();
        let tables = base + (chunks * size_of::<RawChunk>()) as u64;
        let raw = |pages: Option<&DevicePages>, table: u64| {
            let strides = pages.map(|pages| pages.layout.strides());
            let of = |stride: fn(&crate::layout::Strides) -> usize| strides.as_ref().map_or(0, stride) as u64;
            RawPages {
                base: pages.map_or(0, |pages| pages.storage.address()),
                layer: of(|s| s.layer),
                page: of(|s| s.page),
                head: of(|s| s.head),
                value: of(|s| s.value),
                token: of(|s| s.token),
                table,
            }
        };
        let there = if set.places == PlacesOf::Pages { tables + set.pages as u64 * 4 } else { tables };
        let job = RawJob {
            source: raw(source, tables),
            target: raw(target, there),
            chunks: base,
            sums: base + self.sums as u64,
            row: Divisor::new(set.here.row_bytes / unit),
            page_tokens: Divisor::new(set.here.page_tokens),
            pieces_of: Divisor::new(pieces_of as u32),
            chunks_of: Divisor::new(chunks as u32),
            values_log2: set.here.values().trailing_zeros(),
            first_layer: layers.start,
            pieces,
        };
        if share.checksum {
            let at = job.sums + (layers.start as usize * chunks * 8) as u64;
            let len = layers.len() * chunks * 8;
            // SAFETY: the range is the sums of these layers, in this plan's memory.
            let said = unsafe { result::memset_d8_async(at, 0, len, self.stream.cu_stream()) };
            device.said("clear checksums", said)?;
        }
        let (block, most) = share.multiprocessors.map_or((BLOCK, u32::MAX), |most| (LARGE_BLOCK, most.get()));
        let grid = pieces.div_ceil(block / 32).min(most);
        let config = LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the job is what the kernel takes. Every page, chunk and layer in it was checked against the memory it
        // names, which the plan and the GPU hold until the work is over: memory is given back after it.
        let said = unsafe { self.stream.launch_builder(function).arg(&job).launch(config) };
        device.said("move KV", said)?;
        Ok(())
    }
}

/// Why a chunk cannot be moved.
fn check_chunk(
    here: &PagedLayout,
    there: &PagedLayout,
    chunk: &Chunk<'_>,
    places: PlacesOf,
) -> Result<(), String> {
    let tokens = chunk.tokens;
    let bytes = here.layer_bytes(tokens);
    if tokens == 0 || bytes >= 1 << 31 {
        return Err(format!("{tokens} tokens of {bytes} bytes a layer; there must be some, below 2 GiB"));
    }
    let in_pool = |layout: &PagedLayout, pages: &[PageId]| {
        let needed = tokens.div_ceil(layout.page_tokens);
        if pages.len() != needed as usize {
            return Err(format!("{} pages given for {tokens} tokens, which lie in {needed}", pages.len()));
        }
        match pages.iter().find(|page| page.0 >= layout.pages) {
            Some(page) => Err(format!("page {page} lies outside the pool of {} pages", layout.pages)),
            None => Ok(()),
        }
    };
    in_pool(here, chunk.pages)?;
    match chunk.place {
        place if place.kind() != places => Err("its place is not of the first chunk's kind".to_owned()),
        Place::Packed(extent) if extent.len() != bytes * here.layers as usize => {
            Err(format!("packed in {} bytes, but {} are needed", extent.len(), bytes * here.layers as usize))
        }
        Place::Pages(pages) => {
            let alike = PagedLayout { pages: here.pages, order: here.order, ..*there };
            if alike != *here {
                return Err(format!("pages of {there:?} cannot take the rows of {here:?}"));
            }
            in_pool(there, pages)
        }
        _ => Ok(()),
    }
}

fn check_layers(range: &Range<u32>, layout: &PagedLayout) -> Result<(), PlanError> {
    if range.start <= range.end && range.end <= layout.layers {
        return Ok(());
    }
    Err(PlanError::Layers { range: range.clone(), layers: layout.layers })
}

fn same(what: &'static str, set: &PagedLayout, pages: &DevicePages) -> Result<(), PlanError> {
    if pages.layout == *set {
        return Ok(());
    }
    Err(PlanError::OtherLayout { what, given: Box::new(pages.layout), set: Box::new(*set) })
}

fn once(twice: Option<PageId>) -> Result<(), PlanError> {
    twice.map_or(Ok(()), |page| Err(PlanError::PageTwice { page }))
}

/// A page that is named twice.
fn twice<'a>(tables: impl Iterator<Item = &'a [PageId]>) -> Option<PageId> {
    let mut all: Vec<PageId> = tables.flatten().copied().collect();
    all.sort_unstable();
    all.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

fn write_table(to: &mut [u8], pages: &[PageId]) {
    for (to, page) in to.chunks_exact_mut(4).zip(pages) {
        to.copy_from_slice(&page.0.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_divide() {
        for divisor in (1..300).chain([1 << 12, (1 << 20) - 1, (1 << 31) - 1]) {
            let by = Divisor::new(divisor);
            for n in (0..1000)
                .chain([divisor - 1, divisor, divisor * 2 - 1, (1 << 31) - 1].map(|n| n & (i32::MAX as u32)))
            {
                let high = ((u64::from(n) * u64::from(by.magic)) >> 32) as u32;
                assert_eq!((high + n) >> by.shift, n / divisor, "{n} / {divisor}");
            }
        }
    }
}
