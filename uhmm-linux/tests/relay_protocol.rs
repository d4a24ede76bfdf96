//! How executors take over from each other, under a checker that draws schedules at random.
//!
//! The module is the crate's own, with the checker's locks and atomics in the place of the system's. A
//! look of the watchman takes no time: it comes at any moment, as on a machine that is busy enough.
//! That executors are not in each other's way is a matter of time, which is not drawn; that calls are
//! made, whatever others wait for, is what is shown here.
//!
//! A failure prints the one schedule that failed, for `shuttle::replay`.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::sync::Arc;

use shuttle::rand::{Rng, thread_rng};

use self::relay::Relay;
use self::sync::{Condvar, Mutex, lock};

#[allow(dead_code, reason = "nothing dawdles here")]
#[path = "../src/mutant.rs"]
mod mutant;
#[path = "../src/announce/relay.rs"]
mod relay;

/// What the module takes from the module around it.
mod sync {
    pub(super) use std::sync::PoisonError;

    use shuttle::sync::MutexGuard;
    pub(super) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(super) use shuttle::sync::{Condvar, Mutex};

    pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().expect("nobody panics")
    }

    /// Time passes as the checker likes.
    pub(super) fn sleep(_: std::time::Duration) {
        shuttle::thread::yield_now();
    }
}

/// How many schedules are drawn.
const SCHEDULES: usize = 1000;

/// How many times calls come, with a pause between, in which the watchman may fall asleep.
const ROUNDS: u64 = 2;

/// What a call waits for.
#[derive(Clone, Copy, Debug)]
enum Call {
    /// Nothing.
    Free,
    /// That so many calls that wait for nothing have been made.
    After(u64),
}

/// Where calls come from, and what has been made of them.
#[derive(Default)]
struct Kernel {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Call>,
    free: u64,
    made: u64,
}

impl Kernel {
    fn send(&self, call: Call) {
        lock(&self.state).waiting.push_back(call);
        self.changed.notify_all();
    }

    /// Waits for a call. Each is received once.
    fn receive(&self) -> Call {
        let mut state = lock(&self.state);
        loop {
            if let Some(call) = state.waiting.pop_front() {
                return call;
            }
            state = self.changed.wait(state).expect("nobody panics");
        }
    }

    /// Makes a call.
    fn make(&self, call: Call) {
        match call {
            Call::Free => lock(&self.state).free += 1,
            Call::After(count) => self.until(|state| state.free >= count),
        }
        lock(&self.state).made += 1;
        self.changed.notify_all();
    }

    fn until(&self, done: impl Fn(&State) -> bool) {
        let state = lock(&self.state);
        drop(self.changed.wait_while(state, |state| !done(state)).expect("nobody panics"));
    }
}

/// Does what an executor does, for ever.
fn execute(relay: &Relay, kernel: &Kernel) {
    loop {
        let lead = relay.wait_for_lead();
        let mut leads = true;
        while leads {
            let call = kernel.receive();
            let number = relay.begin(lead);
            kernel.make(call);
            leads = relay.end(number, lead);
        }
    }
}

/// Lets calls come of which so many wait for the others, with one executor more.
fn calls_that_wait(blocking: u64) {
    let (relay, kernel) = (Arc::new(Relay::default()), Arc::new(Kernel::default()));
    for _ in 0..=blocking {
        let (relay, kernel) = (Arc::clone(&relay), Arc::clone(&kernel));
        // Nobody waits for its end, so it need not come: only tasks can be left behind here.
        drop(shuttle::future::spawn(async move { execute(&relay, &kernel) }));
    }
    for round in 1..=ROUNDS {
        let free = 2 * round;
        let mut calls = vec![Call::After(free); blocking as usize];
        (0..2).for_each(|_| calls.insert(thread_rng().gen_range(0..=calls.len()), Call::Free));
        calls.into_iter().for_each(|call| kernel.send(call));
        // If nobody takes over, all wait: the checker calls that a deadlock.
        kernel.until(|state| state.made == round * (blocking + 2));
        // Long enough for the watchman to fall asleep, or not.
        (0..thread_rng().gen_range(0..200)).for_each(|_| shuttle::thread::yield_now());
    }
}

#[test]
fn one_call_that_waits_holds_up_no_other() {
    shuttle::check_random(|| calls_that_wait(1), SCHEDULES);
}

#[test]
fn while_one_executor_is_left_calls_are_made() {
    shuttle::check_random(|| calls_that_wait(3), SCHEDULES);
}
