//! Pages that have been taken out, and what becomes of them.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;
use uhmm::backend::{
    CannotSplit, Committed, IsolatedPage, Isolation, OutOfSystemMemory, Placement, ReverseMap,
    Source,
};
use uhmm::{DeviceBlock, Frame, Order, Page, PageRange, StayReason, Stayed, SystemMemory};

use super::Space;
use super::home::let_go;
use super::pool::PoolBlock;
use super::state::{CHUNK, Extent, IsolationId, Place, State, Token};
use crate::mutant::mutant;
use crate::sys::pagemap::Categories;

/// The pages of one isolation.
pub(super) struct ProcessIsolation {
    space: Arc<Space>,
    id: Option<IsolationId>,
    pages: SmallVec<[IsolatedPage; 1]>,
    held: SmallVec<[Held; 1]>,
    stayed: SmallVec<[Stayed; 1]>,
}

/// What an isolation has of a page.
struct Held {
    token: Token,
    contents: Contents,
    home: Home,
}

/// The one copy of an isolated page.
pub(super) enum Contents {
    /// Zeroes that are nowhere.
    Zero,
    Staged(PoolBlock),
    Device(DeviceBlock),
}

impl Contents {
    /// Returns what is to be freed, if it is anything.
    fn into_place(self) -> Option<Place> {
        match self {
            Contents::Zero => None,
            Contents::Staged(block) => Some(Place::Parked(block)),
            Contents::Device(block) => Some(Place::Device(block)),
        }
    }
}

/// Where a page may come home to.
enum Home {
    None,
    /// To where its device has it.
    InPlace,
    Buffer(PoolBlock),
}

/// What is freed once the lock is.
type Left = SmallVec<[Contents; 2]>;

impl ProcessIsolation {
    /// Makes one that has nothing.
    pub(super) fn empty(space: &Space) -> ProcessIsolation {
        let (pages, held, stayed) = (SmallVec::new(), SmallVec::new(), SmallVec::new());
        ProcessIsolation { space: space.this(), id: None, pages, held, stayed }
    }

    /// Returns its name in the state, on behalf of the calling thread.
    pub(super) fn id(&mut self, state: &mut State) -> IsolationId {
        *self.id.get_or_insert_with(|| state.begin_isolation())
    }

    /// Notes that a part of the range stays.
    pub(super) fn stay(&mut self, pages: PageRange, reason: StayReason) {
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

    /// Forgets which parts of the range stay for `reason`, and returns them: they are looked at again.
    pub(super) fn withdraw(&mut self, reason: StayReason) -> SmallVec<[PageRange; 2]> {
        let withdrawn = self.stayed.iter().filter(|stayed| stayed.reason == reason);
        let withdrawn = withdrawn.map(|stayed| stayed.pages).collect();
        self.stayed.retain(|stayed| stayed.reason != reason);
        withdrawn
    }

    /// Takes a block that has just left the page table, or was never in it.
    pub(super) fn take(&mut self, state: &mut State, page: Page, order: Order, contents: Contents) {
        let token = self.enter_transit(state, page, order);
        self.enter(token, page, order, contents);
    }

    /// Enters a block as in transit that is still in the page table, and returns its name.
    pub(super) fn enter_transit(&mut self, state: &mut State, page: Page, order: Order) -> Token {
        let (isolation, token) = (self.id(state), state.token());
        let place = Place::Transit { isolation, token, offset: 0 };
        state.insert(page, Extent::new(order, place));
        token
    }

    /// Takes the block of a device that the extent at `first` leads to.
    pub(super) fn take_from_device(&mut self, state: &mut State, first: Page, order: Order) {
        let (isolation, token) = (self.id(state), state.token());
        let place = Place::Transit { isolation, token, offset: 0 };
        match state.replace(first, place) {
            Some(Place::Device(block)) => self.enter(token, first, order, Contents::Device(block)),
            _ => unreachable!("the caller has just seen a device's block here"),
        }
    }

    /// Takes what is in transit by this name.
    pub(super) fn enter(&mut self, token: Token, page: Page, order: Order, contents: Contents) {
        let source = match &contents {
            Contents::Zero => Source::Zero,
            Contents::Staged(block) => Source::System(block.frame()),
            Contents::Device(block) => Source::Device(block.location()),
        };
        self.pages.push(IsolatedPage { page, order, source });
        self.held.push(Held { token, contents, home: Home::None });
    }

    /// Puts pages and reasons in the order of their addresses.
    pub(super) fn sort(&mut self) {
        self.stayed.sort_by_key(|stayed| stayed.pages.first());
        if !self.pages.is_sorted_by_key(|page| page.page) {
            let mut both: Vec<_> = self.pages.drain(..).zip(self.held.drain(..)).collect();
            both.sort_by_key(|(page, _)| page.page);
            for (page, held) in both {
                self.pages.push(page);
                self.held.push(held);
            }
        }
    }

    fn finish(&mut self, placements: Vec<Placement>) -> Vec<Committed> {
        let Some(id) = self.id.take() else { return Vec::new() };
        if !self.space.is_here() {
            // A child has none of this: what was in transit when it was made is its parent's.
            self.held.drain(..).for_each(std::mem::forget);
            return Vec::new();
        }
        let space = Arc::clone(&self.space);
        let mut left = Left::new();
        let mut committed = Vec::with_capacity(self.pages.len());
        let aftermath = {
            let mut state = space.lock();
            let mut placements = placements.into_iter();
            let mut rest = std::mem::take(&mut self.held).into_iter();
            // Where they are now: whoever sleeps for one of them sleeps there.
            let wakes = !mutant!("arrivals_wake_nobody");
            let awaited: Vec<PageRange> = match wakes && state.is_awaited(id) {
                true => {
                    let parts = rest.as_slice().iter().flat_map(|held| state.of_token(held.token));
                    parts.map(|(first, order, _)| first.block(order)).collect()
                }
                false => Vec::new(),
            };
            // How many of the pages to come are home already, and how many after those go alone.
            let (mut ahead, mut alone) = (0, 0);
            for (index, &page) in self.pages.iter().enumerate() {
                if (ahead, alone) == (0, 0) {
                    let (pages, memory) = (&self.pages[index..], &*space.memory);
                    let run = run_in_place(memory, pages, rest.as_slice(), placements.as_slice());
                    ahead = space.put_ahead(&mut state, id, &run);
                    alone = run.len().max(1) - ahead;
                }
                let held = rest.next().expect("one for each page");
                let placement = placements.next().unwrap_or(Placement::Back);
                committed.push(match (held.contents, ahead) {
                    (Contents::Device(block), 1..) => {
                        ahead -= 1;
                        let_go(&mut state, space.take_over(block));
                        Committed::Placed
                    }
                    (contents, _) => {
                        alone -= 1;
                        let held = Held { contents, ..held };
                        space.place(&mut state, id, page, held, placement, &mut left)
                    }
                });
            }
            space.end_isolation(&mut state, id);
            // Some touched a page that is on a device now: they look again.
            awaited.into_iter().for_each(|block| space.wake(block));
            if state.is_unsettled() {
                let doomed = left.drain(..).filter_map(Contents::into_place);
                state.aftermath.doomed.extend(doomed);
            }
            // What nobody needs came to a place to stay, if it was in transit until now.
            space.empty_limbo(&mut state);
            if space.has_watches_to_review() && !state.is_anything_out() {
                space.call_leader();
            }
            !state.aftermath.is_empty()
        };
        drop(left);
        if aftermath {
            space.settle_unless_leading();
        }
        committed
    }
}

/// Returns the first pages, as far as they come home from where their device has them, and lie one
/// after the other, there and here: each with its place there.
fn run_in_place(
    memory: &dyn SystemMemory,
    pages: &[IsolatedPage],
    held: &[Held],
    placements: &[Placement],
) -> SmallVec<[(PageRange, Page); 1]> {
    let mut run: SmallVec<[(PageRange, Page); 1]> = SmallVec::new();
    for ((page, held), placement) in pages.iter().zip(held).zip(placements) {
        let (Home::InPlace, Placement::Home) = (&held.home, placement) else { break };
        let Contents::Device(block) = &held.contents else { break };
        let Some(from) = block.in_place(memory).and_then(|frame| Page::new(frame.0)) else { break };
        if let Some((before, at)) = run.last()
            && (before.last().checked_add(1) != Some(page.page)
                || at.checked_add(before.pages()) != Some(from))
        {
            break;
        }
        run.push((page.page.block(page.order), from));
    }
    run
}

impl Space {
    /// Puts one page where it is to be.
    fn place(
        &self,
        state: &mut State,
        isolation: IsolationId,
        page: IsolatedPage,
        held: Held,
        placement: Placement,
        left: &mut Left,
    ) -> Committed {
        let Held { token, contents, home } = held;
        let whole = match state.is_disturbed(isolation) {
            false => Some(page.page),
            true => None,
        };
        if whole.is_none() && state.of_token(token).is_empty() {
            // A block that adopted the contents ends before they do.
            if let Placement::Device(block) = placement {
                left.push(Contents::Device(block));
            }
            left.push(contents);
            if let Home::Buffer(block) = home {
                left.push(Contents::Staged(block));
            }
            return Committed::Gone;
        }
        match (placement, contents, home) {
            (Placement::Device(block), contents, _) => {
                assert_eq!(block.order(), page.order, "a page is placed in a block of its order");
                let adopted = match &contents {
                    Contents::Staged(staged) => {
                        block.in_place(&*self.memory) == Some(staged.frame())
                    }
                    _ => false,
                };
                match contents {
                    Contents::Staged(staged) if adopted => {
                        self.staging.end_adoption(staged.first());
                        staged.leak();
                    }
                    contents => {
                        if let (Contents::Staged(staged), Some(first)) = (&contents, whole)
                            && self.is_huge(staged.range())
                        {
                            state.note_huge(first);
                        }
                        left.push(contents);
                    }
                }
                self.settle_on_device(state, token, whole, block, left);
            }
            (Placement::Back, Contents::Device(block), _) => {
                self.settle_on_device(state, token, whole, block, left);
            }
            (Placement::Back, Contents::Staged(block), _) => {
                self.put_home(state, token, block, whole);
            }
            (Placement::Back, Contents::Zero, _) => self.forget(state, token, whole),
            (Placement::Home, Contents::Device(block), Home::InPlace) => {
                let staged = self.take_over(block);
                self.put_home(state, token, staged, whole);
            }
            (Placement::Home, contents, Home::Buffer(buffer)) => {
                self.put_home(state, token, buffer, whole);
                left.push(contents);
            }
            (Placement::Home, ..) => panic!("no home was allocated for {page:?}"),
        }
        Committed::Placed
    }

    /// Tells whether a block of staging is one page to the CPUs.
    fn is_huge(&self, block: PageRange) -> bool {
        let mut found = Vec::new();
        let huge = block.pages() == CHUNK.pages();
        huge && self.kernel.scan(block, Categories::HUGE, &mut found).is_ok() && !found.is_empty()
    }

    /// Returns the size that the pages of an extent had in the page table. Of a block that is in
    /// place it is asked now, so that those that move need not be asked about.
    pub(super) fn mapped_order(&self, extent: &Extent) -> Order {
        match &extent.place {
            Place::Device(block) if extent.order == CHUNK && !extent.huge => {
                let frame = block.in_place(&*self.memory).and_then(|frame| Page::new(frame.0));
                match frame {
                    Some(first) if self.is_huge(first.block(CHUNK)) => CHUNK,
                    _ => Order::PAGE,
                }
            }
            _ if extent.huge => extent.order,
            _ => Order::PAGE,
        }
    }

    /// Becomes the owner of the staging that a device has in place.
    fn take_over(&self, block: DeviceBlock) -> PoolBlock {
        let frame = block.in_place(&*self.memory).expect("the caller knows that it is");
        let (first, order) = (Page::new(frame.0).expect("frames are pages"), block.order());
        // What is being adopted is not freed with the block.
        self.staging.begin_adoption(first);
        drop(block);
        self.staging.own(first, order)
    }

    /// Makes what an isolation knows by `token` a block on a device.
    fn settle_on_device(
        &self,
        state: &mut State,
        token: Token,
        whole: Option<Page>,
        block: DeviceBlock,
        left: &mut Left,
    ) {
        if let Some(first) = whole {
            state.replace(first, Place::Device(block));
            return;
        }
        let parts = state.of_token(token);
        if let [(first, order, 0)] = parts[..]
            && order == block.order()
        {
            state.replace(first, Place::Device(block));
            return;
        }
        let mut blocks: Vec<Option<DeviceBlock>> = block.split().into_iter().map(Some).collect();
        for (first, order, offset) in parts {
            drop(state.remove(first));
            for (index, page) in (offset..).zip(first.block(order).iter()) {
                let block = blocks[index as usize].take().expect("each part is there once");
                let place = Place::Device(block);
                state.insert(page, Extent::new(Order::PAGE, place));
            }
        }
        left.extend(blocks.into_iter().flatten().map(Contents::Device));
    }

    /// Forgets what an isolation knows by `token`: the pages are untouched again.
    fn forget(&self, state: &mut State, token: Token, whole: Option<Page>) {
        let firsts: SmallVec<[Page; 1]> = match whole {
            Some(first) => smallvec::smallvec![first],
            None => state.of_token(token).into_iter().map(|(first, ..)| first).collect(),
        };
        for first in firsts {
            let Some(extent) = state.remove(first) else { continue };
            for child in &mut state.children {
                child.supply(None, first.block(extent.order));
            }
        }
    }
}

impl Isolation for ProcessIsolation {
    fn memory(&self) -> Arc<dyn SystemMemory> {
        Arc::clone(&self.space.memory) as Arc<dyn SystemMemory>
    }

    fn reverse_map(&self) -> Arc<dyn ReverseMap> {
        Arc::clone(&self.space) as Arc<dyn ReverseMap>
    }

    fn pages(&self) -> &[IsolatedPage] {
        &self.pages
    }

    fn block(&self, index: usize) -> Option<&DeviceBlock> {
        match &self.held[index].contents {
            Contents::Device(block) => Some(block),
            Contents::Zero | Contents::Staged(_) => None,
        }
    }

    fn stayed(&self) -> &[Stayed] {
        &self.stayed
    }

    fn split(&mut self, index: usize) -> Result<(), CannotSplit> {
        let page = self.pages[index];
        if page.order == Order::PAGE {
            return Err(CannotSplit);
        }
        let space = Arc::clone(&self.space);
        let mut state = space.lock();
        let isolation = self.id(&mut state);
        let held = self.held.remove(index);
        let singles = || page.page.block(page.order).iter().map(|page| (page, Order::PAGE));
        let tokens: Vec<Token> = singles().map(|_| state.token()).collect();
        for (first, order, offset) in state.of_token(held.token) {
            drop(state.remove(first));
            for (index, page) in (offset..).zip(first.block(order).iter()) {
                let token = tokens[index as usize];
                let place = Place::Transit { isolation, token, offset: 0 };
                state.insert(page, Extent::new(Order::PAGE, place));
            }
        }
        drop(state);
        let contents: Vec<Contents> = match held.contents {
            Contents::Zero => singles().map(|_| Contents::Zero).collect(),
            Contents::Staged(block) => {
                let first = block.first();
                let parts: Vec<_> =
                    first.block(page.order).iter().map(|page| (page, Order::PAGE)).collect();
                block.cut(&parts).into_iter().map(Contents::Staged).collect()
            }
            Contents::Device(block) => block.split().into_iter().map(Contents::Device).collect(),
        };
        let (mut pages, mut parts) = (Vec::new(), Vec::new());
        for (((page, order), token), contents) in singles().zip(tokens).zip(contents) {
            let source = match &contents {
                Contents::Zero => Source::Zero,
                Contents::Staged(block) => Source::System(block.frame()),
                Contents::Device(block) => Source::Device(block.location()),
            };
            pages.push(IsolatedPage { page, order, source });
            parts.push(Held { token, contents, home: Home::None });
        }
        self.pages.remove(index);
        self.pages.insert_many(index, pages);
        self.held.insert_many(index, parts);
        Ok(())
    }

    fn allocate_home(&mut self, index: usize) -> Result<Frame, OutOfSystemMemory> {
        let held = &mut self.held[index];
        if let Contents::Device(block) = &held.contents
            && let Some(frame) = block.in_place(&*self.space.memory)
        {
            held.home = Home::InPlace;
            return Ok(frame);
        }
        if let Home::Buffer(block) = &held.home {
            return Ok(block.frame());
        }
        let buffer = self.space.allocate_buffer(self.pages[index].order)?;
        let frame = buffer.frame();
        held.home = Home::Buffer(buffer);
        Ok(frame)
    }

    fn commit(mut self: Box<Self>, placements: Vec<Placement>) -> Vec<Committed> {
        assert_eq!(placements.len(), self.pages.len(), "every page is placed somewhere");
        self.finish(placements)
    }
}

impl Drop for ProcessIsolation {
    fn drop(&mut self) {
        self.finish(Vec::new());
    }
}

impl fmt::Debug for ProcessIsolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessIsolation")
            .field("pages", &self.pages)
            .field("stayed", &self.stayed)
            .finish_non_exhaustive()
    }
}
