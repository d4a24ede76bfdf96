//! What is refused, and what is left as it was then.

use uhmm::{PAGE_SIZE, PageRange};
use uhmm_agent::dmirror::abi::{Command, check};
use uhmm_agent::dmirror::{Counts, Errno, Request};

use super::common::in_own_process;
use super::common::memory::{Backing, NONE, R, RW, W, part, place, protect, unmap};
use super::rig::{Rig, ask, asked, counting, filled, load, peeked, snapshot, store, to_dev};

#[test]
fn numbers_are_those_of_the_kernel() {
    for (index, command) in Command::ALL.into_iter().enumerate() {
        assert_eq!(command.number(), 0xc028_4800 + index as u32);
        assert_eq!(Command::of(command.number()), Ok(command));
    }
    for number in [0, 0xc028_47ff, 0xc028_4809, 0xc020_4800, 0x4028_4800, 0xc028_4900, u32::MAX] {
        assert_eq!(Command::of(number), Err(Errno::INVAL), "{number:#x}");
    }
}

#[test]
fn addresses_and_lengths_are_checked_first() {
    let of = |addr, npages| check(Request { addr, npages });
    assert_eq!(of(0x1001, 1), Err(Errno::INVAL));
    assert_eq!(of(0x1000, 0), Err(Errno::INVAL));
    assert_eq!(of(0x1000, u64::MAX), Err(Errno::INVAL));
    // To the very end, and round it.
    assert_eq!(of(u64::MAX - 0xfff, 1), Err(Errno::INVAL));
    assert_eq!(of(u64::MAX - 0xfff, 2), Err(Errno::INVAL));
    assert_eq!(of(u64::MAX - 0x1fff, 1), Ok(PageRange::new(u64::MAX - 0x1fff, 0x1000).unwrap()));
    // Modulo 2^64, as the kernel multiplies.
    assert_eq!(of(0x1000, (1 << 52) + 2), Ok(PageRange::new(0x1000, 0x2000).unwrap()));
}

#[test]
fn bad_requests_are_refused_by_every_command() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(0);
        for command in Command::ALL {
            for (addr, npages) in [(0x1001, 1), (0x1000, 0), (u64::MAX - 0xfff, 1)] {
                let request = Request { addr, npages };
                let mut output = vec![7];
                let result = file.ioctl(command, request, &[], &mut output);
                assert_eq!((result, output.len()), (Err(Errno::INVAL), 0), "{command:?}");
            }
        }
    });
}

#[test]
fn nothing_that_is_not_mapped_can_be_used() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let hole = place(8);
            assert_eq!(ask(&file, Command::Read, hole), Err(Errno::FAULT));
            assert_eq!(store(&file, hole, |_| 1), Err(Errno::FAULT));
            assert_eq!(ask(&file, Command::MigrateToDev, hole), Err(Errno::INVAL));
            assert_eq!(ask(&file, Command::MigrateToSys, hole), Err(Errno::INVAL));
            assert_eq!(ask(&file, Command::Exclusive, hole), Err(Errno::BUSY));
            assert_eq!(snapshot(&file, hole), [0xff; 8]);
            let nothing = Ok((Counts::default(), Vec::new()));
            assert_eq!(ask(&file, Command::CheckExclusive, hole), nothing);
            assert_eq!(ask(&file, Command::Release, hole), nothing);
            assert_eq!(ask(&file, Command::Flags, hole), nothing);
            // What is no address of a program's.
            let kernel = PageRange::new(0xffff_8000_0000_0000, 0x8000).unwrap();
            assert_eq!(ask(&file, Command::Read, kernel), Err(Errno::FAULT));
            assert_eq!(snapshot(&file, kernel), [0xff; 8]);
        }
    });
}

#[test]
fn the_end_of_all_addresses_is_too_far_for_a_snapshot() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(0);
        let before = |pages: u64| PageRange::new(u64::MAX - 0xfff - (pages << 12), 0x1000).unwrap();
        assert_eq!(ask(&file, Command::Snapshot, before(1)), Err(Errno::OVERFLOW));
        assert_eq!(ask(&file, Command::Snapshot, before(63)), Err(Errno::OVERFLOW));
        assert_eq!(snapshot(&file, before(64)), [0xff]);
    });
}

#[test]
fn rights_are_those_of_the_mapping() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 3);
            protect(memory.range(), W).expect("mprotect");
            assert_eq!(ask(&file, Command::Read, memory.range()), Err(Errno::FAULT));
            assert_eq!(store(&file, memory.range(), |_| 0), Err(Errno::FAULT));
            assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::INVAL));
            assert_eq!(snapshot(&file, memory.range()), [0xff; 4]);
            protect(memory.range(), R).expect("mprotect");
            assert_eq!(store(&file, memory.range(), |_| 0), Err(Errno::PERM));
            assert_eq!(ask(&file, Command::Exclusive, memory.range()), Err(Errno::BUSY));
            assert_eq!(load(&file, memory.range(), 1), counting(3, 4));
            protect(memory.range(), RW).expect("mprotect");
            assert_eq!(peeked(&memory), counting(3, 4));
        }
    });
}

/// What is in the table does not outlive the right to it.
#[test]
fn rights_are_looked_at_each_time() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 3);
            load(&file, memory.range(), 1);
            protect(memory.range(), NONE).expect("mprotect");
            assert_eq!(ask(&file, Command::Read, memory.range()), Err(Errno::FAULT));
            protect(memory.range(), RW).expect("mprotect");
            to_dev(&file, memory.range());
            protect(memory.range(), NONE).expect("mprotect");
            assert_eq!(ask(&file, Command::Read, memory.range()), Err(Errno::FAULT));
            assert_eq!(store(&file, memory.range(), |_| 0), Err(Errno::FAULT));
            protect(memory.range(), R).expect("mprotect");
            assert_eq!(store(&file, memory.range(), |_| 0), Err(Errno::PERM));
            assert_eq!(peeked(&memory), counting(3, 4));
        }
    });
}

/// Pages before the one that cannot be had are stored to if the device has them, and not otherwise.
#[test]
fn a_store_that_fails_half_way() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 10);
            protect(part(memory.range(), 2, 2), R).expect("mprotect");
            assert_eq!(store(&file, memory.range(), |_| 1), Err(Errno::PERM));
            assert_eq!(peeked(&memory), [10, 11, 12, 13]);
            // Page 0 is the device's by now.
            assert_eq!(store(&file, memory.part(0, 1), |_| 5).map(|done| done.faults), Ok(1));
            assert_eq!(store(&file, memory.range(), |_| 1), Err(Errno::PERM));
            assert_eq!(peeked(&memory), [1, 11, 12, 13]);
        }
    });
}

#[test]
fn a_migration_that_fails_half_way_leaves_what_it_did() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 10);
            unmap(memory.part(2, 1));
            assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::INVAL));
            let there = if file.unit().is_coherent() { 0x42 } else { 0x22 };
            assert_eq!(snapshot(&file, memory.range()), [there, there, 0xff, 0x02]);
            assert_eq!(ask(&file, Command::MigrateToSys, memory.range()), Err(Errno::INVAL));
            assert_eq!(snapshot(&file, memory.range()), [0x02, 0x02, 0xff, 0x02]);
            super::common::memory::map(memory.part(2, 1), Backing::Anonymous, RW).expect("mmap");
        }
    });
}

#[test]
fn more_than_the_system_has_is_not_allocated() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(0);
        let memory = filled(1, 0);
        let huge = Request { addr: memory.range().address(), npages: 1 << 32 };
        assert_eq!(Command::Write.input_bytes(huge), Err(Errno::NOMEM));
        assert_eq!(Command::Read.input_bytes(huge), Ok(0));
        assert_eq!(file.ioctl(Command::Read, huge, &[], &mut Vec::new()), Err(Errno::NOMEM));
        assert_eq!(file.ioctl(Command::Snapshot, huge, &[], &mut Vec::new()), Err(Errno::NOMEM));
        // These come to what is not mapped first.
        assert_eq!(
            file.ioctl(Command::MigrateToDev, huge, &[], &mut Vec::new()),
            Err(Errno::INVAL)
        );
        assert_eq!(
            file.ioctl(Command::MigrateToSys, huge, &[], &mut Vec::new()),
            Err(Errno::INVAL)
        );
        let checked = file.ioctl(Command::CheckExclusive, huge, &[], &mut Vec::new());
        assert_eq!(checked, Ok(Counts::default()));
    });
}

#[test]
fn input_of_another_length_is_refused() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(0);
        let memory = filled(2, 8);
        let request = Request { addr: memory.range().address(), npages: 2 };
        for bytes in [0, PAGE_SIZE, 3 * PAGE_SIZE] {
            let input = vec![0; bytes];
            let result = file.ioctl(Command::Write, request, &input, &mut Vec::new());
            assert_eq!(result, Err(Errno::FAULT));
        }
        assert_eq!(peeked(&memory), [8, 9]);
    });
}

#[test]
fn everything_says_what_it_does_once_the_address_space_is_another() {
    in_own_process(|| {
        use super::common::children::{End, How, child, end_of};
        let rig = Rig::new();
        let file = rig.open(0);
        let memory = filled(2, 8);
        asked(&file, Command::Read, memory.range(), 1);
        // In a child the opener's address space is not there.
        let pid = child(How::Hooked, || {
            let range = memory.range();
            let nothing = Ok((Counts::default(), Vec::new()));
            ask(&file, Command::Read, range) == Err(Errno::FAULT)
                && store(&file, range, |_| 1) == Err(Errno::FAULT)
                && ask(&file, Command::MigrateToDev, range) == Err(Errno::INVAL)
                && ask(&file, Command::MigrateToSys, range) == Err(Errno::INVAL)
                && ask(&file, Command::Snapshot, range) == Err(Errno::INVAL)
                && ask(&file, Command::Exclusive, range) == Err(Errno::INVAL)
                && ask(&file, Command::CheckExclusive, range) == nothing
                && ask(&file, Command::Release, range) == nothing
                && rig.mm.open(file.unit()).is_err()
        });
        assert_eq!(end_of(pid), End::Well);
        assert_eq!(load(&file, memory.range(), 1), [8, 9]);
    });
}
