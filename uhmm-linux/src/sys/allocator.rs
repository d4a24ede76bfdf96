//! Memory for those who must not wait for memory.
//!
//! The threads that bring pages home allocate while they do: announcements, page tables of devices,
//! queues. If what they touch were itself on a device, or if they waited for a lock whose holder
//! waits for a page, nobody would bring anything home ever again. A program that lets its heap move
//! therefore makes [`Allocator`] its global allocator: everything it allocates is in one arena that
//! never moves, except what it allocates within [`movable`].
//!
//! Nothing in the arena takes a lock or waits for another thread. That is why it is not one of the
//! arenas to be had, which have a lock around them: any thread may be stopped anywhere by a fault
//! on its own stack, which only a thread that allocates can end, and may be left behind in the
//! middle by `fork`. Here a thread that stops keeps only what it has in its hands from the others,
//! who take something else. So nothing need be done around `fork`: the child goes on with what its
//! parent had, without what other threads of the parent held in their hands at that moment.
//!
//! * `classes`: the sizes of small objects.
//! * `spans` and `objects`: small objects; the protocol, and what it is used for.
//! * `runs`: large ones.
//! * `arena`: the memory.

mod arena;
mod atomics;
mod classes;
mod objects;
mod runs;
mod spans;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use uhmm::PageRange;

use self::arena::{Arena, SHARDS};

/// The least that is reserved for the arena where addresses are plenty, in bytes.
const LEAST_RESERVED: usize = 64 << 30;

/// How many times the machine's memory is reserved for the arena: it is not compacted.
const RESERVED_PER_MEMORY: usize = 4;

/// How many spans of a class must be seen unused until their memory is returned, at least.
const UNUSED_SPANS: u32 = 8;

/// A global allocator whose memory never moves to a device, except what the program
/// [says](movable) may.
///
/// The arena is reserved at the first allocation: four times the memory of the machine, at least
/// 64 GiB, of inaccessible addresses, or as much as there is room for. It grows to what is in use,
/// gives back large allocations and unused parts to the kernel except for 32 MiB, and never calls
/// another allocator. It can be used in signal handlers, and in a child after `fork`, at any time.
/// A small object costs one locked instruction to allocate and one to free.
///
/// What is freed twice, or was never allocated, ends the process with a message.
///
/// `A` serves what is movable; what belongs to whom is told by the address, so anything may be
/// freed, and resized, anywhere. What is resized stays what it is.
///
/// # Limits
///
/// Alignments above 1 GiB are refused. A limit on the size of the address space (`RLIMIT_AS`) is
/// shared between the arena and everything else, half and half. `mlockall` counts all reserved
/// addresses against `RLIMIT_MEMLOCK`.
///
/// # Examples
///
/// ```
/// use uhmm_linux::{Allocator, movable};
///
/// #[global_allocator]
/// static GLOBAL: Allocator = Allocator::new();
///
/// let table = movable(|| vec![0_u64; 1 << 20]);      // may live on a device
/// let index: Vec<usize> = (0..table.len()).collect(); // never does
/// # assert_eq!(index.len(), table.len());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Allocator<A = System> {
    movable: A,
}

/// What a thread knows. It has no destructor, so it can be used for as long as the thread runs.
struct Local {
    /// How many closures of [`movable`] the thread is in.
    movable: Cell<u32>,
    /// Where it looks for small objects first, plus 1; 0 before it has looked.
    shard: Cell<u32>,
}

thread_local! {
    static LOCAL: Local = const { Local { movable: Cell::new(0), shard: Cell::new(0) } };
}

/// The arena of this program, once there is one.
static ARENA: AtomicPtr<Arena> = AtomicPtr::new(ptr::null_mut());

/// How many threads have looked for small objects.
static THREADS: AtomicU32 = AtomicU32::new(0);

/// Runs `f`; what the calling thread allocates meanwhile may move to a device, if [`Allocator`] is
/// the global allocator. Without it this changes nothing.
///
/// What other threads allocate for `f` is theirs. What `f` frees, or resizes, is freed and resized
/// as what it is. Within `f` call nothing of this project: what that allocates for its own use
/// would move too.
pub fn movable<R>(f: impl FnOnce() -> R) -> R {
    with_depth(LOCAL.with(|local| local.movable.get()) + 1, f)
}

/// Runs `f`; what the calling thread allocates meanwhile stays, even within [`movable`].
pub(crate) fn private<R>(f: impl FnOnce() -> R) -> R {
    with_depth(0, f)
}

/// Runs `f` as if within so many closures of [`movable`].
fn with_depth<R>(depth: u32, f: impl FnOnce() -> R) -> R {
    /// Restores the depth, also where `f` panics.
    struct Restore(u32);
    impl Drop for Restore {
        fn drop(&mut self) {
            LOCAL.with(|local| local.movable.set(self.0));
        }
    }
    let _restore = Restore(LOCAL.with(|local| local.movable.replace(depth)));
    f()
}

/// Returns the addresses of the arena; `None` where nothing was ever allocated from it, which is to
/// say that [`Allocator`] is not the global allocator.
pub(crate) fn range() -> Option<PageRange> {
    existing().map(Arena::range)
}

/// Tells whether [`Allocator`] is the global allocator of this program.
pub(crate) fn is_installed() -> bool {
    existing().is_some()
}

/// Tells whether `page` is in the arena.
#[cfg(test)]
fn contains(page: uhmm::Page) -> bool {
    existing().is_some_and(|arena| arena.offset_of(page.address() as usize).is_some())
}

impl Allocator {
    /// Makes an allocator that leaves to the system's what may move.
    pub const fn new() -> Allocator {
        Allocator::wrapping(System)
    }

    /// Returns the addresses that what is not movable comes from; `None` before the first
    /// allocation, or where no `Allocator` is the global one.
    pub fn range() -> Option<PageRange> {
        range()
    }
}

impl<A> Allocator<A> {
    /// Makes an allocator that leaves to `movable` what may move.
    ///
    /// Nothing that `movable` itself needs may move: its tables must be in its variables, or in
    /// memory that the program keeps from moving.
    pub const fn wrapping(movable: A) -> Allocator<A> {
        Allocator { movable }
    }
}

// SAFETY: memory of the arena belongs to one allocation until that is freed: see `spans` and
// `runs`. What is aligned and how large it is follows from the class or the run. Everything else is
// done by `A`, which is a global allocator, and gets back only what came from it: the arena's
// addresses are its own for ever. Nothing here unwinds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Allocator<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match place() {
            // SAFETY: the caller's contract.
            Place::Movable => unsafe { self.movable.alloc(layout) },
            Place::Arena(arena, shard) => arena.allocate(layout, shard),
            Place::Nowhere => ptr::null_mut(),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match place() {
            // SAFETY: the caller's contract.
            Place::Movable => unsafe { self.movable.alloc_zeroed(layout) },
            Place::Arena(arena, shard) => arena.allocate_zeroed(layout, shard),
            Place::Nowhere => ptr::null_mut(),
        }
    }

    #[inline]
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        match owner(pointer) {
            // SAFETY: the caller's contract: what is not the arena's was allocated by `movable`.
            None => unsafe { self.movable.dealloc(pointer, layout) },
            // SAFETY: the caller's contract.
            Some((arena, offset)) => unsafe { arena.free(offset, layout, shard()) },
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some((arena, offset)) = owner(pointer) else {
            // SAFETY: the caller's contract: what is not the arena's was allocated by `movable`.
            return unsafe { self.movable.realloc(pointer, layout, size) };
        };
        // SAFETY: the caller's contract.
        if unsafe { arena.resize_in_place(offset, layout, size) } {
            return pointer;
        }
        // SAFETY: the caller's contract: the size is one that a layout of this alignment can have.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        let shard = shard();
        let moved = arena.allocate(new, shard);
        if !moved.is_null() {
            let kept = layout.size().min(size);
            // SAFETY: both have so many bytes, the new one belongs to nobody else, and the old one
            // is in use, so that they are apart.
            unsafe { ptr::copy_nonoverlapping(pointer, moved, kept) };
            // SAFETY: the caller's contract: what was there is the new one's now.
            unsafe { arena.free(offset, layout, shard) };
        }
        moved
    }
}

/// Where an allocation of the calling thread is made.
enum Place {
    /// By the wrapped allocator.
    Movable,
    /// In the arena, from the spans of a shard.
    Arena(&'static Arena, usize),
    /// There is no room for an arena.
    Nowhere,
}

/// Returns where an allocation of the calling thread is made.
#[inline]
fn place() -> Place {
    LOCAL.with(|local| {
        if local.movable.get() != 0 {
            return Place::Movable;
        }
        match existing().or_else(begin) {
            Some(arena) => Place::Arena(arena, shard_of(local)),
            None => Place::Nowhere,
        }
    })
}

/// Returns the arena and where in it `pointer` points; `None` where it is not the arena's.
#[inline]
fn owner(pointer: *mut u8) -> Option<(&'static Arena, usize)> {
    let arena = existing()?;
    Some((arena, arena.offset_of(pointer.addr())?))
}

/// Returns where the calling thread looks for small objects first.
#[inline]
fn shard() -> usize {
    LOCAL.with(shard_of)
}

/// Returns where a thread looks for small objects first.
#[inline]
fn shard_of(local: &Local) -> usize {
    let mut shard = local.shard.get();
    if shard == 0 {
        // Relaxed: only to be different. Never 0 but for a moment after 2^32 threads.
        shard = THREADS.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        local.shard.set(shard);
    }
    shard as usize % SHARDS
}

/// Returns the arena, if there is one.
#[inline]
fn existing() -> Option<&'static Arena> {
    let arena = ARENA.load(Ordering::Acquire);
    // SAFETY: it is null, or was stored by `begin`, whose arenas are for ever. Acquire: pairs with
    // the exchange there, so that the arena is seen as it was made.
    unsafe { arena.as_ref() }
}

/// Makes the arena, unless another thread is quicker.
#[cold]
#[inline(never)]
fn begin() -> Option<&'static Arena> {
    let arena = Arena::reserve(reservation()).ok()?;
    let (new, bytes) = (NonNull::from(arena), arena.range().len() * uhmm::PAGE_SIZE);
    // Release: pairs with `existing`; Acquire for the arena of who was quicker.
    let begun =
        ARENA.compare_exchange(ptr::null_mut(), new.as_ptr(), Ordering::AcqRel, Ordering::Acquire);
    if begun.is_err() {
        // SAFETY: nobody else has seen it, and it is not used below.
        unsafe { Arena::discard(new, bytes) };
    }
    existing()
}

/// Ends the process because the program has damaged its memory. Allocates nothing.
#[cold]
fn corrupted(what: &str) -> ! {
    // SAFETY: if the program has closed it, or put another file there, then that is told, as with
    // everything else that writes to the standard error.
    let stderr = unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
    // Where nobody can be told, the process ends all the same.
    let _ = rustix::io::write(stderr, b"uhmm_linux::Allocator: ");
    let _ = rustix::io::write(stderr, what.as_bytes());
    std::process::abort()
}

/// Returns how many bytes of addresses to reserve.
fn reservation() -> usize {
    let mut machine = std::mem::MaybeUninit::<libc::sysinfo>::uninit();
    // SAFETY: there is room for what the kernel writes.
    if unsafe { libc::sysinfo(machine.as_mut_ptr()) } != 0 {
        return LEAST_RESERVED;
    }
    // SAFETY: the call has succeeded.
    let machine = unsafe { machine.assume_init() };
    let memory = (machine.totalram as usize).saturating_mul(machine.mem_unit as usize);
    memory.saturating_mul(RESERVED_PER_MEMORY).max(LEAST_RESERVED)
}

#[cfg(test)]
mod tests;
