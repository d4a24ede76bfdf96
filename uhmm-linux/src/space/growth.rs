//! Memory that the program touches for the first time, and that waits where there is no room.
//!
//! The kernel gives a program memory when it touches it, and asks nobody. While growth is *held*
//! all memory that may move is registered for missing pages, whole mappings at a time, so that first
//! touches are faults of ours. Somebody decides what may come ([`Growth`]); what may not is
//! *deferred*, and asked for again. Several pages come at once where the program goes on from page
//! to page, which costs it no more than the kernel's own way: a fault, and a copy of zeroes for each
//! page.
//!
//! What is mapped later is not registered before [`Space::hold_growth`] is called again: the kernel
//! tells of no new mapping. Nor is a stack that grows by itself.
//!
//! Whoever decides may let a thread wait as long as it likes, so it is for it to have a limit. A
//! fork ends the hold, as it ends all registrations.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;
use uhmm::{Order, PageRange};

use super::pool::{Pool, PoolBlock};
use super::state::{Fault, Registered, State, numbers, range_of};
use super::{Space, count};
use crate::growth::{FirstTouch, Growth};
use crate::mutant::mutant;
use crate::sys::advise;
use crate::sys::maps::Kind;

/// How many zeroes can be copied at a time.
const MOST_AT_ONCE: Order = Order::new(6).expect("6 is an order");

/// What a first touch takes.
enum Answer {
    /// These pages may come, all of them holes as far as is known, and the touched one among them.
    Come(PageRange),
    /// The thread waits.
    Wait,
}

/// Returns pages of zeroes to copy from, all of them there.
pub(super) fn zeroes(buffers: &Arc<Pool>) -> Result<PoolBlock, Errno> {
    let zeroes = buffers.allocate(MOST_AT_ONCE).ok_or(Errno::NOMEM)?;
    advise::populate_read(zeroes.first().block(MOST_AT_ONCE))?;
    Ok(zeroes)
}

impl Space {
    /// Has `growth` asked about first touches of all memory that may move and is mapped now, and
    /// returns how many pages of it could not be registered. The first that is given stays.
    pub(crate) fn hold_growth(&self, growth: &Arc<dyn Growth>) -> u64 {
        self.reserve_this_thread();
        self.growth.get_or_init(|| Arc::clone(growth));
        let mut missed = 0;
        for range in self.movable_parts(|kind| kind != Kind::Stack) {
            let mut state = self.lock();
            if state.forking > 0 || state.over {
                break;
            }
            (state.holding, state.hold_ended) = (true, false);
            if self.register_missing(&mut state, range, range).is_err() {
                missed += range.pages();
            }
        }
        missed
    }

    /// Ends the hold. What is registered is given up as soon as nothing is out.
    pub(crate) fn end_hold(&self) {
        self.reserve_this_thread();
        let mut state = self.lock();
        let state = &mut *state;
        if state.holding {
            self.release_hold(state);
            state.faults.extend(state.deferred.drain(..));
            self.call_leader();
        }
    }

    /// Has those asked for again who wait for room.
    pub(crate) fn resume_growth(&self) {
        // Release: partner of the swap in `resume_deferred`, before which the room was made.
        self.growth_resumes.store(true, Ordering::Release);
        self.call_leader();
    }

    /// Ends the hold, with what is registered for it given up now or as soon as that may be.
    pub(super) fn release_hold(&self, state: &mut State) {
        if std::mem::take(&mut state.holding) {
            state.hold_ended = true;
            self.give_up_hold(state);
        }
    }

    /// Gives up what is registered for missing pages, once nothing is out: not before, for the same
    /// reason as [chunks](Space::release_chunk).
    pub(super) fn give_up_hold(&self, state: &mut State) {
        if !state.hold_ended || state.is_anything_out() {
            return;
        }
        let missing = state.registered.iter().filter(|&(_, &how)| how == Registered::Missing);
        let missing: Vec<_> = missing.map(|(piece, _)| range_of(piece.clone())).collect();
        let mut all = true;
        for piece in missing {
            self.clear_doubts(state, piece);
            // What is in doubt is given up by the next fault there.
            let parts: Vec<_> = state.doubtful.gaps(&numbers(piece)).map(range_of).collect();
            for part in parts {
                all &= self.release_range(state, part).is_ok();
            }
        }
        state.hold_ended = !all;
    }

    /// Serves the faults again that wait for room, if there may be room by now.
    pub(super) fn resume_deferred(&self, state: &mut State, due: bool) {
        // Acquire: partner of the store in `resume_growth`.
        let resumes = || self.growth_resumes.swap(false, Ordering::Acquire);
        if !state.deferred.is_empty() && (resumes() || due) {
            state.faults.extend(state.deferred.drain(..));
        }
    }

    /// Fills the hole that a fault is about, and those next to it as far as they may come, or has it
    /// wait.
    pub(super) fn grow(&self, state: &mut State, growth: &dyn Growth, fault: Fault) {
        let page = PageRange::from(fault.page);
        let window = match self.ask_for(state, growth, fault) {
            Answer::Come(window) => window,
            Answer::Wait => {
                let since = fault.held_since.unwrap_or_else(Instant::now);
                state.deferred.push(Fault { held_since: Some(since), ..fault });
                return;
            }
        };
        let admitted = window.pages();
        let before = page.first().number() - window.first().number();
        let (came, result) = self.fill_holes(window, fault.write);
        if came > 0 {
            let first = numbers(window).start;
            // They were gone, if they had been there: what comes now is later.
            state.doubtful.remove(first..first + came);
        }
        growth.came(admitted, came);
        match result {
            _ if came > before => count(&self.counters.zero_fills, 1),
            // One before it is there already, or they are of several mappings, of which the kernel
            // fills one at a time.
            Err(error) if window.pages() > 1 && error != Errno::AGAIN => {
                self.fill_hole(state, fault);
            }
            _ => self.judge_hole(state, fault, result),
        }
    }

    /// Asks which pages may come for a first touch.
    fn ask_for(&self, state: &State, growth: &dyn Growth, fault: Fault) -> Answer {
        let page = PageRange::from(fault.page);
        let touch = FirstTouch {
            page: fault.page,
            write: fault.write,
            thread: fault.thread,
            waited: fault.held_since.map_or_else(Default::default, |since| since.elapsed()),
        };
        let admitted = growth.admit(&touch);
        let admitted = admitted.or(mutant!("growth_is_not_held").then_some(page));
        let Some(wanted) = admitted else { return Answer::Wait };
        let window = self.holes_around(state, page, wanted);
        if window.pages() < wanted.pages() {
            growth.came(wanted.pages() - window.pages(), 0);
        }
        Answer::Come(window)
    }

    /// Returns those of the pages `wanted` next to `page`, and itself, that are registered for
    /// missing pages, not out, not reserved, and no more than can come at a time.
    fn holes_around(&self, state: &State, page: PageRange, wanted: PageRange) -> PageRange {
        let number = page.first().number();
        let registered = state.registered.get_key_value(&number);
        let (Some((piece, _)), true) = (registered, wanted.covers(page)) else { return page };
        let mut window = numbers(wanted);
        let most = MOST_AT_ONCE.pages();
        window.start = window.start.max(piece.start).max((number + 1).saturating_sub(most));
        window.end = window.end.min(piece.end).min(window.start + most);
        let out = state.gaps(range_of(window.clone()));
        let Some(gap) = out.into_iter().find(|gap| gap.covers(page)) else { return page };
        for never in [&state.reserved, &state.poisoned] {
            let free = never.gaps(&numbers(gap)).find(|free| free.contains(&number));
            let Some(free) = free else { return page };
            window.start = window.start.max(free.start);
            window.end = window.end.min(free.end);
        }
        range_of(window.start.max(numbers(gap).start)..window.end.min(numbers(gap).end))
    }

    /// Fills pages with zeroes, in ascending order, and returns how many, and what stopped it.
    fn fill_holes(&self, window: PageRange, write: bool) -> (u64, Result<(), Errno>) {
        let progress = match write {
            // One call for all, and no second fault of the program for each.
            true => self.kernel.copy_home(self.zeroes.first(), window),
            false => self.kernel.zeropage(window),
        };
        (progress.pages, progress.result)
    }
}
