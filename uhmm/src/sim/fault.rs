//! Faults: how a page becomes one that can be used.
//!
//! CPUs, devices and pins all come through [`Space::fault_page`]. Under the lock it either finds
//! the page usable, or fills in what nobody can see; everything else it learns under the lock and
//! does without it, and then it looks again.

use std::sync::Arc;
use std::time::Instant;

use mmu_notifier::{EventKind, Owner, Subscriptions, thread_number};

use super::PageFlags;
use super::object::{FileId, IsolationId, Location, ObjectId, PageObject};
use super::page_table::{Announced, Concern, Entry, Sight, Target};
use super::state::{Found, Shared, State};
use super::vma::{Vma, huge_block};
use crate::address_space::SpaceId;
use crate::entry::{Access, Frame};
use crate::error::FaultError;
use crate::page::{Order, Page};
use crate::pagemap::DevicePagemap;

/// One simulated address space, as the layer above sees it: its [`Backend`](crate::Backend).
pub(super) struct Space {
    pub(super) shared: Arc<Shared>,
    pub(super) id: SpaceId,
    pub(super) notifiers: Arc<Subscriptions>,
}

/// What a fault needs done without the lock.
enum Next {
    /// Nothing: the page can be used.
    Done,
    /// The page is in transit.
    Sleep(IsolationId),
    /// The page is on a device that does not keep it.
    Home { pagemap: Arc<DevicePagemap>, order: Order },
    /// A device holds the page exclusively.
    Revoke,
    /// The page is one that others share, and a store needs one of its own.
    Copy,
}

impl Space {
    /// Makes `page` usable for `access`, by a CPU or by the device of `keep`.
    pub(super) fn fault_page(
        &self,
        page: Page,
        access: Access,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        loop {
            let mut state = self.shared.lock();
            let next = state.fault(self.id, page, access, keep)?;
            if let Next::Done = next {
                return Ok(());
            }
            if mmu_notifier::in_callback() {
                return Err(FaultError::SelfWait { page });
            }
            match next {
                Next::Done => {}
                Next::Sleep(isolation) if state.waits_for(isolation, thread_number()) => {
                    return Err(FaultError::SelfWait { page });
                }
                Next::Sleep(isolation) => {
                    state.waiting.insert(thread_number(), isolation);
                    let (mut state, ahead) = state.wait(deadline);
                    state.waiting.remove(&thread_number());
                    if !ahead {
                        return Err(FaultError::TimedOut { page });
                    }
                }
                _ if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                    return Err(FaultError::TimedOut { page });
                }
                Next::Home { pagemap, order } => {
                    drop(state);
                    pagemap.bring_home(self, page, order)?;
                }
                Next::Revoke => {
                    drop(state);
                    self.revoke(page, deadline)?;
                }
                Next::Copy => {
                    drop(state);
                    self.copy_shared(page, Access::Write, deadline)?;
                }
            }
        }
    }

    /// Takes a page back from the device that holds it. The announcement has no owner, so that
    /// device hears of it as well.
    fn revoke(&self, page: Page, deadline: Option<Instant>) -> Result<(), FaultError> {
        let held = |state: &State| {
            let entry = state.entry(self.id, page).filter(|(_, entry)| entry.holder().is_some());
            entry.map(|(first, _)| first)
        };
        let find = |state: &State| match held(state) {
            Some(first) => Found::Concern(Concern::new(self.id, first.into())),
            None => Found::Concern(Concern::default()),
        };
        let end = |state: &mut State, announced: &Announced<'_>| {
            if let Some(first) = held(state) {
                let table = state.table(self.id);
                table.change(first, announced, |entry| entry.sight = Sight::Visible);
            }
        };
        let done = self.shared.change_until(deadline, EventKind::Clear, None, find, end);
        done.ok_or(FaultError::TimedOut { page })
    }

    /// Gives the mapping a page of its own in the place of a shared one, if it needs that for
    /// `access`: a store does, and a load by reference, which goes on after others store.
    pub(super) fn copy_shared(
        &self,
        page: Page,
        access: Access,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        let find = |state: &State| match state.to_copy(self.id, page, access) {
            Some((_, Entry { order, target: Target::Object { id, .. }, .. }))
                if order > Order::PAGE =>
            {
                Found::Split(id)
            }
            Some((first, _)) => Found::Concern(Concern::new(self.id, first.into())),
            None => Found::Concern(Concern::default()),
        };
        let copy = |state: &mut State, announced: &Announced<'_>| {
            let Some((first, entry)) = state.to_copy(self.id, page, access) else {
                return Ok(());
            };
            let from = state.frame_of(first, &entry, page).expect("what is copied is at hand");
            let to = state.ram.allocate(Order::PAGE).ok_or(FaultError::OutOfMemory { page })?;
            state.ram.copy(from, to, Order::PAGE);
            state.replace(self.id, page, to, announced);
            state.table(self.id).touch(page, access);
            Ok(())
        };
        let done = self.shared.change_until(deadline, EventKind::Clear, None, find, copy);
        done.ok_or(FaultError::TimedOut { page })?
    }
}

impl State {
    /// Tells whether an isolation cannot end before `thread` does something: it is of that thread,
    /// or of one that sleeps for such an isolation.
    fn waits_for(&self, isolation: IsolationId, thread: u64) -> bool {
        let mut next = Some(isolation);
        // This ends, since nobody has gone to sleep who would have closed a circle.
        while let Some(isolation) = next {
            match self.isolations.get(&isolation) {
                Some(of) if of.thread == thread => return true,
                Some(of) => next = self.waiting.get(&of.thread).copied(),
                // It is over, and who sleeps for it is about to wake.
                None => return false,
            }
        }
        false
    }

    fn fault(
        &mut self,
        space: SpaceId,
        page: Page,
        access: Access,
        keep: Option<Owner>,
    ) -> Result<Next, FaultError> {
        let Some(state) = self.space(space) else { return Err(FaultError::Released) };
        let vma = state.vmas.at(page).ok_or(FaultError::Hole { page })?;
        if vma.rights < access {
            return Err(FaultError::Denied { page, wanted: access, allowed: vma.rights });
        }
        let Some((first, &entry)) = state.table.find(page) else {
            let vma = vma.clone();
            self.fill_untouched(space, page, access, &vma)?;
            return Ok(Next::Done);
        };
        if let Sight::Exclusive(owner) = entry.sight {
            return Ok(if keep == Some(owner) { Next::Done } else { Next::Revoke });
        }
        let Target::Object { id, .. } = entry.target else {
            return Ok(self.use_entry(space, first, access, true));
        };
        let own = vma.is_private();
        let object = self.object(id);
        let (shared, anonymous) = (object.is_shared(), object.is_anonymous());
        match &object.location {
            Location::Transit(isolation) => Ok(Next::Sleep(*isolation)),
            Location::Swap(_) => {
                self.swap_in(id).ok_or(FaultError::OutOfMemory { page })?;
                self.fault(space, page, access, keep)
            }
            Location::Device(block) => {
                let own_device = keep == Some(block.location().owner);
                let stays = own_device && (access < Access::Write || !shared);
                if !stays {
                    let pagemap = Arc::clone(block.pagemap());
                    return Ok(Next::Home { pagemap, order: entry.order });
                }
                Ok(self.use_entry(space, first, access, false))
            }
            Location::System(_) => {
                let copy = if anonymous { shared } else { own };
                Ok(self.use_entry(space, first, access, copy))
            }
        }
    }

    /// Uses an entry that can be seen. If it is a store to it, and the entry does not let it
    /// through, that takes a copy where `copy` says so, and else the entry lets stores through from
    /// now on.
    fn use_entry(&mut self, space: SpaceId, first: Page, access: Access, copy: bool) -> Next {
        let table = self.table(space);
        let (_, entry) = table.find(first).expect("found just now");
        if access >= Access::Write && !entry.writable && copy {
            return Next::Copy;
        }
        table.touch(first, access);
        Next::Done
    }

    /// Fills in a place that has never been touched, or whose page was dropped.
    fn fill_untouched(
        &mut self,
        space: SpaceId,
        page: Page,
        access: Access,
        vma: &Vma,
    ) -> Result<(), FaultError> {
        let write = access >= Access::Write;
        let out_of_memory = FaultError::OutOfMemory { page };
        let (page, id, order) = match vma.file_page(page) {
            Some((file, index)) => {
                if index >= self.files[&file].length {
                    return Err(FaultError::EndOfFile { page });
                }
                let cached = self.file_page(file, index).ok_or(out_of_memory)?;
                if write && vma.is_private() {
                    let from = self.object(cached).frame().expect("file pages stay in memory");
                    let to = self.ram.allocate(Order::PAGE).ok_or(out_of_memory)?;
                    self.ram.copy(from, to, Order::PAGE);
                    let location = Location::System(to);
                    (
                        page,
                        self.add_object(PageObject::anonymous(Order::PAGE, location)),
                        Order::PAGE,
                    )
                } else {
                    (page, cached, Order::PAGE)
                }
            }
            None if write => {
                let (order, frame) = self.allocate_for(space, page, vma).ok_or(out_of_memory)?;
                let object = PageObject::anonymous(order, Location::System(frame));
                (page.align_down(order), self.add_object(object), order)
            }
            None => {
                self.fill(space, page, Entry::visible(Target::Zero, Order::PAGE));
                self.table(space).touch(page, access);
                return Ok(());
            }
        };
        self.fill(space, page, Entry::visible(Target::Object { id, index: 0 }, order));
        self.table(space).touch(page, access);
        Ok(())
    }

    /// Allocates memory for a store to an untouched page: a large page where the mapping wants one,
    /// nothing is in its way and there is room.
    fn allocate_for(&self, space: SpaceId, page: Page, vma: &Vma) -> Option<(Order, Frame)> {
        let block = huge_block(page, vma.range).filter(|_| vma.huge);
        if let Some(block) = block
            && self.space(space).is_some_and(|state| state.table.is_empty_at(block))
            && let Some(frame) = self.ram.allocate(Order::HUGE)
        {
            return Some((Order::HUGE, frame));
        }
        self.ram.allocate(Order::PAGE).map(|frame| (Order::PAGE, frame))
    }

    /// Returns a page of a file, which is made if it has never been touched.
    pub(super) fn file_page(&mut self, file: FileId, index: u64) -> Option<ObjectId> {
        if let Some(&id) = self.files[&file].pages.get(&index) {
            return Some(id);
        }
        let location = Location::System(self.ram.allocate(Order::PAGE)?);
        let object = PageObject {
            file: Some((file, index)),
            ..PageObject::anonymous(Order::PAGE, location)
        };
        let id = self.add_object(object);
        self.files.get_mut(&file).expect("looked up just now").pages.insert(index, id);
        Some(id)
    }

    /// Brings a page in from its swap slot. Nobody can see its entries, so none is announced.
    pub(super) fn swap_in(&mut self, id: ObjectId) -> Option<()> {
        let frame = self.ram.allocate(Order::PAGE)?;
        match self.set_location(id, Location::System(frame)) {
            Location::Swap(bytes) => self.ram.fill(frame, bytes),
            _ => unreachable!("only what was swapped out is swapped in"),
        }
        self.show(id);
        Some(())
    }

    /// Returns the entry at `page` if a store, or a load by reference, has to copy what it leads
    /// to.
    pub(super) fn to_copy(
        &self,
        space: SpaceId,
        page: Page,
        access: Access,
    ) -> Option<(Page, Entry)> {
        let vma = self.vma(space, page)?;
        let (first, &entry) = self.entry(space, page)?;
        let store = access >= Access::Write;
        let allowed = vma.rights >= access && vma.is_private();
        if !allowed || entry.sight != Sight::Visible || entry.writable {
            return None;
        }
        let copy = match entry.target {
            Target::Zero => store,
            Target::Object { id, .. } => {
                let object = self.object(id);
                let copy = if object.is_anonymous() { object.is_shared() } else { store };
                object.frame().is_some() && copy
            }
        };
        copy.then_some((first, entry))
    }

    /// Puts a page of its own, in `frame`, in the place of what is mapped at `page`. Keeps the
    /// flags.
    pub(super) fn replace(
        &mut self,
        space: SpaceId,
        page: Page,
        frame: Frame,
        announced: &Announced<'_>,
    ) {
        let object = PageObject::anonymous(Order::PAGE, Location::System(frame));
        let id = self.add_object(object);
        let (_, &before) = self.entry(space, page).expect("what is replaced is there");
        let target = Target::Object { id, index: 0 };
        self.table(space).change(page, announced, |entry| {
            entry.target = target;
            entry.sight = Sight::Visible;
            // What may be dropped is the page before, not this one.
            entry.lazy = false;
        });
        self.object_mut(id).mappings.insert((space, page));
        self.forget_mapping(space, page, &before);
    }

    /// Returns the frame that a CPU may use for `access` as things are, and notes the access.
    pub(super) fn translate(
        &mut self,
        space: SpaceId,
        page: Page,
        access: Access,
    ) -> Option<Frame> {
        let state = self.space(space)?;
        let vma = state.vmas.at(page)?;
        let (first, &entry) = state.table.find(page)?;
        let through = access < Access::Write || entry.writable;
        if vma.rights < access || entry.sight != Sight::Visible || !through {
            return None;
        }
        let frame = self.frame_of(first, &entry, page)?;
        self.table(space).touch(first, access);
        Some(frame)
    }
}

impl Entry {
    /// Makes an entry that lets nothing but loads through yet.
    pub(super) fn visible(target: Target, order: Order) -> Entry {
        let flags = PageFlags::default();
        Entry { target, sight: Sight::Visible, writable: false, lazy: false, flags, order }
    }
}
