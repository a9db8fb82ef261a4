//! The writing threads of a lane: writes, and what the reading threads have to say.
//!
//! Where there are two, they take turns: one seals a batch while the other's is on its way through the kernel. Where a
//! connection has little to send, the one that sealed it sends it at once, and the other sleeps.

use super::TlsError;
use super::frame::{Frame, body_of, piece_at};
use super::lane::{Answers, TlsLane, Work, lock};
use super::outgoing::{Batch, FIRST_BATCH, LAST_BATCH, Outgoing, Sealing};
use crate::lent::Lent;
use crate::net::header::Header;
use crate::net::lane::Job;
use std::sync::Mutex;

/// Locks are taken in this order; the second before the first is given back, so that batches leave as they were sealed.
pub(super) struct Sender {
    seal: Mutex<Turn<Sealed>>,
    send: Mutex<Turn<()>>,
}

/// What one thread at a time works on.
pub(super) struct Turn<T> {
    pub(super) state: T,
    /// Set while a thread works, so that it stays set where one failed.
    pub(super) is_broken: bool,
}

impl<T> Turn<T> {
    pub(super) fn new(state: T) -> Mutex<Turn<T>> {
        Mutex::new(Turn { state, is_broken: false })
    }

    /// None if it failed, now or before: whoever it failed for says so.
    pub(super) fn work<R>(
        &mut self,
        work: impl FnOnce(&mut T) -> Result<R, TlsError>,
    ) -> Result<Option<R>, TlsError> {
        if std::mem::replace(&mut self.is_broken, true) {
            return Ok(None);
        }
        let done = work(&mut self.state)?;
        self.is_broken = false;
        Ok(Some(done))
    }
}

/// How far sealing has come.
struct Sealed {
    sealing: Sealing,
    /// What is to be said before anything else.
    answers: Answers,
    /// The write that is being sent.
    write: Option<Sending>,
    /// How much makes a batch now.
    batch_bytes: usize,
}

struct Sending {
    header: Header,
    source: Lent,
    body: u64,
    at: u64,
}

#[derive(PartialEq, Eq)]
enum Filled {
    Closed,
    /// There is nothing more to be sent for now.
    Resting,
    /// There may be.
    Full,
}

impl Sender {
    pub(super) fn new(outgoing: Outgoing) -> Sender {
        let Outgoing { sealing, batch: _ } = outgoing;
        let sealed = Sealed { sealing, answers: Answers::default(), write: None, batch_bytes: FIRST_BATCH };
        Sender { seal: Turn::new(sealed), send: Turn::new(()) }
    }

    /// Takes turns until the lane is closed, or broken.
    pub(super) fn run(&self, lane: &TlsLane) -> Result<(), TlsError> {
        let mut batch = Batch::new();
        loop {
            let mut seal = lock(&self.seal);
            let Some(filled) = seal.work(|sealed| sealed.fill(lane, &mut batch))? else { return Ok(()) };
            if filled == Filled::Closed {
                return Ok(());
            }
            let mut send = lock(&self.send);
            // Who has nothing more to seal needs nobody to go on meanwhile.
            let kept = (filled == Filled::Resting).then_some(seal);
            if send.work(|()| batch.send(&lane.socket))?.is_none() {
                return Ok(());
            }
            drop(kept);
        }
    }
}

impl Sealed {
    /// Fills an empty batch, and waits for something to fill it with.
    fn fill(&mut self, lane: &TlsLane, batch: &mut Batch) -> Result<Filled, TlsError> {
        loop {
            if batch.len() >= self.batch_bytes {
                self.batch_bytes = (self.batch_bytes * 2).min(LAST_BATCH);
                return Ok(Filled::Full);
            }
            if let Some(frame) = self.answers.first() {
                self.sealing.put_frame(batch, &frame)?;
                self.answers.drop_first();
            } else if let Some(mut write) = self.write.take() {
                if batch.len() == 0 {
                    // A long write holds up no answers.
                    self.answers = lane.take_answers();
                    if !self.answers.is_empty() {
                        self.write = Some(write);
                        continue;
                    }
                }
                if write.go_on(lane, &mut self.sealing, batch)? {
                    self.write = Some(write);
                } else {
                    lane.sealed(write.header.sequence, write.header.len);
                }
            } else {
                match lane.next_work(batch.len() == 0) {
                    Work::Closed => return Ok(Filled::Closed),
                    Work::Rest => {
                        self.batch_bytes = FIRST_BATCH;
                        return Ok(Filled::Resting);
                    }
                    Work::Do(answers, job) => {
                        self.answers = answers;
                        if let Some(job) = job {
                            let write = Sending::begin(lane, &mut self.sealing, batch, job)?;
                            if write.body > 0 {
                                self.write = Some(write);
                            } else {
                                // At once: it may have filled the batch, which is sent then.
                                lane.sealed(write.header.sequence, write.header.len);
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Sending {
    /// Puts a write's header.
    fn begin(
        lane: &TlsLane,
        sealing: &mut Sealing,
        batch: &mut Batch,
        job: Job,
    ) -> Result<Sending, TlsError> {
        let header = job.header();
        let source = Lent(job.write.source);
        let body = body_of(header.len);
        lane.with_source(|| {
            // It fits: the extent is in memory.
            let tail = &source.as_ref()[body as usize..];
            sealing.put_frame(batch, &Frame::Write { header, tail })
        })?;
        Ok(Sending { header, source, body, at: 0 })
    }

    /// Puts the next piece, unless the peer wants no more; says whether there are others.
    fn go_on(&mut self, lane: &TlsLane, sealing: &mut Sealing, batch: &mut Batch) -> Result<bool, TlsError> {
        let sequence = self.header.sequence;
        if lane.is_unwanted(sequence) {
            sealing.put_frame(batch, &Frame::Cut(sequence))?;
            return Ok(false);
        }
        let piece = piece_at(self.body, self.at);
        lane.with_source(|| sealing.put(batch, &self.source.as_ref()[self.at as usize..][..piece]))?;
        self.at += piece as u64;
        Ok(self.at < self.body)
    }
}
