//! How frames lie on a stream: a little-endian `u32` length, then that many bytes.

/// Bytes before each frame.
pub(super) const HEADER_BYTES: usize = 4;

/// Finds frames in a stream of bytes that may come from anyone.
pub struct Decoder {
    /// What came in and was not handed out. Never holds room for more than came in, whatever a length says.
    pending: Vec<u8>,
    /// How much of `pending` was handed out already.
    done: usize,
    limit: usize,
}

/// Bytes that are no frame. The stream cannot be read any further.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("frame of {len} bytes is longer than {limit}")]
pub struct FrameError {
    /// The length announced.
    pub len: usize,
    /// The longest allowed.
    pub limit: usize,
}

impl Decoder {
    /// A decoder of frames of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Decoder {
        Decoder { pending: Vec::new(), done: 0, limit }
    }

    /// Takes what came in.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.done > 0 {
            self.pending.drain(..self.done);
            self.done = 0;
        }
        self.pending.extend_from_slice(bytes);
    }

    /// The next frame, once all of it has come in.
    ///
    /// # Errors
    /// When a frame is longer than the limit.
    pub fn pop(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let rest = &self.pending[self.done..];
        let Some((header, body)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*header) as usize;
        if len > self.limit {
            return Err(FrameError { len, limit: self.limit });
        }
        let Some(frame) = body.get(..len) else {
            return Ok(None);
        };
        let frame = frame.to_vec();
        self.done += HEADER_BYTES + len;
        if self.done == self.pending.len() {
            // A rare long frame must not hold its memory for the rest of the connection.
            self.pending = Vec::new();
            self.done = 0;
        }
        Ok(Some(frame))
    }
}

/// What comes before a frame of `len` bytes, which the sender has checked against the limit.
pub(super) fn header(len: usize) -> [u8; HEADER_BYTES] {
    u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_cut() {
        let frames: Vec<Vec<u8>> = [0, 1, 3, 4, 5, 100, 0, 17].map(|len| vec![len as u8; len]).to_vec();
        let stream: Vec<u8> =
            frames.iter().flat_map(|f| header(f.len()).into_iter().chain(f.iter().copied())).collect();
        for cut in 1..=stream.len() {
            let mut decoder = Decoder::new(100);
            let mut found = Vec::new();
            for piece in stream.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.pop().unwrap() {
                    found.push(frame);
                }
            }
            assert_eq!(found, frames, "cut every {cut} bytes");
        }
    }

    #[test]
    fn a_long_frame_is_refused_by_its_header() {
        let mut decoder = Decoder::new(100);
        decoder.push(&header(101));
        assert_eq!(decoder.pop(), Err(FrameError { len: 101, limit: 100 }));
        let mut decoder = Decoder::new(100);
        decoder.push(&[0xff; 4]);
        assert!(decoder.pop().is_err());
    }
}
