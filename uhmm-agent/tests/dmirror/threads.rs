//! Several threads at once, while the program uses its memory and changes its mappings.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uhmm_agent::dmirror::{Command, Errno};

use super::common::memory::{Backing, Mapping, RW, map};
use super::common::{OwnProcess, in_own_process};
use super::rig::{Rig, ask, filled, store};

/// How long the threads go on.
const FOR: Duration = Duration::from_secs(3);

/// Nothing but what can come of pages being taken away in the middle.
fn is_fair(error: Errno) -> bool {
    matches!(error, Errno::BUSY | Errno::NOENT | Errno::FAULT | Errno::PERM | Errno::INVAL)
}

#[test]
fn no_store_of_a_cpu_is_lost() {
    OwnProcess::new().deadline(Duration::from_secs(100)).run(|| {
        let rig = Rig::new();
        let files = [rig.open(0), rig.open(0), rig.open(1), rig.open(2)];
        let memory = filled(64, 0);
        let over = AtomicBool::new(false);
        let done = AtomicU64::new(0);
        std::thread::scope(|threads| {
            for (index, file) in files.iter().enumerate() {
                let (memory, over, done) = (&memory, &over, &done);
                threads.spawn(move || {
                    let commands = [
                        Command::Read,
                        Command::MigrateToDev,
                        Command::Snapshot,
                        Command::MigrateToSys,
                        Command::Exclusive,
                        Command::CheckExclusive,
                        Command::Release,
                    ];
                    let mut turn = index;
                    while !over.load(Ordering::SeqCst) {
                        turn += 1;
                        let range = memory.part((turn * 7 % 48) as u64, 16);
                        match ask(file, commands[turn % commands.len()], range) {
                            Ok(_) => done.fetch_add(1, Ordering::SeqCst),
                            Err(error) if is_fair(error) => 0,
                            Err(error) => panic!("{error}"),
                        };
                    }
                });
            }
            for half in 0..2 {
                let (memory, over) = (&memory, &over);
                threads.spawn(move || {
                    let began = Instant::now();
                    let mut rounds = 0;
                    while began.elapsed() < FOR {
                        rounds += 1;
                        for index in half * 32..half * 32 + 32 {
                            assert_eq!(memory.peek(index), index + 1000 * (rounds - 1));
                            memory.poke(index, index + 1000 * rounds);
                        }
                    }
                    over.store(true, Ordering::SeqCst);
                    for index in half * 32..half * 32 + 32 {
                        assert_eq!(memory.peek(index), index + 1000 * rounds);
                    }
                });
            }
        });
        assert!(done.load(Ordering::SeqCst) > 20, "the device did something");
    });
}

#[test]
fn mappings_that_come_and_go() {
    OwnProcess::new().deadline(Duration::from_secs(100)).run(|| {
        let rig = Rig::new();
        let files = [rig.open(0), rig.open(2)];
        let memory = filled(64, 0);
        let over = AtomicBool::new(false);
        std::thread::scope(|threads| {
            for file in &files {
                let (memory, over) = (&memory, &over);
                threads.spawn(move || {
                    while !over.load(Ordering::SeqCst) {
                        let range = memory.range();
                        let results = [
                            ask(file, Command::MigrateToDev, range).map(drop),
                            ask(file, Command::Read, range).map(drop),
                            store(file, memory.part(32, 32), |_| 5).map(drop),
                            ask(file, Command::Exclusive, memory.part(0, 8)).map(drop),
                            ask(file, Command::MigrateToSys, range).map(drop),
                        ];
                        for error in results.into_iter().filter_map(Result::err) {
                            assert!(is_fair(error), "{error}");
                        }
                    }
                });
            }
            let began = Instant::now();
            let mut rounds = 0;
            while began.elapsed() < FOR {
                rounds += 1;
                // Fresh memory: nobody has stored anything to the first half but this thread.
                map(memory.part(0, 32), Backing::Anonymous, RW).expect("mmap");
                for index in 0..32 {
                    assert_eq!(memory.peek(index), 0, "in round {rounds}");
                    memory.poke(index, rounds + index);
                }
                for index in 0..32 {
                    assert_eq!(memory.peek(index), rounds + index, "in round {rounds}");
                }
            }
            over.store(true, Ordering::SeqCst);
        });
    });
}

#[test]
fn many_opens_of_all_units_at_once() {
    in_own_process(|| {
        let rig = Rig::new();
        let memory = filled(16, 3);
        std::thread::scope(|threads| {
            for number in 0..8 {
                let (rig, memory) = (&rig, &memory);
                threads.spawn(move || {
                    for _ in 0..20 {
                        let file = rig.open(number % 4);
                        let done = ask(&file, Command::Read, memory.range());
                        let (counts, _) = done.expect("nobody takes anything away for long");
                        assert_eq!(counts.cpages, 16);
                    }
                });
            }
        });
        let _ = Mapping::anonymous(1);
    });
}
