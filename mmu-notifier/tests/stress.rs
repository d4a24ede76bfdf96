//! Many threads at once.
#![cfg(not(any(loom, shuttle)))]

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use mmu_notifier::{
    Event, EventKind, Handle, Notifier, ReadBeginError, Subscription, Subscriptions, TimedOut,
    VaRange,
};

/// A table of pages, that can be held up in its next invalidation.
#[derive(Debug, Default)]
struct Table {
    pages: Vec<u64>,
    held_up: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

impl Notifier for Table {
    type Fence = ();

    fn invalidate(&mut self, event: &Event) {
        if let Some((entered, go_on)) = self.held_up.take() {
            entered.send(()).unwrap();
            go_on.recv_timeout(PATIENCE).unwrap();
        }
        self.pages.retain(|&page| !event.range().contains(page));
    }
}

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long to wait for what must not happen.
const MOMENT: Duration = Duration::from_millis(20);

fn soon() -> Instant {
    Instant::now() + MOMENT
}

fn page(number: u64) -> VaRange {
    VaRange::new(number * 4096, 4096).unwrap()
}

/// Calls `during` while another thread changes `range`.
fn while_changing(space: &Subscriptions, range: VaRange, during: impl FnOnce()) {
    let (started, start) = mpsc::channel();
    let (finish, finished) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let _change = space.invalidate_range_start(Event::new(EventKind::Unmap, range));
            started.send(()).unwrap();
            // An error is a panic of `during`, which ends the change too.
            drop(finished.recv_timeout(PATIENCE));
        });
        start.recv_timeout(PATIENCE).unwrap();
        during();
        drop(finish);
    });
}

fn commits(subscription: &Subscription<Table>) -> bool {
    subscription.read_begin_deadline(Instant::now() + PATIENCE).unwrap().commit().is_ok()
}

/// Who gave up waiting for a change leaves nothing behind: when the change is over, the next read
/// section commits.
#[test]
fn e10_a_reader_that_gave_up_leaves_no_trace() {
    let space = Subscriptions::new();
    let subscription = space.subscribe(page(0), Table::default()).unwrap();
    while_changing(&space, page(0), || {
        let refused = subscription.read_begin_deadline(Instant::now()).unwrap_err();
        assert_eq!(refused, ReadBeginError::TimedOut(TimedOut));
    });
    assert!(commits(&subscription), "nothing is under way: {space:#?}");
}

/// A deadline that passes while the reader sleeps is reported as such.
#[test]
fn e10_a_deadline_that_passes_in_the_wait_is_reported() {
    let space = Subscriptions::new();
    let subscription = space.subscribe(page(0), Table::default()).unwrap();
    while_changing(&space, page(0), || {
        let result = subscription.read_begin_deadline(soon()).map(|_| ());
        assert_eq!(result, Err(ReadBeginError::TimedOut(TimedOut)));
    });
    assert!(commits(&subscription), "nothing is under way: {space:#?}");
}

/// Who unsubscribes while a release is telling the devices one after the other to stop is out of
/// the index only when its own device has stopped: else a change is announced to nobody.
#[test]
fn b13_unsubscribing_under_a_release_stops_the_device_first() {
    let space = Subscriptions::new();
    let (entered, is_inside) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let slow = Table { pages: Vec::new(), held_up: Some((entered, may_go_on)) };
    let slow = space.subscribe(page(0), slow).unwrap();
    let fast = space.subscribe(page(1), Table::default()).unwrap();
    fast.read_begin().unwrap().commit().unwrap().pages.push(4096);
    let handle = Handle::clone(&fast);
    thread::scope(|scope| {
        let release = scope.spawn(|| space.release());
        is_inside.recv_timeout(PATIENCE).unwrap();
        // The release is at `slow` and will be for a while.
        let unfinished = fast.unsubscribe_deadline(soon());
        let change = space.invalidate_range_start(Event::new(EventKind::Unmap, page(1)));
        let pages = handle.inspect(|table| table.pages.clone()).unwrap_or_default();
        drop(change);
        go_on.send(()).unwrap();
        release.join().unwrap();
        drop(unfinished);
        drop(slow);
        assert!(pages.is_empty(), "the page is changed, and its device uses it still");
    });
}
