//! Stages of real machines: both ends are processes of their own, and a relay is the network between them.
//!
//! Shared memory has no link: there, dropping it is dropping the session's, which is QUIC.

use crate::end::End;
use crate::fault::Stage;
use crate::process::Process;
use crate::relay::Relay;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
#[cfg(feature = "cuda")]
use tandem_memory::cuda::Device;
use tandem_transport::{Identity, Path};

pub(crate) type Shm = Real<ShmAlone>;
#[cfg(feature = "cuda")]
pub(crate) type CudaIpc = Real<GpusAlone>;
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
        let error = Device::open(0).err().filter(|_| P::PATHS == [Path::CudaIpc]);
        error.map(|error| error.to_string())
    }

    fn start(seed: u64) -> Real<P> {
        let dir = std::env::temp_dir().join(format!("tandem-faults-{}-{seed:x}", std::process::id()));
        Identity::load_or_create(&dir).unwrap();
        let ends = [0, 1].map(|end| Process::start(end, P::PATHS, &dir));
        let relays = [0, 1].map(|end| Relay::start(ends[end].address));
        Real { dir, ends, relays, dark: false, began: Instant::now(), paths: PhantomData }
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

impl<P> Drop for Real<P> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
