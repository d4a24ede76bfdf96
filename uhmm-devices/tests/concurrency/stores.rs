//! Two stores that everybody moves pages to, a process that touches them, and failures.

use std::sync::Arc;

use uhmm::policy::Policies;
use uhmm::primitive::atomic::{AtomicU64, Ordering::SeqCst};
use uhmm::primitive::{Mutex, lock, thread};
use uhmm::sim::{Machine, Mapping, Process, SimError};
use uhmm::{
    Access, Clock, CopyJob, CopyKind, DeviceFrame, DeviceMemory, DevicePagemap, FaultError, Frame,
    Injector, Order, PAGE_SIZE, PagemapOptions, SystemMemory,
};
use uhmm_devices::store::{Compressed, Mismatch, Store, StoreOptions, StoreSpec, Verification};

use super::common::{range, word};
use super::{Random, STEPS};

/// How many pages hold a word that everybody adds to.
const PAGES: u64 = if cfg!(shuttle) { 2 } else { 32 };

/// How many pages each pagemap may use: too few.
const LIMIT: u64 = if cfg!(shuttle) { 1 } else { 20 };

/// Steps of a store that are made to fail now and then. None may change an answer.
const FAILURES: [&str; 5] = ["allocate", "copy", "clear", "reserve", "release"];

struct World {
    machine: Machine,
    injector: Injector,
    stores: [(Store, Arc<DevicePagemap>); 2],
    /// What has been added to each word.
    added: Vec<AtomicU64>,
}

impl World {
    fn new() -> World {
        let injector = Injector::new();
        let path = std::env::temp_dir();
        let specs = [
            StoreSpec::Compressed { limit_bytes: None },
            StoreSpec::File { path, limit_bytes: None },
        ];
        let stores = specs.map(|spec| {
            let options = StoreOptions::new()
                .injector(injector.clone())
                .verification(Verification::report(|mismatch: &Mismatch| panic!("{mismatch}")));
            let store = spec.open(options).expect("a store can be made");
            let options = PagemapOptions::new()
                .limit(LIMIT)
                .policies(Policies::none())
                .clock(Clock::manual());
            let pagemap = DevicePagemap::register_with(store.memory(), options);
            (store, pagemap)
        });
        let added = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        World { machine: Machine::new(), injector, stores, added }
    }
}

/// Adds to words, at the beginning and at the end of pages that do not compress.
fn cpu(world: &World, process: &Process, random: &mut Random) {
    for _ in 0..STEPS {
        let page = random.below(PAGES);
        match process.fetch_add_u64(word(page), 1) {
            Ok(_) => drop(world.added[page as usize].fetch_add(1, SeqCst)),
            // It may have been made to fail.
            Err(SimError::Fault(FaultError::CopyFailed { .. })) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn mover(world: &World, process: &Process, random: &mut Random) {
    let space = process.address_space();
    for _ in 0..STEPS {
        let first = random.below(PAGES);
        let pages = range(first, 1 + random.below(PAGES - first));
        let (store, pagemap) = &world.stores[random.below(2) as usize];
        match random.below(8) {
            0 => drop(space.migrate_home(pages)),
            1 => drop(pagemap.evict(1 + random.below(PAGES))),
            2 => {
                let failure = FAILURES[random.below(FAILURES.len() as u64) as usize];
                world.injector.fail(failure, random.below(3));
            }
            3 => {
                store.compact(PAGES);
            }
            _ => drop(space.migrate(pages, pagemap).run()),
        }
    }
}

/// Fills each page but for its first word: some with what does not compress, some with little.
fn fill(process: &Process, random: &mut Random) {
    for page in 0..PAGES {
        let noisy = 1 + random.below(PAGE_SIZE as u64 / 8);
        for index in 1..noisy {
            let word = word(page) + 8 * index;
            process.store_u64(word, checked(page, index)).expect("memory is there");
        }
        // How far it is filled is the last word, which compresses.
        let last = word(page) + PAGE_SIZE as u64 - 8;
        process.store_u64(last, noisy).expect("memory is there");
    }
}

fn checked(page: u64, index: u64) -> u64 {
    (page * 512 + index).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn check(world: &World, process: &Process) {
    let load = |address| process.load_u64(address).expect("memory is there");
    for (page, added) in (0..).zip(&world.added) {
        assert_eq!(load(word(page)), added.load(SeqCst), "page {page} lost or gained");
        let noisy = load(word(page) + PAGE_SIZE as u64 - 8);
        for index in 1..noisy.min(PAGE_SIZE as u64 / 8 - 1) {
            assert_eq!(load(word(page) + 8 * index), checked(page, index), "page {page}");
        }
    }
}

pub(super) fn round(seed: u64) {
    let mut random = Random::new(seed);
    let world = Arc::new(World::new());
    let process = world.machine.spawn();
    process.map(range(0, PAGES), Mapping::anonymous(Access::Write)).expect("there is room");
    fill(&process, &mut random);
    let works: [fn(&World, &Process, &mut Random); 4] = [cpu, mover, cpu, mover];
    let threads: Vec<_> = works[..if cfg!(shuttle) { 3 } else { 4 }]
        .iter()
        .enumerate()
        .map(|(number, work)| {
            let (world, process, work) = (Arc::clone(&world), process.clone(), *work);
            let mut random = Random::new(seed.wrapping_mul(31).wrapping_add(number as u64));
            thread::spawn(move || work(&world, &process, &mut random))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    world.injector.clear();
    for (store, pagemap) in &world.stores {
        store.check().expect("the statistics are right");
        assert_eq!(store.statistics().pages(), pagemap.used());
        assert_eq!((store.statistics().failed_reads, store.statistics().mismatches), (0, 0));
    }
    check(&world, &process);
    drop(process);
    for (store, pagemap) in &world.stores {
        assert_eq!((store.statistics().pages(), pagemap.used()), (0, 0));
        store.check().expect("the statistics are right");
    }
}

/// System memory of one page, which does not compress.
struct OnePage(Mutex<[u8; PAGE_SIZE]>);

impl OnePage {
    fn new(seed: u64) -> OnePage {
        let mut page = [0; PAGE_SIZE];
        for (word, index) in page.as_chunks_mut::<8>().0.iter_mut().zip(0..) {
            *word = checked(seed + 1, index).rotate_left(29).to_ne_bytes();
        }
        OnePage(Mutex::new(page))
    }
}

impl SystemMemory for OnePage {
    fn read(&self, _: Frame, _: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&*lock(&self.0));
    }

    fn write(&self, _: Frame, _: usize, bytes: &[u8]) {
        lock(&self.0).copy_from_slice(bytes);
    }

    fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
        unreachable!("stores update nothing")
    }
}

fn put(store: &Compressed, seed: u64) -> DeviceFrame {
    let to = store.allocate(Order::PAGE).expect("there is room");
    let mut jobs = [CopyJob::new(CopyKind::In { from: Frame(0), to }, Order::PAGE)];
    store.copy(&OnePage::new(seed), &mut jobs);
    assert!(jobs[0].is_complete());
    to
}

fn assert_holds(store: &Compressed, from: DeviceFrame, seed: u64) {
    let memory = OnePage::new(1000);
    let mut jobs = [CopyJob::new(CopyKind::Out { from, to: Frame(0) }, Order::PAGE)];
    store.copy(&memory, &mut jobs);
    assert!(jobs[0].is_complete());
    let (found, stored) = (*lock(&memory.0), *lock(&OnePage::new(seed).0));
    assert!(found == stored, "page {seed} is not what was stored");
}

/// Pages are fetched, freed and stored while they are moved together. Four fill a slab, so half of
/// three slabs is enough for some to be moved.
pub(super) fn compaction(_: u64) {
    let store = Arc::new(Compressed::new(StoreOptions::new()));
    let all: Vec<DeviceFrame> = (0..12).map(|seed| put(&store, seed)).collect();
    let (mut kept, mut freed) = (Vec::new(), Vec::new());
    for (frame, seed) in all.into_iter().zip(0..) {
        if seed % 2 == 1 { kept.push((frame, seed)) } else { freed.push(frame) }
    }
    freed.into_iter().for_each(|frame| store.free(frame, Order::PAGE));
    let spawn = |work: Box<dyn FnOnce(&Compressed) -> u64 + Send>| {
        let store = Arc::clone(&store);
        thread::spawn(move || work(&store))
    };
    let last = kept.pop().expect("there are six");
    let read = kept.clone();
    let threads = [
        spawn(Box::new(|store| store.compact(8))),
        spawn(Box::new(move |store| {
            read.into_iter().for_each(|(frame, seed)| assert_holds(store, frame, seed));
            0
        })),
        spawn(Box::new(move |store| {
            store.free(last.0, Order::PAGE);
            let frame = put(store, 50);
            assert_holds(store, frame, 50);
            store.free(frame, Order::PAGE);
            0
        })),
    ];
    for thread in threads {
        thread.join().expect("no panic");
    }
    store.compact(8);
    kept.iter().for_each(|&(frame, seed)| assert_holds(&store, frame, seed));
    store.check().expect("the statistics are right");
    assert_eq!(
        store.statistics().taken_bytes,
        2 * 4 * PAGE_SIZE as u64,
        "five pages fill two slabs"
    );
}
