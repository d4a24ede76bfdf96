//! Threads that the program does not see, and functions that the agent stands in for.

use core::ffi::{CStr, c_void};
use core::mem::MaybeUninit;
use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

/// Starts a thread on which no signal handler of the program ever runs.
///
/// # Errors
///
/// `EAGAIN` above all.
pub(crate) fn start_thread(name: &str, f: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let before = block_signals();
    let started = std::thread::Builder::new().name(name.to_owned()).spawn(f);
    // SAFETY: the set is one that `pthread_sigmask` has returned.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, core::ptr::null_mut()) };
    started.map(drop)
}

/// Blocks all signals for the calling thread, and returns which were blocked.
pub(super) fn block_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: it initialises the set that it is given.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `all` was initialised above, and there is room for the other.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: it was written, or is still zeroes, which are the empty set.
    unsafe { before.assume_init() }
}

/// Gives the calling thread, and those that it makes from now on, descriptors of their own: none but
/// `/dev/null` as 0, 1 and 2. The program cannot close what they open, and its children do not inherit
/// it (`CLONE_FILES` of unshare(2); close_range(2), Linux 5.9).
///
/// To be called on a thread made for this, before it has opened anything.
///
/// # Errors
///
/// `ENOMEM`, `EMFILE`; `ENOSYS` before Linux 5.9; `EPERM` where a sandbox forbids it.
pub(crate) fn own_descriptors() -> Result<(), Errno> {
    // SAFETY: the numbers mean the same as before, in a table of this thread's own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES) }?;
    // SAFETY: in the table of this thread alone, where nobody uses them.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
    if closed != 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::NOSYS));
    }
    for _ in 0..3 {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
        std::mem::forget(null);
    }
    Ok(())
}

/// Finds the function `name` that comes after this library's own.
pub(super) fn next_function(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a string that ends with a zero.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}
