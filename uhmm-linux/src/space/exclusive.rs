//! Exclusive access: pages that one device has, with the CPUs kept off until one touches them.
//!
//! The page moves to staging, where the device works on it; what it leaves is a hole that the CPUs
//! fault on. So a hold is a migration without a copy, and its end is a fault-back.

use std::time::{Duration, Instant};

use mmu_notifier::{Event, EventKind, Owner};
use rustix::io::Errno;
use uhmm::{Access, FaultError, Order, Page, PageRange, StayReason};

use super::state::{CHUNK, Extent, Place, State};
use super::take::Candidate;
use super::{Space, count};
use crate::mutant::mutant;

/// How long no page may be had of those that are to be held.
const BUDGET: Duration = Duration::from_secs(1);

/// How often a page may turn out to be shared or in use before it is taken to be pinned.
const TRIES: u32 = 3;

/// How often the kernel may put off to move a page in a row.
const TRIES_TO_MOVE: u32 = 1000;

/// What became of a page that was to be held.
enum Attempt {
    Held,
    /// It has to be faulted in first.
    Missing,
    /// Somebody else uses it.
    Busy,
    Refused(StayReason),
}

impl Space {
    /// Does what [`Backend::exclusive`](uhmm::Backend::exclusive) says.
    pub(super) fn hold(
        &self,
        range: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        if !self.is_here() {
            return Err(FaultError::Released);
        }
        // In pieces, so that a range that is mostly not mapped costs nothing but its error.
        for piece in range.blocks(CHUNK) {
            self.hold_piece(piece, owner, deadline)?;
        }
        Ok(())
    }

    fn hold_piece(
        &self,
        piece: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        let mut rest: Vec<Page> = self.not_held(piece, owner);
        let mut busy = 0;
        let mut progress = Instant::now();
        while let Some(&first) = rest.first() {
            for &page in &rest {
                self.fault_in(page.into(), Access::Write, None, deadline)?;
            }
            if !self.abilities.migrate {
                let reason = StayReason::Unsupported;
                return Err(FaultError::NotExclusive { page: first, reason });
            }
            // Not by the owner: what it has translated leads to where the page is about to leave.
            let covered = PageRange::from_bounds(first, rest[rest.len() - 1]);
            let covered = covered.expect("pages are in ascending order");
            let event = match mutant!("a_hold_spares_its_owner") {
                true => Event::new(EventKind::Exclusive, covered.va_range()).owned_by(owner),
                false => Event::new(EventKind::Exclusive, covered.va_range()),
            };
            let announced = self.notifiers.invalidate_range_start(event);
            self.unlock_staging();
            let result = self.try_hold(&rest, owner, busy >= TRIES);
            drop(announced);
            if self.unlock_staging() {
                // The program has just locked all its memory, ours too, so that what is locked could
                // move: once more, and it stays.
                self.give_back(piece, owner);
            }
            self.settle_unless_leading();
            busy += u32::from(result?);
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(FaultError::TimedOut { page: first });
            }
            let before = rest.len();
            rest = self.not_held(piece, owner);
            if rest.len() < before {
                progress = Instant::now();
            } else if !rest.is_empty() && progress.elapsed() > BUDGET {
                // Such as a page that may be of before the program discarded it.
                let (page, reason) = (rest[0], StayReason::Changed);
                return Err(FaultError::NotExclusive { page, reason });
            }
        }
        Ok(())
    }

    fn not_held(&self, piece: PageRange, owner: Owner) -> Vec<Page> {
        let state = self.lock();
        let held = |page: &Page| {
            let at = state.at(*page);
            at.is_some_and(|(_, extent)| extent.place.holder() == Some(owner))
        };
        piece.iter().filter(|page| !held(page)).collect()
    }

    /// Takes those of `pages` that are as the fault left them, and tells whether one was busy. One
    /// that is busy is an error where it is the `last` try.
    fn try_hold(&self, pages: &[Page], owner: Owner, last: bool) -> Result<bool, FaultError> {
        let mut busy = false;
        for &page in pages {
            match self.hold_page(page, owner) {
                Attempt::Held | Attempt::Missing => {}
                Attempt::Busy if last => {
                    return Err(FaultError::NotExclusive { page, reason: StayReason::Pinned });
                }
                Attempt::Busy => busy = true,
                Attempt::Refused(reason) => return Err(FaultError::NotExclusive { page, reason }),
            }
        }
        Ok(busy)
    }

    fn hold_page(&self, page: Page, owner: Owner) -> Attempt {
        let mut refused = None;
        let candidates = self.candidates(page.into(), &mut |_, reason| refused = Some(reason));
        let Some(&candidate) = candidates.first() else {
            return match refused {
                // It was there for the fault just now, so this is no final answer.
                Some(StayReason::Hole) | None => Attempt::Missing,
                Some(reason) => Attempt::Refused(reason),
            };
        };
        let mut state = self.lock();
        let attempt = self.hold_candidate(&mut state, candidate, owner);
        // Those that wait for a fork, or for its end, are few and short.
        match attempt {
            Attempt::Missing if state.forking > 0 => {
                drop(state);
                std::thread::yield_now();
                Attempt::Missing
            }
            attempt => attempt,
        }
    }

    /// Holds a page, as it is mapped when the kernel lets it move: where events come first, it is tried
    /// again at once, while none is under way. Else those that hold would wait for the program to do
    /// nothing for a moment.
    fn hold_candidate(&self, state: &mut State, candidate: Candidate, owner: Owner) -> Attempt {
        let page = candidate.pages.first();
        if let Err(attempt) = self.may_hold(state, candidate) {
            return attempt;
        }
        let Some(block) = self.allocate_staging(Order::PAGE) else {
            return Attempt::Refused(StayReason::OutOfSystemMemory);
        };
        for _ in 0..TRIES_TO_MOVE {
            let confirmed = self.confirm(state, page.into());
            match confirmed.and_then(|()| self.kernel.move_out(page.into(), block.first()).result) {
                Ok(()) => {
                    self.staging.fill(block.range());
                    let place = Place::Held { owner, block };
                    state.insert(page, Extent::new(Order::PAGE, place));
                    return Attempt::Held;
                }
                Err(Errno::AGAIN) => {
                    count(&self.counters.retries, 1);
                    self.drain(state);
                    if let Err(attempt) = self.may_hold(state, candidate) {
                        return attempt;
                    }
                }
                Err(Errno::BUSY) => return Attempt::Busy,
                Err(Errno::INVAL) => return Attempt::Refused(self.explain_refusal(page)),
                Err(Errno::NOMEM) => return Attempt::Refused(StayReason::OutOfSystemMemory),
                // It is not there, or not any more.
                Err(_) => return Attempt::Missing,
            }
        }
        Attempt::Missing
    }

    /// Tells whether a page is one that can be held, as far as is known here, and registers it.
    fn may_hold(&self, state: &mut State, candidate: Candidate) -> Result<(), Attempt> {
        let page = candidate.pages.first();
        if state.forking > 0 || state.over || state.at(page).is_some() {
            return Err(Attempt::Missing);
        }
        let mut refused = None;
        if self.allowed(state, page.into(), &mut |_, reason| refused = Some(reason)).is_empty() {
            return Err(match refused {
                Some(StayReason::Changed) | None => Attempt::Missing,
                Some(reason) => Attempt::Refused(reason),
            });
        }
        self.register_missing(state, page.into(), candidate.mapping).map_err(
            |reason| match reason {
                StayReason::Changed => Attempt::Missing,
                reason => Attempt::Refused(reason),
            },
        )
    }

    /// Does what [`Backend::end_exclusive`](uhmm::Backend::end_exclusive) says.
    pub(super) fn give_back(&self, range: PageRange, owner: Owner) {
        if !self.is_here() {
            return;
        }
        let held = |state: &State| -> Vec<Page> {
            let held = state.overlapping(range);
            let held = held.filter(|(_, extent)| extent.place.holder() == Some(owner));
            held.map(|(first, _)| first).collect()
        };
        let before = held(&self.lock());
        let (Some(&first), Some(&last)) = (before.first(), before.last()) else { return };
        let covered = PageRange::from_bounds(first, last).expect("in ascending order");
        let event = Event::new(EventKind::Clear, covered.va_range());
        let announced = self.notifiers.invalidate_range_start(event);
        {
            let mut state = self.lock();
            for page in held(&state) {
                // What was taken since was not announced.
                if covered.contains(page) {
                    self.release_block(&mut state, page);
                }
            }
        }
        drop(announced);
        self.settle_unless_leading();
    }
}

impl Place {
    /// Returns the device that holds it, if one does.
    fn holder(&self) -> Option<Owner> {
        match self {
            Place::Held { owner, .. } => Some(*owner),
            _ => None,
        }
    }
}
