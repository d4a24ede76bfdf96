//! Where contexts report what they could not reach, and sleep until it was seen to.
//!
//! A context that finds no translation, or one that allows too little, puts a [`Packet`] into the
//! buffer and sleeps. The driver takes packets out in batches, sees to their pages, and *replays*:
//! every sleeping context wakes and tries its access again. One whose page was not served yet finds
//! that out by itself and reports again, so packets may be dropped at a replay
//! ([`flush`](FaultBuffer::replay)), and a packet that is reported twice does no harm. What cannot
//! be served is *cancelled*: the one context wakes, and its access fails.
//!
//! # Nobody faults for ever
//!
//! A replay wakes contexts whose packets are still in the buffer, and each reports again. If what is
//! left of them were served like any other, a fault that cannot be served could go round for ever:
//! the packet at hand is of before the last replay, so there is nobody to cancel, and the replay that
//! follows makes the next packet one like it. Two things prevent that. A packet is fetched only if
//! somebody waits for it; and the ticket by which it is cancelled is that of the access, not of the
//! one fault, so that the access is found also where it has reported again. It may be cancelled
//! then: what was found out about its page was true after the access began.
//!
//! # Nobody sleeps for ever
//!
//! A context sleeps only while its ticket has no outcome, and all of this is under one lock. Each
//! end gives every ticket concerned its outcome, and refuses those that come later: the end of a
//! mirror ([`end_tables`](FaultBuffer::end_tables)), and the end of the service
//! ([`close`](FaultBuffer::close)). A buffer that is full makes a context wait the same way. Where
//! nobody serves the buffer at all, a context gives up after its patience.
//!
//! # Stop and drain
//!
//! An access is under way from the ticket it gets with its first fault until
//! [`end_access`](FaultBuffer::end_access). While a service is being stopped, faults of accesses
//! that are under way are taken and others are refused, and the service ends when no access is under
//! way any more. So one that was replayed before its page was served comes again and is served
//! (acceptance D11).
//!
//! The lock is a leaf: nothing is called under it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use uhmm::primitive::atomic::AtomicU32;
use uhmm::primitive::{Condvar, Mutex, MutexGuard, lock, wait};
use uhmm::{Access, MirrorHandle, Page};

use super::SoftGpu;
use super::fault::FaultReason;
use super::tables::Tables;

/// A fault, as the hardware reports it.
#[derive(Clone)]
pub(crate) struct Packet {
    /// The access it is of: all faults of one access have one ticket.
    pub(crate) ticket: Option<u64>,
    pub(crate) handle: MirrorHandle<SoftGpu>,
    pub(crate) tables: Arc<Tables>,
    pub(crate) page: Page,
    pub(crate) access: Access,
    /// How often serving the access has failed in a way that may pass.
    pub(crate) failures: Arc<AtomicU32>,
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Try again.
    Replayed,
    /// The access has failed.
    Cancelled(FaultReason),
}

/// What the fault buffer has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FaultStatistics {
    /// Faults that contexts reported.
    pub reported: u64,
    /// Faults that found the buffer full, and waited or were replayed at once.
    pub overflows: u64,
    /// Faults that were taken out of the buffer to be served.
    pub fetched: u64,
    /// Of those, faults on a page that another fault of the same batch is on.
    pub duplicates: u64,
    /// Pages that needed no service any more when their turn came.
    pub already_served: u64,
    /// Faults that were dropped because their access was replayed or has ended since.
    pub stale: u64,
    /// Faults that were dropped at a replay, to be reported again if need be.
    pub flushed: u64,
    /// Replays.
    pub replays: u64,
    /// Faults that were replayed because serving them failed in a way that may pass.
    pub retried: u64,
    /// Accesses that were made to fail.
    pub cancelled: u64,
}

/// The fault buffer of a GPU.
pub(crate) struct FaultBuffer {
    capacity: usize,
    state: Mutex<State>,
    /// Somebody has an outcome, or there is room in the buffer.
    settled: Condvar,
    /// There is something to be served, or the service is to end.
    reported: Condvar,
}

#[derive(Default)]
struct State {
    ring: VecDeque<Packet>,
    waiters: BTreeMap<u64, Waiter>,
    tickets: u64,
    /// Accesses that have a ticket and have not ended.
    under_way: u64,
    /// Contexts that sleep because the buffer is full.
    crowded: usize,
    admission: Admission,
    /// The service thread is to end when no access is under way.
    stopping: bool,
    serving: bool,
    statistics: FaultStatistics,
}

/// Which faults are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Admission {
    /// All.
    #[default]
    Open,
    /// Those of accesses that are under way: the service is being stopped.
    Draining,
    /// None: nobody serves them.
    Closed,
}

struct Waiter {
    tables: u64,
    outcome: Option<Outcome>,
}

impl FaultBuffer {
    pub(crate) fn new(capacity: usize) -> FaultBuffer {
        FaultBuffer {
            capacity,
            state: Mutex::default(),
            settled: Condvar::new(),
            reported: Condvar::new(),
        }
    }

    /// Reports a fault and sleeps until it has an outcome. The first fault of an access gets the
    /// ticket of the access here, and [`end_access`](FaultBuffer::end_access) is to follow. With
    /// `twice`, the packet goes in twice if there is room.
    ///
    /// An access that was replayed while its packet was in the buffer has that one served: it needs
    /// neither a second nor room for it.
    pub(crate) fn report(
        &self,
        packet: &mut Packet,
        twice: bool,
        deadline: Option<Instant>,
    ) -> Outcome {
        let mut state = lock(&self.state);
        state.statistics.reported += 1;
        let held = state.holds(packet.ticket);
        if !held && state.ring.len() >= self.capacity {
            state.statistics.overflows += 1;
        }
        let mut in_time = true;
        loop {
            if let Some(reason) = state.refuses(packet) {
                return state.cancelled(reason);
            }
            if held || state.ring.len() < self.capacity {
                break;
            }
            if !in_time {
                return state.cancelled(FaultReason::Unserved);
            }
            state.crowded += 1;
            (state, in_time) = wait(&self.settled, state, deadline);
            state.crowded -= 1;
        }
        let ticket = packet.ticket.unwrap_or_else(|| {
            state.under_way += 1;
            state.tickets += 1;
            state.tickets
        });
        packet.ticket = Some(ticket);
        let tables = packet.tables.id();
        state.waiters.insert(ticket, Waiter { tables, outcome: None });
        if twice && state.ring.len() + 1 < self.capacity {
            state.ring.push_back(packet.clone());
        }
        if !held {
            state.ring.push_back(packet.clone());
        }
        self.reported.notify_all();
        self.sleep(state, ticket, deadline)
    }

    fn sleep<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        ticket: u64,
        deadline: Option<Instant>,
    ) -> Outcome {
        loop {
            let waiter = state.waiters.get(&ticket).expect("a waiter removes itself");
            if let Some(outcome) = waiter.outcome {
                state.waiters.remove(&ticket);
                return outcome;
            }
            let (guard, in_time) = wait(&self.settled, state, deadline);
            state = guard;
            if !in_time {
                let waiter = state.waiters.remove(&ticket).expect("a waiter removes itself");
                let given_up = || {
                    state.ring.retain(|packet| packet.ticket != Some(ticket));
                    // There is room now.
                    self.settled.notify_all();
                    state.cancelled(FaultReason::Unserved)
                };
                return waiter.outcome.unwrap_or_else(given_up);
            }
        }
    }

    /// Notes that an access which has a ticket has ended, well or not.
    pub(crate) fn end_access(&self) {
        let mut state = lock(&self.state);
        state.under_way -= 1;
        if state.stopping && state.under_way == 0 {
            self.reported.notify_all();
        }
    }

    /// Counts a fault that is replayed at once because the buffer is full, or seems so.
    pub(crate) fn overflow(&self) {
        let mut state = lock(&self.state);
        state.statistics.reported += 1;
        state.statistics.overflows += 1;
    }

    /// Takes out up to `batch` packets that somebody waits for, the oldest first.
    pub(crate) fn fetch(&self, batch: usize) -> Vec<Packet> {
        let mut state = lock(&self.state);
        let fetched = state.take(batch);
        self.settled.notify_all();
        fetched
    }

    /// Sleeps until there are packets or the service is to end, and takes out up to `batch`.
    /// Nothing where it is to end and no access is under way, so that no fault can come.
    pub(crate) fn fetch_blocking(&self, batch: usize) -> Vec<Packet> {
        let mut state = lock(&self.state);
        loop {
            let fetched = state.take(batch);
            // Also where all it took were stale: there is room now.
            self.settled.notify_all();
            if !fetched.is_empty() || (state.stopping && state.under_way == 0) {
                return fetched;
            }
            (state, _) = wait(&self.reported, state, None);
        }
    }

    /// Wakes every context that sleeps, to try its access again. With `flush`, what is in the buffer
    /// is dropped first: those whose pages were not served will report again. Not so while the
    /// service is being stopped: then the buffer is to become empty.
    pub(crate) fn replay(&self, flush: bool) {
        let mut state = lock(&self.state);
        // Dropped when the lock is not held: a packet may be the last to know its address space.
        let flush = flush && state.admission == Admission::Open;
        let dropped = if flush { std::mem::take(&mut state.ring) } else { VecDeque::new() };
        state.statistics.flushed += dropped.len() as u64;
        state.statistics.replays += 1;
        for waiter in state.waiters.values_mut() {
            waiter.outcome.get_or_insert(Outcome::Replayed);
        }
        self.settled.notify_all();
        drop(state);
    }

    /// Makes the accesses of these packets fail, and of no others. One that was replayed meanwhile
    /// fails if it has reported again; else it will be back.
    pub(crate) fn cancel<'a>(
        &self,
        packets: impl IntoIterator<Item = &'a Packet>,
        reason: FaultReason,
    ) -> u64 {
        let mut state = lock(&self.state);
        let mut cancelled = 0;
        for packet in packets {
            let waiter = packet.ticket.and_then(|ticket| state.waiters.get_mut(&ticket));
            if let Some(waiter) = waiter.filter(|waiter| waiter.outcome.is_none()) {
                waiter.outcome = Some(Outcome::Cancelled(reason));
                cancelled += 1;
            }
        }
        state.statistics.cancelled += cancelled;
        self.settled.notify_all();
        cancelled
    }

    /// Ends the faults of a mirror that ends: those that sleep are cancelled, and those that come
    /// later are refused.
    pub(crate) fn end_tables(&self, tables: &Tables) {
        let mut state = lock(&self.state);
        tables.set_gone();
        state.ring.retain(|packet| packet.tables.id() != tables.id());
        let reason = FaultReason::Gone;
        state.cancel_all(|waiter| waiter.tables == tables.id(), reason);
        self.settled.notify_all();
    }

    /// Lets a service thread begin; `false` if there is one.
    pub(crate) fn open(&self) -> bool {
        let mut state = lock(&self.state);
        if state.serving {
            return false;
        }
        (state.admission, state.stopping, state.serving) = (Admission::Open, false, true);
        true
    }

    /// Takes faults again, unless a service is being stopped: that comes to its end first.
    pub(crate) fn reopen(&self) {
        let mut state = lock(&self.state);
        if !state.stopping {
            state.admission = Admission::Open;
        }
    }

    /// Tells whether an access may begin to fault.
    pub(crate) fn is_open(&self) -> bool {
        lock(&self.state).admission == Admission::Open
    }

    /// Refuses faults of new accesses from now on, and lets the service thread end when none is
    /// under way.
    pub(crate) fn stop(&self) {
        let mut state = lock(&self.state);
        if state.admission == Admission::Open {
            state.admission = Admission::Draining;
        }
        state.stopping = true;
        self.reported.notify_all();
        self.settled.notify_all();
    }

    /// Refuses faults from now on, and cancels those that there are: nobody will serve them.
    pub(crate) fn abandon(&self) {
        let mut state = lock(&self.state);
        state.admission = Admission::Closed;
        // Dropped when the lock is not held, as in `replay`.
        let _dropped = std::mem::take(&mut state.ring);
        state.cancel_all(|_| true, FaultReason::Stopped);
        self.settled.notify_all();
        drop(state);
    }

    /// Ends the service: the thread has ended, or never began. Nobody sleeps any more, unless the
    /// thread panicked; who does is cancelled.
    pub(crate) fn close(&self) {
        self.abandon();
        let mut state = lock(&self.state);
        (state.stopping, state.serving) = (false, false);
    }

    /// Tells how many faults wait to be fetched.
    pub(crate) fn len(&self) -> usize {
        lock(&self.state).ring.len()
    }

    /// Tells how many contexts sleep: until they have an outcome, or until there is room.
    pub(crate) fn sleepers(&self) -> usize {
        let state = lock(&self.state);
        let waiting = state.waiters.values().filter(|waiter| waiter.outcome.is_none());
        waiting.count() + state.crowded
    }

    pub(crate) fn statistics(&self) -> FaultStatistics {
        lock(&self.state).statistics
    }

    /// Adds to the figures.
    pub(crate) fn count(&self, add: impl FnOnce(&mut FaultStatistics)) {
        add(&mut lock(&self.state).statistics);
    }
}

impl State {
    fn refuses(&self, packet: &Packet) -> Option<FaultReason> {
        if packet.tables.is_gone() {
            return Some(FaultReason::Gone);
        }
        let taken = match self.admission {
            Admission::Open => true,
            Admission::Draining => packet.ticket.is_some(),
            Admission::Closed => false,
        };
        (!taken).then_some(FaultReason::Stopped)
    }

    /// Tells whether a packet of this ticket is in the buffer.
    fn holds(&self, ticket: Option<u64>) -> bool {
        ticket.is_some() && self.ring.iter().any(|packet| packet.ticket == ticket)
    }

    fn cancelled(&mut self, reason: FaultReason) -> Outcome {
        self.statistics.cancelled += 1;
        Outcome::Cancelled(reason)
    }

    fn cancel_all(&mut self, concerned: impl Fn(&Waiter) -> bool, reason: FaultReason) {
        let sleeping = self.waiters.values_mut().filter(|waiter| waiter.outcome.is_none());
        for waiter in sleeping.filter(|waiter| concerned(waiter)) {
            waiter.outcome = Some(Outcome::Cancelled(reason));
            self.statistics.cancelled += 1;
        }
    }

    fn take(&mut self, batch: usize) -> Vec<Packet> {
        let mut fetched = Vec::new();
        while fetched.len() < batch
            && let Some(packet) = self.ring.pop_front()
        {
            let waiter = packet.ticket.and_then(|ticket| self.waiters.get(&ticket));
            if waiter.is_some_and(|waiter| waiter.outcome.is_none()) {
                fetched.push(packet);
            } else {
                self.statistics.stale += 1;
            }
        }
        self.statistics.fetched += fetched.len() as u64;
        fetched
    }
}
