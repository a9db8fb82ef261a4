//! How fast chunks go to a remote store and come back; for Redis beside `redis-benchmark`, in turns.
//!
//!     scripts/stores -- bash -c 'cargo run --release -p tandem-remote --example speed -- "$TANDEM_STORES_REDIS"'
//!     cargo run --release -p tandem-remote --example speed -- fs:///tmp/chunks --layers 6 --connections 1

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};
use tandem_kv_store::tier::{Outcome, Ticket, Tier, TierError};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::keys::{ChunkKey, Fingerprint};
use tandem_proto::layout::{KvDtype, KvShape};
use tandem_proto::stored::ChunkHeader;
use tandem_remote::{Remote, RemoteConfig, StoreUrl};

const USAGE: &str =
    "speed URL [--layers N, of 256 KiB: 20] [--connections N: 8] [--calls N: 128] [--rounds N: 5]";
/// Every call ends by then.
const DEADLINE: Duration = Duration::from_secs(60);

struct Bench {
    tier: Remote,
    woken: Receiver<()>,
    shape: KvShape,
    memory: Vec<Extent>,
    /// So that each round stores what is not there yet.
    stored: u64,
}

impl Bench {
    fn open(url: StoreUrl, layers: u32, connections: NonZeroUsize) -> Bench {
        // One wake is as good as many.
        let (wake, woken) = sync_channel(1);
        let config = RemoteConfig {
            deadline: DEADLINE,
            loads: connections,
            stores: connections,
            ..RemoteConfig::new(url)
        };
        let tier =
            Remote::open(config, Arc::new(move || wake.try_send(()).unwrap_or(()))).expect("the store opens");
        let dtype = KvDtype::F16;
        let shape = KvShape { layers, kv_heads: 4, head_dim: 64, page_tokens: 16, chunk_tokens: 256, dtype };
        let bytes = shape.packed_bytes(shape.chunk_tokens);
        let region = HostRegion::map(bytes * connections.get()).expect("there is memory");
        let extent = |at: usize| region.extent(at * bytes..(at + 1) * bytes).expect("it lies inside");
        let memory: Vec<_> = (0..connections.get()).map(extent).collect();
        // Touched, and not all the same.
        for (number, extent) in (1u8..).zip(&memory) {
            tandem_kv_store::tier::contract::fill(extent, &vec![number; bytes]);
        }
        Bench { tier, woken, shape, memory, stored: 0 }
    }

    fn bytes(&self) -> usize {
        self.memory[0].len()
    }

    fn header(&self, number: u64) -> ChunkHeader {
        let mut key = [7; 32];
        key[..8].copy_from_slice(&number.to_le_bytes());
        key[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        let checksums = vec![0; self.shape.layers as usize];
        let (key, fingerprint) = (ChunkKey(key), Fingerprint([7; 32]));
        ChunkHeader { key, fingerprint, shape: self.shape, tokens: self.shape.chunk_tokens, checksums }
    }

    /// Makes these calls, as many at once as there are connections. In GB/s.
    fn calls(
        &mut self,
        numbers: std::ops::Range<u64>,
        call: impl Fn(&mut Remote, Ticket, ChunkHeader, Extent),
    ) -> f64 {
        let total = (numbers.end - numbers.start) as usize * self.bytes();
        let (mut numbers, mut free) = (numbers.peekable(), self.memory.clone());
        let mut busy = HashMap::new();
        let begun = Instant::now();
        while numbers.peek().is_some() || !busy.is_empty() {
            while let Some(memory) = free.pop_if(|_| numbers.peek().is_some()) {
                let number = numbers.next().expect("it was seen");
                busy.insert(Ticket(number), memory.clone());
                let header = self.header(number);
                call(&mut self.tier, Ticket(number), header, memory);
            }
            self.woken.recv_timeout(DEADLINE).expect("calls end");
            let mut answers: Vec<(Ticket, Result<Outcome, TierError>)> = Vec::new();
            self.tier.poll(&mut answers);
            for (ticket, answer) in answers {
                answer.unwrap_or_else(|error| panic!("{error}"));
                free.extend(busy.remove(&ticket));
            }
        }
        total as f64 / begun.elapsed().as_secs_f64() / 1e9
    }

    /// One round: stores, loads, and removes what it stored. In GB/s.
    fn round(&mut self, calls: u64) -> [f64; 2] {
        let numbers = self.stored..self.stored + calls;
        self.stored += calls;
        let stores = self.calls(numbers.clone(), |tier, ticket, header, memory| {
            tier.store(ticket, Arc::new(header), memory);
        });
        let loads = self.calls(numbers.clone(), |tier, ticket, header, memory| {
            tier.load(ticket, header.key, memory);
        });
        self.calls(numbers, |tier, ticket, header, _| tier.remove(ticket, header.key));
        [stores, loads]
    }
}

/// What `redis-benchmark` does with values of the same size, as many connections and calls. In GB/s.
fn redis_benchmark(url: &StoreUrl, bytes: usize, connections: usize, calls: u64) -> Option<[f64; 2]> {
    let StoreUrl::Redis { host, port, .. } = url else { return None };
    let of = |test: &str| {
        let (port, bytes_text) = (port.to_string(), bytes.to_string());
        let (connections, calls) = (connections.to_string(), calls.to_string());
        let arguments = ["-h", host, "-p", &port, "-d", &bytes_text, "-c", &connections, "-n", &calls];
        // As ours: each value under a key of its own.
        let keys = ["-r", "1000000000"];
        let ran = Command::new("redis-benchmark")
            .args(arguments)
            .args(if test == "set" { &keys[..] } else { &[] })
            .args(["-t", test, "--csv"])
            .output()
            .unwrap_or_else(|error| panic!("redis-benchmark (apt install redis-tools): {error}"));
        let text = String::from_utf8_lossy(&ran.stdout).into_owned();
        let line = text.lines().last().unwrap_or_default().replace('"', "");
        let calls_per_second = line.split(',').nth(1).and_then(|rate| rate.parse::<f64>().ok());
        calls_per_second.unwrap_or_else(|| panic!("redis-benchmark says {text}")) * bytes as f64 / 1e9
    };
    let clear = || {
        let cleared =
            Command::new("redis-cli").args(["-h", host, "-p", &port.to_string(), "flushall"]).output();
        cleared.unwrap_or_else(|error| panic!("redis-cli: {error}"));
    };
    let stores = of("set");
    clear();
    // The one value that it loads over and over.
    let value = format!("head -c {bytes} /dev/zero | redis-cli -h {host} -p {port} -x set key:__rand_int__");
    Command::new("bash").args(["-c", &value]).output().expect("bash runs");
    let loads = of("get");
    clear();
    Some([stores, loads])
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let url: StoreUrl = match arguments.next().map(|url| url.parse()) {
        Some(Ok(url)) => url,
        Some(Err(error)) => panic!("{error}"),
        None => panic!("{USAGE}"),
    };
    let mut numbers =
        HashMap::from([("--layers", 20), ("--connections", 8), ("--calls", 128), ("--rounds", 5)]);
    while let Some(name) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse().ok()).filter(|value| *value > 0);
        match (numbers.get_mut(&*name), value) {
            (Some(number), Some(value)) => *number = value,
            _ => panic!("{USAGE}"),
        }
    }
    let connections = NonZeroUsize::new(numbers["--connections"] as usize).expect("not zero");
    let mut bench = Bench::open(url.clone(), numbers["--layers"] as u32, connections);
    let (calls, bytes) = (numbers["--calls"], bench.bytes());
    println!("{url}: chunks of {bytes} bytes, {calls} calls, {connections} at once; GB/s");
    let rounds: Vec<_> = (0..numbers["--rounds"])
        .map(|_| {
            let theirs = redis_benchmark(&url, bytes, connections.get(), calls);
            let ours = bench.round(calls);
            match theirs {
                Some(theirs) => println!(
                    "store {:.2} (redis-benchmark {:.2}), load {:.2} ({:.2})",
                    ours[0], theirs[0], ours[1], theirs[1]
                ),
                None => println!("store {:.2}, load {:.2}", ours[0], ours[1]),
            }
            (ours, theirs)
        })
        .collect();
    for (at, name) in ["store", "load"].into_iter().enumerate() {
        print!("{name}: median {:.2}", median(rounds.iter().map(|(ours, _)| ours[at])));
        if rounds[0].1.is_some() {
            let ratios = rounds.iter().filter_map(|(ours, theirs)| Some(ours[at] / (*theirs)?[at]));
            print!(", {:.2} of redis-benchmark", median(ratios));
        }
        println!();
    }
}
