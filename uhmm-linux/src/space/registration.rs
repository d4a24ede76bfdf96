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
use uhmm::{Order, Page, PageRange, StayReason};

use super::Space;
use super::pool::PoolBlock;
use super::state::{Registered, State, chunk_of, chunk_range, numbers, range_of};
use crate::sys::pagemap::Categories;
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
        self.register(state, range, Registered::Missing).map_err(|error| match error {
            Errno::BUSY => StayReason::Handled,
            Errno::NOMEM => StayReason::Busy,
            Errno::PERM => StayReason::Unsupported,
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
        if !state.is_chunk_empty(chunk) {
            return false;
        }
        let range = chunk_range(chunk);
        let registered = state.registered.overlapping(numbers(range));
        let any = registered.into_iter().any(|(_, &how)| how == Registered::Missing);
        let released = self.release_range(state, range).is_ok();
        if !released {
            state.emptied.insert(chunk);
        }
        any && released
    }

    /// Drops what is present of the ranges that the program is discarding.
    ///
    /// The kernel tells of `madvise(MADV_DONTNEED)` before it drops the pages, and never when it
    /// has. A page that moved out in between would come home with what had been discarded. So what
    /// is there is dropped here and now: what appears later is later than the call, and may stay.
    /// What cannot be dropped must not move before it is gone.
    pub(super) fn zap(&self, state: &mut State) {
        while let Some(range) = state.zaps.pop() {
            let pieces: Vec<_> = {
                let whole = numbers(range);
                let cut = |(piece, _): (&std::ops::Range<u64>, &Registered)| {
                    piece.start.max(whole.start)..piece.end.min(whole.end)
                };
                state.registered.overlapping(whole.clone()).map(cut).collect()
            };
            for piece in pieces {
                if !self.zap_piece(state, range_of(piece)) {
                    // An event has come between. Whatever it says is true by now.
                    state.zaps.push(range);
                    return;
                }
            }
        }
    }

    fn zap_piece(&self, state: &mut State, piece: PageRange) -> bool {
        let mut present = Vec::new();
        let there = Categories::PRESENT | Categories::SWAPPED;
        if self.kernel.scan(piece, there, &mut present).is_err() {
            state.doubtful.insert(numbers(piece));
            return true;
        }
        for (run, _) in present {
            for part in run.blocks(super::state::CHUNK) {
                let mut next = Some(part.first());
                while let Some(rest) =
                    next.and_then(|page| PageRange::from_bounds(page, part.last()))
                {
                    let Some(block) = self.staging.allocate(super::state::CHUNK) else {
                        state.doubtful.insert(numbers(rest));
                        break;
                    };
                    let target = block.range();
                    self.staging.fill(target);
                    let progress = self.kernel.move_away(rest, target.first());
                    next = rest.first().checked_add(progress.pages);
                    match progress.result {
                        Ok(()) => break,
                        Err(Errno::AGAIN) if progress.pages == 0 => return false,
                        Err(Errno::AGAIN) => {}
                        Err(_) => {
                            // Shared, pinned or locked, so it cannot move now; and it must not later.
                            let page = next.unwrap_or(Page::MAX);
                            state.doubtful.insert(numbers(page.into()));
                            next = page.checked_add(1);
                        }
                    }
                }
            }
        }
        true
    }
}

/// Tells whether the kernel tells of every change to `range` that there can be.
pub(super) fn is_registered(state: &State, range: PageRange) -> bool {
    let whole = numbers(range);
    state.registered.gaps(&whole).all(|gap| state.own.gaps(&gap).next().is_none())
}
