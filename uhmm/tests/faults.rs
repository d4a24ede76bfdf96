//! Range faults: what is asked, what is entered, what is an error, and when it gives up.
#![cfg(not(any(loom, shuttle)))]

mod around;
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use around::Around;
use common::{Gpu, Rig, mirror, page, range, word};
use mmu_notifier::{Event, EventKind};
use uhmm::sim::Mapping;
use uhmm::{
    Access, AddressSpace, FaultError, Order, PageEntry, PageRange, PagemapOptions, RangeFault,
    Residency,
    policy::{CpuFault, DeviceFault, DevicePlan, HomePlan, Policies, Policy},
};

#[test]
fn each_page_is_faulted_for_what_is_asked_of_it() {
    let rig = Rig::new(4, 0);
    let pages = [Access::Write, Access::Read, Access::None, Access::Write];
    let request = RangeFault::snapshot(range(0, 4)).per_page(&pages);
    let done = rig.mirror.range_fault(&request).expect("all can be had");
    let access: Vec<Access> = done.entries.iter().map(|entry| entry.access).collect();
    assert_eq!(access, [Access::Write, Access::Read, Access::None, Access::Write]);
    assert_eq!(done.faulted, 3);
    rig.finish();
}

#[test]
fn the_default_of_the_range_is_the_least_and_the_mask_the_most_of_a_page() {
    let rig = Rig::new(3, 0);
    let pages = [Access::Write, Access::None];
    let request = RangeFault::read(range(0, 3)).per_page(&pages).mask(Access::Read);
    let done = rig.mirror.range_fault(&request).expect("all can be had");
    assert!(done.entries.iter().all(|entry| entry.access == Access::Read), "{done:?}");
    rig.finish();
}

/// Regression 15: what a request's array holds counts for nothing where the mask says so.
#[test]
fn a_mask_of_nothing_asks_for_nothing_whatever_the_pages_say() {
    let rig = Rig::new(2, 0);
    let pages = [Access::Atomic; 2];
    let request = RangeFault::snapshot(range(0, 2)).per_page(&pages).mask(Access::None);
    let done = rig.mirror.range_fault(&request).expect("a look is no fault");
    assert_eq!(done.faulted, 0);
    assert!(done.entries.iter().all(|entry| entry.access == Access::None));
    rig.finish();
}

#[test]
fn a_snapshot_faults_nothing_and_enters_what_is_there() {
    let rig = Rig::new(3, 0);
    rig.process.store_u64(word(1), 7).expect("memory is there");
    let done = rig.mirror.range_fault(&RangeFault::snapshot(range(0, 5))).expect("a look");
    let residency: Vec<bool> =
        done.entries.iter().map(|entry| entry.access != Access::None).collect();
    assert_eq!(residency, [false, true, false, false, false]);
    assert_eq!(done.entries[0].residency, Residency::Empty);
    assert_eq!(done.entries[4].residency, Residency::Hole);
    assert_eq!(rig.mirror.inspect(|table| table.len()), Ok(1));
    rig.finish();
}

#[test]
fn a_hole_is_an_error_that_names_it_and_nothing_of_its_batch_is_entered() {
    let rig = Rig::new(4, 0);
    rig.process.unmap(range(2, 1));
    let error = rig.mirror.range_fault(&RangeFault::read(range(0, 4)));
    assert_eq!(error, Err(FaultError::Hole { page: page(2) }));
    assert_eq!(rig.mirror.inspect(|table| table.len()), Ok(0));
    rig.finish();
}

#[test]
fn batches_before_the_one_that_failed_stay_entered() {
    let rig = Rig::new(600, 0);
    rig.process.unmap(range(550, 1));
    let error = rig.mirror.range_fault(&RangeFault::read(range(0, 600)));
    assert_eq!(error, Err(FaultError::Hole { page: page(550) }));
    assert_eq!(rig.mirror.inspect(|table| table.len()), Ok(512));
    rig.finish();
}

#[test]
fn a_page_that_may_not_be_written_is_denied_and_may_be_read() {
    let rig = Rig::new(2, 0);
    rig.process.protect(range(1, 1), Access::Read);
    let error = rig.mirror.range_fault(&RangeFault::write(range(0, 2)));
    let (wanted, allowed) = (Access::Write, Access::Read);
    assert_eq!(error, Err(FaultError::Denied { page: page(1), wanted, allowed }));
    rig.mirror.range_fault(&RangeFault::read(range(0, 2))).expect("both can be read");
    rig.finish();
}

#[test]
fn a_request_beyond_the_mirror_is_refused() {
    let rig = Rig::new(1, 0);
    let beyond = range((1 << 20) - 1, 2);
    let error = rig.mirror.range_fault(&RangeFault::read(beyond));
    let mirror = rig.mirror.range();
    assert_eq!(error, Err(FaultError::OutOfRange { request: beyond, mirror }));
    rig.finish();
}

/// Regression 14: the size of a mapping that reaches out of the request at both ends.
#[test]
fn the_order_of_a_huge_mapping_is_clipped_to_the_request() {
    let rig = Rig::new(0x200, 0);
    rig.process
        .map(range(0, 0x400), Mapping::anonymous(Access::Write).huge(true))
        .expect("memory is mapped");
    rig.fill(0x400, 0);
    let whole = rig.mirror.range_fault(&RangeFault::read(range(0, 0x400))).expect("all there");
    assert!(whole.entries.iter().all(|entry| entry.order == Order::HUGE), "the test means nothing");
    for (first, pages) in [(1, 0x3ff), (0x1ff, 2), (0x100, 0x100), (3, 1), (0x140, 0x180)] {
        let part = range(first, pages);
        let done = rig.mirror.range_fault(&RangeFault::read(part)).expect("all there");
        for (page, entry) in part.iter().zip(&done.entries) {
            assert!(part.covers(page.block(entry.order)), "{page}: {:?} of {part}", entry.order);
            // No smaller than it must be: the next size would reach out.
            let larger = Order::new(entry.order.get() + 1).expect("an order");
            assert!(
                entry.order == Order::HUGE || !part.covers(page.block(larger)),
                "{page}: {:?} is less than {part} allows",
                entry.order
            );
        }
    }
    rig.finish();
}

/// Regression 11.
#[test]
fn what_was_swapped_out_comes_back_with_its_contents() {
    let rig = Rig::new(2, 0);
    rig.fill(2, 40);
    assert_eq!(rig.process.reclaim(range(0, 2)), 2);
    let look = rig.mirror.range_fault(&RangeFault::snapshot(range(0, 2))).expect("a look");
    assert!(look.entries.iter().all(|entry| entry.residency == Residency::Empty), "{look:?}");
    assert_eq!(rig.device_load(word(1)), Ok(41));
    rig.finish();
}

/// Regression 16: another device's page comes home; it is no error.
#[test]
fn a_page_on_another_device_comes_home_for_this_one() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 9);
    let space = rig.process.address_space();
    assert_eq!(space.migrate(range(0, 1), &rig.pagemap).run().moved, 1);
    let other = Gpu::new(0);
    let second = space.mirror(&other, range(0, 1)).expect("the process lives");
    let done = second.range_fault(&RangeFault::read(range(0, 1))).expect("it comes home");
    assert!(matches!(done.entries[0].residency, Residency::System(_)), "{done:?}");
    assert_eq!(rig.process.load_u64(word(0)), Ok(9));
    drop(second);
    rig.finish();
}

#[test]
fn a_page_in_the_devices_own_memory_is_mapped_where_it_is() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 9);
    assert_eq!(rig.process.address_space().migrate(range(0, 1), &rig.pagemap).run().moved, 1);
    let done = rig.mirror.range_fault(&RangeFault::atomic(range(0, 1))).expect("it is its own");
    assert_eq!(done.faulted, 0);
    assert_eq!(done.entries[0].access, Access::Atomic);
    assert!(rig.on_device(0));
    rig.finish();
}

/// Regression 30.
#[test]
fn a_fault_on_a_dead_address_space_fails() {
    let rig = Rig::new(1, 0);
    let handle = (*rig.mirror).clone();
    rig.finish();
    let request = RangeFault::read(range(0, 1));
    assert_eq!(handle.range_fault(&request), Err(FaultError::Released));
    assert_eq!(handle.handle_fault(page(0), Access::Read).err(), Some(FaultError::Released));
    assert_eq!(handle.exclusive(range(0, 1)).err(), Some(FaultError::Released));
}

#[test]
fn a_deadline_ends_a_wait_for_a_page_in_transit() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 5);
    let migration = rig.process.address_space().migrate(range(0, 1), &rig.pagemap);
    std::thread::scope(|scope| {
        let late = scope.spawn(|| {
            let deadline = Instant::now() + Duration::from_millis(5);
            rig.mirror.range_fault(&RangeFault::read(range(0, 1)).deadline(deadline))
        });
        let error = late.join().expect("no panic");
        assert_eq!(error, Err(FaultError::TimedOut { page: page(0) }));
    });
    drop(migration);
    assert_eq!(rig.device_load(word(0)), Ok(5));
    rig.finish();
}

/// Regression 46: a fault from inside one's own migration is named, not hung.
#[test]
fn a_thread_that_would_wait_for_its_own_migration_is_told_so() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 5);
    let migration = rig.process.address_space().migrate(range(0, 1), &rig.pagemap);
    let error = rig.mirror.range_fault(&RangeFault::read(range(0, 1)));
    assert_eq!(error, Err(FaultError::SelfWait { page: page(0) }));
    drop(migration);
    rig.finish();
}

// Collisions, made on purpose by a backend around the simulated one.

/// What it says of its pages that is not so.
#[derive(Clone, Copy, PartialEq)]
enum Lie {
    Nothing,
    /// That they are never there.
    Empty,
    /// That they are not mapped, whenever it is in the middle of a change.
    HoleInTheMiddle,
    /// That all after the first are one huge page.
    Huge,
}

/// Makes an address space over the memory of `rig`'s process that announces a change, and makes none,
/// whenever it is looked at, `collisions` times; and that lies.
fn colliding(rig: &Rig, collisions: u32, lie: Lie, fault_takes: Duration) -> AddressSpace {
    let left = AtomicU32::new(collisions);
    let look = move |space: &AddressSpace, range: PageRange, entries: &mut [PageEntry]| {
        let left = left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
        if left.is_ok() {
            let event = Event::new(EventKind::Clear, range.va_range());
            drop(space.backend().notifiers().invalidate_range_start(event));
        }
        match lie {
            Lie::Empty => entries.iter_mut().for_each(|entry| entry.residency = Residency::Empty),
            Lie::HoleInTheMiddle if left.is_ok() => entries.fill(PageEntry::default()),
            Lie::Huge => entries.iter_mut().skip(1).for_each(|entry| entry.order = Order::HUGE),
            Lie::Nothing | Lie::HoleInTheMiddle => {}
        }
    };
    let fault = move |_: &AddressSpace, _: PageRange| {
        std::thread::sleep(fault_takes);
        Ok(())
    };
    Around::new(rig, look, fault).0
}

#[test]
fn e01_a_collision_begins_again_and_is_counted() {
    let rig = Rig::new(1, 0);
    rig.fill(1, 3);
    let space = colliding(&rig, 3, Lie::Nothing, Duration::ZERO);
    let second = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let done = second.range_fault(&RangeFault::read(range(0, 1))).expect("the fourth try");
    assert_eq!((done.collisions, done.faulted), (3, 0));
    assert_eq!(space.mm().statistics().collisions, 3);
    drop(second);
}

#[test]
fn x11_collisions_alone_use_up_the_budget() {
    let rig = Rig::new(1, 0);
    rig.fill(1, 3);
    let space = colliding(&rig, u32::MAX, Lie::Nothing, Duration::ZERO);
    let second = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let request = RangeFault::read(range(0, 1)).budget(Duration::from_millis(2));
    let error = second.range_fault(&request).expect_err("it always collides");
    assert!(
        matches!(error, FaultError::Collided { page: at, collisions } if at == page(0) && collisions > 1),
        "{error:?}"
    );
    drop(second);
}

#[test]
fn x11_a_fault_that_takes_long_costs_nothing_of_the_budget() {
    let rig = Rig::new(1, 0);
    let takes = Duration::from_millis(20);
    let space = colliding(&rig, 2, Lie::Nothing, takes);
    let second = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    // One collision before the fault, one after it; the fault takes longer than the budget.
    let request = RangeFault::read(range(0, 1)).budget(takes / 2);
    let done = second.range_fault(&request).expect("there is time for the collisions");
    assert_eq!((done.collisions, done.faulted), (1, 1));
    drop(second);
}

#[test]
fn x11_a_page_that_is_taken_away_again_and_again_is_a_collision() {
    let rig = Rig::new(1, 0);
    let space = colliding(&rig, 0, Lie::Empty, Duration::ZERO);
    let second = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let request = RangeFault::read(range(0, 1)).budget(Duration::from_millis(2));
    let error = second.range_fault(&request).expect_err("it is never there");
    assert!(matches!(error, FaultError::Collided { .. }), "{error:?}");
    drop(second);
}

/// The time of a fault that had to be repeated counts no more than that of the first.
#[test]
fn x11_a_fault_that_takes_long_again_costs_nothing_of_the_budget_either() {
    let rig = Rig::new(1, 0);
    let takes = Duration::from_millis(4);
    let space = colliding(&rig, 0, Lie::Empty, takes);
    let second = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let request = RangeFault::read(range(0, 1)).budget(takes / 4);
    let error = second.range_fault(&request).expect_err("it is never there");
    let FaultError::Collided { collisions, .. } = error else { panic!("{error:?}") };
    // One such fault would use up four budgets.
    assert!(collisions > 1, "{collisions}");
}

#[test]
fn x11_a_budget_without_end_is_one() {
    let rig = Rig::new(1, 0);
    let request = RangeFault::read(range(0, 1)).budget(Duration::MAX);
    rig.mirror.range_fault(&request).expect("it can be had");
    rig.finish();
}

#[test]
fn a_deadline_that_has_passed_ends_a_request_that_waits_for_nothing() {
    let rig = Rig::new(1, 0);
    let request = RangeFault::snapshot(range(0, 1)).deadline(Instant::now());
    let error = rig.mirror.range_fault(&request);
    assert_eq!(error, Err(FaultError::TimedOut { page: page(0) }));
    rig.finish();
}

/// A hole in the middle of one mapping's replacement by another is a collision.
#[test]
fn an_error_that_was_read_off_a_change_under_way_is_not_believed() {
    let rig = Rig::new(1, 0);
    rig.fill(1, 3);
    let space = colliding(&rig, 2, Lie::HoleInTheMiddle, Duration::ZERO);
    let second = space.mirror(&rig.gpu, range(0, 1)).expect("the process lives");
    let done = second.range_fault(&RangeFault::read(range(0, 1))).expect("it is mapped");
    assert_eq!(done.collisions, 2);
}

#[test]
fn a_block_is_only_as_large_as_its_pages_agree() {
    let rig = Rig::new(512, 0);
    rig.process.store_u64(word(3), 1).expect("memory is there");
    let space = colliding(&rig, 0, Lie::Huge, Duration::ZERO);
    let second = space.mirror(&rig.gpu, range(0, 512)).expect("the process lives");
    let done = second.range_fault(&RangeFault::snapshot(range(0, 512))).expect("a look");
    for (at, entry) in done.entries.iter().enumerate() {
        let block = range(0, 512).iter().nth(at).expect("in range").block(entry.order);
        let first = range(0, 512).index_of(block.first()).expect("within the request");
        let agree = |other: &PageEntry| other.access == entry.access;
        assert!(done.entries[first..][..block.len()].iter().all(agree), "{at}: {block}");
    }
}

#[test]
fn the_pages_around_a_fault_do_not_make_it_fail() {
    let rig = Rig::with(
        0x600,
        0,
        PagemapOptions::new().policies(Policies::new([Arc::new(Wide) as Arc<dyn Policy>])),
    );
    rig.process.unmap(range(0x10, 1));
    rig.process.protect(range(0x500, 1), Access::None);
    let done = rig.mirror.handle_fault(page(0x210), Access::Write).expect("it can be had");
    assert_eq!(done.entry.access, Access::Write);
    assert_eq!(done.range.pages(), 0x600);
    rig.finish();
}

/// Serves everything that is mapped with every fault.
#[derive(Debug)]
struct Wide;

impl Policy for Wide {
    fn name(&self) -> &'static str {
        "wide"
    }

    fn device_fault(&self, _: &DeviceFault<'_>, plan: &mut DevicePlan) {
        plan.range = range(0, 0x600);
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        // Less than the block, which is not to be had.
        plan.range = fault.page.into();
    }
}

/// X10: a policy that asks for a part of a large page does not make a CPU ask for ever.
#[test]
fn x10_a_large_page_comes_home_whatever_part_of_it_a_policy_wants() {
    let options =
        PagemapOptions::new().policies(Policies::new([Arc::new(Wide) as Arc<dyn Policy>]));
    let rig = Rig::with(1, 0x200, options);
    let whole = range(0, 0x200);
    rig.process.map(whole, Mapping::anonymous(Access::Write).huge(true)).expect("it is mapped");
    rig.fill(0x200, 7);
    let report = rig.process.address_space().migrate(whole, &rig.pagemap).run();
    assert_eq!(report.moved, 0x200);
    rig.machine.injector().fail_always("split");
    assert_eq!(rig.process.load_u64(word(9)), Ok(16));
    rig.finish();
}

#[test]
fn x11_a_change_that_does_not_end_is_a_collision() {
    let rig = Rig::new(1, 0);
    let event = Event::new(EventKind::Clear, range(0, 1).va_range());
    let space = rig.process.address_space();
    std::thread::scope(|scope| {
        let change = space.backend().notifiers().invalidate_range_start(event);
        let late = scope.spawn(|| {
            let request = RangeFault::read(range(0, 1)).budget(Duration::from_millis(2));
            rig.mirror.range_fault(&request)
        });
        let error = late.join().expect("no panic").expect_err("the change goes on");
        assert!(matches!(error, FaultError::Collided { .. }), "{error:?}");
        drop(change);
    });
    rig.finish();
}

#[test]
fn a_fault_under_ones_own_announcement_is_a_self_wait() {
    let rig = Rig::new(1, 0);
    let space = rig.process.address_space();
    let error = space.change(range(0, 1), EventKind::Clear, || {
        rig.mirror.range_fault(&RangeFault::read(range(0, 1)))
    });
    assert_eq!(error, Err(FaultError::SelfWait { page: page(0) }));
    rig.finish();
}

// Exclusive access.

#[test]
fn a_cpu_that_touches_a_page_ends_the_hold() {
    let rig = Rig::new(2, 0);
    rig.fill(2, 10);
    let hold = rig.mirror.exclusive(range(0, 2)).expect("both can be held");
    assert!(hold.is_held());
    assert_eq!(rig.device_add(word(1), 5), Ok(11));
    assert!(hold.is_held(), "the device's own use ended the hold");
    assert_eq!(rig.process.load_u64(word(1)), Ok(16));
    assert!(!hold.is_held());
    assert!(matches!(rig.residency(0), Residency::Exclusive { .. }), "one page is not the other");
    assert!(rig.mirror.inspect(|table| table.entry(page(1))).expect("it lives").is_none());
    drop(hold);
    assert!(matches!(rig.residency(0), Residency::System(_)));
    rig.finish();
}

#[test]
fn another_device_that_touches_a_page_ends_the_hold() {
    let rig = Rig::new(1, 0);
    rig.fill(1, 10);
    let hold = rig.mirror.exclusive(range(0, 1)).expect("it can be held");
    let other = Gpu::new(0);
    let second = rig.process.address_space().mirror(&other, range(0, 1)).expect("it lives");
    second.range_fault(&RangeFault::write(range(0, 1))).expect("it is taken over");
    assert!(!hold.is_held());
    drop(hold);
    drop(second);
    rig.finish();
}

#[test]
fn what_cannot_be_held_is_an_error_and_nothing_stays_held() {
    let rig = Rig::new(2, 0);
    rig.fill(2, 1);
    rig.process.map(range(1, 1), Mapping::shared(Access::Write)).expect("memory is mapped");
    rig.process.store_u64(word(1), 2).expect("memory is there");
    let error = rig.mirror.exclusive(range(0, 2)).expect_err("shared memory cannot be held");
    assert!(matches!(error, FaultError::NotExclusive { page: at, .. } if at == page(1)), "{error}");
    assert!(matches!(rig.residency(0), Residency::System(_)));
    rig.finish();
}

#[test]
fn atomics_of_the_device_and_of_the_cpus_lose_nothing() {
    const ROUNDS: u64 = 500;
    let rig = Rig::with(1, 1, PagemapOptions::new().policies(Policies::none()));
    rig.fill(1, 0);
    let keep = mirror(&rig.process, &rig.gpu, &rig.pagemap);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                rig.process.fetch_add_u64(word(0), 1).expect("memory is there");
            }
        });
        for _ in 0..ROUNDS {
            rig.device_add(word(0), 1).expect("memory is there");
        }
    });
    assert_eq!(rig.process.load_u64(word(0)), Ok(2 * ROUNDS));
    drop(keep);
    rig.finish();
}
