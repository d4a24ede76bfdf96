//! What the calling thread is in the middle of.
//!
//! A wait can only be refused as a wait for oneself, and a re-entry only be named, if the thread
//! knows what it holds. That is one small thread-local record: the thread's number, how many of our
//! callbacks it is inside of, and the unrecorded announcements it has under way. It allocates
//! nothing, so it may be read anywhere.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::atomic::{AtomicU64 as StdAtomicU64, Ordering as StdOrdering};

use crate::primitive::{SHARDS, const_thread_local};

/// How many unrecorded announcements one thread is remembered by, for self-wait detection. A thread
/// that nests more of them than this is not detected beyond it.
const REMEMBERED: usize = 4;

struct Context {
    number: Cell<u64>,
    callbacks: Cell<u32>,
    kind: Cell<CallbackKind>,
    registry_locks: Cell<u32>,
    unrecorded: [Cell<usize>; REMEMBERED],
    /// Whether there is anything in `DEFERRED`, a look at which costs more: it has a destructor.
    deferred: Cell<bool>,
}

const_thread_local! {
    static CONTEXT: Context = Context {
        number: Cell::new(0),
        callbacks: Cell::new(0),
        kind: Cell::new(CallbackKind::Invalidate),
        registry_locks: Cell::new(0),
        unrecorded: [const { Cell::new(0) }; REMEMBERED],
        deferred: Cell::new(false),
    };
    static DEFERRED: RefCell<Vec<Box<dyn Deferred>>> = RefCell::new(Vec::new());
}

/// Something dropped inside a callback, whose end waits until the thread has left its callbacks.
pub(crate) trait Deferred {
    /// Ends it, waiting for nobody who may wait for this thread.
    fn end(self: Box<Self>);
}

/// Which callback a thread is in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallbackKind {
    /// `invalidate`, `try_invalidate`, `invalidate_range_end` or `Fence::wait`.
    Invalidate,
    /// `release`.
    Release,
}

/// Returns the number by which diagnostics of this crate call the calling thread.
///
/// Numbers count up from 1 in the order in which threads first use the crate; none is used twice in
/// a process. Log it beside a thread's name to read a dump of
/// [`Subscriptions`](crate::Subscriptions).
#[inline]
pub fn thread_number() -> u64 {
    match CONTEXT.with(|context| context.number.get()) {
        0 => number_thread(),
        number => number,
    }
}

#[cold]
fn number_thread() -> u64 {
    static NEXT: StdAtomicU64 = StdAtomicU64::new(1);
    // Relaxed: the counter guards nothing, each thread just takes a different number.
    let number = NEXT.fetch_add(1, StdOrdering::Relaxed);
    CONTEXT.with(|context| context.number.set(number));
    number
}

/// Returns the shard that the calling thread announces through.
#[inline]
pub(crate) fn shard() -> usize {
    const { assert!(SHARDS.is_power_of_two()) };
    thread_number() as usize & (SHARDS - 1)
}

/// Tells whether the calling thread is inside a callback of a notifier or a fence, where nothing
/// may wait for anybody who announces, reads or unsubscribes.
///
/// For layers above whose drop handlers wait: they put it off if this says so.
#[inline]
pub fn in_callback() -> bool {
    CONTEXT.with(|context| context.callbacks.get() > 0)
}

/// Checks rules D06 and D07 in debug builds: `what` may not be called from inside an invalidation.
#[track_caller]
pub(crate) fn forbid_in_invalidate(what: &str) {
    if cfg!(debug_assertions) {
        let inside = CONTEXT.with(|context| {
            context.callbacks.get() > 0 && context.kind.get() == CallbackKind::Invalidate
        });
        assert!(
            !inside,
            "mmu-notifier: {what} called from inside an invalidation: an invalidation only updates \
             its own device's tables (rule D07)"
        );
    }
}

/// Checks rule D06 in debug builds: no callback may announce a change.
#[track_caller]
pub(crate) fn forbid_announcement() {
    forbid_in_invalidate("invalidate_range_start");
    if cfg!(debug_assertions) {
        assert!(
            !in_callback(),
            "mmu-notifier: invalidate_range_start called from inside a release: release ends a \
             mirror, it starts no invalidation (rule D06)"
        );
    }
}

/// Runs a callback of the subscriber called `name`, and aborts the process if it panics: a device
/// that was not stopped would run on in memory that is going away.
pub(crate) fn callback<R>(kind: CallbackKind, name: &str, f: impl FnOnce() -> R) -> R {
    struct Inside<'a> {
        outer: CallbackKind,
        name: &'a str,
        returned: bool,
    }
    impl Drop for Inside<'_> {
        fn drop(&mut self) {
            if !self.returned {
                die(format_args!(
                    "a callback of subscriber `{}` panicked: its device may still be running on \
                     memory that is about to go away",
                    self.name
                ));
            }
            CONTEXT.with(|context| {
                context.callbacks.set(context.callbacks.get() - 1);
                context.kind.set(self.outer);
            });
        }
    }
    let outer = CONTEXT.with(|context| {
        context.callbacks.set(context.callbacks.get() + 1);
        context.kind.replace(kind)
    });
    let mut inside = Inside { outer, name, returned: false };
    let result = f();
    inside.returned = true;
    result
}

/// Notes that the calling thread took (`+1`) or dropped (`-1`) a registry lock.
///
/// Debug builds only; see [`holds_registry_lock`].
pub(crate) fn count_registry_lock(change: i32) {
    if cfg!(debug_assertions) {
        CONTEXT.with(|context| {
            context.registry_locks.set(context.registry_locks.get().wrapping_add_signed(change));
        });
    }
}

/// Tells whether the calling thread holds a registry lock right now. For tests: an allocator can
/// ask it, to see that none is ever called there. Always `false` without debug assertions.
#[doc(hidden)]
pub fn holds_registry_lock() -> bool {
    CONTEXT.with(|context| context.registry_locks.get() > 0)
}

/// Remembers that the calling thread has an unrecorded announcement under way in `space`.
#[inline]
pub(crate) fn remember_unrecorded(space: usize) {
    replace_unrecorded(0, space);
}

/// Undoes one [`remember_unrecorded`].
#[inline]
pub(crate) fn forget_unrecorded(space: usize) {
    replace_unrecorded(space, 0);
}

#[inline]
fn replace_unrecorded(old: usize, new: usize) {
    CONTEXT.with(|context| {
        if let Some(entry) = context.unrecorded.iter().find(|entry| entry.get() == old) {
            entry.set(new);
        }
    });
}

/// Tells whether the calling thread has an unrecorded announcement under way in `space`.
pub(crate) fn holds_unrecorded(space: usize) -> bool {
    CONTEXT.with(|context| context.unrecorded.iter().any(|entry| entry.get() == space))
}

/// Keeps `value` until [`finish_deferred`] ends it.
pub(crate) fn defer(value: Box<dyn Deferred>) {
    DEFERRED.with(|deferred| deferred.borrow_mut().push(value));
    CONTEXT.with(|context| context.deferred.set(true));
}

/// Ends what the calling thread dropped inside callbacks, now that it has left them.
#[inline]
pub(crate) fn finish_deferred() {
    if CONTEXT.with(|context| context.deferred.get() && context.callbacks.get() == 0) {
        finish_all_deferred();
    }
}

#[cold]
fn finish_all_deferred() {
    CONTEXT.with(|context| context.deferred.set(false));
    let values = DEFERRED.with(|deferred| std::mem::take(&mut *deferred.borrow_mut()));
    values.into_iter().for_each(|value| value.end());
}

/// Ends the process: going on would break an invariant that memory safety of a device rests on.
pub(crate) fn die(why: fmt::Arguments<'_>) -> ! {
    eprintln!("mmu-notifier: thread {}: {why}; aborting", thread_number());
    std::process::abort()
}
