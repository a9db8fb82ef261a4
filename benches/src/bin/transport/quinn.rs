//! quinn with the transport's settings and without its layers: a stream for each extent, one answer each.

use crate::PATIENCE;
use crate::end::{End, Landings, Memory};
use crate::pattern::{Slots, bytes, bytes_mut};
use anyhow::{Context, ensure};
use bytes::Bytes;
use quinn::{Connection, Endpoint, RecvStream};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_transport::{Identity, Tuning, bare_endpoint};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

/// Between samples nothing drives the sending side.
const SILENCE: Duration = Duration::from_secs(600);

pub(crate) struct Bare {
    addr: SocketAddr,
    identity: Identity,
    tuning: Tuning,
    runtime: Runtime,
    endpoint: Option<Endpoint>,
    /// One to each peer.
    links: Vec<Arc<Link>>,
    memory: Memory,
}

/// A connection to a peer, and where its answers come.
struct Link {
    connection: Connection,
    answers: Mutex<RecvStream>,
    source: Arc<HostRegion>,
    /// As many streams at once as the transport has: four.
    room: Arc<Semaphore>,
}

/// A source that QUIC reads itself when it builds packets.
struct Lent(Arc<HostRegion>, std::ops::Range<usize>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        bytes(&self.0, self.1.clone())
    }
}

fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn patient(tuning: Tuning) -> Tuning {
    let Tuning { dead_after, keep_alive, .. } = Tuning::dead_after(SILENCE);
    Tuning { dead_after, keep_alive, ..tuning }
}

impl Bare {
    /// Lands what comes, on a thread of its own.
    pub(crate) fn new(
        identity: &Identity,
        listen: SocketAddr,
        tuning: Tuning,
        memory: Memory,
        landings: Arc<Landings>,
    ) -> anyhow::Result<Bare> {
        let tuning = patient(tuning);
        let receiving = runtime()?;
        let (endpoint, _) = {
            let _inside = receiving.enter();
            bare_endpoint(listen, identity, &tuning)?
        };
        let addr = endpoint.local_addr()?;
        let landing = Arc::clone(&memory.landing);
        std::thread::spawn(move || {
            // Ends with the connection, in an error always.
            drop(receiving.block_on(receive(&endpoint, &landing, &landings)));
        });
        let identity = identity.clone();
        Ok(Bare { addr, identity, tuning, runtime: runtime()?, endpoint: None, links: Vec::new(), memory })
    }
}

impl End for Bare {
    fn hello(&self) -> String {
        self.addr.to_string()
    }

    fn connect(&mut self, hellos: &[&str]) -> anyhow::Result<()> {
        let Bare { addr, identity, tuning, runtime, memory, links, .. } = self;
        self.endpoint = Some(runtime.block_on(async {
            let (endpoint, connect) = bare_endpoint(SocketAddr::new(addr.ip(), 0), identity, tuning)?;
            for hello in hellos {
                let connection = connect(hello.parse()?)?.await?;
                // Seen by the peer only once something is sent on it.
                connection.open_uni().await?.write_all(&[1]).await?;
                let mut answers = connection.accept_uni().await?;
                answers.read_exact(&mut [0]).await?;
                let (source, room) = (Arc::clone(&memory.source), Arc::new(Semaphore::new(4)));
                links.push(Arc::new(Link { connection, answers: Mutex::new(answers), source, room }));
            }
            anyhow::Ok(endpoint)
        })?);
        Ok(())
    }

    fn one(&mut self, slots: Slots, peer: usize, message: u64) -> anyhow::Result<()> {
        let link = &self.links[peer];
        self.runtime.block_on(async {
            let mut answers = link.answers.lock().await;
            link.send(slots, message);
            for _ in 0..slots.extents {
                answer(&mut answers).await?;
            }
            Ok(())
        })
    }

    fn run(&mut self, slots: Slots, peers: usize, time: Duration) -> anyhow::Result<u64> {
        let links = &self.links[..peers];
        self.runtime.block_on(async {
            let mut running = JoinSet::new();
            for link in links {
                running.spawn(Arc::clone(link).run(slots, time));
            }
            running.join_all().await.into_iter().sum()
        })
    }
}

impl Link {
    async fn run(self: Arc<Self>, slots: Slots, time: Duration) -> anyhow::Result<u64> {
        let mut answers = self.answers.lock().await;
        let (begun, writes) = (Instant::now(), slots.extents as u64);
        let (mut messages, mut under_way) = (0, 0);
        loop {
            let more = begun.elapsed() < time || messages <= slots.count as u64;
            if more && under_way + writes <= slots.depth() as u64 * writes {
                self.send(slots, messages);
                messages += 1;
                under_way += writes;
                continue;
            }
            if under_way == 0 {
                return Ok(messages);
            }
            answer(&mut answers).await?;
            under_way -= 1;
        }
    }

    fn send(&self, slots: Slots, message: u64) {
        for range in slots.message(message) {
            let (connection, source, room) =
                (self.connection.clone(), Arc::clone(&self.source), Arc::clone(&self.room));
            tokio::spawn(async move {
                let _place = room.acquire_owned().await;
                let header = [(range.start as u64).to_le_bytes(), (range.len() as u64).to_le_bytes()];
                let mut stream = connection.open_uni().await?;
                stream.write_all(&header.concat()).await?;
                stream.write_chunk(Bytes::from_owner(Lent(source, range))).await?;
                stream.finish()?;
                anyhow::Ok(())
            });
        }
    }
}

async fn answer(answers: &mut RecvStream) -> anyhow::Result<()> {
    let mut answer = [0; 9];
    tokio::time::timeout(PATIENCE, answers.read_exact(&mut answer)).await.context("no answer")??;
    Ok(())
}

async fn receive(
    endpoint: &Endpoint,
    landing: &Arc<HostRegion>,
    landings: &Arc<Landings>,
) -> anyhow::Result<()> {
    let connection = endpoint.accept().await.context("the endpoint is open")?.await?;
    connection.accept_uni().await?;
    let mut answers = connection.open_uni().await?;
    // Seen by the peer only once something is sent on it.
    answers.write_all(&[1]).await?;
    let (landed, mut to_answer) = tokio::sync::mpsc::channel(1024);
    tokio::spawn(async move {
        while to_answer.recv().await.is_some() {
            if answers.write_all(&[1; 9]).await.is_err() {
                return;
            }
        }
    });
    loop {
        let stream = connection.accept_uni().await?;
        let (landing, landings, landed) = (Arc::clone(landing), Arc::clone(landings), landed.clone());
        tokio::spawn(async move {
            land(stream, &landing).await?;
            landings.note(1);
            landed.send(()).await?;
            anyhow::Ok(())
        });
    }
}

async fn land(mut stream: RecvStream, landing: &HostRegion) -> anyhow::Result<()> {
    let mut header = [0; 16];
    stream.read_exact(&mut header).await?;
    let (start, len) = header.split_at(8);
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize;
    let (start, len) = (number(start), number(len));
    let mut received = 0;
    while let Some(chunk) = stream.read_chunk(usize::MAX, false).await? {
        let at = start + chunk.offset as usize - header.len();
        bytes_mut(landing, at..at + chunk.bytes.len()).copy_from_slice(&chunk.bytes);
        received += chunk.bytes.len();
    }
    ensure!(received == len, "{received} of {len} bytes");
    Ok(())
}
