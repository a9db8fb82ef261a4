//! Chunks on a disk: one directory, which one process owns.
//!
//! **Files.** The directory has segments, each with a *slab*, a preallocated file of entries of one size (chunks of one
//! shape have one), and an *index*, which says what each entry holds. Both are read and written in place, so the
//! directory is as large as its segments, which are made while the budget has room for another. When chunks of another
//! shape need room, the segment goes whose chunks were not used for longest.
//!
//! **What is guaranteed by what**, if the process is killed, the machine loses its power or the disk lies:
//! - *A chunk is found only when all of it is stored*: the body is written first, then the header in front of it, then
//!   its record in the index, each when the one before has been taken by the system. What the system has taken outlives
//!   the process.
//! - *No chunk is found under another's name*: before an entry is used again, its record says that it is empty and its
//!   header is blank. Records are checksummed with their place; a damaged one is replaced by what the header says. The
//!   header guards itself and names its chunk, and both are compared in every load, which reads header and body at once.
//! - *A body that is not what was stored is noticed by whoever uses it*, by the checksum of each layer in the header. It
//!   takes a disk that lies, or a machine that loses its power with writes that it did not finish: nothing is flushed,
//!   since what a cache loses is computed again, so they may have come about in any order.
//! - *Writes of a killed process do not hit its successor*: the kernel keeps the lock of a slab as long as writes to it
//!   are under way, and a successor waits for it.
//!
//! **Restart.** Indices are read whole: 64 bytes a chunk. Without a usable index, the headers of its slab are read. What
//! was used when is not written down: after a restart chunks go in the order in which they were stored. Pins are not
//! either.
//!
//! **I/O.** One thread decides, and has up to `depth` loads and as many stores under way, by io_uring, or by threads
//! where the kernel has none. Slabs are opened with `O_DIRECT` where the file system knows it, and chunks move straight
//! from and to the memory of calls, if it begins at a multiple of 4 KiB; else through copies, of which there are few.
//! Whoever calls cannot be answered while the kernel may use that memory: past the deadline the transfer is cancelled,
//! and what cannot be cancelled is waited for. All else is answered at the deadline. Who drops a tier does not wait for
//! a disk that hangs, but its thread and its locks stay as long as that does.

#[allow(unsafe_code)] // Memory of calls and operations becomes slices.
mod buffers;
mod core;
#[allow(unsafe_code)] // The kernel reads and writes it.
mod io;
mod lock;
#[allow(unsafe_code)] // As buffers: blocks of headers that are read.
mod segment;
#[cfg(test)]
mod tests;

pub use self::core::NAME;
use self::core::{Answer, Call, Core, Now, Settings};
use super::{Outcome, Ticket, Tier, TierError, Usage, Wake};
use crate::policy::PolicyKind;
use lock::Lock;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use tandem_memory::Extent;
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;

/// Pins that may wait for the tier's thread, which takes them in as soon as it runs.
const PINS: usize = 1 << 16;
/// The largest depth that is used.
const MAX_DEPTH: usize = 1024;
/// Transfers that threads have under way at most, where there is no io_uring.
const MAX_THREADS: usize = 32;

/// What a disk tier is to be.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Its directory, which is made if it is not there. Nothing else should be in it.
    pub dir: PathBuf,
    /// Bytes that its files may have, all together.
    pub budget_bytes: u64,
    /// Who goes when there is no room.
    pub policy: PolicyKind,
    /// How old a chunk may be that is found: as old as it likes if there is none. Counted in seconds.
    pub ttl: Option<Duration>,
    /// Loads that are under way at most, and stores: 1 to 1,024.
    pub depth: usize,
    /// Calls that are not answered at most.
    pub queue: usize,
    /// How long a call may take.
    pub deadline: Duration,
    /// How bytes are moved.
    pub io: DiskIo,
}

/// How bytes are moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DiskIo {
    /// By io_uring, or by threads if the kernel has none.
    #[default]
    Best,
    /// By io_uring.
    Uring,
    /// By threads that block.
    Threads,
}

impl DiskConfig {
    /// A tier of this budget in this directory, and for the rest what does well on NVMe.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, budget_bytes: u64) -> DiskConfig {
        DiskConfig {
            dir: dir.into(),
            budget_bytes,
            policy: PolicyKind::default(),
            ttl: None,
            // Enough to keep a disk busy with chunks of a megabyte; more only makes each take longer.
            depth: 32,
            queue: 1024,
            // A healthy disk that has all of the queue to do needs about a second.
            deadline: Duration::from_secs(5),
            io: DiskIo::Best,
        }
    }
}

/// Why a disk tier cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Someone else has the directory.
    #[error("{dir} belongs to {holder}: end it, or give this process a directory of its own")]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// The system refused something.
    #[error("the disk tier in {dir} cannot {what}: {source}")]
    System {
        /// The directory.
        dir: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// Chunks in a directory.
#[derive(Debug)]
pub struct DiskTier {
    shared: Arc<Shared>,
    settings: Settings,
    queue: usize,
    thread: Option<thread::JoinHandle<()>>,
    /// Closed when the thread is over.
    over: Mutex<Receiver<()>>,
}

struct Shared {
    calls: Mutex<VecDeque<Call>>,
    answers: Mutex<Vec<Answer>>,
    usage: Mutex<Usage>,
    /// Calls whose answer was not taken.
    under_way: AtomicUsize,
    /// There are answers that are not the thread's. It wakes the caller for them, who may hold anything while it calls.
    refused: AtomicBool,
    closed: AtomicBool,
    bell: Arc<OwnedFd>,
    wake: Wake,
}

impl DiskTier {
    /// Takes the directory, finds what it holds, and starts the tier's thread. Returns when it knows all chunks.
    ///
    /// # Errors
    /// When another process has the directory, or the system refuses it.
    pub fn open(config: &DiskConfig, wake: Wake) -> Result<DiskTier, DiskError> {
        DiskTier::open_with(config, wake, |bell| io_for(config, bell))
    }

    fn open_with(
        config: &DiskConfig,
        wake: Wake,
        io: impl FnOnce(&Arc<OwnedFd>) -> std::io::Result<Box<dyn io::Io>>,
    ) -> Result<DiskTier, DiskError> {
        let dir = config.dir.clone();
        let refused = |what| {
            let dir = dir.clone();
            move |source| DiskError::System { dir, what, source }
        };
        std::fs::create_dir_all(&dir).map_err(refused("make its directory"))?;
        let lock = Lock::take(&dir).map_err(refused("take its lock"))?;
        let lock = lock.map_err(|holder| DiskError::Locked { dir: dir.clone(), holder })?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = Arc::new(bell.map_err(|errno| refused("make an eventfd")(errno.into()))?);
        let settings = Settings {
            dir: dir.clone(),
            budget: config.budget_bytes,
            ttl_s: config.ttl.map(|ttl| u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX)),
            depth: depth(config),
            deadline: config.deadline,
            policy: config.policy,
        };
        let began = Instant::now();
        let io = io(&bell).map_err(refused("begin its I/O"))?;
        let (core, opened) = Core::open(settings.clone(), io).map_err(refused("read what it holds"))?;
        let usage = core.usage();
        tracing::info!(
            dir = %dir.display(),
            chunks = usage.chunks,
            bytes = usage.bytes,
            segments = opened.segments,
            headers_read = opened.scanned,
            ms = began.elapsed().as_millis() as u64,
            "the disk tier knows what it holds"
        );
        let shared = Arc::new(Shared {
            calls: Mutex::default(),
            answers: Mutex::default(),
            usage: Mutex::new(usage),
            under_way: AtomicUsize::new(0),
            refused: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            bell,
            wake,
        });
        // Nothing is ever sent: it is closed.
        let (alive, over) = sync_channel(0);
        let thread = thread::Builder::new().name("tier-disk".into());
        let theirs = Arc::clone(&shared);
        let thread =
            thread.spawn(move || work(core, &theirs, lock, alive)).map_err(refused("start its thread"))?;
        Ok(DiskTier { shared, settings, queue: config.queue, thread: Some(thread), over: Mutex::new(over) })
    }

    fn call(&mut self, ticket: Ticket, call: Call) {
        if self.shared.under_way.load(Ordering::Relaxed) >= self.queue {
            let busy = TierError::Busy { tier: NAME, limit: self.queue };
            self.shared.answers().push((ticket, Err(busy)));
            self.shared.refused.store(true, Ordering::Release);
            return self.shared.ring();
        }
        self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        self.shared.calls().push_back(call);
        self.shared.ring();
    }
}

/// Each load and each store that may be under way has 28 KiB of memory, so there is a bound to how many.
fn depth(config: &DiskConfig) -> usize {
    config.depth.clamp(1, MAX_DEPTH)
}

fn io_for(config: &DiskConfig, bell: &Arc<OwnedFd>) -> std::io::Result<Box<dyn io::Io>> {
    let depth = depth(config) * 2;
    let threads = || Ok(Box::new(io::Threads::new(depth.min(MAX_THREADS), bell)?) as Box<dyn io::Io>);
    match config.io {
        DiskIo::Threads => threads(),
        DiskIo::Uring => Ok(Box::new(io::Ring::new(depth, bell)?)),
        DiskIo::Best => match io::Ring::new(depth, bell) {
            Ok(ring) => Ok(Box::new(ring)),
            Err(error) => {
                tracing::warn!(%error, "the disk tier cannot have io_uring and uses threads");
                threads()
            }
        },
    }
}

impl Tier for DiskTier {
    fn name(&self) -> &'static str {
        NAME
    }

    fn find(&mut self, ticket: Ticket, keys: Arc<[ChunkKey]>) {
        self.call(ticket, Call::Find { ticket, keys });
    }

    fn store(&mut self, ticket: Ticket, header: Arc<ChunkHeader>, body: Extent) {
        self.call(ticket, Call::Store { ticket, header, body });
    }

    fn load(&mut self, ticket: Ticket, key: ChunkKey, body: Extent) {
        self.call(ticket, Call::Load { ticket, key, body });
    }

    fn remove(&mut self, ticket: Ticket, key: ChunkKey) {
        self.call(ticket, Call::Remove { ticket, key });
    }

    fn pin(&mut self, key: ChunkKey, pinned: bool) {
        let mut calls = self.shared.calls();
        if calls.len() >= self.queue + PINS {
            tracing::warn!(%key, "the disk tier has {PINS} pins to see to and takes no more");
            return;
        }
        calls.push_back(Call::Pin { key, pinned });
        drop(calls);
        self.shared.ring();
    }

    fn poll(&mut self, answers: &mut Vec<(Ticket, Result<Outcome, TierError>)>) {
        let taken = std::mem::take(&mut *self.shared.answers());
        let busy = taken.iter().filter(|(_, answer)| matches!(answer, Err(TierError::Busy { .. }))).count();
        self.shared.under_way.fetch_sub(taken.len() - busy, Ordering::Relaxed);
        answers.extend(taken);
    }

    fn usage(&self) -> Usage {
        let usage = *self.shared.usage.lock().expect("nobody panics with it");
        Usage { under_way: self.shared.under_way.load(Ordering::Relaxed) as u64, ..usage }
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.ring();
        // What has begun is over soon, or the disk hangs.
        let over = self.over.get_mut().expect("nobody panics with it");
        if over.recv_timeout(self.settings.deadline) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(dir = %self.settings.dir.display(), "the disk tier is closed while its disk hangs");
        } else if let Some(thread) = self.thread.take() {
            // If it panicked, it has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, VecDeque<Call>> {
        self.calls.lock().expect("nobody panics with it")
    }

    fn answers(&self) -> MutexGuard<'_, Vec<Answer>> {
        self.answers.lock().expect("nobody panics with it")
    }

    fn ring(&self) {
        // It fails only if the counter is full, and then the bell rings anyway.
        let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
    }

    /// Waits until the bell has rung since the last time, or for so long.
    fn wait(&self, longest: Option<Duration>) {
        let timeout = longest.and_then(|longest| Timespec::try_from(longest).ok());
        let mut bell = [PollFd::new(&*self.bell, PollFlags::IN)];
        // Whatever woke it, it looks at everything.
        let _ = rustix::event::poll(&mut bell, timeout.as_ref());
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({} calls under way)", self.under_way.load(Ordering::Relaxed))
    }
}

/// The tier's thread. It holds the lock as long as it may write.
fn work(mut core: Core, shared: &Shared, lock: Lock, alive: SyncSender<()>) {
    let began = Instant::now();
    let now = || {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Now { since: began.elapsed(), unix_s: u32::try_from(unix.as_secs()).unwrap_or(u32::MAX) }
    };
    loop {
        let calls = std::mem::take(&mut *shared.calls());
        for call in calls {
            core.call(now(), call);
        }
        let closed = shared.closed.load(Ordering::Acquire);
        if closed {
            core.close();
        }
        core.run(now());
        *shared.usage.lock().expect("nobody panics with it") = core.usage();
        let answers = core.answers();
        let refused = shared.refused.swap(false, Ordering::AcqRel);
        if !answers.is_empty() || refused {
            shared.answers().extend(answers);
            (shared.wake)();
        }
        if closed && core.is_idle() {
            break;
        }
        let since = began.elapsed();
        shared.wait(core.next_timeout().map(|at| at.saturating_sub(since)));
    }
    // Files are closed before another process may have the directory.
    drop(core);
    drop(lock);
    drop(alive);
}
