//! What caches of registrations, restorers and far memory are known to do wrong in a live process:
//! the list in `docs/regressions.md`.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::memory::{Backing, Mapping, RW, advise, map, place, remap, unmap};
use common::rig::{Gpu, TestMirror, attach, device_load};
use common::{eventually, in_own_process, trap};
use mmu_notifier::{Event, Notifier};
use uhmm::{DevicePagemap, FaultError, PageRange};
use uhmm_linux::Process;

/// A device that needs a lock of the program's to stop.
struct NeedsLock {
    lock: Arc<Mutex<u64>>,
}

impl Notifier for NeedsLock {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        *self.lock.lock().expect("nobody panics") += 1;
    }
}

#[test]
fn a_lock_that_a_device_needs_may_be_held_across_munmap() {
    in_own_process(|| {
        let process = attach();
        let host = DevicePagemap::register(process.host_memory(64));
        let mapping = Mapping::anonymous(64);
        mapping.fill(|index| 1 + index);
        let lock = Arc::new(Mutex::new(0));
        let device = NeedsLock { lock: Arc::clone(&lock) };
        let notifiers = process.backend().notifiers();
        let subscription = notifiers.subscribe(mapping.range().va_range(), device);
        let subscription = subscription.expect("it is attached");
        process.snapshot(mapping.range());
        for part in 0..8 {
            process.migrate(mapping.part(part * 8 + 4, 4), &host).run();
            let other = Mapping::anonymous(1);
            other.poke(0, 9);
            process.migrate(other.range(), &host).run();
            let mut held = lock.lock().expect("nobody panics");
            *held = 0;
            unmap(mapping.part(part * 8, 2));
            advise(mapping.part(part * 8 + 2, 2), libc::MADV_DONTNEED).expect("it is mapped");
            // What is away comes home although the device cannot be told yet.
            assert_eq!(other.peek(0), 9);
            drop(held);
            assert!(eventually(|| *lock.lock().expect("nobody panics") > 0), "part {part}");
        }
        drop(subscription);
    });
}

/// How an address comes to be another page.
#[derive(Clone, Copy, Debug)]
enum Change {
    UnmapAndMap,
    MapOver,
    Discard,
    RawCalls,
    MoveThere,
}

const CHANGES: [Change; 5] =
    [Change::UnmapAndMap, Change::MapOver, Change::Discard, Change::RawCalls, Change::MoveThere];

impl Change {
    fn make(self, range: PageRange) {
        match self {
            Change::UnmapAndMap => {
                unmap(range);
                map(range, Backing::Anonymous, RW).expect("nothing is there");
            }
            Change::MapOver => map(range, Backing::Anonymous, RW).expect("it is for tests"),
            Change::Discard => advise(range, libc::MADV_DONTNEED).expect("it is mapped"),
            Change::RawCalls => raw_unmap_and_map(range),
            Change::MoveThere => {
                let other = place(range.pages());
                map(other, Backing::Anonymous, RW).expect("nothing is there");
                remap(other, range.first()).expect("both are for tests");
            }
        }
    }
}

/// Does it without the C library.
fn raw_unmap_and_map(range: PageRange) {
    let (at, bytes) = (range.address(), range.va_range().last() - range.address() + 1);
    // SAFETY: the range is one that tests map and unmap, and holds no Rust object.
    let unmapped = unsafe { libc::syscall(libc::SYS_munmap, at, bytes) };
    assert_eq!(unmapped, 0);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: as above; what is mapped replaces nothing.
    let mapped = unsafe { libc::syscall(libc::SYS_mmap, at, bytes, rights, flags, -1, 0) };
    assert_eq!(mapped as u64, at);
}

/// A page whose contents say how often it was replaced, and which thread replaces it.
struct Generations {
    range: PageRange,
    /// Odd while it is being replaced.
    now: AtomicU64,
    ended: AtomicBool,
}

impl Generations {
    fn replace(&self, change: Change) {
        while !self.ended.load(Ordering::SeqCst) {
            let next = self.now.fetch_add(1, Ordering::SeqCst) + 2;
            change.make(self.range);
            trap::store(self.range.address(), next).expect("it is mapped");
            self.now.store(next, Ordering::SeqCst);
            thread::yield_now();
        }
    }

    /// Loads it as the device, and tells whether that was of before it was replaced: a hit on what
    /// a registration remembered. What is read while it is being replaced may be nothing.
    fn is_stale(&self, mirror: &TestMirror) -> Result<bool, FaultError> {
        let before = self.now.load(Ordering::SeqCst);
        let loaded = device_load(mirror, self.range.first());
        let after = self.now.load(Ordering::SeqCst);
        match loaded {
            Ok(0) | Err(FaultError::Hole { .. }) => Ok(before == after && before.is_multiple_of(2)),
            Ok(found) => Ok(found < before & !1),
            Err(error) => Err(error),
        }
    }
}

fn race(process: &Process, gpu: &Gpu, change: Change, anew: bool) -> (u64, u64) {
    let range = place(1);
    map(range, Backing::Anonymous, RW).expect("nothing is there");
    let page = Generations { range, now: AtomicU64::new(0), ended: AtomicBool::new(false) };
    let (mut loads, mut stale, mut failed) = (0, 0, None);
    thread::scope(|scope| {
        scope.spawn(|| page.replace(change));
        assert!(eventually(|| page.now.load(Ordering::SeqCst) > 4));
        let began = Instant::now();
        let mut mirror = gpu.mirror(process, range);
        while began.elapsed() < Duration::from_millis(700) && failed.is_none() {
            loads += 1;
            match page.is_stale(&mirror) {
                Ok(is_stale) => stale += u64::from(is_stale),
                Err(error) => failed = Some(error),
            }
            if anew {
                mirror = gpu.mirror(process, range);
            }
        }
        page.ended.store(true, Ordering::SeqCst);
    });
    let generations = page.now.load(Ordering::SeqCst) / 2;
    println!("{change:?}, anew: {anew}: {loads} loads, {generations} generations, {stale} stale");
    unmap(range);
    assert_eq!(failed, None, "{change:?}, after {loads} loads");
    assert!(loads > 50 && generations > 50, "{change:?}: {loads} loads of {generations}");
    (loads, stale)
}

/// A registration of an address that another thread maps anew all the time, in each of the ways
/// that caches of registrations are measured by. The device reads system memory, which it reaches
/// by its address; what is in its own memory takes changes that are announced.
#[test]
fn a_registration_that_races_a_change_of_its_mapping_is_not_stale() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(0);
        for change in CHANGES {
            for anew in [false, true] {
                let (loads, stale) = race(&process, &gpu, change, anew);
                assert_eq!(stale, 0, "{change:?}: of {loads} loads");
            }
        }
    });
}

/// A page that was never touched, beside some that are away, is zeroes at once; also where a device
/// has looked at it, and in a system call.
#[test]
fn untouched_pages_beside_what_is_away_hang_nobody() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(512);
        mapping.poke(0, 1);
        let mirror = gpu.mirror(&process, mapping.range());
        assert_eq!(process.migrate(mapping.part(0, 1), &gpu.pagemap).run().moved, 1);
        process.snapshot(mapping.range());
        for index in 1..100 {
            assert_eq!(mapping.peek(index), 0);
        }
        for index in 100..200 {
            assert_eq!(device_load(&mirror, mapping.page(index)), Ok(0));
        }
        let (read, write) = rustix::pipe::pipe().expect("descriptors");
        for index in 200..300 {
            // SAFETY: the kernel checks the address.
            let written = unsafe {
                libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), mapping.word(index) as _, 8)
            };
            assert_eq!(written, 8);
            let mut word = [1; 8];
            assert_eq!(rustix::io::read(&read, &mut word[..]), Ok(8));
            assert_eq!(word, [0; 8]);
        }
        assert_eq!(mapping.peek(0), 1);
    });
}

/// While an event is unread the kernel puts everything off (`EAGAIN`). That is no error, and what
/// it is asked again is asked of what is mapped then.
#[test]
fn what_is_put_off_while_mappings_change_is_done_in_the_end() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let (kept, churned) = (Mapping::anonymous(16), place(16));
        kept.fill(|index| 1 + index);
        let (watched, ended) = (gpu.mirror(&process, churned), AtomicBool::new(false));
        let mut rounds = 0;
        thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::SeqCst) {
                    map(churned, Backing::Anonymous, RW).expect("it is for tests");
                    trap::store(churned.address(), 1).expect("it is mapped");
                    let _ = device_load(&watched, churned.first());
                    advise(churned, libc::MADV_DONTNEED).expect("it is mapped");
                    unmap(churned);
                }
            });
            let began = Instant::now();
            while process.statistics().retries < 20 || rounds < 50 {
                assert!(began.elapsed() < Duration::from_secs(40), "{:?}", process.statistics());
                rounds += 1;
                let report = process.migrate(kept.range(), &gpu.pagemap).run();
                assert_eq!(report.moved, 16, "round {rounds}: {report:?}");
                (0..16).for_each(|index| assert_eq!(kept.peek(index), 1 + index));
            }
            ended.store(true, Ordering::SeqCst);
        });
        println!("{rounds} rounds, {} put off", process.statistics().retries);
    });
}
