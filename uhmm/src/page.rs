//! Pages, ranges of pages, and sizes of pages.

use std::fmt;
use std::num::NonZeroU64;

use mmu_notifier::VaRange;

/// The base-two logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// The bytes of a page, the unit in which everything here is counted.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;

/// How many pages a 64-bit address space has.
const PAGES: u64 = 1 << (u64::BITS - PAGE_SHIFT);

/// A page of a virtual address space, by its number: its address divided by [`PAGE_SIZE`].
///
/// # Invariants
///
/// 1. The number is less than 2^52, so the page's address fits 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page(u64);

/// A range of pages: never empty, never wrapping, and free to end at the top of the address space.
///
/// # Invariants
///
/// 1. `first + pages <= 2^52`.
///
/// # Examples
///
/// ```
/// use uhmm::{Page, PageRange};
///
/// let range = PageRange::new(0x2000, 0x3000)?;
/// assert_eq!(range.pages(), 3);
/// assert!(range.contains(Page::containing(0x4fff)));
/// assert!(PageRange::new(0x2001, 0x3000).is_err());
/// # Ok::<(), uhmm::PageRangeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    first: Page,
    pages: NonZeroU64,
}

/// The size of a page or of a block of pages, as the base-two logarithm of its number of pages.
///
/// A block of order `n` holds `2^n` pages and begins at a multiple of that.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order(u8);

/// Why two numbers are not a [`PageRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageRangeError {
    /// The range would hold no page.
    #[error("the range at {address:#x} is empty: a range holds at least one page")]
    Empty {
        /// The address asked for.
        address: u64,
    },
    /// The range does not begin and end at the edge of a page.
    #[error(
        "the range of {bytes:#x} bytes at {address:#x} does not begin and end at multiples of \
         {PAGE_SIZE:#x}: round it, or use `PageRange::covering`"
    )]
    Unaligned {
        /// The address asked for.
        address: u64,
        /// The length asked for, in bytes.
        bytes: u64,
    },
    /// The range would go past the last page.
    #[error(
        "the range of {pages:#x} pages at {address:#x} wraps past the top of the address space"
    )]
    Wraps {
        /// The address asked for.
        address: u64,
        /// The length asked for, in pages.
        pages: u64,
    },
}

impl Page {
    /// The last page of a 64-bit address space.
    pub const MAX: Page = Page(PAGES - 1);

    /// Makes the page of this number; `None` from 2^52 on.
    pub const fn new(number: u64) -> Option<Page> {
        if number < PAGES { Some(Page(number)) } else { None }
    }

    /// Returns the page that holds `address`.
    pub const fn containing(address: u64) -> Page {
        Page(address >> PAGE_SHIFT)
    }

    /// Returns the page's number.
    #[doc(alias = "vpn")]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// Returns the address of the page's first byte.
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// Returns the page that is `pages` further; `None` past the top of the address space.
    pub const fn checked_add(self, pages: u64) -> Option<Page> {
        match self.0.checked_add(pages) {
            Some(number) => Page::new(number),
            None => None,
        }
    }

    /// Returns the first page of the block of this order that holds the page.
    pub const fn align_down(self, order: Order) -> Page {
        Page(self.0 & !(order.pages() - 1))
    }

    /// Returns the block of this order that holds the page.
    pub const fn block(self, order: Order) -> PageRange {
        let first = self.align_down(order);
        match NonZeroU64::new(order.pages()) {
            // An aligned block ends at the top of the address space at the latest.
            Some(pages) => PageRange { first, pages },
            None => unreachable!(),
        }
    }
}

impl PageRange {
    /// Every page there is.
    pub const ALL: PageRange = PageRange { first: Page(0), pages: NonZeroU64::new(PAGES).unwrap() };

    /// Makes the range of `bytes` bytes from `address`, both multiples of [`PAGE_SIZE`].
    ///
    /// # Errors
    ///
    /// See [`PageRangeError`].
    pub const fn new(address: u64, bytes: u64) -> Result<PageRange, PageRangeError> {
        if !address.is_multiple_of(PAGE_SIZE as u64) || !bytes.is_multiple_of(PAGE_SIZE as u64) {
            return Err(PageRangeError::Unaligned { address, bytes });
        }
        PageRange::from_pages(Page::containing(address), bytes >> PAGE_SHIFT)
    }

    /// Makes the range of `pages` pages from `first`.
    ///
    /// # Errors
    ///
    /// [`PageRangeError::Empty`] and [`PageRangeError::Wraps`].
    pub const fn from_pages(first: Page, pages: u64) -> Result<PageRange, PageRangeError> {
        let address = first.address();
        match NonZeroU64::new(pages) {
            None => Err(PageRangeError::Empty { address }),
            Some(_) if pages > PAGES - first.0 => Err(PageRangeError::Wraps { address, pages }),
            Some(pages) => Ok(PageRange { first, pages }),
        }
    }

    /// Makes the range from `first` to `last`, both within it; `None` where `last < first`.
    pub const fn from_bounds(first: Page, last: Page) -> Option<PageRange> {
        if last.0 < first.0 {
            return None;
        }
        match NonZeroU64::new(last.0 - first.0 + 1) {
            Some(pages) => Some(PageRange { first, pages }),
            None => None,
        }
    }

    /// Makes the smallest range of pages that holds every address of `range`.
    pub const fn covering(range: VaRange) -> PageRange {
        let (first, last) = (Page::containing(range.start()), Page::containing(range.last()));
        match PageRange::from_bounds(first, last) {
            Some(range) => range,
            None => unreachable!(),
        }
    }

    /// Returns the first page.
    pub const fn first(self) -> Page {
        self.first
    }

    /// Returns the last page, which is within the range.
    pub const fn last(self) -> Page {
        Page(self.first.0 + (self.pages.get() - 1))
    }

    /// Returns the address of the first byte.
    pub const fn address(self) -> u64 {
        self.first.address()
    }

    /// Returns the number of pages.
    pub const fn pages(self) -> u64 {
        self.pages.get()
    }

    /// Returns the number of pages as a length of a slice.
    ///
    /// # Panics
    ///
    /// On machines whose pointers are smaller than the range.
    pub fn len(self) -> usize {
        usize::try_from(self.pages.get()).expect("a slice of pages fits the machine")
    }

    /// Always `false`: a range is never empty.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Returns the same range in bytes.
    pub const fn va_range(self) -> VaRange {
        let last = self.last().address() + (PAGE_SIZE as u64 - 1);
        match VaRange::from_bounds(self.address(), last) {
            Some(range) => range,
            None => unreachable!(),
        }
    }

    /// Tells whether `page` is within the range.
    pub const fn contains(self, page: Page) -> bool {
        self.first.0 <= page.0 && page.0 - self.first.0 < self.pages.get()
    }

    /// Tells whether every page of `other` is within the range.
    pub const fn covers(self, other: PageRange) -> bool {
        self.contains(other.first) && self.contains(other.last())
    }

    /// Tells whether the two ranges share a page.
    pub const fn overlaps(self, other: PageRange) -> bool {
        self.first.0 <= other.last().0 && other.first.0 <= self.last().0
    }

    /// Returns the pages that both ranges hold, if any.
    pub fn intersection(self, other: PageRange) -> Option<PageRange> {
        PageRange::from_bounds(self.first.max(other.first), self.last().min(other.last()))
    }

    /// Returns the position of `page` in the range, if it is within.
    pub fn index_of(self, page: Page) -> Option<usize> {
        self.contains(page).then(|| (page.0 - self.first.0) as usize)
    }

    /// Returns the pages in ascending order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Page> + ExactSizeIterator + Clone {
        (0..self.len()).map(move |index| Page(self.first.0 + index as u64))
    }

    /// Cuts the range at the edges of blocks of `order`, and returns the pieces in ascending
    /// order: the first and the last may be smaller than a block.
    pub fn blocks(self, order: Order) -> impl Iterator<Item = PageRange> + Clone {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let range = rest?;
            let piece = range.first.block(order).intersection(range)?;
            rest = piece
                .last()
                .checked_add(1)
                .and_then(|next| PageRange::from_bounds(next, range.last()));
            Some(piece)
        })
    }
}

impl From<Page> for PageRange {
    fn from(page: Page) -> PageRange {
        page.block(Order::PAGE)
    }
}

impl From<PageRange> for VaRange {
    fn from(range: PageRange) -> VaRange {
        range.va_range()
    }
}

impl Order {
    /// One page of 4 KiB.
    pub const PAGE: Order = Order(0);

    /// A huge page of 2 MiB: 512 pages.
    #[doc(alias = "PMD_ORDER")]
    pub const HUGE: Order = Order(9);

    /// The largest order there is: 1 GiB.
    #[doc(alias = "PUD_ORDER")]
    pub const MAX: Order = Order(18);

    /// Makes an order; `None` above [`Order::MAX`].
    pub const fn new(order: u8) -> Option<Order> {
        if order <= Order::MAX.0 { Some(Order(order)) } else { None }
    }

    /// Returns the logarithm.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Returns the next smaller order.
    ///
    /// # Panics
    ///
    /// On [`Order::PAGE`].
    pub(crate) const fn smaller(self) -> Order {
        assert!(self.0 > 0, "nothing is smaller than a page");
        Order(self.0 - 1)
    }

    /// Returns the number of pages of a block.
    pub const fn pages(self) -> u64 {
        1 << self.0
    }

    /// Returns the number of bytes of a block.
    pub const fn bytes(self) -> usize {
        PAGE_SIZE << self.0
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.address())
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {self}")
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.va_range(), f)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "order {}", self.0)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Regression 59: arithmetic at the end of the address space.
    #[test]
    fn a_range_may_end_at_the_top_of_the_address_space_and_not_beyond() {
        let top = PageRange::from(Page::MAX);
        assert_eq!(top.va_range().last(), u64::MAX);
        assert_eq!(top.last().checked_add(1), None);
        assert!(matches!(
            PageRange::from_pages(Page::MAX, 2),
            Err(PageRangeError::Wraps { pages: 2, .. })
        ));
        assert_eq!(PageRange::covering(VaRange::ALL), PageRange::ALL);
        assert_eq!(PageRange::ALL.va_range(), VaRange::ALL);
        assert!(PageRange::ALL.contains(Page::MAX) && PageRange::ALL.covers(top));
        let huge = Page::MAX.block(Order::HUGE);
        assert_eq!((huge.last(), huge.pages()), (Page::MAX, 512));
        assert_eq!(huge.blocks(Order::HUGE).collect::<Vec<_>>(), [huge]);
        assert_eq!(PageRange::new(u64::MAX - 0xfff, 0x1000), Ok(top));
    }

    #[test]
    fn what_is_no_range_is_refused_with_the_reason() {
        assert_eq!(PageRange::new(0x1000, 0), Err(PageRangeError::Empty { address: 0x1000 }));
        let unaligned = |address, bytes| Err(PageRangeError::Unaligned { address, bytes });
        assert_eq!(PageRange::new(0x1001, 0x1000), unaligned(0x1001, 0x1000));
        assert_eq!(PageRange::new(0x1000, 0x1001), unaligned(0x1000, 0x1001));
        assert_eq!(Page::new(1 << 52), None);
        assert_eq!(Order::new(19), None);
    }

    proptest! {
        #[test]
        fn blocks_are_a_partition_at_aligned_edges(
            first in 0u64..5000, pages in 1u64..3000, order in 0u8..11
        ) {
            let order = Order::new(order).expect("an order");
            let range = PageRange::from_pages(Page(first), pages).expect("a range");
            let pieces: Vec<PageRange> = range.blocks(order).collect();
            let all: Vec<Page> = pieces.iter().flat_map(|piece| piece.iter()).collect();
            prop_assert_eq!(all, range.iter().collect::<Vec<_>>());
            for piece in pieces {
                prop_assert!(piece.first().block(order).covers(piece));
            }
        }

        #[test]
        fn ranges_agree_with_sets_of_pages(
            a in (0u64..40, 1u64..20), b in (0u64..40, 1u64..20)
        ) {
            let range = |(first, pages)| PageRange::from_pages(Page(first), pages).expect("small");
            let (a, b) = (range(a), range(b));
            let both: Vec<Page> = a.iter().filter(|&page| b.contains(page)).collect();
            let common: Vec<Page> = a.intersection(b).map(|range| range.iter().collect()).unwrap_or_default();
            prop_assert_eq!(&both, &common);
            prop_assert_eq!(a.overlaps(b), !both.is_empty());
            prop_assert_eq!(a.covers(b), both.len() == b.len());
        }
    }
}
