use super::{EntryId, Policy, Table};
use std::collections::{BTreeMap, HashMap};

/// The small queue's share of all entries: one of so many.
const SMALL_SHARE: usize = 10;
/// Uses are counted up to here.
const MAX_USES: u8 = 3;

/// Two queues. What is new waits in the small one, and moves to the main one if it was used by the time it is at the
/// head; if not, it goes, and its name is remembered for as long as there are entries. Who comes back while its name is
/// remembered starts in the main queue. There, each use buys one more round.
#[derive(Debug, Default)]
pub(super) struct S3Fifo {
    entries: Table<Entry>,
    /// Entries without a shield in the order in which they came, as is `main`.
    small: BTreeMap<u64, EntryId>,
    main: BTreeMap<u64, EntryId>,
    /// Names of those that went from the small queue, by when they did.
    gone: BTreeMap<u64, u64>,
    /// When each name in `gone` went.
    gone_at: HashMap<u64, u64>,
    count: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    name: u64,
    came: u64,
    main: bool,
    uses: u8,
    shielded: bool,
}

impl S3Fifo {
    fn queue(&mut self, main: bool) -> &mut BTreeMap<u64, EntryId> {
        if main { &mut self.main } else { &mut self.small }
    }

    /// Puts the entry, which is in neither queue, at the end of the main one.
    fn requeue(&mut self, id: EntryId, uses: u8) {
        self.clock += 1;
        let entry = self.entries.get(id);
        (entry.main, entry.came, entry.uses) = (true, self.clock, uses);
        self.main.insert(self.clock, id);
    }

    fn remember(&mut self, name: u64) {
        self.clock += 1;
        if let Some(before) = self.gone_at.insert(name, self.clock) {
            self.gone.remove(&before);
        }
        self.gone.insert(self.clock, name);
        while self.gone.len() > self.count.max(1) {
            let (_, name) = self.gone.pop_first().expect("there are more than none");
            self.gone_at.remove(&name);
        }
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, id: EntryId, name: u64) {
        self.clock += 1;
        let back = self.gone_at.remove(&name);
        if let Some(at) = back {
            self.gone.remove(&at);
        }
        let (came, main) = (self.clock, back.is_some());
        self.entries.insert(id, Entry { name, came, main, uses: 0, shielded: false });
        self.queue(main).insert(came, id);
        self.count += 1;
    }

    fn touch(&mut self, id: EntryId) {
        let entry = self.entries.get(id);
        entry.uses = MAX_USES.min(entry.uses + 1);
    }

    fn shield(&mut self, id: EntryId, shielded: bool) {
        let entry = self.entries.get(id);
        entry.shielded = shielded;
        let (came, main) = (entry.came, entry.main);
        if shielded {
            self.queue(main).remove(&came);
        } else {
            self.queue(main).insert(came, id);
        }
    }

    fn remove(&mut self, id: EntryId) {
        let Entry { came, main, .. } = self.entries.remove(id);
        self.queue(main).remove(&came);
        self.count -= 1;
    }

    fn evict(&mut self) -> Option<EntryId> {
        loop {
            let from_small = self.small.len() > self.evictable() / SMALL_SHARE || self.main.is_empty();
            let (_, id) = self.queue(!from_small).pop_first()?;
            let uses = self.entries.get(id).uses;
            // A use of a chunk comes with the next turn of its conversation, so one is enough to leave the small queue.
            match (from_small, uses) {
                (_, 0) => {
                    let name = self.entries.remove(id).name;
                    self.count -= 1;
                    if from_small {
                        self.remember(name);
                    }
                    return Some(id);
                }
                (true, _) => self.requeue(id, 0),
                (false, uses) => self.requeue(id, uses - 1),
            }
        }
    }

    fn evictable(&self) -> usize {
        self.small.len() + self.main.len()
    }
}
