//! What becomes of kernels when the memory under them changes, moves or goes away.
#![cfg(not(shuttle))]

mod common;

use std::sync::Arc;

use common::{Rig, check_empty, mirror, options, range, until, word};
use uhmm::primitive::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use uhmm::sim::{Machine, MachineOptions, Mapping, SimError};
use uhmm::{Access, FaultError, Order, RangeFault, Residency};
use uhmm_devices::gpu::{FaultReason, KernelFault, RunningKernel, SoftGpu, compare};

/// Sizes of the device's memory, in pages: the work is done in system memory, or in the device's.
const MEMORIES: [u64; 2] = [0, 8];

/// What running kernels and the one who disturbs them share.
#[derive(Clone, Default)]
struct Signal {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
}

impl Signal {
    /// Waits until the kernels have gone on by so many rounds in all.
    fn wait(&self, rounds: u64, kernels: &[RunningKernel<()>]) {
        let target = self.rounds.load(Relaxed) + rounds;
        until(|| {
            self.rounds.load(Relaxed) >= target || kernels.iter().all(RunningKernel::is_finished)
        });
    }
}

/// Starts kernels that load and store all over the first `pages` pages. Where `holes` are expected,
/// a fault of the address is nothing to them.
fn start(
    rig: &Rig,
    kernels: u64,
    pages: u64,
    holes: bool,
    signal: &Signal,
) -> Vec<RunningKernel<()>> {
    let run = |kernel: u64| {
        let signal = signal.clone();
        rig.context().spawn(move |view| {
            let mut index = kernel;
            while !signal.stop.load(Relaxed) {
                let address = word(index % pages) + 8 * kernel;
                let step = || -> Result<(), KernelFault> {
                    let old = view.load::<u64>(address)?;
                    view.store(address, old + 1)
                };
                match step() {
                    Err(fault) if holes && fault.reason == FaultReason::Address => {}
                    result => result?,
                }
                index += 1;
                signal.rounds.fetch_add(1, Relaxed);
            }
            Ok(())
        })
    };
    (0..kernels).map(run).collect()
}

#[test]
fn no_kernel_uses_what_was_unmapped() {
    for memory in MEMORIES {
        for late in [false, true] {
            let rig = Rig::new(4, options(memory));
            if late {
                rig.gpu.injector().fail_always("late-flush");
            }
            let service = rig.gpu.start_service().unwrap();
            let signal = Signal::default();
            let kernels = start(&rig, 3, 4, true, &signal);
            for round in 0..60 {
                let piece = range(round % 3, 1 + round % 2);
                rig.process.unmap(piece);
                signal.wait(5, &kernels);
                rig.process.map(piece, Mapping::anonymous(Access::Write)).unwrap();
                signal.wait(5, &kernels);
            }
            signal.stop.store(true, Relaxed);
            kernels.into_iter().for_each(|kernel| kernel.join().unwrap());
            drop(service);
            rig.finish();
        }
    }
}

/// Everything that changes a mapping under kernels that count: no count is lost.
#[test]
fn no_change_of_the_mapping_loses_a_store() {
    const PAGES: u64 = 4;
    for memory in [0, 2, 8] {
        let rig = Rig::new(PAGES, options(memory));
        let service = rig.gpu.start_service().unwrap();
        let signal = Signal::default();
        let kernels = start(&rig, 3, PAGES, false, &signal);
        let all = range(0, PAGES);
        for round in 0..40_u64 {
            match round % 8 {
                0 => drop(rig.process.relocate(all)),
                1 => drop(rig.process.reclaim(all)),
                2 => drop(rig.machine.merge()),
                3 => rig.process.write_protect(all),
                4 => rig.process.clear_soft_dirty(all),
                5 => drop(rig.process.address_space().migrate_home(all)),
                6 => drop(rig.process.fork().unwrap()),
                _ => drop(rig.process.pin(range(round % PAGES, 1)).unwrap()),
            }
            signal.wait(4, &kernels);
        }
        signal.stop.store(true, Relaxed);
        kernels.into_iter().for_each(|kernel| kernel.join().unwrap());
        drop(service);
        let load = |index: u64| rig.process.load_u64(word(index % PAGES) + 8 * (index / PAGES));
        let sum: u64 = (0..3 * PAGES).map(|index| load(index).unwrap()).sum();
        assert_eq!(sum, signal.rounds.load(Relaxed));
        rig.finish();
    }
}

/// A GPU that does not flush is found out: in system memory by the machine, in its own by itself.
#[test]
fn a_lost_flush_is_found_out() {
    for memory in MEMORIES {
        let machine = Machine::with(MachineOptions::new().count_violations());
        let rig = Rig::on(machine, 2, options(memory).break_flush());
        rig.fill(2, 5);
        let service = rig.gpu.start_service().unwrap();
        let context = rig.context();
        assert_eq!(context.run(|view| view.load::<u64>(word(0))), Ok(5));
        rig.gpu.check([&*rig.mirror]).unwrap();
        rig.process.unmap(range(0, 1));
        let stale = rig.gpu.check([&*rig.mirror]).unwrap_err();
        assert!(stale.contains("cached"), "{stale}");
        // It should be a fault.
        assert!(context.run(|view| view.load::<u64>(word(0))).is_ok());
        let (machine, gpu) = (rig.machine.violations(), rig.gpu.violations());
        assert_eq!((machine.len(), gpu.len()), if memory == 0 { (1, 0) } else { (0, 1) });
        drop((context, service));
    }
}

/// Likewise where the frame has been given to another page of the device meanwhile.
#[test]
fn a_lost_flush_is_found_out_when_the_frame_is_in_use_again() {
    let rig = Rig::new(2, options(1).break_flush());
    rig.fill(2, 5);
    let service = rig.gpu.start_service().unwrap();
    let context = rig.context();
    assert_eq!(context.run(|view| view.load::<u64>(word(0))), Ok(5));
    // There is but one frame.
    assert_eq!(context.run(|view| view.load::<u64>(word(1))), Ok(6));
    assert_eq!(rig.gpu.violations(), Vec::<String>::new());
    assert_eq!(context.run(|view| view.load::<u64>(word(0))), Ok(6), "another page's contents");
    assert_eq!(rig.gpu.violations().len(), 1);
    drop((context, service));
}

/// And where it is a table node that is in use again (regression 61).
#[test]
fn r61_a_walk_cache_that_is_not_flushed_is_found_out() {
    let machine = Machine::with(MachineOptions::new().count_violations());
    let rig = Rig::on(machine, 2048, options(0).break_flush());
    rig.fill(4, 5);
    let service = rig.gpu.start_service().unwrap();
    let context = rig.context();
    assert_eq!(context.run(|view| view.load::<u64>(word(0))), Ok(5));
    rig.process.relocate(range(0, 1));
    // Another context's walk takes the node for another region.
    assert_eq!(rig.context().run(|view| view.load::<u64>(word(1024))), Ok(0));
    assert_eq!(context.run(|view| view.load::<u64>(word(1))), Ok(6));
    assert_eq!(rig.gpu.violations().len(), 1, "{:?}", rig.gpu.violations());
    drop((context, service));
}

#[test]
fn r61_table_nodes_are_free_when_an_unmap_returns() {
    let rig = Rig::new(4096, options(0));
    rig.gpu.injector().fail_always("late-flush");
    let service = rig.gpu.start_service().unwrap();
    let context = rig.context();
    for round in 0..10 {
        let mapping = Mapping::anonymous(Access::Write);
        rig.process.map(range(0, 4096), mapping).unwrap();
        let regions = [0, 512, 1024 + round, 3000];
        context
            .run(|view| regions.into_iter().try_for_each(|index| view.store(word(index), round)))
            .unwrap();
        let nodes = rig.mirror.inspect(|table| table.nodes()).unwrap();
        assert_eq!(nodes.linked, 5 + 4, "the root, four below it, and one for each region");
        rig.process.unmap(range(0, 4096));
        let after = rig.mirror.inspect(|table| table.nodes()).unwrap();
        assert_eq!((after.linked, after.deposited, after.retired), (1, 0, 0));
        assert_eq!(after.free, nodes.linked + nodes.free - 1, "no node is lost");
        assert_eq!(context.cached(), 0);
    }
    drop((context, service));
    rig.finish();
}

/// A part of a huge page changes, and the rest of it stays what it was.
#[test]
fn a_part_of_a_large_translation_is_invalidated() {
    for memory in [0, 1024] {
        let rig = Rig::new(1, options(memory));
        let mapping = Mapping::anonymous(Access::Write).huge(true);
        rig.process.map(range(512, 512), mapping).unwrap();
        for index in 512..1024 {
            rig.process.store_u64(word(index), index).unwrap();
        }
        if let Some(pagemap) = rig.gpu.pagemap() {
            rig.process.address_space().migrate(range(512, 512), pagemap).run();
        }
        rig.mirror.range_fault(&RangeFault::write(range(512, 512))).unwrap();
        assert_eq!(rig.translation(600).unwrap().order, Order::HUGE);
        let service = rig.gpu.start_service().unwrap();
        let context = rig.context();
        assert_eq!(context.run(|view| view.load::<u64>(word(600))), Ok(600));
        rig.process.discard(range(600, 2));
        rig.process.unmap(range(700, 1));
        rig.process.protect(range(800, 3), Access::Read);
        rig.gpu.check([&*rig.mirror]).unwrap();
        context
            .run(|view| {
                for index in (512..1024).filter(|&index| index != 700) {
                    let expected = if (600..602).contains(&index) { 0 } else { index };
                    assert_eq!(view.load::<u64>(word(index))?, expected);
                }
                Ok(())
            })
            .unwrap();
        let reason = |result: Result<(), KernelFault>| result.unwrap_err().reason;
        let result = context.run(|view| view.store(word(700), 1_u64));
        assert_eq!(reason(result), FaultReason::Address);
        let result = context.run(|view| view.store(word(801), 1_u64));
        assert_eq!(reason(result), FaultReason::Permission);
        assert_eq!(context.run(|view| view.store(word(803), 1_u64)), Ok(()));
        drop((context, service));
        rig.finish();
    }
}

// Failures.

/// Whatever step fails, each page has one current copy, and the kernel gives its answer.
#[test]
fn no_failure_loses_anything() {
    const PAGES: u64 = 6;
    for fails in [None, Some("allocate"), Some("copy"), Some("clear")] {
        for after in 0..40 {
            let rig = Rig::new(PAGES, options(2).tlb_entries(8));
            rig.fill(PAGES / 2, 100);
            match fails {
                Some(step) => rig.gpu.injector().fail(step, after),
                None => rig.gpu.injector().fail_any(after),
            }
            let start = || rig.gpu.start_service();
            // The thread is a step too.
            let service = start().or_else(|_| start()).unwrap();
            let context = rig.context();
            context
                .run(|view| {
                    for round in 0..2 {
                        for index in 0..PAGES {
                            let old = view.load::<u64>(word(index))?;
                            view.store(word(index), old + 1 + round)?;
                        }
                    }
                    // A CPU is told of a copy that failed, and finds everything when it tries again.
                    let load = |at, bytes: &mut [u8]| match rig.process.load(at, bytes) {
                        Err(SimError::Fault(FaultError::CopyFailed { .. })) => {
                            rig.process.load(at, bytes)
                        }
                        result => result,
                    };
                    let same = compare(view, word(0), PAGES * 4096, load);
                    let same = same.unwrap_or_else(|error| panic!("{error}, {fails:?} {after}"));
                    assert!(same.is_same(), "{same:?} with {fails:?} after {after}");
                    Ok(())
                })
                .unwrap();
            drop((context, service));
            rig.gpu.injector().clear();
            for index in 0..PAGES {
                let first = if index < PAGES / 2 { 100 + index } else { 0 };
                assert_eq!(rig.process.load_u64(word(index)).unwrap(), first + 3);
            }
            rig.finish();
        }
    }
}

#[test]
fn a_device_that_can_do_nothing_leaves_the_work_to_system_memory() {
    let rig = Rig::new(4, options(8));
    for step in ["allocate", "copy", "clear"] {
        rig.gpu.injector().fail_always(step);
    }
    rig.fill(2, 5);
    let service = rig.gpu.start_service().unwrap();
    let add = |index| rig.context().run(move |view| view.fetch_add_u64(word(index), 1));
    assert_eq!([0, 1, 2, 3].map(add), [Ok(5), Ok(6), Ok(0), Ok(0)]);
    assert_eq!(rig.gpu.pagemap().unwrap().used(), 0);
    assert!(matches!(rig.residency(0), Residency::Exclusive { .. } | Residency::System(_)));
    drop(service);
    rig.finish();
}

// Ends, while kernels run.

#[test]
fn kernels_end_when_the_process_exits() {
    for memory in MEMORIES {
        for _ in 0..10 {
            let rig = Rig::new(4, options(memory));
            let service = rig.gpu.start_service().unwrap();
            let signal = Signal::default();
            let kernels = start(&rig, 3, 4, false, &signal);
            signal.wait(10, &kernels);
            let Rig { machine, process, gpu, mirror } = rig;
            process.exit();
            for kernel in kernels {
                assert_eq!(kernel.join().unwrap_err().reason, FaultReason::Gone);
            }
            // If a fault was the last user, the death may still be on its way.
            drop(mirror.unregister());
            drop(service);
            // An operation of the device may have been the last user; then the death ends elsewhere.
            until(|| machine.frames() == 0 && common::used(&gpu) == 0);
            check_empty(&machine, &gpu);
        }
    }
}

#[test]
fn kernels_end_when_their_mirror_is_unregistered() {
    for memory in MEMORIES {
        for _ in 0..10 {
            let rig = Rig::new(4, options(memory));
            let service = rig.gpu.start_service().unwrap();
            let signal = Signal::default();
            let kernels = start(&rig, 3, 4, false, &signal);
            signal.wait(10, &kernels);
            let Rig { machine, process, gpu, mirror: ended } = rig;
            let table = ended.unregister().expect("the process lives");
            assert_eq!(table.nodes().linked, 1, "nothing is translated any more");
            for kernel in kernels {
                assert_eq!(kernel.join().unwrap_err().reason, FaultReason::Gone);
            }
            // What the device had belongs to the process, and another mirror finds it.
            let again = mirror(&gpu, &process);
            let seen = gpu.context(&again).unwrap().run(|view| view.load::<u64>(word(1)));
            assert_eq!(seen, Ok(process.load_u64(word(1)).unwrap()));
            drop((again, service));
            process.exit();
            check_empty(&machine, &gpu);
        }
    }
}

/// A parent and a child see their own copies, whatever their GPU does to them.
#[test]
fn a_fork_is_a_copy_for_the_gpu_too() {
    for memory in MEMORIES {
        let rig = Rig::new(2, options(memory));
        rig.fill(2, 5);
        let service = rig.gpu.start_service().unwrap();
        let context = rig.context();
        context.run(|view| view.store(word(0), 50_u64)).unwrap();
        let child = rig.process.fork().unwrap();
        let child_mirror = mirror(&rig.gpu, &child);
        let child_context = rig.gpu.context(&child_mirror).unwrap();
        context.run(|view| view.store(word(0), 51_u64)).unwrap();
        child_context.run(|view| view.store(word(1), 60_u64)).unwrap();
        let pair = |view: &uhmm_devices::gpu::DeviceMemoryView<'_>| {
            Ok([view.load::<u64>(word(0))?, view.load::<u64>(word(1))?])
        };
        assert_eq!(context.run(pair), Ok([51, 6]));
        assert_eq!(child_context.run(pair), Ok([50, 60]));
        assert_eq!(child.load_u64(word(0)).unwrap(), 50);
        drop((child_context, child_mirror, context, service));
        child.exit();
        rig.finish();
    }
}

/// The memory reaper, which must not sleep, takes what no context uses at the moment.
#[test]
fn the_reaper_is_not_made_to_wait() {
    let rig = Rig::new(4, options(0));
    rig.fill(4, 5);
    let service = rig.gpu.start_service().unwrap();
    let context = rig.context();
    assert_eq!(context.run(|view| view.load::<u64>(word(2))), Ok(7));
    assert_eq!(rig.process.oom_reap().unwrap(), 4);
    assert_eq!(context.cached(), 0);
    assert_eq!(context.run(|view| view.load::<u64>(word(2))), Ok(0), "it is reaped");
    drop((context, service));
    rig.finish();
}

/// Two GPUs whose memories are both too small, on the same pages.
#[test]
fn small_memories_on_shared_pages_lose_nothing() {
    const PAGES: u64 = 6;
    let rig = Rig::new(PAGES, options(2));
    let other = SoftGpu::new(options(3));
    let other_mirror = mirror(&other, &rig.process);
    let services = [rig.gpu.start_service().unwrap(), other.start_service().unwrap()];
    let contexts = [rig.context(), other.context(&other_mirror).unwrap(), rig.context()];
    let mut slot = 0;
    let kernels = contexts.map(|context| {
        slot += 1;
        context.spawn(move |view| {
            for round in 0..20 * PAGES {
                let address = word(round % PAGES) + 8 * slot;
                let old = view.load::<u64>(address)?;
                view.store(address, old + 1)?;
            }
            Ok(())
        })
    });
    kernels.into_iter().for_each(|kernel| kernel.join().unwrap());
    drop(services);
    for index in 0..PAGES {
        for slot in 1..=3 {
            assert_eq!(rig.process.load_u64(word(index) + 8 * slot).unwrap(), 20);
        }
    }
    other.check([&*other_mirror]).unwrap();
    drop(other_mirror);
    rig.finish();
    common::check_no_memory(&other);
}
