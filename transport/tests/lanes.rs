//! Lanes that fail while their session goes on: nothing is lost, nothing lands twice.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_transport::{Event, Identity, NetConfig, NetTransport, Path, RegionId, Transport, Window, Write};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const REGION: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn identity() -> Identity {
    static DIRS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = DIRS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("tandem-lanes-{}-{n}", std::process::id()));
    let identity = Identity::load_or_create(&dir).unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    identity
}

struct Node {
    transport: NetTransport,
    memory: Arc<HostRegion>,
    region: RegionId,
    events: Vec<Event>,
}

fn id(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}

fn pair(identity: &Identity, paths: &[Path]) -> [Node; 2] {
    let mut nodes = [0, 1].map(|node| {
        let config = NetConfig { paths: paths.to_vec(), ..NetConfig::default() };
        let mut transport = NetTransport::bind(ANY, identity, id(node), config).unwrap();
        let memory = HostRegion::map(REGION).unwrap();
        let region = transport.register(Arc::clone(&memory)).unwrap();
        Node { transport, memory, region, events: Vec::new() }
    });
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
    let (mut at, mut writes) = (0, BTreeMap::new());
    while at < REGION {
        let len = (1 + random(rng, 200_000)).min(REGION - at);
        let ticket = writes.len() as u64;
        let source = nodes[0].memory.extent(at..at + len).unwrap();
        let write = Write { ticket, source, window, offset: at as u64, immediate: ticket as u32 };
        nodes[0].transport.submit(id(1), write).unwrap();
        writes.insert(ticket, (at, len));
        at += len;
    }
    writes
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
    let identity = identity();
    let mut repeated = 0;
    for round in 0..200 {
        let mut rng = round as u64 + 1;
        let mut nodes = pair(&identity, &[path, Path::Quic]);
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
        repeated += nodes[0].transport.metrics().writes_repeated;
    }
    assert!(repeated > 1000, "only {repeated} writes were under way when their lane failed");
}
