//! The device of the kernel's HMM tests: it copies, and does nothing else.
//!
//! A [`Dmirror`] has a page table of runs, each page tagged with what the device may do there
//! ([`Tag`]). It loads and stores through the table when it is told to, and says how far it came: what
//! to do about a page that is missing is up to whoever drives it.
//!
//! A [`Residents`] is the other half of a device whose memory the CPUs reach too: pages *in place* on
//! it, which stay where they are in system memory and are only noted as the device's. It is a device
//! whose page table is that note, so a page that is unmapped, discarded or moved is forgotten by the
//! same rule that takes any translation back.
//!
//! # Concurrency
//!
//! Both tables are reached under their mirror's lock alone, which an invalidation takes as well. So a
//! copy is over before the page that it copies goes away, and one that begins later does not find it.
//! The cells in the tables are for that: [`inspect`](uhmm::MirrorHandle::inspect) hands out a shared
//! reference to the one who has the lock.

mod residents;
mod table;

pub use residents::{ResidentTable, Residents};
pub use table::{PageTable, Tag};

use std::sync::Arc;

use mmu_notifier::Event;
use uhmm::{Device, PageEntry, PageRange, SystemMemory};

/// The device. Its own memory, where it has some, must be [in place](uhmm::DeviceMemory::in_place) in
/// the system memory, with the same numbers for its frames.
#[derive(Debug, Default)]
pub struct Dmirror(());

impl Dmirror {
    /// Makes the device.
    pub fn new() -> Dmirror {
        Dmirror(())
    }
}

impl Device for Dmirror {
    type PageTable = PageTable;
    type Fence = ();

    fn page_table(&self, _: PageRange, memory: &Arc<dyn SystemMemory>) -> PageTable {
        PageTable::new(Arc::clone(memory))
    }

    fn map(&self, table: &mut PageTable, range: PageRange, entries: &[PageEntry]) {
        table.enter(range, entries);
    }

    fn invalidate(&self, table: &mut PageTable, event: &Event) {
        table.remove(PageRange::covering(event.range()));
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests;
