//! An end in a process of its own, which can be killed: this test binary again, told what to do line by line.

use crate::end::{End, Holdings, Local, Push};
use crate::fault::{EVENT_LIMIT, WRITE_LIMIT};
use crate::net::REGION;
use crate::relay::LOOPBACK;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tandem_memory::HostRegion;
#[cfg(feature = "cuda")]
use tandem_memory::cuda::{Device, DeviceRegion};
use tandem_proto::ids::NodeId;
use tandem_transport::{
    Event, FailReason, Held, Identity, NetConfig, NetTransport, Path, SeverReason, SubmitError, Window,
};

/// Tells the process what to be: which end, the directory of the cluster's CA, and its paths.
const ROLE: &str = "TANDEM_FAULTS_END";
/// Marks what it answers among what the test harness prints.
const ANSWER: &str = "> ";

pub(crate) struct Process {
    id: NodeId,
    pub(crate) address: SocketAddr,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    /// Its region, which outlives it here.
    memory: Memory,
}

enum Memory {
    None,
    Host(std::fs::File),
    #[cfg(feature = "cuda")]
    Gpu(Arc<DeviceRegion>),
}

impl Process {
    pub(crate) fn start(end: usize, paths: &[Path], dir: &std::path::Path) -> Process {
        let paths: Vec<_> = paths.iter().map(|path| path.name()).collect();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process::an_end", "--ignored", "--nocapture"])
            .env(ROLE, format!("{end} {} {}", dir.display(), paths.join(",")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut process = Process { id: NodeId(0), address: LOOPBACK, child, to, from, memory: Memory::None };
        let up = process.answer();
        let [id, address, memory] = up.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{up}") };
        process.id = NodeId(id.parse().unwrap());
        process.address = address.parse().unwrap();
        process.memory = match memory.parse::<u32>() {
            Ok(file) => {
                let path = format!("/proc/{}/fd/{file}", process.child.id());
                Memory::Host(std::fs::File::open(path).unwrap())
            }
            #[cfg(feature = "cuda")]
            Err(_) => {
                let gpu = Device::open(0).unwrap();
                Memory::Gpu(DeviceRegion::import(&gpu, &memory.parse().unwrap(), REGION).unwrap())
            }
            #[cfg(not(feature = "cuda"))]
            Err(error) => panic!("{error}: {memory}"),
        };
        process
    }

    /// SIGKILL, and gone when this returns.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let read = self.from.read_line(&mut line).unwrap();
            assert!(read > 0, "{}'s process ended by itself", self.id);
            if let Some(answer) = line.strip_prefix(ANSWER) {
                return answer.trim_end().to_owned();
            }
        }
    }

    fn ask(&mut self, command: std::fmt::Arguments<'_>) -> String {
        writeln!(self.to, "{command}").unwrap();
        self.to.flush().unwrap();
        self.answer()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl End for Process {
    fn id(&self) -> NodeId {
        self.id
    }

    fn connect(&mut self, peer: NodeId, addr: SocketAddr) {
        self.ask(format_args!("connect {} {addr}", peer.0));
    }

    fn open(&mut self, peer: NodeId, range: Range<usize>) -> Window {
        let answer = self.ask(format_args!("open {} {} {}", peer.0, range.start, range.end));
        window(&mut answer.split(' '))
    }

    fn close(&mut self, window: Window) {
        self.ask(format_args!("close {}", text_of(&window)));
    }

    fn push(&mut self, peer: NodeId, push: &Push) -> Result<(), SubmitError> {
        let Push { ticket, source, window, offset } = push;
        let (start, end, window) = (source.start, source.end, text_of(window));
        match &*self.ask(format_args!("push {} {ticket} {start} {end} {offset} {window}", peer.0)) {
            "taken" => Ok(()),
            "full" => Err(SubmitError::Full { peer, limit: WRITE_LIMIT }),
            _ => Err(SubmitError::NotConnected { peer }),
        }
    }

    fn poll(&mut self) -> Vec<Event> {
        let answer = self.ask(format_args!("poll"));
        answer.split(';').filter(|text| !text.is_empty()).map(event).collect()
    }

    fn sever(&mut self, peer: NodeId) {
        self.ask(format_args!("sever {}", peer.0));
    }

    fn holdings(&mut self) -> Holdings {
        let answer = self.ask(format_args!("holdings"));
        let numbers: Vec<usize> = answer.split(' ').map(|number| number.parse().unwrap()).collect();
        let [windows, peers, writes, connections, files, mappings, threads] = numbers[..] else {
            panic!("{answer}");
        };
        Holdings {
            transport: Held { windows, peers, writes, connections },
            process: [files, mappings, threads],
        }
    }

    fn fill(&mut self, salt: u64) {
        self.ask(format_args!("fill {salt}"));
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGION];
        match &self.memory {
            Memory::None => {}
            Memory::Host(file) => file.read_exact_at(&mut bytes, 0).unwrap(),
            #[cfg(feature = "cuda")]
            Memory::Gpu(region) => {
                let stream = region.device().stream().unwrap();
                region.extent(0..REGION).unwrap().read(&stream, &mut bytes).unwrap();
            }
        }
        bytes
    }
}

fn text_of(window: &Window) -> String {
    format!("{} {} {} {}", window.region, window.key, window.offset, window.len)
}

fn number(words: &mut dyn Iterator<Item = &str>) -> u64 {
    words.next().unwrap().parse().unwrap()
}

fn window(words: &mut dyn Iterator<Item = &str>) -> Window {
    Window { region: number(words) as u32, key: number(words), offset: number(words), len: number(words) }
}

fn event(text: &str) -> Event {
    let mut words = text.split(' ');
    let (kind, peer) = (words.next().unwrap(), NodeId(number(&mut words)));
    match kind {
        "connected" => Event::Connected { peer },
        "sent" => Event::Sent { peer, ticket: number(&mut words) },
        "refused" => Event::Failed { peer, ticket: number(&mut words), reason: FailReason::Refused },
        "failed" => Event::Failed { peer, ticket: number(&mut words), reason: FailReason::Severed },
        "landed" => Event::Landed { peer, immediate: number(&mut words) as u32, len: number(&mut words) },
        "asked" => Event::Severed { peer, reason: SeverReason::Asked },
        "lost" => Event::Severed { peer, reason: SeverReason::Lost(words.collect::<Vec<_>>().join(" ")) },
        _ => Event::Severed { peer, reason: SeverReason::Unreachable(words.collect::<Vec<_>>().join(" ")) },
    }
}

fn text(event: &Event) -> String {
    let clean = |text: &String| text.replace([';', '\n'], ",");
    match event {
        Event::Connected { peer } => format!("connected {}", peer.0),
        Event::Sent { peer, ticket } => format!("sent {} {ticket}", peer.0),
        Event::Failed { peer, ticket, reason: FailReason::Refused } => format!("refused {} {ticket}", peer.0),
        Event::Failed { peer, ticket, reason: FailReason::Severed } => format!("failed {} {ticket}", peer.0),
        Event::Landed { peer, immediate, len } => format!("landed {} {immediate} {len}", peer.0),
        Event::Severed { peer, reason: SeverReason::Asked } => format!("asked {}", peer.0),
        Event::Severed { peer, reason: SeverReason::Lost(why) } => format!("lost {} {}", peer.0, clean(why)),
        Event::Severed { peer, reason: SeverReason::Unreachable(why) } => {
            format!("unreachable {} {}", peer.0, clean(why))
        }
    }
}

/// What a process holds: descriptors, mappings of shared memory, and threads of lanes. Others of its runtime's come
/// and go as they like.
fn process_holdings() -> [usize; 3] {
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mappings = maps.lines().filter(|line| line.contains("memfd:tandem")).count();
    let of_lane = |task: std::io::Result<std::fs::DirEntry>| {
        let name = std::fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        let of_lane = ["shm-", "tls-", "nccl-"].iter().any(|kind| name.starts_with(kind));
        (of_lane && !name.trim_end().ends_with("-accept")).then_some(())
    };
    let threads = std::fs::read_dir("/proc/self/task").unwrap().filter_map(of_lane).count();
    [files, mappings, threads]
}

#[test]
#[ignore = "the other tests run it, as a process that can be killed"]
fn an_end() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let [end, dir, paths] = role.split(' ').collect::<Vec<_>>()[..] else { panic!("{role}") };
    let identity = Identity::load_or_create(dir.as_ref()).unwrap();
    let memory = memory(end.parse().unwrap(), paths);
    let config = NetConfig {
        #[cfg(feature = "cuda")]
        gpu: memory.twin().map(|twin| Arc::clone(twin.device())),
        paths: paths.split(',').map(|path| path.parse().unwrap()).collect(),
        write_limit: WRITE_LIMIT,
        event_limit: EVENT_LIMIT,
        // NCCL needs a while, for the first time in a process above all.
        connect_timeout: Duration::from_secs(if paths == Path::Nccl.name() { 12 } else { 3 }),
        ..NetConfig::default()
    };
    let transport = NetTransport::bind(LOOPBACK, &identity, config).unwrap();
    let address = transport.local_addr();
    let holdings =
        |transport: &NetTransport| Holdings { transport: transport.held(), process: process_holdings() };
    let mut end = Local::new(identity.node(), transport, memory, holdings);
    let answer = |text: &str| {
        let mut out = std::io::stdout().lock();
        out.write_all(format!("\n{ANSWER}{text}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    };
    answer(&format!("{} {address} {}", identity.node().0, name(&end.memory)));
    for line in std::io::stdin().lines() {
        answer(&obey(&mut end, &line.unwrap()));
    }
}

/// On a GPU, those that there are by turns, if nothing else is to be tried.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "all of it is the host's"))]
fn memory(end: usize, paths: &str) -> Arc<HostRegion> {
    #[cfg(feature = "cuda")]
    if [Path::CudaIpc, Path::Nccl].iter().any(|path| paths == path.name()) {
        let gpu = Device::open(end % Device::count().unwrap()).unwrap();
        return HostRegion::with_twin(&gpu, REGION).unwrap();
    }
    HostRegion::map(REGION).unwrap()
}

/// By which the process that started this one finds the memory.
fn name(memory: &HostRegion) -> String {
    #[cfg(feature = "cuda")]
    if let Some(twin) = memory.twin() {
        return twin.export().unwrap().to_string();
    }
    memory.file().unwrap().as_raw_fd().to_string()
}

fn obey(end: &mut Local<NetTransport>, line: &str) -> String {
    let mut words = line.split(' ');
    let done = String::new;
    match words.next().unwrap() {
        "poll" => {
            let events: Vec<_> = end.poll().iter().map(text).collect();
            return events.join(";");
        }
        "holdings" => {
            let Holdings { transport: Held { windows, peers, writes, connections }, process } =
                end.holdings();
            let mut out = String::new();
            let [files, mappings, threads] = process;
            write!(out, "{windows} {peers} {writes} {connections} {files} {mappings} {threads}").unwrap();
            return out;
        }
        "close" => {
            end.close(window(&mut words));
            return done();
        }
        "fill" => {
            end.fill(number(&mut words));
            return done();
        }
        kind => {
            let peer = NodeId(number(&mut words));
            match kind {
                "connect" => end.connect(peer, words.next().unwrap().parse().unwrap()),
                "sever" => end.sever(peer),
                "open" => {
                    let range = number(&mut words) as usize..number(&mut words) as usize;
                    return text_of(&end.open(peer, range));
                }
                _ => {
                    let ticket = number(&mut words);
                    let source = number(&mut words) as usize..number(&mut words) as usize;
                    let offset = number(&mut words);
                    let push = Push { ticket, source, offset, window: window(&mut words) };
                    let answer = match end.push(peer, &push) {
                        Ok(()) => "taken",
                        Err(SubmitError::Full { .. }) => "full",
                        Err(_) => "gone",
                    };
                    return answer.into();
                }
            }
        }
    }
    done()
}
