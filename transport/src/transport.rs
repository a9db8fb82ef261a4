//! The seam: [`Transport`], what it is given and what it reports.

use crate::net::lane::Path;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::task::Waker;
use tandem_memory::{Extent, HostRegion, RegionError};
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Window;

/// Moves bytes from memory of this node straight into memory that a peer has opened for it.
///
/// Submit and poll: one thread (the node loop) makes every call, and no call blocks. A backend may work on
/// threads of its own; what they did shows in [`poll`](Transport::poll).
///
/// # Contract
/// Every backend passes `tests/contract`, which checks these points by their numbers.
/// 1. **Connected first.** A peer's life begins with one `Connected` and ends with one `Severed`. Writes
///    are taken and events reported only in between. Connecting again begins another life.
/// 2. **The source is lent.** From `submit` until the write's `Sent` or `Failed`, its bytes must not change
///    and may be read at any time; after it they are never read again.
/// 3. **Sent means landed.** All bytes are visible at the peer, and its `Landed` is queued there (or lost
///    with the peer, or dropped because the window was closed since).
/// 4. **No order between writes**, nor between the bytes of one.
/// 5. **One report for each ticket**: `Sent` or `Failed`, exactly once.
/// 6. **One `Landed` for each write that landed**, after all of its bytes are visible; never for any other.
/// 7. **Only open windows are written**, only by their peer, only inside their bounds. Any other write is
///    refused where it arrives, and `Failed` with [`FailReason::Refused`] where it came from.
/// 8. **Closed is closed.** When `close_window` returns, no byte lands through the window any more, and no
///    later `poll` returns a `Landed` of it. Closing twice, or what never was, does nothing.
/// 9. **Failed says nothing about the peer's memory**: some or all bytes may have landed, or still may,
///    until the peer closes the window or sees `Severed`.
/// 10. **Queues are bounded.** Beyond the limit of unreported writes to a peer, `submit` says `Full`; nobody
///     waits, and one slow peer takes no room from another.
/// 11. **Severed is the end.** Before it, every submitted write has been reported; after it, no byte of the
///     peer lands here, no source is read for it, and all of its windows are closed, also those opened
///     between its end and the report of it.
/// 12. **`sever` is always answered** by `Severed`, also for a peer that never was connected; calls before
///     the answer share it.
/// 13. **The dead are noticed** within the backend's configured time, as `Severed`; so is a failed `connect`.
/// 14. **The waker is called**, from any thread, whenever `poll` has something new to return.
pub trait Transport: Send {
    /// Makes memory usable for windows. Regions stay registered as long as the transport lives.
    ///
    /// # Errors
    /// When the backend cannot use this memory.
    fn register(&mut self, region: Arc<HostRegion>) -> Result<RegionId, TransportError>;

    /// Opens a range of a region for `peer` to write, connected or not yet. It may not overlap another open
    /// window. Until the window is closed, nobody here may read or write the range.
    ///
    /// # Errors
    /// When the region is unknown, or the range leaves it or is open already.
    fn open_window(
        &mut self,
        peer: NodeId,
        region: RegionId,
        range: Range<usize>,
    ) -> Result<Window, TransportError>;

    /// Closes a window (points 8 and 9).
    fn close_window(&mut self, window: Window);

    /// Begins to connect; `Connected` or `Severed` follows. Does nothing while there is a connection, or one
    /// is being made by either side.
    fn connect(&mut self, peer: NodeId, address: SocketAddr);

    /// Starts a write; `Sent` or `Failed` follows.
    ///
    /// # Errors
    /// When the write was not taken. It is not reported then.
    fn submit(&mut self, peer: NodeId, write: Write) -> Result<(), SubmitError>;

    /// Appends what happened since the last call.
    fn poll(&mut self, events: &mut Vec<Event>);

    /// Ends the connection to a peer, and everything under way with it (points 11 and 12).
    fn sever(&mut self, peer: NodeId);

    /// Which way writes to a peer go now, if there are several and it is known.
    fn path(&self, _peer: NodeId) -> Option<Path> {
        None
    }

    /// Whom to wake when `poll` would return something. Replaces the one before.
    fn set_waker(&mut self, waker: Waker);
}

/// A registered region, as its owner's transport numbers it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RegionId(pub u32);

/// One write: local bytes, and where they go at the peer.
#[derive(Clone, Debug)]
pub struct Write {
    /// The caller's name for it, returned in its report. Need not be unique.
    pub ticket: u64,
    /// The bytes. May be empty: then only the immediate travels.
    pub source: Extent,
    /// The window that the peer opened for this node.
    pub window: Window,
    /// Where in the window the first byte goes.
    pub offset: u64,
    /// Handed to the peer with `Landed`.
    pub immediate: u32,
}

/// What [`Transport::poll`] reports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The peer can be written, and can write.
    Connected {
        /// Which peer.
        peer: NodeId,
    },
    /// A write has landed; its source is free.
    Sent {
        /// Where it landed.
        peer: NodeId,
        /// The write.
        ticket: u64,
    },
    /// A write was given up; its source is free.
    Failed {
        /// Where it was to land.
        peer: NodeId,
        /// The write.
        ticket: u64,
        /// Why.
        reason: FailReason,
    },
    /// A write of the peer's has landed here, completely.
    Landed {
        /// The writer.
        peer: NodeId,
        /// What came with the write.
        immediate: u32,
        /// Bytes that landed.
        len: u64,
    },
    /// The connection is over.
    Severed {
        /// Which peer.
        peer: NodeId,
        /// Why.
        reason: SeverReason,
    },
}

/// Why a write failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FailReason {
    /// The peer has no such window open for this node.
    #[error("the peer refused the write: no such window is open")]
    Refused,
    /// The connection ended first.
    #[error("the connection ended before the write was acknowledged")]
    Severed,
}

/// Why a connection ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SeverReason {
    /// `sever` was called here.
    #[error("severed by this node")]
    Asked,
    /// No connection came about.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// The peer ended it, fell silent or broke the rules.
    #[error("connection lost: {0}")]
    Lost(String),
}

/// Why memory cannot be registered, or a window not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No region was registered under this number.
    #[error("region {} is not registered", .0.0)]
    UnknownRegion(RegionId),
    /// The range leaves the region.
    #[error("window in region {}: {source}", region.0)]
    OutOfRegion {
        /// The region.
        region: RegionId,
        /// What leaves it.
        #[source]
        source: RegionError,
    },
    /// Part of the range is open already, to this peer or another.
    #[error("window {}..{} of region {} overlaps one that is open: close that first", range.start, range.end, region.0)]
    Overlap {
        /// The region.
        region: RegionId,
        /// The range asked for.
        range: Range<usize>,
    },
    /// The backend cannot use the memory, or has no more numbers for it.
    #[error("cannot register a region of {len} bytes: {reason}")]
    Unusable {
        /// The region's length.
        len: usize,
        /// What the backend says.
        reason: String,
    },
}

/// Why a write was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubmitError {
    /// As many writes to this peer are under way as may be.
    #[error("{limit} writes to {peer} are under way: submit again after one is reported")]
    Full {
        /// Which peer.
        peer: NodeId,
        /// The limit.
        limit: usize,
    },
    /// There is no connection.
    #[error("{peer} is not connected")]
    NotConnected {
        /// Which peer.
        peer: NodeId,
    },
    /// The write would leave its window.
    #[error("write of {len} bytes at {offset} leaves its window of {window} bytes")]
    OutOfWindow {
        /// Offset in the window.
        offset: u64,
        /// Bytes of the write.
        len: u64,
        /// Bytes of the window.
        window: u64,
    },
}

/// What a transport holds for its peers: for tests of what is left when they are gone.
#[doc(hidden)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Windows that are open.
    pub windows: usize,
    /// Peers that it is connected with.
    pub peers: usize,
    /// Writes that it took and has not reported.
    pub writes: usize,
    /// Connections of QUIC, all their streams with them.
    pub connections: usize,
}

impl Write {
    /// What a backend checks before it takes a write.
    pub(crate) fn check_bounds(&self) -> Result<(), SubmitError> {
        let len = self.source.len() as u64;
        match self.offset.checked_add(len) {
            Some(end) if end <= self.window.len => Ok(()),
            _ => Err(SubmitError::OutOfWindow { offset: self.offset, len, window: self.window.len }),
        }
    }
}
