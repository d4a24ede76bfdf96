//! Pages that are pinned for long, as a device's driver pins what it transfers to: buffers registered
//! with an `io_uring` (`FOLL_PIN | FOLL_LONGTERM | FOLL_WRITE` in the kernel's words). Nothing is ever
//! submitted to it.

use core::ptr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use rustix::io::Errno;

/// Commands of io_uring_register(2).
const REGISTER_BUFFERS: u32 = 0;
const UNREGISTER_BUFFERS: u32 = 1;

/// The bytes of `struct io_uring_params`.
const PARAMETERS: usize = 120;

/// The largest buffer (`SZ_1G`).
pub(crate) const MOST: u64 = 1 << 30;

/// Pages that stay where they are until this is dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    ring: OwnedFd,
}

impl Pinned {
    /// Pins `bytes` bytes at `address`, which are made present and writable first: [`MOST`] at most.
    ///
    /// # Errors
    ///
    /// `EFAULT`, `ENOMEM` (also by `RLIMIT_MEMLOCK`), `EOPNOTSUPP` for file memory; `EPERM` and `ENOSYS`
    /// where `io_uring` is forbidden.
    pub(crate) fn new(address: u64, bytes: u64) -> Result<Pinned, Errno> {
        let mut parameters = [0_u32; PARAMETERS / 4];
        // SAFETY: there is room for the structure, and all zeroes asks for nothing special. One entry.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        let ring = i32::try_from(ring).map_err(|_| Errno::BADF)?;
        if ring < 0 {
            return Err(last());
        }
        // SAFETY: the kernel has just made it, and nobody else knows of it.
        let ring = unsafe { OwnedFd::from_raw_fd(ring) };
        let start = usize::try_from(address).map_err(|_| Errno::FAULT)?;
        let length = usize::try_from(bytes).map_err(|_| Errno::FAULT)?;
        let buffer =
            libc::iovec { iov_base: ptr::with_exposed_provenance_mut(start), iov_len: length };
        // SAFETY: the kernel copies the one element. That the pages are pinned changes nothing for who
        // uses them, as nothing is submitted.
        let registered = unsafe {
            let call = libc::SYS_io_uring_register;
            libc::syscall(call, ring.as_raw_fd(), REGISTER_BUFFERS, &raw const buffer, 1)
        };
        if registered == 0 { Ok(Pinned { ring }) } else { Err(last()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // So that it has happened on return; closing the ring leaves it for later.
        // SAFETY: it takes no argument.
        let unregistered = unsafe {
            let call = libc::SYS_io_uring_register;
            libc::syscall(call, self.ring.as_raw_fd(), UNREGISTER_BUFFERS, ptr::null::<u8>(), 0)
        };
        debug_assert_eq!(unregistered, 0);
    }
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
