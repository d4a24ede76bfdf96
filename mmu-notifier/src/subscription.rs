//! A subscription: who owns it, who may use it, and how a translation is committed.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Instant;

use crate::VaRange;
use crate::context::{self, Deferred};
use crate::diagnostics::{Cause, Statistics};
use crate::gate::{Orphan, Pin, TimedOut};
use crate::node::{Begin, CLOSED, COUNT, ENDED, Guard, Node, NodeOf, UNLINKED, UNSETTLED};
use crate::notifier::Notifier;
use crate::primitive::{Ordering, mutant};
use crate::registry::{NoLocks, Phase};
use crate::subscriptions::{Released, Subscriptions};

/// A notifier that is subscribed to the changes of a range. Owning it is being subscribed.
///
/// It dereferences to a [`Handle`], which has what any thread may do with the subscription; only
/// the owner can end it or change its range.
///
/// # Its end
///
/// [`unsubscribe`](Subscription::unsubscribe) hands the notifier back; dropping the subscription
/// does the same and drops the notifier. In both, the device is first told of an
/// [`EventKind::Release`](crate::EventKind::Release) over its range, so that nothing is left
/// translated when nobody will say any more that it changed. On return no call on the notifier is
/// running and none will come (acceptance C03, C04): its memory is the caller's again, and a device
/// that no other subscription uses can be freed at once (C05, C06).
///
/// The owner must have done nothing before; in particular a running
/// [`release`](Subscriptions::release) of the address space is waited for (B13, D12).
///
/// Dropped inside a callback, where nothing may wait, a subscription ends when the thread has left
/// its callbacks, and before the announcement or release in whose callback it was dropped returns:
/// its device has stopped, and no new call or operation begins. Its notifier is dropped then, or,
/// if calls or operations are under way, by the last of them; a panic of that drop is fatal.
#[must_use = "dropping a subscription ends it"]
#[doc(alias = "mmu_interval_notifier")]
pub struct Subscription<N: Notifier> {
    handle: Handle<N>,
    phase: Ending,
}

/// How far a subscription is on its way to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Subscribed,
    /// Out of the index, by us and not by a release.
    Unlinked,
    Over,
}

/// A counted reference to a subscription: what a fault handler or a worker thread holds.
///
/// It keeps no subscription alive. After the subscription has ended, everything fails with
/// [`Released`].
pub struct Handle<N: Notifier> {
    space: Arc<Subscriptions>,
    node: Arc<NodeOf<N>>,
}

/// Why a read section did not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadBeginError {
    /// See [`Released`].
    #[error(transparent)]
    Released(#[from] Released),
    /// See [`TimedOut`].
    #[error(transparent)]
    TimedOut(#[from] TimedOut),
    /// The calling thread would wait for itself.
    #[error(transparent)]
    SelfWait(#[from] SelfWait),
}

/// The calling thread would wait for itself: it is inside a callback, or has announced the very
/// change whose end it would wait for.
///
/// An announcement made while nobody was subscribed is not recorded, with its range or its owner.
/// The first reader of a subscription that came later waits for all of those, and so cannot be a
/// thread that made one, wherever it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the calling thread would wait for itself: it is inside a callback, or made the announcement \
     whose end it would wait for"
)]
pub struct SelfWait;

/// An invalidation collided with a read section: what was looked up may be stale. Begin again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an invalidation came between read_begin and commit: begin again")]
pub struct Retry;

/// An unsubscription that has not come to its end. Drop the subscription to wait for it, or try
/// again.
#[derive(thiserror::Error)]
#[error("subscriber `{}` has not ended: {reason}", subscription.name())]
pub struct Unfinished<N: Notifier> {
    /// The subscription. It hears of no new events, unless the reason is [`SelfWait`] or a release
    /// that was waited for gave up.
    pub subscription: Subscription<N>,
    /// What stands in the way.
    #[source]
    pub reason: UnsubscribeError,
}

/// Why an unsubscription did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnsubscribeError {
    /// A call on the notifier, an operation, or the release of the address space goes on.
    #[error(transparent)]
    TimedOut(#[from] TimedOut),
    /// See [`SelfWait`]. Nothing has been done.
    #[error(transparent)]
    SelfWait(#[from] SelfWait),
}

impl<N: Notifier> Subscription<N> {
    pub(crate) fn new(handle: Handle<N>) -> Subscription<N> {
        Subscription { handle, phase: Ending::Subscribed }
    }

    /// Ends the subscription and hands the notifier back; `None` where the address space died
    /// first: then [`Notifier::release`] has run, and has returned.
    ///
    /// Waits for calls on the notifier that other threads are in, for operations, and for a running
    /// release. Never fails, and allocates nothing (acceptance A07, A08, A16).
    ///
    /// # Panics
    ///
    /// If called from inside a callback, where it would wait for itself. Drop the subscription
    /// instead.
    #[doc(alias = "mmu_interval_notifier_remove")]
    #[doc(alias = "mmu_notifier_unregister")]
    pub fn unsubscribe(mut self) -> Option<N> {
        assert!(
            !context::in_callback(),
            "mmu-notifier: unsubscribing `{}` from inside a callback would wait for itself; drop \
             the subscription instead",
            self.name()
        );
        self.finish(None).expect("a wait without a deadline does not time out")
    }

    /// Does what [`unsubscribe`](Subscription::unsubscribe) does, until `deadline`.
    ///
    /// # Errors
    ///
    /// [`Unfinished`], with the subscription. The device has been told to stop unless the reason is
    /// [`UnsubscribeError::SelfWait`].
    pub fn unsubscribe_deadline(mut self, deadline: Instant) -> Result<Option<N>, Unfinished<N>> {
        if context::in_callback() {
            return Err(Unfinished { subscription: self, reason: SelfWait.into() });
        }
        match self.finish(Some(deadline)) {
            Ok(notifier) => Ok(notifier),
            Err(reason) => Err(Unfinished { subscription: self, reason: reason.into() }),
        }
    }

    fn finish(&mut self, deadline: Option<Instant>) -> Result<Option<N>, TimedOut> {
        let Handle { space, node } = &self.handle;
        let mut no_locks = NoLocks::at_entry();
        let core = node.core();
        while self.phase == Ending::Subscribed {
            self.handle.close(&mut no_locks);
            if space.unlink(&mut no_locks, node.as_ref()) {
                self.phase = Ending::Unlinked;
                break;
            }
            // A release was first. It ends the notifier, or gives it up at a deadline.
            if !mutant!("unsubscribe_ignores_release") {
                let over = || core.has(ENDED) || !core.has(UNLINKED);
                core.gate.queue.wait_until(deadline, over, || ())?;
            }
            if core.has(ENDED) || mutant!("unsubscribe_ignores_release") {
                self.phase = Ending::Over;
            }
        }
        let mut notifier = None;
        if self.phase == Ending::Unlinked {
            core.gate.drain(deadline)?;
            notifier = node.take();
            self.phase = Ending::Over;
        }
        Ok(notifier)
    }

    /// Changes the range: grows, shrinks or moves it, and no event is lost.
    ///
    /// Every event reaches the subscription by its old or by its new range. Addresses that the new
    /// range does not hold are invalidated first, as
    /// [`EventKind::Release`](crate::EventKind::Release). Read sections that began before fail
    /// their commit; new ones wait until the change is done and until the announcements under way
    /// in the new range are over. The kernel has no such call (features F19).
    ///
    /// # Errors
    ///
    /// [`Released`]: the address space has ended the subscription.
    ///
    /// # Panics
    ///
    /// If called from inside a callback.
    pub fn set_range(&mut self, range: VaRange) -> Result<(), Released> {
        assert!(
            !context::in_callback(),
            "mmu-notifier: the range of `{}` cannot be changed from inside a callback",
            self.name()
        );
        let Handle { space, node } = &self.handle;
        let mut no_locks = NoLocks::at_entry();
        let pin = space.pin_if_linked(&mut no_locks, self.handle.as_node()).ok_or(Released)?;
        let old = self.handle.range();
        // A change of range is an invalidation of the subscription alone: readers wait.
        node.core().raise(1);
        node.stop(&no_locks, Some(range));
        let linked = space.relink(&mut no_locks, node.as_ref(), range);
        if !linked && !mutant!("lost_range_stays") {
            node.set_range(old);
        }
        node.core().lower(1);
        drop(pin);
        if linked { Ok(()) } else { Err(Released) }
    }
}

impl<N: Notifier> Drop for Subscription<N> {
    fn drop(&mut self) {
        if self.phase == Ending::Over {
            return;
        }
        if context::in_callback() && !mutant!("drop_in_a_callback_waits") {
            context::defer(Box::new(Dropped { handle: self.handle.clone(), phase: self.phase }));
            return;
        }
        drop(self.finish(None));
    }
}

/// A subscription that was dropped inside a callback.
struct Dropped<N: Notifier> {
    handle: Handle<N>,
    phase: Ending,
}

impl<N: Notifier> Deferred for Dropped<N> {
    /// Ends the subscription without waiting for calls or operations: one of those may be this
    /// thread's, or wait for it. Whoever is the last of them drops the notifier.
    fn end(self: Box<Self>) {
        let Handle { space, node } = &self.handle;
        let mut no_locks = NoLocks::at_entry();
        let unlinked = match self.phase {
            Ending::Subscribed => {
                self.handle.close(&mut no_locks);
                // If a release has unlinked it, that ends it.
                space.unlink(&mut no_locks, node.as_ref())
            }
            Ending::Unlinked => true,
            Ending::Over => false,
        };
        if unlinked {
            node.core().gate.abandon(Arc::clone(node) as Arc<dyn Orphan>);
        }
    }
}

impl<N: Notifier> Deref for Subscription<N> {
    type Target = Handle<N>;

    fn deref(&self) -> &Handle<N> {
        &self.handle
    }
}

impl<N: Notifier> Handle<N> {
    pub(crate) fn new(space: Arc<Subscriptions>, node: Arc<NodeOf<N>>) -> Handle<N> {
        Handle { space, node }
    }

    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(crate) fn node(&self) -> &NodeOf<N> {
        &self.node
    }

    /// Makes the device stop for good, unless it has been unlinked already.
    fn close(&self, no_locks: &mut NoLocks) {
        let Some(pin) = self.space.pin_if_linked(no_locks, self.as_node()) else { return };
        let closed_before = pin.core().mark(CLOSED) & CLOSED != 0;
        // Also where a release has closed it before: it may not have told this device yet, and once
        // we have unlinked it nobody tells it of changes.
        let skip = mutant!("unsubscribe_without_stop")
            || (mutant!("unsubscribe_trusts_a_release") && closed_before);
        if !skip {
            self.node.stop(no_locks, None);
        }
    }

    fn as_node(&self) -> Arc<dyn Node> {
        Arc::clone(&self.node) as Arc<dyn Node>
    }

    /// Begins a read section: from here to its [commit](ReadSection::commit), translations may be
    /// looked up, and the commit says whether they still hold.
    ///
    /// Waits while the range is being changed, in one sleep, never a spin. A change elsewhere does
    /// not delay it (acceptance E09), other than one that began when nobody was subscribed: the
    /// first reader waits for those wherever they are. It may return although another change has
    /// begun; the commit then fails (E10), so a caller that retries bounds its time with a deadline
    /// of its own.
    ///
    /// # Errors
    ///
    /// [`Released`]: the address space dies, or the subscription has ended.
    ///
    /// # Panics
    ///
    /// Where it would wait for the calling thread itself: see [`SelfWait`].
    #[doc(alias = "mmu_interval_read_begin")]
    #[inline]
    pub fn read_begin(&self) -> Result<ReadSection<'_, N>, Released> {
        match self.begin(None) {
            Ok(section) => Ok(section),
            Err(ReadBeginError::Released(released)) => Err(released),
            Err(error) => self.refuse_to_wait(error),
        }
    }

    #[cold]
    #[track_caller]
    fn refuse_to_wait(&self, error: ReadBeginError) -> ! {
        panic!("mmu-notifier: read_begin on `{}`: {error}", self.name())
    }

    /// Does what [`read_begin`](Handle::read_begin) does, until `deadline`.
    ///
    /// # Errors
    ///
    /// See [`ReadBeginError`].
    pub fn read_begin_deadline(
        &self,
        deadline: Instant,
    ) -> Result<ReadSection<'_, N>, ReadBeginError> {
        self.begin(Some(deadline))
    }

    #[inline]
    fn begin(&self, deadline: Option<Instant>) -> Result<ReadSection<'_, N>, ReadBeginError> {
        context::forbid_in_invalidate("read_begin");
        match self.node.core().try_begin() {
            Begin::At(sequence) => Ok(ReadSection { handle: self, sequence, collided: false }),
            Begin::Blocked => {
                let (sequence, collided) = self.begin_blocked(deadline)?;
                Ok(ReadSection { handle: self, sequence, collided })
            }
        }
    }

    /// Waits, and returns at which sequence a section begins and whether it has collided already.
    #[cold]
    fn begin_blocked(&self, deadline: Option<Instant>) -> Result<(u64, bool), ReadBeginError> {
        let core = self.node.core();
        if core.has(CLOSED) {
            return Err(Released.into());
        }
        if context::in_callback() {
            return Err(SelfWait.into());
        }
        let mut no_locks = NoLocks::at_entry();
        let since = core.counters.as_ref().map(|_| Instant::now());
        let mut cause = None;
        let mut waited = Ok(false);
        if core.has(UNSETTLED) {
            if context::holds_unrecorded(self.space.address()) {
                return Err(SelfWait.into());
            }
            waited = self.space.settle(&mut no_locks, self.node.as_ref(), deadline);
        }
        if let Ok(settling) = waited
            && core.has(COUNT)
        {
            cause = self.find_cause(&mut no_locks)?;
            waited = core.wait_for_announcements(deadline).map(|slept| slept || settling);
        }
        if let (Some(counters), Some(since)) = (&core.counters, since)
            && waited != Ok(false)
        {
            counters.waited(since.elapsed(), cause);
        }
        waited?;
        match core.try_begin() {
            Begin::At(sequence) => Ok((sequence, false)),
            Begin::Blocked if core.has(CLOSED) => Err(Released.into()),
            Begin::Blocked if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                Err(TimedOut.into())
            }
            Begin::Blocked => Ok((0, true)),
        }
    }

    /// Finds an announcement that a reader waits for, first one that the reader itself made.
    fn find_cause(&self, no_locks: &mut NoLocks) -> Result<Option<Cause>, SelfWait> {
        let core = self.node.core();
        let me = context::thread_number();
        let registry = self.space.registry.read(no_locks);
        if core.has(UNLINKED) {
            return Ok(None);
        }
        let range = registry.index.range(core.key());
        if self.space.find_active(range, core.owner, |active| active.thread == me).is_some() {
            return Err(SelfWait);
        }
        let active = self.space.find_active(range, core.owner, |_| true);
        Ok(active.map(|active| Cause { event: active.event, thread: active.thread }))
    }

    /// Begins an operation that uses the address space: a migration, a fault being served.
    ///
    /// [`release`](Subscriptions::release) of the address space and the end of the subscription
    /// wait until it has ended, and never cut it short (acceptance D02-D05). Whoever is told to
    /// stop meanwhile must let it end: it may announce changes as long as it lives.
    ///
    /// # Errors
    ///
    /// [`Released`]: the address space dies, or the subscription has ended.
    pub fn begin_operation(&self) -> Result<Operation<N>, Released> {
        let mut no_locks = NoLocks::at_entry();
        let registry = self.space.registry.read(&mut no_locks);
        if registry.phase != Phase::Live || self.node.core().has(CLOSED | UNLINKED) {
            return Err(Released);
        }
        let gate = Arc::clone(&self.node.core().gate);
        let pin = Pin::new(Arc::clone(&self.node), gate);
        let in_space = InSpace::enter(&self.space, context::shard());
        drop(registry);
        Ok(Operation { pin, in_space })
    }

    /// Looks at the notifier, under its lock.
    ///
    /// Translations seen this way are as good as the last commit and every invalidation since have
    /// left them; a notifier without interior mutability gets none but by a read section
    /// (acceptance E23). `f` must not change the
    /// address space, nor wait for anybody who does.
    ///
    /// # Errors
    ///
    /// [`Released`]: the notifier has been handed back or released.
    pub fn inspect<R>(&self, f: impl FnOnce(&N) -> R) -> Result<R, Released> {
        let guard = self.node.lock();
        guard.slot.notifier.as_ref().map(f).ok_or(Released)
    }

    /// Returns the range that is subscribed to. To decide what may be committed, ask
    /// [`Update::range`] instead, which cannot change.
    pub fn range(&self) -> VaRange {
        self.node.lock().slot.range
    }

    /// Returns the address space.
    pub fn space(&self) -> &Arc<Subscriptions> {
        &self.space
    }

    /// Returns the name for diagnostics.
    pub fn name(&self) -> &str {
        self.node.name()
    }

    /// Returns what was counted, where
    /// [`SubscribeOptions::statistics`](crate::SubscribeOptions::statistics) asked for it.
    pub fn statistics(&self) -> Option<Statistics> {
        self.node.core().counters.as_ref().map(|counters| counters.read())
    }
}

impl<N: Notifier> Clone for Handle<N> {
    fn clone(&self) -> Handle<N> {
        Handle { space: Arc::clone(&self.space), node: Arc::clone(&self.node) }
    }
}

/// The time between looking translations up and committing them.
///
/// Concluded exactly once, by [`commit`](ReadSection::commit) or by being dropped (acceptance E03).
#[must_use = "a read section that is not committed did nothing"]
pub struct ReadSection<'a, N: Notifier> {
    handle: &'a Handle<N>,
    sequence: u64,
    /// It was known from the start that the commit fails.
    collided: bool,
}

impl<'a, N: Notifier> ReadSection<'a, N> {
    /// Tells whether the commit is going to fail, to leave a long loop early.
    ///
    /// Takes no lock. `true` is final, `false` promises nothing: only the commit decides.
    #[doc(alias = "mmu_interval_check_retry")]
    pub fn check_retry(&self) -> bool {
        // Relaxed: advice; `commit` asks again under the lock.
        let sequence = self.handle.node.core().sequence.load(Ordering::Relaxed);
        self.collided || sequence != self.sequence
    }

    /// Takes the notifier's lock and, if no invalidation of the range began since
    /// [`read_begin`](Handle::read_begin), gives access to the notifier.
    ///
    /// What was looked up within the section is true as long as the [`Update`] lives, and the next
    /// announcement will undo what is committed (invariant *Current*).
    ///
    /// # Errors
    ///
    /// [`Retry`]: an invalidation collided. A collision is expected, not exceptional: the name says
    /// what to do (acceptance E01, E04).
    #[doc(alias = "mmu_interval_read_retry")]
    #[inline]
    pub fn commit(self) -> Result<Update<'a, N>, Retry> {
        let guard = self.handle.node.lock();
        let current = guard.is_current(self.sequence) && !self.collided;
        if current || mutant!("no_retry_check") {
            return Ok(Update { guard });
        }
        drop(guard);
        self.count_collision();
        Err(Retry)
    }

    #[cold]
    fn count_collision(&self) {
        if let Some(counters) = &self.handle.node.core().counters {
            counters.collided();
        }
    }
}

/// The notifier, under its lock, at an instant when what the read section looked up is true.
///
/// Invalidations of this subscription wait while it lives: it must not change the address space,
/// nor allocate where the allocator may, nor wait for anybody who does.
pub struct Update<'a, N: Notifier> {
    guard: Guard<'a, N>,
}

impl<N: Notifier> Update<'_, N> {
    /// Returns the range of the subscription, which cannot change while the update lives. Commit
    /// nothing outside: nobody would say when it changes.
    pub fn range(&self) -> VaRange {
        self.guard.slot.range
    }
}

impl<N: Notifier> Deref for Update<'_, N> {
    type Target = N;

    fn deref(&self) -> &N {
        self.guard.slot.notifier.as_ref().expect("the notifier goes only after a new sequence")
    }
}

impl<N: Notifier> DerefMut for Update<'_, N> {
    fn deref_mut(&mut self) -> &mut N {
        self.guard.slot.notifier.as_mut().expect("the notifier goes only after a new sequence")
    }
}

/// An operation under way that uses the address space. Its drop ends it.
///
/// The release of the address space, and the end of the subscription, wait for it.
#[must_use = "the operation ends when this is dropped"]
pub struct Operation<N: Notifier> {
    pin: Pin<NodeOf<N>>,
    /// Left last: release may return when it is.
    in_space: InSpace,
}

/// The count of an operation in its address space, which outlives the subscription it began with.
struct InSpace {
    space: Arc<Subscriptions>,
    shard: usize,
}

impl InSpace {
    fn enter(space: &Arc<Subscriptions>, shard: usize) -> InSpace {
        space.operations(shard).enter();
        InSpace { space: Arc::clone(space), shard }
    }
}

impl Drop for InSpace {
    fn drop(&mut self) {
        self.space.operations(self.shard).leave();
    }
}

impl<N: Notifier> Operation<N> {
    /// Returns the address space, to announce changes in.
    pub fn space(&self) -> &Arc<Subscriptions> {
        &self.in_space.space
    }

    /// Returns a handle to the subscription.
    pub fn handle(&self) -> Handle<N> {
        Handle { space: Arc::clone(self.space()), node: Arc::clone(&self.pin) }
    }
}

impl<N: Notifier> fmt::Debug for Operation<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operation").field("name", &self.pin.name()).finish_non_exhaustive()
    }
}

impl<N: Notifier> fmt::Debug for Subscription<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Subscription").field(&self.handle).finish()
    }
}

impl<N: Notifier> fmt::Debug for Handle<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::diagnostics::write_node(f, self.node.as_ref(), None, 0)
    }
}

impl<N: Notifier> fmt::Debug for ReadSection<'_, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadSection")
            .field("name", &self.handle.name())
            .field("check_retry", &self.check_retry())
            .finish_non_exhaustive()
    }
}

impl<N: Notifier> fmt::Debug for Update<'_, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Update").field("range", &self.range()).finish_non_exhaustive()
    }
}

impl<N: Notifier> fmt::Debug for Unfinished<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unfinished")
            .field("subscription", &self.subscription)
            .field("reason", &self.reason)
            .finish()
    }
}
