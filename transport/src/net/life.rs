//! Everything with one peer from `Connected` to `Severed`.

use super::lane::{Job, Lane, LaneId, Path};
use crate::quic::Link;
use crate::transport::{Event, FailReason, SubmitError, Write};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tandem_proto::ids::NodeId;

/// The most QUIC connections that one life may have.
pub(super) const MAX_PARTS: usize = 64;

/// Writes of the peer that have landed and may yet be repeated, at most. A peer that keeps the rules has as
/// many unreported as its limit of writes says.
const MAX_LANDED: usize = 1 << 20;

/// A life: its lanes, and the tickets that are to be reported before it ends.
pub(crate) struct Life {
    pub(crate) peer: NodeId,
    /// Drawn by the dialler.
    pub(crate) number: u64,
    pub(super) dialled_here: bool,
    /// Proves to this node that a lane belongs to this life: whoever makes one shows it.
    pub(crate) secret: [u8; 32],
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// The QUIC connections, by part.
    parts: Vec<Option<Arc<Link>>>,
    /// What carries writes, the best path first. Empty once the life has ended.
    lanes: Vec<Arc<dyn Lane>>,
    next_lane: u16,
    /// Submitted and not reported, by sequence number. Empty unless the life is up.
    tickets: BTreeMap<u64, Ticket>,
    next_sequence: u64,
    /// The peer's writes that have landed by lanes that may fail, from its floor on.
    landed: BTreeSet<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Some connections or lanes are still missing.
    Forming,
    Up,
    Ended,
}

struct Ticket {
    write: Write,
    lane: LaneId,
}

/// What the end of a life leaves to report.
pub(super) struct Remains {
    pub(super) was_up: bool,
    pub(super) links: Vec<Arc<Link>>,
    pub(super) lanes: Vec<Arc<dyn Lane>>,
    pub(super) failed: Vec<u64>,
}

/// What became of a lane's writes when it failed.
pub(super) enum Moved {
    /// The lane was none of the life's any more.
    Nothing,
    /// So many are repeated on others.
    Repeated(usize),
    /// There is no other.
    NoneLeft,
}

/// The peer has more writes landed and unreported than any limit allows.
pub(crate) struct TooManyLanded;

impl Life {
    pub(super) fn new(peer: NodeId, number: u64, dialled_here: bool, parts: usize, secret: [u8; 32]) -> Life {
        let state = State {
            phase: Phase::Forming,
            parts: vec![None; parts],
            lanes: Vec::new(),
            next_lane: 0,
            tickets: BTreeMap::new(),
            next_sequence: 0,
            landed: BTreeSet::new(),
        };
        Life { peer, number, dialled_here, secret, state: Mutex::new(state) }
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

    /// The path that writes take now.
    pub(super) fn path(&self) -> Option<Path> {
        self.state().lanes.first().map(|lane| lane.path())
    }

    pub(crate) fn new_lane_id(&self) -> LaneId {
        let mut state = self.state();
        state.next_lane += 1;
        LaneId(state.next_lane)
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
        if state.phase != Phase::Forming {
            return false;
        }
        state.lanes.push(lane);
        true
    }

    /// Everything is there: the life is up, and its lanes are to be started. `paths` are those that both
    /// sides have, and that writes may take. None if something is missing.
    pub(super) fn begin(&self, paths: &[Path]) -> Option<Vec<Arc<dyn Lane>>> {
        let mut state = self.state();
        if state.phase != Phase::Forming || state.parts.iter().any(Option::is_none) {
            return None;
        }
        let links: Vec<Arc<dyn Lane>> =
            state.parts.iter().flatten().map(|link| Arc::clone(link) as Arc<dyn Lane>).collect();
        state.lanes.retain(|lane| paths.contains(&lane.path()));
        let all = state.lanes.iter().chain(&links).cloned().collect();
        if paths.contains(&Path::Quic) {
            state.lanes.extend(links);
        }
        state.lanes.sort_by_key(|lane| lane.path());
        if !paths.iter().all(|path| state.lanes.iter().any(|lane| lane.path() == *path)) {
            return None;
        }
        state.phase = Phase::Up;
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
        let tickets = std::mem::take(&mut state.tickets);
        Some(Remains {
            was_up,
            links: std::mem::take(&mut state.parts).into_iter().flatten().collect(),
            lanes: std::mem::take(&mut state.lanes),
            failed: tickets.into_values().map(|ticket| ticket.write.ticket).collect(),
        })
    }

    pub(super) fn submit(&self, write: Write, limit: usize) -> Result<(), SubmitError> {
        let mut state = self.state();
        if state.phase != Phase::Up {
            return Err(SubmitError::NotConnected { peer: self.peer });
        }
        if state.tickets.len() >= limit {
            return Err(SubmitError::Full { peer: self.peer, limit });
        }
        // Under the lock, so that the end of the life finds either no ticket or a queued job.
        if !state.send(None, write) {
            return Err(SubmitError::NotConnected { peer: self.peer });
        }
        Ok(())
    }

    /// The fate of a write is known, and its source is not read any more: hands its report over, unless
    /// another lane has the write by now, or the end of the life has. Returns the bytes that landed.
    pub(super) fn settle(
        &self,
        lane: LaneId,
        sequence: u64,
        landed: bool,
        report: impl FnOnce(Event),
    ) -> Option<u64> {
        let mut state = self.state();
        if state.tickets.get(&sequence)?.lane != lane {
            return None;
        }
        let Ticket { write, .. } = state.tickets.remove(&sequence)?;
        let (peer, ticket) = (self.peer, write.ticket);
        // Under the lock, so that no report follows the end of the life.
        report(if landed {
            Event::Sent { peer, ticket }
        } else {
            Event::Failed { peer, ticket, reason: FailReason::Refused }
        });
        landed.then_some(write.source.len() as u64)
    }

    /// The lanes of a path.
    pub(crate) fn lanes_of(&self, path: Path) -> Vec<Arc<dyn Lane>> {
        self.state().lanes.iter().filter(|lane| lane.path() == path).cloned().collect()
    }

    /// Takes a closed lane out, and repeats elsewhere what it has not settled.
    pub(super) fn replace_lane(&self, failed: LaneId, path: Path) -> Moved {
        let mut state = self.state();
        let before = state.lanes.len();
        state.lanes.retain(|lane| lane.id() != failed);
        if state.lanes.len() == before {
            return Moved::Nothing;
        }
        if state.lanes.is_empty() {
            return Moved::NoneLeft;
        }
        let unsettled: Vec<u64> =
            state.tickets.iter().filter(|(_, t)| t.lane == failed).map(|(sequence, _)| *sequence).collect();
        for sequence in &unsettled {
            if let Some(ticket) = state.tickets.remove(sequence) {
                state.send(Some((*sequence, path)), ticket.write);
            }
        }
        Moved::Repeated(unsettled.len())
    }

    /// A write of the peer's has landed by a lane that may fail before the peer knows: if the write is
    /// repeated, it is answered and not landed again.
    pub(crate) fn note_landed(&self, sequence: u64, floor: u64) -> Result<(), TooManyLanded> {
        let mut state = self.state();
        while state.landed.first().is_some_and(|first| *first < floor) {
            state.landed.pop_first();
        }
        state.landed.insert(sequence);
        if state.landed.len() > MAX_LANDED { Err(TooManyLanded) } else { Ok(()) }
    }

    pub(crate) fn has_landed(&self, sequence: u64) -> bool {
        self.state().landed.contains(&sequence)
    }
}

impl State {
    /// Hands a write to the least loaded lane of the best path; one that is repeated keeps its number.
    fn send(&mut self, repeated: Option<(u64, Path)>, write: Write) -> bool {
        let Some(best) = self.lanes.first().map(|lane| lane.path()) else {
            return false;
        };
        let of_best = self.lanes.iter().take_while(|lane| lane.path() == best);
        let Some(lane) = of_best.min_by_key(|lane| lane.load()).cloned() else {
            return false;
        };
        let sequence = repeated.map_or(self.next_sequence, |(sequence, _)| sequence);
        if repeated.is_none() {
            self.next_sequence += 1;
        }
        self.tickets.insert(sequence, Ticket { write: write.clone(), lane: lane.id() });
        let floor = self.tickets.first_key_value().map_or(sequence, |(first, _)| *first);
        lane.push(Job { sequence, write, floor, failed: repeated.map(|(_, path)| path) });
        true
    }
}
