//! Plain TCP, as fast as it goes: a thread for each connection, straight from and into the regions.

use crate::PATIENCE;
use crate::end::{End, Landings, Memory};
use crate::pattern::{Slots, bytes, bytes_mut};
use crate::way::Way;
use anyhow::Context;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a call, or one piece more; and extents, by the kernel's limit.
const CALL: usize = 256 << 10;
const CALL_EXTENTS: usize = 1024;

pub(crate) struct Tcp {
    addr: SocketAddr,
    congestion: Option<String>,
    connections: usize,
    /// Of each peer.
    streams: Vec<Vec<TcpStream>>,
    memory: Memory,
}

impl Tcp {
    /// Lands what comes, on threads that end with their connections.
    pub(crate) fn new(
        way: &Way,
        listen: SocketAddr,
        memory: Memory,
        landings: Arc<Landings>,
    ) -> anyhow::Result<Tcp> {
        let listener = TcpListener::bind(listen).with_context(|| format!("listening on {listen}"))?;
        let addr = listener.local_addr()?;
        let landing = memory.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (memory, landings) = (landing.clone(), Arc::clone(&landings));
                std::thread::spawn(move || land(stream, &memory, &landings));
            }
        });
        let (congestion, connections) = (way.congestion.clone(), way.connections);
        Ok(Tcp { addr, congestion, connections, streams: Vec::new(), memory })
    }

    fn dial(&self, hello: &str) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(hello)?;
        if let Some(congestion) = &self.congestion {
            rustix::net::sockopt::set_tcp_congestion(&stream, congestion)?;
        }
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }
}

impl End for Tcp {
    fn hello(&self) -> String {
        self.addr.to_string()
    }

    fn connect(&mut self, hellos: &[&str]) -> anyhow::Result<()> {
        for hello in hellos {
            let streams = (0..self.connections).map(|_| self.dial(hello));
            let streams = streams.collect::<io::Result<_>>().with_context(|| hello.to_string())?;
            self.streams.push(streams);
        }
        Ok(())
    }

    fn one(&mut self, slots: Slots, peer: usize, message: u64) -> anyhow::Result<()> {
        let stream = &mut self.streams[peer][0];
        send(stream, &self.memory, slots, message)?;
        Ok(stream.read_exact(&mut [0])?)
    }

    fn run(&mut self, slots: Slots, peers: usize, time: Duration) -> anyhow::Result<u64> {
        let begun = Instant::now();
        let depth = slots.depth().div_ceil(self.connections);
        let taken: Vec<_> = (0..peers).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (streams, taken) in self.streams.iter_mut().zip(&taken) {
                for stream in streams {
                    let memory = &self.memory;
                    threads.push(scope.spawn(move || -> io::Result<()> {
                        let mut unanswered = 0;
                        let mut answer = [0];
                        loop {
                            let message = taken.fetch_add(1, Ordering::Relaxed);
                            if begun.elapsed() >= time && message > slots.count as u64 {
                                taken.fetch_sub(1, Ordering::Relaxed);
                                break;
                            }
                            send(stream, memory, slots, message)?;
                            unanswered += 1;
                            if unanswered >= depth {
                                stream.read_exact(&mut answer)?;
                                unanswered -= 1;
                            }
                        }
                        for _ in 0..unanswered {
                            stream.read_exact(&mut answer)?;
                        }
                        Ok(())
                    }));
                }
            }
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
        .context("plain TCP")?;
        Ok(taken.into_iter().map(AtomicU64::into_inner).sum())
    }
}

/// A message is four numbers, from which its reader knows the places of its extents, and their bytes.
fn send(stream: &mut TcpStream, memory: &Memory, slots: Slots, message: u64) -> io::Result<()> {
    let Slots { size, extents, count, .. } = slots;
    let header = [message, size as u64, extents as u64, count as u64].map(u64::to_le_bytes);
    let pieces = slots.message(message).flat_map(|extent| bytes(&memory.source, extent).chunks(CALL));
    let pieces = std::iter::once(header.as_flattened()).chain(pieces);
    for mut call in calls(pieces.map(IoSlice::new), |piece| piece.len()) {
        let mut call = call.as_mut_slice();
        while !call.is_empty() {
            let sent = stream.write_vectored(call)?;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut call, sent);
        }
    }
    Ok(())
}

fn land(mut stream: TcpStream, memory: &Memory, landings: &Landings) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut header = [[0; 8]; 4];
    loop {
        stream.read_exact(header.as_flattened_mut())?;
        let [message, size, extents, count] = header.map(u64::from_le_bytes);
        let slots = Slots { size: size as usize, extents: extents as usize, count: count as usize, seed: 0 };
        let pieces =
            slots.message(message).flat_map(|extent| bytes_mut(&memory.landing, extent).chunks_mut(CALL));
        for mut call in calls(pieces.map(IoSliceMut::new), |piece| piece.len()) {
            let mut call = call.as_mut_slice();
            while !call.is_empty() {
                let received = stream.read_vectored(call)?;
                if received == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                IoSliceMut::advance_slices(&mut call, received);
            }
        }
        landings.note(slots.extents);
        stream.write_all(&[1])?;
    }
}

/// Pieces in groups of one call each.
fn calls<T>(pieces: impl Iterator<Item = T>, len: impl Fn(&T) -> usize) -> impl Iterator<Item = Vec<T>> {
    let mut pieces = pieces.fuse();
    std::iter::from_fn(move || {
        let (mut call, mut bytes) = (Vec::new(), 0);
        while call.len() < CALL_EXTENTS
            && bytes < CALL
            && let Some(piece) = pieces.next()
        {
            bytes += len(&piece);
            call.push(piece);
        }
        (!call.is_empty()).then_some(call)
    })
}
