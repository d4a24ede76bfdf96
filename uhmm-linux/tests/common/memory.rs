//! Mappings for tests: all in a part of the address space where nothing else is, so that mapping,
//! unmapping and storing there are safe for everybody.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use uhmm::{Access, Order, PAGE_SIZE, Page, PageRange};

use super::trap;

/// The addresses that tests map things at: far from the program, its heap, and where the kernel puts
/// mappings that may be anywhere.
pub(crate) const TERRITORY: Range<u64> = 0x1000_0000_0000..0x3000_0000_0000;

/// The addresses below this one are for tests to choose from; those above are given out by
/// [`place`].
const GIVEN_OUT: u64 = 0x2000_0000_0000;

/// No access.
pub(crate) const NONE: ProtFlags = ProtFlags::empty();
/// Loads.
pub(crate) const R: ProtFlags = ProtFlags::READ;
/// Stores, and nothing else as far as the kernel's checks go.
pub(crate) const W: ProtFlags = ProtFlags::WRITE;
/// Loads and stores.
pub(crate) const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// What is behind a mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Backing<'f> {
    /// Private and anonymous.
    Anonymous,
    /// Private and anonymous, in large pages where they fit.
    Huge,
    /// Anonymous and shared.
    Shared,
    /// Private and anonymous, of reserved large pages.
    Hugetlb,
    /// The same without a reservation: there may be none when it is touched.
    HugetlbUnreserved,
    /// A file from this page on, shared.
    File(BorrowedFd<'f>, u64),
    /// A private copy of a file from this page on.
    PrivateFile(BorrowedFd<'f>, u64),
}

/// A mapping that is unmapped when it is dropped, with whatever has come to be there meanwhile.
#[derive(Debug)]
pub(crate) struct Mapping {
    range: PageRange,
}

/// A line of `/proc/self/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) range: Range<u64>,
    pub(crate) rights: String,
    pub(crate) offset: u64,
    pub(crate) inode: u64,
    pub(crate) name: String,
}

/// Returns a range of this many pages that nobody else is given, at the edge of a large page and
/// with a gap around it.
pub(crate) fn place(pages: u64) -> PageRange {
    static NEXT: AtomicU64 = AtomicU64::new(GIVEN_OUT);
    let large = Order::HUGE.bytes() as u64;
    let bytes = pages * PAGE_SIZE as u64;
    // Relaxed: each caller just takes other addresses.
    let at = NEXT.fetch_add(bytes.next_multiple_of(large) + large, Ordering::Relaxed);
    PageRange::new(at, bytes).expect("a test maps at least a page")
}

/// Returns the pages of `range` from the one at `first` on.
#[track_caller]
pub(crate) fn part(range: PageRange, first: u64, pages: u64) -> PageRange {
    let first = range.first().checked_add(first).expect("a page of the range");
    let part = PageRange::from_pages(first, pages).expect("pages of the range");
    assert!(range.covers(part), "{part} is not within {range}");
    part
}

/// Maps `range`, in place of what is there.
#[track_caller]
pub(crate) fn map(range: PageRange, backing: Backing<'_>, rights: ProtFlags) -> Result<(), Errno> {
    let (at, bytes) = own(range);
    let fixed = MapFlags::FIXED;
    let anonymous = |flags| {
        // SAFETY: within the territory (`own`), where no Rust object lives and no mapping is but
        // those of tests.
        unsafe { rustix::mm::mmap_anonymous(at, bytes, rights, flags | fixed) }
    };
    let file = |fd: BorrowedFd<'_>, first: u64, flags| {
        // SAFETY: as above.
        unsafe { rustix::mm::mmap(at, bytes, rights, flags | fixed, fd, first * PAGE_SIZE as u64) }
    };
    match backing {
        Backing::Anonymous => anonymous(MapFlags::PRIVATE)?,
        Backing::Huge => {
            let at = anonymous(MapFlags::PRIVATE)?;
            advise(range, libc::MADV_HUGEPAGE)?;
            at
        }
        Backing::Shared => anonymous(MapFlags::SHARED)?,
        Backing::Hugetlb => anonymous(MapFlags::PRIVATE | MapFlags::HUGETLB)?,
        Backing::HugetlbUnreserved => {
            anonymous(MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::NORESERVE)?
        }
        Backing::File(fd, first) => file(fd, first, MapFlags::SHARED)?,
        Backing::PrivateFile(fd, first) => file(fd, first, MapFlags::PRIVATE)?,
    };
    Ok(())
}

/// Unmaps `range`.
#[track_caller]
pub(crate) fn unmap(range: PageRange) {
    try_unmap(range).expect("pages of tests can be unmapped");
}

/// Unmaps `range`, if that can be.
#[track_caller]
pub(crate) fn try_unmap(range: PageRange) -> Result<(), Errno> {
    let (at, bytes) = own(range);
    // SAFETY: as for `map`.
    unsafe { rustix::mm::munmap(at, bytes) }
}

/// Changes what the mappings of `range` allow.
#[track_caller]
pub(crate) fn protect(range: PageRange, rights: ProtFlags) -> Result<(), Errno> {
    let (at, bytes) = own(range);
    let rights = MprotectFlags::from_bits_retain(rights.bits());
    // SAFETY: as for `map`.
    unsafe { rustix::mm::mprotect(at, bytes, rights) }
}

/// Moves what is mapped in `range` to `to`, in place of what is there.
#[track_caller]
pub(crate) fn remap(range: PageRange, to: Page) -> Result<(), Errno> {
    let (from, bytes) = own(range);
    let target = PageRange::from_pages(to, range.pages()).expect("pages of tests");
    let (at, _) = own(target);
    // SAFETY: as for `map`, of both places.
    unsafe { rustix::mm::mremap_fixed(from, bytes, bytes, MremapFlags::MAYMOVE, at) }.map(drop)
}

/// Calls madvise(2) with one of the `MADV_` numbers.
#[track_caller]
pub(crate) fn advise(range: PageRange, advice: i32) -> Result<(), Errno> {
    let (at, bytes) = own(range);
    // SAFETY: as for `map`: whatever the advice does to the contents, no Rust object is there.
    let result = unsafe { libc::madvise(at, bytes, advice) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// Keeps `range` in memory.
#[track_caller]
pub(crate) fn lock(range: PageRange) -> Result<(), Errno> {
    let (at, bytes) = own(range);
    // SAFETY: as for `map`.
    unsafe { rustix::mm::mlock(at, bytes) }
}

/// Lets `range` leave memory again.
#[track_caller]
pub(crate) fn unlock(range: PageRange) -> Result<(), Errno> {
    let (at, bytes) = own(range);
    // SAFETY: as for `map`.
    unsafe { rustix::mm::munlock(at, bytes) }
}

/// Makes a file of this many pages of zeroes in memory.
pub(crate) fn memory_file(pages: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("uhmm-test", MemfdFlags::CLOEXEC);
    sized(file.expect("memfd_create"), pages)
}

/// Makes a file of this many pages of zeroes on disk, without a name.
pub(crate) fn disk_file(pages: u64) -> OwnedFd {
    use rustix::fs::{Mode, OFlags};
    let folder = env!("CARGO_TARGET_TMPDIR");
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR);
    sized(file.expect("the target directory takes files without names"), pages)
}

/// Makes a file of secret memory (memfd_secret(2), Linux 5.14), where the kernel offers it.
pub(crate) fn secret_file(pages: u64) -> Result<OwnedFd, Errno> {
    // SAFETY: takes one number, and accesses no memory.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: the descriptor was made above, and is owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    Ok(sized(fd, pages))
}

/// Borrows a descriptor that this process inherited, and that nobody ever closes.
pub(crate) fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: it is open for as long as the process lives.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Sets the length of a file.
pub(crate) fn truncate(file: impl AsFd, pages: u64) {
    rustix::fs::ftruncate(file, pages * PAGE_SIZE as u64).expect("a test's file can be cut");
}

/// Drops pages of a file.
pub(crate) fn punch(file: impl AsFd, first: u64, pages: u64) {
    use rustix::fs::FallocateFlags;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let size = PAGE_SIZE as u64;
    rustix::fs::fallocate(file, flags, first * size, pages * size)
        .expect("a test's file can have holes");
}

/// Returns the rights that allow an access, as a program would ask for them.
pub(crate) fn rights(access: Access) -> ProtFlags {
    match access {
        Access::None => NONE,
        Access::Read => R,
        Access::Write | Access::Atomic => RW,
    }
}

/// Reads `/proc/self/maps`.
pub(crate) fn lines() -> Vec<Line> {
    let text = std::fs::read_to_string("/proc/self/maps").expect("proc is mounted");
    text.lines().map(|line| Line::parse(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

/// Returns the mappings of `range`, each cut down to it, and what `/proc/self/maps` says of it.
pub(crate) fn mapped_in(range: PageRange) -> Vec<(PageRange, Line)> {
    let cut = |line: Line| {
        let bytes = line.range.end - line.range.start;
        let whole = PageRange::new(line.range.start, bytes).expect("mappings are of whole pages");
        whole.intersection(range).map(|part| (part, line))
    };
    // What the kernel puts above all that can be mapped is no range of pages.
    lines().into_iter().filter(|line| line.range.end < TERRITORY.end).filter_map(cut).collect()
}

impl Mapping {
    /// Maps so many pages where nobody else does.
    #[track_caller]
    pub(crate) fn new(pages: u64, backing: Backing<'_>, rights: ProtFlags) -> Mapping {
        Mapping::at(place(pages), backing, rights)
    }

    /// Maps `range`, in place of what is there.
    #[track_caller]
    pub(crate) fn at(range: PageRange, backing: Backing<'_>, rights: ProtFlags) -> Mapping {
        match Mapping::try_at(range, backing, rights) {
            Ok(mapping) => mapping,
            Err(error) => panic!("{backing:?} cannot be mapped at {range}: {error}"),
        }
    }

    /// Does what [`at`](Mapping::at) does, where the kernel may refuse.
    pub(crate) fn try_at(
        range: PageRange,
        backing: Backing<'_>,
        rights: ProtFlags,
    ) -> Result<Mapping, Errno> {
        map(range, backing, rights).map(|()| Mapping { range })
    }

    /// Makes private anonymous memory.
    pub(crate) fn anonymous(pages: u64) -> Mapping {
        Mapping::new(pages, Backing::Anonymous, RW)
    }

    pub(crate) fn range(&self) -> PageRange {
        self.range
    }

    /// Returns a part of the range.
    #[track_caller]
    pub(crate) fn part(&self, first: u64, pages: u64) -> PageRange {
        part(self.range, first, pages)
    }

    /// Returns the page at `index`.
    #[track_caller]
    pub(crate) fn page(&self, index: u64) -> Page {
        self.part(index, 1).first()
    }

    /// Returns the address of the first word of the page at `index`.
    #[track_caller]
    pub(crate) fn word(&self, index: u64) -> u64 {
        self.page(index).address()
    }

    /// Loads the first word of the page at `index`.
    #[track_caller]
    pub(crate) fn peek(&self, index: u64) -> u64 {
        let word = trap::load(self.word(index));
        word.unwrap_or_else(|trap| panic!("a load from page {index} got {trap}"))
    }

    /// Stores to the first word of the page at `index`.
    #[track_caller]
    pub(crate) fn poke(&self, index: u64, value: u64) {
        let done = trap::store(self.word(index), value);
        done.unwrap_or_else(|trap| panic!("a store to page {index} got {trap}"));
    }

    /// Stores to the first word of every page: `value(index)`.
    #[track_caller]
    pub(crate) fn fill(&self, value: impl Fn(u64) -> u64) {
        (0..self.range.pages()).for_each(|index| self.poke(index, value(index)));
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.range);
    }
}

impl Line {
    pub(crate) fn parse(line: &str) -> Option<Line> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (rights, offset) = (words.next()?.to_owned(), number(words.next()?)?);
        let _device = words.next()?;
        let inode = words.next()?.parse().ok()?;
        let name = words.next().unwrap_or_default().trim().to_owned();
        Some(Line { range: number(start)?..number(end)?, rights, offset, inode, name })
    }
}

fn sized(file: OwnedFd, pages: u64) -> OwnedFd {
    truncate(&file, pages);
    file
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).expect("a system call has failed")
}

/// Returns the address and the length of a range within the territory.
#[track_caller]
fn own(range: PageRange) -> (*mut std::ffi::c_void, usize) {
    let (start, end) = (range.address(), range.address() + range.pages() * PAGE_SIZE as u64);
    let inside = TERRITORY.contains(&start) && end <= TERRITORY.end;
    assert!(inside, "{range} is not for tests to map");
    (std::ptr::without_provenance_mut(start as usize), (end - start) as usize)
}
