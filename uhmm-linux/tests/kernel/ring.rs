//! io_uring(7), as far as tests need it: one request at a time.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm::{PAGE_SIZE, PageRange};

use super::outcome;

/// Where the kernel has put what, in one of the two rings (`struct io_sqring_offsets`, and the same
/// for the other with two fields of other names).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Offsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    /// `flags`, or `overflow`.
    flags: u32,
    /// `dropped`, or `cqes`.
    dropped: u32,
    /// `array`, or `flags`.
    array: u32,
    resv1: u32,
    user_addr: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    sq_off: Offsets,
    cq_off: Offsets,
}

/// `struct io_uring_sqe`, without what is not used here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    off: u64,
    addr: u64,
    len: u32,
    /// `rw_flags`, or `fadvise_advice`.
    op_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    splice_fd_in: i32,
    rest: [u64; 2],
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Completion {
    user_data: u64,
    res: i32,
    flags: u32,
}

const OP_READ_FIXED: u8 = 4;
const OP_READ: u8 = 22;
const OP_WRITE: u8 = 23;
const OP_MADVISE: u8 = 25;
const OFF_SQ_RING: u64 = 0;
const OFF_SQES: u64 = 0x1000_0000;
const ENTER_GETEVENTS: u32 = 1;
const REGISTER_BUFFERS: u32 = 0;
const UNREGISTER_BUFFERS: u32 = 1;
const FEAT_SINGLE_MMAP: u32 = 1;

/// A ring of one thread.
#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    rings: *mut c_void,
    rings_bytes: usize,
    entries: *mut c_void,
    params: Params,
}

impl Ring {
    /// Makes a ring. `None` where the kernel has none, or none for us.
    pub(crate) fn new() -> Option<Ring> {
        let mut params = Params::default();
        // SAFETY: `params` is what the system call takes and fills in.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut params) };
        let fd = match outcome(fd) {
            Ok(fd) => fd as i32,
            Err(Errno::NOSYS | Errno::PERM) => return None,
            Err(error) => panic!("io_uring_setup: {error}"),
        };
        // SAFETY: the kernel has just made it, for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        assert_ne!(params.features & FEAT_SINGLE_MMAP, 0, "both rings are mapped at once");
        let completions =
            params.cq_off.dropped as usize + params.cq_entries as usize * size_of::<Completion>();
        let submissions = params.sq_off.array as usize + params.sq_entries as usize * 4;
        let rings_bytes = completions.max(submissions);
        let rings = map(&fd, rings_bytes, OFF_SQ_RING);
        let entries = map(&fd, params.sq_entries as usize * size_of::<Entry>(), OFF_SQES);
        Some(Ring { fd, rings, rings_bytes, entries, params })
    }

    /// Reads from a file into memory, and returns what read(2) would.
    pub(crate) fn read(&mut self, fd: impl AsFd, address: u64, len: u32) -> i32 {
        let fd = fd.as_fd().as_raw_fd();
        self.submit(Entry { opcode: OP_READ, fd, addr: address, len, ..Entry::default() })
    }

    /// Writes memory to a file, and returns what write(2) would.
    pub(crate) fn write(&mut self, fd: impl AsFd, address: u64, len: u32) -> i32 {
        let fd = fd.as_fd().as_raw_fd();
        self.submit(Entry { opcode: OP_WRITE, fd, addr: address, len, ..Entry::default() })
    }

    /// Reads from a file into the registered buffer, at an address within it.
    pub(crate) fn read_fixed(&mut self, fd: impl AsFd, address: u64, len: u32) -> i32 {
        let fd = fd.as_fd().as_raw_fd();
        self.submit(Entry { opcode: OP_READ_FIXED, fd, addr: address, len, ..Entry::default() })
    }

    /// Calls madvise(2), on a thread of the kernel's.
    pub(crate) fn madvise(&mut self, range: PageRange, advice: i32) -> i32 {
        let (addr, len) = (range.address(), (range.pages() as usize * PAGE_SIZE) as u32);
        let op_flags = advice as u32;
        self.submit(Entry { opcode: OP_MADVISE, fd: -1, addr, len, op_flags, ..Entry::default() })
    }

    /// Registers a buffer, which pins its pages.
    pub(crate) fn register(&self, range: PageRange) -> Result<(), Errno> {
        let bytes = range.pages() as usize * PAGE_SIZE;
        let base = std::ptr::without_provenance_mut(range.address() as usize);
        let buffer = libc::iovec { iov_base: base, iov_len: bytes };
        self.control(REGISTER_BUFFERS, &raw const buffer as u64, 1)
    }

    /// Lets the registered buffer go.
    pub(crate) fn unregister(&self) -> Result<(), Errno> {
        self.control(UNREGISTER_BUFFERS, 0, 0)
    }

    fn control(&self, what: u32, argument: u64, count: u32) -> Result<(), Errno> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: the argument is an array of `count` buffers, or nothing.
        let result =
            unsafe { libc::syscall(libc::SYS_io_uring_register, fd, what, argument, count) };
        outcome(result).map(drop)
    }

    /// Submits one entry and waits for its completion.
    fn submit(&mut self, entry: Entry) -> i32 {
        let (sq, cq) = (self.params.sq_off, self.params.cq_off);
        // Relaxed: only this thread writes the tail.
        let tail = self.word(sq.tail).load(Ordering::Relaxed);
        let index = tail & self.word(sq.ring_mask).load(Ordering::Relaxed);
        // SAFETY: the index is within the array of entries.
        let place = unsafe { self.entries.cast::<Entry>().add(index as usize) };
        // SAFETY: the kernel looks at it only once the tail says so.
        unsafe { place.write(entry) };
        self.word(sq.array + 4 * index).store(index, Ordering::Relaxed);
        // Release: the entry is written before the kernel, which acquires, sees the tail.
        self.word(sq.tail).store(tail.wrapping_add(1), Ordering::Release);
        let fd = self.fd.as_raw_fd();
        // SAFETY: no memory is passed but that of the rings.
        let entered = unsafe {
            libc::syscall(libc::SYS_io_uring_enter, fd, 1, 1, ENTER_GETEVENTS, 0_usize, 0_usize)
        };
        assert_eq!(outcome(entered), Ok(1), "an entry is submitted");
        let head = self.word(cq.head).load(Ordering::Relaxed);
        // Acquire: the completion was written before the tail that the kernel released.
        assert_ne!(self.word(cq.tail).load(Ordering::Acquire), head, "it was waited for");
        let index = head & self.word(cq.ring_mask).load(Ordering::Relaxed);
        let at = cq.dropped as usize + index as usize * size_of::<Completion>();
        // SAFETY: within the ring.
        let place = unsafe { self.rings.byte_add(at) };
        // SAFETY: it is complete, as the tail said.
        let completion = unsafe { place.cast::<Completion>().read() };
        self.word(cq.head).store(head.wrapping_add(1), Ordering::Release);
        completion.res
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel says that there is a word, within what is mapped.
        let place = unsafe { self.rings.byte_add(offset as usize) };
        // SAFETY: it is mapped for as long as `self`, and accessed by atomic operations alone.
        unsafe { AtomicU32::from_ptr(place.cast()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and used by nobody else.
        unsafe { rustix::mm::munmap(self.rings, self.rings_bytes) }.expect("it is mapped");
        let bytes = self.params.sq_entries as usize * size_of::<Entry>();
        // SAFETY: as above.
        unsafe { rustix::mm::munmap(self.entries, bytes) }.expect("it is mapped");
    }
}

fn map(fd: &OwnedFd, bytes: usize, offset: u64) -> *mut c_void {
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::POPULATE;
    // SAFETY: a new mapping, wherever there is room.
    unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, rights, flags, fd, offset) }
        .expect("a ring can be mapped")
}
