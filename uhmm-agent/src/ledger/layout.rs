//! How the ledger lies in memory: atomics, in a fixed order.
//!
//! The supervisor and the agents are of one build: see [`VERSION`].

use std::sync::atomic::{AtomicU64, Ordering};

use super::numbers::{BUCKETS, Counter, Gauge, Numbers, STAYS};

/// The first word: "uhmmrun" and a zero.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"uhmmrun\0");

/// The version of the layout, and of what the numbers mean: that of one build is no other's.
pub(crate) const VERSION: u64 = crate::BUILD;

/// What stands for a size that nobody has said.
pub(crate) const NOT_SAID: u64 = u64::MAX;

/// How many processes can be in the ledger at a time.
pub const SLOTS: usize = 1024;

/// How many different remarks there can be.
pub(crate) const NOTES: usize = 64;

/// The longest device specification, in bytes: a path (`PATH_MAX`) and what stands around it.
pub const DEVICE_BYTES: usize = 4096 + 64;

/// The whole ledger: atomics and nothing else, since it is [shared](crate::edge::mapping::Shared).
#[repr(C)]
pub(crate) struct Layout {
    pub(crate) magic: AtomicU64,
    pub(crate) version: AtomicU64,
    /// Drawn at random: tells this ledger from another that happens to be where it was.
    pub(crate) token: AtomicU64,
    /// The process-id namespace in which all processes of the ledger are.
    pub(crate) pid_namespace: AtomicU64,
    pub(crate) budget: AtomicU64,
    pub(crate) verify: AtomicU64,
    pub(crate) announced: AtomicU64,
    /// In bytes, or [`NOT_SAID`].
    pub(crate) attach_at: AtomicU64,
    pub(crate) device: Text<{ DEVICE_BYTES / 8 }>,
    pub(crate) policy: Text<32>,
    /// How many slots were ever in use.
    pub(crate) slots_used: AtomicU64,
    /// Processes that took a slot, that attached, and that found no slot.
    pub(crate) started: AtomicU64,
    pub(crate) attached: AtomicU64,
    pub(crate) without_slot: AtomicU64,
    /// Remarks for which there was no place.
    pub(crate) notes_lost: AtomicU64,
    /// Whether the tree was brought within its budget since a process joined it, or forked; and the
    /// most of `Resident` that was seen while it was so.
    pub(crate) warm: AtomicU64,
    pub(crate) warm_peak: AtomicU64,
    /// The most of `Resident` and `Away` together that was seen.
    pub(crate) demand_peak: AtomicU64,
    /// What there was when the most was away that was seen.
    pub(crate) most_away: [AtomicU64; Gauge::COUNT],
    /// What ended processes counted, and the peaks of all together.
    pub(crate) totals: Record,
    pub(crate) notes: [Note; NOTES],
    pub(crate) slots: [SlotRecord; SLOTS],
}

/// What is told of one process.
#[repr(C)]
pub(crate) struct SlotRecord {
    /// Whose it is, and in what state: see [`Word`].
    pub(crate) word: AtomicU64,
    /// Why it is not managed: the place of a note, and one more.
    pub(crate) reason: AtomicU64,
    /// How much the process may have at home before it asks again, in bytes.
    pub(crate) promised: AtomicU64,
    pub(crate) name: Text<8>,
    pub(crate) record: Record,
}

/// The numbers of a process, or of all that have ended.
#[repr(C)]
pub(crate) struct Record {
    pub(crate) counters: [AtomicU64; Counter::COUNT],
    pub(crate) gauges: [AtomicU64; Gauge::COUNT],
    pub(crate) peaks: [AtomicU64; Gauge::COUNT],
    pub(crate) stays: [AtomicU64; STAYS],
    pub(crate) latency: [AtomicU64; BUCKETS],
    pub(crate) waits: [AtomicU64; BUCKETS],
}

// Relaxed, all that follows: each number is one by itself, and orders nothing.
impl Record {
    /// Returns a copy.
    pub(crate) fn read(&self) -> Numbers {
        let mut numbers = Numbers::default();
        copy(&self.counters, &mut numbers.counters);
        copy(&self.gauges, &mut numbers.gauges);
        copy(&self.peaks, &mut numbers.peaks);
        copy(&self.stays, &mut numbers.stays);
        copy(&self.latency, &mut numbers.latency.buckets);
        copy(&self.waits, &mut numbers.waits.buckets);
        numbers
    }

    /// Moves what was counted into `totals`, and leaves zeroes. May be done again by somebody else
    /// if it was not finished: nothing is counted twice, and at most the one number that was being
    /// moved when its mover was killed is lost.
    pub(crate) fn retire_into(&self, totals: &Record) {
        let mv = |from: &[AtomicU64], to: &[AtomicU64]| {
            for (from, to) in from.iter().zip(to) {
                match from.swap(0, Ordering::Relaxed) {
                    0 => {}
                    value => drop(to.fetch_add(value, Ordering::Relaxed)),
                }
            }
        };
        mv(&self.counters, &totals.counters);
        mv(&self.stays, &totals.stays);
        mv(&self.latency, &totals.latency);
        mv(&self.waits, &totals.waits);
        // What a process had at home, away or in store went with it.
        let clear = |numbers: &[AtomicU64]| {
            numbers.iter().for_each(|number| number.store(0, Ordering::Relaxed));
        };
        clear(&self.gauges);
        clear(&self.peaks);
    }
}

fn copy(from: &[AtomicU64], to: &mut [u64]) {
    from.iter().zip(to).for_each(|(from, to)| *to = from.load(Ordering::Relaxed));
}

/// A remark that anybody may make: the same remark is in one place, and counted.
#[repr(C)]
pub(crate) struct Note {
    /// 0: nothing is here; 1: somebody writes here; 2: it can be read.
    pub(crate) state: AtomicU64,
    pub(crate) kind: AtomicU64,
    pub(crate) count: AtomicU64,
    pub(crate) text: Text<63>,
}

/// Up to `8 * WORDS` bytes. A reader gets whole texts as long as it is written once, before the
/// reader knows of it; else it may get a mixture, which is why nobody trusts what is in it.
#[repr(C)]
pub(crate) struct Text<const WORDS: usize> {
    bytes: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl<const WORDS: usize> Text<WORDS> {
    /// Writes `text`, or as much of it as there is room for.
    pub(crate) fn write(&self, text: &[u8]) {
        let text = &text[..text.len().min(8 * WORDS)];
        self.bytes.store(0, Ordering::Relaxed);
        for (word, chunk) in self.words.iter().zip(text.chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        // Release: whoever sees this length (Acquire in `read`) sees the bytes.
        self.bytes.store(text.len() as u64, Ordering::Release);
    }

    /// Returns what was written.
    pub(crate) fn read(&self) -> Vec<u8> {
        // Acquire: the store in `write`.
        let bytes = self.bytes.load(Ordering::Acquire);
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(8 * WORDS);
        let words = self.words[..bytes.div_ceil(8)].iter();
        let mut text: Vec<u8> =
            words.flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        text.truncate(bytes);
        text
    }
}

/// The word that says whose a slot is: the process and its state in one, so that both change at
/// once.
///
/// A process is known by its number and the time of its start, since numbers are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

/// Which process: its number (`PID_MAX_LIMIT` is 2^22), and when it started, in clock ticks since
/// the machine did (38 bits are 87 years).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    pub(crate) started: u64,
}

const PID_BITS: u32 = 22;
const START_BITS: u32 = 38;

/// What a slot's word says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Free,
    Starting,
    Attached,
    NotManaged,
    Ended,
    /// The process in the word, another one, is moving the numbers to the totals.
    Retiring,
}

impl Word {
    pub(crate) const FREE: Word = Word(0);

    pub(crate) fn new(phase: Phase, identity: Identity) -> Word {
        let pid = u64::from(identity.pid) & ((1 << PID_BITS) - 1);
        let started = identity.started & ((1 << START_BITS) - 1);
        Word((phase as u64) << (PID_BITS + START_BITS) | started << PID_BITS | pid)
    }

    pub(crate) fn identity(self) -> Identity {
        Identity {
            pid: (self.0 & ((1 << PID_BITS) - 1)) as u32,
            started: self.0 >> PID_BITS & ((1 << START_BITS) - 1),
        }
    }

    pub(crate) fn phase(self) -> Phase {
        match self.0 >> (PID_BITS + START_BITS) {
            1 => Phase::Starting,
            2 => Phase::Attached,
            3 => Phase::NotManaged,
            4 => Phase::Ended,
            5 => Phase::Retiring,
            _ => Phase::Free,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_keeps_what_is_in_it() {
        let phases =
            [Phase::Starting, Phase::Attached, Phase::NotManaged, Phase::Ended, Phase::Retiring];
        for phase in phases {
            for (pid, started) in [(1, 0), (4_194_303, 1), (77, (1 << 38) - 1)] {
                let identity = Identity { pid, started };
                let word = Word::new(phase, identity);
                assert_eq!((word.phase(), word.identity()), (phase, identity));
            }
        }
        assert_eq!(Word::FREE.phase(), Phase::Free);
    }

    #[test]
    fn a_text_is_cut_to_its_room() {
        let text: Text<2> =
            Text { bytes: AtomicU64::new(0), words: [const { AtomicU64::new(0) }; 2] };
        for (written, read) in
            [("", ""), ("seven", "seven"), ("0123456789abcdefgh", "0123456789abcdef")]
        {
            text.write(written.as_bytes());
            assert_eq!(text.read(), read.as_bytes());
        }
        // A length that nobody here wrote.
        text.bytes.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(text.read().len(), 16);
    }
}
