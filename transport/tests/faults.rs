//! The QUIC backend over a network that loses, doubles and reorders packets, and goes dark.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tandem_transport::{
    Event, FailReason, Identity, NetConfig, NetTransport, Path, RegionId, SeverReason, Transport, Tuning,
    Write,
};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Stands between two nodes and mistreats their packets.
#[derive(Clone)]
struct Relay {
    addr: SocketAddr,
    dark: Arc<AtomicBool>,
    /// Of a thousand packets, in each direction.
    lost: Arc<AtomicU64>,
    /// Bytes a second in each direction, if not 0. What waits fills a socket's buffer, which then drops.
    rate: Arc<AtomicU64>,
    seed: Arc<AtomicU64>,
}

impl Relay {
    fn start(target: SocketAddr) -> Relay {
        let front = Arc::new(UdpSocket::bind(LOOPBACK).unwrap());
        let relay = Relay {
            addr: front.local_addr().unwrap(),
            dark: Arc::default(),
            lost: Arc::default(),
            rate: Arc::default(),
            seed: Arc::new(AtomicU64::new(1)),
        };
        let handle = relay.clone();
        // Both kinds of thread end with the test's process.
        thread::spawn(move || {
            let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let (mut packet, mut late) = (vec![0; 65_536], None);
            while let Ok((len, from)) = front.recv_from(&mut packet) {
                let back = backs.entry(from).or_insert_with(|| {
                    let back = Arc::new(UdpSocket::bind(LOOPBACK).unwrap());
                    back.connect(target).unwrap();
                    let (front, back_reader, relay) = (Arc::clone(&front), Arc::clone(&back), handle.clone());
                    thread::spawn(move || {
                        let (mut packet, mut late) = (vec![0; 65_536], None);
                        loop {
                            // While the target is gone the kernel says so; the network is just dark then.
                            let Ok(len) = back_reader.recv(&mut packet) else {
                                continue;
                            };
                            relay.pass(&packet[..len], &mut late, |packet| drop(front.send_to(packet, from)));
                        }
                    });
                    back
                });
                let back = Arc::clone(back);
                handle.pass(&packet[..len], &mut late, |packet| drop(back.send(packet)));
            }
        });
        relay
    }

    fn pass(&self, packet: &[u8], late: &mut Option<Vec<u8>>, send: impl Fn(&[u8])) {
        let draw = self.seed.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let lost = self.lost.load(Ordering::Relaxed);
        if self.dark.load(Ordering::Relaxed) || draw % 1000 < lost {
            return;
        }
        if let Some(us) = (packet.len() as u64 * 1_000_000).checked_div(self.rate.load(Ordering::Relaxed)) {
            thread::sleep(Duration::from_micros(us));
        }
        if lost > 0 && draw.is_multiple_of(7) && late.is_none() {
            *late = Some(packet.to_vec());
            return;
        }
        send(packet);
        if lost > 0 && draw.is_multiple_of(11) {
            send(packet);
        }
        if let Some(late) = late.take() {
            send(&late);
        }
    }
}

struct Node {
    transport: NetTransport,
    region: (RegionId, Arc<HostRegion>),
    events: Vec<Event>,
}

const REGION: usize = 8 << 20;

fn nodes<const N: usize>(name: &str) -> [Node; N] {
    let dir = std::env::temp_dir().join(format!("tandem-faults-{name}-{}", std::process::id()));
    let identity = Identity::load_or_create(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    std::array::from_fn(|i| {
        // Packets as between hosts.
        let tuning = Tuning { loopback_mtu: 1452, ..Tuning::default() };
        let config = NetConfig { tuning, paths: vec![Path::Quic], event_limit: 100, ..NetConfig::default() };
        let mut transport = NetTransport::bind(LOOPBACK, &identity, NodeId(i as u64 + 1), config).unwrap();
        let region = HostRegion::map(REGION).unwrap();
        let id = transport.register(Arc::clone(&region)).unwrap();
        Node { transport, region: (id, region), events: Vec::new() }
    })
}

impl Node {
    fn poll(&mut self) {
        self.transport.poll(&mut self.events);
    }

    #[track_caller]
    fn expect(&mut self, within: Duration, matches: impl Fn(&Event) -> bool) -> Event {
        let begun = Instant::now();
        loop {
            self.poll();
            if let Some(at) = self.events.iter().position(&matches) {
                return self.events.remove(at);
            }
            assert!(begun.elapsed() < within, "only {:?} came", self.events);
            thread::sleep(Duration::from_micros(500));
        }
    }

    fn write(&mut self, peer: u64, ticket: u64, len: usize, window: tandem_transport::Window) {
        let source = self.region.1.extent(0..len).unwrap();
        let write = Write { ticket, source, window, offset: 0, immediate: ticket as u32 };
        self.transport.submit(NodeId(peer), write).unwrap();
    }
}

fn connect(from: &mut Node, to: &mut Node, ids: (u64, u64), addr: SocketAddr) {
    let patience = Duration::from_secs(5);
    from.transport.connect(NodeId(ids.1), addr);
    from.expect(patience, |e| *e == Event::Connected { peer: NodeId(ids.1) });
    to.expect(patience, |e| *e == Event::Connected { peer: NodeId(ids.0) });
}

#[test]
fn everything_lands_over_a_lossy_network() {
    let [mut a, mut b] = nodes("loss");
    let relay = Relay::start(b.transport.local_addr());
    relay.lost.store(20, Ordering::Relaxed);
    connect(&mut a, &mut b, (1, 2), relay.addr);
    for round in 0..3u8 {
        for ids in [(1, 2), (2, 1)] {
            let (from, to) = if ids.0 == 1 { (&mut a, &mut b) } else { (&mut b, &mut a) };
            let len = 1_000_000 + 77 * usize::from(round);
            let half = REGION / 2;
            let source = from.region.1.extent(0..half).unwrap();
            // SAFETY: no write of this range is under way.
            unsafe { source.bytes_mut() }.iter_mut().enumerate().for_each(|(i, byte)| {
                *byte = (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ round
            });
            let window = to.transport.open_window(NodeId(ids.0), to.region.0, half..half + len).unwrap();
            from.write(ids.1, 7, len, window);
            let landed = to.expect(Duration::from_secs(20), |e| matches!(e, Event::Landed { .. }));
            assert_eq!(landed, Event::Landed { peer: NodeId(ids.0), immediate: 7, len: len as u64 });
            let landing = to.region.1.extent(half..half + len).unwrap();
            // SAFETY: it has landed, and the window's one write is over.
            assert!(unsafe { landing.bytes() == &source.bytes()[..len] }, "round {round}");
            from.expect(Duration::from_secs(5), |e| matches!(e, Event::Sent { ticket: 7, .. }));
            to.transport.close_window(window);
        }
    }
    assert!(a.transport.metrics().packets_lost > 0, "the relay did its worst");
}

#[test]
fn a_dark_network_is_noticed_and_mended() {
    let [mut a, mut b] = nodes("dark");
    let relay = Relay::start(b.transport.local_addr());
    for round in 0..2 {
        connect(&mut a, &mut b, (1, 2), relay.addr);
        let window = b.transport.open_window(NodeId(1), b.region.0, 0..REGION).unwrap();
        a.write(2, round, REGION, window);
        relay.dark.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        for (node, peer) in [(&mut a, 2), (&mut b, 1)] {
            let event = node.expect(Duration::from_secs(3), |e| matches!(e, Event::Severed { .. }));
            let lost = |reason: &SeverReason| matches!(reason, SeverReason::Lost(_));
            assert!(
                matches!(&event, Event::Severed { peer: p, reason } if p.0 == peer && lost(reason)),
                "{event:?}"
            );
        }
        assert!(begun.elapsed() < Duration::from_millis(1100), "noticed after {:?}", begun.elapsed());
        let failed = Event::Failed { peer: NodeId(2), ticket: round, reason: FailReason::Severed };
        assert_eq!(a.events, [failed]);
        a.events.clear();
        relay.dark.store(false, Ordering::Relaxed);
    }
}

#[test]
fn a_stuck_peer_holds_up_nobody_else() {
    let [mut a, mut b, mut c] = nodes("stuck");
    let relay = Relay::start(b.transport.local_addr());
    connect(&mut a, &mut b, (1, 2), relay.addr);
    let direct = c.transport.local_addr();
    connect(&mut a, &mut c, (1, 3), direct);
    let stuck = b.transport.open_window(NodeId(1), b.region.0, 0..REGION).unwrap();
    let free = c.transport.open_window(NodeId(1), c.region.0, 0..REGION).unwrap();
    relay.dark.store(true, Ordering::Relaxed);
    for ticket in 0..8 {
        a.write(2, 100 + ticket, REGION, stuck);
    }
    let begun = Instant::now();
    for ticket in 0..8 {
        a.write(3, ticket, 1 << 20, free);
        a.expect(Duration::from_secs(2), |e| matches!(e, Event::Sent { ticket: t, .. } if *t == ticket));
    }
    assert!(begun.elapsed() < Duration::from_millis(800), "took {:?}", begun.elapsed());
    assert!(a.events.is_empty(), "nothing has happened to the stuck peer yet: {:?}", a.events);
}

/// Bytes a second that land at a peer whose window is open, in the best of some stretches of time: other work on this
/// machine takes from some of them, and a peer that is stalled has no good one.
fn throughput(from: &mut Node, to: &mut Node, peer: u64, window: tandem_transport::Window) -> f64 {
    const STRETCH: Duration = Duration::from_millis(60);
    let mut under_way = 0;
    let rates: Vec<f64> = (0..11)
        .map(|_| {
            let (begun, mut landed) = (Instant::now(), 0);
            while begun.elapsed() < STRETCH {
                while under_way < 8 {
                    from.write(peer, 1, 1 << 20, window);
                    under_way += 1;
                }
                from.poll();
                to.poll();
                to.events.clear();
                let sent = |e: &Event| matches!(e, Event::Sent { peer: p, .. } if p.0 == peer);
                let before = from.events.len();
                from.events.retain(|e| !sent(e));
                under_way -= before - from.events.len();
                landed += before - from.events.len();
                thread::sleep(Duration::from_micros(200));
            }
            (landed << 20) as f64 / begun.elapsed().as_secs_f64()
        })
        .collect();
    while under_way > 0 {
        from.expect(Duration::from_secs(5), |e| matches!(e, Event::Sent { peer: p, .. } if p.0 == peer));
        under_way -= 1;
    }
    rates.into_iter().fold(0.0, f64::max)
}

/// `hold` is given the peer that is to be held up, and how it is reached.
fn does_not_slow_another(name: &str, write_bytes: usize, writes: u64, hold: impl Fn(&Relay)) {
    let [mut a, mut b, mut c] = nodes(name);
    let relay = Relay::start(b.transport.local_addr());
    connect(&mut a, &mut b, (1, 2), relay.addr);
    let direct = c.transport.local_addr();
    connect(&mut a, &mut c, (1, 3), direct);
    let held = b.transport.open_window(NodeId(1), b.region.0, 0..REGION).unwrap();
    let free = c.transport.open_window(NodeId(1), c.region.0, 0..REGION).unwrap();
    throughput(&mut a, &mut c, 3, free);
    let alone = throughput(&mut a, &mut c, 3, free);
    hold(&relay);
    for ticket in 0..writes {
        a.write(2, 100 + ticket, write_bytes, held);
    }
    let beside = throughput(&mut a, &mut c, 3, free);
    let unreported = a.events.iter().filter(|e| matches!(e, Event::Sent { peer, .. } if peer.0 == 2)).count();
    assert!((unreported as u64) < writes, "nothing was held up");
    assert!(!a.events.iter().any(|e| matches!(e, Event::Severed { .. })), "{:?}", a.events);
    eprintln!("{name}: {:.0} MB/s alone, {:.0} MB/s beside", alone / 1e6, beside / 1e6);
    assert!(beside > 0.5 * alone, "{:.0} MB/s alone, {:.0} MB/s beside", alone / 1e6, beside / 1e6);
}

#[test]
fn a_peer_on_a_slow_link_does_not_slow_another() {
    does_not_slow_another("slow", REGION, 8, |relay| relay.rate.store(125_000, Ordering::Relaxed));
}

/// It takes no event for as long as this lasts, so that its transport soon takes no write.
#[test]
fn a_peer_that_stops_reading_does_not_slow_another() {
    does_not_slow_another("stopped", 64 << 10, 250, |_| {});
}

#[test]
fn a_node_that_does_not_poll_is_not_flooded() {
    let dir = std::env::temp_dir().join(format!("tandem-faults-flood-{}", std::process::id()));
    let identity = Identity::load_or_create(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let bind = |node, event_limit| {
        let config =
            NetConfig { event_limit, write_limit: 10_000, paths: vec![Path::Quic], ..NetConfig::default() };
        NetTransport::bind(LOOPBACK, &identity, NodeId(node), config).unwrap()
    };
    let (mut a, mut b) = (bind(1, 1 << 20), bind(2, 100));
    let region = HostRegion::map(4096).unwrap();
    let id = b.register(Arc::clone(&region)).unwrap();
    a.connect(NodeId(2), b.local_addr());
    let mut events = Vec::new();
    let begun = Instant::now();
    while !events.contains(&Event::Connected { peer: NodeId(2) }) {
        a.poll(&mut events);
        assert!(begun.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(1));
    }
    let window = b.open_window(NodeId(1), id, 0..4096).unwrap();
    let source = region.extent(0..0).unwrap();
    for ticket in 0..5000 {
        let write = Write { ticket, source: source.clone(), window, offset: 0, immediate: ticket as u32 };
        a.submit(NodeId(2), write).unwrap();
    }
    thread::sleep(Duration::from_millis(500));
    let mut landed = Vec::new();
    b.poll(&mut landed);
    assert!(landed.len() < 400, "{} events were queued", landed.len());
    // What was held back comes as room is made.
    let begun = Instant::now();
    while landed.len() < 5001 {
        b.poll(&mut landed);
        assert!(begun.elapsed() < Duration::from_secs(10), "only {} events came", landed.len());
        thread::sleep(Duration::from_millis(1));
    }
}
