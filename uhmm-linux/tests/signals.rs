//! Signals while pages are away.

mod common;

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::children::{Board, End, How, Scattered, child, end_of, send};
use common::memory::Mapping;
use common::rig::attach;
use common::{eventually, in_own_process};
use rustix::process::Signal;
use uhmm::{DevicePagemap, PAGE_SIZE};

static SEEN: AtomicU64 = AtomicU64::new(0);
/// The address of a page that the handler stores to.
static TOUCHED: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_it(_: libc::c_int) {
    SEEN.fetch_add(1, Ordering::Relaxed);
    let address = TOUCHED.load(Ordering::Relaxed) as *const AtomicU64;
    if !address.is_null() {
        // SAFETY: a word of a mapping that lasts as long as the handler is installed.
        unsafe { &*address }.fetch_add(1, Ordering::Relaxed);
    }
}

/// Installs the handler.
fn handle(signal: i32, flags: i32) {
    // SAFETY: all zeroes is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count_it as *const () as usize;
    action.sa_flags = flags;
    // SAFETY: the handler only touches atomics.
    let result = unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    assert_eq!(result, 0);
}

/// Sends the process SIGALRM every so often.
fn timer(every: Duration) {
    let interval = libc::timeval { tv_sec: 0, tv_usec: every.as_micros() as i64 };
    let value = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: the value is initialised, and the old one not wanted.
    let result = unsafe { libc::setitimer(libc::ITIMER_REAL, &value, ptr::null_mut()) };
    assert_eq!(result, 0);
}

fn this_thread() -> libc::pthread_t {
    // SAFETY: no conditions.
    unsafe { libc::pthread_self() }
}

/// Loads by a system call: the word at `address` goes through a pipe.
fn load_by_pipe(pipe: &(std::os::fd::OwnedFd, std::os::fd::OwnedFd), address: u64) -> u64 {
    use std::os::fd::AsRawFd as _;
    loop {
        // SAFETY: the kernel checks the address.
        let written = unsafe { libc::write(pipe.1.as_raw_fd(), address as *const libc::c_void, 8) };
        if written == 8 {
            break;
        }
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINTR));
    }
    let mut word = [0; 8];
    let read = rustix::io::retry_on_intr(|| rustix::io::read(&pipe.0, &mut word[..]));
    assert_eq!(read.expect("a pipe"), 8);
    u64::from_ne_bytes(word)
}

#[test]
fn a_storm_of_signals_disturbs_no_fault() {
    in_own_process(|| {
        handle(libc::SIGALRM, libc::SA_RESTART);
        handle(libc::SIGUSR1, 0);
        let memory = Scattered::new(&attach());
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let target = this_thread();
            let ended = &ended;
            scope.spawn(move || {
                while !ended.load(Ordering::SeqCst) {
                    // SAFETY: the thread outlives this one.
                    unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
                    thread::yield_now();
                }
            });
            timer(Duration::from_micros(200));
            let pipe = rustix::pipe::pipe().expect("descriptors");
            let began = Instant::now();
            let mut rounds = 0;
            while began.elapsed() < Duration::from_secs(3) {
                rounds += 1;
                memory.fill(rounds);
                memory.scatter();
                for index in 0..Scattered::PAGES {
                    let found = match index % 2 {
                        0 => memory.mapping.peek(index),
                        _ => load_by_pipe(&pipe, memory.mapping.word(index)),
                    };
                    assert_eq!(found, Scattered::value(index, rounds), "page {index}");
                }
            }
            timer(Duration::ZERO);
            ended.store(true, Ordering::SeqCst);
            let seen = SEEN.load(Ordering::Relaxed);
            println!("{rounds} rounds, {seen} signals");
            assert!(rounds >= 5 && seen >= 1000, "{rounds} rounds, {seen} signals");
        });
    });
}

/// The handler runs on a thread that is not in a call of ours: one that interrupts such a call may
/// have interrupted what its page waits for.
#[test]
fn handlers_touch_pages_that_are_away() {
    in_own_process(|| {
        let process = attach();
        let host = DevicePagemap::register(process.host_memory(64));
        let mapping = Mapping::anonymous(4);
        mapping.fill(|index| index);
        TOUCHED.store(mapping.word(1), Ordering::SeqCst);
        handle(libc::SIGUSR2, libc::SA_RESTART);
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let (ended, mapping) = (&ended, &mapping);
            let (tell, told) = std::sync::mpsc::channel();
            let user = scope.spawn(move || {
                tell.send(this_thread()).expect("somebody waits");
                while !ended.load(Ordering::SeqCst) {
                    // Also in the middle of a fault of its own.
                    assert_eq!(mapping.peek(2), 2);
                    common::raise(libc::SIGUSR2);
                }
            });
            let target = told.recv().expect("it says who it is");
            let storm = scope.spawn(move || {
                while !ended.load(Ordering::SeqCst) {
                    // SAFETY: the thread is joined after this one.
                    unsafe { libc::pthread_kill(target, libc::SIGUSR2) };
                    thread::yield_now();
                }
            });
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(2) {
                process.migrate(mapping.range(), &host).run();
                assert_eq!(mapping.peek(0), 0);
            }
            ended.store(true, Ordering::SeqCst);
            storm.join().expect("no panic");
            user.join().expect("no panic");
        });
        let seen = SEEN.load(Ordering::SeqCst);
        assert_eq!(mapping.peek(1), 1 + seen);
        assert!(seen > 100, "{seen} signals");
    });
}

#[test]
fn a_handler_runs_on_a_stack_that_was_away() {
    in_own_process(|| {
        let process = attach();
        let host = DevicePagemap::register(process.host_memory(64));
        let stack = Mapping::anonymous(16);
        stack.fill(|index| index);
        thread::scope(|scope| {
            // On a thread that calls nothing of ours.
            let (begin, begun) = std::sync::mpsc::channel();
            let (go, gone) = std::sync::mpsc::channel::<()>();
            let address = stack.word(0);
            let user = scope.spawn(move || {
                let stack = libc::stack_t {
                    ss_sp: address as *mut libc::c_void,
                    ss_flags: 0,
                    ss_size: 16 * PAGE_SIZE,
                };
                let mut old = MaybeUninit::uninit();
                // SAFETY: the memory lasts longer than the thread, and nobody else uses it.
                assert_eq!(unsafe { libc::sigaltstack(&stack, old.as_mut_ptr()) }, 0);
                // SAFETY: as it was set by the call that succeeded.
                let old = unsafe { old.assume_init() };
                handle(libc::SIGUSR2, libc::SA_ONSTACK);
                begin.send(()).expect("somebody waits");
                while gone.recv().is_ok() {
                    let before = SEEN.load(Ordering::SeqCst);
                    common::raise(libc::SIGUSR2);
                    assert_eq!(SEEN.load(Ordering::SeqCst), before + 1);
                    begin.send(()).expect("somebody waits");
                }
                // SAFETY: it was in use before.
                unsafe { libc::sigaltstack(&old, ptr::null_mut()) };
            });
            begun.recv().expect("it begins");
            for _ in 0..50 {
                let report = process.migrate(stack.range(), &host).run();
                assert_eq!(report.moved, 16, "{report:?}");
                go.send(()).expect("it waits");
                begun.recv().expect("the handler has run");
            }
            drop(go);
            user.join().expect("no panic");
        });
    });
}

#[test]
fn a_process_stops_and_goes_on() {
    in_own_process(|| {
        let board = Board::new();
        let pid = child(How::Hooked, || {
            let memory = Scattered::new(&attach());
            let mut seed = 0;
            while board.get(1) == 0 {
                seed += 1;
                memory.fill(seed);
                memory.scatter();
                memory.check(seed);
                board.add(0, 1);
            }
            true
        });
        for round in 1..30 {
            let before = board.get(0);
            assert!(eventually(|| board.get(0) > before), "round {round}: it is at work");
            send(pid, Signal::STOP);
            send(pid, Signal::CONT);
        }
        board.set(1, 1);
        assert_eq!(end_of(pid), End::Well);
    });
}

#[test]
fn a_program_may_block_all_signals() {
    in_own_process(|| {
        let mut all = MaybeUninit::uninit();
        // SAFETY: initialises the set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: the set is initialised, and the old one not wanted.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), ptr::null_mut()) };
        assert_eq!(result, 0);
        let memory = Scattered::new(&attach());
        for round in 1..20 {
            memory.fill(round);
            memory.scatter();
            common::raise(libc::SIGUSR1);
            memory.check(round);
            let pid = child(if round % 2 == 0 { How::Raw } else { How::Hooked }, || {
                memory.is_right(round)
            });
            assert_eq!(end_of(pid), End::Well);
        }
    });
}
