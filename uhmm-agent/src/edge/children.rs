//! The functions of the C library that make children, as programs find them under `uhmm run`.
//!
//! They do what they always do. In a child, when all is done, the agent begins to look after it. That
//! is not done by `pthread_atfork`, because it takes memory: an allocator of the program's own may
//! get its locks back in a handler that comes later.
//!
//! `vfork` and what is made of it share their parent's memory, and are left alone. Who makes a child
//! by the system call is not seen here: the child is not managed.

use core::ffi::{CStr, c_char, c_int};
use core::mem::transmute;
use std::sync::OnceLock;

use super::process::next_function;

/// What children do first.
static CHILD: OnceLock<fn()> = OnceLock::new();

/// The functions that are stood in for, once they have been looked up.
static FORK: OnceLock<Fork> = OnceLock::new();
static DAEMON: OnceLock<Daemon> = OnceLock::new();
static FORKPTY: OnceLock<ForkPty> = OnceLock::new();

type Fork = unsafe extern "C" fn() -> c_int;
type Daemon = unsafe extern "C" fn(c_int, c_int) -> c_int;
type ForkPty = unsafe extern "C" fn(
    *mut c_int,
    *mut c_char,
    *const libc::termios,
    *const libc::winsize,
) -> c_int;

/// Has `child` run in each child. The first call counts, and children inherit it.
pub(crate) fn follow(child: fn()) {
    CHILD.get_or_init(|| child);
    // Looked up now: that may allocate, which is not for a child of many threads to do.
    FORK.get_or_init(look_up_fork);
}

/// Does what fork(2) does.
///
/// # Safety
///
/// As for fork(2) of the C library.
pub unsafe fn fork() -> c_int {
    let next = *FORK.get_or_init(look_up_fork);
    // SAFETY: the caller's contract.
    let pid = unsafe { next() };
    seen(pid == 0);
    pid
}

/// Does what daemon(3) does.
///
/// # Safety
///
/// As for daemon(3) of the C library.
pub unsafe fn daemon(stay: c_int, keep: c_int) -> c_int {
    let next = *DAEMON.get_or_init(|| {
        let found = look_up(c"daemon");
        // SAFETY: it is the function of this name, which has this type (unistd.h).
        unsafe { transmute::<*mut core::ffi::c_void, Daemon>(found) }
    });
    // SAFETY: the caller's contract.
    let result = unsafe { next(stay, keep) };
    seen(result == 0);
    result
}

/// Does what forkpty(3) does.
///
/// # Safety
///
/// As for forkpty(3) of the C library.
pub unsafe fn forkpty(
    terminal: *mut c_int,
    name: *mut c_char,
    attributes: *const libc::termios,
    size: *const libc::winsize,
) -> c_int {
    let next = *FORKPTY.get_or_init(|| {
        let found = look_up(c"forkpty");
        // SAFETY: it is the function of this name, which has this type (pty.h).
        unsafe { transmute::<*mut core::ffi::c_void, ForkPty>(found) }
    });
    // SAFETY: the caller's contract.
    let pid = unsafe { next(terminal, name, attributes, size) };
    seen(pid == 0);
    pid
}

/// Has a child followed.
fn seen(is_child: bool) {
    if is_child && let Some(child) = CHILD.get() {
        child();
    }
}

fn look_up_fork() -> Fork {
    let found = look_up(c"fork");
    // SAFETY: it is the function of this name, which has this type (unistd.h).
    unsafe { transmute::<*mut core::ffi::c_void, Fork>(found) }
}

/// Looks up a function of the C library. The process ends where there is none: who called it was
/// linked with one.
fn look_up(name: &CStr) -> *mut core::ffi::c_void {
    next_function(name).unwrap_or_else(|| {
        eprintln!("uhmm: the C library has no function {}", name.to_string_lossy());
        std::process::abort()
    })
}
