//! Bugs that others have made, on a whole GPU. The numbers are those of `docs/regressions.md`.
#![cfg(not(shuttle))]

mod common;

use common::{Rig, check_empty, mirror, options, range, word};
use uhmm::sim::{Machine, MachineOptions};
use uhmm::{Access, RangeFault};
use uhmm_devices::gpu::{FaultReason, SoftGpu};

/// Regression 24: what is unmapped across the edges of table nodes leaves the translations on either
/// side, each with its rights.
#[test]
fn an_unmapping_across_the_edges_of_table_nodes_takes_what_it_names() {
    let rig = Rig::new(0x600, options(0));
    rig.fill(0x600, 0);
    for index in (0..0x600).step_by(3) {
        rig.process.protect(range(index, 1), Access::Read);
    }
    let mut gone = vec![false; 0x600];
    let entered = RangeFault::read(range(0, 0x600));
    for (first, pages) in [(0x1ff, 1), (0x200, 1), (0x3fe, 4), (0x1f0, 0x20), (0x5ff, 1)] {
        rig.mirror.range_fault(&RangeFault::snapshot(entered.range())).expect("a look");
        rig.process.unmap(range(first, pages));
        gone[first as usize..][..pages as usize].fill(true);
        rig.gpu.check([&*rig.mirror]).expect("the GPU is whole");
        for index in 0..0x600 {
            let access = rig.translation(index).map(|translation| translation.access);
            let right = if index % 3 == 0 { Access::Read } else { Access::Write };
            assert_eq!(access, (!gone[index as usize]).then_some(right), "page {index:#x}");
        }
    }
    rig.finish();
}

/// Regression 48: a GPU that scribbles over the memory it gives out never shows a kernel what was in
/// it, also where the job that clears it fails at first.
#[test]
fn no_kernel_sees_what_was_in_fresh_device_memory() {
    for fails in [false, true] {
        let rig = Rig::new(4, options(2));
        if fails {
            rig.gpu.injector().fail("clear", 0);
        }
        let service = rig.gpu.start_service().expect("nobody serves");
        let context = rig.context();
        for round in 0..3 {
            for index in 0..4 {
                let page = context.run(|view| {
                    let mut bytes = [1; 4096];
                    view.read(word(index), &mut bytes)?;
                    view.write(word(index), &[0xab; 4096])?;
                    Ok(bytes)
                });
                assert_eq!(page, Ok([0; 4096]), "page {index} in round {round}");
            }
            rig.process.discard(range(0, 4));
        }
        drop((context, service));
        rig.finish();
    }
}

/// Regression 49: a kernel that stores when its process exits stores to nothing that has been freed.
#[test]
fn a_kernel_stores_to_nothing_that_an_exit_has_freed() {
    for round in 0..20_u64 {
        let machine = Machine::with(MachineOptions::new().count_violations());
        let rig = Rig::on(machine, 4, options(round % 3));
        let service = rig.gpu.start_service().expect("nobody serves");
        let (sender, has_stored) = std::sync::mpsc::channel();
        let kernel = rig.context().spawn(move |view| {
            for value in 0_u64.. {
                view.store(word(value % 4), value)?;
                _ = sender.send(());
            }
            Ok(())
        });
        (0..=round).for_each(|_| has_stored.recv().expect("the kernel stores"));
        let Rig { machine, process, gpu, mirror } = rig;
        process.exit();
        assert_eq!(kernel.join().expect_err("its memory is gone").reason, FaultReason::Gone);
        // A fault under way may have been the last user: then the death may come after this.
        drop(mirror.unregister());
        drop(service);
        common::until(|| machine.frames() == 0 && common::used(&gpu) == 0);
        check_empty(&machine, &gpu);
    }
}

/// Regression 62: a GPU that has no memory of its own, or was never used, goes through all that ends
/// one.
#[test]
fn a_gpu_that_was_never_used_is_evicted_stopped_and_unregistered() {
    for memory in [0, 4] {
        let rig = Rig::new(1, options(memory));
        let other = SoftGpu::new(options(memory));
        let unused = mirror(&other, &rig.process);
        drop(other.start_service().expect("nobody serves"));
        assert_eq!(other.service_once().fetched, 0);
        if let Some(pagemap) = other.pagemap() {
            assert_eq!((pagemap.evict(1), pagemap.evict_all()), (0, Ok(())));
        }
        assert!(unused.unregister().is_some(), "the process lives");
        other.check([]).expect("the GPU is whole");
        rig.finish();
    }
}
