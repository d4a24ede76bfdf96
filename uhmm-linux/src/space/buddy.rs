//! Which blocks of a region are free: a buddy of orders up to a huge page.
//!
//! Blocks begin at multiples of their size, in the region and, as that begins at the edge of a
//! huge page, in the address space. A block may be given back in other pieces than it was given
//! out in: what is free is all that is remembered.

use uhmm::{Order, Page, PageRange};

/// The free blocks of one region.
pub(super) struct Buddy {
    range: PageRange,
    /// The first page, from the start of the region, that was never given out.
    fresh: u64,
    /// The free blocks below that, by order, as their numbers among the blocks of that order.
    free: [Numbers; Buddy::ORDERS],
    used: u64,
}

/// A set of numbers from 0 on, of which the smallest is found quickly.
#[derive(Default)]
struct Numbers {
    /// A bit for each number; then a bit for each word of the level before that has one set.
    levels: [Vec<u64>; Numbers::LEVELS],
}

impl Numbers {
    /// So many that the last is short: that of 2^26 numbers, the pages of 256 GiB, has 256 words.
    const LEVELS: usize = 3;

    fn first(&self) -> Option<u64> {
        let top = self.levels[Numbers::LEVELS - 1].iter().position(|&word| word != 0)?;
        let number = self
            .levels
            .iter()
            .rev()
            .fold(top, |number, level| 64 * number + level[number].trailing_zeros() as usize);
        Some(number as u64)
    }

    /// Adds a number, and tells whether it is new.
    fn insert(&mut self, number: u64) -> bool {
        let mut number = number as usize;
        for (depth, level) in self.levels.iter_mut().enumerate() {
            let (index, bit) = (number / 64, 1 << (number % 64));
            if level.len() <= index {
                level.resize(index + 1, 0);
            }
            let before = level[index];
            level[index] |= bit;
            if depth == 0 && before & bit != 0 {
                return false;
            }
            if before != 0 {
                break;
            }
            number = index;
        }
        true
    }

    /// Takes a number out, and tells whether it was there.
    fn remove(&mut self, number: u64) -> bool {
        let mut number = number as usize;
        for (depth, level) in self.levels.iter_mut().enumerate() {
            let (index, bit) = (number / 64, 1 << (number % 64));
            let Some(word) = level.get_mut(index) else { return false };
            if depth == 0 && *word & bit == 0 {
                return false;
            }
            *word &= !bit;
            if *word != 0 {
                break;
            }
            number = index;
        }
        true
    }
}

impl Buddy {
    const ORDERS: usize = Order::HUGE.get() as usize + 1;

    /// Makes a buddy of `range`, which begins and ends at the edge of a huge page, with everything
    /// free.
    pub(super) fn new(range: PageRange) -> Buddy {
        assert_eq!(range.first().align_down(Order::HUGE), range.first(), "a region is aligned");
        Buddy { range, fresh: 0, free: Default::default(), used: 0 }
    }

    /// Returns how many pages are given out.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Takes a block, or nothing if there is none of the order.
    pub(super) fn allocate(&mut self, order: Order) -> Option<Page> {
        let wanted = usize::from(order.get());
        if wanted >= Buddy::ORDERS {
            return None;
        }
        let free = |have: usize| Some((have, self.free[have].first()?));
        let (mut have, mut number) = match (wanted..Buddy::ORDERS).find_map(free) {
            Some((have, number)) => {
                self.free[have].remove(number);
                (have, number)
            }
            None => (Buddy::ORDERS - 1, self.take_fresh()?),
        };
        while have > wanted {
            have -= 1;
            number *= 2;
            self.free[have].insert(number + 1);
        }
        self.used += order.pages();
        self.range.first().checked_add(number << wanted)
    }

    fn take_fresh(&mut self) -> Option<u64> {
        let at = self.fresh;
        let end = at + Order::HUGE.pages();
        (end <= self.range.pages()).then(|| {
            self.fresh = end;
            at >> Order::HUGE.get()
        })
    }

    /// Gives a block back.
    pub(super) fn free(&mut self, first: Page, order: Order) {
        let mut order = usize::from(order.get());
        let mut number = (first.number() - self.range.first().number()) >> order;
        self.used -= 1 << order;
        while order + 1 < Buddy::ORDERS && self.free[order].remove(number ^ 1) {
            number /= 2;
            order += 1;
        }
        let new = self.free[order].insert(number);
        debug_assert!(new, "a block is given back once");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn region(huge: u64) -> PageRange {
        let first = Page::new(512 * 100).expect("a page");
        PageRange::from_pages(first, 512 * huge).expect("a range")
    }

    #[test]
    fn a_region_is_given_out_to_the_last_page_and_becomes_whole_again() {
        let mut buddy = Buddy::new(region(2));
        let pages: Vec<Page> = (0..1024).filter_map(|_| buddy.allocate(Order::PAGE)).collect();
        assert_eq!((pages.len(), buddy.used()), (1024, 1024));
        assert_eq!(buddy.allocate(Order::PAGE), None);
        pages.into_iter().for_each(|page| buddy.free(page, Order::PAGE));
        assert_eq!(buddy.used(), 0);
        assert!(buddy.allocate(Order::HUGE).is_some() && buddy.allocate(Order::HUGE).is_some());
    }

    proptest! {
        #[test]
        fn blocks_are_aligned_and_never_overlap(
            steps in prop::collection::vec((any::<bool>(), 0u8..10, any::<prop::sample::Index>()), 1..200)
        ) {
            let range = region(3);
            let mut buddy = Buddy::new(range);
            let mut held: BTreeMap<Page, Order> = BTreeMap::new();
            for (allocate, order, which) in steps {
                let order = Order::new(order).expect("an order");
                if allocate || held.is_empty() {
                    let Some(first) = buddy.allocate(order) else { continue };
                    let block = first.block(order);
                    prop_assert_eq!(block.first(), first);
                    prop_assert!(range.covers(block));
                    prop_assert!(held.iter().all(|(&at, &of)| !at.block(of).overlaps(block)));
                    held.insert(first, order);
                } else {
                    let keys: Vec<Page> = held.keys().copied().collect();
                    let first = *which.get(&keys);
                    let order = held.remove(&first).expect("it is held");
                    // In two halves, where it has two.
                    match order.get().checked_sub(1).and_then(Order::new) {
                        Some(half) => {
                            let second = first.checked_add(half.pages()).expect("within");
                            buddy.free(second, half);
                            buddy.free(first, half);
                        }
                        None => buddy.free(first, order),
                    }
                }
                let used: u64 = held.values().map(|order| order.pages()).sum();
                prop_assert_eq!(buddy.used(), used);
            }
        }
    }
}
