//! What is in the page table: `/proc/self/pagemap`.
//!
//! Two ways of asking. [`Pagemap::scan`] finds the pages of which something is true, and skips the
//! rest quickly: a huge page or an empty stretch costs as much as one page. [`Pagemap::entries`]
//! reads what the kernel says of each page. Neither faults anything in, and neither needs a
//! privilege for what it tells here. The answer is true for each page at some moment of the call,
//! and not for all at the same.
//!
//! `Documentation/admin-guide/mm/pagemap.rst` of the kernel describes both.
#![allow(dead_code, reason = "the interface is wrapped and tested whole, and used in part")]

use std::os::fd::OwnedFd;

use bitflags::bitflags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uhmm::{PAGE_SIZE, PageRange};

use super::abi::{self, PageRegion, PmScanArg, len_of};

bitflags! {
    /// What can be true of a page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub(crate) struct Categories: u64 {
        /// It is registered with a userfaultfd in asynchronous write-protect mode.
        const WPALLOWED = abi::PAGE_IS_WPALLOWED;
        /// It is not write-protected by a userfaultfd. True of all pages never protected.
        const WRITTEN = abi::PAGE_IS_WRITTEN;
        /// It is a page of a file or of shared memory.
        const FILE = abi::PAGE_IS_FILE;
        /// It is in memory and mapped.
        const PRESENT = abi::PAGE_IS_PRESENT;
        /// It is swapped out or migrating, or a mark of a userfaultfd stands where it would be.
        const SWAPPED = abi::PAGE_IS_SWAPPED;
        /// It is the page of zeroes that all share.
        const PFNZERO = abi::PAGE_IS_PFNZERO;
        /// It is a part of a huge page that is mapped as one.
        const HUGE = abi::PAGE_IS_HUGE;
        /// It was written to since its marks were cleared.
        const SOFT_DIRTY = abi::PAGE_IS_SOFT_DIRTY;
        /// It is a guard: whoever touches it gets SIGSEGV (6.15).
        const GUARD = abi::PAGE_IS_GUARD;
    }
}

/// The page table of the process that opened it, for a forked child too: the child opens its own.
#[derive(Debug)]
pub(crate) struct Pagemap {
    fd: OwnedFd,
    /// What the kernel can tell. It refuses to be asked for anything else.
    known: Categories,
}

impl Pagemap {
    /// An entry's bit: the page is mapped by this process only.
    pub(crate) const EXCLUSIVE: u64 = 1 << 56;
    /// An entry's bit: a userfaultfd write-protects the page.
    pub(crate) const UFFD_WP: u64 = 1 << 57;
    /// An entry's bit: the page is of a file, or of shared memory.
    pub(crate) const FILE: u64 = 1 << 61;
    /// An entry's bit: see [`Categories::SWAPPED`].
    pub(crate) const SWAPPED: u64 = 1 << 62;
    /// An entry's bit: the page is in memory and mapped.
    pub(crate) const PRESENT: u64 = 1 << 63;

    /// How many regions one ioctl brings: 1.5 KiB of stack.
    const REGIONS: usize = 64;

    /// Opens the calling process's, and finds out what the kernel can tell.
    ///
    /// # Errors
    ///
    /// Those of open(2); `ENOTTY` without `PAGEMAP_SCAN` (6.7).
    pub(crate) fn open() -> Result<Pagemap, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/proc/self/pagemap", flags, Mode::empty())?;
        let mut pagemap = Pagemap { fd, known: Categories::empty() };
        for category in Categories::all().iter() {
            match pagemap.scan_some(0..PAGE_SIZE as u64, [0, category.bits()], &mut []) {
                Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
                Ok(_) => pagemap.known |= category,
            }
        }
        Ok(pagemap)
    }

    /// Returns what the kernel can tell.
    pub(crate) fn known(&self) -> Categories {
        self.known
    }

    /// Finds the pages of `range` of which at least one of `any_of` is true (every mapped page if
    /// `any_of` is empty), and appends them to `out` in ascending order, with what of `report` is
    /// true of them. Neighbours of which the same is true come as one range. What the kernel cannot
    /// tell is true of no page.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the range is no memory that a program can have. `out` holds what was found
    /// before.
    #[doc(alias = "PAGEMAP_SCAN")]
    pub(crate) fn scan(
        &self,
        range: PageRange,
        any_of: Categories,
        report: Categories,
        out: &mut Vec<(PageRange, Categories)>,
    ) -> Result<(), Errno> {
        let mut start = range.address();
        let end = start.checked_add(len_of(range)).filter(|&end| end > start);
        let end = end.ok_or(Errno::FAULT)?;
        if !any_of.is_empty() && !any_of.intersects(self.known) {
            return Ok(());
        }
        let masks = [any_of & self.known, report & self.known].map(|mask| mask.bits());
        let mut regions = [PageRegion::default(); Pagemap::REGIONS];
        while start < end {
            // It stops at the end, or where one region more would not fit: always further on.
            let (found, walked) = self.scan_some(start..end, masks, &mut regions)?;
            for region in &regions[..found] {
                push(out, region);
            }
            start = walked;
        }
        Ok(())
    }

    /// Fills `out` with the entries of the pages of `range`; 0 for what no program can have.
    ///
    /// # Errors
    ///
    /// Those of pread(2).
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    pub(crate) fn entries(&self, range: PageRange, out: &mut [u64]) -> Result<(), Errno> {
        assert_eq!(range.pages(), out.len() as u64, "an entry for each page");
        let bytes = size_of_val(out);
        // SAFETY: these are the bytes of the slice, borrowed mutably, and any bytes are numbers.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), bytes) };
        let first = range.first().number() * size_of::<u64>() as u64;
        let mut done = 0;
        while done < bytes {
            let offset = first + done as u64;
            done += match rustix::io::pread(&self.fd, &mut out[done..], offset)? {
                0 => {
                    out[done..].fill(0);
                    bytes - done
                }
                read => read,
            };
        }
        Ok(())
    }

    /// Makes the ioctl once. Returns how many regions it found, and how far it came.
    #[inline]
    fn scan_some(
        &self,
        bounds: std::ops::Range<u64>,
        [any_of, report]: [u64; 2],
        regions: &mut [PageRegion],
    ) -> Result<(usize, u64), Errno> {
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start: bounds.start,
            end: bounds.end,
            vec: match regions {
                [] => 0,
                _ => regions.as_mut_ptr().expose_provenance() as u64,
            },
            vec_len: regions.len() as u64,
            category_anyof_mask: any_of,
            return_mask: report,
            ..PmScanArg::default()
        };
        // SAFETY: 1: `vec` is `regions`, of this length. 2: a scan without flags changes nothing.
        let found = unsafe { abi::call(&self.fd, &mut argument) }?;
        Ok((found as usize, argument.walk_end))
    }
}

/// Appends a region, or grows the last: the kernel joins neighbours only within one call.
#[inline]
fn push(out: &mut Vec<(PageRange, Categories)>, region: &PageRegion) {
    let range = PageRange::new(region.start, region.end - region.start);
    let range = range.expect("a region is made of pages");
    let categories = Categories::from_bits_truncate(region.categories);
    if let Some((last, same)) = out.last_mut()
        && *same == categories
        && last.last().checked_add(1) == Some(range.first())
        && let Some(joined) = PageRange::from_bounds(last.first(), range.last())
    {
        *last = joined;
    } else {
        out.push((range, categories));
    }
}

#[cfg(test)]
mod tests;
