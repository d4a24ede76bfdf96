//! The synchronisation primitives of this layer, from the standard library or from shuttle.
//!
//! Under `--cfg shuttle` every lock, atomic, condition variable and thread below is the checker's,
//! so that the code that ships is the code whose schedules are drawn. The crates of this workspace
//! that are to run under the checker take theirs from here; this module is no part of the public
//! interface. Reference counts and one-time cells stay the standard library's everywhere.

#[cfg(shuttle)]
pub use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic},
    thread,
};

#[cfg(not(shuttle))]
pub use std::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic},
    thread,
};

/// Locks `mutex`, also after a panic: what the panic left half-done is its own report, and the
/// drop handlers that run while it unwinds need the lock.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Sleeps on `condvar` until it is notified or `deadline` has passed, whichever is first, and
/// says whether the deadline is still ahead.
pub fn wait<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: Option<std::time::Instant>,
) -> (MutexGuard<'a, T>, bool) {
    let Some(deadline) = deadline else {
        return (condvar.wait(guard).unwrap_or_else(|poison| poison.into_inner()), true);
    };
    let Some(left) = deadline.checked_duration_since(std::time::Instant::now()) else {
        return (guard, false);
    };
    let waited = condvar.wait_timeout(guard, left);
    let (guard, _) = waited.unwrap_or_else(|poison| poison.into_inner());
    (guard, std::time::Instant::now() < deadline)
}
