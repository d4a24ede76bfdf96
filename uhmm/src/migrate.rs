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

use std::marker::PhantomData;
use std::sync::Arc;

use mmu_notifier::Owner;
use smallvec::{SmallVec, smallvec};

use crate::address_space::{AddressSpace, SpaceId};
use crate::backend::{
    CannotSplit, Committed, IsolatedPage, Isolation, Placement, Select, Source, SystemMemory,
};
use crate::device::{CopyJob, CopyKind};
use crate::entry::Frame;
use crate::error::{StayReason, Stayed};
use crate::page::{Order, PAGE_SIZE, Page, PageRange};
use crate::pagemap::DevicePagemap;
use crate::policy::{Location, MigrateCause, Moved};

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
        let others = [StayReason::Elsewhere, StayReason::Hole];
        if isolation.pages().is_empty() {
            // Mostly: there is one device, and it is to have them.
            let mut stayed = isolation.stayed().to_vec();
            stayed.retain(|stayed| !others.contains(&stayed.reason));
            stayed.sort_by_key(|stayed| stayed.pages.first());
            return MigrateReport { stayed, ..MigrateReport::default() };
        }
        let migration = Migration::home(isolation, cause, Some(self.mm().id()));
        let mut report = Migration { user: Some(self.clone()), ..migration }.run();
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
    pub(crate) fn home(
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

    /// Shows `look` what is in each page that is on its way from system memory, single pages of
    /// large ones too: what nobody can change before this is committed or dropped. `look` must touch
    /// nothing that may be on its way itself.
    pub fn for_each_page(&self, mut look: impl FnMut(Page, &[u8; PAGE_SIZE])) {
        let memory = self.isolation.memory();
        let mut bytes = [0; PAGE_SIZE];
        for isolated in self.isolation.pages() {
            for (page, index) in isolated.page.block(isolated.order).iter().zip(0..) {
                match isolated.source {
                    Source::System(Frame(first)) => {
                        memory.read(Frame(first + index), 0, &mut bytes)
                    }
                    Source::Zero => bytes.fill(0),
                    // It comes home from there, and has not been copied yet.
                    Source::Device(_) => continue,
                }
                look(page, &bytes);
            }
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
                    self.place(page, Placement::Device(block), 0, cargo, kind);
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
                    self.place(page, Placement::Home, route, Cargo::InPlace, None);
                }
                Ok(to) => {
                    let kind = CopyKind::Out { from, to };
                    self.place(page, Placement::Home, route, Cargo::Contents, Some(kind));
                }
                Err(_) if page.order > Order::PAGE && self.isolation.split(index).is_ok() => {
                    self.routes[route].pagemap.counters.splits(1);
                }
                Err(_) => self.put_back(StayReason::OutOfSystemMemory),
            }
        }
    }

    /// Says where the next page is to be, and how it gets there.
    fn place(
        &mut self,
        page: IsolatedPage,
        placement: Placement,
        route: usize,
        cargo: Cargo,
        copy: Option<CopyKind>,
    ) {
        if let Some(kind) = copy {
            self.routes[route].jobs.push(CopyJob::new(kind, page.order));
            self.routes[route].pages.push(self.placements.len());
        }
        self.placements.push(placement);
        let pages = page.page.block(page.order);
        self.passages.push(Passage { pages, route: Some(route), cargo });
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
            if pagemap.policies().is_none() {
                continue;
            }
            let now = pagemap.clock().now();
            pagemap.policies().moved(&Moved { space, pages, owner, to, cause, now });
        }
    }
}

impl<P: Step> std::fmt::Debug for Migration<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Migration")
            .field("isolation", &self.isolation)
            .field("cause", &self.cause)
            .finish_non_exhaustive()
    }
}
