//! Which of the peer's writes have landed by lanes that may fail, and may yet be repeated.

use std::collections::VecDeque;

/// Numbers of the peer's writes that are kept, at most. A peer that keeps the rules never has so many between the
/// oldest that it has not reported and the newest.
pub(super) const MAX_LANDED: u64 = 1 << 20;
const BITS: u64 = u64::BITS as u64;

/// The peer's numbers lie further apart than any limit allows.
pub(crate) struct TooManyLanded;

/// A bit for each number from the peer's floor on.
#[derive(Default)]
pub(super) struct Landed {
    /// The first number of the first word.
    first: u64,
    words: VecDeque<u64>,
}

impl Landed {
    /// A write has landed; no number below `floor` is asked for any more.
    pub(super) fn note(&mut self, number: u64, floor: u64) -> Result<(), TooManyLanded> {
        let floor = floor / BITS * BITS;
        while self.first < floor && self.words.pop_front().is_some() {
            self.first += BITS;
        }
        if self.words.is_empty() {
            self.first = self.first.max(floor);
        }
        // What is below is repeated no more.
        let Some(place) = number.checked_sub(self.first) else { return Ok(()) };
        if place >= MAX_LANDED + BITS {
            return Err(TooManyLanded);
        }
        let word = (place / BITS) as usize;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (place % BITS);
        Ok(())
    }

    pub(super) fn has(&self, number: u64) -> bool {
        let word =
            |place| self.words.get(usize::try_from(place / BITS).ok()?).map(|word| word >> (place % BITS));
        number.checked_sub(self.first).and_then(word).is_some_and(|bits| bits & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Against a set of numbers.
    #[test]
    fn what_landed_is_known_from_the_floor_on() {
        let (mut landed, mut set) = (Landed::default(), BTreeSet::new());
        let mut rng = crate::rng::Rng::new(3);
        let (mut floor, mut next) = (0, 0);
        for _ in 0..20_000 {
            next += rng.next() % 5;
            floor = (floor + rng.next() % 6).min(next);
            if rng.next().is_multiple_of(1000) {
                floor = next;
            }
            let number = floor + rng.next() % (next - floor + 1);
            assert!(landed.note(number, floor).is_ok());
            set.insert(number);
            for number in floor..next + 100 {
                assert_eq!(landed.has(number), set.contains(&number), "{number} from {floor}");
            }
            next = next.min(floor + 300);
        }
        assert!(landed.words.len() < 20);
    }

    #[test]
    fn numbers_far_apart_are_refused() {
        let mut landed = Landed::default();
        assert!(landed.note(MAX_LANDED, 5).is_ok() && landed.note(MAX_LANDED + 2 * BITS, 5).is_err());
        assert!(landed.note(u64::MAX, 5).is_err());
        assert!(landed.has(MAX_LANDED) && !landed.has(MAX_LANDED + 1) && !landed.has(u64::MAX));
        // A floor beyond all that is known, and numbers below it.
        assert!(landed.note(u64::MAX, u64::MAX).is_ok() && landed.note(3, u64::MAX).is_ok());
        assert!(landed.has(u64::MAX) && !landed.has(3) && landed.words.len() == 1);
    }
}
