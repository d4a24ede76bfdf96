//! The shared library that `uhmm run` preloads into programs. All that it does is in `uhmm_agent`.

use core::ffi::{c_char, c_int};

use uhmm_linux::Allocator;

/// What the agent allocates never moves to a device, and is nothing of the program's.
#[global_allocator]
static ALLOCATOR: Allocator = Allocator::new();

/// Runs when the library has been loaded, before `main`.
extern "C" fn enter() {
    uhmm_agent::enter();
}

// SAFETY: the section is a table of functions to be called once, when everything that this library
// needs has been loaded and begun. It is cdylib and rlib of one source: who links the rlib links
// nothing of this, as nothing refers to it.
#[used]
#[unsafe(link_section = ".init_array")]
static ENTER: extern "C" fn() = enter;

/// The number of the build, by which the command knows its own library.
// SAFETY: no other object has a symbol of this name but a library of another build.
#[unsafe(no_mangle)]
pub static UHMM_BUILD: u64 = uhmm_agent::BUILD;

/// Stands in for fork(2) of the C library.
///
/// # Safety
///
/// That of fork(2).
// SAFETY: it does what the C library's does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fork() -> c_int {
    // SAFETY: the caller's contract.
    unsafe { uhmm_agent::children::fork() }
}

/// Stands in for daemon(3) of the C library.
///
/// # Safety
///
/// That of daemon(3).
// SAFETY: it does what the C library's does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn daemon(stay: c_int, keep: c_int) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { uhmm_agent::children::daemon(stay, keep) }
}

/// Stands in for forkpty(3) of the C library.
///
/// # Safety
///
/// That of forkpty(3).
// SAFETY: it does what the C library's does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forkpty(
    terminal: *mut c_int,
    name: *mut c_char,
    attributes: *const libc::termios,
    size: *const libc::winsize,
) -> c_int {
    // SAFETY: the caller's contract.
    unsafe { uhmm_agent::children::forkpty(terminal, name, attributes, size) }
}
