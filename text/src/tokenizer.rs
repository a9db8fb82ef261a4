//! Text to tokens, and a token to its bytes.

use serde_json::Value;
use std::collections::HashSet;
use tandem_proto::ids::TokenId;
use tandem_proto::wire::MAX_PROMPT_TOKENS;

/// The longest text that is encoded: no tokenizer in use makes tokens of more than 64 bytes on average, so
/// longer text cannot fit the longest prompt.
const MAX_TEXT_BYTES: usize = MAX_PROMPT_TOKENS * 64;

/// How the tokenizer writes bytes in its vocabulary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Alphabet {
    /// Each byte as one printable character (GPT-2, Llama 3, Qwen).
    ByteLevel,
    /// Text with `▁` for spaces, and `<0x0A>` for bytes that no token covers (Llama 2, Mistral).
    SentencePiece,
}

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    alphabet: Alphabet,
    /// Added tokens, whose vocabulary entry is their text.
    added: HashSet<u32>,
    /// Added tokens that are control tokens and do not show in text.
    special: HashSet<u32>,
    /// The most bytes of text that one token takes up; none where text is dropped or shortened before it
    /// becomes tokens, so that there is no such bound.
    longest: Option<usize>,
}

/// Why text or tokens are refused.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is no tokenizer.
    #[error("tokenizer.json: {0}")]
    File(String),
    /// The text is longer than any prompt.
    #[error("text of {bytes} bytes is longer than the {max} bytes that are tokenized")]
    Long {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The tokenizer failed on this text.
    #[error("text cannot be tokenized: {0}")]
    Encode(String),
    /// The tokenizer failed on these tokens.
    #[error("tokens cannot be turned into text: {0}")]
    Decode(String),
}

impl Tokenizer {
    /// Reads the contents of a `tokenizer.json`.
    ///
    /// # Errors
    /// When they are not a tokenizer.
    pub fn from_json(json: &[u8]) -> Result<Tokenizer, TokenizerError> {
        let file = |cause: String| TokenizerError::File(cause);
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| file(e.to_string()))?;
        // Both would silently change prompts; a prompt that is too long is refused instead.
        inner.with_truncation(None).map_err(|e| file(e.to_string()))?;
        inner.with_padding(None);
        let value: Value = serde_json::from_slice(json).map_err(|e| file(e.to_string()))?;
        let alphabet = if mentions_byte_level(&value["decoder"]) {
            Alphabet::ByteLevel
        } else {
            Alphabet::SentencePiece
        };
        let decoder = inner.get_added_tokens_decoder();
        let special = decoder.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let added = decoder.keys().copied().collect();
        let keeps_all = alphabet == Alphabet::ByteLevel
            && value["normalizer"].is_null()
            && !removes_text(&value["pre_tokenizer"])
            && !decoder.values().any(|token| token.lstrip || token.rstrip);
        let mut tokenizer = Tokenizer { inner, alphabet, added, special, longest: None };
        if keeps_all {
            let vocab = tokenizer.inner.get_vocab(true);
            tokenizer.longest = vocab.values().map(|id| tokenizer.token_bytes(TokenId(*id)).len()).max();
        }
        Ok(tokenizer)
    }

    /// A number of tokens that `text` has at least: tells cheaply that a text is far too long.
    #[must_use]
    pub fn least_tokens(&self, text: &str) -> usize {
        self.longest.map_or(0, |longest| text.len() / longest.max(1))
    }

    /// The tokens of `text`. With `add_special_tokens` the tokenizer may add tokens at the start and end, as
    /// it does for a plain prompt; a rendered chat template already holds them.
    ///
    /// Special tokens that are spelled out in `text` become special tokens, as with Hugging Face: a chat
    /// template works by this. Whoever puts text of others into a prompt has to remove them from it first.
    ///
    /// # Errors
    /// When the text is too long or cannot be tokenized.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TokenizerError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TokenizerError::Long { bytes: text.len(), max: MAX_TEXT_BYTES });
        }
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    /// The text of `tokens`.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[TokenId], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        self.inner.decode(&ids, skip_special_tokens).map_err(|e| TokenizerError::Decode(e.to_string()))
    }

    /// Whether `token` controls the model rather than showing in text.
    #[must_use]
    pub fn is_special(&self, token: TokenId) -> bool {
        self.special.contains(&token.0)
    }

    /// The token that `text` is the vocabulary entry of.
    #[must_use]
    pub fn token_id(&self, text: &str) -> Option<TokenId> {
        self.inner.token_to_id(text).map(TokenId)
    }

    /// One more than the largest token there is.
    #[must_use]
    pub fn vocab_end(&self) -> u32 {
        self.inner.get_vocab(true).values().max().map_or(0, |max| max + 1)
    }

    /// The bytes that `token` stands for, which may be part of a character. Empty when there is no such token.
    #[must_use]
    pub fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        let Some(entry) = self.inner.id_to_token(token.0) else {
            return Vec::new();
        };
        if self.added.contains(&token.0) {
            return entry.into_bytes();
        }
        match self.alphabet {
            Alphabet::ByteLevel => {
                entry.chars().map(byte_of_char).collect::<Option<_>>().unwrap_or_else(|| entry.into_bytes())
            }
            Alphabet::SentencePiece => {
                let hex = entry.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => entry.replace('▁', " ").into_bytes(),
                }
            }
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("alphabet", &self.alphabet).finish_non_exhaustive()
    }
}

fn mentions_byte_level(decoder: &Value) -> bool {
    decoder["type"] == "ByteLevel"
        || decoder["decoders"].as_array().is_some_and(|parts| parts.iter().any(mentions_byte_level))
}

/// Whether a pre-tokenizer may leave out parts of the text. Only those known to keep all are trusted.
fn removes_text(pre_tokenizer: &Value) -> bool {
    match pre_tokenizer["type"].as_str() {
        Some("ByteLevel" | "Digits") => false,
        Some("Split") => pre_tokenizer["behavior"] == "Removed",
        Some("Sequence") => {
            pre_tokenizer["pretokenizers"].as_array().is_none_or(|all| all.iter().any(removes_text))
        }
        _ => true,
    }
}

/// Undoes GPT-2's table, which writes printable bytes as themselves and the others from U+0100 upward.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::byte_of_char;

    #[test]
    fn the_byte_table_is_complete() {
        let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut next = 0x100;
        for byte in 0..=255u8 {
            let code = if printable(byte) { u32::from(byte) } else { (next, next += 1).0 };
            assert_eq!(byte_of_char(char::from_u32(code).unwrap()), Some(byte), "byte {byte:#x}");
        }
        assert_eq!(byte_of_char('\u{144}'), None);
    }
}
