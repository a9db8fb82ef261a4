//! What precedes each write on its stream, and what the reader answers.

use super::lane::Generation;
use crate::handshake::VERSION;
use tandem_proto::wire::Window;

pub(crate) const HEADER_BYTES: usize = 70;
pub(crate) const ACK_BYTES: usize = 9;

/// Announces a write. Its bytes follow until the end of the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) window: Window,
    /// Where in the window the first byte goes.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) immediate: u32,
    /// Names the write in its acknowledgement.
    pub(crate) sequence: u64,
    /// No write before this is repeated any more: all have been reported.
    pub(crate) floor: u64,
    /// If it is repeated: lanes of this generation and before have failed, and it may have been sent by one of them.
    pub(crate) failed: Option<Generation>,
}

/// The fate of a write, told by the side where it was to land.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ack {
    pub(crate) sequence: u64,
    pub(crate) landed: bool,
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&VERSION.to_le_bytes());
        put(&self.window.region.to_le_bytes());
        put(&self.window.key.to_le_bytes());
        put(&self.window.offset.to_le_bytes());
        put(&self.window.len.to_le_bytes());
        put(&self.offset.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.immediate.to_le_bytes());
        put(&self.sequence.to_le_bytes());
        put(&self.floor.to_le_bytes());
        put(&Generation::encode(self.failed).to_le_bytes());
        out
    }

    /// None if it is another version's.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
        let mut rest = &bytes[..];
        if u16::from_le_bytes(take(&mut rest)?) != VERSION {
            return None;
        }
        Some(Header {
            window: Window {
                region: u32::from_le_bytes(take(&mut rest)?),
                key: u64::from_le_bytes(take(&mut rest)?),
                offset: u64::from_le_bytes(take(&mut rest)?),
                len: u64::from_le_bytes(take(&mut rest)?),
            },
            offset: u64::from_le_bytes(take(&mut rest)?),
            len: u64::from_le_bytes(take(&mut rest)?),
            immediate: u32::from_le_bytes(take(&mut rest)?),
            sequence: u64::from_le_bytes(take(&mut rest)?),
            floor: u64::from_le_bytes(take(&mut rest)?),
            failed: Generation::decode(u32::from_le_bytes(take(&mut rest)?)),
        })
    }
}

impl Ack {
    pub(crate) fn encode(self) -> [u8; ACK_BYTES] {
        let mut out = [0; ACK_BYTES];
        out[..8].copy_from_slice(&self.sequence.to_le_bytes());
        out[8] = u8::from(self.landed);
        out
    }

    /// None if the fate is none that there is.
    pub(crate) fn decode(bytes: &[u8; ACK_BYTES]) -> Option<Ack> {
        let mut rest = &bytes[..];
        let sequence = u64::from_le_bytes(take(&mut rest)?);
        match rest {
            [0] => Some(Ack { sequence, landed: false }),
            [1] => Some(Ack { sequence, landed: true }),
            _ => None,
        }
    }
}

/// What decodes is what would be encoded.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some(bytes) = bytes.first_chunk()
        && let Some(header) = Header::decode(bytes)
    {
        assert_eq!(header.encode(), *bytes);
    }
    if let Some(bytes) = bytes.first_chunk()
        && let Some(ack) = Ack::decode(bytes)
    {
        assert_eq!(ack.encode(), *bytes);
    }
}

/// One to be damaged by fuzzing: no two of its numbers are the same.
pub(crate) fn sample() -> Header {
    let window = Window { region: 1, key: 2, offset: 3, len: 1 << 20 };
    Header {
        window,
        offset: 4,
        len: 20_000,
        immediate: 5,
        sequence: 6,
        floor: 7,
        failed: Some(Generation(5)),
    }
}

/// Of each, one to be damaged by fuzzing.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    vec![sample().encode().to_vec(), Ack { sequence: 8, landed: true }.encode().to_vec()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_acks_survive_the_wire() {
        let header = Header {
            window: Window { region: 1, key: u64::MAX - 2, offset: 3, len: 4 },
            offset: 5,
            len: 6,
            immediate: u32::MAX - 7,
            sequence: 8,
            floor: 9,
            failed: Some(Generation(u32::MAX)),
        };
        let bytes = header.encode();
        assert_eq!(bytes[HEADER_BYTES - 1], 0xff, "the header fills its bytes");
        assert_eq!(Header::decode(&bytes), Some(header));
        let mut other = bytes;
        other[0] ^= 0xff;
        assert_eq!(Header::decode(&other), None);
        for landed in [false, true] {
            let ack = Ack { sequence: 77, landed };
            assert_eq!(Ack::decode(&ack.encode()), Some(ack));
        }
        assert_eq!(Ack::decode(&[2; ACK_BYTES]), None);
    }
}
