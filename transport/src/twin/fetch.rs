use crate::net::life::Life;
use crate::net::node::Node;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tandem_memory::Extent;
use tandem_proto::ids::NodeId;

/// Bytes copied between host and GPU before others are let in: a tenth of a millisecond.
const PIECE: usize = 4 << 20;

/// Writes that wait for their sources. One thread fetches all of them, in their order, and is faster than any network:
/// so whoever lends a source again gets its newest bytes.
#[derive(Default)]
pub(crate) struct Fetches {
    /// Bounded by the limits of unreported writes.
    due: Mutex<Due>,
    more: Condvar,
    /// Held while a source is read.
    reading: Mutex<()>,
}

#[derive(Default)]
struct Due {
    writes: VecDeque<(NodeId, u64, u64)>,
    stopped: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guards single operations on a collection.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fetches {
    /// Has sources fetched from now on, until it is stopped.
    pub(crate) fn start(&self, node: &Arc<Node>) -> std::io::Result<()> {
        let fetching = Arc::clone(node);
        node.spawn("gpu-fetch".into(), move || fetching.fetches.run(&fetching))
    }

    /// Has a write's source fetched, and the write handed to a lane then.
    pub(crate) fn push(&self, life: &Life, sequence: u64) {
        lock(&self.due).writes.push_back((life.peer, life.number, sequence));
        self.more.notify_one();
    }

    /// When it returns, no source is read for a life that has ended before.
    pub(crate) fn wait(&self) {
        drop(lock(&self.reading));
    }

    pub(crate) fn stop(&self) {
        lock(&self.due).stopped = true;
        self.more.notify_all();
    }

    fn run(&self, node: &Node) {
        while let Some((peer, number, sequence)) = self.next() {
            let Some(life) = node.life(peer, number) else { continue };
            match self.fetch(&life, sequence) {
                Ok(true) => life.fetched(sequence),
                Ok(false) => {}
                // No lane could do without.
                Err(error) => node.source_failed(&life, &error),
            }
        }
    }

    fn next(&self) -> Option<(NodeId, u64, u64)> {
        let due = lock(&self.due);
        let idle = |due: &mut Due| due.writes.is_empty() && !due.stopped;
        let mut due = self.more.wait_while(due, idle).unwrap_or_else(PoisonError::into_inner);
        if due.stopped { None } else { due.writes.pop_front() }
    }

    /// False if the write is not wanted any more.
    #[allow(unsafe_code)] // The one place where the host's side of a source is written.
    fn fetch(&self, life: &Life, sequence: u64) -> Result<bool, String> {
        let Some(source) = life.waits_for_source(sequence) else { return Ok(false) };
        for piece in pieces(&source) {
            let _reading = lock(&self.reading);
            if life.waits_for_source(sequence).is_none() {
                return Ok(false);
            }
            // SAFETY: the submitter lends the source until the write's report, which waits for this, and only this
            // thread writes the host's side of sources; lanes read it after this, or the same bytes for another write.
            unsafe { piece.fetch() }.map_err(|error| error.to_string())?;
        }
        Ok(true)
    }
}

/// An extent in parts that are copied without a break.
pub(crate) fn pieces(extent: &Extent) -> impl Iterator<Item = Extent> + use<> {
    let extent = extent.clone();
    (0..extent.len())
        .step_by(PIECE)
        .filter_map(move |at| extent.part(at..(at + PIECE).min(extent.len())).ok())
}

/// Whether a lane that knows nothing of GPUs must wait for its bytes.
pub(crate) fn must_fetch(source: &Extent) -> bool {
    !source.is_empty() && source.region().twin().is_some()
}
