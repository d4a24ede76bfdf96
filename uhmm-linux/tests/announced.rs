//! Changes that are announced before they are made (`Options::announced`), on a live process.

mod common;
mod kernel;

#[path = "announced/calls.rs"]
mod calls;
#[path = "announced/outlive.rs"]
mod outlive;
#[path = "announced/read_only.rs"]
mod read_only;
#[path = "announced/rows.rs"]
mod rows;
#[path = "announced/stale.rs"]
mod stale;

use std::sync::{Arc, Mutex};

use common::children::{End, How, child, end_of};
use common::in_own_process;
use common::memory::{self, Mapping};
use common::rig::{Gpu, attach_with, device_load, device_store};
use uhmm::mmu_notifier::{Event, EventKind, Notifier, Subscription};
use uhmm::{Coherence, PageRange};
use uhmm_linux::bind::Monitor;
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

/// Nobody knows what a device uses that has panicked, and nobody is left waiting for it.
#[test]
fn a_device_that_panics_as_it_is_told_ends_the_process() {
    in_own_process(|| {
        let pid = child(How::Hooked, || {
            let process = attach();
            let mapping = Mapping::anonymous(1);
            let (_heard, _subscription) =
                listen(&process, mapping.range(), || panic!("a device of this test"));
            memory::unmap(mapping.range());
            false
        });
        assert_eq!(end_of(pid), End::Signal(libc::SIGABRT));
    });
}

#[test]
fn a_monitor_calls_its_function_before_what_it_watches_goes() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(8);
        let whole = mapping.range();
        let told = Arc::new(Mutex::new(Vec::new()));
        let monitor = {
            let told = Arc::clone(&told);
            let monitor = Monitor::start(&process, move |change| {
                let still = memory::mapped_in(whole).iter().map(|(part, _)| part.pages()).sum();
                let at = (change.address - whole.address(), change.length, change.kind);
                told.lock().expect("nobody panics").push((at, still));
            });
            monitor.expect("the process lives")
        };
        let at = |page: u64| whole.address() + page * 4096;
        monitor.subscribe(at(1), 2 * 4096).expect("the process lives");
        monitor.subscribe(at(5), 4096).expect("the process lives");
        assert!(monitor.is_watched(at(1), 4096) && !monitor.is_watched(at(1), 5 * 4096));
        memory::protect(mapping.part(0, 1), memory::R).expect("it is mapped");
        memory::unmap(mapping.part(2, 4));
        monitor.unsubscribe(at(1), 4096);
        memory::unmap(mapping.part(1, 1));
        let told = told.lock().expect("nobody panics");
        let unmapped = |page: u64| (page * 4096, 4096, EventKind::Unmap);
        let before: Vec<((u64, u64, EventKind), u64)> = vec![(unmapped(2), 8), (unmapped(5), 8)];
        assert_eq!(told[..2], before);
        // What is observed besides comes after, and of nothing else.
        assert!(told.iter().all(|&(what, _)| what == unmapped(2) || what == unmapped(5)));
    });
}

/// Executors outlive the attachment, and keep nothing of it.
#[test]
fn detaching_gives_back_what_was_reserved() {
    in_own_process(|| {
        let reserved = || {
            let text = std::fs::read_to_string("/proc/self/statm").expect("proc is mounted");
            text.split(' ').next().and_then(|pages| pages.parse::<u64>().ok()).expect("a number")
        };
        let before = reserved();
        let process = attach_with(Options::new().announced(true).staging_bytes(1 << 30));
        // Staging and buffers, each as large.
        let large = before + 2 * (1 << 30) / 4096;
        assert!(reserved() >= large);
        drop(process);
        assert!(common::eventually(|| reserved() < large), "it is still reserved");
    });
}
