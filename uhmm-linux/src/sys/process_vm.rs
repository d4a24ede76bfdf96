//! The memory of this process, accessed as the kernel accesses it for a system call.
//!
//! `process_vm_readv` and `process_vm_writev` on oneself obey the permissions of the mapping, say
//! `EFAULT` where an access would be a signal, and wait for the userfaultfd where a page is
//! missing. They are how a device's driver reaches memory that the program may unmap at any moment.
//!
//! # Safety argument
//!
//! [`read()`] fills a slice that the caller borrows, so it is safe. [`write()`] changes memory that
//! it does not borrow, as `/proc/self/mem` or a debugger would; it is no `unsafe fn` because no
//! condition on its arguments could make it sound: which memory a device writes, and when, is up to
//! the program that handed the memory to the device, and is its obligation as it is towards
//! hardware.

use core::ffi::c_void;

use rustix::io::Errno;

/// Copies the bytes at `address` into `data`, and returns how many: fewer than asked for if a page
/// after the first cannot be read.
///
/// # Errors
///
/// `EFAULT` if not even the first byte can be read: nothing is mapped there, it may not be read, or
/// it is beyond the end of a file. `EPERM`, `ENOSYS` where a sandbox forbids the call.
pub(crate) fn read(address: u64, data: &mut [u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: data.as_mut_ptr().cast::<c_void>(), iov_len: data.len() };
    let remote = remote(address, data.len())?;
    // SAFETY: the kernel writes at most `data.len()` bytes, and only to `data`, which is borrowed
    // exclusively.
    let read = unsafe { libc::process_vm_readv(own_pid(), &local, 1, &remote, 1, 0) };
    transferred(read)
}

/// Copies `data` to `address`, and returns how many bytes: fewer than asked for if a page after the
/// first cannot be written.
///
/// # Errors
///
/// `EFAULT` if not even the first byte can be written: nothing is mapped there, it may not be
/// written, or it is beyond the end of a file. `EPERM`, `ENOSYS` where a sandbox forbids the call.
pub(crate) fn write(address: u64, data: &[u8]) -> Result<usize, Errno> {
    let local =
        libc::iovec { iov_base: data.as_ptr().cast_mut().cast::<c_void>(), iov_len: data.len() };
    let remote = remote(address, data.len())?;
    // SAFETY: the kernel only reads `data`. What it writes is memory that a device was given, see
    // the safety argument of the module.
    let written = unsafe { libc::process_vm_writev(own_pid(), &local, 1, &remote, 1, 0) };
    transferred(written)
}

/// Returns the other side of a transfer.
fn remote(address: u64, bytes: usize) -> Result<libc::iovec, Errno> {
    let address = usize::try_from(address).map_err(|_| Errno::FAULT)?;
    Ok(libc::iovec { iov_base: core::ptr::without_provenance_mut(address), iov_len: bytes })
}

/// Returns the number of this process. It is asked each time, 0.1 us, because a child made by
/// `clone` that remembered its parent's would access the parent.
fn own_pid() -> libc::pid_t {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// Reads the outcome of a transfer.
fn transferred(bytes: isize) -> Result<usize, Errno> {
    usize::try_from(bytes).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}

#[cfg(test)]
mod tests;
