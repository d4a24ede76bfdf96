//! What moved lately: the memory that the policies of time share.

use std::collections::VecDeque;
use std::time::Duration;

use super::Moved;
use crate::address_space::SpaceId;
use crate::page::Page;

/// The moves of the last moments, oldest first.
///
/// # Invariants
///
/// 1. There are at most [`Recent::LIMIT`]: the oldest is forgotten for the next.
#[derive(Debug, Default)]
pub(super) struct Recent {
    moves: VecDeque<Moved>,
}

impl Recent {
    /// How many moves are remembered, each of a run of pages. A move that is forgotten too early
    /// makes a policy a little less strict and nothing else.
    pub(super) const LIMIT: usize = 1024;

    /// Remembers a move, and forgets those that are `horizon` older.
    pub(super) fn note(&mut self, moved: Moved, horizon: Duration) {
        let old = |old: &Moved| !is_within(old, moved.now, horizon);
        while self.moves.len() == Self::LIMIT || self.moves.front().is_some_and(old) {
            self.moves.pop_front();
        }
        self.moves.push_back(moved);
    }

    /// Returns the moves of `page` that are less than `horizon` old at `now`, newest first.
    pub(super) fn of(
        &self,
        space: SpaceId,
        page: Page,
        now: Duration,
        horizon: Duration,
    ) -> impl Iterator<Item = &Moved> {
        self.moves
            .iter()
            .rev()
            .filter(move |moved| moved.pages.contains(page) && moved.space == Some(space))
            .filter(move |moved| is_within(moved, now, horizon))
    }
}

/// Tells whether a move is less than `horizon` old. One that another thread noted after `now` was
/// read is of no age.
fn is_within(moved: &Moved, now: Duration, horizon: Duration) -> bool {
    now.saturating_sub(moved.now) < horizon
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use mmu_notifier::Owner;

    use super::*;
    use crate::page::PageRange;
    use crate::policy::{Location, MigrateCause};

    #[test]
    fn no_more_is_remembered_than_the_limit_and_nothing_older_than_the_horizon() {
        let (space, owner) = (SpaceId::new(), Owner::new());
        let page = |number| Page::new(number).expect("a small number");
        let moved = |number, now| Moved {
            space: Some(space),
            pages: PageRange::from(page(number)),
            owner,
            to: Location::Device,
            cause: MigrateCause::DeviceFault,
            now: Duration::from_nanos(now),
        };
        let long = Duration::from_secs(1);
        let mut recent = Recent::default();
        for number in 0..Recent::LIMIT as u64 + 1 {
            recent.note(moved(number, number), long);
        }
        assert_eq!(recent.moves.len(), Recent::LIMIT);
        let now = Duration::from_nanos(Recent::LIMIT as u64);
        assert_eq!(recent.of(space, page(0), now, long).count(), 0);
        assert_eq!(recent.of(space, page(1), now, long).count(), 1);
        assert_eq!(recent.of(space, page(1), now, Duration::from_nanos(5)).count(), 0);
        assert_eq!(recent.of(SpaceId::new(), page(1), now, long).count(), 0);
        recent.note(moved(7, 2_000_000_000), long);
        assert_eq!(recent.moves.len(), 1);
    }
}
