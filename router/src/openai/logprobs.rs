//! Log probabilities, in the two forms that the two endpoints use.

use serde::Serialize;
use serde_json::{Map, Value};
use tandem_proto::ids::TokenId;
use tandem_proto::wire::Logprobs;
use tandem_text::Tokenizer;

/// What stands for a probability of zero: JSON has no infinity. vLLM uses the same number.
const LEAST: f32 = -9999.0;

/// A token that shows in the text, and how likely it and others were.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct TokenLogprobs {
    /// The token.
    #[serde(flatten)]
    pub chosen: TokenLogprob,
    /// The likeliest tokens in its place.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token and how likely it was.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct TokenLogprob {
    /// Its text, with replacement characters where it is part of a character.
    pub token: String,
    /// Its log probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl TokenLogprob {
    fn new(tokenizer: &Tokenizer, token: TokenId, logprob: f32) -> TokenLogprob {
        let bytes = tokenizer.token_bytes(token);
        let token = String::from_utf8_lossy(&bytes).into_owned();
        TokenLogprob { token, logprob: if logprob.is_finite() { logprob.max(LEAST) } else { LEAST }, bytes }
    }
}

impl TokenLogprobs {
    /// What a node reported, with the tokens as text.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, token: TokenId, logprobs: &Logprobs) -> TokenLogprobs {
        let top = logprobs.top.iter().map(|(token, logprob)| TokenLogprob::new(tokenizer, *token, *logprob));
        TokenLogprobs {
            chosen: TokenLogprob::new(tokenizer, token, logprobs.chosen),
            top_logprobs: top.collect(),
        }
    }
}

/// Chat's form.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ChatLogprobs {
    /// Of each token of the content.
    pub content: Vec<TokenLogprobs>,
    /// Always null: refusals have no text of their own here.
    pub refusal: Option<Vec<TokenLogprobs>>,
}

impl ChatLogprobs {
    /// Chat's form of `content`.
    #[must_use]
    pub fn new(content: Vec<TokenLogprobs>) -> ChatLogprobs {
        ChatLogprobs { content, refusal: None }
    }
}

/// The text completions' form: lists side by side.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// The form of `content`, whose first token starts at character `offset`, which it moves on.
    #[must_use]
    pub fn new(content: Vec<TokenLogprobs>, offset: &mut usize) -> TextLogprobs {
        let mut lists = TextLogprobs {
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
        };
        for token in content {
            let mut top = Map::new();
            for TokenLogprob { token, logprob, .. } in token.top_logprobs {
                top.entry(token).or_insert_with(|| logprob.into());
            }
            top.entry(token.chosen.token.clone()).or_insert_with(|| token.chosen.logprob.into());
            lists.top_logprobs.push(top);
            lists.token_logprobs.push(token.chosen.logprob);
            lists.text_offset.push(*offset);
            *offset += token.chosen.token.chars().count();
            lists.tokens.push(token.chosen.token);
        }
        lists
    }
}
