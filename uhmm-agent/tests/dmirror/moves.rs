//! Pages on units: how they get there, what others see of them, and how they come home.

use std::os::fd::AsFd as _;
use std::time::Duration;

use uhmm::{Order, Page, PageRange};
use uhmm_agent::dmirror::abi::FAIL_ALLOC;
use uhmm_agent::dmirror::{COHERENT_PAGES, Command, Counts, Errno, Mm, OpenFile, Request};

use super::common::memory::{
    Backing, Mapping, R, RW, advise, disk_file, lock, part, place, protect, remap, unmap,
};
use super::common::{OwnProcess, in_own_process};
use super::rig::{
    Rig, ask, asked, counting, filled, load, peeked, snapshot, store, to_dev, to_sys, words,
};

/// What a page that may be written is called when it is on the unit.
fn here(file: &OpenFile) -> u8 {
    if file.unit().is_coherent() { 0x42 } else { 0x22 }
}

fn arm(file: &OpenFile) {
    let request = Request { addr: 0, npages: FAIL_ALLOC };
    let armed = file.ioctl(Command::Flags, request, &[], &mut Vec::new());
    assert_eq!(armed, Ok(Counts::default()));
}

#[test]
fn a_touch_brings_one_page_home() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(0);
        let memory = filled(8, 3);
        to_dev(&file, memory.range());
        assert_eq!(memory.peek(3), 6);
        memory.poke(5, 100);
        let seen = [0x22, 0x22, 0x22, 0x02, 0x22, 0x02, 0x22, 0x22];
        assert_eq!(snapshot(&file, memory.range()), seen);
        // And the device has to fault on those two, with all that is behind them, once.
        assert_eq!(load(&file, memory.range(), 1), [3, 4, 5, 6, 7, 100, 9, 10]);
        assert_eq!(load(&file, memory.range(), 0), [3, 4, 5, 6, 7, 100, 9, 10]);
    });
}

#[test]
fn a_touch_of_a_coherent_page_leaves_it_there() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(2);
        let memory = filled(4, 3);
        to_dev(&file, memory.range());
        memory.poke(1, memory.peek(0));
        assert_eq!(snapshot(&file, memory.range()), [0x42; 4]);
        // In one place: the device sees the store.
        assert_eq!(load(&file, memory.range(), 0), [3, 3, 5, 6]);
        assert_eq!(store(&file, memory.range(), |_| 9).map(|done| done.faults), Ok(0));
        assert_eq!(peeked(&memory), [9; 4]);
        assert_eq!(snapshot(&file, memory.range()), [0x42; 4]);
    });
}

#[test]
fn the_kernel_brings_pages_home_too() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(0);
        let memory = filled(8, 3);
        to_dev(&file, memory.range());
        advise(memory.part(0, 1), libc::MADV_POPULATE_READ).expect("madvise");
        advise(memory.part(1, 1), libc::MADV_POPULATE_WRITE).expect("madvise");
        lock(memory.part(2, 1)).expect("mlock");
        let on_disk = disk_file(1);
        super::common::memory::truncate(&on_disk, 1);
        let copied = write_from(&on_disk, memory.word(3));
        assert_eq!(copied, 8);
        let seen = [0x02, 0x02, 0x02, 0x02, 0x22, 0x22, 0x22, 0x22];
        assert_eq!(snapshot(&file, memory.range()), seen);
        assert_eq!(peeked(&memory), counting(3, 8));
    });
}

/// Has the kernel read eight bytes of this process's memory.
fn write_from(file: &impl std::os::fd::AsFd, address: u64) -> isize {
    use std::os::fd::AsRawFd as _;
    let from = std::ptr::without_provenance::<libc::c_void>(address as usize);
    // SAFETY: the kernel checks the address, and only reads there.
    unsafe { libc::pwrite(file.as_fd().as_raw_fd(), from, 8, 0) }
}

#[test]
fn discarded_pages_are_gone() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(8, 3);
            to_dev(&file, memory.range());
            advise(memory.part(2, 3), libc::MADV_DONTNEED).expect("madvise");
            let is = here(&file);
            assert_eq!(snapshot(&file, memory.range()), [is, is, 0, 0, 0, is, is, is]);
            assert_eq!(load(&file, memory.range(), 1), [3, 4, 0, 0, 0, 8, 9, 10]);
            assert_eq!(peeked(&memory), [3, 4, 0, 0, 0, 8, 9, 10]);
        }
    });
}

#[test]
fn pages_that_were_never_touched_are_zeroes_there() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::anonymous(16);
            assert_eq!(to_dev(&file, memory.range()), [0; 16]);
            assert_eq!(snapshot(&file, memory.range()), [here(&file); 16]);
            assert_eq!(store(&file, memory.range(), |index| index).map(|d| d.faults), Ok(0));
            assert_eq!(peeked(&memory), counting(0, 16));
            let read_only = Mapping::new(16, Backing::Anonymous, R);
            assert_eq!(to_dev(&file, read_only.range()), [0; 16]);
            assert_eq!(snapshot(&file, read_only.range()), [here(&file) ^ 0x03; 16]);
            assert_eq!(store(&file, read_only.range(), |_| 1), Err(Errno::PERM));
        }
    });
}

/// The kernel's driver warns of this, and fails.
#[test]
fn what_went_read_only_can_be_stored_to_when_the_mapping_allows_it() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 3);
            protect(memory.range(), R).expect("mprotect");
            to_dev(&file, memory.range());
            assert_eq!(store(&file, memory.range(), |_| 1), Err(Errno::PERM));
            protect(memory.range(), RW).expect("mprotect");
            assert_eq!(store(&file, memory.range(), |_| 1).map(|done| done.faults), Ok(1));
            assert_eq!(peeked(&memory), [1; 4]);
        }
    });
}

/// The kernel's driver reads what it has not got.
#[test]
fn a_second_open_of_the_unit_faults_and_gets_the_data() {
    in_own_process(|| {
        let rig = Rig::new();
        for [one, two] in [[rig.open(0), rig.open(0)], [rig.open(2), rig.open(2)]] {
            let memory = filled(8, 3);
            to_dev(&one, memory.range());
            assert_eq!(load(&two, memory.range(), 1), counting(3, 8));
            assert_eq!(load(&one, memory.range(), 0), counting(3, 8));
            assert_eq!(store(&two, memory.range(), |_| 7).map(|done| done.faults), Ok(0));
            assert_eq!(load(&one, memory.range(), 0), [7; 8]);
            assert_eq!(snapshot(&two, memory.range()), [here(&one); 8]);
            assert_eq!(to_dev(&two, memory.range()), [7; 8]);
            // Each has a table of its own, and the unit its memory in common.
            assert_eq!(to_sys(&two, memory.range()), 8);
            assert_eq!(to_sys(&one, memory.range()), 0);
            assert_eq!(load(&one, memory.range(), 1), [7; 8]);
        }
    });
}

#[test]
fn another_unit_leaves_pages_where_they_are_and_reads_them_home() {
    in_own_process(|| {
        let rig = Rig::new();
        for [one, two] in [[rig.open(0), rig.open(1)], [rig.open(2), rig.open(3)]] {
            let memory = filled(8, 3);
            to_dev(&one, memory.range());
            assert_eq!(ask(&two, Command::MigrateToDev, memory.range()), Err(Errno::NOENT));
            assert_eq!(to_sys(&two, memory.range()), 0);
            assert_eq!(to_dev(&one, memory.range()), counting(3, 8));
            let coherent = one.unit().is_coherent();
            let seen = if coherent { 0x52 } else { 0x00 };
            assert_eq!(snapshot(&two, memory.range()), [seen; 8]);
            assert_eq!(load(&two, memory.range(), 1), counting(3, 8));
            let seen = if coherent { 0x42 } else { 0x02 };
            assert_eq!(snapshot(&one, memory.range()), [seen; 8]);
        }
    });
}

#[test]
fn pages_go_between_units_of_both_sorts() {
    in_own_process(|| {
        let rig = Rig::new();
        let (private, coherent) = (rig.open(1), rig.open(2));
        let memory = filled(8, 3);
        to_dev(&private, memory.part(0, 4));
        assert_eq!(ask(&coherent, Command::MigrateToDev, memory.range()), Err(Errno::NOENT));
        let seen = [0x00, 0x00, 0x00, 0x00, 0x42, 0x42, 0x42, 0x42];
        assert_eq!(snapshot(&coherent, memory.range()), seen);
        let seen = [0x22, 0x22, 0x22, 0x22, 0x52, 0x52, 0x52, 0x52];
        assert_eq!(snapshot(&private, memory.range()), seen);
        assert_eq!(ask(&private, Command::MigrateToDev, memory.range()), Err(Errno::NOENT));
        assert_eq!(to_sys(&coherent, memory.range()), 4);
        assert_eq!(to_sys(&private, memory.range()), 4);
        assert_eq!(to_dev(&private, memory.range()), counting(3, 8));
    });
}

/// A request succeeds where the table has all of it, wherever the pages are.
#[test]
fn what_was_read_before_counts_as_there() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::new(8, Backing::Shared, RW);
            memory.fill(|index| index);
            assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::NOENT));
            load(&file, memory.range(), 1);
            assert_eq!(to_dev(&file, memory.range()), counting(0, 8));
            assert_eq!(snapshot(&file, memory.range()), [0x02; 8]);
            assert_eq!(to_sys(&file, memory.range()), 0);
        }
    });
}

#[test]
fn locked_pages_and_copies_of_pages_of_files_go_as_well() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 3);
            lock(memory.range()).expect("mlock");
            assert_eq!(to_dev(&file, memory.range()), counting(3, 4));
            assert_eq!(to_sys(&file, memory.range()), 4);
            let on_disk = disk_file(4);
            let copies = Mapping::new(4, Backing::PrivateFile(on_disk.as_fd(), 0), RW);
            copies.poke(1, 5);
            copies.poke(2, 6);
            assert_eq!(ask(&file, Command::MigrateToDev, copies.range()), Err(Errno::NOENT));
            assert_eq!(copies.peek(0), 0);
            let is = here(&file);
            assert_eq!(snapshot(&file, copies.range()), [0x01, is, is, 0x00]);
            assert_eq!(to_dev(&file, copies.part(1, 2)), [5, 6]);
            assert_eq!(to_sys(&file, copies.range()), 2);
        }
    });
}

#[test]
fn a_move_of_the_mapping_keeps_the_data() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            for offset in [0, 1, 7] {
                let memory = filled(16, 3);
                to_dev(&file, memory.range());
                let target = place(64);
                let target = part(target, offset, 16);
                remap(memory.range(), target.first()).expect("mremap");
                if !file.unit().is_coherent() {
                    assert_eq!(snapshot(&file, target), [0x22; 16]);
                }
                assert_eq!(snapshot(&file, memory.range()), [0xff; 16]);
                assert_eq!(to_dev(&file, target), counting(3, 16));
                assert_eq!(load(&file, target, 0), counting(3, 16));
                unmap(target);
            }
        }
    });
}

#[test]
fn a_coherent_unit_has_so_many_pages_and_no_more() {
    OwnProcess::new().deadline(Duration::from_secs(150)).run(|| {
        let rig = Rig::new();
        let file = rig.open(3);
        let memory = Mapping::anonymous(COHERENT_PAGES + 8);
        assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::NOENT));
        assert_eq!(rig.units.used(file.unit()), COHERENT_PAGES);
        let seen = snapshot(&file, memory.range());
        let there = seen.iter().filter(|&&byte| byte == 0x42).count() as u64;
        assert_eq!(there, COHERENT_PAGES);
        assert_eq!(to_sys(&file, memory.range()), COHERENT_PAGES);
        assert_eq!(rig.units.used(file.unit()), 0);
        to_dev(&file, memory.part(0, 8));
        drop(memory);
        assert_eq!(load_of_nothing(&file), Err(Errno::FAULT));
        assert_eq!(rig.units.used(file.unit()), 0);
    });
}

/// Asks for something, after which the device knows what the program did before.
fn load_of_nothing(file: &OpenFile) -> Result<(Counts, Vec<u8>), Errno> {
    ask(file, Command::Read, PageRange::from(Page::containing(0)))
}

#[test]
fn an_eviction_takes_all_that_is_on_the_unit_and_nothing_else() {
    in_own_process(|| {
        let rig = Rig::new();
        for [one, other] in [[rig.open(0), rig.open(1)], [rig.open(2), rig.open(3)]] {
            let (memory, others) = (filled(600, 3), filled(8, 5));
            to_dev(&one, memory.range());
            to_dev(&other, others.range());
            let evict = |mm: &Mm| mm.evict(one.unit());
            evict(&rig.mm);
            assert_eq!(snapshot(&one, memory.range()), [0x02; 600]);
            assert_eq!(snapshot(&other, others.range()), [here(&other); 8]);
            // The table has lost them.
            assert_eq!(load(&one, memory.range(), 1), counting(3, 600));
        }
    });
}

#[test]
fn a_failed_allocation_leaves_out_one_page_or_splits_a_huge_one() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(8, 3);
            arm(&file);
            assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::NOENT));
            let is = here(&file);
            let seen = snapshot(&file, memory.range());
            assert_eq!(seen, [0x02, is, is, is, is, is, is, is]);
            // Once.
            assert_eq!(to_dev(&file, memory.range()), counting(3, 8));
            arm(&file);
            assert_eq!(to_sys(&file, memory.range()), 7);
            assert_eq!(to_sys(&file, memory.range()), 1);
            let huge = Mapping::new(512, Backing::Huge, RW);
            huge.fill(|index| index);
            arm(&file);
            assert_eq!(to_dev(&file, huge.range()), counting(0, 512));
            assert_eq!(peeked(&huge), counting(0, 512));
            let huge = Mapping::new(512, Backing::Huge, RW);
            huge.fill(|index| index);
            to_dev(&file, huge.range());
            arm(&file);
            assert_eq!(to_sys(&file, huge.range()), 512);
            assert_eq!(peeked(&huge), counting(0, 512));
            let empty = Mapping::new(512, Backing::Huge, R);
            arm(&file);
            assert_eq!(to_dev(&file, empty.range()), [0; 512]);
            assert_eq!(empty.range().first().align_down(Order::HUGE), empty.range().first());
        }
    });
}

#[test]
fn an_exclusive_page_is_the_openers_alone() {
    in_own_process(|| {
        let rig = Rig::new();
        for [one, two] in [[rig.open(0), rig.open(0)], [rig.open(2), rig.open(3)]] {
            let memory = filled(4, 3);
            asked(&one, Command::Exclusive, memory.range(), 0);
            assert_eq!(snapshot(&one, memory.range()), [0x00; 4]);
            // Its own loads are from the table, and end nothing.
            assert_eq!(load(&one, memory.range(), 0), counting(3, 4));
            assert_eq!(words(&asked(&one, Command::MigrateToDev, memory.range(), 0)), [3, 4, 5, 6]);
            let held = Err(Errno::PERM);
            assert_eq!(ask(&one, Command::CheckExclusive, memory.range()), held);
            // A touch ends it for that page.
            assert_eq!(memory.peek(1), 4);
            assert_eq!(ask(&one, Command::CheckExclusive, memory.part(0, 1)), held);
            let none = Ok((Counts::default(), Vec::new()));
            assert_eq!(ask(&one, Command::CheckExclusive, memory.part(1, 1)), none);
            // So does another's load, for all that it faults on.
            assert_eq!(load(&two, memory.range(), 1), counting(3, 4));
            assert_eq!(ask(&one, Command::CheckExclusive, memory.range()), none);
            assert_eq!(ask(&two, Command::CheckExclusive, memory.range()), none);
            // And a store of one's own.
            asked(&one, Command::Exclusive, memory.range(), 0);
            assert_eq!(store(&one, memory.range(), |_| 8).map(|done| done.faults), Ok(1));
            assert_eq!(ask(&one, Command::CheckExclusive, memory.range()), none);
            assert_eq!(peeked(&memory), [8; 4]);
        }
    });
}

#[test]
fn exclusive_takes_pages_from_units_and_new_ones() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in [rig.open(0), rig.open(1)] {
            let memory = Mapping::anonymous(8);
            (0..4).for_each(|index| memory.poke(index, index));
            to_dev(&file, memory.part(0, 4));
            let held = asked(&file, Command::Exclusive, memory.range(), 0);
            assert_eq!(words(&held), [0, 1, 2, 3, 0, 0, 0, 0]);
            assert_eq!(snapshot(&file, memory.range()), [0x00; 8]);
            drop(file);
            assert_eq!(peeked(&memory), [0, 1, 2, 3, 0, 0, 0, 0]);
        }
        for file in rig.variants() {
            let shared = Mapping::new(4, Backing::Shared, RW);
            assert_eq!(ask(&file, Command::Exclusive, shared.range()), Err(Errno::BUSY));
        }
    });
}
