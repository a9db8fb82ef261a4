//! The text side of a model folder.

use crate::{ChatTemplate, TemplateError, Tokenizer, TokenizerError};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tandem_proto::ids::TokenId;

/// The largest `tokenizer.json` that is read.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// The largest other file that is read.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// All that a router needs to know of a model.
#[derive(Debug)]
pub struct TextModel {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; absent when the model has no chat template.
    pub template: Option<ChatTemplate>,
    /// What applies when a request says nothing.
    pub defaults: GenerationDefaults,
    /// The longest sequence that the model was made for, in tokens.
    pub max_positions: u32,
    /// Rows of the embedding: every token lies below this.
    pub vocab_size: u32,
}

/// What `generation_config.json` says. As vLLM reads it: `do_sample` is ignored.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct GenerationDefaults {
    /// Tokens of a completion, at most.
    pub max_new_tokens: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// The most likely tokens.
    pub top_k: Option<u32>,
    /// The least likely tokens, relative to the most likely one.
    pub min_p: Option<f32>,
    /// Penalty for tokens seen before.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a completion, from every file that names one.
    pub end_tokens: Vec<TokenId>,
}

/// Why a model folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{}: {cause}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why not.
        cause: String,
    },
    /// The tokenizer cannot be used.
    #[error("{}: {source}", dir.display())]
    Tokenizer {
        /// The folder.
        dir: PathBuf,
        /// Why not.
        source: TokenizerError,
    },
    /// The chat template cannot be used.
    #[error("{}: {source}", dir.display())]
    Template {
        /// The folder.
        dir: PathBuf,
        /// Why not.
        source: TemplateError,
    },
    /// A field is missing or has a value that cannot be.
    #[error("{}: {field} {problem}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl TextModel {
    /// Reads a model folder.
    ///
    /// # Errors
    /// Names the file, and in it the field.
    pub fn load(dir: &Path) -> Result<TextModel, LoadError> {
        let tokenizer_json = required(&dir.join("tokenizer.json"), MAX_TOKENIZER_BYTES)?;
        let tokenizer = Tokenizer::from_json(&tokenizer_json)
            .map_err(|source| LoadError::Tokenizer { dir: dir.to_owned(), source })?;
        let config_file = dir.join("config.json");
        let config = JsonFile::parse(&config_file, &required(&config_file, MAX_JSON_BYTES)?)?;
        let generation = JsonFile::optional(dir.join("generation_config.json"))?;
        let tokenizer_config = JsonFile::optional(dir.join("tokenizer_config.json"))?;

        let max_positions = config.number("max_position_embeddings")?;
        let vocab_size = config.number("vocab_size")?;
        let vocab_end = tokenizer.vocab_end();
        if vocab_end > vocab_size {
            let problem = format!("is {vocab_size}, but tokenizer.json has tokens up to {}", vocab_end - 1);
            return Err(LoadError::Field { file: config_file, field: "vocab_size", problem });
        }

        let text = tokenizer_config.special_token("eos_token");
        let mut end_tokens: Vec<TokenId> =
            text.and_then(|text| tokenizer.token_id(&text)).into_iter().collect();
        let ids = if generation.value["eos_token_id"].is_null() { &config } else { &generation };
        end_tokens.extend(ids.tokens("eos_token_id", vocab_size)?);
        end_tokens.sort_unstable();
        end_tokens.dedup();

        let sources = template_sources(dir, &tokenizer_config)?;
        let template = if sources.is_empty() {
            None
        } else {
            let bos = tokenizer_config.special_token("bos_token");
            let eos = tokenizer_config.special_token("eos_token");
            let template = ChatTemplate::new(sources, bos, eos);
            Some(template.map_err(|source| LoadError::Template { dir: dir.to_owned(), source })?)
        };
        let defaults = GenerationDefaults {
            max_new_tokens: generation.optional_number("max_new_tokens")?,
            temperature: generation.optional_float("temperature", 0.0, 2.0)?,
            top_p: generation.optional_float("top_p", f32::MIN_POSITIVE, 1.0)?,
            top_k: generation.optional_number("top_k")?,
            min_p: generation.optional_float("min_p", 0.0, 1.0)?,
            repetition_penalty: generation.optional_float(
                "repetition_penalty",
                f32::MIN_POSITIVE,
                f32::MAX,
            )?,
            end_tokens,
        };
        Ok(TextModel { tokenizer, template, defaults, max_positions, vocab_size })
    }
}

fn required(file: &Path, max_bytes: u64) -> Result<Vec<u8>, LoadError> {
    let failed = |cause: String| LoadError::File { file: file.to_owned(), cause };
    let len = std::fs::metadata(file).map_err(|e| failed(e.to_string()))?.len();
    if len > max_bytes {
        return Err(failed(format!("{len} bytes is more than the {max_bytes} that are read")));
    }
    std::fs::read(file).map_err(|e| failed(e.to_string()))
}

/// The chat templates by name. A file of its own wins over `tokenizer_config.json`, as with Hugging Face.
fn template_sources(dir: &Path, config: &JsonFile) -> Result<Vec<(String, String)>, LoadError> {
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        let bytes = required(&file, MAX_JSON_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|e| LoadError::File { file, cause: e.to_string() })?;
        return Ok(vec![("default".into(), text)]);
    }
    let problem = |problem: &str| LoadError::Field {
        file: config.file.clone(),
        field: "chat_template",
        problem: problem.to_owned(),
    };
    match &config.value["chat_template"] {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => Ok(vec![("default".into(), text.clone())]),
        Value::Array(named) => named
            .iter()
            .map(|entry| match (&entry["name"], &entry["template"]) {
                (Value::String(name), Value::String(text)) => Ok((name.clone(), text.clone())),
                _ => Err(problem("must list objects with name and template")),
            })
            .collect(),
        _ => Err(problem("must be a string or a list of named templates")),
    }
}

struct JsonFile {
    file: PathBuf,
    value: Value,
}

impl JsonFile {
    fn parse(file: &Path, bytes: &[u8]) -> Result<JsonFile, LoadError> {
        match serde_json::from_slice(bytes) {
            Ok(value) => Ok(JsonFile { file: file.to_owned(), value }),
            Err(e) => Err(LoadError::File { file: file.to_owned(), cause: e.to_string() }),
        }
    }

    fn optional(file: PathBuf) -> Result<JsonFile, LoadError> {
        if file.exists() {
            return JsonFile::parse(&file, &required(&file, MAX_JSON_BYTES)?);
        }
        Ok(JsonFile { file, value: Value::Null })
    }

    fn wrong(&self, field: &'static str, allowed: &str) -> LoadError {
        let problem = match &self.value[field] {
            Value::Null => format!("is missing; it must be {allowed}"),
            value => format!("is {value}; it must be {allowed}"),
        };
        LoadError::Field { file: self.file.clone(), field, problem }
    }

    fn number(&self, field: &'static str) -> Result<u32, LoadError> {
        match self.optional_number(field)? {
            Some(number) if number > 0 => Ok(number),
            _ => Err(self.wrong(field, "a positive whole number")),
        }
    }

    fn optional_number(&self, field: &'static str) -> Result<Option<u32>, LoadError> {
        match &self.value[field] {
            Value::Null => Ok(None),
            value => match value.as_u64().and_then(|number| u32::try_from(number).ok()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(field, "a whole number")),
            },
        }
    }

    fn optional_float(&self, field: &'static str, min: f32, max: f32) -> Result<Option<f32>, LoadError> {
        match &self.value[field] {
            Value::Null => Ok(None),
            value => match value.as_f64().map(|number| number as f32) {
                Some(number) if (min..=max).contains(&number) => Ok(Some(number)),
                _ => Err(self.wrong(field, &format!("a number from {min} to {max}"))),
            },
        }
    }

    fn tokens(&self, field: &'static str, vocab_size: u32) -> Result<Vec<TokenId>, LoadError> {
        let token = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| *id < vocab_size);
            id.map(TokenId).ok_or_else(|| self.wrong(field, "a token of the vocabulary, or a list of them"))
        };
        match &self.value[field] {
            Value::Null => Ok(Vec::new()),
            Value::Array(values) => values.iter().map(token).collect(),
            value => Ok(vec![token(value)?]),
        }
    }

    /// A special token's text, which stands plainly or as an object with more about it.
    fn special_token(&self, field: &str) -> Option<String> {
        let value = &self.value[field];
        value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
    }
}
