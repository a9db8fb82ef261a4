//! The writing thread of a lane: writes, and what the reading thread has to say.

use super::TlsError;
use super::frame::{Frame, body_of, piece_at};
use super::lane::{Answers, TlsLane, Work};
use super::outgoing::Outgoing;
use crate::lent::Lent;
use crate::net::lane::Job;

/// Sends until the lane is closed, or broken.
pub(super) fn send(lane: &TlsLane, out: &mut Outgoing) -> Result<(), TlsError> {
    loop {
        match lane.next_work(out.is_empty()) {
            Work::Closed => return Ok(()),
            Work::Rest => out.send(&lane.socket)?,
            Work::Do(answers, job) => {
                put_answers(lane, out, &answers)?;
                if let Some(job) = job {
                    put_write(lane, out, job)?;
                }
            }
        }
    }
}

fn put_answers(lane: &TlsLane, out: &mut Outgoing, answers: &Answers) -> Result<(), TlsError> {
    for acks in answers.ack_frames() {
        out.make_room(&lane.socket)?;
        out.put_frame(&Frame::Acks(acks))?;
    }
    for sequence in &answers.stops {
        out.make_room(&lane.socket)?;
        out.put_frame(&Frame::Stop(*sequence))?;
    }
    Ok(())
}

fn put_write(lane: &TlsLane, out: &mut Outgoing, job: Job) -> Result<(), TlsError> {
    let header = job.header();
    let source = Lent(job.write.source);
    let (sequence, body) = (header.sequence, body_of(header.len));
    out.make_room(&lane.socket)?;
    lane.with_source(|| {
        // It fits: the extent is in memory.
        let tail = &source.as_ref()[body as usize..];
        out.put_frame(&Frame::Write { header, tail })
    })?;
    let mut at = 0;
    while at < body {
        if out.make_room(&lane.socket)? {
            // A long write holds up no answers.
            put_answers(lane, out, &lane.take_answers())?;
            out.make_room(&lane.socket)?;
        }
        if lane.is_unwanted(sequence) {
            out.put_frame(&Frame::Cut(sequence))?;
            break;
        }
        let piece = piece_at(body, at);
        lane.with_source(|| out.put(&source.as_ref()[at as usize..][..piece]))?;
        at += piece as u64;
    }
    lane.sealed(sequence, header.len);
    Ok(())
}
