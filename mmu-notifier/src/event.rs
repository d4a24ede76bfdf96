//! What is announced: a change to a range of an address space.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::VaRange;

/// A change to a range of an address space, as its subscribers hear of it.
///
/// Built by whoever changes the address space, and handed to
/// [`invalidate_range_start`](crate::Subscriptions::invalidate_range_start).
///
/// ```
/// use mmu_notifier::{Event, EventKind, Owner, VaRange};
///
/// let range = VaRange::new(0x1000, 0x1000)?;
/// let gpu = Owner::new();
/// let event = Event::new(EventKind::Migrate, range).owned_by(gpu);
/// assert_eq!(event.owner(), Some(gpu));
/// # Ok::<(), mmu_notifier::VaRangeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    range: VaRange,
    kind: EventKind,
    owner: Option<Owner>,
    blockable: bool,
}

/// Why a range is invalidated. The names and meanings are those of the kernel's
/// `enum mmu_notifier_event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// The mapping goes away, or moves: munmap, mremap.
    #[doc(alias = "MMU_NOTIFY_UNMAP")]
    Unmap,
    /// The mapping stays and its pages are replaced or dropped: discard, copy on write, reclaim.
    #[doc(alias = "MMU_NOTIFY_CLEAR")]
    Clear,
    /// The protection of the whole mapping changes: mprotect.
    #[doc(alias = "MMU_NOTIFY_PROTECTION_VMA")]
    ProtectionVma,
    /// The protection of single pages changes, that of their mapping does not: fork, write-protect.
    #[doc(alias = "MMU_NOTIFY_PROTECTION_PAGE")]
    ProtectionPage,
    /// Writes are to be noticed again: the soft-dirty bits are cleared.
    #[doc(alias = "MMU_NOTIFY_SOFT_DIRTY")]
    SoftDirty,
    /// The subscription's claim on the range ends: the address space dies, the subscription is
    /// ended, or [`set_range`](crate::Subscription::set_range) gives these addresses up.
    #[doc(alias = "MMU_NOTIFY_RELEASE")]
    Release,
    /// Pages move to or between devices. Its [owner](Event::owner) may ignore it (X07).
    #[doc(alias = "MMU_NOTIFY_MIGRATE")]
    Migrate,
    /// A device takes pages for exclusive access. Its [owner](Event::owner) may ignore it (X07).
    #[doc(alias = "MMU_NOTIFY_EXCLUSIVE")]
    Exclusive,
}

/// The identity of whoever causes an event, so that its own subscriptions need not hear of it.
///
/// Every call of [`Owner::new`] gives another one; copies are the same owner.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(NonZeroU64);

/// The order in which subscribers hear of one event (acceptance X06).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Subscribers of a range: told first, and the first refusal of a non-blockable event ends it.
    #[default]
    Interval,
    /// Subscribers of an address space as a whole: told after every [`Class::Interval`] one. All of
    /// them hear of a non-blockable event even where one refuses (X01).
    List,
}

impl Event {
    /// Makes an event that has no owner.
    pub const fn new(kind: EventKind, range: VaRange) -> Event {
        Event { range, kind, owner: None, blockable: true }
    }

    /// Says who causes the event.
    ///
    /// Subscriptions of the same owner do not hear of [`EventKind::Migrate`] and
    /// [`EventKind::Exclusive`], and their read sections go on; every other kind reaches them as it
    /// reaches all (acceptance X07). An announcement made while nobody is subscribed has no owner.
    #[must_use]
    pub const fn owned_by(self, owner: Owner) -> Event {
        Event { owner: Some(owner), ..self }
    }

    /// Returns the addresses that change.
    pub const fn range(&self) -> VaRange {
        self.range
    }

    /// Returns what happens to them.
    pub const fn kind(&self) -> EventKind {
        self.kind
    }

    /// Returns who causes it.
    pub const fn owner(&self) -> Option<Owner> {
        self.owner
    }

    /// Tells whether the subscriber may sleep. `false` in
    /// [`try_invalidate`](crate::Notifier::try_invalidate), and for the end of such an event.
    pub const fn is_blockable(&self) -> bool {
        self.blockable
    }

    pub(crate) const fn blockable(self, blockable: bool) -> Event {
        Event { blockable, ..self }
    }

    /// Tells whether a subscription to `range` by `owner` is to hear of this event.
    pub(crate) fn concerns(&self, range: VaRange, owner: Option<Owner>) -> bool {
        self.range.overlaps(range) && !self.is_own_doing_of(owner)
    }

    /// The owner filter (X07).
    pub(crate) fn is_own_doing_of(&self, owner: Option<Owner>) -> bool {
        matches!(self.kind, EventKind::Migrate | EventKind::Exclusive)
            && self.owner.is_some()
            && self.owner == owner
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.range)?;
        if let Some(owner) = self.owner {
            write!(f, " by {owner:?}")?;
        }
        if !self.blockable {
            write!(f, " (non-blockable)")?;
        }
        Ok(())
    }
}

impl Owner {
    /// Makes an owner unlike any other in this process.
    #[expect(clippy::new_without_default, reason = "no two owners are alike, so none is a default")]
    pub fn new() -> Owner {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Relaxed: the counter guards nothing, each caller just takes a different number.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Owner(NonZeroU64::new(number).expect("2^64 owners are never made"))
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "owner {}", self.0)
    }
}
