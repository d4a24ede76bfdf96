//! What the other tests rely on: that a test which hangs, dies or leaves something behind is found
//! out, and that an access which is not allowed is an answer.

mod common;

use std::os::fd::AsFd as _;
use std::time::Duration;

use common::leaks::holdings;
use common::memory::{Backing, Mapping, NONE, R, RW, mapped_in, memory_file, place, protect};
use common::trap::{self, Trap};
use common::{Faults, OwnProcess};

/// These are tests of tests: they need no userfaultfd.
fn own_process() -> OwnProcess {
    OwnProcess::new().needs(Faults::None)
}

#[test]
#[should_panic(expected = "it did not end within 1s")]
fn a_test_that_hangs_is_killed() {
    own_process().deadline(Duration::from_secs(1)).run(|| {
        loop {
            std::thread::park();
        }
    });
}

#[test]
#[should_panic(expected = "signal: 6 (SIGABRT)")]
fn a_test_that_is_killed_says_by_which_signal() {
    own_process().run(|| std::process::abort());
}

#[test]
#[should_panic(expected = "signal: 11 (SIGSEGV)")]
fn a_fault_of_other_code_is_not_swallowed() {
    own_process().run(|| {
        trap::install();
        // The handler takes itself away, and does not know that there is no access to make again.
        common::raise(libc::SIGSEGV);
        common::raise(libc::SIGSEGV);
    });
}

#[test]
#[should_panic(expected = "it ended before the body of the test did")]
fn a_test_that_exits_does_not_pass() {
    own_process().run(|| std::process::exit(0));
}

#[test]
fn a_test_that_leaves_a_process_behind_does_not_pass() {
    let judged = std::panic::catch_unwind(|| {
        own_process().run(|| {
            if common::fork().is_none() {
                common::alarm(Duration::from_secs(60));
                loop {
                    std::thread::park();
                }
            }
        });
    });
    match judged {
        Ok(()) => assert!(common::is_own_process(), "nobody complained"),
        Err(complaint) => {
            let complaint = complaint.downcast_ref::<String>().expect("it is in words");
            assert!(complaint.contains("it left processes behind"), "{complaint}");
        }
    }
}

#[test]
fn a_test_runs_in_a_process_of_its_own() {
    own_process().run(|| {
        let name = std::env::args().nth(1);
        assert_eq!(name.as_deref(), Some("a_test_runs_in_a_process_of_its_own"));
        let group = rustix::process::getpgrp();
        assert_eq!(group, rustix::process::getpid(), "it leads whatever it starts");
    });
}

#[test]
fn what_an_access_is_refused_for_is_told() {
    own_process().run(|| {
        let mapping = Mapping::anonymous(3);
        let word = mapping.word(0);
        assert_eq!(trap::store(word + 8, 5), Ok(()));
        assert_eq!(trap::add(word + 8, 2), Ok(5));
        assert_eq!(trap::load(word + 8), Ok(7));
        protect(mapping.part(1, 1), R).expect("it is mapped");
        assert_eq!(trap::store(mapping.word(1), 1), Err(Trap::Denied));
        assert_eq!(trap::add(mapping.word(1), 1), Err(Trap::Denied));
        assert_eq!(trap::load(mapping.word(1)), Ok(0));
        protect(mapping.part(2, 1), NONE).expect("it is mapped");
        assert_eq!(trap::load(mapping.word(2)), Err(Trap::Denied));
        assert_eq!(trap::load(place(1).address()), Err(Trap::Unmapped));
        let file = memory_file(1);
        let mapping = Mapping::new(2, Backing::File(file.as_fd(), 0), RW);
        assert_eq!(trap::load(mapping.word(0)), Ok(0));
        assert_eq!(trap::load(mapping.word(1)), Err(Trap::NoPage));
        assert_eq!(trap::signals(), 5);
    });
}

#[test]
fn what_a_process_holds_is_counted() {
    own_process().run(|| {
        let before = holdings();
        assert_eq!(holdings().difference(&before), "");
        let file = memory_file(1);
        let difference = holdings().difference(&before);
        assert!(difference.contains("memfd:uhmm-test"), "{difference}");
        drop(file);
        assert_eq!(holdings().difference(&before), "");
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (begin, begun) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("another".into());
        let thread = thread.spawn(move || {
            begin.send(()).expect("somebody waits for it");
            ended.recv()
        });
        let thread = thread.expect("a thread can be had");
        // It has its name by then.
        begun.recv().expect("it begins");
        let difference = holdings().difference(&before);
        assert!(difference.contains("threads: new [\"another\"]"), "{difference}");
        drop(end);
        let _ = thread.join();
    });
}

#[test]
fn mappings_are_where_they_were_put() {
    own_process().run(|| {
        let mapping = Mapping::anonymous(4);
        protect(mapping.part(1, 2), R).expect("it is mapped");
        let found: Vec<_> = mapped_in(mapping.range())
            .into_iter()
            .map(|(range, line)| (range, line.rights))
            .collect();
        let expected = [(0, 1, "rw-p"), (1, 2, "r--p"), (3, 1, "rw-p")];
        let expected =
            expected.map(|(first, pages, rights)| (mapping.part(first, pages), rights.to_owned()));
        assert_eq!(found, expected);
        let range = mapping.range();
        drop(mapping);
        assert!(mapped_in(range).is_empty());
    });
}
