//! How much of the machine does the transport give, and what does it cost? One run moves bytes from one
//! process into others' memory over loopback by every way in turn, beside the limits and the peers of this
//! machine: a plain copy, the kernel's copy between processes, plain TCP, AES-GCM, quinn without our layers, NIXL and
//! Mooncake.
//!
//! Under `scripts/two-hosts`, and with `--hosts`, the bytes go from one host to the other.
//!
//! Every sample's bytes are checked where they landed. Processor time is counted in each process around the
//! sample alone.

mod aes;
mod cma;
mod end;
mod measure;
mod memcpy;
mod ours;
#[cfg(feature = "cuda")]
mod p2p;
mod pattern;
mod place;
mod plot;
mod process;
mod quinn;
mod report;
mod tcp;
mod way;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use place::Place;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tandem_process::units::bytes;
use way::Way;

/// Measures the transport's paths beside the machine's limits and other engines, in one run.
///
/// The whole product of --sizes, --extents and --peers is measured for every way in turn, round after round; figures are
/// medians, and ratios are taken within a round. Latency is that of one message at a time: until its sender has the
/// report, and until the receiving program saw it (our paths, tcp and quinn; unknown of others).
#[derive(Parser)]
#[command(
    version,
    after_help = "Ways:\n  \
    shm, rdma, tls, quic-MTU  our paths\n  \
    cuda_ipc                  ours, between GPUs 0 and 1, or in one where there is no second (feature cuda)\n  \
    nccl                      ours, between GPUs 0 and 1, over what NCCL finds there (feature cuda)\n  \
    p2p                       limit: copies between these by a copy engine, in one process\n  \
    memcpy                    limit: a copy by one core\n  \
    cma                       limit: process_vm_writev, one copy by the kernel, nobody is told\n  \
    tcp                       limit: plain TCP\n  \
    aes-128-gcm               limit: one core seals records of 16 KiB, and sends nothing\n  \
    quinn-MTU                 limit: QUIC without our layers\n  \
    nixl, nixl-tcp            peer: NIXL over UCX as it is (on one host, CMA); with UCX_TLS=tcp\n  \
    mooncake                  peer: Mooncake's transfer engine over tcp\n\n\
    Examples:\n  transport --ways memcpy,cma,shm --sizes 64KiB,1MiB --svg shm.svg\n  \
    transport --ways memcpy,cma,shm,nixl,mooncake --peer .venv/bin/python\n  \
    transport --ways tcp,shm,tls --sizes 16MiB --extents 1,16,256,4096\n  \
    transport --ways memcpy,shm,tls --sizes 1MiB --peers 1,2,4,8\n  \
    scripts/two-hosts --delay 20ms --loss 0.1% -- transport --ways tcp,tcp-bbr,quic-1452:2 --sizes 1MiB --under-way 16MiB --seconds 5 --rounds 3\n  \
    transport --ways tcp,tls,quic-1452 --hosts '10.0.0.1 ssh a env -C /tmp/x ./transport' '10.0.0.2 ssh b env -C /tmp/x ./transport'"
)]
struct Options {
    /// What to measure, of the list below. Append -NAME for another congestion control than the usual (quic, quinn:
    /// bbr or cubic; tcp: whatever the kernel has), then :N for N connections (tcp, tls, quic) or, for quic, so many
    /// threads too.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "memcpy,cma,shm,tcp,aes-128-gcm,tls,quic-8952,quinn-8952,quic-1452,quinn-1452"
    )]
    ways: Vec<Way>,
    /// Bytes of a message.
    #[arg(long, value_delimiter = ',', default_value = "64KiB,256KiB,1MiB,16MiB,64MiB", value_parser = bytes)]
    sizes: Vec<usize>,
    /// Extents of a message, 1 to 4096, scattered over source and landing memory and submitted together.
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..=4096))]
    extents: Vec<u16>,
    /// Processes, 1 to 8, that one process sends to at once. Throughput is that of all together; latency is measured
    /// with one.
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u8).range(1..=8))]
    peers: Vec<u8>,
    /// Both processes send at once: our paths within one session, others over a connection for each direction. Throughput
    /// is that of both directions together, and so is what processor time is divided by; no latency is measured.
    #[arg(long)]
    both_ways: bool,
    /// Bytes under way at once to each peer on each connection, as far as 4 to 64 messages of a size come near it. More
    /// than the path's rate times its round trip, or the path is not filled.
    #[arg(long, default_value = "4MiB", value_parser = bytes)]
    under_way: usize,
    /// Seconds of each sample.
    #[arg(long, default_value_t = 0.4)]
    seconds: f64,
    /// Samples of each figure. Medians are reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Messages sent one at a time after each sample, for latency, as far as they fit in the seconds of a sample; 0 to
    /// leave it out.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(..=10_000))]
    pings: u16,
    /// A Python with NIXL and Mooncake (benches/peers/transfer-requirements.txt). Measures both, unless --ways names one.
    #[arg(long, value_name = "PYTHON")]
    peer: Option<PathBuf>,
    /// Two hosts, for the sender and for all that it sends to: each the address at which the other reaches it, and the
    /// command that starts this program there, in a folder with `tls/ca.pem`, as one argument. With a port, each process
    /// there takes one from it on. On two machines, when a message was seen to land is not measured: no clock is common.
    #[arg(long, num_args = 2, value_names = ["SENDER", "RECEIVERS"])]
    hosts: Vec<Place>,
    /// Where to write the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to draw throughput, as SVG: by size, or by the axis that has several values.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// One process of a way, which this program starts by itself.
    #[command(hide = true)]
    End { way: Way, index: usize, region: usize, listen: SocketAddr, dir: PathBuf },
}

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where the identity lies on other hosts.
const IDENTITY: &str = "tls";
/// The largest message.
const MAX_SIZE: usize = 1 << 30;

fn main() -> anyhow::Result<()> {
    let mut options = Options::parse();
    if let Some(Role::End { way, index, region, listen, dir }) = &options.role {
        return end::serve(way, *index, *region, *listen, dir);
    }
    options.check()?;
    if !options.hosts.is_empty() {
        let measured = measure::all(&options, std::path::Path::new(IDENTITY))?;
        return report::report(&options, &measured);
    }
    let dir = std::env::temp_dir().join(format!("tandem-bench-{}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("{}", dir.display()))?;
    let outcome = measure::all(&options, &dir);
    std::fs::remove_dir_all(&dir)?;
    report::report(&options, &outcome?)
}

impl Options {
    fn check(&mut self) -> anyhow::Result<()> {
        if self.peer.is_some() && !self.ways.iter().any(Way::is_peer) {
            self.ways.extend(["nixl", "mooncake"].map(|name| name.parse().expect("a way")));
        }
        for &size in &self.sizes {
            ensure!(
                (64..=MAX_SIZE).contains(&size) && size.is_multiple_of(8),
                "--sizes {size}: a message has 64 B to 1 GiB, in multiples of 8"
            );
        }
        ensure!(
            (0.01..=60.0).contains(&self.seconds),
            "--seconds {}: a sample takes 0.01 to 60 s",
            self.seconds
        );
        ensure!((1..=1000).contains(&self.rounds), "--rounds {}: from 1 to 1000", self.rounds);
        ensure!(
            !self.both_ways || self.peers == [1],
            "--both-ways is between two processes: leave out --peers, which is one process sending to several"
        );
        if let Some(way) = self.ways.iter().find(|way| way.is_peer() && !self.hosts.is_empty()) {
            anyhow::bail!("--ways {way} is run by a script of this host: leave it out, or leave out --hosts");
        }
        for (at, way) in self.ways.iter().enumerate() {
            ensure!(!self.ways[..at].contains(way), "--ways {way} is there twice");
            ensure!(
                !self.both_ways || way.kind != way::Kind::Aes,
                "--both-ways: aes-128-gcm sends nothing, so it has no direction: leave it out of --ways"
            );
        }
        Ok(())
    }
}
