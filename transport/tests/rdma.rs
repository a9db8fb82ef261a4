//! Two nodes on the two devices of a virtual machine (`scripts/check rdma`): the path that they choose, what becomes
//! of writes when it fails, and that faults leave nothing behind.
#![cfg(target_os = "linux")]

mod members;

use members::{id, member};
use std::io::{BufRead, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_transport::{
    Event, FailReason, Identity, NetConfig, NetTransport, Path, Transport, Window, Write,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Whether there are two devices of a virtual machine; said loudly if not.
fn has_devices() -> bool {
    let has = std::env::var("RDMA_VM_HOSTS").is_ok_and(|hosts| hosts == "2");
    if !has {
        println!("skipped: no RDMA devices of a virtual machine (scripts/rdma-vm --hosts 2)");
    }
    has
}

fn writer() -> NodeId {
    id(0)
}

fn reader() -> NodeId {
    id(1)
}

/// On a device each.
fn nodes(change: impl Fn(&mut NetConfig)) -> [NetTransport; 2] {
    [node(member(0), "RDMA_VM_DEV0", &change), node(member(1), "RDMA_VM_DEV1", &change)]
}

fn node(identity: &Identity, device: &str, change: impl FnOnce(&mut NetConfig)) -> NetTransport {
    let mut config = NetConfig {
        paths: vec![Path::Rdma, Path::Quic],
        rdma_devices: vec![std::env::var(device).unwrap()],
        ..NetConfig::default()
    };
    change(&mut config);
    NetTransport::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), identity, config).unwrap()
}

/// Polls both until `done` says so of what came.
fn poll(
    nodes: &mut [NetTransport; 2],
    what: &str,
    mut done: impl FnMut(&[Vec<Event>; 2]) -> bool,
) -> [Vec<Event>; 2] {
    let (began, mut seen) = (Instant::now(), [Vec::new(), Vec::new()]);
    loop {
        for (node, seen) in nodes.iter_mut().zip(&mut seen) {
            node.poll(seen);
        }
        if done(&seen) {
            return seen;
        }
        assert!(began.elapsed() < PATIENCE, "{what} did not come: {seen:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Writes to the same place in `target` as they have in `source`, whose bytes must be there from the moment that the
/// landing is told: at the end they would be in any case.
struct Landings<'a> {
    source: &'a HostRegion,
    target: &'a HostRegion,
    /// By their immediate, of those that have not landed.
    places: Vec<Option<Range<usize>>>,
}

impl<'a> Landings<'a> {
    fn new(source: &'a HostRegion, target: &'a HostRegion) -> Landings<'a> {
        Landings { source, target, places: Vec::new() }
    }

    fn compare(&mut self, events: &[Event]) {
        for event in events {
            let Event::Landed { immediate, .. } = event else { continue };
            let Some(place) = self.places[*immediate as usize].take() else { continue };
            let [source, target] = [self.source, self.target].map(|memory| &bytes(memory)[place.clone()]);
            assert!(source == target, "write {immediate} was told before it was whole");
        }
    }
}

fn fill(memory: &HostRegion, seed: u8) {
    // SAFETY: nothing is under way in this memory.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.base(), memory.len()) };
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 253) as u8 ^ seed);
}

/// Some writes, of which each lands once, with its bytes.
fn transfer(nodes: &mut [NetTransport; 2], seed: u8) {
    const LEN: usize = 1 << 20;
    const WRITES: usize = 8;
    let [source, target] = [0; 2].map(|_| HostRegion::map(LEN * WRITES).unwrap());
    fill(&source, seed);
    let region = nodes[1].register(target.clone()).unwrap();
    let windows: Vec<_> = (0..WRITES)
        .map(|write| nodes[1].open_window(writer(), region, write * LEN..(write + 1) * LEN).unwrap())
        .collect();
    let mut landings = Landings::new(&source, &target);
    for (write, window) in windows.iter().enumerate() {
        landings.places.push(Some(write * LEN..(write + 1) * LEN));
        let source = source.extent(write * LEN..(write + 1) * LEN).unwrap();
        let (ticket, immediate) = (write as u64, write as u32);
        nodes[0].submit(reader(), Write { ticket, source, window: *window, offset: 0, immediate }).unwrap();
    }
    let seen = poll(nodes, "all writes", |seen| {
        landings.compare(&seen[1]);
        seen.iter().all(|seen| seen.len() >= WRITES)
    });
    for (node, events) in seen.iter().enumerate() {
        let mut names: Vec<u64> = events
            .iter()
            .map(|event| match event {
                Event::Sent { ticket, .. } => *ticket,
                Event::Landed { immediate, .. } => u64::from(*immediate),
                other => panic!("node {node}: {other:?}"),
            })
            .collect();
        names.sort_unstable();
        assert_eq!(names, (0..WRITES as u64).collect::<Vec<_>>(), "node {node}: each once");
    }
    windows.into_iter().for_each(|window| nodes[1].close_window(window));
    // SAFETY: everything has landed, and the windows are closed.
    let [source, target] =
        [&source, &target].map(|memory| unsafe { std::slice::from_raw_parts(memory.base(), memory.len()) });
    assert!(source == target, "bytes differ");
}

#[test]
fn devices_that_were_asked_for_must_be_there() {
    let known: Vec<String> = (0..2).filter_map(|n| std::env::var(format!("RDMA_VM_DEV{n}")).ok()).collect();
    let bind = |devices: &[&str]| {
        let rdma_devices = devices.iter().map(|name| (*name).to_owned()).collect();
        let config = NetConfig { rdma_devices, ..NetConfig::default() };
        let bound = NetTransport::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), member(0), config);
        bound.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(bind(&[]), Ok(()), "whatever there is will do");
    for beside in known.iter().map(Some).chain([None]) {
        let devices: Vec<&str> = beside.map(String::as_str).into_iter().chain(["none such"]).collect();
        let refused = bind(&devices).expect_err("there is no such device");
        assert!(known.iter().all(|name| refused.contains(name)), "{refused}");
    }
}

#[test]
fn a_link_that_comes_back_is_taken_again() {
    let _alone = alone();
    if !has_devices() {
        return;
    }
    let repairs = |config: &mut NetConfig| {
        config.repair = Duration::from_millis(200)..=Duration::from_millis(500);
    };
    let mut nodes = nodes(repairs);
    let address = nodes[1].local_addr();
    nodes[0].connect(reader(), address);
    poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
    let paths = |nodes: &[NetTransport; 2]| [nodes[0].path(reader()), nodes[1].path(writer())];
    let wait = |nodes: &[NetTransport; 2], path: Path| {
        let began = Instant::now();
        while paths(nodes) != [Some(path); 2] {
            assert!(began.elapsed() < PATIENCE, "{path} is not taken: {:?}", paths(nodes));
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for cycle in 0..3 {
        wait(&nodes, Path::Rdma);
        let by_rdma = |nodes: &[NetTransport; 2]| nodes[1].metrics().paths[Path::Rdma as usize].writes_landed;
        let before = by_rdma(&nodes);
        transfer(&mut nodes, 2 * cycle);
        assert_eq!(by_rdma(&nodes), before + 8, "cycle {cycle}");
        assert!(Command::new("sh").args(["-c", CUT]).status().unwrap().success());
        let dark = Dark;
        transfer(&mut nodes, 2 * cycle + 1);
        wait(&nodes, Path::Quic);
        drop(dark);
    }
    wait(&nodes, Path::Rdma);
}

/// The session begins while the link is dark, and is on RDMA once it is not.
#[test]
fn a_link_that_comes_later_is_taken() {
    let _alone = alone();
    if !has_devices() {
        return;
    }
    assert!(Command::new("sh").args(["-c", CUT]).status().unwrap().success());
    let dark = Dark;
    let mut nodes = nodes(|config| config.repair = Duration::from_millis(200)..=Duration::from_millis(500));
    let address = nodes[1].local_addr();
    nodes[0].connect(reader(), address);
    poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
    assert_eq!([nodes[0].path(reader()), nodes[1].path(writer())], [Some(Path::Quic); 2]);
    transfer(&mut nodes, 1);
    drop(dark);
    let began = Instant::now();
    while [nodes[0].path(reader()), nodes[1].path(writer())] != [Some(Path::Rdma); 2] {
        assert!(began.elapsed() < PATIENCE, "RDMA is not taken");
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("taken {:?} after the link was there", began.elapsed());
    transfer(&mut nodes, 2);
    assert_eq!(nodes[1].metrics().paths[Path::Rdma as usize].writes_landed, 8);
}

#[test]
fn a_link_that_is_cut_costs_no_write() {
    const LEN: usize = 1 << 20;
    const WRITES: usize = 48;
    let _alone = alone();
    if !has_devices() {
        return;
    }
    let mut nodes = nodes(|_| {});
    let [source, target] = [0; 2].map(|_| HostRegion::map(LEN * WRITES).unwrap());
    fill(&source, 77);
    fill(&target, 0);
    let region = nodes[1].register(target.clone()).unwrap();
    let address = nodes[1].local_addr();
    nodes[0].connect(reader(), address);
    poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
    assert_eq!([nodes[0].path(reader()), nodes[1].path(writer())], [Some(Path::Rdma); 2]);
    let mut landings = Landings::new(&source, &target);
    for write in 0..WRITES {
        landings.places.push(Some(write * LEN..(write + 1) * LEN));
        let window = nodes[1].open_window(writer(), region, write * LEN..(write + 1) * LEN).unwrap();
        let source = source.extent(write * LEN..(write + 1) * LEN).unwrap();
        let write = Write { ticket: write as u64, source, window, offset: 0, immediate: write as u32 };
        nodes[0].submit(reader(), write).unwrap();
    }
    // Its process takes as long to start as half of the writes take.
    let mut cutting = Command::new("sh").args(["-c", CUT_ANSWERS_FIRST]).spawn().unwrap();
    let first = poll(&mut nodes, "the first landing", |seen| {
        landings.compare(&seen[1]);
        !seen[1].is_empty()
    });
    assert!(cutting.wait().unwrap().success());
    let dark = Dark;
    let cut = Instant::now();
    let over_rdma = nodes[1].metrics().paths[Path::Rdma as usize].writes_landed;
    let left = [0, 1].map(|node: usize| WRITES - first[node].len());
    let rest = poll(&mut nodes, "the rest", |seen| {
        landings.compare(&seen[1]);
        seen[0].len() >= left[0] && seen[1].len() >= left[1]
    });
    println!("{over_rdma} of {WRITES} writes landed over RDMA; all had, {:?} after the cut", cut.elapsed());
    assert_eq!(nodes[0].path(reader()), Some(Path::Quic));
    drop(dark);
    let [sent, landed] = [0, 1].map(|node: usize| {
        let mut all: Vec<u64> = first[node]
            .iter()
            .chain(&rest[node])
            .map(|event| match event {
                Event::Sent { ticket, .. } => *ticket,
                Event::Landed { immediate, len, .. } if *len == LEN as u64 => u64::from(*immediate),
                other => panic!("{other:?}"),
            })
            .collect();
        all.sort_unstable();
        all
    });
    let expected: Vec<u64> = (0..WRITES as u64).collect();
    assert_eq!(sent, expected);
    assert_eq!(landed, expected, "each once");
    // SAFETY: everything has landed, and nothing is under way.
    let [source, target] =
        [&source, &target].map(|memory| unsafe { std::slice::from_raw_parts(memory.base(), memory.len()) });
    assert!(source == target, "bytes differ");
}

/// Faults take turns: they count what the process holds, and break the link.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this process and the devices hold.
fn held() -> String {
    let shown = Command::new("rdma").args(["resource", "show"]).output().unwrap();
    assert!(shown.status.success());
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let memory = maps.lines().filter(|line| line.contains("memfd:tandem")).count();
    format!("{files} files, {memory} mappings of regions\n{}", String::from_utf8_lossy(&shown.stdout))
}

/// Waits until what is held is what was held before.
fn nothing_is_left_of(before: &str) {
    let began = Instant::now();
    while held() != before && began.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(held(), before);
}

fn random(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize % below
}

const REGION: usize = 4 << 20;

/// What every write brings to a place: so bytes there are these, or none.
fn byte(at: usize) -> u8 {
    ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1
}

#[expect(clippy::mut_from_ref, reason = "as below")]
fn bytes(memory: &HostRegion) -> &mut [u8] {
    // SAFETY: nothing is under way in this memory, or the test is to notice that something is.
    unsafe { std::slice::from_raw_parts_mut(memory.base(), memory.len()) }
}

fn place(rng: &mut u64) -> Range<usize> {
    let len = 1 + random(rng, 300_000);
    let at = random(rng, REGION - len);
    at..at + len
}

/// Submits a write of random size to its place in the peer's window. False when no more may wait.
fn submit(
    node: &mut NetTransport,
    to: NodeId,
    memory: &Arc<HostRegion>,
    window: Window,
    n: u64,
    rng: &mut u64,
) -> bool {
    let place = place(rng);
    let offset = place.start as u64;
    let source = memory.extent(place).unwrap();
    let write = Write { ticket: n, source, window, offset, immediate: n as u32 };
    node.submit(to, write).is_ok()
}

fn numbers(line: &str) -> Vec<u64> {
    line.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// Of the places that the other process writes to.
const THEIR_SEED: u64 = 99;

/// The other process of `either_process_is_killed`: writes as much as it can, until it is killed.
#[test]
#[ignore = "run by either_process_is_killed"]
fn the_other_process() {
    let Ok(dir) = std::env::var("TANDEM_TEST_IDENTITY") else { return };
    let identity = Identity::load_or_create(std::path::Path::new(&dir)).unwrap();
    let writer = NodeId(std::env::var("TANDEM_TEST_PEER").unwrap().parse().unwrap());
    let mut node = node(&identity, "RDMA_VM_DEV1", |_| {});
    let [source, target] = [0; 2].map(|_| HostRegion::map(REGION).unwrap());
    bytes(&source).iter_mut().enumerate().for_each(|(at, to)| *to = byte(at));
    let region = node.register(target).unwrap();
    println!("listening {} {}", node.local_addr().port(), identity.node().0);
    let mut events = Vec::new();
    while events.is_empty() {
        node.poll(&mut events);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(node.path(writer), Some(Path::Rdma));
    let window = node.open_window(writer, region, 0..REGION).unwrap();
    println!("window {} {} {} {}", window.region, window.key, window.offset, window.len);
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let [region, key, offset, len] = numbers(&line)[..] else { panic!("{line}") };
    let theirs = Window { region: region as u32, key, offset, len };
    let (mut n, mut rng) = (0, THEIR_SEED);
    loop {
        while submit(&mut node, writer, &source, theirs, n, &mut rng) {
            n += 1;
        }
        events.clear();
        node.poll(&mut events);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Both processes write to each other; one is killed. The other one notices, and all is free again.
#[test]
fn either_process_is_killed() {
    const ROUNDS: u64 = 6;
    let _alone = alone();
    if !has_devices() {
        return;
    }
    let dir = std::env::temp_dir().join(format!("tandem-rdma-{}", std::process::id()));
    let identity = Identity::load_or_create(&dir).unwrap();
    let mut before = None;
    let mut landed_in_all = 0;
    for round in 0..ROUNDS {
        let mut rng = round + 5;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_other_process", "--ignored", "--nocapture", "--test-threads", "1"])
            .env("TANDEM_TEST_IDENTITY", &dir)
            .env("TANDEM_TEST_PEER", identity.node().0.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut line = |what: &str| {
            let line = lines.find_map(|line| Some(line.split_once(what)?.1.to_owned()));
            numbers(&line.expect("the other process says so"))
        };
        let [port, reader] = line("listening ")[..] else { panic!("a port and an id") };
        let (port, reader) = (port as u16, NodeId(reader));
        let mut node = node(&identity, "RDMA_VM_DEV0", |_| {});
        let [source, target] = [0; 2].map(|_| HostRegion::map(REGION).unwrap());
        bytes(&source).iter_mut().enumerate().for_each(|(at, to)| *to = byte(at));
        let region = node.register(target.clone()).unwrap();
        node.connect(reader, SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let mut events = Vec::new();
        let began = Instant::now();
        while events.is_empty() {
            node.poll(&mut events);
            assert!(began.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(
            (&events[..], node.path(reader)),
            (&[Event::Connected { peer: reader }][..], Some(Path::Rdma))
        );
        let ours = node.open_window(reader, region, 0..REGION).unwrap();
        let [region, key, offset, len] = line("window ")[..] else { panic!("a window has four numbers") };
        let theirs = Window { region: region as u32, key, offset, len };
        writeln!(child.stdin.as_mut().unwrap(), "{} {} {} {}", ours.region, ours.key, ours.offset, ours.len)
            .unwrap();
        // Both write; then the other one ends at any point of it.
        let (began, alive_for) = (Instant::now(), Duration::from_millis(20 + random(&mut rng, 150) as u64));
        let (mut n, mut landed) = (0, 0);
        let mut landings = Landings::new(&source, &target);
        let mut theirs_rng = THEIR_SEED;
        landings.places.extend((0..10_000).map(|_| Some(place(&mut theirs_rng))));
        events.clear();
        while began.elapsed() < alive_for {
            while submit(&mut node, reader, &source, theirs, n, &mut rng) {
                n += 1;
            }
            node.poll(&mut events);
            landings.compare(&events);
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        let killed = Instant::now();
        let gone = |e: &Event| matches!(e, Event::Severed { peer, .. } if *peer == reader);
        while !events.iter().any(gone) {
            node.poll(&mut events);
            assert!(killed.elapsed() < Duration::from_secs(2), "round {round}: nobody noticed");
            std::thread::sleep(Duration::from_micros(200));
        }
        let noticed = killed.elapsed();
        assert!(noticed < Duration::from_secs(1), "round {round}: noticed after {noticed:?}");
        // Nothing lands from here on; what has, is right.
        let seen = bytes(&target).to_vec();
        let wrong = seen.iter().enumerate().find(|(at, seen)| **seen != 0 && **seen != byte(*at));
        assert_eq!(wrong, None, "round {round}");
        bytes(&target).fill(0);
        let mut reported: Vec<u64> = Vec::new();
        for event in &events {
            match event {
                Event::Sent { ticket, .. } | Event::Failed { ticket, reason: FailReason::Severed, .. } => {
                    reported.push(*ticket);
                }
                Event::Landed { .. } => landed += 1,
                Event::Severed { .. } => {}
                other => panic!("round {round}: {other:?}"),
            }
        }
        reported.sort_unstable();
        assert_eq!(reported, (0..n).collect::<Vec<_>>(), "round {round}: each is reported once");
        std::thread::sleep(Duration::from_millis(20));
        assert!(bytes(&target).iter().all(|byte| *byte == 0), "round {round}: bytes landed after the end");
        let quic = &node.metrics().paths[Path::Quic as usize];
        assert_eq!(quic.writes_landed, 0, "round {round}: the other one's writes went by RDMA");
        let memory = [&source, &target].map(Arc::downgrade);
        drop((node, source, target));
        assert!(
            memory.iter().all(|memory| memory.strong_count() == 0),
            "round {round}: memory is still held"
        );
        child.wait().unwrap();
        drop(child);
        drop(lines);
        landed_in_all += landed;
        println!("round {round}: {n} submitted, {landed} landed here; noticed after {noticed:?}");
        match &before {
            None => before = Some(held()),
            Some(before) => nothing_is_left_of(before),
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(landed_in_all > ROUNDS, "only {landed_in_all} writes landed before the end");
}

/// Undone when a test ends, however it does.
struct Dark;

impl Drop for Dark {
    fn drop(&mut self) {
        let _ = Command::new("sh").args(["-c", MEND]).status();
    }
}

const CUT: &str = "for link in eth0 eth1; do tc qdisc add dev $link root netem loss 100%; done";
/// Writes land meanwhile that are not answered, and so are repeated.
const CUT_ANSWERS_FIRST: &str = "tc qdisc add dev eth1 root netem loss 100%; sleep 0.1; \
                                 tc qdisc add dev eth0 root netem loss 100%";
/// Neighbours that did not answer meanwhile are asked anew.
const MEND: &str = "for link in eth0 eth1; do tc qdisc del dev $link root; done; ip neighbour flush all; \
                    ip neighbour replace 10.77.0.2 dev eth0 use; ip neighbour replace 10.77.0.1 dev eth1 use";

/// Dark for two seconds: where RDMA is the only way, that is the end of the session, and a new one is as good.
#[test]
fn a_dark_link_ends_what_has_no_other_way() {
    let _alone = alone();
    if !has_devices() {
        return;
    }
    let mut before = None;
    for round in 0..2 {
        let only = |config: &mut NetConfig| config.paths = vec![Path::Rdma];
        let mut nodes = nodes(only);
        let [source, target] = [0; 2].map(|_| HostRegion::map(REGION).unwrap());
        bytes(&source).iter_mut().enumerate().for_each(|(at, to)| *to = byte(at));
        let region = nodes[1].register(target.clone()).unwrap();
        let address = nodes[1].local_addr();
        let mut rng = round;
        for life in 0..2 {
            nodes[0].connect(reader(), address);
            poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
            assert_eq!(nodes[0].path(reader()), Some(Path::Rdma));
            let window = nodes[1].open_window(writer(), region, 0..REGION).unwrap();
            let mut n = 0;
            while n < 100 && submit(&mut nodes[0], reader(), &source, window, n, &mut rng) {
                n += 1;
            }
            if life == 1 {
                let sent = |e: &Event| matches!(e, Event::Sent { .. });
                poll(&mut nodes, "Sent", |seen| seen[0].iter().filter(|e| sent(e)).count() as u64 == n);
                continue;
            }
            poll(&mut nodes, "the first landing", |seen| !seen[1].is_empty());
            // What is quiet has nothing to notice: so it writes on while the command starts.
            let mut cutting = Command::new("sh").args(["-c", CUT]).spawn().unwrap();
            let mut passed = Vec::new();
            while cutting.try_wait().unwrap().is_none() {
                submit(&mut nodes[0], reader(), &source, window, n, &mut rng);
                n += 1;
                nodes.iter_mut().for_each(|node| node.poll(&mut passed));
                std::thread::sleep(Duration::from_micros(200));
            }
            submit(&mut nodes[0], reader(), &source, window, n, &mut rng);
            let dark = Dark;
            let cut = Instant::now();
            let gone = |e: &Event| matches!(e, Event::Severed { .. });
            poll(&mut nodes, "Severed", |seen| seen.iter().all(|seen| seen.iter().any(gone)));
            let noticed = cut.elapsed();
            println!("round {round}: noticed after {noticed:?}");
            assert!(noticed < Duration::from_secs(1), "noticed after {noticed:?}");
            let wrong =
                bytes(&target).iter().enumerate().find(|(at, seen)| **seen != 0 && **seen != byte(*at));
            assert_eq!(wrong, None);
            bytes(&target).fill(0);
            std::thread::sleep(Duration::from_secs(2).saturating_sub(cut.elapsed()));
            drop(dark);
            std::thread::sleep(Duration::from_millis(50));
            assert!(bytes(&target).iter().all(|byte| *byte == 0), "bytes landed after the end");
        }
        drop(nodes);
        drop((source, target));
        match &before {
            None => before = Some(held()),
            Some(before) => nothing_is_left_of(before),
        }
    }
}

/// A node loop that takes in nothing holds its peer up, and loses nothing.
#[test]
fn a_receiver_that_is_full_takes_the_rest_later() {
    const WRITES: u64 = 200;
    const EVENTS: usize = 8;
    let _alone = alone();
    if !has_devices() {
        return;
    }
    let mut nodes = nodes(|config| config.event_limit = EVENTS);
    let [source, target] = [0; 2].map(|_| HostRegion::map(REGION).unwrap());
    bytes(&source).iter_mut().enumerate().for_each(|(at, to)| *to = byte(at));
    let region = nodes[1].register(target.clone()).unwrap();
    let address = nodes[1].local_addr();
    nodes[0].connect(reader(), address);
    poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
    let window = nodes[1].open_window(writer(), region, 0..REGION).unwrap();
    let mut rng = 3;
    for n in 0..WRITES {
        assert!(submit(&mut nodes[0], reader(), &source, window, n, &mut rng));
    }
    // Longer than any deadline of a lane: being full is no fault.
    std::thread::sleep(Duration::from_millis(1500));
    let mut seen = Vec::new();
    nodes[1].poll(&mut seen);
    assert!(seen.len() <= EVENTS, "{} events were queued", seen.len());
    let more = WRITES as usize - seen.len();
    poll(&mut nodes, "the rest", |seen| seen[0].len() as u64 == WRITES && seen[1].len() == more);
    let wrong = bytes(&target).iter().enumerate().find(|(at, seen)| **seen != 0 && **seen != byte(*at));
    assert_eq!(wrong, None);
    for node in &nodes {
        let paths = node.metrics().paths;
        assert_eq!(paths[Path::Quic as usize].writes_landed + paths[Path::Rdma as usize].failed, 0);
    }
}

/// Windows that close under their writes: nothing lands afterwards, and other windows get everything.
#[test]
fn a_window_closes_under_its_writes() {
    let _alone = alone();
    if !has_devices() {
        return;
    }
    let (mut before, mut under_way) = (None, 0);
    for round in 0..12 {
        let mut nodes = nodes(|_| {});
        let targets = [0; 2].map(|_| HostRegion::map(REGION).unwrap());
        let source = HostRegion::map(REGION).unwrap();
        bytes(&source).iter_mut().enumerate().for_each(|(at, to)| *to = byte(at));
        let regions = [0, 1].map(|at: usize| nodes[1].register(targets[at].clone()).unwrap());
        let address = nodes[1].local_addr();
        nodes[0].connect(reader(), address);
        poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
        assert_eq!(nodes[0].path(reader()), Some(Path::Rdma));
        let windows = regions.map(|region| nodes[1].open_window(writer(), region, 0..REGION).unwrap());
        let mut rng = round + 1;
        for n in 0..40u64 {
            assert!(submit(&mut nodes[0], reader(), &source, windows[n as usize % 2], n, &mut rng));
        }
        let (began, open_for) = (Instant::now(), Duration::from_micros(random(&mut rng, 30_000) as u64));
        while began.elapsed() < open_for {
            std::thread::yield_now();
        }
        nodes[1].close_window(windows[0]);
        bytes(&targets[0]).fill(0);
        let ended = |seen: &[Event]| {
            let ends = |e: &&Event| matches!(e, Event::Sent { .. } | Event::Failed { .. });
            seen.iter().filter(ends).count()
        };
        let seen = poll(&mut nodes, "every end", |seen| ended(&seen[0]) == 40);
        assert!(began.elapsed() < open_for + Duration::from_secs(2), "took {:?}", began.elapsed());
        let refused = seen[0].iter().filter_map(|event| match event {
            Event::Failed { ticket, reason: FailReason::Refused, .. } => Some(*ticket),
            Event::Failed { .. } => panic!("round {round}: {event:?}"),
            _ => None,
        });
        let refused: Vec<u64> = refused.collect();
        assert!(
            refused.iter().all(|ticket| ticket % 2 == 0),
            "round {round}: of the open window: {refused:?}"
        );
        under_way += refused.len();
        assert!(
            bytes(&targets[0]).iter().all(|byte| *byte == 0),
            "round {round}: bytes landed after closing"
        );
        let wrong =
            bytes(&targets[1]).iter().enumerate().find(|(at, seen)| **seen != 0 && **seen != byte(*at));
        assert_eq!(wrong, None, "round {round}");
        drop(nodes);
        drop((source, targets));
        match &before {
            None => before = Some(held()),
            Some(before) => nothing_is_left_of(before),
        }
    }
    assert!(under_way > 12, "only {under_way} writes were under way when their window closed");
}
