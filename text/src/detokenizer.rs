//! Tokens to text as they come.

use crate::{Tokenizer, TokenizerError};
use tandem_proto::ids::TokenId;

/// Tokens that may wait for the rest of a character. Four bytes make a character, so what waits longer is
/// not text, and is given out as replacement characters.
const MAX_HELD: usize = 32;
/// Tokens kept back when [`MAX_HELD`] is reached: the start of a character may be among them.
const KEPT: usize = 4;

/// Turns one completion's tokens into text, piece by piece: no piece ends inside a character, and the pieces
/// together are the text of all tokens.
///
/// Each step decodes a short window of tokens, since many decoders look at a token's neighbour.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    skip_special_tokens: bool,
    /// The window. Its first `read` tokens were given out, and are here for the sake of those after them.
    window: Vec<TokenId>,
    read: usize,
    /// The text of the first `read` tokens.
    prefix: String,
}

impl Detokenizer {
    /// Starts a completion. With `skip_special_tokens`, special tokens leave no text.
    #[must_use]
    pub fn new(skip_special_tokens: bool) -> Detokenizer {
        Detokenizer { skip_special_tokens, window: Vec::new(), read: 0, prefix: String::new() }
    }

    /// The text that `token` completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId) -> Result<String, TokenizerError> {
        if self.skip_special_tokens && tokenizer.is_special(token) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = tokenizer.decode(&self.window, self.skip_special_tokens)?;
        let new = text.get(self.prefix.len()..).unwrap_or_default();
        if !new.is_empty() && !new.ends_with(char::REPLACEMENT_CHARACTER) {
            let new = new.to_owned();
            self.advance(tokenizer, self.window.len())?;
            return Ok(new);
        }
        if self.window.len() - self.read < MAX_HELD {
            return Ok(String::new());
        }
        let end = self.window.len() - KEPT;
        let text = tokenizer.decode(&self.window[..end], self.skip_special_tokens)?;
        let new = text.get(self.prefix.len()..).unwrap_or_default().to_owned();
        self.advance(tokenizer, end)?;
        Ok(new)
    }

    /// What is left when no token follows: an incomplete character becomes a replacement character.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let text = tokenizer.decode(&self.window, self.skip_special_tokens)?;
        let new = text.get(self.prefix.len()..).unwrap_or_default().to_owned();
        self.advance(tokenizer, self.window.len())?;
        Ok(new)
    }

    /// Marks the tokens before `end` as given out, and forgets those given out before them.
    fn advance(&mut self, tokenizer: &Tokenizer, end: usize) -> Result<(), TokenizerError> {
        self.window.drain(..self.read);
        self.read = end - self.read;
        self.prefix = tokenizer.decode(&self.window[..self.read], self.skip_special_tokens)?;
        Ok(())
    }
}
