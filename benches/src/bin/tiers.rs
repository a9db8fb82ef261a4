//! How near does a tier of stored chunks come to what lies under it? The disk tier beside `fio` with the same block size,
//! as many under way and `O_DIRECT`, in the same directory and in turns: `apt install fio`, or whatever installs it.
//!
//! Chunks are put as in a full cache, so each makes another one go: its entry is emptied first, and its header and its
//! record follow it. A get reads header and chunk at once. fio overwrites and reads blocks of a file that it has written
//! before.

use anyhow::{Context, bail, ensure};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::Thread;
use std::time::{Duration, Instant};
use tandem_benches::median;
use tandem_kv_store::tier::disk::{DiskConfig, DiskIo, DiskTier};
use tandem_kv_store::tier::{Outcome, Ticket, Tier};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::keys::{ChunkKey, Fingerprint};
use tandem_proto::layout::{KvDtype, KvShape};
use tandem_proto::stored::ChunkHeader;

const MIB: u64 = 1 << 20;
/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures the disk tier beside fio.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Where the files are made, and removed: on the disk that is to be measured.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// Sizes of chunks, in KiB: multiples of 64. 1,024 are 256 tokens of a model of 8 layers with 8 heads of 16 bytes.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096")]
    chunk_kib: Vec<u32>,
    /// Chunks that are under way at once.
    #[arg(long, default_value_t = 16)]
    under_way: usize,
    /// MiB that the disk holds of each size.
    #[arg(long, default_value_t = 1024)]
    file_mib: u64,
    /// MiB that a sample moves.
    #[arg(long, default_value_t = 512)]
    sample_mib: u64,
    /// Samples of each figure, in turns. Medians are reported, and ratios are taken within a round.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How the tier moves bytes: by io_uring, or by threads.
    #[arg(long, default_value = "uring", value_parser = ["uring", "threads"])]
    io: String,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let fio = Command::new("fio").arg("--version").output();
    let fio = fio.context("fio is not installed: apt install fio")?;
    println!("{}, {}", tandem_benches::cpu_model(), String::from_utf8_lossy(&fio.stdout).trim());
    println!("{} chunks under way; GB/s, medians of {} rounds in turns", options.under_way, options.rounds);
    println!(
        "{:>9} {:>9} {:>9} {:>6} {:>9} {:>9} {:>6}",
        "KiB", "fio read", "get", "ratio", "fio write", "put", "ratio"
    );
    for &kib in &options.chunk_kib {
        ensure!(kib > 0 && kib.is_multiple_of(64), "--chunk-kib must be multiples of 64");
        let dir = options.dir.join(format!("tandem-tiers-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let measured = measure(&options, &dir, kib);
        std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        let rounds = measured?;
        let gb = |column: usize| median(rounds.iter().map(|round| round[column] / 1e9).collect());
        let ratio =
            |ours: usize, fio: usize| median(rounds.iter().map(|round| round[ours] / round[fio]).collect());
        println!(
            "{kib:>9} {:>9.3} {:>9.3} {:>6.2} {:>9.3} {:>9.3} {:>6.2}",
            gb(0),
            gb(1),
            ratio(1, 0),
            gb(2),
            gb(3),
            ratio(3, 2)
        );
    }
    Ok(())
}

/// Bytes a second of each round: fio's reads, gets, fio's writes, puts.
fn measure(options: &Options, dir: &Path, kib: u32) -> anyhow::Result<Vec<[f64; 4]>> {
    let file = dir.join("fio");
    let sample_bytes = options.sample_mib * MIB;
    let fio = |write: bool, bytes| fio(&file, options, kib, write, bytes);
    fio(true, options.file_mib * MIB)?;
    let mut full = Disk::open(options, &dir.join("put"), kib)?;
    let mut read = Disk::open(options, &dir.join("get"), kib)?;
    let all = options.file_mib * MIB / full.chunk_bytes;
    // Until it is full, and entries are used again.
    full.put(all + all / 8)?;
    // Only what fits with its headers, so that all of it is there.
    read.put(all / 8 * 7)?;
    ensure!(read.tier.usage().evicted == 0, "--file-mib is too small for chunks of {kib} KiB");
    let chunks = sample_bytes / full.chunk_bytes;
    (0..options.rounds)
        .map(|_| {
            Ok([fio(false, sample_bytes)?, read.get(chunks)?, fio(true, sample_bytes)?, full.put(chunks)?])
        })
        .collect()
}

fn fio(file: &Path, options: &Options, kib: u32, write: bool, bytes: u64) -> anyhow::Result<f64> {
    let done = Command::new("fio")
        .args(["--name=tiers", "--ioengine=io_uring", "--direct=1", "--output-format=json", "--randrepeat=0"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={}", if write { "randwrite" } else { "randread" }))
        .arg(format!("--bs={kib}k"))
        .arg(format!("--iodepth={}", options.under_way))
        .arg(format!("--size={}m", options.file_mib))
        .arg(format!("--io_size={bytes}"))
        .output()?;
    ensure!(done.status.success(), "fio: {}", String::from_utf8_lossy(&done.stderr));
    let report: serde_json::Value =
        serde_json::from_slice(&done.stdout).context("fio's report is no JSON")?;
    let rate = &report["jobs"][0][if write { "write" } else { "read" }]["bw_bytes"];
    rate.as_f64().context("fio's report has no bandwidth")
}

/// A disk tier whose chunks are numbered.
struct Disk {
    tier: DiskTier,
    chunk_bytes: u64,
    shape: KvShape,
    /// A chunk's memory for each that is under way.
    memory: Vec<Extent>,
    /// Chunks that were put.
    put: u64,
    random: u64,
}

impl Disk {
    fn open(options: &Options, dir: &Path, kib: u32) -> anyhow::Result<Disk> {
        let shape = KvShape {
            layers: kib / 64,
            kv_heads: 8,
            head_dim: 8,
            page_tokens: 16,
            chunk_tokens: 256,
            dtype: KvDtype::F16,
        };
        let chunk_bytes = shape.packed_bytes(shape.chunk_tokens);
        ensure!(chunk_bytes == kib as usize * 1024, "a layer has 64 KiB");
        let region = HostRegion::map(chunk_bytes * options.under_way)?;
        let memory =
            (0..options.under_way).map(|index| region.extent(index * chunk_bytes..(index + 1) * chunk_bytes));
        let memory = memory.collect::<Result<Vec<_>, _>>()?;
        memory.iter().try_for_each(Extent::populate)?;
        let me = std::thread::current();
        let config = DiskConfig {
            depth: options.under_way,
            io: if options.io == "uring" { DiskIo::Uring } else { DiskIo::Threads },
            ..DiskConfig::new(dir, options.file_mib * MIB)
        };
        let tier = DiskTier::open(&config, Arc::new(move || Thread::unpark(&me)))?;
        Ok(Disk { tier, chunk_bytes: chunk_bytes as u64, shape, memory, put: 0, random: 1 })
    }

    /// Puts as many new chunks. Bytes a second.
    fn put(&mut self, chunks: u64) -> anyhow::Result<f64> {
        let first = self.put;
        let (shape, layers) = (self.shape, self.shape.layers as usize);
        let rate = self.each(chunks, |tier, index, ticket, memory| {
            let (key, fingerprint) = (key(first + index), Fingerprint([0; 32]));
            let header = ChunkHeader {
                key,
                fingerprint,
                shape,
                tokens: shape.chunk_tokens,
                checksums: vec![0; layers],
            };
            tier.store(ticket, Arc::new(header), memory);
        })?;
        self.put += chunks;
        Ok(rate)
    }

    /// Gets as many of those that were put, in any order. Bytes a second.
    fn get(&mut self, chunks: u64) -> anyhow::Result<f64> {
        let (put, mut random) = (self.put, self.random);
        let rate = self.each(chunks, |tier, _, ticket, memory| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            tier.load(ticket, key((random >> 33) % put), memory);
        })?;
        self.random = random;
        Ok(rate)
    }

    fn each(
        &mut self,
        count: u64,
        mut call: impl FnMut(&mut DiskTier, u64, Ticket, Extent),
    ) -> anyhow::Result<f64> {
        let began = Instant::now();
        let mut idle: Vec<_> = (0..self.memory.len()).collect();
        let (mut begun, mut over, mut answers) = (0, 0, Vec::new());
        while over < count {
            while begun < count
                && let Some(index) = idle.pop()
            {
                call(&mut self.tier, begun, Ticket(index as u64), self.memory[index].clone());
                begun += 1;
            }
            self.tier.poll(&mut answers);
            if answers.is_empty() {
                std::thread::park_timeout(PATIENCE);
                ensure!(began.elapsed() < PATIENCE, "the disk took too long");
            }
            for (ticket, answer) in answers.drain(..) {
                match answer? {
                    Outcome::Stored | Outcome::Loaded(_) => idle.push(ticket.0 as usize),
                    other => bail!("{other:?}"),
                }
                over += 1;
            }
        }
        Ok((count * self.chunk_bytes) as f64 / began.elapsed().as_secs_f64())
    }
}

fn key(number: u64) -> ChunkKey {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    ChunkKey(key)
}
