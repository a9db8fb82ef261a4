//! The node's part in the storage-mode cache: chunks on their way from the store's slots to pages, and back.

use crate::outbound::Work;
use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use tandem_kernels::{Kernels, PackError, Ticket};
use tandem_kv_store::tier::disk;
use tandem_kv_store::{Held, Latency, PagePool, Reserved, Store, Tenant};
use tandem_memory::Extent;
use tandem_node::{CacheShown, Conversions};
use tandem_proto::ids::{ChunkIdx, LayerIdx, PageId, RequestId, Time};
use tandem_proto::keys::{ChunkKey, Fingerprint};
use tandem_proto::layout::KvShape;
use tandem_proto::stored::ChunkHeader;
use tandem_proto::wire::CachedTokens;

/// The most that a cache has under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheLimits {
    /// How long a prompt waits for chunks from slower tiers.
    pub patience_us: u64,
    /// Bytes that one turn begins to bring to pages, and to pack, before others get theirs.
    pub turn_bytes: usize,
    /// Bytes that are under way in either direction.
    pub under_way_bytes: usize,
    /// Chunks that wait to be packed, or are being packed. Their pages are held meanwhile.
    pub saves: usize,
}

impl Default for CacheLimits {
    fn default() -> CacheLimits {
        CacheLimits {
            // As long as some thousand tokens take to be computed.
            patience_us: 2_000_000,
            // Some milliseconds of a CPU, which does the work when it is begun.
            turn_bytes: 16 << 20,
            // A GPU has the next ones when it is done with some.
            under_way_bytes: 128 << 20,
            // Of the longest prompts. Whoever needs the pages takes them back.
            saves: 1024,
        }
    }
}

/// The store, and what moves between it and the pages. It never touches the page pool: whose pages are free is told to
/// the node's loop.
pub struct Cache {
    store: Store,
    fingerprint: Fingerprint,
    shape: KvShape,
    limits: CacheLimits,
    loads: BTreeMap<LoadId, Load>,
    /// Those of `loads` with layers that are to be begun, first come first served.
    to_load: VecDeque<LoadId>,
    saves: BTreeMap<SaveId, Save>,
    /// Those of `saves` with layers that are to be begun.
    to_save: VecDeque<SaveId>,
    next_id: u64,
    loading_bytes: usize,
    saving_bytes: usize,
    /// What the node's loop has to know of.
    pub(crate) arrived: VecDeque<Arrived>,
    /// Pages that are packed: one holder less for each.
    pub(crate) packed_pages: Vec<PageId>,
    /// Whether chunks came from slower tiers, or it is known that they will not.
    news: bool,
    load_time: Latency,
    save_time: Latency,
    dropped_queue: u64,
    dropped_pages: u64,
    failed: u64,
}

/// Chunks that a prompt waits for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct LoadId(u64);

/// A chunk that is being packed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct SaveId(u64);

/// A conversion of the cache's.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Moving {
    /// From a slot to pages.
    Load { load: LoadId, chunk: usize, layer: LayerIdx },
    /// From pages to a slot.
    Save { save: SaveId, layer: LayerIdx },
}

/// What became of a load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Arrived {
    /// A chunk is in the pages, and its bytes are those that were stored; so are all before it.
    Chunk { load: LoadId, request: RequestId, chunk: ChunkIdx, from: Option<&'static str> },
    /// No kernel touches the load's pages any more. Unless the node stopped it, what did not come is to be computed.
    Over { load: LoadId, request: RequestId, stopped: bool },
}

struct Load {
    request: RequestId,
    pages: Arc<[PageId]>,
    /// Its place in the prompt.
    first: ChunkIdx,
    chunks: Vec<Loading>,
    /// Chunks that are in the pages and right, from the first on.
    there: usize,
    /// The chunk whose layers are being begun.
    at: usize,
    under_way: usize,
    /// A chunk was wrong, or could not be moved: nothing after it is of use.
    cut: bool,
    /// The node wants none of it.
    stopped: bool,
    begun: Time,
}

struct Loading {
    /// Until no kernel reads its slot any more.
    held: Option<Held>,
    begun: u32,
    over: u32,
    /// The tier that it came from for this prompt.
    from: Option<&'static str>,
    damaged: bool,
    /// All of it was scattered, and right.
    good: bool,
}

struct Save {
    reserved: Reserved,
    pages: Box<[PageId]>,
    checksums: Vec<u64>,
    begun: u32,
    over: u32,
    failed: bool,
    since: Time,
}

impl Cache {
    /// A cache of a model's KV in a store.
    #[must_use]
    pub fn new(store: Store, fingerprint: Fingerprint, shape: KvShape, limits: CacheLimits) -> Cache {
        Cache {
            store,
            fingerprint,
            shape,
            limits,
            loads: BTreeMap::new(),
            to_load: VecDeque::new(),
            saves: BTreeMap::new(),
            to_save: VecDeque::new(),
            next_id: 0,
            loading_bytes: 0,
            saving_bytes: 0,
            arrived: VecDeque::new(),
            packed_pages: Vec::new(),
            news: false,
            load_time: Latency::default(),
            save_time: Latency::default(),
            dropped_queue: 0,
            dropped_pages: 0,
            failed: 0,
        }
    }

    /// Whose chunks count together. Tenants whose salts share a hash share a quota, and never chunks.
    pub(crate) fn tenant(salt: &[u8]) -> Tenant {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        Tenant(hasher.finish())
    }

    /// Begins to bring what slower tiers have of this prefix. Tells until when a prompt waits for it, if it does.
    pub(crate) fn prefetch(&mut self, now: Time, tenant: Tenant, keys: &[ChunkKey]) -> Option<Time> {
        let until = now.after_us(self.limits.patience_us);
        self.store.prefetch(now, tenant, keys, until).then_some(until)
    }

    /// Whether slower tiers still bring chunks of this prefix.
    pub(crate) fn is_coming(&self, keys: &[ChunkKey]) -> bool {
        let coming = self.store.coming(keys);
        coming.asking || coming.chunks > 0
    }

    /// A prompt uses these chunks from its pages: so they are worth keeping.
    pub(crate) fn touch(&mut self, keys: &[ChunkKey]) {
        self.store.touch(keys);
    }

    /// Takes in what tiers answered.
    pub(crate) fn poll(&mut self, now: Time) {
        self.news |= self.store.poll(now);
    }

    /// Whether there was news of chunks from slower tiers since this was last asked.
    pub(crate) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// When [`Cache::poll`] has something to do though no tier called.
    pub(crate) fn next_timeout(&self) -> Option<Time> {
        self.store.next_timeout()
    }

    /// Whether it has something for the node's loop, or for the next turn, at once.
    pub(crate) fn has_news(&self) -> bool {
        let loads = !self.to_load.is_empty() && self.loading_bytes < self.limits.under_way_bytes;
        let saves = !self.to_save.is_empty() && self.saving_bytes < self.limits.under_way_bytes;
        self.news || loads || saves || !self.arrived.is_empty() || !self.packed_pages.is_empty()
    }

    /// Chunks that are being packed or wait for it, and those that slower tiers are to store.
    pub(crate) fn saving(&self) -> usize {
        self.saves.len() + self.store.queued()
    }

    /// Everything that is not over: what a node at rest has none of.
    pub(crate) fn under_way(&self) -> usize {
        let store = self.store.held() + self.store.reserved() + self.store.prefetches();
        self.loads.len() + self.saves.len() + store + self.store.pool().holds()
    }

    /// Begins to bring the longest run of `keys` that is in the host pool to a prompt's pages, which are the load's until
    /// it is over. None when there is no such chunk.
    pub(crate) fn load(
        &mut self,
        now: Time,
        request: RequestId,
        pages: &Arc<[PageId]>,
        first: ChunkIdx,
        keys: &[ChunkKey],
    ) -> Option<LoadId> {
        let held = self.store.hold(now, keys);
        if held.is_empty() {
            return None;
        }
        let loading = |held: Held| Loading {
            from: held.from(),
            held: Some(held),
            begun: 0,
            over: 0,
            damaged: false,
            good: false,
        };
        let load = Load {
            request,
            pages: Arc::clone(pages),
            first,
            chunks: held.into_iter().map(loading).collect(),
            there: 0,
            at: 0,
            under_way: 0,
            cut: false,
            stopped: false,
            begun: now,
        };
        let id = LoadId(self.new_id());
        self.loads.insert(id, load);
        self.to_load.push_back(id);
        Some(id)
    }

    /// Nobody wants the load any more: it is over when no kernel touches its pages.
    pub(crate) fn stop(&mut self, now: Time, id: LoadId) {
        if let Some(load) = self.loads.get_mut(&id) {
            load.stopped = true;
            self.settle(now, id);
        }
    }

    /// Begins to scatter what waits for it, as much as one turn may.
    pub(crate) fn begin_loads<K: Kernels>(
        &mut self,
        now: Time,
        kernels: &mut Conversions<K, Work>,
        kv: &mut K::Pages,
    ) {
        let mut begun_bytes = 0;
        while begun_bytes < self.limits.turn_bytes
            && self.loading_bytes < self.limits.under_way_bytes
            && let Some(&id) = self.to_load.front()
        {
            let load = self.loads.get_mut(&id).expect("what is to be begun is not over");
            let (at, chunk) = (load.at, &mut load.chunks[load.at]);
            let layer = LayerIdx(chunk.begun);
            let held = chunk.held.as_ref().expect("it is held until all of it was begun");
            let part = held.header().layer(layer);
            let packed = held.extent().part(part).expect("a slot holds all layers");
            let (place, tokens) = (ChunkIdx(load.first.0 + at as u32), self.shape.chunk_tokens);
            let pages = &load.pages[self.shape.chunk_pages(place, (place.0 + 1) * tokens)];
            let of = Work::Cache(Moving::Load { load: id, chunk: at, layer });
            let begun = kernels.begin(of, |kernels, ticket| {
                begin_to_scatter(kernels, ticket, kv, layer, pages, tokens, &packed)
            });
            match begun {
                Ok(()) => {
                    chunk.begun += 1;
                    load.under_way += 1;
                    begun_bytes += packed.len();
                    self.loading_bytes += packed.len();
                    if chunk.begun == self.shape.layers {
                        load.at += 1;
                    }
                    if load.at == load.chunks.len() {
                        self.to_load.pop_front();
                    }
                }
                Err((_, error)) => {
                    tracing::warn!(key = ?held.key(), %layer, %error, "a stored chunk cannot be brought to pages");
                    load.cut = true;
                    self.settle(now, id);
                }
            }
        }
    }

    /// Begins to pack what waits for it, as much as one turn may.
    pub(crate) fn begin_saves<K: Kernels>(
        &mut self,
        now: Time,
        kernels: &mut Conversions<K, Work>,
        kv: &K::Pages,
    ) {
        let mut begun_bytes = 0;
        while begun_bytes < self.limits.turn_bytes
            && self.saving_bytes < self.limits.under_way_bytes
            && let Some(&id) = self.to_save.front()
        {
            let save = self.saves.get_mut(&id).expect("what is to be begun is not over");
            let layer = LayerIdx(save.begun);
            let tokens = self.shape.chunk_tokens;
            let part = self.shape.packed_layer(layer, tokens);
            let out = save.reserved.extent().part(part).expect("a slot holds all layers");
            let of = Work::Cache(Moving::Save { save: id, layer });
            let pages = &save.pages;
            let begun = kernels
                .begin(of, |kernels, ticket| begin_to_pack(kernels, ticket, kv, layer, pages, tokens, &out));
            match begun {
                Ok(()) => {
                    save.begun += 1;
                    begun_bytes += out.len();
                    self.saving_bytes += out.len();
                    if save.begun == self.shape.layers {
                        self.to_save.pop_front();
                    }
                }
                Err((_, error)) => {
                    tracing::warn!(key = ?save.reserved.key(), %layer, %error, "a chunk cannot be packed");
                    save.failed = true;
                    self.failed += 1;
                    self.to_save.pop_front();
                    self.end_save(now, id);
                }
            }
        }
    }

    /// A conversion is over.
    pub(crate) fn over(&mut self, now: Time, moving: Moving, checksum: u64) {
        match moving {
            Moving::Load { load: id, chunk, layer } => {
                let load = self.loads.get_mut(&id).expect("it is not over while something is under way");
                load.under_way -= 1;
                let loading = &mut load.chunks[chunk];
                loading.over += 1;
                let header = loading.held.as_ref().expect("held while it is read").header();
                self.loading_bytes -= header.layer(layer).len();
                if header.checksums[layer.0 as usize] != checksum && !loading.damaged {
                    tracing::warn!(key = ?header.key, %layer, "a stored chunk is damaged: it is computed instead");
                    loading.damaged = true;
                    load.cut = true;
                }
                self.settle(now, id);
            }
            Moving::Save { save: id, layer } => {
                let save = self.saves.get_mut(&id).expect("it is not over while something is under way");
                save.over += 1;
                save.checksums[layer.0 as usize] = checksum;
                self.saving_bytes -= self.shape.packed_layer(layer, self.shape.chunk_tokens).len();
                self.end_save(now, id);
            }
        }
    }

    /// Lets go of chunks that are done with, tells of those that are there, and ends the load if it is over.
    fn settle(&mut self, now: Time, id: LoadId) {
        let load = self.loads.get_mut(&id).expect("the caller has it");
        let ends = load.cut || load.stopped;
        let layers = self.shape.layers;
        for chunk in &mut load.chunks[load.there..] {
            if chunk.begun == 0 && !ends {
                break;
            }
            let all = chunk.begun == layers;
            if chunk.over < chunk.begun || !(all || ends) {
                continue;
            }
            let Some(held) = chunk.held.take() else { continue };
            chunk.good = all && !chunk.damaged;
            if chunk.damaged {
                self.store.discard(now, held);
            } else {
                self.store.release(held);
            }
        }
        while let Some(chunk) = load.chunks.get(load.there).filter(|chunk| chunk.good) {
            let place = ChunkIdx(load.first.0 + load.there as u32);
            let from = chunk.from;
            if !load.stopped {
                let request = load.request;
                self.arrived.push_back(Arrived::Chunk { load: id, request, chunk: place, from });
            }
            load.there += 1;
        }
        let all = load.there == load.chunks.len();
        if ends {
            self.to_load.retain(|load| *load != id);
        }
        if (ends || all) && load.under_way == 0 {
            let load = self.loads.remove(&id).expect("it was just there");
            self.load_time.add(now.since_us(load.begun));
            let Load { request, stopped, .. } = load;
            self.arrived.push_back(Arrived::Over { load: id, request, stopped });
        }
    }

    /// Begins to save a computed chunk, whose pages the caller holds once more until they are in `packed_pages`. False
    /// when it is not saved: it is stored already, or there is no room, or too much is under way.
    #[must_use]
    pub(crate) fn save(&mut self, now: Time, key: ChunkKey, tenant: Tenant, pages: &[PageId]) -> bool {
        if self.saves.len() >= self.limits.saves {
            self.dropped_queue += 1;
            return false;
        }
        let Ok(reserved) = self.store.reserve(now, key, tenant) else { return false };
        let save = Save {
            reserved,
            pages: pages.into(),
            checksums: vec![0; self.shape.layers as usize],
            begun: 0,
            over: 0,
            failed: false,
            since: now,
        };
        let id = SaveId(self.new_id());
        self.saves.insert(id, save);
        self.to_save.push_back(id);
        true
    }

    /// Saves that have not begun.
    fn waiting_saves(&self) -> impl Iterator<Item = (SaveId, &Save)> {
        self.to_save.iter().map(|id| (*id, &self.saves[id])).filter(|(_, save)| save.begun == 0)
    }

    /// Pages that only saves which have not begun need.
    pub(crate) fn waiting_pages(&self, pool: &PagePool) -> usize {
        self.waiting_saves().map(|(_, save)| pool.freed_by(&save.pages)).sum()
    }

    /// Gives up saves that have not begun, for somebody who needs their pages.
    pub(crate) fn give_up_saves(&mut self, now: Time) {
        let waiting: Vec<SaveId> = self.waiting_saves().map(|(id, _)| id).collect();
        self.to_save.retain(|id| self.saves[id].begun > 0);
        self.dropped_pages += waiting.len() as u64;
        for id in &waiting {
            self.saves.get_mut(id).expect("it waits").failed = true;
            self.end_save(now, *id);
        }
    }

    /// Publishes the chunk if all of it is packed.
    fn end_save(&mut self, now: Time, id: SaveId) {
        let save = &self.saves[&id];
        if save.over < save.begun || !(save.failed || save.begun == self.shape.layers) {
            return;
        }
        let Save { reserved, pages, checksums, failed, since, .. } =
            self.saves.remove(&id).expect("it was just there");
        self.packed_pages.extend_from_slice(&pages);
        if failed {
            self.store.abandon(reserved);
            return;
        }
        self.save_time.add(now.since_us(since));
        let header = ChunkHeader {
            key: reserved.key(),
            fingerprint: self.fingerprint,
            shape: self.shape,
            tokens: self.shape.chunk_tokens,
            checksums,
        };
        self.store.publish(now, reserved, header);
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// What it shows of itself.
    pub(crate) fn shown(&self) -> CacheShown {
        CacheShown {
            store: self.store.stats(),
            chunk_bytes: self.store.pool().slot_bytes() as u64,
            loading: self.loads.len(),
            saving: self.saves.len(),
            load_time: self.load_time,
            save_time: self.save_time,
            dropped_queue: self.dropped_queue,
            dropped_pages: self.dropped_pages,
            failed: self.failed,
            ..CacheShown::default()
        }
    }
}

/// Counts tokens that came from a tier.
pub(crate) fn count(cached: &mut CachedTokens, from: Option<&'static str>, tokens: u32) {
    *match from {
        None => &mut cached.host,
        Some(disk::NAME) => &mut cached.disk,
        Some(_) => &mut cached.remote,
    } += tokens;
}

/// Begins to scatter a layer of a chunk that is held.
#[allow(unsafe_code)]
fn begin_to_scatter<K: Kernels>(
    kernels: &mut K,
    ticket: Ticket,
    kv: &mut K::Pages,
    layer: LayerIdx,
    pages: &[PageId],
    tokens: u32,
    packed: &Extent,
) -> Result<(), PackError> {
    // SAFETY: nobody writes a slot whose chunk is published while somebody holds it, and the chunk is held until the
    // kernels have reported that they are done with it.
    unsafe { kernels.scatter(ticket, kv, layer, pages, tokens, packed) }
}

/// Begins to pack a layer into a slot that is reserved.
#[allow(unsafe_code)]
fn begin_to_pack<K: Kernels>(
    kernels: &mut K,
    ticket: Ticket,
    kv: &K::Pages,
    layer: LayerIdx,
    pages: &[PageId],
    tokens: u32,
    out: &Extent,
) -> Result<(), PackError> {
    // SAFETY: a reserved slot is touched by nobody else, and it is published or given back only after the kernels have
    // reported that they are done with it.
    unsafe { kernels.pack(ticket, kv, layer, pages, tokens, out) }
}
