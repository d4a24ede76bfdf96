//! Failures at every step: an error, or full service, and never other contents.

mod common;

use std::time::{Duration, Instant};

use common::OwnProcess;
use common::children::{End, How, Scattered, child, end_of};
use common::leaks::holdings;
use common::memory::{Mapping, advise, remap, unmap};
use common::rig::{Gpu, attach_with, device_add, device_load, device_store};
use uhmm::{DevicePagemap, FaultError, Injector, Order, RangeFault};
use uhmm_linux::{Options, Process};

/// Everything that goes through the kernel, once. The contents are compared all the way; whether
/// pages move is not, since any of it may fail.
fn story(injector: &Injector) {
    let before = holdings();
    let options = Options::new().injector(injector.clone()).servers(2);
    let Ok(process) = Process::attach(options) else {
        assert_eq!(holdings().difference(&before), "", "nothing is left behind");
        return;
    };
    {
        let memory = Scattered::new(&process);
        memory.fill(1);
        process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        process.migrate(memory.part(1), &memory.host).run();
        memory.check(1);
        process.migrate(memory.part(0), &memory.host).run();
        process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        process.migrate(memory.part(4), &memory.gpu.pagemap).run();
        process.migrate_home(memory.part(0));
        process.migrate(memory.part(1), &memory.gpu.pagemap).run();
        memory.gpu.pagemap.evict(4);
        memory.check(1);
        let mirror = memory.gpu.mirror(&process, memory.mapping.range());
        let first = memory.mapping.page(0);
        if let Ok(word) = device_load(&mirror, first) {
            assert_eq!(word, Scattered::value(0, 1));
        }
        if device_store(&mirror, first, 7).is_ok() {
            assert_eq!(memory.mapping.peek(0), 7);
        }
        memory.fill(2);
        if let Ok(held) = mirror.exclusive(memory.part(2)) {
            drop(held);
        }
        let third = memory.part(2).first();
        let expected = Scattered::value(2 * Scattered::PART, 2);
        if let Ok(word) = device_add(&mirror, third, 5) {
            assert_eq!(word, expected);
            assert_eq!(memory.mapping.peek(2 * Scattered::PART), expected + 5);
        }
        drop(mirror);
        memory.fill(3);
        process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        process.migrate(memory.part(1), &memory.host).run();
        for how in [How::Hooked, How::Raw] {
            let pid = child(how, || memory.is_right(3));
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            memory.check(3);
            process.migrate(memory.part(0), &memory.gpu.pagemap).run();
            process.migrate(memory.part(1), &memory.host).run();
        }
        memory.check(3);
    }
    huge_and_changing(&process);
    drop(process);
    assert_eq!(holdings().difference(&before), "");
}

fn huge_and_changing(process: &Process) {
    let mapping = Mapping::anonymous(1024);
    let host = DevicePagemap::register(process.host_memory(2048));
    let block = mapping.page(511).block(Order::HUGE);
    let at = mapping.range().index_of(block.first()).expect("within") as u64;
    mapping.fill(|index| index);
    process.migrate(block, &host).run();
    let gpu = Gpu::new(64);
    process.migrate(mapping.part(at + 8, 8), &gpu.pagemap).run();
    advise(mapping.part(at + 16, 8), libc::MADV_DONTNEED).expect("it is mapped");
    unmap(mapping.part(at + 32, 8));
    let target = Mapping::anonymous(8);
    remap(mapping.part(at + 64, 8), target.range().first()).expect("both are mapped");
    for index in (0..512).chain(0..512) {
        let expected = match index {
            16..24 => 0,
            32..40 | 64..72 => continue,
            _ => at + index,
        };
        assert_eq!(mapping.peek(at + index), expected, "page {index} of a huge one");
    }
    (0..8).for_each(|index| assert_eq!(target.peek(index), at + 64 + index));
}

#[test]
fn a_failure_at_any_step_is_an_error_or_nothing() {
    OwnProcess::new().deadline(Duration::from_secs(170)).run(|| {
        let injector = Injector::new();
        story(&injector);
        let all = injector.asked_in_all();
        let mut failed = 0;
        // All of the first, and then fewer: each story takes a while.
        let mut step = 0;
        while step < 3 * all {
            injector.fail_any(step);
            let asked = injector.asked_in_all();
            story(&injector);
            injector.clear();
            if injector.asked_in_all() - asked <= step {
                break;
            }
            failed += 1;
            step += 1;
        }
        println!("{failed} failures, {injector:?}");
        assert!(failed >= 100, "only {failed} failures");
    });
}

/// A step that never succeeds: service goes on as far as it does without it.
fn never(steps: &[&'static str]) {
    for &step in steps {
        let injector = Injector::new();
        let process = attach_with(
            Options::new().injector(injector.clone()).patience(Duration::from_millis(300)),
        );
        let memory = Scattered::new(&process);
        memory.fill(1);
        println!("without {step}");
        injector.fail_always(step);
        process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        process.migrate(memory.part(1), &memory.host).run();
        memory.check(1);
        let pid = child(How::Hooked, || memory.is_right(1));
        assert_eq!(end_of(pid), End::Well, "{step}");
        process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        let pid = child(How::Raw, || memory.is_right(1));
        assert_eq!(end_of(pid), End::Well, "{step}");
        memory.check(1);
        injector.clear();
        let report = process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        assert_eq!(report.moved, Scattered::PART, "{step}: {report:?}");
        memory.check(1);
    }
}

#[test]
fn service_goes_on_without_what_may_fail() {
    OwnProcess::new()
        .run(|| never(&["register", "unregister", "staging", "move", "zeropage", "populate"]));
}

/// Who sleeps for a page and cannot be woken would sleep for ever.
#[test]
fn where_nobody_can_be_woken_the_process_ends() {
    OwnProcess::new().run(|| {
        let pid = child(How::Hooked, || {
            let injector = Injector::new();
            let process = attach_with(Options::new().injector(injector.clone()));
            let memory = Scattered::new(&process);
            memory.fill(1);
            memory.scatter();
            injector.fail_always("wake");
            unmap(memory.part(0));
            // The event has been read, so this process is about to end.
            common::eventually(|| false)
        });
        assert_eq!(end_of(pid), End::Signal(libc::SIGABRT));
    });
}

/// A signal that comes while the kernel brings a page is no error, and so are many.
#[test]
fn a_fault_goes_on_however_often_it_is_interrupted() {
    OwnProcess::new().run(|| {
        let injector = Injector::new();
        let process = attach_with(Options::new().injector(injector.clone()));
        let mapping = Mapping::anonymous(2);
        mapping.poke(0, 7);
        let gpu = Gpu::new(16);
        let mirror = gpu.mirror(&process, mapping.range());
        injector.fail_always("interrupt");
        let deadline = Instant::now() + Duration::from_millis(100);
        let request = RangeFault::write(mapping.range()).deadline(deadline);
        let result = mirror.range_fault(&request);
        assert!(matches!(result, Err(FaultError::TimedOut { .. })), "{result:?}");
        std::thread::scope(|scope| {
            let fault = scope.spawn(|| device_store(&mirror, mapping.page(1), 8));
            let asked = injector.asked("interrupt");
            // So many calls within each other would not fit on its stack.
            assert!(common::eventually(|| injector.asked("interrupt") > asked + 200_000));
            assert!(!fault.is_finished());
            injector.clear();
            assert_eq!(fault.join().expect("it does not panic"), Ok(()));
        });
        assert_eq!((mapping.peek(0), mapping.peek(1)), (7, 8));
    });
}

/// What has left without a copy and cannot come back stays away, and comes when it can.
#[test]
fn pages_that_cannot_come_home_come_later() {
    OwnProcess::new().run(|| {
        let injector = Injector::new();
        let process = attach_with(Options::new().injector(injector.clone()));
        for steps in [&["move", "copy"][..], &["buffer"], &["copy"]] {
            let memory = Scattered::new(&process);
            memory.fill(1);
            memory.scatter();
            steps.iter().for_each(|step| injector.fail_always(step));
            process.migrate_home(memory.part(0));
            process.migrate_home(memory.part(1));
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| memory.check(1));
                assert!(common::eventually(|| steps.iter().any(|step| injector.asked(step) > 3)));
                injector.clear();
                reader.join().expect("everything is there");
            });
        }
    });
}
