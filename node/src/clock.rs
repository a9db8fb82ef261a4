use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tandem_proto::ids::Time;

/// A node's monotonic clock, as [`Time`].
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    Machine(Instant),
    Told(Arc<AtomicU64>),
}

/// Sets a clock that does not run by itself.
#[derive(Clone, Debug)]
pub struct ClockHand(Arc<AtomicU64>);

impl Clock {
    /// The machine's clock, from now on.
    #[must_use]
    pub fn start() -> Clock {
        Clock(Source::Machine(Instant::now()))
    }

    /// A clock that stands where its hand was last set. For simulations.
    #[must_use]
    pub fn told() -> (Clock, ClockHand) {
        let time = Arc::new(AtomicU64::new(0));
        (Clock(Source::Told(Arc::clone(&time))), ClockHand(time))
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Time {
        match &self.0 {
            Source::Machine(start) => Time(start.elapsed().as_micros() as u64),
            Source::Told(time) => Time(time.load(Ordering::Relaxed)),
        }
    }

    /// How long until `time`; zero if it has passed.
    #[must_use]
    pub fn until(&self, time: Time) -> Duration {
        Duration::from_micros(time.since_us(self.now()))
    }
}

impl ClockHand {
    /// Sets the clock.
    pub fn set(&self, now: Time) {
        self.0.store(now.0, Ordering::Relaxed);
    }
}
