//! What the tests of this folder share: memory that is nobody else's, and threads that touch it.
//!
//! A test registers its own mappings only, so that it may run beside any other in one process; where
//! it unmaps a part of one, it is one of [`Mapping::apart`], lest another test fill the hole. It
//! waits with a deadline for everything that the kernel should tell, so that a lost message is a
//! failure and not a hang. Threads that may be stuck are not joined when a test fails: the
//! userfaultfd goes, and with it what they wait for. A test that is told of unmapping makes its
//! mappings before its userfaultfd, so that they go after it.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm::{Order, PAGE_SIZE, Page, PageRange};

use super::userfaultfd::{Faults, Features, Message, Messages, Modes, Userfaultfd};

/// How long a test waits for what must come.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// Opens a userfaultfd, or says that the test cannot run. With `UHMM_REQUIRE_UFFD` in the
/// environment it has to run.
#[track_caller]
pub(super) fn userfaultfd(wanted: Features) -> Option<Userfaultfd> {
    match Userfaultfd::open(Faults::All, wanted) {
        Ok(uffd) => Some(uffd),
        Err(errno) if std::env::var_os("UHMM_REQUIRE_UFFD").is_none() => {
            eprintln!("NOT TESTED: no userfaultfd with {wanted:?}: {errno}");
            None
        }
        Err(errno) => panic!("no userfaultfd with {wanted:?}: {errno}"),
    }
}

/// A mapping of a test. What it hands out are addresses: other threads may touch it.
#[derive(Debug)]
pub(super) struct Mapping {
    range: PageRange,
}

impl Mapping {
    /// Maps private anonymous memory that never becomes a huge page by itself.
    pub(super) fn anonymous(pages: u64) -> Mapping {
        let mapping = Mapping::new(pages, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        super::advise::nohugepage(mapping.range).expect("the kernel has huge pages");
        mapping
    }

    /// Maps anonymous memory.
    pub(super) fn new(pages: u64, rights: ProtFlags, flags: MapFlags) -> Mapping {
        let bytes = pages as usize * PAGE_SIZE;
        // SAFETY: the kernel chooses the place, which nobody has.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), bytes, rights, flags) };
        Mapping::at(start.expect("there is memory").expose_provenance() as u64, bytes)
    }

    /// Maps private anonymous memory where the kernel puts nothing by itself, which fills the
    /// address space from the top: what is unmapped there stays a hole, and nobody else's.
    pub(super) fn apart(pages: u64) -> Mapping {
        const STEP: usize = 1 << 30;
        static NEXT: AtomicUsize = AtomicUsize::new(64 << 30);
        // Relaxed: nothing but the number itself is shared.
        let start = ptr::without_provenance_mut(NEXT.fetch_add(STEP, Ordering::Relaxed));
        let bytes = pages as usize * PAGE_SIZE;
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        let flags = flags | MapFlags::FIXED_NOREPLACE;
        // SAFETY: nothing is mapped there, or the kernel refuses.
        let start = unsafe { rustix::mm::mmap_anonymous(start, bytes, rights, flags) };
        let start = start.expect("nobody is there").expose_provenance();
        let mapping = Mapping::at(start as u64, bytes);
        super::advise::nohugepage(mapping.range).expect("the kernel has huge pages");
        mapping
    }

    /// Maps a file from its beginning.
    pub(super) fn of(file: impl AsFd, pages: u64, rights: ProtFlags, flags: MapFlags) -> Mapping {
        let bytes = pages as usize * PAGE_SIZE;
        // SAFETY: the kernel chooses the place, which nobody has.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, rights, flags, file, 0) };
        Mapping::at(start.expect("there is memory").expose_provenance() as u64, bytes)
    }

    /// Takes over what was mapped there.
    pub(super) fn at(address: u64, bytes: usize) -> Mapping {
        Mapping { range: PageRange::new(address, bytes as u64).expect("a mapping") }
    }

    /// Maps private anonymous memory of whole huge pages, aligned to them.
    pub(super) fn huge(blocks: u64) -> Mapping {
        let pages = blocks * Order::HUGE.pages();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let all = Mapping::new(pages + Order::HUGE.pages(), rights, flags).into_range();
        let first = all.first().checked_add(Order::HUGE.pages() - 1).expect("within");
        let range = PageRange::from_pages(first.align_down(Order::HUGE), pages).expect("within");
        for rest in all.va_range().difference(range.va_range()).into_iter().flatten() {
            unmap(PageRange::covering(rest));
        }
        Mapping { range }
    }

    pub(super) fn range(&self) -> PageRange {
        self.range
    }

    /// Returns the range of these pages of the mapping.
    pub(super) fn pages(&self, pages: Range<u64>) -> PageRange {
        let first = self.range.first().checked_add(pages.start).expect("a page");
        PageRange::from_pages(first, pages.end - pages.start).expect("pages")
    }

    /// Returns a page of the mapping.
    pub(super) fn page(&self, index: u64) -> Page {
        self.pages(index..index + 1).first()
    }

    /// Loads the first word of a page.
    pub(super) fn load(&self, index: u64) -> u64 {
        load(self.page(index))
    }

    /// Stores the first word of a page.
    pub(super) fn store(&self, index: u64, value: u64) {
        store(self.page(index), value);
    }

    /// Stores `value(index)` to each page.
    pub(super) fn fill(&self, value: impl Fn(u64) -> u64) {
        (0..self.range.pages()).for_each(|index| self.store(index, value(index)));
    }

    /// Gives the mapping up without unmapping it.
    pub(super) fn into_range(self) -> PageRange {
        let range = self.range;
        std::mem::forget(self);
        range
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A thread of a failed test may still touch it.
        if !thread::panicking() {
            unmap(self.range);
        }
    }
}

/// Unmaps memory of a test.
pub(super) fn unmap(range: PageRange) {
    // SAFETY: the memory is the test's, which has no references into it.
    unsafe { rustix::mm::munmap(pointer(range.first()), range.len() * PAGE_SIZE) }
        .expect("it is mapped");
}

/// Changes the protection of memory of a test.
pub(super) fn protect(range: PageRange, rights: rustix::mm::MprotectFlags) {
    // SAFETY: the memory is the test's, which has no references into it.
    unsafe { rustix::mm::mprotect(pointer(range.first()), range.len() * PAGE_SIZE, rights) }
        .expect("it is mapped");
}

/// Returns the address of a page of a test as a pointer.
pub(super) fn pointer(page: Page) -> *mut c_void {
    ptr::with_exposed_provenance_mut(page.address() as usize)
}

/// Loads the first word of a page.
pub(super) fn load(page: Page) -> u64 {
    // SAFETY: the page is mapped by the test; nobody but the kernel and other tests' threads by
    // volatile accesses touches it.
    unsafe { pointer(page).cast::<u64>().read_volatile() }
}

/// Stores the first word of a page.
pub(super) fn store(page: Page, value: u64) {
    // SAFETY: as for `load`.
    unsafe { pointer(page).cast::<u64>().write_volatile(value) }
}

/// Something that another thread does, and that may take until somebody brings a page.
#[derive(Debug)]
pub(super) struct Doing<T> {
    result: mpsc::Receiver<T>,
}

/// Lets another thread do something.
pub(super) fn start<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> Doing<T> {
    let (sender, result) = mpsc::channel();
    thread::spawn(move || sender.send(what()).ok());
    Doing { result }
}

impl<T> Doing<T> {
    /// Waits until it is done.
    #[track_caller]
    pub(super) fn done(self) -> T {
        self.result.recv_timeout(DEADLINE).expect("it is done in time")
    }
}

/// Reads messages one by one, with a deadline.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    uffd: &'a Userfaultfd,
    messages: Messages,
}

impl<'a> Reader<'a> {
    pub(super) fn new(uffd: &'a Userfaultfd) -> Reader<'a> {
        Reader { uffd, messages: Messages::new() }
    }

    /// Returns the next message.
    #[track_caller]
    pub(super) fn next(&mut self) -> Message {
        while self.messages.is_empty() {
            assert!(readable(self.uffd, DEADLINE), "there is a message in time");
            match self.uffd.read_now(&mut self.messages) {
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(errno) => panic!("read: {errno}"),
            }
        }
        self.messages.take().expect("there is one")
    }

    /// Returns the next message, a fault, in short: where, and of what kind.
    #[track_caller]
    pub(super) fn fault(&mut self) -> (Page, Cause) {
        match self.next() {
            Message::Fault { address, write, wp, minor, .. } => {
                (Page::containing(address), Cause { write, wp, minor })
            }
            message => panic!("{message:?} is no fault"),
        }
    }
}

/// What a fault says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cause {
    pub(super) write: bool,
    pub(super) wp: bool,
    pub(super) minor: bool,
}

/// Tells whether a descriptor becomes readable within this time.
pub(super) fn readable(fd: impl AsFd, within: Duration) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let within = Timespec::try_from(within).expect("a short time");
    rustix::event::poll(&mut fds, Some(&within)).expect("poll") == 1
}

/// Returns how many threads wait for a page of this userfaultfd, read or not.
pub(super) fn waiting(uffd: &Userfaultfd) -> usize {
    let path = format!("/proc/self/fdinfo/{}", uffd.as_fd().as_raw_fd());
    let text = std::fs::read_to_string(path).expect("the descriptor is open");
    let total = text.lines().find_map(|line| line.strip_prefix("total:"));
    total.expect("a userfaultfd tells").trim().parse().expect("a number")
}

/// Registers a mapping.
#[track_caller]
pub(super) fn register(uffd: &Userfaultfd, mapping: &Mapping, modes: Modes) {
    uffd.register(mapping.range(), modes).expect("it can be registered");
}
