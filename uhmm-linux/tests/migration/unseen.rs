//! Nobody sees pages leave and come, however often: each thread finds what it knows to be there.

use super::*;

/// Each thread stores to words of its own, and knows what must be there. A hole would be a zero, an
/// old copy an old number.
#[test]
fn nobody_sees_a_page_leave_or_come() {
    const PAGES: u64 = 64;
    const WRITERS: u64 = 4;
    const MIGRATIONS: u64 = 300;
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let process = attach();
        let (ours, gpu) = (host(&process, 256), Gpu::new(256));
        let mapping = Mapping::anonymous(PAGES);
        (0..PAGES).for_each(|index| {
            (0..WRITERS).for_each(|writer| {
                trap::store(mapping.word(index) + 8 * writer, 1).expect("it is mapped");
            })
        });
        let over = AtomicBool::new(false);
        let stores = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (mapping, over, stores) = (&mapping, &over, &stores);
                scope.spawn(move || {
                    let mut known = [1; PAGES as usize];
                    // Relaxed: when it ends is of no importance.
                    while !over.load(Ordering::Relaxed) {
                        for (index, known) in (0..).zip(&mut known) {
                            let word = mapping.word(index) + 8 * writer;
                            assert_eq!(trap::load(word), Ok(*known), "page {index}");
                            *known += 1;
                            trap::store(word, *known).expect("it is mapped");
                        }
                        stores.fetch_add(PAGES, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..2 {
                let (mapping, over) = (&mapping, &over);
                scope.spawn(move || {
                    let mut known = [0; (PAGES * WRITERS) as usize];
                    while !over.load(Ordering::Relaxed) {
                        for (word, known) in (0..PAGES * WRITERS).zip(&mut known) {
                            let at = mapping.word(word / WRITERS) + 8 * (word % WRITERS);
                            let seen = trap::load(at).expect("it is mapped");
                            assert!(seen >= *known && seen > 0, "{seen} after {known}");
                            *known = seen;
                        }
                    }
                });
            }
            for round in 0..MIGRATIONS {
                let memory = if round % 2 == 0 { &ours } else { &gpu.pagemap };
                process.migrate(mapping.range(), memory).run();
                if round % 7 == 0 {
                    process.migrate_home(mapping.range());
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        let moved = ours.statistics().in_by_request + gpu.pagemap.statistics().in_by_request;
        let faults =
            ours.statistics().home_by_cpu_fault + gpu.pagemap.statistics().home_by_cpu_fault;
        println!("{moved} pages left, {faults} came home for a thread, {stores:?} stores");
        // There was something to see.
        assert!(moved > MIGRATIONS * 4 && faults > MIGRATIONS, "{moved} left, {faults} came home");
    });
}

/// A page that may only be read is never zeroes, and never takes a store, while it stays or comes.
#[test]
fn nobody_can_store_to_what_may_only_be_read() {
    const PAGES: u64 = 16;
    const ROUNDS: u64 = 60;
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        with_both(64, |process, memory| {
            let mapping = Mapping::anonymous(PAGES);
            fill(&mapping);
            let (over, read_only) = (AtomicBool::new(false), AtomicU64::new(0));
            let (probes, stayed) = (AtomicU64::new(0), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        // Acquire: a number of a phase is read after the mapping was protected, and
                        // again before it is not any more; partners of the releases below.
                        while !over.load(Ordering::Acquire) {
                            for index in 0..PAGES {
                                assert_whole(mapping.page(index), index);
                                let phase = read_only.load(Ordering::Acquire);
                                let word = scratch(&mapping, index);
                                let stored = trap::store(word, TOUCHED);
                                let same = read_only.load(Ordering::Acquire) == phase;
                                if phase % 2 == 1 && same {
                                    assert_eq!(stored, Err(Trap::Denied), "page {index}");
                                    probes.fetch_add(1, Ordering::Relaxed);
                                }
                            }
                        }
                    });
                }
                for round in 0..ROUNDS {
                    process.migrate(mapping.range(), memory).run();
                    protect(mapping.range(), R).expect("it is mapped");
                    read_only.store(2 * round + 1, Ordering::Release);
                    let enough = probes.load(Ordering::Relaxed) + 40;
                    // Relaxed: a count. It has to grow while pages come home and refuse to leave.
                    while probes.load(Ordering::Relaxed) < enough {
                        let report = process.migrate(mapping.range(), memory).run();
                        assert_eq!(report.moved, 0, "{report:?}");
                        let read_only =
                            |page: &Page| report.reason(*page) == Some(StayReason::ReadOnly);
                        let many = mapping.range().iter().filter(read_only).count();
                        stayed.fetch_add(many as u64, Ordering::Relaxed);
                    }
                    read_only.store(2 * round + 2, Ordering::Release);
                    protect(mapping.range(), RW).expect("it is mapped");
                }
                over.store(true, Ordering::Release);
            });
            println!("{probes:?} stores were refused, {stayed:?} pages did not leave");
            assert!(memory.statistics().home_by_cpu_fault > 0, "pages came home meanwhile");
            assert!(stayed.into_inner() > 0);
        });
    });
}

/// What a mapping shows right after it was replaced or discarded is nothing of what was there
/// before, although pages leave and come all the time; and what was stored since is there.
#[test]
fn what_was_there_before_never_comes_back() {
    const PAGES: u64 = 16;
    const ROUNDS: std::ops::Range<u64> = 400..40_000;
    const ENOUGH: u64 = 2000;
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let process = attach();
        let (ours, gpu) = (host(&process, 256), Gpu::new(256));
        let mapping = Mapping::anonymous(PAGES);
        let over = AtomicBool::new(false);
        let range = mapping.range();
        std::thread::scope(|scope| {
            for memory in [&ours, &gpu.pagemap] {
                let (process, over) = (&process, &over);
                scope.spawn(move || {
                    // Relaxed: when it ends is of no importance.
                    while !over.load(Ordering::Relaxed) {
                        process.migrate(range, memory).run();
                    }
                });
            }
            let spare = place(PAGES);
            let left = || {
                let statistics = [&ours, &gpu.pagemap].map(|memory| memory.statistics());
                statistics.iter().map(|statistics| statistics.in_by_request).sum::<u64>()
            };
            for round in 0..ROUNDS.end {
                if round >= ROUNDS.start && left() >= ENOUGH {
                    break;
                }
                mapping.fill(|index| 1 + round * PAGES + index);
                match round % 4 {
                    0 => advise(range, libc::MADV_DONTNEED).expect("it is mapped"),
                    1 => map(range, Backing::Anonymous, RW).expect("it can be mapped"),
                    2 => {
                        unmap(range);
                        map(range, Backing::Anonymous, RW).expect("it can be mapped");
                    }
                    _ => {
                        map(spare, Backing::Anonymous, RW).expect("it can be mapped");
                        remap(spare, range.first()).expect("it can move");
                    }
                }
                for index in 0..PAGES {
                    assert_eq!(mapping.peek(index), 0, "page {index} in round {round}");
                }
                mapping.fill(|index| 7 + round * PAGES + index);
                for index in 0..PAGES {
                    assert_eq!(mapping.peek(index), 7 + round * PAGES + index, "in round {round}");
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        let moved = ours.statistics().in_by_request + gpu.pagemap.statistics().in_by_request;
        assert!(moved >= ENOUGH, "{moved} pages left: there was something to see");
    });
}

/// The kernel lets a range be registered in another way while the event of a move there is unread. A
/// device that looks there just then must not have the pages that came along be zeroes.
#[test]
fn who_looks_where_a_mapping_is_just_moved_to_takes_no_page_away() {
    const PAGES: u64 = 8;
    const ROUNDS: u64 = 1500;
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let process = attach();
        let memory = host(&process, 64);
        let places = [place(PAGES), place(PAGES)];
        let [mut from, mut to] = places;
        map(from, Backing::Anonymous, RW).expect("it can be mapped");
        let over = AtomicBool::new(false);
        let mut moves = 0;
        std::thread::scope(|scope| {
            for page in [PAGES - 2, PAGES - 1] {
                let (process, over) = (&process, &over);
                scope.spawn(move || {
                    // Relaxed: when it ends is of no importance.
                    while !over.load(Ordering::Relaxed) {
                        for range in places {
                            process.snapshot(range);
                            // It is mapped, or not.
                            let _ = trap::load(part(range, page, 1).address());
                        }
                    }
                });
            }
            let _over = SetAtEnd(&over);
            for round in 0..ROUNDS {
                for (index, page) in (round * PAGES..).zip(from.iter()) {
                    trap::store(page.address(), 1 + index).expect("it is mapped");
                }
                // The others stay, so that there is something to be watched.
                process.migrate(part(from, PAGES / 2, PAGES / 2), &memory).run();
                if remap(from, to.first()).is_err() {
                    // Registered in part it is two mappings, and the kernel moves one.
                    map(from, Backing::Anonymous, RW).expect("it can be mapped");
                    continue;
                }
                moves += 1;
                for (index, page) in (round * PAGES..).zip(to.iter()) {
                    assert_eq!(trap::load(page.address()), Ok(1 + index), "in round {round}");
                }
                (from, to) = (to, from);
            }
        });
        assert_eq!(process.statistics().replaced, 0);
        let left = memory.statistics().in_by_request;
        assert!(moves > ROUNDS / 2 && left > ROUNDS, "{moves} moves, {left} pages left");
    });
}

/// Who sleeps for a page that somebody has in transit is woken when it has come to a device, where
/// nobody puts it into the page table.
#[test]
fn who_touches_a_page_in_transit_goes_on_when_it_is_on_a_device() {
    in_own_process(|| {
        let process = attach();
        let (ours, gpu) = (host(&process, 64), Gpu::new(64));
        let mapping = Mapping::anonymous(1);
        for memory in [&ours, &gpu.pagemap] {
            fill(&mapping);
            let migration = process.migrate(mapping.range(), memory).copy();
            let before = process.statistics().faults_in_transit;
            std::thread::scope(|scope| {
                let (word, process) = (mapping.word(0), &process);
                let touch = scope.spawn(move || trap::load(word));
                assert!(eventually(|| process.statistics().faults_in_transit > before));
                assert_eq!(migration.commit().moved, 1);
                let went_on = eventually(|| touch.is_finished());
                // Else whoever waits for the thread would wait for ever.
                process.migrate_home(mapping.range());
                assert!(went_on, "it sleeps on");
                assert_eq!(touch.join().expect("it does not panic"), Ok(first_word(0)));
            });
        }
    });
}

/// Is true from the end of a scope on, also where that is a panic.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        // Relaxed: those who look end soon, and that is all.
        self.0.store(true, Ordering::Relaxed);
    }
}
