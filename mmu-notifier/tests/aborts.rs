//! Misuse that ends the process by name, and waits for oneself that are refused instead.
//!
//! What ends the process runs in a child: this binary once more, with one of the ignored tests
//! below, which do nothing unless the environment says that they are such a child.
#![cfg(not(any(loom, shuttle)))]

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mmu_notifier::{
    Event, EventKind, Fence, Handle, Notifier, Owner, PairedNotifier, ReadBeginError, SelfWait,
    SubscribeOptions, Subscription, Subscriptions, TimedOut, UnsubscribeError, VaRange, WouldBlock,
};

/// Set in a child, so that nobody who runs ignored tests runs into them.
const CHILD: &str = "MMU_NOTIFIER_ABORTS_CHILD";

/// What a child calls its subscriber, and its death must name.
const NAME: &str = "the device called gpu0";

const SIGABRT: i32 = 6;

/// How long a child may live: one that waits for itself would live for ever.
const PATIENCE: Duration = Duration::from_secs(60);

fn page(number: u64) -> VaRange {
    VaRange::new(number * 4096, 4096).unwrap()
}

fn unmap(range: VaRange) -> Event {
    Event::new(EventKind::Unmap, range)
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Runs the ignored test `child` in a process of its own, and demands that it dies by `SIGABRT`
/// with the subscriber's name and all of `words` in its last words.
#[track_caller]
fn assert_aborts(child: &str, words: &[&str]) {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", child, "--nocapture", "--test-threads=1"])
        .env(CHILD, child)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = process.stderr.take().unwrap();
    let (send, receive) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        // Nobody listens where the child was too slow.
        let _ = send.send(String::from_utf8_lossy(&text).into_owned());
    });
    let text = receive.recv_timeout(PATIENCE);
    if text.is_err() {
        process.kill().unwrap();
    }
    let status = process.wait().unwrap();
    reader.join().unwrap();
    let text = text.unwrap_or_else(|_| panic!("{child} hangs"));
    assert_eq!(status.signal(), Some(SIGABRT), "{child}: {status}, and said:\n{text}");
    for word in words.iter().chain(&[NAME, "mmu-notifier", "aborting"]) {
        assert!(text.contains(word), "{child} died without the words {word:?}; it said:\n{text}");
    }
}

/// Tells whether this process is the child that runs `name`.
fn is_child(name: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|child| child == name)
}

/// Something to be called once.
type Once<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Does in each call what it is told to, once.
#[derive(Default)]
struct Puppet {
    in_invalidate: Option<Once<'static>>,
    in_try_invalidate: Option<Once<'static>>,
    in_end: Option<Once<'static>>,
    in_release: Option<Once<'static>>,
    in_fence: Option<Once<'static>>,
    calls: usize,
}

impl std::fmt::Debug for Puppet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Puppet").field("calls", &self.calls).finish_non_exhaustive()
    }
}

/// Does while it is waited for what it is told to.
struct Strings(Once<'static>);

impl Fence for Strings {
    fn wait(self) {
        (self.0)();
    }
}

/// Calls what is there to be called.
fn call(action: Option<Once<'_>>) {
    if let Some(action) = action {
        action();
    }
}

impl Notifier for Puppet {
    type Fence = Option<Strings>;

    fn invalidate(&mut self, _: &Event) -> Option<Strings> {
        self.calls += 1;
        call(self.in_invalidate.take());
        self.in_fence.take().map(Strings)
    }

    /// Refuses where it has nothing to do.
    fn try_invalidate(&mut self, _: &Event) -> Result<Option<Strings>, WouldBlock> {
        self.calls += 1;
        self.in_try_invalidate.take().ok_or(WouldBlock)?();
        Ok(self.in_fence.take().map(Strings))
    }

    fn release(mut self) {
        call(self.in_release.take());
    }
}

impl PairedNotifier for Puppet {
    fn invalidate_range_end(&mut self, _: &Event) {
        call(self.in_end.take());
    }
}

fn subscribe(space: &Arc<Subscriptions>, range: VaRange, puppet: Puppet) -> Subscription<Puppet> {
    space.subscribe_paired(range, puppet, SubscribeOptions::new().name(NAME)).unwrap()
}

/// Subscribes a puppet that panics wherever `make` says.
fn subscribe_panicking(
    make: impl FnOnce(Option<Once<'static>>) -> Puppet,
) -> (Arc<Subscriptions>, Subscription<Puppet>) {
    let space = Subscriptions::new();
    let action: Once<'static> = Box::new(|| panic!("a driver's bug"));
    let subscription = subscribe(&space, page(0), make(Some(action)));
    (space, subscription)
}

/// A panic in `invalidate` ends the process: the device may be running still.
#[test]
fn a_panic_in_invalidate_aborts() {
    assert_aborts("child_panics_in_invalidate", &["a driver's bug", "panicked"]);
}

#[test]
#[ignore = "runs as a child of a_panic_in_invalidate_aborts"]
fn child_panics_in_invalidate() {
    if is_child("child_panics_in_invalidate") {
        let (space, _subscription) =
            subscribe_panicking(|in_invalidate| Puppet { in_invalidate, ..Puppet::default() });
        let _ = catch_unwind(AssertUnwindSafe(|| {
            drop(space.invalidate_range_start(unmap(page(0))));
        }));
    }
}

/// A panic in `try_invalidate` ends the process, it is not a refusal.
#[test]
fn a_panic_in_try_invalidate_aborts() {
    assert_aborts("child_panics_in_try_invalidate", &["a driver's bug", "panicked"]);
}

#[test]
#[ignore = "runs as a child of a_panic_in_try_invalidate_aborts"]
fn child_panics_in_try_invalidate() {
    if is_child("child_panics_in_try_invalidate") {
        let (space, _subscription) = subscribe_panicking(|in_try_invalidate| Puppet {
            in_try_invalidate,
            ..Puppet::default()
        });
        let _ = catch_unwind(AssertUnwindSafe(|| {
            drop(space.try_invalidate_range_start(unmap(page(0))));
        }));
    }
}

/// A panic in a fence's `wait` ends the process.
#[test]
fn a_panic_in_a_fence_aborts() {
    assert_aborts("child_panics_in_a_fence", &["a driver's bug", "panicked"]);
}

#[test]
#[ignore = "runs as a child of a_panic_in_a_fence_aborts"]
fn child_panics_in_a_fence() {
    if is_child("child_panics_in_a_fence") {
        let (space, _subscription) =
            subscribe_panicking(|in_fence| Puppet { in_fence, ..Puppet::default() });
        let _ = catch_unwind(AssertUnwindSafe(|| {
            drop(space.invalidate_range_start(unmap(page(0))));
        }));
    }
}

/// A panic in `invalidate_range_end` ends the process.
#[test]
fn a_panic_in_invalidate_range_end_aborts() {
    assert_aborts("child_panics_in_invalidate_range_end", &["a driver's bug", "panicked"]);
}

#[test]
#[ignore = "runs as a child of a_panic_in_invalidate_range_end_aborts"]
fn child_panics_in_invalidate_range_end() {
    if is_child("child_panics_in_invalidate_range_end") {
        let (space, _subscription) =
            subscribe_panicking(|in_end| Puppet { in_end, ..Puppet::default() });
        let _ = catch_unwind(AssertUnwindSafe(|| {
            drop(space.invalidate_range_start(unmap(page(0))));
        }));
    }
}

/// A panic in `release` ends the process.
#[test]
fn a_panic_in_release_aborts() {
    assert_aborts("child_panics_in_release", &["a driver's bug", "panicked"]);
}

#[test]
#[ignore = "runs as a child of a_panic_in_release_aborts"]
fn child_panics_in_release() {
    if is_child("child_panics_in_release") {
        let (space, _subscription) =
            subscribe_panicking(|in_release| Puppet { in_release, ..Puppet::default() });
        let _ = catch_unwind(AssertUnwindSafe(|| space.release()));
    }
}

/// Announcing a change of a range while holding an `Update` of a subscription to it would wait for
/// itself: the subscriber is named and the process ends.
#[test]
fn an_announcement_under_ones_own_update_is_named() {
    assert_aborts("child_announces_under_its_update", &["waits for itself"]);
}

#[test]
#[ignore = "runs as a child of an_announcement_under_ones_own_update_is_named"]
fn child_announces_under_its_update() {
    if is_child("child_announces_under_its_update") {
        let space = Subscriptions::new();
        let subscription = subscribe(&space, page(0), Puppet::default());
        let _update = subscription.read_begin().unwrap().commit().unwrap();
        // Elsewhere it waits for nobody.
        drop(space.invalidate_range_start(unmap(page(1))));
        drop(space.invalidate_range_start(unmap(page(0))));
    }
}

/// A non-blockable announcement under one's own `Update` is refused: it never waits.
#[test]
fn e13_a_non_blockable_announcement_under_ones_own_update_is_refused() {
    let space = Subscriptions::new();
    let puppet = Puppet { in_try_invalidate: Some(Box::new(|| ())), ..Puppet::default() };
    let subscription = subscribe(&space, page(0), puppet);
    let update = subscription.read_begin().unwrap().commit().unwrap();
    assert!(space.try_invalidate_range_start(unmap(page(0))).is_err());
    assert_eq!(update.calls, 0);
    drop(update);
    assert!(space.try_invalidate_range_start(unmap(page(0))).is_ok());
}

/// Ending a subscription while holding an `Update` of it would wait for itself.
#[test]
fn unsubscribing_under_ones_own_update_is_named() {
    assert_aborts("child_unsubscribes_under_its_update", &["waits for itself"]);
}

#[test]
#[ignore = "runs as a child of unsubscribing_under_ones_own_update_is_named"]
fn child_unsubscribes_under_its_update() {
    if is_child("child_unsubscribes_under_its_update") {
        let space = Subscriptions::new();
        let subscription = subscribe(&space, page(0), Puppet::default());
        let handle = Handle::clone(&subscription);
        let _update = handle.read_begin().unwrap().commit().unwrap();
        let _ = subscription.unsubscribe();
    }
}

/// A puppet that announces a change of page 1 from within whatever call `make` says.
fn subscribe_announcing(
    make: impl FnOnce(Option<Once<'static>>) -> Puppet,
) -> (Arc<Subscriptions>, Subscription<Puppet>) {
    let space = Subscriptions::new();
    let announce: Once<'static> = {
        let space = Arc::clone(&space);
        Box::new(move || drop(space.invalidate_range_start(unmap(page(1)))))
    };
    let subscription = subscribe(&space, page(0), make(Some(announce)));
    (space, subscription)
}

/// Debug builds: whoever announces a change from inside an invalidation is named.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "checked with debug assertions only")]
fn d07_reentry_from_an_invalidation_is_named() {
    assert_aborts("child_announces_from_invalidate", &["invalidate_range_start", "rule D07"]);
}

#[test]
#[ignore = "runs as a child of d07_reentry_from_an_invalidation_is_named"]
fn child_announces_from_invalidate() {
    if is_child("child_announces_from_invalidate") {
        let (space, _subscription) =
            subscribe_announcing(|in_invalidate| Puppet { in_invalidate, ..Puppet::default() });
        drop(space.invalidate_range_start(unmap(page(0))));
    }
}

/// Debug builds: whoever begins a read section inside an invalidation is named.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "checked with debug assertions only")]
fn d07_a_read_section_from_an_invalidation_is_named() {
    assert_aborts("child_reads_from_invalidate", &["read_begin", "rule D07"]);
}

#[test]
#[ignore = "runs as a child of d07_a_read_section_from_an_invalidation_is_named"]
fn child_reads_from_invalidate() {
    if is_child("child_reads_from_invalidate") {
        let space = Subscriptions::new();
        let other = subscribe(&space, page(1), Puppet::default());
        let read: Once<'static> = Box::new(move || drop(other.read_begin()));
        let puppet = Puppet { in_invalidate: Some(read), ..Puppet::default() };
        let _subscription = subscribe(&space, page(0), puppet);
        drop(space.invalidate_range_start(unmap(page(0))));
    }
}

/// Debug builds: whoever announces a change from inside a release is named.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "checked with debug assertions only")]
fn d06_an_announcement_from_release_is_named() {
    assert_aborts("child_announces_from_release", &["invalidate_range_start", "rule D06"]);
}

#[test]
#[ignore = "runs as a child of d06_an_announcement_from_release_is_named"]
fn child_announces_from_release() {
    if is_child("child_announces_from_release") {
        let (space, _subscription) =
            subscribe_announcing(|in_release| Puppet { in_release, ..Puppet::default() });
        space.release();
    }
}

// Waits for oneself that are refused.

/// Demands that no read section begins, with a word about who waits for whom, and that one does
/// after `end`.
#[track_caller]
fn assert_self_wait(subscription: &Subscription<Puppet>, end: impl FnOnce()) {
    let refused = subscription.read_begin_deadline(soon()).unwrap_err();
    assert_eq!(refused, ReadBeginError::SelfWait(SelfWait));
    let panic = catch_unwind(AssertUnwindSafe(|| drop(subscription.read_begin()))).unwrap_err();
    let words = panic.downcast_ref::<String>().expect("the panic says something");
    assert!(words.contains(NAME) && words.contains("wait for itself"), "it says: {words}");
    end();
    let section = subscription.read_begin_deadline(soon()).unwrap();
    assert!(section.commit().is_ok(), "the refusals have left nothing behind");
}

/// A thread that begins a read section on a range that it announced a change of is told so, and
/// does not hang: the deadline is far, and it returns at once.
#[test]
fn read_begin_under_ones_own_announcement_is_a_self_wait() {
    let space = Subscriptions::new();
    let subscription = subscribe(&space, page(0), Puppet::default());
    let change = space.invalidate_range_start(unmap(page(0)));
    assert_self_wait(&subscription, || drop(change));
}

/// So is a thread whose announcement nobody was there to hear, and was not recorded.
#[test]
fn read_begin_under_ones_own_unrecorded_announcement_is_a_self_wait() {
    let space = Subscriptions::new();
    let change = space.invalidate_range_start(unmap(page(0)));
    let subscription = subscribe(&space, page(0), Puppet::default());
    assert_self_wait(&subscription, || drop(change));
}

/// So is a thread that moved the subscription to where its announcement is.
#[test]
fn read_begin_where_one_moved_to_ones_own_announcement_is_a_self_wait() {
    let space = Subscriptions::new();
    let mut subscription = subscribe(&space, page(0), Puppet::default());
    let change = space.invalidate_range_start(unmap(page(1)));
    drop(subscription.read_begin_deadline(soon()).unwrap());
    subscription.set_range(page(1)).unwrap();
    assert_self_wait(&subscription, || drop(change));
}

/// An owner's own migration is no wait: its read sections go on under it.
#[test]
fn x07_reading_under_ones_own_migration_is_no_self_wait() {
    let space = Subscriptions::new();
    let owner = Owner::new();
    let options = SubscribeOptions::new().name(NAME).owner(owner);
    let subscription = space.subscribe_paired(page(0), Puppet::default(), options).unwrap();
    let event = Event::new(EventKind::Migrate, page(0)).owned_by(owner);
    let _change = space.invalidate_range_start(event);
    let update = subscription.read_begin().unwrap().commit().unwrap();
    assert_eq!(update.calls, 0);
}

/// Another thread's announcement is no self-wait: the reader waits until its deadline.
#[test]
fn another_threads_announcement_is_no_self_wait() {
    let space = Subscriptions::new();
    let subscription = subscribe(&space, page(0), Puppet::default());
    let _change = space.invalidate_range_start(unmap(page(0)));
    thread::scope(|scope| {
        let reader = scope.spawn(|| subscription.read_begin_deadline(Instant::now()).map(|_| ()));
        assert_eq!(reader.join().unwrap(), Err(ReadBeginError::TimedOut(TimedOut)));
    });
}

/// Unsubscribing inside a callback is refused as a wait for oneself, and nothing has been done.
#[test]
fn unsubscribe_deadline_inside_a_callback_is_a_self_wait() {
    let space = Subscriptions::new();
    let other = subscribe(&space, page(1), Puppet::default());
    let (send, receive) = mpsc::channel();
    let unsubscribe: Once<'static> = Box::new(move || {
        let _ = send.send(other.unsubscribe_deadline(soon()));
    });
    let puppet = Puppet { in_invalidate: Some(unsubscribe), ..Puppet::default() };
    let _subscription = subscribe(&space, page(0), puppet);
    drop(space.invalidate_range_start(unmap(page(0))));
    let unfinished = receive.try_recv().unwrap().unwrap_err();
    assert_eq!(unfinished.reason, UnsubscribeError::SelfWait(SelfWait));
    let other = unfinished.subscription;
    drop(space.invalidate_range_start(unmap(page(1))));
    assert_eq!(other.unsubscribe().unwrap().calls, 2, "one event, and one to stop it");
}

/// A subscription, and the word that its notifier is gone.
fn subscribe_watched(
    space: &Arc<Subscriptions>,
    number: u64,
) -> (Subscription<Puppet>, impl Fn() -> bool + use<>) {
    /// Says when it goes.
    struct Grave(Arc<Mutex<bool>>);
    impl Drop for Grave {
        fn drop(&mut self) {
            *self.0.lock().unwrap() = true;
        }
    }
    let gone = Arc::new(Mutex::new(false));
    let grave = Grave(Arc::clone(&gone));
    // It is never called, and so is dropped with the puppet.
    let in_end: Once<'static> = Box::new(move || drop(grave));
    let puppet = Puppet { in_end: Some(in_end), ..Puppet::default() };
    (subscribe(space, page(number), puppet), move || *gone.lock().unwrap())
}

/// A subscription dropped inside another's `invalidate` has ended when the announcement returns,
/// also where the announcement concerned it too.
#[test]
fn a_drop_inside_invalidate_is_done_when_the_announcement_returns() {
    for number in [0, 1] {
        let space = Subscriptions::new();
        let (other, gone) = subscribe_watched(&space, number);
        let (inside, seen) = mpsc::channel();
        let still_there = {
            let handle = Handle::clone(&other);
            move || handle.inspect(|_| ()).is_ok()
        };
        let end: Once<'static> = Box::new(move || {
            drop(other);
            let _ = inside.send(still_there());
        });
        let puppet = Puppet { in_invalidate: Some(end), ..Puppet::default() };
        let _subscription = subscribe(&space, page(0), puppet);
        let change = space.invalidate_range_start(unmap(page(0)));
        assert!(seen.try_recv().unwrap(), "it does not wait inside the callback");
        assert!(gone(), "it has ended before the change is over");
        drop(change);
        assert_eq!(space.live(), 1);
    }
}

/// A subscription may be dropped inside its own `invalidate`.
#[test]
fn a_drop_inside_ones_own_invalidate_is_done_when_the_announcement_returns() {
    let space = Subscriptions::new();
    let own = Arc::new(Mutex::new(None));
    let end: Once<'static> = {
        let own = Arc::clone(&own);
        Box::new(move || drop(own.lock().unwrap().take()))
    };
    let puppet = Puppet { in_invalidate: Some(end), ..Puppet::default() };
    *own.lock().unwrap() = Some(subscribe(&space, page(0), puppet));
    let change = space.invalidate_range_start(unmap(page(0)));
    assert_eq!(space.live(), 0);
    drop(change);
    assert!(own.lock().unwrap().is_none());
}

/// A subscription dropped while a fence is waited for has ended when the announcement returns.
#[test]
fn a_drop_inside_a_fence_is_done_when_the_announcement_returns() {
    let space = Subscriptions::new();
    let (other, gone) = subscribe_watched(&space, 0);
    let puppet = Puppet { in_fence: Some(Box::new(move || drop(other))), ..Puppet::default() };
    let _subscription = subscribe(&space, page(0), puppet);
    let _change = space.invalidate_range_start(unmap(page(0)));
    assert!(gone());
}

/// A subscription dropped inside `invalidate_range_end` has ended when the guard is gone.
#[test]
fn a_drop_inside_an_end_is_done_when_the_guard_is_gone() {
    let space = Subscriptions::new();
    let (other, gone) = subscribe_watched(&space, 1);
    let puppet = Puppet { in_end: Some(Box::new(move || drop(other))), ..Puppet::default() };
    let _subscription = subscribe(&space, page(0), puppet);
    let change = space.invalidate_range_start(unmap(page(0)));
    assert!(!gone());
    drop(change);
    assert!(gone());
}

/// A subscription dropped inside `try_invalidate` has ended when the refusal returns.
#[test]
fn a_drop_inside_a_refused_announcement_is_done_when_it_returns() {
    let space = Subscriptions::new();
    let (other, gone) = subscribe_watched(&space, 1);
    let puppet =
        Puppet { in_try_invalidate: Some(Box::new(move || drop(other))), ..Puppet::default() };
    let _first = subscribe(&space, page(0), puppet);
    let second = VaRange::new(1, 1).unwrap();
    let _second = subscribe(&space, second, Puppet::default());
    assert!(space.try_invalidate_range_start(unmap(page(0))).is_err());
    assert!(gone());
}

/// A subscription dropped inside a notifier's `release` has ended when the release returns.
#[test]
fn a_drop_inside_release_is_done_when_the_release_returns() {
    let space = Subscriptions::new();
    let elsewhere = Subscriptions::new();
    for other in [&space, &elsewhere] {
        let (other, gone) = subscribe_watched(other, 0);
        let dying = Subscriptions::new();
        let puppet =
            Puppet { in_release: Some(Box::new(move || drop(other))), ..Puppet::default() };
        let _subscription = subscribe(&dying, page(0), puppet);
        dying.release();
        assert!(gone());
    }
    let (other, gone) = subscribe_watched(&space, 1);
    let puppet = Puppet { in_release: Some(Box::new(move || drop(other))), ..Puppet::default() };
    let _subscription = subscribe(&space, page(0), puppet);
    space.release();
    assert!(gone(), "also where it is of the address space that dies");
}

/// A subscription dropped inside a callback of another's end has ended when the attempt at that end
/// returns, also where it has not come to its end.
#[test]
fn a_drop_inside_an_unfinished_unsubscription_is_done_when_it_returns() {
    let space = Subscriptions::new();
    let (other, gone) = subscribe_watched(&space, 1);
    let puppet = Puppet { in_invalidate: Some(Box::new(move || drop(other))), ..Puppet::default() };
    let subscription = subscribe(&space, page(0), puppet);
    let operation = subscription.begin_operation().unwrap();
    let unfinished = subscription.unsubscribe_deadline(Instant::now()).unwrap_err();
    assert_eq!(unfinished.reason, UnsubscribeError::TimedOut(TimedOut));
    let done = gone();
    drop(operation);
    drop(unfinished);
    assert!(done, "the thread left its callbacks long ago");
}
