//! Who is told of changes, and writes down what.

use std::sync::{Arc, Mutex};

use mmu_notifier::{Event, EventKind, Notifier, Subscription, VaRange};
use uhmm::PageRange;
use uhmm_linux::Process;

/// What a [`Listener`] has been told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    events: Vec<(EventKind, VaRange)>,
    releases: u32,
    over: bool,
}

/// A subscriber that does nothing but to listen.
#[derive(Debug)]
pub(crate) struct Listener(Told);

impl Told {
    /// Tells whether there was an event of this kind with a page in `range`.
    pub(crate) fn of(&self, kind: EventKind, range: PageRange) -> bool {
        let log = self.0.lock().expect("nobody panics");
        log.events.iter().any(|&(is, of)| is == kind && of.overlaps(range.va_range()))
    }

    /// Returns how many events there were.
    pub(crate) fn events(&self) -> usize {
        self.0.lock().expect("nobody panics").events.len()
    }

    /// Returns how often it was released.
    pub(crate) fn releases(&self) -> u32 {
        self.0.lock().expect("nobody panics").releases
    }

    /// Says that nothing may come any more.
    pub(crate) fn is_over(&self) {
        self.0.lock().expect("nobody panics").over = true;
    }
}

impl Listener {
    /// Subscribes to `range` of a process, and has the kernel tell of changes there.
    pub(crate) fn listen(process: &Process, range: PageRange) -> (Subscription<Listener>, Told) {
        let told = Told::default();
        let listener = Listener(told.clone());
        let subscription = process.backend().notifiers().subscribe(range.va_range(), listener);
        // What is looked at is watched.
        process.snapshot(range);
        (subscription.expect("the process is attached"), told)
    }
}

impl Notifier for Listener {
    type Fence = ();

    fn invalidate(&mut self, event: &Event) {
        let mut log = self.0.0.lock().expect("nobody panics");
        assert!(!log.over, "{event:?} came too late");
        log.events.push((event.kind(), event.range()));
    }

    fn release(self) {
        let mut log = self.0.0.lock().expect("nobody panics");
        assert!(!log.over, "a release came too late");
        log.releases += 1;
    }
}
