//! The shared memory lane: between processes of one user on one host, with one copy.
//!
//! The writer announces where in its own memory the bytes lie; the process where they are to land maps that
//! memory, to read only, and copies them through its windows. So nobody ever writes another's memory, and a
//! closed window is closed. The two share nothing that either writes but two queues of words
//! ([`ring`]); the socket over which all of it was handed ([`handover`]) wakes whoever sleeps, and shows
//! when the other process is gone, with which the system frees everything.
//!
//! Between processes whose regions have twins the same lane is called `cuda_ipc`, and copies those ([`gpu`]).

#[cfg(feature = "cuda")]
mod gpu;
mod handover;
#[cfg(test)]
mod hostile;
mod ring;

use crate::net::handshakes::Handshakes;
use crate::net::header::{self, Header};
use crate::net::lane::{Generation, Job, Lane, LaneId, Path};
use crate::net::life::Life;
use crate::net::node::Node;
use crate::window::Landing;
#[cfg(feature = "cuda")]
use gpu::{Gpu, Progress};
#[cfg(feature = "cuda")]
pub(crate) use handover::host;
pub(crate) use handover::{GpuOffer, Listener, Offer};
use handover::{Message, PATIENCE, Received, Socket};
use ring::{Consumer, Ends, Garbled, JOB_WORDS, Producer, SHARED_BYTES, Sign};
use rustix::io::Errno;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
#[cfg(feature = "cuda")]
use tandem_memory::Extent;
use tandem_memory::{ForeignRegion, HostRegion};
use tandem_proto::wire::Window;

const VERSION: u16 = 3;
/// Bytes copied between two looks at whether the lane was closed.
const PIECE: usize = 256 << 10;
/// Writes of this length pass the cache by: what else is there stays, and memory is written without being read before.
const STREAM_FROM: u64 = 2 << 20;
/// Bytes that land before the peer is told, if it sleeps, and the node loop, if more is waiting: in a virtual machine,
/// waking a thread on another core takes as long as copying half a MiB.
const TELL_PEER_EVERY: u64 = 2 << 20;
const TELL_NODE_EVERY: u64 = 16 << 20;
/// What a write counts for in these beside its bytes.
const WRITE_COST: u64 = 4 << 10;
/// Answers taken in at once, at most: whoever submits waits meanwhile.
const ANSWERS: usize = 64;
/// How long to look for more before sleeping. Waking takes a system call and some ten microseconds.
const SPIN: Duration = Duration::from_micros(5);
/// Bytes of writes under way that make their sender nap instead of sleeping: it looks by itself when the peer may have
/// copied a quarter of them, or one, and the peer is spared from waking it, which holds up copying.
const NAP_FROM: u64 = 512 << 10;
/// The longest nap: who naps is not woken, neither by answers nor by what the peer has to write.
const MAX_NAP: Duration = Duration::from_micros(100);
/// How often it sleeps after a nap that was too short: the peer copies slower, perhaps because other work needs the
/// processors, which naps would only disturb.
const SLEEPS_AFTER_VAIN_NAP: u32 = 64;
/// The most by which the system may prolong a nap.
const NAP_SLACK: NonZero<u64> = NonZero::new(1000).unwrap();
/// How long to look for the end of copies by a GPU without a pause.
#[cfg(feature = "cuda")]
const FLYING_SPIN: Duration = Duration::from_millis(1);
/// How often a sleeper looks although nobody woke it.
const SLEEP: Duration = Duration::from_secs(1);
/// Regions that a peer's writes may come from, at most.
const MAX_REGIONS: usize = 64;

/// Why there is no shared memory lane.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the peer offers none")]
    NotOffered,
    #[error("this node could not set it up")]
    NotHere,
    #[error("the peer is on another host")]
    OtherHost,
    #[error("the peer is not reached from this network namespace: {0}")]
    Connect(Errno),
    #[error("the peer runs as user {peer}, this node as user {own}")]
    OtherUser { peer: u32, own: u32 },
    #[error("the peer did not answer in time, or refused")]
    NoWelcome,
    #[error("the session was over before it was made")]
    Gone,
    #[error("{0}")]
    Gpu(String),
    #[error("the peer broke a rule: {0}")]
    Rule(&'static str),
    #[error("{0}")]
    Memory(#[from] tandem_memory::RegionError),
    #[error("{0}")]
    System(String),
}

#[cfg(feature = "cuda")]
impl From<tandem_memory::cuda::CudaError> for Error {
    fn from(error: tandem_memory::cuda::CudaError) -> Error {
        Error::Gpu(error.to_string())
    }
}

impl Error {
    /// Whether there may be a lane later in the same session.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Error::NoWelcome | Error::Gone | Error::Memory(_) | Error::System(_))
    }
}

impl From<Garbled> for Error {
    fn from(_: Garbled) -> Error {
        Error::Rule("its queue's position cannot be")
    }
}

/// Decoders of what peers send.
pub(crate) fn fuzz(bytes: &[u8]) {
    handover::fuzz(bytes);
    ring::fuzz(bytes);
    let mut words = [0; JOB_WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    let announced = Announced::decode(&words);
    assert_eq!(Announced::decode(&announced.encode()), announced);
}

/// Of each, one to be damaged by fuzzing.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let words = Announced { header: header::sample(), region: 8, at: 9 }.encode();
    let mut samples = handover::samples();
    samples.push(words.iter().flat_map(|word| word.to_le_bytes()).collect());
    samples
}

/// Makes a lane to the peer of a life that was dialled here. Waits a second at most.
pub(crate) fn dial(node: &Node, life: &Life, offer: &Offer, secret: &[u8; 32]) -> Result<(), Error> {
    make(node, life, offer, secret, None)
}

/// As [`dial`], between GPUs.
pub(crate) fn dial_gpu(node: &Node, life: &Life, offer: &GpuOffer, secret: &[u8; 32]) -> Result<(), Error> {
    make(node, life, &offer.socket, secret, Some(offer.gpu))
}

fn make(
    node: &Node,
    life: &Life,
    offer: &Offer,
    secret: &[u8; 32],
    gpu: Option<[u8; 16]>,
) -> Result<(), Error> {
    let socket = Socket::connect(offer)?;
    let way = Way::new(node, gpu)?;
    let shared = HostRegion::map(SHARED_BYTES)?;
    let join = Message::Join { node: node.local(), life: life.number, secret: *secret, gpu: way.gpu() };
    socket.send(&join, shared.file(), true)?;
    match socket.receive(true)? {
        Received::Message(Message::Welcome, None) => {}
        _ => return Err(Error::NoWelcome),
    }
    let id = life.new_lane_id(secret).ok_or(Error::Gone)?;
    let lane = ShmLane::new(id, socket, &shared, true, way);
    if life.attach_lane(lane) { Ok(()) } else { Err(Error::Gone) }
}

/// Takes lanes until the listener is stopped.
pub(crate) fn accept(node: &Arc<Node>) {
    let Some(listener) = node.shm() else { return };
    let handshakes = Arc::default();
    while let Some(socket) = listener.accept() {
        let place = Handshakes::place(&handshakes, PATIENCE);
        let node = Arc::clone(node);
        // Not one of the node's threads, which stopping waits for: whoever connects may be slow.
        let admitting = std::thread::Builder::new().name("shm-join".into()).spawn(move || {
            let _place = place;
            if let Err(error) = admit(&node, socket) {
                tracing::warn!(%error, "shared memory lane refused");
            }
        });
        if let Err(error) = admitting {
            tracing::warn!(%error, "refused: no thread for a shared memory lane");
        }
    }
}

fn admit(node: &Arc<Node>, socket: Socket) -> Result<(), Error> {
    socket.be_patient()?;
    let Received::Message(Message::Join { node: peer, life, secret, gpu }, Some(file)) =
        socket.receive(true)?
    else {
        return Err(Error::Rule("its first message is another"));
    };
    let (life, id) = node.life_of_lane(peer, life, &secret).ok_or(Error::Gone)?;
    let shared = HostRegion::of_peer(file, SHARED_BYTES)?;
    let lane = ShmLane::new(id, socket, &shared, false, Way::new(node, gpu)?);
    if !life.attach_lane(Arc::clone(&lane) as Arc<dyn Lane>) {
        return Err(Error::Gone);
    }
    lane.socket.send(&Message::Welcome, None, true)
}

/// What a lane copies with.
enum Way {
    Processor,
    #[cfg(feature = "cuda")]
    Gpu(Gpu),
}

impl Way {
    /// For a lane to the memory of this GPU, or of the host.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only GPUs are the node's"))]
    fn new(node: &Node, peers_gpu: Option<[u8; 16]>) -> Result<Way, Error> {
        match peers_gpu {
            None => Ok(Way::Processor),
            #[cfg(feature = "cuda")]
            Some(gpu) => Gpu::new(node, gpu).map(Way::Gpu),
            #[cfg(not(feature = "cuda"))]
            Some(_) => Err(Error::Gpu("lanes between GPUs are not in this build (feature cuda)".into())),
        }
    }

    fn gpu(&self) -> Option<[u8; 16]> {
        match self {
            Way::Processor => None,
            #[cfg(feature = "cuda")]
            Way::Gpu(gpu) => Some(gpu.id()),
        }
    }

    /// What hands over memory for the peer's GPU to read; none where the host's side is handed over.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the host's side is"))]
    fn hand_over(&self, memory: &HostRegion, serial: u32) -> Result<Option<Message>, Error> {
        match self {
            Way::Processor => Ok(None),
            #[cfg(feature = "cuda")]
            Way::Gpu(gpu) => gpu.hand_over(memory, serial),
        }
    }

    fn path(&self) -> Path {
        match self {
            Way::Processor => Path::Shm,
            #[cfg(feature = "cuda")]
            Way::Gpu(_) => Path::CudaIpc,
        }
    }

    /// Bytes that a peer copies in a nanosecond while naps pay.
    fn bytes_per_ns(&self) -> u64 {
        match self {
            Way::Processor => 20,
            #[cfg(feature = "cuda")]
            Way::Gpu(_) => 350,
        }
    }
}

/// Memory that a peer's writes come from.
enum Source {
    Host(ForeignRegion),
    #[cfg(feature = "cuda")]
    Gpu(Arc<tandem_memory::cuda::DeviceRegion>),
}

/// A write as it is announced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Announced {
    header: Header,
    /// Where its bytes lie: the writer's number of the region, and the first byte's place in it.
    region: u32,
    at: u64,
}

impl Announced {
    fn encode(&self) -> [u64; JOB_WORDS] {
        let Header { window, offset, len, immediate, sequence, floor, failed } = self.header;
        let mut words = [0; JOB_WORDS];
        words[..10].copy_from_slice(&[
            u64::from(window.region) | u64::from(immediate) << 32,
            window.key,
            window.offset,
            window.len,
            offset,
            len,
            sequence,
            floor,
            u64::from(self.region) | u64::from(Generation::encode(failed)) << 32,
            self.at,
        ]);
        words
    }

    fn decode(words: &[u64; JOB_WORDS]) -> Announced {
        let [low, high] = [words[8] as u32, (words[8] >> 32) as u32];
        let window = Window { region: words[0] as u32, key: words[1], offset: words[2], len: words[3] };
        let header = Header {
            window,
            offset: words[4],
            len: words[5],
            immediate: (words[0] >> 32) as u32,
            sequence: words[6],
            floor: words[7],
            failed: Generation::decode(high),
        };
        Announced { header, region: low, at: words[9] }
    }
}

/// The lane. A thread of its own lands the peer's writes and settles those of this side.
struct ShmLane {
    id: LaneId,
    socket: Socket,
    way: Way,
    own: Sign,
    peers: Sign,
    out: Mutex<Outgoing>,
    /// Bytes of unsettled writes.
    load: AtomicU64,
    /// How many there are.
    unsettled: AtomicU64,
    /// Held while a piece is copied; false once the lane is closed.
    open: Mutex<bool>,
    /// As `open`, for those who need no certainty.
    closed: AtomicBool,
    /// For the thread, until it is started.
    incoming: Mutex<Option<Incoming>>,
}

struct Outgoing {
    jobs: Producer<JOB_WORDS>,
    /// Those for which the queue had no room.
    waiting: VecDeque<Job>,
    /// Regions that the peer was given, each in the place that its number says. They stay until the lane is gone.
    given: Vec<Arc<HostRegion>>,
}

struct Incoming {
    jobs: Consumer<JOB_WORDS>,
    answers: Producer<1>,
    acks: Consumer<1>,
    /// Taken from there, to be settled together.
    fates: Vec<(u64, bool)>,
    regions: BTreeMap<u32, Source>,
    /// What the GPU copies.
    #[cfg(feature = "cuda")]
    progress: Progress,
}

impl Incoming {
    fn take_region(
        &mut self,
        serial: u32,
        len: u64,
        source: impl FnOnce(usize) -> Result<Source, Error>,
    ) -> Result<(), Error> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(Error::Rule("too many regions"));
        }
        let len = usize::try_from(len).map_err(|_| Error::Rule("a region larger than the address space"))?;
        self.regions.insert(serial, source(len)?);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two steps of a change to what these guard.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ShmLane {
    fn new(id: LaneId, socket: Socket, shared: &Arc<HostRegion>, made_here: bool, way: Way) -> Arc<ShmLane> {
        let Ends { jobs_out, jobs_in, acks_out, acks_in, own, peers } = Ends::new(shared, made_here);
        Arc::new(ShmLane {
            id,
            socket,
            way,
            own,
            peers,
            out: Mutex::new(Outgoing { jobs: jobs_out, waiting: VecDeque::new(), given: Vec::new() }),
            load: AtomicU64::new(0),
            unsettled: AtomicU64::new(0),
            open: Mutex::new(true),
            closed: AtomicBool::new(false),
            incoming: Mutex::new(Some(Incoming {
                jobs: jobs_in,
                answers: acks_out,
                acks: acks_in,
                fates: Vec::with_capacity(ANSWERS),
                regions: BTreeMap::new(),
                #[cfg(feature = "cuda")]
                progress: Progress::default(),
            })),
        })
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn wake_peer(&self) {
        if self.peers.must_wake() {
            // Fails when the peer is gone, or so many wakes are on their way that one more says nothing.
            let _ = self.socket.send(&Message::Wake, None, false);
        }
    }

    fn run(self: &Arc<Self>, node: &Arc<Node>, life: &Arc<Life>, incoming: Incoming) {
        let outcome = self.serve(node, life, incoming);
        // It may have ended between a landing and telling of it.
        node.wake();
        if let Err(error) = outcome
            && !self.is_closed()
        {
            node.lane_failed(life, &**self, &error.to_string());
        }
        #[cfg(feature = "cuda")]
        if let Way::Gpu(gpu) = &self.way {
            gpu.let_go();
        }
    }

    fn serve(
        self: &Arc<Self>,
        node: &Arc<Node>,
        life: &Arc<Life>,
        mut incoming: Incoming,
    ) -> Result<(), Error> {
        // Where it cannot be set, naps are longer.
        let _ = rustix::thread::set_current_timer_slack(Some(NAP_SLACK));
        let mut idle_since = None;
        let (mut napped, mut sleeps) = (false, 0);
        // What has landed since the node loop was told, and whether it was told of something in this run of writes.
        let (mut node_untold, mut told) = (0, false);
        while !self.is_closed() {
            let settled = self.settle(node, life, &mut incoming)?;
            if std::mem::take(&mut napped) && !settled {
                sleeps = SLEEPS_AFTER_VAIN_NAP;
            }
            let mut busy = settled | self.flush()?;
            #[cfg(feature = "cuda")]
            if self.fly(node, life, &mut incoming)? {
                (busy, told) = (true, false);
                node_untold += WRITE_COST;
            }
            let mut peer_untold = 0;
            while !self.is_closed()
                && self.has_room(&mut incoming)?
                && let Some(words) = incoming.jobs.pop()?
            {
                busy = true;
                let landed = self.receive(node, life, &mut incoming, &words)? + WRITE_COST;
                (peer_untold, node_untold) = (peer_untold + landed, node_untold + landed);
                if peer_untold >= TELL_PEER_EVERY {
                    peer_untold = 0;
                    self.wake_peer();
                }
                if node_untold >= TELL_NODE_EVERY {
                    (node_untold, told) = (0, true);
                    node.wake();
                }
                self.settle(node, life, &mut incoming)?;
                #[cfg(feature = "cuda")]
                if self.fly(node, life, &mut incoming)? {
                    told = false;
                    node_untold += WRITE_COST;
                }
            }
            #[cfg(feature = "cuda")]
            self.depart(&mut incoming)?;
            // Also when there is nothing new: a peer that has gone to sleep while this side is still awake has its answers
            // or its next writes soon, and waking up takes longer than all the rest.
            self.wake_peer();
            // A lone write is told of at once. Of a run, more may be on its way.
            if node_untold > 0 && !told {
                (node_untold, told) = (0, true);
                node.wake();
            }
            if busy {
                idle_since = None;
                continue;
            }
            let idle = idle_since.get_or_insert_with(Instant::now).elapsed();
            #[cfg(feature = "cuda")]
            if incoming.progress.is_flying() {
                // Copies take microseconds, unless others use the same link.
                if idle < FLYING_SPIN {
                    std::hint::spin_loop()
                } else {
                    self.socket.wait(MAX_NAP)
                }
                continue;
            }
            let nap = if sleeps == 0 { self.nap() } else { None };
            if nap.is_none() && idle < SPIN {
                // The copier may be this core's other half: leave it the core.
                (0..8).for_each(|_| std::hint::spin_loop());
                continue;
            }
            told = false;
            if std::mem::take(&mut node_untold) > 0 {
                node.wake();
            }
            if let Some(nap) = nap {
                napped = true;
                self.socket.wait(nap);
                continue;
            }
            sleeps = sleeps.saturating_sub(1);
            self.own.set_asleep(true);
            if incoming.jobs.is_empty() && incoming.acks.is_empty() && !self.is_closed() {
                self.socket.wait(SLEEP);
            }
            self.own.set_asleep(false);
            self.take_messages(&mut incoming)?;
        }
        Ok(())
    }

    /// Whether another write can be taken in.
    fn has_room(&self, incoming: &mut Incoming) -> Result<bool, Error> {
        #[cfg(feature = "cuda")]
        if !incoming.progress.has_room() {
            return Ok(false);
        }
        Ok(incoming.answers.has_room()?)
    }

    /// How long the peer needs for some of what is under way; none if that is too little, or takes too long.
    fn nap(&self) -> Option<Duration> {
        let [load, writes] = [&self.load, &self.unsettled].map(|count| count.load(Ordering::Relaxed));
        let time = |bytes| Duration::from_nanos(bytes / self.way.bytes_per_ns());
        let write = time(load / writes.max(1));
        (load >= NAP_FROM && write <= MAX_NAP).then(|| write.max(time(load / 4).min(MAX_NAP)))
    }

    /// Takes in the peer's answers; returns whether any write was settled.
    fn settle(&self, node: &Node, life: &Life, incoming: &mut Incoming) -> Result<bool, Error> {
        let mut any = false;
        // The peer may answer without end what was never asked.
        while !self.is_closed() {
            let Incoming { acks, fates, .. } = incoming;
            fates.clear();
            while fates.len() < ANSWERS
                && let Some([ack]) = acks.pop()?
            {
                fates.push((ack >> 1, ack & 1 == 1));
            }
            if fates.is_empty() {
                break;
            }
            // Answers to what was never asked are passed over.
            let settled = node.settle_quietly(life, self, fates);
            self.load.fetch_sub(settled.bytes(), Ordering::Relaxed);
            self.unsettled.fetch_sub(settled.writes(), Ordering::Relaxed);
            any |= settled.writes() > 0;
        }
        if any {
            node.wake();
        }
        Ok(any)
    }

    /// Announces what waits for room.
    fn flush(&self) -> Result<bool, Error> {
        let mut out = lock(&self.out);
        let mut any = false;
        while !out.waiting.is_empty() && out.jobs.has_room()? {
            if let Some(job) = out.waiting.pop_front() {
                any = true;
                self.announce(&mut out, &job)?;
            }
        }
        drop(out);
        if any {
            self.wake_peer();
        }
        Ok(any)
    }

    /// There is room in the queue.
    fn announce(&self, out: &mut Outgoing, job: &Job) -> Result<(), Error> {
        let source = &job.write.source;
        let memory = source.region();
        let number = out.given.iter().position(|given| Arc::ptr_eq(given, memory)).unwrap_or(out.given.len());
        if number == out.given.len() {
            let cannot = || Error::System("a write comes from memory that cannot be shared".into());
            let serial = number as u32;
            let (message, file) = match self.way.hand_over(memory, serial)? {
                Some(message) => (message, None),
                None => {
                    let file = memory.file().ok_or_else(cannot)?;
                    (Message::Region { serial, len: memory.len() as u64 }, Some(file))
                }
            };
            if number >= MAX_REGIONS {
                return Err(cannot());
            }
            self.socket.send(&message, file, false)?;
            out.given.push(Arc::clone(memory));
        }
        let announced = Announced { header: job.header(), region: number as u32, at: source.offset() as u64 };
        out.jobs.push(&announced.encode());
        Ok(())
    }

    fn take_messages(&self, incoming: &mut Incoming) -> Result<(), Error> {
        loop {
            match self.socket.receive(false)? {
                Received::Nothing => return Ok(()),
                Received::End => return Err(Error::System("the peer's end is closed".into())),
                Received::Message(Message::Wake, None) => {}
                Received::Message(Message::Region { serial, len }, Some(file)) => {
                    let source = |len| Ok(Source::Host(ForeignRegion::map(file, len)?));
                    incoming.take_region(serial, len, source)?;
                }
                #[cfg(feature = "cuda")]
                Received::Message(Message::GpuRegion { serial, len, handle }, None) => {
                    incoming.take_region(serial, len, |len| self.import(&handle, len))?;
                }
                Received::Message(..) => return Err(Error::Rule("an unexpected message")),
            }
        }
    }

    /// Lands a write, and answers; returns its bytes. The caller wakes those who wait for it.
    fn receive(
        self: &Arc<Self>,
        node: &Arc<Node>,
        life: &Arc<Life>,
        incoming: &mut Incoming,
        words: &[u64; JOB_WORDS],
    ) -> Result<u64, Error> {
        let announced = Announced::decode(words);
        while !node.wait_until_polled(Duration::from_millis(100)) {
            if self.is_closed() {
                return Ok(0);
            }
        }
        let Header { sequence, failed, len, .. } = announced.header;
        if let Some(generation) = failed
            && !node.failed_at_peer(life, generation)
        {
            return Ok(0);
        }
        let landed = if failed.is_some() && life.has_landed(sequence) {
            true
        } else {
            if !incoming.regions.contains_key(&announced.region) {
                // Its region was handed over before it was announced.
                self.take_messages(incoming)?;
            }
            let source = incoming.regions.get(&announced.region);
            let landed = match source.ok_or(Error::Rule("a write from a region that was never given"))? {
                Source::Host(source) => self.land(node, life, source, &announced)?,
                #[cfg(feature = "cuda")]
                Source::Gpu(source) => {
                    let source = Arc::clone(source);
                    self.begin(node, life, incoming, &source, &announced)?;
                    None
                }
            };
            match landed {
                Some(landed) => landed,
                None => return Ok(0),
            }
        };
        // The end of a life closes its lanes and then its windows: what is refused for that is nobody's fault.
        let open = lock(&self.open);
        if !*open {
            return Ok(0);
        }
        if !landed {
            node.note_refused(life, self.path(), &announced.header);
        }
        incoming.answers.push(&[sequence << 1 | u64::from(landed)]);
        Ok(len)
    }

    /// Whether the write landed; None when there is nobody to tell any more.
    fn land(
        &self,
        node: &Node,
        life: &Life,
        source: &ForeignRegion,
        announced: &Announced,
    ) -> Result<Option<bool>, Error> {
        let Header { window, offset, len, .. } = announced.header;
        let Some(landing) = node.windows.find(life.peer, &window, offset, len) else {
            return Ok(Some(false));
        };
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(PIECE as u64) as usize;
            let open = lock(&self.open);
            if !*open {
                return Ok(None);
            }
            let from = announced.at.saturating_add(done);
            let mut copied = Ok(());
            let copy = |place: &mut [u8]| match len >= STREAM_FROM {
                true => source.stream_out(from, place),
                false => source.copy_out(from, place),
            };
            if !landing.land_by(offset + done, piece, |place| copied = copy(place)) {
                return Ok(Some(false));
            }
            copied.map_err(|_| Error::Rule("a write from beyond its region"))?;
            done += piece as u64;
        }
        if !landing.deposit(offset, len) {
            return Ok(Some(false));
        }
        let open = lock(&self.open);
        // What was copied after the writer took its source back may be anything.
        if !*open || !self.peers.lent_until_now() {
            return Ok(None);
        }
        self.report(node, life, &landing, &announced.header).map(Some)
    }

    /// All bytes of a write are there: reports it, unless its window has been closed.
    fn report(&self, node: &Node, life: &Life, landing: &Landing, header: &Header) -> Result<bool, Error> {
        let Header { len, immediate, sequence, floor, .. } = *header;
        let key = landing.key();
        if !landing.complete(|| node.report_landed_quietly(life.peer, immediate, len, key)) {
            return Ok(false);
        }
        node.count_landed(life, self.path(), len);
        life.note_landed(sequence, floor)
            .map_err(|_| Error::Rule("too many writes that are not reported"))?;
        Ok(true)
    }
}

impl Lane for ShmLane {
    fn id(&self) -> LaneId {
        self.id
    }

    fn path(&self) -> Path {
        self.way.path()
    }

    #[cfg(feature = "cuda")]
    fn reads_twin(&self, source: &Extent) -> bool {
        matches!(&self.way, Way::Gpu(gpu) if gpu.reaches(source.region()))
    }

    fn push(&self, job: Job) {
        self.load.fetch_add(job.write.source.len() as u64, Ordering::Relaxed);
        self.unsettled.fetch_add(1, Ordering::Relaxed);
        let mut out = lock(&self.out);
        if !out.waiting.is_empty() || !out.jobs.has_room().unwrap_or(false) {
            // The peer answers what fills the queue, and then this is announced.
            out.waiting.push_back(job);
            return;
        }
        let announced = self.announce(&mut out, &job);
        drop(out);
        match announced {
            Ok(()) => self.wake_peer(),
            Err(error) => {
                tracing::warn!(%error, "cannot use shared memory");
                // The lane's thread sees that, and has the write repeated elsewhere.
                self.socket.close();
            }
        }
    }

    fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    fn start(self: Arc<Self>, node: &Arc<Node>, life: &Arc<Life>) {
        let Some(incoming) = lock(&self.incoming).take() else { return };
        let (run, life_of_thread) = (Arc::clone(node), Arc::clone(life));
        let lane = Arc::clone(&self);
        let spawned =
            node.spawn(format!("shm-{}", life.peer), move || lane.run(&run, &life_of_thread, incoming));
        if let Err(error) = spawned {
            node.lane_failed(life, &*self, &format!("no thread for it: {error}"));
        }
    }

    fn close(&self, _reason: &str) {
        self.closed.store(true, Ordering::Release);
        self.own.set_lends(false);
        *lock(&self.open) = false;
        #[cfg(feature = "cuda")]
        if let Way::Gpu(gpu) = &self.way {
            gpu.wait();
        }
        self.socket.close();
    }
}
