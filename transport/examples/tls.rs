//! Measures the transport over TLS beside plain TCP, between two processes over loopback: `tls [rounds]
//! [connections] [write KiB]`. Rounds of both take turns, medians are shown; every round's bytes are checked where they
//! landed, and the processor time of both processes is counted around the transfer alone.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::ids::NodeId;
use tandem_transport::{Event, Identity, NetConfig, NetTransport, Path as Way, Transport, Window, Write};

type Failure = Box<dyn std::error::Error>;

const REGION: usize = 256 << 20;
/// A round writes the region so many times.
const TIMES: usize = 4;
const UNDER_WAY: usize = 64 << 20;
/// What plain TCP is fastest with here.
const PLAIN_WRITE: usize = 1 << 20;
/// As many as a node has under way at most.
const WRITES: usize = 256;
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const PATIENCE: Duration = Duration::from_secs(10);
const WRITER: NodeId = NodeId(1);
const READER: NodeId = NodeId(2);
/// Cores that other processes may use during a round that counts.
const DISTURBED: f64 = 0.1;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn transport(identity: &Identity, node: NodeId, connections: usize) -> Result<NetTransport, Failure> {
    let config = NetConfig { paths: vec![Way::Tls], tls_connections: connections, ..NetConfig::default() };
    let mut transport = NetTransport::bind(LOOPBACK, identity, node, config)?;
    transport.set_waker(Waker::from(Arc::new(Unpark(thread::current()))));
    Ok(transport)
}

/// Polls until something happens.
fn wait(transport: &mut NetTransport) -> Result<Vec<Event>, Failure> {
    let (since, mut events) = (Instant::now(), Vec::new());
    while since.elapsed() < PATIENCE {
        transport.poll(&mut events);
        if !events.is_empty() {
            return Ok(events);
        }
        thread::park_timeout(PATIENCE);
    }
    Err(format!("nothing happened for {PATIENCE:?}").into())
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [role, dir, connections] = &args[..]
        && role == "read"
    {
        return read(Path::new(dir), connections.parse()?);
    }
    let number = |at: usize, or: usize| args.get(at).map_or(Ok(or), |arg| arg.parse());
    let (rounds, connections, write) = (number(0, 7)?, number(1, 1)?, number(2, 16 << 10)? << 10);
    let dir = std::env::temp_dir().join(format!("tandem-tls-{}", std::process::id()));
    let outcome = compare(&dir, rounds, connections, write);
    std::fs::remove_dir_all(&dir)?;
    outcome
}

/// Seconds of processor time that this process has used.
fn cpu() -> f64 {
    // SAFETY: all-zero is a valid value of this plain struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it is given the struct that it fills.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Seconds of processor time that the whole machine has spent on processes.
fn machine() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().ok_or("empty /proc/stat")?;
    let ticks: Vec<f64> = line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    Ok((ticks[0] + ticks[1] + ticks[2]) / 100.0)
}

fn pattern(round: u8) -> impl Fn(usize) -> u8 {
    move |i| (i as u8) ^ ((i >> 8) as u8) ^ ((i >> 16) as u8) ^ round
}

struct Reader {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Reader {
    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn ask(&mut self, what: &str) -> Result<String, Failure> {
        writeln!(self.stdin, "{what}")?;
        self.line()
    }
}

#[derive(Clone, Copy)]
struct Figures {
    speed: f64,
    writer: f64,
    reader: f64,
}

fn compare(dir: &Path, rounds: usize, connections: usize, write: usize) -> Result<(), Failure> {
    let region = HostRegion::map(REGION)?;
    let source = region.extent(0..REGION)?;
    let identity = Identity::load_or_create(dir)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["read".as_ref(), dir.as_os_str()])
        .arg(connections.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take().ok_or("no stdin")?;
    let stdout = BufReader::new(child.stdout.take().ok_or("no stdout")?);
    let mut reader = Reader { child, stdin, stdout };
    let hello = reader.line()?;
    let words: Vec<&str> = hello.split(' ').collect();
    let [tcp, tls, region, key] = words[..] else { return Err("unexpected words of the reader".into()) };
    let window = Window { region: region.parse()?, key: key.parse()?, offset: 0, len: REGION as u64 };
    let tcp = TcpStream::connect(tcp.parse::<SocketAddr>()?)?;
    tcp.set_nodelay(true)?;
    let mut lane = transport(&identity, WRITER, connections)?;
    lane.connect(READER, tls.parse()?);
    match &wait(&mut lane)?[..] {
        [Event::Connected { .. }] => {}
        other => return Err(format!("unexpected {other:?}").into()),
    }

    let (mut plain, mut sealed, mut disturbed) = (Vec::new(), Vec::new(), 0);
    let mut round = 0;
    while (plain.len() < rounds || sealed.len() < rounds) && disturbed < 4 * rounds + 4 {
        let byte = pattern(round as u8);
        // SAFETY: nothing is under way.
        unsafe { source.bytes_mut() }.iter_mut().enumerate().for_each(|(i, to)| *to = byte(i));
        let over_tls = round % 2 == 1;
        let there = reader.ask("cpu")?.parse::<f64>()?;
        let (at, here, before) = (Instant::now(), cpu(), machine()?);
        if over_tls {
            tls_round(&mut lane, &source, window, write)?;
        } else {
            tcp_round(&tcp, &source)?;
        }
        let (took, writing, all) = (at.elapsed().as_secs_f64(), cpu() - here, machine()? - before);
        let reading = reader.ask("cpu")?.parse::<f64>()? - there;
        let wrong = reader.ask(&format!("check {round}"))?;
        if wrong != "right" {
            return Err(format!("round {round}: {wrong}").into());
        }
        round += 1;
        // The first of each warms up.
        if round > 2 {
            if all - writing - reading > took * DISTURBED {
                disturbed += 1;
                continue;
            }
            let gb = (TIMES * REGION) as f64 / 1e9;
            let figures = Figures { speed: gb / took, writer: writing / gb, reader: reading / gb };
            if over_tls { sealed.push(figures) } else { plain.push(figures) }
        }
    }
    println!(
        "{} and {} rounds of {} MiB each, {disturbed} more left out because other processes ran",
        plain.len(),
        sealed.len(),
        (TIMES * REGION) >> 20
    );
    println!("writes of {} KiB, over plain TCP of {} KiB", write >> 10, PLAIN_WRITE >> 10);
    println!("{:<22} {:>7} {:>13} {:>13}", "", "GB/s", "writer s/GB", "reader s/GB");
    let plain = show("plain TCP", &plain);
    let sealed = show(&format!("TLS, {connections} connection(s)"), &sealed);
    println!(
        "{:<22} {:>7.2} {:>13.2} {:>13.2}",
        "TLS × plain",
        sealed.speed / plain.speed,
        sealed.writer / plain.writer,
        sealed.reader / plain.reader
    );
    latencies(&mut lane, &source, window)?;
    drop(reader.stdin);
    reader.child.wait()?;
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn show(name: &str, figures: &[Figures]) -> Figures {
    let of = |get: fn(&Figures) -> f64| median(figures.iter().map(get).collect());
    let medians = Figures { speed: of(|f| f.speed), writer: of(|f| f.writer), reader: of(|f| f.reader) };
    println!("{name:<22} {:>7.2} {:>13.3} {:>13.3}", medians.speed, medians.writer, medians.reader);
    medians
}

fn tcp_round(mut stream: &TcpStream, source: &Extent) -> Result<(), Failure> {
    for _ in 0..TIMES {
        for at in (0..REGION).step_by(PLAIN_WRITE) {
            let part = source.part(at..(at + PLAIN_WRITE).min(REGION))?;
            // SAFETY: nobody writes the region during a round.
            stream.write_all(unsafe { part.bytes() })?;
        }
    }
    // The reader answers when it has everything.
    stream.read_exact(&mut [0])?;
    Ok(())
}

fn tls_round(lane: &mut NetTransport, source: &Extent, window: Window, write: usize) -> Result<(), Failure> {
    let mut open = 0;
    for _ in 0..TIMES {
        for at in (0..REGION).step_by(write) {
            while open * write >= UNDER_WAY || open >= WRITES {
                open -= settled(lane)?;
            }
            let source = source.part(at..(at + write).min(REGION))?;
            lane.submit(READER, Write { ticket: 0, source, window, offset: at as u64, immediate: 0 })?;
            open += 1;
        }
    }
    while open > 0 {
        open -= settled(lane)?;
    }
    Ok(())
}

/// How many writes were acknowledged, once some were.
fn settled(lane: &mut NetTransport) -> Result<usize, Failure> {
    let events = wait(lane)?;
    match events.iter().find(|event| !matches!(event, Event::Sent { .. })) {
        None => Ok(events.len()),
        Some(other) => Err(format!("unexpected {other:?}").into()),
    }
}

fn latencies(lane: &mut NetTransport, source: &Extent, window: Window) -> Result<(), Failure> {
    for size in [64, 4 << 10, 64 << 10, 1 << 20] {
        let mut times = Vec::new();
        for _ in 0..500 {
            let at = Instant::now();
            let source = source.part(0..size)?;
            lane.submit(READER, Write { ticket: 0, source, window, offset: 0, immediate: 0 })?;
            settled(lane)?;
            times.push(at.elapsed());
        }
        times.sort_unstable();
        println!("{size} B alone, until acknowledged: median {:?}, p99 {:?}", times[250], times[495]);
    }
    Ok(())
}

/// The other process: lands what comes, checks it, and says how much processor time it has used.
fn read(dir: &Path, connections: usize) -> Result<(), Failure> {
    let region = HostRegion::map(REGION)?;
    let landing = region.extent(0..REGION)?;
    // SAFETY: nobody else has the region yet. Touched once, so that no round pays for its first use.
    unsafe { landing.bytes_mut() }.fill(1);
    let identity = Identity::load_or_create(dir)?;
    let listener = TcpListener::bind(LOOPBACK)?;
    let mut lane = transport(&identity, READER, connections)?;
    let id = lane.register(Arc::clone(&region))?;
    let window = lane.open_window(WRITER, id, 0..REGION)?;
    println!("{} {} {} {}", listener.local_addr()?, lane.local_addr(), window.region, window.key);
    let (mut stream, _) = listener.accept()?;
    let place = landing.clone();
    thread::spawn(move || {
        loop {
            for _ in 0..TIMES {
                let mut at = 0;
                while at < REGION {
                    // SAFETY: rounds take turns: TLS lands nothing while TCP does.
                    let place = unsafe { place.bytes_mut() };
                    let end = (at + (1 << 20)).min(REGION);
                    match stream.read(&mut place[at..end]) {
                        Ok(0) | Err(_) => return,
                        Ok(read) => at += read,
                    }
                }
            }
            let _ = stream.write_all(&[1]);
        }
    });
    thread::spawn(move || {
        let mut events = Vec::new();
        lane.set_waker(Waker::from(Arc::new(Unpark(thread::current()))));
        loop {
            lane.poll(&mut events);
            events.clear();
            thread::park_timeout(Duration::from_secs(1));
        }
    });
    for line in std::io::stdin().lines() {
        let line = line?;
        if line == "cpu" {
            println!("{}", cpu());
        } else if let Some(round) = line.strip_prefix("check ") {
            let byte = pattern(round.parse::<usize>()? as u8);
            // SAFETY: nothing is under way between rounds.
            let wrong = unsafe { landing.bytes() }.iter().enumerate().position(|(i, got)| *got != byte(i));
            match wrong {
                None => println!("right"),
                Some(at) => println!("byte {at} is wrong"),
            }
            // SAFETY: as above. What is not written again is wrong.
            unsafe { landing.bytes_mut() }.fill(0);
        }
    }
    Ok(())
}
