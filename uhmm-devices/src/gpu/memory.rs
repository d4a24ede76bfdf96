//! The GPU's own memory: frames, an allocator and a copy engine.
//!
//! # What is noticed
//!
//! Memory that is freed holds a pattern from then on, [`FREED`]; memory that is allocated and was
//! never written holds another, [`FRESH`]. Besides, each allocation gets a [`Stamp`], which is
//! part of the translations that are made to it. An access to a frame that is free, or through a
//! translation that was made for an earlier use of the frame, finds the pattern and is reported as
//! a violation. So a translation that outlives its page is found out also where the frame has been
//! given to another page.
//!
//! Memory that was given out and not filled by the copy engine yet must not be used at all: what is
//! in it may be another process's (regression 48). And a frame that the copy engine has copied out
//! is leaving: until it is entered in a page table anew, an access to it is one through a
//! translation that should be gone, and what it stores is lost.
//!
//! # Locks
//!
//! A frame's lock is held for one access of at most a page, and is what makes atomic operations
//! atomic: plain loads and stores take it too. The allocator's lock is held while a block changes
//! hands, over the locks of its frames one by one, so that no frame is in the hands of two. Neither is
//! held across a call to system memory.

use std::fmt;
use std::sync::{Arc, OnceLock};

use uhmm::primitive::{Mutex, lock};
use uhmm::{
    CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, Injector, Order, OutOfDeviceMemory,
    PAGE_SIZE, SystemMemory,
};

use super::buddy::Buddy;
use super::violations::Violations;

/// What each byte of free device memory holds.
pub const FREED: u8 = 0xf5;

/// What each byte of device memory holds that was allocated and never written.
pub const FRESH: u8 = 0xa7;

/// How many frames share a piece of the directory.
const CHUNK: u64 = 512;

/// One allocation of device memory, told from all others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

/// The memory of a [`SoftGpu`](super::SoftGpu): capacity, allocator and copy engine.
///
/// Bytes are allocated when they are first written, so a large and empty memory costs little.
pub struct LocalMemory {
    capacity: u64,
    chunks: Vec<OnceLock<Box<[FrameCell]>>>,
    allocator: Mutex<Allocator>,
    injector: Injector,
    violations: Arc<Violations>,
    /// Whether checksums are kept.
    checksums: bool,
}

struct Allocator {
    buddy: Buddy,
    stamps: u64,
}

type FrameCell = Mutex<FrameState>;

#[derive(Default)]
struct FrameState {
    /// The allocation that the frame is part of.
    used: Option<Stamp>,
    /// It was copied out, and not mapped since.
    leaving: bool,
    /// `None` until something is written.
    bytes: Option<Box<[u8; PAGE_SIZE]>>,
    /// The checksum of what the copy engine has put there, until a kernel writes.
    checksum: Option<u32>,
}

impl LocalMemory {
    pub(crate) fn new(
        capacity: u64,
        injector: Injector,
        violations: Arc<Violations>,
    ) -> LocalMemory {
        let chunks = (0..capacity.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        let allocator = Allocator { buddy: Buddy::new(capacity), stamps: 0 };
        let allocator = Mutex::new(allocator);
        LocalMemory { capacity, chunks, allocator, injector, violations, checksums: false }
    }

    /// Keeps checksums from now on.
    pub(crate) fn with_checksums(self) -> LocalMemory {
        LocalMemory { checksums: true, ..self }
    }

    /// Returns how many pages are free.
    pub fn available(&self) -> u64 {
        lock(&self.allocator).buddy.available()
    }

    /// Returns the size of the largest block that is free.
    pub fn largest(&self) -> Option<Order> {
        lock(&self.allocator).buddy.largest()
    }

    /// Returns the allocation that `frame` is part of, if it is in use.
    ///
    /// # Panics
    ///
    /// If the memory has no such frame.
    pub fn stamp(&self, frame: DeviceFrame) -> Option<Stamp> {
        self.with(frame, |state| state.used)
    }

    /// Notes that `frame` is entered in a page table, and returns the allocation that it is part of,
    /// if it is in use.
    pub(crate) fn enter(&self, frame: DeviceFrame) -> Option<Stamp> {
        self.with(frame, |state| {
            state.leaving = false;
            state.used
        })
    }

    /// Checks that each frame is either free or in use, and that the allocator is whole. To be
    /// called while nothing is allocated or freed.
    pub(crate) fn check(&self) -> Result<(), String> {
        let allocator = lock(&self.allocator);
        allocator.buddy.check()?;
        let available = allocator.buddy.available();
        drop(allocator);
        let cells = self.chunks.iter().filter_map(OnceLock::get).flatten();
        let used = cells.filter(|cell| lock(cell).used.is_some()).count() as u64;
        if used + available != self.capacity {
            return Err(format!(
                "{used} frames are in use and {available} are free, of {}",
                self.capacity
            ));
        }
        Ok(())
    }

    /// Copies bytes out of a frame, as an access through a translation of `stamp` does.
    pub(crate) fn read(&self, frame: DeviceFrame, stamp: Stamp, offset: usize, bytes: &mut [u8]) {
        self.with(frame, |state| {
            self.judge(state, frame, stamp, "read");
            state.read(offset, bytes);
        });
    }

    /// Copies bytes into a frame, as an access through a translation of `stamp` does.
    pub(crate) fn write(&self, frame: DeviceFrame, stamp: Stamp, offset: usize, bytes: &[u8]) {
        self.with(frame, |state| {
            // What is no longer the translation's is left as it is.
            if self.judge(state, frame, stamp, "written") {
                state.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
            }
        });
    }

    /// Replaces a word by `update` of it, which no other access comes between.
    pub(crate) fn fetch_update(
        &self,
        frame: DeviceFrame,
        stamp: Stamp,
        offset: usize,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> u64 {
        self.with(frame, |state| {
            let mut word = [0; 8];
            state.read(offset, &mut word);
            let old = u64::from_ne_bytes(word);
            if self.judge(state, frame, stamp, "updated") {
                let new = update(old).to_ne_bytes();
                state.bytes_mut()[offset..offset + new.len()].copy_from_slice(&new);
            }
            old
        })
    }

    /// Tells whether an access of `stamp` may use the frame, and reports it if not.
    fn judge(&self, state: &FrameState, frame: DeviceFrame, stamp: Stamp, what: &str) -> bool {
        let right = state.used == Some(stamp);
        let wrong = if !right {
            format!("through a translation of {stamp:?}, and is in use as {:?}", state.used)
        } else if state.leaving {
            "after it was copied out".to_owned()
        } else if state.bytes.is_none() {
            "before it was filled".to_owned()
        } else {
            return true;
        };
        self.violations.report(format!("device memory at {frame:?} was {what} {wrong}"));
        right
    }

    fn with<R>(&self, frame: DeviceFrame, f: impl FnOnce(&mut FrameState) -> R) -> R {
        assert!(frame.0 < self.capacity, "{frame:?} is beyond the device's memory");
        let chunk = self.chunks[(frame.0 / CHUNK) as usize]
            .get_or_init(|| (0..CHUNK).map(|_| FrameCell::default()).collect());
        f(&mut lock(&chunk[(frame.0 % CHUNK) as usize]))
    }

    fn copy_page(&self, system: &dyn SystemMemory, kind: CopyKind, index: u64) {
        let mut bytes = [0; PAGE_SIZE];
        match kind {
            CopyKind::In { from, to } => {
                system.read(Frame(from.0 + index), 0, &mut bytes);
                self.fill(DeviceFrame(to.0 + index), &bytes);
            }
            CopyKind::Out { from, to } => {
                let from = DeviceFrame(from.0 + index);
                self.with(from, |state| {
                    self.judge_copy(state, from);
                    if state.used.is_some() && state.bytes.is_none() {
                        let violation = format!("{from:?} was copied out before it was filled");
                        self.violations.report(violation);
                    }
                    state.leaving = true;
                    state.read(0, &mut bytes);
                    self.judge_contents(state, from, &bytes);
                });
                system.write(Frame(to.0 + index), 0, &bytes);
            }
            CopyKind::Clear { to } => self.fill(DeviceFrame(to.0 + index), &bytes),
        }
    }

    fn fill(&self, frame: DeviceFrame, bytes: &[u8; PAGE_SIZE]) {
        self.with(frame, |state| {
            self.judge_copy(state, frame);
            if state.used.is_some() {
                *state.bytes_mut() = *bytes;
                state.checksum = self.checksums.then(|| crc32fast::hash(bytes));
            }
        });
    }

    fn judge_contents(&self, state: &FrameState, frame: DeviceFrame, bytes: &[u8; PAGE_SIZE]) {
        let Some(expected) = state.checksum else { return };
        let found = crc32fast::hash(bytes);
        if found != expected {
            self.violations.report(format!(
                "the device memory at {frame:?} is not what was stored there: its checksum is \
                 {found:#010x} and was {expected:#010x}"
            ));
        }
    }

    fn judge_copy(&self, state: &FrameState, frame: DeviceFrame) {
        if state.used.is_none() {
            self.violations.report(format!("the copy engine was sent to {frame:?}, which is free"));
        }
    }
}

impl DeviceMemory for LocalMemory {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        if self.injector.fails("allocate") {
            return Err(OutOfDeviceMemory { order });
        }
        let mut allocator = lock(&self.allocator);
        let first = allocator.buddy.allocate(order).ok_or(OutOfDeviceMemory { order })?;
        allocator.stamps += 1;
        let stamp = Stamp(allocator.stamps);
        for frame in (first..).map(DeviceFrame).take(order.pages() as usize) {
            let fresh = FrameState { used: Some(stamp), ..FrameState::default() };
            if let Some(was) = self.with(frame, |state| std::mem::replace(state, fresh).used) {
                self.violations
                    .report(format!("{frame:?} was given out, and is in use as {was:?}"));
            }
        }
        Ok(DeviceFrame(first))
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        let mut allocator = lock(&self.allocator);
        // First, so that what is not given back keeps its contents.
        if allocator.buddy.free(frame.0, order).is_err() {
            let violation =
                format!("the block of {order:?} at {frame:?} was freed, and is not held");
            self.violations.report(violation);
            return;
        }
        for frame in (frame.0..).map(DeviceFrame).take(order.pages() as usize) {
            let was = self.with(frame, |state| std::mem::take(state).used);
            if was.is_none() {
                self.violations.report(format!("{frame:?} was freed, and was free"));
            }
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        for job in jobs {
            let step = if let CopyKind::Clear { .. } = job.kind() { "clear" } else { "copy" };
            if self.injector.fails(step) {
                tracing::debug!(target: "uhmm", kind = ?job.kind(), "copy fails as injected");
                continue;
            }
            for index in 0..job.order().pages() {
                self.copy_page(memory, job.kind(), index);
            }
            job.complete();
        }
    }
}

impl FrameState {
    /// What memory holds that nobody has written since it was allocated or freed.
    fn pattern(&self) -> u8 {
        if self.used.is_some() { FRESH } else { FREED }
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        match &self.bytes {
            Some(held) => bytes.copy_from_slice(&held[offset..offset + bytes.len()]),
            None => bytes.fill(self.pattern()),
        }
    }

    /// Returns what is there, to be changed: from here on it has no checksum.
    fn bytes_mut(&mut self) -> &mut [u8; PAGE_SIZE] {
        self.checksum = None;
        let pattern = self.pattern();
        self.bytes.get_or_insert_with(|| Box::new([pattern; PAGE_SIZE]))
    }
}

impl fmt::Debug for LocalMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalMemory")
            .field("capacity", &self.capacity)
            .field("available", &self.available())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    /// System memory whose pages are all of one byte, the number of the frame.
    struct Uniform;

    impl SystemMemory for Uniform {
        fn read(&self, frame: Frame, _: usize, bytes: &mut [u8]) {
            bytes.fill(frame.0 as u8);
        }

        fn write(&self, _: Frame, _: usize, _: &[u8]) {}

        fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
            unreachable!("nothing is updated here")
        }
    }

    fn copy(memory: &LocalMemory, kind: CopyKind) {
        memory.copy(&Uniform, &mut [CopyJob::new(kind, Order::PAGE)]);
    }

    #[test]
    fn what_decays_in_memory_is_noticed_when_it_is_copied_out() {
        let violations = Arc::new(Violations::default());
        let memory = LocalMemory::new(4, Injector::new(), Arc::clone(&violations));
        let memory = memory.with_checksums();
        let frame = memory.allocate(Order::PAGE).expect("there is room");
        copy(&memory, CopyKind::In { from: Frame(7), to: frame });
        copy(&memory, CopyKind::Out { from: frame, to: Frame(7) });
        assert_eq!(violations.list(), [""; 0], "it is what it was");

        // What a kernel writes is no decay.
        let stamp = memory.enter(frame).expect("it is in use");
        memory.write(frame, stamp, 9, &[1, 2, 3]);
        copy(&memory, CopyKind::Out { from: frame, to: Frame(7) });
        assert_eq!(violations.list(), [""; 0], "a kernel may write");

        copy(&memory, CopyKind::In { from: Frame(8), to: frame });
        memory.with(frame, |state| state.bytes.as_mut().expect("it was filled")[4000] ^= 1);
        copy(&memory, CopyKind::Out { from: frame, to: Frame(8) });
        let found = violations.list();
        assert!(found.len() == 1 && found[0].contains("not what was stored"), "{found:?}");
    }
}
