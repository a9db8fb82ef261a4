//! A first SIGTERM or SIGINT asks the process to drain; a second one ends it at once.

use std::io;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// The status a process ends with on a second signal, as shells report an interrupt.
const INTERRUPTED: i32 = 130;

/// Tells every part of the process that it should finish. Cheap to clone; usable with and without a runtime.
#[derive(Clone, Debug)]
pub struct Shutdown {
    requested: watch::Receiver<bool>,
    sender: std::sync::Arc<watch::Sender<bool>>,
}

impl Shutdown {
    /// Not tied to signals: ends when [`Shutdown::request`] is called. For tests and embedding.
    #[must_use]
    pub fn manual() -> Shutdown {
        let (sender, requested) = watch::channel(false);
        Shutdown { requested, sender: sender.into() }
    }

    /// Listens for SIGTERM and SIGINT from now on, on a thread of its own, so that a busy runtime cannot
    /// keep the second signal from ending the process.
    ///
    /// # Errors
    /// When the thread or the handlers cannot be set up.
    pub fn on_signals() -> io::Result<Shutdown> {
        let shutdown = Shutdown::manual();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut terminate, mut interrupt) = {
            let _inside = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        let handle = shutdown.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                loop {
                    let name = tokio::select! {
                        _ = terminate.recv() => "SIGTERM",
                        _ = interrupt.recv() => "SIGINT",
                    };
                    if handle.is_requested() {
                        tracing::warn!(signal = name, "second signal: ending now");
                        std::process::exit(INTERRUPTED);
                    }
                    tracing::info!(signal = name, "draining; another signal ends the process at once");
                    handle.request();
                }
            });
        })?;
        Ok(shutdown)
    }

    /// Asks the process to finish.
    pub fn request(&self) {
        self.sender.send_replace(true);
    }

    /// Whether it was asked to finish.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.requested.borrow()
    }

    /// Waits until it is asked to finish.
    pub async fn requested(&self) {
        let mut requested = self.requested.clone();
        // The sender lives as long as `self`, so this cannot fail.
        let _ = requested.wait_for(|asked| *asked).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_clone_hears_the_request() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let shutdown = Shutdown::manual();
        let other = shutdown.clone();
        assert!(!other.is_requested());
        shutdown.request();
        assert!(other.is_requested());
        runtime.block_on(other.requested());
    }
}
