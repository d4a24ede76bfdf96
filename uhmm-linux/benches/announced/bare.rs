//! The bare mechanism: the only unsafe code of the benchmark.

use std::ffi::c_void;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use uhmm::{PAGE_SIZE, PageRange};

const RECEIVE: u64 = 0xc050_2100;
const SEND: u64 = 0xc018_2101;
const SET_FLAGS: u64 = 0x4008_2104;

/// Pages of which each is a mapping of its own: between two lies one that is not mapped.
pub(crate) struct Memory {
    start: usize,
    pages: usize,
}

impl Memory {
    /// Reserves addresses.
    pub(crate) fn reserve(pages: usize) -> Memory {
        let bytes = 2 * pages * PAGE_SIZE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses where, so nothing is replaced.
        let at = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), flags)
        };
        Memory { start: at.expect("there is room").addr(), pages }
    }

    pub(crate) fn range(&self) -> PageRange {
        let bytes = (2 * self.pages * PAGE_SIZE) as u64;
        PageRange::new(self.start as u64, bytes).expect("whole pages")
    }

    fn at(&self, page: usize) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.start + 2 * page * PAGE_SIZE)
    }

    /// Maps every page and touches it.
    pub(crate) fn fill(&self) {
        for page in 0..self.pages {
            self.map_over(page);
            // SAFETY: it was mapped just now.
            unsafe { self.at(page).cast::<u64>().write_volatile(1) };
        }
    }

    pub(crate) fn map_over(&self, page: usize) {
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: within what was reserved.
        let mapped = unsafe { rustix::mm::mmap_anonymous(self.at(page), PAGE_SIZE, rights, flags) };
        mapped.expect("it can be mapped");
    }

    pub(crate) fn unmap(&self, page: usize) {
        // SAFETY: within what was reserved.
        unsafe { rustix::mm::munmap(self.at(page), PAGE_SIZE) }.expect("it is mapped");
    }

    pub(crate) fn protect(&self, page: usize) {
        // SAFETY: within what was reserved.
        unsafe { rustix::mm::mprotect(self.at(page), PAGE_SIZE, MprotectFlags::READ) }
            .expect("it is mapped");
    }

    pub(crate) fn discard(&self, page: usize) {
        // SAFETY: within what was reserved.
        unsafe { rustix::mm::madvise(self.at(page), PAGE_SIZE, Advice::LinuxDontNeed) }
            .expect("it is mapped");
    }
}

/// Has the calling thread's calls that change mappings made by another thread of this process, which
/// has no filter.
pub(crate) fn supervise() {
    let (give, take) = std::sync::mpsc::channel::<i32>();
    std::thread::spawn(move || answer(take.recv().expect("there is a listener")));
    let load = |k| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k };
    let equal = |k, jt, jf| libc::sock_filter { code: 0x15, jt, jf, k };
    let any = |k, jt, jf| libc::sock_filter { code: 0x45, jt, jf, k };
    let ret = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let mut program = [
        load(0),
        equal(libc::SYS_munmap as u32, 6, 0),
        equal(libc::SYS_mprotect as u32, 5, 0),
        equal(libc::SYS_madvise as u32, 4, 0),
        equal(libc::SYS_mmap as u32, 0, 2),
        load(16 + 3 * 8),
        any(libc::MAP_FIXED as u32, 1, 0),
        ret(libc::SECCOMP_RET_ALLOW),
        ret(libc::SECCOMP_RET_USER_NOTIF),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: takes numbers.
    let renounced = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(renounced, 0);
    // With a listener, and not to be interrupted once received.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | 1 << 5;
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies the program, which is as long as it says.
    let fd = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    assert!(fd >= 0, "seccomp: {}", std::io::Error::last_os_error());
    // SAFETY: takes a number; without it both sides are slower.
    unsafe { libc::ioctl(fd as i32, SET_FLAGS, 1_u64) };
    give.send(fd as i32).expect("it waits");
}

fn answer(fd: i32) {
    loop {
        let mut call = [0_u64; 10];
        // SAFETY: there is room for a notification, and it is zeroes.
        if unsafe { libc::ioctl(fd, RECEIVE, call.as_mut_ptr()) } != 0 {
            continue;
        }
        let [id, _, number, _, a, b, c, d, e, f] = call;
        // SAFETY: what the program asks for, on memory of the benchmark.
        let result = unsafe { libc::syscall(i64::from(number as u32), a, b, c, d, e, f) };
        let mut response = [id, result as u64, 0];
        // SAFETY: the kernel reads the response.
        unsafe { libc::ioctl(fd, SEND, response.as_mut_ptr()) };
    }
}
