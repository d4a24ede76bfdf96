//! Isolations: pages taken out of all page tables, and what becomes of them.
//!
//! An isolation owns the contents of its pages: the frames or device blocks that they left, and the
//! frames that they may come home to. The objects stay in the machine, with hidden entries and a
//! location that says which isolation has them, so they can be unmapped, moved and shared meanwhile
//! by whoever holds the machine's lock. The commit, or the drop, gives each object its contents
//! back, at one place, in one step, or frees them where nobody refers to the object any more.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use mmu_notifier::{EventKind, thread_number};

use super::PageFlags;
use super::fault::Space;
use super::object::{IsolationId, Location, ObjectId, PageObject};
use super::page_table::{Announced, Concern, Entry, Sight, Target};
use super::state::{Found, Shared, State};
use super::vma::{Backing, huge_block};
use crate::address_space::SpaceId;
use crate::backend::{
    CannotSplit, Committed, IsolatedPage, Isolation, OutOfSystemMemory, Placement, ReverseMap,
    Select, Source, SystemMemory,
};
use crate::entry::{Access, DeviceLocation, Frame};
use crate::error::{StayReason, Stayed};
use crate::page::{Order, Page, PageRange};
use crate::pagemap::DeviceBlock;

/// The pages of one isolation.
pub(super) struct SimIsolation {
    shared: Arc<Shared>,
    id: IsolationId,
    pages: Vec<IsolatedPage>,
    held: Vec<Held>,
    stayed: Vec<Stayed>,
    over: bool,
}

/// What an isolation has of a page.
struct Held {
    object: ObjectId,
    contents: Contents,
    /// Where it may come home to.
    home: Option<Frame>,
}

/// The one copy of an isolated page.
enum Contents {
    /// Zeroes that nobody has written down; with the flags of the entry that led to the shared
    /// frame of zeroes, if there was one.
    Zero(Option<PageFlags>),
    System(Frame),
    Device(DeviceBlock),
}

/// What an isolation will do about a piece of its range.
enum Verdict {
    /// Take what is there.
    Take(ObjectId),
    /// Take a page that is not there yet: zeroes.
    TakeZero,
    /// Pass over it: it is another mapping of a page that is taken already.
    Again,
    Stay(StayReason),
}

struct Piece {
    pages: PageRange,
    verdict: Verdict,
}

impl Space {
    /// Does what [`Backend::isolate`](crate::Backend::isolate) says.
    pub(super) fn isolate(&self, range: PageRange, select: Select) -> SimIsolation {
        self.split_edges(range, select);
        let find = |state: &State| {
            let mut concern = Concern::default();
            for piece in state.classify(self.id, range, select) {
                match piece.verdict {
                    Verdict::Take(id) => state.add_mappings(id, &mut concern),
                    // The shared frame of zeroes can be seen; a place without an entry cannot.
                    Verdict::TakeZero if state.entry(self.id, piece.pages.first()).is_some() => {}
                    Verdict::TakeZero | Verdict::Again | Verdict::Stay(_) => continue,
                }
                concern.add(self.id, range);
            }
            Found::Concern(concern)
        };
        let mut isolation = SimIsolation::begin(Arc::clone(&self.shared));
        self.shared.change(EventKind::Migrate, None, find, |state, announced| {
            for piece in state.classify(self.id, range, select) {
                isolation.take_piece(state, self.id, piece, announced);
            }
        });
        isolation
    }

    /// Splits large pages that would be isolated in part. Where that fails they stay.
    fn split_edges(&self, range: PageRange, select: Select) {
        let straddling = {
            let state = self.shared.lock();
            let mut ids = state.straddling(self.id, range);
            ids.retain(|&id| state.selects(state.object(id), select).is_ok());
            ids
        };
        for id in straddling {
            if !self.shared.injector.fails("split") {
                self.shared.split(id);
            }
        }
    }
}

impl State {
    /// Says what an isolation does about each piece of `range`, in ascending order.
    fn classify(&self, space: SpaceId, range: PageRange, select: Select) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut seen = BTreeSet::new();
        let Some(state) = self.space(space) else {
            let hole = Verdict::Stay(select.unless_here(StayReason::Hole));
            return vec![Piece { pages: range, verdict: hole }];
        };
        let mut next = Some(range.first());
        while let Some(page) = next.filter(|&page| page <= range.last()) {
            let rest = PageRange::from_bounds(page, range.last()).expect("checked just now");
            let piece = match state.vmas.at(page) {
                Some(_) => self.classify_page(space, page, rest, select, &mut seen),
                None => {
                    let hole = match state.vmas.overlapping(rest).next() {
                        Some(vma) => rest.first().number()..vma.range.first().number(),
                        None => rest.first().number()..rest.last().number() + 1,
                    };
                    let pages = PageRange::from_pages(page, hole.end - hole.start);
                    let pages = pages.expect("a hole has a page");
                    Piece { pages, verdict: Verdict::Stay(select.unless_here(StayReason::Hole)) }
                }
            };
            next = piece.pages.last().checked_add(1);
            pieces.push(piece);
        }
        pieces
    }

    /// Says what an isolation does about the page or large page at the start of `rest`, which is
    /// mapped.
    fn classify_page(
        &self,
        space: SpaceId,
        page: Page,
        rest: PageRange,
        select: Select,
        seen: &mut BTreeSet<ObjectId>,
    ) -> Piece {
        let vma = self.vma(space, page).expect("the caller looked");
        let untaken = |reason| Piece {
            pages: page.into(),
            verdict: Verdict::Stay(select.unless_here(reason)),
        };
        let Some((first, entry)) = self.entry(space, page) else {
            if vma.rights == Access::None {
                return untaken(StayReason::Denied);
            }
            if vma.backing != Backing::Anonymous {
                return untaken(StayReason::FileBacked);
            }
            if select != Select::System {
                return untaken(StayReason::Elsewhere);
            }
            let block = huge_block(page, vma.range).filter(|&block| {
                vma.huge
                    && block.first() == page
                    && rest.covers(block)
                    && self.space(space).is_some_and(|state| state.table.is_empty_at(block))
            });
            return Piece { pages: block.unwrap_or(page.into()), verdict: Verdict::TakeZero };
        };
        let block = first.block(entry.order);
        let pages = block.intersection(rest).expect("the entry maps the page");
        let stay = |reason| Piece { pages, verdict: Verdict::Stay(reason) };
        // To leave a device takes no rights.
        if vma.rights == Access::None && select == Select::System {
            return stay(StayReason::Denied);
        }
        let Target::Object { id, .. } = entry.target else {
            return match select {
                Select::System => Piece { pages, verdict: Verdict::TakeZero },
                _ => stay(StayReason::Elsewhere),
            };
        };
        if seen.contains(&id) {
            return Piece { pages, verdict: Verdict::Again };
        }
        if let Sight::Exclusive(_) = entry.sight {
            return stay(select.unless_here(StayReason::Exclusive));
        }
        match self.selects(self.object(id), select) {
            Err(reason) => stay(reason),
            Ok(()) if pages != block => stay(StayReason::LargePage),
            Ok(()) => {
                seen.insert(id);
                Piece { pages, verdict: Verdict::Take(id) }
            }
        }
    }

    /// Says why a page is not one of those that are to be isolated, if it is not.
    fn selects(&self, object: &PageObject, select: Select) -> Result<(), StayReason> {
        let on_device = |owner: Option<mmu_notifier::Owner>, other: bool| match &object.location {
            Location::Transit(_) => Err(StayReason::InTransit),
            Location::Device(block) => {
                let same = Some(block.location().owner) == owner;
                if same != other { Ok(()) } else { Err(StayReason::Elsewhere) }
            }
            Location::System(_) | Location::Swap(_) => Err(StayReason::Elsewhere),
        };
        match select {
            Select::Device(owner) => on_device(Some(owner), false),
            Select::Foreign(owner) => on_device(Some(owner), true),
            Select::System if !object.is_anonymous() => Err(StayReason::FileBacked),
            Select::System => match object.location {
                Location::System(_) if self.is_pinned(object) => Err(StayReason::Pinned),
                Location::System(_) => Ok(()),
                Location::Transit(_) => Err(StayReason::InTransit),
                Location::Swap(_) => Err(StayReason::SwappedOut),
                // Whoever moves pages to a device brings those of other devices home first.
                Location::Device(_) => Err(StayReason::AlreadyThere),
            },
        }
    }
}

impl Select {
    /// Returns why a page stays that is on no device: for whoever looks for pages on devices it is
    /// simply elsewhere.
    fn unless_here(self, reason: StayReason) -> StayReason {
        match self {
            Select::System => reason,
            Select::Device(_) | Select::Foreign(_) => StayReason::Elsewhere,
        }
    }
}

impl ReverseMap for Shared {
    fn isolate(&self, locations: &[DeviceLocation]) -> Box<dyn Isolation> {
        let objects = |state: &State| -> BTreeSet<ObjectId> {
            locations.iter().filter_map(|&location| state.object_at(location)).collect()
        };
        let find = |state: &State| {
            let mut concern = Concern::default();
            objects(state).into_iter().for_each(|id| state.add_mappings(id, &mut concern));
            Found::Concern(concern)
        };
        let mut isolation = SimIsolation::begin(self.this());
        self.change(EventKind::Migrate, None, find, |state, announced| {
            for id in objects(state) {
                let first = state.object(id).mappings.first();
                let &(_, page) = first.expect("a page on a device is mapped somewhere");
                isolation.take(state, page, id, announced);
            }
        });
        Box::new(isolation)
    }
}

impl SimIsolation {
    /// Begins an isolation that has no page yet, on behalf of the calling thread.
    fn begin(shared: Arc<Shared>) -> SimIsolation {
        let id = {
            let mut state = shared.lock();
            let id = IsolationId(state.number());
            state.isolations.insert(id, thread_number());
            id
        };
        let (pages, held, stayed) = (Vec::new(), Vec::new(), Vec::new());
        SimIsolation { shared, id, pages, held, stayed, over: false }
    }

    fn take_piece(
        &mut self,
        state: &mut State,
        space: SpaceId,
        piece: Piece,
        announced: &Announced<'_>,
    ) {
        let first = piece.pages.first();
        match piece.verdict {
            Verdict::Again => {}
            Verdict::Stay(reason) => self.stay(piece.pages, reason),
            Verdict::Take(id) => self.take(state, first, id, announced),
            Verdict::TakeZero => self.take_zero(state, space, piece.pages, announced),
        }
    }

    fn stay(&mut self, pages: PageRange, reason: StayReason) {
        if let Some(last) = self.stayed.last_mut()
            && last.reason == reason
            && last.pages.last().checked_add(1) == Some(pages.first())
            && let Some(longer) = PageRange::from_bounds(last.pages.first(), pages.last())
        {
            last.pages = longer;
        } else {
            self.stayed.push(Stayed { pages, reason });
        }
    }

    fn take(&mut self, state: &mut State, page: Page, id: ObjectId, announced: &Announced<'_>) {
        state.hide(id, announced);
        let order = state.object(id).order;
        let (contents, source) = match state.set_location(id, Location::Transit(self.id)) {
            Location::System(frame) => {
                state.ram.set_transit(frame, order, true);
                (Contents::System(frame), Source::System(frame))
            }
            Location::Device(block) => {
                let source = Source::Device(block.location());
                (Contents::Device(block), source)
            }
            Location::Swap(_) | Location::Transit(_) => unreachable!("such pages are not selected"),
        };
        self.pages.push(IsolatedPage { page, order, source });
        self.held.push(Held { object: id, contents, home: None });
    }

    /// Takes a page that has no memory: one that was never touched, or only ever read.
    fn take_zero(
        &mut self,
        state: &mut State,
        space: SpaceId,
        pages: PageRange,
        announced: &Announced<'_>,
    ) {
        let page = pages.first();
        let order = if pages.pages() == 1 { Order::PAGE } else { Order::HUGE };
        let object = PageObject::anonymous(order, Location::Transit(self.id));
        let id = state.add_object(object);
        let target = Target::Object { id, index: 0 };
        let mut entry = Entry { sight: Sight::Hidden, ..Entry::visible(target, order) };
        let mut before = None;
        if state.entry(space, page).is_some() {
            entry.flags = state.table(space).take(page, announced).flags;
            before = Some(entry.flags);
        }
        let rights = state.vma(space, page).map_or(Access::None, |vma| vma.rights);
        // A page that is made on a device may be stored to there at once, and counts as if it was.
        if rights >= Access::Write && !entry.flags.write_protected {
            entry.writable = true;
            entry.flags.dirty = true;
            entry.flags.soft_dirty = true;
        }
        state.fill(space, page, entry);
        self.pages.push(IsolatedPage { page, order, source: Source::Zero });
        self.held.push(Held { object: id, contents: Contents::Zero(before), home: None });
    }

    fn finish(&mut self, placements: Vec<Placement>) -> Vec<Committed> {
        self.over = true;
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        let pages = std::mem::take(&mut self.pages);
        let held = std::mem::take(&mut self.held);
        let mut placements = placements.into_iter();
        let mut committed = Vec::with_capacity(pages.len());
        for (page, held) in pages.iter().zip(held) {
            let placement = placements.next().unwrap_or(Placement::Back);
            committed.push(place(&mut state, page.order, held, placement));
        }
        state.isolations.remove(&self.id);
        drop(state);
        shared.wake();
        committed
    }
}

/// Puts one page where it is to be, or frees it if nobody has it mapped any more.
fn place(state: &mut State, order: Order, held: Held, placement: Placement) -> Committed {
    let Held { object: id, contents, home } = held;
    let gone = state.object(id).mappings.is_empty();
    let mut flags = None;
    if let Contents::Zero(before) = contents {
        flags = before;
    }
    let (location, left, unused) = match (placement, home) {
        (Placement::Back, home) => (contents.location(), None, home),
        (Placement::Device(block), home) => {
            assert_eq!(block.order(), order, "a page is placed in a block of its own order");
            (Some(Location::Device(block)), Some(contents), home)
        }
        (Placement::Home, Some(home)) => (Some(Location::System(home)), Some(contents), None),
        (Placement::Home, None) => panic!("no home was allocated for the page at this index"),
    };
    let left = left.and_then(Contents::location);
    for frame in [&location, &left].into_iter().flatten().filter_map(Location::frame) {
        state.ram.set_transit(frame, order, false);
    }
    if let Some(home) = unused {
        state.ram.set_transit(home, order, false);
        state.free_frames(home, order);
    }
    if let Some(left) = left {
        state.free_location(left, order);
    }
    match location {
        Some(location) if gone => state.free_location(location, order),
        Some(location) => {
            state.set_location(id, location);
            state.arrive(id);
        }
        // A page without contents goes back to having never been touched.
        None => state.forget_zero(id, flags),
    }
    if gone {
        // Freed with the isolation itself, which nothing else refers to.
        state.objects.remove(&id);
        return Committed::Gone;
    }
    Committed::Placed
}

impl State {
    /// Lets the entries of an object be seen whose contents have come to rest. A large page that is
    /// not mapped whole any more everywhere is taken apart first.
    fn arrive(&mut self, id: ObjectId) {
        let object = self.object(id);
        let order = object.order;
        let whole = object.mappings.iter().all(|&(space, page)| {
            self.entry(space, page).is_some_and(|(_, entry)| entry.order == order)
        });
        if whole {
            self.show(id);
            return;
        }
        for part in self.split_object(id, None) {
            if self.objects.contains_key(&part) {
                self.show(part);
            }
        }
    }

    /// Undoes the taking of zeroes: the places are untouched again, or lead to the shared frame.
    fn forget_zero(&mut self, id: ObjectId, before: Option<PageFlags>) {
        for (space, page) in std::mem::take(&mut self.object_mut(id).mappings) {
            let table = self.table(space);
            let Some(before) = before else {
                table.take_hidden(page);
                continue;
            };
            table.change_hidden(page, |entry| {
                let write_protected = entry.flags.write_protected;
                let flags = PageFlags { write_protected, ..before };
                *entry = Entry { flags, ..Entry::visible(Target::Zero, Order::PAGE) };
            });
        }
        self.objects.remove(&id);
    }
}

impl Contents {
    fn location(self) -> Option<Location> {
        match self {
            Contents::Zero(_) => None,
            Contents::System(frame) => Some(Location::System(frame)),
            Contents::Device(block) => Some(Location::Device(block)),
        }
    }

    fn split(self, order: Order) -> Vec<(Contents, Source)> {
        let pages = 0..order.pages();
        match self {
            Contents::Zero(_) => pages.map(|_| (Contents::Zero(None), Source::Zero)).collect(),
            Contents::System(Frame(first)) => pages
                .map(|index| Frame(first + index))
                .map(|frame| (Contents::System(frame), Source::System(frame)))
                .collect(),
            Contents::Device(block) => {
                let part = |part: DeviceBlock| {
                    let source = Source::Device(part.location());
                    (Contents::Device(part), source)
                };
                block.split().into_iter().map(part).collect()
            }
        }
    }
}

impl Location {
    fn frame(&self) -> Option<Frame> {
        match self {
            Location::System(frame) => Some(*frame),
            _ => None,
        }
    }
}

impl Isolation for SimIsolation {
    fn memory(&self) -> Arc<dyn SystemMemory> {
        Arc::clone(&self.shared.copy_engines) as Arc<dyn SystemMemory>
    }

    fn reverse_map(&self) -> Arc<dyn ReverseMap> {
        Arc::clone(&self.shared) as Arc<dyn ReverseMap>
    }

    fn pages(&self) -> &[IsolatedPage] {
        &self.pages
    }

    fn block(&self, index: usize) -> Option<&DeviceBlock> {
        match &self.held[index].contents {
            Contents::Device(block) => Some(block),
            Contents::Zero(_) | Contents::System(_) => None,
        }
    }

    fn stayed(&self) -> &[Stayed] {
        &self.stayed
    }

    fn split(&mut self, index: usize) -> Result<(), CannotSplit> {
        let page = self.pages[index];
        if page.order == Order::PAGE || self.shared.injector.fails("split") {
            return Err(CannotSplit);
        }
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        let held = self.held.remove(index);
        if let Some(home) = held.home {
            state.ram.set_transit(home, page.order, false);
            state.free_frames(home, page.order);
        }
        let objects = state.split_object(held.object, None);
        let parts = held.contents.split(page.order).into_iter().zip(objects);
        let (mut pages, mut held) = (Vec::new(), Vec::new());
        for (part, ((contents, source), object)) in page.page.block(page.order).iter().zip(parts) {
            pages.push(IsolatedPage { page: part, order: Order::PAGE, source });
            held.push(Held { object, contents, home: None });
        }
        self.pages.splice(index..=index, pages);
        self.held.splice(index..index, held);
        Ok(())
    }

    fn allocate_home(&mut self, index: usize) -> Result<Frame, OutOfSystemMemory> {
        if let Some(home) = self.held[index].home {
            return Ok(home);
        }
        let order = self.pages[index].order;
        let state = self.shared.lock();
        let home = state.ram.allocate(order).ok_or(OutOfSystemMemory)?;
        state.ram.set_transit(home, order, true);
        self.held[index].home = Some(home);
        Ok(home)
    }

    fn commit(mut self: Box<Self>, placements: Vec<Placement>) -> Vec<Committed> {
        assert_eq!(placements.len(), self.pages.len(), "every page is placed somewhere");
        for (placement, (held, page)) in placements.iter().zip(self.held.iter().zip(&self.pages)) {
            match placement {
                Placement::Home => assert!(held.home.is_some(), "{page:?} has no home yet"),
                Placement::Device(block) => assert_eq!(block.order(), page.order, "{page:?}"),
                Placement::Back => {}
            }
        }
        self.finish(placements)
    }
}

impl Drop for SimIsolation {
    fn drop(&mut self) {
        if !self.over {
            self.finish(Vec::new());
        }
    }
}

impl fmt::Debug for SimIsolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimIsolation")
            .field("pages", &self.pages)
            .field("stayed", &self.stayed)
            .finish_non_exhaustive()
    }
}
