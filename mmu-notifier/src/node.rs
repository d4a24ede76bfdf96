//! One subscription: the notifier, its lock, and the words that a read section looks at.
//!
//! # The words
//!
//! `sequence` counts the events that this subscription was told of. It is written under the
//! notifier's lock only.
//!
//! `state` is a count of the announcements under way that concern the subscription, and the marks
//! below. A read section may begin when it is zero, but for the mark of other readers: that is one
//! load.
//!
//! # Why a read section is sound
//!
//! *Begin* loads `sequence` first and `state` second; *commit* takes the notifier's lock and
//! compares `sequence`. Take any announcement that concerns the subscription. It raises the count,
//! then (in its callback, under the notifier's lock) the sequence, and lowers the count when the
//! change is over.
//!
//! * Its callback came before begin's first load: begin then sees the raised count, and waits,
//!   unless it was lowered again: then the change is over and begin sees all of it.
//! * Its callback came after that load and before commit: commit sees another sequence and fails.
//! * Its callback comes after commit: it takes the lock that commit held, finds what was committed,
//!   and undoes it before the change happens.
//!
//! There is no fourth case. Loading `state` first would open one: an announcement that starts
//! between the two loads (the mutant `state_before_sequence`).

use std::any::{Any, TypeId};
use std::sync::atomic::{AtomicU32 as PlainU32, AtomicU64 as PlainU64};
use std::sync::{Arc, TryLockError};
use std::time::Instant;

use crate::VaRange;
use crate::context::{self, CallbackKind, callback};
use crate::diagnostics::Counters;
use crate::event::{Class, Event, EventKind, Owner};
use crate::gate::{Gate, Orphan, TimedOut};
use crate::index::Key;
use crate::notifier::{Fence, Notifier, WouldBlock};
use crate::primitive::{AtomicU64, Mutex, MutexGuard, Ordering, mutant, relaxed_if};
use crate::registry::NoLocks;

/// Readers sleep until the count is zero.
pub(crate) const WAITERS: u64 = 1 << 63;
/// No read section begins any more: the subscription ends, or the address space dies.
pub(crate) const CLOSED: u64 = 1 << 62;
/// Announcements that began before the first subscription, and were not recorded, may be under way.
pub(crate) const UNSETTLED: u64 = 1 << 61;
/// No longer in the index. Set under the registry lock, held for writing.
pub(crate) const UNLINKED: u64 = 1 << 60;
/// `Notifier::release` has run and returned.
pub(crate) const ENDED: u64 = 1 << 59;
/// The announcements that concern this subscription.
pub(crate) const COUNT: u64 = ENDED - 1;

/// A subscription whatever its notifier's type.
pub(crate) trait Node: Send + Sync {
    fn core(&self) -> &Core;

    /// Delivers a blockable event. The result must be [finished](Node::finish).
    fn invalidate(&self, _: &NoLocks, event: &Event) -> Pending;

    /// Delivers a non-blockable event, or refuses.
    fn try_invalidate(&self, _: &NoLocks, event: &Event) -> Result<Pending, WouldBlock>;

    /// Waits for what a delivery left to be waited for.
    fn finish(&self, _: &NoLocks, pending: Pending);

    /// Tells of the end of a change.
    fn invalidate_range_end(&self, _: &NoLocks, event: &Event);

    /// Takes the notifier and ends it by `Notifier::release`.
    fn release(&self, _: &NoLocks);

    /// Returns the name for diagnostics.
    fn name(&self) -> &str;

    fn notifier_type(&self) -> TypeId;

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

/// What every subscription has, and every announcement that hits it touches. In this order, it
/// shares its cache lines with the reference count before it and the notifier's lock behind it.
#[repr(C)]
pub(crate) struct Core {
    pub(crate) state: AtomicU64,
    pub(crate) sequence: AtomicU64,
    pub(crate) gate: Arc<Gate>,
    pub(crate) counters: Option<Box<Counters>>,
    pub(crate) owner: Option<Owner>,
    /// The thread inside the notifier's lock, or zero. Not for a model checker to explore: the only
    /// value that anything is decided by is the thread's own number.
    holder: PlainU64,
    /// Where the index has it. Written under the registry lock, once, and read under it.
    key: PlainU32,
    pub(crate) class: Class,
    /// Hears of ends too.
    pub(crate) paired: bool,
}

/// What is fixed when a subscription is made.
pub(crate) struct Settings {
    pub(crate) owner: Option<Owner>,
    pub(crate) class: Class,
    pub(crate) name: Option<Box<str>>,
    pub(crate) statistics: bool,
    pub(crate) live: Arc<()>,
}

/// A subscription of a notifier of type `N`.
#[repr(C)]
pub(crate) struct NodeOf<N: Notifier> {
    core: Core,
    slot: Mutex<Slot<N>>,
    /// Fences that announcers have yet to wait for, so that a fence needs no allocation.
    fences: Mutex<[Option<N::Fence>; FENCES]>,
    end: Option<fn(&mut N, &Event)>,
    name: Option<Box<str>>,
    /// Counts the nodes of an address space that exist; see `Subscriptions::live`.
    _live: Arc<()>,
}

/// What the notifier's lock protects.
pub(crate) struct Slot<N> {
    /// `None` once handed back or released.
    pub(crate) notifier: Option<N>,
    pub(crate) range: VaRange,
}

/// How many announcements may wait for fences of one subscription at once before a fence is put
/// into memory of its own.
const FENCES: usize = 2;

/// A fence that was returned and not yet waited for.
pub(crate) enum Pending {
    /// Nothing to wait for.
    Over,
    /// The fence lies in this slot of the node.
    InNode(usize),
    /// The node had no slot left.
    Boxed(Box<dyn BoxedFence>),
}

/// A fence of some type, on its own.
pub(crate) trait BoxedFence: Send {
    fn wait(self: Box<Self>);
}

impl<F: Fence> BoxedFence for F {
    fn wait(self: Box<Self>) {
        Fence::wait(*self);
    }
}

/// How a read section may begin.
pub(crate) enum Begin {
    /// At this sequence.
    At(u64),
    /// Not at once.
    Blocked,
}

impl Core {
    pub(crate) fn key(&self) -> Key {
        // Relaxed: see `key`.
        Key(self.key.load(Ordering::Relaxed))
    }

    pub(crate) fn set_key(&self, key: Key) {
        self.key.store(key.0, Ordering::Relaxed);
    }

    /// Tells whether any of `marks` is set.
    #[inline]
    pub(crate) fn has(&self, marks: u64) -> bool {
        // Acquire: pairs with the Release in `mark` and in `unmark`.
        self.state.load(Ordering::Acquire) & marks != 0
    }

    /// Sets `marks`, wakes readers if there are any, and returns the state before.
    pub(crate) fn mark(&self, marks: u64) -> u64 {
        // Release: pairs with the Acquire in `has` and in `try_begin`.
        let before = self.state.fetch_or(marks, Ordering::Release);
        if before & WAITERS != 0 {
            self.gate.queue.wake_all();
        }
        before
    }

    /// Takes `marks` back. The registry lock is held for writing.
    pub(crate) fn unmark(&self, marks: u64) {
        // Release: pairs with the Acquire in `try_begin`. A reader that finds `UNSETTLED` gone sees
        // what the drained announcements changed, which `Gate::drain` acquired.
        let release = relaxed_if(mutant!("relaxed_settle"), Ordering::Release);
        self.state.fetch_and(!marks, release);
    }

    /// Counts an announcement that starts.
    #[inline]
    pub(crate) fn raise(&self, by: u64) {
        // Relaxed: the registry lock orders this against subscribers and movers, and the
        // notifier's lock, taken for the callback that follows, publishes it to readers.
        self.state.fetch_add(by, Ordering::Relaxed);
    }

    /// Counts an announcement that is over, and wakes readers if it was the last.
    #[inline]
    pub(crate) fn lower(&self, by: u64) {
        // Release: pairs with the Acquire in `try_begin`. A reader that sees the lowered count sees
        // the change that was announced.
        if mutant!("wake_before_lower") {
            if self.state.load(Ordering::Relaxed) & WAITERS != 0 {
                self.gate.queue.wake_all();
            }
            self.state.fetch_sub(by, Ordering::Release);
            return;
        }
        let release = relaxed_if(mutant!("relaxed_lower"), Ordering::Release);
        let before = self.state.fetch_sub(by, release);
        if before & COUNT < by {
            context::die(format_args!("a change ended that was never counted; state {before:#x}"));
        }
        if before & WAITERS != 0 && before & COUNT == by {
            self.gate.queue.wake_all();
        }
    }

    /// Begins a read section if nothing is under way. See the head of this module.
    #[inline]
    pub(crate) fn try_begin(&self) -> Begin {
        if mutant!("state_before_sequence") {
            let state = self.state.load(Ordering::Acquire);
            let sequence = self.sequence.load(Ordering::Acquire);
            return if state == 0 { Begin::At(sequence) } else { Begin::Blocked };
        }
        // Acquire: pairs with the Release in `Guard::bump`. Who sees an event's sequence sees the
        // count that was raised before it.
        let acquire = relaxed_if(mutant!("relaxed_begin_sequence"), Ordering::Acquire);
        let sequence = self.sequence.load(acquire);
        // Acquire: pairs with the Release in `lower`, in `mark` and in `unmark`.
        let acquire = relaxed_if(mutant!("relaxed_begin_state"), Ordering::Acquire);
        let state = self.state.load(acquire);
        // The mark of another reader, asleep or just woken, is of no account here.
        let mut blocking = !WAITERS;
        if mutant!("begin_ignores_changes_under_way") {
            blocking = CLOSED;
        } else if mutant!("begin_heeds_readers") {
            blocking = u64::MAX;
        }
        if state & blocking == 0 { Begin::At(sequence) } else { Begin::Blocked }
    }

    /// Sleeps until the announcements under way are over, or the subscription is closed; at most
    /// one sleep, so that new announcements cannot hold a reader for ever (acceptance E10). It may
    /// come back too early, never too late. Says whether it slept.
    pub(crate) fn wait_for_announcements(
        &self,
        deadline: Option<Instant>,
    ) -> Result<bool, TimedOut> {
        if mutant!("no_wait_in_read_begin") {
            return Ok(false);
        }
        let mut slept = false;
        let over = || {
            // Relaxed: the mark is seen by `lower`'s read-modify-write of the same word, and the
            // caller looks at the state again by `try_begin`.
            let state = self.state.fetch_or(WAITERS, Ordering::Relaxed);
            state & COUNT == 0 || state & CLOSED != 0 || std::mem::replace(&mut slept, true)
        };
        // Relaxed: the mark guards nothing.
        let unmark = || _ = self.state.fetch_and(!WAITERS, Ordering::Relaxed);
        self.gate.queue.wait_until(deadline, over, unmark)
    }

    /// Returns the thread that is inside the notifier's lock, if any.
    pub(crate) fn holder(&self) -> Option<u64> {
        // Relaxed: a hint for diagnostics, or the thread's own number, which it wrote itself.
        match self.holder.load(Ordering::Relaxed) {
            0 => None,
            number => Some(number),
        }
    }
}

impl<N: Notifier> NodeOf<N> {
    pub(crate) fn new(
        range: VaRange,
        notifier: N,
        end: Option<fn(&mut N, &Event)>,
        settings: Settings,
    ) -> NodeOf<N> {
        NodeOf {
            core: Core {
                state: AtomicU64::new(0),
                sequence: AtomicU64::new(0),
                gate: Arc::new(Gate::new()),
                counters: settings.statistics.then(Box::default),
                owner: settings.owner,
                holder: PlainU64::new(0),
                key: PlainU32::new(0),
                class: settings.class,
                paired: end.is_some(),
            },
            slot: Mutex::new(Slot { notifier: Some(notifier), range }),
            fences: Mutex::new([const { None }; FENCES]),
            end,
            name: settings.name,
            _live: settings.live,
        }
    }

    /// Returns the name for diagnostics.
    pub(crate) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(std::any::type_name::<N>())
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    /// Takes the notifier's lock.
    ///
    /// A thread that already holds it (an announcement from under a mirror's lock, by way of the
    /// allocator for instance) would wait for itself; it is named and the process ends.
    #[inline]
    pub(crate) fn lock(&self) -> Guard<'_, N> {
        let me = context::thread_number();
        let slot = match self.slot.try_lock() {
            Ok(slot) => slot,
            Err(error) => self.lock_slot(error, me),
        };
        Guard::new(self, slot, me)
    }

    // Returns the bare guard, so that the fast path keeps everything in registers.
    #[cold]
    fn lock_slot<'a>(
        &'a self,
        error: TryLockError<MutexGuard<'a, Slot<N>>>,
        me: u64,
    ) -> MutexGuard<'a, Slot<N>> {
        // A panic of the caller under the lock is the caller's; the device must still be told.
        if let TryLockError::Poisoned(poison) = error {
            return poison.into_inner();
        }
        if self.core.holder() == Some(me) {
            context::die(format_args!(
                "waits for itself: it holds the lock of subscriber `{}` (an Update, or one of its \
                 callbacks) and does something that needs it. Code under that lock must not change \
                 the address space, nor allocate where the allocator does",
                self.name()
            ));
        }
        self.slot.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn try_lock(&self) -> Option<Guard<'_, N>> {
        let slot = match self.slot.try_lock() {
            Ok(slot) => slot,
            Err(TryLockError::Poisoned(poison)) => poison.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Guard::new(self, slot, context::thread_number()))
    }

    /// Tells the notifier of `event`, under its lock, and returns the fence unless it is over.
    fn tell(
        &self,
        mut guard: Guard<'_, N>,
        call: impl FnOnce(&mut N) -> Result<N::Fence, WouldBlock>,
    ) -> Result<Option<N::Fence>, WouldBlock> {
        let Some(notifier) = &mut guard.slot.notifier else {
            return Ok(None);
        };
        let (fence, changed) = callback(CallbackKind::Invalidate, self.name(), || {
            let fence = call(notifier)?;
            let changed = fence.changed();
            Ok((if fence.is_over() { None } else { Some(fence) }, changed))
        })?;
        if !mutant!("no_bump") {
            guard.bump();
        }
        if let Some(counters) = &self.core.counters {
            counters.delivered(changed);
        }
        Ok(fence)
    }

    /// Tells the notifier of an event that it cannot refuse.
    fn tell_blockable(&self, event: &Event) -> Option<N::Fence> {
        match self.tell(self.lock(), |notifier| Ok(notifier.invalidate(event))) {
            Ok(fence) => fence,
            Err(WouldBlock) => unreachable!("a blockable delivery has no way to refuse"),
        }
    }

    /// Keeps a fence until [`Node::finish`].
    fn keep(&self, fence: Option<N::Fence>) -> Pending {
        let Some(fence) = fence else {
            return Pending::Over;
        };
        let mut fences = self.fences.lock().unwrap_or_else(|poison| poison.into_inner());
        if let Some(free) = fences.iter().position(Option::is_none) {
            fences[free] = Some(fence);
            return Pending::InNode(free);
        }
        drop(fences);
        Pending::Boxed(Box::new(fence))
    }

    fn wait(&self, fence: N::Fence) {
        callback(CallbackKind::Invalidate, self.name(), || fence.wait());
    }

    /// Sends every read section under way to its retry, and makes the device stop using the range
    /// of the subscription, or what `new` drops of it.
    pub(crate) fn stop(&self, no_locks: &NoLocks, new: Option<VaRange>) {
        let mut guard = self.lock();
        let old = guard.slot.range;
        guard.slot.range = new.unwrap_or(old);
        if !mutant!("resize_without_collision") {
            guard.bump();
        }
        drop(guard);
        let given_up = match new {
            None => [Some(old), None],
            Some(_) if mutant!("resize_without_announcement") => [None, None],
            Some(new) => old.difference(new),
        };
        for piece in given_up.into_iter().flatten() {
            let event = Event::new(EventKind::Release, piece);
            if let Some(fence) = self.tell_blockable(&event) {
                self.wait(fence);
            }
            if new.is_some() && !mutant!("resize_without_end") {
                self.invalidate_range_end(no_locks, &event);
            }
        }
    }

    /// Says again what the range is, after a change of it came to nothing.
    pub(crate) fn set_range(&self, range: VaRange) {
        self.lock().slot.range = range;
    }

    /// Takes the notifier out for good.
    pub(crate) fn take(&self) -> Option<N> {
        self.lock().slot.notifier.take()
    }
}

impl<N: Notifier> Node for NodeOf<N> {
    fn core(&self) -> &Core {
        &self.core
    }

    fn invalidate(&self, _: &NoLocks, event: &Event) -> Pending {
        self.keep(self.tell_blockable(event))
    }

    fn try_invalidate(&self, _: &NoLocks, event: &Event) -> Result<Pending, WouldBlock> {
        // Somebody is inside; it may take as long as it likes.
        let guard = self.try_lock().ok_or(WouldBlock)?;
        let fence = self.tell(guard, |notifier| notifier.try_invalidate(event))?;
        Ok(self.keep(fence))
    }

    fn finish(&self, _: &NoLocks, pending: Pending) {
        match pending {
            Pending::Over => {}
            Pending::InNode(slot) => {
                let fence = self.fences.lock().unwrap_or_else(|poison| poison.into_inner())[slot]
                    .take()
                    .expect("a pending fence is taken once");
                self.wait(fence);
            }
            Pending::Boxed(fence) => {
                callback(CallbackKind::Invalidate, self.name(), || fence.wait());
            }
        }
    }

    fn invalidate_range_end(&self, _: &NoLocks, event: &Event) {
        let Some(end) = self.end else { return };
        let mut guard = self.lock();
        if let Some(notifier) = &mut guard.slot.notifier {
            callback(CallbackKind::Invalidate, self.name(), || end(notifier, event));
        }
    }

    fn release(&self, _: &NoLocks) {
        if let Some(notifier) = self.take() {
            callback(CallbackKind::Release, self.name(), || notifier.release());
        }
        self.core.mark(ENDED);
        self.core.gate.queue.wake_all();
    }

    fn name(&self) -> &str {
        self.name()
    }

    fn notifier_type(&self) -> TypeId {
        TypeId::of::<N>()
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl<N: Notifier> Orphan for NodeOf<N> {
    /// Drops the notifier of a subscription that was dropped inside a callback. On a thread that
    /// may have nothing to do with it, so a panic there is as fatal as one in a callback.
    fn end(&self) {
        let notifier = self.take();
        callback(CallbackKind::Release, self.name(), || drop(notifier));
        context::finish_deferred();
    }
}

/// The notifier's lock, held.
pub(crate) struct Guard<'a, N: Notifier> {
    node: &'a NodeOf<N>,
    pub(crate) slot: MutexGuard<'a, Slot<N>>,
}

impl<'a, N: Notifier> Guard<'a, N> {
    fn new(node: &'a NodeOf<N>, slot: MutexGuard<'a, Slot<N>>, me: u64) -> Guard<'a, N> {
        // Relaxed: see `Core::holder`.
        node.core.holder.store(me, Ordering::Relaxed);
        Guard { node, slot }
    }

    /// Sends every read section that has begun to its retry.
    #[inline]
    fn bump(&self) {
        let sequence = &self.node.core.sequence;
        // Relaxed: written under the lock we hold. Release: pairs with the Acquire in `try_begin`.
        // Wrapping is of no account: only equality is ever asked, within one read section (E06).
        let next = sequence.load(Ordering::Relaxed).wrapping_add(1);
        sequence.store(next, relaxed_if(mutant!("relaxed_bump"), Ordering::Release));
    }

    /// Tells whether no event came since a read section began at `sequence`.
    #[inline]
    pub(crate) fn is_current(&self, sequence: u64) -> bool {
        // Relaxed: written under the lock we hold.
        self.node.core.sequence.load(Ordering::Relaxed) == sequence
    }
}

impl<N: Notifier> Drop for Guard<'_, N> {
    fn drop(&mut self) {
        // Relaxed: see `Core::holder`.
        self.node.core.holder.store(0, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::{Subscriptions, VaRange};

    struct Table(bool);

    impl Notifier for Table {
        type Fence = ();

        fn invalidate(&mut self, _: &Event) {
            self.0 = false;
        }
    }

    /// Wherever the sequence starts, also where it wraps, read sections begin and collide as ever.
    #[test]
    fn e06_e08_the_first_sequence_does_not_matter() {
        for first in [0, 1, 2, u64::MAX - 3, u64::MAX - 1, u64::MAX, 0x5555_5555_5555_5556] {
            let space = Subscriptions::new();
            let mirror = space.subscribe(VaRange::ALL, Table(false)).unwrap();
            mirror.node().core.sequence.store(first, Ordering::Relaxed);
            for _ in 0..10 {
                let section = mirror.read_begin().unwrap();
                let change = Event::new(EventKind::Clear, VaRange::ALL);
                drop(space.invalidate_range_start(change));
                assert!(section.check_retry());
                assert!(section.commit().is_err(), "committed over an invalidation");
                mirror.read_begin().unwrap().commit().unwrap().0 = true;
            }
        }
    }
}
