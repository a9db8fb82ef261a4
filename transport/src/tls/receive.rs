//! The reading threads of a lane: land the peer's writes, and take in what it says about ours.
//!
//! Where there are two, they take turns: where much comes in, one reads from the socket while the other opens what it
//! has read.

use super::TlsError;
use super::frame::{Frame, MAX_TAIL, SHORT_FRAME, acks, body_of, piece_at};
use super::incoming::{Arrival, Arrived, Incoming, Opening};
use super::lane::{PATIENCE, TICK, TlsLane, lock};
use super::record::Record;
use super::send::Turn;
use crate::net::header::{Ack, Header};
use crate::net::lane::Path;
use crate::net::life::Life;
use crate::net::node::Node;
use crate::window::Landing;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What came in at once and makes it likely that there is more: then the other thread reads on meanwhile. Less is
/// opened about as soon as it would have woken up.
const MUCH: usize = 256 << 10;

/// Locks are taken in this order; the second before the first is given back, so that records are opened as they came.
pub(super) struct Receiver {
    /// What came in after the last whole record.
    read: Mutex<Turn<Arrived>>,
    open: Mutex<Turn<Opened>>,
}

/// Where all this happens.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) lane: &'a TlsLane,
    pub(super) node: &'a Arc<Node>,
    pub(super) life: &'a Arc<Life>,
}

/// How far opening has come.
struct Opened {
    opening: Opening,
    /// The write that is being received.
    write: Option<Receiving>,
    /// Its last bytes.
    tail: [u8; MAX_TAIL],
}

struct Receiving {
    header: Header,
    fate: Fate,
    body: u64,
    at: u64,
}

/// What becomes of a write while it comes in.
enum Fate {
    Landing(Arc<Landing>),
    Refused,
    /// It has landed by a lane that failed.
    LandedBefore,
}

impl Receiver {
    pub(super) fn new(incoming: Incoming) -> Receiver {
        let Incoming { opening, arrived } = incoming;
        let opened = Opened { opening, write: None, tail: [0; MAX_TAIL] };
        Receiver { read: Turn::new(arrived), open: Turn::new(opened) }
    }

    /// Takes turns until the connection ends or is broken, and says why it was.
    pub(super) fn run(&self, at: At<'_>) -> Result<(), TlsError> {
        let mut arrived = Arrived::new();
        loop {
            let mut read = lock(&self.read);
            let Some(whole) = read.work(|rest| self.read(at.lane, rest, &mut arrived))? else {
                return Ok(());
            };
            let mut open = lock(&self.open);
            let kept = (whole < MUCH).then_some(read);
            let taken = open.work(|opened| {
                while let Some(record) = arrived.next_record()? {
                    opened.take(at, &record)?;
                }
                Ok(())
            });
            // One wake-up of a writing thread, and of the node loop, for all that came in at once.
            at.lane.send_answers();
            at.node.wake();
            if taken?.is_none() {
                return Ok(());
            }
            drop(kept);
        }
    }

    /// Reads until a whole record is here; returns how many bytes the whole ones have. What came after them is left in
    /// `rest`.
    fn read(&self, lane: &TlsLane, rest: &mut Arrived, arrived: &mut Arrived) -> Result<usize, TlsError> {
        std::mem::swap(rest, arrived);
        let mut silent_since = None;
        loop {
            let whole = arrived.whole_bytes()?;
            if whole > 0 {
                arrived.cut_off(whole, rest);
                return Ok(whole);
            }
            if arrived.read(&lane.socket)? == Arrival::Bytes {
                silent_since = None;
                continue;
            }
            if lane.is_closed() {
                return Err(TlsError::Closed);
            }
            if !arrived.is_empty() || lock(&self.open).state.write.is_some() {
                let since = *silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() + TICK >= PATIENCE {
                    return Err(TlsError::Stalled(PATIENCE));
                }
            }
        }
    }
}

impl Opened {
    fn take(&mut self, at: At<'_>, record: &Record<'_>) -> Result<(), TlsError> {
        let content = record.content_bytes();
        match &mut self.write {
            Some(write) if content == piece_at(write.body, write.at) => {
                write.take_piece(at, &mut self.opening, record)?;
                if write.at == write.body {
                    self.end(at)?;
                }
                Ok(())
            }
            Some(_) if content > SHORT_FRAME => {
                Err(TlsError::Rule("it sent a record of another length than is due"))
            }
            _ => self.take_frame(at, record),
        }
    }

    /// Takes in a record that belongs to no body.
    fn take_frame(&mut self, at: At<'_>, record: &Record<'_>) -> Result<(), TlsError> {
        let Some(content) = self.opening.open(record)? else {
            return Ok(());
        };
        match Frame::decode(content).ok_or(TlsError::Rule("it sent a frame that is none"))? {
            Frame::Write { .. } if self.write.is_some() => {
                Err(TlsError::Rule("it began a write within another"))
            }
            Frame::Write { header, tail } => {
                self.tail[..tail.len()].copy_from_slice(tail);
                let body = body_of(header.len);
                let fate = fate_of(at, &header)?;
                if body > 0 && !matches!(fate, Fate::Landing(_)) {
                    at.lane.stop(header.sequence)?;
                }
                self.write = Some(Receiving { header, fate, body, at: 0 });
                if body == 0 { self.end(at) } else { Ok(()) }
            }
            Frame::Acks(encoded) => {
                let mut fates = Vec::new();
                for ack in acks(encoded) {
                    let Ack { sequence, landed } =
                        ack.ok_or(TlsError::Rule("it sent an acknowledgement that is none"))?;
                    at.lane.answered(sequence)?;
                    fates.push((sequence, landed));
                }
                at.node.settle_quietly(at.life, at.lane, &fates);
                Ok(())
            }
            Frame::Stop(sequence) => {
                at.lane.set_unwanted(sequence);
                Ok(())
            }
            Frame::Cut(sequence) => match &self.write {
                Some(write) if write.header.sequence == sequence && !write.is_landing() => self.end(at),
                Some(_) => Err(TlsError::Rule("it cut a write short that was wanted")),
                None => Err(TlsError::Rule("it cut a write short that it had sent")),
            },
            Frame::Hello(_) | Frame::Channel(_) | Frame::Welcome => {
                Err(TlsError::Rule("it introduced itself again"))
            }
            Frame::Message(_) => {
                Err(TlsError::Rule("it sent a message that belongs to another kind of lane"))
            }
        }
    }

    /// Nothing of the write that is being received comes any more.
    fn end(&mut self, at: At<'_>) -> Result<(), TlsError> {
        let Some(Receiving { header, fate, .. }) = self.write.take() else { return Ok(()) };
        let landed = match fate {
            Fate::Landing(landing) => self.finish(at, &landing, &header)?,
            Fate::Refused => false,
            Fate::LandedBefore => true,
        };
        if !landed {
            at.node.note_refused(at.life, Path::Tls, &header);
        }
        at.lane.acknowledge(Ack { sequence: header.sequence, landed })
    }

    /// Puts the last bytes of a write in their place, and reports it; false if the window was closed.
    fn finish(&self, at: At<'_>, landing: &Landing, header: &Header) -> Result<bool, TlsError> {
        let Header { window, offset, len, immediate, sequence, floor, .. } = *header;
        // As long as decoding the frame has found it to be.
        let body = body_of(len);
        let tail = &self.tail[..(len - body) as usize];
        at.lane.with_landing(|| {
            let (node, peer) = (at.node, at.life.peer);
            let landed = landing.land(offset + body, tail)
                && landing.deposit(offset, len)
                && landing.complete(|| node.report_landed_quietly(peer, immediate, len, window.key));
            if landed {
                node.count_landed(at.life, Path::Tls, len);
                at.life
                    .note_landed(sequence, floor)
                    .map_err(|_| TlsError::Rule("it has too many writes that are not reported"))?;
            }
            Ok(landed)
        })
    }
}

impl Receiving {
    fn is_landing(&self) -> bool {
        matches!(self.fate, Fate::Landing(_))
    }

    fn take_piece(&mut self, at: At<'_>, opening: &mut Opening, record: &Record<'_>) -> Result<(), TlsError> {
        let piece = record.content_bytes();
        if let Fate::Landing(landing) = &self.fate
            && !land_piece(at.lane, opening, record, landing, self.header.offset + self.at)?
        {
            self.fate = Fate::Refused;
            at.lane.stop(self.header.sequence)?;
        }
        if !self.is_landing() {
            // Also when the window has just been closed: the record has not been opened then.
            opening.discard(record)?;
        }
        self.at += piece as u64;
        Ok(())
    }
}

fn fate_of(At { lane, node, life }: At<'_>, header: &Header) -> Result<Fate, TlsError> {
    while !node.wait_until_polled(Duration::from_millis(100)) {
        if lane.is_closed() {
            return Err(TlsError::Closed);
        }
    }
    if let Some(generation) = header.failed {
        if !node.failed_at_peer(life, generation) {
            return Err(TlsError::Closed);
        }
        if life.has_landed(header.sequence) {
            return Ok(Fate::LandedBefore);
        }
    }
    let found = node.windows.find(life.peer, &header.window, header.offset, header.len);
    Ok(found.map_or(Fate::Refused, Fate::Landing))
}

/// Opens a record of a body into its place; false if the window was closed.
fn land_piece(
    lane: &TlsLane,
    opening: &mut Opening,
    record: &Record<'_>,
    landing: &Landing,
    at: u64,
) -> Result<bool, TlsError> {
    lane.with_landing(|| {
        let mut opened = Ok(());
        // One byte more: the write goes on, so it belongs to the same window.
        let open = landing
            .land_by(at, record.content_bytes() + 1, |place| opened = opening.open_into(record, place));
        opened.map(|()| open)
    })
}
