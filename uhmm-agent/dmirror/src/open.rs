//! Stand-ins for functions that take a path.

use core::ffi::{CStr, c_char, c_int};

use libc::{FILE, mode_t};
use rustix::io::Errno;
use uhmm_agent::node::{Node, call};

use crate::next::stand_ins;

const CREATE: c_int = libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC;

/// Opens the node at a path, if there is one.
fn opened(path: *const c_char, flags: c_int) -> Option<c_int> {
    let node = node_at(path)?;
    Some(call::open(node, flags).unwrap_or_else(crate::fail))
}

/// The node at a path. Leaves `errno` as it is.
fn node_at(path: *const c_char) -> Option<Node> {
    let before = crate::errno();
    let node = call::node_at(path);
    crate::set_errno(before);
    node
}

/// Opens the node at a path as a stream, if there is one.
fn stream(path: *const c_char, mode: *const c_char) -> Option<*mut FILE> {
    let node = node_at(path)?;
    // SAFETY: the caller of fopen has passed a string.
    let words = unsafe { CStr::from_ptr(mode) }.to_bytes();
    let Some(flags) = flags_of(words) else { return Some(crate::fail(Errno::INVAL)) };
    let fd = match call::open(node, flags) {
        Ok(fd) => fd,
        Err(errno) => return Some(crate::fail(errno)),
    };
    // SAFETY: a descriptor that was opened for this, and the caller's string.
    let stream = unsafe { libc::fdopen(fd, mode) };
    if stream.is_null() {
        // SAFETY: nobody else knows of it.
        unsafe { libc::close(fd) };
    }
    Some(stream)
}

/// What fopen(3) has opened for these words.
fn flags_of(mode: &[u8]) -> Option<c_int> {
    let both = mode.contains(&b'+');
    let access = |one| if both { libc::O_RDWR } else { one };
    let flags = match mode.first()? {
        b'r' => access(libc::O_RDONLY),
        b'w' => access(libc::O_WRONLY) | libc::O_CREAT | libc::O_TRUNC,
        b'a' => access(libc::O_WRONLY) | libc::O_CREAT | libc::O_APPEND,
        _ => return None,
    };
    let exclusive = if mode.contains(&b'x') { libc::O_EXCL } else { 0 };
    let close = if mode.contains(&b'e') { libc::O_CLOEXEC } else { 0 };
    Some(flags | exclusive | close)
}

/// What access(2) answers for a node, if there is one at the path.
fn accessible(path: *const c_char, mode: c_int) -> Option<c_int> {
    node_at(path)?;
    Some(if mode & libc::X_OK != 0 { crate::fail(Errno::ACCESS) } else { 0 })
}

stand_ins! {
    /// open(2).
    fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int => opened(path, flags);
    /// open(2), by its name for large files.
    fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int => opened(path, flags);
    /// open(2), as `_FORTIFY_SOURCE` calls it.
    fn __open_2(path: *const c_char, flags: c_int) -> c_int => opened(path, flags);
    /// open(2), as `_FORTIFY_SOURCE` calls it for large files.
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int => opened(path, flags);
    /// openat(2). The nodes have absolute paths.
    fn openat(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int
        => opened(path, flags);
    /// openat(2), by its name for large files.
    fn openat64(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int
        => opened(path, flags);
    /// openat(2), as `_FORTIFY_SOURCE` calls it.
    fn __openat_2(folder: c_int, path: *const c_char, flags: c_int) -> c_int
        => opened(path, flags);
    /// openat(2), as `_FORTIFY_SOURCE` calls it for large files.
    fn __openat64_2(folder: c_int, path: *const c_char, flags: c_int) -> c_int
        => opened(path, flags);
    /// creat(2).
    fn creat(path: *const c_char, mode: mode_t) -> c_int => opened(path, CREATE);
    /// creat(2), by its name for large files.
    fn creat64(path: *const c_char, mode: mode_t) -> c_int => opened(path, CREATE);
    /// fopen(3).
    fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE => stream(path, mode);
    /// fopen(3), by its name for large files.
    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE => stream(path, mode);
    /// access(2).
    fn access(path: *const c_char, mode: c_int) -> c_int => accessible(path, mode);
    /// faccessat(2).
    fn faccessat(folder: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int
        => accessible(path, mode);
    /// euidaccess(3).
    fn euidaccess(path: *const c_char, mode: c_int) -> c_int => accessible(path, mode);
    /// eaccess(3).
    fn eaccess(path: *const c_char, mode: c_int) -> c_int => accessible(path, mode);
}
