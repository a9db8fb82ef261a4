//! `POST /v1/chat/completions`.

use super::ApiError;
use super::fields::{Fields, wrong};
use super::logprobs::ChatLogprobs;
use super::params::{Params, model, top_logprobs};
use super::usage::Usage;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tandem_text::ChatInput;

/// Messages of one conversation.
const MAX_MESSAGES: usize = 16_384;
/// Parts of one message.
const MAX_PARTS: usize = 1_024;
/// Documents of one request.
const MAX_DOCUMENTS: usize = 1_024;
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// A request for the next message of a conversation.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    /// The model's name.
    pub model: String,
    /// The conversation.
    pub input: ChatInput,
    /// How to answer.
    pub params: Params,
}

impl ChatRequest {
    /// Reads a request's body.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn read(body: &Value, vocab: u32) -> Result<ChatRequest, ApiError> {
        let fields = Fields::body(body)?;
        let mut params = Params::read(&fields, &["max_completion_tokens", "max_tokens"], vocab)?;
        let asked = fields.flag("logprobs")?.unwrap_or(false);
        params.top_logprobs = match (asked, top_logprobs(&fields, "top_logprobs")?) {
            (false, Some(1..)) => {
                let message = "'top_logprobs' is only allowed when 'logprobs' is true.";
                return Err(ApiError::field("top_logprobs", message));
            }
            (false, _) => None,
            (true, count) => Some(count.unwrap_or(0)),
        };
        if let Some(kinds) = fields.array("modalities", 8)?
            && kinds.iter().any(|kind| kind != "text")
        {
            return Err(ApiError::unsupported("modalities", "This server answers with text alone."));
        }
        refuse_tools(&fields)?;
        Ok(ChatRequest { model: model(&fields)?.to_owned(), input: input(&fields)?, params })
    }
}

/// Reads what a template renders; `/tokenize` takes the same fields.
pub(super) fn input(fields: &Fields<'_>) -> Result<ChatInput, ApiError> {
    let missing = || ApiError::field("messages", "'messages' is missing; it must be a list of messages.");
    let messages = fields.array("messages", MAX_MESSAGES)?.ok_or_else(missing)?;
    if messages.is_empty() {
        return Err(ApiError::field("messages", "'messages' is empty; there must be at least one."));
    }
    let messages = messages.iter().enumerate().map(|(index, message)| read_message(index, message));
    let continue_final_message = fields.flag("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.flag("add_generation_prompt")?;
    if continue_final_message && add_generation_prompt == Some(true) {
        let message = "'continue_final_message' and 'add_generation_prompt' exclude each other.";
        return Err(ApiError::field("continue_final_message", message));
    }
    Ok(ChatInput {
        messages: messages.collect::<Result<_, _>>()?,
        tools: None,
        documents: fields
            .array("documents", MAX_DOCUMENTS)?
            .map(|documents| Value::Array(documents.to_vec())),
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        kwargs: fields.object("chat_template_kwargs")?.map(|kwargs| kwargs.map().clone()).unwrap_or_default(),
    })
}

/// A message as templates expect it: content is text, and a tool call's arguments are an object.
fn read_message(index: usize, value: &Value) -> Result<Value, ApiError> {
    let path = format!("messages[{index}]");
    let fields = Fields::at(path.clone(), value)?;
    let role = fields.string("role")?;
    let role =
        role.ok_or_else(|| ApiError::field(format!("{path}.role"), format!("'{path}.role' is missing.")))?;
    if !ROLES.contains(&role) {
        let message = format!("'{path}.role' is \"{role}\"; it must be one of {}.", ROLES.join(", "));
        return Err(ApiError::field(format!("{path}.role"), message));
    }
    let mut message = fields.map().clone();
    let content = match fields.get("content") {
        Some(Value::String(text)) => Value::String(text.clone()),
        Some(Value::Array(_)) => Value::String(join_parts(&fields, &path)?),
        Some(other) => return Err(wrong(&format!("{path}.content"), other, "a string or an array of parts")),
        // An assistant's message may consist of tool calls alone.
        None if role == "assistant" => Value::Null,
        None => {
            let message = format!("'{path}.content' is missing.");
            return Err(ApiError::field(format!("{path}.content"), message));
        }
    };
    message.insert("content".into(), content);
    if let Some(calls) = message.get_mut("tool_calls") {
        parse_arguments(calls);
    }
    Ok(Value::Object(message))
}

/// The text of a message's parts, a line each, as vLLM joins them for templates that expect text.
fn join_parts(fields: &Fields<'_>, path: &str) -> Result<String, ApiError> {
    let parts = fields.array("content", MAX_PARTS)?.unwrap_or_default();
    let mut texts = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        let part = Fields::at(path.clone(), part)?;
        match part.string("type")? {
            Some("text" | "input_text" | "output_text") => match part.string("text")? {
                Some(text) => texts.push(text),
                None => {
                    return Err(ApiError::field(
                        format!("{path}.text"),
                        format!("'{path}.text' is missing."),
                    ));
                }
            },
            Some(kind) => {
                let message = format!("'{path}' is of type \"{kind}\"; this model reads text alone.");
                return Err(ApiError::unsupported(path, message));
            }
            None => {
                return Err(ApiError::field(format!("{path}.type"), format!("'{path}.type' is missing.")));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// The API carries arguments as a string of JSON; templates print them as the object it holds.
fn parse_arguments(calls: &mut Value) {
    for call in calls.as_array_mut().into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(object) =
                arguments.as_str().and_then(|text| serde_json::from_str::<Map<_, _>>(text).ok())
        {
            *arguments = Value::Object(object);
        }
    }
}

/// Calls of tools are not parsed out of the text, so offering tools would promise what does not come.
fn refuse_tools(fields: &Fields<'_>) -> Result<(), ApiError> {
    let offered = fields.array("tools", MAX_PARTS)?.is_some_and(|tools| !tools.is_empty());
    match fields.get("tool_choice") {
        Some(Value::String(choice)) if choice == "none" => return Ok(()),
        None => {}
        Some(Value::String(choice)) if choice == "auto" => {}
        Some(Value::String(_) | Value::Object(_)) => {
            let message =
                "This server does not parse tool calls; 'tool_choice' must be \"none\" or left out.";
            return Err(ApiError::unsupported("tool_choice", message));
        }
        Some(other) => return Err(wrong("tool_choice", other, "a string or an object")),
    }
    if offered {
        let message =
            "This server does not parse tool calls; leave 'tools' out, or set 'tool_choice' to \"none\".";
        return Err(ApiError::unsupported("tools", message));
    }
    Ok(())
}

/// What all parts of one answer have in common.
#[derive(Clone, Debug, Serialize)]
pub struct Head {
    /// Names the answer.
    pub id: String,
    /// OpenAI's name of the type.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model, as the request named it.
    pub model: String,
    /// Changes when the weights do.
    pub system_fingerprint: Option<String>,
}

/// A whole answer.
#[derive(Debug, Serialize)]
pub struct ChatCompletion<'a> {
    /// What it shares with chunks.
    #[serde(flatten)]
    pub head: &'a Head,
    /// One for each completion.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: Usage,
}

/// One completion.
#[derive(Debug, Serialize)]
pub struct ChatChoice {
    /// Which.
    pub index: u32,
    /// The assistant's message.
    pub message: Message,
    /// Log probabilities, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: &'static str,
}

/// The assistant's message.
#[derive(Debug, Serialize)]
pub struct Message {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

impl Message {
    /// The assistant says `content`.
    #[must_use]
    pub fn assistant(content: String) -> Message {
        Message { role: "assistant", content, refusal: None }
    }
}

/// A part of a streamed answer.
#[derive(Debug, Serialize)]
pub struct ChatChunk<'a> {
    /// What all parts share.
    #[serde(flatten)]
    pub head: &'a Head,
    /// What is new; empty in the part with usage.
    pub choices: Vec<ChatDelta>,
    /// Left out, null, or token counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// What is new in one completion.
#[derive(Debug, Serialize)]
pub struct ChatDelta {
    /// Which.
    pub index: u32,
    /// New fields of its message.
    pub delta: Value,
    /// Log probabilities, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Set in its last part.
    pub finish_reason: Option<&'static str>,
}

impl ChatDelta {
    /// The first part of completion `index`: who speaks.
    #[must_use]
    pub fn role(index: u32) -> ChatDelta {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        ChatDelta { index, delta, logprobs: None, finish_reason: None }
    }

    /// More of completion `index`.
    #[must_use]
    pub fn content(
        index: u32,
        text: String,
        logprobs: Option<ChatLogprobs>,
        finish_reason: Option<&'static str>,
    ) -> ChatDelta {
        let delta = if text.is_empty() { json!({}) } else { json!({"content": text}) };
        ChatDelta { index, delta, logprobs, finish_reason }
    }
}
