//! Which ranges are registered with the userfaultfd.
//!
//! Where pages are out their chunk of 2 MiB is registered for missing pages, as far as its mapping
//! goes; where a device has pages mapped, the range is watched, which is to be registered for write
//! protection without ever being write-protected: that costs the program nothing but makes the
//! kernel tell of `munmap`, `mremap` and `madvise`. When the mirrors have ended that this was for,
//! it is given up ([`Space::unwatch`]). A chunk that has become empty is given up when
//! there is nothing else to do, or at the next touch of a page in it that is not there.
//!
//! Every range that is registered is a mapping of its own to the kernel, which has a limit, so
//! there is one here: beyond it pages stay.

use std::ops::Range;
use std::sync::atomic::Ordering;

use rangemap::RangeSet;
use rustix::io::Errno;
use uhmm::backend::OutOfSystemMemory;
use uhmm::{Order, Page, PageRange, StayReason, Stayed};

use super::kernel::Kernel;
use super::pool::PoolBlock;
use super::state::{CHUNK, Registered, State, chunk_of, chunk_range, numbers, range_of};
use super::{Space, lock};
use crate::mutant::mutant;
use crate::sys::advise;
use crate::sys::allocator;
use crate::sys::region::{Region, RegionOptions};
use crate::sys::userfaultfd::Modes;

impl Space {
    /// Registers the chunks around `piece`, as far as they lie within `mapping`, for missing pages.
    pub(super) fn register_missing(
        &self,
        state: &mut State,
        piece: PageRange,
        mapping: PageRange,
    ) -> Result<(), StayReason> {
        let first = chunk_range(chunk_of(piece.first())).first().max(mapping.first());
        let last = chunk_range(chunk_of(piece.last())).last().min(mapping.last());
        let range = PageRange::from_bounds(first, last).ok_or(StayReason::Changed)?;
        let same = || {
            let vma = self.kernel.vma(range.first());
            matches!(vma, Ok(Some(vma)) if vma.range.covers(range) && vma.is_anonymous())
        };
        self.register(state, range, Registered::Missing).map_err(|error| match error {
            Errno::BUSY => StayReason::Handled,
            Errno::NOMEM => StayReason::Busy,
            Errno::PERM => StayReason::Unsupported,
            // Memory of a kind that cannot be registered, such as what the kernel may drop.
            Errno::INVAL if same() => StayReason::Unsupported,
            _ => StayReason::Changed,
        })
    }

    /// Makes the kernel tell of changes to `range`, part of one mapping.
    pub(super) fn watch(&self, state: &mut State, range: PageRange) -> Result<(), Errno> {
        self.register(state, range, Registered::Watched)?;
        self.note_watched(state, range);
        Ok(())
    }

    /// Notes that devices are to be told of changes to `range`, which is registered.
    pub(super) fn note_watched(&self, state: &mut State, range: PageRange) {
        let numbers = numbers(range);
        if state.watched.gaps(&numbers).next().is_some() {
            state.watched.insert(numbers.clone());
            if self.notifiers.live() == 0 {
                // Nobody is there whose end would be told of.
                self.review_watches();
            }
        }
        if !state.unwatching.is_empty() {
            state.unwatching.remove(whole_chunks(&numbers));
        }
    }

    /// Has the servers find out, before long, what nobody has to be told of any more. It takes no
    /// lock and does not wait.
    pub(super) fn review_watches(&self) {
        // Release: partner of the swap in `unwatch`, which finds ended what had ended by now.
        self.watches_in_doubt.store(true, Ordering::Release);
        self.call_leader();
    }

    /// Tells whether there may be watches to give up.
    pub(super) fn has_watches_to_review(&self) -> bool {
        // Acquire: as in `unwatch`.
        self.watches_in_doubt.load(Ordering::Acquire)
    }

    /// Gives up what is watched in chunks that no subscription shares a page with, so that they are
    /// mappings like any other again, and the program may register them with a userfaultfd of its
    /// own.
    ///
    /// Who subscribes meanwhile is not forgotten. What is to be given up is marked first, and only
    /// then the subscriptions are looked at, with no lock held. Whoever is not found there
    /// subscribes later, and has to [watch](Space::note_watched) what it is told of, which takes
    /// the mark away.
    ///
    /// As with all that is given up, nothing may be out: it could be moved here.
    pub(super) fn unwatch(&self) {
        let _turn = lock(&self.unwatching);
        // Acquire: partner of the store in `review_watches`.
        if !self.watches_in_doubt.swap(false, Ordering::AcqRel) {
            return;
        }
        let marked = {
            let mut state = self.lock();
            state.unwatching = state.watched.iter().map(whole_chunks).collect();
            state.unwatching.clone()
        };
        let idle: RangeSet<u64> = marked.iter().flat_map(|part| self.unsubscribed(part)).collect();
        let mut state = self.lock();
        let state = &mut *state;
        // What moves meanwhile would bring its registration here before we know.
        self.drain(state);
        let marked = std::mem::take(&mut state.unwatching);
        if state.is_anything_out() {
            self.watches_in_doubt.store(true, Ordering::Release);
            return;
        }
        let given_up: Vec<_> = idle.intersection(&marked).collect();
        given_up.iter().for_each(|part| self.give_up_watch(state, part));
        if self.kernel.uffd().changing() {
            // Something may have been moved to where this was.
            self.drain(state);
            given_up.iter().for_each(|part| self.register_again(state, part));
        }
        self.disarm(state);
    }

    /// Returns those of the chunks `part` that no subscription shares a page with.
    fn unsubscribed(&self, part: &Range<u64>) -> RangeSet<u64> {
        let mut idle = RangeSet::from_iter([part.clone()]);
        for range in self.notifiers.subscribed(range_of(part.clone()).va_range()) {
            let [first, last] = [range.start(), range.last()].map(Page::containing);
            idle.remove(whole_chunks(&(first.number()..last.number() + 1)));
        }
        idle
    }

    /// Ends the watch of the chunks `part`. What has missing pages of ours besides stays registered
    /// for those.
    fn give_up_watch(&self, state: &mut State, part: &Range<u64>) {
        let cut = |piece: &Range<u64>| piece.start.max(part.start)..piece.end.min(part.end);
        let pieces = state.registered.overlapping(part.clone());
        let watched = pieces.filter(|&(_, &how)| how == Registered::Watched);
        let watched: Vec<_> = watched.map(|(piece, _)| cut(piece)).collect();
        state.watched.remove(part.clone());
        for piece in watched {
            // Where this fails the kernel goes on to tell of changes, to nobody's harm.
            if self.kernel.unregister(range_of(piece.clone())).is_ok() {
                state.registered.remove(piece.clone());
                self.note_released(state, piece);
            }
        }
    }

    /// Registers what of `part` is noted as registered.
    fn register_again(&self, state: &mut State, part: &Range<u64>) {
        let cut = |piece: &Range<u64>| piece.start.max(part.start)..piece.end.min(part.end);
        let pieces = state.registered.overlapping(part.clone());
        let pieces: Vec<_> = pieces.map(|(piece, &how)| (cut(piece), how)).collect();
        for (piece, how) in pieces {
            // What is gone is refused.
            if let Ok(how) = self.register_as(state, range_of(piece.clone()), how) {
                state.registered.insert(piece, how);
            }
        }
    }

    /// Registers what of `range` is not yet registered in a way that covers `how`.
    fn register(&self, state: &mut State, range: PageRange, how: Registered) -> Result<(), Errno> {
        // While somebody forks the kernel is to have nobody to tell.
        if state.forking > 0 && !allocator::is_installed() {
            return Err(Errno::NOMEM);
        }
        let wanted = numbers(range);
        let covers = |is: Registered| is == how || is == Registered::Missing;
        let mut gaps = Vec::new();
        let mut at = wanted.start;
        for (piece, &is) in state.registered.overlapping(wanted.clone()) {
            if covers(is) {
                if at < piece.start {
                    gaps.push(at..piece.start);
                }
                at = at.max(piece.end);
            }
        }
        if at < wanted.end {
            gaps.push(at..wanted.end);
        }
        // A missing page of what servers use would be a fault of theirs, on them; and an event for what
        // they free would be one that they sleep for.
        let never = match how {
            Registered::Missing => &state.reserved,
            Registered::Watched => &state.own,
        };
        let gaps: Vec<_> = gaps.iter().flat_map(|gap| never.gaps(gap)).collect();
        // What is reserved is registered by itself: it is never missing.
        let gaps: Vec<_> = match how {
            Registered::Missing => gaps,
            Registered::Watched => {
                let apart = |gap: &Range<u64>| -> Vec<_> {
                    let cut = |part: &Range<u64>| part.start.max(gap.start)..part.end.min(gap.end);
                    let reserved = state.reserved.overlapping(gap).map(cut);
                    reserved.chain(state.reserved.gaps(gap)).collect()
                };
                gaps.iter().flat_map(apart).collect()
            }
        };
        // And where it is not known what servers use, nothing else is touched than what was named.
        let gaps: Vec<_> = match &state.managed {
            None => gaps,
            Some(managed) => {
                let within = |gap: &std::ops::Range<u64>| -> Vec<_> {
                    let cut = |part: &std::ops::Range<u64>| {
                        part.start.max(gap.start)..part.end.min(gap.end)
                    };
                    managed.overlapping(gap).map(cut).collect()
                };
                gaps.iter().flat_map(within).collect()
            }
        };
        for gap in gaps {
            if state.registered.len() >= self.max_registrations {
                return Err(Errno::NOMEM);
            }
            self.arm(state)?;
            let how = self.register_as(state, range_of(gap.clone()), how)?;
            state.registered.insert(gap, how);
        }
        Ok(())
    }

    /// Registers a range so that it covers `how`, and returns in which way it is registered then.
    ///
    /// The kernel lets a range be registered also while an event is unread, and the last word counts:
    /// if mremap(2) has just moved a mapping there whose pages are out, then to have it watched and no
    /// more would make a touch of them a page of zeroes. So while anything is out, memory whose pages
    /// can leave is registered for missing pages. Where nothing is out, but a change is under way, the
    /// unread event may be such a move, and what it says of the registration must not be more than is
    /// true.
    ///
    /// What is reserved does not leave, and must not be registered for missing pages: who holds the
    /// lock may touch a page of it for the first time.
    fn register_as(
        &self,
        state: &mut State,
        range: PageRange,
        how: Registered,
    ) -> Result<Registered, Errno> {
        if how == Registered::Watched {
            let home = !state.is_anything_out() || mutant!("watching_ends_missing_faults");
            if home || !self.may_leave(state, range) {
                self.kernel.register(range, Modes::WP)?;
            }
            if state.reserved.overlaps(&numbers(range)) && self.kernel.uffd().changing() {
                // A mapping may have taken the place of what was reserved. Whoever moved it there has
                // not returned.
                self.drain(state);
            }
            let changing = state.is_anything_out() || self.kernel.uffd().changing();
            let changing = changing && !mutant!("watching_ends_missing_faults");
            if !changing || !self.may_leave(state, range) {
                return Ok(Registered::Watched);
            }
            // To be watched and no more, once everything is home.
            state.emptied.extend(chunk_of(range.first())..=chunk_of(range.last()));
        }
        self.kernel.register(range, Modes::MISSING)?;
        Ok(Registered::Missing)
    }

    /// Tells whether there is memory in `range`, as it is mapped now, of the kind whose pages can be out;
    /// if it cannot be told, there may be.
    fn may_leave(&self, state: &State, range: PageRange) -> bool {
        let not_reserved = |part: &PageRange| {
            let all = mutant!("what_is_reserved_may_be_missing");
            all || state.reserved.gaps(&numbers(*part)).next().is_some()
        };
        self.private_parts(range).is_none_or(|parts| parts.iter().any(not_reserved))
    }

    /// Returns the parts of `range` that are private memory without a file, as they are mapped now.
    fn private_parts(&self, range: PageRange) -> Option<Vec<PageRange>> {
        let mut parts = Vec::new();
        let mut next = Some(range.first());
        while let Some(page) = next.filter(|&page| page <= range.last()) {
            let Some(vma) = self.kernel.vma(page).ok()? else { break };
            if vma.is_anonymous() && !vma.shared {
                parts.extend(vma.range.intersection(range));
            }
            next = vma.range.last().checked_add(1);
        }
        Some(parts)
    }

    /// Returns how many pages of staging and buffers are in use, and how many are lost.
    pub(crate) fn staging_use(&self) -> (u64, u64) {
        let (staging, buffers) = (self.staging.used(), self.buffers.used());
        (staging.0 + buffers.0, staging.1 + buffers.1)
    }

    /// Takes a block of staging.
    pub(super) fn allocate_staging(&self, order: Order) -> Option<PoolBlock> {
        self.kernel.allows("staging").then(|| self.staging.allocate(order)).flatten()
    }

    /// Tells whether pages that the program has locked may have moved, or others have not that could,
    /// because the program had locked all its memory, staging too.
    ///
    /// Where it is asked before each move whether the page is locked, none has; and what is not
    /// refuses to move as no mapping explains.
    pub(super) fn may_have_met_locked_staging(&self, stayed: &[Stayed]) -> bool {
        let unexplained = |stayed: &Stayed| stayed.reason == StayReason::Unsupported;
        self.nothing.is_none() || stayed.iter().any(unexplained)
    }

    /// Makes staging memory that is not locked, if the program has locked all that it had
    /// (`mlockall(MCL_CURRENT)`), and tells whether it was.
    ///
    /// The kernel moves pages between memory that is locked both or not at all. While staging is not,
    /// what the program has locked stays where it is.
    pub(super) fn unlock_staging(&self) -> bool {
        // What the program locks all at once are our buffers too. To drop what is in one that holds
        // nothing is the quickest way to ask: it is refused where memory is locked.
        let locked = advise::dontneed(self.zeroes.first().into()) == Err(Errno::INVAL);
        locked && self.staging.unlock().and(self.buffers.unlock()).is_ok()
    }

    /// Takes a block of the buffers.
    pub(super) fn allocate_buffer(&self, order: Order) -> Result<PoolBlock, OutOfSystemMemory> {
        let block = self.kernel.allows("buffer").then(|| self.buffers.allocate(order)).flatten();
        block.ok_or(OutOfSystemMemory)
    }

    /// Tells whether missing pages of all of `range` are faults of ours.
    pub(super) fn is_registered_missing(&self, state: &State, range: PageRange) -> bool {
        let wanted = numbers(range);
        let mut at = wanted.start;
        for (piece, &how) in state.registered.overlapping(wanted.clone()) {
            if piece.start > at || how != Registered::Missing {
                return false;
            }
            at = piece.end;
        }
        at >= wanted.end
    }

    /// Sees to it that a missing page of `range`, where nothing is out, is no fault of ours.
    pub(super) fn release_range(&self, state: &mut State, range: PageRange) -> Result<(), Errno> {
        let whole = numbers(range);
        let missing = |(piece, &how): (&std::ops::Range<u64>, &Registered)| {
            let part = piece.start.max(whole.start)..piece.end.min(whole.end);
            (how == Registered::Missing).then_some(part)
        };
        let pieces: Vec<_> =
            state.registered.overlapping(whole.clone()).filter_map(missing).collect();
        for piece in pieces {
            let part = range_of(piece.clone());
            if state.watched.overlaps(&piece) {
                let how = self.register_as(state, part, Registered::Watched)?;
                state.registered.insert(piece, how);
                // Whoever slept for a page of it finds the kernel in charge again.
                self.wake(part);
                if how != Registered::Watched {
                    return Err(Errno::AGAIN);
                }
            } else {
                self.kernel.unregister(part)?;
                state.registered.remove(piece.clone());
                self.note_released(state, piece);
            }
        }
        Ok(())
    }

    /// Tells whether the kernel has `range` registered for missing pages, as one mapping that pages
    /// can move to, if it can tell now. What is noted here says less: a part that was unmapped before
    /// it was registered, of which no event tells, and is mapped anew, is noted and not registered.
    ///
    /// It is asked before each move, and not once. `shmat(2)` with `SHM_REMAP` replaces a mapping, and
    /// with it the registration, and no event ever says so; a page that leaves what is mapped there
    /// afterwards would be zeroes to whoever touches it. And since the kernel moves pages between
    /// memory that is locked both or not at all, this says that `range` is not locked, if
    /// [`nothing`](Space::nothing) never is.
    pub(super) fn confirm(&self, state: &mut State, range: PageRange) -> Result<(), Errno> {
        if mutant!("registered_on_paper") {
            return Ok(());
        }
        let nothing = self.nothing.as_ref().map(|region| region.range().first());
        let nothing = nothing.unwrap_or_else(|| self.staging.nothing());
        match self.kernel.ask(nothing, range) {
            Err(Errno::INVAL) => {}
            // The caller must not take it for what a page that is not there is.
            Err(Errno::NOENT) => return Err(Errno::FAULT),
            other => return other,
        }
        // Done again it is no less than it was, and what refuses then is not this.
        self.kernel.register(range, Modes::MISSING)?;
        state.registered.insert(numbers(range), Registered::Missing);
        self.kernel.ask(nothing, range)
    }

    /// Gives up the registration of chunks that have nothing out. Where one cannot be given up it
    /// stays: that costs time and no contents.
    pub(super) fn sweep(&self, state: &mut State) {
        if state.holding {
            return;
        }
        self.give_up_hold(state);
        // One that is not given up is put back.
        for chunk in std::mem::take(&mut state.emptied) {
            self.release_chunk(state, chunk);
        }
        self.disarm(state);
    }

    /// Gives up the registration of a chunk if it has nothing out, and says whether it did.
    pub(super) fn release_chunk(&self, state: &mut State, chunk: u64) -> bool {
        let range = chunk_range(chunk);
        if state.is_anything_out() || state.holding {
            // What is out may be moved here by mremap(2) at any moment, and must not find the chunk
            // unregistered. So nothing is given up before everything is home. Nor while growth is
            // held.
            state.emptied.insert(chunk);
            return false;
        }
        self.clear_doubts(state, range);
        if state.doubtful.overlaps(&numbers(range)) {
            // The next fault there tries again.
            return false;
        }
        let registered = state.registered.overlapping(numbers(range));
        let any = registered.into_iter().any(|(_, &how)| how == Registered::Missing);
        let released = self.release_range(state, range).is_ok();
        if !released {
            state.emptied.insert(chunk);
        }
        any && released
    }

    /// Takes note that the program is discarding `range`.
    ///
    /// The kernel tells of `madvise(MADV_DONTNEED)` before it drops the pages, and never when it has.
    /// A page that left in between would come home with what had been discarded. To drop it here
    /// would be no better: by the time that we could, the caller may have gone on and stored to it
    /// anew. So what may be there still is *doubtful*, and does not leave, until it has been seen to
    /// be gone; or until it is filled again, which is a fault of ours where missing pages are
    /// registered, as they are from now on. What is filled again before that stays in doubt: that
    /// costs a move and no contents.
    pub(super) fn doubt(&self, state: &mut State, range: PageRange) {
        let whole = numbers(range);
        let doubtful: Vec<_> = state.reserved.gaps(&whole).collect();
        doubtful.into_iter().for_each(|part| state.doubtful.insert(part));
        let pieces: Vec<_> = state
            .registered
            .overlapping(whole.clone())
            .map(|(piece, &how)| (piece.start.max(whole.start)..piece.end.min(whole.end), how))
            .collect();
        for (piece, how) in pieces {
            // What is reserved never leaves anyway.
            let parts: Vec<_> = state.reserved.gaps(&piece).map(range_of).collect();
            for part in parts {
                if how == Registered::Watched {
                    self.expect_refills(state, part);
                }
                state.emptied.extend(chunk_of(part.first())..=chunk_of(part.last()));
            }
        }
    }

    /// Makes it a fault of ours when pages of `range` are filled again that are gone, as far as they
    /// are of a kind that can leave. Where this is refused they stay in doubt.
    fn expect_refills(&self, state: &mut State, range: PageRange) {
        for part in self.private_parts(range).unwrap_or_default() {
            if self.kernel.register(part, Modes::MISSING).is_ok() {
                state.registered.insert(numbers(part), Registered::Missing);
            }
        }
    }
}

/// Returns memory where no page ever is, as much as a block, that no `mlockall` locks, if the kernel
/// has such memory.
pub(super) fn nothing(kernel: &Kernel) -> Option<Region> {
    let options =
        RegionOptions { never_locked: true, huge: Some(false), ..RegionOptions::default() };
    let bytes = Order::HUGE.bytes();
    let region = kernel.allows("nothing").then(|| Region::reserve(bytes, options).ok()).flatten();
    // Under `mlockall(MCL_FUTURE)` a kernel might make it locked that then cannot unlock it.
    region.filter(|region| !advise::is_locked(region.range()))
}

/// Returns the pages of all chunks that share one with `pages`. What is registered of a mapping is
/// given up by whole chunks, as it is registered, so that the mapping is not cut up.
fn whole_chunks(pages: &Range<u64>) -> Range<u64> {
    let chunk = CHUNK.pages();
    pages.start / chunk * chunk..pages.end.next_multiple_of(chunk)
}

/// Tells whether the kernel tells of every change to `range` that there can be.
pub(super) fn is_registered(state: &State, range: PageRange) -> bool {
    let whole = numbers(range);
    state.registered.gaps(&whole).all(|gap| state.own.gaps(&gap).next().is_none())
}
