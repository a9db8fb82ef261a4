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
#[derive(Debug)]
pub(crate) struct Pass {
    trial: bool,
}

impl Breaker {
    /// How much longer no call is made.
    pub(crate) fn left(&self, now: Instant) -> Option<Duration> {
        self.open
            .as_ref()
            .map(|open| open.until.saturating_duration_since(now))
            .filter(|left| !left.is_zero())
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A store that fails until a time: when calls reach it, in seconds, if one is made each tenth of one.
    fn check(works_after: f64, until: u32, expected: &[f64]) {
        let (begin, mut breaker) = (Instant::now(), Breaker::default());
        let (mut made, mut told) = (Vec::new(), Vec::new());
        for tenth in 0..until * 10 {
            let now = begin + Duration::from_millis(u64::from(tenth) * 100);
            let seconds = f64::from(tenth) / 10.0;
            let Ok(pass) = breaker.pass(now) else { continue };
            if made.len() < expected.len() {
                made.push(seconds);
            }
            if seconds < works_after {
                told.extend(breaker.failed(pass, now).map(|_| seconds));
            } else if breaker.worked() {
                told.push(seconds);
            }
        }
        assert_eq!(made, expected);
        assert_eq!(
            told.len(),
            if works_after > 0.25 { 2 } else { 0 },
            "its end and its return, once: {told:?}"
        );
    }

    #[test]
    fn a_store_that_fails_is_tried_ever_less_often_until_it_works() {
        check(0.0, 2, &[0.0, 0.1, 0.2, 0.3]);
        check(0.2, 2, &[0.0, 0.1, 0.2, 0.3]);
        check(1.0, 5, &[0.0, 0.1, 0.2, 1.2, 1.3, 1.4]);
        check(60.0, 100, &[0.0, 0.1, 0.2, 1.2, 3.2, 7.2, 15.2, 31.2, 61.2, 61.3]);
    }

    #[test]
    fn one_call_tries_and_others_that_end_late_decide_nothing() {
        let (begin, mut breaker) = (Instant::now(), Breaker::default());
        let mut early: Vec<_> = (0..10).map(|_| breaker.pass(begin).expect("it works so far")).collect();
        let opened = early.drain(..).filter_map(|pass| breaker.failed(pass, begin)).count();
        assert_eq!(opened, 1);
        assert_eq!(breaker.left(begin), Some(FIRST), "not longer for those that failed with it");
        let later = begin + FIRST;
        let trial = breaker.pass(later).expect("its time is over");
        assert_eq!(breaker.pass(later).err(), Some(FIRST), "one is enough");
        assert_eq!(breaker.failed(trial, later), None, "that was said before");
        assert_eq!(breaker.left(later), Some(FIRST * 2));
        // A trial whose end is never told.
        let _lost = breaker.pass(later + FIRST * 2).expect("its time is over");
        assert!(breaker.pass(later + FIRST * 4).is_ok());
    }
}
