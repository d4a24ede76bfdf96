//! What programs do with the kernel besides: other processes that look in, io_uring, userfaultfd,
//! seccomp. Raw system calls, as a program makes them that knows nothing of this project.

#![allow(dead_code, reason = "each test file uses a part of this")]

pub(crate) mod faults;
pub(crate) mod filter;
pub(crate) mod other;
pub(crate) mod ring;

use rustix::io::Errno;

/// Reads the outcome of a system call that the C library wraps.
fn outcome(result: i64) -> Result<u64, Errno> {
    u64::try_from(result).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).expect("a system call has failed")
    })
}
