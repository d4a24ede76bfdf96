//! Pages of a live process that move to a device and come home: with their contents, whoever
//! touches them, and whatever has become of their mapping meanwhile.

mod common;
mod kernel;

#[path = "migration/around.rs"]
mod around;
#[path = "migration/changed.rs"]
mod changed;
#[path = "migration/heap.rs"]
mod heap;
#[path = "migration/prompt.rs"]
mod prompt;
#[path = "migration/unseen.rs"]
mod unseen;

use std::cell::RefCell;
use std::ffi::c_void;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use common::memory::{
    Backing, Mapping, NONE, R, RW, advise, lock, map, memory_file, part, place, protect, remap,
    unlock, unmap,
};
use common::rig::{Gpu, attach, device_add, device_load, device_store, is_home, is_out};
use common::trap::{self, Trap};
use common::{OwnProcess, eventually, in_own_process};
use kernel::other::{By, Other};
use kernel::ring::Ring;
use rustix::io::Errno;
use rustix::mm::MremapFlags;
use uhmm::policy::Policies;
use uhmm::{
    Clock, DevicePagemap, MigrateReport, Order, PAGE_SIZE, Page, PageRange, PagemapOptions,
    Residency, StayReason,
};
use uhmm_linux::Process;

/// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE` (Linux 6.13).
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;

/// The words of a page.
const WORDS: u64 = (PAGE_SIZE / 8) as u64;

/// Device memory of so many pages that is the process's own, and that pages leave one by one.
fn host(process: &Process, pages: u64) -> Arc<DevicePagemap> {
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    DevicePagemap::register_with(process.host_memory(pages), options)
}

/// Attaches, and runs `body` with device memory that is the process's own, and with such as is not.
fn with_both(pages: u64, body: impl Fn(&Process, &Arc<DevicePagemap>)) {
    let process = attach();
    println!("in memory of our own");
    body(&process, &host(&process, pages));
    println!("in memory of a device's own");
    body(&process, &Gpu::new(pages).pagemap);
}

/// Moves all of `range` to a device.
#[track_caller]
fn send_out(process: &Process, range: PageRange, memory: &Arc<DevicePagemap>) {
    let report = process.migrate(range, memory).run();
    assert_eq!((report.moved, &*report.stayed), (range.pages(), &[][..]), "{report:?}");
}

/// Sees that a device has so many pages. It gets its memory back when what was there is home, or
/// gone: a moment after whoever waited for that has gone on.
#[track_caller]
fn assert_used(memory: &DevicePagemap, pages: u64) {
    assert!(eventually(|| memory.used() == pages), "{} pages, not {pages}", memory.used());
}

#[track_caller]
fn assert_all_stay(report: &MigrateReport, range: PageRange, reason: StayReason) {
    assert_eq!(report.moved, 0, "{report:?}");
    for page in range.iter() {
        assert_eq!(report.reason(page), Some(reason), "{page}: {report:?}");
    }
}

/// Fills the first and the last word of each page: the page is whole if both are right.
fn fill(mapping: &Mapping) {
    for index in 0..mapping.range().pages() {
        mapping.poke(index, first_word(index));
        trap::store(mapping.word(index) + 8 * (WORDS - 1), last_word(index)).expect("it is mapped");
    }
}

fn first_word(index: u64) -> u64 {
    0x1000_0000 + index
}

fn last_word(index: u64) -> u64 {
    0x2000_0000 + index
}

/// Sees that the page at `at` has what `fill` put into the page of that index.
#[track_caller]
fn assert_whole(at: Page, index: u64) {
    assert_eq!(trap::load(at.address()), Ok(first_word(index)), "the first word of page {index}");
    let last = trap::load(at.address() + 8 * (WORDS - 1));
    assert_eq!(last, Ok(last_word(index)), "the last word of page {index}");
}

#[track_caller]
fn assert_all_whole(mapping: &Mapping) {
    (0..mapping.range().pages()).for_each(|index| assert_whole(mapping.page(index), index));
}

/// Sees that the page at `at` is zeroes, as far as [`fill`] filled it.
#[track_caller]
fn assert_blank(at: Page) {
    assert_eq!(trap::load(at.address()), Ok(0), "the first word at {at}");
    assert_eq!(trap::load(at.address() + 8 * (WORDS - 1)), Ok(0), "the last word at {at}");
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

/// Makes memory of a large page, in one piece if the machine has one.
fn large() -> Mapping {
    let mapping = Mapping::new(Order::HUGE.pages(), Backing::Huge, RW);
    fill(&mapping);
    mapping
}

// Coming and going.

#[test]
fn pages_in_host_memory_come_home_when_they_are_touched() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(8);
        fill(&mapping);
        let memory = host(&process, 64);
        let report = process.migrate(mapping.range(), &memory).run();
        assert_eq!((report.moved, report.without_copy), (8, 8), "{report:?}");
        assert!(mapping.range().iter().all(|page| is_out(&process, page)));
        assert_used(&memory, 8);
        assert_all_whole(&mapping);
        assert!(mapping.range().iter().all(|page| is_home(&process, page)));
        assert_used(&memory, 0);
        // Counted a moment after whoever waited for it has gone on.
        assert!(eventually(|| memory.statistics().home_in_place == 8));
        assert_eq!(memory.statistics().in_by_adoption, 8);
    });
}

#[test]
fn pages_on_a_device_come_home_when_they_are_touched() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(8);
        fill(&mapping);
        let gpu = Gpu::new(64);
        let report = process.migrate(mapping.range(), &gpu.pagemap).run();
        assert_eq!((report.moved, report.without_copy), (8, 0), "{report:?}");
        assert!(mapping.range().iter().all(|page| is_out(&process, page)));
        assert_all_whole(&mapping);
        assert_used(&gpu.pagemap, 0);
        mapping.poke(3, 7);
        assert_eq!(mapping.peek(3), 7);
    });
}

#[test]
fn a_huge_page_moves_whole() {
    in_own_process(|| {
        with_both(512, |process, memory| {
            let mapping = large();
            send_out(process, mapping.range(), memory);
            assert_eq!(process.snapshot(mapping.range())[0].order, Order::HUGE);
            assert_all_whole(&mapping);
            assert_used(memory, 0);
        });
    });
}

/// All that was attached for is undone: what was out is home, and nothing is registered, open or
/// running any more.
#[test]
fn what_is_out_when_the_process_detaches_is_home() {
    in_own_process(|| {
        let before = common::leaks::holdings();
        let process = attach();
        let (ours, gpu) = (host(&process, 64), Gpu::new(64));
        let mappings = [Mapping::anonymous(16), Mapping::anonymous(16)];
        mappings.iter().for_each(fill);
        send_out(&process, mappings[0].range(), &ours);
        send_out(&process, mappings[1].range(), &gpu.pagemap);
        drop(process);
        mappings.iter().for_each(assert_all_whole);
        assert_used(&ours, 0);
        assert_used(&gpu.pagemap, 0);
        drop((ours, gpu));
        // A thread that has been waited for is there for a moment longer.
        let left = || common::leaks::holdings().difference(&before);
        assert!(eventually(|| left().is_empty()), "{}", left());
    });
}

// Who touches it.

/// What some of the touches need.
struct Tools {
    other: Other,
    ring: Option<RefCell<Ring>>,
}

/// Touches a page of a mapping, sees that its first word is as it was filled, and may change the
/// others but the last.
type Touch = fn(&Tools, &Mapping, u64);

/// What a touch stores to a word of its own.
const TOUCHED: u64 = 0x7e57;

/// The address of a word in the page at `index` that is for a touch to write to.
fn scratch(mapping: &Mapping, index: u64) -> u64 {
    mapping.word(index) + 64
}

fn file_with(word: u64) -> std::os::fd::OwnedFd {
    let file = memory_file(1);
    assert_eq!(rustix::io::pwrite(&file, &word.to_ne_bytes(), 0), Ok(8));
    file
}

fn word_of(file: &std::os::fd::OwnedFd) -> u64 {
    let mut word = [0; 8];
    assert_eq!(rustix::io::pread(file, &mut word, 0), Ok(8));
    u64::from_ne_bytes(word)
}

const TOUCHES: &[(&str, Touch)] = &[
    ("a load", |_, mapping, index| assert_eq!(mapping.peek(index), first_word(index))),
    ("a store", |_, mapping, index| {
        trap::store(scratch(mapping, index), TOUCHED).expect("it is mapped");
        assert_eq!(trap::load(scratch(mapping, index)), Ok(TOUCHED));
    }),
    ("an atomic instruction", |_, mapping, index| {
        assert_eq!(trap::add(mapping.word(index), 0), Ok(first_word(index)));
    }),
    ("another thread", |_, mapping, index| {
        std::thread::scope(|scope| {
            let seen = scope.spawn(|| mapping.peek(index)).join().expect("it does not panic");
            assert_eq!(seen, first_word(index));
        });
    }),
    ("read(2) into it", |_, mapping, index| {
        let file = file_with(TOUCHED);
        let to = pointer(scratch(mapping, index));
        // SAFETY: the word is mapped, and no Rust object is there.
        let read = unsafe { libc::pread(file.as_raw_fd(), to, 8, 0) };
        assert_eq!(read, 8, "{}", std::io::Error::last_os_error());
        assert_eq!(trap::load(scratch(mapping, index)), Ok(TOUCHED));
    }),
    ("write(2) out of it", |_, mapping, index| {
        let file = file_with(0);
        // SAFETY: the word is mapped.
        let written = unsafe { libc::pwrite(file.as_raw_fd(), pointer(mapping.word(index)), 8, 0) };
        assert_eq!(written, 8, "{}", std::io::Error::last_os_error());
        assert_eq!(word_of(&file), first_word(index));
    }),
    ("io_uring reading into it", |tools, mapping, index| {
        let Some(ring) = &tools.ring else { return };
        let file = file_with(TOUCHED);
        assert_eq!(ring.borrow_mut().read(&file, scratch(mapping, index), 8), 8);
        assert_eq!(trap::load(scratch(mapping, index)), Ok(TOUCHED));
    }),
    ("io_uring writing out of it", |tools, mapping, index| {
        let Some(ring) = &tools.ring else { return };
        let file = file_with(0);
        assert_eq!(ring.borrow_mut().write(&file, mapping.word(index), 8), 8);
        assert_eq!(word_of(&file), first_word(index));
    }),
    ("vmsplice(2)", |_, mapping, index| {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let piece = libc::iovec { iov_base: pointer(mapping.word(index)), iov_len: PAGE_SIZE };
        // SAFETY: the page is mapped, and read from the pipe before it changes.
        let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), &piece, 1, 0) };
        assert_eq!(spliced, PAGE_SIZE as isize, "{}", std::io::Error::last_os_error());
        let mut bytes = vec![0; PAGE_SIZE];
        assert_eq!(rustix::io::read(&reader, &mut bytes), Ok(PAGE_SIZE));
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8"));
        assert_eq!((word(0), word(PAGE_SIZE - 8)), (first_word(index), last_word(index)));
    }),
    ("process_vm_readv of another process", |tools, mapping, index| {
        assert_eq!(tools.other.read(By::ProcessVm, mapping.word(index)), Ok(first_word(index)));
    }),
    ("process_vm_writev of another process", |tools, mapping, index| {
        tools.other.write(By::ProcessVm, scratch(mapping, index), TOUCHED).expect("it may");
        assert_eq!(trap::load(scratch(mapping, index)), Ok(TOUCHED));
    }),
    ("a futex that is waited for", |_, mapping, index| {
        let word = mapping.word(index);
        assert_eq!(futex_wait(word, first_word(index) as u32 + 1), Err(Errno::AGAIN));
        assert_eq!(futex_wait(word, first_word(index) as u32), Err(Errno::TIMEDOUT));
    }),
];

/// Waits for a moment on the futex at `address`, if it is `expected`.
fn futex_wait(address: u64, expected: u32) -> Result<(), Errno> {
    let moment = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel reads the word, or says that it cannot.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, address, wait, expected, &raw const moment) };
    match result {
        0 => Ok(()),
        _ => {
            let error = std::io::Error::last_os_error();
            Err(Errno::from_io_error(&error).expect("a system call has failed"))
        }
    }
}

#[test]
fn the_contents_are_there_whoever_touches_them() {
    in_own_process(|| {
        let tools = Tools { other: Other::new(), ring: Ring::new().map(RefCell::new) };
        if tools.ring.is_none() {
            common::loudly("there is no io_uring here: it was not tested");
        }
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(TOUCHES.len() as u64);
            fill(&mapping);
            send_out(process, mapping.range(), memory);
            for (index, (name, touch)) in (0..).zip(TOUCHES) {
                println!("{name}");
                let page = mapping.page(index);
                assert!(is_out(process, page), "{name}: it was out");
                touch(&tools, &mapping, index);
                let touched = tools.ring.is_some() || !name.contains("io_uring");
                assert_eq!(is_home(process, page), touched, "{name}: it is home");
                assert_whole(page, index);
            }
            assert_used(memory, 0);
        });
        // Large pages come home whole, whoever touches them.
        with_both(512, |process, memory| {
            for (name, touch) in TOUCHES {
                let mapping = large();
                send_out(process, mapping.range(), memory);
                println!("{name}, of a large page");
                touch(&tools, &mapping, 300);
                assert_all_whole(&mapping);
                assert_used(memory, 0);
            }
        });
    });
}

/// The kernel does not wait for a page that is missing on behalf of who reads `/proc/PID/mem` or
/// traces: they are told that there is none. Nothing that is wrong is read, and nothing is lost.
#[test]
fn who_debugs_the_process_is_told_that_a_page_is_not_there() {
    in_own_process(|| {
        let other = Other::new();
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(1);
            fill(&mapping);
            let word = mapping.word(0);
            assert_eq!(other.read(By::ProcMem, word), Ok(first_word(0)));
            send_out(process, mapping.range(), memory);
            assert_eq!(other.read(By::ProcMem, word), Err(Errno::IO));
            assert_eq!(other.write(By::ProcMem, word, TOUCHED), Err(Errno::IO));
            assert!(is_out(process, mapping.page(0)));
            assert_whole(mapping.page(0), 0);
            assert_eq!(other.write(By::ProcMem, scratch(&mapping, 0), TOUCHED), Ok(()));
            assert_eq!(trap::load(scratch(&mapping, 0)), Ok(TOUCHED));
        });
    });
}

#[test]
fn a_signal_handler_can_run_on_a_stack_that_is_out() {
    static RAN: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handle(_: i32) {
        RAN.fetch_add(1, Ordering::Relaxed);
    }
    in_own_process(|| {
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(32);
            fill(&mapping);
            let (at, bytes) = (pointer(mapping.word(0)), 32 * PAGE_SIZE);
            let stack = libc::stack_t { ss_sp: at, ss_flags: 0, ss_size: bytes };
            // SAFETY: the stack is mapped until the process ends or another is set.
            assert_eq!(unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) }, 0);
            // SAFETY: all zeroes is a valid `sigaction`.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK;
            // SAFETY: the handler adds to an atomic, which may be done anywhere.
            let set = unsafe { libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) };
            assert_eq!(set, 0);
            let before = RAN.load(Ordering::Relaxed);
            for round in 1..=20 {
                assert!(process.migrate(mapping.range(), memory).run().is_complete());
                common::raise(libc::SIGUSR1);
                // Relaxed: the handler ran on this thread.
                assert_eq!(RAN.load(Ordering::Relaxed), before + round);
            }
            let none = libc::stack_t { ss_sp: at, ss_flags: libc::SS_DISABLE, ss_size: bytes };
            // SAFETY: takes the stack away, on which nothing runs.
            assert_eq!(unsafe { libc::sigaltstack(&none, std::ptr::null_mut()) }, 0);
        });
    });
}

/// X10: one brings it, the others wait for that; nobody is overtaken for ever.
#[test]
fn any_number_of_threads_may_touch_a_page_at_once() {
    const THREADS: u64 = 16;
    const ROUNDS: u64 = 100;
    in_own_process(|| {
        with_both(8, |process, memory| {
            let mapping = Mapping::anonymous(1);
            mapping.poke(0, 0);
            let (start, end) = (Barrier::new(17), Barrier::new(17));
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        for _ in 0..ROUNDS {
                            start.wait();
                            trap::add(mapping.word(0), 1).expect("it is mapped");
                            end.wait();
                        }
                    });
                }
                for _ in 0..ROUNDS {
                    send_out(process, mapping.range(), memory);
                    start.wait();
                    end.wait();
                }
            });
            assert_eq!(mapping.peek(0), THREADS * ROUNDS);
            // Counted a moment after whoever waited for it has gone on.
            let came = || memory.statistics().home_by_cpu_fault;
            assert!(eventually(|| came() >= ROUNDS));
            assert_eq!(came(), ROUNDS, "it came home once each time");
        });
    });
}

#[test]
fn who_waits_on_a_futex_in_a_page_is_woken_after_it_has_been_away() {
    in_own_process(|| {
        with_both(8, |process, memory| {
            let mapping = Mapping::anonymous(1);
            mapping.poke(0, 1);
            let word = mapping.word(0);
            std::thread::scope(|scope| {
                let waiter = scope.spawn(move || {
                    while trap::load(word) != Ok(2) {
                        let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
                        let for_ever = std::ptr::null::<libc::timespec>();
                        // SAFETY: the kernel reads the word.
                        unsafe { libc::syscall(libc::SYS_futex, word, wait, 1_u32, for_ever) };
                    }
                });
                // It may be asleep by now, or look at the page just as it leaves: both are to end.
                // In the moment in which it does, the kernel holds the page, which stays.
                let mut left = 0;
                for _ in 0..50 {
                    left += process.migrate(mapping.range(), memory).run().moved;
                    std::thread::yield_now();
                }
                trap::store(word, 2).expect("it is mapped");
                let woken = eventually(|| {
                    let wake = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
                    // SAFETY: accesses no memory.
                    unsafe { libc::syscall(libc::SYS_futex, word, wake, i32::MAX) };
                    waiter.is_finished()
                });
                assert!(woken, "the word is {:?}", trap::load(word));
                assert!(left > 0, "the page has never left");
            });
        });
    });
}

// What a device does there meanwhile.

#[test]
fn what_a_device_stored_there_comes_home() {
    in_own_process(|| {
        let (process, gpu) = (attach(), Gpu::new(64));
        let mapping = Mapping::anonymous(8);
        fill(&mapping);
        let mirror = gpu.mirror(&process, mapping.range());
        send_out(&process, mapping.range(), &gpu.pagemap);
        for (index, page) in (0..).zip(mapping.range().iter()) {
            assert_eq!(device_load(&mirror, page), Ok(first_word(index)));
            assert_eq!(device_store(&mirror, page, 0xd0 + index), Ok(()));
            assert!(is_out(&process, page));
        }
        (0..8).for_each(|index| assert_eq!(mapping.peek(index), 0xd0 + index));
        // And exclusively, in the process's own memory.
        assert_eq!(device_add(&mirror, mapping.page(0), 5), Ok(0xd0));
        assert!(matches!(
            process.snapshot(mapping.page(0).into())[0].residency,
            Residency::Exclusive { .. }
        ));
        assert_eq!(mapping.peek(0), 0xd5);
    });
}
