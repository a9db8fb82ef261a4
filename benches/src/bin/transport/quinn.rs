//! quinn with the transport's settings and without its layers: a stream for each write, one answer each.

use crate::pattern::{Slots, bytes, bytes_mut};
use crate::{PATIENCE, Sender, here};
use anyhow::{Context, ensure};
use bytes::Bytes;
use quinn::{Connection, Endpoint, RecvStream};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_transport::{Identity, Tuning, bare_endpoint};
use tokio::runtime::Runtime;

/// Between samples nothing drives the sending side.
const SILENCE: Duration = Duration::from_secs(600);

pub(crate) struct Bare {
    runtime: Runtime,
    _endpoint: Endpoint,
    connection: Connection,
    answers: RecvStream,
    source: Arc<HostRegion>,
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

impl Bare {
    pub(crate) fn connect(
        hello: &str,
        identity: &Identity,
        tuning: Tuning,
        source: Arc<HostRegion>,
    ) -> anyhow::Result<Bare> {
        let runtime = runtime()?;
        let addr: SocketAddr = hello.parse()?;
        let (endpoint, connection, answers) = runtime.block_on(async {
            let (endpoint, connect) = bare_endpoint(here()?, identity, &patient(tuning))?;
            let connection = connect(addr)?.await?;
            // Seen by the peer only once something is sent on it.
            connection.open_uni().await?.write_all(&[1]).await?;
            let mut answers = connection.accept_uni().await?;
            answers.read_exact(&mut [0]).await?;
            anyhow::Ok((endpoint, connection, answers))
        })?;
        Ok(Bare { runtime, _endpoint: endpoint, connection, answers, source })
    }
}

impl Sender for Bare {
    fn run(&mut self, slots: Slots, time: Duration) -> anyhow::Result<u64> {
        let (connection, source, answers) = (&self.connection, &self.source, &mut self.answers);
        self.runtime.block_on(async {
            let begun = Instant::now();
            let (mut sent, mut landed) = (0u64, 0u64);
            // As many streams at once as the transport has: four.
            let room = Arc::new(tokio::sync::Semaphore::new(4));
            loop {
                let more = begun.elapsed() < time || sent <= slots.count as u64;
                if !more && landed == sent {
                    return Ok(landed);
                }
                if more && sent - landed < slots.depth() as u64 {
                    let range = slots.range(sent);
                    let (connection, source, room) =
                        (connection.clone(), Arc::clone(source), Arc::clone(&room));
                    tokio::spawn(async move {
                        let _place = room.acquire_owned().await;
                        let header = [(range.start as u64).to_le_bytes(), (range.len() as u64).to_le_bytes()];
                        let mut stream = connection.open_uni().await?;
                        stream.write_all(&header.concat()).await?;
                        stream.write_chunk(Bytes::from_owner(Lent(source, range))).await?;
                        stream.finish()?;
                        anyhow::Ok(())
                    });
                    sent += 1;
                    continue;
                }
                let mut answer = [0; 9];
                tokio::time::timeout(PATIENCE, answers.read_exact(&mut answer))
                    .await
                    .context("no answer")??;
                landed += 1;
            }
        })
    }
}

fn patient(tuning: Tuning) -> Tuning {
    let Tuning { dead_after, keep_alive, .. } = Tuning::dead_after(SILENCE);
    Tuning { dead_after, keep_alive, ..tuning }
}

pub(crate) fn receive(identity: &Identity, tuning: Tuning, landing: Arc<HostRegion>) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let (endpoint, _) = {
        let _inside = runtime.enter();
        bare_endpoint(here()?, identity, &patient(tuning))?
    };
    println!("{}", endpoint.local_addr()?);
    std::thread::spawn(move || {
        let outcome: anyhow::Result<()> = runtime.block_on(async {
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
                let (landing, landed) = (Arc::clone(&landing), landed.clone());
                tokio::spawn(async move {
                    land(stream, &landing).await?;
                    landed.send(()).await?;
                    anyhow::Ok(())
                });
            }
        });
        drop(outcome);
    });
    Ok(())
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
