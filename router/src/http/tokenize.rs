//! `POST /tokenize` and `/detokenize`.

use super::{App, body, chat};
use crate::openai::ApiError;
use crate::openai::tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeContent, TokenizeRequest, TokenizeResponse,
};
use axum::Json;
use axum::extract::{Request, State};
use std::sync::Arc;

pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let request = body::read(&app, request, TokenizeRequest::read).await?;
    if let Some(model) = &request.model {
        app.check_model(model)?;
    }
    let (model, max_model_len) = (app.model.clone(), app.max_len());
    let response = body::aside(move || {
        let (text, param) = match &request.content {
            TokenizeContent::Prompt(text) => (text.clone(), "prompt"),
            TokenizeContent::Chat(input) => (chat::render(&model, input)?, "messages"),
        };
        let tokens = model.tokenizer.encode(&text, request.add_special_tokens);
        let tokens = tokens.map_err(|error| ApiError::field(param, error.to_string()))?;
        let text_of = |token| String::from_utf8_lossy(&model.tokenizer.token_bytes(token)).into_owned();
        let token_strs = request.return_token_strs.then(|| tokens.iter().copied().map(text_of).collect());
        Ok(TokenizeResponse { count: tokens.len(), max_model_len, tokens, token_strs })
    });
    Ok(Json(response.await?))
}

pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let vocab = app.model.vocab_size;
    let request = body::read(&app, request, move |body| DetokenizeRequest::read(body, vocab)).await?;
    if let Some(model) = &request.model {
        app.check_model(model)?;
    }
    let model = app.model.clone();
    let response = body::aside(move || {
        let prompt = model.tokenizer.decode(&request.tokens, false);
        let prompt = prompt.map_err(|error| ApiError::field("tokens", error.to_string()))?;
        Ok(DetokenizeResponse { prompt })
    });
    Ok(Json(response.await?))
}
