//! Memory for KV, taken from the system before prompts need it, while others are served already.

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tandem_kernels::KvPages;

/// How many times as long as a piece had to wait for a core the cores are left alone.
const REST: u32 = 8;
const LONGEST_REST: Duration = Duration::from_millis(500);

/// Has the system provide the pages' memory, on a thread of its own.
///
/// It gives way by resting, and not by a lower priority: whoever has that, and therefore no core, keeps a lock of the
/// system's over all of the process's memory, on which whoever maps some waits, and behind him every thread that
/// touches a new page. On a busy machine that was for seconds, so that peers took the process for dead.
pub(crate) fn spawn(kv: &KvPages) -> io::Result<JoinHandle<()>> {
    let (pieces, begun) = (kv.pieces(), Instant::now());
    let warm = move || {
        for piece in pieces {
            let (clock, core) = (Instant::now(), core_time());
            if let Err(error) = piece.populate() {
                tracing::warn!(%error, "KV memory is taken as it is used: not all of it can be had beforehand");
                return;
            }
            let rest = rest(clock.elapsed(), core_time().saturating_sub(core));
            if !rest.is_zero() {
                std::thread::sleep(rest);
            }
        }
        tracing::info!(seconds = begun.elapsed().as_secs_f32(), "KV memory is warm");
    };
    std::thread::Builder::new().name("kv-warm".into()).spawn(warm)
}

/// What this thread has had of a core.
fn core_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// How long to leave the cores to others after a piece that took so long by the clock, and so long of a core: as long as
/// nobody else wants them, not at all.
fn rest(clock: Duration, core: Duration) -> Duration {
    const NOBODY: Duration = Duration::from_micros(100);
    let waited = clock.saturating_sub(core);
    if waited < NOBODY { Duration::ZERO } else { (waited * REST).min(LONGEST_REST) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tandem_proto::ids::{LayerIdx, PageId};
    use tandem_proto::layout::{KvDtype, KvShape};

    const SHAPE: KvShape = KvShape {
        layers: 4,
        kv_heads: 4,
        head_dim: 64,
        page_tokens: 16,
        chunk_tokens: 256,
        dtype: KvDtype::F32,
    };

    #[test]
    fn who_had_to_wait_for_a_core_rests() {
        let check = |clock_us, core_us, expected_us| {
            let [clock, core, expected] = [clock_us, core_us, expected_us].map(Duration::from_micros);
            assert_eq!(rest(clock, core), expected, "{clock:?} with {core:?} of a core");
        };
        check(0, 0, 0);
        check(1000, 1000, 0);
        check(1000, 1005, 0);
        check(1050, 1000, 0);
        check(3000, 1000, 16_000);
        check(4_000_000, 1000, 500_000);
    }

    /// While all cores are busy, no thread of the process waits much longer for memory than for a core.
    #[test]
    fn nobody_waits_for_memory_that_is_being_warmed() {
        let kv = KvPages::new(SHAPE, 4096).unwrap();
        let over = AtomicBool::new(false);
        let busy = 2 * std::thread::available_parallelism().map_or(1, usize::from);
        let [mut for_memory, mut for_a_core] = [Duration::ZERO; 2];
        std::thread::scope(|scope| {
            for _ in 0..busy {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let (warming, begun) = (spawn(&kv).unwrap(), Instant::now());
            while !warming.is_finished() && begun.elapsed() < Duration::from_secs(3) {
                let slept = Instant::now();
                std::thread::sleep(Duration::from_millis(1));
                let asked = Instant::now();
                let mut own = KvPages::new(SHAPE, 1).unwrap();
                own.head_mut(LayerIdx(0), PageId(0), 0, false)[0] = 1;
                drop(own);
                for_memory = for_memory.max(asked.elapsed());
                for_a_core = for_a_core.max(asked - slept);
            }
            over.store(true, Ordering::Relaxed);
        });
        println!("{for_memory:?} at most for memory, {for_a_core:?} for a core");
        // Whoever warms waits for a core a few times, with the lock.
        let borne = Duration::from_millis(200) + 8 * for_a_core;
        assert!(for_memory < borne, "a thread waited {for_memory:?} for memory, {for_a_core:?} for a core");
    }
}
