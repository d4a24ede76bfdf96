//! The objects that are loaded into this process: the program, its libraries, the vDSO.
//!
//! Their code and their variables are what the servers themselves run on, so they never move.

use core::ffi::{c_int, c_void};

use uhmm::PageRange;

use super::thread::covering;

/// Returns the pages of the segments of all loaded objects, in ascending order, neighbours merged.
///
/// Objects that are loaded while this runs are there or not. The loader's lock is held while the
/// list is made, so nothing that holds it may wait for the caller.
pub(crate) fn segments() -> Vec<PageRange> {
    collect(|info, ranges| {
        // SAFETY: see `each_object`: the headers are those of a loaded object.
        let headers = unsafe { headers_of(info) };
        for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD) {
            let start = info.dlpi_addr.wrapping_add(header.p_vaddr);
            ranges.extend(covering(start, header.p_memsz));
        }
    })
}

/// Returns the pages of the calling thread's thread-local variables, of all objects for which it
/// has any by now, in ascending order, neighbours merged.
pub(crate) fn thread_local_segments() -> Vec<PageRange> {
    collect(|info, ranges| {
        if info.dlpi_tls_data.is_null() {
            return;
        }
        // SAFETY: see `each_object`: the headers are those of a loaded object.
        let headers = unsafe { headers_of(info) };
        for header in headers.iter().filter(|header| header.p_type == libc::PT_TLS) {
            let start = info.dlpi_tls_data.addr() as u64;
            ranges.extend(covering(start, header.p_memsz));
        }
    })
}

/// What is done with each object.
type Visit = fn(&libc::dl_phdr_info, &mut Vec<PageRange>);

/// Gathers what `visit` finds in each object.
fn collect(visit: Visit) -> Vec<PageRange> {
    let mut state: (Visit, Vec<PageRange>) = (visit, Vec::new());
    // SAFETY: `each_object` is what the function wants, and gets the state that it expects, which
    // lives until the call returns.
    unsafe { libc::dl_iterate_phdr(Some(each_object), (&raw mut state).cast::<c_void>()) };
    merge(state.1)
}

/// Visits one object. A panic cannot leave it: the process aborts.
///
/// # Safety
///
/// `info` is one that `dl_iterate_phdr` passes, and `state` what [`collect`] handed to it.
unsafe extern "C" fn each_object(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    state: *mut c_void,
) -> c_int {
    // SAFETY: the caller's contract; nobody else uses the state during the call.
    let (visit, ranges) = unsafe { &mut *state.cast::<(Visit, Vec<PageRange>)>() };
    // SAFETY: the caller's contract: the information is valid while this runs.
    visit(unsafe { &*info }, ranges);
    0
}

/// Returns the program headers of an object.
///
/// # Safety
///
/// `info` is one that `dl_iterate_phdr` passes.
unsafe fn headers_of(info: &libc::dl_phdr_info) -> &[libc::Elf64_Phdr] {
    if info.dlpi_phdr.is_null() {
        return &[];
    }
    // SAFETY: the caller's contract: so many headers are there, and stay while the loader's lock is
    // held, which is as long as `info` lives.
    unsafe { core::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) }
}

/// Sorts ranges and joins those that touch.
fn merge(mut ranges: Vec<PageRange>) -> Vec<PageRange> {
    ranges.sort_by_key(|range| range.first());
    let mut merged: Vec<PageRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.last().checked_add(1).is_none_or(|next| range.first() <= next) => {
                let end = last.last().max(range.last());
                *last = PageRange::from_bounds(last.first(), end).expect("ranges are not empty");
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests;
