//! What is on its way to the socket: sealed records, many of them to one system call.

use super::TlsError;
use super::frame::Frame;
use super::record::{DATA, HANDSHAKE, KEY_UPDATE, MAX_RECORD, OVERHEAD_BYTES, Sealer};
use std::io::{self, Write as _};
use std::net::TcpStream;

/// Bytes of records that one system call sends: the first ones soon, so that the other side has something to do.
const FIRST_BATCH: usize = 128 << 10;
/// The more is under way, the more goes at once. Every batch wakes the reader, and that is dear: on one core to
/// another, 1 MiB at a time was sent 1.7 times as fast as 128 KiB, for 0.6 times the processor time. Much more
/// would not stay in the cache until the kernel copies it.
const LAST_BATCH: usize = 1 << 20;

/// Sealed and not sent. Never more than a batch, the record that filled it, and a change of keys.
pub(super) struct Outgoing {
    sealer: Sealer,
    bytes: Box<[u8]>,
    len: usize,
    /// How much makes a batch now.
    batch: usize,
    frame: Vec<u8>,
}

impl Outgoing {
    pub(super) fn new(sealer: Sealer) -> Outgoing {
        let bytes = vec![0; LAST_BATCH + MAX_RECORD + OVERHEAD_BYTES + KEY_UPDATE.len()].into();
        Outgoing { sealer, bytes, len: 0, batch: FIRST_BATCH, frame: Vec::with_capacity(MAX_RECORD) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sends what there is, if it is a batch: to be called before each record. Says whether it did.
    pub(super) fn make_room(&mut self, socket: &TcpStream) -> Result<bool, TlsError> {
        let full = self.len >= self.batch;
        if full {
            self.write(socket)?;
            self.batch = (self.batch * 2).min(LAST_BATCH);
        }
        Ok(full)
    }

    pub(super) fn put_frame(&mut self, frame: &Frame<'_>) -> Result<(), TlsError> {
        let mut content = std::mem::take(&mut self.frame);
        content.clear();
        frame.encode(&mut content);
        let put = self.put(&content);
        self.frame = content;
        put
    }

    /// Puts a record of this content in, and before it a change of keys when one is due.
    pub(super) fn put(&mut self, content: &[u8]) -> Result<(), TlsError> {
        if self.sealer.is_worn() {
            self.change_keys()?;
        }
        self.len += self.sealer.seal(DATA, content, &mut self.bytes[self.len..])?;
        Ok(())
    }

    pub(super) fn change_keys(&mut self) -> Result<(), TlsError> {
        self.len += self.sealer.seal(HANDSHAKE, &KEY_UPDATE, &mut self.bytes[self.len..])?;
        self.sealer.renew()
    }

    /// Sends everything, because nothing else is to be sent for now.
    pub(super) fn send(&mut self, socket: &TcpStream) -> Result<(), TlsError> {
        self.batch = FIRST_BATCH;
        self.write(socket)
    }

    /// The socket's timeout is how long it may take no byte at all.
    fn write(&mut self, mut socket: &TcpStream) -> Result<(), TlsError> {
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
