//! The end of a process, in each way there is, while its pages move.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::children::{Board, End, How, Scattered, child, end_of, fork_by, send};
use common::leaks::holdings;
use common::rig::attach;
use common::{ends_within, eventually, exit_now, in_own_process, stacks};
use rustix::process::Signal;

/// Migrates, faults and holds on three threads for ever; says so on the board.
fn busy(board: &Board) -> ! {
    let process = attach();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let memory = Scattered::new(&process);
                for seed in 1.. {
                    memory.fill(seed);
                    memory.scatter();
                    memory.check(seed);
                    board.add(0, 1);
                }
            });
        }
    });
    unreachable!("the threads do not end")
}

/// Sees that a process ends, and how, and that it leaves nothing in its group.
#[track_caller]
fn ends(pid: u32) -> End {
    assert!(ends_within(pid, Duration::from_secs(10)), "{}", stacks::of_process(pid));
    end_of(pid)
}

/// Has a signal end this process, also if the tests were started to ignore it, as jobs in the
/// background are.
fn heed(signal: Signal) {
    // SAFETY: the action needs no handler. SIGKILL has no other, and refuses.
    unsafe { libc::signal(signal.as_raw(), libc::SIG_DFL) };
}

#[test]
fn signals_end_a_process_whose_pages_move() {
    in_own_process(|| {
        let board = Board::new();
        for round in 0..12_u64 {
            for signal in [Signal::KILL, Signal::TERM, Signal::ABORT, Signal::QUIT] {
                let before = board.get(0);
                let pid = child(How::Hooked, || {
                    heed(signal);
                    busy(&board)
                });
                assert!(eventually(|| board.get(0) > before + round), "it is at work");
                send(pid, signal);
                assert_eq!(ends(pid), End::Signal(signal.as_raw()), "{signal:?}");
            }
        }
    });
}

#[test]
fn a_process_ends_itself_while_its_pages_move() {
    in_own_process(|| {
        let board = Board::new();
        let ways: [(fn(), End); 4] = [
            (|| std::process::abort(), End::Signal(libc::SIGABRT)),
            (|| std::process::exit(7), End::Badly(7)),
            (|| exit_now(8), End::Badly(8)),
            // SAFETY: runs what the program and the libraries have left to do.
            (|| unsafe { libc::exit(9) }, End::Badly(9)),
        ];
        for (end, expected) in ways {
            for _ in 0..5 {
                let before = board.get(0);
                let pid = child(How::Hooked, || {
                    thread::scope(|scope| {
                        scope.spawn(|| {
                            assert!(eventually(|| board.get(0) > before));
                            end();
                        });
                        busy(&board)
                    })
                });
                assert_eq!(ends(pid), expected);
            }
        }
    });
}

#[test]
fn a_panic_is_a_panic_whatever_moves() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        let panicked = thread::scope(|scope| {
            let panics = || {
                let _migration = memory.process.migrate(memory.part(0), &memory.gpu.pagemap);
                memory.process.migrate(memory.part(1), &memory.host).run();
                panic!("in the middle");
            };
            scope.spawn(panics).join()
        });
        assert!(panicked.is_err());
        memory.check(1);
        memory.scatter();
        memory.check(1);
    });
}

#[test]
fn children_outlive_the_process_that_moved_pages() {
    in_own_process(|| {
        let own = Some(rustix::process::getpid());
        rustix::process::set_child_subreaper(own).expect("prctl");
        let board = Board::new();
        for how in [How::Hooked, How::Raw] {
            board.set(0, 0);
            let middle = child(How::Hooked, || {
                let memory = Scattered::new(&attach());
                memory.fill(1);
                memory.scatter();
                child(how, || {
                    board.set(0, 1);
                    while board.get(0) < 2 {
                        thread::yield_now();
                    }
                    board.set(1, u64::from(memory.is_right(1)) + 1);
                    true
                });
                loop {
                    thread::park();
                }
            });
            assert!(eventually(|| board.get(0) == 1));
            send(middle, Signal::KILL);
            assert_eq!(end_of(middle), End::Signal(libc::SIGKILL));
            board.set(1, 0);
            board.set(0, 2);
            assert!(eventually(|| board.get(1) == 2), "{how:?}: the child has its pages");
            rustix::process::wait(rustix::process::WaitOptions::empty()).expect("it is ours");
        }
    });
}

#[test]
fn attached_and_detached_a_hundred_times_it_leaves_nothing() {
    in_own_process(|| {
        let mut before = None;
        for round in 0..100 {
            let memory = Scattered::new(&attach());
            memory.fill(round);
            memory.scatter();
            if round % 2 == 0 {
                memory.check(round);
            }
            let (process, mapping) = memory.into_process();
            let ended = AtomicBool::new(false);
            thread::scope(|scope| {
                // Faults all the while.
                let reader = scope.spawn(|| {
                    while !ended.load(Ordering::SeqCst) {
                        (0..Scattered::PAGES).for_each(|index| {
                            assert_eq!(mapping.peek(index), Scattered::value(index, round));
                        });
                    }
                });
                drop(process);
                ended.store(true, Ordering::SeqCst);
                // To the very end: the scope does not wait for the thread to be gone.
                reader.join().expect("everything is there");
            });
            drop(mapping);
            let now = holdings();
            let then = before.get_or_insert_with(|| now.clone());
            // What allocators and threads keep settles within the first rounds.
            if round == 10 {
                *then = now.clone();
            } else if round > 10 {
                assert_eq!(now.difference(then), "", "round {round}");
                assert!(now.mappings <= then.mappings + 8, "round {round}: {now}, not {then}");
            }
        }
    });
}

/// The thread that forks ends before the child is supplied only if the whole process does.
#[test]
fn an_exit_while_another_thread_forks_hangs_nobody() {
    in_own_process(|| {
        let board = Board::new();
        for round in 0..20 {
            let before = board.get(0);
            let pid = child(How::Hooked, || {
                let memory = Scattered::new(&attach());
                thread::scope(|scope| {
                    scope.spawn(|| {
                        for seed in 1.. {
                            memory.fill(seed);
                            memory.scatter();
                            board.add(0, 1);
                            match fork_by(How::Raw) {
                                None => exit_now(0),
                                Some(pid) => assert_eq!(end_of(pid), End::Well),
                            }
                        }
                    });
                    assert!(eventually(|| board.get(0) > before + round));
                    exit_now(0)
                })
            });
            assert_eq!(ends(pid), End::Well);
        }
    });
}
