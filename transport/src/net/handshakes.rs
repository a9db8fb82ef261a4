//! How many may be about to make a lane at once: whoever connects and says nothing takes a place for a while, and
//! keeps nobody else from one.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Handshakes that are under way at once with a listener, at most; others wait to be accepted.
const MAX_HANDSHAKES: usize = 64;

/// Counts the handshakes with a listener.
#[derive(Default)]
pub(crate) struct Handshakes {
    under_way: Mutex<usize>,
    fewer: Condvar,
}

/// A handshake's place; free again when dropped.
pub(crate) struct Place(Arc<Handshakes>);

impl Handshakes {
    /// Waits for a place. Every handshake ends in time, so there will be one.
    pub(crate) fn place(handshakes: &Arc<Handshakes>, at_most: Duration) -> Place {
        let under_way = handshakes.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |under_way: &mut usize| *under_way >= MAX_HANDSHAKES;
        let waited = handshakes.fewer.wait_timeout_while(under_way, at_most, full);
        *waited.unwrap_or_else(PoisonError::into_inner).0 += 1;
        Place(Arc::clone(handshakes))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.fewer.notify_one();
    }
}
