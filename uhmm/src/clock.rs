//! The time by which policies decide.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::primitive::atomic::{AtomicU64, Ordering};
use crate::primitive::thread;

/// A clock for policies: the system's, or one that a test moves.
///
/// Deadlines are not measured with it: those are always the system's [`Instant`]s.
#[derive(Clone)]
pub struct Clock(Kind);

#[derive(Clone)]
enum Kind {
    System(Instant),
    /// Nanoseconds.
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// Makes a clock that starts now and follows the system's.
    pub fn system() -> Clock {
        Clock(Kind::System(Instant::now()))
    }

    /// Makes a clock that starts at zero, and moves only by [`sleep`](Clock::sleep). Its copies are
    /// one clock.
    pub fn manual() -> Clock {
        Clock(Kind::Manual(Arc::new(AtomicU64::new(0))))
    }

    /// Returns the time since the clock was made.
    pub fn now(&self) -> Duration {
        match &self.0 {
            Kind::System(start) => start.elapsed(),
            // Relaxed: time orders nothing here.
            Kind::Manual(now) => Duration::from_nanos(now.load(Ordering::Relaxed)),
        }
    }

    /// Sleeps for `time`. A manual clock moves by as much and returns at once.
    pub fn sleep(&self, time: Duration) {
        match &self.0 {
            Kind::System(_) => thread::sleep(time),
            Kind::Manual(now) => {
                let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
                // Relaxed: as in `now`.
                now.fetch_add(nanoseconds, Ordering::Relaxed);
                thread::yield_now();
            }
        }
    }
}

impl Default for Clock {
    fn default() -> Clock {
        Clock::system()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.0 {
            Kind::System(_) => "system",
            Kind::Manual(_) => "manual",
        };
        write!(f, "{kind} clock at {:?}", self.now())
    }
}
