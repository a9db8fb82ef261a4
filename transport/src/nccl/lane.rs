//! The lane at work, on a thread of its own. It waits for NCCL to begin a parcel, until its deadline, and never for it to
//! carry one.

use super::Error;
use super::library::Comm;
use super::message::Message;
use super::order::{Announced, Packing, Parcel, Piece, Unpacking};
use crate::lent::Lent;
use crate::net::header::Header;
use crate::net::lane::{Job, Lane, LaneId, Path};
use crate::net::life::Life;
use crate::net::node::Node;
use crate::tls::Channel;
use crate::window::{Keeper, Landing};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tandem_memory::Extent;
use tandem_memory::cuda::{Copies, Device, DeviceExtent, Mark};

/// How long NCCL may take for a parcel whose turn has come. Whether the peer lives is the session's to notice,
/// and faster.
const STALL: Duration = Duration::from_secs(2);
/// From so many bytes on an engine copies a piece; a kernel takes those that are shorter, many at once.
const ENGINE_FROM: usize = 1 << 20;
/// Copies that engines may make at once.
const AT_ONCE: usize = 2;
/// How long to look for the end of what a GPU does without a pause, and how often then.
const SPIN: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(100);
/// How often to look around when nothing is on its way, and when only the peer is at work.
const TICK: Duration = Duration::from_secs(1);
const WATCH: Duration = Duration::from_millis(100);
/// How long to wait for the node loop before looking at what else there is.
const UNPOLLED: Duration = Duration::from_millis(1);

/// Locks are taken in this order: `open`, then a life's state or a window. `queue` is held for single
/// operations only, also under a life's state.
pub(super) struct NcclLane {
    id: LaneId,
    copies: Copies,
    queue: Mutex<VecDeque<Job>>,
    /// Bytes pushed and not settled.
    load: AtomicU64,
    /// The gate of sources and windows: held while copies from or to them are started, and while landings are
    /// reported. False once that is over for good.
    open: Mutex<bool>,
    /// As `open`, for those who need no certainty.
    closed: AtomicBool,
    /// The thread sleeps, or is about to, and is to be woken by the bell.
    asleep: AtomicBool,
    bell: OwnedFd,
    /// Of the channel, to end it.
    socket: TcpStream,
    /// For the thread, until it is started.
    work: Mutex<Option<Work>>,
}

/// What the lane's thread has.
struct Work {
    channel: Channel,
    out: Comm,
    packing: Packing,
    /// Parcels that are not answered, oldest first: when their bytes were staged, if they have any.
    staged: VecDeque<Option<Mark>>,
    /// Sends that may not be over, oldest first: since when each is NCCL's next.
    sends: VecDeque<(Instant, Mark)>,
    into: Comm,
    unpacking: Unpacking,
    /// Parcels on their way here, oldest first.
    arriving: VecDeque<Arriving>,
    /// The fate of the write whose pieces come now.
    fate: Fate,
    /// Parcels that are being copied out, oldest first.
    landing: VecDeque<Leaving>,
}

struct Arriving {
    /// When it was asked for, or came to be NCCL's next.
    since: Instant,
    /// None of a parcel without bytes.
    mark: Option<Mark>,
    parcel: Announced,
}

/// A parcel on its way through windows.
struct Leaving {
    mark: Mark,
    /// The writes that end in it and are not reported.
    ended: VecDeque<(Header, Fate)>,
    fates: Vec<bool>,
}

/// What becomes of a write.
#[derive(Clone)]
enum Fate {
    Landing(Arc<Landing>),
    Refused,
    /// It has landed by a lane that failed.
    LandedBefore,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guards single operations, or a flag.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NcclLane {
    pub(super) fn new(
        id: LaneId,
        device: &Arc<Device>,
        channel: Channel,
        out: Comm,
        into: Comm,
    ) -> Result<Arc<NcclLane>, Error> {
        let socket = channel.socket().try_clone()?;
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(std::io::Error::from)?;
        let work = Work {
            channel,
            out,
            packing: Packing::default(),
            staged: VecDeque::new(),
            sends: VecDeque::new(),
            into,
            unpacking: Unpacking::default(),
            arriving: VecDeque::new(),
            fate: Fate::Refused,
            landing: VecDeque::new(),
        };
        Ok(Arc::new(NcclLane {
            id,
            copies: Copies::new(device, AT_ONCE)?,
            queue: Mutex::default(),
            load: AtomicU64::new(0),
            open: Mutex::new(true),
            closed: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            bell,
            socket,
            work: Mutex::new(Some(work)),
        }))
    }

    /// Tells the dialler that it can count on this.
    pub(super) fn say_ready(&self) -> Result<(), Error> {
        match &mut *lock(&self.work) {
            Some(work) => Ok(work.channel.say(&Message::Ready.encode())?),
            None => Ok(()),
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The part of a GPU's memory that an extent is true in, if it is this GPU's.
    fn twin(&self, extent: &Extent) -> Option<DeviceExtent> {
        extent.on_device().filter(|twin| twin.region().device().id() == self.copies.device().id())
    }

    fn ring(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It fails only when it is rung already.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    fn serve(self: &Arc<Self>, node: &Arc<Node>, life: &Arc<Life>, work: &mut Work) -> Result<(), Error> {
        let device = self.copies.device();
        device.said("be used by this thread", device.context().bind_to_thread())?;
        work.channel.stop_waiting()?;
        let mut idle_since = None;
        while !self.is_closed() {
            let mut busy = false;
            while let Some(message) = work.channel.receive()? {
                busy = true;
                self.take(node, life, work, &message)?;
            }
            busy |= self.depart(work)?;
            busy |= self.arrive(node, life, work)?;
            busy |= self.land(node, life, work)?;
            if busy {
                idle_since = None;
                continue;
            }
            work.check_stall()?;
            let is_flying = !work.arriving.is_empty() || !work.landing.is_empty();
            if is_flying && idle_since.get_or_insert_with(Instant::now).elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let at_most = match (is_flying, work.sends.is_empty()) {
                (true, _) => NAP,
                (false, false) => WATCH,
                (false, true) => TICK,
            };
            self.asleep.store(true, Ordering::SeqCst);
            if lock(&self.queue).is_empty() && !self.is_closed() {
                self.wait(&work.channel, at_most);
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Until the peer says something, or the bell rings.
    fn wait(&self, channel: &Channel, at_most: Duration) {
        let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: at_most.subsec_nanos().into() };
        let mut both = [PollFd::new(channel.socket(), PollFlags::IN), PollFd::new(&self.bell, PollFlags::IN)];
        // Interrupted or not, the caller looks for itself.
        let _ = rustix::event::poll(&mut both, Some(&timeout));
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// Takes in what the peer said.
    fn take(&self, node: &Node, life: &Life, work: &mut Work, message: &[u8]) -> Result<(), Error> {
        match Message::decode(message).ok_or(Error::Rule("it sent a message that is none"))? {
            Message::Parcel { bytes, begun } => {
                let parcel = work.unpacking.announced(bytes, begun)?;
                let since = Instant::now();
                let mark = match parcel.bytes {
                    0 => None,
                    len => {
                        let place = work.into.slot(parcel.slot)?.part(0..len)?;
                        Some(work.into.receive(&place, since + STALL)?)
                    }
                };
                work.arriving.push_back(Arriving { since, mark, parcel });
                Ok(())
            }
            Message::Answer { fates } => {
                let staged = work.staged.pop_front().ok_or(Error::Rule("it answered what was not sent"))?;
                if let Some(mut staged) = staged
                    && !staged.is_over()?
                {
                    return Err(Error::Rule("it answered before it can have had the bytes"));
                }
                let (fates, bytes) = work.packing.answered(&fates)?;
                self.load.fetch_sub(bytes, Ordering::Relaxed);
                node.settle_quietly(life, self, &fates);
                node.wake();
                Ok(())
            }
            Message::Join { .. } | Message::Ready => Err(Error::Rule("it introduced itself again")),
        }
    }

    /// Sends parcels as long as there are writes and slots.
    fn depart(&self, work: &mut Work) -> Result<bool, Error> {
        work.packing.jobs.append(&mut lock(&self.queue));
        let mut any = false;
        while !self.is_closed()
            && let Some(Parcel { slot, bytes, begun, pieces }) = work.packing.next()?
        {
            any = true;
            let slot = work.out.slot(slot)?;
            let open = lock(&self.open);
            if !*open {
                return Ok(false);
            }
            let mut gathered = Vec::new();
            for (source, place) in pieces {
                let to = slot.part(place)?;
                match self.twin(&source) {
                    Some(from) => self.copy(from, to, &mut gathered)?,
                    None => self.copies.write(&to, Lent(source).as_ref())?,
                }
            }
            let staged = self.started(&gathered)?;
            drop(open);
            // First, so that both sides begin at once.
            work.channel.say(&Message::Parcel { bytes: bytes as u32, begun }.encode())?;
            if bytes > 0 {
                let since = Instant::now();
                let mark = work.out.send(&slot.part(0..bytes)?, Some(&staged), since + STALL)?;
                work.sends.push_back((since, mark));
            }
            work.staged.push_back((bytes > 0).then_some(staged));
        }
        Ok(any)
    }

    /// Starts a copy, or puts it to those that one launch starts.
    fn copy(
        &self,
        from: DeviceExtent,
        to: DeviceExtent,
        gathered: &mut Vec<(DeviceExtent, DeviceExtent)>,
    ) -> Result<(), Error> {
        if from.len() >= ENGINE_FROM {
            self.copies.start(&from, &to)?;
        } else {
            gathered.push((from, to));
        }
        Ok(())
    }

    /// Starts those that were put together; says when all that were started are over.
    fn started(&self, gathered: &[(DeviceExtent, DeviceExtent)]) -> Result<Mark, Error> {
        if !gathered.is_empty() {
            self.copies.start_all(gathered)?;
        }
        Ok(self.copies.mark()?)
    }

    /// Copies parcels that have come through their windows.
    fn arrive(self: &Arc<Self>, node: &Arc<Node>, life: &Arc<Life>, work: &mut Work) -> Result<bool, Error> {
        let mut any = false;
        while let Some(Arriving { mark, .. }) = work.arriving.front_mut() {
            if let Some(mark) = mark
                && !mark.is_over()?
            {
                break;
            }
            let Some(Arriving { parcel, .. }) = work.arriving.pop_front() else { break };
            if let Some(next) = work.arriving.front_mut() {
                next.since = Instant::now();
            }
            any = true;
            let mut pieces = Vec::with_capacity(parcel.pieces.len());
            for piece in parcel.pieces {
                if piece.done == 0 {
                    work.fate = self.fate_of(node, life, &piece.header)?;
                }
                pieces.push((piece, work.fate.clone()));
            }
            let slot = work.into.slot(parcel.slot)?;
            match self.start_landing(&slot, pieces)? {
                Some(leaving) => work.landing.push_back(leaving),
                None => return Ok(false),
            }
        }
        Ok(any)
    }

    fn fate_of(self: &Arc<Self>, node: &Arc<Node>, life: &Arc<Life>, header: &Header) -> Result<Fate, Error> {
        if let Some(generation) = header.failed {
            if !node.failed_at_peer(life, generation) {
                return Err(Error::Closed);
            }
            if life.has_landed(header.sequence) {
                return Ok(Fate::LandedBefore);
            }
        }
        let found = node.windows.find(life.peer, &header.window, header.offset, header.len);
        let kept = found.filter(|landing| landing.keep(Arc::downgrade(self) as Weak<dyn Keeper>));
        Ok(kept.map_or(Fate::Refused, Fate::Landing))
    }

    /// None if the lane is closed.
    fn start_landing(
        &self,
        slot: &DeviceExtent,
        pieces: Vec<(Piece, Fate)>,
    ) -> Result<Option<Leaving>, Error> {
        // Held meanwhile: who closes a window sees its copies started, or sees to it that they never are.
        let open = lock(&self.open);
        if !*open {
            return Ok(None);
        }
        let (mut gathered, mut ended) = (Vec::new(), VecDeque::new());
        for (Piece { header, done, place, is_last }, fate) in pieces {
            if let Fate::Landing(landing) = &fate
                && !place.is_empty()
            {
                let (from, at) = (slot.part(place)?, header.offset + done);
                match self.twin(landing.extent()) {
                    // What is closed meanwhile waits for the gate before it waits for copies.
                    Some(to) if landing.complete(|| ()) => {
                        let at = at as usize;
                        self.copy(from.clone(), to.part(at..at + from.len())?, &mut gathered)?;
                    }
                    Some(_) => {}
                    None => {
                        let mut read = Ok(());
                        // Closed or not is asked again at the write's end.
                        let _ =
                            landing.land_by(at, from.len(), |place| read = self.copies.read(&from, place));
                        read?;
                    }
                }
            }
            if is_last {
                ended.push_back((header, fate));
            }
        }
        Ok(Some(Leaving { mark: self.started(&gathered)?, ended, fates: Vec::new() }))
    }

    /// Reports and answers what is copied.
    fn land(&self, node: &Arc<Node>, life: &Life, work: &mut Work) -> Result<bool, Error> {
        let mut any = false;
        while let Some(Leaving { mark, ended, fates }) = work.landing.front_mut() {
            if !mark.is_over()? {
                break;
            }
            while !ended.is_empty() {
                if !node.wait_until_polled(UNPOLLED) {
                    return Ok(any);
                }
                // The end of a life closes its lanes and then its windows: what is refused for that is nobody's
                // fault.
                let open = lock(&self.open);
                let Some((header, fate)) = ended.pop_front().filter(|_| *open) else { return Ok(false) };
                let landed = match fate {
                    Fate::Landing(landing) => self.report(node, life, &landing, &header)?,
                    Fate::Refused => false,
                    Fate::LandedBefore => true,
                };
                if !landed {
                    node.note_refused(life, Path::Nccl, &header);
                }
                fates.push(landed);
                any = true;
            }
            let answer = Message::Answer { fates: std::mem::take(fates) };
            work.landing.pop_front();
            work.unpacking.answer();
            node.wake();
            work.channel.say(&answer.encode())?;
            any = true;
        }
        Ok(any)
    }

    /// All bytes of a write are there: reports it, unless its window has been closed.
    fn report(&self, node: &Node, life: &Life, landing: &Landing, header: &Header) -> Result<bool, Error> {
        let Header { offset, len, immediate, sequence, floor, .. } = *header;
        let is_there = self.twin(landing.extent()).is_some() || landing.deposit(offset, len);
        let key = landing.key();
        if !is_there || !landing.complete(|| node.report_landed_quietly(life.peer, immediate, len, key)) {
            return Ok(false);
        }
        node.count_landed(life, Path::Nccl, len);
        life.note_landed(sequence, floor)
            .map_err(|_| Error::Rule("it has too many writes that are not reported"))?;
        Ok(true)
    }

    /// When it returns, every copy that was started is over.
    fn wait_for_copies(&self) {
        if let Err(error) = self.copies.wait() {
            tracing::error!(%error, "a GPU failed while it copied");
        }
    }
}

impl Work {
    fn check_stall(&mut self) -> Result<(), Error> {
        while let Some((_, mark)) = self.sends.front_mut()
            && mark.is_over()?
        {
            self.sends.pop_front();
            if let Some((since, _)) = self.sends.front_mut() {
                *since = Instant::now();
            }
        }
        let posted = self.sends.front().map(|(since, _)| since);
        let awaited = self.arriving.front().map(|arriving| &arriving.since);
        let oldest = posted.into_iter().chain(awaited).min();
        if oldest.is_some_and(|since| since.elapsed() > STALL) { Err(Error::Stalled(STALL)) } else { Ok(()) }
    }
}

impl Lane for NcclLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn path(&self) -> Path {
        Path::Nccl
    }

    fn reads_twin(&self, source: &Extent) -> bool {
        self.twin(source).is_some()
    }

    fn push(&self, job: Job) {
        if self.is_closed() {
            return;
        }
        self.load.fetch_add(job.write.source.len() as u64, Ordering::Relaxed);
        lock(&self.queue).push_back(job);
        self.ring();
    }

    fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    fn start(self: Arc<Self>, node: &Arc<Node>, life: &Arc<Life>) {
        let Some(mut work) = lock(&self.work).take() else { return };
        let (lane, own, life_of_thread) = (Arc::clone(&self), Arc::clone(node), Arc::clone(life));
        let spawned = node.spawn(format!("nccl-{}", life.peer), move || {
            let outcome = lane.serve(&own, &life_of_thread, &mut work);
            // It may have ended between a landing and telling of it.
            own.wake();
            if let Err(error) = outcome
                && !lane.is_closed()
            {
                own.lane_failed(&life_of_thread, &*lane, &error.to_string());
            }
            // Ends the communicators, whatever the peer does.
            drop(work);
        });
        if let Err(error) = spawned {
            node.lane_failed(life, &*self, &format!("no thread for it: {error}"));
        }
    }

    fn close(&self, _reason: &str) {
        self.closed.store(true, Ordering::Release);
        *lock(&self.open) = false;
        self.wait_for_copies();
        lock(&self.queue).clear();
        // Only now: the peer sees it, and repeats elsewhere what a piece that was still landing here would spoil.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.ring();
    }
}

impl Keeper for NcclLane {
    fn window_closed(&self, _key: u64) {
        // Copies to it that are being started are, and no others are from now on.
        drop(lock(&self.open));
        self.wait_for_copies();
    }
}
