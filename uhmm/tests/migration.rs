//! Migration: there, home, and every way in which it does not come about.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};

use common::{Gpu, Rig, in_place, is_in_place, mirror, page, range, word};
use uhmm::backend::Select;
use uhmm::sim::Mapping;
use uhmm::{
    Access, Clock, DevicePagemap, MigrateReport, PagemapOptions, Residency, StayReason,
    policy::Policies,
};

/// Checks through the CPU that page `i` holds `first + i`, for every page.
fn check(rig: &Rig, pages: u64, first: u64) {
    for index in 0..pages {
        assert_eq!(rig.process.load_u64(word(index)), Ok(first + index), "page {index}");
    }
}

fn migrate(rig: &Rig, first: u64, pages: u64) -> MigrateReport {
    let report = rig.process.address_space().migrate(range(first, pages), &rig.pagemap).run();
    rig.machine.check().expect("the machine is whole");
    report
}

#[test]
fn pages_go_to_the_device_and_come_home_when_touched() {
    let rig = Rig::new(4, 4);
    rig.fill(4, 100);
    let report = migrate(&rig, 0, 4);
    assert_eq!((report.moved, report.without_copy, report.stayed.len()), (4, 0, 0));
    assert!((0..4).all(|index| rig.on_device(index)));
    assert_eq!(rig.device_load(word(2)), Ok(102));
    assert_eq!(rig.device_store(word(3), 7), Ok(103));
    assert_eq!(rig.process.load_u64(word(3)), Ok(7));
    assert!(!rig.on_device(3) && rig.on_device(2));
    assert_eq!(rig.pagemap.used(), 3);
    check(&rig, 3, 100);
    assert_eq!(rig.pagemap.used(), 0);
    assert_eq!(rig.pagemap.statistics().home_by_cpu_fault, 4);
    rig.finish();
}

#[test]
fn what_is_on_its_way_can_be_looked_at() {
    let rig = Rig::new(3, 3);
    rig.process.store_u64(word(0), 5).expect("memory is there");
    rig.process.store_u64(word(2), 8).expect("memory is there");
    let space = rig.process.address_space();
    let migration = space.migrate(range(0, 3), &rig.pagemap);
    let mut seen = Vec::new();
    migration.for_each_page(|page, bytes| {
        let first = u64::from_ne_bytes(bytes[..8].try_into().expect("eight bytes"));
        seen.push((page, first, bytes[8..].iter().all(|&byte| byte == 0)));
    });
    assert_eq!(seen, [(page(0), 5, true), (page(1), 0, true), (page(2), 8, true)]);
    assert_eq!(migration.run().moved, 3);
    // What is there already is not on its way.
    space.migrate(range(0, 3), &rig.pagemap).for_each_page(|page, _| panic!("{page}"));
    assert_eq!(rig.process.load_u64(word(2)), Ok(8));
    rig.finish();
}

#[test]
fn pages_that_were_never_touched_and_zero_pages_move_without_a_copy() {
    let rig = Rig::new(3, 3);
    // A read brings the shared zero page.
    assert_eq!(rig.process.load_u64(word(1)), Ok(0));
    rig.process.store_u64(word(2), 8).expect("memory is there");
    let report = migrate(&rig, 0, 3);
    assert_eq!((report.moved, report.without_copy), (3, 2));
    assert_eq!((rig.gpu.injector.asked("clear"), rig.gpu.injector.asked("copy")), (2, 1));
    assert_eq!(rig.device_load(word(0)), Ok(0));
    assert_eq!(rig.process.load_u64(word(1)), Ok(0));
    assert_eq!(rig.process.load_u64(word(2)), Ok(8));
    rig.finish();
}

/// Regression 19: the count is that of the pages that moved.
#[test]
fn each_page_that_stays_has_its_reason_and_is_not_counted() {
    let rig = Rig::new(7, 8);
    rig.fill(7, 1);
    let process = &rig.process;
    process.unmap(range(1, 1));
    process.map(range(2, 1), Mapping::shared(Access::Write)).expect("memory is mapped");
    process.store_u64(word(2), 3).expect("memory is there");
    let pin = process.pin(range(3, 1)).expect("it can be pinned");
    assert_eq!(process.reclaim(range(4, 1)), 1);
    let hold = rig.mirror.exclusive(range(5, 1)).expect("it can be held");
    assert_eq!(migrate(&rig, 6, 1).moved, 1);
    let report = migrate(&rig, 0, 7);
    assert_eq!(report.moved, 1);
    let reasons: Vec<_> = (0..7).map(|index| report.reason(page(index))).collect();
    let expected = [
        None,
        Some(StayReason::Hole),
        Some(StayReason::FileBacked),
        Some(StayReason::Pinned),
        Some(StayReason::SwappedOut),
        Some(StayReason::Exclusive),
        Some(StayReason::AlreadyThere),
    ];
    assert_eq!(reasons, expected);
    drop((pin, hold));
    rig.finish();
}

#[test]
fn dropped_at_any_step_everything_is_back_where_it_was() {
    let rig = Rig::new(3, 3);
    rig.fill(2, 20);
    let space = rig.process.address_space();
    let before: Vec<Residency> = (0..3).map(|index| rig.residency(index)).collect();
    let isolated = space.migrate(range(0, 3), &rig.pagemap);
    assert!((0..3).all(|index| rig.residency(index) == Residency::InTransit));
    drop(isolated);
    let copied = space.migrate(range(0, 3), &rig.pagemap).copy();
    assert_eq!(rig.pagemap.used(), 3);
    drop(copied);
    let after: Vec<Residency> = (0..3).map(|index| rig.residency(index)).collect();
    assert_eq!(after, before);
    assert_eq!(rig.pagemap.used(), 0);
    check(&rig, 2, 20);
    rig.finish();
}

#[test]
fn a_panic_in_the_middle_puts_everything_back() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 5);
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let _copied = rig.process.address_space().migrate(range(0, 1), &rig.pagemap).copy();
        panic!("on purpose");
    }));
    assert!(panic.is_err());
    check(&rig, 1, 5);
    assert_eq!(rig.pagemap.used(), 0);
    rig.finish();
}

/// Regressions 52, 55: a copy that fails leaves its page where it was, and only its page.
#[test]
fn a_copy_that_fails_on_the_way_there_leaves_its_page() {
    let rig = Rig::new(3, 3);
    rig.fill(3, 30);
    rig.gpu.injector.fail("copy", 1);
    let report = migrate(&rig, 0, 3);
    assert_eq!(report.moved, 2);
    assert_eq!(report.reason(page(1)), Some(StayReason::CopyFailed));
    assert_eq!(rig.pagemap.used(), 2);
    check(&rig, 3, 30);
    rig.finish();
}

#[test]
fn a_copy_that_fails_on_the_way_home_loses_nothing_and_can_be_tried_again() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 30);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.gpu.injector.fail("copy", 0);
    let error = rig.process.load_u64(word(0)).expect_err("the copy fails");
    assert!(format!("{error}").contains("could not copy"), "{error}");
    assert!(rig.on_device(0));
    check(&rig, 1, 30);
    assert_eq!(rig.pagemap.statistics().failed_copies, 1);
    rig.finish();
}

#[test]
fn without_system_memory_a_page_stays_on_its_device() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 30);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.machine.injector().fail("frame", 0);
    assert!(rig.process.load_u64(word(0)).is_err());
    assert!(rig.on_device(0));
    check(&rig, 1, 30);
    rig.finish();
}

/// Regression 35: an allocation that fails in the middle.
#[test]
fn an_allocation_that_fails_leaves_its_page() {
    let rig = Rig::new(3, 3);
    rig.fill(3, 30);
    rig.gpu.injector.fail("allocate", 2);
    let report = migrate(&rig, 0, 3);
    assert_eq!(report.moved, 2);
    assert_eq!(report.reason(page(2)), Some(StayReason::OutOfDeviceMemory));
    check(&rig, 3, 30);
    rig.finish();
}

// Large pages.

fn huge_rig(device_pages: usize) -> Rig {
    let rig = Rig::new(1, device_pages);
    let whole = range(0, 0x200);
    rig.process.map(whole, Mapping::anonymous(Access::Write).huge(true)).expect("it is mapped");
    rig
}

#[test]
fn a_large_page_moves_whole_there_and_home() {
    let rig = huge_rig(0x200);
    rig.fill(0x200, 1000);
    assert_eq!(migrate(&rig, 0, 0x200).moved, 0x200);
    assert_eq!(rig.gpu.injector.asked("allocate"), 1);
    assert_eq!(rig.device_load(word(0x1ff)), Ok(1000 + 0x1ff));
    assert_eq!(rig.process.load_u64(word(5)), Ok(1005));
    // The whole page came, by one copy each way.
    assert_eq!(rig.pagemap.used(), 0);
    assert_eq!(rig.gpu.injector.asked("copy"), 2);
    check(&rig, 0x200, 1000);
    rig.finish();
}

#[test]
fn a_large_page_is_split_where_the_device_has_no_room_for_it_whole() {
    let rig = huge_rig(0x180);
    rig.fill(0x200, 1000);
    let report = migrate(&rig, 0, 0x200);
    assert_eq!(report.moved, 0x180);
    assert_eq!(rig.pagemap.statistics().splits, 1);
    assert!(report.stayed.iter().all(|stayed| stayed.reason == StayReason::OutOfDeviceMemory));
    check(&rig, 0x200, 1000);
    rig.finish();
}

#[test]
fn a_large_page_that_was_never_touched_moves_whole_without_a_copy() {
    let rig = huge_rig(0x200);
    let report = migrate(&rig, 0, 0x200);
    assert_eq!((report.moved, report.without_copy), (0x200, 0x200));
    assert_eq!((rig.gpu.injector.asked("clear"), rig.gpu.injector.asked("copy")), (1, 0));
    assert_eq!(rig.process.load_u64(word(0x100)), Ok(0));
    rig.finish();
}

/// Regressions 43, 56: each page of device memory is counted and freed once, whatever is split.
#[test]
fn a_large_page_on_the_device_that_is_unmapped_in_part_frees_that_part() {
    let rig = huge_rig(0x200);
    rig.fill(0x200, 1000);
    assert_eq!(migrate(&rig, 0, 0x200).moved, 0x200);
    rig.process.unmap(range(0x80, 0x40));
    assert_eq!(rig.pagemap.used(), 0x200 - 0x40);
    // What is free can be used again.
    rig.process.map(range(0x80, 0x40), Mapping::anonymous(Access::Write)).expect("it is free");
    assert_eq!(migrate(&rig, 0x80, 0x40).moved, 0x40);
    assert_eq!(rig.pagemap.used(), 0x200);
    for index in (0..0x80).chain(0xc0..0x200) {
        assert_eq!(rig.process.load_u64(word(index)), Ok(1000 + index));
    }
    rig.finish();
}

/// Regressions 43, 56: what was split keeps nothing alive.
#[test]
fn a_device_is_gone_when_its_last_page_is() {
    let rig = huge_rig(0x180);
    let (gpu, pagemap) = (Arc::downgrade(&rig.gpu), Arc::downgrade(&rig.pagemap));
    rig.fill(0x200, 0);
    assert_eq!(migrate(&rig, 0, 0x200).moved, 0x180);
    rig.process.unmap(range(0x10, 0x10));
    rig.finish();
    assert_eq!((gpu.strong_count(), pagemap.strong_count()), (0, 0));
}

// Full devices.

#[test]
fn a_full_device_evicts_the_block_that_came_first() {
    let rig = Rig::new(3, 2);
    rig.fill(3, 50);
    for index in 0..3 {
        // Policies go by a clock of their own; without any the first to come is the first to go.
        rig.pagemap.clock().sleep(std::time::Duration::from_millis(1));
        assert_eq!(migrate(&rig, index, 1).moved, 1);
    }
    let on_device: Vec<bool> = (0..3).map(|index| rig.on_device(index)).collect();
    assert_eq!(on_device, [false, true, true]);
    assert_eq!(rig.pagemap.statistics().home_by_eviction, 1);
    check(&rig, 3, 50);
    rig.finish();
}

#[test]
fn a_range_larger_than_the_device_moves_as_far_as_there_is_room() {
    let rig = Rig::new(5, 2);
    rig.fill(5, 50);
    let report = migrate(&rig, 0, 5);
    assert_eq!(report.moved, 2);
    assert_eq!(report.stayed.len(), 3);
    check(&rig, 5, 50);
    rig.finish();
}

/// What is free in pieces is not helped by evicting more.
#[test]
fn a_large_page_evicts_nothing_where_there_is_room_for_it_in_pieces() {
    let rig = huge_rig(0x400);
    let small = Mapping::anonymous(Access::Write);
    rig.process.map(range(0x200, 0x400), small).expect("there is room");
    // Every second page of the device stays in use, none of whose neighbours is.
    assert_eq!(migrate(&rig, 0x200, 0x400).moved, 0x400);
    for index in (0..0x400).step_by(2) {
        rig.process.unmap(range(0x200 + index, 1));
    }
    assert_eq!(rig.pagemap.used(), 0x200);
    rig.fill(0x200, 9);
    assert_eq!(migrate(&rig, 0, 0x200).moved, 0x200);
    let statistics = rig.pagemap.statistics();
    assert_eq!((statistics.home_by_eviction, statistics.splits), (0, 1));
    check(&rig, 0x200, 9);
    rig.finish();
}

#[test]
fn a_limit_below_the_capacity_is_kept() {
    let options = PagemapOptions::new().limit(1).policies(Policies::none());
    let rig = Rig::with(3, 3, options);
    rig.fill(3, 50);
    assert_eq!(migrate(&rig, 0, 3).moved, 1);
    assert_eq!(rig.device_load(word(2)), Ok(52));
    assert!(rig.on_device(2) && !rig.on_device(0));
    assert_eq!((rig.pagemap.used(), rig.pagemap.statistics().peak), (1, 1));
    check(&rig, 3, 50);
    rig.finish();
}

#[test]
fn an_eviction_whose_copy_fails_loses_nothing() {
    let rig = Rig::new(2, 1);
    rig.fill(2, 50);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.gpu.injector.fail_always("copy");
    let report = migrate(&rig, 1, 1);
    assert_eq!(report.reason(page(1)), Some(StayReason::OutOfDeviceMemory));
    rig.gpu.injector.clear();
    check(&rig, 2, 50);
    rig.finish();
}

/// X09: eviction begins at the device's blocks, and finds pages wherever they have been moved to.
#[test]
fn x09_eviction_finds_a_page_that_was_moved_to_another_address() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 60);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.process.remap(range(0, 1), page(9)).expect("there is room");
    assert!(rig.on_device(9));
    assert_eq!(rig.pagemap.evict(1), 1);
    assert!(matches!(rig.residency(9), Residency::System(_)));
    assert_eq!(rig.process.load_u64(word(9)), Ok(60));
    rig.finish();
}

#[test]
fn a_page_comes_home_although_its_mapping_allows_nothing_any_more() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 60);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.process.protect(range(0, 1), Access::None);
    assert_eq!(rig.process.address_space().migrate_home(range(0, 1)).moved, 1);
    assert_eq!(migrate(&rig, 0, 1).reason(page(0)), Some(StayReason::Denied));
    rig.process.protect(range(0, 1), Access::Read);
    check(&rig, 1, 60);
    rig.finish();
}

#[test]
fn eviction_of_a_page_that_two_processes_share_brings_it_home_for_both() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 60);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    let child = rig.process.fork().expect("it can fork");
    assert_eq!(rig.pagemap.used(), 1);
    assert_eq!(rig.pagemap.evict(1), 1);
    child.store_u64(word(0), 61).expect("memory is there");
    assert_eq!(rig.process.load_u64(word(0)), Ok(60));
    assert_eq!(child.load_u64(word(0)), Ok(61));
    child.exit();
    rig.finish();
}

/// X12, regressions 29 and 47: nothing on a device refers to a mirror.
#[test]
fn x12_pages_come_home_after_their_mirror_has_been_closed() {
    let mut rig = Rig::new(2, 2);
    rig.fill(2, 70);
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    let second = mirror(&rig.process, &rig.gpu, &rig.pagemap);
    let first = std::mem::replace(&mut rig.mirror, second);
    assert!(first.unregister().is_some());
    assert_eq!(rig.process.load_u64(word(0)), Ok(70));
    assert_eq!(rig.pagemap.evict_all(), Ok(()));
    check(&rig, 2, 70);
    // Closed: nothing comes in any more, and nothing is lost for it.
    let report = migrate(&rig, 0, 2);
    assert_eq!(report.moved, 0);
    assert_eq!(report.reason(page(0)), Some(StayReason::OutOfDeviceMemory));
    rig.pagemap.reopen();
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    rig.finish();
}

#[test]
fn evicting_all_says_what_it_could_not_move() {
    let rig = Rig::new(2, 2);
    rig.fill(2, 70);
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    rig.gpu.injector.fail("copy", 1);
    assert_eq!(rig.pagemap.evict_all().map_err(|still| still.pages), Err(1));
    assert_eq!(rig.pagemap.evict_all(), Ok(()));
    check(&rig, 2, 70);
    rig.finish();
}

// Several devices, several processes, several threads.

#[test]
fn a_page_moves_from_one_device_to_another_by_way_of_system_memory() {
    let rig = Rig::new(2, 2);
    rig.fill(2, 80);
    let other = Gpu::on(&rig.machine, 2);
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    let pagemap = DevicePagemap::register_with(other.clone(), options);
    let second = mirror(&rig.process, &other, &pagemap);
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    let report = rig.process.address_space().migrate(range(0, 2), &pagemap).run();
    assert_eq!(report.moved, 2);
    assert_eq!((rig.pagemap.used(), pagemap.used()), (0, 2));
    assert_eq!(rig.pagemap.statistics().home_by_peer_fault, 2);
    assert_eq!(common::access(&second, word(1), Access::Write, |_| 90), Ok(81));
    // The first device takes it back by touching it.
    assert_eq!(rig.device_load(word(1)), Ok(90));
    assert!(rig.on_device(1) && !rig.on_device(0));
    drop(second);
    assert_eq!(rig.process.load_u64(word(0)), Ok(80));
    rig.finish();
    assert_eq!(pagemap.used(), 0);
}

/// What failed on the first half of its way is not called elsewhere.
#[test]
fn a_page_that_another_device_could_not_copy_home_says_so() {
    let rig = Rig::new(2, 2);
    rig.fill(2, 80);
    let other = Gpu::on(&rig.machine, 2);
    let pagemap = DevicePagemap::register_with(
        other.clone(),
        PagemapOptions::new().policies(Policies::none()).clock(Clock::manual()),
    );
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    rig.gpu.injector.fail("copy", 1);
    let report = rig.process.address_space().migrate(range(0, 2), &pagemap).run();
    assert_eq!(report.moved, 1);
    assert_eq!(report.reason(page(1)), Some(StayReason::CopyFailed));
    assert_eq!(report.stayed.len(), 1, "{report:?}");
    check(&rig, 2, 80);
    rig.finish();
}

#[test]
fn what_happens_to_pages_in_transit_is_found_out_by_the_commit() {
    let rig = Rig::new(4, 4);
    rig.fill(4, 90);
    let migration = rig.process.address_space().migrate(range(0, 4), &rig.pagemap).copy();
    rig.process.unmap(range(0, 1));
    rig.process.remap(range(1, 1), page(9)).expect("there is room");
    rig.process.discard(range(2, 1));
    let child = rig.process.fork().expect("it can fork");
    let report = migration.commit();
    assert_eq!(report.moved, 2, "{report:?}");
    assert_eq!(report.reason(page(0)), Some(StayReason::Gone));
    assert_eq!(report.reason(page(2)), Some(StayReason::Gone));
    assert_eq!(rig.pagemap.used(), 2);
    rig.machine.check().expect("the machine is whole");
    for process in [&rig.process, &child] {
        assert!(process.load_u64(word(0)).is_err());
        assert_eq!(process.load_u64(word(9)), Ok(91));
        assert_eq!(process.load_u64(word(2)), Ok(0));
        assert_eq!(process.load_u64(word(3)), Ok(93));
    }
    child.exit();
    rig.finish();
}

/// X10, regressions 10 and 12: many threads touch one page; one brings it.
#[test]
fn x10_of_many_threads_that_touch_a_page_one_brings_it() {
    const THREADS: usize = 8;
    let rig = Rig::new(1, 1);
    rig.fill(1, 3);
    for _ in 0..50 {
        assert_eq!(migrate(&rig, 0, 1).moved, 1);
        let copies = rig.gpu.injector.asked("copy");
        let start = Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    start.wait();
                    assert_eq!(rig.process.load_u64(word(0)), Ok(3));
                });
            }
        });
        assert_eq!(rig.gpu.injector.asked("copy"), copies + 1);
    }
    rig.finish();
}

/// X10: who finds the page in transit sleeps until it has arrived, wherever it arrives.
#[test]
fn x10_a_touch_of_a_page_in_transit_waits_for_its_arrival() {
    let rig = Rig::new(1, 1);
    rig.fill(1, 3);
    let migration = rig.process.address_space().migrate(range(0, 1), &rig.pagemap).copy();
    std::thread::scope(|scope| {
        let cpu = scope.spawn(|| rig.process.load_u64(word(0)));
        let device = scope.spawn(|| rig.device_load(word(0)));
        assert_eq!(migration.commit().moved, 1);
        assert_eq!(cpu.join().expect("no panic"), Ok(3));
        assert_eq!(device.join().expect("no panic"), Ok(3));
    });
    rig.finish();
}

/// Regression 28: a CPU touches a page on the device while it is unmapped, and its memory freed.
#[test]
fn a_touch_of_a_page_that_is_being_unmapped_finds_the_page_or_nothing() {
    let rig = Rig::new(1, 1);
    let (mut found, mut missed) = (0, 0);
    // Until both have happened, which one does first is up to the machine.
    while found < 20 || missed < 20 {
        rig.process.map(range(0, 1), Mapping::anonymous(Access::Write)).expect("there is room");
        rig.process.store_u64(word(0), 3).expect("memory is there");
        assert_eq!(migrate(&rig, 0, 1).moved, 1);
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            let touch = scope.spawn(|| {
                start.wait();
                rig.process.load_u64(word(0))
            });
            start.wait();
            // Now before the touch, now after it.
            for _ in 0..(found * 97) % 2000 {
                std::hint::spin_loop();
            }
            rig.process.unmap(range(0, 1));
            match touch.join().expect("no panic") {
                Ok(value) => {
                    assert_eq!(value, 3);
                    found += 1;
                }
                Err(_) => missed += 1,
            }
        });
        assert_eq!(rig.pagemap.used(), 0);
        if found + missed > 100_000 {
            break;
        }
    }
    rig.finish();
}

/// Regressions 31, 32, 36, 58: whichever step fails on a range of all kinds of pages, nothing is
/// lost, and nothing is left behind.
#[test]
fn a_mixed_range_survives_a_failure_at_any_step() {
    let everything = |fail: Option<u64>| -> u64 {
        let rig = Rig::new(8, 4);
        rig.fill(6, 40);
        // Two on the device, two in system memory, one swapped out, one read only, two untouched.
        assert_eq!(migrate(&rig, 0, 2).moved, 2);
        rig.process.reclaim(range(4, 1));
        rig.process.protect(range(5, 1), Access::Read);
        let before = rig.gpu.injector.asked_in_all();
        if let Some(step) = fail {
            rig.gpu.injector.fail_any(step);
        }
        let other = Gpu::on(&rig.machine, 8);
        let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
        let pagemap = DevicePagemap::register_with(other.clone(), options);
        let space = rig.process.address_space();
        let report = space.migrate(range(0, 8), &pagemap).run();
        let stayed: u64 = report.stayed.iter().map(|stayed| stayed.pages.pages()).sum();
        assert_eq!(report.moved + stayed, 8, "{report:?}");
        space.migrate(range(0, 8), &rig.pagemap).run();
        space.migrate_home(range(0, 8));
        let steps = rig.gpu.injector.asked_in_all() - before;
        rig.gpu.injector.clear();
        check(&rig, 6, 40);
        assert_eq!(rig.process.load_u64(word(7)), Ok(0));
        rig.finish();
        assert_eq!(pagemap.used(), 0);
        steps
    };
    let steps = everything(None);
    // Without copies there are fewer.
    let least = if is_in_place() { 4 } else { 11 };
    assert!(steps >= least, "the scenario has become trivial: {steps} steps");
    for step in 0..steps {
        everything(Some(step));
    }
}

/// Regression 39: a range much larger than what is mapped of it concerns what is mapped, and nobody
/// else's pages.
#[test]
fn a_range_larger_than_the_mapped_part_moves_that_part() {
    let rig = Rig::new(2, 8);
    rig.fill(2, 5);
    rig.process.map(range(100, 1), Mapping::anonymous(Access::Write)).expect("there is room");
    rig.process.store_u64(word(100), 9).expect("memory is there");
    let stranger = rig.machine.spawn();
    stranger.map(range(0, 2), Mapping::anonymous(Access::Write)).expect("there is room");
    stranger.store_u64(word(0), 77).expect("memory is there");
    assert_eq!(stranger.address_space().migrate(range(0, 1), &rig.pagemap).run().moved, 1);
    let report = migrate(&rig, 0, 1 << 16);
    assert_eq!(report.moved, 3);
    assert_eq!(report.reason(page(50)), Some(StayReason::Hole));
    assert_eq!(rig.process.address_space().migrate_home(range(0, 1 << 16)).moved, 3);
    // The other process's page, at the same address, is where it was.
    assert_eq!(rig.pagemap.used(), 1);
    assert_eq!(stranger.load_u64(word(0)), Ok(77));
    check(&rig, 2, 5);
    stranger.exit();
    rig.finish();
}

/// Regression 62: eviction ends although there is nothing that it could take.
#[test]
fn eviction_ends_although_everything_is_in_transit() {
    let rig = Rig::new(3, 2);
    rig.fill(3, 5);
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    let backend = rig.process.address_space().backend();
    let held = backend.isolate(range(0, 2), Select::Device(rig.pagemap.owner()));
    assert_eq!(held.pages().len(), 2);
    assert_eq!(rig.pagemap.evict(2), 0);
    assert_eq!(rig.pagemap.evict_all().map_err(|still| still.pages), Err(2));
    rig.pagemap.reopen();
    assert_eq!(migrate(&rig, 2, 1).reason(page(2)), Some(StayReason::OutOfDeviceMemory));
    drop(held);
    assert!(rig.on_device(0) && rig.on_device(1));
    check(&rig, 3, 5);
    rig.finish();
}

/// Regressions 41, 62: two full devices that take each other's pages, from two threads.
#[test]
fn two_full_devices_exchange_their_pages() {
    let rig = Rig::new(4, 2);
    rig.fill(4, 5);
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    let pagemap = DevicePagemap::register_with(Gpu::on(&rig.machine, 2), options);
    let space = rig.process.address_space();
    assert_eq!(migrate(&rig, 0, 2).moved, 2);
    assert_eq!(space.migrate(range(2, 2), &pagemap).run().moved, 2);
    std::thread::scope(|scope| {
        for to in [&rig.pagemap, &pagemap] {
            scope.spawn(move || {
                for _ in 0..200 {
                    space.migrate(range(0, 4), to).run();
                }
            });
        }
    });
    rig.machine.check().expect("the machine is whole");
    check(&rig, 4, 5);
    rig.finish();
    assert_eq!(pagemap.used(), 0);
}

// Devices whose memory is the machine's.

/// What is true of all devices is true of these.
#[test]
fn what_holds_of_copies_holds_where_nothing_is_copied() {
    let tests: &[fn()] = &[
        each_page_that_stays_has_its_reason_and_is_not_counted,
        dropped_at_any_step_everything_is_back_where_it_was,
        a_panic_in_the_middle_puts_everything_back,
        a_large_page_is_split_where_the_device_has_no_room_for_it_whole,
        a_large_page_on_the_device_that_is_unmapped_in_part_frees_that_part,
        a_device_is_gone_when_its_last_page_is,
        a_full_device_evicts_the_block_that_came_first,
        a_range_larger_than_the_device_moves_as_far_as_there_is_room,
        a_limit_below_the_capacity_is_kept,
        x09_eviction_finds_a_page_that_was_moved_to_another_address,
        a_page_comes_home_although_its_mapping_allows_nothing_any_more,
        eviction_of_a_page_that_two_processes_share_brings_it_home_for_both,
        x12_pages_come_home_after_their_mirror_has_been_closed,
        a_page_moves_from_one_device_to_another_by_way_of_system_memory,
        what_happens_to_pages_in_transit_is_found_out_by_the_commit,
        x10_a_touch_of_a_page_in_transit_waits_for_its_arrival,
        a_touch_of_a_page_that_is_being_unmapped_finds_the_page_or_nothing,
        a_mixed_range_survives_a_failure_at_any_step,
        a_range_larger_than_the_mapped_part_moves_that_part,
        eviction_ends_although_everything_is_in_transit,
        two_full_devices_exchange_their_pages,
    ];
    tests.iter().for_each(in_place);
}

fn in_place_rig(pages: u64, device_pages: usize) -> Rig {
    let mut rig = None;
    in_place(|| rig = Some(Rig::new(pages, device_pages)));
    rig.expect("made just now")
}

#[test]
fn memory_that_is_the_machines_changes_hands_and_is_not_copied() {
    let rig = in_place_rig(3, 3);
    rig.fill(2, 100);
    assert_eq!(rig.machine.frames(), 2);
    let report = migrate(&rig, 0, 3);
    assert_eq!((report.moved, report.without_copy, report.stayed.len()), (3, 3, 0));
    // Page 2 was never touched: it has got memory, which was cleared.
    assert_eq!((rig.machine.frames(), rig.pagemap.used()), (3, 3));
    assert_eq!((rig.device_load(word(0)), rig.device_load(word(2))), (Ok(100), Ok(0)));
    assert_eq!(rig.device_store(word(2), 102), Ok(0));
    assert_eq!(rig.device_store(word(1), 7), Ok(101));
    assert_eq!(rig.process.load_u64(word(1)), Ok(7));
    let report = rig.process.address_space().migrate_home(range(0, 3));
    assert_eq!((report.moved, report.without_copy), (2, 2));
    assert_eq!((rig.machine.frames(), rig.pagemap.used()), (3, 0));
    assert_eq!(rig.process.load_u64(word(0)), Ok(100));
    assert_eq!(rig.process.load_u64(word(2)), Ok(102));
    let statistics = rig.pagemap.statistics();
    assert_eq!((statistics.in_by_adoption, statistics.in_without_copy), (2, 1));
    assert_eq!(statistics.home_in_place, 3);
    assert_eq!((rig.gpu.injector.asked("copy"), rig.gpu.injector.asked("clear")), (0, 1));
    rig.finish();
}

/// A page that comes home needs no memory there, so it cannot fail to find any.
#[test]
fn a_page_comes_home_in_place_without_memory_to_come_home_to() {
    let rig = in_place_rig(1, 1);
    rig.fill(1, 30);
    assert_eq!(migrate(&rig, 0, 1).moved, 1);
    rig.machine.injector().fail_always("frame");
    check(&rig, 1, 30);
    rig.finish();
}

/// An adoption ends before the isolation does, so the frame can be adopted anew at once.
#[test]
fn an_adoption_that_is_given_up_leaves_no_trace() {
    let rig = in_place_rig(1, 1);
    rig.fill(1, 30);
    let before = rig.residency(0);
    for _ in 0..3 {
        drop(rig.process.address_space().migrate(range(0, 1), &rig.pagemap).copy());
        assert_eq!((rig.residency(0), rig.pagemap.used()), (before, 0));
        rig.machine.check().expect("the machine is whole");
    }
    assert_eq!(migrate(&rig, 0, 1).without_copy, 1);
    check(&rig, 1, 30);
    // Under a number of its own, so that who still uses the old one is found out.
    assert_ne!(rig.residency(0), before);
    rig.finish();
}

#[test]
fn what_cannot_be_adopted_is_copied_and_comes_home_in_place() {
    let rig = in_place_rig(2, 2);
    rig.fill(2, 30);
    rig.gpu.injector.fail("adopt", 0);
    let report = migrate(&rig, 0, 2);
    assert_eq!((report.moved, report.without_copy), (2, 1));
    assert_eq!((rig.machine.frames(), rig.pagemap.used()), (2, 2));
    check(&rig, 2, 30);
    assert_eq!(rig.pagemap.statistics().home_in_place, 2);
    rig.finish();
}

#[test]
fn a_large_page_changes_hands_whole_and_is_freed_in_parts() {
    let rig = in_place_rig(1, 0x200);
    let whole = range(0, 0x200);
    rig.process.map(whole, Mapping::anonymous(Access::Write).huge(true)).expect("it is mapped");
    rig.fill(0x200, 1000);
    let migration = rig.process.address_space().migrate(whole, &rig.pagemap).copy();
    rig.process.unmap(range(0x80, 0x40));
    let report = migration.commit();
    assert_eq!((report.moved, report.without_copy), (0x200, 0x200));
    assert_eq!(rig.gpu.injector.asked("adopt"), 1);
    assert_eq!((rig.machine.frames(), rig.pagemap.used()), (0x1c0, 0x1c0));
    rig.machine.check().expect("the machine is whole");
    for index in (0..0x80).chain(0xc0..0x200) {
        assert_eq!(rig.process.load_u64(word(index)), Ok(1000 + index));
    }
    rig.finish();
}

/// The same numbers mean other memory there.
#[test]
fn memory_of_one_machine_adopts_nothing_of_another() {
    let (rig, other) = (in_place_rig(2, 4), Rig::new(2, 0));
    rig.fill(2, 10);
    other.fill(2, 20);
    assert_eq!(migrate(&rig, 0, 2).without_copy, 2);
    let report = other.process.address_space().migrate(range(0, 2), &rig.pagemap).run();
    assert_eq!((report.moved, report.without_copy), (2, 0));
    assert_eq!((rig.machine.frames(), rig.pagemap.used(), other.machine.frames()), (4, 4, 0));
    check(&other, 2, 20);
    check(&rig, 2, 10);
    assert_eq!((rig.pagemap.statistics().home_in_place, rig.machine.frames()), (2, 2));
    other.finish();
    rig.finish();
}
