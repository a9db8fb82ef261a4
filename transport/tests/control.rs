//! The control channel between real sockets on loopback, and the identities that it runs under.

mod members;

use members::{id, member};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tandem_proto::ids::NodeId;
use tandem_transport::Identity;
use tandem_transport::control::{
    ConnectError, Control, ControlEvent, ControlEvents, Lane, Limits, SendError,
};
use tokio::runtime::Runtime;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A directory that is removed at the end of a test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("tandem-control-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        Scratch(dir)
    }

    fn identity(&self) -> Identity {
        Identity::load_or_create(&self.0).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process of its own, as far as the network can tell.
struct Process {
    runtime: Option<Runtime>,
    control: Control,
    events: ControlEvents,
}

impl Process {
    fn start(identity: &Identity, limits: Limits) -> Process {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (control, events) = {
            let _inside = runtime.enter();
            Control::bind(LOOPBACK, identity, limits).unwrap()
        };
        Process { runtime: Some(runtime), control, events }
    }

    fn connect(&self, to: &Process) -> Result<NodeId, ConnectError> {
        self.run(self.control.connect(to.control.local_addr()))
    }

    fn run<F: Future>(&self, future: F) -> F::Output {
        self.runtime.as_ref().unwrap().block_on(future)
    }

    #[track_caller]
    fn next(&mut self) -> ControlEvent {
        let events = &mut self.events;
        let next = async { tokio::time::timeout(Duration::from_secs(10), events.recv()).await };
        self.runtime
            .as_ref()
            .unwrap()
            .block_on(next)
            .expect("an event comes in time")
            .expect("the channel is open")
    }

    #[track_caller]
    fn expect_up(&mut self, peer: usize) {
        let event = self.next();
        assert!(matches!(event, ControlEvent::Up { peer: p, .. } if p == id(peer)), "{event:?}");
    }

    #[track_caller]
    fn expect_down(&mut self, peer: usize) -> String {
        match self.next() {
            ControlEvent::Down { peer: p, reason } if p == id(peer) => reason,
            event => panic!("{event:?}"),
        }
    }

    /// Stops without a word, as if killed.
    fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

fn pair(limits: Limits) -> (Process, Process) {
    let mut a = Process::start(member(1), limits.clone());
    let mut b = Process::start(member(2), limits);
    assert_eq!(a.connect(&b).unwrap(), id(2));
    a.expect_up(2);
    b.expect_up(1);
    (a, b)
}

#[test]
fn each_lane_keeps_its_order_and_neither_waits_for_the_other() {
    // More than the windows hold, and few events: nobody takes one before the urgent frames are sent, so however
    // late this thread is, most of the bulk still waits then.
    let (a, mut b) = pair(Limits { events: 2, ..Limits::default() });
    let bulk = 24u8;
    // Made before the first is sent, or a fast connection has half of them delivered while the rest are made.
    let frames: Vec<_> = (0..bulk).map(|i| vec![i; 1 << 20]).collect();
    for frame in frames {
        a.control.send(id(2), Lane::Main, frame).unwrap();
    }
    a.control.send(id(2), Lane::Urgent, vec![1]).unwrap();
    a.control.send(id(2), Lane::Urgent, vec![2]).unwrap();
    let (mut main, mut urgent, mut urgent_at) = (Vec::new(), Vec::new(), None);
    while main.len() < bulk.into() || urgent.len() < 2 {
        match b.next() {
            ControlEvent::Frame { lane: Lane::Main, bytes, .. } => {
                assert_eq!(bytes.len(), 1 << 20);
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                main.push(bytes[0]);
            }
            ControlEvent::Frame { lane: Lane::Urgent, bytes, .. } => {
                urgent_at.get_or_insert(main.len());
                urgent.push(bytes[0]);
            }
            event => panic!("{event:?}"),
        }
    }
    assert_eq!(main, (0..bulk).collect::<Vec<_>>());
    assert_eq!(urgent, [1, 2]);
    assert!(urgent_at.unwrap() < 12, "the urgent lane waited for {urgent_at:?} bulk frames");
    let metrics = a.control.metrics();
    assert_eq!((metrics.frames_sent, metrics.bytes_sent), (26, (24 << 20) + 2));
}

#[test]
fn a_killed_peer_is_down_in_time() {
    for idle_first in [false, true] {
        let (mut a, mut b) = pair(Limits::default());
        if idle_first {
            std::thread::sleep(Duration::from_millis(1200));
        } else {
            b.control.send(id(1), Lane::Main, vec![1]).unwrap();
            a.next();
            a.control.send(id(2), Lane::Main, vec![1]).unwrap();
        }
        b.kill();
        let begun = Instant::now();
        a.expect_down(2);
        let took = begun.elapsed();
        assert!(took < Duration::from_millis(1000), "noticed after {took:?}");
        assert_eq!(a.control.send(id(2), Lane::Main, vec![1]), Err(SendError::NotConnected { peer: id(2) }));
    }
}

#[test]
fn frames_and_queues_are_bounded() {
    let limits = Limits { frame_bytes: 1000, queued_frames: 8, events: 4, ..Limits::default() };
    let (a, mut b) = pair(limits);
    let oversize = a.control.send(id(2), Lane::Main, vec![0; 1001]);
    assert_eq!(oversize, Err(SendError::Oversize { len: 1001, limit: 1000 }));
    assert_eq!(a.control.send(id(7), Lane::Main, vec![]), Err(SendError::NotConnected { peer: id(7) }));
    // Nobody takes b's events: the windows fill, then the queue.
    let mut sent = 0u32;
    let mut refused_since = None;
    let error = loop {
        let mut frame = vec![0; 1000];
        frame[..4].copy_from_slice(&sent.to_le_bytes());
        match a.control.send(id(2), Lane::Main, frame) {
            Ok(()) => {
                sent += 1;
                refused_since = None;
            }
            // Full for good, not just faster than the writer.
            Err(error)
                if refused_since.is_some_and(|at: Instant| at.elapsed() > Duration::from_millis(300)) =>
            {
                break error;
            }
            Err(_) => {
                refused_since.get_or_insert_with(Instant::now);
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        assert!(sent < 100_000, "the queue is endless");
    };
    assert_eq!(error, SendError::Backlogged { peer: id(2), limit: 8 });
    assert!(a.control.metrics().backlogged > 0);
    for expected in 0..sent {
        match b.next() {
            ControlEvent::Frame { bytes, .. } => assert_eq!(bytes[..4], expected.to_le_bytes()),
            event => panic!("{event:?}"),
        }
    }
}

/// Frames that nobody takes in are bounded by their bytes too, whoever sends them, and by one for a lane beyond that.
#[test]
fn frames_that_wait_are_bounded_by_their_bytes() {
    // The second holds no frame whole.
    for (event_bytes, taken) in [(10_000, 10), (500, 1)] {
        let limits = Limits { event_bytes, ..Limits::default() };
        let mut a = Process::start(member(1), limits);
        let writers = [2, 3].map(|number| Process::start(member(number), Limits::default()));
        for writer in &writers {
            writer.connect(&a).unwrap();
            assert!(matches!(a.next(), ControlEvent::Up { .. }));
        }
        for writer in &writers {
            for i in 0..100 {
                writer.control.send(id(1), Lane::Main, vec![i; 1000]).unwrap();
            }
        }
        let (mut received, mut since) = (0, Instant::now());
        while since.elapsed() < Duration::from_millis(300) || received < taken {
            let now = a.control.metrics().frames_received;
            if now != received {
                (received, since) = (now, Instant::now());
            }
            assert!(since.elapsed() < Duration::from_secs(10), "only {received} came in");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(received <= taken + 2, "{received} frames wait where {event_bytes} bytes may");
        let mut came = [Vec::new(), Vec::new()];
        while came.iter().any(|came| came.len() < 100) {
            match a.next() {
                ControlEvent::Frame { peer, bytes, .. } => came[usize::from(peer == id(3))].push(bytes),
                event => panic!("{event:?}"),
            }
        }
        for came in came {
            assert_eq!(came, (0..100).map(|i| vec![i; 1000]).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_peer_that_breaks_the_rules_is_closed_alone() {
    let strict = Limits { frame_bytes: 100, ..Limits::default() };
    let mut a = Process::start(member(1), strict);
    let mut b = Process::start(member(2), Limits::default());
    let mut c = Process::start(member(3), Limits::default());
    for peer in [&mut b, &mut c] {
        peer.connect(&a).unwrap();
        peer.expect_up(1);
        assert!(matches!(a.next(), ControlEvent::Up { .. }));
    }
    b.control.send(id(1), Lane::Main, vec![0; 101]).unwrap();
    a.expect_down(2);
    let reason = b.expect_down(1);
    assert!(reason.contains("longer than 100"), "{reason}");
    assert_eq!(a.control.metrics().rule_breaks, 1);
    c.control.send(id(1), Lane::Main, vec![7]).unwrap();
    assert_eq!(a.next(), ControlEvent::Frame { peer: id(3), lane: Lane::Main, bytes: vec![7] });
}

#[test]
fn strangers_are_refused() {
    let (ours, theirs) = (Scratch::new("ours"), Scratch::new("theirs"));
    let limits = Limits { handshake: Duration::from_secs(2), ..Limits::default() };
    let mut a = Process::start(&ours.identity(), limits.clone());
    let b = Process::start(&theirs.identity(), limits);
    for (from, to) in [(&a, &b), (&b, &a)] {
        let error = from.connect(to).unwrap_err().to_string();
        assert!(error.contains("certificate") || error.contains("UnknownIssuer"), "{error}");
    }
    assert!(a.events.try_recv().is_none());
    // Nor does a node connect to itself, or to nobody.
    assert!(matches!(a.connect(&a), Err(ConnectError::Itself { .. })));
    let nobody = std::net::UdpSocket::bind(LOOPBACK).unwrap();
    let error = a.run(a.control.connect(nobody.local_addr().unwrap())).unwrap_err();
    assert!(matches!(error, ConnectError::Deadline { .. } | ConnectError::Failed { .. }), "{error}");
}

#[test]
fn both_may_dial() {
    for round in 0..20 {
        let mut a = Process::start(member(1), Limits::default());
        let mut b = Process::start(member(2), Limits::default());
        let dials: Vec<_> = [(&a, &b), (&b, &a), (&a, &b)]
            .into_iter()
            .map(|(from, to)| {
                let (control, addr) = (from.control.clone(), to.control.local_addr());
                from.runtime.as_ref().unwrap().spawn(async move { control.connect(addr).await })
            })
            .collect();
        let found: Vec<_> = dials.into_iter().map(|dial| a.run(dial).unwrap().unwrap()).collect();
        assert_eq!(found, [2, 1, 2].map(id), "round {round}");
        a.expect_up(2);
        b.expect_up(1);
        a.control.send(id(2), Lane::Main, vec![round]).unwrap();
        let (lane, bytes) = (Lane::Main, vec![round]);
        let peer = id(1);
        assert_eq!(b.next(), ControlEvent::Frame { peer, lane, bytes });
        b.control.send(id(1), Lane::Main, vec![round]).unwrap();
        assert_eq!(a.next(), ControlEvent::Frame { peer: id(2), lane: Lane::Main, bytes: vec![round] });
    }
}

#[test]
fn closing_is_seen_by_both_and_can_be_mended() {
    let (mut a, mut b) = pair(Limits::default());
    for _ in 0..3 {
        a.control.close(id(2));
        a.expect_down(2);
        // It may dial before it knows that the old connection is gone.
        b.connect(&a).unwrap();
        a.expect_up(2);
        b.expect_down(1);
        b.expect_up(1);
    }
}

#[test]
fn shutdown_delivers_what_is_queued() {
    let (a, mut b) = pair(Limits::default());
    for i in 0..200u8 {
        a.control.send(id(2), Lane::Main, vec![i; 10_000]).unwrap();
    }
    a.run(a.control.shutdown());
    for i in 0..200u8 {
        assert_eq!(b.next(), ControlEvent::Frame { peer: id(1), lane: Lane::Main, bytes: vec![i; 10_000] });
    }
    b.expect_down(1);
}

#[test]
fn racing_processes_get_the_same_ca() {
    let scratch = Scratch::new("race");
    let dir: &Path = &scratch.0;
    let identities: Vec<Identity> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(move || Identity::load_or_create(dir).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(dir.join("ca.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let left: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["ca.pem"], "drafts are removed");
    let first = Process::start(&identities[0], Limits::default());
    for identity in &identities[1..] {
        let other = Process::start(identity, Limits::default());
        assert_eq!(other.connect(&first).unwrap(), identities[0].node());
    }
}
