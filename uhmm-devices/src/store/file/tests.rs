//! What a store does when its file fails: on a file that is made to.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use uhmm::primitive::lock;
use uhmm::{CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, Order, PAGE_SIZE, SystemMemory};

use super::super::tests::{Frames, compressible, copy_in, copy_out, noise, order};
use super::super::{Mismatch, StoreOptions, Verification};
use super::backing::Backing;
use super::{BUFFER_PAGES, EXTENT, FileStore, KEPT_EXTENTS};

/// A file in memory that does what a test says.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// What was written, by page.
    pages: BTreeMap<u64, Vec<u8>>,
    reserved: BTreeSet<u64>,
    /// Each call moves at most so many bytes, if that is not 0.
    at_most: usize,
    /// Every second call is interrupted.
    interrupts: bool,
    calls: u64,
    reads: Vec<(u64, usize)>,
    writes: Vec<(u64, usize)>,
    read_error: Option<ErrorKind>,
    write_error: Option<ErrorKind>,
    reserve_error: Option<ErrorKind>,
    release_error: Option<ErrorKind>,
}

impl Fake {
    fn state(&self) -> uhmm::primitive::MutexGuard<'_, State> {
        lock(&self.0)
    }

    fn store(&self, options: StoreOptions) -> FileStore {
        FileStore::with_backing(Box::new(self.clone()), options).expect("there is no limit")
    }
}

impl State {
    /// Returns how many bytes a call moves.
    fn call(&mut self, bytes: usize, error: Option<ErrorKind>) -> io::Result<usize> {
        self.calls += 1;
        if self.interrupts && self.calls.is_multiple_of(2) {
            return Err(ErrorKind::Interrupted.into());
        }
        match error {
            Some(error) => Err(error.into()),
            None if self.at_most > 0 => Ok(bytes.min(self.at_most)),
            None => Ok(bytes),
        }
    }
}

impl FileExt for Fake {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state();
        let error = state.read_error;
        let count = state.call(bytes.len(), error)?;
        state.reads.push((offset, count));
        for (byte, at) in bytes[..count].iter_mut().zip(offset..) {
            let page = state.pages.get(&(at / PAGE_SIZE as u64));
            *byte = page.map_or(0, |page| page[at as usize % PAGE_SIZE]);
        }
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state();
        let error = state.write_error;
        let count = state.call(bytes.len(), error)?;
        state.writes.push((offset, count));
        for (&byte, at) in bytes[..count].iter().zip(offset..) {
            let number = at / PAGE_SIZE as u64;
            assert!(
                state.reserved.contains(&(at / EXTENT)),
                "it is written where nothing is reserved"
            );
            let page = state.pages.entry(number).or_insert_with(|| vec![0; PAGE_SIZE]);
            page[at as usize % PAGE_SIZE] = byte;
        }
        Ok(count)
    }
}

impl Backing for Fake {
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        assert_eq!((offset % EXTENT, bytes), (0, EXTENT));
        let mut state = self.state();
        match state.reserve_error {
            Some(error) => Err(error.into()),
            None => {
                assert!(state.reserved.insert(offset / EXTENT), "it is reserved");
                Ok(())
            }
        }
    }

    fn release(&self, offset: u64, bytes: u64) -> io::Result<()> {
        assert_eq!((offset % EXTENT, bytes), (0, EXTENT));
        let mut state = self.state();
        match state.release_error {
            Some(error) => Err(error.into()),
            None => {
                assert!(state.reserved.remove(&(offset / EXTENT)), "it is not reserved");
                let first = offset / PAGE_SIZE as u64;
                state.pages.retain(|page, _| !(first..first + 512).contains(page));
                Ok(())
            }
        }
    }
}

fn page(store: &FileStore, seed: u64) -> DeviceFrame {
    let frame = store.allocate(Order::PAGE).expect("there is room");
    assert!(copy_in(store, frame, Order::PAGE, &[noise(seed)]));
    frame
}

#[test]
fn short_and_interrupted_calls_change_nothing() {
    for at_most in [1000, PAGE_SIZE, 5000] {
        let file = Fake::default();
        let store = file.store(StoreOptions::new());
        (file.state().at_most, file.state().interrupts) = (at_most, true);
        let frame = store.allocate(order(3)).expect("there is room");
        let pages: Vec<_> = (0..8).map(noise).collect();
        assert!(copy_in(&store, frame, order(3), &pages));
        assert_eq!(copy_out(&store, frame, order(3)), Some(pages));
        assert!(file.state().calls > 8, "the calls were not short");
    }
}

#[test]
fn a_read_that_fails_is_an_error_and_the_page_can_be_had_later() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let frame = page(&store, 1);
    for error in [ErrorKind::Other, ErrorKind::UnexpectedEof, ErrorKind::PermissionDenied] {
        file.state().read_error = Some(error);
        assert_eq!(copy_out(&store, frame, Order::PAGE), None, "{error:?}");
    }
    assert_eq!(store.statistics().failed_reads, 3);
    assert_eq!(store.statistics().pages(), 1);
    file.state().read_error = None;
    assert_eq!(copy_out(&store, frame, Order::PAGE), Some(vec![noise(1)]));
}

#[test]
fn a_file_that_ends_too_soon_is_an_error() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let frame = page(&store, 1);
    // To move nothing is how a read says that the file has ended.
    struct Ends(Fake);
    impl FileExt for Ends {
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            Ok(0)
        }
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
            self.0.write_at(bytes, offset)
        }
    }
    impl Backing for Ends {
        fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
            self.0.reserve(offset, bytes)
        }
        fn release(&self, offset: u64, bytes: u64) -> io::Result<()> {
            self.0.release(offset, bytes)
        }
    }
    let ends = Ends(Fake::default());
    let short = FileStore::with_backing(Box::new(ends), StoreOptions::new()).expect("no limit");
    let other = page(&short, 1);
    assert_eq!(copy_out(&short, other, Order::PAGE), None);
    assert_eq!(copy_out(&store, frame, Order::PAGE), Some(vec![noise(1)]));
}

#[test]
fn a_write_that_fails_leaves_the_page_at_home() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let kept = page(&store, 1);
    for (error, refused) in [(ErrorKind::Other, false), (ErrorKind::StorageFull, true)] {
        file.state().write_error = Some(error);
        let frame = store.allocate(Order::PAGE).expect("it is reserved");
        let before = store.statistics();
        assert!(!copy_in(&store, frame, Order::PAGE, &[noise(2)]), "{error:?}");
        let after = store.statistics();
        assert_eq!(after.refused - before.refused, u64::from(refused));
        assert_eq!(after.failed_writes - before.failed_writes, u64::from(!refused));
        assert_eq!(copy_out(&store, frame, Order::PAGE), None, "it was never stored");
        store.free(frame, Order::PAGE);
    }
    file.state().write_error = None;
    assert_eq!(copy_out(&store, kept, Order::PAGE), Some(vec![noise(1)]));
    store.check().expect("the statistics are right");
}

#[test]
fn a_full_disk_refuses_blocks_and_is_asked_again_later() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let kept = page(&store, 1);
    file.state().reserve_error = Some(ErrorKind::StorageFull);
    // What is reserved is used up first.
    let rest = std::iter::from_fn(|| store.allocate(Order::PAGE).ok()).count();
    assert_eq!(rest as u64, EXTENT / PAGE_SIZE as u64 - 1);
    assert!(store.statistics().refused > 0);
    assert_eq!(store.statistics().taken_bytes, EXTENT);
    let held = EXTENT / PAGE_SIZE as u64 - 1;
    assert!(store.has_room(held) && !store.has_room(held + 1), "only what is reserved is there");
    file.state().reserve_error = None;
    assert!(store.allocate(Order::HUGE).is_ok());
    assert_eq!(copy_out(&store, kept, Order::PAGE), Some(vec![noise(1)]));
}

#[test]
fn extents_that_are_not_in_use_are_given_back_but_for_a_few() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let blocks: Vec<_> = (0..40).map(|_| store.allocate(Order::HUGE).expect("room")).collect();
    assert_eq!(file.state().reserved.len(), 40);
    for &block in &blocks {
        // In pieces.
        for frame in block.0..block.0 + 512 {
            store.free(DeviceFrame(frame), Order::PAGE);
        }
    }
    assert_eq!(file.state().reserved.len(), 40, "a free does not wait for the disk");
    for _ in 0..10 {
        store.copy(&Frames::default(), &mut []);
    }
    assert_eq!(file.state().reserved.len(), KEPT_EXTENTS as usize);
    assert_eq!(store.statistics().taken_bytes, u64::from(KEPT_EXTENTS) * EXTENT);
    // What is reserved is used before more is.
    for _ in 0..KEPT_EXTENTS {
        store.allocate(Order::HUGE).expect("it is reserved");
    }
    assert_eq!(file.state().reserved.len(), KEPT_EXTENTS as usize);
    store.check().expect("the statistics are right");
}

#[test]
fn extents_that_cannot_be_given_back_are_used_again() {
    let file = Fake::default();
    file.state().release_error = Some(ErrorKind::Unsupported);
    let store = file.store(StoreOptions::new());
    for _ in 0..3 {
        let blocks: Vec<_> = (0..20).map(|_| store.allocate(Order::HUGE).expect("room")).collect();
        assert_eq!(file.state().reserved.len(), 20);
        blocks.iter().for_each(|&block| store.free(block, Order::HUGE));
    }
    store.check().expect("the statistics are right");
}

#[test]
fn pages_that_lie_together_are_written_and_read_together() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let memory = Frames::default();
    let count = BUFFER_PAGES as u64;
    (0..count).for_each(|frame| memory.write(Frame(1000 - frame), 0, &noise(frame)));
    let mut jobs: Vec<_> = (0..count)
        .map(|frame| {
            let to = store.allocate(Order::PAGE).expect("there is room");
            CopyJob::new(CopyKind::In { from: Frame(1000 - frame), to }, Order::PAGE)
        })
        .collect();
    store.copy(&memory, &mut jobs);
    assert!(jobs.iter().all(CopyJob::is_complete));
    assert_eq!(file.state().writes, [(0, BUFFER_PAGES * PAGE_SIZE)]);
    let mut out: Vec<_> = (0..count)
        .map(|frame| {
            let (from, to) = (DeviceFrame(frame), Frame(frame * 3));
            CopyJob::new(CopyKind::Out { from, to }, Order::PAGE)
        })
        .collect();
    let home = Frames::default();
    store.copy(&home, &mut out);
    assert!(out.iter().all(CopyJob::is_complete));
    assert_eq!(file.state().reads, [(0, BUFFER_PAGES * PAGE_SIZE)]);
    for frame in 0..count {
        let mut page = [0; PAGE_SIZE];
        home.read(Frame(frame * 3), 0, &mut page);
        assert_eq!(page, noise(frame));
    }
}

#[test]
fn pages_that_lie_apart_are_not_taken_for_one_run() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let blocks = [(); 2].map(|()| store.allocate(Order::HUGE).expect("there is room"));
    assert_eq!(blocks, [DeviceFrame(0), DeviceFrame(512)]);
    // Out of order, with gaps, backwards, and across the edge of a chunk.
    let frames = [7, 8, 10, 3, 2, 511, 512, 513];
    let memory = Frames::default();
    frames.iter().for_each(|&frame| memory.write(Frame(frame), 0, &noise(frame)));
    let jobs = |job: fn(u64) -> CopyKind| -> Vec<CopyJob> {
        frames.iter().map(|&frame| CopyJob::new(job(frame), Order::PAGE)).collect()
    };
    let mut jobs_in = jobs(|n| CopyKind::In { from: Frame(n), to: DeviceFrame(n) });
    store.copy(&memory, &mut jobs_in);
    assert!(jobs_in.iter().all(CopyJob::is_complete));
    let page = PAGE_SIZE as u64;
    let runs = [(7 * page, 2), (10 * page, 1), (3 * page, 1), (2 * page, 1)];
    let runs = runs.into_iter().chain([(511 * page, 1), (512 * page, 2)]);
    let runs: Vec<_> = runs.map(|(offset, pages)| (offset, pages * PAGE_SIZE)).collect();
    assert_eq!(file.state().writes, runs);

    let home = Frames::default();
    let mut jobs_out = jobs(|n| CopyKind::Out { from: DeviceFrame(n), to: Frame(n) });
    store.copy(&home, &mut jobs_out);
    assert!(jobs_out.iter().all(CopyJob::is_complete));
    assert_eq!(file.state().reads, runs);
    for frame in frames {
        let mut page = [0; PAGE_SIZE];
        home.read(Frame(frame), 0, &mut page);
        assert_eq!(page, noise(frame));
    }
}

#[test]
fn one_read_that_fails_leaves_the_pages_of_other_runs_alone() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let frames = [page(&store, 0), page(&store, 1), page(&store, 2)];
    store.free(frames[1], Order::PAGE);
    let fresh = store.allocate(Order::PAGE).expect("it was freed");
    let out = |from| CopyJob::new(CopyKind::Out { from, to: Frame(from.0) }, Order::PAGE);
    let mut jobs = [frames[2], frames[0], fresh].map(out);
    store.copy(&Frames::default(), &mut jobs);
    assert_eq!(jobs.map(|job| job.is_complete()), [true, false, false]);
    assert_eq!(copy_out(&store, frames[0], Order::PAGE), Some(vec![noise(0)]));
}

#[test]
fn of_a_large_block_only_the_part_with_contents_is_written_and_read() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let frame = store.allocate(order(4)).expect("there is room");
    let mut pages = vec![[0; PAGE_SIZE]; 16];
    (pages[5], pages[9]) = (noise(5), compressible(9, 100));
    assert!(copy_in(&store, frame, order(4), &pages));
    let part = [(5 * PAGE_SIZE as u64, 5 * PAGE_SIZE)];
    assert_eq!(file.state().writes, part);
    assert_eq!(copy_out(&store, frame, order(4)), Some(pages));
    assert_eq!(file.state().reads, part);
    assert_eq!(store.statistics().zero_pages, 14);
    // What a frame held before is not seen through zeroes.
    assert!(copy_in(&store, frame, order(4), &[[0; PAGE_SIZE]; 16]));
    assert_eq!(copy_out(&store, frame, order(4)), Some(vec![[0; PAGE_SIZE]; 16]));
}

#[test]
fn with_no_buffer_at_rest_pages_pass_one_by_one() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let all: Vec<_> = std::iter::from_fn(|| store.buffers.take()).collect();
    let frame = store.allocate(order(2)).expect("there is room");
    let pages: Vec<_> = (0..4).map(noise).collect();
    assert!(copy_in(&store, frame, order(2), &pages));
    assert_eq!(copy_out(&store, frame, order(2)), Some(pages));
    assert_eq!(file.state().reads.len(), 4);
    drop(all);
    assert!(store.buffers.take().is_some());
}

#[test]
fn a_file_that_was_overwritten_is_reported() {
    let file = Fake::default();
    let reported = Arc::new(Mutex::new(0));
    let count = Arc::clone(&reported);
    let report = move |_: &Mismatch| *lock(&count) += 1;
    let store = file.store(StoreOptions::new().verification(Verification::report(report)));
    let frame = page(&store, 1);
    file.state().pages.get_mut(&frame.0).expect("it was written")[77] ^= 1;
    assert_eq!(copy_out(&store, frame, Order::PAGE), None);
    assert_eq!((*lock(&reported), store.statistics().mismatches), (1, 1));
}

#[test]
fn a_child_of_fork_is_refused_everything() {
    let file = Fake::default();
    let store = file.store(StoreOptions::new());
    let frame = page(&store, 1);
    let free = page(&store, 2);
    // To the tables, this is now another process.
    let child = FileStore { process: rustix::process::Pid::INIT, ..store };
    // The parent may have put another page there.
    assert_eq!(copy_out(&child, frame, Order::PAGE), None);
    assert!(child.allocate(Order::PAGE).is_err());
    let writes = file.state().writes.len();
    assert!(!copy_in(&child, frame, Order::PAGE, &[noise(3)]));
    assert_eq!(file.state().writes.len(), writes);
    child.free(free, Order::PAGE);
    assert_eq!(file.state().reserved.len(), 1);
}
