//! Announced changes, and what must not be changed for a moment.
//!
//! An executor makes a change between [`Turns::change`] and the end of what that returns; whoever
//! has [kept](Turns::keep) pages knows that no announced change of them is being made, and none
//! begins before it lets go. Keeping never waits, so only executors do: for who keeps pages, which
//! makes a few calls to the kernel meanwhile, and waits for no device, no announcement, and no thread
//! but the one that reads events, which waits for nobody.

use std::sync::{Condvar, Mutex, PoisonError};

use uhmm::PageRange;

use super::lock;
use crate::mutant::mutant;

/// Whose turn it is where.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    taken: Mutex<Taken>,
    let_go: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    /// What is being changed.
    changing: Vec<PageRange>,
    /// What must not be.
    kept: Vec<PageRange>,
}

/// A change that is being made.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    turns: &'a Turns,
    ranges: &'a [PageRange],
}

/// Pages that no announced change reaches.
#[derive(Debug)]
pub(super) struct Kept<'a> {
    turns: &'a Turns,
    range: PageRange,
}

impl Turns {
    /// Begins a change of `ranges`, as soon as nobody keeps any of them.
    pub(crate) fn change<'a>(&'a self, ranges: &'a [PageRange]) -> Change<'a> {
        let kept = |taken: &mut Taken| {
            let heeds = !mutant!("what_is_kept_is_changed");
            heeds && ranges.iter().any(|range| taken.kept.iter().any(|kept| kept.overlaps(*range)))
        };
        let taken = self.let_go.wait_while(lock(&self.taken), kept);
        taken.unwrap_or_else(PoisonError::into_inner).changing.extend_from_slice(ranges);
        Change { turns: self, ranges }
    }

    /// Keeps `range` from changes; nothing if one is being made there.
    pub(super) fn keep(&self, range: PageRange) -> Option<Kept<'_>> {
        let mut taken = lock(&self.taken);
        let changing = taken.changing.iter().any(|changing| changing.overlaps(range));
        if changing && !mutant!("what_is_kept_is_changed") {
            return None;
        }
        taken.kept.push(range);
        Some(Kept { turns: self, range })
    }
}

/// Takes one `range` off a list that has it.
fn remove(list: &mut Vec<PageRange>, range: PageRange) {
    let at = list.iter().position(|&other| other == range).expect("it was put there");
    list.swap_remove(at);
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut taken = lock(&self.turns.taken);
        self.ranges.iter().for_each(|&range| remove(&mut taken.changing, range));
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        remove(&mut lock(&self.turns.taken).kept, self.range);
        self.turns.let_go.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use uhmm::Page;

    use super::*;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::from_pages(Page::new(first).expect("a page"), pages).expect("a range")
    }

    #[test]
    fn what_is_being_changed_cannot_be_kept() {
        let turns = Turns::default();
        let ranges = [range(10, 5), range(30, 1)];
        let change = turns.change(&ranges);
        assert!(turns.keep(range(14, 2)).is_none());
        assert!(turns.keep(range(30, 1)).is_none());
        assert!(turns.keep(range(15, 15)).is_some());
        drop(change);
        assert!(turns.keep(range(14, 2)).is_some());
    }

    #[test]
    fn what_is_kept_is_changed_later() {
        let (turns, let_go) = (Turns::default(), AtomicBool::new(false));
        let kept = turns.keep(range(10, 5)).expect("nothing changes");
        std::thread::scope(|scope| {
            let (begin, begun) = std::sync::mpsc::channel();
            let (turns, let_go) = (&turns, &let_go);
            let changer = scope.spawn(move || {
                begin.send(()).expect("somebody waits");
                let change = turns.change(&[range(12, 1)]).ranges.len();
                // Relaxed: ordered by the lock of the turns.
                assert!(let_go.load(Ordering::Relaxed), "it was changed while it was kept");
                change
            });
            begun.recv().expect("it says so");
            // Changes elsewhere go on meanwhile.
            drop(turns.change(&[range(15, 1)]));
            let_go.store(true, Ordering::Relaxed);
            drop(kept);
            assert_eq!(changer.join().expect("it has not panicked"), 1);
        });
    }
}
