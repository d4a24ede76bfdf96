//! What the kernel is asked to tell of for the sake of devices: it is told while there are any, and
//! the program has its memory back when there are none.

mod common;
mod kernel;

use std::thread;
use std::time::{Duration, Instant};

use common::memory::{self, Backing, Line, Mapping, RW, map, mapped_in, unmap};
use common::rig::{Gpu, TestMirror, attach, device_load, is_home};
use common::{eventually, in_own_process};
use kernel::faults::Handler;
use rustix::io::Errno;
use uhmm::{DevicePagemap, FaultError, Order};

/// How many pages a chunk has that is registered as one.
const CHUNK: u64 = Order::HUGE.pages();

/// Waits until a mirror that has ended is forgotten, and with it all that ended before.
fn wait_for_a_review(gpu: &Gpu, process: &uhmm_linux::Process, handler: &Handler) {
    let other = Mapping::anonymous(1);
    other.poke(0, 5);
    let mirror = gpu.mirror(process, other.range());
    assert_eq!(device_load(&mirror, other.page(0)), Ok(5));
    drop(mirror);
    assert!(eventually(|| handler.register(other.range()).is_ok()), "it is given up");
}

/// Tells whether a device is told, before long, that a page it has mapped is gone. If it is not, it
/// goes on to use a translation that leads nowhere.
fn finds_a_hole(mirror: &TestMirror, page: uhmm::Page) -> bool {
    eventually(|| matches!(device_load(mirror, page), Err(FaultError::Hole { .. })))
}

#[test]
fn what_devices_have_left_is_the_programs_again() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let handler = Handler::new();
        let mapping = Mapping::anonymous(3 * CHUNK);
        mapping.fill(|index| 1 + index);
        let middle = mapping.part(CHUNK, CHUNK);
        let (first, second) = (gpu.mirror(&process, middle), gpu.mirror(&process, middle));
        for mirror in [&first, &second] {
            assert_eq!(device_load(mirror, mapping.page(CHUNK + 3)), Ok(CHUNK + 4));
        }
        assert!(mapped_in(mapping.range()).len() > 1, "a part is registered");
        assert_eq!(handler.register(middle), Err(Errno::BUSY));
        drop(first);
        wait_for_a_review(&gpu, &process, &handler);
        assert_eq!(handler.register(middle), Err(Errno::BUSY), "one device is left");
        assert_eq!(device_load(&second, mapping.page(CHUNK + 3)), Ok(CHUNK + 4));
        drop(second);
        assert!(eventually(|| mapped_in(mapping.range()).len() == 1), "it is one mapping again");
        assert_eq!(handler.register(middle), Ok(()));
        assert_eq!(mapping.peek(CHUNK + 3), CHUNK + 4);
    });
}

#[test]
fn what_nobody_but_a_snapshot_has_looked_at_is_the_programs_again() {
    in_own_process(|| {
        let process = attach();
        let handler = Handler::new();
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| index);
        assert!(is_home(&process, mapping.page(3)));
        assert!(eventually(|| handler.register(mapping.range()).is_ok()));
    });
}

/// A part of a mapping that is registered otherwise than the rest is a mapping of its own, and
/// `mremap` refuses to move several at once.
#[test]
fn what_is_given_up_leaves_the_mapping_in_one_piece() {
    in_own_process(|| {
        let process = attach();
        let host = DevicePagemap::register(process.host_memory(64));
        let handler = Handler::new();
        let mapping = Mapping::anonymous(16);
        mapping.fill(|index| 1 + index);
        assert_eq!(process.migrate(mapping.part(0, 1), &host).run().moved, 1);
        // It is registered already, for what is away.
        assert!(is_home(&process, mapping.page(7)));
        assert_eq!(mapping.peek(0), 1);
        assert!(eventually(|| handler.register(mapping.range()).is_ok()));
        assert_eq!(mapped_in(mapping.range()).len(), 1);
    });
}

/// What a device has mapped of a chunk that other pages were away from.
#[test]
fn a_device_is_told_after_what_was_away_has_come_home() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let host = DevicePagemap::register(process.host_memory(64));
        let handler = Handler::new();
        let mapping = Mapping::anonymous(16);
        mapping.fill(|index| 1 + index);
        assert_eq!(process.migrate(mapping.part(0, 8), &host).run().moved, 8);
        let mirror = gpu.mirror(&process, mapping.part(8, 8));
        assert_eq!(device_load(&mirror, mapping.page(12)), Ok(13));
        (0..8).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
        wait_for_a_review(&gpu, &process, &handler);
        assert_eq!(handler.register(mapping.range()), Err(Errno::BUSY), "the device needs it");
        unmap(mapping.part(8, 8));
        assert!(finds_a_hole(&mirror, mapping.page(12)), "it was told");
        map(mapping.part(8, 8), Backing::Anonymous, RW).expect("nothing is there");
    });
}

/// Devices come while others go: no watch of theirs goes with those. There are so many that to look
/// at all of them takes a while.
#[test]
fn who_comes_while_others_go_is_told() {
    in_own_process(|| {
        let process = attach();
        let (gpu, other) = (Gpu::new(64), Gpu::named("other", 64));
        let crowd: Vec<Mapping> = (0..1000).map(|_| Mapping::anonymous(1)).collect();
        let mirrors: Vec<TestMirror> = crowd
            .iter()
            .map(|mapping| {
                mapping.poke(0, 1);
                let mirror = other.mirror(&process, mapping.range());
                assert_eq!(device_load(&mirror, mapping.page(0)), Ok(1));
                mirror
            })
            .collect();
        let mapping = Mapping::anonymous(8);
        for round in 1..400 {
            map(mapping.range(), Backing::Anonymous, RW).expect("it is for the test");
            mapping.poke(3, round);
            let before = gpu.mirror(&process, mapping.range());
            assert_eq!(device_load(&before, mapping.page(3)), Ok(round));
            drop(before);
            // Sooner or later than what nobody uses is given up, or just then.
            let began = Instant::now();
            while began.elapsed() < Duration::from_micros(9000 + round * 10) {
                thread::yield_now();
            }
            let mirror = gpu.mirror(&process, mapping.range());
            assert_eq!(device_load(&mirror, mapping.page(3)), Ok(round));
            thread::sleep(Duration::from_millis(3));
            unmap(mapping.range());
            assert!(finds_a_hole(&mirror, mapping.page(3)), "round {round}");
        }
        drop(mirrors);
    });
}

/// Tells whether any of `range` is registered for missing pages.
fn is_registered_missing(range: uhmm::PageRange) -> bool {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("proc is mounted");
    let mut within = false;
    text.lines().any(|line| {
        if let Some(mapping) = Line::parse(line) {
            let (first, last) = (range.address(), range.last().address());
            within = mapping.range.start <= last && first < mapping.range.end;
        }
        let flags = line.strip_prefix("VmFlags:").unwrap_or_default();
        within && flags.split(' ').any(|flag| flag == "um")
    })
}

/// Returns the mapping that `page` is in.
fn mapping_of(page: uhmm::Page) -> uhmm::PageRange {
    let lines = memory::lines();
    let line = lines.iter().find(|line| line.range.contains(&page.address()));
    let range = &line.expect("it is mapped").range;
    uhmm::PageRange::new(range.start, range.end - range.start).expect("whole pages")
}

/// A thread that holds a lock of ours may be the first to touch a page of its stack: if that were a
/// fault of ours, it would wait for itself. Also if a device looks at the stack, before the thread
/// calls in or after, and while pages are out.
#[test]
fn what_servers_need_is_never_missing() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| index);
        let report = process.migrate(mapping.range(), &gpu.pagemap).run();
        assert_eq!(report.moved, 8, "{report:?}");
        let (process, gpu) = (&process, &gpu);
        thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::channel();
            let (begin, begun) = std::sync::mpsc::channel::<()>();
            let thread = scope.spawn(move || {
                let word = 77_u64;
                let page = uhmm::Page::containing(&raw const word as u64);
                let range = mapping_of(page);
                tell.send((page, range)).expect("somebody waits");
                begun.recv().expect("somebody goes on");
                // It calls in, when its stack is watched already.
                assert!(is_home(process, page));
                process.catch_up();
                let missing = is_registered_missing(range);
                std::hint::black_box(&word);
                missing
            });
            let (page, range) = told.recv().expect("it has a stack");
            let mirror = gpu.mirror(process, range);
            assert!(device_load(&mirror, page).is_ok());
            begin.send(()).expect("it waits");
            assert!(!thread.join().expect("it does not panic"), "{range} is a stack");
        });
        // This thread has called in.
        let word = 78_u64;
        let page = uhmm::Page::containing(&raw const word as u64);
        let range = mapping_of(page);
        let mirror = gpu.mirror(process, range);
        assert!(device_load(&mirror, page).is_ok());
        assert!(!is_registered_missing(range), "{range} is a stack");
        std::hint::black_box(&word);
        assert_eq!(mapping.peek(3), 3);
    });
}
