//! What a kernel sees: the address space, as the device reaches it.

use std::fmt;

use uhmm::{Access, PAGE_SIZE};

use super::context::Context;
use super::fault::{FaultReason, KernelFault};

/// The address space of a kernel. Every load and store goes through the page table of the device,
/// and faults where that leads nowhere.
///
/// An access of a kernel ends with its effect, or with a [`KernelFault`] and none; one of several
/// pages may have had its effect on those before the page that failed. Words are in the byte order
/// of the machine.
pub struct DeviceMemoryView<'a> {
    context: &'a Context,
}

/// A number that kernels can load and store in one step.
pub trait Word: Copy + private::Sealed {
    /// Makes it from the bytes in memory.
    #[doc(hidden)]
    fn from_bytes(bytes: &[u8]) -> Self;

    /// Hands the bytes for memory to `f`.
    #[doc(hidden)]
    fn with_bytes<R>(self, f: impl FnOnce(&[u8]) -> R) -> R;
}

mod private {
    pub trait Sealed {}
}

macro_rules! words {
    ($($word:ty),*) => {$(
        impl private::Sealed for $word {}
        impl Word for $word {
            fn from_bytes(bytes: &[u8]) -> $word {
                <$word>::from_ne_bytes(bytes.try_into().expect("a word has its own size"))
            }

            fn with_bytes<R>(self, f: impl FnOnce(&[u8]) -> R) -> R {
                f(&self.to_ne_bytes())
            }
        }
    )*};
}

words!(u8, u16, u32, u64, i8, i16, i32, i64, f32, f64);

impl<'a> DeviceMemoryView<'a> {
    pub(super) fn new(context: &'a Context) -> DeviceMemoryView<'a> {
        DeviceMemoryView { context }
    }

    /// Loads a number, whose address is a multiple of its size.
    ///
    /// # Errors
    ///
    /// [`KernelFault`]; for an address that is not aligned, with [`FaultReason::Operation`].
    pub fn load<T: Word>(&self, address: u64) -> Result<T, KernelFault> {
        aligned::<T>(address, Access::Read)?;
        let mut bytes = [0; size_of::<u64>()];
        let bytes = &mut bytes[..size_of::<T>()];
        self.context.read(address, bytes)?;
        Ok(T::from_bytes(bytes))
    }

    /// Stores a number, at an address that is a multiple of its size.
    ///
    /// # Errors
    ///
    /// As [`load`](DeviceMemoryView::load).
    pub fn store<T: Word>(&self, address: u64, value: T) -> Result<(), KernelFault> {
        aligned::<T>(address, Access::Write)?;
        value.with_bytes(|bytes| self.context.write(address, bytes))
    }

    /// Copies bytes from any address on: page by page, which others may write in between.
    ///
    /// # Errors
    ///
    /// [`KernelFault`]; for bytes that go past the top of the address space, with
    /// [`FaultReason::Operation`].
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), KernelFault> {
        within(address, bytes.len() as u64, Access::Read)?;
        let mut done = 0;
        for length in pieces(address, bytes.len()) {
            self.context.read(address + done as u64, &mut bytes[done..done + length])?;
            done += length;
        }
        Ok(())
    }

    /// Copies bytes to any address on, page by page.
    ///
    /// # Errors
    ///
    /// As [`read`](DeviceMemoryView::read).
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), KernelFault> {
        within(address, bytes.len() as u64, Access::Write)?;
        let mut done = 0;
        for length in pieces(address, bytes.len()) {
            self.context.write(address + done as u64, &bytes[done..done + length])?;
            done += length;
        }
        Ok(())
    }

    /// Adds to the word at `address`, in one step that no other access comes between, by a CPU or a
    /// device, and returns what was there. It wraps.
    ///
    /// # Errors
    ///
    /// As [`load`](DeviceMemoryView::load); for memory that the device cannot have to itself, with
    /// [`FaultReason::Type`].
    pub fn fetch_add_u64(&self, address: u64, value: u64) -> Result<u64, KernelFault> {
        aligned::<u64>(address, Access::Atomic)?;
        self.context.update(address, |old| old.wrapping_add(value))
    }

    /// Stores `new` at `address` if `expected` is there, in one step, and returns what was there.
    ///
    /// # Errors
    ///
    /// As [`fetch_add_u64`](DeviceMemoryView::fetch_add_u64).
    pub fn compare_exchange(
        &self,
        address: u64,
        expected: u64,
        new: u64,
    ) -> Result<u64, KernelFault> {
        aligned::<u64>(address, Access::Atomic)?;
        self.context.update(address, |old| if old == expected { new } else { old })
    }

    /// Replaces the word at `address` by `update` of it, and returns what was there; `None` of
    /// `update` leaves it. `update` may run several times, and may use the view.
    ///
    /// # Errors
    ///
    /// As [`fetch_add_u64`](DeviceMemoryView::fetch_add_u64).
    pub fn fetch_update(
        &self,
        address: u64,
        mut update: impl FnMut(u64) -> Option<u64>,
    ) -> Result<u64, KernelFault> {
        // An addition of nothing: the first look is atomic too.
        let mut seen = self.fetch_add_u64(address, 0)?;
        loop {
            let Some(new) = update(seen) else { return Ok(seen) };
            // The caller's closure runs outside; what happened meanwhile is noticed here.
            let there = self.compare_exchange(address, seen, new)?;
            if there == seen {
                return Ok(seen);
            }
            seen = there;
        }
    }
}

/// Refuses addresses that are no multiple of the number's size.
fn aligned<T>(address: u64, access: Access) -> Result<(), KernelFault> {
    if address.is_multiple_of(size_of::<T>() as u64) {
        return Ok(());
    }
    Err(KernelFault { reason: FaultReason::Operation, address, access })
}

/// Refuses bytes that go past the top of the address space.
pub(super) fn within(address: u64, length: u64, access: Access) -> Result<(), KernelFault> {
    match address.checked_add(length.saturating_sub(1)) {
        Some(_) => Ok(()),
        None => Err(KernelFault { reason: FaultReason::Operation, address, access }),
    }
}

/// Cuts bytes at the edges of pages, into the lengths of the pieces.
fn pieces(address: u64, length: usize) -> impl Iterator<Item = usize> {
    let first = PAGE_SIZE - address as usize % PAGE_SIZE;
    let mut left = length;
    let mut room = first;
    std::iter::from_fn(move || {
        let piece = left.min(room);
        left -= piece;
        room = PAGE_SIZE;
        (piece > 0).then_some(piece)
    })
}

impl fmt::Debug for DeviceMemoryView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemoryView of {:?}", self.context)
    }
}
