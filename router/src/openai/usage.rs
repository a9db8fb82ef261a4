//! How many tokens a request took.

use serde::Serialize;
use tandem_proto::wire::CachedTokens;

/// Token counts as OpenAI reports them. The token that ended a completion counts, though it shows no text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: u32,
    /// Tokens of all completions.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// More about the prompts.
    pub prompt_tokens_details: PromptTokens,
}

/// More about the prompts' tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct PromptTokens {
    /// Tokens whose KV was reused rather than computed.
    pub cached_tokens: u32,
    /// Where their KV was: an extension of ours.
    pub tandem: CachedTokens,
}

impl Usage {
    /// The usage of `prompt` and `completion` tokens, `cached` of them reused.
    #[must_use]
    pub fn new(prompt: u32, completion: u32, cached: CachedTokens) -> Usage {
        Usage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt.saturating_add(completion),
            prompt_tokens_details: PromptTokens { cached_tokens: cached.total(), tandem: cached },
        }
    }

    /// The usage of both.
    #[must_use]
    pub fn plus(self, other: Usage) -> Usage {
        Usage::new(
            self.prompt_tokens.saturating_add(other.prompt_tokens),
            self.completion_tokens.saturating_add(other.completion_tokens),
            self.prompt_tokens_details.tandem.plus(other.prompt_tokens_details.tandem),
        )
    }
}
