//! `POST /v1/completions`.

use super::generation::{Completion, Form, Generation};
use super::{App, body, random};
use crate::openai::ApiError;
use crate::openai::chat::Head;
use crate::openai::completions::{CompletionRequest, PromptContent, TextChoice, TextCompletion};
use crate::openai::logprobs::TextLogprobs;
use crate::openai::usage::Usage;
use crate::requests::{Piece, Plan, tokenize};
use axum::extract::{Request, State};
use axum::response::Response;
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;
use tandem_text::TextModel;

pub(super) async fn handle(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let started = Instant::now();
    let vocab = app.model.vocab_size;
    let mut request = body::read(&app, request, move |body| CompletionRequest::read(body, vocab)).await?;
    app.check_model(&request.model)?;
    let turn = app.turn(request.prompts.len()).await?;
    let (model, max_len) = (app.model.clone(), app.max_len());
    let (plans, echoes, request) = body::aside(move || {
        let (plans, echoes) = plans(&model, &mut request, max_len)?;
        Ok((plans, echoes, request))
    })
    .await?;
    let params = request.params;
    let generation = Generation::start(app, turn, plans, started, params.stream)?;
    let form = TextForm {
        head: generation.head("cmpl", "text_completion", &request.model),
        offsets: vec![0; echoes.len() * params.n as usize],
        echoes,
        n: params.n,
        logprobs: params.top_logprobs.is_some(),
        usage_everywhere: params.include_usage,
    };
    if params.stream {
        generation.stream(form, params.include_usage).await
    } else {
        generation.whole(form).await
    }
}

/// A plan for each prompt, and what of the prompt is part of the text.
fn plans(
    model: &TextModel,
    request: &mut CompletionRequest,
    max_len: u32,
) -> Result<(Vec<Plan>, Vec<String>), ApiError> {
    // One seed for all prompts, as one request has one; the choice tells completions of a prompt apart.
    let seed = random() as u64;
    let (mut plans, mut echoes) = (Vec::new(), Vec::new());
    for prompt in request.prompts.drain(..) {
        let (tokens, echo) = match prompt.content {
            PromptContent::Text(text) => {
                let tokens = tokenize(model, &text, request.add_special_tokens, &prompt.path, max_len)?;
                (tokens, if request.echo { text } else { String::new() })
            }
            PromptContent::Tokens(tokens) => {
                let skip = request.params.skip_special_tokens;
                let echo =
                    if request.echo { model.tokenizer.decode(&tokens, skip) } else { Ok(String::new()) };
                (tokens, echo.map_err(|error| ApiError::field(&prompt.path, error.to_string()))?)
            }
        };
        plans.push(Plan::new(model, &request.params, tokens, &prompt.path, max_len, seed)?);
        echoes.push(echo);
    }
    Ok((plans, echoes))
}

struct TextForm {
    head: Head,
    /// What stands before the completions of each prompt.
    echoes: Vec<String>,
    n: u32,
    logprobs: bool,
    /// Where the next token of each completion starts, in characters.
    offsets: Vec<usize>,
    /// Chunks without usage say so with null, as OpenAI's do when usage was asked for.
    usage_everywhere: bool,
}

impl TextForm {
    fn chunk_of(&self, choices: Vec<TextChoice>) -> TextCompletion<'_> {
        TextCompletion { head: &self.head, choices, usage: self.usage_everywhere.then_some(None) }
    }

    fn echo(&self, index: usize) -> &str {
        &self.echoes[index / self.n as usize]
    }
}

impl Form for TextForm {
    fn opening(&self) -> Vec<impl Serialize + Send + Sync> {
        let echoed = (0..self.offsets.len()).filter(|index| !self.echo(*index).is_empty());
        let chunk = |index: usize| {
            let text = self.echo(index).to_owned();
            self.chunk_of(vec![TextChoice { index: index as u32, text, logprobs: None, finish_reason: None }])
        };
        echoed.map(chunk).collect()
    }

    fn chunk(&mut self, index: u32, piece: Piece) -> impl Serialize + Send + Sync {
        let offset = &mut self.offsets[index as usize];
        let logprobs = self.logprobs.then(|| TextLogprobs::new(piece.logprobs, offset));
        let finish_reason = piece.finish.map(|finish| finish.as_str());
        self.chunk_of(vec![TextChoice { index, text: piece.text, logprobs, finish_reason }])
    }

    fn usage(&self, usage: Usage) -> impl Serialize + Send + Sync {
        TextCompletion { head: &self.head, choices: Vec::new(), usage: Some(Some(usage)) }
    }

    fn whole(&self, completions: Vec<Completion>, usage: Usage) -> impl Serialize {
        let choice = |(index, completion): (usize, Completion)| TextChoice {
            index: index as u32,
            text: format!("{}{}", self.echo(index), completion.text),
            logprobs: self.logprobs.then(|| TextLogprobs::new(completion.logprobs, &mut 0)),
            finish_reason: completion.finish.map(|finish| finish.as_str()),
        };
        let choices = completions.into_iter().enumerate().map(choice).collect();
        TextCompletion { head: &self.head, choices, usage: Some(Some(usage)) }
    }
}
