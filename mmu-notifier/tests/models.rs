//! Models of the races in the seed mails, each explored by loom over every interleaving (up to a
//! bound on preemptions) and every outcome of every atomic.
//!
//! `cargo xtask loom` runs them. Each must fail under at least one deliberate break of the
//! algorithm, listed in `mutants.txt`; `cargo xtask mutants` runs those.
#![cfg(loom)]

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use loom::thread::{self, JoinHandle};
use mmu_notifier::{
    DeviceHandle, DeviceRef, Event, EventKind, Fence, Handle, Notifier, PairedNotifier,
    SubscribeOptions, Subscription, Subscriptions, VaRange, WouldBlock,
};

/// Explores `f`, with at most two preemptions unless `LOOM_MAX_PREEMPTIONS` says otherwise.
fn model(f: impl Fn() + Sync + Send + 'static) {
    bounded_model(0, usize::MAX, f);
}

/// Explores `f` with at least and at most so many preemptions: where two do not reach what the
/// model is about, or where three threads with much to do would take minutes.
fn bounded_model(least: usize, most: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let bound = builder.preemption_bound.unwrap_or(2);
    builder.preemption_bound = Some(bound.max(least).min(most));
    builder.check(f);
}

const PAGES: usize = 2;

fn page(number: usize) -> VaRange {
    VaRange::new(number as u64 * 4096, 4096).unwrap()
}

fn pages(from: usize, to: usize) -> VaRange {
    VaRange::from_bounds(page(from).start(), page(to).last()).unwrap()
}

fn unmap(range: VaRange) -> Event {
    Event::new(EventKind::Unmap, range)
}

/// The CPU's page table: a frame for each page.
#[derive(Default)]
struct Cpu([AtomicUsize; PAGES]);

impl Cpu {
    /// A device's lookup, to be trusted within a read section only.
    fn translate(&self, page: usize) -> usize {
        self.0[page].load(Relaxed)
    }

    /// A change, made under an announcement.
    fn remap(&self, page: usize, frame: usize) {
        self.0[page].store(frame, Relaxed);
    }
}

/// A device's page table.
#[derive(Default)]
struct Table([Option<usize>; PAGES]);

impl Table {
    fn forget(&mut self, range: VaRange) {
        for (number, frame) in self.0.iter_mut().enumerate() {
            if range.overlaps(page(number)) {
                *frame = None;
            }
        }
    }

    fn maps_any(&self, range: VaRange) -> bool {
        (0..PAGES).any(|number| range.overlaps(page(number)) && self.0[number].is_some())
    }
}

impl Notifier for Table {
    type Fence = ();

    fn invalidate(&mut self, event: &Event) {
        self.forget(event.range());
    }
}

/// An address space, and a device's mirror of `range`.
fn mirrored(range: VaRange) -> (Arc<Subscriptions>, Arc<Cpu>, Subscription<Table>) {
    let space = Subscriptions::new();
    let mirror = space.subscribe(range, Table::default()).unwrap();
    (space, Arc::default(), mirror)
}

/// Changes `number` to `frame` under an announcement, and checks *Announced*: within it, the device
/// maps nothing of the page.
fn change(space: &Subscriptions, cpu: &Cpu, mirror: &Handle<Table>, number: usize, frame: usize) {
    let guard = space.invalidate_range_start(unmap(page(number)));
    let maps = mirror.inspect(|table| table.maps_any(page(number))).unwrap_or(false);
    assert!(!maps, "a device maps a page that is being changed");
    cpu.remap(number, frame);
    drop(guard);
}

/// Makes a change on a thread of its own.
fn spawn_change(
    space: &Arc<Subscriptions>,
    cpu: &Arc<Cpu>,
    mirror: &Handle<Table>,
    number: usize,
    frame: usize,
) -> JoinHandle<()> {
    let (space, cpu, mirror) = (Arc::clone(space), Arc::clone(cpu), mirror.clone());
    thread::spawn(move || change(&space, &cpu, &mirror, number, frame))
}

/// Changes a page to frame 1 on a thread of its own, where nobody may be subscribed to it.
fn spawn_unheard_change(
    space: &Arc<Subscriptions>,
    cpu: &Arc<Cpu>,
    number: usize,
) -> JoinHandle<()> {
    let (space, cpu) = (Arc::clone(space), Arc::clone(cpu));
    thread::spawn(move || {
        let guard = space.invalidate_range_start(unmap(page(number)));
        cpu.remap(number, 1);
        drop(guard);
    })
}

/// Announces and changes nothing, on a thread of its own.
fn spawn_announcement(space: &Arc<Subscriptions>, range: VaRange) -> JoinHandle<()> {
    let space = Arc::clone(space);
    thread::spawn(move || drop(space.invalidate_range_start(unmap(range))))
}

/// Exits, on a thread of its own.
fn spawn_release(space: &Arc<Subscriptions>) -> JoinHandle<()> {
    let space = Arc::clone(space);
    thread::spawn(move || space.release())
}

/// Serves a device's fault on a thread of its own.
fn spawn_fault(cpu: &Arc<Cpu>, mirror: &Handle<Table>, number: usize) -> JoinHandle<bool> {
    let (cpu, mirror) = (Arc::clone(cpu), mirror.clone());
    thread::spawn(move || fault(&cpu, &mirror, number))
}

/// Serves a device's fault on `number`: one try.
fn fault(cpu: &Cpu, mirror: &Handle<Table>, number: usize) -> bool {
    let Ok(section) = mirror.read_begin() else { return false };
    let frame = cpu.translate(number);
    let Ok(mut table) = section.commit() else { return false };
    if table.range().overlaps(page(number)) {
        table.0[number] = Some(frame);
    }
    true
}

/// Checks *Current* at rest: what the device maps is what the CPU maps.
fn check_current(cpu: &Cpu, mirror: &Handle<Table>) {
    let check = |table: &Table| {
        for number in 0..PAGES {
            if let Some(frame) = table.0[number] {
                assert_eq!(frame, cpu.translate(number), "a stale translation of page {number}");
            }
        }
    };
    mirror.inspect(check).unwrap();
}

/// Two changes of one page that may overlap in time, against a fault: *Announced* and *Current*.
#[test]
fn read_section_against_two_overlapping_invalidations() {
    model(|| {
        let (space, cpu, mirror) = mirrored(page(0));
        let changers: Vec<_> =
            (1..=2).map(|frame| spawn_change(&space, &cpu, &mirror, 0, frame)).collect();
        fault(&cpu, &mirror, 0);
        changers.into_iter().for_each(|changer| changer.join().unwrap());
        check_current(&cpu, &mirror);
    });
}

/// One change against faults in a row: it refuses two at most, one that begins between its count
/// and its callback, and one whose looks at sequence and count lie on its two sides.
#[test]
fn read_section_against_an_invalidation() {
    model(|| {
        let (space, cpu, mirror) = mirrored(page(0));
        let changer = spawn_change(&space, &cpu, &mirror, 0, 1);
        assert!((0..3).any(|_| fault(&cpu, &mirror, 0)), "one change refused three faults");
        changer.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// A reader that comes during the only change sleeps once, is woken by its end, and commits at the
/// first try (E09, E10, E14).
#[test]
fn reader_is_woken_by_the_last_end() {
    model(|| {
        let (space, cpu, mirror) = mirrored(page(0));
        let outer = space.invalidate_range_start(unmap(page(0)));
        let inner = space.invalidate_range_start(unmap(pages(0, 1)));
        let reader = {
            let (cpu, mirror) = (Arc::clone(&cpu), mirror.clone());
            thread::spawn(move || assert!(fault(&cpu, &mirror, 0), "nothing changed any more"))
        };
        drop(inner);
        cpu.remap(0, 1);
        drop(outer);
        reader.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// Two readers sleep through the only change and both commit at the first try: the mark that one
/// sleeps is no change to the other.
#[test]
fn two_readers_commit_at_the_first_try() {
    model(|| {
        let (space, cpu, mirror) = mirrored(page(0));
        let guard = space.invalidate_range_start(unmap(page(0)));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (cpu, mirror) = (Arc::clone(&cpu), mirror.clone());
                thread::spawn(move || assert!(fault(&cpu, &mirror, 0), "nothing changed"))
            })
            .collect();
        cpu.remap(0, 1);
        drop(guard);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        check_current(&cpu, &mirror);
    });
}

/// An announcement that nobody was there to hear is not recorded; the first subscriber finds it all
/// the same (A01, E14).
#[test]
fn first_subscriber_against_an_unrecorded_announcement() {
    model(|| {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Cpu::default()));
        let changer = spawn_unheard_change(&space, &cpu, 0);
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        fault(&cpu, &mirror, 0);
        changer.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// As before, with two readers, of whom the second may find the first one's waiting done.
#[test]
fn two_first_readers_against_an_unrecorded_announcement() {
    bounded_model(0, 1, || {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Cpu::default()));
        let changer = spawn_unheard_change(&space, &cpu, 0);
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        let reader = spawn_fault(&cpu, &mirror, 0);
        fault(&cpu, &mirror, 0);
        changer.join().unwrap();
        reader.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// The last subscription ends and another is made while an unrecorded announcement goes on.
#[test]
fn populated_twice_against_an_unrecorded_announcement() {
    model(|| {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Cpu::default()));
        let first = space.subscribe(page(0), Table::default()).unwrap();
        // Settled: nothing unrecorded is under way.
        assert!(fault(&cpu, &first, 0));
        drop(first);
        let changer = spawn_unheard_change(&space, &cpu, 0);
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        fault(&cpu, &mirror, 0);
        changer.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// The first reader of a subscription that has ended meanwhile has waited for nothing that would
/// speak for the next subscription.
#[test]
fn late_settler() {
    bounded_model(3, usize::MAX, || {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Cpu::default()));
        let first = space.subscribe(page(0), Table::default()).unwrap();
        let reader = {
            let (space, cpu, first) = (Arc::clone(&space), Arc::clone(&cpu), first.clone());
            thread::spawn(move || {
                fault(&cpu, &first, 0);
                if let Some(second) = space.find::<Table>(0) {
                    fault(&cpu, &second, 0);
                }
            })
        };
        drop(first);
        let guard = space.invalidate_range_start(unmap(page(0)));
        let second = space.subscribe(page(0), Table::default()).unwrap();
        cpu.remap(0, 1);
        drop(guard);
        reader.join().unwrap();
        check_current(&cpu, &second);
    });
}

/// A subscription made while a recorded announcement is under way hears neither its start nor its
/// end, and its reader waits for the latter (A01, E14).
#[test]
fn insert_during_an_invalidation() {
    model(|| {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Cpu::default()));
        let _elsewhere = space.subscribe(page(1), Table::default()).unwrap();
        let changer = spawn_unheard_change(&space, &cpu, 0);
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        fault(&cpu, &mirror, 0);
        changer.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// A handle found by address is used while its page changes and its subscription ends (F20).
#[test]
fn find_and_remove_during_an_invalidation() {
    model(|| {
        let (space, cpu, mirror) = mirrored(page(0));
        let faulter = {
            let (space, cpu) = (Arc::clone(&space), Arc::clone(&cpu));
            thread::spawn(move || {
                if let Some(mirror) = space.find::<Table>(page(0).start()) {
                    fault(&cpu, &mirror, 0);
                }
            })
        };
        let changer = spawn_change(&space, &cpu, &mirror, 0, 1);
        let table = mirror.unsubscribe().unwrap();
        assert!(!table.maps_any(page(0)), "handed back with a translation nobody looks after");
        faulter.join().unwrap();
        changer.join().unwrap();
        assert!(space.find::<Table>(page(0).start()).is_none());
        assert_eq!(space.live(), 0);
    });
}

/// A subscription moves onto a page that is being changed: its reader waits for that change, which
/// it never heard of (F19).
#[test]
fn move_during_an_invalidation() {
    model(|| {
        let (space, cpu, mut mirror) = mirrored(page(0));
        let changer = spawn_unheard_change(&space, &cpu, 1);
        mirror.set_range(page(1)).unwrap();
        fault(&cpu, &mirror, 1);
        changer.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// A read section that began before a subscription grew is not committed into the grown range,
/// where nothing told it of changes.
#[test]
fn grow_against_a_read_section() {
    model(|| {
        let (space, cpu, mut mirror) = mirrored(page(0));
        let faulter = spawn_fault(&cpu, &mirror, 1);
        let guard = space.invalidate_range_start(unmap(page(1)));
        cpu.remap(1, 1);
        drop(guard);
        mirror.set_range(pages(0, 1)).unwrap();
        faulter.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// A subscription shrinks while a fault fills the part that it gives up: nothing stays mapped where
/// no event would be heard.
#[test]
fn shrink_during_an_invalidation() {
    model(|| {
        let (space, cpu, mut mirror) = mirrored(pages(0, 1));
        let faulter = spawn_fault(&cpu, &mirror, 1);
        mirror.set_range(page(0)).unwrap();
        let guard = space.invalidate_range_start(unmap(page(1)));
        assert!(!mirror.inspect(|table| table.maps_any(page(1))).unwrap());
        cpu.remap(1, 1);
        drop(guard);
        faulter.join().unwrap();
        check_current(&cpu, &mirror);
    });
}

/// A device whose memory is freed by its owner as soon as nothing may use it any more.
#[derive(Default)]
struct Freed(AtomicBool);

impl Freed {
    fn touch(&self) {
        assert!(!self.0.load(SeqCst), "touched after it was freed");
    }
}

/// A notifier that stops its device in two passes.
struct Slow(Arc<Freed>);

struct SlowFence(Arc<Freed>);

impl Fence for SlowFence {
    fn wait(self) {
        self.0.touch();
    }
}

impl Notifier for Slow {
    type Fence = SlowFence;

    fn invalidate(&mut self, _: &Event) -> SlowFence {
        self.0.touch();
        SlowFence(Arc::clone(&self.0))
    }
}

/// After unsubscribe has returned, no call and no fence of the subscription runs, and its memory is
/// gone: *Over* (C03, C04, C09).
#[test]
fn unsubscribe_against_invalidation() {
    model(|| {
        let (space, device) = (Subscriptions::new(), Arc::new(Freed::default()));
        let mirror = space.subscribe(page(0), Slow(Arc::clone(&device))).unwrap();
        let changer = spawn_announcement(&space, page(0));
        assert!(mirror.unsubscribe().is_some());
        device.0.store(true, SeqCst);
        assert_eq!(space.live(), 0, "somebody else still holds the subscription's memory");
        changer.join().unwrap();
    });
}

/// Unsubscribing tells the device to stop, before nobody says any more what changes.
#[test]
fn unsubscribe_stops_the_device() {
    model(|| {
        let (_space, cpu, mirror) = mirrored(page(0));
        let faulter = spawn_fault(&cpu, &mirror, 0);
        let table = mirror.unsubscribe().unwrap();
        assert!(!table.maps_any(page(0)), "handed back with a translation nobody looks after");
        faulter.join().unwrap();
    });
}

/// A flag that one thread raises and another waits for.
#[derive(Default)]
struct Flag(loom::sync::Mutex<bool>, loom::sync::Condvar);

impl Flag {
    fn raise(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn wait(&self) {
        let mut raised = self.0.lock().unwrap();
        while !*raised {
            raised = self.1.wait(raised).unwrap();
        }
    }
}

/// A device that takes its time to stop.
struct Held {
    inside: Arc<Flag>,
    go_on: Arc<Flag>,
}

impl Notifier for Held {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        self.inside.raise();
        self.go_on.wait();
    }
}

/// A change that comes while a release is busy with another device, and the owner of this one has
/// unsubscribed it and is not through, finds this device stopped.
#[test]
fn change_against_unsubscribe_under_a_release() {
    model(|| {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Cpu::default()));
        let (inside, go_on) = (Arc::new(Flag::default()), Arc::new(Flag::default()));
        let held = Held { inside: Arc::clone(&inside), go_on: Arc::clone(&go_on) };
        let held = space.subscribe(page(0), held).unwrap();
        let mirror = space.subscribe(page(1), Table::default()).unwrap();
        assert!(fault(&cpu, &mirror, 1));
        let handle = mirror.clone();
        let exit = spawn_release(&space);
        inside.wait();
        let unfinished = mirror.unsubscribe_deadline(std::time::Instant::now());
        change(&space, &cpu, &handle, 1, 1);
        go_on.raise();
        exit.join().unwrap();
        drop((unfinished, held));
    });
}

/// A mirror in the sense of seed 001: it refers to its device, and touches it when it is released.
struct Mirror {
    device: DeviceRef<Freed>,
    released: Arc<AtomicUsize>,
}

impl Notifier for Mirror {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        self.device.touch();
    }

    fn release(self) {
        self.device.touch();
        self.released.fetch_add(1, Relaxed);
    }
}

/// *Once*: unsubscribe and release at the same time. One of them ends the notifier, and when
/// unsubscribe says that it was release, release has run and returned (B08, B13, D12).
#[test]
fn unsubscribe_against_release() {
    model(|| {
        let space = Subscriptions::new();
        let released = Arc::new(AtomicUsize::new(0));
        let device = DeviceHandle::register(Freed::default());
        let mirror = Mirror { device: device.reference(), released: Arc::clone(&released) };
        let mirror = space.subscribe(page(0), mirror).unwrap();
        let exit = spawn_release(&space);
        let handed_back = usize::from(mirror.unsubscribe().is_some());
        assert_eq!(handed_back + released.load(Relaxed), 1);
        exit.join().unwrap();
        assert_eq!(handed_back + released.load(Relaxed), 1);
        assert_eq!(space.live(), 0);
    });
}

/// Seed 001, step by step and in both orders: thread A closes the file (unregisters the mirror,
/// then the device, and frees it), thread B exits (B09, B10, B12, B16, C01).
#[test]
fn seed_001_threads_a_and_b() {
    model(|| {
        let space = Subscriptions::new();
        let released = Arc::new(AtomicUsize::new(0));
        let device = DeviceHandle::register(Freed::default());
        let mirror = Mirror { device: device.reference(), released };
        let mirror = space.subscribe(page(0), mirror).unwrap();
        let thread_b = spawn_release(&space);
        drop(mirror.unsubscribe());
        // C05: no wait and no retry here.
        let device = device.try_unregister().expect("every mirror has been unregistered");
        device.0.store(true, SeqCst);
        thread_b.join().unwrap();
    });
}

/// The device is busy until the last reference is gone, and then it is the caller's alone (B11,
/// B14): the reference is given up before the count says so.
#[test]
fn seed_001_device_busy_until_the_last_reference() {
    model(|| {
        let device = DeviceHandle::register(Freed::default());
        let reference = device.reference();
        let mirror = thread::spawn(move || {
            reference.touch();
            drop(reference);
        });
        let device = match device.try_unregister() {
            Ok(device) => device,
            Err(busy) => busy.handle.unregister(),
        };
        device.0.store(true, SeqCst);
        mirror.join().unwrap();
    });
}

/// A driver as in seed 003: its release waits until its fault worker is idle.
struct Draining {
    idle: Arc<Flag>,
}

impl Notifier for Draining {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {}

    fn release(self) {
        self.idle.wait();
    }
}

/// Seed 003: release waits for a fault worker, and the worker is in the middle of a migration that
/// announces a change. Both finish (D01, D02, D05, D06).
#[test]
fn seed_003_release_drains_a_migration_in_flight() {
    model(|| {
        let space = Subscriptions::new();
        let idle = Arc::new(Flag::default());
        let mirror = space.subscribe(page(0), Draining { idle: Arc::clone(&idle) }).unwrap();
        let worker = {
            let (space, idle) = (Arc::clone(&space), Arc::clone(&idle));
            thread::spawn(move || {
                let migrate = Event::new(EventKind::Migrate, page(0));
                drop(space.invalidate_range_start(migrate));
                idle.raise();
            })
        };
        space.release();
        assert!(*idle.0.lock().unwrap(), "released in the middle of a migration");
        worker.join().unwrap();
        assert!(mirror.unsubscribe().is_none());
    });
}

/// Seed 003: the address space is not destroyed under an operation, and the operation is not cut
/// short (D02, D04, D05).
#[test]
fn seed_003_release_waits_for_an_operation() {
    model(|| {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Freed::default()));
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        let worker = {
            let (mirror, cpu) = (mirror.clone(), Arc::clone(&cpu));
            thread::spawn(move || {
                let Ok(operation) = mirror.begin_operation() else { return };
                cpu.touch();
                let migrate = Event::new(EventKind::Migrate, page(0));
                let guard = operation.space().invalidate_range_start(migrate);
                cpu.touch();
                drop(guard);
                cpu.touch();
            })
        };
        space.release();
        cpu.0.store(true, SeqCst);
        worker.join().unwrap();
        drop(mirror);
    });
}

/// Release waits for an operation also where the subscription is on its way out (D02).
#[test]
fn release_waits_for_an_operation_of_a_leaver() {
    model(|| {
        let (space, cpu) = (Subscriptions::new(), Arc::new(Freed::default()));
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        let operation = mirror.begin_operation().unwrap();
        let owner = thread::spawn(move || mirror.unsubscribe().is_some());
        let worker = {
            let cpu = Arc::clone(&cpu);
            thread::spawn(move || {
                cpu.touch();
                drop(operation);
            })
        };
        space.release();
        cpu.0.store(true, SeqCst);
        owner.join().unwrap();
        worker.join().unwrap();
    });
}

/// A read section that began before the address space died is not committed after (D10), and a
/// device learns of the death before any notifier ends (B01, B02).
#[test]
fn read_section_against_release() {
    model(|| {
        let (space, cpu, mirror) = mirrored(page(0));
        let dead = Arc::new(AtomicBool::new(false));
        let exit = {
            let (space, dead) = (Arc::clone(&space), Arc::clone(&dead));
            thread::spawn(move || {
                space.release();
                dead.store(true, SeqCst);
            })
        };
        if let Ok(section) = mirror.read_begin() {
            let frame = cpu.translate(0);
            let was_dead = dead.load(SeqCst);
            if let Ok(mut table) = section.commit() {
                assert!(!was_dead, "committed in a dead address space");
                table.0[0] = Some(frame);
            }
        }
        exit.join().unwrap();
        assert!(mirror.read_begin().is_err());
    });
}

/// A release that runs into its deadline, while another thread announces, leaves the subscription
/// to its owner, who ends it although nobody calls release again; and it can be called again.
#[test]
fn release_given_up_at_its_deadline() {
    model(|| {
        let space = Subscriptions::new();
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        let operation = mirror.begin_operation().unwrap();
        let changer = spawn_announcement(&space, page(0));
        assert!(space.release_deadline(std::time::Instant::now()).is_err());
        drop(operation);
        assert!(mirror.read_begin().is_err(), "a device goes on in a dying address space");
        assert!(mirror.unsubscribe().is_some(), "nobody has released it");
        changer.join().unwrap();
        space.release();
        assert_eq!(space.live(), 0);
    });
}

/// A change of range that comes while release has the subscription unlinked comes to nothing, also
/// in the counts, when that release is given up.
#[test]
fn set_range_against_a_release_given_up() {
    bounded_model(3, usize::MAX, || {
        let space = Subscriptions::new();
        let mut mirror = space.subscribe(page(0), Table::default()).unwrap();
        let operation = mirror.begin_operation().unwrap();
        let exit = {
            let space = Arc::clone(&space);
            thread::spawn(move || space.release_deadline(std::time::Instant::now()).is_err())
        };
        let expected = if mirror.set_range(page(1)).is_ok() { page(1) } else { page(0) };
        assert_eq!(mirror.range(), expected);
        assert!(exit.join().unwrap(), "an operation is under way");
        let guard = space.invalidate_range_start(unmap(page(1)));
        let _ = mirror.set_range(page(0));
        drop(guard);
        drop(operation);
        assert!(mirror.unsubscribe().is_some(), "nobody has released it");
        space.release();
        assert_eq!(space.live(), 0);
    });
}

/// The owner of a subscription waits for a release that is given up, and takes over.
#[test]
fn unsubscribe_against_a_release_that_is_given_up() {
    model(|| {
        let space = Subscriptions::new();
        let mirror = space.subscribe(page(0), Table::default()).unwrap();
        let operation = mirror.begin_operation().unwrap();
        let exit = {
            let space = Arc::clone(&space);
            thread::spawn(move || {
                let given_up = space.release_deadline(std::time::Instant::now()).is_err();
                drop(operation);
                given_up
            })
        };
        // Release cannot end it while the operation lives, so it is handed back.
        assert!(mirror.unsubscribe().is_some());
        exit.join().unwrap();
        assert_eq!(space.live(), 0);
    });
}

/// Two devices, one of which must not be ended before both have been told to stop.
struct Stopped {
    mine: Arc<AtomicBool>,
    others: Arc<AtomicBool>,
}

impl Notifier for Stopped {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        self.mine.store(true, SeqCst);
    }

    fn release(self) {
        assert!(self.others.load(SeqCst), "ended while another device still ran");
    }
}

/// Release is two passes: all devices stop, then one after the other ends.
#[test]
fn release_stops_every_device_before_it_ends_one() {
    model(|| {
        let space = Subscriptions::new();
        let (one, two) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let first = Stopped { mine: Arc::clone(&one), others: Arc::clone(&two) };
        let second = Stopped { mine: two, others: one };
        let first = space.subscribe(page(0), first).unwrap();
        let second = space.subscribe(page(1), second).unwrap();
        let other_exit = spawn_release(&space);
        space.release();
        other_exit.join().unwrap();
        assert!(first.unsubscribe().is_none() && second.unsubscribe().is_none());
    });
}

/// Counts starts and ends, and refuses to be told without sleeping where `refuses` says so.
struct Counted {
    starts: Arc<AtomicUsize>,
    ends: Arc<AtomicUsize>,
    refuses: bool,
}

impl Notifier for Counted {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        self.starts.fetch_add(1, Relaxed);
    }

    fn try_invalidate(&mut self, _: &Event) -> Result<(), WouldBlock> {
        if self.refuses {
            return Err(WouldBlock);
        }
        self.starts.fetch_add(1, Relaxed);
        Ok(())
    }
}

impl PairedNotifier for Counted {
    fn invalidate_range_end(&mut self, _: &Event) {
        self.ends.fetch_add(1, Relaxed);
    }
}

/// A non-blockable announcement that the second of two subscribers refuses leaves nothing behind:
/// the first has heard of its end, and readers go on (E13, X01). A third announces meanwhile.
#[test]
fn non_blockable_refusal_backs_out() {
    model(|| {
        let space = Subscriptions::new();
        let (starts, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let subscribe = |refuses| {
            let (starts, ends) = (Arc::clone(&starts), Arc::clone(&ends));
            let notifier = Counted { starts, ends, refuses };
            space.subscribe_paired(page(0), notifier, SubscribeOptions::new()).unwrap()
        };
        let first = subscribe(false);
        let second = subscribe(true);
        let blockable = spawn_announcement(&space, page(0));
        assert!(space.try_invalidate_range_start(unmap(page(0))).is_err());
        blockable.join().unwrap();
        assert_eq!(starts.load(Relaxed), ends.load(Relaxed), "a start without its end");
        for mirror in [&first, &second] {
            assert!(mirror.read_begin().unwrap().commit().is_ok());
        }
    });
}

/// Whoever hears of ends hears one for each start, also of those that a smaller range brings.
#[test]
fn paired_set_range_against_an_invalidation() {
    model(|| {
        let space = Subscriptions::new();
        let (starts, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (heard, over) = (Arc::clone(&starts), Arc::clone(&ends));
        let notifier = Counted { starts: heard, ends: over, refuses: false };
        let options = SubscribeOptions::new();
        let mut mirror = space.subscribe_paired(pages(0, 1), notifier, options).unwrap();
        let changer = spawn_announcement(&space, page(1));
        mirror.set_range(page(0)).unwrap();
        changer.join().unwrap();
        assert_eq!(starts.load(Relaxed), ends.load(Relaxed), "a start without its end");
        assert!(mirror.read_begin().unwrap().commit().is_ok());
    });
}

/// Drops a subscription inside its callback: another's, or its own.
struct Dropper {
    victim: Arc<std::sync::Mutex<Option<Subscription<Dropper>>>>,
    dropped: Arc<AtomicUsize>,
}

impl Notifier for Dropper {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        let victim = self.victim.lock().unwrap().take();
        drop(victim);
    }
}

impl Drop for Dropper {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Relaxed);
    }
}

/// The owner of a subscription is dropped by that subscription's own callback, while another thread
/// announces too. It ends, once, and before the announcement returns (F21, regression 40).
#[test]
fn last_reference_dropped_inside_a_callback() {
    model(|| {
        let space = Subscriptions::new();
        let victim = Arc::new(std::sync::Mutex::new(None));
        let dropped = Arc::new(AtomicUsize::new(0));
        let notifier = Dropper { victim: Arc::clone(&victim), dropped: Arc::clone(&dropped) };
        let mirror = space.subscribe(page(0), notifier).unwrap();
        *victim.lock().unwrap() = Some(mirror);
        let other = spawn_announcement(&space, page(0));
        drop(space.invalidate_range_start(unmap(page(0))));
        other.join().unwrap();
        assert_eq!(dropped.load(Relaxed), 1);
        assert_eq!(space.live(), 0);
    });
}

/// As before, under an operation of the announcing thread, which nobody waits for: whoever is the
/// last inside drops the notifier.
#[test]
fn last_reference_dropped_under_ones_own_operation() {
    model(|| {
        let space = Subscriptions::new();
        let victim = Arc::new(std::sync::Mutex::new(None));
        let dropped = Arc::new(AtomicUsize::new(0));
        let notifier = Dropper { victim: Arc::clone(&victim), dropped: Arc::clone(&dropped) };
        let mirror = space.subscribe(page(0), notifier).unwrap();
        let operation = mirror.begin_operation().unwrap();
        *victim.lock().unwrap() = Some(mirror);
        let other = spawn_announcement(&space, page(0));
        drop(operation.space().invalidate_range_start(unmap(page(0))));
        assert_eq!(dropped.load(Relaxed), 0, "an operation of it is under way");
        drop(operation);
        other.join().unwrap();
        assert_eq!(dropped.load(Relaxed), 1);
        assert_eq!(space.live(), 0);
    });
}
