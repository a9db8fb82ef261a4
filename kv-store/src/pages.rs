use std::collections::{BTreeMap, HashMap};
use tandem_proto::ids::PageId;
use tandem_proto::keys::ChunkKey;

/// The pages of one pool: who holds them, and which hold a whole chunk under its key.
///
/// A page has any number of holders. Sequences hold the pages of their page table; the pool itself holds the
/// pages of published chunks, and lets go of the chunk unused for longest when pages are wanted. A chunk is
/// idle while the pool is the only holder of all its pages. Every operation costs time for the pages it
/// names, none for those that the pool holds besides.
#[derive(Debug)]
pub struct PagePool {
    pages: Vec<Page>,
    free: Vec<PageId>,
    chunks: HashMap<ChunkKey, Chunk>,
    /// Idle chunks by when they were last used.
    idle: BTreeMap<u64, ChunkKey>,
    /// Pages of idle chunks.
    idle_pages: usize,
    clock: u64,
    stats: PoolStats,
}

#[derive(Clone, Debug, Default)]
struct Page {
    /// A page is in `free` exactly when this is 0.
    holders: u32,
    /// The published chunk that it is part of.
    chunk: Option<ChunkKey>,
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
    /// Pages that somebody besides the pool holds.
    held: u32,
}

impl PagePool {
    /// A pool of `pages` free pages.
    #[must_use]
    pub fn new(pages: u32) -> PagePool {
        PagePool {
            pages: vec![Page::default(); pages as usize],
            free: (0..pages).rev().map(PageId).collect(),
            chunks: HashMap::new(),
            idle: BTreeMap::new(),
            idle_pages: 0,
            clock: 0,
            stats: PoolStats::default(),
        }
    }

    /// All pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that can be taken at once: free ones and those that only published chunks hold.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.len() + self.idle_pages
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.stats
    }

    /// Takes `count` pages, with the caller as their only holder; None, and nothing taken, when there is no room.
    pub fn take(&mut self, count: usize) -> Option<Vec<PageId>> {
        if self.available() < count {
            return None;
        }
        while self.free.len() < count {
            self.evict_oldest();
        }
        let pages = self.free.split_off(self.free.len() - count);
        for page in &pages {
            self.pages[page.0 as usize].holders = 1;
        }
        Some(pages)
    }

    /// One more holder for each of these pages, all of which have one.
    pub fn share(&mut self, pages: &[PageId]) {
        for id in pages {
            let page = &mut self.pages[id.0 as usize];
            assert!(page.holders > 0, "page {id} is shared but nobody holds it");
            page.holders += 1;
            if page.holders == 2
                && let Some(key) = page.chunk
            {
                let chunk = self.chunks.get_mut(&key).expect("pages name chunks that are there");
                chunk.held += 1;
                if chunk.held == 1 {
                    self.idle.remove(&chunk.last_use);
                    self.idle_pages -= chunk.pages.len();
                }
            }
        }
    }

    /// One holder less for each of these pages; those without one are free.
    pub fn release(&mut self, pages: &[PageId]) {
        for id in pages {
            let page = &mut self.pages[id.0 as usize];
            assert!(page.holders > 0, "page {id} is released but nobody holds it");
            page.holders -= 1;
            match (page.holders, page.chunk) {
                (0, _) => self.free.push(*id),
                (1, Some(key)) => {
                    let chunk = self.chunks.get_mut(&key).expect("pages name chunks that are there");
                    chunk.held -= 1;
                    if chunk.held == 0 {
                        self.idle.insert(chunk.last_use, key);
                        self.idle_pages += chunk.pages.len();
                    }
                }
                _ => {}
            }
        }
    }

    /// How many of these pages could be taken if one holder of each, who is not the pool, let go.
    #[must_use]
    pub fn freed_by(&self, pages: &[PageId]) -> usize {
        let alone = |page: &Page| page.holders == 1 + u32::from(page.chunk.is_some());
        pages.iter().filter(|id| alone(&self.pages[id.0 as usize])).count()
    }

    /// Keeps a chunk whose pages hold all of its KV and will not change again. The caller holds them too.
    ///
    /// # Panics
    /// When a page is part of another chunk already, or nobody holds it.
    pub fn publish(&mut self, key: ChunkKey, pages: &[PageId]) {
        if self.chunks.contains_key(&key) {
            return;
        }
        self.share(pages);
        for id in pages {
            let page = &mut self.pages[id.0 as usize];
            assert!(page.chunk.is_none(), "page {id} is part of two chunks");
            page.chunk = Some(key);
        }
        self.clock += 1;
        let held = pages.len() as u32;
        self.chunks.insert(key, Chunk { pages: pages.to_vec(), last_use: self.clock, held });
    }

    /// How many of `keys`, from the first on, are published chunks.
    #[must_use]
    pub fn prefix(&self, keys: &[ChunkKey]) -> usize {
        keys.iter().take_while(|key| self.chunks.contains_key(key)).count()
    }

    /// The pages of the longest run of published chunks that starts `keys`, with the caller as one more holder.
    pub fn match_prefix(&mut self, keys: &[ChunkKey]) -> Vec<PageId> {
        let mut found = Vec::new();
        for key in keys {
            let Some(pages) = self.chunks.get(key).map(|chunk| chunk.pages.clone()) else {
                self.stats.chunk_misses += 1;
                break;
            };
            self.stats.chunk_hits += 1;
            // Held from here on, it is in no order of use until it is idle again.
            self.share(&pages);
            self.clock += 1;
            self.chunks.get_mut(key).expect("just found").last_use = self.clock;
            found.extend(pages);
        }
        found
    }

    fn evict_oldest(&mut self) {
        let (_, key) = self.idle.pop_first().expect("`available` counted idle chunks");
        let chunk = self.chunks.remove(&key).expect("idle chunks are chunks");
        self.idle_pages -= chunk.pages.len();
        for id in &chunk.pages {
            self.pages[id.0 as usize].chunk = None;
        }
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

        assert_eq!(pool.prefix(&[key(1), key(9)]), 1);
        assert_eq!(pool.freed_by(&a), 0);
        let hit = pool.match_prefix(&[key(1), key(9)]);
        assert_eq!(hit, a);
        assert_eq!(pool.freed_by(&hit), 2);
        // Chunk 1 is held by its reader, so chunk 2 goes although it is younger.
        assert!(pool.take(3).is_none());
        let c = pool.take(2).unwrap();
        assert_eq!(c.iter().collect::<std::collections::BTreeSet<_>>(), b.iter().collect());
        assert_eq!(pool.prefix(&[key(2)]), 0);
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

    /// Every number that the pool keeps, against counting anew.
    #[test]
    fn numbers_agree_with_a_recount() {
        let mut pool = PagePool::new(48);
        let mut rng = 1u64;
        let mut random = |n: u64| {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (rng >> 33) % n
        };
        let mut held: Vec<Vec<PageId>> = Vec::new();
        for _ in 0..20_000 {
            match random(8) {
                0 | 1 => held.extend(pool.take(1 + random(3) as usize * 4)),
                2..=4 if !held.is_empty() => {
                    let pages = held.swap_remove(random(held.len() as u64) as usize);
                    pool.release(&pages);
                }
                5 | 6 if !held.is_empty() => {
                    let pages = held[random(held.len() as u64) as usize].clone();
                    for chunk in pages.chunks_exact(4) {
                        if pool.pages[chunk[0].0 as usize].chunk.is_none() {
                            pool.publish(key(random(16) as u8), chunk);
                        }
                    }
                }
                _ => {
                    let start = random(16) as u8;
                    let pages = pool.match_prefix(&[key(start), key((start + 1) % 16)]);
                    held.extend((!pages.is_empty()).then_some(pages));
                }
            }
            let only_pool =
                |chunk: &&Chunk| chunk.pages.iter().all(|p| pool.pages[p.0 as usize].holders == 1);
            let idle: Vec<_> = pool.chunks.values().filter(only_pool).collect();
            assert_eq!(idle.iter().map(|chunk| chunk.pages.len()).sum::<usize>(), pool.idle_pages);
            assert_eq!(idle.len(), pool.idle.len());
            let unheld = pool.pages.iter().filter(|page| page.holders == 0).count();
            assert_eq!(unheld, pool.free.len());
            for (page, kept) in pool.pages.iter().enumerate() {
                let holders = held.iter().flatten().filter(|p| p.0 as usize == page).count();
                assert_eq!(kept.holders as usize, holders + usize::from(kept.chunk.is_some()));
            }
        }
        assert!(pool.stats.evicted_chunks > 100 && pool.stats.chunk_hits > 100, "{:?}", pool.stats);
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
