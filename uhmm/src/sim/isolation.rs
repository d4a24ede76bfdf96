//! Isolations: pages taken out of all page tables, and what becomes of them.
//!
//! An isolation owns the contents of its pages: the frames or device blocks that they left, and the
//! frames that they may come home to. The objects stay in the machine, with hidden entries and a
//! location that says which isolation has them, so they can be unmapped, moved and shared meanwhile
//! by whoever holds the machine's lock. The commit, or the drop, gives each object its contents
//! back, at one place, in one step, or frees them where nobody refers to the object any more.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use mmu_notifier::{EventKind, thread_number};

use super::fault::Space;
use super::object::{IsolationId, Location, ObjectId, PageObject};
use super::page_table::{Announced, Concern, Entry, Sight, Target};
use super::placement::{Contents, Held, Home, place};
use super::state::{Found, IsolationState, Shared, State};
use super::vma::{Backing, Vma, huge_block};
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
        // The large pages that may not be split. Each is asked about once, so that the answer holds
        // from finding to taking.
        let refused = RefCell::new(BTreeMap::new());
        let may_split = |&id: &ObjectId| {
            let mut refused = refused.borrow_mut();
            !*refused.entry(id).or_insert_with(|| self.shared.injector.fails("split"))
        };
        let find = |state: &State| {
            // Large pages that would be isolated in part are split. Where that fails they stay.
            let mut straddling = state.straddling(self.id, range);
            straddling.retain(|&id| state.selects(state.object(id), select).is_ok());
            if let Some(id) = straddling.into_iter().find(may_split) {
                return Found::Split(id);
            }
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
            isolation.enter_frames(state);
        });
        isolation
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
        let Some((first, entry)) = self.entry(space, page) else {
            // The same holds for all of the mapping up to the next entry.
            let untaken = |reason| Piece {
                pages: self.untouched(space, vma, rest),
                verdict: Verdict::Stay(select.unless_here(reason)),
            };
            if vma.rights == Access::None {
                return untaken(StayReason::Denied);
            }
            if vma.backing != Backing::Anonymous {
                return untaken(StayReason::FileBacked);
            }
            if !matches!(select, Select::System { .. }) {
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
        if vma.rights == Access::None && matches!(select, Select::System { .. }) {
            return stay(StayReason::Denied);
        }
        let Target::Object { id, .. } = entry.target else {
            return match select {
                Select::System { .. } => Piece { pages, verdict: Verdict::TakeZero },
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

    /// Returns the part of `vma` from the start of `rest` on, which is untouched, up to the next
    /// entry.
    fn untouched(&self, space: SpaceId, vma: &Vma, rest: PageRange) -> PageRange {
        let rest = vma.range.intersection(rest).expect("the mapping holds the first page");
        let next = self.space(space).and_then(|state| state.table.overlapping(rest).next());
        match next {
            Some((next, _)) => {
                let pages = next.number() - rest.first().number();
                PageRange::from_pages(rest.first(), pages).expect("the first page has no entry")
            }
            None => rest,
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
            Select::System { .. } if !object.is_anonymous() => Err(StayReason::FileBacked),
            Select::System { to } => match &object.location {
                Location::System(_) if self.is_pinned(object) => Err(StayReason::Pinned),
                Location::System(_) => Ok(()),
                Location::Transit(_) => Err(StayReason::InTransit),
                Location::Swap(_) => Err(StayReason::SwappedOut),
                Location::Device(block) if block.location().owner == to => {
                    Err(StayReason::AlreadyThere)
                }
                // Whoever moves pages to a device brings those of other devices home first.
                Location::Device(_) => Err(StayReason::Elsewhere),
            },
        }
    }
}

impl Select {
    /// Returns why a page stays that is on no device: for whoever looks for pages on devices it is
    /// simply elsewhere.
    fn unless_here(self, reason: StayReason) -> StayReason {
        match self {
            Select::System { .. } => reason,
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
            isolation.enter_frames(state);
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
            let began = IsolationState { thread: thread_number(), frames: BTreeSet::new() };
            state.isolations.insert(id, began);
            id
        };
        let (pages, held, stayed) = (Vec::new(), Vec::new(), Vec::new());
        SimIsolation { shared, id, pages, held, stayed, over: false }
    }

    /// Tells the machine which frames this isolation has, for its [check](State::check).
    fn enter_frames(&self, state: &mut State) {
        let of_each = self.held.iter().zip(&self.pages).flat_map(|(held, page)| {
            let left = match held.contents {
                Contents::System(frame) => Some(frame),
                Contents::Zero(_) | Contents::Device(_) => None,
            };
            let firsts = left.into_iter().chain(held.new_home());
            firsts.flat_map(|Frame(first)| first..first + page.order.pages())
        });
        let frames = of_each.collect();
        state.isolations.get_mut(&self.id).expect("it is under way").frames = frames;
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
        let had_entry = state.entry(space, page).is_some();
        if had_entry {
            entry.flags = state.table(space).take(page, announced).flags;
        }
        state.fill(space, page, entry);
        self.pages.push(IsolatedPage { page, order, source: Source::Zero });
        self.held.push(Held { object: id, contents: Contents::Zero(had_entry), home: None });
    }

    fn finish(&mut self, placements: Vec<Placement>) -> Vec<Committed> {
        self.over = true;
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        let pages = std::mem::take(&mut self.pages);
        let held = std::mem::take(&mut self.held);
        let mut placements = placements.into_iter();
        let mut committed = Vec::with_capacity(pages.len());
        let memory = &*shared.copy_engines;
        for (page, held) in pages.iter().zip(held) {
            let placement = placements.next().unwrap_or(Placement::Back);
            committed.push(place(&mut state, memory, page.order, held, placement));
        }
        state.isolations.remove(&self.id);
        drop(state);
        shared.wake();
        committed
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
        if let Some(home) = held.new_home() {
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
        self.enter_frames(&mut state);
        Ok(())
    }

    fn allocate_home(&mut self, index: usize) -> Result<Frame, OutOfSystemMemory> {
        if let Some(Home::New(frame) | Home::InPlace(frame)) = self.held[index].home {
            return Ok(frame);
        }
        let block = self.block(index);
        if let Some(frame) = block.and_then(|block| block.in_place(&*self.shared.copy_engines)) {
            self.held[index].home = Some(Home::InPlace(frame));
            return Ok(frame);
        }
        let order = self.pages[index].order;
        let mut state = self.shared.lock();
        let home = state.ram.allocate(order).ok_or(OutOfSystemMemory)?;
        state.ram.set_transit(home, order, true);
        let entered = state.isolations.get_mut(&self.id).expect("it is under way");
        entered.frames.extend(home.0..home.0 + order.pages());
        self.held[index].home = Some(Home::New(home));
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
