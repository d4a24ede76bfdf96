//! Stale translations: none is ever used.
//!
//! A device that has a translation uses it as if it were hardware: it looks at its page table alone.
//! Each mapping that is put at the place has a *generation*, which the program knows before it maps
//! and the device learns by faulting. A use of a translation whose generation has ended is a stale one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use uhmm::mmu_notifier::{Event, Notifier, Subscription};
use uhmm_linux::{Options, Process};

use super::common::memory::{self, Backing, RW, place};
use super::common::rig::attach_with;
use super::common::{self, OwnProcess};

/// What is done to the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remap {
    /// munmap, then mmap.
    Again,
    /// mmap with MAP_FIXED.
    Over,
    /// MADV_DONTNEED.
    Discard,
    /// As the first, by system calls that no library sees.
    Raw,
    /// mremap, away and back.
    Move,
    /// mprotect: to none and back.
    Protect,
}

const ALL: [Remap; 6] =
    [Remap::Again, Remap::Over, Remap::Discard, Remap::Raw, Remap::Move, Remap::Protect];

/// A registration: as a library of communication caches it, or a device has it in its page table.
struct Cached {
    /// The generation that it is of; 0 if it is of none any more.
    generation: Arc<AtomicU64>,
}

impl Notifier for Cached {
    type Fence = ();

    fn invalidate(&mut self, _event: &Event) {
        // The device has stopped when this returns: whoever uses it looks first, under this lock.
        self.generation.store(0, SeqCst);
    }
}

/// What the torture has counted.
#[derive(Debug, Default)]
struct Counts {
    /// Uses of a translation.
    hits: AtomicU64,
    /// Uses that had to fault first.
    misses: AtomicU64,
    /// Uses that were stale.
    stale: AtomicU64,
    /// Changes while a translation was there: proven overlaps.
    overlaps: AtomicU64,
    changes: AtomicU64,
}

struct Place {
    range: uhmm::PageRange,
    spare: uhmm::PageRange,
    /// The generation of what is mapped, odd while it is being changed.
    generation: AtomicU64,
    /// The last generation that is known to have ended: no use that begins now may be of it.
    ended: AtomicU64,
}

impl Place {
    fn new() -> Place {
        let (range, spare) = (place(4), place(4));
        memory::map(range, Backing::Anonymous, RW).expect("it can be mapped");
        Place { range, spare, generation: AtomicU64::new(2), ended: AtomicU64::new(0) }
    }

    /// Makes one change, after which what was there before is over.
    fn change(&self, how: Remap) {
        let before = self.generation.fetch_add(1, SeqCst);
        let fresh = || memory::map(self.range, Backing::Anonymous, RW).expect("it can be mapped");
        match how {
            Remap::Again => memory::unmap(self.range),
            Remap::Over => fresh(),
            Remap::Discard => {
                memory::advise(self.range, libc::MADV_DONTNEED).expect("it is mapped");
            }
            Remap::Raw => {
                let (at, bytes) = (self.range.address(), self.range.pages() * 4096);
                // SAFETY: of this test's own.
                assert_eq!(unsafe { libc::syscall(libc::SYS_munmap, at, bytes) }, 0);
            }
            Remap::Move => memory::remap(self.range, self.spare.first()).expect("it is mapped"),
            Remap::Protect => memory::protect(self.range, memory::NONE).expect("it is mapped"),
        }
        // The call has returned.
        self.ended.store(before, SeqCst);
        match how {
            Remap::Again | Remap::Raw => fresh(),
            Remap::Move => memory::remap(self.spare, self.range.first()).expect("it is mapped"),
            Remap::Protect => memory::protect(self.range, RW).expect("it is mapped"),
            Remap::Over | Remap::Discard => {}
        }
        self.generation.fetch_add(1, SeqCst);
    }
}

/// Uses the place as a device does, until told to stop.
fn use_it(place: &Place, cached: &Subscription<Cached>, counts: &Counts, stop: &AtomicBool) {
    while !stop.load(SeqCst) {
        let ended = place.ended.load(SeqCst);
        // A use is under the lock that the announcement takes: it is before it or after.
        let hit = cached.inspect(|cached| cached.generation.load(SeqCst));
        let hit = hit.expect("the process lives");
        if hit != 0 {
            counts.hits.fetch_add(1, SeqCst);
            // `ended` was read before the use began.
            if hit <= ended {
                counts.stale.fetch_add(1, SeqCst);
            }
            continue;
        }
        counts.misses.fetch_add(1, SeqCst);
        let Ok(section) = cached.read_begin() else { return };
        let generation = place.generation.load(SeqCst);
        if !generation.is_multiple_of(2) {
            drop(section);
            std::thread::yield_now();
            continue;
        }
        if let Ok(update) = section.commit() {
            update.generation.store(generation, SeqCst);
        }
    }
}

/// Runs one column of the torture.
fn torture(process: &Process, how: Remap, overlaps: u64, deadline: Duration) -> Counts {
    let (place, counts) = (Place::new(), Counts::default());
    let generation = Arc::new(AtomicU64::new(0));
    let notifiers = process.backend().notifiers();
    let cached = Cached { generation: Arc::clone(&generation) };
    let cached = notifiers.subscribe(place.range.va_range(), cached).expect("the process lives");
    let stop = AtomicBool::new(false);
    let began = Instant::now();
    let begin = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            process.reserve_this_thread();
            begin.wait();
            use_it(&place, &cached, &counts, &stop);
        });
        begin.wait();
        while counts.overlaps.load(SeqCst) < overlaps && began.elapsed() < deadline {
            let current = place.generation.load(SeqCst);
            let there = generation.load(SeqCst) == current;
            place.change(how);
            counts.changes.fetch_add(1, SeqCst);
            if there {
                counts.overlaps.fetch_add(1, SeqCst);
            } else {
                // Where both run on one processor, the other must come to fault.
                std::thread::yield_now();
            }
        }
        stop.store(true, SeqCst);
    });
    println!("{how:?}: {counts:?} in {:?}", began.elapsed());
    counts
}

/// How long a column may take, and how many overlaps it is to have.
fn scale() -> (u64, Duration) {
    let number = std::env::var("UHMM_TORTURE_OVERLAPS").ok().and_then(|text| text.parse().ok());
    match number {
        Some(overlaps) => (overlaps, Duration::from_secs(600)),
        None => (1000, Duration::from_secs(6)),
    }
}

#[test]
fn no_translation_is_used_after_the_call_that_ends_it_has_returned() {
    OwnProcess::new().deadline(Duration::from_secs(3600)).run(|| {
        let process = attach_with(Options::new().announced(true));
        let (overlaps, deadline) = scale();
        for how in ALL {
            let counts = torture(&process, how, overlaps, deadline);
            assert_eq!(counts.stale.load(SeqCst), 0, "{how:?}: {counts:?}");
            let hit = counts.overlaps.load(SeqCst);
            assert!(hit >= overlaps.min(100), "{how:?}: too little has come together: {counts:?}");
        }
    });
}

/// The same without announcements: the torture finds what it is there to find.
#[test]
fn the_torture_finds_stale_translations_where_nothing_is_announced() {
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let process = attach_with(Options::new());
        for how in [Remap::Protect, Remap::Again] {
            let counts = torture(&process, how, 300, Duration::from_secs(5));
            assert!(counts.stale.load(SeqCst) > 0, "{how:?}: {counts:?}");
        }
        common::eventually(|| true);
    });
}
