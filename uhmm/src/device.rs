//! What the author of a device implements.

use std::sync::Arc;

use mmu_notifier::{Event, Fence, WouldBlock};

use crate::backend::SystemMemory;
use crate::entry::{DeviceFrame, Frame, PageEntry};
use crate::page::{Order, PageRange};

/// A device that mirrors address spaces: how its page tables are made, filled and emptied.
///
/// There is no lock to take and no sequence to check in any of this (acceptance E02): the
/// [`Mirror`](crate::Mirror) owns the page table, and each call below is made under its lock, or
/// when nobody else can reach the table any more.
pub trait Device: Send + Sync + 'static {
    /// The translations of one mirror.
    type PageTable: Send + 'static;

    /// What is left to wait for once the device was told to stop; `()` where it stops at once. See
    /// [`Fence`].
    type Fence: Fence;

    /// Makes an empty page table for a mirror of `range`, whose pages in system memory are reached
    /// through `memory`.
    fn page_table(&self, range: PageRange, memory: &Arc<dyn SystemMemory>) -> Self::PageTable;

    /// Enters translations for `range`: `entries[i]` for its page `i`.
    ///
    /// Each entry is true now and until the next [`invalidate`](Device::invalidate) of the page,
    /// and replaces what the table holds for the page. An entry whose access is
    /// [`Access::None`](crate::Access::None) is to be left out or taken out. `entry.order` may be
    /// used for one large translation: the block lies within `range`.
    ///
    /// Runs under the mirror's lock: it must not announce, fault, migrate, or wait for anybody who
    /// does.
    fn map(&self, table: &mut Self::PageTable, range: PageRange, entries: &[PageEntry]);

    /// Makes the device stop using `event.range()`. When the returned fence is over, no access
    /// through a translation that was in the table is under way or will come.
    ///
    /// Same rules as [`map`](Device::map). It cannot fail, must allocate nothing that can fail, and
    /// a panic in it ends the process.
    fn invalidate(&self, table: &mut Self::PageTable, event: &Event) -> Self::Fence;

    /// Does what [`invalidate`](Device::invalidate) does without sleeping, or refuses and changes
    /// nothing: for a change that gives up rather than wait. The default refuses.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] to refuse.
    fn try_invalidate(
        &self,
        table: &mut Self::PageTable,
        event: &Event,
    ) -> Result<Self::Fence, WouldBlock> {
        let _ = (table, event);
        Err(WouldBlock)
    }

    /// Ends the mirror because the address space died: the last call, with no lock held. The
    /// device has stopped using everything, and the mirror's operations have ended (acceptance
    /// D11).
    fn release(&self, table: Self::PageTable) {
        drop(table);
    }
}

/// The memory of a device: where pages can be moved to.
///
/// Registered as a [`DevicePagemap`](crate::DevicePagemap), which keeps the accounts, so an
/// implementation is an allocator and a copy engine. Every step may fail; a failure loses nothing,
/// since a page stays where it was until its copy is done (invariant *Whole*).
pub trait DeviceMemory: Send + Sync + 'static {
    /// Returns how much memory there is, in pages. Does not change.
    fn capacity(&self) -> u64;

    /// Allocates a block of `order`, whose contents may be anything: the first job of a fresh block
    /// copies or clears all of it.
    ///
    /// # Errors
    ///
    /// [`OutOfDeviceMemory`]: the caller evicts, asks for smaller blocks, or leaves pages where
    /// they are.
    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory>;

    /// Takes over the block of system memory at `from`, which an isolation has, as a block of this
    /// memory: instead of a copy, where the device's memory *is* `memory`. The default takes over
    /// nothing.
    ///
    /// The block that is returned has the contents already, is [in place](DeviceMemory::in_place) at
    /// `from`, and counts against the capacity like one that was allocated. The isolation has the
    /// contents until it is committed: until then the device stores nothing to the block, and
    /// [`free`](DeviceMemory::free) of it ends the adoption and nothing else. From the commit on the
    /// block is the memory at `from`, and `free` gives that back to where system memory comes from.
    /// So only the backend whose memory it is can make a memory that adopts; others wrap one.
    ///
    /// `None` says that the block is to be allocated and copied.
    fn adopt(&self, memory: &dyn SystemMemory, from: Frame, order: Order) -> Option<DeviceFrame> {
        let _ = (memory, from, order);
        None
    }

    /// Returns which frame of `memory` this page of the device is, if it is one: what was
    /// [adopted](DeviceMemory::adopt), or allocated where `memory` has it. The pages of a block are
    /// consecutive there too. The default has nothing in system memory.
    ///
    /// A page that comes home to the frame that it is in place at is not copied. Called under locks
    /// of a backend: it waits for nobody.
    fn in_place(&self, memory: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        let _ = (memory, frame);
        None
    }

    /// Tells whether [`copy`](DeviceMemory::copy) waits for nobody, and takes a few microseconds for
    /// each page. Does not change. A backend then brings pages home on the thread that all CPU faults
    /// wait for, which is quicker than to wake another. The default says no.
    fn is_prompt(&self) -> bool {
        false
    }

    /// Takes a block back. The device uses no translation to it any more.
    ///
    /// A block may come back in smaller pieces than it was allocated or adopted in. Called from drop
    /// handlers: it must not fail, fault or migrate.
    fn free(&self, frame: DeviceFrame, order: Order);

    /// Does `jobs`, and calls [`CopyJob::complete`] on each that is done. One that is left is
    /// a failed copy. When this returns, or panics, the device has finished with both sides of every
    /// job: they may be freed at once.
    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]);
}

/// The device has no free block of the order asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device has no free block of {} pages", order.pages())]
pub struct OutOfDeviceMemory {
    /// What was asked for.
    pub order: Order,
}

/// One block to be copied or cleared by a device's copy engine.
#[derive(Debug)]
pub struct CopyJob {
    kind: CopyKind,
    order: Order,
    done: bool,
}

/// What is copied where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyKind {
    /// From system memory to the device.
    In {
        /// The source.
        from: Frame,
        /// The destination.
        to: DeviceFrame,
    },
    /// From the device to system memory.
    Out {
        /// The source.
        from: DeviceFrame,
        /// The destination.
        to: Frame,
    },
    /// Zeroes to the device.
    Clear {
        /// The destination.
        to: DeviceFrame,
    },
}

impl CopyJob {
    /// Makes a job that is not done.
    pub fn new(kind: CopyKind, order: Order) -> CopyJob {
        CopyJob { kind, order, done: false }
    }

    /// Returns what is to be copied where.
    pub fn kind(&self) -> CopyKind {
        self.kind
    }

    /// Returns how large the block is.
    pub fn order(&self) -> Order {
        self.order
    }

    /// Says that every byte is where it was to go, and the device has finished with both sides.
    pub fn complete(&mut self) {
        self.done = true;
    }

    /// Tells whether the job is done.
    pub fn is_complete(&self) -> bool {
        self.done
    }
}
