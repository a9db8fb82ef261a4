//! Members of the cluster that mean harm: they have its certificate, and break every rule after that. Each is refused
//! with a word in the log, takes no more than its share, and harms nobody else. Those of the lanes are beside the
//! lanes.

use crate::control::{Control, ControlEvent, Limits, STREAMS as CONTROL};
use crate::endpoint::{Bound, Tuning};
use crate::handshake::{Choice, Exchange, Hello, MAX_PORTS, Offers};
use crate::net::header::{ACK_BYTES, Ack, Header};
use crate::net::lane::Path;
use crate::quic::STREAMS;
use crate::{Event, Identity, NetConfig, NetTransport, RegionId, Transport, Window, Write};
use quinn::{Connection, ReadExactError, SendStream};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_proto::ids::NodeId;
use tokio::runtime::Runtime;

pub(crate) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const PATIENCE: Duration = Duration::from_secs(20);
const REGION: usize = 1 << 20;

/// What was logged since, by anyone in this process.
pub(crate) struct Log(usize);

static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Lines;

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LINES.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    pub(crate) fn begin() -> Log {
        static ONCE: OnceLock<()> = OnceLock::new();
        ONCE.get_or_init(|| {
            let subscriber = tracing_subscriber::fmt().with_writer(|| Lines).with_ansi(false);
            let _ = subscriber.with_env_filter("tandem_transport=debug").try_init();
        });
        Log(LINES.lock().unwrap_or_else(PoisonError::into_inner).len())
    }

    fn text(&self) -> String {
        let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&lines[self.0..]).into_owned()
    }

    /// Whether there is a line with all of these words.
    pub(crate) fn has(&self, words: &[&str]) -> bool {
        self.text().lines().any(|line| words.iter().all(|word| line.contains(word)))
    }

    /// Waits for a line with all of these words.
    #[track_caller]
    pub(crate) fn expect(&self, words: &[&str]) {
        let begun = Instant::now();
        while !self.has(words) {
            assert!(begun.elapsed() < PATIENCE, "no line with {words:?} in:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) static VICTIM: LazyLock<Identity> = LazyLock::new(|| CLUSTER.0[0].clone());
pub(crate) static HOSTILE: LazyLock<Identity> = LazyLock::new(|| CLUSTER.0[1].clone());
pub(crate) static FRIEND: LazyLock<Identity> = LazyLock::new(|| CLUSTER.0[2].clone());

/// Its members, each with a certificate of its own, and the CA's key and certificate.
static CLUSTER: LazyLock<([Identity; 3], String)> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("tandem-hostile-{}", std::process::id()));
    let members = [(); 3].map(|()| Identity::load_or_create(&dir).unwrap());
    let pem = std::fs::read_to_string(dir.join("ca.pem")).unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    (members, pem)
});

/// A node among harm: with windows for the hostile one and for a friend, whose writes must go on.
pub(crate) struct Victim {
    pub(crate) transport: NetTransport,
    memory: Arc<HostRegion>,
    region: RegionId,
    pub(crate) events: Vec<Event>,
    friend: NetTransport,
    friends_memory: Arc<HostRegion>,
    /// What the windows are to hold still.
    before: Vec<u8>,
}

impl Victim {
    pub(crate) fn new(config: NetConfig) -> Victim {
        let bind = |member: &Identity, config| NetTransport::bind(ANY, member, config).unwrap();
        let friends = NetConfig { paths: config.paths.clone(), ..NetConfig::default() };
        let (mut transport, friend) = (bind(&VICTIM, config), bind(&FRIEND, friends));
        let (memory, friends_memory) = (HostRegion::map(REGION).unwrap(), HostRegion::map(REGION).unwrap());
        let region = transport.register(Arc::clone(&memory)).unwrap();
        let before = vec![0; REGION / 2];
        let mut victim =
            Victim { transport, memory, region, events: Vec::new(), friend, friends_memory, before };
        victim.friend.connect(VICTIM.node(), victim.addr());
        victim.until(|events| events.contains(&Event::Connected { peer: FRIEND.node() }));
        victim
    }

    /// Issues certificates of its cluster.
    fn issuer() -> rcgen::Issuer<'static, rcgen::KeyPair> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "tandem cluster CA");
        rcgen::Issuer::new(params, rcgen::KeyPair::from_pem(&CLUSTER.1).unwrap())
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.transport.local_addr()
    }

    /// A window in the first half of the region.
    pub(crate) fn open(&mut self, peer: NodeId, range: std::ops::Range<usize>) -> Window {
        self.transport.open_window(peer, self.region, range).unwrap()
    }

    #[track_caller]
    pub(crate) fn until(&mut self, done: impl Fn(&[Event]) -> bool) {
        let begun = Instant::now();
        while !done(&self.events) {
            self.transport.poll(&mut self.events);
            assert!(begun.elapsed() < PATIENCE, "only {:?}", self.events);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    #[track_caller]
    pub(crate) fn until_severed(&mut self) -> String {
        let severed = |e: &Event| matches!(e, Event::Severed { peer, .. } if *peer == HOSTILE.node());
        self.until(|events| events.iter().any(severed));
        let at = self.events.iter().position(severed).unwrap();
        format!("{:?}", self.events.remove(at))
    }

    /// The friend is as well as before, and no byte of the hostile one's windows has changed.
    #[track_caller]
    pub(crate) fn check_unharmed(&mut self) {
        let half = REGION / 2;
        let window = self.transport.open_window(FRIEND.node(), self.region, half..REGION).unwrap();
        let source = self.friends_memory.extent(0..half).unwrap();
        for immediate in [71, 72, 73] {
            let write = Write { ticket: 7, source: source.clone(), window, offset: 0, immediate };
            self.friend.submit(VICTIM.node(), write).unwrap();
            let begun = Instant::now();
            let landed = Event::Landed { peer: FRIEND.node(), immediate, len: half as u64 };
            self.until(|events| events.contains(&landed));
            println!("the friend waited {:?}", begun.elapsed());
            assert!(begun.elapsed() < Duration::from_secs(2), "the friend waited {:?}", begun.elapsed());
        }
        self.transport.close_window(window);
        let windows = self.memory.extent(0..half).unwrap();
        // SAFETY: whoever may write there writes what it must not, which is what this looks for.
        assert!(unsafe { windows.bytes() } == self.before, "a byte was written that must not be");
        self.events.retain(|e| !matches!(e, Event::Landed { peer, .. } if *peer == FRIEND.node()));
    }

    /// It stops in time, whoever would keep it.
    pub(crate) fn stop(self) {
        let begun = Instant::now();
        drop(self);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "stopping took {took:?}");
    }

    /// Whether it stops although somebody keeps on, who is told to `give_up` then.
    pub(crate) fn stops_within(self, within: Duration, give_up: impl FnOnce()) -> bool {
        let stopping = std::thread::spawn(move || self.stop());
        let begun = Instant::now();
        while !stopping.is_finished() && begun.elapsed() < within {
            std::thread::sleep(Duration::from_millis(1));
        }
        let in_time = stopping.is_finished();
        give_up();
        stopping.join().unwrap();
        in_time
    }
}

/// A member of the cluster that speaks QUIC as it likes.
pub(crate) struct Hostile {
    runtime: Runtime,
    bound: Bound,
}

/// What it has with a victim.
pub(crate) struct Session {
    pub(crate) connection: Connection,
    pub(crate) exchange: Exchange,
    pub(crate) offers: Offers,
    pub(crate) life: u64,
}

pub(crate) fn hello(member: &Identity, life: u64) -> Hello {
    Hello { nonce: member.nonce(), life, part: 0, parts: 1, ports: [0; MAX_PORTS] }
}

impl Hostile {
    pub(crate) fn new(identity: &Identity) -> Hostile {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let bound = {
            let _inside = runtime.enter();
            Bound::new(ANY, identity, &Tuning::default(), STREAMS).unwrap()
        };
        Hostile { runtime, bound }
    }

    pub(crate) fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.expect("it ends in time") })
    }

    async fn connection(&self, addr: SocketAddr) -> Connection {
        self.bound.connect(addr).unwrap().await.unwrap()
    }

    /// Behaves until it has been offered lanes.
    pub(crate) fn meet(&self, addr: SocketAddr) -> Session {
        self.run(async {
            let connection = self.connection(addr).await;
            let life = 4711;
            let mut exchange = Exchange::dial(&connection, &hello(&HOSTILE, life)).await.unwrap();
            assert!(exchange.confirm(0).await.unwrap(), "it is admitted");
            let offers = exchange.offers().await.unwrap();
            Session { connection, exchange, offers, life }
        })
    }

    /// Behaves until the life has begun.
    pub(crate) fn begin(&self, victim: &mut Victim, session: &mut Session, path: Path) {
        let choice = Choice { paths: vec![path], why: String::new() };
        assert!(self.run(session.exchange.choose(&choice)).unwrap(), "it begins");
        victim.until(|events| events.contains(&Event::Connected { peer: HOSTILE.node() }));
        victim.events.clear();
    }
}

fn header(window: Window, len: u64) -> Header {
    Header { window, offset: 0, len, immediate: 1, sequence: 0, floor: 0, failed: None }
}

/// Headers of writes to what was not granted, or that overflow.
pub(crate) fn not_granted(own: Window, others: Window) -> Vec<Header> {
    let most = u64::MAX;
    let mut headers = vec![
        header(others, 100),
        header(Window { key: own.key ^ 1, ..own }, 100),
        header(Window { region: own.region + 1, ..own }, 100),
        header(Window { region: u32::MAX, ..own }, 100),
        header(Window { offset: 0, len: most, ..own }, 100),
        header(Window { offset: most, len: most, ..own }, 100),
        header(own, own.len + 1),
        header(own, most),
        Header { offset: 1, ..header(own, own.len) },
        Header { offset: most, ..header(own, 100) },
        Header { offset: most - 50, ..header(own, 100) },
        Header { offset: most, ..header(own, most) },
        Header { offset: 1 << 63, ..header(own, 1 << 63) },
    ];
    for (sequence, header) in headers.iter_mut().enumerate() {
        header.sequence = sequence as u64;
    }
    headers
}

/// A session over QUIC alone, with the stream of acknowledgements open, and the windows of it and of another.
fn over_quic(victim: &mut Victim, hostile: &Hostile) -> (Session, SendStream, Window, Window) {
    let own = victim.open(HOSTILE.node(), 1000..101_000);
    let others = victim.open(FRIEND.node(), 200_000..300_000);
    let mut session = hostile.meet(victim.addr());
    hostile.begin(victim, &mut session, Path::Quic);
    let acks = hostile.run(session.connection.open_uni()).unwrap();
    (session, acks, own, others)
}

fn quic_alone() -> NetConfig {
    NetConfig { paths: vec![Path::Quic], ..NetConfig::default() }
}

#[test]
fn writes_to_what_was_not_granted_are_refused_one_by_one() {
    let (log, mut victim) = (Log::begin(), Victim::new(quic_alone()));
    let hostile = Hostile::new(&HOSTILE);
    let (session, mut acks, own, others) = over_quic(&mut victim, &hostile);
    let headers = not_granted(own, others);
    hostile.run(async {
        // A stream is seen by the peer once something is on it.
        acks.write_all(&Ack { sequence: 999, landed: true }.encode()).await.unwrap();
        let mut answers = None;
        for header in &headers {
            let mut stream = session.connection.open_uni().await.unwrap();
            stream.write_all(&header.encode()).await.unwrap();
            // Stopped by the victim before or after.
            let _ = stream.write_all(&[9; 100]).await;
            let _ = stream.finish();
            if answers.is_none() {
                answers = Some(session.connection.accept_uni().await.unwrap());
            }
            let mut answer = [0; ACK_BYTES];
            answers.as_mut().unwrap().read_exact(&mut answer).await.unwrap();
            let answer = Ack::decode(&answer).unwrap();
            assert_eq!(answer, Ack { sequence: header.sequence, landed: false });
        }
    });
    assert_eq!(victim.transport.metrics().paths[Path::Quic as usize].landings_refused, headers.len() as u64);
    log.expect(&["write refused", &format!("peer={}", HOSTILE.node())]);
    victim.check_unharmed();
    assert!(session.connection.close_reason().is_none(), "a refused write ends nothing");
    victim.stop();
}

/// What a stream of a hostile member brings, and the words that it is severed with.
#[test]
fn streams_that_break_a_rule_sever_their_writer_alone() {
    type Breaks = fn(Window) -> (Vec<u8>, bool);
    let cases: [(&str, Breaks); 4] = [
        ("write header of another version", |own| {
            let mut bytes = header(own, 4).encode();
            bytes[0] ^= 0xff;
            (bytes.to_vec(), true)
        }),
        ("longer than its header says", |own| {
            // Nothing of it must land: the header promises none.
            ([&header(own, 0).encode()[..], &[9; 5]].concat(), true)
        }),
        ("shorter than its header says", |own| (header(own, 4).encode().to_vec(), true)),
        ("malformed acknowledgement", |_| (vec![2; ACK_BYTES], false)),
    ];
    for (words, breaks) in cases {
        let (log, mut victim) = (Log::begin(), Victim::new(quic_alone()));
        let hostile = Hostile::new(&HOSTILE);
        let (session, mut acks, own, _) = over_quic(&mut victim, &hostile);
        let (bytes, is_write) = breaks(own);
        hostile.run(async {
            if !is_write {
                acks.write_all(&bytes).await.unwrap();
                return;
            }
            acks.write_all(&Ack { sequence: 999, landed: true }.encode()).await.unwrap();
            let mut stream = session.connection.open_uni().await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            let _ = stream.finish();
        });
        victim.until_severed();
        log.expect(&["severed: the peer broke a rule", words]);
        victim.check_unharmed();
        victim.stop();
    }
}

/// Streams that are opened and left, and answers to what was never asked: bounded, and its own harm alone.
#[test]
fn floods_of_streams_and_answers_stay_bounded() {
    let mut victim = Victim::new(quic_alone());
    let hostile = Hostile::new(&HOSTILE);
    let (session, mut acks, own, _) = over_quic(&mut victim, &hostile);
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let before = resident();
    // As many answers as fit the window, again and again, and meanwhile the friend writes.
    let answers: Vec<u8> =
        (0..10_000u64).flat_map(|n| Ack { sequence: 1 << 40 | n, landed: true }.encode()).collect();
    let flood = hostile.runtime.spawn(async move { while acks.write_all(&answers).await.is_ok() {} });
    for _ in 0..5 {
        victim.check_unharmed();
    }
    flood.abort();
    let opened = hostile.run(async {
        let mut streams = Vec::new();
        let mut patience = Box::pin(tokio::time::sleep(Duration::from_millis(500)));
        loop {
            tokio::select! {
                stream = session.connection.open_uni() => {
                    let mut stream = stream.unwrap();
                    stream.write_all(&header(own, 100).encode()).await.unwrap();
                    streams.push(stream);
                }
                () = &mut patience => break,
            }
        }
        streams.len()
    });
    assert!(opened <= STREAMS.unidirectional as usize, "{opened} streams were let in");
    victim.check_unharmed();
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more are resident");
    // None of them is in the way of the end.
    victim.transport.sever(HOSTILE.node());
    victim.until_severed();
    victim.stop();
}

/// Sessions that come and go while the node loop takes in nothing: no more than there is room for their events.
#[test]
fn sessions_that_come_and_go_are_bounded() {
    let config = NetConfig { event_limit: 8, connect_timeout: Duration::from_millis(500), ..quic_alone() };
    let mut victim = Victim::new(config);
    let hostile = Hostile::new(&HOSTILE);
    let mut begun = 0;
    for life in 1..=40 {
        begun += hostile.run(async {
            let connection = hostile.connection(victim.addr()).await;
            let mut exchange = Exchange::dial(&connection, &hello(&HOSTILE, life)).await.unwrap();
            let session = async {
                exchange.confirm(0).await?;
                exchange.offers().await?;
                exchange.choose(&Choice { paths: vec![Path::Quic], why: String::new() }).await
            };
            // Those that wait for room are given up.
            let session = tokio::time::timeout(Duration::from_millis(50), session).await;
            i32::from(session.is_ok_and(|begun| begun.is_ok_and(|begun| begun)))
        });
    }
    victim.events.clear();
    victim.transport.poll(&mut victim.events);
    assert!(begun >= 4, "{begun} sessions began");
    assert!(victim.events.len() < 8 + 3, "{} events waited", victim.events.len());
    victim.check_unharmed();
    victim.stop();
}

/// Introductions that no node makes: each is refused with the reason in the log, and nothing of it stays.
#[test]
fn introductions_that_make_no_sense_are_refused() {
    type Breaks = fn(&mut Vec<u8>);
    let cases: [(&[&str], Breaks); 4] = [
        (&["data connection refused", "does not speak this protocol"], |bytes| bytes[0] ^= 1),
        (&["data connection refused", "speaks transport version", "run the same build"], |bytes| {
            bytes[4] ^= 1
        }),
        // No parts, and too many.
        (&[], |bytes| bytes[24..26].fill(0)),
        (&[], |bytes| bytes[24..26].fill(0xff)),
    ];
    let (log, mut victim) = (Log::begin(), Victim::new(quic_alone()));
    let hostile = Hostile::new(&HOSTILE);
    for (words, breaks) in cases {
        let mut bytes = hello(&HOSTILE, 1).encode().to_vec();
        breaks(&mut bytes);
        let refused = hostile.run(async {
            let connection = hostile.connection(victim.addr()).await;
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            send.write_all(&[&bytes[..], &[0; 8]].concat()).await.unwrap();
            let mut verdict = vec![0; bytes.len() + 1];
            match recv.read_exact(&mut verdict).await {
                Ok(()) => verdict[bytes.len()] == 0,
                Err(ReadExactError::FinishedEarly(_) | ReadExactError::ReadError(_)) => true,
            }
        });
        assert!(refused);
        if !words.is_empty() {
            log.expect(words);
        }
    }
    // As the victim itself: whoever shares its certificate can say that, and an address may be its own.
    let hostile = Hostile::new(&VICTIM);
    let mut bytes = hello(&VICTIM, 1).encode().to_vec();
    bytes.extend([0; 8]);
    let verdict = hostile.run(async {
        let connection = hostile.connection(victim.addr()).await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        let mut answer = vec![0; bytes.len() - 8 + 1];
        recv.read_exact(&mut answer).await.unwrap();
        *answer.last().unwrap()
    });
    assert_eq!(verdict, 0, "nobody is the victim but itself");
    victim.check_unharmed();
    let held = victim.transport.held();
    assert_eq!((held.peers, held.writes), (1, 0), "only the friend's");
    victim.stop();
}

/// Whoever says what a friend says is still somebody else, in both planes: the friend keeps its session, its windows and
/// its name.
#[test]
fn nobody_takes_the_name_of_another() {
    let mut victim = Victim::new(quic_alone());
    let friends = victim.open(FRIEND.node(), 200_000..300_000);
    let hostile = Hostile::new(&HOSTILE);
    let said = hello(&FRIEND, 4711);
    let (session, acks) = hostile.run(async {
        let connection = hostile.connection(victim.addr()).await;
        let mut exchange = Exchange::dial(&connection, &said).await.unwrap();
        assert_eq!(exchange.node, VICTIM.node());
        assert!(exchange.confirm(0).await.unwrap(), "it is admitted as whoever it is");
        let offers = exchange.offers().await.unwrap();
        let choice = Choice { paths: vec![Path::Quic], why: String::new() };
        assert!(exchange.choose(&choice).await.unwrap());
        let acks = connection.open_uni().await.unwrap();
        (Session { connection, exchange, offers, life: said.life }, acks)
    });
    let connected = |e: &Event| matches!(e, Event::Connected { peer } if *peer != FRIEND.node());
    victim.until(|events| events.iter().any(connected));
    let told = victim.events.iter().filter(|e| !connected(e)).collect::<Vec<_>>();
    assert_eq!(told, [&Event::Connected { peer: FRIEND.node() }], "nothing has happened to the friend");
    assert_eq!(victim.transport.held().peers, 2);
    hostile.run(async {
        let mut acks = acks;
        acks.write_all(&Ack { sequence: 999, landed: true }.encode()).await.unwrap();
        let mut stream = session.connection.open_uni().await.unwrap();
        stream.write_all(&header(friends, 100).encode()).await.unwrap();
        let _ = stream.write_all(&[9; 100]).await;
        let _ = stream.finish();
        let mut answers = session.connection.accept_uni().await.unwrap();
        let mut answer = [0; ACK_BYTES];
        answers.read_exact(&mut answer).await.unwrap();
        assert_eq!(Ack::decode(&answer).unwrap(), Ack { sequence: 0, landed: false });
    });
    victim.check_unharmed();
    victim.stop();

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let [(control, mut events), (friend, _friends), (_, _)] =
        [&*VICTIM, &*FRIEND, &*HOSTILE].map(|member| Control::bind(ANY, member, Limits::default()).unwrap());
    runtime.block_on(friend.connect(control.local_addr())).unwrap();
    let bound = Bound::new(ANY, &HOSTILE, &Tuning::default(), CONTROL).unwrap();
    let _held = runtime.block_on(async {
        let connection = bound.connect(control.local_addr()).unwrap().await.unwrap();
        let mut exchange = Exchange::dial(&connection, &said).await.unwrap();
        assert!(exchange.confirm(0).await.unwrap(), "it is admitted as whoever it is");
        let (mut urgent, _) = connection.open_bi().await.unwrap();
        urgent.write_all(&[1]).await.unwrap();
        (connection, exchange, urgent)
    });
    let mut next = || {
        let next = async { tokio::time::timeout(PATIENCE, events.recv()).await };
        runtime.block_on(next).unwrap().unwrap()
    };
    assert!(matches!(next(), ControlEvent::Up { peer, .. } if peer == FRIEND.node()));
    assert!(matches!(next(), ControlEvent::Up { peer, .. } if peer != FRIEND.node()));
    friend.send(VICTIM.node(), crate::control::Lane::Main, vec![7]).unwrap();
    assert!(matches!(next(), ControlEvent::Frame { peer, .. } if peer == FRIEND.node()));
    runtime.shutdown_background();
}

/// Handshakes that are begun and left, in any number: refused beyond the limit, given up in time.
#[test]
fn handshakes_that_are_never_finished_are_given_up() {
    let within = Duration::from_millis(500);
    let config = NetConfig { connection_limit: 24, connect_timeout: within, ..quic_alone() };
    let (log, mut victim) = (Log::begin(), Victim::new(config));
    let at_rest = victim.transport.held();
    let hostile = Hostile::new(&HOSTILE);
    // Whoever has no certificate gets no further than this either.
    let stranger = UdpSocket::bind(ANY).unwrap();
    for n in 0..2000u32 {
        let mut bytes = [n as u8; 1200];
        // The long header of a first packet, and of anything.
        bytes[..5].copy_from_slice(&[0xc0 | (n as u8 & 0x0f), 0, 0, 0, 1]);
        let _ = stranger.send_to(&bytes, victim.addr());
    }
    let silent = hostile.run(async {
        let mut silent = Vec::new();
        for _ in 0..60 {
            // Connected and authenticated, and then without a word.
            if let Ok(connection) = hostile.bound.connect(victim.addr()).unwrap().await {
                silent.push(connection);
            }
        }
        silent
    });
    assert!(silent.len() < 24, "{} connections were let in", silent.len());
    log.expect(&["refused: too many connections", "limit=24"]);
    victim.check_unharmed();
    log.expect(&["data handshake took too long"]);
    let begun = Instant::now();
    while victim.transport.held() != at_rest {
        assert!(
            begun.elapsed() < within + Duration::from_secs(5),
            "{:?} of {at_rest:?}",
            victim.transport.held()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    // There is room for whoever comes next.
    let session = hostile.meet(victim.addr());
    drop(session);
    victim.stop();
}

/// Whoever has no certificate of this cluster that is good today is refused, and the log says why. On both planes:
/// they share the endpoint.
#[test]
fn strangers_are_refused_with_the_reason() {
    Log::begin();
    let mut victim = Victim::new(quic_alone());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _inside = runtime.enter();
    let (control, _events) = Control::bind(ANY, &VICTIM, Limits::default()).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = |edit: fn(&mut rcgen::CertificateParams), issuer: &rcgen::Issuer<'_, rcgen::KeyPair>| {
        let mut params = rcgen::CertificateParams::new(vec!["tandem".to_owned()]).unwrap();
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        edit(&mut params);
        vec![params.signed_by(&key, issuer).unwrap().der().clone()]
    };
    let only_for_servers = |leaf: &mut rcgen::CertificateParams| {
        leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    };
    let ours = Victim::issuer();
    let theirs = rcgen::Issuer::new(rcgen::CertificateParams::default(), rcgen::KeyPair::generate().unwrap());
    let cases = [
        ("UnknownIssuer", leaf(|_| {}, &theirs)),
        ("xpired", leaf(|leaf| leaf.not_after = rcgen::date_time_ymd(2020, 1, 1), &ours)),
        ("not valid yet", leaf(|leaf| leaf.not_before = rcgen::date_time_ymd(4000, 1, 1), &ours)),
        ("invalid peer certificate", leaf(only_for_servers, &ours)),
        ("certificate", Vec::new()),
    ];
    let planes: [(&str, &[u8], SocketAddr); 2] = [
        ("data connection refused", STREAMS.protocol, victim.addr()),
        ("control connection refused", CONTROL.protocol, control.local_addr()),
    ];
    for (plane, protocol, addr) in planes {
        for (reason, chain) in &cases {
            let log = Log::begin();
            let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            let tls = VICTIM.presenting(chain.clone(), key, protocol);
            let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
            let endpoint = quinn::Endpoint::client(ANY).unwrap();
            let connecting =
                endpoint.connect_with(quinn::ClientConfig::new(Arc::new(tls)), addr, "tandem").unwrap();
            let refused = runtime.block_on(async {
                match connecting.await {
                    // This side is done before the other one has looked at its certificate.
                    Ok(connection) => connection.closed().await,
                    Err(error) => error,
                }
            });
            // TLS tells it in the words of an alert.
            assert!(matches!(refused, quinn::ConnectionError::ConnectionClosed(_)), "{refused:?}");
            log.expect(&[plane, reason]);
        }
    }
    victim.check_unharmed();
    victim.stop();
}

/// The control channel, to the same ends.
#[test]
fn control_channels_are_held_to_the_rules() {
    let log = Log::begin();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let limits =
        Limits { frame_bytes: 1000, peers: 24, handshake: Duration::from_millis(500), ..Limits::default() };
    let (control, mut events) = {
        let _inside = runtime.enter();
        Control::bind(ANY, &VICTIM, limits.clone()).unwrap()
    };
    let (friend, _friends_events) = {
        let _inside = runtime.enter();
        Control::bind(ANY, &FRIEND, Limits::default()).unwrap()
    };
    let addr = control.local_addr();
    runtime.block_on(friend.connect(addr)).unwrap();
    let mut next =
        || runtime.block_on(async { tokio::time::timeout(PATIENCE, events.recv()).await }).unwrap().unwrap();
    assert!(matches!(next(), ControlEvent::Up { peer, .. } if peer == FRIEND.node()));
    let bound = {
        let _inside = runtime.enter();
        Bound::new(ANY, &HOSTILE, &Tuning::default(), CONTROL).unwrap()
    };
    let dial = async |life| {
        let connection = bound.connect(addr).unwrap().await.unwrap();
        let mut exchange = Exchange::dial(&connection, &hello(&HOSTILE, life)).await.unwrap();
        assert!(exchange.confirm(0).await.unwrap());
        (connection, exchange)
    };
    // Lengths that are too long, or overflow.
    for (life, len) in [1001u32, u32::MAX, 1 << 31].into_iter().enumerate() {
        let (connection, urgent) = runtime.block_on(async {
            let (connection, mut exchange) = dial(life as u64).await;
            let (mut urgent, _) = connection.open_bi().await.unwrap();
            urgent.write_all(&[1]).await.unwrap();
            exchange.send.write_all(&len.to_le_bytes()).await.unwrap();
            (connection, (urgent, exchange))
        });
        assert!(matches!(next(), ControlEvent::Up { peer, .. } if peer == HOSTILE.node()));
        match next() {
            ControlEvent::Down { peer, .. } if peer == HOSTILE.node() => {}
            other => panic!("{other:?}"),
        }
        log.expect(&["closed: malformed frame", &len.to_string(), "longer than 1000"]);
        drop((connection, urgent));
    }
    // A second stream that never comes, and connections without a word, more than there may be.
    let (left, _held) = runtime.block_on(async {
        let held = dial(99).await;
        let mut left = Vec::new();
        for _ in 0..60 {
            if let Ok(connection) = bound.connect(addr).unwrap().await {
                left.push(connection);
            }
        }
        (left, held)
    });
    assert!(left.len() < 24, "{} connections were let in", left.len());
    log.expect(&["refused: too many peers", "peers=24"]);
    log.expect(&["control handshake took too long"]);
    // The friend has noticed nothing.
    friend.send(VICTIM.node(), crate::control::Lane::Main, vec![7]).unwrap();
    match next() {
        ControlEvent::Frame { peer, bytes, .. } if peer == FRIEND.node() => assert_eq!(bytes, [7]),
        other => panic!("{other:?}"),
    }
    runtime.shutdown_background();
}
