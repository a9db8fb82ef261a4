//! Sample after sample: the ways in turn, at every point, round after round.

use crate::Options;
use crate::pattern::Slots;
use crate::place::Place;
use crate::process::{Process, Setting};
use crate::way::{Kind, Way};
use anyhow::{Context, ensure};
use std::fmt;
use std::path::Path;

/// The least memory of each kind that a process has.
const REGION: usize = 256 << 20;
/// The smallest extent: what names one takes as many bytes.
const MIN_EXTENT: usize = 64;
/// Before each sample. The first pages, the first windows of congestion: not what is to be measured.
const WARM_UP: f64 = 0.02;

/// What is sent, and to how many at once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Point {
    /// Bytes of a message.
    pub(crate) size: usize,
    pub(crate) extents: usize,
    pub(crate) peers: usize,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Point { size, extents, peers } = self;
        write!(f, "{size} bytes, extents: {extents}, peers: {peers}")
    }
}

/// What one sample gave.
pub(crate) struct Sample {
    pub(crate) round: usize,
    /// Place in the options.
    pub(crate) way: usize,
    pub(crate) point: Point,
    pub(crate) gb_per_s: f64,
    /// Seconds of processor time for a gigabyte: of the first process, and of all others.
    pub(crate) cpu_send: f64,
    pub(crate) cpu_receive: f64,
    /// Microseconds until each lone message was reported to its sender, and until it was seen where it landed.
    pub(crate) reported_us: Vec<f64>,
    pub(crate) landed_us: Vec<f64>,
}

/// Where processes run.
#[derive(PartialEq, Eq)]
pub(crate) struct Machine {
    /// Which monotonic clock they read.
    clock: String,
    pub(crate) cpus: usize,
    pub(crate) cpu: String,
}

impl Machine {
    pub(crate) fn parse(text: &str) -> anyhow::Result<Machine> {
        let mut words = text.splitn(3, ' ').map(str::to_owned);
        let mut next = || words.next().context("a clock, a number of processors and their name");
        Ok(Machine { clock: next()?, cpus: next()?.parse()?, cpu: next()? })
    }
}

/// What was found, and where: the sender's machine, and that of the others if it is another one.
pub(crate) struct Measured {
    pub(crate) samples: Vec<Sample>,
    pub(crate) machines: Vec<Machine>,
}

/// The processes of a way.
struct Ends {
    sender: Process,
    receivers: Vec<Process>,
    /// None if it is another engine, which cannot say.
    machines: Option<Vec<Machine>>,
}

pub(crate) fn all(options: &Options, dir: &Path) -> anyhow::Result<Measured> {
    let points = points(options)?;
    let region = options.sizes.iter().copied().max().unwrap_or(0).max(REGION);
    let places = match <[Place; 2]>::try_from(options.hosts.clone()) {
        Ok(places) => places,
        Err(_) => {
            // Before the processes that share it look for it.
            tandem_transport::Identity::load_or_create(dir)?;
            Place::usual()?
        }
    };
    let mut setting = Setting { region, dir, python: options.peer.as_deref(), places };
    let mut ends = Vec::new();
    for way in &options.ways {
        ends.push(start(way, options, &mut setting).with_context(|| format!("{way}"))?);
    }
    let of_round =
        points.iter().map(|point| options.ways.iter().filter(|way| has(options, way, *point)).count());
    let samples = options.rounds * of_round.sum::<usize>();
    eprintln!("samples: {samples}, {:.0} s at least", samples as f64 * options.seconds);
    let (mut found, mut given_up) = (Vec::new(), Vec::new());
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for &point in &points {
            for (way, ends) in ends.iter_mut().enumerate() {
                let name = &options.ways[way];
                if !has(options, name, point) || given_up.contains(&(way, point)) {
                    continue;
                }
                let Point { size, extents, .. } = point;
                let seed = (found.len() * 2) as u64;
                let slots = Slots::new(size, extents, options.under_way, name.connections, region, seed);
                let sample = ends.sample(options, way, round, point, slots);
                match sample.with_context(|| format!("{name}, {point}")) {
                    Ok(sample) => found.push(sample),
                    // Another's faults are not to end the run.
                    Err(error) if name.is_peer() => {
                        eprintln!("left out from here on: {error:#}");
                        given_up.push((way, point));
                        *ends = start(name, options, &mut setting)?;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    ensure!(!found.is_empty(), "nothing was measured");
    let machines = ends.into_iter().filter_map(|ends| ends.machines).max_by_key(Vec::len);
    Ok(Measured { samples: found, machines: machines.unwrap_or_default() })
}

/// Limits that need one process only are measured once for all numbers of peers.
fn has(options: &Options, way: &Way, point: Point) -> bool {
    if way.is_alone() {
        point.peers == 1
    } else {
        options.peers.iter().any(|&peers| usize::from(peers) == point.peers)
    }
}

fn points(options: &Options) -> anyhow::Result<Vec<Point>> {
    let mut points = Vec::new();
    for &size in &options.sizes {
        for extents in options.extents.iter().map(|&extents| usize::from(extents)) {
            if size / extents < MIN_EXTENT || !size.is_multiple_of(8 * extents) {
                eprintln!(
                    "left out: {size} bytes in {extents} extents; an extent has {MIN_EXTENT} bytes or more, in multiples of 8"
                );
                continue;
            }
            let mut peers: Vec<_> = options.peers.iter().map(|&peers| usize::from(peers)).collect();
            if !peers.contains(&1) && options.ways.iter().any(Way::is_alone) {
                peers.insert(0, 1);
            }
            points.extend(peers.into_iter().map(|peers| Point { size, extents, peers }));
        }
    }
    ensure!(!points.is_empty(), "nothing is left to measure");
    Ok(points)
}

fn start(way: &Way, options: &Options, setting: &mut Setting<'_>) -> anyhow::Result<Ends> {
    let peers = options.peers.iter().copied().max().map_or(1, usize::from);
    let receivers = match way.kind {
        // The second copies for itself.
        Kind::Memcpy | Kind::P2p if options.both_ways => 1,
        _ if way.is_alone() => 0,
        _ => peers,
    };
    let mut sender = Process::start(way, 0, setting)?;
    let mut receivers: Vec<_> =
        (1..=receivers).map(|index| Process::start(way, index, setting)).collect::<Result<_, _>>()?;
    let mut peers = Vec::new();
    for receiver in &mut receivers {
        peers.push(receiver.open(way, &sender)?);
    }
    sender.connect(&peers)?;
    if options.both_ways {
        // If any sends back, it is the first.
        for receiver in &mut receivers {
            receiver.connect(&[sender.open(way, receiver)?])?;
        }
    }
    let machines = if way.is_peer() {
        None
    } else {
        let mut machines = vec![sender.machine()?];
        for receiver in receivers.iter_mut().take(1) {
            machines.push(receiver.machine()?);
        }
        machines.dedup_by(|a, b| a.clock == b.clock);
        Some(machines)
    };
    let ends = Ends { sender, receivers, machines };
    ends.let_run(way, ends.receivers.len(), false)?;
    Ok(ends)
}

impl Ends {
    /// Peers run during their own samples only, and no more of them than these need. Ours may not be stopped: they
    /// would be taken for dead.
    fn let_run(&self, way: &Way, receivers: usize, run: bool) -> anyhow::Result<()> {
        if !way.is_peer() {
            return Ok(());
        }
        self.sender.let_run(run)?;
        self.receivers[..receivers].iter().try_for_each(|process| process.let_run(run))
    }

    fn sample(
        &mut self,
        options: &Options,
        index: usize,
        round: usize,
        point: Point,
        slots: Slots,
    ) -> anyhow::Result<Sample> {
        let (way, Point { size, peers, .. }) = (&options.ways[index], point);
        self.let_run(way, peers, true)?;
        let back = Slots { seed: slots.seed + 1, ..slots };
        self.sender.ask(&format!("fill {slots}"))?;
        if options.both_ways {
            self.receivers[0].ask(&format!("fill {back}"))?;
        }
        self.run(options, peers, WARM_UP, slots, back)?;
        let before = self.cpu(peers)?;
        let runs = self.run(options, peers, options.seconds, slots, back)?;
        let after = self.cpu(peers)?;
        let mut gigabytes = 0.0;
        let mut gb_per_s = 0.0;
        for (messages, seconds) in runs {
            ensure!(messages > (slots.count * peers) as u64, "{messages} messages in {seconds} s");
            gigabytes += messages as f64 * size as f64 / 1e9;
            gb_per_s += messages as f64 * size as f64 / 1e9 / seconds;
        }
        let (reported_us, landed_us) = if peers == 1 && !options.both_ways && options.pings > 0 {
            self.ping(options, way, slots)?
        } else {
            (Vec::new(), Vec::new())
        };
        if matches!(way.kind, Kind::Memcpy | Kind::P2p) {
            self.sender.verify(slots)?;
        }
        if !way.is_alone() {
            for receiver in self.receivers.iter_mut().take(peers) {
                receiver.verify(slots)?;
            }
            if options.both_ways {
                self.sender.verify(back)?;
            }
        }
        self.let_run(way, peers, false)?;
        Ok(Sample {
            round,
            way: index,
            point,
            gb_per_s,
            cpu_send: (after.0 - before.0) / gigabytes,
            cpu_receive: (after.1 - before.1) / gigabytes,
            reported_us,
            landed_us,
        })
    }

    /// Messages and seconds of each process that sends.
    fn run(
        &mut self,
        options: &Options,
        peers: usize,
        seconds: f64,
        slots: Slots,
        back: Slots,
    ) -> anyhow::Result<Vec<(u64, f64)>> {
        self.sender.send(peers, seconds, slots)?;
        if options.both_ways {
            self.receivers[0].send(1, seconds, back)?;
        }
        let mut runs = vec![self.sender.sent()?];
        if options.both_ways {
            runs.push(self.receivers[0].sent()?);
        }
        Ok(runs)
    }

    /// Seconds of processor time of the first process, and of so many others.
    fn cpu(&mut self, peers: usize) -> anyhow::Result<(f64, f64)> {
        let sender = self.sender.cpu()?;
        let mut receivers = 0.0;
        for receiver in self.receivers.iter_mut().take(peers) {
            receivers += receiver.cpu()?;
        }
        Ok((sender, receivers))
    }

    fn ping(&mut self, options: &Options, way: &Way, slots: Slots) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
        // Both ends look at one clock, or know nothing of it.
        let tells =
            way.tells_landings() && self.machines.as_ref().is_some_and(|machines| machines.len() == 1);
        if tells {
            self.receivers[0].ask(&format!("watch {}", slots.extents))?;
        }
        let pings = self.sender.list(&format!("ping {} {} {slots}", options.pings, options.seconds))?;
        let (begun, took): (Vec<_>, Vec<_>) = pings.chunks_exact(2).map(|ping| (ping[0], ping[1])).unzip();
        let landed =
            if tells { self.receivers[0].list(&format!("landings {}", begun.len()))? } else { Vec::new() };
        ensure!(
            !tells || landed.len() == begun.len(),
            "{} of {} lone messages were seen to land",
            landed.len(),
            begun.len()
        );
        let since = landed.iter().zip(&begun).map(|(landed, begun)| landed.saturating_sub(*begun));
        Ok((took.iter().map(|ns| *ns as f64 / 1e3).collect(), since.map(|ns| ns as f64 / 1e3).collect()))
    }
}
