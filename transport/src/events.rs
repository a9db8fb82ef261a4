//! Events between what happened and the poll that reports it.

use crate::transport::Event;
use std::collections::VecDeque;
use tandem_proto::ids::NodeId;

/// A backend's unreported events, in order.
#[derive(Default)]
pub(crate) struct EventQueue {
    /// Each with the key of its window, if it is a `Landed`.
    queue: VecDeque<(Event, Option<u64>)>,
}

impl EventQueue {
    pub(crate) fn push(&mut self, event: Event) {
        self.queue.push_back((event, None));
    }

    pub(crate) fn push_landed(&mut self, peer: NodeId, immediate: u32, len: u64, key: u64) {
        self.queue.push_back((Event::Landed { peer, immediate, len }, Some(key)));
    }

    /// The window was closed: what landed through it is not reported any more (contract point 8).
    pub(crate) fn forget_landed(&mut self, key: u64) {
        self.queue.retain(|(_, landed_by)| *landed_by != Some(key));
    }

    /// Whether the peer's end is queued, with no new life after it: a further `sever` shares that answer.
    pub(crate) fn ends_severed(&self, peer: NodeId) -> bool {
        self.queue
            .iter()
            .rev()
            .find_map(|(event, _)| match event {
                Event::Severed { peer: p, .. } if *p == peer => Some(true),
                Event::Connected { peer: p } if *p == peer => Some(false),
                _ => None,
            })
            .unwrap_or(false)
    }

    /// Moves the events to `out`, up to the first end of a peer, which it returns. The caller then closes the
    /// peer's windows and calls `forget_landed_of` before it goes on (contract point 11).
    pub(crate) fn drain(&mut self, out: &mut Vec<Event>) -> Option<NodeId> {
        while let Some((event, _)) = self.queue.pop_front() {
            let severed = if let Event::Severed { peer, .. } = event { Some(peer) } else { None };
            out.push(event);
            if severed.is_some() {
                return severed;
            }
        }
        None
    }

    /// What landed in the peer's next life already did so through windows that were closed with this one.
    pub(crate) fn forget_landed_of(&mut self, severed: NodeId) {
        self.queue.retain(|(event, _)| !matches!(event, Event::Landed { peer, .. } if *peer == severed));
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}
