//! Who is subscribed to what, and which changes are under way.
//!
//! # The lock
//!
//! Announcers only read the registry, and each does so under its own shard of one reader-writer
//! lock: they share no cache line with one another. Whoever changes the registry (subscribe,
//! unsubscribe, a new range, release) takes every shard, in a fixed order, each once. This is
//! `mm_take_all_locks()` with a bounded number of locks (acceptance A01, A11, A12).
//!
//! Under it, in either mode, no callback runs, nothing sleeps, and the allocator is neither asked
//! for memory nor given any: in a process whose `munmap` is announced, `free` may be an
//! announcement. The first is a compile error by [`NoLocks`]; the last is a test.
//!
//! # Invariants, whenever nobody holds the lock
//!
//! 1. A node is in the index if and only if [`UNLINKED`](crate::node::UNLINKED) is not set.
//! 2. A linked node's count of announcements is the number of recorded announcements that concern
//!    it, plus one while its range is being changed.
//! 3. The index is empty if and only if `Subscriptions::populated` is false.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::VaRange;
use crate::context;
use crate::event::Event;
use crate::index::Index;
use crate::node::Node;
use crate::primitive::{Mutex, RegistryRwLock};

/// The proof that the holder has no registry lock.
///
/// A registry guard borrows it for as long as it lives, and everything that calls out demands it,
/// so a callback under the registry lock does not compile (acceptance D01). One is made on entry to
/// the crate, and only there; when it goes, on whatever way out, what the thread dropped inside the
/// callbacks of this entry is ended.
pub(crate) struct NoLocks(PhantomData<()>);

impl NoLocks {
    pub(crate) fn at_entry() -> NoLocks {
        debug_assert!(!context::holds_registry_lock(), "the registry lock is never held on entry");
        NoLocks(PhantomData)
    }
}

impl Drop for NoLocks {
    #[inline]
    fn drop(&mut self) {
        context::finish_deferred();
    }
}

/// How far the address space is on its way to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Registration is possible.
    Live,
    /// Release is under way, or was given up at a deadline and waits to be called again.
    Releasing {
        /// Some thread is at it right now.
        active: bool,
        /// Every device has been told to stop.
        stopped: bool,
    },
    /// Release has returned.
    Dead,
}

/// What the registry lock protects.
pub(crate) struct Registry {
    pub(crate) index: Index<Arc<dyn Node>>,
    pub(crate) phase: Phase,
    /// No announcement that began before the index was populated is still unrecorded.
    pub(crate) settled: bool,
    /// The node that release has unlinked and not yet ended, and its range.
    pub(crate) releasing: Option<(VaRange, Arc<dyn Node>)>,
}

/// The registry under its lock.
pub(crate) struct RegistryLock(RegistryRwLock<Registry>);

impl RegistryLock {
    pub(crate) fn new() -> RegistryLock {
        RegistryLock(RegistryRwLock::new(Registry {
            index: Index::new(),
            phase: Phase::Live,
            settled: false,
            releasing: None,
        }))
    }

    /// Takes the lock to look and to count in atomics.
    pub(crate) fn read<'a>(&'a self, _: &'a mut NoLocks) -> impl Deref<Target = Registry> + 'a {
        let guard = self.0.read().expect("nothing that can panic runs under the registry lock");
        context::count_registry_lock(1);
        Counted(guard)
    }

    /// Takes the lock to change the registry.
    pub(crate) fn write<'a>(&'a self, _: &'a mut NoLocks) -> impl DerefMut<Target = Registry> + 'a {
        let guard = self.0.write().expect("nothing that can panic runs under the registry lock");
        context::count_registry_lock(1);
        Counted(guard)
    }
}

/// A guard that tells [`context`] when it goes.
struct Counted<G>(G);

impl<G: Deref> Deref for Counted<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.0
    }
}

impl<G: DerefMut> DerefMut for Counted<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.0
    }
}

impl<G> Drop for Counted<G> {
    fn drop(&mut self) {
        context::count_registry_lock(-1);
    }
}

/// An announcement that has started and not ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Active {
    id: u64,
    pub(crate) event: Event,
    /// The announcing thread, as [`context::thread_number`] counts.
    pub(crate) thread: u64,
}

/// The announcements under way that began in one shard.
pub(crate) struct ActiveList(Mutex<Entries>);

struct Entries {
    next: u64,
    list: Vec<Active>,
}

/// How many announcements of one shard are under way before its list has to grow.
const ACTIVE_AT_FIRST: usize = 8;

impl ActiveList {
    pub(crate) fn new() -> ActiveList {
        ActiveList(Mutex::new(Entries { next: 0, list: Vec::with_capacity(ACTIVE_AT_FIRST) }))
    }

    /// Records `event`, unless the list has to [`grow`](ActiveList::grow) first.
    pub(crate) fn push(&self, event: Event) -> Option<u64> {
        let mut entries = self.lock();
        if entries.list.len() == entries.list.capacity() {
            return None;
        }
        let id = entries.next;
        entries.next += 1;
        entries.list.push(Active { id, event, thread: context::thread_number() });
        Some(id)
    }

    /// Makes room. Allocates, so the caller holds no lock.
    pub(crate) fn grow(&self, _: &NoLocks) {
        let wanted = self.lock().list.len().max(ACTIVE_AT_FIRST) * 2;
        let mut larger = Vec::with_capacity(wanted);
        {
            let entries = &mut *self.lock();
            if entries.list.len() < wanted {
                larger.append(&mut entries.list);
                std::mem::swap(&mut larger, &mut entries.list);
            }
        }
        // The smaller list goes here, with no lock held.
    }

    /// Strikes out what `push` recorded.
    pub(crate) fn remove(&self, id: u64) {
        let mut entries = self.lock();
        let position = entries.list.iter().rposition(|active| active.id == id);
        let position = position.expect("an announcement is recorded until it ends");
        entries.list.swap_remove(position);
    }

    pub(crate) fn for_each(&self, f: impl FnMut(&Active)) {
        self.lock().list.iter().for_each(f);
    }

    /// Returns an announcement that concerns a subscription, if there is one that `f` accepts.
    pub(crate) fn find(
        &self,
        range: VaRange,
        owner: Option<crate::Owner>,
        f: impl Fn(&Active) -> bool,
    ) -> Option<Active> {
        let entries = self.lock();
        entries.list.iter().find(|a| a.event.concerns(range, owner) && f(a)).copied()
    }

    fn lock(&self) -> impl DerefMut<Target = Entries> + '_ {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}
