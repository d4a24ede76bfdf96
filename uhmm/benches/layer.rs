//! What faults and migrations cost on the simulated address space, beside a copy of the same bytes.
//!
//! `cargo bench -p uhmm`. The figures and the machine are in `docs/performance.md`. The simulation
//! is not what anybody runs, so its own share is measured too: what is left is this crate's.
#![cfg(not(any(loom, shuttle)))]

#[path = "../tests/plain/mod.rs"]
mod plain;

use std::hint::black_box;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use criterion::{BatchSize, Bencher, Criterion, Throughput, criterion_group, criterion_main};
use plain::{Counted, Plain};
use uhmm::backend::{Placement, Select};
use uhmm::policy::{
    DensityPrefetch, FaultAround, LeastRecentlyUsed, MinimumResidency, Policies, ThrashThrottle,
};
use uhmm::sim::{Machine, Mapping, Process};
use uhmm::{
    Access, AddressSpace, CopyJob, CopyKind, Device, DeviceFrame, DeviceMemory, DevicePagemap,
    Event, Frame, Mirror, Order, OutOfDeviceMemory, PAGE_SIZE, Page, PageEntry, PageRange,
    PagemapOptions, RangeFault, SystemMemory,
};

/// One huge page, in pages.
const PAGES: usize = 512;

/// A device that does as little as one can: a flat table, and memory in one piece.
struct Bare {
    memory: Mutex<Memory>,
}

struct Memory {
    bytes: Vec<u8>,
    free: Vec<u64>,
    whole: bool,
}

impl Bare {
    /// Makes a device whose memory is given out whole or page by page.
    fn new(whole: bool) -> Arc<Bare> {
        let bytes = vec![0; PAGES * PAGE_SIZE];
        let free = if whole { vec![0] } else { (0..PAGES as u64).rev().collect() };
        Arc::new(Bare { memory: Mutex::new(Memory { bytes, free, whole }) })
    }
}

impl Device for Bare {
    type PageTable = Vec<PageEntry>;
    type Fence = ();

    fn page_table(&self, range: PageRange, _: &Arc<dyn SystemMemory>) -> Vec<PageEntry> {
        vec![PageEntry::default(); range.len()]
    }

    fn map(&self, table: &mut Vec<PageEntry>, range: PageRange, entries: &[PageEntry]) {
        table[range.first().number() as usize % PAGES..][..entries.len()].copy_from_slice(entries);
    }

    fn invalidate(&self, table: &mut Vec<PageEntry>, event: &Event) {
        let range = PageRange::covering(event.range());
        let first = range.first().number() as usize % PAGES;
        let last = (first + range.len()).min(PAGES);
        table[first..last].fill(PageEntry::default());
    }
}

impl DeviceMemory for Bare {
    fn capacity(&self) -> u64 {
        PAGES as u64
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        let mut memory = self.memory.lock().expect("no panic");
        let fits = memory.whole == (order == Order::HUGE);
        let frame = if fits { memory.free.pop() } else { None };
        frame.map(DeviceFrame).ok_or(OutOfDeviceMemory { order })
    }

    fn free(&self, frame: DeviceFrame, _: Order) {
        self.memory.lock().expect("no panic").free.push(frame.0);
    }

    fn copy(&self, system: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        let mut memory = self.memory.lock().expect("no panic");
        for job in jobs {
            let bytes = job.order().bytes();
            let at = |frame: DeviceFrame| frame.0 as usize * PAGE_SIZE;
            match job.kind() {
                CopyKind::In { from, to } => {
                    system.read(from, 0, &mut memory.bytes[at(to)..][..bytes]);
                }
                CopyKind::Out { from, to } => {
                    system.write(to, 0, &memory.bytes[at(from)..][..bytes]);
                }
                CopyKind::Clear { to } => memory.bytes[at(to)..][..bytes].fill(0),
            }
            job.complete();
        }
    }
}

struct Rig {
    process: Process,
    pagemap: Arc<DevicePagemap>,
    mirror: Mirror<Bare>,
    range: PageRange,
}

fn rig(huge: bool) -> Rig {
    let process = Machine::new().spawn();
    let range = PageRange::new(0x4000_0000, (PAGES * PAGE_SIZE) as u64).expect("a range");
    process.map(range, Mapping::anonymous(Access::Write).huge(huge)).expect("there is room");
    touch(&process, range);
    let device = Bare::new(huge);
    let options = PagemapOptions::new().policies(Policies::none());
    let pagemap = DevicePagemap::register_with(device.clone(), options);
    let mirror = process.address_space().mirror_with(&device, range, &pagemap).expect("it lives");
    Rig { process, pagemap, mirror, range }
}

fn touch(process: &Process, range: PageRange) {
    for page in range.iter() {
        process.store_u64(page.address(), page.number()).expect("memory is there");
    }
}

/// The least that a copy of 2 MiB can cost: in one piece, in pages, and by way of the simulation.
fn floor(c: &mut Criterion) {
    let mut group = c.benchmark_group("floor");
    group.throughput(Throughput::Bytes((PAGES * PAGE_SIZE) as u64));
    let (from, mut to) = (vec![1u8; PAGES * PAGE_SIZE], vec![0u8; PAGES * PAGE_SIZE]);
    group.bench_function("memcpy 2 MiB at once", |b| {
        b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
    });
    group.bench_function("memcpy 2 MiB by pages", |b| {
        b.iter(|| {
            for (to, from) in to.chunks_exact_mut(PAGE_SIZE).zip(from.chunks_exact(PAGE_SIZE)) {
                black_box(to).copy_from_slice(black_box(from));
            }
        });
    });
    let rig = rig(false);
    let space = rig.process.address_space();
    let memory = space.backend().memory();
    let frames: Vec<Frame> = space
        .snapshot(rig.range)
        .iter()
        .map(|entry| match entry.residency {
            uhmm::Residency::System(frame) => frame,
            residency => panic!("{residency:?}"),
        })
        .collect();
    group.bench_function("simulated memory, 2 MiB by pages", |b| {
        b.iter(|| {
            for (to, &frame) in to.chunks_exact_mut(PAGE_SIZE).zip(&frames) {
                memory.read(frame, 0, to);
            }
        });
    });
    group.finish();
}

fn range_fault(c: &mut Criterion) {
    let mut group = c.benchmark_group("range_fault");
    group.throughput(Throughput::Elements(PAGES as u64));
    let rig = rig(false);
    let space = rig.process.address_space();
    let mut entries = Vec::new();
    group.bench_function("floor: the simulation's own look at 512 pages", |b| {
        b.iter(|| {
            entries.clear();
            space.backend().snapshot(rig.range, black_box(&mut entries));
        });
    });
    group.bench_function("warm: 512 pages that are there", |b| {
        let request = RangeFault::write(rig.range);
        b.iter(|| rig.mirror.range_fault(black_box(&request)).expect("all are there"));
    });
    group.bench_function("warm: one page", |b| {
        let request = RangeFault::write(rig.range.first().into());
        b.iter(|| rig.mirror.range_fault(black_box(&request)).expect("it is there"));
    });
    group.bench_function("floor: the simulation faults 512 pages in", |b| {
        let discard = || rig.process.discard(rig.range);
        let fault = |()| {
            space.backend().fault(rig.range, Access::Write, None, None).expect("all can be had");
        };
        b.iter_batched(discard, fault, BatchSize::PerIteration);
    });
    group.bench_function("cold: 512 pages that were never touched", |b| {
        let request = RangeFault::write(rig.range);
        let discard = || rig.process.discard(rig.range);
        let fault = |()| rig.mirror.range_fault(&request).expect("all can be had");
        b.iter_batched(discard, fault, BatchSize::PerIteration);
    });
    group.finish();
}

fn migrate(c: &mut Criterion) {
    let mut group = c.benchmark_group("migrate");
    group.throughput(Throughput::Bytes((PAGES * PAGE_SIZE) as u64));
    for (name, huge) in [("512 pages of 4 KiB", false), ("a page of 2 MiB", true)] {
        let rig = rig(huge);
        let space = rig.process.address_space();
        let there = || {
            let report = space.migrate(rig.range, &rig.pagemap).run();
            assert_eq!(report.moved, PAGES as u64);
        };
        let home = || assert_eq!(space.migrate_home(rig.range).moved, PAGES as u64);
        group.bench_function(format!("{name}: to the device"), |b| {
            let at_home = || _ = space.migrate_home(rig.range);
            b.iter_batched(at_home, |()| there(), BatchSize::PerIteration);
        });
        space.migrate_home(rig.range);
        group.bench_function(format!("{name}: home"), |b| {
            b.iter_batched(there, |()| home(), BatchSize::PerIteration);
        });
        there();
        group.bench_function(format!("{name}: home by touching each page"), |b| {
            let there = || _ = space.migrate(rig.range, &rig.pagemap).run();
            b.iter_batched(there, |()| touch(&rig.process, rig.range), BatchSize::PerIteration);
        });
    }
    group.finish();
}

/// Pages without contents, on a device.
struct Empty {
    space: AddressSpace,
    pagemap: Arc<DevicePagemap>,
    range: PageRange,
}

impl Empty {
    fn new(in_place: bool, policies: Policies) -> Empty {
        let plain = Plain::new(PAGES, Order::PAGE);
        let options = PagemapOptions::new().policies(policies);
        let pagemap = DevicePagemap::register_with(Counted::new(in_place), options);
        let range = PageRange::new(0, (PAGES * PAGE_SIZE) as u64).expect("a range");
        Empty { space: AddressSpace::new(Arc::new(plain)), pagemap, range }
    }

    fn to_device(&self) {
        assert_eq!(self.space.migrate(self.range, &self.pagemap).run().moved, PAGES as u64);
    }

    /// Measures what brings one page home, `pause` after the one before it.
    fn bench_home(&self, b: &mut Bencher<'_>, pause: Duration, home: impl Fn(Page)) {
        let mut pages = self.range.iter();
        self.space.migrate_home(self.range);
        self.to_device();
        b.iter_custom(|iterations| {
            let mut time = Duration::ZERO;
            for _ in 0..iterations {
                let page = pages.next().unwrap_or_else(|| {
                    self.to_device();
                    pages = self.range.iter();
                    pages.next().expect("it has pages")
                });
                let before = Instant::now();
                while before.elapsed() < pause {}
                let start = Instant::now();
                home(page);
                time += start.elapsed();
            }
            time
        });
    }
}

/// The default policies, but that nothing comes home along with a page.
fn one_by_one() -> Policies {
    Policies::none()
        .and(DensityPrefetch::new())
        .and(FaultAround::new().order(Order::PAGE))
        .and(MinimumResidency::new())
        .and(ThrashThrottle::new())
        .and(LeastRecentlyUsed)
}

/// What this crate adds to the time of a move, on a backend that does nothing.
fn layer(c: &mut Criterion) {
    let mut group = c.benchmark_group("nothing but the layer");
    let plain = Empty::new(false, Policies::none());
    let select = Select::Device(plain.pagemap.owner());
    group.bench_function("floor: the backend's part of bringing one page home", |b| {
        plain.bench_home(b, Duration::ZERO, |page| {
            let mut isolation = plain.space.backend().isolate(page.into(), select);
            isolation.allocate_home(0).expect("there is always room");
            black_box(isolation.commit(vec![Placement::Home]));
        });
    });
    // The policies of time look at the last moments: faults come one in 10 us, as they do at best.
    let often = Duration::from_micros(10);
    for (name, in_place, policies, pause) in [
        ("no policies", false, Policies::none(), Duration::ZERO),
        ("no policies, in place", true, Policies::none(), Duration::ZERO),
        ("the default policies", false, one_by_one(), often),
    ] {
        let empty = Empty::new(in_place, policies);
        group.bench_function(format!("bring one page home: {name}"), |b| {
            empty.bench_home(b, pause, |page| {
                let backend = empty.space.backend();
                empty.pagemap.bring_home(backend, page, Order::PAGE).expect("nothing fails");
            });
        });
    }
    group.throughput(Throughput::Elements(PAGES as u64));
    for (name, in_place) in [("512 pages", false), ("512 pages, in place", true)] {
        let empty = Empty::new(in_place, Policies::none());
        group.bench_function(format!("{name}: to the device"), |b| {
            let at_home = || _ = empty.space.migrate_home(empty.range);
            b.iter_batched(at_home, |()| empty.to_device(), BatchSize::PerIteration);
        });
        empty.space.migrate_home(empty.range);
        group.bench_function(format!("{name}: home"), |b| {
            let home = |()| assert_eq!(empty.space.migrate_home(empty.range).moved, PAGES as u64);
            b.iter_batched(|| empty.to_device(), home, BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(benches, floor, range_fault, migrate, layer);
criterion_main!(benches);
