//! Children of a process whose pages are out: they have everything as it was at the fork.

mod common;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::children::{Board, End, How, Scattered, WAYS, child, end_of, fork_by, send};
use common::leaks::holdings;
use common::memory::{Mapping, remap, unmap};
use common::rig::{attach, is_out};
use common::trap::{self, Trap};
use common::{OwnProcess, alarm, ends_within, eventually, exit_now, in_own_process};
use rustix::process::Signal;
use uhmm::{
    CopyJob, CopyKind, DeviceFrame, DeviceMemory, DevicePagemap, Order, OutOfDeviceMemory,
    PAGE_SIZE, SystemMemory,
};
use uhmm_linux::{AttachError, Options, Process};

/// Device memory whose contents can be had only while it is open.
struct Gated {
    memory: Mutex<Vec<Option<Box<[u8; PAGE_SIZE]>>>>,
    open: Mutex<bool>,
    opens: Condvar,
}

impl Gated {
    fn new(pages: usize) -> Arc<Gated> {
        let memory = Mutex::new((0..pages).map(|_| None).collect());
        Arc::new(Gated { memory, open: Mutex::new(true), opens: Condvar::new() })
    }

    fn open(&self, open: bool) {
        *self.open.lock().expect("nobody panics") = open;
        self.opens.notify_all();
    }

    fn pass(&self) {
        let mut open = self.open.lock().expect("nobody panics");
        while !*open {
            open = self.opens.wait(open).expect("nobody panics");
        }
    }
}

impl DeviceMemory for Gated {
    fn capacity(&self) -> u64 {
        self.memory.lock().expect("nobody panics").len() as u64
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        let mut memory = self.memory.lock().expect("nobody panics");
        let mut free = memory.iter().enumerate().filter(|(_, page)| page.is_none());
        let found = free.next().map(|(index, _)| index).filter(|_| order == Order::PAGE);
        let index = found.ok_or(OutOfDeviceMemory { order })?;
        memory[index] = Some(Box::new([0xee; PAGE_SIZE]));
        Ok(DeviceFrame(index as u64))
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        let mut memory = self.memory.lock().expect("nobody panics");
        for page in &mut memory[frame.0 as usize..][..order.pages() as usize] {
            *page = None;
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        for job in jobs {
            if let CopyKind::Out { .. } = job.kind() {
                self.pass();
            }
            let mut own = self.memory.lock().expect("nobody panics");
            let mut page = |frame: DeviceFrame| own[frame.0 as usize].take().expect("allocated");
            let (frame, bytes) = match job.kind() {
                CopyKind::In { from, to } => {
                    let mut bytes = page(to);
                    memory.read(from, 0, &mut bytes[..]);
                    (to, bytes)
                }
                CopyKind::Out { from, to } => {
                    let bytes = page(from);
                    memory.write(to, 0, &bytes[..]);
                    (from, bytes)
                }
                CopyKind::Clear { to } => (to, Box::new([0; PAGE_SIZE])),
            };
            own[frame.0 as usize] = Some(bytes);
            job.complete();
        }
    }
}

/// Tells whether an access got what marks a page that is lost. A kernel that knows nothing of bad
/// memory says so in other words.
fn is_poisoned(value: Result<u64, Trap>) -> bool {
    matches!(value, Err(Trap::Poisoned | Trap::NoPage))
}

/// Runs `body` on a thread, and does `meanwhile` here.
fn beside<T: Send>(body: impl FnOnce() -> T + Send, meanwhile: impl FnOnce()) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(body);
        meanwhile();
        thread.join().expect("it does not panic")
    })
}

#[test]
fn a_fork_brings_everything_home_first() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        let out = memory.scatter();
        let pid = child(How::Hooked, || memory.is_right(1));
        let statistics = memory.process.statistics();
        assert_eq!(statistics.fork_overrun, out);
        assert_eq!(statistics.unforeseen_forks, 0);
        assert_eq!(end_of(pid), End::Well);
        memory.check(1);
    });
}

#[test]
fn a_fork_that_nobody_announced_gives_the_child_everything() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        let pid = child(How::Raw, || memory.is_right(1));
        let statistics = memory.process.statistics();
        assert_eq!(statistics.fork_overrun, 0);
        assert_eq!(statistics.unforeseen_forks, 1);
        memory.fill(2);
        assert_eq!(end_of(pid), End::Well);
        memory.check(2);
    });
}

#[test]
fn what_either_stores_after_a_fork_the_other_does_not_see() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        for round in 1..=50 {
            for how in WAYS {
                memory.fill(round);
                memory.scatter();
                let pid = child(how, || {
                    let right = memory.is_right(round);
                    memory.fill(round + 2000);
                    right && memory.is_right(round + 2000)
                });
                memory.fill(round + 1000);
                memory.check(round + 1000);
                assert_eq!(end_of(pid), End::Well, "{how:?}, round {round}");
                memory.check(round + 1000);
            }
        }
    });
}

#[test]
fn pages_that_are_parked_are_in_the_child_too() {
    in_own_process(|| {
        let injector = uhmm::Injector::new();
        let process =
            common::rig::attach_with(uhmm_linux::Options::new().injector(injector.clone()));
        for how in WAYS {
            let memory = Scattered::new(&process);
            memory.fill(1);
            memory.scatter();
            for step in ["move", "copy", "zeropage"] {
                injector.fail_always(step);
            }
            process.migrate_home(memory.mapping.range());
            injector.clear();
            assert!(process.statistics().parked > 0);
            let pid = child(how, || memory.is_right(1));
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            memory.check(1);
        }
    });
}

#[test]
fn pages_in_transit_by_another_thread_are_waited_for() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        for how in WAYS {
            memory.fill(1);
            let process = &memory.process;
            let before = process.statistics();
            let migration = process.migrate(memory.part(0), &memory.gpu.pagemap);
            let known = || {
                let now = process.statistics();
                let known = now.fork_overrun + now.unforeseen_forks;
                known > before.fork_overrun + before.unforeseen_forks
            };
            let memory = &memory;
            let forked = AtomicBool::new(false);
            let pid = beside(
                || {
                    let pid = child(how, || memory.is_right(1));
                    forked.store(true, Ordering::SeqCst);
                    pid
                },
                || {
                    assert!(eventually(known), "{how:?}: the fork has begun");
                    assert!(!forked.load(Ordering::SeqCst), "{how:?}: it waits");
                    let report = migration.run();
                    assert_eq!(report.moved, Scattered::PART, "{report:?}");
                },
            );
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            memory.check(1);
        }
    });
}

/// Such a child cannot have the pages: it gets a signal if it touches them, and never zeroes.
#[test]
fn pages_in_transit_by_the_thread_that_forks_are_no_zeroes() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        for how in WAYS {
            memory.fill(1);
            let migration = memory.process.migrate(memory.part(0), &memory.gpu.pagemap);
            let pid = child(how, || {
                let values = memory.part(0).iter().map(|page| trap::load(page.address()));
                values.enumerate().all(|(index, value)| {
                    value == Ok(Scattered::value(index as u64, 1)) || is_poisoned(value)
                })
            });
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            drop(migration);
            memory.check(1);
        }
    });
}

#[test]
fn what_the_parent_does_to_its_mappings_meanwhile_is_not_done_to_the_child() {
    in_own_process(|| {
        let process = attach();
        let gated = Gated::new(64);
        let device = DevicePagemap::register(Arc::clone(&gated) as Arc<dyn DeviceMemory>);
        let (a, b, c, d) = (
            Mapping::anonymous(8),
            Mapping::anonymous(8),
            Mapping::anonymous(8),
            Mapping::anonymous(8),
        );
        for (mapping, seed) in [(&a, 100), (&b, 200), (&c, 300), (&d, 400)] {
            mapping.fill(|index| seed + index);
            let report = process.migrate(mapping.range(), &device).run();
            assert_eq!(report.moved, 8, "{report:?}");
        }
        gated.open(false);
        let ranges = [a.range(), b.range(), c.range(), d.range()];
        let right = || {
            (0..4).all(|which| {
                (0..8).all(|index| {
                    let address = ranges[which].first().address() + index * PAGE_SIZE as u64;
                    let value = trap::load(address);
                    let expected = (which as u64 + 1) * 100 + index;
                    if value != Ok(expected) {
                        common::loudly(&format!("{which}/{index}: {value:?}"));
                    }
                    value == Ok(expected)
                })
            })
        };
        let pid = beside(
            || child(How::Raw, right),
            || {
                assert!(eventually(|| process.statistics().unforeseen_forks == 1));
                // One goes, one is moved over another, one is discarded.
                unmap(a.part(0, 4));
                remap(b.range(), c.range().first()).expect("both are mapped");
                common::memory::advise(d.part(2, 3), libc::MADV_DONTNEED).expect("it is mapped");
                gated.open(true);
            },
        );
        assert_eq!(end_of(pid), End::Well);
        let at = |range: uhmm::PageRange, index: u64| {
            trap::load(range.first().address() + index * PAGE_SIZE as u64)
        };
        for index in 0..8 {
            let gone = if index < 4 { Err(Trap::Unmapped) } else { Ok(100 + index) };
            assert_eq!(at(ranges[0], index), gone, "a, {index}");
            assert_eq!(at(ranges[1], index), Err(Trap::Unmapped), "b, {index}");
            assert_eq!(at(ranges[2], index), Ok(200 + index), "c, {index}");
            let discarded = (2..5).contains(&index);
            assert_eq!(
                at(ranges[3], index),
                Ok(if discarded { 0 } else { 400 + index }),
                "d, {index}"
            );
        }
        assert_eq!(device.used(), 0);
    });
}

#[test]
fn a_device_that_does_not_give_its_pages_leaves_the_child_no_zeroes() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        memory.gpu.injector.fail_always("copy");
        let pid = child(How::Raw, || {
            let values = memory.part(0).iter().map(|page| trap::load(page.address()));
            let poisoned = values.filter(|&value| is_poisoned(value)).count() as u64;
            let rest = (Scattered::PART..Scattered::PAGES).all(|index| {
                trap::load(memory.mapping.word(index)) == Ok(Scattered::value(index, 1))
            });
            // It is the child's own to overwrite.
            unmap(memory.part(0));
            poisoned == Scattered::PART && rest
        });
        assert_eq!(end_of(pid), End::Well);
        memory.gpu.injector.clear();
        memory.check(1);
    });
}

/// What a parent has unmapped is kept for a child that lacks it, and for no longer.
#[test]
fn what_was_kept_for_a_child_in_vain_is_freed() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        memory.gpu.injector.fail_always("copy");
        let first = memory.mapping.word(0);
        let pid = beside(
            || child(How::Raw, || is_poisoned(trap::load(first))),
            || {
                assert!(eventually(|| memory.process.statistics().unforeseen_forks == 1));
                unmap(memory.part(0));
            },
        );
        assert_eq!(end_of(pid), End::Well);
        memory.gpu.injector.clear();
        assert!(eventually(|| memory.gpu.pagemap.used() == 0), "{}", memory.gpu.pagemap.used());
    });
}

#[test]
fn a_child_is_free_to_do_what_it_wants_at_once() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        for round in 1..=20 {
            memory.fill(round);
            memory.scatter();
            let pid = child(How::Raw, || {
                // Discards, moves, unmaps and forks before it has looked.
                let discard = |part| common::memory::advise(memory.part(part), libc::MADV_DONTNEED);
                discard(0).expect("it is mapped");
                let target = Mapping::anonymous(Scattered::PART);
                remap(memory.part(1), target.range().first()).expect("both are mapped");
                unmap(memory.part(2));
                let grandchild = child(How::Raw, || {
                    (0..Scattered::PART).all(|index| {
                        let expected = Scattered::value(Scattered::PART + index, round);
                        target.peek(index) == expected && memory.mapping.peek(index) == 0
                    })
                });
                let third = (3 * Scattered::PART..Scattered::PAGES)
                    .all(|index| memory.mapping.peek(index) == Scattered::value(index, round));
                third && end_of(grandchild) == End::Well
            });
            assert_eq!(end_of(pid), End::Well, "round {round}");
            memory.check(round);
        }
    });
}

#[test]
fn grandchildren_have_everything() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        for (first, second) in [
            (How::Raw, How::Raw),
            (How::Raw, How::Hooked),
            (How::Hooked, How::Raw),
            (How::Hooked, How::Hooked),
        ] {
            memory.fill(1);
            memory.scatter();
            let pid = child(first, || {
                memory.fill(2);
                let grandchild = child(second, || memory.is_right(2));
                memory.fill(3);
                end_of(grandchild) == End::Well && memory.is_right(3)
            });
            assert_eq!(end_of(pid), End::Well, "{first:?}, {second:?}");
            memory.check(1);
        }
    });
}

#[test]
fn a_child_can_attach_anew_while_its_parent_goes_on() {
    in_own_process(|| {
        for how in WAYS {
            let process = attach();
            let memory = Scattered::new(&process);
            memory.fill(1);
            memory.scatter();
            let pid = child(how, || {
                // Of the parent's attachment nothing is left here.
                assert!(process.migrate(memory.mapping.range(), &memory.host).run().moved == 0);
                let process = attach();
                let own = Scattered::new(&process);
                own.fill(5);
                own.scatter();
                let grandchild = child(How::Raw, || own.is_right(5) && memory.is_right(1));
                let report = process.migrate(memory.part(3), &own.gpu.pagemap).run();
                assert_eq!(report.moved, Scattered::PART, "{report:?}");
                own.is_right(5) && memory.is_right(1) && end_of(grandchild) == End::Well
            });
            memory.scatter();
            memory.check(1);
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            memory.scatter();
            memory.check(1);
        }
    });
}

/// The parent's attachment is none of the child's, in which threads may come to attach at once.
#[test]
fn of_several_threads_of_a_child_one_attaches() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        for round in 0..20 {
            let pid = child(WAYS[round % 2], || {
                let barrier = Barrier::new(3);
                let attach = || {
                    barrier.wait();
                    Process::attach(Options::new())
                };
                let attached = thread::scope(|scope| {
                    let threads = [(); 3].map(|()| scope.spawn(attach));
                    threads.map(|thread| thread.join().expect("it does not panic"))
                });
                let (ours, refused): (Vec<_>, Vec<_>) =
                    attached.into_iter().partition(Result::is_ok);
                let already = |result: &Result<Process, AttachError>| {
                    matches!(result, Err(AttachError::AlreadyAttached))
                };
                ours.len() == 1 && refused.iter().all(already)
            });
            assert_eq!(end_of(pid), End::Well, "round {round}");
        }
        assert_eq!(Process::attach(Options::new()).err(), Some(AttachError::AlreadyAttached));
        memory.scatter();
        memory.check(1);
    });
}

/// What the child inherited refers to the parent's memory.
#[test]
fn a_child_that_drops_what_it_inherited_leaves_its_parent_alone() {
    in_own_process(|| {
        for how in WAYS {
            let memory = Scattered::new(&attach());
            memory.fill(1);
            let mut memory = Some(memory);
            for _ in 0..3 {
                memory.as_ref().expect("ours").scatter();
                let pid = child(how, || {
                    drop(memory.take());
                    true
                });
                assert_eq!(end_of(pid), End::Well, "{how:?}");
                memory.as_ref().expect("ours").check(1);
            }
        }
    });
}

#[test]
fn a_parent_can_detach_while_a_child_lives() {
    in_own_process(|| {
        for how in WAYS {
            let before = holdings();
            let board = Board::new();
            let memory = Scattered::new(&attach());
            memory.fill(1);
            memory.scatter();
            let pid = child(how, || {
                while board.get(0) == 0 {
                    thread::yield_now();
                }
                memory.is_right(1)
            });
            memory.scatter();
            memory.check(1);
            let (process, mapping) = memory.into_process();
            drop(process);
            // Nothing is left that anybody would have to be told.
            mapping.fill(|index| index);
            drop(mapping);
            board.set(0, 1);
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            drop(board);
            assert_eq!(holdings().difference(&before), "");
        }
    });
}

/// Forks all the time, from several threads, while others send pages away.
fn bomb(how: How, time: Duration) {
    let process = attach();
    let ended = AtomicBool::new(false);
    let began = Instant::now();
    let children = thread::scope(|scope| {
        let mover = || {
            let memory = Scattered::new(&process);
            let mut rounds = 0_u64;
            while !ended.load(Ordering::SeqCst) {
                rounds += 1;
                memory.fill(rounds);
                process.migrate(memory.part(0), &memory.gpu.pagemap).run();
                process.migrate(memory.part(1), &memory.host).run();
                memory.check(rounds);
            }
        };
        let forker = || {
            let memory = Scattered::new(&process);
            let mut rounds = 0;
            while began.elapsed() < time {
                rounds += 1;
                memory.fill(rounds);
                // Some of them may be busy with another's fork.
                process.migrate(memory.part(0), &memory.gpu.pagemap).run();
                process.migrate(memory.part(1), &memory.host).run();
                let pid = child(how, || {
                    let right = memory.is_right(rounds);
                    unmap(memory.mapping.range());
                    right
                });
                memory.fill(rounds + 1_000_000);
                assert_eq!(end_of(pid), End::Well, "{how:?}, round {rounds}");
                memory.check(rounds + 1_000_000);
            }
            rounds
        };
        let movers = [scope.spawn(mover), scope.spawn(mover)];
        let forkers = [scope.spawn(forker), scope.spawn(forker), scope.spawn(forker)];
        let children: u64 = forkers.map(|thread| thread.join().expect("no panic")).iter().sum();
        ended.store(true, Ordering::SeqCst);
        movers.into_iter().for_each(|thread| thread.join().expect("no panic"));
        children
    });
    assert!(children >= 30, "only {children} children in {time:?}");
    let statistics = process.statistics();
    let seen = match how {
        How::Hooked => statistics.fork_overrun,
        How::Raw => statistics.unforeseen_forks,
    };
    assert!(seen >= 10, "{statistics:?}");
    println!("{how:?}: {children} children, {statistics:?}");
}

#[test]
fn threads_fork_while_others_migrate() {
    in_own_process(|| bomb(How::Hooked, Duration::from_secs(3)));
}

#[test]
fn threads_fork_unannounced_while_others_migrate() {
    in_own_process(|| bomb(How::Raw, Duration::from_secs(3)));
}

/// While the child is being supplied neither it nor the thread that forked runs, so that a parent
/// that is killed then has no child.
#[test]
fn a_parent_that_is_killed_while_its_child_lacks_pages_has_no_child() {
    in_own_process(|| {
        let board = Board::new();
        let middle = child(How::Hooked, || {
            let process = attach();
            let gated = Gated::new(64);
            let device = DevicePagemap::register(Arc::clone(&gated) as Arc<dyn DeviceMemory>);
            let mapping = Mapping::anonymous(8);
            mapping.fill(|index| 100 + index);
            assert_eq!(process.migrate(mapping.range(), &device).run().moved, 8);
            gated.open(false);
            beside(
                || {
                    if fork_by(How::Raw).is_none() {
                        board.set(0, 1);
                        exit_now(0);
                    }
                    board.set(1, 1);
                },
                || {
                    assert!(eventually(|| process.statistics().unforeseen_forks == 1));
                    board.set(2, 1);
                    loop {
                        thread::park();
                    }
                },
            );
            false
        });
        assert!(eventually(|| board.get(2) == 1), "the fork is under way");
        send(middle, Signal::KILL);
        assert_eq!(end_of(middle), End::Signal(libc::SIGKILL));
        assert_eq!(board.get(1), 0, "the fork had not returned");
        // Whoever is left of it would be in our group.
        let own = std::process::id();
        let others = || {
            let members = common::stacks::members(own);
            members.into_iter().any(|pid| pid != own)
        };
        assert!(eventually(|| !others()), "{}", common::stacks::of_group(own));
        assert_eq!(board.get(0), 0, "there has been no child");
    });
}

/// Whenever the parent is killed: a child that there is has everything.
#[test]
fn a_child_of_a_parent_that_is_killed_at_any_time_has_everything() {
    OwnProcess::new().deadline(Duration::from_secs(90)).run(|| {
        let own = Some(rustix::process::getpid());
        rustix::process::set_child_subreaper(own).expect("prctl");
        let board = Board::new();
        let (mut killed, mut forked) = (0, 0);
        let began = Instant::now();
        let mut round = 0;
        while began.elapsed() < Duration::from_secs(8) {
            round += 1;
            board.set(0, 0);
            board.set(1, 0);
            let middle = child(How::Hooked, || {
                let memory = Scattered::new(&attach());
                for seed in 1.. {
                    memory.fill(seed);
                    memory.scatter();
                    board.set(0, seed);
                    child(How::Raw, || {
                        board.add(1, 1);
                        let right = memory.is_right(seed);
                        if !right {
                            board.add(2, 1);
                        }
                        right
                    });
                }
                false
            });
            assert!(eventually(|| board.get(0) > 0), "it has begun");
            // Any moment will do, and each round takes another.
            let moment = Duration::from_micros((round * 7919) % 3000);
            let from = Instant::now();
            while from.elapsed() < moment {
                std::hint::spin_loop();
            }
            send(middle, Signal::KILL);
            assert_eq!(end_of(middle), End::Signal(libc::SIGKILL));
            // Its children are ours now.
            while let Ok(Some((pid, _))) =
                rustix::process::wait(rustix::process::WaitOptions::empty())
            {
                assert_ne!(pid.as_raw_nonzero().get() as u32, middle);
            }
            killed += 1;
            forked += board.get(1);
            assert_eq!(board.get(2), 0, "round {round}: a child lacks something");
        }
        println!("{killed} parents killed, {forked} children");
        assert!(killed >= 20 && forked >= 5, "{killed} parents, {forked} children");
    });
}

#[test]
fn programs_are_started_without_bringing_anything_home() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        let output = Command::new("sh").args(["-c", "echo out; exit 3"]).output().expect("sh runs");
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(output.stdout, b"out\n");
        // SAFETY: the command is a string that ends with a zero.
        let status = unsafe { libc::system(c"exit 5".as_ptr()) };
        assert_eq!(libc::WEXITSTATUS(status), 5);
        let statistics = memory.process.statistics();
        assert_eq!((statistics.fork_overrun, statistics.unforeseen_forks), (0, 0));
        assert!(memory.part(1).iter().all(|page| is_out(&memory.process, page)));
        memory.check(1);
    });
}

#[test]
fn programs_are_started_after_a_fork() {
    in_own_process(|| {
        use std::os::unix::process::CommandExt as _;
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        let mut command = Command::new("sh");
        command.args(["-c", "exit 3"]);
        let address = memory.mapping.word(2);
        // SAFETY: a load from memory that is mapped, and nothing else.
        unsafe {
            command.pre_exec(move || {
                assert_eq!(trap::load(address), Ok(Scattered::value(2, 1)));
                Ok(())
            })
        };
        assert_eq!(command.status().expect("sh runs").code(), Some(3));
        assert!(memory.process.statistics().fork_overrun > 0);
        memory.scatter();
        if fork_by(How::Raw).is_none() {
            let arguments = [c"sh".as_ptr(), c"-c".as_ptr(), c"exit 0".as_ptr(), std::ptr::null()];
            // SAFETY: strings that end with zeroes, and a list that ends with a null pointer.
            unsafe { libc::execvp(c"sh".as_ptr(), arguments.as_ptr()) };
            exit_now(9);
        }
        let mut status = 0;
        // SAFETY: there is room for the status.
        let pid = unsafe { libc::wait(&raw mut status) };
        assert!(pid > 0 && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
        memory.check(1);
    });
}

/// A child made by vfork(2) has its parent's memory, and its parent's servers.
#[test]
fn a_vforked_child_is_served() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        extern "C" fn body(memory: *mut libc::c_void) -> libc::c_int {
            // SAFETY: the parent waits, and keeps it alive.
            let memory = unsafe { &*memory.cast::<Scattered>() };
            let page = memory.part(1).first().address();
            i32::from(trap::load(page) != Ok(Scattered::value(Scattered::PART, 1)))
        }
        let mut stack = vec![0_u128; 8192];
        let end = stack.as_mut_ptr_range().end.cast::<libc::c_void>();
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let argument = (&raw const memory).cast_mut().cast::<libc::c_void>();
        // SAFETY: the stack is the child's alone, and outlives it: the parent waits (CLONE_VFORK).
        let pid = unsafe { libc::clone(body, end, flags, argument) };
        assert!(pid > 0, "clone: {}", std::io::Error::last_os_error());
        assert_eq!(end_of(pid as u32), End::Well);
        let statistics = memory.process.statistics();
        assert_eq!((statistics.fork_overrun, statistics.unforeseen_forks), (0, 0));
        memory.check(1);
    });
}

#[test]
fn a_process_can_become_another_program_with_its_pages_out() {
    in_own_process(|| {
        let middle = child(How::Hooked, || {
            let memory = Scattered::new(&attach());
            memory.fill(1);
            memory.scatter();
            let arguments = [c"sh".as_ptr(), c"-c".as_ptr(), c"exit 0".as_ptr(), std::ptr::null()];
            // SAFETY: strings that end with zeroes, and a list that ends with a null pointer.
            unsafe { libc::execvp(c"sh".as_ptr(), arguments.as_ptr()) };
            false
        });
        assert!(ends_within(middle, Duration::from_secs(10)));
        assert_eq!(end_of(middle), End::Well);
    });
}

/// What the program wants a child to find wiped is wiped there, wherever it was.
#[test]
fn what_is_wiped_on_fork_is_wiped() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        for how in WAYS {
            memory.fill(1);
            common::memory::advise(memory.part(1), libc::MADV_WIPEONFORK).expect("it is anonymous");
            memory.scatter();
            let pid = child(how, || {
                memory.part(1).iter().all(|page| trap::load(page.address()) == Ok(0))
                    && memory.part(0).iter().all(|page| trap::load(page.address()) != Ok(0))
            });
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            memory.check(1);
            common::memory::advise(memory.part(1), libc::MADV_KEEPONFORK).expect("it is anonymous");
        }
    });
}

#[test]
fn what_children_do_not_get_they_do_not_get() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        for how in WAYS {
            memory.fill(1);
            common::memory::advise(memory.part(1), libc::MADV_DONTFORK).expect("it is anonymous");
            memory.scatter();
            let pid = child(how, || {
                memory.part(1).iter().all(|page| trap::load(page.address()) == Err(Trap::Unmapped))
            });
            assert_eq!(end_of(pid), End::Well, "{how:?}");
            memory.check(1);
            common::memory::advise(memory.part(1), libc::MADV_DOFORK).expect("it is anonymous");
        }
    });
}

/// A process that was forked while it waited for a page, or for an event, is no worse for it.
#[test]
fn forks_go_on_while_pages_fault() {
    in_own_process(|| {
        alarm(Duration::from_secs(50));
        let memory = Scattered::new(&attach());
        memory.fill(1);
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !ended.load(Ordering::SeqCst) {
                        memory.check(1);
                        let other = Mapping::anonymous(4);
                        other.fill(|index| index);
                        memory.process.migrate(other.range(), &memory.host).run();
                    }
                });
            }
            for round in 0..100 {
                memory.process.migrate(memory.part(0), &memory.gpu.pagemap).run();
                let how = WAYS[round % 2];
                let pid = child(how, || memory.is_right(1));
                assert_eq!(end_of(pid), End::Well, "{how:?}, round {round}");
            }
            ended.store(true, Ordering::SeqCst);
        });
    });
}
