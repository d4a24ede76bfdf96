//! Tests.

use std::cell::Cell;
use std::sync::atomic::AtomicU64;

use uhmm::Page;

use super::*;

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(5) };
}

/// Tells whether a range has the page of a value.
fn holds<T>(range: PageRange, value: &T) -> bool {
    range.contains(Page::containing(std::ptr::from_ref(value).addr() as u64))
}

/// Returns the signals that the calling thread blocks, as the kernel sees it.
fn blocked() -> u64 {
    let path = format!("/proc/self/task/{}/status", gettid());
    let text = std::fs::read_to_string(path).expect("the thread lives");
    let mask = text.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    u64::from_str_radix(mask.expect("the kernel tells").trim(), 16).expect("a number")
}

#[test]
fn no_signal_reaches_a_thread_that_serves() {
    let before = blocked();
    let served = spawn("served", || (blocked(), std::thread::current().name().map(str::to_owned)));
    let (mask, name) = served.expect("a thread").join().expect("it returns");
    let bit = |signal: i32| 1_u64 << (signal - 1);
    // Nobody can block the first two; the others are the C library's.
    let never = bit(libc::SIGKILL) | bit(libc::SIGSTOP) | bit(32) | bit(33);
    assert_eq!(mask, !never, "{mask:#x}");
    assert_eq!(name.as_deref(), Some("served"));
    assert_eq!(blocked(), before, "the thread that spawns gets back its own");
}

#[test]
fn the_mask_is_restored_where_there_is_no_thread() {
    let before = blocked();
    // A name with a zero in it is none.
    let refused = std::panic::catch_unwind(|| spawn("a\0b", || ()));
    assert!(refused.is_err() || refused.is_ok_and(|thread| thread.is_err()));
    assert_eq!(blocked(), before);
}

#[test]
fn the_stack_holds_what_is_on_it() {
    #[inline(never)]
    fn deep(left: u32, stack: PageRange) -> bool {
        let here = std::hint::black_box([left; 256]);
        holds(stack, &here) && (left == 0 || deep(left - 1, stack))
    }
    let here = 1_u8;
    let stack = stack_of_this_thread().expect("it has one");
    assert!(holds(stack, &here));
    let other = std::thread::spawn(|| {
        let own = stack_of_this_thread().expect("it has one");
        assert!(deep(500, own));
        own
    });
    let other = other.join().expect("it holds");
    assert!(!holds(other, &here) && !other.overlaps(stack));
}

#[test]
fn the_thread_local_variables_are_around_the_thread_pointer() {
    for _ in 0..2 {
        let own = std::thread::spawn(|| {
            let tls = tls_of_this_thread();
            OWN.with(|variable| assert!(holds(tls, variable)));
            tls
        });
        let tls = own.join().expect("it holds");
        assert!(tls.pages() >= 32);
    }
}

#[test]
fn a_thread_runs_where_it_is_told_to() {
    let thread = std::thread::spawn(|| {
        let tid = gettid();
        for cpu in 0..std::thread::available_parallelism().expect("some").get() as u32 {
            match set_affinity(tid, &[cpu]) {
                Ok(()) => {
                    assert_eq!(getcpu(), cpu);
                    assert_eq!(processor_of(tid), Ok(cpu));
                }
                // Another part of the machine is ours.
                Err(error) => assert_eq!(error, Errno::INVAL),
            }
        }
        assert_eq!(set_affinity(tid, &[]), Err(Errno::INVAL));
        assert_eq!(set_affinity(tid, &[1 << 20]), Err(Errno::INVAL));
        tid
    });
    let gone = thread.join().expect("it runs");
    // The kernel may take a moment after the join to forget the thread.
    let forgotten = (0..1_000_000).any(|_| processor_of(gone).is_err());
    assert!(forgotten && processor_of(u32::MAX).is_err());
}

#[test]
fn the_processor_is_found_behind_any_name() {
    let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 \
                31 32 33 34 35 17 37 38";
    for name in ["a", "a b", "a) S 1 (b", ")", ""] {
        assert_eq!(processor_in(format!("12 ({name}) {rest}\n").as_bytes()), Some(17));
    }
    for text in [
        "",
        "12 (a) S 1",
        "12",
        "12 (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 \
        20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 x",
    ] {
        assert_eq!(processor_in(text.as_bytes()), None);
    }
}

#[test]
fn whether_a_thread_sleeps_in_poll_is_told() {
    use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
    let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let waits = &stop;
        scope.spawn(move || {
            tell.send(gettid()).expect("somebody waits for it");
            let _ = poll(&mut [PollFd::new(waits, PollFlags::IN)], None);
        });
        let tid = told.recv().expect("it begins");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            match is_in_poll(tid).expect("it lives") {
                Some(true) => break,
                None => {
                    eprintln!("NOT TESTED: the kernel does not say");
                    break;
                }
                Some(false) => assert!(std::time::Instant::now() < deadline, "it never sleeps"),
            }
            std::thread::yield_now();
        }
        assert_ne!(is_in_poll(gettid()).expect("this one"), Some(true), "this one does not");
        rustix::io::write(&stop, &1_u64.to_ne_bytes()).expect("eventfd");
    });
}

#[test]
fn nobody_else_closes_what_a_thread_has_kept() {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    let (kept, far) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    let (other, other_far) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    let (tell, told) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    // The thread borrows a descriptor that this one closes, which is what it is to outlive.
    let number = kept.as_raw_fd();
    let thread = std::thread::spawn(move || {
        // SAFETY: open until this thread has descriptors of its own, and in those ever after.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let outcome = keep_descriptors(&[fd]);
        tell.send(outcome).expect("somebody waits for it");
        let _ = gone.recv();
        rustix::io::write(fd.as_fd(), b"still here")
    });
    let outcome = told.recv().expect("it begins");
    if let Err(error) = outcome {
        return eprintln!("NOT TESTED: {error}");
    }
    drop(kept);
    // What was not kept is not: whoever reads its other end sees that it is closed.
    drop(other);
    assert_eq!((&other_far).read(&mut [0; 8]).expect("the end"), 0);
    (&far).write_all(b"hello").expect("it is open at the other end");
    drop(go);
    assert_eq!(thread.join().expect("it has not panicked"), Ok(10));
    let mut bytes = [0; 10];
    (&far).read_exact(&mut bytes).expect("it was written");
    assert_eq!(&bytes, b"still here");
}

#[cfg(all(target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[test]
fn the_table_leads_to_the_variables_of_the_program() {
    let found = |range: PageRange| {
        let word = |at: u64| {
            let word: *const AtomicU64 = std::ptr::with_exposed_provenance(at as usize);
            // SAFETY: the pages of the table are mapped while its thread lives, and what else is in
            // them is looked at as atomics are.
            let word = unsafe { &*word };
            // Relaxed: it is the thread's own.
            word.load(Ordering::Relaxed)
        };
        let end = range.address() + (range.len() * uhmm::PAGE_SIZE) as u64;
        let variables = tls_of_this_thread();
        (range.address()..end).step_by(8).any(|at| {
            let leads_to = Page::containing(word(at));
            variables.contains(leads_to)
        })
    };
    let table = tls_table_of_this_thread().expect("this is glibc");
    assert!(found(table), "{table}");
    let other = std::thread::spawn(move || {
        let own = tls_table_of_this_thread().expect("this is glibc");
        assert!(found(own), "{own}");
    });
    other.join().expect("it is as it says");
}
