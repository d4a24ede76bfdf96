//! Unsubscribing, devices and the death of the address space, by interleavings made by hand: groups
//! B, C and D of `docs/acceptance.md`.

#![cfg(not(any(loom, shuttle)))]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Weak};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    A_WHILE, Change, Log, Recorder, Task, at_once, change, in_a_while, is_idle, page, pages, soon,
    stop, task, translate, translation, unmap, watched,
};
use mmu_notifier::{
    DeviceHandle, DeviceRef, Event, EventKind, Notifier, ReadBeginError, Released, Retry,
    SubscribeError, SubscribeOptions, Subscriptions, TimedOut, VaRange, in_callback,
};

/// Lets the address space die on another thread.
fn release(space: &Arc<Subscriptions>) -> Task<()> {
    let space = Arc::clone(space);
    task(move || space.release())
}

/// Counts what becomes of it.
struct Counted {
    released: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
}

impl Notifier for Counted {
    type Fence = ();
    fn invalidate(&mut self, _: &Event) {}
    fn release(self) {
        self.released.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// The address space dies while the driver still holds its subscription and the device. The device
/// is told to stop, and the mirror's release has run, before the death returns.
#[test]
fn b01_death_reaches_a_mirror_that_nobody_unsubscribed() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let device = DeviceHandle::register("gpu");
        let mirror = Recorder::new("mirror", &log).holding(device.reference());
        let mirror = space.subscribe(page(1), mirror).unwrap();
        space.release();
        log.note("frames freed");
        assert_eq!(log.take(), ["mirror start Release", "mirror release", "frames freed"]);
        drop(mirror);
        assert!(device.try_unregister().is_ok());
    });
}

/// A device loads through its table without pause while the address space dies and its frames are
/// poisoned at once. No load ever finds poison, and none succeeds after the death.
#[test]
fn b02_no_device_loads_from_a_freed_frame() {
    const FRAMES: u64 = 8;
    watched(|| {
        for _ in 0..10 {
            let (space, log) = (Subscriptions::new(), Log::new());
            let mirror = space.subscribe(pages(0, FRAMES), Recorder::new("m", &log)).unwrap();
            let poisoned: Arc<[AtomicBool; FRAMES as usize]> = Arc::default();
            let line = Arc::new(Barrier::new(2));
            let device = {
                let (handle, poisoned) = ((*mirror).clone(), Arc::clone(&poisoned));
                let line = Arc::clone(&line);
                task(move || {
                    for load in 0.. {
                        if load == 16 {
                            line.wait();
                        }
                        let address = (load % FRAMES) * 0x1000;
                        let frame = handle.inspect(|device| {
                            let frame = *device.table.get(&address)? as usize;
                            // The load itself, before the device can be told to stop.
                            assert!(!poisoned[frame].load(Ordering::Relaxed), "use after free");
                            Some(frame)
                        });
                        match frame {
                            Ok(Some(_)) => {}
                            Ok(None) => {
                                if let Ok(section) = handle.read_begin()
                                    && let Ok(mut update) = section.commit()
                                {
                                    update.table.insert(address, load % FRAMES);
                                }
                            }
                            Err(Released) => return,
                        }
                    }
                })
            };
            line.wait();
            space.release();
            poisoned.iter().for_each(|frame| frame.store(true, Ordering::Relaxed));
            device.finish();
        }
    });
}

/// Each way in which a mirror is told of a release: death, unsubscribing, dropping (as a driver
/// does on a device error), giving up a part of the range. The event and the call say which it is.
#[test]
fn b03_who_is_told_of_a_release_and_how() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let told = |ranges: &[VaRange]| {
            let events = ranges.iter().map(|&range| Event::new(EventKind::Release, range));
            assert_eq!(log.take_events(), events.collect::<Vec<_>>());
        };
        let by_hand = space.subscribe(page(1), Recorder::new("by hand", &log)).unwrap();
        assert!(by_hand.unsubscribe().is_some());
        told(&[page(1)]);
        let on_error = space.subscribe(page(2), Recorder::new("on error", &log)).unwrap();
        drop(on_error);
        told(&[page(2)]);
        let mut shrinks = space.subscribe(pages(2, 5), Recorder::new("shrinks", &log)).unwrap();
        shrinks.set_range(page(4)).unwrap();
        told(&[pages(2, 2), pages(5, 2)]);
        space.release();
        assert_eq!(log.so_far(), ["shrinks start Release", "shrinks release"]);
        told(&[VaRange::ALL]);
        assert!(shrinks.unsubscribe().is_none());
        told(&[]);
    });
}

/// The program gives up the address space first and the last mirror afterwards, alive and dead. The
/// mirror holds what it needs, and when it has gone, nothing is left.
#[test]
fn b04_the_space_may_go_before_the_last_mirror() {
    watched(|| {
        for dies_before in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let mirror = space.subscribe(page(1), Recorder::new("mirror", &log)).unwrap();
            let left = Arc::downgrade(&space);
            if dies_before {
                space.release();
            }
            drop(space);
            assert!(left.upgrade().is_some());
            assert_eq!(mirror.unsubscribe().is_none(), dies_before);
            assert!(left.upgrade().is_none());
        }
    });
}

/// A handle that outlives its mirror, killed or unsubscribed, gives access to nothing.
#[test]
fn b05_a_dead_mirror_gives_access_to_nothing() {
    watched(|| {
        for killed in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let mirror = space.subscribe(page(1), Recorder::new("mirror", &log)).unwrap();
            let handle = (*mirror).clone();
            assert!(translate(&handle, 0x1000, 1));
            if killed {
                space.release();
            } else {
                drop(mirror.unsubscribe());
            }
            assert_eq!(handle.read_begin().map(drop), Err(Released));
            let released = Err(ReadBeginError::Released(Released));
            assert_eq!(handle.read_begin_deadline(soon()).map(drop), released);
            assert_eq!(handle.begin_operation().map(drop), Err(Released));
            assert_eq!(handle.inspect(|_| ()), Err(Released));
            assert!(space.find::<Recorder>(0x1000).is_none());
        }
    });
}

/// Ten thousand mirrors, each on a device and an address space of its own for a while, that end in
/// turn by unsubscribing, by death, by both, or as an error drops them. No object is left.
#[test]
fn b06_nothing_is_left_after_ten_thousand_rounds() {
    watched(|| {
        let (released, dropped) = (Arc::default(), Arc::default());
        let mut spaces: Vec<Weak<Subscriptions>> = Vec::new();
        for round in 0..10_000 {
            let space = Subscriptions::new();
            let counted =
                Counted { released: Arc::clone(&released), dropped: Arc::clone(&dropped) };
            let mirror = space.subscribe(page(1), counted).unwrap();
            match round % 4 {
                0 => drop(mirror.unsubscribe().expect("the space lives")),
                1 => {
                    space.release();
                    assert!(mirror.unsubscribe().is_none());
                }
                2 => drop(mirror),
                _ => {
                    // Exit without unregistering, then the file is closed.
                    space.release();
                    drop(mirror);
                }
            }
            assert_eq!(space.live(), 0);
            spaces.push(Arc::downgrade(&space));
        }
        assert_eq!(dropped.load(Ordering::Relaxed), 10_000);
        assert_eq!(released.load(Ordering::Relaxed), 5_000);
        assert!(spaces.iter().all(|space| space.strong_count() == 0));
    });
}

/// When the last mirror of an address space has gone, the space is as unused as a new one, and
/// takes the next mirror as it took the first.
#[test]
fn b07_the_last_mirror_leaves_the_space_idle() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        for _ in 0..3 {
            let one = space.subscribe(page(1), Recorder::new("one", &log)).unwrap();
            let two = space.subscribe(page(2), Recorder::new("two", &log)).unwrap();
            let running = Change::begin(&space, unmap(page(1)));
            drop((one, two));
            running.end();
            assert_eq!(space.live(), 0);
            assert!(is_idle(&space));
            let unheard = Change::begin(&space, unmap(page(1)));
            assert!(format!("{space:?}").contains("changes_under_way: [], changes_unrecorded: 1"));
            unheard.end();
        }
    });
}

/// Unsubscribing and death, at the same instant, a hundred times: the notifier is handed back or
/// released, never both, and is dropped once. The outcome does not depend on what debug builds
/// check.
#[test]
fn b08_c08_a_mirror_is_killed_once() {
    watched(|| {
        let (released, dropped) = (Arc::default(), Arc::default());
        let mut handed_back = 0;
        for _ in 0..100 {
            let space = Subscriptions::new();
            let counted =
                Counted { released: Arc::clone(&released), dropped: Arc::clone(&dropped) };
            let mirror = space.subscribe(page(1), counted).unwrap();
            let line = Arc::new(Barrier::new(2));
            let death = {
                let (space, line) = (Arc::clone(&space), Arc::clone(&line));
                task(move || {
                    line.wait();
                    space.release();
                })
            };
            line.wait();
            handed_back += u64::from(mirror.unsubscribe().is_some());
            death.finish();
            assert_eq!(space.live(), 0);
        }
        assert_eq!(handed_back + released.load(Ordering::Relaxed), 100);
        assert_eq!(dropped.load(Ordering::Relaxed), 100);
    });
}

/// Seed 001 step by step. B: the address space dies, and is stopped inside the mirror's release,
/// which still has the device. A: unsubscribes, and does not return; the device is busy, at once
/// and after a while. B goes on; A returns; the device is A's by value.
#[test]
fn b09_c01_a_device_is_busy_while_a_death_still_has_it() {
    struct Mirror(DeviceRef<Arc<AtomicU64>>, common::Stop);
    impl Notifier for Mirror {
        type Fence = ();
        fn invalidate(&mut self, _: &Event) {}
        fn release(self) {
            self.1.here();
            // The late access to the device.
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    watched(|| {
        let space = Subscriptions::new();
        let accesses = Arc::new(AtomicU64::new(0));
        let device = DeviceHandle::register(Arc::clone(&accesses));
        let (inside, stopped) = stop();
        let mirror = space.subscribe(page(1), Mirror(device.reference(), inside)).unwrap();
        let b = release(&space);
        stopped.wait();
        let a = task(move || mirror.unsubscribe().is_none());
        a.is_waiting();
        let busy = device.try_unregister().expect_err("B is inside the mirror");
        assert_eq!(busy.references, 1);
        let busy = busy.handle.unregister_deadline(in_a_while()).expect_err("B still is");
        assert_eq!(accesses.load(Ordering::Relaxed), 0);
        stopped.go();
        assert!(a.finish());
        let device = busy.handle.try_unregister().expect("nobody is left");
        assert_eq!(device.load(Ordering::Relaxed), 1);
        drop(device);
        b.finish();
        assert_eq!(Arc::strong_count(&accesses), 1, "the device is freed");
    });
}

/// The window itself, many times and at full speed: B gives up the mirror's reference as the last
/// thing its release does, and A unregisters the device the moment it may. The device comes back by
/// value, which it could not if B still had it.
#[test]
fn b09_b10_the_last_reference_and_unregistering_at_once() {
    watched(|| {
        for round in 0..100 {
            let space = Subscriptions::new();
            let device = DeviceHandle::register(Box::new(round));
            let mirror = Recorder::new("mirror", &Log::new()).holding(device.reference());
            let mirror = space.subscribe(page(1), mirror).unwrap();
            let b = release(&space);
            if round % 2 == 0 {
                drop(mirror);
                assert_eq!(*device.try_unregister().expect("nobody is left"), round);
            } else {
                assert_eq!(*device.unregister(), round);
                drop(mirror);
            }
            b.finish();
        }
    });
}

/// The driver learns from the release callback that the address space has died, and goes on to free
/// the device. But the callback has not returned: the device is busy until it has.
#[test]
fn b10_b11_b12_to_have_heard_of_the_release_is_not_its_end() {
    watched(|| {
        let space = Subscriptions::new();
        let device = DeviceHandle::register("gpu");
        let (announce, heard) = channel();
        let (inside, stopped) = stop();
        let mirror = Recorder::new("mirror", &Log::new()).holding(device.reference());
        let mirror = mirror.on_release(move || {
            let _ = announce.send(());
            inside.here();
        });
        let mirror = space.subscribe(page(1), mirror).unwrap();
        let death = release(&space);
        heard.recv_timeout(Duration::from_secs(10)).expect("the release callback runs");
        stopped.wait();
        let device = device.try_unregister().expect_err("the callback is running").handle;
        let unregister = task(move || device.unregister());
        unregister.is_waiting();
        stopped.go();
        assert_eq!(unregister.finish(), "gpu");
        death.finish();
        drop(mirror);
    });
}

/// Seed 001 and 003: release is stopped inside the mirror's callback while the owner unsubscribes,
/// waiting or with a deadline. It returns only after the callback has, and has nothing to hand
/// back.
#[test]
fn b13_d12_unsubscribing_waits_for_a_running_release() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (inside, stopped) = stop();
        let mirror = {
            let log = log.clone();
            let mirror = Recorder::new("mirror", &log);
            mirror.on_release(move || {
                inside.here();
                log.note("release returns");
            })
        };
        let mirror = space.subscribe(page(1), mirror).unwrap();
        let death = release(&space);
        stopped.wait();
        let unfinished = mirror.unsubscribe_deadline(at_once()).expect_err("release runs");
        let unsubscribe = {
            let log = log.clone();
            task(move || {
                let nothing = unfinished.subscription.unsubscribe();
                log.note("unsubscribed");
                nothing.is_none()
            })
        };
        unsubscribe.is_waiting();
        stopped.go();
        assert!(unsubscribe.finish());
        death.finish();
        let calls = ["mirror start Release", "mirror release", "release returns", "unsubscribed"];
        assert_eq!(log.take(), calls);
    });
}

/// The other order: unsubscribing is inside the mirror when the address space dies. The death waits
/// for it, and between the two the mirror ends once.
#[test]
fn b08_d12_death_waits_for_a_running_unsubscription() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (inside, stopped) = stop();
        let mirror = Recorder::new("mirror", &log).stopped_at_start(inside);
        let mirror = space.subscribe(page(1), mirror).unwrap();
        let unsubscribe = task(move || mirror.unsubscribe().is_some());
        stopped.wait();
        let death = release(&space);
        death.is_waiting();
        stopped.go();
        let handed_back = unsubscribe.finish();
        death.finish();
        let released = log.take().contains(&"mirror release".to_owned());
        assert_ne!(handed_back, released);
    });
}

/// A device with mirrors is busy, whoever asks and however often, and nothing is changed by asking.
/// One closes after the other; then it is free, at once for who asks and for who waits.
#[test]
fn b14_a_busy_device_may_be_asked_again() {
    watched(|| {
        let space = Subscriptions::new();
        let log = Log::new();
        for waits in [false, true] {
            let mut device = DeviceHandle::register("gpu");
            let mirror = |n: u64| {
                let mirror = Recorder::new("mirror", &log).holding(device.reference());
                space.subscribe(page(n), mirror).unwrap()
            };
            let mut mirrors = vec![mirror(1), mirror(2), mirror(3)];
            log.take();
            while let Some(mirror) = mirrors.pop() {
                for _ in 0..3 {
                    let busy = device.try_unregister().expect_err("mirrors are open");
                    assert_eq!(busy.references, mirrors.len() as u64 + 1);
                    device = busy.handle;
                }
                let busy = device.unregister_deadline(at_once()).expect_err("mirrors are open");
                device = busy.handle;
                assert_eq!(*device, "gpu");
                change(&space, unmap(pages(1, 3))).finish();
                assert_eq!(log.take().len(), mirrors.len() + 1, "every mirror still works");
                if waits && mirrors.is_empty() {
                    let unregister = task(move || device.unregister());
                    unregister.is_waiting();
                    drop(mirror);
                    assert_eq!(unregister.finish(), "gpu");
                    break;
                }
                drop(mirror);
                log.take();
                if mirrors.is_empty() {
                    assert_eq!(device.try_unregister().ok(), Some("gpu"));
                    break;
                }
            }
        }
    });
}

/// Whoever closes last need not be who opened: the subscription goes to another thread, and from
/// there to a third. The owner's space dies before the last one closes, or after.
#[test]
fn b16_b17_another_thread_closes_last() {
    watched(|| {
        for owner_first in [true, false] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let device = DeviceHandle::register("gpu");
            let mirror = Recorder::new("mirror", &log).holding(device.reference());
            let mirror = space.subscribe(page(1), mirror).unwrap();
            let (hand_over, child) = channel();
            let (hand_on, third) = channel();
            let passed_on = task(move || {
                let mirror = child.recv().unwrap();
                hand_on.send(mirror).unwrap();
            });
            let closed = task(move || third.recv().map(drop).unwrap());
            if owner_first {
                space.release();
                hand_over.send(mirror).unwrap();
                passed_on.finish();
                closed.finish();
                assert_eq!(log.take(), ["mirror start Release", "mirror release"]);
            } else {
                hand_over.send(mirror).unwrap();
                passed_on.finish();
                closed.finish();
                space.release();
                assert_eq!(log.take(), ["mirror start Release"]);
            }
            assert_eq!(space.live(), 0);
            assert_eq!(device.try_unregister().ok(), Some("gpu"));
        }
    });
}

/// Unsubscribe, then the address space dies, with a change under way across both: nothing comes.
#[test]
fn c03_no_release_comes_after_unsubscribing() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let options = SubscribeOptions::new();
        let mirror = space.subscribe_paired(page(1), Recorder::new("m", &log), options).unwrap();
        let running = Change::begin(&space, unmap(page(1)));
        let mirror = mirror.unsubscribe().expect("the space lives");
        log.take();
        space.release();
        running.end();
        drop(mirror);
        assert_eq!(log.take(), [""; 0]);
    });
}

/// A thread is stopped inside each kind of call, and the owner unsubscribes: it does not return
/// before the call has.
#[test]
fn c04_unsubscribing_waits_for_a_running_call() {
    watched(|| {
        for which in ["start", "try", "fence", "end"] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let (inside, stopped) = stop();
            let mirror = Recorder::new("mirror", &log);
            let mirror = match which {
                "start" | "try" => mirror.on_start(move |_| inside.here()),
                "fence" => mirror.on_fence(move |_| inside.here()),
                _ => mirror.on_end(move |_| inside.here()),
            };
            let mirror = space.subscribe_paired(page(1), mirror, SubscribeOptions::new()).unwrap();
            let announcement = {
                let space = Arc::clone(&space);
                task(move || match which {
                    "try" => drop(space.try_invalidate_range_start(unmap(page(1)))),
                    _ => drop(space.invalidate_range_start(unmap(page(1)))),
                })
            };
            stopped.wait();
            let unsubscribe = task(move || mirror.unsubscribe());
            unsubscribe.is_waiting();
            stopped.go();
            let notifier = unsubscribe.finish().expect("the space lives");
            log.take();
            announcement.finish();
            drop(notifier);
            assert_eq!(log.take(), [""; 0], "{which}");
        }
    });
}

/// Every kind of event and of call comes without pause from two threads while mirrors come and go.
/// No call finds its mirror unsubscribed.
#[test]
fn c04_no_call_comes_after_unsubscribing() {
    const KINDS: [EventKind; 8] = [
        EventKind::Unmap,
        EventKind::Clear,
        EventKind::ProtectionVma,
        EventKind::ProtectionPage,
        EventKind::SoftDirty,
        EventKind::Release,
        EventKind::Migrate,
        EventKind::Exclusive,
    ];
    watched(|| {
        let space = Subscriptions::new();
        let late = Arc::new(AtomicU64::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let announcers: Vec<_> = (0..2)
            .map(|_| {
                let (space, over) = (Arc::clone(&space), Arc::clone(&over));
                task(move || {
                    for kind in KINDS.into_iter().cycle() {
                        if over.load(Ordering::Relaxed) {
                            return;
                        }
                        let event = Event::new(kind, page(1));
                        drop(space.invalidate_range_start(event));
                        drop(space.try_invalidate_range_start(event));
                        thread::yield_now();
                    }
                })
            })
            .collect();
        for _ in 0..40 {
            let gone = Arc::new(AtomicBool::new(false));
            let watch = |gone: &Arc<AtomicBool>| {
                let (gone, late) = (Arc::clone(gone), Arc::clone(&late));
                move |_: &Event| {
                    if gone.load(Ordering::Relaxed) {
                        late.fetch_add(1, Ordering::Relaxed);
                    }
                }
            };
            let mirror = Recorder::new("mirror", &Log::new())
                .on_start(watch(&gone))
                .on_end(watch(&gone))
                .on_fence(watch(&gone));
            let mirror = space.subscribe_paired(page(1), mirror, SubscribeOptions::new()).unwrap();
            drop(mirror.read_begin_deadline(soon()));
            let notifier = mirror.unsubscribe().expect("the space lives");
            gone.store(true, Ordering::Relaxed);
            drop(notifier);
        }
        over.store(true, Ordering::Relaxed);
        announcers.into_iter().for_each(|announcer| announcer.finish());
        assert_eq!(late.load(Ordering::Relaxed), 0);
    });
}

/// A thread is stopped inside a mirror's callback, the owner unsubscribes and waits, the thread
/// goes on. Once the owner has come back, the device is free without another wait.
#[test]
fn c05_a_device_is_free_at_once_after_unsubscribing() {
    watched(|| {
        let space = Subscriptions::new();
        let device = DeviceHandle::register("gpu");
        let (inside, stopped) = stop();
        let mirror = Recorder::new("mirror", &Log::new())
            .stopped_at_start(inside)
            .holding(device.reference());
        let mirror = space.subscribe(page(1), mirror).unwrap();
        let announcement = change(&space, unmap(page(1)));
        stopped.wait();
        let close = task(move || {
            drop(mirror.unsubscribe());
            device.try_unregister().ok()
        });
        close.is_waiting();
        stopped.go();
        assert_eq!(close.finish(), Some("gpu"));
        announcement.finish();
    });
}

/// The owner unsubscribes while others announce without pause, and writes over the mirror's memory
/// at once, on another thread. It is the owner's: nobody reads it any more, and nothing was cloned.
#[test]
fn c06_c09_the_memory_is_the_owners_at_once() {
    struct Buffer {
        memory: Box<[u64; 64]>,
        broken: Arc<AtomicU64>,
    }
    impl Notifier for Buffer {
        type Fence = ();
        fn invalidate(&mut self, _: &Event) {
            let whole = self.memory.iter().all(|&word| word == self.memory[0]);
            self.broken.fetch_add(u64::from(!whole || self.memory[0] == !0), Ordering::Relaxed);
            let next = self.memory[0] + 1;
            self.memory.fill(next);
        }
    }
    watched(|| {
        let space = Subscriptions::new();
        let (broken, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let announcer = {
            let (space, over) = (Arc::clone(&space), Arc::clone(&over));
            task(move || {
                while !over.load(Ordering::Relaxed) {
                    drop(space.invalidate_range_start(unmap(page(1))));
                    thread::yield_now();
                }
            })
        };
        let mut memory = Box::new([0; 64]);
        for _ in 0..40 {
            memory.fill(0);
            let address = memory.as_ptr();
            let buffer = Buffer { memory, broken: Arc::clone(&broken) };
            let mirror = space.subscribe(page(1), buffer).unwrap();
            let buffer = mirror.unsubscribe().expect("the space lives");
            assert_eq!(buffer.memory.as_ptr(), address);
            memory = buffer.memory;
            memory.fill(!0);
        }
        over.store(true, Ordering::Relaxed);
        announcer.finish();
        assert_eq!(broken.load(Ordering::Relaxed), 0);
    });
}

/// The address space dies and nobody unsubscribes. The subscription stays what it was, a value of
/// its owner that answers every question, until the owner ends it.
#[test]
fn c07_death_leaves_a_valid_subscription() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let mut mirror = space.subscribe(page(1), Recorder::new("mirror", &log)).unwrap();
        space.release();
        space.release();
        assert_eq!(log.take(), ["mirror start Release", "mirror release"]);
        assert_eq!(space.live(), 1);
        assert_eq!(mirror.range(), page(1));
        assert!(mirror.name().contains("Recorder"));
        assert_eq!(mirror.set_range(page(2)), Err(Released));
        assert_eq!(mirror.read_begin().map(drop), Err(Released));
        drop(space.invalidate_range_start(unmap(page(1))));
        assert!(mirror.unsubscribe().is_none());
        assert_eq!(space.live(), 0);
        assert_eq!(log.take(), [""; 0]);
    });
}

/// Seed 003. T1: release is inside the mirror's callback, which waits for a fault worker. The
/// worker migrates: it announces changes over this range and others, subscribes, and unsubscribes.
/// All of that goes through, and release finishes.
#[test]
fn d01_no_lock_is_held_while_a_release_runs() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let other = space.subscribe(page(2), Recorder::new("other", &log)).unwrap();
        let (quit, work) = channel::<()>();
        let (done, wait) = channel::<()>();
        let worker = {
            let space = Arc::clone(&space);
            task(move || {
                // Works until it is told to stop, and then does one more thing.
                let _ = work.recv();
                drop(space.invalidate_range_start(Event::new(EventKind::Migrate, pages(0, 8))));
                let late = space.subscribe(page(3), Recorder::new("late", &Log::new()));
                assert_eq!(
                    late.err().map(|refused| refused.reason),
                    Some(SubscribeError::Released)
                );
                drop(other);
                drop(done);
            })
        };
        let mirror = Recorder::new("mirror", &log).on_release(move || {
            drop(quit);
            // Ends when the worker does. A callback must not panic, so the test looks afterwards.
            let _ = wait.recv_timeout(soon() - at_once());
        });
        let mirror = space.subscribe(page(1), mirror).unwrap();
        let death = release(&space);
        worker.finish();
        death.finish();
        assert!(mirror.unsubscribe().is_none());
        let calls = [
            "mirror start Release",
            "other start Release",
            "mirror release",
            "other start Migrate",
            "other start Release",
        ];
        assert_eq!(log.take(), calls);
    });
}

/// Seed 003. A worker is in the middle of a migration, past its last lock, when the address space
/// dies. The death tells the device to stop, and waits. The worker announces, looks, and ends when
/// it likes; only then is the mirror released, and does the death return.
#[test]
fn d02_d04_d05_d06_death_waits_for_a_migration_under_way() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let mirror = space.subscribe(page(1), Recorder::new("mirror", &log)).unwrap();
        let (middle, stopped) = stop();
        let worker = {
            let (handle, log) = ((*mirror).clone(), log.clone());
            task(move || {
                let operation = handle.begin_operation().unwrap();
                middle.here();
                let event = Event::new(EventKind::Migrate, page(1));
                let change = operation.space().invalidate_range_start(event);
                assert_eq!(operation.handle().inspect(|device| device.table.len()), Ok(0));
                drop(change);
                log.note("migration ends");
            })
        };
        stopped.wait();
        let death = release(&space);
        death.is_waiting();
        assert_eq!(log.so_far(), ["mirror start Release"]);
        assert_eq!(mirror.begin_operation().map(drop), Err(Released), "no new work");
        stopped.go();
        worker.finish();
        death.finish();
        let order = ["mirror start Release", "migration ends", "mirror release"];
        assert_eq!(log.take().iter().filter(|c| !c.contains("Migrate")).collect::<Vec<_>>(), order);
        drop(mirror);
    });
}

/// A mirror is being unsubscribed, and waits for its operation, when the address space dies. The
/// operation still uses the address space, so the death waits for it as well.
#[test]
fn d02_death_waits_for_an_operation_of_a_mirror_that_is_leaving() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let mirror = space.subscribe(page(1), Recorder::new("mirror", &log)).unwrap();
        let operation = mirror.begin_operation().unwrap();
        let unfinished = mirror.unsubscribe_deadline(in_a_while()).expect_err("it is in use");
        let unsubscribe = task(move || unfinished.subscription.unsubscribe().is_some());
        unsubscribe.is_waiting();
        let death = release(&space);
        death.is_waiting();
        drop(operation);
        death.finish();
        assert!(unsubscribe.finish());
        assert_eq!(log.take(), ["mirror start Release"]);
    });
}

/// A death with a deadline gives up while an operation lasts, says so, and goes on where it stopped
/// when it is called again; each device is told to stop once and released once.
#[test]
fn d02_a_death_that_gave_up_goes_on_where_it_stopped() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let one = space.subscribe(page(1), Recorder::new("one", &log)).unwrap();
        let two = space.subscribe(page(2), Recorder::new("two", &log)).unwrap();
        let operation = one.begin_operation().unwrap();
        assert_eq!(space.release_deadline(in_a_while()), Err(TimedOut));
        assert_eq!(space.release_deadline(at_once()), Err(TimedOut));
        assert_eq!(two.read_begin().map(drop), Err(Released));
        assert_eq!(log.take(), ["one start Release", "two start Release"]);
        drop(operation);
        assert_eq!(space.release_deadline(soon()), Ok(()));
        assert_eq!(log.take(), ["one release", "two release"]);
        assert!(one.unsubscribe().is_none() && two.unsubscribe().is_none());
    });
}

/// A driver stops new work and does not wait for the old: it leaves an operation behind. The death
/// does not return over it, and the dump names the subscriber that is in use.
#[test]
fn d03_an_operation_left_behind_is_reported() {
    watched(|| {
        let space = Subscriptions::new();
        let options = SubscribeOptions::new().name("a driver that does not wait");
        let mirror = Recorder::new("mirror", &Log::new());
        let mirror = space.subscribe_with(page(1), mirror, options).unwrap();
        std::mem::forget(mirror.begin_operation().unwrap());
        let death = {
            let space = Arc::clone(&space);
            task(move || space.release_deadline(Instant::now() + 4 * A_WHILE))
        };
        death.is_waiting();
        let dump = format!("{space:?}");
        let releasing = dump.split("releasing: ").nth(1).expect("the dump says who is released");
        assert!(releasing.contains("a driver that does not wait"), "{dump}");
        assert!(releasing.contains("calls_and_operations: 1"), "{dump}");
        assert_eq!(death.finish(), Err(TimedOut));
        // It cannot be unsubscribed either, as long as the operation lasts.
        let unfinished = mirror.unsubscribe_deadline(at_once()).expect_err("it is in use");
        std::mem::forget(unfinished);
    });
}

/// A death is waiting for an operation when somebody announces a change, and gives up before that
/// change is over. The change ends, the operation ends, and the owner has the mirror back: what
/// began while the mirror was out of the index does not count against it, nor for it.
#[test]
fn d02_a_change_across_a_death_that_gave_up() {
    watched(|| {
        for begins_before in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let mirror = space.subscribe(page(1), Recorder::new("mirror", &log)).unwrap();
            let other = space.subscribe(page(2), Recorder::new("other", &Log::new())).unwrap();
            let operation = mirror.begin_operation().unwrap();
            let before = begins_before.then(|| Change::begin(&space, unmap(page(1))));
            let death = {
                let space = Arc::clone(&space);
                task(move || space.release_deadline(Instant::now() + 4 * A_WHILE))
            };
            while space.find::<Recorder>(0x1000).is_some() {
                thread::yield_now();
            }
            let across = match before {
                Some(change) => {
                    change.end();
                    None
                }
                None => Some(Change::begin(&space, unmap(page(1)))),
            };
            assert_eq!(death.finish(), Err(TimedOut));
            if let Some(change) = across {
                change.end();
            }
            let dump = format!("{mirror:?}");
            drop(operation);
            let handed_back = mirror.unsubscribe().is_some();
            assert!(dump.contains("changes_under_way: 0"), "{dump}");
            assert!(handed_back, "nobody released it: {dump}");
            assert!(!log.take().contains(&"mirror release".to_owned()));
            assert_eq!(space.release_deadline(soon()), Ok(()));
            assert!(other.unsubscribe().is_none());
            assert_eq!(space.live(), 0);
        }
    });
}

/// A death gives up over an operation, and nobody calls it again. The owner unsubscribes, before or
/// after the operation has ended, and has the notifier back.
#[test]
fn b13_d12_unsubscribing_after_a_death_that_gave_up() {
    watched(|| {
        for waits_already in [false, true] {
            let (space, log) = (Subscriptions::new(), Log::new());
            let mirror = space.subscribe(page(1), Recorder::new("mirror", &log)).unwrap();
            let operation = mirror.begin_operation().unwrap();
            let death = {
                let space = Arc::clone(&space);
                task(move || space.release_deadline(Instant::now() + 4 * A_WHILE))
            };
            let unsubscribe = if waits_already {
                while space.find::<Recorder>(0x1000).is_some() {
                    thread::yield_now();
                }
                let unsubscribe = task(move || mirror.unsubscribe().is_some());
                unsubscribe.is_waiting();
                assert_eq!(death.finish(), Err(TimedOut));
                unsubscribe
            } else {
                assert_eq!(death.finish(), Err(TimedOut));
                task(move || mirror.unsubscribe().is_some())
            };
            unsubscribe.is_waiting();
            drop(operation);
            assert!(unsubscribe.finish());
            // By the death, and by its own end.
            assert_eq!(log.take(), ["mirror start Release", "mirror start Release"]);
            assert_eq!(space.release_deadline(soon()), Ok(()));
        }
    });
}

/// Three mirrors. All are told to stop first; then one is unlinked and released while the others
/// are still linked, and so on. While the first is released nobody can be added, and each ends
/// once.
#[test]
fn d08_one_after_the_other_is_unlinked_and_released() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let look = |at: &'static str| {
            let (space, log) = (Arc::clone(&space), log.clone());
            move || {
                let linked = (1..=3).filter(|n| space.find::<Recorder>(n * 0x1000).is_some());
                log.note(format!("{at}: {:?} linked", linked.collect::<Vec<_>>()));
                if let Ok(late) = space.subscribe(page(1), Recorder::new("late", &log)) {
                    log.note(format!("{at}: {late:?} could subscribe"));
                }
            }
        };
        let mirror = |n: u64, name: &'static str| {
            let mirror = Recorder::new(name, &log).on_release(look(name));
            space.subscribe(page(n), mirror).unwrap()
        };
        let all = [mirror(1, "one"), mirror(2, "two"), mirror(3, "three")];
        release(&space).finish();
        let calls = [
            "one start Release",
            "two start Release",
            "three start Release",
            "one release",
            "one: [2, 3] linked",
            "two release",
            "two: [3] linked",
            "three release",
            "three: [] linked",
        ];
        assert_eq!(log.take(), calls);
        assert!(all.into_iter().all(|mirror| mirror.unsubscribe().is_none()));
        assert_eq!(log.take(), [""; 0]);
    });
}

/// Two threads subscribe without pause and never unsubscribe. The death comes to its end, they are
/// refused from then on, and every mirror that was taken before has been released.
#[test]
fn d09_death_ends_although_others_keep_subscribing() {
    watched(|| {
        let space = Subscriptions::new();
        let (released, dropped) = (Arc::default(), Arc::default());
        let (begun, first) = channel();
        let adders: Vec<_> = (0..2)
            .map(|_| {
                let (space, begun) = (Arc::clone(&space), begun.clone());
                let (released, dropped) = (Arc::clone(&released), Arc::clone(&dropped));
                task(move || {
                    let mut mine = Vec::new();
                    loop {
                        let (released, dropped) = (Arc::clone(&released), Arc::clone(&dropped));
                        match space.subscribe(page(1), Counted { released, dropped }) {
                            Ok(mirror) => mine.push(mirror),
                            Err(refused) => {
                                assert_eq!(refused.reason, SubscribeError::Released);
                                return mine;
                            }
                        }
                        let _ = begun.send(());
                    }
                })
            })
            .collect();
        first.recv().unwrap();
        release(&space).finish();
        let all: Vec<_> = adders.into_iter().flat_map(|adder| adder.finish()).collect();
        let released = released.load(Ordering::Relaxed);
        assert_eq!(all.len() as u64, released);
        assert_eq!(dropped.load(Ordering::Relaxed), released + 2, "and the two that were refused");
    });
}

/// A read section begins, the address space dies, and then the commit comes: it fails. No other
/// section begins, not even while the death is still at another mirror.
#[test]
fn d10_nothing_is_committed_after_death() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let mirror = space.subscribe(page(2), Recorder::new("mirror", &log)).unwrap();
        assert!(translate(&mirror, 0x2000, 1));
        let section = mirror.read_begin().unwrap();
        let (inside, stopped) = stop();
        let first = Recorder::new("first", &Log::new()).on_release(move || inside.here());
        let first = space.subscribe(page(1), first).unwrap();
        let death = release(&space);
        stopped.wait();
        assert_eq!(mirror.read_begin().map(drop), Err(Released));
        assert_eq!(translation(&mirror, 0x2000), None, "it was told to stop before");
        assert!(section.check_retry());
        stopped.go();
        death.finish();
        assert!(section.check_retry());
        assert_eq!(section.commit().err(), Some(Retry));
        assert_eq!(mirror.read_begin().map(drop), Err(Released));
        drop(first);
    });
}

/// A reader sleeps because its range changes, and the address space dies meanwhile: it is woken and
/// told, and does not wait for the end of the change.
#[test]
fn d10_death_wakes_a_reader() {
    watched(|| {
        let space = Subscriptions::new();
        let mirror = space.subscribe(page(1), Recorder::new("mirror", &Log::new())).unwrap();
        let running = Change::begin(&space, unmap(page(1)));
        let handle = (*mirror).clone();
        let reader = task(move || handle.read_begin_deadline(soon()).map(drop));
        reader.is_waiting();
        release(&space).finish();
        assert_eq!(reader.finish(), Err(ReadBeginError::Released(Released)));
        running.end();
        drop(mirror);
    });
}

/// The order in which a device stops is fixed and visible to its driver: no new faults, then what
/// was under way ends, then the channels are killed. A driver can do its part at each step.
#[test]
fn d11_stop_then_drain_then_kill() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (begin, begun) = stop();
        let mirror = {
            let (stops, kills) = (log.clone(), log.clone());
            Recorder::new("mirror", &Log::new())
                .on_start(move |_| stops.note("faults stopped"))
                .on_fence({
                    let stops = log.clone();
                    move |_| stops.note("channels idle")
                })
                .on_release(move || kills.note("channels killed"))
        };
        let mirror = space.subscribe(page(1), mirror).unwrap();
        let worker = {
            let (handle, log) = ((*mirror).clone(), log.clone());
            task(move || {
                let operation = handle.begin_operation().unwrap();
                begin.here();
                log.note("drained");
                drop(operation);
            })
        };
        begun.wait();
        let death = release(&space);
        while log.so_far().len() < 2 {
            thread::yield_now();
        }
        death.is_waiting();
        begun.go();
        worker.finish();
        death.finish();
        let order = ["faults stopped", "channels idle", "drained", "channels killed"];
        assert_eq!(log.take(), order);
        drop(mirror);
    });
}

/// Two threads let the same address space die. The second waits for the first, and neither release
/// nor stop runs twice; a third call returns at once.
#[test]
fn b08_d08_two_deaths_are_one() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let (inside, stopped) = stop();
        let mirror = Recorder::new("mirror", &log).on_release(move || inside.here());
        let mirror = space.subscribe(page(1), mirror).unwrap();
        let first = release(&space);
        stopped.wait();
        assert_eq!(space.release_deadline(at_once()), Err(TimedOut));
        let second = release(&space);
        second.is_waiting();
        stopped.go();
        first.finish();
        second.finish();
        assert_eq!(space.release_deadline(at_once()), Ok(()));
        assert_eq!(log.take(), ["mirror start Release", "mirror release"]);
        drop(mirror);
    });
}

/// Layers above put off what waits, by asking where they are.
#[test]
fn a_thread_knows_whether_it_is_in_a_callback() {
    watched(|| {
        let (space, log) = (Subscriptions::new(), Log::new());
        let tell = |place: &'static str| {
            let log = log.clone();
            move || {
                if in_callback() {
                    log.note(place);
                }
            }
        };
        let (start, fence, end) = (tell("in a start"), tell("in a fence"), tell("in a release"));
        let mirror = Recorder::new("mirror", &Log::new())
            .with_fences()
            .on_start(move |_| start())
            .on_fence(move |_| fence())
            .on_release(end);
        let mirror = space.subscribe(page(1), mirror).unwrap();
        assert!(!in_callback());
        let guard = space.invalidate_range_start(unmap(page(1)));
        assert!(!in_callback(), "an announcement that is made is no callback");
        drop(guard);
        assert_eq!(log.take(), ["in a start", "in a fence"]);
        space.release();
        assert!(!in_callback());
        assert_eq!(log.take(), ["in a start", "in a fence", "in a release"]);
        drop(mirror);
    });
}
