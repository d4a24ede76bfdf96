//! The page table of a [`Dmirror`](super::Dmirror).

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use rangemap::RangeMap;
use uhmm::{Access, Frame, PAGE_SIZE, Page, PageEntry, PageRange, Residency, SystemMemory};

/// What the device may do with a page that it has translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tag {
    /// Load.
    Read,
    /// Load and store.
    Write,
    /// Load, and have the page for itself. A store is an ordinary one and takes [`Tag::Write`].
    Atomic,
}

/// The translations of one mirror, in runs of consecutive frames of one tag.
pub struct PageTable {
    memory: Arc<dyn SystemMemory>,
    runs: RefCell<RangeMap<u64, Run>>,
}

/// What is the same of all pages of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    tag: Tag,
    /// By how much the number of a frame is larger than that of its page, modulo 2^64.
    shift: u64,
}

impl PageTable {
    pub(super) fn new(memory: Arc<dyn SystemMemory>) -> PageTable {
        PageTable { memory, runs: RefCell::default() }
    }

    /// Enters translations, in the place of those that there are.
    pub(super) fn enter(&self, range: PageRange, entries: &[PageEntry]) {
        let mut runs = self.runs.borrow_mut();
        runs.remove(numbers(range));
        // Neighbours that are alike are joined before they are inserted.
        let mut next: Option<(Range<u64>, Run)> = None;
        for (page, entry) in range.iter().zip(entries) {
            let page = page.number();
            let Some(run) = translate(page, entry) else { continue };
            match &mut next {
                Some((pages, same)) if *same == run && pages.end == page => pages.end += 1,
                _ => {
                    if let Some((pages, run)) = next.replace((page..page + 1, run)) {
                        runs.insert(pages, run);
                    }
                }
            }
        }
        if let Some((pages, run)) = next {
            runs.insert(pages, run);
        }
    }

    /// Forgets the translations of `range`.
    pub fn remove(&self, range: PageRange) {
        self.runs.borrow_mut().remove(numbers(range));
    }

    /// Takes the right to store away from what there is of `range`.
    pub fn protect(&self, range: PageRange) {
        let mut runs = self.runs.borrow_mut();
        let writable: Vec<_> = overlapping(&runs, range)
            .filter(|(_, run)| run.tag == Tag::Write)
            .map(|(pages, run)| (pages, Run { tag: Tag::Read, ..run }))
            .collect();
        for (pages, run) in writable {
            runs.insert(pages, run);
        }
    }

    /// Returns what is translated of `range`, in ascending order.
    pub fn translated(&self, range: PageRange) -> Vec<(PageRange, Tag)> {
        let runs = self.runs.borrow();
        overlapping(&runs, range).map(|(pages, run)| (pages_of(pages), run.tag)).collect()
    }

    /// Tells whether the device has a page of `range` for itself.
    pub fn has_exclusively(&self, range: PageRange) -> bool {
        overlapping(&self.runs.borrow(), range).any(|(_, run)| run.tag == Tag::Atomic)
    }

    /// Loads `bytes` from `first` on, page by page, as far as there are translations, and returns how
    /// many pages it loaded. A translation that turns out to lead nowhere is forgotten.
    ///
    /// # Panics
    ///
    /// If `bytes` are no whole pages.
    pub fn load(&self, first: Page, bytes: &mut [u8]) -> u64 {
        assert!(bytes.len().is_multiple_of(PAGE_SIZE), "whole pages are loaded");
        let memory = &*self.memory;
        self.copy(
            first,
            bytes.len(),
            |tag| tag >= Tag::Read,
            |frame, part| memory.try_read(frame, 0, &mut bytes[part]),
        )
    }

    /// Stores `bytes` from `first` on, page by page, as far as there are translations that it may store
    /// through, and returns how many pages it stored. A translation that turns out to lead nowhere is
    /// forgotten.
    ///
    /// # Panics
    ///
    /// If `bytes` are no whole pages.
    pub fn store(&self, first: Page, bytes: &[u8]) -> u64 {
        assert!(bytes.len().is_multiple_of(PAGE_SIZE), "whole pages are stored");
        let memory = &*self.memory;
        self.copy(
            first,
            bytes.len(),
            |tag| tag == Tag::Write,
            |frame, part| memory.try_write(frame, 0, &bytes[part]),
        )
    }

    fn copy(
        &self,
        first: Page,
        bytes: usize,
        usable: impl Fn(Tag) -> bool,
        mut access: impl FnMut(Frame, Range<usize>) -> usize,
    ) -> u64 {
        let pages = (bytes / PAGE_SIZE) as u64;
        let Ok(range) = PageRange::from_pages(first, pages) else { return 0 };
        let mut next = first.number();
        let mut stale = None;
        for (run, Run { tag, shift }) in overlapping(&self.runs.borrow(), range) {
            if run.start != next || !usable(tag) {
                break;
            }
            let at = (run.start - first.number()) as usize * PAGE_SIZE;
            let length = (run.end - run.start) as usize * PAGE_SIZE;
            let done = access(Frame(run.start.wrapping_add(shift)), at..at + length);
            next = run.start + (done / PAGE_SIZE) as u64;
            if done < length {
                stale = Some(next..run.end);
                break;
            }
        }
        if let Some(stale) = stale {
            // Those behind it may be there; who wants them faults once for all.
            self.runs.borrow_mut().remove(stale);
        }
        next - first.number()
    }
}

/// Returns how a page is translated; `None` if it is not to be.
fn translate(page: u64, entry: &PageEntry) -> Option<Run> {
    let tag = match entry.access {
        Access::None => return None,
        Access::Read => Tag::Read,
        Access::Write | Access::Atomic => Tag::Write,
    };
    let (tag, frame) = match entry.residency {
        Residency::System(Frame(frame)) => (tag, frame),
        Residency::Exclusive { frame: Frame(frame), .. } => (Tag::Atomic, frame),
        Residency::Device(at) => (tag, at.frame.0),
        _ => return None,
    };
    Some(Run { tag, shift: frame.wrapping_sub(page) })
}

/// Returns the parts of the runs that are in `range`.
fn overlapping(
    runs: &RangeMap<u64, Run>,
    range: PageRange,
) -> impl Iterator<Item = (Range<u64>, Run)> + '_ {
    let whole = numbers(range);
    runs.overlapping(whole.clone()).map(move |(pages, run)| {
        let cut = pages.start.max(whole.start)..pages.end.min(whole.end);
        (cut, *run)
    })
}

pub(super) fn numbers(range: PageRange) -> Range<u64> {
    range.first().number()..range.first().number() + range.pages()
}

pub(super) fn pages_of(numbers: Range<u64>) -> PageRange {
    let first = Page::new(numbers.start).expect("it was made of a range of pages");
    PageRange::from_pages(first, numbers.end - numbers.start).expect("likewise")
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable").field("runs", &self.runs).finish_non_exhaustive()
    }
}
