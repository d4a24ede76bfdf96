//! Loads and stores of the device.
//!
//! A request is copied page by page through the open's page table. At the first page that the table
//! does not have, the device faults on all that is left, once, and goes on. What the kernel's own
//! driver does in the same order a program can count on: pages before a fault are stored to when a
//! later one fails.

use std::time::Instant;

use rustix::io::Errno;
use uhmm::{Access, FaultError, Frame, PAGE_SIZE, Page, PageRange, RangeFault, Residency};
use uhmm_devices::dmirror::PageTable;
use uhmm_linux::{Mapping, MappingKind, PageFlags};

use super::mm::PATIENCE;
use super::walk::{is_writable, joined, pieces};
use super::{Counts, OpenFile, abi};

/// How many pages are copied before the page table's lock is let go of.
const COPIED_AT_ONCE: u64 = 512;

/// How many pages are asked for in one range fault, which takes memory for each.
const FAULTED_AT_ONCE: u64 = 1 << 16;

/// How often pages that are to be faulted in may turn out to be held exclusively.
const TRIES: u32 = 16;

/// What is to be copied where.
enum Transfer<'a> {
    Load(&'a mut [u8]),
    Store(&'a [u8]),
}

impl OpenFile {
    /// Has the device load the pages.
    pub(super) fn read(&self, range: PageRange, output: &mut Vec<u8>) -> Result<Counts, Errno> {
        make_room(range, output)?;
        self.transfer(range, Transfer::Load(output))
    }

    /// Has the device store to the pages.
    pub(super) fn write(&self, range: PageRange, input: &[u8]) -> Result<Counts, Errno> {
        if input.len() != abi::buffer_bytes(range)? {
            return Err(Errno::FAULT);
        }
        self.transfer(range, Transfer::Store(input))
    }

    /// Loads what is in the page table, and faults on nothing.
    pub(super) fn read_translated(
        &self,
        range: PageRange,
        output: &mut Vec<u8>,
        missing: Errno,
    ) -> Result<Counts, Errno> {
        make_room(range, output)?;
        let mut transfer = Transfer::Load(output);
        match self.copy(range, range.first(), &mut transfer) {
            pages if pages == range.pages() => Ok(Counts { cpages: pages, faults: 0 }),
            _ => Err(missing),
        }
    }

    fn transfer(&self, range: PageRange, mut transfer: Transfer<'_>) -> Result<Counts, Errno> {
        let access = transfer.access();
        let refused = self.first_refused(range, access);
        // What is not watched by anybody has no place in the table: it is copied as it is faulted on.
        let mut unwatched = Vec::new();
        let mut counts = Counts::default();
        let mut since = Instant::now();
        while counts.cpages < range.pages() {
            let next = range.first().checked_add(counts.cpages).expect("within the range");
            let rest = PageRange::from_bounds(next, range.last()).expect("likewise");
            let allowed = match refused {
                Some((first, _)) if first <= next => None,
                Some((first, _)) => {
                    PageRange::from_pages(next, first.number() - next.number()).ok()
                }
                None => Some(rest),
            };
            let done = match allowed {
                Some(allowed) => self.copy_some(range, allowed, &unwatched, &mut transfer),
                None => 0,
            };
            if done > 0 {
                counts.cpages += done;
                since = Instant::now();
                continue;
            }
            if let Some((_, errno)) = refused {
                return Err(errno);
            }
            if unwatched.iter().any(|part: &PageRange| part.contains(next)) {
                // The kernel says that it is not to be had.
                return Err(Errno::FAULT);
            }
            if since.elapsed() > PATIENCE {
                return Err(Errno::BUSY);
            }
            unwatched = self.fault(rest, access)?;
            counts.faults += 1;
        }
        Ok(counts)
    }

    /// Returns the first page of `range` that the program itself could not access like this, and what
    /// that is called.
    fn first_refused(&self, range: PageRange, access: Access) -> Option<(Page, Errno)> {
        let mut pieces = pieces(self.mm.process(), range);
        let piece = pieces.find(|piece| piece.rights() < access)?;
        let errno = match piece.rights() {
            Access::None => Errno::FAULT,
            _ => Errno::PERM,
        };
        Some((piece.range.first(), errno))
    }

    /// Copies the first pages of `rest`, as many as can be without a fault, and returns how many.
    fn copy_some(
        &self,
        range: PageRange,
        rest: PageRange,
        unwatched: &[PageRange],
        transfer: &mut Transfer<'_>,
    ) -> u64 {
        let next = rest.first();
        let direct = unwatched.iter().find(|part| part.contains(next));
        if let Some(direct) = direct.and_then(|part| part.intersection(rest)) {
            return self.copy_unwatched(range, direct, transfer);
        }
        self.copy(range, next, transfer).min(rest.pages())
    }

    /// Copies from `next` on what is in the page table, and returns how many pages.
    fn copy(&self, range: PageRange, next: Page, transfer: &mut Transfer<'_>) -> u64 {
        let mut done = 0;
        let left = range.last().number() - next.number() + 1;
        while done < left {
            let page = next.checked_add(done).expect("within the range");
            let pages = (left - done).min(COPIED_AT_ONCE);
            let at = bytes_of(range, page, pages);
            let copied = self.table(|table| transfer.through(table, page, at)).unwrap_or(0);
            done += copied;
            if copied < pages {
                break;
            }
        }
        done
    }

    /// Copies pages as the kernel has them at this moment, and returns how many could be.
    fn copy_unwatched(
        &self,
        range: PageRange,
        pages: PageRange,
        transfer: &mut Transfer<'_>,
    ) -> u64 {
        let memory = self.mm.process().backend().memory();
        let at = bytes_of(range, pages.first(), pages.pages());
        let frame = Frame(pages.first().number());
        let copied = match transfer {
            Transfer::Load(bytes) => memory.try_read(frame, 0, &mut bytes[at]),
            Transfer::Store(bytes) => memory.try_write(frame, 0, &bytes[at]),
        };
        (copied / PAGE_SIZE) as u64
    }

    /// Faults `range` in, and enters it in the page table; returns the parts that are not in it since
    /// nobody watches over them.
    fn fault(&self, range: PageRange, access: Access) -> Result<Vec<PageRange>, Errno> {
        // All at once: the fault itself would do it page by page.
        self.bring_home(range, |unit| unit != self.unit);
        let mut unwatched = Vec::new();
        let mut next = Some(range);
        while let Some(rest) = next {
            let pages = rest.pages().min(FAULTED_AT_ONCE);
            let some = PageRange::from_pages(rest.first(), pages).expect("a part of the rest");
            let done = match self.fault_some(some, access) {
                Ok(()) => some,
                Err(FaultError::Denied { page, .. }) => {
                    let part = self.unwatched(page, rest, access).ok_or(Errno::FAULT)?;
                    let before = Page::new(page.number().wrapping_sub(1));
                    let before = before.filter(|_| rest.first() < page);
                    if let Some(before) =
                        before.and_then(|last| PageRange::from_bounds(rest.first(), last))
                    {
                        self.fault_some(before, access).map_err(|error| self.errno(error))?;
                    }
                    unwatched.push(part);
                    PageRange::from_bounds(rest.first(), part.last()).expect("it is further on")
                }
                Err(error) => return Err(self.errno(error)),
            };
            let after = done.last().checked_add(1);
            next = after.and_then(|after| PageRange::from_bounds(after, range.last()));
        }
        Ok(unwatched)
    }

    fn fault_some(&self, range: PageRange, access: Access) -> Result<(), FaultError> {
        let request = match access {
            Access::Write => RangeFault::write(range),
            _ => RangeFault::read(range),
        };
        for _ in 0..TRIES {
            let faulted = self.mirror().range_fault(&request)?;
            let held = |at: &Residency| matches!(at, Residency::Exclusive { .. });
            if !faulted.entries.iter().any(|entry| held(&entry.residency)) {
                if access == Access::Read {
                    self.protect_what_is_shared(range);
                }
                return Ok(());
            }
            // An ordinary access ends it, whoever of this unit holds it.
            self.end_exclusive(range);
        }
        Err(FaultError::Collided { page: range.first(), collisions: TRIES })
    }

    /// Keeps the device from storing, without another fault, to what a CPU could not store to without
    /// one.
    pub(super) fn protect_what_is_shared(&self, range: PageRange) {
        let process = self.mm.process();
        let mut flags = Vec::new();
        for piece in pieces(process, range) {
            let Some(mapping) = piece.mapping.filter(|mapping| mapping.writable) else { continue };
            flags.clear();
            process.page_flags(piece.range, &mut flags);
            let shared = piece.range.iter().zip(&flags).filter(|(_, flags)| {
                flags.contains(PageFlags::PRESENT) && !is_writable(&mapping, **flags)
            });
            for part in joined(shared.map(|(page, _)| page.into())) {
                self.table(|table| table.protect(part));
            }
        }
    }

    /// Returns the part of `rest` around `page`, in one mapping, that the program may access like this
    /// and that nobody would hear of changes to; `None` if the device has no business there.
    fn unwatched(&self, page: Page, rest: PageRange, access: Access) -> Option<PageRange> {
        let process = self.mm.process();
        let mapping = process.mapping(page).filter(|mapping| mapping.range.contains(page))?;
        let part = PageRange::from_bounds(page, rest.last())?.intersection(mapping.range)?;
        (mapping.rights >= access && self.may_be_copied(part, &mapping)).then_some(part)
    }

    /// Tells whether pages can be copied with nobody watching: not where somebody else handles what is
    /// missing, who need not answer.
    fn may_be_copied(&self, part: PageRange, mapping: &Mapping) -> bool {
        match mapping.kind {
            MappingKind::File | MappingKind::Special => true,
            MappingKind::Secret => false,
            _ => {
                let mut flags = Vec::new();
                self.mm.process().page_flags(part, &mut flags);
                let there = |flags: &PageFlags| {
                    flags.contains(PageFlags::PRESENT) && !flags.contains(PageFlags::GUARD)
                };
                flags.iter().all(there)
            }
        }
    }

    fn errno(&self, error: FaultError) -> Errno {
        match error {
            FaultError::Denied { allowed: Access::Read, wanted: Access::Write, .. } => Errno::PERM,
            FaultError::Collided { .. } | FaultError::TimedOut { .. } => Errno::BUSY,
            _ => Errno::FAULT,
        }
    }
}

impl Transfer<'_> {
    fn access(&self) -> Access {
        match self {
            Transfer::Load(_) => Access::Read,
            Transfer::Store(_) => Access::Write,
        }
    }

    fn through(&mut self, table: &PageTable, page: Page, at: std::ops::Range<usize>) -> u64 {
        match self {
            Transfer::Load(bytes) => table.load(page, &mut bytes[at]),
            Transfer::Store(bytes) => table.store(page, &bytes[at]),
        }
    }
}

/// Returns where the bytes of `pages` pages from `page` on are, of a copy of `range`.
fn bytes_of(range: PageRange, page: Page, pages: u64) -> std::ops::Range<usize> {
    let first = (page.number() - range.first().number()) as usize * PAGE_SIZE;
    first..first + pages as usize * PAGE_SIZE
}

/// Makes `output` a copy of `range` that has yet to be made.
fn make_room(range: PageRange, output: &mut Vec<u8>) -> Result<(), Errno> {
    let bytes = abi::buffer_bytes(range)?;
    let more = bytes.saturating_sub(output.len());
    output.try_reserve_exact(more).map_err(|_| Errno::NOMEM)?;
    // What is there already is overwritten, or cleared.
    output.resize(bytes, 0);
    Ok(())
}
