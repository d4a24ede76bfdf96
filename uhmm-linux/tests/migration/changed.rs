//! Pages come home to what has become of their mapping meanwhile.

use super::*;

#[test]
fn pages_come_home_to_what_may_only_be_read() {
    in_own_process(|| {
        with_both(512, |process, memory| {
            for mapping in [Mapping::anonymous(8), large()] {
                fill(&mapping);
                send_out(process, mapping.range(), memory);
                protect(mapping.range(), R).expect("it is mapped");
                assert_all_whole(&mapping);
                assert_eq!(trap::store(mapping.word(3), 1), Err(Trap::Denied));
                assert_used(memory, 0);
                let report = process.migrate(mapping.range(), memory).run();
                assert_all_stay(&report, mapping.range(), StayReason::ReadOnly);
                protect(mapping.range(), RW).expect("it is mapped");
                assert_all_whole(&mapping);
                mapping.poke(3, 1);
                assert_eq!(mapping.peek(3), 1);
            }
        });
    });
}

#[test]
fn pages_come_home_to_what_may_not_be_accessed_and_are_there_when_it_may() {
    in_own_process(|| {
        with_both(512, |process, memory| {
            for mapping in [Mapping::anonymous(8), large()] {
                fill(&mapping);
                send_out(process, mapping.range(), memory);
                protect(mapping.range(), NONE).expect("it is mapped");
                // Half of them while nobody may, half of them when somebody may again.
                let half = mapping.part(0, mapping.range().pages() / 2);
                assert_eq!(trap::load(mapping.word(0)), Err(Trap::Denied));
                assert_eq!(process.migrate_home(half).stayed, []);
                assert_eq!(trap::load(mapping.word(0)), Err(Trap::Denied));
                protect(mapping.range(), RW).expect("it is mapped");
                assert_all_whole(&mapping);
                assert_used(memory, 0);
            }
        });
    });
}

#[test]
fn pages_come_home_when_they_are_locked_and_stay() {
    in_own_process(|| {
        with_both(512, |process, memory| {
            for mapping in [Mapping::anonymous(8), large()] {
                fill(&mapping);
                send_out(process, mapping.range(), memory);
                lock(mapping.range()).expect("root may");
                assert!(mapping.range().iter().all(|page| is_home(process, page)));
                assert_used(memory, 0);
                let report = process.migrate(mapping.range(), memory).run();
                assert_all_stay(&report, mapping.range(), StayReason::Locked);
                assert_all_whole(&mapping);
                unlock(mapping.range()).expect("root may");
                send_out(process, mapping.range(), memory);
                assert_all_whole(&mapping);
            }
        });
    });
}

/// The kernel does not tell of guards. While one stands, nothing of what was there before comes
/// back; that it was put up and taken down again unseen is a limitation, and `docs/limitations.md`
/// says so.
#[test]
fn what_was_there_before_a_guard_does_not_come_back() {
    in_own_process(|| {
        with_both(512, |process, memory| {
            for mapping in [Mapping::anonymous(8), large()] {
                fill(&mapping);
                let guarded = mapping.part(2, 3);
                let is_guarded = |index: u64| (2..5).contains(&index);
                send_out(process, mapping.range(), memory);
                match advise(guarded, GUARD_INSTALL) {
                    Err(Errno::INVAL) => {
                        return common::loudly("there are no guards here: nothing was tested");
                    }
                    result => result.expect("anonymous memory can be guarded"),
                }
                for page in guarded.iter() {
                    assert!(trap::load(page.address()).is_err(), "{page} is guarded");
                }
                assert_eq!(process.migrate_home(mapping.range()).stayed, []);
                assert_used(memory, 0);
                for page in guarded.iter() {
                    assert!(trap::load(page.address()).is_err(), "{page} is guarded");
                }
                advise(guarded, GUARD_REMOVE).expect("there are guards");
                for index in 0..mapping.range().pages() {
                    match is_guarded(index) {
                        true => assert_blank(mapping.page(index)),
                        false => assert_whole(mapping.page(index), index),
                    }
                }
                // And what was guarded before anything was to leave stays, and is a guard.
                advise(guarded, GUARD_INSTALL).expect("anonymous memory can be guarded");
                let report = process.migrate(mapping.range(), memory).run();
                assert_eq!(report.moved, mapping.range().pages() - 3, "{report:?}");
                guarded
                    .iter()
                    .for_each(|page| assert!(report.reason(page).is_some(), "{report:?}"));
                for page in guarded.iter() {
                    assert!(trap::load(page.address()).is_err(), "{page} is guarded");
                }
            }
        });
    });
}

#[test]
fn pages_come_home_to_where_their_mapping_has_moved() {
    in_own_process(|| {
        with_both(1024, |process, memory| {
            let large_pages = Order::HUGE.pages();
            // To an aligned place, to one that is not, and into the middle of another chunk.
            for (pages, shift) in [(8, 0), (8, 3), (large_pages, 0), (large_pages, 7)] {
                for backing in [Backing::Anonymous, Backing::Huge] {
                    let mapping = Mapping::new(pages, backing, RW);
                    fill(&mapping);
                    send_out(process, mapping.range(), memory);
                    let target = part(place(pages + shift), shift, pages);
                    remap(mapping.range(), target.first()).expect("it can move");
                    assert!(target.iter().all(|page| is_out(process, page)), "{target}");
                    for (index, page) in (0..).zip(target.iter()) {
                        assert_eq!(trap::load(mapping.word(index)), Err(Trap::Unmapped));
                        assert_whole(page, index);
                    }
                    assert_used(memory, 0);
                    send_out(process, target, memory);
                    unmap(target);
                    assert_used(memory, 0);
                }
            }
        });
    });
}

#[test]
fn a_part_of_a_block_can_move_to_another_place() {
    in_own_process(|| {
        with_both(1024, |process, memory| {
            for shift in [0, 5] {
                let mapping = large();
                send_out(process, mapping.range(), memory);
                let moved = mapping.part(100, 200);
                let target = part(place(200 + shift), shift, 200);
                remap(moved, target.first()).expect("it can move");
                for index in 0..512 {
                    match (100..300).contains(&index) {
                        false => assert_whole(mapping.page(index), index),
                        true => {
                            let page = target.first().checked_add(index - 100).expect("a page");
                            assert_whole(page, index);
                            assert_eq!(trap::load(mapping.word(index)), Err(Trap::Unmapped));
                        }
                    }
                }
                assert_used(memory, 0);
                unmap(target);
            }
        });
    });
}

#[test]
fn a_mapping_that_leaves_an_empty_one_behind_takes_its_pages_along() {
    in_own_process(|| {
        with_both(1024, |process, memory| {
            for mapping in [Mapping::anonymous(8), large()] {
                fill(&mapping);
                send_out(process, mapping.range(), memory);
                let range = mapping.range();
                let target = place(range.pages());
                let bytes = range.pages() as usize * PAGE_SIZE;
                let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
                let (from, to) = (pointer(range.address()), pointer(target.address()));
                // SAFETY: both are in the part of the address space that is for tests.
                unsafe { rustix::mm::mremap_fixed(from, bytes, bytes, flags, to) }
                    .expect("it can move");
                for (index, page) in (0..).zip(target.iter()) {
                    assert_blank(mapping.page(index));
                    assert_whole(page, index);
                }
                mapping.poke(1, 11);
                assert_eq!(mapping.peek(1), 11);
                assert_used(memory, 0);
                unmap(target);
            }
        });
    });
}

/// What is to become of a part of a block that is out.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Unmapped,
    Discarded,
    Freed,
    Replaced,
    ReadOnly,
    Locked,
}

impl Fate {
    const ALL: [Fate; 6] = [
        Fate::Unmapped,
        Fate::Discarded,
        Fate::Freed,
        Fate::Replaced,
        Fate::ReadOnly,
        Fate::Locked,
    ];

    fn befall(self, range: PageRange) {
        match self {
            Fate::Unmapped => unmap(range),
            Fate::Discarded => advise(range, libc::MADV_DONTNEED).expect("it is mapped"),
            Fate::Freed => advise(range, libc::MADV_FREE).expect("it is anonymous"),
            Fate::Replaced => map(range, Backing::Anonymous, RW).expect("it can be mapped"),
            Fate::ReadOnly => protect(range, R).expect("it is mapped"),
            Fate::Locked => lock(range).expect("root may"),
        }
    }

    /// Sees what has become of the page that was at `index`.
    #[track_caller]
    fn check(self, page: Page, index: u64) {
        match self {
            Fate::Unmapped => assert_eq!(trap::load(page.address()), Err(Trap::Unmapped)),
            Fate::Discarded | Fate::Replaced => assert_blank(page),
            // The kernel may drop it, and need not.
            Fate::Freed => {
                let word = trap::load(page.address());
                assert!(word == Ok(0) || word == Ok(first_word(index)), "{page}: {word:?}");
            }
            Fate::ReadOnly => {
                assert_whole(page, index);
                assert_eq!(trap::store(page.address(), 1), Err(Trap::Denied));
            }
            Fate::Locked => assert_whole(page, index),
        }
    }

    /// Tells whether the pages were of no use any more.
    fn frees(self) -> bool {
        matches!(self, Fate::Unmapped | Fate::Discarded | Fate::Freed | Fate::Replaced)
    }
}

#[test]
fn what_befalls_a_part_of_a_block_befalls_no_other_part() {
    in_own_process(|| {
        with_both(1024, |process, memory| {
            for fate in Fate::ALL {
                for (first, pages) in [(0, 1), (511, 1), (100, 57), (0, 256), (0, 512)] {
                    println!("{fate:?}: {pages} pages from {first}");
                    let mapping = large();
                    send_out(process, mapping.range(), memory);
                    fate.befall(mapping.part(first, pages));
                    if fate.frees() {
                        assert_used(memory, 512 - pages);
                    }
                    for index in 0..512 {
                        match (first..first + pages).contains(&index) {
                            true => fate.check(mapping.page(index), index),
                            false => assert_whole(mapping.page(index), index),
                        }
                    }
                    assert_used(memory, 0);
                }
            }
        });
    });
}

/// What is stored after MADV_FREE stays, whether the page was out or not.
#[test]
fn what_is_stored_after_a_page_was_given_up_stays() {
    in_own_process(|| {
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(32);
            for out in [false, true] {
                fill(&mapping);
                if out {
                    send_out(process, mapping.range(), memory);
                }
                advise(mapping.range(), libc::MADV_FREE).expect("it is anonymous");
                (0..32).for_each(|index| mapping.poke(index, 77 + index));
                send_out(process, mapping.range(), memory);
                (0..32).for_each(|index| assert_eq!(mapping.peek(index), 77 + index));
            }
        });
    });
}

#[test]
fn what_was_replaced_while_it_was_away_does_not_come_home() {
    in_own_process(|| {
        let file = memory_file(8);
        for index in 0..8_u64 {
            let word = 0xf11e + index;
            let written = rustix::io::pwrite(&file, &word.to_ne_bytes(), index * PAGE_SIZE as u64);
            assert_eq!(written, Ok(8));
        }
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(8);
            for shared in [true, false] {
                map(mapping.range(), Backing::Anonymous, RW).expect("it can be mapped");
                fill(&mapping);
                send_out(process, mapping.range(), memory);
                let backing = match shared {
                    true => Backing::File(file.as_fd(), 0),
                    false => Backing::PrivateFile(file.as_fd(), 0),
                };
                map(mapping.range(), backing, RW).expect("it can be mapped");
                (0..8).for_each(|index| assert_eq!(mapping.peek(index), 0xf11e + index));
                assert_used(memory, 0);
                assert_eq!(process.migrate_home(mapping.range()).stayed, []);
                (0..8).for_each(|index| assert_eq!(mapping.peek(index), 0xf11e + index));
            }
        });
    });
}

/// System V shared memory of 8 pages, which can be attached in place of what is there: the kernel
/// tells nobody. It goes with this.
struct Segment(i32);

impl Segment {
    fn new() -> Segment {
        // SAFETY: takes numbers.
        let segment = unsafe { libc::shmget(libc::IPC_PRIVATE, 8 * PAGE_SIZE, 0o600) };
        assert!(segment >= 0, "{}", std::io::Error::last_os_error());
        Segment(segment)
    }

    fn attach_over(&self, mapping: &Mapping) {
        let at = pointer(mapping.word(0));
        // SAFETY: in place of a mapping of the test.
        let attached = unsafe { libc::shmat(self.0, at, libc::SHM_REMAP) };
        assert_eq!(attached, at, "{}", std::io::Error::last_os_error());
    }

    fn detach(&self, mapping: &Mapping) {
        // SAFETY: attached there.
        assert_eq!(unsafe { libc::shmdt(pointer(mapping.word(0))) }, 0);
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: it is this one's.
        unsafe { libc::shmctl(self.0, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// Maps what is a mapping like any other.
fn assert_fresh(process: &Process, memory: &Arc<DevicePagemap>, mapping: &Mapping) {
    map(mapping.range(), Backing::Anonymous, RW).expect("it can be mapped");
    mapping.range().iter().for_each(assert_blank);
    fill(mapping);
    for _ in 0..3 {
        process.migrate(mapping.range(), memory).run();
        assert_all_whole(mapping);
    }
}

#[test]
fn what_was_replaced_unseen_does_not_come_home() {
    in_own_process(|| {
        let segment = Segment::new();
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(8);
            fill(&mapping);
            send_out(process, mapping.range(), memory);
            segment.attach_over(&mapping);
            mapping.range().iter().for_each(assert_blank);
            assert_eq!(process.migrate_home(mapping.range()).stayed, []);
            mapping.range().iter().for_each(assert_blank);
            assert_used(memory, 0);
            segment.detach(&mapping);
            assert_fresh(process, memory, &mapping);
        });
    });
}

/// As above, but what came in between is gone before anything came home.
#[test]
fn what_was_replaced_unseen_and_is_gone_does_not_come_home() {
    in_own_process(|| {
        let segment = Segment::new();
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(8);
            fill(&mapping);
            send_out(process, mapping.range(), memory);
            segment.attach_over(&mapping);
            segment.detach(&mapping);
            assert_fresh(process, memory, &mapping);
        });
    });
}
