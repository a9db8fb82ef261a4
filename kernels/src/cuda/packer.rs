//! The node's conversions on a GPU: as few launches as there can be, on a stream of their own.

use super::{Chunk, CudaKernels, DevicePages, KvDevicePages, Place, Plan, PlanError, PlanLimits, Share};
use crate::pack::{check, check_distinct};
use crate::{Converted, Kernels, PackError, Ticket};
use cudarc::driver::{CudaEvent, CudaStream};
use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use tandem_memory::cuda::DeviceExtent;
use tandem_memory::{Extent, HostRegion};
use tandem_proto::ids::{LayerIdx, PageId};
use tandem_proto::layout::KvShape;

/// [`Kernels`] on a GPU. Packed KV lies in the twins of its [`Kernels::memory`], or in its [`Kernels::host_memory`], which
/// it reads and writes over the link to the host.
///
/// What is asked for between two polls becomes one launch, if it waits for the same layer of the engine, or for none.
/// Conversions within the GPU, to the host and from it do not wait for each other.
pub struct CudaPacker {
    kernels: Arc<CudaKernels>,
    within: Lane,
    to_host: Lane,
    from_host: Lane,
}

/// Conversions that come one after the other.
struct Lane {
    kernels: Arc<CudaKernels>,
    stream: Arc<CudaStream>,
    share: Share,
    limits: PlanLimits,
    /// Not given to the GPU yet.
    asked: VecDeque<Asked>,
    /// Plans of launches that are over.
    idle: Vec<Plan>,
    /// In the stream's order.
    launched: VecDeque<Launched>,
    /// Conversions of `launched`.
    running: usize,
}

struct Asked {
    ticket: Ticket,
    way: Way,
    /// The engine's work that it waits for.
    after: Option<Arc<CudaEvent>>,
    /// The pool as one layer of all layers' pages: so one launch reaches every layer.
    pool: DevicePages,
    /// Pages of that.
    pages: Vec<PageId>,
    tokens: u32,
    packed: DeviceExtent,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Pack,
    Scatter,
}

impl Asked {
    /// Whether one launch can do both.
    fn goes_with(&self, other: &Asked) -> bool {
        let address = |asked: &Asked| asked.pool.storage().address();
        let same_wait = match (&self.after, &other.after) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        self.way == other.way && same_wait && address(self) == address(other)
    }
}

struct Launched {
    plan: Plan,
    tickets: Vec<Ticket>,
}

/// Conversions of one launch, at most.
const CHUNKS: usize = 64;
/// Launches under way, at most: as many as a model has layers, so that a step of the engine can be followed layer by layer.
const LAUNCHES: usize = 32;
/// The same to or from the host: one follows on the other without a gap.
const HOST_LAUNCHES: usize = 8;
/// Before the engine's work that waits for multiprocessors: a prompt waits for what comes from the host. The driver takes
/// the nearest priority that it has.
const PRIORITY: i32 = -5;
/// The engine's own, and the driver has no lower: nobody waits for what is kept, and what is handed over goes in gaps
/// that the engine's kernels leave, where blocks of microseconds delay them little.
const LOW_PRIORITY: i32 = 0;
/// Small blocks on the whole GPU: they are soon over.
const SHARE: Share = Share { checksum: true, multiprocessors: None };
/// The link to the host is an order of magnitude slower than the GPU's memory.
const HOST_SHARE: Share = Share { checksum: true, multiprocessors: NonZeroU32::new(16) };

impl CudaPacker {
    /// For KV of `shape`.
    ///
    /// # Errors
    /// When the GPU or the host has no memory for its plans.
    pub fn new(kernels: &Arc<CudaKernels>, shape: &KvShape) -> Result<CudaPacker, PlanError> {
        let pages = CHUNKS * shape.pages(shape.chunk_tokens) as usize;
        let limits = PlanLimits { chunks: CHUNKS, pages, layers: 1 };
        Ok(CudaPacker {
            kernels: Arc::clone(kernels),
            within: Lane::new(kernels, limits, LAUNCHES, LOW_PRIORITY, SHARE)?,
            to_host: Lane::new(kernels, limits, HOST_LAUNCHES, LOW_PRIORITY, HOST_SHARE)?,
            from_host: Lane::new(kernels, limits, HOST_LAUNCHES, PRIORITY, HOST_SHARE)?,
        })
    }

    fn ask(
        &mut self,
        (ticket, way, after): (Ticket, Way, Option<Arc<CudaEvent>>),
        kv: &KvDevicePages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        packed: &Extent,
    ) -> Result<(), PackError> {
        let (lane, packed) = match (packed.on_device(), way) {
            (Some(packed), _) => (&mut self.within, Some(packed)),
            (None, Way::Pack) => (&mut self.to_host, packed.mapped_on_device()),
            (None, Way::Scatter) => (&mut self.from_host, packed.mapped_on_device()),
        };
        let here = self.kernels.device();
        let packed = packed.filter(|packed| packed.region().device().ordinal() == here.ordinal());
        let packed = packed.ok_or_else(|| PackError::Unreached { device: here.name().to_owned() })?;
        let pages = pages.iter().map(|page| kv.all_layers_page(layer, *page)).collect();
        let pool = kv.all_layers().clone();
        lane.asked.push_back(Asked { ticket, way, after, pool, pages, tokens, packed });
        Ok(())
    }

    fn lanes(&mut self) -> [&mut Lane; 3] {
        [&mut self.within, &mut self.from_host, &mut self.to_host]
    }
}

impl Lane {
    fn new(
        kernels: &Arc<CudaKernels>,
        limits: PlanLimits,
        launches: usize,
        priority: i32,
        share: Share,
    ) -> Result<Lane, PlanError> {
        let device = kernels.device();
        let stream = device.context().new_stream_with_priority(priority);
        let stream = device.said("make a stream", stream)?;
        let idle = (0..launches).map(|_| Plan::new(kernels, &stream, limits)).collect::<Result<_, _>>()?;
        Ok(Lane {
            kernels: Arc::clone(kernels),
            stream,
            share,
            limits,
            asked: VecDeque::new(),
            idle,
            launched: VecDeque::new(),
            running: 0,
        })
    }

    /// Tells what is over, and launches what was asked for.
    fn poll(&mut self, done: &mut Vec<Converted>) -> Result<(), PlanError> {
        while let Some(Launched { plan, tickets }) = self.launched.front_mut() {
            let Some(checksums) = plan.poll_checksums()? else { break };
            let told = tickets.iter().zip(checksums.sums);
            done.extend(told.map(|(ticket, checksum)| Converted { ticket: *ticket, checksum }));
            self.running -= tickets.len();
            let over = self.launched.pop_front();
            self.idle.extend(over.map(|launched| launched.plan));
        }
        self.launch()
    }

    /// Launches what was asked for, as far as there are plans.
    fn launch(&mut self) -> Result<(), PlanError> {
        while let Some(first) = self.asked.front()
            && let Some(mut plan) = self.idle.pop()
        {
            let (way, pool, after) = (first.way, first.pool.clone(), first.after.clone());
            let mut pages = 0;
            let together = self.asked.iter().take(CHUNKS).take_while(|asked| {
                pages += asked.pages.len();
                asked.goes_with(first) && pages <= self.limits.pages
            });
            // One that is too long for any plan is refused by it.
            let count = together.count().max(1);
            let batch: Vec<Asked> = self.asked.drain(..count).collect();
            let chunks: Vec<Chunk<'_>> = batch
                .iter()
                .map(|asked| Chunk {
                    tokens: asked.tokens,
                    pages: &asked.pages,
                    place: Place::Packed(&asked.packed),
                })
                .collect();
            if let Some(after) = after {
                self.kernels.device().said("wait for KV", self.stream.wait(&after))?;
            }
            plan.set(pool.layout(), None, &chunks)?;
            match way {
                Way::Pack => plan.pack(&pool, 0..1, self.share)?,
                Way::Scatter => plan.scatter(&pool, 0..1, self.share)?,
            }
            plan.fetch_checksums(0..1)?;
            self.running += count;
            self.launched
                .push_back(Launched { plan, tickets: batch.iter().map(|asked| asked.ticket).collect() });
        }
        Ok(())
    }
}

impl Kernels for CudaPacker {
    type Pages = KvDevicePages;
    type Error = PlanError;

    fn memory(&self, len: usize) -> Result<Arc<HostRegion>, PlanError> {
        Ok(HostRegion::with_twin(self.kernels.device(), len)?)
    }

    fn host_memory(&self, len: usize) -> Result<Arc<HostRegion>, PlanError> {
        Ok(HostRegion::pinned(self.kernels.device(), len)?)
    }

    unsafe fn pack(
        &mut self,
        ticket: Ticket,
        kv: &KvDevicePages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        out: &Extent,
    ) -> Result<(), PackError> {
        check(kv, layer, pages, tokens, out.len())?;
        self.ask((ticket, Way::Pack, kv.not_yet_written(layer)), kv, layer, pages, tokens, out)
    }

    unsafe fn scatter(
        &mut self,
        ticket: Ticket,
        kv: &mut KvDevicePages,
        layer: LayerIdx,
        pages: &[PageId],
        tokens: u32,
        packed: &Extent,
    ) -> Result<(), PackError> {
        check(kv, layer, pages, tokens, packed.len())?;
        check_distinct(pages)?;
        self.ask((ticket, Way::Scatter, None), kv, layer, pages, tokens, packed)
    }

    fn poll(&mut self, done: &mut Vec<Converted>) -> Result<(), PlanError> {
        self.lanes().into_iter().try_for_each(|lane| lane.poll(done))
    }

    fn under_way(&self) -> usize {
        let lanes = [&self.within, &self.from_host, &self.to_host];
        lanes.into_iter().map(|lane| lane.asked.len() + lane.running).sum()
    }
}
