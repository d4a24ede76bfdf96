//! Threads that allocate, look and free all the time, while what they have is sent to devices.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use uhmm::{DevicePagemap, PAGE_SIZE, PageRange};
use uhmm_linux::{Options, Process, movable};

/// How many threads allocate.
const THREADS: u64 = 4;

/// How long.
const TIME: Duration = Duration::from_secs(4);

/// What is allocated at the moment, by its first address and its size in bytes.
type Live = Mutex<Vec<(u64, u64)>>;

/// A sequence of numbers that looks random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

/// Attaches the process, and has its heap away and in use at once.
pub(crate) fn churn() {
    let process = Process::attach(Options::new()).unwrap_or_else(|error| panic!("{error}"));
    let live: Live = Mutex::default();
    let ended = AtomicBool::new(false);
    let (moved, looked) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| send_away(&process, &live, &ended, &moved));
        }
        let users: Vec<_> = (0..THREADS)
            .map(|seed| {
                let (live, looked) = (&live, &looked);
                scope.spawn(move || allocate(seed, live, looked))
            })
            .collect();
        for user in users {
            user.join().expect("everything was there");
        }
        ended.store(true, Ordering::SeqCst);
    });
    let (moved, looked) = (moved.into_inner(), looked.into_inner());
    let statistics = process.statistics();
    println!("{looked} allocations, {moved} pages sent away, {statistics:?}");
    assert!(moved > 200, "{moved} pages were sent away");
    assert!(statistics.faults > 100, "{statistics:?}");
    assert!(looked > 200, "{looked} allocations");
}

/// Sends to a device what is allocated at the moment, as far as it goes.
fn send_away(process: &Process, live: &Live, ended: &AtomicBool, moved: &AtomicU64) {
    let host = DevicePagemap::register(process.host_memory(1 << 16));
    let mut numbers = Numbers(99);
    while !ended.load(Ordering::SeqCst) {
        let found = {
            let live = live.lock().expect("nobody panics");
            let index = numbers.next(live.len().max(1) as u64) as usize;
            live.get(index).copied()
        };
        let Some((address, bytes)) = found else {
            thread::yield_now();
            continue;
        };
        let page = PAGE_SIZE as u64;
        let first = address / page * page;
        let range = PageRange::new(first, (address + bytes).next_multiple_of(page) - first);
        let report = process.migrate(range.expect("whole pages"), &host).run();
        moved.fetch_add(report.moved, Ordering::Relaxed);
    }
}

/// Allocates, compares and frees.
fn allocate(seed: u64, live: &Live, looked: &AtomicU64) {
    let mut numbers = Numbers(seed);
    let mut own: Vec<(u64, Vec<u64>)> = Vec::new();
    let began = Instant::now();
    let mut stamp = seed << 32;
    while began.elapsed() < TIME {
        stamp += 1;
        // Small ones, large ones, and some that the allocator maps by themselves.
        let words = match numbers.next(16) {
            0 => 1 << (15 + numbers.next(3)),
            1..4 => 512 + numbers.next(8192),
            _ => 1 + numbers.next(300),
        };
        let data = movable(|| (0..words).map(|word| stamp ^ word).collect::<Vec<u64>>());
        live.lock().expect("nobody panics").push((data.as_ptr() as u64, words * 8));
        own.push((stamp, data));
        if own.len() > 200 {
            let (stamp, mut data) = own.swap_remove(numbers.next(200) as usize);
            check(stamp, &data);
            let address = data.as_ptr() as u64;
            live.lock().expect("nobody panics").retain(|&(at, _)| at != address);
            // What it is resized to is movable as well.
            let before = data.len();
            data.extend((0..before as u64).map(|word| stamp ^ (before as u64 + word)));
            check(stamp, &data);
            looked.fetch_add(1, Ordering::Relaxed);
        }
    }
    let mut live = live.lock().expect("nobody panics");
    for (stamp, data) in own {
        check(stamp, &data);
        let address = data.as_ptr() as u64;
        live.retain(|&(at, _)| at != address);
    }
}

fn check(stamp: u64, data: &[u64]) {
    for (index, &word) in data.iter().enumerate() {
        assert_eq!(word, stamp ^ index as u64, "word {index} of {}", data.len());
    }
}
