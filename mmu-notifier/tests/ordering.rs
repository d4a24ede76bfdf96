//! The order of calls, pairs, fences and owners, by interleavings made by hand: group X of
//! `docs/acceptance.md`.

#![cfg(not(any(loom, shuttle)))]

mod common;

use std::collections::BTreeMap;

use std::sync::Mutex;
use std::sync::mpsc::channel;

use common::{
    Change, Log, Recorder, Task, at_once, change, is_idle, page, pages, soon, stop, translate,
    translation, unmap, watched,
};
use mmu_notifier::{
    Class, DeviceHandle, Event, EventKind, Notifier, Owner, SelfWait, SubscribeOptions,
    Subscription, Subscriptions, UnsubscribeError, VaRange, WouldBlock,
};

fn list() -> SubscribeOptions {
    SubscribeOptions::new().class(Class::List)
}

/// Three list subscribers, the middle one refuses a non-blockable event. All three are told of the
/// start, the two that accepted hear of the end, and the one that refused does not.
#[test]
fn x01_every_list_subscriber_hears_and_ends_are_balanced() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let subscribe = |recorder| space.subscribe_paired(VaRange::ALL, recorder, list()).unwrap();
        let one = subscribe(Recorder::new("one", &log));
        let two = subscribe(Recorder::new("two", &log).refusing());
        let three = subscribe(Recorder::new("three", &log));
        let refused = space.try_invalidate_range_start(unmap(page(1)));
        assert_eq!(refused.map(drop), Err(WouldBlock));
        let mut calls = log.take();
        // The order within a class is that of the ranges, and these have the same.
        calls[..3].sort();
        calls[3..].sort();
        let starts = ["one try Unmap", "three try Unmap", "two try Unmap"];
        assert_eq!(calls[..3], starts);
        assert_eq!(calls[3..], ["one end Unmap", "three end Unmap"]);
        assert!(is_idle(&space));
        drop((one, two, three));
    });
}

/// Three intervals that hear of ends, and one list subscriber; the middle interval refuses. The
/// first hears of the end, the third and the list subscriber of nothing.
#[test]
fn x01_an_interval_that_refuses_ends_the_announcement() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let everywhere =
            space.subscribe_paired(VaRange::ALL, Recorder::new("list", &log), list()).unwrap();
        let subscribe = |n, recorder| {
            space.subscribe_paired(page(n), recorder, SubscribeOptions::new()).unwrap()
        };
        let one = subscribe(1, Recorder::new("one", &log));
        let two = subscribe(2, Recorder::new("two", &log).refusing());
        let three = subscribe(3, Recorder::new("three", &log));
        assert!(space.try_invalidate_range_start(unmap(pages(1, 3))).is_err());
        assert_eq!(log.take(), ["one try Unmap", "two try Unmap", "one end Unmap"]);
        drop((one, two, three, everywhere));
    });
}

/// Two subscribers hear of a start; one unsubscribes before the end. The other hears of the end,
/// the first does not, and what it counted is its own to settle: it has its notifier back.
#[test]
fn x02_who_unsubscribes_within_a_change_hears_of_no_end() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let subscribe =
            |recorder| space.subscribe_paired(page(1), recorder, SubscribeOptions::new()).unwrap();
        let leaves = subscribe(Recorder::new("leaves", &log));
        let stays = subscribe(Recorder::new("stays", &log));
        let running = Change::begin(&space, unmap(page(1)));
        let leaver = leaves.unsubscribe().expect("the space lives");
        log.take();
        running.end();
        assert_eq!(log.take(), ["stays end Unmap"]);
        drop((leaver, stays));
    });
}

/// Handles are counted and keep the node's memory, not the subscription: the notifier ends once,
/// whatever handles are left, and the node goes with the last of them.
#[test]
fn x03_handles_are_counted_and_keep_no_subscription_alive() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let device = DeviceHandle::register("gpu");
        let recorder = Recorder::new("device", &log).holding(device.reference());
        let subscription = space.subscribe(page(1), recorder).unwrap();
        let found = space.find::<Recorder>(0x1000).expect("it is subscribed");
        let handles: Vec<_> = (0..100).map(|_| found.clone()).collect();
        drop(subscription);
        assert_eq!(device.try_unregister().ok(), Some("gpu"), "the notifier is gone");
        assert!(handles.iter().all(|handle| handle.read_begin().is_err()));
        assert_eq!(space.live(), 1);
        drop((found, handles));
        assert_eq!(space.live(), 0);
    });
}

/// Another's subscription is dropped inside a callback, where nothing may wait: it ends when the
/// thread has left the callback, and has ended, its notifier freed, before the announcement
/// returns. To unsubscribe there instead is refused as waiting for oneself.
#[test]
fn x03_x04_a_subscription_dropped_inside_a_callback() {
    watched(|| {
        for by_deadline in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let device = DeviceHandle::register("gpu");
            let victim = Recorder::new("victim", &log).holding(device.reference());
            let victim = space.subscribe(page(2), victim).unwrap();
            let slot = Mutex::new(Some(victim));
            let dropper = {
                let log = log.clone();
                Recorder::new("dropper", &log).on_start(move |_| {
                    let Some(victim) = slot.lock().unwrap().take() else { return };
                    if by_deadline {
                        let unfinished = victim.unsubscribe_deadline(soon()).err();
                        let reason = unfinished.map(|unfinished| unfinished.reason);
                        let refused = reason == Some(UnsubscribeError::SelfWait(SelfWait));
                        log.note(format!("refused: {refused}"));
                    } else {
                        drop(victim);
                    }
                    log.note("callback returns");
                })
            };
            let dropper = space.subscribe(page(1), dropper).unwrap();
            let running = Change::begin(&space, unmap(page(1)));
            let mut calls = log.take();
            if by_deadline {
                assert_eq!(calls.remove(1), "refused: true");
            }
            let order = ["dropper start Unmap", "callback returns", "victim start Release"];
            assert_eq!(calls, order);
            assert_eq!(space.live(), 1);
            assert_eq!(device.try_unregister().ok(), Some("gpu"), "it has been freed");
            running.end();
            drop(dropper);
        }
    });
}

/// The same inside the stop that unsubscribing tells a device, where the unsubscription then gives
/// up at its deadline: what was dropped inside has ended all the same.
#[test]
fn x04_what_is_dropped_inside_a_stop_ends_though_the_caller_gives_up() {
    watched(|| {
        let space = Subscriptions::new();
        let device = DeviceHandle::register("gpu");
        let victim = Recorder::new("victim", &Log::new()).holding(device.reference());
        let slot = Mutex::new(Some(space.subscribe(page(2), victim).unwrap()));
        let dropper = Recorder::new("dropper", &Log::new())
            .on_start(move |_| drop(slot.lock().unwrap().take()));
        let dropper = space.subscribe(page(1), dropper).unwrap();
        let operation = dropper.begin_operation().unwrap();
        let unfinished = dropper.unsubscribe_deadline(at_once()).expect_err("it is in use");
        let left = space.live();
        drop(operation);
        drop(unfinished);
        assert_eq!(left, 1, "the victim has ended");
        assert_eq!(device.try_unregister().ok(), Some("gpu"), "and has been freed");
    });
}

/// A subscription holds another in its notifier, and is released: the inner one is dropped inside
/// the release, and has ended when release returns.
#[test]
fn x04_what_is_dropped_inside_a_release_has_ended_when_release_returns() {
    watched(|| {
        let (outer_space, space) = (Subscriptions::new(), Subscriptions::new());
        let device = DeviceHandle::register("gpu");
        let inner = Recorder::new("inner", &Log::new()).holding(device.reference());
        let inner: Subscription<Recorder> = space.subscribe(page(1), inner).unwrap();
        let outer = Recorder::new("outer", &Log::new()).holding(inner);
        let outer = outer_space.subscribe(page(1), outer).unwrap();
        outer_space.release();
        assert_eq!(device.try_unregister().ok(), Some("gpu"));
        assert_eq!(space.live(), 0);
        drop(outer);
    });
}

/// Three devices with fences. All are told to stop before the first fence is waited for, and the
/// fences are waited for in the order of the calls.
#[test]
fn x05_devices_stop_in_parallel_and_are_waited_for_in_order() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let subscribe =
            |n, name| space.subscribe(page(n), Recorder::new(name, &log).with_fences()).unwrap();
        let all = [subscribe(1, "one"), subscribe(2, "two"), subscribe(3, "three")];
        let announced = space.invalidate_range_start(unmap(pages(1, 3)));
        let calls = [
            "one start Unmap",
            "two start Unmap",
            "three start Unmap",
            "one fence Unmap",
            "two fence Unmap",
            "three fence Unmap",
        ];
        assert_eq!(log.take(), calls);
        drop(announced);
        assert_eq!(log.take(), [""; 0]);
        drop(all);
    });
}

/// The announcement does not return while a fence is out, and the subscriber is free meanwhile: it
/// hears of the next event and is looked at.
#[test]
fn x05_an_announcement_waits_for_its_fences_without_the_lock() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (inside, stopped) = stop();
        let device = Recorder::new("device", &log).on_fence(move |_| inside.here());
        let device = space.subscribe(pages(1, 2), device).unwrap();
        let first = change(&space, unmap(page(1)));
        stopped.wait();
        change(&space, Event::new(EventKind::Clear, page(2))).finish();
        assert_eq!(device.inspect(|recorder| recorder.table.len()), Ok(0));
        first.is_waiting();
        stopped.go();
        first.finish();
        let calls = [
            "device start Unmap",
            "device start Clear",
            "device fence Clear",
            "device fence Unmap",
        ];
        assert_eq!(log.take(), calls);
        drop(device);
    });
}

/// Six announcements have each been given a fence by one subscriber, more than it has room for, and
/// are held up by a second one before they wait. Then each waits for the fence of its own call,
/// once.
#[test]
fn x05_a_fence_belongs_to_one_call() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (tell, told) = channel();
        let own_event = log.clone();
        let first = Recorder::new("first", &Log::new())
            .on_start(move |_| {
                let _ = tell.send(());
            })
            .on_fence(move |event| own_event.note(event.range().to_string()));
        let first = space.subscribe(pages(0, 16), first).unwrap();
        let (inside, stopped) = stop();
        let second = Recorder::new("second", &Log::new()).stopped_at_start(inside);
        let second = space.subscribe(pages(1, 15), second).unwrap();
        let all: Vec<Task<()>> = (1..=6).map(|n| change(&space, unmap(page(n)))).collect();
        for _ in 0..6 {
            told.recv_timeout(soon() - at_once()).expect("every announcement comes to the first");
        }
        stopped.wait();
        all[0].is_waiting();
        assert_eq!(log.so_far(), [""; 0]);
        stopped.go();
        all.into_iter().for_each(|task| task.finish());
        let mut ranges = log.take();
        ranges.sort();
        assert_eq!(ranges, (1..=6).map(|n| page(n).to_string()).collect::<Vec<_>>());
        drop((first, second));
    });
}

/// A later subscriber refuses a non-blockable event: the fences that were returned before are
/// waited for, once each and in order, before the refusal comes back.
#[test]
fn x05_fences_are_waited_for_where_a_later_one_refuses() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let subscribe = |n, recorder| space.subscribe(page(n), recorder).unwrap();
        let one = subscribe(1, Recorder::new("one", &log).with_fences());
        let two = subscribe(2, Recorder::new("two", &log).with_fences());
        let three = subscribe(3, Recorder::new("three", &log).with_fences().refusing());
        assert!(space.try_invalidate_range_start(unmap(pages(1, 3))).is_err());
        let calls = [
            "one try Unmap",
            "two try Unmap",
            "three try Unmap",
            "one fence Unmap",
            "two fence Unmap",
        ];
        assert_eq!(log.take(), calls);
        drop((one, two, three));
    });
}

/// Fences are waited for in the death of the address space, all devices in parallel, before the
/// first is released; in unsubscribing; and in giving up a part of the range.
#[test]
fn x05_fences_are_waited_for_in_every_release() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let subscribe = |n, name| {
            space.subscribe(pages(n, 2), Recorder::new(name, &log).with_fences()).unwrap()
        };
        let leaves = subscribe(8, "leaves");
        drop(leaves);
        assert_eq!(log.take(), ["leaves start Release", "leaves fence Release"]);
        let (mut one, two) = (subscribe(1, "one"), subscribe(3, "two"));
        one.set_range(page(1)).unwrap();
        assert_eq!(log.take(), ["one start Release", "one fence Release"]);
        space.release();
        let calls = [
            "one start Release",
            "two start Release",
            "one fence Release",
            "two fence Release",
            "one release",
            "two release",
        ];
        assert_eq!(log.take(), calls);
        drop((one, two));
    });
}

/// A list subscriber is there first, intervals above and below come later: every interval hears of
/// an event before it, in a change as in the death of the address space.
#[test]
fn x06_intervals_hear_before_the_list() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let everywhere = space.subscribe_all(Recorder::new("list", &log)).unwrap();
        let low = space.subscribe(page(1), Recorder::new("low", &log)).unwrap();
        let high = space.subscribe(page(9), Recorder::new("high", &log)).unwrap();
        drop(space.invalidate_range_start(unmap(VaRange::ALL)));
        assert_eq!(log.take(), ["low start Unmap", "high start Unmap", "list start Unmap"]);
        drop(space.try_invalidate_range_start(unmap(VaRange::ALL)).unwrap());
        assert_eq!(log.take(), ["low try Unmap", "high try Unmap", "list try Unmap"]);
        space.release();
        let calls = ["low start Release", "high start Release", "list start Release"];
        assert_eq!(log.take()[..3], calls);
        drop((everywhere, low, high));
    });
}

/// Events of every kind by the subscription's own owner, by another, and by nobody. It is deaf to
/// its own migrations and exclusive accesses and to nothing else, and its read sections go on
/// exactly where it is deaf.
#[test]
fn x07_an_owner_ignores_its_own_migrations() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (mine, theirs) = (Owner::new(), Owner::new());
        let options = SubscribeOptions::new().owner(mine);
        let device = space.subscribe_with(page(1), Recorder::new("d", &log), options).unwrap();
        let plain = space.subscribe(page(1), Recorder::new("plain", &Log::new())).unwrap();
        for kind in [
            EventKind::Unmap,
            EventKind::Clear,
            EventKind::ProtectionVma,
            EventKind::ProtectionPage,
            EventKind::SoftDirty,
            EventKind::Release,
            EventKind::Migrate,
            EventKind::Exclusive,
        ] {
            for owner in [None, Some(theirs), Some(mine)] {
                let event = Event::new(kind, page(1));
                let event = owner.map_or(event, |owner| event.owned_by(owner));
                let own_move = matches!(kind, EventKind::Migrate | EventKind::Exclusive);
                let deaf = own_move && owner == Some(mine);
                assert!(translate(&device, 0x1000, 1));
                let section = device.read_begin().unwrap();
                let others = plain.read_begin().unwrap();
                let running = Change::begin(&space, event);
                assert_eq!(log.take().is_empty(), deaf, "{event}");
                assert_eq!(section.commit().is_ok(), deaf, "{event}");
                assert_eq!(translation(&device, 0x1000).is_some(), deaf, "{event}");
                assert!(others.commit().is_err(), "{event}");
                assert_eq!(device.read_begin_deadline(at_once()).is_ok(), deaf, "{event}");
                running.end();
                // Counts are as balanced for the one that was spared as for the others.
                assert!(device.read_begin_deadline(at_once()).is_ok(), "{event}");
                assert!(plain.read_begin_deadline(at_once()).is_ok(), "{event}");
            }
        }
    });
}

/// One wide subscription keeps many narrow ranges, each valid or not. Validity is decided under the
/// notifier's lock, as the last step before what is committed: a change to one narrow range sends
/// the section of another to its retry, which then commits, while the one that changed does not.
#[test]
fn x08_validity_is_per_range_and_decided_under_the_lock() {
    /// Each narrow range by its page, with whether it is valid.
    struct Wide(BTreeMap<u64, bool>);
    impl Notifier for Wide {
        type Fence = ();
        fn invalidate(&mut self, event: &Event) {
            for (&number, valid) in &mut self.0 {
                *valid &= !event.range().overlaps(page(number));
            }
        }
    }
    watched(|| {
        let space = Subscriptions::new();
        let wide = space.subscribe_all(Wide(BTreeMap::from([(1, true), (2, true)]))).unwrap();
        let use_range = |number: u64| {
            loop {
                let section = wide.read_begin_deadline(soon()).unwrap();
                // The lock is held from the decision to the last use of what was decided.
                if let Ok(update) = section.commit() {
                    return update.0[&number];
                }
            }
        };
        let before = wide.read_begin().unwrap();
        change(&space, unmap(page(1))).finish();
        assert!(before.commit().is_err());
        assert!(use_range(2));
        assert!(!use_range(1));
        // Between the decision and the use no change comes in.
        let update = wide.read_begin().unwrap().commit().unwrap();
        let announcement = change(&space, unmap(page(2)));
        announcement.is_waiting();
        assert!(update.0[&2]);
        drop(update);
        announcement.finish();
        assert!(!use_range(2));
    });
}
