//! Memory that the supervisor and all agents share.
//!
//! What lies there may be changed by other processes at any time, of whatever version, and by ones
//! that die in the middle. So there are atomics there and nothing else, every pattern of bits is a
//! value of theirs, and who reads one trusts it as far as a number from outside. As far as Rust is
//! concerned, another process is a thread that uses atomics.

use core::ffi::c_void;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::{self, NonNull};
use std::os::fd::BorrowedFd;

use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::ledger::layout::Layout;
use crate::node::units::Usage;

/// What may lie in memory that processes share.
///
/// # Safety
///
/// The type consists of atomics alone, without padding that is read; every pattern of bits, all
/// zeroes among them, is a value of it; and it is laid out as `repr(C)` says. It is not dropped.
pub(crate) unsafe trait Shared: Sync {}

// SAFETY: every field is an atomic, or an array or `repr(C)` structure of such.
unsafe impl Shared for Layout {}

// SAFETY: a `repr(C)` structure of arrays of atomics, and of nothing else.
unsafe impl Shared for Usage {}

/// A `T` in memory that is shared with other processes, and with children across a fork. Dropping
/// it unmaps it from this process.
///
/// # Invariants
///
/// `base` is aligned for `T`, and `size_of::<T>()` bytes from there are mapped, readable and
/// writable, while `self` lives; the file behind them cannot shrink.
pub(crate) struct Mapping<T: Shared> {
    base: NonNull<T>,
    owns: PhantomData<T>,
}

// SAFETY: a mapping has no ties to the thread that made it, and what can be reached through it can
// be reached from any thread, as `T` is `Sync`.
unsafe impl<T: Shared> Send for Mapping<T> {}

// SAFETY: it gives out `&T` and nothing else, and `T` is `Sync`.
unsafe impl<T: Shared> Sync for Mapping<T> {}

impl<T: Shared> Mapping<T> {
    /// How large the file is.
    pub(crate) const BYTES: usize = size_of::<T>();

    /// Maps `file`, which must be sealed against shrinking.
    ///
    /// # Errors
    ///
    /// `EINVAL` where the file is smaller than a `T`, or could become so: then touching it could
    /// raise `SIGBUS`. Else what `fcntl`, `fstat` or `mmap` said.
    pub(crate) fn of(file: BorrowedFd<'_>) -> Result<Mapping<T>, Errno> {
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= 4096) };
        let seals = rustix::fs::fcntl_get_seals(file)?;
        let bytes = rustix::fs::fstat(file)?.st_size;
        let fits = usize::try_from(bytes).is_ok_and(|bytes| bytes >= Self::BYTES);
        if !seals.contains(SealFlags::SHRINK) || !fits {
            return Err(Errno::INVAL);
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address at which nothing is, so no memory that anybody has
        // is replaced.
        let base =
            unsafe { mmap(ptr::null_mut(), Self::BYTES, access, MapFlags::SHARED, file, 0) }?;
        let base = NonNull::new(base.cast::<T>()).ok_or(Errno::INVAL)?;
        // INVARIANT: mmap gave a multiple of the page size, to which `T` is aligned (asserted
        // above); the mapping has its size, is of a file that has it and keeps it, and nobody else
        // unmaps it.
        Ok(Mapping { base, owns: PhantomData })
    }
}

impl<T: Shared> Deref for Mapping<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: mapped, aligned and large enough (the invariant); any bits are a `T` and all
        // accesses of other processes are those of atomics (`Shared`).
        unsafe { self.base.as_ref() }
    }
}

impl<T: Shared> Drop for Mapping<T> {
    fn drop(&mut self) {
        let base: *mut c_void = self.base.as_ptr().cast();
        // SAFETY: the range was mapped by `of` and belongs to `self`; no reference into it outlives
        // `self`, as each is borrowed from it.
        let unmapped = unsafe { munmap(base, Self::BYTES) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

impl<T: Shared> fmt::Debug for Mapping<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("base", &self.base).finish_non_exhaustive()
    }
}
