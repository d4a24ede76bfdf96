//! What both processes know: which bytes every page is to hold, and who is in the middle of what.
//!
//! It is one piece of shared memory. The process under test enters what it does before and after it
//! does it; the process that watches compares that with what is there. Nothing in it refers to
//! either process, so it survives both, and children that are forked have it too.
//!
//! # How a page is compared while others work on it
//!
//! Each page has one owner, the only thread that changes what it holds or how it is mapped. The
//! owner makes the page's version odd, does what it does, enters the result, and makes the version
//! even again. Whoever finds the same even version before and after a look at the page and at what
//! stands here has seen the page as it must be, to the bit. Pages that everybody adds to are
//! compared by sums: what each has added, and what each may be about to add.
//!
//! All accesses are sequentially consistent, so that the order in which things are entered is the
//! order in which others see them, next to those of the pages themselves.

use std::fmt::Write as _;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm::{PAGE_SIZE, Page, PageRange};

/// Threads that own pages.
pub(crate) const WORKERS: usize = 8;
/// Threads of devices.
pub(crate) const DRIVERS: usize = 4;
/// Everybody who stores.
pub(crate) const ACTORS: usize = WORKERS + DRIVERS;

/// Where the pages are.
pub(crate) const BASE: u64 = 0x1800_0000_0000;
/// Chunks of 2 MiB whose slots belong to the workers in turn.
const MIXED: usize = 3;
/// Chunks that belong to one worker each, for large pages.
const LARGE: usize = 2;
const CHUNK: usize = 512;
/// All pages.
pub(crate) const PAGES: usize = (MIXED + LARGE) * CHUNK;
/// Pages in the slot of one owner.
const SLOT: usize = 16;
/// The words of a page.
pub(crate) const WORDS: usize = PAGE_SIZE / 8;

/// How many words there are that everybody adds to: four in each page of their slot.
pub(crate) const COUNTERS: usize = SLOT * 4;
/// How many pages there are in which everybody has a word.
pub(crate) const SHARED: usize = SLOT;

/// Bits of [`Sheet::state`].
pub(crate) const MAPPED: u64 = 1;
pub(crate) const READABLE: u64 = 2;
pub(crate) const WRITABLE: u64 = 4;
pub(crate) const LOCKED: u64 = 8;
/// Advised to be large, or not to.
pub(crate) const WANTS_LARGE: u64 = 16;
pub(crate) const WANTS_SMALL: u64 = 32;
/// Discarded since it was mapped: whether what is there is of before or after the kernel may not be
/// known for some time, and then it does not move.
pub(crate) const DISCARDED: u64 = 64;
/// Mapped, and everything allowed.
pub(crate) const USUAL: u64 = MAPPED | READABLE | WRITABLE;

/// The command that ends the threads.
pub(crate) const END: u64 = u64::MAX;

/// What an actor is in the middle of: [`Actor::intent`].
pub(crate) const NOTHING: u64 = 0;
/// A store of [`Actor::value`] at [`Actor::word`] of [`Actor::page`].
pub(crate) const STORE: u64 = 1;
/// Stores of the values of the sequence [`Actor::value`] to all words of [`Actor::page`].
pub(crate) const FILL: u64 = 2;
/// A change of mappings: of the pages whose version is odd.
pub(crate) const CHANGE: u64 = 3;

macro_rules! overlaps {
    ($($(#[$doc:meta])* $name:ident $least:literal,)*) => {
        /// What has come together with what, and how often.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(non_camel_case_types, reason = "they are printed by their names")]
        pub(crate) enum Overlap {
            $($(#[$doc])* $name,)*
        }

        impl Overlap {
            /// Each, with how often it must have happened for a run to count.
            pub(crate) const ALL: &[(Overlap, u64)] = &[$((Overlap::$name, $least)),*];
        }
    };
}

overlaps! {
    /// A CPU touched a page that was in transit.
    cpu_fault_in_transit 20,
    /// Mappings with pages on a device were unmapped or mapped over.
    unmapped_on_device 50,
    /// The same with pages in transit.
    unmapped_in_transit 3,
    /// Pages on a device were discarded.
    removed_on_device 20,
    /// The same with pages in transit.
    removed_in_transit 1,
    /// Mappings with pages on a device were moved.
    moved_on_device 20,
    /// The same with pages in transit.
    moved_in_transit 1,
    /// A page was mapped over while an eviction had it in transit.
    evicted_and_replaced 1,
    /// The kernel put a move off since a change was under way.
    retried 20,
    /// A CPU took a page back that a device held exclusively.
    revoked 20,
    /// Pages came home for a fork.
    fork_overrun 10,
    /// A child was born with pages out, by a clone that nobody announced.
    unforeseen_fork 2,
    /// A mirror was unregistered while its contexts worked.
    unregistered 2,
    /// A device read what had been replaced, before it was told.
    stale_load 0,
    /// Loads of devices that were compared exactly.
    exact_device_load 1000,
    /// Loads of CPUs from pages of others that were compared exactly.
    exact_cpu_load 1000,
    /// Pages that were compared as a whole while everybody had been stopped in the middle.
    compared_while_stopped 100,
    /// Children that compared what they had inherited.
    children 4,
    /// Attached again, after pages had been out at the end of the attachment before.
    attached_again 1,
    /// Steps that failed on demand.
    failures 0,
    /// Accesses of devices that were refused for want of something.
    refused 0,
    /// Calls of mremap that the kernel refused.
    moves_refused 0,
}

/// Shared memory. See the [module](self).
#[repr(C)]
pub(crate) struct Journal {
    pub(crate) seed: AtomicU64,
    /// Odd: come to rest. Even: go on. [`END`]: end.
    pub(crate) command: AtomicU64,
    /// Up to which command the process has come to rest and compared what it can by itself.
    pub(crate) settled: AtomicU64,
    /// Up to which command the watcher has compared.
    pub(crate) compared: AtomicU64,
    /// Up to which command the process has detached after that.
    pub(crate) detached: AtomicU64,
    /// Whether there is a complaint.
    failed: AtomicU64,
    complaint: [AtomicU8; 4096],
    pub(crate) actors: [Actor; ACTORS],
    overlaps: [AtomicU64; 64],
    pub(crate) pages: [Sheet; PAGES],
    /// What each has added to each counter, for good.
    pub(crate) added: [[AtomicU64; COUNTERS]; ACTORS],
    /// What each may be about to add.
    pub(crate) adding: [[AtomicU64; COUNTERS]; ACTORS],
    /// What each has stored last in its word of each shared page.
    pub(crate) stored: [[AtomicU64; SHARED]; ACTORS],
    /// What each may be about to store there.
    pub(crate) storing: [[AtomicU64; SHARED]; ACTORS],
    /// The versions of all pages from before a fork, for the child of each worker.
    pub(crate) before_fork: [[AtomicU64; PAGES]; WORKERS],
    /// The sums of the counters from before a fork.
    pub(crate) counted_before_fork: [[AtomicU64; COUNTERS]; WORKERS],
}

/// One who stores.
#[repr(C)]
pub(crate) struct Actor {
    /// How many steps it has made.
    pub(crate) steps: AtomicU64,
    /// The command for which it has come to rest.
    pub(crate) parked: AtomicU64,
    pub(crate) intent: AtomicU64,
    pub(crate) page: AtomicU64,
    pub(crate) word: AtomicU64,
    pub(crate) value: AtomicU64,
    /// The last number that its values were made with.
    pub(crate) sequence: AtomicU64,
    /// What it does, for the report of a hang.
    pub(crate) doing: AtomicU64,
}

/// What a page is to be.
#[repr(C)]
pub(crate) struct Sheet {
    /// Odd while the owner changes it.
    pub(crate) version: AtomicU64,
    pub(crate) state: AtomicU64,
    /// How often its mapping was changed.
    pub(crate) changes: AtomicU64,
    /// How many of those devices must know of by now: those that were announced, or before an
    /// announcement.
    pub(crate) announced: AtomicU64,
    pub(crate) words: [AtomicU64; WORDS],
}

/// Consecutive pages of one owner, by their numbers here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) first: usize,
    pub(crate) pages: usize,
}

impl Slot {
    pub(crate) fn is_large(self) -> bool {
        self.pages == CHUNK
    }
}

/// Returns whose page this is; `None` for those that everybody uses.
pub(crate) fn owner(page: usize) -> Option<usize> {
    let (chunk, slot) = (page / CHUNK, page % CHUNK / SLOT);
    if chunk >= MIXED {
        return Some(chunk - MIXED);
    }
    (slot < CHUNK / SLOT - 1).then(|| (chunk * (CHUNK / SLOT) + slot) % WORKERS)
}

/// Returns the slots of a worker.
pub(crate) fn slots(worker: usize) -> Vec<Slot> {
    let mut slots: Vec<Slot> = (0..MIXED * CHUNK)
        .step_by(SLOT)
        .filter(|&first| owner(first) == Some(worker))
        .map(|first| Slot { first, pages: SLOT })
        .collect();
    if worker < LARGE {
        slots.push(Slot { first: (MIXED + worker) * CHUNK, pages: CHUNK });
    }
    slots
}

/// Returns the first page of the slot that everybody uses in a chunk.
fn common(chunk: usize) -> usize {
    chunk * CHUNK + CHUNK - SLOT
}

/// Returns the slots that everybody uses.
pub(crate) fn commons() -> impl Iterator<Item = Slot> {
    (0..MIXED).map(|chunk| Slot { first: common(chunk), pages: SLOT })
}

/// Returns where a counter is.
pub(crate) fn counter(index: usize) -> u64 {
    address(common(0) + index / 4, index % 4 * 8)
}

/// Returns where the word of an actor in a shared page is.
pub(crate) fn shared_word(page: usize, actor: usize) -> u64 {
    address(common(1) + page, 64 + actor * 8)
}

/// Returns the address of a word.
pub(crate) fn address(page: usize, word: usize) -> u64 {
    BASE + (page * PAGE_SIZE + word * 8) as u64
}

/// Returns consecutive pages.
pub(crate) fn range(first: usize, pages: usize) -> PageRange {
    let first =
        Page::new(BASE / PAGE_SIZE as u64 + first as u64).expect("an address of the territory");
    PageRange::from_pages(first, pages as u64).expect("there are some")
}

/// Returns all of them.
pub(crate) fn everything() -> PageRange {
    range(0, PAGES)
}

/// Returns what a worker stores in a word: a value that nobody else stores, and none twice.
pub(crate) fn value(worker: usize, sequence: u64, word: usize) -> u64 {
    let rest = (worker as u64) << 52 | (word as u64) << 43 | sequence & ((1 << 43) - 1);
    check(rest) << 56 | rest
}

/// Tells what kind of value it is: who stored it, in which word of a page, and when.
pub(crate) fn parse(value: u64) -> Option<(usize, u64, usize)> {
    let rest = value & ((1 << 56) - 1);
    let (worker, word) = ((rest >> 52) as usize, (rest >> 43 & 511) as usize);
    let sequence = rest & ((1 << 43) - 1);
    let valid = value >> 56 == check(rest) && worker < WORKERS && sequence > 0;
    valid.then_some((worker, sequence, word))
}

fn check(rest: u64) -> u64 {
    (rest.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57) | 0x80
}

impl Journal {
    /// Makes an empty one, and the descriptor by which another process gets it too.
    pub(crate) fn create() -> (&'static Journal, OwnedFd) {
        // Inherited by the process under test.
        let file = rustix::fs::memfd_create("journal", MemfdFlags::empty()).expect("memfd_create");
        rustix::fs::ftruncate(&file, size_of::<Journal>() as u64).expect("a file in memory");
        (Journal::map(file.as_raw_fd()), file)
    }

    /// Maps the one that another process has made.
    pub(crate) fn map(file: RawFd) -> &'static Journal {
        // SAFETY: it is open: it was made above, or inherited, and nobody has closed it.
        let file = unsafe { BorrowedFd::borrow_raw(file) };
        let (rights, size) = (ProtFlags::READ | ProtFlags::WRITE, size_of::<Journal>());
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), size, rights, MapFlags::SHARED, file, 0)
        };
        let at = at.expect("a file in memory can be mapped").cast::<Journal>();
        // SAFETY: it is as large as a journal, aligned to a page, never unmapped, and consists of
        // atomics, for which all bytes are valid and which others may change.
        unsafe { &*at }
    }

    /// Notes what must never be. The first one counts.
    pub(crate) fn complain(&self, what: std::fmt::Arguments<'_>) {
        /// Writes without allocating: a child may do this.
        struct Text<'a>(std::slice::Iter<'a, AtomicU8>);
        impl std::fmt::Write for Text<'_> {
            fn write_str(&mut self, text: &str) -> std::fmt::Result {
                for (byte, to) in text.bytes().zip(&mut self.0) {
                    to.store(byte, SeqCst);
                }
                Ok(())
            }
        }
        if self.failed.compare_exchange(0, 1, SeqCst, SeqCst).is_ok() {
            let _ = Text(self.complaint.iter()).write_fmt(what);
            self.failed.store(2, SeqCst);
        }
    }

    /// Returns what was complained about, if anything was.
    pub(crate) fn complaint(&self) -> Option<String> {
        if self.failed.load(SeqCst) < 2 {
            return None;
        }
        let bytes = self.complaint.iter().map(|byte| byte.load(SeqCst));
        let bytes: Vec<u8> = bytes.take_while(|&byte| byte != 0).collect();
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Tells whether anybody has begun to complain.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(SeqCst) != 0
    }

    pub(crate) fn count(&self, overlap: Overlap, by: u64) {
        self.overlaps[overlap as usize].fetch_add(by, SeqCst);
    }

    pub(crate) fn counted(&self, overlap: Overlap) -> u64 {
        self.overlaps[overlap as usize].load(SeqCst)
    }

    /// Returns the sum of what was added to a counter for good, and of what may have been.
    pub(crate) fn sums(&self, counter: usize) -> (u64, u64) {
        // In this order: what is added meanwhile is in the second, whether or not in the first.
        let sum = |what: &[[AtomicU64; COUNTERS]; ACTORS]| {
            what.iter().map(|of| of[counter].load(SeqCst)).sum::<u64>()
        };
        let least = sum(&self.added);
        let adding = sum(&self.adding);
        (least, sum(&self.added) + adding)
    }
}

impl Actor {
    /// Notes what it is about to do.
    pub(crate) fn intend(&self, intent: u64, page: usize, word: usize, value: u64) {
        self.page.store(page as u64, SeqCst);
        self.word.store(word as u64, SeqCst);
        self.value.store(value, SeqCst);
        self.intent.store(intent, SeqCst);
    }

    /// Notes that it has done so.
    pub(crate) fn done(&self) {
        self.intent.store(NOTHING, SeqCst);
    }
}

impl Sheet {
    /// Begins a change by the owner.
    pub(crate) fn begin(&self) {
        let before = self.version.fetch_add(1, SeqCst);
        debug_assert!(before.is_multiple_of(2), "a page has one owner");
    }

    pub(crate) fn end(&self) {
        self.version.fetch_add(1, SeqCst);
    }

    pub(crate) fn state(&self) -> u64 {
        self.state.load(SeqCst)
    }

    pub(crate) fn has(&self, bits: u64) -> bool {
        self.state() & bits == bits
    }

    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words[word].load(SeqCst)
    }

    /// Notes that the page is zeroes.
    pub(crate) fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, SeqCst));
    }

    /// Returns the version if nobody is changing it.
    pub(crate) fn quiet_version(&self) -> Option<u64> {
        Some(self.version.load(SeqCst)).filter(|version| version.is_multiple_of(2))
    }

    /// Tells whether devices must know of all that was done to its mapping.
    pub(crate) fn is_announced(&self) -> bool {
        self.announced.load(SeqCst) == self.changes.load(SeqCst)
    }
}
