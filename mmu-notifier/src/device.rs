//! Devices, and the moment from which one may be freed.
//!
//! The mails of May and June 2015 (seeds 000 and 001) are about one question: when a driver has
//! closed its last mirror, may it free the device? There, the only thing between the caller's
//! `free` and another thread's last access was a mutex inside the device. Here a mirror holds a
//! [`DeviceRef`], a counted reference whose count lives in an allocation of its own and falls only
//! after the reference itself is gone (acceptance B09-B12). So when
//! [`unregister`](DeviceHandle::unregister) returns, it returns the device *by value*: nobody else
//! can have it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use crate::context;
use crate::gate::{Gate, Pin, TimedOut};
use crate::primitive::mutant;

/// A registered device; owning it is having it registered.
///
/// Mirrors hold [`DeviceRef`]s, made by [`reference`](DeviceHandle::reference).
///
/// # What the caller must have done, and what is guaranteed (acceptance B15)
///
/// Before unregistering: drop every reference, that is, end every subscription whose notifier holds
/// one. Nothing has to be waited for beyond that, since unsubscribing waits (C05). On return of
/// [`unregister`](DeviceHandle::unregister): no thread touches the device, and it is the caller's
/// by value.
///
/// Dropping the handle instead gives the device up: it is dropped with the last reference.
///
/// ```
/// use mmu_notifier::DeviceHandle;
///
/// let device = DeviceHandle::register("gpu0");
/// let mirror = device.reference();
/// let busy = device.try_unregister().expect_err("a mirror refers to it");
/// assert_eq!(busy.references, 1);
/// drop(mirror);
/// assert_eq!(busy.handle.unregister(), "gpu0");
/// ```
#[must_use = "dropping the handle gives the device up"]
pub struct DeviceHandle<D> {
    device: Arc<D>,
    gate: Arc<Gate>,
}

/// A counted reference to a registered device: what a mirror holds.
pub struct DeviceRef<D> {
    pin: Pin<D>,
}

/// The device is still referred to; nothing was changed (acceptance B14). The kernel's `EBUSY`.
#[derive(thiserror::Error)]
#[error("the device has {references} references: end the subscriptions that hold them")]
#[doc(alias = "EBUSY")]
pub struct Busy<D> {
    /// The registration, to try again.
    pub handle: DeviceHandle<D>,
    /// How many references there were.
    pub references: u64,
}

impl<D> DeviceHandle<D> {
    /// Registers `device`.
    pub fn register(device: D) -> DeviceHandle<D> {
        DeviceHandle { device: Arc::new(device), gate: Arc::new(Gate::new()) }
    }

    /// Makes a reference for a mirror to hold.
    pub fn reference(&self) -> DeviceRef<D> {
        DeviceRef { pin: Pin::new(Arc::clone(&self.device), Arc::clone(&self.gate)) }
    }

    /// Unregisters the device and hands it back, unless it is referred to. Never waits.
    ///
    /// # Errors
    ///
    /// [`Busy`], with the handle. Whether and when to try again is the caller's; no guarantee rests
    /// on it.
    pub fn try_unregister(self) -> Result<D, Busy<D>> {
        // Nobody can make a reference while we own the handle and none is left, so zero is final.
        match self.gate.count() {
            0 => Ok(self.into_device()),
            _ if mutant!("device_not_busy") => Ok(self.into_device()),
            references => Err(Busy { handle: self, references }),
        }
    }

    /// Unregisters the device and hands it back, as soon as nobody refers to it.
    ///
    /// # Panics
    ///
    /// If called from inside a callback, where it could wait for itself.
    pub fn unregister(self) -> D {
        self.unregister_until(None).expect("a wait without a deadline does not time out")
    }

    /// Does what [`unregister`](DeviceHandle::unregister) does, until `deadline`.
    ///
    /// # Errors
    ///
    /// [`Busy`], with the handle, when the deadline has passed.
    ///
    /// # Panics
    ///
    /// As [`unregister`](DeviceHandle::unregister).
    pub fn unregister_deadline(self, deadline: Instant) -> Result<D, Busy<D>> {
        self.unregister_until(Some(deadline))
    }

    fn unregister_until(self, deadline: Option<Instant>) -> Result<D, Busy<D>> {
        assert!(
            !context::in_callback(),
            "mmu-notifier: unregistering a device from inside a callback would wait for itself"
        );
        match self.gate.drain(deadline) {
            Ok(_) => Ok(self.into_device()),
            Err(TimedOut) => Err(Busy { references: self.gate.count(), handle: self }),
        }
    }

    fn into_device(self) -> D {
        Arc::into_inner(self.device)
            .expect("a reference gives up the device before it leaves the gate")
    }
}

impl<D> Deref for DeviceHandle<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.device
    }
}

impl<D> Deref for DeviceRef<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.pin
    }
}

impl<D> Clone for DeviceRef<D> {
    fn clone(&self) -> DeviceRef<D> {
        DeviceRef { pin: self.pin.clone() }
    }
}

impl<D> fmt::Debug for DeviceHandle<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceHandle").field("references", &self.gate.count()).finish()
    }
}

impl<D> fmt::Debug for DeviceRef<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceRef").finish_non_exhaustive()
    }
}

impl<D> fmt::Debug for Busy<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Busy").field("references", &self.references).finish_non_exhaustive()
    }
}
