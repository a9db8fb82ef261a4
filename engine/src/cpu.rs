//! The engine that runs everywhere: the model over the CPU's kernels.

use crate::backend::{Backend, Epilogue, HeadNorms, Heads, Span, Weight};
use crate::config::Config;
use crate::model::Model;
use crate::step::{Step, check};
use crate::weights::{Tensor, Weights};
use crate::{Engine, EngineError, Isa, LoadError, LoadFormat, Logits, ModelInfo, Progress, Sequence};
use std::path::Path;
use tandem_kernels::KvPages;
use tandem_kernels::cpu::{self, Cpu, Matrix, MatrixPart, RopeTable, Rows, read_f32};
use tandem_proto::ids::{LayerIdx, TokenId};
use tandem_proto::layout::KvDtype;

/// How a model is loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// How keys and values are stored. Single precision by default, as the reference implementations on the
    /// CPU do; half as much memory and traffic otherwise, at the price of rounding.
    pub kv_dtype: KvDtype,
    /// Tokens of a page. Sixteen by default: little is wasted at a sequence's end, and a page's rows of one
    /// head are still some kilobytes in a row.
    pub page_tokens: u32,
    /// Tokens of a chunk, the unit of handoff and reuse. 256 by default.
    pub chunk_tokens: u32,
    /// Threads that compute; all cores by default.
    pub threads: usize,
    /// The instruction set; the best one by default.
    pub isa: Isa,
    /// Where weights come from.
    pub format: LoadFormat,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions {
            kv_dtype: KvDtype::F32,
            page_tokens: 16,
            chunk_tokens: 256,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            isa: Isa::detect(),
            format: LoadFormat::Files,
        }
    }
}

/// A model on the CPU.
pub struct CpuEngine {
    backend: CpuBackend,
    model: Model<CpuBackend>,
    info: ModelInfo,
}

impl CpuEngine {
    /// Loads the model in folder `dir`.
    ///
    /// # Errors
    /// When the folder cannot be read, or holds a model that cannot be run: the error says which field or
    /// tensor is the reason.
    pub fn load(dir: &Path, options: LoadOptions) -> Result<CpuEngine, LoadError> {
        let begun = std::time::Instant::now();
        let (config, special) = Config::read(dir)?;
        let kv = config.kv_shape(options.kv_dtype, options.page_tokens, options.chunk_tokens)?;
        let weights = match options.format {
            LoadFormat::Files => Weights::open(dir)?,
            LoadFormat::Dummy => Weights::dummies_in_memory(&config),
        };
        let mut backend = CpuBackend { cpu: Cpu::with_isa(options.isa, options.threads) };
        let model = Model::load(&mut backend, &config, &weights)?;
        weights.refuse_unused(&config.architecture)?;
        let info = ModelInfo::of(dir, config, special, &weights, kv);
        tracing::info!(
            model = info.name,
            architecture = info.architecture,
            parameters = info.parameters,
            fingerprint = %info.fingerprint,
            isa = %options.isa,
            threads = backend.cpu.team().threads(),
            ms = begun.elapsed().as_millis() as u64,
            "model loaded"
        );
        Ok(CpuEngine { backend, model, info })
    }
}

impl Engine for CpuEngine {
    type Pages = KvPages;

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn step(
        &mut self,
        batch: &[Sequence<'_>],
        kv: &mut KvPages,
        progress: &mut dyn FnMut(Progress, &mut KvPages),
    ) -> Result<Logits, EngineError> {
        check(&self.info, batch, kv)?;
        let step = Step::of(batch);
        let data = match batch {
            [] => Vec::new(),
            _ => self
                .model
                .step(&mut self.backend, &step, kv, &mut |layer, kv| progress(Progress::Layer(layer), kv)),
        };
        Ok(Logits::new(data, self.info.vocab_size as usize))
    }
}

struct CpuBackend {
    cpu: Cpu,
}

/// An embedding table, as it is stored.
struct Table {
    data: Vec<u8>,
    dtype: cpu::Dtype,
    width: usize,
}

fn part(weight: Weight<'_>) -> MatrixPart<'_> {
    MatrixPart {
        data: weight.matrix.bytes(),
        dtype: weight.matrix.dtype,
        outputs: weight.matrix.rows,
        bias: weight.bias.map(|bias| (bias.bytes(), bias.dtype)),
    }
}

impl Backend for CpuBackend {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Table = Table;
    type Rope = RopeTable;
    type Rows = Rows;
    type Pages = KvPages;

    fn matrix(&mut self, parts: &[Weight<'_>], inputs: usize) -> Matrix {
        let parts: Vec<MatrixPart<'_>> = parts.iter().copied().map(part).collect();
        Matrix::pack(&self.cpu, &parts, inputs)
    }

    fn gated_matrix(&mut self, gate: Weight<'_>, up: Weight<'_>, inputs: usize) -> Matrix {
        Matrix::pack_gated(&self.cpu, part(gate), part(up), inputs)
    }

    fn vector(&mut self, tensor: Tensor<'_>) -> Vec<f32> {
        (0..tensor.rows).map(|i| read_f32(tensor.dtype, tensor.bytes(), i)).collect()
    }

    fn table(&mut self, tensor: Tensor<'_>, width: usize) -> Table {
        Table { data: tensor.bytes().to_vec(), dtype: tensor.dtype, width }
    }

    fn rope(&mut self, frequencies: Vec<f32>, scale: f32) -> RopeTable {
        RopeTable::new(frequencies, scale)
    }

    fn embed(&mut self, table: &Table, tokens: &[TokenId], out: &mut Rows) {
        out.reshape(tokens.len(), table.width);
        for (token, row) in tokens.iter().zip(out.data_mut().chunks_exact_mut(table.width)) {
            let bytes = table.width * table.dtype.size_bytes();
            let stored = &table.data[token.0 as usize * bytes..][..bytes];
            row.iter_mut().enumerate().for_each(|(i, x)| *x = read_f32(table.dtype, stored, i));
        }
    }

    fn embed_tied(&mut self, output: &Matrix, tokens: &[TokenId], out: &mut Rows) {
        out.reshape(tokens.len(), output.inputs());
        for (token, row) in tokens.iter().zip(out.data_mut().chunks_exact_mut(output.inputs())) {
            output.unpack_row(token.0 as usize, row);
        }
    }

    fn rms_norm(&mut self, x: &Rows, weight: &Vec<f32>, eps: f32, out: &mut Rows) {
        cpu::rms_norm(&self.cpu, x, weight, eps, out);
    }

    fn linear(&mut self, x: &Rows, weight: &Matrix, epilogue: Epilogue, out: &mut Rows) {
        cpu::linear(&self.cpu, x, weight, epilogue, out);
    }

    fn turn_and_store(
        &mut self,
        heads: &Heads,
        rope: &mut RopeTable,
        norms: Option<HeadNorms<'_, Vec<f32>>>,
        layer: LayerIdx,
        spans: &[Span<'_>],
        qkv: &mut Rows,
        pages: &mut KvPages,
    ) {
        let mut positions = Vec::with_capacity(qkv.rows());
        for span in spans {
            rope.extend_to(span.start as usize + span.tokens);
            positions.extend((0..span.tokens as u32).map(|i| span.start + i));
        }
        let norms = norms.map(|n| (n.query.as_slice(), n.key.as_slice(), n.eps));
        cpu::rotate(&self.cpu, heads, rope, norms, &positions, qkv);
        cpu::store_kv(&self.cpu, heads, layer, qkv, spans, pages);
    }

    fn attention(
        &mut self,
        heads: &Heads,
        layer: LayerIdx,
        spans: &[Span<'_>],
        qkv: &Rows,
        pages: &KvPages,
        out: &mut Rows,
    ) {
        cpu::attention(&self.cpu, heads, layer, qkv, spans, pages, out);
    }

    fn select(&mut self, x: &Rows, rows: &[usize], out: &mut Rows) {
        out.reshape(rows.len(), x.width());
        for (row, to) in rows.iter().zip(out.data_mut().chunks_exact_mut(x.width())) {
            to.copy_from_slice(x.row(*row));
        }
    }

    fn read(&mut self, x: &Rows) -> Vec<f32> {
        x.data().to_vec()
    }
}
