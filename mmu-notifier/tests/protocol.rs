//! Subscribing, read sections and invalidations, by interleavings made by hand: groups A and E of
//! `docs/acceptance.md`.

#![cfg(not(any(loom, shuttle)))]

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use common::{
    Change, Log, Recorder, at_once, change, is_idle, page, pages, soon, stop, task, translate,
    translation, unmap, watched,
};
use mmu_notifier::{
    Event, EventKind, Notifier, ReadBeginError, Retry, SelfWait, SubscribeError, SubscribeOptions,
    Subscriptions, TimedOut, VaRange, VaRangeError, WouldBlock,
};

/// A change begins, somebody subscribes, the change ends: once where nobody was subscribed before,
/// once where somebody was, and once while the announcement is still inside another's callback. The
/// newcomer hears neither the start nor the end, does not wait, and hears both of the next change.
#[test]
fn a01_a_start_end_pair_never_straddles_a_subscription() {
    watched(|| {
        for somebody_before in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let neighbour = somebody_before
                .then(|| space.subscribe_all(Recorder::new("neighbour", &Log::new())).unwrap());
            let running = Change::begin(&space, unmap(page(1)));
            let newcomer = space
                .subscribe_paired(page(1), Recorder::new("new", &log), SubscribeOptions::new())
                .unwrap();
            running.end();
            assert_eq!(log.take(), [""; 0], "somebody before: {somebody_before}");
            change(&space, unmap(page(1))).finish();
            assert_eq!(log.take(), ["new start Unmap", "new end Unmap"]);
            drop((newcomer, neighbour));
        }

        let (space, log) = (Subscriptions::new(), Log::new());
        let (inside, stopped) = stop();
        let neighbour = Recorder::new("neighbour", &Log::new()).stopped_at_start(inside);
        let neighbour = space.subscribe(page(1), neighbour).unwrap();
        let announcement = change(&space, unmap(page(1)));
        stopped.wait();
        let newcomer = space
            .subscribe_paired(page(1), Recorder::new("new", &log), SubscribeOptions::new())
            .unwrap();
        stopped.go();
        announcement.finish();
        assert_eq!(log.take(), [""; 0]);
        drop((newcomer, neighbour));
    });
}

/// Two threads announce without pause while subscriptions come and go, each the first of its space
/// or not. Every call finds the notifier as it was built.
#[test]
fn a02_e18_a_subscriber_is_whole_when_it_is_first_called() {
    struct Whole {
        number: Box<u64>,
        negated: Box<u64>,
        broken: Arc<AtomicU64>,
        calls: Arc<AtomicU64>,
    }
    impl Notifier for Whole {
        type Fence = ();
        fn invalidate(&mut self, _: &Event) {
            self.calls.fetch_add(1, Ordering::Relaxed);
            if *self.number != !*self.negated {
                self.broken.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    watched(|| {
        let (broken, calls) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        for round in 0..4 {
            let space = Subscriptions::new();
            let over = Arc::new(AtomicBool::new(false));
            let announcers: Vec<_> = (0..2)
                .map(|_| {
                    let (space, over) = (Arc::clone(&space), Arc::clone(&over));
                    task(move || {
                        while !over.load(Ordering::Relaxed) {
                            drop(space.invalidate_range_start(unmap(page(1))));
                            thread::yield_now();
                        }
                    })
                })
                .collect();
            for number in 0..10 {
                let (broken, calls) = (Arc::clone(&broken), Arc::clone(&calls));
                let number = round * 1000 + number;
                let whole =
                    Whole { number: Box::new(number), negated: Box::new(!number), broken, calls };
                let subscription = space.subscribe(pages(0, 4), whole).unwrap();
                drop(subscription.read_begin_deadline(soon()).unwrap());
                drop(subscription);
            }
            over.store(true, Ordering::Relaxed);
            announcers.into_iter().for_each(|announcer| announcer.finish());
        }
        assert!(calls.load(Ordering::Relaxed) >= 40, "each hears at least of its own end");
        assert_eq!(broken.load(Ordering::Relaxed), 0);
    });
}

/// A thread is stopped inside each kind of callback. Meanwhile everything that takes the registry
/// lock for writing goes through: subscribing, a new range, unsubscribing; and so do announcements.
#[test]
fn a03_no_callback_runs_under_the_registry_lock() {
    watched(|| {
        for which in ["start", "try", "fence", "end"] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let (inside, stopped) = stop();
            let device = Recorder::new("device", &log);
            let device = match which {
                "start" | "try" => device.on_start(move |_| inside.here()),
                "fence" => device.on_fence(move |_| inside.here()),
                _ => device.on_end(move |_| inside.here()),
            };
            let device = space.subscribe_paired(page(1), device, SubscribeOptions::new()).unwrap();
            let announcement = {
                let space = Arc::clone(&space);
                task(move || match which {
                    "try" => space.try_invalidate_range_start(unmap(page(1))).is_ok(),
                    _ => {
                        drop(space.invalidate_range_start(unmap(page(1))));
                        true
                    }
                })
            };
            stopped.wait();
            let others = {
                let space = Arc::clone(&space);
                task(move || {
                    let other = Recorder::new("other", &Log::new());
                    let mut other = space.subscribe(page(2), other).unwrap();
                    other.set_range(page(3)).unwrap();
                    drop(space.invalidate_range_start(unmap(pages(2, 2))));
                    assert!(space.find::<Recorder>(0x3000).is_some());
                    drop(other);
                })
            };
            others.finish();
            announcement.is_waiting();
            stopped.go();
            assert!(announcement.finish());
            drop(device);
            assert!(log.take().iter().all(|call| !call.contains("LOCK")));
        }
    });
}

/// Subscribe, unsubscribe, and then the address space dies: the notifier came back by value and no
/// call reaches it any more.
#[test]
fn a05_a07_an_unsubscribed_notifier_hears_of_no_death() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let device = space.subscribe(page(1), Recorder::new("device", &log)).unwrap();
        let device = device.unsubscribe().expect("the space lives");
        assert_eq!(log.take(), ["device start Release"]);
        space.release();
        drop(device);
        assert_eq!(log.take(), [""; 0]);
    });
}

/// Somebody subscribes while release is stopped inside a callback of its first pass, again inside
/// one of its second, and again when it has returned. Each time the notifier comes back at once,
/// without a call on it.
#[test]
fn a06_a_dying_space_takes_no_subscriber() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let refused = {
            let (space, log) = (Arc::clone(&space), log.clone());
            move || {
                let (space, late) = (Arc::clone(&space), Recorder::new("late", &log));
                let refused = task(move || space.subscribe(page(9), late).err()).finish();
                let refused = refused.expect("the space is dying");
                assert_eq!(refused.reason, SubscribeError::Released);
                drop(refused.notifier);
            }
        };
        let (first_pass, in_first) = stop();
        let (second_pass, in_second) = stop();
        let device = Recorder::new("device", &Log::new())
            .stopped_at_start(first_pass)
            .on_release(move || second_pass.here());
        let device = space.subscribe(page(1), device).unwrap();
        let release = {
            let space = Arc::clone(&space);
            task(move || space.release())
        };
        in_first.wait();
        refused();
        in_first.go();
        in_second.wait();
        refused();
        in_second.go();
        release.finish();
        refused();
        assert!(device.unsubscribe().is_none());
        assert_eq!(log.take(), [""; 0]);
    });
}

/// The address space dies first and the driver unsubscribes afterwards, from another thread:
/// nothing is waited for, and there is nothing to hand back.
#[test]
fn a08_unsubscribing_after_the_death_is_safe() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let one = space.subscribe(page(1), Recorder::new("one", &log)).unwrap();
        let two = space.subscribe(page(2), Recorder::new("two", &log)).unwrap();
        space.release();
        let late = task(move || one.unsubscribe_deadline(at_once()).unwrap().is_none());
        assert!(late.finish());
        task(move || drop(two)).finish();
        let calls = ["one start Release", "two start Release", "one release", "two release"];
        assert_eq!(log.take(), calls);
    });
}

/// One thread is stuck inside a callback, one has a change under way, one reads and waits, and ten
/// thousand ranges are subscribed. Whoever subscribes waits for none of them, so there is no wait
/// that would have to be interrupted.
#[test]
fn a09_subscribing_waits_for_nobody() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let regions: Vec<_> = (100..10_100)
            .map(|n| space.subscribe(page(n), Recorder::new("region", &log)).unwrap())
            .collect();
        let (inside, stopped) = stop();
        let stuck = Recorder::new("stuck", &log).stopped_at_start(inside);
        let stuck = space.subscribe(page(1), stuck).unwrap();
        let callback = change(&space, unmap(page(1)));
        stopped.wait();
        let reader = space.subscribe(page(2), Recorder::new("reader", &log)).unwrap();
        let running = Change::begin(&space, unmap(page(2)));
        let handle = (*reader).clone();
        let reading = task(move || handle.read_begin_deadline(soon()).map(drop));
        reading.is_waiting();
        let newcomer = {
            let (space, log) = (Arc::clone(&space), log.clone());
            task(move || space.subscribe(pages(1, 2), Recorder::new("new", &log)).is_ok())
        };
        assert!(newcomer.finish());
        running.end();
        assert_eq!(reading.finish(), Ok(()));
        stopped.go();
        callback.finish();
        drop((stuck, reader, regions));
    });
}

/// A thousand subscribers of one and the same range, under an announcement that reaches them all:
/// one more subscribes, and every one hears exactly once. There is no lock for each to be taken.
#[test]
fn a11_a_thousand_on_one_range_are_one_lock() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let all: Vec<_> = (0..1000)
            .map(|_| space.subscribe(page(1), Recorder::new("one", &log)).unwrap())
            .collect();
        let running = Change::begin(&space, unmap(page(1)));
        assert_eq!(log.take().len(), 1000);
        let more = space.subscribe(page(1), Recorder::new("more", &log)).unwrap();
        running.end();
        change(&space, unmap(page(1))).finish();
        assert_eq!(log.take().len(), 1001);
        drop((all, more));
    });
}

/// Two threads subscribe to two address spaces, each in the other's order, and end one of the two
/// subscriptions inside the other's time, over and over: neither holds what the other waits for.
#[test]
fn a12_two_spaces_in_opposite_orders() {
    watched(|| {
        let spaces = [Subscriptions::new(), Subscriptions::new()];
        let threads: Vec<_> = (0..2)
            .map(|order| {
                let spaces = spaces.clone();
                task(move || {
                    let (first, second) = (&spaces[order], &spaces[1 - order]);
                    for _ in 0..100 {
                        let change = first.invalidate_range_start(unmap(page(1)));
                        let one = first.subscribe(page(1), Recorder::new("one", &Log::new()));
                        let two = second.subscribe(page(1), Recorder::new("two", &Log::new()));
                        drop((one.unwrap(), change, two.unwrap()));
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.finish());
        assert_eq!(spaces.map(|space| space.live()), [0, 0]);
    });
}

/// Who is subscribed where, and where nobody is: as soon as subscribing has returned, and not any
/// more when unsubscribing has.
#[test]
fn it_is_known_who_would_hear_of_a_change() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        assert_eq!(space.subscribed(VaRange::ALL), []);
        // More than there is room for at first.
        let many: Vec<_> = (0..100)
            .rev()
            .map(|at| space.subscribe(pages(2 * at, 1), Recorder::new("many", &log)).unwrap())
            .collect();
        let wide = space.subscribe(pages(10, 4), Recorder::new("wide", &log)).unwrap();
        assert_eq!(space.subscribed(VaRange::ALL).len(), 101);
        assert_eq!(space.subscribed(pages(10, 3)), [pages(10, 1), pages(10, 4), pages(12, 1)]);
        assert_eq!(space.subscribed(page(11)), [pages(10, 4)]);
        assert!(wide.unsubscribe().is_some());
        assert_eq!(space.subscribed(page(11)), []);
        drop(many);
        assert_eq!(space.subscribed(VaRange::ALL), []);
    });
}

/// An address space with room for two refuses the third, hands it back untouched, and takes it when
/// one of the two has gone.
#[test]
fn a13_a_limit_refuses_one_too_many() {
    watched(|| {
        let (space, log) = (Subscriptions::with_limit(2), Log::new());
        let one = space.subscribe(page(1), Recorder::new("one", &log)).unwrap();
        let two = space.subscribe(page(1), Recorder::new("two", &log)).unwrap();
        let refused = space.subscribe(page(1), Recorder::new("three", &log)).unwrap_err();
        assert_eq!(refused.reason, SubscribeError::Limit);
        assert_eq!(space.live(), 2);
        change(&space, unmap(page(1))).finish();
        assert_eq!(log.take(), ["one start Unmap", "two start Unmap"]);
        drop(one);
        let three = space.subscribe(page(1), refused.notifier).unwrap();
        drop((two, three));
    });
}

/// With a deadline that has passed already, everything that has nothing to wait for succeeds, and
/// what has to wait gives up with nothing changed: interruption is looked at where waiting is.
#[test]
fn a14_a_deadline_counts_only_where_one_waits() {
    watched(|| {
        let space = Subscriptions::new();
        let running = Change::begin(&space, unmap(page(1)));
        let device = space.subscribe(page(1), Recorder::new("device", &Log::new())).unwrap();
        let timed_out = Err(ReadBeginError::TimedOut(TimedOut));
        assert_eq!(device.read_begin_deadline(at_once()).map(drop), timed_out);
        running.end();
        assert_eq!(device.read_begin_deadline(at_once()).map(drop), Ok(()));
        let running = Change::begin(&space, unmap(page(1)));
        assert_eq!(device.read_begin_deadline(at_once()).map(drop), timed_out);
        // These never wait for it.
        drop(space.subscribe(page(1), Recorder::new("other", &Log::new())).unwrap());
        drop(space.try_invalidate_range_start(unmap(page(2))).unwrap());
        assert!(space.find::<Recorder>(0x1000).is_some());
        running.end();

        let operation = device.begin_operation().unwrap();
        let unfinished = device.unsubscribe_deadline(at_once()).unwrap_err();
        drop(operation);
        assert!(unfinished.subscription.unsubscribe_deadline(at_once()).unwrap().is_some());
        assert_eq!(space.release_deadline(at_once()), Ok(()));
    });
}

/// Nobody is subscribed, or nobody any more: an announcement is counted and not recorded. When
/// somebody is, it is recorded.
#[test]
fn a15_an_announcement_to_nobody_is_only_counted() {
    watched(|| {
        let space = Subscriptions::new();
        let dump = || format!("{space:?}");
        let only_counted = "changes_under_way: [], changes_unrecorded: 1";
        let running = Change::begin(&space, unmap(page(1)));
        assert!(dump().contains(only_counted), "{}", dump());
        running.end();
        let device = space.subscribe(page(7), Recorder::new("device", &Log::new())).unwrap();
        let running = Change::begin(&space, unmap(page(1)));
        assert!(dump().contains("changes_unrecorded: 0"), "{}", dump());
        assert!(!is_idle(&space));
        running.end();
        drop(device);
        let running = Change::begin(&space, unmap(page(1)));
        assert!(dump().contains(only_counted), "{}", dump());
        running.end();
        assert!(is_idle(&space));
    });
}

/// A thread panics under the notifier's lock, and another unsubscribes while it unwinds from a
/// panic of its own. Both ends come about: the device is told, and the notifier is handed back.
#[test]
fn a16_unsubscribing_cannot_fail() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let device = space.subscribe(page(1), Recorder::new("device", &log)).unwrap();
        let handle = (*device).clone();
        let panicked = task(move || {
            catch_unwind(AssertUnwindSafe(|| {
                let _update = handle.read_begin().unwrap().commit().unwrap();
                resume_unwind(Box::new("under the lock"))
            }))
            .is_err()
        });
        assert!(panicked.finish());
        assert!(device.unsubscribe().is_some());
        assert_eq!(log.take(), ["device start Release"]);

        let device = space.subscribe(page(1), Recorder::new("device", &log)).unwrap();
        let panicked = task(move || {
            catch_unwind(AssertUnwindSafe(move || {
                let _device = device;
                resume_unwind(Box::new("while subscribed"))
            }))
            .is_err()
        });
        assert!(panicked.finish());
        assert_eq!(log.take(), ["device start Release"]);
        assert_eq!(space.live(), 0);
    });
}

/// Every order of one read section and one change, overlapping or not: the commit fails if and only
/// if a change that overlaps came to the device between begin and commit, and the advice agrees.
#[test]
fn e01_a_commit_fails_exactly_if_a_change_came_between() {
    watched(|| {
        let space = Subscriptions::new();
        let device = space.subscribe(pages(2, 2), Recorder::new("device", &Log::new())).unwrap();
        let one_byte = |address| VaRange::new(address, 1).unwrap();
        let cases = [
            (pages(2, 2), true),
            (page(2), true),
            (page(3), true),
            (VaRange::ALL, true),
            (pages(0, 16), true),
            (one_byte(0x2000), true),
            (one_byte(0x3fff), true),
            (one_byte(0x1fff), false),
            (one_byte(0x4000), false),
            (page(1), false),
            (page(4), false),
        ];
        for (range, overlaps) in cases {
            // Before: over when the section begins.
            change(&space, unmap(range)).finish();
            let section = device.read_begin_deadline(at_once()).unwrap();
            assert!(!section.check_retry() && section.commit().is_ok(), "{range} before");
            // Between, and over.
            let section = device.read_begin_deadline(at_once()).unwrap();
            change(&space, unmap(range)).finish();
            assert_eq!(section.check_retry(), overlaps, "{range} between");
            assert_eq!(section.commit().is_err(), overlaps, "{range} between");
            // Between, and still under way.
            let section = device.read_begin_deadline(at_once()).unwrap();
            let running = Change::begin(&space, unmap(range));
            assert_eq!(section.check_retry(), overlaps, "{range} under way");
            assert_eq!(section.commit().is_err(), overlaps, "{range} under way");
            running.end();
            // After the commit: it is undone.
            assert!(translate(&device, 0x2000, 1) && translate(&device, 0x3fff, 2));
            change(&space, unmap(range)).finish();
            let left = |address| translation(&device, address).is_some();
            assert_eq!(left(0x2000), !range.contains(0x2000), "{range} after");
            assert_eq!(left(0x3fff), !range.contains(0x3fff), "{range} after");
        }
    });
}

/// The commit waits for an invalidation that is inside the notifier, and then fails. An
/// invalidation waits for an update that is under the lock, and then undoes what it wrote.
#[test]
fn e02_commit_and_invalidation_take_the_same_lock() {
    watched(|| {
        let space = Subscriptions::new();
        let (inside, stopped) = stop();
        let device = Recorder::new("device", &Log::new()).stopped_at_start(inside);
        let device = space.subscribe(page(1), device).unwrap();
        let handle = (*device).clone();
        let (between, reading) = stop();
        let commit = task(move || {
            let section = handle.read_begin_deadline(soon()).unwrap();
            between.here();
            section.commit().err()
        });
        reading.wait();
        let announcement = change(&space, unmap(page(1)));
        stopped.wait();
        reading.go();
        commit.is_waiting();
        stopped.go();
        assert_eq!(commit.finish(), Some(Retry));
        announcement.finish();

        let mut update = device.read_begin().unwrap().commit().unwrap();
        let announcement = change(&space, unmap(page(1)));
        announcement.is_waiting();
        update.table.insert(0x1000, 7);
        drop(update);
        announcement.finish();
        assert_eq!(translation(&device, 0x1000), None);
    });
}

/// One change elsewhere is under way and another is stuck inside a neighbour's callback. A reader
/// whose range they do not touch begins and commits with a deadline that has passed already.
#[test]
fn e09_a_change_elsewhere_delays_no_reader() {
    watched(|| {
        let space = Subscriptions::new();
        let (inside, stopped) = stop();
        let neighbour = Recorder::new("neighbour", &Log::new()).stopped_at_start(inside);
        let neighbour = space.subscribe(page(2), neighbour).unwrap();
        let device = space.subscribe(page(1), Recorder::new("device", &Log::new())).unwrap();
        let running = Change::begin(&space, unmap(page(3)));
        let stuck = change(&space, unmap(page(2)));
        stopped.wait();
        assert!(device.read_begin_deadline(at_once()).unwrap().commit().is_ok());
        stopped.go();
        stuck.finish();
        running.end();
        drop(neighbour);
    });
}

/// A reader sleeps while its range changes; at the end of the change the next one begins at once
/// and stays. The reader comes back all the same, at the latest to a commit that fails, and the
/// thread's own deadline decides about another try.
#[test]
fn e10_a_reader_sleeps_once_whatever_follows() {
    watched(|| {
        for _ in 0..10 {
            let space = Subscriptions::new();
            let device = space.subscribe(page(1), Recorder::new("device", &Log::new())).unwrap();
            let first = space.invalidate_range_start(unmap(page(1)));
            let handle = (*device).clone();
            let (begun, wait) = std::sync::mpsc::channel();
            let (go, goes) = std::sync::mpsc::channel::<()>();
            let reader = task(move || {
                let section = handle.read_begin().unwrap();
                begun.send(()).unwrap();
                let _ = goes.recv_timeout(soon() - at_once());
                section.commit().is_err()
            });
            while !format!("{device:?}").contains("readers wait") {
                thread::yield_now();
            }
            drop(first);
            let second = space.invalidate_range_start(unmap(page(1)));
            wait.recv_timeout(soon() - at_once()).expect("the reader waits for the second change");
            go.send(()).unwrap();
            assert!(reader.finish(), "the second change came before the commit");
            drop(second);
        }
    });
}

/// A reader waits for a change until its deadline and gives up. When the change is over, the next
/// reader begins at once and commits: the one that gave up left nothing behind.
#[test]
fn e10_a_reader_that_gave_up_leaves_nothing_behind() {
    watched(|| {
        let space = Subscriptions::new();
        let device = space.subscribe(page(1), Recorder::new("device", &Log::new())).unwrap();
        let running = Change::begin(&space, unmap(page(1)));
        let gave_up = device.read_begin_deadline(at_once()).map(drop);
        assert_eq!(gave_up, Err(ReadBeginError::TimedOut(TimedOut)));
        running.end();
        assert!(device.read_begin_deadline(at_once()).unwrap().commit().is_ok());
    });
}

/// Ten readers sleep while their range changes. One end wakes them all, and each commits in the
/// end.
#[test]
fn e10_one_end_wakes_every_reader() {
    watched(|| {
        let space = Subscriptions::new();
        let device = space.subscribe(page(1), Recorder::new("device", &Log::new())).unwrap();
        let running = Change::begin(&space, unmap(page(1)));
        let readers: Vec<_> = (0..10)
            .map(|n| {
                let handle = (*device).clone();
                task(move || while !translate(&handle, 0x1000 + n, n) {})
            })
            .collect();
        readers[0].is_waiting();
        running.end();
        readers.into_iter().for_each(|reader| reader.finish());
        assert_eq!(device.inspect(|recorder| recorder.table.len()), Ok(10));
    });
}

/// Every range between five points of the address space, its two ends included, is subscribed, and
/// every such range changes: who overlaps hears exactly once, who does not hears nothing.
#[test]
fn e11_every_overlapping_subscriber_hears_once() {
    watched(|| {
        struct Counting(u32);
        impl Notifier for Counting {
            type Fence = ();
            fn invalidate(&mut self, _: &Event) {
                self.0 += 1;
            }
        }
        let points = [0, 1, 0xfff, 0x1000, u64::MAX - 1, u64::MAX];
        let ranges = || {
            points.into_iter().flat_map(|start| {
                points.into_iter().filter_map(move |last| VaRange::from_bounds(start, last))
            })
        };
        let space = Subscriptions::new();
        let all: Vec<_> =
            ranges().map(|range| space.subscribe(range, Counting(0)).unwrap()).collect();
        assert_eq!(all.len(), 21);
        let mut expected = vec![0; all.len()];
        for event in ranges() {
            drop(space.invalidate_range_start(unmap(event)));
            for (subscription, expected) in all.iter().zip(&mut expected) {
                let range = subscription.range();
                *expected +=
                    u32::from(range.start() <= event.last() && event.start() <= range.last());
                assert_eq!(subscription.inspect(|n| n.0), Ok(*expected), "{event} on {range}");
            }
        }
    });
}

/// Three intervals, the middle one refuses whatever it may. A blockable announcement gives it no
/// way to: all three are invalidated and the change goes on.
#[test]
fn e12_a_blockable_announcement_is_not_refused() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let one = space.subscribe(page(1), Recorder::new("one", &log)).unwrap();
        let two = space.subscribe(page(2), Recorder::new("two", &log).refusing()).unwrap();
        let three = space.subscribe(page(3), Recorder::new("three", &log)).unwrap();
        let change = space.invalidate_range_start(unmap(pages(1, 3)));
        assert!(change.event().is_blockable());
        drop(change);
        assert_eq!(log.take(), ["one start Unmap", "two start Unmap", "three start Unmap"]);
        drop((one, two, three));
    });
}

/// Three intervals, the middle one refuses a non-blockable announcement, by itself or because its
/// lock is held. The third is not told, nothing is under way afterwards, every reader begins at
/// once, and the section of a device that was not told still commits.
#[test]
fn e13_a_refused_announcement_leaves_nothing_behind() {
    watched(|| {
        for by_itself in [true, false] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let one = space.subscribe(page(1), Recorder::new("one", &log)).unwrap();
            let two = Recorder::new("two", &log);
            let two = if by_itself { two.refusing() } else { two };
            let two = space.subscribe(page(2), two).unwrap();
            let three = space.subscribe(page(3), Recorder::new("three", &log)).unwrap();
            let before = [two.read_begin().unwrap(), three.read_begin().unwrap()];
            let update = (!by_itself).then(|| two.read_begin().unwrap().commit().unwrap());
            let refused = space.try_invalidate_range_start(unmap(pages(1, 3)));
            assert_eq!(refused.map(drop), Err(WouldBlock));
            drop(update);
            let calls = ["one try Unmap", "two try Unmap"];
            assert_eq!(log.take(), calls[..1 + usize::from(by_itself)]);
            assert!(is_idle(&space));
            for section in before {
                assert!(section.commit().is_ok());
            }
            for device in [&one, &two, &three] {
                assert!(device.read_begin_deadline(at_once()).unwrap().commit().is_ok());
            }
            drop((one, two, three));
        }
    });
}

/// Somebody subscribes while a change is under way that began before: unrecorded where nobody was
/// subscribed, else recorded. No read section begins until that change is over, an event that comes
/// meanwhile is delivered, and what is read afterwards is the state after both.
#[test]
fn e14_e23_a_subscriber_amid_a_change_trusts_nothing_and_misses_nothing() {
    watched(|| {
        for somebody_before in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let neighbour = somebody_before
                .then(|| space.subscribe(page(9), Recorder::new("n", &Log::new())).unwrap());
            let memory = Arc::new(AtomicU64::new(1));
            let first = Change::begin(&space, unmap(pages(0, 4)));
            let device = space.subscribe(page(1), Recorder::new("device", &log)).unwrap();
            let reader = {
                let (handle, memory) = ((*device).clone(), Arc::clone(&memory));
                task(move || {
                    loop {
                        let section = handle.read_begin_deadline(soon()).unwrap();
                        let frame = memory.load(Ordering::Relaxed);
                        if let Ok(mut update) = section.commit() {
                            update.table.insert(0x1000, frame);
                            return frame;
                        }
                    }
                })
            };
            reader.is_waiting();
            let second = Change::begin(&space, unmap(page(1)));
            assert_eq!(log.take(), ["device start Unmap"]);
            memory.store(2, Ordering::Relaxed);
            first.end();
            reader.is_waiting();
            memory.store(3, Ordering::Relaxed);
            second.end();
            assert_eq!(reader.finish(), 3, "somebody before: {somebody_before}");
            assert_eq!(translation(&device, 0x1000), Some(3));
            drop((device, neighbour));
        }
    });
}

/// A subscription moves to a range that is changing, while a section is under way: the section
/// fails, no other begins until that change is over, and the end of the change leaves nothing
/// behind at the old range or the new.
#[test]
fn e14_a_subscription_that_moves_into_a_change() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let mut device = space.subscribe(page(1), Recorder::new("device", &log)).unwrap();
        assert!(translate(&device, 0x1000, 1));
        let running = Change::begin(&space, unmap(page(2)));
        let handle = (*device).clone();
        let section = handle.read_begin().unwrap();
        device.set_range(pages(1, 2)).unwrap();
        assert_eq!(translation(&device, 0x1000), Some(1), "it gave nothing up");
        assert_eq!(section.commit().err(), Some(Retry));
        let waits = handle.read_begin_deadline(at_once()).map(drop);
        assert_eq!(waits, Err(ReadBeginError::TimedOut(TimedOut)));
        device.set_range(page(3)).unwrap();
        assert_eq!(log.take(), ["device start Release"]);
        assert!(handle.read_begin_deadline(at_once()).unwrap().commit().is_ok());
        device.set_range(page(2)).unwrap();
        running.end();
        assert!(handle.read_begin_deadline(at_once()).unwrap().commit().is_ok());
    });
}

/// A thread is stopped inside the end of a change. Unsubscribing waits for it, and a reader waits
/// too: the end is told before readers are woken.
#[test]
fn e15_unsubscribing_waits_for_a_running_end() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (inside, stopped) = stop();
        let device = Recorder::new("device", &log).on_end(move |_| inside.here());
        let device = space.subscribe_paired(page(1), device, SubscribeOptions::new()).unwrap();
        let reader = space.subscribe(page(1), Recorder::new("reader", &Log::new())).unwrap();
        let ending = Change::begin(&space, unmap(page(1))).begin_to_end();
        stopped.wait();
        let unsubscribe = task(move || device.unsubscribe().is_some());
        let handle = (*reader).clone();
        let reading = task(move || handle.read_begin_deadline(soon()).map(drop));
        unsubscribe.is_waiting();
        reading.is_waiting();
        stopped.go();
        assert!(unsubscribe.finish());
        assert_eq!(reading.finish(), Ok(()));
        ending.finish();
        let calls = ["device start Unmap", "device end Unmap", "device start Release"];
        assert_eq!(log.take(), calls);
    });
}

/// Within one change somebody subscribes and unsubscribes again, twice, and a third stays. None
/// hears of the change, none waits for it, and its end leaves nothing behind.
#[test]
fn e16_subscribing_and_unsubscribing_within_one_change() {
    watched(|| {
        for somebody_before in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let neighbour = somebody_before
                .then(|| space.subscribe(page(1), Recorder::new("n", &Log::new())).unwrap());
            let running = Change::begin(&space, unmap(page(1)));
            for _ in 0..2 {
                let device = space.subscribe(page(1), Recorder::new("device", &log)).unwrap();
                assert!(device.unsubscribe_deadline(at_once()).unwrap().is_some());
                assert_eq!(log.take(), ["device start Release"]);
            }
            let stays = space.subscribe(page(1), Recorder::new("stays", &log)).unwrap();
            running.end();
            assert_eq!(log.take(), [""; 0]);
            assert!(is_idle(&space));
            assert!(stays.read_begin_deadline(at_once()).unwrap().commit().is_ok());
            drop((stays, neighbour));
        }
    });
}

/// One thread unsubscribes and waits for an operation, one reads and waits, and one is stuck inside
/// a callback elsewhere. Announcements over all their ranges but the last return.
#[test]
fn e17_an_announcement_waits_for_no_change_of_the_registry() {
    watched(|| {
        let space = Subscriptions::new();
        let leaving = space.subscribe(page(1), Recorder::new("leaving", &Log::new())).unwrap();
        let operation = leaving.begin_operation().unwrap();
        let reader = space.subscribe(page(2), Recorder::new("reader", &Log::new())).unwrap();
        let (inside, stopped) = stop();
        let stuck = Recorder::new("stuck", &Log::new()).stopped_at_start(inside);
        let stuck = space.subscribe(page(3), stuck).unwrap();
        let running = Change::begin(&space, unmap(page(2)));
        let handle = (*reader).clone();
        let reading = task(move || handle.read_begin_deadline(soon()).map(drop));
        let unsubscribe = task(move || leaving.unsubscribe().is_some());
        let callback = change(&space, unmap(page(3)));
        stopped.wait();
        unsubscribe.is_waiting();
        reading.is_waiting();
        change(&space, unmap(pages(0, 3))).finish();
        let announcer = Arc::clone(&space);
        let told = task(move || announcer.try_invalidate_range_start(unmap(pages(0, 3))).is_ok());
        assert!(told.finish());
        drop(operation);
        assert!(unsubscribe.finish());
        running.end();
        assert_eq!(reading.finish(), Ok(()));
        stopped.go();
        callback.finish();
        drop(stuck);
    });
}

/// A thread subscribes within a change that it announced itself: there is one way to subscribe,
/// whatever the caller holds. To read there would be to wait for oneself, and is reported as that.
#[test]
fn e19_e22_subscribing_under_ones_own_announcement() {
    watched(|| {
        for somebody_before in [false, true] {
            let space = Subscriptions::new();
            let neighbour = somebody_before
                .then(|| space.subscribe(page(9), Recorder::new("n", &Log::new())).unwrap());
            let mine = space.invalidate_range_start(unmap(page(1)));
            let device = space.subscribe(page(1), Recorder::new("device", &Log::new())).unwrap();
            let waits = device.read_begin_deadline(soon()).map(drop);
            assert_eq!(waits, Err(ReadBeginError::SelfWait(SelfWait)));
            drop(mine);
            assert!(device.read_begin_deadline(at_once()).unwrap().commit().is_ok());
            drop((device, neighbour));
        }
    });
}

/// An address space that only ever had announcements is referred to by nobody; each subscription
/// takes one reference and gives it back, whether it ends by itself or by the death of the space.
#[test]
fn e20_each_subscription_takes_and_drops_one_reference() {
    watched(|| {
        let space = Subscriptions::new();
        change(&space, unmap(page(1))).finish();
        // The other thread gives its reference up on its own time.
        while Arc::strong_count(&space) > 1 {
            thread::yield_now();
        }
        let one = space.subscribe(page(1), Recorder::new("one", &Log::new())).unwrap();
        let two = space.subscribe(page(2), Recorder::new("two", &Log::new())).unwrap();
        assert_eq!((Arc::strong_count(&space), space.live()), (3, 2));
        drop(one.unsubscribe());
        assert_eq!((Arc::strong_count(&space), space.live()), (2, 1));
        space.release();
        drop(two);
        assert_eq!((Arc::strong_count(&space), space.live()), (1, 0));
    });
}

/// Every way in which subscribing fails without an allocator's help: an empty range, one that
/// wraps, a full space, a dead one. Nothing was changed and the notifier comes back.
#[test]
fn e21_a_refused_subscription_leaves_no_trace() {
    watched(|| {
        assert_eq!(VaRange::new(0x1000, 0), Err(VaRangeError::Empty { start: 0x1000 }));
        let wraps = VaRangeError::Wraps { start: u64::MAX, bytes: 2 };
        assert_eq!(VaRange::new(u64::MAX, 2), Err(wraps));
        let (space, log) = (Subscriptions::with_limit(0), Log::new());
        let refused = space.subscribe(page(1), Recorder::new("device", &log)).unwrap_err();
        assert_eq!(refused.reason, SubscribeError::Limit);
        assert_eq!((Arc::strong_count(&space), space.live()), (1, 0));
        let running = Change::begin(&space, unmap(page(1)));
        assert!(format!("{space:?}").contains("changes_unrecorded: 1"), "it is as if unused");
        running.end();
        space.release();
        let refused = space.subscribe(page(1), refused.notifier).unwrap_err();
        assert_eq!(refused.reason, SubscribeError::Released);
        while Arc::strong_count(&space) > 1 {
            thread::yield_now();
        }
        assert_eq!(space.live(), 0);
        assert_eq!(log.take(), [""; 0]);
    });
}

/// Four threads announce over pages of their own and each other's without pause, while a reader
/// translates and a device forgets: at no time does it hold a translation that was true only before
/// the last change.
#[test]
fn e01_e02_what_is_committed_is_true_until_the_next_announcement() {
    struct Mirror {
        table: BTreeMap<u64, u64>,
    }
    impl Notifier for Mirror {
        type Fence = ();
        fn invalidate(&mut self, event: &Event) {
            self.table.retain(|&page, _| !event.range().contains(page * 0x1000));
        }
    }
    const PAGES: u64 = 4;
    watched(|| {
        let space = Subscriptions::new();
        let mirror = space.subscribe(pages(0, PAGES), Mirror { table: BTreeMap::new() }).unwrap();
        let memory: Arc<[AtomicU64; PAGES as usize]> = Arc::default();
        let line = Arc::new(Barrier::new(PAGES as usize + 1));
        let writers: Vec<_> = (0..PAGES)
            .map(|mine| {
                let (space, memory) = (Arc::clone(&space), Arc::clone(&memory));
                let (handle, line) = ((*mirror).clone(), Arc::clone(&line));
                task(move || {
                    line.wait();
                    for round in 1..100 {
                        let event = Event::new(EventKind::Clear, page(mine));
                        let change = space.invalidate_range_start(event);
                        let held = handle.inspect(|mirror| mirror.table.get(&mine).copied());
                        assert_eq!(held, Ok(None), "no device uses what changes");
                        memory[mine as usize].store(round, Ordering::Relaxed);
                        drop(change);
                        let held = handle.inspect(|mirror| mirror.table.get(&mine).copied());
                        assert!(matches!(held, Ok(None)) || held == Ok(Some(round)), "{held:?}");
                    }
                })
            })
            .collect();
        let handle = (*mirror).clone();
        let (over, seen) = (Arc::new(AtomicBool::new(false)), Arc::clone(&memory));
        let reader = {
            let over = Arc::clone(&over);
            task(move || {
                line.wait();
                while !over.load(Ordering::Relaxed) {
                    for page in 0..PAGES {
                        let section = handle.read_begin_deadline(soon()).unwrap();
                        let value = seen[page as usize].load(Ordering::Relaxed);
                        if let Ok(mut update) = section.commit() {
                            update.table.insert(page, value);
                        }
                    }
                }
            })
        };
        writers.into_iter().for_each(|writer| writer.finish());
        over.store(true, Ordering::Relaxed);
        reader.finish();
    });
}
