//! A member of the cluster on this host that lies about the memory it shares, and writes what it likes into it.

use super::handover::{Message, Offer, Received, Socket};
use super::ring::{self, Ends, SHARED_BYTES};
use super::{Announced, MAX_REGIONS};
use crate::hostile::{ANY, FRIEND, HOSTILE, Hostile, Log, Session, VICTIM, Victim, not_granted};
use crate::net::header::Header;
use crate::net::lane::Path;
use crate::{Event, NetConfig, NetTransport, Transport, Window};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;

fn shm_alone() -> NetConfig {
    NetConfig { paths: vec![Path::Shm], ..NetConfig::default() }
}

/// A lane that the victim has taken.
struct Joined {
    hostile: Hostile,
    session: Session,
    socket: Socket,
    memory: Arc<HostRegion>,
    ends: Ends,
    own: Window,
    others: Window,
}

fn join(victim: &mut Victim) -> Joined {
    let own = victim.open(HOSTILE.node(), 1000..101_000);
    let others = victim.open(FRIEND.node(), 200_000..300_000);
    let hostile = Hostile::new(&HOSTILE);
    let mut session = hostile.meet(victim.addr());
    let socket = Socket::connect(&offer(&session)).unwrap();
    let memory = HostRegion::map(SHARED_BYTES).unwrap();
    socket.send(&hello(&session), memory.file(), true).unwrap();
    assert!(matches!(socket.receive(true).unwrap(), Received::Message(Message::Welcome, None)));
    hostile.begin(victim, &mut session, Path::Shm);
    let ends = Ends::new(&memory, true);
    Joined { hostile, session, socket, memory, ends, own, others }
}

fn offer(session: &Session) -> Offer {
    session.offers.shm.clone().unwrap()
}

fn hello(session: &Session) -> Message {
    Message::Join { node: HOSTILE.node(), life: session.life, secret: session.offers.secret, gpu: None }
}

/// Memory that is not what it has to be.
#[allow(unsafe_code)] // What makes such memory makes no other.
fn file(bytes: i64, sealed: bool) -> File {
    // SAFETY: the name is a C string; the call makes a new descriptor and touches nothing else.
    let fd = unsafe { libc::memfd_create(c"hostile".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes as u64).unwrap();
    if sealed {
        // SAFETY: the call concerns this descriptor alone.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) }, 0);
    }
    file
}

fn send_raw(socket: &Socket, bytes: &[u8], files: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(files));
    }
    sendmsg(socket.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
}

#[test]
fn memory_that_is_not_as_it_must_be_is_refused() {
    let (log, mut victim) = (Log::begin(), Victim::new(shm_alone()));
    let hostile = Hostile::new(&HOSTILE);
    let session = hostile.meet(victim.addr());
    let right = file(SHARED_BYTES as i64, true);
    let check = |bytes: &[u8], files: &[&File], words: &str| {
        let (log, socket) = (Log::begin(), Socket::connect(&offer(&session)).unwrap());
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        send_raw(&socket, bytes, &files);
        assert!(matches!(socket.receive(true).unwrap(), Received::End), "{words}");
        log.expect(&["shared memory lane refused", words]);
    };
    let join = hello(&session).encode();
    let Message::Join { node, life, secret, gpu } = hello(&session) else { unreachable!() };
    let other = |message: Message| message.encode();
    check(&other(Message::Join { node, life, secret: [7; 32], gpu }), &[&right], "session was over");
    check(&other(Message::Join { node: FRIEND.node(), life, secret, gpu }), &[&right], "session was over");
    check(&other(Message::Join { node, life: life + 1, secret, gpu }), &[&right], "session was over");
    check(&other(Message::Join { node, life, secret, gpu: Some([1; 16]) }), &[&right], "GPU");
    check(&join, &[], "first message is another");
    check(&join[..join.len() - 1], &[&right], "cannot be read");
    check(&[1, 9, 9], &[&right], "cannot be read");
    check(&[0; 200], &[&right], "too long");
    check(&other(Message::Welcome), &[&right], "first message is another");
    check(&join, &[&right, &right], "too many descriptors");
    check(&join, &[&file(SHARED_BYTES as i64, false)], "not sealed");
    check(&join, &[&file(SHARED_BYTES as i64 - 4096, true)], "not sealed at");
    check(&join, &[&file(1 << 40, true)], "not sealed at");
    check(&join, &[&File::open("/dev/zero").unwrap()], "not sealed");
    check(&join, &[&File::open("/proc/self/exe").unwrap()], "not sealed");
    log.expect(&["shared memory lane refused"]);
    victim.check_unharmed();
    victim.stop();
}

/// Whoever connects and says nothing keeps nobody from it.
#[test]
fn the_silent_hold_up_nobody() {
    let (log, mut victim) = (Log::begin(), Victim::new(shm_alone()));
    let hostile = Hostile::new(&HOSTILE);
    let session = hostile.meet(victim.addr());
    let silent: Vec<_> = (0..40).map(|_| Socket::connect(&offer(&session)).unwrap()).collect();
    let mut other = NetTransport::bind(ANY, &HOSTILE.another().unwrap(), shm_alone()).unwrap();
    let begun = Instant::now();
    other.connect(VICTIM.node(), victim.addr());
    let mut events = Vec::new();
    while events.is_empty() {
        other.poll(&mut events);
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(events, [Event::Connected { peer: VICTIM.node() }]);
    log.expect(&["shared memory lane refused"]);
    drop(silent);
    victim.check_unharmed();
    victim.stop();
}

fn header(window: Window, len: u64) -> Header {
    Header { window, offset: 0, len, immediate: 1, sequence: 0, floor: 0, failed: None }
}

/// What the queues say that no run of the rules leads to.
#[test]
fn queues_full_of_nonsense_end_their_lane_alone() {
    type Breaks = fn(&mut Joined);
    let cases: [(&str, Breaks); 9] = [
        ("position cannot be", |joined| ring::scribble(&joined.memory, ring::JOBS_HEAD, 1 << 20)),
        ("position cannot be", |joined| ring::scribble(&joined.memory, ring::JOBS_HEAD, u64::MAX)),
        ("position cannot be", |joined| ring::scribble(&joined.memory, ring::ACKS_HEAD, 1 << 63)),
        // Every number has a meaning: this repeats a write for which all lanes are said to have failed.
        ("failed at the peer", |joined| joined.ends.jobs_out.push(&[u64::MAX; ring::JOB_WORDS])),
        ("never given", |joined| {
            let announced = Announced { header: header(joined.own, 100), region: 5, at: 0 };
            joined.ends.jobs_out.push(&announced.encode());
        }),
        ("beyond its region", |joined| give_then_announce(joined, 4096, 100, 4096 - 99)),
        ("beyond its region", |joined| give_then_announce(joined, 4096, 100, u64::MAX)),
        ("beyond its region", |joined| give_then_announce(joined, 4096, 100, u64::MAX - 50)),
        ("beyond its region", |joined| give_then_announce(joined, 4096, 100_000, 0)),
    ];
    for (words, breaks) in cases {
        let (log, mut victim) = (Log::begin(), Victim::new(shm_alone()));
        let mut joined = join(&mut victim);
        breaks(&mut joined);
        joined.socket.send(&Message::Wake, None, true).unwrap();
        let reason = victim.until_severed();
        assert!(reason.contains(words), "{reason}");
        log.expect(&["path failed", words]);
        if words.contains("beyond") {
            // What lies within its region may have been copied, and nothing else.
            continue;
        }
        victim.check_unharmed();
        victim.stop();
    }
}

fn give_then_announce(joined: &mut Joined, region: u64, len: u64, at: u64) {
    let memory = file(region as i64, true);
    joined.socket.send(&Message::Region { serial: 0, len: region }, Some(memory.as_fd()), true).unwrap();
    let announced = Announced { header: header(joined.own, len), region: 0, at };
    joined.ends.jobs_out.push(&announced.encode());
}

#[test]
fn regions_that_are_lies_end_their_lane_alone() {
    type Breaks = fn(&Joined);
    fn give(joined: &Joined, serial: u32, len: u64, file: &File) {
        joined.socket.send(&Message::Region { serial, len }, Some(file.as_fd()), true).unwrap();
    }
    let cases: [(&str, Breaks); 8] = [
        // Could be cut short under the reader's eyes.
        ("not sealed", |joined| give(joined, 0, 4096, &file(4096, false))),
        ("not sealed at 8192", |joined| give(joined, 0, 8192, &file(4096, true))),
        ("not sealed", |joined| give(joined, 0, u64::MAX, &file(4096, true))),
        ("not sealed", |joined| give(joined, 0, 0, &file(0, true))),
        ("not sealed", |joined| give(joined, 0, 1 << 20, &File::open("/dev/zero").unwrap())),
        ("too many regions", |joined| {
            (0..=MAX_REGIONS as u32).for_each(|serial| give(joined, serial, 4096, &file(4096, true)));
        }),
        ("unexpected message", |joined| send_raw(&joined.socket, &Message::Welcome.encode(), &[])),
        ("cannot be read", |joined| send_raw(&joined.socket, &[77; 20], &[])),
    ];
    for (words, breaks) in cases {
        let (log, mut victim) = (Log::begin(), Victim::new(shm_alone()));
        let joined = join(&mut victim);
        breaks(&joined);
        let reason = victim.until_severed();
        assert!(reason.contains(words), "{reason}");
        log.expect(&["path failed", words]);
        victim.check_unharmed();
        victim.stop();
    }
}

#[test]
fn announcements_of_what_was_not_granted_are_refused_one_by_one() {
    let (log, mut victim) = (Log::begin(), Victim::new(shm_alone()));
    let mut joined = join(&mut victim);
    let memory = file(1 << 20, true);
    joined.socket.send(&Message::Region { serial: 0, len: 1 << 20 }, Some(memory.as_fd()), true).unwrap();
    let headers = not_granted(joined.own, joined.others);
    for header in &headers {
        joined.ends.jobs_out.push(&Announced { header: *header, region: 0, at: 0 }.encode());
    }
    joined.socket.send(&Message::Wake, None, true).unwrap();
    for header in &headers {
        let begun = Instant::now();
        let answer = loop {
            if let Some([answer]) = joined.ends.acks_in.pop().unwrap() {
                break answer;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "no answer");
            thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(answer, header.sequence << 1, "refused");
    }
    log.expect(&["write refused", &format!("peer={}", HOSTILE.node())]);
    victim.check_unharmed();
    assert!(joined.session.connection.close_reason().is_none(), "a refused write ends nothing");
    drop(joined.hostile);
    victim.stop();
}

/// Queues that never end: the lane ends all the same, when its session does.
#[test]
fn announcements_without_end_keep_no_lane_alive() {
    for queue in [ring::JOBS_HEAD, ring::ACKS_HEAD] {
        let mut victim = Victim::new(shm_alone());
        let joined = join(&mut victim);
        let done = Arc::new(AtomicBool::new(false));
        let writer = {
            let (memory, done) = (Arc::clone(&joined.memory), Arc::clone(&done));
            thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let taken = ring::glimpse(&memory, queue + ring::TAIL_AFTER_HEAD);
                    ring::scribble(&memory, queue, taken + 900);
                    let answered = ring::glimpse(&memory, ring::ANSWERS_HEAD);
                    ring::scribble(&memory, ring::ANSWERS_HEAD + ring::TAIL_AFTER_HEAD, answered);
                }
            })
        };
        joined.socket.send(&Message::Wake, None, true).unwrap();
        thread::sleep(Duration::from_millis(50));
        victim.check_unharmed();
        victim.transport.sever(HOSTILE.node());
        victim.until_severed();
        let in_time = victim.stops_within(Duration::from_secs(5), || {
            done.store(true, Ordering::Relaxed);
            writer.join().unwrap();
        });
        assert!(in_time, "the lane's thread went on as long as the peer wrote");
    }
}
