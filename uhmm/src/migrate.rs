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
//!    for which there is no room, or whose copy fails, is marked to go back. Where a device's memory
//!    is system memory, the destination may be the place where the contents are: then there is one
//!    copy all along, which the isolation has until the commit.
//! 3. **Commit.** One call to the backend says of each page where it is now, and frees the other
//!    place. It cannot fail.
//!
//! Whatever is dropped before the third step, also by a panic, drops the isolation, which puts every
//! page back where its contents never left; the destinations are freed with the blocks that own
//! them, before that: a block that adopted a page's memory must not outlive the isolation that has
//! it. So there is one current copy at every instant (invariant *Whole*), and it is the one that
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
use smallvec::{SmallVec, smallvec};

use crate::address_space::{AddressSpace, SpaceId};
use crate::backend::{
    Backend, CannotSplit, Committed, IsolatedPage, Isolation, Placement, ReverseMap, Select,
    Source, SystemMemory,
};
use crate::device::{CopyJob, CopyKind};
use crate::entry::{DeviceLocation, Frame};
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
    // The blocks end before the isolation does: one may have adopted what the isolation has.
    placements: Vec<Placement>,
    // The isolation ends before the user reference does: its end is an operation on the space.
    isolation: Box<dyn Isolation>,
    to: Location,
    /// One for each device that pages go to or come from. To a device there is just that one.
    routes: Routes,
    /// One for each placement.
    passages: SmallVec<[Passage; 1]>,
    cause: MigrateCause,
    space: Option<SpaceId>,
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

/// The way between system memory and that of one device.
struct Route {
    pagemap: Arc<DevicePagemap>,
    /// What its copy engine is to do.
    jobs: SmallVec<[CopyJob; 1]>,
    /// The index of the page that each job is for.
    pages: SmallVec<[usize; 1]>,
}

// Most migrations are of one page that a CPU has touched: those allocate nothing for any of this.
type Routes = SmallVec<[Route; 1]>;

/// How one page gets to where it is to be.
struct Passage {
    pages: PageRange,
    /// The index of its route; `None` if it goes back.
    route: Option<usize>,
    cargo: Cargo,
}

/// What there is to carry of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cargo {
    /// Its contents.
    Contents,
    /// Nothing: its contents are zeroes.
    Zeroes,
    /// Nothing: its contents are there already.
    InPlace,
}

/// What became of the pages of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrateReport {
    /// How many pages are now where they were to go.
    pub moved: u64,
    /// How many of those were not copied: they had no contents, or the device's memory is where
    /// their contents were.
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
        let migration = Migration::to(to, isolation, cause);
        let (space, user) = (Some(self.mm().id()), Some(self.clone()));
        Migration { failures, space, user, ..migration }
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
        let migration = Migration::home(isolation, cause, Some(self.mm().id()));
        let mut report = Migration { user: Some(self.clone()), ..migration }.run();
        let others = [StayReason::Elsewhere, StayReason::Hole];
        report.stayed.retain(|stayed| !others.contains(&stayed.reason));
        report
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
    /// Begins to move isolated pages to a device.
    fn to(
        pagemap: &Arc<DevicePagemap>,
        isolation: Box<dyn Isolation>,
        cause: MigrateCause,
    ) -> Migration<Isolated> {
        let routes = smallvec![Route::of(pagemap)];
        Migration { to: Location::Device, routes, ..Migration::home(isolation, cause, None) }
    }

    /// Begins to move isolated pages home.
    fn home(
        isolation: Box<dyn Isolation>,
        cause: MigrateCause,
        space: Option<SpaceId>,
    ) -> Migration<Isolated> {
        Migration {
            placements: Vec::new(),
            isolation,
            to: Location::System,
            routes: Routes::new(),
            passages: SmallVec::new(),
            cause,
            space,
            failures: Vec::new(),
            user: None,
            step: PhantomData,
        }
    }

    /// Finds a place for each page and copies it there. What finds no place, or cannot be copied,
    /// will stay; nothing is lost and nothing is freed.
    pub fn copy(mut self) -> Migration<Copied> {
        let memory = self.isolation.memory();
        let pages = self.isolation.pages().len();
        self.placements.reserve(pages);
        self.passages.reserve(pages);
        match self.to {
            Location::Device => self.place_on_device(&*memory),
            Location::System => self.place_at_home(&*memory),
        }
        self.do_jobs(&*memory);
        Migration {
            placements: self.placements,
            isolation: self.isolation,
            to: self.to,
            routes: self.routes,
            passages: self.passages,
            cause: self.cause,
            space: self.space,
            failures: self.failures,
            user: self.user,
            step: PhantomData,
        }
    }

    /// Copies and commits.
    pub fn run(self) -> MigrateReport {
        self.copy().commit()
    }

    fn place_on_device(&mut self, memory: &dyn SystemMemory) {
        let to = Arc::clone(&self.routes[0].pagemap);
        to.make_room(self.pages());
        // A device that had no single page left has none for the next either.
        let mut full = false;
        // Splitting makes the list longer as we go.
        while let Some(&page) = self.isolation.pages().get(self.placements.len()) {
            let index = self.placements.len();
            let isolated = match page.source {
                Source::Zero => None,
                Source::System(frame) => Some((memory, frame)),
                Source::Device(_) => unreachable!("only pages in system memory were taken"),
            };
            match to.allocate(page.order, isolated, full) {
                Some(block) => {
                    let to = block.location().frame;
                    let (cargo, kind) = match isolated {
                        None => (Cargo::Zeroes, Some(CopyKind::Clear { to })),
                        Some((_, from)) if block.in_place(memory) == Some(from) => {
                            (Cargo::InPlace, None)
                        }
                        Some((_, from)) => (Cargo::Contents, Some(CopyKind::In { from, to })),
                    };
                    let job = kind.map(|kind| CopyJob::new(kind, page.order));
                    self.place(Placement::Device(block), 0, cargo, job);
                }
                None if page.order > Order::PAGE && !full => match self.isolation.split(index) {
                    Ok(()) => to.counters.splits(1),
                    Err(CannotSplit) => self.put_back(StayReason::LargePage),
                },
                None => {
                    full = true;
                    self.put_back(StayReason::OutOfDeviceMemory);
                }
            }
        }
    }

    fn place_at_home(&mut self, memory: &dyn SystemMemory) {
        while let Some(&page) = self.isolation.pages().get(self.placements.len()) {
            let index = self.placements.len();
            let Some(block) = self.isolation.block(index) else {
                self.put_back(StayReason::Elsewhere);
                continue;
            };
            let (from, in_place) = (block.location().frame, block.in_place(memory));
            let route = route_of(&mut self.routes, block.pagemap());
            match self.isolation.allocate_home(index) {
                Ok(to) if in_place == Some(to) => {
                    self.place(Placement::Home, route, Cargo::InPlace, None);
                }
                Ok(to) => {
                    let job = CopyJob::new(CopyKind::Out { from, to }, page.order);
                    self.place(Placement::Home, route, Cargo::Contents, Some(job));
                }
                Err(_) if page.order > Order::PAGE && self.isolation.split(index).is_ok() => {
                    self.routes[route].pagemap.counters.splits(1);
                }
                Err(_) => self.put_back(StayReason::OutOfSystemMemory),
            }
        }
    }

    /// Says where the next page is to be, and how it gets there.
    fn place(&mut self, placement: Placement, route: usize, cargo: Cargo, job: Option<CopyJob>) {
        let index = self.placements.len();
        let pages = self.range_of(index);
        self.placements.push(placement);
        self.passages.push(Passage { pages, route: Some(route), cargo });
        if let Some(job) = job {
            self.routes[route].jobs.push(job);
            self.routes[route].pages.push(index);
        }
    }

    /// Says that the next page is to go back.
    fn put_back(&mut self, reason: StayReason) {
        let index = self.placements.len();
        let pages = self.range_of(index);
        self.placements.push(Placement::Back);
        self.passages.push(Passage { pages, route: None, cargo: Cargo::Contents });
        self.stay(index, reason);
    }

    /// Has the devices copy, and marks the pages whose copies failed to go back.
    fn do_jobs(&mut self, memory: &dyn SystemMemory) {
        let mut routes = std::mem::take(&mut self.routes);
        for Route { pagemap, jobs, pages } in &mut routes {
            if jobs.is_empty() {
                continue;
            }
            pagemap.memory().copy(memory, jobs);
            for (job, &index) in jobs.iter().zip(&*pages) {
                if !job.is_complete() {
                    pagemap.counters.failed_copies(1);
                    self.placements[index] = Placement::Back;
                    self.passages[index].route = None;
                    self.stay(index, StayReason::CopyFailed);
                }
            }
        }
        self.routes = routes;
    }
}

impl Migration<Copied> {
    /// Makes the new places the pages' only ones. Cannot fail. On return every page can be used
    /// again, wherever it is.
    pub fn commit(mut self) -> MigrateReport {
        self.settle();
        let mut report =
            MigrateReport { stayed: self.isolation.stayed().to_vec(), ..MigrateReport::default() };
        let failures = std::mem::take(&mut self.failures);
        // Of a page that did not come from another device, both isolations speak.
        report
            .stayed
            .retain(|stayed| !failures.iter().any(|failure| failure.pages.overlaps(stayed.pages)));
        report.stayed.extend(failures);
        let committed = self.isolation.commit(self.placements);
        let mut tally = Tally { routes: &self.routes, to: self.to, runs: SmallVec::new() };
        for (passage, committed) in self.passages.iter().zip(committed) {
            let (Some(route), pages) = (passage.route, passage.pages) else { continue };
            match committed {
                Committed::Gone => report.stayed.push(Stayed { pages, reason: StayReason::Gone }),
                Committed::Placed => {
                    report.moved += pages.pages();
                    if passage.cargo != Cargo::Contents {
                        report.without_copy += pages.pages();
                    }
                    tally.add(route, pages, passage.cargo);
                }
            }
        }
        report.stayed.sort_by_key(|stayed| stayed.pages.first());
        tally.tell(self.cause, self.space);
        report
    }

    /// Lets eviction choose the blocks that the pages will be in. Before the commit: from then on
    /// somebody may free a block, and that takes it out again.
    fn settle(&self) {
        if self.to == Location::Device {
            let blocks = self.placements.iter().filter_map(|placement| match placement {
                Placement::Device(block) => Some(block),
                Placement::Back | Placement::Home => None,
            });
            self.routes[0].pagemap.settle(blocks, &self.isolation.reverse_map());
        }
    }
}

impl Route {
    fn of(pagemap: &Arc<DevicePagemap>) -> Route {
        Route { pagemap: Arc::clone(pagemap), jobs: SmallVec::new(), pages: SmallVec::new() }
    }
}

/// Returns the index of the route of `pagemap`, which becomes one if it is not yet.
fn route_of(routes: &mut Routes, pagemap: &Arc<DevicePagemap>) -> usize {
    let known = routes.iter().position(|route| Arc::ptr_eq(&route.pagemap, pagemap));
    known.unwrap_or_else(|| {
        routes.push(Route::of(pagemap));
        routes.len() - 1
    })
}

/// Pages that moved, in runs, each with the index of its route.
struct Tally<'a> {
    routes: &'a Routes,
    to: Location,
    runs: SmallVec<[(usize, PageRange); 1]>,
}

impl Tally<'_> {
    fn add(&mut self, route: usize, pages: PageRange, cargo: Cargo) {
        let counters = &self.routes[route].pagemap.counters;
        match (cargo, self.to) {
            (Cargo::Contents, _) => {}
            (Cargo::Zeroes, _) => counters.in_without_copy(pages.pages()),
            (Cargo::InPlace, Location::Device) => counters.in_by_adoption(pages.pages()),
            (Cargo::InPlace, Location::System) => counters.home_in_place(pages.pages()),
        }
        if let Some((of, run)) = self.runs.last_mut()
            && *of == route
            && run.last().checked_add(1) == Some(pages.first())
            && let Some(longer) = PageRange::from_bounds(run.first(), pages.last())
        {
            *run = longer;
        } else {
            self.runs.push((route, pages));
        }
    }

    /// Counts the moves, and tells the policies of them.
    fn tell(self, cause: MigrateCause, space: Option<SpaceId>) {
        let to = self.to;
        for (route, pages) in self.runs {
            let pagemap = &self.routes[route].pagemap;
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
        let report = Migration::home(isolation, cause, Some(space)).run();
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
                let report = Migration::home(isolation, cause, None).run();
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

    /// Adopts `isolated`, or allocates a block, making room for it unless `full` says that there is
    /// none to be had.
    fn allocate(
        self: &Arc<Self>,
        order: Order,
        isolated: Option<(&dyn SystemMemory, Frame)>,
        full: bool,
    ) -> Option<DeviceBlock> {
        for round in 0..=EVICTIONS {
            if let Ok(block) = self.try_allocate(order, isolated) {
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
