//! Looks at mappings and page tables for those who show them to others. See [`crate::pages`].

use std::sync::atomic::Ordering;

use uhmm::{Order, Page, PageRange, Residency};

use super::{Space, lock, snapshot};
use crate::pages::{Mapping, PageFlags};
use crate::sys::pagemap::{Categories, Pagemap};

impl Space {
    pub(crate) fn mapping(&self, page: Page) -> Option<Mapping> {
        self.kernel.vma(page).ok().flatten().map(|vma| Mapping::of(&vma))
    }

    pub(crate) fn mapping_name(&self, page: Page) -> Vec<u8> {
        self.kernel.mapping_name(page).unwrap_or_default()
    }

    pub(crate) fn page_flags(&self, range: PageRange, out: &mut Vec<PageFlags>) {
        let start = out.len();
        out.resize(start + range.len(), PageFlags::empty());
        let out = &mut out[start..];
        let any = Categories::PRESENT | Categories::SWAPPED | Categories::GUARD;
        let mut found = Vec::new();
        // What was found before an error is true.
        let _ = self.kernel.scan(range, any, &mut found);
        let mut entries = Vec::new();
        for (run, what) in found {
            let first = range.index_of(run.first()).expect("within the range");
            let out = &mut out[first..first + run.len()];
            out.fill(flags_of(what));
            if what.contains(Categories::PRESENT) {
                entries.clear();
                entries.resize(run.len(), 0);
                if self.kernel.pagemap_entries(run, &mut entries).is_err() {
                    continue;
                }
                for (flags, entry) in out.iter_mut().zip(&entries) {
                    // It may have gone since.
                    let mapped = entry & Pagemap::PRESENT != 0;
                    flags.set(PageFlags::EXCLUSIVE, mapped && entry & Pagemap::EXCLUSIVE != 0);
                }
            }
        }
    }

    pub(crate) fn away(&self, range: PageRange, out: &mut Vec<(PageRange, Residency, Order)>) {
        if !self.is_here() {
            return;
        }
        self.reserve_this_thread();
        let state = self.lock();
        for (first, extent) in state.overlapping(range) {
            let pages = first.block(extent.order).intersection(range).expect("they overlap");
            let offset = pages.first().number() - first.number();
            let (residency, order) = snapshot::residency(&extent.place, offset, extent.order);
            out.push((pages, residency, order));
        }
    }

    pub(crate) fn forks(&self) -> u64 {
        // Relaxed: the fork itself orders what came before it in the thread that asks, and others
        // cannot tell.
        self.counters.forks.load(Ordering::Relaxed)
    }

    pub(crate) fn catch_up(&self) {
        if !self.is_here() {
            return;
        }
        self.reserve_this_thread();
        {
            let mut state = self.lock();
            // What was read is applied; what is unread is so since nobody has gone on from it.
            self.drain(&mut state);
        }
        self.settle_unless_leading();
        // Somebody else may be telling devices of what they have taken before.
        drop(lock(&self.settling));
    }
}

fn flags_of(what: Categories) -> PageFlags {
    let pairs = [
        (Categories::PRESENT, PageFlags::PRESENT),
        (Categories::PFNZERO, PageFlags::ZERO),
        (Categories::HUGE, PageFlags::HUGE),
        (Categories::FILE, PageFlags::FILE),
        (Categories::SWAPPED, PageFlags::SWAPPED),
        (Categories::GUARD, PageFlags::GUARD),
    ];
    let pairs = pairs.into_iter().filter(|(category, _)| what.contains(*category));
    pairs.map(|(_, flag)| flag).collect()
}
