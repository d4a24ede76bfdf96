//! What a subscriber implements.

use crate::Event;

/// What remains to be waited for after a device was told to stop: the second pass of an
/// invalidation (acceptance X05).
///
/// [`Notifier::invalidate`] starts the device stopping and returns at once with a fence; when every
/// subscriber has been told, the announcer waits for all fences in the order of the calls, so
/// several devices stop in parallel. Each fence that was returned is waited for exactly once, or
/// dropped at once if it says that it is over.
///
/// `()` is over from the start. `None` of an `Option<F>` is over too, and says that the event
/// changed nothing on the device, which diagnostics count as a false invalidation.
///
/// A fence answers for the range, not for the call: if another announcer's fence for the same
/// addresses is still pending, a table that is empty already is no reason to return one that is
/// over. The device may still be using what the other call took out.
pub trait Fence: Send + 'static {
    /// Waits until the device uses nothing of the event's range any more.
    ///
    /// Called with no lock of this crate held. Must not announce, subscribe or unsubscribe, nor
    /// wait for anybody who does.
    fn wait(self);

    /// Tells whether there is nothing left to wait for. The default says there is.
    fn is_over(&self) -> bool {
        false
    }

    /// Tells whether the event changed anything on the device; for diagnostics only.
    fn changed(&self) -> bool {
        true
    }
}

impl Fence for () {
    fn wait(self) {}

    fn is_over(&self) -> bool {
        true
    }
}

impl<F: Fence> Fence for Option<F> {
    fn wait(self) {
        if let Some(fence) = self {
            fence.wait();
        }
    }

    fn is_over(&self) -> bool {
        self.as_ref().is_none_or(Fence::is_over)
    }

    fn changed(&self) -> bool {
        self.as_ref().is_some_and(Fence::changed)
    }
}

/// A device's view of a range of an address space: its page table, and how to make it stop.
///
/// The subscription owns the notifier and the lock around it. Outside the calls below, the only way
/// to it is [`ReadSection::commit`](crate::ReadSection::commit), which takes that same lock and
/// then checks for collisions: the rule that the kernel states in a comment (acceptance E02) has no
/// other spelling here.
///
/// # What an invalidation may do
///
/// Update the device's tables and start the device stopping; nothing else (D06, D07). It must not
/// announce a change, open a read section, subscribe, unsubscribe, or wait for a thread that does.
/// It must not panic: a device that was not stopped would go on in memory that is going away, so a
/// panic aborts the process. Debug builds detect re-entry.
#[doc(alias = "mmu_interval_notifier_ops")]
#[doc(alias = "mmu_notifier_ops")]
pub trait Notifier: Send + 'static {
    /// What is left to wait for once the device was told; `()` where it stops at once.
    type Fence: Fence;

    /// Makes the device stop using `event.range()`.
    ///
    /// Called for every event that overlaps the subscription, once each, by the announcing thread,
    /// under this notifier's own lock and no other lock of this crate. When the returned fence is
    /// over, the device uses no translation that was in the tables.
    #[doc(alias = "invalidate_range_start")]
    fn invalidate(&mut self, event: &Event) -> Self::Fence;

    /// Does what [`invalidate`](Notifier::invalidate) does, without sleeping, or refuses.
    ///
    /// Called for a non-blockable announcement, such as the kernel's out-of-memory reaper makes. A
    /// refusal must leave the device as it was; the announcer then gives up its change (acceptance
    /// E13). A fence returned from here must not sleep either. The default refuses.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] to refuse.
    fn try_invalidate(&mut self, event: &Event) -> Result<Self::Fence, WouldBlock> {
        let _ = event;
        Err(WouldBlock)
    }

    /// Ends the mirror because the address space has died: the last call, by value, with no lock
    /// held (acceptance B01, D01).
    ///
    /// Runs exactly once, from [`Subscriptions::release`](crate::Subscriptions::release), unless
    /// the notifier was handed back by
    /// [`Subscription::unsubscribe`](crate::Subscription::unsubscribe) before. Every device has
    /// been told to stop using everything, all of this subscription's operations have ended, and no
    /// translation can be committed any more. It may wait for its own workers; it must not announce
    /// a change itself (D06).
    fn release(self)
    where
        Self: Sized,
    {
    }
}

/// A notifier that also hears of the end of a change.
///
/// For devices that must hold off all faults while a change runs, and cannot use read sections.
/// Made known by [`Subscriptions::subscribe_paired`](crate::Subscriptions::subscribe_paired).
pub trait PairedNotifier: Notifier {
    /// Hears that the change announced by `event` is over.
    ///
    /// Called once for each start that this subscriber was told of, also where a later subscriber
    /// refused a non-blockable event and there was no change (acceptance X01), and for what a
    /// smaller range gives up. Not called for a start it did not hear of, nor after it unsubscribed
    /// (X02); the [`Release`](crate::EventKind::Release) with which it or the address space ends
    /// has no end. Same rules and same lock as [`invalidate`](Notifier::invalidate).
    fn invalidate_range_end(&mut self, event: &Event);
}

/// A non-blockable call could not be done without sleeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a subscriber would have to sleep: nothing was changed, announce it blockable or give up")]
pub struct WouldBlock;
