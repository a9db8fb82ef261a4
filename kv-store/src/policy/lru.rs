use super::{EntryId, Policy, Table};
use std::collections::BTreeMap;

/// Least recently used first.
#[derive(Debug, Default)]
pub(super) struct Lru {
    entries: Table<Entry>,
    /// Entries without a shield by their last use.
    order: BTreeMap<u64, EntryId>,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    used: u64,
    shielded: bool,
}

impl Policy for Lru {
    fn insert(&mut self, id: EntryId, _: u64) {
        self.clock += 1;
        self.entries.insert(id, Entry { used: self.clock, shielded: false });
        self.order.insert(self.clock, id);
    }

    fn touch(&mut self, id: EntryId) {
        self.clock += 1;
        let entry = self.entries.get(id);
        let before = std::mem::replace(&mut entry.used, self.clock);
        if !entry.shielded {
            self.order.remove(&before);
            self.order.insert(self.clock, id);
        }
    }

    fn shield(&mut self, id: EntryId, shielded: bool) {
        let entry = self.entries.get(id);
        entry.shielded = shielded;
        if shielded {
            self.order.remove(&entry.used);
        } else {
            self.order.insert(entry.used, id);
        }
    }

    fn remove(&mut self, id: EntryId) {
        let entry = self.entries.remove(id);
        self.order.remove(&entry.used);
    }

    fn evict(&mut self) -> Option<EntryId> {
        let (_, id) = self.order.pop_first()?;
        self.entries.remove(id);
        Some(id)
    }

    fn evictable(&self) -> usize {
        self.order.len()
    }
}
