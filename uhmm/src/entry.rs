//! What a device is told of a page: where it is, and what it may do there.

use mmu_notifier::Owner;

use crate::page::Order;

/// What may be done with a page, each including what stands before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Nothing. As a request: look, and do not fault.
    #[default]
    None,
    /// Loads.
    Read,
    /// Loads and stores.
    Write,
    /// Read-modify-write operations that no CPU comes between: the page is in the device's own
    /// memory, or the device holds it [exclusively](crate::Exclusive).
    Atomic,
}

/// A page of system memory, by the number by which its [`SystemMemory`](crate::SystemMemory)
/// knows it. Blocks of a larger [`Order`] are consecutive numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[doc(alias = "pfn")]
pub struct Frame(pub u64);

/// A page of a device's memory, by its number there. Blocks of a larger [`Order`] are consecutive
/// numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceFrame(pub u64);

/// A page of device memory: whose, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceLocation {
    /// The owner of the [`DevicePagemap`](crate::DevicePagemap) it belongs to.
    pub owner: Owner,
    /// Which page of that memory.
    pub frame: DeviceFrame,
}

/// Where the one current copy of a page is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Residency {
    /// Nothing is mapped at the address.
    #[default]
    Hole,
    /// Something is mapped, and there is no page yet that could be used: never touched, or swapped
    /// out. A fault brings it.
    Empty,
    /// On its way between system memory and a device. A fault waits for its arrival.
    InTransit,
    /// In system memory.
    System(Frame),
    /// In system memory, and held by the device of this owner: the CPUs are kept off it.
    Exclusive {
        /// Where it is.
        frame: Frame,
        /// Who holds it.
        owner: Owner,
    },
    /// In the memory of a device.
    Device(DeviceLocation),
}

/// What the address space says of one page at one moment.
///
/// A device may make a translation of it only under the lock that
/// [`Device::map`](crate::Device::map) is called under.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[doc(alias = "hmm_pfn")]
pub struct PageEntry {
    /// Where it is.
    pub residency: Residency,
    /// What may be done there now.
    pub access: Access,
    /// What the mapping allows. Where it is more than `access`, a fault brings it.
    pub allowed: Access,
    /// The size of the block around the page that is mapped as one, with one residency of
    /// consecutive frames and one access. What a [`Device`](crate::Device) gets to see is clipped:
    /// the block lies within the pages it was asked to map (regression of CVE-2025-40336).
    pub order: Order,
}

impl Residency {
    /// Returns where the page is that is `pages` further in the same block.
    pub(crate) fn further(self, pages: u64) -> Residency {
        match self {
            Residency::System(Frame(first)) => Residency::System(Frame(first + pages)),
            Residency::Exclusive { frame: Frame(first), owner } => {
                Residency::Exclusive { frame: Frame(first + pages), owner }
            }
            Residency::Device(DeviceLocation { owner, frame: DeviceFrame(first) }) => {
                let frame = DeviceFrame(first + pages);
                Residency::Device(DeviceLocation { owner, frame })
            }
            Residency::Hole | Residency::Empty | Residency::InTransit => self,
        }
    }
}

impl PageEntry {
    /// Tells whether a device of `owner` may do `wanted` with the page as it is.
    pub fn satisfies(&self, wanted: Access, owner: Owner) -> bool {
        self.access_of(owner) >= wanted && wanted != Access::None
    }

    /// Returns what a device of `owner` may do with the page as it is: nothing on another's device
    /// or under another's hold.
    pub fn access_of(&self, owner: Owner) -> Access {
        match self.residency {
            Residency::Hole | Residency::Empty | Residency::InTransit => Access::None,
            // Loads, stores, and no more: a CPU may come between a device's load and store.
            Residency::System(_) => self.access.min(Access::Write),
            Residency::Exclusive { owner: holder, .. } if holder == owner => self.access,
            Residency::Device(location) if location.owner == owner => match self.access {
                Access::Write => Access::Atomic,
                access => access,
            },
            Residency::Exclusive { .. } | Residency::Device(_) => Access::None,
        }
    }
}
