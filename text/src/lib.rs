//! Text in, tokens out, and back: what stands between an API's strings and a model's tokens.
//!
//! [`TextModel::load`] reads the text side of a Hugging Face folder: `tokenizer.json`, the chat template,
//! `generation_config.json` and the few numbers of `config.json` that concern text. It never touches weights.
//!
//! - [`Tokenizer`]: text to tokens and single tokens to bytes.
//! - [`ChatTemplate`]: messages to prompt text, as `apply_chat_template` renders them.
//! - [`Detokenizer`]: tokens to text as they come, never half a character.
//! - [`StopStrings`]: finds stop strings across token borders, holding back only what may become one.
//! - [`GenerationDefaults`]: what `generation_config.json` says when a request says nothing.
//!
//! Everything that comes from outside (text, messages, files) has a cap.
#![forbid(unsafe_code)]

mod detokenizer;
mod model;
mod stop;
mod template;
mod tokenizer;

pub use detokenizer::Detokenizer;
pub use model::{GenerationDefaults, LoadError, TextModel};
pub use stop::{StopMatch, StopStrings};
pub use template::{ChatInput, ChatTemplate, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerError};
