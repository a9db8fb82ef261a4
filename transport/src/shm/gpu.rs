//! The lane between GPUs, `cuda_ipc`: as with shared memory the writer announces where its bytes lie, and the receiver
//! copies them through its windows; here the copy engines of its GPU do, from the twin of the source to the twin of the
//! window's region. An engine takes five microseconds for each copy beside its bytes, so small ones are gathered and
//! made by one launch of a kernel.
//!
//! A copy that was started cannot be called back. So few bytes are under way at once, and who closes a window, or the
//! lane, waits for them. CUDA has no right to read alone: a peer that was given memory could write it. It is given that
//! of sources, never that of windows.

use super::handover::Message;
use super::{Announced, Error, Incoming, ShmLane, Source, Way, lock};
use crate::net::header::Header;
use crate::net::lane::Lane as _;
use crate::net::life::Life;
use crate::net::node::Node;
use crate::window::{Keeper, Landing};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tandem_memory::HostRegion;
use tandem_memory::cuda::{Copies, DeviceExtent, DeviceRegion, IpcHandle, Mark};

/// Bytes copied without a break. What is longer is cut, so that no more is under way than is waited for.
const PIECE: usize = 32 << 20;
/// Bytes under way beyond which no copy is started: a third of a millisecond over NVLink.
const MAX_FLYING: u64 = 96 << 20;
/// Copies under way, at most.
const MAX_FLIGHTS: usize = 512;
/// What is shorter is gathered; for more than this, an engine is as fast, and takes no multiprocessor.
const GATHER_BELOW: usize = 8 << 20;
/// Launches that may not be over while another is made: one works while the next waits, and meanwhile more is gathered.
const LAUNCHES: usize = 2;
/// Copies that engines may make at once.
const AT_ONCE: usize = 2;
/// Bytes copied to the host without a break.
const HOST_PIECE: usize = 4 << 20;
/// How long to wait for the node loop before looking at what else there is.
const UNPOLLED: Duration = Duration::from_millis(1);

/// The GPU of a lane, and what it copies.
pub(super) struct Gpu {
    copies: Copies,
    /// Copies that may not be over, oldest first, and what is to be said after them.
    flights: Mutex<VecDeque<Flight>>,
}

/// A piece of a write on its way.
struct Flight {
    header: Header,
    /// None if the write is refused.
    landing: Option<Arc<Landing>>,
    /// Held until the copy is over; none of an empty write.
    copied: Option<(DeviceExtent, DeviceExtent)>,
    /// Gathered, and not started yet.
    is_waiting: bool,
    /// Then the write is answered.
    is_last: bool,
}

impl Flight {
    /// Says something without bytes, at its turn. None for a refused write.
    fn empty(header: Header, landing: Option<Arc<Landing>>) -> Flight {
        Flight { header, landing, copied: None, is_waiting: false, is_last: true }
    }

    fn bytes(&self) -> u64 {
        self.copied.as_ref().map_or(0, |(from, _)| from.len() as u64)
    }
}

/// How far the lane's thread has come.
#[derive(Default)]
pub(super) struct Progress {
    /// A write of which not all pieces were started.
    begun: Option<Begun>,
    /// Flights that no mark follows yet.
    unmarked: usize,
    /// Those that a mark follows.
    marked: VecDeque<(usize, Mark)>,
    flights: usize,
    bytes: u64,
}

struct Begun {
    header: Header,
    landing: Arc<Landing>,
    from: DeviceExtent,
    to: DeviceExtent,
    done: usize,
}

impl Progress {
    /// Whether another write can be taken in.
    pub(super) fn has_room(&self) -> bool {
        self.begun.is_none() && self.may_start()
    }

    fn may_start(&self) -> bool {
        self.bytes < MAX_FLYING && self.flights < MAX_FLIGHTS
    }

    pub(super) fn is_flying(&self) -> bool {
        self.flights > 0
    }

    fn started(&mut self, bytes: u64) {
        self.flights += 1;
        self.bytes += bytes;
        self.unmarked += 1;
    }
}

impl Gpu {
    /// For a lane to the memory of a peer's GPU.
    pub(super) fn new(node: &Node, peers: [u8; 16]) -> Result<Gpu, Error> {
        let device = node.gpu().ok_or_else(|| Error::Gpu("this node has no memory on a GPU".into()))?;
        device.check_reach(peers)?;
        Ok(Gpu { copies: Copies::new(device, AT_ONCE)?, flights: Mutex::default() })
    }

    pub(super) fn id(&self) -> [u8; 16] {
        self.copies.device().id()
    }

    /// The twin of this memory, if it is on this GPU.
    fn twin<'a>(&self, memory: &'a HostRegion) -> Option<&'a Arc<DeviceRegion>> {
        memory.twin().filter(|twin| twin.device().id() == self.id())
    }

    pub(super) fn reaches(&self, memory: &HostRegion) -> bool {
        self.twin(memory).is_some()
    }

    pub(super) fn hand_over(&self, memory: &HostRegion, serial: u32) -> Result<Option<Message>, Error> {
        let Some(twin) = self.twin(memory) else { return Ok(None) };
        Ok(Some(Message::GpuRegion { serial, len: twin.len() as u64, handle: twin.export()?.0 }))
    }

    /// Starts what was gathered.
    fn start_waiting(&self) -> Result<(), Error> {
        // Held meanwhile: who closes a window sees each of its pieces started, or sees to it that it never is.
        let mut flights = lock(&self.flights);
        let waiting = flights.iter_mut().filter_map(|flight| {
            if std::mem::take(&mut flight.is_waiting) { flight.copied.clone() } else { None }
        });
        let copies: Vec<_> = waiting.collect();
        Ok(self.copies.start_all(&copies)?)
    }

    /// When it returns, every copy that was started is over.
    pub(super) fn wait(&self) {
        if let Err(error) = self.copies.wait() {
            tracing::error!(%error, "a GPU failed while it copied");
        }
    }

    /// Nothing is started any more. On the lane's thread: letting go of another process's memory takes a while.
    pub(super) fn let_go(&self) {
        self.wait();
        lock(&self.flights).clear();
    }
}

impl ShmLane {
    fn gpu(&self) -> Result<&Gpu, Error> {
        match &self.way {
            Way::Gpu(gpu) => Ok(gpu),
            Way::Processor => Err(Error::Rule("memory of a GPU on a lane for the host's")),
        }
    }

    pub(super) fn import(&self, handle: &[u8; 64], len: usize) -> Result<Source, Error> {
        let device = self.gpu()?.copies.device();
        Ok(Source::Gpu(DeviceRegion::import(device, &IpcHandle(*handle), len)?))
    }

    /// Takes in a write whose bytes a GPU has.
    pub(super) fn begin(
        self: &Arc<Self>,
        node: &Arc<Node>,
        life: &Life,
        incoming: &mut Incoming,
        source: &Arc<DeviceRegion>,
        announced: &Announced,
    ) -> Result<(), Error> {
        let Announced { header, at, .. } = *announced;
        let Header { window, offset, len, .. } = header;
        let beyond = || Error::Rule("a write from beyond its region");
        let place = |at: u64| Some(usize::try_from(at).ok()?..usize::try_from(at.checked_add(len)?).ok()?);
        let from = place(at).and_then(|range| source.extent(range).ok()).ok_or_else(beyond)?;
        let Some(landing) = node.windows.find(life.peer, &window, offset, len) else {
            return self.follow(incoming, Flight::empty(header, None));
        };
        // Inside the window, as that was found.
        let range = place(offset).ok_or_else(beyond)?;
        let Some(to) = landing.extent().on_device() else {
            return self.land_on_host(node, life, incoming, &header, &landing, &from);
        };
        if len == 0 {
            return self.follow(incoming, Flight::empty(header, Some(landing)));
        }
        if !landing.keep(Arc::downgrade(self) as Weak<dyn Keeper>) {
            return self.follow(incoming, Flight::empty(header, None));
        }
        incoming.progress.begun = Some(Begun { header, landing, from, to: to.part(range)?, done: 0 });
        self.advance(incoming)
    }

    /// Starts pieces of the write that was begun, as far as they may be under way.
    fn advance(&self, incoming: &mut Incoming) -> Result<(), Error> {
        let gpu = self.gpu()?;
        let Some(mut begun) = incoming.progress.begun.take() else { return Ok(()) };
        while incoming.progress.may_start() {
            let Begun { header, ref landing, ref from, ref to, done } = begun;
            let end = from.len().min(done + PIECE);
            let (from_piece, to_piece) = (from.part(done..end)?, to.part(done..end)?);
            let is_last = end == from.len();
            let open = lock(&self.open);
            if !*open {
                return Ok(());
            }
            let mut started = Ok(());
            let is_waiting = end - done < GATHER_BELOW;
            let is_open = landing.complete(|| {
                if !is_waiting {
                    started = gpu.copies.start(&from_piece, &to_piece);
                }
                let (landing, copied) = (Some(Arc::clone(landing)), Some((from_piece, to_piece)));
                lock(&gpu.flights).push_back(Flight { header, landing, copied, is_waiting, is_last });
            });
            drop(open);
            started?;
            if !is_open {
                // Answered after the pieces that were started: until then its source is read.
                return self.follow(incoming, Flight::empty(header, None));
            }
            incoming.progress.started((end - done) as u64);
            if !is_waiting || incoming.progress.unmarked >= Copies::AT_ONCE {
                self.mark(incoming)?;
            }
            if is_last {
                return Ok(());
            }
            begun.done = end;
        }
        incoming.progress.begun = Some(begun);
        Ok(())
    }

    /// Puts something without bytes behind what is under way.
    fn follow(&self, incoming: &mut Incoming, flight: Flight) -> Result<(), Error> {
        lock(&self.gpu()?.flights).push_back(flight);
        incoming.progress.started(0);
        Ok(())
    }

    /// There is nothing more to gather now: has what was gathered started, unless enough is under way.
    pub(super) fn depart(&self, incoming: &mut Incoming) -> Result<(), Error> {
        let Progress { unmarked, marked, .. } = &incoming.progress;
        if *unmarked > 0 && marked.len() < LAUNCHES { self.mark(incoming) } else { Ok(()) }
    }

    /// Starts what was gathered, and has the GPU tell when everything that was started is there.
    fn mark(&self, incoming: &mut Incoming) -> Result<(), Error> {
        let gpu = self.gpu()?;
        let open = lock(&self.open);
        if !*open {
            return Ok(());
        }
        gpu.start_waiting()?;
        drop(open);
        let flights = std::mem::take(&mut incoming.progress.unmarked);
        incoming.progress.marked.push_back((flights, gpu.copies.mark()?));
        Ok(())
    }

    /// Answers what is over, and starts what there is room for; says whether there was any.
    pub(super) fn fly(&self, node: &Arc<Node>, life: &Life, incoming: &mut Incoming) -> Result<bool, Error> {
        let mut any = false;
        while let Some((flights, mark)) = incoming.progress.marked.front_mut()
            && mark.is_over()?
        {
            if *flights == 0 {
                incoming.progress.marked.pop_front();
                continue;
            }
            if !incoming.answers.has_room()? || !node.wait_until_polled(UNPOLLED) {
                return Ok(any);
            }
            *flights -= 1;
            any = true;
            self.finish(node, life, incoming)?;
        }
        if incoming.progress.begun.is_some() && incoming.progress.may_start() {
            any = true;
            self.advance(incoming)?;
        }
        Ok(any)
    }

    /// The oldest flight is over.
    fn finish(&self, node: &Node, life: &Life, incoming: &mut Incoming) -> Result<(), Error> {
        let Some(flight) = lock(&self.gpu()?.flights).pop_front() else { return Ok(()) };
        incoming.progress.flights -= 1;
        incoming.progress.bytes -= flight.bytes();
        if flight.is_last {
            self.answer(node, life, incoming, &flight.header, flight.landing)
        } else {
            Ok(())
        }
    }

    /// All bytes of a write are there, or it is refused.
    fn answer(
        &self,
        node: &Node,
        life: &Life,
        incoming: &mut Incoming,
        header: &Header,
        landing: Option<Arc<Landing>>,
    ) -> Result<(), Error> {
        let open = lock(&self.open);
        // What was copied after the writer took its source back may be anything.
        if !*open || !self.peers.lent_until_now() {
            return Ok(());
        }
        let landed = match landing {
            Some(landing) => self.report(node, life, &landing, header)?,
            None => false,
        };
        if !landed {
            node.note_refused(life, self.path(), header);
        }
        incoming.answers.push(&[header.sequence << 1 | u64::from(landed)]);
        Ok(())
    }

    /// The window's region has no twin: this thread waits for each piece.
    fn land_on_host(
        &self,
        node: &Node,
        life: &Life,
        incoming: &mut Incoming,
        header: &Header,
        landing: &Arc<Landing>,
        from: &DeviceExtent,
    ) -> Result<(), Error> {
        let mut is_open = true;
        for at in (0..from.len()).step_by(HOST_PIECE) {
            let piece = from.part(at..from.len().min(at + HOST_PIECE))?;
            let open = lock(&self.open);
            if !*open {
                return Ok(());
            }
            let mut read = Ok(());
            is_open = landing.land_by(header.offset + at as u64, piece.len(), |place| {
                read = self.gpu().and_then(|gpu| Ok(gpu.copies.read(&piece, place)?));
            });
            read?;
            if !is_open {
                break;
            }
        }
        self.answer(node, life, incoming, header, is_open.then(|| Arc::clone(landing)))
    }
}

impl Keeper for ShmLane {
    fn window_closed(&self, key: u64) {
        let Way::Gpu(gpu) = &self.way else { return };
        let mut is_flying = false;
        for flight in lock(&gpu.flights).iter_mut().filter(|flight| flight.header.window.key == key) {
            // What waits is never started now, and refused at its turn.
            is_flying |= !std::mem::take(&mut flight.is_waiting);
        }
        if is_flying {
            gpu.wait();
        }
    }
}
