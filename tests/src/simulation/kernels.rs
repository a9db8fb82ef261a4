//! Kernels that take their time, as a GPU's do: what they read and write, they read and write at any moment until they
//! say that it is over.

use super::breaks::{Break, SharedSeen};
use super::chance::Rng;
use super::model::SHAPE;
use std::sync::{Arc, Mutex, MutexGuard};
use tandem_kernels::{
    Converted, Kernels, KvPages, PackError, Paged, PagesError, Ticket, checksum, pack_layer, scatter_layer,
};
use tandem_memory::{Extent, HostRegion, RegionError};
use tandem_node::Clock;
use tandem_proto::ids::{LayerIdx, NodeId, PageId, Time};
use tandem_proto::layout::KvShape;

/// Pages that conversions use while others do.
#[derive(Clone)]
pub(super) struct SimPages {
    pages: Arc<Mutex<KvPages>>,
    count: u32,
}

impl SimPages {
    pub(super) fn new(count: u32) -> SimPages {
        let pages = KvPages::new(SHAPE, count).expect("a small pool");
        SimPages { pages: Arc::new(Mutex::new(pages)), count }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, KvPages> {
        self.pages.lock().expect("one thread")
    }
}

impl Paged for SimPages {
    fn shape(&self) -> &KvShape {
        &SHAPE
    }
    fn pages(&self) -> u32 {
        self.count
    }
    fn copy_page(&mut self, from: PageId, to: PageId) -> Result<(), PagesError> {
        self.lock().copy_page(from, to)
    }
}

/// See the module.
pub(super) struct SimKernels {
    pub(super) node: NodeId,
    pub(super) clock: Clock,
    pub(super) seen: SharedSeen,
    pub(super) broken: Option<Break>,
    /// A slot may be scattered to several places at a time: it is a stored chunk's.
    pub(super) shared_slots: bool,
    /// Draws how long each conversion takes. Without it, it is over at once.
    pub(super) slow: Option<Rng>,
    pub(super) begun: Vec<Begun>,
}

pub(super) struct Begun {
    ticket: Ticket,
    what: What,
    kv: SimPages,
    layer: LayerIdx,
    pages: Vec<PageId>,
    tokens: u32,
    extent: Extent,
    over: Time,
    /// Its checksum, if the work was done when it was begun.
    done: Option<u64>,
    /// A break has told already that it is over.
    told: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Pack,
    Scatter,
}

impl Begun {
    #[allow(unsafe_code)]
    fn work(&self) -> Result<u64, PackError> {
        let Begun { kv, layer, pages, tokens, extent, .. } = self;
        match self.what {
            // SAFETY: the node promised that nobody else uses the bytes before it is told that this is over. Where a
            // break of the rules has it use them nonetheless, it is on this same thread, between calls.
            What::Pack => pack_layer(&kv.lock(), *layer, pages, *tokens, unsafe { extent.bytes_mut() }),
            // SAFETY: as above.
            What::Scatter => scatter_layer(&mut kv.lock(), *layer, pages, *tokens, unsafe { extent.bytes() }),
        }
    }

    /// The checksum, if nobody disturbs the work.
    #[allow(unsafe_code)]
    fn foreseen(&self) -> u64 {
        let Begun { kv, layer, pages, tokens, extent, .. } = self;
        // SAFETY: as in `work`.
        let mut packed = unsafe { extent.bytes() }.to_vec();
        if self.what == What::Pack {
            pack_layer(&kv.lock(), *layer, pages, *tokens, &mut packed).expect("a pack that fits");
        }
        checksum(&packed)
    }

    /// Whether both would use a slot, or write a page, at the same time.
    fn disturbs(&self, other: &Begun, shared_slots: bool) -> bool {
        let range = |begun: &Begun| begun.extent.offset()..begun.extent.offset() + begun.extent.len();
        let (a, b) = (range(self), range(other));
        let both_read = shared_slots && self.what == What::Scatter && other.what == What::Scatter;
        let same_region = Arc::ptr_eq(self.extent.region(), other.extent.region());
        let slot = same_region && a.start < b.end && b.start < a.end && !both_read;
        let page = self.what == What::Scatter
            && self.layer == other.layer
            && self.pages.iter().any(|page| other.pages.contains(page));
        slot || page
    }
}

impl SimKernels {
    fn begin(&mut self, mut begun: Begun) -> Result<(), PackError> {
        if self.begun.iter().any(|other| other.disturbs(&begun, self.shared_slots)) {
            let what = format!("{:?} lets two conversions use one slot or page at a time", self.node);
            self.seen.lock().expect("one thread").violations.push(what);
        }
        match &mut self.slow {
            None => begun.done = Some(begun.work()?),
            Some(rng) => {
                let us = if rng.chance(0.05) { rng.between(1_000, 50_000) } else { rng.between(1, 400) };
                begun.over = self.clock.now().after_us(us);
                if rng.chance(0.5) {
                    begun.done = Some(begun.work()?);
                }
            }
        }
        self.begun.push(begun);
        Ok(())
    }

    /// Whether a break has it tell that this is over as soon as it is begun.
    fn tells_too_soon(&self, begun: &Begun) -> bool {
        let breaks = match begun.what {
            What::Pack => Break::SentBeforePacked,
            What::Scatter => Break::SlotFreedWhileRead,
        };
        self.broken == Some(breaks) && !begun.told && begun.done.is_none()
    }
}

#[allow(unsafe_code)]
impl Kernels for SimKernels {
    type Pages = SimPages;
    type Error = RegionError;

    fn memory(&self, len: usize) -> Result<Arc<HostRegion>, RegionError> {
        HostRegion::map(len)
    }

    fn host_memory(&self, len: usize) -> Result<Arc<HostRegion>, RegionError> {
        HostRegion::map(len)
    }

    unsafe fn pack(
        &mut self,
        ticket: Ticket,
        kv: &SimPages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        out: &Extent,
    ) -> Result<(), PackError> {
        let (kv, pages, extent) = (kv.clone(), pages.to_vec(), out.clone());
        let (over, what) = (self.clock.now(), What::Pack);
        self.begin(Begun { ticket, what, kv, layer, pages, tokens, extent, over, done: None, told: false })
    }

    unsafe fn scatter(
        &mut self,
        ticket: Ticket,
        kv: &mut SimPages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        packed: &Extent,
    ) -> Result<(), PackError> {
        let (kv, pages, extent) = (kv.clone(), pages.to_vec(), packed.clone());
        let (over, what) = (self.clock.now(), What::Scatter);
        self.begin(Begun { ticket, what, kv, layer, pages, tokens, extent, over, done: None, told: false })
    }

    fn poll(&mut self, done: &mut Vec<Converted>) -> Result<(), RegionError> {
        let now = self.clock.now();
        for at in 0..self.begun.len() {
            if self.tells_too_soon(&self.begun[at]) {
                // What it will be, if nobody spoils it.
                let checksum = self.begun[at].foreseen();
                self.begun[at].told = true;
                done.push(Converted { ticket: self.begun[at].ticket, checksum });
            }
        }
        for begun in self.begun.extract_if(.., |begun| begun.over <= now) {
            let checksum = begun.done.map_or_else(|| begun.work(), Ok).expect("it fitted when it was begun");
            if !begun.told {
                done.push(Converted { ticket: begun.ticket, checksum });
            }
        }
        Ok(())
    }

    fn under_way(&self) -> usize {
        self.begun.len()
    }
}
