//! For whoever has a cache of registrations of his own: told what has become invalid.
//!
//! A communication library that caches registrations (of an RDMA device, of fixed buffers) needs a
//! function to be called before memory goes. Such libraries have an entrance for that: one takes a
//! monitor that is *imported*, to which it says which ranges it wants to hear of; another takes events
//! that are *external*, and is told of all of them. [`Monitor`] serves both: it calls a function with
//! an address, a length and a kind, for the ranges that it was asked to watch, or for all.
//!
//! With [announced](crate::Options::announced) changes the function is called before the change, and
//! the change waits until it has returned. Otherwise it is called when the change has been seen.

use std::fmt;
use std::sync::{Arc, Mutex};

use mmu_notifier::{Event, EventKind, Notifier, Subscription, VaRange};
use rangemap::RangeSet;
use smallvec::SmallVec;
use uhmm::{AddressSpace, Released};

use crate::space::lock;

/// What is going to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Change {
    /// The first address of it.
    pub address: u64,
    /// How long it is, in bytes.
    pub length: u64,
    /// What is done to it. [`EventKind::Unmap`] and [`EventKind::Release`] end registrations for good;
    /// after the others the memory is there and may be registered again.
    pub kind: EventKind,
}

/// Calls a function when memory that is watched goes, moves or changes.
///
/// Its drop waits until the function has returned; it is not called any more then (acceptance C03).
///
/// ```
/// use uhmm_linux::{Options, Process, bind::Monitor};
///
/// # #[global_allocator]
/// # static ALLOCATOR: uhmm_linux::Allocator = uhmm_linux::Allocator::new();
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let process = match Process::attach(Options::new()) {
///     Ok(process) => process,
///     Err(error) => return Ok(println!("not here: {error}")),
/// };
/// let monitor = Monitor::start(&process, |change| {
///     println!("{} bytes at {:#x} are not registered any more", change.length, change.address);
/// })?;
/// monitor.subscribe(0x1000, 4096)?;
/// monitor.unsubscribe(0x1000, 4096);
/// # Ok(()) }
/// ```
pub struct Monitor {
    watched: Arc<Mutex<Watched>>,
    subscription: Subscription<Callback>,
}

/// What the function is called for.
#[derive(Debug)]
enum Watched {
    All,
    Ranges(RangeSet<u64>),
}

struct Callback {
    watched: Arc<Mutex<Watched>>,
    call: Box<dyn FnMut(Change) + Send>,
}

impl Monitor {
    /// Starts to watch nothing yet.
    ///
    /// `call` runs on the thread that announces, under a lock of the monitor's own: it must not wait for a
    /// thread that changes mappings, nor drop the monitor.
    ///
    /// # Errors
    ///
    /// [`Released`] if the address space has ended.
    pub fn start(
        space: &AddressSpace,
        call: impl FnMut(Change) + Send + 'static,
    ) -> Result<Monitor, Released> {
        Monitor::with(space, Watched::Ranges(RangeSet::new()), Box::new(call))
    }

    /// Starts to watch all of the address space.
    ///
    /// # Errors
    ///
    /// As for [`start`](Monitor::start).
    pub fn start_all(
        space: &AddressSpace,
        call: impl FnMut(Change) + Send + 'static,
    ) -> Result<Monitor, Released> {
        Monitor::with(space, Watched::All, Box::new(call))
    }

    fn with(
        space: &AddressSpace,
        watched: Watched,
        call: Box<dyn FnMut(Change) + Send>,
    ) -> Result<Monitor, Released> {
        let watched = Arc::new(Mutex::new(watched));
        let callback = Callback { watched: Arc::clone(&watched), call };
        let notifiers = space.backend().notifiers();
        let subscription = notifiers.subscribe_all(callback).map_err(|_| Released)?;
        Ok(Monitor { watched, subscription })
    }

    /// Watches `length` bytes from `address` from now on.
    ///
    /// On return every change of the address space that began before has ended, and each that begins
    /// from now on is told of. So who subscribes first and registers memory then, registers what is
    /// there, or is told (acceptance E14). Not to be called by the function itself, nor with a lock
    /// held that it takes: this waits for it.
    ///
    /// # Errors
    ///
    /// [`Released`] if the address space has ended.
    pub fn subscribe(&self, address: u64, length: u64) -> Result<(), Released> {
        if let (Watched::Ranges(ranges), Some(range)) =
            (&mut *lock(&self.watched), span(address, length))
        {
            ranges.insert(range);
        }
        // A section begins when no change is under way.
        self.subscription.read_begin().map(drop)
    }

    /// Watches those bytes no longer. The function may still be running for them.
    pub fn unsubscribe(&self, address: u64, length: u64) {
        if let (Watched::Ranges(ranges), Some(range)) =
            (&mut *lock(&self.watched), span(address, length))
        {
            ranges.remove(range);
        }
    }

    /// Tells whether all of those bytes are watched.
    #[doc(alias = "valid")]
    pub fn is_watched(&self, address: u64, length: u64) -> bool {
        match (&*lock(&self.watched), span(address, length)) {
            (_, None) | (Watched::All, _) => true,
            (Watched::Ranges(ranges), Some(range)) => ranges.gaps(&range).next().is_none(),
        }
    }
}

fn span(address: u64, length: u64) -> Option<std::ops::Range<u64>> {
    let end = address.saturating_add(length);
    (address < end).then_some(address..end)
}

impl Notifier for Callback {
    type Fence = ();

    fn invalidate(&mut self, event: &Event) {
        let range: VaRange = event.range();
        let (first, past) = (range.start(), range.last().saturating_add(1));
        let parts: SmallVec<[std::ops::Range<u64>; 1]> = match &*lock(&self.watched) {
            Watched::All => std::iter::once(first..past).collect(),
            Watched::Ranges(ranges) => ranges
                .overlapping(&(first..past))
                .map(|part| part.start.max(first)..part.end.min(past))
                .collect(),
        };
        for part in parts {
            let length = part.end - part.start;
            (self.call)(Change { address: part.start, length, kind: event.kind() });
        }
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("watched", &self.watched).finish_non_exhaustive()
    }
}
