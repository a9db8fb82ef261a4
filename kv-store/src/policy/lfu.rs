use super::{EntryId, Policy, Table};
use std::collections::BTreeMap;

/// Least frequently used first, with dynamic ageing: an entry's weight is its uses, counted on from the weight of the
/// last one that went.
#[derive(Debug, Default)]
pub(super) struct Lfu {
    entries: Table<Entry>,
    /// Entries without a shield by weight and last use.
    order: BTreeMap<(u64, u64), EntryId>,
    /// The weight of the entry that went last. It only grows.
    age: u64,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    uses: u64,
    /// Weight and last use.
    place: (u64, u64),
    shielded: bool,
}

impl Policy for Lfu {
    fn insert(&mut self, id: EntryId, _: u64) {
        self.clock += 1;
        let place = (self.age + 1, self.clock);
        self.entries.insert(id, Entry { uses: 1, place, shielded: false });
        self.order.insert(place, id);
    }

    fn touch(&mut self, id: EntryId) {
        self.clock += 1;
        let entry = self.entries.get(id);
        entry.uses += 1;
        let before = std::mem::replace(&mut entry.place, (self.age + entry.uses, self.clock));
        if !entry.shielded {
            self.order.remove(&before);
            self.order.insert(entry.place, id);
        }
    }

    fn shield(&mut self, id: EntryId, shielded: bool) {
        let entry = self.entries.get(id);
        entry.shielded = shielded;
        if shielded {
            self.order.remove(&entry.place);
        } else {
            self.order.insert(entry.place, id);
        }
    }

    fn remove(&mut self, id: EntryId) {
        let entry = self.entries.remove(id);
        self.order.remove(&entry.place);
    }

    fn evict(&mut self) -> Option<EntryId> {
        let ((weight, _), id) = self.order.pop_first()?;
        self.entries.remove(id);
        // What was shielded may be lighter than what went before it.
        self.age = self.age.max(weight);
        Some(id)
    }

    fn evictable(&self) -> usize {
        self.order.len()
    }
}
