//! What the records of a lane hold: frames, and between them the bodies of writes.
//!
//! A write is a frame with its header and its last bytes, then its body: records that are full but for the last,
//! each opened straight into its place. The byte that TLS puts after a record's content falls on the first byte
//! of what comes next in the same write, and the last bytes are put in their place last of all: so no byte
//! beyond the write is ever touched.
//!
//! While a body is on its way, short frames may come between its records. Records of a body are longer than
//! those can be, so the two are told apart by their length.

use super::record::MAX_CONTENT;
use crate::net::header::{ACK_BYTES, Ack, HEADER_BYTES, Header};
use tandem_proto::ids::NodeId;

/// The most that a frame between the records of a body holds.
pub(super) const SHORT_FRAME: usize = 2048;
/// The last bytes of a write travel with its header, if they are at most this many.
pub(super) const MAX_TAIL: usize = 4096;
/// Otherwise only these do. The record before them is then longer than any short frame.
const CUT_TAIL: usize = 64;
/// The most acknowledgements of one frame.
pub(super) const MAX_ACKS: usize = (SHORT_FRAME - 1) / ACK_BYTES;

const WRITE: u8 = 1;
const ACKS: u8 = 2;
const STOP: u8 = 3;
const CUT: u8 = 4;
const HELLO: u8 = 5;
const WELCOME: u8 = 6;
const CHANNEL: u8 = 7;
const MESSAGE: u8 = 8;

/// How many of a write's bytes its body has. The others, at least one of them, travel with its header.
pub(super) fn body_of(len: u64) -> u64 {
    let record = MAX_CONTENT as u64;
    if len <= MAX_TAIL as u64 {
        return 0;
    }
    let rest = len % record;
    if (1..=MAX_TAIL as u64).contains(&rest) { len - rest } else { len - CUT_TAIL as u64 }
}

/// How many of the body's bytes the record at `at` has.
pub(super) fn piece_at(body: u64, at: u64) -> usize {
    // At most `MAX_CONTENT`.
    (body - at).min(MAX_CONTENT as u64) as usize
}

/// What one record says.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Frame<'a> {
    /// A write begins.
    Write { header: Header, tail: &'a [u8] },
    /// Fates of writes, encoded.
    Acks(&'a [u8]),
    /// The sender of this does not want the rest of that write.
    Stop(u64),
    /// The rest of that write does not come, as was wished.
    Cut(u64),
    /// The dialler's first frame: which session the connection is of.
    Hello(Hello),
    /// The answerer's first frame: it is taken.
    Welcome,
    /// In place of [`Frame::Hello`]: the connection carries messages of a lane of another kind.
    Channel(Hello),
    /// One of those.
    Message(&'a [u8]),
}

/// Names the session that a connection belongs to.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) node: NodeId,
    pub(super) life: u64,
    /// The life's, as the answerer told it on the session.
    pub(super) secret: [u8; SECRET_BYTES],
}

const SECRET_BYTES: usize = 32;

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hello({}, life {})", self.node, self.life)
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

impl Frame<'_> {
    /// None if it is none that there is.
    pub(super) fn decode(bytes: &[u8]) -> Option<Frame<'_>> {
        let (kind, mut rest) = bytes.split_first()?;
        let frame = match *kind {
            WRITE => {
                let header = Header::decode(&take::<HEADER_BYTES>(&mut rest)?)?;
                let tail = std::mem::take(&mut rest);
                if header.len.checked_sub(body_of(header.len))? != tail.len() as u64 {
                    return None;
                }
                Frame::Write { header, tail }
            }
            ACKS => {
                let acks = std::mem::take(&mut rest);
                if acks.is_empty() || acks.len() % ACK_BYTES != 0 || acks.len() > MAX_ACKS * ACK_BYTES {
                    return None;
                }
                Frame::Acks(acks)
            }
            STOP => Frame::Stop(u64::from_le_bytes(take(&mut rest)?)),
            CUT => Frame::Cut(u64::from_le_bytes(take(&mut rest)?)),
            HELLO | CHANNEL => {
                let hello = Hello {
                    node: NodeId(u64::from_le_bytes(take(&mut rest)?)),
                    life: u64::from_le_bytes(take(&mut rest)?),
                    secret: take(&mut rest)?,
                };
                if *kind == HELLO { Frame::Hello(hello) } else { Frame::Channel(hello) }
            }
            MESSAGE => Frame::Message(std::mem::take(&mut rest)),
            WELCOME => Frame::Welcome,
            _ => return None,
        };
        rest.is_empty().then_some(frame)
    }

    /// Appends it.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Frame::Write { header, tail } => {
                out.push(WRITE);
                out.extend_from_slice(&header.encode());
                out.extend_from_slice(tail);
            }
            Frame::Acks(acks) => {
                out.push(ACKS);
                out.extend_from_slice(acks);
            }
            Frame::Stop(sequence) => {
                out.push(STOP);
                out.extend_from_slice(&sequence.to_le_bytes());
            }
            Frame::Cut(sequence) => {
                out.push(CUT);
                out.extend_from_slice(&sequence.to_le_bytes());
            }
            Frame::Hello(hello) | Frame::Channel(hello) => {
                let Hello { node, life, secret } = hello;
                out.push(if matches!(self, Frame::Hello(_)) { HELLO } else { CHANNEL });
                out.extend_from_slice(&node.0.to_le_bytes());
                out.extend_from_slice(&life.to_le_bytes());
                out.extend_from_slice(secret);
            }
            Frame::Welcome => out.push(WELCOME),
            Frame::Message(message) => {
                out.push(MESSAGE);
                out.extend_from_slice(message);
            }
        }
    }
}

/// The acknowledgements of a frame; None in place of one that is none.
pub(super) fn acks(encoded: &[u8]) -> impl Iterator<Item = Option<Ack>> + '_ {
    encoded.as_chunks::<ACK_BYTES>().0.iter().map(Ack::decode)
}

/// What decodes is what would be encoded.
pub(super) fn fuzz(bytes: &[u8]) {
    if let Some(frame) = Frame::decode(bytes) {
        let mut again = Vec::new();
        frame.encode(&mut again);
        assert_eq!(again, bytes);
        if let Frame::Acks(encoded) = frame {
            assert!(acks(encoded).count() <= MAX_ACKS);
        }
    }
}

/// Of each, one to be damaged by fuzzing.
pub(super) fn samples() -> Vec<Vec<u8>> {
    let mut encoded = crate::net::header::samples().into_iter();
    let header = encoded.next().and_then(|bytes| Header::decode(bytes.first_chunk()?));
    let acks = encoded.next().unwrap_or_default();
    let write = header.map(|header| {
        let tail = vec![7; (header.len - body_of(header.len)) as usize];
        let mut bytes = Vec::new();
        Frame::Write { header, tail: &tail }.encode(&mut bytes);
        bytes
    });
    let hello = Hello { node: NodeId(1), life: 2, secret: [4; SECRET_BYTES] };
    let channel = Frame::Channel(hello.clone());
    let others = [Frame::Acks(&acks), Frame::Stop(9), Frame::Cut(10), Frame::Hello(hello), Frame::Welcome];
    let others = others.into_iter().chain([channel, Frame::Message(&[11; 3])]);
    let others = others.map(|frame| {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        bytes
    });
    write.into_iter().chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_proto::wire::Window;

    #[test]
    fn a_write_is_cut_so_that_its_records_are_told_from_short_frames() {
        let record = MAX_CONTENT as u64;
        let lengths = (0..5000)
            .chain(record - 70..record + 4200)
            .chain(3 * record - 70..3 * record + 4200)
            .chain([1 << 30, u64::MAX]);
        for len in lengths {
            let body = body_of(len);
            let tail = len - body;
            assert!(tail <= MAX_TAIL as u64 && (tail > 0 || len == 0), "{len}");
            let last = match (body, body % record) {
                (0, _) => continue,
                (_, 0) => record,
                (_, short) => short,
            };
            assert!(last > SHORT_FRAME as u64, "{len}: the last record of its body has {last}");
            assert_eq!(piece_at(body, body - last), last as usize);
        }
    }

    #[test]
    fn frames_survive_the_wire() {
        let window = Window { region: 1, key: 2, offset: 3, len: 1 << 20 };
        let header =
            Header { window, offset: 4, len: 20_000, immediate: 5, sequence: 6, floor: 7, failed: None };
        let tail = vec![7; (20_000 - body_of(20_000)) as usize];
        let acks: Vec<u8> =
            (0..3).flat_map(|sequence| Ack { sequence, landed: sequence == 1 }.encode()).collect();
        let hello = Hello { node: NodeId(1), life: 2, secret: [4; SECRET_BYTES] };
        for frame in [
            Frame::Write { header, tail: &tail },
            Frame::Acks(&acks),
            Frame::Stop(9),
            Frame::Cut(10),
            Frame::Hello(hello.clone()),
            Frame::Welcome,
            Frame::Channel(hello),
        ] {
            let mut bytes = Vec::new();
            frame.encode(&mut bytes);
            assert_eq!(Frame::decode(&bytes), Some(frame));
            bytes.push(0);
            assert_eq!(Frame::decode(&bytes), None);
            bytes.truncate(bytes.len() - 2);
            assert_eq!(Frame::decode(&bytes), None);
        }
        assert_eq!(Frame::decode(&[MESSAGE, 1, 2]), Some(Frame::Message(&[1, 2])));
        assert_eq!(Frame::decode(&[]), None);
        assert_eq!(Frame::decode(&[99]), None);
    }
}
