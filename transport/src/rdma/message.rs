//! What the two ends of a lane tell each other, on a queue pair of its own.
//!
//! ```text
//! writer                                   reader
//!   │ Ask (header) ──────────────────────────▶│ opens the window to the lane's queue pairs
//!   │◀──────────────────────── Keys (of window)│
//!   │ Write (header, parts) ─────────────────▶│
//!   │ ═════ bytes, an immediate a queue pair ═▶│ counts the immediates to `parts`, in any order
//!   │◀──────────────────────────────────── Acks│
//! ```
//! Later writes to the window begin with `Write`; `Shut` says that the keys are worth nothing any more.

use super::MAX_DATA_PAIRS;
use crate::net::header::{ACK_BYTES, Ack, HEADER_BYTES, Header};

/// The most bytes of a message: they travel inside the work request, which NICs have limits for.
pub(super) const MESSAGE_BYTES: usize = 80;
/// The most acknowledgements in one message.
pub(super) const MAX_ACKS: usize = 8;

/// A message, and the receives that the sender has posted again since its last one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Envelope {
    pub(super) credits: u16,
    pub(super) message: Message,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Message {
    /// The first of each side.
    Ready,
    /// A write is on its way, in so many parts: each ends with an immediate, the sequence's low 32 bits.
    Write {
        header: Header,
        parts: u8,
    },
    /// The writer has no keys for the window of this write.
    Ask(Header),
    /// Where the window begins, and the key of each queue pair for bytes. They hold until `Shut`.
    Keys {
        /// Of the write that asked.
        sequence: u64,
        /// Of the window.
        window: u64,
        base: u64,
        keys: Vec<u32>,
    },
    Acks(Vec<Ack>),
    /// The window of this key is closed.
    Shut(u64),
    /// Nothing but the envelope's credits.
    Credits,
}

impl Envelope {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MESSAGE_BYTES);
        out.extend_from_slice(&self.credits.to_le_bytes());
        match &self.message {
            Message::Ready => out.push(1),
            Message::Write { header, parts } => {
                out.extend_from_slice(&[2, *parts]);
                out.extend_from_slice(&header.encode());
            }
            Message::Ask(header) => {
                out.push(3);
                out.extend_from_slice(&header.encode());
            }
            Message::Keys { sequence, window, base, keys } => {
                out.push(4);
                for number in [sequence, window, base] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                keys.iter().for_each(|key| out.extend_from_slice(&key.to_le_bytes()));
            }
            Message::Acks(acks) => {
                out.push(5);
                acks.iter().for_each(|ack| out.extend_from_slice(&ack.encode()));
            }
            Message::Shut(window) => {
                out.push(6);
                out.extend_from_slice(&window.to_le_bytes());
            }
            Message::Credits => out.push(7),
        }
        out
    }

    /// None if the bytes are no message.
    pub(super) fn decode(bytes: &[u8]) -> Option<Envelope> {
        let (credits, rest) = bytes.split_first_chunk()?;
        let (kind, rest) = rest.split_first()?;
        let header = |bytes: &[u8]| Header::decode(<&[u8; HEADER_BYTES]>::try_from(bytes).ok()?);
        let message = match kind {
            1 if rest.is_empty() => Message::Ready,
            2 => {
                let (parts, rest) = rest.split_first()?;
                let whole = usize::from(*parts) <= MAX_DATA_PAIRS;
                Message::Write { header: header(rest)?, parts: whole.then_some(*parts)? }
            }
            3 => Message::Ask(header(rest)?),
            4 => {
                let (sequence, rest) = rest.split_first_chunk()?;
                let (window, rest) = rest.split_first_chunk()?;
                let (base, rest) = rest.split_first_chunk()?;
                let (keys, rest) = rest.as_chunks();
                if !rest.is_empty() || keys.len() > MAX_DATA_PAIRS {
                    return None;
                }
                Message::Keys {
                    sequence: u64::from_le_bytes(*sequence),
                    window: u64::from_le_bytes(*window),
                    base: u64::from_le_bytes(*base),
                    keys: keys.iter().map(|key| u32::from_le_bytes(*key)).collect(),
                }
            }
            5 => {
                let (acks, rest) = rest.as_chunks::<ACK_BYTES>();
                if !rest.is_empty() || acks.len() > MAX_ACKS {
                    return None;
                }
                Message::Acks(acks.iter().map(Ack::decode).collect::<Option<_>>()?)
            }
            6 => Message::Shut(u64::from_le_bytes(rest.try_into().ok()?)),
            7 if rest.is_empty() => Message::Credits,
            _ => return None,
        };
        Some(Envelope { credits: u16::from_le_bytes(*credits), message })
    }
}

/// What decodes is what would be encoded.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some(envelope) = Envelope::decode(bytes) {
        assert_eq!(envelope.encode(), bytes);
    }
}

/// Of each, one to be damaged by fuzzing.
pub(super) fn samples() -> Vec<Vec<u8>> {
    let mut encoded = crate::net::header::samples().into_iter();
    let header = encoded.next().and_then(|bytes| Header::decode(bytes.first_chunk()?));
    let headers = header.map(|header| [Message::Write { header, parts: 2 }, Message::Ask(header)]);
    let keys = Message::Keys { sequence: 1, window: 2, base: 3, keys: vec![4; 3] };
    let acks = Message::Acks(vec![Ack { sequence: 8, landed: true }; 2]);
    let others = [Message::Ready, keys, acks, Message::Shut(5), Message::Credits];
    let all = headers.into_iter().flatten().chain(others);
    all.map(|message| Envelope { credits: 6, message }.encode()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_proto::wire::Window;

    #[test]
    fn messages_survive_the_wire_and_fit_a_work_request() {
        let header = Header {
            window: Window { region: 1, key: u64::MAX - 2, offset: 3, len: 4 },
            offset: 5,
            len: 6,
            immediate: u32::MAX - 7,
            sequence: 8,
            floor: 9,
            failed: None,
        };
        let ack = Ack { sequence: u64::MAX, landed: true };
        let messages = [
            Message::Ready,
            Message::Write { header, parts: MAX_DATA_PAIRS as u8 },
            Message::Ask(header),
            Message::Keys { sequence: 1, window: 2, base: 3, keys: vec![4; MAX_DATA_PAIRS] },
            Message::Keys { sequence: 1, window: 2, base: 3, keys: vec![] },
            Message::Acks(vec![ack; MAX_ACKS]),
            Message::Shut(9),
            Message::Credits,
        ];
        for message in messages {
            let envelope = Envelope { credits: 513, message };
            let bytes = envelope.encode();
            assert!(bytes.len() <= MESSAGE_BYTES, "{} bytes: {envelope:?}", bytes.len());
            assert_eq!(Envelope::decode(&bytes), Some(envelope));
            fuzz(&bytes);
            assert_eq!(Envelope::decode(&[&bytes[..], &[0]].concat()), None);
        }
        assert_eq!(Envelope::decode(&[0, 0, 8]), None);
        assert_eq!(Envelope::decode(&[0, 0]), None);
        let too_many = Message::Acks(vec![ack; MAX_ACKS + 1]);
        assert_eq!(Envelope::decode(&Envelope { credits: 0, message: too_many }.encode()), None);
    }
}
