//! The tier's own memory for transfers, and copies between it and the memory of calls.
//!
//! Every piece is one operation's from when it is taken until it is put back, so nobody else touches it meanwhile.

use super::segment::BLOCK;
use tandem_memory::{Extent, HostRegion, RegionError};
use tandem_proto::stored::MAX_HEADER_BYTES;

/// The longest header of an entry: what is encoded has a frame of 28 bytes, and the stamp.
pub(super) const HEADER_ROOM: usize = (MAX_HEADER_BYTES + 28 + super::segment::STAMP).next_multiple_of(BLOCK);
/// The most bytes of whole chunks that are copied at once, since their memory does not begin at a block. One chunk may
/// always be.
const COPY_BYTES: usize = 64 << 20;

/// What each operation needs besides the chunk's memory.
#[derive(Debug)]
pub(super) struct Scratch {
    pub(super) header: Extent,
    /// The chunk's last bytes, if they do not fill a block.
    pub(super) tail: Extent,
    pub(super) record: Extent,
}

impl Scratch {
    /// Memory for so many operations.
    pub(super) fn cut(count: usize) -> Result<Vec<Scratch>, RegionError> {
        const EACH: usize = HEADER_ROOM + 2 * BLOCK;
        let region = HostRegion::private(count * EACH)?;
        let piece = |at: usize, len| region.extent(at..at + len);
        (0..count)
            .map(|index| {
                let at = index * EACH;
                let (tail, record) = (piece(at + HEADER_ROOM, BLOCK)?, at + HEADER_ROOM + BLOCK);
                let record = piece(record, super::segment::RECORD)?;
                Ok(Scratch { header: piece(at, HEADER_ROOM)?, tail, record })
            })
            .collect()
    }
}

/// A block of zeros.
pub(super) fn blank() -> Result<Extent, RegionError> {
    HostRegion::private(BLOCK)?.extent(0..BLOCK)
}

/// Places for whole chunks whose own memory does not begin at a block.
#[derive(Debug, Default)]
pub(super) struct Copies {
    free: Vec<Extent>,
    /// Bytes of all, taken or not.
    bytes: usize,
}

impl Copies {
    /// A place of whole blocks for so many bytes; None while others must come back first.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Extent> {
        let bytes = bytes.next_multiple_of(BLOCK);
        if let Some(at) = self.free.iter().position(|free| free.len() == bytes) {
            return Some(self.free.swap_remove(at));
        }
        while self.bytes > 0 && self.bytes + bytes > COPY_BYTES {
            self.bytes -= self.free.pop()?.len();
        }
        let copy = HostRegion::private(bytes).and_then(|region| region.extent(0..bytes)).ok()?;
        self.bytes += bytes;
        Some(copy)
    }

    pub(super) fn put(&mut self, copy: Extent) {
        self.free.push(copy);
    }
}

/// Whether direct I/O can begin there.
pub(super) fn aligned(extent: &Extent) -> bool {
    (extent.region().base().addr() + extent.offset()).is_multiple_of(BLOCK)
}

/// The blocks that a chunk of this memory is moved from, or to: itself and a block for its last bytes, or a copy.
pub(super) fn blocks(body: &Extent, copy: Option<&Extent>, tail: &Extent) -> Vec<Extent> {
    let part = |extent: &Extent, end| extent.part(0..end).expect("it is as long");
    if let Some(copy) = copy {
        return vec![part(copy, body.len().next_multiple_of(BLOCK))];
    }
    let whole = body.len() / BLOCK * BLOCK;
    let mut blocks = Vec::with_capacity(3);
    if whole > 0 {
        blocks.push(part(body, whole));
    }
    if whole < body.len() {
        blocks.push(tail.clone());
    }
    blocks
}

/// Copies what of a chunk does not go straight from its memory.
pub(super) fn gather(body: &Extent, copy: Option<&Extent>, tail: &Extent) {
    let (start, to) = apart(body, copy, tail);
    // SAFETY: the caller of the tier changes nothing until it is answered.
    let from = &unsafe { body.bytes() }[start..];
    // The rest of the last block would be whatever was there before.
    fill(to, from);
}

/// Copies what of a chunk does not come straight to its memory.
pub(super) fn spread(body: &Extent, copy: Option<&Extent>, tail: &Extent) {
    let (start, from) = apart(body, copy, tail);
    let rest = body.len() - start;
    // SAFETY: the caller of the tier leaves it alone until it is answered; `from` is the operation's.
    unsafe { body.bytes_mut()[start..].copy_from_slice(&from.bytes()[..rest]) };
}

/// Where what is copied begins, and its other place.
fn apart<'a>(body: &Extent, copy: Option<&'a Extent>, tail: &'a Extent) -> (usize, &'a Extent) {
    copy.map_or((body.len() / BLOCK * BLOCK, tail), |copy| (0, copy))
}

/// Writes an operation's memory, with zeros after `bytes`.
pub(super) fn fill(extent: &Extent, bytes: &[u8]) {
    // SAFETY: it is the operation's, and no transfer of it is under way.
    let (start, rest) = unsafe { extent.bytes_mut() }.split_at_mut(bytes.len());
    start.copy_from_slice(bytes);
    rest.fill(0);
}

/// Reads an operation's memory.
pub(super) fn read(extent: &Extent) -> &[u8] {
    // SAFETY: as above; whoever holds the result holds the extent, and begins no transfer meanwhile.
    unsafe { extent.bytes() }
}
