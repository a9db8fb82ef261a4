//! A network that need not mean well: stands before a node, on one port for UDP and TCP, and passes on what comes.

use std::collections::{HashMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

pub(crate) const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What becomes of what passes. Chances are of a thousand packets, in each direction.
#[derive(Default)]
pub(crate) struct Weather {
    /// Nothing passes: UDP is lost, TCP waits.
    pub(crate) dark: AtomicBool,
    /// UDP is lost; then some of it is also late or comes twice.
    pub(crate) lost: AtomicU64,
    /// UDP comes with a bit flipped.
    pub(crate) garbled: AtomicU64,
    /// UDP is followed by some packet that passed before.
    pub(crate) replayed: AtomicU64,
    /// Bytes of UDP a second in each direction, if not 0. What waits fills a socket's buffer, which then drops.
    pub(crate) rate: AtomicU64,
    /// TCP connections that came.
    pub(crate) connections: AtomicU64,
    /// Draws so far: what chance depends on.
    pub(crate) seed: AtomicU64,
}

/// What becomes of TCP, once: after so many bytes of one direction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tcp {
    Passes,
    /// Nobody gets through.
    Refuses,
    /// A bit is flipped.
    Garbles(u64),
    /// The connection ends.
    Cuts(u64),
    /// What came last comes again.
    Repeats(u64),
}

/// Its threads end soon after it is dropped.
pub(crate) struct Relay {
    pub(crate) addr: SocketAddr,
    pub(crate) weather: Arc<Weather>,
    stop: Arc<AtomicBool>,
}

impl Relay {
    pub(crate) fn start(target: SocketAddr) -> Relay {
        Relay::with(target, Tcp::Passes)
    }

    pub(crate) fn with(target: SocketAddr, tcp: Tcp) -> Relay {
        let (udp, listener) = loop {
            let udp = UdpSocket::bind(LOOPBACK).unwrap();
            if let Ok(listener) = TcpListener::bind(udp.local_addr().unwrap()) {
                break (udp, listener);
            }
        };
        let relay = Relay { addr: udp.local_addr().unwrap(), weather: Arc::default(), stop: Arc::default() };
        let (weather, stop) = (Arc::clone(&relay.weather), Arc::clone(&relay.stop));
        thread::spawn(move || datagrams(&Arc::new(udp), target, &weather, &stop));
        if tcp != Tcp::Refuses {
            let (weather, stop) = (Arc::clone(&relay.weather), Arc::clone(&relay.stop));
            thread::spawn(move || streams(&listener, target, tcp, &weather, &stop));
        }
        relay
    }
}

impl Relay {
    /// From now on TCP passes, which it had refused.
    pub(crate) fn let_through(&self, target: SocketAddr) {
        let listener = TcpListener::bind(self.addr).unwrap();
        let (weather, stop) = (Arc::clone(&self.weather), Arc::clone(&self.stop));
        thread::spawn(move || streams(&listener, target, Tcp::Passes, &weather, &stop));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Ends its wait for the next one.
        let _ = TcpStream::connect(self.addr);
    }
}

const LOOK: Duration = Duration::from_millis(100);

fn datagrams(front: &Arc<UdpSocket>, target: SocketAddr, weather: &Arc<Weather>, stop: &Arc<AtomicBool>) {
    let mut onward: HashMap<SocketAddr, (Arc<UdpSocket>, Way)> = HashMap::new();
    front.set_read_timeout(Some(LOOK)).unwrap();
    let mut packet = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let Ok((len, from)) = front.recv_from(&mut packet) else { continue };
        let (back, way) = onward.entry(from).or_insert_with(|| {
            let back = Arc::new(UdpSocket::bind(LOOPBACK).unwrap());
            back.connect(target).unwrap();
            back.set_read_timeout(Some(LOOK)).unwrap();
            let (front, reader) = (Arc::clone(front), Arc::clone(&back));
            let (weather, stop) = (Arc::clone(weather), Arc::clone(stop));
            thread::spawn(move || {
                let (mut packet, mut way) = (vec![0; 1 << 16], Way::default());
                while !stop.load(Ordering::Relaxed) {
                    // While the target is gone the kernel says so; the network is just dark then.
                    let Ok(len) = reader.recv(&mut packet) else { continue };
                    way.pass(&mut packet[..len], &weather, |packet| drop(front.send_to(packet, from)));
                }
            });
            (back, Way::default())
        });
        way.pass(&mut packet[..len], weather, |packet| drop(back.send(packet)));
    }
}

/// One direction of UDP.
#[derive(Default)]
struct Way {
    late: Option<Vec<u8>>,
    old: VecDeque<Vec<u8>>,
}

impl Way {
    fn pass(&mut self, packet: &mut [u8], weather: &Weather, send: impl Fn(&[u8])) {
        let draw = || {
            let draw = weather.seed.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            (draw, draw % 1000)
        };
        let (lost, garbled, replayed) = (
            weather.lost.load(Ordering::Relaxed),
            weather.garbled.load(Ordering::Relaxed),
            weather.replayed.load(Ordering::Relaxed),
        );
        let (chance, of_thousand) = draw();
        if weather.dark.load(Ordering::Relaxed) || of_thousand < lost {
            return;
        }
        if let Some(us) = (packet.len() as u64 * 1_000_000).checked_div(weather.rate.load(Ordering::Relaxed))
        {
            thread::sleep(Duration::from_micros(us));
        }
        if replayed > 0 {
            self.old.push_back(packet.to_vec());
            if self.old.len() > 64 {
                self.old.pop_front();
            }
        }
        if draw().1 < garbled {
            let at = draw().0 as usize % packet.len();
            packet[at] ^= 1 << (chance % 8);
        }
        if lost > 0 && chance.is_multiple_of(7) && self.late.is_none() {
            self.late = Some(packet.to_vec());
            return;
        }
        send(packet);
        if lost > 0 && chance.is_multiple_of(11) {
            send(packet);
        }
        if draw().1 < replayed {
            send(&self.old[draw().0 as usize % self.old.len()]);
        }
        if let Some(late) = self.late.take() {
            send(&late);
        }
    }
}

fn streams(
    listener: &TcpListener,
    target: SocketAddr,
    tcp: Tcp,
    weather: &Arc<Weather>,
    stop: &Arc<AtomicBool>,
) {
    let armed = Arc::new(AtomicBool::new(true));
    for from in listener.incoming().flatten() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        weather.connections.fetch_add(1, Ordering::Relaxed);
        let Ok(to) = TcpStream::connect(target) else { continue };
        for (source, sink) in [(&from, &to), (&to, &from)] {
            let (source, sink) = (source.try_clone().unwrap(), sink.try_clone().unwrap());
            let (weather, stop, armed) = (Arc::clone(weather), Arc::clone(stop), Arc::clone(&armed));
            thread::spawn(move || stream(source, sink, tcp, &armed, &weather, &stop));
        }
    }
}

fn stream(
    mut source: TcpStream,
    mut sink: TcpStream,
    tcp: Tcp,
    armed: &AtomicBool,
    weather: &Weather,
    stop: &AtomicBool,
) {
    let mut bytes = vec![0; 1 << 14];
    let mut passed = 0;
    while let Ok(len @ 1..) = source.read(&mut bytes) {
        while weather.dark.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
        let due =
            |at: u64| (passed..passed + len as u64).contains(&at) && armed.swap(false, Ordering::Relaxed);
        let mut times = 1;
        match tcp {
            Tcp::Garbles(at) if due(at) => bytes[(at - passed) as usize] ^= 4,
            Tcp::Cuts(at) if due(at) => break,
            Tcp::Repeats(at) if due(at) => times = 2,
            _ => {}
        }
        passed += len as u64;
        if (0..times).any(|_| sink.write_all(&bytes[..len]).is_err()) {
            break;
        }
    }
    let _ = source.shutdown(Shutdown::Both);
    let _ = sink.shutdown(Shutdown::Both);
}
