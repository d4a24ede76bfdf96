//! An address space, as those see it who must hear of its changes.

use std::any::TypeId;
use std::marker::PhantomData;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crossbeam_utils::CachePadded;
use smallvec::SmallVec;

use crate::VaRange;
use crate::context;
use crate::event::{Class, Event, EventKind, Owner};
use crate::gate::{Gate, Pin, TimedOut, WaitQueue};
use crate::index::{Growth, GrowthError, Index};
use crate::node::{CLOSED, Core, Node, NodeOf, Pending, Settings, UNLINKED, UNSETTLED};
use crate::notifier::{Notifier, PairedNotifier, WouldBlock};
use crate::primitive::{AtomicBool, Ordering, SHARDS, mutant};
use crate::registry::{Active, ActiveList, NoLocks, Phase, Registry, RegistryLock};
use crate::subscription::{Handle, Subscription};

/// Who must hear of the changes of one address space. There is one per address space, in an `Arc`.
///
/// Whoever changes the address space brackets each change with
/// [`invalidate_range_start`](Subscriptions::invalidate_range_start) and the drop of the guard it
/// returns. Whoever holds translations [subscribes](Subscriptions::subscribe).
///
/// # What is guaranteed
///
/// The four invariants of [`guide::invariants`](crate::guide::invariants): *Announced*, *Current*,
/// *Over*, *Once*. The locks are those of [`guide::locks`](crate::guide::locks) (acceptance A04).
///
/// # Examples
///
/// ```
/// use std::collections::BTreeMap;
/// use mmu_notifier::{Event, EventKind, Notifier, Subscriptions, VaRange};
///
/// /// A device's page table: address to frame.
/// #[derive(Default)]
/// struct PageTable(BTreeMap<u64, u64>);
///
/// impl Notifier for PageTable {
///     type Fence = ();
///     fn invalidate(&mut self, event: &Event) {
///         self.0.retain(|&address, _| !event.range().contains(address));
///     }
/// }
///
/// let space = Subscriptions::new();
/// let range = VaRange::new(0x1000, 0x4000)?;
/// let mirror = space.subscribe(range, PageTable::default())?;
///
/// // The device faults at 0x2000: translate, and commit if nothing changed meanwhile.
/// loop {
///     let section = mirror.read_begin()?;
///     let frame = 42; // look the translation up
///     if let Ok(mut table) = section.commit() {
///         table.0.insert(0x2000, frame);
///         break;
///     }
/// }
///
/// // Somebody unmaps the page.
/// {
///     let _change = space.invalidate_range_start(Event::new(EventKind::Unmap, range));
///     // From here to the end of the block no device uses the range.
/// }
/// assert!(mirror.unsubscribe().expect("the space lives").0.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "mmu_notifier_subscriptions")]
#[doc(alias = "mmu_notifier_mm")]
pub struct Subscriptions {
    pub(crate) registry: RegistryLock,
    /// Somebody is subscribed, so announcements must be recorded. Changes under the registry lock,
    /// held for writing.
    populated: AtomicBool,
    shards: [CachePadded<Shard>; SHARDS],
    /// Those who wait for the end of a release that another thread is at.
    released: WaitQueue,
    limit: usize,
    live: Arc<()>,
}

/// What announcers of one shard write.
struct Shard {
    /// Announcements under way that nobody was there to hear.
    unrecorded: Gate,
    active: ActiveList,
    /// Operations under way that began in this shard.
    operations: Gate,
}

/// How many subscribers one announcement reaches without allocating memory.
const HITS: usize = 8;

/// A subscriber that an announcement has to reach.
pub(crate) struct Hit {
    pub(crate) range: VaRange,
    pub(crate) pin: Pin<dyn Node>,
    pending: Pending,
}

pub(crate) type Hits = SmallVec<[Hit; HITS]>;

/// The address space has died, or the subscription has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the address space has been released, or the subscription has ended")]
pub struct Released;

/// Why nobody was subscribed. The notifier comes back in [`NotSubscribed::notifier`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The address space dies or has died.
    #[error("the address space has been released")]
    Released,
    /// The limit of [`Subscriptions::with_limit`] is reached, or that of any address space: 2^32 -
    /// 64 subscriptions.
    #[error("the address space already has as many subscriptions as its limit allows")]
    Limit,
    /// There is no memory for another entry.
    #[error("out of memory for another subscription")]
    OutOfMemory,
}

/// A subscription that did not come about: the reason, and what was to be subscribed.
///
/// Nothing was changed (acceptance A10, E21).
#[derive(thiserror::Error)]
#[error("{reason}")]
pub struct NotSubscribed<N> {
    /// What was to be subscribed; no call was made on it.
    pub notifier: N,
    /// Why it was not.
    #[source]
    pub reason: SubscribeError,
}

impl<N> std::fmt::Debug for NotSubscribed<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NotSubscribed").field("reason", &self.reason).finish_non_exhaustive()
    }
}

/// What a subscription is to be, other than the plain one that [`Subscriptions::subscribe`] makes.
#[derive(Clone, Debug, Default)]
pub struct SubscribeOptions {
    owner: Option<Owner>,
    class: Class,
    name: Option<Box<str>>,
    statistics: bool,
}

impl SubscribeOptions {
    /// Starts from the plain subscription: no owner, [`Class::Interval`], named after the
    /// notifier's type, no statistics.
    pub fn new() -> SubscribeOptions {
        SubscribeOptions::default()
    }

    /// Makes the subscription deaf to its owner's own [`EventKind::Migrate`] and
    /// [`EventKind::Exclusive`] (acceptance X07).
    #[must_use]
    pub fn owner(self, owner: Owner) -> SubscribeOptions {
        SubscribeOptions { owner: Some(owner), ..self }
    }

    /// Sets when it hears of an event, relative to others (acceptance X06).
    #[must_use]
    pub fn class(self, class: Class) -> SubscribeOptions {
        SubscribeOptions { class, ..self }
    }

    /// Sets the name that dumps and fatal messages use.
    #[must_use]
    pub fn name(self, name: &str) -> SubscribeOptions {
        SubscribeOptions { name: Some(name.into()), ..self }
    }

    /// Counts deliveries, false invalidations, collisions and waits; read them with
    /// [`Handle::statistics`]. Costs nothing where it is not asked for.
    #[must_use]
    pub fn statistics(self) -> SubscribeOptions {
        SubscribeOptions { statistics: true, ..self }
    }
}

impl Subscriptions {
    /// Makes the address space's list of subscribers, with nobody on it.
    pub fn new() -> Arc<Subscriptions> {
        Subscriptions::with_limit(usize::MAX)
    }

    /// Makes one that refuses more than `limit` subscriptions at a time (acceptance A13).
    pub fn with_limit(limit: usize) -> Arc<Subscriptions> {
        let shard = |_| {
            CachePadded::new(Shard {
                unrecorded: Gate::new(),
                active: ActiveList::new(),
                operations: Gate::new(),
            })
        };
        Arc::new(Subscriptions {
            registry: RegistryLock::new(),
            populated: AtomicBool::new(false),
            shards: std::array::from_fn(shard),
            released: WaitQueue::new(),
            limit,
            live: Arc::new(()),
        })
    }

    /// Subscribes `notifier` to the changes of `range`.
    ///
    /// From the return on, every event that overlaps `range` is delivered, until the subscription
    /// ends. Announcements that began before are delivered neither start nor end; read sections
    /// wait until they are over (acceptance A01, E14). So a translation is only to be trusted
    /// within a read section (E23).
    ///
    /// Never waits for an announcement. Must not be called from inside an invalidation.
    ///
    /// # Errors
    ///
    /// [`NotSubscribed`], with the notifier: the address space is dying (acceptance A06, D09), the
    /// limit is reached, or there is no memory.
    #[doc(alias = "mmu_interval_notifier_insert")]
    pub fn subscribe<N: Notifier>(
        self: &Arc<Self>,
        range: VaRange,
        notifier: N,
    ) -> Result<Subscription<N>, NotSubscribed<N>> {
        self.subscribe_with(range, notifier, SubscribeOptions::new())
    }

    /// Subscribes `notifier` to every change, in [`Class::List`]: after those of a range.
    ///
    /// # Errors
    ///
    /// As for [`subscribe`](Subscriptions::subscribe).
    #[doc(alias = "mmu_notifier_register")]
    pub fn subscribe_all<N: Notifier>(
        self: &Arc<Self>,
        notifier: N,
    ) -> Result<Subscription<N>, NotSubscribed<N>> {
        let options = SubscribeOptions::new().class(Class::List);
        self.subscribe_with(VaRange::ALL, notifier, options)
    }

    /// Subscribes `notifier` as `options` say.
    ///
    /// # Errors
    ///
    /// As for [`subscribe`](Subscriptions::subscribe).
    pub fn subscribe_with<N: Notifier>(
        self: &Arc<Self>,
        range: VaRange,
        notifier: N,
        options: SubscribeOptions,
    ) -> Result<Subscription<N>, NotSubscribed<N>> {
        self.link(range, notifier, None, options)
    }

    /// Subscribes a `notifier` that hears of the ends of changes as well as of their starts.
    ///
    /// # Errors
    ///
    /// As for [`subscribe`](Subscriptions::subscribe).
    pub fn subscribe_paired<N: PairedNotifier>(
        self: &Arc<Self>,
        range: VaRange,
        notifier: N,
        options: SubscribeOptions,
    ) -> Result<Subscription<N>, NotSubscribed<N>> {
        self.link(range, notifier, Some(N::invalidate_range_end), options)
    }

    fn link<N: Notifier>(
        self: &Arc<Self>,
        range: VaRange,
        notifier: N,
        end: Option<fn(&mut N, &Event)>,
        options: SubscribeOptions,
    ) -> Result<Subscription<N>, NotSubscribed<N>> {
        context::forbid_in_invalidate("subscribe");
        let mut no_locks = NoLocks::at_entry();
        let SubscribeOptions { owner, class, name, statistics } = options;
        let live = Arc::clone(&self.live);
        let settings = Settings { owner, class, name, statistics, live };
        let node = Arc::new(NodeOf::new(range, notifier, end, settings));
        match self.link_node(&mut no_locks, range, Arc::clone(&node) as Arc<dyn Node>) {
            Ok(()) => Ok(Subscription::new(Handle::new(Arc::clone(self), node))),
            Err(reason) => {
                let notifier =
                    node.take().expect("a node that was never linked keeps its notifier");
                Err(NotSubscribed { notifier, reason })
            }
        }
    }

    /// Puts `node` into the index, with memory that was allocated before the lock was taken.
    fn link_node(
        &self,
        no_locks: &mut NoLocks,
        range: VaRange,
        node: Arc<dyn Node>,
    ) -> Result<(), SubscribeError> {
        let mut growth: Option<Growth<Arc<dyn Node>>> = None;
        loop {
            let chunk = {
                let mut registry = self.registry.write(no_locks);
                if registry.phase != Phase::Live {
                    return Err(SubscribeError::Released);
                }
                if registry.index.len() >= self.limit {
                    return Err(SubscribeError::Limit);
                }
                if let Some(offered) = growth.take() {
                    growth = registry.index.grow(offered);
                }
                if !registry.index.is_full() {
                    let core = node.core();
                    if !mutant!("insert_without_count") {
                        core.raise(self.count_concerning(range, core));
                    }
                    if !registry.settled {
                        core.mark(UNSETTLED);
                    }
                    let node = Arc::clone(&node);
                    let key = registry.index.insert(range, node);
                    core.set_key(key);
                    // Relaxed: an announcer that reads the old value has entered the gate of its
                    // shard before, where `settle` finds it; see `Gate::enter`.
                    self.populated.store(true, Ordering::Relaxed);
                    break;
                }
                registry.index.next_growth()
            };
            // A growth that came too late, because another thread grew the index first, goes here.
            drop(growth.take());
            growth = Some(Growth::try_new(chunk).map_err(|full| match full {
                GrowthError::Limit => SubscribeError::Limit,
                GrowthError::OutOfMemory(_) => SubscribeError::OutOfMemory,
            })?);
        }
        Ok(())
    }

    /// Takes `node` out of the index. Says whether it was still in.
    pub(crate) fn unlink(&self, no_locks: &mut NoLocks, node: &dyn Node) -> bool {
        let mut registry = self.registry.write(no_locks);
        if node.core().has(UNLINKED) {
            return false;
        }
        node.core().mark(UNLINKED);
        let entry = registry.index.remove(node.core().key());
        self.note_population(registry.index.is_empty(), &mut registry.settled);
        drop(registry);
        // The index's reference goes here, with no lock held.
        drop(entry);
        true
    }

    /// Announcements need not be recorded when nobody is left to hear of them (acceptance A15).
    fn note_population(&self, is_empty: bool, settled: &mut bool) {
        if is_empty {
            // Relaxed: an announcer that reads the old value merely records itself.
            self.populated.store(false, Ordering::Relaxed);
            *settled = mutant!("settled_for_good") && *settled;
        }
    }

    /// Announces a change, and returns when no device uses the range any more.
    ///
    /// Every subscriber whose range overlaps that of `event`, other than those the
    /// [owner filter](Event::owned_by) spares, is told once: those of [`Class::Interval`] first,
    /// then those of [`Class::List`], each class in the order of their ranges; then all fences are
    /// waited for in the order of the calls. **The change may be made from the return until the
    /// guard is dropped**, and not outside.
    ///
    /// Must not be called from inside a callback, nor under a lock that a callback of any
    /// subscriber takes. Waits for subscribers' locks and fences, as long as they take. Costs one
    /// atomic increment where nobody is subscribed, and the guard one decrement.
    ///
    /// The guard stays on the thread that announced, so that a thread waiting for itself can be
    /// told so. Forgetting it is safe: the range then counts as changing for ever, and no read
    /// section on it begins, nor any at all if nobody was subscribed when it was made.
    #[must_use = "the change is over when the guard is dropped"]
    #[doc(alias = "mmu_notifier_invalidate_range_start")]
    #[inline]
    pub fn invalidate_range_start(&self, event: Event) -> RangeInvalidation<'_> {
        let event = event.blockable(true);
        let record = match self.start(&event) {
            Ok(record) => record,
            Err(WouldBlock) => unreachable!("a blockable announcement is never refused"),
        };
        RangeInvalidation { space: self, event, record, on_this_thread: PhantomData }
    }

    /// Announces a change without sleeping, or refuses.
    ///
    /// Calls [`Notifier::try_invalidate`] where
    /// [`invalidate_range_start`](Subscriptions::invalidate_range_start) calls
    /// [`Notifier::invalidate`]. The first subscriber of [`Class::Interval`] that refuses ends it;
    /// those of [`Class::List`] are all told (acceptance E13, X01). After a refusal everything is
    /// as if nothing had been announced: fences that were returned have been waited for, whoever
    /// hears of ends has heard of this one's, and read sections may begin.
    ///
    /// The end of an announcement, also of a refused one, takes the lock of each
    /// [`PairedNotifier`](crate::PairedNotifier) that heard its start, and waits for an
    /// [`Update`](crate::Update) of it that another thread holds.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`]: the change must not be made.
    #[doc(alias = "mmu_notifier_invalidate_range_start_nonblock")]
    pub fn try_invalidate_range_start(
        &self,
        event: Event,
    ) -> Result<RangeInvalidation<'_>, WouldBlock> {
        let event = event.blockable(false);
        let record = self.start(&event)?;
        Ok(RangeInvalidation { space: self, event, record, on_this_thread: PhantomData })
    }

    #[inline]
    fn start(&self, event: &Event) -> Result<Record, WouldBlock> {
        context::forbid_announcement();
        let shard = context::shard();
        if self.start_unrecorded(shard) {
            return Ok(Record::Unrecorded { shard });
        }
        self.start_recorded(shard, event)
    }

    fn start_recorded(&self, shard: usize, event: &Event) -> Result<Record, WouldBlock> {
        let mut no_locks = NoLocks::at_entry();
        let mut hits = Hits::new();
        let id = self.record(&mut no_locks, shard, event, &mut hits);
        #[cfg(mutant = "callback_under_the_registry_lock")]
        let registry = self.registry.read(&mut no_locks);
        let mut paired = Paired::new();
        let refused = deliver(&no_locks, event, &mut hits, Some(&mut paired));
        #[cfg(mutant = "callback_under_the_registry_lock")]
        drop(registry);
        if refused {
            if mutant!("refusal_without_ends") {
                paired.clear();
            }
            if !mutant!("refusal_leaves_the_range_changing") {
                self.end(shard, id, event, &paired);
            }
            return Err(WouldBlock);
        }
        Ok(Record::Recorded { shard, id, paired })
    }

    /// Counts an announcement that nobody is there to hear; the whole cost of an unused notifier.
    ///
    /// A subscriber that comes while it is under way hears nothing of it, and finds it by draining
    /// the gates; see [`settle`](Subscriptions::settle).
    #[inline]
    fn start_unrecorded(&self, shard: usize) -> bool {
        // Relaxed, both: a wrong "populated" costs a lock. A wrong "nobody" in the second load is
        // impossible once a settler has drained this gate: `Gate::enter` then acquired what the
        // settler released, and `populated` was set before.
        if self.populated.load(Ordering::Relaxed) {
            return false;
        }
        let gate = &self.shards[shard].unrecorded;
        if !mutant!("unrecorded_not_counted") {
            gate.enter();
        }
        if self.populated.load(Ordering::Relaxed) {
            gate.leave();
            return false;
        }
        context::remember_unrecorded(self.address());
        true
    }

    /// Records an announcement and pins everybody it concerns, in one step as seen by whoever
    /// changes the registry.
    fn record(&self, no_locks: &mut NoLocks, shard: usize, event: &Event, hits: &mut Hits) -> u64 {
        let active = &self.shards[shard].active;
        loop {
            let (wanted, full) = {
                let registry = self.registry.read(no_locks);
                let wanted = pin_overlapping(&registry.index, event.range(), hits, |node| {
                    !event.is_own_doing_of(node.core().owner)
                });
                let id = if wanted > hits.len() { None } else { active.push(*event) };
                if let Some(id) = id {
                    for hit in hits.iter() {
                        hit.pin.core().raise(1);
                    }
                    return id;
                }
                (wanted, wanted == hits.len())
            };
            if full {
                active.grow(no_locks);
            }
            make_room(hits, wanted);
        }
    }

    /// Ends a recorded announcement: tells those who hear of ends, then lets readers go on.
    fn end(&self, shard: usize, id: u64, event: &Event, paired: &Paired) {
        let mut no_locks = NoLocks::at_entry();
        for node in paired {
            let node = node.upgrade();
            let pin = node.and_then(|node| self.pin_if_linked(&mut no_locks, node));
            let Some(pin) = pin else { continue };
            pin.invalidate_range_end(&no_locks, event);
        }
        {
            let registry = self.registry.read(&mut no_locks);
            self.shards[shard].active.remove(id);
            registry.index.overlapping(event.range(), |_, _, node| {
                if !event.is_own_doing_of(node.core().owner) {
                    node.core().lower(1);
                }
            });
        }
    }

    /// Pins a node unless it has been unsubscribed or released.
    pub(crate) fn pin_if_linked(
        &self,
        no_locks: &mut NoLocks,
        node: Arc<dyn Node>,
    ) -> Option<Pin<dyn Node>> {
        let registry = self.registry.read(no_locks);
        if node.core().has(UNLINKED) {
            // This may be the last reference: it goes without the lock.
            drop(registry);
            return None;
        }
        let gate = Arc::clone(&node.core().gate);
        Some(Pin::new(node, gate))
    }

    /// Kills the address space: every device stops, every operation ends, every notifier is ended
    /// by [`Notifier::release`], and nobody can subscribe any more.
    ///
    /// In two passes (acceptance B01, D01, D08). First every subscriber is told of an
    /// [`EventKind::Release`] over everything, and from then on no read section begins or commits
    /// (D10). Then one subscription after the other is unlinked, its calls and
    /// [operations](Handle::begin_operation) are waited for, and its notifier ends by value, with
    /// no lock held: what its workers have under way may announce changes and complete (D02-D06).
    ///
    /// Returns when all of that is done, by this thread or by another that was at it first. Calling
    /// it again does nothing. Allocates nothing it needs to get to the end for fewer than nine
    /// subscriptions (A17).
    ///
    /// # Panics
    ///
    /// If called from inside a callback, where it would wait for itself.
    #[doc(alias = "mmu_notifier_release")]
    #[doc(alias = "exit_mmap")]
    pub fn release(&self) {
        self.release_until(None).expect("a wait without a deadline does not time out");
    }

    /// Does what [`release`](Subscriptions::release) does, until `deadline`.
    ///
    /// # Errors
    ///
    /// [`TimedOut`]: somebody's operation or callback has not ended; the `Debug` output of the
    /// `Subscriptions` names them. Every device has been told to stop, unless another thread is at
    /// the release and at that. Nothing is lost: call it again to go on.
    ///
    /// # Panics
    ///
    /// As [`release`](Subscriptions::release).
    pub fn release_deadline(&self, deadline: Instant) -> Result<(), TimedOut> {
        self.release_until(Some(deadline))
    }

    fn release_until(&self, deadline: Option<Instant>) -> Result<(), TimedOut> {
        assert!(
            !context::in_callback(),
            "mmu-notifier: release called from inside a callback would wait for itself"
        );
        let mut no_locks = NoLocks::at_entry();
        let Some(stopped) = self.begin_release(&mut no_locks, deadline)? else {
            return Ok(());
        };
        if !stopped && !mutant!("one_pass_release") {
            self.stop_all(&mut no_locks);
        }
        let result = self.end_all(&mut no_locks, deadline);
        let given_up = {
            let mut registry = self.registry.write(&mut no_locks);
            registry.phase = match result {
                Ok(()) => Phase::Dead,
                Err(TimedOut) => Phase::Releasing { active: false, stopped: true },
            };
            self.relink_given_up(&mut registry)
        };
        if let Some(node) = given_up {
            node.core().gate.queue.wake_all();
        }
        self.released.wake_all();
        result
    }

    /// Makes this thread the one that releases; returns whether the first pass is done already, or
    /// `None` when all is.
    fn begin_release(
        &self,
        no_locks: &mut NoLocks,
        deadline: Option<Instant>,
    ) -> Result<Option<bool>, TimedOut> {
        let mut mine = None;
        let over = || {
            let mut registry = self.registry.write(no_locks);
            let (over, next) = match registry.phase {
                Phase::Dead => (true, Phase::Dead),
                Phase::Live => {
                    mine = Some(false);
                    (true, Phase::Releasing { active: true, stopped: false })
                }
                Phase::Releasing { active: false, stopped } => {
                    mine = Some(stopped);
                    (true, Phase::Releasing { active: true, stopped })
                }
                phase @ Phase::Releasing { active: true, .. } => (false, phase),
            };
            registry.phase = next;
            over
        };
        self.released.wait_until(deadline, over, || ())?;
        Ok(mine)
    }

    /// The first pass of release. No announcement is recorded: its end would let readers in again.
    fn stop_all(&self, no_locks: &mut NoLocks) {
        let event = Event::new(EventKind::Release, VaRange::ALL);
        let mut hits = self.pin_all(no_locks);
        for hit in &hits {
            hit.pin.core().mark(CLOSED);
        }
        deliver(no_locks, &event, &mut hits, None);
    }

    /// Pins every subscription there is.
    fn pin_all(&self, no_locks: &mut NoLocks) -> Hits {
        let mut hits = Hits::new();
        loop {
            let wanted = {
                let registry = self.registry.read(no_locks);
                pin_overlapping(&registry.index, VaRange::ALL, &mut hits, |_| true)
            };
            if wanted == hits.len() {
                return hits;
            }
            make_room(&mut hits, wanted);
        }
    }

    /// The second pass of release.
    fn end_all(&self, no_locks: &mut NoLocks, deadline: Option<Instant>) -> Result<(), TimedOut> {
        while let Some(node) = self.unlink_next(no_locks) {
            node.core().gate.drain(deadline)?;
            if mutant!("release_under_the_registry_lock") {
                let mut second = NoLocks::at_entry();
                let _registry = self.registry.write(&mut second);
                node.release(no_locks);
            } else {
                node.release(no_locks);
            }
            let ended = self.registry.write(no_locks).releasing.take();
            drop(ended);
        }
        // Those of subscriptions that their owners have unlinked and not yet drained.
        if !mutant!("release_ignores_leavers") {
            for shard in &self.shards {
                shard.operations.drain(deadline)?;
            }
        }
        Ok(())
    }

    /// Unlinks a node for release to end, or returns the one that it was at.
    fn unlink_next(&self, no_locks: &mut NoLocks) -> Option<Arc<dyn Node>> {
        let mut registry = self.registry.write(no_locks);
        if registry.releasing.is_none() {
            let key = registry.index.first()?;
            let range = registry.index.range(key);
            let node = registry.index.remove(key);
            node.core().mark(UNLINKED);
            // An unlinked node counts no announcements: their ends will not find it.
            node.core().lower(self.count_concerning(range, node.core()));
            self.note_population(registry.index.is_empty(), &mut registry.settled);
            registry.releasing = Some((range, node));
        }
        registry.releasing.as_ref().map(|(_, node)| Arc::clone(node))
    }

    /// Puts the node that a release was at when its deadline passed back into the index, so that
    /// its owner can unsubscribe it although nobody calls release again.
    fn relink_given_up(&self, registry: &mut Registry) -> Option<Arc<dyn Node>> {
        if mutant!("release_gives_up_for_good") {
            return None;
        }
        let (range, node) = registry.releasing.take()?;
        // Its slot is still free: nobody subscribes to an address space that dies.
        let key = registry.index.insert(range, Arc::clone(&node));
        node.core().set_key(key);
        if !mutant!("relink_without_count") {
            node.core().raise(self.count_concerning(range, node.core()));
        }
        node.core().unmark(UNLINKED);
        // Relaxed: as in `link_node`.
        self.populated.store(true, Ordering::Relaxed);
        Some(node)
    }

    /// Finds the subscription of an `N` that holds `address`, and returns a counted handle to it;
    /// of several, the one whose range starts last.
    ///
    /// The handle may outlive the subscription; what is asked of it then fails with [`Released`]
    /// (acceptance, features F20: the lookup the kernel could not offer for lack of a safe
    /// lifetime).
    #[doc(alias = "mmu_interval_notifier_find")]
    pub fn find<N: Notifier>(self: &Arc<Self>, address: u64) -> Option<Handle<N>> {
        let mut no_locks = NoLocks::at_entry();
        let page = VaRange::from_bounds(address, address).expect("one address is a range");
        let mut found: Option<Arc<dyn Node>> = None;
        {
            let registry = self.registry.read(&mut no_locks);
            registry.index.overlapping(page, |_, _, node| {
                if node.notifier_type() == TypeId::of::<N>() {
                    // What is replaced here is linked, so this is not its last reference.
                    found = Some(Arc::clone(node));
                }
            });
        }
        let node = found?.into_any().downcast::<NodeOf<N>>().ok()?;
        Some(Handle::new(Arc::clone(self), node))
    }

    /// Returns the ranges of the subscriptions that share an address with `range`, in the order of
    /// their starts: who hears of a change there that is announced now.
    ///
    /// Who has ended a subscription, and has seen that return, does not find it here; who has begun
    /// one finds it.
    pub fn subscribed(&self, range: VaRange) -> Vec<VaRange> {
        let mut no_locks = NoLocks::at_entry();
        let mut found = Vec::new();
        loop {
            let mut wanted = 0;
            {
                // Nothing is allocated here: what there is no room for is only counted.
                let registry = self.registry.read(&mut no_locks);
                registry.index.overlapping(range, |_, of, _| {
                    wanted += 1;
                    if found.len() < found.capacity() {
                        found.push(of);
                    }
                });
            }
            if wanted == found.len() {
                return found;
            }
            found.clear();
            found.reserve(wanted);
        }
    }

    /// Returns how many subscriptions exist, those included that have ended and are still held: by
    /// a [`Handle`], or for a moment by a thread that looks whether they have ended. For leak
    /// checks (acceptance B06).
    pub fn live(&self) -> usize {
        Arc::strong_count(&self.live) - 1
    }

    /// Waits until no announcement is under way that began before anybody was subscribed and so was
    /// not recorded, on behalf of `node`. Says whether that took a sleep.
    ///
    /// `populated` was set when `node` was linked. An announcer that has not seen that entered its
    /// gate before we look, so we find it there; one that enters after we looked sees it.
    pub(crate) fn settle(
        &self,
        no_locks: &mut NoLocks,
        node: &dyn Node,
        deadline: Option<Instant>,
    ) -> Result<bool, TimedOut> {
        let mut slept = false;
        if !mutant!("no_settle") {
            for shard in &self.shards {
                slept |= shard.unrecorded.drain(deadline)?;
            }
        }
        let mut registry = self.registry.write(no_locks);
        if !node.core().has(UNLINKED) || mutant!("settler_speaks_for_the_next") {
            // The index has not been empty since, so this holds for whoever subscribes from now.
            registry.settled = true;
        }
        node.core().unmark(UNSETTLED);
        Ok(slept)
    }

    /// Moves `node` to another range, so that each event finds it at the one or at the other, and
    /// counts what is under way there. Says whether it was still linked.
    pub(crate) fn relink(&self, no_locks: &mut NoLocks, node: &dyn Node, new: VaRange) -> bool {
        let core = node.core();
        let mut registry = self.registry.write(no_locks);
        if core.has(UNLINKED) {
            return false;
        }
        // Not what the notifier was last told: a change of range may have come to nothing.
        let old = registry.index.range(core.key());
        registry.index.set_range(core.key(), new);
        if mutant!("resize_without_recount") {
            return true;
        }
        // The caller has raised the count, so it does not reach zero here.
        core.raise(self.count_concerning(new, core));
        core.lower(self.count_concerning(old, core));
        true
    }

    /// Counts the recorded announcements that concern a node at `range`. The registry lock is held
    /// for writing, so none comes or goes.
    fn count_concerning(&self, range: VaRange, core: &Core) -> u64 {
        let mut count = 0;
        self.for_each_active(|active| {
            count += u64::from(active.event.concerns(range, core.owner));
        });
        count
    }

    /// Returns the count of the operations that begin in a shard.
    pub(crate) fn operations(&self, shard: usize) -> &Gate {
        &self.shards[shard].operations
    }

    pub(crate) fn for_each_active(&self, mut f: impl FnMut(&Active)) {
        self.shards.iter().for_each(|shard| shard.active.for_each(&mut f));
    }

    /// Finds an announcement under way that concerns a subscription.
    pub(crate) fn find_active(
        &self,
        range: VaRange,
        owner: Option<Owner>,
        accept: impl Fn(&Active) -> bool,
    ) -> Option<Active> {
        self.shards.iter().find_map(|shard| shard.active.find(range, owner, &accept))
    }

    /// Collects what a dump shows: everybody pinned, so with no lock held.
    pub(crate) fn dump(&self, no_locks: &mut NoLocks) -> (Phase, Hits, Option<Arc<dyn Node>>) {
        let hits = self.pin_all(no_locks);
        let registry = self.registry.read(no_locks);
        let releasing = registry.releasing.as_ref().map(|(_, node)| Arc::clone(node));
        (registry.phase, hits, releasing)
    }

    /// Copies the announcements under way, as many as there were at first.
    pub(crate) fn list_active(&self) -> Vec<Active> {
        let mut wanted = 0;
        self.for_each_active(|_| wanted += 1);
        let mut list = Vec::with_capacity(wanted);
        self.for_each_active(|active| {
            if list.len() < wanted {
                list.push(*active);
            }
        });
        list
    }

    /// Counts the announcements under way that nobody was there to hear.
    pub(crate) fn count_unrecorded(&self) -> u64 {
        self.shards.iter().map(|shard| shard.unrecorded.count()).sum()
    }

    /// Returns what [`context`] remembers this space by.
    pub(crate) fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// Tells every one of `hits` of `event`, in the order of their classes, waits for the fences, and
/// lets go of them. Collects those who are to hear of the end, and returns whether somebody refused.
fn deliver(
    no_locks: &NoLocks,
    event: &Event,
    hits: &mut Hits,
    mut paired: Option<&mut Paired>,
) -> bool {
    if hits.iter().any(|hit| hit.pin.core().class != Class::default()) {
        hits.sort_by_key(|hit| hit.pin.core().class);
    }
    let mut refused = false;
    for hit in hits.iter_mut() {
        let core = hit.pin.core();
        if event.is_blockable() {
            hit.pending = hit.pin.invalidate(no_locks, event);
        } else {
            match hit.pin.try_invalidate(no_locks, event) {
                Ok(pending) => hit.pending = pending,
                Err(WouldBlock) => {
                    refused = true;
                    if core.class == Class::Interval {
                        break;
                    }
                    continue;
                }
            }
        }
        if core.paired
            && let Some(paired) = &mut paired
        {
            paired.push(Arc::downgrade(&hit.pin));
        }
    }
    // Whoever has stopped may unsubscribe without waiting for the others.
    hits.retain(|hit| !matches!(hit.pending, Pending::Over));
    for Hit { pin, pending, .. } in hits.drain(..) {
        pin.finish(no_locks, pending);
    }
    refused
}

/// Pins the nodes that overlap `range` and that `wanted` accepts, as far as `hits` has room without
/// allocating. Returns how many there are.
fn pin_overlapping(
    index: &Index<Arc<dyn Node>>,
    range: VaRange,
    hits: &mut Hits,
    wanted: impl Fn(&dyn Node) -> bool,
) -> usize {
    let mut count = 0;
    index.overlapping(range, |_, range, node| {
        if wanted(node.as_ref()) {
            count += 1;
            if hits.len() < hits.capacity() {
                let gate = Arc::clone(&node.core().gate);
                let pin = Pin::new(Arc::clone(node), gate);
                hits.push(Hit { range, pin, pending: Pending::Over });
            }
        }
    });
    count
}

/// Unpins everybody and makes room for `wanted`, with no lock held.
fn make_room(hits: &mut Hits, wanted: usize) {
    hits.clear();
    hits.reserve(wanted);
}

/// Those who heard of a start and are to hear of its end.
type Paired = SmallVec<[Weak<dyn Node>; 1]>;

/// A change that has been announced and is not over. Its drop ends it.
///
/// From the moment it exists no device uses the range. It does not keep anybody subscribed: who
/// unsubscribes while it lives hears of no end (acceptance X02).
#[must_use = "the change is over when this is dropped"]
#[doc(alias = "mmu_notifier_range")]
#[doc(alias = "mmu_notifier_invalidate_range_end")]
pub struct RangeInvalidation<'a> {
    space: &'a Subscriptions,
    event: Event,
    record: Record,
    on_this_thread: PhantomData<*const ()>,
}

enum Record {
    Unrecorded { shard: usize },
    Recorded { shard: usize, id: u64, paired: Paired },
}

impl RangeInvalidation<'_> {
    /// Returns what was announced.
    pub fn event(&self) -> &Event {
        &self.event
    }
}

impl Drop for RangeInvalidation<'_> {
    #[inline]
    fn drop(&mut self) {
        match &self.record {
            Record::Unrecorded { shard } => {
                context::forget_unrecorded(self.space.address());
                self.space.shards[*shard].unrecorded.leave();
            }
            Record::Recorded { shard, id, paired } => {
                self.space.end(*shard, *id, &self.event, paired);
            }
        }
    }
}

impl std::fmt::Debug for RangeInvalidation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RangeInvalidation").field("event", &self.event).finish_non_exhaustive()
    }
}
