//! Looking at the page table.

use rangemap::RangeSet;
use rustix::io::Errno;
use uhmm::{Access, DeviceFrame, DeviceLocation, Frame, Order, PageEntry, PageRange, Residency};

use super::Space;
use super::state::{Place, State, chunk_of, chunk_range, numbers, range_of};
use crate::sys::maps::{Kind, Vma};
use crate::sys::pagemap::Categories;

/// How often in a row a mapping may change while it is looked at.
pub(super) const TRIES: u32 = 32;

impl Space {
    /// Does what [`Backend::snapshot`](uhmm::Backend::snapshot) says.
    ///
    /// What is present is watched from before it is looked at, so that whoever maps it hears when it
    /// goes.
    pub(super) fn look(&self, range: PageRange, entries: &mut Vec<PageEntry>) {
        let start = entries.len();
        entries.resize(start + range.len(), PageEntry::default());
        if !self.is_here() {
            return;
        }
        self.reserve_this_thread();
        let entries = &mut entries[start..];
        let mut present = Vec::new();
        let mut next = Some(range.first());
        let mut tries = 0;
        while let Some(page) = next.filter(|&page| page <= range.last()) {
            let Ok(Some(vma)) = self.kernel.vma(page) else { break };
            let rest = PageRange::from_bounds(page, range.last()).expect("checked just now");
            let Some(piece) = vma.range.intersection(rest) else { break };
            let first = range.index_of(piece.first()).expect("within the range");
            let entries = &mut entries[first..first + piece.len()];
            let watched = self.look_at(&vma, piece, entries, &mut present);
            if matches!(watched, Watched::Changed) && tries < TRIES {
                tries += 1;
                entries.fill(PageEntry::default());
                continue;
            }
            next = piece.last().checked_add(1);
        }
        let state = self.lock();
        if state.is_anything_out() {
            overlay(&state, range, entries);
        }
    }

    /// Fills in the entries of `piece`, part of one mapping, as the page table says, and tells whether
    /// the kernel tells of changes to what is there.
    fn look_at(
        &self,
        vma: &Vma,
        piece: PageRange,
        entries: &mut [PageEntry],
        present: &mut Vec<(PageRange, Categories)>,
    ) -> Watched {
        let mut rights = self.device_rights(vma);
        let any = Categories::PRESENT | Categories::GUARD;
        let scan = |present: &mut Vec<_>| {
            present.clear();
            // Where the kernel cannot say, nothing is there, and whoever wants it faults.
            if self.kernel.scan(piece, any, present).is_err() {
                present.clear();
            }
        };
        scan(present);
        let found = present.iter().any(|(_, what)| what.contains(Categories::PRESENT));
        let mut watched = Watched::Before;
        if rights > Access::None && found {
            watched = self.watch_around(piece, vma);
            match watched {
                Watched::Before => {}
                Watched::Now => scan(present),
                // Nobody would hear of a change, so nobody may rely on what is there.
                Watched::Changed | Watched::Never => rights = Access::None,
            }
        }
        let blank =
            PageEntry { residency: Residency::Empty, allowed: rights, ..Default::default() };
        entries.fill(blank);
        for &(run, what) in present.iter() {
            let first = piece.index_of(run.first()).expect("within the piece");
            let entries = &mut entries[first..first + run.len()];
            if what.contains(Categories::GUARD) {
                entries.fill(PageEntry { allowed: Access::None, ..blank });
                continue;
            }
            // A store to the frame of zeroes gets another one.
            let access = match what.contains(Categories::PFNZERO) {
                true => rights.min(Access::Read),
                false => rights,
            };
            let huge = what.contains(Categories::HUGE) || vma.page_size > uhmm::PAGE_SIZE as u64;
            for (page, entry) in run.iter().zip(entries) {
                let order = match huge && vma.range.covers(page.block(Order::HUGE)) {
                    true => Order::HUGE,
                    false => Order::PAGE,
                };
                let residency = Residency::System(Frame(page.number()));
                *entry = PageEntry { residency, access, allowed: rights, order };
            }
        }
        watched
    }

    /// Makes the kernel tell of changes to `piece`, part of the mapping `vma`, and to what is around.
    pub(super) fn watch_around(&self, piece: PageRange, vma: &Vma) -> Watched {
        let mut state = self.lock();
        if super::registration::is_registered(&state, piece) {
            // What it is registered for may end before the device does.
            self.note_watched(&mut state, piece);
            return Watched::Before;
        }
        let managed = |ranges: &RangeSet<u64>| ranges.gaps(&numbers(piece)).next().is_none();
        if state.over || !state.managed.as_ref().is_none_or(managed) {
            return Watched::Never;
        }
        let first = chunk_range(chunk_of(piece.first())).first().max(vma.range.first());
        let last = chunk_range(chunk_of(piece.last())).last().min(vma.range.last());
        let mut range = PageRange::from_bounds(first, last).expect("it holds the piece");
        if let Some(managed) = &state.managed
            && let Some(around) = managed.get(&piece.first().number())
        {
            range = range_of(around.clone()).intersection(range).expect("it holds the piece");
        }
        match self.watch(&mut state, range) {
            Ok(()) => Watched::Now,
            // Somebody else handles it, there is no room, or this user may not.
            Err(Errno::BUSY | Errno::NOMEM | Errno::PERM) => Watched::Never,
            Err(_) => match self.kernel.vma(piece.first()) {
                Ok(Some(now)) if now == *vma && !vma.is_anonymous() => Watched::Never,
                // What is private and without a file is always watched, so it was not there just now.
                _ => Watched::Changed,
            },
        }
    }

    /// Returns what a device may do in a mapping.
    pub(super) fn device_rights(&self, vma: &Vma) -> Access {
        match vma.kind {
            // The kernel's own pages, and pages that it has taken out of its own sight.
            Kind::Special | Kind::Secret => Access::None,
            _ => vma.rights(),
        }
    }
}

/// Whether the kernel tells of changes.
pub(super) enum Watched {
    /// It did before.
    Before,
    /// It does from now on.
    Now,
    /// The mapping was another when it was to do so.
    Changed,
    /// It does not: the memory is of a kind that it does not watch, or somebody else handles it.
    Never,
}

/// Enters what is out over what the page table said.
fn overlay(state: &State, range: PageRange, entries: &mut [PageEntry]) {
    for (first, extent) in state.overlapping(range) {
        let pages = first.block(extent.order).intersection(range).expect("they overlap");
        for page in pages.iter() {
            let offset = page.number() - first.number();
            let entry = &mut entries[range.index_of(page).expect("within the range")];
            if entry.residency == Residency::Hole {
                // The mapping is gone, and the event that says so is unread.
                continue;
            }
            let (residency, order) = residency(&extent.place, offset, extent.order);
            let access = match residency {
                Residency::InTransit => Access::None,
                // No CPU comes between.
                Residency::Exclusive { .. } if entry.allowed >= Access::Write => Access::Atomic,
                _ => entry.allowed,
            };
            *entry = PageEntry { residency, access, order, allowed: entry.allowed };
        }
    }
}

pub(super) fn residency(place: &Place, offset: u64, order: Order) -> (Residency, Order) {
    match place {
        Place::Transit { .. } | Place::Parked(_) => (Residency::InTransit, Order::PAGE),
        Place::Device(block) => {
            let DeviceLocation { owner, frame: DeviceFrame(frame) } = block.location();
            let location = DeviceLocation { owner, frame: DeviceFrame(frame + offset) };
            (Residency::Device(location), order)
        }
        Place::Held { owner, block } => {
            let frame = Frame(block.first().number() + offset);
            (Residency::Exclusive { frame, owner: *owner }, Order::PAGE)
        }
    }
}
