//! Who keeps what alive, and in which order things end.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use common::{Gpu, Rig, mirror, page, range, word};
use mmu_notifier::Notifier;
use uhmm::primitive::lock;
use uhmm::sim::{Machine, Mapping, Process};
use uhmm::{
    Access, AddressSpace, Device, Event, EventKind, FaultError, PageEntry, PageRange, RangeFault,
    SystemMemory,
};

fn process() -> (Machine, Process) {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 2), Mapping::anonymous(Access::Write)).expect("memory is mapped");
    process.store_u64(word(0), 1).expect("memory is there");
    (machine, process)
}

/// D11: the device is told to stop, and only then released.
#[test]
fn d11_stop_comes_before_kill() {
    let rig = Rig::new(1, 0);
    assert_eq!(rig.device_load(word(0)), Ok(0));
    let log = Arc::clone(&rig.gpu);
    let Rig { process, mirror, .. } = rig;
    process.exit();
    assert_eq!(*lock(&log.log), ["Release", "released"]);
    // B08, C07: the owner still ends it, and gets nothing.
    assert!(mirror.unregister().is_none());
}

/// B01, B02: nothing is translated for a device once its address space is dead.
#[test]
fn b01_b02_the_device_has_nothing_left_when_the_process_has_exited() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 4);
    assert_eq!(rig.device_load(word(0)), Ok(4));
    let table = rig.mirror.inspect(Arc::clone).expect("it lives");
    let Rig { machine, process, pagemap, gpu, mirror } = rig;
    process.exit();
    assert_eq!(gpu.update(&table, word(0), Access::Read, |old| old), None);
    assert_eq!((machine.frames(), pagemap.used()), (0, 0));
    drop(mirror);
}

/// A06: a dead address space has no users, and nothing begins on it.
#[test]
fn a06_a_reference_to_a_dead_address_space_makes_no_user() {
    let (machine, process) = process();
    let mm = process.address_space().mm().clone();
    assert!(mm.users().is_some());
    process.exit();
    assert!(mm.users().is_none());
    assert_eq!(machine.frames(), 0);
}

/// D02, D04: an operation under way is a user, so death waits for it.
#[test]
fn d02_the_memory_lives_until_a_migration_under_way_has_ended() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 4);
    let migration = rig.process.address_space().migrate(range(0, 1), &rig.pagemap).copy();
    let Rig { machine, process, pagemap, mirror, gpu } = rig;
    let mm = process.address_space().mm().clone();
    process.exit();
    assert!(mm.users().is_some());
    assert_eq!(*lock(&gpu.log), ["Migrate"]);
    assert_eq!(migration.commit().moved, 1);
    assert!(mm.users().is_none());
    assert_eq!((machine.frames(), pagemap.used()), (0, 0));
    assert!(mirror.unregister().is_none());
}

/// A07, C03, C04: after unregistering nothing comes, whatever happens to the address space.
#[test]
fn c03_c04_nothing_is_called_after_unregister() {
    let rig = Rig::new(2, 0);
    assert_eq!(rig.device_load(word(0)), Ok(0));
    let gpu = Arc::clone(&rig.gpu);
    let Rig { process, mirror, .. } = rig;
    let table = mirror.unregister().expect("the process lives");
    assert_eq!(table.len(), 0);
    lock(&gpu.log).clear();
    process.unmap(range(0, 1));
    process.exit();
    assert_eq!(*lock(&gpu.log), Vec::<String>::new());
}

/// A08: unregistering after the death is as good as before.
#[test]
fn a08_a_mirror_can_be_unregistered_after_the_death() {
    let rig = Rig::new(1, 0);
    let Rig { process, mirror, .. } = rig;
    process.exit();
    assert_eq!(mirror.range_fault(&RangeFault::read(range(0, 1))), Err(FaultError::Released));
    assert!(mirror.unregister().is_none());
}

/// B06, B07, regression 8: neither side keeps the other.
#[test]
fn b06_registering_and_exiting_leaves_nothing_behind() {
    let gpu = Gpu::new(1);
    for round in 0..200 {
        let (machine, process) = process();
        let space = Arc::clone(process.address_space().backend().notifiers());
        let mirror = process.address_space().mirror(&gpu, range(0, 2)).expect("it lives");
        mirror.range_fault(&RangeFault::write(range(0, 2))).expect("memory is there");
        if round % 2 == 0 {
            drop(mirror);
            process.exit();
        } else {
            process.exit();
            drop(mirror);
        }
        assert_eq!((space.live(), machine.frames()), (0, 0));
    }
    assert_eq!(Arc::strong_count(&gpu), 1);
}

/// B16: a child that was forked has an address space of its own; each ends by itself.
#[test]
fn b16_parent_and_child_end_in_either_order() {
    for parent_first in [true, false] {
        let rig = Rig::new(1, 1);
        rig.fill(1, 6);
        assert_eq!(rig.process.address_space().migrate(range(0, 1), &rig.pagemap).run().moved, 1);
        let Rig { machine, process, pagemap, gpu, mirror } = rig;
        let child = process.fork().expect("it can fork");
        let (first, second) = if parent_first { (process, child) } else { (child, process) };
        first.exit();
        assert_eq!(pagemap.used(), 1);
        assert_eq!(second.load_u64(word(0)), Ok(6));
        second.exit();
        assert_eq!((machine.frames(), pagemap.used()), (0, 0));
        drop((mirror, gpu));
    }
}

/// A subscriber that drops the last user of an address space when it is called.
struct LastUser {
    user: Arc<Mutex<Option<AddressSpace>>>,
}

impl Notifier for LastUser {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        drop(self.user.lock().expect("no panic").take());
    }
}

/// Regression 40: the last user is dropped inside a callback, where nothing may wait.
#[test]
fn the_last_user_may_be_dropped_inside_a_callback() {
    let (machine, process) = process();
    let (other_machine, other) = self::process();
    let mm = process.address_space().mm().clone();
    let gpu = Gpu::new(0);
    let mirror = process.address_space().mirror(&gpu, range(0, 1)).expect("it lives");
    let user = Arc::new(Mutex::new(Some(process.address_space().clone())));
    process.exit();
    let dropper = LastUser { user };
    let other_notifiers = other.address_space().backend().notifiers();
    let subscription = other_notifiers
        .subscribe(range(0, 1).va_range(), dropper)
        .expect("the other process lives");
    // An announcement in the one address space calls what drops the last user of the other.
    other.address_space().change(range(0, 1), EventKind::Clear, || ());
    assert!(mm.users().is_none());
    // The death runs elsewhere; to unregister waits for it.
    assert!(mirror.unregister().is_none() || gpu_was_stopped(&gpu));
    drop(subscription);
    other.exit();
    assert_eq!(other_machine.frames(), 0);
    while machine.frames() != 0 {
        std::thread::yield_now();
    }
}

fn gpu_was_stopped(gpu: &Gpu) -> bool {
    !lock(&gpu.log).is_empty()
}

/// A device whose release waits for its worker, and that waits in the middle of a fault.
struct Worker {
    entered: mpsc::Sender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
    finished: Mutex<mpsc::Receiver<()>>,
    released: mpsc::Sender<()>,
}

impl Device for Worker {
    type PageTable = ();
    type Fence = ();

    fn page_table(&self, _: PageRange, _: &Arc<dyn SystemMemory>) {}

    fn map(&self, _: &mut (), _: PageRange, _: &[PageEntry]) {
        self.entered.send(()).expect("the test waits");
        lock(&self.go_on).recv().expect("the test goes on");
    }

    fn invalidate(&self, _: &mut (), _: &Event) {}

    fn release(&self, (): ()) {
        lock(&self.finished).recv().expect("the worker ends");
        self.released.send(()).expect("the test waits");
    }
}

/// D02, D04: a fault of the device turns out to be the last user. The death waits for the device,
/// and the device's worker is not made to wait for it.
#[test]
fn d02_the_last_user_may_be_an_operation_of_the_device_itself() {
    let (machine, process) = process();
    let (entered, is_inside) = mpsc::channel();
    let (may_go_on, go_on) = mpsc::channel();
    let (finish, finished) = mpsc::channel();
    let (released, is_released) = mpsc::channel();
    let (go_on, finished) = (Mutex::new(go_on), Mutex::new(finished));
    let device = Arc::new(Worker { entered, go_on, finished, released });
    let mirror = process.address_space().mirror(&device, range(0, 1)).expect("it lives");
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let result = mirror.range_fault(&RangeFault::read(range(0, 1)));
            finish.send(()).expect("the release waits");
            result
        });
        is_inside.recv().expect("the worker enters");
        process.exit();
        may_go_on.send(()).expect("the worker waits");
        assert!(worker.join().expect("no panic").is_ok());
    });
    is_released.recv().expect("the death comes to its end");
    assert!(mirror.unregister().is_none());
    while machine.frames() != 0 {
        std::thread::yield_now();
    }
}

/// B03: the same end, whatever its cause; what differs is who gets the table.
#[test]
fn b03_a_mirror_ends_by_unregister_by_drop_and_by_death() {
    let rig = Rig::new(1, 0);
    let (gpu, space) = (Arc::clone(&rig.gpu), rig.process.address_space().clone());
    let second = mirror(&rig.process, &gpu, &rig.pagemap);
    let third = mirror(&rig.process, &gpu, &rig.pagemap);
    assert!(second.unregister().is_some());
    assert_eq!(*lock(&gpu.log), ["Release"]);
    drop(third);
    assert_eq!(*lock(&gpu.log), ["Release", "Release"]);
    drop(space);
    let Rig { process, mirror, .. } = rig;
    process.exit();
    assert_eq!(*lock(&gpu.log), ["Release", "Release", "Release", "released"]);
    assert_eq!(mirror.inspect(|table| table.entry(page(0))).ok(), None);
}
