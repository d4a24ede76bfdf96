//! Memory of our own that pages pass through: staging, where pages wait that were taken from the
//! program, and buffers, where those are put together that come from a device.
//!
//! # Staging
//!
//! Staging is registered on the same userfaultfd as what pages are moved out of. That is what makes
//! moving them out safe: the kernel refuses with `EAGAIN` to fill a registered range while an event
//! is unread, so no page leaves a mapping that an event not yet seen has replaced
//! (linux-mechanisms: EAGAIN is the retry gate). It has a price. A page of staging that holds
//! nothing must not be touched by a thread that serves faults, since that touch is a fault; so for
//! each page there is a bit that says whether it may hold something, and whoever reads looks at the
//! bit first. And to drop what a page holds by `MADV_DONTNEED` would raise an event, which is why
//! the range is unregistered for that moment: it belongs to one block that nobody else knows.
//!
//! Neither region is inherited by a fork: a child that shared its pages would keep them from being
//! moved back (`EBUSY`).
//!
//! That takes three calls, and each stops the program's other threads for a moment. So blocks of
//! staging are not emptied one by one: they wait until there are some pages of them, and what lies
//! side by side then is emptied together ([`Pool::UNCLEAN`]).
//!
//! # Locks
//!
//! One lock for each buddy and one for the blocks that wait, never both; held for a few set operations
//! and never across a call to the kernel.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rangemap::RangeSet;
use rustix::io::Errno;
use uhmm::{Frame, Order, PAGE_SIZE, Page, PageRange};

use super::bits::PageBits;
use super::buddy::Buddy;
use super::kernel::Kernel;
use super::state::{numbers, range_of};
use super::{fatal, lock};
use crate::sys::region::{Region, RegionOptions};
use crate::sys::userfaultfd::Modes;

/// Staging, or buffers. See the [module](self).
pub(super) struct Pool {
    region: Region,
    buddy: Mutex<Buddy>,
    /// How many pages could not be made empty, and are not given out any more.
    lost: AtomicU64,
    /// Pages that nobody has, and that are to be emptied before they are given out.
    unclean: Mutex<Unclean>,
    kind: Kind,
}

#[derive(Default)]
struct Unclean {
    pages: RangeSet<u64>,
    count: u64,
}

enum Kind {
    Staging {
        kernel: Arc<Kernel>,
        /// Which pages may hold something.
        occupied: PageBits,
        /// The first pages of blocks that a device has adopted while an isolation still holds them.
        adopting: PageBits,
    },
    Buffers,
}

/// A block of a pool. Owning it is having it allocated; its drop drops what it holds.
pub(super) struct PoolBlock {
    /// Nothing once it was given away.
    pool: Option<Arc<Pool>>,
    first: Page,
    order: Order,
}

impl Pool {
    /// Reserves staging of at most `bytes`, and registers it.
    pub(super) fn staging(
        bytes: usize,
        at_least: usize,
        kernel: &Arc<Kernel>,
    ) -> Result<Arc<Pool>, Errno> {
        let options =
            RegionOptions { dont_fork: true, huge: Some(false), grows: true, ..Default::default() };
        let region = Region::reserve_at_most(bytes, at_least, options)?;
        kernel.register(region.range(), Modes::MISSING)?;
        let [occupied, adopting] = [(); 2].map(|()| PageBits::new(region.range()));
        let kernel = Arc::clone(kernel);
        Ok(Pool::new(region, Kind::Staging { kernel, occupied, adopting }))
    }

    /// Reserves buffers of at most `bytes`.
    pub(super) fn buffers(bytes: usize, at_least: usize) -> Result<Arc<Pool>, Errno> {
        let options =
            RegionOptions { dont_fork: true, huge: Some(true), grows: true, ..Default::default() };
        let region = Region::reserve_at_most(bytes, at_least, options)?;
        Ok(Pool::new(region, Kind::Buffers))
    }

    fn new(region: Region, kind: Kind) -> Arc<Pool> {
        // The first block is never given out.
        let first =
            region.range().first().checked_add(Order::HUGE.pages()).expect("there are more");
        let given_out = PageRange::from_bounds(first, region.range().last()).expect("as above");
        let buddy = Mutex::new(Buddy::new(given_out));
        let unclean = Mutex::default();
        Arc::new(Pool { region, buddy, lost: AtomicU64::new(0), unclean, kind })
    }

    /// Returns where it is.
    pub(super) fn range(&self) -> PageRange {
        self.region.range()
    }

    /// Returns where no page ever is, for as many pages as a block has.
    pub(super) fn nothing(&self) -> Page {
        self.range().first()
    }

    /// Tells whether this is staging.
    pub(super) fn is_staging(&self) -> bool {
        matches!(self.kind, Kind::Staging { .. })
    }

    /// Returns how many pages are in use, and how many are lost.
    pub(super) fn used(&self) -> (u64, u64) {
        // In this order, so that what waits is never counted as in use, or less than nothing.
        let unclean = lock(&self.unclean).count;
        let used = lock(&self.buddy).used().saturating_sub(unclean);
        // Relaxed: as in `lose`.
        let lost = self.lost.load(Ordering::Relaxed);
        (used.saturating_sub(lost), lost)
    }

    /// Takes a block.
    pub(super) fn allocate(self: &Arc<Self>, order: Order) -> Option<PoolBlock> {
        let mut first = lock(&self.buddy).allocate(order);
        if first.is_none() {
            self.clean();
            first = lock(&self.buddy).allocate(order);
        }
        let first = first?;
        match self.prepare(first.block(order)) {
            Ok(()) => Some(self.own(first, order)),
            // Nobody is told here: the lock of the state may be held.
            Err(_) => {
                lock(&self.buddy).free(first, order);
                None
            }
        }
    }

    /// Makes a block that is to be given out one that can be accessed, and that holds nothing.
    fn prepare(&self, range: PageRange) -> Result<(), Errno> {
        self.region.reach(range)?;
        // `mlockall(MCL_CURRENT)` of the program has filled ours with zeroes.
        match self.is_staging() {
            true => self.drop_contents(range),
            false => Ok(()),
        }
    }

    /// Makes it memory that is not locked.
    pub(super) fn unlock(&self) -> Result<(), Errno> {
        self.region.unlock()
    }

    /// Becomes the owner of a block that was [leaked](PoolBlock::leak).
    pub(super) fn own(self: &Arc<Self>, first: Page, order: Order) -> PoolBlock {
        PoolBlock { pool: Some(Arc::clone(self)), first, order }
    }

    /// Notes that pages may hold something from now on.
    pub(super) fn fill(&self, range: PageRange) {
        if let Kind::Staging { occupied, .. } = &self.kind {
            occupied.set(range);
        }
    }

    /// Notes that pages hold nothing any more.
    pub(super) fn empty(&self, range: PageRange) {
        if let Kind::Staging { occupied, .. } = &self.kind {
            occupied.clear(range);
        }
    }

    /// Tells whether any of the pages may hold something.
    pub(super) fn is_occupied(&self, range: PageRange) -> bool {
        match &self.kind {
            Kind::Staging { occupied, .. } => occupied.any(range),
            Kind::Buffers => true,
        }
    }

    /// Tells whether the first page may hold something, and of how many pages from there on that is
    /// as true.
    pub(super) fn occupied_run(&self, range: PageRange) -> (bool, u64) {
        match &self.kind {
            Kind::Staging { occupied, .. } => occupied.run(range),
            Kind::Buffers => (true, range.pages()),
        }
    }

    /// Copies out of the block that begins at `frame`. A page that holds nothing is zeroes, and is
    /// not touched.
    pub(super) fn read(&self, page: Page, offset: usize, bytes: &mut [u8]) {
        if let Kind::Buffers = self.kind {
            return self.region.read(page, offset, bytes);
        }
        let (mut page, mut offset, mut rest) = (within(page, offset), offset % PAGE_SIZE, bytes);
        while !rest.is_empty() {
            let (part, others) = rest.split_at_mut(rest.len().min(PAGE_SIZE - offset));
            match self.is_occupied(page.into()) {
                true => self.region.read(page, offset, part),
                false => part.fill(0),
            }
            (page, offset, rest) = (within(page, PAGE_SIZE), 0, others);
        }
    }

    /// Copies into the block that begins at `page`.
    pub(super) fn write(&self, page: Page, offset: usize, bytes: &[u8]) {
        self.region.write(page, offset, bytes);
    }

    /// Replaces a word in one step.
    pub(super) fn fetch_update(
        &self,
        page: Page,
        offset: usize,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> u64 {
        self.region.fetch_update(page, offset, update)
    }

    /// Says that a device takes a block over that an isolation still holds.
    pub(super) fn begin_adoption(&self, first: Page) {
        if let Kind::Staging { adopting, .. } = &self.kind {
            adopting.set(first.into());
        }
    }

    /// Ends what [`begin_adoption`](Pool::begin_adoption) began, and tells whether it was under way.
    pub(super) fn end_adoption(&self, first: Page) -> bool {
        match &self.kind {
            Kind::Staging { adopting, .. } => adopting.clear(first.into()),
            Kind::Buffers => false,
        }
    }

    /// Drops what a block holds.
    fn drop_contents(&self, range: PageRange) -> Result<(), Errno> {
        match &self.kind {
            Kind::Staging { kernel, .. } => {
                if !self.is_occupied(range) {
                    return Ok(());
                }
                if !self.region.is_here() {
                    // A child has no staging, and what it asked of the kernel its parent would get.
                    return Ok(());
                }
                if kernel.uffd().is_retired() {
                    self.region.zap(range)?;
                } else {
                    kernel.unregister(range)?;
                    let zapped = self.region.zap(range);
                    kernel.register(range, Modes::MISSING)?;
                    zapped?;
                }
                self.empty(range);
            }
            // Small ones stay warm: the next page to come home is written over this one.
            Kind::Buffers if range.pages() <= Pool::WARM => {}
            Kind::Buffers => self.region.zap(range)?,
        }
        Ok(())
    }

    /// Takes a block back that nobody has any more.
    fn take_back(&self, block: PageRange) {
        if let Kind::Staging { .. } = self.kind
            && self.is_occupied(block)
        {
            let count = {
                let mut unclean = lock(&self.unclean);
                unclean.pages.insert(numbers(block));
                unclean.count += block.pages();
                unclean.count
            };
            if count >= Pool::UNCLEAN {
                self.clean();
            }
            return;
        }
        let emptied = self.drop_contents(block);
        self.free(block, emptied);
    }

    /// Empties what waits for it.
    fn clean(&self) {
        let Unclean { pages, .. } = std::mem::take(&mut *lock(&self.unclean));
        for run in pages {
            let run = range_of(run);
            let emptied = self.drop_contents(run);
            self.free(run, emptied);
        }
    }

    /// Lets pages be given out again, if they could be emptied.
    fn free(&self, range: PageRange, emptied: Result<(), Errno>) {
        match emptied {
            Ok(()) => {
                let mut buddy = lock(&self.buddy);
                aligned_blocks(range).for_each(|(first, order)| buddy.free(first, order));
            }
            // They are not given out again: nobody knows what a touch of them would do.
            Err(_) => self.lose(range.pages()),
        }
    }

    /// Counts pages that are not given out any more.
    fn lose(&self, pages: u64) {
        // Relaxed: a number by itself.
        self.lost.fetch_add(pages, Ordering::Relaxed);
    }

    /// How many pages of staging may wait to be emptied.
    const UNCLEAN: u64 = 32;

    /// How many pages of a buffer may keep their memory for the next to use it.
    const WARM: u64 = 8;
}

impl Pool {
    /// Ends the registration of staging, so that it may be unmapped without an event that nobody
    /// reads.
    pub(super) fn release(&self) {
        if let Kind::Staging { kernel, .. } = &self.kind
            && self.region.is_here()
            && !kernel.uffd().is_retired()
            && let Err(error) = kernel.uffd().unregister(self.range())
        {
            fatal("staging cannot be given up", error);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.release();
    }
}

/// Returns the page that lies `offset` bytes from the start of `page`.
fn within(page: Page, offset: usize) -> Page {
    page.checked_add((offset / PAGE_SIZE) as u64).expect("a block lies in its region")
}

impl PoolBlock {
    /// Returns its pages.
    pub(super) fn range(&self) -> PageRange {
        self.first.block(self.order)
    }

    /// Returns its first page.
    pub(super) fn first(&self) -> Page {
        self.first
    }

    /// Returns its first page as a frame of system memory.
    pub(super) fn frame(&self) -> Frame {
        Frame(self.first.number())
    }

    /// Returns its size.
    pub(super) fn order(&self) -> Order {
        self.order
    }

    /// Returns the pool that it is of.
    pub(super) fn pool_of(&self) -> &Arc<Pool> {
        self.pool.as_ref().expect("a block that was given away is gone")
    }

    /// Gives the block away: somebody else will [own](Pool::own) it.
    pub(super) fn leak(mut self) {
        self.pool = None;
    }

    /// Cuts the block into those parts, each a page and an order within it, and frees the rest.
    pub(super) fn cut(mut self, parts: &[(Page, Order)]) -> Vec<PoolBlock> {
        let range = self.range();
        let pool = self.pool.take().expect("a block that was given away is gone");
        let mut blocks = Vec::with_capacity(parts.len());
        let mut next = range.first().number();
        let free = |from: u64, to: u64| {
            let first = Page::new(from).expect("within the region");
            if let Ok(rest) = PageRange::from_pages(first, to - from) {
                aligned_blocks(rest).for_each(|(first, order)| drop(pool.own(first, order)));
            }
        };
        for &(first, order) in parts {
            free(next, first.number());
            blocks.push(pool.own(first, order));
            next = first.number() + order.pages();
        }
        free(next, range.last().number() + 1);
        blocks
    }
}

impl Drop for PoolBlock {
    fn drop(&mut self) {
        let Some(pool) = self.pool.take() else { return };
        pool.take_back(self.range());
    }
}

impl fmt::Debug for PoolBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block of {}", self.range())
    }
}

/// Cuts a range into blocks as large as they can be that begin at multiples of their size, and are
/// no larger than a huge page.
pub(super) fn aligned_blocks(range: PageRange) -> impl Iterator<Item = (Page, Order)> + Clone {
    let (mut at, end) = (range.first().number(), range.last().number() + 1);
    std::iter::from_fn(move || {
        let first = Page::new(at).filter(|_| at < end)?;
        let aligned = at.trailing_zeros().min(u32::from(Order::HUGE.get()));
        let fits = (end - at).ilog2();
        let order = Order::new(aligned.min(fits) as u8).expect("no larger than a huge page");
        at += order.pages();
        Some((first, order))
    })
}
