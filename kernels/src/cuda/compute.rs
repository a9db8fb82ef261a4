//! The arithmetic of a model on one GPU, operation by operation, each queued on one stream: [`Compute`].

use super::blas::{Blas, Product};
use super::{ComputeError, KvDevicePages};
use crate::cpu::{Dtype, Epilogue, Heads, Span};
use crate::pages::Paged;
use cudarc::driver::{CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;
use std::ffi::c_void;
use std::slice;
use std::sync::{Arc, Mutex, PoisonError};
use tandem_memory::cuda::{CudaError, Device, DeviceRegion, PinnedRegion};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::ids::{LayerIdx, TokenId};

/// The widest head that any kernel takes.
pub const MAX_HEAD_DIM: usize = 256;
/// Queries of a block of the prefill kernel, as in `attention.cu`.
const TILE: usize = 128;
/// Warps of a block, and copies each has under way, of the decode kernel.
const DECODE_STAGES: usize = 4 * 3;
/// Tokens of one copy there, and what pages must be multiples of.
const UNIT: usize = 16;
/// Rows that every allocation is good for, so that growing batches do not take memory over and over.
const LEAST_ROWS: usize = 256;
/// Rows of a product that is not cuBLASLt's at most, and what must divide its sizes, as in `product.cu`.
const FEW_ROWS: usize = 16;
const FEW_OUTPUTS: usize = 16;
const FEW_INPUTS: usize = 32;
/// What is fetched has memory of so much at least, and so many of them are kept to be used again.
const LEAST_FETCH_BYTES: usize = 1 << 20;
const MAX_SPARE: usize = 2;
/// Bytes of one of two buffers through which weights go to the GPU.
const STAGING_BYTES: usize = 32 << 20;

/// Rows of activations in the GPU's memory. Operations give them the size they need.
pub struct Rows {
    memory: Option<Arc<DeviceRegion>>,
    rows: usize,
    width: usize,
    dtype: Dtype,
}

impl Default for Rows {
    fn default() -> Rows {
        Rows { memory: None, rows: 0, width: 0, dtype: Dtype::F32 }
    }
}

impl Rows {
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers of a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    fn bytes(&self) -> usize {
        self.rows * self.width * self.dtype.size_bytes()
    }

    /// Where they lie; nowhere while they have no row.
    fn address(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.address())
    }
}

/// Numbers in the GPU's memory that do not change: a weight, or a vector in single precision.
pub struct Numbers {
    memory: Option<Arc<DeviceRegion>>,
    count: usize,
    dtype: Dtype,
}

impl Numbers {
    /// How many.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    fn address(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.address())
    }
}

/// Where numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// As they are stored.
    Stored(&'a [u8], Dtype),
    /// Made on the GPU: evenly spread over `around` ± `width`.
    Dummy {
        /// How many.
        count: usize,
        /// Their mean.
        around: f32,
        /// How far they are from it at most.
        width: f32,
    },
}

/// A weight with its bias.
pub struct Matrix {
    weight: Numbers,
    bias: Option<Numbers>,
    outputs: usize,
    inputs: usize,
    /// The outputs are a gate's, then its projection's.
    gated: bool,
}

/// Queries that the kernels see in one step: all rows, or those that are left after [`Compute::select`].
#[derive(Clone, Copy, Default, Debug)]
struct View {
    /// Addresses: `Row` for each row; `Queries` of single tokens, then of tiles.
    rows: u64,
    decodes: u64,
    tiles: u64,
    row_count: usize,
    decode_count: usize,
    tile_count: usize,
}

/// What the GPU knows of a step.
#[derive(Clone, Copy, Default, Debug)]
struct Batch {
    tokens: u64,
    chosen_rows: u64,
    tables: u64,
    all: View,
    chosen: View,
    /// Whether only the chosen rows are left.
    narrowed: bool,
    /// The largest token and page, which must exist.
    last_token: u32,
    last_page: u32,
}

/// Where a step's time went.
struct Clock {
    spans: Vec<(Work, CudaEvent, CudaEvent)>,
}

/// A kind of work, and for products the outputs and inputs of the matrix.
pub type Work = (&'static str, [usize; 2]);

const LOAD: Work = ("load", [0; 2]);

/// One GPU that computes. Every operation is queued, in order; the first one that fails is kept, those after it do
/// nothing, and [`Compute::failure`] tells.
pub struct Compute {
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    functions: Functions,
    blas: Blas,
    dtype: Dtype,
    failed: Option<ComputeError>,
    /// How often memory that a captured graph may name was replaced.
    generation: u64,
    /// What it was when a graph was begun.
    captured: u64,
    batch: Batch,
    /// The step's description in host memory, not written before `sent`, and on the GPU.
    upload: Option<(PinnedRegion, Arc<DeviceRegion>)>,
    sent: CudaEvent,
    /// What is being fetched, and when it is there.
    fetching: Option<Fetched>,
    over: CudaEvent,
    /// Memory of what was fetched before and is needed no more.
    spare: Arc<Mutex<Vec<PinnedRegion>>>,
    /// A gate's and its projection's product.
    wide: Rows,
    /// What decode's blocks found, before it is gathered.
    found: Rows,
    staging: Option<Staging>,
    clock: Option<Clock>,
    seed: u64,
}

/// Buffers through which weights go to the GPU, in turns.
struct Staging {
    buffers: [(PinnedRegion, CudaEvent); 2],
    next: usize,
    /// Where numbers wait to be converted.
    device: Arc<DeviceRegion>,
}

macro_rules! functions {
    ($($module:ident: { $($field:ident: $name:literal),* $(,)? })*) => {
        struct Functions {
            $($($field: CudaFunction,)*)*
        }

        impl Functions {
            /// Those for activations of `dtype`. What runs on tensor cores is not for single precision, and loaded all
            /// the same.
            fn load(device: &Device, dtype: Dtype) -> Result<Functions, CudaError> {
                let (any, flash) = match dtype {
                    Dtype::F32 => ("f32", "bf16"),
                    Dtype::F16 => ("f16", "f16"),
                    Dtype::Bf16 => ("bf16", "bf16"),
                };
                let find = |module: &Arc<CudaModule>, name: &str| {
                    let name = name.replace("{any}", any).replace("{flash}", flash);
                    device.said(&format!("find kernel {name}"), module.load_function(&name))
                };
                $(
                    let image = include_bytes!(concat!(env!("OUT_DIR"), "/", stringify!($module), ".image"));
                    let $module = device.context().load_module(Ptx::from_binary(image.to_vec()));
                    let $module = device.said("load the model's kernels", $module)?;
                    $(let $field = find(&$module, $name)?;)*
                )*
                Ok(Functions { $($($field,)*)* })
            }
        }
    };
}

functions! {
    model: {
        convert: "convert",
        dummy: "dummy",
        embed: "embed",
        choose: "choose",
        bias: "bias",
        norm: "norm_{any}",
        gate: "gate_{any}",
        turn: "turn_{any}",
        plain: "plain_{any}",
    }
    attention: {
        prefill_64: "prefill_{flash}_64",
        prefill_128: "prefill_{flash}_128",
        decode_64: "decode_{flash}_64",
        decode_128: "decode_{flash}_128",
        gather: "gather_{flash}",
    }
    product: {
        few_8: "few_{flash}_8",
        few_16: "few_{flash}_16",
        gated_8: "gated_{flash}_8",
        gated_16: "gated_{flash}_16",
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawPages {
    base: u64,
    page: u64,
    value: u64,
    tables: u64,
    page_tokens: u32,
    magic: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawHeads {
    heads: u32,
    kv_heads: u32,
    dim: u32,
    window: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawConvert {
    to: u64,
    from: u64,
    count: u64,
    to_stored: u32,
    from_stored: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawDummy {
    to: u64,
    count: u64,
    seed: u64,
    stored: u32,
    around: f32,
    width: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawEmbed {
    table: u64,
    tokens: u64,
    out: u64,
    stored: u32,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawSelect {
    from: u64,
    out: u64,
    rows: u64,
    words: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawBias {
    out: u64,
    bias: u64,
    stored: u32,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawNorm {
    x: u64,
    weight: u64,
    out: u64,
    width: u32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawGate {
    wide: u64,
    out: u64,
    width: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawFew {
    weight: u64,
    bias: u64,
    x: u64,
    out: u64,
    rows: u32,
    outputs: u32,
    inputs: u32,
    stored: u32,
    add: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawTurn {
    qkv: u64,
    frequencies: u64,
    query_norm: u64,
    key_norm: u64,
    rows: u64,
    pages: RawPages,
    heads: RawHeads,
    turn_scale: f32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawPlain {
    qkv: u64,
    out: u64,
    rows: u64,
    pages: RawPages,
    heads: RawHeads,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RawFlash {
    qkv: u64,
    out: u64,
    queries: u64,
    pages: RawPages,
    heads: RawHeads,
    splits: u32,
    outs: u64,
    sums: u64,
}

/// Turned positions, and norms before the turn.
pub struct Turn<'a> {
    /// Frequencies of half a head.
    pub frequencies: &'a Numbers,
    /// Cosines and sines are multiplied by this.
    pub scale: f32,
    /// Weights of the norms of queries and of keys, and what is added to the mean square.
    pub norms: Option<(&'a Numbers, &'a Numbers, f32)>,
}

fn stored(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
    }
}

impl Compute {
    /// Loads the kernels into a GPU, for activations and KV stored as `dtype`. Sums, norms and the residual are in
    /// single precision whatever it is.
    ///
    /// # Errors
    /// When cuBLASLt is not there, or the GPU or its driver is too old.
    pub fn open(device: &Arc<Device>, dtype: Dtype) -> Result<Compute, ComputeError> {
        let functions = Functions::load(device, dtype)?;
        for (function, bytes) in [
            (&functions.prefill_64, prefill_shared(64)),
            (&functions.prefill_128, prefill_shared(128)),
            (&functions.decode_64, decode_shared(64)),
            (&functions.decode_128, decode_shared(128)),
        ] {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let said = function.set_attribute(attribute, bytes as i32);
            device.said(&format!("give a block {bytes} bytes of shared memory"), said)?;
        }
        let event = || device.said("make an event", device.context().new_event(None));
        Ok(Compute {
            device: Arc::clone(device),
            stream: device.stream()?,
            functions,
            blas: Blas::open(device)?,
            dtype,
            failed: None,
            generation: 0,
            captured: 0,
            batch: Batch::default(),
            upload: None,
            sent: event()?,
            fetching: None,
            over: event()?,
            spare: Arc::default(),
            wide: Rows::default(),
            found: Rows::default(),
            staging: None,
            clock: None,
            seed: 0,
        })
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The stream that operations are queued on.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// How activations are stored.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Changes whenever memory that a captured graph may name was replaced.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The first operation that failed, if one did; it is forgotten.
    pub fn failure(&mut self) -> Option<ComputeError> {
        self.failed.take()
    }

    fn attempt(&mut self, run: impl FnOnce(&mut Compute) -> Result<(), ComputeError>) {
        if self.failed.is_none()
            && let Err(error) = run(self)
        {
            self.failed = Some(error);
        }
    }

    // ---- Weights

    /// Takes numbers, and stores them as `dtype`.
    pub fn numbers(&mut self, parts: &[Source<'_>], dtype: Dtype) -> Numbers {
        let counts = parts.iter().map(|part| match part {
            Source::Stored(bytes, dtype) => bytes.len() / dtype.size_bytes(),
            Source::Dummy { count, .. } => *count,
        });
        let counts: Vec<usize> = counts.collect();
        let count = counts.iter().sum();
        let mut memory = None;
        self.attempt(|this| {
            let region = DeviceRegion::take(&this.device, count * dtype.size_bytes())?;
            let mut to = region.address();
            for (part, count) in parts.iter().zip(&counts) {
                this.fill(to, *part, *count, dtype)?;
                to += (count * dtype.size_bytes()) as u64;
            }
            memory = Some(region);
            Ok(())
        });
        Numbers { memory, count, dtype }
    }

    /// Takes a weight: `parts` of `inputs` columns, whose outputs follow one another, each with its bias or zeros.
    pub fn matrix(
        &mut self,
        parts: &[(Source<'_>, Option<Source<'_>>)],
        inputs: usize,
        gated: bool,
    ) -> Matrix {
        let weights: Vec<Source<'_>> = parts.iter().map(|(weight, _)| *weight).collect();
        let weight = self.numbers(&weights, self.dtype);
        let outputs = weight.count / inputs;
        let bias = parts.iter().any(|(_, bias)| bias.is_some()).then(|| {
            let all: Vec<Source<'_>> = (parts.iter())
                .map(|(weight, bias)| {
                    let count = match weight {
                        Source::Stored(bytes, dtype) => bytes.len() / dtype.size_bytes() / inputs,
                        Source::Dummy { count, .. } => count / inputs,
                    };
                    bias.unwrap_or(Source::Dummy { count, around: 0.0, width: 0.0 })
                })
                .collect();
            self.numbers(&all, Dtype::F32)
        });
        Matrix { weight, bias, outputs, inputs, gated }
    }

    fn fill(&mut self, to: u64, part: Source<'_>, count: usize, dtype: Dtype) -> Result<(), ComputeError> {
        let (bytes, from) = match part {
            Source::Stored(bytes, from) => (bytes, from),
            Source::Dummy { around, width, .. } => {
                self.seed += 1;
                let seed = self.seed << 40;
                let raw = RawDummy { to, count: count as u64, seed, stored: stored(dtype), around, width };
                let function = self.functions.dummy.clone();
                return self.launch(LOAD, &function, [self.loop_blocks(count), 1, 1], 256, 0, raw);
            }
        };
        let mut staging = match self.staging.take() {
            Some(staging) => staging,
            None => Staging::new(&self.device)?,
        };
        let each = STAGING_BYTES / from.size_bytes();
        for (index, piece) in bytes.chunks(each * from.size_bytes()).enumerate() {
            let slot = staging.next;
            staging.next = 1 - slot;
            let (buffer, free) = &staging.buffers[slot];
            self.device.said("wait for an upload", free.synchronize())?;
            let extent = buffer.memory().extent(0..piece.len()).map_err(CudaError::from)?;
            // SAFETY: this buffer is nobody else's, and the last copy from it is over.
            unsafe { extent.bytes_mut() }.copy_from_slice(piece);
            let target = to + (index * each * dtype.size_bytes()) as u64;
            let landing = if from == dtype { target } else { staging.device.address() };
            // SAFETY: the target has room for all of `bytes`; the buffer is not written before the event.
            unsafe { self.send(landing, extent.bytes())? };
            self.device.said("record an event", free.record(&self.stream))?;
            if from != dtype {
                let count = piece.len() / from.size_bytes();
                let raw = RawConvert {
                    to: target,
                    from: landing,
                    count: count as u64,
                    to_stored: stored(dtype),
                    from_stored: stored(from),
                };
                let function = self.functions.convert.clone();
                self.launch(LOAD, &function, [self.loop_blocks(count), 1, 1], 256, 0, raw)?;
            }
        }
        self.staging = Some(staging);
        Ok(())
    }

    /// Ends loading: waits until all numbers are in place, and gives back what was needed for that.
    ///
    /// # Errors
    /// When one of them could not be loaded.
    pub fn loaded(&mut self) -> Result<(), ComputeError> {
        let said = self.device.said("load weights", self.stream.synchronize());
        self.staging = None;
        self.failure().map_or(Ok(said?), Err)
    }

    // ---- A step

    /// Tells the GPU of a step: its tokens, its sequences, and which of these want the logits of their last token
    /// where only those go on. A span without pages is there to fill the batch, and touches no page.
    ///
    /// # Panics
    /// When a sequence has not the pages that it needs.
    pub fn begin(&mut self, tokens: &[TokenId], spans: &[Span<'_>], page_tokens: usize, chosen: &[usize]) {
        self.attempt(|this| this.describe(tokens, spans, page_tokens, chosen));
    }

    fn describe(
        &mut self,
        tokens: &[TokenId],
        spans: &[Span<'_>],
        page_tokens: usize,
        chosen: &[usize],
    ) -> Result<(), ComputeError> {
        let mut words: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        let mut tables: Vec<u32> = Vec::new();
        let mut rows = Vec::with_capacity(2 * tokens.len());
        let (mut decodes, mut tiles) = (Vec::new(), Vec::new());
        let mut starts = Vec::with_capacity(spans.len());
        for span in spans {
            let (table, end) = (tables.len() as u32, span.start as usize + span.tokens);
            starts.push(table);
            if span.pages.is_empty() {
                rows.extend([u32::MAX, 0]);
                decodes.extend([span.row as u32, 1, u32::MAX, 0]);
                continue;
            }
            let needed = end.div_ceil(page_tokens);
            tables.extend(span.pages[..needed].iter().map(|page| page.0));
            rows.extend((span.start..end as u32).flat_map(|position| [position, table]));
            if span.tokens == 1 {
                decodes.extend([span.row as u32, 1, span.start, table]);
                continue;
            }
            for first in (0..span.tokens).step_by(TILE) {
                let count = TILE.min(span.tokens - first) as u32;
                tiles.push([(span.row + first) as u32, count, span.start + first as u32, table]);
            }
        }
        // The longest ones first, so that the last ones to end are short.
        tiles.sort_by_key(|[_, count, position, _]| std::cmp::Reverse(position + count));
        let last = |index: &usize| {
            let span = &spans[*index];
            (span.row + span.tokens - 1, span.start + span.tokens as u32 - 1, starts[*index])
        };
        let chosen: Vec<(usize, u32, u32)> = chosen.iter().map(last).collect();
        let mut at = |part: &mut dyn Iterator<Item = u32>| {
            let start = words.len() * 4;
            words.extend(part);
            start as u64
        };
        let rows_at = at(&mut rows.iter().copied());
        let decodes_at = at(&mut decodes.iter().copied());
        let tiles_at = at(&mut tiles.iter().flatten().copied());
        let chosen_at = at(&mut chosen.iter().map(|(row, ..)| *row as u32));
        let chosen_rows_at = at(&mut chosen.iter().flat_map(|(_, position, table)| [*position, *table]));
        let chosen_decodes_at = at(&mut (chosen.iter().enumerate())
            .flat_map(|(row, (_, position, table))| [row as u32, 1, *position, *table]));
        let tables_at = at(&mut tables.iter().copied());

        let base = self.send_words(&words)?;
        self.batch = Batch {
            tokens: base,
            chosen_rows: base + chosen_at,
            tables: base + tables_at,
            all: View {
                rows: base + rows_at,
                decodes: base + decodes_at,
                tiles: base + tiles_at,
                row_count: rows.len() / 2,
                decode_count: decodes.len() / 4,
                tile_count: tiles.len(),
            },
            chosen: View {
                rows: base + chosen_rows_at,
                decodes: base + chosen_decodes_at,
                tiles: 0,
                row_count: chosen.len(),
                decode_count: chosen.len(),
                tile_count: 0,
            },
            narrowed: false,
            last_token: tokens.iter().map(|token| token.0).max().unwrap_or(0),
            last_page: tables.iter().copied().max().unwrap_or(0),
        };
        Ok(())
    }

    /// Sends the description of a step; returns where it lies on the GPU.
    fn send_words(&mut self, words: &[u32]) -> Result<u64, ComputeError> {
        let len = words.len() * 4;
        if self.upload.as_ref().is_none_or(|(host, _)| host.memory().len() < len) {
            // Twice as much as is needed: tables grow with every token.
            let len = (2 * len).max(1 << 16);
            self.upload = None;
            self.generation += 1;
            let host = HostRegion::private(len).map_err(CudaError::from)?;
            self.upload =
                Some((PinnedRegion::pin(&self.device, host)?, DeviceRegion::take(&self.device, len)?));
        }
        self.device.said("wait for an upload", self.sent.synchronize())?;
        let (host, device) = self.upload.as_ref().expect("made above");
        let address = device.address();
        let extent = host.memory().extent(0..len).map_err(CudaError::from)?;
        // SAFETY: the memory is this object's alone, and the last copy from it is over.
        let bytes = unsafe { extent.bytes_mut() };
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        // SAFETY: the device's side is as long; the host's is not written before `sent`.
        unsafe { self.send(address, extent.bytes())? };
        self.device.said("record an event", self.sent.record(&self.stream))?;
        Ok(address)
    }

    /// Queues a copy to the GPU.
    ///
    /// # Safety
    /// The target must be memory of the GPU of this length, and `bytes` pinned and not written before it is over.
    unsafe fn send(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: see the function's contract.
        let said = unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) };
        self.device.said(&format!("copy {} bytes from the host", bytes.len()), said)
    }

    fn bind(&self) -> Result<(), CudaError> {
        self.device.said("be used by this thread", self.device.context().bind_to_thread())
    }

    /// The embeddings of the step's tokens.
    ///
    /// # Panics
    /// When one lies outside the table.
    pub fn embed(&mut self, table: &Numbers, width: usize, out: &mut Rows) {
        assert!((self.batch.last_token as usize) < table.count / width, "tokens lie in the table");
        self.attempt(|this| {
            let rows = this.batch.all.row_count;
            this.reshape(out, rows, width, Dtype::F32)?;
            let raw = RawEmbed {
                table: table.address(),
                tokens: this.batch.tokens,
                out: out.address(),
                stored: stored(table.dtype),
                width: width as u32,
            };
            let function = this.functions.embed.clone();
            this.launch(("embed", [0; 2]), &function, [rows as u32, 1, 1], 256, 0, raw)
        });
    }

    /// As [`Compute::embed`], where the output matrix is the table.
    ///
    /// # Panics
    /// As there.
    pub fn embed_tied(&mut self, output: &Matrix, out: &mut Rows) {
        self.embed(&output.weight, output.inputs, out);
    }

    /// Each row of `x` over its root mean square, times `weight`.
    ///
    /// # Panics
    /// When the weight has another width, or `x` is not the residual.
    pub fn rms_norm(&mut self, x: &Rows, weight: &Numbers, eps: f32, out: &mut Rows) {
        assert!(x.width == weight.count && x.dtype == Dtype::F32, "a norm of the residual");
        self.attempt(|this| {
            this.reshape(out, x.rows, x.width, this.dtype)?;
            let (weight, width) = (weight.address(), x.width as u32);
            let raw = RawNorm { x: x.address(), weight, out: out.address(), width, eps };
            let threads = (width / 4).next_multiple_of(32).clamp(32, 1024);
            let function = this.functions.norm.clone();
            this.launch(("norm", [0; 2]), &function, [x.rows as u32, 1, 1], threads, 0, raw)
        });
    }

    /// A product with its bias, and for a gated matrix `silu(gate) * up` of it; see [`Epilogue`].
    ///
    /// # Panics
    /// When widths do not fit.
    pub fn linear(&mut self, x: &Rows, weight: &Matrix, epilogue: Epilogue, out: &mut Rows) {
        let add = epilogue == Epilogue::Add;
        assert!(!add || (out.rows == x.rows && out.width == weight.outputs), "what is added to is as large");
        self.attempt(|this| {
            let dtype = if add { out.dtype } else { this.dtype };
            if !weight.gated || this.is_few(x, weight) {
                return this.product(x, weight, dtype, add, out);
            }
            let mut wide = std::mem::take(&mut this.wide);
            let done = this.product(x, weight, dtype, false, &mut wide);
            let done = done.and_then(|()| this.gate(&wide, out));
            this.wide = wide;
            done
        });
    }

    /// The last product, whose numbers are kept in single precision.
    ///
    /// # Panics
    /// When widths do not fit.
    pub fn logits(&mut self, x: &Rows, output: &Matrix, out: &mut Rows) {
        self.attempt(|this| this.product(x, output, Dtype::F32, false, out));
    }

    fn product(
        &mut self,
        x: &Rows,
        weight: &Matrix,
        to: Dtype,
        add: bool,
        out: &mut Rows,
    ) -> Result<(), ComputeError> {
        assert!(x.width == weight.inputs && x.dtype == weight.weight.dtype, "rows fit the matrix");
        let few = self.is_few(x, weight);
        let gated = few && weight.gated;
        if !add {
            self.reshape(out, x.rows, if gated { weight.outputs / 2 } else { weight.outputs }, to)?;
        }
        let (rows, outputs, inputs) = (x.rows, weight.outputs, weight.inputs);
        let work = (if to == Dtype::F32 && !add { "output" } else { "product" }, [outputs, inputs]);
        if few {
            let raw = RawFew {
                weight: weight.weight.address(),
                bias: weight.bias.as_ref().map_or(0, Numbers::address),
                x: x.address(),
                out: out.address(),
                rows: rows as u32,
                outputs: outputs as u32,
                inputs: inputs as u32,
                stored: stored(to),
                add: u32::from(add),
            };
            let f = &self.functions;
            let function = match (gated, rows <= 8) {
                (false, true) => &f.few_8,
                (false, false) => &f.few_16,
                (true, true) => &f.gated_8,
                (true, false) => &f.gated_16,
            };
            let function = function.clone();
            return self.launch(work, &function, [(outputs / FEW_OUTPUTS) as u32, 1, 1], 256, 0, raw);
        }
        let product = Product { rows, outputs, inputs, from: x.dtype, to, add };
        self.timed(work, |this| {
            this.bind()?;
            let (weight, x, out) = (weight.weight.address(), x.address(), out.address());
            // SAFETY: rows and matrices are as large as they say, and memory is given back after the work that uses it.
            unsafe { this.blas.multiply(&this.stream, product, weight, x, out) }
        })?;
        let Some(bias) = &weight.bias else { return Ok(()) };
        let raw =
            RawBias { out: out.address(), bias: bias.address(), stored: stored(to), width: outputs as u32 };
        let function = self.functions.bias.clone();
        self.launch(("bias", [0; 2]), &function, [rows as u32, 1, 1], 256, 0, raw)
    }

    /// Whether `product.cu` has the product.
    fn is_few(&self, x: &Rows, weight: &Matrix) -> bool {
        self.dtype != Dtype::F32
            && x.rows <= FEW_ROWS
            && weight.outputs.is_multiple_of(FEW_OUTPUTS)
            && weight.inputs.is_multiple_of(FEW_INPUTS)
    }

    fn gate(&mut self, wide: &Rows, out: &mut Rows) -> Result<(), ComputeError> {
        let width = wide.width / 2;
        self.reshape(out, wide.rows, width, self.dtype)?;
        let raw = RawGate { wide: wide.address(), out: out.address(), width: width as u32 };
        let each = 16 / self.dtype.size_bytes();
        let function = self.functions.gate.clone();
        // More rows than a grid is high are never in one step.
        self.launch(
            ("gate", [0; 2]),
            &function,
            [width.div_ceil(each * 256) as u32, wide.rows as u32, 1],
            256,
            0,
            raw,
        )
    }

    /// Normalises (where asked) and turns queries in place; keys likewise, and values, go to their pages. What `qkv`
    /// has of keys and values is of no use after.
    ///
    /// # Panics
    /// When widths do not fit, or a page lies outside the pool.
    pub fn turn_and_store(
        &mut self,
        heads: &Heads,
        turn: &Turn<'_>,
        layer: LayerIdx,
        qkv: &mut Rows,
        kv: &KvDevicePages,
    ) {
        assert!(turn.frequencies.count * 2 == heads.head_dim && !self.batch.narrowed, "all rows are turned");
        self.check(heads, qkv, kv);
        self.attempt(|this| {
            let view = this.batch.all;
            let norms = turn.norms.map(|(query, key, eps)| (query.address(), key.address(), eps));
            let (query_norm, key_norm, eps) = norms.unwrap_or_default();
            let raw = RawTurn {
                qkv: qkv.address(),
                frequencies: turn.frequencies.address(),
                query_norm,
                key_norm,
                rows: view.rows,
                pages: this.pages(kv, layer),
                heads: raw_heads(heads),
                turn_scale: turn.scale,
                eps,
            };
            let function = this.functions.turn.clone();
            let shared = heads.head_dim * 4;
            // A head a warp, until there are blocks enough.
            let most = (heads.heads + 2 * heads.kv_heads).div_ceil(8);
            let wanted = 8 * this.device.multiprocessors() as usize;
            let parts = (wanted / view.row_count.max(1)).clamp(1, most) as u32;
            this.launch(("turn", [0; 2]), &function, [view.row_count as u32, parts, 1], 256, shared, raw)
        });
    }

    /// Attention of all rows of `qkv`, or of those that were selected, over the pages of their sequences.
    ///
    /// # Panics
    /// As [`Compute::turn_and_store`].
    pub fn attention(
        &mut self,
        heads: &Heads,
        layer: LayerIdx,
        qkv: &Rows,
        kv: &KvDevicePages,
        out: &mut Rows,
    ) {
        self.check(heads, qkv, kv);
        self.attempt(|this| {
            let view = if this.batch.narrowed { this.batch.chosen } else { this.batch.all };
            this.reshape(out, qkv.rows, heads.heads * heads.head_dim, this.dtype)?;
            let (pages, raw_heads) = (this.pages(kv, layer), raw_heads(heads));
            let (qkv, to) = (qkv.address(), out.address());
            let page_tokens = kv.shape().page_tokens as usize;
            let flash = this.dtype != Dtype::F32
                && matches!(heads.head_dim, 64 | 128)
                && page_tokens.is_multiple_of(UNIT);
            if !flash {
                let raw = RawPlain { qkv, out: to, rows: view.rows, pages, heads: raw_heads };
                let function = this.functions.plain.clone();
                let grid = [heads.heads as u32, view.row_count as u32, 1];
                return this.launch(("attention of any heads", [0; 2]), &function, grid, 128, 0, raw);
            }
            let wide = heads.head_dim == 128;
            let mut raw = RawFlash {
                qkv,
                out: to,
                queries: view.tiles,
                pages,
                heads: raw_heads,
                splits: 1,
                outs: 0,
                sums: 0,
            };
            if view.tile_count > 0 {
                let f = &this.functions;
                let function = if wide { &f.prefill_128 } else { &f.prefill_64 }.clone();
                let grid = [heads.heads as u32, view.tile_count as u32, 1];
                let shared = prefill_shared(heads.head_dim);
                this.launch(("prefill attention", [0; 2]), &function, grid, 128, shared, raw)?;
            }
            if view.decode_count > 0 {
                raw.queries = view.decodes;
                let group = heads.heads / heads.kv_heads;
                let blocks = heads.kv_heads * group.div_ceil(16);
                // Two blocks have room on a multiprocessor.
                let wanted = 2 * this.device.multiprocessors() as usize;
                raw.splits = (wanted / (blocks * view.decode_count)).clamp(1, 64) as u32;
                if raw.splits > 1 {
                    let found = view.decode_count * heads.heads * raw.splits as usize;
                    let mut rows = std::mem::take(&mut this.found);
                    let done = this.reshape(&mut rows, found, heads.head_dim + 2, Dtype::F32);
                    raw.outs = rows.address();
                    raw.sums = raw.outs + (found * heads.head_dim * 4) as u64;
                    this.found = rows;
                    done?;
                }
                let f = &this.functions;
                let function = if wide { &f.decode_128 } else { &f.decode_64 }.clone();
                let grid = [raw.splits, blocks as u32, view.decode_count as u32];
                let shared = decode_shared(heads.head_dim);
                this.launch(("decode attention", [0; 2]), &function, grid, 128, shared, raw)?;
                if raw.splits > 1 {
                    let function = this.functions.gather.clone();
                    let grid = [heads.heads as u32, view.decode_count as u32, 1];
                    this.launch(("gather", [0; 2]), &function, grid, heads.head_dim as u32, 0, raw)?;
                }
            }
            Ok(())
        });
    }

    /// The last rows of the chosen sequences. From now on, the step has only them.
    pub fn select(&mut self, x: &Rows, out: &mut Rows) {
        self.attempt(|this| {
            this.batch.narrowed = true;
            let rows = this.batch.chosen.row_count;
            this.reshape(out, rows, x.width, x.dtype)?;
            let raw = RawSelect {
                from: x.address(),
                out: out.address(),
                rows: this.batch.chosen_rows,
                words: (x.width * x.dtype.size_bytes() / 4) as u32,
            };
            let function = this.functions.choose.clone();
            this.launch(("select", [0; 2]), &function, [rows as u32, 1, 1], 256, 0, raw)
        });
    }

    // ---- Results

    /// Queues a copy of the first `rows` rows to the host; [`Compute::fetched`] has them when it is over.
    pub fn fetch(&mut self, x: &Rows, rows: usize) {
        self.attempt(|this| {
            let len = x.bytes() / x.rows.max(1) * rows.min(x.rows);
            this.bind()?;
            // What was fetched and never asked for may still be on its way, but will be there before this.
            this.fetching = None;
            this.fetching = if len == 0 { None } else { Some(this.room(len, x.dtype)?) };
            if let Some(fetched) = &this.fetching {
                let extent = fetched.extent()?;
                // SAFETY: the memory is this object's alone, and nobody reads it before `over`.
                let said = unsafe {
                    result::memcpy_dtoh_async(extent.bytes_mut(), x.address(), this.stream.cu_stream())
                };
                this.device.said(&format!("copy {len} bytes to the host"), said)?;
            }
            Ok(this.device.said("record an event", this.over.record(&this.stream))?)
        });
    }

    /// Pinned memory for so many bytes.
    fn room(&self, len: usize, dtype: Dtype) -> Result<Fetched, ComputeError> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let found = spare.iter().position(|memory| memory.memory().len() >= len);
        let memory = match found {
            Some(found) => spare.swap_remove(found),
            None => {
                // What is too small once will be again.
                spare.clear();
                let host = HostRegion::private(len.max(LEAST_FETCH_BYTES)).map_err(CudaError::from)?;
                PinnedRegion::pin(&self.device, host)?
            }
        };
        Ok(Fetched { memory: Some(memory), len, dtype, spare: Arc::clone(&self.spare) })
    }

    /// Whether everything up to the last [`Compute::fetch`] is over, or something failed.
    pub fn is_over(&mut self) -> bool {
        let mut over = true;
        self.attempt(|this| {
            over = this.device.said("compute", this.over.try_is_complete())?;
            Ok(())
        });
        over
    }

    /// What was fetched last, once: none if that was nothing, or something failed. Waits for it.
    pub fn fetched(&mut self) -> Option<Fetched> {
        let mut fetched = None;
        self.attempt(|this| {
            this.device.said("compute", this.over.synchronize())?;
            fetched = this.fetching.take();
            Ok(())
        });
        fetched
    }

    /// Copies all numbers of rows to the host, and waits for them.
    pub fn read(&mut self, x: &Rows) -> Vec<f32> {
        self.fetch(x, x.rows);
        self.fetched().map_or_else(Vec::new, |fetched| fetched.widened())
    }

    /// Rows of these numbers, stored as `dtype`.
    ///
    /// # Panics
    /// When they are not whole rows.
    pub fn rows(&mut self, numbers: &[f32], width: usize, dtype: Dtype) -> Rows {
        assert!(numbers.len().is_multiple_of(width), "rows are whole");
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut rows = Rows::default();
        self.attempt(|this| {
            this.reshape(&mut rows, numbers.len() / width, width, dtype)?;
            this.fill(rows.address(), Source::Stored(&bytes, Dtype::F32), numbers.len(), dtype)?;
            Ok(this.device.said("copy rows", this.stream.synchronize())?)
        });
        rows
    }

    // ---- Graphs

    /// Records what is queued from now on, instead of doing it.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn begin_capture(&mut self) -> Result<(), ComputeError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.captured = self.generation;
        Ok(self.device.said("record a graph", self.stream.begin_capture(mode))?)
    }

    /// What was queued since [`Compute::begin_capture`].
    ///
    /// # Errors
    /// When something in it cannot be recorded: for one, memory had to be taken.
    pub fn end_capture(&mut self) -> Result<Graph, ComputeError> {
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.device.said("make a graph", self.stream.end_capture(flags));
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        match graph? {
            Some(graph) if self.captured == self.generation => Ok(Graph(graph)),
            _ => Err(ComputeError::Capture),
        }
    }

    /// Queues everything that a graph has recorded.
    pub fn replay(&mut self, graph: &Graph) {
        self.attempt(|this| Ok(this.device.said("launch a graph", graph.0.launch())?));
    }

    // ---- Time

    /// Has every operation timed from now on, or none.
    pub fn time(&mut self, on: bool) {
        self.clock = on.then(|| Clock { spans: Vec::new() });
    }

    /// The GPU's milliseconds and how many operations there were, for each kind of work since the last call.
    ///
    /// # Errors
    /// When the GPU failed.
    pub fn times(&mut self) -> Result<Vec<(Work, f64, usize)>, ComputeError> {
        self.device.said("compute", self.stream.synchronize())?;
        let mut times: Vec<(Work, f64, usize)> = Vec::new();
        for (work, from, to) in self.clock.iter_mut().flat_map(|clock| clock.spans.drain(..)) {
            let ms = f64::from(self.device.said("tell the time", from.elapsed_ms(&to))?);
            match times.iter_mut().find(|(known, ..)| *known == work) {
                Some((_, sum, count)) => (*sum, *count) = (*sum + ms, *count + 1),
                None => times.push((work, ms, 1)),
            }
        }
        Ok(times)
    }

    // ---- Below

    fn timed(
        &mut self,
        work: Work,
        run: impl FnOnce(&mut Compute) -> Result<(), ComputeError>,
    ) -> Result<(), ComputeError> {
        if self.clock.is_none() {
            return run(self);
        }
        let mark = |this: &Compute| {
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            let event = this.device.said("make an event", this.device.context().new_event(flags))?;
            this.device.said("record an event", event.record(&this.stream))?;
            Ok::<_, CudaError>(event)
        };
        let from = mark(self)?;
        run(self)?;
        let to = mark(self)?;
        if let Some(clock) = &mut self.clock {
            clock.spans.push((work, from, to));
        }
        Ok(())
    }

    fn launch<P: Copy>(
        &mut self,
        work: Work,
        function: &CudaFunction,
        grid: [u32; 3],
        block: u32,
        shared: usize,
        mut parameters: P,
    ) -> Result<(), ComputeError> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.timed(work, |this| {
            this.bind()?;
            let [x, y, z] = grid;
            let mut pointers = [(&raw mut parameters).cast::<c_void>()];
            // SAFETY: every kernel takes one struct, which `parameters` mirrors; the memory that it names lives as long
            // as the work that uses it, since the driver gives memory back after that.
            let said = unsafe {
                result::launch_kernel(
                    function.cu_function(),
                    (x, y, z),
                    (block, 1, 1),
                    shared as u32,
                    this.stream.cu_stream(),
                    &mut pointers,
                )
            };
            Ok(this.device.said(&format!("launch {}", work.0), said)?)
        })
    }

    /// Gives rows another size, and other memory where they have too little. What they held is lost.
    fn reshape(
        &mut self,
        rows: &mut Rows,
        count: usize,
        width: usize,
        dtype: Dtype,
    ) -> Result<(), ComputeError> {
        let bytes = count * width * dtype.size_bytes();
        if rows.memory.as_ref().is_none_or(|memory| memory.len() < bytes) {
            let least = if count <= LEAST_ROWS { LEAST_ROWS * width * dtype.size_bytes() } else { 0 };
            rows.memory = None;
            self.generation += 1;
            rows.memory = Some(DeviceRegion::take(&self.device, bytes.max(least))?);
        }
        (rows.rows, rows.width, rows.dtype) = (count, width, dtype);
        Ok(())
    }

    fn check(&self, heads: &Heads, qkv: &Rows, kv: &KvDevicePages) {
        let shape = kv.shape();
        let view = if self.batch.narrowed { &self.batch.chosen } else { &self.batch.all };
        assert!(
            qkv.width == heads.qkv_width() && qkv.dtype == self.dtype && qkv.rows == view.row_count,
            "rows of queries, keys and values"
        );
        assert!(heads.head_dim <= MAX_HEAD_DIM, "heads of {} numbers", heads.head_dim);
        assert!(
            shape.kv_heads as usize == heads.kv_heads
                && shape.head_dim as usize == heads.head_dim
                && Dtype::from(shape.dtype) == self.dtype,
            "pages for these heads"
        );
        assert!(self.batch.last_page < kv.pages(), "page {} lies in the pool", self.batch.last_page);
    }

    fn pages(&self, kv: &KvDevicePages, layer: LayerIdx) -> RawPages {
        let (shape, size) = (kv.shape(), self.dtype.size_bytes());
        let page = shape.layer_page_bytes();
        let start = layer.0 as usize * kv.pages() as usize * page;
        RawPages {
            base: kv.device_pages().storage().address() + start as u64,
            page: (page / size) as u64,
            value: (page / size / 2) as u64,
            tables: self.batch.tables,
            page_tokens: shape.page_tokens,
            magic: u32::MAX / shape.page_tokens.max(2) + 1,
        }
    }

    /// Blocks of 256 threads for a kernel that loops over so many numbers.
    fn loop_blocks(&self, count: usize) -> u32 {
        count.div_ceil(256).min(self.device.multiprocessors() as usize * 8) as u32
    }
}

/// Numbers in pinned host memory, which is used again when this is dropped.
pub struct Fetched {
    /// There until this is dropped.
    memory: Option<PinnedRegion>,
    len: usize,
    dtype: Dtype,
    spare: Arc<Mutex<Vec<PinnedRegion>>>,
}

impl Fetched {
    fn extent(&self) -> Result<Extent, CudaError> {
        let memory = self.memory.as_ref().expect("there until this is dropped");
        Ok(memory.memory().extent(0..self.len)?)
    }

    fn bytes(&self) -> &[u8] {
        let extent = self.extent().expect("as long as when it was made");
        // SAFETY: the copy to it is over, and the memory is this object's alone while it lives.
        unsafe { slice::from_raw_parts(extent.bytes().as_ptr(), self.len) }
    }

    /// Where they are in single precision, all numbers.
    ///
    /// # Panics
    /// When they are not.
    #[must_use]
    pub fn numbers(&self) -> &[f32] {
        assert!(self.dtype == Dtype::F32, "numbers in single precision");
        // SAFETY: any bits are numbers.
        let (before, numbers, _) = unsafe { self.bytes().align_to() };
        assert!(before.is_empty(), "regions begin at a page");
        numbers
    }

    /// As [`Fetched::numbers`], to be changed.
    ///
    /// # Panics
    /// As there.
    pub fn numbers_mut(&mut self) -> &mut [f32] {
        let numbers = self.numbers();
        // SAFETY: the memory is this object's alone, which is borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(numbers.as_ptr().cast_mut(), numbers.len()) }
    }

    /// All numbers, in single precision.
    fn widened(&self) -> Vec<f32> {
        let bytes = self.bytes();
        let count = bytes.len() / self.dtype.size_bytes();
        (0..count).map(|at| crate::cpu::read_f32(self.dtype, bytes, at)).collect()
    }
}

impl Drop for Fetched {
    fn drop(&mut self) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MAX_SPARE {
            spare.extend(self.memory.take());
        }
    }
}

/// Work that was recorded once, to be queued as a whole.
pub struct Graph(CudaGraph);

// SAFETY: a graph belongs to no thread; whoever owns it is alone with it.
unsafe impl Send for Graph {}

impl Staging {
    fn new(device: &Arc<Device>) -> Result<Staging, ComputeError> {
        let buffer = || {
            let host = HostRegion::private(STAGING_BYTES).map_err(CudaError::from)?;
            let event = device.said("make an event", device.context().new_event(None))?;
            Ok::<_, CudaError>((PinnedRegion::pin(device, host)?, event))
        };
        let device = DeviceRegion::take(device, STAGING_BYTES)?;
        Ok(Staging { buffers: [buffer()?, buffer()?], next: 0, device })
    }
}

fn raw_heads(heads: &Heads) -> RawHeads {
    RawHeads {
        heads: heads.heads as u32,
        kv_heads: heads.kv_heads as u32,
        dim: heads.head_dim as u32,
        window: heads.window.map_or(i32::MAX as u32, |window| window.min(i32::MAX as u32)),
        scale: heads.scale,
    }
}

/// Shared memory of a block of the prefill kernel: queries, keys and values.
fn prefill_shared(head_dim: usize) -> usize {
    (TILE + 64 + 64) * head_dim * 2
}

fn decode_shared(head_dim: usize) -> usize {
    DECODE_STAGES * 2 * UNIT * head_dim * 2
}
