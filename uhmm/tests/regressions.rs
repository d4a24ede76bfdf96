//! Bugs that others have made, and that no other test here goes into. The numbers are those of
//! `docs/regressions.md`.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use common::{Gpu, Rig, Table, access, mirror, page, range, word};
use uhmm::backend::{Committed, Placement, Select};
use uhmm::policy::{DeviceFault, DevicePlan, Policies, Policy};
use uhmm::primitive::lock;
use uhmm::sim::{Machine, Mapping, Process, SimError};
use uhmm::{
    Access, Clock, CopyJob, Device, DeviceFrame, DeviceMemory, DevicePagemap, Event, FaultError,
    Mirror, MirrorHandle, Order, OutOfDeviceMemory, Page, PageEntry, PageRange, PagemapOptions,
    RangeFault, Residency, StayReason, SystemMemory,
};

/// Maps a large page, none of which has been touched, in the place of the rig's memory.
fn huge_rig(device_pages: usize) -> Rig {
    let rig = Rig::new(1, device_pages);
    let whole = Mapping::anonymous(Access::Write).huge(true);
    rig.process.map(range(0, 0x200), whole).expect("memory is mapped");
    rig
}

fn move_to_device(rig: &Rig, pages: PageRange) {
    let report = rig.process.address_space().migrate(pages, &rig.pagemap).run();
    assert_eq!(report.moved, pages.pages(), "{report:?}");
}

/// Ends a process that no device mirrors, and checks that nothing of it is left.
fn end(machine: &Machine, process: Process, pagemap: &DevicePagemap) {
    machine.check().expect("the machine is whole");
    process.exit();
    machine.check().expect("the machine is whole after the exit");
    assert_eq!((machine.frames(), pagemap.used()), (0, 0), "memory leaks");
    assert_eq!(machine.violations(), Vec::<String>::new());
}

/// A process of `pages` pages that hold 10, 11, ..., and a device that does not mirror it.
fn without_mirror(pages: u64) -> (Machine, Process, Arc<DevicePagemap>) {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, pages), Mapping::anonymous(Access::Write)).expect("memory is mapped");
    for index in 0..pages {
        process.store_u64(word(index), 10 + index).expect("memory is there");
    }
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    (machine, process, DevicePagemap::register_with(Gpu::new(pages as usize), options))
}

// Regression 6: two stores of a CPU, two loads of a device.

/// A device that does not hear of changes of one page, if it is made so.
struct Reader {
    gpu: Arc<Gpu>,
    deaf_at: Option<Page>,
}

impl Device for Reader {
    type PageTable = Arc<Table>;
    type Fence = ();

    fn page_table(&self, range: PageRange, memory: &Arc<dyn SystemMemory>) -> Arc<Table> {
        self.gpu.page_table(range, memory)
    }

    fn map(&self, table: &mut Arc<Table>, range: PageRange, entries: &[PageEntry]) {
        self.gpu.map(table, range, entries);
    }

    fn invalidate(&self, table: &mut Arc<Table>, event: &Event) {
        let changed = PageRange::covering(event.range());
        if !self.deaf_at.is_some_and(|page| changed.contains(page)) {
            self.gpu.invalidate(table, event);
        }
    }
}

/// Loads a word as the device does: through its page table, faulting where it must.
fn device_load(mirror: &MirrorHandle<Reader>, address: u64) -> u64 {
    let page = Page::containing(address);
    loop {
        let table = mirror.inspect(Arc::clone).expect("the mirror lives");
        if let Some(value) = mirror.device().gpu.update(&table, address, Access::Read, |old| old) {
            return value;
        }
        mirror.range_fault(&RangeFault::read(page.into())).expect("it can be had");
    }
}

/// What the device saw: B, and then A.
type Seen = (u64, u64);

/// Stores `new` to A and then to B, which a child shares, so that the first store to each copies its
/// page. That may be the store of another thread to another word: then a store to A goes where that
/// thread's copy is, as soon as it can. Meanwhile the device loads B and then A, from when both are
/// `old` until B is `new`. Where `between`, the second store waits until the device has loaded both
/// once more.
fn litmus(process: &Process, reader: &Mirror<Reader>, new: u64, between: bool) -> Vec<Seen> {
    let (a, b) = (word(0), word(1));
    let child = process.fork().expect("it can fork");
    let pairs = AtomicU64::new(0);
    let stores = AtomicBool::new(true);
    let seen = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let mut seen = Vec::new();
            while stores.load(SeqCst) {
                let at_b = device_load(reader, b);
                seen.push((at_b, device_load(reader, a)));
                pairs.fetch_add(1, SeqCst);
            }
            seen
        });
        let wait_for_a_pair = |more: u64| {
            let target = pairs.load(SeqCst) + more;
            while pairs.load(SeqCst) < target {
                std::thread::yield_now();
            }
        };
        wait_for_a_pair(1);
        for other in [a + 8, b + 8] {
            scope.spawn(move || process.store_u64(other, new).expect("memory is there"));
        }
        process.store_u64(a, new).expect("memory is there");
        if between {
            // The first of the two may have begun before the store.
            wait_for_a_pair(2);
        }
        process.store_u64(b, new).expect("memory is there");
        wait_for_a_pair(2);
        stores.store(false, SeqCst);
        device.join().expect("no panic")
    });
    assert_eq!(child.load_u64(a), Ok(new - 1), "the child's page was stored to");
    child.exit();
    seen
}

/// Makes a process with two pages of `value`, and a reader of it.
fn reader(deaf_at: Option<Page>, value: u64) -> (Machine, Process, Mirror<Reader>) {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 2), Mapping::anonymous(Access::Write)).expect("memory is mapped");
    process.store_u64(word(0), value).expect("memory is there");
    process.store_u64(word(1), value).expect("memory is there");
    let device = Arc::new(Reader { gpu: Gpu::new(0), deaf_at });
    let mirror = process.address_space().mirror(&device, range(0, 2)).expect("it lives");
    (machine, process, mirror)
}

/// Regression 6: a device sees two stores of a CPU in their order, although each of them copies its
/// page on write.
#[test]
fn a_device_sees_copies_on_write_in_the_order_of_the_stores() {
    /// How often the loads must have come between the stores by themselves.
    const OVERLAPS: u64 = 20;
    let (machine, process, reader) = reader(None, 0);
    let (mut overlaps, mut new) = (0, 0);
    while overlaps < OVERLAPS || new < 300 {
        assert!(new < 100_000, "the loads came between the stores only {overlaps} times");
        let (old, between) = (new, new % 2 == 1);
        new += 1;
        let seen = litmus(&process, &reader, new, between);
        assert!(!seen.contains(&(new, old)), "B is new and A is old");
        assert_eq!((seen.first(), seen.last()), (Some(&(old, old)), Some(&(new, new))));
        match seen.contains(&(old, new)) {
            true if !between => overlaps += 1,
            found => assert!(found || !between, "the loads did not come between"),
        }
    }
    drop(reader);
    process.exit();
    assert_eq!((machine.frames(), machine.violations()), (0, Vec::new()));
}

/// Regression 6: that the loads above find out a device that hears of the first store too late.
#[test]
fn a_device_that_misses_one_of_two_changes_sees_the_stores_in_the_wrong_order() {
    let (_machine, process, reader) = reader(Some(page(0)), 0);
    assert!(litmus(&process, &reader, 1, false).contains(&(1, 0)));
}

// Regression 20: the reaper meets pages in transit.

/// Regression 20: memory that is reaped between a copy and its commit is gone, in either direction,
/// and whoever sleeps on one of its pages wakes up.
#[test]
fn what_is_reaped_between_copy_and_commit_is_gone_and_its_waiters_wake() {
    for home in [false, true] {
        let (machine, process, pagemap) = without_mirror(4);
        let space = process.address_space();
        let mut taken = None;
        let mut migration = None;
        if home {
            assert_eq!(space.migrate(range(0, 4), &pagemap).run().moved, 4);
            let owner = pagemap.owner();
            let mut isolation = space.backend().isolate(range(0, 4), Select::Device(owner));
            (0..4).for_each(|index| _ = isolation.allocate_home(index).expect("there is room"));
            taken = Some(isolation);
        } else {
            migration = Some(space.migrate(range(0, 4), &pagemap).copy());
        }
        assert!((0..4).all(|index| in_transit(&process, index)));
        std::thread::scope(|scope| {
            let process = &process;
            let waiters = [0, 1, 1].map(|index| scope.spawn(move || process.load_u64(word(index))));
            assert_eq!(process.oom_reap(), Ok(4));
            machine.check().expect("the machine is whole");
            if let Some(isolation) = taken {
                let committed = isolation.commit((0..4).map(|_| Placement::Home).collect());
                assert_eq!(committed, [Committed::Gone; 4]);
            }
            if let Some(migration) = migration {
                let report = migration.commit();
                assert_eq!((report.moved, report.reason(page(3))), (0, Some(StayReason::Gone)));
            }
            for waiter in waiters {
                assert_eq!(waiter.join().expect("no panic"), Ok(0));
            }
        });
        assert_eq!((machine.frames(), pagemap.used()), (0, 0));
        assert_eq!(process.load_u64(word(3)), Ok(0));
        end(&machine, process, &pagemap);
    }
}

fn in_transit(process: &Process, index: u64) -> bool {
    let entry = process.address_space().snapshot(page(index).into())[0];
    entry.residency == Residency::InTransit
}

/// Regression 20: a reaper that a device holds off has changed nothing, in transit or not.
#[test]
fn a_reaper_that_is_held_off_leaves_pages_in_transit_alone() {
    let rig = Rig::new(3, 3);
    rig.fill(3, 10);
    let migration = rig.process.address_space().migrate(range(0, 2), &rig.pagemap).copy();
    assert!(rig.process.oom_reap().is_err(), "this device cannot stop without sleeping");
    assert_eq!(migration.commit().moved, 2);
    (0..3).for_each(|index| assert_eq!(rig.process.load_u64(word(index)), Ok(10 + index)));
    rig.finish();
}

// Regression 21: large pages that are split, and zeroes that are replaced.

/// Regression 21: a large page is split on its way because the device has no room for it whole,
/// after parts of it have been freed.
#[test]
fn a_large_page_that_is_split_in_transit_may_have_been_freed_in_part() {
    for all in [false, true] {
        let rig = huge_rig(0x180);
        rig.fill(0x200, 10);
        let migration = rig.process.address_space().migrate(range(0, 0x200), &rig.pagemap);
        let freed = if all { range(0, 0x200) } else { range(0x40, 0x80) };
        rig.process.unmap(freed);
        let report = migration.copy().commit();
        rig.machine.check().expect("the machine is whole");
        let on_device = (0..0x200).filter(|&index| rig.on_device(index)).count() as u64;
        assert_eq!((report.moved, rig.pagemap.used()), (on_device, on_device));
        assert_eq!(on_device > 0, !all, "the test means nothing");
        for index in (0..0x200).filter(|&index| !freed.contains(page(index))) {
            assert_eq!(rig.process.load_u64(word(index)), Ok(10 + index));
        }
        assert_eq!(rig.machine.frames(), 0x200 - freed.pages());
        rig.finish();
    }
}

/// Regression 21: large pages are split by those who move them while others free them in part.
#[test]
fn large_pages_are_split_while_others_free_parts_of_them() {
    const ROUNDS: u64 = 30;
    let rig = huge_rig(0x180);
    let whole = range(0, 0x200);
    let mapping = || Mapping::anonymous(Access::Write).huge(true);
    for round in 0..ROUNDS {
        rig.process.map(whole, mapping()).expect("memory is mapped");
        rig.fill(0x200, round);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for step in 0..16 {
                    let part = range((round * 37 + step * 29) % 0x1f0, 1 + step);
                    match step % 3 {
                        0 => rig.process.unmap(part),
                        1 => rig.process.discard(part),
                        _ => rig.process.protect(part, Access::Read),
                    }
                }
            });
            let space = rig.process.address_space();
            for _ in 0..3 {
                _ = space.migrate(whole, &rig.pagemap).run();
                rig.pagemap.evict(0x40);
                _ = rig.process.split(range(round, 1));
            }
        });
        rig.machine.check().expect("the machine is whole");
        for index in 0..0x200 {
            let value = rig.process.load_u64(word(index));
            assert!(
                matches!(value, Err(SimError::Fault(FaultError::Hole { .. })) | Ok(0))
                    || value == Ok(round + index),
                "page {index}: {value:?}"
            );
        }
    }
    assert!(rig.pagemap.statistics().splits > 0, "the test means nothing");
    rig.finish();
}

/// Regression 21: a device that has the shared zeroes mapped does not see them any more when a page
/// takes their place, wherever that page is.
#[test]
fn no_device_keeps_the_zeroes_that_a_large_page_replaces() {
    for to_device in [false, true] {
        let rig = huge_rig(0x200);
        let other = Gpu::new(0);
        let second = rig.process.address_space().mirror(&other, range(0, 0x200)).expect("it lives");
        second.range_fault(&RangeFault::read(range(0, 8))).expect("it can be read");
        assert_eq!(access(&second, word(5), Access::Read, |old| old), Ok(0));
        assert_eq!(rig.machine.frames(), 0, "the zeroes take no memory");
        if to_device {
            move_to_device(&rig, range(0, 0x200));
            assert_eq!(rig.device_store(word(5), 7), Ok(0));
        } else {
            rig.process.store_u64(word(9), 1).expect("memory is there");
            assert_eq!(rig.process.collapse(range(0, 0x200)), 1);
            assert!(second.inspect(|table| table.entry(page(5))).expect("it lives").is_none());
            rig.process.store_u64(word(5), 7).expect("memory is there");
        }
        assert_eq!(access(&second, word(5), Access::Read, |old| old), Ok(7));
        drop(second);
        rig.finish();
    }
}

// Regression 24: batches across the edge of a table.

/// Regression 24: what is done to a batch of pages across the edge of 2 MiB puts back the bits of each
/// page, and ends where the batch ends.
#[test]
fn a_batch_across_an_edge_keeps_the_bits_of_each_page_and_ends_where_it_ends() {
    const FIRST: u64 = 0x1f0;
    const PAGES: u64 = 0x20;
    let rig = Rig::new(0x400, PAGES as usize);
    let pages = || FIRST..FIRST + PAGES;
    for index in pages() {
        rig.process.store_u64(word(index), index).expect("memory is there");
    }
    // Neighbours differ.
    for index in pages() {
        let one = range(index, 1);
        match index % 5 {
            0 => rig.process.clear_soft_dirty(one),
            1 => rig.process.write_protect(one),
            2 => rig.process.protect(one, Access::Read),
            3 => assert_eq!(rig.process.relocate(one), 1),
            _ => {}
        }
    }
    let bits = || {
        let bits = |index| {
            let entry = rig.process.address_space().snapshot(page(index).into())[0];
            (rig.process.flags(page(index)), entry.access, entry.allowed)
        };
        pages().map(bits).collect::<Vec<_>>()
    };
    let before = bits();
    // In parts that begin and end on either side of the edge.
    for (first, count) in [(0x1f8, 0x10), (0x1ff, 1), (0x200, 1), (0x1ff, 2), (FIRST, PAGES)] {
        let batch = range(first, count);
        assert_eq!(rig.process.reclaim(batch), count);
        let out: Vec<u64> =
            pages().filter(|&index| rig.residency(index) == Residency::Empty).collect();
        assert_eq!(out, (first..first + count).collect::<Vec<_>>());
        assert_eq!(rig.process.swap_in(batch), count);
        assert_eq!(bits(), before, "{batch} was swapped");
        move_to_device(&rig, batch);
        assert_eq!(rig.pagemap.used(), count);
        assert_eq!(rig.process.address_space().migrate_home(batch).moved, count);
        assert_eq!(bits(), before, "{batch} moved");
    }
    let read = RangeFault::read(range(FIRST, PAGES));
    rig.mirror.range_fault(&read).expect("all can be read");
    rig.process.unmap(range(0x1ff, 2));
    for index in pages() {
        let gone = (0x1ff..0x201).contains(&index);
        let translated = rig.mirror.inspect(|table| table.entry(page(index)).is_some());
        assert_eq!(translated, Ok(!gone), "{index:#x}");
        assert_eq!(rig.process.load_u64(word(index)).ok(), (!gone).then_some(index));
    }
    rig.finish();
}

// Regression 46: pages on a device that a fork shares.

/// Regression 46: a store of a CPU to a page on the device that a fork shares gives the one who
/// stores a page of its own, and both processes and their devices see what is theirs.
#[test]
fn a_store_to_a_page_on_a_device_that_a_fork_shares_is_seen_on_its_own_side() {
    for by_parent in [false, true] {
        let rig = Rig::new(2, 2);
        rig.fill(2, 10);
        move_to_device(&rig, range(0, 2));
        let child = rig.process.fork().expect("it can fork");
        let childs_mirror = mirror(&child, &rig.gpu, &rig.pagemap);
        let load = |of: &MirrorHandle<Gpu>| access(of, word(0), Access::Read, |old| old);
        assert_eq!((load(&rig.mirror), load(&childs_mirror)), (Ok(10), Ok(10)));
        assert_eq!(rig.pagemap.used(), 2, "it is shared where it is");
        let (one, other) = if by_parent { (&rig.process, &child) } else { (&child, &rig.process) };
        // The first copy home fails: nothing has happened.
        rig.gpu.injector.fail("copy", 0);
        let failed = FaultError::CopyFailed { page: page(0) };
        assert_eq!(one.store_u64(word(0), 50), Err(failed.into()));
        one.store_u64(word(0), 50).expect("memory is there");
        rig.machine.check().expect("the machine is whole");
        assert_eq!((one.load_u64(word(0)), other.load_u64(word(0))), (Ok(50), Ok(10)));
        let (ones, others) = match by_parent {
            true => (&*rig.mirror, &*childs_mirror),
            false => (&*childs_mirror, &*rig.mirror),
        };
        assert_eq!((load(ones), load(others)), (Ok(50), Ok(10)));
        // The device's own store to the page that is still shared.
        assert_eq!(access(others, word(1), Access::Write, |_| 60), Ok(11));
        assert_eq!((one.load_u64(word(1)), other.load_u64(word(1))), (Ok(11), Ok(60)));
        drop(childs_mirror);
        child.exit();
        rig.finish();
    }
}

// Regression 48: device memory that is not clear yet.

/// Device memory whose copy engine waits to be told.
struct Slow {
    gpu: Arc<Gpu>,
    begun: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl DeviceMemory for Slow {
    fn capacity(&self) -> u64 {
        self.gpu.capacity()
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        self.gpu.allocate(order)
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        self.gpu.free(frame, order);
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        lock(&self.begun).send(()).expect("the test waits");
        lock(&self.go_on).recv().expect("the test goes on");
        self.gpu.copy(memory, jobs);
    }
}

/// Regression 48: until the job that clears fresh device memory has ended, no device has a translation
/// to it, and whoever touches the page waits.
#[test]
fn nobody_reaches_fresh_device_memory_before_it_is_clear() {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 1), Mapping::anonymous(Access::Write)).expect("memory is mapped");
    let gpu = Gpu::new(1);
    let (begun, has_begun) = mpsc::channel();
    let (may_go_on, go_on) = mpsc::channel();
    let slow = Slow { gpu: gpu.clone(), begun: Mutex::new(begun), go_on: Mutex::new(go_on) };
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    let pagemap = DevicePagemap::register_with(Arc::new(slow), options);
    let mirror = mirror(&process, &gpu, &pagemap);
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| access(&mirror, word(0), Access::Read, |old| old));
        has_begun.recv().expect("the device's fault moves the page");
        // Fresh memory is full of what it was left with. Nobody sees it.
        assert_eq!(pagemap.used(), 1);
        assert!(in_transit(&process, 0));
        assert_eq!(mirror.inspect(|table| table.len()), Ok(0));
        let deadline = Instant::now() + Duration::from_millis(5);
        let hasty = RangeFault::read(range(0, 1)).deadline(deadline);
        let waits = Err(FaultError::TimedOut { page: page(0) });
        assert_eq!(mirror.range_fault(&hasty), waits);
        may_go_on.send(()).expect("the copy waits");
        assert_eq!(toucher.join().expect("no panic"), Ok(0));
    });
    // The way home takes one more copy.
    may_go_on.send(()).expect("the copy will wait");
    assert_eq!(process.load_u64(word(0)), Ok(0));
    drop(mirror);
    end(&machine, process, &pagemap);
}

// Regression 51: attributes of ranges, and what comes of them.

/// Asks for much more than there is.
#[derive(Debug)]
struct Greedy(PageRange);

impl Policy for Greedy {
    fn name(&self) -> &'static str {
        "greedy"
    }

    fn device_fault(&self, _: &DeviceFault<'_>, plan: &mut DevicePlan) {
        plan.range = self.0;
    }
}

/// Regression 51: whatever range a policy asks for, pages outside of the mirror are left alone, and
/// the page of the fault is served.
#[test]
fn what_a_policy_asks_for_ends_at_the_mirror() {
    let all = PageRange::ALL;
    let top = PageRange::from(Page::MAX);
    for (asked, served) in [(all, range(2, 4)), (range(0, 4), range(2, 2)), (top, range(3, 1))] {
        let options = PagemapOptions::new().policies(Policies::none().and(Greedy(asked)));
        let rig = Rig::with(8, 8, options);
        rig.fill(8, 10);
        let space = rig.process.address_space();
        let narrow = space.mirror_with(&rig.gpu, range(2, 4), &rig.pagemap).expect("it lives");
        let handled = narrow.handle_fault(page(3), Access::Read).expect("it can be had");
        assert_eq!((handled.range, handled.migrated), (served, served.pages()));
        for index in 0..8 {
            assert_eq!(rig.on_device(index), served.contains(page(index)), "page {index}");
        }
        drop(narrow);
        rig.finish();
    }
}
