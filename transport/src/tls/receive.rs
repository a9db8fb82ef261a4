//! The reading thread of a lane: lands the peer's writes, and takes in what it says about ours.

use super::TlsError;
use super::frame::{Frame, MAX_TAIL, SHORT_FRAME, acks, body_of, piece_at};
use super::incoming::{Arrival, Incoming};
use super::lane::{PATIENCE, TICK, TlsLane};
use crate::net::header::{Ack, Header};
use crate::net::lane::Path;
use crate::net::life::Life;
use crate::net::node::Node;
use crate::window::Landing;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) struct Receiver<'a> {
    pub(super) lane: &'a TlsLane,
    pub(super) node: &'a Arc<Node>,
    pub(super) life: &'a Arc<Life>,
    pub(super) incoming: &'a mut Incoming,
    /// The last bytes of the write that is being received.
    pub(super) tail: [u8; MAX_TAIL],
}

/// What to do after a frame.
enum Next {
    /// More of the same.
    Go,
    /// Receive the rest of this write.
    Body(Header),
    /// The rest of this write does not come.
    Cut(u64),
}

/// What becomes of a write while it comes in.
enum Fate {
    Landing(Arc<Landing>),
    Refused,
    /// It has landed by a lane that failed.
    LandedBefore,
}

impl Receiver<'_> {
    /// Receives until the connection ends, and says why it did.
    pub(super) fn receive(mut self) -> Result<Infallible, TlsError> {
        loop {
            self.next_record(false)?;
            match self.take_frame()? {
                Next::Go => {}
                Next::Body(header) => self.take_body(&header)?,
                Next::Cut(_) => return Err(TlsError::Rule("it cut a write short that it had sent")),
            }
        }
    }

    /// Waits for a record, and returns how long its content is. In the middle of a write it does not wait for
    /// long.
    fn next_record(&mut self, within_write: bool) -> Result<usize, TlsError> {
        // One wake-up of the other thread for all that came in at once.
        if !self.incoming.has_record()? {
            self.lane.send_answers();
        }
        let mut silent_since = None;
        loop {
            match self.incoming.wait(&self.lane.socket)? {
                Arrival::Record(content) => return Ok(content),
                Arrival::Nothing if self.lane.is_closed() => return Err(TlsError::Closed),
                Arrival::Nothing if within_write || self.incoming.is_within_record() => {
                    let since = *silent_since.get_or_insert_with(Instant::now);
                    if since.elapsed() + TICK >= PATIENCE {
                        return Err(TlsError::Stalled(PATIENCE));
                    }
                }
                Arrival::Nothing => {}
            }
        }
    }

    /// Takes in a record that belongs to no body.
    fn take_frame(&mut self) -> Result<Next, TlsError> {
        let Some(content) = self.incoming.open()? else {
            return Ok(Next::Go);
        };
        match Frame::decode(content).ok_or(TlsError::Rule("it sent a frame that is none"))? {
            Frame::Write { header, tail } => {
                self.tail[..tail.len()].copy_from_slice(tail);
                Ok(Next::Body(header))
            }
            Frame::Acks(encoded) => {
                for ack in acks(encoded) {
                    let Ack { sequence, landed } =
                        ack.ok_or(TlsError::Rule("it sent an acknowledgement that is none"))?;
                    self.lane.answered(sequence)?;
                    self.node.settle(self.life, self.lane, sequence, landed);
                }
                Ok(Next::Go)
            }
            Frame::Stop(sequence) => {
                self.lane.set_unwanted(sequence);
                Ok(Next::Go)
            }
            Frame::Cut(sequence) => Ok(Next::Cut(sequence)),
            Frame::Hello(_) | Frame::Welcome => Err(TlsError::Rule("it introduced itself again")),
        }
    }

    /// Receives a write after its header, and between its records what else the peer has to say.
    fn take_body(&mut self, header: &Header) -> Result<(), TlsError> {
        let (sequence, body) = (header.sequence, body_of(header.len));
        let mut fate = self.fate_of(header)?;
        if body > 0 && !matches!(fate, Fate::Landing(_)) {
            self.lane.stop(sequence)?;
        }
        let mut at = 0;
        while at < body {
            let piece = piece_at(body, at);
            let content = self.next_record(true)?;
            if content == piece {
                if let Fate::Landing(landing) = &fate
                    && !land_piece(self.lane, self.incoming, landing, header.offset + at, piece)?
                {
                    fate = Fate::Refused;
                    self.lane.stop(sequence)?;
                }
                if !matches!(fate, Fate::Landing(_)) {
                    self.incoming.discard()?;
                }
                at += piece as u64;
                continue;
            }
            if content > SHORT_FRAME {
                return Err(TlsError::Rule("it sent a record of another length than is due"));
            }
            match self.take_frame()? {
                Next::Go => {}
                Next::Cut(cut) if cut == sequence && !matches!(fate, Fate::Landing(_)) => break,
                Next::Cut(_) => return Err(TlsError::Rule("it cut a write short that was wanted")),
                Next::Body(_) => return Err(TlsError::Rule("it began a write within another")),
            }
        }
        let landed = match fate {
            Fate::Landing(landing) => self.finish(&landing, header)?,
            Fate::Refused => false,
            Fate::LandedBefore => true,
        };
        if !landed {
            self.node.note_refused(self.life, Path::Tls, header);
        }
        self.lane.acknowledge(Ack { sequence, landed })
    }

    fn fate_of(&self, header: &Header) -> Result<Fate, TlsError> {
        while !self.node.wait_until_polled(Duration::from_millis(100)) {
            if self.lane.is_closed() {
                return Err(TlsError::Closed);
            }
        }
        if let Some(generation) = header.failed {
            if !self.node.failed_at_peer(self.life, generation) {
                return Err(TlsError::Closed);
            }
            if self.life.has_landed(header.sequence) {
                return Ok(Fate::LandedBefore);
            }
        }
        let found = self.node.windows.find(self.life.peer, &header.window, header.offset, header.len);
        Ok(found.map_or(Fate::Refused, Fate::Landing))
    }

    /// Puts the last bytes of a write in their place, and reports it; false if the window was closed.
    fn finish(&self, landing: &Landing, header: &Header) -> Result<bool, TlsError> {
        let Header { window, offset, len, immediate, sequence, floor, .. } = *header;
        // As long as decoding the frame has found it to be.
        let body = body_of(len);
        let tail = &self.tail[..(len - body) as usize];
        self.lane.with_landing(|| {
            let (node, peer) = (self.node, self.life.peer);
            let landed = landing.land(offset + body, tail)
                && landing.complete(|| node.report_landed(peer, immediate, len, window.key));
            if landed {
                node.count_landed(self.life, Path::Tls, len);
                self.life
                    .note_landed(sequence, floor)
                    .map_err(|_| TlsError::Rule("it has too many writes that are not reported"))?;
            }
            Ok(landed)
        })
    }
}

/// Opens a record of a body into its place; false if the window was closed.
fn land_piece(
    lane: &TlsLane,
    incoming: &mut Incoming,
    landing: &Landing,
    at: u64,
    piece: usize,
) -> Result<bool, TlsError> {
    lane.with_landing(|| {
        let mut opened = Ok(());
        // One byte more: the write goes on, so it belongs to the same window.
        let open = landing.land_by(at, piece + 1, |place| opened = incoming.open_into(place));
        opened.map(|()| open)
    })
}
