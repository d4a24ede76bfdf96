//! Changes of mappings: what is mapped where, and with what rights.

use mmu_notifier::EventKind;

use super::error::SimError;
use super::fault::Space;
use super::page_table::{Announced, Concern, Entry, Sight};
use super::state::{Found, State};
use super::vma::{self, Vma};
use crate::address_space::SpaceId;
use crate::entry::Access;
use crate::error::FaultError;
use crate::page::{Order, Page, PageRange};

impl Space {
    /// Maps something in the place of what was there.
    pub(super) fn map(&self, vma: Vma) {
        let range = vma.range;
        let find = |state: &State| match state.space(self.id) {
            Some(space) if space.vmas.overlapping(range).next().is_some() => {
                state.find_range(self.id, range)
            }
            _ => Found::Concern(Concern::default()),
        };
        self.shared.change(EventKind::Unmap, None, find, |state, announced| {
            if state.space(self.id).is_none() {
                return;
            }
            state.unmap(self.id, range, announced);
            for file in vma::files(std::slice::from_ref(&vma)) {
                state.files.get_mut(&file).expect("its handle holds it").users += 1;
            }
            state.space_mut(self.id).vmas.insert(vma);
        });
    }

    pub(super) fn unmap(&self, range: PageRange) {
        self.shared.change_range(EventKind::Unmap, self.id, range, |state, announced| {
            state.unmap(self.id, range, announced);
        });
    }

    pub(super) fn protect(&self, range: PageRange, rights: Access) {
        let rights = rights.min(Access::Write);
        self.shared.change_range(EventKind::ProtectionVma, self.id, range, |state, announced| {
            if state.space(self.id).is_none() {
                return;
            }
            for vma in state.take_vmas(self.id, range) {
                state.space_mut(self.id).vmas.insert(Vma { rights, ..vma });
            }
            state.change_entries(self.id, range, announced, |entry| {
                entry.release_hold();
                entry.writable &= rights >= Access::Write;
            });
        });
    }

    /// Moves mappings and what they hold to other addresses.
    pub(super) fn remap(&self, range: PageRange, to: Page) -> Result<(), SimError> {
        let bad = SimError::BadDestination { from: range, to };
        let target = PageRange::from_pages(to, range.pages()).map_err(|_| bad)?;
        if target.overlaps(range) {
            return Err(bad);
        }
        let distance = range.first().number() ^ to.number();
        let aligned = distance.is_multiple_of(Order::HUGE.pages());
        let find = |state: &State| {
            let Some(space) = state.space(self.id) else {
                return Found::Concern(Concern::default());
            };
            let large = |entry: &Entry| !entry.is_hidden() && entry.order > Order::PAGE;
            if !aligned
                && let Some((_, entry)) =
                    space.table.overlapping(range).find(|(_, entry)| large(entry))
                && let Some(id) = entry.object()
            {
                return Found::Split(id);
            }
            let straddling = [range, target].map(|range| state.straddling(self.id, range));
            if let Some(&id) = straddling.iter().flatten().next() {
                return Found::Split(id);
            }
            let mut concern = Concern::new(self.id, range);
            if space.vmas.overlapping(target).next().is_some() {
                concern.add(self.id, target);
            }
            Found::Concern(concern)
        };
        self.shared.change(EventKind::Unmap, None, find, |state, announced| {
            let Some(space) = state.space(self.id) else {
                return Err(FaultError::Released.into());
            };
            space.vmas.cover(range).map_err(|page| FaultError::Hole { page })?;
            state.unmap(self.id, target, announced);
            state.move_entries(self.id, range, to, announced);
            Ok(())
        })
    }

    /// Write-protects pages so that the next store to each is noticed, as `PAGEMAP_SCAN` and
    /// userfaultfd do.
    pub(super) fn write_protect(&self, range: PageRange) {
        self.shared.change_range(EventKind::ProtectionVma, self.id, range, |state, announced| {
            state.change_entries(self.id, range, announced, |entry| {
                entry.release_hold();
                entry.writable = false;
                entry.flags.write_protected = true;
            });
        });
    }

    pub(super) fn clear_soft_dirty(&self, range: PageRange) {
        self.shared.change_range(EventKind::SoftDirty, self.id, range, |state, announced| {
            state.change_entries(self.id, range, announced, |entry| {
                entry.release_hold();
                entry.writable = false;
                entry.flags.soft_dirty = false;
            });
        });
    }
}

impl State {
    fn unmap(&mut self, space: SpaceId, range: PageRange, announced: &Announced<'_>) {
        if self.space(space).is_none() {
            return;
        }
        self.zap(space, range, announced);
        let vmas = self.take_vmas(space, range);
        self.put_files(vma::files(&vmas));
    }

    /// Changes every entry of `range`, also those that nobody sees now.
    pub(super) fn change_entries(
        &mut self,
        space: SpaceId,
        range: PageRange,
        announced: &Announced<'_>,
        f: impl Fn(&mut Entry),
    ) {
        if self.space(space).is_none() {
            return;
        }
        self.cut_hidden(space, range);
        let table = self.table(space);
        for page in table.pages(range) {
            table.change(page, announced, &f);
        }
    }

    fn move_entries(
        &mut self,
        space: SpaceId,
        range: PageRange,
        to: Page,
        announced: &Announced<'_>,
    ) {
        let moved = |page: Page| {
            let number = to.number() + (page.number() - range.first().number());
            Page::new(number).expect("the whole destination is in bounds")
        };
        self.cut_hidden(space, range);
        for page in self.table(space).pages(range) {
            let (_, entry) = self.entry(space, page).expect("listed just now");
            let fits = moved(page).align_down(entry.order) == moved(page);
            if !fits {
                // Only what is in transit: what can be seen was split before the announcement.
                self.split_entry(space, page, None);
            }
        }
        for page in self.table(space).pages(range) {
            let mut entry = self.table(space).take(page, announced);
            entry.release_hold();
            entry.flags.soft_dirty = true;
            if let Some(id) = entry.object() {
                self.object_mut(id).mappings.remove(&(space, page));
            }
            self.fill(space, moved(page), entry);
        }
        for vma in self.take_vmas(space, range) {
            let place = PageRange::from_bounds(moved(vma.range.first()), moved(vma.range.last()));
            let range = place.expect("a range stays one when it moves");
            self.space_mut(space).vmas.insert(Vma { range, ..vma });
        }
    }
}

impl Entry {
    /// Ends a device's exclusive hold. The announcement of the change is heard by that device.
    pub(super) fn release_hold(&mut self) {
        if let Sight::Exclusive(_) = self.sight {
            self.sight = Sight::Visible;
        }
    }
}
