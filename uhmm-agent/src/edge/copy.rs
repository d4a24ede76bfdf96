//! Copies between this library and the program, to and from addresses that may be anything.
//!
//! The kernel makes them: process_vm_readv(2) and its like on the process itself, or reading from and
//! writing to a file. Where nothing is mapped, or not for this, they fail with `EFAULT`, as a system
//! call does, and no signal is raised. No reference to the program's memory ever exists.

use core::ffi::c_void;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;

/// How many bytes are copied at a time: the kernel takes so many for sure (`MAX_RW_COUNT`).
const MOST: usize = 1 << 30;

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn part(start: *mut c_void, bytes: usize) -> libc::iovec {
    libc::iovec { iov_base: start, iov_len: bytes }
}

fn at(address: u64) -> Result<*mut c_void, Errno> {
    let address = usize::try_from(address).map_err(|_| Errno::FAULT)?;
    Ok(core::ptr::with_exposed_provenance_mut(address))
}

/// Copies what `copy` copies until all is: it is given how many bytes are done, and how many are to be
/// tried, and returns how many it has copied.
fn all(bytes: usize, mut copy: impl FnMut(usize, usize) -> isize) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes {
        match usize::try_from(copy(done, (bytes - done).min(MOST))) {
            // Less than there was to be copied, and then nothing: it ends in the middle.
            Ok(0) => return Err(Errno::FAULT),
            Ok(copied) => done += copied,
            Err(_) => match last() {
                Errno::INTR => {}
                errno => return Err(errno),
            },
        }
    }
    Ok(())
}

/// Copies from the program's memory at `address`.
///
/// # Errors
///
/// `EFAULT`.
pub(crate) fn read(address: u64, into: &mut [u8]) -> Result<(), Errno> {
    let (from, to, bytes) = (at(address)?, into.as_mut_ptr(), into.len());
    // SAFETY: `into` has room for as many bytes.
    unsafe { read_raw(from, to, bytes) }
}

/// Copies from the program's memory at `address` as far as there is any, and returns how much it was.
/// May be called in a signal handler.
pub(crate) fn read_some(address: u64, into: &mut [u8]) -> usize {
    let Ok(from) = at(address) else { return 0 };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let (local, remote) = (part(into.as_mut_ptr().cast(), into.len()), part(from, into.len()));
    // SAFETY: `into` has room for as many bytes; `remote` may be any address.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(got).unwrap_or(0)
}

/// Appends `bytes` bytes of the program's memory at `address`.
///
/// # Errors
///
/// `EFAULT`, and `ENOMEM` where there is no room. What was there before stays as it is.
pub(crate) fn append(address: u64, bytes: usize, to: &mut Vec<u8>) -> Result<(), Errno> {
    to.try_reserve(bytes).map_err(|_| Errno::NOMEM)?;
    let from = at(address)?;
    let room = to.spare_capacity_mut();
    // SAFETY: there is room for as many bytes, reserved above.
    unsafe { read_raw(from, room.as_mut_ptr().cast(), bytes) }?;
    let length = to.len() + bytes;
    // SAFETY: all of them have been written.
    unsafe { to.set_len(length) };
    Ok(())
}

/// Copies `bytes` bytes from any address.
///
/// # Safety
///
/// `to` is valid for writes of as many bytes.
unsafe fn read_raw(from: *mut c_void, to: *mut u8, bytes: usize) -> Result<(), Errno> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    all(bytes, |done, most| {
        let (to, from) = (to.wrapping_add(done), from.wrapping_byte_add(done));
        let (local, remote) = (part(to.cast(), most), part(from, most));
        // SAFETY: `local` is within what the caller has promised; `remote` is but read, by the kernel,
        // and may be any address.
        unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) }
    })
}

/// Copies to the program's memory at `address`.
///
/// # Errors
///
/// `EFAULT`. What is before the address that it is about may have been written.
pub(crate) fn write(address: u64, from: &[u8]) -> Result<(), Errno> {
    let to = at(address)?;
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    all(from.len(), |done, most| {
        let from = from[done..].as_ptr().cast_mut().cast();
        let (local, remote) = (part(from, most), part(to.wrapping_byte_add(done), most));
        // SAFETY: `local` is within `from`, and only read. The program has named `remote` for the
        // kernel to write to; memory of this library or of Rust's it cannot have got rightly.
        unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) }
    })
}

/// Writes the program's memory at `address` to the beginning of `file`.
///
/// # Errors
///
/// `EFAULT`, `ENOMEM` and `ENOSPC`.
pub(crate) fn to_file(file: BorrowedFd<'_>, address: u64, bytes: usize) -> Result<(), Errno> {
    let from = at(address)?;
    all(bytes, |done, most| {
        let from = from.wrapping_byte_add(done);
        let offset = libc::off_t::try_from(done).unwrap_or(libc::off_t::MAX);
        // SAFETY: the kernel reads from there, which may be any address.
        unsafe { libc::pwrite(file.as_raw_fd(), from, most, offset) }
    })
}

/// Reads the beginning of `file` to the program's memory at `address`.
///
/// # Errors
///
/// `EFAULT`, also where the file is shorter.
pub(crate) fn from_file(file: BorrowedFd<'_>, address: u64, bytes: usize) -> Result<(), Errno> {
    let to = at(address)?;
    all(bytes, |done, most| {
        let to = to.wrapping_byte_add(done);
        let offset = libc::off_t::try_from(done).unwrap_or(libc::off_t::MAX);
        // SAFETY: as for `write`: the program has named the memory.
        unsafe { libc::pread(file.as_raw_fd(), to, most, offset) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    fn address(bytes: &[u8]) -> u64 {
        bytes.as_ptr().expose_provenance() as u64
    }

    #[test]
    fn bytes_are_copied() {
        let from = vec![7_u8; 10_000];
        let mut to = vec![0_u8; 10_000];
        read(address(&from), &mut to).expect("it is there");
        assert_eq!(from, to);
        let to_address = to.as_mut_ptr().expose_provenance() as u64;
        write(to_address + 1, &[1, 2, 3]).expect("it is there");
        assert_eq!(to[..5], [7, 1, 2, 3, 7]);
        let mut more = vec![9];
        append(to_address, 4, &mut more).expect("it is there");
        assert_eq!(more, [9, 7, 1, 2, 3]);
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("room");
        to_file(file.as_fd(), to_address, 10_000).expect("it is there");
        let mut back = vec![0_u8; 10_000];
        let back_address = back.as_mut_ptr().expose_provenance() as u64;
        from_file(file.as_fd(), back_address, 10_000).expect("it is there");
        assert_eq!(back, to);
        assert_eq!(from_file(file.as_fd(), back_address, 10_001), Err(Errno::FAULT));
    }

    #[test]
    fn what_ends_early_is_copied_as_far_as_it_goes() {
        // SAFETY: the kernel chooses where.
        let two = unsafe {
            let access = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
            let flags = rustix::mm::MapFlags::PRIVATE;
            rustix::mm::mmap_anonymous(core::ptr::null_mut(), 8192, access, flags)
        }
        .expect("there is room");
        // SAFETY: the second of two pages that were mapped just now.
        unsafe { rustix::mm::munmap(two.wrapping_byte_add(4096), 4096) }.expect("it is mapped");
        let mut bytes = [1; 8];
        assert_eq!(read_some(two.expose_provenance() as u64 + 4092, &mut bytes), 4);
        assert_eq!(bytes, [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(read_some(0, &mut bytes), 0);
        // SAFETY: the first of them.
        unsafe { rustix::mm::munmap(two, 4096) }.expect("it is mapped");
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("room");
        for address in [0, 1, 4096, u64::MAX, u64::MAX - 4095, 1 << 63, 1 << 47] {
            assert_eq!(read(address, &mut [0; 64]), Err(Errno::FAULT), "{address:#x}");
            assert_eq!(write(address, &[0; 64]), Err(Errno::FAULT), "{address:#x}");
            let mut to = vec![3];
            assert_eq!(append(address, 64, &mut to), Err(Errno::FAULT), "{address:#x}");
            assert_eq!(to, [3]);
            assert_eq!(to_file(file.as_fd(), address, 64), Err(Errno::FAULT), "{address:#x}");
        }
        assert_eq!(append(0, usize::MAX / 2, &mut Vec::new()), Err(Errno::NOMEM));
    }
}
