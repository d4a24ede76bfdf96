//! Mappings: what is to be found at the addresses of an address space.

use std::collections::BTreeMap;

use super::object::FileId;
use crate::entry::Access;
use crate::page::{Order, Page, PageRange};

/// A mapping: a range of pages with one backing and one set of rights.
#[derive(Clone, Debug)]
pub(super) struct Vma {
    pub(super) range: PageRange,
    pub(super) rights: Access,
    pub(super) backing: Backing,
    /// Whether untouched aligned blocks are filled with large pages.
    pub(super) huge: bool,
}

/// What the pages of a mapping are, before anybody stores to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// Zeroes of the mapping's own.
    Anonymous,
    /// Pages of a file, from `first` on.
    File { file: FileId, first: u64, shared: bool },
}

impl Vma {
    /// Tells whether stores go to pages of the mapping's own.
    pub(super) fn is_private(&self) -> bool {
        !matches!(self.backing, Backing::File { shared: true, .. })
    }

    /// Returns the file page at `page`, which is within the mapping.
    pub(super) fn file_page(&self, page: Page) -> Option<(FileId, u64)> {
        match self.backing {
            Backing::Anonymous => None,
            Backing::File { file, first, .. } => {
                Some((file, first + (page.number() - self.range.first().number())))
            }
        }
    }

    fn file(&self) -> Option<FileId> {
        match self.backing {
            Backing::Anonymous => None,
            Backing::File { file, .. } => Some(file),
        }
    }

    /// Returns the part of the mapping that is within `range`.
    pub(super) fn part(&self, range: PageRange) -> Option<Vma> {
        let range = self.range.intersection(range)?;
        let mut part = Vma { range, ..self.clone() };
        if let Backing::File { first, .. } = &mut part.backing {
            *first += range.first().number() - self.range.first().number();
        }
        Some(part)
    }
}

/// The mappings of an address space, none overlapping another.
#[derive(Debug, Default)]
pub(super) struct Vmas(BTreeMap<Page, Vma>);

impl Vmas {
    pub(super) fn at(&self, page: Page) -> Option<&Vma> {
        let (_, vma) = self.0.range(..=page).next_back()?;
        vma.range.contains(page).then_some(vma)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Vma> {
        self.0.values()
    }

    pub(super) fn overlapping(&self, range: PageRange) -> impl Iterator<Item = &Vma> {
        let start = self.at(range.first()).map_or(range.first(), |vma| vma.range.first());
        self.0.range(start..=range.last()).map(|(_, vma)| vma)
    }

    /// Tells whether every page of `range` is mapped.
    pub(super) fn cover(&self, range: PageRange) -> Result<(), Page> {
        let mut next = Some(range.first());
        for vma in self.overlapping(range) {
            if let Some(page) = next
                && !vma.range.contains(page)
            {
                return Err(page);
            }
            next = vma.range.last().checked_add(1).filter(|&page| page <= range.last());
        }
        next.map_or(Ok(()), Err)
    }

    pub(super) fn insert(&mut self, vma: Vma) {
        self.0.insert(vma.range.first(), vma);
    }

    /// Takes the mappings out of `range`, cutting those that reach out of it. Also returns which
    /// file each piece that was cut off holds besides.
    pub(super) fn take(&mut self, range: PageRange) -> (Vec<Vma>, Vec<FileId>) {
        let whole: Vec<Page> = self.overlapping(range).map(|vma| vma.range.first()).collect();
        let (mut taken, mut more) = (Vec::new(), Vec::new());
        for first in whole {
            let vma = self.0.remove(&first).expect("listed just now");
            let below = range.first().number().checked_sub(1).and_then(Page::new);
            let above = range.last().checked_add(1);
            let below = below.and_then(|last| PageRange::from_bounds(Page::containing(0), last));
            let above = above.and_then(|first| PageRange::from_bounds(first, Page::MAX));
            for outside in [below, above].into_iter().flatten() {
                if let Some(part) = vma.part(outside) {
                    more.extend(part.file());
                    self.insert(part);
                }
            }
            taken.extend(vma.part(range));
        }
        (taken, more)
    }
}

/// Returns the file that each of `vmas` holds.
pub(super) fn files(vmas: &[Vma]) -> impl Iterator<Item = FileId> {
    vmas.iter().filter_map(Vma::file)
}

/// Returns the aligned block of 2 MiB around `page`, if all of it is within `range`.
pub(super) fn huge_block(page: Page, range: PageRange) -> Option<PageRange> {
    let block = page.block(Order::HUGE);
    range.covers(block).then_some(block)
}
