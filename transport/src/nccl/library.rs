//! NCCL itself: every call of it, and nothing else that is unsafe in this lane.
//!
//! cudarc has NCCL too, and its types are used here. Its functions are not: they panic where the library is missing,
//! never look for `libnccl.so.2`, and read what a newer library returns as an enum that does not know it.

use super::Error;
use super::message::ID_BYTES;
use super::order::{SLOT, SLOTS};
use cudarc::driver::CudaStream;
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tandem_memory::cuda::{Device, DeviceExtent, DeviceRegion, Mark};

/// Names of the library, the loader's first.
const NAMES: [&str; 3] = ["libnccl.so.2", "libnccl.so", "/usr/local/cuda/lib64/libnccl.so.2"];
/// The first that takes all of the configuration.
const OLDEST: c_int = 21_800;
/// Of the configuration as it is laid out here. Newer libraries take older ones.
const CONFIG_VERSION: c_uint = 22_200;
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;
/// Multiprocessors of a communicator: what else the GPU computes has the others.
const MAX_BLOCKS: c_int = 32;
/// How long to look for what NCCL begins without a pause, and how often then. It makes a thread for each
/// transfer, which is begun within a tenth of a millisecond; a communicator takes a second.
const SOON: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(100);

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const BYTES: c_int = 1;

/// The functions of the library that are used, each as its header declares it; results and enums as numbers.
macro_rules! functions {
    ($($field:ident: $name:literal ($($argument:ty),*) -> $out:ty;)*) => {
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $out,)*
            /// The functions are its.
            _library: Library,
        }

        impl Functions {
            fn find(library: Library) -> Result<Functions, libloading::Error> {
                // SAFETY: the types are those of the library's header.
                unsafe { Ok(Functions { $($field: *library.get($name)?,)* _library: library }) }
            }
        }
    };
}

functions! {
    version: b"ncclGetVersion\0" (*mut c_int) -> c_int;
    new_id: b"ncclGetUniqueId\0" (*mut ncclUniqueId) -> c_int;
    init: b"ncclCommInitRankConfig\0" (*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int;
    state: b"ncclCommGetAsyncError\0" (ncclComm_t, *mut c_int) -> c_int;
    send: b"ncclSend\0" (*const c_void, usize, c_int, c_int, ncclComm_t, *mut c_void) -> c_int;
    receive: b"ncclRecv\0" (*mut c_void, usize, c_int, c_int, ncclComm_t, *mut c_void) -> c_int;
    abort: b"ncclCommAbort\0" (ncclComm_t) -> c_int;
    text: b"ncclGetErrorString\0" (c_int) -> *const c_char;
}

/// The library. It is never unloaded: threads of its own outlive what they were started for.
pub(super) struct Nccl {
    functions: Functions,
    version: u32,
}

/// Which network a communicator may use between hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Net {
    /// Whatever NCCL finds.
    Any,
    /// InfiniBand or RoCE, or nothing.
    InfiniBand,
}

impl Nccl {
    /// Opens it, once in a process.
    pub(super) fn open() -> Result<&'static Nccl, Error> {
        static OPENED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        let opened = OPENED.get_or_init(|| Nccl::find().map_err(|error| error.to_string()));
        opened.as_ref().map_err(|why| Error::NotFound(why.clone()))
    }

    fn find() -> Result<Nccl, libloading::Error> {
        let mut found = None;
        for name in NAMES {
            // SAFETY: opening NVIDIA's library runs its initialisers, which may run at any time.
            match unsafe { Library::new(name) } {
                Ok(library) => {
                    found = Some(Ok(library));
                    break;
                }
                // The first name's is the one to tell: that is how packages call it.
                Err(error) => found = found.or(Some(Err(error))),
            }
        }
        let functions = Functions::find(found.unwrap_or_else(|| unreachable!("there are names"))?)?;
        let mut version = 0;
        // SAFETY: `version` is ours to write.
        unsafe { (functions.version)(&raw mut version) };
        Ok(Nccl { functions, version: version.unsigned_abs() })
    }

    /// As NCCL counts: 22703 is 2.27.3. Refused if it is too old.
    pub(super) fn version(&self) -> Result<u32, Error> {
        if self.version < OLDEST.unsigned_abs() {
            return Err(Error::TooOld(self.version));
        }
        Ok(self.version)
    }

    /// Names a communicator to be. A thread of NCCL waits from now on until both ranks have come.
    pub(super) fn new_id(&self) -> Result<[u8; ID_BYTES], Error> {
        let mut id = ncclUniqueId { internal: [0; ID_BYTES] };
        // SAFETY: `id` is ours to write.
        let said = unsafe { (self.functions.new_id)(&raw mut id) };
        self.check("name a communicator", said)?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    fn check(&self, what: &'static str, said: c_int) -> Result<(), Error> {
        if said == SUCCESS || said == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: NCCL has a text for every number, which is never freed.
        let text = unsafe { CStr::from_ptr((self.functions.text)(said)) };
        Err(Error::Refused { what, why: text.to_string_lossy().into_owned() })
    }
}

/// One rank of a communicator of two, which carries bytes one way, and the memory of the GPU that it reads or
/// writes: the slots of parcels. Dropped, it is aborted, on a thread of its own: that may take a while.
pub(super) struct Comm(Option<Raw>);

struct Raw {
    nccl: &'static Nccl,
    comm: ncclComm_t,
    peer: c_int,
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    /// Given back after the communicator's end, when no kernel of it uses it any more.
    memory: Option<Arc<DeviceRegion>>,
}

// SAFETY: NCCL binds a communicator to no thread, and whoever has `&mut Comm` is alone with it.
unsafe impl Send for Raw {}

impl Comm {
    /// Begins to make one; it is there when [`Comm::settle`] says so.
    pub(super) fn begin(
        nccl: &'static Nccl,
        device: &Arc<Device>,
        id: &[u8; ID_BYTES],
        rank: u8,
        net: Net,
    ) -> Result<Comm, Error> {
        device.said("be used by this thread", device.context().bind_to_thread())?;
        let stream = device.stream()?;
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            // One that blocks is begun sooner. But nobody can end its making, and to end it later from another thread
            // frees what the call that hangs still reads.
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: MAX_BLOCKS,
            netName: match net {
                Net::Any => std::ptr::null(),
                Net::InfiniBand => c"IB".as_ptr(),
            },
            splitShare: UNDEFINED,
        };
        let id = ncclUniqueId { internal: id.map(|byte| byte as c_char) };
        let rank = c_int::from(rank);
        let mut comm = std::ptr::null_mut();
        // SAFETY: the configuration and its text live as long as the call, and `comm` is ours to write.
        let said = unsafe { (nccl.functions.init)(&raw mut comm, 2, id, rank, &raw mut config) };
        let device = Arc::clone(device);
        let raw = Raw { nccl, comm, peer: 1 - rank, device, stream, memory: None };
        let made = (!comm.is_null()).then(|| Comm(Some(raw)));
        nccl.check("make a communicator", said)?;
        made.ok_or(Error::Refused { what: "make a communicator", why: "it gave none".into() })
    }

    fn raw(&self) -> Result<&Raw, Error> {
        self.0.as_ref().ok_or(Error::Closed)
    }

    /// Waits until what it was asked for has begun: NCCL does on threads of its own what takes long.
    pub(super) fn settle(&mut self, what: &'static str, until: Instant) -> Result<(), Error> {
        let raw = self.raw()?;
        let begun = Instant::now();
        loop {
            let mut state = SUCCESS;
            // SAFETY: the communicator lives as long as this does, and `state` is ours to write.
            let said = unsafe { (raw.nccl.functions.state)(raw.comm, &raw mut state) };
            raw.nccl.check(what, said)?;
            if state != IN_PROGRESS {
                return raw.nccl.check(what, state);
            }
            if Instant::now() >= until {
                return Err(Error::TooLong(what));
            }
            // It tells nobody when it is ready. A transfer is soon, and every parcel waits for that.
            if begun.elapsed() < SOON { std::thread::yield_now() } else { std::thread::sleep(NAP) }
        }
    }

    /// Gives it its slots, which it has no use for before there is a peer.
    pub(super) fn take_memory(&mut self) -> Result<(), Error> {
        let raw = self.0.as_mut().ok_or(Error::Closed)?;
        raw.memory = Some(DeviceRegion::take(&raw.device, SLOTS * SLOT)?);
        Ok(())
    }

    /// A slot.
    pub(super) fn slot(&self, slot: usize) -> Result<DeviceExtent, Error> {
        let memory = self.raw()?.memory.as_ref().ok_or(Error::Closed)?;
        Ok(memory.extent(slot * SLOT..(slot + 1) * SLOT)?)
    }

    /// Has the next bytes for the peer taken from this part of a slot, after `ready`. When the mark is over,
    /// they are.
    pub(super) fn send(
        &mut self,
        from: &DeviceExtent,
        ready: Option<&Mark>,
        until: Instant,
    ) -> Result<Mark, Error> {
        let raw = self.raw()?;
        if let Some(ready) = ready {
            ready.precede(&raw.stream)?;
        }
        let (address, stream) = (from.address() as *const c_void, raw.stream.cu_stream().cast());
        // SAFETY: the extent is of the memory held here, which lives until the communicator has ended, on its GPU.
        let said =
            unsafe { (raw.nccl.functions.send)(address, from.len(), BYTES, raw.peer, raw.comm, stream) };
        self.posted("send", said, until)
    }

    /// Has the peer's next bytes put into this part of a slot: exactly as many as it sends. When the mark is
    /// over, they are there.
    pub(super) fn receive(&mut self, to: &DeviceExtent, until: Instant) -> Result<Mark, Error> {
        let raw = self.raw()?;
        let (address, stream) = (to.address() as *mut c_void, raw.stream.cu_stream().cast());
        // SAFETY: as in `send`; only this communicator writes the extent until the mark is over.
        let said =
            unsafe { (raw.nccl.functions.receive)(address, to.len(), BYTES, raw.peer, raw.comm, stream) };
        self.posted("receive", said, until)
    }

    fn posted(&mut self, what: &'static str, said: c_int, until: Instant) -> Result<Mark, Error> {
        self.raw()?.nccl.check(what, said)?;
        if said == IN_PROGRESS {
            self.settle(what, until)?;
        }
        let Raw { device, stream, .. } = self.raw()?;
        Ok(Mark::on(device, stream)?)
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        let Some(raw) = self.0.take() else { return };
        let ending = Ending::new();
        // Where there is no thread for it, it is ended here, as what was not started is dropped.
        let ended = std::thread::Builder::new().name("nccl-end".into()).spawn(move || {
            drop(raw);
            drop(ending);
        });
        if let Err(error) = ended {
            tracing::warn!(%error, "no thread to end a communicator on");
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let device = &self.device;
        let bound = device.said("be used by this thread", device.context().bind_to_thread());
        // SAFETY: made once and ended once; nobody else has it. It ends what it has under way.
        let said = unsafe { (self.nccl.functions.abort)(self.comm) };
        if let Err(error) = self.nccl.check("end a communicator", said) {
            tracing::warn!(%error, "NCCL");
        }
        if let Err(error) = bound.and_then(|()| device.said("end its work", self.stream.synchronize())) {
            tracing::warn!(%error, "NCCL");
        }
    }
}

/// Communicators that are being ended.
static ENDINGS: Mutex<usize> = Mutex::new(0);
static FEWER: Condvar = Condvar::new();

/// Counts one.
struct Ending;

fn endings() -> MutexGuard<'static, usize> {
    // Guards a number.
    ENDINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ending {
    fn new() -> Ending {
        *endings() += 1;
        Ending
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        *endings() -= 1;
        FEWER.notify_all();
    }
}

/// Waits until every communicator that was dropped has ended, so that no process exits under NCCL; not for ever.
pub(crate) fn until_ended(at_most: Duration) {
    let waited = FEWER.wait_timeout_while(endings(), at_most, |endings| *endings > 0);
    if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
        tracing::warn!(?at_most, "NCCL takes long to end a communicator; left to itself");
    }
}
