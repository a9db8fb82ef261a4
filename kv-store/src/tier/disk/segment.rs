//! The files of a segment: a *slab* of entries of one size, and its *index*.
//!
//! An entry of the slab is `[header][body]`, each filled up to whole blocks. The header is that of the chunk, which
//! guards itself, and a [`Stamp`]; blocks that begin with anything else make the entry empty.
//!
//! The index is one block that says what the slab is, and a [`Record`] for each entry. Each is checksummed with its
//! place, so that one that is damaged, or another's, is told from one that says "empty". Records are written where they
//! stand, so the index never grows.

use super::buffers::HEADER_ROOM;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::keys::ChunkKey;
use tandem_proto::stored::ChunkHeader;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// What direct I/O goes by: addresses, offsets and lengths are multiples of it.
pub(super) const BLOCK: usize = 4096;
/// Bytes of a record.
pub(super) const RECORD: usize = 64;
/// Bytes of a stamp.
pub(super) const STAMP: usize = 24;
/// The most entries of a segment: an index of 16 MiB.
pub(super) const MAX_ENTRIES: u32 = 1 << 18;
const INDEX_MAGIC: [u8; 8] = *b"tdmIdx01";
const FREE: u32 = 0x0F9E_EF9E;
const USED: u32 = 0x05ED_5EDC;
/// Threads that read headers where an index is no help.
const SCANNERS: usize = 16;

/// The size of a slab's entries. Chunks of one shape have one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Class {
    pub(super) header_bytes: u32,
    pub(super) body_bytes: u64,
}

impl Class {
    /// That of a chunk and of all others of its shape, partial ones too.
    pub(super) fn of(header: &ChunkHeader, encoded: usize) -> Class {
        let body = header.shape.packed_bytes(header.shape.chunk_tokens);
        let header_bytes = (encoded + STAMP).next_multiple_of(BLOCK) as u32;
        Class { header_bytes, body_bytes: body.next_multiple_of(BLOCK) as u64 }
    }

    pub(super) fn entry_bytes(self) -> u64 {
        u64::from(self.header_bytes) + self.body_bytes
    }

    /// Where an entry begins.
    pub(super) fn entry(self, entry: u32) -> u64 {
        u64::from(entry) * self.entry_bytes()
    }

    /// Bytes of both files of a segment of so many entries.
    pub(super) fn segment_bytes(self, entries: u32) -> u64 {
        self.entry(entries) + index_bytes(entries)
    }

    /// The most entries that these bytes are enough for, index and all.
    pub(super) fn entries_in(self, bytes: u64) -> u32 {
        let about = bytes.saturating_sub(2 * BLOCK as u64) / (self.entry_bytes() + RECORD as u64);
        let about = about.min(MAX_ENTRIES.into()) as u32;
        // Rounding may leave room for one more.
        if about < MAX_ENTRIES && self.segment_bytes(about + 1) <= bytes { about + 1 } else { about }
    }
}

fn index_bytes(entries: u32) -> u64 {
    (BLOCK + (entries as usize * RECORD).next_multiple_of(BLOCK)) as u64
}

/// Where a record stands in its index.
pub(super) fn record_at(entry: u32) -> u64 {
    BLOCK as u64 + u64::from(entry) * RECORD as u64
}

/// What an index says of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Record {
    pub(super) key: ChunkKey,
    pub(super) stamp: Stamp,
    /// Bytes of the chunk, which may be shorter than its entry's body.
    pub(super) body_bytes: u64,
}

/// When a chunk was stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Stamp {
    /// Counts stores. Of two entries with one key the later one counts.
    pub(super) sequence: u64,
    /// In seconds since 1970, so that it means something after a restart.
    pub(super) at_s: u32,
}

impl Stamp {
    fn bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..].copy_from_slice(&self.at_s.to_le_bytes());
        bytes
    }

    /// As it stands behind a header.
    pub(super) fn encode(self) -> [u8; STAMP] {
        let mut bytes = [0; STAMP];
        bytes[..12].copy_from_slice(&self.bytes());
        bytes[16..].copy_from_slice(&xxh3_64(&self.bytes()).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; STAMP]) -> Option<Stamp> {
        let stamp = Stamp { sequence: number(bytes, 0), at_s: number(bytes, 8) as u32 };
        (stamp.encode() == *bytes).then_some(stamp)
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("eight bytes"))
}

/// A record as bytes; None for an entry that is empty.
pub(super) fn encode_record(segment: u32, entry: u32, record: Option<&Record>) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    if let Some(Record { key, stamp, body_bytes }) = record {
        bytes[..32].copy_from_slice(&key.0);
        bytes[32..44].copy_from_slice(&stamp.bytes());
        bytes[48..56].copy_from_slice(&body_bytes.to_le_bytes());
    }
    bytes[44..48].copy_from_slice(&if record.is_some() { USED } else { FREE }.to_le_bytes());
    let digest = xxh3_64_with_seed(&bytes[..56], place(segment, entry));
    bytes[56..].copy_from_slice(&digest.to_le_bytes());
    bytes
}

fn place(segment: u32, entry: u32) -> u64 {
    u64::from(segment) << 32 | u64::from(entry)
}

/// What a record says, if it is whole and of this place.
fn decode_record(segment: u32, entry: u32, bytes: &[u8; RECORD]) -> Option<Option<Record>> {
    if number(bytes, 56) != xxh3_64_with_seed(&bytes[..56], place(segment, entry)) {
        return None;
    }
    match u32::from_le_bytes([bytes[44], bytes[45], bytes[46], bytes[47]]) {
        FREE => Some(None),
        USED => {
            let key = ChunkKey(*bytes.first_chunk().expect("it has 64"));
            let stamp = Stamp { sequence: number(bytes, 32), at_s: number(bytes, 40) as u32 };
            Some(Some(Record { key, stamp, body_bytes: number(bytes, 48) }))
        }
        _ => None,
    }
}

/// What the blocks of an entry's header say.
fn decode_entry(class: Class, bytes: &[u8]) -> Option<Record> {
    let (header, used) = ChunkHeader::decode(bytes).ok()?;
    let stamp = Stamp::decode(bytes.get(used..)?.first_chunk()?).unwrap_or_default();
    let body_bytes = header.body_bytes() as u64;
    (body_bytes <= class.body_bytes).then_some(Record { key: header.key, stamp, body_bytes })
}

/// The open files of a segment, which hold its lock: as long as the kernel writes to it, also after its process died.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) slab: Arc<File>,
    pub(super) index: Arc<File>,
    /// Whether the system's cache is passed by.
    pub(super) direct: bool,
}

/// Where the files of a segment are. The name of the slab says all that is needed to read it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) dir: PathBuf,
    pub(super) number: u32,
    pub(super) class: Class,
}

impl Place {
    fn slab(&self) -> PathBuf {
        let Class { header_bytes, body_bytes } = self.class;
        self.dir.join(format!("{:08}-{header_bytes}-{body_bytes}.slab", self.number))
    }

    fn index(&self) -> PathBuf {
        self.dir.join(format!("{:08}.index", self.number))
    }

    /// The segment that a slab's name tells of.
    pub(super) fn parse(dir: &Path, name: &str) -> Option<Place> {
        let mut parts = name.strip_suffix(".slab")?.split('-');
        let number = parts.next()?.parse().ok()?;
        let (header_bytes, body_bytes) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let class = Class { header_bytes, body_bytes };
        let place = Place { dir: dir.to_path_buf(), number, class };
        let blocks = (header_bytes as usize).is_multiple_of(BLOCK) && body_bytes.is_multiple_of(BLOCK as u64);
        // Bounds that no chunk reaches, so that no sum overflows.
        let sane = header_bytes > 0
            && header_bytes as usize <= HEADER_ROOM
            && body_bytes > 0
            && body_bytes <= 1 << 40;
        (blocks && sane && place.slab().file_name()? == name).then_some(place)
    }

    fn index_block(&self, entries: u32) -> Vec<u8> {
        let mut block = INDEX_MAGIC.to_vec();
        for number in [self.number, self.class.header_bytes, entries] {
            block.extend(number.to_le_bytes());
        }
        block.extend(self.class.body_bytes.to_le_bytes());
        block.extend(xxh3_64(&block).to_le_bytes());
        block.resize(BLOCK, 0);
        block
    }

    /// Makes a segment of empty entries. Its room is taken now, so that no store finds the disk full later.
    pub(super) fn create(&self, entries: u32) -> io::Result<Files> {
        let made = self.try_create(entries);
        if made.is_err() {
            let _ = self.delete();
        }
        made
    }

    fn try_create(&self, entries: u32) -> io::Result<Files> {
        let files = self.open_files(OFlags::CREATE | OFlags::EXCL)?;
        let bytes = self.class.entry(entries);
        match rustix::fs::fallocate(&files.slab, FallocateFlags::empty(), 0, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => files.slab.set_len(bytes)?,
            done => done?,
        }
        self.write_index(&files.index, &vec![None; entries as usize])?;
        Ok(files)
    }

    /// A segment that says it has these chunks, and takes no room for them.
    #[cfg(test)]
    pub(super) fn create_sparse(&self, records: &[Option<Record>]) {
        let files = self.open_files(OFlags::CREATE).unwrap();
        files.slab.set_len(self.class.entry(records.len() as u32)).unwrap();
        self.write_index(&files.index, records).unwrap();
    }

    fn write_index(&self, index: &File, records: &[Option<Record>]) -> io::Result<()> {
        let entries = records.len() as u32;
        let mut bytes = Vec::with_capacity(1 << 20);
        let mut at = BLOCK as u64;
        for (entry, record) in (0..).zip(records) {
            bytes.extend(encode_record(self.number, entry, record.as_ref()));
            if bytes.len() >= 1 << 20 || entry + 1 == entries {
                index.write_all_at(&bytes, at)?;
                at += bytes.len() as u64;
                bytes.clear();
            }
        }
        index.set_len(index_bytes(entries))?;
        // The block that makes the index one goes last.
        index.write_all_at(&self.index_block(entries), 0)
    }

    /// Deletes the segment's files, the slab first: an index alone is nothing.
    pub(super) fn delete(&self) -> io::Result<()> {
        for path in [self.slab(), self.index()] {
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    fn open_files(&self, create: OFlags) -> io::Result<Files> {
        let mode = Mode::from_raw_mode(0o600);
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let (slab, direct) = match rustix::fs::open(self.slab(), flags | OFlags::DIRECT | create, mode) {
            // Some file systems make the file before they refuse.
            Err(rustix::io::Errno::INVAL) => {
                (rustix::fs::open(self.slab(), flags | (create - OFlags::EXCL), mode)?, false)
            }
            slab => (slab?, true),
        };
        let index = rustix::fs::open(self.index(), flags | OFlags::CREATE, mode)?;
        let (slab, index) = (Arc::new(File::from(slab)), Arc::new(File::from(index)));
        // Writes of a process that was killed are over when their hold of the file is.
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            match rustix::fs::flock(&slab, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                locked => break locked?,
            }
        }
        Ok(Files { slab, index, direct })
    }

    /// Bytes of the segment's files.
    pub(super) fn bytes(&self) -> io::Result<u64> {
        let of = |path| match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            found => found.map(|found| found.len()),
        };
        Ok(of(self.slab())? + of(self.index())?)
    }

    /// Opens a segment and reads what is in it: from its index, and from the headers of entries whose record is damaged.
    pub(super) fn recover(&self) -> io::Result<Recovered> {
        let files = self.open_files(OFlags::empty())?;
        let len = files.slab.metadata()?.len();
        let entries = (len / self.class.entry_bytes()).min(MAX_ENTRIES.into()) as u32;
        if self.class.entry(entries) != len {
            // Killed while it was made.
            files.slab.set_len(self.class.entry(entries))?;
        }
        let index = self.read_index(&files.index, entries)?;
        let whole = index.is_some();
        let mut records = index.unwrap_or_else(|| vec![None; entries as usize]);
        let unknown: Vec<_> = (0..entries).filter(|entry| records[*entry as usize].is_none()).collect();
        let scanned = unknown.len() as u32;
        for (entry, record) in self.scan(&files.slab, &unknown)? {
            records[entry as usize] = Some(record);
        }
        let records: Vec<_> = records.into_iter().map(Option::flatten).collect();
        if !whole {
            files.index.set_len(0)?;
            self.write_index(&files.index, &records)?;
        } else {
            for entry in unknown {
                let record = encode_record(self.number, entry, records[entry as usize].as_ref());
                files.index.write_all_at(&record, record_at(entry))?;
            }
        }
        Ok(Recovered { files, records, scanned })
    }

    /// The records; None among them for a damaged one. Nothing at all if it is no index of this slab.
    fn read_index(&self, mut index: &File, entries: u32) -> io::Result<Option<Vec<Option<Option<Record>>>>> {
        if index.metadata()?.len() != index_bytes(entries) {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(index_bytes(entries) as usize);
        index.read_to_end(&mut bytes)?;
        let Some((block, records)) = bytes.split_at_checked(BLOCK) else { return Ok(None) };
        if block != self.index_block(entries) {
            return Ok(None);
        }
        let (records, _) = records.as_chunks();
        let records =
            (0..entries).zip(records).map(|(entry, bytes)| decode_record(self.number, entry, bytes));
        Ok(Some(records.collect()))
    }

    /// What the headers of these entries say.
    fn scan(&self, slab: &File, entries: &[u32]) -> io::Result<Vec<(u32, Option<Record>)>> {
        let next = AtomicUsize::new(0);
        let scanner = || -> io::Result<Vec<(u32, Option<Record>)>> {
            let header_bytes = self.class.header_bytes as usize;
            let block = HostRegion::private(header_bytes)
                .and_then(|region| region.extent(0..header_bytes))
                .map_err(io::Error::other)?;
            let mut found = Vec::new();
            while let Some(entry) = entries.get(next.fetch_add(1, Ordering::Relaxed)) {
                found.push((*entry, self.read_header(slab, *entry, &block)));
            }
            Ok(found)
        };
        std::thread::scope(|scope| {
            let count = SCANNERS.min(entries.len());
            let scanners: Vec<_> = (0..count).map(|_| scope.spawn(scanner)).collect();
            let mut found = Vec::with_capacity(entries.len());
            for scanner in scanners {
                found.extend(scanner.join().expect("it does not panic")?);
            }
            Ok(found)
        })
    }

    fn read_header(&self, slab: &File, entry: u32, block: &Extent) -> Option<Record> {
        // SAFETY: the block is this thread's own.
        let bytes = unsafe { block.bytes_mut() };
        // What cannot be read is lost, and no reason to lose the others.
        slab.read_exact_at(bytes, self.class.entry(entry)).ok()?;
        decode_entry(self.class, bytes)
    }
}

/// A segment as it was found.
pub(super) struct Recovered {
    pub(super) files: Files,
    /// What each entry holds.
    pub(super) records: Vec<Option<Record>>,
    /// Entries whose headers had to be read.
    pub(super) scanned: u32,
}

/// The segments of a directory, and indices that are nobody's, which are deleted.
pub(super) fn places(dir: &Path) -> io::Result<Vec<Place>> {
    let (mut places, mut indices) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        places.extend(Place::parse(dir, name));
        let index = name.strip_suffix(".index").and_then(|number| number.parse::<u32>().ok());
        indices.extend(index.map(|number| (number, dir.join(name))));
    }
    places.sort_by_key(|place| place.number);
    places.dedup_by_key(|place| place.number);
    for (number, path) in indices {
        if places.binary_search_by_key(&number, |place| place.number).is_err() {
            fs::remove_file(path)?;
        }
    }
    Ok(places)
}
