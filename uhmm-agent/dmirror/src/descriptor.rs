//! Stand-ins for functions that take a descriptor.

use core::ffi::{c_int, c_uint, c_ulong, c_void};

use libc::{FILE, iovec, off_t};
use rustix::io::Errno;
use uhmm_agent::node::call::{self, MapRequest};

use crate::next::stand_ins;
use crate::ours;

/// Answers for a node what none of them can do.
fn no_transfer(fd: c_int) -> Option<isize> {
    ours(fd).map(|_| crate::fail(Errno::INVAL))
}

/// Maps a node, if the descriptor is one's.
fn mapped(request: MapRequest, fd: c_int, offset: off_t) -> Option<*mut c_void> {
    if request.flags & libc::MAP_ANONYMOUS != 0 || fd < 0 {
        return None;
    }
    let ours = ours(fd)?;
    // SAFETY: the contract of mmap(2), which the caller has.
    let mapped = unsafe { call::mmap(ours, request, offset) };
    Some(mapped.unwrap_or_else(|errno| {
        crate::set_errno(errno.raw_os_error());
        libc::MAP_FAILED
    }))
}

/// Closes what is there, and waits for what follows if it was ours. `None` if it is not.
fn closed<T: Copy>(fd: c_int, close: impl FnOnce() -> Option<T>) -> Option<T> {
    let ours = ours(fd)?;
    let answer = close()?;
    let before = crate::errno();
    call::closed(ours);
    crate::set_errno(before);
    Some(answer)
}

/// Replaces one descriptor by another, as dup2(2): that closes it, unless it is the same.
fn replaced(old: c_int, new: c_int, replace: impl FnOnce() -> Option<c_int>) -> Option<c_int> {
    if old == new { None } else { closed(new, replace) }
}

/// The descriptor of a stream.
fn number_of(stream: *mut FILE) -> c_int {
    if stream.is_null() {
        return -1;
    }
    // SAFETY: the caller of fclose has passed an open stream.
    unsafe { libc::fileno(stream) }
}

/// Calls the function that is stood in for.
macro_rules! next {
    ($name:ident($($arg:expr),*)) => {
        // SAFETY: the contract of the function, which the caller has.
        found::$name.get().map(|next| unsafe { next($($arg),*) })
    };
}

stand_ins! {
    /// ioctl(2).
    fn ioctl(fd: c_int, number: c_ulong, argument: *mut c_void) -> c_int => {
        let answer = call::ioctl(ours(fd)?, number, argument.expose_provenance() as u64)?;
        Some(answer.map_or_else(crate::fail, |()| 0))
    };
    /// mmap(2).
    fn mmap(
        start: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: off_t,
    ) -> *mut c_void => mapped(MapRequest { start, length, protection, flags }, fd, offset);
    /// mmap(2), by its name for large files.
    fn mmap64(
        start: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: off_t,
    ) -> *mut c_void => mapped(MapRequest { start, length, protection, flags }, fd, offset);

    /// read(2).
    fn read(fd: c_int, to: *mut c_void, bytes: usize) -> isize => no_transfer(fd);
    /// read(2), as `_FORTIFY_SOURCE` calls it.
    fn __read_chk(fd: c_int, to: *mut c_void, bytes: usize, room: usize) -> isize
        => no_transfer(fd);
    /// pread(2).
    fn pread(fd: c_int, to: *mut c_void, bytes: usize, offset: off_t) -> isize => no_transfer(fd);
    /// pread(2), by its name for large files.
    fn pread64(fd: c_int, to: *mut c_void, bytes: usize, offset: off_t) -> isize
        => no_transfer(fd);
    /// pread(2), as `_FORTIFY_SOURCE` calls it.
    fn __pread_chk(fd: c_int, to: *mut c_void, bytes: usize, offset: off_t, room: usize) -> isize
        => no_transfer(fd);
    /// pread(2), as `_FORTIFY_SOURCE` calls it for large files.
    fn __pread64_chk(fd: c_int, to: *mut c_void, bytes: usize, offset: off_t, room: usize) -> isize
        => no_transfer(fd);
    /// readv(2).
    fn readv(fd: c_int, parts: *const iovec, count: c_int) -> isize => no_transfer(fd);
    /// preadv(2).
    fn preadv(fd: c_int, parts: *const iovec, count: c_int, offset: off_t) -> isize
        => no_transfer(fd);
    /// preadv(2), by its name for large files.
    fn preadv64(fd: c_int, parts: *const iovec, count: c_int, offset: off_t) -> isize
        => no_transfer(fd);
    /// write(2).
    fn write(fd: c_int, from: *const c_void, bytes: usize) -> isize => no_transfer(fd);
    /// pwrite(2).
    fn pwrite(fd: c_int, from: *const c_void, bytes: usize, offset: off_t) -> isize
        => no_transfer(fd);
    /// pwrite(2), by its name for large files.
    fn pwrite64(fd: c_int, from: *const c_void, bytes: usize, offset: off_t) -> isize
        => no_transfer(fd);
    /// writev(2).
    fn writev(fd: c_int, parts: *const iovec, count: c_int) -> isize => no_transfer(fd);
    /// pwritev(2).
    fn pwritev(fd: c_int, parts: *const iovec, count: c_int, offset: off_t) -> isize
        => no_transfer(fd);
    /// pwritev(2), by its name for large files.
    fn pwritev64(fd: c_int, parts: *const iovec, count: c_int, offset: off_t) -> isize
        => no_transfer(fd);
    /// lseek(2).
    fn lseek(fd: c_int, offset: off_t, origin: c_int) -> off_t
        => Some(call::seek(ours(fd)?, offset, origin).unwrap_or_else(crate::fail));
    /// lseek(2), by its name for large files.
    fn lseek64(fd: c_int, offset: off_t, origin: c_int) -> off_t
        => Some(call::seek(ours(fd)?, offset, origin).unwrap_or_else(crate::fail));

    /// close(2).
    fn close(fd: c_int) -> c_int => closed(fd, || next!(close(fd)));
    /// dup2(2).
    fn dup2(old: c_int, new: c_int) -> c_int => replaced(old, new, || next!(dup2(old, new)));
    /// dup3(2).
    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int
        => replaced(old, new, || next!(dup3(old, new, flags)));
    /// close_range(2).
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int => {
        let node = first_of_ours(first, last)?;
        closed(node, || next!(close_range(first, last, flags)))
    };
    /// fclose(3).
    fn fclose(stream: *mut FILE) -> c_int => closed(number_of(stream), || next!(fclose(stream)));
}

/// The first descriptor of these that is ours.
fn first_of_ours(first: c_uint, last: c_uint) -> Option<c_int> {
    let folder = rustix::fs::open(
        "/proc/self/fd",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    );
    let mut space = [core::mem::MaybeUninit::uninit(); 2048];
    let mut entries = rustix::fs::RawDir::new(folder.ok()?, &mut space);
    while let Some(Ok(entry)) = entries.next() {
        let number = core::str::from_utf8(entry.file_name().to_bytes()).ok();
        let number = number.and_then(|number| number.parse::<c_uint>().ok());
        if let Some(number) = number.filter(|number| (first..=last).contains(number))
            && let Ok(fd) = c_int::try_from(number)
            && ours(fd).is_some()
        {
            return Some(fd);
        }
    }
    None
}
