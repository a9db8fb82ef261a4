//! Takes a request's body in: at most so long, within so much time, and only JSON.

use super::App;
use crate::openai::ApiError;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use futures_core::Stream;
use serde_json::Value;
use std::pin::pin;

/// The request's JSON, turned into `T` where it does not hold up others.
pub(super) async fn read<T: Send + 'static>(
    app: &App,
    request: Request,
    parse: impl FnOnce(&Value) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    check_type(request.headers())?;
    let limit = app.settings.max_body_bytes;
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_long(limit));
    }
    let arrival = collect(request.into_body(), limit);
    let body = match tokio::time::timeout(app.settings.body_timeout, arrival).await {
        Ok(body) => body?,
        Err(_) => {
            let message = format!("The body did not arrive within {:?}.", app.settings.body_timeout);
            return Err(ApiError::http(408, message));
        }
    };
    aside(move || {
        let value: Value = serde_json::from_slice(&body).map_err(|error| {
            let message = format!("The body is not valid JSON: {error}.");
            ApiError { code: Some("invalid_json"), ..ApiError::invalid(message) }
        })?;
        parse(&value)
    })
    .await
}

/// Runs what computes for a while on a thread that may.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_) => Err(ApiError::internal("the request could not be read")),
    }
}

/// A missing type is taken for JSON; a wrong one is a mistake that JSON errors would only obscure.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = value.to_str().unwrap_or("unreadable");
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    let message = format!("The content type is {text}; it must be application/json.");
    Err(ApiError { code: Some("unsupported_media_type"), ..ApiError::http(415, message) })
}

fn too_long(limit: usize) -> ApiError {
    let message = format!("The body is longer than the {limit} bytes that this server takes.");
    ApiError { code: Some("body_too_large"), ..ApiError::http(413, message) }
}

async fn collect(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut stream = pin!(body.into_data_stream());
    let mut whole = Vec::new();
    loop {
        let part: Option<Result<Bytes, axum::Error>> =
            std::future::poll_fn(|context| stream.as_mut().poll_next(context)).await;
        match part {
            None => return Ok(whole),
            Some(Ok(part)) if whole.len() + part.len() > limit => return Err(too_long(limit)),
            Some(Ok(part)) => whole.extend_from_slice(&part),
            Some(Err(error)) => {
                return Err(ApiError::invalid(format!("The body did not arrive whole: {error}.")));
            }
        }
    }
}
