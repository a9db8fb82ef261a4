//! The HTTP endpoint: routes, what all of them share, and the small ones.

mod body;
mod chat;
mod completions;
mod generation;
mod serve;
mod tokenize;

pub use serve::{ServeOptions, serve};

use crate::dispatch::Dispatcher;
use crate::metrics::{Gauges, Metrics};
use crate::openai::ApiError;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tandem_process::exposition;
use tandem_text::TextModel;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tracing::Instrument;
use tracing::field::Empty;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The status, in metrics alone, of a request whose client left before there was a response.
const CLIENT_GONE: u16 = 499;
/// The longest request id that is taken from a client.
const MAX_REQUEST_ID: usize = 128;

/// Names and bounds of the endpoint.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The names that requests may ask for; the first is what the model is listed as.
    pub served: Vec<String>,
    /// Prompts that are computed at once.
    pub max_requests: usize,
    /// Requests that may wait for their turn.
    pub max_queue: usize,
    /// How long they wait.
    pub queue_timeout: Duration,
    /// The longest body.
    pub max_body_bytes: usize,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long a client may not read.
    pub client_timeout: Duration,
}

/// What all requests share.
pub struct App {
    model: Arc<TextModel>,
    dispatcher: Arc<Dispatcher>,
    metrics: Arc<Metrics>,
    settings: Settings,
    created: u64,
    turns: Arc<Semaphore>,
    queued: AtomicUsize,
    running: watch::Sender<usize>,
    draining: AtomicBool,
    /// Set when running requests have had their time to finish.
    cut: watch::Sender<bool>,
}

impl App {
    /// An endpoint for `model`, computed by the nodes behind `dispatcher`.
    #[must_use]
    pub fn new(
        model: Arc<TextModel>,
        dispatcher: Arc<Dispatcher>,
        metrics: Arc<Metrics>,
        settings: Settings,
    ) -> Arc<App> {
        Arc::new(App {
            turns: Arc::new(Semaphore::new(settings.max_requests)),
            model,
            dispatcher,
            metrics,
            settings,
            created: unix_seconds(),
            queued: AtomicUsize::new(0),
            running: watch::Sender::new(0),
            draining: AtomicBool::new(false),
            cut: watch::Sender::new(false),
        })
    }

    /// The routes.
    pub fn router(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/v1/chat/completions", post(chat::handle))
            .route("/v1/completions", post(completions::handle))
            .route("/v1/models", get(list_models))
            .route("/v1/models/{*id}", get(show_model))
            .route("/tokenize", post(tokenize::tokenize))
            .route("/detokenize", post(tokenize::detokenize))
            .route("/health", get(health))
            .route("/ready", get(ready))
            .route("/metrics", get(metrics))
            .route("/version", get(version))
            .fallback(unknown_path)
            .method_not_allowed_fallback(wrong_method)
            .layer(from_fn_with_state(self.clone(), around))
            .with_state(self.clone())
    }

    /// The longest sequence that model and nodes take.
    fn max_len(&self) -> u32 {
        let nodes = self.dispatcher.max_sequence_tokens().unwrap_or(u32::MAX);
        self.model.max_positions.min(nodes)
    }

    fn check_model(&self, name: &str) -> Result<(), ApiError> {
        if self.settings.served.iter().any(|served| served == name) {
            return Ok(());
        }
        Err(ApiError::unknown_model(name, &self.settings.served))
    }

    /// Waits for the turn of a request with `prompts` prompts.
    async fn turn(self: &Arc<Self>, prompts: usize) -> Result<Turn, ApiError> {
        if self.draining.load(Relaxed) {
            return Err(ApiError::unavailable(
                "shutting_down",
                "This server is shutting down; ask another one.",
            ));
        }
        let limit = self.settings.max_requests;
        if prompts > limit {
            let message = format!("{prompts} prompts are more than the {limit} that are computed at once.");
            return Err(ApiError::field("prompt", message));
        }
        let permits = prompts as u32;
        let permit = match self.turns.clone().try_acquire_many_owned(permits) {
            Ok(permit) => permit,
            Err(_) => self.wait_in_queue(permits).await?,
        };
        self.running.send_modify(|running| *running += 1);
        Ok(Turn { app: self.clone(), _permit: permit })
    }

    async fn wait_in_queue(&self, permits: u32) -> Result<OwnedSemaphorePermit, ApiError> {
        let place = self.queued.fetch_add(1, Relaxed);
        let _leave = OnDrop(|| {
            self.queued.fetch_sub(1, Relaxed);
        });
        if place >= self.settings.max_queue {
            let message = format!(
                "{} requests are running and {place} are waiting, which is all that fits; try again shortly.",
                *self.running.borrow()
            );
            return Err(ApiError::rate_limit(message));
        }
        let turn = self.turns.clone().acquire_many_owned(permits);
        match tokio::time::timeout(self.settings.queue_timeout, turn).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(ApiError::internal("the queue is closed")),
            Err(_) => Err(ApiError::rate_limit(format!(
                "The request waited {:?} without coming to its turn; try again later.",
                self.settings.queue_timeout
            ))),
        }
    }

    /// Takes no new requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    /// Ends the requests that are still running.
    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    /// Waits until no request is running.
    pub async fn idle(&self) {
        // The sender is this very object's, so this cannot fail.
        let _ = self.running.subscribe().wait_for(|running| *running == 0).await;
    }
}

/// A request that is running.
struct Turn {
    app: Arc<App>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.app.running.send_modify(|running| *running -= 1);
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Names every exchange, and counts it.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let endpoint = endpoint(request.uri().path());
    let id = match request_id(request.headers()) {
        Some(given) => given,
        None => HeaderValue::from_str(&format!("req-{:032x}", random()))
            .unwrap_or(HeaderValue::from_static("req")),
    };
    let mut exchange = Exchange { app, endpoint, status: CLIENT_GONE };
    // It was checked to be text, or is our own.
    let span = tracing::info_span!("request", request_id = id.to_str().unwrap_or_default(), trace_id = Empty);
    if let Some(trace) = trace_id(request.headers()) {
        span.record("trace_id", trace);
    }
    let mut response = next.run(request).instrument(span.clone()).await;
    exchange.status = response.status().as_u16();
    span.in_scope(|| tracing::debug!(endpoint, status = exchange.status, "answered"));
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Counts an exchange when its response begins, or when it is dropped before.
struct Exchange {
    app: Arc<App>,
    endpoint: &'static str,
    status: u16,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.app.metrics.count_response(self.endpoint, self.status);
    }
}

/// A path as metrics name it: a fixed set, whatever clients ask for.
fn endpoint(path: &str) -> &'static str {
    match path {
        "/v1/chat/completions" => "/v1/chat/completions",
        "/v1/completions" => "/v1/completions",
        "/v1/models" => "/v1/models",
        "/tokenize" => "/tokenize",
        "/detokenize" => "/detokenize",
        "/health" => "/health",
        "/ready" => "/ready",
        "/metrics" => "/metrics",
        "/version" => "/version",
        _ if path.starts_with("/v1/models/") => "/v1/models/{id}",
        _ => "other",
    }
}

/// The client's own name for the request, if it is fit for logs and headers.
fn request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let id = headers.get(REQUEST_ID)?;
    let text = id.to_str().ok()?;
    let fits = (1..=MAX_REQUEST_ID).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    fits.then(|| id.clone())
}

/// The trace that the request is part of, as W3C's `traceparent` names it.
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let mut parts = headers.get("traceparent")?.to_str().ok()?.split('-');
    let is_hex =
        |text: &str, len| text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let right =
        is_hex(version, 2) && version != "ff" && is_hex(trace, 32) && is_hex(parent, 16) && is_hex(flags, 2);
    // Of later versions more may follow; zeros name none.
    let ends = version != "00" || parts.next().is_none();
    (right && ends && trace.bytes().any(|b| b != b'0')).then_some(trace)
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self.envelope())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if status.is_server_error() {
            tracing::warn!(status = self.status, error = self.message, "request failed");
        }
        response
    }
}

async fn unknown_path(request: Request) -> ApiError {
    let message = format!("There is no {} here; see /v1/models and /health.", request.uri().path());
    ApiError { code: Some("unknown_url"), ..ApiError::http(404, message) }
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} does not take {}.", request.uri().path(), request.method());
    ApiError { code: Some("method_not_allowed"), ..ApiError::http(405, message) }
}

async fn list_models(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = app.settings.served.iter().map(|name| model_object(&app, name)).collect();
    Json(json!({"object": "list", "data": models}))
}

async fn show_model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.check_model(&id)?;
    Ok(Json(model_object(&app, &id)))
}

fn model_object(app: &App, name: &str) -> Value {
    json!({
        "id": name, "object": "model", "created": app.created, "owned_by": "tandem",
        "root": app.settings.served[0], "max_model_len": app.max_len(),
    })
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    let (prefill, decode) = app.dispatcher.available();
    let reason = match (app.draining.load(Relaxed), prefill, decode) {
        (true, ..) => "this router is shutting down",
        (false, 0, 0) => "no prefill and no decode node is available",
        (false, 0, _) => "no prefill node is available",
        (false, _, 0) => "no decode node is available",
        (false, ..) => {
            return Json(json!({"status": "ready", "prefill": prefill, "decode": decode})).into_response();
        }
    };
    let body = json!({"status": "not_ready", "reason": reason, "prefill": prefill, "decode": decode});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let gauges = Gauges { running: *app.running.borrow(), queued: app.queued.load(Relaxed) };
    let text = app.metrics.render(gauges, &app.dispatcher.members());
    ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], text).into_response()
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A number that nobody guesses.
fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system's random numbers are always there once it is up");
    u128::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_known_by_its_traceparent() {
        let check = |value: &str, expected: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_str(value).unwrap());
            assert_eq!(trace_id(&headers), expected, "{value}");
        };
        let trace = "0af7651916cd43dd8448eb211c80319c";
        check(&format!("00-{trace}-b7ad6b7169203331-01"), Some(trace));
        check(&format!("cc-{trace}-b7ad6b7169203331-01-more"), Some(trace));
        check(&format!("00-{trace}-b7ad6b7169203331-01-more"), None);
        check(&format!("ff-{trace}-b7ad6b7169203331-01"), None);
        check(&format!("00-{}-b7ad6b7169203331-01", trace.to_uppercase()), None);
        check(&format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)), None);
        check("00", None);
    }
}
