//! The OpenAI API's requests and responses as types, and every rule about what a request may hold.
//!
//! Pure: JSON in, types out. Fields that would change the output and are not supported are refused by name;
//! fields that only matter to OpenAI's own service, and unknown ones, are ignored, as other servers do.

pub mod chat;
pub mod completions;
pub mod error;
mod fields;
pub mod logprobs;
pub mod params;
pub mod tokenize;
pub mod usage;

pub use error::ApiError;
