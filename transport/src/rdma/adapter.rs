//! A device that lanes share, and who is told when it fails.

use super::verbs::{AsyncEvent, Bell, Device, Port, VerbsError, wait_readable};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

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
    pub(super) fn new(device: Device) -> Result<Adapter, VerbsError> {
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
        Ok(Adapter { device, ports, watch, thread: Some(thread) })
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
