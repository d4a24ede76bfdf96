//! What is told of pages that the tests have made to be so.

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm::Page;

use super::super::advise;
use super::super::testing::{Mapping, pointer, register, unmap, userfaultfd};
use super::super::userfaultfd::{Features, Modes};
use super::*;

const PRESENT: Categories = Categories::PRESENT;

fn pagemap() -> Pagemap {
    Pagemap::open().expect("a pagemap")
}

/// Finds the pages of a mapping with one of these categories, by their position.
fn positions(mapping: &Mapping, category: Categories) -> Vec<u64> {
    let mut found = Vec::new();
    pagemap().scan(mapping.range(), category, category, &mut found).expect("a scan");
    assert!(found.iter().all(|&(_, reported)| reported == category));
    let position = |page: Page| page.number() - mapping.page(0).number();
    found.iter().flat_map(|(range, _)| range.iter().map(position)).collect()
}

#[test]
fn this_kernel_tells_what_its_version_promises() {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a version");
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let known = pagemap().known();
    assert!(known.contains(Categories::all() - Categories::GUARD - Categories::SOFT_DIRTY));
    if version >= (6, 15) {
        assert!(known.contains(Categories::GUARD), "{release}");
    }
}

#[test]
fn present_pages_and_the_page_of_zeroes() {
    let memory = Mapping::anonymous(5);
    memory.store(1, 1);
    assert_eq!(memory.load(3), 0);
    assert_eq!(positions(&memory, PRESENT), [1, 3]);
    assert_eq!(positions(&memory, Categories::PFNZERO), [3]);
    assert_eq!(positions(&memory, Categories::FILE), [0u64; 0]);
}

#[test]
fn pages_of_files() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
    let file = rustix::fs::memfd_create(c"file", flags).expect("a memfd");
    rustix::fs::ftruncate(&file, 3 * PAGE_SIZE as u64).expect("room");
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    let memory = Mapping::of(&file, 3, rights, MapFlags::PRIVATE);
    assert_eq!(memory.load(0), 0);
    memory.store(1, 1);
    assert_eq!(positions(&memory, PRESENT), [0, 1]);
    assert_eq!(positions(&memory, Categories::FILE), [0], "the other is a copy");
}

#[test]
fn huge_pages() {
    let memory = Mapping::huge(2);
    advise::hugepage(memory.pages(0..512)).expect("the kernel has huge pages");
    advise::nohugepage(memory.pages(512..1024)).expect("the kernel has huge pages");
    memory.store(0, 1);
    memory.store(512, 1);
    assert_eq!(positions(&memory, PRESENT).last(), Some(&512));
    let huge = positions(&memory, Categories::HUGE);
    match huge.is_empty() {
        true => eprintln!("NOT TESTED: the kernel gave no huge page"),
        false => assert!(huge.into_iter().eq(0..512)),
    }
}

/// What no kernel setting is needed for in place of swap: a mark of a userfaultfd.
#[test]
fn marks_where_a_page_would_be() {
    let Some(uffd) = userfaultfd(Features::WP_UNPOPULATED) else { return };
    let memory = Mapping::anonymous(3);
    register(&uffd, &memory, Modes::WP);
    uffd.write_protect(memory.pages(1..2), true, true).expect("it is registered");
    assert_eq!(positions(&memory, Categories::SWAPPED), [1]);
    assert_eq!(positions(&memory, PRESENT), [0u64; 0]);
    let mut entries = [0; 3];
    pagemap().entries(memory.range(), &mut entries).expect("entries");
    assert_eq!(entries.map(|entry| entry & Pagemap::SWAPPED != 0), [false, true, false]);
    assert_eq!(entries.map(|entry| entry & Pagemap::UFFD_WP != 0), [false, true, false]);
}

#[test]
fn what_was_written_since_it_was_protected() {
    let Some(uffd) = userfaultfd(Features::WP_ASYNC) else { return };
    let memory = Mapping::anonymous(4);
    memory.fill(|index| index);
    assert_eq!(positions(&memory, Categories::WPALLOWED), [0u64; 0]);
    uffd.register(memory.pages(1..4), Modes::WP).expect("it can be registered");
    assert_eq!(positions(&memory, Categories::WPALLOWED), [1, 2, 3]);
    uffd.write_protect(memory.pages(1..4), true, true).expect("it is registered");
    memory.store(2, 9);
    assert_eq!(positions(&memory, Categories::WRITTEN), [0, 2]);
}

#[test]
fn guards() {
    let memory = Mapping::anonymous(3);
    memory.fill(|index| index);
    /// `MADV_GUARD_INSTALL`, Linux 6.13, which neither rustix nor libc has a name for.
    const MADV_GUARD_INSTALL: i32 = 102;
    // SAFETY: the memory is the test's, and nobody touches the page afterwards.
    let done = unsafe { libc::madvise(pointer(memory.page(1)), PAGE_SIZE, MADV_GUARD_INSTALL) };
    if done != 0 || !pagemap().known().contains(Categories::GUARD) {
        eprintln!("NOT TESTED: guards that are told need Linux 6.15");
        return;
    }
    assert_eq!(positions(&memory, Categories::GUARD), [1]);
    assert_eq!(positions(&memory, PRESENT), [0, 2]);
}

#[test]
fn more_regions_than_one_call_brings() {
    let pages = 5 * Pagemap::REGIONS as u64;
    let memory = Mapping::anonymous(pages);
    (0..pages).step_by(2).for_each(|index| memory.store(index, 1));
    assert!(positions(&memory, PRESENT).into_iter().eq((0..pages).step_by(2)));
    // Appended, in order, to what was there.
    let mut found = vec![(memory.pages(0..1), Categories::empty())];
    pagemap().scan(memory.range(), PRESENT, PRESENT, &mut found).expect("a scan");
    assert_eq!(found.len() as u64, 1 + pages / 2);
    assert!(found.is_sorted_by_key(|(range, _)| range.first()));
}

#[test]
fn neighbours_of_which_the_same_is_true_are_one_range() {
    let memory = Mapping::anonymous(6);
    (0..4).for_each(|index| memory.store(index, 1));
    assert_eq!(memory.load(4), 0);
    let mut found = Vec::new();
    let report = PRESENT | Categories::PFNZERO;
    pagemap().scan(memory.range(), PRESENT, report, &mut found).expect("a scan");
    assert_eq!(found, [(memory.pages(0..4), PRESENT), (memory.pages(4..5), report)]);
    // The kernel ends a call where its room is used up; what follows may go on with the same.
    let mut joined = Vec::new();
    for range in [memory.pages(0..2), memory.pages(2..4)] {
        let region = |range: PageRange| PageRegion {
            start: range.address(),
            end: range.address() + len_of(range),
            categories: PRESENT.bits(),
        };
        push(&mut joined, &region(range));
    }
    assert_eq!(joined, [(memory.pages(0..4), PRESENT)]);
}

#[test]
fn mapped_pages_without_anything_and_holes_in_the_mapping() {
    let memory = Mapping::apart(6);
    memory.store(1, 1);
    unmap(memory.pages(3..5));
    let mut found = Vec::new();
    pagemap().scan(memory.range(), Categories::empty(), PRESENT, &mut found).expect("a scan");
    let nothing = Categories::empty();
    let expected = [
        (memory.pages(0..1), nothing),
        (memory.pages(1..2), PRESENT),
        (memory.pages(2..3), nothing),
        (memory.pages(5..6), nothing),
    ];
    assert_eq!(found, expected);
}

#[test]
fn what_the_kernel_cannot_tell_is_true_of_no_page() {
    let memory = Mapping::anonymous(1);
    memory.store(0, 1);
    let mut old = pagemap();
    old.known -= Categories::GUARD;
    let mut found = Vec::new();
    let guard = Categories::GUARD;
    old.scan(memory.range(), guard, guard, &mut found).expect("a scan");
    assert!(found.is_empty());
    old.scan(memory.range(), guard | PRESENT, guard | PRESENT, &mut found).expect("a scan");
    assert_eq!(found, [(memory.range(), PRESENT)]);
}

#[test]
fn looking_brings_no_page() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(2);
    register(&uffd, &memory, Modes::MISSING);
    assert_eq!(positions(&memory, PRESENT), [0u64; 0]);
    let mut entries = [1; 2];
    pagemap().entries(memory.range(), &mut entries).expect("entries");
    assert_eq!(entries.map(|entry| entry & (Pagemap::PRESENT | Pagemap::SWAPPED)), [0; 2]);
}

#[test]
fn entries_say_whose_and_of_what_kind() {
    let memory = Mapping::anonymous(3);
    memory.store(0, 1);
    assert_eq!(memory.load(1), 0);
    let mut entries = [0; 3];
    pagemap().entries(memory.range(), &mut entries).expect("entries");
    let bits = |bit: u64| entries.map(|entry| entry & bit != 0);
    assert_eq!(bits(Pagemap::PRESENT), [true, true, false]);
    assert_eq!(bits(Pagemap::EXCLUSIVE), [true, false, false], "the zeroes are everybody's");
    assert_eq!(bits(Pagemap::FILE), [false; 3]);

    let shared = Mapping::new(1, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    shared.store(0, 1);
    pagemap().entries(shared.range(), &mut entries[..1]).expect("entries");
    assert_ne!(entries[0] & Pagemap::FILE, 0);
}

#[test]
fn at_the_top_there_is_nothing() {
    let top = PageRange::from(Page::MAX);
    let mut entries = [1];
    pagemap().entries(top, &mut entries).expect("entries");
    assert_eq!(entries, [0]);
    let scan = |range| pagemap().scan(range, PRESENT, PRESENT, &mut Vec::new());
    assert_eq!(scan(top), Err(Errno::FAULT));
    assert_eq!(scan(PageRange::ALL), Err(Errno::FAULT));
}

#[test]
#[should_panic(expected = "an entry for each page")]
fn entries_are_as_many_as_pages() {
    let memory = Mapping::anonymous(2);
    pagemap().entries(memory.range(), &mut [0]).expect("unreachable");
}
