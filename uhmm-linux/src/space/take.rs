//! Taking pages out of the program's page table.

use mmu_notifier::{Event, EventKind, Owner};
use rangemap::RangeSet;
use rustix::io::Errno;
use smallvec::{SmallVec, smallvec};
use uhmm::backend::{Isolation as _, ReverseMap};
use uhmm::{Access, DeviceLocation, Order, Page, PageRange, StayReason};

use super::isolation::{Contents, ProcessIsolation};
use super::pool::{PoolBlock, aligned_blocks};
use super::state::{CHUNK, Place, State, Token, numbers, range_of};
use super::{Space, count, serve};
use crate::mutant::mutant;
use crate::sys::maps::{Kind, Vma};
use crate::sys::pagemap::Categories;
use crate::sys::userfaultfd::Progress;

/// A part of a range that may be taken, with the mapping it is of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) pages: PageRange,
    pub(super) mapping: PageRange,
}

/// Pages of a block that was to be taken, and how they came out.
pub(super) struct Run {
    pub(super) pages: PageRange,
    pub(super) fate: Fate,
}

#[derive(Clone, Copy)]
pub(super) enum Fate {
    /// They are in the block of staging.
    Moved,
    /// There are none: they are zeroes.
    Zero,
    /// They have to be made the program's own first.
    Shared,
    Stayed(StayReason),
}

/// How often the kernel may put off to move a block before it stays.
pub(super) const TRIES: u32 = 1000;

/// How often a range is taken while the program locks all its memory, again and again.
const TRIES_TO_UNLOCK: u32 = 2;

impl Space {
    /// Does what [`Backend::isolate`](uhmm::Backend::isolate) says of pages in system memory.
    pub(super) fn take_from_system(&self, range: PageRange, to: Owner) -> ProcessIsolation {
        let mut isolation = ProcessIsolation::empty(self);
        if !self.is_here() || !self.abilities.migrate {
            isolation.stay(range, StayReason::Unsupported);
            return isolation;
        }
        self.reserve_this_thread();
        for _ in 0..TRIES_TO_UNLOCK {
            let mut taken = self.take_what_moves(range, to);
            self.take_read_only(&mut taken, to);
            self.settle_unless_leading();
            if !self.may_have_met_locked_staging(taken.stayed()) || !self.unlock_staging() {
                return taken;
            }
            // The program had locked all its memory, ours too, so that what is locked could move. It
            // goes back, and from now on it stays.
        }
        isolation.stay(range, StayReason::Busy);
        isolation
    }

    /// Takes what the kernel moves to staging.
    fn take_what_moves(&self, range: PageRange, to: Owner) -> ProcessIsolation {
        let mut isolation = ProcessIsolation::empty(self);
        let candidates = self.candidates(range, &mut |pages, reason| isolation.stay(pages, reason));
        let (Some(first), Some(last)) = (candidates.first(), candidates.last()) else {
            return isolation;
        };
        let covered = PageRange::from_bounds(first.pages.first(), last.pages.last());
        let covered = covered.expect("candidates are in ascending order");
        let announced = self
            .notifiers
            .invalidate_range_start(Event::new(EventKind::Migrate, covered.va_range()));
        let mut shared = Vec::new();
        for candidate in &candidates {
            self.take_candidate(&mut isolation, *candidate, to, &mut |page| shared.push(page));
        }
        self.take_shared(&mut isolation, &candidates, &mut shared, to);
        drop(announced);
        isolation.sort();
        isolation
    }

    /// Finds the parts of `range` whose mappings allow that they are taken, and reports the others.
    pub(super) fn candidates(
        &self,
        range: PageRange,
        stay: &mut dyn FnMut(PageRange, StayReason),
    ) -> SmallVec<[Candidate; 2]> {
        let mut candidates = SmallVec::new();
        if self.is_registered_missing(&self.lock(), range) {
            // It was looked up then. What its mapping is now the kernel says when it moves.
            candidates.push(Candidate { pages: range, mapping: range });
            return candidates;
        }
        let mut next = Some(range.first());
        while let Some(page) = next.filter(|&page| page <= range.last()) {
            let rest = PageRange::from_bounds(page, range.last()).expect("checked just now");
            let vma = match self.kernel.vma(page) {
                Ok(Some(vma)) if vma.range.overlaps(rest) => vma,
                Ok(_) => {
                    stay(rest, StayReason::Hole);
                    break;
                }
                Err(_) => {
                    stay(rest, StayReason::Busy);
                    break;
                }
            };
            let pages = vma.range.intersection(rest).expect("they overlap");
            if page < pages.first() {
                let before = Page::new(pages.first().number() - 1);
                let hole = before.and_then(|last| PageRange::from_bounds(page, last));
                stay(hole.expect("there is a page before"), StayReason::Hole);
            }
            match movable(&vma) {
                Ok(()) => candidates.push(Candidate { pages, mapping: vma.range }),
                Err(reason) => stay(pages, reason),
            }
            next = pages.last().checked_add(1);
        }
        candidates
    }

    /// Takes what can be taken of a candidate. What is shared is only reported.
    fn take_candidate(
        &self,
        isolation: &mut ProcessIsolation,
        candidate: Candidate,
        to: Owner,
        shared: &mut dyn FnMut(Page),
    ) {
        let mut registered = false;
        // A chunk at a time: whoever faults meanwhile gets the lock in between.
        for pages in candidate.pages.blocks(CHUNK) {
            let mut state = self.lock();
            let state = &mut *state;
            if state.forking > 0 || state.over {
                isolation.stay(pages, StayReason::Busy);
                continue;
            }
            for part in self.allowed(state, pages, &mut |pages, why| isolation.stay(pages, why)) {
                if !self.is_registered_missing(state, part) {
                    // The first time for all of it, which is one call.
                    let wanted = if registered { part } else { candidate.pages };
                    registered = true;
                    let result = self.register_missing(state, wanted, candidate.mapping);
                    if let Err(reason) = result {
                        isolation.stay(part, reason);
                        continue;
                    }
                }
                self.take_gaps(state, isolation, part, to, shared);
            }
        }
    }

    /// Returns the parts of `pages` that are not reserved, and are managed and not in doubt.
    pub(super) fn allowed(
        &self,
        state: &mut State,
        pages: PageRange,
        stay: &mut dyn FnMut(PageRange, StayReason),
    ) -> SmallVec<[PageRange; 2]> {
        self.clear_doubts(state, pages);
        let whole = numbers(pages);
        let cleared = |managed: &RangeSet<u64>| {
            managed.get(&whole.start).is_some_and(|part| part.end >= whole.end)
        };
        let spared = state.reserved.overlaps(&whole) || state.doubtful.overlaps(&whole);
        if !spared && state.managed.as_ref().is_none_or(cleared) {
            return smallvec![pages];
        }
        let mut allowed: SmallVec<[std::ops::Range<u64>; 2]> = SmallVec::new();
        match &state.managed {
            None => allowed.push(whole.clone()),
            Some(managed) => {
                for gap in managed.gaps(&whole) {
                    stay(range_of(gap), StayReason::Reserved);
                }
                let cut = |part: &std::ops::Range<u64>| {
                    part.start.max(whole.start)..part.end.min(whole.end)
                };
                allowed.extend(managed.overlapping(&whole).map(cut));
            }
        }
        let mut result = SmallVec::new();
        for part in allowed {
            for reserved in state.reserved.overlapping(&part) {
                let cut = reserved.start.max(part.start)..reserved.end.min(part.end);
                stay(range_of(cut), StayReason::Reserved);
            }
            for free in state.reserved.gaps(&part) {
                for doubtful in state.doubtful.overlapping(&free) {
                    let cut = doubtful.start.max(free.start)..doubtful.end.min(free.end);
                    stay(range_of(cut), StayReason::Changed);
                }
                result.extend(state.doubtful.gaps(&free).map(range_of));
            }
        }
        result
    }

    /// Forgets doubts about pages that are gone by now, as the program wanted.
    pub(super) fn clear_doubts(&self, state: &mut State, pages: PageRange) {
        let whole = numbers(pages);
        if !state.doubtful.overlaps(&whole) {
            return;
        }
        let mut present = Vec::new();
        let there = Categories::PRESENT | Categories::SWAPPED;
        if self.kernel.scan(pages, there, &mut present).is_ok() {
            let doubts: Vec<_> = state.doubtful.overlapping(&whole).cloned().collect();
            state.doubtful.remove(whole.clone());
            for (run, _) in present {
                let run = numbers(run);
                for doubt in &doubts {
                    let still = doubt.start.max(run.start)..doubt.end.min(run.end);
                    if !still.is_empty() {
                        state.doubtful.insert(still);
                    }
                }
            }
            // What lies beyond `pages` was not looked at.
            for doubt in doubts {
                for rest in [doubt.start..whole.start, whole.end..doubt.end] {
                    if !rest.is_empty() {
                        state.doubtful.insert(rest);
                    }
                }
            }
        }
    }

    /// Takes what is in the page table of `part`, which is registered and lies in one chunk, and
    /// reports what is out already.
    fn take_gaps(
        &self,
        state: &mut State,
        isolation: &mut ProcessIsolation,
        part: PageRange,
        to: Owner,
        shared: &mut dyn FnMut(Page),
    ) {
        report_out(state, isolation, part, to);
        for gap in state.gaps(part) {
            for (first, order) in aligned_blocks(gap) {
                self.take_block(state, isolation, first, order, shared);
            }
        }
    }

    /// Takes a block that has nothing out.
    ///
    /// It is entered as in transit before anything of it moves, so that an event which is read in
    /// the middle finds what has moved already.
    fn take_block(
        &self,
        state: &mut State,
        isolation: &mut ProcessIsolation,
        first: Page,
        order: Order,
        shared: &mut dyn FnMut(Page),
    ) {
        let pages = first.block(order);
        let Some(staged) = self.allocate_staging(order) else {
            isolation.stay(pages, StayReason::OutOfSystemMemory);
            return;
        };
        let token = isolation.enter_transit(state, first, order);
        let mut runs: SmallVec<[Run; 1]> = SmallVec::new();
        let undisturbed = self.move_out(state, token, pages, &staged, &mut runs);
        if undisturbed && matches!(runs[..], [Run { fate: Fate::Moved, .. }]) {
            isolation.enter(token, first, order, Contents::Staged(staged));
            return;
        }
        for run in &runs {
            match run.fate {
                Fate::Stayed(reason) => isolation.stay(run.pages, reason),
                Fate::Shared => run.pages.iter().for_each(&mut *shared),
                Fate::Moved | Fate::Zero => {}
            }
        }
        self.take_runs(state, isolation, token, pages, staged, &runs);
    }

    /// Takes what of a block came out, in as many pieces as that takes.
    pub(super) fn take_runs(
        &self,
        state: &mut State,
        isolation: &mut ProcessIsolation,
        token: Token,
        pages: PageRange,
        staged: PoolBlock,
        runs: &[Run],
    ) {
        let parts = state.of_token(token);
        for &(first, ..) in &parts {
            drop(state.remove(first));
        }
        let mut never_left: RangeSet<u64> =
            parts.iter().map(|&(now, order, _)| numbers(now.block(order))).collect();
        // Each piece by its first page now, its first page before, and its order.
        let mut moved: Vec<(Page, Page, Order)> = Vec::new();
        let mut zero: Vec<(Page, Order)> = Vec::new();
        for (now, order, offset) in parts {
            let before = pages.first().checked_add(offset).expect("within the block");
            let part = PageRange::from_pages(before, order.pages()).expect("within the block");
            let shift = |page: Page| {
                now.checked_add(page.number() - before.number()).expect("within the mapping")
            };
            for run in runs {
                let Some(run_part) = run.pages.intersection(part) else { continue };
                let same_place = now == before;
                let pieces = aligned_blocks(run_part).flat_map(|(page, order)| {
                    let step = if same_place { order } else { Order::PAGE };
                    page.block(order).blocks(step).map(move |piece| (piece.first(), step))
                });
                match run.fate {
                    Fate::Moved => {
                        moved.extend(pieces.map(|(page, order)| (shift(page), page, order)))
                    }
                    Fate::Zero => zero.extend(pieces.map(|(page, order)| (shift(page), order))),
                    Fate::Stayed(_) | Fate::Shared => {}
                }
            }
        }
        let left = moved.iter().map(|&(now, _, order)| (now, order)).chain(zero.iter().copied());
        left.for_each(|(first, order)| never_left.remove(numbers(first.block(order))));
        state.children.iter_mut().for_each(|child| child.has(&never_left));
        moved.sort_by_key(|&(_, before, _)| before);
        let at = |page: Page| {
            let offset = page.number() - pages.first().number();
            staged.first().checked_add(offset).expect("within the block")
        };
        // What has moved and is not mapped any more is dropped with the rest of the block.
        let cut: Vec<_> = moved.iter().map(|&(_, before, order)| (at(before), order)).collect();
        let blocks = staged.cut(&cut);
        for ((page, _, order), block) in moved.into_iter().zip(blocks) {
            isolation.take(state, page, order, Contents::Staged(block));
        }
        for (page, order) in zero {
            isolation.take(state, page, order, Contents::Zero);
        }
    }

    /// Moves pages to staging, as far as the kernel moves them, and says what became of each. Tells
    /// whether they are all where they were.
    fn move_out(
        &self,
        state: &mut State,
        token: Token,
        pages: PageRange,
        staged: &PoolBlock,
        runs: &mut SmallVec<[Run; 1]>,
    ) -> bool {
        let mut undisturbed = true;
        let mut tries = 0;
        let mut next = Some(pages.first());
        // How much is in one mapping, where the block is found to be in several.
        let mut span = None;
        while let Some(rest) = next.and_then(|page| PageRange::from_bounds(page, pages.last())) {
            let rest = match span {
                Some(span) if span < rest.pages() => {
                    PageRange::from_pages(rest.first(), span).expect("a mapping has a page")
                }
                _ => rest,
            };
            let offset = rest.first().number() - pages.first().number();
            let target = staged.first().checked_add(offset).expect("within the block");
            let progress = match self.confirm(state, rest) {
                Ok(()) => self.kernel.move_out(rest, target),
                result => Progress { pages: 0, result },
            };
            if progress.pages > 0 {
                let moved = PageRange::from_pages(rest.first(), progress.pages);
                let filled = PageRange::from_pages(target, progress.pages);
                runs.push(Run { pages: moved.expect("some were moved"), fate: Fate::Moved });
                self.staging.fill(filled.expect("some were moved"));
                next = rest.first().checked_add(progress.pages);
                continue;
            }
            let page = PageRange::from(rest.first());
            let mut absent = page;
            let result = match progress.result {
                // The kernel says the same where the mapping has just gone, and no event has said so.
                Err(Errno::NOENT) => {
                    absent = self.absent(rest);
                    self.confirm(state, absent).and(Err(Errno::NOENT))
                }
                result => result,
            };
            let (done, fate) = match result {
                Ok(()) => break,
                Err(Errno::AGAIN) => {
                    count(&self.counters.retries, 1);
                    tries += 1;
                    let epoch = state.epoch;
                    self.drain(state);
                    undisturbed &= state.epoch == epoch || is_whole(state, token, pages);
                    let certain = !state.doubtful.overlaps(&numbers(rest));
                    if mutant!("tried_again_without_a_look") {
                        crate::mutant::dawdle();
                        continue;
                    }
                    if undisturbed
                        && certain
                        && tries < TRIES
                        && self.is_registered_missing(state, rest)
                    {
                        std::thread::yield_now();
                        continue;
                    }
                    // What is mapped here now was not what was to be taken; or is busy.
                    (rest, Fate::Stayed(StayReason::Changed))
                }
                Err(Errno::NOENT) => (absent, Fate::Zero),
                Err(Errno::BUSY) => (page, Fate::Shared),
                Err(Errno::INVAL) => {
                    let mapped = self.pages_in_one_mapping(rest);
                    if mapped < rest.pages() {
                        span = Some(mapped);
                        continue;
                    }
                    span = None;
                    (rest, Fate::Stayed(self.explain_refusal(rest.first())))
                }
                Err(Errno::NOMEM) => (page, Fate::Stayed(StayReason::OutOfSystemMemory)),
                Err(_) => (page, Fate::Stayed(self.explain_failure(rest.first()))),
            };
            runs.push(Run { pages: done, fate });
            next = done.last().checked_add(1);
        }
        undisturbed
    }

    /// Says why the kernel could not move a page that it may move.
    pub(super) fn explain_failure(&self, page: Page) -> StayReason {
        let mut found = Vec::new();
        match self.kernel.scan(page.into(), Categories::GUARD, &mut found) {
            Ok(()) if !found.is_empty() => StayReason::Denied,
            _ => StayReason::Changed,
        }
    }

    /// Says why the kernel refuses to move a page of any kind.
    pub(super) fn explain_refusal(&self, page: Page) -> StayReason {
        match self.kernel.vma(page) {
            Ok(Some(vma)) if vma.range.contains(page) => match movable(&vma) {
                Err(reason) => reason,
                // Of all that the kernel refuses this way, two are not told by the mapping: the other
                // is a protection key.
                Ok(()) if self.kernel.is_locked(page) => StayReason::Locked,
                Ok(()) => StayReason::Unsupported,
            },
            Ok(_) => StayReason::Hole,
            Err(_) => StayReason::Busy,
        }
    }

    /// Returns the pages from the first of `rest` on that are not there. The first is not.
    pub(super) fn absent(&self, rest: PageRange) -> PageRange {
        if rest.pages() == 1 {
            return rest;
        }
        let mut present = Vec::new();
        let there = Categories::PRESENT | Categories::SWAPPED | Categories::GUARD;
        let alone = PageRange::from(rest.first());
        if self.kernel.scan(rest, there, &mut present).is_err() {
            return alone;
        }
        let Some(&(found, _)) = present.first() else { return rest };
        let before = found.first().number().checked_sub(1).and_then(Page::new);
        before.and_then(|last| PageRange::from_bounds(rest.first(), last)).unwrap_or(alone)
    }

    /// Takes pages that others share, by giving the program pages of its own first. What is still not
    /// the program's own then is pinned.
    fn take_shared(
        &self,
        isolation: &mut ProcessIsolation,
        candidates: &[Candidate],
        shared: &mut [Page],
        to: Owner,
    ) {
        shared.sort();
        for run in runs_of(shared) {
            let free = self.lock().gaps(run)[..] == [run];
            let thread = mmu_notifier::thread_number();
            self.lock().populating.insert(thread, run);
            let own = free && self.kernel.populate(run, true).is_ok();
            self.lock().populating.remove(&thread);
            let mapping = candidates.iter().find(|candidate| candidate.pages.covers(run));
            match (own, mapping) {
                (true, Some(&Candidate { mapping, .. })) => {
                    let candidate = Candidate { pages: run, mapping };
                    let mut pinned = Vec::new();
                    self.take_candidate(isolation, candidate, to, &mut |page| pinned.push(page));
                    pinned.iter().for_each(|&page| isolation.stay(page.into(), StayReason::Pinned));
                }
                _ => isolation.stay(run, StayReason::Changed),
            }
        }
    }

    /// Does what [`Backend::isolate`](uhmm::Backend::isolate) says of pages on the device of `owner`,
    /// or on those of all others.
    pub(super) fn take_from_devices(
        &self,
        range: PageRange,
        owner: Owner,
        others: bool,
    ) -> ProcessIsolation {
        let mut isolation = ProcessIsolation::empty(self);
        if !self.is_here() {
            isolation.stay(range, StayReason::Elsewhere);
            return isolation;
        }
        self.reserve_this_thread();
        // The leader takes what it need not wait for: a policy may want more than it has looked at.
        let leading = serve::is_leading();
        let wanted = |place: &Place| match place {
            Place::Device(block) => {
                let given = !leading
                    || block.pagemap().memory().is_prompt()
                    || block.in_place(&*self.memory).is_some();
                given && (block.location().owner == owner) != others
            }
            _ => false,
        };
        let covered = {
            let state = self.lock();
            let mut found = state.overlapping(range).filter(|(_, extent)| wanted(&extent.place));
            found.next().map(|(first, extent)| {
                let block = first.block(extent.order);
                found.fold(block, |so_far, (first, extent)| {
                    let last = first.block(extent.order).last();
                    PageRange::from_bounds(so_far.first(), last).expect("in ascending order")
                })
            })
        };
        let Some(covered) = covered.and_then(|covered| covered.intersection(range)) else {
            isolation.stay(range, StayReason::Elsewhere);
            return isolation;
        };
        let announced = self
            .notifiers
            .invalidate_range_start(Event::new(EventKind::Migrate, covered.va_range()));
        let mut next = Some(range.first());
        {
            let mut state = self.lock();
            let found = |state: &State| -> SmallVec<[(Page, Order, bool, bool); 1]> {
                let sight = |(first, extent): (Page, &super::state::Extent)| {
                    let transit = matches!(extent.place, Place::Transit { .. } | Place::Parked(_));
                    (first, extent.order, wanted(&extent.place), transit)
                };
                state.overlapping(range).map(sight).collect()
            };
            let mut there = found(&state);
            let cut = |&(first, order, wanted, _): &(Page, Order, bool, bool)| {
                wanted && !range.covers(first.block(order))
            };
            if there.iter().any(cut) {
                state.carve(range);
                there = found(&state);
            }
            for (first, order, wanted, transit) in there {
                let pages = first.block(order).intersection(range).expect("they overlap");
                stay_before(&mut isolation, next, pages.first());
                next = pages.last().checked_add(1);
                match (wanted, transit) {
                    // What arrived since was not announced.
                    (true, _) if covered.covers(pages) => {
                        isolation.take_from_device(&mut state, first, order);
                    }
                    (true, _) => isolation.stay(pages, StayReason::InTransit),
                    (false, true) => isolation.stay(pages, StayReason::InTransit),
                    (false, false) => isolation.stay(pages, StayReason::Elsewhere),
                }
            }
        }
        if let Some(rest) = next.and_then(|from| PageRange::from_bounds(from, range.last())) {
            isolation.stay(rest, StayReason::Elsewhere);
        }
        drop(announced);
        isolation
    }
}

/// Notes why what of `part` is out already is not taken.
pub(super) fn report_out(
    state: &State,
    isolation: &mut ProcessIsolation,
    part: PageRange,
    to: Owner,
) {
    for (first, extent) in state.overlapping(part) {
        let pages = first.block(extent.order).intersection(part).expect("they overlap");
        let reason = match &extent.place {
            Place::Transit { .. } | Place::Parked(_) => StayReason::InTransit,
            Place::Device(block) if block.location().owner == to => StayReason::AlreadyThere,
            Place::Device(_) => StayReason::Elsewhere,
            Place::Held { .. } => StayReason::Exclusive,
        };
        isolation.stay(pages, reason);
    }
}

/// Joins pages in ascending order to ranges.
fn runs_of(pages: &[Page]) -> impl Iterator<Item = PageRange> {
    let next_to = |a: &Page, b: &Page| a.checked_add(1) == Some(*b);
    pages.chunk_by(next_to).filter_map(|run| PageRange::from_bounds(*run.first()?, *run.last()?))
}

fn stay_before(isolation: &mut ProcessIsolation, from: Option<Page>, to: Page) {
    let before = to.number().checked_sub(1).and_then(Page::new);
    if let (Some(from), Some(last)) = (from, before)
        && let Some(gap) = PageRange::from_bounds(from, last)
    {
        isolation.stay(gap, StayReason::Elsewhere);
    }
}

/// Tells whether a block that is in transit is where it was, in one piece.
pub(super) fn is_whole(state: &State, token: Token, pages: PageRange) -> bool {
    matches!(state.of_token(token)[..], [(first, order, 0)] if first.block(order) == pages)
}

/// Says why pages of a mapping do not move, if they do not.
pub(super) fn movable(vma: &Vma) -> Result<(), StayReason> {
    if vma.rights() == Access::None && !vma.writable {
        return Err(StayReason::Denied);
    }
    // The kernel's own pages, and pages that it has taken out of its own sight.
    if matches!(vma.kind, Kind::Special | Kind::Secret) {
        return Err(StayReason::Unsupported);
    }
    if !vma.is_anonymous() || vma.shared {
        return Err(StayReason::FileBacked);
    }
    if !vma.writable {
        return Err(StayReason::ReadOnly);
    }
    // Staging has other rights then, and the kernel moves between equals only.
    if vma.executable || !vma.readable {
        return Err(StayReason::Unsupported);
    }
    Ok(())
}

impl ReverseMap for Space {
    fn isolate(&self, locations: &[DeviceLocation]) -> Box<dyn uhmm::backend::Isolation> {
        let mut isolation = ProcessIsolation::empty(self);
        if !self.is_here() {
            return Box::new(isolation);
        }
        self.reserve_this_thread();
        let found = |state: &State| -> Vec<(Page, Order)> {
            let locate = |&location: &DeviceLocation| {
                let first = state.locate(location)?;
                state.at(first).map(|(first, extent)| (first, extent.order))
            };
            locations.iter().filter_map(locate).collect()
        };
        // Each by itself: they may lie far apart, with much between that is none of this business.
        let mut announced: SmallVec<[_; 1]> = SmallVec::new();
        let first_look = found(&self.lock());
        for &(first, order) in &first_look {
            let event = Event::new(EventKind::Migrate, first.block(order).va_range());
            announced.push(self.notifiers.invalidate_range_start(event));
        }
        {
            let mut state = self.lock();
            for (first, order) in found(&state) {
                let there = state.at(first).is_some_and(|(_, extent)| extent.place.is_device());
                if there && first_look.contains(&(first, order)) {
                    isolation.take_from_device(&mut state, first, order);
                }
            }
        }
        drop(announced);
        isolation.sort();
        Box::new(isolation)
    }
}
