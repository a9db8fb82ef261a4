//! The one definition of the model, over any backend: a decoder with grouped attention, RoPE and a gated
//! MLP. The families differ in [`Config`] alone.

use crate::backend::{Backend, Epilogue, HeadNorms, Heads, Span, Weight};
use crate::config::Config;
use crate::load::LoadError;
use crate::step::Step;
use crate::weights::Weights;
use tandem_proto::ids::LayerIdx;

/// The tensor of the embedding table.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// A model's weights and the activations that its steps reuse.
pub(crate) struct Model<B: Backend> {
    embedding: Embedding<B>,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    output: B::Matrix,
    rope: B::Rope,
    eps: f32,
    scratch: Scratch<B::Rows>,
}

enum Embedding<B: Backend> {
    /// The output matrix is the table.
    Tied,
    Table(B::Table),
}

struct Layer<B: Backend> {
    heads: Heads,
    attention_norm: B::Vector,
    qkv: B::Matrix,
    head_norms: Option<(B::Vector, B::Vector)>,
    attention_output: B::Matrix,
    mlp_norm: B::Vector,
    gate_up: B::Matrix,
    down: B::Matrix,
}

#[derive(Default)]
struct Scratch<R> {
    hidden: R,
    normed: R,
    qkv: R,
    attended: R,
    gated: R,
    /// What is left of `hidden` and `qkv` when only some rows go on.
    chosen: R,
    chosen_qkv: R,
    logits: R,
}

impl<B: Backend> Model<B> {
    pub(crate) fn load(backend: &mut B, config: &Config, weights: &Weights) -> Result<Model<B>, LoadError> {
        let Config { hidden, head_dim, vocab_size, .. } = *config;
        let table = weights.tensor(EMBEDDING, &[vocab_size, hidden])?;
        let (embedding, output) = if config.tied {
            (Embedding::Tied, table)
        } else {
            let output = weights.tensor("lm_head.weight", &[vocab_size, hidden])?;
            (Embedding::Table(backend.table(table, hidden)), output)
        };
        let (frequencies, scale) = config.rope.frequencies(head_dim);
        let layers = (0..config.layers)
            .map(|layer| Layer::load(backend, config, weights, layer))
            .collect::<Result<_, LoadError>>()?;
        Ok(Model {
            embedding,
            layers,
            norm: backend.vector(weights.tensor("model.norm.weight", &[hidden])?),
            output: backend.matrix(&[Weight { matrix: output, bias: None }], hidden),
            rope: backend.rope(frequencies, scale),
            eps: config.norm_eps,
            scratch: Scratch::default(),
        })
    }

    /// Computes a step and returns the wanted logits, row after row.
    pub(crate) fn step(
        &mut self,
        backend: &mut B,
        step: &Step<'_>,
        pages: &mut B::Pages,
        layer_done: &mut dyn FnMut(LayerIdx, &mut B::Pages),
    ) -> Vec<f32> {
        backend.begin(&step.tokens, &step.spans, step.chosen());
        self.forward(backend, step, pages, layer_done);
        if step.wanted.is_empty() { Vec::new() } else { backend.read(&self.scratch.logits) }
    }

    /// Where [`Model::forward`] leaves the wanted logits.
    #[cfg(feature = "cuda")]
    pub(crate) fn logits(&self) -> &B::Rows {
        &self.scratch.logits
    }

    /// Computes a step that the backend has begun.
    pub(crate) fn forward(
        &mut self,
        backend: &mut B,
        step: &Step<'_>,
        pages: &mut B::Pages,
        layer_done: &mut dyn FnMut(LayerIdx, &mut B::Pages),
    ) {
        let Model { embedding, layers, norm, output, rope, eps, scratch } = self;
        let eps = *eps;
        match embedding {
            Embedding::Tied => backend.embed_tied(output, &step.tokens, &mut scratch.hidden),
            Embedding::Table(table) => backend.embed(table, &step.tokens, &mut scratch.hidden),
        }
        let last = layers.len() - 1;
        for (index, layer) in layers.iter().enumerate() {
            let id = LayerIdx(index as u32);
            backend.rms_norm(&scratch.hidden, &layer.attention_norm, eps, &mut scratch.normed);
            backend.linear(&scratch.normed, &layer.qkv, Epilogue::Store, &mut scratch.qkv);
            let norms = layer.head_norms.as_ref().map(|(query, key)| HeadNorms { query, key, eps });
            backend.turn_and_store(&layer.heads, rope, norms, id, &step.spans, &mut scratch.qkv, pages);
            layer_done(id, pages);
            if index < last || (!step.wanted.is_empty() && step.chosen().is_empty()) {
                backend.attention(&layer.heads, id, &step.spans, &scratch.qkv, pages, &mut scratch.attended);
                layer.after_attention(backend, eps, scratch);
            } else if !step.wanted.is_empty() {
                // Nothing reads the other rows any more.
                let spans = scratch.narrow(backend, step);
                backend.attention(&layer.heads, id, &spans, &scratch.qkv, pages, &mut scratch.attended);
                layer.after_attention(backend, eps, scratch);
            }
        }
        if !step.wanted.is_empty() {
            backend.rms_norm(&scratch.hidden, norm, eps, &mut scratch.normed);
            backend.logits(&scratch.normed, output, &mut scratch.logits);
        }
    }
}

impl<R> Scratch<R> {
    /// Goes on with the last rows of the wanted sequences alone. Returns their spans.
    fn narrow<'a, B: Backend<Rows = R>>(&mut self, backend: &mut B, step: &Step<'a>) -> Vec<Span<'a>> {
        let mut rows = Vec::with_capacity(step.wanted.len());
        let mut spans = Vec::with_capacity(step.wanted.len());
        for sequence in &step.wanted {
            let span = step.spans[*sequence];
            let last = span.tokens - 1;
            spans.push(Span {
                row: rows.len(),
                tokens: 1,
                start: span.start + last as u32,
                pages: span.pages,
            });
            rows.push(span.row + last);
        }
        backend.select(&self.hidden, &rows, &mut self.chosen);
        backend.select(&self.qkv, &rows, &mut self.chosen_qkv);
        std::mem::swap(&mut self.hidden, &mut self.chosen);
        std::mem::swap(&mut self.qkv, &mut self.chosen_qkv);
        spans
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        backend: &mut B,
        config: &Config,
        weights: &Weights,
        layer: usize,
    ) -> Result<Layer<B>, LoadError> {
        let Config { hidden, intermediate, heads, kv_heads, head_dim, .. } = *config;
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let weight = |part: &str, outputs: usize, inputs: usize, bias: bool| {
            let matrix = weights.tensor(&name(&format!("{part}.weight")), &[outputs, inputs])?;
            let bias = match bias {
                true => Some(weights.tensor(&name(&format!("{part}.bias")), &[outputs])?),
                false => None,
            };
            Ok::<_, LoadError>(Weight { matrix, bias })
        };
        let vector = |part: &str, width: usize| weights.tensor(&name(&format!("{part}.weight")), &[width]);
        let qkv = [
            weight("self_attn.q_proj", q_width, hidden, config.qkv_bias)?,
            weight("self_attn.k_proj", kv_width, hidden, config.qkv_bias)?,
            weight("self_attn.v_proj", kv_width, hidden, config.qkv_bias)?,
        ];
        let head_norms = if config.qk_norm {
            let query = backend.vector(vector("self_attn.q_norm", head_dim)?);
            Some((query, backend.vector(vector("self_attn.k_norm", head_dim)?)))
        } else {
            None
        };
        let gate = weight("mlp.gate_proj", intermediate, hidden, config.mlp_bias)?;
        let up = weight("mlp.up_proj", intermediate, hidden, config.mlp_bias)?;
        Ok(Layer {
            heads: Heads {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window: config.windows[layer],
            },
            attention_norm: backend.vector(vector("input_layernorm", hidden)?),
            qkv: backend.matrix(&qkv, hidden),
            head_norms,
            attention_output: backend
                .matrix(&[weight("self_attn.o_proj", hidden, q_width, config.output_bias)?], q_width),
            mlp_norm: backend.vector(vector("post_attention_layernorm", hidden)?),
            gate_up: backend.gated_matrix(gate, up, hidden),
            down: backend
                .matrix(&[weight("mlp.down_proj", hidden, intermediate, config.mlp_bias)?], intermediate),
        })
    }

    /// From `attended` to the layer's output in `hidden`.
    fn after_attention(&self, backend: &mut B, eps: f32, scratch: &mut Scratch<B::Rows>) {
        backend.linear(&scratch.attended, &self.attention_output, Epilogue::Add, &mut scratch.hidden);
        backend.rms_norm(&scratch.hidden, &self.mlp_norm, eps, &mut scratch.normed);
        backend.linear(&scratch.normed, &self.gate_up, Epilogue::Store, &mut scratch.gated);
        backend.linear(&scratch.gated, &self.down, Epilogue::Add, &mut scratch.hidden);
    }
}
