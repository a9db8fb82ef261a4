//! Writes that were taken and are not reported, by their numbers, which are given in order.

use super::lane::{LaneId, Path};
use crate::transport::Write;
use std::collections::VecDeque;
use std::time::Instant;

pub(super) struct Ticket {
    pub(super) write: Write,
    /// None while it waits for its source's bytes.
    pub(super) lane: Option<LaneId>,
    /// A lane that failed has had it.
    pub(super) repeated: bool,
    pub(super) path: Path,
    pub(super) submitted: Instant,
}

/// Numbers follow each other, so a queue of places does, where a tree would cost more than the write's bytes.
#[derive(Default)]
pub(super) struct Tickets {
    /// The first place's number.
    first: u64,
    places: VecDeque<Option<Ticket>>,
    taken: usize,
}

impl Tickets {
    /// Writes that have a ticket.
    pub(super) fn len(&self) -> usize {
        self.taken
    }

    /// From the oldest that has one to the newest, with those between that have none any more.
    pub(super) fn span(&self) -> usize {
        self.places.len()
    }

    /// The number of the oldest, or of the next if there is none.
    pub(super) fn floor(&self) -> u64 {
        self.first
    }

    /// The number that the next write gets.
    fn next(&self) -> u64 {
        self.first + self.places.len() as u64
    }

    /// Gives the next number to a write, and returns it.
    pub(super) fn push(&mut self, ticket: Ticket) -> u64 {
        self.places.push_back(Some(ticket));
        self.taken += 1;
        self.next() - 1
    }

    fn place(&self, number: u64) -> Option<usize> {
        number.checked_sub(self.first).and_then(|place| usize::try_from(place).ok())
    }

    pub(super) fn get(&self, number: u64) -> Option<&Ticket> {
        self.places.get(self.place(number)?)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Ticket> {
        let place = self.place(number)?;
        self.places.get_mut(place)?.as_mut()
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<Ticket> {
        let place = self.place(number)?;
        let ticket = self.places.get_mut(place)?.take()?;
        self.taken -= 1;
        while let Some(None) = self.places.front() {
            self.places.pop_front();
            self.first += 1;
        }
        Some(ticket)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Ticket)> {
        let numbered = (self.first..).zip(&self.places);
        numbered.filter_map(|(number, ticket)| Some((number, ticket.as_ref()?)))
    }

    /// Takes all out, in order.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Ticket> + use<> {
        (self.first, self.taken) = (self.next(), 0);
        std::mem::take(&mut self.places).into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use tandem_memory::HostRegion;
    use tandem_proto::wire::Window;

    /// Against a tree, with tickets given back in any order.
    #[test]
    fn tickets_are_found_by_their_numbers() {
        let source = HostRegion::map(8).unwrap().extent(0..8).unwrap();
        let window = Window { region: 0, key: 1, offset: 0, len: 8 };
        let ticket = |number| Ticket {
            write: Write { ticket: number, source: source.clone(), window, offset: 0, immediate: 0 },
            lane: None,
            repeated: false,
            path: Path::Quic,
            submitted: Instant::now(),
        };
        let (mut tickets, mut tree) = (Tickets::default(), BTreeMap::new());
        let mut rng = crate::rng::Rng::new(7);
        for _ in 0..20_000 {
            if rng.next() % 64 > tree.len() as u64 {
                let number = tickets.push(ticket(tickets.next()));
                assert_eq!(tickets.get(number).map(|ticket| ticket.write.ticket), Some(number));
                tree.insert(number, number);
            } else {
                let number = (tickets.floor() + rng.next() % (tickets.span() as u64 + 2)).saturating_sub(1);
                let removed = tickets.remove(number).map(|ticket| ticket.write.ticket);
                assert_eq!(removed, tree.remove(&number));
            }
            assert_eq!(tickets.floor(), tree.first_key_value().map_or(tickets.next(), |(first, _)| *first));
            assert_eq!(tickets.span() as u64, tickets.next() - tickets.floor());
            assert!(tickets.iter().map(|(number, _)| number).eq(tree.keys().copied()));
            assert_eq!(tickets.len(), tree.len());
        }
        assert_eq!(tickets.take_all().count(), tree.len());
        assert_eq!((tickets.len(), tickets.span()), (0, 0));
    }
}
