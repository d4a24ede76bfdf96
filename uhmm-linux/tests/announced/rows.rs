//! The rows of `docs/acceptance.md` that need changes of the program's to be announced. Each names its
//! rows. What a thread may not do before another has gone on is looked at for [`A_WHILE`]: it would do
//! it within microseconds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use uhmm::mmu_notifier::{EventKind, Subscription};
use uhmm::{Coherence, FaultError, PageRange, RangeFault};
use uhmm_linux::Process;

use super::common::eventually;
use super::common::listener::Listener;
use super::common::memory::{self, Backing, Mapping, NONE, R, RW};
use super::common::rig::{Gpu, device_load, device_store};
use super::{Ear, attach, in_own_process, listen};

/// How long something is seen not to happen.
const A_WHILE: Duration = Duration::from_millis(50);

/// A device that stops only when it is let go.
struct Slow<F: FnMut() -> bool + Send + 'static> {
    subscription: Subscription<Ear<F>>,
    told: Receiver<()>,
    let_go: Sender<()>,
}

/// Has a slow device use `range`.
fn slow(process: &Process, range: PageRange) -> Slow<impl FnMut() -> bool + Send + 'static> {
    let (tell, told) = channel();
    let (let_go, waits) = channel::<()>();
    // Only once: what the kernel tells of besides, and later changes, hold up nobody.
    let mut first = Some(waits);
    let stop = move || match first.take() {
        Some(waits) => tell.send(()).is_ok() && waits.recv().is_ok(),
        None => true,
    };
    let (_, subscription) = listen(process, range, stop);
    Slow { subscription, told, let_go }
}

/// Tells whether it comes about within [`A_WHILE`].
fn soon(done: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    while began.elapsed() < A_WHILE {
        if done() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// Faults a page in as a device, within [`A_WHILE`].
fn fault_soon(mirror: &super::common::rig::TestMirror, range: PageRange) -> Option<FaultError> {
    let request = RangeFault::read(range).deadline(Instant::now() + A_WHILE);
    mirror.range_fault(&request).err()
}

#[test]
fn b08_d12_the_process_detaches_while_the_program_changes_what_a_device_has() {
    in_own_process(|| {
        for round in 0..20 {
            let process = attach();
            assert_eq!(process.mm().coherence(), Coherence::Announced);
            let mapping = Mapping::anonymous(4);
            mapping.fill(|index| index);
            let (subscription, told) = Listener::listen(&process, mapping.range());
            let (over, range) = (AtomicBool::new(false), mapping.range());
            std::thread::scope(|scope| {
                let changes = scope.spawn(|| {
                    let mut changes = 0;
                    while !over.load(Ordering::SeqCst) || changes < 20 {
                        memory::unmap(range);
                        memory::map(range, Backing::Anonymous, RW).expect("nothing is there");
                        changes += 1;
                    }
                    changes
                });
                while told.events() < round {
                    std::thread::yield_now();
                }
                drop(process);
                // It has been told of the end, and after that of nothing.
                assert_eq!(told.releases(), 1, "round {round}");
                told.is_over();
                over.store(true, Ordering::SeqCst);
                assert!(changes.join().expect("it does not panic") >= 20);
            });
            assert!(subscription.unsubscribe().is_none(), "round {round}");
        }
    });
}

#[test]
fn d07_what_a_device_does_while_it_stops_may_change_mappings_of_its_own() {
    in_own_process(|| {
        let process = attach();
        let (mapping, own) = (Mapping::anonymous(2), Mapping::anonymous(4));
        let range = own.range();
        // Another executor makes the calls of the one that the device holds up.
        let (heard, _subscription) = listen(&process, mapping.range(), move || {
            memory::protect(range, R).is_ok() && memory::try_unmap(range).is_ok()
        });
        memory::protect(mapping.range(), NONE).expect("it is mapped");
        let heard = heard.lock().expect("nobody panics");
        assert_eq!(*heard, [(EventKind::ProtectionVma, mapping.range(), true)]);
        assert!(memory::mapped_in(range).is_empty());
    });
}

/// A device that faults a page in all the time, for writing, does not write to it after the program has
/// taken the right to.
#[test]
fn e01_what_a_device_faults_in_while_the_program_changes_it_is_not_stale() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(1);
        mapping.poke(0, 0);
        let (mirror, range) = (gpu.mirror(&process, mapping.range()), mapping.range());
        let over = AtomicBool::new(false);
        let mut overlaps = 0;
        std::thread::scope(|scope| {
            // Where this panics the device goes on, and the process ends.
            let device = scope.spawn(|| {
                process.reserve_this_thread();
                let mut stores = 0_u64;
                while !over.load(Ordering::SeqCst) {
                    stores += u64::from(device_store(&mirror, mapping.page(0), stores + 1).is_ok());
                }
            });
            // Each time the device is using the page when its right to goes.
            let mut stored = eventually(|| mapping.peek(0) > 0);
            while stored && overlaps < 50 {
                memory::protect(range, R).expect("it is mapped");
                let there = mapping.peek(0);
                (0..20).for_each(|_| std::thread::yield_now());
                memory::protect(range, RW).expect("it is mapped");
                stored = eventually(|| mapping.peek(0) > there);
                overlaps += 1;
            }
            over.store(true, Ordering::SeqCst);
            device.join().expect("it does not panic");
        });
        // The kernel refuses what a device does by a translation that was true, and it is counted.
        assert_eq!(process.statistics().stale_accesses, 0, "a device used a stale translation");
        assert_eq!(overlaps, 50, "the device does not go on");
    });
}

#[test]
fn e02_a_change_waits_for_a_device_that_is_about_to_commit() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(4);
        mapping.fill(|index| 3 + index);
        let range = mapping.range();
        let (_heard, subscription) = listen(&process, range, || true);
        std::thread::scope(|scope| {
            // Until the update is dropped the device has the lock that announcements take.
            let update = subscription.read_begin().expect("the process lives").commit();
            let update = update.expect("nothing changes");
            let change = scope.spawn(|| memory::unmap(range));
            assert!(!soon(|| change.is_finished()), "the mapping went under a device");
            assert_eq!(mapping.peek(2), 5);
            drop(update);
            change.join().expect("it does not panic");
        });
        assert!(memory::mapped_in(range).is_empty());
    });
}

#[test]
fn e09_e10_a_fault_waits_for_a_change_of_its_own_page_and_for_no_other() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let (here, there) = (Mapping::anonymous(1), Mapping::anonymous(1));
        here.poke(0, 3);
        there.poke(0, 4);
        let mirrors = [&here, &there].map(|mapping| gpu.mirror(&process, mapping.range()));
        let device = slow(&process, there.range());
        let protected = there.range();
        std::thread::scope(|scope| {
            // Where this panics the device goes on.
            let device = device;
            let change = scope.spawn(move || memory::protect(protected, R));
            device.told.recv().expect("the device is told");
            let error = fault_soon(&mirrors[1], there.range());
            assert!(matches!(error, Some(FaultError::TimedOut { .. })), "{error:?}");
            assert_eq!(device_load(&mirrors[0], here.page(0)), Ok(3));
            // One that waits without a limit goes on when the change has been made.
            let waits = scope.spawn(|| device_load(&mirrors[1], there.page(0)));
            assert!(!soon(|| waits.is_finished() || change.is_finished()));
            device.let_go.send(()).expect("it waits");
            assert_eq!(change.join().expect("it does not panic"), Ok(()));
            assert_eq!(waits.join().expect("it does not panic"), Ok(4));
        });
        assert!(device_store(&mirrors[1], there.page(0), 9).is_err());
    });
}

#[test]
fn e14_who_comes_amid_a_change_waits_for_its_end() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(2);
        mapping.fill(|index| 6 + index);
        let (range, device) = (mapping.range(), slow(&process, mapping.range()));
        std::thread::scope(|scope| {
            // Where this panics the device goes on.
            let device = device;
            let change = scope.spawn(move || memory::protect(range, NONE));
            device.told.recv().expect("the device is told");
            // What it would find now is about to go.
            let mirror = gpu.mirror(&process, range);
            let error = fault_soon(&mirror, range);
            assert!(matches!(error, Some(FaultError::TimedOut { .. })), "{error:?}");
            device.let_go.send(()).expect("it waits");
            assert_eq!(change.join().expect("it does not panic"), Ok(()));
            assert!(device_load(&mirror, mapping.page(1)).is_err());
            memory::protect(range, RW).expect("it is mapped");
            assert_eq!(device_load(&mirror, mapping.page(1)), Ok(7));
        });
    });
}

#[test]
fn e15_who_unregisters_waits_until_its_device_has_stopped() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(1);
        let (range, device) = (mapping.range(), slow(&process, mapping.range()));
        std::thread::scope(|scope| {
            let Slow { subscription, told, let_go } = device;
            let change = scope.spawn(move || memory::unmap(range));
            told.recv().expect("the device is told");
            let leaves = scope.spawn(move || subscription.unsubscribe().is_some());
            assert!(!soon(|| leaves.is_finished() || change.is_finished()));
            let_go.send(()).expect("it waits");
            assert!(leaves.join().expect("it does not panic"));
            change.join().expect("it does not panic");
        });
    });
}
