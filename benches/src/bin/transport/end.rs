//! One process of a way: it answers the questions of the process that measures, line by line.
//!
//! `benches/peers/transfer.py` answers the same ones for the peers.

#[cfg(feature = "cuda")]
use crate::p2p;
use crate::pattern::Slots;
use crate::way::{Kind, Way};
use crate::{aes, cma, memcpy, ours, quinn, tcp};
use anyhow::{Context, bail};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;

/// What a process sends from, and where its peers' messages land.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) source: Arc<HostRegion>,
    pub(crate) landing: Arc<HostRegion>,
}

/// One process of a way. It lands what comes as long as it lives.
pub(crate) trait End {
    /// What others need to reach it, on one line.
    fn hello(&self) -> String {
        "nothing".into()
    }

    /// Lets a peer write, which said this in [`End::hello`]. What it needs for that, on one line.
    fn open(&mut self, _hello: &str) -> anyhow::Result<String> {
        bail!("nobody needs to be let write here")
    }

    /// Gives it the peers that it sends to, by what they said in [`End::hello`], and in [`End::open`] if they were asked.
    fn connect(&mut self, _peers: &[&str]) -> anyhow::Result<()> {
        Ok(())
    }

    /// Sends one message to a peer and waits until it is reported.
    fn one(&mut self, slots: Slots, peer: usize, message: u64) -> anyhow::Result<()>;

    /// Sends message after message to so many peers at once, for so long and until each has got one in every
    /// slot. Returns how many were sent; all are reported then.
    fn run(&mut self, slots: Slots, peers: usize, time: Duration) -> anyhow::Result<u64> {
        let (begun, peers, mut done) = (Instant::now(), peers as u64, 0u64);
        while begun.elapsed() < time || done <= slots.count as u64 * peers {
            self.one(slots, (done % peers) as usize, done / peers)?;
            done += 1;
        }
        Ok(done)
    }
}

/// When messages were seen to have landed, while somebody wants to know.
#[derive(Default)]
pub(crate) struct Landings {
    /// Writes that make a message; 0 while nobody wants to know.
    writes_per_message: AtomicUsize,
    seen: Mutex<Seen>,
    another: Condvar,
}

#[derive(Default)]
struct Seen {
    writes: usize,
    /// Nanoseconds of the monotonic clock.
    messages: Vec<u64>,
}

impl Landings {
    /// How long the last of them may take to be seen.
    const PATIENCE: Duration = Duration::from_secs(5);

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many writes of the peer's have landed just now.
    pub(crate) fn note(&self, writes: usize) {
        let per_message = self.writes_per_message.load(Ordering::Relaxed);
        if per_message == 0 {
            return;
        }
        let mut seen = self.seen();
        seen.writes += writes;
        if seen.writes.is_multiple_of(per_message) {
            seen.messages.push(now());
            self.another.notify_one();
        }
    }

    fn watch(&self, writes_per_message: usize) {
        *self.seen() = Seen::default();
        self.writes_per_message.store(writes_per_message, Ordering::Relaxed);
    }

    /// So many, which have been sent since it watches.
    fn take(&self, messages: usize) -> Vec<u64> {
        let all = self
            .another
            .wait_timeout_while(self.seen(), Self::PATIENCE, |seen| seen.messages.len() < messages);
        let (mut seen, _) = all.unwrap_or_else(PoisonError::into_inner);
        self.writes_per_message.store(0, Ordering::Relaxed);
        std::mem::take(&mut seen.messages)
    }
}

/// Runs the process until its standard input ends. `index` is 0 for the sender.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "it chooses the GPU"))]
pub(crate) fn serve(
    way: &Way,
    index: usize,
    region: usize,
    listen: SocketAddr,
    dir: &Path,
) -> anyhow::Result<()> {
    let memory = match way.kind {
        #[cfg(feature = "cuda")]
        _ if way.is_on_gpus() => p2p::memory(way, index, region)?,
        // What applications have, and the kernel pins fastest.
        Kind::Cma => Memory { source: HostRegion::private(region)?, landing: HostRegion::private(region)? },
        _ => Memory { source: HostRegion::map(region)?, landing: HostRegion::map(region)? },
    };
    let landings = Arc::new(Landings::default());
    let mut end = begin(way, &memory, &landings, listen, dir)?;
    println!("{}", end.hello());
    for line in std::io::stdin().lines() {
        let line = line?;
        let (question, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = match question {
            "open" => end.open(rest),
            "connect" => end.connect(&rest.split('\t').collect::<Vec<_>>()).map(|()| "connected".into()),
            "fill" => {
                Slots::fill(rest.parse()?, &memory)?;
                Ok("filled".into())
            }
            "run" => {
                let (peers, seconds, slots) = two_and_slots(rest)?;
                let begun = Instant::now();
                let sent = end.run(slots, peers as usize, Duration::from_secs_f64(seconds))?;
                Ok(format!("{sent} {}", begun.elapsed().as_secs_f64()))
            }
            "ping" => {
                let (most, seconds, slots) = two_and_slots(rest)?;
                ping(end.as_mut(), slots, most as usize, Duration::from_secs_f64(seconds))
            }
            "watch" => {
                landings.watch(rest.parse()?);
                Ok("watching".into())
            }
            "landings" => {
                Ok(landings.take(rest.parse()?).iter().map(u64::to_string).collect::<Vec<_>>().join(" "))
            }
            "machine" => machine(),
            "cpu" => Ok(cpu().to_string()),
            "verify" => Ok(match Slots::verify(rest.parse()?, &memory) {
                Ok(()) => "right".into(),
                Err(error) => error.to_string(),
            }),
            _ => bail!("no question: {line}"),
        };
        println!("{}", answer?);
    }
    Ok(())
}

fn begin(
    way: &Way,
    memory: &Memory,
    landings: &Arc<Landings>,
    listen: SocketAddr,
    dir: &Path,
) -> anyhow::Result<Box<dyn End>> {
    let (memory, landings) = (memory.clone(), Arc::clone(landings));
    let identity = || tandem_transport::Identity::load_or_create(dir);
    Ok(match way.kind {
        Kind::Memcpy => Box::new(memcpy::Memcpy(memory)),
        #[cfg(feature = "cuda")]
        Kind::P2p => Box::new(p2p::P2p::new(&memory)?),
        #[cfg(not(feature = "cuda"))]
        Kind::P2p => bail!("{way} needs a build with feature cuda"),
        Kind::Aes => Box::new(aes::Aes::new(memory)?),
        Kind::Cma => Box::new(cma::Cma::new(memory)),
        Kind::Tcp => Box::new(tcp::Tcp::new(way, listen, memory, landings)?),
        Kind::Ours { path, .. } => {
            let config = ours::config(path, way.tuning()?, way.connections);
            Box::new(ours::Ours::new(&identity()?, listen, config, memory, landings)?)
        }
        Kind::Quinn { .. } => {
            Box::new(quinn::Bare::new(&identity()?, listen, way.tuning()?, memory, landings)?)
        }
        Kind::Nixl { .. } | Kind::Mooncake => bail!("{way} is run by a script"),
    })
}

fn two_and_slots(text: &str) -> anyhow::Result<(u64, f64, Slots)> {
    let mut parts = text.splitn(3, ' ');
    let mut next = || parts.next().context("two numbers and slots");
    Ok((next()?.parse()?, next()?.parse()?, next()?.parse()?))
}

/// One message after the other, each once the one before is reported: when each began, and how long it took, in
/// nanoseconds.
fn ping(end: &mut dyn End, slots: Slots, most: usize, time: Duration) -> anyhow::Result<String> {
    let (begun, mut answer) = (Instant::now(), String::new());
    for message in 0..most {
        let start = now();
        end.one(slots, 0, message as u64)?;
        write!(answer, "{}{start} {}", if message > 0 { " " } else { "" }, now() - start)?;
        if begun.elapsed() > time {
            break;
        }
    }
    Ok(answer)
}

/// Which monotonic clock this process reads, how many processors it has, and what they are.
fn machine() -> anyhow::Result<String> {
    let file = "/proc/sys/kernel/random/boot_id";
    let boot = std::fs::read_to_string(file).context(file)?;
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    Ok(format!("{} {cpus} {}", boot.trim(), tandem_benches::cpu_model()))
}

/// The monotonic clock, which all processes of a host share, in nanoseconds.
fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Seconds of processor time that this process has used.
fn cpu() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
