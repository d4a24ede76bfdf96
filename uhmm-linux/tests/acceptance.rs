//! The rows of `docs/acceptance.md` that mean something on a live process, as far as no other test
//! of one shows them. Each names its rows.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::children::Scattered;
use common::leaks::holdings;
use common::listener::Listener;
use common::memory::{Backing, Mapping, RW, map, unmap};
use common::rig::{Gpu, attach, device_load};
use common::{eventually, in_own_process};
use mmu_notifier::EventKind;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use uhmm::{FaultError, Mirror, Order, RangeFault};

/// Leaves this process no more address space than it has, while `body` runs.
fn without_address_space<T>(body: impl FnOnce() -> T) -> T {
    let before = getrlimit(Resource::As);
    let none = Rlimit { current: Some(1 << 20), ..before };
    setrlimit(Resource::As, none).expect("soft limits can be lowered");
    let result = body();
    setrlimit(Resource::As, before).expect("it was so before");
    result
}

#[test]
fn a06_a_process_that_has_detached_has_no_users() {
    in_own_process(|| {
        let process = attach();
        let mm = process.mm().clone();
        assert!(mm.users().is_some());
        drop(process);
        assert!(mm.users().is_none());
    });
}

#[test]
fn a15_the_kernel_tells_of_nothing_where_nobody_listens() {
    in_own_process(|| {
        let process = attach();
        let (events, registered) = (process.statistics().events, holdings().registered);
        let range = common::memory::place(64);
        for round in 0..500 {
            map(range, Backing::Anonymous, RW).expect("it is for tests");
            common::trap::store(range.address(), round).expect("it is mapped");
            unmap(range);
        }
        assert_eq!(process.statistics().events, events);
        assert_eq!(holdings().registered, registered);
    });
}

#[test]
fn a16_a_mirror_ends_without_memory() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| index);
        let mirrors: Vec<_> = (0..8).map(|_| gpu.mirror(&process, mapping.range())).collect();
        for mirror in &mirrors {
            assert_eq!(device_load(mirror, mapping.page(3)), Ok(3));
        }
        without_address_space(|| {
            for mirror in mirrors {
                assert!(Mirror::unregister(mirror).is_some());
            }
        });
    });
}

#[test]
fn a17_a_process_detaches_without_address_space() {
    in_own_process(|| {
        for seed in 1..6 {
            let memory = Scattered::new(&attach());
            memory.fill(seed);
            memory.scatter();
            let (process, mapping) = memory.into_process();
            without_address_space(|| drop(process));
            for index in 0..Scattered::PAGES {
                assert_eq!(mapping.peek(index), Scattered::value(index, seed), "page {index}");
            }
        }
    });
}

#[test]
fn b01_b03_who_still_listens_when_the_process_detaches_is_released_once() {
    in_own_process(|| {
        for round in 0..20 {
            let process = attach();
            let mapping = Mapping::anonymous(4);
            mapping.fill(|index| index);
            let (subscription, told) = Listener::listen(&process, mapping.range());
            drop(process);
            assert!(told.of(EventKind::Release, mapping.range()), "round {round}");
            assert_eq!(told.releases(), 1, "round {round}");
            told.is_over();
            assert!(subscription.unsubscribe().is_none(), "round {round}");
        }
    });
}

/// Either the owner has its mirror back, or the end of the attachment has released it.
#[test]
fn b08_d12_a_mirror_ends_once_while_the_process_detaches() {
    in_own_process(|| {
        let (mut back, mut released) = (0, 0);
        for round in 0..100 {
            let process = attach();
            let mapping = Mapping::anonymous(1);
            mapping.poke(0, round);
            let (subscription, told) = Listener::listen(&process, mapping.range());
            let notifier = thread::scope(|scope| {
                let detach = scope.spawn(move || drop(process));
                // Earlier or later than the other.
                let began = Instant::now();
                while began.elapsed() < Duration::from_micros(round * 20) {
                    std::hint::spin_loop();
                }
                let notifier = subscription.unsubscribe();
                detach.join().expect("it does not panic");
                notifier
            });
            assert_eq!(told.releases(), u32::from(notifier.is_none()), "round {round}");
            match notifier {
                Some(_) => back += 1,
                None => released += 1,
            }
        }
        println!("{back} came back, {released} were released");
    });
}

#[test]
fn c03_c04_nothing_is_told_after_unregistering() {
    in_own_process(|| {
        let process = attach();
        let range = common::memory::place(64);
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::SeqCst) {
                    map(range, Backing::Anonymous, RW).expect("it is for tests");
                    // It may have been replaced already: by this thread alone.
                    common::trap::store(range.address(), 1).expect("it is mapped");
                }
            });
            let mut heard = 0;
            for _ in 0..500 {
                let (subscription, told) = Listener::listen(&process, range);
                thread::yield_now();
                let notifier = subscription.unsubscribe();
                // A call from here on panics in the thread that makes it, which ends the process.
                told.is_over();
                assert!(notifier.is_some());
                heard += told.events();
            }
            // Until one has been told of something.
            assert!(
                heard > 0
                    || eventually(|| {
                        let (_subscription, told) = Listener::listen(&process, range);
                        eventually(|| told.events() > 0)
                    })
            );
            ended.store(true, Ordering::SeqCst);
        });
        unmap(range);
    });
}

#[test]
fn d02_the_process_stays_attached_until_a_migration_under_way_has_ended() {
    in_own_process(|| {
        for commit in [true, false] {
            let process = attach();
            let gpu = Gpu::new(64);
            let mapping = Mapping::anonymous(4);
            mapping.fill(|index| 5 + index);
            let mm = process.mm().clone();
            let migration = process.migrate(mapping.range(), &gpu.pagemap).copy();
            drop(process);
            assert!(mm.users().is_some());
            match commit {
                true => assert_eq!(migration.commit().moved, 4),
                false => drop(migration),
            }
            assert!(mm.users().is_none());
            (0..4).for_each(|index| assert_eq!(mapping.peek(index), 5 + index));
            assert_eq!(gpu.pagemap.used(), 0);
        }
    });
}

#[test]
fn e09_a_change_elsewhere_delays_no_fault() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let (here, there) = (Mapping::anonymous(1), Mapping::anonymous(1));
        here.poke(0, 3);
        there.poke(0, 4);
        let mirrors = [&here, &there].map(|mapping| gpu.mirror(&process, mapping.range()));
        let loads = || {
            thread::scope(|scope| {
                let load = scope.spawn(|| {
                    let soon = Instant::now() + Duration::from_millis(50);
                    let request = RangeFault::read(there.range()).deadline(soon);
                    (device_load(&mirrors[0], here.page(0)), mirrors[1].range_fault(&request).err())
                });
                load.join().expect("it does not panic")
            })
        };
        let during = process.change(there.range(), EventKind::Clear, loads);
        assert!(matches!(during, (Ok(3), Some(FaultError::TimedOut { .. }))), "{during:?}");
        assert!(matches!(loads(), (Ok(3), None)));
    });
}

#[test]
fn e11_all_who_have_a_page_are_told_when_it_goes_and_nobody_else() {
    in_own_process(|| {
        let process = attach();
        let large = Order::HUGE.pages();
        let mapping = Mapping::anonymous(3 * large);
        mapping.fill(|index| index);
        let (_a, a) = Listener::listen(&process, mapping.part(0, large));
        let (_b, b) = Listener::listen(&process, mapping.part(large - 1, large));
        let (_c, c) = Listener::listen(&process, mapping.part(2 * large, large));
        let gone = mapping.part(large - 2, 4);
        unmap(gone);
        for told in [&a, &b] {
            assert!(eventually(|| told.of(EventKind::Unmap, gone)));
        }
        assert_eq!((a.events(), b.events(), c.events()), (1, 1, 0));
        map(gone, Backing::Anonymous, RW).expect("nothing is there");
    });
}

/// A wait for what somebody has in transit ends at its deadline; who has it is told at once.
#[test]
fn x11_a_wait_for_a_page_in_transit_ends() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(2);
        mapping.fill(|index| 7 + index);
        let mirror = gpu.mirror(&process, mapping.range());
        let migration = process.migrate(mapping.part(0, 1), &gpu.pagemap).copy();
        let fault = || {
            let soon = Instant::now() + Duration::from_millis(50);
            mirror.range_fault(&RangeFault::read(mapping.range()).deadline(soon)).err()
        };
        assert!(matches!(fault(), Some(FaultError::SelfWait { .. })), "{:?}", fault());
        let other = thread::scope(|scope| scope.spawn(fault).join().expect("it does not panic"));
        assert!(matches!(other, Some(FaultError::TimedOut { .. })), "{other:?}");
        assert_eq!(migration.commit().moved, 1);
        assert_eq!(fault(), None);
        (0..2).for_each(|index| assert_eq!(mapping.peek(index), 7 + index));
    });
}
