//! Memory in a file: pages are written out, and read when they come home.
//!
//! The file has no name: nobody else can open it, and nothing is left of it when the process ends,
//! in whatever way. It grows by extents of 2 MiB, which are reserved on the disk before any frame
//! in them is given out. So a full disk is seen when a block is allocated, and the page stays at
//! home; where a file system cannot reserve, the write fails instead, and the page stays too.
//! Extents that are not in use are given back to the disk.
//!
//! A page of zeroes is noted, and neither written nor read. What cannot be read, or was not
//! written, is never handed out: the copy fails, and the page stays what it was, in the file.
//!
//! # Memory
//!
//! To bring a page home allocates nothing, and needs a buffer. Those were allocated when the store
//! was made; when all are in use, a page on the stack does. So what is in the file can come home
//! when there is no memory but that for the pages themselves. What is written passes through the
//! kernel's page cache, which gives that memory back by itself once it is on the disk.
//!
//! # Concurrency
//!
//! | lock | taken while holding | held for |
//! | --- | --- | --- |
//! | that of the frames | whatever a backend holds, when a block is freed | looking up or replacing entries |
//! | that of the buffers at rest | nothing | taking one, or putting it back |
//!
//! Reads and writes name their offset, so they do not meet, and are made with no lock held. To give
//! an extent back to the disk takes long, and a block may be freed under any lock of a backend: so
//! that is left to the next call that allocates or copies.
//!
//! A child of `fork` has the same file, and tables of its own that know nothing of what the parent
//! does from then on: what they say is in the file may be something else by now. So the child is
//! refused everything.
//!
//! # A program that closes all descriptors
//!
//! loses the file, and with it what is in it: to bring such a page home fails from then on. It
//! never comes home as something else, and no file of the program is written to.

mod backing;
mod buffers;
#[cfg(all(test, not(shuttle)))]
mod tests;

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Instant;

use uhmm::primitive::atomic::{AtomicU64, Ordering};
use uhmm::{
    CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, Order, OutOfDeviceMemory, PAGE_SIZE,
    SystemMemory,
};

use self::backing::{Backing, Unnamed};
use self::buffers::{BUFFER_PAGES, Buffers};
use super::content::{PageBytes, repeated_word};
use super::frames::{CHUNK, ChunkNumber, FrameSpace};
use super::options::StoreOptions;
use super::spec::StoreError;
use super::statistics::{Counters, Held, StoreStatistics};

/// The bytes of an extent.
const EXTENT: u64 = (CHUNK * PAGE_SIZE) as u64;

/// The frames there are where no limit is set: addresses for 1 TiB.
const FRAMES: u64 = 1 << 28;

/// How many extents that are not in use are kept for the next who need one.
const KEPT_EXTENTS: u32 = 8;

/// How many extents one call gives back to the disk at most.
const RELEASED_AT_ONCE: usize = 4;

/// How long the disk counts as full after it has refused, in milliseconds.
const FULL_FOR: u64 = 1000;

/// The name in messages.
const NAME: &str = "memory in a file";

/// A memory that keeps pages in a file. See the [module](super) for how stores are used.
///
/// # Examples
///
/// ```
/// use uhmm::sim::{Machine, Mapping};
/// use uhmm::{Access, DevicePagemap, PageRange};
/// use uhmm_devices::store::{FileStore, StoreOptions};
///
/// let process = Machine::new().spawn();
/// let range = PageRange::new(0x10_0000, 0x10_0000)?;
/// process.map(range, Mapping::anonymous(Access::Write))?;
/// process.store_u64(range.address(), 7)?;
///
/// let options = StoreOptions::new().limit_bytes(64 << 20);
/// let store = std::sync::Arc::new(FileStore::create(std::env::temp_dir(), options)?);
/// let pagemap = DevicePagemap::register(store.clone());
/// assert!(process.address_space().migrate(range, &pagemap).run().is_complete());
/// assert_eq!(store.statistics().pages(), 256);
///
/// // A touch brings a page home.
/// assert_eq!(process.load_u64(range.address())?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FileStore {
    options: StoreOptions,
    backing: Box<dyn Backing>,
    frames: FrameSpace<Slot>,
    buffers: Buffers,
    counters: Counters,
    /// The process that the tables are true in.
    process: rustix::process::Pid,
    made: Instant,
    /// When the disk is to be asked again, in milliseconds since the store was made.
    full_until: AtomicU64,
}

/// What is known of a frame.
#[derive(Clone, Copy, Default)]
struct Slot {
    held: Held,
    checksum: u32,
}

impl FileStore {
    /// Makes an empty store in a new file without a name, on the file system that `path` is on: a
    /// directory, or the name of a file that does not exist, in one that does.
    ///
    /// # Errors
    ///
    /// [`StoreError::File`]: there can be no such file. [`StoreError::SmallLimit`]: the limit is
    /// less than one extent of 2 MiB.
    pub fn create(path: impl AsRef<Path>, options: StoreOptions) -> Result<FileStore, StoreError> {
        let path = path.as_ref();
        let failed = |error| StoreError::File { path: path.to_owned(), error };
        let backing = Unnamed::create(path).map_err(failed)?;
        FileStore::with_backing(Box::new(backing), options)
    }

    fn with_backing(
        backing: Box<dyn Backing>,
        options: StoreOptions,
    ) -> Result<FileStore, StoreError> {
        let extents = options.limit().map(|bytes| bytes / EXTENT);
        if extents == Some(0) {
            return Err(StoreError::SmallLimit { least: EXTENT });
        }
        let frames = extents.map_or(FRAMES, |extents| extents.saturating_mul(CHUNK as u64));
        Ok(FileStore {
            backing,
            // In one shard, so that what leaves together lies together.
            frames: FrameSpace::new(frames, 1),
            buffers: Buffers::new(),
            counters: Counters::default(),
            process: rustix::process::getpid(),
            made: Instant::now(),
            full_until: AtomicU64::new(0),
            options,
        })
    }

    /// Returns what it holds, what that takes, and what it has done.
    pub fn statistics(&self) -> StoreStatistics {
        let tables = self.frames.table_bytes() + Buffers::BYTES as u64;
        self.counters.snapshot(tables, self.options.limit())
    }

    /// Tells whether there is room for this many more pages, as far as can be known: within the
    /// limit, and, for a second after the disk has refused an extent, in those that there are.
    pub fn has_room(&self, pages: u64) -> bool {
        let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE as u64);
        let held = bytes(self.counters.pages());
        // Relaxed: it is a time, and nothing else depends on it.
        let full = self.now() < self.full_until.load(Ordering::Relaxed);
        let most =
            if full { self.counters.taken() } else { self.frames.capacity() * PAGE_SIZE as u64 };
        held.saturating_add(bytes(pages)) <= most
    }

    /// Checks that tables and statistics agree. To be called while nobody uses the store.
    ///
    /// # Errors
    ///
    /// What does not agree, in words.
    pub fn check(&self) -> Result<(), String> {
        self.frames.check()?;
        let found = Counters::default();
        self.frames.for_each(|_, slot| found.held(Held::Fresh, slot.held));
        let (found, counted) = (found.snapshot(0, None), self.statistics());
        let held = |of: &StoreStatistics| (of.zero_pages, of.incompressible_pages, of.stored_bytes);
        if held(&found) != held(&counted) {
            return Err(format!("{found:?} is held, and {counted:?} is counted"));
        }
        Ok(())
    }

    /// Returns the time since the store was made, in milliseconds.
    fn now(&self) -> u64 {
        self.made.elapsed().as_millis() as u64
    }

    /// Tells whether this is the process whose tables these are.
    fn is_own(&self) -> bool {
        rustix::process::getpid() == self.process
    }

    /// Reserves an extent on the disk.
    fn reserve(&self, chunk: ChunkNumber) -> bool {
        if !self.counters.take(EXTENT, self.options.limit()) {
            self.counters.refused.add(1);
            return false;
        }
        let reserved = match self.options.fails("reserve") {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => self.backing.reserve(offset_of(chunk.first()), EXTENT),
        };
        if let Err(error) = reserved {
            self.counters.give_back(EXTENT);
            // Relaxed: as where it is loaded.
            self.full_until.store(self.now() + FULL_FOR, Ordering::Relaxed);
            self.note_write(&error);
            return false;
        }
        true
    }

    /// Gives extents back to the disk, if many are not in use.
    fn release_idle(&self) {
        for _ in 0..RELEASED_AT_ONCE {
            let Some(chunk) = self.frames.take_idle(KEPT_EXTENTS) else { return };
            let released = match self.options.fails("release") {
                true => Err(io::ErrorKind::Unsupported.into()),
                false => self.backing.release(offset_of(chunk.first()), EXTENT),
            };
            if let Err(error) = released {
                // It stays the store's, and is used again.
                tracing::debug!(target: "uhmm", %error, "an extent is kept");
                self.frames.restore(chunk);
                return;
            }
            self.counters.give_back(EXTENT);
            self.frames.retire(chunk);
        }
    }

    /// Counts a write that failed, by whether there was no room.
    fn note_write(&self, error: &io::Error) {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match error.kind() {
            FileTooLarge | QuotaExceeded | StorageFull => self.counters.refused.add(1),
            _ => self.counters.failed_writes.add(1),
        }
        tracing::warn!(target: "uhmm", %error, "pages stay: the file cannot take them");
    }

    /// Writes pages, of one chunk, from `first` on.
    fn write(&self, first: DeviceFrame, bytes: &[u8]) -> bool {
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        let mut slots = [Slot::default(); BUFFER_PAGES];
        let slots = &mut slots[..pages.len()];
        for (slot, page) in slots.iter_mut().zip(pages) {
            let held = if repeated_word(page) == Some(0) { Held::Zero } else { Held::AsItIs };
            *slot = Slot { held, checksum: self.options.verify().checksum(page) };
        }
        if let Some((from, to)) = span(slots, |slot| slot.held == Held::AsItIs) {
            let bytes = &bytes[from * PAGE_SIZE..to * PAGE_SIZE];
            let at = offset_of(first) + (from * PAGE_SIZE) as u64;
            if let Err(error) = self.backing.write_all_at(bytes, at) {
                self.note_write(&error);
                return false;
            }
        }
        self.enter(first, slots);
        true
    }

    /// Says what is in pages, of one chunk, from `first` on.
    fn enter(&self, first: DeviceFrame, slots: &[Slot]) {
        self.frames.with(first, slots.len(), |entries| {
            for (entry, slot) in entries.iter_mut().zip(slots) {
                self.counters.held(entry.held, slot.held);
                *entry = *slot;
            }
        });
        self.counters.pages_in.add(slots.len() as u64);
    }

    /// Reads pages, of one chunk, from `first` on. Says whether all of them are what was stored.
    fn read(&self, first: DeviceFrame, bytes: &mut [u8]) -> bool {
        let (pages, _) = bytes.as_chunks_mut::<PAGE_SIZE>();
        let count = pages.len();
        let mut slots = [Slot::default(); BUFFER_PAGES];
        let slots = &mut slots[..count];
        self.frames.with(first, count, |entries| slots.copy_from_slice(entries));
        if slots.iter().any(|slot| slot.held == Held::Fresh) {
            self.counters.failed_reads.add(1);
            tracing::error!(target: "uhmm", ?first, count, "what was never stored is fetched");
            return false;
        }
        if let Some((from, to)) = span(slots, |slot| slot.held == Held::AsItIs) {
            let at = offset_of(first) + (from * PAGE_SIZE) as u64;
            let bytes = pages[from..to].as_flattened_mut();
            if let Err(error) = self.backing.read_exact_at(bytes, at) {
                self.counters.failed_reads.add(1);
                tracing::error!(target: "uhmm", %error, ?first, count, "pages cannot be read");
                return false;
            }
        }
        let all = pages.iter_mut().zip(slots).zip(0..).all(|((page, slot), index)| {
            if slot.held == Held::Zero {
                *page = [0; PAGE_SIZE];
            }
            self.confirms(DeviceFrame(first.0 + index), slot, page)
        });
        self.counters.pages_out.add(if all { count as u64 } else { 0 });
        all
    }

    fn confirms(&self, frame: DeviceFrame, slot: &Slot, page: &PageBytes) -> bool {
        let confirmed = self.options.verify().confirms(NAME, frame, slot.checksum, page);
        self.counters.mismatches.add(u64::from(!confirmed));
        confirmed
    }

    /// Does jobs whose blocks lie one after the other in one chunk. Says whether all are done.
    fn do_run(&self, memory: &dyn SystemMemory, jobs: &[CopyJob], buffer: &mut [u8]) -> bool {
        let (first, pages) = match jobs {
            [] => return true,
            [job, ..] => (device_frame(job), jobs.iter().map(|job| job.order().pages()).sum()),
        };
        let most = (buffer.len() / PAGE_SIZE) as u64;
        let mut done = 0;
        while done < pages {
            let count = most.min(pages - done);
            let bytes = &mut buffer[..count as usize * PAGE_SIZE];
            let at = DeviceFrame(first.0 + done);
            let part = done..done + count;
            let did = match jobs[0].kind() {
                CopyKind::In { .. } => {
                    for_each_part(jobs, part, bytes, |at, bytes| memory.read(at, 0, bytes));
                    self.write(at, bytes)
                }
                CopyKind::Out { .. } => {
                    let read = self.read(at, bytes);
                    if read {
                        for_each_part(jobs, part, bytes, |at, bytes| memory.write(at, 0, bytes));
                    }
                    read
                }
                CopyKind::Clear { .. } => self.clear(at, count as usize),
            };
            if !did {
                return false;
            }
            done += count;
        }
        true
    }

    fn clear(&self, first: DeviceFrame, pages: usize) -> bool {
        let checksum = self.options.verify().checksum(&[0; PAGE_SIZE]);
        self.enter(first, &[Slot { held: Held::Zero, checksum }; BUFFER_PAGES][..pages]);
        true
    }
}

impl DeviceMemory for FileStore {
    fn capacity(&self) -> u64 {
        self.frames.capacity()
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        if order > self.options.largest() || self.options.fails("allocate") || !self.is_own() {
            return Err(OutOfDeviceMemory { order });
        }
        self.release_idle();
        let mut asked = false;
        let frame = self.frames.allocate(order, |chunk| {
            asked = true;
            self.reserve(chunk)
        });
        if frame.is_none() && !asked {
            self.counters.refused.add(1);
        }
        frame.ok_or(OutOfDeviceMemory { order })
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        self.frames.free(frame, order, |slot| {
            let slot = std::mem::take(slot);
            self.counters.held(slot.held, Held::Fresh);
        });
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        let own = self.is_own();
        let mut buffer = self.buffers.take();
        let mut page = [0; PAGE_SIZE];
        let buffer = buffer.as_deref_mut().unwrap_or(&mut page);
        let mut rest = jobs;
        while !rest.is_empty() {
            let (run, after) = rest.split_at_mut(run_length(rest));
            rest = after;
            let step = if let CopyKind::Clear { .. } = run[0].kind() { "clear" } else { "copy" };
            let fails = run.iter().any(|_| self.options.fails(step));
            if !fails && own && self.do_run(memory, run, buffer) {
                run.iter_mut().for_each(CopyJob::complete);
            }
        }
        if own {
            self.release_idle();
        }
    }
}

/// Returns where a frame is in the file.
fn offset_of(frame: DeviceFrame) -> u64 {
    frame.0 * PAGE_SIZE as u64
}

/// Returns the first of `slots` that `is`, and the one after the last.
fn span(slots: &[Slot], is: impl Fn(&Slot) -> bool) -> Option<(usize, usize)> {
    let from = slots.iter().position(&is)?;
    let last = slots.iter().rposition(&is)?;
    Some((from, last + 1))
}

/// Returns the frame of the device that a job begins at.
fn device_frame(job: &CopyJob) -> DeviceFrame {
    match job.kind() {
        CopyKind::In { to, .. } | CopyKind::Clear { to } => to,
        CopyKind::Out { from, .. } => from,
    }
}

/// Returns how many of the first jobs do the same with blocks that lie one after the other in one
/// chunk: at least one.
fn run_length(jobs: &[CopyJob]) -> usize {
    let chunk = |frame: DeviceFrame| frame.0 / CHUNK as u64;
    let follows = |pair: &[CopyJob]| {
        let (a, b) = (device_frame(&pair[0]), device_frame(&pair[1]));
        let same =
            std::mem::discriminant(&pair[0].kind()) == std::mem::discriminant(&pair[1].kind());
        same && a.0 + pair[0].order().pages() == b.0 && chunk(a) == chunk(b)
    };
    1 + jobs.windows(2).take_while(|pair| follows(pair)).count()
}

/// Calls `f` with each frame of system memory that the pages `part` of a run are at, and with the
/// bytes of `bytes` that belong there.
fn for_each_part(
    jobs: &[CopyJob],
    part: std::ops::Range<u64>,
    bytes: &mut [u8],
    mut f: impl FnMut(Frame, &mut [u8]),
) {
    let mut first = 0;
    for job in jobs {
        let end = first + job.order().pages();
        let (from, to) = (first.max(part.start), end.min(part.end));
        if let (CopyKind::In { from: at, .. } | CopyKind::Out { to: at, .. }, true) =
            (job.kind(), from < to)
        {
            let within = |page: u64| (page - part.start) as usize * PAGE_SIZE;
            f(Frame(at.0 + from - first), &mut bytes[within(from)..within(to)]);
        }
        first = end;
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore").field("statistics", &self.statistics()).finish_non_exhaustive()
    }
}
