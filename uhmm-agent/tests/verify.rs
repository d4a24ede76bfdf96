//! `--verify` with the software GPU: what is wrong is found, and nothing else is. One process for each
//! test.

#[path = "../../uhmm-linux/tests/common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::in_own_process;
use common::memory::{Mapping, place, remap, unmap};
use common::rig::attach;
use uhmm::{PAGE_SIZE, PageRange};
use uhmm_agent::verify::{Book, Checker, Findings, TLB_ENTRIES, moves_of};
use uhmm_devices::gpu::{SoftGpu, SoftGpuOptions};
use uhmm_linux::Process;

/// How many pages most tests have: of three pieces of 2 MiB.
const PAGES: u64 = 1200;

/// What a checker has found.
#[derive(Clone, Default)]
struct Found(Arc<Mutex<(u64, Vec<String>)>>);

impl Findings for Found {
    fn confirmed(&self, pages: u64) {
        self.0.lock().expect("nobody panics").0 += pages;
    }

    fn differs(&self, what: &str) {
        self.0.lock().expect("nobody panics").1.push(what.to_owned());
    }
}

/// A process with a checker, and how pages leave.
struct Rig {
    process: Process,
    gpu: Arc<SoftGpu>,
    book: Arc<Book>,
    found: Found,
    checker: Checker<Found>,
}

impl Rig {
    fn new(options: SoftGpuOptions) -> Rig {
        let process = attach();
        let options = options.memory_pages(1 << 16).tlb_entries(TLB_ENTRIES);
        let options = options.checksums(true).observed();
        let gpu = SoftGpu::new(options);
        let (book, found) = (Arc::new(Book::default()), Found::default());
        let checker = Checker::new(&process, &gpu, &book, found.clone());
        Rig { process, gpu, book, found, checker }
    }

    /// Moves pages to the GPU as the keeper does, and returns how many left.
    fn leave(&self, range: PageRange) -> u64 {
        leave(&self.process, &self.gpu, &self.book, range)
    }

    /// Has every piece read several times.
    fn rounds(&mut self) {
        for _ in 0..8 {
            self.checker.round();
        }
    }

    /// Checks that nothing was found to be wrong, and returns how many pages were right.
    #[track_caller]
    fn all_is_well(&self) -> u64 {
        let (confirmed, wrong) = &*self.found.0.lock().expect("nobody panics");
        assert_eq!(*wrong, [""; 0]);
        assert_eq!(self.gpu.violations(), [""; 0]);
        *confirmed
    }

    /// Returns what was found to be wrong.
    fn wrong(&self) -> Vec<String> {
        self.found.0.lock().expect("nobody panics").1.clone()
    }
}

fn leave(process: &Process, gpu: &Arc<SoftGpu>, book: &Book, range: PageRange) -> u64 {
    let moves = moves_of(process);
    let migration = process.migrate(range, gpu.pagemap().expect("it has memory"));
    migration.for_each_page(|page, bytes| book.note(page, bytes, moves));
    migration.run().moved
}

#[test]
fn what_is_away_is_what_it_was() {
    in_own_process(|| {
        let mut rig = Rig::new(SoftGpuOptions::new());
        let mapping = Mapping::anonymous(PAGES);
        mapping.fill(|index| index + 1);
        assert_eq!(rig.leave(mapping.range()), PAGES);
        rig.rounds();
        let confirmed = rig.all_is_well();
        assert!(confirmed >= PAGES, "{confirmed}");
        // What came home, was written to and left again is what it was then.
        for index in 0..PAGES {
            assert_eq!(mapping.peek(index), index + 1);
            mapping.poke(index, index + 2);
        }
        rig.rounds();
        assert_eq!(rig.all_is_well(), confirmed, "nothing is away");
        rig.leave(mapping.range());
        rig.rounds();
        assert!(rig.all_is_well() >= confirmed + PAGES);
    });
}

#[test]
fn what_the_program_moves_and_unmaps_is_no_difference() {
    in_own_process(|| {
        let mut rig = Rig::new(SoftGpuOptions::new());
        let mapping = Mapping::anonymous(PAGES);
        let other = place(PAGES);
        for round in 0..4 {
            mapping.fill(|index| index + round);
            assert_eq!(rig.leave(mapping.range()), PAGES);
            rig.rounds();
            // What was noted of the pages there is not about those that come.
            remap(mapping.range(), other.first()).expect("it can be moved");
            rig.rounds();
            if round % 2 == 0 {
                remap(other, mapping.range().first()).expect("it can be moved");
            } else {
                unmap(other);
                common::memory::map(
                    mapping.range(),
                    common::memory::Backing::Anonymous,
                    common::memory::RW,
                )
                .expect("it was mapped before");
            }
            rig.rounds();
        }
        assert!(rig.all_is_well() >= PAGES);
    });
}

#[test]
fn a_program_that_writes_meanwhile_is_no_difference() {
    in_own_process(|| {
        let rig = Rig::new(SoftGpuOptions::new());
        let mapping = Mapping::anonymous(PAGES);
        mapping.fill(|index| index);
        let Rig { process, gpu, book, found, mut checker } = rig;
        let over = AtomicBool::new(false);
        let deadline = Instant::now() + Duration::from_secs(20);
        let confirmed = || found.0.lock().expect("nobody panics").0;
        // Relaxed: it says when to end, and nothing else.
        let goes_on = || !over.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut step = 0_u64;
                while goes_on() {
                    step += 1;
                    mapping.poke(step * 7919 % PAGES, step);
                }
            });
            scope.spawn(|| {
                let mut left = 0;
                while goes_on() {
                    let part = mapping.part(left * 64 % PAGES / 64 * 64, 48);
                    left += 1 + leave(&process, &gpu, &book, part) / 48;
                }
            });
            while confirmed() < 5_000 && Instant::now() < deadline {
                checker.round();
            }
            over.store(true, Ordering::Relaxed);
        });
        let (confirmed, wrong) = &*found.0.lock().expect("nobody panics");
        assert_eq!(*wrong, [""; 0]);
        assert_eq!(gpu.violations(), [""; 0]);
        assert!(*confirmed >= 5_000, "{confirmed} in all that time");
    });
}

#[test]
fn a_translation_that_outlives_its_page_is_found() {
    in_own_process(|| {
        let mut rig = Rig::new(SoftGpuOptions::new().break_flush());
        let mapping = Mapping::anonymous(PAGES);
        mapping.fill(|index| index + 1);
        // One page is away, so that there is something to be read; the first of the others are too.
        assert_eq!(rig.leave(mapping.part(512, 1)), 1);
        rig.checker.round();
        assert_eq!(rig.wrong(), [""; 0]);
        // These leave, and the GPU says that it has flushed its translations.
        assert_eq!(rig.leave(mapping.part(513, 60)), 60);
        rig.checker.round();
        let wrong = rig.wrong();
        assert!(wrong.iter().any(|line| line.contains("does not see")), "{wrong:?}");
    });
}

#[test]
fn a_page_in_anothers_place_is_found() {
    in_own_process(|| {
        let mut rig = Rig::new(SoftGpuOptions::new());
        let mapping = Mapping::anonymous(4);
        mapping.fill(|index| index + 1);
        assert_eq!(rig.leave(mapping.range()), 4);
        rig.rounds();
        assert!(rig.all_is_well() >= 4);
        // As if another page had left from there.
        rig.book.note(mapping.page(2), &[7; PAGE_SIZE], moves_of(&rig.process));
        rig.rounds();
        let wrong = rig.wrong();
        let page = mapping.page(2).to_string();
        assert!(!wrong.is_empty() && wrong.iter().all(|line| line.contains(&page)), "{wrong:?}");
    });
}
