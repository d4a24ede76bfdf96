//! Every operation and every message, on the running kernel.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, MremapFlags, ProtFlags};
use uhmm::Order;

use super::super::advise;
use super::super::testing::{
    Cause, DEADLINE, Doing, Mapping, Reader, load, pointer, readable, register, start, store,
    unmap, userfaultfd, waiting,
};
use super::*;

mod events;

const MISSING: Modes = Modes::MISSING;
const WAKE: MoveOptions = MoveOptions { wake: true, allow_holes: false };

/// What an operation answers that did `pages` pages and then stopped.
fn stopped(pages: u64, errno: Errno) -> Progress {
    Progress { pages, result: Err(errno) }
}

/// What an operation answers that did everything.
fn all(pages: u64) -> Progress {
    Progress { pages, result: Ok(()) }
}

/// Maps shared memory.
fn shared(pages: u64) -> Mapping {
    Mapping::new(pages, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)
}

#[test]
fn the_handshake_gives_what_is_wanted_and_what_comes_with_it() {
    let Some(uffd) = userfaultfd(Features::WP_ASYNC | Features::THREAD_ID) else { return };
    let got = Features::WP_ASYNC | Features::WP_UNPOPULATED | Features::THREAD_ID;
    assert_eq!(uffd.features(), got);
    let offered = Userfaultfd::offered(Faults::All).expect("a userfaultfd");
    assert!(offered.contains(got));
    let flags = rustix::fs::fcntl_getfl(&uffd).expect("a descriptor");
    assert!(flags.contains(OFlags::NONBLOCK), "poll works on no other");
    let flags = rustix::io::fcntl_getfd(&uffd).expect("a descriptor");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    // What no kernel has is refused, not left out.
    let unknown = Features::from_bits_retain(1 << 63);
    assert_eq!(Userfaultfd::open(Faults::All, unknown).map(drop), Err(Errno::INVAL));
}

#[test]
fn the_device_gives_the_same_as_the_system_call() {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    match create_by_device(flags) {
        Ok(fd) => {
            handshake(&fd, Features::EVENT_UNMAP).expect("it is a userfaultfd");
            let flags = rustix::fs::fcntl_getfl(&fd).expect("a descriptor");
            assert!(flags.contains(OFlags::NONBLOCK));
        }
        Err(errno @ (Errno::ACCESS | Errno::NOENT)) => eprintln!("NOT TESTED: {errno}"),
        Err(errno) => panic!("/dev/userfaultfd: {errno}"),
    }
}

#[test]
fn for_faults_outside_the_kernel_system_calls_fail() {
    let uffd = match Userfaultfd::open(Faults::UserModeOnly, Features::empty()) {
        Ok(uffd) => uffd,
        Err(errno) => panic!("everybody may: {errno}"),
    };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    assert_eq!(advise::populate_read(memory.range()), Err(Errno::FAULT));
    let range = memory.range();
    let loading = start(move || load(range.first()));
    assert_eq!(Reader::new(&uffd).fault().0, memory.page(0));
    assert_eq!(uffd.zeropage(range, true), all(1));
    assert_eq!(loading.done(), 0);
}

#[test]
fn registering_says_what_cannot_be() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let other = userfaultfd(Features::empty()).expect("a second one");
    let memory = Mapping::apart(8);
    register(&uffd, &memory, MISSING);
    register(&uffd, &memory, MISSING | Modes::WP);
    assert_eq!(other.register(memory.pages(3..4), MISSING), Err(Errno::BUSY));
    assert_eq!(uffd.register(memory.range(), Modes::MINOR), Err(Errno::INVAL));

    let file = std::fs::File::open("/proc/self/exe").expect("the program");
    let mapped = Mapping::of(&file, 1, ProtFlags::READ, MapFlags::PRIVATE);
    assert_eq!(uffd.register(mapped.range(), MISSING), Err(Errno::INVAL));
    let asynchronous = userfaultfd(Features::WP_ASYNC).expect("Linux 6.7");
    assert_eq!(asynchronous.register(mapped.range(), Modes::WP), Ok(()));

    let hole = memory.pages(2..6);
    unmap(hole);
    assert_eq!(uffd.register(hole, MISSING), Err(Errno::INVAL), "there is nothing");
    assert_eq!(uffd.register(memory.range(), MISSING), Ok(()), "there is something");
    assert_eq!(uffd.register(PageRange::ALL, MISSING), Err(Errno::INVAL));
}

#[test]
fn what_was_registered_is_registered_in_the_last_modes() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    register(&uffd, &memory, Modes::WP);
    // Were it still told of missing pages, this would wait for ever.
    assert_eq!(
        start({
            let page = memory.page(0);
            move || load(page)
        })
        .done(),
        0
    );
}

#[test]
fn a_fault_says_where_how_and_who() {
    let Some(uffd) = userfaultfd(Features::THREAD_ID | Features::EXACT_ADDRESS) else { return };
    let memory = Mapping::anonymous(2);
    register(&uffd, &memory, MISSING);
    let mut reader = Reader::new(&uffd);
    for (index, write) in [(0, false), (1, true)] {
        let page = memory.page(index);
        let touching = start(move || {
            let byte = pointer(page).cast::<u8>().wrapping_add(0x123);
            match write {
                // SAFETY: the byte is in the mapping.
                true => unsafe { byte.write_volatile(7) },
                // SAFETY: the byte is in the mapping.
                false => assert_eq!(unsafe { byte.read_volatile() }, 0),
            }
            rustix::thread::gettid()
        });
        let Message::Fault { address, write: stores, wp, minor, thread } = reader.next() else {
            panic!("no fault");
        };
        assert_eq!(address, page.address() + 0x123);
        assert_eq!((stores, wp, minor), (write, false, false));
        assert_eq!(uffd.zeropage(page.into(), true), all(1));
        assert_eq!(touching.done().as_raw_nonzero().get().cast_unsigned(), thread);
    }
}

#[test]
fn without_asking_a_fault_says_the_page_and_nobody() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    let page = memory.page(0);
    // SAFETY: the byte is in the mapping.
    let byte = move || unsafe { pointer(page).cast::<u8>().wrapping_add(0x123).read_volatile() };
    let loading = start(byte);
    let Message::Fault { address, thread, .. } = Reader::new(&uffd).next() else {
        panic!("no fault");
    };
    assert_eq!((address, thread), (page.address(), 0));
    assert_eq!(uffd.zeropage(page.into(), true), all(1));
    assert_eq!(loading.done(), 0);
}

#[test]
fn copy_fills_holes_only_and_says_how_far_it_came() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let (memory, from) = (Mapping::anonymous(4), Mapping::apart(4));
    from.fill(|index| 100 + index);
    register(&uffd, &memory, MISSING);
    assert_eq!(uffd.copy(from.page(2), memory.pages(2..3), true), all(1));
    assert_eq!(uffd.copy(from.page(0), memory.range(), true), stopped(2, Errno::AGAIN));
    assert_eq!(uffd.copy(from.page(2), memory.pages(2..4), true), stopped(0, Errno::EXIST));
    assert_eq!(uffd.copy(from.page(3), memory.pages(3..4), true), all(1));
    assert_eq!([0, 1, 2, 3].map(|index| memory.load(index)), [100, 101, 102, 103]);

    let elsewhere = Mapping::anonymous(1);
    assert_eq!(uffd.copy(from.page(0), elsewhere.range(), true), stopped(0, Errno::NOENT));
    unmap(from.pages(3..4));
    advise::dontneed(memory.range()).expect("memory");
    assert_eq!(uffd.copy(from.page(3), memory.pages(3..4), true), stopped(0, Errno::FAULT));
    assert_eq!(uffd.copy(from.page(0), PageRange::ALL, true), stopped(0, Errno::INVAL));
}

#[test]
fn copy_does_not_mind_protection() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let from = Mapping::anonymous(1);
    from.store(0, 5);
    let memory = Mapping::new(1, ProtFlags::empty(), MapFlags::PRIVATE);
    register(&uffd, &memory, MISSING);
    assert_eq!(uffd.copy(from.page(0), memory.range(), true), all(1));
    super::super::testing::protect(memory.range(), rustix::mm::MprotectFlags::READ);
    assert_eq!(memory.load(0), 5);
}

#[test]
fn zeropage_fills_holes_only_and_says_how_far_it_came() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(4);
    memory.store(2, 9);
    register(&uffd, &memory, MISSING);
    assert_eq!(uffd.zeropage(memory.range(), true), stopped(2, Errno::AGAIN));
    assert_eq!(uffd.zeropage(memory.pages(2..4), true), stopped(0, Errno::EXIST));
    assert_eq!(uffd.zeropage(memory.pages(3..4), true), all(1));
    assert_eq!([0, 1, 2, 3].map(|index| memory.load(index)), [0, 0, 9, 0]);
    let elsewhere = Mapping::anonymous(1);
    assert_eq!(uffd.zeropage(elsewhere.range(), true), stopped(0, Errno::NOENT));
}

#[test]
fn move_takes_the_pages_away_and_says_how_far_it_came() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let (memory, staging) = (Mapping::anonymous(4), Mapping::anonymous(4));
    memory.fill(|index| 100 + index);
    register(&uffd, &memory, MISSING);
    register(&uffd, &staging, MISSING);
    assert_eq!(uffd.move_pages(memory.pages(2..3), staging.page(2), WAKE), all(1));

    // The target is not free.
    memory.range().iter().for_each(|page| {
        let _ = uffd.zeropage(page.into(), true);
    });
    assert_eq!(uffd.move_pages(memory.range(), staging.page(0), WAKE), stopped(2, Errno::AGAIN));
    let rest = memory.pages(2..4);
    assert_eq!(uffd.move_pages(rest, staging.page(2), WAKE), stopped(0, Errno::EXIST));
    assert_eq!(uffd.move_pages(memory.pages(3..4), staging.page(3), WAKE), all(1));
    assert_eq!([0, 1, 2, 3].map(|index| staging.load(index)), [100, 101, 102, 103]);

    // What was moved is missing: a thread that touches it waits.
    let page = memory.page(1);
    let loading = start(move || load(page));
    assert_eq!(Reader::new(&uffd).fault(), (page, Cause::default()));
    assert_eq!(uffd.move_pages(staging.pages(1..2), page, WAKE), all(1));
    assert_eq!(loading.done(), 101);
}

#[test]
fn move_passes_over_holes_if_it_may() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let (memory, staging) = (Mapping::anonymous(4), Mapping::anonymous(4));
    register(&uffd, &memory, MISSING);
    register(&uffd, &staging, MISSING);
    let filled = |index: u64| uffd.zeropage(memory.pages(index..index + 1), true);
    assert_eq!((filled(0), filled(3)), (all(1), all(1)));
    let whole = memory.range();
    assert_eq!(uffd.move_pages(whole, staging.page(0), WAKE), stopped(1, Errno::AGAIN));
    let rest = memory.pages(1..4);
    assert_eq!(uffd.move_pages(rest, staging.page(1), WAKE), stopped(0, Errno::NOENT));
    let options = MoveOptions { allow_holes: true, ..WAKE };
    assert_eq!(uffd.move_pages(rest, staging.page(1), options), all(3), "holes count");
    assert_eq!((staging.load(0), staging.load(3)), (0, 0));
}

#[test]
fn move_says_what_cannot_move() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let (memory, staging) = (Mapping::anonymous(1), Mapping::anonymous(1));
    memory.store(0, 1);
    let moved = || uffd.move_pages(memory.range(), staging.page(0), WAKE);
    assert_eq!(moved(), stopped(0, Errno::INVAL), "the target is not registered");
    register(&uffd, &staging, MISSING);
    super::super::testing::protect(memory.range(), rustix::mm::MprotectFlags::READ);
    assert_eq!(moved(), stopped(0, Errno::INVAL), "it cannot be written to");
    let file = shared(1);
    file.store(0, 2);
    let from_shared = uffd.move_pages(file.range(), staging.page(0), WAKE);
    assert_eq!(from_shared, stopped(0, Errno::INVAL), "it is shared");
    let rights = rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE;
    super::super::testing::protect(memory.range(), rights);
    assert_eq!(moved(), all(1), "out of what is not registered it can");
    assert_eq!(staging.load(0), 1);
}

#[test]
fn a_huge_page_stays_one() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let (memory, staging) = (Mapping::huge(1), Mapping::huge(1));
    advise::hugepage(memory.range()).expect("the kernel has huge pages");
    memory.fill(|index| index);
    register(&uffd, &staging, MISSING);
    let pagemap = super::super::pagemap::Pagemap::open().expect("a pagemap");
    let huge = |mapping: &Mapping| {
        use super::super::pagemap::Categories;
        let mut found = Vec::new();
        let kinds = Categories::HUGE;
        pagemap.scan(mapping.range(), kinds, kinds, &mut found).expect("a scan");
        found.iter().map(|(range, _)| range.pages()).sum::<u64>()
    };
    let before = huge(&memory);
    assert_eq!(uffd.move_pages(memory.range(), staging.page(0), WAKE), all(512));
    assert_eq!(huge(&staging), before);
    if before == 0 {
        eprintln!("NOT TESTED: the kernel gave no huge page");
    }
    assert!((0..512).all(|index| staging.load(index) == index));
}

/// A thread that waits for page 0, and has been reported.
fn waiter(uffd: &Userfaultfd, memory: &Mapping) -> Doing<u64> {
    let page = memory.page(0);
    let loading = start(move || load(page));
    assert_eq!(Reader::new(uffd).fault().0, page);
    assert_eq!(waiting(uffd), 1);
    loading
}

/// A way to fill the first page of a mapping.
type Fill<'a> = &'a dyn Fn(&Userfaultfd, &Mapping, bool) -> Progress;

#[test]
fn who_waits_is_woken_only_if_it_shall_be() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let from = Mapping::anonymous(2);
    from.fill(|_| 3);
    let copy: Fill<'_> = &|uffd, memory, wake| uffd.copy(from.page(0), memory.range(), wake);
    let zero: Fill<'_> = &|uffd, memory, wake| uffd.zeropage(memory.range(), wake);
    let moving: Fill<'_> = &|uffd, memory, wake| {
        let options = MoveOptions { wake, allow_holes: false };
        uffd.move_pages(from.pages(u64::from(wake)..u64::from(wake) + 1), memory.page(0), options)
    };
    for (fill, value) in [(copy, 3), (zero, 0), (moving, 3)] {
        for wake in [true, false] {
            let memory = Mapping::anonymous(1);
            register(&uffd, &memory, MISSING);
            let loading = waiter(&uffd, &memory);
            assert_eq!(fill(&uffd, &memory, wake), all(1));
            // The kernel takes those that it wakes off its list before it returns.
            assert_eq!(waiting(&uffd), usize::from(!wake));
            if !wake {
                uffd.wake(memory.range()).expect("a range");
                assert_eq!(waiting(&uffd), 0);
            }
            assert_eq!(loading.done(), value);
        }
    }
}

#[test]
fn waking_without_the_page_lets_the_thread_wait_again() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    let loading = waiter(&uffd, &memory);
    uffd.wake(memory.range()).expect("a range");
    assert_eq!(Reader::new(&uffd).fault().0, memory.page(0));
    assert_eq!(uffd.zeropage(memory.range(), true), all(1));
    assert_eq!(loading.done(), 0);
    assert_eq!(uffd.wake(PageRange::ALL), Err(Errno::INVAL));
}

#[test]
fn a_store_to_a_protected_page_waits() {
    let Some(uffd) = userfaultfd(Features::PAGEFAULT_FLAG_WP) else { return };
    for wake in [true, false] {
        let memory = Mapping::anonymous(1);
        memory.store(0, 1);
        register(&uffd, &memory, Modes::WP);
        uffd.write_protect(memory.range(), true, wake).expect("it is registered");
        assert_eq!(memory.load(0), 1, "loads go on");
        let page = memory.page(0);
        let storing = start(move || store(page, 2));
        let cause = Cause { write: true, wp: true, minor: false };
        assert_eq!(Reader::new(&uffd).fault(), (page, cause));
        assert_eq!(memory.load(0), 1);
        uffd.write_protect(memory.range(), false, wake).expect("it is registered");
        assert_eq!(waiting(&uffd), usize::from(!wake));
        uffd.wake(memory.range()).expect("a range");
        storing.done();
        assert_eq!(memory.load(0), 2);
    }
    let elsewhere = Mapping::anonymous(1);
    assert_eq!(uffd.write_protect(elsewhere.range(), true, true), Err(Errno::NOENT));
}

#[test]
fn asynchronous_protection_is_resolved_by_the_kernel() {
    let Some(uffd) = userfaultfd(Features::WP_ASYNC) else { return };
    let memory = Mapping::anonymous(1);
    memory.store(0, 1);
    register(&uffd, &memory, Modes::WP);
    uffd.write_protect(memory.range(), true, true).expect("it is registered");
    memory.store(0, 2);
    assert_eq!(memory.load(0), 2);
    assert_eq!(uffd.read_now(&mut Messages::new()), Err(Errno::AGAIN), "nobody is told");
}

#[test]
fn a_page_of_the_file_is_mapped_on_demand() {
    let Some(uffd) = userfaultfd(Features::MINOR_SHMEM) else { return };
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::NOEXEC_SEAL;
    let file = rustix::fs::memfd_create(c"minor", flags).expect("a memfd");
    rustix::fs::ftruncate(&file, 3 * 4096).expect("room");
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    let writer = Mapping::of(&file, 3, rights, MapFlags::SHARED);
    let reader = Mapping::of(&file, 3, rights, MapFlags::SHARED);
    register(&uffd, &reader, Modes::MINOR);
    writer.store(0, 8);
    writer.store(1, 9);
    for (index, wake) in [(0, true), (1, false)] {
        let page = reader.page(index);
        let loading = start(move || load(page));
        let cause = Cause { minor: true, ..Cause::default() };
        assert_eq!(Reader::new(&uffd).fault(), (page, cause));
        assert_eq!(uffd.continue_(page.into(), wake), all(1));
        assert_eq!(waiting(&uffd), usize::from(!wake));
        uffd.wake(page.into()).expect("a range");
        assert_eq!(loading.done(), 8 + index);
    }
    assert_eq!(uffd.continue_(reader.range(), true), stopped(0, Errno::EXIST));
    assert_eq!(uffd.continue_(reader.pages(2..3), true), stopped(0, Errno::FAULT));
}

#[test]
fn a_poisoned_page_fails() {
    let Some(uffd) = userfaultfd(Features::POISON) else { return };
    let memory = Mapping::anonymous(3);
    memory.store(2, 1);
    register(&uffd, &memory, MISSING);
    // A system call, because a load would end the test.
    let range = memory.pages(0..1);
    let populating = start(move || advise::populate_read(range));
    assert_eq!(Reader::new(&uffd).fault().0, range.first());
    assert_eq!(uffd.poison(memory.range(), false), stopped(2, Errno::AGAIN));
    assert_eq!(uffd.poison(memory.pages(2..3), true), stopped(0, Errno::EXIST));
    assert_eq!(waiting(&uffd), 1);
    uffd.wake(range).expect("a range");
    assert_eq!(populating.done(), Err(Errno::HWPOISON));
    advise::dontneed(range).expect("memory");
    assert_eq!(uffd.poison(range, true), all(1), "it was missing again");
}

#[test]
fn what_is_unregistered_reads_as_zeroes_and_nobody_sleeps_on() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    let loading = waiter(&uffd, &memory);
    uffd.unregister(memory.range()).expect("it is registered");
    assert_eq!(waiting(&uffd), 0);
    assert_eq!(loading.done(), 0);
}

/// The kernel loses a thread that faults while its range is being unregistered, unless it is woken
/// once more. The two meet within a microsecond, so the test goes through the delays, as often as
/// it can in its time. Each fault is the first in its 2 MiB: it makes the page table before it
/// begins to wait, which gives the other side time to come between.
#[test]
fn a_fault_in_flight_survives_unregistering() {
    const TIME: Duration = Duration::from_secs(2);
    const END: u64 = u64::MAX;
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::huge(8192).into_range();
    let mut blocks = memory.blocks(Order::HUGE);
    // Odd from when the thread is to load the page until it has done so.
    let round = Arc::new(AtomicU64::new(0));
    let loading = start({
        let (round, blocks) = (round.clone(), blocks.clone());
        move || {
            for (block, turn) in blocks.zip((1..).step_by(2)) {
                if await_round(&round, turn) == END {
                    break;
                }
                assert_eq!(load(block.first()), 0);
                round.store(turn + 1, Ordering::Release);
            }
        }
    });
    let start = Instant::now();
    for turn in (1..).step_by(2) {
        let Some(block) = blocks.next().filter(|_| start.elapsed() < TIME) else { break };
        let page = PageRange::from(block.first());
        uffd.register(page, MISSING).expect("it can be registered");
        round.store(turn, Ordering::Release);
        (0..turn / 2 % 20).for_each(|_| std::hint::spin_loop());
        uffd.unregister(page).expect("it is registered");
        await_round(&round, turn + 1);
        unmap(block);
    }
    round.store(END, Ordering::Release);
    loading.done();
    if let Some(rest) = blocks.next() {
        unmap(PageRange::from_bounds(rest.first(), memory.last()).expect("the rest"));
    }
}

#[test]
fn a_retired_userfaultfd_lets_go_of_everything_and_answers_nothing() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    let loading = waiter(&uffd, &memory);
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    let instead = rustix::event::eventfd(1, flags).expect("an eventfd");
    assert!(!uffd.is_retired());
    uffd.retire(instead.as_fd()).expect("it is open");
    assert!(uffd.is_retired());
    assert_eq!(loading.done(), 0);
    assert_eq!(uffd.zeropage(memory.range(), true), stopped(0, Errno::NOTTY));
    assert_eq!(uffd.register(memory.range(), MISSING), Err(Errno::NOTTY));
    assert!(!uffd.changing());
    assert_eq!(uffd.read_now(&mut Messages::new()), Ok(0));
    let flags = rustix::io::fcntl_getfd(&uffd).expect("a descriptor");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

/// Waits until a counter has come to `value`, spinning so as to go on at once. Acquire, against
/// the Release of whoever counts: what it did to the page comes before.
fn await_round(round: &AtomicU64, value: u64) -> u64 {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        for _ in 0..10_000 {
            match round.load(Ordering::Acquire) {
                now if now >= value => return now,
                _ => std::hint::spin_loop(),
            }
        }
    }
    panic!("nobody sleeps on");
}

#[test]
fn unregistering_what_is_not_mapped_still_wakes() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let memory = Mapping::apart(2);
    register(&uffd, &memory, MISSING);
    // A system call, because a load would end the test.
    let range = memory.pages(0..1);
    let populating = start(move || advise::populate_read(range));
    assert_eq!(Reader::new(&uffd).fault().0, range.first());
    unmap(range);
    assert_eq!(uffd.unregister(range), Err(Errno::INVAL));
    assert_eq!(populating.done(), Err(Errno::NOMEM));
}
