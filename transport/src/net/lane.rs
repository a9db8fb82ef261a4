//! The seam between a life and what carries its writes.

use super::header::Header;
use super::life::Life;
use super::node::Node;
use crate::transport::Write;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use tandem_memory::Extent;

/// A kind of way between two nodes. Better ones come first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Path {
    /// GPUs of one host: copy engines read the peer's memory. Needs a build with feature `cuda`, and memory on GPUs at
    /// both ends.
    CudaIpc,
    /// Shared memory of one host: one copy.
    Shm,
    /// NCCL between GPUs, over what it finds between them: not encrypted. Needs a build with feature `cuda`,
    /// and memory on GPUs and NCCL at both ends.
    Nccl,
    /// RDMA verbs, over InfiniBand or RoCE: no copy, not encrypted. Needs a build with feature `rdma`.
    Rdma,
    /// TLS 1.3 over TCP: encrypted too, for a fraction of what QUIC costs a processor. For a LAN.
    Tls,
    /// QUIC over UDP: encrypted, between any two hosts. Always there: it carries the session too.
    Quic,
}

impl Path {
    /// All, best first.
    pub const ALL: [Path; 6] = [Path::CudaIpc, Path::Shm, Path::Nccl, Path::Rdma, Path::Tls, Path::Quic];

    /// As it is called in options, logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Path::CudaIpc => "cuda_ipc",
            Path::Shm => "shm",
            Path::Tls => "tls",
            Path::Nccl => "nccl",
            Path::Rdma => "rdma",
            Path::Quic => "quic",
        }
    }

    /// On the wire; never 0.
    pub(crate) fn code(self) -> u8 {
        match self {
            Path::CudaIpc => 5,
            Path::Shm => 1,
            Path::Tls => 3,
            Path::Nccl => 6,
            Path::Rdma => 2,
            Path::Quic => 4,
        }
    }

    pub(crate) fn of_code(code: u8) -> Option<Path> {
        Path::ALL.into_iter().find(|path| path.code() == code)
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Path {
    type Err = String;

    fn from_str(text: &str) -> Result<Path, String> {
        let known = Path::ALL.map(Path::name).join(", ");
        Path::ALL
            .into_iter()
            .find(|path| path.name() == text)
            .ok_or_else(|| format!("no path is called {text:?}: the paths are {known}"))
    }
}

/// Lanes that were made together, as both sides count them in a life. QUIC's own are of [`Generation::SESSION`], and
/// fail with the life; those beside them are made anew when they have failed, and each time the number grows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Generation(pub(crate) u32);

impl Generation {
    pub(crate) const SESSION: Generation = Generation(0);

    pub(crate) fn encode(failed: Option<Generation>) -> u32 {
        failed.map_or(0, |generation| generation.0)
    }

    /// The lanes of a session never fail while it goes on.
    pub(crate) fn decode(number: u32) -> Option<Generation> {
        (number > 0).then_some(Generation(number))
    }
}

/// Which lane of a life; never used again in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct LaneId {
    pub(crate) generation: Generation,
    pub(crate) number: u32,
}

/// A write to be sent.
pub(crate) struct Job {
    pub(crate) sequence: u64,
    pub(crate) write: Write,
    /// See [`Header`].
    pub(crate) floor: u64,
    /// See [`Header`].
    pub(crate) failed: Option<Generation>,
}

impl Job {
    pub(crate) fn header(&self) -> Header {
        Header {
            window: self.write.window,
            offset: self.write.offset,
            len: self.write.source.len() as u64,
            immediate: self.write.immediate,
            sequence: self.sequence,
            floor: self.floor,
            failed: self.failed,
        }
    }
}

/// One way for the writes of a life, in both directions.
///
/// A lane lands the peer's writes through the node's windows and answers each, and settles its own when they
/// are answered: [`Node::settle_quietly`]. When it fails while the life goes on it says so, once, with
/// [`Node::lane_failed`]; all lanes of its generation are left then, and what they have not settled is repeated on
/// others. It answers what has landed only after [`Life::note_landed`], so that what is repeated for want of an answer
/// lands once.
pub(crate) trait Lane: Send + Sync {
    fn id(&self) -> LaneId;

    fn path(&self) -> Path;

    /// Whether it reads this source's twin by itself; else it reads the host's side.
    #[cfg(feature = "cuda")]
    fn reads_twin(&self, _source: &Extent) -> bool {
        false
    }

    /// Takes a write. Never blocks. The lane may be closed already: then it does nothing.
    fn push(&self, job: Job);

    /// Bytes pushed and not settled.
    fn load(&self) -> u64;

    /// Begins to carry writes.
    fn start(self: Arc<Self>, node: &Arc<Node>, life: &Arc<Life>);

    /// When it returns, nothing lands here through this lane any more, and no source is read for it; if the
    /// peer still reads one, it finds out before it reports the landing. Waits for a copy in progress at
    /// most. Called without the lock of the life or of a window.
    fn close(&self, reason: &str);
}
