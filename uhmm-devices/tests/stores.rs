//! Stores as the memory that pages of a process go to: there, home, and what fails on the way.
#![cfg(all(target_os = "linux", not(any(loom, shuttle))))]

mod common;

use std::sync::Arc;

use common::{page, range, word};
use uhmm::policy::Policies;
use uhmm::sim::{Machine, Mapping, Process, SimError};
use uhmm::{
    Access, Clock, DevicePagemap, FaultError, Injector, Order, PAGE_SIZE, PagemapOptions,
    Residency, StayReason,
};
use uhmm_devices::store::{Compressed, Mismatch, Store, StoreOptions, StoreSpec, Verification};

struct Rig {
    machine: Machine,
    process: Process,
    store: Store,
    pagemap: Arc<DevicePagemap>,
    injector: Injector,
}

impl Rig {
    /// Maps `pages` pages, page `i` filled with words that begin with `i + 1`.
    fn new(spec: &StoreSpec, pages: u64, mapping: Mapping, options: StoreOptions) -> Rig {
        let machine = Machine::new();
        let process = machine.spawn();
        process.map(range(0, pages), mapping).expect("memory is mapped");
        for index in 0..pages {
            process.store(word(index), &contents(index)).expect("memory is there");
        }
        let injector = Injector::new();
        let report = |mismatch: &Mismatch| panic!("{mismatch}");
        let options = options.injector(injector.clone()).verification(Verification::report(report));
        let store = spec.open(options).expect("a store can be made");
        let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
        let pagemap = DevicePagemap::register_with(store.memory(), options);
        Rig { machine, process, store, pagemap, injector }
    }

    fn is_out(&self, index: u64) -> bool {
        let entry = self.process.address_space().snapshot(page(index).into())[0];
        matches!(entry.residency, Residency::Device(_))
    }

    fn check(&self, pages: u64) {
        for index in 0..pages {
            let mut bytes = [0; PAGE_SIZE];
            self.process.load(word(index), &mut bytes).expect("memory is there");
            assert_eq!(bytes, contents(index), "page {index}");
        }
    }

    /// Checks that nothing is left of the process.
    fn finish(self) {
        self.process.exit();
        assert_eq!((self.store.statistics().pages(), self.pagemap.used()), (0, 0));
        self.store.check().expect("the statistics are right");
        self.machine.check().expect("the machine is whole");
        assert_eq!(self.machine.violations(), [""; 0]);
    }
}

/// What page `index` holds: of every fourth nothing but a word, of others more and more that does
/// not compress.
fn contents(index: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    let words = if index.is_multiple_of(4) { 512 } else { index as usize * 37 % 512 };
    let (chunks, _) = bytes.as_chunks_mut::<8>();
    for (chunk, at) in chunks[..words].iter_mut().zip(1_u64..) {
        let step = if index.is_multiple_of(4) { 1 } else { at };
        let word = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul(step);
        *chunk = word.to_ne_bytes();
    }
    bytes
}

/// Runs `test` with a store of each kind.
fn each(test: impl Fn(&StoreSpec)) {
    test(&StoreSpec::Compressed { limit_bytes: None });
    test(&StoreSpec::File { path: std::env::temp_dir(), limit_bytes: None });
}

fn anonymous() -> Mapping {
    Mapping::anonymous(Access::Write)
}

#[test]
fn pages_leave_and_come_home_when_touched() {
    each(|spec| {
        let rig = Rig::new(spec, 100, anonymous(), StoreOptions::new());
        let report = rig.process.address_space().migrate(range(0, 100), &rig.pagemap).run();
        assert_eq!((report.moved, report.stayed.len()), (100, 0));
        assert_eq!(rig.store.statistics().pages(), 100);
        assert_eq!(rig.process.fetch_add_u64(word(7), 0), rig.process.load_u64(word(7)));
        assert!(!rig.is_out(7) && rig.is_out(6) && rig.is_out(8));
        assert_eq!(rig.store.statistics().pages(), 99);
        rig.check(100);
        assert_eq!(rig.store.statistics().pages(), 0);
        rig.finish();
    });
}

#[test]
fn huge_pages_leave_whole_or_in_pieces_and_are_the_same_at_home() {
    for largest in [Order::HUGE, Order::PAGE] {
        each(|spec| {
            let options = StoreOptions::new().largest_block(largest);
            let rig = Rig::new(spec, 512, anonymous().huge(true), options);
            let report = rig.process.address_space().migrate(range(0, 512), &rig.pagemap).run();
            assert_eq!((report.moved, report.stayed.len()), (512, 0));
            let split = rig.pagemap.statistics().splits;
            assert_eq!(split, u64::from(largest == Order::PAGE));
            // A part of it is unmapped, so the block comes back in pieces.
            rig.process.unmap(range(100, 200));
            assert_eq!(rig.store.statistics().pages(), 312);
            rig.store.check().expect("the statistics are right");
            rig.check(100);
            for index in 300..512 {
                let mut bytes = [0; PAGE_SIZE];
                rig.process.load(word(index), &mut bytes).expect("memory is there");
                assert_eq!(bytes, contents(index), "page {index}");
            }
            rig.finish();
        });
    }
}

#[test]
fn pages_that_were_never_touched_take_nothing() {
    each(|spec| {
        let rig = Rig::new(spec, 0x10, anonymous(), StoreOptions::new());
        rig.process.map(range(0x10, 0x10), anonymous()).expect("memory is mapped");
        let report = rig.process.address_space().migrate(range(0x10, 0x10), &rig.pagemap).run();
        assert_eq!((report.moved, report.without_copy), (0x10, 0x10));
        let held = rig.store.statistics();
        assert_eq!((held.zero_pages, held.stored_bytes), (0x10, 0));
        assert_eq!(rig.process.load_u64(word(0x15)), Ok(0));
        rig.finish();
    });
}

#[test]
fn what_is_unmapped_and_what_a_process_leaves_is_freed() {
    each(|spec| {
        let rig = Rig::new(spec, 64, anonymous(), StoreOptions::new());
        rig.process.address_space().migrate(range(0, 64), &rig.pagemap).run();
        rig.process.discard(range(0, 16));
        rig.process.unmap(range(16, 16));
        assert_eq!(rig.store.statistics().pages(), 32);
        assert_eq!(rig.process.load_u64(word(3)), Ok(0));
        rig.finish();
    });
}

#[test]
fn a_child_has_what_its_parent_had_out() {
    each(|spec| {
        let rig = Rig::new(spec, 32, anonymous(), StoreOptions::new());
        rig.process.address_space().migrate(range(0, 32), &rig.pagemap).run();
        let child = rig.process.fork().expect("there is room");
        rig.process.store_u64(word(3), 99).expect("memory is there");
        assert_ne!(child.load_u64(word(3)), Ok(99));
        let mut bytes = [0; PAGE_SIZE];
        child.load(word(5), &mut bytes).expect("memory is there");
        assert_eq!(bytes, contents(5));
        child.exit();
        rig.finish();
    });
}

#[test]
fn a_copy_that_fails_leaves_the_page_where_it_is() {
    each(|spec| {
        let rig = Rig::new(spec, 8, anonymous(), StoreOptions::new());
        rig.injector.fail_always("copy");
        let report = rig.process.address_space().migrate(range(0, 8), &rig.pagemap).run();
        assert_eq!(report.moved, 0);
        assert!(report.stayed.iter().all(|stayed| stayed.reason == StayReason::CopyFailed));
        assert_eq!((rig.store.statistics().pages(), rig.pagemap.used()), (0, 0));
        rig.injector.clear();
        rig.process.address_space().migrate(range(0, 8), &rig.pagemap).run();

        rig.injector.fail_always("copy");
        let error = rig.process.load_u64(word(2)).expect_err("it cannot come home");
        assert_eq!(error, SimError::Fault(FaultError::CopyFailed { page: page(2) }));
        assert!(rig.is_out(2));
        rig.injector.clear();
        rig.check(8);
        rig.finish();
    });
}

#[test]
fn at_the_limit_of_compressed_memory_pages_stay_and_none_comes_home_for_it() {
    let spec = StoreSpec::Compressed { limit_bytes: Some(Compressed::LEAST_LIMIT) };
    let rig = Rig::new(&spec, 256, anonymous(), StoreOptions::new());
    let report = rig.process.address_space().migrate(range(0, 256), &rig.pagemap).run();
    assert!(report.moved > 0 && report.moved < 256, "{} moved", report.moved);
    assert!(report.stayed.iter().all(|stayed| stayed.reason == StayReason::CopyFailed));
    assert_eq!(rig.pagemap.statistics().home_by_eviction, 0);
    assert!(rig.store.statistics().peak_bytes <= Compressed::LEAST_LIMIT);
    rig.check(256);
    rig.finish();
}

#[test]
fn a_full_pagemap_moves_the_oldest_home() {
    each(|spec| {
        let rig = Rig::new(spec, 64, anonymous(), StoreOptions::new());
        let limited = PagemapOptions::new().limit(16).clock(Clock::manual());
        let pagemap = DevicePagemap::register_with(rig.store.memory(), limited);
        for first in (0..64).step_by(8) {
            let report = rig.process.address_space().migrate(range(first, 8), &pagemap).run();
            assert_eq!(report.moved, 8);
        }
        assert_eq!((pagemap.used(), pagemap.statistics().home_by_eviction), (16, 48));
        pagemap.evict_all().expect("all can come home");
        rig.check(64);
        rig.finish();
    });
}

#[test]
fn pages_go_from_one_store_to_the_other() {
    each(|spec| {
        let rig = Rig::new(spec, 64, anonymous(), StoreOptions::new());
        let other = Store::parse("lz4").expect("there is memory");
        let pagemap = DevicePagemap::register(other.memory());
        let space = rig.process.address_space();
        for to in [&rig.pagemap, &pagemap, &rig.pagemap] {
            assert_eq!(space.migrate(range(0, 64), to).run().moved, 64);
        }
        assert_eq!((rig.store.statistics().pages(), other.statistics().pages()), (64, 0));
        rig.check(64);
        rig.finish();
    });
}
