//! What is mapped in the range of a request, piece by piece.

use uhmm::{Access, Page, PageRange};
use uhmm_linux::{Mapping, MappingKind, PageFlags, Process};

/// What the device's own memory is called where it is mapped.
const DEVICE: &[u8] = b"/memfd:hmm_dmirror";

/// What the kernel's own files without a name are called: not memory that a device could have.
const NO_FILE: &[u8] = b"anon_inode:";

/// The part of a range that is in one mapping, or in none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) range: PageRange,
    pub(super) mapping: Option<Mapping>,
}

/// Returns the pieces of `range`, in ascending order, each looked up when it is asked for.
pub(super) fn pieces(process: &Process, range: PageRange) -> impl Iterator<Item = Piece> + '_ {
    let mut rest = Some(range);
    std::iter::from_fn(move || {
        let range = rest?;
        let piece = first_piece(process, range);
        let next = piece.range.last().checked_add(1);
        rest = next.and_then(|next| PageRange::from_bounds(next, range.last()));
        Some(piece)
    })
}

fn first_piece(process: &Process, range: PageRange) -> Piece {
    let Some(mapping) = process.mapping(range.first()) else {
        return Piece { range, mapping: None };
    };
    match mapping.range.intersection(range) {
        Some(part) if part.first() == range.first() => {
            Piece { range: part, mapping: Some(mapping) }
        }
        Some(part) => {
            let last = Page::new(part.first().number() - 1).expect("it is above another");
            let hole = PageRange::from_bounds(range.first(), last).expect("there is one between");
            Piece { range: hole, mapping: None }
        }
        None => Piece { range, mapping: None },
    }
}

impl Piece {
    /// Returns what a device may do here.
    pub(super) fn rights(&self) -> Access {
        self.mapping.map_or(Access::None, |mapping| mapping.rights)
    }

    /// Returns the mapping, if pages of its kind can be moved between memories.
    pub(super) fn migratable(&self, process: &Process) -> Option<Mapping> {
        let mapping = self.mapping.filter(|mapping| mapping.rights > Access::None)?;
        let named = |prefix: &[u8]| process.mapping_name(mapping.range.first()).starts_with(prefix);
        let not_memory = match mapping.kind {
            MappingKind::Hugetlb | MappingKind::Special | MappingKind::Secret => true,
            MappingKind::Shmem => named(DEVICE),
            MappingKind::File => named(NO_FILE),
            _ => false,
        };
        (!not_memory).then_some(mapping)
    }
}

/// Tells whether a CPU's store to a page would go through as the page table is now, with no fault.
///
/// The kernel does not say. A page of shared memory is taken to be writable if its mapping is; one of
/// private memory if it is nobody else's.
pub(super) fn is_writable(mapping: &Mapping, flags: PageFlags) -> bool {
    mapping.writable
        && flags.contains(PageFlags::PRESENT)
        && !flags.contains(PageFlags::ZERO)
        && (mapping.shared || is_own(flags))
}

/// Tells whether a page of private memory is one that no other process has mapped, and no file has.
fn is_own(flags: PageFlags) -> bool {
    flags.contains(PageFlags::EXCLUSIVE) && !flags.contains(PageFlags::FILE)
}

/// Joins ranges in ascending order that follow each other.
pub(super) fn joined(ranges: impl IntoIterator<Item = PageRange>) -> Vec<PageRange> {
    let mut joined: Vec<PageRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.last().checked_add(1) == Some(range.first()) => {
                *last = PageRange::from_bounds(last.first(), range.last()).expect("ascending");
            }
            _ => joined.push(range),
        }
    }
    joined
}
