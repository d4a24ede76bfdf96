//! An address space: who uses it, who merely remembers it, and its end.
//!
//! There are two counts, and each is a type. An [`AddressSpace`] is a user, the kernel's
//! `mm_users`: while one exists the memory exists, and when the last is dropped the address space
//! dies. An [`Mm`] is a reference to the bookkeeping, the kernel's `mm_count`: it keeps nothing
//! alive, and every operation that begins from one first asks whether there are users left
//! ([`Mm::users`], `mmget_not_zero`). A mirror holds an [`Mm`], so no device keeps a dead process's
//! memory (acceptance A06, A08, B06).
//!
//! # Death
//!
//! The last drop releases the notifiers first: every device has stopped, every operation has
//! ended, and every mirror has been released, in this order (acceptance D11). Only then is the
//! memory taken apart. Whoever drops the last user inside a callback of a notifier cannot wait for
//! that there; the death then runs on a thread of its own (regression 40).

use std::fmt;
use std::num::NonZeroU64;
use std::sync::{Arc, Weak};
use std::time::Duration;

use mmu_notifier::{Event, EventKind};

use crate::backend::{Backend, Coherence};
use crate::entry::PageEntry;
use crate::page::PageRange;
use crate::primitive::{Mutex, lock, thread};
use crate::statistics::{SpaceCounters, SpaceStatistics};

/// A user of an address space: while one exists, so does the memory. The drop of the last ends it.
#[derive(Clone)]
#[doc(alias = "mm_users")]
#[doc(alias = "mmget")]
pub struct AddressSpace {
    users: Arc<Users>,
}

/// A reference to an address space that may be dead.
#[derive(Clone)]
#[doc(alias = "mm_count")]
#[doc(alias = "mmgrab")]
pub struct Mm {
    inner: Arc<Inner>,
}

struct Inner {
    backend: Arc<dyn Backend>,
    users: Weak<Users>,
    counters: SpaceCounters,
}

struct Users {
    mm: Mm,
}

/// Says that an address space has died. Only this crate can make one, and makes one for each death.
#[derive(Debug)]
pub struct Death(());

/// The identity of an address space, also after its death.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(NonZeroU64);

impl AddressSpace {
    /// Makes the address space that `backend` provides, with one user. For backends: each is made
    /// into one address space, once.
    pub fn new(backend: Arc<dyn Backend>) -> AddressSpace {
        let users = Arc::new_cyclic(|users| {
            let inner = Inner { backend, users: Weak::clone(users), counters: Default::default() };
            Users { mm: Mm { inner: Arc::new(inner) } }
        });
        AddressSpace { users }
    }

    /// Returns the reference that may outlive the users.
    pub fn mm(&self) -> &Mm {
        &self.users.mm
    }

    /// Returns what provides the address space. Its [notifiers](Backend::notifiers) are there to
    /// subscribe and to announce; they are released by the last user's drop and by nobody else.
    pub fn backend(&self) -> &dyn Backend {
        &*self.mm().inner.backend
    }

    /// Announces a change of `range`, makes it, and ends the announcement: for changes that the
    /// caller makes itself, and that the backend does not announce.
    ///
    /// When `f` begins, no device uses the range.
    pub fn change<R>(&self, range: PageRange, kind: EventKind, f: impl FnOnce() -> R) -> R {
        let event = Event::new(kind, range.va_range());
        let _announced = self.backend().notifiers().invalidate_range_start(event);
        f()
    }

    /// Looks at the pages of `range` without faulting: entry `i` is page `i`.
    ///
    /// What it says was true at one moment per page. To let a device use it takes a
    /// [`range_fault`](crate::MirrorHandle::range_fault).
    pub fn snapshot(&self, range: PageRange) -> Vec<PageEntry> {
        let mut entries = Vec::with_capacity(range.len());
        self.backend().snapshot(range, &mut entries);
        assert_eq!(entries.len(), range.len(), "a backend's snapshot has one entry a page");
        entries
    }
}

impl Mm {
    /// Becomes a user, if there is one left.
    #[doc(alias = "mmget_not_zero")]
    pub fn users(&self) -> Option<AddressSpace> {
        self.inner.users.upgrade().map(|users| AddressSpace { users })
    }

    /// Returns the identity of the address space.
    pub fn id(&self) -> SpaceId {
        self.inner.backend.id()
    }

    /// Returns how changes to it become known.
    pub fn coherence(&self) -> Coherence {
        self.inner.backend.coherence()
    }

    /// Returns what happened to it so far.
    pub fn statistics(&self) -> SpaceStatistics {
        self.inner.counters.snapshot()
    }

    /// Becomes a user for the time of an operation of a device.
    pub(crate) fn enter(&self) -> Option<User> {
        self.users().map(|space| User(Some(space)))
    }

    /// Returns what provided it, and still does if it lives.
    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.inner.backend
    }

    pub(crate) fn counters(&self) -> &SpaceCounters {
        &self.inner.counters
    }

    fn die(&self) {
        tracing::debug!(target: "uhmm", space = ?self.id(), "release");
        self.inner.backend.notifiers().release();
        self.inner.backend.exit(Death(()));
    }
}

/// A user for the time of an operation that a device makes.
///
/// If it turns out to be the last, the death runs on a thread of its own: it waits for the
/// device's operations and its release, and the calling thread may be what those wait for.
#[doc(alias = "mmput_async")]
pub(crate) struct User(Option<AddressSpace>);

impl std::ops::Deref for User {
    type Target = AddressSpace;

    fn deref(&self) -> &AddressSpace {
        self.0.as_ref().expect("a user is there until it is dropped")
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if let Some(users) = self.0.take().and_then(|space| Arc::into_inner(space.users)) {
            elsewhere(users);
        }
    }
}

impl Drop for Users {
    fn drop(&mut self) {
        if mmu_notifier::in_callback() {
            elsewhere(Users { mm: self.mm.clone() });
        } else {
            self.mm.die();
        }
    }
}

/// Drops the last user on a thread of its own.
///
/// A system that has no thread to give is asked again for a while. The last resort is the calling
/// thread: the memory of a dead process must not stay for ever (acceptance A17).
fn elsewhere(users: Users) {
    const TRIES: u32 = 100;
    let mut tries = 0;
    let slot = Arc::new(Mutex::new(Some(users)));
    // In a callback there is no last resort.
    while tries < TRIES || mmu_notifier::in_callback() {
        tries += 1;
        let users = Arc::clone(&slot);
        let builder = thread::Builder::new().name("uhmm-exit".to_owned());
        let body = move || {
            let users = lock(&users).take();
            drop(users);
        };
        if builder.spawn(body).is_ok() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    tracing::warn!(target: "uhmm", "no thread for the end of an address space: it ends here");
    let users = lock(&slot).take();
    drop(users);
}

impl SpaceId {
    /// Makes an identity unlike any other in this process.
    #[expect(clippy::new_without_default, reason = "no two are alike, so none is a default")]
    pub fn new() -> SpaceId {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Relaxed: the counter guards nothing, each caller just takes a different number.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        SpaceId(NonZeroU64::new(number).expect("2^64 address spaces are never made"))
    }
}

impl fmt::Debug for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "space {}", self.0)
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let users = Arc::strong_count(&self.users);
        f.debug_struct("AddressSpace").field("id", &self.mm().id()).field("users", &users).finish()
    }
}

impl fmt::Debug for Mm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let users = self.inner.users.strong_count();
        f.debug_struct("Mm").field("id", &self.id()).field("users", &users).finish()
    }
}
