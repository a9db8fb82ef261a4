//! Leaves a store alone that has failed.

use std::time::{Duration, Instant};

/// Calls that fail one after the other before the store is left alone.
const FAILURES: u32 = 3;
/// How long it is left alone first; twice as long after each call that tries it in vain, up to the longest.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// Whether calls are made. After some failures none is for a while; then one, whose end decides.
#[derive(Default)]
pub(crate) struct Breaker {
    /// Failures since a call last went well.
    failures: u32,
    open: Option<Open>,
}

struct Open {
    until: Instant,
    pause: Duration,
}

/// Leave to make a call.
pub(crate) struct Pass {
    trial: bool,
}

impl Breaker {
    /// How much longer no call is made.
    pub(crate) fn left(&self, now: Instant) -> Option<Duration> {
        self.open.as_ref().map(|open| open.until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// Asks to make a call, whose end is to be told.
    ///
    /// # Errors
    /// With how much longer none is made.
    pub(crate) fn pass(&mut self, now: Instant) -> Result<Pass, Duration> {
        if let Some(left) = self.left(now) {
            return Err(left);
        }
        let Some(open) = &mut self.open else { return Ok(Pass { trial: false }) };
        // One call tries the store; if its end is never told, another does after the same pause.
        open.until = now + open.pause;
        Ok(Pass { trial: true })
    }

    /// The store answered. Whether it had been left alone before.
    pub(crate) fn worked(&mut self) -> bool {
        self.failures = 0;
        self.open.take().is_some()
    }

    /// The call failed. If the store is left alone from now on, for how long.
    pub(crate) fn failed(&mut self, pass: Pass, now: Instant) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1);
        match &mut self.open {
            Some(open) if pass.trial => {
                open.pause = (open.pause * 2).min(LONGEST);
                open.until = now + open.pause;
                None
            }
            // Begun before the store was left alone.
            Some(_) => None,
            None if self.failures < FAILURES => None,
            None => {
                self.open = Some(Open { until: now + FIRST, pause: FIRST });
                Some(FIRST)
            }
        }
    }
}
