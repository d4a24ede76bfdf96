//! Which executor waits for calls.
//!
//! The kernel wakes all that wait, so one does: the *leader*. It makes the calls that it receives,
//! which takes it a few microseconds, as nobody had to be woken for it. A call can also take long: a
//! device has to stop, or a file system to answer. So another, the *watchman*, looks once in a while,
//! as long as there are calls, and if the leader is still at the call that it was at before, it takes
//! the lead over. Then one of the *reserve* is the watchman, and who comes back late joins the
//! reserve. So a call that blocks holds up others for [`LATE`] twice, and no longer.
//!
//! Nothing is wrong if two lead for a moment, since each call is received once. What the leader is at
//! is in one word with the number of its lead, so that one who does not know yet that it leads no
//! more cannot hide what the new leader is at. So these are the only promises, and they are about time: if some executor is not in the middle of a call, one waits for
//! calls, or will when the watchman has looked. There always is a watchman if there is a reserve: the
//! two change under `roles`. `tests/relay_protocol.rs` draws schedules at random to break them.

use std::time::Duration;

use super::sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering, PoisonError, lock, sleep};
use crate::mutant::mutant;

/// How often the watchman looks.
pub(super) const LATE: Duration = Duration::from_millis(1);

/// After how many looks at nothing it sleeps until there is a call.
pub(super) const QUIET: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Relay {
    /// In the upper half how often the lead has been taken over: whoever leads knows the number. In
    /// the lower half the call that the leader is at, and 0 between calls.
    leader: AtomicU64,
    /// Counts calls.
    calls: AtomicU64,
    /// Whether the watchman sleeps until it is called.
    asleep: AtomicBool,
    roles: Mutex<Roles>,
    /// The reserve waits for a place to become free.
    reserve: Condvar,
    /// The watchman waits for a call.
    call: Condvar,
}

#[derive(Debug, Default)]
struct Roles {
    leader: bool,
    watchman: bool,
}

/// What the leader knows: the upper half of [`Relay::leader`], with zeroes below.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lead(u64);

/// The lead that comes next.
const NEXT: u64 = 1 << 32;

/// The half of the word where the call is.
const CALL: u64 = NEXT - 1;

impl Relay {
    /// Waits until the calling executor leads.
    pub(super) fn wait_for_lead(&self) -> Lead {
        let mut roles = lock(&self.roles);
        if !roles.leader {
            roles.leader = true;
            return Lead(self.leader.load(Ordering::SeqCst) & !CALL);
        }
        while roles.watchman {
            roles = self.reserve.wait(roles).unwrap_or_else(PoisonError::into_inner);
        }
        roles.watchman = true;
        drop(roles);
        self.watch();
        // Before another one watches, who would find the same call under way.
        let lead = self.take_over();
        let mut roles = lock(&self.roles);
        roles.watchman = false;
        if !mutant!("a_watchman_who_leads_has_no_successor") {
            self.reserve.notify_one();
        }
        lead
    }

    /// Makes the calling executor the leader. The one before finds out when its call has ended.
    fn take_over(&self) -> Lead {
        let mut word = self.leader.load(Ordering::SeqCst);
        loop {
            let lead = (word & !CALL).wrapping_add(NEXT);
            let (success, failure) = (Ordering::SeqCst, Ordering::SeqCst);
            match self.leader.compare_exchange(word, lead, success, failure) {
                Ok(_) => return Lead(lead),
                Err(found) => word = found,
            }
        }
    }

    /// Returns when the leader has been at one call for too long.
    fn watch(&self) {
        let mut quiet = 0;
        loop {
            let before = self.leader.load(Ordering::SeqCst);
            quiet = if before & CALL == 0 { quiet + 1 } else { 0 };
            if quiet > QUIET {
                let roles = lock(&self.roles);
                // SeqCst, and looked at again: the leader notes its call first and looks at this then.
                self.asleep.store(true, Ordering::SeqCst);
                let quiet_still = self.leader.load(Ordering::SeqCst) & CALL == 0;
                if quiet_still || mutant!("the_watchman_sleeps_without_a_last_look") {
                    let asleep = |_: &mut Roles| self.asleep.load(Ordering::SeqCst);
                    drop(self.call.wait_while(roles, asleep));
                }
                self.asleep.store(false, Ordering::SeqCst);
                quiet = 0;
                continue;
            }
            sleep(LATE);
            if before & CALL != 0 && self.leader.load(Ordering::SeqCst) == before {
                return;
            }
        }
    }

    /// Notes that the calling executor is going to make a call, if it still leads, and returns the
    /// call's number.
    pub(super) fn begin(&self, lead: Lead) -> u64 {
        // Relaxed: a number. It differs from those of the last milliseconds, and is not 0.
        let number = (self.calls.fetch_add(1, Ordering::Relaxed) & CALL).max(1);
        let busy = lead.0 | number;
        let (success, failure) = (Ordering::SeqCst, Ordering::SeqCst);
        // Where somebody else leads, nobody waits for this executor to receive another call.
        if self.leader.compare_exchange(lead.0, busy, success, failure).is_err() {
            return number;
        }
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            // Under the lock, so that it does not come between its look and its sleep.
            let _roles = lock(&self.roles);
            if !mutant!("a_call_wakes_no_watchman") {
                self.call.notify_one();
            }
        }
        number
    }

    /// Notes that the call has been made, and tells whether the executor still leads.
    pub(super) fn end(&self, number: u64, lead: Lead) -> bool {
        if mutant!("who_was_late_hides_what_the_leader_is_at") {
            return self.leader.fetch_and(!CALL, Ordering::SeqCst) & !CALL == lead.0;
        }
        let (success, failure) = (Ordering::SeqCst, Ordering::SeqCst);
        self.leader.compare_exchange(lead.0 | number, lead.0, success, failure).is_ok()
    }
}
