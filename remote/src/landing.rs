//! An object on its way into memory: what of it is believed, and where its bytes go.

use crate::lent::Room;
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::{ChunkHeader, HEADER_START};

/// Takes an object as it comes, in whatever pieces. Holds its header, and no byte more than the room that was given.
pub(crate) struct Landing {
    key: ChunkKey,
    /// The header's bytes, as many as are known to come.
    head: Vec<u8>,
    /// How many of the head's bytes are there, and then of the body's.
    filled: usize,
    /// Once the head is whole: then bytes go to the body.
    header: Option<ChunkHeader>,
    /// The object's length, if the store tells it before.
    total: Option<u64>,
    body: Room,
}

/// Why an object does not land.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Misfit {
    /// It is not what was stored.
    Damaged(String),
    /// It may be what was stored, and the caller's memory is of another length.
    Length(String),
}

fn damaged<T>(reason: impl Into<String>) -> Result<T, Misfit> {
    Err(Misfit::Damaged(reason.into()))
}

impl Landing {
    pub(crate) fn new(key: ChunkKey, body: Room) -> Landing {
        let mut landing = Landing { key, head: Vec::new(), filled: 0, header: None, total: None, body };
        landing.restart();
        landing
    }

    pub(crate) fn key(&self) -> ChunkKey {
        self.key
    }

    /// From the first byte again.
    pub(crate) fn restart(&mut self) {
        self.head.clear();
        self.head.resize(HEADER_START, 0);
        (self.filled, self.header, self.total) = (0, None, None);
    }

    /// Before the first byte: how long the object is.
    pub(crate) fn announce(&mut self, total: u64) -> Result<(), Misfit> {
        self.total = Some(total);
        self.head_fits()
    }

    /// Where the next bytes go; empty when all are there.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        let place = if self.header.is_none() { &mut self.head[..] } else { self.body.bytes_mut() };
        &mut place[self.filled..]
    }

    /// That many bytes of the space are there now.
    pub(crate) fn advance(&mut self, bytes: usize) -> Result<(), Misfit> {
        self.filled += bytes;
        if self.header.is_some() || self.filled < self.head.len() {
            return Ok(());
        }
        if let Ok(start) = <&[u8; HEADER_START]>::try_from(&self.head[..]) {
            let whole = ChunkHeader::encoded_bytes(start).or_else(|error| damaged(error.to_string()))?;
            self.head.resize(whole, 0);
            return self.head_fits();
        }
        let (header, _) = ChunkHeader::decode(&self.head).or_else(|error| damaged(error.to_string()))?;
        if header.key != self.key {
            return damaged(format!("it is chunk {}", header.key));
        }
        let (head, body) = (self.head.len(), header.body_bytes());
        if let Some(total) = self.total
            && total != (head + body) as u64
        {
            return damaged(format!("it has {total} bytes, its header tells of {}", head + body));
        }
        if body != self.body.len() {
            return Err(Misfit::Length(format!("it has {body} packed bytes, not {}", self.body.len())));
        }
        (self.header, self.filled) = (Some(header), 0);
        Ok(())
    }

    /// Copies what came.
    pub(crate) fn take(&mut self, mut bytes: &[u8]) -> Result<(), Misfit> {
        while !bytes.is_empty() {
            let space = self.space();
            let len = space.len().min(bytes.len());
            if len == 0 {
                return damaged("it goes on after its end");
            }
            space[..len].copy_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            self.advance(len)?;
        }
        Ok(())
    }

    /// The header of a chunk that is there whole.
    pub(crate) fn finish(&mut self) -> Result<ChunkHeader, Misfit> {
        match self.header.take_if(|_| self.filled == self.body.len()) {
            Some(header) => Ok(header),
            None => damaged("it ends too early"),
        }
    }

    fn head_fits(&self) -> Result<(), Misfit> {
        match self.total {
            Some(total) if total < self.head.len() as u64 => {
                damaged(format!("it has {total} bytes, less than its header"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tandem_kv_store::tier::contract::{self, memory, read};

    /// Lands an object in pieces of this size, with its length told before or not.
    fn check(object: &[u8], piece: usize, announced: bool) -> Result<(ChunkHeader, Vec<u8>), Misfit> {
        let chunk = contract::whole(1);
        let extent = memory(chunk.1.len());
        let mut landing = Landing::new(chunk.0.key, Room::new(extent.clone()));
        if announced {
            landing.announce(object.len() as u64)?;
        }
        for piece in object.chunks(piece) {
            landing.take(piece)?;
        }
        let header = landing.finish()?;
        drop(landing);
        assert_eq!(Arc::strong_count(extent.region()), 1);
        Ok((header, read(&extent)))
    }

    fn object((header, body): &(ChunkHeader, Vec<u8>)) -> Vec<u8> {
        [header.encode(), body.clone()].concat()
    }

    #[test]
    fn a_chunk_lands_in_pieces_of_any_size() {
        let chunk = contract::whole(1);
        for piece in [1, 2, 11, 12, 13, 100, 4096, 1 << 20] {
            for announced in [false, true] {
                assert!(check(&object(&chunk), piece, announced) == Ok(chunk.clone()), "{piece}");
            }
        }
    }

    #[test]
    fn what_is_not_the_chunk_does_not_land() {
        let chunk = contract::whole(1);
        let (whole, head) = (object(&chunk), chunk.0.encode().len());
        let wrong = |object: &[u8]| {
            for (piece, announced) in [(7, false), (7, true), (1 << 20, false), (1 << 20, true)] {
                let refused = check(object, piece, announced);
                assert!(matches!(refused, Err(Misfit::Damaged(_))), "{} bytes", object.len());
            }
        };
        for len in (0..head + 20).chain([whole.len() - 1]) {
            wrong(&whole[..len]);
        }
        wrong(&[&whole[..], &[0]].concat());
        wrong(&object(&contract::whole(2)));
        for bit in 0..head * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(check(&flipped, 1 << 20, bit % 2 == 0), Err(Misfit::Damaged(_))), "bit {bit}");
        }
        // A shorter chunk under the same key is none of ours to judge.
        let (mut short, body) = contract::chunk(3, 5);
        short.key = chunk.0.key;
        assert!(matches!(check(&object(&(short, body)), 99, true), Err(Misfit::Length(_))));
    }

    #[test]
    fn a_length_that_cannot_be_is_refused_with_the_header() {
        let chunk = contract::whole(1);
        let mut landing = Landing::new(chunk.0.key, Room::new(memory(chunk.1.len())));
        landing.announce(1 << 40).expect("nothing is known of it");
        let refused = landing.take(&chunk.0.encode());
        assert!(matches!(refused, Err(Misfit::Damaged(_))), "{refused:?}");
        assert!(landing.head.len() < 1 << 10);
    }

    #[test]
    fn it_begins_again_after_any_part() {
        let chunk = contract::whole(1);
        let (whole, extent) = (object(&chunk), memory(chunk.1.len()));
        let mut landing = Landing::new(chunk.0.key, Room::new(extent.clone()));
        for part in [0, 5, 12, 40, 300, whole.len()] {
            landing.restart();
            landing.take(&whole[..part]).expect("a part");
        }
        assert_eq!(landing.finish(), Ok(chunk.0));
        drop(landing);
        assert!(read(&extent) == chunk.1);
    }
}
