//! Who may end before whom: processes, mirrors, devices, children.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::children::{Board, End, How, Scattered, WAYS, child, end_of};
use common::leaks::holdings;
use common::memory::Mapping;
use common::rig::{Gpu, TestMirror, attach, device_load, device_store};
use common::{eventually, exit_now, in_own_process};
use rustix::process::WaitOptions;
use uhmm::{DevicePagemap, FaultError, Mirror};

/// B01-B08: whoever still has a mirror when the process detaches is told, and finds nothing there.
#[test]
fn mirrors_outlive_the_attachment() {
    in_own_process(|| {
        for _ in 0..20 {
            let process = attach();
            let mapping = Mapping::anonymous(8);
            mapping.fill(|index| 10 + index);
            let gpu = Gpu::new(64);
            let mirror = gpu.mirror(&process, mapping.range());
            process.migrate(mapping.part(0, 4), &gpu.pagemap).run();
            assert_eq!(device_load(&mirror, mapping.page(0)), Ok(10));
            assert_eq!(device_load(&mirror, mapping.page(5)), Ok(15));
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        match device_load(&mirror, mapping.page(1)) {
                            Ok(word) => assert_eq!(word, 11),
                            Err(error) => assert_eq!(error, FaultError::Released),
                        }
                    }
                });
                drop(process);
                stop.store(true, Ordering::SeqCst);
            });
            assert_eq!(device_load(&mirror, mapping.page(0)), Err(FaultError::Released));
            (0..8).for_each(|index| assert_eq!(mapping.peek(index), 10 + index));
            let _: Option<_> = Mirror::unregister(mirror);
            let again = attach();
            let host = DevicePagemap::register(again.host_memory(64));
            assert_eq!(again.migrate(mapping.range(), &host).run().moved, 8);
            (0..8).for_each(|index| assert_eq!(mapping.peek(index), 10 + index));
        }
    });
}

/// B06, B07: mirrors come and go, and nothing of them stays.
#[test]
fn mirrors_come_and_go_and_leave_nothing() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(16);
        mapping.fill(|index| index);
        let gpu = Gpu::new(64);
        let mut before = None;
        for round in 0..2000_u64 {
            let mirror = gpu.mirror(&process, mapping.range());
            let index = round % 16;
            assert_eq!(device_load(&mirror, mapping.page(index)), Ok(round / 16 * 16 + index));
            device_store(&mirror, mapping.page(index), (round / 16 + 1) * 16 + index)
                .expect("it is mapped");
            if round % 3 == 0 {
                process.migrate(mapping.part(index, 1), &gpu.pagemap).run();
            }
            match round % 2 {
                0 => drop(mirror),
                _ => drop(Mirror::unregister(mirror)),
            }
            if round == 100 {
                before = Some(holdings());
            }
        }
        let before = before.expect("there were as many rounds");
        process.migrate_home(mapping.range());
        let now = holdings();
        assert_eq!((now.descriptors, now.threads), (before.descriptors, before.threads));
        assert!(now.mappings <= before.mappings + 4, "{}, not {}", now.mappings, before.mappings);
        assert_eq!(gpu.pagemap.used(), 0);
    });
}

/// B16: the parent mirrors and forks; whichever ends first, the other finds nothing wrong.
#[test]
fn a_mirror_that_a_child_inherits_is_no_mirror_there() {
    in_own_process(|| {
        let own = Some(rustix::process::getpid());
        rustix::process::set_child_subreaper(own).expect("prctl");
        let board = Board::new();
        for how in WAYS {
            for parent_first in [false, true] {
                (0..4).for_each(|word| board.set(word, 0));
                let middle = child(How::Hooked, || {
                    let mut owned = Some(Scattered::new(&attach()));
                    let memory = owned.as_ref().expect("made just now");
                    memory.fill(1);
                    let mapping = Mapping::anonymous(4);
                    mapping.fill(|index| index + 1);
                    let gpu = Gpu::new(16);
                    let mut held = Some(gpu.mirror(&memory.process, mapping.range()));
                    let load = |mirror: &Option<TestMirror>, page| {
                        device_load(mirror.as_ref().expect("not dropped yet"), page)
                    };
                    assert_eq!(load(&held, mapping.page(1)), Ok(2));
                    memory.scatter();
                    let pid = child(how, || {
                        if parent_first {
                            assert!(eventually(|| board.get(0) == 1));
                        }
                        // What it does to its memory is none of the parent's.
                        mapping.poke(1, 77);
                        let foreign = load(&held, mapping.page(2));
                        assert!(foreign.is_err(), "{foreign:?}");
                        drop(held.take());
                        let right = owned.as_ref().expect("not dropped yet").is_right(1);
                        drop(owned.take());
                        board.set(1, 1 + u64::from(right));
                        true
                    });
                    if parent_first {
                        exit_now(0);
                    }
                    assert_eq!(end_of(pid), End::Well);
                    assert_eq!(load(&held, mapping.page(1)), Ok(2));
                    owned.as_ref().expect("only the child dropped it").is_right(1)
                });
                assert_eq!(end_of(middle), End::Well, "{how:?}");
                board.set(0, 1);
                assert!(eventually(|| board.get(1) != 0), "{how:?}: the child has ended");
                assert_eq!(board.get(1), 2, "{how:?}: the child has its pages");
                while rustix::process::wait(WaitOptions::empty()).is_ok() {}
            }
        }
    });
}

/// Device memory that outlives the attachment is empty, and can be freed.
#[test]
fn device_memory_outlives_the_attachment() {
    in_own_process(|| {
        for _ in 0..10 {
            let memory = Scattered::new(&attach());
            memory.fill(3);
            memory.scatter();
            let Scattered { process, gpu, host, mapping, .. } = memory;
            drop(process);
            drop(gpu);
            drop(host);
            (0..4 * Scattered::PART)
                .for_each(|index| assert_eq!(mapping.peek(index), Scattered::value(index, 3)));
        }
    });
}
