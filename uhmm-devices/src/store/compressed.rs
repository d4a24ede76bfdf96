//! Compressed memory: pages as LZ4 blocks, in slabs.
//!
//! A page that repeats one word is that word, and one that does not get smaller than 7/8 of itself
//! is kept as it is. The others are compressed, each by itself, since each may come home by itself.
//! What a page takes is known only when it is compressed, so a block of frames can be had as long
//! as there is any, and it is the copy that fails at the limit: the page stays at home.
//!
//! # Concurrency
//!
//! | lock | taken while holding | held for |
//! | --- | --- | --- |
//! | a shard's, of frames | whatever a backend holds, when a block is freed | replacing an entry; reading an object, or moving it; freeing the objects of a block |
//! | a class's, of slabs | a shard's | the copy of one object, or a few bits |
//! | that of the compressors that are at rest | nothing | taking one |
//!
//! Nothing else is shared but counters. Pages are compressed and decompressed with no lock held,
//! and system memory is called with none.
//!
//! An object belongs to the entry that says where it is. It is read, moved and freed under the lock
//! of the entry's shard, so nobody reads what is being moved, and nobody moves what an entry does
//! not know yet or not any more.
//!
//! A page comes home without any memory being allocated.

use std::fmt;

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use uhmm::primitive::{Mutex, lock};
use uhmm::{
    CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, Order, OutOfDeviceMemory, PAGE_SIZE,
    SystemMemory,
};

use super::content::{PageBytes, repeat_word, repeated_word};
use super::frames::FrameSpace;
use super::options::StoreOptions;
use super::slabs::{Handle, Slabs};
use super::statistics::{Counters, Held, StoreStatistics};

/// What pages are at most compressed to; what takes more is kept as it is.
const LARGEST: usize = PAGE_SIZE / 8 * 7;

/// The frames there are: addresses for 1 TiB of pages. They cost nothing until they are used.
const FRAMES: u64 = 1 << 28;

/// Over how many locks the frames are spread.
const SHARDS: usize = 8;

/// How many compressors are kept for the next who need one.
const COMPRESSORS: usize = 8;

/// The name in messages.
const NAME: &str = "compressed memory";

/// A memory that keeps pages compressed. See the [module](super) for how stores are used.
///
/// # Examples
///
/// ```
/// use uhmm::sim::{Machine, Mapping};
/// use uhmm::{Access, DevicePagemap, PageRange};
/// use uhmm_devices::store::{Compressed, StoreOptions};
///
/// let process = Machine::new().spawn();
/// let range = PageRange::new(0x10_0000, 0x10_0000)?;
/// process.map(range, Mapping::anonymous(Access::Write))?;
/// for page in 0..range.pages() {
///     process.store_u64(range.address() + page * 4096, page)?;
/// }
///
/// let store = std::sync::Arc::new(Compressed::new(StoreOptions::new().limit_bytes(64 << 20)));
/// let pagemap = DevicePagemap::register(store.clone());
/// assert!(process.address_space().migrate(range, &pagemap).run().is_complete());
///
/// let held = store.statistics();
/// assert_eq!(held.pages(), 256);
/// assert!(held.stored_bytes < 256 * 64);
///
/// // A touch brings a page home, and those around it.
/// assert_eq!(process.load_u64(range.address() + 7 * 4096)?, 7);
/// assert!(store.statistics().pages() < 256);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Compressed {
    options: StoreOptions,
    frames: FrameSpace<Entry>,
    slabs: Slabs,
    compressors: Mutex<Vec<Compressor>>,
    counters: Counters,
}

/// What is known of a frame, in 16 bytes.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// The word that the page repeats, or where its object is.
    word: u64,
    checksum: u32,
    /// The bytes of the object.
    length: u16,
    kind: Kind,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Fresh,
    Repeated,
    Compressed,
    AsItIs,
}

/// A page, and a compressed one, on their way.
struct Transfer {
    page: PageBytes,
    packed: [u8; LARGEST],
}

/// What it takes to compress a page.
struct Compressor {
    table: CompressTable,
    output: Box<[u8]>,
}

impl Compressed {
    /// The least limit with which more than repeated words can be kept, in bytes: one slab.
    pub const LEAST_LIMIT: u64 = 64 << 10;

    /// Makes an empty store.
    pub fn new(options: StoreOptions) -> Compressed {
        Compressed {
            frames: FrameSpace::new(FRAMES, SHARDS),
            slabs: Slabs::new(LARGEST, PAGE_SIZE),
            compressors: Mutex::new((0..COMPRESSORS).map(|_| Compressor::new()).collect()),
            counters: Counters::default(),
            options,
        }
    }

    /// Returns what it holds, what that takes, and what it has done.
    pub fn statistics(&self) -> StoreStatistics {
        let compressors = COMPRESSORS * Compressor::BYTES;
        let tables = self.frames.table_bytes() + self.slabs.table_bytes() + compressors as u64;
        self.counters.snapshot(tables, self.options.limit())
    }

    /// Tells whether there is room for this many more pages that do not compress.
    pub fn has_room(&self, pages: u64) -> bool {
        let bytes = pages.saturating_mul(PAGE_SIZE as u64).saturating_add(self.counters.taken());
        self.options.limit().is_none_or(|limit| bytes <= limit)
    }

    /// Moves up to `most` pages together where slabs have become nearly empty, and returns how
    /// many.
    ///
    /// A store does so by itself when pages come. To be called now and then by who has time, since
    /// it does not where pages only leave. Who brings a page home meanwhile waits for the copy of
    /// one page at most.
    pub fn compact(&self, most: u64) -> u64 {
        let relocate = |(handle, owner): (Handle, u32)| {
            self.frames.with_backed(DeviceFrame(owner.into()), |entry| {
                // It may have left, or not be entered yet.
                if entry.handle() != Some(handle) {
                    return None;
                }
                let (moved, freed) = self.slabs.relocate(handle)?;
                entry.word = moved.to_bits();
                Some(freed)
            })?
        };
        for moved in 0..most {
            let Some(freed) = self.slabs.last_of_sparse().and_then(relocate) else {
                return moved;
            };
            if freed > 0 {
                self.counters.give_back(freed);
            }
        }
        most
    }

    /// Checks that tables, slabs and statistics agree. To be called while nobody uses the store.
    ///
    /// # Errors
    ///
    /// What does not agree, in words.
    pub fn check(&self) -> Result<(), String> {
        self.frames.check()?;
        let (objects, bytes) = self.slabs.check()?;
        let found = Counters::default();
        self.frames.for_each(|_, entry| found.held(Held::Fresh, entry.held()));
        let (found, counted) = (found.snapshot(0, None), self.statistics());
        let held = |of: &StoreStatistics| {
            let unlike = [of.compressed_pages, of.incompressible_pages];
            (of.zero_pages, of.same_filled_pages, unlike, of.stored_bytes)
        };
        if held(&found) != held(&counted) {
            return Err(format!("{found:?} is held, and {counted:?} is counted"));
        }
        if objects != counted.compressed_pages + counted.incompressible_pages {
            return Err(format!("{objects} objects are stored, and {counted:?} is counted"));
        }
        if bytes != counted.taken_bytes {
            return Err(format!("slabs have {bytes} bytes, and {counted:?} is counted"));
        }
        Ok(())
    }

    /// Stores a page, if there is room for it.
    fn store(&self, frame: DeviceFrame, bytes: &PageBytes, compressor: &mut Compressor) -> bool {
        let Some(entry) = self.pack(frame, bytes, compressor) else {
            self.counters.refused.add(1);
            return false;
        };
        self.replace(frame, entry);
        true
    }

    /// Makes an entry of a page's contents.
    fn pack(
        &self,
        frame: DeviceFrame,
        bytes: &PageBytes,
        compressor: &mut Compressor,
    ) -> Option<Entry> {
        let checksum = self.options.verify().checksum(bytes);
        if let Some(word) = repeated_word(bytes) {
            return Some(Entry { word, checksum, length: 0, kind: Kind::Repeated });
        }
        let (object, kind) = match compressor.compress(bytes) {
            Some(compressed) => (compressed, Kind::Compressed),
            None => (&bytes[..], Kind::AsItIs),
        };
        let take = |bytes| self.counters.take(bytes, self.options.limit());
        let give_back = |bytes| self.counters.give_back(bytes);
        let owner = u32::try_from(frame.0).expect("there are fewer frames");
        let handle = self.slabs.insert(object, owner, take, give_back).ok()?;
        Some(Entry { word: handle.to_bits(), checksum, length: object.len() as u16, kind })
    }

    /// Says what is in a frame, and frees what was.
    fn replace(&self, frame: DeviceFrame, entry: Entry) {
        let before =
            self.frames.with(frame, 1, |entries| std::mem::replace(&mut entries[0], entry));
        self.counters.held(before.held(), entry.held());
        self.counters.pages_in.add(1);
        self.free_object(before);
    }

    fn free_object(&self, entry: Entry) {
        if let Some(handle) = entry.handle() {
            let bytes = self.slabs.remove(handle);
            if bytes > 0 {
                self.counters.give_back(bytes);
            }
        }
    }

    /// Fetches a page, if it is there and what was stored.
    fn fetch(&self, frame: DeviceFrame, transfer: &mut Transfer) -> bool {
        let entry = self.frames.with(frame, 1, |entries| {
            self.read_object(entries[0], transfer);
            entries[0]
        });
        if let Err(what) = unpack(entry, transfer) {
            self.counters.failed_reads.add(1);
            tracing::error!(target: "uhmm", ?frame, what, "a page cannot be fetched");
            return false;
        }
        if !self.options.verify().confirms(NAME, frame, entry.checksum, &transfer.page) {
            self.counters.mismatches.add(1);
            return false;
        }
        self.counters.pages_out.add(1);
        true
    }

    /// Copies the object of a page out, as it is.
    fn read_object(&self, entry: Entry, transfer: &mut Transfer) {
        match (entry.kind, entry.handle()) {
            (Kind::AsItIs, Some(handle)) => self.slabs.read(handle, &mut transfer.page),
            (Kind::Compressed, Some(handle)) => {
                self.slabs.read(handle, &mut transfer.packed[..usize::from(entry.length)]);
            }
            _ => {}
        }
    }

    /// Does a job, page by page. Says whether all of it is done.
    fn do_job(
        &self,
        memory: &dyn SystemMemory,
        job: &CopyJob,
        transfer: &mut Transfer,
        compressor: &mut Option<Compressor>,
    ) -> bool {
        (0..job.order().pages()).all(|index| match job.kind() {
            CopyKind::In { from, to } => {
                memory.read(Frame(from.0 + index), 0, &mut transfer.page);
                let compressor = compressor.get_or_insert_with(|| self.compressor());
                self.store(DeviceFrame(to.0 + index), &transfer.page, compressor)
            }
            CopyKind::Clear { to } => {
                let checksum = self.options.verify().checksum(&[0; PAGE_SIZE]);
                let zero = Entry { word: 0, checksum, length: 0, kind: Kind::Repeated };
                self.replace(DeviceFrame(to.0 + index), zero);
                true
            }
            CopyKind::Out { from, to } => {
                let fetched = self.fetch(DeviceFrame(from.0 + index), transfer);
                if fetched {
                    memory.write(Frame(to.0 + index), 0, &transfer.page);
                }
                fetched
            }
        })
    }

    /// Overwrites what is stored of a page.
    #[cfg(test)]
    pub(super) fn damage(&self, frame: DeviceFrame) {
        let handle = self.frames.with(frame, 1, |entries| entries[0].handle());
        self.slabs.damage(handle.expect("it has an object"));
    }

    /// Takes a compressor, or makes one where all are at work.
    fn compressor(&self) -> Compressor {
        let at_rest = lock(&self.compressors).pop();
        at_rest.unwrap_or_else(Compressor::new)
    }
}

/// Makes a page of what was read.
fn unpack(entry: Entry, transfer: &mut Transfer) -> Result<(), &'static str> {
    match entry.kind {
        Kind::Fresh => Err("nothing was stored there"),
        Kind::AsItIs => Ok(()),
        Kind::Repeated => {
            repeat_word(entry.word, &mut transfer.page);
            Ok(())
        }
        Kind::Compressed => {
            let packed = &transfer.packed[..usize::from(entry.length)];
            match decompress_into(packed, &mut transfer.page) {
                Ok(PAGE_SIZE) => Ok(()),
                _ => Err("it cannot be decompressed"),
            }
        }
    }
}

impl DeviceMemory for Compressed {
    fn capacity(&self) -> u64 {
        self.frames.capacity()
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        let refused = order > self.options.largest() || self.options.fails("allocate");
        let frame = if refused { None } else { self.frames.allocate(order, |_| true) };
        frame.ok_or(OutOfDeviceMemory { order })
    }

    fn is_prompt(&self) -> bool {
        true
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        let idle = self.frames.free(frame, order, |entry| {
            let entry = std::mem::take(entry);
            self.counters.held(entry.held(), Held::Fresh);
            self.free_object(entry);
        });
        // One for each shard is kept, or the next block would need it again.
        if idle && let Some(chunk) = self.frames.take_idle(1) {
            self.frames.retire(chunk);
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        let mut compressor = None;
        let mut transfer = Transfer { page: [0; PAGE_SIZE], packed: [0; LARGEST] };
        for job in &mut *jobs {
            let step = if let CopyKind::Clear { .. } = job.kind() { "clear" } else { "copy" };
            if !self.options.fails(step) && self.do_job(memory, job, &mut transfer, &mut compressor)
            {
                job.complete();
            }
        }
        if let Some(compressor) = compressor {
            let mut at_rest = lock(&self.compressors);
            if at_rest.len() < COMPRESSORS {
                at_rest.push(compressor);
            }
            drop(at_rest);
            // As many as have come pay for it. They came at leisure: who comes home is waited for.
            self.compact(jobs.iter().map(|job| job.order().pages()).sum());
        }
    }
}

impl Entry {
    /// Returns where its object is, if it has one.
    fn handle(&self) -> Option<Handle> {
        matches!(self.kind, Kind::Compressed | Kind::AsItIs).then(|| Handle::from_bits(self.word))
    }

    fn held(&self) -> Held {
        match self.kind {
            Kind::Fresh => Held::Fresh,
            Kind::Repeated if self.word == 0 => Held::Zero,
            Kind::Repeated => Held::SameFilled,
            Kind::Compressed => Held::Compressed(self.length),
            Kind::AsItIs => Held::AsItIs,
        }
    }
}

impl Compressor {
    /// The bytes that one takes: the output, and a table of 4096 numbers of 16 bits.
    const BYTES: usize = get_maximum_output_size(PAGE_SIZE) + 4096 * size_of::<u16>();

    fn new() -> Compressor {
        let output = vec![0; get_maximum_output_size(PAGE_SIZE)].into_boxed_slice();
        Compressor { table: CompressTable::small(), output }
    }

    /// Returns the page compressed, if that is worth it.
    fn compress(&mut self, bytes: &PageBytes) -> Option<&[u8]> {
        let length = compress_into_with_table(bytes, &mut self.output, &mut self.table).ok()?;
        (length <= LARGEST).then(|| &self.output[..length])
    }
}

impl fmt::Debug for Compressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressed").field("statistics", &self.statistics()).finish_non_exhaustive()
    }
}
