//! Memory of our own, which nobody else in the program knows of.
//!
//! Several threads and devices may access a page of a [`Region`] at once, so all accesses are
//! atomic. Rust forbids that atomic accesses of different sizes overlap while one of them writes
//! ([`std::sync::atomic`], "Memory model for atomic accesses"), so there is one size: aligned words
//! of 64 bits. A write of part of a word replaces those bytes by compare-and-exchange and leaves
//! its neighbours alone. Words are relaxed: what orders a write of one thread before a read of
//! another is whatever told the second thread that there is something to read, a lock or a fault.
//! The kernel too reads and writes these pages (it moves them, zaps them, fills them): as far as
//! Rust is concerned these are the accesses of a thread that uses atomics.

use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use uhmm::{Order, PAGE_SIZE, Page, PageRange};

use super::fork::ForkMark;
use super::gate;

/// The bytes of a word, the unit of every access.
const WORD: usize = size_of::<u64>();

/// How much more of a region that grows can be accessed at a time, at least, in bytes.
const STEP: usize = 16 << 20;

/// A private anonymous mapping that belongs to its owner alone, and that nothing is put into until
/// it is touched. Dropping it unmaps it.
///
/// # Invariants
///
/// 1. `base` is aligned to 2 MiB, and the `bytes` bytes from there are mapped while `self` lives,
///    the first `accessible` of them readable and writable. Nobody but `self` and the kernel
///    accesses them by their address.
/// 2. Every access of the program is an atomic one of an aligned `u64`.
#[derive(Debug)]
pub(crate) struct Region {
    base: NonNull<u8>,
    bytes: usize,
    /// How many bytes from the start can be accessed. Only grows.
    accessible: AtomicUsize,
    /// Held by who makes it grow.
    growing: Mutex<()>,
    /// The process that has it, if its children do not.
    only: Option<ForkMark>,
}

/// What is special about the memory of a [`Region`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RegionOptions {
    /// A child does not have it: touching it there is a fault (`MADV_DONTFORK`).
    pub(crate) dont_fork: bool,
    /// A child finds zeroes there (`MADV_WIPEONFORK`, Linux 4.14).
    pub(crate) wipe_on_fork: bool,
    /// Whether the kernel should use huge pages (`MADV_HUGEPAGE`), or should not
    /// (`MADV_NOHUGEPAGE`); `None` leaves it to the setting of the machine. A kernel without
    /// transparent huge pages ignores it.
    pub(crate) huge: Option<bool>,
    /// Nothing of it can be accessed until it is [reached](Region::reach). Whoever has a large
    /// region and uses little of it wants this: `mlockall(MCL_CURRENT)` fills all that can be
    /// accessed.
    pub(crate) grows: bool,
    /// No `mlockall` locks it (`MAP_DROPPABLE`, Linux 6.11), though `MCL_CURRENT` fills it. The kernel
    /// may drop what it holds at any time, and a child finds zeroes there.
    pub(crate) never_locked: bool,
}

// SAFETY: a region owns its memory and has no ties to the thread that made it (invariant 1).
unsafe impl Send for Region {}

// SAFETY: all that `&Region` can do to the memory is atomic (invariant 2) or a system call.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `bytes` bytes, rounded up to a multiple of 2 MiB, at a multiple of 2 MiB.
    ///
    /// No memory is set aside for it (`MAP_NORESERVE`), except where the machine accounts for all
    /// memory strictly (`vm.overcommit_memory=2`). It is not locked, even in a program that has
    /// called `mlockall(MCL_FUTURE)`.
    ///
    /// # Errors
    ///
    /// What `mmap`, `mprotect`, `munlock` or `madvise` said: `ENOMEM` where a limit on the size of
    /// the address space or of all memory forbids it, `EAGAIN` where a limit on locked memory does,
    /// which is charged for a moment under `MCL_FUTURE`. `EINVAL` where `bytes` is 0. With
    /// `never_locked`, `EINVAL` or `EOPNOTSUPP` where the kernel has no such memory. With
    /// `dont_fork` also those of [`process_number`](super::fork::process_number).
    pub(crate) fn reserve(bytes: usize, options: RegionOptions) -> Result<Region, Errno> {
        let mut region = Region::map(bytes, options.never_locked)?;
        // Under MCL_FUTURE the mapping was born locked. Nothing has filled it yet, because it was
        // not accessible, and once it is unlocked nothing will.
        region.unlock()?;
        if !options.grows {
            region.open_up_to(0, region.bytes)?;
        }
        if options.dont_fork {
            region.advise(Advice::LinuxDontFork)?;
            region.only = Some(ForkMark::new()?);
        }
        if options.wipe_on_fork {
            region.advise(Advice::LinuxWipeOnFork)?;
        }
        let huge = match options.huge {
            None => Ok(()),
            Some(true) => region.advise(Advice::LinuxHugepage),
            Some(false) => region.advise(Advice::LinuxNoHugepage),
        };
        match huge {
            // A kernel that knows no huge pages uses none, whatever we want.
            Ok(()) | Err(Errno::INVAL) => Ok(region),
            Err(error) => Err(error),
        }
    }

    /// Makes sure that `range` can be accessed, and all that is before it.
    ///
    /// # Errors
    ///
    /// What `mprotect` said: `ENOMEM` where the machine accounts for all memory strictly and has no
    /// more, or where there would be too many mappings.
    ///
    /// # Panics
    ///
    /// If `range` is not all within the region.
    pub(crate) fn reach(&self, range: PageRange) -> Result<(), Errno> {
        assert!(self.range().covers(range), "{range} is not within the region {self:?}");
        let end = (range.address() - self.range().address()) as usize + range.len() * PAGE_SIZE;
        // Acquire: what is said to be accessible is; the partner is the release in `open_up_to`.
        if end <= self.accessible.load(Ordering::Acquire) {
            return Ok(());
        }
        let growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.accessible.load(Ordering::Acquire);
        if end > now {
            let wanted =
                end.saturating_add(STEP.max(now / 8)).next_multiple_of(Order::HUGE.bytes());
            self.open_up_to(now, wanted.min(self.bytes))?;
        }
        drop(growing);
        Ok(())
    }

    /// Makes the bytes up to `to` accessible, of which those up to `from` are.
    fn open_up_to(&self, from: usize, to: usize) -> Result<(), Errno> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let start = self.base.as_ptr().wrapping_add(from).cast::<c_void>();
        // SAFETY: the mapping is ours (invariant 1), and nobody relies on it to be inaccessible.
        unsafe { gate::mprotect(start, to - from, access) }?;
        // INVARIANT: 1: made so just now. Release: see `reach`.
        self.accessible.store(to, Ordering::Release);
        Ok(())
    }

    /// Makes the region one that is not locked in memory, after the program has locked all it had.
    ///
    /// # Errors
    ///
    /// What `munlock` said.
    pub(crate) fn unlock(&self) -> Result<(), Errno> {
        // SAFETY: the mapping is ours (invariant 1), and unlocking changes no contents.
        unsafe { rustix::mm::munlock(self.pointer(), self.bytes) }
    }

    /// Tells whether this process has the region: a child of the one that made it does not if it
    /// was made with [`dont_fork`](RegionOptions::dont_fork), and must not touch it then.
    pub(crate) fn is_here(&self) -> bool {
        self.only.is_none_or(|mark| mark.is_ours())
    }

    /// Like [`reserve`](Region::reserve), and as long as there is no room for `bytes`, tries half
    /// as much, down to `at_least`.
    ///
    /// # Errors
    ///
    /// Those of the smallest attempt, and others than `ENOMEM` and `EAGAIN` at once.
    pub(crate) fn reserve_at_most(
        bytes: usize,
        at_least: usize,
        options: RegionOptions,
    ) -> Result<Region, Errno> {
        let mut bytes = bytes.max(at_least);
        loop {
            match Region::reserve(bytes, options) {
                Err(Errno::NOMEM | Errno::AGAIN) if bytes > at_least => {
                    bytes = (bytes / 2).max(at_least);
                }
                outcome => return outcome,
            }
        }
    }

    /// Returns where the region is.
    pub(crate) fn range(&self) -> PageRange {
        PageRange::new(self.base.addr().get() as u64, self.bytes as u64)
            .expect("a mapping begins and ends at the edge of a page")
    }

    /// Copies the bytes from `offset` in `page` into `data`; they may span the pages that follow.
    /// Words are read one by one: what others write meanwhile may be seen in part.
    ///
    /// # Panics
    ///
    /// If the bytes are not all within the region.
    pub(crate) fn read(&self, page: Page, offset: usize, data: &mut [u8]) {
        let (words, skip) = self.words_of(page, offset, data.len());
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed).to_ne_bytes();
        let (head, rest) = data.split_at_mut(head_bytes(skip, data.len()));
        let mut words = words.iter();
        if !head.is_empty() {
            let word = words.next().map(load).expect("a word for each byte");
            head.copy_from_slice(&word[skip..][..head.len()]);
        }
        let mut chunks = rest.chunks_exact_mut(WORD);
        for (chunk, word) in (&mut chunks).zip(&mut words) {
            chunk.copy_from_slice(&load(word));
        }
        let tail = chunks.into_remainder();
        if !tail.is_empty() {
            let word = words.next().map(load).expect("a word for each byte");
            tail.copy_from_slice(&word[..tail.len()]);
        }
    }

    /// Copies `data` to `offset` in `page` and what follows. Words are written one by one: others
    /// may see a part of it meanwhile.
    ///
    /// # Panics
    ///
    /// If the bytes are not all within the region.
    pub(crate) fn write(&self, page: Page, offset: usize, data: &[u8]) {
        let (words, skip) = self.words_of(page, offset, data.len());
        let (head, rest) = data.split_at(head_bytes(skip, data.len()));
        let mut words = words.iter();
        if !head.is_empty() {
            replace(words.next().expect("a word for each byte"), skip, head);
        }
        let (chunks, tail) = rest.as_chunks::<WORD>();
        for (chunk, word) in chunks.iter().zip(&mut words) {
            word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
        }
        if !tail.is_empty() {
            replace(words.next().expect("a word for each byte"), 0, tail);
        }
    }

    /// Returns the first word of the region.
    pub(super) fn first_word(&self) -> u64 {
        // Relaxed: see the head of this module.
        self.words_of(self.range().first(), 0, WORD).0[0].load(Ordering::Relaxed)
    }

    /// Replaces the word at `offset` in `page` by what `update` makes of it, atomically and in one
    /// order with all others, and returns what it was. `update` may be called several times.
    ///
    /// # Panics
    ///
    /// If `offset` is no multiple of 8, or the word is not within the region.
    pub(crate) fn fetch_update(
        &self,
        page: Page,
        offset: usize,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> u64 {
        let (words, skip) = self.words_of(page, offset, WORD);
        assert_eq!(skip, 0, "an atomic access at {page}+{offset:#x} is not aligned");
        let mut current = words[0].load(Ordering::SeqCst);
        loop {
            let new = update(current);
            let swapped =
                words[0].compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst);
            match swapped {
                Ok(previous) => return previous,
                Err(now) => current = now,
            }
        }
    }

    /// Throws away what `range` holds: it reads as zeroes from now on, or as missing where it is
    /// registered with a userfaultfd. There the caller waits until the event has been read.
    ///
    /// # Errors
    ///
    /// What `madvise(MADV_DONTNEED)` said, or `MADV_DONTNEED_LOCKED` (5.18) where it is locked.
    ///
    /// # Panics
    ///
    /// If `range` is not all within the region.
    pub(crate) fn zap(&self, range: PageRange) -> Result<(), Errno> {
        assert!(self.range().covers(range), "{range} is not within the region {self:?}");
        let bytes = range.len() * PAGE_SIZE;
        let start =
            self.base.as_ptr().wrapping_add((range.address() - self.range().address()) as usize);
        // SAFETY: the pages are ours (invariant 1) and hold nothing but numbers.
        match unsafe { gate::madvise(start.cast(), bytes, libc::MADV_DONTNEED) } {
            // SAFETY: as above.
            Err(Errno::INVAL) => unsafe { dontneed_locked(start.cast(), bytes) },
            done => done,
        }
    }

    /// Maps inaccessible memory at a multiple of 2 MiB.
    fn map(bytes: usize, never_locked: bool) -> Result<Region, Errno> {
        let huge = Order::HUGE.bytes();
        let bytes = bytes.checked_next_multiple_of(huge).ok_or(Errno::NOMEM)?;
        if bytes == 0 {
            return Err(Errno::INVAL);
        }
        let mapped = bytes.checked_add(huge - PAGE_SIZE).ok_or(Errno::NOMEM)?;
        // What may be dropped is private as well.
        let kind = if never_locked { MapFlags::DROPPABLE } else { MapFlags::PRIVATE };
        let flags = kind | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses where, so that it replaces no other mapping.
        let start = unsafe {
            rustix::mm::mmap_anonymous(core::ptr::null_mut(), mapped, ProtFlags::empty(), flags)
        }?;
        let before = start.addr().next_multiple_of(huge) - start.addr();
        let base = start.wrapping_byte_add(before);
        // SAFETY: what is before the region was mapped above, and nobody knows of it.
        unsafe { unmap(start, before) };
        // SAFETY: as above, what is after it.
        unsafe { unmap(base.wrapping_byte_add(bytes), mapped - bytes - before) };
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let (accessible, growing) = (AtomicUsize::new(0), Mutex::new(()));
        Ok(Region { base, bytes, accessible, growing, only: None })
    }

    /// Gives the kernel advice about the whole region that changes none of its contents.
    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: the mapping is ours (invariant 1); the advices given here concern children and
        // huge pages.
        unsafe { rustix::mm::madvise(self.pointer(), self.bytes, advice) }
    }

    /// Returns the start, as system calls want it.
    fn pointer(&self) -> *mut c_void {
        self.base.as_ptr().cast::<c_void>()
    }

    /// Returns the words that hold the `bytes` bytes from `offset` in `page` on, and the number of
    /// bytes of the first word before them.
    fn words_of(&self, page: Page, offset: usize, bytes: usize) -> (&[AtomicU64], usize) {
        // Acquire: as in `reach`.
        let accessible = self.accessible.load(Ordering::Acquire);
        let start = page
            .address()
            .checked_sub(self.range().address())
            .and_then(|distance| usize::try_from(distance).ok()?.checked_add(offset))
            .filter(|&start| start <= accessible && bytes <= accessible - start);
        let Some(start) = start else {
            panic!("{bytes:#x} bytes at {page}+{offset:#x} are not within the region {self:?}")
        };
        let skip = start % WORD;
        let first = self.base.as_ptr().wrapping_add(start - skip).cast::<AtomicU64>();
        // SAFETY: the memory is mapped and accessible while `self` is borrowed, and a region is a
        // whole number of words and aligned to more than one (invariant 1), any eight bytes are an
        // `AtomicU64`, and all accesses are of that kind (invariant 2). The size fits `isize`
        // because no mapping is larger.
        let words = unsafe { core::slice::from_raw_parts(first, (skip + bytes).div_ceil(WORD)) };
        (words, skip)
    }
}

/// Drops what is in memory that is locked (`MADV_DONTNEED_LOCKED`, Linux 5.18).
///
/// # Safety
///
/// It is part of a mapping of ours, and what it holds is of no use.
unsafe fn dontneed_locked(start: *mut c_void, bytes: usize) -> Result<(), Errno> {
    const MADV_DONTNEED_LOCKED: i32 = 24;
    // SAFETY: the caller's contract.
    unsafe { gate::madvise(start, bytes, MADV_DONTNEED_LOCKED) }
}

impl Drop for Region {
    fn drop(&mut self) {
        if !self.is_here() {
            // Whatever a child has at this address is its own.
            return;
        }
        // SAFETY: the mapping is ours (invariant 1), and nothing borrows from `self` any more.
        unsafe { unmap(self.pointer(), self.bytes) };
    }
}

/// Returns how many of `bytes` bytes are in the word whose first `skip` bytes are not wanted; 0
/// where the whole word is.
fn head_bytes(skip: usize, bytes: usize) -> usize {
    if skip == 0 { 0 } else { (WORD - skip).min(bytes) }
}

/// Replaces the bytes of `word` from `skip` by `data`, and leaves the others to whoever writes
/// them.
fn replace(word: &AtomicU64, skip: usize, data: &[u8]) {
    let merge = |current: u64| {
        let mut bytes = current.to_ne_bytes();
        bytes[skip..][..data.len()].copy_from_slice(data);
        Some(u64::from_ne_bytes(bytes))
    };
    // Relaxed: see the head of this module.
    let merged = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, merge);
    debug_assert!(merged.is_ok(), "the closure never declines");
}

/// Unmaps `bytes` bytes from `start`; nothing where `bytes` is 0.
///
/// # Safety
///
/// They are part of a mapping of ours, and nobody uses them.
unsafe fn unmap(start: *mut c_void, bytes: usize) {
    if bytes == 0 {
        return;
    }
    // SAFETY: the caller's contract.
    let unmapped = unsafe { gate::munmap(start, bytes) };
    // The whole of a mapping can always be unmapped. Cutting one at its ends needs no new one, and
    // only an ancient kernel would say `ENOMEM`; the memory then stays, untouched.
    debug_assert_eq!(unmapped, Ok(()), "munmap of memory of our own");
}

#[cfg(test)]
mod tests;
