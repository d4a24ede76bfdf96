//! Questions about the kernel and this process that change nothing, and that no other module asks.

use std::ptr;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use uhmm::{PAGE_SIZE, Page};

use super::advise;

/// Tells whether what this process maps from now on is locked in memory (`mlockall(MCL_FUTURE)`).
///
/// It is found out with a page that nobody may access, so that nothing is filled in.
pub(crate) fn locks_future_mappings() -> bool {
    // SAFETY: the kernel chooses where, so that it replaces no other mapping.
    let mapped = unsafe {
        let none = ProtFlags::empty();
        rustix::mm::mmap_anonymous(ptr::null_mut(), PAGE_SIZE, none, MapFlags::PRIVATE)
    };
    let at = match mapped {
        Ok(at) => at,
        // Not even a page may be locked any more.
        Err(Errno::AGAIN) => return true,
        Err(_) => return false,
    };
    let locked = advise::is_locked(Page::containing(at.addr() as u64).into());
    // SAFETY: mapped above, and nobody knows of it.
    let unmapped = unsafe { rustix::mm::munmap(at, PAGE_SIZE) };
    debug_assert_eq!(unmapped, Ok(()), "munmap of a page of our own");
    locked
}

/// Tells whether the kernel knows how to fault pages in for both kinds of access
/// (`MADV_POPULATE_READ` and `MADV_POPULATE_WRITE`, 5.14).
///
/// # Errors
///
/// `EINVAL` if it does not.
pub(crate) fn populate() -> Result<(), Errno> {
    [Advice::LinuxPopulateRead, Advice::LinuxPopulateWrite].into_iter().try_for_each(|advice| {
        // SAFETY: advice about no bytes at all does nothing; whether it is known is looked at
        // first.
        unsafe { rustix::mm::madvise(ptr::null_mut(), 0, advice) }
    })
}

/// Tells whether system calls can be shown to a supervisor that signals do not disturb
/// (`SECCOMP_FILTER_FLAG_NEW_LISTENER`, 5.0, and, if `killable`,
/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, 5.19).
///
/// # Errors
///
/// `EINVAL` if the kernel does not know how; `ENOSYS` or `EPERM` if it is not to be had.
pub(crate) fn seccomp_notification(killable: bool) -> Result<(), Errno> {
    const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;
    let flags =
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | if killable { WAIT_KILLABLE_RECV } else { 0 };
    let no_filter = ptr::null::<libc::sock_fprog>();
    // SAFETY: a filter that cannot be read is not installed. The flags are looked at before that.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, no_filter)
    };
    debug_assert_eq!(result, -1, "there was no filter to install");
    let error = std::io::Error::last_os_error();
    match Errno::from_io_error(&error) {
        Some(Errno::FAULT) => Ok(()),
        errno => Err(errno.unwrap_or(Errno::INVAL)),
    }
}

#[cfg(test)]
mod tests;
