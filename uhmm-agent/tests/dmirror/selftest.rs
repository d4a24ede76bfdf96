//! What the kernel's own tests ask for (`tools/testing/selftests/mm/hmm-tests.c`), by their names, for
//! units of both sorts.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uhmm::PageRange;
use uhmm_agent::dmirror::{Command, Counts, Errno};

use super::common::children::{End, How, child, end_of};
use super::common::in_own_process;
use super::common::memory::{
    Backing, Mapping, NONE, R, RW, disk_file, map, memory_file, part, protect, unmap,
};
use super::rig::{
    Rig, ask, asked, counting, filled, load, peeked, snapshot, store, to_dev, to_sys, words,
};

const PAGES: u64 = 1024;

#[test]
fn open_close() {
    in_own_process(|| {
        let rig = Rig::new();
        for unit in 0..4 {
            drop(rig.open(unit));
        }
    });
}

#[test]
fn anon_read() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::anonymous(PAGES);
            (2..PAGES).for_each(|index| memory.poke(index, index));
            // The zero page.
            assert_eq!(memory.peek(1), 0);
            protect(memory.range(), R).expect("mprotect");
            let expected: Vec<u64> = [0, 0].into_iter().chain(2..PAGES).collect();
            assert_eq!(load(&file, memory.range(), 1), expected);
        }
    });
}

#[test]
fn anon_read_prot() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 7);
            protect(memory.range(), NONE).expect("mprotect");
            assert_eq!(ask(&file, Command::Read, memory.range()), Err(Errno::FAULT));
            protect(memory.range(), R).expect("mprotect");
            assert_eq!(peeked(&memory), counting(7, PAGES));
        }
    });
}

#[test]
fn anon_write() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::anonymous(PAGES);
            let done = store(&file, memory.range(), |index| index + 3);
            assert_eq!(done, Ok(Counts { cpages: PAGES, faults: 1 }));
            assert_eq!(peeked(&memory), counting(3, PAGES));
        }
    });
}

#[test]
fn anon_write_prot() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::new(PAGES, Backing::Anonymous, R);
            assert_eq!(load(&file, memory.part(0, 1), 1), [0]);
            assert_eq!(store(&file, memory.range(), |index| index), Err(Errno::PERM));
            assert_eq!(peeked(&memory), vec![0; PAGES as usize]);
            protect(memory.range(), RW).expect("mprotect");
            let done = store(&file, memory.range(), |index| index + 1);
            assert_eq!(done, Ok(Counts { cpages: PAGES, faults: 1 }));
            assert_eq!(peeked(&memory), counting(1, PAGES));
        }
    });
}

/// The child attaches by itself and opens a unit of its own.
fn write_in_child(memory: &Mapping, pages: u64) -> End {
    let pid = child(How::Hooked, || {
        let rig = Rig::new();
        let file = rig.open(0);
        assert_eq!(peeked(memory), counting(5, pages));
        let done = store(&file, memory.range(), |index| index + 100_000);
        assert_eq!(done, Ok(Counts { cpages: pages, faults: 1 }));
        assert_eq!(peeked(memory), counting(100_000, pages));
        true
    });
    end_of(pid)
}

#[test]
fn anon_write_child() {
    in_own_process(|| {
        let rig = Rig::new();
        for _file in rig.variants() {
            let memory = filled(PAGES, 5);
            assert_eq!(write_in_child(&memory, PAGES), End::Well);
            assert_eq!(peeked(&memory), counting(5, PAGES));
        }
    });
}

#[test]
fn anon_write_child_migrated() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 5);
            to_dev(&file, memory.range());
            assert_eq!(write_in_child(&memory, PAGES), End::Well);
            assert_eq!(peeked(&memory), counting(5, PAGES));
        }
    });
}

#[test]
fn anon_write_child_shared() {
    in_own_process(|| {
        let rig = Rig::new();
        for _file in rig.variants() {
            let memory = Mapping::new(PAGES, Backing::Shared, RW);
            memory.fill(|index| index + 5);
            assert_eq!(write_in_child(&memory, PAGES), End::Well);
            assert_eq!(peeked(&memory), counting(100_000, PAGES));
        }
    });
}

#[test]
fn anon_write_huge() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::new(512, Backing::Huge, RW);
            let done = store(&file, memory.range(), |index| index + 9);
            assert_eq!(done, Ok(Counts { cpages: 512, faults: 1 }));
            assert_eq!(peeked(&memory), counting(9, 512));
        }
    });
}

#[test]
fn file_read() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let on_disk = disk_file(PAGES);
            for index in 0..PAGES {
                let word = (index + 11).to_ne_bytes();
                rustix::io::pwrite(&on_disk, &word, index * 4096).expect("pwrite");
            }
            let memory = Mapping::new(PAGES, Backing::File(on_disk.as_fd(), 0), R);
            assert_eq!(load(&file, memory.range(), 1), counting(11, PAGES));
        }
    });
}

#[test]
fn file_write() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let on_disk = disk_file(PAGES);
            let memory = Mapping::new(PAGES, Backing::File(on_disk.as_fd(), 0), RW);
            let done = store(&file, memory.range(), |index| index + 13);
            assert_eq!(done, Ok(Counts { cpages: PAGES, faults: 1 }));
            assert_eq!(peeked(&memory), counting(13, PAGES));
            let mut word = [0; 8];
            rustix::io::pread(&on_disk, &mut word, 17 * 4096).expect("pread");
            assert_eq!(u64::from_ne_bytes(word), 30);
        }
    });
}

#[test]
fn migrate() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 17);
            assert_eq!(to_dev(&file, memory.range()), counting(17, PAGES));
            // Unmapped while it is on the device.
            let range = memory.range();
            drop(memory);
            // Whatever the device is asked for, it knows by then.
            assert_eq!(ask(&file, Command::Read, range), Err(Errno::FAULT));
            assert_eq!(rig.units.used(file.unit()), 0);
        }
    });
}

#[test]
fn migrate_file_private() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let on_disk = disk_file(PAGES);
            let memory = Mapping::new(PAGES, Backing::PrivateFile(on_disk.as_fd(), 0), RW);
            memory.fill(|index| index + 19);
            assert_eq!(to_dev(&file, memory.range()), counting(19, PAGES));
            assert_eq!(peeked(&memory), counting(19, PAGES));
        }
    });
}

#[test]
fn migrate_fault() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 23);
            assert_eq!(to_dev(&file, memory.range()), counting(23, PAGES));
            for index in 0..PAGES / 2 {
                assert_eq!(memory.peek(index), 23 + index);
            }
            assert_eq!(to_dev(&file, memory.range()), counting(23, PAGES));
            assert_eq!(peeked(&memory), counting(23, PAGES));
        }
    });
}

#[test]
fn migrate_release() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 29);
            assert_eq!(to_dev(&file, memory.range()), counting(29, PAGES));
            let released = ask(&file, Command::Release, memory.part(0, 1));
            assert_eq!(released, Ok((Counts::default(), Vec::new())));
            assert_eq!(rig.units.used(file.unit()), 0);
            assert_eq!(snapshot(&file, memory.range()), vec![0x02; PAGES as usize]);
            assert_eq!(peeked(&memory), counting(29, PAGES));
            // And once more, with memory that the unit takes anew.
            assert_eq!(to_dev(&file, memory.range()), counting(29, PAGES));
        }
    });
}

#[test]
fn migrate_shared() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::new(PAGES, Backing::Shared, RW);
            assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::NOENT));
        }
    });
}

/// Six pages: the second is a hole, the third a page of zeroes that may only be read, the fourth the
/// same with contents, the others with contents, to be written.
fn mixed(pages: u64) -> (Mapping, PageRange) {
    let memory = Mapping::new(pages, Backing::Anonymous, NONE);
    let range = memory.range();
    unmap(part(range, 1, 1));
    protect(part(range, 2, 1), R).expect("mprotect");
    assert_eq!(memory.peek(2), 0);
    protect(part(range, 3, 3), RW).expect("mprotect");
    (3..6.min(pages)).for_each(|index| memory.poke(index, index));
    protect(part(range, 3, 1), R).expect("mprotect");
    (memory, range)
}

#[test]
fn migrate_mixed() {
    in_own_process(|| {
        let rig = Rig::new();
        for [one, other] in [[rig.open(0), rig.open(1)], [rig.open(2), rig.open(3)]] {
            let (memory, range) = mixed(6);
            let denied = ask(&other, Command::MigrateToDev, part(range, 0, 1));
            assert_eq!(denied, Err(Errno::INVAL));
            assert_eq!(ask(&other, Command::MigrateToDev, range), Err(Errno::INVAL));
            let hole = ask(&other, Command::MigrateToDev, part(range, 1, 2));
            assert_eq!(hole, Err(Errno::INVAL));
            assert_eq!(to_dev(&other, part(range, 2, 4)), [0, 3, 4, 5]);
            let elsewhere = ask(&one, Command::MigrateToDev, part(range, 5, 1));
            assert_eq!(elsewhere, Err(Errno::NOENT));
            assert_eq!(memory.peek(5), 5);
            map(part(range, 1, 1), Backing::Anonymous, NONE).expect("mmap");
        }
    });
}

#[test]
fn migrate_multiple() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            for round in 0..10 {
                let memory = filled(PAGES, round);
                assert_eq!(to_dev(&file, memory.range()), counting(round, PAGES));
                if file.unit().is_coherent() {
                    assert_eq!(to_sys(&file, memory.range()), PAGES);
                }
                assert_eq!(peeked(&memory), counting(round, PAGES));
            }
        }
    });
}

#[test]
fn anon_read_multiple() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::anonymous(PAGES);
            for round in 0..10 {
                map(memory.range(), Backing::Anonymous, RW).expect("mmap");
                memory.fill(|index| index + round);
                assert_eq!(load(&file, memory.range(), 1), counting(round, PAGES));
                unmap(memory.range());
            }
        }
    });
}

#[test]
fn anon_teardown() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = Arc::new(rig.open(0));
        for round in 0..50 {
            let memory = filled(PAGES, round);
            let half = memory.part(PAGES / 2, PAGES / 2);
            let begun = Arc::new(AtomicBool::new(false));
            let seen = Arc::clone(&begun);
            let other = std::thread::spawn(move || {
                while !seen.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                (0..round * 200).for_each(|_| std::hint::spin_loop());
                unmap(half);
            });
            begun.store(true, Ordering::SeqCst);
            if let Ok((counts, output)) = ask(&file, Command::Read, memory.range()) {
                assert_eq!(counts, Counts { cpages: PAGES, faults: 1 });
                assert_eq!(words(&output), counting(round, PAGES), "in round {round}");
            }
            other.join().expect("it ends");
        }
        // What the helper of the kernel's test leaves behind is no address at all.
        let nothing = PageRange::new(0, PAGES << 12).expect("a range");
        assert_eq!(ask(&file, Command::Read, nothing), Err(Errno::FAULT));
    });
}

#[test]
fn mixedmap() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let of_device = rustix::fs::memfd_create(
                format!("hmm_dmirror{}", file.unit().number()),
                rustix::fs::MemfdFlags::CLOEXEC,
            );
            let of_device = of_device.expect("memfd_create");
            rustix::fs::ftruncate(&of_device, 4096).expect("ftruncate");
            let memory = Mapping::new(1, Backing::PrivateFile(of_device.as_fd(), 0), RW);
            assert_eq!(memory.peek(0), 0);
            assert_eq!(snapshot(&file, memory.range()), [0x01]);
            assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::INVAL));
            assert_eq!(ask(&file, Command::MigrateToSys, memory.range()), Err(Errno::INVAL));
            memory.poke(0, 1);
            assert_eq!(snapshot(&file, memory.range()), [0x02]);
            let shared = Mapping::new(1, Backing::File(of_device.as_fd(), 0), RW);
            assert_eq!(shared.peek(0), 0);
            assert_eq!(snapshot(&file, shared.range()), [0x02]);
            assert_eq!(load(&file, shared.range(), 1), [0]);
        }
    });
}

#[test]
fn snapshot_of_all_sorts() {
    in_own_process(|| {
        let rig = Rig::new();
        for [one, other] in [[rig.open(0), rig.open(1)], [rig.open(2), rig.open(3)]] {
            let (memory, range) = mixed(7);
            protect(part(range, 6, 1), RW).expect("mprotect");
            // Never touched.
            map(part(range, 5, 2), Backing::Anonymous, RW).expect("mmap");
            assert_eq!(to_dev(&one, part(range, 5, 1)), [0]);
            assert_eq!(to_dev(&other, part(range, 6, 1)), [0]);
            let ends = if one.unit().is_coherent() { [0x42, 0x52] } else { [0x22, 0x00] };
            let expected = [0xff, 0xff, 0x11, 0x01, 0x02, ends[0], ends[1]];
            assert_eq!(snapshot(&one, range), expected);
            map(part(range, 1, 1), Backing::Anonymous, NONE).expect("mmap");
            drop(memory);
        }
    });
}

#[test]
fn double_map() {
    in_own_process(|| {
        let rig = Rig::new();
        for [one, other] in [[rig.open(0), rig.open(1)], [rig.open(2), rig.open(3)]] {
            let memory = filled(6, 31);
            protect(memory.range(), R).expect("mprotect");
            assert_eq!(load(&one, memory.range(), 1), counting(31, 6));
            assert_eq!(load(&other, memory.range(), 1), counting(31, 6));
            assert_eq!(to_dev(&other, memory.range()), counting(31, 6));
            assert_eq!(load(&one, memory.range(), 1), counting(31, 6));
            // A private unit has lost them by that.
            let seen = if one.unit().is_coherent() { 0x51 } else { 0x01 };
            assert_eq!(snapshot(&one, memory.range()), [seen; 6]);
        }
    });
}

#[test]
fn exclusive() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 37);
            let held = asked(&file, Command::Exclusive, memory.range(), 0);
            assert_eq!(words(&held), counting(37, PAGES));
            let check = ask(&file, Command::CheckExclusive, memory.range());
            assert_eq!(check, Err(Errno::PERM));
            for index in 0..PAGES {
                memory.poke(index, memory.peek(index) + 1);
            }
            let check = ask(&file, Command::CheckExclusive, memory.range());
            assert_eq!(check, Ok((Counts::default(), Vec::new())));
            assert_eq!(peeked(&memory), counting(38, PAGES));
        }
    });
}

#[test]
fn exclusive_mprotect() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 41);
            asked(&file, Command::Exclusive, memory.range(), 0);
            protect(memory.range(), R).expect("mprotect");
            assert_eq!(store(&file, memory.range(), |index| index), Err(Errno::PERM));
            assert_eq!(peeked(&memory), counting(41, PAGES));
        }
    });
}

#[test]
fn exclusive_cow() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(PAGES, 43);
            asked(&file, Command::Exclusive, memory.range(), 0);
            let increment = || {
                for index in 0..PAGES {
                    memory.poke(index, memory.peek(index) + 1);
                }
                peeked(&memory) == counting(44, PAGES)
            };
            let pid = child(How::Hooked, increment);
            assert!(increment());
            assert_eq!(end_of(pid), End::Well);
        }
    });
}

/// The pins themselves are the business of whoever stands for `gup_test`.
#[test]
fn long_term_pins_bring_coherent_pages_home() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(2);
        let memory = filled(4, 47);
        to_dev(&file, memory.range());
        rig.mm.long_term_pin(memory.part(2, 2));
        assert_eq!(snapshot(&file, memory.range()), [0x42, 0x42, 0x02, 0x02]);
        assert_eq!(rig.units.used(file.unit()), 2);
        assert_eq!(peeked(&memory), counting(47, 4));
    });
}

#[test]
fn hmm_cow_in_device() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 53);
            to_dev(&file, memory.range());
            let pid = child(How::Hooked, || {
                // Until it is killed.
                let _ =
                    rustix::thread::nanosleep(&rustix::thread::Timespec { tv_sec: 15, tv_nsec: 0 });
                false
            });
            memory.fill(|index| index + 54);
            let pid_of = rustix::process::Pid::from_raw(pid as i32).expect("a child");
            rustix::process::kill_process(pid_of, rustix::process::Signal::KILL).expect("kill");
            assert_eq!(end_of(pid), End::Signal(9));
            assert_eq!(snapshot(&file, memory.range()), [0x02; 4]);
            assert_eq!(peeked(&memory), counting(54, 4));
        }
    });
}

#[test]
fn memory_files_are_shared() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let in_memory = memory_file(16);
            let memory = Mapping::new(16, Backing::File(in_memory.as_fd(), 0), RW);
            let done = store(&file, memory.range(), |index| index + 59);
            assert_eq!(done, Ok(Counts { cpages: 16, faults: 1 }));
            assert_eq!(peeked(&memory), counting(59, 16));
        }
    });
}
