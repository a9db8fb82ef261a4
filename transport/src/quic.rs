//! The QUIC lane, one connection of a life: writes go out on streams, others come in, acknowledgements go back.

use crate::endpoint::Streams;
use crate::handshake::CloseCode;
use crate::lent::Lent;
use crate::net::header::{ACK_BYTES, Ack, HEADER_BYTES, Header};
use crate::net::lane::{Job, Lane, LaneId, Path};
use crate::net::life::Life;
use crate::net::node::Node;
use crate::window::Landing;
use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream, VarInt, WriteError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::Notify;

/// Streams of writes that are open at once in each direction, at most. Each ends when its bytes have been
/// received: enough of them for small writes to fill a link.
pub(crate) const MAX_STREAMS: u32 = 64;

/// Bytes of acknowledgements that are looked at in one go, at most.
const MAX_ANSWERS: usize = 1024 * ACK_BYTES;

/// The return stream of each side is one more. Writes that are received at all are received to the end: none is
/// ever stuck beside another.
pub(crate) const STREAMS: Streams =
    Streams { protocol: b"tandem-data/1", bidirectional: 1, unidirectional: MAX_STREAMS + 1, independent: 1 };

/// A connection, and what is under way on it.
pub(crate) struct Link {
    id: LaneId,
    pub(crate) connection: Connection,
    /// Of the thread that drives the connection.
    pub(crate) runtime: Handle,
    jobs: Mutex<VecDeque<Job>>,
    more_jobs: Notify,
    /// Bytes submitted and not reported.
    load: AtomicU64,
    sent: Mutex<Sent>,
    more_answers: Notify,
    /// Encoded, to be sent.
    acks: Mutex<Vec<u8>>,
    more_acks: Notify,
    /// Writes landed, and the node loop is to be told.
    landed: Notify,
}

#[derive(Default)]
struct Sent {
    /// Streams of writes that were handed to QUIC and are not acknowledged. While a stream is here, QUIC may
    /// read its source: to send, or to send again.
    streams: BTreeMap<u64, (SendStream, u64)>,
    /// Answered before all bytes had been handed to QUIC: refused, or landed by a lane that failed.
    early: BTreeMap<u64, Ack>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each of these guards single operations on a collection.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The peer broke the rules of the data plane.
struct RuleBroken(&'static str);

impl Link {
    pub(crate) fn new(id: LaneId, connection: Connection, runtime: Handle) -> Arc<Link> {
        Arc::new(Link {
            id,
            connection,
            runtime,
            jobs: Mutex::default(),
            more_jobs: Notify::new(),
            load: AtomicU64::new(0),
            sent: Mutex::default(),
            more_answers: Notify::new(),
            acks: Mutex::default(),
            more_acks: Notify::new(),
            landed: Notify::new(),
        })
    }

    /// No byte is sent on this connection any more, nor read from a source for it.
    pub(crate) fn end(&self, code: CloseCode, reason: &str) {
        self.connection.close(code.into(), reason.as_bytes());
        lock(&self.jobs).clear();
        self.more_jobs.notify_waiters();
        self.more_acks.notify_waiters();
        self.landed.notify_one();
    }

    fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    async fn send_writes(self: Arc<Self>, node: Arc<Node>, life: Arc<Life>) {
        loop {
            let job = loop {
                let more = self.more_jobs.notified();
                if let Some(job) = lock(&self.jobs).pop_front() {
                    break job;
                }
                if self.is_closed() {
                    return;
                }
                more.await;
            };
            // When the connection is lost, the end of the life reports what is left.
            let Ok(mut stream) = self.connection.open_uni().await else {
                return;
            };
            let (sequence, bytes) = (job.sequence, load_of(&job));
            let outcome = tokio::select! {
                outcome = send_write(&mut stream, job) => outcome,
                // QUIC wakes the writer of a stopped stream only if both its windows have room.
                () = self.answered(sequence) => Ok(()),
            };
            match outcome {
                // A write that was answered early is stopped by the reader.
                Ok(()) | Err(WriteError::Stopped(_)) => {}
                Err(_) => return,
            }
            let answered = {
                let mut sent = lock(&self.sent);
                match sent.early.remove(&sequence) {
                    Some(ack) => Some((stream, ack)),
                    None => {
                        sent.streams.insert(sequence, (stream, bytes));
                        None
                    }
                }
            };
            if let Some((stream, ack)) = answered {
                self.forget(stream, bytes);
                node.settle_quietly(&life, &*self, &[(ack.sequence, ack.landed)]);
                node.wake();
            }
        }
    }

    /// Waits until the reader has answered a write that is being handed to QUIC.
    async fn answered(&self, sequence: u64) {
        loop {
            let more = self.more_answers.notified();
            if lock(&self.sent).early.contains_key(&sequence) {
                return;
            }
            more.await;
        }
    }

    /// QUIC never reads a write's source again: the write can be reported.
    fn forget(&self, mut stream: SendStream, bytes: u64) {
        // What QUIC has not seen acknowledged by itself it would send again; a reset makes it forget. On a
        // stream that is done with, this does nothing.
        let _ = stream.reset(VarInt::from_u32(0));
        self.load.fetch_sub(bytes, Ordering::Relaxed);
    }

    async fn receive(self: Arc<Self>, node: Arc<Node>, life: Arc<Life>) {
        let Ok(acks) = self.connection.accept_uni().await else {
            return;
        };
        tokio::spawn(Arc::clone(&self).receive_acks(acks, Arc::clone(&node), Arc::clone(&life)));
        loop {
            node.until_polled().await;
            let Ok(stream) = self.connection.accept_uni().await else {
                return;
            };
            let (link, node, life) = (Arc::clone(&self), Arc::clone(&node), Arc::clone(&life));
            tokio::spawn(async move {
                if let Err(RuleBroken(rule)) = link.receive_write(stream, &node, &life).await {
                    link.broken(&life, rule);
                }
            });
        }
    }

    async fn receive_write(
        &self,
        mut stream: RecvStream,
        node: &Arc<Node>,
        life: &Arc<Life>,
    ) -> Result<(), RuleBroken> {
        let mut bytes = [0; HEADER_BYTES];
        if stream.read_exact(&mut bytes).await.is_err() {
            // Reset or cut off: there is nothing to answer.
            return Ok(());
        }
        let header = Header::decode(&bytes).ok_or(RuleBroken("write header of another version"))?;
        let Header { window, offset, len, immediate, sequence, failed, .. } = header;
        if let Some(generation) = failed {
            if !node.failed_at_peer(life, generation) {
                return Ok(());
            }
            if life.has_landed(sequence) {
                let _ = stream.stop(VarInt::from_u32(0));
                self.acknowledge(Ack { sequence, landed: true });
                return Ok(());
            }
        }
        let Some(landing) = node.windows.find(life.peer, &window, offset, len) else {
            self.refuse(node, life, stream, &header);
            return Ok(());
        };
        let mut received = 0;
        loop {
            match stream.read_chunk(usize::MAX, false).await {
                Ok(Some(chunk)) => {
                    let bytes = chunk.bytes.len() as u64;
                    let at = chunk.offset.checked_sub(HEADER_BYTES as u64);
                    let Some(at) = at.filter(|at| *at <= len && bytes <= len - at) else {
                        return Err(RuleBroken("write longer than its header says"));
                    };
                    received += bytes;
                    if !landing.land(offset + at, &chunk.bytes) {
                        self.refuse(node, life, stream, &header);
                        return Ok(());
                    }
                }
                Ok(None) => break,
                Err(_) => return Ok(()),
            }
        }
        if received != len {
            return Err(RuleBroken("write shorter than its header says"));
        }
        if deposit(&landing, offset, len).await
            && landing.complete(|| node.report_landed_quietly(life.peer, immediate, len, window.key))
        {
            node.count_landed(life, Path::Quic, len);
            self.landed.notify_one();
            self.acknowledge(Ack { sequence, landed: true });
        } else {
            self.refuse(node, life, stream, &header);
        }
        Ok(())
    }

    /// Tells the node loop of what landed: once for all writes that end with the packets that came in together, because
    /// this waits its turn behind their tasks.
    async fn tell_landed(self: Arc<Self>, node: Arc<Node>) {
        while !self.is_closed() {
            self.landed.notified().await;
            node.wake();
        }
    }

    fn refuse(&self, node: &Node, life: &Life, mut stream: RecvStream, header: &Header) {
        node.note_refused(life, Path::Quic, header);
        // The rest need not come; if all of it has, stopping does nothing.
        let _ = stream.stop(VarInt::from_u32(0));
        self.acknowledge(Ack { sequence: header.sequence, landed: false });
    }

    fn acknowledge(&self, ack: Ack) {
        lock(&self.acks).extend_from_slice(&ack.encode());
        self.more_acks.notify_one();
    }

    async fn send_acks(self: Arc<Self>, mut stream: SendStream) {
        loop {
            let more = self.more_acks.notified();
            let acks = std::mem::take(&mut *lock(&self.acks));
            if acks.is_empty() {
                if self.is_closed() {
                    return;
                }
                more.await;
            } else if stream.write_chunk(Bytes::from(acks)).await.is_err() {
                return;
            }
        }
    }

    async fn receive_acks(self: Arc<Self>, mut stream: RecvStream, node: Arc<Node>, life: Arc<Life>) {
        let mut pending = Vec::new();
        while let Ok(Some(chunk)) = stream.read_chunk(MAX_ANSWERS, true).await {
            pending.extend_from_slice(&chunk.bytes);
            let (records, cut) = pending.as_chunks::<ACK_BYTES>();
            let mut fates = Vec::with_capacity(records.len());
            for record in records {
                let Some(ack) = Ack::decode(record) else {
                    return self.broken(&life, "malformed acknowledgement");
                };
                if self.take_ack(&node, ack) {
                    fates.push((ack.sequence, ack.landed));
                }
            }
            node.settle_quietly(&life, &*self, &fates);
            pending = cut.to_vec();
            // Once for all that have come: each time is a switch of threads.
            node.wake();
            // Reading never makes a task wait its turn: however much a peer says, the others of this thread have theirs.
            tokio::task::yield_now().await;
        }
    }

    /// Whether the write can be reported now.
    fn take_ack(&self, node: &Node, ack: Ack) -> bool {
        let stream = {
            let mut sent = lock(&self.sent);
            let stream = sent.streams.remove(&ack.sequence);
            if stream.is_none() && sent.early.len() < node.config.write_limit {
                sent.early.insert(ack.sequence, ack);
                self.more_answers.notify_waiters();
            }
            stream
        };
        let Some((stream, bytes)) = stream else { return false };
        self.forget(stream, bytes);
        true
    }

    fn broken(&self, life: &Life, rule: &str) {
        tracing::warn!(peer = %life.peer, rule, "severed: the peer broke a rule");
        self.end(CloseCode::Rules, rule);
    }
}

impl Lane for Link {
    fn id(&self) -> LaneId {
        self.id
    }

    fn path(&self) -> Path {
        Path::Quic
    }

    fn push(&self, job: Job) {
        self.load.fetch_add(load_of(&job), Ordering::Relaxed);
        lock(&self.jobs).push_back(job);
        self.more_jobs.notify_one();
    }

    fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    /// On the thread that drives the connection.
    fn start(self: Arc<Self>, node: &Arc<Node>, life: &Arc<Life>) {
        let runtime = self.runtime.clone();
        let (node, life) = (Arc::clone(node), Arc::clone(life));
        if !self.connection.remote_address().ip().is_loopback() {
            // Its length is known by now; on the way back through this host there is none.
            self.connection.set_receive_window(node.config.tuning.window(self.connection.rtt()));
        }
        runtime.spawn(async move {
            // The first stream of each side carries its acknowledgements.
            let Ok(acks) = self.connection.open_uni().await else {
                return;
            };
            tokio::spawn(Arc::clone(&self).send_acks(acks));
            tokio::spawn(Arc::clone(&self).tell_landed(Arc::clone(&node)));
            for _ in 0..node.config.streams {
                tokio::spawn(Arc::clone(&self).send_writes(Arc::clone(&node), Arc::clone(&life)));
            }
            self.receive(node, life).await;
        });
    }

    fn close(&self, reason: &str) {
        self.end(CloseCode::Goodbye, reason);
    }
}

/// See [`Landing::deposit`]: not on the thread that drives the connection.
#[cfg(feature = "cuda")]
async fn deposit(landing: &Arc<Landing>, offset: u64, len: u64) -> bool {
    if landing.extent().region().twin().is_none() {
        return true;
    }
    let landing = Arc::clone(landing);
    tokio::task::spawn_blocking(move || landing.deposit(offset, len)).await.unwrap_or(false)
}

#[cfg(not(feature = "cuda"))]
async fn deposit(landing: &Arc<Landing>, offset: u64, len: u64) -> bool {
    landing.deposit(offset, len)
}

/// One more than its bytes, so that empty writes are spread too.
fn load_of(job: &Job) -> u64 {
    job.write.source.len() as u64 + 1
}

async fn send_write(stream: &mut SendStream, job: Job) -> Result<(), WriteError> {
    let header = job.header();
    let source = job.write.source;
    stream.write_all(&header.encode()).await?;
    if !source.is_empty() {
        // QUIC reads the source itself when it builds packets: nothing is copied here.
        stream.write_chunk(Bytes::from_owner(Lent(source))).await?;
    }
    // Fails only when the reader has stopped the stream, which its acknowledgement will say.
    let _ = stream.finish();
    Ok(())
}
