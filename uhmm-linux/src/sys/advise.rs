//! What madvise(2) does to ranges of pages.
//!
//! [`populate_read`] and [`populate_write`] are how a device's fault becomes a fault of the
//! process: the kernel does what it would for a load or a store, and answers with an error where a
//! thread would get a signal. It stops at the first page that it cannot have. As measured on 6.18:
//!
//! | range | to read | to write |
//! | --- | --- | --- |
//! | nothing is mapped in a part of it | `ENOMEM` | `ENOMEM` |
//! | `PROT_NONE` | `EINVAL` | `EINVAL` |
//! | may be read and not written | | `EINVAL` |
//! | may be written and not read | `EINVAL` | |
//! | beyond the end of a file, a guard, hugetlbfs is exhausted | `EFAULT` | `EFAULT` |
//! | poisoned | `EHWPOISON` | `EHWPOISON` |
//! | vvar and others that are not memory | `EINVAL` | `EINVAL` |
//! | missing, and a userfaultfd is told of it | waits, as a thread would | the same |
//! | the same, with `Faults::UserModeOnly` or `Features::SIGBUS` | `EFAULT` | `EFAULT` |
#![allow(dead_code, reason = "the interface is wrapped and tested whole, and used in part")]

use std::ffi::c_void;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::Advice;
use uhmm::PageRange;

use super::abi::len_of;
use super::gate;

/// Faults every page of `range` in as a load would (5.14).
///
/// # Errors
///
/// See the head of the module. Pages before the one that fails are populated.
#[doc(alias = "MADV_POPULATE_READ")]
#[inline]
pub(crate) fn populate_read(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxPopulateRead)
}

/// Faults every page of `range` in as a store would, and so ends the sharing of pages with a
/// forked process (5.14).
///
/// # Errors
///
/// See the head of the module. Pages before the one that fails are populated.
#[doc(alias = "MADV_POPULATE_WRITE")]
#[inline]
pub(crate) fn populate_write(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxPopulateWrite)
}

/// Drops the pages of `range`. Private anonymous memory reads as zeroes afterwards, or is missing
/// where a userfaultfd is told of that; whose bytes they are, is for the caller to know.
///
/// # Errors
///
/// `ENOMEM` if nothing is mapped in a part of the range; `EINVAL` if a part is locked, or not
/// memory.
#[doc(alias = "MADV_DONTNEED")]
#[inline]
pub(crate) fn dontneed(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxDontNeed)
}

/// Leaves the mappings of `range` out of processes that are forked later.
///
/// # Errors
///
/// `ENOMEM` if nothing is mapped in a part of the range, or if there would be too many mappings.
#[doc(alias = "MADV_DONTFORK")]
pub(crate) fn dontfork(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxDontFork)
}

/// Lets processes that are forked later have the mappings of `range` again.
///
/// # Errors
///
/// Those of [`dontfork`].
#[doc(alias = "MADV_DOFORK")]
pub(crate) fn dofork(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxDoFork)
}

/// Asks for huge pages in `range`.
///
/// # Errors
///
/// `EINVAL` if the kernel has none; `ENOMEM` as for [`dontfork`].
#[doc(alias = "MADV_HUGEPAGE")]
pub(crate) fn hugepage(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxHugepage)
}

/// Asks for no huge pages in `range`.
///
/// # Errors
///
/// `EINVAL` if the kernel has none anyway; `ENOMEM` as for [`dontfork`].
#[doc(alias = "MADV_NOHUGEPAGE")]
pub(crate) fn nohugepage(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxNoHugepage)
}

/// Makes `range`, private anonymous memory, read as zeroes in processes that are forked later
/// (4.14).
///
/// # Errors
///
/// `EINVAL` if it is other memory; `ENOMEM` as for [`dontfork`].
#[doc(alias = "MADV_WIPEONFORK")]
pub(crate) fn wipeonfork(range: PageRange) -> Result<(), Errno> {
    advise(range, Advice::LinuxWipeOnFork)
}

/// Tells whether `range`, private anonymous memory, is locked in memory (mlock(2)).
///
/// Nothing says so of one mapping but the text of `/proc/self/smaps`, which walks all page tables.
/// Locked memory is what cannot be called cold (5.4); to call other memory so makes it go first when
/// memory is short, and does nothing else.
#[doc(alias = "MADV_COLD")]
pub(crate) fn is_locked(range: PageRange) -> bool {
    advise(range, Advice::LinuxCold) == Err(Errno::INVAL)
}

#[inline]
fn advise(range: PageRange, advice: Advice) -> Result<(), Errno> {
    let len = match len_of(range) {
        // To do nothing would be a success for madvise(2).
        0 => return Err(Errno::INVAL),
        len => len as usize,
    };
    let start = ptr::with_exposed_provenance_mut::<c_void>(range.address() as usize);
    // SAFETY: see the head of `sys`. Of all advice here only `dontneed` changes what is read.
    unsafe { gate::madvise(start, len, advice as i32) }
}

#[cfg(test)]
mod tests;
