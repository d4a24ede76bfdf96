//! What happened to whom, and who holds whom.
//!
//! Counters exist only for subscriptions that asked for them. A dump is the `Debug` output of
//! [`Subscriptions`]: it takes only locks that are never held for long, so it works on a system
//! that hangs.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::event::Event;
use crate::node::{CLOSED, COUNT, ENDED, Node, UNLINKED, UNSETTLED, WAITERS};
use crate::primitive;
use crate::registry::NoLocks;
use crate::{Subscriptions, VaRange};

/// What was counted of one subscription since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Events that were delivered.
    pub delivered: u64,
    /// Of those, the ones that changed nothing on the device, as its
    /// [fence](crate::Fence::changed) said: false invalidations.
    pub unchanged: u64,
    /// Read sections whose commit found a collision.
    pub collisions: u64,
    /// Times a reader had to wait.
    pub waits: u64,
    /// The longest of those waits.
    pub longest_wait: Duration,
    /// What the longest wait was for, if it could still be seen.
    pub longest_wait_for: Option<Cause>,
}

/// An announcement that somebody had to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cause {
    /// What was announced.
    pub event: Event,
    /// The announcing thread's [number](crate::thread_number).
    pub thread: u64,
}

/// The counters behind [`Statistics`]. Relaxed throughout: each stands for itself.
#[derive(Default)]
pub(crate) struct Counters {
    delivered: AtomicU64,
    unchanged: AtomicU64,
    collisions: AtomicU64,
    waits: AtomicU64,
    longest: Mutex<(Duration, Option<Cause>)>,
}

impl Counters {
    pub(crate) fn delivered(&self, changed: bool) {
        self.delivered.fetch_add(1, Ordering::Relaxed);
        if !changed {
            self.unchanged.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn collided(&self) {
        self.collisions.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn waited(&self, time: Duration, cause: Option<Cause>) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        let mut longest = self.longest.lock().unwrap_or_else(|poison| poison.into_inner());
        if time >= longest.0 {
            *longest = (time, cause);
        }
    }

    pub(crate) fn read(&self) -> Statistics {
        let longest = self.longest.lock().unwrap_or_else(|poison| poison.into_inner());
        Statistics {
            delivered: self.delivered.load(Ordering::Relaxed),
            unchanged: self.unchanged.load(Ordering::Relaxed),
            collisions: self.collisions.load(Ordering::Relaxed),
            waits: self.waits.load(Ordering::Relaxed),
            longest_wait: longest.0,
            longest_wait_for: longest.1,
        }
    }
}

/// Writes one subscription, without taking its notifier's lock. Of those inside it, `own_pins` are
/// the writer's.
pub(crate) fn write_node(
    f: &mut fmt::Formatter<'_>,
    node: &dyn Node,
    range: Option<VaRange>,
    own_pins: u64,
) -> fmt::Result {
    let core = node.core();
    // Relaxed: a snapshot for people.
    let state = core.state.load(primitive::Ordering::Relaxed);
    let marks = [
        (WAITERS, "readers wait"),
        (CLOSED, "closed"),
        (UNSETTLED, "unsettled"),
        (UNLINKED, "unlinked"),
        (ENDED, "released"),
    ];
    let marks = marks.into_iter().filter(|(mark, _)| state & mark != 0).map(|(_, word)| word);
    let mut out = f.debug_struct("Subscriber");
    out.field("name", &node.name());
    if let Some(range) = range {
        out.field("range", &range);
    }
    out.field("class", &core.class)
        .field("owner", &core.owner)
        .field("changes_under_way", &(state & COUNT))
        .field("calls_and_operations", &core.gate.count().saturating_sub(own_pins))
        .field("lock_held_by_thread", &core.holder())
        .field("marks", &marks.collect::<Vec<_>>());
    if let Some(counters) = &core.counters {
        out.field("statistics", &counters.read());
    }
    out.finish()
}

impl fmt::Debug for Subscriptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut no_locks = NoLocks::at_entry();
        let (phase, subscribers, releasing) = self.dump(&mut no_locks);
        f.debug_struct("Subscriptions")
            .field("phase", &phase)
            .field("changes_under_way", &self.list_active())
            .field("changes_unrecorded", &self.count_unrecorded())
            .field("releasing", &releasing.as_deref().map(|node| Dumped(node, None, 0)))
            .field("subscribers", &Listed(&subscribers))
            .finish()
    }
}

/// One node of a dump.
struct Dumped<'a>(&'a dyn Node, Option<VaRange>, u64);

impl fmt::Debug for Dumped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_node(f, self.0, self.1, self.2)
    }
}

/// All nodes of a dump.
struct Listed<'a>(&'a [crate::subscriptions::Hit]);

impl fmt::Debug for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|hit| Dumped(hit.pin.as_ref(), Some(hit.range), 1)))
            .finish()
    }
}
