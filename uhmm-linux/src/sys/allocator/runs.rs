//! Who has which spans: a bit for each.
//!
//! A span is 64 KiB; what is too large for a class of small objects has a run of spans of its own.
//! Taking a run sets its bits word by word, and gives up those that it has set where one is taken:
//! nobody waits for anybody. First fit keeps what is in use together at the low end.
//!
//! A span that is given back may keep its memory, up to [`KEPT_SPANS`] in all: programs that take
//! and give back large buffers in a loop would otherwise spend their time in faults. A second bit
//! says which spans may hold old contents, so that whoever needs zeroes knows where to write them.

use super::atomics::{AtomicU32, AtomicU64, Ordering};

/// The bytes of a span.
pub(super) const SPAN_BYTES: usize = 1 << 16;

/// How many free spans keep their memory: 32 MiB, which is also where the C library stops.
const KEPT_SPANS: u32 = 512;

/// The bits of a word.
const BITS: u32 = u64::BITS;

/// Two bits for each of `spans` spans.
#[derive(Clone, Copy, Debug)]
pub(super) struct Runs<'a> {
    /// Set for a span that belongs to somebody. Bits past the last span are set.
    pub(super) used: &'a [AtomicU64],
    /// Set for a free span that may hold something else than zeroes.
    pub(super) dirty: &'a [AtomicU64],
    /// What is known of all of them.
    pub(super) summary: &'a Summary,
}

/// What is known of all spans at once; zeroes to begin with.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub(super) struct Summary {
    /// In the low half a word of `used` before which there is no free span; in the high half how
    /// often it has been told of a span given back, so that whoever raises it knows that no span
    /// was given back while it looked.
    lowest: AtomicU64,
    /// How many free spans keep their memory.
    dirty: AtomicU32,
}

/// A run that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Its first span.
    pub(super) first: u32,
    /// Whether all of it reads as zeroes.
    pub(super) zeroes: bool,
}

impl Runs<'_> {
    /// Takes the lowest run of `spans` spans whose first is a multiple of `align`, a power of two;
    /// `None` where there is none.
    pub(super) fn take(self, spans: u32, align: u32) -> Option<Run> {
        // Acquire: pairs with `give_back`, so that what it says about the spans before is so.
        let lowest = self.summary.lowest.load(Ordering::Acquire);
        let mut at = self.next_free(lowest as u32 * BITS)?;
        let raised = lowest & !u64::from(u32::MAX) | u64::from(at / BITS);
        // Relaxed, and no matter if it fails: it is where the next search begins.
        let _ = self.summary.lowest.compare_exchange(
            lowest,
            raised,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        loop {
            at = self.next_free(at)?.checked_next_multiple_of(align)?;
            match self.take_exactly(at, spans) {
                Ok(zeroes) => return Some(Run { first: at, zeroes }),
                Err(taken) => at = taken + 1,
            }
        }
    }

    /// Takes the spans from `first`, and says whether all of them read as zeroes; or returns one of
    /// them that somebody has, the last in its word.
    pub(super) fn take_exactly(self, first: u32, spans: u32) -> Result<bool, u32> {
        let end = first.checked_add(spans).ok_or(first)?;
        if end as usize > self.used.len() * BITS as usize {
            // The last bit there is, so that the search ends.
            return Err((self.used.len() as u32 * BITS) - 1);
        }
        for (word, mask) in pieces(first, end) {
            // Acquire: pairs with `give_back`, so that what the one before did to the memory is
            // over.
            let set = self.used[word].fetch_update(Ordering::Acquire, Ordering::Relaxed, |bits| {
                (bits & mask == 0).then_some(bits | mask)
            });
            if let Err(bits) = set {
                let taken = BITS - 1 - (bits & mask).leading_zeros();
                self.clear(first, word as u32 * BITS);
                return Err(word as u32 * BITS + taken);
            }
        }
        let mut dirty = 0;
        for (word, mask) in pieces(first, end) {
            // Relaxed: the spans are ours, and `used` has ordered us after who had them before.
            if self.dirty[word].load(Ordering::Relaxed) & mask != 0 {
                let bits = self.dirty[word].fetch_and(!mask, Ordering::Relaxed);
                dirty += (bits & mask).count_ones();
            }
        }
        if dirty != 0 {
            // Relaxed: a number that nothing else hangs on.
            self.summary.dirty.fetch_sub(dirty, Ordering::Relaxed);
        }
        Ok(dirty == 0)
    }

    /// Gives back spans that the caller has. `zap` makes them read as zeroes and give up their
    /// memory, or returns `false` if it cannot; it is called where enough other spans keep theirs.
    pub(super) fn give_back(self, first: u32, spans: u32, zap: impl FnOnce() -> bool) {
        // Relaxed: a number that nothing else hangs on.
        let kept = self.summary.dirty.fetch_add(spans, Ordering::Relaxed);
        if kept.saturating_add(spans) > KEPT_SPANS && zap() {
            self.summary.dirty.fetch_sub(spans, Ordering::Relaxed);
        } else {
            for (word, mask) in pieces(first, first + spans) {
                // Relaxed: `used` below orders it before whoever takes the span next.
                self.dirty[word].fetch_or(mask, Ordering::Relaxed);
            }
        }
        self.clear(first, first + spans);
    }

    /// Clears the bits from `first` to before `end`, which are ours.
    fn clear(self, first: u32, end: u32) {
        for (word, mask) in pieces(first, end) {
            // Release: pairs with `take_exactly`.
            self.used[word].fetch_and(!mask, Ordering::Release);
        }
        if first < end {
            let lower = |lowest: u64| {
                let count = (lowest >> 32).wrapping_add(1) << 32;
                Some(count | u64::from((lowest as u32).min(first / BITS)))
            };
            // Release: pairs with `take`, which then finds the bits cleared.
            let told =
                self.summary.lowest.fetch_update(Ordering::Release, Ordering::Relaxed, lower);
            debug_assert!(told.is_ok(), "the closure never declines");
        }
    }

    /// Tells whether a span belongs to somebody.
    #[cfg(test)]
    pub(super) fn is_used(self, span: u32) -> bool {
        self.used[(span / BITS) as usize].load(Ordering::SeqCst) >> (span % BITS) & 1 != 0
    }

    /// Checks that the bits and the summary agree. Nobody may be using the runs.
    #[cfg(test)]
    pub(super) fn check(self) {
        let lowest = self.summary.lowest.load(Ordering::SeqCst) as u32;
        let free = self.next_free(0);
        assert!(free.is_none_or(|free| free / BITS >= lowest), "{free:?} is before word {lowest}");
        let mut dirty = 0;
        for (dirty_bits, used) in self.dirty.iter().zip(self.used) {
            let bits = dirty_bits.load(Ordering::SeqCst);
            assert_eq!(bits & used.load(Ordering::SeqCst), 0, "a span is dirty and in use");
            dirty += bits.count_ones();
        }
        assert_eq!(self.summary.dirty.load(Ordering::SeqCst), dirty);
    }

    /// Returns the first free span that is not before `at`.
    fn next_free(self, at: u32) -> Option<u32> {
        let (first, mut skip) = (at / BITS, (1_u64 << (at % BITS)) - 1);
        for (word, bits) in self.used.iter().enumerate().skip(first as usize) {
            // Relaxed: advisory, `take_exactly` finds out.
            let free = !bits.load(Ordering::Relaxed) & !skip;
            if free != 0 {
                return Some(word as u32 * BITS + free.trailing_zeros());
            }
            skip = 0;
        }
        None
    }
}

/// Cuts the bits from `first` to before `end` into words: the number of each, and which of its
/// bits.
fn pieces(first: u32, end: u32) -> impl Iterator<Item = (usize, u64)> {
    let mut at = first;
    core::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (word, skip) = (at / BITS, at % BITS);
        let bits = (end - at).min(BITS - skip);
        at += bits;
        Some((word as usize, (u64::MAX >> (BITS - bits)) << skip))
    })
}
