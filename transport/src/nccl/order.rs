//! In which order a direction's bytes go, without anything that moves them.
//!
//! Writes follow one another as in a stream, which is cut into parcels. Both sides reckon by the same rule where in a
//! parcel each piece of a write lies, so only headers need to be told. A parcel lies in one of few slots on
//! each side, which it takes by its number, and the reader answers each when it has copied it out: so the
//! writer never sends what has no place, each side knows of every byte what it is, and a slot is used again
//! only when nobody reads it any more.

use super::Error;
use super::message::MAX_PIECES;
use crate::net::header::Header;
use crate::net::lane::Job;
use std::collections::VecDeque;
use std::ops::Range;
use tandem_memory::Extent;

/// Bytes of a parcel, at most: the time that NCCL takes to begin one is less than it takes to carry so many.
pub(super) const SLOT: usize = 32 << 20;
/// Parcels under way in one direction, at most: one is staged, one on its way and one copied out.
pub(super) const SLOTS: usize = 3;
/// Pieces begin at multiples of this, so that GPUs copy in whole units.
const ALIGN: usize = 16;

/// Where the next piece of a parcel goes, of a write that has so many bytes left; none if the parcel is full.
fn place(end: usize, left: u64) -> Option<Range<usize>> {
    let start = end.next_multiple_of(ALIGN);
    let room = SLOT.checked_sub(start)? as u64;
    if left > 0 && room == 0 {
        return None;
    }
    Some(start..start + left.min(room) as usize)
}

/// A piece of a write, and where it lies in its parcel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) header: Header,
    /// Of the write, what comes before.
    pub(super) done: u64,
    pub(super) place: Range<usize>,
    /// Nothing of the write comes after.
    pub(super) is_last: bool,
}

/// The writer's side.
#[derive(Default)]
pub(super) struct Packing {
    pub(super) jobs: VecDeque<Job>,
    /// Bytes of the first job that are packed.
    done: u64,
    /// Parcels that are not answered, oldest first: the writes that end in each, and their bytes.
    under_way: VecDeque<Vec<(u64, u64)>>,
    /// Parcels so far.
    count: usize,
}

/// A parcel to be staged, announced and sent.
pub(super) struct Parcel {
    pub(super) slot: usize,
    pub(super) bytes: usize,
    pub(super) begun: Vec<Header>,
    /// Sources' parts, in order.
    pub(super) pieces: Vec<(Extent, Range<usize>)>,
}

impl Packing {
    /// The next parcel; none if there is nothing to send, or no slot.
    pub(super) fn next(&mut self) -> Result<Option<Parcel>, Error> {
        if self.jobs.is_empty() || self.under_way.len() == SLOTS {
            return Ok(None);
        }
        let mut parcel = Parcel { slot: self.count % SLOTS, bytes: 0, begun: Vec::new(), pieces: Vec::new() };
        let mut ended = Vec::new();
        while [parcel.begun.len(), parcel.pieces.len(), ended.len()].iter().all(|len| *len < MAX_PIECES)
            && let Some(job) = self.jobs.front()
        {
            let source = &job.write.source;
            let left = source.len() as u64 - self.done;
            let Some(place) = place(parcel.bytes, left) else { break };
            if self.done == 0 {
                parcel.begun.push(job.header());
            }
            let (from, len) = (self.done as usize, place.len());
            if len > 0 {
                let part =
                    source.part(from..from + len).map_err(|_| Error::Rule("a part beyond its source"))?;
                parcel.pieces.push((part, place.clone()));
                parcel.bytes = place.end;
            }
            if (len as u64) < left {
                self.done += len as u64;
                break;
            }
            self.done = 0;
            ended.extend(self.jobs.pop_front().map(|job| (job.sequence, job.write.source.len() as u64)));
        }
        self.under_way.push_back(ended);
        self.count += 1;
        Ok(Some(parcel))
    }

    /// The oldest parcel was answered: the fates of the writes that end in it, and their bytes.
    pub(super) fn answered(&mut self, fates: &[bool]) -> Result<(Vec<(u64, bool)>, u64), Error> {
        let ended = self.under_way.pop_front().ok_or(Error::Rule("it answered what was not sent"))?;
        if ended.len() != fates.len() {
            return Err(Error::Rule("it answered other writes than were sent"));
        }
        let bytes = ended.iter().map(|(_, len)| len).sum();
        let fates = ended.iter().zip(fates).map(|((sequence, _), landed)| (*sequence, *landed));
        Ok((fates.collect(), bytes))
    }
}

/// The reader's side.
#[derive(Default)]
pub(super) struct Unpacking {
    /// The write that goes on in the next parcel, and how much of it has come.
    begun: Option<(Header, u64)>,
    /// Parcels that are not answered.
    under_way: usize,
    count: usize,
}

/// A parcel that is announced: which slot NCCL is to bring it to, and what it holds.
pub(super) struct Announced {
    pub(super) slot: usize,
    pub(super) bytes: usize,
    pub(super) pieces: Vec<Piece>,
}

impl Unpacking {
    /// Takes in what the peer announces. An error if it is not what the rule above makes of its headers.
    pub(super) fn announced(&mut self, bytes: u32, begun: Vec<Header>) -> Result<Announced, Error> {
        if self.under_way == SLOTS {
            return Err(Error::Rule("it sent more than it was given room for"));
        }
        let mut writes: VecDeque<(Header, u64)> = self.begun.take().into_iter().collect();
        writes.extend(begun.into_iter().map(|header| (header, 0)));
        let mut announced =
            Announced { slot: self.count % SLOTS, bytes: 0, pieces: Vec::with_capacity(writes.len()) };
        if writes.is_empty() {
            return Err(Error::Rule("it sent a parcel of no write"));
        }
        while let Some((header, done)) = writes.pop_front() {
            let left = header.len - done;
            let place =
                place(announced.bytes, left).ok_or(Error::Rule("it began a write in a full parcel"))?;
            let len = place.len() as u64;
            if len > 0 {
                announced.bytes = place.end;
            }
            announced.pieces.push(Piece { header, done, place, is_last: len == left });
            if len < left {
                if !writes.is_empty() {
                    return Err(Error::Rule("it began a write within another"));
                }
                self.begun = Some((header, done + len));
            }
        }
        if announced.bytes != bytes as usize {
            return Err(Error::Rule("it sent a parcel of another length than its writes have"));
        }
        self.under_way += 1;
        self.count += 1;
        Ok(announced)
    }

    /// The oldest parcel is copied out: its slot may be used again.
    pub(super) fn answer(&mut self) {
        self.under_way -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::lane::Generation;
    use crate::rng::Rng;
    use crate::transport::Write;
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use tandem_memory::HostRegion;
    use tandem_proto::wire::Window;

    fn job(memory: &Arc<HostRegion>, sequence: u64, range: Range<usize>) -> Job {
        let window = Window { region: 0, key: sequence, offset: 0, len: range.len() as u64 };
        let source = memory.extent(range).unwrap();
        let write = Write { ticket: sequence, source, window, offset: 0, immediate: 0 };
        Job { sequence, write, floor: 0, failed: None::<Generation> }
    }

    fn bytes(extent: &Extent) -> &[u8] {
        // SAFETY: nobody writes this memory after it was filled.
        #[allow(unsafe_code)]
        unsafe {
            extent.bytes()
        }
    }

    /// Both sides, with slots in between that are only looked at when their turn has come.
    struct Both {
        packing: Packing,
        unpacking: Unpacking,
        /// The writer's, and the reader's.
        slots: [Vec<Vec<u8>>; 2],
        /// Parcels that were sent: which slot of the writer's they are in, and what was said of them.
        sent: VecDeque<(usize, u32, Vec<Header>)>,
        received: VecDeque<Announced>,
        /// What has come of each write.
        come: BTreeMap<u64, Vec<u8>>,
        fates: Vec<(u64, bool)>,
        load: u64,
    }

    fn fate(sequence: u64) -> bool {
        sequence % 3 != 1
    }

    impl Both {
        fn new() -> Both {
            Both {
                packing: Packing::default(),
                unpacking: Unpacking::default(),
                slots: [(); 2].map(|()| vec![vec![0; SLOT]; SLOTS]),
                sent: VecDeque::new(),
                received: VecDeque::new(),
                come: BTreeMap::new(),
                fates: Vec::new(),
                load: 0,
            }
        }

        fn push(&mut self, job: Job) {
            self.load += job.write.source.len() as u64;
            self.packing.jobs.push_back(job);
        }

        fn send(&mut self) -> bool {
            let Some(Parcel { slot, bytes: len, begun, pieces }) = self.packing.next().unwrap() else {
                return false;
            };
            for (source, place) in pieces {
                self.slots[0][slot][place].copy_from_slice(bytes(&source));
            }
            self.sent.push_back((slot, len as u32, begun));
            true
        }

        fn receive(&mut self) -> bool {
            let Some((from, len, begun)) = self.sent.pop_front() else { return false };
            let announced = self.unpacking.announced(len, begun).unwrap();
            assert_eq!(announced.bytes, len as usize);
            let [writers, readers] = &mut self.slots;
            readers[announced.slot][..len as usize].copy_from_slice(&writers[from][..len as usize]);
            self.received.push_back(announced);
            true
        }

        fn land(&mut self) -> bool {
            let Some(Announced { slot, pieces, .. }) = self.received.pop_front() else { return false };
            let mut fates = Vec::new();
            for Piece { header, done, place, is_last } in pieces {
                let come = self.come.entry(header.sequence).or_default();
                assert_eq!(come.len() as u64, done);
                come.extend_from_slice(&self.slots[1][slot][place]);
                assert_eq!(is_last, come.len() as u64 == header.len);
                fates.extend(is_last.then(|| fate(header.sequence)));
            }
            self.unpacking.answer();
            let (fates, bytes) = self.packing.answered(&fates).unwrap();
            self.load -= bytes;
            self.fates.extend(fates);
            true
        }
    }

    #[test]
    fn every_byte_comes_once_and_in_its_place_whatever_the_pace() {
        let memory = HostRegion::map(5 * SLOT / 2 + 64).unwrap();
        let all = memory.extent(0..memory.len()).unwrap();
        // SAFETY: nobody else has it yet.
        #[allow(unsafe_code)]
        for (at, word) in unsafe { all.bytes_mut() }.chunks_mut(8).enumerate() {
            let value = (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        }
        for seed in 0..4 {
            let mut rng = Rng::new(seed);
            let mut below = |bound: u64| rng.next() % bound;
            let mut both = Both::new();
            let mut ranges = Vec::new();
            for sequence in 0..300u64 {
                let largest = match sequence % 60 {
                    0 => 5 * SLOT as u64 / 2,
                    1..50 => 3000,
                    _ => SLOT as u64 / 28,
                };
                let len = if below(9) == 0 { 0 } else { below(largest) as usize };
                let start = below((memory.len() - len + 1) as u64) as usize;
                ranges.push(start..start + len);
                both.push(job(&memory, sequence, start..start + len));
                for _ in 0..below(3) {
                    match below(3) {
                        0 => both.send(),
                        1 => both.receive(),
                        _ => both.land(),
                    };
                }
            }
            while both.send() | both.receive() | both.land() {}
            let expected: Vec<_> = (0..300).map(|sequence| (sequence, fate(sequence))).collect();
            assert_eq!((both.fates, both.load), (expected, 0), "seed {seed}");
            for (sequence, range) in ranges.into_iter().enumerate() {
                let sent = memory.extent(range.clone()).unwrap();
                assert!(
                    both.come[&(sequence as u64)] == bytes(&sent),
                    "seed {seed}: write {sequence}, {range:?}"
                );
            }
        }
    }

    #[test]
    fn small_writes_share_a_parcel_and_slots_are_waited_for() {
        let memory = HostRegion::map(SLOT).unwrap();
        let mut packing = Packing::default();
        for sequence in 0..MAX_PIECES as u64 + 1 {
            packing.jobs.push_back(job(&memory, sequence, 0..1000));
        }
        let first = packing.next().unwrap().unwrap();
        assert_eq!((first.begun.len(), first.pieces.len()), (MAX_PIECES, MAX_PIECES));
        assert!(first.pieces.iter().all(|(_, place)| place.start % ALIGN == 0));
        assert_eq!(packing.next().unwrap().unwrap().begun.len(), 1);
        (0..9).for_each(|sequence| packing.jobs.push_back(job(&memory, sequence, 0..SLOT)));
        for slot in 2..SLOTS {
            assert_eq!(packing.next().unwrap().unwrap().slot, slot);
        }
        assert!(packing.next().unwrap().is_none());
        packing.answered(&[true; MAX_PIECES]).unwrap();
        assert_eq!(packing.next().unwrap().unwrap().slot, 0);
        assert!(packing.next().unwrap().is_none());
    }

    #[test]
    fn peers_that_break_the_order_are_told_so() {
        let header = |len| {
            let window = Window { region: 0, key: 1, offset: 0, len };
            Header { window, offset: 0, len, immediate: 0, sequence: 0, floor: 0, failed: None }
        };
        let whole = SLOT as u64;
        let check = |parcels: &[(u64, &[u64])], why: &str| {
            let mut unpacking = Unpacking::default();
            let mut said = Ok(());
            for (bytes, begun) in parcels {
                assert!(said.is_ok(), "{parcels:?}: {said:?} too early");
                let begun = begun.iter().map(|len| header(*len)).collect();
                said = unpacking.announced(*bytes as u32, begun).map(|_| ());
            }
            let said = said.map_or_else(|error| error.to_string(), |()| "fine".into());
            assert!(said.contains(why), "{parcels:?}: {said}");
        };
        check(&[(100, &[100])], "fine");
        check(&[(116, &[100, 4])], "fine");
        check(&[(104, &[100, 4])], "another length");
        check(&[(99, &[100])], "another length");
        check(&[(whole, &[whole + 1]), (1, &[])], "fine");
        check(&[(whole, &[whole + 1]), (20, &[4])], "fine");
        check(&[(whole, &[whole + 1]), (2, &[])], "another length");
        check(&[(whole, &[whole + 1, 4])], "within another");
        check(&[(whole, &[whole, 4])], "full parcel");
        check(&[(0, &[])], "no write");
        check(&[(whole, &[u64::MAX]), (whole, &[]), (whole, &[4])], "within another");
        let parcel: (u64, &[u64]) = (1, &[1]);
        check(&[parcel; SLOTS], "fine");
        check(&[parcel; SLOTS + 1], "more than it was given room for");
        let mut packing = Packing::default();
        assert!(packing.answered(&[]).is_err());
        packing.jobs.push_back(job(&HostRegion::map(8).unwrap(), 0, 0..8));
        packing.next().unwrap().unwrap();
        assert!(packing.answered(&[true, true]).is_err());
    }
}
