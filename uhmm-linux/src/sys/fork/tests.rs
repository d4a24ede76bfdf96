//! Tests.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::child::{End, Fork, alone, may_make_namespaces, start};
use super::*;

#[test]
fn a_mark_is_of_the_process_that_made_it_and_of_no_copy() {
    alone(module_path!(), "a_mark_is_of_the_process_that_made_it_and_of_no_copy", || {
        let mark = ForkMark::new().expect("there is memory");
        for how in [Fork::Hooked, Fork::Raw] {
            assert!(mark.is_ours());
            assert_eq!(start(how, || mark.is_ours()).end(), End::Returned(false), "{how:?}");
            let of_the_child = start(how, || {
                let own = ForkMark::new().expect("there is memory");
                own.is_ours() && start(how, || own.is_ours()).end() == End::Returned(false)
            });
            assert_eq!(of_the_child.end(), End::Returned(true), "{how:?}");
        }
        assert!(mark.is_ours());
    });
}

/// Two that come one after the other may have the same process ID.
#[test]
fn a_mark_is_of_no_copy_that_has_the_process_id_of_its_parent() {
    alone(module_path!(), "a_mark_is_of_no_copy_that_has_the_process_id_of_its_parent", || {
        if !may_make_namespaces() {
            return;
        }
        let parent = start(Fork::FirstOfMany, || {
            let (mark, pid) =
                (ForkMark::new().expect("there is memory"), rustix::process::getpid());
            let options = RegionOptions { dont_fork: true, ..RegionOptions::default() };
            let region = Region::reserve(PAGE_SIZE, options).expect("there is memory");
            let child = start(Fork::FirstOfMany, || {
                assert_eq!(rustix::process::getpid(), pid);
                !mark.is_ours() && !region.is_here()
            });
            child.end() == End::Returned(true) && mark.is_ours() && region.is_here()
        });
        assert_eq!(parent.end(), End::Returned(true));
    });
}

#[test]
fn threads_that_ask_at_once_are_of_one_process() {
    alone(module_path!(), "threads_that_ask_at_once_are_of_one_process", || {
        let own = process_number().expect("there is memory");
        for _ in 0..20 {
            let child = start(Fork::Raw, || {
                let barrier = std::sync::Barrier::new(4);
                let ask = || {
                    barrier.wait();
                    process_number().expect("there is memory")
                };
                let numbers = std::thread::scope(|scope| {
                    let threads = [(); 4].map(|()| scope.spawn(ask));
                    threads.map(|thread| thread.join().expect("it does not panic"))
                });
                numbers.iter().all(|&number| number == numbers[0] && number != own)
            });
            assert_eq!(child.end(), End::Returned(true));
        }
        assert_eq!(process_number(), Ok(own));
    });
}

#[test]
fn a_child_that_shares_the_memory_is_no_copy() {
    /// Exits with 7 where the mark, which is passed, is that of the process.
    extern "C" fn child(mark: *mut c_void) -> c_int {
        // SAFETY: the parent lends the mark, and sleeps until this has ended.
        if unsafe { &*mark.cast::<ForkMark>() }.is_ours() { 7 } else { 8 }
    }
    alone(module_path!(), "a_child_that_shares_the_memory_is_no_copy", || {
        let mark = ForkMark::new().expect("there is memory");
        let mut stack = vec![0_u128; 64 << 10];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let argument = (&raw const mark).cast_mut().cast::<c_void>();
        let top = stack.as_mut_ptr_range().end.cast::<c_void>();
        // SAFETY: the child has a stack of its own, and this thread waits until it has ended.
        let pid = unsafe { libc::clone(child, top, flags, argument) };
        assert!(pid > 0, "clone: {}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: there is room for the status.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{status:#x}");
    });
}

#[test]
fn hooks_run_around_a_fork_and_not_around_a_raw_clone() {
    static CALLS: [AtomicU32; 3] = [const { AtomicU32::new(0) }; 3];
    fn call(which: usize) {
        CALLS[which].fetch_add(1, Ordering::SeqCst);
    }
    fn calls() -> [u32; 3] {
        [0, 1, 2].map(|which| CALLS[which].load(Ordering::SeqCst))
    }
    alone(module_path!(), "hooks_run_around_a_fork_and_not_around_a_raw_clone", || {
        hooks(|| call(0), || call(1), || call(2)).expect("there is memory");
        hooks(|| call(1), || call(1), || call(1)).expect("the first call counts");
        let child = start(Fork::Hooked, || {
            let child = calls() == [1, 0, 1];
            // A child has the hooks too.
            child
                && start(Fork::Hooked, || calls() == [2, 0, 2]).end() == End::Returned(true)
                && calls() == [2, 1, 1]
        });
        assert_eq!(child.end(), End::Returned(true));
        assert_eq!(calls(), [1, 1, 0]);
        assert_eq!(start(Fork::Raw, || calls() == [1, 1, 0]).end(), End::Returned(true));
    });
}
