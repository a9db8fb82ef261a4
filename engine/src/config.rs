//! `config.json` and `generation_config.json`: what the model is, or why it cannot be run.

use crate::load::{LoadError, read_json};
use crate::rope::Rope;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::path::Path;
use tandem_proto::ids::TokenId;
use tandem_proto::layout::MAX_LAYERS;
use tandem_proto::layout::{KvDtype, KvShape};

/// The families of models. Their differences are in [`Config`]; the rest of the engine knows no family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

const ARCHITECTURES: [(&str, Family); 4] = [
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Mistral),
    ("Qwen2ForCausalLM", Family::Qwen2),
    ("Qwen3ForCausalLM", Family::Qwen3),
];

/// A model that can be run.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Config {
    pub(crate) architecture: String,
    pub(crate) vocab_size: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) max_positions: u32,
    pub(crate) norm_eps: f32,
    pub(crate) rope: Rope,
    pub(crate) tied: bool,
    /// Queries, keys and values have a bias.
    pub(crate) qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub(crate) output_bias: bool,
    /// The three projections of the MLP have a bias.
    pub(crate) mlp_bias: bool,
    /// Queries and keys are normalised head by head.
    pub(crate) qk_norm: bool,
    /// For each layer, how many positions a query sees; all if none.
    pub(crate) windows: Vec<Option<u32>>,
}

/// Tokens that begin and end sequences.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct SpecialTokens {
    pub(crate) eos: Vec<TokenId>,
    pub(crate) bos: Option<TokenId>,
}

impl Config {
    /// Reads the configuration in `dir`.
    pub(crate) fn read(dir: &Path) -> Result<(Config, SpecialTokens), LoadError> {
        let json = read_json(&dir.join("config.json"))?;
        let settings = Settings::new(&json);
        let config = Config::from_settings(&settings)?;
        let path = dir.join("generation_config.json");
        let generation = if path.is_file() { read_json(&path)? } else { Map::new() };
        let tokens = SpecialTokens::read(&Settings::new(&generation), &settings, config.vocab_size)?;
        Ok((config, tokens))
    }

    /// The shape of its keys and values, stored as `dtype`.
    pub(crate) fn kv_shape(
        &self,
        dtype: KvDtype,
        page_tokens: u32,
        chunk_tokens: u32,
    ) -> Result<KvShape, LoadError> {
        let kv = KvShape {
            layers: self.layers as u32,
            kv_heads: self.kv_heads as u32,
            head_dim: self.head_dim as u32,
            page_tokens,
            chunk_tokens,
            dtype,
        };
        kv.validate().map_err(|e| LoadError::field("KV shape", format_args!("{kv:?}"), e))?;
        Ok(kv)
    }

    fn from_settings(config: &Settings<'_>) -> Result<Config, LoadError> {
        let (architecture, family) = architecture(config)?;
        refuse_what_changes_results(config)?;
        let hidden = config.required_count("hidden_size", 1..=1 << 17)?;
        let heads = config.required_count("num_attention_heads", 1..=1 << 10)?;
        let kv_heads = match (config.count("num_key_value_heads", 1..=1 << 10)?, family) {
            (Some(kv_heads), _) => kv_heads,
            (None, Family::Llama) => heads,
            (None, _) => return Err(config.missing("num_key_value_heads")),
        };
        if !heads.is_multiple_of(kv_heads) {
            let allowed = format_args!("a divisor of num_attention_heads, {heads}").to_string();
            return Err(LoadError::field("num_key_value_heads", kv_heads, allowed));
        }
        let head_dim = match (config.count("head_dim", 1..=1 << 12)?, family) {
            (Some(head_dim), _) => head_dim,
            (None, Family::Qwen3) => 128,
            (None, _) if hidden.is_multiple_of(heads) => hidden / heads,
            (None, _) => {
                let allowed =
                    format!("a multiple of num_attention_heads, {heads}, where head_dim is not given");
                return Err(LoadError::field("hidden_size", hidden, allowed));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(LoadError::field("head_dim", head_dim, "even: RoPE turns pairs"));
        }
        let layers = config.required_count("num_hidden_layers", 1..=MAX_LAYERS as usize)?;
        let max_positions = config.required_count("max_position_embeddings", 1..=1 << 24)? as u32;
        let norm_eps = config.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(0.0..=1.0).contains(&norm_eps) {
            return Err(LoadError::field("rms_norm_eps", norm_eps, "from 0 to 1"));
        }
        let attention_bias = config.flag("attention_bias")?.unwrap_or(false);
        let attention_bias = attention_bias && matches!(family, Family::Llama | Family::Qwen3);
        Ok(Config {
            architecture,
            vocab_size: config.required_count("vocab_size", 1..=1 << 24)?,
            hidden,
            intermediate: config.required_count("intermediate_size", 1..=1 << 20)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            norm_eps,
            rope: Rope::read(config, max_positions)?,
            tied: config.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: attention_bias || family == Family::Qwen2,
            output_bias: attention_bias,
            mlp_bias: family == Family::Llama && config.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            windows: windows(config, family, layers)?,
        })
    }
}

fn architecture(config: &Settings<'_>) -> Result<(String, Family), LoadError> {
    let supported = ARCHITECTURES.map(|(name, _)| name).join(", ");
    let found = match config.json.get("architectures") {
        Some(Value::Array(names)) if names.len() == 1 => names[0].as_str(),
        _ => None,
    };
    let Some(name) = found else {
        let value = config.json.get("architectures").unwrap_or(&Value::Null);
        return Err(LoadError::unsupported("architectures", value, format!("one of {supported}")));
    };
    match ARCHITECTURES.iter().find(|(known, _)| *known == name) {
        Some((_, family)) => Ok((name.to_owned(), *family)),
        None => Err(LoadError::unsupported("architectures", name, supported)),
    }
}

/// Fields that these architectures know, or that other tools add, and that would change what is computed.
fn refuse_what_changes_results(config: &Settings<'_>) -> Result<(), LoadError> {
    for field in ["quantization_config", "compression_config"] {
        if config.has(field) {
            let method = config.object(field)?.and_then(|q| q.text("quant_method").ok().flatten());
            let value = method.unwrap_or_else(|| "set".to_owned());
            return Err(LoadError::unsupported(field, value, "weights in F32, F16 or BF16"));
        }
    }
    match config.text("hidden_act")?.as_deref() {
        None | Some("silu") => {}
        Some(other) => return Err(LoadError::unsupported("hidden_act", other, "silu")),
    }
    for field in ["num_experts", "num_local_experts", "n_routed_experts"] {
        if config.number(field)?.is_some_and(|n| n > 0.0) {
            return Err(LoadError::unsupported(field, config.json[field].clone(), "models without experts"));
        }
    }
    if let Some(factor) = config.number("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(LoadError::unsupported("partial_rotary_factor", factor, "1"));
    }
    // A tensor-parallel pretraining split changes only rounding.
    for field in ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"] {
        if config.number(field)?.is_some_and(|x| x != 1.0) {
            return Err(LoadError::unsupported(field, config.json[field].clone(), "1"));
        }
    }
    for field in ["final_logit_softcapping", "attn_logit_softcapping"] {
        if config.has(field) {
            return Err(LoadError::unsupported(field, config.json[field].clone(), "null"));
        }
    }
    Ok(())
}

fn windows(config: &Settings<'_>, family: Family, layers: usize) -> Result<Vec<Option<u32>>, LoadError> {
    let window = config.count("sliding_window", 1..=1 << 24)?.map(|w| w as u32);
    let switched_on = config.flag("use_sliding_window")?.unwrap_or(false);
    match family {
        Family::Llama => Ok(vec![None; layers]),
        Family::Mistral => Ok(vec![window; layers]),
        Family::Qwen2 | Family::Qwen3 => {
            let window = window.filter(|_| switched_on);
            let Some(types) = config.json.get("layer_types").filter(|types| !types.is_null()) else {
                let first = config.count("max_window_layers", 0..=MAX_LAYERS as usize)?.unwrap_or(28);
                return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
            };
            let types = types.as_array().filter(|types| types.len() == layers).ok_or_else(|| {
                LoadError::field("layer_types", types, format_args!("an array of {layers} layers"))
            })?;
            types
                .iter()
                .map(|kind| match (kind.as_str(), window) {
                    (Some("full_attention"), _) => Ok(None),
                    (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
                    (Some("sliding_attention"), None) => {
                        let allowed =
                            "a number of positions, and use_sliding_window true, beside sliding layer_types";
                        Err(LoadError::field("sliding_window", "not in use", allowed))
                    }
                    _ => {
                        Err(LoadError::unsupported("layer_types", kind, "full_attention, sliding_attention"))
                    }
                })
                .collect()
        }
    }
}

impl SpecialTokens {
    /// They are where `generation_config.json` says, else where `config.json` does.
    fn read(
        generation: &Settings<'_>,
        config: &Settings<'_>,
        vocab_size: usize,
    ) -> Result<SpecialTokens, LoadError> {
        let tokens = |field: &str| match generation.tokens(field, vocab_size)? {
            Some(tokens) => Ok(tokens),
            None => Ok::<_, LoadError>(config.tokens(field, vocab_size)?.unwrap_or_default()),
        };
        Ok(SpecialTokens { eos: tokens("eos_token_id")?, bos: tokens("bos_token_id")?.first().copied() })
    }
}

/// A JSON object whose fields are read with their bounds. `null` is the same as nothing.
#[derive(Clone)]
pub(crate) struct Settings<'a> {
    json: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Settings<'a> {
    fn new(json: &'a Map<String, Value>) -> Settings<'a> {
        Settings { json, prefix: String::new() }
    }

    /// The full name of a field.
    pub(crate) fn path(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.json.get(field).filter(|value| !value.is_null())
    }

    fn wrong(&self, field: &str, value: &Value, allowed: impl ToString) -> LoadError {
        let mut value = value.to_string();
        if value.len() > 100 {
            value = value.chars().take(100).chain("…".chars()).collect();
        }
        LoadError::field(self.path(field), value, allowed)
    }

    fn missing(&self, field: &str) -> LoadError {
        LoadError::field(self.path(field), "missing", "given")
    }

    pub(crate) fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    /// The name of a field that is an object, if there is one.
    pub(crate) fn nested(&self) -> Option<String> {
        self.json.iter().find(|(_, value)| value.is_object()).map(|(name, _)| name.clone())
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<Settings<'a>>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(json)) => {
                Ok(Some(Settings { json, prefix: format!("{}{field}.", self.prefix) }))
            }
            Some(other) => Err(self.wrong(field, other, "an object")),
        }
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<String>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.wrong(field, other, "a string")),
        }
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(field, other, "true or false")),
        }
    }

    pub(crate) fn number(&self, field: &str) -> Result<Option<f32>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().map(|x| x as f32).filter(|x| x.is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong(field, value, "a finite number")),
            },
        }
    }

    pub(crate) fn required_number(&self, field: &str, range: RangeInclusive<f32>) -> Result<f32, LoadError> {
        let x = self.number(field)?.ok_or_else(|| self.missing(field))?;
        if range.contains(&x) {
            Ok(x)
        } else {
            let allowed = format_args!("from {} to {}", range.start(), range.end()).to_string();
            Err(LoadError::field(self.path(field), x, allowed))
        }
    }

    fn count(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let allowed = format!("a whole number from {} to {}", range.start(), range.end());
                Err(self.wrong(field, value, allowed))
            }
        }
    }

    fn required_count(&self, field: &str, range: RangeInclusive<usize>) -> Result<usize, LoadError> {
        self.count(field, range)?.ok_or_else(|| self.missing(field))
    }

    /// One token or an array of tokens.
    fn tokens(&self, field: &str, vocab_size: usize) -> Result<Option<Vec<TokenId>>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let one = |value: &Value| {
            let id = value.as_u64().filter(|id| *id < vocab_size as u64);
            id.map(|id| TokenId(id as u32))
        };
        let tokens = match value {
            Value::Array(values) => values.iter().map(one).collect(),
            value => one(value).map(|token| vec![token]),
        };
        match tokens {
            Some(tokens) => Ok(Some(tokens)),
            None => Err(self.wrong(field, value, format_args!("tokens below {vocab_size}"))),
        }
    }
}
