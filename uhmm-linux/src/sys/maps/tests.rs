//! What is told of mappings that the tests have made, and that both sources tell the same.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Instant;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

use super::super::testing::{DEADLINE, Mapping, pointer, protect, unmap};
use super::*;

const READ: ProtFlags = ProtFlags::READ;
const WRITE: ProtFlags = ProtFlags::WRITE;

/// Both sources of answers.
fn sources() -> [Maps; 2] {
    let query = Maps::open().expect("maps");
    if query.source == Source::Text {
        eprintln!("NOT TESTED: PROCMAP_QUERY needs Linux 6.11");
    }
    [query, Maps::of(Source::Text).expect("smaps")]
}

/// Returns the mapping that holds `range`, of which both sources say the same.
///
/// Tests run beside each other, and the kernel joins mappings of which the same is true. An answer
/// counts if it was true before and after the other was given.
#[track_caller]
fn vma(range: PageRange) -> Vma {
    let [query, text] = sources();
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        let [before, there, after] =
            [&query, &text, &query].map(|maps| maps.at_or_after(range.first()).expect("maps"));
        if before == after {
            assert_eq!(before, there);
            let vma = before.expect("it is mapped");
            assert!(vma.range.covers(range), "{vma:?} is where {range} is");
            return vma;
        }
    }
    panic!("the mappings beside {range} do not come to rest");
}

#[test]
fn rights_are_those_that_the_kernel_grants() {
    let cases = [
        (ProtFlags::empty(), [false; 3], Access::None),
        (READ, [true, false, false], Access::Read),
        (WRITE, [false, true, false], Access::None),
        (READ | WRITE, [true, true, false], Access::Write),
        (READ | ProtFlags::EXEC, [true, false, true], Access::Read),
    ];
    for (rights, [readable, writable, executable], access) in cases {
        for (flags, shared) in [(MapFlags::PRIVATE, false), (MapFlags::SHARED, true)] {
            let memory = Mapping::new(1, rights, flags);
            let vma = vma(memory.range());
            assert_eq!((vma.readable, vma.writable), (readable, writable), "{rights:?}");
            assert_eq!((vma.executable, vma.shared), (executable, shared));
            assert_eq!(vma.rights(), access);
            assert_eq!(vma.page_size, 4096);
        }
    }
}

#[test]
fn a_mapping_ends_where_something_is_different() {
    let memory = Mapping::apart(5);
    protect(memory.pages(1..3), MprotectFlags::READ);
    let middle = vma(memory.pages(1..3));
    assert_eq!((middle.range, middle.rights()), (memory.pages(1..3), Access::Read));
    assert_eq!(vma(memory.pages(3..5)).range.first(), memory.page(3));
    unmap(memory.pages(1..3));
    // Where nothing is, the next above is told.
    let [query, text] = sources();
    for maps in [query, text] {
        let next = maps.at_or_after(memory.page(1)).expect("maps").expect("there is more");
        assert_eq!(next.range, memory.pages(3..5));
        assert_eq!(maps.at_or_after(Page::MAX), Ok(None));
    }
}

#[test]
fn private_memory_is_told_from_the_rest() {
    let memory = Mapping::anonymous(1);
    let anonymous = vma(memory.range());
    assert_eq!((anonymous.kind, anonymous.inode, anonymous.device), (Kind::Anonymous, 0, (0, 0)));
    assert!(anonymous.is_anonymous());
    let shared = Mapping::new(1, READ | WRITE, MapFlags::SHARED);
    assert_eq!(vma(shared.range()).kind, Kind::Shmem);
    assert!(!vma(shared.range()).is_anonymous());

    let file = File::open("/proc/self/exe").expect("the program");
    let metadata = rustix::fs::fstat(&file).expect("the program");
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        let mapped = Mapping::of(&file, 1, READ, flags);
        let mapped = vma(mapped.range());
        assert_eq!(mapped.kind, Kind::File);
        assert_eq!(mapped.inode, metadata.st_ino);
        assert!(!mapped.is_anonymous());
    }
}

#[test]
fn shared_memory_without_a_name_is_told_from_files() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
    let memfd = rustix::fs::memfd_create(c"test", flags).expect("a memfd");
    rustix::fs::ftruncate(&memfd, 3 * PAGE_SIZE as u64).expect("room");
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        let memory = Mapping::of(&memfd, 3, READ, flags);
        protect(memory.pages(0..1), MprotectFlags::empty());
        let mapped = vma(memory.pages(1..3));
        assert_eq!((mapped.kind, mapped.offset), (Kind::Shmem, PAGE_SIZE as u64));
        assert_eq!(mapped.inode, rustix::fs::fstat(&memfd).expect("a memfd").st_ino);
    }
}

#[test]
fn huge_pages_of_hugetlbfs_are_told_by_their_size() {
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::NORESERVE;
    let memory = Mapping::new(512, READ | WRITE, flags);
    let mapped = vma(memory.range());
    assert_eq!((mapped.kind, mapped.page_size), (Kind::Hugetlb, 2 << 20));
    assert!(!mapped.is_anonymous());
}

#[test]
fn secret_memory_is_told() {
    // SAFETY: it makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        eprintln!("NOT TESTED: memfd_secret: {}", std::io::Error::last_os_error());
        return;
    }
    // SAFETY: the kernel has just made the descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    rustix::fs::ftruncate(&fd, PAGE_SIZE as u64).expect("room");
    let memory = Mapping::of(&fd, 1, READ | WRITE, MapFlags::SHARED);
    assert_eq!(vma(memory.range()).kind, Kind::Secret);
}

#[test]
fn a_name_does_not_make_a_file() {
    let memory = Mapping::anonymous(1);
    let longest = std::ffi::CString::new("n".repeat(79)).expect("a name");
    let (start, name) = (pointer(memory.page(0)), longest.as_ptr());
    let set = libc::PR_SET_VMA_ANON_NAME;
    // SAFETY: the kernel copies the name, and touches nothing else.
    match unsafe { libc::prctl(libc::PR_SET_VMA, set, start, PAGE_SIZE, name) } {
        0 => {
            assert_eq!(vma(memory.range()).kind, Kind::Anonymous);
            assert_eq!(vma(memory.range()).range, memory.range(), "the name is on it");
        }
        _ => eprintln!("NOT TESTED: {}", std::io::Error::last_os_error()),
    }
}

#[test]
fn a_file_with_a_long_name_is_one() {
    let name = format!("{}-{}", "n".repeat(200), std::process::id());
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, [1; PAGE_SIZE]).expect("room for a file");
    let file = File::open(&path).expect("the file");
    let memory = Mapping::of(&file, 1, READ, MapFlags::PRIVATE);
    std::fs::remove_file(&path).expect("the file");
    let mapped = vma(memory.range());
    assert_eq!(mapped.inode, rustix::fs::fstat(&file).expect("the file").st_ino);
    assert!(matches!(mapped.kind, Kind::File | Kind::Shmem), "a file, or one of tmpfs");
}

#[test]
fn the_heap_the_stack_and_what_is_the_kernels_are_told() {
    let all = Maps::open().expect("maps").all().expect("mappings");
    let count = |kind| all.iter().filter(|vma| vma.kind == kind).count();
    assert_eq!((count(Kind::Heap), count(Kind::Stack)), (1, 1), "{all:#?}");
    // vvar and vdso, at least.
    assert!(count(Kind::Special) >= 2);
    // SAFETY: it asks where the vdso is.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    let vdso = vma(Page::containing(vdso).into());
    assert_eq!((vdso.kind, vdso.is_anonymous()), (Kind::Special, false));
    let [stack] = [Kind::Stack].map(|kind| all.iter().find(|vma| vma.kind == kind));
    assert!(stack.expect("there is one").is_anonymous());
}

/// Other tests map and unmap all the time. What was there before and after must be told between.
#[test]
fn both_sources_tell_the_same_of_all_mappings() {
    let [query, text] = sources();
    let mut compared = 0;
    for _ in 0..5 {
        let [before, told, after] =
            [&query, &text, &query].map(|maps| maps.all().expect("mappings"));
        assert!(told.is_sorted_by(|a, b| a.range.last() < b.range.first()));
        for vma in before.iter().filter(|vma| after.contains(vma)) {
            assert!(told.contains(vma), "{vma:?} is not told by the text");
            compared += 1;
        }
        // The other way round, by the same rule.
        let [before, told, after] =
            [&text, &query, &text].map(|maps| maps.all().expect("mappings"));
        for vma in before.iter().filter(|vma| after.contains(vma)) {
            assert!(told.contains(vma), "{vma:?} is only told by the text");
        }
    }
    assert!(compared > 5 * 20, "a program has more mappings than {compared}");
}

#[test]
fn lines_of_the_text_are_understood() {
    let line = b"7f0000001000-7f0000003000 rw-s 00002000 fd:1a 77                         /a b-c";
    let (vma, name) = parse_mapping(line).expect("a mapping");
    assert_eq!(vma.range, PageRange::new(0x7f00_0000_1000, 0x2000).expect("a range"));
    assert_eq!((vma.offset, vma.device, vma.inode), (0x2000, (0xfd, 0x1a), 77));
    assert_eq!((vma.readable, vma.writable, vma.executable, vma.shared), (true, true, false, true));
    assert_eq!(name, b"/a b-c");
    let (_, name) = parse_mapping(b"1000-2000 ---p 00000000 00:00 0 ").expect("a mapping");
    assert_eq!(name, b"");
    let others: [&[u8]; 4] = [
        b"",
        b"Size:                  4 kB",
        b"VmFlags: rd wr mr mw me ac",
        b"2000-1000 ---p 0 0:0 0",
    ];
    assert!(others.iter().all(|line| parse_mapping(line).is_none()));
    assert_eq!(parse_page_size(b"KernelPageSize:     2048 kB"), Some(2 << 20));
    assert_eq!(parse_page_size(b"MMUPageSize:           4 kB"), None);
}

#[test]
fn what_children_do_not_get_is_told() {
    use super::super::advise::{dofork, dontfork};
    let memory = Mapping::apart(8);
    let [before, kept] = [memory.pages(0..1), memory.pages(2..5)].map(|range| range.first());
    assert_eq!(is_kept_from_children(kept), Ok(false));
    dontfork(memory.pages(2..5)).expect("it is mapped");
    assert_eq!(is_kept_from_children(kept), Ok(true));
    assert_eq!(is_kept_from_children(before), Ok(false));
    dofork(memory.pages(2..5)).expect("it is mapped");
    assert_eq!(is_kept_from_children(kept), Ok(false));
    assert_eq!(is_kept_from_children(Page::containing(0)), Ok(false), "nothing is mapped there");
}
