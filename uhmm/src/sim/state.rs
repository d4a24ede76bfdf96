//! Everything a machine is, under one lock, and the steps that keep its parts in agreement.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};
use std::time::Instant;

use mmu_notifier::{EventKind, Owner, Subscriptions};

use super::object::{FileId, IsolationId, Location, ObjectId, PageObject};
use super::page_table::{Announced, Concern, Entry, PageTable, Place, Sight, Target};
use super::ram::{Ram, View, ZERO};
use super::vma::{Vma, Vmas};
use crate::address_space::SpaceId;
use crate::backend::SystemMemory;
use crate::entry::{DeviceFrame, DeviceLocation, Frame};
use crate::injector::Injector;
use crate::page::{Order, Page, PageRange};
use crate::pagemap::DeviceBlock;
use crate::primitive::{Condvar, Mutex, MutexGuard, lock, wait};

/// A machine, as all handles on it share it.
pub(super) struct Shared {
    this: Weak<Shared>,
    state: Mutex<State>,
    /// Something that was in transit has arrived, or gone.
    arrived: Condvar,
    pub(super) ram: Arc<Ram>,
    pub(super) injector: Injector,
    pub(super) devices: Arc<View>,
    pub(super) copy_engines: Arc<View>,
}

/// What the machine's lock protects. See the [module](super).
pub(super) struct State {
    pub(super) spaces: BTreeMap<SpaceId, SpaceState>,
    pub(super) objects: BTreeMap<ObjectId, PageObject>,
    pub(super) files: BTreeMap<FileId, FileState>,
    /// The isolations under way.
    pub(super) isolations: BTreeMap<IsolationId, IsolationState>,
    /// The isolation that each sleeping thread waits for.
    pub(super) waiting: BTreeMap<u64, IsolationId>,
    /// How often each frame is pinned.
    pub(super) pins: BTreeMap<Frame, u64>,
    /// Frames that belong to pins alone: their pages are gone.
    pub(super) orphans: BTreeMap<Frame, ()>,
    /// The objects on devices, by the first frame of their blocks. Looked up and never walked in
    /// the order of owners, which differs from run to run.
    pub(super) resident: HashMap<Owner, BTreeMap<DeviceFrame, ObjectId>>,
    /// What is to be dropped as soon as the lock is free.
    pub(super) garbage: Vec<DeviceBlock>,
    pub(super) ram: Arc<Ram>,
    next: u64,
}

pub(super) struct SpaceState {
    pub(super) notifiers: Arc<Subscriptions>,
    pub(super) vmas: Vmas,
    pub(super) table: PageTable,
}

/// What the machine knows of an isolation.
pub(super) struct IsolationState {
    /// The thread that it belongs to.
    pub(super) thread: u64,
    /// The frames that it has.
    pub(super) frames: BTreeSet<u64>,
}

pub(super) struct FileState {
    pub(super) pages: BTreeMap<u64, ObjectId>,
    /// In pages.
    pub(super) length: u64,
    /// Handles and mappings.
    pub(super) users: u64,
}

/// The machine's lock, held. Device memory that was freed meanwhile goes back to its device after
/// it: the device's allocator may have locks of its own.
pub(super) struct Locked<'a> {
    shared: &'a Shared,
    guard: Option<MutexGuard<'a, State>>,
}

/// What a change finds before it is announced.
pub(super) enum Found {
    /// It is about these entries.
    Concern(Concern),
    /// It cannot be made before this large page is split.
    Split(ObjectId),
}

impl Shared {
    pub(super) fn new(
        limit: Option<u64>,
        injector: Injector,
        count_violations: bool,
    ) -> Arc<Shared> {
        let ram = Arc::new(Ram::new(limit, injector.clone(), count_violations));
        let state = State {
            spaces: BTreeMap::new(),
            objects: BTreeMap::new(),
            files: BTreeMap::new(),
            isolations: BTreeMap::new(),
            waiting: BTreeMap::new(),
            pins: BTreeMap::new(),
            orphans: BTreeMap::new(),
            resident: HashMap::new(),
            garbage: Vec::new(),
            ram: Arc::clone(&ram),
            next: 1,
        };
        Arc::new_cyclic(|this| Shared {
            this: Weak::clone(this),
            state: Mutex::new(state),
            arrived: Condvar::new(),
            devices: Arc::new(View::of_devices(&ram)),
            copy_engines: Arc::new(View::of_copy_engines(&ram)),
            ram,
            injector,
        })
    }

    pub(super) fn this(&self) -> Arc<Shared> {
        self.this.upgrade().expect("a machine is used through an `Arc`")
    }

    /// Tells whether `memory` is this machine's.
    pub(super) fn is_memory(&self, memory: &dyn SystemMemory) -> bool {
        [&self.devices, &self.copy_engines]
            .map(Arc::as_ptr)
            .iter()
            .any(|&view| std::ptr::addr_eq(view, memory))
    }

    pub(super) fn lock(&self) -> Locked<'_> {
        Locked { shared: self, guard: Some(lock(&self.state)) }
    }

    /// Wakes those who sleep until a page in transit arrives.
    pub(super) fn wake(&self) {
        self.arrived.notify_all();
    }

    /// Makes a change: finds what it is about, announces that, and makes it in one step if what it
    /// found still holds. Else it begins again.
    ///
    /// `apply` may change visible entries within what `find` returned, and no others.
    pub(super) fn change<R>(
        &self,
        kind: EventKind,
        owner: Option<Owner>,
        find: impl Fn(&State) -> Found,
        apply: impl FnOnce(&mut State, &Announced<'_>) -> R,
    ) -> R {
        let made = self.change_until(None, kind, owner, find, apply);
        made.expect("without a deadline it goes on until it is done")
    }

    /// Does what [`change`](Shared::change) does, but begins nothing after `deadline`: if it passes
    /// before the change was made, it is not made, and this returns nothing.
    pub(super) fn change_until<R>(
        &self,
        deadline: Option<Instant>,
        kind: EventKind,
        owner: Option<Owner>,
        find: impl Fn(&State) -> Found,
        apply: impl FnOnce(&mut State, &Announced<'_>) -> R,
    ) -> Option<R> {
        // Everything found so far is announced, also in vain: what comes and goes cannot keep a
        // change from being made for ever.
        let mut so_far = Concern::default();
        loop {
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return None;
            }
            let found = find(&self.lock());
            let places = match found {
                Found::Concern(concern) => {
                    so_far.join(concern);
                    self.places(so_far.clone())
                }
                Found::Split(id) => {
                    self.split(id);
                    continue;
                }
            };
            let announced = Announced::announce(&places, kind, owner);
            let mut state = self.lock();
            if let Found::Concern(again) = find(&state)
                && announced.covers_all(again)
            {
                let result = apply(&mut state, &announced);
                drop(state);
                drop(announced);
                // A page in transit may have been unmapped.
                self.wake();
                return Some(result);
            }
        }
    }

    /// Makes a change that is about one range of one address space at least.
    pub(super) fn change_range<R>(
        &self,
        kind: EventKind,
        space: SpaceId,
        range: PageRange,
        apply: impl FnOnce(&mut State, &Announced<'_>) -> R,
    ) -> R {
        let find = |state: &State| state.find_range(space, range);
        self.change(kind, None, find, apply)
    }

    /// Returns where to announce a change. Address spaces that have exited are left out.
    pub(super) fn places(&self, concern: Concern) -> Vec<Place> {
        let state = self.lock();
        let place = |(space, range): (SpaceId, PageRange)| {
            let notifiers = &state.spaces.get(&space)?.notifiers;
            Some((space, Arc::clone(notifiers), range))
        };
        concern.runs().into_iter().filter_map(place).collect()
    }

    /// Splits a large page that can be seen, if it still is one. Says whether it was.
    pub(super) fn split(&self, id: ObjectId) -> bool {
        let find = |state: &State| Found::Concern(state.splittable(id));
        self.change(EventKind::Clear, None, find, |state, announced| {
            let large = !state.splittable(id).runs().is_empty();
            if large {
                state.split_object(id, Some(announced));
            }
            large
        })
    }
}

impl State {
    pub(super) fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    pub(super) fn space(&self, space: SpaceId) -> Option<&SpaceState> {
        self.spaces.get(&space)
    }

    /// Returns an address space that is known to be there.
    pub(super) fn space_mut(&mut self, space: SpaceId) -> &mut SpaceState {
        self.spaces.get_mut(&space).expect("an address space with entries has not exited")
    }

    pub(super) fn table(&mut self, space: SpaceId) -> &mut PageTable {
        &mut self.space_mut(space).table
    }

    pub(super) fn vma(&self, space: SpaceId, page: Page) -> Option<&Vma> {
        self.space(space)?.vmas.at(page)
    }

    pub(super) fn entry(&self, space: SpaceId, page: Page) -> Option<(Page, &Entry)> {
        self.space(space)?.table.find(page)
    }

    pub(super) fn object(&self, id: ObjectId) -> &PageObject {
        self.objects.get(&id).expect("an object lives as long as an entry leads to it")
    }

    pub(super) fn object_mut(&mut self, id: ObjectId) -> &mut PageObject {
        self.objects.get_mut(&id).expect("an object lives as long as an entry leads to it")
    }

    /// Finds a change of one range: the range, unless a large page reaches out of it. Nothing where
    /// the address space has exited.
    pub(super) fn find_range(&self, space: SpaceId, range: PageRange) -> Found {
        if self.space(space).is_none() {
            return Found::Concern(Concern::default());
        }
        match self.straddling(space, range).first() {
            Some(&id) => Found::Split(id),
            None => Found::Concern(Concern::new(space, range)),
        }
    }

    /// Returns the large pages that can be seen and reach out of `range`.
    pub(super) fn straddling(&self, space: SpaceId, range: PageRange) -> Vec<ObjectId> {
        let Some(state) = self.space(space) else { return Vec::new() };
        let ends = [range.first(), range.last()];
        let mut ids: Vec<ObjectId> = ends
            .into_iter()
            .filter_map(|end| state.table.find(end))
            .filter(|(first, entry)| !entry.is_hidden() && !range.covers(first.block(entry.order)))
            .filter_map(|(_, entry)| entry.object())
            .collect();
        ids.dedup();
        ids
    }

    /// Cuts hidden large entries that reach out of `range`.
    pub(super) fn cut_hidden(&mut self, space: SpaceId, range: PageRange) {
        for end in [range.first(), range.last()] {
            let Some((first, entry)) = self.entry(space, end) else { continue };
            if entry.is_hidden() && !range.covers(first.block(entry.order)) {
                self.split_entry(space, first, None);
            }
        }
    }

    /// Cuts one entry into single ones, and enters those into the reverse map.
    pub(super) fn split_entry(
        &mut self,
        space: SpaceId,
        first: Page,
        announced: Option<&Announced<'_>>,
    ) {
        let (_, &entry) = self.entry(space, first).expect("an entry that is split is there");
        self.table(space).split(first, announced);
        if let Some(id) = entry.object() {
            let mappings = &mut self.object_mut(id).mappings;
            mappings.extend(first.block(entry.order).iter().map(|page| (space, page)));
        }
    }

    /// Returns what a split of this object is about: nothing if it is not a large page that can be
    /// seen.
    fn splittable(&self, id: ObjectId) -> Concern {
        match self.objects.get(&id) {
            Some(object)
                if object.order > Order::PAGE
                    && !matches!(object.location, Location::Transit(_)) =>
            {
                self.mappings_of(id)
            }
            _ => Concern::default(),
        }
    }

    /// Returns every range at which an object is mapped.
    pub(super) fn mappings_of(&self, id: ObjectId) -> Concern {
        let mut concern = Concern::default();
        self.add_mappings(id, &mut concern);
        concern
    }

    pub(super) fn add_mappings(&self, id: ObjectId, concern: &mut Concern) {
        for &(space, page) in &self.object(id).mappings {
            let (first, entry) = self.entry(space, page).expect("the reverse map is true");
            concern.add(space, first.block(entry.order));
        }
    }

    /// Takes a large object apart: each page becomes an object of its own, where it is. Pages that
    /// nobody has mapped are freed, unless an isolation has them. Returns the new objects.
    pub(super) fn split_object(
        &mut self,
        id: ObjectId,
        announced: Option<&Announced<'_>>,
    ) -> Vec<ObjectId> {
        for (space, page) in self.object(id).mappings.clone() {
            let (_, entry) = self.entry(space, page).expect("the reverse map is true");
            if entry.order > Order::PAGE {
                self.split_entry(space, page, announced);
            }
        }
        self.forget_place(id);
        let whole = self.objects.remove(&id).expect("looked up just now");
        let parts = split_location(whole.location, whole.order);
        let ids: Vec<ObjectId> = parts
            .into_iter()
            .map(|location| self.add_object(PageObject::anonymous(Order::PAGE, location)))
            .collect();
        for (space, page) in whole.mappings {
            let (_, &entry) = self.entry(space, page).expect("the reverse map is true");
            let Target::Object { index, .. } = entry.target else {
                unreachable!("the reverse map is true")
            };
            let part = ids[usize::try_from(index).expect("an index within a large page")];
            let target = Target::Object { id: part, index: 0 };
            let table = self.table(space);
            match announced {
                Some(announced) => table.change(page, announced, |entry| entry.target = target),
                None => table.change_hidden(page, |entry| entry.target = target),
            }
            self.object_mut(part).mappings.insert((space, page));
        }
        ids.iter().for_each(|&id| self.free_if_unused(id));
        ids
    }

    pub(super) fn add_object(&mut self, object: PageObject) -> ObjectId {
        let id = ObjectId(self.number());
        self.objects.insert(id, object);
        self.note_place(id);
        id
    }

    /// Moves an object: `location` is where its contents are now. Returns where they were. Its
    /// entries must be hidden, or about to be changed as well.
    pub(super) fn set_location(&mut self, id: ObjectId, location: Location) -> Location {
        self.forget_place(id);
        let before = std::mem::replace(&mut self.object_mut(id).location, location);
        self.note_place(id);
        before
    }

    fn note_place(&mut self, id: ObjectId) {
        if let Some(at) = self.device_location(id) {
            self.resident.entry(at.owner).or_default().insert(at.frame, id);
        }
    }

    fn forget_place(&mut self, id: ObjectId) {
        if let Some(at) = self.device_location(id)
            && let Some(blocks) = self.resident.get_mut(&at.owner)
        {
            blocks.remove(&at.frame);
            if blocks.is_empty() {
                self.resident.remove(&at.owner);
            }
        }
    }

    fn device_location(&self, id: ObjectId) -> Option<DeviceLocation> {
        match &self.object(id).location {
            Location::Device(block) => Some(block.location()),
            _ => None,
        }
    }

    /// Returns the object that has this page of a device's memory.
    pub(super) fn object_at(&self, location: DeviceLocation) -> Option<ObjectId> {
        let blocks = self.resident.get(&location.owner)?;
        let (first, &id) = blocks.range(..=location.frame).next_back()?;
        (location.frame.0 - first.0 < self.object(id).order.pages()).then_some(id)
    }

    /// Enters a page where nothing was.
    pub(super) fn fill(&mut self, space: SpaceId, page: Page, entry: Entry) {
        self.table(space).fill(page, entry);
        if let Some(id) = entry.object() {
            self.object_mut(id).mappings.insert((space, page));
        }
    }

    /// Removes the entry that begins at `page`, and frees what nobody has mapped any more.
    pub(super) fn unmap_entry(&mut self, space: SpaceId, page: Page, announced: &Announced<'_>) {
        let entry = self.table(space).take(page, announced);
        self.forget_mapping(space, page, &entry);
    }

    pub(super) fn forget_mapping(&mut self, space: SpaceId, page: Page, entry: &Entry) {
        if let Some(id) = entry.object() {
            let object = self.object_mut(id);
            object.mappings.remove(&(space, page));
            object.dirty |= entry.flags.dirty;
            self.free_if_unused(id);
        }
    }

    /// Frees an object that nothing refers to. One in transit is freed by its isolation.
    pub(super) fn free_if_unused(&mut self, id: ObjectId) {
        let object = self.object(id);
        let in_file = object.file.is_some_and(|(file, index)| {
            let file = self.files.get(&file);
            file.is_some_and(|file| file.pages.get(&index) == Some(&id))
        });
        let in_transit = matches!(object.location, Location::Transit(_));
        if !object.mappings.is_empty() || in_file || in_transit {
            return;
        }
        self.forget_place(id);
        let object = self.objects.remove(&id).expect("looked up just now");
        self.free_location(object.location, object.order);
    }

    pub(super) fn free_location(&mut self, location: Location, order: Order) {
        match location {
            Location::System(frame) => self.free_frames(frame, order),
            Location::Device(block) => self.garbage.push(block),
            Location::Swap(_) | Location::Transit(_) => {}
        }
    }

    /// Frees a block of frames. Those that are pinned are freed by their last pin.
    pub(super) fn free_frames(&mut self, first: Frame, order: Order) {
        for frame in (first.0..first.0 + order.pages()).map(Frame) {
            if self.pins.contains_key(&frame) {
                self.orphans.insert(frame, ());
            } else {
                self.ram.free(frame);
            }
        }
    }

    /// Tells whether a page of the object is used by reference.
    pub(super) fn is_pinned(&self, object: &PageObject) -> bool {
        object.frame().is_some_and(|Frame(first)| {
            let block = Frame(first)..Frame(first + object.order.pages());
            self.pins.range(block).next().is_some()
        })
    }

    /// Hides every entry of an object, so that its contents can go elsewhere.
    pub(super) fn hide(&mut self, id: ObjectId, announced: &Announced<'_>) {
        for (space, page) in self.object(id).mappings.clone() {
            self.table(space).change(page, announced, |entry| entry.sight = Sight::Hidden);
        }
    }

    /// Shows every entry of an object, whose contents have come to rest.
    pub(super) fn show(&mut self, id: ObjectId) {
        let object = self.object(id);
        let read_only = object.is_anonymous() && object.is_shared();
        for (space, page) in object.mappings.clone() {
            self.table(space).change_hidden(page, |entry| {
                entry.sight = Sight::Visible;
                entry.writable &= !read_only;
            });
        }
    }

    /// Returns the frame that holds `page`, which an entry that can be seen maps.
    pub(super) fn frame_of(&self, first: Page, entry: &Entry, page: Page) -> Option<Frame> {
        match entry.target {
            Target::Zero => Some(ZERO),
            Target::Object { id, .. } => {
                let Frame(frame) = self.object(id).frame()?;
                Some(Frame(frame + (page.number() - first.number())))
            }
        }
    }

    /// Removes all entries of `range`, which no large page that can be seen reaches out of.
    pub(super) fn zap(&mut self, space: SpaceId, range: PageRange, announced: &Announced<'_>) {
        if self.space(space).is_none() {
            return;
        }
        self.cut_hidden(space, range);
        for page in self.table(space).pages(range) {
            self.unmap_entry(space, page, announced);
        }
    }

    /// Takes the mappings of `range` out. Their files stay in use until
    /// [`put_files`](State::put_files).
    pub(super) fn take_vmas(&mut self, space: SpaceId, range: PageRange) -> Vec<Vma> {
        let (taken, more) = self.space_mut(space).vmas.take(range);
        for file in more {
            self.files.get_mut(&file).expect("a mapped file is there").users += 1;
        }
        taken
    }

    /// Drops one user of each file, and the pages of those that have none left.
    pub(super) fn put_files(&mut self, files: impl IntoIterator<Item = FileId>) {
        for id in files {
            let file = self.files.get_mut(&id).expect("a file in use is there");
            file.users -= 1;
            if file.users == 0 {
                let file = self.files.remove(&id).expect("looked up just now");
                file.pages.into_values().for_each(|page| self.free_if_unused(page));
            }
        }
    }
}

/// Says where each page is of a large page that is taken apart.
fn split_location(location: Location, order: Order) -> Vec<Location> {
    let pages = 0..order.pages();
    match location {
        Location::System(Frame(first)) => {
            pages.map(|index| Location::System(Frame(first + index))).collect()
        }
        Location::Device(block) => block.split().into_iter().map(Location::Device).collect(),
        Location::Transit(isolation) => pages.map(|_| Location::Transit(isolation)).collect(),
        Location::Swap(_) => unreachable!("large pages are split before they are swapped out"),
    }
}

impl<'a> Locked<'a> {
    /// Sleeps until something in transit has arrived. Says whether `deadline` is still ahead.
    pub(super) fn wait(mut self, deadline: Option<Instant>) -> (Locked<'a>, bool) {
        let guard = self.guard.take().expect("held until it is dropped");
        let (guard, ahead) = wait(&self.shared.arrived, guard, deadline);
        self.guard = Some(guard);
        (self, ahead)
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        self.guard.as_ref().expect("held until it is dropped")
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.guard.as_mut().expect("held until it is dropped")
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else { return };
        let garbage = std::mem::take(&mut guard.garbage);
        drop(guard);
        drop(garbage);
    }
}
