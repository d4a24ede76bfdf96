//! A device's view of an address space, and its lifetime.
//!
//! The subscription inside a [`Mirror`] owns the device's page table together with the lock that
//! invalidations take, so the two ways to the table are an invalidation and the commit of a read
//! section. There is no third, and nothing for a driver to get wrong (acceptance E02).
//!
//! # The order of an end
//!
//! Whether the owner unregisters or the address space dies, three things happen in this order
//! (acceptance D11):
//!
//! 1. *Stop*: the device is told of an [`EventKind::Release`](mmu_notifier::EventKind::Release)
//!    over the whole range, its fence is waited for, and from here every fault is refused.
//! 2. *Drain*: the operations under way, which are faults, run to their ends.
//! 3. *Kill*: the page table is handed back to whoever unregisters, or to [`Device::release`] where
//!    the address space died.
//!
//! An operation is a user of the address space while it runs, so death begins only when no
//! operation is left to begin one. If an operation turns out to have been the last user, the death
//! runs on a thread of its own: it waits for the device, and the operation's thread may be the
//! device's.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use mmu_notifier::{
    Event, Handle, Notifier, Operation, Owner, Released, SubscribeError, SubscribeOptions,
    Subscription, UnsubscribeError, WouldBlock,
};

use crate::address_space::{AddressSpace, Mm, User};
use crate::device::Device;
use crate::error::FaultError;
use crate::page::{Page, PageRange};
use crate::pagemap::DevicePagemap;

/// A device that mirrors a range of an address space. Owning it is being registered.
///
/// It dereferences to a [`MirrorHandle`], which has what any thread may do with the mirror. Its drop
/// does what [`unregister`](Mirror::unregister) does, and drops the page table.
#[must_use = "dropping a mirror ends it"]
#[doc(alias = "hmm_mirror")]
pub struct Mirror<D: Device> {
    // Ends before the backend is told that it has.
    subscription: Subscription<MirrorNotifier<D>>,
    handle: MirrorHandle<D>,
    ended: Ended,
}

/// A counted reference to a mirror: what a fault handler or a worker thread holds.
///
/// It keeps neither the mirror nor the address space alive; when either has ended everything fails
/// with [`FaultError::Released`](crate::FaultError::Released).
pub struct MirrorHandle<D: Device> {
    pub(crate) notifier: Handle<MirrorNotifier<D>>,
    pub(crate) mm: Mm,
    pub(crate) device: Arc<D>,
    pub(crate) owner: Owner,
    pub(crate) pagemap: Option<Arc<DevicePagemap>>,
    range: PageRange,
}

/// The page table of a mirror, and whom to tell of changes.
pub(crate) struct MirrorNotifier<D: Device> {
    pub(crate) device: Arc<D>,
    pub(crate) table: D::PageTable,
    mm: Mm,
}

/// Tells the backend, by its drop, that a mirror has ended.
struct Ended {
    mm: Mm,
    range: PageRange,
}

/// A mirror that has not ended yet. Drop it to wait, or try again.
#[derive(thiserror::Error)]
#[error("the mirror of {} has not ended: {reason}", mirror.range())]
pub struct MirrorUnfinished<D: Device> {
    /// The mirror. Its device has stopped, unless the reason is a self-wait.
    pub mirror: Mirror<D>,
    /// What stands in the way.
    #[source]
    pub reason: UnsubscribeError,
}

impl AddressSpace {
    /// Makes `device` mirror `range`. Nothing is translated yet.
    ///
    /// # Errors
    ///
    /// [`SubscribeError`]. Nothing was changed.
    pub fn mirror<D: Device>(
        &self,
        device: &Arc<D>,
        range: PageRange,
    ) -> Result<Mirror<D>, SubscribeError> {
        self.register(device, range, None)
    }

    /// Makes `device` mirror `range`, with `pagemap` as the device's own memory: pages there are
    /// mapped where they are, and [`handle_fault`](MirrorHandle::handle_fault) moves pages to it.
    ///
    /// It must be memory that the device itself can reach: it will be given frames of it.
    ///
    /// # Errors
    ///
    /// As [`mirror`](AddressSpace::mirror).
    pub fn mirror_with<D: Device>(
        &self,
        device: &Arc<D>,
        range: PageRange,
        pagemap: &Arc<DevicePagemap>,
    ) -> Result<Mirror<D>, SubscribeError> {
        self.register(device, range, Some(Arc::clone(pagemap)))
    }

    fn register<D: Device>(
        &self,
        device: &Arc<D>,
        range: PageRange,
        pagemap: Option<Arc<DevicePagemap>>,
    ) -> Result<Mirror<D>, SubscribeError> {
        let owner = pagemap.as_ref().map_or_else(Owner::new, |pagemap| pagemap.owner());
        let mm = self.mm().clone();
        let table = device.page_table(range, &self.backend().memory());
        let notifier = MirrorNotifier { device: Arc::clone(device), table, mm: mm.clone() };
        let options = SubscribeOptions::new().owner(owner).statistics();
        let subscription = self
            .backend()
            .notifiers()
            .subscribe_with(range.va_range(), notifier, options)
            .map_err(|refused| refused.reason)?;
        let ended = Ended { mm: mm.clone(), range };
        let handle = MirrorHandle {
            notifier: Handle::clone(&subscription),
            mm,
            device: Arc::clone(device),
            owner,
            pagemap,
            range,
        };
        tracing::debug!(target: "uhmm", space = ?handle.mm.id(), %range, ?owner, "mirror");
        Ok(Mirror { subscription, handle, ended })
    }
}

impl<D: Device> Mirror<D> {
    /// Ends the mirror and hands its page table back; `None` where the address space died first:
    /// then [`Device::release`] has run, and has returned.
    ///
    /// On return the device uses nothing of the range, no call on it is running for this mirror and
    /// none will come (acceptance C03, C04, C06). Pages in the device's memory stay there: they
    /// belong to the address space, and come home when they are touched or evicted.
    ///
    /// # Panics
    ///
    /// If called from inside a callback, where it would wait for itself. Drop the mirror instead.
    pub fn unregister(self) -> Option<D::PageTable> {
        self.subscription.unsubscribe().map(|notifier| notifier.table)
    }

    /// Does what [`unregister`](Mirror::unregister) does, until `deadline`.
    ///
    /// # Errors
    ///
    /// [`MirrorUnfinished`], with the mirror.
    pub fn unregister_deadline(
        self,
        deadline: Instant,
    ) -> Result<Option<D::PageTable>, MirrorUnfinished<D>> {
        let Mirror { subscription, handle, ended } = self;
        match subscription.unsubscribe_deadline(deadline) {
            Ok(notifier) => Ok(notifier.map(|notifier| notifier.table)),
            Err(unfinished) => Err(MirrorUnfinished {
                mirror: Mirror { subscription: unfinished.subscription, handle, ended },
                reason: unfinished.reason,
            }),
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.mm.backend().mirror_ended(self.range);
    }
}

impl<D: Device> Deref for Mirror<D> {
    type Target = MirrorHandle<D>;

    fn deref(&self) -> &MirrorHandle<D> {
        &self.handle
    }
}

impl<D: Device> MirrorHandle<D> {
    /// Returns the range that is mirrored.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Returns the address space, which may be dead.
    pub fn mm(&self) -> &Mm {
        &self.mm
    }

    /// Returns the device.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// Returns the device's own memory, if the mirror was made with one.
    pub fn pagemap(&self) -> Option<&Arc<DevicePagemap>> {
        self.pagemap.as_ref()
    }

    /// Returns by whom the device's own memory, migrations and exclusive holds are known.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Returns how often the mirror was invalidated, in vain, and collided with.
    pub fn statistics(&self) -> mmu_notifier::Statistics {
        self.notifier.statistics().expect("mirrors are subscribed with statistics")
    }

    /// Looks at the page table, under the mirror's lock. `f` must not fault, migrate, or wait.
    ///
    /// # Errors
    ///
    /// [`Released`]: the mirror has ended.
    pub fn inspect<R>(&self, f: impl FnOnce(&D::PageTable) -> R) -> Result<R, Released> {
        self.notifier.inspect(|notifier| f(&notifier.table))
    }

    /// Begins an operation at `page`: becomes a user of the address space, and holds off the
    /// mirror's end.
    pub(crate) fn enter(&self, page: Page) -> Result<Inside<D>, FaultError> {
        if mmu_notifier::in_callback() {
            return Err(FaultError::SelfWait { page });
        }
        let user = self.mm.enter().ok_or(Released)?;
        let operation = self.notifier.begin_operation()?;
        Ok(Inside { _operation: operation, user })
    }

    pub(crate) fn check_range(&self, request: PageRange) -> Result<(), FaultError> {
        if self.range.covers(request) {
            return Ok(());
        }
        Err(FaultError::OutOfRange { request, mirror: self.range })
    }
}

/// An operation on a mirror under way.
pub(crate) struct Inside<D: Device> {
    // Ends before the user reference does: the death of the address space waits for operations.
    _operation: Operation<MirrorNotifier<D>>,
    user: User,
}

impl<D: Device> Deref for Inside<D> {
    type Target = AddressSpace;

    fn deref(&self) -> &AddressSpace {
        &self.user
    }
}

impl<D: Device> MirrorNotifier<D> {
    fn note(&self, event: &Event) {
        self.mm.counters().invalidations(1);
        tracing::trace!(target: "uhmm", space = ?self.mm.id(), %event, "invalidate");
    }
}

impl<D: Device> Notifier for MirrorNotifier<D> {
    type Fence = D::Fence;

    fn invalidate(&mut self, event: &Event) -> D::Fence {
        self.note(event);
        self.device.invalidate(&mut self.table, event)
    }

    fn try_invalidate(&mut self, event: &Event) -> Result<D::Fence, WouldBlock> {
        self.note(event);
        self.device.try_invalidate(&mut self.table, event)
    }

    fn release(self) {
        self.device.release(self.table);
    }
}

impl<D: Device> Clone for MirrorHandle<D> {
    fn clone(&self) -> MirrorHandle<D> {
        MirrorHandle {
            notifier: self.notifier.clone(),
            mm: self.mm.clone(),
            device: Arc::clone(&self.device),
            owner: self.owner,
            pagemap: self.pagemap.clone(),
            range: self.range,
        }
    }
}

impl<D: Device> fmt::Debug for Mirror<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mirror of {} in {:?}", self.range, self.mm)
    }
}

impl<D: Device> fmt::Debug for MirrorHandle<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MirrorHandle of {} in {:?}", self.range, self.mm)
    }
}

impl<D: Device> fmt::Debug for MirrorUnfinished<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MirrorUnfinished")
            .field("mirror", &self.mirror)
            .field("reason", &self.reason)
            .finish()
    }
}
