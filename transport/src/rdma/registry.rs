//! The memory that the devices of this host know. A region is registered with all of them at once: so it has one place,
//! whichever device writes it.

use super::adapter::Adapter;
#[cfg(feature = "cuda")]
use super::gpu;
use super::verbs::{Device, Memory, MemoryRegion, Rights, VerbsError};
use crate::net::counters::RdmaMemory;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tandem_memory::HostRegion;

/// The most regions that are registered at once.
const MAX_REGIONS: usize = 4096;
/// Bytes that are registered to see whether they can be.
const PROBE: usize = 4096;

pub(super) struct Registry {
    adapters: Vec<Arc<Adapter>>,
    /// Whether parts of regions are opened to peers by memory windows.
    memory_windows: bool,
    /// By the address of the region, which its registrations keep mapped. Held for an instant: see
    /// [`Registry::known`].
    known: Mutex<BTreeMap<usize, Arc<Registered>>>,
    /// Held while a region is registered, which takes a while.
    registering: Mutex<()>,
    #[cfg(feature = "cuda")]
    said: gpu::Said,
}

/// A region that every device knows.
pub(super) struct Registered {
    memory: Arc<Memory>,
    /// One for each device.
    regions: Vec<Arc<MemoryRegion>>,
    /// Whether memory windows can be bound to them.
    pub(super) windows: bool,
}

impl Registered {
    pub(super) fn is_on_twin(&self) -> bool {
        self.memory.is_on_twin()
    }

    pub(super) fn with(&self, device: &Arc<Device>) -> Result<Arc<MemoryRegion>, VerbsError> {
        let found = self.regions.iter().find(|region| Arc::ptr_eq(region.device(), device));
        found.cloned().ok_or_else(|| VerbsError::NoDevice(format!("{} that this host opened", device.name())))
    }

    /// Registers a part by itself, for peers to write.
    pub(super) fn part(
        &self,
        device: &Arc<Device>,
        range: Range<usize>,
    ) -> Result<Arc<MemoryRegion>, VerbsError> {
        MemoryRegion::new(device, &self.memory, range, Rights::Peers).map(Arc::new)
    }

    /// Whether it is held by nobody but the table: whoever posts work on it holds a registration, and whoever is to
    /// write or read it holds the region.
    fn is_left(&self) -> bool {
        Arc::strong_count(self.memory.region()) == 1
            && self.regions.iter().all(|region| Arc::strong_count(region) == 1)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guards single operations on a collection, or none.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    pub(super) fn new(adapters: Vec<Arc<Adapter>>, memory_windows: bool) -> Registry {
        Registry {
            adapters,
            memory_windows,
            known: Mutex::default(),
            registering: Mutex::default(),
            #[cfg(feature = "cuda")]
            said: gpu::Said::default(),
        }
    }

    /// The registrations of a region, if there are some; they stay, as they are, as long as the region is held
    /// elsewhere. Never waits.
    pub(super) fn known(&self, memory: &Arc<HostRegion>) -> Option<Arc<Registered>> {
        lock(&self.known).get(&(memory.base() as usize)).cloned()
    }

    /// The registrations of a region, made if there are none yet, which takes a while.
    pub(super) fn region(&self, memory: &Arc<HostRegion>) -> Result<Arc<Registered>, VerbsError> {
        if let Some(known) = self.known(memory) {
            return Ok(known);
        }
        let _one = lock(&self.registering);
        if let Some(known) = self.known(memory) {
            return Ok(known);
        }
        let mut known = lock(&self.known);
        let left: Vec<usize> =
            known.iter().filter(|(_, known)| known.is_left()).map(|(address, _)| *address).collect();
        let left: Vec<_> = left.iter().filter_map(|address| known.remove(address)).collect();
        let count = known.len();
        drop(known);
        // Without the lock: that takes a while too.
        drop(left);
        if count >= MAX_REGIONS {
            return Err(VerbsError::Register {
                device: "this host".into(),
                len: memory.len(),
                source: std::io::Error::from_raw_os_error(libc::ENOSPC),
                hint: "4096 regions are registered already: use fewer, larger ones",
            });
        }
        let registered = Arc::new(self.register(memory)?);
        lock(&self.known).insert(memory.base() as usize, Arc::clone(&registered));
        Ok(registered)
    }

    /// Registers a region that has other memory in the place of a GPU's.
    #[cfg(test)]
    pub(super) fn stand_in(&self, region: &Arc<HostRegion>, twin: Arc<HostRegion>) {
        let memory = Memory::stand_in(Arc::clone(region), twin);
        let regions =
            self.adapters.iter().map(|adapter| self.with_device(&memory, adapter).unwrap()).collect();
        let registered = Registered { windows: self.binds(&memory), memory, regions };
        lock(&self.known).insert(region.base() as usize, Arc::new(registered));
    }

    pub(super) fn bytes(&self) -> RdmaMemory {
        let mut bytes = RdmaMemory::default();
        for registered in lock(&self.known).values() {
            let memory = &registered.memory;
            let count = match (memory.is_on_twin(), memory.is_dma_buf()) {
                (false, _) => &mut bytes.host,
                (true, true) => &mut bytes.dma_buf,
                (true, false) => &mut bytes.peermem,
            };
            *count += memory.len() as u64;
        }
        bytes
    }

    fn register(&self, region: &Arc<HostRegion>) -> Result<Registered, VerbsError> {
        #[cfg(feature = "cuda")]
        if let Some(twin) = region.twin() {
            let show = |way| gpu::show(way, region, twin);
            let take = |memory: &Arc<Memory>, adapter: &Arc<Adapter>| {
                self.with_device(memory, adapter).map_err(|error| error.to_string())
            };
            let chosen = gpu::choose(&self.adapters, |adapter| adapter.device.name(), show, take);
            for line in self.said.news(twin.device().name(), &chosen) {
                tracing::info!("{line}");
            }
            if let Some((_, memory, regions)) = chosen.taken {
                return Ok(Registered { windows: self.binds(&memory), memory, regions });
            }
        }
        let memory = Memory::host(Arc::clone(region));
        let with = |adapter: &Arc<Adapter>| self.with_device(&memory, adapter);
        let regions = self.adapters.iter().map(with).collect::<Result<_, _>>()?;
        Ok(Registered { windows: self.binds(&memory), memory, regions })
    }

    /// Whether memory windows are bound to it. The kernel registers no dma-buf with the right to do so.
    fn binds(&self, memory: &Memory) -> bool {
        self.memory_windows && !memory.is_dma_buf()
    }

    fn with_device(&self, memory: &Arc<Memory>, adapter: &Adapter) -> Result<Arc<MemoryRegion>, VerbsError> {
        let rights = if self.binds(memory) {
            Rights::Windows
        } else {
            // As windows will be, one by one: what is refused is refused now, while there is another way.
            MemoryRegion::new(&adapter.device, memory, 0..memory.len().min(PROBE), Rights::Peers)?;
            Rights::Own
        };
        MemoryRegion::new(&adapter.device, memory, 0..memory.len(), rights).map(Arc::new)
    }
}
