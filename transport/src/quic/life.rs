//! Everything with one peer from `Connected` to `Severed`.

use super::link::{Job, Link};
use crate::transport::{Event, FailReason, SubmitError, Write};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tandem_proto::ids::NodeId;

/// The most connections that one life may have.
pub(super) const MAX_PARTS: usize = 64;

/// A life: its connections, and the tickets that are to be reported before it ends.
pub(super) struct Life {
    pub(super) peer: NodeId,
    /// Drawn by the dialler.
    pub(super) number: u64,
    pub(super) dialled_here: bool,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// By part.
    links: Vec<Option<Arc<Link>>>,
    /// Submitted and not reported, by sequence number. Empty unless the life is up.
    tickets: BTreeMap<u64, Ticket>,
    next_sequence: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Some connections are still missing.
    Forming,
    Up,
    Ended,
}

struct Ticket {
    ticket: u64,
    len: u64,
    link: Arc<Link>,
}

/// What the end of a life leaves to report.
pub(super) struct Remains {
    pub(super) was_up: bool,
    pub(super) links: Vec<Arc<Link>>,
    pub(super) failed: Vec<u64>,
}

impl Life {
    pub(super) fn new(peer: NodeId, number: u64, dialled_here: bool, parts: usize) -> Life {
        let state = State {
            phase: Phase::Forming,
            links: vec![None; parts],
            tickets: BTreeMap::new(),
            next_sequence: 0,
        };
        Life { peer, number, dialled_here, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two steps of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> Phase {
        self.state().phase
    }

    pub(super) fn links(&self) -> Vec<Arc<Link>> {
        self.state().links.iter().flatten().cloned().collect()
    }

    /// Adds a connection. Returns all of them when this was the last: the life is up then. None if there is
    /// no place for it.
    pub(super) fn attach(&self, part: usize, link: Arc<Link>) -> Option<Vec<Arc<Link>>> {
        let mut state = self.state();
        if state.phase != Phase::Forming {
            return None;
        }
        match state.links.get_mut(part) {
            Some(place @ None) => *place = Some(link),
            _ => return None,
        }
        let links: Vec<_> = state.links.iter().flatten().cloned().collect();
        if links.len() < state.links.len() {
            return Some(Vec::new());
        }
        state.phase = Phase::Up;
        Some(links)
    }

    /// Ends it, once. The tickets that are left are never reported by anyone else.
    pub(super) fn end(&self) -> Option<Remains> {
        let mut state = self.state();
        if state.phase == Phase::Ended {
            return None;
        }
        let was_up = state.phase == Phase::Up;
        state.phase = Phase::Ended;
        let failed = std::mem::take(&mut state.tickets).into_values().map(|ticket| ticket.ticket).collect();
        Some(Remains {
            was_up,
            links: std::mem::take(&mut state.links).into_iter().flatten().collect(),
            failed,
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
        let Some(link) = state.links.iter().flatten().min_by_key(|link| link.load()).cloned() else {
            return Err(SubmitError::NotConnected { peer: self.peer });
        };
        let sequence = state.next_sequence;
        state.next_sequence += 1;
        let len = write.source.len() as u64;
        state.tickets.insert(sequence, Ticket { ticket: write.ticket, len, link: Arc::clone(&link) });
        // Under the lock, so that the end of the life finds either no ticket or a queued job.
        link.push(Job { sequence, write });
        Ok(())
    }

    /// The fate of a write is known, and its source is not read any more: hands its report over, unless the
    /// end of the life did. Returns the bytes that landed.
    pub(super) fn settle(&self, sequence: u64, landed: bool, report: impl FnOnce(Event)) -> Option<u64> {
        let mut state = self.state();
        let Ticket { ticket, len, link } = state.tickets.remove(&sequence)?;
        link.unload(len);
        let peer = self.peer;
        // Under the lock, so that no report follows the end of the life.
        report(if landed {
            Event::Sent { peer, ticket }
        } else {
            Event::Failed { peer, ticket, reason: FailReason::Refused }
        });
        landed.then_some(len)
    }
}
