//! The rules of the core that only a wrong backend, policy or moment brings out, one by one.
#![cfg(not(any(loom, shuttle)))]

mod around;
mod common;

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use around::{Around, Next};
use common::{Gpu, Rig, page, range, word};
use mmu_notifier::Notifier;
use tracing::span::{Attributes, Id, Record};
use tracing::{Metadata, Subscriber};
use uhmm::policy::{
    Candidate, CpuFault, DeviceFault, DevicePlan, HomePlan, LeastRecentlyUsed, MigrateCause, Moved,
    Policies, Policy, Verdict,
};
use uhmm::primitive::lock;
use uhmm::sim::{Machine, Mapping, SimError};
use uhmm::{
    Access, AddressSpace, Clock, CopyJob, Device, DeviceFrame, DeviceLocation, DeviceMemory,
    DevicePagemap, Event, EventKind, FaultError, Frame, MigrateReport, MirrorHandle, Mm, Order,
    OutOfDeviceMemory, Owner, PageEntry, PageRange, PagemapOptions, RangeFault, Residency,
    StayReason, Stayed, SystemMemory, WouldBlock,
};

// What is asked.

#[test]
fn the_mask_takes_nothing_from_what_is_asked_for_the_whole_range() {
    let rig = Rig::new(1, 0);
    let request = RangeFault::write(range(0, 1)).mask(Access::Read);
    let done = rig.mirror.range_fault(&request).expect("it can be had");
    assert_eq!(done.entries[0].access, Access::Write);
    rig.finish();
}

#[test]
fn a_page_between_two_that_are_asked_for_is_not_faulted_in() {
    let rig = Rig::new(3, 0);
    let pages = [Access::Write, Access::None, Access::Write];
    let request = RangeFault::snapshot(range(0, 3)).per_page(&pages);
    assert_eq!(rig.mirror.range_fault(&request).expect("they can be had").faulted, 2);
    assert_eq!(rig.residency(1), Residency::Empty);
    rig.finish();
}

#[test]
fn what_will_be_denied_is_denied_before_anything_is_faulted_in() {
    let rig = Rig::new(2, 0);
    rig.process.protect(range(1, 1), Access::Read);
    rig.mirror.range_fault(&RangeFault::write(range(0, 2))).expect_err("it may not be written");
    assert_eq!(rig.residency(0), Residency::Empty);
    rig.finish();
}

#[test]
fn a_run_of_pages_is_faulted_in_by_one_call_and_counted_page_by_page() {
    let rig = Rig::new(5, 0);
    let (space, around) = Around::new(&rig, |_, _, _| (), |_, _| Ok(()));
    let mirror = space.mirror(&rig.gpu, range(0, 5)).expect("the process lives");
    let done = mirror.range_fault(&RangeFault::read(range(0, 4))).expect("they can be had");
    assert_eq!((done.faulted, around.faults.load(SeqCst)), (4, 1));
    mirror.range_fault(&RangeFault::snapshot(range(0, 5))).expect("a look");
    drop(mirror.exclusive(range(0, 2)).expect("they can be held"));
    let counted = space.mm().statistics();
    // Four, the same four again, and the two that were held.
    assert_eq!((counted.range_faults, counted.mapped_pages), (3, 10));
    assert_eq!((counted.faulted_pages, counted.exclusive_pages), (6, 2));
}

#[test]
fn a_backend_is_told_when_a_mirror_has_ended_and_by_then_it_has() {
    let rig = Rig::new(9, 0);
    let (space, around) = Around::new(&rig, |_, _, _| (), |_, _| Ok(()));
    let mirror = |first| space.mirror(&rig.gpu, range(first, 2)).expect("the process lives");
    let (dropped, unregistered, outlived) = (mirror(1), mirror(3), mirror(5));
    let soon = std::time::Instant::now() + std::time::Duration::from_secs(1);
    let mut expected = Vec::new();
    assert_eq!(*lock(&around.ended), expected);
    drop(dropped);
    expected.push((range(1, 2), false));
    assert_eq!(*lock(&around.ended), expected);
    assert!(unregistered.unregister_deadline(soon).is_ok_and(|table| table.is_some()));
    expected.push((range(3, 2), false));
    assert_eq!(*lock(&around.ended), expected);
    drop(space);
    // It knows nothing of the death of its address space but what the others know.
    rig.finish();
    assert!(outlived.unregister().is_none());
    expected.push((range(5, 2), false));
    assert_eq!(*lock(&around.ended), expected);
}

#[test]
fn each_batch_is_counted_once() {
    let rig = Rig::new(0x400, 0);
    for index in [0, 0x3ff] {
        rig.process.store_u64(word(index), 1).expect("memory is there");
    }
    rig.mirror.range_fault(&RangeFault::snapshot(range(0, 0x400))).expect("a look");
    assert_eq!(rig.mirror.mm().statistics().mapped_pages, 2);
    rig.finish();
}

// What is told to a device.

fn entry(residency: Residency, access: Access) -> PageEntry {
    PageEntry { residency, access, allowed: Access::Write, order: Order::PAGE }
}

#[test]
fn what_a_device_may_do_depends_on_where_the_page_is_and_whose_it_is() {
    let (own, other) = (Owner::new(), Owner::new());
    let device = |owner| Residency::Device(DeviceLocation { owner, frame: DeviceFrame(1) });
    let held = |owner| Residency::Exclusive { frame: Frame(1), owner };
    let cases = [
        (Residency::System(Frame(1)), [Access::None, Access::Read, Access::Write, Access::Write]),
        (held(own), [Access::None, Access::Read, Access::Write, Access::Atomic]),
        (held(other), [Access::None; 4]),
        // Its own, unless it is shared with another process.
        (device(own), [Access::None, Access::Read, Access::Atomic, Access::Atomic]),
        (device(other), [Access::None; 4]),
        (Residency::InTransit, [Access::None; 4]),
        (Residency::Empty, [Access::None; 4]),
        (Residency::Hole, [Access::None; 4]),
    ];
    let all = [Access::None, Access::Read, Access::Write, Access::Atomic];
    for (residency, expected) in cases {
        for (said, may) in all.into_iter().zip(expected) {
            let entry = entry(residency, said);
            assert_eq!(entry.access_of(own), may, "{entry:?}");
            assert!(!entry.satisfies(Access::None, own), "nothing is asked for");
            for wanted in [Access::Read, Access::Write, Access::Atomic] {
                assert_eq!(entry.satisfies(wanted, own), may >= wanted, "{entry:?}, {wanted:?}");
            }
        }
    }
}

/// Returns the size that a device is told of a huge page that a backend says so of.
fn size_of(page_of: impl Fn(u64) -> PageEntry + Send + Sync + 'static) -> Order {
    let rig = Rig::new(0x200, 0);
    let look = move |_: &AddressSpace, _: PageRange, entries: &mut [PageEntry]| {
        for (index, entry) in (0..).zip(entries) {
            *entry = PageEntry { order: Order::HUGE, ..page_of(index) };
        }
    };
    let (space, _) = Around::new(&rig, look, |_, _| Ok(()));
    let mirror = space.mirror(&rig.gpu, range(0, 0x200)).expect("the process lives");
    let request = RangeFault::snapshot(range(0, 0x200));
    mirror.range_fault(&request).expect("a look").entries[0].order
}

#[test]
fn a_block_is_one_only_with_one_access_and_consecutive_frames() {
    let owner = Owner::new();
    let held = move |frame| Residency::Exclusive { frame: Frame(frame), owner };
    let system = move |frame| Residency::System(Frame(frame));
    let huge = size_of(move |index| entry(system(index), Access::Write));
    assert_eq!(huge, Order::HUGE);
    assert_eq!(size_of(move |index| entry(held(index), Access::None)), Order::HUGE);
    let read_only = |index| if index == 1 { Access::Read } else { Access::Write };
    assert_eq!(size_of(move |index| entry(system(index), read_only(index))), Order::PAGE);
    assert_eq!(size_of(move |index| entry(system(2 * index), Access::Write)), Order::PAGE);
    assert_eq!(size_of(move |_| entry(system(7), Access::Write)), Order::PAGE);
}

#[test]
fn a_huge_page_in_the_devices_own_memory_is_mapped_as_one() {
    let rig = Rig::new(1, 0x200);
    let whole = range(0, 0x200);
    rig.process.map(whole, Mapping::anonymous(Access::Write).huge(true)).expect("it is mapped");
    rig.fill(0x200, 0);
    let done = rig.mirror.handle_fault(page(5), Access::Write).expect("it can be had");
    // It came whole: no policy wanted less.
    assert_eq!((done.migrated, done.range), (0x200, whole));
    assert_eq!(done.entry.order, Order::HUGE);
    rig.finish();
}

// Collisions, time and errors.

fn announce(space: &AddressSpace, range: PageRange) {
    space.change(range, EventKind::Clear, || ());
}

#[test]
fn an_error_of_a_fault_is_believed_unless_a_change_may_have_caused_it() {
    let hole = FaultError::Hole { page: page(0) };
    let failed = FaultError::CopyFailed { page: page(0) };
    for (error, collides, tries) in
        [(hole, true, 2), (hole, false, 1), (failed, true, 1), (failed, false, 1)]
    {
        let rig = Rig::new(1, 0);
        let first = AtomicU32::new(1);
        let fault = move |space: &AddressSpace, range| match first.swap(0, SeqCst) {
            1 => {
                if collides {
                    announce(space, range);
                }
                Err(error)
            }
            _ => Ok(()),
        };
        let (space, around) = Around::new(&rig, |_, _, _| (), fault);
        let mirror = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
        let done = mirror.range_fault(&RangeFault::read(range(0, 1)));
        assert_eq!(around.faults.load(SeqCst), tries, "{error:?}, {collides}");
        let expected = if tries == 1 { Err(error) } else { Ok(1) };
        assert_eq!(done.map(|done| done.collisions), expected);
    }
}

#[test]
fn x11_the_budget_begins_anew_with_each_page_that_is_faulted_in() {
    const BUDGET: Duration = Duration::from_millis(600);
    let rig = Rig::new(1, 0);
    let looks = AtomicU32::new(0);
    let look = move |space: &AddressSpace, range, entries: &mut [PageEntry]| {
        if looks.fetch_add(1, SeqCst) == 1 {
            entries[0].residency = Residency::Empty;
        } else if looks.load(SeqCst) <= 3 {
            // Most of a budget is lost before the fault, and most of a budget after it.
            std::thread::sleep(BUDGET * 3 / 5);
            announce(space, range);
        }
    };
    let (space, _) = Around::new(&rig, look, |_, _| Ok(()));
    rig.fill(1, 0);
    let mirror = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let request = RangeFault::read(range(0, 1)).budget(BUDGET);
    let done = mirror.range_fault(&request).expect("there was progress");
    assert_eq!((done.collisions, done.faulted), (2, 1));
}

#[test]
fn a_deadline_that_passes_during_a_collision_is_named_and_not_the_budget() {
    let rig = Rig::new(1, 0);
    rig.fill(1, 1);
    let deadline = Instant::now() + Duration::from_millis(100);
    let look = move |space: &AddressSpace, range, _: &mut [PageEntry]| {
        while Instant::now() < deadline {
            std::thread::yield_now();
        }
        announce(space, range);
    };
    let (space, _) = Around::new(&rig, look, |_, _| Ok(()));
    let mirror = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let request = RangeFault::read(range(0, 1)).deadline(deadline).budget(Duration::ZERO);
    let error = mirror.range_fault(&request);
    assert_eq!(error, Err(FaultError::TimedOut { page: page(0) }));
}

/// Of budget and deadline the first ends the wait for a change that does not end.
#[test]
fn x11_the_wait_for_a_change_is_as_long_as_the_budget_and_the_deadline_allow() {
    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(2);
    let rig = Rig::new(1, 0);
    let space = rig.process.address_space();
    let ask = |deadline: Duration, budget: Duration| {
        let event = Event::new(EventKind::Clear, range(0, 1).va_range());
        std::thread::scope(|scope| {
            let change = space.backend().notifiers().invalidate_range_start(event);
            let late = scope.spawn(|| {
                let request = RangeFault::read(range(0, 1)).budget(budget);
                rig.mirror.range_fault(&request.deadline(Instant::now() + deadline))
            });
            let error = late.join().expect("no panic");
            drop(change);
            error
        })
    };
    assert_eq!(ask(SHORT, LONG), Err(FaultError::TimedOut { page: page(0) }));
    let collided = FaultError::Collided { page: page(0), collisions: 1 };
    assert_eq!(ask(LONG, SHORT), Err(collided));
    rig.finish();
}

#[test]
fn every_way_to_ask_for_a_page_in_transit_ends_at_its_deadline() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 5);
    let migration = rig.process.address_space().migrate(range(0, 1), &rig.pagemap);
    let timed_out = Some(FaultError::TimedOut { page: page(0) });
    let soon = || Instant::now() + Duration::from_millis(2);
    std::thread::scope(|scope| {
        let late = scope.spawn(|| rig.mirror.exclusive_deadline(range(0, 1), soon()).err());
        assert_eq!(late.join().expect("no panic"), timed_out);
        let late =
            scope.spawn(|| rig.mirror.handle_fault_deadline(page(0), Access::Read, soon()).err());
        assert_eq!(late.join().expect("no panic"), timed_out);
    });
    drop(migration);
    rig.finish();
}

// Device faults by plan.

/// Serves a range with every fault, and makes everybody wait for an hour.
#[derive(Debug)]
struct Wants(PageRange, Duration);

impl Policy for Wants {
    fn name(&self) -> &'static str {
        "wants"
    }

    fn device_fault(&self, _: &DeviceFault<'_>, plan: &mut DevicePlan) {
        (plan.range, plan.nap) = (self.0, self.1);
    }

    fn cpu_fault(&self, _: &CpuFault, plan: &mut HomePlan) {
        (plan.range, plan.nap) = (self.0, self.1);
    }
}

fn wants(range: PageRange, nap: Duration) -> PagemapOptions {
    PagemapOptions::new().policies(Policies::none().and(Wants(range, nap)))
}

#[test]
fn a_plan_reaches_no_further_than_the_mirror() {
    let rig = Rig::with(4, 4, wants(range(0, 4), Duration::ZERO));
    rig.fill(4, 0);
    let space = rig.process.address_space();
    let small = space.mirror_with(&rig.gpu, range(1, 2), &rig.pagemap).expect("it lives");
    let error = small.handle_fault(page(0), Access::Read).expect_err("it is not mirrored");
    let (request, mirror) = (range(0, 1), range(1, 2));
    assert_eq!(error, FaultError::OutOfRange { request, mirror });
    assert!((0..4).all(|index| !rig.on_device(index)), "moved for a fault that is refused");
    let done = small.handle_fault(page(1), Access::Read).expect("it can be had");
    assert_eq!((done.range, done.migrated), (range(1, 2), 2));
    assert!(!rig.on_device(0) && !rig.on_device(3));
    drop(small);
    rig.finish();
}

#[test]
fn a_fault_on_what_the_device_has_moves_nothing() {
    let rig = Rig::with(2, 2, wants(range(0, 2), Duration::ZERO));
    rig.fill(2, 0);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(0, 1), &rig.pagemap).run().moved, 1);
    let done = rig.mirror.handle_fault(page(0), Access::Write).expect("it is there");
    assert_eq!((done.migrated, done.entry.access), (0, Access::Atomic));
    assert!(!rig.on_device(1));
    rig.finish();
}

#[test]
fn nobody_naps_longer_than_the_longest_nap() {
    let rig = Rig::with(1, 1, wants(range(0, 1), Duration::from_secs(3600)));
    rig.fill(1, 0);
    rig.mirror.handle_fault(page(0), Access::Read).expect("it can be had");
    assert_eq!(rig.pagemap.clock().now(), Policies::MAX_NAP);
    rig.process.load_u64(word(0)).expect("memory is there");
    assert_eq!(rig.pagemap.clock().now(), 2 * Policies::MAX_NAP);
    rig.finish();
}

#[test]
fn nobody_is_throttled_by_a_nap_of_nothing() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 0);
    rig.mirror.handle_fault(page(0), Access::Read).expect("it can be had");
    rig.process.load_u64(word(0)).expect("memory is there");
    assert_eq!(rig.mirror.mm().statistics().throttles, 0);
    assert_eq!(rig.pagemap.statistics().throttles, 0);
    rig.finish();
}

#[test]
fn the_other_batches_of_a_plan_are_entered_too() {
    let rig = Rig::with(0x400, 0, wants(range(0, 0x400), Duration::ZERO));
    rig.fill(1, 0);
    rig.mirror.handle_fault(page(0x210), Access::Read).expect("it can be had");
    assert!(rig.mirror.inspect(|table| table.entry(page(0))).expect("it lives").is_some());
    rig.finish();
}

#[test]
fn a_fault_has_its_page_although_time_ran_out_for_another_batch() {
    let options = wants(range(0, 0x400), Duration::ZERO);
    let rig = Rig::with(0x400, 0, options);
    let deadline = Instant::now() + Duration::from_millis(500);
    let look = move |space: &AddressSpace, asked: PageRange, _: &mut [PageEntry]| {
        if asked.contains(page(0)) {
            while Instant::now() < deadline {
                std::thread::yield_now();
            }
            announce(space, asked);
        }
    };
    let (space, _) = Around::new(&rig, look, |_, _| Ok(()));
    let mirror = space.mirror_with(&rig.gpu, range(0, 0x400), &rig.pagemap).expect("it lives");
    let done = mirror.handle_fault_deadline(page(0x210), Access::Read, deadline);
    assert_eq!(done.map(|done| done.entry.access), Ok(Access::Read));
}

#[test]
fn a_page_that_is_made_writable_again_stays_on_its_device() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 9);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(0, 1), &rig.pagemap).run().moved, 1);
    rig.process.clear_soft_dirty(range(0, 1));
    let done = rig.mirror.range_fault(&RangeFault::write(range(0, 1))).expect("it can be had");
    assert_eq!(done.faulted, 1, "the test means nothing");
    assert!(rig.on_device(0));
    rig.finish();
}

#[test]
fn a_look_at_another_devices_page_is_no_use_of_ones_own() {
    let options = PagemapOptions::new().policies(Policies::none().and(LeastRecentlyUsed));
    let rig = Rig::with(3, 2, options);
    rig.fill(3, 0);
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    let other = DevicePagemap::register_with(Gpu::new(1), options);
    let space = rig.process.address_space();
    let tick = || rig.pagemap.clock().sleep(Duration::from_millis(1));
    for index in 0..2 {
        tick();
        assert_eq!(space.migrate(range(index, 1), &rig.pagemap).run().moved, 1);
    }
    tick();
    assert_eq!(space.migrate(range(2, 1), &other).run().moved, 1);
    // Of the same number as the one that was used longest ago.
    rig.mirror.range_fault(&RangeFault::snapshot(range(2, 1))).expect("a look");
    assert_eq!(rig.pagemap.evict(1), 1);
    assert!(rig.on_device(1) && !rig.on_device(0));
    rig.finish();
    assert_eq!(other.used(), 0);
}

// Holds.

#[test]
fn a_hold_that_is_refused_or_dropped_ends_no_other() {
    let rig = Rig::new(3, 0);
    rig.fill(3, 0);
    let space = rig.process.address_space();
    let small = space.mirror_with(&rig.gpu, range(0, 1), &rig.pagemap).expect("it lives");
    let hold = rig.mirror.exclusive(range(0, 2)).expect("they can be held");
    let error = small.exclusive(range(0, 2)).expect_err("it is not mirrored");
    assert!(matches!(error, FaultError::OutOfRange { .. }), "{error}");
    assert!(hold.is_held());
    drop(rig.mirror.exclusive(range(2, 1)).expect("it can be held"));
    assert!(hold.is_held());
    drop(hold);
    drop(small);
    rig.finish();
}

#[test]
fn a_hold_can_be_given_back_after_its_mirror_has_ended() {
    let rig = Rig::new(1, 0);
    rig.fill(1, 0);
    let space = rig.process.address_space();
    let mirror = space.mirror(&rig.gpu, range(0, 1)).expect("it lives");
    let handle = (*mirror).clone();
    let hold = handle.exclusive(range(0, 1)).expect("it can be held");
    drop(mirror);
    assert!(!hold.is_held());
    assert!(matches!(rig.residency(0), Residency::Exclusive { .. }));
    drop(hold);
    assert!(matches!(rig.residency(0), Residency::System(_)));
    rig.finish();
}

/// X07: what it translates already stays true when it takes the page exclusively.
#[test]
fn x07_a_device_does_not_hear_of_its_own_holds() {
    let rig = Rig::new(1, 0);
    rig.mirror.range_fault(&RangeFault::write(range(0, 1))).expect("it can be had");
    std::mem::forget(rig.mirror.exclusive(range(0, 1)).expect("it can be held"));
    assert_eq!(*lock(&rig.gpu.log), Vec::<String>::new());
    rig.finish();
}

// Ends.

#[test]
fn the_end_of_a_mirror_waits_for_its_faults() {
    let rig = Rig::new(1, 0);
    let (entered, is_inside) = mpsc::channel();
    let (may_go_on, go_on) = mpsc::channel();
    let go_on = Mutex::new(go_on);
    let fault = move |_: &AddressSpace, _| {
        entered.send(()).expect("the test waits");
        lock(&go_on).recv().expect("the test goes on");
        Ok(())
    };
    let (space, _) = Around::new(&rig, |_, _, _| (), fault);
    let mirror = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let handle = (*mirror).clone();
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| handle.range_fault(&RangeFault::read(range(0, 1))));
        is_inside.recv().expect("the worker enters");
        let soon = Instant::now() + Duration::from_millis(2);
        let unfinished = mirror.unregister_deadline(soon).err();
        may_go_on.send(()).expect("the worker waits");
        assert_eq!(worker.join().expect("no panic"), Err(FaultError::Released));
        let unfinished = unfinished.expect("a fault was under way");
        let late = Instant::now() + Duration::from_secs(3600);
        let table = unfinished.mirror.unregister_deadline(late).expect("nothing is under way");
        assert!(table.is_some());
    });
}

/// Says whether there are users of an address space when it is dropped.
struct Asked(Mm, mpsc::Sender<bool>);

impl Drop for Asked {
    fn drop(&mut self) {
        self.1.send(self.0.users().is_some()).expect("the test waits");
    }
}

#[test]
fn d02_a_migration_that_is_given_up_is_a_user_until_its_pages_are_back() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 0);
    let (space, around) = Around::new(&rig, |_, _, _| (), |_, _| Ok(()));
    let mm = space.mm().clone();
    let (answer, answers) = mpsc::channel();
    let asked = Asked(mm.clone(), answer);
    let committed = Box::new(move || drop(asked));
    *lock(&around.next) = Some(Next { foreign: false, stayed: Vec::new(), committed });
    let migration = space.migrate(range(0, 1), &rig.pagemap);
    drop(space);
    drop(migration);
    assert_eq!(answers.recv(), Ok(true));
    assert!(mm.users().is_none());
}

/// Does something when a fault is made to wait: an event comes just before.
struct WhenThrottled(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Subscriber for WhenThrottled {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "uhmm" && metadata.fields().field("nap").is_some()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        unreachable!("this crate opens no span")
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        let f = lock(&self.0).take().expect("there is one nap");
        f();
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn d02_a_fault_that_naps_keeps_nothing_alive() {
    let rig = Rig::with(1, 1, wants(range(0, 1), Duration::from_millis(1)));
    rig.fill(1, 0);
    let Rig { machine, process, mirror, .. } = rig;
    let mm = process.address_space().mm().clone();
    let exit = move || {
        process.exit();
        assert!(mm.users().is_none(), "the nap is a user");
        assert_eq!(machine.frames(), 0);
    };
    let subscriber = WhenThrottled(Mutex::new(Some(Box::new(exit))));
    let _default = tracing::subscriber::set_default(subscriber);
    assert_eq!(mirror.handle_fault(page(0), Access::Read).err(), Some(FaultError::Released));
}

/// Asks for a page of another process when it is called.
struct Asks(MirrorHandle<Gpu>, mpsc::Sender<Option<FaultError>>);

impl Notifier for Asks {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        let request = RangeFault::read(range(0, 1));
        self.1.send(self.0.range_fault(&request).err()).expect("the test waits");
    }
}

#[test]
fn x09_no_fault_begins_inside_a_callback() {
    let rig = Rig::new(1, 0);
    let other = rig.machine.spawn();
    let space = other.address_space();
    let (answer, answers) = mpsc::channel();
    let asks = Asks((*rig.mirror).clone(), answer);
    let subscription =
        space.backend().notifiers().subscribe(range(0, 1).va_range(), asks).expect("it lives");
    announce(space, range(0, 1));
    assert_eq!(answers.recv(), Ok(Some(FaultError::SelfWait { page: page(0) })));
    drop(subscription);
    other.exit();
    rig.finish();
}

/// A device that can always stop at once.
struct Nimble;

impl Device for Nimble {
    type PageTable = ();
    type Fence = ();

    fn page_table(&self, _: PageRange, _: &Arc<dyn SystemMemory>) {}

    fn map(&self, (): &mut (), _: PageRange, _: &[PageEntry]) {}

    fn invalidate(&self, (): &mut (), _: &Event) {}

    fn try_invalidate(&self, (): &mut (), _: &Event) -> Result<(), WouldBlock> {
        Ok(())
    }
}

#[test]
fn a_device_that_can_stop_at_once_is_asked_to() {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 1), Mapping::anonymous(Access::Write)).expect("memory is mapped");
    process.store_u64(word(0), 1).expect("memory is there");
    let space = process.address_space();
    let mirror = space.mirror(&Arc::new(Nimble), range(0, 1)).expect("it lives");
    mirror.range_fault(&RangeFault::read(range(0, 1))).expect("it can be had");
    assert_eq!(process.oom_reap(), Ok(1));
    assert_eq!(space.mm().statistics().invalidations, 1);
}

// Migration.

fn other_device(pages: usize) -> Arc<DevicePagemap> {
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    DevicePagemap::register_with(Gpu::new(pages), options)
}

fn migrate(rig: &Rig, first: u64, pages: u64) -> MigrateReport {
    rig.process.address_space().migrate(range(first, pages), &rig.pagemap).run()
}

fn huge_rig(device_pages: usize, options: PagemapOptions) -> Rig {
    let rig = Rig::with(1, device_pages, options);
    let huge = Mapping::anonymous(Access::Write).huge(true);
    rig.process.map(range(0, 0x400), huge).expect("it is mapped");
    rig.fill(0x400, 0);
    rig
}

fn plain() -> PagemapOptions {
    PagemapOptions::new().policies(Policies::none())
}

#[test]
fn pages_of_several_devices_come_home_each_from_its_own() {
    let rig = Rig::new(4, 1);
    rig.fill(4, 40);
    let other = other_device(2);
    let space = rig.process.address_space();
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    assert_eq!(space.migrate(range(1, 1), &other).run().moved, 1);
    assert_eq!(space.migrate(range(3, 1), &other).run().moved, 1);
    let report = space.migrate_home(range(0, 6));
    // What was not on any device is not mentioned.
    assert_eq!((report.moved, report.stayed), (3, Vec::new()));
    assert_eq!(rig.pagemap.statistics().home_by_request, 1);
    // Page by page: there is one between them.
    assert_eq!(other.statistics().home_by_request, 2);
    for index in 0..4 {
        assert_eq!(rig.process.load_u64(word(index)), Ok(40 + index));
    }
    rig.finish();
}

#[test]
fn a_cpu_brings_home_what_is_in_the_same_devices_memory() {
    let rig = Rig::with(2, 2, wants(range(0, 2), Duration::ZERO));
    rig.fill(2, 0);
    let other = other_device(1);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(1, 1), &other).run().moved, 1);
    assert_eq!(rig.process.load_u64(word(0)), Ok(0));
    assert_eq!((rig.pagemap.used(), other.used()), (0, 1));
    rig.finish();
}

#[test]
fn a_report_is_by_address_and_pages_without_contents_are_counted() {
    let rig = Rig::new(3, 3);
    rig.fill(1, 0);
    rig.process.unmap(range(1, 1));
    rig.gpu.injector.fail("copy", 0);
    let report = migrate(&rig, 0, 3);
    assert_eq!(report.moved, 1);
    let stayed: Vec<PageRange> = report.stayed.iter().map(|stayed| stayed.pages).collect();
    assert_eq!(stayed, [range(0, 1), range(1, 1)]);
    assert_eq!(rig.pagemap.statistics().in_without_copy, 1);
    rig.finish();
}

#[test]
fn a_large_page_comes_home_in_pieces_where_there_is_no_room_for_it_whole() {
    let rig = huge_rig(0x200, plain());
    assert_eq!(migrate(&rig, 0, 0x200).moved, 0x200);
    rig.machine.injector().fail("frame", 0);
    assert_eq!(rig.process.load_u64(word(9)), Ok(9));
    assert_eq!((rig.pagemap.used(), rig.pagemap.statistics().splits), (0, 1));
    rig.finish();
}

#[test]
fn a_large_page_that_cannot_be_split_says_so() {
    let rig = huge_rig(0x100, plain());
    rig.machine.injector().fail_always("split");
    assert_eq!(migrate(&rig, 0, 0x200).reason(page(0)), Some(StayReason::LargePage));
    rig.machine.injector().clear();
    rig.finish();
}

#[test]
fn nothing_is_split_or_evicted_for_a_device_that_has_no_page_left() {
    let rig = huge_rig(1, plain());
    let small = Mapping::anonymous(Access::Write);
    rig.process.map(range(0x1fc, 4), small).expect("there is room");
    assert_eq!(migrate(&rig, 0x1fc, 1).moved, 1);
    rig.gpu.injector.fail_always("copy");
    let before = rig.gpu.injector.asked("copy");
    assert_eq!(migrate(&rig, 0x1fd, 0x203).moved, 0);
    // Once to make room for all, and once for the first page.
    assert_eq!(rig.gpu.injector.asked("copy") - before, 2);
    assert_eq!(rig.pagemap.statistics().splits, 0);
    rig.gpu.injector.clear();
    rig.finish();
}

/// Notes how many pages came home at once.
#[derive(Debug, Default)]
struct Evictions(Mutex<Vec<u64>>);

impl Policy for Evictions {
    fn name(&self) -> &'static str {
        "evictions"
    }

    fn moved(&self, moved: &Moved) {
        if moved.cause == MigrateCause::Eviction {
            lock(&self.0).push(moved.pages.pages());
        }
    }
}

#[test]
fn room_is_made_in_one_go_and_no_more_of_it_than_is_wanted() {
    let evictions = Arc::new(Evictions::default());
    let options = PagemapOptions::new().policies(Policies::none().and_shared(evictions.clone()));
    let rig = Rig::with(7, 4, options);
    rig.fill(7, 0);
    assert_eq!(migrate(&rig, 0, 3).moved, 3);
    assert_eq!(migrate(&rig, 3, 3).moved, 3);
    assert_eq!(*lock(&evictions.0), [2]);
    assert!(rig.on_device(2));
    rig.finish();
}

#[test]
fn evictions_are_of_few_pages_at_a_time_and_of_no_block_too_many() {
    let evictions = Arc::new(Evictions::default());
    let options = PagemapOptions::new().policies(Policies::none().and_shared(evictions.clone()));
    let rig = huge_rig(0x400, options);
    assert_eq!(migrate(&rig, 0, 0x400).moved, 0x400);
    assert_eq!(rig.pagemap.evict(0x200), 0x200);
    assert_eq!(rig.pagemap.evict(1), 0x200);
    rig.process.map(range(0, 0x300), Mapping::anonymous(Access::Write)).expect("there is room");
    assert_eq!(migrate(&rig, 0, 0x300).moved, 0x300);
    assert_eq!(rig.pagemap.evict(0x300), 0x300);
    assert_eq!(*lock(&evictions.0), [0x200, 0x200, 0x200, 0x100]);
    rig.finish();
}

#[test]
fn where_one_block_cannot_be_evicted_another_is() {
    let rig = Rig::new(3, 2);
    rig.fill(3, 0);
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    rig.gpu.injector.fail("copy", 0);
    assert_eq!(rig.pagemap.evict(1), 1);
    assert_eq!(rig.pagemap.used(), 1);
    // What the allocator refuses is helped by eviction too.
    rig.gpu.injector.fail("allocate", 0);
    assert_eq!(migrate(&rig, 2, 1).moved, 1);
    assert_eq!(rig.pagemap.used(), 1);
    rig.finish();
}

#[test]
fn nothing_is_evicted_for_a_device_that_is_closed() {
    let rig = Rig::new(2, 1);
    rig.fill(2, 0);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.gpu.injector.fail("copy", 0);
    rig.pagemap.evict_all().expect_err("the copy fails");
    assert_eq!(migrate(&rig, 1, 1).reason(page(1)), Some(StayReason::OutOfDeviceMemory));
    assert!(rig.on_device(0));
    assert_eq!(rig.pagemap.statistics().failed_allocations, 1);
    rig.finish();
}

#[test]
fn a_cpu_is_told_why_its_page_cannot_come_home() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 0);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.machine.injector().fail("frame", 0);
    let error = rig.process.load_u64(word(0));
    assert_eq!(error, Err(SimError::Fault(FaultError::OutOfMemory { page: page(0) })));
    let page = page(0);
    let stuck = |reason| Err(FaultError::Stuck { page, reason });
    let cases = [
        // It has come, comes, or is no more: the caller looks again.
        (StayReason::InTransit, Ok(())),
        (StayReason::Elsewhere, Ok(())),
        (StayReason::AlreadyThere, Ok(())),
        (StayReason::Hole, Ok(())),
        (StayReason::Changed, Ok(())),
        (StayReason::Gone, Ok(())),
        (StayReason::Pinned, stuck(StayReason::Pinned)),
        (StayReason::Busy, stuck(StayReason::Busy)),
        (StayReason::LargePage, stuck(StayReason::LargePage)),
        (StayReason::Shared, stuck(StayReason::Shared)),
        (StayReason::Reserved, stuck(StayReason::Reserved)),
        (StayReason::Locked, stuck(StayReason::Locked)),
        (StayReason::ReadOnly, stuck(StayReason::ReadOnly)),
        (StayReason::Handled, stuck(StayReason::Handled)),
        (StayReason::Unsupported, stuck(StayReason::Unsupported)),
    ];
    for (reason, expected) in cases {
        let stayed = vec![Stayed { pages: range(0, 1), reason }];
        let (_, around) = Around::new(&rig, |_, _, _| (), |_, _| Ok(()));
        *lock(&around.next) = Some(Next { foreign: false, stayed, committed: Box::new(|| ()) });
        // There is nothing to take: the isolation is of a page that is not there.
        let answer = other_device(1).bring_home(&*around, page, Order::PAGE);
        assert_eq!(answer, expected, "{reason:?}");
    }
}

/// Counts how many blocks could be evicted.
#[derive(Debug, Default)]
struct Victims(AtomicU32);

impl Policy for Victims {
    fn name(&self) -> &'static str {
        "victims"
    }

    fn victim(&self, _: &Candidate, _: &mut Verdict) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn what_is_no_more_is_not_looked_for_by_an_eviction() {
    let victims = Arc::new(Victims::default());
    let options = PagemapOptions::new().policies(Policies::none().and_shared(victims.clone()));
    let rig = Rig::with(4, 4, options);
    rig.fill(4, 0);
    assert_eq!(migrate(&rig, 1, 3).moved, 3);
    rig.process.unmap(range(1, 1));
    // And a page that goes away at the moment when it arrives.
    let process = rig.process.clone();
    let committed = Box::new(move || process.unmap(range(0, 1)));
    let (space, around) = Around::new(&rig, |_, _, _| (), |_, _| Ok(()));
    *lock(&around.next) = Some(Next { foreign: false, stayed: Vec::new(), committed });
    assert_eq!(space.migrate(range(0, 1), &rig.pagemap).run().moved, 1);
    assert_eq!(rig.pagemap.used(), 2);
    assert_eq!((rig.pagemap.evict(1), victims.0.load(SeqCst)), (1, 2));
}

#[test]
fn a_way_home_says_nothing_of_what_is_not_mapped() {
    let rig = Rig::new(1, 0);
    let (space, around) = Around::new(&rig, |_, _, _| (), |_, _| Ok(()));
    let hole = Stayed { pages: range(0, 1), reason: StayReason::Hole };
    let busy = Stayed { pages: range(1, 1), reason: StayReason::Busy };
    let (stayed, committed) = (vec![hole, busy], Box::new(|| ()));
    *lock(&around.next) = Some(Next { foreign: true, stayed, committed });
    assert_eq!(space.migrate_home(range(0, 2)).stayed, [busy]);
}

type Meddle = Mutex<Option<Box<dyn FnOnce() + Send>>>;

/// The memory of a device, in which something happens during the next copy, and before and after the
/// next block is freed.
struct Meddled {
    gpu: Arc<Gpu>,
    meddle: Meddle,
    before_free: Meddle,
    after_free: Meddle,
}

fn happen(meddle: &Meddle) {
    let meddle = lock(meddle).take();
    if let Some(meddle) = meddle {
        meddle();
    }
}

impl DeviceMemory for Meddled {
    fn capacity(&self) -> u64 {
        self.gpu.capacity()
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        self.gpu.allocate(order)
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        happen(&self.before_free);
        self.gpu.free(frame, order);
        happen(&self.after_free);
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        happen(&self.meddle);
        self.gpu.copy(memory, jobs);
    }
}

fn meddled(pages: usize) -> (Arc<Meddled>, Arc<DevicePagemap>) {
    let memory = Arc::new(Meddled {
        gpu: Gpu::new(pages),
        meddle: Mutex::default(),
        before_free: Mutex::default(),
        after_free: Mutex::default(),
    });
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    (memory.clone(), DevicePagemap::register_with(memory, options))
}

#[test]
fn a_page_that_is_unmapped_while_it_is_evicted_counts_as_evicted() {
    let rig = Rig::new(2, 0);
    rig.fill(2, 0);
    let (memory, pagemap) = meddled(2);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(0, 2), &pagemap).run().moved, 2);
    let process = rig.process.clone();
    *lock(&memory.meddle) = Some(Box::new(move || process.unmap(range(0, 1))));
    assert_eq!((pagemap.evict(1), pagemap.used()), (1, 1));
    rig.finish();
}

#[test]
fn nothing_comes_to_a_device_while_all_is_evicted() {
    let rig = Rig::new(2, 0);
    rig.fill(2, 0);
    let (memory, pagemap) = meddled(2);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(0, 1), &pagemap).run().moved, 1);
    let (space, to) = (space.clone(), Arc::clone(&pagemap));
    *lock(&memory.meddle) = Some(Box::new(move || {
        assert_eq!(space.migrate(range(1, 1), &to).run().moved, 0);
    }));
    assert_eq!(pagemap.evict_all(), Ok(()));
    rig.finish();
}

#[test]
fn a_block_is_accounted_for_until_it_is_free_and_forgotten_before() {
    let rig = Rig::new(1, 0);
    rig.fill(1, 0);
    let other = Machine::new().spawn();
    other.map(range(0, 1), Mapping::anonymous(Access::Write)).expect("memory is mapped");
    let (memory, pagemap) = meddled(2);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(0, 1), &pagemap).run().moved, 1);
    let (map, to, next) = (Arc::clone(&pagemap), Arc::clone(&pagemap), other.clone());
    *lock(&memory.before_free) = Some(Box::new(move || assert_eq!(map.used(), 1)));
    // The frame is given out again at once, to somebody else.
    *lock(&memory.after_free) = Some(Box::new(move || {
        assert_eq!(next.address_space().migrate(range(0, 1), &to).run().moved, 1);
    }));
    rig.process.unmap(range(0, 1));
    assert_eq!(pagemap.used(), 1);
    assert_eq!(pagemap.evict_all(), Ok(()));
    rig.finish();
}

#[test]
fn a_block_that_was_split_is_evicted_piece_by_piece() {
    let rig = huge_rig(0x200, plain());
    assert_eq!(migrate(&rig, 0, 0x200).moved, 0x200);
    rig.process.unmap(range(0x10, 0x10));
    assert_eq!(rig.pagemap.evict(1), 1);
    assert_eq!(rig.pagemap.evict_all(), Ok(()));
    rig.finish();
}

/// X09: the pages in a device's memory may be those of machines that know nothing of each other.
#[test]
fn x09_an_eviction_asks_of_each_page_the_map_that_knows_it() {
    let (rig, other) = (Rig::new(1, 2), Rig::new(1, 0));
    rig.fill(1, 1);
    other.fill(1, 2);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    let space = other.process.address_space();
    assert_eq!(space.migrate(range(0, 1), &rig.pagemap).run().moved, 1);
    assert_eq!(rig.pagemap.evict(2), 2);
    assert_eq!(rig.process.load_u64(word(0)), Ok(1));
    assert_eq!(other.process.load_u64(word(0)), Ok(2));
    other.finish();
    rig.finish();
}

#[test]
fn a_migration_is_complete_where_the_pages_are_there_already() {
    let rig = Rig::new(2, 2);
    rig.fill(2, 0);
    assert!(migrate(&rig, 0, 1).is_complete());
    assert!(migrate(&rig, 0, 1).is_complete());
    rig.gpu.injector.fail("copy", 0);
    assert!(!migrate(&rig, 0, 2).is_complete());
    rig.finish();
}

#[test]
fn a_limit_is_no_more_than_there_is_and_the_peak_is_the_most_there_was() {
    let rig = Rig::with(3, 2, plain().limit(100));
    assert_eq!(rig.pagemap.limit(), 2);
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    assert_eq!(rig.pagemap.evict(2), 2);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    assert_eq!((rig.pagemap.used(), rig.pagemap.statistics().peak), (1, 2));
    rig.finish();
}

#[test]
fn a_block_is_used_whole_and_nothing_else_with_it() {
    let options = || PagemapOptions::new().policies(Policies::none().and(LeastRecentlyUsed));
    let tick = |rig: &Rig| rig.pagemap.clock().sleep(Duration::from_millis(1));
    let rig = huge_rig(0x400, options());
    for first in [0, 0x200] {
        tick(&rig);
        assert_eq!(migrate(&rig, first, 0x200).moved, 0x200);
    }
    tick(&rig);
    rig.pagemap.touch(&[DeviceFrame(5)]);
    assert_eq!(rig.pagemap.evict(1), 0x200);
    assert!(rig.on_device(0) && !rig.on_device(0x200));
    rig.finish();

    let rig = Rig::with(3, 3, options());
    rig.fill(3, 0);
    for index in 0..2 {
        tick(&rig);
        assert_eq!(migrate(&rig, index, 1).moved, 1);
    }
    tick(&rig);
    // Nothing is there.
    rig.pagemap.touch(&[DeviceFrame(2)]);
    rig.process.load_u64(word(0)).expect("memory is there");
    assert_eq!(migrate(&rig, 2, 1).moved, 1);
    // To arrive is to be used: the last to come is before the first in the device's memory.
    assert_eq!(rig.pagemap.evict(1), 1);
    assert!(rig.on_device(2) && !rig.on_device(1));
    rig.finish();
}

#[test]
fn a_large_page_is_not_split_for_want_of_what_can_be_evicted() {
    let rig = huge_rig(0x200, plain());
    rig.process.map(range(0x3ff, 1), Mapping::anonymous(Access::Write)).expect("there is room");
    assert_eq!(migrate(&rig, 0x3ff, 1).moved, 1);
    // It does not come home at the first attempt.
    rig.gpu.injector.fail("copy", 0);
    assert_eq!(migrate(&rig, 0, 0x200).moved, 0x200);
    assert_eq!(rig.pagemap.statistics().splits, 0);
    rig.finish();
}

#[test]
fn a_page_that_another_device_does_not_give_up_is_not_called_there_already() {
    let rig = huge_rig(0x400, plain());
    let other = other_device(0x200);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(0, 0x200), &other).run().moved, 0x200);
    rig.machine.injector().fail_always("split");
    let report = migrate(&rig, 0, 0x100);
    rig.machine.injector().clear();
    assert_eq!(report.moved, 0);
    assert!(!report.is_complete(), "{report:?}");
}

#[test]
fn a_page_that_another_device_gave_up_after_all_has_moved_and_no_more() {
    let rig = Rig::new(2, 2);
    rig.fill(2, 0);
    let other = other_device(2);
    let (space, around) = Around::new(&rig, |_, _, _| (), |_, _| Ok(()));
    assert_eq!(space.migrate(range(1, 1), &other).run().moved, 1);
    let stayed = vec![Stayed { pages: range(0, 1), reason: StayReason::InTransit }];
    *lock(&around.next) = Some(Next { foreign: true, stayed, committed: Box::new(|| ()) });
    let report = space.migrate(range(0, 2), &rig.pagemap).run();
    assert_eq!(report.moved, 2);
    assert_eq!(report.stayed, []);
}
