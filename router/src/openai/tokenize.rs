//! `POST /tokenize` and `/detokenize`, in the shapes that vLLM gave them.

use super::ApiError;
use super::fields::Fields;
use super::params::token_ids;
use serde::Serialize;
use serde_json::Value;
use tandem_proto::ids::TokenId;
use tandem_proto::wire::MAX_PROMPT_TOKENS;
use tandem_text::ChatInput;

/// Text or messages to turn into tokens.
#[derive(Clone, Debug)]
pub struct TokenizeRequest {
    /// The model's name, if given.
    pub model: Option<String>,
    /// What to tokenize.
    pub content: TokenizeContent,
    /// The tokenizer may add tokens at the start; by default it does for text and not for messages.
    pub add_special_tokens: bool,
    /// Return the tokens' text too.
    pub return_token_strs: bool,
}

/// What is tokenized.
#[derive(Clone, Debug)]
pub enum TokenizeContent {
    /// Plain text.
    Prompt(String),
    /// A conversation.
    Chat(Box<ChatInput>),
}

impl TokenizeRequest {
    /// Reads a request's body.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Value) -> Result<TokenizeRequest, ApiError> {
        let fields = Fields::body(body)?;
        let content = match (fields.string("prompt")?, fields.get("messages")) {
            (Some(prompt), None) => TokenizeContent::Prompt(prompt.to_owned()),
            (None, Some(_)) => TokenizeContent::Chat(Box::new(super::chat::input(&fields)?)),
            (Some(_), Some(_)) => {
                return Err(ApiError::field("messages", "'prompt' and 'messages' exclude each other."));
            }
            (None, None) => return Err(ApiError::field("prompt", "'prompt' or 'messages' is needed.")),
        };
        let plain = matches!(content, TokenizeContent::Prompt(_));
        Ok(TokenizeRequest {
            model: fields.string("model")?.map(str::to_owned),
            content,
            add_special_tokens: fields.flag("add_special_tokens")?.unwrap_or(plain),
            return_token_strs: fields.flag("return_token_strs")?.unwrap_or(false),
        })
    }
}

/// Tokens and what they must fit into.
#[derive(Debug, Serialize)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// The longest sequence this server takes.
    pub max_model_len: u32,
    /// The tokens.
    pub tokens: Vec<TokenId>,
    /// Their text, when asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Tokens to turn into text.
#[derive(Clone, Debug)]
pub struct DetokenizeRequest {
    /// The model's name, if given.
    pub model: Option<String>,
    /// The tokens.
    pub tokens: Vec<TokenId>,
}

impl DetokenizeRequest {
    /// Reads a request's body.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Value, vocab: u32) -> Result<DetokenizeRequest, ApiError> {
        let fields = Fields::body(body)?;
        let missing = || ApiError::field("tokens", "'tokens' is missing; it must be an array of tokens.");
        let tokens = fields.array("tokens", MAX_PROMPT_TOKENS)?.ok_or_else(missing)?;
        Ok(DetokenizeRequest {
            model: fields.string("model")?.map(str::to_owned),
            tokens: token_ids("tokens", tokens, vocab)?,
        })
    }
}

/// The text of tokens, special ones included.
#[derive(Debug, Serialize)]
pub struct DetokenizeResponse {
    /// The text.
    pub prompt: String,
}
