//! What came from the socket: records, opened one after another.

use super::TlsError;
use super::handshake::{alert, is_retry};
use super::record::{ALERT, DATA, HANDSHAKE, KEY_UPDATE, MAX_CONTENT, MAX_RECORD, Opener, Record};
use std::io::{self, Read as _};
use std::net::TcpStream;

/// Bytes taken from the kernel at once, at most: they are opened while they are in the cache.
const BUFFER: usize = 256 << 10;

/// Received and not opened yet.
pub(super) struct Incoming {
    opener: Opener,
    bytes: Box<[u8]>,
    /// `bytes[start..end]` came in; a whole record always finds room behind `start`.
    start: usize,
    end: usize,
    /// Where what is not a body's is opened: content, and the byte that says what it is.
    scratch: Box<[u8]>,
}

/// What the socket had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    /// A whole record, of so many bytes of content.
    Record(usize),
    /// Nothing, for as long as the socket's timeout says.
    Nothing,
}

impl Incoming {
    pub(super) fn new(opener: Opener) -> Incoming {
        Incoming {
            opener,
            bytes: vec![0; BUFFER].into(),
            start: 0,
            end: 0,
            scratch: vec![0; MAX_CONTENT + 1].into(),
        }
    }

    /// Waits until a whole record is here, or for the socket's timeout.
    pub(super) fn wait(&mut self, mut socket: &TcpStream) -> Result<Arrival, TlsError> {
        loop {
            if let Some(record) = Record::parse(&self.bytes[self.start..self.end])? {
                return Ok(Arrival::Record(record.content_bytes()));
            }
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.bytes.len() - self.start < MAX_RECORD {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            match socket.read(&mut self.bytes[self.end..]) {
                Ok(0) => return Err(TlsError::Closed),
                Ok(read) => self.end += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_retry(&e) => return Ok(Arrival::Nothing),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Whether a whole record is here.
    pub(super) fn has_record(&self) -> Result<bool, TlsError> {
        Ok(Record::parse(&self.bytes[self.start..self.end])?.is_some())
    }

    /// Whether a part of a record is here.
    pub(super) fn is_within_record(&self) -> bool {
        self.start < self.end
    }

    /// Opens the record that is here for nothing but its authenticity.
    pub(super) fn discard(&mut self) -> Result<(), TlsError> {
        self.open()?.map(|_| ()).ok_or(TlsError::Rule("it sent a record of a kind that has no place there"))
    }

    /// Opens the record that is here straight into `place`: its content, and one byte more.
    pub(super) fn open_into(&mut self, place: &mut [u8]) -> Result<(), TlsError> {
        let Some(record) = Record::parse(&self.bytes[self.start..self.end])? else {
            return Err(TlsError::Garbled);
        };
        self.start += record.bytes();
        match self.opener.open(&record, place)? {
            DATA => Ok(()),
            _ => Err(TlsError::Rule("it sent a record of a kind that has no place there")),
        }
    }

    /// Opens the record that is here, and returns its content. None if it was about the connection itself.
    pub(super) fn open(&mut self) -> Result<Option<&[u8]>, TlsError> {
        let Some(record) = Record::parse(&self.bytes[self.start..self.end])? else {
            return Err(TlsError::Garbled);
        };
        self.start += record.bytes();
        let content = record.content_bytes();
        let kind = self.opener.open(&record, &mut self.scratch[..=content])?;
        let content = &self.scratch[..content];
        match kind {
            DATA => Ok(Some(content)),
            HANDSHAKE if *content == KEY_UPDATE => {
                self.opener.renew()?;
                Ok(None)
            }
            ALERT => Err(alert(content)),
            _ => Err(TlsError::Rule("it sent a record of a kind that has no place there")),
        }
    }
}
