//! Copies between two GPUs inside one process: what no way between two processes can beat.

use crate::end::{End, Memory};
use crate::pattern::Slots;
use crate::way::{Kind, Way};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tandem_memory::HostRegion;
use tandem_memory::cuda::{Copies, Device, DeviceRegion, Mark};

/// Sources are on GPU 0, landings on GPU 1 if there is one: those of the process itself, or of its peers.
pub(crate) fn memory(way: &Way, index: usize, region: usize) -> anyhow::Result<Memory> {
    let last = Device::count()?.min(2) - 1;
    let on = |ordinal| anyhow::Ok(HostRegion::with_twin(&Device::open(ordinal)?, region)?);
    let [source, landing] = match (way.kind, index) {
        (Kind::P2p, _) => [0, last],
        (_, 0) => [0, 0],
        _ => [last, last],
    };
    Ok(Memory { source: on(source)?, landing: on(landing)? })
}

pub(crate) struct P2p {
    copies: Copies,
    source: std::sync::Arc<DeviceRegion>,
    landing: std::sync::Arc<DeviceRegion>,
}

impl P2p {
    pub(crate) fn new(memory: &Memory) -> anyhow::Result<P2p> {
        let twin = |region: &HostRegion| region.twin().cloned().ok_or(anyhow::anyhow!("no memory on a GPU"));
        let (source, landing) = (twin(&memory.source)?, twin(&memory.landing)?);
        // As the reader's GPU sees it.
        let source = DeviceRegion::import(landing.device(), &source.export()?, source.len())?;
        Ok(P2p { copies: Copies::new(landing.device(), 1)?, source, landing })
    }

    fn start(&self, slots: Slots, message: u64) -> anyhow::Result<Mark> {
        for extent in slots.message(message) {
            self.copies.start(&self.source.extent(extent.clone())?, &self.landing.extent(extent)?)?;
        }
        Ok(self.copies.mark()?)
    }
}

impl End for P2p {
    fn one(&mut self, slots: Slots, _peer: usize, message: u64) -> anyhow::Result<()> {
        Ok(self.start(slots, message)?.wait()?)
    }

    fn run(&mut self, slots: Slots, _peers: usize, time: Duration) -> anyhow::Result<u64> {
        let (begun, mut messages, mut under_way) = (Instant::now(), 0, VecDeque::new());
        while begun.elapsed() < time || messages <= slots.count as u64 {
            if under_way.len() == slots.depth() {
                under_way.pop_front().map_or(Ok(()), Mark::wait)?;
            }
            under_way.push_back(self.start(slots, messages)?);
            messages += 1;
        }
        under_way.into_iter().try_for_each(Mark::wait)?;
        Ok(messages)
    }
}
