//! How fast the program may grow.
//!
//! While there is plenty of room the program grows as ever. Close to the budget ([`guard_of`]) its
//! growth is held: each first touch takes [room](super::room), and waits where there is none.

use std::sync::{Arc, Mutex, PoisonError};

use uhmm::{Page, PageRange};
use uhmm_linux::{FirstTouch, Growth};

use super::room::Room;
use super::streams::{Streams, part_at};
use crate::ledger::{Counter, Slot};

/// How many pages come at a time at most, where the program goes from page to page.
const LONGEST: u64 = 64;

/// The most room, in bytes, with which growth is held; and with how much it is where that is half of
/// what there may be, or less.
const MOST_GUARD: u64 = 128 << 20;
const LEAST_GUARD: u64 = 32 << 20;

/// Returns with how much room, of so much that a process may have at home, growth is held: as much
/// as a program may take while the keeper is not looking, since others have the processors.
pub(crate) fn guard_of(target: u64) -> u64 {
    (target / 4).min(MOST_GUARD).max((target / 2).min(LEAST_GUARD))
}

/// Decides about first touches.
#[derive(Debug)]
pub(crate) struct Gate {
    slot: Arc<Slot>,
    room: Arc<Room>,
    streams: Mutex<Streams>,
    /// The keeper's thread, which cannot wait for itself.
    keeper: u32,
}

impl Gate {
    /// Makes it for the process of `slot`, whose keeper calls this.
    pub(crate) fn new(slot: Arc<Slot>, room: Arc<Room>) -> Gate {
        let keeper = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        Gate { slot, room, streams: Mutex::new(Streams::new(LONGEST)), keeper }
    }

    /// Takes room for what comes with `page`.
    fn come_with(&self, page: Page) -> PageRange {
        let range = self.streams.lock().unwrap_or_else(PoisonError::into_inner).follow(page);
        part_at(page, range, 1 + self.room.take_some(range.pages() - 1))
    }
}

impl Growth for Gate {
    fn admit(&self, touch: &FirstTouch) -> Option<PageRange> {
        if touch.thread == self.keeper {
            self.room.take_anyway();
            return Some(touch.page.into());
        }
        let waited = !touch.waited.is_zero();
        if self.room.take_or_defer() {
            if waited {
                self.slot.waited(touch.waited);
            }
            return Some(self.come_with(touch.page));
        }
        if touch.waited >= Room::PATIENCE {
            self.slot.add(Counter::WentOver, 1);
            self.slot.waited(touch.waited);
            self.room.take_anyway();
            return Some(touch.page.into());
        }
        if !waited {
            self.slot.add(Counter::Throttled, 1);
        }
        None
    }

    fn came(&self, admitted: u64, came: u64) {
        self.room.give_back(admitted.saturating_sub(came));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ledger::{Config, Ledger};

    fn gate() -> Gate {
        let config = Config {
            budget: 1 << 20,
            device: "lz4".into(),
            policy: "clock".to_owned(),
            verify: false,
            announced: false,
            attach_at: None,
        };
        let ledger = Ledger::create(&config).expect("there is memory");
        let slot = ledger.claim(std::process::id(), "test".as_ref()).expect("there is a slot");
        let room = Arc::new(Room::new());
        Gate::new(Arc::new(slot), room)
    }

    fn count(gate: &Gate, counter: Counter) -> u64 {
        gate.slot.ledger().totals().numbers.counter(counter)
    }

    fn touch(number: u64, thread: u32, waited: Duration) -> FirstTouch {
        FirstTouch::new(Page::new(number).expect("a page"), true, thread, waited)
    }

    #[test]
    fn growth_is_held_early_where_the_budget_is_small() {
        let rows = [(0, 0), (16, 8), (64, 32), (100, 32), (200, 50), (512, 128), (9000, 128)];
        for (target, guard) in rows {
            assert_eq!(guard_of(target << 20), guard << 20, "{target} MiB");
        }
    }

    #[test]
    fn what_comes_is_no_more_than_there_is_room_for() {
        let gate = gate();
        gate.room.set(0, Some(10), 0);
        let mut next = 1000;
        let mut came = Vec::new();
        while let Some(range) = gate.admit(&touch(next, 1, Duration::ZERO)) {
            came.push(range.pages());
            next += range.pages();
        }
        assert_eq!(came, [1, 2, 4, 3]);
        assert_eq!(count(&gate, Counter::Throttled), 1);
    }

    #[test]
    fn the_keeper_never_waits_and_nobody_waits_for_ever() {
        let gate = gate();
        gate.room.set(0, Some(0), 0);
        assert!(gate.admit(&touch(7, gate.keeper, Duration::ZERO)).is_some());
        let other = gate.keeper + 1;
        assert!(gate.admit(&touch(8, other, Duration::ZERO)).is_none());
        assert!(gate.admit(&touch(8, other, Room::PATIENCE / 2)).is_none());
        assert!(gate.admit(&touch(8, other, Room::PATIENCE)).is_some());
        assert_eq!(count(&gate, Counter::WentOver), 1);
        assert_eq!(count(&gate, Counter::Throttled), 1);
    }

    #[test]
    fn what_did_not_come_takes_no_room() {
        let gate = gate();
        gate.room.set(0, Some(1), 0);
        let came = gate.admit(&touch(5, 1, Duration::ZERO)).expect("there is room for it");
        gate.came(came.pages(), 0);
        assert!(gate.admit(&touch(9, 1, Duration::ZERO)).is_some());
    }
}
