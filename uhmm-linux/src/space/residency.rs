//! What is in memory, for who decides what is to leave it.
//!
//! Nothing here faults anything in, waits for a page, or registers anything, so a look costs the
//! program nothing. What is found was true at some moment of the call.

use uhmm::PageRange;

use super::Space;
use super::state::{numbers, range_of};
use super::take::movable;
use crate::sys::pagemap::Categories;

impl Space {
    /// Returns the memory that may move, in ascending order: by its mapping, and by whose it is.
    pub(crate) fn movable_ranges(&self) -> Vec<PageRange> {
        let mappings = self.kernel.vmas();
        let mut found = Vec::new();
        let state = self.lock();
        for mapping in mappings.iter().filter(|mapping| movable(mapping).is_ok()) {
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
