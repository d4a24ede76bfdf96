//! Changes that are announced before they are made (`Options::announced`), on a live process.

mod common;

#[path = "announced/calls.rs"]
mod calls;
#[path = "announced/outlive.rs"]
mod outlive;
#[path = "announced/stale.rs"]
mod stale;

use std::sync::{Arc, Mutex};

use common::in_own_process;
use common::memory::{self, Mapping};
use common::rig::{Gpu, attach_with, device_load, device_store};
use uhmm::mmu_notifier::{Event, EventKind, Notifier, Subscription};
use uhmm::{Coherence, PageRange};
use uhmm_linux::{Options, Process};

/// Attaches, with announcements.
#[track_caller]
fn attach() -> Process {
    attach_with(Options::new().announced(true))
}

/// What one subscriber has heard, and how it was when it heard it.
struct Ear<F>(Arc<Mutex<Vec<(EventKind, PageRange, bool)>>>, F);

impl<F: FnMut() -> bool + Send + 'static> Notifier for Ear<F> {
    type Fence = ();

    fn invalidate(&mut self, event: &Event) {
        let range = PageRange::covering(event.range());
        let held = (self.1)();
        self.0.lock().expect("nobody panics").push((event.kind(), range, held));
    }
}

type Heard = Arc<Mutex<Vec<(EventKind, PageRange, bool)>>>;

/// Listens to what is announced of `range`, and asks `holds` each time.
fn listen<F: FnMut() -> bool + Send + 'static>(
    process: &Process,
    range: PageRange,
    holds: F,
) -> (Heard, Subscription<Ear<F>>) {
    let heard = Heard::default();
    let ear = Ear(Arc::clone(&heard), holds);
    let notifiers = process.backend().notifiers();
    let subscription = notifiers.subscribe(range.va_range(), ear).expect("the process lives");
    (heard, subscription)
}

#[test]
fn a_change_is_announced_before_it_is_made() {
    in_own_process(|| {
        let process = attach();
        assert_eq!(process.mm().coherence(), Coherence::Announced);
        assert!(process.coverage().is_some_and(|coverage| coverage.raw_system_calls));
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| index);
        let range = mapping.range();
        // While it is told, the mapping is as it was.
        let (heard, _subscription) = listen(&process, range, move || {
            memory::mapped_in(range).iter().map(|(part, _)| part.pages()).sum::<u64>() == 8
        });
        memory::unmap(mapping.part(2, 3));
        let unmapped = (EventKind::Unmap, mapping.part(2, 3), true);
        // The kernel's own event may come after it.
        assert_eq!(heard.lock().expect("nobody panics").first(), Some(&unmapped));
        assert_eq!(memory::mapped_in(range).len(), 2);
    });
}

#[test]
fn no_device_uses_what_was_there_before() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        for _ in 0..100 {
            let mapping = Mapping::anonymous(4);
            mapping.fill(|index| 1 + index);
            let mirror = gpu.mirror(&process, mapping.range());
            assert_eq!(device_load(&mirror, mapping.page(2)), Ok(3));
            memory::unmap(mapping.range());
            assert!(device_store(&mirror, mapping.page(2), 9).is_err());
        }
    });
}

/// A device that takes its time to stop holds up the change that it has to stop for, and no other.
#[test]
fn a_change_that_waits_for_a_device_holds_up_no_other() {
    in_own_process(|| {
        let process = attach();
        let (slow, other) = (Mapping::anonymous(1), Mapping::anonymous(64));
        let (go_on, waits) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let (_heard, _subscription) =
            listen(&process, slow.range(), move || tell.send(()).is_ok() && waits.recv().is_err());
        std::thread::scope(|scope| {
            let range = slow.range();
            let change = scope.spawn(move || memory::protect(range, memory::R));
            told.recv().expect("the device is told");
            for page in 0..64 {
                memory::unmap(other.part(page, 1));
            }
            assert!(!change.is_finished());
            drop(go_on);
            assert_eq!(change.join().expect("it does not panic"), Ok(()));
        });
    });
}
