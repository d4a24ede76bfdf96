//! Each kind of memory.

use std::os::fd::AsFd as _;

use rustix::fs::{Mode, OFlags};
use uhmm::{Page, PageRange};
use uhmm_agent::dmirror::{Command, Counts, Errno};

use super::common::memory::{
    Backing, Mapping, R, RW, disk_file, lines, memory_file, protect, truncate,
};
use super::common::{in_own_process, loudly};
use super::rig::{Rig, ask, asked, counting, filled, load, peeked, snapshot, store, to_dev, words};

/// Reserves huge pages, and gives them back.
struct Reserved {
    before: String,
}

impl Reserved {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    fn new(pages: u64) -> Option<Reserved> {
        let before = std::fs::read_to_string(Reserved::FILE).ok()?;
        let wanted = before.trim().parse::<u64>().ok()? + pages;
        std::fs::write(Reserved::FILE, wanted.to_string()).ok()?;
        let reserved = Reserved { before };
        let now = std::fs::read_to_string(Reserved::FILE).ok()?;
        (now.trim().parse::<u64>().ok()? >= wanted).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        std::fs::write(Reserved::FILE, &self.before).expect("it could be written to before");
    }
}

/// The kernel's `anon_write_hugetlbfs` and `compound`.
#[test]
fn reserved_huge_pages() {
    in_own_process(|| {
        let Some(_reserved) = Reserved::new(2) else {
            return loudly("no huge pages can be reserved here: nothing was tested");
        };
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::new(512, Backing::Hugetlb, RW);
            assert_eq!(snapshot(&file, memory.range()), [0x00; 512]);
            let done = store(&file, memory.range(), |index| index + 3);
            assert_eq!(done, Ok(Counts { cpages: 512, faults: 1 }));
            assert_eq!(peeked(&memory), counting(3, 512));
            assert_eq!(snapshot(&file, memory.range()), [0x06; 512]);
            assert_eq!(ask(&file, Command::MigrateToDev, memory.range()), Err(Errno::INVAL));
            assert_eq!(ask(&file, Command::MigrateToSys, memory.range()), Err(Errno::INVAL));
            assert_eq!(ask(&file, Command::Exclusive, memory.range()), Err(Errno::BUSY));
            protect(memory.range(), R).expect("mprotect");
            assert_eq!(snapshot(&file, memory.range()), [0x05; 512]);
            assert_eq!(load(&file, memory.range(), 1), counting(3, 512));
            assert_eq!(load(&file, memory.range(), 0), counting(3, 512));
        }
    });
}

#[test]
fn a_private_file_is_copied_at_the_first_store() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            for in_file in [disk_file(8), memory_file(8)] {
                let memory = Mapping::new(8, Backing::PrivateFile(in_file.as_fd(), 0), RW);
                assert_eq!(snapshot(&file, memory.range()), [0x00; 8]);
                assert_eq!(load(&file, memory.range(), 1), [0; 8]);
                assert_eq!(snapshot(&file, memory.range()), [0x01; 8]);
                // It may be loaded from, and for a store there has to be a copy.
                assert_eq!(store(&file, memory.range(), |_| 4).map(|done| done.faults), Ok(1));
                assert_eq!(snapshot(&file, memory.range()), [0x02; 8]);
                assert_eq!(peeked(&memory), [4; 8]);
                let mut word = [1; 8];
                rustix::io::pread(&in_file, &mut word, 0).expect("pread");
                assert_eq!(word, [0; 8]);
            }
        }
    });
}

#[test]
fn memory_files_are_writable_once_they_are_there() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let in_memory = memory_file(8);
            let memory = Mapping::new(8, Backing::File(in_memory.as_fd(), 0), RW);
            assert_eq!(load(&file, memory.range(), 1), [0; 8]);
            assert_eq!(snapshot(&file, memory.range()), [0x02; 8]);
            assert_eq!(store(&file, memory.range(), |_| 4).map(|done| done.faults), Ok(0));
            assert_eq!(ask(&file, Command::Exclusive, memory.range()), Err(Errno::BUSY));
        }
    });
}

#[test]
fn beyond_the_end_of_a_file_there_is_nothing() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let on_disk = disk_file(2);
            let memory = Mapping::new(4, Backing::File(on_disk.as_fd(), 0), RW);
            assert_eq!(ask(&file, Command::Read, memory.range()), Err(Errno::FAULT));
            assert_eq!(store(&file, memory.range(), |_| 1), Err(Errno::FAULT));
            assert_eq!(load(&file, memory.part(0, 2), 1), [0, 0]);
            truncate(&on_disk, 1);
            // What was entered leads nowhere any more.
            assert_eq!(ask(&file, Command::Read, memory.part(0, 2)), Err(Errno::FAULT));
        }
    });
}

/// Nobody hears of changes to such a mapping, so the device never keeps a translation.
#[test]
fn a_file_that_was_opened_to_be_read_is_faulted_on_each_time() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let folder = env!("CARGO_TARGET_TMPDIR");
            let path = format!("{folder}/dmirror-read-only-{}", std::process::id());
            std::fs::write(&path, vec![1; 8 * 4096]).expect("a file");
            let opened = rustix::fs::open(&path, OFlags::RDONLY, Mode::empty()).expect("open");
            std::fs::remove_file(&path).expect("it is ours");
            let memory = Mapping::new(8, Backing::File(opened.as_fd(), 0), R);
            let ones = u64::from_ne_bytes([1; 8]);
            for _ in 0..2 {
                assert_eq!(load(&file, memory.range(), 1), [ones; 8]);
            }
            assert_eq!(snapshot(&file, memory.range()), [0x01; 8]);
            assert_eq!(store(&file, memory.range(), |_| 1), Err(Errno::PERM));
        }
    });
}

#[test]
fn the_program_itself_and_what_the_kernel_gives_it() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let code = page_of(the_program_itself_and_what_the_kernel_gives_it as fn() as usize);
            let bytes = asked(&file, Command::Read, code, 1);
            assert_eq!(bytes.len(), 4096);
            assert_eq!(snapshot(&file, code), [0x01]);
            let local = 77_u64;
            let stack = page_of(std::ptr::from_ref(&local).addr());
            let bytes = asked(&file, Command::Read, stack, 1);
            let at = std::ptr::from_ref(&local).addr() % 4096;
            assert_eq!(bytes[at..at + 8], 77_u64.to_ne_bytes());
            let named = |name: &str| lines().into_iter().find(|line| line.name == name);
            let vdso = named("[vdso]").expect("there is one");
            let vdso = page_of(vdso.range.start as usize);
            assert_eq!(asked(&file, Command::Read, vdso, 1)[..4], *b"\x7fELF");
            let vvar = named("[vvar]").expect("there is one");
            let vvar = page_of(vvar.range.start as usize);
            assert_eq!(ask(&file, Command::Read, vvar), Err(Errno::FAULT));
            assert_eq!(snapshot(&file, vvar), [0xff]);
        }
    });
}

fn page_of(address: usize) -> PageRange {
    Page::containing(address as u64).into()
}

#[test]
fn one_request_over_all_kinds() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let (on_disk, in_memory) = (disk_file(2), memory_file(2));
            let memory = filled(8, 3);
            let at = |first| memory.part(first, 2);
            let map = super::common::memory::map;
            map(at(2), Backing::File(on_disk.as_fd(), 0), RW).expect("mmap");
            map(at(4), Backing::PrivateFile(on_disk.as_fd(), 0), RW).expect("mmap");
            map(at(6), Backing::File(in_memory.as_fd(), 0), RW).expect("mmap");
            assert_eq!(load(&file, memory.range(), 1), [3, 4, 0, 0, 0, 0, 0, 0]);
            let done = store(&file, memory.range(), |index| index + 1);
            assert_eq!(done, Ok(Counts { cpages: 8, faults: 1 }));
            assert_eq!(peeked(&memory), counting(1, 8));
            assert_eq!(snapshot(&file, memory.range()), [0x02; 8]);
            // The table has all of it.
            assert_eq!(to_dev(&file, memory.range()), counting(1, 8));
            let again = asked(&file, Command::Read, memory.range(), 0);
            assert_eq!(words(&again), counting(1, 8));
        }
    });
}
