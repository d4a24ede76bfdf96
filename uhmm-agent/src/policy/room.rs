//! Room: how many pages may come, from the device or since the program touches new memory, until the
//! keeper has made more.
//!
//! The keeper says from time to time how much room there is. Whoever brings pages *takes* as much
//! first. What is taken between the keeper's look at the process and its word counts against that
//! word, so nothing is given out twice: the room is a limit on the number of all pages that were
//! ever taken, and the keeper reads that number before it looks.
//!
//! Nobody waits for long ([`Room::PATIENCE`]). Who has waited so long takes what is not there, which
//! is counted; and while the keeper finds that nothing can leave, nobody waits at all.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much room there is, and who waits for it.
#[derive(Debug)]
pub(crate) struct Room {
    state: Mutex<State>,
    /// There is more room.
    more: Condvar,
    /// Somebody wants more room than there is, or there is little left.
    wanted: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many pages were ever taken.
    taken: u64,
    /// How many may be taken in all; none at the moment if that is fewer than were. `None`: it is not
    /// to be waited for.
    limit: Option<i64>,
    /// With so few left the keeper is to make room before anybody waits.
    low: u64,
    /// How many wait. To tell nobody of more room is a call to the kernel too.
    waiting: u64,
    /// Whether somebody waits who is to be told by the keeper.
    deferred: bool,
    /// Whether the keeper is to make room.
    wanted: bool,
}

impl State {
    fn left(&self) -> u64 {
        let taken = i64::try_from(self.taken).unwrap_or(i64::MAX);
        self.limit.map_or(u64::MAX, |limit| u64::try_from(limit.saturating_sub(taken)).unwrap_or(0))
    }
}

/// What became of an attempt to take room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// There was room at once.
    AtOnce,
    /// There was after some time.
    Later,
    /// There was none in time.
    Over,
}

impl Room {
    /// The longest that anybody waits. Who has waited so long goes on: better over the budget than
    /// not at all.
    pub(crate) const PATIENCE: Duration = Duration::from_millis(50);

    /// Makes one that nobody waits for.
    pub(crate) fn new() -> Room {
        Room { state: Mutex::default(), more: Condvar::new(), wanted: Condvar::new() }
    }

    /// Returns how many pages were ever taken: to be asked before the process is looked at.
    pub(crate) fn taken(&self) -> u64 {
        self.lock().taken
    }

    /// Says that `pages` more were left when so many had been `taken`, or fewer than none; and that
    /// more is to be made when `low` are left. `None`: nobody is to wait. Tells whether somebody is to
    /// be told who was not let in.
    pub(crate) fn set(&self, taken: u64, pages: Option<i64>, low: u64) -> bool {
        let mut state = self.lock();
        let taken = i64::try_from(taken).unwrap_or(i64::MAX);
        state.limit = pages.map(|pages| taken.saturating_add(pages));
        state.low = low;
        self.tell(state)
    }

    /// Says that `pages` have left. Tells the same as [`set`](Room::set).
    pub(crate) fn add(&self, pages: u64) -> bool {
        let mut state = self.lock();
        let pages = i64::try_from(pages).unwrap_or(i64::MAX);
        state.limit = state.limit.map(|limit| limit.saturating_add(pages));
        self.tell(state)
    }

    /// Tells those who wait of more room.
    fn tell(&self, mut state: MutexGuard<'_, State>) -> bool {
        let left = state.left();
        state.wanted &= left <= state.low;
        let deferred = left > 0 && std::mem::take(&mut state.deferred);
        let waiting = state.waiting;
        drop(state);
        if left > 0 && waiting > 0 {
            self.more.notify_all();
        }
        deferred
    }

    /// Takes room for a page if there is any, and tells whether there was. If not, who asks is to be
    /// told by the keeper.
    pub(crate) fn take_or_defer(&self) -> bool {
        let mut state = self.lock();
        let there_is = state.left() > 0;
        state.taken += u64::from(there_is);
        state.deferred |= !there_is;
        self.call_keeper(state);
        there_is
    }

    /// Takes room for up to `pages` pages, and returns for how many.
    pub(crate) fn take_some(&self, pages: u64) -> u64 {
        let mut state = self.lock();
        let taken = pages.min(state.left());
        state.taken += taken;
        self.call_keeper(state);
        taken
    }

    /// Takes room for a page, and waits for it if there is none.
    pub(crate) fn take(&self) -> Taken {
        let mut state = self.lock();
        let mut taken = Taken::AtOnce;
        if state.left() == 0 {
            state.wanted = true;
            self.wanted.notify_one();
            let none = |state: &mut State| state.left() == 0;
            state.waiting += 1;
            let waited = self.more.wait_timeout_while(state, Room::PATIENCE, none);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.waiting -= 1;
            taken = if timeout.timed_out() { Taken::Over } else { Taken::Later };
        }
        state.taken += 1;
        self.call_keeper(state);
        taken
    }

    /// Takes room for a page, be there any or not.
    pub(crate) fn take_anyway(&self) {
        self.lock().taken += 1;
    }

    /// Gives back what was taken and not needed.
    pub(crate) fn give_back(&self, pages: u64) {
        let mut state = self.lock();
        state.taken = state.taken.saturating_sub(pages);
    }

    /// Wakes the keeper if there is little room left.
    fn call_keeper(&self, mut state: MutexGuard<'_, State>) {
        if !state.wanted && state.left() <= state.low {
            state.wanted = true;
            drop(state);
            self.wanted.notify_one();
        }
    }

    /// Waits until the keeper is to make room, at most so long, and tells whether it is.
    pub(crate) fn wait_until_wanted(&self, longest: Duration) -> bool {
        let state = self.lock();
        let deadline = Instant::now() + longest;
        let mut state = state;
        while !state.wanted {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let woken = self.wanted.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.wanted
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn nobody_waits_before_there_is_a_limit() {
        let room = Room::new();
        assert_eq!(room.take(), Taken::AtOnce);
        assert!(room.take_or_defer());
        assert_eq!(room.take_some(1000), 1000);
        assert!(!room.wait_until_wanted(Duration::ZERO));
    }

    #[test]
    fn no_more_is_taken_than_there_is() {
        let room = Room::new();
        room.set(0, Some(10), 0);
        assert_eq!(room.take_some(4), 4);
        assert_eq!(room.take_some(8), 6);
        assert_eq!(room.take_some(1), 0);
        assert!(!room.take_or_defer());
        // Whoever was turned away is to be told, once.
        assert!(room.add(2));
        assert!(!room.add(1));
        assert_eq!(room.take_some(8), 3);
    }

    #[test]
    fn what_is_taken_while_the_keeper_looks_counts() {
        let room = Room::new();
        room.set(0, Some(10), 0);
        let before = room.taken();
        assert_eq!(room.take_some(3), 3);
        // The keeper saw 10 left, maybe before those 3 came, maybe after.
        room.set(before, Some(10), 0);
        assert_eq!(room.take_some(100), 7);
        // And from less than nothing it takes more than that until there is some.
        room.set(room.taken(), Some(-5), 0);
        assert!(!room.add(5));
        assert!(!room.take_or_defer());
        assert!(room.add(1));
        assert_eq!(room.take_some(9), 1);
    }

    #[test]
    fn the_keeper_is_called_before_there_is_none() {
        let room = Room::new();
        room.set(0, Some(10), 4);
        room.take_some(5);
        assert!(!room.wait_until_wanted(Duration::ZERO));
        room.take_some(1);
        assert!(room.wait_until_wanted(Duration::ZERO));
        room.add(1);
        assert!(!room.wait_until_wanted(Duration::ZERO), "there is room again");
    }

    #[test]
    fn what_was_not_needed_is_there_again() {
        let room = Room::new();
        room.set(0, Some(4), 0);
        assert_eq!(room.take_some(4), 4);
        room.give_back(3);
        assert_eq!(room.take_some(4), 3);
    }

    #[test]
    fn who_waits_goes_on_when_there_is_room_again() {
        let room = Arc::new(Room::new());
        room.set(0, Some(0), 0);
        let waiter = std::thread::spawn({
            let room = Arc::clone(&room);
            move || room.take()
        });
        assert!(room.wait_until_wanted(Duration::from_secs(60)), "it has called the keeper");
        room.set(0, Some(1), 0);
        // It was let in, unless this thread was too slow for its patience.
        assert_ne!(waiter.join().expect("it does not panic"), Taken::AtOnce);
    }

    #[test]
    fn nobody_waits_for_ever() {
        let room = Room::new();
        room.set(0, Some(0), 0);
        let began = Instant::now();
        assert_eq!(room.take(), Taken::Over);
        assert!(began.elapsed() >= Room::PATIENCE);
    }
}
