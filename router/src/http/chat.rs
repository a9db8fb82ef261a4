//! `POST /v1/chat/completions`.

use super::generation::{Completion, Form, Generation};
use super::{App, body, random};
use crate::openai::ApiError;
use crate::openai::chat::{ChatChoice, ChatChunk, ChatCompletion, ChatDelta, ChatRequest, Head, Message};
use crate::openai::logprobs::ChatLogprobs;
use crate::openai::usage::Usage;
use crate::requests::{Piece, Plan, tokenize};
use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;
use tandem_text::{ChatInput, TextModel};

pub(super) async fn handle(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let started = Instant::now();
    let vocab = app.model.vocab_size;
    let ChatRequest { model, input, params } =
        body::read(&app, request, move |body| ChatRequest::read(body, vocab)).await?;
    app.check_model(&model)?;
    let turn = app.turn(1).await?;
    let (text, max_len) = (app.model.clone(), app.max_len());
    let (plan, params) = body::aside(move || {
        let prompt = tokenize(&text, &render(&text, &input)?, false, "messages", max_len)?;
        let plan = Plan::new(&text, &params, prompt, "messages", max_len, random() as u64)?;
        Ok((plan, params))
    })
    .await?;
    let generation = Generation::start(app, turn, vec![plan], started, params.stream)?;
    let object = if params.stream { "chat.completion.chunk" } else { "chat.completion" };
    let form = ChatForm {
        head: generation.head("chatcmpl", object, &model),
        choices: params.n,
        logprobs: params.top_logprobs.is_some(),
        usage_everywhere: params.include_usage,
    };
    if params.stream {
        generation.stream(form, params.include_usage).await
    } else {
        generation.whole(form).await
    }
}

/// The prompt's text. A template that does not know developers hears them as the system.
pub(super) fn render(model: &TextModel, input: &ChatInput) -> Result<String, ApiError> {
    let Some(template) = &model.template else {
        let message = "This model has no chat template; use /v1/completions.";
        return Err(ApiError::unsupported("messages", message));
    };
    let mut input = input.clone();
    if !template.mentions("developer") {
        for message in &mut input.messages {
            if message["role"] == "developer" {
                message["role"] = "system".into();
            }
        }
    }
    template.render(&input).map_err(|error| ApiError::field("messages", error.to_string()))
}

struct ChatForm {
    head: Head,
    choices: u32,
    logprobs: bool,
    /// Chunks without usage say so with null, as OpenAI's do when usage was asked for.
    usage_everywhere: bool,
}

impl ChatForm {
    fn chunk_of(&self, choices: Vec<ChatDelta>) -> ChatChunk<'_> {
        ChatChunk { head: &self.head, choices, usage: self.usage_everywhere.then_some(None) }
    }
}

impl Form for ChatForm {
    fn opening(&self) -> Vec<impl Serialize + Send + Sync> {
        (0..self.choices).map(|index| self.chunk_of(vec![ChatDelta::role(index)])).collect()
    }

    fn chunk(&mut self, index: u32, piece: Piece) -> impl Serialize + Send + Sync {
        let logprobs = self.logprobs.then(|| ChatLogprobs::new(piece.logprobs));
        let finish = piece.finish.map(|finish| finish.as_str());
        self.chunk_of(vec![ChatDelta::content(index, piece.text, logprobs, finish)])
    }

    fn usage(&self, usage: Usage) -> impl Serialize + Send + Sync {
        ChatChunk { head: &self.head, choices: Vec::new(), usage: Some(Some(usage)) }
    }

    fn whole(&self, completions: Vec<Completion>, usage: Usage) -> impl Serialize {
        let choice = |(index, completion): (usize, Completion)| ChatChoice {
            index: index as u32,
            message: Message::assistant(completion.text),
            logprobs: self.logprobs.then(|| ChatLogprobs::new(completion.logprobs)),
            finish_reason: completion.finish.map_or("stop", |finish| finish.as_str()),
        };
        let choices = completions.into_iter().enumerate().map(choice).collect();
        ChatCompletion { head: &self.head, choices, usage }
    }
}
