//! System calls on addresses that are numbers.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;
use uhmm::{PAGE_SIZE, Page, PageRange};

use crate::common::memory::TERRITORY;

fn result(returned: isize) -> Result<usize, Errno> {
    usize::try_from(returned).map_err(|_| {
        Errno::from_io_error(&std::io::Error::last_os_error()).expect("a system call has failed")
    })
}

/// Tells whether a process may be made to store there.
fn check(address: u64, length: usize) {
    let inside = TERRITORY.contains(&address) && address + length as u64 <= TERRITORY.end;
    assert!(inside, "{address:#x} is not for tests to store to");
}

fn vector(address: u64, length: usize) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::without_provenance_mut(address as usize), iov_len: length }
}

/// Reads the memory of a process: process_vm_readv(2).
pub(crate) fn read_process(pid: u32, address: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = vector(address, bytes.len());
    // SAFETY: the kernel stores within `bytes`, and only loads from the process.
    result(unsafe {
        libc::process_vm_readv(pid as i32, &raw const local, 1, &raw const remote, 1, 0)
    })
}

/// Writes the memory of this process: process_vm_writev(2).
pub(crate) fn write_process(address: u64, bytes: &[u8]) -> Result<usize, Errno> {
    check(address, bytes.len());
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = vector(address, bytes.len());
    // SAFETY: the kernel loads from `bytes`, and stores where no Rust object is (`check`).
    result(unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) })
}

/// Has the kernel copy from a file to an address: pread(2).
pub(crate) fn read_file(file: BorrowedFd<'_>, address: u64, length: usize) -> Result<usize, Errno> {
    check(address, length);
    let to = std::ptr::without_provenance_mut(address as usize);
    // SAFETY: the kernel stores where no Rust object is (`check`).
    result(unsafe { libc::pread(file.as_raw_fd(), to, length, 0) })
}

/// Has the kernel copy from an address to a file: pwrite(2).
pub(crate) fn write_file(
    file: BorrowedFd<'_>,
    address: u64,
    length: usize,
) -> Result<usize, Errno> {
    let from = std::ptr::without_provenance(address as usize);
    // SAFETY: the kernel loads, or says that it cannot.
    result(unsafe { libc::pwrite(file.as_raw_fd(), from, length, 0) })
}

/// Moves what is in the pages of `from` to `to`, in place of what is there; `from` stays mapped, and
/// is zeroes then: `MREMAP_DONTUNMAP` (Linux 5.7).
pub(crate) fn remap_leaving(from: PageRange, to: Page) -> Result<(), Errno> {
    let bytes = from.len() * PAGE_SIZE;
    check(from.address(), bytes);
    check(to.address(), bytes);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let pointer = |address: u64| std::ptr::without_provenance_mut::<libc::c_void>(address as usize);
    let (old, new) = (pointer(from.address()), pointer(to.address()));
    // SAFETY: no Rust object is at either place (`check`).
    let at = unsafe { libc::mremap(old, bytes, bytes, flags, new) };
    if at == libc::MAP_FAILED { result(-1).map(drop) } else { Ok(()) }
}

/// Forks by the system call, of which the C library knows nothing: the number of the child, or
/// `None` in the child.
pub(crate) fn raw_fork() -> Option<u32> {
    // SAFETY: without a stack and with no flags but the signal this is a fork. The child only loads,
    // compares, and ends itself.
    match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
        0 => None,
        pid if pid > 0 => Some(pid as u32),
        _ => panic!("clone: {}", std::io::Error::last_os_error()),
    }
}

/// Waits for the end of a child, and returns its wait status.
pub(crate) fn wait(pid: u32) -> i32 {
    let mut status = 0;
    // SAFETY: there is room for the status.
    while unsafe { libc::waitpid(pid as i32, &raw mut status, 0) } != pid as i32 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.kind(), std::io::ErrorKind::Interrupted, "waitpid: {error}");
    }
    status
}

/// Sends a process a signal.
pub(crate) fn signal(pid: u32, signal: i32) {
    // SAFETY: accesses no memory.
    let _ = unsafe { libc::kill(pid as i32, signal) };
}
