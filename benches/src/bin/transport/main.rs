//! How much of the machine does the transport give, and what does it cost? One run moves bytes from one
//! process into another's memory over loopback by every way in turn, beside the limits and the peers of this
//! machine: a plain copy, plain TCP, and quinn without our layers.
//!
//! Under `scripts/two-hosts` the bytes go from one host to the other, over its link.
//!
//! Every sample's bytes are checked where they landed. Processor time is counted in each process around the
//! sample alone.

mod ours;
mod pattern;
mod quinn;
mod tcp;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use pattern::{Slots, verify};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_transport::Tuning;

/// Measures the transport's paths beside copies, plain TCP and bare quinn.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  transport --ways memcpy,shm --sizes 64KiB,1MiB\n  scripts/two-hosts --delay 20ms --loss 0.1% -- transport --ways tcp,tcp-bbr,quic-1452:2 --sizes 1MiB --under-way 16MiB --seconds 5 --rounds 3"
)]
struct Options {
    /// What to measure: memcpy, tcp, shm, tls, quic-MTU (ours), quinn-MTU (without our layers). Append -NAME for
    /// another congestion control than the usual (quic, quinn: bbr or cubic; tcp: whatever the kernel has), then :N for
    /// N connections (tcp, tls, quic) or, for quic, so many threads too.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "memcpy,shm,tcp,tls,quic-8952,quinn-8952,quic-1452,quinn-1452"
    )]
    ways: Vec<Way>,
    /// Bytes of a write.
    #[arg(long, value_delimiter = ',', default_value = "64KiB,256KiB,1MiB,16MiB,64MiB", value_parser = tandem_process::units::bytes)]
    sizes: Vec<usize>,
    /// Bytes under way at once on each connection, as far as 4 to 64 writes of a size come near it. More than the path's
    /// rate times its round trip, or the path is not filled.
    #[arg(long, default_value = "4MiB", value_parser = tandem_process::units::bytes)]
    under_way: usize,
    /// Seconds of each sample.
    #[arg(long, default_value_t = 0.4)]
    seconds: f64,
    /// Samples of each figure. Medians are reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where to write the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The receiving process, which this program starts by itself.
    #[arg(long, hide = true)]
    receive: Option<Way>,
    /// The identity that both processes share.
    #[arg(long, hide = true)]
    identity: Option<PathBuf>,
}

/// A way for bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Way {
    name: String,
    kind: Kind,
    /// None is what there is without asking.
    congestion: Option<String>,
    connections: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Memcpy,
    Tcp,
    Ours { path: tandem_transport::Path, mtu: u16 },
    Quinn { mtu: u16 },
}

impl Way {
    /// For QUIC: what the transport is told, with this way's MTU on every path.
    fn tuning(&self) -> anyhow::Result<Tuning> {
        let (Kind::Ours { mtu, .. } | Kind::Quinn { mtu }) = self.kind else { return Ok(Tuning::default()) };
        let congestion =
            self.congestion.as_deref().map(str::parse).transpose().map_err(anyhow::Error::msg)?;
        let tuning = Tuning { mtu, loopback_mtu: mtu, ..Tuning::default() };
        Ok(Tuning { congestion: congestion.unwrap_or(tuning.congestion), ..tuning })
    }
}

impl std::str::FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Way, String> {
        let (what, connections) = text.split_once(':').unwrap_or((text, "1"));
        let connections = connections.parse().map_err(|_| format!("{text}: a number follows the colon"))?;
        let mut parts = what.split('-').peekable();
        let what = parts.next().unwrap_or_default();
        let mtu = parts.next_if(|part| part.starts_with(|c: char| c.is_ascii_digit())).unwrap_or("1452");
        let mtu = mtu.parse().map_err(|_| format!("{text}: {mtu} is no MTU"))?;
        let congestion = parts.next().map(str::to_owned);
        if let Some(more) = parts.next() {
            return Err(format!("{text}: nothing is known of {more:?}"));
        }
        let kind = match what {
            "memcpy" => Kind::Memcpy,
            "tcp" => Kind::Tcp,
            "quinn" => Kind::Quinn { mtu },
            path => Kind::Ours { path: path.parse()?, mtu },
        };
        Ok(Way { name: text.into(), kind, congestion, connections })
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// Bytes that lie in either process.
const REGION: usize = 256 << 20;
/// Writes under way at once on each connection.
const DEPTHS: std::ops::RangeInclusive<usize> = 4..=64;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// One side's end of a way, in the sending process.
trait Sender {
    /// Writes slot after slot, over and over, for so long; returns how many writes landed.
    fn run(&mut self, slots: Slots, time: Duration) -> anyhow::Result<u64>;
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(way) = &options.receive {
        let dir = options.identity.as_deref().context("--receive needs --identity")?;
        return receive(way, dir);
    }
    let dir = std::env::temp_dir().join(format!("tandem-bench-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let outcome = measure(&options, &dir);
    std::fs::remove_dir_all(&dir)?;
    outcome
}

/// What one sample gave.
struct Sample {
    way: usize,
    size: usize,
    gb_per_s: f64,
    /// Seconds of processor time for a gigabyte.
    cpu_send: f64,
    cpu_receive: f64,
}

fn measure(options: &Options, dir: &std::path::Path) -> anyhow::Result<()> {
    let identity = tandem_transport::Identity::load_or_create(dir)?;
    let source = HostRegion::map(REGION)?;
    let mut ends = Vec::new();
    for way in &options.ways {
        let mut child = Receiver::start(way, dir)?;
        let hello = child.line()?;
        let sender: Box<dyn Sender> = match way.kind {
            Kind::Memcpy => Box::new(Memcpy { from: Arc::clone(&source), to: HostRegion::map(REGION)? }),
            Kind::Tcp => Box::new(tcp::Tcp::connect(&hello, way, Arc::clone(&source))?),
            Kind::Ours { path, .. } => {
                let ours = ours::config(path, way.tuning()?, way.connections);
                Box::new(ours::Ours::connect(&hello, &identity, ours, Arc::clone(&source))?)
            }
            Kind::Quinn { .. } => {
                Box::new(quinn::Bare::connect(&hello, &identity, way.tuning()?, Arc::clone(&source))?)
            }
        };
        ends.push((child, sender));
    }
    let mut samples = Vec::new();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        for &size in &options.sizes {
            for (way, (receiver, sender)) in ends.iter_mut().enumerate() {
                let under_way = options.under_way;
                let slots =
                    Slots::new(size, under_way, options.ways[way].connections, (round * 1000 + way) as u64)?;
                slots.fill(&source);
                // The first pages, the first windows of congestion: not what is to be measured.
                sender.run(slots, Duration::from_millis(20))?;
                let (cpu, there) = (cpu(), receiver.cpu()?);
                let begun = Instant::now();
                let writes = sender.run(slots, Duration::from_secs_f64(options.seconds))?;
                let (seconds, cpu, there) =
                    (begun.elapsed().as_secs_f64(), self::cpu() - cpu, receiver.cpu()? - there);
                let gigabytes = writes as f64 * size as f64 / 1e9;
                ensure!(writes > slots.count as u64, "{}: {writes} writes in {seconds} s", options.ways[way]);
                if options.ways[way].kind != Kind::Memcpy {
                    receiver
                        .verify(slots)
                        .with_context(|| format!("{} of {size} bytes", options.ways[way]))?;
                }
                samples.push(Sample {
                    way,
                    size,
                    gb_per_s: gigabytes / seconds,
                    cpu_send: cpu / gigabytes,
                    cpu_receive: there / gigabytes,
                });
            }
        }
    }
    for (receiver, _) in ends {
        receiver.stop()?;
    }
    report(options, &samples)
}

struct Memcpy {
    from: Arc<HostRegion>,
    to: Arc<HostRegion>,
}

impl Sender for Memcpy {
    fn run(&mut self, slots: Slots, time: Duration) -> anyhow::Result<u64> {
        let (begun, mut done) = (Instant::now(), 0u64);
        while begun.elapsed() < time || done <= slots.count as u64 {
            let slot = slots.range(done);
            pattern::copy(&self.from, &self.to, slot);
            done += 1;
        }
        Ok(done)
    }
}

/// The receiving process.
struct Receiver {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Receiver {
    fn start(way: &Way, dir: &std::path::Path) -> anyhow::Result<Receiver> {
        let exe = std::env::current_exe()?;
        let mut command = Command::new(&exe);
        if let Ok(host) = std::env::var("TWO_HOSTS_PEER") {
            command = Command::new("ip");
            command.args(["netns", "exec", &host]).arg(&exe);
            command.env("TWO_HOSTS_IP", std::env::var("TWO_HOSTS_PEER_IP")?);
        }
        let mut child = command
            .args(["--receive", &way.name, "--ways", &way.name, "--identity"])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().context("piped")?;
        let stdout = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Receiver { child, stdin, stdout })
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the receiving process ended; its message is above");
        Ok(line.trim().to_owned())
    }

    fn ask(&mut self, question: &str) -> anyhow::Result<String> {
        writeln!(self.stdin, "{question}")?;
        self.line()
    }

    fn cpu(&mut self) -> anyhow::Result<f64> {
        Ok(self.ask("cpu")?.parse()?)
    }

    fn verify(&mut self, slots: Slots) -> anyhow::Result<()> {
        let answer = self.ask(&format!("verify {} {} {}", slots.size, slots.count, slots.seed))?;
        ensure!(answer == "right", "{answer}");
        Ok(())
    }

    fn stop(mut self) -> anyhow::Result<()> {
        drop(self.stdin);
        self.child.wait()?;
        Ok(())
    }
}

/// The receiving process: lands what comes until its standard input ends, and answers questions.
fn receive(way: &Way, dir: &std::path::Path) -> anyhow::Result<()> {
    let landing = HostRegion::map(REGION)?;
    let identity = tandem_transport::Identity::load_or_create(dir)?;
    // Held until the end: each lands bytes as long as it lives.
    let _end: Box<dyn std::any::Any> = match way.kind {
        Kind::Memcpy => {
            println!("nothing");
            Box::new(())
        }
        Kind::Tcp => Box::new(tcp::receive(Arc::clone(&landing))?),
        Kind::Ours { path, .. } => {
            let config = ours::config(path, way.tuning()?, way.connections);
            Box::new(ours::receive(&identity, config, Arc::clone(&landing))?)
        }
        Kind::Quinn { .. } => Box::new(quinn::receive(&identity, way.tuning()?, Arc::clone(&landing))?),
    };
    for line in std::io::stdin().lines() {
        let line = line?;
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["cpu"] => println!("{}", cpu()),
            ["verify", size, count, seed] => {
                let slots = Slots { size: size.parse()?, count: count.parse()?, seed: seed.parse()? };
                match verify(&landing, slots) {
                    Ok(()) => println!("right"),
                    Err(error) => println!("{error}"),
                }
            }
            _ => bail!("no question: {line}"),
        }
    }
    Ok(())
}

/// Where this process listens: on its host of `scripts/two-hosts`, or on loopback.
fn here() -> anyhow::Result<SocketAddr> {
    let ip = std::env::var("TWO_HOSTS_IP").unwrap_or_else(|_| Ipv4Addr::LOCALHOST.to_string());
    Ok(SocketAddr::new(ip.parse()?, 0))
}

/// Seconds of processor time that this process has used.
fn cpu() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(options: &Options, samples: &[Sample]) -> anyhow::Result<()> {
    let figure = |way: usize, size: usize, of: fn(&Sample) -> f64| {
        median(samples.iter().filter(|s| s.way == way && s.size == size).map(of).collect())
    };
    let place = |name: &str| options.ways.iter().position(|way| way.name == name);
    // Each way's peer: what bounds it, or what it is to be compared with.
    let peer = |way: &Way| match way.kind {
        Kind::Memcpy | Kind::Tcp => None,
        Kind::Ours { path: tandem_transport::Path::Shm, .. } => place("memcpy"),
        Kind::Ours { .. } | Kind::Quinn { .. } => place("tcp"),
    };
    println!(
        "{:<12} {:>9} {:>9} {:>11} {:>11}  beside",
        "way", "bytes", "GB/s", "cpu s/GB tx", "cpu s/GB rx"
    );
    let mut rows = Vec::new();
    for &size in &options.sizes {
        for (way, name) in options.ways.iter().enumerate() {
            let [speed, tx, rx] =
                [|s: &Sample| s.gb_per_s, |s: &Sample| s.cpu_send, |s: &Sample| s.cpu_receive]
                    .map(|of| figure(way, size, of));
            let mut row = json!({"way": name.name, "bytes": size, "gb_per_s": speed, "cpu_send_s_per_gb": tx, "cpu_receive_s_per_gb": rx});
            let mut beside = String::new();
            if let Some(other) = peer(name) {
                // Of the same round: the machine is not the same from one minute to the next.
                let in_turn = |of: fn(&Sample) -> f64| {
                    let of_way =
                        |w: usize| samples.iter().filter(move |s| s.way == w && s.size == size).map(of);
                    median(of_way(way).zip(of_way(other)).map(|(a, b)| a / b).collect())
                };
                let ratios = [|s: &Sample| s.gb_per_s, |s: &Sample| s.cpu_send, |s: &Sample| s.cpu_receive]
                    .map(in_turn);
                let other = &options.ways[other].name;
                beside = format!("{:.2} of {other}", ratios[0]);
                if other == "tcp" {
                    beside += &format!(", cpu {:.1} and {:.1} times", ratios[1], ratios[2]);
                }
                row["beside"] = json!({"what": other, "speed": ratios[0], "cpu_send": ratios[1], "cpu_receive": ratios[2]});
            }
            println!("{:<12} {size:>9} {speed:>9.2} {tx:>11.2} {rx:>11.2}  {beside}", name.name);
            rows.push(row);
        }
    }
    for (way, name) in options.ways.iter().enumerate() {
        let Kind::Ours { path: tandem_transport::Path::Quic, .. } = name.kind else { continue };
        let Some(bare) = place(&name.name.replacen("quic", "quinn", 1)) else { continue };
        let ratio = |of: fn(&Sample) -> f64| {
            let of_way = |w: usize| samples.iter().filter(move |s| s.way == w).map(of);
            median(of_way(way).zip(of_way(bare)).map(|(a, b)| a / b).collect())
        };
        println!(
            "{}: {:.2} of the speed of bare quinn, cpu {:.2} and {:.2} times, all sizes",
            name.name,
            ratio(|s| s.gb_per_s),
            ratio(|s| s.cpu_send),
            ratio(|s| s.cpu_receive)
        );
    }
    if let Some(file) = &options.json {
        let command: Vec<_> = std::env::args().collect();
        let all = json!({"command": command.join(" "), "rounds": options.rounds, "seconds": options.seconds, "figures": rows});
        std::fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}
