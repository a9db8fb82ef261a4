//! The windows that are open here: the gate that every landing byte passes, in every backend that copies.

use crate::transport::{RegionId, TransportError};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tandem_memory::{Extent, HostRegion};
use tandem_proto::ids::NodeId;
use tandem_proto::wire::Window;

/// Registered regions and open windows. Shared by the node loop, which opens and closes, and the threads
/// that land bytes.
#[derive(Default)]
pub(crate) struct Windows {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    regions: Vec<Arc<HostRegion>>,
    by_key: BTreeMap<u64, Arc<Landing>>,
    /// `(region, start)` of every open, non-empty window → its end and key. Ranges never overlap, so no
    /// byte is written by two windows.
    by_place: BTreeMap<(u32, u64), (u64, u64)>,
}

/// Whoever lets a device write a window by itself. It is told when the window closes, before that returns, and
/// takes the device's right back.
pub(crate) trait Keeper: Send + Sync {
    fn window_closed(&self, key: u64);
}

/// One open window, held by whoever is landing bytes through it.
pub(crate) struct Landing {
    peer: NodeId,
    window: Window,
    extent: Extent,
    /// Which bytes are being written: those of a stripe by the holder of its lock alone. Stripe by stripe, so
    /// that many threads land in one window and seldom meet. Byte b belongs to stripe `b / STRIPE`, modulo
    /// their number. Locked in order; closed from the first on.
    stripes: Box<[Stripe]>,
    /// The last that asked while the window was open. A window is one peer's; where a peer's lane has failed and another
    /// was made, nothing lands by the first any more.
    keeper: Mutex<Option<Weak<dyn Keeper>>>,
}

/// Bytes of a stripe: a few pieces of what a thread lands at a time.
const STRIPE: usize = 64 << 10;
/// Stripes of a window, at most.
const MAX_STRIPES: usize = 64;

/// On a cache line of its own; whether the window is closed.
#[derive(Default)]
#[repr(align(64))]
struct Stripe(Mutex<bool>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section here leaves its data consistent at each step, so a panic elsewhere is no reason
    // to stop closing windows.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Windows {
    pub(crate) fn register(&self, region: Arc<HostRegion>) -> Result<RegionId, TransportError> {
        let mut table = lock(&self.table);
        let id = u32::try_from(table.regions.len())
            .map_err(|_| TransportError::Unusable { len: region.len(), reason: "too many regions".into() })?;
        table.regions.push(region);
        Ok(RegionId(id))
    }

    /// Opens a window under a key drawn by the backend.
    pub(crate) fn open(
        &self,
        peer: NodeId,
        region: RegionId,
        range: Range<usize>,
        mut draw_key: impl FnMut() -> u64,
    ) -> Result<Window, TransportError> {
        let mut table = lock(&self.table);
        let memory = table.regions.get(region.0 as usize).ok_or(TransportError::UnknownRegion(region))?;
        let extent =
            memory.extent(range.clone()).map_err(|source| TransportError::OutOfRegion { region, source })?;
        let (start, end) = (range.start as u64, range.end as u64);
        // Ranges do not overlap, so only the last one that begins before `end` can reach into this one.
        let before = table.by_place.range((region.0, 0)..(region.0, end)).next_back();
        if start < end && before.is_some_and(|(_, (other_end, _))| *other_end > start) {
            return Err(TransportError::Overlap { region, range });
        }
        let key = loop {
            let key = draw_key();
            if !table.by_key.contains_key(&key) {
                break key;
            }
        };
        let window = Window { region: region.0, key, offset: start, len: end - start };
        table.by_key.insert(
            key,
            Arc::new(Landing {
                peer,
                window,
                extent,
                stripes: (0..range.len().div_ceil(STRIPE).clamp(1, MAX_STRIPES))
                    .map(|_| Stripe::default())
                    .collect(),
                keeper: Mutex::default(),
            }),
        );
        if start < end {
            table.by_place.insert((region.0, start), (end, key));
        }
        Ok(window)
    }

    /// After this, nothing lands through the window, whoever else closes it at the same time.
    pub(crate) fn close(&self, key: u64) {
        let Some(landing) = lock(&self.table).by_key.get(&key).cloned() else {
            return;
        };
        landing.close();
        let keeper = lock(&landing.keeper).as_ref().and_then(Weak::upgrade);
        if let Some(keeper) = keeper {
            keeper.window_closed(key);
        }
        // Only now may the place be another's, and a second closer find nothing to wait for.
        let mut table = lock(&self.table);
        if table.by_key.remove(&key).is_some() && landing.window.len > 0 {
            table.by_place.remove(&(landing.window.region, landing.window.offset));
        }
    }

    pub(crate) fn open_count(&self) -> usize {
        lock(&self.table).by_key.len()
    }

    /// Closes every window of a peer.
    pub(crate) fn close_all_of(&self, peer: NodeId) {
        let keys: Vec<u64> =
            lock(&self.table).by_key.iter().filter(|(_, l)| l.peer == peer).map(|(key, _)| *key).collect();
        for key in keys {
            self.close(key);
        }
    }

    /// The window, if it is open, is `peer`'s, is what the writer says it is, and holds the write.
    pub(crate) fn find(&self, peer: NodeId, window: &Window, offset: u64, len: u64) -> Option<Arc<Landing>> {
        let table = lock(&self.table);
        let landing = table.by_key.get(&window.key)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= landing.window.len);
        (landing.peer == peer && landing.window == *window && inside).then(|| Arc::clone(landing))
    }
}

impl Landing {
    pub(crate) fn key(&self) -> u64 {
        self.window.key
    }

    /// Where the window's bytes are.
    #[cfg_attr(
        not(any(feature = "rdma", feature = "cuda")),
        expect(dead_code, reason = "only devices land by themselves")
    )]
    pub(crate) fn extent(&self) -> &Extent {
        &self.extent
    }

    /// Names who is to be told when the window closes; false if it is closed.
    #[cfg_attr(
        not(any(feature = "rdma", feature = "cuda", test)),
        expect(dead_code, reason = "only devices land by themselves")
    )]
    #[must_use]
    pub(crate) fn keep(&self, keeper: Weak<dyn Keeper>) -> bool {
        self.complete(|| *lock(&self.keeper) = Some(keeper))
    }

    /// Copies a piece to its place, unless the window has been closed or the piece leaves it.
    #[must_use]
    pub(crate) fn land(&self, at: u64, piece: &[u8]) -> bool {
        self.land_by(at, piece.len(), |place| place.copy_from_slice(piece))
    }

    /// Has `len` bytes written to their place, unless the window has been closed or they leave it. Waits for
    /// whoever writes some of these bytes already.
    #[must_use]
    #[allow(unsafe_code)] // The one place where landing memory becomes a slice.
    pub(crate) fn land_by(&self, at: u64, len: usize, write: impl FnOnce(&mut [u8])) -> bool {
        let Ok(start) = usize::try_from(at) else {
            return false;
        };
        let Some(end) = start.checked_add(len) else {
            return false;
        };
        let Ok(place) = self.extent.part(start..end) else {
            return false;
        };
        let mut stripes = self.stripes_of(start..end).map(|i| lock(&self.stripes[i].0));
        // Without asking for memory for the few that a piece has as a rule.
        let few: [Option<MutexGuard<'_, bool>>; 5] = std::array::from_fn(|_| stripes.next());
        let more: Vec<MutexGuard<'_, bool>> = stripes.collect();
        if few.iter().flatten().chain(&more).any(|closed| **closed) {
            return false;
        }
        // SAFETY: the window is open, so its opener promised not to touch the range before it is closed, which
        // waits for the stripes held here; windows do not overlap, and whoever else writes any of these bytes
        // needs one of these stripes too.
        write(unsafe { place.bytes_mut() });
        true
    }

    /// Puts bytes that have landed to where they are true: on the GPU, if the window's region has a twin. Before they are
    /// reported. False if the window has been closed, or the GPU fails.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub(crate) fn deposit(&self, at: u64, len: u64) -> bool {
        if self.extent.region().twin().is_none() {
            return true;
        }
        let (start, end) = (at as usize, (at + len) as usize);
        let Ok(place) = self.extent.part(start..end) else { return false };
        crate::twin::pieces(&place).all(|piece| {
            let start = piece.offset() - self.extent.offset();
            let stripes = self.stripes_of(start..start + piece.len());
            let held: Vec<_> = stripes.map(|i| lock(&self.stripes[i].0)).collect();
            // Who closes the window waits for a piece at most.
            !held.iter().any(|closed| **closed)
                && piece
                    .deposit()
                    .inspect_err(|error| tracing::error!(%error, "what has landed is lost"))
                    .is_ok()
        })
    }

    #[cfg(not(feature = "cuda"))]
    #[must_use]
    pub(crate) fn deposit(&self, _at: u64, _len: u64) -> bool {
        true
    }

    /// Has the GPU see what a device wrote to the twin by itself. Before it is reported. False if the GPU fails.
    #[cfg(all(feature = "cuda", feature = "rdma"))]
    #[must_use]
    pub(crate) fn see_on_twin(&self) -> bool {
        let Some(twin) = self.extent.region().twin() else { return true };
        let seen = twin.device().see_remote_writes();
        seen.inspect_err(|error| tracing::error!(%error, "what has landed is lost")).is_ok()
    }

    #[cfg(all(not(feature = "cuda"), feature = "rdma"))]
    #[must_use]
    pub(crate) fn see_on_twin(&self) -> bool {
        true
    }

    /// Runs `report` if the window is still open: what it reports was landed before the window closed.
    #[must_use]
    pub(crate) fn complete(&self, report: impl FnOnce()) -> bool {
        let closed = lock(&self.stripes[0].0);
        if !*closed {
            report();
        }
        !*closed
    }

    /// Nothing lands from now on; waits for the pieces that are being written.
    fn close(&self) {
        for stripe in &self.stripes {
            *lock(&stripe.0) = true;
        }
    }

    /// The stripes of a range, ascending, so that two who need some of the same ones never wait for each other.
    fn stripes_of(&self, range: Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let all = self.stripes.len();
        let (first, last) = (range.start / STRIPE, range.end.saturating_sub(1).max(range.start) / STRIPE);
        let (first_index, last_index) = (first % all, last % all);
        let (low, high) = if last - first >= all {
            (0..0, 0..all)
        } else if first_index <= last_index {
            (0..0, first_index..last_index + 1)
        } else {
            (0..last_index + 1, first_index..all)
        };
        low.chain(high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId(7);

    fn windows() -> (Windows, RegionId) {
        let windows = Windows::default();
        let region = windows.register(HostRegion::map(4096).unwrap()).unwrap();
        (windows, region)
    }

    #[test]
    fn open_windows_never_overlap() {
        let (windows, region) = windows();
        let mut key = 0;
        let mut open = |range: Range<usize>| {
            windows.open(PEER, region, range, || {
                key += 1;
                key
            })
        };
        let middle = open(1000..2000).unwrap();
        for overlapping in [0..1001, 1000..2000, 1500..1600, 1999..4096, 0..4096] {
            assert!(matches!(open(overlapping), Err(TransportError::Overlap { .. })));
        }
        open(0..1000).unwrap();
        open(2000..4096).unwrap();
        open(1500..1500).unwrap();
        assert!(matches!(open(4000..4097), Err(TransportError::OutOfRegion { .. })));
        windows.close(middle.key);
        open(1000..2000).unwrap();
    }

    #[test]
    fn a_range_holds_the_stripes_of_all_its_bytes() {
        let windows = Windows::default();
        let region = windows.register(HostRegion::map(4 * MAX_STRIPES * STRIPE).unwrap()).unwrap();
        for (key, len) in
            [1, STRIPE, 3 * STRIPE, 3 * STRIPE + 1, 4 * MAX_STRIPES * STRIPE].into_iter().enumerate()
        {
            let window = windows.open(PEER, region, 0..len, || key as u64).unwrap();
            let landing = windows.find(PEER, &window, 0, len as u64).unwrap();
            let all = landing.stripes.len();
            let edges =
                [0, 1, STRIPE - 1, STRIPE, STRIPE + 1, 2 * STRIPE, 5 * STRIPE / 2, 70 * STRIPE, len - 1, len];
            let ranges = edges.iter().flat_map(|start| edges.iter().map(move |end| *start..*end));
            for range in ranges.filter(|range| range.start <= range.end && range.end <= len) {
                let stripes: Vec<usize> = landing.stripes_of(range.clone()).collect();
                assert!(stripes.is_sorted() && stripes.last().is_none_or(|last| *last < all), "{stripes:?}");
                for byte in range.step_by(STRIPE / 2) {
                    assert!(stripes.contains(&(byte / STRIPE % all)), "byte {byte} among {all}: {stripes:?}");
                }
            }
            windows.close(window.key);
        }
    }

    /// Two that write the same bytes take turns; a third beside them does not wait; closing waits for all.
    #[test]
    fn pieces_that_overlap_take_turns() {
        let windows = Windows::default();
        let region = windows.register(HostRegion::map(4 * STRIPE).unwrap()).unwrap();
        let window = windows.open(PEER, region, 0..4 * STRIPE, || 1).unwrap();
        let landing = windows.find(PEER, &window, 0, 1).unwrap();
        let writers = std::sync::atomic::AtomicUsize::new(0);
        let (entered, entries) = std::sync::mpsc::sync_channel(1);
        let (leave, left) = std::sync::mpsc::sync_channel::<()>(1);
        std::thread::scope(|scope| {
            let (landing, writers) = (&landing, &writers);
            scope.spawn(move || {
                assert!(landing.land_by(10, STRIPE, |_| {
                    assert_eq!(writers.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    entered.send(()).unwrap();
                    left.recv().unwrap();
                    writers.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                }));
            });
            entries.recv().unwrap();
            // Elsewhere in the window while the first is at it.
            assert!(landing.land(2 * STRIPE as u64 + 20, &[1]));
            let second = scope.spawn(move || {
                landing.land_by(STRIPE as u64, 1, |_| {
                    assert_eq!(writers.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    writers.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                })
            });
            let closing = scope.spawn(|| windows.close(window.key));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!second.is_finished() && !closing.is_finished());
            leave.send(()).unwrap();
            closing.join().unwrap();
            let _ = second.join().unwrap();
            assert!(!landing.land(0, &[1]));
        });
    }

    /// When a lane has failed, the one that was made in its place lands in the same windows.
    #[test]
    fn the_last_keeper_is_told_of_the_end() {
        struct Told(Mutex<Vec<u64>>);
        impl Keeper for Told {
            fn window_closed(&self, key: u64) {
                lock(&self.0).push(key);
            }
        }
        let (windows, region) = windows();
        let window = windows.open(PEER, region, 0..10, || 5).unwrap();
        let landing = windows.find(PEER, &window, 0, 1).unwrap();
        let [first, second] = [(); 2].map(|()| Arc::new(Told(Mutex::default())));
        for keeper in [&first, &second] {
            let keeper: Arc<dyn Keeper> = Arc::clone(keeper) as _;
            assert!(landing.keep(Arc::downgrade(&keeper)));
        }
        windows.close(5);
        assert_eq!([&first, &second].map(|told| lock(&told.0).clone()), [vec![], vec![5]]);
        let keeper: Arc<dyn Keeper> = first;
        assert!(!landing.keep(Arc::downgrade(&keeper)), "the window is closed");
    }

    #[test]
    fn a_window_is_found_only_as_it_was_opened() {
        let (windows, region) = windows();
        let window = windows.open(PEER, region, 100..200, || 5).unwrap();
        assert!(windows.find(PEER, &window, 0, 100).is_some());
        assert!(windows.find(NodeId(8), &window, 0, 100).is_none());
        assert!(windows.find(PEER, &window, 1, 100).is_none());
        assert!(windows.find(PEER, &window, u64::MAX, 2).is_none());
        assert!(windows.find(PEER, &Window { offset: 0, ..window }, 0, 1).is_none());
        assert!(windows.find(PEER, &Window { len: 4096, ..window }, 0, 1).is_none());
        let landing = windows.find(PEER, &window, 0, 1).unwrap();
        assert!(landing.land(99, &[1]));
        assert!(!landing.land(100, &[1]));
        windows.close_all_of(PEER);
        assert!(windows.find(PEER, &window, 0, 1).is_none());
        assert!(!landing.land(0, &[1]));
        assert!(!landing.complete(|| panic!("a closed window completes nothing")));
    }
}
