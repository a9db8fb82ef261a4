//! The reader's side of a lane: writes of the peer's, counted until all of their parts have come.

use super::outgoing::Broken;
use crate::net::header::Header;
use crate::window::Landing;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// A write that has come completely.
pub(super) struct Arrived {
    pub(super) header: Header,
    pub(super) landing: Arc<Landing>,
    /// Whether its bytes are in the twin of the window's region.
    pub(super) on_twin: bool,
}

/// What the reader's side knows. Parts may come before their write is announced: on other queue pairs.
pub(super) struct Incoming {
    /// By the low half of the sequence number.
    writes: BTreeMap<u32, Pieces>,
    /// Complete, and not reported.
    arrived: VecDeque<Arrived>,
    /// The most writes that the peer may have under way.
    limit: usize,
}

#[derive(Default)]
struct Pieces {
    announced: Option<(Arrived, u8)>,
    come: u8,
}

impl Incoming {
    pub(super) fn new(limit: usize) -> Incoming {
        Incoming { writes: BTreeMap::new(), arrived: VecDeque::new(), limit }
    }

    /// A write is on its way in so many parts.
    pub(super) fn announced(&mut self, write: Arrived, parts: u8) -> Result<(), Broken> {
        let low = write.header.sequence as u32;
        let pieces = self.pieces(low)?;
        if pieces.announced.is_some() {
            return Err("it announced a write twice");
        }
        pieces.announced = Some((write, parts));
        self.complete(low)
    }

    /// A part has come.
    pub(super) fn part(&mut self, low: u32) -> Result<(), Broken> {
        self.pieces(low)?.come += 1;
        self.complete(low)
    }

    pub(super) fn next(&mut self) -> Option<Arrived> {
        self.arrived.pop_front()
    }

    pub(super) fn has_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    fn pieces(&mut self, low: u32) -> Result<&mut Pieces, Broken> {
        // Each write has at most one part on a queue pair, and no more writes are under way than it has receives.
        if self.writes.len() + self.arrived.len() >= self.limit && !self.writes.contains_key(&low) {
            return Err("it has more writes under way than it may");
        }
        Ok(self.writes.entry(low).or_default())
    }

    fn complete(&mut self, low: u32) -> Result<(), Broken> {
        let Some(Pieces { announced: Some((_, parts)), come }) = self.writes.get(&low) else {
            return Ok(());
        };
        if come > parts {
            return Err("a write came in more parts than it was announced with");
        }
        if come == parts
            && let Some(Pieces { announced: Some((write, _)), .. }) = self.writes.remove(&low)
        {
            self.arrived.push_back(write);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::window::Windows;
    use tandem_memory::HostRegion;
    use tandem_proto::ids::NodeId;

    fn write(sequence: u64) -> Arrived {
        let windows = Windows::default();
        let region = windows.register(HostRegion::map(4096).unwrap()).unwrap();
        let window = windows.open(NodeId(1), region, 0..100, || 5).unwrap();
        let landing = windows.find(NodeId(1), &window, 0, 10).unwrap();
        let header = Header { window, offset: 0, len: 10, immediate: 9, sequence, floor: 0, failed: None };
        Arrived { header, landing, on_twin: sequence == 1 }
    }

    #[test]
    fn parts_and_announcements_come_in_any_order() {
        let big = (1 << 40) + 7;
        for order in [[0, 1, 1], [1, 0, 1], [1, 1, 0]] {
            let mut incoming = Incoming::new(4);
            for (at, what) in order.into_iter().enumerate() {
                assert!(!incoming.has_arrived(), "{order:?} at {at}");
                if what == 0 {
                    incoming.announced(write(big), 2).unwrap();
                } else {
                    incoming.part(7).unwrap();
                }
            }
            assert_eq!(incoming.next().unwrap().header.sequence, big);
            assert!(incoming.next().is_none());
        }
        let mut incoming = Incoming::new(4);
        incoming.announced(write(3), 0).unwrap();
        assert!(incoming.has_arrived(), "an empty write has no parts");
    }

    #[test]
    fn what_breaks_the_rules_is_told() {
        let mut incoming = Incoming::new(2);
        incoming.announced(write(1), 1).unwrap();
        assert!(incoming.announced(write(1), 1).is_err(), "twice");
        incoming.part(2).unwrap();
        assert!(incoming.part(3).is_err(), "too many");
        incoming.part(1).unwrap();
        assert!(incoming.part(1).is_err(), "what has arrived and is not reported counts");
        assert!(incoming.next().unwrap().on_twin);
        incoming.part(2).unwrap();
        assert!(incoming.announced(write(2), 1).is_err(), "more parts than announced");
    }
}
