//! What came from the socket: records, opened one after another.

use super::TlsError;
use super::handshake::{alert, is_retry};
use super::record::{ALERT, DATA, HANDSHAKE, KEY_UPDATE, MAX_CONTENT, MAX_RECORD, Opener, Record};
use std::io::{self, Read as _};
use std::net::TcpStream;

/// Bytes taken from the kernel at once, at most. Between 256 KiB and this no difference was seen on two cores; on many,
/// this was faster by a tenth.
const BUFFER: usize = 1 << 20;

/// Received and not opened yet.
pub(super) struct Arrived {
    bytes: Box<[u8]>,
    /// `bytes[start..end]` came in; a whole record always finds room behind `start`.
    start: usize,
    end: usize,
}

/// What the socket had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    Bytes,
    /// Nothing, for as long as the socket's timeout says.
    Nothing,
}

impl Arrived {
    pub(super) fn new() -> Arrived {
        Arrived { bytes: vec![0; BUFFER].into(), start: 0, end: 0 }
    }

    /// Takes what the socket has, and waits for it.
    pub(super) fn read(&mut self, mut socket: &TcpStream) -> Result<Arrival, TlsError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.start < MAX_RECORD {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        loop {
            match socket.read(&mut self.bytes[self.end..]) {
                Ok(0) => return Err(TlsError::Closed),
                Ok(read) => {
                    self.end += read;
                    return Ok(Arrival::Bytes);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_retry(&e) => return Ok(Arrival::Nothing),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Takes the next record out, if it is whole.
    pub(super) fn next_record(&mut self) -> Result<Option<Record<'_>>, TlsError> {
        let record = Record::parse(&self.bytes[self.start..self.end])?;
        self.start += record.as_ref().map_or(0, Record::bytes);
        Ok(record)
    }

    /// How many bytes the whole records that are here have.
    pub(super) fn whole_bytes(&self) -> Result<usize, TlsError> {
        let mut at = self.start;
        while let Some(record) = Record::parse(&self.bytes[at..self.end])? {
            at += record.bytes();
        }
        Ok(at - self.start)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Moves what came in after so many bytes over to `rest`, which has nothing and gets less than a record.
    pub(super) fn cut_off(&mut self, bytes: usize, rest: &mut Arrived) {
        let cut = &self.bytes[self.start + bytes..self.end];
        rest.bytes[..cut.len()].copy_from_slice(cut);
        (rest.start, rest.end) = (0, cut.len());
        self.end = self.start + bytes;
    }
}

/// Opens records, in the order in which they came.
pub(super) struct Opening {
    opener: Opener,
    /// Where what is not a body's is opened: content, and the byte that says what it is.
    scratch: Box<[u8]>,
}

impl Opening {
    /// Opens a record for nothing but its authenticity.
    pub(super) fn discard(&mut self, record: &Record<'_>) -> Result<(), TlsError> {
        self.open(record)?
            .map(|_| ())
            .ok_or(TlsError::Rule("it sent a record of a kind that has no place there"))
    }

    /// Opens a record straight into `place`: its content, and one byte more.
    pub(super) fn open_into(&mut self, record: &Record<'_>, place: &mut [u8]) -> Result<(), TlsError> {
        match self.opener.open(record, place)? {
            DATA => Ok(()),
            _ => Err(TlsError::Rule("it sent a record of a kind that has no place there")),
        }
    }

    /// Opens a record, and returns its content. None if it was about the connection itself.
    pub(super) fn open(&mut self, record: &Record<'_>) -> Result<Option<&[u8]>, TlsError> {
        let content = record.content_bytes();
        let kind = self.opener.open(record, &mut self.scratch[..=content])?;
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

/// A connection's receiving side while one thread has it.
pub(super) struct Incoming {
    pub(super) opening: Opening,
    pub(super) arrived: Arrived,
}

impl Incoming {
    pub(super) fn new(opener: Opener) -> Incoming {
        let opening = Opening { opener, scratch: vec![0; MAX_CONTENT + 1].into() };
        Incoming { opening, arrived: Arrived::new() }
    }

    /// Waits for the content of a record, or for the socket's timeout: then, and after a record that was about the
    /// connection itself, there is none.
    pub(super) fn hear(&mut self, socket: &TcpStream) -> Result<Option<&[u8]>, TlsError> {
        while self.arrived.whole_bytes()? == 0 {
            if self.arrived.read(socket)? == Arrival::Nothing {
                return Ok(None);
            }
        }
        match self.arrived.next_record()? {
            Some(record) => self.opening.open(&record),
            None => Ok(None),
        }
    }
}
