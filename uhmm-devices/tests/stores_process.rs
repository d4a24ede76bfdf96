//! What stores do to the process that they are in, and what it leaves when it ends: each in a
//! process of its own, which is this program once more.
#![cfg(all(target_os = "linux", not(any(loom, shuttle))))]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{range, word};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use uhmm::sim::{Machine, Mapping, Process, SimError};
use uhmm::{
    Access, CopyJob, CopyKind, DeviceMemory, DevicePagemap, FaultError, Frame, Order, PAGE_SIZE,
    StayReason, SystemMemory,
};
use uhmm_devices::store::{Store, StoreOptions, StoreSpec, Verification};

/// Which story the process is to play, and in which directory.
const STORY: &str = "UHMM_STORES_STORY";
const DIRECTORY: &str = "UHMM_STORES_DIRECTORY";

/// The system's allocator, which counts what each thread asks of it.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: each call is handed to the system's allocator as it is. The counter has no destructor and
// takes no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// System memory that takes what is written, and gives what does not compress.
struct Noise;

impl SystemMemory for Noise {
    fn read(&self, frame: Frame, _: usize, bytes: &mut [u8]) {
        let (words, _) = bytes.as_chunks_mut::<8>();
        for (word, index) in words.iter_mut().zip(1 + frame.0 * 512..) {
            *word = index.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23).to_ne_bytes();
        }
    }

    fn write(&self, _: Frame, _: usize, bytes: &[u8]) {
        std::hint::black_box(bytes);
    }

    fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
        unreachable!("stores update nothing")
    }
}

#[test]
fn nothing_is_allocated_on_the_way_home() {
    let path = std::env::temp_dir();
    for spec in
        [StoreSpec::Compressed { limit_bytes: None }, StoreSpec::File { path, limit_bytes: None }]
    {
        let options = StoreOptions::new().verification(Verification::Abort);
        let store = spec.open(options).expect("a store can be made");
        let order = Order::new(3).expect("a block of eight");
        let blocks: Vec<_> = (0..200)
            .map(|from| {
                let to = store.allocate(order).expect("there is room");
                let from = Frame(from * 8);
                let mut jobs = [CopyJob::new(CopyKind::In { from, to }, order)];
                store.copy(&Noise, &mut jobs);
                assert!(jobs[0].is_complete());
                to
            })
            .collect();
        let before = ALLOCATIONS.get();
        for &from in &blocks {
            let mut jobs = [CopyJob::new(CopyKind::Out { from, to: Frame(0) }, order)];
            store.copy(&Noise, &mut jobs);
            assert!(jobs[0].is_complete());
            store.free(from, order);
        }
        assert_eq!(ALLOCATIONS.get() - before, 0, "{store:?}");
        assert_eq!(store.statistics().pages_out, 1600);
    }
    // The counter counts.
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(ALLOCATIONS.get() - before, 1);
}

#[test]
fn a_file_that_may_not_grow_refuses_and_no_signal_is_sent() {
    play("limited", &[]).check_passed();
}

#[test]
fn a_full_disk_is_survived_and_no_page_is_lost() {
    let unshared = play("full", &["unshare", "--map-root-user", "--mount"]);
    let denied = String::from_utf8_lossy(&unshared.output.stderr).contains("unshare failed");
    if denied && std::env::var_os("UHMM_REQUIRE_UFFD").is_none() {
        eprintln!("skipped: this system does not let a user mount file systems of their own");
        return;
    }
    unshared.check_passed();
}

#[test]
fn nothing_is_left_of_a_process_that_is_killed() {
    let played = play("killed", &[]);
    assert_eq!(played.output.status.signal(), Some(Signal::KILL.as_raw()), "{played:?}");
    assert_eq!(played.left_behind, 0, "files are left");
}

#[test]
fn a_page_that_somebody_overwrote_ends_the_process_with_a_message() {
    let played = play("overwritten", &[]);
    assert_eq!(played.output.status.signal(), Some(Signal::ABORT.as_raw()), "{played:?}");
    let stderr = String::from_utf8_lossy(&played.output.stderr);
    assert!(stderr.contains("is not what was stored there"), "{stderr}");
}

#[test]
fn a_program_that_closes_all_descriptors_gets_an_error_and_keeps_its_files() {
    play("closed", &[]).check_passed();
}

#[derive(Debug)]
struct Played {
    output: Output,
    left_behind: usize,
}

impl Played {
    fn check_passed(&self) {
        let stderr = String::from_utf8_lossy(&self.output.stderr);
        assert!(self.output.status.success(), "{:?}: {stderr}", self.output.status);
        assert_eq!(self.left_behind, 0, "files are left");
    }
}

/// Plays a story in a process of its own, which `prefix` runs.
fn play(story: &str, prefix: &[&str]) -> Played {
    let directory = tempfile::tempdir().expect("there is a place for a directory");
    let program = std::env::current_exe().expect("this program has a name");
    let program = program.to_str().expect("its name is text");
    let mut words = prefix.iter().copied().chain([program]);
    let output = Command::new(words.next().expect("there is a program"))
        .args(words)
        .args(["--exact", "story", "--ignored", "--nocapture"])
        .env(STORY, story)
        .env(DIRECTORY, directory.path())
        .output()
        .expect("this program runs once more");
    let files = directory.path().read_dir().expect("the directory is there");
    Played { output, left_behind: files.count() }
}

#[test]
#[ignore = "it is what the others run in a process of its own"]
fn story() {
    let directory = std::env::var(DIRECTORY).expect("it is run by the others");
    let directory = Path::new(&directory);
    match &*std::env::var(STORY).expect("it is run by the others") {
        "limited" => limited(directory),
        "full" => full(directory),
        "killed" => killed(directory),
        "overwritten" => overwritten(directory),
        "closed" => closed(directory),
        other => panic!("there is no story {other}"),
    }
}

/// A process with 16 MiB of pages that do not compress, and a store in a file.
struct Rig {
    process: Process,
    store: Store,
    pagemap: std::sync::Arc<DevicePagemap>,
}

const PAGES: u64 = 4096;

impl Rig {
    fn new(directory: &Path, verification: Verification) -> Rig {
        let process = Machine::new().spawn();
        process.map(range(0, PAGES), Mapping::anonymous(Access::Write)).expect("there is room");
        for index in 0..PAGES {
            process.store(word(index), &contents(index)).expect("memory is there");
        }
        let spec = StoreSpec::File { path: directory.to_owned(), limit_bytes: None };
        let options = StoreOptions::new().verification(verification);
        let store = spec.open(options).expect("a store can be made");
        let pagemap = DevicePagemap::register(store.memory());
        Rig { process, store, pagemap }
    }

    /// Moves all pages out, as far as there is room, and returns how many are out. The first batch
    /// that finds none makes others come home; from then on the store says that it has no room.
    fn migrate(&self) -> u64 {
        let space = self.process.address_space();
        let mut moved = 0;
        for first in (0..PAGES).step_by(64) {
            if self.store.has_room(64) {
                let report = space.migrate(range(first, 64), &self.pagemap).run();
                let reasons = [StayReason::OutOfDeviceMemory, StayReason::CopyFailed];
                assert!(report.stayed.iter().all(|stayed| reasons.contains(&stayed.reason)));
                moved += report.moved;
            }
        }
        let evicted = self.pagemap.statistics().home_by_eviction;
        assert!(evicted <= 64, "{evicted} pages came home for others");
        assert_eq!(self.store.statistics().pages(), moved - evicted);
        moved - evicted
    }

    fn check(&self) {
        for index in 0..PAGES {
            let mut bytes = [0; PAGE_SIZE];
            self.process.load(word(index), &mut bytes).expect("memory is there");
            assert_eq!(bytes, contents(index), "page {index}");
        }
    }
}

fn contents(index: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    Noise.read(Frame(index), 0, &mut bytes);
    bytes
}

fn limited(directory: &Path) {
    const LIMIT: u64 = 5 << 20;
    let rig = Rig::new(directory, Verification::Abort);
    setrlimit(Resource::Fsize, Rlimit { current: Some(LIMIT), maximum: None })
        .expect("it is lower");
    assert_eq!(rig.migrate(), 1024, "two extents are within the limit");
    assert!(rig.store.statistics().refused > 0);
    rig.check();
    // The limit sinks below what is there already: then the write is refused.
    setrlimit(Resource::Fsize, Rlimit { current: Some(4096), maximum: None }).expect("it is lower");
    let report = rig.process.address_space().migrate(range(0, 64), &rig.pagemap).run();
    assert_eq!((report.moved, report.stayed[0].reason), (0, StayReason::CopyFailed));
    rig.check();
}

fn full(directory: &Path) {
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=7m", "tmpfs"])
        .arg(directory)
        .status()
        .expect("there is a program called mount");
    assert!(mounted.success(), "no file system can be mounted");
    let rig = Rig::new(directory, Verification::Abort);
    assert_eq!(rig.migrate(), 3 * 512, "three extents of 2 MiB fit 7 MiB");
    assert!(rig.store.statistics().refused > 0);
    rig.check();
    assert_eq!(rig.store.statistics().failed_reads, 0);
    assert_eq!(rig.pagemap.used(), 0);
}

fn killed(directory: &Path) {
    let rig = Rig::new(directory, Verification::Off);
    assert_eq!(rig.migrate(), PAGES);
    let files = directory.read_dir().expect("the directory is there");
    assert_eq!(files.count(), 0, "the file has a name");
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, Signal::KILL).expect("a process may kill itself");
}

fn overwritten(directory: &Path) {
    // No core file is written of it.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).expect("it is lower");
    let rig = Rig::new(directory, Verification::Abort);
    assert_eq!(rig.migrate(), PAGES);
    let file = std::fs::File::options().write(true).open(descriptor(directory));
    let wrong = [0x55; 16];
    for page in 0..PAGES {
        let at = page * PAGE_SIZE as u64 + 100;
        file.as_ref().expect("it can be opened").write_all_at(&wrong, at).expect("it is written");
    }
    rig.check();
}

/// Returns the name that the descriptor of the store's file has in procfs.
fn descriptor(directory: &Path) -> PathBuf {
    let files = std::fs::read_dir("/proc/self/fd").expect("procfs is mounted");
    let in_directory = |file: &PathBuf| {
        let target = std::fs::read_link(file).unwrap_or_default();
        target.starts_with(directory) && target != directory
    };
    let found = files.flatten().map(|file| file.path()).find(in_directory);
    found.expect("the store has a file")
}

fn closed(directory: &Path) {
    let rig = Rig::new(directory, Verification::Off);
    assert_eq!(rig.migrate(), PAGES);
    let number = descriptor(directory).file_name().and_then(|name| name.to_str()?.parse().ok());
    let number: i32 = number.expect("descriptors are numbers");
    // SAFETY: the store knows that others may close its descriptor, and looks before each use.
    drop(unsafe { OwnedFd::from_raw_fd(number) });

    // The program makes a file, which may get the number of the store's on the disk too, and opens it
    // until it has the number of the descriptor.
    let path = directory.join("own");
    let own = b"not a page".repeat(10_000);
    std::fs::write(&path, &own).expect("it is written");
    let open = || std::fs::File::options().read(true).write(true).open(&path).expect("it is there");
    let files: Vec<_> = std::iter::repeat_with(open).take(8).collect();
    assert!(files.iter().any(|file| file.as_raw_fd() == number), "the number was not used again");

    let error = rig.process.load_u64(word(3)).expect_err("its contents are gone");
    assert!(matches!(error, SimError::Fault(FaultError::CopyFailed { .. })), "{error}");
    assert!(rig.store.statistics().failed_reads > 0);
    rig.process.map(range(PAGES, 4), Mapping::anonymous(Access::Write)).expect("there is room");
    rig.process.store_u64(word(PAGES), 7).expect("memory is there");
    let report = rig.process.address_space().migrate(range(PAGES, 1), &rig.pagemap).run();
    assert_eq!(report.moved, 0);
    assert_eq!(rig.process.load_u64(word(PAGES)), Ok(7));

    drop(rig);
    for file in &files {
        file.metadata().expect("it was not closed");
    }
    assert_eq!(std::fs::read(&path).expect("it is there"), own);
    std::fs::remove_file(&path).expect("it is there");
}
