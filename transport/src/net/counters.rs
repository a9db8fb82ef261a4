//! What is counted of the writes: by path, and by peer and path. A write costs a handful of additions, a byte none.

use super::lane::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tandem_proto::ids::NodeId;

/// Bounds of [`WriteTimes`], in microseconds: from a small write on one host to one that waits for a slow link.
pub const WRITE_TIME_BOUNDS_US: [u64; 14] =
    [50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 5_000_000];

/// How long writes took, from `submit` to `Sent`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteTimes {
    /// Writes for each of [`WRITE_TIME_BOUNDS_US`] that took no longer and longer than the bound before; at the end
    /// those that took longer than all.
    pub counts: [u64; WRITE_TIME_BOUNDS_US.len() + 1],
    /// All of them together, in microseconds.
    pub sum_us: u64,
}

/// What has happened on one path, with one peer or with all. All but the queue only grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PathMetrics {
    /// Which.
    pub path: Path,
    /// Writes that landed at peers.
    pub writes_sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
    /// How long they took.
    pub times: WriteTimes,
    /// Writes that landed here.
    pub writes_landed: u64,
    /// Their bytes.
    pub bytes_landed: u64,
    /// Writes that the peer refused.
    pub writes_refused: u64,
    /// Writes that the end of the session cut off.
    pub writes_severed: u64,
    /// Writes that were sent again on another path, because this one had failed.
    pub writes_repeated: u64,
    /// Writes of the peer's that were refused here.
    pub landings_refused: u64,
    /// Lanes that were opened.
    pub opened: u64,
    /// Lanes that failed while their session went on.
    pub failed: u64,
    /// Writes that are submitted and not reported now.
    pub queued_writes: u64,
    /// Their bytes.
    pub queued_bytes: u64,
}

/// Bytes that are registered with all RDMA devices of this host now, by where they are and how a device comes to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RdmaMemory {
    /// Of the host; also those that stand for a GPU's, which are copied between the two.
    pub host: u64,
    /// Of a GPU, by a dma-buf.
    pub dma_buf: u64,
    /// Of a GPU, by nvidia-peermem.
    pub peermem: u64,
}

/// What there is to say about a peer: its session, or the last one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerStatus {
    /// Which.
    pub peer: NodeId,
    /// The path that writes take now; none if there is no session.
    pub path: Option<Path>,
    /// Why no better one, as far as is known: empty if there is none better. Of a session that is over, why it is.
    pub why: String,
    /// How long this has been so.
    pub since: Duration,
    /// Whether this node dialled.
    pub dialled_here: bool,
    /// QUIC packets sent.
    pub packets_sent: u64,
    /// QUIC packets that had to be sent again.
    pub packets_lost: u64,
    /// By path, in the order of [`Path::ALL`], over all sessions with the peer.
    pub paths: [PathMetrics; Path::ALL.len()],
}

#[derive(Default)]
pub(super) struct PathCounters {
    pub(super) writes_sent: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
    times: [AtomicU64; WRITE_TIME_BOUNDS_US.len() + 1],
    times_sum_us: AtomicU64,
    pub(super) writes_landed: AtomicU64,
    pub(super) bytes_landed: AtomicU64,
    writes_refused: AtomicU64,
    writes_severed: AtomicU64,
    pub(super) writes_repeated: AtomicU64,
    pub(super) landings_refused: AtomicU64,
    pub(super) opened: AtomicU64,
    pub(super) failed: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    if n > 0 {
        counter.fetch_add(n, Relaxed);
    }
}

/// Writes whose fates became known together.
#[derive(Default)]
pub(crate) struct Settled {
    sent: u64,
    bytes_sent: u64,
    times: WriteTimes,
    refused: u64,
    bytes: u64,
}

impl Settled {
    pub(super) fn add(&mut self, landed: bool, bytes: u64, took: Duration) {
        self.bytes += bytes;
        if !landed {
            self.refused += 1;
            return;
        }
        let took_us = took.as_micros() as u64;
        self.sent += 1;
        self.bytes_sent += bytes;
        self.times.counts[WRITE_TIME_BOUNDS_US.partition_point(|bound| *bound < took_us)] += 1;
        self.times.sum_us += took_us;
    }

    /// All of them.
    pub(crate) fn writes(&self) -> u64 {
        self.sent + self.refused
    }

    /// Their bytes, landed or not.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl PathCounters {
    pub(super) fn settled(&self, settled: &Settled) {
        add(&self.writes_sent, settled.sent);
        add(&self.bytes_sent, settled.bytes_sent);
        add(&self.times_sum_us, settled.times.sum_us);
        add(&self.writes_refused, settled.refused);
        for (count, of_these) in self.times.iter().zip(settled.times.counts) {
            add(count, of_these);
        }
    }

    pub(super) fn severed(&self) {
        add(&self.writes_severed, 1);
    }

    pub(super) fn landed(&self, bytes: u64) {
        add(&self.writes_landed, 1);
        add(&self.bytes_landed, bytes);
    }

    pub(super) fn metrics(&self, path: Path, (queued_writes, queued_bytes): (u64, u64)) -> PathMetrics {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        PathMetrics {
            path,
            writes_sent: get(&self.writes_sent),
            bytes_sent: get(&self.bytes_sent),
            times: WriteTimes { counts: self.times.each_ref().map(get), sum_us: get(&self.times_sum_us) },
            writes_landed: get(&self.writes_landed),
            bytes_landed: get(&self.bytes_landed),
            writes_refused: get(&self.writes_refused),
            writes_severed: get(&self.writes_severed),
            writes_repeated: get(&self.writes_repeated),
            landings_refused: get(&self.landings_refused),
            opened: get(&self.opened),
            failed: get(&self.failed),
            queued_writes,
            queued_bytes,
        }
    }
}

/// What is counted with one peer, over all of its lives.
#[derive(Default)]
pub(crate) struct PeerCounters {
    pub(super) paths: [PathCounters; Path::ALL.len()],
    /// Of connections that are over.
    pub(super) packets_sent: AtomicU64,
    pub(super) packets_lost: AtomicU64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_counted_in_the_bucket_of_its_time() {
        let (counters, mut settled) = (PathCounters::default(), Settled::default());
        for took_us in [0, 50, 51, 5_000_000, 5_000_001] {
            settled.add(true, 10, Duration::from_micros(took_us));
        }
        counters.settled(&settled);
        let metrics = counters.metrics(Path::Tls, (3, 30));
        let mut expected = [0; WRITE_TIME_BOUNDS_US.len() + 1];
        (expected[0], expected[1], expected[13], expected[14]) = (2, 1, 1, 1);
        assert_eq!(metrics.times, WriteTimes { counts: expected, sum_us: 10_000_102 });
        assert_eq!((metrics.writes_sent, metrics.bytes_sent, metrics.queued_bytes), (5, 50, 30));
    }
}
