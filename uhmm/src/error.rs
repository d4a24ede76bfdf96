//! What can go wrong, and with which page.

use mmu_notifier::Released;

use crate::entry::Access;
use crate::page::{Page, PageRange};

/// Why a page cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The address space has died, or the mirror has ended.
    #[error("the address space or its mirror has ended")]
    Released,
    /// Nothing is mapped there.
    #[error("nothing is mapped at {page}")]
    Hole {
        /// Where.
        page: Page,
    },
    /// The mapping does not allow the access.
    #[error("the mapping at {page} allows {allowed:?} and not {wanted:?}")]
    Denied {
        /// Where.
        page: Page,
        /// What was asked for.
        wanted: Access,
        /// What the mapping allows.
        allowed: Access,
    },
    /// The request goes beyond the range that the mirror was made for.
    #[error("the request for {request} is not within the mirror of {mirror}")]
    OutOfRange {
        /// What was asked for.
        request: PageRange,
        /// What is mirrored.
        mirror: PageRange,
    },
    /// The page cannot be brought home.
    #[error("{page} cannot be brought home: {reason}")]
    Stuck {
        /// Where.
        page: Page,
        /// Why.
        reason: StayReason,
    },
    /// Invalidations have collided with the request for as long as its budget allowed. Ask again,
    /// or for less.
    #[error(
        "invalidations kept colliding at {page} until the budget was spent ({collisions} times)"
    )]
    Collided {
        /// The first page of the batch that could not be committed.
        page: Page,
        /// How often it collided.
        collisions: u32,
    },
    /// The deadline passed.
    #[error("the deadline passed while waiting for {page}")]
    TimedOut {
        /// Where.
        page: Page,
    },
    /// The wait would be for the calling thread itself: it holds the page in a migration of its
    /// own, or is inside a callback.
    #[error("the calling thread would wait for itself at {page}")]
    SelfWait {
        /// Where.
        page: Page,
    },
    /// There is no system memory for the page.
    #[error("no system memory for {page}")]
    OutOfMemory {
        /// Where.
        page: Page,
    },
    /// The mapping has no page there: beyond the end of its file. A CPU would get SIGBUS.
    #[error("the file mapped at {page} ends before it")]
    EndOfFile {
        /// Where.
        page: Page,
    },
    /// The device could not copy the page home. It is still there, and nothing is lost; a later
    /// touch tries again.
    #[error("the device could not copy {page} home")]
    CopyFailed {
        /// Where.
        page: Page,
    },
    /// The page cannot be held exclusively.
    #[error("{page} cannot be held exclusively: {reason}")]
    NotExclusive {
        /// Where.
        page: Page,
        /// Why.
        reason: StayReason,
    },
}

impl From<Released> for FaultError {
    fn from(_: Released) -> FaultError {
        FaultError::Released
    }
}

impl FaultError {
    /// Tells whether it may have been read off a change that was under way.
    pub(crate) fn may_be_stale(&self) -> bool {
        matches!(
            self,
            FaultError::Hole { .. }
                | FaultError::Denied { .. }
                | FaultError::EndOfFile { .. }
                | FaultError::NotExclusive { .. }
        )
    }
}

/// A page, or block of pages, that was to be moved and stayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stayed {
    /// Which.
    pub pages: PageRange,
    /// Why.
    pub reason: StayReason,
}

/// Why a page stayed where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum StayReason {
    /// Nothing is mapped there.
    #[error("nothing is mapped there")]
    Hole,
    /// The mapping allows no access, so a page there is of no use to a device.
    #[error("the mapping allows no access")]
    Denied,
    /// It belongs to a file or to shared memory, which cannot be moved to devices.
    #[error("it belongs to a file or to shared memory")]
    FileBacked,
    /// Somebody uses its memory by reference.
    #[error("it is pinned")]
    Pinned,
    /// It is on its way already.
    #[error("it is in transit")]
    InTransit,
    /// A device holds it exclusively.
    #[error("a device holds it exclusively")]
    Exclusive,
    /// It was swapped out.
    #[error("it is swapped out")]
    SwappedOut,
    /// It is where it was to go.
    #[error("it is there already")]
    AlreadyThere,
    /// It is not where it was to be taken from.
    #[error("it is elsewhere")]
    Elsewhere,
    /// Its mapping changed while it was looked up.
    #[error("its mapping changed meanwhile")]
    Changed,
    /// Somebody else works on it.
    #[error("it is busy")]
    Busy,
    /// It is part of a large page that could not be split.
    #[error("it is part of a large page that cannot be split")]
    LargePage,
    /// More than one address space or address uses it.
    #[error("it is shared")]
    Shared,
    /// The device had no memory for it, and could not evict any.
    #[error("the device has no memory for it")]
    OutOfDeviceMemory,
    /// There was no system memory for it.
    #[error("there is no system memory for it")]
    OutOfSystemMemory,
    /// The device could not copy it.
    #[error("the device could not copy it")]
    CopyFailed,
    /// It was unmapped on the way.
    #[error("it was unmapped meanwhile")]
    Gone,
    /// A policy kept it.
    #[error("a policy kept it")]
    Policy,
    /// It may hold what bringing it home needs: were it away, a touch of it could wait for itself.
    #[error("it may hold what bringing it home needs")]
    Reserved,
    /// It is locked in memory (`mlock(2)`).
    #[error("it is locked in memory")]
    Locked,
    /// Its mapping allows no stores, and the backend can move such a page only where changes are
    /// [announced](crate::Coherence::Announced).
    #[error("its mapping allows no stores, and moving it takes announced changes")]
    ReadOnly,
    /// Somebody else handles its faults, so nobody here would hear of a touch of it: the program's
    /// own `userfaultfd(2)`.
    #[error("its faults are handled by somebody else")]
    Handled,
    /// The system does not allow it to be moved.
    #[error("the system does not allow it")]
    Unsupported,
}
