//! Exclusive access: a device's atomic operations on system memory, with the CPUs held off.

use std::fmt;
use std::time::Instant;

use crate::device::Device;
use crate::error::FaultError;
use crate::fault::RangeFault;
use crate::mirror::MirrorHandle;
use crate::page::PageRange;

/// Pages that a device holds exclusively, or has in its own memory: what it does there, no CPU and
/// no other device comes between.
///
/// The hold on a page ends when a CPU or another device touches it, when it is unmapped, or when this
/// is dropped, whichever is first. The device hears of it as of any other change, through
/// [`Device::invalidate`], before whoever ends it goes on: a read-modify-write operation is
/// therefore whole or faults. So a hold is no lock on the CPUs, which are never made to wait for a
/// device's program; ask [`is_held`](Exclusive::is_held), or let the device fault and take it again.
///
/// Holds of the same device on the same pages are one: the first drop ends it. So is the hold of a
/// mirror that ends: the device has nothing translated any more, and the next touch frees the page.
///
/// Dropping it announces the end to the device, so it must not be dropped in a callback, nor in
/// [`Device::map`].
#[must_use = "dropping the hold ends it"]
#[doc(alias = "make_device_exclusive")]
pub struct Exclusive<'m, D: Device> {
    mirror: &'m MirrorHandle<D>,
    range: PageRange,
}

impl<D: Device> MirrorHandle<D> {
    /// Takes the pages of `range` for atomic operations of the device, and enters them in its page
    /// table with [`Access::Atomic`](crate::Access::Atomic).
    ///
    /// # Errors
    ///
    /// As [`range_fault`](MirrorHandle::range_fault), and
    /// [`FaultError::NotExclusive`] for pages that cannot be held: those of files or of shared
    /// memory, shared after a fork by more than one mapping that cannot be broken, or pinned. No
    /// page of the range is held then.
    pub fn exclusive(&self, range: PageRange) -> Result<Exclusive<'_, D>, FaultError> {
        self.exclusive_within(&RangeFault::atomic(range))
    }

    /// Does what [`exclusive`](MirrorHandle::exclusive) does, until `deadline`.
    ///
    /// # Errors
    ///
    /// As [`exclusive`](MirrorHandle::exclusive).
    pub fn exclusive_deadline(
        &self,
        range: PageRange,
        deadline: Instant,
    ) -> Result<Exclusive<'_, D>, FaultError> {
        self.exclusive_within(&RangeFault::atomic(range).deadline(deadline))
    }

    fn exclusive_within(&self, request: &RangeFault<'_>) -> Result<Exclusive<'_, D>, FaultError> {
        self.check_range(request.range())?;
        // Made first, so that a failure half-way gives back what was taken.
        let hold = Exclusive { mirror: self, range: request.range() };
        self.range_fault(request)?;
        Ok(hold)
    }
}

impl<D: Device> Exclusive<'_, D> {
    /// Returns the pages.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Tells whether the device still holds every page. It may have lost one by the time this
    /// returns.
    pub fn is_held(&self) -> bool {
        let Ok(space) = self.mirror.enter(self.range.first()) else { return false };
        let owner = self.mirror.owner;
        let entries = space.snapshot(self.range);
        entries.iter().all(|entry| entry.satisfies(crate::Access::Atomic, owner))
    }
}

impl<D: Device> Drop for Exclusive<'_, D> {
    fn drop(&mut self) {
        // Without users there is nobody left to hold off.
        if let Some(space) = self.mirror.mm.enter() {
            space.backend().end_exclusive(self.range, self.mirror.owner);
        }
    }
}

impl<D: Device> fmt::Debug for Exclusive<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exclusive hold of {} by {:?}", self.range, self.mirror.owner)
    }
}
