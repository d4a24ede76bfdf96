//! Counted references whose end can be waited for.
//!
//! A [`Gate`] counts the calls that are inside something, and lets one wait until none is. It is
//! the answer to "a lock within a structure cannot be used to control freeing that structure"
//! (acceptance B09-B12): the gate is an allocation of its own, so whoever leaves it last touches no
//! memory of the thing that was guarded, and a [`Pin`] gives up the thing *before* it leaves.
//!
//! # Protocol
//!
//! `state` is the count, and a bit that says somebody waits for zero. The waiter sets the bit and
//! reads the count in one read-modify-write, holding the queue's lock from there until it sleeps.
//! The leaver learns of the bit from the very decrement that reaches zero, and only then takes the
//! queue's lock and wakes. Both act on one word, so one comes first: either the waiter sees zero,
//! or the leaver sees the bit and finds the waiter asleep. Nobody waiting, no wake-up.
//!
//! Another bit says that what is inside was abandoned: then the last to leave ends it. It works by
//! the same word, so either who abandons sees zero, or the last leaver sees the bit.

use std::ops::DerefMut;
use std::sync::Arc;
use std::time::Instant;

use crate::primitive::{AtomicU64, Condvar, Mutex, Ordering, mutant, preemption_point, relaxed_if};

/// Somebody waits for the count to be zero.
const WAITING: u64 = 1 << 63;
/// Whoever leaves last ends what was abandoned.
const ORPHANED: u64 = 1 << 62;
/// How many are inside.
const COUNT: u64 = ORPHANED - 1;

/// A wait that ended because its deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the deadline passed before the wait was over")]
pub struct TimedOut;

/// Threads that sleep until something is over.
pub(crate) struct WaitQueue {
    sleepers: Mutex<u32>,
    condvar: Condvar,
}

impl WaitQueue {
    pub(crate) fn new() -> WaitQueue {
        WaitQueue { sleepers: Mutex::new(0), condvar: Condvar::new() }
    }

    /// Sleeps until `over` says so; it is asked under the queue's lock, first at once and then
    /// after each wake-up. Says whether it slept.
    ///
    /// On whatever way out, if nobody else sleeps here, `unmark` is called, still under the lock:
    /// who marks in `over` that somebody waits takes the mark back there, and nobody's is lost.
    pub(crate) fn wait_until(
        &self,
        deadline: Option<Instant>,
        mut over: impl FnMut() -> bool,
        unmark: impl FnOnce(),
    ) -> Result<bool, TimedOut> {
        let mut slept = false;
        let mut sleepers = self.sleepers.lock().unwrap_or_else(|poison| poison.into_inner());
        while !over() {
            let left = match deadline {
                None => None,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => Some(left),
                    _ => {
                        if *sleepers == 0 {
                            unmark();
                        }
                        return Err(TimedOut);
                    }
                },
            };
            slept = true;
            *sleepers += 1;
            sleepers = match left {
                None => self.condvar.wait(sleepers).unwrap_or_else(|poison| poison.into_inner()),
                Some(left) => {
                    let waited = self.condvar.wait_timeout(sleepers, left);
                    waited.unwrap_or_else(|poison| poison.into_inner()).0
                }
            };
            *sleepers -= 1;
        }
        if *sleepers == 0 {
            unmark();
        }
        Ok(slept)
    }

    /// Wakes every sleeper, to ask again whether its wait is over. No system call if none sleeps.
    pub(crate) fn wake_all(&self) {
        let sleepers = self.sleepers.lock().unwrap_or_else(|poison| poison.into_inner());
        if *sleepers > 0 {
            self.condvar.notify_all();
        }
    }
}

/// A count of those inside, and a way to wait until it is zero.
pub(crate) struct Gate {
    state: AtomicU64,
    pub(crate) queue: WaitQueue,
    orphan: Mutex<Option<Arc<dyn Orphan>>>,
}

impl Gate {
    pub(crate) fn new() -> Gate {
        Gate { state: AtomicU64::new(0), queue: WaitQueue::new(), orphan: Mutex::new(None) }
    }

    /// Enters. The caller must know that the gate is not being drained for good, or that a late
    /// entrant is of no harm.
    #[inline]
    pub(crate) fn enter(&self) {
        // Acquire: pairs with the AcqRel read-modify-write of `drain`. Who enters after a drainer
        // looked also sees what the drainer wrote before it looked (`Subscriptions::populated`).
        let acquire = relaxed_if(mutant!("relaxed_enter"), Ordering::Acquire);
        self.state.fetch_add(1, acquire);
    }

    /// Leaves, and wakes whoever waits for the last one to leave.
    #[inline]
    pub(crate) fn leave(&self) {
        // Release: pairs with the AcqRel in `drain` and the Acquire in `count`. Whoever sees zero
        // sees all that was done inside.
        let release = relaxed_if(mutant!("relaxed_leave"), Ordering::Release);
        let before = self.state.fetch_sub(1, release);
        if before & COUNT == 1 && before != 1 {
            self.leave_last(before);
        }
    }

    /// Returns how many are inside. Zero is final only if nobody can enter any more.
    pub(crate) fn count(&self) -> u64 {
        // Acquire: pairs with the Release in `leave`.
        self.state.load(Ordering::Acquire) & COUNT
    }

    /// Waits until nobody was inside at one instant after the call. Says whether that took a sleep.
    pub(crate) fn drain(&self, deadline: Option<Instant>) -> Result<bool, TimedOut> {
        if mutant!("no_drain") {
            return Ok(false);
        }
        let over = || {
            // AcqRel: the Acquire pairs with the Release in `leave`, the Release with the Acquire
            // in `enter`.
            let both = relaxed_if(mutant!("relaxed_drain"), Ordering::AcqRel);
            self.state.fetch_or(WAITING, both) & COUNT == 0
        };
        // Relaxed: what had to be seen was seen above.
        let unmark = || _ = self.state.fetch_and(!WAITING, Ordering::Relaxed);
        self.queue.wait_until(deadline, over, unmark)
    }

    /// Leaves `orphan` to be ended by whoever leaves last, or ends it at once if nobody is inside.
    /// Nobody may enter any more.
    pub(crate) fn abandon(&self, orphan: Arc<dyn Orphan>) {
        *self.lock_orphan() = Some(orphan);
        // AcqRel: with the read-modify-write of `leave`, one of the two sees the other.
        if self.state.fetch_or(ORPHANED, Ordering::AcqRel) & COUNT == 0 {
            self.end_orphan();
        }
    }

    #[cold]
    fn leave_last(&self, marks: u64) {
        if marks & WAITING != 0 {
            self.queue.wake_all();
        }
        if marks & ORPHANED != 0 && !mutant!("last_leaver_forgets") {
            self.end_orphan();
        }
    }

    fn end_orphan(&self) {
        let orphan = self.lock_orphan().take();
        if let Some(orphan) = orphan {
            orphan.end();
        }
    }

    fn lock_orphan(&self) -> impl DerefMut<Target = Option<Arc<dyn Orphan>>> + '_ {
        self.orphan.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// What is left behind when its owner could not wait.
pub(crate) trait Orphan: Send + Sync {
    /// Ends it. Nobody uses it any more.
    fn end(&self);
}

/// A counted reference to a `T`. Its drop gives up the `T` first and leaves the gate last, so when
/// the gate has been drained no pin refers to the `T` any more.
pub(crate) struct Pin<T: ?Sized> {
    value: Option<Arc<T>>,
    gate: Arc<Gate>,
}

impl<T: ?Sized> Pin<T> {
    /// Enters `gate` with a reference to `value`.
    pub(crate) fn new(value: Arc<T>, gate: Arc<Gate>) -> Pin<T> {
        gate.enter();
        Pin { value: Some(value), gate }
    }
}

impl<T: ?Sized> Clone for Pin<T> {
    fn clone(&self) -> Pin<T> {
        self.gate.enter();
        Pin { value: self.value.clone(), gate: Arc::clone(&self.gate) }
    }
}

impl<T: ?Sized> std::ops::Deref for Pin<T> {
    type Target = Arc<T>;

    fn deref(&self) -> &Arc<T> {
        self.value.as_ref().expect("a pin holds its value until it is dropped")
    }
}

impl<T: ?Sized> Drop for Pin<T> {
    fn drop(&mut self) {
        if mutant!("pin_leaves_first") {
            self.gate.leave();
            preemption_point();
        }
        drop(self.value.take());
        if !mutant!("pin_leaves_first") {
            preemption_point();
            self.gate.leave();
        }
    }
}
