//! What chat and text completions have in common: how tokens are chosen, and when generation ends.

use super::ApiError;
use super::fields::{Fields, integer, wrong};
use serde_json::Value;
use tandem_proto::ids::TokenId;
use tandem_proto::wire::{MAX_CHOICES, MAX_TOKEN_LIST, MAX_TOP_LOGPROBS};

/// Stop strings of one request.
const MAX_STOPS: usize = 16;
/// The longest stop string.
const MAX_STOP_BYTES: usize = 1024;
/// OpenAI's own limit of biased tokens is 300; ours is what a message to a node holds.
const MAX_BIASES: usize = MAX_TOKEN_LIST;
/// Stop tokens of one request; leaves room in the message for the model's own.
const MAX_STOP_TOKENS: usize = MAX_TOKEN_LIST / 2;

/// Fields that would change the output, on any endpoint, and that no node here supports.
const UNSUPPORTED: [&str; 12] = [
    "functions",
    "function_call",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "audio",
    "prediction",
];

/// A request's choices; `None` means that the model's own default applies.
#[derive(Clone, PartialEq, Debug)]
pub struct Params {
    /// Tokens of a completion.
    pub max_tokens: Option<u32>,
    /// The field that said so.
    pub max_tokens_field: &'static str,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// The most likely tokens; 0 keeps all.
    pub top_k: Option<u32>,
    /// The least likely tokens, relative to the most likely one.
    pub min_p: Option<f32>,
    /// Penalty for tokens that were generated.
    pub presence_penalty: f32,
    /// Penalty for each time a token was generated.
    pub frequency_penalty: f32,
    /// Penalty for tokens of prompt and output.
    pub repetition_penalty: Option<f32>,
    /// For sampling that can be repeated.
    pub seed: Option<u64>,
    /// Completions of each prompt.
    pub n: u32,
    /// Strings that end a completion.
    pub stop: Vec<String>,
    /// Tokens that end a completion, besides the model's own.
    pub stop_token_ids: Vec<TokenId>,
    /// Do not end at the model's own end tokens.
    pub ignore_eos: bool,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Report log probabilities, with this many alternatives.
    pub top_logprobs: Option<u8>,
    /// Send tokens as they come.
    pub stream: bool,
    /// End a stream with a chunk of usage.
    pub include_usage: bool,
    /// Special tokens leave no text.
    pub skip_special_tokens: bool,
    /// The stop string that was found is part of the text.
    pub include_stop: bool,
}

impl Params {
    /// Reads everything but log probabilities, which differ between the endpoints.
    pub(crate) fn read(
        fields: &Fields<'_>,
        max_tokens_fields: &[&'static str],
        vocab: u32,
    ) -> Result<Params, ApiError> {
        refuse_unsupported(fields)?;
        let mut max_tokens = None;
        let mut max_tokens_field = max_tokens_fields[0];
        for field in max_tokens_fields {
            if let (None, Some(tokens)) = (max_tokens, fields.integer(field, 1..=i64::from(u32::MAX))?) {
                max_tokens = Some(tokens as u32);
                max_tokens_field = field;
            }
        }
        let positive = f64::from(f32::MIN_POSITIVE);
        let stream = fields.flag("stream")?.unwrap_or(false);
        let options = fields.object("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::field(
                "stream_options",
                "'stream_options' is only allowed when 'stream' is true.",
            ));
        }
        let include_usage = options.map(|options| options.flag("include_usage")).transpose()?.flatten();
        Ok(Params {
            max_tokens,
            max_tokens_field,
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_p: fields.number("top_p", positive..=1.0)?,
            // -1 is vLLM's way to say off.
            top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as u32),
            min_p: fields.number("min_p", 0.0..=1.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", positive..=100.0)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
            n: fields.integer("n", 1..=i64::from(MAX_CHOICES))?.unwrap_or(1) as u32,
            stop: stops(fields)?,
            stop_token_ids: match fields.array("stop_token_ids", MAX_STOP_TOKENS)? {
                Some(items) => token_ids("stop_token_ids", items, vocab)?,
                None => Vec::new(),
            },
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            logit_bias: biases(fields, vocab)?,
            top_logprobs: None,
            stream,
            include_usage: include_usage.unwrap_or(false),
            skip_special_tokens: fields.flag("skip_special_tokens")?.unwrap_or(true),
            include_stop: fields.flag("include_stop_str_in_output")?.unwrap_or(false),
        })
    }
}

/// The number of alternatives to report, from a field that holds it.
pub(crate) fn top_logprobs(fields: &Fields<'_>, key: &str) -> Result<Option<u8>, ApiError> {
    Ok(fields.integer(key, 0..=MAX_TOP_LOGPROBS as i64)?.map(|count| count as u8))
}

/// The name of the model that is asked for.
pub(crate) fn model<'a>(fields: &Fields<'a>) -> Result<&'a str, ApiError> {
    let missing = || ApiError::field("model", "'model' is missing; GET /v1/models lists what there is.");
    fields.string("model")?.ok_or_else(missing)
}

/// Token ids that the model has.
pub(crate) fn token_ids(path: &str, items: &[Value], vocab: u32) -> Result<Vec<TokenId>, ApiError> {
    let last = i64::from(vocab) - 1;
    let token = |(index, item): (usize, &Value)| {
        // The path is made only for an error: prompts may have a million tokens.
        match item.as_i64().filter(|id| (0..=last).contains(id)) {
            Some(id) => Ok(TokenId(id as u32)),
            None => integer(&format!("{path}[{index}]"), item, 0..=last).map(|id| TokenId(id as u32)),
        }
    };
    items.iter().enumerate().map(token).collect()
}

fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    let used = |key: &&str| match fields.get(key) {
        None => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    if let Some(key) = UNSUPPORTED.iter().copied().find(used) {
        return Err(ApiError::unsupported(key, format!("'{key}' is not supported by this server.")));
    }
    if fields.flag("use_beam_search")? == Some(true) {
        return Err(ApiError::unsupported("use_beam_search", "Beam search is not supported by this server."));
    }
    if fields.integer("min_tokens", 0..=i64::MAX)?.is_some_and(|min| min > 0) {
        return Err(ApiError::unsupported("min_tokens", "'min_tokens' is not supported by this server."));
    }
    if let Some(format) = fields.object("response_format")?
        && format.string("type")? != Some("text")
    {
        let message = "Only the response format {\"type\": \"text\"} is supported by this server.";
        return Err(ApiError::unsupported("response_format", message));
    }
    Ok(())
}

fn stops(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let stops = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![("stop".to_owned(), stop.clone())],
        Some(Value::Array(_)) => {
            let items = fields.array("stop", MAX_STOPS)?.unwrap_or_default();
            let stop = |(index, item): (usize, &Value)| {
                let path = format!("stop[{index}]");
                match item {
                    Value::String(stop) => Ok((path, stop.clone())),
                    other => Err(wrong(&path, other, "a string")),
                }
            };
            items.iter().enumerate().map(stop).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong("stop", other, "a string or an array of strings")),
    };
    for (path, stop) in &stops {
        if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
            let message =
                format!("'{path}' has {} bytes; it must have from 1 to {MAX_STOP_BYTES}.", stop.len());
            return Err(ApiError::field(path, message));
        }
    }
    Ok(stops.into_iter().map(|(_, stop)| stop).collect())
}

fn biases(fields: &Fields<'_>, vocab: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let count = biases.map().len();
    if count > MAX_BIASES {
        let message = format!("'logit_bias' has {count} entries; {MAX_BIASES} are allowed.");
        return Err(ApiError::field("logit_bias", message));
    }
    let bias = |key: &String| {
        let token = key.parse().ok().filter(|token| *token < vocab);
        let unknown = || {
            let path = format!("logit_bias.{key}");
            ApiError::field(
                &path,
                format!("'{path}' names no token; tokens are numbers from 0 to {}.", vocab - 1),
            )
        };
        let token = TokenId(token.ok_or_else(unknown)?);
        Ok((token, biases.number(key, -100.0..=100.0)?.unwrap_or(0.0)))
    };
    biases.map().keys().map(bias).collect()
}
