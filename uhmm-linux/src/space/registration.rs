//! Which ranges are registered with the userfaultfd.
//!
//! Where pages are out their chunk of 2 MiB is registered for missing pages, as far as its mapping
//! goes; where a device has pages mapped, the range is watched, which is to be registered for write
//! protection without ever being write-protected: that costs the program nothing but makes the
//! kernel tell of `munmap`, `mremap` and `madvise`. A chunk that has become empty is given up when
//! there is nothing else to do, or at the next touch of a page in it that is not there.
//!
//! Every range that is registered is a mapping of its own to the kernel, which has a limit, so
//! there is one here: beyond it pages stay.

use rustix::io::Errno;
use uhmm::backend::OutOfSystemMemory;
use uhmm::{Order, PageRange, StayReason};

use super::Space;
use super::pool::PoolBlock;
use super::state::{Registered, State, chunk_of, chunk_range, numbers, range_of};
use crate::sys::advise;
use crate::sys::allocator;
use crate::sys::userfaultfd::Modes;

impl Registered {
    fn modes(self) -> Modes {
        match self {
            Registered::Watched => Modes::WP,
            Registered::Missing => Modes::MISSING,
        }
    }
}

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
        state.watched.insert(numbers(range));
        Ok(())
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
            self.kernel.register(range_of(gap.clone()), how.modes())?;
            state.registered.insert(gap, how);
        }
        Ok(())
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
                self.kernel.register(part, Modes::WP)?;
                state.registered.insert(piece, Registered::Watched);
                // Whoever slept for a page of it finds the kernel in charge again.
                self.wake(part);
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
    pub(super) fn confirm(&self, state: &mut State, range: PageRange) -> Result<(), Errno> {
        let nothing = self.staging.nothing();
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
        // One that is not given up is put back.
        for chunk in std::mem::take(&mut state.emptied) {
            self.release_chunk(state, chunk);
        }
        self.disarm(state);
    }

    /// Gives up the registration of a chunk if it has nothing out, and says whether it did.
    pub(super) fn release_chunk(&self, state: &mut State, chunk: u64) -> bool {
        let range = chunk_range(chunk);
        if state.is_anything_out() {
            // What is out may be moved here by mremap(2) at any moment, and must not find the chunk
            // unregistered. So nothing is given up before everything is home.
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
            let parts: Vec<_> = state.reserved.gaps(&piece).collect();
            for part in parts {
                let pages = range_of(part.clone());
                // Where this is refused the memory is of a kind that does not leave, or stays in
                // doubt.
                if how == Registered::Watched && self.kernel.register(pages, Modes::MISSING).is_ok()
                {
                    state.registered.insert(part.clone(), Registered::Missing);
                }
                let chunks = chunk_of(pages.first())..=chunk_of(pages.last());
                state.emptied.extend(chunks);
            }
        }
    }
}

/// Tells whether the kernel tells of every change to `range` that there can be.
pub(super) fn is_registered(state: &State, range: PageRange) -> bool {
    let whole = numbers(range);
    state.registered.gaps(&whole).all(|gap| state.own.gaps(&gap).next().is_none())
}
