//! Tests.

use std::sync::Barrier;
use std::thread;

use proptest::prelude::*;

use super::super::child::{End, Fork, alone, start};
use super::super::{advise, process_vm};
use super::*;

/// Makes a region without extras.
fn region(bytes: usize) -> Region {
    Region::reserve(bytes, RegionOptions::default()).expect("there is memory")
}

/// Returns how much of a region is in memory, in bytes.
fn resident(region: &Region) -> usize {
    let mut pages = vec![0_u8; region.bytes / PAGE_SIZE];
    // SAFETY: the range is mapped, and there is room for a byte for each page.
    let outcome =
        unsafe { libc::mincore(region.pointer(), region.bytes, pages.as_mut_ptr().cast()) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    pages.iter().filter(|&&page| page & 1 != 0).count() * PAGE_SIZE
}

#[test]
fn a_region_is_aligned_zero_and_costs_nothing_until_it_is_touched() {
    let huge = Order::HUGE;
    for (bytes, pages) in [(1, 512), (huge.bytes(), 512), (huge.bytes() + 1, 1024)] {
        let region = region(bytes);
        let range = region.range();
        assert_eq!(range.pages(), pages);
        assert_eq!(range.first().align_down(huge), range.first());
        assert_eq!(resident(&region), 0);
        let mut word = [1; 8];
        region.read(range.last(), PAGE_SIZE - 8, &mut word);
        assert_eq!(word, [0; 8]);
    }
    let large = region(64 << 30);
    large.write(large.range().last(), PAGE_SIZE - 1, &[9]);
    assert_eq!(Region::reserve(0, RegionOptions::default()).err(), Some(Errno::INVAL));
    assert_eq!(Region::reserve(usize::MAX, RegionOptions::default()).err(), Some(Errno::NOMEM));
}

#[test]
fn zapping_drops_what_is_there_and_nothing_else() {
    let options = RegionOptions { huge: Some(false), ..RegionOptions::default() };
    let region = Region::reserve(1, options).expect("there is memory");
    let first = region.range().first();
    region.write(first, 0, &[7; 4 * PAGE_SIZE]);
    assert_eq!(resident(&region), 4 * PAGE_SIZE);
    let second = first.checked_add(1).expect("within");
    region.zap(PageRange::from_pages(second, 2).expect("a range")).expect("it is ours");
    assert_eq!(resident(&region), 2 * PAGE_SIZE);
    let mut bytes = [1; 4 * PAGE_SIZE];
    region.read(first, 0, &mut bytes);
    let expected = |index: usize| if (1..3).contains(&(index / PAGE_SIZE)) { 0 } else { 7 };
    assert!(bytes.iter().enumerate().all(|(index, &byte)| byte == expected(index)));
}

#[test]
fn a_region_can_be_kept_from_children_or_be_empty_for_them() {
    alone(module_path!(), "a_region_can_be_kept_from_children_or_be_empty_for_them", || {
        let word = |region: &Region| {
            let mut word = [0; 8];
            process_vm::read(region.range().address(), &mut word).map(|_| word[0])
        };
        let cases = [
            (RegionOptions::default(), Ok(5)),
            (RegionOptions { dont_fork: true, ..RegionOptions::default() }, Err(Errno::FAULT)),
            (RegionOptions { wipe_on_fork: true, ..RegionOptions::default() }, Ok(0)),
        ];
        for (options, in_child) in cases {
            let region = Region::reserve(1, options).expect("there is memory");
            region.write(region.range().first(), 0, &[5]);
            for how in [Fork::Hooked, Fork::Raw] {
                let child = start(how, || word(&region) == in_child);
                assert_eq!(child.end(), End::Returned(true), "{options:?} {how:?}");
            }
            assert_eq!(word(&region), Ok(5));
        }
    });
}

#[test]
fn less_is_reserved_where_there_is_no_room_for_more() {
    alone(module_path!(), "less_is_reserved_where_there_is_no_room_for_more", || {
        let limit = libc::rlimit { rlim_cur: 4 << 30, rlim_max: 4 << 30 };
        // SAFETY: the limit is a valid one; it holds for this process, which does nothing else.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
        let options = RegionOptions::default();
        assert_eq!(Region::reserve(16 << 30, options).err(), Some(Errno::NOMEM));
        let less = Region::reserve_at_most(16 << 30, 1 << 20, options).expect("there is room");
        let bytes = less.range().len() * PAGE_SIZE;
        assert!([1 << 30, 2 << 30].contains(&bytes), "{bytes:#x}");
        let none = Region::reserve_at_most(16 << 30, 8 << 30, options);
        assert_eq!(none.err(), Some(Errno::NOMEM));
    });
}

#[test]
fn a_program_that_locks_all_of_its_memory_does_not_lock_a_region() {
    let name = "a_program_that_locks_all_of_its_memory_does_not_lock_a_region";
    alone(module_path!(), name, || {
        // SAFETY: no conditions.
        if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
            eprintln!("NOT TESTED: mlockall: {}", std::io::Error::last_os_error());
            return;
        }
        let region = match Region::reserve(1 << 30, RegionOptions::default()) {
            Ok(region) => region,
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                eprintln!("NOT TESTED: the limit on locked memory is too low");
                return;
            }
        };
        assert_eq!(resident(&region), 0);
        // What is locked cannot be dropped.
        region.zap(region.range()).expect("it is not locked");
    });
}

#[test]
fn a_region_can_be_one_that_nobody_locks() {
    alone(module_path!(), "a_region_can_be_one_that_nobody_locks", || {
        let options = RegionOptions { never_locked: true, ..RegionOptions::default() };
        let before = match Region::reserve(1, options) {
            Ok(region) => region,
            // Before Linux 6.11.
            Err(error) => {
                assert!([Errno::INVAL, Errno::OPNOTSUPP].contains(&error), "{error}");
                eprintln!("NOT TESTED: the kernel has no such memory");
                return;
            }
        };
        let ordinary = region(1);
        for flags in [libc::MCL_CURRENT, libc::MCL_CURRENT | libc::MCL_FUTURE] {
            // SAFETY: no conditions.
            if unsafe { libc::mlockall(flags) } != 0 {
                eprintln!("NOT TESTED: mlockall: {}", std::io::Error::last_os_error());
                return;
            }
            let after = Region::reserve(1, options).expect("there is memory");
            for never in [&before, &after] {
                assert!(!advise::is_locked(never.range()), "{flags}");
            }
            assert!(advise::is_locked(ordinary.range()), "this test sees what is locked");
        }
    });
}

#[test]
#[should_panic(expected = "not within the region")]
fn bytes_past_the_end_are_refused() {
    let region = region(1);
    region.write(region.range().last(), PAGE_SIZE - 7, &[0; 8]);
}

#[test]
#[should_panic(expected = "not within the region")]
fn bytes_before_the_beginning_are_refused() {
    let region = region(1);
    let before = Page::new(region.range().first().number() - 1).expect("a page");
    region.read(before, PAGE_SIZE - 1, &mut [0; 2]);
}

#[test]
#[should_panic(expected = "not aligned")]
fn a_word_that_is_not_aligned_is_refused() {
    let region = region(1);
    region.fetch_update(region.range().first(), 4, &mut |word| word);
}

#[test]
fn updates_of_a_word_are_atomic() {
    const ROUNDS: u64 = 20_000;
    let region = region(1);
    let page = region.range().last();
    let add = || region.fetch_update(page, 4088, &mut |word| word + 1);
    let count = || (0..ROUNDS).map(|_| add()).collect::<Vec<u64>>();
    let mut seen: Vec<u64> = thread::scope(|scope| {
        let threads = [(); 4].map(|()| scope.spawn(count));
        threads.into_iter().flat_map(|thread| thread.join().expect("it counts")).collect()
    });
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..4 * ROUNDS), "each value is replaced once");
}

#[test]
fn writes_to_parts_of_a_word_leave_the_others_alone() {
    const ROUNDS: usize = 100_000;
    let region = region(1);
    let page = region.range().first();
    let start = Barrier::new(4);
    // Each has two bytes of one word, or of two words that follow each other.
    let write = |index: usize| {
        start.wait();
        for round in 0..ROUNDS {
            let bytes = (round as u16).to_ne_bytes();
            for at in [2 * index, 16 + (2 * index + 7) % 8] {
                region.write(page, at, &bytes);
                let mut back = [0; 2];
                region.read(page, at, &mut back);
                assert_eq!(back, bytes, "of {index}, at {at}");
            }
        }
    };
    thread::scope(|scope| {
        let write = &write;
        (0..4).for_each(|index| drop(scope.spawn(move || write(index))));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_region_is_like_a_slice_of_bytes(
        accesses in prop::collection::vec((0usize..40_000, 0usize..10_000, any::<u8>()), 1..40)
    ) {
        let region = region(1);
        let mut model = vec![0_u8; 50_000];
        let first = region.range().first();
        for (index, (start, bytes, value)) in accesses.into_iter().enumerate() {
            // Any way to name the place will do.
            let pages = (start / PAGE_SIZE).min(index % 4);
            let page = first.checked_add(pages as u64).expect("within");
            let offset = start - pages * PAGE_SIZE;
            let data: Vec<u8> = (0..bytes).map(|index| value.wrapping_add(index as u8)).collect();
            region.write(page, offset, &data);
            model[start..start + bytes].copy_from_slice(&data);
            let mut back = vec![1; bytes + 64];
            region.read(page, offset, &mut back);
            prop_assert_eq!(&back[..], &model[start..start + bytes + 64]);
        }
        let mut all = vec![1; model.len()];
        region.read(first, 0, &mut all);
        prop_assert_eq!(all, model);
    }
}

/// What of a region that grows can be accessed is what was reached: nobody who locks all memory of
/// the process fills more than that.
#[test]
fn a_region_that_grows_can_be_accessed_as_far_as_it_was_reached() {
    let options = RegionOptions { grows: true, huge: Some(false), ..RegionOptions::default() };
    let region = Region::reserve(1 << 30, options).expect("there is room");
    let (first, last) = (region.range().first(), region.range().last());
    let readable = |page: Page| process_vm::read(page.address(), &mut [0; 8]);
    assert_eq!(readable(first), Err(Errno::FAULT));
    let third = first.checked_add(2).expect("within");
    assert_eq!(region.reach(PageRange::from_pages(first, 3).expect("a range")), Ok(()));
    region.write(third, 8, &[7; 8]);
    assert_eq!(readable(third), Ok(8));
    assert_eq!(readable(last), Err(Errno::FAULT), "no more than a step");
    let read = || region.read(last, 0, &mut [0; 8]);
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    assert!(refused.is_err(), "what was not reached is not read");
    // By many at once, each for itself.
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for index in 1..=8 {
            let (region, barrier) = (&region, &barrier);
            scope.spawn(move || {
                let page = first.checked_add(index * 30_000).expect("within");
                barrier.wait();
                assert_eq!(region.reach(page.into()), Ok(()));
                region.write(page, 0, &index.to_ne_bytes());
            });
        }
    });
    for index in 1..=8_u64 {
        let mut word = [0; 8];
        region.read(first.checked_add(index * 30_000).expect("within"), 0, &mut word);
        assert_eq!(u64::from_ne_bytes(word), index);
    }
    assert_eq!(region.reach(last.into()), Ok(()));
    assert_eq!(readable(last), Ok(8));
    let mut word = [0; 8];
    region.read(third, 8, &mut word);
    assert_eq!(word, [7; 8]);
}

#[test]
fn what_is_locked_can_be_zapped_and_unlocked() {
    let options = RegionOptions { huge: Some(false), ..RegionOptions::default() };
    let region = Region::reserve(1, options).expect("there is memory");
    let first = region.range().first();
    let page = PageRange::from(first);
    region.write(first, 0, &[7; PAGE_SIZE]);
    let at = std::ptr::with_exposed_provenance(first.address() as usize);
    // SAFETY: locks a page of ours, and changes none of its contents.
    if unsafe { libc::mlock(at, PAGE_SIZE) } != 0 {
        return eprintln!("NOT TESTED: {}", std::io::Error::last_os_error());
    }
    assert!(super::super::advise::is_locked(page));
    region.zap(page).expect("it is ours");
    let mut word = [1; 8];
    region.read(first, 0, &mut word);
    assert_eq!(word, [0; 8]);
    region.unlock().expect("it is ours");
    assert!(!super::super::advise::is_locked(page));
}
