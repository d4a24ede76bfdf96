//! What populating says of each kind of mapping: the table at the head of the module.

use std::fs::File;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use uhmm::PAGE_SIZE;

use super::super::pagemap::{Categories, Pagemap};
use super::super::testing::{Mapping, Reader, protect, register, start, unmap, userfaultfd};
use super::super::userfaultfd::{Features, Modes};
use super::*;

/// `MADV_GUARD_INSTALL`, Linux 6.13, which neither rustix nor libc has a name for.
const MADV_GUARD_INSTALL: i32 = 102;

fn both(range: PageRange) -> [Result<(), Errno>; 2] {
    [populate_read(range), populate_write(range)]
}

fn present(range: PageRange) -> u64 {
    let (pagemap, mut found) = (Pagemap::open().expect("a pagemap"), Vec::new());
    let wanted = Categories::PRESENT;
    pagemap.scan(range, wanted, wanted, &mut found).expect("a scan");
    found.iter().map(|(range, _)| range.pages()).sum()
}

#[test]
fn populating_obeys_protection() {
    let cases = [
        (ProtFlags::empty(), [Err(Errno::INVAL); 2]),
        (ProtFlags::READ, [Ok(()), Err(Errno::INVAL)]),
        (ProtFlags::WRITE, [Err(Errno::INVAL), Ok(())]),
        (ProtFlags::READ | ProtFlags::WRITE, [Ok(()); 2]),
    ];
    for (rights, expected) in cases {
        for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
            let memory = Mapping::new(2, rights, flags);
            assert_eq!(both(memory.range()), expected, "{rights:?} {flags:?}");
        }
    }
    let file = File::open("/proc/self/exe").expect("the program");
    let program = Mapping::of(&file, 1, ProtFlags::READ, MapFlags::SHARED);
    assert_eq!(both(program.range()), [Ok(()), Err(Errno::INVAL)]);
}

#[test]
fn populating_faults_every_page_in() {
    let memory = Mapping::anonymous(4);
    assert_eq!(present(memory.range()), 0);
    assert_eq!(populate_read(memory.pages(0..2)), Ok(()));
    assert_eq!(present(memory.range()), 2);
    assert_eq!(populate_write(memory.range()), Ok(()));
    assert_eq!(present(memory.range()), 4);
    assert!((0..4).all(|index| memory.load(index) == 0));
}

#[test]
fn populating_stops_at_a_hole() {
    let memory = Mapping::apart(4);
    unmap(memory.pages(1..2));
    assert_eq!(both(memory.range()), [Err(Errno::NOMEM); 2]);
    assert_eq!(present(memory.range()), 1);
    assert_eq!(both(memory.pages(1..2)), [Err(Errno::NOMEM); 2]);
}

#[test]
fn populating_stops_at_what_has_no_page() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
    let memfd = rustix::fs::memfd_create(c"short", flags).expect("a memfd");
    rustix::fs::ftruncate(&memfd, PAGE_SIZE as u64).expect("room");
    let file = Mapping::of(&memfd, 2, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    assert_eq!(both(file.pages(0..1)), [Ok(()); 2]);
    assert_eq!(both(file.range()), [Err(Errno::FAULT); 2]);

    let memory = Mapping::anonymous(2);
    let guard = memory.pages(1..2);
    // SAFETY: the memory is the test's, and nobody touches it.
    match unsafe {
        libc::madvise(super::super::testing::pointer(guard.first()), PAGE_SIZE, MADV_GUARD_INSTALL)
    } {
        0 => assert_eq!(both(memory.range()), [Err(Errno::FAULT); 2]),
        _ => eprintln!("NOT TESTED: guards need Linux 6.13"),
    }
}

#[test]
fn the_kernels_own_mappings_are_no_memory() {
    let maps = super::super::maps::Maps::open().expect("maps");
    let mut tested = 0;
    for vma in maps.all().expect("mappings") {
        if vma.kind == super::super::maps::Kind::Special && !vma.executable {
            assert_eq!(both(vma.range), [Err(Errno::INVAL); 2], "{vma:?}");
            tested += 1;
        }
    }
    assert_ne!(tested, 0, "there is a vvar");
}

#[test]
fn hugetlbfs_without_pages_fails() {
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::NORESERVE;
    let memory = Mapping::new(512, rights, flags);
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    match free.as_deref().map(str::trim) {
        Ok("0") => assert_eq!(both(memory.range()), [Err(Errno::FAULT); 2]),
        free => eprintln!("NOT TESTED: there are huge pages: {free:?}"),
    }
}

#[test]
fn populating_waits_for_a_missing_page() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, Modes::MISSING);
    let range = memory.range();
    let populating = start(move || populate_write(range));
    let (page, cause) = Reader::new(&uffd).fault();
    assert_eq!((page, cause.write), (range.first(), true));
    assert!(uffd.zeropage(range, true).result.is_ok());
    assert_eq!(populating.done(), Ok(()));
}

#[test]
fn a_signal_in_place_of_a_message_makes_populating_fail() {
    let Some(uffd) = userfaultfd(Features::SIGBUS) else { return };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, Modes::MISSING);
    assert_eq!(both(memory.range()), [Err(Errno::FAULT); 2]);
}

#[test]
fn dropped_pages_read_as_zeroes() {
    let memory = Mapping::apart(2);
    memory.fill(|index| index + 1);
    assert_eq!(dontneed(memory.pages(0..1)), Ok(()));
    assert_eq!((present(memory.range()), memory.load(0), memory.load(1)), (1, 0, 2));
    unmap(memory.pages(1..2));
    assert_eq!(dontneed(memory.range()), Err(Errno::NOMEM));
}

#[test]
fn nothing_is_done_with_all_addresses_at_once() {
    assert_eq!(dontneed(PageRange::ALL), Err(Errno::INVAL));
}

/// The flags of the mapping that begins at the range, by the kernel's letters (proc_pid_smaps(5)).
fn flags(range: PageRange) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let head = format!("{:x}-", range.address());
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&head));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
    flags.expect("it is mapped").split_whitespace().map(str::to_owned).collect()
}

#[test]
fn advice_is_taken() {
    type Advise = fn(PageRange) -> Result<(), Errno>;
    let cases: [(Advise, &str); 4] =
        [(dontfork, "dc"), (hugepage, "hg"), (nohugepage, "nh"), (wipeonfork, "wf")];
    for (advise, letters) in cases {
        let memory = Mapping::new(3, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // So that it is not joined with a neighbour.
        protect(memory.pages(0..1), MprotectFlags::empty());
        protect(memory.pages(2..3), MprotectFlags::empty());
        let range = memory.pages(1..2);
        assert!(!flags(range).iter().any(|flag| flag == letters));
        assert_eq!(advise(range), Ok(()));
        assert!(flags(range).iter().any(|flag| flag == letters), "{letters}");
        let around = Mapping::apart(2);
        unmap(around.pages(1..2));
        assert_eq!(advise(around.range()), Err(Errno::NOMEM));
    }
    let shared = Mapping::new(1, ProtFlags::READ, MapFlags::SHARED);
    assert_eq!(wipeonfork(shared.range()), Err(Errno::INVAL));
}
