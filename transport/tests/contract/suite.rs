//! What every backend must do, by the contract's points.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::ids::NodeId;
use tandem_transport::{Event, FailReason, RegionId, SeverReason, SubmitError, Transport, Window, Write};

/// How a test wants its cluster.
pub(crate) struct Setup {
    pub nodes: usize,
    pub write_limit: usize,
    pub seed: u64,
}

/// Transports of one backend that can reach one another, and their time.
pub(crate) trait Cluster {
    /// What this machine lacks for it.
    fn missing() -> Option<String> {
        None
    }
    fn start(setup: Setup) -> Self;
    /// Memory for a node.
    fn memory(_node: usize, len: usize) -> Arc<HostRegion> {
        HostRegion::map(len).unwrap()
    }
    fn id(&self, node: usize) -> NodeId;
    fn address(&self, node: usize) -> SocketAddr;
    fn node(&mut self, node: usize) -> &mut dyn Transport;
    /// The node is gone without a word.
    fn kill(&mut self, node: usize);
    /// Lets a little time pass.
    fn wait(&mut self);
}

/// Makes each test of the suite a test of a backend.
#[macro_export]
macro_rules! contract {
    ($backend:ident, $cluster:ty) => {
        mod $backend {
            $crate::contract!(@tests $cluster, connects_once, lands_whole_and_in_place, crosses_and_mixes,
                empty_writes_carry_their_immediate, refuses_what_is_not_open, closed_is_closed, bounds_the_queue,
                severs_in_flight, severs_what_is_not_connected, reconnects_without_old_windows, notices_the_dead,
                says_when_nobody_answers, sources_are_free_after_sent, both_may_connect);
        }
    };
    (@tests $cluster:ty, $($test:ident),*) => {
        $(#[test]
        fn $test() {
            if let Some(missing) = <$cluster as $crate::suite::Cluster>::missing() {
                return println!("skipped: {missing}");
            }
            $crate::suite::$test::<$cluster>();
        })*
    };
}

const PATIENCE: Duration = Duration::from_secs(20);

struct Bell(AtomicUsize);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A cluster, what its nodes reported, and memory for each.
struct Bench<C> {
    cluster: C,
    memory: Vec<(RegionId, Arc<HostRegion>)>,
    events: Vec<VecDeque<Event>>,
    bells: Vec<Arc<Bell>>,
    rng: u64,
}

const REGION: usize = 24 << 20;

impl<C: Cluster> Bench<C> {
    fn start(nodes: usize, write_limit: usize) -> Bench<C> {
        let mut cluster = C::start(Setup { nodes, write_limit, seed: 7 });
        let mut memory = Vec::new();
        let mut bells = Vec::new();
        for node in 0..nodes {
            let region = C::memory(node, REGION);
            memory.push((cluster.node(node).register(Arc::clone(&region)).unwrap(), region));
            let bell = Arc::new(Bell(AtomicUsize::new(0)));
            cluster.node(node).set_waker(Waker::from(Arc::clone(&bell)));
            bells.push(bell);
        }
        Bench { cluster, memory, events: vec![VecDeque::new(); nodes], bells, rng: 1 }
    }

    fn connected(nodes: usize, write_limit: usize) -> Bench<C> {
        let mut bench = Self::start(nodes, write_limit);
        for from in 0..nodes {
            for to in from + 1..nodes {
                bench.connect(from, to);
            }
        }
        bench
    }

    fn connect(&mut self, from: usize, to: usize) {
        let (peer, address) = (self.cluster.id(to), self.cluster.address(to));
        self.cluster.node(from).connect(peer, address);
        self.expect(from, |e| *e == Event::Connected { peer });
        let peer = self.cluster.id(from);
        self.expect(to, |e| *e == Event::Connected { peer });
    }

    fn random(&mut self, below: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.rng >> 33) % below
    }

    fn poll(&mut self, node: usize) {
        let mut events = Vec::new();
        self.cluster.node(node).poll(&mut events);
        // The call may be a moment late: somebody polled before being told to.
        let begun = Instant::now();
        while !events.is_empty() && self.bells[node].0.load(Ordering::SeqCst) == 0 {
            assert!(begun.elapsed() < PATIENCE, "the waker was never called, yet there was {events:?}");
            self.cluster.wait();
        }
        self.events[node].extend(events);
    }

    /// Polls a node until an event matches; the others stay for later.
    #[track_caller]
    fn expect(&mut self, node: usize, matches: impl Fn(&Event) -> bool) -> Event {
        let begun = Instant::now();
        loop {
            self.poll(node);
            if let Some(at) = self.events[node].iter().position(&matches) {
                return self.events[node].remove(at).unwrap();
            }
            assert!(begun.elapsed() < PATIENCE, "node {node} reported only {:?}", self.events[node]);
            self.cluster.wait();
        }
    }

    /// Lets the network do what it still has to do.
    fn settle(&mut self) {
        for _ in 0..300 {
            self.cluster.wait();
        }
    }

    fn open(&mut self, node: usize, peer: usize, range: Range<usize>) -> Window {
        let (peer, region) = (self.cluster.id(peer), self.memory[node].0);
        self.cluster.node(node).open_window(peer, region, range).unwrap()
    }

    fn extent(&self, node: usize, range: Range<usize>) -> Extent {
        self.memory[node].1.extent(range).unwrap()
    }

    /// Writes a node's own memory.
    fn fill(&self, node: usize, range: Range<usize>, salt: u64) {
        let extent = self.extent(node, range);
        // SAFETY: the test has no transfer touch the range at this time.
        for (i, byte) in unsafe { extent.bytes_mut() }.iter_mut().enumerate() {
            *byte = pattern(salt, i);
        }
        #[cfg(feature = "cuda")]
        if extent.on_device().is_some() {
            extent.deposit().unwrap();
            // The host's side counts for nothing.
            // SAFETY: as above.
            unsafe { extent.bytes_mut() }.fill(0xee);
        }
    }

    fn read(&self, node: usize, range: Range<usize>) -> Vec<u8> {
        let extent = self.extent(node, range);
        // SAFETY: as below.
        #[cfg(feature = "cuda")]
        unsafe { extent.fetch() }.unwrap();
        // SAFETY: the test reads what has landed, or what no open window covers.
        unsafe { extent.bytes() }.to_vec()
    }

    fn holds(&self, node: usize, range: Range<usize>, salt: u64) -> bool {
        self.read(node, range).iter().enumerate().all(|(i, byte)| *byte == pattern(salt, i))
    }

    fn submit(&mut self, from: usize, to: usize, write: Write) -> Result<(), SubmitError> {
        let peer = self.cluster.id(to);
        self.cluster.node(from).submit(peer, write)
    }

    fn failed(&mut self, node: usize, ticket: u64) -> FailReason {
        let event = self.expect(
            node,
            |e| matches!(e, Event::Failed { ticket: t, .. } | Event::Sent { ticket: t, .. } if *t == ticket),
        );
        match event {
            Event::Failed { reason, .. } => reason,
            other => panic!("expected a failure, got {other:?}"),
        }
    }

    fn sent(&mut self, node: usize, ticket: u64) {
        self.expect(node, |e| matches!(e, Event::Sent { ticket: t, .. } if *t == ticket));
    }

    fn landed(&mut self, node: usize, immediate: u32) -> u64 {
        match self.expect(node, |e| matches!(e, Event::Landed { immediate: i, .. } if *i == immediate)) {
            Event::Landed { len, .. } => len,
            _ => unreachable!(),
        }
    }
}

fn pattern(salt: u64, i: usize) -> u8 {
    ((i as u64).wrapping_add(salt.wrapping_mul(7919)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Point 1.
pub(crate) fn connects_once<C: Cluster>() {
    let mut bench = Bench::<C>::start(2, 16);
    let window = bench.open(1, 0, 0..100);
    let write = Write { ticket: 1, source: bench.extent(0, 0..100), window, offset: 0, immediate: 1 };
    let peer = bench.cluster.id(1);
    assert_eq!(bench.submit(0, 1, write.clone()), Err(SubmitError::NotConnected { peer }));
    bench.connect(0, 1);
    bench.submit(0, 1, write).unwrap();
    bench.sent(0, 1);
    let address = bench.cluster.address(1);
    bench.cluster.node(0).connect(peer, address);
    bench.settle();
    bench.poll(0);
    bench.poll(1);
    assert!(bench.events[0].is_empty(), "{:?}", bench.events[0]);
    assert_eq!(bench.events[1].len(), 1, "only the landing: {:?}", bench.events[1]);
}

/// Points 3, 5, 6: any extent, any size, any offset.
pub(crate) fn lands_whole_and_in_place<C: Cluster>() {
    let mut bench = Bench::<C>::connected(2, 16);
    let sizes = [1, 2, 3, 1199, 1200, 1201, 65_535, 65_536, 65_537, 1 << 20, 8 << 20];
    for (i, size) in sizes.into_iter().enumerate() {
        let i = i as u64;
        let from = bench.random((REGION - size) as u64) as usize;
        let room = bench.random(5000) as usize;
        let to = bench.random((REGION - size - room - 2) as u64) as usize + 1;
        bench.fill(0, from..from + size, i);
        // What lies around the landing must stay.
        bench.fill(1, to - 1..to + room + size + 1, 99);
        let around = bench.read(1, to - 1..to + room + size + 1);
        let window = bench.open(1, 0, to..to + room + size);
        let source = bench.extent(0, from..from + size);
        bench
            .submit(0, 1, Write { ticket: i, source, window, offset: room as u64, immediate: 70 + i as u32 })
            .unwrap();
        assert_eq!(bench.landed(1, 70 + i as u32), size as u64);
        assert!(bench.holds(1, to + room..to + room + size, i), "{size} bytes at {to}+{room}");
        assert_eq!(bench.read(1, to - 1..to + room), around[..room + 1]);
        assert_eq!(bench.read(1, to + room + size..to + room + size + 1), around[room + size + 1..]);
        bench.sent(0, i);
        bench.cluster.node(1).close_window(window);
    }
    assert!(bench.events.iter().all(VecDeque::is_empty), "{:?}", bench.events);
}

/// Points 4, 5, 6: three nodes write to one another at once.
pub(crate) fn crosses_and_mixes<C: Cluster>() {
    let mut bench = Bench::<C>::connected(3, 64);
    // Each node's memory: the first half are sources, the second half landings, by writer.
    let half = REGION / 2;
    let mut writes = BTreeMap::new();
    for from in 0..3usize {
        for to in (0..3usize).filter(|to| *to != from) {
            let area = half + from * (half / 3);
            let window = bench.open(to, from, area..area + half / 3);
            let (mut source, mut offset) = (to * (half / 3), 0);
            for n in 0..40u64 {
                let len = 1 + bench.random(if n % 8 == 0 { 400_000 } else { 30_000 }) as usize;
                let ticket = (from * 1000 + to * 100) as u64 + n;
                bench.fill(from, source..source + len, ticket);
                let extent = bench.extent(from, source..source + len);
                let write =
                    Write { ticket, source: extent, window, offset: offset as u64, immediate: ticket as u32 };
                bench.submit(from, to, write).unwrap();
                writes.insert(ticket, (from, to, area + offset, len));
                source += len;
                offset += len;
            }
        }
    }
    for (ticket, (from, to, at, len)) in writes {
        assert_eq!(bench.landed(to, ticket as u32), len as u64);
        assert!(bench.holds(to, at..at + len, ticket), "write {ticket}");
        bench.sent(from, ticket);
    }
    bench.settle();
    for node in 0..3 {
        bench.poll(node);
        assert!(bench.events[node].is_empty(), "reported twice: {:?}", bench.events[node]);
    }
}

/// Point 6, with nothing to land.
pub(crate) fn empty_writes_carry_their_immediate<C: Cluster>() {
    let mut bench = Bench::<C>::connected(2, 16);
    let window = bench.open(1, 0, 10..10);
    let write = Write { ticket: 5, source: bench.extent(0, 0..0), window, offset: 0, immediate: u32::MAX };
    bench.submit(0, 1, write).unwrap();
    assert_eq!(bench.landed(1, u32::MAX), 0);
    bench.sent(0, 5);
}

/// Point 7.
pub(crate) fn refuses_what_is_not_open<C: Cluster>() {
    let mut bench = Bench::<C>::connected(3, 16);
    bench.fill(0, 0..200_000, 1);
    let before = bench.read(1, 0..300_000);
    let window = bench.open(1, 0, 1000..101_000);
    let foreign = bench.open(1, 2, 200_000..300_000);
    let source = bench.extent(0, 0..100_000);
    let write =
        |ticket, window, offset| Write { ticket, source: source.clone(), window, offset, immediate: 1 };

    let too_far = SubmitError::OutOfWindow { offset: 1, len: 100_000, window: 100_000 };
    assert_eq!(bench.submit(0, 1, write(0, window, 1)), Err(too_far));
    assert!(bench.submit(0, 1, write(0, window, u64::MAX)).is_err());

    let forged = [
        Window { key: window.key ^ 1, ..window },
        Window { len: window.len + 1, ..window },
        Window { offset: 0, ..window },
        Window { region: window.region + 1, ..window },
        foreign,
    ];
    for (ticket, window) in forged.into_iter().enumerate() {
        bench.submit(0, 1, write(ticket as u64, window, 0)).unwrap();
        assert_eq!(bench.failed(0, ticket as u64), FailReason::Refused, "{window:?}");
    }
    bench.poll(1);
    assert!(bench.events[1].is_empty(), "{:?}", bench.events[1]);
    assert_eq!(bench.read(1, 0..300_000), before);
    // The connection lives on.
    bench.submit(0, 1, write(9, window, 0)).unwrap();
    bench.landed(1, 1);
    bench.sent(0, 9);
}

/// Point 8: also when bytes are on the way, and when they have landed but were not polled.
pub(crate) fn closed_is_closed<C: Cluster>() {
    let mut bench = Bench::<C>::connected(2, 16);
    const LEN: usize = 4 << 20;
    for round in 0..12 {
        bench.fill(0, 0..LEN, round);
        let window = bench.open(1, 0, 0..LEN);
        let source = bench.extent(0, 0..LEN);
        let write = Write { ticket: round, source, window, offset: 0, immediate: 3 };
        bench.submit(0, 1, write.clone()).unwrap();
        for _ in 0..round {
            bench.cluster.wait();
        }
        bench.cluster.node(1).close_window(window);
        bench.cluster.node(1).close_window(window);
        let at_closing = bench.read(1, 0..LEN);
        bench.expect(0, |e| {
            matches!(e, Event::Failed { ticket, reason: FailReason::Refused, .. } | Event::Sent { ticket, .. }
                if *ticket == round)
        });
        bench.submit(0, 1, Write { ticket: 100, ..write }).unwrap();
        assert_eq!(bench.failed(0, 100), FailReason::Refused);
        assert!(bench.read(1, 0..LEN) == at_closing, "bytes landed after the window was closed");
        bench.poll(1);
        assert!(bench.events[1].is_empty(), "reported after closing: {:?}", bench.events[1]);
    }
}

/// Point 10: also that one peer's full queue is nothing to another.
pub(crate) fn bounds_the_queue<C: Cluster>() {
    const LIMIT: usize = 8;
    let mut bench = Bench::<C>::connected(3, LIMIT);
    let window = bench.open(1, 0, 0..1 << 20);
    let write = Write { ticket: 0, source: bench.extent(0, 0..1 << 20), window, offset: 0, immediate: 0 };
    for ticket in 0..LIMIT as u64 {
        bench.submit(0, 1, Write { ticket, ..write.clone() }).unwrap();
    }
    // Some may have landed meanwhile, when this thread had no core: then there is room for as many.
    let (peer, mut taken) = (bench.cluster.id(1), LIMIT as u64);
    let refusal = loop {
        match bench.submit(0, 1, Write { ticket: taken, ..write.clone() }) {
            Ok(()) => taken += 1,
            Err(refusal) => break refusal,
        }
        assert!(taken < 100 * LIMIT as u64, "{taken} writes were taken, and the queue is never full");
    };
    assert_eq!(refusal, SubmitError::Full { peer, limit: LIMIT });
    let other = bench.open(2, 0, 0..100);
    let small =
        Write { ticket: 5000, source: bench.extent(0, 0..100), window: other, offset: 0, immediate: 0 };
    bench.submit(0, 2, small).unwrap();
    bench.sent(0, 5000);
    for ticket in 0..taken {
        bench.sent(0, ticket);
    }
    bench.submit(0, 1, write).unwrap();
    bench.sent(0, 0);
}

/// Points 5, 11: every ticket is reported before `Severed`, and nothing lands at the severed side after it.
pub(crate) fn severs_in_flight<C: Cluster>() {
    for by_writer in [true, false] {
        let mut bench = Bench::<C>::connected(2, 16);
        const LEN: usize = 1 << 20;
        let window = bench.open(1, 0, 0..8 * LEN);
        for ticket in 0..8 {
            let at = ticket as usize * LEN;
            bench.fill(0, at..at + LEN, ticket);
            let source = bench.extent(0, at..at + LEN);
            bench
                .submit(0, 1, Write { ticket, source, window, offset: at as u64, immediate: ticket as u32 })
                .unwrap();
        }
        bench.landed(1, 0);
        let (severing, severed) = if by_writer { (0, 1) } else { (1, 0) };
        let peer = bench.cluster.id(severed);
        bench.cluster.node(severing).sever(peer);
        bench.cluster.node(severing).sever(peer);
        let asked = Event::Severed { peer, reason: SeverReason::Asked };
        bench.expect(severing, |e| *e == asked);
        let other = bench.cluster.id(severing);
        bench.expect(
            severed,
            |e| matches!(e, Event::Severed { peer, reason: SeverReason::Lost(_) } if *peer == other),
        );
        let at_end = bench.read(1, 0..8 * LEN);
        let mut reports: Vec<u64> = bench.events[0]
            .iter()
            .filter_map(|e| match e {
                Event::Sent { ticket, .. } | Event::Failed { ticket, reason: FailReason::Severed, .. } => {
                    Some(*ticket)
                }
                _ => None,
            })
            .collect();
        reports.sort_unstable();
        assert_eq!(reports, (0..8).collect::<Vec<_>>(), "each ticket once, before the end");
        // What was reported as landed had landed.
        for event in &bench.events[1] {
            if let Event::Landed { immediate, .. } = event {
                let at = *immediate as usize * LEN;
                assert!(bench.holds(1, at..at + LEN, u64::from(*immediate)));
            }
        }
        bench.events.iter_mut().for_each(VecDeque::clear);
        bench.settle();
        bench.poll(0);
        bench.poll(1);
        assert!(bench.events.iter().all(VecDeque::is_empty), "after the end: {:?}", bench.events);
        assert!(bench.read(1, 0..8 * LEN) == at_end, "bytes landed after the end");
        let write = Write { ticket: 0, source: bench.extent(0, 0..1), window, offset: 0, immediate: 0 };
        assert!(matches!(bench.submit(0, 1, write), Err(SubmitError::NotConnected { .. })));
    }
}

/// Point 12.
pub(crate) fn severs_what_is_not_connected<C: Cluster>() {
    let mut bench = Bench::<C>::start(2, 16);
    let peer = bench.cluster.id(1);
    let asked = Event::Severed { peer, reason: SeverReason::Asked };
    for _ in 0..2 {
        bench.cluster.node(0).sever(peer);
        bench.cluster.node(0).sever(peer);
        bench.expect(0, |e| *e == asked);
        bench.settle();
        bench.poll(0);
        assert!(bench.events[0].is_empty(), "calls before the answer share it: {:?}", bench.events[0]);
    }
    // While it is being connected.
    let address = bench.cluster.address(1);
    bench.cluster.node(0).connect(peer, address);
    bench.cluster.node(0).sever(peer);
    bench.expect(0, |e| *e == asked);
}

/// Points 1, 11: a new life has none of the old one's windows.
pub(crate) fn reconnects_without_old_windows<C: Cluster>() {
    let mut bench = Bench::<C>::connected(2, 16);
    for round in 0..3 {
        let old = bench.open(1, 0, 0..1000);
        let (peer, other) = (bench.cluster.id(1), bench.cluster.id(0));
        bench.cluster.node(0).sever(peer);
        bench.expect(0, |e| matches!(e, Event::Severed { .. }));
        bench.expect(1, |e| matches!(e, Event::Severed { peer, .. } if *peer == other));
        bench.connect(round % 2, 1 - round % 2);
        let new = bench.open(1, 0, 0..1000);
        let source = bench.extent(0, 0..1000);
        let write =
            |ticket, window| Write { ticket, source: source.clone(), window, offset: 0, immediate: 8 };
        bench.submit(0, 1, write(1, old)).unwrap();
        assert_eq!(bench.failed(0, 1), FailReason::Refused);
        bench.submit(0, 1, write(2, new)).unwrap();
        bench.sent(0, 2);
        bench.landed(1, 8);
        bench.cluster.node(1).close_window(new);
    }
}

/// Point 13.
pub(crate) fn notices_the_dead<C: Cluster>() {
    const UNDER_WAY: u64 = 16;
    let mut bench = Bench::<C>::connected(3, UNDER_WAY as usize + 1);
    let window = bench.open(1, 0, 0..8 << 20);
    let source = bench.extent(0, 0..8 << 20);
    let write = |ticket| Write { ticket, source: source.clone(), window, offset: 0, immediate: 0 };
    for ticket in 0..UNDER_WAY {
        bench.submit(0, 1, write(ticket)).unwrap();
    }
    bench.cluster.kill(1);
    let begun = Instant::now();
    // Any of those may have been delivered while it died, and this one cannot be.
    let late = bench.submit(0, 1, write(UNDER_WAY));
    let dead = bench.cluster.id(1);
    for node in [0, 2] {
        bench.expect(node, |e| matches!(e, Event::Severed { peer, .. } if *peer == dead));
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "noticed only after {:?}", begun.elapsed());
    let mut reports = BTreeMap::new();
    for event in std::mem::take(&mut bench.events[0]) {
        let (ticket, sent) = match event {
            Event::Sent { ticket, .. } => (ticket, true),
            Event::Failed { ticket, reason: FailReason::Severed, .. } => (ticket, false),
            other => panic!("{other:?}"),
        };
        assert_eq!(reports.insert(ticket, sent), None, "ticket {ticket} is reported twice");
    }
    match late {
        Ok(()) => assert_eq!(reports.remove(&UNDER_WAY), Some(false), "it was dead before"),
        // A path alone may end sooner than the next line.
        Err(error) => assert_eq!(error, SubmitError::NotConnected { peer: dead }),
    }
    assert!(reports.into_keys().eq(0..UNDER_WAY), "each ticket once, before the end");
    // The living are not disturbed.
    let window = bench.open(2, 0, 0..1000);
    let write = Write { ticket: 100, source: bench.extent(0, 0..1000), window, offset: 0, immediate: 4 };
    bench.submit(0, 2, write).unwrap();
    bench.sent(0, 100);
    bench.landed(2, 4);
}

/// Point 13, from the start.
pub(crate) fn says_when_nobody_answers<C: Cluster>() {
    let mut bench = Bench::<C>::start(2, 16);
    let (peer, address) = (bench.cluster.id(1), bench.cluster.address(1));
    bench.cluster.kill(1);
    bench.cluster.node(0).connect(peer, address);
    bench.expect(0, |e| matches!(e, Event::Severed { reason: SeverReason::Unreachable(_), .. }));
}

/// Points 2, 3: a source that is overwritten as soon as it is free spoils nothing.
pub(crate) fn sources_are_free_after_sent<C: Cluster>() {
    let mut bench = Bench::<C>::connected(2, 16);
    const LEN: usize = 300_000;
    for round in 0..20u64 {
        let window = bench.open(1, 0, 0..LEN);
        bench.fill(0, 0..LEN, round);
        let source = bench.extent(0, 0..LEN);
        bench.submit(0, 1, Write { ticket: round, source, window, offset: 0, immediate: 1 }).unwrap();
        bench.sent(0, round);
        bench.fill(0, 0..LEN, 1 << 40);
        bench.landed(1, 1);
        bench.cluster.wait();
        assert!(bench.holds(1, 0..LEN, round), "round {round}");
        bench.cluster.node(1).close_window(window);
    }
}

/// Point 1, when both sides connect at once.
pub(crate) fn both_may_connect<C: Cluster>() {
    for _ in 0..3 {
        let mut bench = Bench::<C>::start(2, 16);
        let ids = [bench.cluster.id(0), bench.cluster.id(1)];
        for node in 0..2 {
            let address = bench.cluster.address(1 - node);
            bench.cluster.node(node).connect(ids[1 - node], address);
        }
        for node in 0..2 {
            bench.expect(node, |e| *e == Event::Connected { peer: ids[1 - node] });
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let window = bench.open(to, from, 0..1000);
            let write =
                Write { ticket: 6, source: bench.extent(from, 2000..3000), window, offset: 0, immediate: 9 };
            bench.submit(from, to, write).unwrap();
            bench.sent(from, 6);
            bench.landed(to, 9);
        }
        bench.settle();
        for node in 0..2 {
            bench.poll(node);
            assert!(bench.events[node].is_empty(), "{:?}", bench.events[node]);
        }
    }
}
