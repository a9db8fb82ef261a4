//! A few threads that share short loops.
//!
//! A step of a small model is some hundred parallel loops of tens of microseconds each. General pools cost
//! about as much as such a loop; here the caller works too, and never waits for a thread that has not begun:
//! on a machine with more threads than cores a loop is then as fast as the caller alone.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::JoinHandle;

/// How often an idle worker looks for work before it sleeps: about 50 µs, longer than the gaps between the
/// loops of one step, shorter than anything that would show as load.
const SPINS: u32 = 1000;

/// Set in the state while workers may join the loop. The bits below count those that have; the bits above
/// number the loop.
const OPEN: u64 = 1 << 31;
const LOOP_ONE: u64 = 1 << 32;

/// The caller and its workers.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller of [`Team::run`] while the workers are its.
    busy: Mutex<()>,
}

struct Shared {
    state: AtomicU64,
    /// Written only while the loop is closed and nobody is counted in `state`.
    job: std::cell::UnsafeCell<Job>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: Vec<AtomicBool>,
}

#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    data: *const (),
    tasks: usize,
}

// SAFETY: `job` is the only part that is not Sync by itself; see its field.
unsafe impl Sync for Shared {}
// SAFETY: `data` points to a closure that is Sync and outlives the loop: see `Team::run`.
unsafe impl Send for Shared {}

unsafe fn call<F: Fn(usize) + Sync>(data: *const (), task: usize) {
    // SAFETY: `run` made the pointer from an `&F` that it keeps alive until the loop is over.
    unsafe { (*data.cast::<F>())(task) }
}

impl Team {
    /// A team of `threads` threads, the caller among them.
    #[must_use]
    pub fn new(threads: usize) -> Team {
        let workers = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: std::cell::UnsafeCell::new(Job {
                call: call::<fn(usize)>,
                data: std::ptr::null(),
                tasks: 0,
            }),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (0..workers).map(|_| AtomicBool::new(false)).collect(),
        });
        let workers = (0..workers)
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                // A thread that the system refuses is one worker less, no failure.
                std::thread::Builder::new()
                    .name(format!("cpu-{index}"))
                    .spawn(move || shared.work(index))
                    .ok()
            })
            .collect();
        Team { shared, workers, busy: Mutex::new(()) }
    }

    /// Threads of the team.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body` for every number below `tasks`, each once, on any thread, and returns when all are done.
    /// A loop inside a loop runs on its caller alone.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, body: F) {
        let alone = || (0..tasks).for_each(&body);
        if tasks < 2 || self.workers.is_empty() {
            return alone();
        }
        let _busy = match self.busy.try_lock() {
            Ok(guard) => guard,
            // It guards no data that a panicking task could leave half written.
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return alone(),
        };
        let shared = &*self.shared;
        // SAFETY: the loop before was closed and left by all before `run` returned, so nobody reads the job.
        unsafe { *shared.job.get() = Job { call: call::<F>, data: (&raw const body).cast(), tasks } };
        shared.next.store(0, Ordering::Relaxed);
        let state = shared.state.load(Ordering::Relaxed);
        shared.state.store((state & !(LOOP_ONE - 1)).wrapping_add(LOOP_ONE) | OPEN, Ordering::SeqCst);
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers).take(tasks - 1) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        // The guard closes the loop even if a task of the caller panics: workers still borrow `body` then.
        let guard = Close(shared);
        loop {
            let task = shared.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            body(task);
        }
        drop(guard);
        if shared.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a task panicked on a worker thread"));
        }
    }
}

/// Ends the loop: none may join any more, and all who did have left.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let shared = self.0;
        // Tasks not begun are dropped when the caller is unwinding; else there are none.
        shared.next.store(usize::MAX / 2, Ordering::Relaxed);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while shared.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                // The worker is inside a task but has no core: let it have this one.
                std::thread::yield_now();
            }
        }
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut last = 0;
        let mut spins = 0;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            let current = state / LOOP_ONE;
            if state & OPEN != 0 && current != last {
                let join =
                    self.state.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed);
                if join.is_ok() {
                    last = current;
                    self.take_part();
                    self.state.fetch_sub(1, Ordering::Release);
                    spins = 0;
                }
                continue;
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            // Say so before looking once more: the caller opens a loop before it looks who sleeps.
            self.asleep[index].store(true, Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            if (state & OPEN == 0 || state / LOOP_ONE == last) && !self.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.asleep[index].store(false, Ordering::SeqCst);
            spins = 0;
        }
    }

    fn take_part(&self) {
        // SAFETY: this thread is counted in `state`, so the job stays as it is.
        let job = unsafe { *self.job.get() };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            // SAFETY: the closure lives until the loop is closed and this thread has left it.
            let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.data, task) }));
            if outcome.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches what its tasks throw, so there is nothing to learn from its end.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let team = Team::new(4);
        for tasks in [0, 1, 2, 3, 100, 1000] {
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let team = Team::new(2);
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let met = AtomicUsize::new(0);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            team.run(2, |_| {
                met.fetch_add(1, Ordering::SeqCst);
                while met.load(Ordering::SeqCst) < 2 {
                    assert!(std::time::Instant::now() < deadline, "the worker never came");
                    std::hint::spin_loop();
                }
            });
        }
    }

    #[test]
    fn loops_inside_loops_run_alone() {
        let team = Team::new(3);
        let sum = AtomicUsize::new(0);
        team.run(8, |i| {
            team.run(8, |j| {
                sum.fetch_add(i * 8 + j, Ordering::Relaxed);
            })
        });
        assert_eq!(sum.load(Ordering::Relaxed), 64 * 63 / 2);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let team = Team::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| team.run(100, |i| assert!(i != 57))));
        assert!(outcome.is_err());
        let count = AtomicUsize::new(0);
        team.run(10, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 10);
    }
}
