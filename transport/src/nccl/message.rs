//! What the two sides of a lane say to each other beside the bytes.

use super::offer::{OFFER_BYTES, Offer};
use crate::net::header::{self, HEADER_BYTES, Header};

/// What names a communicator.
pub(super) const ID_BYTES: usize = 128;
/// Pieces of a parcel, at most: as many as one launch copies.
pub(super) const MAX_PIECES: usize = 128;

/// What one record of the channel says.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack")]
pub(super) enum Message {
    /// The dialler's first: what it would offer, and the communicators of both directions, its own first.
    Join { offer: Offer, ids: [[u8; ID_BYTES]; 2] },
    /// The answerer's: both communicators work.
    Ready,
    /// So many bytes are the next that NCCL brings; none if there are none. These writes begin in them.
    Parcel { bytes: u32, begun: Vec<Header> },
    /// The oldest parcel that was not answered is landed: the fates of the writes that end in it.
    Answer { fates: Vec<bool> },
}

const JOIN: u8 = 1;
const READY: u8 = 2;
const PARCEL: u8 = 3;
const ANSWER: u8 = 4;

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Message::Join { offer, ids } => [&[JOIN][..], &offer.encode(), ids.as_flattened()].concat(),
            Message::Ready => vec![READY],
            Message::Parcel { bytes, begun } => {
                let mut out = [&[PARCEL][..], &bytes.to_le_bytes()].concat();
                begun.iter().for_each(|header| out.extend_from_slice(&header.encode()));
                out
            }
            Message::Answer { fates } => {
                let mut out = vec![ANSWER];
                out.extend(fates.iter().map(|landed| u8::from(*landed)));
                out
            }
        }
    }

    /// None if it is none that there is.
    pub(super) fn decode(bytes: &[u8]) -> Option<Message> {
        let (kind, rest) = bytes.split_first()?;
        match *kind {
            JOIN => {
                let (offer, rest) = rest.split_first_chunk::<OFFER_BYTES>()?;
                let &[first, second] = rest.as_chunks::<ID_BYTES>().0 else { return None };
                let whole = rest.len() == 2 * ID_BYTES;
                whole.then_some(Message::Join { offer: Offer::decode(offer)?, ids: [first, second] })
            }
            READY => rest.is_empty().then_some(Message::Ready),
            PARCEL => {
                let (bytes, rest) = rest.split_first_chunk()?;
                let (headers, rest) = rest.as_chunks::<HEADER_BYTES>();
                if headers.len() > MAX_PIECES || !rest.is_empty() {
                    return None;
                }
                let begun = headers.iter().map(Header::decode).collect::<Option<_>>()?;
                Some(Message::Parcel { bytes: u32::from_le_bytes(*bytes), begun })
            }
            ANSWER => {
                let sound = rest.len() <= MAX_PIECES && rest.iter().all(|fate| *fate < 2);
                sound.then(|| Message::Answer { fates: rest.iter().map(|fate| *fate == 1).collect() })
            }
            _ => None,
        }
    }
}

/// What decodes is what would be encoded.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some(message) = Message::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
}

/// Of each, one to be damaged by fuzzing.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    all().iter().map(Message::encode).collect()
}

fn all() -> [Message; 4] {
    let offer = Offer { port: 1, host: [2; 16], gpu: [3; 16], version: 4, rdma: true, named: false };
    [
        Message::Join { offer, ids: [[5; ID_BYTES], [6; ID_BYTES]] },
        Message::Ready,
        Message::Parcel { bytes: 7 << 20, begun: vec![header::sample(); 3] },
        Message::Answer { fates: vec![true, false, true] },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        for message in all() {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Some(message.clone()));
            assert_ne!(Message::decode(&[&bytes[..], &[9]].concat()), Some(message));
        }
        for wrong in [&[][..], &[0], &[READY, 0], &[ANSWER, 2], &[PARCEL, 0, 0, 0]] {
            assert_eq!(Message::decode(wrong), None, "{wrong:?}");
        }
        let many = Message::Parcel { bytes: 0, begun: vec![header::sample(); MAX_PIECES + 1] };
        assert_eq!(Message::decode(&many.encode()), None);
        assert_eq!(Message::decode(&Message::Answer { fates: vec![true; MAX_PIECES + 1] }.encode()), None);
    }
}
