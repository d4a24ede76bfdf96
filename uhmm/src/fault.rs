//! Device faults: making pages usable and entering them in a device's page table.
//!
//! # The loop
//!
//! Everybody who mirrors memory needs the same loop, and it is easy to get wrong, so it is here and
//! nowhere else (acceptance X09). For each batch of pages:
//!
//! 1. begin a read section, which waits while an invalidation of the mirror is under way;
//! 2. look at the page tables, without faulting;
//! 3. if a page is not usable as asked, fault it in, with no lock held, and begin again;
//! 4. else commit: take the mirror's lock, and if no invalidation came since the section began,
//!    enter the pages; else begin again.
//!
//! # Progress
//!
//! What the budget counts is the time lost to collisions. A page that is faulted in for the first
//! time is progress, and the budget begins anew (acceptance X11). A page that has to be faulted in
//! again was taken away between the fault and the commit, which is a collision like one that the
//! commit finds. So a request ends: with its pages, with an error that names a page, or when
//! collisions alone have taken up the budget. The time that faults take, because memory has to be
//! found or a device has to copy, does not count; who wants a limit on that too sets a deadline.
//!
//! An error is only as true as what it was read from. A hole that was seen while a change was under
//! way may be the middle of one mapping's replacement by another, so an error counts only if its
//! section has not collided.
//!
//! A batch is all or nothing: its pages are entered under one lock in one step. Batches before the
//! one that failed stay entered, and pages that were faulted in stay so.

use std::time::{Duration, Instant};

use mmu_notifier::ReadBeginError;

use crate::address_space::AddressSpace;
use crate::device::Device;
use crate::entry::{Access, DeviceFrame, PageEntry, Residency};
use crate::error::FaultError;
use crate::mirror::MirrorHandle;
use crate::page::{Order, Page, PageRange};
use crate::policy::{DeviceFault, DevicePlan, Location, MigrateCause};

/// The largest piece that is entered in one step. Pieces begin at multiples of it, so no large
/// mapping up to this size is cut by the batching.
const BATCH: Order = Order::HUGE;

/// What a [`range_fault`](MirrorHandle::range_fault) is to do.
///
/// Each page is faulted in for at least the access of the whole range, and for what
/// [`per_page`](RangeFault::per_page) says of it. The request is never written to, and what comes
/// out never goes in again, so no stale answer can be taken for a question (regression 15).
///
/// ```
/// use uhmm::{Access, PageRange, RangeFault};
///
/// let range = PageRange::new(0x1000, 0x3000)?;
/// // The first page for writing, the others as they are.
/// let pages = [Access::Write, Access::None, Access::None];
/// let request = RangeFault::snapshot(range).per_page(&pages);
/// # let _ = request;
/// # Ok::<(), uhmm::PageRangeError>(())
/// ```
#[derive(Clone, Copy, Debug)]
#[doc(alias = "hmm_range")]
pub struct RangeFault<'a> {
    range: PageRange,
    default: Access,
    per_page: &'a [Access],
    mask: Access,
    budget: Duration,
    deadline: Option<Instant>,
}

/// What a [`range_fault`](MirrorHandle::range_fault) found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RangeFaulted {
    /// What was entered for each page of the range; access [`Access::None`] where nothing was.
    pub entries: Vec<PageEntry>,
    /// How many pages had to be faulted in, those counted twice that were taken away again.
    pub faulted: u64,
    /// How many collisions with invalidations there were.
    pub collisions: u32,
}

/// What [`handle_fault`](MirrorHandle::handle_fault) did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handled {
    /// The page table entry that the page of the fault got.
    pub entry: PageEntry,
    /// The pages that were served, that one among them.
    pub range: PageRange,
    /// How many pages moved to the device on the way.
    pub migrated: u64,
}

impl<'a> RangeFault<'a> {
    /// How long collisions may take up without progress, unless the request says otherwise.
    #[doc(alias = "HMM_RANGE_DEFAULT_TIMEOUT")]
    pub const BUDGET: Duration = Duration::from_millis(1000);

    const fn new(range: PageRange, default: Access) -> RangeFault<'a> {
        RangeFault {
            range,
            default,
            per_page: &[],
            mask: Access::Atomic,
            budget: RangeFault::BUDGET,
            deadline: None,
        }
    }

    /// Asks for every page to be readable.
    pub const fn read(range: PageRange) -> RangeFault<'a> {
        RangeFault::new(range, Access::Read)
    }

    /// Asks for every page to be writable.
    pub const fn write(range: PageRange) -> RangeFault<'a> {
        RangeFault::new(range, Access::Write)
    }

    /// Asks for every page to be held exclusively, or in the device's own memory.
    pub const fn atomic(range: PageRange) -> RangeFault<'a> {
        RangeFault::new(range, Access::Atomic)
    }

    /// Asks for nothing: pages are entered as they are, and no page is faulted in.
    pub const fn snapshot(range: PageRange) -> RangeFault<'a> {
        RangeFault::new(range, Access::None)
    }

    /// Asks for `pages[i]` at page `i` of the range, besides what is asked for the whole range.
    /// Pages beyond the end of the slice get what is asked for the whole range.
    #[doc(alias = "hmm_pfns")]
    #[must_use]
    pub const fn per_page(self, pages: &'a [Access]) -> RangeFault<'a> {
        RangeFault { per_page: pages, ..self }
    }

    /// Cuts what [`per_page`](RangeFault::per_page) asks for down to `mask`. Without a mask it is
    /// taken as it stands.
    #[doc(alias = "pfn_flags_mask")]
    #[must_use]
    pub const fn mask(self, mask: Access) -> RangeFault<'a> {
        RangeFault { mask, ..self }
    }

    /// Sets how long collisions may take up without progress.
    #[must_use]
    pub const fn budget(self, budget: Duration) -> RangeFault<'a> {
        RangeFault { budget, ..self }
    }

    /// Sets when to give up: asked before each look at the page tables, and in the middle of a
    /// fault.
    #[must_use]
    pub const fn deadline(self, deadline: Instant) -> RangeFault<'a> {
        RangeFault { deadline: Some(deadline), ..self }
    }

    /// Returns the range.
    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// Returns what is asked for at `page`.
    fn wanted(&self, page: Page) -> Access {
        let index = self.range.index_of(page);
        let own = index.and_then(|index| self.per_page.get(index)).copied().unwrap_or_default();
        self.default.max(own.min(self.mask))
    }
}

impl<D: Device> MirrorHandle<D> {
    /// Makes the pages of a range usable as asked, and enters them in the device's page table.
    ///
    /// On success every page was entered at a moment when it could be used as asked, and the device
    /// has heard of each change since. Large mappings are reported by their order, clipped to the
    /// range. Pages that nothing is asked for are entered as they are, if they can be used at all.
    ///
    /// Must not be called while holding anything that an invalidation of this mirror, a device's
    /// copy, or a CPU fault waits for.
    ///
    /// # Errors
    ///
    /// See [`FaultError`]. Of the batches (2 MiB, aligned) of the range, those before the page's that
    /// the error names are entered, the others not.
    #[doc(alias = "hmm_range_fault")]
    pub fn range_fault(&self, request: &RangeFault<'_>) -> Result<RangeFaulted, FaultError> {
        let space = self.enter(request.range.first())?;
        self.range_fault_in(&space, request)
    }

    fn range_fault_in(
        &self,
        space: &AddressSpace,
        request: &RangeFault<'_>,
    ) -> Result<RangeFaulted, FaultError> {
        self.check_range(request.range)?;
        let mut done = RangeFaulted::default();
        done.entries.reserve_exact(request.range.len());
        let result = request
            .range
            .blocks(BATCH)
            .try_for_each(|batch| self.fault_batch(space, request, batch, &mut done));
        let (faulted, collisions) = (done.faulted, done.collisions);
        let counters = self.mm.counters();
        counters.range_faults(1);
        counters.faulted_pages(faulted);
        counters.collisions(u64::from(collisions));
        let (space, range) = (self.mm.id(), request.range);
        match result {
            Ok(()) => {
                tracing::trace!(target: "uhmm", ?space, %range, faulted, collisions, "range fault");
                Ok(done)
            }
            Err(error) => {
                counters.failed_range_faults(1);
                tracing::debug!(target: "uhmm", ?space, %range, %error, "range fault failed");
                Err(error)
            }
        }
    }

    /// The loop. See the [module](self).
    fn fault_batch(
        &self,
        space: &AddressSpace,
        request: &RangeFault<'_>,
        batch: PageRange,
        done: &mut RangeFaulted,
    ) -> Result<(), FaultError> {
        let start = done.entries.len();
        let mut patience = Patience::new(request, batch);
        let mut runs = Vec::new();
        let mut refused = None;
        loop {
            patience.check_deadline()?;
            let section = self
                .notifier
                .read_begin_deadline(patience.until())
                .map_err(|error| patience.not_begun(error, done.collisions))?;
            done.entries.truncate(start);
            space.backend().snapshot(batch, &mut done.entries);
            let entries = &mut done.entries[start..];
            assert_eq!(entries.len(), batch.len(), "a backend's snapshot has one entry a page");
            let progress = match self.find_missing(request, batch, entries, &mut runs) {
                Ok(()) if runs.is_empty() => {
                    self.fit(batch, entries);
                    if let Ok(mut update) = section.commit() {
                        let notifier = &mut *update;
                        notifier.device.map(&mut notifier.table, batch, entries);
                        break;
                    }
                    false
                }
                Ok(()) => {
                    let since = Instant::now();
                    let result = self.fault_runs(space, request, &runs, &mut done.faulted);
                    patience.forgive(since.elapsed());
                    match result {
                        Ok(()) => patience.note_faults(&runs),
                        Err(error)
                            if error.may_be_stale()
                                && section.check_retry()
                                && !is_refused_again(&mut refused, error) =>
                        {
                            false
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(_) if section.check_retry() => false,
                Err(error) => return Err(error),
            };
            if !progress {
                done.collisions += 1;
                patience.check(done.collisions)?;
            }
        }
        self.note_mapped(&done.entries[start..]);
        Ok(())
    }

    /// Collects the runs of pages that must be faulted in, with what for.
    fn find_missing(
        &self,
        request: &RangeFault<'_>,
        batch: PageRange,
        entries: &[PageEntry],
        runs: &mut Vec<(PageRange, Access)>,
    ) -> Result<(), FaultError> {
        runs.clear();
        for (page, entry) in batch.iter().zip(entries) {
            let wanted = request.wanted(page);
            if wanted == Access::None || entry.satisfies(wanted, self.owner) {
                continue;
            }
            if entry.residency == Residency::Hole {
                return Err(FaultError::Hole { page });
            }
            // A mapping allows at most writing; to be atomic is up to us.
            if entry.allowed < wanted.min(Access::Write) {
                return Err(FaultError::Denied { page, wanted, allowed: entry.allowed });
            }
            match runs.last_mut() {
                Some((run, access))
                    if *access == wanted && run.last().checked_add(1) == Some(page) =>
                {
                    *run = PageRange::from_bounds(run.first(), page).expect("the run grows");
                }
                _ => runs.push((page.into(), wanted)),
            }
        }
        Ok(())
    }

    fn fault_runs(
        &self,
        space: &AddressSpace,
        request: &RangeFault<'_>,
        runs: &[(PageRange, Access)],
        faulted: &mut u64,
    ) -> Result<(), FaultError> {
        for &(run, access) in runs {
            let backend = space.backend();
            match access {
                Access::Atomic => {
                    backend.exclusive(run, self.owner, request.deadline)?;
                    self.mm.counters().exclusive_pages(run.pages());
                }
                _ => backend.fault(run, access, Some(self.owner), request.deadline)?,
            }
            *faulted += run.pages();
        }
        Ok(())
    }

    /// Turns what the address space says into what this device may do with it: less where the page
    /// is another's, and of a size that lies within the batch and whose pages all agree. A look is of
    /// no single moment, so a page may have been filled in since the one before it was looked at.
    fn fit(&self, batch: PageRange, entries: &mut [PageEntry]) {
        for (page, entry) in batch.iter().zip(&mut *entries) {
            entry.access = entry.access_of(self.owner);
            while !batch.covers(page.block(entry.order)) {
                entry.order = entry.order.smaller();
            }
        }
        let mut index = 0;
        while let Some(entry) = entries.get(index) {
            if entry.order == Order::PAGE {
                index += 1;
                continue;
            }
            let page = batch.first().number() + index as u64;
            let (order, pages) = (entry.order, entry.order.pages() as usize);
            let block = &entries[index..];
            if page.is_multiple_of(order.pages()) && agree(&block[..pages.min(block.len())]) {
                index += pages;
            } else {
                entries[index].order = order.smaller();
            }
        }
    }

    fn note_mapped(&self, entries: &[PageEntry]) {
        let mapped = entries.iter().filter(|entry| entry.access != Access::None).count();
        self.mm.counters().mapped_pages(mapped as u64);
        let Some(pagemap) = &self.pagemap else { return };
        let own = |entry: &PageEntry| match entry.residency {
            Residency::Device(at) if at.owner == self.owner => Some(at.frame),
            _ => None,
        };
        let own: Vec<DeviceFrame> = entries.iter().filter_map(own).collect();
        if !own.is_empty() {
            pagemap.touch(&own);
        }
    }

    /// Serves a fault of the device: asks the policies where the page should be and what else should
    /// come with it, moves what is to move, and enters the result in the device's page table.
    ///
    /// On success the device could do `access` at the page at some moment, and has heard of each
    /// change since. What could not be moved, and whatever becomes of the pages around it, is no
    /// error. A policy may make the caller wait first, for at most
    /// [`Policies::MAX_NAP`](crate::policy::Policies::MAX_NAP).
    ///
    /// # Errors
    ///
    /// As [`range_fault`](MirrorHandle::range_fault), for the page alone.
    pub fn handle_fault(&self, page: Page, access: Access) -> Result<Handled, FaultError> {
        self.handle_fault_within(page, access, None)
    }

    /// Does what [`handle_fault`](MirrorHandle::handle_fault) does, until `deadline`.
    ///
    /// # Errors
    ///
    /// As [`handle_fault`](MirrorHandle::handle_fault).
    pub fn handle_fault_deadline(
        &self,
        page: Page,
        access: Access,
        deadline: Instant,
    ) -> Result<Handled, FaultError> {
        self.handle_fault_within(page, access, Some(deadline))
    }

    fn handle_fault_within(
        &self,
        page: Page,
        access: Access,
        deadline: Option<Instant>,
    ) -> Result<Handled, FaultError> {
        self.check_range(page.into())?;
        let plan = self.plan(page, access)?;
        // Nothing is held meanwhile, so neither an end nor a death waits for a nap.
        self.nap(page, plan.nap);
        let space = self.enter(page)?;
        self.mm.counters().device_faults(1);
        let migrated = self.move_by_plan(&space, page, &plan);
        let batch = page.block(BATCH);
        let own = plan.range.intersection(batch).expect("a plan holds the page of the fault");
        let index = own.index_of(page).expect("as does its batch");
        let mut wanted = vec![Access::None; own.len()];
        wanted[index] = access;
        let request = RangeFault { deadline, ..RangeFault::snapshot(own).per_page(&wanted) };
        let entry = self.range_fault_in(&space, &request)?.entries[index];
        for other in plan.range.blocks(BATCH).filter(|other| !batch.covers(*other)) {
            let request = RangeFault { deadline, ..RangeFault::snapshot(other) };
            if self.range_fault_in(&space, &request).is_err() {
                break;
            }
        }
        let (space, range) = (self.mm.id(), plan.range);
        tracing::trace!(target: "uhmm", ?space, %page, ?access, %range, migrated, "device fault");
        Ok(Handled { entry, range, migrated })
    }

    /// Asks the policies what is to be done about a fault.
    fn plan(&self, page: Page, access: Access) -> Result<DevicePlan, FaultError> {
        let Some(pagemap) = &self.pagemap else { return Ok(DevicePlan::in_place(page)) };
        let space = self.enter(page)?;
        let order = space.snapshot(page.into())[0].order;
        let fault = DeviceFault {
            space: self.mm.id(),
            owner: self.owner,
            page,
            access,
            mirror: self.range(),
            now: pagemap.clock().now(),
            snapshot: &|range| space.snapshot(range),
        };
        Ok(pagemap.policies().device_fault(&fault, order))
    }

    fn nap(&self, page: Page, nap: Duration) {
        if let Some(pagemap) = &self.pagemap
            && !nap.is_zero()
        {
            self.mm.counters().throttles(1);
            tracing::debug!(target: "uhmm", space = ?self.mm.id(), %page, ?nap, "throttled");
            pagemap.clock().sleep(nap);
        }
    }

    /// Moves what is to move, and returns how many pages did.
    fn move_by_plan(&self, space: &AddressSpace, page: Page, plan: &DevicePlan) -> u64 {
        let Some(pagemap) = &self.pagemap else { return 0 };
        // What the device has or holds already stays where it is.
        let own = match space.snapshot(page.into())[0].residency {
            Residency::Device(at) => at.owner == self.owner,
            Residency::Exclusive { owner, .. } => owner == self.owner,
            _ => false,
        };
        if own || plan.location == Location::System {
            return 0;
        }
        let cause = MigrateCause::DeviceFault;
        space.migrate_because(plan.range, pagemap, cause).run().moved
    }
}

/// Tells whether the entries are those of one block: of one size and access, and consecutive.
fn agree(block: &[PageEntry]) -> bool {
    let first = block[0];
    (0..).zip(block).all(|(index, entry)| {
        entry.order == first.order
            && entry.access == first.access
            && entry.residency == first.residency.further(index)
    })
}

/// Notes why a page is not to be had exclusively, and tells whether that is what was said before.
/// To hold a page may take an announcement to the device itself, so each try may collide with its own.
fn is_refused_again(before: &mut Option<FaultError>, error: FaultError) -> bool {
    let refused = matches!(error, FaultError::NotExclusive { .. }).then_some(error);
    let again = refused.is_some() && *before == refused;
    *before = refused;
    again
}

/// How long collisions may go on.
struct Patience {
    batch: PageRange,
    budget: Duration,
    deadline: Option<Instant>,
    /// When the time lost to collisions began, faults that took long taken out.
    since: Instant,
    /// The pages of the batch that have been faulted in.
    faulted: Vec<bool>,
}

impl Patience {
    fn new(request: &RangeFault<'_>, batch: PageRange) -> Patience {
        let (budget, deadline) = (request.budget, request.deadline);
        Patience { batch, budget, deadline, since: Instant::now(), faulted: Vec::new() }
    }

    /// Returns until when a collision may be waited out.
    fn until(&self) -> Instant {
        // The end of time would not fit an instant.
        const LONG: Duration = Duration::from_secs(365 * 24 * 60 * 60);
        let until = self.since + self.budget.min(LONG);
        self.deadline.map_or(until, |deadline| deadline.min(until))
    }

    /// Takes time out that was not lost to a collision.
    fn forgive(&mut self, time: Duration) {
        self.since += time;
    }

    /// Notes that pages were faulted in, and says whether that was progress.
    fn note_faults(&mut self, runs: &[(PageRange, Access)]) -> bool {
        self.faulted.resize(self.batch.len(), false);
        let mut progress = false;
        for page in runs.iter().flat_map(|(run, _)| run.iter()) {
            let index = self.batch.index_of(page).expect("runs are cut from the batch");
            progress |= !std::mem::replace(&mut self.faulted[index], true);
        }
        if progress {
            self.since = Instant::now();
        }
        progress
    }

    fn check_deadline(&self) -> Result<(), FaultError> {
        match self.deadline {
            Some(deadline) if deadline <= Instant::now() => {
                Err(FaultError::TimedOut { page: self.batch.first() })
            }
            _ => Ok(()),
        }
    }

    fn check(&self, collisions: u32) -> Result<(), FaultError> {
        self.check_deadline()?;
        if self.since.elapsed() >= self.budget {
            return Err(FaultError::Collided { page: self.batch.first(), collisions });
        }
        Ok(())
    }

    fn not_begun(&self, error: ReadBeginError, collisions: u32) -> FaultError {
        let page = self.batch.first();
        match error {
            ReadBeginError::Released(_) => FaultError::Released,
            ReadBeginError::SelfWait(_) => FaultError::SelfWait { page },
            // It waited for an invalidation, which is a collision.
            _ => match self.check_deadline() {
                Err(error) => error,
                Ok(()) => FaultError::Collided { page, collisions: collisions + 1 },
            },
        }
    }
}
