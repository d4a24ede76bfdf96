//! The device as a program finds it: by paths, numbers and addresses, and the C library.

use core::ffi::{c_int, c_void};
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::common::PATIENCE;

/// The bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// The commands, by their numbers.
pub(crate) const READ: u64 = 0xc028_4800;
pub(crate) const WRITE: u64 = READ + 1;
pub(crate) const TO_DEV: u64 = READ + 2;
pub(crate) const TO_SYS: u64 = READ + 3;
pub(crate) const SNAPSHOT: u64 = READ + 4;
pub(crate) const EXCLUSIVE: u64 = READ + 5;
pub(crate) const CHECK_EXCLUSIVE: u64 = READ + 6;
pub(crate) const RELEASE: u64 = READ + 7;
pub(crate) const FLAGS: u64 = READ + 8;

/// Private memory without a file.
pub(crate) const ANONYMOUS: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// What a command said: pages and faults, or an error's number.
pub(crate) type Counts = Result<(u64, u64), c_int>;

pub(crate) fn errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().expect("a system call has failed")
}

/// Opens a file by open(2).
pub(crate) fn open(path: &str, flags: c_int) -> Result<c_int, c_int> {
    let path = CString::new(path).expect("no zeroes");
    // SAFETY: the path is a string.
    let fd = unsafe { libc::open(path.as_ptr(), flags) };
    if fd >= 0 { Ok(fd) } else { Err(errno()) }
}

/// Opens a unit.
#[track_caller]
pub(crate) fn unit(number: u8) -> c_int {
    open(&format!("/dev/hmm_dmirror{number}"), libc::O_RDWR).expect("there is one")
}

#[track_caller]
pub(crate) fn close(fd: c_int) {
    // SAFETY: a descriptor of the test's, which does not use it any more.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

/// Calls ioctl(2) with a structure at any address.
pub(crate) fn raw_ioctl(fd: c_int, command: u64, structure: *mut c_void) -> Result<(), c_int> {
    // SAFETY: what is no structure is an error, which the callers are about.
    if unsafe { libc::ioctl(fd, command, structure) } == 0 { Ok(()) } else { Err(errno()) }
}

/// Asks the device for something.
pub(crate) fn command(fd: c_int, command: u64, addr: u64, npages: u64, ptr: u64) -> Counts {
    let mut structure = [addr, ptr, npages, 77, 88];
    let done = raw_ioctl(fd, command, structure.as_mut_ptr().cast());
    let [.., cpages, faults] = structure;
    assert_eq!(structure[..3], [addr, ptr, npages], "what goes in stays");
    match done {
        Ok(()) => Ok((cpages, faults)),
        Err(errno) => {
            assert_eq!((cpages, faults), (77, 88), "an error leaves the structure alone");
            Err(errno)
        }
    }
}

/// Pages of this program's.
#[derive(Debug)]
pub(crate) struct Pages {
    pub(crate) start: *mut u8,
    pub(crate) count: usize,
}

impl Pages {
    /// New ones, by mmap(2).
    #[track_caller]
    pub(crate) fn map(count: usize, protection: c_int, flags: c_int, fd: c_int) -> Pages {
        let (none, length) = (core::ptr::null_mut(), count * PAGE);
        // SAFETY: the kernel chooses where.
        let start = unsafe { libc::mmap(none, length, protection, flags, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", errno());
        Pages { start: start.cast(), count }
    }

    /// Private memory, each page of which is full of its number, beginning with `first`.
    #[track_caller]
    pub(crate) fn filled(count: usize, first: u8) -> Pages {
        let pages = Pages::map(count, libc::PROT_READ | libc::PROT_WRITE, ANONYMOUS, -1);
        pages.fill_all(first);
        pages
    }

    /// Fills each page with its number, beginning with `first`.
    pub(crate) fn fill_all(&self, first: u8) {
        for page in 0..self.count {
            self.fill(page, first.wrapping_add(page as u8));
        }
    }

    /// New ones of anonymous memory, with more after them that cannot be accessed than a request of the
    /// tests reaches: what comes then is not theirs. It stays mapped.
    #[track_caller]
    pub(crate) fn fenced(count: usize, protection: c_int, sharing: c_int) -> Pages {
        const FENCE: usize = 1024;
        let fence = Pages::map(count + FENCE, libc::PROT_NONE, ANONYMOUS, -1);
        let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let (start, length) = (fence.start, count * PAGE);
        core::mem::forget(fence);
        // SAFETY: over what was mapped for this just now.
        let mapped = unsafe { libc::mmap(start.cast(), length, protection, flags, -1, 0) };
        assert_eq!(mapped, start.cast());
        Pages { start, count }
    }

    pub(crate) fn fill(&self, page: usize, with: u8) {
        assert!(page < self.count);
        let start = self.start.wrapping_add(page * PAGE);
        // SAFETY: a page of these, which nobody else uses now.
        unsafe { start.write_bytes(with, PAGE) };
    }

    pub(crate) fn addr(&self) -> u64 {
        self.start.expose_provenance() as u64
    }

    /// The first byte of each page.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let first = |page: usize| {
            // SAFETY: mapped, and read by nobody else at the same time as it is written.
            unsafe { self.start.wrapping_add(page * PAGE).read_volatile() }
        };
        (0..self.count).map(first).collect()
    }

    pub(crate) fn protect(&self, protection: c_int) {
        // SAFETY: memory of the test's.
        let done = unsafe { libc::mprotect(self.start.cast(), self.count * PAGE, protection) };
        assert_eq!(done, 0);
    }

    /// Has the device do something to all of them, with this buffer.
    pub(crate) fn ask(&self, fd: c_int, number: u64, buffer: &mut [u8]) -> Counts {
        let ptr = buffer.as_mut_ptr().expose_provenance() as u64;
        command(fd, number, self.addr(), self.count as u64, ptr)
    }

    /// What the CPU's page table says.
    #[track_caller]
    pub(crate) fn snapshot(&self, fd: c_int) -> Vec<u8> {
        let mut bytes = vec![0xee; self.count];
        assert_eq!(self.ask(fd, SNAPSHOT, &mut bytes), Ok((self.count as u64, 0)));
        bytes
    }

    /// What the device reads: the first byte of each page.
    #[track_caller]
    pub(crate) fn device_reads(&self, fd: c_int) -> Vec<u8> {
        let mut bytes = vec![0xee; self.count * PAGE];
        let done = self.ask(fd, READ, &mut bytes).map(|(pages, _)| pages);
        assert_eq!(done, Ok(self.count as u64));
        bytes.into_iter().step_by(PAGE).collect()
    }

    /// Moves them to a unit.
    #[track_caller]
    pub(crate) fn to_device(&self, fd: c_int) {
        let mut bytes = vec![0; self.count * PAGE];
        assert_eq!(self.ask(fd, TO_DEV, &mut bytes), Ok((self.count as u64, 0)));
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and used by nobody any more.
        unsafe { libc::munmap(self.start.cast(), self.count * PAGE) };
    }
}

/// A child of this process.
#[derive(Debug)]
pub(crate) struct Child(c_int);

impl Child {
    /// Makes one by fork(2), which runs `f` and ends.
    pub(crate) fn fork(f: impl FnOnce()) -> Child {
        // SAFETY: the child goes on with what this thread does.
        Child::after(unsafe { libc::fork() }, f)
    }

    /// Makes one by the system call, of which the C library knows nothing.
    pub(crate) fn clone(f: impl FnOnce()) -> Child {
        // SAFETY: no stack and no other pointer: the child goes on here, with memory of its own.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        Child::after(c_int::try_from(pid).expect("numbers of processes are small"), f)
    }

    fn after(pid: c_int, f: impl FnOnce()) -> Child {
        if pid == 0 {
            let status = i32::from(catch_unwind(AssertUnwindSafe(f)).is_err());
            // SAFETY: it ends the child, without what is to be done once.
            unsafe { libc::_exit(status) };
        }
        assert!(pid > 0, "{}", errno());
        Child(pid)
    }

    /// Waits until it has ended, which it must do well.
    #[track_caller]
    pub(crate) fn ends_well(self) {
        let began = Instant::now();
        let mut status = -1;
        loop {
            // SAFETY: there is room for the status.
            match unsafe { libc::waitpid(self.0, &raw mut status, libc::WNOHANG) } {
                0 => {}
                pid => break assert_eq!(pid, self.0),
            }
            assert!(began.elapsed() < PATIENCE, "the child does not end");
            std::thread::sleep(core::time::Duration::from_millis(1));
        }
        assert_eq!(status, 0, "of the child");
    }
}

/// A pipe of which one end is in another process: something has happened there.
#[derive(Debug)]
pub(crate) struct Signal([c_int; 2]);

impl Signal {
    pub(crate) fn new() -> Signal {
        let mut both = [-1; 2];
        // SAFETY: there is room for two descriptors.
        assert_eq!(unsafe { libc::pipe(both.as_mut_ptr()) }, 0);
        Signal(both)
    }

    /// The ends to read from and to write to.
    pub(crate) fn ends(&self) -> [c_int; 2] {
        self.0
    }

    pub(crate) fn send(&self) {
        // SAFETY: one byte.
        assert_eq!(unsafe { libc::write(self.0[1], b"x".as_ptr().cast(), 1) }, 1);
    }

    pub(crate) fn wait(&self) {
        let mut byte = 0_u8;
        // SAFETY: there is room for one byte.
        assert_eq!(unsafe { libc::read(self.0[0], (&raw mut byte).cast(), 1) }, 1);
    }

    /// Waits until nobody else has the pipe.
    pub(crate) fn wait_for_end(&self) {
        close(self.0[1]);
        let mut byte = 0_u8;
        // SAFETY: there is room for one byte.
        assert_eq!(unsafe { libc::read(self.0[0], (&raw mut byte).cast(), 1) }, 0);
    }
}
