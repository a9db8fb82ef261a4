//! A member of the cluster whose records are right and say what they must not, or are wrong.

use super::frame::{Frame, Hello, MAX_TAIL, acks, body_of};
use super::handshake::{Deadline, Tls};
use super::join::{Joined, say};
use super::outgoing::Outgoing;
use super::record::MAX_CONTENT;
use crate::hostile::{FRIEND, HOSTILE, Hostile, Log, Session, Victim, not_granted};
use crate::net::header::{Ack, Header};
use crate::net::lane::Path;
use crate::{NetConfig, Transport, Window};
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const WITHIN: Duration = Duration::from_secs(5);

fn tls_alone() -> NetConfig {
    NetConfig { paths: vec![Path::Tls], ..NetConfig::default() }
}

/// A lane that the victim has taken.
struct Lane {
    _hostile: Hostile,
    session: Session,
    joined: Joined,
    own: Window,
    others: Window,
}

fn connect(victim: &Victim, session: &Session) -> Joined {
    let port = session.offers.tls.unwrap().port;
    let addr = SocketAddr::new(victim.addr().ip(), port);
    let tls = Tls::new(&HOSTILE).unwrap();
    Joined::new(tls.dial(addr, Deadline::after(WITHIN)).unwrap())
}

fn join(victim: &mut Victim) -> Lane {
    let own = victim.open(HOSTILE.node(), 1000..101_000);
    let others = victim.open(FRIEND.node(), 200_000..300_000);
    let hostile = Hostile::new(&HOSTILE);
    let mut session = hostile.meet(victim.addr());
    let mut joined = connect(victim, &session);
    let deadline = Deadline::after(WITHIN);
    let hello = Hello { node: HOSTILE.node(), life: session.life, secret: session.offers.secret };
    say(&joined.socket, &mut joined.outgoing, &Frame::Hello(hello), deadline).unwrap();
    joined.hear(deadline, |frame| matches!(frame, Frame::Welcome).then_some(())).unwrap();
    hostile.begin(victim, &mut session, Path::Tls);
    Lane { _hostile: hostile, session, joined, own, others }
}

impl Lane {
    fn say(&mut self, frames: &[Frame<'_>]) {
        for frame in frames {
            let Outgoing { sealing, batch } = &mut self.joined.outgoing;
            sealing.put_frame(batch, frame).unwrap();
        }
        let _ = self.joined.outgoing.batch.send(&self.joined.socket);
    }

    fn put(&mut self, content: &[u8]) {
        let Outgoing { sealing, batch } = &mut self.joined.outgoing;
        sealing.put(batch, content).unwrap();
    }

    /// Waits for the next fate of a write.
    fn fate(&mut self) -> Ack {
        self.joined.socket.set_read_timeout(Some(WITHIN)).unwrap();
        loop {
            let content = self.joined.incoming.hear(&self.joined.socket).unwrap().unwrap();
            if let Some(Frame::Acks(encoded)) = Frame::decode(content) {
                return acks(encoded).next().unwrap().unwrap();
            }
        }
    }
}

fn header(window: Window, len: u64) -> Header {
    Header { window, offset: 0, len, immediate: 1, sequence: 0, floor: 0, failed: None }
}

fn write(header: Header) -> Frame<'static> {
    static TAIL: [u8; MAX_TAIL] = [9; MAX_TAIL];
    Frame::Write { header, tail: &TAIL[..(header.len - body_of(header.len)) as usize] }
}

#[test]
fn writes_to_what_was_not_granted_are_refused_one_by_one() {
    let (log, mut victim) = (Log::begin(), Victim::new(tls_alone()));
    let mut lane = join(&mut victim);
    for header in not_granted(lane.own, lane.others) {
        lane.say(&[write(header)]);
        if body_of(header.len) > 0 {
            // It is told to stop, and does.
            lane.say(&[Frame::Cut(header.sequence)]);
        }
        assert_eq!(lane.fate(), Ack { sequence: header.sequence, landed: false });
    }
    log.expect(&["write refused", &format!("peer={}", HOSTILE.node())]);
    victim.check_unharmed();
    assert!(lane.session.connection.close_reason().is_none(), "a refused write ends nothing");
    victim.stop();
}

#[test]
fn records_that_break_a_rule_end_their_lane_alone() {
    type Breaks = fn(&mut Lane);
    let cases: [(&str, Breaks); 13] = [
        ("a frame that is none", |lane| {
            lane.put(&[99, 1, 2]);
            lane.say(&[]);
        }),
        ("a frame that is none", |lane| {
            lane.put(&[]);
            lane.say(&[]);
        }),
        ("introduced itself again", |lane| lane.say(&[Frame::Welcome])),
        ("another kind of lane", |lane| lane.say(&[Frame::Message(&[1, 2])])),
        ("cannot have received", |lane| {
            lane.say(&[Frame::Acks(&Ack { sequence: 7, landed: true }.encode())]);
        }),
        ("an acknowledgement that is none", |lane| lane.say(&[Frame::Acks(&[2; 9])])),
        ("began a write within another", |lane| {
            let header = header(lane.own, 50_000);
            lane.say(&[write(header), write(Header { len: 10, ..header })]);
        }),
        ("another length than is due", |lane| {
            lane.say(&[write(header(lane.own, 50_000))]);
            lane.put(&[9; 5000]);
            lane.say(&[]);
        }),
        ("cut a write short that was wanted", |lane| {
            lane.say(&[write(header(lane.own, 50_000)), Frame::Cut(0)]);
        }),
        ("cut a write short that it had sent", |lane| lane.say(&[Frame::Cut(5)])),
        ("no TLS record", |lane| lane.joined.socket.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap()),
        ("not what the peer sealed", |lane| {
            lane.joined.socket.write_all(&[&[23, 3, 3, 0, 40][..], &[7; 40]].concat()).unwrap();
        }),
        ("length that does not occur", |lane| {
            lane.joined.socket.write_all(&[23, 3, 3, 0xff, 0xff]).unwrap();
        }),
    ];
    for (words, breaks) in cases {
        let (log, mut victim) = (Log::begin(), Victim::new(tls_alone()));
        let mut lane = join(&mut victim);
        breaks(&mut lane);
        let reason = victim.until_severed();
        assert!(reason.contains(words), "{words}: {reason}");
        log.expect(&["path failed", words]);
        victim.check_unharmed();
        victim.stop();
    }
}

#[test]
fn who_does_not_know_the_secret_makes_no_lane() {
    let (log, mut victim) = (Log::begin(), Victim::new(tls_alone()));
    let hostile = Hostile::new(&HOSTILE);
    let session = hostile.meet(victim.addr());
    let hello = Hello { node: HOSTILE.node(), life: session.life, secret: session.offers.secret };
    for hello in [
        Hello { secret: [7; 32], ..hello.clone() },
        Hello { life: 1, ..hello.clone() },
        Hello { node: FRIEND.node(), ..hello },
    ] {
        let log = Log::begin();
        let mut joined = connect(&victim, &session);
        let deadline = Deadline::after(WITHIN);
        say(&joined.socket, &mut joined.outgoing, &Frame::Hello(hello), deadline).unwrap();
        assert!(joined.hear(deadline, |frame| matches!(frame, Frame::Welcome).then_some(())).is_err());
        log.expect(&["TLS connection refused", "session was over"]);
    }
    log.expect(&["TLS connection refused"]);
    victim.check_unharmed();
    victim.stop();
}

#[test]
fn a_channel_for_lanes_that_are_not_there_is_refused() {
    let (log, mut victim) = (Log::begin(), Victim::new(tls_alone()));
    let hostile = Hostile::new(&HOSTILE);
    let session = hostile.meet(victim.addr());
    let mut joined = connect(&victim, &session);
    let deadline = Deadline::after(WITHIN);
    let hello = Hello { node: HOSTILE.node(), life: session.life, secret: session.offers.secret };
    say(&joined.socket, &mut joined.outgoing, &Frame::Channel(hello), deadline).unwrap();
    assert!(joined.hear(deadline, |_| Some(())).is_err());
    log.expect(&[if cfg!(feature = "cuda") { "NCCL lane refused" } else { "not in this build" }]);
    victim.check_unharmed();
    victim.stop();
}

/// A write without end, and changes of keys without end: the lane ends all the same, when its session does.
#[test]
fn records_without_end_keep_no_lane_alive() {
    for keys in [false, true] {
        let mut victim = Victim::new(tls_alone());
        let mut lane = join(&mut victim);
        if !keys {
            lane.say(&[write(header(Window { key: 0, ..lane.own }, u64::MAX))]);
        }
        let socket = lane.joined.socket.try_clone().unwrap();
        socket.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let writer = {
            let done = Arc::clone(&done);
            thread::spawn(move || {
                let mut records = lane;
                while !done.load(Ordering::Relaxed) {
                    if keys {
                        let Outgoing { sealing, batch } = &mut records.joined.outgoing;
                        sealing.change_keys(batch).unwrap();
                    } else {
                        records.put(&[9; MAX_CONTENT]);
                    }
                    if records.joined.outgoing.batch.send(&socket).is_err() {
                        return;
                    }
                }
            })
        };
        thread::sleep(Duration::from_millis(100));
        victim.check_unharmed();
        victim.transport.sever(HOSTILE.node());
        victim.until_severed();
        let in_time = victim.stops_within(WITHIN, || {
            done.store(true, Ordering::Relaxed);
            writer.join().unwrap();
        });
        assert!(in_time, "the lane's thread went on as long as the peer sent");
    }
}
