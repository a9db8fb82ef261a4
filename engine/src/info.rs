//! What callers know of a loaded model.

use tandem_proto::ids::TokenId;
use tandem_proto::keys::Fingerprint;
use tandem_proto::layout::KvShape;

/// A loaded model, as others see it.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelInfo {
    /// The name of its folder.
    pub name: String,
    /// As in its `config.json`.
    pub architecture: String,
    /// Tokens of the vocabulary; logits have so many numbers.
    pub vocab_size: u32,
    /// The longest sequence, in tokens.
    pub max_positions: u32,
    /// The shape of its KV.
    pub kv: KvShape,
    /// Names everything that KV depends on besides tokens.
    pub fingerprint: Fingerprint,
    /// Tokens that end a completion.
    pub eos: Vec<TokenId>,
    /// The token that begins a sequence, if the model has one.
    pub bos: Option<TokenId>,
    /// Numbers of all weights.
    pub parameters: u64,
    /// Those of them that every token goes through: all but the embedding and the output matrix.
    pub layer_parameters: u64,
}
