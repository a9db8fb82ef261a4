//! A device that lanes share: its registrations, and who is told when it fails.

use super::verbs::{AsyncEvent, Bell, Device, MemoryRegion, Port, VerbsError, wait_readable};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use tandem_memory::HostRegion;

/// The most regions that are registered with a device at once.
const MAX_REGIONS: usize = 4096;
/// Ports are looked at this often even if nothing is heard of them.
const LOOK: Duration = Duration::from_secs(60);

/// Told when something happens to the device.
pub(super) trait Watcher: Send + Sync {
    fn happened(&self, device: &Device, event: AsyncEvent);
}

pub(super) struct Adapter {
    pub(super) device: Arc<Device>,
    /// Those of the first look.
    pub(super) ports: Vec<Port>,
    /// How memory is registered.
    memory_windows: bool,
    /// By the address of the region, which the registration keeps mapped.
    regions: Mutex<BTreeMap<usize, Arc<MemoryRegion>>>,
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
}

struct Watch {
    device: Arc<Device>,
    watchers: Mutex<Vec<Weak<dyn Watcher>>>,
    /// Rings when the thread is to end.
    end: Bell,
    ended: std::sync::atomic::AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guards single operations on a collection.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Adapter {
    /// Watches a device. Ports that cannot be used are logged, once, with the reason.
    pub(super) fn new(device: Device, memory_windows: bool) -> Result<Adapter, VerbsError> {
        let device = Arc::new(device);
        let name = device.name();
        let mut ports = Vec::new();
        for port in device.ports() {
            match port {
                Ok(port) => ports.push(port),
                Err(error) => tracing::info!(%error, "RDMA port not used"),
            }
        }
        let failed = |what, source| VerbsError::Refused { device: name.into(), what, source };
        let end = Bell::new().map_err(|source| failed("be watched", source))?;
        let watch = Arc::new(Watch {
            device: Arc::clone(&device),
            watchers: Mutex::default(),
            end,
            ended: false.into(),
        });
        let watching = Arc::clone(&watch);
        let thread = std::thread::Builder::new()
            .name(format!("rdma-{name}"))
            .spawn(move || watching.run())
            .map_err(|source| failed("be watched", source))?;
        Ok(Adapter { device, ports, memory_windows, regions: Mutex::default(), watch, thread: Some(thread) })
    }

    /// The registration of a region, made if there is none yet, which takes a while. It stays as long as the
    /// region is held elsewhere.
    pub(super) fn region(&self, memory: &Arc<HostRegion>) -> Result<Arc<MemoryRegion>, VerbsError> {
        let mut regions = lock(&self.regions);
        if let Some(region) = regions.get(&(memory.base() as usize)) {
            return Ok(Arc::clone(region));
        }
        // One that nobody but this table holds is not named by any work: whoever posts it holds it too.
        regions.retain(|_, region| {
            Arc::strong_count(region) > 1
                || region.memory().is_some_and(|memory| Arc::strong_count(memory) > 1)
        });
        if regions.len() >= MAX_REGIONS {
            return Err(VerbsError::Register {
                device: self.device.name().into(),
                len: memory.len(),
                source: std::io::Error::from_raw_os_error(libc::ENOSPC),
                hint: "4096 regions are registered already: use fewer, larger ones",
            });
        }
        let region = Arc::new(MemoryRegion::host(&self.device, Arc::clone(memory), self.memory_windows)?);
        regions.insert(memory.base() as usize, Arc::clone(&region));
        Ok(region)
    }

    pub(super) fn watch(&self, watcher: Weak<dyn Watcher>) {
        let mut watchers = lock(&self.watch.watchers);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(watcher);
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        self.watch.ended.store(true, std::sync::atomic::Ordering::Release);
        self.watch.end.ring();
        // The thread itself may be the last to let go of a lane, and with it of the adapter.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Watch {
    fn run(&self) {
        while !self.ended.load(std::sync::atomic::Ordering::Acquire) {
            wait_readable(&[self.device.events_fd(), self.end.fd()], LOOK);
            while let Some(event) = self.device.next_event() {
                let watchers: Vec<_> = lock(&self.watchers).iter().filter_map(Weak::upgrade).collect();
                for watcher in watchers {
                    watcher.happened(&self.device, event);
                }
            }
        }
    }
}
