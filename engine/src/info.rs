//! What callers know of a loaded model.

use crate::config::{Config, SpecialTokens};
use crate::fingerprint::fingerprint;
use crate::weights::Weights;
use std::path::Path;
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

impl ModelInfo {
    /// Of the model in folder `dir`, once its weights were asked for.
    pub(crate) fn of(
        dir: &Path,
        config: Config,
        special: SpecialTokens,
        weights: &Weights,
        kv: KvShape,
    ) -> ModelInfo {
        let name =
            dir.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        ModelInfo {
            name: name.unwrap_or_else(|| "model".to_owned()),
            vocab_size: config.vocab_size as u32,
            max_positions: config.max_positions,
            kv,
            fingerprint: fingerprint(&config, weights, kv.dtype),
            eos: special.eos,
            bos: special.bos,
            parameters: weights.count(|_| true),
            layer_parameters: weights.count(|name| name.starts_with("model.layers.")),
            architecture: config.architecture,
        }
    }
}
