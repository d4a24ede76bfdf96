//! Memory of ours where pages of a mapping can be put aside, as they are (mremap(2) with
//! `MREMAP_DONTUNMAP`, Linux 5.7).
//!
//! The mapping stays where it is, with its rights and its registration, and has none of these pages
//! any more. What is put aside has the rights of the mapping, and is registered as it is, which the
//! kernel tells of by an event that somebody else has to read.

use rustix::io::Errno;
use uhmm::{Order, Page, PageRange};

use super::gate;
use super::region::{Region, RegionOptions};

/// Room for the pages of one chunk of 2 MiB, each as far within it as it is in its own.
#[derive(Debug)]
pub(crate) struct Aside {
    region: Region,
}

impl Aside {
    /// Makes room.
    ///
    /// # Errors
    ///
    /// Those of [`Region::reserve`].
    pub(crate) fn new() -> Result<Aside, Errno> {
        // Nothing of it is accessible but what is put there.
        let options = RegionOptions { grows: true, ..RegionOptions::default() };
        Region::reserve(Order::HUGE.bytes(), options).map(|region| Aside { region })
    }

    /// Returns where `pages`, which lie in one chunk, are when they have been put aside.
    pub(crate) fn place_of(&self, pages: PageRange) -> PageRange {
        let offset = pages.first().number() % Order::HUGE.pages();
        let first = self.region.range().first().checked_add(offset);
        let place = first.and_then(|first| PageRange::from_pages(first, pages.pages()).ok());
        place.filter(|place| self.region.range().covers(*place)).expect("they lie in one chunk")
    }

    /// Puts `pages` aside, part of one mapping: in one step against whoever uses them, who finds them
    /// missing from then on.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there would be too many mappings or too much memory; `EINVAL` if the pages are not
    /// of one private mapping; `EPERM` if it is sealed. Nothing has changed then.
    pub(crate) fn take(&self, pages: PageRange) -> Result<(), Errno> {
        // SAFETY: see the head of `sys`, 2: who misses the pages waits. What was at the place of
        // theirs is ours, and holds nothing.
        unsafe { shift(pages, self.place_of(pages).first()) }
    }

    /// Puts pages back that have been put aside, in one step too, whether or not stores are allowed.
    /// What the mapping has in their place is dropped.
    ///
    /// # Errors
    ///
    /// As for [`take`](Aside::take).
    pub(crate) fn give_back(&self, pages: PageRange) -> Result<(), Errno> {
        // SAFETY: see the head of `sys`, 3: the caller knows that they are missing there.
        unsafe { shift(self.place_of(pages), pages.first()) }
    }

    /// Lets what has been put aside be stored to, which `UFFDIO_MOVE` wants; or does so no more.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there would be too many mappings.
    pub(crate) fn allow_stores(&self, pages: PageRange, allow: bool) -> Result<(), Errno> {
        let place = self.place_of(pages);
        let rights = if allow { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let at = std::ptr::with_exposed_provenance_mut(place.address() as usize);
        // SAFETY: the memory is ours, and nobody else knows where it is.
        unsafe { gate::mprotect(at, place.len() * uhmm::PAGE_SIZE, rights) }
    }
}

/// Moves pages to another place, and leaves both mapped.
///
/// # Safety
///
/// As for mremap(2): what is at the place is nobody's.
unsafe fn shift(pages: PageRange, to: Page) -> Result<(), Errno> {
    let bytes = (pages.len() * uhmm::PAGE_SIZE) as u64;
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) as u64;
    let arguments = [pages.address(), bytes, bytes, flags, to.address(), 0];
    // SAFETY: the caller's.
    unsafe { gate::call(libc::SYS_mremap, arguments) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::advise;
    use super::super::maps::Maps;
    use super::*;

    #[test]
    fn pages_go_aside_and_back_and_the_mapping_stays() {
        let options = RegionOptions::default();
        let region = Region::reserve(Order::HUGE.bytes(), options).expect("there is memory");
        let (first, aside) = (region.range().first(), Aside::new().expect("there is memory"));
        for offset in 0..4 {
            let page = first.checked_add(offset).expect("within the region");
            region.write(page, 0, &(offset + 1).to_ne_bytes());
        }
        let at = |page: u64| first.checked_add(page).expect("within the region");
        let pages = PageRange::from_pages(at(1), 2).expect("two");
        aside.take(pages).expect("it can be moved");
        let word = |page: u64| {
            let mut word = [0; 8];
            region.read(at(page), 0, &mut word);
            u64::from_ne_bytes(word)
        };
        assert_eq!([0, 1, 2, 3].map(word), [1, 0, 0, 4]);
        advise::dontneed(pages).expect("it is mapped");
        // What is given back may not be stored to, though it lies in a mapping that may.
        aside.allow_stores(pages, false).expect("it is there");
        aside.give_back(pages).expect("it can be moved");
        assert_eq!([0, 1, 2, 3].map(word), [1, 2, 3, 4]);
        let maps = Maps::open().expect("it can be read");
        let rights = |page| maps.at_or_after(at(page)).map(|vma| vma.map(|vma| vma.writable));
        assert_eq!([0, 1, 2, 3].map(rights), [true, false, false, true].map(|may| Ok(Some(may))));
    }
}
