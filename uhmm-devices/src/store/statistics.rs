//! What a store holds, what that takes, and what failed.

use uhmm::PAGE_SIZE;
use uhmm::primitive::atomic::{AtomicU64, Ordering};

/// What a store holds now, what that takes, and what it has done since it was made.
///
/// Each number is exact. They are not of one moment while others use the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStatistics {
    /// Pages held that are zeroes. Nothing is kept of them.
    pub zero_pages: u64,
    /// Pages held that repeat a word other than zero. Only the word is kept, beside the page's
    /// entry.
    pub same_filled_pages: u64,
    /// Pages held that are compressed.
    pub compressed_pages: u64,
    /// Pages held as they are: in compressed memory, because they do not compress; in a file, all
    /// that are not zeroes.
    pub incompressible_pages: u64,
    /// The bytes that are kept of the pages.
    pub stored_bytes: u64,
    /// The bytes that are taken to keep those in: of memory in slabs, or of the file in extents.
    /// This is what the limit holds for.
    pub taken_bytes: u64,
    /// The most bytes that were ever taken.
    pub peak_bytes: u64,
    /// The bytes of memory that the tables and buffers take, besides.
    pub table_bytes: u64,
    /// The most bytes that may be taken.
    pub limit_bytes: Option<u64>,
    /// Pages that came in since the store was made, one that came twice counting twice.
    pub pages_in: u64,
    /// Pages that were copied out.
    pub pages_out: u64,
    /// Pages and extents for which there was no room, within the limit, in memory or on the disk.
    pub refused: u64,
    /// Reads that failed, and pages that could not be decompressed.
    pub failed_reads: u64,
    /// Writes that failed for another reason than that there was no room.
    pub failed_writes: u64,
    /// Pages that were not what was stored. See [`Verification`](super::Verification).
    pub mismatches: u64,
}

impl StoreStatistics {
    /// Returns how many pages are held.
    pub fn pages(&self) -> u64 {
        self.zero_pages + self.same_filled_pages + self.compressed_pages + self.incompressible_pages
    }

    /// Returns how many bytes the pages have that are held.
    pub fn raw_bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }

    /// Returns how many bytes of pages there are for each byte that is taken for them, tables
    /// included; `None` if nothing is taken.
    ///
    /// ```
    /// # use uhmm_devices::store::{Compressed, StoreOptions};
    /// let store = Compressed::new(StoreOptions::new());
    /// if let Some(ratio) = store.statistics().ratio() {
    ///     println!("{ratio:.2} times less");
    /// }
    /// ```
    pub fn ratio(&self) -> Option<f64> {
        let taken = self.taken_bytes + self.table_bytes;
        (taken > 0).then(|| self.raw_bytes() as f64 / taken as f64)
    }
}

/// How a page is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing was stored yet.
    #[default]
    Fresh,
    /// It is zeroes.
    Zero,
    /// It repeats a word.
    SameFilled,
    /// As so many bytes, compressed.
    Compressed(u16),
    /// As it is.
    AsItIs,
}

/// The counters of a store. Relaxed, all of them: a counter orders nothing.
#[derive(Default)]
pub(super) struct Counters {
    zero_pages: AtomicU64,
    same_filled_pages: AtomicU64,
    compressed_pages: AtomicU64,
    incompressible_pages: AtomicU64,
    stored_bytes: AtomicU64,
    taken_bytes: AtomicU64,
    peak_bytes: AtomicU64,
    pub(super) pages_in: Counter,
    pub(super) pages_out: Counter,
    pub(super) refused: Counter,
    pub(super) failed_reads: Counter,
    pub(super) failed_writes: Counter,
    pub(super) mismatches: Counter,
}

/// One of them that only grows.
#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        // Relaxed: see `Counters`.
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        // Relaxed: see `Counters`.
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    /// Notes that one page is held in another way than before.
    pub(super) fn held(&self, before: Held, after: Held) {
        for (held, add) in [(after, true), (before, false)] {
            let step = |counter: &AtomicU64, by: u64| {
                // Relaxed: see `Counters`. The page's owner alone tells of it, so none is below 0.
                match add {
                    true => counter.fetch_add(by, Ordering::Relaxed),
                    false => counter.fetch_sub(by, Ordering::Relaxed),
                };
            };
            let (pages, bytes) = match held {
                Held::Fresh => continue,
                Held::Zero => (&self.zero_pages, 0),
                Held::SameFilled => (&self.same_filled_pages, 0),
                Held::Compressed(bytes) => (&self.compressed_pages, u64::from(bytes)),
                Held::AsItIs => (&self.incompressible_pages, PAGE_SIZE as u64),
            };
            step(pages, 1);
            if bytes > 0 {
                step(&self.stored_bytes, bytes);
            }
        }
    }

    /// Takes so many bytes more, if that is within `limit`.
    pub(super) fn take(&self, bytes: u64, limit: Option<u64>) -> bool {
        let within = |taken: u64| {
            taken.checked_add(bytes).filter(|&sum| limit.is_none_or(|limit| sum <= limit))
        };
        // Relaxed, both: see `Counters`. A limit is kept because each change is one step.
        let taken = self.taken_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within);
        if let Ok(before) = taken {
            // Relaxed: see `Counters`.
            self.peak_bytes.fetch_max(before + bytes, Ordering::Relaxed);
        }
        taken.is_ok()
    }

    /// Gives bytes back.
    pub(super) fn give_back(&self, bytes: u64) {
        // Relaxed: see `Counters`.
        self.taken_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Returns how many bytes are taken.
    pub(super) fn taken(&self) -> u64 {
        // Relaxed: see `Counters`.
        self.taken_bytes.load(Ordering::Relaxed)
    }

    /// Returns how many pages are held.
    pub(super) fn pages(&self) -> u64 {
        self.snapshot(0, None).pages()
    }

    pub(super) fn snapshot(&self, table_bytes: u64, limit_bytes: Option<u64>) -> StoreStatistics {
        // Relaxed: see `Counters`.
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StoreStatistics {
            zero_pages: get(&self.zero_pages),
            same_filled_pages: get(&self.same_filled_pages),
            compressed_pages: get(&self.compressed_pages),
            incompressible_pages: get(&self.incompressible_pages),
            stored_bytes: get(&self.stored_bytes),
            taken_bytes: self.taken(),
            peak_bytes: get(&self.peak_bytes),
            table_bytes,
            limit_bytes,
            pages_in: self.pages_in.get(),
            pages_out: self.pages_out.get(),
            refused: self.refused.get(),
            failed_reads: self.failed_reads.get(),
            failed_writes: self.failed_writes.get(),
            mismatches: self.mismatches.get(),
        }
    }
}
