use super::io::{Done, Io, Task, Threads, Token, Transfer};
use super::*;
use crate::tier::contract::{self, Caller, SHAPE, fill, memory, read, whole};
use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::AtomicU64;
use tandem_proto::layout::KvShape;

/// Bytes of an entry of the contract's chunks, and of a segment of one.
const ENTRY: u64 = 16 << 10;
const SEGMENT: u64 = ENTRY + (8 << 10);

/// A directory of a test, gone with it.
struct TestDir(PathBuf);

impl TestDir {
    fn new() -> TestDir {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("tandem-disk-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = TestDir(std::env::temp_dir().join(name));
        fs::create_dir_all(&dir.0).unwrap();
        dir
    }

    /// Bytes of all files.
    fn bytes(&self) -> u64 {
        fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    }

    fn files(&self, extension: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> =
            entries.filter(|path| path.extension().is_some_and(|is| is == extension)).collect();
        files.sort();
        files
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn config(dir: &TestDir, budget_bytes: u64) -> DiskConfig {
    DiskConfig { depth: 4, queue: 64, ..DiskConfig::new(&dir.0, budget_bytes) }
}

fn caller(config: &DiskConfig) -> Caller {
    Caller::new(&|wake| Box::new(DiskTier::open(config, wake).unwrap()))
}

fn fulfils_the_contract(io: DiskIo, policy: PolicyKind) {
    let dirs = Mutex::new(Vec::new());
    contract::check(&|wake| {
        let dir = TestDir::new();
        let config = DiskConfig { io, policy, ..config(&dir, 20 * SEGMENT + 4096) };
        dirs.lock().unwrap().push(dir);
        Box::new(DiskTier::open(&config, wake).unwrap())
    });
    for dir in &*dirs.lock().unwrap() {
        assert!(dir.bytes() <= 20 * SEGMENT + 4096);
    }
}

#[test]
fn threads_fulfil_the_contract() {
    for policy in [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo] {
        fulfils_the_contract(DiskIo::Threads, policy);
    }
}

#[test]
fn io_uring_fulfils_the_contract() {
    if let Err(error) = io::Ring::new(1, &Arc::new(rustix::event::eventfd(0, EventfdFlags::empty()).unwrap()))
    {
        eprintln!("skipped: {error}");
        return;
    }
    for policy in [PolicyKind::Lru, PolicyKind::Lfu, PolicyKind::S3Fifo] {
        fulfils_the_contract(DiskIo::Uring, policy);
    }
}

#[test]
fn all_is_there_after_a_restart() {
    let dir = TestDir::new();
    let config = config(&dir, 30 * SEGMENT);
    let mut first = caller(&config);
    for number in 0..16 {
        first.store(&whole(number)).unwrap();
    }
    first.remove(whole(3).0.key).unwrap();
    drop(first);
    for damage in ["nothing", "no index", "a short index", "an index of zeros"] {
        for path in dir.files("index") {
            match damage {
                "no index" => fs::remove_file(path).unwrap(),
                "a short index" => fs::write(&path, &fs::read(&path).unwrap()[..100]).unwrap(),
                "an index of zeros" => fs::write(&path, vec![0; fs::read(&path).unwrap().len()]).unwrap(),
                _ => {}
            }
        }
        let mut again = caller(&config);
        assert_eq!(again.usage().chunks, 15, "{damage}");
        for number in 0..16 {
            assert_eq!(again.intact(&whole(number)), number != 3, "{damage}: chunk {number}");
        }
    }
    // What was stored first goes first.
    let mut again = caller(&config);
    let mut number = 100;
    while again.usage().evicted == 0 {
        again.store(&whole(number)).unwrap();
        number += 1;
    }
    assert_eq!(again.found(&[whole(0).0.key]), 0);
    assert_eq!(again.found(&[whole(1).0.key]), 1);
}

#[test]
fn a_flipped_bit_is_noticed() {
    let dir = TestDir::new();
    let config = config(&dir, 6 * SEGMENT);
    let chunk = whole(1);
    let mut first = caller(&config);
    first.store(&chunk).unwrap();
    drop(first);
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let header = chunk.0.encode().len() + segment::STAMP;
    let index = 4096 + segment::RECORD;
    let files = [dir.files("slab"), dir.files("index")].concat();
    let whole_files: Vec<_> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    for round in 0..300 {
        for (path, bytes) in files.iter().zip(&whole_files) {
            fs::write(path, bytes).unwrap();
        }
        let (file, byte) = match round % 3 {
            0 => (0, random(header)),
            1 => (0, 4096 + random(chunk.1.len())),
            _ => (1, random(index)),
        };
        let mut bytes = whole_files[file].clone();
        bytes[byte] ^= 1 << random(8);
        fs::write(&files[file], bytes).unwrap();
        let mut again = caller(&config);
        let loaded = again.load(chunk.0.key, chunk.1.len());
        match (round % 3, loaded) {
            // The stamp is not needed to use a chunk.
            (0, Ok(loaded)) if byte >= chunk.0.encode().len() => assert!(loaded == chunk),
            (0, Err(TierError::Damaged { .. })) => {
                assert_eq!(again.found(&[chunk.0.key]), 0);
                assert_eq!(again.usage().damaged, 1);
            }
            // The header is whole, and says by its checksums that the body is not: for whoever uses it to compare.
            (1, Ok((header, body))) => assert!(header == chunk.0 && body != chunk.1),
            // The header in the slab is as good.
            (2, Ok(loaded)) => assert!(loaded == chunk),
            (_, loaded) => panic!("byte {byte} of {}: {loaded:?}", files[file].display()),
        }
    }
}

#[test]
fn a_chunk_in_anothers_place_is_noticed() {
    let dir = TestDir::new();
    // Segments of one entry each.
    let config = config(&dir, 10 * SEGMENT);
    let mut first = caller(&config);
    for number in 0..3 {
        first.store(&whole(number)).unwrap();
    }
    drop(first);
    let slabs = dir.files("slab");
    let moved = fs::read(&slabs[0]).unwrap();
    fs::write(&slabs[1], moved).unwrap();
    let mut again = caller(&config);
    let damaged = (0..3).filter(|number| {
        let (header, body) = whole(*number);
        match again.load(header.key, body.len()) {
            Ok(loaded) => assert!(loaded == (header, body)),
            Err(TierError::Damaged { .. }) => return true,
            Err(error) => panic!("{error}"),
        }
        false
    });
    assert_eq!(damaged.count(), 1);
}

#[test]
fn one_process_has_it() {
    let dir = TestDir::new();
    let config = config(&dir, 6 * SEGMENT);
    let first = DiskTier::open(&config, Arc::new(|| {})).unwrap();
    let refused = DiskTier::open(&config, Arc::new(|| {})).unwrap_err().to_string();
    assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
    drop(first);
    DiskTier::open(&config, Arc::new(|| {})).unwrap();
}

#[test]
fn the_budget_holds_for_files_of_several_shapes_and_after_it_shrank() {
    let dir = TestDir::new();
    let budget = 40 * SEGMENT + 100;
    let mut tier = caller(&config(&dir, budget));
    let of = |number: u64, head_dim: u32| {
        let shape = KvShape { head_dim, ..SHAPE };
        let (mut header, _) = whole(number);
        header.shape = shape;
        (header, vec![number as u8; shape.packed_bytes(shape.chunk_tokens)])
    };
    for number in 0..400 {
        // The first shape fills it; then there are three, and in the end one of them is no longer used.
        let head_dim = if number < 100 {
            32
        } else {
            [32, 64, 200][(number % if number < 250 { 3 } else { 2 }) as usize]
        };
        let chunk = of(number, head_dim);
        assert_eq!(tier.store(&chunk), Ok(Outcome::Stored), "chunk {number}");
        assert!(tier.intact(&chunk));
        assert!(dir.bytes() <= budget, "{} bytes", dir.bytes());
    }
    let left = tier.usage();
    drop(tier);
    let mut tier = caller(&config(&dir, budget / 4));
    assert!(dir.bytes() <= budget / 4, "{} bytes", dir.bytes());
    assert!((1..left.chunks).contains(&tier.usage().chunks));
    tier.store(&of(1000, 32)).unwrap();
    assert!(dir.bytes() <= budget / 4, "{} bytes", dir.bytes());
}

#[test]
fn what_is_too_old_is_not_found() {
    let dir = TestDir::new();
    let config = DiskConfig { ttl: Some(Duration::from_secs(2)), ..config(&dir, 12 * SEGMENT) };
    let mut tier = caller(&config);
    let (old, pinned) = (whole(1), whole(2));
    tier.store(&old).unwrap();
    tier.store(&pinned).unwrap();
    tier.pin(pinned.0.key, true);
    assert!(tier.intact(&old) || tier.usage().expired == 1);
    let began = Instant::now();
    while tier.usage().expired == 0 {
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", tier.usage());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!tier.intact(&old));
    assert!(tier.intact(&pinned));
    drop(tier);
    // Its age does not begin again with the process, and nothing is pinned.
    assert!(!caller(&config).intact(&pinned));
}

#[test]
fn memory_that_begins_anywhere_is_copied() {
    let dir = TestDir::new();
    let mut tier = caller(&config(&dir, 12 * SEGMENT));
    for (number, at) in [(0, 0), (1, 8), (2, 512), (3, 4096), (4, 4104)] {
        // A partial chunk does not end with a block.
        let chunk = contract::chunk(number, 16 - number as u32);
        let bytes = chunk.1.len();
        let region = memory(bytes + 3 * 4096);
        let extent = region.part(at..at + bytes).unwrap();
        fill(&extent, &chunk.1);
        let (header, given) = (Arc::new(chunk.0.clone()), extent.clone());
        let ticket = tier.begin(|tier, ticket| tier.store(ticket, header, given));
        assert_eq!(tier.answer(ticket), Ok(Outcome::Stored));
        fill(&region, &vec![0xAA; region.len()]);
        let (key, given) = (chunk.0.key, extent.clone());
        let ticket = tier.begin(|tier, ticket| tier.load(ticket, key, given));
        assert_eq!(tier.answer(ticket), Ok(Outcome::Loaded(chunk.0.clone())));
        let all = read(&region);
        assert!(all[at..at + bytes] == chunk.1);
        assert!(all[..at].iter().chain(&all[at + bytes..]).all(|byte| *byte == 0xAA), "only its own bytes");
    }
}

/// A disk that can be made to hang, or to fail.
struct Faulty {
    disk: Threads,
    faults: Arc<Mutex<Faults>>,
    held: Vec<(Token, Transfer)>,
    failed: Vec<Done>,
}

#[derive(Default)]
struct Faults {
    /// Transfers are kept, and not begun.
    hang: bool,
    /// The transfers that fail, counted from the first on.
    fail: BTreeSet<u64>,
    begun: u64,
    cancelled: u64,
}

impl Io for Faulty {
    fn begin(&mut self, token: Token, transfer: Transfer) {
        let mut faults = self.faults.lock().unwrap();
        faults.begun += 1;
        if faults.fail.contains(&(faults.begun - 1)) {
            self.failed.push((token, Err(std::io::Error::other("the disk is broken"))));
            drop(faults);
            // It is told of at the next look.
            self.disk.task(Token::MAX - 2, Box::new(|| Ok(())));
        } else if faults.hang {
            self.held.push((token, transfer));
        } else {
            self.disk.begin(token, transfer);
        }
    }

    fn task(&mut self, token: Token, task: Task) {
        self.disk.task(token, task);
    }

    fn cancel(&mut self, _: Token) {
        self.faults.lock().unwrap().cancelled += 1;
    }

    fn flush(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Done>) {
        if !self.faults.lock().unwrap().hang {
            for (token, transfer) in self.held.drain(..) {
                self.disk.begin(token, transfer);
            }
        }
        self.disk.reap(done);
        done.retain(|(token, _)| *token != Token::MAX - 2);
        done.append(&mut self.failed);
    }
}

fn faulty(config: &DiskConfig) -> (Caller, Arc<Mutex<Faults>>) {
    let faults = Arc::new(Mutex::new(Faults::default()));
    let caller = Caller::new(&|wake| {
        let faults = Arc::clone(&faults);
        let io = |bell: &Arc<OwnedFd>| {
            let disk = Threads::new(2, bell)?;
            Ok(Box::new(Faulty { disk, faults, held: Vec::new(), failed: Vec::new() }) as Box<dyn Io>)
        };
        Box::new(DiskTier::open_with(config, wake, io).unwrap())
    });
    (caller, faults)
}

#[test]
fn a_disk_that_hangs_is_given_up_but_not_its_memory() {
    let dir = TestDir::new();
    let config = DiskConfig { deadline: Duration::from_millis(300), ..config(&dir, 12 * SEGMENT) };
    let (mut tier, faults) = faulty(&config);
    let (there, new) = (whole(1), whole(2));
    tier.store(&there).unwrap();
    faults.lock().unwrap().hang = true;
    let bytes = there.1.len();
    // Straight to the caller's memory: one for each of the four that may be under way, and one that waits.
    let loads: Vec<_> = (0..5)
        .map(|_| {
            let extent = memory(bytes);
            let given = extent.clone();
            (tier.begin(|tier, ticket| tier.load(ticket, there.0.key, given)), extent)
        })
        .collect();
    // By a copy, which is the tier's own.
    let region = memory(bytes + 8);
    let given = region.part(8..bytes + 8).unwrap();
    let (store, _memory) = {
        fill(&given, &new.1);
        let header = Arc::new(new.0.clone());
        (tier.begin(|tier, ticket| tier.store(ticket, header, given)), region)
    };
    let (waiting, begun) = loads.split_last().unwrap();
    assert!(matches!(tier.answer(waiting.0), Err(TierError::Failed { .. })));
    assert!(matches!(tier.answer(store), Err(TierError::Failed { .. })));
    // What needs no disk is answered.
    assert_eq!(tier.found(&[there.0.key]), 1);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(tier.usage().under_way, 4, "the kernel may write to their memory");
    assert_eq!(faults.lock().unwrap().cancelled, 4);
    faults.lock().unwrap().hang = false;
    for (ticket, extent) in begun {
        assert_eq!(tier.found(&[]), 0, "which makes the tier look again");
        assert_eq!(tier.answer(*ticket), Ok(Outcome::Loaded(there.0.clone())));
        assert!(read(extent) == there.1);
    }
    assert!(tier.intact(&there));
    let _ = tier.intact(&new);
}

#[test]
fn a_disk_that_fails_loses_chunks_and_never_changes_them() {
    // Every transfer fails once in a history that stores, replaces, loads and removes.
    let history = |tier: &mut Caller| {
        for number in 0..9 {
            match tier.store(&whole(number)) {
                Ok(Outcome::Stored) | Err(TierError::Failed { .. } | TierError::Full { .. }) => {}
                other => panic!("{other:?}"),
            }
            if number == 2 {
                let _ = tier.remove(whole(2).0.key);
            }
            for number in 0..9 {
                match tier.load(whole(number).0.key, whole(number).1.len()) {
                    Ok(loaded) => assert!(loaded == whole(number)),
                    Err(TierError::Failed { .. } | TierError::Absent { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    let mut transfers = 1;
    let mut fail = 0;
    while fail < transfers {
        let dir = TestDir::new();
        let config = config(&dir, 5 * SEGMENT + 4096);
        let (mut tier, faults) = faulty(&config);
        faults.lock().unwrap().fail.insert(fail);
        history(&mut tier);
        transfers = faults.lock().unwrap().begun;
        assert!(tier.usage().chunks >= 3, "transfer {fail}: {:?}", tier.usage());
        drop(tier);
        let mut again = caller(&config);
        for number in 0..9 {
            again.intact(&whole(number));
        }
        fail += 1;
    }
}

#[test]
fn a_million_chunks_are_known_soon() {
    const CHUNKS: u32 = 1 << 20;
    let dir = TestDir::new();
    let class = segment::Class { header_bytes: 4096, body_bytes: 4096 };
    let key = |number: u64| {
        let mut key = [0; 32];
        // Spread over the first bytes, as hashes are.
        key[..8].copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
        ChunkKey(key)
    };
    for number in 0..CHUNKS / segment::MAX_ENTRIES {
        let place = segment::Place { dir: dir.0.clone(), number, class };
        let records: Vec<_> = (0..segment::MAX_ENTRIES)
            .map(|entry| {
                let sequence = u64::from(number) << 32 | u64::from(entry);
                let stamp = segment::Stamp { sequence, at_s: 1 };
                Some(segment::Record { key: key(sequence), stamp, body_bytes: 4096 })
            })
            .collect();
        place.create_sparse(&records);
    }
    let config = config(&dir, 16 << 30);
    let began = Instant::now();
    let mut tier = caller(&config);
    let took = began.elapsed();
    assert_eq!(tier.usage().chunks, u64::from(CHUNKS));
    assert_eq!(tier.found(&[key(0), key(1), key(3 << 32), key(4 << 32)]), 3);
    println!("{CHUNKS} chunks are known after {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}: a busy machine takes long, but not so long");
}
