//! What is open to the peer: the windows of this node that it has asked for, and how its right to write them is
//! given and taken back.

use super::lane::{Kind, Lane, WINDOW_WORK, lock};
use super::verbs::{MemoryRegion, MemoryWindow, VerbsError, Work};
use crate::window::{Keeper, Landing};
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long closing a window waits for a device before it stops the lane, which needs no waiting. A device takes
/// microseconds.
const PATIENCE: Duration = Duration::from_millis(100);

/// The windows of this node that its peer can write on one lane.
#[derive(Default)]
pub(super) struct Grants {
    /// By the key of the window. At most as many as windows are open.
    open: BTreeMap<u64, Grant>,
    /// Memory windows that are bound to nothing, by queue pair for bytes.
    spare: Vec<Vec<MemoryWindow>>,
    /// Bindings that are under way on each queue pair, as all get the same.
    binding: u32,
    /// When the oldest of them was posted, or one before it ended.
    binding_since: Option<Instant>,
    /// By their number: queue pairs that have not invalidated.
    invalidating: BTreeMap<u32, usize>,
    /// Keys that the peer is to be told to forget. At most as many as windows were open.
    closed: Vec<u64>,
    next_number: u32,
}

/// One window that is open to the peer.
struct Grant {
    phase: Phase,
    /// Where the window begins, and its keys by queue pair for bytes.
    base: u64,
    keys: Vec<u32>,
    /// By queue pair for bytes; empty if the window is registered by itself.
    windows: Vec<MemoryWindow>,
    /// What the memory windows are bound to; or the window's own registrations, one for each device, which end with
    /// this: then nothing lands by their keys any more.
    _regions: Vec<Arc<MemoryRegion>>,
    /// Whether its bytes land in the twin of the region.
    on_twin: bool,
    /// Writes that were announced and have not landed.
    under_way: usize,
    /// Writes that have asked and were not answered.
    asked: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Its memory is being registered.
    Opening,
    /// Closed meanwhile.
    Closed,
    /// So many queue pairs have not bound it yet. The number names the bindings.
    Binding {
        number: u32,
        left: usize,
    },
    Open,
}

/// What the peer is told. They hold until the window closes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Keys {
    pub(super) base: u64,
    pub(super) keys: Vec<u32>,
}

/// The answer to one that asks.
pub(super) enum Granted {
    Now(Keys),
    /// Once the bindings are done.
    Later,
    /// The window is closed.
    Refused,
}

impl Lane {
    /// Opens a window to the peer for the write of this sequence number.
    pub(super) fn grant(self: &Arc<Self>, landing: &Landing, sequence: u64) -> Result<Granted, VerbsError> {
        let key = landing.key();
        {
            let mut grants = lock(&self.grants);
            if let Some(grant) = grants.open.get_mut(&key) {
                return Ok(grant.ask(sequence));
            }
            grants.open.insert(key, Grant::opening());
        }
        // Closing finds it from here on; the window may have been closed before.
        let keeper = Arc::downgrade(self);
        if !landing.keep(keeper) {
            lock(&self.grants).open.remove(&key);
            return Ok(Granted::Refused);
        }
        let outcome = self.bind(landing, sequence);
        if outcome.is_err() {
            lock(&self.grants).open.remove(&key);
        }
        outcome
    }

    /// Lets the queue pairs write a window that is being opened.
    fn bind(&self, landing: &Landing, sequence: u64) -> Result<Granted, VerbsError> {
        let (key, extent) = (landing.key(), landing.extent());
        let range = extent.offset()..extent.offset() + extent.len();
        let data = &self.pairs[1..];
        // Registers what is not, without a lock: it takes a while.
        let registered = self.registry.region(extent.region())?;
        let mut regions: Vec<Arc<MemoryRegion>> = Vec::new();
        let mut windows = Vec::new();
        if registered.windows {
            for pair in data {
                regions.push(registered.with(pair.queue.device())?);
            }
            let mut spare = std::mem::take(&mut lock(&self.grants).spare);
            spare.resize_with(data.len(), Vec::new);
            for (pair, spare) in data.iter().zip(&mut spare) {
                windows.push(spare.pop().map_or_else(|| MemoryWindow::new(pair.queue.device()), Ok)?);
            }
            lock(&self.grants).give_back(spare);
        } else {
            for pair in data {
                let device = pair.queue.device();
                let known = regions.iter().find(|region| Arc::ptr_eq(region.device(), device));
                regions.push(
                    known
                        .map_or_else(|| registered.part(device, range.clone()), |own| Ok(Arc::clone(own)))?,
                );
            }
        }
        let mut guard = lock(&self.grants);
        let grants = &mut *guard;
        let number = grants.number();
        let Some(grant) = grants.open.get_mut(&key).filter(|grant| grant.phase == Phase::Opening) else {
            grants.open.remove(&key);
            return Ok(Granted::Refused);
        };
        // The same address on every device: it is the memory's own.
        grant.base = regions.first().and_then(|region| region.address_of(&range)).unwrap_or(0);
        grant.on_twin = registered.is_on_twin();
        if registered.windows {
            if grants.binding >= WINDOW_WORK {
                return Err(too_many(self));
            }
            // Under the lock: whoever closes the window invalidates after this.
            grant.keys = windows.iter_mut().map(MemoryWindow::next_key).collect();
            for ((pair, window), region) in data.iter().zip(&windows).zip(&regions) {
                let work = Work::Bind { window, region, range: range.clone() };
                pair.queue.post(Kind::Bind.id(number), &[work])?;
            }
            grants.binding += 1;
            grants.binding_since.get_or_insert_with(Instant::now);
            grant.windows = windows;
            grant.phase = Phase::Binding { number, left: data.len() };
        } else {
            grant.keys = regions.iter().map(|region| region.remote_key()).collect();
            grant.phase = Phase::Open;
        }
        grant._regions = regions;
        Ok(grant.ask(sequence))
    }

    /// A queue pair has bound: the writes that can be answered now, when it was the last.
    pub(super) fn bound(&self, number: u32) -> Vec<(u64, u64, Keys)> {
        let mut grants = lock(&self.grants);
        let mut answers = Vec::new();
        let mut done = false;
        // Closed windows have none; then their number is counted by the invalidation behind the binding.
        for (key, grant) in &mut grants.open {
            if let Phase::Binding { number: at, left } = &mut grant.phase
                && *at == number
            {
                *left -= 1;
                if *left == 0 {
                    done = true;
                    grant.phase = Phase::Open;
                    let asked = std::mem::take(&mut grant.asked);
                    answers.extend(asked.into_iter().map(|sequence| (sequence, *key, grant.keys())));
                }
            }
        }
        if done {
            grants.has_bound();
        }
        answers
    }

    /// Since when there are bindings of which none has ended.
    pub(super) fn binding_since(&self) -> Option<Instant> {
        lock(&self.grants).binding_since
    }

    /// A write that has bytes is announced; it may only be where its window is open to the peer. Returns whether they
    /// land in the twin of the window's region.
    pub(super) fn announced(&self, window: u64) -> Option<bool> {
        lock(&self.grants).open.get_mut(&window).map(|grant| {
            grant.under_way += 1;
            grant.on_twin
        })
    }

    /// An announced write has landed, or was given up.
    pub(super) fn finished(&self, window: u64) {
        if let Some(grant) = lock(&self.grants).open.get_mut(&window) {
            grant.under_way = grant.under_way.saturating_sub(1);
        }
    }

    /// A queue pair has invalidated.
    pub(super) fn invalidated(&self, number: u32) {
        let mut grants = lock(&self.grants);
        if let Some(left) = grants.invalidating.get_mut(&number) {
            *left -= 1;
            if *left == 0 {
                grants.invalidating.remove(&number);
                self.invalidated.notify_all();
            }
        }
    }

    /// Takes the right to write back from every queue pair, and waits until they have. False if they do not.
    fn invalidate<'a>(&'a self, grants: MutexGuard<'a, Grants>, grant: Grant) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let has_room = |grants: &Grants| grants.invalidating.len() < WINDOW_WORK as usize;
        let Some(mut grants) = self.wait(grants, deadline, has_room) else {
            return false;
        };
        let number = grants.number();
        for (pair, key) in self.pairs[1..].iter().zip(&grant.keys) {
            if pair.queue.post(Kind::Invalidate.id(number), &[Work::Invalidate(*key)]).is_err() {
                return false;
            }
        }
        grants.invalidating.insert(number, self.pairs.len() - 1);
        let done = |grants: &Grants| !grants.invalidating.contains_key(&number);
        let Some(mut grants) = self.wait(grants, deadline, done) else {
            return false;
        };
        // Bindings are done before what was posted behind them.
        if matches!(grant.phase, Phase::Binding { .. }) {
            grants.has_bound();
        }
        grants.give_back(grant.windows.into_iter().map(|window| vec![window]).collect());
        true
    }

    /// Waits until something is so. None if the deadline passes or the lane is over first.
    fn wait<'a>(
        &self,
        grants: MutexGuard<'a, Grants>,
        deadline: Instant,
        so: impl Fn(&Grants) -> bool,
    ) -> Option<MutexGuard<'a, Grants>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let (grants, _) = self
            .invalidated
            .wait_timeout_while(grants, left, |grants| !so(grants) && self.fault().is_none())
            .unwrap_or_else(PoisonError::into_inner);
        so(&grants).then_some(grants)
    }

    /// What the peer was given for a window.
    #[cfg(test)]
    pub(super) fn granted(&self, window: u64) -> Option<Keys> {
        lock(&self.grants).open.get(&window).map(Grant::keys)
    }

    /// The keys of windows that were closed since the last call, to be told to the peer.
    pub(super) fn closed_windows(&self) -> Vec<u64> {
        std::mem::take(&mut lock(&self.grants).closed)
    }
}

impl Keeper for Lane {
    fn window_closed(&self, key: u64) {
        let mut grants = lock(&self.grants);
        match grants.open.get_mut(&key) {
            None => return,
            Some(grant) if matches!(grant.phase, Phase::Opening | Phase::Closed) => {
                grant.phase = Phase::Closed;
                return;
            }
            Some(_) => {}
        }
        let Some(grant) = grants.open.remove(&key) else { return };
        let under_way = grant.under_way > 0;
        let taken_back = if under_way {
            // Its remaining bytes would break the queue pair.
            drop(grants);
            false
        } else if grant.windows.is_empty() {
            // Without the lock: deregistering takes a while.
            drop(grants);
            drop(grant);
            true
        } else if self.fault().is_none() {
            self.invalidate(grants, grant)
        } else {
            // Whoever stops the lane may be in the midst of it: stopping it here too waits for that.
            drop(grants);
            false
        };
        if taken_back {
            lock(&self.grants).closed.push(key);
            self.wake();
        } else {
            self.stop(if under_way {
                "a window was closed while the peer wrote it"
            } else {
                "the device did not take back the right to write a window in time"
            });
        }
    }
}

fn too_many(lane: &Lane) -> VerbsError {
    VerbsError::Refused {
        device: lane.pairs[1].queue.device().name().into(),
        what: "open more windows at once",
        source: std::io::Error::from_raw_os_error(libc::EAGAIN),
    }
}

impl Grants {
    /// A binding is done on every queue pair.
    fn has_bound(&mut self) {
        self.binding -= 1;
        self.binding_since = (self.binding > 0).then(Instant::now);
    }

    fn number(&mut self) -> u32 {
        self.next_number = self.next_number.wrapping_add(1);
        self.next_number
    }

    fn give_back(&mut self, windows: Vec<Vec<MemoryWindow>>) {
        self.spare.resize_with(windows.len().max(self.spare.len()), Vec::new);
        for (spare, windows) in self.spare.iter_mut().zip(windows) {
            spare.extend(windows);
        }
    }
}

impl Grant {
    fn opening() -> Grant {
        Grant {
            phase: Phase::Opening,
            base: 0,
            keys: Vec::new(),
            windows: Vec::new(),
            _regions: Vec::new(),
            on_twin: false,
            under_way: 0,
            asked: Vec::new(),
        }
    }

    fn keys(&self) -> Keys {
        Keys { base: self.base, keys: self.keys.clone() }
    }

    fn ask(&mut self, sequence: u64) -> Granted {
        match self.phase {
            Phase::Opening | Phase::Closed => Granted::Refused,
            Phase::Binding { .. } => {
                self.asked.push(sequence);
                Granted::Later
            }
            Phase::Open => Granted::Now(self.keys()),
        }
    }
}
