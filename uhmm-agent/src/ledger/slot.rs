//! A process's own part of the ledger.

use std::sync::atomic::Ordering;
use std::time::Duration;

use uhmm::StayReason;

use super::layout::{Identity, Phase, SlotRecord, Word};
use super::numbers::{bucket_of, place_of};
use super::{Counter, Gauge, Ledger, NoteKind};

/// How much of what is free a process gets that does not want any now, in bytes.
const UNWANTED: u64 = 256 << 10;

/// The slot of a process, in which it counts. What is written here is kept when the process is
/// killed.
///
/// A child that is made by `fork` inherits this value, and must not use it: it
/// [claims](Ledger::claim) its own. All methods may be called from any thread, take no lock, and
/// make no system call.
#[derive(Debug)]
pub struct Slot {
    ledger: Ledger,
    index: usize,
    identity: Identity,
}

// Relaxed, all numbers here: each is one by itself, and orders nothing.
impl Slot {
    pub(super) fn new(ledger: Ledger, index: usize, identity: Identity) -> Slot {
        Slot { ledger, index, identity }
    }

    /// Returns the ledger that it is part of.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Returns the number of the process.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Says that the process is managed from now on.
    pub fn attached(&self) {
        if self.enter(Phase::Attached) {
            self.ledger.layout().attached.fetch_add(1, Ordering::Relaxed);
            self.ledger.set_warm(false);
        }
    }

    /// Says that the process is not managed, and why.
    pub fn not_managed(&self, reason: &str) {
        let place = self.ledger.note_place(NoteKind::NotManaged, reason);
        let place = place.map_or(0, |place| place as u64 + 1);
        self.record().reason.store(place, Ordering::Relaxed);
        self.enter(Phase::NotManaged);
    }

    /// Says that the process ends. What it counted stays.
    pub fn ended(&self) {
        self.enter(Phase::Ended);
    }

    /// Tells the user something, in the report.
    pub fn warn(&self, text: &str) {
        self.ledger.note(NoteKind::Warning, text);
    }

    /// Counts `count` more of `counter`.
    pub fn add(&self, counter: Counter, count: u64) {
        self.record().record.counters[counter as usize].fetch_add(count, Ordering::Relaxed);
    }

    /// Sets what was counted of `counter` since the process began, where somebody else counts it.
    pub fn set_counter(&self, counter: Counter, count: u64) {
        self.record().record.counters[counter as usize].store(count, Ordering::Relaxed);
    }

    /// Sets how much there is of `gauge`, in bytes.
    pub fn set(&self, gauge: Gauge, bytes: u64) {
        let record = &self.record().record;
        record.gauges[gauge as usize].store(bytes, Ordering::Relaxed);
        record.peaks[gauge as usize].fetch_max(bytes, Ordering::Relaxed);
    }

    /// Counts `pages` that had to stay for `reason`.
    pub fn stayed(&self, reason: StayReason, pages: u64) {
        self.record().record.stays[place_of(reason)].fetch_add(pages, Ordering::Relaxed);
    }

    /// Takes a part of what the processes leave of the budget, and returns how much more than
    /// `resident` bytes this one may have at home before it asks again. All of it where it is alone;
    /// else half if it is `wanted` now, and little if not.
    ///
    /// No two processes get the same. Each says what it takes before it looks at what the others
    /// have taken, and gives back what is too much; so of two at the same time one at least sees both
    /// (both are SeqCst).
    pub fn promise(&self, resident: u64, wanted: bool) -> u64 {
        let budget = self.ledger.config_budget();
        let (others, processes) = self.ledger.promised_to_others(self.index);
        let free = budget.saturating_sub(others).saturating_sub(resident);
        let more = match (processes, wanted) {
            (0, _) => free,
            (_, true) => free / 2,
            (_, false) => (free / 2).min(UNWANTED),
        };
        let promised = &self.record().promised;
        promised.store(resident.saturating_add(more), Ordering::SeqCst);
        let (others, _) = self.ledger.promised_to_others(self.index);
        let all = others.saturating_add(resident).saturating_add(more);
        let more = more.saturating_sub(all.saturating_sub(budget));
        promised.store(resident.saturating_add(more), Ordering::SeqCst);
        more
    }

    /// Counts a wait for room.
    pub fn waited(&self, time: Duration) {
        self.record().record.waits[bucket_of(time)].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a fault that took `latency` from when it was read, without the wait for room, to when
    /// its thread was woken.
    pub fn fault_served(&self, latency: Duration) {
        self.record().record.latency[bucket_of(latency)].fetch_add(1, Ordering::Relaxed);
    }

    /// Changes the phase, if the slot is still that of this process.
    fn enter(&self, phase: Phase) -> bool {
        let word = &self.record().word;
        let next = Word::new(phase, self.identity);
        let mine = |word: u64| {
            let word = Word(word);
            let taken_away = matches!(word.phase(), Phase::Free | Phase::Retiring);
            (!taken_away && word.identity() == self.identity).then_some(next.0)
        };
        // Release: who sees the phase sees what was written before, the name among it.
        word.fetch_update(Ordering::Release, Ordering::Relaxed, mine).is_ok()
    }

    fn record(&self) -> &SlotRecord {
        &self.ledger.layout().slots[self.index]
    }
}
