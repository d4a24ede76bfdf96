//! The rows of `docs/regressions.md` that mean something on a live process, as far as no other test
//! of one shows them. Each names its rows.

mod common;

use std::sync::{Arc, Mutex};
use std::thread;

use common::children::{End, How, Scattered, child, end_of};
use common::memory::{Backing, Mapping, NONE, RW, advise, protect};
use common::rig::{Gpu, attach, device_load, device_store, is_out};
use common::{eventually, in_own_process};
use mmu_notifier::{Event, EventKind, Notifier};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, setrlimit};
use uhmm::{FaultError, Order};
use uhmm_linux::{Options, Process};

/// `MADV_COLLAPSE` (Linux 6.1).
const COLLAPSE: i32 = 25;

/// Regressions 7 and 21: the kernel joins pages into a huge one, and splits it, while a device has
/// them mapped and while some are away. It tells of neither, and nothing is different.
#[test]
fn r07_r21_what_the_kernel_joins_and_splits_is_what_it_was() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(512);
        let mapping = Mapping::new(Order::HUGE.pages(), Backing::Anonymous, RW);
        advise(mapping.range(), libc::MADV_NOHUGEPAGE).expect("it is mapped");
        mapping.fill(|index| 3 + index);
        advise(mapping.range(), libc::MADV_HUGEPAGE).expect("it is mapped");
        let mirror = gpu.mirror(&process, mapping.range());
        let right = |from: u64| {
            for index in 0..mapping.range().pages() {
                assert_eq!(device_load(&mirror, mapping.page(index)), Ok(from + index));
            }
        };
        right(3);
        advise(mapping.range(), COLLAPSE).expect("it is all there");
        right(3);
        // Rights of a part: the huge page is split.
        protect(mapping.part(7, 1), NONE).expect("it is mapped");
        protect(mapping.part(7, 1), RW).expect("it is mapped");
        right(3);
        (0..512).for_each(|index| {
            device_store(&mirror, mapping.page(index), 9 + index).expect("it is mapped");
        });
        assert_eq!(process.migrate(mapping.part(100, 8), &gpu.pagemap).run().moved, 8);
        // Where some is away there is nothing to join, or it comes home for that.
        let _ = advise(mapping.range(), COLLAPSE);
        right(9);
        (0..512).for_each(|index| assert_eq!(mapping.peek(index), 9 + index));
    });
}

/// Regression 29: what a core dump finds of pages that are away is nothing, and it hangs on none.
#[test]
fn r29_a_process_whose_pages_are_away_can_dump_core() {
    in_own_process(|| {
        let folder = format!("{}/core-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
        std::fs::create_dir_all(&folder).expect("the target directory can be written to");
        let before = getrlimit(Resource::Core);
        setrlimit(Resource::Core, Rlimit { current: before.maximum, ..before })
            .expect("up to the hard limit");
        rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).expect("prctl");
        let mut board = Vec::new();
        for how in [How::Hooked, How::Raw] {
            let pid = child(how, || {
                std::env::set_current_dir(&folder).expect("it was made just now");
                let memory = Scattered::new(&attach());
                memory.fill(1);
                memory.scatter();
                assert!(is_out(&memory.process, memory.mapping.page(0)));
                common::raise(libc::SIGQUIT);
                false
            });
            board.push(end_of(pid));
        }
        std::fs::remove_dir_all(&folder).expect("it is ours");
        assert_eq!(board, [End::Signal(libc::SIGQUIT); 2]);
    });
}

/// Regression 30: what is asked of a process that has detached is an error.
#[test]
fn r30_what_begins_after_the_process_has_detached_fails() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(16);
        let mapping = Mapping::anonymous(4);
        mapping.fill(|index| index);
        let mirror = gpu.mirror(&process, mapping.range());
        drop(process);
        assert_eq!(device_load(&mirror, mapping.page(0)), Err(FaultError::Released));
        assert_eq!(device_store(&mirror, mapping.page(0), 1), Err(FaultError::Released));
        let held = mirror.exclusive(mapping.range()).map(drop);
        assert_eq!(held, Err(FaultError::Released));
        (0..4).for_each(|index| assert_eq!(mapping.peek(index), index));
    });
}

/// Drops a process when it is called.
struct LastUser(Arc<Mutex<Option<Process>>>);

impl Notifier for LastUser {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        drop(self.0.lock().expect("nobody panics").take());
    }
}

/// Regression 40: the last user is dropped inside a callback, where nothing may wait.
#[test]
fn r40_the_last_user_may_be_dropped_inside_a_callback() {
    in_own_process(|| {
        for round in 0..10 {
            let memory = Scattered::new(&attach());
            memory.fill(round);
            memory.scatter();
            let (process, mapping) = memory.into_process();
            let notifiers = Arc::clone(process.backend().notifiers());
            let last = LastUser(Arc::new(Mutex::new(Some(process))));
            let range = mapping.range().va_range();
            let subscription = notifiers.subscribe(range, last).expect("it is attached");
            drop(notifiers.invalidate_range_start(Event::new(EventKind::Clear, range)));
            // It detaches elsewhere.
            let mut again = None;
            assert!(eventually(|| {
                again = Process::attach(Options::new()).ok();
                again.is_some()
            }));
            assert!(subscription.unsubscribe().is_none(), "round {round}");
            for index in 0..Scattered::PAGES {
                assert_eq!(mapping.peek(index), Scattered::value(index, round));
            }
        }
    });
}

/// Regressions 43 and 56: whatever becomes of the pages, memory of ours and of devices is free
/// again.
#[test]
fn r43_r56_what_was_in_use_is_free_when_all_is_home() {
    in_own_process(|| {
        let process = attach();
        let mut before = None;
        for round in 0..20 {
            let memory = Scattered::new(&process);
            memory.fill(round);
            memory.scatter();
            assert!(process.statistics().staging > 0);
            // A part of each goes away without coming home.
            for part in 0..3 {
                let first = memory.part(part).first();
                advise(first.into(), libc::MADV_DONTNEED).expect("it is mapped");
            }
            for index in 0..Scattered::PAGES {
                let gone = index % Scattered::PART == 0 && index < 3 * Scattered::PART;
                let expected = if gone { 0 } else { Scattered::value(index, round) };
                assert_eq!(memory.mapping.peek(index), expected, "page {index}");
            }
            assert!(eventually(|| memory.gpu.pagemap.used() + memory.host.used() == 0));
            let now = || (process.statistics().staging, process.statistics().lost_staging);
            let before = *before.get_or_insert_with(now);
            assert!(eventually(|| now() == before), "{:?}, and not {before:?}", now());
        }
    });
}

/// Regression 57: what is told twice at once ends once.
#[test]
fn r57_what_goes_while_it_goes_goes_once() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(8);
        for round in 0..200 {
            mapping.fill(|index| 1 + round + index);
            assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().moved, 8);
            thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        advise(mapping.range(), libc::MADV_DONTNEED).expect("it is mapped");
                    });
                }
                scope.spawn(|| gpu.pagemap.evict(8));
            });
            (0..8).for_each(|index| assert_eq!(mapping.peek(index), 0, "round {round}"));
            assert!(eventually(|| gpu.pagemap.used() == 0), "round {round}");
        }
    });
}
