//! One connection of a life: writes go out on streams, others come in, acknowledgements go back.

use super::header::{ACK_BYTES, Ack, HEADER_BYTES, Header};
use super::life::Life;
use super::node::Node;
use crate::handshake::CloseCode;
use crate::lent::Lent;
use crate::transport::Write;
use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream, VarInt, WriteError};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::Notify;

/// Streams of writes that are open at once in each direction, at most. Each ends when its bytes have been
/// received: enough of them for small writes to fill a link.
pub(super) const MAX_STREAMS: u32 = 64;

/// A write to be sent.
pub(super) struct Job {
    pub(super) sequence: u64,
    pub(super) write: Write,
}

/// A connection, and what is under way on it.
pub(super) struct Link {
    pub(super) connection: Connection,
    /// Of the thread that drives the connection.
    pub(super) runtime: Handle,
    jobs: Mutex<VecDeque<Job>>,
    more_jobs: Notify,
    /// Bytes submitted and not reported.
    load: AtomicU64,
    sent: Mutex<Sent>,
    more_refused: Notify,
    /// Encoded, to be sent.
    acks: Mutex<Vec<u8>>,
    more_acks: Notify,
}

#[derive(Default)]
struct Sent {
    /// Streams of writes that were handed to QUIC and are not acknowledged. While a stream is here, QUIC may
    /// read its source: to send, or to send again.
    streams: BTreeMap<u64, SendStream>,
    /// Refused before all bytes had been handed to QUIC.
    refused: BTreeSet<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each of these guards single operations on a collection.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The peer broke the rules of the data plane.
struct RuleBroken(&'static str);

impl Link {
    pub(super) fn new(connection: Connection, runtime: Handle) -> Arc<Link> {
        Arc::new(Link {
            connection,
            runtime,
            jobs: Mutex::default(),
            more_jobs: Notify::new(),
            load: AtomicU64::new(0),
            sent: Mutex::default(),
            more_refused: Notify::new(),
            acks: Mutex::default(),
            more_acks: Notify::new(),
        })
    }

    pub(super) fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    pub(super) fn unload(&self, bytes: u64) {
        self.load.fetch_sub(bytes + 1, Ordering::Relaxed);
    }

    pub(super) fn push(&self, job: Job) {
        // One more than its bytes, so that empty writes are spread too.
        self.load.fetch_add(job.write.source.len() as u64 + 1, Ordering::Relaxed);
        lock(&self.jobs).push_back(job);
        self.more_jobs.notify_one();
    }

    /// No byte is sent on this connection any more, nor read from a source for it.
    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        self.connection.close(code.into(), reason.as_bytes());
        lock(&self.jobs).clear();
        self.more_jobs.notify_waiters();
        self.more_acks.notify_waiters();
    }

    fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    /// Starts the work, on the thread that drives the connection.
    pub(super) fn start(self: Arc<Self>, node: Arc<Node>, life: Arc<Life>) {
        let runtime = self.runtime.clone();
        runtime.spawn(async move {
            // The first stream of each side carries its acknowledgements.
            let Ok(acks) = self.connection.open_uni().await else {
                return;
            };
            tokio::spawn(Arc::clone(&self).send_acks(acks));
            for _ in 0..node.config.streams {
                tokio::spawn(Arc::clone(&self).send_writes(Arc::clone(&node), Arc::clone(&life)));
            }
            self.receive(node, life).await;
        });
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
            let sequence = job.sequence;
            let outcome = tokio::select! {
                outcome = send_write(&mut stream, job) => outcome,
                // QUIC wakes the writer of a stopped stream only if both its windows have room.
                () = self.refused(sequence) => Ok(()),
            };
            match outcome {
                // A refused write is stopped by the reader, whose acknowledgement follows.
                Ok(()) | Err(WriteError::Stopped(_)) => {}
                Err(_) => return,
            }
            let refused = {
                let mut sent = lock(&self.sent);
                if sent.refused.remove(&sequence) {
                    Some(stream)
                } else {
                    sent.streams.insert(sequence, stream);
                    None
                }
            };
            if let Some(stream) = refused {
                self.settle(&node, &life, stream, Ack { sequence, landed: false });
            }
        }
    }

    /// Waits until the reader has refused a write that is being handed to QUIC.
    async fn refused(&self, sequence: u64) {
        loop {
            let more = self.more_refused.notified();
            if lock(&self.sent).refused.contains(&sequence) {
                return;
            }
            more.await;
        }
    }

    /// Reports a write, after making sure that QUIC never reads its source again.
    fn settle(&self, node: &Node, life: &Life, mut stream: SendStream, ack: Ack) {
        // What QUIC has not seen acknowledged by itself it would send again; a reset makes it forget. On a
        // stream that is done with, this does nothing.
        let _ = stream.reset(VarInt::from_u32(0));
        node.settle(life, ack.sequence, ack.landed);
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
                    tracing::warn!(peer = %life.peer, rule, "severed: the peer broke a rule");
                    link.close(CloseCode::Rules, rule);
                }
            });
        }
    }

    async fn receive_write(
        &self,
        mut stream: RecvStream,
        node: &Node,
        life: &Life,
    ) -> Result<(), RuleBroken> {
        let mut bytes = [0; HEADER_BYTES];
        if stream.read_exact(&mut bytes).await.is_err() {
            // Reset or cut off: there is nothing to answer.
            return Ok(());
        }
        let header = Header::decode(&bytes).ok_or(RuleBroken("write header of another version"))?;
        let Header { window, offset, len, immediate, sequence } = header;
        let Some(landing) = node.windows.find(life.peer, &window, offset, len) else {
            self.refuse(node, stream, sequence);
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
                        self.refuse(node, stream, sequence);
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
        if landing.complete(|| node.report_landed(life.peer, immediate, len, window.key)) {
            node.count_landed(len);
            self.acknowledge(Ack { sequence, landed: true });
        } else {
            self.refuse(node, stream, sequence);
        }
        Ok(())
    }

    fn refuse(&self, node: &Node, mut stream: RecvStream, sequence: u64) {
        node.count_refused();
        // The rest need not come; if all of it has, stopping does nothing.
        let _ = stream.stop(VarInt::from_u32(0));
        self.acknowledge(Ack { sequence, landed: false });
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
        let mut record = [0; ACK_BYTES];
        while stream.read_exact(&mut record).await.is_ok() {
            let Some(ack) = Ack::decode(&record) else {
                return self.close(CloseCode::Rules, "malformed acknowledgement");
            };
            let stream = {
                let mut sent = lock(&self.sent);
                let stream = sent.streams.remove(&ack.sequence);
                if stream.is_none() && !ack.landed && sent.refused.len() < node.config.write_limit {
                    sent.refused.insert(ack.sequence);
                    self.more_refused.notify_waiters();
                }
                stream
            };
            match stream {
                Some(stream) => self.settle(&node, &life, stream, ack),
                // It cannot have landed before all of it was handed to QUIC.
                None if ack.landed => return self.close(CloseCode::Rules, "unknown write acknowledged"),
                None => {}
            }
        }
    }
}

async fn send_write(stream: &mut SendStream, job: Job) -> Result<(), WriteError> {
    let Job { sequence, write: Write { source, window, offset, immediate, .. } } = job;
    let header = Header { window, offset, len: source.len() as u64, immediate, sequence };
    stream.write_all(&header.encode()).await?;
    if !source.is_empty() {
        // QUIC reads the source itself when it builds packets: nothing is copied here.
        stream.write_chunk(Bytes::from_owner(Lent(source))).await?;
    }
    // Fails only when the reader has stopped the stream, which its acknowledgement will say.
    let _ = stream.finish();
    Ok(())
}
