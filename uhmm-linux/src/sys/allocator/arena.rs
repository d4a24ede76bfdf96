//! The memory itself: one range of addresses, made accessible from its low end as it is needed.
//!
//! ```text
//! base                                     first span                        end
//! | Arena | used bits | dirty bits | Span Span Span ...  | 64 KiB | 64 KiB | ... |
//! |------------- accessible --------------|-----         |-- accessible --|      |
//! ```
//!
//! Spans are numbered from the base, so those that hold the arena's own data have numbers too;
//! their bits are set and stay so. Inaccessible memory is not accounted for, so the range can be
//! much larger than the machine's memory; it never grows.

use core::alloc::Layout;
use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm::{PAGE_SIZE, PageRange};

use super::classes::{ALL, CLASSES, class_for};
use super::corrupted;
use super::objects::{Object, Objects, Shard};
use super::runs::{Run, Runs, SPAN_BYTES, Summary};
use super::spans::{ClassSpans, Span, Spans, Use};
use crate::sys::gate;

/// How many spans are made accessible at once: 4 MiB.
const STEP_SPANS: u32 = 64;

/// How many sets of current spans there are; threads are spread over them.
pub(super) const SHARDS: usize = 16;

/// The least that is worth reserving, in bytes.
const SMALLEST: usize = 64 << 20;

/// The alignment of an arena, in bytes, and so of its allocations, as far as its size allows.
const LARGEST_ALIGN: usize = 1 << 30;

/// An arena, at the base of its own memory. It is never unmapped.
///
/// # Invariants
///
/// 1. `bytes` is a power of two from [`SMALLEST`] and a multiple of 64 spans; the arena's address
///    is a multiple of `bytes` or of [`LARGEST_ALIGN`], whichever is smaller; all of the `bytes`
///    bytes from `base`, which is the arena's address, are one mapping of ours for ever.
/// 2. The arena, its bits, the `Span`s before number `committed`, and the spans from `parts.first`
///    to before `committed` are accessible; the former are only accessed as what they are, by
///    shared references; they began as zeroes, which is a valid value of each.
/// 3. The numbers before `parts.first` are taken in `used`, and never given back.
#[repr(C)]
pub(super) struct Arena {
    base: *mut u8,
    bytes: usize,
    parts: Parts,
    /// Up to which number spans are accessible.
    committed: AtomicU32,
    /// On cache lines of its own: it changes, and all else here is read all the time.
    runs: Summary,
    classes: [ClassSpans; CLASSES],
    shards: [Shard; SHARDS],
}

// SAFETY: the arena's memory belongs to nobody in particular, and `base` is a plain address.
unsafe impl Sync for Arena {}

/// Where the parts of an arena are, in bytes from its base.
#[derive(Clone, Copy, Debug)]
struct Parts {
    used: usize,
    dirty: usize,
    table: usize,
    /// The first span that is not the arena's own.
    first: u32,
}

impl Parts {
    /// Lays out an arena of `bytes` bytes.
    const fn of(bytes: usize) -> Parts {
        let spans = bytes / SPAN_BYTES;
        let used = size_of::<Arena>().next_multiple_of(align_of::<Span>());
        let dirty = used + spans / 8;
        let table = (dirty + spans / 8).next_multiple_of(align_of::<Span>());
        let end = table + spans * size_of::<Span>();
        // The first span begins where a huge page may.
        Parts { used, dirty, table, first: (end.next_multiple_of(2 << 20) / SPAN_BYTES) as u32 }
    }
}

impl Arena {
    /// Reserves an arena of `bytes` bytes, a power of two, or of half as much as long as there is
    /// no room for it.
    ///
    /// # Errors
    ///
    /// What `mmap` or `mprotect` said of the last attempt.
    pub(super) fn reserve(bytes: usize) -> Result<&'static Arena, Errno> {
        let mut bytes = bytes.next_power_of_two().max(SMALLEST);
        loop {
            match Arena::map(bytes) {
                Err(_) if bytes > SMALLEST => bytes /= 2,
                outcome => return outcome,
            }
        }
    }

    /// Reserves an arena of exactly `bytes` bytes, and makes its own data accessible.
    fn map(bytes: usize) -> Result<&'static Arena, Errno> {
        let align = bytes.min(LARGEST_ALIGN);
        let mapped = bytes.checked_add(align).ok_or(Errno::NOMEM)?;
        let none = ProtFlags::empty();
        // SAFETY: the kernel chooses where, so that it replaces no other mapping.
        let start = unsafe {
            rustix::mm::mmap_anonymous(core::ptr::null_mut(), mapped, none, MapFlags::PRIVATE)
        }?;
        let before = start.addr().next_multiple_of(align) - start.addr();
        let base = start.wrapping_byte_add(before);
        // SAFETY: what is before the arena is ours, and nobody knows of it.
        unsafe { unmap(start, before) }?;
        // SAFETY: as above, what is after it.
        unsafe { unmap(base.wrapping_byte_add(bytes), mapped - bytes - before) }?;
        let parts = Parts::of(bytes);
        // SAFETY: the memory is ours.
        let allowed = unsafe { allow(base, parts.table) };
        if let Err(error) = allowed {
            // SAFETY: the memory is ours, and nobody knows of it.
            unsafe { unmap(base, bytes) }?;
            return Err(error);
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        // SAFETY: `bytes` bytes at `base` are ours, aligned, and accessible as far as the arena's
        // own data goes; nobody else knows of them, and all are zero.
        Ok(unsafe { Arena::begin(base, bytes, parts) })
    }

    /// Begins an arena in memory that reads as zeroes.
    ///
    /// # Safety
    ///
    /// The memory is as invariants 1 and 2 want it with nothing committed, and is the caller's.
    unsafe fn begin(base: NonNull<u8>, bytes: usize, parts: Parts) -> &'static Arena {
        // SAFETY: the caller's contract: the memory is ours and there is room. Zeroes are a value
        // of each field (invariant 2).
        let arena: &'static mut Arena = unsafe { base.cast().as_mut() };
        arena.base = base.as_ptr();
        arena.bytes = bytes;
        arena.parts = parts;
        arena.committed = AtomicU32::new(parts.first);
        // From here on only shared.
        let arena: &'static Arena = arena;
        let own = arena.runs().take_exactly(0, parts.first);
        debug_assert!(own.is_ok(), "a new arena has no spans in use");
        arena
    }

    /// Unmaps an arena. Where that fails it stays, and costs only addresses.
    ///
    /// # Safety
    ///
    /// Nobody but the caller knows of it, nothing was allocated from it, and no reference to it is
    /// used again.
    pub(super) unsafe fn discard(arena: NonNull<Arena>, bytes: usize) {
        // SAFETY: the caller's contract.
        let _ = unsafe { unmap(arena.as_ptr().cast::<c_void>(), bytes) };
    }

    /// Returns the range of pages of the arena.
    pub(super) fn range(&self) -> PageRange {
        PageRange::new(self.base.addr() as u64, self.bytes as u64)
            .expect("an arena begins and ends at the edge of a page")
    }

    /// Returns how far in the arena `address` is; `None` where it is not.
    #[inline]
    pub(super) fn offset_of(&self, address: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.base.addr());
        (offset < self.bytes).then_some(offset)
    }

    /// Allocates. Returns null where there is no memory, and for an alignment above that of the
    /// arena.
    #[inline]
    pub(super) fn allocate(&self, layout: Layout, shard: usize) -> *mut u8 {
        match class_for(layout) {
            Some(class) => self.allocate_object(class, shard),
            None => {
                self.allocate_run(layout).map_or(core::ptr::null_mut(), |run| self.at(run.first, 0))
            }
        }
    }

    /// Allocates memory that reads as zeroes, like [`allocate`](Arena::allocate).
    pub(super) fn allocate_zeroed(&self, layout: Layout, shard: usize) -> *mut u8 {
        let (pointer, zeroes) = match class_for(layout) {
            Some(class) => (self.allocate_object(class, shard), false),
            None => match self.allocate_run(layout) {
                Some(run) => (self.at(run.first, 0), run.zeroes),
                None => return core::ptr::null_mut(),
            },
        };
        if !pointer.is_null() && !zeroes {
            // SAFETY: so many bytes were just allocated, and nobody else has them.
            unsafe { pointer.write_bytes(0, layout.size()) };
        }
        pointer
    }

    /// Frees what was allocated at `offset` with `layout`.
    ///
    /// # Safety
    ///
    /// It was allocated by this arena with a layout of the same size and alignment, or was made to
    /// have it by [`resize_in_place`](Arena::resize_in_place), and nobody uses it any more.
    #[inline]
    pub(super) unsafe fn free(&self, offset: usize, layout: Layout, shard: usize) {
        let number = (offset / SPAN_BYTES) as u32;
        // Relaxed: who knows of an object has heard of it from somebody for whom it was accessible.
        if number >= self.committed.load(Ordering::Relaxed) {
            corrupted("freed memory that was not allocated\n");
        }
        match self.spans().span(number).usage() {
            Use::Class(class) => {
                let index = ALL[class].object_at((offset % SPAN_BYTES) as u32);
                let returned = |number| self.give_back(number, 1);
                self.objects(shard).give_back(Object { span: number, index }, class, returned);
            }
            Use::Run if offset.is_multiple_of(SPAN_BYTES) => {
                self.spans().span(number).set_usage(Use::None);
                self.give_back(number, spans_of(layout.size()));
            }
            Use::Run | Use::None => corrupted("freed memory that was not allocated\n"),
        }
    }

    /// Makes what was allocated at `offset` with `layout` one of `size` bytes at the same place, if
    /// that is possible without waste.
    ///
    /// # Safety
    ///
    /// As for [`free`](Arena::free), except that it is still in use up to the smaller of the sizes.
    /// `size` with the alignment of `layout` is a layout.
    pub(super) unsafe fn resize_in_place(
        &self,
        offset: usize,
        layout: Layout,
        size: usize,
    ) -> bool {
        let Ok(new) = Layout::from_size_align(size, layout.align()) else { return false };
        match (class_for(layout), class_for(new)) {
            (Some(old), Some(new)) => old == new,
            (None, None) => {
                let number = (offset / SPAN_BYTES) as u32;
                let (old, new) = (spans_of(layout.size()), spans_of(size));
                if new < old {
                    self.give_back(number + new, old - new);
                    return true;
                }
                new == old || self.take_at(number + old, new - old)
            }
            _ => false,
        }
    }

    /// Allocates an object of a class.
    #[inline]
    fn allocate_object(&self, class: usize, shard: usize) -> *mut u8 {
        let fresh = || self.take(1, 1).map(|run| run.first);
        match self.objects(shard).take(class, fresh) {
            Some(object) => self.at(object.span, object.index * ALL[class].size),
            None => core::ptr::null_mut(),
        }
    }

    /// Returns the small objects as the threads of a shard see them.
    #[inline]
    fn objects(&self, shard: usize) -> Objects<'_> {
        Objects { spans: self.spans(), shard: &self.shards[shard] }
    }

    /// Takes a run for a layout that no class fits.
    fn allocate_run(&self, layout: Layout) -> Option<Run> {
        if layout.align() > self.bytes.min(LARGEST_ALIGN) {
            return None;
        }
        let align = (layout.align() / SPAN_BYTES).max(1) as u32;
        let run = self.take(spans_of(layout.size()), align)?;
        self.spans().span(run.first).set_usage(Use::Run);
        Some(run)
    }

    /// Takes spans and makes them accessible.
    fn take(&self, spans: u32, align: u32) -> Option<Run> {
        let run = self.runs().take(spans, align)?;
        if self.commit(run.first + spans).is_err() {
            // Nothing has touched them.
            self.runs().give_back(run.first, spans, || true);
            return None;
        }
        Some(run)
    }

    /// Takes the spans from `first`, if all are free, and makes them accessible.
    fn take_at(&self, first: u32, spans: u32) -> bool {
        if self.runs().take_exactly(first, spans).is_err() {
            return false;
        }
        if self.commit(first + spans).is_err() {
            self.runs().give_back(first, spans, || false);
            return false;
        }
        true
    }

    /// Gives spans back.
    fn give_back(&self, first: u32, spans: u32) {
        let start = self.at(first, 0).cast::<c_void>();
        let bytes = spans as usize * SPAN_BYTES;
        self.runs().give_back(first, spans, || {
            // It fails where the program has locked its memory, which then keeps what it holds.
            // SAFETY: the spans are the caller's, who has no use for what they hold.
            unsafe { gate::madvise(start, bytes, libc::MADV_DONTNEED) }.is_ok()
        });
    }

    /// Makes the spans up to number `end`, and their data, accessible.
    fn commit(&self, end: u32) -> Result<(), Errno> {
        // Acquire: pairs with the last line, so that what it says is accessible is so.
        let committed = self.committed.load(Ordering::Acquire);
        if end <= committed {
            return Ok(());
        }
        let all = (self.bytes / SPAN_BYTES) as u32;
        let ample = end.saturating_add(STEP_SPANS).min(all);
        let mut outcome = Err(Errno::NOMEM);
        for end in [ample, end] {
            // Several threads may do the same at once; it makes no difference.
            outcome = self.allow_spans(committed, end);
            if outcome.is_ok() {
                self.committed.fetch_max(end, Ordering::AcqRel);
                break;
            }
        }
        outcome
    }

    /// Makes the spans from `from` to before `to`, and the data of all before `to`, accessible.
    fn allow_spans(&self, from: u32, to: u32) -> Result<(), Errno> {
        let base = self.base.cast::<c_void>();
        // SAFETY: it is within the arena (invariant 1), whose own data is at its start.
        unsafe { allow(base, self.parts.table + to as usize * size_of::<Span>()) }?;
        let bytes = (to - from) as usize * SPAN_BYTES;
        // SAFETY: it is within the arena.
        unsafe { allow(base.wrapping_byte_add(from as usize * SPAN_BYTES), bytes) }
    }

    /// Returns what is known of the spans.
    #[inline]
    fn spans(&self) -> Spans<'_> {
        let table = self.base.wrapping_add(self.parts.table).cast::<Span>();
        // SAFETY: it has room for all, and those of accessible spans are accessible, valid and only
        // shared (invariant 2). Numbers are only passed of spans that were taken, and so were made
        // accessible before anybody could hear of them.
        unsafe { Spans::new(table, &self.classes) }
    }

    /// Returns the address of the byte at `offset` in a span.
    #[inline]
    fn at(&self, number: u32, offset: u32) -> *mut u8 {
        self.base.wrapping_add(number as usize * SPAN_BYTES + offset as usize)
    }

    /// Checks that the arena is whole. Nobody may be using it.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let committed = self.committed.load(Ordering::SeqCst);
        for number in self.parts.first..committed {
            let span = self.spans().span(number);
            let Use::Class(class) = span.usage() else { continue };
            assert!(self.runs().is_used(number), "span {number} has a class and is free");
            let current = self.shards.iter().any(|shard| shard.has_current(number, class));
            let found = current || span.is_listed() || !span.has_free();
            assert!(found, "what is free in span {number} is forgotten");
        }
        self.spans().check(self.parts.first..committed);
        self.runs().check();
    }

    /// Returns the spans' bits.
    fn runs(&self) -> Runs<'_> {
        let words = self.bytes / SPAN_BYTES / u64::BITS as usize;
        let bits = |offset: usize| {
            let start = self.base.wrapping_add(offset).cast::<AtomicU64>();
            // SAFETY: so many words are there, accessible and zero to begin with, and only accessed
            // like this (invariant 2). They are aligned because the parts are.
            unsafe { core::slice::from_raw_parts(start, words) }
        };
        Runs { used: bits(self.parts.used), dirty: bits(self.parts.dirty), summary: &self.runs }
    }
}

/// Returns how many spans `bytes` bytes take; more than there are where that is no number.
fn spans_of(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(SPAN_BYTES)).unwrap_or(u32::MAX)
}

/// Makes `bytes` bytes from `start`, rounded up to pages, accessible.
///
/// # Safety
///
/// They are within an arena.
unsafe fn allow(start: *mut c_void, bytes: usize) -> Result<(), Errno> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the caller's contract: nobody relies on memory of an arena being inaccessible.
    unsafe { gate::mprotect(start, bytes.next_multiple_of(PAGE_SIZE), access) }
}

/// Unmaps `bytes` bytes from `start`; nothing where `bytes` is 0.
///
/// # Safety
///
/// They are ours, and nobody uses them.
unsafe fn unmap(start: *mut c_void, bytes: usize) -> Result<(), Errno> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's contract.
    unsafe { gate::munmap(start, bytes) }
}
