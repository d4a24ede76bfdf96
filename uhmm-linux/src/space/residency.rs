//! What is in memory, for who decides what is to leave it.
//!
//! Nothing here faults anything in, waits for a page, or registers anything, so a look costs the
//! program nothing. What is found was true at some moment of the call.

use std::ops::Range;

use uhmm::{PAGE_SIZE, PageRange, StayReason};

use super::Space;
use super::state::{numbers, range_of};
use super::take::movable;
use crate::sys::maps::{Kind, Vma};
use crate::sys::pagemap::Categories;

/// Memory that is there and does not move, in bytes, by why. What is at several places in the
/// address space counts at each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Immovable {
    /// Mapped from files: programs, libraries, data; also pages of them that the process has changed.
    pub files: u64,
    /// Shared with other processes, or to be.
    pub shared: u64,
    /// Private memory that may not be written, or not be accessed at all.
    pub not_writable: u64,
    /// The kernel's own, huge pages that were set aside, and what is executable.
    pub special: u64,
    /// What serving a fault may need: stacks and thread-local memory of the threads that call in, the
    /// static data of loaded objects, what the loader keeps.
    pub reserved: u64,
    /// This crate's own, and what Rust code allocates where [`Allocator`](crate::Allocator) is
    /// installed.
    pub own: u64,
}

/// Says where memory of a mapping counts that does not move by its kind.
fn why_not(mapping: &Vma) -> Option<fn(&mut Immovable) -> &mut u64> {
    let why: fn(&mut Immovable) -> &mut u64 = match movable(mapping).err()? {
        StayReason::FileBacked if mapping.kind == Kind::File => |found| &mut found.files,
        StayReason::FileBacked if mapping.kind == Kind::Hugetlb => |found| &mut found.special,
        StayReason::FileBacked => |found| &mut found.shared,
        StayReason::Denied | StayReason::ReadOnly => |found| &mut found.not_writable,
        _ => |found| &mut found.special,
    };
    Some(why)
}

impl Space {
    /// Returns the memory that may move, in ascending order: by its mapping, and by whose it is.
    pub(crate) fn movable_ranges(&self) -> Vec<PageRange> {
        self.movable_parts(|_| true)
    }

    /// Returns those of them that are in mappings of a kind that `wanted` says.
    pub(super) fn movable_parts(&self, wanted: impl Fn(Kind) -> bool) -> Vec<PageRange> {
        let mappings = self.kernel.vmas();
        let mut found = Vec::new();
        let state = self.lock();
        let may_move = |mapping: &&Vma| wanted(mapping.kind) && movable(mapping).is_ok();
        for mapping in mappings.iter().filter(may_move) {
            let whole = numbers(mapping.range);
            let parts: Vec<_> = match &state.managed {
                None => vec![whole],
                Some(managed) => managed
                    .overlapping(&whole)
                    .map(|part| part.start.max(whole.start)..part.end.min(whole.end))
                    .collect(),
            };
            for part in parts {
                found.extend(state.reserved.gaps(&part).map(range_of));
            }
        }
        found
    }

    /// Returns how much memory takes part in nothing here, and why.
    pub(crate) fn immovable(&self) -> Immovable {
        self.reserve_this_thread();
        let mappings = self.kernel.vmas();
        let mut found = Immovable::default();
        let mut look = |part: PageRange, bytes: fn(&mut Immovable) -> &mut u64| {
            let mut present = Vec::new();
            self.resident_parts(part, &mut present);
            let pages: u64 = present.iter().map(|part| part.pages()).sum();
            *bytes(&mut found) += pages * PAGE_SIZE as u64;
        };
        for mapping in &mappings {
            let whole = numbers(mapping.range);
            let cut = |part: &Range<u64>| part.start.max(whole.start)..part.end.min(whole.end);
            let (own, reserved, rest) = {
                let state = self.lock();
                let own: Vec<_> = state.own.overlapping(&whole).map(cut).collect();
                let reserved: Vec<_> = state.reserved.overlapping(&whole).map(cut).collect();
                let reserved = reserved.iter().flat_map(|part| state.own.gaps(part)).collect();
                (own, reserved, state.own.gaps(&whole).collect::<Vec<_>>())
            };
            own.into_iter().for_each(|part| look(range_of(part), |found| &mut found.own));
            let reserved: Vec<Range<u64>> = reserved;
            match why_not(mapping) {
                Some(why) => rest.into_iter().for_each(|part| look(range_of(part), why)),
                None => {
                    let parts = reserved.into_iter().map(range_of);
                    parts.for_each(|part| look(part, |found| &mut found.reserved));
                }
            }
        }
        found
    }

    /// Appends the parts of `range` to `out` that take memory: what is there and is not the page of
    /// zeroes. A failed look finds nothing.
    pub(crate) fn resident_parts(&self, range: PageRange, out: &mut Vec<PageRange>) {
        let mut parts = Vec::new();
        if self.kernel.scan(range, Categories::PRESENT, &mut parts).is_err() {
            return;
        }
        let takes = |of: Categories| !of.contains(Categories::PFNZERO);
        for (part, _) in parts.into_iter().filter(|&(_, of)| takes(of)) {
            match out.last_mut() {
                Some(last) if last.last().checked_add(1) == Some(part.first()) => {
                    *last = PageRange::from_bounds(last.first(), part.last()).expect("ascending");
                }
                _ => out.push(part),
            }
        }
    }
}
