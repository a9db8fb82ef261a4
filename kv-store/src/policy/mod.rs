//! What goes when room is needed. A policy knows ids and how they were used; what an id is, and how much room it takes,
//! is for the tier that asks.

mod lfu;
mod lru;
mod s3fifo;

use std::fmt;
use std::str::FromStr;
use tandem_proto::keys::ChunkKey;

/// An entry of a tier: a slot, a place on a disk. Small numbers, used again when entries are gone: a policy keeps a
/// table as long as the largest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EntryId(pub u32);

/// What a policy knows a chunk by.
pub(crate) fn name(key: &ChunkKey) -> u64 {
    u64::from_le_bytes(*key.0.first_chunk().expect("a key has 32 bytes"))
}

/// An order in which entries go.
pub trait Policy: fmt::Debug + Send {
    /// A new entry. `name` is the same when what went comes back, under whatever id: the first bytes of its key, say.
    ///
    /// # Panics
    /// When the id is there already.
    fn insert(&mut self, id: EntryId, name: u64);

    /// The entry was used.
    ///
    /// # Panics
    /// When it is not there; so do the methods below.
    fn touch(&mut self, id: EntryId);

    /// Keeps the entry from being chosen, or lets it be chosen again. Its place in the order stays.
    fn shield(&mut self, id: EntryId, shielded: bool);

    /// The entry is gone, and not to make room.
    fn remove(&mut self, id: EntryId);

    /// Chooses the entry that goes first, and forgets it; None when there is none that may.
    fn evict(&mut self) -> Option<EntryId>;

    /// Entries that [`Policy::evict`] may choose.
    fn evictable(&self) -> usize;
}

/// A policy by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PolicyKind {
    /// What was unused for longest goes: conversations that come back soon stay.
    #[default]
    Lru,
    /// What was used least goes, of equals what was unused for longest. Uses of the past lose their weight as the
    /// entries around them go, so that nothing stays for having been popular once.
    Lfu,
    /// What is not used again soon after it came goes first, so that a flood of prompts that never return does not
    /// wash out what does (S3-FIFO, SOSP 2023).
    S3Fifo,
}

impl PolicyKind {
    /// An empty policy of this kind.
    #[must_use]
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            PolicyKind::Lru => Box::<lru::Lru>::default(),
            PolicyKind::Lfu => Box::<lfu::Lfu>::default(),
            PolicyKind::S3Fifo => Box::<s3fifo::S3Fifo>::default(),
        }
    }
}

/// No policy has this name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there is no policy {0:?}: choose lru, lfu or s3fifo")]
pub struct UnknownPolicy(pub String);

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<PolicyKind, UnknownPolicy> {
        match name {
            "lru" => Ok(PolicyKind::Lru),
            "lfu" => Ok(PolicyKind::Lfu),
            "s3fifo" => Ok(PolicyKind::S3Fifo),
            _ => Err(UnknownPolicy(name.to_owned())),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PolicyKind::Lru => "lru",
            PolicyKind::Lfu => "lfu",
            PolicyKind::S3Fifo => "s3fifo",
        })
    }
}

/// Entries by id.
#[derive(Debug)]
struct Table<E> {
    entries: Vec<Option<E>>,
}

impl<E> Default for Table<E> {
    fn default() -> Self {
        Table { entries: Vec::new() }
    }
}

impl<E> Table<E> {
    fn insert(&mut self, id: EntryId, entry: E) {
        let at = id.0 as usize;
        if self.entries.len() <= at {
            self.entries.resize_with(at + 1, || None);
        }
        assert!(self.entries[at].is_none(), "entry {} is there already", id.0);
        self.entries[at] = Some(entry);
    }

    fn get(&mut self, id: EntryId) -> &mut E {
        let entry = self.entries.get_mut(id.0 as usize).and_then(Option::as_mut);
        entry.unwrap_or_else(|| panic!("entry {} is not there", id.0))
    }

    fn remove(&mut self, id: EntryId) -> E {
        let entry = self.entries.get_mut(id.0 as usize).and_then(Option::take);
        entry.unwrap_or_else(|| panic!("entry {} is not there", id.0))
    }
}

#[cfg(test)]
mod tests;
