//! Everything with one peer from `Connected` to `Severed`.

use super::counters::{PeerCounters, Settled};
use super::landed::{Landed, MAX_LANDED, TooManyLanded};
use super::lane::{Generation, Job, Lane, LaneId, Path};
use super::tickets::{Ticket, Tickets};
use crate::quic::Link;
use crate::transport::{Event, FailReason, SubmitError, Write};
use crate::twin::Fetches;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
#[cfg(feature = "cuda")]
use tandem_memory::Extent;
use tandem_proto::ids::NodeId;
use tokio::sync::Notify;

/// The most QUIC connections that one life may have.
pub(super) const MAX_PARTS: usize = 64;

/// Numbers of writes between the oldest that is not reported and the newest, at most, where the limit of unreported
/// writes is lower: the peer remembers as many.
const MIN_SPAN: usize = 1 << 16;
const _: () = assert!(MIN_SPAN as u64 <= MAX_LANDED);

/// A life: its lanes, and the tickets that are to be reported before it ends.
pub(crate) struct Life {
    pub(crate) peer: NodeId,
    /// Drawn by the dialler.
    pub(crate) number: u64,
    pub(super) dialled_here: bool,
    pub(super) counters: Arc<PeerCounters>,
    /// The path that writes take may be another.
    path_changed: Notify,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// The QUIC connections, by part.
    parts: Vec<Option<Arc<Link>>>,
    /// What carries writes, the best path first. Empty once the life has ended.
    lanes: Vec<Arc<dyn Lane>>,
    /// Lanes that are being made.
    making: Option<Making>,
    /// Of the lanes that were made last, whether they came about or not.
    generation: Generation,
    /// Lanes beside QUIC up to this generation are over: what they had not delivered is repeated, or was. Whoever
    /// is still making one of them comes too late.
    failed: Generation,
    next_lane: u32,
    standing: Standing,
    /// Submitted and not reported, by sequence number. Empty unless the life is up.
    tickets: Tickets,
    landed: Landed,
}

/// Lanes on their way to carry writes.
struct Making {
    generation: Generation,
    /// Proves to the side that was dialled that a lane belongs here: whoever makes one shows it.
    secret: [u8; 32],
    lanes: Vec<Arc<dyn Lane>>,
}

/// Which path writes take, and why not a better one.
#[derive(Clone)]
pub(super) struct Standing {
    pub(super) path: Option<Path>,
    pub(super) why: String,
    pub(super) since: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Some connections or lanes are still missing.
    Forming,
    Up,
    Ended,
}

/// What the end of a life leaves to report.
pub(super) struct Remains {
    pub(super) was_up: bool,
    pub(super) links: Vec<Arc<Link>>,
    pub(super) lanes: Vec<Arc<dyn Lane>>,
    pub(super) failed: Vec<(u64, Path)>,
}

/// What became of the writes of lanes that failed.
pub(super) enum Moved {
    /// The lanes were none of the life's any more.
    Nothing,
    /// So many lanes are left, and so many writes repeated on others.
    Repeated { lanes: usize, writes: usize },
    /// So many were left, and there is no other.
    NoneLeft { lanes: usize },
}

impl Life {
    /// Its first lanes can be made at once, by whoever knows `secret`.
    pub(super) fn new(
        peer: NodeId,
        number: u64,
        dialled_here: bool,
        parts: usize,
        secret: [u8; 32],
        counters: Arc<PeerCounters>,
    ) -> Life {
        let generation = Generation(1);
        let state = State {
            phase: Phase::Forming,
            parts: vec![None; parts],
            lanes: Vec::new(),
            making: Some(Making { generation, secret, lanes: Vec::new() }),
            generation,
            failed: Generation::SESSION,
            next_lane: 0,
            standing: Standing { path: None, why: String::new(), since: Instant::now() },
            tickets: Tickets::default(),
            landed: Landed::default(),
        };
        Life { peer, number, dialled_here, counters, path_changed: Notify::new(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two steps of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> Phase {
        self.state().phase
    }

    pub(super) fn links(&self) -> Vec<Arc<Link>> {
        self.state().parts.iter().flatten().cloned().collect()
    }

    /// Writes that were taken and are not reported.
    pub(super) fn unreported(&self) -> usize {
        self.state().tickets.len()
    }

    /// The path that writes take now; none before the life is up, and after its end.
    pub(super) fn path(&self) -> Option<Path> {
        self.state().path()
    }

    pub(super) fn standing(&self) -> Standing {
        self.state().standing.clone()
    }

    /// Waits until the path that writes take is such a one.
    pub(super) async fn until_path(&self, is_such: impl Fn(Option<Path>) -> bool) {
        loop {
            let changed = self.path_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if is_such(self.path()) {
                return;
            }
            changed.await;
        }
    }

    /// Unreported writes, and their bytes, by path.
    pub(super) fn queued(&self) -> [(u64, u64); Path::ALL.len()] {
        let mut queued = [(0, 0); Path::ALL.len()];
        for (_, ticket) in self.state().tickets.iter() {
            let (writes, bytes) = &mut queued[ticket.path as usize];
            *writes += 1;
            *bytes += ticket.write.source.len() as u64;
        }
        queued
    }

    /// For a connection of the session.
    pub(super) fn new_link_id(&self) -> LaneId {
        self.state().new_id(Generation::SESSION)
    }

    /// For a lane that is being made with this secret; none if it is made no more.
    pub(crate) fn new_lane_id(&self, secret: &[u8; 32]) -> Option<LaneId> {
        let mut state = self.state();
        let making = state.making.as_ref().filter(|making| same_secret(&making.secret, secret));
        let generation = making?.generation;
        Some(state.new_id(generation))
    }

    /// The numbers that the next lanes have to be made with, and of the last that have failed.
    pub(super) fn next_generation(&self) -> (Generation, Generation) {
        let state = self.state();
        (Generation(state.generation.0 + 1), state.failed)
    }

    /// Lanes can be made by whoever knows `secret`; false if it is too late for them.
    pub(super) fn make_lanes(&self, generation: Generation, secret: [u8; 32]) -> bool {
        let mut state = self.state();
        if state.phase != Phase::Up || generation <= state.generation {
            return false;
        }
        state.generation = generation;
        state.making = Some(Making { generation, secret, lanes: Vec::new() });
        true
    }

    pub(crate) fn lanes_being_made(&self, path: Path) -> usize {
        let of_path = |making: &Making| making.lanes.iter().filter(|lane| lane.path() == path).count();
        self.state().making.as_ref().map_or(0, of_path)
    }

    /// No more lanes are made; returns those that were, to be closed.
    #[must_use]
    pub(super) fn stop_making(&self) -> Vec<Arc<dyn Lane>> {
        self.state().making.take().map_or_else(Vec::new, |making| making.lanes)
    }

    /// Takes out the lanes of a path that were made and are not wanted.
    #[must_use]
    pub(super) fn discard(&self, path: Path) -> Vec<Arc<dyn Lane>> {
        let mut state = self.state();
        let Some(making) = &mut state.making else { return Vec::new() };
        let lanes = std::mem::take(&mut making.lanes);
        let (unwanted, kept) = lanes.into_iter().partition(|lane| lane.path() == path);
        making.lanes = kept;
        unwanted
    }

    /// The lanes that were made carry writes from now on, and are to be started. None if they have not come about,
    /// or failed already for the peer.
    pub(super) fn take_better(&self, path: Path, why: &str) -> Option<Vec<Arc<dyn Lane>>> {
        // Dropped after the lock.
        let _unwanted: Vec<_>;
        let mut state = self.state();
        let Making { generation, lanes, .. } = state.making.take()?;
        let (lanes, others): (Vec<_>, Vec<_>) = lanes.into_iter().partition(|lane| lane.path() == path);
        _unwanted = others;
        if state.phase != Phase::Up || generation <= state.failed || lanes.is_empty() {
            drop(state);
            return None;
        }
        state.lanes.extend(lanes.iter().cloned());
        state.lanes.sort_by_key(|lane| lane.path());
        state.stand(why);
        drop(state);
        self.path_changed.notify_waiters();
        Some(lanes)
    }

    /// Adds a QUIC connection; false if there is no place for it.
    pub(super) fn attach_part(&self, part: usize, link: Arc<Link>) -> bool {
        let mut state = self.state();
        if state.phase != Phase::Forming {
            return false;
        }
        match state.parts.get_mut(part) {
            Some(place @ None) => *place = Some(link),
            _ => return false,
        }
        true
    }

    /// Adds a lane; false if it comes too late.
    pub(crate) fn attach_lane(&self, lane: Arc<dyn Lane>) -> bool {
        let mut state = self.state();
        match &mut state.making {
            Some(making) if making.generation == lane.id().generation => {
                making.lanes.push(lane);
                true
            }
            _ => false,
        }
    }

    /// Everything is there: the life is up, and its lanes are to be started. `paths` are those that both
    /// sides have, and that writes may take. None if something is missing.
    pub(super) fn begin(&self, paths: &[Path], why: &str) -> Option<Vec<Arc<dyn Lane>>> {
        let mut state = self.state();
        if state.phase != Phase::Forming || state.parts.iter().any(Option::is_none) {
            return None;
        }
        let links: Vec<Arc<dyn Lane>> =
            state.parts.iter().flatten().map(|link| Arc::clone(link) as Arc<dyn Lane>).collect();
        let mut lanes = state.making.take().map_or_else(Vec::new, |making| making.lanes);
        lanes.retain(|lane| paths.contains(&lane.path()));
        let all = lanes.iter().chain(&links).cloned().collect();
        if paths.contains(&Path::Quic) {
            lanes.extend(links);
        }
        lanes.sort_by_key(|lane| lane.path());
        if !paths.iter().all(|path| lanes.iter().any(|lane| lane.path() == *path)) {
            return None;
        }
        state.lanes = lanes;
        state.phase = Phase::Up;
        state.stand(why);
        Some(all)
    }

    /// Ends it, once. The tickets that are left are never reported by anyone else.
    pub(super) fn end(&self) -> Option<Remains> {
        let mut state = self.state();
        if state.phase == Phase::Ended {
            return None;
        }
        let was_up = state.phase == Phase::Up;
        state.phase = Phase::Ended;
        let tickets = state.tickets.take_all();
        let mut lanes = std::mem::take(&mut state.lanes);
        lanes.extend(state.making.take().into_iter().flat_map(|making| making.lanes));
        let links = std::mem::take(&mut state.parts).into_iter().flatten().collect();
        drop(state);
        self.path_changed.notify_waiters();
        let failed = tickets.map(|ticket| (ticket.write.ticket, ticket.path)).collect();
        Some(Remains { was_up, links, lanes, failed })
    }

    pub(super) fn submit(&self, write: Write, limit: usize, fetches: &Fetches) -> Result<(), SubmitError> {
        let mut state = self.state();
        if state.phase != Phase::Up {
            return Err(SubmitError::NotConnected { peer: self.peer });
        }
        if state.tickets.len() >= limit || state.tickets.span() >= limit.max(MIN_SPAN) {
            return Err(SubmitError::Full { peer: self.peer, limit });
        }
        // Under the lock, so that the end of the life finds either no ticket or a queued job.
        let Some(path) = state.path() else {
            return Err(SubmitError::NotConnected { peer: self.peer });
        };
        let ticket = Ticket { write, lane: None, repeated: false, path, submitted: Instant::now() };
        let sequence = state.tickets.push(ticket);
        self.send(&mut state, sequence, fetches);
        Ok(())
    }

    /// Hands a write to a lane, as soon as that can read its source.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "a lane can read every source"))]
    fn send(&self, state: &mut State, sequence: u64, fetches: &Fetches) {
        #[cfg(feature = "cuda")]
        if state.must_fetch(sequence) {
            return fetches.push(self, sequence);
        }
        state.hand_over(sequence);
    }

    /// The source of a write that waits for it; none if it is not wanted any more.
    #[cfg(feature = "cuda")]
    pub(crate) fn waits_for_source(&self, sequence: u64) -> Option<Extent> {
        let state = self.state();
        let ticket = state.tickets.get(sequence)?;
        ticket.lane.is_none().then(|| ticket.write.source.clone())
    }

    /// The host's side of a write's source has its bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn fetched(&self, sequence: u64) {
        self.state().hand_over(sequence);
    }

    /// The fates of writes are known, by number and whether they landed, and their sources are not read any more: hands
    /// their reports over, without those that another lane has by now, or that the end of the life has reported.
    pub(super) fn settle(
        &self,
        lane: LaneId,
        fates: &[(u64, bool)],
        report: impl FnOnce(&mut dyn Iterator<Item = Event>),
    ) -> Settled {
        let peer = self.peer;
        let mut settled = Settled::default();
        // Dropped after the lock, and allocated before.
        let mut tickets = Vec::with_capacity(fates.len());
        let mut state = self.state();
        for (sequence, landed) in fates {
            if state.tickets.get(*sequence).is_some_and(|ticket| ticket.lane == Some(lane))
                && let Some(ticket) = state.tickets.remove(*sequence)
            {
                tickets.push((ticket, *landed));
            }
        }
        if !tickets.is_empty() {
            // Under the lock, so that no report follows the end of the life.
            report(&mut tickets.iter().map(|(Ticket { write, .. }, landed)| match landed {
                true => Event::Sent { peer, ticket: write.ticket },
                false => Event::Failed { peer, ticket: write.ticket, reason: FailReason::Refused },
            }));
        }
        drop(state);
        let now = Instant::now();
        for (Ticket { write, submitted, .. }, landed) in &tickets {
            settled.add(*landed, write.source.len() as u64, now.saturating_duration_since(*submitted));
        }
        settled
    }

    /// The lanes of a path that carry writes.
    pub(super) fn lanes_of(&self, path: Path) -> Vec<Arc<dyn Lane>> {
        self.state().lanes.iter().filter(|lane| lane.path() == path).cloned().collect()
    }

    /// Lanes beside QUIC up to this generation have failed. Returns those that carry writes, to be closed before
    /// [`Life::leave`].
    #[must_use]
    pub(super) fn fail(&self, generation: Generation) -> Vec<Arc<dyn Lane>> {
        let mut state = self.state();
        state.failed = state.failed.max(generation);
        state.lanes.iter().filter(|lane| is_among(lane.id(), generation)).cloned().collect()
    }

    /// Takes out lanes that have failed and are closed, and repeats elsewhere what they have not settled.
    pub(super) fn leave(&self, generation: Generation, why: &str, fetches: &Fetches) -> Moved {
        let mut state = self.state();
        let before = state.lanes.len();
        state.lanes.retain(|lane| !is_among(lane.id(), generation));
        let lanes = before - state.lanes.len();
        if lanes == 0 {
            return Moved::Nothing;
        }
        if state.lanes.is_empty() {
            return Moved::NoneLeft { lanes };
        }
        let unsettled: Vec<u64> = state
            .tickets
            .iter()
            .filter(|(_, ticket)| ticket.lane.is_some_and(|lane| is_among(lane, generation)))
            .map(|(sequence, _)| sequence)
            .collect();
        for sequence in &unsettled {
            if let Some(ticket) = state.tickets.get_mut(*sequence) {
                (ticket.lane, ticket.repeated) = (None, true);
                self.send(&mut state, *sequence, fetches);
            }
        }
        state.stand(why);
        drop(state);
        self.path_changed.notify_waiters();
        Moved::Repeated { lanes, writes: unsettled.len() }
    }

    /// A write of the peer's has landed by a lane that may fail before the peer knows: if the write is
    /// repeated, it is answered and not landed again.
    pub(crate) fn note_landed(&self, sequence: u64, floor: u64) -> Result<(), TooManyLanded> {
        self.state().landed.note(sequence, floor)
    }

    pub(crate) fn has_landed(&self, sequence: u64) -> bool {
        self.state().landed.has(sequence)
    }
}

impl State {
    fn path(&self) -> Option<Path> {
        self.lanes.first().map(|lane| lane.path())
    }

    fn stand(&mut self, why: &str) {
        self.standing = Standing { path: self.path(), why: why.into(), since: Instant::now() };
    }

    fn new_id(&mut self, generation: Generation) -> LaneId {
        self.next_lane += 1;
        LaneId { generation, number: self.next_lane }
    }

    /// The least loaded lane of the best path.
    fn lane(&self) -> Option<&Arc<dyn Lane>> {
        if let [only] = &self.lanes[..] {
            return Some(only);
        }
        let path = self.path()?;
        self.lanes.iter().take_while(|lane| lane.path() == path).min_by_key(|lane| lane.load())
    }

    #[cfg(feature = "cuda")]
    fn must_fetch(&self, sequence: u64) -> bool {
        let source = self.tickets.get(sequence).map(|ticket| &ticket.write.source);
        source.is_some_and(|source| {
            crate::twin::must_fetch(source) && !self.lane().is_some_and(|lane| lane.reads_twin(source))
        })
    }

    /// Hands a write that no lane has to the best; one that is repeated keeps its number.
    fn hand_over(&mut self, sequence: u64) {
        // There is one as long as there are tickets.
        let Some(lane) = self.lane().cloned() else { return };
        let floor = self.tickets.floor();
        let Some(ticket) = self.tickets.get_mut(sequence).filter(|ticket| ticket.lane.is_none()) else {
            return;
        };
        (ticket.lane, ticket.path) = (Some(lane.id()), lane.path());
        // The lane is of a later generation than all that failed, so whatever carried this write before is named.
        let failed = ticket.repeated.then_some(self.failed);
        lane.push(Job { sequence, write: ticket.write.clone(), floor, failed });
    }
}

/// Whether a lane is one of those beside QUIC, up to this generation.
fn is_among(lane: LaneId, generation: Generation) -> bool {
    lane.generation != Generation::SESSION && lane.generation <= generation
}

/// Takes as long for secrets that differ in the first byte as for those that differ in the last.
fn same_secret(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::node::Node;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tandem_memory::HostRegion;
    use tandem_proto::wire::Window;

    /// Takes writes and does nothing with them.
    struct Still(LaneId, Path, AtomicUsize);

    impl Lane for Still {
        fn id(&self) -> LaneId {
            self.0
        }

        fn path(&self) -> Path {
            self.1
        }

        fn push(&self, _job: Job) {
            self.2.fetch_add(1, Ordering::Relaxed);
        }

        fn load(&self) -> u64 {
            0
        }

        fn start(self: Arc<Self>, _node: &Arc<Node>, _life: &Arc<Life>) {}

        fn close(&self, _reason: &str) {}
    }

    const SECRET: [u8; 32] = [1; 32];

    fn attach(life: &Life, secret: &[u8; 32], path: Path) -> Option<Arc<Still>> {
        let lane = Arc::new(Still(life.new_lane_id(secret)?, path, AtomicUsize::new(0)));
        life.attach_lane(Arc::clone(&lane) as Arc<dyn Lane>).then_some(lane)
    }

    fn write() -> Write {
        let source = HostRegion::map(4096).unwrap().extent(0..8).unwrap();
        let window = Window { region: 0, key: 1, offset: 0, len: 8 };
        Write { ticket: 1, source, window, offset: 0, immediate: 0 }
    }

    /// A life with shared memory, and TLS in the place of QUIC as what is always there.
    fn life() -> (Life, Arc<Still>) {
        let life = Life::new(NodeId(2), 1, true, 0, SECRET, Arc::default());
        let first = attach(&life, &SECRET, Path::Shm).unwrap();
        let id = life.new_link_id();
        life.state().making.as_mut().unwrap().lanes.push(Arc::new(Still(id, Path::Tls, AtomicUsize::new(0))));
        life.begin(&[Path::Shm, Path::Tls], "").unwrap();
        (life, first)
    }

    #[test]
    fn lanes_that_fail_are_left_together_and_made_anew() {
        let (life, first) = life();
        life.submit(write(), 8, &Fetches::default()).unwrap();
        assert_eq!((first.2.load(Ordering::Relaxed), life.queued()[Path::Shm as usize]), (1, (1, 8)));
        assert_eq!(life.fail(first.0.generation).len(), 1);
        assert!(matches!(
            life.leave(first.0.generation, "shm failed", &Fetches::default()),
            Moved::Repeated { lanes: 1, writes: 1 }
        ));
        assert_eq!((life.path(), life.standing().why.as_str()), (Some(Path::Tls), "shm failed"));
        let settled = life.settle(first.0, &[(0, true)], |_| panic!("another lane has the write"));
        assert_eq!(settled.writes(), 0);

        let (generation, failed) = life.next_generation();
        assert_eq!((generation, failed), (Generation(2), Generation(1)));
        assert!(attach(&life, &SECRET, Path::Shm).is_none(), "nobody asked for it");
        assert!(life.make_lanes(generation, [2; 32]) && !life.make_lanes(generation, [3; 32]));
        assert!(attach(&life, &SECRET, Path::Shm).is_none(), "its secret is an older one");
        let second = attach(&life, &[2; 32], Path::Shm).unwrap();
        assert_eq!(life.path(), Some(Path::Tls), "it carries nothing before both sides have it");
        assert_eq!(life.take_better(Path::Shm, "").unwrap().len(), 1);
        life.submit(write(), 8, &Fetches::default()).unwrap();
        assert_eq!((life.path(), second.2.load(Ordering::Relaxed)), (Some(Path::Shm), 1));
        // Word of the first failure that comes late.
        assert!(life.fail(first.0.generation).is_empty());
        assert!(matches!(life.leave(first.0.generation, "", &Fetches::default()), Moved::Nothing));
        assert_eq!(life.path(), Some(Path::Shm));
    }

    /// The peer took them, wrote by them, and left them, before this side took them: what it wrote is repeated.
    #[test]
    fn lanes_that_the_peer_has_left_are_not_taken() {
        let (life, first) = life();
        let _ = life.fail(first.0.generation);
        let _ = life.leave(first.0.generation, "", &Fetches::default());
        assert!(life.make_lanes(Generation(2), [2; 32]));
        attach(&life, &[2; 32], Path::Shm).unwrap();
        assert!(life.fail(Generation(2)).is_empty());
        assert!(life.take_better(Path::Shm, "").is_none());
        assert_eq!(life.path(), Some(Path::Tls));
    }
}
