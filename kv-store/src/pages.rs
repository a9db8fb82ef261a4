use std::collections::{BTreeMap, HashMap};
use tandem_proto::ids::PageId;
use tandem_proto::keys::ChunkKey;

/// The pages of one pool: who holds them, and which hold a whole chunk under its key.
///
/// A page has any number of holders. Sequences hold the pages of their page table; the pool itself holds the
/// pages of published chunks, and lets go of the chunk unused for longest when pages are wanted.
#[derive(Debug)]
pub struct PagePool {
    /// Holders of each page. A page is in `free` exactly when this is 0.
    holders: Vec<u32>,
    free: Vec<PageId>,
    chunks: HashMap<ChunkKey, Chunk>,
    /// Published chunks by when they were last used. Same entries as `chunks`.
    by_use: BTreeMap<u64, ChunkKey>,
    clock: u64,
    stats: PoolStats,
}

/// What a pool has counted since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolStats {
    /// Chunks found by [`PagePool::match_prefix`].
    pub chunk_hits: u64,
    /// Chunks looked for and not found.
    pub chunk_misses: u64,
    /// Chunks let go to make room.
    pub evicted_chunks: u64,
}

#[derive(Debug)]
struct Chunk {
    pages: Vec<PageId>,
    last_use: u64,
}

impl PagePool {
    /// A pool of `pages` free pages.
    #[must_use]
    pub fn new(pages: u32) -> PagePool {
        PagePool {
            holders: vec![0; pages as usize],
            free: (0..pages).rev().map(PageId).collect(),
            chunks: HashMap::new(),
            by_use: BTreeMap::new(),
            clock: 0,
            stats: PoolStats::default(),
        }
    }

    /// All pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.holders.len()
    }

    /// Pages that can be taken at once: free ones and those that only published chunks hold.
    #[must_use]
    pub fn available(&self) -> usize {
        let evictable = self.chunks.values().filter(|chunk| self.is_unheld(chunk));
        self.free.len() + evictable.map(|chunk| chunk.pages.len()).sum::<usize>()
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.stats
    }

    /// Takes `count` pages, with the caller as their only holder; None, and nothing taken, when there is no room.
    pub fn take(&mut self, count: usize) -> Option<Vec<PageId>> {
        if self.free.len() < count && self.available() < count {
            return None;
        }
        while self.free.len() < count {
            self.evict_oldest_unheld();
        }
        let pages = self.free.split_off(self.free.len() - count);
        for page in &pages {
            self.holders[page.0 as usize] = 1;
        }
        Some(pages)
    }

    /// One more holder for each of these pages, all of which have one.
    pub fn share(&mut self, pages: &[PageId]) {
        for page in pages {
            let holders = &mut self.holders[page.0 as usize];
            assert!(*holders > 0, "page {page} is shared but nobody holds it");
            *holders += 1;
        }
    }

    /// One holder less for each of these pages; those without one are free.
    pub fn release(&mut self, pages: &[PageId]) {
        for page in pages {
            let holders = &mut self.holders[page.0 as usize];
            assert!(*holders > 0, "page {page} is released but nobody holds it");
            *holders -= 1;
            if *holders == 0 {
                self.free.push(*page);
            }
        }
    }

    /// Keeps a chunk whose pages hold all of its KV and will not change again. The caller holds them too.
    pub fn publish(&mut self, key: ChunkKey, pages: &[PageId]) {
        if self.chunks.contains_key(&key) {
            return;
        }
        self.share(pages);
        self.clock += 1;
        self.by_use.insert(self.clock, key);
        self.chunks.insert(key, Chunk { pages: pages.to_vec(), last_use: self.clock });
    }

    /// The pages of the longest run of published chunks that starts `keys`, with the caller as one more holder.
    pub fn match_prefix(&mut self, keys: &[ChunkKey]) -> Vec<PageId> {
        let mut pages = Vec::new();
        for key in keys {
            let Some(chunk) = self.chunks.get_mut(key) else {
                self.stats.chunk_misses += 1;
                break;
            };
            self.stats.chunk_hits += 1;
            self.by_use.remove(&chunk.last_use);
            self.clock += 1;
            chunk.last_use = self.clock;
            self.by_use.insert(self.clock, *key);
            pages.extend_from_slice(&chunk.pages);
        }
        self.share(&pages);
        pages
    }

    /// Whether only the pool holds the chunk.
    fn is_unheld(&self, chunk: &Chunk) -> bool {
        chunk.pages.iter().all(|page| self.holders[page.0 as usize] == 1)
    }

    fn evict_oldest_unheld(&mut self) {
        let oldest = self.by_use.iter().find(|(_, key)| self.is_unheld(&self.chunks[*key]));
        let (last_use, key) = oldest.map(|(t, k)| (*t, *k)).expect("`available` counted evictable pages");
        self.by_use.remove(&last_use);
        let chunk = self.chunks.remove(&key).expect("both maps hold the same chunks");
        self.release(&chunk.pages);
        self.stats.evicted_chunks += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> ChunkKey {
        ChunkKey([n; 32])
    }

    #[test]
    fn published_chunks_are_found_until_their_room_is_needed() {
        let mut pool = PagePool::new(4);
        let a = pool.take(2).unwrap();
        pool.publish(key(1), &a);
        pool.release(&a);
        let b = pool.take(2).unwrap();
        pool.publish(key(2), &b);
        pool.release(&b);
        assert_eq!((pool.free.len(), pool.available()), (0, 4));

        let hit = pool.match_prefix(&[key(1), key(9)]);
        assert_eq!(hit, a);
        // Chunk 1 is held by its reader, so chunk 2 goes although it is younger.
        assert!(pool.take(3).is_none());
        let c = pool.take(2).unwrap();
        assert_eq!(c.iter().collect::<std::collections::BTreeSet<_>>(), b.iter().collect());
        assert!(pool.match_prefix(&[key(2)]).is_empty());
        pool.release(&hit);
        pool.release(&c);
        assert_eq!(pool.available(), 4);
        assert_eq!(pool.stats(), PoolStats { chunk_hits: 1, chunk_misses: 2, evicted_chunks: 1 });
    }

    #[test]
    fn a_failed_take_takes_nothing() {
        let mut pool = PagePool::new(3);
        assert!(pool.take(4).is_none());
        let all = pool.take(3).unwrap();
        assert!(pool.take(1).is_none());
        pool.release(&all);
        assert_eq!(pool.available(), 3);
    }

    #[test]
    #[should_panic(expected = "nobody holds it")]
    fn releasing_twice_is_caught() {
        let mut pool = PagePool::new(1);
        let page = pool.take(1).unwrap();
        pool.release(&page);
        pool.release(&page);
    }
}
