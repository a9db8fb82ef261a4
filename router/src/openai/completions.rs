//! `POST /v1/completions`.

use super::ApiError;
use super::chat::Head;
use super::fields::{Fields, wrong};
use super::logprobs::TextLogprobs;
use super::params::{Params, model, token_ids, top_logprobs};
use super::usage::Usage;
use serde::Serialize;
use serde_json::Value;
use tandem_proto::ids::TokenId;
use tandem_proto::wire::MAX_PROMPT_TOKENS;

/// Prompts of one request.
pub const MAX_PROMPTS: usize = 128;

/// A request to go on with one or more prompts.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    /// The model's name.
    pub model: String,
    /// What to go on with.
    pub prompts: Vec<Prompt>,
    /// The prompt is part of the text.
    pub echo: bool,
    /// The tokenizer may add tokens at the start, as it does by default.
    pub add_special_tokens: bool,
    /// How to go on.
    pub params: Params,
}

/// A prompt, with the path of the field it came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prompt {
    /// The field.
    pub path: String,
    /// What it holds.
    pub content: PromptContent,
}

/// A prompt in one of its two forms.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PromptContent {
    /// To be tokenized.
    Text(String),
    /// Already tokenized.
    Tokens(Vec<TokenId>),
}

impl CompletionRequest {
    /// Reads a request's body.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Value, vocab: u32) -> Result<CompletionRequest, ApiError> {
        let fields = Fields::body(body)?;
        let mut params = Params::read(&fields, &["max_tokens"], vocab)?;
        params.top_logprobs = match fields.get("logprobs") {
            // Some clients send chat's form of "none".
            Some(Value::Bool(false)) => None,
            _ => top_logprobs(&fields, "logprobs")?,
        };
        if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported("suffix", "'suffix' is not supported by this server."));
        }
        if let Some(best_of) = fields.integer("best_of", 1..=128)?
            && best_of != i64::from(params.n)
        {
            let message = format!("'best_of' is {best_of}; it must be equal to 'n', which is {}.", params.n);
            return Err(ApiError::unsupported("best_of", message));
        }
        let echo = fields.flag("echo")?.unwrap_or(false);
        if echo && params.top_logprobs.is_some() {
            let message =
                "'echo' together with 'logprobs' is not supported: prompts have no log probabilities here.";
            return Err(ApiError::unsupported("echo", message));
        }
        Ok(CompletionRequest {
            model: model(&fields)?.to_owned(),
            prompts: prompts(&fields, vocab)?,
            echo,
            add_special_tokens: fields.flag("add_special_tokens")?.unwrap_or(true),
            params,
        })
    }
}

fn prompts(fields: &Fields<'_>, vocab: u32) -> Result<Vec<Prompt>, ApiError> {
    const FORMS: &str = "a string, an array of strings, an array of tokens, or an array of such arrays";
    let prompt = |path: &str, content| Prompt { path: path.to_owned(), content };
    let value = fields.get("prompt");
    let value = value.ok_or_else(|| ApiError::field("prompt", "'prompt' is missing."))?;
    match value {
        Value::String(text) => Ok(vec![prompt("prompt", PromptContent::Text(text.clone()))]),
        Value::Array(items) => match items.first() {
            None => Err(ApiError::field("prompt", "'prompt' is empty.")),
            Some(Value::Number(_)) => {
                let items = fields.array("prompt", MAX_PROMPT_TOKENS)?.unwrap_or_default();
                Ok(vec![prompt("prompt", PromptContent::Tokens(token_ids("prompt", items, vocab)?))])
            }
            Some(_) => {
                let items = fields.array("prompt", MAX_PROMPTS)?.unwrap_or_default();
                let read = |(index, item): (usize, &Value)| {
                    let path = format!("prompt[{index}]");
                    let content = match item {
                        Value::String(text) => PromptContent::Text(text.clone()),
                        Value::Array(tokens) if tokens.len() > MAX_PROMPT_TOKENS => {
                            let message = format!(
                                "'{path}' has {} tokens; {MAX_PROMPT_TOKENS} are allowed.",
                                tokens.len()
                            );
                            return Err(ApiError::field(path, message));
                        }
                        Value::Array(tokens) => PromptContent::Tokens(token_ids(&path, tokens, vocab)?),
                        other => return Err(wrong(&path, other, "a string or an array of tokens")),
                    };
                    Ok(Prompt { path, content })
                };
                items.iter().enumerate().map(read).collect()
            }
        },
        other => Err(wrong("prompt", other, FORMS)),
    }
}

/// A whole answer, or with `usage` left out or null a part of a streamed one: both have the same form.
#[derive(Debug, Serialize)]
pub struct TextCompletion<'a> {
    /// What it shares with other parts.
    #[serde(flatten)]
    pub head: &'a Head,
    /// What is new; empty in the part with usage.
    pub choices: Vec<TextChoice>,
    /// Left out, null, or token counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One completion, or what is new in it.
#[derive(Debug, Serialize)]
pub struct TextChoice {
    /// Which.
    pub index: u32,
    /// Its text.
    pub text: String,
    /// Log probabilities, when asked for.
    pub logprobs: Option<TextLogprobs>,
    /// Why it ended, if it has.
    pub finish_reason: Option<&'static str>,
}
