//! Runs a request on the nodes, retries what can be retried, and writes the answer in either form.

use super::{App, Turn, random, unix_seconds};
use crate::dispatch::{Arrival, Attempt, INBOX, Inbox, News, NotStarted};
use crate::openai::ApiError;
use crate::openai::chat::Head;
use crate::openai::logprobs::TokenLogprobs;
use crate::openai::usage::Usage;
use crate::requests::{FinishReason, Life, Piece, Plan};
use crate::sse::{self, EventSender, Unsent};
use axum::Json;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;
use tandem_proto::ids::{NodeId, RequestId};
use tandem_proto::wire::{RequestError, Role};
use tokio::sync::{mpsc, watch};
use tracing::Instrument;
use tracing::field::display;

/// One of the two shapes of an answer.
pub(super) trait Form: Send + 'static {
    /// Chunks that come before any piece of a stream.
    fn opening(&self) -> Vec<impl Serialize + Send + Sync>;
    /// A chunk with a piece of completion `index`.
    fn chunk(&mut self, index: u32, piece: Piece) -> impl Serialize + Send + Sync;
    /// The last chunk of a stream, if it was asked for.
    fn usage(&self, usage: Usage) -> impl Serialize + Send + Sync;
    /// The whole answer.
    fn whole(&self, completions: Vec<Completion>, usage: Usage) -> impl Serialize;
}

/// A completion from its first to its last piece.
#[derive(Debug, Default)]
pub(super) struct Completion {
    pub(super) text: String,
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) finish: Option<FinishReason>,
}

/// A request on its nodes. Dropped before its end, it takes everything back.
pub(super) struct Generation {
    app: Arc<App>,
    jobs: Vec<Job>,
    arrivals: mpsc::Receiver<Arrival>,
    inbox: Inbox,
    cut: watch::Receiver<bool>,
    started: Instant,
    deadline: tokio::time::Instant,
    /// What was handed out is already at the client, and cannot be taken back.
    streams: bool,
    /// It ended by itself; otherwise the client went away.
    ended: bool,
    _turn: Turn,
}

/// One prompt.
struct Job {
    plan: Arc<Plan>,
    life: Life,
    attempt: Option<Attempt>,
    /// The one retry was used.
    retried: bool,
    /// Pieces were handed out.
    given: bool,
    /// When each choice's last token came.
    last_token: Vec<Option<Instant>>,
}

/// What happened next.
enum Step {
    /// A piece of completion `.0`.
    Piece(u32, Piece),
    /// The completions in this range begin anew.
    Restart(std::ops::Range<u32>),
    /// All of them ended.
    Over,
}

impl Generation {
    /// Sends each plan to its nodes.
    pub(super) fn start(
        app: Arc<App>,
        turn: Turn,
        plans: Vec<Plan>,
        started: Instant,
        streams: bool,
    ) -> Result<Generation, ApiError> {
        let (sender, arrivals) = mpsc::channel(INBOX);
        let job = |plan: Plan| {
            let plan = Arc::new(plan);
            Job {
                life: Life::new(app.model.clone(), plan.clone()),
                last_token: vec![None; plan.generation.choices as usize],
                plan,
                attempt: None,
                retried: false,
                given: false,
            }
        };
        let jobs: Vec<Job> = plans.into_iter().map(job).collect();
        let mut generation = Generation {
            jobs,
            arrivals,
            inbox: Inbox { job: 0, sender, overflowed: Arc::new(AtomicBool::new(false)) },
            cut: app.cut.subscribe(),
            started,
            deadline: tokio::time::Instant::now() + app.dispatcher.limits().generation_timeout,
            streams,
            ended: false,
            _turn: turn,
            app,
        };
        for index in 0..generation.jobs.len() {
            if let Err(error) = generation.submit(index, &[]) {
                generation.ended = true;
                return Err(error);
            }
        }
        Ok(generation)
    }

    /// Sends the plan of job `index` to nodes, to others if the first ones cannot be told.
    fn submit(&mut self, index: usize, avoid: &[NodeId]) -> Result<(), ApiError> {
        let mut avoid = avoid.to_vec();
        loop {
            let job = &mut self.jobs[index];
            let request = RequestId(random());
            let inbox = Inbox { job: index, ..self.inbox.clone() };
            match self.app.dispatcher.submit(request, &job.plan, &avoid, inbox) {
                Ok(attempt) => {
                    let (prefill, decode) = (attempt.prefill, attempt.decode.map(display));
                    tracing::debug!(%request, %prefill, decode, prompt_tokens = job.plan.prompt.len(), "submitted");
                    job.attempt = Some(attempt);
                    return Ok(());
                }
                Err(NotStarted::Send { node, .. }) if !job.retried => {
                    job.retried = true;
                    self.app.metrics.retries.add(1);
                    avoid.push(node);
                }
                Err(NotStarted::Encode(error)) => return Err(ApiError::invalid(error.to_string())),
                Err(error @ NotStarted::Send { .. }) => {
                    return Err(ApiError::unavailable("overloaded", error.to_string()));
                }
                Err(NotStarted::Unplaced(reason)) => {
                    let message = format!("The request cannot be computed now: {reason}.");
                    return Err(ApiError::unavailable("no_nodes", message));
                }
            }
        }
    }

    /// Waits for the next step. Loses nothing when it is dropped while it waits.
    async fn next(&mut self) -> Result<Step, ApiError> {
        let step = self.try_next().await;
        if !matches!(step, Ok(Step::Piece(..) | Step::Restart(_))) {
            self.ended = true;
        }
        step
    }

    async fn try_next(&mut self) -> Result<Step, ApiError> {
        loop {
            let mut first = 0;
            for job in &mut self.jobs {
                if let Some(piece) = job.life.poll_piece() {
                    job.given = true;
                    return Ok(Step::Piece(first + piece.choice, piece));
                }
                first += job.plan.generation.choices;
            }
            for job in &mut self.jobs {
                if job.life.is_over()
                    && let Some(attempt) = job.attempt.take()
                    && !job.life.must_cancel()
                {
                    attempt.complete();
                }
            }
            if self.jobs.iter().all(|job| job.life.is_over()) {
                self.count();
                return Ok(Step::Over);
            }
            let arrival = tokio::select! {
                // What is here counts, even if the time is up meanwhile.
                biased;
                arrival = self.arrivals.recv() => arrival,
                () = tokio::time::sleep_until(self.deadline) => {
                    let within = self.app.dispatcher.limits().generation_timeout;
                    return Err(ApiError::deadline(format!("The answer was not complete within {within:?}.")));
                }
                _ = self.cut.wait_for(|cut| *cut) => {
                    let message = "This server is shutting down and could not wait for the answer's end.";
                    return Err(ApiError::unavailable("shutting_down", message));
                }
            };
            if self.inbox.overflowed.load(Relaxed) {
                return Err(ApiError::internal("tokens came faster than they were taken"));
            }
            // This object holds a sender itself, so there is always an arrival.
            let Some(arrival) = arrival else { continue };
            if let Some(restarted) = self.handle(arrival)? {
                return Ok(restarted);
            }
        }
    }

    fn handle(&mut self, arrival: Arrival) -> Result<Option<Step>, ApiError> {
        let now = Instant::now();
        let metrics = &self.app.metrics;
        let Some(job) = self.jobs.get_mut(arrival.job) else { return Ok(None) };
        if job.attempt.as_ref().is_none_or(|attempt| attempt.request != arrival.request) {
            return Ok(None);
        }
        let handled = match arrival.news {
            News::First(first) => {
                if !job.life.has_first() {
                    metrics.first_token.observe(now - self.started);
                    tracing::debug!(request = %arrival.request, after = ?(now - self.started), "first token");
                    job.last_token.fill(Some(now));
                }
                job.life.handle_first(first)
            }
            News::Tokens(tokens) => {
                let last =
                    job.last_token.get_mut(tokens.choice.0 as usize).and_then(|last| last.replace(now));
                if let (Some(last), count @ 1..) = (last, tokens.tokens.len() as u32) {
                    metrics.between_tokens.observe((now - last) / count);
                }
                job.life.handle_tokens(tokens)
            }
            News::Failed { role, error } => return self.handle_failure(arrival.job, role, error),
        };
        match handled {
            Ok(()) => Ok(None),
            Err(fault) => {
                tracing::error!(request = %arrival.request, %fault, "a node broke the rules");
                Err(ApiError::internal(format!("the nodes' answers do not fit together: {fault}")))
            }
        }
    }

    fn handle_failure(
        &mut self,
        index: usize,
        role: Role,
        error: RequestError,
    ) -> Result<Option<Step>, ApiError> {
        let job = &mut self.jobs[index];
        let Some(attempt) = &job.attempt else { return Ok(None) };
        let lost = matches!(error, RequestError::PeerLost(_));
        // After its first tokens a prefill node may be gone: either all KV was handed over and the decode
        // node goes on, or it was not and the decode node says so.
        if lost && role == Role::Prefill && job.life.has_first() && attempt.decode.is_some() {
            return Ok(None);
        }
        let elsewhere =
            matches!(error, RequestError::Busy(_) | RequestError::PeerLost(_) | RequestError::Corrupt(_));
        let failed_at = if role == Role::Prefill { Some(attempt.prefill) } else { attempt.decode };
        tracing::warn!(request = %attempt.request, %role, %error, "attempt failed");
        if !elsewhere || job.retried || (job.given && self.streams) {
            return Err(ApiError::from(&error));
        }
        job.retried = true;
        // Dropped first: its nodes free what they hold before they are asked for more.
        job.attempt = None;
        job.life = Life::new(self.app.model.clone(), job.plan.clone());
        job.last_token.fill(None);
        let restart = std::mem::take(&mut job.given);
        self.app.metrics.retries.add(1);
        self.submit(index, failed_at.as_slice())?;
        let before: u32 = self.jobs[..index].iter().map(|job| job.plan.generation.choices).sum();
        let range = before..before + self.jobs[index].plan.generation.choices;
        Ok(restart.then_some(Step::Restart(range)))
    }

    fn usage(&self) -> Usage {
        self.jobs.iter().map(|job| job.life.usage()).fold(Usage::default(), Usage::plus)
    }

    fn count(&self) {
        let (usage, metrics) = (self.usage(), &self.app.metrics);
        metrics.whole.observe(self.started.elapsed());
        tracing::debug!(completion_tokens = usage.completion_tokens, after = ?self.started.elapsed(), "complete");
        metrics.prompt_tokens.add(usage.prompt_tokens.into());
        metrics.completion_tokens.add(usage.completion_tokens.into());
        metrics.cached_tokens.add(usage.prompt_tokens_details.cached_tokens.into());
    }

    /// What all chunks of the answer share.
    pub(super) fn head(&self, prefix: &str, object: &'static str, model: &str) -> Head {
        let fingerprint = self.app.dispatcher.fingerprint();
        Head {
            id: format!("{prefix}-{:032x}", random()),
            object,
            created: unix_seconds(),
            model: model.to_owned(),
            system_fingerprint: fingerprint
                .map(|fingerprint| format!("fp_{}", &fingerprint.to_string()[..12])),
        }
    }

    /// The answer in one piece.
    pub(super) async fn whole(mut self, form: impl Form) -> Result<Response, ApiError> {
        let count: u32 = self.jobs.iter().map(|job| job.plan.generation.choices).sum();
        let mut completions: Vec<Completion> = (0..count).map(|_| Completion::default()).collect();
        loop {
            match self.next().await? {
                Step::Piece(index, piece) => {
                    let completion = &mut completions[index as usize];
                    completion.text.push_str(&piece.text);
                    completion.logprobs.extend(piece.logprobs);
                    completion.finish = piece.finish;
                }
                Step::Restart(range) => {
                    range.for_each(|index| completions[index as usize] = Completion::default());
                }
                Step::Over => return Ok(Json(form.whole(completions, self.usage())).into_response()),
            }
        }
    }

    /// The answer as it comes. Until the first piece is here, a failure still gets its own status.
    pub(super) async fn stream(mut self, form: impl Form, include_usage: bool) -> Result<Response, ApiError> {
        let first = self.next().await?;
        let (events, body) = sse::channel(self.app.settings.client_timeout);
        let streaming = async move {
            let metrics = self.app.metrics.clone();
            let ended = self.pump(form, include_usage, first, &events).await;
            // The nodes are told before a slow client is.
            drop(self);
            match ended {
                Ok(()) => {}
                Err(Ended::Client(reason)) => tracing::info!(%reason, "stream given up"),
                Err(Ended::Failed(error)) => {
                    tracing::warn!(status = error.status, error = error.message, "stream failed");
                    metrics.stream_failures.add(1);
                    let _ = events.send(&error.envelope()).await;
                }
            }
        };
        tokio::spawn(streaming.in_current_span());
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
            // Proxies that buffer would hold tokens back.
            (header::HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        Ok((headers, body).into_response())
    }

    async fn pump(
        &mut self,
        mut form: impl Form,
        include_usage: bool,
        first: Step,
        events: &EventSender,
    ) -> Result<(), Ended> {
        for chunk in form.opening() {
            events.send(&chunk).await?;
        }
        let mut step = first;
        loop {
            match step {
                Step::Piece(index, piece) => events.send(&form.chunk(index, piece)).await?,
                // Only what was not handed out is begun anew in a stream.
                Step::Restart(_) => {}
                Step::Over => break,
            }
            step = tokio::select! {
                step = self.next() => step.map_err(Ended::Failed)?,
                () = events.closed() => return Err(Ended::Client(Unsent::Gone)),
            };
        }
        if include_usage {
            events.send(&form.usage(self.usage())).await?;
        }
        Ok(events.done().await?)
    }
}

/// Why a stream ended early.
enum Ended {
    Client(Unsent),
    Failed(ApiError),
}

impl From<Unsent> for Ended {
    fn from(unsent: Unsent) -> Ended {
        Ended::Client(unsent)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            self.app.metrics.disconnects.add(1);
        }
    }
}
