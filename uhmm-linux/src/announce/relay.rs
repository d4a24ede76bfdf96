//! Which executor waits for calls.
//!
//! The kernel wakes all that wait, so one does: the *leader*. It makes the calls that it receives,
//! which takes it a few microseconds, as nobody had to be woken for it. A call can also take long: a
//! device has to stop, or a file system to answer. So another, the *watchman*, looks once in a while,
//! as long as there are calls, and if the leader is still at the call that it was at before, it takes
//! the lead over. Then one of the *reserve* is the watchman, and who comes back late joins the
//! reserve. So a call that blocks holds up others for [`LATE`] twice, and no longer.
//!
//! Nothing is wrong if two lead for a moment, since each call is received once. So these are the only
//! promises, and they are about time: if some executor is not in the middle of a call, one waits for
//! calls, or will when the watchman has looked. There always is a watchman if there is a reserve: the
//! two change under `roles`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::space::lock;

/// How often the watchman looks.
const LATE: Duration = Duration::from_millis(1);

/// After how many looks at nothing it sleeps until there is a call.
const QUIET: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Relay {
    /// How often the lead has been taken over: whoever leads knows the number.
    lead: AtomicU64,
    /// Counts calls.
    calls: AtomicU64,
    /// The call that the leader is at; 0 between calls.
    busy: AtomicU64,
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

/// What the leader knows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lead(u64);

impl Relay {
    /// Waits until the calling executor leads.
    pub(super) fn wait_for_lead(&self) -> Lead {
        let mut roles = lock(&self.roles);
        if !roles.leader {
            roles.leader = true;
            return Lead(self.lead.load(Ordering::SeqCst));
        }
        while roles.watchman {
            roles = self.reserve.wait(roles).unwrap_or_else(PoisonError::into_inner);
        }
        roles.watchman = true;
        drop(roles);
        self.watch();
        let mut roles = lock(&self.roles);
        roles.watchman = false;
        self.reserve.notify_one();
        drop(roles);
        Lead(self.lead.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Returns when the leader has been at one call for too long.
    fn watch(&self) {
        let mut quiet = 0;
        loop {
            let before = self.busy.load(Ordering::SeqCst);
            quiet = if before == 0 { quiet + 1 } else { 0 };
            let roles = lock(&self.roles);
            if quiet > QUIET {
                // SeqCst, and looked at again: the leader stores `busy` first and looks at this then.
                self.asleep.store(true, Ordering::SeqCst);
                if self.busy.load(Ordering::SeqCst) == 0 {
                    let asleep = |_: &mut Roles| self.asleep.load(Ordering::SeqCst);
                    drop(self.call.wait_while(roles, asleep));
                }
                self.asleep.store(false, Ordering::SeqCst);
                quiet = 0;
                continue;
            }
            drop(self.call.wait_timeout(roles, LATE));
            if before != 0 && self.busy.load(Ordering::SeqCst) == before {
                return;
            }
        }
    }

    /// Notes that the calling executor is going to make a call, and returns its number.
    pub(super) fn begin(&self) -> u64 {
        // Relaxed: a number.
        let number = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        self.busy.store(number, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            // Under the lock, so that it does not come between its look and its sleep.
            let _roles = lock(&self.roles);
            self.call.notify_one();
        }
        number
    }

    /// Notes that the call has been made, and tells whether the executor still leads.
    pub(super) fn end(&self, number: u64, lead: Lead) -> bool {
        // Another one's call may be noted there by now.
        let _ = self.busy.compare_exchange(number, 0, Ordering::SeqCst, Ordering::SeqCst);
        self.lead.load(Ordering::SeqCst) == lead.0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Executors that take calls from a queue; a call waits until it is told to go on. Returns where
    /// calls go, and how many have been made.
    fn executors(count: usize) -> (Sender<Receiver<()>>, Arc<AtomicUsize>) {
        let (send, calls) = channel::<Receiver<()>>();
        let (calls, made) = (Arc::new(Mutex::new(calls)), Arc::new(AtomicUsize::new(0)));
        let relay = Arc::new(Relay::default());
        for _ in 0..count {
            let (relay, calls, made) = (Arc::clone(&relay), Arc::clone(&calls), Arc::clone(&made));
            std::thread::spawn(move || {
                loop {
                    let lead = relay.wait_for_lead();
                    loop {
                        let received = lock(&calls).recv();
                        let Ok(call) = received else { return };
                        let number = relay.begin();
                        let _ = call.recv();
                        made.fetch_add(1, Ordering::SeqCst);
                        if !relay.end(number, lead) {
                            break;
                        }
                    }
                }
            });
        }
        (send, made)
    }

    fn eventually(done: impl Fn() -> bool) {
        let began = std::time::Instant::now();
        while !done() {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not come about");
            std::thread::yield_now();
        }
    }

    #[test]
    fn calls_that_block_hold_up_no_others_while_there_is_a_reserve() {
        let (send, made) = executors(4);
        for round in 0..20 {
            let blocked: Vec<_> = (0..3)
                .map(|_| {
                    let (go_on, waits) = channel();
                    send.send(waits).expect("they listen");
                    go_on
                })
                .collect();
            // The fourth is for those that do not block.
            for _ in 0..50 {
                let (go_on, waits) = channel();
                drop(go_on);
                send.send(waits).expect("they listen");
            }
            let before = round * 53;
            eventually(|| made.load(Ordering::SeqCst) == before + 50);
            drop(blocked);
            eventually(|| made.load(Ordering::SeqCst) == before + 53);
            if round % 4 == 0 {
                // Long enough for the watchman to fall asleep: it must be woken then.
                std::thread::sleep(LATE * (QUIET + 5));
            }
        }
    }
}
