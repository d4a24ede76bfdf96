//! Where pages should be, and when they should move.
//!
//! Correctness never depends on a policy: whatever it says, each page has one current copy and
//! every access finds it. A [`Policy`] is asked at three places, and told of every move:
//!
//! | asked when | decides |
//! | --- | --- |
//! | a device faults | whether the page moves to the device, how much around it comes along, whether the device is to wait first |
//! | a CPU touches a page on a device | how much around it comes home along with it, whether the CPU is to wait first |
//! | a full device must give something up | which block leaves first |
//!
//! Each policy is small and does one thing. A [`Policies`] is a list of them: each is asked in turn
//! and may change what those before it have decided.
#![doc = include_str!("../../docs/policies.md")]

mod density_prefetch;
mod fault_around;
mod first_in;
mod least_recently_used;
mod minimum_residency;
mod preferred_location;
mod recent;
mod thrash_throttle;

pub use density_prefetch::DensityPrefetch;
pub use fault_around::FaultAround;
pub use first_in::FirstIn;
pub use least_recently_used::LeastRecentlyUsed;
pub use minimum_residency::MinimumResidency;
pub use preferred_location::PreferredLocation;
pub use thrash_throttle::ThrashThrottle;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mmu_notifier::Owner;

use crate::address_space::SpaceId;
use crate::entry::{Access, DeviceLocation, PageEntry};
use crate::page::{Order, Page, PageRange};

/// One rule about where pages should be. See the [module](self).
///
/// Called with no lock of this crate held, by the thread that faults or evicts. An implementation
/// must not fault or migrate itself, nor end a mirror or an address space.
pub trait Policy: Send + Sync + fmt::Debug + 'static {
    /// Returns the name that its figures are listed under.
    fn name(&self) -> &'static str;

    /// Decides what to do about a device's fault.
    fn device_fault(&self, fault: &DeviceFault<'_>, plan: &mut DevicePlan) {
        let _ = (fault, plan);
    }

    /// Decides what comes home when a CPU touches a page on a device.
    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        let _ = (fault, plan);
    }

    /// Tells whether [`cpu_fault`](Policy::cpu_fault) and [`moved`](Policy::moved) wait for nobody, are
    /// done in a few microseconds, and never want a nap. A backend then asks on the thread that all
    /// CPU faults wait for, which is quicker than to let another thread ask.
    ///
    /// The answer may change. It holds for the next fault that the calling thread asks about.
    fn is_prompt(&self) -> bool {
        false
    }

    /// Decides how soon a block leaves a full device.
    fn victim(&self, candidate: &Candidate, verdict: &mut Verdict) {
        let _ = (candidate, verdict);
    }

    /// Hears that pages have moved.
    fn moved(&self, moved: &Moved) {
        let _ = moved;
    }

    /// Returns what it did so far, by name.
    fn figures(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A device's fault that is about to be served.
pub struct DeviceFault<'a> {
    /// The address space.
    pub space: SpaceId,
    /// The device.
    pub owner: Owner,
    /// The page that the device faulted on.
    pub page: Page,
    /// What it wants to do there.
    pub access: Access,
    /// The range of the mirror, beyond which nothing can be served.
    pub mirror: PageRange,
    /// The time of the fault.
    pub now: Duration,
    pub(crate) snapshot: &'a dyn Fn(PageRange) -> Vec<PageEntry>,
}

impl DeviceFault<'_> {
    /// Looks at pages of the address space, without faulting: `[i]` is page `i` of `range`.
    pub fn snapshot(&self, range: PageRange) -> Vec<PageEntry> {
        (self.snapshot)(range)
    }
}

/// Where a page should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In system memory. The device works on it there.
    System,
    /// In the memory of the device that faults.
    Device,
}

/// What is to be done about a device's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePlan {
    /// Where the pages are to be.
    pub location: Location,
    /// The pages to be served: always holds the page of the fault, and is cut to the mirror. Those
    /// besides that page are served as far as no further fault is needed.
    pub range: PageRange,
    /// How long to wait before anything is done.
    pub nap: Duration,
}

impl DevicePlan {
    /// The page moves to the device, at once and alone.
    pub(crate) fn on_device(page: Page) -> DevicePlan {
        DevicePlan { location: Location::Device, range: page.into(), nap: Duration::ZERO }
    }

    /// The page stays where it is.
    pub(crate) fn in_place(page: Page) -> DevicePlan {
        DevicePlan { location: Location::System, ..DevicePlan::on_device(page) }
    }
}

/// A CPU's touch of a page on a device.
#[derive(Clone, Copy, Debug)]
pub struct CpuFault {
    /// The address space.
    pub space: SpaceId,
    /// Whose memory the page is in.
    pub owner: Owner,
    /// The page.
    pub page: Page,
    /// The size of the block that it is mapped in.
    pub order: Order,
    /// The time of the fault.
    pub now: Duration,
}

/// What comes home when a CPU touches a page on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HomePlan {
    /// The pages to bring home: always holds the page of the fault. Of those around it, the ones
    /// in the same device's memory come along.
    pub range: PageRange,
    /// How long to wait before anything is done.
    pub nap: Duration,
}

/// A block that could leave a full device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which block.
    pub location: DeviceLocation,
    /// Its size.
    pub order: Order,
    /// When it was filled.
    pub arrived: Duration,
    /// When its device last faulted on it, or it was filled.
    pub used: Duration,
    /// The time of the eviction.
    pub now: Duration,
}

/// How soon a block leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Verdict {
    /// Whether it leaves only if nothing else is left.
    pub protected: bool,
    /// Of two equally protected blocks, the one of smaller rank leaves first.
    pub rank: u64,
}

/// Pages that have moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The address space, where it is known: an eviction does not look at one.
    pub space: Option<SpaceId>,
    /// The pages. Where `space` is not known, addresses in some address space.
    pub pages: PageRange,
    /// The device.
    pub owner: Owner,
    /// Where they are now.
    pub to: Location,
    /// Why they moved.
    pub cause: MigrateCause,
    /// When.
    pub now: Duration,
}

/// Why pages move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MigrateCause {
    /// Somebody asked for it.
    Request,
    /// The device faulted on the page, or on one nearby.
    DeviceFault,
    /// A CPU touched the page, or one nearby.
    CpuFault,
    /// Another device needs the page, which cannot come to it directly.
    PeerFault,
    /// The device was full.
    Eviction,
}

/// Policies that are asked in turn.
#[derive(Clone, Debug)]
pub struct Policies(Vec<Arc<dyn Policy>>);

impl Default for Policies {
    /// The policies of every device whose author chooses none, with their defaults, in this order:
    /// [`DensityPrefetch`] and [`FaultAround`] say what comes along, [`MinimumResidency`] and
    /// [`ThrashThrottle`] who waits, and [`LeastRecentlyUsed`] what leaves first. Each of the first
    /// two only adds, the longest wait is the one that is kept, and the rank does not touch the
    /// protection, so the result hardly depends on the order.
    fn default() -> Policies {
        Policies::none()
            .and(DensityPrefetch::new())
            .and(FaultAround::new())
            .and(MinimumResidency::new())
            .and(ThrashThrottle::new())
            .and(LeastRecentlyUsed)
    }
}

impl Policies {
    /// Makes a list of policies that are asked in this order.
    pub fn new(policies: impl IntoIterator<Item = Arc<dyn Policy>>) -> Policies {
        Policies(policies.into_iter().collect())
    }

    /// No policy at all: faulted pages move one by one, and the oldest block is evicted first.
    pub fn none() -> Policies {
        Policies(Vec::new())
    }

    /// Tells whether nobody is asked: pages come home one by one, and nobody waits.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells whether all of them are [prompt](Policy::is_prompt).
    pub fn are_prompt(&self) -> bool {
        self.0.iter().all(|policy| policy.is_prompt())
    }

    /// Asks `policy` last. Pass an [`Arc`] by [`and_shared`](Policies::and_shared) to go on
    /// talking to it.
    #[must_use]
    pub fn and(self, policy: impl Policy) -> Policies {
        self.and_shared(Arc::new(policy))
    }

    /// Asks `policy` last, which others may hold too.
    #[must_use]
    pub fn and_shared(mut self, policy: Arc<dyn Policy>) -> Policies {
        self.0.push(policy);
        self
    }

    /// Returns what each policy did so far.
    pub fn figures(&self) -> Vec<(&'static str, Vec<(&'static str, u64)>)> {
        self.0.iter().map(|policy| (policy.name(), policy.figures())).collect()
    }

    /// The longest nap that any policy can make anybody take.
    pub const MAX_NAP: Duration = Duration::from_millis(100);

    /// Asks what is to be done about a fault in a mapping of `order`.
    pub(crate) fn device_fault(&self, fault: &DeviceFault<'_>, order: Order) -> DevicePlan {
        let page = PageRange::from(fault.page);
        // A large page moves whole, unless a policy wants less.
        let range = fault.page.block(order);
        let mut plan = DevicePlan { range, ..DevicePlan::on_device(fault.page) };
        self.0.iter().for_each(|policy| policy.device_fault(fault, &mut plan));
        plan.range = plan.range.intersection(fault.mirror).unwrap_or(page);
        if !plan.range.contains(fault.page) {
            plan.range = page;
        }
        plan.nap = plan.nap.min(Policies::MAX_NAP);
        plan
    }

    pub(crate) fn cpu_fault(&self, fault: &CpuFault) -> HomePlan {
        let block = fault.page.block(fault.order);
        let mut plan = HomePlan { range: block, nap: Duration::ZERO };
        self.0.iter().for_each(|policy| policy.cpu_fault(fault, &mut plan));
        // Part of a block does not come alone, and the page must come.
        if !plan.range.covers(block) {
            plan.range = block;
        }
        plan.nap = plan.nap.min(Policies::MAX_NAP);
        plan
    }

    pub(crate) fn victim(&self, candidate: &Candidate) -> Verdict {
        let mut verdict = Verdict { protected: false, rank: nanoseconds(candidate.arrived) };
        self.0.iter().for_each(|policy| policy.victim(candidate, &mut verdict));
        verdict
    }

    pub(crate) fn moved(&self, moved: &Moved) {
        self.0.iter().for_each(|policy| policy.moved(moved));
    }
}

impl fmt::Debug for DeviceFault<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceFault")
            .field("space", &self.space)
            .field("owner", &self.owner)
            .field("page", &self.page)
            .field("access", &self.access)
            .field("mirror", &self.mirror)
            .field("now", &self.now)
            .finish_non_exhaustive()
    }
}

/// Returns a time as the rank of a block.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Returns the smallest range that holds both, and what lies between them.
fn join(a: PageRange, b: PageRange) -> PageRange {
    let (first, last) = (a.first().min(b.first()), a.last().max(b.last()));
    PageRange::from_bounds(first, last).expect("the first page of all is not behind the last")
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod testing;
