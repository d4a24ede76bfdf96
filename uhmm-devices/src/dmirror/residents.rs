//! Pages in place on a device.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;

use mmu_notifier::{Event, EventKind};
use rangemap::RangeSet;
use uhmm::{Access, Device, PageEntry, PageRange, Residency, SystemMemory};

use super::table::{numbers, pages_of};

/// A device on which pages are in place: its page table says which. To put pages there is to
/// [make room](ResidentTable::make_room) and to fault them in; they leave by being invalidated.
///
/// A change of rights does not move a page, nor does it that a device takes it exclusively; everything
/// else that can happen to it ends its stay.
pub struct Residents {
    left: Arc<dyn Fn(u64) + Send + Sync>,
}

/// The pages in place on the device.
pub struct ResidentTable {
    pages: RefCell<RangeSet<u64>>,
    /// How many pages more may come.
    room: Cell<u64>,
    left: Arc<dyn Fn(u64) + Send + Sync>,
}

impl Residents {
    /// Makes the device. `left` hears how many pages have left it, whenever some have; it is called in
    /// invalidations, so it must wait for nobody.
    pub fn new(left: impl Fn(u64) + Send + Sync + 'static) -> Residents {
        Residents { left: Arc::new(left) }
    }
}

impl ResidentTable {
    /// Lets so many pages more come.
    pub fn make_room(&self, pages: u64) {
        self.room.set(self.room.get() + pages);
    }

    /// Lets no page come any more, and returns how many more could have.
    pub fn take_room(&self) -> u64 {
        self.room.take()
    }

    /// Returns the pages of `range` that are in place, in ascending order.
    pub fn residents(&self, range: PageRange) -> Vec<PageRange> {
        let whole = numbers(range);
        let pages = self.pages.borrow();
        let cut = |part: &std::ops::Range<u64>| {
            pages_of(part.start.max(whole.start)..part.end.min(whole.end))
        };
        pages.overlapping(&whole).map(cut).collect()
    }

    fn leave(&self, range: PageRange) {
        let left: u64 = self.residents(range).into_iter().map(PageRange::pages).sum();
        if left > 0 {
            self.pages.borrow_mut().remove(numbers(range));
            (self.left)(left);
        }
    }
}

impl Device for Residents {
    type PageTable = ResidentTable;
    type Fence = ();

    fn page_table(&self, _: PageRange, _: &Arc<dyn SystemMemory>) -> ResidentTable {
        ResidentTable {
            pages: RefCell::default(),
            room: Cell::new(0),
            left: Arc::clone(&self.left),
        }
    }

    fn map(&self, table: &mut ResidentTable, range: PageRange, entries: &[PageEntry]) {
        let pages = table.pages.get_mut();
        for (page, entry) in range.iter().zip(entries) {
            let here = matches!(entry.residency, Residency::System(_));
            let number = page.number();
            if !here || entry.access == Access::None || pages.contains(&number) {
                continue;
            }
            if let Some(room) = table.room.get().checked_sub(1) {
                table.room.set(room);
                pages.insert(number..number + 1);
            }
        }
    }

    fn invalidate(&self, table: &mut ResidentTable, event: &Event) {
        match event.kind() {
            EventKind::ProtectionVma
            | EventKind::ProtectionPage
            | EventKind::SoftDirty
            | EventKind::Exclusive => {}
            _ => table.leave(PageRange::covering(event.range())),
        }
    }
}

impl Drop for ResidentTable {
    fn drop(&mut self) {
        self.leave(PageRange::ALL);
    }
}

impl fmt::Debug for Residents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Residents").finish_non_exhaustive()
    }
}

impl fmt::Debug for ResidentTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResidentTable").field("pages", &self.pages).finish_non_exhaustive()
    }
}
