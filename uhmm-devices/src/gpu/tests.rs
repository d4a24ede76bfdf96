//! The parts by themselves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mmu_notifier::Fence;
use uhmm::{
    Access, CopyJob, CopyKind, Device, DeviceFrame, DeviceLocation, DeviceMemory, Event, EventKind,
    Frame, Injector, Order, PAGE_SIZE, Page, PageEntry, PageRange, Residency, SystemMemory,
};

use super::buddy::{Buddy, NotHeld};
use super::fault::FaultReason;
use super::fault_buffer::{FaultBuffer, Outcome, Packet};
use super::memory::{FREED, FRESH, LocalMemory, Stamp};
use super::tables::Tables;
use super::tlb::{Tlb, TlbCell, WalkCache};
use super::tree::{Leaf, NodeCounts, Target};
use super::violations::Violations;
use super::{PageTable, SoftGpu, SoftGpuOptions};

/// System memory in which byte `i` of frame `f` is what `f + i` ends in, and writes are lost.
struct Numbered;

impl SystemMemory for Numbered {
    fn read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) {
        for (index, byte) in (offset..).zip(bytes) {
            *byte = (frame.0 as usize + index) as u8;
        }
    }

    fn write(&self, _: Frame, _: usize, _: &[u8]) {}

    fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
        unreachable!("no test of the parts updates system memory")
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

const ALL: PageRange = PageRange::ALL;

fn page(number: u64) -> Page {
    Page::new(number).expect("a test's page is a page")
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::from_pages(page(first), count).expect("a test's range is a range")
}

fn leaf(frame: u64, access: Access) -> Leaf {
    Leaf { target: Target::System(Frame(frame)), access }
}

fn tables() -> (Tables, Arc<Violations>) {
    let violations = Arc::new(Violations::default());
    (Tables::new(ALL, Arc::new(Numbered), Arc::clone(&violations)), violations)
}

fn enter(tables: &Tables, first: u64, leaf: Leaf, order: Order) {
    tables.enter(page(first).block(order), |_| Some((leaf, order)));
}

fn system(frame: u64, access: Access, order: Order) -> PageEntry {
    PageEntry { residency: Residency::System(Frame(frame)), access, allowed: access, order }
}

fn invalidate(gpu: &SoftGpu, table: &mut PageTable, range: PageRange) {
    gpu.invalidate(table, &Event::new(EventKind::Clear, range.va_range())).wait();
}

// Page tables.

#[test]
fn a_large_leaf_is_split_where_a_part_of_it_is_removed() {
    let (tables, _) = tables();
    enter(&tables, 1024, leaf(5000, Access::Write), Order::HUGE);
    assert_eq!(tables.translation(page(1024 + 511)).unwrap().order, Order::HUGE);
    assert_eq!(tables.nodes().deposited, 1);
    let (changed, _, retired) = tables.remove(pages(1024 + 10, 2));
    tables.free(retired);
    assert!(changed);
    assert_eq!(tables.nodes().deposited, 0, "the node it kept is where its entries are now");
    for index in 0..512 {
        let found = tables.translation(page(1024 + index));
        if (10..12).contains(&index) {
            assert_eq!(found, None);
        } else {
            let found = found.expect("the rest of the block stays mapped");
            assert_eq!(found.order, Order::PAGE);
            assert_eq!(found.target, Target::System(Frame(5000 + index)));
            assert_eq!(found.access, Access::Write);
        }
    }
    tables.check().unwrap();
}

#[test]
fn single_entries_are_replaced_by_a_large_leaf_and_the_other_way_round() {
    let (tables, _) = tables();
    enter(&tables, 512, leaf(7, Access::Read), Order::PAGE);
    enter(&tables, 512, leaf(1000, Access::Write), Order::HUGE);
    assert_eq!(tables.translation(page(513)).unwrap().target, Target::System(Frame(1001)));
    enter(&tables, 513, leaf(9, Access::Read), Order::PAGE);
    assert_eq!(tables.translation(page(512)).unwrap().target, Target::System(Frame(1000)));
    assert_eq!(tables.translation(page(513)).unwrap().target, Target::System(Frame(9)));
    assert_eq!(tables.translation(page(513)).unwrap().order, Order::PAGE);
    tables.check().unwrap();
    let (_, _, retired) = tables.remove(ALL);
    tables.free(retired);
    tables.check().unwrap();
    assert_eq!((tables.nodes().linked, tables.nodes().retired), (1, 0), "the root is left");
}

#[test]
fn the_ends_of_the_address_space_can_be_mapped() {
    let (tables, _) = tables();
    let last = Page::MAX.number();
    enter(&tables, 0, leaf(1, Access::Read), Order::PAGE);
    enter(&tables, last, leaf(2, Access::Read), Order::PAGE);
    assert_eq!(tables.translation(page(last)).unwrap().target, Target::System(Frame(2)));
    let (changed, _, _) = tables.remove(pages(last, 1));
    assert!(changed);
    assert_eq!(tables.translation(page(last)), None);
    assert!(tables.translation(page(0)).is_some());
    enter(&tables, last - 511, leaf(3, Access::Read), Order::HUGE);
    assert_eq!(tables.translation(page(last)).unwrap().target, Target::System(Frame(514)));
    tables.check().unwrap();
}

/// Against a flat map, with leaves of both sizes and removals of any size.
#[test]
fn the_tree_holds_what_a_flat_map_holds() {
    let mut random = Random(17);
    let (tables, _) = tables();
    let mut flat = BTreeMap::new();
    const SPAN: u64 = 5 * 512;
    for round in 0..600 {
        let first = random.below(SPAN);
        match random.below(4) {
            0 => {
                let block = page(first).align_down(Order::HUGE).number();
                enter(&tables, block, leaf(round * 1000, Access::Write), Order::HUGE);
                flat.extend((0..512).map(|index| (block + index, round * 1000 + index)));
            }
            1 => {
                let count = 1 + random.below(SPAN - first);
                let (changed, _, retired) = tables.remove(pages(first, count));
                tables.free(retired);
                let before = flat.len();
                flat.retain(|page, _| !(first..first + count).contains(page));
                assert_eq!(changed, flat.len() != before);
            }
            _ => {
                enter(&tables, first, leaf(round * 1000, Access::Read), Order::PAGE);
                flat.insert(first, round * 1000);
            }
        }
        tables.check().unwrap();
        for _ in 0..20 {
            let at = random.below(SPAN);
            let found = tables.translation(page(at)).map(|found| found.target);
            let expected = flat.get(&at).map(|&frame| Target::System(Frame(frame)));
            assert_eq!(found, expected, "page {at} in round {round}");
        }
    }
}

/// Regression 61: a node that a walk cache may have is not used for another region.
#[test]
fn r61_a_table_node_is_used_again_only_after_the_flush() {
    let (tables, violations) = tables();
    let mut cache = WalkCache::default();
    enter(&tables, 0, leaf(1, Access::Read), Order::PAGE);
    assert!(tables.walk(page(0), &mut cache).is_some());
    let (_, _, retired) = tables.remove(pages(0, 1));
    assert!(tables.nodes().retired > 0);
    // The region next door gets nodes of its own.
    enter(&tables, 512, leaf(2, Access::Read), Order::PAGE);
    assert!(tables.walk(page(0), &mut cache).is_none());
    assert_eq!(violations.list(), Vec::<String>::new());
    tables.free(retired);
    assert_eq!(tables.nodes().retired, 0);
    let before = tables.nodes();
    enter(&tables, 1 << 40, leaf(3, Access::Read), Order::PAGE);
    let after = tables.nodes();
    assert!(after.free < before.free, "freed nodes are used: {before:?} {after:?}");
}

/// The test above finds a device that does not wait.
#[test]
fn r61_a_node_that_is_used_too_early_is_found_out() {
    let (tables, violations) = tables();
    let mut cache = WalkCache::default();
    enter(&tables, 0, leaf(1, Access::Read), Order::PAGE);
    assert!(tables.walk(page(0), &mut cache).is_some());
    let (_, _, retired) = tables.remove(pages(0, 1));
    tables.free(retired);
    // Nobody flushed the cache, and the region next door gets the node.
    enter(&tables, 512, leaf(2, Access::Read), Order::PAGE);
    tables.walk(page(0), &mut cache);
    assert_eq!(violations.list().len(), 1, "{violations:?}");
}

#[test]
fn a_node_kept_by_a_large_leaf_is_no_danger_to_walk_caches() {
    let (tables, violations) = tables();
    let mut cache = WalkCache::default();
    enter(&tables, 5, leaf(105, Access::Read), Order::PAGE);
    assert!(tables.walk(page(5), &mut cache).is_some());
    enter(&tables, 0, leaf(100, Access::Read), Order::HUGE);
    let walked = tables.walk(page(5), &mut cache).expect("it is mapped");
    assert_eq!((walked.leaf.target, walked.order), (Target::System(Frame(105)), Order::HUGE));
    enter(&tables, 7, leaf(107, Access::Read), Order::PAGE);
    let walked = tables.walk(page(5), &mut cache).expect("it is mapped");
    assert_eq!((walked.leaf.target, walked.order), (Target::System(Frame(105)), Order::PAGE));
    assert_eq!(violations.list(), Vec::<String>::new());
}

// What the layer above enters.

#[test]
fn a_whole_aligned_block_becomes_one_leaf_and_a_part_does_not() {
    let gpu = SoftGpu::new(SoftGpuOptions::new());
    let memory: Arc<dyn SystemMemory> = Arc::new(Numbered);
    let mut table = gpu.page_table(ALL, &memory);
    let entries: Vec<PageEntry> =
        (0..512).map(|index| system(900 + index, Access::Write, Order::HUGE)).collect();
    gpu.map(&mut table, pages(512, 512), &entries);
    assert_eq!(table.translation(page(600)).unwrap().order, Order::HUGE);
    // The same, of which the request has only the second half.
    let half: Vec<PageEntry> =
        (256..512).map(|index| system(index, Access::Write, Order::new(8).unwrap())).collect();
    gpu.map(&mut table, pages(1024 + 256, 256), &half);
    assert_eq!(table.translation(page(1024 + 300)).unwrap().order, Order::PAGE);
    assert_eq!(table.translation(page(1024 + 255)), None);
    invalidate(&gpu, &mut table, pages(515, 1));
    assert_eq!(table.translation(page(515)), None);
    assert_eq!(table.translation(page(516)).unwrap().target, Target::System(Frame(904)));
    assert_eq!(gpu.violations(), Vec::<String>::new());
}

#[test]
fn an_entry_without_access_takes_the_translation_out() {
    let gpu = SoftGpu::new(SoftGpuOptions::new());
    let memory: Arc<dyn SystemMemory> = Arc::new(Numbered);
    let mut table = gpu.page_table(ALL, &memory);
    gpu.map(&mut table, pages(3, 1), &[system(1, Access::Read, Order::PAGE)]);
    assert!(table.translation(page(3)).is_some());
    gpu.map(&mut table, pages(3, 1), &[PageEntry::default()]);
    assert_eq!(table.translation(page(3)), None);
    assert_eq!(gpu.violations().len(), 1, "nobody has invalidated it");
    gpu.map(&mut table, pages(3, 1), &[PageEntry::default()]);
    assert_eq!(gpu.violations().len(), 1, "there was nothing any more");
}

/// Entering a page flushes nothing, so it must not take anything away.
#[test]
fn an_entry_that_needed_an_invalidation_is_reported() {
    let memory: Arc<dyn SystemMemory> = Arc::new(Numbered);
    let reported = |old: PageEntry, new: PageEntry| {
        let gpu = SoftGpu::new(SoftGpuOptions::new());
        let mut table = gpu.page_table(ALL, &memory);
        let first = old.order.max(new.order).pages();
        for entry in [old, new] {
            let Residency::System(Frame(frame)) = entry.residency else { unreachable!() };
            let block = |index| system(frame + index, entry.access, entry.order);
            let entries: Vec<_> = (0..entry.order.pages()).map(block).collect();
            gpu.map(&mut table, pages(first, entry.order.pages()), &entries);
        }
        let reported = gpu.violations().len();
        // The same with an invalidation in between.
        invalidate(&gpu, &mut table, ALL);
        gpu.map(&mut table, pages(first, 1), &[PageEntry { order: Order::PAGE, ..old }]);
        assert_eq!(gpu.violations().len(), reported);
        reported
    };
    use Access::{Atomic, Read, Write};
    let at = |frame, access| system(frame, access, Order::PAGE);
    for (old, new) in [(Read, Read), (Read, Write), (Write, Atomic), (Atomic, Write)] {
        assert_eq!(reported(at(1, old), at(1, new)), 0, "{old:?} to {new:?}");
        assert_eq!(reported(at(1, old), at(2, new)), 1, "another frame");
    }
    assert_eq!(reported(at(1, Write), at(1, Read)), 1);
    assert_eq!(reported(at(1, Atomic), at(1, Read)), 1);
    let huge = |frame| system(frame, Write, Order::HUGE);
    assert_eq!(reported(huge(1000), huge(1000)), 0);
    assert_eq!(reported(huge(1000), huge(2000)), 1);
    assert_eq!(reported(at(1000, Read), huge(1000)), 0);
    assert_eq!(reported(at(1001, Read), huge(1000)), 1);
    assert_eq!(reported(huge(1000), at(1000, Write)), 0);
    assert_eq!(reported(huge(1000), at(1001, Write)), 1);
}

#[test]
fn entries_that_contradict_each_other_are_reported() {
    let gpu = SoftGpu::new(SoftGpuOptions::new());
    let memory: Arc<dyn SystemMemory> = Arc::new(Numbered);
    let mut table = gpu.page_table(ALL, &memory);
    let mut entries = vec![system(1, Access::Read, Order::HUGE); 512];
    gpu.map(&mut table, pages(0, 512), &entries);
    assert_eq!(gpu.violations().len(), 1, "a large page is of consecutive frames");
    let owner = gpu.pagemap().expect("it has memory").owner();
    let free = DeviceLocation { owner, frame: DeviceFrame(0) };
    invalidate(&gpu, &mut table, pages(0, 512));
    entries.truncate(1);
    entries[0] = PageEntry { residency: Residency::Device(free), ..entries[0] };
    gpu.map(&mut table, pages(0, 1), &entries);
    assert_eq!(gpu.violations().len(), 2, "the frame is free");
    assert_eq!(table.translation(page(0)), None);
}

// TLBs.

#[test]
fn a_tlb_keeps_what_it_has_until_it_is_flushed() {
    let mut tlb = Tlb::new(64);
    tlb.insert(page(5), leaf(50, Access::Read), Order::PAGE);
    tlb.insert(page(515), leaf(603, Access::Write), Order::HUGE);
    assert_eq!(tlb.get(page(5)), Some(leaf(50, Access::Read)));
    assert_eq!(tlb.get(page(512)), Some(leaf(600, Access::Write)));
    assert_eq!(tlb.get(page(1023)), Some(leaf(1111, Access::Write)));
    tlb.flush(pages(6, 500));
    assert_eq!(tlb.get(page(5)), Some(leaf(50, Access::Read)));
    // A part of a large translation: all of it goes.
    tlb.flush(pages(700, 1));
    assert_eq!(tlb.get(page(512)), None);
    tlb.flush(ALL);
    assert_eq!(tlb.entries().count(), 0);
}

#[test]
fn a_tlb_is_bounded() {
    let mut tlb = Tlb::new(64);
    for number in 0..10_000 {
        tlb.insert(page(number), leaf(number, Access::Read), Order::PAGE);
        tlb.insert(page(number * 512), leaf(number * 512, Access::Read), Order::HUGE);
        assert!(tlb.entries().count() <= 64 + 16);
    }
    for (page, cached) in tlb.entries() {
        assert_eq!(cached, leaf(page.number(), Access::Read));
    }
}

#[test]
fn a_page_is_in_one_place_of_a_tlb() {
    let mut tlb = Tlb::new(4);
    tlb.insert(page(3), leaf(1, Access::Read), Order::PAGE);
    tlb.insert(page(3), leaf(2, Access::Write), Order::PAGE);
    assert_eq!(tlb.get(page(3)), Some(leaf(2, Access::Write)));
    tlb.insert(page(3), leaf(1003, Access::Write), Order::HUGE);
    assert_eq!(tlb.get(page(3)), Some(leaf(1003, Access::Write)));
    assert_eq!(tlb.entries().count(), 1);
}

/// A context that makes an access is waited for, and others are not.
#[test]
fn the_fence_of_an_invalidation_waits_for_accesses_under_way() {
    let gpu = SoftGpu::new(SoftGpuOptions::new());
    let memory: Arc<dyn SystemMemory> = Arc::new(Numbered);
    let mut table = gpu.page_table(ALL, &memory);
    gpu.map(&mut table, pages(1, 1), &[system(1, Access::Read, Order::PAGE)]);
    let cells = [0, 1].map(|id| Arc::new(TlbCell::new(id, 16)));
    cells.iter().for_each(|cell| table.tables().add_context(Arc::clone(cell)));
    let fill = || {
        for cell in &cells {
            uhmm::primitive::lock(&cell.tlb).insert(page(1), leaf(1, Access::Read), Order::PAGE);
        }
    };
    fill();
    let event = Event::new(EventKind::Unmap, pages(1, 1).va_range());
    let fence = gpu.invalidate(&mut table, &event);
    assert!(fence.is_over(), "nobody is in the middle of an access");
    assert!(fence.changed());
    table.tables().check().unwrap();

    gpu.map(&mut table, pages(1, 1), &[system(1, Access::Read, Order::PAGE)]);
    fill();
    let access = uhmm::primitive::lock(&cells[0].tlb);
    let fence = gpu.invalidate(&mut table, &event);
    assert!(!fence.is_over());
    assert!(gpu.try_invalidate(&mut table, &event).is_err(), "it would have to wait");
    assert_eq!(uhmm::primitive::lock(&cells[1].tlb).entries().count(), 0);
    assert!(access.get(page(1)).is_some(), "the access under way goes on");
    let waiting = std::thread::spawn(move || fence.wait());
    drop(access);
    waiting.join().unwrap();
    table.tables().check().unwrap();

    gpu.injector().fail("late-flush", 0);
    let fence = gpu.invalidate(&mut table, &event);
    assert!(!fence.is_over(), "as late as may be");
    assert!(!fence.changed(), "there was nothing left to invalidate");
    fence.wait();
}

#[test]
fn a_refused_invalidation_changes_nothing() {
    let gpu = SoftGpu::new(SoftGpuOptions::new());
    let memory: Arc<dyn SystemMemory> = Arc::new(Numbered);
    let mut table = gpu.page_table(ALL, &memory);
    gpu.map(&mut table, pages(1, 1), &[system(1, Access::Read, Order::PAGE)]);
    let cell = Arc::new(TlbCell::new(0, 16));
    table.tables().add_context(Arc::clone(&cell));
    let event = Event::new(EventKind::Clear, pages(1, 1).va_range());
    let access = uhmm::primitive::lock(&cell.tlb);
    assert!(gpu.try_invalidate(&mut table, &event).is_err());
    assert!(table.translation(page(1)).is_some());
    drop(access);
    assert!(gpu.try_invalidate(&mut table, &event).unwrap().is_over());
    assert_eq!(table.translation(page(1)), None);
    assert_eq!(table.nodes(), NodeCounts { linked: 1, free: 5, ..NodeCounts::default() });
}

// The fault buffer.

/// Who gives up makes room, and whoever waits for it hears of that.
#[test]
fn a_context_that_gives_up_makes_room_for_another() {
    let machine = uhmm::sim::Machine::new();
    let process = machine.spawn();
    let gpu = SoftGpu::new(SoftGpuOptions::new().fault_buffer(1));
    let mirror = gpu.mirror(process.address_space(), pages(0, 8)).expect("the process lives");
    let tables = mirror.inspect(|table| Arc::clone(table.tables())).expect("the mirror lives");
    let buffer = FaultBuffer::new(1);
    let report = |number, patience| {
        let mut packet = Packet {
            ticket: None,
            handle: (*mirror).clone(),
            tables: Arc::clone(&tables),
            page: page(number),
            access: Access::Read,
            failures: Arc::default(),
        };
        buffer.report(&mut packet, false, Some(Instant::now() + patience))
    };
    std::thread::scope(|scope| {
        // Both are in before the first gives up, unless this machine is very slow; then the test
        // shows nothing, and passes.
        let first = scope.spawn(|| report(1, Duration::from_millis(300)));
        let since = Instant::now();
        const LIMIT: Duration = Duration::from_secs(5);
        while buffer.len() == 0 {
            std::thread::yield_now();
        }
        let second = scope.spawn(|| report(2, 2 * LIMIT));
        assert_eq!(first.join().unwrap(), Outcome::Cancelled(FaultReason::Unserved));
        while buffer.len() == 0 && since.elapsed() < LIMIT {
            std::thread::yield_now();
        }
        let waited = since.elapsed();
        buffer.replay(true);
        assert_eq!(second.join().unwrap(), Outcome::Replayed);
        assert!(waited < LIMIT, "nobody told the other of the room");
    });
}

// Memory.

#[test]
fn blocks_are_halved_joined_and_found_again() {
    let mut buddy = Buddy::new(1024);
    assert_eq!(buddy.largest(), Order::new(10));
    let huge = buddy.allocate(Order::HUGE).unwrap();
    let single = buddy.allocate(Order::PAGE).unwrap();
    assert_eq!(buddy.available(), 511);
    assert!(buddy.allocate(Order::HUGE).is_none());
    buddy.check().unwrap();
    // Back in smaller pieces, in no order.
    for index in (0..512).rev() {
        buddy.free(huge + index, Order::PAGE).unwrap();
    }
    assert_eq!(buddy.free(huge + 5, Order::PAGE), Err(NotHeld));
    assert_eq!(buddy.free(huge, Order::HUGE), Err(NotHeld));
    let pair = Order::new(1).unwrap();
    let held = buddy.allocate(pair).unwrap();
    assert_eq!(buddy.free(held + 1, pair), Err(NotHeld), "not aligned");
    assert_eq!(buddy.free(u64::MAX - 1, pair), Err(NotHeld), "beyond all");
    buddy.free(held, pair).unwrap();
    buddy.free(single, Order::PAGE).unwrap();
    buddy.check().unwrap();
    assert_eq!(buddy.largest(), Order::new(10), "all is joined again");
}

#[test]
fn an_allocator_of_an_odd_number_of_frames_gives_out_each_once() {
    for capacity in [0, 1, 3, 7, 100, 511, 513, 1000] {
        let mut buddy = Buddy::new(capacity);
        buddy.check().unwrap();
        let mut seen = Vec::new();
        while let Some(frame) = buddy.allocate(Order::PAGE) {
            seen.push(frame);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..capacity).collect::<Vec<_>>());
        assert_eq!(buddy.free(capacity, Order::PAGE), Err(NotHeld), "beyond the end");
    }
}

#[test]
fn an_allocator_is_whole_after_any_sequence() {
    let mut random = Random(4711);
    let mut buddy = Buddy::new(2000);
    let mut held: Vec<(u64, u8)> = Vec::new();
    for _ in 0..5000 {
        if random.below(2) == 0 {
            let order = random.below(8) as u8;
            if let Some(first) = buddy.allocate(Order::new(order).unwrap()) {
                assert_eq!(first % (1 << order), 0, "a block is aligned to its size");
                held.push((first, order));
            }
        } else if !held.is_empty() {
            let (first, order) = held.swap_remove(random.below(held.len() as u64) as usize);
            if order > 0 && random.below(2) == 0 {
                held.extend([(first, order - 1), (first + (1 << (order - 1)), order - 1)]);
            } else {
                buddy.free(first, Order::new(order).unwrap()).unwrap();
            }
        }
        let used: u64 = held.iter().map(|(_, order)| 1 << order).sum();
        assert_eq!(used + buddy.available(), 2000);
    }
    buddy.check().unwrap();
}

fn local(pages: u64) -> (LocalMemory, Injector, Arc<Violations>) {
    let (injector, violations) = (Injector::new(), Arc::new(Violations::default()));
    (LocalMemory::new(pages, injector.clone(), Arc::clone(&violations)), injector, violations)
}

fn byte(memory: &LocalMemory, frame: DeviceFrame, stamp: Stamp) -> u8 {
    let mut byte = [0];
    memory.read(frame, stamp, 0, &mut byte);
    byte[0]
}

#[test]
fn memory_is_recognised_when_it_is_fresh_and_when_it_is_free() {
    let (memory, _, violations) = local(4);
    let frame = memory.allocate(Order::PAGE).unwrap();
    let stamp = memory.stamp(frame).expect("it is in use");
    assert_eq!(byte(&memory, frame, stamp), FRESH);
    assert_eq!(violations.list().len(), 1, "it was not filled yet");
    memory.copy(&Numbered, &mut [CopyJob::new(CopyKind::Clear { to: frame }, Order::PAGE)]);
    memory.write(frame, stamp, 0, &[7]);
    assert_eq!(byte(&memory, frame, stamp), 7);
    memory.free(frame, Order::PAGE);
    assert_eq!(violations.list().len(), 1);
    assert_eq!(byte(&memory, frame, stamp), FREED);
    assert_eq!(violations.list().len(), 2);
    let again = memory.allocate(Order::PAGE).unwrap();
    assert_eq!(again, frame);
    memory.write(frame, stamp, 0, &[9]);
    assert_eq!(violations.list().len(), 3, "the frame is another page's now");
    assert_eq!(byte(&memory, frame, memory.stamp(frame).unwrap()), FRESH, "and was not written");
    memory.check().unwrap();
}

#[test]
fn memory_that_is_freed_twice_is_reported() {
    let (memory, _, violations) = local(4);
    let frame = memory.allocate(Order::PAGE).unwrap();
    memory.free(frame, Order::PAGE);
    memory.free(frame, Order::PAGE);
    assert!(!violations.list().is_empty());
    memory.check().unwrap();
}

/// Regression 48: memory that was given out is not used before it was filled.
#[test]
fn r48_memory_that_is_used_before_it_was_filled_is_reported() {
    type Use = fn(&LocalMemory, DeviceFrame, Stamp);
    let uses: [Use; 4] = [
        |memory, frame, stamp| assert_ne!(byte(memory, frame, stamp), FREED),
        |memory, frame, stamp| memory.write(frame, stamp, 0, &[1]),
        |memory, frame, stamp| {
            memory.fetch_update(frame, stamp, 0, &mut |old| old);
        },
        |memory, frame, _| {
            let out = CopyKind::Out { from: frame, to: Frame(0) };
            memory.copy(&Numbered, &mut [CopyJob::new(out, Order::PAGE)]);
        },
    ];
    for fill in [false, true] {
        for used in uses {
            let (memory, _, violations) = local(1);
            let frame = memory.allocate(Order::PAGE).unwrap();
            if fill {
                let job = CopyJob::new(CopyKind::Clear { to: frame }, Order::PAGE);
                memory.copy(&Numbered, &mut [job]);
            }
            used(&memory, frame, memory.stamp(frame).unwrap());
            assert_eq!(violations.list().len(), usize::from(!fill), "{violations:?}");
        }
    }
}

/// What is stored in a frame that was copied out is lost.
#[test]
fn an_access_to_memory_that_was_copied_out_is_reported() {
    let (memory, _, violations) = local(1);
    let frame = memory.allocate(Order::PAGE).unwrap();
    let stamp = memory.stamp(frame).unwrap();
    let out = CopyKind::Out { from: frame, to: Frame(0) };
    for kind in [CopyKind::Clear { to: frame }, out] {
        memory.copy(&Numbered, &mut [CopyJob::new(kind, Order::PAGE)]);
    }
    memory.write(frame, stamp, 0, &[1]);
    assert_eq!(violations.list().len(), 1);
    // It stays after all.
    assert_eq!(memory.enter(frame), Some(stamp));
    memory.write(frame, stamp, 0, &[1]);
    assert_eq!(violations.list().len(), 1);
}

/// What the allocator refuses to take back is left as it is.
#[test]
fn a_block_that_is_not_held_is_reported_and_left_alone() {
    let (memory, _, violations) = local(8);
    let pair = Order::new(1).unwrap();
    let frames = [memory.allocate(pair).unwrap(), memory.allocate(pair).unwrap()];
    let stamps = frames.map(|frame| memory.stamp(frame).unwrap());
    for (frame, stamp) in frames.into_iter().zip(stamps) {
        memory.copy(&Numbered, &mut [CopyJob::new(CopyKind::Clear { to: frame }, pair)]);
        memory.write(frame, stamp, 0, &[7]);
    }
    // The second half of one and the first of the other.
    memory.free(DeviceFrame(frames[0].0 + 1), pair);
    memory.free(DeviceFrame(8), Order::PAGE);
    assert_eq!(violations.list().len(), 2, "{violations:?}");
    for (frame, stamp) in frames.into_iter().zip(stamps) {
        assert_eq!(byte(&memory, frame, stamp), 7);
    }
    assert_eq!(violations.list().len(), 2, "{violations:?}");
    memory.check().unwrap();
}

#[test]
fn the_copy_engine_copies_clears_and_fails_as_it_is_told() {
    let (memory, injector, violations) = local(8);
    let order = Order::new(1).unwrap();
    let to = memory.allocate(order).unwrap();
    let stamp = memory.stamp(to).unwrap();
    let copy = CopyJob::new(CopyKind::In { from: Frame(40), to }, order);
    let clear = CopyJob::new(CopyKind::Clear { to }, order);
    let mut jobs = [copy];
    memory.copy(&Numbered, &mut jobs);
    assert!(jobs[0].is_complete());
    assert_eq!(byte(&memory, DeviceFrame(to.0 + 1), stamp), 41);
    let mut jobs = [clear];
    injector.fail("clear", 0);
    memory.copy(&Numbered, &mut jobs);
    assert!(!jobs[0].is_complete());
    memory.copy(&Numbered, &mut jobs);
    assert!(jobs[0].is_complete());
    assert_eq!(byte(&memory, to, stamp), 0);
    injector.fail("allocate", 0);
    assert!(memory.allocate(Order::PAGE).is_err());
    assert_eq!(violations.list().len(), 0);
    memory.free(to, order);
    let mut late = [CopyJob::new(CopyKind::In { from: Frame(1), to }, Order::PAGE)];
    memory.copy(&Numbered, &mut late);
    assert_eq!(violations.list().len(), 1, "a copy to memory that is free");
    assert_eq!(memory.available() as usize * PAGE_SIZE, 8 * PAGE_SIZE);
}

#[test]
fn words_in_memory_are_updated_whole() {
    let (memory, _, _) = local(1);
    let frame = memory.allocate(Order::PAGE).unwrap();
    let stamp = memory.stamp(frame).unwrap();
    memory.write(frame, stamp, 16, &0_u64.to_ne_bytes());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    memory.fetch_update(frame, stamp, 16, &mut |old| old + 1);
                }
            });
        }
    });
    assert_eq!(memory.fetch_update(frame, stamp, 16, &mut |old| old), 4000);
}
