//! What an operating system does to pages behind a program's back, and at its request.

use std::collections::BTreeMap;

use mmu_notifier::{EventKind, WouldBlock};

use super::PageFlags;
use super::error::SimError;
use super::fault::Space;
use super::object::{Location, ObjectId, PageObject};
use super::page_table::{Announced, Concern, Entry, Sight, Target};
use super::state::{Found, Shared, State};
use super::vma::{Backing, huge_block};
use crate::address_space::SpaceId;
use crate::entry::{Access, Frame};
use crate::error::FaultError;
use crate::page::{Order, PAGE_SIZE, Page, PageRange};

impl Space {
    /// Drops the pages of a range: what is read there next is zeroes, or the file's contents.
    pub(super) fn discard(&self, range: PageRange) {
        self.shared.change_range(EventKind::Clear, self.id, range, |state, announced| {
            state.zap(self.id, range, announced);
        });
    }

    /// Lets the contents of private memory be dropped by a later reclaim, unless they are stored to
    /// before.
    pub(super) fn free(&self, range: PageRange) {
        self.shared.change_range(EventKind::Clear, self.id, range, |state, announced| {
            if state.space(self.id).is_none() {
                return;
            }
            for page in state.table(self.id).pages(range) {
                let (_, entry) = state.entry(self.id, page).expect("listed just now");
                let Some(object) = entry.object().map(|id| state.object(id)) else { continue };
                if !object.is_anonymous() || object.is_shared() {
                    continue;
                }
                match object.location {
                    Location::Swap(_) => state.unmap_entry(self.id, page, announced),
                    Location::System(_) => state.table(self.id).change(page, announced, |entry| {
                        entry.release_hold();
                        entry.writable = false;
                        entry.lazy = true;
                        entry.flags.dirty = false;
                    }),
                    Location::Device(_) | Location::Transit(_) => {}
                }
            }
        });
    }

    /// Swaps out what can be, and drops what may be. Returns how many pages of private memory left
    /// system memory.
    pub(super) fn reclaim(&self, range: PageRange) -> u64 {
        self.split_where(range, |state, id| {
            state.object(id).order > Order::PAGE && state.is_movable(id)
        });
        self.shared.change(
            EventKind::Clear,
            None,
            |state| Found::Concern(state.concern_of(self.id, range, State::is_reclaimable)),
            |state, announced| {
                let mut reclaimed = 0;
                for id in state.objects_in(self.id, range, State::is_reclaimable) {
                    reclaimed += u64::from(state.object(id).is_anonymous());
                    state.reclaim_object(id, announced);
                }
                state.drop_zero_entries(self.id, range, announced);
                reclaimed
            },
        )
    }

    /// Brings in what is swapped out, as far as there is room. Returns how many pages came.
    pub(super) fn swap_in(&self, range: PageRange) -> u64 {
        let mut state = self.shared.lock();
        let swapped = |state: &State, id| matches!(state.object(id).location, Location::Swap(_));
        let ids = state.objects_in(self.id, range, swapped);
        ids.into_iter().map_while(|id| state.swap_in(id)).count() as u64
    }

    /// Moves pages to other frames, as compaction does. Returns how many pages moved.
    pub(super) fn relocate(&self, range: PageRange) -> u64 {
        self.shared.change(
            EventKind::Clear,
            None,
            |state| Found::Concern(state.concern_of(self.id, range, State::is_movable)),
            |state, announced| {
                let mut moved = 0;
                for id in state.objects_in(self.id, range, State::is_movable) {
                    let object = state.object(id);
                    let order = object.order;
                    let from = object.frame().expect("what is movable is in system memory");
                    let Some(to) = state.ram.allocate(order) else { continue };
                    state.ram.copy(from, to, order);
                    state.hide(id, announced);
                    state.set_location(id, Location::System(to));
                    state.show(id);
                    state.free_frames(from, order);
                    moved += order.pages();
                }
                moved
            },
        )
    }

    /// Replaces the pages of aligned blocks by large pages. Returns how many large pages were made.
    pub(super) fn collapse(&self, range: PageRange) -> u64 {
        let find = |state: &State| {
            let mut concern = Concern::default();
            for block in state.collapsible(self.id, range) {
                concern.add(self.id, block);
            }
            Found::Concern(concern)
        };
        self.shared.change(EventKind::Clear, None, find, |state, announced| {
            let blocks = state.collapsible(self.id, range);
            let made = |block| state.collapse(self.id, block, announced).is_some();
            blocks.into_iter().map(made).filter(|&made| made).count() as u64
        })
    }

    /// Splits the large pages that `range` touches. Returns how many were split.
    pub(super) fn split_large(&self, range: PageRange) -> u64 {
        self.split_where(range, |state, id| {
            let object = state.object(id);
            object.order > Order::PAGE && !matches!(object.location, Location::Transit(_))
        })
    }

    fn split_where(&self, range: PageRange, wanted: impl Fn(&State, ObjectId) -> bool) -> u64 {
        let ids = self.shared.lock().objects_in(self.id, range, wanted);
        let mut split = 0;
        for id in ids {
            if !self.shared.injector.fails("split") {
                split += u64::from(self.shared.split(id));
            }
        }
        split
    }

    /// Drops all private anonymous memory without waiting for anybody.
    pub(super) fn oom_reap(&self) -> Result<u64, WouldBlock> {
        loop {
            let found = self.shared.lock().reapable(self.id);
            let places = self.shared.places(found);
            let announced = Announced::try_announce(&places, EventKind::Clear)?;
            let mut state = self.shared.lock();
            if !announced.covers_all(state.reapable(self.id)) {
                continue;
            }
            let mut reaped = 0;
            for (space, range) in state.reapable(self.id).runs() {
                for page in state.table(space).pages(range) {
                    let (_, entry) = state.entry(space, page).expect("listed just now");
                    reaped += entry.order.pages();
                    state.unmap_entry(space, page, &announced);
                }
            }
            drop(state);
            drop(announced);
            self.shared.wake();
            return Ok(reaped);
        }
    }

    /// Replaces a page by a copy with other bytes at its start, for this mapping alone.
    pub(super) fn uprobe(&self, page: Page, bytes: &[u8]) -> Result<(), SimError> {
        if bytes.len() > PAGE_SIZE {
            let bytes = bytes.len() as u64;
            return Err(SimError::OutOfBounds { address: page.address(), bytes });
        }
        loop {
            self.fault_page(page, Access::Read, None, None)?;
            let find = |state: &State| match state.probeable(self.id, page) {
                Some(Entry { order, target: Target::Object { id, .. }, .. })
                    if order > Order::PAGE =>
                {
                    Found::Split(id)
                }
                Some(_) => Found::Concern(Concern::new(self.id, page.into())),
                None => Found::Concern(Concern::default()),
            };
            let done = self.shared.change(EventKind::Clear, None, find, |state, announced| {
                match state.vma(self.id, page) {
                    None => return Err(FaultError::Hole { page }.into()),
                    Some(vma) if !vma.is_private() => return Err(SimError::NotPrivate { page }),
                    Some(_) => {}
                }
                let Some(entry) = state.probeable(self.id, page) else { return Ok(false) };
                if entry.object().is_some_and(|id| state.is_pinned(state.object(id))) {
                    return Err(SimError::Pinned { page });
                }
                let from = state.frame_of(page, &entry, page).expect("it can be seen");
                let to = state.ram.allocate(Order::PAGE).ok_or(SimError::OutOfMemory)?;
                state.ram.copy(from, to, Order::PAGE);
                state.ram.store(to, 0, bytes);
                state.replace(self.id, page, to, announced);
                // The bytes are in no file and were not there before.
                state.table(self.id).change(page, announced, |entry| {
                    entry.flags.dirty = true;
                    entry.flags.soft_dirty = true;
                });
                Ok(true)
            })?;
            if done {
                return Ok(());
            }
        }
    }
}

impl Shared {
    /// Merges pages of equal contents. Returns how many pages are no more.
    pub(super) fn merge(&self) -> u64 {
        let find = |state: &State| {
            let mut concern = Concern::default();
            for id in state.alike().into_iter().flatten() {
                state.add_mappings(id, &mut concern);
            }
            Found::Concern(concern)
        };
        self.change(EventKind::Clear, None, find, |state, announced| {
            let mut merged = 0;
            for mut group in state.alike() {
                // A device that was not told to stop may have made a page alike just now.
                group.retain(|&id| {
                    let mut concern = Concern::default();
                    state.add_mappings(id, &mut concern);
                    announced.covers_all(concern)
                });
                if group.len() < 2 {
                    continue;
                }
                for &id in &group[1..] {
                    state.merge_into(group[0], id, announced);
                    merged += 1;
                }
                state.hide(group[0], announced);
                state.show(group[0]);
            }
            merged
        })
    }
}

impl State {
    /// Lists the objects that entries of `range` lead to, in the order of addresses and each once.
    pub(super) fn objects_in(
        &self,
        space: SpaceId,
        range: PageRange,
        wanted: impl Fn(&State, ObjectId) -> bool,
    ) -> Vec<ObjectId> {
        let Some(state) = self.space(space) else { return Vec::new() };
        let mut seen = std::collections::BTreeSet::new();
        let ids = state.table.overlapping(range).filter_map(|(_, entry)| entry.object());
        ids.filter(|&id| seen.insert(id) && wanted(self, id)).collect()
    }

    /// Returns what a change of all such objects is about, in every address space, and the range.
    fn concern_of(
        &self,
        space: SpaceId,
        range: PageRange,
        wanted: impl Fn(&State, ObjectId) -> bool,
    ) -> Concern {
        let mut concern = Concern::default();
        if self.space(space).is_none() {
            return concern;
        }
        concern.add(space, range);
        for id in self.objects_in(space, range, wanted) {
            self.add_mappings(id, &mut concern);
        }
        concern
    }

    fn is_held_by_device(&self, id: ObjectId) -> bool {
        let mut mappings = self.object(id).mappings.iter();
        mappings.any(|&(space, page)| {
            self.entry(space, page).is_some_and(|(_, entry)| entry.holder().is_some())
        })
    }

    fn is_movable(&self, id: ObjectId) -> bool {
        let object = self.object(id);
        object.frame().is_some() && !self.is_pinned(object) && !self.is_held_by_device(id)
    }

    fn is_reclaimable(&self, id: ObjectId) -> bool {
        self.object(id).order == Order::PAGE && self.is_movable(id)
    }

    fn reclaim_object(&mut self, id: ObjectId, announced: &Announced<'_>) {
        let object = self.object(id);
        let mappings = object.mappings.clone();
        let lazy = |&(space, page): &(SpaceId, Page)| {
            self.entry(space, page).is_some_and(|(_, entry)| entry.lazy)
        };
        if !object.is_anonymous() || mappings.iter().all(lazy) {
            // A file keeps its page; a page that may be dropped is gone with its last entry.
            for (space, page) in mappings {
                self.unmap_entry(space, page, announced);
            }
            return;
        }
        let frame = object.frame().expect("what is reclaimed is in system memory");
        let bytes = self.ram.contents(frame);
        self.hide(id, announced);
        self.set_location(id, Location::Swap(bytes));
        self.free_frames(frame, Order::PAGE);
    }

    /// Forgets which places lead to the shared frame of zeroes: they are as good as untouched.
    fn drop_zero_entries(&mut self, space: SpaceId, range: PageRange, announced: &Announced<'_>) {
        let Some(state) = self.space(space) else { return };
        let zero = |entry: &Entry| entry.target == Target::Zero && !entry.flags.write_protected;
        let entries = state.table.overlapping(range).filter(|(_, entry)| zero(entry));
        let pages: Vec<Page> = entries.map(|(page, _)| page).collect();
        for page in pages {
            self.unmap_entry(space, page, announced);
        }
    }

    fn collapsible(&self, space: SpaceId, range: PageRange) -> Vec<PageRange> {
        let Some(state) = self.space(space) else { return Vec::new() };
        let mut blocks = Vec::new();
        for vma in state.vmas.overlapping(range) {
            if vma.backing != Backing::Anonymous || vma.rights == Access::None {
                continue;
            }
            let Some(part) = vma.range.intersection(range) else { continue };
            for piece in part.blocks(Order::HUGE) {
                let block = huge_block(piece.first(), part);
                blocks.extend(block.filter(|&block| self.can_collapse(space, block)));
            }
        }
        blocks
    }

    fn can_collapse(&self, space: SpaceId, block: PageRange) -> bool {
        let Some(state) = self.space(space) else { return false };
        let mut objects = 0;
        let fits = |(_, entry): (Page, &Entry)| {
            let plain = entry.sight == Sight::Visible
                && entry.order == Order::PAGE
                && !entry.lazy
                && !entry.flags.write_protected;
            let alone = entry.object().is_none_or(|id| {
                objects += 1;
                !self.object(id).is_shared() && self.is_movable(id)
            });
            plain && alone
        };
        state.table.overlapping(block).all(fits) && objects > 0
    }

    fn collapse(
        &mut self,
        space: SpaceId,
        block: PageRange,
        announced: &Announced<'_>,
    ) -> Option<()> {
        let Frame(to) = self.ram.allocate(Order::HUGE)?;
        let (mut flags, mut writable) = (PageFlags::default(), true);
        for page in self.table(space).pages(block) {
            let (_, &entry) = self.entry(space, page).expect("listed just now");
            let index = page.number() - block.first().number();
            if let Some(from) = self.frame_of(page, &entry, page) {
                self.ram.copy(from, Frame(to + index), Order::PAGE);
            }
            flags.dirty |= entry.flags.dirty;
            flags.young |= entry.flags.young;
            flags.soft_dirty |= entry.flags.soft_dirty;
            // One page whose stores are to be noticed makes all of them so.
            writable &= entry.writable || entry.target == Target::Zero;
            self.unmap_entry(space, page, announced);
        }
        let rights = self.vma(space, block.first()).map_or(Access::None, |vma| vma.rights);
        writable &= rights >= Access::Write;
        let object = PageObject::anonymous(Order::HUGE, Location::System(Frame(to)));
        let id = self.add_object(object);
        let target = Target::Object { id, index: 0 };
        let entry = Entry { flags, writable, ..Entry::visible(target, Order::HUGE) };
        self.fill(space, block.first(), entry);
        Some(())
    }

    /// Returns the private anonymous memory that has entries.
    fn reapable(&self, space: SpaceId) -> Concern {
        let mut concern = Concern::default();
        let Some(state) = self.space(space) else { return concern };
        for vma in state.vmas.iter().filter(|vma| vma.backing == Backing::Anonymous) {
            if !state.table.is_empty_at(vma.range) {
                concern.add(space, vma.range);
            }
        }
        concern
    }

    /// Returns the entry at `page` if a probe can be put there now.
    fn probeable(&self, space: SpaceId, page: Page) -> Option<Entry> {
        if !self.vma(space, page)?.is_private() {
            return None;
        }
        let (first, &entry) = self.entry(space, page)?;
        let visible = entry.sight == Sight::Visible && self.frame_of(first, &entry, page).is_some();
        visible.then_some(entry)
    }

    /// Lists the groups of pages that can be merged, the one that stays first.
    fn alike(&self) -> Vec<Vec<ObjectId>> {
        let mut groups: BTreeMap<Option<Box<[u8]>>, Vec<ObjectId>> = BTreeMap::new();
        for (&id, object) in &self.objects {
            if !object.is_anonymous() || !self.is_reclaimable(id) || object.mappings.is_empty() {
                continue;
            }
            let frame = object.frame().expect("what is reclaimable is in system memory");
            groups.entry(self.ram.contents(frame)).or_default().push(id);
        }
        groups.into_values().filter(|group| group.len() > 1).collect()
    }

    fn merge_into(&mut self, kept: ObjectId, merged: ObjectId, announced: &Announced<'_>) {
        for (space, page) in self.object(merged).mappings.clone() {
            let target = Target::Object { id: kept, index: 0 };
            let table = self.table(space);
            table.change(page, announced, |entry| {
                entry.target = target;
                entry.lazy = false;
            });
            self.object_mut(kept).mappings.insert((space, page));
        }
        self.object_mut(merged).mappings.clear();
        self.free_if_unused(merged);
    }
}
