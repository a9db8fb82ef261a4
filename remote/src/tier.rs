//! The tier: calls, their turns, deadlines and answers.

use crate::breaker::{Breaker, Pass};
use crate::landing::{Landing, Misfit};
use crate::lent::{Lent, Room};
use crate::place::{Fault, Place};
use crate::url::StoreUrl;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tandem_kv_store::tier::{Outcome, Ticket, Tier, TierError, Usage, Wake};
use tandem_memory::Extent;
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout_at};

const NAME: &str = "remote";
/// How long a call waits after its first failure before it tries again; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long the end of the tier waits for its threads, which may be in the middle of a copy.
const FAREWELL: Duration = Duration::from_secs(2);
/// Threads for calls of the system that block: files, names of hosts.
const BLOCKING: usize = 16;

/// How a remote store is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteConfig {
    /// Which store.
    pub url: StoreUrl,
    /// How long a call may take, its turn and its repetitions included. What takes longer is slower than computing.
    pub deadline: Duration,
    /// Calls that may be under way. Each holds a chunk's memory.
    pub queue: usize,
    /// Calls that find, load or remove at once; a store of objects has up to four connections for each.
    pub loads: NonZeroUsize,
    /// Calls that store at once. Apart from loads, which somebody waits for.
    pub stores: NonZeroUsize,
    /// Threads that move bytes. One copies some 3 GB/s.
    pub threads: NonZeroUsize,
}

impl RemoteConfig {
    /// The store at this URL, used as most are.
    #[must_use]
    pub fn new(url: StoreUrl) -> RemoteConfig {
        let number = |number| NonZeroUsize::new(number).expect("not zero");
        RemoteConfig {
            url,
            deadline: Duration::from_secs(5),
            queue: 256,
            loads: number(8),
            stores: number(4),
            threads: number(2),
        }
    }
}

/// Why a remote store cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// What it is given makes no sense.
    #[error("the remote store {url} cannot be used: {reason}")]
    Refused {
        /// The store.
        url: String,
        /// Why not.
        reason: String,
    },
    /// There are no threads.
    #[error("no threads for the remote store {url}: {source}")]
    Threads {
        /// The store.
        url: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Chunks in a remote store.
pub struct Remote {
    shared: Arc<Shared>,
    /// None while it is being dropped.
    runtime: Option<Runtime>,
}

struct Shared {
    place: Place,
    config: RemoteConfig,
    loads: Lane,
    stores: Lane,
    wake: Wake,
    /// Whether a thread is about to wake the caller for refusals.
    waking: AtomicBool,
    answers: Mutex<Vec<Answer>>,
    under_way: AtomicU64,
    damaged: AtomicU64,
}

type Answer = (Ticket, Result<Outcome, TierError>);

/// Calls that share turns, and are all left alone when some fail. Two, so that a store that takes nothing more still
/// gives, and that storing delays no load.
struct Lane {
    turns: Semaphore,
    breaker: Mutex<Breaker>,
}

impl Lane {
    fn new(turns: NonZeroUsize) -> Lane {
        Lane { turns: Semaphore::new(turns.get()), breaker: Mutex::default() }
    }

    fn breaker(&self) -> std::sync::MutexGuard<'_, Breaker> {
        self.breaker.lock().expect("nobody panics with it")
    }
}

enum Job {
    /// With how many are found, which outlives a try that fails.
    Find(Arc<[ChunkKey]>, usize),
    Store(ChunkKey, Vec<u8>, Lent),
    Load(Landing),
    Remove(ChunkKey),
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Job::Find(keys, _) => write!(f, "find {} chunks in", keys.len()),
            Job::Store(key, ..) => write!(f, "store chunk {key} in"),
            Job::Load(landing) => write!(f, "load chunk {} from", landing.key()),
            Job::Remove(key) => write!(f, "remove chunk {key} from"),
        }
    }
}

impl Remote {
    /// Uses a store. Whether it is there shows when it is called.
    ///
    /// # Errors
    /// When the URL cannot be used, or there are no threads.
    pub fn open(config: RemoteConfig, wake: Wake) -> Result<Remote, OpenError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.threads.get())
            .max_blocking_threads(BLOCKING)
            .thread_name("remote-store")
            .enable_io()
            .enable_time()
            .build()
            .map_err(|source| OpenError::Threads { url: config.url.to_string(), source })?;
        let place = {
            let _entered = runtime.enter();
            Place::open(&config.url)?
        };
        let shared = Arc::new(Shared {
            place,
            loads: Lane::new(config.loads),
            stores: Lane::new(config.stores),
            config,
            wake,
            waking: AtomicBool::new(false),
            answers: Mutex::default(),
            under_way: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        });
        let tidying = Arc::clone(&shared);
        runtime.spawn(async move { tidying.place.tidy().await });
        Ok(Remote { shared, runtime: Some(runtime) })
    }

    fn begin(&self, ticket: Ticket, job: Job) {
        let shared = &self.shared;
        let limit = shared.config.queue;
        if shared.under_way.load(Ordering::Relaxed) >= limit as u64 {
            drop(job);
            return self.refuse(ticket, TierError::Busy { tier: NAME, limit });
        }
        let begun = Instant::now();
        let left_alone = shared.lane(&job).breaker().left(begun);
        if let Some(left) = left_alone {
            let error = shared.left_alone(&job, left);
            drop(job);
            return self.refuse(ticket, error);
        }
        shared.under_way.fetch_add(1, Ordering::Relaxed);
        let owed = Owed { shared: Arc::clone(shared), ticket, answered: false };
        let runtime = self.runtime.as_ref().expect("it is there until the tier is dropped");
        runtime.spawn(async move {
            // The chunk's memory is let go before the answer (contract point 2), also if this is dropped half way.
            let owed = owed;
            let mut job = job;
            let answer = owed.shared.run(ticket, &mut job, begun.into()).await;
            drop(job);
            owed.answer(answer);
        });
    }

    /// Answers a call that is not begun. Its caller is in the middle of calling, so a thread of the tier wakes it.
    fn refuse(&self, ticket: Ticket, error: TierError) {
        let shared = Arc::clone(&self.shared);
        shared.answers.lock().expect("nobody panics with it").push((ticket, Err(error)));
        if !shared.waking.swap(true, Ordering::SeqCst) {
            let runtime = self.runtime.as_ref().expect("it is there until the tier is dropped");
            runtime.spawn(async move {
                shared.waking.store(false, Ordering::SeqCst);
                (shared.wake)();
            });
        }
    }
}

impl Shared {
    fn lane(&self, job: &Job) -> &Lane {
        match job {
            Job::Store(..) => &self.stores,
            Job::Find(..) | Job::Load(_) | Job::Remove(_) => &self.loads,
        }
    }

    /// Does a call, from waiting for its turn to its answer.
    async fn run(
        &self,
        ticket: Ticket,
        job: &mut Job,
        begun: tokio::time::Instant,
    ) -> Result<Outcome, TierError> {
        let until = begun + self.config.deadline;
        let lane = self.lane(job);
        let Ok(turn) = timeout_at(until, lane.turns.acquire()).await else {
            let reason = format!("its turn did not come in {:?}", self.config.deadline);
            return Err(self.failed(job, &reason));
        };
        let _turn = turn.expect("turns are never closed");
        let passed = lane.breaker().pass(Instant::now());
        let pass = passed.map_err(|left| self.left_alone(job, left))?;
        let fault = match self.tries(ticket, job, until).await {
            Ok(outcome) => {
                self.worked(lane);
                return Ok(outcome);
            }
            Err(fault) => fault,
        };
        match fault {
            Fault::Absent => {
                self.worked(lane);
                Err(TierError::Absent { tier: NAME })
            }
            Fault::Misfit(misfit) => {
                self.worked(lane);
                Err(self.misfit(job, misfit))
            }
            Fault::Failed { reason, passing: _ } => {
                let error = self.failed(job, &reason);
                self.broke(lane, pass, &error);
                Err(error)
            }
        }
    }

    /// Tries until it is decided or the time is over.
    async fn tries(
        &self,
        ticket: Ticket,
        job: &mut Job,
        until: tokio::time::Instant,
    ) -> Result<Outcome, Fault> {
        let mut pause = FIRST_PAUSE;
        let mut before = String::new();
        loop {
            let reason = match timeout_at(until, self.once(job)).await {
                Ok(Err(Fault::Failed { reason, passing: true })) => reason,
                Ok(decided) => return decided,
                Err(_) => {
                    if let Job::Find(_, found @ 1..) = job {
                        return Ok(Outcome::Found(*found));
                    }
                    let reason = format!("no answer within {:?}{before}", self.config.deadline);
                    return Err(Fault::failed(reason, true));
                }
            };
            // Not all at once, when all have failed at once.
            let wait = pause + pause.mul_f64((ticket.0 % 16) as f64 / 16.0);
            if tokio::time::Instant::now() + wait >= until {
                return Err(Fault::failed(reason, true));
            }
            sleep(wait).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            before = format!(", before that: {reason}");
        }
    }

    async fn once(&self, job: &mut Job) -> Result<Outcome, Fault> {
        match job {
            Job::Find(keys, found) => {
                self.place.find(keys, found).await?;
                Ok(Outcome::Found(*found))
            }
            Job::Store(key, header, body) => {
                self.place.put(*key, header, body).await?;
                Ok(Outcome::Stored)
            }
            Job::Load(landing) => {
                landing.restart();
                self.place.get(landing).await?;
                Ok(Outcome::Loaded(landing.finish()?))
            }
            Job::Remove(key) => {
                self.place.delete(*key).await?;
                Ok(Outcome::Removed)
            }
        }
    }

    fn worked(&self, lane: &Lane) {
        if lane.breaker().worked() {
            tracing::info!(store = %self.config.url, "the remote store works again");
        }
    }

    fn broke(&self, lane: &Lane, pass: Pass, error: &TierError) {
        let opened = lane.breaker().failed(pass, Instant::now());
        if let Some(pause) = opened {
            tracing::warn!("{error}; it is left alone for {pause:?}, and longer while it does not work");
        }
    }

    fn failed(&self, job: &Job, reason: &str) -> TierError {
        TierError::Failed { tier: NAME, reason: format!("cannot {job} {}: {reason}", self.config.url) }
    }

    fn left_alone(&self, job: &Job, left: Duration) -> TierError {
        self.failed(job, &format!("it failed and is left alone for another {} ms", left.as_millis()))
    }

    fn misfit(&self, job: &Job, misfit: Misfit) -> TierError {
        match (misfit, job) {
            (Misfit::Damaged(reason), Job::Load(landing)) => {
                self.damaged.fetch_add(1, Ordering::Relaxed);
                let reason = format!("in {}: {reason}", self.config.url);
                TierError::Damaged { tier: NAME, key: landing.key(), reason }
            }
            (Misfit::Damaged(reason) | Misfit::Length(reason), _) => self.failed(job, &reason),
        }
    }
}

/// A call that is to be answered. If nobody does, because its thread is gone, it answers by itself.
struct Owed {
    shared: Arc<Shared>,
    ticket: Ticket,
    answered: bool,
}

impl Owed {
    fn answer(mut self, answer: Result<Outcome, TierError>) {
        self.tell(answer);
    }

    fn tell(&mut self, answer: Result<Outcome, TierError>) {
        self.answered = true;
        // Before the answer: who has seen all answers sees nothing under way.
        self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
        self.shared.answers.lock().expect("nobody panics with it").push((self.ticket, answer));
        (self.shared.wake)();
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if !self.answered {
            let reason = format!("a call to {} was given up", self.shared.config.url);
            self.tell(Err(TierError::Failed { tier: NAME, reason }));
        }
    }
}

impl Tier for Remote {
    fn name(&self) -> &'static str {
        NAME
    }

    fn find(&mut self, ticket: Ticket, keys: Arc<[ChunkKey]>) {
        self.begin(ticket, Job::Find(keys, 0));
    }

    fn store(&mut self, ticket: Ticket, header: Arc<ChunkHeader>, body: Extent) {
        let (key, given, needed) = (header.key, body.len(), header.body_bytes());
        let job = Job::Store(key, header.encode(), Lent::new(body));
        if given == needed {
            return self.begin(ticket, job);
        }
        let error = self.shared.failed(&job, &format!("it has {needed} packed bytes, not {given}"));
        drop(job);
        self.refuse(ticket, error);
    }

    fn load(&mut self, ticket: Ticket, key: ChunkKey, body: Extent) {
        self.begin(ticket, Job::Load(Landing::new(key, Room::new(body))));
    }

    fn remove(&mut self, ticket: Ticket, key: ChunkKey) {
        self.begin(ticket, Job::Remove(key));
    }

    /// Does nothing: how long a store keeps a chunk is its own business.
    fn pin(&mut self, _key: ChunkKey, _pinned: bool) {}

    fn poll(&mut self, answers: &mut Vec<Answer>) {
        answers.append(&mut self.shared.answers.lock().expect("nobody panics with it"));
    }

    /// A store does not tell how much it holds, and others fill it too: chunks, bytes and budget are 0.
    fn usage(&self) -> Usage {
        Usage {
            under_way: self.shared.under_way.load(Ordering::Relaxed),
            damaged: self.shared.damaged.load(Ordering::Relaxed),
            ..Usage::default()
        }
    }
}

impl Drop for Remote {
    /// Calls that are under way end, and have let go of their memory then.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(FAREWELL);
        }
    }
}
