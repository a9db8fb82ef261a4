//! The disk tier under kill -9: a process that stores without end is killed at random moments, and whatever its directory
//! holds afterwards is what was stored.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tandem_kv_store::policy::PolicyKind;
use tandem_kv_store::tier::contract::{Caller, whole};
use tandem_kv_store::tier::disk::{DiskConfig, DiskIo, DiskTier};
use tandem_kv_store::tier::{Outcome, TierError};

/// How often a process is killed: `TANDEM_KILLS`, or this.
const KILLS: u64 = 20;
/// Where the process finds its directory, and how it moves bytes.
const DIR: &str = "TANDEM_KILLED_DIR";
const THREADS: &str = "TANDEM_KILLED_THREADS";
/// Chunks are numbered below this, so that the same come again and again.
const NUMBERS: u64 = 200;
const BUDGET: u64 = 2 << 20;

fn open(dir: &Path, io: DiskIo) -> Caller {
    let config =
        DiskConfig { depth: 8, queue: 64, io, policy: PolicyKind::Lru, ..DiskConfig::new(dir, BUDGET) };
    Caller::new(&|wake| Box::new(DiskTier::open(&config, wake).expect("the directory is free")))
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// The process that is killed. It says when it begins.
fn store_without_end(dir: &Path) {
    let io = if std::env::var_os(THREADS).is_some() { DiskIo::Threads } else { DiskIo::Best };
    let mut tier = open(dir, io);
    println!("begun");
    std::io::stdout().flush().expect("somebody listens");
    let mut under_way = VecDeque::new();
    let mut state = u64::from(std::process::id());
    loop {
        let (header, body) = whole(next(&mut state) % NUMBERS);
        if next(&mut state).is_multiple_of(4) {
            let key = header.key;
            under_way.push_back((tier.begin(|tier, ticket| tier.remove(ticket, key)), None));
        } else {
            let (ticket, memory) = tier.begin_store(&header, &body);
            under_way.push_back((ticket, Some(memory)));
        }
        if under_way.len() > 12 {
            let (ticket, _memory) = under_way.pop_front().expect("there are some");
            tier.answer(ticket).expect("the disk is well");
        }
    }
}

/// The tests are each other's children, by name.
fn check(name: &str, threads: bool) {
    if let Some(dir) = std::env::var_os(DIR) {
        return store_without_end(&PathBuf::from(dir));
    }
    let kills = std::env::var("TANDEM_KILLS").map_or(KILLS, |kills| kills.parse().expect("a number"));
    let dir = std::env::temp_dir().join(format!("tandem-{name}-{}", std::process::id()));
    let mut state = 0x5EED_u64;
    let (mut found, mut absent, mut slowest) = (0_u64, 0_u64, Duration::ZERO);
    for kill in 0..kills {
        let mut command = Command::new(std::env::current_exe().expect("it runs"));
        if threads {
            command.env(THREADS, "1");
        }
        let mut child = command
            .args(["--exact", name, "--nocapture"])
            .env(DIR, &dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("it can be started again");
        let lines = BufReader::new(child.stdout.take().expect("it was asked for")).lines();
        let begun = lines.map_while(Result::ok).any(|line| line.contains("begun"));
        assert!(begun, "kill {kill}: the process did not begin: {:?}", child.wait());
        std::thread::sleep(Duration::from_micros(next(&mut state) % 60_000));
        child.kill().expect("it runs");
        child.wait().expect("it was killed");

        if kill % 3 == 0 {
            // What the headers alone say must be as right.
            let files =
                std::fs::read_dir(&dir).expect("it is there").map(|file| file.expect("it is there").path());
            files.filter(|path| path.extension().is_some_and(|is| is == "index")).for_each(|path| {
                std::fs::remove_file(path).expect("it is there");
            });
        }
        let began = Instant::now();
        let mut tier = open(&dir, DiskIo::Best);
        slowest = slowest.max(began.elapsed());
        for number in 0..NUMBERS {
            let chunk = whole(number);
            let is_found = tier.found(&[chunk.0.key]) == 1;
            match tier.load(chunk.0.key, chunk.1.len()) {
                Ok(loaded) => {
                    assert!(is_found && loaded == chunk, "kill {kill}: chunk {number} is another");
                    found += 1;
                }
                Err(TierError::Absent { .. }) if !is_found => absent += 1,
                Err(error) => panic!("kill {kill}: chunk {number}, found: {is_found}: {error}"),
            }
        }
        let files = std::fs::read_dir(&dir).expect("it is there");
        let bytes: u64 =
            files.map(|file| file.and_then(|file| file.metadata()).expect("it is there").len()).sum();
        assert!(bytes <= BUDGET, "kill {kill}: {bytes} bytes");
        assert_eq!(tier.store(&whole(NUMBERS + kill)), Ok(Outcome::Stored));
    }
    assert!(found > kills && absent > kills, "it proves little: {found} found, {absent} absent");
    println!("{name}: {kills} kills, {found} chunks found, {absent} absent, opened within {slowest:?}");
    std::fs::remove_dir_all(&dir).expect("it is there");
}

#[test]
fn what_a_killed_process_leaves_is_whole() {
    check("what_a_killed_process_leaves_is_whole", false);
}

#[test]
fn what_a_killed_process_with_threads_leaves_is_whole() {
    check("what_a_killed_process_with_threads_leaves_is_whole", true);
}
