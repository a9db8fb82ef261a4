//! Plain TCP, as fast as it goes: a thread for each connection, straight from and into the regions.

use crate::pattern::{Slots, bytes, bytes_mut};
use crate::{PATIENCE, Sender, Way, here};
use anyhow::Context;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;

/// Bytes of a call.
const CALL: usize = 256 << 10;

pub(crate) struct Tcp {
    streams: Vec<TcpStream>,
    source: Arc<HostRegion>,
}

impl Tcp {
    pub(crate) fn connect(hello: &str, way: &Way, source: Arc<HostRegion>) -> anyhow::Result<Tcp> {
        let streams = (0..way.connections).map(|_| {
            let stream = TcpStream::connect(hello)?;
            if let Some(congestion) = &way.congestion {
                rustix::net::sockopt::set_tcp_congestion(&stream, congestion)?;
            }
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        });
        Ok(Tcp { streams: streams.collect::<std::io::Result<_>>()?, source })
    }
}

impl Sender for Tcp {
    fn run(&mut self, slots: Slots, time: Duration) -> anyhow::Result<u64> {
        let (begun, taken) = (Instant::now(), AtomicU64::new(0));
        let depth = slots.depth().div_ceil(self.streams.len());
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .streams
                .iter_mut()
                .map(|stream| {
                    let (source, taken) = (&self.source, &taken);
                    scope.spawn(move || -> std::io::Result<()> {
                        let mut unanswered = 0;
                        let mut answer = [0];
                        loop {
                            let write = taken.fetch_add(1, Ordering::Relaxed);
                            if begun.elapsed() >= time && write > slots.count as u64 {
                                taken.fetch_sub(1, Ordering::Relaxed);
                                break;
                            }
                            let range = slots.range(write);
                            let header =
                                [(range.start as u64).to_le_bytes(), (slots.size as u64).to_le_bytes()];
                            stream.write_all(&header.concat())?;
                            for piece in bytes(source, range).chunks(CALL) {
                                stream.write_all(piece)?;
                            }
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
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
        .context("plain TCP")?;
        Ok(taken.into_inner())
    }
}

/// Lands what comes, on threads that end with their connections.
pub(crate) fn receive(landing: Arc<HostRegion>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(here()?)?;
    println!("{}", listener.local_addr()?);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let landing = Arc::clone(&landing);
            std::thread::spawn(move || land(stream, &landing));
        }
    });
    Ok(())
}

fn land(mut stream: TcpStream, landing: &HostRegion) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut header = [0; 16];
    loop {
        stream.read_exact(&mut header)?;
        let (start, len) = header.split_at(8);
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize;
        let start = number(start);
        for piece in bytes_mut(landing, start..start + number(len)).chunks_mut(CALL) {
            stream.read_exact(piece)?;
        }
        stream.write_all(&[1])?;
    }
}
