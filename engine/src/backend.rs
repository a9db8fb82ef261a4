//! The seam between the model definition and what computes it.

use crate::weights::Tensor;
use tandem_proto::ids::{LayerIdx, TokenId};

pub use tandem_kernels::cpu::{Epilogue, Heads, Span};

/// A weight with its bias.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// `[outputs][inputs]`
    pub matrix: Tensor<'a>,
    /// `[outputs]`
    pub bias: Option<Tensor<'a>>,
}

/// The norms of single heads' queries and keys, before they are turned.
pub struct HeadNorms<'a, V> {
    /// Weight of the queries' norm.
    pub query: &'a V,
    /// Weight of the keys' norm.
    pub key: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// Operations on activations, each a whole row at a time. The model calls them in order; an implementation
/// may queue them, and must only be done when [`Backend::read`] or a layer's callback needs the result.
///
/// Bits of a row must not depend on the other rows of the call, where an engine promises that of its logits.
pub trait Backend {
    /// A weight, in the form that products want.
    type Matrix;
    /// A vector: the weight of a norm.
    type Vector;
    /// The embedding table, if it is not the output matrix.
    type Table;
    /// Turned positions.
    type Rope;
    /// Rows of activations. Operations give them the size they need.
    type Rows: Default;
    /// The paged KV.
    type Pages;

    /// Takes weights whose outputs follow one another in one product.
    fn matrix(&mut self, parts: &[Weight<'_>], inputs: usize) -> Self::Matrix;
    /// Takes a gate and its up projection; their product is `silu(gate) * up`.
    fn gated_matrix(&mut self, gate: Weight<'_>, up: Weight<'_>, inputs: usize) -> Self::Matrix;
    /// Takes a vector.
    fn vector(&mut self, tensor: Tensor<'_>) -> Self::Vector;
    /// Takes an embedding table.
    fn table(&mut self, tensor: Tensor<'_>, width: usize) -> Self::Table;
    /// Takes the frequencies of half a head; cosines and sines are multiplied by `scale`.
    fn rope(&mut self, frequencies: Vec<f32>, scale: f32) -> Self::Rope;

    /// What the operations until the next call are about. Where not all rows go on to the end, `chosen` are the sequences
    /// whose last ones do. For backends whose memory is not the host's.
    fn begin(&mut self, _tokens: &[TokenId], _spans: &[Span<'_>], _chosen: &[usize]) {}
    /// The embeddings of tokens.
    fn embed(&mut self, table: &Self::Table, tokens: &[TokenId], out: &mut Self::Rows);
    /// The embeddings of tokens, where the output matrix is the table.
    fn embed_tied(&mut self, output: &Self::Matrix, tokens: &[TokenId], out: &mut Self::Rows);
    /// Root mean square norm.
    fn rms_norm(&mut self, x: &Self::Rows, weight: &Self::Vector, eps: f32, out: &mut Self::Rows);
    /// A product with bias; see [`Epilogue`].
    fn linear(&mut self, x: &Self::Rows, weight: &Self::Matrix, epilogue: Epilogue, out: &mut Self::Rows);
    /// The last product, whose numbers are read.
    fn logits(&mut self, x: &Self::Rows, output: &Self::Matrix, out: &mut Self::Rows) {
        self.linear(x, output, Epilogue::Store, out);
    }
    /// Normalises (where asked) and turns queries and keys in place, and writes keys and values to pages.
    #[allow(clippy::too_many_arguments)] // One fused operation; each argument is a different thing.
    fn turn_and_store(
        &mut self,
        heads: &Heads,
        rope: &mut Self::Rope,
        norms: Option<HeadNorms<'_, Self::Vector>>,
        layer: LayerIdx,
        spans: &[Span<'_>],
        qkv: &mut Self::Rows,
        pages: &mut Self::Pages,
    );
    /// Attention over pages.
    fn attention(
        &mut self,
        heads: &Heads,
        layer: LayerIdx,
        spans: &[Span<'_>],
        qkv: &Self::Rows,
        pages: &Self::Pages,
        out: &mut Self::Rows,
    );
    /// Some of the rows.
    fn select(&mut self, x: &Self::Rows, rows: &[usize], out: &mut Self::Rows);
    /// The numbers of all rows.
    fn read(&mut self, x: &Self::Rows) -> Vec<f32>;
}
