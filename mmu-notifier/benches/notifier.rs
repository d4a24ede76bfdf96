//! What the hot paths cost, beside the floor of what any lock or atomic costs, in one run.
//!
//! `cargo bench -p mmu-notifier`. The figures and the machine are in `docs/performance.md`.
#![cfg(not(any(loom, shuttle)))]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use mmu_notifier::{Event, EventKind, Notifier, Subscription, Subscriptions, VaRange};

/// A device that stops by having a word changed.
struct Device(u64);

impl Notifier for Device {
    type Fence = ();

    fn invalidate(&mut self, event: &Event) {
        self.0 ^= event.range().start();
    }
}

const PAGE: u64 = 4096;

fn page(number: u64) -> VaRange {
    VaRange::new(number * PAGE, PAGE).expect("a page of a small number does not wrap")
}

fn unmap(number: u64) -> Event {
    Event::new(EventKind::Unmap, page(number))
}

/// A pseudo-random walk over page numbers below `n`, a power of two.
fn walk(seed: &mut u64, n: u64) -> u64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*seed >> 33) & (n - 1)
}

fn populated(n: u64) -> (Arc<Subscriptions>, Vec<Subscription<Device>>) {
    let space = Subscriptions::new();
    // In no order, as programs do: multiplying by an odd number permutes the pages.
    let place = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15 | 1) & (n - 1);
    let subscribe = |i| space.subscribe(page(place(i)), Device(0)).expect("the space lives");
    let all = (0..n).map(subscribe).collect();
    (space, all)
}

/// What nothing can be faster than: the atomics and locks that each path must have.
fn floor(c: &mut Criterion) {
    let mut group = c.benchmark_group("floor");
    let word = AtomicU64::new(0);
    group.bench_function("atomic increment and decrement", |b| {
        b.iter(|| {
            word.fetch_add(1, Ordering::Acquire);
            word.fetch_sub(1, Ordering::Release);
        });
    });
    let lock = Mutex::new(0u64);
    group.bench_function("lock and unlock", |b| b.iter(|| *lock.lock().unwrap() += 1));
    let shared = crossbeam_utils::sync::ShardedLock::new(0u64);
    group.bench_function("a share of a sharded lock", |b| b.iter(|| *shared.read().unwrap()));
    group.finish();
}

fn announce(c: &mut Criterion) {
    let mut group = c.benchmark_group("announce and end");
    let space = Subscriptions::new();
    group.bench_function("nobody subscribed", |b| {
        b.iter(|| drop(space.invalidate_range_start(unmap(black_box(1)))));
    });
    for hits in [0, 1, 8, 9] {
        let (space, _all) = populated(1);
        let at_five = |_| space.subscribe(page(5), Device(0)).expect("the space lives");
        let _others: Vec<_> = (0..hits).map(at_five).collect();
        group.bench_function(format!("{hits} hits"), |b| {
            b.iter(|| drop(space.invalidate_range_start(unmap(black_box(5)))));
        });
    }
    let (space, _all) = populated(1 << 20);
    let mut seed = 1;
    group.bench_function("1 hit among 1048576", |b| {
        b.iter(|| drop(space.invalidate_range_start(unmap(walk(&mut seed, 1 << 20)))));
    });
    group.finish();
}

fn read(c: &mut Criterion) {
    let (_space, all) = populated(1);
    c.bench_function("read_begin and commit", |b| {
        b.iter(|| {
            let section = all[0].read_begin().unwrap();
            section.commit().unwrap().0 += 1;
        });
    });
}

fn subscribe(c: &mut Criterion) {
    let mut group = c.benchmark_group("among 1048576");
    let (space, mut all) = populated(1 << 20);
    let mut seed = 1;
    // Insert and remove are timed apart from each other, over the same random places.
    const BATCH: u64 = 1024;
    group.bench_function("subscribe", |b| {
        b.iter_custom(|iterations| {
            let mut time = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                let batch = left.min(BATCH);
                let places: Vec<u64> = (0..batch).map(|_| walk(&mut seed, 1 << 20)).collect();
                let mut made = Vec::with_capacity(batch as usize);
                let start = Instant::now();
                for &place in &places {
                    made.push(space.subscribe(page(place), Device(0)).unwrap());
                }
                time += start.elapsed();
                left -= batch;
            }
            time
        });
    });
    group.bench_function("unsubscribe", |b| {
        b.iter_custom(|iterations| {
            let mut time = Duration::ZERO;
            let mut left = iterations;
            while left > 0 {
                let batch = left.min(BATCH);
                // Any of the million, not those that were made last.
                let take = |_| all.swap_remove(walk(&mut seed, 1 << 19) as usize);
                let victims: Vec<_> = (0..batch).map(take).collect();
                let ranges: Vec<_> = victims.iter().map(|victim| victim.range()).collect();
                let start = Instant::now();
                for victim in victims {
                    black_box(victim.unsubscribe());
                }
                time += start.elapsed();
                all.extend(ranges.into_iter().map(|at| space.subscribe(at, Device(0)).unwrap()));
                left -= batch;
            }
            time
        });
    });
    group.bench_function("set_range", |b| {
        let mut moving = space.subscribe(page(0), Device(0)).unwrap();
        b.iter(|| moving.set_range(page(walk(&mut seed, 1 << 20))).unwrap());
    });
    group.finish();
}

/// Announcements of disjoint ranges, by one thread and by two at once: the time for each thread's
/// share. Equal times are a scaling of 2.
fn scaling(c: &mut Criterion) {
    let mut group = c.benchmark_group("disjoint ranges");
    for threads in [1, 2] {
        group.bench_function(format!("{threads} threads"), |b| {
            b.iter_custom(|iterations| {
                let (space, _all) = populated(2);
                let barrier = Barrier::new(threads);
                let mut times = vec![Duration::ZERO; threads];
                std::thread::scope(|scope| {
                    for (number, time) in times.iter_mut().enumerate() {
                        let (space, barrier) = (&space, &barrier);
                        scope.spawn(move || {
                            barrier.wait();
                            let start = Instant::now();
                            for _ in 0..iterations {
                                drop(space.invalidate_range_start(unmap(number as u64)));
                            }
                            *time = start.elapsed();
                        });
                    }
                });
                times.into_iter().max().unwrap_or_default()
            });
        });
    }
    group.finish();
}

/// Prints what a million subscriptions of an 8-byte notifier occupy. No time is measured.
fn memory(_: &mut Criterion) {
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
        pages.unwrap_or_default() * PAGE
    };
    let before = resident();
    let (_space, _all) = populated(1 << 20);
    let bytes = (resident().saturating_sub(before)) as f64 / (1 << 20) as f64;
    println!("memory: {bytes:.0} bytes resident per subscription, its handle's 24 included\n");
}

/// The same pages of one subscription each, invalidated while another thread commits to it.
fn contended(c: &mut Criterion) {
    let (space, all) = populated(1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if let Ok(section) = all[0].read_begin() {
                    let _ = section.commit().map(|mut update| update.0 += 1);
                }
            }
        });
        c.bench_function("announce and end against a committing reader", |b| {
            b.iter(|| drop(space.invalidate_range_start(unmap(black_box(0)))));
        });
        stop.store(true, Ordering::Relaxed);
    });
}

criterion_group!(benches, memory, floor, announce, read, subscribe, scaling, contended);
criterion_main!(benches);
