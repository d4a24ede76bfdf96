//! The fault buffer: what is served together, what is replayed when, and what fails how.
#![cfg(not(shuttle))]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{MIRRORED, Rig, mirror, options, page, range, word};
use uhmm::policy::{DeviceFault, DevicePlan, Location, Policies, Policy};
use uhmm::primitive::atomic::{AtomicUsize, Ordering::SeqCst};
use uhmm::primitive::{Condvar, Mutex, lock, wait};
use uhmm::sim::{Machine, MachineOptions, Mapping};
use uhmm::{Access, Clock, Injector, PagemapOptions, Released};
use uhmm_devices::gpu::{
    FaultReason, FaultService, KernelFault, ReplayPolicy, RunningKernel, ServiceError, SoftGpu,
    SoftGpuOptions,
};

fn fault<T>(reason: FaultReason, address: u64, access: Access) -> Result<T, KernelFault> {
    Err(KernelFault { reason, address, access })
}

impl Rig {
    fn load(&self, address: u64) -> RunningKernel<u64> {
        self.context().spawn(move |view| view.load::<u64>(address))
    }

    fn store(&self, address: u64, value: u64) -> RunningKernel<()> {
        self.context().spawn(move |view| view.store(address, value))
    }

    fn add(&self, address: u64, value: u64) -> RunningKernel<u64> {
        self.context().spawn(move |view| view.fetch_add_u64(address, value))
    }

    /// Waits until so many faults are in the buffer.
    fn wait_for_faults(&self, faults: usize) {
        self.until(|| self.gpu.pending_faults() == faults);
    }

    /// Makes one access with a service running.
    fn served<R: Send + 'static>(
        &self,
        kernel: impl FnOnce(&Rig) -> RunningKernel<R>,
    ) -> Result<R, KernelFault> {
        let _service = self.gpu.start_service().expect("nobody serves");
        kernel(self).join()
    }
}

// What is fatal, and why (F63).

#[test]
fn f63_a_hole_is_a_fault_of_the_address() {
    for memory in [0, 8] {
        let rig = Rig::new(2, options(memory));
        let address = word(2) + 16;
        let result = rig.served(|rig| rig.load(address));
        assert_eq!(result, fault(FaultReason::Address, address, Access::Read));
        // Beyond the mirror, and at the top of everything.
        for address in [word(MIRRORED), u64::MAX - 7] {
            let result = rig.served(|rig| rig.load(address));
            assert_eq!(result, fault(FaultReason::Address, address, Access::Read));
        }
        // The part of a copy before the hole is done.
        let bytes = [7; 100];
        let result =
            rig.served(|rig| rig.context().spawn(move |view| view.write(word(2) - 50, &bytes)));
        assert_eq!(result, fault(FaultReason::Address, word(2), Access::Write));
        let mut last = [0; 50];
        rig.process.load(word(2) - 50, &mut last).unwrap();
        assert_eq!(last, [7; 50]);
        rig.finish();
    }
}

#[test]
fn f63_what_a_mapping_does_not_allow_is_a_fault_of_permission() {
    for memory in [0, 8] {
        let rig = Rig::new(3, options(memory));
        rig.process.store_u64(word(0), 5).unwrap();
        rig.process.protect(range(0, 1), Access::Read);
        rig.process.protect(range(1, 1), Access::None);
        assert_eq!(rig.served(|rig| rig.load(word(0))), Ok(5));
        let denied = fault(FaultReason::Permission, word(0), Access::Write);
        assert_eq!(rig.served(|rig| rig.store(word(0), 6)), denied);
        let denied = fault(FaultReason::Permission, word(0) + 8, Access::Atomic);
        assert_eq!(rig.served(|rig| rig.add(word(0) + 8, 6)), denied);
        let denied = fault(FaultReason::Permission, word(1), Access::Read);
        assert_eq!(rig.served(|rig| rig.load(word(1))), denied);
        assert_eq!(rig.process.load_u64(word(0)).unwrap(), 5);
        rig.finish();
    }
}

#[test]
fn f63_atomic_operations_on_files_are_faults_of_the_type() {
    let rig = Rig::new(1, options(8));
    let file = rig.machine.file(2);
    let mapping = Mapping::file(&file, 0, Access::Write);
    rig.process.map(range(4, 4), mapping).unwrap();
    let refused = fault(FaultReason::Type, word(4), Access::Atomic);
    assert_eq!(rig.served(|rig| rig.add(word(4), 1)), refused);
    assert_eq!(rig.served(|rig| rig.store(word(4), 3)), Ok(()));
    assert_eq!(rig.process.load_u64(word(4)).unwrap(), 3);
    // Beyond the end of the file.
    let beyond = fault(FaultReason::Address, word(6), Access::Read);
    assert_eq!(rig.served(|rig| rig.load(word(6))), beyond);
    drop(file);
    rig.finish();
}

#[test]
fn f63_no_memory_is_a_fault_of_its_own() {
    let injector = Injector::new();
    let machine = Machine::with(MachineOptions::new().injector(injector.clone()));
    let rig = Rig::on(machine, 2, options(0));
    injector.fail_always("frame");
    let none = fault(FaultReason::OutOfMemory, word(1), Access::Write);
    assert_eq!(rig.served(|rig| rig.store(word(1), 1)), none);
    injector.clear();
    assert_eq!(rig.served(|rig| rig.store(word(1), 1)), Ok(()));
    rig.finish();
}

#[test]
fn f63_operations_that_are_wrong_in_themselves_reach_nothing() {
    let rig = Rig::new(1, options(8));
    let context = rig.context();
    let wrong = |address, access| fault(FaultReason::Operation, address, access);
    let result = context.run(|view| view.load::<u32>(word(0) + 2)).map(u64::from);
    assert_eq!(result, wrong(word(0) + 2, Access::Read));
    let result = context.run(|view| view.fetch_add_u64(word(0) + 4, 1));
    assert_eq!(result, wrong(word(0) + 4, Access::Atomic));
    let result = context.run(|view| view.write(u64::MAX, &[0; 2])).map(|()| 0);
    assert_eq!(result, wrong(u64::MAX, Access::Write));
    assert_eq!(rig.gpu.fault_statistics().reported, 0);
    drop(context);
    rig.finish();
}

/// A page that another device cannot copy home: tried again, and after its share of tries fatal.
#[test]
fn a_copy_that_keeps_failing_is_fatal_in_the_end() {
    let rig = Rig::new(1, options(4));
    rig.process.store_u64(word(0), 9).unwrap();
    assert_eq!(rig.served(|rig| rig.load(word(0))), Ok(9));
    let other = SoftGpu::new(options(4).max_retries(3));
    let other_mirror = mirror(&other, &rig.process);
    let service = other.start_service().unwrap();
    let context = other.context(&other_mirror).unwrap();
    rig.gpu.injector().fail("copy", 0);
    assert_eq!(context.run(|view| view.load::<u64>(word(0))), Ok(9), "one failure passes");
    assert_eq!(rig.served(|rig| rig.load(word(0))), Ok(9));
    rig.gpu.injector().fail_always("copy");
    let result = context.run(|view| view.load::<u64>(word(0)));
    assert_eq!(result, fault(FaultReason::Internal, word(0), Access::Read));
    assert!(other.fault_statistics().retried >= 3);
    rig.gpu.injector().clear();
    assert_eq!(context.run(|view| view.load::<u64>(word(0))), Ok(9), "nothing is lost");
    drop((service, context));
    other.check([&*other_mirror]).unwrap();
    drop(other_mirror);
    rig.finish();
}

/// An access that was reported twice has failed once.
#[test]
fn a_try_is_charged_to_an_access_and_not_to_its_packets() {
    let rig = Rig::new(1, options(4));
    rig.process.store_u64(word(0), 9).unwrap();
    assert_eq!(rig.served(|rig| rig.load(word(0))), Ok(9));
    let other = SoftGpu::new(options(0).max_retries(1));
    let other_mirror = mirror(&other, &rig.process);
    let context = other.context(&other_mirror).unwrap();
    other.injector().fail("duplicate-fault", 0);
    rig.gpu.injector().fail("copy", 0);
    let kernel = context.spawn(|view| view.load::<u64>(word(0)));
    rig.until(|| other.pending_faults() == 2);
    let service = other.start_service().unwrap();
    assert_eq!(kernel.join(), Ok(9));
    assert_eq!(other.fault_statistics().retried, 1);
    drop(service);
    drop(other_mirror);
    rig.finish();
}

/// Between tries some time passes, more each time.
#[test]
fn tries_are_not_used_up_in_no_time() {
    let rig = Rig::new(1, options(4));
    rig.process.store_u64(word(0), 9).unwrap();
    assert_eq!(rig.served(|rig| rig.load(word(0))), Ok(9));
    let clock = Clock::manual();
    let pagemap = PagemapOptions::new().policies(Policies::none()).clock(clock.clone());
    let other = SoftGpu::new(options(4).pagemap(pagemap).max_retries(3));
    let other_mirror = mirror(&other, &rig.process);
    let service = other.start_service().unwrap();
    let context = other.context(&other_mirror).unwrap();
    rig.gpu.injector().fail_always("copy");
    let result = context.run(|view| view.load::<u64>(word(0)));
    assert_eq!(result, fault(FaultReason::Internal, word(0), Access::Read));
    assert_eq!(clock.now(), Duration::from_micros(10 + 20 + 40));
    rig.gpu.injector().clear();
    drop((service, context));
    drop(other_mirror);
    rig.finish();
}

/// A page that is pinned cannot be held for atomic operations until the pin is over.
#[test]
fn an_atomic_operation_waits_for_a_pin_to_pass() {
    let rig = Rig::new(1, options(0).max_retries(u32::MAX));
    rig.process.store_u64(word(0), 5).unwrap();
    let pin = rig.process.pin(range(0, 1)).unwrap();
    let service = rig.gpu.start_service().unwrap();
    let kernel = rig.add(word(0), 1);
    rig.until(|| rig.gpu.fault_statistics().retried >= 3 || kernel.is_finished());
    drop(pin);
    assert_eq!(kernel.join(), Ok(5));
    drop(service);
    assert_eq!(rig.process.load_u64(word(0)).unwrap(), 6);
    rig.finish();
}

// Batches (F61).

/// Readers and a writer of one page that must not be written: the readers go on (F63).
#[test]
fn f63_only_the_access_that_is_refused_is_cancelled() {
    for memory in [0, 8] {
        let rig = Rig::new(2, options(memory));
        rig.fill(2, 10);
        rig.process.protect(range(0, 1), Access::Read);
        let readers = [rig.load(word(0)), rig.load(word(0))];
        let writer = rig.store(word(0), 1);
        let adder = rig.add(word(0), 1);
        let elsewhere = rig.store(word(1), 50);
        rig.wait_for_faults(5);
        let done = rig.gpu.service_once();
        assert_eq!((done.fetched, done.pages, done.cancelled), (5, 2, 2));
        assert_eq!(rig.gpu.pending_faults(), 0);
        assert_eq!(readers.map(RunningKernel::join), [Ok(10), Ok(10)]);
        assert_eq!(writer.join(), fault(FaultReason::Permission, word(0), Access::Write));
        assert_eq!(adder.join(), fault(FaultReason::Permission, word(0), Access::Atomic));
        assert_eq!(elsewhere.join(), Ok(()));
        assert_eq!(rig.process.load_u64(word(1)).unwrap(), 50);
        rig.finish();
    }
}

#[test]
fn f61_faults_on_one_page_are_served_once_and_for_the_strongest_access() {
    let rig = Rig::new(1, options(8));
    rig.fill(1, 10);
    let reader = rig.load(word(0) + 8);
    let adder = rig.add(word(0) + 16, 3);
    let writer = rig.store(word(0) + 24, 4);
    rig.wait_for_faults(3);
    let done = rig.gpu.service_once();
    assert_eq!((done.fetched, done.pages, done.cancelled), (3, 1, 0));
    let statistics = rig.gpu.fault_statistics();
    assert_eq!((statistics.duplicates, statistics.replays), (2, 1));
    assert_eq!((reader.join(), adder.join(), writer.join()), (Ok(0), Ok(0), Ok(())));
    assert_eq!(rig.gpu.fault_statistics().reported, 3, "no access faulted again");
    assert_eq!(rig.translation(0).unwrap().access, Access::Atomic);
    rig.finish();
}

/// A fault whose page came along with another is not served again.
#[test]
fn f61_a_page_that_is_served_already_is_left_alone() {
    let rig = Rig::new(2, options(8));
    rig.fill(2, 0);
    let kernels = [rig.load(word(0)), rig.load(word(1))];
    rig.wait_for_faults(2);
    rig.mirror.handle_fault(page(1), Access::Read).unwrap();
    let done = rig.gpu.service_once();
    assert_eq!((done.fetched, done.pages), (2, 1));
    assert_eq!(rig.gpu.fault_statistics().already_served, 1);
    assert_eq!(kernels.map(RunningKernel::join), [Ok(0), Ok(1)]);
    rig.finish();
}

#[test]
fn a_full_fault_buffer_makes_contexts_wait() {
    let rig = Rig::new(6, options(8).fault_buffer(2));
    rig.fill(6, 100);
    let kernels: Vec<_> = (0..6).map(|index| rig.load(word(index))).collect();
    rig.until(|| rig.gpu.fault_statistics().reported == 6);
    assert_eq!(rig.gpu.pending_faults(), 2);
    assert_eq!(rig.gpu.fault_statistics().overflows, 4);
    rig.until(|| rig.gpu.stalled_contexts() == 6);
    rig.until(|| {
        rig.gpu.service_once();
        kernels.iter().all(RunningKernel::is_finished)
    });
    for (kernel, expected) in kernels.into_iter().zip(100..) {
        assert_eq!(kernel.join(), Ok(expected));
    }
    rig.finish();
}

/// A replay wakes contexts whose faults are still in the buffer, and they report again. What is left
/// of them keeps nobody from being cancelled.
#[test]
fn faults_that_cannot_be_served_do_not_go_round() {
    for policy in [ReplayPolicy::Block, ReplayPolicy::Batch] {
        let rig = Rig::new(1, options(8).batch(1).replay(policy));
        let kernels = [10, 20, 30].map(|hole| rig.load(word(hole)));
        rig.wait_for_faults(3);
        let mut fetched = 0;
        rig.until(|| {
            fetched += rig.gpu.service_once().fetched;
            assert!(fetched < 100, "the same faults come again and again");
            kernels.iter().all(RunningKernel::is_finished)
        });
        for (kernel, hole) in kernels.into_iter().zip([10, 20, 30]) {
            assert_eq!(kernel.join(), fault(FaultReason::Address, word(hole), Access::Read));
        }
        rig.finish();
    }
}

/// A packet of an access that has ended is dropped.
#[test]
fn f65_a_stale_fault_is_not_served() {
    let rig = Rig::new(1, options(8).batch(1).replay(ReplayPolicy::Batch));
    rig.gpu.injector().fail("duplicate-fault", 0);
    let kernel = rig.load(word(0));
    rig.wait_for_faults(2);
    assert_eq!(rig.gpu.service_once().fetched, 1);
    assert_eq!(kernel.join(), Ok(0));
    assert_eq!(rig.gpu.pending_faults(), 1);
    assert_eq!(rig.gpu.service_once().fetched, 0);
    assert_eq!((rig.gpu.pending_faults(), rig.gpu.fault_statistics().stale), (0, 1));
    rig.finish();
}

// Replays (F62).

/// Three faults in two blocks of 2 MiB, in batches of two.
fn replays(policy: ReplayPolicy) -> (u64, u64) {
    let rig = Rig::new(600, options(8).replay(policy).batch(2));
    let addresses = [word(0), word(1), word(550)];
    let kernels = addresses.map(|address| rig.load(address));
    rig.wait_for_faults(3);
    let mut fetched = rig.gpu.service_once().fetched;
    rig.until(|| {
        fetched += rig.gpu.service_once().fetched;
        kernels.iter().all(RunningKernel::is_finished)
    });
    assert_eq!(kernels.map(RunningKernel::join), [Ok(0), Ok(0), Ok(0)]);
    let statistics = rig.gpu.fault_statistics();
    assert_eq!(statistics.fetched, fetched);
    rig.finish();
    (statistics.flushed, statistics.replays)
}

#[test]
fn f62_each_replay_policy_wakes_contexts_when_it_says() {
    assert_eq!(replays(ReplayPolicy::Once), (0, 1), "when the buffer is empty");
    // The rest is dropped at the first replay, and comes again.
    let (flushed, replays_after_flush) = replays(ReplayPolicy::BatchFlush);
    assert_eq!((flushed, replays_after_flush), (1, 2));
    // Whether the third comes again before the second replay is chance.
    let (flushed, per_batch) = replays(ReplayPolicy::Batch);
    assert!(flushed == 0 && per_batch >= 2, "{per_batch} replays");
    let (flushed, per_block) = replays(ReplayPolicy::Block);
    assert!(flushed == 0 && per_block >= 2, "{per_block} replays");
}

#[test]
fn f62_blocks_are_replayed_one_by_one_and_batches_at_once() {
    for (policy, expected) in [(ReplayPolicy::Block, 2), (ReplayPolicy::Batch, 1)] {
        let rig = Rig::new(600, options(8).replay(policy));
        let kernels = [word(0), word(1), word(550)].map(|address| rig.load(address));
        rig.wait_for_faults(3);
        assert_eq!(rig.gpu.service_once().pages, 3);
        assert_eq!(rig.gpu.fault_statistics().replays, expected);
        assert_eq!(kernels.map(RunningKernel::join), [Ok(0), Ok(0), Ok(0)]);
        rig.finish();
    }
}

// Ends.

/// Stop, drain, kill (D11): faults are refused once the service stops, and none is left asleep.
#[test]
fn d11_a_service_that_is_stopped_leaves_nobody_asleep() {
    let rig = Rig::new(2, options(8));
    let service = rig.gpu.start_service().unwrap();
    assert!(matches!(rig.gpu.start_service(), Err(ServiceError::AlreadyServed)));
    assert_eq!(rig.load(word(0)).join(), Ok(0));
    drop(service);
    let stopped = fault(FaultReason::Stopped, word(1), Access::Read);
    assert_eq!(rig.load(word(1)).join(), stopped);
    assert_eq!(rig.load(word(0)).join(), Ok(0), "what is mapped needs no service");
    rig.gpu.accept_faults();
    let kernel = rig.load(word(1));
    rig.wait_for_faults(1);
    rig.gpu.service_once();
    assert_eq!(kernel.join(), Ok(0));
    assert_eq!(rig.served(|rig| rig.load(word(1))), Ok(0), "another service may begin");
    rig.finish();
}

/// A policy that makes the first fault wait until it is told to go on.
#[derive(Debug, Default)]
struct Gate {
    faults: AtomicUsize,
    opened: Mutex<bool>,
    opens: Condvar,
}

impl Gate {
    fn open(&self) {
        *lock(&self.opened) = true;
        self.opens.notify_all();
    }
}

impl Policy for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn device_fault(&self, _: &DeviceFault<'_>, plan: &mut DevicePlan) {
        // In place, so that the page is copied home once, or fails to be.
        plan.location = Location::System;
        if self.faults.fetch_add(1, SeqCst) > 0 {
            return;
        }
        let mut opened = lock(&self.opened);
        while !*opened {
            (opened, _) = wait(&self.opens, opened, None);
        }
    }
}

/// Stops a service while it serves the first fault, and lets it go on.
fn stop_in_the_middle(rig: &Rig, gpu: &SoftGpu, gate: &Gate, service: FaultService) {
    rig.until(|| gate.faults.load(SeqCst) == 1);
    std::thread::scope(|scope| {
        scope.spawn(move || drop(service));
        rig.until(|| !gpu.accepts_faults());
        gate.open();
    });
    assert_eq!((gpu.pending_faults(), gpu.stalled_contexts()), (0, 0));
}

fn gated(memory: u64) -> (Arc<Gate>, SoftGpuOptions) {
    let gate = Arc::new(Gate::default());
    let policies = Policies::new([Arc::clone(&gate) as Arc<dyn Policy>]);
    (gate, options(memory).pagemap(PagemapOptions::new().policies(policies)))
}

const REPLAYS: [ReplayPolicy; 4] =
    [ReplayPolicy::Block, ReplayPolicy::Batch, ReplayPolicy::BatchFlush, ReplayPolicy::Once];

/// While one thread is busy with a page, another serves the next.
#[test]
fn f61_faults_are_served_by_several_threads_at_once() {
    for policy in REPLAYS {
        let (gate, options) = gated(8);
        let rig = Rig::new(2, options.batch(1).fault_buffer(2).replay(policy));
        rig.fill(2, 40);
        let first = rig.load(word(0));
        rig.wait_for_faults(1);
        std::thread::scope(|scope| {
            scope.spawn(|| rig.gpu.service_once());
            rig.until(|| gate.faults.load(SeqCst) == 1);
            let second = rig.load(word(1));
            rig.wait_for_faults(1);
            assert_eq!(rig.gpu.service_once().pages, 1);
            assert_eq!(second.join(), Ok(41), "{policy:?}");
            gate.open();
        });
        // It was replayed with the other, and again when it had been served.
        assert_eq!(first.join(), Ok(40), "{policy:?}");
        rig.finish();
    }
}

/// Also those that are replayed before their turn, and come again when the service has been told to
/// stop.
#[test]
fn d11_faults_in_the_buffer_are_served_before_a_service_ends() {
    for policy in REPLAYS {
        for batch in [1, 3] {
            let (gate, options) = gated(8);
            let rig = Rig::new(1200, options.batch(batch).fault_buffer(3).replay(policy));
            let kernels = [0, 550, 1100].map(|index| rig.load(word(index)));
            rig.wait_for_faults(3);
            let service = rig.gpu.start_service().unwrap();
            stop_in_the_middle(&rig, &rig.gpu, &gate, service);
            assert_eq!(kernels.map(RunningKernel::join), [Ok(0), Ok(0), Ok(0)], "{policy:?}");
            let stopped = fault(FaultReason::Stopped, word(2), Access::Read);
            assert_eq!(rig.load(word(2)).join(), stopped, "what begins later is refused");
            rig.finish();
        }
    }
}

/// A fault whose service fails in a way that may pass is under way too.
#[test]
fn d11_a_retry_is_served_before_a_service_ends() {
    for policy in REPLAYS {
        let rig = Rig::new(1, options(4));
        rig.process.store_u64(word(0), 9).unwrap();
        assert_eq!(rig.served(|rig| rig.load(word(0))), Ok(9));
        let (gate, options) = gated(4);
        let other = SoftGpu::new(options.replay(policy));
        let other_mirror = mirror(&other, &rig.process);
        let context = other.context(&other_mirror).unwrap();
        let kernel = context.spawn(|view| view.load::<u64>(word(0)));
        rig.until(|| other.pending_faults() == 1);
        rig.gpu.injector().fail("copy", 0);
        stop_in_the_middle(&rig, &other, &gate, other.start_service().unwrap());
        assert_eq!(kernel.join(), Ok(9), "{policy:?}");
        assert_eq!(other.fault_statistics().retried, 1);
        drop(other_mirror);
        rig.finish();
    }
}

#[test]
fn a_service_that_gets_no_thread_leaves_room_for_another() {
    let rig = Rig::new(1, options(8));
    rig.gpu.injector().fail("service-thread", 0);
    let none = rig.gpu.start_service();
    assert!(matches!(none, Err(ServiceError::NoThread(_))), "{none:?}");
    assert_eq!(rig.served(|rig| rig.load(word(0))), Ok(0));
    rig.finish();
}

/// A policy with a bug.
#[derive(Debug)]
struct Panics;

impl Policy for Panics {
    fn name(&self) -> &'static str {
        "panics"
    }

    fn device_fault(&self, _: &DeviceFault<'_>, _: &mut DevicePlan) {
        panic!("the policy of this test panics");
    }
}

#[test]
fn a_service_that_panics_leaves_nobody_asleep() {
    let policies = Policies::new([Arc::new(Panics) as Arc<dyn Policy>]);
    let options = SoftGpuOptions::new().pagemap(PagemapOptions::new().policies(policies));
    let rig = Rig::new(2, options);
    let stopped = |index| fault(FaultReason::Stopped, word(index), Access::Read);
    let service = rig.gpu.start_service().unwrap();
    let internal = fault(FaultReason::Internal, word(0), Access::Read);
    assert_eq!(rig.load(word(0)).join(), internal);
    // Whoever comes while the thread still unwinds is told as well.
    rig.until(|| !rig.gpu.accepts_faults());
    assert_eq!(rig.load(word(1)).join(), stopped(1));
    assert_eq!(rig.gpu.violations(), [format!("serving a fault at {} panicked", page(0))]);
    drop(service);
}

/// The same of a caller who serves: the buffer stays open.
#[test]
fn a_caller_who_panics_while_serving_leaves_nobody_asleep() {
    let policies = Policies::new([Arc::new(Panics) as Arc<dyn Policy>]);
    let rig = Rig::new(2, options(8).pagemap(PagemapOptions::new().policies(policies)));
    let kernels = [rig.load(word(0)), rig.load(word(1))];
    rig.wait_for_faults(2);
    let serve =
        || std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rig.gpu.service_once()));
    serve().expect_err("the policy panics");
    // The other was replayed, and reports again.
    rig.wait_for_faults(1);
    serve().expect_err("the policy panics");
    let internal = [0, 1].map(|index| fault(FaultReason::Internal, word(index), Access::Read));
    assert_eq!(kernels.map(RunningKernel::join), internal);
    assert_eq!(rig.gpu.violations().len(), 2);
    assert!(rig.gpu.accepts_faults());
}

#[test]
fn a_fault_that_nobody_serves_ends_with_the_patience() {
    let rig = Rig::new(1, options(8).patience(Duration::from_millis(5)));
    let unserved = fault(FaultReason::Unserved, word(0), Access::Read);
    assert_eq!(rig.load(word(0)).join(), unserved);
    assert_eq!((rig.gpu.pending_faults(), rig.gpu.stalled_contexts()), (0, 0));
    rig.finish();
}

#[test]
fn an_access_that_is_replayed_in_vain_ends_after_its_limit() {
    let rig = Rig::new(1, options(8).max_replays(5));
    rig.gpu.injector().fail_always("overflow");
    let result = rig.context().run(|view| view.load::<u64>(word(0)));
    assert_eq!(result, fault(FaultReason::Internal, word(0), Access::Read));
    assert_eq!(rig.gpu.fault_statistics().overflows, 6);
    rig.gpu.injector().clear();
    rig.finish();
}

/// Faults of a mirror that has ended are cancelled at once, those that sleep and those that come
/// (F65).
#[test]
fn f65_faults_end_with_their_mirror() {
    let rig = Rig::new(2, options(8));
    let handle = (*rig.mirror).clone();
    let late = rig.context();
    let kernel = rig.load(word(0));
    rig.wait_for_faults(1);
    let gone = fault(FaultReason::Gone, word(0), Access::Read);
    let Rig { machine, process, gpu, mirror } = rig;
    assert!(mirror.unregister().is_some());
    assert_eq!(kernel.join(), gone);
    assert_eq!(late.run(|view| view.load::<u64>(word(0))), gone);
    assert_eq!(gpu.context(&handle).err(), Some(Released));
    assert_eq!(gpu.service_once().fetched, 0);
    drop(late);
    process.exit();
    common::check_empty(&machine, &gpu);
}

#[test]
fn f65_faults_end_with_their_process() {
    let rig = Rig::new(2, options(8));
    rig.fill(2, 0);
    assert_eq!(rig.served(|rig| rig.store(word(0), 5)), Ok(()));
    rig.gpu.accept_faults();
    let late = rig.context();
    assert_eq!(late.run(|view| view.load::<u64>(word(0))), Ok(5));
    let kernel = rig.load(word(1));
    rig.wait_for_faults(1);
    let Rig { machine, process, gpu, mirror } = rig;
    process.exit();
    let gone = |index| fault(FaultReason::Gone, word(index), Access::Read);
    assert_eq!(kernel.join(), gone(1));
    assert_eq!(late.run(|view| view.load::<u64>(word(0))), gone(0), "the TLB was flushed");
    drop(late);
    assert!(mirror.unregister().is_none(), "the process died first");
    common::check_empty(&machine, &gpu);
}

// Injected.

/// Faults that are lost, doubled or needless change no answer.
#[test]
fn no_fault_injection_changes_what_a_kernel_computes() {
    let steps = ["spurious-fault", "duplicate-fault", "overflow", "late-flush"];
    for after in 0..12 {
        for step in steps {
            let rig = Rig::new(4, options(2).tlb_entries(4).fault_buffer(3));
            rig.fill(4, 7);
            rig.gpu.injector().fail(step, after);
            let kernel = rig.context();
            let sum = rig.served(|_| {
                kernel.spawn(|view| {
                    for index in 0..8 {
                        view.fetch_add_u64(word(index % 4), 1)?;
                    }
                    let values = (0..4).map(|index| view.load::<u64>(word(index)));
                    values.sum::<Result<u64, KernelFault>>()
                })
            });
            assert_eq!(sum, Ok(7 + 8 + 9 + 10 + 8), "with {step} after {after}");
            rig.finish();
        }
    }
}

#[test]
fn the_defaults_work() {
    let rig = Rig::new(2, SoftGpuOptions::default());
    assert_eq!(rig.served(|rig| rig.store(word(0), 5)), Ok(()));
    assert_eq!(rig.process.load_u64(word(0)).unwrap(), 5);
    rig.finish();
}
