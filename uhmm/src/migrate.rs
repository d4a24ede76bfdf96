//! Moving pages: to a device, and home.
//!
//! # How no page is lost
//!
//! A migration has three steps, each a type, and one value that every page hangs on: the
//! [`Isolation`].
//!
//! 1. **Isolate.** The backend announces the range, takes the pages out of every page table, and
//!    ends the announcement. From here nobody reaches them: a CPU that touches one sleeps, a device
//!    that faults on one sleeps. Their contents stay where they were.
//! 2. **Copy.** Each page gets a destination of its own and is copied there. Nothing is freed. A page
//!    for which there is no room, or whose copy fails, is marked to go back.
//! 3. **Commit.** One call to the backend says of each page where it is now, and frees the other
//!    place. It cannot fail.
//!
//! Whatever is dropped before the third step, also by a panic, drops the isolation, which puts every
//! page back where its contents never left; the destinations are freed with the blocks that own
//! them. So there is one current copy at every instant (invariant *Whole*), and it is the one that
//! the page tables lead to, or would lead to once the page is out of transit.
//!
//! No lock is held across these steps, by anybody (acceptance X09). What may change meanwhile is
//! the mapping: pages can be unmapped, moved and shared while they are in transit, and the commit
//! finds out.
//!
//! # A full device
//!
//! Making room moves other pages home, by the same three steps. It takes only what it gets
//! without waiting, so two devices, or two migrations on one, that make room at the same time cannot
//! wait for each other.

use std::marker::PhantomData;
use std::sync::Arc;

use mmu_notifier::Owner;

use crate::address_space::{AddressSpace, SpaceId};
use crate::backend::{
    Backend, CannotSplit, Committed, IsolatedPage, Isolation, Placement, ReverseMap, Select, Source,
};
use crate::device::{CopyJob, CopyKind};
use crate::entry::DeviceLocation;
use crate::error::{FaultError, StayReason, Stayed};
use crate::page::{Order, Page, PageRange};
use crate::pagemap::{DeviceBlock, DevicePagemap, StillResident};
use crate::policy::{Candidate, CpuFault, Location, MigrateCause, Moved};

/// How often a migration makes room for a block before the page stays.
const EVICTIONS: u32 = 2;

/// How many pages an eviction has in transit at a time, as long as no single block is larger.
const EVICTED_AT_ONCE: u64 = Order::HUGE.pages();

/// Pages on their way, at one of two steps: [`Isolated`], then [`Copied`].
///
/// Dropping it at any step puts every page back where it was. While it exists, whoever touches
/// one of the pages sleeps, so it should not exist for long, and must not be forgotten. The thread
/// that holds it must not touch them; it stays on that thread, so that a backend can tell. It keeps
/// the address space alive (acceptance D02).
#[must_use = "dropping a migration puts every page back"]
#[doc(alias = "migrate_vma")]
pub struct Migration<P: Step> {
    // The isolation ends before the user reference does: its end is an operation on the space.
    isolation: Box<dyn Isolation>,
    to: Destination,
    cause: MigrateCause,
    space: Option<SpaceId>,
    placements: Vec<Placement>,
    failures: Vec<Stayed>,
    user: Option<AddressSpace>,
    step: PhantomData<(P, *const ())>,
}

/// A step of a [`Migration`]. Implemented by [`Isolated`] and [`Copied`] alone.
pub trait Step: private::Sealed {}

/// The pages are taken out of all page tables, and their contents are where they were.
#[derive(Debug)]
pub enum Isolated {}

/// The contents are at both places.
#[derive(Debug)]
pub enum Copied {}

mod private {
    pub trait Sealed {}
    impl Sealed for super::Isolated {}
    impl Sealed for super::Copied {}
}
impl Step for Isolated {}
impl Step for Copied {}

#[derive(Clone)]
enum Destination {
    Device(Arc<DevicePagemap>),
    System,
}

/// Copies, each with the index of its page.
type Jobs = Vec<(usize, CopyJob)>;

/// What became of the pages of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrateReport {
    /// How many pages are now where they were to go.
    pub moved: u64,
    /// How many of those had no contents and were not copied.
    pub without_copy: u64,
    /// The pages that were asked for and did not move, each with the reason, by address.
    pub stayed: Vec<Stayed>,
}

impl MigrateReport {
    /// Tells whether each page that was asked for is where it was to go, by this migration or from
    /// before.
    pub fn is_complete(&self) -> bool {
        self.stayed.iter().all(|stayed| stayed.reason == StayReason::AlreadyThere)
    }

    /// Returns why `page` stayed, if it did.
    pub fn reason(&self, page: Page) -> Option<StayReason> {
        self.stayed.iter().find(|stayed| stayed.pages.contains(page)).map(|stayed| stayed.reason)
    }
}

impl AddressSpace {
    /// Begins to move the pages of `range` to a device, as far as they can be moved.
    ///
    /// Pages on another device come home first: from here they move on (device to device copies do
    /// not exist). On return no CPU and no device reaches the pages that were
    /// [taken](Migration::pages).
    ///
    /// Large pages move whole, if the device has room for them whole. Pages that were never touched
    /// move without being copied.
    ///
    /// ```no_run
    /// # fn f(space: uhmm::AddressSpace, range: uhmm::PageRange, gpu: std::sync::Arc<uhmm::DevicePagemap>) {
    /// let report = space.migrate(range, &gpu).copy().commit();
    /// for stayed in &report.stayed {
    ///     println!("{}: {}", stayed.pages, stayed.reason);
    /// }
    /// # }
    /// ```
    pub fn migrate(&self, range: PageRange, to: &Arc<DevicePagemap>) -> Migration<Isolated> {
        self.migrate_because(range, to, MigrateCause::Request)
    }

    pub(crate) fn migrate_because(
        &self,
        range: PageRange,
        to: &Arc<DevicePagemap>,
        cause: MigrateCause,
    ) -> Migration<Isolated> {
        let mut failures = self.fetch_home(range, to.owner(), MigrateCause::PeerFault).stayed;
        let isolation = self.backend().isolate(range, Select::System { to: to.owner() });
        // What could not be had then may have been had now.
        failures.retain(|failure| {
            let taken = |page: &IsolatedPage| page.page.block(page.order).overlaps(failure.pages);
            !isolation.pages().iter().any(taken)
        });
        let migration = self.begin(isolation, Destination::Device(Arc::clone(to)), cause);
        Migration { failures, ..migration }
    }

    /// Moves the pages of `range` that are on a device of any owner to system memory. The others are
    /// not mentioned in the report.
    pub fn migrate_home(&self, range: PageRange) -> MigrateReport {
        // No device has an owner made just now, so each is foreign to it.
        self.fetch_home(range, Owner::new(), MigrateCause::Request)
    }

    /// Moves what is on other devices than that of `owner` home, and reports of those pages alone.
    fn fetch_home(&self, range: PageRange, owner: Owner, cause: MigrateCause) -> MigrateReport {
        let isolation = self.backend().isolate(range, Select::Foreign(owner));
        let mut report = self.begin(isolation, Destination::System, cause).run();
        let others = [StayReason::Elsewhere, StayReason::Hole];
        report.stayed.retain(|stayed| !others.contains(&stayed.reason));
        report
    }

    fn begin(
        &self,
        isolation: Box<dyn Isolation>,
        to: Destination,
        cause: MigrateCause,
    ) -> Migration<Isolated> {
        let migration = Migration::new(isolation, to, cause, Some(self.mm().id()));
        Migration { user: Some(self.clone()), ..migration }
    }
}

impl<P: Step> Migration<P> {
    /// Returns how many pages are on their way.
    pub fn pages(&self) -> u64 {
        self.isolation.pages().iter().map(|page| page.order.pages()).sum()
    }

    /// Returns the pages that were asked for and could not be taken, with the reason for each.
    pub fn stayed(&self) -> &[Stayed] {
        self.isolation.stayed()
    }

    fn range_of(&self, index: usize) -> PageRange {
        let page = &self.isolation.pages()[index];
        page.page.block(page.order)
    }

    fn stay(&mut self, index: usize, reason: StayReason) {
        let pages = self.range_of(index);
        tracing::debug!(target: "uhmm", %pages, %reason, cause = ?self.cause, "stays");
        self.failures.push(Stayed { pages, reason });
    }
}

impl Migration<Isolated> {
    fn new(
        isolation: Box<dyn Isolation>,
        to: Destination,
        cause: MigrateCause,
        space: Option<SpaceId>,
    ) -> Migration<Isolated> {
        Migration {
            isolation,
            to,
            cause,
            space,
            placements: Vec::new(),
            failures: Vec::new(),
            user: None,
            step: PhantomData,
        }
    }

    /// Finds a place for each page and copies it there. What finds no place, or cannot be copied,
    /// will stay; nothing is lost and nothing is freed.
    pub fn copy(mut self) -> Migration<Copied> {
        match self.to.clone() {
            Destination::Device(pagemap) => self.copy_to(&pagemap),
            Destination::System => self.copy_home(),
        }
        Migration {
            isolation: self.isolation,
            to: self.to,
            cause: self.cause,
            space: self.space,
            placements: self.placements,
            failures: self.failures,
            user: self.user,
            step: PhantomData,
        }
    }

    /// Copies and commits.
    pub fn run(self) -> MigrateReport {
        self.copy().commit()
    }

    fn copy_to(&mut self, to: &Arc<DevicePagemap>) {
        to.make_room(self.pages());
        let mut jobs = Vec::with_capacity(self.isolation.pages().len());
        // A device that had no single page left has none for the next either.
        let mut full = false;
        // Splitting makes the list longer as we go.
        while let Some(&page) = self.isolation.pages().get(self.placements.len()) {
            let index = self.placements.len();
            match to.allocate(page.order, full) {
                Some(block) => {
                    let to = block.location().frame;
                    let kind = match page.source {
                        Source::Zero => CopyKind::Clear { to },
                        Source::System(from) => CopyKind::In { from, to },
                        Source::Device(_) => unreachable!("only pages in system memory were taken"),
                    };
                    jobs.push((index, CopyJob::new(kind, page.order)));
                    self.placements.push(Placement::Device(block));
                }
                None if page.order > Order::PAGE && !full => match self.isolation.split(index) {
                    Ok(()) => to.counters.splits(1),
                    Err(CannotSplit) => self.put_back(index, StayReason::LargePage),
                },
                None => {
                    full = true;
                    self.put_back(index, StayReason::OutOfDeviceMemory);
                }
            }
        }
        self.do_jobs(to, jobs);
    }

    fn copy_home(&mut self) {
        let mut jobs: Vec<(Arc<DevicePagemap>, Jobs)> = Vec::new();
        while let Some(&page) = self.isolation.pages().get(self.placements.len()) {
            let index = self.placements.len();
            let Some((pagemap, from)) = self.place_of(index) else {
                self.put_back(index, StayReason::Elsewhere);
                continue;
            };
            match self.isolation.allocate_home(index) {
                Ok(to) => {
                    let job = CopyJob::new(CopyKind::Out { from: from.frame, to }, page.order);
                    match jobs.iter_mut().find(|(of, _)| Arc::ptr_eq(of, &pagemap)) {
                        Some((_, jobs)) => jobs.push((index, job)),
                        None => jobs.push((pagemap, vec![(index, job)])),
                    }
                    self.placements.push(Placement::Home);
                }
                Err(_) if page.order > Order::PAGE && self.isolation.split(index).is_ok() => {
                    pagemap.counters.splits(1);
                }
                Err(_) => self.put_back(index, StayReason::OutOfSystemMemory),
            }
        }
        for (pagemap, jobs) in jobs {
            self.do_jobs(&pagemap, jobs);
        }
    }

    fn place_of(&self, index: usize) -> Option<(Arc<DevicePagemap>, DeviceLocation)> {
        let block = self.isolation.block(index)?;
        Some((Arc::clone(block.pagemap()), block.location()))
    }

    fn put_back(&mut self, index: usize, reason: StayReason) {
        self.stay(index, reason);
        self.placements.push(Placement::Back);
    }

    /// Has the device copy, and marks the pages whose copies failed to go back.
    fn do_jobs(&mut self, pagemap: &DevicePagemap, jobs: Jobs) {
        if jobs.is_empty() {
            return;
        }
        let (indexes, mut jobs): (Vec<_>, Vec<_>) = jobs.into_iter().unzip();
        pagemap.memory().copy(&*self.isolation.memory(), &mut jobs);
        for (index, job) in indexes.into_iter().zip(jobs) {
            if !job.is_complete() {
                pagemap.counters.failed_copies(1);
                self.stay(index, StayReason::CopyFailed);
                self.placements[index] = Placement::Back;
            }
        }
    }
}

impl Migration<Copied> {
    /// Makes the new places the pages' only ones. Cannot fail. On return every page can be used
    /// again, wherever it is.
    pub fn commit(mut self) -> MigrateReport {
        let reverse_map = self.isolation.reverse_map();
        // Before the commit: from then on somebody may free the block, and that takes it out again.
        for placement in &self.placements {
            if let Placement::Device(block) = placement {
                block.settle(&reverse_map);
            }
        }
        let mut report =
            MigrateReport { stayed: self.isolation.stayed().to_vec(), ..MigrateReport::default() };
        let failures = std::mem::take(&mut self.failures);
        // Of a page that did not come from another device, both isolations speak.
        report
            .stayed
            .retain(|stayed| !failures.iter().any(|failure| failure.pages.overlaps(stayed.pages)));
        report.stayed.extend(failures);
        let mut tally = Tally::default();
        let pages = self.isolation.pages().to_vec();
        let owners: Vec<_> = (0..pages.len()).map(|index| self.pagemap_of(index)).collect();
        let committed = self.isolation.commit(self.placements);
        for ((page, pagemap), committed) in pages.iter().zip(owners).zip(committed) {
            let range = page.page.block(page.order);
            // Those without a pagemap go back.
            let Some(pagemap) = pagemap else { continue };
            match committed {
                Committed::Gone => {
                    report.stayed.push(Stayed { pages: range, reason: StayReason::Gone });
                }
                Committed::Placed => {
                    report.moved += range.pages();
                    if page.source == Source::Zero {
                        report.without_copy += range.pages();
                        pagemap.counters.in_without_copy(range.pages());
                    }
                    tally.add(pagemap, range);
                }
            }
        }
        report.stayed.sort_by_key(|stayed| stayed.pages.first());
        let to = match self.to {
            Destination::Device(_) => Location::Device,
            Destination::System => Location::System,
        };
        tally.tell(to, self.cause, self.space);
        report
    }

    /// Returns whose memory the page at `index` goes to or comes from, if it moves.
    fn pagemap_of(&self, index: usize) -> Option<Arc<DevicePagemap>> {
        match &self.placements[index] {
            Placement::Back => None,
            Placement::Device(block) => Some(Arc::clone(block.pagemap())),
            Placement::Home => self.isolation.block(index).map(|block| Arc::clone(block.pagemap())),
        }
    }
}

/// Pages that moved, in runs.
#[derive(Default)]
struct Tally {
    runs: Vec<(Arc<DevicePagemap>, PageRange)>,
}

impl Tally {
    fn add(&mut self, pagemap: Arc<DevicePagemap>, range: PageRange) {
        if let Some((of, run)) = self.runs.last_mut()
            && Arc::ptr_eq(of, &pagemap)
            && run.last().checked_add(1) == Some(range.first())
            && let Some(longer) = PageRange::from_bounds(run.first(), range.last())
        {
            *run = longer;
        } else {
            self.runs.push((pagemap, range));
        }
    }

    /// Counts the moves, and tells the policies of them.
    fn tell(self, to: Location, cause: MigrateCause, space: Option<SpaceId>) {
        for (pagemap, pages) in self.runs {
            let owner = pagemap.owner();
            tracing::debug!(target: "uhmm", %pages, ?owner, ?to, ?cause, "migrated");
            pagemap.counters.moved(to, cause, pages.pages());
            let now = pagemap.clock().now();
            pagemap.policies().moved(&Moved { space, pages, owner, to, cause, now });
        }
    }
}

impl DevicePagemap {
    /// Brings a page home that a CPU has touched, and what the policies want to come along. For
    /// backends, which call it with no lock held when they meet a page of this memory.
    ///
    /// `page` is within a mapping of `order`. `Ok` says to look at the page table again: the page is
    /// home, or somebody else has it in transit, and then the caller sleeps until it arrives. So of
    /// any number of threads one brings the page, and none spins (acceptance X10).
    ///
    /// # Errors
    ///
    /// [`FaultError::CopyFailed`], [`FaultError::OutOfMemory`] and [`FaultError::Stuck`]: the page is
    /// still on the device, and asking again at once would not help.
    #[doc(alias = "migrate_to_ram")]
    pub fn bring_home(
        self: &Arc<Self>,
        backend: &dyn Backend,
        page: Page,
        order: Order,
    ) -> Result<(), FaultError> {
        self.counters.cpu_faults(1);
        let space = backend.id();
        let fault = CpuFault { space, owner: self.owner(), page, order, now: self.clock().now() };
        let plan = self.policies().cpu_fault(&fault);
        tracing::trace!(target: "uhmm", ?space, %page, range = %plan.range, "cpu fault");
        if !plan.nap.is_zero() {
            self.counters.throttles(1);
            tracing::debug!(target: "uhmm", ?space, %page, nap = ?plan.nap, "throttled");
            self.clock().sleep(plan.nap);
        }
        let isolation = backend.isolate(plan.range, Select::Device(self.owner()));
        let cause = MigrateCause::CpuFault;
        let report = Migration::new(isolation, Destination::System, cause, Some(space)).run();
        match report.reason(page) {
            None
            | Some(
                StayReason::InTransit
                | StayReason::Gone
                | StayReason::Changed
                | StayReason::Elsewhere
                | StayReason::AlreadyThere
                | StayReason::Hole,
            ) => Ok(()),
            Some(StayReason::CopyFailed) => Err(FaultError::CopyFailed { page }),
            Some(StayReason::OutOfSystemMemory) => Err(FaultError::OutOfMemory { page }),
            Some(reason) => Err(FaultError::Stuck { page, reason }),
        }
    }

    /// Moves at least `pages` pages home, in the order that the policies say, or as many as can be
    /// moved without waiting. Returns how many left the device.
    ///
    /// Starts from the device's own blocks and looks at no address space (acceptance X09).
    pub fn evict(self: &Arc<Self>, pages: u64) -> u64 {
        let mut candidates = self.candidates();
        candidates.sort_by_cached_key(|(candidate, _)| self.policies().victim(candidate));
        let mut evicted = 0;
        let mut rest = candidates.as_slice();
        // Each block is tried once at most, so this ends.
        while evicted < pages && !rest.is_empty() {
            // Few at a time: whoever touches one of them sleeps until all of them are home.
            let mut wanted = (pages - evicted).min(EVICTED_AT_ONCE);
            let count = rest
                .iter()
                .take_while(|(candidate, _)| {
                    let more = wanted > 0;
                    wanted = wanted.saturating_sub(candidate.order.pages());
                    more
                })
                .count();
            let (chosen, others) = rest.split_at(count);
            rest = others;
            for (reverse_map, locations) in by_map(chosen) {
                let isolation = reverse_map.isolate(&locations);
                let cause = MigrateCause::Eviction;
                let report = Migration::new(isolation, Destination::System, cause, None).run();
                let gone = report.stayed.iter().filter(|stayed| stayed.reason == StayReason::Gone);
                evicted += report.moved + gone.map(|stayed| stayed.pages.pages()).sum::<u64>();
            }
        }
        evicted
    }

    /// Moves every page home, and gives out no block any more until
    /// [`reopen`](DevicePagemap::reopen): for a device that is to go away.
    ///
    /// Pages need no mirror and no file to come home, so the order in which those are closed does
    /// not matter (acceptance X12).
    ///
    /// # Errors
    ///
    /// [`StillResident`]: some could not be moved now, because they are in transit, or could not be
    /// copied or placed. Nothing is lost; call it again.
    pub fn evict_all(self: &Arc<Self>) -> Result<(), StillResident> {
        self.close();
        self.evict(u64::MAX);
        match self.used() {
            0 => Ok(()),
            pages => Err(StillResident { pages }),
        }
    }

    /// Makes room for as much of `pages` as the limit allows, in one go.
    fn make_room(self: &Arc<Self>, pages: u64) {
        if self.is_closed() {
            return;
        }
        let free = self.limit() - self.used();
        let wanted = pages.min(self.limit());
        if wanted > free {
            self.evict(wanted - free);
        }
    }

    /// Allocates a block, making room for it unless `full` says that there is none to be had.
    fn allocate(self: &Arc<Self>, order: Order, full: bool) -> Option<DeviceBlock> {
        for round in 0..=EVICTIONS {
            if let Ok(block) = self.try_allocate(order) {
                return Some(block);
            }
            // What is free and not in one piece does not become so by freeing more of it.
            let in_pieces = order > Order::PAGE && self.has_room(order.pages());
            let give_up = full || in_pieces || self.is_closed() || round == EVICTIONS;
            if give_up || self.evict(order.pages()) == 0 {
                break;
            }
        }
        self.counters.failed_allocations(1);
        None
    }
}

/// Groups blocks by the map that knows them.
fn by_map(
    chosen: &[(Candidate, Arc<dyn ReverseMap>)],
) -> Vec<(&Arc<dyn ReverseMap>, Vec<DeviceLocation>)> {
    let mut groups: Vec<(&Arc<dyn ReverseMap>, Vec<DeviceLocation>)> = Vec::new();
    for (candidate, reverse_map) in chosen {
        match groups.iter_mut().find(|(of, _)| Arc::ptr_eq(of, reverse_map)) {
            Some((_, locations)) => locations.push(candidate.location),
            None => groups.push((reverse_map, vec![candidate.location])),
        }
    }
    groups
}

impl<P: Step> std::fmt::Debug for Migration<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Migration")
            .field("isolation", &self.isolation)
            .field("cause", &self.cause)
            .finish_non_exhaustive()
    }
}
