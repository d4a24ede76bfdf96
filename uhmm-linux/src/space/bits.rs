//! A bit for each page of a region.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use uhmm::PageRange;

/// How many words of bits are made at a time: those of 128 MiB.
const WORDS: usize = 512;

/// How many pages have their bits in one word.
const PAGES: u64 = 64;

/// The bits of all of them.
const ALL: u64 = u64::MAX;

/// A bit for each page of a range, all of them clear at first. Takes memory as far as bits are set.
///
/// All accesses are relaxed: who asks about a page owns it, or holds the lock under which it changed
/// hands. A word is shared with pages of other owners, so it is changed in one step, unless all of its
/// pages are the caller's: then nobody else changes it.
pub(super) struct PageBits {
    range: PageRange,
    leaves: Box<[OnceLock<Box<[AtomicU64; WORDS]>>]>,
}

impl PageBits {
    pub(super) fn new(range: PageRange) -> PageBits {
        let leaves = range.pages().div_ceil(WORDS as u64 * PAGES);
        PageBits { range, leaves: (0..leaves).map(|_| OnceLock::new()).collect() }
    }

    /// Sets the bits of `pages`.
    pub(super) fn set(&self, pages: PageRange) {
        for (index, mask) in self.words(pages) {
            let leaf = self.leaves[index / WORDS]
                .get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
            match mask {
                ALL => leaf[index % WORDS].store(ALL, Ordering::Relaxed),
                _ => _ = leaf[index % WORDS].fetch_or(mask, Ordering::Relaxed),
            }
        }
    }

    /// Clears the bits of `pages`, and tells whether one was set.
    pub(super) fn clear(&self, pages: PageRange) -> bool {
        let mut any = false;
        for (index, mask) in self.words(pages) {
            if let Some(leaf) = self.leaves[index / WORDS].get() {
                let word = &leaf[index % WORDS];
                let before = match mask {
                    ALL => {
                        let before = word.load(Ordering::Relaxed);
                        word.store(0, Ordering::Relaxed);
                        before
                    }
                    _ => word.fetch_and(!mask, Ordering::Relaxed),
                };
                any |= before & mask != 0;
            }
        }
        any
    }

    /// Tells whether one of the bits of `pages` is set.
    pub(super) fn any(&self, pages: PageRange) -> bool {
        self.words(pages).any(|(index, mask)| {
            let leaf = self.leaves[index / WORDS].get();
            leaf.is_some_and(|leaf| leaf[index % WORDS].load(Ordering::Relaxed) & mask != 0)
        })
    }

    /// Returns how many of `pages` from the first on have the same bit, and which.
    pub(super) fn run(&self, pages: PageRange) -> (bool, u64) {
        let bit = self.any(pages.first().into());
        let others = if bit { 0 } else { u64::MAX };
        let mut same = 0;
        for (index, mask) in self.words(pages) {
            let leaf = self.leaves[index / WORDS].get();
            let word = leaf.map_or(0, |leaf| leaf[index % WORDS].load(Ordering::Relaxed));
            let differ = (word ^ others ^ u64::MAX) & mask;
            if differ != 0 {
                same += u64::from(differ.trailing_zeros() - mask.trailing_zeros());
                break;
            }
            same += u64::from(mask.count_ones());
        }
        (bit, same)
    }

    /// Returns the words that `pages` have bits in, each with those bits.
    fn words(&self, pages: PageRange) -> impl Iterator<Item = (usize, u64)> + use<> {
        let first = pages.first().number() - self.range.first().number();
        let end = first + pages.pages();
        (first / PAGES..end.div_ceil(PAGES)).map(move |word| {
            let from = first.max(word * PAGES) - word * PAGES;
            let to = end.min((word + 1) * PAGES) - word * PAGES;
            (word as usize, (u64::MAX >> (PAGES - (to - from))) << from)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use uhmm::Page;

    use super::*;

    fn pages(from: u64, count: u64) -> PageRange {
        PageRange::from_pages(Page::new(from).expect("a page"), count).expect("a range")
    }

    proptest! {
        #[test]
        fn bits_are_those_of_a_set(
            // Around the edge between two leaves, and elsewhere.
            steps in prop::collection::vec((any::<bool>(), 32_500_u64..33_000, 1_u64..300), 1..40)
        ) {
            let (base, whole) = (512 * 7, 40_000);
            let bits = PageBits::new(pages(base, whole));
            let mut set = BTreeSet::new();
            for (on, from, count) in steps {
                let range = base + from..base + from + count;
                let of = pages(range.start, count);
                let before = range.clone().any(|page| set.contains(&page));
                prop_assert_eq!(bits.any(of), before);
                let first = set.contains(&range.start);
                let same = range.clone().take_while(|page| set.contains(page) == first).count();
                prop_assert_eq!(bits.run(of), (first, same as u64));
                if on {
                    bits.set(of);
                    set.extend(range);
                } else {
                    prop_assert_eq!(bits.clear(of), before);
                    set.retain(|page| !range.contains(page));
                }
            }
        }
    }
}
