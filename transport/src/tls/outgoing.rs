//! What is on its way to the socket: sealed records, many of them to one system call.

use super::TlsError;
use super::frame::Frame;
use super::record::{DATA, HANDSHAKE, KEY_UPDATE, MAX_RECORD, OVERHEAD_BYTES, Sealer};
use std::io::{self, Write as _};
use std::net::TcpStream;

/// Bytes of records that one system call sends: the first ones soon, so that the other side has something to do.
pub(super) const FIRST_BATCH: usize = 128 << 10;
/// The more is under way, the more goes at once. Every batch wakes the reader, and that is dear: on one core to
/// another, 1 MiB at a time was sent 1.7 times as fast as 128 KiB, for 0.6 times the processor time. This was as good
/// there, and better where two threads take turns.
pub(super) const LAST_BATCH: usize = 512 << 10;

/// Sealed and not sent. Never more than [`LAST_BATCH`], the record that filled it, and a change of keys.
pub(super) struct Batch {
    bytes: Box<[u8]>,
    len: usize,
}

impl Batch {
    pub(super) fn new() -> Batch {
        Batch { bytes: vec![0; LAST_BATCH + MAX_RECORD + OVERHEAD_BYTES + KEY_UPDATE.len()].into(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The socket's timeout is how long it may take no byte at all.
    pub(super) fn send(&mut self, mut socket: &TcpStream) -> Result<(), TlsError> {
        let mut at = 0;
        while at < self.len {
            match socket.write(&self.bytes[at..self.len]) {
                Ok(written) => at += written,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if super::handshake::is_retry(&e) => {
                    return Err(TlsError::Stalled(super::lane::PATIENCE));
                }
                Err(e) => return Err(e.into()),
            }
        }
        self.len = 0;
        Ok(())
    }
}

/// Makes records of contents, in the order in which they must be sent.
pub(super) struct Sealing {
    sealer: Sealer,
    frame: Vec<u8>,
}

impl Sealing {
    pub(super) fn put_frame(&mut self, batch: &mut Batch, frame: &Frame<'_>) -> Result<(), TlsError> {
        let mut content = std::mem::take(&mut self.frame);
        content.clear();
        frame.encode(&mut content);
        let put = self.put(batch, &content);
        self.frame = content;
        put
    }

    /// Puts a record of this content in, and before it a change of keys when one is due.
    pub(super) fn put(&mut self, batch: &mut Batch, content: &[u8]) -> Result<(), TlsError> {
        if self.sealer.is_worn() {
            self.change_keys(batch)?;
        }
        self.seal(batch, DATA, content)
    }

    pub(super) fn change_keys(&mut self, batch: &mut Batch) -> Result<(), TlsError> {
        self.seal(batch, HANDSHAKE, &KEY_UPDATE)?;
        self.sealer.renew()
    }

    fn seal(&mut self, batch: &mut Batch, kind: u8, content: &[u8]) -> Result<(), TlsError> {
        batch.len += self.sealer.seal(kind, content, &mut batch.bytes[batch.len..])?;
        Ok(())
    }
}

/// A connection's sending side while one thread has it.
pub(super) struct Outgoing {
    pub(super) sealing: Sealing,
    pub(super) batch: Batch,
}

impl Outgoing {
    pub(super) fn new(sealer: Sealer) -> Outgoing {
        let sealing = Sealing { sealer, frame: Vec::with_capacity(MAX_RECORD) };
        Outgoing { sealing, batch: Batch::new() }
    }

    pub(super) fn say(&mut self, socket: &TcpStream, frame: &Frame<'_>) -> Result<(), TlsError> {
        self.sealing.put_frame(&mut self.batch, frame)?;
        self.batch.send(socket)
    }
}
