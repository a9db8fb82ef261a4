use super::{Done, Io, Task, Token, Transfer, cancelled, ended};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

/// Transfers by threads that block, for kernels without io_uring; and tasks.
pub(in super::super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    more: Condvar,
    bell: Arc<OwnedFd>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(Token, Work)>,
    done: Vec<Done>,
    closed: bool,
}

enum Work {
    Transfer(Transfer),
    Task(Task),
}

impl Threads {
    /// This many threads, which ring `bell` when something is over.
    pub(in super::super) fn new(count: usize, bell: &Arc<OwnedFd>) -> io::Result<Threads> {
        let bell = Arc::clone(bell);
        let shared = Arc::new(Shared { state: Mutex::default(), more: Condvar::new(), bell });
        // Made one by one, so that those that were made are ended if one is refused.
        let mut all = Threads { shared, threads: Vec::new() };
        for _ in 0..count {
            let shared = Arc::clone(&all.shared);
            let thread = thread::Builder::new().name("tier-disk-io".into());
            all.threads.push(thread.spawn(move || shared.work())?);
        }
        Ok(all)
    }

    fn give(&self, token: Token, work: Work) {
        self.shared.state().waiting.push_back((token, work));
        self.shared.more.notify_one();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn work(&self) {
        loop {
            let (token, work) = {
                let mut state = self.state();
                loop {
                    if let Some(work) = state.waiting.pop_front() {
                        break work;
                    }
                    if state.closed {
                        return;
                    }
                    state = self.more.wait(state).expect("nobody panics with it");
                }
            };
            let result = match work {
                Work::Transfer(transfer) => whole(transfer),
                Work::Task(task) => task(),
            };
            self.tell(token, result);
        }
    }

    fn tell(&self, token: Token, result: io::Result<()>) {
        self.state().done.push((token, result));
        // It fails only if the counter is full, and then the bell rings anyway.
        let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
    }
}

fn whole(mut transfer: Transfer) -> io::Result<()> {
    loop {
        let moved = match once(&transfer) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            moved => moved?,
        };
        match (moved, transfer.advance(moved)) {
            (_, false) => return Ok(()),
            (0, true) => return Err(ended()),
            (_, true) => {}
        }
    }
}

fn once(transfer: &Transfer) -> rustix::io::Result<usize> {
    let Transfer { file, at, parts, write } = transfer;
    if *write {
        // SAFETY: whoever gave the memory changes nothing until the transfer is told of.
        let parts: Vec<_> = parts.iter().map(|part| IoSlice::new(unsafe { part.bytes() })).collect();
        rustix::io::pwritev(file, &parts, *at)
    } else {
        // SAFETY: whoever gave the memory leaves it alone until the transfer is told of, and parts do not overlap.
        let parts = parts.iter().map(|part| IoSliceMut::new(unsafe { part.bytes_mut() }));
        rustix::io::preadv(file, &mut parts.collect::<Vec<_>>(), *at)
    }
}

impl Io for Threads {
    fn begin(&mut self, token: Token, transfer: Transfer) {
        self.give(token, Work::Transfer(transfer));
    }

    fn task(&mut self, token: Token, task: Task) {
        self.give(token, Work::Task(task));
    }

    fn cancel(&mut self, token: Token) {
        let mut state = self.shared.state();
        let waiting = state.waiting.iter().position(|(other, _)| *other == token);
        if waiting.and_then(|at| state.waiting.remove(at)).is_some() {
            drop(state);
            self.shared.tell(token, Err(cancelled()));
        }
    }

    fn flush(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.shared.state().done);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            // A task that panicked has said so.
            let _ = thread.join();
        }
    }
}
