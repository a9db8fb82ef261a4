//! What two nodes tell each other to make a lane: the ends of their queue pairs. One side offers, the other
//! answers with as many; each connects its own to the other's. Any stream will do to carry them, if it proves who
//! is talking.

use super::verbs::{LinkLayer, Remote};

/// The most queue pairs of a lane: one for messages, the others for bytes.
pub(super) const MAX_PAIRS: usize = 1 + super::MAX_DATA_PAIRS;
/// Of this encoding, the messages and what they mean.
const VERSION: u8 = 1;
const END_BYTES: usize = 28;
/// The most bytes of an encoded offer.
#[cfg(test)]
const MAX_BYTES: usize = 2 + MAX_PAIRS * END_BYTES;
/// Queue pairs and packets are numbered with 24 bits.
const NUMBERS: u32 = 1 << 24;

/// An offer, or the answer to one. The first end is for messages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    pub(super) ends: Vec<End>,
}

/// One end of a queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct End {
    pub(super) link: LinkLayer,
    pub(super) remote: Remote,
}

impl Offer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, self.ends.len() as u8];
        for End { link, remote } in &self.ends {
            out.push(match link {
                LinkLayer::InfiniBand => 1,
                LinkLayer::Ethernet => 2,
            });
            out.push(remote.mtu);
            out.extend_from_slice(&remote.lid.to_le_bytes());
            out.extend_from_slice(&remote.gid);
            out.extend_from_slice(&remote.number.to_le_bytes());
            out.extend_from_slice(&remote.packet.to_le_bytes());
        }
        out
    }

    /// None if the bytes are no offer of this version.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Offer> {
        let (&[version, count], rest) = bytes.split_first_chunk()?;
        let right_len = rest.len() == usize::from(count) * END_BYTES;
        if version != VERSION || !right_len || !(2..=MAX_PAIRS).contains(&count.into()) {
            return None;
        }
        let ends: Option<Vec<End>> = rest.chunks_exact(END_BYTES).map(End::decode).collect();
        Some(Offer { ends: ends? })
    }
}

impl End {
    fn decode(bytes: &[u8]) -> Option<End> {
        let (&[link, mtu], rest) = bytes.split_first_chunk()?;
        let (lid, rest) = rest.split_first_chunk()?;
        let (gid, rest) = rest.split_first_chunk()?;
        let (number, packet) = rest.split_first_chunk()?;
        let remote = Remote {
            mtu,
            lid: u16::from_le_bytes(*lid),
            gid: *gid,
            number: u32::from_le_bytes(*number),
            packet: u32::from_le_bytes(packet.try_into().ok()?),
        };
        let link = match link {
            1 => LinkLayer::InfiniBand,
            2 => LinkLayer::Ethernet,
            _ => return None,
        };
        let sound = (1..=5).contains(&mtu) && remote.number < NUMBERS && remote.packet < NUMBERS;
        sound.then_some(End { link, remote })
    }
}

/// What decodes is what would be encoded.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some(offer) = Offer::decode(bytes) {
        assert_eq!(offer.encode(), bytes);
    }
}

/// One to be damaged by fuzzing.
pub(super) fn samples() -> Vec<Vec<u8>> {
    let remote = Remote { number: 17, packet: 23, lid: 7, gid: [5; 16], mtu: 3 };
    vec![Offer { ends: vec![End { link: LinkLayer::Ethernet, remote }; 2] }.encode()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_survive_the_wire_and_others_are_refused() {
        let end = |number| End {
            link: if number % 2 == 0 { LinkLayer::Ethernet } else { LinkLayer::InfiniBand },
            remote: Remote { number, packet: NUMBERS - 1 - number, lid: 7, gid: [number as u8; 16], mtu: 5 },
        };
        for pairs in 2..=MAX_PAIRS as u32 {
            let offer = Offer { ends: (0..pairs).map(end).collect() };
            let bytes = offer.encode();
            assert!(bytes.len() <= MAX_BYTES);
            assert_eq!(Offer::decode(&bytes), Some(offer));
            fuzz(&bytes);
            assert_eq!(Offer::decode(&bytes[..bytes.len() - 1]), None);
            assert_eq!(Offer::decode(&[&bytes[..], &[0]].concat()), None);
            // Another version; another count; an unknown link; an MTU that there is not; a number of 25 bits.
            for (at, value) in [(0, 9), (1, pairs as u8 + 1), (2, 3), (3, 6), (25, 1)] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                assert_eq!(Offer::decode(&bytes), None, "byte {at}");
            }
        }
        let many = Offer { ends: (0..=MAX_PAIRS as u32).map(end).collect() };
        assert_eq!(Offer::decode(&many.encode()), None);
        assert_eq!(Offer::decode(&[]), None);
    }
}
