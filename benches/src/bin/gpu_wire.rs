//! How near does a handoff come to the link between two GPUs? From the pages of one process to those of another: packed,
//! written by the transport, scattered, and the checksums of both sides compared. Of the 8B shape (32 layers, 8 heads of
//! 128, bf16; pages of 16 tokens in random order), beside a copy of the same bytes between the same GPUs.

use anyhow::{Context, bail, ensure};
use clap::Parser;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::task::{Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};
use tandem_benches::kv::{CHUNK_TOKENS, Gpu, Shape, fill};
use tandem_benches::median;
use tandem_kernels::Order;
use tandem_kernels::cuda::{Chunk, DevicePages, Place, Plan, Share};
use tandem_memory::HostRegion;
use tandem_memory::cuda::{Copies, Device, DeviceExtent, DeviceRegion};
use tandem_proto::ids::{NodeId, PageId};
use tandem_transport::{Event, Identity, NetConfig, NetTransport, Path, RegionId, Transport, Window, Write};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Lines that were said and not heard: the pipe holds others back.
const LINES: usize = 64;

/// Measures the handoff of KV from one GPU to another, or within one where there is no second.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Tokens of the largest case, 128 KiB each.
    #[arg(long, default_value_t = 8192)]
    tokens: u32,
    /// The path of the writes.
    #[arg(long, default_value = "cuda_ipc")]
    path: Path,
    /// Samples of each figure. Medians are reported.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Multiprocessors for packing, and for scattering.
    #[arg(long, default_value = "32")]
    multiprocessors: NonZeroU32,
    /// The process where it lands, which this program starts by itself, and who writes to it.
    #[arg(long, hide = true, requires = "writer")]
    decode: Option<PathBuf>,
    #[arg(long, hide = true)]
    writer: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    ensure!(
        options.tokens > 0 && options.tokens.is_multiple_of(CHUNK_TOKENS),
        "--tokens must be a multiple of {CHUNK_TOKENS}"
    );
    match &options.decode {
        Some(dir) => Decode::new(&options, dir)?.run(),
        None => prefill(&options),
    }
}

/// What is handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Case {
    chunks: usize,
    /// Tokens of each chunk.
    tokens: u32,
    layers: u32,
    /// Layers that are packed, written and scattered together.
    step: u32,
}

impl Case {
    fn all(shape: &Shape) -> [(&'static str, Case); 3] {
        let (chunks, layers) = (shape.chunks(), shape.layout.layers);
        [
            ("all layers", Case { chunks, tokens: CHUNK_TOKENS, layers, step: 1 }),
            ("one layer", Case { chunks, tokens: CHUNK_TOKENS, layers: 1, step: 1 }),
            ("16 tokens", Case { chunks: 1, tokens: 16, layers, step: layers }),
        ]
    }

    fn steps(self) -> usize {
        self.layers.div_ceil(self.step) as usize
    }

    fn layers_of(self, step: usize) -> Range<u32> {
        let start = step as u32 * self.step;
        start..(start + self.step).min(self.layers)
    }

    /// Where those of a chunk lie.
    fn place(self, shape: &Shape, chunk: usize, layers: &Range<u32>) -> Range<usize> {
        let (layer, base) = (shape.layout.layer_bytes(self.tokens), chunk * shape.chunk_bytes());
        base + layers.start as usize * layer..base + layers.end as usize * layer
    }

    fn bytes(self, shape: &Shape) -> usize {
        self.chunks * shape.layout.layer_bytes(self.tokens) * self.layers as usize
    }

    fn set(
        self,
        plan: &mut Plan,
        shape: &Shape,
        pages: &[PageId],
        packed: &DeviceExtent,
    ) -> anyhow::Result<()> {
        let all = 0..shape.layout.layers;
        let places = (0..self.chunks)
            .map(|chunk| Ok(packed.part(self.place(shape, chunk, &all))?))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let per_chunk = self.tokens.div_ceil(16) as usize;
        let chunks: Vec<Chunk<'_>> = (pages.chunks(per_chunk).zip(&places))
            .map(|(pages, place)| Chunk { tokens: self.tokens, pages, place: Place::Packed(place) })
            .collect();
        Ok(plan.set(&shape.layout, None, &chunks)?)
    }
}

/// One side: a GPU with packed memory that the transport moves, and pages.
struct Side {
    node: NodeId,
    shape: Shape,
    gpu: Gpu,
    packed: Arc<HostRegion>,
    packed_there: DeviceExtent,
    pages: DevicePages,
    transport: NetTransport,
    region: RegionId,
    events: Vec<Event>,
    share: Share,
}

impl Side {
    fn new(options: &Options, ordinal: usize, dir: &FilePath) -> anyhow::Result<Side> {
        let shape = Shape::new(options.tokens, Order::Heads);
        let gpu = Gpu::open(ordinal)?;
        let packed = HostRegion::with_twin(gpu.kernels.device(), shape.bytes())?;
        let packed_there = packed.extent(0..packed.len())?.on_device().context("a twin")?;
        let pages = DevicePages::new(shape.layout, gpu.take(shape.layout.bytes())?)?;
        let config = NetConfig {
            paths: vec![options.path],
            gpu: Some(Arc::clone(gpu.kernels.device())),
            write_limit: 1 << 16,
            ..NetConfig::default()
        };
        let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let identity = Identity::load_or_create(dir)?;
        let mut transport = NetTransport::bind(here, &identity, config)?;
        let region = transport.register(Arc::clone(&packed))?;
        transport.set_waker(Waker::from(Arc::new(Unpark(std::thread::current()))));
        let share = Share { checksum: true, multiprocessors: Some(options.multiprocessors) };
        let node = identity.node();
        Ok(Side {
            node,
            shape,
            gpu,
            packed,
            packed_there,
            pages,
            transport,
            region,
            events: Vec::new(),
            share,
        })
    }

    /// Waits a little, or until the transport has something to tell.
    fn rest(&self) {
        std::thread::park_timeout(Duration::from_millis(50));
    }

    fn until_connected(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            self.transport.poll(&mut self.events);
            match self.events.pop() {
                Some(Event::Connected { .. }) => return Ok(()),
                Some(other) => bail!("{other:?}"),
                None => {}
            }
            ensure!(Instant::now() < until, "no connection within {PATIENCE:?}");
            self.rest();
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The monotonic clock, which all processes of a host share, in nanoseconds.
fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The process where KV lands, told what to do line by line.
struct Decode {
    side: Side,
    plan: Plan,
    lines: mpsc::Receiver<String>,
    case: Case,
    /// By step: writes that have landed, and the checksums of both sides.
    landed: Vec<usize>,
    theirs: BTreeMap<usize, Vec<u64>>,
    own: BTreeMap<usize, Vec<u64>>,
    /// When the last write had landed.
    landed_at: u64,
}

impl Decode {
    fn new(options: &Options, dir: &FilePath) -> anyhow::Result<Decode> {
        let writer = NodeId(options.writer.context("--writer")?);
        let last = Device::count()?.min(2) - 1;
        let mut side = Side::new(options, last, dir)?;
        let plan = side.gpu.plan(&side.shape)?;
        let Window { region, key, offset, len } =
            side.transport.open_window(writer, side.region, 0..side.packed.len())?;
        println!("{} {} {region} {key} {offset} {len}", side.node.0, side.transport.local_addr());
        side.until_connected()?;
        println!("connected");
        let (sender, lines) = mpsc::sync_channel(LINES);
        let main = std::thread::current();
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                let _ = sender.send(line);
                main.unpark();
            }
            drop(sender);
            main.unpark();
        });
        let case = Case::all(&side.shape)[0].1;
        let (landed, theirs, own) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Ok(Decode { side, plan, lines, case, landed, theirs, own, landed_at: 0 })
    }

    fn run(mut self) -> anyhow::Result<()> {
        loop {
            let mut busy = self.take_in()?;
            while let Some(moved) = self.plan.poll_checksums()? {
                self.own.insert((moved.layers.start / self.case.step) as usize, moved.sums);
                busy = true;
            }
            match self.lines.try_recv() {
                Ok(line) => {
                    self.obey(&line)?;
                    busy = true;
                }
                Err(mpsc::TryRecvError::Empty) => {}
                Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
            }
            if !self.landed.is_empty()
                && self.own.len() == self.case.steps()
                && self.theirs.len() == self.own.len()
            {
                ensure!(self.own == self.theirs, "other bytes were scattered than were packed");
                println!("done {} {}", now(), self.landed_at);
                self.clear();
            }
            let scattering = self.landed.iter().filter(|landed| **landed == self.case.chunks).count();
            if !busy && scattering == self.own.len() {
                self.side.rest();
            }
        }
    }

    fn clear(&mut self) {
        self.landed = vec![0; self.case.steps()];
        self.own.clear();
        self.theirs.clear();
    }

    /// Scatters what has landed.
    fn take_in(&mut self) -> anyhow::Result<bool> {
        self.side.transport.poll(&mut self.side.events);
        let busy = !self.side.events.is_empty();
        for event in std::mem::take(&mut self.side.events) {
            match event {
                Event::Landed { immediate, .. } => {
                    let landed = self.landed.get_mut(immediate as usize).context("a step")?;
                    *landed += 1;
                    if *landed == self.case.chunks {
                        self.landed_at = now();
                        let layers = self.case.layers_of(immediate as usize);
                        self.plan.scatter(&self.side.pages, layers.clone(), self.side.share)?;
                        self.plan.fetch_checksums(layers)?;
                    }
                }
                // The other process has ended; so will this one.
                Event::Severed { .. } => {}
                other => bail!("{other:?}"),
            }
        }
        Ok(busy)
    }

    fn obey(&mut self, line: &str) -> anyhow::Result<()> {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["case", index] => {
                self.case = Case::all(&self.side.shape).get(index.parse::<usize>()?).context("a case")?.1;
                let pages = self.side.shape.pages(7);
                self.case.set(&mut self.plan, &self.side.shape, &pages, &self.side.packed_there)?;
                self.clear();
                println!("ready");
            }
            ["sums", step, sums] => {
                let sums = sums.split(',').map(str::parse).collect::<Result<_, _>>()?;
                self.theirs.insert(step.parse()?, sums);
            }
            // Whether the pages hold what was handed over last.
            ["check", sums] => {
                let sums: Vec<u64> = sums.split(',').map(str::parse).collect::<Result<_, _>>()?;
                let layers = 0..self.case.layers;
                self.plan.digest(&self.side.pages, layers.clone())?;
                ensure!(self.plan.checksums(layers)? == sums, "the pages hold other bytes");
                println!("right");
            }
            _ => bail!("nothing is known of {line:?}"),
        }
        Ok(())
    }
}

/// The other process, as this one sees it.
struct Peer {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Peer {
    fn start(options: &Options, writer: NodeId, dir: &FilePath) -> anyhow::Result<Peer> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--tokens", &options.tokens.to_string(), "--path", options.path.name()])
            .args(["--multiprocessors", &options.multiprocessors.to_string()])
            .args(["--writer", &writer.0.to_string()])
            .arg("--decode")
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("a pipe")?);
        let (sender, lines) = mpsc::sync_channel(LINES);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Ok(Peer { child, stdin, lines })
    }

    fn hear(&self) -> anyhow::Result<String> {
        self.lines.recv_timeout(PATIENCE).context("the process where KV lands says nothing")
    }

    fn tell(&mut self, what: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.stdin.as_mut().context("a pipe")?, "{what}")?)
    }

    fn ask(&mut self, what: &str, expected: &str) -> anyhow::Result<()> {
        self.tell(what)?;
        let said = self.hear()?;
        ensure!(said == expected, "the process where KV lands says: {said}");
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.wait();
    }
}

/// Microseconds of one handoff.
struct Sample {
    /// From the first call until the checksums of the last layer agreed.
    verified: f64,
    /// Of these: until the first submit; from there until the last write had landed; and from there on.
    parts: [f64; 3],
}

struct Prefill {
    side: Side,
    peer: Peer,
    reader: NodeId,
    window: Window,
}

impl Prefill {
    fn round(&mut self, case: Case, plan: &mut Plan) -> anyhow::Result<(Sample, Vec<u64>)> {
        let (began, mut submitted) = (now(), None);
        let (mut started, mut packed, mut sent, mut all_sums) = (0, 0, 0, Vec::new());
        let until = Instant::now() + PATIENCE;
        while sent < case.steps() * case.chunks {
            if started < case.steps() {
                // All chunks of a layer by one launch, as far ahead as the plan takes them.
                plan.pack(&self.side.pages, case.layers_of(started), self.side.share)?;
                plan.fetch_checksums(case.layers_of(started))?;
                started += 1;
            }
            if let Some(moved) = plan.poll_checksums()? {
                submitted.get_or_insert_with(now);
                for chunk in 0..case.chunks {
                    let place = case.place(&self.side.shape, chunk, &moved.layers);
                    let offset = place.start as u64;
                    let (source, window) = (self.side.packed.extent(place)?, self.window);
                    let write = Write { ticket: 0, source, window, offset, immediate: packed as u32 };
                    self.side.transport.submit(self.reader, write)?;
                }
                self.peer.tell(&format!("sums {packed} {}", list(&moved.sums)))?;
                all_sums.extend(moved.sums);
                packed += 1;
                continue;
            }
            self.side.transport.poll(&mut self.side.events);
            for event in self.side.events.drain(..) {
                match event {
                    Event::Sent { .. } => sent += 1,
                    other => bail!("{other:?}"),
                }
            }
            ensure!(Instant::now() < until, "the handoff takes longer than {PATIENCE:?}");
            if packed == case.steps() && sent < packed * case.chunks {
                self.side.rest();
            }
        }
        let said = self.peer.hear()?;
        let [_, done, landed] = said.split(' ').collect::<Vec<_>>()[..] else { bail!("{said}") };
        let times = [began, submitted.context("something was written")?, landed.parse()?, done.parse()?];
        let us = |from: usize, to: usize| (times[to] - times[from]) as f64 / 1e3;
        Ok((Sample { verified: us(0, 3), parts: [us(0, 1), us(1, 2), us(2, 3)] }, all_sums))
    }
}

fn list(sums: &[u64]) -> String {
    sums.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

fn prefill(options: &Options) -> anyhow::Result<()> {
    let dir = std::env::temp_dir().join(format!("tandem-gpu-wire-{}", std::process::id()));
    Identity::load_or_create(&dir)?;
    let measured = measure(options, &dir);
    std::fs::remove_dir_all(&dir)?;
    measured
}

fn measure(options: &Options, dir: &FilePath) -> anyhow::Result<()> {
    let mut side = Side::new(options, 0, dir)?;
    let peer = Peer::start(options, side.node, dir)?;
    fill(&side.gpu, side.pages.storage())?;
    let hello = peer.hear()?;
    let [reader, addr, region, key, offset, len] = hello.split(' ').collect::<Vec<_>>()[..] else {
        bail!("{hello}")
    };
    let window =
        Window { region: region.parse()?, key: key.parse()?, offset: offset.parse()?, len: len.parse()? };
    let reader = NodeId(reader.parse()?);
    side.transport.connect(reader, addr.parse()?);
    side.until_connected()?;
    ensure!(peer.hear()? == "connected", "the process where KV lands is not connected");
    println!("{}, by {}", side.gpu.kernels.device().name(), options.path);
    let bound = Bound::new(&side)?;
    let mut prefill = Prefill { side, peer, reader, window };
    println!(
        "{:<12} {:>6} {:>12} {:>8}   {:>10} {:>10} {:>10} {:>12}",
        "", "MiB", "verified us", "GB/s", "before us", "wire us", "after us", "copy us"
    );
    for (index, (name, case)) in Case::all(&prefill.side.shape).into_iter().enumerate() {
        prefill.peer.ask(&format!("case {index}"), "ready")?;
        let bytes = case.bytes(&prefill.side.shape);
        // By turns other pages, so that what was handed over before is wrong.
        let mut plans = Vec::new();
        for seed in [1, 2] {
            let mut plan = prefill.side.gpu.plan(&prefill.side.shape)?;
            let pages = prefill.side.shape.pages(seed);
            case.set(&mut plan, &prefill.side.shape, &pages, &prefill.side.packed_there)?;
            plans.push(plan);
        }
        let (mut verified, mut copies) = (Vec::new(), Vec::new());
        let mut parts: [Vec<f64>; 3] = Default::default();
        const WARM: usize = 3;
        for round in 0..WARM + options.rounds {
            let (sample, sums) = prefill.round(case, &mut plans[round % 2])?;
            let copy = bound.copy(bytes)?;
            if round >= WARM {
                verified.push(sample.verified);
                parts.iter_mut().zip(sample.parts).for_each(|(part, us)| part.push(us));
                copies.push(copy);
            }
            if round + 1 == WARM + options.rounds {
                prefill.peer.ask(&format!("check {}", list(&sums)), "right")?;
            }
        }
        let [verified, copy] = [verified, copies].map(median);
        let [before, wire, after] = parts.map(median);
        let (mib, rate) = (bytes as f64 / f64::from(1 << 20), bytes as f64 / verified / 1e3);
        println!(
            "{name:<12} {mib:>6.0} {verified:>12.1} {rate:>8.1}   {before:>10.1} {wire:>10.1} {after:>10.1} {copy:>12.1}"
        );
    }
    Ok(())
}

/// A copy between the same GPUs by a copy engine, in this process.
struct Bound {
    copies: Copies,
    from: DeviceExtent,
    to: DeviceExtent,
}

impl Bound {
    fn new(side: &Side) -> anyhow::Result<Bound> {
        let last = Device::open(Device::count()?.min(2) - 1)?;
        let len = side.shape.bytes();
        let device = side.gpu.kernels.device();
        let to = DeviceRegion::take(&last, len)?;
        let to = DeviceRegion::import(device, &to.export()?, len)?.extent(0..len)?;
        Ok(Bound { copies: Copies::new(device, 1)?, from: side.gpu.take(len)?, to })
    }

    /// Microseconds, from the call until it is seen to be over.
    fn copy(&self, bytes: usize) -> anyhow::Result<f64> {
        let began = Instant::now();
        self.copies.start(&self.from.part(0..bytes)?, &self.to.part(0..bytes)?)?;
        self.copies.mark()?.wait()?;
        Ok(began.elapsed().as_secs_f64() * 1e6)
    }
}
