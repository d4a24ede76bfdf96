//! What allocates, and that nothing does where the allocator might be waiting for us.
//!
//! The allocator of this binary counts for each thread what it is asked for, notes what it is asked
//! for under a registry lock, and refuses what a test wants refused.
#![cfg(not(any(loom, shuttle)))]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use mmu_notifier::{
    Class, Event, EventKind, Fence, Notifier, Owner, PairedNotifier, SubscribeError,
    SubscribeOptions, Subscription, Subscriptions, TimedOut, VaRange, WouldBlock,
};

// The allocator.

struct Watching;

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// What was asked of the allocator on one thread. A constant without destructor, so that looking at
/// it never allocates, and works as long as the thread does.
struct Watch {
    allocations: Cell<u64>,
    frees: Cell<u64>,
    /// Bytes allocated less bytes freed.
    balance: Cell<i64>,
    /// How often the allocator was called under a registry lock.
    under_lock: Cell<u64>,
    /// Counts as a registry lock: to see that the watch sees.
    pretended_lock: Cell<bool>,
    /// Requests of so many bytes and more fail.
    refuse_from: Cell<usize>,
}

thread_local! {
    static WATCH: Watch = const {
        Watch {
            allocations: Cell::new(0),
            frees: Cell::new(0),
            balance: Cell::new(0),
            under_lock: Cell::new(0),
            pretended_lock: Cell::new(false),
            refuse_from: Cell::new(usize::MAX),
        }
    };
}

fn add<T: Copy + std::ops::Add<Output = T>>(cell: &Cell<T>, n: T) {
    cell.set(cell.get() + n);
}

/// Notes a request to allocate. Says whether to grant it.
fn allocates(bytes: usize) -> bool {
    WATCH.with(|watch| {
        note_lock(watch);
        if bytes >= watch.refuse_from.get() {
            return false;
        }
        add(&watch.allocations, 1);
        add(&watch.balance, bytes as i64);
        true
    })
}

/// Notes a request to free.
fn frees(bytes: usize) {
    WATCH.with(|watch| {
        note_lock(watch);
        add(&watch.frees, 1);
        add(&watch.balance, -(bytes as i64));
    });
}

fn note_lock(watch: &Watch) {
    if mmu_notifier::holds_registry_lock() || watch.pretended_lock.get() {
        add(&watch.under_lock, 1);
    }
}

// SAFETY: each method hands its arguments to `System`, which is an allocator, and returns what that
// returns; or it returns null, which an allocator may at any time. Noting a request neither
// allocates nor unwinds.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !allocates(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller keeps the contract of this method, which is that of the other.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !allocates(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller keeps the contract of this method, which is that of the other.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        frees(layout.size());
        // SAFETY: the caller keeps the contract of this method, which is that of the other; all
        // memory that this allocator hands out comes from the other.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if !allocates(bytes) {
            return std::ptr::null_mut();
        }
        frees(layout.size());
        // SAFETY: the caller keeps the contract of this method, which is that of the other; all
        // memory that this allocator hands out comes from the other.
        unsafe { System.realloc(memory, layout, bytes) }
    }
}

/// How often `f` allocates and frees, on this thread.
fn count<R>(f: impl FnOnce() -> R) -> (R, u64, u64) {
    let now = || WATCH.with(|watch| (watch.allocations.get(), watch.frees.get()));
    let before = now();
    let result = f();
    let after = now();
    (result, after.0 - before.0, after.1 - before.1)
}

/// Demands that `f` neither allocates nor frees.
#[track_caller]
fn assert_untouched<R>(what: &str, f: impl FnOnce() -> R) -> R {
    let (result, allocations, frees) = count(f);
    assert_eq!((allocations, frees), (0, 0), "allocations and frees of {what}");
    result
}

/// Demands that `f` does not allocate; it may free.
#[track_caller]
fn assert_no_allocation<R>(what: &str, f: impl FnOnce() -> R) -> R {
    let (result, allocations, _) = count(f);
    assert_eq!(allocations, 0, "allocations of {what}");
    result
}

/// Runs `f` while requests of `bytes` and more fail on this thread.
fn refusing_from<R>(bytes: usize, f: impl FnOnce() -> R) -> R {
    WATCH.with(|watch| watch.refuse_from.set(bytes));
    let result = f();
    WATCH.with(|watch| watch.refuse_from.set(usize::MAX));
    result
}

fn balance() -> i64 {
    WATCH.with(|watch| watch.balance.get())
}

/// How often this thread called the allocator under a registry lock.
fn calls_under_lock() -> u64 {
    WATCH.with(|watch| watch.under_lock.get())
}

/// The watch counts, sees calls under a lock, and refuses.
#[test]
fn the_watch_sees() {
    let ((), allocations, frees) = count(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!((allocations, frees), (1, 1));

    assert_eq!(calls_under_lock(), 0);
    WATCH.with(|watch| watch.pretended_lock.set(true));
    let mut bytes = std::hint::black_box(vec![1_u8]);
    bytes.reserve_exact(100);
    drop(std::hint::black_box(bytes));
    WATCH.with(|watch| watch.pretended_lock.set(false));
    assert_eq!(calls_under_lock(), 4, "allocated, moved (twice noted), and freed");

    let before = balance();
    let refused = refusing_from(4096, || Vec::<u8>::new().try_reserve_exact(4096));
    assert!(refused.is_err());
    assert!(refusing_from(4096, || Vec::<u8>::new().try_reserve_exact(4095)).is_ok());
    assert_eq!(balance(), before);
}

// The subscribers.

/// Has nothing to wait for.
struct Plain(usize);

impl Notifier for Plain {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {}

    fn try_invalidate(&mut self, _: &Event) -> Result<(), WouldBlock> {
        Ok(())
    }
}

impl PairedNotifier for Plain {
    fn invalidate_range_end(&mut self, _: &Event) {}
}

/// Has to be waited for.
struct Slow;

/// Not without size: a box for it would show.
struct Flushed(u64);

impl Fence for Flushed {
    fn wait(self) {
        assert_eq!(self.0, 7);
    }
}

impl Notifier for Slow {
    type Fence = Flushed;

    fn invalidate(&mut self, _: &Event) -> Flushed {
        Flushed(7)
    }

    fn try_invalidate(&mut self, _: &Event) -> Result<Flushed, WouldBlock> {
        Ok(Flushed(7))
    }
}

impl PairedNotifier for Slow {
    fn invalidate_range_end(&mut self, _: &Event) {}
}

/// Refuses.
struct Stubborn;

impl Notifier for Stubborn {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {}
}

fn page(number: usize) -> VaRange {
    VaRange::new(number as u64 * 4096, 4096).unwrap()
}

fn pages(count: usize) -> VaRange {
    VaRange::new(0, count as u64 * 4096).unwrap()
}

fn unmap(range: VaRange) -> Event {
    Event::new(EventKind::Unmap, range)
}

fn subscribe<N: Notifier>(
    space: &Arc<Subscriptions>,
    count: usize,
    notifier: impl Fn(usize) -> N,
) -> Vec<Subscription<N>> {
    (0..count).map(|n| space.subscribe(page(n), notifier(n)).unwrap()).collect()
}

/// Lets this thread be known to the locks of this crate: that allocates, once a thread.
fn introduce_thread() {
    let space = Subscriptions::new();
    let subscription = space.subscribe(page(0), Plain(0)).unwrap();
    drop(space.invalidate_range_start(unmap(page(0))));
    drop(subscription.read_begin().unwrap().commit().unwrap());
}

// Nothing allocates or frees under the registry lock.

/// Calls everything there is, in sizes that make everything grow.
fn drive_everything() {
    let space = Subscriptions::new();
    // Changes that nobody hears, as many as there are lists to grow.
    let unheard: Vec<_> = (0..20).map(|n| space.invalidate_range_start(unmap(page(n)))).collect();
    // The index grows at 64, 192, and 448 subscriptions.
    let mut plain = Vec::new();
    let mut slow = Vec::new();
    for n in 0..500 {
        if n % 2 == 0 {
            plain.push(space.subscribe(page(n), Plain(n)).unwrap());
            continue;
        }
        let mut options = SubscribeOptions::new().name("slow").owner(Owner::new());
        if n % 4 == 1 {
            options = options.statistics().class(Class::List);
        }
        slow.push(space.subscribe_paired(page(n), Slow, options).unwrap());
    }
    drop(unheard);
    let all = space.subscribe_all(Stubborn).unwrap();
    drop(format!("{space:?} {all:?}"));
    // Read sections, first ones and later ones, some of which collide.
    for _ in 0..2 {
        for subscription in &plain {
            let section = subscription.read_begin().unwrap();
            drop(section.commit().unwrap());
        }
        for subscription in &slow {
            let section = subscription.read_begin().unwrap();
            drop(space.invalidate_range_start(unmap(VaRange::ALL)));
            assert!(section.commit().is_err());
            subscription.statistics();
        }
        drop(plain[0].read_begin_deadline(Instant::now()).unwrap());
    }
    // Changes that reach none, one, .. twenty, and refusals.
    for hits in 0..=20 {
        let range = if hits == 0 { VaRange::new(u64::MAX, 1).unwrap() } else { pages(hits) };
        drop(space.invalidate_range_start(unmap(range)));
        assert!(space.try_invalidate_range_start(unmap(range)).is_err(), "all hear and refuse");
    }
    // Changes within changes, so that the list of those under way grows, more than once.
    let nested: Vec<_> =
        (0..40).map(|n| space.invalidate_range_start(unmap(page(n % 10)))).collect();
    drop(format!("{space:?}"));
    assert!(plain[0].read_begin_deadline(Instant::now()).is_err());
    // New ranges, under changes.
    for (n, subscription) in plain.iter_mut().enumerate() {
        subscription.set_range(page(1000 - n)).unwrap();
        subscription.set_range(pages(n + 1)).unwrap();
    }
    for (n, subscription) in slow.iter_mut().enumerate() {
        subscription.set_range(page(n)).unwrap();
    }
    drop(nested);
    // Lookups, found and not found.
    for n in 0..20 {
        let address = page(n).start();
        drop(space.find::<Plain>(address).unwrap());
        drop(space.find::<Slow>(address).unwrap());
        drop(space.find::<Stubborn>(address).unwrap());
        assert!(space.find::<NeverSubscribed>(address).is_none());
        assert_eq!(space.live(), 501);
    }
    // Ends, in an order that leaves holes; and a place is taken again.
    for n in (0..200).rev().step_by(3) {
        assert!(plain.swap_remove(n).unsubscribe().unwrap().0 < 500);
        drop(slow.swap_remove(n));
    }
    let refilled = subscribe(&space, 50, Plain);
    // A subscription that is dropped inside a callback.
    let inside = space.subscribe(page(0), Plain(0)).unwrap();
    let keeper = space.subscribe(page(0), Keeper(Some(inside))).unwrap();
    drop(space.invalidate_range_start(unmap(page(0))));
    assert!(keeper.unsubscribe().unwrap().0.is_none());
    // A release that gives up, and one that does not.
    let change = space.invalidate_range_start(unmap(pages(100)));
    let operation = refilled[0].begin_operation().unwrap();
    assert_eq!(space.release_deadline(Instant::now()), Err(TimedOut));
    drop(format!("{space:?}"));
    assert!(space.subscribe(page(0), Plain(0)).is_err());
    drop(operation);
    drop(change);
    space.release();
    drop(format!("{space:?}"));
    assert!(all.unsubscribe().is_none());
}

/// Drops what it holds when it is called.
struct Keeper(Option<Subscription<Plain>>);

impl Notifier for Keeper {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {
        self.0 = None;
    }
}

/// Nobody looks for it in earnest.
struct NeverSubscribed;

impl Notifier for NeverSubscribed {
    type Fence = ();

    fn invalidate(&mut self, _: &Event) {}
}

/// Whatever is called, the allocator is called under no registry lock: it might announce a change
/// (A10).
#[test]
#[cfg_attr(not(debug_assertions), ignore = "what is locked is known with debug assertions only")]
fn a10_nothing_allocates_under_the_registry_lock() {
    drive_everything();
    assert_eq!(calls_under_lock(), 0);
}

/// Neither is it where several threads want the index to grow at the same time, and all but one of
/// them have allocated for nothing (A10).
#[test]
#[cfg_attr(not(debug_assertions), ignore = "what is locked is known with debug assertions only")]
fn a10_nothing_allocates_under_the_registry_lock_in_a_crowd() {
    const THREADS: usize = 4;
    const EACH: usize = 200;
    for _ in 0..5 {
        let space = Subscriptions::new();
        let barrier = Barrier::new(THREADS);
        thread::scope(|scope| {
            let subscribe_many = || {
                barrier.wait();
                let mine = subscribe(&space, EACH, Plain);
                let changes: Vec<_> =
                    (0..20).map(|n| space.invalidate_range_start(unmap(page(n)))).collect();
                drop(changes);
                drop(mine);
                calls_under_lock()
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(subscribe_many)).collect();
            for thread in threads {
                assert_eq!(thread.join().unwrap(), 0);
            }
        });
        assert_eq!(space.live(), 0);
    }
}

/// Where there is no memory for another entry, the notifier comes back and nothing has changed;
/// when there is memory, subscribing works (A10, E21).
#[test]
fn a10_e21_a_failed_growth_leaves_no_trace() {
    introduce_thread();
    let space = Subscriptions::new();
    // The index asks for 64, 128, 256 slots and then for the nodes to go with them, which take a
    // little more than these sizes; all else is smaller.
    let mut subscriptions = Vec::new();
    for (growth, population) in [(4096, 0), (8192, 64), (16384, 192)] {
        while subscriptions.len() < population {
            let n = subscriptions.len();
            subscriptions.push(space.subscribe(page(n), Plain(n)).unwrap());
        }
        let before = (balance(), format!("{space:?}"));
        let refused = refusing_from(growth, || space.subscribe(page(0), Plain(7777)));
        let refused = refused.expect_err("there is no memory");
        assert_eq!(refused.reason, SubscribeError::OutOfMemory);
        assert_eq!(refused.notifier.0, 7777, "it comes back");
        let now = format!("{space:?}");
        assert_eq!(now, before.1);
        drop(now);
        assert_eq!(balance(), before.0 + before.1.capacity() as i64, "memory is kept");
        assert_eq!(space.live(), population);
        drop(space.invalidate_range_start(unmap(VaRange::ALL)));
        let n = subscriptions.len();
        subscriptions.push(space.subscribe(page(n), Plain(n)).unwrap());
    }
    for (n, subscription) in subscriptions.into_iter().enumerate() {
        assert_eq!(subscription.unsubscribe().unwrap().0, n);
    }
}

// What an announcement costs.

/// Announces and reads, and demands that nothing is allocated or freed.
fn assert_announcements_untouched<N: Notifier>(notifier: impl Fn(usize) -> N) {
    introduce_thread();
    let space = Subscriptions::new();
    assert_untouched("a change that nobody hears", || {
        drop(space.invalidate_range_start(unmap(VaRange::ALL)));
        drop(space.try_invalidate_range_start(unmap(VaRange::ALL)));
    });
    let mut subscriptions = Vec::new();
    for hits in 1..=8 {
        let options = SubscribeOptions::new();
        let options = if hits % 2 == 0 { options.statistics().class(Class::List) } else { options };
        let subscription = space.subscribe_with(page(hits), notifier(hits), options).unwrap();
        subscriptions.push(subscription);
        assert_untouched(&format!("a change that {hits} hear"), || {
            drop(space.invalidate_range_start(unmap(VaRange::ALL)));
            let change = space.try_invalidate_range_start(unmap(VaRange::ALL));
            assert!(change.is_ok());
        });
        assert_untouched("changes within changes", || {
            let _changes: [_; 8] =
                std::array::from_fn(|_| space.invalidate_range_start(unmap(VaRange::ALL)));
        });
        for subscription in &subscriptions {
            assert_untouched("a read section", || {
                drop(subscription.read_begin().unwrap().commit().unwrap());
                let section = subscription.read_begin().unwrap();
                drop(space.invalidate_range_start(unmap(subscription.range())));
                assert!(section.check_retry());
                assert!(section.commit().is_err());
                let _change = space.invalidate_range_start(unmap(subscription.range()));
                assert!(subscription.read_begin_deadline(Instant::now()).is_err());
            });
        }
    }
}

/// A change allocates nothing, whether nobody hears of it or up to eight do, and neither does a
/// read section (A15).
#[test]
fn a15_an_announcement_allocates_nothing() {
    assert_announcements_untouched(Plain);
}

/// Nor does it where there are fences to be waited for (A15).
#[test]
fn a15_an_announcement_with_fences_allocates_nothing() {
    assert_announcements_untouched(|_| Slow);
}

/// Ending a subscription allocates nothing: it works where there is no memory (A16).
#[test]
fn a16_unsubscribe_allocates_nothing() {
    introduce_thread();
    let space = Subscriptions::new();
    let plain = subscribe(&space, 100, Plain);
    let slow: Vec<_> = (0..100)
        .map(|n| space.subscribe_paired(page(n), Slow, SubscribeOptions::new()).unwrap())
        .collect();
    let _change = space.invalidate_range_start(unmap(pages(3)));
    for (n, (plain, slow)) in plain.into_iter().zip(slow).enumerate() {
        assert_no_allocation("an unsubscription", || {
            if n % 2 == 0 {
                assert_eq!(plain.unsubscribe().unwrap().0, n);
                assert!(slow.unsubscribe().is_some());
            } else {
                let ended = plain.unsubscribe_deadline(Instant::now());
                assert!(ended.is_ok_and(|notifier| notifier.is_some()));
                drop(slow);
            }
        });
    }
    assert_eq!(space.live(), 0);
    let released = subscribe(&space, 8, Plain);
    space.release();
    for subscription in released {
        assert_no_allocation("an unsubscription after a release", || {
            assert!(subscription.unsubscribe().is_none());
        });
    }
}

/// Releases an address space that eight, or fewer, are subscribed to.
fn assert_release_allocates_nothing<N: PairedNotifier>(notifier: impl Fn(usize) -> N) {
    introduce_thread();
    for paired in [false, true] {
        for count in 0..=8 {
            let space = Subscriptions::new();
            let subscribe = |n| {
                let class = if n % 2 == 0 { Class::Interval } else { Class::List };
                let options = SubscribeOptions::new().class(class);
                if paired {
                    space.subscribe_paired(page(n), notifier(n), options).unwrap()
                } else {
                    space.subscribe_with(page(n), notifier(n), options).unwrap()
                }
            };
            let subscriptions: Vec<_> = (0..count).map(subscribe).collect();
            let what = format!("a release of {count}, who hear of ends: {paired}");
            assert_no_allocation(&what, || space.release());
            drop(subscriptions);
            assert_eq!(space.live(), 0);
        }
    }
}

/// The death of an address space that up to eight are subscribed to allocates nothing (A17).
#[test]
fn a17_release_allocates_nothing() {
    assert_release_allocates_nothing(Plain);
}

/// Nor does it where there are fences to be waited for (A17).
#[test]
fn a17_release_with_fences_allocates_nothing() {
    assert_release_allocates_nothing(|_| Slow);
}
