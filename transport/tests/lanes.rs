//! Lanes that fail while their session goes on: nothing is lost, nothing lands twice.

mod members;
#[path = "members/node.rs"]
mod node;

use members::id;
use node::Node;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_transport::{Event, NetConfig, Path, Transport, Window, Write};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const REGION: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
/// Tests that count what the process holds have it to themselves.
static ALONE: Mutex<()> = Mutex::new(());

fn pair(paths: &[Path]) -> [Node; 2] {
    pair_that_repairs(paths, Duration::from_secs(3600))
}

fn pair_that_repairs(paths: &[Path], pause: Duration) -> [Node; 2] {
    pair_with(NetConfig { paths: paths.to_vec(), repair: pause..=pause, ..NetConfig::default() })
}

fn pair_with(config: NetConfig) -> [Node; 2] {
    let tls_turns = config.tls_turns.or(Some(2));
    let config = NetConfig { tls_connections: 2, tls_turns, ..config };
    let mut nodes = [0, 1].map(|node| Node::start(node, ANY, REGION, config.clone()));
    let addr = nodes[1].transport.local_addr();
    nodes[0].transport.connect(id(1), addr);
    for (node, other) in [(0, 1), (1, 0)] {
        wait(&mut nodes, node, |e| *e == Event::Connected { peer: id(other) });
    }
    nodes
}

/// Polls until an event of a node matches; all of its events stay.
#[track_caller]
fn wait(nodes: &mut [Node; 2], node: usize, matches: impl Fn(&Event) -> bool) {
    let begun = Instant::now();
    while !nodes[node].events.iter().any(&matches) {
        for node in nodes.iter_mut() {
            node.transport.poll(&mut node.events);
        }
        assert!(begun.elapsed() < PATIENCE, "node {node} reported only {:?}", nodes[node].events);
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn byte(round: usize, at: usize) -> u8 {
    ((at as u64 + round as u64 * 7919).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

#[allow(clippy::mut_from_ref)]
fn bytes(region: &HostRegion) -> &mut [u8] {
    // SAFETY: nothing is under way when a test fills or reads.
    unsafe { std::slice::from_raw_parts_mut(region.base(), region.len()) }
}

fn random(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize % below
}

/// Submits writes of random sizes that fill the region; returns where each goes.
fn submit_all(nodes: &mut [Node; 2], window: Window, rng: &mut u64) -> BTreeMap<u64, (usize, usize)> {
    submit_from(nodes, 0, window, rng)
}

fn submit_from(
    nodes: &mut [Node; 2],
    writer: usize,
    window: Window,
    rng: &mut u64,
) -> BTreeMap<u64, (usize, usize)> {
    let (mut at, mut writes) = (0, BTreeMap::new());
    while at < REGION {
        let len = (1 + random(rng, 200_000)).min(REGION - at);
        let ticket = writes.len() as u64;
        let source = nodes[writer].memory.extent(at..at + len).unwrap();
        let write = Write { ticket, source, window, offset: at as u64, immediate: ticket as u32 };
        nodes[writer].transport.submit(id(1 - writer), write).unwrap();
        writes.insert(ticket, (at, len));
        at += len;
    }
    writes
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("memfd:tandem")).count()
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A node loop that sleeps until it is woken hears of every landing, also when it has room for few events.
#[test]
fn who_sleeps_is_woken_however_few_events_there_may_be() {
    for path in [Path::Shm, Path::Tls, Path::Quic] {
        let config = NetConfig { paths: vec![path], event_limit: 2, ..NetConfig::default() };
        let mut nodes = pair_with(config);
        let region = nodes[1].region;
        let window = nodes[1].transport.open_window(id(0), region, 0..REGION).unwrap();
        let [writer, sleeper] = &mut nodes;
        std::thread::scope(|scope| {
            let sleeping = scope.spawn(move || {
                sleeper.transport.set_waker(Waker::from(Arc::new(Unpark(std::thread::current()))));
                let (begun, mut landed, mut events) = (Instant::now(), 0, Vec::new());
                loop {
                    sleeper.transport.poll(&mut events);
                    landed += events.drain(..).filter(|e| matches!(e, Event::Landed { .. })).count();
                    if landed == 100 {
                        break;
                    }
                    std::thread::park_timeout(PATIENCE);
                    assert!(begun.elapsed() < PATIENCE, "{path}: not woken after {landed} landings");
                }
            });
            for ticket in 0..100 {
                let source = writer.memory.extent(0..ticket as usize % 3 * 1000).unwrap();
                let write = Write { ticket, source, window, offset: 0, immediate: 0 };
                writer.transport.submit(id(1), write).unwrap();
            }
            while !sleeping.is_finished() {
                writer.transport.poll(&mut writer.events);
                std::thread::sleep(Duration::from_micros(100));
            }
        });
    }
}

/// Both node loops sleep, and hear of the last write of a run as soon as of the first, however the writes come.
#[test]
fn who_sleeps_hears_of_the_end_of_a_run() {
    const SOON: Duration = Duration::from_millis(500);
    let sleep_until = |node: &mut Node, mut left: usize, what: &str| {
        node.transport.set_waker(Waker::from(Arc::new(Unpark(std::thread::current()))));
        let begun = Instant::now();
        loop {
            node.transport.poll(&mut node.events);
            left -= node
                .events
                .drain(..)
                .filter(|e| matches!(e, Event::Landed { .. } | Event::Sent { .. }))
                .count();
            if left == 0 {
                return;
            }
            std::thread::park_timeout(SOON);
            assert!(begun.elapsed() < SOON, "{what}: not woken for the last {left}");
        }
    };
    for path in [Path::Shm, Path::Tls] {
        let mut nodes = pair(&[path]);
        let region = nodes[1].region;
        let window = nodes[1].transport.open_window(id(0), region, 0..REGION).unwrap();
        nodes.iter_mut().for_each(|node| node.events.clear());
        let mut rng = 11;
        for round in 0..if path == Path::Shm { 1000 } else { 200 } {
            let writes = 1 + random(&mut rng, 40);
            let longest = [100, 5000, 50_000][random(&mut rng, 3)];
            let [writer, reader] = &mut nodes;
            std::thread::scope(|scope| {
                scope.spawn(|| sleep_until(reader, writes, &format!("{path}, landings of round {round}")));
                for ticket in 0..writes as u64 {
                    let source = writer.memory.extent(0..random(&mut rng, longest)).unwrap();
                    let write = Write { ticket, source, window, offset: 0, immediate: 0 };
                    writer.transport.submit(id(1), write).unwrap();
                    let (begun, pause) = (Instant::now(), random(&mut rng, 8).pow(2));
                    while begun.elapsed() < Duration::from_micros(pause as u64) {
                        std::hint::spin_loop();
                    }
                }
                sleep_until(writer, writes, &format!("{path}, reports of round {round}"));
            });
        }
    }
}

/// A write without a body may fill a batch, which is sent before anything else is sealed: its answer is one to a write
/// that this side knows of.
#[test]
fn short_writes_are_known_before_they_are_answered() {
    for turns in [1, 2] {
        let config = NetConfig { paths: vec![Path::Tls], tls_turns: Some(turns), ..NetConfig::default() };
        let mut nodes = pair_with(config);
        let region = nodes[1].region;
        let window = nodes[1].transport.open_window(id(0), region, 0..REGION).unwrap();
        nodes[0].events.clear();
        for round in 0..40 {
            for ticket in 0..250 {
                let source = nodes[0].memory.extent(0..4096 - ticket as usize).unwrap();
                let write = Write { ticket: round * 1000 + ticket, source, window, offset: 0, immediate: 0 };
                nodes[0].transport.submit(id(1), write).unwrap();
            }
            let (begun, mut sent) = (Instant::now(), 0);
            while sent < 250 {
                nodes.iter_mut().for_each(Node::poll);
                nodes[1].events.clear();
                for event in nodes[0].events.drain(..) {
                    assert!(matches!(event, Event::Sent { .. }), "{turns} turns, round {round}: {event:?}");
                    sent += 1;
                }
                assert!(begun.elapsed() < PATIENCE, "{turns} turns, round {round}: {sent} sent");
            }
        }
    }
}

#[test]
fn shared_memory_that_fails_loses_and_repeats_nothing() {
    fails_without_loss(Path::Shm);
}

#[test]
fn tls_that_fails_loses_and_repeats_nothing() {
    fails_without_loss(Path::Tls);
}

fn fails_without_loss(path: Path) {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let mut repeated = 0;
    for round in 0..200 {
        let mut rng = round as u64 + 1;
        let mut nodes = pair(&[path, Path::Quic]);
        assert_eq!(nodes[0].transport.path(id(1)), Some(path));
        for (at, to) in bytes(&nodes[0].memory).iter_mut().enumerate() {
            *to = byte(round, at);
        }
        let region = nodes[1].region;
        let window = nodes[1].transport.open_window(id(0), region, 0..REGION).unwrap();
        let writes = submit_all(&mut nodes, window, &mut rng);
        let begun = Instant::now();
        let after = Duration::from_micros(random(&mut rng, 2000) as u64);
        while begun.elapsed() < after {
            for node in &mut nodes {
                node.transport.poll(&mut node.events);
            }
        }
        let failing = random(&mut rng, 2);
        nodes[failing].transport.fail_path(id(1 - failing), path);
        for ticket in writes.keys() {
            wait(&mut nodes, 0, |e| matches!(e, Event::Sent { ticket: t, .. } if t == ticket));
        }
        std::thread::sleep(Duration::from_millis(2));
        for node in &mut nodes {
            node.transport.poll(&mut node.events);
            node.events.retain(|e| !matches!(e, Event::Connected { .. }));
        }
        assert_eq!(nodes[0].events.len(), writes.len(), "round {round}: each is reported once");
        let mut landed: Vec<u64> = nodes[1]
            .events
            .iter()
            .map(|e| match e {
                Event::Landed { immediate, .. } => u64::from(*immediate),
                other => panic!("round {round}: {other:?}"),
            })
            .collect();
        landed.sort_unstable();
        assert_eq!(landed, writes.keys().copied().collect::<Vec<_>>(), "round {round}: each lands once");
        let wrong = bytes(&nodes[1].memory).iter().enumerate().find(|(at, b)| **b != byte(round, *at));
        assert_eq!(wrong, None, "round {round}");
        assert_eq!(nodes[failing].transport.path(id(1 - failing)), Some(Path::Quic));
        repeated += nodes[0].transport.metrics().writes_repeated();
    }
    assert!(repeated > 1000, "only {repeated} writes were under way when their lane failed");
}

#[test]
fn shared_memory_is_taken_again_and_again() {
    is_taken_again(Path::Shm);
}

#[test]
fn tls_is_taken_again_and_again() {
    is_taken_again(Path::Tls);
}

/// What the process holds: descriptors, shared memory, threads.
fn held() -> [usize; 3] {
    [open_files(), mappings(), std::fs::read_dir("/proc/self/task").unwrap().count()]
}

/// One session, in which both nodes write while their lane fails over and over, at either side, whatever it is doing.
fn is_taken_again(path: Path) {
    const ROUNDS: usize = 120;
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let mut nodes = pair_that_repairs(&[path, Path::Quic], Duration::from_millis(1));
    let mut rng = 5;
    let mut held_before = None;
    let mut by_lane = 0;
    let mut round = 0;
    // How many failures come about in a round depends on how fast it is.
    let failed = |nodes: &[Node; 2]| {
        nodes.iter().map(|node| node.transport.metrics().paths[path as usize].failed).min()
    };
    while round < ROUNDS || failed(&nodes) < Some(100) {
        assert!(round < 10 * ROUNDS, "only {:?} failures in {round} rounds", failed(&nodes));
        let writer = round % 2;
        let reader = 1 - writer;
        for (at, to) in bytes(&nodes[writer].memory).iter_mut().enumerate() {
            *to = byte(round, at);
        }
        // On both sides: whoever takes it last is not there yet when the other one begins.
        let region = nodes[reader].region;
        let window = nodes[reader].transport.open_window(id(writer), region, 0..REGION).unwrap();
        nodes.iter_mut().for_each(|node| node.events.clear());
        let mut failures = 1 + random(&mut rng, 3);
        let by_lane_before = nodes[reader].transport.metrics().paths[path as usize].writes_landed;
        let writes = submit_from(&mut nodes, writer, window, &mut rng);
        let begun = Instant::now();
        let mut next = Duration::from_micros(random(&mut rng, 2000) as u64);
        loop {
            for node in &mut nodes {
                node.transport.poll(&mut node.events);
            }
            let reported = nodes[writer].events.iter().filter(|e| matches!(e, Event::Sent { .. })).count();
            if reported == writes.len() {
                break;
            }
            if failures > 0 && begun.elapsed() > next {
                failures -= 1;
                next = begun.elapsed() + Duration::from_micros(random(&mut rng, 4000) as u64);
                let failing = random(&mut rng, 2);
                nodes[failing].transport.fail_path(id(1 - failing), path);
            }
            assert!(begun.elapsed() < PATIENCE, "round {round}: {reported} of {} writes", writes.len());
        }
        // What lands twice does so late.
        std::thread::sleep(Duration::from_millis(2));
        let Node { transport, events, .. } = &mut nodes[reader];
        transport.poll(events);
        let once: BTreeMap<u32, usize> = landed(&nodes[reader].events);
        let all: BTreeMap<u32, usize> = writes.keys().map(|ticket| (*ticket as u32, 1)).collect();
        assert_eq!(once, all, "round {round}: each lands once");
        let wrong = bytes(&nodes[reader].memory).iter().enumerate().find(|(at, b)| **b != byte(round, *at));
        assert_eq!(wrong, None, "round {round}");
        nodes[reader].transport.close_window(window);
        by_lane += nodes[reader].transport.metrics().paths[path as usize].writes_landed - by_lane_before;
        // At the moment when one side has it again, half of the time: the other one has not.
        let waits_for = if round % 4 < 2 { &[0, 1][..] } else { &[round % 2][..] };
        let begun = Instant::now();
        while waits_for.iter().any(|node| nodes[*node].transport.path(id(1 - node)) != Some(path)) {
            assert!(begun.elapsed() < PATIENCE, "round {round}: the path is not taken again");
            std::thread::yield_now();
        }
        if round == ROUNDS / 4 {
            use_both_ways(&mut nodes, path);
            held_before = Some(settled_at(held));
        }
        round += 1;
    }
    let metrics = nodes.each_ref().map(|node| node.transport.metrics().paths[path as usize]);
    assert!(metrics.iter().all(|m| m.failed >= 100 && m.opened > 100), "{metrics:?}");
    assert!(metrics.iter().all(|m| m.writes_repeated > 0), "{metrics:?}");
    assert!(by_lane > ROUNDS as u64, "only {by_lane} writes took the lane");
    use_both_ways(&mut nodes, path);
    assert_eq!(Some(settled_at(held)), held_before, "descriptors, mappings and threads after {round} rounds");
}

/// Has each node write to the other by this path, as soon as both have it: what a path takes up when it is used first is
/// there then.
fn use_both_ways(nodes: &mut [Node; 2], path: Path) {
    let begun = Instant::now();
    while nodes.iter().zip([1, 0]).any(|(node, peer)| node.transport.path(id(peer)) != Some(path)) {
        assert!(begun.elapsed() < PATIENCE, "the path is not taken again");
        std::thread::yield_now();
    }
    for (writer, reader) in [(0, 1), (1, 0)] {
        let region = nodes[reader].region;
        let window = nodes[reader].transport.open_window(id(writer), region, 0..1).unwrap();
        let source = nodes[writer].memory.extent(0..1).unwrap();
        let write = Write { ticket: u64::MAX, source, window, offset: 0, immediate: 0 };
        nodes[writer].transport.submit(id(reader), write).unwrap();
        wait(nodes, writer, |event| matches!(event, Event::Sent { ticket: u64::MAX, .. }));
        nodes[reader].transport.close_window(window);
        nodes[writer].events.clear();
    }
}

/// How often each immediate has landed.
fn landed(events: &[Event]) -> BTreeMap<u32, usize> {
    let mut landed = BTreeMap::new();
    for event in events {
        if let Event::Landed { immediate, .. } = event {
            *landed.entry(*immediate).or_default() += 1;
        }
    }
    landed
}

/// A value once it stays the same for a while.
fn settled_at<T: PartialEq>(measure: impl Fn() -> T) -> T {
    let (mut last, mut since) = (measure(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        std::thread::sleep(Duration::from_millis(10));
        let now = measure();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}
