//! The node's loop: admits prompts, computes them in steps, and gives their pages back.

use crate::outbound::{Arrival, Outbound};
use crate::prompt::Prompt;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tandem_engine::sampling::{Sampler, SamplingError};
use tandem_engine::{Engine, Progress, Sequence};
use tandem_kernels::{Kernels, Paged};
use tandem_kv_store::PagePool;
use tandem_node::{Board, Next, Shown};
use tandem_proto::ids::{ChoiceIdx, ChunkIdx, PageId, RequestId, Time};
use tandem_proto::keys::{ChunkKey, chunk_keys};
use tandem_proto::wire::{FirstTokens, Load, Message, RequestError, Sampled};
use tracing::field::display;

/// Limits of the loop.
pub struct Limits {
    /// Tokens computed in one step, a multiple of a chunk.
    pub step_tokens: u32,
    /// Prompts that may wait; more are refused.
    pub max_waiting: usize,
}

/// A prefill node.
pub struct Node<E: Engine, K: Kernels<Pages = E::Pages>> {
    engine: E,
    kv: E::Pages,
    pool: PagePool,
    outbound: Outbound<K>,
    limits: Limits,
    waiting: VecDeque<Box<Prompt>>,
    /// Prompts that hold pages, until their handoff is over.
    running: BTreeMap<RequestId, Running>,
    /// Those of `running` that are not computed to the end, first come first served.
    computing: VecDeque<RequestId>,
    /// Requests that were cancelled before they came: cancels travel in a lane of their own.
    cancelled_early: VecDeque<RequestId>,
    told: Load,
    board: Arc<Board>,
}

/// Between turns of handoffs while a device computes: the end of a step is not to be noticed late for one.
const WAITING_TURN_US: u64 = 50;

/// How many early cancels are remembered.
const MAX_CANCELLED_EARLY: usize = 1024;

struct Running {
    prompt: Box<Prompt>,
    pages: Arc<[PageId]>,
    keys: Vec<ChunkKey>,
    /// Tokens whose KV is in the pages.
    computed: u32,
    /// Tokens whose KV was there before.
    cached: u32,
    /// The handoff is over (or there is none); only a step that is running may still use the pages.
    over: bool,
}

/// What one prompt contributes to a step.
struct Share {
    request: RequestId,
    start: u32,
    end: u32,
    last: bool,
}

impl<E: Engine, K: Kernels<Pages = E::Pages>> Node<E, K> {
    /// A node with an empty pool.
    #[must_use]
    pub fn new(engine: E, kv: E::Pages, outbound: Outbound<K>, limits: Limits) -> Node<E, K> {
        let pool = PagePool::new(kv.pages());
        Node {
            engine,
            kv,
            pool,
            outbound,
            limits,
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            computing: VecDeque::new(),
            cancelled_early: VecDeque::new(),
            told: Load::default(),
            board: Arc::default(),
        }
    }

    /// Shows its state there.
    #[must_use]
    pub fn showing(mut self, board: Arc<Board>) -> Node<E, K> {
        self.board = board;
        self
    }

    /// Runs until it is stopped, or drained and idle.
    ///
    /// # Errors
    /// When its device failed.
    pub fn run(mut self) -> anyhow::Result<()> {
        loop {
            match self.turn() {
                Next::Again => {}
                Next::Wait(until) => self.outbound.wait(until),
                Next::Finished => return self.outbound.failed(),
            }
        }
    }

    /// One turn: takes in what happened, and computes one step if there is something to compute.
    pub fn turn(&mut self) -> Next {
        self.outbound.turn(&self.kv);
        self.take_arrivals();
        self.release_ended();
        if self.outbound.stopped {
            return Next::Finished;
        }
        self.admit();
        self.tell_load();
        if !self.computing.is_empty() {
            self.step();
            Next::Again
        } else if self.outbound.has_news() {
            Next::Again
        } else if self.outbound.is_draining() && self.running.is_empty() && self.waiting.is_empty() {
            Next::Finished
        } else {
            let waiting = self.waiting.iter().map(|prompt| prompt.deadline);
            Next::Wait(waiting.chain(self.outbound.next_deadline()).min())
        }
    }

    /// What the node holds: for those who check that nothing leaks.
    #[must_use]
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            pages: self.pool.pages() as u32,
            free_pages: self.pool.available() as u32,
            slots: 0,
            free_slots: 0,
        }
    }

    /// Handoffs that are not over, and staging slots in use.
    #[must_use]
    pub fn under_way(&self) -> (usize, usize) {
        (self.outbound.open_handoffs(), self.outbound.staged())
    }

    fn take_arrivals(&mut self) {
        while let Some(arrival) = self.outbound.arrived.pop_front() {
            match arrival {
                Arrival::Prompt(prompt) => self.arrive(prompt),
                Arrival::Cancelled(request) => self.cancel(request),
                Arrival::RouterLost(router) => {
                    let of_router = |prompt: &Prompt| prompt.router == router;
                    self.waiting.retain(|prompt| !of_router(prompt));
                    let running = self.running.values().filter(|running| of_router(&running.prompt));
                    for request in running.map(|running| running.prompt.request).collect::<Vec<_>>() {
                        self.cancel(request);
                    }
                }
                Arrival::DecodeLost(peer, why) => {
                    let (lost, kept) = std::mem::take(&mut self.waiting)
                        .into_iter()
                        .partition(|prompt| prompt.decode.is_some_and(|decode| decode.node == peer));
                    self.waiting = kept;
                    let lost: VecDeque<Box<Prompt>> = lost;
                    for prompt in lost {
                        let error = RequestError::PeerLost(format!("decode node {peer}: {why}"));
                        self.fail(prompt.request, error);
                    }
                }
            }
        }
    }

    fn arrive(&mut self, prompt: Box<Prompt>) {
        let (request, decode) = (prompt.request, prompt.decode.map(|decode| display(decode.node)));
        tracing::debug!(%request, router = %prompt.router, decode, tokens = prompt.tokens.len(), "prompt submitted");
        if let Some(at) = self.cancelled_early.iter().position(|request| *request == prompt.request) {
            self.cancelled_early.remove(at);
            return;
        }
        let info = self.engine.info();
        let tokens = prompt.tokens.len() as u32;
        let pages = info.kv.pages(tokens) as usize;
        let bad_token = prompt.tokens.iter().find(|token| token.0 >= info.vocab_size);
        let refusal = if let Some(token) = bad_token {
            Some(RequestError::Invalid(format!(
                "token {token} is not in the vocabulary of {}",
                info.vocab_size
            )))
        } else if tokens > info.max_positions || pages > self.pool.pages() {
            let room =
                (self.pool.pages() as u64 * u64::from(info.kv.page_tokens)).min(info.max_positions.into());
            Some(RequestError::Invalid(format!("the prompt has {tokens} tokens, this node holds {room}")))
        } else if self.waiting.len() >= self.limits.max_waiting {
            Some(RequestError::Busy(format!("{} prompts are waiting for prefill", self.waiting.len())))
        } else if self.outbound.is_draining() {
            Some(RequestError::Busy("the prefill node is draining".into()))
        } else {
            None
        };
        match refusal {
            Some(error) => self.fail(prompt.request, error),
            None => self.waiting.push_back(prompt),
        }
    }

    fn fail(&mut self, request: RequestId, error: RequestError) {
        tracing::info!(%request, %error, "request failed");
        self.outbound.tell_router(Message::Failed { request, error });
    }

    fn cancel(&mut self, request: RequestId) {
        let waiting = self.waiting.len();
        self.waiting.retain(|prompt| prompt.request != request);
        let Some(running) = self.running.get_mut(&request) else {
            if self.waiting.len() == waiting {
                self.cancelled_early.push_front(request);
                self.cancelled_early.truncate(MAX_CANCELLED_EARLY);
            }
            return;
        };
        if running.prompt.decode.is_some() {
            self.outbound.give_up(request, None);
        } else {
            running.over = true;
        }
        self.computing.retain(|computing| *computing != request);
        self.release_if_over(request);
    }

    /// Starts prompts in order of arrival, while there are pages. One whose decode node is being reached does
    /// not hold up the others.
    fn admit(&mut self) {
        let now = self.outbound.clock.now();
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut no_room = false;
        while let Some(prompt) = waiting.pop_front() {
            if prompt.deadline <= now {
                let error = RequestError::Deadline("the prompt waited too long for prefill".into());
                self.fail(prompt.request, error);
            } else if no_room || prompt.decode.is_some_and(|decode| !self.outbound.is_linked(&decode)) {
                self.waiting.push_back(prompt);
            } else if let Err(prompt) = self.start(prompt) {
                no_room = true;
                self.waiting.push_back(prompt);
            }
        }
    }

    fn start(&mut self, prompt: Box<Prompt>) -> Result<(), Box<Prompt>> {
        let info = self.engine.info();
        let (kv, fingerprint) = (info.kv, info.fingerprint);
        let tokens = prompt.tokens.len() as u32;
        let keys = chunk_keys(fingerprint, &prompt.salt, kv.chunk_tokens, &prompt.tokens);
        // The last token is always computed: its logits choose the first token.
        let reusable = ((tokens - 1) / kv.chunk_tokens) as usize;
        let mut pages = self.pool.match_prefix(&keys[..reusable]);
        let cached = pages.len() as u32 * kv.page_tokens;
        let Some(fresh) = self.pool.take(kv.pages(tokens) as usize - pages.len()) else {
            self.pool.release(&pages);
            return Err(prompt);
        };
        pages.extend(fresh);
        let pages: Arc<[PageId]> = pages.into();
        if let Some(decode) = prompt.decode {
            self.outbound.begin(&prompt, decode.node, Arc::clone(&pages), cached);
        }
        let request = prompt.request;
        self.computing.push_back(request);
        let running = Running { prompt, pages, keys, computed: cached, cached, over: false };
        self.running.insert(request, running);
        Ok(())
    }

    /// Computes the next tokens of the prompts that came first, whole chunks unless it is a prompt's end.
    fn step(&mut self) {
        let kv = self.engine.info().kv;
        let mut budget = self.limits.step_tokens;
        let mut shares = Vec::new();
        for request in &self.computing {
            let running = &self.running[request];
            let total = running.prompt.tokens.len() as u32;
            let rest = total - running.computed;
            let take = if rest <= budget { rest } else { budget / kv.chunk_tokens * kv.chunk_tokens };
            if take == 0 {
                break;
            }
            budget -= take;
            let (start, end) = (running.computed, running.computed + take);
            shares.push(Share { request: *request, start, end, last: end == total });
        }
        let batch: Vec<_> = shares
            .iter()
            .map(|share| {
                let running = &self.running[&share.request];
                Sequence {
                    tokens: &running.prompt.tokens[share.start as usize..share.end as usize],
                    start: share.start,
                    pages: &running.pages,
                    logits: share.last,
                }
            })
            .collect();
        let outbound = &mut self.outbound;
        let mut waited: Option<Time> = None;
        let result = self.engine.step(&batch, &mut self.kv, &mut |progress, pages| {
            match progress {
                Progress::Layer(layer) => {
                    for share in &shares {
                        for chunk in share.start / kv.chunk_tokens..share.end.div_ceil(kv.chunk_tokens) {
                            outbound.ready(share.request, ChunkIdx(chunk), layer);
                        }
                    }
                }
                Progress::Waiting => {
                    let now = outbound.clock.now();
                    if waited.is_some_and(|last| now.since_us(last) < WAITING_TURN_US) {
                        return;
                    }
                    waited = Some(now);
                }
            }
            outbound.turn(pages);
        });
        match result {
            Ok(logits) => {
                let mut rows = logits.rows();
                for share in shares {
                    let row = if share.last { rows.next() } else { None };
                    self.computed(&share, row);
                }
            }
            Err(error) => {
                for share in shares {
                    self.give_up(share.request, RequestError::Internal(error.to_string()));
                }
            }
        }
    }

    fn computed(&mut self, share: &Share, logits: Option<&[f32]>) {
        let chunk_tokens = self.engine.info().kv.chunk_tokens;
        let Some(running) = self.running.get_mut(&share.request) else {
            return;
        };
        running.computed = share.end;
        let per_chunk = (chunk_tokens / self.engine.info().kv.page_tokens) as usize;
        for chunk in (share.start / chunk_tokens) as usize..(share.end / chunk_tokens) as usize {
            let pages = &running.pages[chunk * per_chunk..(chunk + 1) * per_chunk];
            self.pool.publish(running.keys[chunk], pages);
        }
        let Some(logits) = logits else { return };
        self.computing.retain(|computing| *computing != share.request);
        let prompt = &running.prompt;
        let sampled: Result<Vec<Sampled>, SamplingError> = (0..prompt.generation.choices)
            .map(|choice| {
                let sampling = &prompt.generation.sampling;
                // Sampling rules change the logits in place, and each choice starts from the model's.
                Sampler::new(sampling, ChoiceIdx(choice), &prompt.tokens)?.sample(&mut logits.to_vec(), 0)
            })
            .collect();
        match sampled {
            Ok(tokens) => {
                let handed_over = prompt.decode.is_some();
                tracing::debug!(request = %share.request, cached_tokens = running.cached, "first token computed");
                let message = FirstTokens {
                    request: share.request,
                    tokens: tokens.clone(),
                    cached_tokens: running.cached,
                };
                running.over |= !handed_over;
                self.outbound.tell_router(Message::FirstTokens(message));
                if handed_over {
                    self.outbound.first(share.request, tokens);
                }
                self.release_if_over(share.request);
            }
            Err(error) => self.give_up(share.request, RequestError::Internal(error.to_string())),
        }
    }

    fn give_up(&mut self, request: RequestId, error: RequestError) {
        self.computing.retain(|computing| *computing != request);
        let Some(running) = self.running.get_mut(&request) else {
            return;
        };
        if running.prompt.decode.is_some() {
            self.outbound.give_up(request, Some(error));
        } else {
            running.over = true;
            self.release_if_over(request);
            self.fail(request, error);
        }
    }

    /// Takes note of handoffs that ended during the last step, after it: their pages were in use.
    fn release_ended(&mut self) {
        while let Some((request, outcome)) = self.outbound.ended.pop_front() {
            self.computing.retain(|computing| *computing != request);
            if let Some(running) = self.running.get_mut(&request) {
                running.over = true;
            }
            self.release_if_over(request);
            if let Err(Some(error)) = outcome {
                self.fail(request, error);
            }
        }
    }

    fn release_if_over(&mut self, request: RequestId) {
        if self.running.get(&request).is_some_and(|running| running.over)
            && let Some(running) = self.running.remove(&request)
        {
            self.pool.release(&running.pages);
        }
    }

    fn tell_load(&mut self) {
        let load = self.load();
        self.board.show(Shown {
            router: self.outbound.router(),
            draining: self.outbound.is_draining(),
            load,
            handoffs: self.outbound.open_handoffs(),
            ..Shown::default()
        });
        if load != self.told && self.outbound.try_tell_router(&Message::Load(load)) {
            self.told = load;
        }
    }
}
