//! Stages of real machines: both ends are processes of their own, and a relay is the network between them.
//!
//! Shared memory has no link: there, dropping it is dropping the session's, which is QUIC.

use crate::end::End;
use crate::fault::Stage;
#[cfg(feature = "cuda")]
use crate::members::member;
use crate::process::Process;
#[cfg(feature = "cuda")]
use crate::relay::LOOPBACK;
use crate::relay::Relay;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
#[cfg(feature = "cuda")]
use tandem_memory::cuda::Device;
use tandem_transport::{Event, Identity, Path};
#[cfg(feature = "cuda")]
use tandem_transport::{NetConfig, NetTransport};

pub(crate) type Shm = Real<ShmAlone>;
#[cfg(feature = "cuda")]
pub(crate) type CudaIpc = Real<GpusAlone>;
#[cfg(feature = "cuda")]
pub(crate) type Nccl = Real<NcclAlone>;
pub(crate) type Tls = Real<TlsAlone>;
pub(crate) type Quic = Real<QuicAlone>;
pub(crate) type Best = Real<All>;

/// So much that shared memory takes longer for it than it takes to say what is to be written.
pub(crate) const REGION: usize = 8 << 20;

pub(crate) trait Paths {
    const PATHS: &'static [Path];
}

pub(crate) struct ShmAlone;
impl Paths for ShmAlone {
    const PATHS: &'static [Path] = &[Path::Shm];
}

#[cfg(feature = "cuda")]
pub(crate) struct GpusAlone;
#[cfg(feature = "cuda")]
impl Paths for GpusAlone {
    const PATHS: &'static [Path] = &[Path::CudaIpc];
}

#[cfg(feature = "cuda")]
pub(crate) struct NcclAlone;
#[cfg(feature = "cuda")]
impl Paths for NcclAlone {
    const PATHS: &'static [Path] = &[Path::Nccl];
}

pub(crate) struct TlsAlone;
impl Paths for TlsAlone {
    const PATHS: &'static [Path] = &[Path::Tls];
}

pub(crate) struct QuicAlone;
impl Paths for QuicAlone {
    const PATHS: &'static [Path] = &[Path::Quic];
}

/// What fails goes another way, as long as there is one.
pub(crate) struct All;
impl Paths for All {
    const PATHS: &'static [Path] = &Path::ALL;
}

pub(crate) struct Real<P> {
    /// Where the processes find the cluster's CA.
    dir: PathBuf,
    ends: [Process; 2],
    relays: [Relay; 2],
    dark: bool,
    began: Instant,
    paths: PhantomData<P>,
}

impl<P: Paths> Stage for Real<P> {
    const REGION: usize = REGION;
    const OLD_OR_NEW: bool = !matches!(P::PATHS[0], Path::Tls);

    #[cfg(feature = "cuda")]
    fn missing() -> Option<String> {
        let gpus = match P::PATHS {
            [Path::CudaIpc] => 1,
            [Path::Nccl] => 2,
            _ => return None,
        };
        if let Err(error) = Device::open(gpus - 1) {
            return Some(error.to_string());
        }
        let config =
            NetConfig { paths: P::PATHS.to_vec(), gpu: Device::open(0).ok(), ..NetConfig::default() };
        NetTransport::bind(LOOPBACK, member(0), config).err().map(|error| error.to_string())
    }

    fn start(seed: u64) -> Real<P> {
        let dir = std::env::temp_dir().join(format!("tandem-faults-{}-{seed:x}", std::process::id()));
        Identity::load_or_create(&dir).unwrap();
        let ends = [0, 1].map(|end| Process::start(end, P::PATHS, &dir));
        let relays = [0, 1].map(|end| Relay::start(ends[end].address));
        let mut real = Real { dir, ends, relays, dark: false, began: Instant::now(), paths: PhantomData };
        real.warm_up();
        real
    }

    fn end(&mut self, end: usize) -> &mut dyn End {
        &mut self.ends[end]
    }

    fn address(&self, end: usize) -> SocketAddr {
        self.relays[end].addr
    }

    fn kill(&mut self, end: usize) {
        self.ends[end].kill();
    }

    fn revive(&mut self, end: usize) {
        self.ends[end] = Process::start(end, P::PATHS, &self.dir);
        self.relays[end] = Relay::start(self.ends[end].address);
        self.set_dark(self.dark);
        self.warm_up();
    }

    fn set_dark(&mut self, dark: bool) {
        self.dark = dark;
        self.relays.iter().for_each(|relay| relay.weather.dark.store(dark, Ordering::Relaxed));
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn wait(&mut self) {
        // Only tests wait like this: they watch several nodes at once, and time between them.
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl<P: Paths> Real<P> {
    /// NCCL keeps what it opens at its first use in a process: here, before anybody counts.
    fn warm_up(&mut self) {
        if P::PATHS != [Path::Nccl] {
            return;
        }
        let (ids, addr) = ([0, 1].map(|end| self.ends[end].id()), self.address(1));
        self.ends[0].connect(ids[1], addr);
        let until = |real: &mut Self, is_it: fn(&Event) -> bool| {
            let (began, mut seen) = (Instant::now(), [false; 2]);
            while seen != [true; 2] {
                assert!(began.elapsed() < Duration::from_secs(20), "NCCL does not warm up: {seen:?}");
                for (end, seen) in real.ends.iter_mut().zip(&mut seen) {
                    *seen |= end.poll().iter().any(is_it);
                }
            }
        };
        until(self, |event| matches!(event, Event::Connected { .. }));
        self.ends[0].sever(ids[1]);
        until(self, |event| matches!(event, Event::Severed { .. }));
        let holdings = |real: &mut Self| [0, 1].map(|end| real.ends[end].holdings());
        let (mut before, mut since) = (holdings(self), Instant::now());
        while since.elapsed() < Duration::from_millis(500) {
            std::thread::sleep(Duration::from_millis(20));
            let now = holdings(self);
            if now != before {
                (before, since) = (now, Instant::now());
            }
        }
    }
}

impl<P> Drop for Real<P> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
