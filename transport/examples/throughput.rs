//! How fast bytes go from one process's memory into another's over loopback, and what that costs, beside
//! what the same machine does at the same time with plain copies and plain TCP.
//!
//! `cargo run --release -p tandem-transport --example throughput [seconds per row] [threads] [connections] [mtu] [window KiB]`

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
use tandem_transport::{Event, Identity, NetConfig, NetTransport, Transport, Window, Write};

type Failure = Box<dyn std::error::Error>;

const WRITER: NodeId = NodeId(1);
const READER: NodeId = NodeId(2);
const REGION: usize = 256 << 20;
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn config(args: &[String]) -> Result<NetConfig, Failure> {
    let mut config = NetConfig::default();
    if let Some(threads) = args.get(1) {
        config.threads = threads.parse()?;
    }
    if let Some(connections) = args.get(2) {
        config.connections = connections.parse()?;
    }
    if let Some(mtu) = args.get(3) {
        config.tuning.loopback_mtu = mtu.parse()?;
    }
    if let Some(window) = args.get(4) {
        config.tuning.connection_window = window.parse::<u32>()? << 10;
        config.tuning.stream_window = config.tuning.stream_window.min(config.tuning.connection_window);
    }
    Ok(config)
}

fn main() -> Result<(), Failure> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "read") {
        args.remove(0);
        let dir = args.remove(0);
        return read(Path::new(&dir), config(&args)?);
    }
    let seconds = Duration::from_secs_f64(args.first().map_or(Ok(2.0), |arg| arg.parse())?);
    let dir = std::env::temp_dir().join(format!("tandem-throughput-{}", std::process::id()));
    let outcome = write(&dir, seconds, config(&args)?, &args);
    std::fs::remove_dir_all(&dir)?;
    outcome
}

/// Seconds of processor time that this process has used.
fn cpu() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> =
        stat[stat.rfind(')').ok_or("unexpected /proc/self/stat")? + 2..].split(' ').collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
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

    fn cpu(&mut self) -> Result<f64, Failure> {
        writeln!(self.stdin, "cpu")?;
        Ok(self.line()?.parse()?)
    }
}

fn write(dir: &Path, seconds: Duration, config: NetConfig, args: &[String]) -> Result<(), Failure> {
    let region = HostRegion::map(REGION)?;
    let source = region.extent(0..REGION)?;
    // SAFETY: nobody else has the region yet.
    unsafe { source.bytes_mut() }.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);

    let identity = Identity::load_or_create(dir)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["read".as_ref(), dir.as_os_str()])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take().ok_or("no stdin")?;
    let stdout = BufReader::new(child.stdout.take().ok_or("no stdout")?);
    let mut reader = Reader { child, stdin, stdout };
    let hello = reader.line()?;
    let parts: Vec<&str> = hello.split(' ').collect();
    let (tcp, quic): (SocketAddr, SocketAddr) = (parts[0].parse()?, parts[1].parse()?);
    let window = Window { region: parts[2].parse()?, key: parts[3].parse()?, offset: 0, len: REGION as u64 };

    println!(
        "threads {}, connections {}, mtu {}",
        config.threads, config.connections, config.tuning.loopback_mtu
    );
    println!("{:<22} {:>7} {:>13} {:>13}", "", "GB/s", "writer s/GB", "reader s/GB");
    let show = |name: &str, bytes: u64, took: Duration, writer: f64, reader: f64| {
        let gb = bytes as f64 / 1e9;
        println!("{name:<22} {:>7.2} {:>13.2} {:>13.2}", gb / took.as_secs_f64(), writer / gb, reader / gb);
    };
    for size in [256 << 10, 16 << 20, 128 << 20] {
        let (bytes, took, used) = copies(&region, size, seconds)?;
        show(&format!("memcpy {} KiB", size >> 10), bytes, took, used, 0.0);
    }
    for size in [64 << 10, 1 << 20] {
        let (at, cpu_here, cpu_there) = (Instant::now(), cpu()?, reader.cpu()?);
        let bytes = tcp_writes(tcp, &source, size, seconds)?;
        let took = at.elapsed();
        show(&format!("TCP {} KiB", size >> 10), bytes, took, cpu()? - cpu_here, reader.cpu()? - cpu_there);
    }
    let mut transport = NetTransport::bind(LOOPBACK, &identity, WRITER, config)?;
    transport.set_waker(Waker::from(Arc::new(Unpark(thread::current()))));
    transport.connect(READER, quic);
    wait(&mut transport, |event| matches!(event, Event::Connected { .. }).then_some(()))?;
    for size in [4 << 10, 64 << 10, 1 << 20, 16 << 20] {
        let (at, cpu_here, cpu_there) = (Instant::now(), cpu()?, reader.cpu()?);
        let bytes = quic_writes(&mut transport, &source, window, size, seconds)?;
        let took = at.elapsed();
        show(&format!("QUIC {} KiB", size >> 10), bytes, took, cpu()? - cpu_here, reader.cpu()? - cpu_there);
    }
    for size in [64, 64 << 10, 1 << 20] {
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..500 {
            let at = Instant::now();
            let source = source.part(0..size)?;
            transport.submit(READER, Write { ticket: 0, source, window, offset: 0, immediate: 0 })?;
            wait(&mut transport, |event| matches!(event, Event::Sent { .. }).then_some(()))?;
            times.push(at.elapsed());
        }
        times.sort_unstable();
        println!("QUIC {size} B alone, until Sent: median {:?}, p99 {:?}", times[250], times[495]);
    }
    let metrics = transport.metrics();
    println!("{} packets, {} lost", metrics.packets_sent, metrics.packets_lost);
    drop(transport);
    drop(reader.stdin);
    reader.child.wait()?;
    Ok(())
}

fn copies(region: &Arc<HostRegion>, size: usize, seconds: Duration) -> Result<(u64, Duration, f64), Failure> {
    let (from, to) = (region.extent(0..size)?, region.extent(REGION - size..REGION)?);
    let (at, used, mut bytes) = (Instant::now(), cpu()?, 0);
    while at.elapsed() < seconds {
        // SAFETY: the extents do not overlap, and nobody else has the region yet.
        let (from, to) = unsafe { (from.bytes(), to.bytes_mut()) };
        to.copy_from_slice(from);
        std::hint::black_box(to);
        bytes += size as u64;
    }
    Ok((bytes, at.elapsed(), cpu()? - used))
}

fn tcp_writes(addr: SocketAddr, source: &Extent, size: usize, seconds: Duration) -> Result<u64, Failure> {
    let mut stream = TcpStream::connect(addr)?;
    let (at, mut bytes, mut offset) = (Instant::now(), 0, 0);
    while at.elapsed() < seconds {
        let part = source.part(offset..offset + size)?;
        // SAFETY: nobody writes the region any more.
        stream.write_all(unsafe { part.bytes() })?;
        bytes += size as u64;
        offset = (offset + size) % (REGION / 2);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The reader answers when it has everything.
    stream.read_exact(&mut [0])?;
    Ok(bytes)
}

fn quic_writes(
    transport: &mut NetTransport,
    source: &Extent,
    window: Window,
    size: usize,
    seconds: Duration,
) -> Result<u64, Failure> {
    // As much under way as prefill has: a few layers of a few chunks.
    let under_way = (64 << 20) / size.max(1 << 20);
    let (at, mut bytes, mut offset, mut open) = (Instant::now(), 0, 0, 0);
    loop {
        while open < under_way && at.elapsed() < seconds {
            let source = source.part(offset..offset + size)?;
            transport
                .submit(READER, Write { ticket: 0, source, window, offset: offset as u64, immediate: 0 })?;
            offset = (offset + size) % (REGION / 2);
            open += 1;
            bytes += size as u64;
        }
        if open == 0 {
            return Ok(bytes);
        }
        wait(transport, |event| matches!(event, Event::Sent { .. }).then(|| open -= 1))?;
    }
}

/// Polls until events come, and hands each to `take`, at least one of which must take it.
fn wait(transport: &mut NetTransport, mut take: impl FnMut(&Event) -> Option<()>) -> Result<(), Failure> {
    let mut events = Vec::new();
    loop {
        transport.poll(&mut events);
        let mut taken = false;
        for event in events.drain(..) {
            match take(&event) {
                Some(()) => taken = true,
                None => return Err(format!("unexpected {event:?}").into()),
            }
        }
        if taken {
            return Ok(());
        }
        thread::park_timeout(Duration::from_secs(5));
    }
}

/// The other process: lands what comes, and says how much processor time it has used when asked.
fn read(dir: &Path, config: NetConfig) -> Result<(), Failure> {
    let region = HostRegion::map(REGION)?;
    let landing = region.extent(0..REGION)?;
    // SAFETY: nobody else has the region yet. Touched once, so that no row pays for its first use.
    unsafe { landing.bytes_mut() }.fill(1);
    let identity = Identity::load_or_create(dir)?;
    let mut transport = NetTransport::bind(LOOPBACK, &identity, READER, config)?;
    let listener = TcpListener::bind(LOOPBACK)?;
    let id = transport.register(Arc::clone(&region))?;
    let window = transport.open_window(WRITER, id, 0..REGION)?;
    println!("{} {} {} {}", listener.local_addr()?, transport.local_addr(), window.region, window.key);

    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut offset = 0;
            loop {
                let Ok(place) = landing.part(offset..offset + (1 << 20)) else {
                    return;
                };
                // SAFETY: the rows run one after another: QUIC lands nothing while TCP does.
                let place = unsafe { place.bytes_mut() };
                match (&stream).read(place) {
                    Ok(0) | Err(_) => break,
                    Ok(read) => offset = (offset + read) % (REGION / 2),
                }
            }
            let _ = (&stream).write_all(&[1]);
        }
    });
    thread::spawn(move || {
        let mut events = Vec::new();
        loop {
            transport.set_waker(Waker::from(Arc::new(Unpark(thread::current()))));
            transport.poll(&mut events);
            events.clear();
            thread::park_timeout(Duration::from_secs(1));
        }
    });
    for line in std::io::stdin().lines() {
        if line? == "cpu" {
            println!("{}", cpu()?);
        }
    }
    Ok(())
}
