//! The node's loop: admits prompts, computes them in steps, and gives their pages back.

use crate::cache::{self, Arrived, Cache, LoadId};
use crate::outbound::{Arrival, Outbound};
use crate::prompt::Prompt;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tandem_engine::sampling::{Sampler, SamplingError};
use tandem_engine::{Engine, Progress, Sequence};
use tandem_kernels::{Kernels, Paged};
use tandem_kv_store::PagePool;
use tandem_node::{Board, CacheShown, Next, ReusedTokens, Shown};
use tandem_proto::ids::{ChoiceIdx, ChunkIdx, PageId, RequestId, Time};
use tandem_proto::keys::chunk_keys;
use tandem_proto::wire::{CachedTokens, FirstTokens, Load, Message, RequestError, Sampled};
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
    /// Pages of requests that are over, to which chunks of the store are still on their way.
    parked: BTreeMap<LoadId, Arc<[PageId]>>,
    /// Tokens that were not computed, by where their KV was.
    reused: ReusedTokens,
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
    /// Tokens whose KV is in the pages.
    computed: u32,
    /// Those that were not computed.
    cached: CachedTokens,
    /// Chunks that are on their way from the store. It computes nothing before.
    loading: Option<LoadId>,
    /// Where the computed tokens begin whose KV waits to be written at the prompt's last step.
    unsaid: Option<u32>,
    /// The handoff is over (or there is none); only a step that is running may still use the pages.
    over: bool,
}

/// What one prompt contributes to a step.
struct Share {
    request: RequestId,
    start: u32,
    end: u32,
    last: bool,
    /// Its layers are written as they are computed.
    says: bool,
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
            parked: BTreeMap::new(),
            reused: ReusedTokens::default(),
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
        self.take_loaded();
        self.take_arrivals();
        self.release_ended();
        if self.outbound.stopped {
            return Next::Finished;
        }
        self.look_at_awaited();
        self.admit();
        self.outbound.begin_loads(&mut self.kv);
        self.tell_load();
        if !self.computing.is_empty() {
            self.step();
            Next::Again
        } else if self.outbound.has_news() {
            Next::Again
        } else if self.outbound.is_draining() && self.is_idle() {
            Next::Finished
        } else {
            let now = self.outbound.clock.now();
            let awaited = self.waiting.iter().filter_map(|prompt| prompt.awaits).filter(|until| *until > now);
            let waiting = self.waiting.iter().map(|prompt| prompt.deadline).chain(awaited);
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

    /// Handoffs that are not over; and conversions, staging slots in use, and what is held of the store.
    #[must_use]
    pub fn under_way(&self) -> (usize, usize) {
        let cache = self.outbound.cache.as_ref().map_or(0, Cache::under_way);
        (self.outbound.open_handoffs(), self.outbound.staged() + cache)
    }

    /// Whether nothing is to be done, or to be put away.
    fn is_idle(&self) -> bool {
        let saving = self.outbound.cache.as_ref().map_or(0, Cache::saving);
        self.running.is_empty() && self.waiting.is_empty() && self.parked.is_empty() && saving == 0
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

    fn arrive(&mut self, mut prompt: Box<Prompt>) {
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
            None => {
                let (kv, fingerprint) = (info.kv, info.fingerprint);
                prompt.keys = chunk_keys(fingerprint, &prompt.salt, kv.chunk_tokens, &prompt.tokens);
                self.prefetch(&mut prompt);
                self.waiting.push_back(prompt);
            }
        }
    }

    /// Has slower tiers bring what they have of a prompt, beyond what is in pages.
    fn prefetch(&mut self, prompt: &mut Prompt) {
        let keys = prompt.reusable(self.engine.info().kv.chunk_tokens);
        let rest = &keys[self.pool.prefix(keys)..];
        if let Some(cache) = &mut self.outbound.cache {
            let tenant = Cache::tenant(&prompt.salt);
            prompt.awaits = cache.prefetch(self.outbound.clock.now(), tenant, rest);
        }
    }

    /// Prompts to which nothing is on its way any more need not wait.
    fn look_at_awaited(&mut self) {
        let Some(cache) = &mut self.outbound.cache else { return };
        if !cache.take_news() {
            return;
        }
        let chunk_tokens = self.engine.info().kv.chunk_tokens;
        for prompt in self.waiting.iter_mut().filter(|prompt| prompt.awaits.is_some()) {
            let keys = prompt.reusable(chunk_tokens);
            if !cache.is_coming(&keys[self.pool.prefix(keys)..]) {
                prompt.awaits = None;
            }
        }
    }

    /// Takes note of chunks that came from the store.
    fn take_loaded(&mut self) {
        let kv = self.engine.info().kv;
        while let Some(arrived) = self.outbound.loaded.pop_front() {
            match arrived {
                Arrived::Chunk { load, request, chunk, from } => {
                    let Some(running) = self.running.get_mut(&request).filter(|r| r.loading == Some(load))
                    else {
                        continue;
                    };
                    let pages = &running.pages[kv.chunk_pages(chunk, running.prompt.tokens.len() as u32)];
                    self.pool.publish(running.prompt.keys[chunk.0 as usize], pages);
                    running.computed += kv.chunk_tokens;
                    cache::count(&mut running.cached, from, kv.chunk_tokens);
                }
                Arrived::Over { load, request, stopped } => {
                    if let Some(pages) = self.parked.remove(&load) {
                        self.pool.release(&pages);
                    } else if let Some(running) =
                        self.running.get_mut(&request).filter(|r| r.loading == Some(load))
                    {
                        running.loading = None;
                        if !stopped {
                            self.computing.push_back(request);
                        }
                    }
                }
            }
        }
        if let Some(cache) = &mut self.outbound.cache {
            self.pool.release(&std::mem::take(&mut cache.packed_pages));
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
        if let Some(load) = running.loading {
            self.outbound.stop_load(load);
        }
        self.computing.retain(|computing| *computing != request);
        self.release_if_over(request);
    }

    /// Starts prompts in order of arrival, while there are pages. One whose decode node is being reached, or whose chunks
    /// are on their way from slower tiers, does not hold up the others.
    fn admit(&mut self) {
        let now = self.outbound.clock.now();
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut no_room = false;
        while let Some(prompt) = waiting.pop_front() {
            if prompt.deadline <= now {
                let error = RequestError::Deadline("the prompt waited too long for prefill".into());
                self.fail(prompt.request, error);
            } else if no_room
                || prompt.decode.is_some_and(|decode| !self.outbound.is_linked(&decode))
                || prompt.awaits.is_some_and(|until| until > now)
            {
                self.waiting.push_back(prompt);
            } else if let Err(prompt) = self.start(prompt) {
                no_room = true;
                self.waiting.push_back(prompt);
            }
        }
    }

    fn start(&mut self, prompt: Box<Prompt>) -> Result<(), Box<Prompt>> {
        let kv = self.engine.info().kv;
        let tokens = prompt.tokens.len() as u32;
        let keys = prompt.reusable(kv.chunk_tokens);
        let mut pages = self.pool.match_prefix(keys);
        let in_pages = pages.len() as u32 * kv.page_tokens;
        let Some(fresh) = self.take(kv.pages(tokens) as usize - pages.len()) else {
            self.pool.release(&pages);
            return Err(prompt);
        };
        pages.extend(fresh);
        let pages: Arc<[PageId]> = pages.into();
        let request = prompt.request;
        let (there, rest) = keys.split_at((in_pages / kv.chunk_tokens) as usize);
        let loading = self.outbound.cache.as_mut().and_then(|cache| {
            cache.touch(there);
            let (now, first) = (self.outbound.clock.now(), ChunkIdx(there.len() as u32));
            cache.load(now, request, &pages, first, rest)
        });
        if let Some(decode) = prompt.decode {
            self.outbound.begin(&prompt, decode.node, Arc::clone(&pages), in_pages);
        }
        if loading.is_none() {
            self.computing.push_back(request);
        }
        let cached = CachedTokens { pages: in_pages, ..CachedTokens::default() };
        let running =
            Running { prompt, pages, computed: in_pages, cached, loading, unsaid: None, over: false };
        self.running.insert(request, running);
        Ok(())
    }

    /// Fresh pages. What waits to be saved gives way to them, if that is enough.
    fn take(&mut self, count: usize) -> Option<Vec<PageId>> {
        let available = self.pool.available();
        if let Some(cache) = &mut self.outbound.cache
            && available < count
            && available + cache.waiting_pages(&self.pool) >= count
        {
            cache.give_up_saves(self.outbound.clock.now());
            self.pool.release(&std::mem::take(&mut cache.packed_pages));
        }
        self.pool.take(count)
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
            shares.push(Share { request: *request, start, end, last: end == total, says: true });
        }
        self.choose_when_to_write(&mut shares);
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
                    for share in shares.iter().filter(|share| share.says) {
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
            outbound.begin_loads(pages);
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

    /// Between GPUs a prompt's KV is written as one burst at its last step, which is far longer than the link needs: a
    /// link in use takes power from a GPU at its limit, two or three percent of prefill's speed, for as long as layers
    /// trickle. On slower paths each layer goes when it is computed.
    fn choose_when_to_write(&mut self, shares: &mut [Share]) {
        let kv = self.engine.info().kv;
        for share in shares {
            let Some(running) = self.running.get_mut(&share.request) else { continue };
            let in_a_burst =
                running.prompt.decode.is_some_and(|decode| self.outbound.is_between_gpus(decode.node));
            share.says = share.last || !in_a_burst;
            if !share.says {
                running.unsaid.get_or_insert(share.start);
            } else if let Some(from) = running.unsaid.take() {
                for chunk in from / kv.chunk_tokens..share.start / kv.chunk_tokens {
                    self.outbound.chunk_ready(share.request, ChunkIdx(chunk));
                }
            }
        }
    }

    fn computed(&mut self, share: &Share, logits: Option<&[f32]>) {
        let kv = self.engine.info().kv;
        let Some(running) = self.running.get_mut(&share.request) else {
            return;
        };
        running.computed = share.end;
        let tenant = Cache::tenant(&running.prompt.salt);
        for chunk in share.start / kv.chunk_tokens..share.end / kv.chunk_tokens {
            let pages = &running.pages[kv.chunk_pages(ChunkIdx(chunk), share.end)];
            let key = running.prompt.keys[chunk as usize];
            self.pool.publish(key, pages);
            if let Some(cache) = &mut self.outbound.cache
                && cache.save(self.outbound.clock.now(), key, tenant, pages)
            {
                self.pool.share(pages);
            }
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
                let cached = running.cached;
                let cached_tokens = cached.total();
                tracing::debug!(request = %share.request, cached_tokens, "first token computed");
                self.reused.add(cached);
                let message = FirstTokens { request: share.request, tokens: tokens.clone(), cached };
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
            match running.loading {
                Some(load) => {
                    self.outbound.stop_load(load);
                    self.parked.insert(load, running.pages);
                }
                None => self.pool.release(&running.pages),
            }
        }
    }

    fn tell_load(&mut self) {
        let load = self.load();
        let waiting = self.waiting.iter().filter(|prompt| prompt.awaits.is_some()).count();
        self.board.show(Shown {
            router: self.outbound.router(),
            draining: self.outbound.is_draining(),
            load,
            handoffs: self.outbound.open_handoffs(),
            reused: self.reused,
            cache: self.outbound.cache.as_ref().map(|cache| CacheShown { waiting, ..cache.shown() }),
            ..Shown::default()
        });
        if load != self.told && self.outbound.try_tell_router(&Message::Load(load)) {
            self.told = load;
        }
    }
}
