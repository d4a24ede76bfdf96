//! What the tests on real threads share: threads that are watched, threads that are stopped inside
//! a callback, and notifiers that write down what happens to them.
//!
//! No order is ever made by sleeping. That something has happened is learnt from a channel; that
//! something does *not* happen is observed for [`A_WHILE`], where a slow machine can only make a
//! test pass. Everything that waits does so until a deadline, so what is broken fails.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use mmu_notifier::{
    Event, EventKind, Fence, Handle, Notifier, PairedNotifier, Subscriptions, VaRange, WouldBlock,
};

/// How long anything may take that is to happen.
const SOON: Duration = Duration::from_secs(10);
/// How long a whole test may take. Longer than any of its waits, so those are reported first.
const WHOLE_TEST: Duration = Duration::from_secs(40);
/// How long it is watched that something does not happen.
pub(crate) const A_WHILE: Duration = Duration::from_millis(50);

/// A deadline that is only reached when something is broken.
pub(crate) fn soon() -> Instant {
    Instant::now() + SOON
}

/// A deadline that is reached by whoever waits at all.
pub(crate) fn at_once() -> Instant {
    Instant::now()
}

/// A deadline that comes after a while.
pub(crate) fn in_a_while() -> Instant {
    Instant::now() + A_WHILE
}

/// The page with this number.
pub(crate) fn page(number: u64) -> VaRange {
    pages(number, 1)
}

/// `count` pages from the one with this number.
pub(crate) fn pages(first: u64, count: u64) -> VaRange {
    VaRange::new(first * 0x1000, count * 0x1000).expect("a range of pages")
}

pub(crate) fn unmap(range: VaRange) -> Event {
    Event::new(EventKind::Unmap, range)
}

/// A thread whose end is watched.
pub(crate) struct Task<T> {
    result: Receiver<thread::Result<T>>,
}

/// Starts a thread.
pub(crate) fn task<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    let (send, result) = channel();
    thread::spawn(move || {
        // Nobody listens any more if the test has failed already.
        let _ = send.send(catch_unwind(AssertUnwindSafe(body)));
    });
    Task { result }
}

impl<T> Task<T> {
    /// Sees that the thread has not ended, and does not for a while.
    #[track_caller]
    pub(crate) fn is_waiting(&self) {
        match self.result.recv_timeout(A_WHILE) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Err(panic)) => resume_unwind(panic),
            _ => panic!("it did not wait"),
        }
    }

    /// Waits for the end of the thread.
    #[track_caller]
    pub(crate) fn finish(self) -> T {
        self.finish_within(SOON)
    }

    #[track_caller]
    fn finish_within(self, time: Duration) -> T {
        match self.result.recv_timeout(time) {
            Ok(Ok(value)) => value,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => panic!("it waits for something that never comes"),
        }
    }
}

/// Runs a whole test, and fails it where it would hang.
#[track_caller]
pub(crate) fn watched(body: impl FnOnce() + Send + 'static) {
    task(body).finish_within(WHOLE_TEST);
}

/// Makes a place where the first thread that comes by is stopped, and its control.
pub(crate) fn stop() -> (Stop, Stopped) {
    let (arrive, arrived) = channel();
    let (go, wait) = channel();
    let place = Place { taken: AtomicBool::new(false), arrive, wait: Mutex::new(wait) };
    (Stop(Arc::new(place)), Stopped { arrived, go })
}

/// A place where the first thread that comes by is stopped. All copies are the same place.
#[derive(Clone)]
pub(crate) struct Stop(Arc<Place>);

struct Place {
    taken: AtomicBool,
    arrive: Sender<()>,
    wait: Mutex<Receiver<()>>,
}

impl Stop {
    /// Comes by. Does not panic, not even at the deadline: it is called inside callbacks.
    pub(crate) fn here(&self) {
        if !self.0.taken.swap(true, Ordering::Relaxed) {
            let _ = self.0.arrive.send(());
            let _ = lock(&self.0.wait).recv_timeout(SOON);
        }
    }
}

/// The control of a [`Stop`].
pub(crate) struct Stopped {
    arrived: Receiver<()>,
    go: Sender<()>,
}

impl Stopped {
    /// Waits until a thread stands there.
    #[track_caller]
    pub(crate) fn wait(&self) {
        self.arrived.recv_timeout(SOON).expect("nobody came by");
    }

    /// Sees that nobody stands there, and nobody comes for a while.
    #[track_caller]
    pub(crate) fn nobody_comes(&self) {
        assert!(self.arrived.recv_timeout(A_WHILE).is_err(), "somebody came by");
    }

    /// Lets the thread go on.
    pub(crate) fn go(self) {
        let _ = self.go.send(());
    }
}

/// A change that another thread has announced and that lasts until the test ends it.
pub(crate) struct Change {
    end: Sender<()>,
    task: Task<()>,
}

impl Change {
    /// Announces a change; returns when the announcement has returned.
    #[track_caller]
    pub(crate) fn begin(space: &Arc<Subscriptions>, event: Event) -> Change {
        let (started, wait) = channel();
        let (end, until) = channel();
        let space = Arc::clone(space);
        let task = task(move || {
            let change = space.invalidate_range_start(event);
            let _ = started.send(());
            let _: Result<(), _> = until.recv_timeout(SOON);
            drop(change);
        });
        wait.recv_timeout(SOON).expect("the announcement does not return");
        Change { end, task }
    }

    /// Ends the change; returns when that has returned.
    #[track_caller]
    pub(crate) fn end(self) {
        self.begin_to_end().finish();
    }

    /// Lets the other thread end the change.
    pub(crate) fn begin_to_end(self) -> Task<()> {
        let _ = self.end.send(());
        self.task
    }
}

/// Announces a change on another thread and ends it at once.
pub(crate) fn change(space: &Arc<Subscriptions>, event: Event) -> Task<()> {
    let space = Arc::clone(space);
    task(move || drop(space.invalidate_range_start(event)))
}

/// What happened, in the order in which it was written down.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<Entry>>>);

/// What happened, in words, and the event that it happened to.
type Entry = (String, Option<Event>);

impl Log {
    pub(crate) fn new() -> Log {
        Log::default()
    }

    /// Writes something down.
    pub(crate) fn note(&self, words: impl Into<String>) {
        lock(&self.0).push((words.into(), None));
    }

    fn note_event(&self, words: String, event: &Event) {
        lock(&self.0).push((words, Some(*event)));
    }

    /// Returns everything written down since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        lock(&self.0).drain(..).map(|(words, _)| words).collect()
    }

    /// Returns what is written down, for as long as it is not taken.
    pub(crate) fn so_far(&self) -> Vec<String> {
        lock(&self.0).iter().map(|(words, _)| words.clone()).collect()
    }

    /// Returns every event written down since the last call.
    pub(crate) fn take_events(&self) -> Vec<Event> {
        lock(&self.0).drain(..).filter_map(|(_, event)| event).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

type Hook = Arc<dyn Fn(&Event) + Send + Sync>;

/// A device that writes down every call: `name start Kind`, `name try Kind`, `name end Kind`,
/// `name fence Kind`, `name release`. Its page table maps addresses to frames.
pub(crate) struct Recorder {
    name: &'static str,
    log: Log,
    pub(crate) table: BTreeMap<u64, u64>,
    refuses: bool,
    fences: bool,
    on_start: Option<Hook>,
    on_end: Option<Hook>,
    on_fence: Option<Hook>,
    on_release: Option<Box<dyn FnOnce() + Send>>,
    /// Whatever the device is to hold until it ends.
    _held: Option<Box<dyn Send>>,
}

impl Recorder {
    pub(crate) fn new(name: &'static str, log: &Log) -> Recorder {
        Recorder {
            name,
            log: log.clone(),
            table: BTreeMap::new(),
            refuses: false,
            fences: false,
            on_start: None,
            on_end: None,
            on_fence: None,
            on_release: None,
            _held: None,
        }
    }

    /// Refuses every non-blockable event.
    pub(crate) fn refusing(self) -> Recorder {
        Recorder { refuses: true, ..self }
    }

    /// Returns a fence for every event.
    pub(crate) fn with_fences(self) -> Recorder {
        Recorder { fences: true, ..self }
    }

    pub(crate) fn on_start(self, hook: impl Fn(&Event) + Send + Sync + 'static) -> Recorder {
        Recorder { on_start: Some(Arc::new(hook)), ..self }
    }

    pub(crate) fn on_end(self, hook: impl Fn(&Event) + Send + Sync + 'static) -> Recorder {
        Recorder { on_end: Some(Arc::new(hook)), ..self }
    }

    pub(crate) fn on_fence(self, hook: impl Fn(&Event) + Send + Sync + 'static) -> Recorder {
        Recorder { on_fence: Some(Arc::new(hook)), ..self.with_fences() }
    }

    pub(crate) fn on_release(self, hook: impl FnOnce() + Send + 'static) -> Recorder {
        Recorder { on_release: Some(Box::new(hook)), ..self }
    }

    /// Is stopped inside the first invalidation.
    pub(crate) fn stopped_at_start(self, stop: Stop) -> Recorder {
        self.on_start(move |_| stop.here())
    }

    /// Holds `value` until it is dropped.
    pub(crate) fn holding(self, value: impl Send + 'static) -> Recorder {
        Recorder { _held: Some(Box::new(value)), ..self }
    }

    fn note(&self, call: &str, event: Option<&Event>) {
        let Recorder { name, log, .. } = self;
        let but = if mmu_notifier::holds_registry_lock() { " UNDER THE REGISTRY LOCK" } else { "" };
        match event {
            Some(event) => log.note_event(format!("{name} {call} {:?}{but}", event.kind()), event),
            None => log.note(format!("{name} {call}{but}")),
        }
    }

    fn stop_using(&mut self, event: &Event) -> Option<RecordedFence> {
        if let Some(hook) = &self.on_start {
            hook(event);
        }
        self.table.retain(|&address, _| !event.range().contains(address));
        self.fences.then(|| RecordedFence {
            name: self.name,
            log: self.log.clone(),
            event: *event,
            hook: self.on_fence.clone(),
        })
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Notifier for Recorder {
    type Fence = Option<RecordedFence>;

    fn invalidate(&mut self, event: &Event) -> Option<RecordedFence> {
        self.note("start", Some(event));
        self.stop_using(event)
    }

    fn try_invalidate(&mut self, event: &Event) -> Result<Option<RecordedFence>, WouldBlock> {
        self.note("try", Some(event));
        if self.refuses { Err(WouldBlock) } else { Ok(self.stop_using(event)) }
    }

    fn release(mut self) {
        self.note("release", None);
        if let Some(hook) = self.on_release.take() {
            hook();
        }
    }
}

impl PairedNotifier for Recorder {
    fn invalidate_range_end(&mut self, event: &Event) {
        self.note("end", Some(event));
        if let Some(hook) = &self.on_end {
            hook(event);
        }
    }
}

/// The fence of a [`Recorder`].
pub(crate) struct RecordedFence {
    name: &'static str,
    log: Log,
    event: Event,
    hook: Option<Hook>,
}

impl Fence for RecordedFence {
    fn wait(self) {
        if let Some(hook) = &self.hook {
            hook(&self.event);
        }
        let but = if mmu_notifier::holds_registry_lock() { " UNDER THE REGISTRY LOCK" } else { "" };
        let words = format!("{} fence {:?}{but}", self.name, self.event.kind());
        self.log.note_event(words, &self.event);
    }
}

/// Translates `address` to `frame` in one read section.
#[track_caller]
pub(crate) fn translate(device: &Handle<Recorder>, address: u64, frame: u64) -> bool {
    let section = device.read_begin_deadline(soon()).expect("a read section begins");
    match section.commit() {
        Ok(mut update) => {
            update.table.insert(address, frame);
            true
        }
        Err(mmu_notifier::Retry) => false,
    }
}

/// Returns what the device has for `address`, while it has a page table.
pub(crate) fn translation(device: &Handle<Recorder>, address: u64) -> Option<u64> {
    device.inspect(|recorder| recorder.table.get(&address).copied()).ok().flatten()
}

/// Tells whether a change of `range` is under way as far as the address space knows.
pub(crate) fn is_idle(space: &Subscriptions) -> bool {
    let dump = format!("{space:?}");
    dump.contains("changes_under_way: [], changes_unrecorded: 0")
}
