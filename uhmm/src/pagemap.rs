//! A device's memory: its accounts, who may leave it first, and the blocks that pages are in.
//!
//! # Ownership
//!
//! A [`DeviceBlock`] *is* the memory it stands for: whoever holds it owns the block, and its drop
//! gives the block back to the device's allocator. A backend keeps the block of a page that is on
//! a device inside that page, so a page that goes away frees its device memory by itself, once, and
//! a block that is cut is freed piece by piece. There is no count beside it that could disagree
//! (regressions 43, 56).
//!
//! A device's memory may be system memory. Then a block may be the very memory that a page was in
//! before: [adopted](DeviceMemory::adopt), not allocated. From the commit of its migration on there is
//! no difference; until then the memory is the isolation's, and the block, which is dropped before
//! the isolation ends, stands for nothing but the intention.
//!
//! The pagemap knows each block in use only by its place in the device and by the [`ReverseMap`] that
//! knows the page in it. Eviction starts from there, and never looks at an address space
//! (acceptance X09). No block refers to a mirror, so none has to be visited when one closes
//! (acceptance X12).
//!
//! # Locks
//!
//! One lock for the accounts, never held across a call to the device, a policy, a backend or the
//! caller. Blocks may be dropped under any lock of a backend.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mmu_notifier::Owner;

use crate::backend::{ReverseMap, SystemMemory};
use crate::clock::Clock;
use crate::device::{DeviceMemory, OutOfDeviceMemory};
use crate::entry::{DeviceFrame, DeviceLocation, Frame};
use crate::page::Order;
use crate::policy::{Candidate, Policies};
use crate::primitive::{Mutex, lock};
use crate::statistics::{MemoryCounters, MemoryStatistics};

/// The memory of one device, registered as a place for pages.
///
/// Shared by every mirror of the device and every page in its memory; it lives until the last of
/// them is gone.
#[doc(alias = "dev_pagemap")]
#[doc(alias = "drm_pagemap")]
pub struct DevicePagemap {
    memory: Arc<dyn DeviceMemory>,
    owner: Owner,
    name: String,
    limit: u64,
    policies: Policies,
    clock: Clock,
    accounts: Mutex<Accounts>,
    pub(crate) counters: MemoryCounters,
}

/// How a device's memory is registered. The defaults are safe.
#[derive(Clone, Debug, Default)]
pub struct PagemapOptions {
    name: Option<String>,
    limit: Option<u64>,
    policies: Option<Policies>,
    clock: Clock,
}

#[derive(Default)]
struct Accounts {
    /// Pages allocated.
    used: u64,
    peak: u64,
    /// The blocks that hold pages, by their first frame.
    resident: BTreeMap<DeviceFrame, Resident>,
    /// No block is given out any more.
    closed: bool,
}

struct Resident {
    order: Order,
    arrived: Duration,
    used: Duration,
    reverse_map: Arc<dyn ReverseMap>,
}

/// Pages that are accounted for and not allocated yet.
struct Reserved<'a> {
    pagemap: &'a DevicePagemap,
    pages: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        lock(&self.pagemap.accounts).used -= self.pages;
    }
}

/// A block of device memory. Owning it is having it allocated.
pub struct DeviceBlock {
    pagemap: Arc<DevicePagemap>,
    frame: DeviceFrame,
    order: Order,
    /// Whether this is still the owner: not after it was cut.
    owned: bool,
}

/// Pages are still in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages are still in the device's memory, where their only copy is")]
pub struct StillResident {
    /// How many.
    pub pages: u64,
}

impl PagemapOptions {
    /// Makes the default options.
    pub fn new() -> PagemapOptions {
        PagemapOptions::default()
    }

    /// Names the memory in diagnostics.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> PagemapOptions {
        self.name = Some(name.into());
        self
    }

    /// Limits how much of the memory is used, in pages. The default is its capacity.
    #[must_use]
    pub fn limit(mut self, pages: u64) -> PagemapOptions {
        self.limit = Some(pages);
        self
    }

    /// Chooses the policies. The default is [`Policies::default`].
    #[must_use]
    pub fn policies(mut self, policies: Policies) -> PagemapOptions {
        self.policies = Some(policies);
        self
    }

    /// Chooses the clock that policies go by. The default is the system's.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> PagemapOptions {
        self.clock = clock;
        self
    }
}

impl DevicePagemap {
    /// Registers a device's memory with the default options.
    pub fn register(memory: Arc<dyn DeviceMemory>) -> Arc<DevicePagemap> {
        DevicePagemap::register_with(memory, PagemapOptions::new())
    }

    /// Registers a device's memory.
    pub fn register_with(
        memory: Arc<dyn DeviceMemory>,
        options: PagemapOptions,
    ) -> Arc<DevicePagemap> {
        let owner = Owner::new();
        let capacity = memory.capacity();
        Arc::new(DevicePagemap {
            owner,
            name: options.name.unwrap_or_else(|| format!("device memory of {owner:?}")),
            limit: options.limit.map_or(capacity, |limit| limit.min(capacity)),
            policies: options.policies.unwrap_or_default(),
            clock: options.clock,
            accounts: Mutex::new(Accounts::default()),
            counters: MemoryCounters::default(),
            memory,
        })
    }

    /// Returns whose memory this is, as page entries and events call it.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Returns the name it has in diagnostics.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the device's allocator and copy engine.
    pub fn memory(&self) -> &Arc<dyn DeviceMemory> {
        &self.memory
    }

    /// Returns the policies that decide what moves.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// Returns the clock that the policies go by.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Returns how many pages may be used.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns how many pages are allocated.
    pub fn used(&self) -> u64 {
        lock(&self.accounts).used
    }

    /// Returns what the memory was used for so far.
    pub fn statistics(&self) -> MemoryStatistics {
        let (used, peak) = {
            let accounts = lock(&self.accounts);
            (accounts.used, accounts.peak)
        };
        self.counters.snapshot(used, peak, self.limit)
    }

    /// Notes that the device uses these pages, for the choice of what is evicted.
    pub fn touch(&self, frames: &[DeviceFrame]) {
        let now = self.clock.now();
        let mut accounts = lock(&self.accounts);
        for &frame in frames {
            // The block that the frame lies in begins at it or before it.
            if let Some((first, resident)) = accounts.resident.range_mut(..=frame).next_back()
                && frame.0 - first.0 < resident.order.pages()
            {
                resident.used = now;
            }
        }
    }

    /// Makes a block without making room for it: adopts `isolated` if the memory does that, or else
    /// allocates.
    pub(crate) fn try_allocate(
        self: &Arc<Self>,
        order: Order,
        isolated: Option<(&dyn SystemMemory, Frame)>,
    ) -> Result<DeviceBlock, OutOfDeviceMemory> {
        let pages = order.pages();
        {
            let mut accounts = lock(&self.accounts);
            if accounts.closed || self.limit - accounts.used < pages {
                return Err(OutOfDeviceMemory { order });
            }
            accounts.used += pages;
        }
        let mut reserved = Reserved { pagemap: self, pages };
        let adopted = isolated.and_then(|(memory, from)| self.memory.adopt(memory, from, order));
        let frame = match adopted {
            Some(frame) => frame,
            None => self.memory.allocate(order)?,
        };
        reserved.pages = 0;
        let mut accounts = lock(&self.accounts);
        accounts.peak = accounts.peak.max(accounts.used);
        drop(accounts);
        Ok(DeviceBlock { pagemap: Arc::clone(self), frame, order, owned: true })
    }

    /// Tells whether a block of this many pages would be within the limit.
    pub(crate) fn has_room(&self, pages: u64) -> bool {
        self.limit - self.used() >= pages
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.accounts).closed
    }

    /// Gives out no blocks from now on.
    pub(crate) fn close(&self) {
        lock(&self.accounts).closed = true;
    }

    /// Gives out blocks again, after an [`evict_all`](DevicePagemap::evict_all).
    pub fn reopen(&self) {
        lock(&self.accounts).closed = false;
    }

    /// Enters blocks of this memory among those that eviction may choose. Their pages must be ones
    /// that `reverse_map` will know, or refuse as in transit until it does.
    pub(crate) fn settle<'a>(
        &self,
        blocks: impl Iterator<Item = &'a DeviceBlock>,
        reverse_map: &Arc<dyn ReverseMap>,
    ) {
        let now = self.clock.now();
        let mut accounts = lock(&self.accounts);
        for block in blocks {
            let (order, reverse_map) = (block.order, Arc::clone(reverse_map));
            let resident = Resident { order, arrived: now, used: now, reverse_map };
            accounts.resident.insert(block.frame, resident);
        }
    }

    /// Lists the blocks that hold pages, each with the map that knows it.
    pub(crate) fn candidates(&self) -> Vec<(Candidate, Arc<dyn ReverseMap>)> {
        let now = self.clock.now();
        let accounts = lock(&self.accounts);
        let candidate = |(&frame, resident): (&DeviceFrame, &Resident)| {
            let candidate = Candidate {
                location: DeviceLocation { owner: self.owner, frame },
                order: resident.order,
                arrived: resident.arrived,
                used: resident.used,
                now,
            };
            (candidate, Arc::clone(&resident.reverse_map))
        };
        accounts.resident.iter().map(candidate).collect()
    }
}

impl DeviceBlock {
    /// Returns where it is.
    pub fn location(&self) -> DeviceLocation {
        DeviceLocation { owner: self.pagemap.owner, frame: self.frame }
    }

    /// Returns its size.
    pub fn order(&self) -> Order {
        self.order
    }

    /// Returns the memory it is a block of.
    pub fn pagemap(&self) -> &Arc<DevicePagemap> {
        &self.pagemap
    }

    /// Returns which frame of `memory` it begins at, if the device has its memory there. See
    /// [`DeviceMemory::in_place`].
    pub fn in_place(&self, memory: &dyn SystemMemory) -> Option<Frame> {
        self.pagemap.memory.in_place(memory, self.frame)
    }

    /// Splits it into single pages, in ascending order.
    pub fn split(self) -> Vec<DeviceBlock> {
        self.cut(Order::PAGE)
    }

    /// Splits it into its two halves, in ascending order.
    ///
    /// # Panics
    ///
    /// If it is a single page, which has no halves.
    pub fn halve(self) -> [DeviceBlock; 2] {
        assert!(self.order > Order::PAGE, "a single page has no halves");
        let order = self.order.smaller();
        self.cut(order).try_into().expect("a block has two halves")
    }

    /// Cuts it into blocks of `order`, which is no larger than its own, in ascending order. The
    /// accounts know the pieces when this returns.
    fn cut(mut self, order: Order) -> Vec<DeviceBlock> {
        self.owned = false;
        let pagemap = Arc::clone(&self.pagemap);
        let end = self.frame.0 + self.order.pages();
        let frames = (self.frame.0..end).step_by(order.pages() as usize).map(DeviceFrame);
        let mut accounts = lock(&pagemap.accounts);
        if let Some(whole) = accounts.resident.remove(&self.frame) {
            for frame in frames.clone() {
                let reverse_map = Arc::clone(&whole.reverse_map);
                accounts.resident.insert(frame, Resident { order, reverse_map, ..whole });
            }
        }
        drop(accounts);
        let piece = |frame| {
            let pagemap = Arc::clone(&pagemap);
            DeviceBlock { pagemap, frame, order, owned: true }
        };
        frames.map(piece).collect()
    }
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        let pagemap = &self.pagemap;
        // Forgotten before it is freed: the allocator may give the same frame out again at once.
        let resident = lock(&pagemap.accounts).resident.remove(&self.frame);
        drop(resident);
        pagemap.memory.free(self.frame, self.order);
        lock(&pagemap.accounts).used -= self.order.pages();
    }
}

impl fmt::Debug for DevicePagemap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePagemap")
            .field("name", &self.name)
            .field("owner", &self.owner)
            .field("used", &self.used())
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for DeviceBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:?} of `{}`", self.order, self.frame, self.pagemap.name)
    }
}
