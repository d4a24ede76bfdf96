//! The simulated machine: what it announces, what it keeps, and what it finds out.
#![cfg(not(any(loom, shuttle)))]

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mmu_notifier::Notifier;
use uhmm::backend::{Committed, Placement, Select, Source};
use uhmm::policy::{CpuFault, HomePlan, Policies, Policy};
use uhmm::sim::{Machine, MachineOptions, Mapping, Process, SimError};
use uhmm::{
    Access, Backend, CopyJob, CopyKind, DeviceFrame, DeviceMemory, DevicePagemap, Event, EventKind,
    FaultError, Frame, Injector, Mm, Order, OutOfDeviceMemory, Owner, PAGE_SIZE, Page, PageEntry,
    PageRange, PagemapOptions, Residency, StayReason, SystemMemory, VaRange, WouldBlock,
};

/// Where the tests map things: the start of an aligned block of 2 MiB.
const BASE: u64 = 0x4000_0000;
const HUGE: u64 = 2 << 20;

fn range(first: u64, pages: u64) -> PageRange {
    PageRange::new(address(first), pages << 12).unwrap()
}

fn address(page: u64) -> u64 {
    BASE + (page << 12)
}

fn page(number: u64) -> Page {
    Page::containing(address(number))
}

/// A process with 16 pages of private memory, of which the first 4 hold 1, 2, 3 and 4.
fn process() -> Process {
    process_on(&Machine::new())
}

fn process_on(machine: &Machine) -> Process {
    let process = machine.spawn();
    process.map(range(0, 16), Mapping::anonymous(Access::Write)).unwrap();
    fill(&process, 4);
    process
}

fn fill(process: &Process, pages: u64) {
    for number in 0..pages {
        process.store_u64(address(number), number + 1).unwrap();
    }
}

/// A process with one large page, whose every page begins with its number plus one.
fn huge_process(machine: &Machine) -> Process {
    let process = machine.spawn();
    process.map(range(0, 1024), Mapping::anonymous(Access::Write).huge(true)).unwrap();
    fill(&process, 512);
    assert_eq!(entry(&process, 0).order, Order::HUGE);
    process
}

/// What is in system memory, on its way to no device in particular.
fn system() -> Select {
    Select::System { to: Owner::new() }
}

fn backend(process: &Process) -> &dyn Backend {
    process.address_space().backend()
}

fn entry(process: &Process, number: u64) -> PageEntry {
    process.address_space().snapshot(page(number).into())[0]
}

fn frame(process: &Process, number: u64) -> Frame {
    match entry(process, number).residency {
        Residency::System(frame) => frame,
        other => panic!("page {number} is {other:?}"),
    }
}

fn assert_values(process: &Process, pages: impl IntoIterator<Item = u64>) {
    for number in pages {
        assert_eq!(process.load_u64(address(number)), Ok(number + 1), "page {number}");
    }
}

/// Ends everything and looks for what is left.
#[track_caller]
fn end(process: Process) {
    let machine = process.machine().clone();
    assert_eq!(machine.check(), Ok(()));
    process.exit();
    assert_eq!(machine.check(), Ok(()));
    assert_eq!(machine.frames(), 0, "frames are leaked");
    assert_eq!(machine.violations(), Vec::<String>::new());
}

/// A device's memory that may fail.
#[derive(Default)]
struct Vram {
    state: Mutex<VramState>,
    capacity: u64,
    copies_fail: AtomicBool,
}

#[derive(Default)]
struct VramState {
    next: u64,
    used: u64,
    contents: BTreeMap<u64, Vec<u8>>,
}

impl Vram {
    fn register(capacity: u64) -> (Arc<Vram>, Arc<DevicePagemap>) {
        let vram = Arc::new(Vram { capacity, ..Vram::default() });
        let memory = Arc::clone(&vram) as Arc<dyn DeviceMemory>;
        let options = PagemapOptions::new().policies(Policies::none());
        let pagemap = DevicePagemap::register_with(memory, options);
        (vram, pagemap)
    }
}

impl DeviceMemory for Vram {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        let mut state = self.state.lock().unwrap();
        if state.used + order.pages() > self.capacity {
            return Err(OutOfDeviceMemory { order });
        }
        state.used += order.pages();
        let first = state.next.next_multiple_of(order.pages());
        state.next = first + order.pages();
        Ok(DeviceFrame(first))
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        let mut state = self.state.lock().unwrap();
        state.used -= order.pages();
        for page in frame.0..frame.0 + order.pages() {
            state.contents.remove(&page);
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        let mut state = self.state.lock().unwrap();
        for job in jobs {
            if self.copies_fail.load(Ordering::Relaxed) {
                continue;
            }
            for page in 0..job.order().pages() {
                let mut bytes = vec![0; PAGE_SIZE];
                match job.kind() {
                    CopyKind::In { from, to } => {
                        memory.read(Frame(from.0 + page), 0, &mut bytes);
                        state.contents.insert(to.0 + page, bytes);
                    }
                    CopyKind::Out { from, to } => {
                        let bytes = &state.contents[&(from.0 + page)];
                        memory.write(Frame(to.0 + page), 0, bytes);
                    }
                    CopyKind::Clear { to } => {
                        state.contents.insert(to.0 + page, bytes);
                    }
                }
            }
            job.complete();
        }
    }
}

fn to_device(process: &Process, range: PageRange, pagemap: &Arc<DevicePagemap>) {
    let report = process.address_space().migrate(range, pagemap).run();
    assert_eq!(report.moved, range.pages(), "{:?}", report.stayed);
}

fn is_on_device(process: &Process, number: u64) -> bool {
    matches!(entry(process, number).residency, Residency::Device(_))
}

/// An event, and what the page tables said while it was announced.
type Told = (Event, Vec<PageEntry>);

/// Writes down each event, and what the page tables say while it is announced.
struct Recorder {
    mm: Mm,
    watched: PageRange,
    heard: Arc<Mutex<Vec<Told>>>,
}

impl Recorder {
    fn hear(&self, event: &Event) {
        // A dying address space has no users any more.
        let space = self.mm.users();
        let entries = space.map_or_else(Vec::new, |space| space.snapshot(self.watched));
        self.heard.lock().unwrap().push((*event, entries));
    }
}

impl Notifier for Recorder {
    type Fence = ();

    fn invalidate(&mut self, event: &Event) {
        self.hear(event);
    }

    fn try_invalidate(&mut self, event: &Event) -> Result<(), WouldBlock> {
        self.hear(event);
        Ok(())
    }
}

/// Runs `change`, and checks that it is announced once, as `kind` and over all of `changed`, to a
/// subscriber of the whole space; that the page tables were as before when it was; and that no read
/// section goes on across it. Returns the event.
#[track_caller]
fn bracketed(
    process: &Process,
    kind: EventKind,
    changed: PageRange,
    change: impl FnOnce(),
) -> Event {
    let heard = events(process, changed, change);
    let [(event, during)] = heard.events.as_slice() else { panic!("{:?}", heard.events) };
    assert_eq!(event.kind(), kind);
    assert!(event.range().covers(changed.va_range()), "{event} does not cover {changed}");
    assert_eq!(*during, heard.before, "something changed before it was announced");
    assert!(heard.retried, "a read section went on across {event}");
    assert_eq!(process.machine().check(), Ok(()));
    *event
}

struct Heard {
    events: Vec<Told>,
    before: Vec<PageEntry>,
    retried: bool,
}

fn events(process: &Process, watched: PageRange, change: impl FnOnce()) -> Heard {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let before = process.address_space().snapshot(watched);
    let mm = process.address_space().mm().clone();
    let recorder = Recorder { mm, watched, heard: Arc::clone(&heard) };
    let subscription = backend(process).notifiers().subscribe(VaRange::ALL, recorder).unwrap();
    let section = subscription.read_begin().unwrap();
    change();
    let retried = section.commit().is_err();
    // The end of the subscription is an event too.
    let events = std::mem::take(&mut *heard.lock().unwrap());
    drop(subscription);
    Heard { events, before, retried }
}

#[track_caller]
fn unannounced(process: &Process, change: impl FnOnce()) {
    let heard = events(process, range(0, 1), change);
    assert_eq!(heard.events, []);
    assert!(!heard.retried);
    assert_eq!(process.machine().check(), Ok(()));
}

// Every mutator announces (regression 7, CVE-2022-48991).

#[test]
fn unmapping_is_announced_as_unmap() {
    let process = process();
    bracketed(&process, EventKind::Unmap, range(1, 2), || process.unmap(range(1, 2)));
    assert_eq!(entry(&process, 1).residency, Residency::Hole);
    assert_eq!(process.load_u64(address(2)), Err(FaultError::Hole { page: page(2) }.into()));
    assert_values(&process, [0, 3]);
    end(process);
}

#[test]
fn mapping_over_something_is_announced_as_unmap_and_mapping_over_nothing_is_not() {
    let process = process();
    let mapping = Mapping::anonymous(Access::Read);
    bracketed(&process, EventKind::Unmap, range(0, 2), || {
        process.map(range(0, 2), mapping.clone()).unwrap();
    });
    assert_eq!(process.load_u64(address(0)), Ok(0));
    unannounced(&process, || process.map(range(32, 4), mapping).unwrap());
    end(process);
}

#[test]
fn protecting_is_announced_as_protection_of_the_mapping() {
    let process = process();
    bracketed(&process, EventKind::ProtectionVma, range(1, 2), || {
        process.protect(range(1, 2), Access::Read);
    });
    assert_eq!(entry(&process, 1).allowed, Access::Read);
    let denied = FaultError::Denied { page: page(1), wanted: Access::Write, allowed: Access::Read };
    assert_eq!(process.store_u64(address(1), 9), Err(denied.into()));
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn moving_is_announced_as_unmap_of_both_places() {
    let process = process();
    process.map(range(64, 2), Mapping::anonymous(Access::Write)).unwrap();
    process.store_u64(address(64), 99).unwrap();
    let heard = events(&process, range(0, 2), || {
        process.remap(range(0, 2), page(64)).unwrap();
    });
    let told: Vec<_> =
        heard.events.iter().map(|(event, _)| (event.kind(), event.range())).collect();
    let both = [range(0, 2), range(64, 2)].map(|range| (EventKind::Unmap, range.va_range()));
    assert_eq!(told, both);
    assert!(heard.retried);
    assert!(heard.events.iter().all(|(_, during)| *during == heard.before));
    assert_eq!(process.load_u64(address(64)), Ok(1));
    assert_eq!(process.load_u64(address(65)), Ok(2));
    assert_eq!(entry(&process, 0).residency, Residency::Hole);
    end(process);
}

#[test]
fn discarding_is_announced_as_clear() {
    let process = process();
    bracketed(&process, EventKind::Clear, range(0, 4), || process.discard(range(0, 4)));
    assert_eq!(process.load_u64(address(0)), Ok(0));
    end(process);
}

#[test]
fn freeing_is_announced_as_clear_and_only_what_is_not_stored_to_again_is_dropped() {
    let process = process();
    bracketed(&process, EventKind::Clear, range(0, 4), || process.free(range(0, 4)));
    assert_eq!(entry(&process, 0).access, Access::Read, "the next store must be noticed");
    process.store_u64(address(1) + 8, 7).unwrap();
    assert_eq!(process.reclaim(range(0, 4)), 4);
    assert_eq!(process.load_u64(address(0)), Ok(0));
    assert_eq!(process.load_u64(address(1)), Ok(2));
    end(process);
}

#[test]
fn reclaiming_is_announced_as_clear() {
    let process = process();
    bracketed(&process, EventKind::Clear, range(0, 4), || {
        assert_eq!(process.reclaim(range(0, 4)), 4);
    });
    assert_eq!(process.machine().frames(), 0);
    assert_eq!(entry(&process, 0).residency, Residency::Empty);
    assert_values(&process, 0..4);
    end(process);
}

/// Regression 11.
#[test]
fn swapping_in_needs_no_announcement() {
    let process = process();
    process.reclaim(range(0, 4));
    unannounced(&process, || assert_eq!(process.swap_in(range(0, 16)), 4));
    assert!(matches!(entry(&process, 3).residency, Residency::System(_)));
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn relocating_is_announced_as_clear_and_gives_new_frames() {
    let process = process();
    let before = frame(&process, 0);
    bracketed(&process, EventKind::Clear, range(0, 4), || {
        assert_eq!(process.relocate(range(0, 4)), 4);
    });
    assert_ne!(frame(&process, 0), before);
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn collapsing_is_announced_as_clear() {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 1024), Mapping::anonymous(Access::Write)).unwrap();
    fill(&process, 4);
    bracketed(&process, EventKind::Clear, range(0, 512), || {
        assert_eq!(process.collapse(range(0, 1024)), 1);
    });
    assert_eq!(entry(&process, 300).order, Order::HUGE);
    assert_values(&process, 0..4);
    assert_eq!(process.load_u64(address(4)), Ok(0));
    end(process);
}

#[test]
fn splitting_is_announced_as_clear() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let before = frame(&process, 7);
    bracketed(&process, EventKind::Clear, range(0, 512), || {
        assert_eq!(process.split(range(7, 1)), 1);
    });
    assert_eq!(entry(&process, 7).order, Order::PAGE);
    assert_eq!(frame(&process, 7), before);
    assert_values(&process, 0..512);
    end(process);
}

#[test]
fn write_protecting_is_announced_as_protection_and_the_first_store_is_noticed() {
    let process = process();
    bracketed(&process, EventKind::ProtectionVma, range(0, 4), || {
        process.write_protect(range(0, 4));
    });
    assert_eq!(entry(&process, 0).access, Access::Read);
    unannounced(&process, || process.store_u64(address(0), 9).unwrap());
    assert!(!process.flags(page(0)).unwrap().write_protected);
    assert!(process.flags(page(1)).unwrap().write_protected);
    end(process);
}

#[test]
fn clearing_soft_dirty_is_announced_and_the_first_store_is_noticed() {
    let process = process();
    assert!(process.flags(page(0)).unwrap().soft_dirty);
    bracketed(&process, EventKind::SoftDirty, range(0, 4), || {
        process.clear_soft_dirty(range(0, 4));
    });
    process.store_u64(address(0), 9).unwrap();
    assert!(process.flags(page(0)).unwrap().soft_dirty);
    assert!(!process.flags(page(1)).unwrap().soft_dirty);
    end(process);
}

#[test]
fn reaping_is_announced_without_blocking() {
    let process = process();
    let event = bracketed(&process, EventKind::Clear, range(0, 4), || {
        assert_eq!(process.oom_reap().unwrap(), 4);
    });
    assert!(!event.is_blockable());
    assert_eq!(process.machine().frames(), 0);
    end(process);
}

#[test]
fn a_device_that_cannot_stop_at_once_keeps_the_reaper_out() {
    struct Busy;
    impl Notifier for Busy {
        type Fence = ();
        fn invalidate(&mut self, _: &Event) {}
        fn try_invalidate(&mut self, _: &Event) -> Result<(), WouldBlock> {
            Err(WouldBlock)
        }
    }
    let process = process();
    let subscription = backend(&process).notifiers().subscribe(VaRange::ALL, Busy).unwrap();
    assert_eq!(process.oom_reap(), Err(WouldBlock));
    assert_values(&process, 0..4);
    drop(subscription);
    end(process);
}

#[test]
fn a_probe_is_announced_as_clear_and_seen_by_its_mapping_alone() {
    let machine = Machine::new();
    let process = machine.spawn();
    let file = machine.file(1);
    file.store(0, &[1; 8]).unwrap();
    process.map(range(0, 1), Mapping::private_file(&file, 0, Access::Read)).unwrap();
    process.load_u64(address(0)).unwrap();
    bracketed(&process, EventKind::Clear, range(0, 1), || {
        process.uprobe(page(0), &[0xcc]).unwrap();
    });
    let mut bytes = [0; 8];
    process.load(address(0), &mut bytes).unwrap();
    assert_eq!(bytes, [0xcc, 1, 1, 1, 1, 1, 1, 1]);
    file.load(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 8]);
    drop(file);
    end(process);
}

#[test]
fn a_probe_of_a_shared_mapping_is_refused() {
    let process = process();
    process.map(range(0, 1), Mapping::shared(Access::Write)).unwrap();
    assert_eq!(process.uprobe(page(0), &[1]), Err(SimError::NotPrivate { page: page(0) }));
    end(process);
}

#[test]
fn forking_is_announced_as_protection_of_pages() {
    let process = process();
    let mut child = None;
    bracketed(&process, EventKind::ProtectionPage, range(0, 4), || {
        child = Some(process.fork().unwrap());
    });
    assert_eq!(entry(&process, 0).access, Access::Read);
    drop(child);
    end(process);
}

#[test]
fn copy_on_write_is_announced_as_clear() {
    let process = process();
    let child = process.fork().unwrap();
    bracketed(&process, EventKind::Clear, range(1, 1), || {
        process.store_u64(address(1), 9).unwrap();
    });
    assert_values(&child, 0..4);
    // The child is the last to use the page: what it had stays where it was.
    unannounced(&child, || child.store_u64(address(1), 8).unwrap());
    assert_eq!(process.load_u64(address(1)), Ok(9));
    drop(child);
    end(process);
}

#[test]
fn replacing_the_zeroes_is_announced_as_clear() {
    let process = process();
    assert_eq!(process.load_u64(address(8)), Ok(0));
    assert_eq!(process.machine().frames(), 4, "reading takes no memory");
    bracketed(&process, EventKind::Clear, range(8, 1), || {
        process.store_u64(address(8), 9).unwrap();
    });
    unannounced(&process, || process.store_u64(address(9), 9).unwrap());
    end(process);
}

#[test]
fn merging_is_announced_as_clear() {
    let process = process();
    for number in 0..4 {
        process.store_u64(address(number), 5).unwrap();
    }
    bracketed(&process, EventKind::Clear, range(0, 4), || {
        assert_eq!(process.machine().merge(), 3);
    });
    assert_eq!(process.machine().frames(), 1);
    process.store_u64(address(2), 6).unwrap();
    assert_eq!(process.load_u64(address(1)), Ok(5));
    assert_eq!(process.machine().check(), Ok(()));
    end(process);
}

#[test]
fn truncating_is_announced_as_clear_and_takes_private_copies_along() {
    let machine = Machine::new();
    let process = machine.spawn();
    let file = machine.file(4);
    process.map(range(0, 4), Mapping::private_file(&file, 0, Access::Write)).unwrap();
    fill(&process, 4);
    bracketed(&process, EventKind::Clear, range(2, 2), || file.truncate(2));
    assert_eq!(process.load_u64(address(2)), Err(FaultError::EndOfFile { page: page(2) }.into()));
    assert_values(&process, 0..2);
    drop(file);
    end(process);
}

#[test]
fn punching_a_hole_is_announced_as_clear_and_leaves_private_copies() {
    let machine = Machine::new();
    let process = machine.spawn();
    let file = machine.file(4);
    process.map(range(0, 4), Mapping::file(&file, 0, Access::Write)).unwrap();
    process.map(range(8, 4), Mapping::private_file(&file, 0, Access::Write)).unwrap();
    fill(&process, 4);
    process.store_u64(address(9), 77).unwrap();
    bracketed(&process, EventKind::Clear, range(1, 2), || file.punch_hole(1, 2));
    assert_eq!(process.load_u64(address(1)), Ok(0));
    assert_eq!(process.load_u64(address(9)), Ok(77));
    assert_values(&process, [0, 3]);
    drop(file);
    end(process);
}

#[test]
fn writing_a_file_back_is_announced_as_protection_of_pages() {
    let machine = Machine::new();
    let process = machine.spawn();
    let file = machine.file(4);
    process.map(range(0, 4), Mapping::file(&file, 0, Access::Write)).unwrap();
    fill(&process, 2);
    bracketed(&process, EventKind::ProtectionPage, range(0, 2), || {
        assert_eq!(file.write_back(), 2);
    });
    assert!(!process.flags(page(0)).unwrap().dirty);
    process.store_u64(address(0), 3).unwrap();
    assert_eq!(file.write_back(), 1);
    drop(file);
    end(process);
}

#[test]
fn isolating_is_announced_as_migrate() {
    let process = process();
    let mut isolation = None;
    bracketed(&process, EventKind::Migrate, range(0, 4), || {
        isolation = Some(backend(&process).isolate(range(0, 4), system()));
    });
    assert_eq!(entry(&process, 0).residency, Residency::InTransit);
    unannounced(&process, || drop(isolation));
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn taking_and_giving_back_exclusive_access_is_announced() {
    let process = process();
    let owner = Owner::new();
    let taken = bracketed(&process, EventKind::Exclusive, range(0, 2), || {
        backend(&process).exclusive(range(0, 2), owner, None).unwrap();
    });
    assert_eq!(taken.owner(), Some(owner));
    assert_eq!(entry(&process, 0).access, Access::Atomic);
    // A CPU's touch: its announcement has no owner, so that the holder hears of it.
    let revoked = bracketed(&process, EventKind::Clear, range(0, 1), || {
        process.load_u64(address(0)).unwrap();
    });
    assert_eq!(revoked.owner(), None);
    let ended = bracketed(&process, EventKind::Clear, range(1, 1), || {
        backend(&process).end_exclusive(range(0, 2), owner);
    });
    assert_eq!(ended.owner(), None);
    unannounced(&process, || backend(&process).end_exclusive(range(0, 2), owner));
    end(process);
}

/// Acceptance B01: the release is heard before the memory goes.
#[test]
fn exit_is_announced_as_release() {
    let process = process();
    let machine = process.machine().clone();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let mm = process.address_space().mm().clone();
    let recorder = Recorder { mm, watched: range(0, 1), heard: Arc::clone(&heard) };
    let subscription = backend(&process).notifiers().subscribe(VaRange::ALL, recorder).unwrap();
    process.exit();
    let heard = heard.lock().unwrap();
    let [(event, _)] = heard.as_slice() else { panic!("{heard:?}") };
    assert_eq!(event.kind(), EventKind::Release);
    assert_eq!(machine.frames(), 0);
    drop(subscription);
}

#[test]
fn a_change_of_a_page_that_others_share_is_announced_to_them() {
    let process = process();
    let child = process.fork().unwrap();
    bracketed(&child, EventKind::Clear, range(0, 4), || {
        assert_eq!(process.reclaim(range(0, 4)), 4);
    });
    assert_values(&child, 0..4);
    bracketed(&child, EventKind::Migrate, range(0, 4), || {
        drop(backend(&process).isolate(range(0, 4), system()));
    });
    drop(child);
    end(process);
}

#[test]
fn unmapping_part_of_a_large_page_splits_it_first() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let heard = events(&process, range(0, 512), || process.unmap(range(3, 2)));
    let kinds: Vec<_> = heard.events.iter().map(|(event, _)| event.kind()).collect();
    assert_eq!(kinds, [EventKind::Clear, EventKind::Unmap]);
    assert_values(&process, (0..3).chain(5..512));
    assert_eq!(machine.frames(), 510);
    end(process);
}

// Private memory and forks.

#[test]
fn after_a_fork_each_sees_its_own_stores() {
    let process = process();
    let child = process.fork().unwrap();
    assert_eq!(process.machine().frames(), 4);
    child.store_u64(address(0), 10).unwrap();
    process.store_u64(address(1), 11).unwrap();
    assert_eq!(process.load_u64(address(0)), Ok(1));
    assert_eq!(child.load_u64(address(1)), Ok(2));
    assert_eq!(process.machine().check(), Ok(()));
    process.clone().exit();
    drop(child);
    assert_eq!(process.machine().frames(), 4);
    end(process);
}

#[test]
fn shared_memory_stays_shared_after_a_fork() {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 2), Mapping::shared(Access::Write)).unwrap();
    let child = process.fork().unwrap();
    child.store_u64(address(1), 7).unwrap();
    assert_eq!(process.load_u64(address(1)), Ok(7));
    drop(child);
    end(process);
}

#[test]
fn a_store_to_a_large_page_that_is_shared_copies_one_page_of_it() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let child = process.fork().unwrap();
    child.store_u64(address(5), 50).unwrap();
    assert_values(&process, 0..512);
    assert_values(&child, (0..5).chain(6..512));
    assert_eq!(machine.frames(), 513);
    assert_eq!(machine.check(), Ok(()));
    drop(child);
    end(process);
}

#[test]
fn a_private_file_mapping_copies_what_is_stored_to() {
    let machine = Machine::new();
    let process = machine.spawn();
    let file = machine.file(2);
    file.store(0, &5u64.to_ne_bytes()).unwrap();
    process.map(range(0, 2), Mapping::private_file(&file, 0, Access::Write)).unwrap();
    assert_eq!(process.load_u64(address(0)), Ok(5));
    process.store_u64(address(0), 6).unwrap();
    let mut bytes = [0; 8];
    file.load(0, &mut bytes).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 5);
    file.store(PAGE_SIZE as u64, &[1]).unwrap();
    assert_eq!(process.load_u64(address(1)), Ok(1));
    drop(file);
    end(process);
}

#[test]
fn a_file_lives_as_long_as_a_handle_or_a_mapping() {
    let machine = Machine::new();
    let process = machine.spawn();
    let file = machine.file(4);
    process.map(range(0, 4), Mapping::file(&file, 0, Access::Write)).unwrap();
    fill(&process, 4);
    process.unmap(range(1, 1));
    drop(file);
    assert_values(&process, [0, 2, 3]);
    process.unmap(range(0, 4));
    assert_eq!(machine.frames(), 0);
    end(process);
}

#[test]
fn loads_and_stores_cross_pages_and_words_must_be_aligned() {
    let process = process();
    let bytes: Vec<u8> = (0..=255).cycle().take(3 * PAGE_SIZE).collect();
    process.store(address(4) + 100, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    process.load(address(4) + 100, &mut back).unwrap();
    assert_eq!(back, bytes);
    let odd = address(0) + 4;
    assert_eq!(process.load_u64(odd), Err(SimError::Unaligned { address: odd }));
    let top = SimError::OutOfBounds { address: u64::MAX, bytes: 2 };
    assert_eq!(process.load(u64::MAX, &mut [0; 2]), Err(top));
    end(process);
}

#[test]
fn additions_of_many_threads_all_count() {
    let process = process();
    process.store_u64(address(0), 0).unwrap();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                (0..100).for_each(|_| {
                    process.fetch_add_u64(address(0), 1).unwrap();
                })
            });
        }
        for _ in 0..20 {
            process.reclaim(range(0, 1));
            process.relocate(range(0, 1));
        }
    });
    assert_eq!(process.load_u64(address(0)), Ok(400));
    end(process);
}

#[test]
fn a_move_to_an_overlapping_or_unmapped_place_changes_nothing() {
    let process = process();
    let bad = SimError::BadDestination { from: range(0, 4), to: page(2) };
    assert_eq!(process.remap(range(0, 4), page(2)), Err(bad));
    let hole = FaultError::Hole { page: page(16) };
    assert_eq!(process.remap(range(12, 8), page(64)), Err(hole.into()));
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn a_large_page_moves_whole_where_the_place_is_aligned_and_in_pieces_where_it_is_not() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    process.remap(range(0, 512), page(4096)).unwrap();
    assert_eq!(entry(&process, 4096).order, Order::HUGE);
    process.remap(range(4096, 512), page(8192 + 1)).unwrap();
    assert_eq!(entry(&process, 8193).order, Order::PAGE);
    assert_eq!(process.load_u64(address(8193 + 511)), Ok(512));
    end(process);
}

// Pins.

#[test]
fn a_pinned_page_stays_in_its_frame_whatever_happens() {
    let process = process();
    let pin = process.pin(range(0, 2)).unwrap();
    let frames = pin.frames().to_vec();
    assert_eq!(process.reclaim(range(0, 4)), 2);
    assert_eq!(process.relocate(range(0, 4)), 0);
    let isolation = backend(&process).isolate(range(0, 2), system());
    assert!(isolation.pages().is_empty());
    assert_eq!(isolation.stayed()[0].reason, StayReason::Pinned);
    drop(isolation);
    let refused = backend(&process).exclusive(range(0, 1), Owner::new(), None);
    let reason = StayReason::Pinned;
    assert_eq!(refused, Err(FaultError::NotExclusive { page: page(0), reason }));
    let child = process.fork().unwrap();
    process.store_u64(address(0), 9).unwrap();
    assert_eq!(child.load_u64(address(0)), Ok(1));
    assert_eq!(frame(&process, 0), frames[0]);
    drop(child);
    process.unmap(range(0, 16));
    assert_eq!(process.machine().frames(), 2, "the pin keeps its frames");
    assert_eq!(process.machine().check(), Ok(()));
    drop(pin);
    end(process);
}

/// Regression 38.
#[test]
fn pinning_brings_pages_home() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    to_device(&process, range(0, 2), &pagemap);
    let pin = process.pin(range(0, 2)).unwrap();
    assert_eq!(frame(&process, 0), pin.frames()[0]);
    assert_eq!(pagemap.used(), 0);
    drop(pin);
    end(process);
}

// Isolations.

#[test]
fn a_page_that_is_not_committed_goes_back() {
    let process = process();
    drop(backend(&process).isolate(range(0, 16), system()));
    assert_values(&process, 0..4);
    assert_eq!(entry(&process, 8).residency, Residency::Empty);
    end(process);
}

#[test]
fn what_cannot_be_isolated_is_listed_with_the_reason() {
    let machine = Machine::new();
    let process = process_on(&machine);
    let file = machine.file(1);
    process.map(range(4, 1), Mapping::file(&file, 0, Access::Write)).unwrap();
    process.protect(range(5, 1), Access::None);
    process.reclaim(range(0, 1));
    backend(&process).exclusive(range(1, 1), Owner::new(), None).unwrap();
    let pin = process.pin(range(2, 1)).unwrap();
    let (_, pagemap) = Vram::register(4);
    to_device(&process, range(6, 1), &pagemap);
    let other = backend(&process).isolate(range(3, 1), system());
    process.load_u64(address(8)).unwrap();
    let select = Select::System { to: pagemap.owner() };
    let isolation = backend(&process).isolate(range(0, 20), select);
    let stayed: Vec<_> =
        isolation.stayed().iter().map(|stayed| (stayed.pages, stayed.reason)).collect();
    let expected = [
        (range(0, 1), StayReason::SwappedOut),
        (range(1, 1), StayReason::Exclusive),
        (range(2, 1), StayReason::Pinned),
        (range(3, 1), StayReason::InTransit),
        (range(4, 1), StayReason::FileBacked),
        (range(5, 1), StayReason::Denied),
        (range(6, 1), StayReason::AlreadyThere),
        (range(16, 4), StayReason::Hole),
    ];
    assert_eq!(stayed, expected);
    assert!(isolation.pages().iter().all(|page| page.source == Source::Zero));
    assert_eq!(isolation.pages().len(), 9);
    drop((isolation, other, pin, file));
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn an_untouched_aligned_block_is_isolated_as_one_large_page() {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 1024), Mapping::anonymous(Access::Write).huge(true)).unwrap();
    let isolation = backend(&process).isolate(range(0, 514), system());
    let orders: Vec<_> = isolation.pages().iter().map(|page| page.order).collect();
    assert_eq!(orders, [Order::HUGE, Order::PAGE, Order::PAGE]);
    assert_eq!(machine.check(), Ok(()));
    drop(isolation);
    assert_eq!(entry(&process, 0).residency, Residency::Empty);
    end(process);
}

/// Regression 18.
#[test]
fn the_flags_of_a_page_survive_every_move() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    process.clear_soft_dirty(range(0, 4));
    process.store_u64(address(1), 2).unwrap();
    process.write_protect(range(2, 1));
    process.free(range(3, 1));
    let flags = |process: &Process| (0..4).map(|number| process.flags(page(number))).collect();
    let before: Vec<_> = flags(&process);
    for _ in 0..2 {
        to_device(&process, range(0, 4), &pagemap);
        assert_eq!(flags(&process), before);
        process.address_space().migrate_home(range(0, 4));
        assert_eq!(flags(&process), before);
        process.relocate(range(0, 4));
        assert_eq!(flags(&process), before);
    }
    process.reclaim(range(0, 3));
    process.swap_in(range(0, 3));
    assert_eq!(flags(&process), before);
    let rights = |process: &Process| (0..4).map(|number| entry(process, number).access).collect();
    let rights: Vec<_> = rights(&process);
    assert_eq!(rights, [Access::Read, Access::Write, Access::Read, Access::Read]);
    end(process);
}

#[test]
fn a_page_that_is_unmapped_in_transit_is_gone() {
    let process = process();
    let mut isolation = backend(&process).isolate(range(0, 4), system());
    process.unmap(range(1, 1));
    process.discard(range(2, 1));
    for index in 0..4 {
        isolation.allocate_home(index).unwrap();
    }
    assert_eq!(process.machine().check(), Ok(()));
    let committed = isolation.commit((0..4).map(|_| Placement::Back).collect());
    let (placed, gone) = (Committed::Placed, Committed::Gone);
    assert_eq!(committed, [placed, gone, gone, placed]);
    assert_eq!(process.machine().frames(), 2);
    assert_eq!(process.load_u64(address(2)), Ok(0));
    assert_values(&process, [0, 3]);
    end(process);
}

#[test]
fn a_page_that_is_moved_in_transit_arrives_at_its_new_address() {
    let process = process();
    let isolation = backend(&process).isolate(range(0, 4), system());
    process.remap(range(0, 2), page(64)).unwrap();
    assert_eq!(entry(&process, 64).residency, Residency::InTransit);
    assert!(process.flags(page(64)).unwrap().dirty);
    drop(isolation);
    assert_eq!(process.load_u64(address(64)), Ok(1));
    assert_eq!(process.load_u64(address(65)), Ok(2));
    end(process);
}

#[test]
fn a_page_that_is_forked_in_transit_arrives_at_both() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    let migration = process.address_space().migrate(range(0, 4), &pagemap);
    let child = process.fork().unwrap();
    assert_eq!(entry(&child, 0).residency, Residency::InTransit);
    assert_eq!(migration.run().moved, 4);
    assert!(is_on_device(&process, 0) && is_on_device(&child, 0));
    assert_eq!(entry(&process, 0).access, Access::Read);
    child.store_u64(address(0), 10).unwrap();
    assert_values(&process, 0..4);
    drop(child);
    end(process);
    assert_eq!(pagemap.used(), 0);
}

#[test]
fn an_exit_does_not_wait_for_an_isolation() {
    let machine = Machine::new();
    let process = process_on(&machine);
    let isolation = backend(&process).isolate(range(0, 4), system());
    process.exit();
    assert_eq!(machine.check(), Ok(()));
    drop(isolation);
    assert_eq!(machine.frames(), 0);
    assert_eq!(machine.check(), Ok(()));
}

#[test]
fn protection_that_is_taken_away_in_transit_is_gone_on_arrival() {
    let process = process();
    let isolation = backend(&process).isolate(range(0, 4), system());
    process.protect(range(0, 4), Access::Read);
    drop(isolation);
    assert_eq!(entry(&process, 0).access, Access::Read);
    process.protect(range(0, 4), Access::Write);
    assert_eq!(entry(&process, 0).access, Access::Read);
    fill(&process, 4);
    end(process);
}

#[test]
fn part_of_a_large_page_can_be_unmapped_in_transit() {
    let machine = Machine::new();
    let (_, pagemap) = Vram::register(2048);
    let process = huge_process(&machine);
    let migration = process.address_space().migrate(range(0, 512), &pagemap);
    process.unmap(range(10, 20));
    process.remap(range(100, 4), page(4097)).unwrap();
    assert_eq!(migration.run().moved, 512);
    assert_eq!(pagemap.used(), 512 - 20);
    assert_eq!(machine.check(), Ok(()));
    assert_eq!(entry(&process, 0).order, Order::PAGE);
    assert_eq!(process.load_u64(address(4098)), Ok(102));
    assert_values(&process, (0..10).chain(30..100).chain(104..512));
    end(process);
    assert_eq!(pagemap.used(), 0);
}

#[test]
fn a_large_page_is_split_in_transit_and_its_parts_arrive_each_for_itself() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let mut isolation = backend(&process).isolate(range(0, 512), system());
    isolation.split(0).unwrap();
    assert_eq!(isolation.pages().len(), 512);
    assert_eq!(isolation.pages()[511].page, page(511));
    let home = isolation.allocate_home(7).unwrap();
    let Source::System(from) = isolation.pages()[7].source else { panic!("in system memory") };
    let mut bytes = vec![0; PAGE_SIZE];
    isolation.memory().read(from, 0, &mut bytes);
    isolation.memory().write(home, 0, &bytes);
    let place = |index| if index == 7 { Placement::Home } else { Placement::Back };
    isolation.commit((0..512).map(place).collect());
    assert_eq!(frame(&process, 7), home);
    assert_values(&process, 0..512);
    end(process);
}

#[test]
fn isolating_part_of_a_large_page_splits_it_or_takes_nothing() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    machine.injector().fail("split", 0);
    let isolation = backend(&process).isolate(range(0, 3), system());
    assert!(isolation.pages().is_empty());
    assert_eq!(isolation.stayed()[0].reason, StayReason::LargePage);
    assert_eq!(isolation.stayed()[0].pages, range(0, 3));
    drop(isolation);
    let isolation = backend(&process).isolate(range(0, 3), system());
    assert_eq!(isolation.pages().len(), 3);
    drop(isolation);
    assert_values(&process, 0..512);
    end(process);
}

#[test]
fn touching_ones_own_page_in_transit_is_refused_by_name() {
    let process = process();
    let isolation = backend(&process).isolate(range(0, 4), system());
    let refused = FaultError::SelfWait { page: page(0) };
    assert_eq!(process.load_u64(address(0)), Err(refused.into()));
    drop(isolation);
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn whoever_touches_a_page_in_transit_sleeps_until_it_arrives() {
    let process = process();
    let isolation = backend(&process).isolate(range(0, 4), system());
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let process = &process;
        for number in 0..4 {
            let sender = sender.clone();
            scope.spawn(move || sender.send(process.load_u64(address(number)).unwrap()).unwrap());
        }
        // Another thread that gives up instead.
        let late = scope.spawn(|| {
            let deadline = Some(Instant::now() + Duration::from_millis(20));
            backend(process).fault(range(0, 1), Access::Read, None, deadline)
        });
        assert_eq!(late.join().unwrap(), Err(FaultError::TimedOut { page: page(0) }));
        assert!(receiver.try_recv().is_err(), "a page in transit was used");
        drop(isolation);
        let mut values: Vec<u64> = receiver.iter().take(4).collect();
        values.sort_unstable();
        assert_eq!(values, [1, 2, 3, 4]);
    });
    end(process);
}

#[test]
fn an_isolation_is_put_back_by_a_panic() {
    let process = process();
    let caught = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let _isolation = backend(&process).isolate(range(0, 4), system());
        panic!("on purpose");
    }));
    assert!(caught.is_err());
    assert_values(&process, 0..4);
    end(process);
}

/// Acceptance X09.
#[test]
fn a_page_of_the_reverse_map_is_isolated_in_every_address_space() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    to_device(&process, range(0, 2), &pagemap);
    let child = process.fork().unwrap();
    let Residency::Device(location) = entry(&process, 1).residency else { panic!("on a device") };
    let map = backend(&process).isolate(range(15, 1), system()).reverse_map();
    let mut isolation = None;
    bracketed(&child, EventKind::Migrate, range(1, 1), || {
        isolation = Some(map.isolate(&[location]));
    });
    assert_eq!(entry(&process, 1).residency, Residency::InTransit);
    assert_eq!(entry(&child, 1).residency, Residency::InTransit);
    assert!(map.isolate(&[location]).pages().is_empty(), "it is skipped in silence");
    drop(isolation);
    drop(child);
    assert_values(&process, 0..4);
    end(process);
}

// Devices.

#[test]
fn pages_come_home_when_a_cpu_touches_them() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    to_device(&process, range(0, 4), &pagemap);
    assert_eq!(process.machine().frames(), 0);
    assert_eq!(process.machine().check(), Ok(()));
    assert_values(&process, 0..4);
    assert_eq!(pagemap.used(), 0);
    end(process);
}

#[test]
fn pages_that_were_never_touched_move_and_come_home_as_zeroes() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    process.load_u64(address(9)).unwrap();
    to_device(&process, range(8, 2), &pagemap);
    assert_eq!(entry(&process, 8).access, Access::Write);
    // The device may store to it without a fault, so it counts as stored to.
    assert!(process.flags(page(8)).unwrap().dirty && process.flags(page(8)).unwrap().soft_dirty);
    assert_eq!(process.load_u64(address(8)), Ok(0));
    assert_eq!(process.load_u64(address(9)), Ok(0));
    end(process);
}

/// Regressions 22 and 56.
#[test]
fn unmapping_frees_device_memory_also_in_the_middle_of_a_large_page() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let (_, pagemap) = Vram::register(1024);
    to_device(&process, range(0, 512), &pagemap);
    assert_eq!(entry(&process, 0).order, Order::HUGE);
    process.unmap(range(4, 8));
    assert_eq!(pagemap.used(), 504);
    assert_eq!(machine.check(), Ok(()));
    assert_values(&process, (0..4).chain(12..512));
    end(process);
    assert_eq!(pagemap.used(), 0);
}

/// Regression 46: a store to a shared page on a device.
#[test]
fn a_fork_shares_pages_on_a_device() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    to_device(&process, range(0, 4), &pagemap);
    let child = process.fork().unwrap();
    assert_eq!(entry(&process, 0).residency, entry(&child, 0).residency);
    assert_eq!(entry(&process, 0).access, Access::Read);
    // A store of the device that keeps the page cannot go to memory that others share.
    let owner = Some(pagemap.owner());
    backend(&process).fault(range(0, 1), Access::Write, owner, None).unwrap();
    assert!(!is_on_device(&process, 0));
    process.store_u64(address(0), 9).unwrap();
    assert_values(&child, 0..4);
    drop(child);
    end(process);
    assert_eq!(pagemap.used(), 0);
}

#[test]
fn a_device_keeps_its_pages_in_its_own_faults() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    process.clear_soft_dirty(range(0, 4));
    to_device(&process, range(0, 4), &pagemap);
    assert_eq!(entry(&process, 0).access, Access::Read);
    let keep = Some(pagemap.owner());
    backend(&process).fault(range(0, 4), Access::Write, keep, None).unwrap();
    assert!(is_on_device(&process, 0));
    assert_eq!(entry(&process, 0).access, Access::Write);
    backend(&process).fault(range(0, 1), Access::Read, Some(Owner::new()), None).unwrap();
    assert!(!is_on_device(&process, 0));
    end(process);
}

/// Acceptance X10, regression 12.
#[test]
fn of_many_threads_that_touch_a_device_page_one_brings_it_home() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    to_device(&process, range(0, 1), &pagemap);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(process.load_u64(address(0)), Ok(1)));
        }
    });
    assert_eq!(pagemap.statistics().home_by_cpu_fault, 1);
    end(process);
}

#[test]
fn a_large_page_comes_home_whole_also_where_it_cannot_be_split() {
    /// Brings home the page that was touched, and nothing around it.
    #[derive(Debug)]
    struct OnlyThePage;
    impl Policy for OnlyThePage {
        fn name(&self) -> &'static str {
            "only the page"
        }
        fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
            plan.range = fault.page.into();
        }
    }
    let machine = Machine::new();
    let process = huge_process(&machine);
    let vram = Arc::new(Vram { capacity: 1024, ..Vram::default() });
    let policies = Policies::new([Arc::new(OnlyThePage) as Arc<dyn Policy>]);
    let options = PagemapOptions::new().policies(policies);
    let pagemap = DevicePagemap::register_with(vram, options);
    to_device(&process, range(0, 512), &pagemap);
    machine.injector().fail_always("split");
    assert_eq!(process.load_u64(address(9)), Ok(10));
    assert_eq!(pagemap.used(), 0);
    machine.injector().clear();
    assert_values(&process, 0..512);
    end(process);
}

#[test]
fn pages_of_other_devices_are_told_from_ones_own() {
    let process = process();
    let (_, one) = Vram::register(8);
    let (_, other) = Vram::register(8);
    to_device(&process, range(0, 1), &one);
    to_device(&process, range(1, 1), &other);
    let taken = |select| {
        let isolation = backend(&process).isolate(range(0, 4), select);
        let reasons = isolation.stayed().iter().map(|stayed| stayed.reason);
        assert!(reasons.eq(isolation.stayed().iter().map(|_| StayReason::Elsewhere)));
        isolation.pages().iter().map(|page| page.page).collect::<Vec<_>>()
    };
    assert_eq!(taken(Select::Device(one.owner())), [page(0)]);
    assert_eq!(taken(Select::Foreign(one.owner())), [page(1)]);
    assert_eq!(taken(Select::Foreign(Owner::new())), [page(0), page(1)]);
    assert_values(&process, 0..4);
    end(process);
}

/// Regression 55, CVE-2024-50096.
#[test]
fn a_failed_copy_home_loses_nothing() {
    let process = process();
    let (vram, pagemap) = Vram::register(64);
    to_device(&process, range(0, 4), &pagemap);
    vram.copies_fail.store(true, Ordering::Relaxed);
    let failed = FaultError::CopyFailed { page: page(2) };
    assert_eq!(process.load_u64(address(2)), Err(failed.into()));
    assert!(is_on_device(&process, 2));
    assert_eq!(process.machine().frames(), 0);
    vram.copies_fail.store(false, Ordering::Relaxed);
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn an_exclusive_page_is_revoked_by_any_other_use() {
    let process = process();
    let (one, other) = (Owner::new(), Owner::new());
    let space = backend(&process);
    let holder = |number| match entry(&process, number).residency {
        Residency::Exclusive { owner, .. } => Some(owner),
        _ => None,
    };
    space.exclusive(range(0, 8), one, None).unwrap();
    assert_eq!(holder(7), Some(one));
    space.exclusive(range(0, 1), other, None).unwrap();
    assert_eq!(holder(0), Some(other));
    space.fault(range(1, 1), Access::Read, Some(one), None).unwrap();
    assert_eq!(holder(1), Some(one));
    process.store_u64(address(1), 2).unwrap();
    process.clear_soft_dirty(range(2, 1));
    process.protect(range(3, 1), Access::Read);
    process.write_protect(range(4, 1));
    assert!((1..5).all(|number| holder(number).is_none()));
    let child = process.fork().unwrap();
    assert_eq!(holder(5), None);
    assert_values(&child, 1..4);
    space.exclusive(range(5, 1), one, None).unwrap();
    process.unmap(range(5, 1));
    drop(child);
    end(process);
}

/// Regression 25.
#[test]
fn files_and_shared_memory_are_not_held_exclusively_and_large_pages_are_split_for_it() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let owner = Owner::new();
    backend(&process).exclusive(range(3, 1), owner, None).unwrap();
    assert_eq!(entry(&process, 4).order, Order::PAGE);
    assert_eq!(entry(&process, 3).access, Access::Atomic);
    process.map(range(600, 1), Mapping::shared(Access::Write)).unwrap();
    let reason = StayReason::FileBacked;
    let refused = FaultError::NotExclusive { page: page(600), reason };
    assert_eq!(backend(&process).exclusive(range(600, 1), owner, None), Err(refused));
    let file = machine.file(1);
    process.map(range(601, 1), Mapping::private_file(&file, 0, Access::Write)).unwrap();
    backend(&process).exclusive(range(601, 1), owner, None).unwrap();
    drop(file);
    end(process);
}

/// Regression 23, CVE-2026-63950.
#[test]
fn a_mixed_range_with_an_exclusive_page_is_reclaimed_around_it() {
    let process = process();
    let owner = Owner::new();
    backend(&process).exclusive(range(1, 1), owner, None).unwrap();
    assert_eq!(process.reclaim(range(0, 4)), 3);
    assert_eq!(entry(&process, 1).access, Access::Atomic);
    assert_values(&process, 0..4);
    end(process);
}

// Failures.

#[test]
fn a_machine_without_memory_says_so_and_loses_nothing() {
    let machine = Machine::with(MachineOptions::new().system_pages(4));
    let process = process_on(&machine);
    let (_, pagemap) = Vram::register(64);
    let full = |number| SimError::Fault(FaultError::OutOfMemory { page: page(number) });
    assert_eq!(process.store_u64(address(4), 1), Err(full(4)));
    assert_eq!(process.load_u64(address(4)), Ok(0));
    assert_eq!(process.store_u64(address(4), 1), Err(full(4)));
    to_device(&process, range(0, 1), &pagemap);
    process.store_u64(address(4), 5).unwrap();
    assert_eq!(process.load_u64(address(0)), Err(full(0)));
    assert_eq!(process.reclaim(range(1, 1)), 1);
    assert_eq!(process.load_u64(address(0)), Ok(1));
    assert_eq!(process.load_u64(address(1)), Err(full(1)));
    process.discard(range(4, 1));
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn a_fork_that_cannot_copy_a_pinned_page_changes_nothing() {
    let machine = Machine::with(MachineOptions::new().system_pages(5));
    let process = process_on(&machine);
    let pin = process.pin(range(0, 4)).unwrap();
    assert_eq!(process.fork().unwrap_err(), SimError::OutOfMemory);
    assert_eq!(machine.frames(), 4);
    assert_eq!(entry(&process, 0).access, Access::Write);
    drop(pin);
    end(process);
}

/// Everything a process goes through, as far as it gets.
fn scenario(process: &Process, pagemap: &Arc<DevicePagemap>) -> Result<(), SimError> {
    process.map(range(0, 1024), Mapping::anonymous(Access::Write).huge(true))?;
    for number in 0..8 {
        process.store_u64(address(number), number + 1)?;
    }
    process.address_space().migrate(range(0, 600), pagemap).run();
    process.address_space().migrate_home(range(2, 2));
    let child = process.fork()?;
    child.store_u64(address(1), 2)?;
    child.load_u64(address(5))?;
    process.reclaim(range(0, 1024));
    process.collapse(range(0, 1024));
    process.relocate(range(0, 1024));
    process.machine().merge();
    let _pin = process.pin(range(0, 2))?;
    Ok(())
}

/// Regression 31.
#[test]
fn any_one_step_may_fail_and_nothing_is_lost() {
    let mut failed = 0;
    for step in 0.. {
        let injector = Injector::new();
        let machine = Machine::with(MachineOptions::new().injector(injector.clone()));
        let process = machine.spawn();
        let (_, pagemap) = Vram::register(2048);
        injector.fail_any(step);
        let result = scenario(&process, &pagemap);
        failed += u64::from(result.is_err());
        assert_eq!(machine.check(), Ok(()), "step {step}");
        let over = injector.asked_in_all() <= step;
        injector.clear();
        if result.is_ok() {
            assert_values(&process, 0..8);
        }
        end(process);
        assert_eq!(pagemap.used(), 0, "step {step}");
        if over {
            break;
        }
    }
    assert!(failed > 0);
}

// Many threads.

/// Numbers that look random, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % sides
    }
}

/// Does something to the memory that must not change what is in it.
fn disturb(process: &Process, pagemap: &Arc<DevicePagemap>, dice: &mut Dice, pages: u64) {
    let first = dice.roll(pages);
    let some = range(first, 1 + dice.roll((pages - first).min(8)));
    let all = range(0, pages);
    let space = process.address_space();
    match dice.roll(17) {
        0 => drop(process.reclaim(some)),
        1 => drop(process.swap_in(some)),
        2 => drop(process.relocate(some)),
        3 => drop(process.machine().merge()),
        4 => process.write_protect(some),
        5 => process.clear_soft_dirty(some),
        6 => drop(process.collapse(all)),
        7 => drop(process.split(some)),
        8 => drop(process.pin(some).unwrap()),
        9 => drop(process.fork().unwrap()),
        // Refused where the other thread has a pin.
        10 => drop(space.backend().exclusive(some, Owner::new(), None)),
        11 | 12 => drop(space.migrate(some, pagemap).run()),
        13 => drop(space.migrate(all, pagemap).run()),
        14 => drop(space.migrate_home(some)),
        15 => drop(space.migrate(some, pagemap)),
        _ => drop(pagemap.evict(1 + dice.roll(8))),
    }
}

fn stress(huge: bool, pages: u64, rounds: u64) {
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, pages), Mapping::anonymous(Access::Write).huge(huge)).unwrap();
    let (_, pagemap) = Vram::register(pages);
    thread::scope(|scope| {
        let (process, pagemap) = (&process, &pagemap);
        for seed in 0..2 {
            scope.spawn(move || {
                let mut dice = Dice(seed);
                (0..rounds).for_each(|_| disturb(process, pagemap, &mut dice, pages));
            });
        }
        for seed in 2..4 {
            scope.spawn(move || {
                let mut dice = Dice(seed);
                for _ in 0..rounds * 4 {
                    let word = address(dice.roll(pages)) + 8 * seed;
                    process.fetch_add_u64(word, 1).unwrap();
                }
            });
        }
    });
    assert_eq!(machine.check(), Ok(()));
    let sum = |seed: u64| -> u64 {
        (0..pages).map(|number| process.load_u64(address(number) + 8 * seed).unwrap()).sum()
    };
    assert_eq!((sum(2), sum(3)), (rounds * 4, rounds * 4));
    end(process);
    assert_eq!(pagemap.used(), 0);
}

#[test]
fn whatever_is_done_to_pages_at_the_same_time_no_addition_is_lost() {
    stress(false, 16, 400);
}

#[test]
fn whatever_is_done_to_large_pages_at_the_same_time_no_addition_is_lost() {
    stress(true, 512, 40);
}

#[test]
fn mappings_come_and_go_under_isolations_of_other_threads() {
    let machine = Machine::new();
    let process = process_on(&machine);
    let (_, pagemap) = Vram::register(64);
    thread::scope(|scope| {
        let (process, pagemap) = (&process, &pagemap);
        scope.spawn(move || {
            let mut dice = Dice(7);
            for _ in 0..300 {
                let some = range(dice.roll(12), 1 + dice.roll(4));
                match dice.roll(6) {
                    0 => process.unmap(some),
                    1 => process.discard(some),
                    2 => process.protect(some, Access::Read),
                    3 => drop(process.remap(some, page(32 + dice.roll(16)))),
                    4 => drop(process.fork().unwrap().store_u64(address(0), 1)),
                    _ => process.map(some, Mapping::anonymous(Access::Write)).unwrap(),
                }
            }
        });
        for seed in 0..2 {
            scope.spawn(move || {
                let mut dice = Dice(seed);
                for _ in 0..300 {
                    let some = range(dice.roll(40), 1 + dice.roll(8));
                    let _ = process.store_u64(some.address(), 1);
                    let _ = process.load_u64(some.address());
                    match dice.roll(4) {
                        0 => drop(process.address_space().migrate(some, pagemap)),
                        1 => drop(process.address_space().migrate_home(some)),
                        2 => drop(process.reclaim(some)),
                        _ => drop(process.address_space().migrate(some, pagemap).run()),
                    }
                }
            });
        }
    });
    end(process);
    assert_eq!(pagemap.used(), 0);
}

// Misuse.

/// Acceptance B02: what a device must never do does not pass unseen.
#[test]
fn a_read_through_a_stale_translation_is_detected() {
    let machine = Machine::with(MachineOptions::new().count_violations());
    let process = process_on(&machine);
    let stale = frame(&process, 0);
    let memory = backend(&process).memory();
    let mut bytes = [0; 8];
    memory.read(stale, 0, &mut bytes);
    assert_eq!(u64::from_ne_bytes(bytes), 1);
    process.unmap(range(0, 1));
    memory.read(stale, 0, &mut bytes);
    let violations = machine.violations();
    assert_eq!(violations.len(), 1);
    assert!(violations[0].contains("which is free"), "{violations:?}");
}

#[test]
fn the_number_of_a_freed_frame_is_not_given_out_again() {
    let process = process();
    let before: Vec<_> = (0..4).map(|number| frame(&process, number)).collect();
    process.discard(range(0, 4));
    fill(&process, 4);
    assert!((0..4).all(|number| !before.contains(&frame(&process, number))));
    end(process);
}

#[test]
fn a_device_that_writes_to_a_page_in_transit_is_detected() {
    let machine = Machine::with(MachineOptions::new().count_violations());
    let process = process_on(&machine);
    let stale = frame(&process, 0);
    let isolation = backend(&process).isolate(range(0, 1), system());
    backend(&process).memory().write(stale, 0, &[9; 8]);
    assert!(machine.violations()[0].contains("in transit"));
    drop(isolation);
    assert_eq!(process.load_u64(address(0)), Ok(1), "the write came to nothing");
    backend(&process).memory().fetch_update(stale, 0, &mut |word| word + 1);
    assert_eq!(process.load_u64(address(0)), Ok(2), "and now it may write");
    assert_eq!(machine.violations().len(), 1);
}

#[test]
fn a_copy_outside_its_isolation_and_a_write_to_the_zeroes_are_detected() {
    let machine = Machine::with(MachineOptions::new().count_violations());
    let process = process_on(&machine);
    let isolation = backend(&process).isolate(range(0, 1), system());
    let copies = isolation.memory();
    drop(isolation);
    copies.write(frame(&process, 0), 0, &[9]);
    process.load_u64(address(8)).unwrap();
    let zero = frame(&process, 8);
    backend(&process).memory().read(zero, 0, &mut [0; 8]);
    backend(&process).memory().write(zero, 0, &[9]);
    let violations = machine.violations();
    assert!(violations[0].contains("outside the time of its isolation"), "{violations:?}");
    assert!(violations[1].contains("frame of zeroes"), "{violations:?}");
    assert_eq!(violations.len(), 2);
}

#[test]
#[should_panic(expected = "violation: a Device's write to frame")]
fn a_misuse_panics_unless_it_is_to_be_counted() {
    let process = process();
    let stale = frame(&process, 0);
    process.discard(range(0, 1));
    backend(&process).memory().write(stale, 0, &[1]);
}

// Memory of the machine that is a device's.

fn registered(memory: Arc<dyn DeviceMemory>) -> Arc<DevicePagemap> {
    DevicePagemap::register_with(memory, PagemapOptions::new().policies(Policies::none()))
}

/// The page has the same memory all along, and nobody reaches it but who may.
#[test]
fn host_memory_that_is_used_by_who_does_not_have_it_is_detected() {
    let machine = Machine::with(MachineOptions::new().count_violations());
    let process = process_on(&machine);
    let (host, memory) = (machine.host_memory(4), backend(&process).memory());
    let pagemap = registered(host.clone());
    let in_system = frame(&process, 0);
    let mut bytes = [0; 8];
    let mut seen = 0;
    let mut detected = |what: &str| {
        seen += 1;
        let violations = machine.violations();
        assert_eq!(violations.len(), seen, "{what}: {violations:?}");
        assert!(violations[seen - 1].contains(what), "{violations:?}");
    };
    let migration = process.address_space().migrate(range(0, 1), &pagemap).copy();
    host.read(DeviceFrame(in_system.0), 0, &mut bytes);
    detected("a Host's read of frame");
    assert_eq!(migration.commit().moved, 1);
    memory.write(in_system, 0, &[9]);
    detected("a Device's write to frame");
    let Residency::Device(at) = entry(&process, 0).residency else { panic!("it has moved") };
    host.read(at.frame, 0, &mut bytes);
    assert_eq!(u64::from_ne_bytes(bytes), 1);
    host.write(at.frame, 0, &2_u64.to_ne_bytes());
    assert_eq!(process.load_u64(address(0)), Ok(2));
    assert_ne!(frame(&process, 0), in_system);
    host.write(at.frame, 0, &[9]);
    detected("which is free");
    memory.write(in_system, 0, &[9]);
    detected("which is free");
    assert_eq!(process.load_u64(address(0)), Ok(2));
    process.exit();
    assert_eq!((machine.frames(), pagemap.used()), (0, 0));
}

#[test]
fn host_memory_counts_against_the_machine_and_its_own_size() {
    let machine = Machine::with(MachineOptions::new().system_pages(5));
    let process = process_on(&machine);
    let host = machine.host_memory(3);
    let (first, second) = (registered(host.clone()), registered(host));
    assert_eq!((first.limit(), machine.frames()), (3, 4));
    assert_eq!(process.address_space().migrate(range(0, 2), &first).run().moved, 2);
    // Page 4 was never touched: it takes the machine's last frame.
    assert_eq!(process.address_space().migrate(range(4, 1), &second).run().moved, 1);
    assert_eq!(machine.frames(), 5);
    // Two devices have one memory, which is full, and what the second could evict is little.
    let report = process.address_space().migrate(range(2, 2), &second).run();
    assert_eq!((report.moved, report.reason(page(3))), (1, Some(StayReason::OutOfDeviceMemory)));
    assert_eq!(machine.check(), Ok(()));
    assert_values(&process, 0..4);
    end(process);
    assert_eq!((first.used(), second.used()), (0, 0));
}

/// Who begins with the block of a page on its way home, and is put back, still has it.
#[test]
fn a_way_home_in_place_that_is_given_up_changes_nothing() {
    let machine = Machine::new();
    let process = process_on(&machine);
    let pagemap = registered(machine.host_memory(4));
    assert_eq!(process.address_space().migrate(range(0, 2), &pagemap).run().moved, 2);
    let before = [entry(&process, 0), entry(&process, 1)];
    let select = Select::Device(pagemap.owner());
    for placements in [None, Some(vec![Placement::Home, Placement::Back])] {
        let mut isolation = backend(&process).isolate(range(0, 2), select);
        for index in 0..2 {
            let block = isolation.block(index).expect("it is on a device");
            let place = block.in_place(&*isolation.memory());
            let home = isolation.allocate_home(index).expect("it takes no memory");
            assert_eq!((Some(home), isolation.allocate_home(index)), (place, Ok(home)));
        }
        assert_eq!((machine.frames(), machine.check()), (4, Ok(())));
        let Some(placements) = placements else {
            drop(isolation);
            assert_eq!([entry(&process, 0), entry(&process, 1)], before);
            continue;
        };
        assert_eq!(isolation.commit(placements), [Committed::Placed; 2]);
    }
    assert_eq!(entry(&process, 1), before[1]);
    assert!(matches!(entry(&process, 0).residency, Residency::System(_)));
    assert_eq!((machine.check(), pagemap.used()), (Ok(()), 1));
    assert_values(&process, 0..2);
    end(process);
}

#[test]
fn a_large_page_that_a_device_has_in_place_is_split_on_its_way_home() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let pagemap = registered(machine.host_memory(512));
    let space = process.address_space();
    assert_eq!(space.migrate(range(0, 512), &pagemap).run().without_copy, 512);
    let select = Select::Device(pagemap.owner());
    let mut isolation = backend(&process).isolate(range(0, 512), select);
    let whole = isolation.allocate_home(0).expect("it takes no memory");
    isolation.split(0).expect("nothing says that it may not");
    let pieces = (0..512).map(|index| isolation.allocate_home(index).expect("nor does a piece"));
    assert!(pieces.eq((whole.0..whole.0 + 512).map(Frame)));
    let mut placements: Vec<_> = (0..512).map(|_| Placement::Home).collect();
    placements[7] = Placement::Back;
    isolation.commit(placements);
    assert_eq!((machine.check(), pagemap.used(), machine.frames()), (Ok(()), 1, 512));
    assert_values(&process, [0, 7, 511]);
    end(process);
    assert_eq!(pagemap.used(), 0);
}

#[test]
fn a_large_page_is_filled_where_there_is_room_and_single_pages_where_there_is_not() {
    let machine = Machine::with(MachineOptions::new().system_pages(513));
    let process = machine.spawn();
    let mapping = Mapping::anonymous(Access::Write).huge(true);
    process.map(PageRange::new(BASE, 2 * HUGE).unwrap(), mapping).unwrap();
    process.store_u64(address(5), 1).unwrap();
    process.store_u64(address(700), 1).unwrap();
    assert_eq!(entry(&process, 5).order, Order::HUGE);
    assert_eq!(entry(&process, 700).order, Order::PAGE);
    end(process);
}

// What a review of the machine found.

#[test]
fn a_probe_of_a_page_that_may_be_dropped_is_not_dropped() {
    let process = process();
    process.free(range(0, 1));
    process.clear_soft_dirty(range(0, 1));
    process.uprobe(page(0), &[9, 9]).unwrap();
    let flags = process.flags(page(0)).unwrap();
    assert!(flags.dirty && flags.soft_dirty, "{flags:?}");
    process.reclaim(range(0, 1));
    let mut bytes = [0; 2];
    process.load(address(0), &mut bytes).unwrap();
    assert_eq!(bytes, [9, 9]);
    end(process);
}

#[test]
fn what_is_done_to_zeroes_in_transit_holds_after_they_went_back() {
    let process = process();
    process.load_u64(address(5)).unwrap();
    let isolation = backend(&process).isolate(range(5, 1), system());
    assert!(!process.flags(page(5)).unwrap().dirty, "nobody may have stored to it");
    process.remap(range(5, 1), page(40)).unwrap();
    drop(isolation);
    assert!(process.flags(page(40)).unwrap().soft_dirty, "moved in transit");

    let isolation = backend(&process).isolate(range(40, 1), system());
    process.clear_soft_dirty(range(40, 1));
    drop(isolation);
    assert!(!process.flags(page(40)).unwrap().soft_dirty, "cleared in transit");
    assert_eq!(process.load_u64(address(40)), Ok(0));
    end(process);
}

#[test]
fn zeroes_that_become_a_page_count_as_stored_to_where_stores_are_allowed() {
    let process = process();
    let (_, pagemap) = Vram::register(64);
    let migration = process.address_space().migrate(range(8, 3), &pagemap);
    process.protect(range(9, 1), Access::Read);
    assert_eq!(migration.run().moved, 3);
    for (number, open) in [(8, true), (9, false), (10, true)] {
        let flags = process.flags(page(number)).unwrap();
        assert_eq!((flags.dirty, flags.soft_dirty), (open, open), "page {number}");
        assert_eq!(entry(&process, number).access >= Access::Write, open, "page {number}");
    }
    end(process);
}

/// A large page that comes to be between the finding and the taking is split like all others: the
/// refusal of a split is the only reason for one to stay.
#[test]
fn a_large_page_that_is_made_while_its_isolation_is_announced_is_split() {
    struct Collapser {
        mm: Mm,
        done: bool,
    }
    impl Notifier for Collapser {
        type Fence = ();
        fn invalidate(&mut self, event: &Event) {
            let first =
                event.kind() == EventKind::Migrate && !std::mem::replace(&mut self.done, true);
            if first && let Some(space) = self.mm.users() {
                // The first store to an untouched block makes a large page, without announcement.
                let untouched = PageRange::new(address(512), HUGE).unwrap();
                space.backend().fault(untouched, Access::Write, None, None).unwrap();
            }
        }
    }
    let machine = Machine::new();
    let process = huge_process(&machine);
    process.split(range(0, 512));
    let mm = process.address_space().mm().clone();
    let collapser = Collapser { mm, done: false };
    let subscription = backend(&process).notifiers().subscribe(VaRange::ALL, collapser).unwrap();
    let isolation = backend(&process).isolate(range(508, 8), system());
    assert_eq!(isolation.stayed(), []);
    assert_eq!(isolation.pages().len(), 8);
    drop(isolation);
    drop(subscription);
    assert_values(&process, 0..512);
    end(process);
}

#[test]
fn only_a_page_in_the_memory_it_is_to_go_to_is_already_there() {
    let process = process();
    let (_, here) = Vram::register(64);
    let (_, there) = Vram::register(64);
    to_device(&process, range(0, 1), &here);
    to_device(&process, range(1, 1), &there);
    let select = Select::System { to: here.owner() };
    let isolation = backend(&process).isolate(range(0, 2), select);
    let stayed: Vec<_> = isolation.stayed().iter().map(|one| (one.pages, one.reason)).collect();
    let expected = [(range(0, 1), StayReason::AlreadyThere), (range(1, 1), StayReason::Elsewhere)];
    assert_eq!(stayed, expected);
    drop(isolation);
    end(process);
}

/// Threads, each of which holds the isolation of one page and touches the page of the next.
fn circle(threads: u64) {
    let process = process();
    let barrier = Barrier::new(threads as usize);
    let results: Vec<_> = thread::scope(|scope| {
        let each = |number| {
            let (process, barrier) = (&process, &barrier);
            scope.spawn(move || {
                let isolation = backend(process).isolate(range(number, 1), system());
                barrier.wait();
                let next = (number + 1) % threads;
                let result = process.load_u64(address(next));
                drop(isolation);
                (next, result)
            })
        };
        let all: Vec<_> = (0..threads).map(each).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut refused = 0;
    for (next, result) in results {
        let refusal = FaultError::SelfWait { page: page(next) };
        if result == Err(refusal.into()) {
            refused += 1;
        } else {
            assert_eq!(result, Ok(next + 1));
        }
    }
    assert_eq!(refused, 1, "whoever would close the circle is refused, and the others go on");
    end(process);
}

#[test]
fn two_threads_that_wait_for_each_others_isolations_do_not_wait_for_ever() {
    circle(2);
}

#[test]
fn three_threads_that_wait_for_each_others_isolations_do_not_wait_for_ever() {
    circle(3);
}

/// While each announcement of a change is made, what it is about changes to and fro.
#[test]
fn a_change_is_made_although_what_it_is_about_never_stays_the_same() {
    struct Swing {
        pins: Option<uhmm::sim::Pin>,
        process: Process,
        heard: Arc<AtomicU64>,
    }
    impl Notifier for Swing {
        type Fence = ();
        fn invalidate(&mut self, event: &Event) {
            let round = self.heard.fetch_add(1, Ordering::Relaxed);
            if event.kind() == EventKind::Clear && round < 10 {
                // Pinned pages cannot be moved: now it is the other one that can.
                self.pins = Some(self.process.pin(range(round % 2, 1)).unwrap());
            }
        }
    }
    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 2), Mapping::shared(Access::Write)).unwrap();
    let child = process.fork().unwrap();
    fill(&process, 2);
    fill(&child, 2);
    let heard = Arc::new(AtomicU64::new(0));
    let swing = Swing {
        pins: Some(child.pin(range(1, 1)).unwrap()),
        process: process.clone(),
        heard: Arc::clone(&heard),
    };
    let subscription = backend(&child).notifiers().subscribe(VaRange::ALL, swing).unwrap();
    assert_eq!(process.relocate(range(0, 2)), 1);
    assert_eq!(heard.load(Ordering::Relaxed), 2, "the second round announces all found so far");
    drop(subscription);
    assert_values(&child, 0..2);
    drop(child);
    end(process);
}

#[test]
fn to_hold_all_of_an_address_space_fails_at_the_first_hole() {
    let process = process();
    let first = FaultError::Hole { page: PageRange::ALL.first() };
    let held = backend(&process).exclusive(PageRange::ALL, Owner::new(), None);
    assert_eq!(held, Err(first));
    // From the middle of one piece into the next.
    process.map(range(16, 1024), Mapping::anonymous(Access::Write)).unwrap();
    backend(&process).exclusive(range(500, 30), Owner::new(), None).unwrap();
    assert_eq!(entry(&process, 500).access, Access::Atomic);
    assert_eq!(entry(&process, 529).access, Access::Atomic);
    end(process);
}

/// Each untouched page of this would be looked at for days.
#[test]
fn untouched_memory_is_passed_over_at_once() {
    let process = process();
    let large = PageRange::new(BASE, 1 << 50).unwrap();
    process.map(large, Mapping::anonymous(Access::Write)).unwrap();
    process.store_u64(address(1 << 30), 1).unwrap();
    let (_, pagemap) = Vram::register(64);
    to_device(&process, range(1 << 30, 1), &pagemap);
    let isolation = backend(&process).isolate(large, Select::Device(pagemap.owner()));
    assert_eq!(isolation.pages().len(), 1);
    let pages: u64 = isolation.stayed().iter().map(|stayed| stayed.pages.pages()).sum();
    assert_eq!(pages, large.pages() - 1);
    drop(isolation);
    end(process);
}

#[test]
fn a_page_that_is_shared_is_copied_before_it_is_pinned_for_reading() {
    let process = process();
    let child = process.fork().unwrap();
    process.protect(range(0, 1), Access::Read);
    let pin = process.pin(range(0, 1)).unwrap();
    assert_ne!(frame(&process, 0), frame(&child, 0));
    process.protect(range(0, 1), Access::Write);
    process.store_u64(address(0), 1).unwrap();
    assert_eq!(frame(&process, 0), pin.frames()[0], "the pinned page left its frame");
    assert_values(&child, 0..4);
    drop((child, pin));
    end(process);
}

#[test]
fn a_probe_of_a_pinned_page_is_refused_and_one_of_a_hole_is_no_probe_of_a_shared_mapping() {
    let process = process();
    let pin = process.pin(range(0, 1)).unwrap();
    let refused = SimError::Pinned { page: page(0) };
    assert_eq!(process.uprobe(page(0), &[9, 9]), Err(refused));
    assert_eq!(frame(&process, 0), pin.frames()[0]);
    drop(pin);
    process.uprobe(page(0), &[1]).unwrap();
    let hole = FaultError::Hole { page: page(16) };
    assert_eq!(process.uprobe(page(16), &[9]), Err(hole.into()));
    assert_values(&process, 0..4);
    end(process);
}

#[test]
fn a_page_of_a_file_stays_dirty_when_it_is_unmapped() {
    let machine = Machine::new();
    let file = machine.file(4);
    let process = machine.spawn();
    process.map(range(0, 4), Mapping::file(&file, 0, Access::Write)).unwrap();
    fill(&process, 3);
    process.reclaim(range(0, 1));
    process.unmap(range(1, 1));
    let child = process.fork().unwrap();
    child.store_u64(address(2), 3).unwrap();
    child.exit();
    process.load_u64(address(3)).unwrap();
    file.store(3 << 12, &[4]).unwrap();
    assert_eq!(file.write_back(), 4);
    assert_eq!(file.write_back(), 0);
    drop(file);
    end(process);
}

#[test]
fn a_fault_begins_no_step_after_its_deadline() {
    struct Slow(Instant);
    impl Notifier for Slow {
        type Fence = ();
        fn invalidate(&mut self, _: &Event) {
            while Instant::now() < self.0 {
                thread::yield_now();
            }
        }
    }
    let machine = Machine::new();
    let process = huge_process(&machine);
    let child = process.fork().unwrap();
    let late = Err(FaultError::TimedOut { page: page(0) });
    let fault =
        |deadline| backend(&process).fault(range(0, 1), Access::Write, None, Some(deadline));
    unannounced(&process, || assert_eq!(fault(Instant::now()), late));
    assert_eq!(entry(&process, 0).order, Order::HUGE);
    // The split takes until the deadline, and the copy is not begun.
    let deadline = Instant::now() + Duration::from_millis(200);
    let slow = Slow(deadline);
    let subscription = backend(&process).notifiers().subscribe(VaRange::ALL, slow).unwrap();
    assert_eq!(fault(deadline), late);
    assert_eq!(entry(&process, 0).order, Order::PAGE);
    assert_eq!(frame(&process, 0), frame(&child, 0));
    drop(subscription);
    drop(child);
    assert_values(&process, 0..512);
    end(process);
}

/// Whoever may use an entry counts as if it did: it is not asked again.
#[test]
fn a_page_that_may_be_dropped_counts_as_used_while_it_can_be_used() {
    let process = process();
    process.free(range(0, 1));
    assert_eq!(entry(&process, 0).access, Access::Read);
    assert!(process.flags(page(0)).unwrap().young);
    end(process);
}

#[test]
fn frames_are_accounted_for_while_isolations_have_them() {
    let machine = Machine::new();
    let process = huge_process(&machine);
    let mut isolation = backend(&process).isolate(range(0, 512), system());
    let other = backend(&process).isolate(range(600, 2), system());
    assert_eq!(machine.check(), Ok(()));
    isolation.allocate_home(0).unwrap();
    assert_eq!(machine.check(), Ok(()));
    isolation.split(0).unwrap();
    assert_eq!(machine.check(), Ok(()));
    isolation.allocate_home(3).unwrap();
    assert_eq!(machine.check(), Ok(()));
    process.unmap(range(0, 2));
    drop(isolation);
    assert_eq!(machine.check(), Ok(()), "nothing is left behind while another goes on");
    drop(other);
    assert_values(&process, 2..512);
    end(process);
}
