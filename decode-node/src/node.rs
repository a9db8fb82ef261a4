//! The node's loop: gives pages to prompts that arrive, generates from all that have, a token each a step.

use crate::completion::Completion;
use crate::inbound::{Arrival, Inbound};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tandem_engine::{Engine, Sequence};
use tandem_kernels::{Kernels, Paged};
use tandem_kv_store::PagePool;
use tandem_node::{Board, Next, Shown};
use tandem_proto::ids::{ChoiceIdx, NodeId, PageId, RequestId, Time};
use tandem_proto::wire::{Expect, Load, Message, RequestError, Sampled};

/// Limits of the loop.
pub struct Limits {
    /// Requests that may be expected or generated; more are refused.
    pub max_requests: usize,
    /// Completions computed in one step.
    pub max_batch: usize,
}

/// A decode node.
pub struct Node<E: Engine, K: Kernels<Pages = E::Pages>> {
    engine: E,
    kv: E::Pages,
    pool: PagePool,
    inbound: Inbound<K>,
    limits: Limits,
    requests: BTreeMap<RequestId, Request>,
    /// Requests whose KV was offered and that wait for pages, first come first served.
    waiting: VecDeque<RequestId>,
    /// Pages of requests that are over, and to which layers are still being scattered.
    parked: Vec<(RequestId, Vec<PageId>)>,
    /// Requests that were cancelled before they came: cancels travel in a lane of their own.
    cancelled_early: VecDeque<RequestId>,
    /// Where the next step begins, when not all completions fit one.
    turn: usize,
    told: Load,
    board: Arc<Board>,
}

/// How many early cancels are remembered.
const MAX_CANCELLED_EARLY: usize = 1024;

struct Request {
    expect: Expect,
    router: NodeId,
    /// When the last token must be out.
    deadline: Time,
    /// Everything the request will ever need is taken at once, so that no completion stops for lack of pages.
    pages: Vec<PageId>,
    completions: Vec<Completion>,
    /// A token of this node's has been told.
    told_first: bool,
}

/// What came of telling the router.
struct Told {
    /// Nothing waits for room in its queue.
    all: bool,
    /// Requests were over and gave their pages back.
    freed: bool,
}

impl Request {
    fn prompt_tokens(&self) -> u32 {
        self.expect.prompt.len() as u32
    }
}

impl<E: Engine, K: Kernels<Pages = E::Pages>> Node<E, K> {
    /// A node with an empty pool.
    #[must_use]
    pub fn new(engine: E, kv: E::Pages, inbound: Inbound<K>, limits: Limits) -> Node<E, K> {
        let pool = PagePool::new(kv.pages());
        Node {
            engine,
            kv,
            pool,
            inbound,
            limits,
            requests: BTreeMap::new(),
            waiting: VecDeque::new(),
            parked: Vec::new(),
            cancelled_early: VecDeque::new(),
            turn: 0,
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
                Next::Wait(until) => self.inbound.wait(until),
                Next::Finished => return self.inbound.failed(),
            }
        }
    }

    /// One turn: takes in what happened, and generates one token for every completion.
    pub fn turn(&mut self) -> Next {
        self.inbound.turn(&mut self.kv);
        self.take_arrivals();
        if self.inbound.stopped {
            return Next::Finished;
        }
        self.release_parked();
        self.reserve();
        self.end_late();
        self.tell_load();
        let mut completions = self.requests.values().flat_map(|request| &request.completions);
        let generating = completions.any(|completion| !completion.is_finished());
        if generating {
            self.step();
        }
        let told = self.tell_tokens();
        // Pages that were just freed may be what somebody waits for.
        let can_reserve = told.freed && !self.waiting.is_empty();
        if generating || can_reserve || self.inbound.has_news() {
            Next::Again
        } else if self.inbound.is_draining() && self.requests.is_empty() && self.inbound.open_handoffs() == 0
        {
            Next::Finished
        } else {
            // A router whose queue is full is tried again soon.
            let again = (!told.all).then(|| self.inbound.clock.now().after_us(1000));
            let deadlines = self.requests.values().map(|request| request.deadline);
            Next::Wait(deadlines.chain(again).chain(self.inbound.next_deadline()).min())
        }
    }

    /// What the node holds: for those who check that nothing leaks.
    #[must_use]
    pub fn load(&self) -> Load {
        let (slots, free_slots) = self.inbound.slots();
        let generating = self.requests.values().filter(|request| !request.completions.is_empty()).count();
        Load {
            running: generating as u32,
            waiting: (self.requests.len() - generating) as u32,
            pages: self.pool.pages() as u32,
            free_pages: self.pool.available() as u32,
            slots: slots as u32,
            free_slots: free_slots as u32,
        }
    }

    /// Handoffs that are not over; windows that are open, and layers that are being scattered.
    #[must_use]
    pub fn under_way(&self) -> (usize, usize) {
        (self.inbound.open_handoffs(), self.inbound.open_windows() + self.inbound.scattering())
    }

    fn take_arrivals(&mut self) {
        while let Some(arrival) = self.inbound.arrived.pop_front() {
            match arrival {
                Arrival::Expected(expect, router) => self.expect(*expect, router),
                Arrival::Cancelled(request) => self.cancel(request),
                Arrival::RouterLost(router) => {
                    let lost = self.requests.iter().filter(|(_, request)| request.router == router);
                    for request in lost.map(|(id, _)| *id).collect::<Vec<_>>() {
                        self.cancel(request);
                    }
                }
                Arrival::Reserve(request) => self.waiting.push_back(request),
                Arrival::Ready(request, first) => self.start(request, first),
                Arrival::Dropped(request, error) => {
                    self.free(request);
                    if let Some(error) = error {
                        self.fail(request, error);
                    }
                }
            }
        }
    }

    fn expect(&mut self, expect: Expect, router: NodeId) {
        let id = expect.request;
        if let Some(at) = self.cancelled_early.iter().position(|request| *request == id) {
            self.cancelled_early.remove(at);
            return;
        }
        let now = self.inbound.clock.now();
        let deadline = now.after_us(u64::from(expect.generation_timeout_ms) * 1000);
        let handoff_deadline = now.after_us(u64::from(expect.handoff_timeout_ms) * 1000);
        let request = Request {
            expect,
            router,
            deadline,
            pages: Vec::new(),
            completions: Vec::new(),
            told_first: false,
        };
        let info = self.engine.info();
        let need = self.pages_needed(&request);
        let refusal = if request.prompt_tokens() > info.max_positions {
            let (tokens, room) = (request.prompt_tokens(), info.max_positions);
            Some(RequestError::Invalid(format!("the prompt has {tokens} tokens, the model holds {room}")))
        } else if need > self.pool.pages() {
            let room = self.pool.pages();
            Some(RequestError::Invalid(format!("the request needs {need} KV pages, this node has {room}")))
        } else if self.requests.len() >= self.limits.max_requests {
            Some(RequestError::Busy(format!("{} requests are on the decode node", self.requests.len())))
        } else if self.inbound.is_draining() {
            Some(RequestError::Busy("the decode node is draining".into()))
        } else {
            None
        };
        if let Some(error) = refusal {
            self.fail(id, error);
            return;
        }
        self.inbound.expect(&request.expect, handoff_deadline);
        self.requests.insert(id, request);
    }

    /// The most tokens a completion may have: what was asked for, within the model's positions.
    fn max_tokens(&self, request: &Request) -> u32 {
        let room =
            self.engine.info().max_positions - request.prompt_tokens().min(self.engine.info().max_positions);
        // The last token needs no KV, so one more than there are positions left.
        request.expect.generation.max_tokens.min(room + 1)
    }

    /// Pages of the prompt, and those of each completion. The last token generated never needs KV.
    fn pages_needed(&self, request: &Request) -> usize {
        let kv = self.engine.info().kv;
        let whole = (request.prompt_tokens() / kv.page_tokens) as usize;
        let each = self.pages_of_completion(request) - whole;
        whole + each * request.expect.generation.choices as usize
    }

    fn pages_of_completion(&self, request: &Request) -> usize {
        let tokens = request.prompt_tokens() + self.max_tokens(request) - 1;
        self.engine.info().kv.pages(tokens) as usize
    }

    /// Gives pages to the requests that wait for them, in order.
    fn reserve(&mut self) {
        while let Some(id) = self.waiting.front().copied() {
            let Some(request) = self.requests.get(&id) else {
                self.waiting.pop_front();
                continue;
            };
            let Some(pages) = self.pool.take(self.pages_needed(request)) else {
                return;
            };
            self.waiting.pop_front();
            let prompt_pages = self.engine.info().kv.pages(request.prompt_tokens()) as usize;
            self.inbound.reserved(id, pages[..prompt_pages].to_vec());
            self.requests.get_mut(&id).expect("just found").pages = pages;
            self.inbound.turn(&mut self.kv);
        }
    }

    /// The prompt is there: every completion gets its page table. They share the prompt's whole pages, and
    /// each has a copy of the page that the prompt leaves half filled.
    fn start(&mut self, id: RequestId, first: Vec<Sampled>) {
        let Some(request) = self.requests.get(&id) else {
            return;
        };
        let generation = &request.expect.generation;
        if first.len() != generation.choices as usize {
            let error = format!("{} first tokens came for {} completions", first.len(), generation.choices);
            self.free(id);
            self.fail(id, RequestError::Internal(error));
            return;
        }
        let kv = self.engine.info().kv;
        let whole = (request.prompt_tokens() / kv.page_tokens) as usize;
        let half_filled = !request.prompt_tokens().is_multiple_of(kv.page_tokens);
        let own = self.pages_of_completion(request) - whole;
        let (prompt, max_tokens) = (&request.expect.prompt, self.max_tokens(request));
        let mut completions = Vec::new();
        for (choice, first) in first.into_iter().enumerate() {
            let mut pages = request.pages[..whole].to_vec();
            let mine = whole + choice * own;
            pages.extend_from_slice(&request.pages[mine..mine + own]);
            if half_filled
                && choice > 0
                && let Err(error) = self.kv.copy_page(request.pages[whole], pages[whole])
            {
                self.free(id);
                self.fail(id, RequestError::Internal(error.to_string()));
                return;
            }
            let choice = ChoiceIdx(choice as u32);
            match Completion::start(choice, prompt, generation, max_tokens, pages, first) {
                Ok(completion) => completions.push(completion),
                Err(error) => {
                    self.free(id);
                    self.fail(id, RequestError::Invalid(error.to_string()));
                    return;
                }
            }
        }
        self.requests.get_mut(&id).expect("just found").completions = completions;
    }

    /// One token more for every completion that is not finished, or for as many as a step takes.
    fn step(&mut self) {
        let mut running: Vec<(RequestId, usize)> = Vec::new();
        for (id, request) in &self.requests {
            let unfinished = request.completions.iter().enumerate().filter(|(_, c)| !c.is_finished());
            running.extend(unfinished.map(|(at, _)| (*id, at)));
        }
        if running.len() > self.limits.max_batch {
            let turn = self.turn % running.len();
            running.rotate_left(turn);
            running.truncate(self.limits.max_batch);
            self.turn = turn + self.limits.max_batch;
        }
        let batch: Vec<_> = running
            .iter()
            .map(|(id, at)| {
                let completion = &self.requests[id].completions[*at];
                let (token, position) = completion.next();
                let tokens = std::slice::from_ref(token);
                Sequence { tokens, start: position, pages: &completion.pages, logits: true }
            })
            .collect();
        match self.engine.step(&batch, &mut self.kv, &mut |_, _| {}) {
            Ok(mut logits) => {
                let mut failed = Vec::new();
                for ((id, at), row) in running.into_iter().zip(logits.rows_mut()) {
                    let request = self.requests.get_mut(&id).expect("it was in the batch");
                    if let Err(error) = request.completions[at].choose(row) {
                        failed.push((id, RequestError::Internal(error.to_string())));
                    }
                }
                for (id, error) in failed {
                    self.free(id);
                    self.fail(id, error);
                }
            }
            Err(error) => {
                for (id, _) in running {
                    if self.requests.contains_key(&id) {
                        self.free(id);
                        self.fail(id, RequestError::Internal(error.to_string()));
                    }
                }
            }
        }
    }

    /// Tells the router what is new, and frees requests of which it knows all.
    fn tell_tokens(&mut self) -> Told {
        let (mut done, mut all) = (Vec::new(), true);
        'requests: for (id, request) in &mut self.requests {
            for completion in &mut request.completions {
                if let Some(tokens) = completion.news(*id) {
                    if !self.inbound.try_tell_router(&Message::Tokens(tokens)) {
                        all = false;
                        break 'requests;
                    }
                    completion.told();
                    if !std::mem::replace(&mut request.told_first, true) {
                        tracing::debug!(request = %id, "first token decoded");
                    }
                }
            }
            if !request.completions.is_empty() && request.completions.iter().all(Completion::is_finished) {
                done.push(*id);
            }
        }
        for id in &done {
            tracing::debug!(request = %id, "generated");
            self.free(*id);
        }
        Told { all, freed: !done.is_empty() }
    }

    fn end_late(&mut self) {
        let now = self.inbound.clock.now();
        let late: Vec<_> =
            self.requests.iter().filter(|(_, request)| request.deadline <= now).map(|(id, _)| *id).collect();
        for id in late {
            self.end(id);
            self.fail(id, RequestError::Deadline("the generation took too long".into()));
        }
    }

    fn cancel(&mut self, id: RequestId) {
        if self.requests.contains_key(&id) {
            self.end(id);
        } else {
            self.cancelled_early.push_front(id);
            self.cancelled_early.truncate(MAX_CANCELLED_EARLY);
        }
    }

    /// Ends a request in whatever state it is. The handoff's own `Dropped` finds nothing left to free.
    fn end(&mut self, id: RequestId) {
        self.inbound.give_up(id, None);
        self.inbound.turn(&mut self.kv);
        self.free(id);
    }

    fn free(&mut self, id: RequestId) {
        if let Some(request) = self.requests.remove(&id) {
            self.parked.push((id, request.pages));
            self.release_parked();
        }
    }

    /// Gives back pages to which nothing is scattered any more.
    fn release_parked(&mut self) {
        for (_, pages) in self.parked.extract_if(.., |(id, _)| !self.inbound.is_scattering(*id)) {
            self.pool.release(&pages);
        }
    }

    fn fail(&mut self, request: RequestId, error: RequestError) {
        tracing::info!(%request, %error, "request failed");
        self.inbound.tell_router(Message::Failed { request, error });
    }

    fn tell_load(&mut self) {
        let load = self.load();
        let received = self.inbound.received();
        self.board.show(Shown {
            router: self.inbound.router(),
            draining: self.inbound.is_draining(),
            load,
            handoffs: self.inbound.open_handoffs(),
            chunks_verified: received.verified,
            checksum_mismatches: received.corrupt,
            stale_writes: received.stale,
            ..Shown::default()
        });
        if load != self.told && self.inbound.try_tell_router(&Message::Load(load)) {
            self.told = load;
        }
    }
}
