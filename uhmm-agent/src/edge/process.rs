//! Threads that the program does not see, and functions that the agent stands in for.

use core::ffi::{CStr, c_void};
use core::mem::MaybeUninit;
use std::io;

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
fn block_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: it initialises the set that it is given.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `all` was initialised above, and there is room for the other.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: it was written, or is still zeroes, which are the empty set.
    unsafe { before.assume_init() }
}

/// Finds the function `name` that comes after this library's own.
pub(super) fn next_function(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a string that ends with a zero.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}
