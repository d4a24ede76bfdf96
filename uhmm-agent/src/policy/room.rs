//! Waiting for room.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Whether there is room, and who waits for it.
#[derive(Debug)]
pub(crate) struct Room {
    there_is: Mutex<bool>,
    changed: Condvar,
}

impl Room {
    /// The longest that anybody waits. Who has waited so long goes on: better over the budget than
    /// not at all.
    pub(crate) const PATIENCE: Duration = Duration::from_millis(20);

    /// Makes one in which there is room.
    pub(crate) fn new() -> Room {
        Room { there_is: Mutex::new(true), changed: Condvar::new() }
    }

    /// Says whether there is room.
    pub(crate) fn set(&self, there_is: bool) {
        let mut state = self.lock();
        if *state != there_is {
            *state = there_is;
            drop(state);
            if there_is {
                self.changed.notify_all();
            }
        }
    }

    /// Waits until there is room, and tells whether that took any time.
    pub(crate) fn wait(&self) -> bool {
        let state = self.lock();
        if *state {
            return false;
        }
        let there_is_none = |there_is: &mut bool| !*there_is;
        drop(self.changed.wait_timeout_while(state, Room::PATIENCE, there_is_none));
        true
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.there_is.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;

    #[test]
    fn nobody_waits_while_there_is_room() {
        assert!(!Room::new().wait());
    }

    #[test]
    fn who_waits_goes_on_when_there_is_room_again() {
        let room = Arc::new(Room::new());
        room.set(false);
        let waiter = std::thread::spawn({
            let room = Arc::clone(&room);
            move || room.wait()
        });
        room.set(true);
        // It waited, or came when there was room: it has ended in any case.
        let _ = waiter.join().expect("it does not panic");
    }

    #[test]
    fn nobody_waits_for_ever() {
        let room = Room::new();
        room.set(false);
        let began = Instant::now();
        assert!(room.wait());
        assert!(began.elapsed() >= Room::PATIENCE);
    }
}
