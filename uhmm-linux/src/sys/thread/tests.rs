//! Tests.

use std::cell::Cell;

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
