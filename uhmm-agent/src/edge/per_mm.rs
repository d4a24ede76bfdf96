//! One value for each address space.
//!
//! The pointer to it lies in a page that a child finds wiped (`MADV_WIPEONFORK`, Linux 4.14), however
//! the child was made: by fork(2) of the C library or by the system call. A child that shares its
//! parent's memory (`vfork`, or a thread by any other name) finds its parent's value. So nobody has to
//! be told of forks.
//!
//! What the value of the parent owned stays behind in a child, unused: it may have been in the middle
//! of anything.

use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::thread::futex;

/// How long one thread waits for another that makes the value.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long it sleeps before it looks again, if nobody wakes it.
const LOOK: futex::Timespec = futex::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A page: large enough for what lies in it, and what is wiped.
const PAGE: usize = 4096;

/// What lies in the page. All zeroes is that there is no value yet.
#[repr(C)]
struct Cell<T> {
    value: AtomicPtr<T>,
    /// Whether a thread of this address space makes the value: 1 if so.
    making: AtomicU32,
}

/// A place for one `T` in each address space.
///
/// # Invariants
///
/// `page` is null, or points to a mapped page that is never unmapped; its first bytes are a `Cell<T>`
/// all of whose non-null values came from `Box::into_raw` in this address space, and are never freed.
#[derive(Debug)]
pub(crate) struct PerMm<T> {
    page: AtomicPtr<Cell<T>>,
}

impl<T: Send + Sync + 'static> PerMm<T> {
    /// A place without a page: there is no value, and none can be made.
    pub(crate) const fn new() -> PerMm<T> {
        // INVARIANT: null.
        PerMm { page: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Makes the page. To be called once, while there is one thread: the second call does nothing.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EINVAL` before Linux 4.14.
    pub(crate) fn prepare(&self) -> Result<(), Errno> {
        if self.cell().is_some() {
            return Ok(());
        }
        const { assert!(size_of::<Cell<T>>() <= PAGE && align_of::<Cell<T>>() <= PAGE) };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address at which nothing is.
        let page = unsafe { mmap_anonymous(ptr::null_mut(), PAGE, access, MapFlags::PRIVATE) }?;
        // SAFETY: nobody else knows of the page, and it is empty.
        if let Err(errno) = unsafe { madvise(page, PAGE, Advice::LinuxWipeOnFork) } {
            // SAFETY: as above.
            let _ = unsafe { munmap(page, PAGE) };
            return Err(errno);
        }
        // INVARIANT: mapped, never unmapped from here on, and zeroes: a cell without a value. Release:
        // partner of the load in `cell`.
        self.page.store(page.cast(), Ordering::Release);
        Ok(())
    }

    fn cell(&self) -> Option<&'static Cell<T>> {
        // Acquire: partner of the store in `prepare`.
        let page = NonNull::new(self.page.load(Ordering::Acquire))?;
        // SAFETY: mapped for good, aligned as pages are, and a cell of atomics (the invariant).
        Some(unsafe { page.as_ref() })
    }

    /// Returns the value of this address space, if there is one. Waits for nobody.
    pub(crate) fn get(&self) -> Option<&'static T> {
        // Acquire: partner of the store in `get_or_make`.
        let value = self.cell()?.value.load(Ordering::Acquire);
        // SAFETY: null, or made from a box in this address space and never freed (the invariant); it
        // is only ever shared, which `T: Sync` allows.
        unsafe { value.as_ref() }
    }

    /// Returns the value, and makes it first if need be. One thread makes it, others wait.
    ///
    /// # Errors
    ///
    /// What `make` said; the next call tries again. `EBUSY` where another thread has been making it for
    /// too long. `ENXIO` without a page.
    pub(crate) fn get_or_make(
        &self,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<&'static T, Errno> {
        let cell = self.cell().ok_or(Errno::NXIO)?;
        let deadline = Instant::now() + PATIENCE;
        let making = loop {
            if let Some(value) = self.get() {
                return Ok(value);
            }
            // Acquire: partner of the store in the drop of `Making`, so that who is next finds the
            // value that was made before.
            let first = cell.making.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
            if first.is_ok() {
                break Making(&cell.making);
            }
            if Instant::now() >= deadline {
                return Err(Errno::BUSY);
            }
            // Whatever it says, it is time to look again.
            let _ = futex::wait(&cell.making, futex::Flags::PRIVATE, 1, Some(&LOOK));
        };
        if let Some(value) = self.get() {
            return Ok(value);
        }
        let value = Box::into_raw(Box::new(make()?));
        // INVARIANT: from a box, and never freed. Release: partner of the load in `get`.
        cell.value.store(value, Ordering::Release);
        drop(making);
        self.get().ok_or(Errno::NXIO)
    }
}

/// That this thread makes the value.
struct Making(&'static AtomicU32);

impl Drop for Making {
    fn drop(&mut self) {
        // Release: partner of the exchange in `get_or_make`.
        self.0.store(0, Ordering::Release);
        // It fails for nobody who waits.
        let _ = futex::wake(self.0, futex::Flags::PRIVATE, u32::MAX >> 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicUsize;

    #[test]
    fn without_a_page_there_is_nothing() {
        static PLACE: PerMm<u32> = PerMm::new();
        assert_eq!(PLACE.get(), None);
        assert_eq!(PLACE.get_or_make(|| Ok(1)), Err(Errno::NXIO));
    }

    #[test]
    fn it_is_made_once_and_again_after_a_failure() {
        static PLACE: PerMm<usize> = PerMm::new();
        static MADE: AtomicUsize = AtomicUsize::new(0);
        PLACE.prepare().expect("there is room");
        assert_eq!(PLACE.get_or_make(|| Err(Errno::PERM)), Err(Errno::PERM));
        let make = || Ok(MADE.fetch_add(1, Ordering::Relaxed) + 7);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(PLACE.get_or_make(make), Ok(&7)));
            }
        });
        PLACE.prepare().expect("it is there already");
        assert_eq!((PLACE.get(), MADE.load(Ordering::Relaxed)), (Some(&7), 1));
    }

    #[test]
    fn a_child_has_none_however_it_was_made() {
        static PLACE: PerMm<u32> = PerMm::new();
        PLACE.prepare().expect("there is room");
        PLACE.get_or_make(|| Ok(5)).expect("it is made");
        // SAFETY: no stack and no other pointer: the child goes on here, with memory of its own, and
        // makes system calls alone until it ends.
        let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if child == 0 {
            let status = i32::from(PLACE.get().is_some());
            // SAFETY: it ends the child, whatever others were doing.
            unsafe { libc::_exit(status) };
        }
        let child = i32::try_from(child).expect("numbers of processes are small");
        let mut status = -1;
        // SAFETY: there is room for the status.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!((waited, status), (child, 0));
        assert_eq!(PLACE.get(), Some(&5));
    }
}
