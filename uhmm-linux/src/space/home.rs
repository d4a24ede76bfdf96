//! Putting pages back into the program's page table.

use rustix::io::Errno;
use uhmm::{Order, Page, PageRange};

use super::pool::{Pool, PoolBlock, aligned_blocks};
use super::state::{Extent, IsolationId, Place, State, Token, is_in_limbo, numbers};
use super::{Space, count};
use crate::sys::pagemap::Categories;

/// How many pages a block from the buffers has at least for it to be moved and not copied. To move a
/// page out of the buffers means that the next one there needs fresh memory.
const MOVED_FROM_BUFFERS: u64 = 512;

/// What became of pages that were to be put back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Put {
    /// How many are in the page table, or have been replaced there by the program.
    pub(super) placed: u64,
    /// How many are kept in our own memory, since there was none for them.
    pub(super) parked: u64,
}

/// What became of some of them.
enum Step {
    /// So many pages from the first are there, or will never be.
    Done(u64),
    /// An event has to be read first. What is to be put where may be different then.
    Again,
    /// There is no memory for the first page.
    NoMemory,
    /// Not all of it is in a mapping that can be filled.
    Gone,
}

impl Space {
    /// Puts the block `source` where the extents of `token` are, wakes who waits there, and
    /// forgets the extents. What finds no memory is parked and stays out.
    ///
    /// `whole` says that there is one extent, as large as the block, and where.
    pub(super) fn put_home(
        &self,
        state: &mut State,
        token: Token,
        source: PoolBlock,
        whole: Option<Page>,
    ) -> Put {
        let mut put = Put::default();
        if let Some(first) = whole {
            let (placed, error) = self.put_part(state, &source, first.block(source.order()), 0);
            put.placed = placed;
            match error {
                None => {
                    let_go(state, source);
                    return put;
                }
                Some(Errno::AGAIN) => self.drain_for_retry(state),
                Some(_) => {}
            }
        }
        let mut refused: Vec<(Page, Order, u64)> = Vec::new();
        let mut at = 0;
        // Nothing but an event changes the list of parts, and what was put is not on it any more.
        while let Some((first, order, offset)) = next_part(state, token, at) {
            let (placed, error) = self.put_part(state, &source, first.block(order), offset);
            put.placed += placed;
            match error {
                None => at = offset + order.pages(),
                Some(Errno::AGAIN) => self.drain_for_retry(state),
                Some(_) => {
                    // What was put of it is gone from the list, and the rest is in smaller parts.
                    let Some(part) = next_part(state, token, offset) else { continue };
                    refused.push(part);
                    at = part.2 + part.1.pages();
                }
            }
        }
        put.parked = self.park(state, source, &refused);
        put
    }

    fn drain_for_retry(&self, state: &mut State) {
        count(&self.counters.retries, 1);
        self.drain(state);
        // Where it was no event, somebody is about to let go of a page.
        std::thread::yield_now();
    }

    /// Puts one extent back, as far as it goes: how many pages, and what stopped it.
    fn put_part(
        &self,
        state: &mut State,
        source: &PoolBlock,
        to: PageRange,
        offset: u64,
    ) -> (u64, Option<Errno>) {
        let first = source.first().checked_add(offset).expect("within the block");
        let from = PageRange::from_pages(first, to.pages()).expect("within the block");
        if !state.children.is_empty() {
            supply_children(state, source.pool_of(), from, to);
        }
        let poisoned = state.poisoned.overlaps(&numbers(to));
        // Nobody has it any more but the children, who have it now.
        let (done, error) = match is_in_limbo(to.first()) {
            true => (to.pages(), None),
            false => self.fill(source.pool_of(), from, to, poisoned),
        };
        if poisoned && done > 0 {
            state.poisoned.remove(to.first().number()..to.first().number() + done);
        }
        forget_first(state, to, done);
        (done, error)
    }

    /// Puts blocks of staging home that lie one after the other, there and here, by one call to the
    /// kernel, as far as that goes, and returns how many. Those that have not come home are as before,
    /// or in smaller parts. Each is given by its pages, and its first page in staging.
    pub(super) fn put_ahead(
        &self,
        state: &mut State,
        isolation: IsolationId,
        run: &[(PageRange, Page)],
    ) -> usize {
        let (&[(first, from), .., (last, _)], true) = (run, state.children.is_empty()) else {
            return 0;
        };
        let to = PageRange::from_bounds(first.first(), last.last()).expect("in ascending order");
        let from = PageRange::from_pages(from, to.pages()).expect("it is as long");
        let plain = !state.is_disturbed(isolation) && !state.poisoned.overlaps(&numbers(to));
        if !plain || self.staging.occupied_run(from) != (true, from.pages()) {
            return 0;
        }
        let mut done = self.kernel.move_home(from, to.first()).pages;
        if done > 0 {
            self.staging.empty(prefix(from, done));
        }
        let mut whole = 0;
        for &(block, _) in run {
            let there = done.min(block.pages());
            done -= there;
            whole += usize::from(there == block.pages());
            forget_first(state, block, there);
        }
        whole
    }

    /// Fills the holes `to` with the pages `from` of a pool. Only a copy replaces what is `poisoned`.
    fn fill(
        &self,
        pool: &Pool,
        from: PageRange,
        to: PageRange,
        poisoned: bool,
    ) -> (u64, Option<Errno>) {
        let mut done = 0;
        while done < to.pages() {
            let rest = |range: PageRange| {
                let first = range.first().checked_add(done).expect("some are left");
                PageRange::from_bounds(first, range.last()).expect("some are left")
            };
            match self.fill_some(pool, rest(from), rest(to), poisoned) {
                Step::Done(pages) => done += pages,
                Step::Again => return (done, Some(Errno::AGAIN)),
                Step::NoMemory | Step::Gone => return (done, Some(Errno::NOMEM)),
            }
        }
        (done, None)
    }

    /// Fills as many holes as one call to the kernel fills.
    fn fill_some(&self, pool: &Pool, from: PageRange, to: PageRange, poisoned: bool) -> Step {
        let (occupied, run) = pool.occupied_run(from);
        let fill = |pages: u64| {
            let [from, to] = [from, to].map(|range| prefix(range, pages));
            self.fill_run(pool, from, to, occupied, poisoned)
        };
        let step = fill(run);
        if !matches!(step, Step::Gone) {
            return step;
        }
        // The kernel fills one mapping at a time, and says the same of two as of none.
        let mapped = self.pages_in_one_mapping(prefix(to, run));
        for pages in [mapped, 1] {
            if pages < run
                && let step = fill(pages)
                && !matches!(step, Step::Gone)
            {
                return step;
            }
        }
        // The mapping is gone, or another, and no event has said so: the program has put something
        // in its place that the kernel does not tell of.
        self.skip(to.first())
    }

    fn fill_run(
        &self,
        pool: &Pool,
        from: PageRange,
        to: PageRange,
        occupied: bool,
        poisoned: bool,
    ) -> Step {
        if !occupied && !poisoned {
            let progress = self.kernel.zeropage(to);
            return self.judge(progress.pages, progress.result, to);
        }
        if !occupied {
            // There is nothing to copy from but what the kernel makes of a touch.
            return self.copy_run(self.zeroes.first().into(), prefix(to, 1));
        }
        if !poisoned && (pool.is_staging() || to.pages() >= MOVED_FROM_BUFFERS) {
            match self.move_run(pool, from, to) {
                // The mapping does not allow stores any more, or is locked, or a device has pinned
                // the page, or the mapping is gone: to copy is possible, or says so.
                Step::NoMemory | Step::Gone => {}
                step => return step,
            }
        }
        if !pool.is_staging() {
            return match self.copy_run(from, to) {
                // What to move does not take is a look at what is there.
                Step::NoMemory if !poisoned => self.move_run(pool, from, to),
                step => step,
            };
        }
        // To copy from a page that is not there would be a fault of ours, on us.
        match self.first_run(from, Categories::PRESENT | Categories::SWAPPED) {
            Ok((true, pages)) => self.copy_run(prefix(from, pages), prefix(to, pages)),
            Ok((false, pages)) => {
                pool.empty(prefix(from, pages));
                Step::Done(0)
            }
            // Where it cannot be said, it stays for now.
            Err(_) => Step::NoMemory,
        }
    }

    fn move_run(&self, pool: &Pool, from: PageRange, to: PageRange) -> Step {
        let progress = self.kernel.move_home(from, to.first());
        if progress.pages > 0 {
            pool.empty(prefix(from, progress.pages));
        }
        self.judge(progress.pages, progress.result, to)
    }

    /// Copies pages home. The kernel replaces guards by copies, as it does marks of poison, so they
    /// are looked for first: a guard stays.
    fn copy_run(&self, from: PageRange, to: PageRange) -> Step {
        match self.first_run(to, Categories::GUARD) {
            Ok((true, _)) => self.skip(to.first()),
            Ok((false, pages)) => {
                let to = prefix(to, pages);
                let progress = self.kernel.copy_home(from.first(), to);
                self.judge(progress.pages, progress.result, to)
            }
            Err(_) => Step::NoMemory,
        }
    }

    fn judge(&self, pages: u64, result: Result<(), Errno>, to: PageRange) -> Step {
        match result {
            Ok(()) => Step::Done(to.pages()),
            Err(_) if pages > 0 => Step::Done(pages),
            Err(Errno::AGAIN) => Step::Again,
            Err(Errno::EXIST) => self.skip(to.first()),
            // The kernel looks for the mapping first, and only then whether mappings change: this one
            // may be moving just now, with the pages.
            Err(Errno::NOENT | Errno::INVAL | Errno::FAULT | Errno::SRCH)
                if self.kernel.uffd().changing() =>
            {
                Step::Again
            }
            Err(Errno::NOENT | Errno::INVAL | Errno::FAULT | Errno::SRCH) => Step::Gone,
            Err(_) => Step::NoMemory,
        }
    }

    /// Returns how many pages of `range`, from the first on, are in the same mapping as the first.
    pub(super) fn pages_in_one_mapping(&self, range: PageRange) -> u64 {
        match self.kernel.vma(range.first()) {
            Ok(Some(vma)) if vma.range.contains(range.first()) => {
                vma.range.intersection(range).map_or(1, |part| part.pages())
            }
            _ => 1,
        }
    }

    /// Tells whether any of `what` is true of the first page of `range`, and of how many pages from
    /// there on it is just the same.
    fn first_run(&self, range: PageRange, what: Categories) -> Result<(bool, u64), Errno> {
        let mut found = Vec::new();
        self.kernel.scan(range, what, &mut found)?;
        let Some(&(first, _)) = found.first() else { return Ok((false, range.pages())) };
        if first.first() > range.first() {
            return Ok((false, first.first().number() - range.first().number()));
        }
        // Neighbours of other categories are a range of their own.
        let mut end = range.first().number();
        for (run, _) in found {
            if run.first().number() != end {
                break;
            }
            end = run.last().number() + 1;
        }
        Ok((true, end - range.first().number()))
    }

    /// Passes over a page in whose place the program has put something else meanwhile, such as a
    /// guard: that is what is there now.
    fn skip(&self, page: Page) -> Step {
        count(&self.counters.replaced, 1);
        self.wake(page.into());
        Step::Done(1)
    }

    /// Keeps what could not be put back, and returns how many pages that is.
    fn park(&self, state: &mut State, source: PoolBlock, refused: &[(Page, Order, u64)]) -> u64 {
        if refused.is_empty() {
            let_go(state, source);
            return 0;
        }
        let at = |offset: u64| source.first().checked_add(offset).expect("within the block");
        let mut parts = Vec::new();
        let mut places = Vec::new();
        for &(first, order, offset) in refused {
            let block = PageRange::from_pages(at(offset), order.pages()).expect("within the block");
            for (part, order) in aligned_blocks(block) {
                parts.push((part, order));
                let page = first.checked_add(part.number() - block.first().number());
                places.push((page.expect("within the extent"), order));
            }
        }
        let blocks = source.cut(&parts);
        for &(first, order, _) in refused {
            let range = first.block(order);
            state.carve(range);
            let old: Vec<Page> = state.overlapping(range).map(|(first, _)| first).collect();
            old.into_iter().for_each(|first| drop(state.remove(first)));
        }
        for ((first, order), block) in places.into_iter().zip(blocks) {
            state.insert_realigned(first, Extent::new(order, Place::Parked(block)));
        }
        let parked = refused.iter().map(|(_, order, _)| order.pages()).sum();
        count(&self.counters.parked, parked);
        parked
    }

    /// Puts a block of ours back that the extent at `first` leads to.
    pub(super) fn release_block(&self, state: &mut State, first: Page) -> Put {
        let isolation = state.begin_isolation();
        let token = state.token();
        let transit = Place::Transit { isolation, token, offset: 0 };
        let put = match state.replace(first, transit) {
            Some(Place::Held { block, .. } | Place::Parked(block)) => {
                self.put_home(state, token, block, Some(first))
            }
            Some(place) => {
                state.replace(first, place);
                Put::default()
            }
            None => Put::default(),
        };
        self.end_isolation(state, isolation);
        put
    }

    /// Ends an isolation.
    pub(super) fn end_isolation(&self, state: &mut State, isolation: IsolationId) {
        state.isolations.remove(&isolation);
        if !state.waiting.is_empty() {
            self.announce_arrivals();
        }
    }
}

/// Returns the first `pages` pages of `range`.
fn prefix(range: PageRange, pages: u64) -> PageRange {
    PageRange::from_pages(range.first(), pages).expect("at least one, and no more than there are")
}

/// Forgets that so many of the first pages of an extent are out.
fn forget_first(state: &mut State, extent: PageRange, pages: u64) {
    if pages == extent.pages() {
        drop(state.remove(extent.first()));
    } else if pages > 0 {
        let done = prefix(extent, pages);
        state.carve(done);
        let gone: Vec<Page> = state.overlapping(done).map(|(first, _)| first).collect();
        gone.into_iter().for_each(|first| drop(state.remove(first)));
    }
}

/// Returns the first part of `token`, from `at` pages on, that is still out.
fn next_part(state: &State, token: Token, at: u64) -> Option<(Page, Order, u64)> {
    state.of_token_from(token, at).next()
}

/// Frees a block that pages have come home from, once no device can use it any more.
pub(super) fn let_go(state: &mut State, block: PoolBlock) {
    if state.is_unsettled() {
        state.aftermath.doomed.push(Place::Parked(block));
    }
}

/// Gives children what they lack before their parent gets it back.
fn supply_children(state: &mut State, pool: &Pool, from: PageRange, to: PageRange) {
    for (from, to) in from.iter().zip(to.iter()) {
        let source = pool.is_occupied(from.into()).then_some(PageRange::from(from));
        for child in &mut state.children {
            child.supply(source, to.into());
        }
    }
}
