//! What the dynamic loader keeps of the objects that are loaded.
//!
//! A thread of this crate that runs in a shared library finds its thread-local variables by
//! `__tls_get_addr`, which looks at the records of objects that were loaded since it last did. They
//! are in the loader's own memory, or, of what is loaded by `dlopen`, in the C library's heap.

#[cfg(target_env = "gnu")]
use core::ffi::c_char;
use core::ffi::{c_int, c_void};

use uhmm::PageRange;

#[cfg(target_env = "gnu")]
use super::thread::covering;

/// How large a record is taken to be, in bytes: glibc's are smaller.
#[cfg(target_env = "gnu")]
const RECORD_BYTES: u64 = 2048;

/// The head of the record of an object: what `link.h` tells of it.
#[cfg(target_env = "gnu")]
#[repr(C)]
struct LinkMap {
    l_addr: usize,
    l_name: *const c_char,
    l_ld: *const c_void,
    l_next: *const LinkMap,
    l_prev: *const LinkMap,
}

/// What the loader tells debuggers: the head of `struct r_debug` in `link.h`.
#[cfg(target_env = "gnu")]
#[repr(C)]
struct Debug {
    r_version: c_int,
    r_map: *const LinkMap,
}

#[cfg(target_env = "gnu")]
unsafe extern "C" {
    /// The loader's, of which there is one.
    static _r_debug: Debug;
}

/// Returns the pages that the loader's records are in.
///
/// The loader's lock is held while the list is walked, so nothing that holds it may wait for the
/// caller.
pub(crate) fn records() -> Vec<PageRange> {
    let mut found: Vec<PageRange> = Vec::new();
    // SAFETY: `walk` is what the function wants, and gets the list, which lives until the call
    // returns.
    unsafe { libc::dl_iterate_phdr(Some(walk), (&raw mut found).cast::<c_void>()) };
    found
}

/// Returns how often objects were loaded and unloaded so far.
pub(crate) fn changes() -> u64 {
    let mut changes = 0_u64;
    // SAFETY: `count` is what the function wants, and gets the number, which lives until the call
    // returns.
    unsafe { libc::dl_iterate_phdr(Some(count), (&raw mut changes).cast::<c_void>()) };
    changes
}

/// Finds nothing: another C library has no such list, or keeps its records where nothing moves.
///
/// # Safety
///
/// None: nothing is used.
#[cfg(not(target_env = "gnu"))]
unsafe extern "C" fn walk(_: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    1
}

/// Walks the list, at the first object.
///
/// # Safety
///
/// `found` is what [`records`] handed to `dl_iterate_phdr`.
#[cfg(target_env = "gnu")]
unsafe extern "C" fn walk(_: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
    // SAFETY: the caller's contract; nobody else uses the list during the call.
    let found = unsafe { &mut *found.cast::<Vec<PageRange>>() };
    // SAFETY: the loader's variable, as `link.h` declares it.
    let mut next = unsafe { (&raw const _r_debug.r_map).read() };
    // SAFETY: null or a record; the loader's lock, which is held during `dl_iterate_phdr`, keeps
    // records from being freed.
    while let Some(record) = unsafe { next.as_ref() } {
        found.extend(covering(next.addr() as u64, RECORD_BYTES));
        next = record.l_next;
    }
    1
}

/// Reads the counts, at the first object.
///
/// # Safety
///
/// `changes` is what [`changes`] handed to `dl_iterate_phdr`.
unsafe extern "C" fn count(info: *mut libc::dl_phdr_info, _: usize, changes: *mut c_void) -> c_int {
    // SAFETY: the caller's contract: the information is valid while this runs.
    let info = unsafe { &*info };
    // SAFETY: the caller's contract; nobody else uses the number during the call.
    unsafe { *changes.cast::<u64>() = info.dlpi_adds + info.dlpi_subs };
    1
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn each_object_has_a_record_and_nothing_changes_by_itself() {
        let before = changes();
        assert!(before > 0, "the program itself was loaded");
        // The program, the C library and the loader at least; the vdso has one or not.
        let records = records();
        assert!(records.len() >= 3, "{records:?}");
        assert_eq!(changes(), before);
    }
}
