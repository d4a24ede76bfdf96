//! Pages that may only be read leave and come home.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use uhmm::policy::Policies;
use uhmm::{Clock, DevicePagemap, MigrateReport, Order, PageRange, PagemapOptions, StayReason};
use uhmm_linux::Process;

use super::attach;
use super::common::children::{End, How, child, end_of};
use super::common::memory::{
    self, Backing, Mapping, R, RW, mapped_in, memory_file, place, protect,
};
use super::common::rig::{Gpu, is_home, is_out};
use super::common::trap::{self, Trap};
use super::common::{self, OwnProcess, eventually, in_own_process};
use super::kernel::ring::Ring;

/// The number that a page holds.
fn value(index: u64) -> u64 {
    0x5eed_0000 + index
}

struct Rig {
    process: Process,
    memory: Arc<DevicePagemap>,
}

impl Rig {
    fn in_place() -> Rig {
        let process = attach();
        let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
        let memory = DevicePagemap::register_with(process.host_memory(4096), options);
        Rig { process, memory }
    }

    fn migrate(&self, range: PageRange) -> MigrateReport {
        self.process.migrate(range, &self.memory).run()
    }

    #[track_caller]
    fn assert_moves(&self, range: PageRange) {
        let report = self.migrate(range);
        assert_eq!((report.moved, &*report.stayed), (range.pages(), &[][..]), "{report:?}");
        let home = range.iter().find(|&page| !is_out(&self.process, page));
        assert_eq!(home, None, "it is on the device");
    }
}

/// Makes memory that holds numbers and may only be read.
fn read_only(pages: u64) -> Mapping {
    let mapping = Mapping::anonymous(pages);
    mapping.fill(value);
    protect(mapping.range(), R).expect("it is mapped");
    mapping
}

#[track_caller]
fn assert_filled(mapping: &Mapping) {
    for index in 0..mapping.range().pages() {
        assert_eq!(mapping.peek(index), value(index), "page {index}");
    }
}

/// Tells whether any of `range` may be stored to.
fn may_be_stored_to(range: PageRange) -> bool {
    mapped_in(range).iter().any(|(_, line)| line.rights.contains('w'))
}

#[test]
fn what_may_only_be_read_leaves_and_comes_home() {
    in_own_process(|| {
        let own = Rig::in_place();
        let gpu = Gpu::new(64);
        for memory in [Arc::clone(&own.memory), gpu.pagemap] {
            let rig = Rig { process: own.process.clone(), memory };
            let mapping = read_only(16);
            for _ in 0..3 {
                rig.assert_moves(mapping.range());
                assert!(!may_be_stored_to(mapping.range()));
                assert_eq!(trap::store(mapping.word(3), 1), Err(Trap::Denied));
                assert_filled(&mapping);
                assert!(mapping.range().iter().all(|page| is_home(&rig.process, page)));
                assert_eq!(trap::store(mapping.word(3), 1), Err(Trap::Denied));
            }
            // Stored to again, it moves as anything does.
            rig.assert_moves(mapping.range());
            protect(mapping.range(), RW).expect("it is mapped");
            mapping.poke(5, 55);
            mapping.poke(5, value(5));
            assert_filled(&mapping);
            rig.assert_moves(mapping.range());
            assert_filled(&mapping);
        }
    });
}

#[test]
fn what_was_never_touched_and_what_was_only_read_leave_too() {
    in_own_process(|| {
        let rig = Rig::in_place();
        let mapping = Mapping::anonymous(6);
        [3, 4].into_iter().for_each(|index| mapping.poke(index, value(index)));
        protect(mapping.range(), R).expect("it is mapped");
        // The page of zeroes that all share.
        assert_eq!(mapping.peek(1), 0);
        rig.assert_moves(mapping.range());
        let words = (0..6).map(|index| mapping.peek(index)).collect::<Vec<_>>();
        assert_eq!(words, [0, 0, 0, value(3), value(4), 0]);
    });
}

#[test]
fn a_huge_page_that_may_only_be_read_leaves_whole() {
    in_own_process(|| {
        let rig = Rig::in_place();
        let pages = Order::HUGE.pages();
        let mapping = Mapping::anonymous(pages);
        if memory::advise(mapping.range(), libc::MADV_HUGEPAGE).is_err() {
            return common::loudly("there are no huge pages here");
        }
        mapping.fill(value);
        protect(mapping.range(), R).expect("it is mapped");
        rig.assert_moves(mapping.range());
        assert_filled(&mapping);
    });
}

#[test]
fn what_is_pinned_goes_back_as_it_is() {
    in_own_process(|| {
        let Some(mut ring) = Ring::new() else {
            return common::loudly("there is no io_uring here: nothing was tested");
        };
        let rig = Rig::in_place();
        let mapping = Mapping::anonymous(16);
        mapping.fill(value);
        ring.register(mapping.part(4, 3)).expect("it can be pinned");
        protect(mapping.range(), R).expect("it is mapped");
        for _ in 0..2 {
            let report = rig.migrate(mapping.range());
            for (index, page) in (0..).zip(mapping.range().iter()) {
                let pinned = (4..7).contains(&index);
                assert_eq!(is_home(&rig.process, page), pinned, "{report:?}");
                if pinned {
                    assert_eq!(report.reason(page), Some(StayReason::Pinned), "{report:?}");
                }
            }
            assert!(!may_be_stored_to(mapping.range()));
            assert_eq!(mapping.peek(5), value(5));
        }
        // It is the very page: what the kernel writes to it is seen.
        let file = memory_file(1);
        rustix::io::pwrite(&file, &77_u64.to_ne_bytes(), 0).expect("it is a file");
        assert_eq!(ring.read_fixed(&file, mapping.word(5), 8), 8);
        assert_eq!(mapping.peek(5), 77);
        ring.unregister().expect("it was registered");
        // The kernel lets go a moment later.
        assert!(eventually(|| rig.migrate(mapping.range()).is_complete()));
        assert_eq!(mapping.peek(5), 77);
        assert_eq!(mapping.peek(6), value(6));
    });
}

#[test]
fn what_is_locked_or_executable_stays() {
    in_own_process(|| {
        let rig = Rig::in_place();
        let locked = read_only(4);
        memory::lock(locked.range()).expect("root may");
        let report = rig.migrate(locked.range());
        assert_eq!(report.reason(locked.page(0)), Some(StayReason::Locked), "{report:?}");
        let code = read_only(4);
        protect(code.range(), R | rustix::mm::ProtFlags::EXEC).expect("it is mapped");
        let report = rig.migrate(code.range());
        assert_eq!(report.reason(code.page(0)), Some(StayReason::ReadOnly), "{report:?}");
        assert_filled(&locked);
        assert_filled(&code);
    });
}

/// Whoever reads, in this process or in a child that is born at any moment, finds what is there.
#[test]
fn nobody_ever_reads_anything_else() {
    const PAGES: u64 = 24;
    const CHILDREN: u64 = 60;
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let rig = Rig::in_place();
        let mapping = read_only(PAGES);
        let ring = Ring::new();
        if let Some(ring) = &ring {
            // Some go back each time.
            protect(mapping.part(8, 2), RW).expect("it is mapped");
            ring.register(mapping.part(8, 2)).expect("it can be pinned");
            protect(mapping.part(8, 2), R).expect("it is mapped");
        }
        let (over, moved) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                // Relaxed: the end of a loop.
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        assert_filled(&mapping);
                        assert_eq!(trap::store(mapping.word(1), 0), Err(Trap::Denied));
                    }
                });
            }
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // Relaxed: a count.
                    moved.fetch_add(rig.migrate(mapping.range()).moved, Ordering::Relaxed);
                }
            });
            for round in 0..CHILDREN {
                let before = moved.load(Ordering::Relaxed);
                let how = if round % 2 == 0 { How::Raw } else { How::Hooked };
                let right = || (0..PAGES).all(|index| mapping.peek(index) == value(index));
                let born = child(how, right);
                assert_eq!(end_of(born), End::Well, "child {round}, {how:?}");
                // Not the same moment each time.
                assert!(eventually(|| moved.load(Ordering::Relaxed) > before));
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_filled(&mapping);
        println!("{moved:?} pages left");
    });
}

/// What the program changes while pages are put aside is changed, once, and nothing else is.
#[test]
fn changes_meanwhile_are_made_as_if_nothing_were_away() {
    const PAGES: u64 = 8;
    const ROUNDS: u64 = 400;
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let rig = Rig::in_place();
        let mapping = read_only(PAGES);
        let spare = place(PAGES);
        let (over, moved) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Relaxed: the end of a loop, and a count.
                while !over.load(Ordering::Relaxed) {
                    for range in [mapping.range(), spare] {
                        moved.fetch_add(rig.migrate(range).moved, Ordering::Relaxed);
                    }
                }
            });
            for round in 1..=ROUNDS {
                let range = mapping.range();
                match round % 4 {
                    // Another mapping, at the same place.
                    0 => memory::map(range, Backing::Anonymous, RW).expect("it can be mapped"),
                    1 => {
                        memory::unmap(range);
                        memory::map(range, Backing::Anonymous, RW).expect("it can be mapped");
                    }
                    2 => {
                        memory::remap(range, spare.first()).expect("it can be moved");
                        memory::remap(spare, range.first()).expect("it can be moved back");
                        let same = |index| mapping.peek(index) == value(index + round - 1);
                        assert!((0..PAGES).all(same), "round {round}");
                        protect(range, RW).expect("it is mapped");
                    }
                    _ => {
                        protect(range, RW).expect("it is mapped");
                        memory::advise(range, libc::MADV_DONTNEED).expect("it is mapped");
                    }
                }
                let zero = |index| round % 4 == 2 || mapping.peek(index) == 0;
                assert!((0..PAGES).all(zero), "round {round}: of before");
                (0..PAGES).for_each(|index| mapping.poke(index, value(index + round)));
                protect(range, R).expect("it is mapped");
                // What was filled again before it was seen to be gone stays.
                let done = |report: MigrateReport| {
                    let settled = |page| match report.reason(page) {
                        Some(StayReason::AlreadyThere) | None => true,
                        reason => round % 4 == 3 && reason == Some(StayReason::Changed),
                    };
                    range.iter().all(settled)
                };
                let away = || done(rig.migrate(range));
                assert!(eventually(away), "round {round}: {:?}", rig.migrate(range));
                let same = |index| mapping.peek(index) == value(index + round);
                assert!((0..PAGES).all(same), "round {round}");
            }
            over.store(true, Ordering::Relaxed);
        });
        println!("{moved:?} pages left");
    });
}
