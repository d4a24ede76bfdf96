//! What of each kind of memory moves to a device, and why the rest stays. `docs/mappings.md` is the
//! table of what is shown here.

mod common;
mod kernel;

#[path = "kinds/stays.rs"]
mod stays;

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use common::memory::{
    Backing, Mapping, NONE, R, RW, W, advise, disk_file, lines, lock, memory_file, part, place,
    protect, secret_file, unlock,
};
use common::rig::{Gpu, attach, attach_with, is_home, is_out};
use common::{eventually, exit_now, fork, in_own_process, trap};
use kernel::ring::Ring;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm::policy::Policies;
use uhmm::{
    Clock, DevicePagemap, MigrateReport, Order, PAGE_SIZE, Page, PageRange, PagemapOptions,
    Residency, StayReason,
};
use uhmm_linux::{Options, Process};

/// `MADV_GUARD_INSTALL` (Linux 6.13).
const GUARD_INSTALL: i32 = 102;
/// `MADV_PAGEOUT` (Linux 5.4).
const PAGEOUT: i32 = 21;

/// A process that is attached, and device memory to move to.
struct Rig {
    process: Process,
    memory: Arc<DevicePagemap>,
}

impl Rig {
    fn new() -> Rig {
        let process = attach();
        let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
        let memory = DevicePagemap::register_with(process.host_memory(16384), options);
        Rig { process, memory }
    }

    fn migrate(&self, range: PageRange) -> MigrateReport {
        self.process.migrate(range, &self.memory).run()
    }

    /// Sees that all of `range` moves, and nothing stays.
    #[track_caller]
    fn assert_moves(&self, range: PageRange) {
        let report = self.migrate(range);
        assert_eq!((report.moved, &*report.stayed), (range.pages(), &[][..]), "{report:?}");
        let stayed = range.iter().find(|&page| !is_out(&self.process, page));
        assert_eq!(stayed, None, "it is on the device");
    }

    /// Sees that nothing of `range` moves, and why.
    #[track_caller]
    fn assert_stays(&self, range: PageRange, reason: StayReason) {
        let report = self.migrate(range);
        assert_eq!(report.moved, 0, "{report:?}");
        for page in range.iter() {
            assert_eq!(report.reason(page), Some(reason), "{page}: {report:?}");
        }
    }

    fn residency(&self, page: Page) -> Residency {
        self.process.snapshot(page.into())[0].residency
    }
}

#[track_caller]
fn assert_filled(mapping: &Mapping) {
    (0..mapping.range().pages()).for_each(|index| assert_eq!(mapping.peek(index), 1 + index));
}

fn fill(mapping: &Mapping) {
    mapping.fill(|index| 1 + index);
}

/// Moves a mapping that is filled, and sees that it comes home as it was.
#[track_caller]
fn assert_goes_and_comes(rig: &Rig, mapping: &Mapping) {
    rig.assert_moves(mapping.range());
    assert_filled(mapping);
    assert!(mapping.range().iter().all(|page| is_home(&rig.process, page)));
}

/// Returns the mapping that holds `address`.
fn mapping_at(address: u64) -> PageRange {
    let all = lines();
    let line = all.iter().find(|line| line.range.contains(&address)).expect("it is mapped");
    PageRange::new(line.range.start, line.range.end - line.range.start).expect("it is of pages")
}

fn mapping_named(name: &str) -> Option<PageRange> {
    let line = lines().into_iter().find(|line| line.name == name)?;
    PageRange::new(line.range.start, line.range.end - line.range.start).ok()
}

/// Returns a line of what `/proc/self/smaps` says of a mapping, in kilobytes.
fn smaps(mapping: &Mapping, what: &str) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("proc is mounted");
    let start = format!("{:x}-", mapping.range().address());
    let ours = smaps.lines().skip_while(|line| !line.starts_with(&start)).skip(1);
    let line = ours.take(30).find_map(|line| line.strip_prefix(what)?.strip_prefix(':'));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kilobytes.expect("smaps has a line for it")
}

/// Makes a large page. `None`, aloud, where the machine has none.
fn large() -> Option<Mapping> {
    let mapping = Mapping::new(Order::HUGE.pages(), Backing::Huge, RW);
    fill(&mapping);
    match smaps(&mapping, "AnonHugePages") {
        0 => {
            common::loudly("no huge page was to be had: nothing was tested of them");
            None
        }
        _ => Some(mapping),
    }
}

// What moves.

#[test]
fn anonymous_memory_moves() {
    in_own_process(|| {
        let rig = Rig::new();
        let mapping = Mapping::anonymous(700);
        fill(&mapping);
        assert_goes_and_comes(&rig, &mapping);
    });
}

#[test]
fn a_huge_page_moves_whole_and_comes_home_as_one() {
    in_own_process(|| {
        let rig = Rig::new();
        let Some(mapping) = large() else { return };
        let report = rig.migrate(mapping.range());
        assert_eq!((report.moved, report.without_copy), (512, 512));
        assert_eq!(rig.process.snapshot(mapping.range())[5].order, Order::HUGE);
        assert_filled(&mapping);
        assert_eq!(smaps(&mapping, "AnonHugePages"), 2048, "it is one page again");
        // On a device with memory of its own as well.
        let gpu = Gpu::new(1024);
        let report = rig.process.migrate(mapping.range(), &gpu.pagemap).run();
        assert_eq!(report.moved, 512, "{report:?}");
        assert_filled(&mapping);
    });
}

#[test]
fn a_part_of_a_huge_page_moves() {
    in_own_process(|| {
        let rig = Rig::new();
        for (first, pages) in [(0, 1), (511, 1), (3, 200), (0, 256), (0, 511)] {
            let Some(mapping) = large() else { return };
            let piece = mapping.part(first, pages);
            rig.assert_moves(piece);
            let others = mapping.range().iter().filter(|&page| !piece.contains(page));
            assert!(
                { others }.all(|page| is_home(&rig.process, page)),
                "no more than was asked for"
            );
            assert_filled(&mapping);
        }
    });
}

#[test]
fn what_malloc_gave_moves() {
    in_own_process(|| {
        let rig = Rig::new();
        // From the heap, and from a mapping of its own.
        for bytes in [100_000, 64 << 20] {
            // SAFETY: asks for memory.
            let memory = unsafe { libc::malloc(bytes) };
            assert!(!memory.is_null());
            // SAFETY: it has that many bytes, which nobody else uses.
            let words = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u64>(), bytes / 8) };
            words.iter_mut().zip(0..).for_each(|(word, index)| *word = index);
            let first = Page::containing(memory as u64).checked_add(1).expect("a page");
            let pages = (bytes / PAGE_SIZE - 2) as u64;
            rig.assert_moves(PageRange::from_pages(first, pages).expect("pages"));
            assert!(words.iter().zip(0..).all(|(&word, index)| word == index));
            rig.assert_moves(PageRange::from_pages(first, pages).expect("pages"));
            // SAFETY: it was given out by malloc, and is not used any more.
            unsafe { libc::free(memory) };
        }
        // What was freed is the device's again, once the kernel has told of it.
        assert!(eventually(|| rig.memory.statistics().used < 1000));
        // All of the heap, with what the C library keeps there for itself.
        let heap = mapping_named("[heap]").expect("the C library has made one");
        let mut moved = 0;
        for _ in 0..10 {
            // But for what serves faults: the loader keeps the tables of thread-local memory there.
            let report = rig.migrate(heap);
            let expected = |stayed: &uhmm::Stayed| {
                matches!(stayed.reason, StayReason::Reserved | StayReason::AlreadyThere)
            };
            assert!(report.stayed.iter().all(expected), "{report:?}");
            moved += report.moved;
            // SAFETY: asks for memory.
            let memory = unsafe { libc::malloc(1000) };
            // SAFETY: given out just now, and not used.
            unsafe { libc::free(memory) };
        }
        assert!(moved > 0, "nothing of the heap has moved");
    });
}

#[test]
fn the_stack_and_the_thread_local_variables_of_another_thread_move() {
    use std::cell::Cell;
    thread_local! {
        static OWN: Cell<u64> = const { Cell::new(0) };
    }
    in_own_process(|| {
        let rig = Rig::new();
        let (tell, told): (Sender<u64>, Receiver<u64>) = channel();
        let (go, gone): (Sender<()>, Receiver<()>) = channel();
        let thread = std::thread::spawn(move || {
            OWN.set(7);
            let mut words = [0_u64; 4096];
            words.iter_mut().zip(0..).for_each(|(word, index)| *word = index);
            tell.send(std::hint::black_box(&words).as_ptr() as u64).expect("it is waited for");
            while gone.recv().is_ok() {
                let whole = std::hint::black_box(&words).iter().zip(0..);
                assert!({ whole }.all(|(&word, index)| word == index), "the stack is as it was");
                assert_eq!(OWN.replace(8), 7);
                OWN.set(7);
                tell.send(0).expect("it is waited for");
            }
        });
        let stack = mapping_at(told.recv().expect("the thread runs"));
        let mut moved = 0;
        for _ in 0..30 {
            let report = rig.migrate(stack);
            assert!(report.is_complete(), "{report:?}");
            moved += report.moved;
            go.send(()).expect("the thread runs");
            told.recv().expect("the thread runs");
        }
        assert!(moved > 8 * 30, "the array has 8 pages, and more was in use: {moved}");
        drop(go);
        thread.join().expect("it has seen nothing that is wrong");
    });
}

#[test]
fn the_stack_of_the_first_thread_moves() {
    in_own_process(|| {
        // That thread waits for this one, and goes on when this test is over.
        let rig = Rig::new();
        let stack = mapping_named("[stack]").expect("every process has one");
        let report = rig.migrate(stack);
        assert!(report.is_complete() && report.moved > 0, "{report:?}");
    });
}

#[test]
fn what_was_never_touched_moves_as_zeroes() {
    in_own_process(|| {
        let rig = Rig::new();
        let mapping = Mapping::anonymous(1024);
        // Nothing, the frame of zeroes that a load leaves, and something.
        mapping.poke(100, 5);
        (200..210).for_each(|index| assert_eq!(mapping.peek(index), 0));
        let report = rig.migrate(mapping.range());
        assert_eq!((report.moved, &*report.stayed), (1024, &[][..]), "{report:?}");
        for index in 0..1024 {
            assert_eq!(mapping.peek(index), if index == 100 { 5 } else { 0 }, "page {index}");
        }
        // The same in large pages: one that was never touched, and the large frame of zeroes.
        for touch in [false, true] {
            let mapping = Mapping::new(Order::HUGE.pages(), Backing::Huge, RW);
            if touch {
                assert_eq!(mapping.peek(7), 0);
            }
            let report = rig.migrate(mapping.range());
            assert_eq!((report.moved, &*report.stayed), (512, &[][..]), "{report:?}");
            (0..512).for_each(|index| assert_eq!(mapping.peek(index), 0, "page {index}"));
        }
    });
}

#[test]
fn a_large_block_that_is_partly_there_moves() {
    in_own_process(|| {
        let rig = Rig::new();
        let mapping = Mapping::anonymous(512);
        let there = |index: u64| index.is_multiple_of(5) || (100..150).contains(&index);
        for index in (0..512).filter(|&index| there(index)) {
            mapping.poke(index, 1 + index);
        }
        let report = rig.migrate(mapping.range());
        assert_eq!((report.moved, &*report.stayed), (512, &[][..]), "{report:?}");
        for index in 0..512 {
            let expected = if there(index) { 1 + index } else { 0 };
            assert_eq!(mapping.peek(index), expected, "page {index}");
        }
    });
}

/// Where the kernel has told that memory is given up, what is still there may be dropped at any
/// moment, and leaves only once it has been.
#[test]
fn what_was_given_up_moves_unless_the_kernel_may_still_drop_it() {
    in_own_process(|| {
        let rig = Rig::new();
        let mapping = Mapping::anonymous(64);
        let given_up = mapping.part(10, 20);
        for told in [false, true] {
            fill(&mapping);
            advise(given_up, libc::MADV_FREE).expect("it is anonymous");
            let report = rig.migrate(mapping.range());
            for page in mapping.range().iter() {
                let expected = (told && given_up.contains(page)).then_some(StayReason::Changed);
                let reason = report.reason(page);
                assert!(reason.is_none() || reason == expected, "{page}: {report:?}");
            }
            for index in 0..64 {
                let word = mapping.peek(index);
                let dropped = given_up.contains(mapping.page(index)) && word == 0;
                assert!(word == 1 + index || dropped, "page {index}: {word}");
            }
        }
        // What is stored after that stays, and when it is really dropped it moves again.
        fill(&mapping);
        rig.migrate(mapping.range());
        assert_filled(&mapping);
        advise(given_up, libc::MADV_DONTNEED).expect("it is mapped");
        rig.migrate(mapping.range());
        given_up.iter().for_each(|page| assert_eq!(trap::load(page.address()), Ok(0)));
        fill(&mapping);
        assert_goes_and_comes(&rig, &mapping);
    });
}

/// A child that waits to be told to end.
struct Sleeper {
    pid: u32,
    pipe: Option<std::os::fd::OwnedFd>,
}

impl Sleeper {
    fn new() -> Sleeper {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        match fork() {
            Some(pid) => Sleeper { pid, pipe: Some(writer) },
            None => {
                drop(writer);
                let _ = rustix::io::read(&reader, &mut [0; 1]);
                exit_now(0)
            }
        }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let mut status = 0;
        // SAFETY: `status` is room for the status of the child, which is reaped once.
        unsafe { libc::waitpid(self.pid as i32, &mut status, 0) };
        assert_eq!(status, 0, "the child has seen nothing that is wrong");
    }
}

#[test]
fn what_is_shared_with_a_child_moves_as_a_copy_of_its_own() {
    in_own_process(|| {
        let rig = Rig::new();
        let mut mappings = vec![Mapping::anonymous(700)];
        fill(&mappings[0]);
        mappings.extend(large());
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let child = fork();
        if child.is_none() {
            drop(writer);
            // When all of it has been away, home and changed in the parent.
            let _ = rustix::io::read(&reader, &mut [0; 1]);
            let intact = |mapping: &Mapping| {
                (0..mapping.range().pages())
                    .all(|index| trap::load(mapping.word(index)) == Ok(1 + index))
            };
            exit_now(i32::from(!mappings.iter().all(intact)));
        }
        drop(reader);
        let child = Sleeper { pid: child.expect("this is the parent"), pipe: Some(writer) };
        for mapping in &mappings {
            assert_goes_and_comes(&rig, mapping);
            mapping.fill(|index| 1000 + index);
        }
        drop(child);
        for mapping in &mappings {
            (0..mapping.range().pages())
                .for_each(|index| assert_eq!(mapping.peek(index), 1000 + index));
        }
    });
}

#[test]
fn what_was_shared_with_a_child_that_has_ended_moves() {
    in_own_process(|| {
        let rig = Rig::new();
        let mut mappings = vec![Mapping::anonymous(700)];
        fill(&mappings[0]);
        mappings.extend(large());
        drop(Sleeper::new());
        mappings.iter().for_each(|mapping| assert_goes_and_comes(&rig, mapping));
    });
}

/// Memory that children do not get, or get empty, is memory like any other.
#[test]
fn what_children_do_not_inherit_moves() {
    in_own_process(|| {
        let rig = Rig::new();
        for advice in [libc::MADV_DONTFORK, libc::MADV_WIPEONFORK, libc::MADV_DONTDUMP] {
            let mapping = Mapping::anonymous(64);
            fill(&mapping);
            advise(mapping.range(), advice).expect("it is anonymous");
            assert_goes_and_comes(&rig, &mapping);
        }
    });
}

#[test]
fn what_was_swapped_out_moves() {
    in_own_process(|| {
        let swaps = std::fs::read_to_string("/proc/swaps").expect("proc is mounted");
        if swaps.lines().count() < 2 {
            return common::loudly("there is no swap here: nothing was tested");
        }
        let rig = Rig::new();
        let mapping = Mapping::anonymous(256);
        fill(&mapping);
        let gone = eventually(|| {
            advise(mapping.range(), PAGEOUT).expect("it is anonymous");
            smaps(&mapping, "Swap") > 0
        });
        assert!(gone, "nothing could be swapped out");
        println!("{} kB are swapped out", smaps(&mapping, "Swap"));
        assert_goes_and_comes(&rig, &mapping);
    });
}

/// The kernel's samepage merging, switched on for as long as this lives.
struct Merging {
    before: String,
}

impl Merging {
    const FILE: &str = "/sys/kernel/mm/ksm/run";

    fn on() -> Option<Merging> {
        let before = std::fs::read_to_string(Merging::FILE).ok()?;
        std::fs::write(Merging::FILE, "1").ok()?;
        Some(Merging { before })
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        std::fs::write(Merging::FILE, &self.before).expect("it could be written to before");
    }
}

#[test]
fn what_was_merged_moves_as_a_copy_of_its_own() {
    in_own_process(|| {
        let Some(_on) = Merging::on() else {
            return common::loudly("pages cannot be merged here: nothing was tested");
        };
        let rig = Rig::new();
        let mapping = Mapping::anonymous(32);
        mapping.fill(|_| 0x5a3e);
        advise(mapping.range(), libc::MADV_MERGEABLE).expect("it is anonymous");
        let merged = || {
            let pages = std::fs::read_to_string("/proc/self/ksm_merging_pages");
            pages.is_ok_and(|pages| pages.trim().parse::<u64>().is_ok_and(|pages| pages >= 2))
        };
        if !eventually(merged) {
            return common::loudly("nothing was merged in time: nothing was tested");
        }
        rig.assert_moves(mapping.range());
        mapping.poke(3, 4);
        for index in 0..32 {
            assert_eq!(mapping.peek(index), if index == 3 { 4 } else { 0x5a3e }, "page {index}");
        }
    });
}
