//! TLS between two nodes whose network does not mean well: every TCP byte between them goes through a relay.

use crate::fault::Random;
use crate::members::id;
use crate::node::Node;
use crate::relay::{LOOPBACK, Relay, Tcp};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_transport::{Event, NetConfig, Path, SeverReason, Transport, Window, Write};

const REGION: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn nodes(paths: &[Path]) -> [Node; 2] {
    nodes_that_repair(paths, Duration::from_secs(3600))
}

fn nodes_that_repair(paths: &[Path], pause: Duration) -> [Node; 2] {
    [1, 2].map(|number| {
        let (paths, repair) = (paths.to_vec(), pause..=pause);
        let config =
            NetConfig { paths, tls_connections: 2, tls_turns: Some(2), repair, ..NetConfig::default() };
        Node::start(number, LOOPBACK, REGION, config)
    })
}

/// Polls both nodes until `done`.
#[track_caller]
fn until(nodes: &mut [Node; 2], mut done: impl FnMut(&mut [Node; 2]) -> bool) {
    let since = Instant::now();
    loop {
        nodes.iter_mut().for_each(Node::poll);
        if done(nodes) {
            return;
        }
        let seen = |node: &Node| (node.events.clone(), metrics(node, Path::Tls));
        assert!(since.elapsed() < PATIENCE, "{:?}", nodes.each_ref().map(seen));
        thread::sleep(Duration::from_micros(300));
    }
}

fn connect(nodes: &mut [Node; 2], addr: SocketAddr) {
    nodes[0].transport.connect(id(2), addr);
    until(nodes, |nodes| {
        nodes.iter().all(|node| node.events.iter().any(|event| matches!(event, Event::Connected { .. })))
    });
    nodes.iter_mut().for_each(|node| node.events.clear());
}

/// Nodes whose TLS passes a relay. One whose port number is taken for TCP listens on another, which the relay does not
/// know: then others are made.
fn through(tcp: Tcp, make: impl Fn() -> [Node; 2]) -> ([Node; 2], Relay) {
    for _ in 0..10 {
        let mut nodes = make();
        let relay = Relay::with(nodes[1].transport.local_addr(), tcp);
        connect(&mut nodes, relay.addr);
        if relay.weather.connections.load(Ordering::Relaxed) > 0 {
            return (nodes, relay);
        }
    }
    panic!("no TCP connection passed the relay");
}

/// Lengths around every place where the lane cuts, and any.
fn any_length(random: &mut Random) -> usize {
    let edges = [0, 1, 64, 4096, 1 << 14, (1 << 14) + 64, (1 << 14) + 4096, 2 << 14, 5 << 14, 1 << 20];
    match random.below(3) {
        0 => random.below(1 << 20),
        _ => (edges[random.below(edges.len())] + random.below(5)).saturating_sub(2),
    }
}

fn fill(region: &Arc<HostRegion>, seed: u64) {
    let (mut random, all) = (Random(seed), region.extent(0..REGION).unwrap());
    // SAFETY: nothing is under way.
    let bytes = unsafe { all.bytes_mut() };
    bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]));
}

fn copy_of(region: &Arc<HostRegion>) -> Vec<u8> {
    let all = region.extent(0..REGION).unwrap();
    // SAFETY: nothing is under way.
    unsafe { all.bytes() }.to_vec()
}

/// Writes of node 0, each into a window of its own that touches its neighbours, in the second half of node 1's
/// region; some windows are closed before, some while they are written. Every byte of every write that was
/// reported is right, and no other byte changed.
fn transfer(nodes: &mut [Node; 2], writes: usize, random: &mut Random) {
    fill(&nodes[0].memory, random.next());
    fill(&nodes[1].memory, random.next());
    let (from, before) = (copy_of(&nodes[0].memory), copy_of(&nodes[1].memory));
    let mut plans: Vec<(Window, usize, usize, bool)> = Vec::new();
    let mut at = random.below(5);
    for ticket in 0..writes {
        let len = any_length(random).min(REGION - at.min(REGION));
        let (region, source) = (nodes[1].region, random.below(REGION - len));
        let window = nodes[1].transport.open_window(id(1), region, at..at + len).unwrap();
        at = (at + len + random.below(2)).min(REGION);
        let closing = random.below(8) == 0;
        if closing && random.below(2) == 0 {
            nodes[1].transport.close_window(window);
        }
        let extent = nodes[0].memory.extent(source..source + len).unwrap();
        let write =
            Write { ticket: ticket as u64, source: extent, window, offset: 0, immediate: ticket as u32 };
        nodes[0].transport.submit(id(2), write).unwrap();
        plans.push((window, source, len, closing));
    }
    for (window, _, _, closing) in &plans {
        if *closing {
            nodes[1].transport.close_window(*window);
        }
    }
    let mut fates = BTreeMap::new();
    let mut landed = Vec::new();
    until(nodes, |nodes| {
        for event in nodes[0].events.drain(..) {
            match event {
                Event::Sent { ticket, .. } => assert_eq!(fates.insert(ticket, true), None),
                Event::Failed { ticket, .. } => assert_eq!(fates.insert(ticket, false), None),
                other => panic!("unexpected {other:?}"),
            }
        }
        for event in nodes[1].events.drain(..) {
            match event {
                Event::Landed { immediate, .. } => landed.push(immediate),
                other => panic!("unexpected {other:?}"),
            }
        }
        fates.len() == writes
    });
    let after = copy_of(&nodes[1].memory);
    let mut expected = before;
    for (ticket, (window, source, len, closing)) in plans.iter().enumerate() {
        let place = window.offset as usize..window.offset as usize + len;
        let sent = fates[&(ticket as u64)];
        if sent {
            expected[place].copy_from_slice(&from[*source..source + len]);
        } else {
            assert!(closing, "write {ticket} of {len} bytes failed");
            // Some of it may have landed.
            expected[place.clone()].copy_from_slice(&after[place]);
        }
        let reports = landed.iter().filter(|immediate| **immediate == ticket as u32).count();
        assert!(if *closing { reports <= 1 } else { reports == 1 }, "write {ticket} landed {reports} times");
        nodes[1].transport.close_window(*window);
    }
    let wrong = expected.iter().zip(&after).position(|(expected, got)| expected != got);
    assert_eq!(wrong, None, "a byte is wrong");
}

fn metrics(node: &Node, path: Path) -> tandem_transport::PathMetrics {
    *node.transport.metrics().paths.iter().find(|metrics| metrics.path == path).unwrap()
}

fn seed() -> u64 {
    let seed = std::env::var("TANDEM_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    println!("TANDEM_SEED={seed}");
    seed
}

#[test]
fn every_byte_lands_in_its_place_and_no_other() {
    let mut random = Random(seed());
    let mut nodes = nodes(&[Path::Tls]);
    let addr = nodes[1].transport.local_addr();
    connect(&mut nodes, addr);
    for _ in 0..30 {
        transfer(&mut nodes, 30, &mut random);
    }
    assert_eq!(metrics(&nodes[0], Path::Tls).failed, 0);
}

/// Whatever happens to TCP under way, QUIC delivers what is left, and nothing lands twice.
#[test]
fn what_tcp_loses_goes_by_quic() {
    let mut random = Random(seed());
    for round in 0..21 {
        let at = 3000 + random.next() % (4 << 20);
        let tcp = [Tcp::Garbles(at), Tcp::Cuts(at), Tcp::Repeats(at)][round % 3];
        let (mut nodes, _relay) = through(tcp, || nodes(&[Path::Tls, Path::Quic]));
        assert_eq!(nodes[0].transport.path(id(2)), Some(Path::Tls));
        for _ in 0..3 {
            transfer(&mut nodes, 30, &mut random);
        }
        until(&mut nodes, |nodes| nodes.iter().all(|node| metrics(node, Path::Tls).failed == 2));
        assert_eq!(nodes[0].transport.path(id(2)), Some(Path::Quic));
    }
}

/// The network cuts TCP once, and lets it through again.
#[test]
fn tls_that_was_cut_is_taken_again() {
    let mut random = Random(seed());
    let (mut nodes, _relay) = through(Tcp::Cuts(100_000), || {
        nodes_that_repair(&[Path::Tls, Path::Quic], Duration::from_millis(20))
    });
    transfer(&mut nodes, 30, &mut random);
    until(&mut nodes, |nodes| nodes.iter().all(|node| metrics(node, Path::Tls).failed == 2));
    let taken = |node: &Node, peer| node.transport.path(id(peer)) == Some(Path::Tls);
    until(&mut nodes, |nodes| taken(&nodes[0], 2) && taken(&nodes[1], 1));
    let by =
        |nodes: &[Node; 2], path| nodes.iter().map(|node| metrics(node, path).writes_landed).sum::<u64>();
    let before = [Path::Tls, Path::Quic].map(|path| by(&nodes, path));
    transfer(&mut nodes, 30, &mut random);
    let after = [Path::Tls, Path::Quic].map(|path| by(&nodes, path));
    assert!(after[0] > before[0] && after[1] == before[1], "{before:?}, {after:?}");
    assert!(nodes.iter().all(|node| metrics(node, Path::Tls).opened == 4));
}

/// The network refuses TCP when the session begins, and lets it through later.
#[test]
fn tls_that_was_refused_at_first_is_taken_later() {
    let mut random = Random(seed());
    let mut nodes = nodes_that_repair(&[Path::Tls, Path::Quic], Duration::from_millis(20));
    let target = nodes[1].transport.local_addr();
    let relay = Relay::with(target, Tcp::Refuses);
    connect(&mut nodes, relay.addr);
    transfer(&mut nodes, 30, &mut random);
    // Asked again and again meanwhile, and nothing came of it.
    thread::sleep(Duration::from_millis(200));
    transfer(&mut nodes, 30, &mut random);
    assert_eq!(nodes[0].transport.path(id(2)), Some(Path::Quic));
    relay.let_through(target);
    until(&mut nodes, |nodes| {
        [(0, 2), (1, 1)].iter().all(|(node, peer)| nodes[*node].transport.path(id(*peer)) == Some(Path::Tls))
    });
    let before = metrics(&nodes[1], Path::Tls).writes_landed;
    transfer(&mut nodes, 30, &mut random);
    assert!(metrics(&nodes[1], Path::Tls).writes_landed > before);
    assert_eq!(metrics(&nodes[0], Path::Tls).failed, 0);
}

#[test]
fn where_tcp_is_not_let_through_quic_is_taken() {
    let mut nodes = nodes(&[Path::Tls, Path::Quic]);
    let relay = Relay::with(nodes[1].transport.local_addr(), Tcp::Refuses);
    connect(&mut nodes, relay.addr);
    assert_eq!(nodes[0].transport.path(id(2)), Some(Path::Quic));
    transfer(&mut nodes, 30, &mut Random(1));

    let mut nodes = self::nodes(&[Path::Tls]);
    let relay = Relay::with(nodes[1].transport.local_addr(), Tcp::Refuses);
    nodes[0].transport.connect(id(2), relay.addr);
    until(&mut nodes, |nodes| !nodes[0].events.is_empty());
    match &nodes[0].events[..] {
        [Event::Severed { reason: SeverReason::Unreachable(reason), .. }] => {
            assert!(reason.contains("cannot connect to TCP"), "{reason}");
        }
        other => panic!("unexpected {other:?}"),
    }
}

/// Anyone can reach the port: what they send harms nobody, and nothing of it stays.
#[test]
fn strangers_are_shown_out() {
    let mut random = Random(seed());
    let mut nodes = nodes(&[Path::Tls]);
    let addr = nodes[1].transport.local_addr();
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let shown_out = Mutex::new(0);
    thread::scope(|scope| {
        for _ in 0..20 {
            let mut bytes = vec![0; random.below(1 << 16)];
            bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
            if random.below(2) == 0 && bytes.len() > 5 {
                // As a handshake begins.
                bytes[..3].copy_from_slice(&[22, 3, 1]);
                bytes[3] &= 0x3f;
            }
            let shown_out = &shown_out;
            scope.spawn(move || {
                let mut stranger = TcpStream::connect(addr).unwrap();
                let _ = stranger.write_all(&bytes);
                let _ = stranger.shutdown(Shutdown::Write);
                stranger.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut answer = Vec::new();
                // Reset or ended, but not left waiting.
                let _ = stranger.read_to_end(&mut answer);
                *shown_out.lock().unwrap() += 1;
            });
        }
    });
    assert_eq!(*shown_out.lock().unwrap(), 20);
    connect(&mut nodes, addr);
    transfer(&mut nodes, 30, &mut random);
    drop(silent);
    // Two connections each way are the lane's.
    until(&mut nodes, |_| connections(addr.port()) == 2);
    nodes[0].transport.sever(id(2));
    until(&mut nodes, |_| connections(addr.port()) == 0);
}

/// TCP connections that a socket of this machine holds at this port, listeners aside.
fn connections(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let held = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        // Established, or ended by the other side alone.
        words[1].ends_with(&format!(":{port:04X}")) && ["01", "08"].contains(&words[3])
    };
    table.lines().skip(1).filter(held).count()
}
