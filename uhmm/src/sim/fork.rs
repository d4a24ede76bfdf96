//! Fork: a second address space that shares pages until one of the two stores to them.

use std::sync::Arc;

use mmu_notifier::{EventKind, Subscriptions};

use super::error::SimError;
use super::fault::Space;
use super::object::{Location, PageObject};
use super::page_table::{Announced, Concern, Entry, PageTable, Target};
use super::state::{Found, SpaceState, State};
use super::vma::{self, Vma, Vmas};
use crate::address_space::SpaceId;
use crate::entry::Frame;
use crate::error::FaultError;
use crate::page::{Page, PageRange};

impl Space {
    /// Makes the child. Pages on devices, in transit and swapped out are shared like all others.
    pub(super) fn fork(&self) -> Result<Space, SimError> {
        let child = Space::new(Arc::clone(&self.shared));
        let find = |state: &State| match state.private_range(self.id) {
            Some(range) => Found::Concern(Concern::new(self.id, range)),
            None => Found::Concern(Concern::default()),
        };
        self.shared.change(EventKind::ProtectionPage, None, find, |state, announced| {
            if state.space(self.id).is_none() {
                return Err(SimError::Fault(FaultError::Released));
            }
            let copies = state.copy_pinned(self.id)?;
            state.fork(self.id, &child, copies, announced);
            Ok(())
        })?;
        Ok(child)
    }

    /// Makes an empty address space that the machine does not know yet.
    pub(super) fn new(shared: Arc<super::state::Shared>) -> Space {
        Space { shared, id: SpaceId::new(), notifiers: Subscriptions::new() }
    }
}

impl SpaceState {
    pub(super) fn of(space: &Space) -> SpaceState {
        SpaceState {
            notifiers: Arc::clone(&space.notifiers),
            vmas: Vmas::default(),
            table: PageTable::new(space.id),
        }
    }
}

impl State {
    /// Returns the range from the first to the last page of private mappings.
    fn private_range(&self, space: SpaceId) -> Option<PageRange> {
        let state = self.space(space)?;
        let mut private = state.vmas.iter().filter(|vma| vma.is_private()).map(|vma| vma.range);
        let first = private.next()?;
        let last = private.last().unwrap_or(first);
        PageRange::from_bounds(first.first(), last.last())
    }

    /// Copies the pages that are used by reference: they stay the parent's alone, or whoever uses
    /// them would work on the child's memory after the parent's next store.
    fn copy_pinned(&mut self, space: SpaceId) -> Result<Vec<(Page, Frame)>, SimError> {
        let state = self.space(space).expect("the caller looked");
        let pinned: Vec<(Page, super::object::ObjectId)> = state
            .table
            .overlapping(PageRange::ALL)
            .filter_map(|(page, entry)| Some((page, entry.object()?)))
            .filter(|&(_, id)| self.object(id).is_anonymous() && self.is_pinned(self.object(id)))
            .collect();
        let mut copies = Vec::with_capacity(pinned.len());
        for (page, id) in pinned {
            let object = self.object(id);
            let order = object.order;
            let from = object.frame().expect("what is pinned is in system memory");
            let Some(to) = self.ram.allocate(order) else {
                for (page, frame) in copies {
                    let (_, entry) = self.entry(space, page).expect("listed just now");
                    self.free_frames(frame, entry.order);
                }
                return Err(SimError::OutOfMemory);
            };
            self.ram.copy(from, to, order);
            copies.push((page, to));
        }
        Ok(copies)
    }

    fn fork(
        &mut self,
        parent: SpaceId,
        child: &Space,
        copies: Vec<(Page, Frame)>,
        announced: &Announced<'_>,
    ) {
        self.spaces.insert(child.id, SpaceState::of(child));
        let vmas: Vec<Vma> = self.space_mut(parent).vmas.iter().cloned().collect();
        for file in vma::files(&vmas) {
            self.files.get_mut(&file).expect("a mapped file is there").users += 1;
        }
        let mut copies = copies.into_iter().peekable();
        for vma in &vmas {
            if vma.is_private() {
                for page in self.table(parent).pages(vma.range) {
                    let copy = copies.next_if(|&(of, _)| of == page).map(|(_, frame)| frame);
                    self.fork_entry(parent, child.id, page, copy, announced);
                }
            }
            self.space_mut(child.id).vmas.insert(vma.clone());
        }
    }

    fn fork_entry(
        &mut self,
        parent: SpaceId,
        child: SpaceId,
        page: Page,
        copy: Option<Frame>,
        announced: &Announced<'_>,
    ) {
        let (_, &entry) = self.entry(parent, page).expect("listed just now");
        if let Some(frame) = copy {
            let object = PageObject::anonymous(entry.order, Location::System(frame));
            let target = Target::Object { id: self.add_object(object), index: 0 };
            let mut entry = Entry { target, ..entry };
            entry.release_hold();
            self.fill(child, page, entry);
            return;
        }
        self.table(parent).change(page, announced, |entry| {
            entry.release_hold();
            entry.writable = false;
        });
        let (_, &entry) = self.entry(parent, page).expect("changed just now");
        self.fill(child, page, entry);
    }
}
