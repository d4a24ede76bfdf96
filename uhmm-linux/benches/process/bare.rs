//! The kernel's interfaces with nothing around them: what floors are made of.
//!
//! The only unsafe code of the benchmark. Memory here is mapped by itself and holds numbers; it is
//! accessed by volatile loads and stores of words, and never through references.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::thread::CpuSet;
use uhmm::{Order, PAGE_SIZE, Page, PageRange};

/// Private anonymous memory, aligned to huge pages.
pub(crate) struct Memory {
    start: usize,
    bytes: usize,
    /// What was mapped for that.
    mapped: (usize, usize),
}

impl Memory {
    /// Maps memory of single pages.
    pub(crate) fn new(pages: usize) -> Memory {
        let memory = Memory::map(pages);
        memory.advise(memory.range(), Advice::LinuxNoHugepage);
        memory
    }

    /// Maps memory of huge pages.
    pub(crate) fn huge(pages: usize) -> Memory {
        let memory = Memory::map(pages);
        memory.advise(memory.range(), Advice::LinuxHugepage);
        memory
    }

    fn map(pages: usize) -> Memory {
        let (bytes, align) = (pages * PAGE_SIZE, Order::HUGE.bytes());
        let length = bytes + align;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses where, so nothing is replaced.
        let mapped =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, rights, flags) };
        let mapped = mapped.expect("there is room").addr();
        Memory { start: mapped.next_multiple_of(align), bytes, mapped: (mapped, length) }
    }

    pub(crate) fn range(&self) -> PageRange {
        PageRange::new(self.start as u64, self.bytes as u64).expect("whole pages")
    }

    pub(crate) fn pages(&self) -> usize {
        self.bytes / PAGE_SIZE
    }

    /// Returns where a page begins.
    pub(crate) fn address(&self, page: usize) -> usize {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        self.start + page * PAGE_SIZE
    }

    /// Returns a page as uhmm calls it.
    pub(crate) fn page(&self, page: usize) -> Page {
        Page::containing(self.address(page) as u64)
    }

    /// Loads the first word of a page.
    #[inline]
    pub(crate) fn load(&self, page: usize) -> u64 {
        let word = std::ptr::with_exposed_provenance::<u64>(self.address(page));
        // SAFETY: it is mapped and aligned, and all accesses are volatile (see the head).
        unsafe { word.read_volatile() }
    }

    /// Stores to the first word of a page.
    #[inline]
    pub(crate) fn store(&self, page: usize, value: u64) {
        let word = std::ptr::with_exposed_provenance_mut::<u64>(self.address(page));
        // SAFETY: as for `load`.
        unsafe { word.write_volatile(value) };
    }

    /// Stores the number of each page to it.
    pub(crate) fn fill(&self) {
        (0..self.pages()).for_each(|page| self.store(page, page as u64));
    }

    fn advise(&self, range: PageRange, advice: Advice) {
        assert!(self.range().covers(range), "of this memory");
        let start = pointer(range.address() as usize);
        // SAFETY: it is ours, and nobody relies on what it holds (see the head).
        let advised = unsafe { rustix::mm::madvise(start, range.len() * PAGE_SIZE, advice) };
        advised.unwrap_or_else(|error| panic!("{advice:?} of {range}: {error}"));
    }

    /// Drops what pages hold.
    pub(crate) fn discard(&self, range: PageRange) {
        self.advise(range, Advice::LinuxDontNeed);
    }

    /// Has the kernel fault every page in.
    pub(crate) fn populate(&self, range: PageRange, write: bool) {
        let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        self.advise(range, advice);
    }

    /// Makes every second page readable only, which takes a mapping for each page.
    pub(crate) fn shred(&self, pages: usize) {
        for page in (0..pages).step_by(2) {
            let start = pointer(self.address(page));
            // SAFETY: it is ours, and nobody stores to it.
            let done = unsafe { rustix::mm::mprotect(start, PAGE_SIZE, MprotectFlags::READ) };
            done.expect("vm.max_map_count allows for it");
        }
    }

    /// Unmaps a range, and maps it anew.
    pub(crate) fn unmap(&self, range: PageRange) {
        assert!(self.range().covers(range), "of this memory");
        let (start, bytes) = (pointer(range.address() as usize), range.len() * PAGE_SIZE);
        // SAFETY: it is ours, and nobody relies on what it holds.
        unsafe { rustix::mm::munmap(start, bytes) }.expect("it was mapped");
    }

    /// Maps a range again that was unmapped.
    pub(crate) fn map_again(&self, range: PageRange) {
        assert!(self.range().covers(range), "of this memory");
        let (start, bytes) = (pointer(range.address() as usize), range.len() * PAGE_SIZE);
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: it replaces what is ours.
        let mapped = unsafe { rustix::mm::mmap_anonymous(start, bytes, rights, flags) };
        mapped.expect("it was mapped before");
        self.advise(range, Advice::LinuxNoHugepage);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (start, bytes) = self.mapped;
        // SAFETY: it is ours, and nobody has a pointer into it any more.
        unsafe { rustix::mm::munmap(pointer(start), bytes) }.expect("it was mapped");
    }
}

fn pointer(address: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address)
}

/// A userfaultfd.
pub(crate) struct Uffd(OwnedFd);

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`; the first two fields are a `struct uffdio_range`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_move` and `struct uffdio_copy`, which are alike.
#[repr(C)]
struct Transfer {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

/// `_IOWR(0xAA, number, size)`.
const fn opcode(number: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | 0xAA << 8 | number
}

const UFFDIO_API: u64 = opcode(0x3f, size_of::<Api>());
const UFFDIO_REGISTER: u64 = opcode(0x00, size_of::<Register>());
const UFFDIO_COPY: u64 = opcode(0x03, size_of::<Transfer>());
const UFFDIO_MOVE: u64 = opcode(0x05, size_of::<Transfer>());

/// `UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP`.
const EVENTS: u64 = 1 << 3 | 1 << 6;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

/// How a thread waits for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// In read(2).
    Read,
    /// In poll(2), and then it reads.
    Poll,
}

impl Uffd {
    /// Tells whether there is such a thing.
    pub(crate) fn available() -> Result<(), Errno> {
        Uffd::create(0).map(drop)
    }

    /// Makes one; with events, one that tells of unmapped and discarded memory.
    pub(crate) fn open(wait: Wait, events: bool) -> Uffd {
        let flags = if wait == Wait::Poll { libc::O_NONBLOCK } else { 0 };
        let uffd = Uffd::create(flags).expect("it was available");
        let features = if events { EVENTS } else { 0 };
        let mut api = Api { api: 0xAA, features, ioctls: 0 };
        uffd.call(UFFDIO_API, &mut api).expect("every kernel has this");
        uffd
    }

    fn create(flags: i32) -> Result<Uffd, Errno> {
        // SAFETY: makes a descriptor, and accesses no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(last_error());
        }
        // SAFETY: it was made just now, and is owned by nobody else.
        Ok(Uffd(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    fn call<T>(&self, opcode: u64, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the structures above are what these ioctls take, and hold no pointer that the
        // kernel writes through. What is moved or filled is memory of this benchmark.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), opcode, std::ptr::from_mut(argument)) };
        if result < 0 { Err(last_error()) } else { Ok(()) }
    }

    /// Registers memory for missing pages.
    pub(crate) fn register(&self, range: PageRange) {
        let (start, len) = (range.address(), (range.len() * PAGE_SIZE) as u64);
        let mut register = Register { start, len, mode: 1, ioctls: 0 };
        self.call(UFFDIO_REGISTER, &mut register).expect("private anonymous memory");
    }

    /// Moves pages.
    #[inline]
    pub(crate) fn move_pages(&self, from: usize, to: usize, pages: usize) {
        let len = (pages * PAGE_SIZE) as u64;
        let mut transfer = Transfer { dst: to as u64, src: from as u64, len, mode: 0, done: 0 };
        self.call(UFFDIO_MOVE, &mut transfer).expect("they are there, and nobody is in the way");
    }

    /// Copies pages.
    #[inline]
    pub(crate) fn copy(&self, from: usize, to: usize, pages: usize) {
        let len = (pages * PAGE_SIZE) as u64;
        let mut transfer = Transfer { dst: to as u64, src: from as u64, len, mode: 0, done: 0 };
        self.call(UFFDIO_COPY, &mut transfer).expect("they are missing");
    }

    fn wait(&self, wait: Wait) {
        if wait == Wait::Poll {
            poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None).expect("nobody signals");
        }
    }

    /// Waits for a message: where a fault is, or nothing if it is no fault.
    #[inline]
    fn next(&self, wait: Wait) -> Option<usize> {
        let mut message = UffdMsg::default();
        loop {
            self.wait(wait);
            let (to, bytes) = ((&raw mut message).cast(), size_of::<UffdMsg>());
            // SAFETY: the message is room for these bytes, any of which are valid for it.
            let read = unsafe { libc::read(self.0.as_raw_fd(), to, bytes) };
            if read > 0 {
                break;
            }
            assert_eq!(last_error(), Errno::AGAIN, "a fault was read");
        }
        (message.event == UFFD_EVENT_PAGEFAULT).then_some(message.words[1] as usize)
    }
}

/// A thread that serves the faults of a userfaultfd, and does nothing else.
pub(crate) struct Handler {
    uffd: Arc<Uffd>,
    /// A touch of it ends the thread.
    stop: Memory,
    thread: Option<JoinHandle<()>>,
}

impl Handler {
    /// Starts it, on the processors of the calling thread; `serve` is told where each fault is.
    pub(crate) fn start(
        wait: Wait,
        events: bool,
        serve: impl Fn(&Uffd, usize) + Send + 'static,
    ) -> Handler {
        let (uffd, stop) = (Arc::new(Uffd::open(wait, events)), Memory::new(1));
        uffd.register(stop.range());
        let (served, last) = (Arc::clone(&uffd), stop.address(0));
        // What is copied to the last page is never read.
        let filler = Memory::new(1);
        filler.fill();
        let thread = std::thread::spawn(move || {
            loop {
                match served.next(wait) {
                    None => {}
                    Some(address) if address == last => {
                        break served.copy(filler.address(0), last, 1);
                    }
                    Some(address) => serve(&served, address),
                }
            }
        });
        Handler { uffd, stop, thread: Some(thread) }
    }

    pub(crate) fn uffd(&self) -> &Uffd {
        &self.uffd
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.stop.load(0);
        self.thread.take().expect("it ends once").join().expect("a handler does not panic");
    }
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `/proc/self/pagemap`.
pub(crate) struct Pagemap(std::fs::File);

impl Pagemap {
    pub(crate) fn open() -> Pagemap {
        Pagemap(std::fs::File::open("/proc/self/pagemap").expect("proc is mounted"))
    }

    /// Counts the pages that are there.
    pub(crate) fn present(&self, range: PageRange) -> u64 {
        const PAGE_IS_PRESENT: u64 = 1 << 3;
        let mut regions = [PageRegion::default(); 64];
        let start = range.address();
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end: start + (range.len() * PAGE_SIZE) as u64,
            vec: (&raw mut regions).addr() as u64,
            vec_len: regions.len() as u64,
            category_anyof_mask: PAGE_IS_PRESENT,
            return_mask: PAGE_IS_PRESENT,
            ..PmScanArg::default()
        };
        let opcode = 3 << 30 | (size_of::<PmScanArg>() as u64) << 16 | u64::from(b'f') << 8 | 16;
        (&raw mut regions).expose_provenance();
        // SAFETY: the structure is what this ioctl takes, and names room for 64 regions.
        let found = unsafe { libc::ioctl(self.0.as_raw_fd(), opcode, &raw mut argument) };
        let found = usize::try_from(found).expect("the kernel is new enough");
        assert_eq!(argument.walk_end, argument.end, "there was room for all");
        let bytes = |region: &PageRegion| region.end - region.start;
        regions[..found].iter().map(bytes).sum::<u64>() / PAGE_SIZE as u64
    }
}

/// Lets the calling thread, and those that it starts, run on these processors only.
pub(crate) fn run_on(processors: &[usize]) {
    let mut set = CpuSet::new();
    processors.iter().for_each(|&processor| set.set(processor));
    rustix::thread::sched_setaffinity(None, &set).expect("they exist");
}

/// Returns the processors that this thread may run on.
pub(crate) fn processors() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).expect("a thread has some");
    (0..CpuSet::MAX_CPU).filter(|&processor| set.is_set(processor)).collect()
}

/// Returns how much processor time this process has used, in microseconds.
pub(crate) fn processor_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a time to where there is room for one.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "every process has this clock");
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).expect("a system call has failed")
}
