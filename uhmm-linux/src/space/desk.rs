//! Who brings pages home before a fork where the threads of this crate have descriptors of their own.
//!
//! The thread that forks runs the C library's hooks, and has the program's descriptors: the
//! userfaultfd is not among them ([`Options::own_descriptors`](crate::Options::own_descriptors)). So
//! it asks at a desk, behind which is a thread that has, and waits until it is done. One thread
//! forks at a time: the hooks see to that.

use std::sync::{Condvar, Mutex, PoisonError};

use super::serve::AbortOnPanic;
use super::{Space, lock};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Errand {
    BeforeFork,
    AfterFork,
}

/// The desk.
#[derive(Debug, Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What is to be done, until it is.
    errand: Option<Errand>,
    /// Whether nobody is behind it any more.
    closed: bool,
}

impl Desk {
    /// Has `errand` done, and waits for that. Once the desk is closed nothing is out, and nothing is
    /// to be done.
    fn ask(&self, errand: Errand) {
        let mut state = lock(&self.state);
        state.errand = Some(errand);
        self.changed.notify_all();
        let waits = |state: &mut State| state.errand.is_some() && !state.closed;
        drop(self.changed.wait_while(state, waits));
    }

    /// Waits for an errand; `None` when the desk is closed.
    fn take(&self) -> Option<Errand> {
        let state = lock(&self.state);
        let waits = |state: &mut State| state.errand.is_none() && !state.closed;
        let state = self.changed.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
        if state.closed { None } else { state.errand }
    }

    /// Says that the errand is done.
    fn done(&self) {
        lock(&self.state).errand = None;
        self.changed.notify_all();
    }

    /// Lets nobody wait here any more.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }
}

impl Space {
    /// Does what is to be done before and after a fork, on a thread that has the descriptors.
    pub(super) fn see_to_fork(&self, errand: Errand) {
        match &self.desk {
            Some(desk) => desk.ask(errand),
            None => self.run(errand),
        }
    }

    fn run(&self, errand: Errand) {
        match errand {
            Errand::BeforeFork => self.before_fork(),
            Errand::AfterFork => self.after_fork(),
        }
    }

    /// Does what threads that fork ask for, until the desk is closed.
    pub(super) fn attend(&self) {
        let abort = AbortOnPanic;
        let desk = self.desk.as_ref().expect("this thread is behind it");
        while let Some(errand) = desk.take() {
            self.run(errand);
            desk.done();
        }
        std::mem::forget(abort);
    }
}
