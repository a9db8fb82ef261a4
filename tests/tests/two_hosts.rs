//! QUIC between two hosts (`scripts/two-hosts`) over a link that delays, loses and reorders packets, and is cut.
//!
//! Each test runs itself again, inside the first host. Where there are no two hosts to be had it says so and passes;
//! `scripts/check` names that as skipped.

#[path = "../../transport/tests/members/mod.rs"]
mod members;
#[path = "../../transport/tests/members/node.rs"]
mod node;

use members::id;
use node::Node;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path as FilePath;
use std::process::Command;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_transport::{Congestion, Event, FailReason, NetConfig, Path, Transport, Tuning, Window, Write};

const REGION: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
/// The status of `scripts/two-hosts` where it cannot make any.
const NO_HOSTS: i32 = 125;

/// Runs `body` on the first host of each link in turn. `test` is the caller's name.
fn over(links: &[&str], test: &str, body: impl Fn()) {
    if std::env::var_os("TWO_HOSTS_PEER").is_some() {
        return body();
    }
    let script = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/two-hosts");
    for link in links {
        let output = Command::new(&script)
            .args(link.split_whitespace())
            .arg("--")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env("TWO_HOSTS_LINK", env!("CARGO_BIN_EXE_link"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(NO_HOSTS) {
            eprintln!("skipped: {said}");
            return;
        }
        assert!(output.status.success(), "over {link}: {said}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{test} is no test's name");
        eprintln!("over {link}: {said}");
    }
}

/// A node on each host.
fn nodes(congestion: Congestion) -> [Node; 2] {
    [0, 1].map(|node| {
        let ip = std::env::var(["TWO_HOSTS_IP", "TWO_HOSTS_PEER_IP"][node]).unwrap();
        let addr = SocketAddr::new(ip.parse::<IpAddr>().unwrap(), 0);
        // A socket belongs to the host of the thread that made it, and threads to that of the one that started them.
        let start = move || {
            if node == 1 {
                let peer = std::env::var("TWO_HOSTS_PEER").unwrap();
                let namespace = File::open(FilePath::new("/run/netns").join(peer)).unwrap();
                rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
            }
            let tuning = Tuning { congestion, ..Tuning::default() };
            let config = NetConfig { paths: vec![Path::Quic], tuning, ..NetConfig::default() };
            Node::start(node, addr, REGION, config)
        };
        std::thread::spawn(start).join().unwrap()
    })
}

fn connect(nodes: &mut [Node; 2]) {
    let addr = nodes[1].transport.local_addr();
    nodes[0].transport.connect(id(1), addr);
    for (node, other) in [(0, 1), (1, 0)] {
        wait(nodes, node, |e| *e == Event::Connected { peer: id(other) });
    }
}

/// Polls until an event of a node matches; all of its events stay.
#[track_caller]
fn wait(nodes: &mut [Node; 2], node: usize, matches: impl Fn(&Event) -> bool) {
    let begun = Instant::now();
    while !nodes[node].events.iter().any(&matches) {
        poll(nodes);
        assert!(begun.elapsed() < PATIENCE, "node {node} reported only {:?}", nodes[node].events);
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn poll(nodes: &mut [Node; 2]) {
    nodes.iter_mut().for_each(Node::poll);
}

fn byte(round: usize, at: usize) -> u8 {
    ((at as u64 + round as u64 * 7919).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

#[allow(clippy::mut_from_ref)]
fn bytes(region: &HostRegion) -> &mut [u8] {
    // SAFETY: nothing is under way when a test fills or reads.
    unsafe { std::slice::from_raw_parts_mut(region.base(), region.len()) }
}

/// Fills the memory of a node with the bytes of a round, and that of the other with others, and submits writes of many
/// sizes that copy all of it there. Returns the window and how many writes they are.
fn submit_all(nodes: &mut [Node; 2], from: usize, round: usize) -> (Window, u64) {
    for node in [0, 1] {
        let round = if node == from { round } else { round + 1000 };
        bytes(&nodes[node].memory).iter_mut().enumerate().for_each(|(at, to)| *to = byte(round, at));
    }
    let to = 1 - from;
    let region = nodes[to].region;
    let window = nodes[to].transport.open_window(id(from), region, 0..REGION).unwrap();
    let (mut at, mut writes) = (0, 0);
    while at < REGION {
        let len = (1 + at % 7 * 50_000 + usize::from(byte(round, at)) * 100).min(REGION - at);
        let source = nodes[from].memory.extent(at..at + len).unwrap();
        let write = Write { ticket: writes, source, window, offset: at as u64, immediate: writes as u32 };
        nodes[from].transport.submit(id(to), write).unwrap();
        at += len;
        writes += 1;
    }
    (window, writes)
}

/// Everything is copied from one node to the other, and every byte is right.
fn transfer(nodes: &mut [Node; 2], from: usize, round: usize) {
    let to = 1 - from;
    nodes.iter_mut().for_each(|node| node.events.clear());
    let (window, writes) = submit_all(nodes, from, round);
    for ticket in 0..writes {
        wait(nodes, from, |e| *e == Event::Sent { peer: id(to), ticket });
        wait(nodes, to, |e| matches!(e, Event::Landed { immediate, .. } if u64::from(*immediate) == ticket));
    }
    nodes[to].transport.close_window(window);
    assert_eq!(nodes[from].events.len() as u64, writes, "each is reported once");
    assert_eq!(nodes[to].events.len() as u64, writes, "each lands once");
    let wrong = bytes(&nodes[to].memory).iter().enumerate().find(|(at, b)| **b != byte(round, *at));
    assert_eq!(wrong, None, "round {round}, from {from}");
}

#[test]
fn every_byte_is_right_whatever_is_lost_and_late() {
    let links = [
        "--delay 20ms --loss 0.1% --reorder 1%",
        "--delay 20ms --loss 1% --reorder 1%",
        "--delay 20ms --loss 5% --reorder 1%",
    ];
    over(&links, "every_byte_is_right_whatever_is_lost_and_late", || {
        let mut nodes = nodes(Tuning::default().congestion);
        connect(&mut nodes);
        for round in 0..2 {
            for from in [0, 1] {
                transfer(&mut nodes, from, round);
            }
        }
        let [a, b] = nodes.map(|node| node.transport.metrics().packets_lost);
        assert!(a > 0 && b > 0, "the link did not do its worst: {a} and {b} packets were lost");
        eprintln!("{a} and {b} packets lost");
    });
}

#[test]
fn cubic_gets_every_byte_right_too() {
    over(&["--delay 2ms --loss 1% --reorder 1%"], "cubic_gets_every_byte_right_too", || {
        let mut nodes = nodes(Congestion::Cubic);
        connect(&mut nodes);
        transfer(&mut nodes, 0, 0);
    });
}

/// Changes what either host sends.
fn tc(change: &[&str]) {
    for host in ["TWO_HOSTS_PEER", "TWO_HOSTS_SELF"] {
        let namespace = std::env::var(host).unwrap();
        let done = Command::new("tc").args(["-n", &namespace, "qdisc"]).args(change).status().unwrap();
        assert!(done.success());
    }
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_cut_link_is_noticed_and_mended() {
    over(&["--delay 5ms --loss 0.1% --rate 200mbit"], "a_cut_link_is_noticed_and_mended", || {
        let mut nodes = nodes(Tuning::default().congestion);
        let before = open_files();
        for round in 0..2 {
            nodes.iter_mut().for_each(|node| node.events.clear());
            connect(&mut nodes);
            nodes.iter_mut().for_each(|node| node.events.clear());
            let (_, writes) = submit_all(&mut nodes, 0, round);
            let half = |e: &Event| matches!(e, Event::Landed { immediate, .. } if u64::from(*immediate) > writes / 2);
            wait(&mut nodes, 1, half);
            tc(&["add", "dev", "link0", "root", "blackhole"]);
            let cut = Instant::now();
            for (node, other) in [(0, 1), (1, 0)] {
                wait(&mut nodes, node, |e| matches!(e, Event::Severed { peer, .. } if *peer == id(other)));
            }
            let noticed = cut.elapsed();
            assert!(noticed < Duration::from_secs(1), "noticed after {noticed:?}");
            eprintln!("noticed after {noticed:?}");
            // Every write is reported, and what landed is right.
            let reported = |ticket| {
                move |e: &&Event| match e {
                    Event::Sent { ticket: t, .. }
                    | Event::Failed { ticket: t, reason: FailReason::Severed, .. } => *t == ticket,
                    _ => false,
                }
            };
            for ticket in 0..writes {
                assert_eq!(nodes[0].events.iter().filter(reported(ticket)).count(), 1, "write {ticket}");
            }
            let failed = nodes[0].events.iter().filter(|e| matches!(e, Event::Failed { .. })).count();
            assert!(failed > 0, "the link was cut when all had been written");
            std::thread::sleep(Duration::from_secs(2).saturating_sub(cut.elapsed()));
            tc(&["delete", "dev", "link0", "root"]);
            assert_eq!(open_files(), before, "what the connections held");
        }
        nodes.iter_mut().for_each(|node| node.events.clear());
        connect(&mut nodes);
        transfer(&mut nodes, 0, 7);
        let memory: [Weak<HostRegion>; 2] = [0, 1].map(|node| Arc::downgrade(&nodes[node].memory));
        drop(nodes);
        assert!(memory.iter().all(|memory| memory.strong_count() == 0), "memory is still held");
    });
}
