//! The shared library that `uhmm dmirror` preloads into programs: stand-ins for functions of the C
//! library, under which programs find the mirror device's nodes. What they do where it is about those
//! is in `uhmm_agent`; all else goes on to the C library untouched.
//!
//! | module | functions |
//! | --- | --- |
//! | `open` | those that take a path |
//! | `descriptor` | those that take a descriptor |
//! | `next` | how the C library's own are found |
//!
//! Who calls these is a C program. A caller answers for what it passes as it would to the C library's
//! functions, which is meant by `# Safety` everywhere here.

mod descriptor;
mod next;
mod open;

use core::ffi::c_int;

use rustix::io::Errno;
use uhmm_agent::node::call::{self, Ours};
use uhmm_linux::Allocator;

/// What the agent allocates never moves to a device, and is nothing of the program's.
#[global_allocator]
static ALLOCATOR: Allocator = Allocator::new();

/// The number of the build, by which the command knows its own library.
// SAFETY: no other object has a symbol of this name but a library of another build.
#[unsafe(no_mangle)]
pub static UHMM_BUILD: u64 = uhmm_agent::BUILD;

/// Runs when the library has been loaded, before `main`.
extern "C" fn enter() {
    // Looked up now: later it may be in a signal handler, where that must not be.
    descriptor::find_all();
    open::find_all();
    call::enter();
}

// SAFETY: the section is a table of functions to be called once, when everything that this library
// needs has been loaded and begun. It is cdylib and rlib of one source: who links the rlib links
// nothing of this, as nothing refers to it.
#[used]
#[unsafe(link_section = ".init_array")]
static ENTER: extern "C" fn() = enter;

/// Tells whether a descriptor is one of our nodes'. Leaves `errno` as it is.
fn ours(fd: c_int) -> Option<Ours> {
    let before = errno();
    let ours = call::recognise(fd);
    set_errno(before);
    ours
}

fn errno() -> c_int {
    // SAFETY: it returns the address of a number of this thread's.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above; it is valid for as long as the thread is.
    unsafe { *place }
}

fn set_errno(value: c_int) {
    // SAFETY: it returns the address of a number of this thread's.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { *place = value };
}

/// What a function of the C library returns where it fails.
trait Failed {
    const FAILED: Self;
}

impl Failed for c_int {
    const FAILED: c_int = -1;
}

impl Failed for isize {
    const FAILED: isize = -1;
}

impl Failed for i64 {
    const FAILED: i64 = -1;
}

impl<T> Failed for *mut T {
    const FAILED: *mut T = core::ptr::null_mut();
}

/// Fails as the C library's functions do.
fn fail<T: Failed>(errno: Errno) -> T {
    set_errno(errno.raw_os_error());
    T::FAILED
}
