//! Ranges of virtual addresses.

use std::fmt;
use std::ops::{Range, RangeInclusive};

/// A range of virtual addresses, in bytes: never empty, never wrapping, and free to end at the top
/// of the address space.
///
/// # Invariants
///
/// 1. `start <= last`. The range holds its last address, so the range that ends at the top of a
///    64-bit address space is an ordinary value and its end needs no 65th bit.
///
/// # Examples
///
/// ```
/// use mmu_notifier::VaRange;
///
/// let page = VaRange::new(0x1000, 0x1000)?;
/// assert_eq!((page.start(), page.last()), (0x1000, 0x1fff));
/// assert!(page.overlaps(VaRange::ALL));
/// assert!(VaRange::new(0x1000, 0).is_err());
/// assert!(VaRange::new(u64::MAX, 2).is_err());
/// # Ok::<(), mmu_notifier::VaRangeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VaRange {
    start: u64,
    last: u64,
}

/// Why two numbers are not a [`VaRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VaRangeError {
    /// The range would hold no address: give it a length of at least one byte.
    #[error("the range at {start:#x} is empty: a range holds at least one byte")]
    Empty {
        /// The first address asked for.
        start: u64,
    },
    /// The range would go past the last address, `u64::MAX`.
    #[error("the range of {bytes:#x} bytes at {start:#x} wraps past the top of the address space")]
    Wraps {
        /// The first address asked for.
        start: u64,
        /// The length asked for, in bytes.
        bytes: u64,
    },
}

impl VaRange {
    /// Every address there is.
    pub const ALL: VaRange = VaRange { start: 0, last: u64::MAX };

    /// Makes the range of `bytes` bytes from `start`.
    ///
    /// # Errors
    ///
    /// [`VaRangeError::Empty`] for zero bytes, [`VaRangeError::Wraps`] where the last address would
    /// not fit 64 bits.
    pub const fn new(start: u64, bytes: u64) -> Result<VaRange, VaRangeError> {
        if bytes == 0 {
            return Err(VaRangeError::Empty { start });
        }
        match start.checked_add(bytes - 1) {
            Some(last) => Ok(VaRange { start, last }),
            None => Err(VaRangeError::Wraps { start, bytes }),
        }
    }

    /// Makes the range from `start` to `last`, both within it; `None` where `last < start`.
    pub const fn from_bounds(start: u64, last: u64) -> Option<VaRange> {
        if start <= last { Some(VaRange { start, last }) } else { None }
    }

    /// Returns the first address.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Returns the last address, which is within the range.
    pub const fn last(self) -> u64 {
        self.last
    }

    /// Returns the length in bytes. It does not fit 64 bits for [`VaRange::ALL`].
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty (invariant 1)")]
    pub const fn len(self) -> u128 {
        (self.last - self.start) as u128 + 1
    }

    /// Tells whether `address` is within the range.
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address <= self.last
    }

    /// Tells whether every address of `other` is within the range.
    pub const fn covers(self, other: VaRange) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Tells whether the two ranges share an address.
    pub const fn overlaps(self, other: VaRange) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// Returns the addresses that both ranges hold, if any.
    pub const fn intersection(self, other: VaRange) -> Option<VaRange> {
        let start = if self.start > other.start { self.start } else { other.start };
        let last = if self.last < other.last { self.last } else { other.last };
        VaRange::from_bounds(start, last)
    }

    /// Returns the addresses of this range that `other` does not hold: the piece below `other` and
    /// the piece above it, in this order.
    pub const fn difference(self, other: VaRange) -> [Option<VaRange>; 2] {
        if !self.overlaps(other) {
            return if self.last < other.start { [Some(self), None] } else { [None, Some(self)] };
        }
        let below = if self.start < other.start {
            VaRange::from_bounds(self.start, other.start - 1)
        } else {
            None
        };
        let above = if self.last > other.last {
            VaRange::from_bounds(other.last + 1, self.last)
        } else {
            None
        };
        [below, above]
    }
}

impl TryFrom<Range<u64>> for VaRange {
    type Error = VaRangeError;

    fn try_from(range: Range<u64>) -> Result<VaRange, VaRangeError> {
        if range.start >= range.end {
            return Err(VaRangeError::Empty { start: range.start });
        }
        Ok(VaRange { start: range.start, last: range.end - 1 })
    }
}

impl TryFrom<RangeInclusive<u64>> for VaRange {
    type Error = VaRangeError;

    fn try_from(range: RangeInclusive<u64>) -> Result<VaRange, VaRangeError> {
        VaRange::from_bounds(*range.start(), *range.end())
            .ok_or(VaRangeError::Empty { start: *range.start() })
    }
}

impl fmt::Display for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}-{:#x}]", self.start, self.last)
    }
}

impl fmt::Debug for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
