//! Whole generations in one process: the reference for what a cluster must give, and for its speed.

use crate::sampling::{Sampler, SamplingError};
use crate::{Engine, EngineError, Sequence};
use std::collections::VecDeque;
use tandem_kernels::Paged;
use tandem_proto::ids::{ChoiceIdx, PageId, TokenId};
use tandem_proto::wire::{Finish, Sampled, SamplingParams};

/// One completion to generate.
#[derive(Clone, PartialEq, Debug)]
pub struct GenRequest {
    /// The prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Which of a request's completions this is.
    pub choice: ChoiceIdx,
    /// Tokens at most; at least one.
    pub max_tokens: u32,
    /// Ends with the first of these.
    pub stop_tokens: Vec<TokenId>,
}

/// A generated completion.
#[derive(Clone, PartialEq, Debug)]
pub struct GenResult {
    /// Its tokens, the stop token included.
    pub tokens: Vec<Sampled>,
    /// Why it ended.
    pub finish: Finish,
}

/// Why a generation failed.
#[derive(Debug, thiserror::Error)]
pub enum SingleError {
    /// The engine refused a step.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A token could not be chosen.
    #[error("request {request}: {source}")]
    Sampling {
        /// Its index.
        request: usize,
        /// Why.
        #[source]
        source: SamplingError,
    },
    /// It can never run.
    #[error("request {request}: {reason}")]
    Request {
        /// Its index.
        request: usize,
        /// Why.
        reason: String,
    },
}

/// An engine with pages of its own.
pub struct SingleProcess<E: Engine> {
    engine: E,
    kv: E::Pages,
    free: Vec<PageId>,
    /// New tokens of one step, at most.
    step_tokens: usize,
}

/// A request that has its pages.
struct Running {
    request: usize,
    sampler: Sampler,
    pages: Vec<PageId>,
    /// Tokens whose KV lies in the pages.
    done: usize,
    tokens: Vec<TokenId>,
    generated: Vec<Sampled>,
}

impl<E: Engine> SingleProcess<E> {
    /// Gives `engine` the pages of `kv`, and steps of up to `step_tokens` tokens.
    pub fn new(engine: E, kv: E::Pages, step_tokens: usize) -> SingleProcess<E> {
        // Handed out from the end: so pages are not simply in order.
        let free = (0..kv.pages()).map(PageId).collect();
        SingleProcess { engine, kv, free, step_tokens: step_tokens.max(1) }
    }

    /// The engine.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// Generates all requests together; each joins when there are pages for all it may need.
    ///
    /// # Errors
    /// When one of them cannot run; nothing is generated then.
    pub fn generate(&mut self, requests: &[GenRequest]) -> Result<Vec<GenResult>, SingleError> {
        self.generate_with(requests, &mut |_, _| ())
    }

    /// As [`SingleProcess::generate`]; `on_token` is told the request and each of its tokens at once.
    ///
    /// # Errors
    /// As there.
    pub fn generate_with(
        &mut self,
        requests: &[GenRequest],
        on_token: &mut dyn FnMut(usize, &Sampled),
    ) -> Result<Vec<GenResult>, SingleError> {
        let mut waiting = self.admit(requests)?;
        let mut running: Vec<Running> = Vec::new();
        let mut results: Vec<Option<GenResult>> = requests.iter().map(|_| None).collect();
        let outcome = loop {
            self.join(&mut waiting, &mut running, requests);
            if running.is_empty() {
                break Ok(());
            }
            if let Err(error) = self.step(&mut running, requests, &mut results, on_token) {
                break Err(error);
            }
        };
        running.drain(..).for_each(|r| self.free.extend(r.pages));
        outcome.map(|()| results.into_iter().flatten().collect())
    }

    fn admit(&self, requests: &[GenRequest]) -> Result<VecDeque<(usize, Sampler)>, SingleError> {
        let info = self.engine.info();
        let admit = |(request, r): (usize, &GenRequest)| {
            let refuse = |reason: String| Err(SingleError::Request { request, reason });
            if r.prompt.is_empty() || r.max_tokens == 0 {
                return refuse("prompt and max_tokens must not be empty".to_owned());
            }
            if r.prompt.len() > info.max_positions as usize {
                return refuse(format!(
                    "prompt of {} tokens, the model takes {}",
                    r.prompt.len(),
                    info.max_positions
                ));
            }
            if self.pages_of(r) > self.kv.pages() {
                return refuse(format!("needs {} pages, the pool has {}", self.pages_of(r), self.kv.pages()));
            }
            match Sampler::new(&r.sampling, r.choice, &r.prompt) {
                Ok(sampler) => Ok((request, sampler)),
                Err(source) => Err(SingleError::Sampling { request, source }),
            }
        };
        requests.iter().enumerate().map(admit).collect()
    }

    /// The KV of the last token is never needed.
    fn pages_of(&self, r: &GenRequest) -> u32 {
        let info = self.engine.info();
        let tokens = (r.prompt.len() as u64 + u64::from(r.max_tokens) - 1).min(u64::from(info.max_positions));
        info.kv.pages(tokens as u32)
    }

    fn join(
        &mut self,
        waiting: &mut VecDeque<(usize, Sampler)>,
        running: &mut Vec<Running>,
        all: &[GenRequest],
    ) {
        while let Some((request, _)) = waiting.front() {
            let needed = self.pages_of(&all[*request]) as usize;
            if needed > self.free.len() {
                return;
            }
            let Some((request, sampler)) = waiting.pop_front() else { return };
            let pages = self.free.split_off(self.free.len() - needed);
            let tokens = all[request].prompt.clone();
            running.push(Running { request, sampler, pages, done: 0, tokens, generated: Vec::new() });
        }
    }

    /// One step: a token of everything that decodes, then as much of prompts as fits.
    fn step(
        &mut self,
        running: &mut Vec<Running>,
        requests: &[GenRequest],
        results: &mut [Option<GenResult>],
        on_token: &mut dyn FnMut(usize, &Sampled),
    ) -> Result<(), SingleError> {
        let mut room = self.step_tokens;
        // Decoding ones first: they are the ones with a single token left to compute and some generated.
        running.sort_by_key(|r| (r.generated.is_empty(), r.request));
        let mut batch = Vec::new();
        for r in running.iter() {
            let count = (r.tokens.len() - r.done).min(room);
            if count == 0 {
                break;
            }
            room -= count;
            let end = r.done + count;
            batch.push(Sequence {
                tokens: &r.tokens[r.done..end],
                start: r.done as u32,
                pages: &r.pages,
                logits: end == r.tokens.len(),
            });
        }
        let counts: Vec<usize> = batch.iter().map(|s| s.tokens.len()).collect();
        let mut logits = self.engine.step(&batch, &mut self.kv, &mut |_, _| ())?;
        let mut rows = logits.rows_mut();
        for (r, count) in running.iter_mut().zip(counts) {
            r.done += count;
            if r.done < r.tokens.len() {
                continue;
            }
            let row = rows.next().expect("a row for every sequence that asked");
            let sampled = r
                .sampler
                .sample(row, r.generated.len() as u32)
                .map_err(|source| SingleError::Sampling { request: r.request, source })?;
            on_token(r.request, &sampled);
            r.tokens.push(sampled.token);
            r.generated.push(sampled);
        }
        let max_positions = self.engine.info().max_positions as usize;
        for r in running.extract_if(.., |r| finish(r, &requests[r.request], max_positions).is_some()) {
            let finish = finish(&r, &requests[r.request], max_positions).unwrap_or(Finish::Length);
            self.free.extend(r.pages);
            results[r.request] = Some(GenResult { tokens: r.generated, finish });
        }
        Ok(())
    }
}

fn finish(r: &Running, request: &GenRequest, max_positions: usize) -> Option<Finish> {
    let last = r.generated.last()?;
    if request.stop_tokens.contains(&last.token) {
        Some(Finish::Stop)
    } else if r.generated.len() >= request.max_tokens as usize || r.tokens.len() > max_positions {
        Some(Finish::Length)
    } else {
        None
    }
}
