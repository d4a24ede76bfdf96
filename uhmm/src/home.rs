//! Pages that leave a device because a CPU touches them, or because the device is full.
//!
//! Either way they go home by the three steps of every [migration](crate::migrate). Making room
//! takes only what it gets without waiting, so two devices, or two migrations on one, that make room
//! at the same time cannot wait for each other.

use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Backend, ReverseMap, Select, SystemMemory};
use crate::entry::{DeviceLocation, Frame};
use crate::error::{FaultError, StayReason};
use crate::migrate::Migration;
use crate::page::{Order, Page};
use crate::pagemap::{DeviceBlock, DevicePagemap, StillResident};
use crate::policy::{Candidate, CpuFault, MigrateCause};

/// How often a migration makes room for a block before the page stays.
const EVICTIONS: u32 = 2;

/// How many pages an eviction has in transit at a time, as long as no single block is larger.
const EVICTED_AT_ONCE: u64 = Order::HUGE.pages();

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
        // Nobody asks for the time.
        let now = if self.policies().is_none() { Duration::ZERO } else { self.clock().now() };
        let fault = CpuFault { space, owner: self.owner(), page, order, now };
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
    pub(crate) fn make_room(self: &Arc<Self>, pages: u64) {
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
    pub(crate) fn allocate(
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
