//! The engine on an NVIDIA GPU: the model over the kernels of `tandem_kernels::cuda`.

use crate::backend::{Backend, Epilogue, HeadNorms, Heads, Span, Weight};
use crate::config::Config;
use crate::model::{EMBEDDING, Model};
use crate::step::{Step, check};
use crate::weights::{Tensor, Weights};
use crate::{Data, Engine, EngineError, LoadError, LoadFormat, Logits, ModelInfo, Progress, Sequence};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use tandem_kernels::cpu::Dtype;
use tandem_kernels::cuda::{
    Compute, Graph, KvDevicePages, MAX_HEAD_DIM, Matrix, Numbers, Rows, Source, Turn, Work,
};
use tandem_memory::cuda::Device;
use tandem_proto::ids::{LayerIdx, TokenId};
use tandem_proto::layout::KvDtype;

/// Sizes of decode batches that are recorded as graphs; a batch is filled up to the next one.
const GRAPH_ROWS: [usize; 16] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// How a model is loaded into a GPU.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// How weights, activations, keys and values are stored. By default as the model's embedding is. Sums, norms and
    /// the residual are in single precision whatever it is.
    pub dtype: Option<KvDtype>,
    /// Tokens of a page. Sixteen by default; other multiples of sixteen are as fast, anything else is slow.
    pub page_tokens: u32,
    /// Tokens of a chunk, the unit of handoff and reuse. 256 by default.
    pub chunk_tokens: u32,
    /// Where weights come from.
    pub format: LoadFormat,
    /// Whether decode batches are recorded as graphs and launched as a whole, which costs the host less. They are by
    /// default.
    pub graphs: bool,
}

impl Default for CudaOptions {
    fn default() -> CudaOptions {
        CudaOptions {
            dtype: None,
            page_tokens: 16,
            chunk_tokens: 256,
            format: LoadFormat::Files,
            graphs: true,
        }
    }
}

/// A model on a GPU.
///
/// Bits of a row's logits may depend on how many rows were computed with it, as they do not on the CPU: products of up to
/// 16 rows sum in an order of their own, but those of more are cuBLASLt's, which chooses how to sum by the number of rows,
/// and decode attention shares a sequence's keys out by how many sequences there are.
///
/// A decode batch of up to 256 sequences is filled up to the next of 16 sizes and recorded as a graph, so there are 16
/// graphs at most. They name activations that every step uses, and have none of their own; when those are replaced by
/// larger ones, or the pages are others, all graphs are dropped.
pub struct CudaEngine {
    backend: CudaBackend,
    model: Model<CudaBackend>,
    info: ModelInfo,
    graphs: Option<Graphs>,
}

/// Recorded decode steps, by their rows, which are of [`GRAPH_ROWS`]. Good as long as nothing that they name has moved.
#[derive(Default)]
struct Graphs {
    /// None, where a step of so many rows was computed once, and so has taken the memory that it needs.
    recorded: HashMap<usize, Option<Graph>>,
    generation: u64,
    pages: u64,
}

impl CudaEngine {
    /// Loads the model in folder `dir` into a GPU.
    ///
    /// # Errors
    /// When the folder cannot be read, or holds a model that cannot be run, or the GPU has too little memory or cannot
    /// compute: the error says what is the reason.
    pub fn load(dir: &Path, options: CudaOptions, device: &Arc<Device>) -> Result<CudaEngine, LoadError> {
        let begun = std::time::Instant::now();
        let (config, special) = Config::read(dir)?;
        if config.head_dim > MAX_HEAD_DIM {
            let allowed = format_args!("{MAX_HEAD_DIM} at most, on a GPU").to_string();
            return Err(LoadError::field("head_dim", config.head_dim, allowed));
        }
        let weights = match options.format {
            LoadFormat::Files => Weights::open(dir)?,
            LoadFormat::Dummy => Weights::dummies(),
        };
        let dtype = match options.dtype {
            Some(dtype) => dtype,
            None => match weights.tensor(EMBEDDING, &[config.vocab_size, config.hidden])?.dtype {
                Dtype::F32 => KvDtype::F32,
                Dtype::F16 => KvDtype::F16,
                Dtype::Bf16 => KvDtype::Bf16,
            },
        };
        let kv = config.kv_shape(dtype, options.page_tokens, options.chunk_tokens)?;
        let page_tokens = options.page_tokens as usize;
        let mut backend = CudaBackend { compute: Compute::open(device, dtype.into())?, page_tokens };
        let model = Model::load(&mut backend, &config, &weights);
        backend.compute.loaded()?;
        let model = model?;
        weights.refuse_unused(&config.architecture)?;
        let info = ModelInfo::of(dir, config, special, &weights, kv);
        tracing::info!(
            model = info.name,
            architecture = info.architecture,
            parameters = info.parameters,
            fingerprint = %info.fingerprint,
            device = ?device,
            dtype = ?dtype,
            ms = begun.elapsed().as_millis() as u64,
            "model loaded"
        );
        let graphs = options.graphs.then(Graphs::default);
        Ok(CudaEngine { backend, model, info, graphs })
    }

    /// Has steps timed, kind of work by kind, from now on or no more. A timed step is slower, and is no graph.
    pub fn time(&mut self, on: bool) {
        self.backend.compute.time(on);
        self.graphs = (!on).then(Graphs::default);
    }

    /// The GPU's milliseconds, and operations, of each kind of work since the last call.
    ///
    /// # Errors
    /// When the GPU failed.
    pub fn times(&mut self) -> Result<Vec<(Work, f64, usize)>, EngineError> {
        self.backend.compute.times().map_err(|error| EngineError::Gpu { problem: error.to_string() })
    }

    /// Queues a decode step of one token of each sequence, recorded or to be recorded, filled up to a size that is.
    fn queue_graph(&mut self, step: &mut Step<'_>, kv: &mut KvDevicePages) {
        let Some(graphs) = &mut self.graphs else { return };
        let count = GRAPH_ROWS.iter().copied().find(|rows| *rows >= step.tokens.len());
        let count = count.expect("only batches of these sizes come here");
        for row in step.tokens.len()..count {
            step.tokens.push(TokenId(0));
            step.spans.push(Span { row, tokens: 1, start: 0, pages: &[] });
            step.wanted.push(row);
        }
        let CudaBackend { compute, page_tokens } = &mut self.backend;
        compute.begin(&step.tokens, &step.spans, *page_tokens, &[]);
        let pages = kv.device_pages().storage().address();
        if (graphs.generation, graphs.pages) != (compute.generation(), pages) {
            *graphs = Graphs { generation: compute.generation(), pages, ..Graphs::default() };
        }
        match graphs.recorded.get(&count) {
            None => {
                self.model.forward(&mut self.backend, step, kv, &mut |_, _| ());
                graphs.recorded.insert(count, None);
                // What was taken just now is where it stays, and what was recorded before may name what it replaced.
                let generation = self.backend.compute.generation();
                if graphs.generation != generation {
                    graphs.recorded.retain(|rows, _| *rows == count);
                    graphs.generation = generation;
                }
            }
            Some(None) => {
                let (model, backend) = (&mut self.model, &mut self.backend);
                let recorded = backend.capture(|backend| model.forward(backend, step, kv, &mut |_, _| ()));
                match recorded {
                    Ok(graph) => {
                        self.backend.compute.replay(&graph);
                        graphs.recorded.insert(count, Some(graph));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "decode steps are not recorded as graphs");
                        self.graphs = None;
                        self.model.forward(&mut self.backend, step, kv, &mut |_, _| ());
                    }
                }
            }
            Some(Some(graph)) => compute.replay(graph),
        }
    }

    fn result(
        &mut self,
        kv: &mut KvDevicePages,
        progress: &mut dyn FnMut(Progress, &mut KvDevicePages),
    ) -> Result<Logits, EngineError> {
        let compute = &mut self.backend.compute;
        while !compute.is_over() {
            progress(Progress::Waiting, kv);
        }
        let data = compute.fetched();
        match compute.failure() {
            Some(error) => Err(EngineError::Gpu { problem: error.to_string() }),
            None => {
                let data = data.map_or(Data::Owned(Vec::new()), Data::Fetched);
                Ok(Logits::of(data, self.info.vocab_size as usize))
            }
        }
    }
}

impl Engine for CudaEngine {
    type Pages = KvDevicePages;

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn step(
        &mut self,
        batch: &[Sequence<'_>],
        kv: &mut KvDevicePages,
        progress: &mut dyn FnMut(Progress, &mut KvDevicePages),
    ) -> Result<Logits, EngineError> {
        check(&self.info, batch, kv)?;
        if batch.is_empty() {
            return Ok(Logits::new(Vec::new(), self.info.vocab_size as usize));
        }
        let mut step = Step::of(batch);
        let rows = step.wanted.len();
        let decode = rows == step.tokens.len() && rows <= GRAPH_ROWS[GRAPH_ROWS.len() - 1];
        let stream = Arc::clone(self.backend.compute.stream());
        let mut failure = None;
        if decode && self.graphs.is_some() {
            self.queue_graph(&mut step, kv);
            self.backend.compute.fetch(self.model.logits(), rows);
            for layer in (0..self.info.kv.layers).map(LayerIdx) {
                failure = failure.or(kv.written(layer, &stream).err());
                progress(Progress::Layer(layer), kv);
            }
        } else {
            self.backend.begin(&step.tokens, &step.spans, step.chosen());
            self.model.forward(&mut self.backend, &step, kv, &mut |layer, kv| {
                failure = failure.take().or(kv.written(layer, &stream).err());
                progress(Progress::Layer(layer), kv);
            });
            self.backend.compute.fetch(self.model.logits(), rows);
        }
        let result = self.result(kv, progress);
        match failure {
            Some(error) => Err(EngineError::Gpu { problem: error.to_string() }),
            None => result,
        }
    }
}

struct CudaBackend {
    compute: Compute,
    page_tokens: usize,
}

/// Frequencies of half a head, and what cosines and sines are multiplied by.
struct Rope {
    frequencies: Numbers,
    scale: f32,
}

fn source(tensor: Tensor<'_>, around: f32) -> Source<'_> {
    match tensor.data {
        Some(data) => Source::Stored(data, tensor.dtype),
        // As wide as trained ones are, so that activations stay of a size.
        None => Source::Dummy { count: tensor.count, around, width: 0.02 },
    }
}

impl CudaBackend {
    fn take(&mut self, parts: &[Weight<'_>], inputs: usize, gated: bool) -> Matrix {
        let parts: Vec<_> = (parts.iter())
            .map(|part| (source(part.matrix, 0.0), part.bias.map(|bias| source(bias, 0.0))))
            .collect();
        self.compute.matrix(&parts, inputs, gated)
    }

    fn capture(
        &mut self,
        run: impl FnOnce(&mut CudaBackend),
    ) -> Result<Graph, tandem_kernels::cuda::ComputeError> {
        self.compute.begin_capture()?;
        run(self);
        self.compute.end_capture()
    }
}

impl Backend for CudaBackend {
    type Matrix = Matrix;
    type Vector = Numbers;
    type Table = (Numbers, usize);
    type Rope = Rope;
    type Rows = Rows;
    type Pages = KvDevicePages;

    fn matrix(&mut self, parts: &[Weight<'_>], inputs: usize) -> Matrix {
        self.take(parts, inputs, false)
    }

    fn gated_matrix(&mut self, gate: Weight<'_>, up: Weight<'_>, inputs: usize) -> Matrix {
        self.take(&[gate, up], inputs, true)
    }

    fn vector(&mut self, tensor: Tensor<'_>) -> Numbers {
        self.compute.numbers(&[source(tensor, 1.0)], Dtype::F32)
    }

    fn table(&mut self, tensor: Tensor<'_>, width: usize) -> (Numbers, usize) {
        let dtype = self.compute.dtype();
        (self.compute.numbers(&[source(tensor, 0.0)], dtype), width)
    }

    fn rope(&mut self, frequencies: Vec<f32>, scale: f32) -> Rope {
        let bytes: Vec<u8> = frequencies.iter().flat_map(|f| f.to_le_bytes()).collect();
        let stored = Source::Stored(&bytes, Dtype::F32);
        Rope { frequencies: self.compute.numbers(&[stored], Dtype::F32), scale }
    }

    fn begin(&mut self, tokens: &[TokenId], spans: &[Span<'_>], chosen: &[usize]) {
        self.compute.begin(tokens, spans, self.page_tokens, chosen);
    }

    fn embed(&mut self, (table, width): &(Numbers, usize), _tokens: &[TokenId], out: &mut Rows) {
        self.compute.embed(table, *width, out);
    }

    fn embed_tied(&mut self, output: &Matrix, _tokens: &[TokenId], out: &mut Rows) {
        self.compute.embed_tied(output, out);
    }

    fn rms_norm(&mut self, x: &Rows, weight: &Numbers, eps: f32, out: &mut Rows) {
        self.compute.rms_norm(x, weight, eps, out);
    }

    fn linear(&mut self, x: &Rows, weight: &Matrix, epilogue: Epilogue, out: &mut Rows) {
        self.compute.linear(x, weight, epilogue, out);
    }

    fn logits(&mut self, x: &Rows, output: &Matrix, out: &mut Rows) {
        self.compute.logits(x, output, out);
    }

    fn turn_and_store(
        &mut self,
        heads: &Heads,
        rope: &mut Rope,
        norms: Option<HeadNorms<'_, Numbers>>,
        layer: LayerIdx,
        _spans: &[Span<'_>],
        qkv: &mut Rows,
        pages: &mut KvDevicePages,
    ) {
        let norms = norms.map(|norms| (norms.query, norms.key, norms.eps));
        let turn = Turn { frequencies: &rope.frequencies, scale: rope.scale, norms };
        self.compute.turn_and_store(heads, &turn, layer, qkv, pages);
    }

    fn attention(
        &mut self,
        heads: &Heads,
        layer: LayerIdx,
        _spans: &[Span<'_>],
        qkv: &Rows,
        pages: &KvDevicePages,
        out: &mut Rows,
    ) {
        self.compute.attention(heads, layer, qkv, pages, out);
    }

    fn select(&mut self, x: &Rows, _rows: &[usize], out: &mut Rows) {
        self.compute.select(x, out);
    }

    fn read(&mut self, x: &Rows) -> Vec<f32> {
        self.compute.read(x)
    }
}
