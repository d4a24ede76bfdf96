//! Pages that are made present, and mappings that programs ask for.

use core::ffi::{c_int, c_void};
use std::os::fd::AsRawFd as _;

use rustix::io::Errno;

use super::socket::NoSignals;
use crate::node::call::{self, Ours};

/// Makes the pages present as a load or a store would, without raising a signal
/// (`MADV_POPULATE_READ` and `_WRITE`, Linux 5.14).
///
/// # Errors
///
/// `ENOMEM` for a hole, `EINVAL` for what the access is not allowed to, `EFAULT` where it would raise
/// `SIGBUS`.
pub(crate) fn populate(address: u64, bytes: u64, write: bool) -> Result<(), Errno> {
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    let start = usize::try_from(address).map_err(|_| Errno::NOMEM)?;
    let length = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
    let start = core::ptr::with_exposed_provenance_mut(start);
    loop {
        // SAFETY: it changes no contents; what is not mapped is an error.
        if unsafe { libc::madvise(start, length, advice) } == 0 {
            return Ok(());
        }
        match Errno::from_io_error(&std::io::Error::last_os_error()) {
            Some(Errno::INTR | Errno::AGAIN) => {}
            errno => return Err(errno.unwrap_or(Errno::IO)),
        }
    }
}

/// What a program has given to mmap(2), less the descriptor and the offset.
#[derive(Clone, Copy, Debug)]
pub struct MapRequest {
    /// Where.
    pub start: *mut c_void,
    /// How many bytes.
    pub length: usize,
    /// `PROT_*`.
    pub protection: c_int,
    /// `MAP_*`.
    pub flags: c_int,
}

/// Maps one of our nodes, as mmap(2). The pages are new, zeroed, and present at once.
///
/// # Errors
///
/// `ENODEV` for a node that cannot be mapped; `EACCES` as the file was opened; `EINVAL`, `ENOMEM`.
///
/// # Safety
///
/// That of mmap(2): with `MAP_FIXED` it replaces what is there.
pub unsafe fn mmap(ours: Ours, request: MapRequest, offset: i64) -> Result<*mut c_void, Errno> {
    let _signals = NoSignals::begin();
    let (memory, writable) = call::memory(ours, request, offset)?;
    let MapRequest { start, length, protection, flags } = request;
    // SAFETY: the caller's contract.
    let mapped = unsafe { libc::mmap(start, length, protection, flags, memory.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    // What may not be accessed at all is not present either.
    let _ = populate(mapped.expose_provenance() as u64, length as u64, writable);
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_is_an_error_and_no_signal() {
        assert_eq!(populate(0, 4096, false), Err(Errno::NOMEM));
        assert!(populate(1 << 63, 4096, true).is_err());
        let bytes = vec![1_u8; 3 * 4096];
        let start = (bytes.as_ptr().expose_provenance() as u64).next_multiple_of(4096);
        assert_eq!(populate(start, 4096, true), Ok(()));
    }
}
