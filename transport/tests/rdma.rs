//! Two nodes on the two devices of a virtual machine (`scripts/check rdma`): the path that they choose, and what
//! becomes of writes when it fails.
#![cfg(target_os = "linux")]

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_transport::{Event, Identity, NetConfig, NetTransport, Path, Transport, Tuning, Write};

const WRITER: NodeId = NodeId(1);
const READER: NodeId = NodeId(2);
const PATIENCE: Duration = Duration::from_secs(20);

/// A node on each device of the virtual machine. None, said loudly, where there is none.
fn nodes() -> Option<[NetTransport; 2]> {
    let devices = ["RDMA_VM_DEV0", "RDMA_VM_DEV1"].map(std::env::var);
    let [Ok(first), Ok(second)] = devices else {
        println!("skipped: no RDMA device of a virtual machine (scripts/rdma-vm --hosts 2)");
        return None;
    };
    let dir = std::env::temp_dir().join(format!("tandem-rdma-{}", std::process::id()));
    let identity = Identity::load_or_create(&dir).unwrap();
    Some([(WRITER, first), (READER, second)].map(|(id, device)| {
        let config = NetConfig {
            paths: vec![Path::Rdma, Path::Quic],
            rdma_devices: vec![device],
            // Soft-RoCE keeps the machine's cores busy while its link is down, and the session must outlive that.
            tuning: Tuning { dead_after: Duration::from_secs(10), ..Tuning::default() },
            repair: Duration::from_millis(200)..=Duration::from_millis(500),
            ..NetConfig::default()
        };
        NetTransport::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), &identity, id, config).unwrap()
    }))
}

/// Polls both until `done` says so.
fn poll(
    nodes: &mut [NetTransport; 2],
    what: &str,
    mut done: impl FnMut(&[Vec<Event>; 2]) -> bool,
) -> [Vec<Event>; 2] {
    let (began, mut seen) = (Instant::now(), [Vec::new(), Vec::new()]);
    while !done(&seen) {
        assert!(began.elapsed() < PATIENCE, "{what} did not come: {seen:?}");
        for (node, seen) in nodes.iter_mut().zip(&mut seen) {
            node.poll(seen);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    seen
}

fn fill(memory: &HostRegion, seed: u8) {
    // SAFETY: nothing is under way in this memory.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.base(), memory.len()) };
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 253) as u8 ^ seed);
}

fn set_link(state: &str) {
    assert!(Command::new("ip").args(["link", "set", "eth1", state]).status().unwrap().success());
}

/// Writes everything once, under way while `meanwhile` runs; each write lands once, with its bytes.
fn transfer(nodes: &mut [NetTransport; 2], seed: u8, meanwhile: impl FnOnce()) {
    const LEN: usize = 1 << 20;
    const WRITES: usize = 8;
    let [source, target] = [0; 2].map(|_| HostRegion::map(LEN * WRITES).unwrap());
    fill(&source, seed);
    let region = nodes[1].register(target.clone()).unwrap();
    let windows: Vec<_> = (0..WRITES)
        .map(|write| nodes[1].open_window(WRITER, region, write * LEN..(write + 1) * LEN).unwrap())
        .collect();
    for (write, window) in windows.iter().enumerate() {
        let source = source.extent(write * LEN..(write + 1) * LEN).unwrap();
        let (ticket, immediate) = (write as u64, write as u32);
        nodes[0].submit(READER, Write { ticket, source, window: *window, offset: 0, immediate }).unwrap();
    }
    meanwhile();
    let seen = poll(nodes, "all writes", |seen| seen.iter().all(|seen| seen.len() >= WRITES));
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

/// Comes before the other test by its name, and leaves the link up.
#[test]
fn a_link_that_comes_back_is_taken_again() {
    let Some(mut nodes) = nodes() else { return };
    let address = nodes[1].local_addr();
    nodes[0].connect(READER, address);
    poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
    let paths = |nodes: &[NetTransport; 2]| [nodes[0].path(READER), nodes[1].path(WRITER)];
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
        transfer(&mut nodes, 2 * cycle, || {});
        assert_eq!(by_rdma(&nodes), before + 8, "cycle {cycle}");
        transfer(&mut nodes, 2 * cycle + 1, || set_link("down"));
        wait(&nodes, Path::Quic);
        set_link("up");
    }
    wait(&nodes, Path::Rdma);
}

#[test]
fn a_link_that_is_cut_costs_no_write() {
    const LEN: usize = 1 << 20;
    const WRITES: usize = 24;
    let Some(mut nodes) = nodes() else { return };
    let [source, target] = [0; 2].map(|_| HostRegion::map(LEN * WRITES).unwrap());
    fill(&source, 77);
    fill(&target, 0);
    let region = nodes[1].register(target.clone()).unwrap();
    let address = nodes[1].local_addr();
    nodes[0].connect(READER, address);
    poll(&mut nodes, "Connected", |seen| seen.iter().all(|seen| !seen.is_empty()));
    assert_eq!([nodes[0].path(READER), nodes[1].path(WRITER)], [Some(Path::Rdma); 2]);
    for write in 0..WRITES {
        let window = nodes[1].open_window(WRITER, region, write * LEN..(write + 1) * LEN).unwrap();
        let source = source.extent(write * LEN..(write + 1) * LEN).unwrap();
        let write = Write { ticket: write as u64, source, window, offset: 0, immediate: write as u32 };
        nodes[0].submit(READER, write).unwrap();
    }
    let first = poll(&mut nodes, "the first landing", |seen| !seen[1].is_empty());
    set_link("down");
    let cut = Instant::now();
    let over_rdma = nodes[1].metrics().paths[Path::Rdma as usize].writes_landed;
    let left = [0, 1].map(|node: usize| WRITES - first[node].len());
    let rest = poll(&mut nodes, "the rest", |seen| seen[0].len() >= left[0] && seen[1].len() >= left[1]);
    println!("{over_rdma} of {WRITES} writes landed over RDMA; all had, {:?} after the cut", cut.elapsed());
    assert_eq!(nodes[0].path(READER), Some(Path::Quic));
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
