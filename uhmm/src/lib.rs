#![doc = include_str!("../README.md")]
//!
//! What does not compile, on purpose, is in [`guarantees`].
#![forbid(unsafe_code)]

mod address_space;
pub mod backend;
mod clock;
mod device;
mod entry;
mod error;
mod exclusive;
mod fault;
pub mod guarantees;
mod home;
mod injector;
mod migrate;
mod mirror;
pub mod operations;
mod page;
mod pagemap;
pub mod policy;
#[doc(hidden)]
pub mod primitive;
pub mod sim;
mod statistics;

pub use address_space::{AddressSpace, Death, Mm, SpaceId};
pub use backend::{Backend, Coherence, SystemMemory};
pub use clock::Clock;
pub use device::{CopyJob, CopyKind, Device, DeviceMemory, OutOfDeviceMemory};
pub use entry::{Access, DeviceFrame, DeviceLocation, Frame, PageEntry, Residency};
pub use error::{FaultError, StayReason, Stayed};
pub use exclusive::Exclusive;
pub use fault::{Handled, RangeFault, RangeFaulted};
pub use injector::Injector;
pub use migrate::{Copied, Isolated, MigrateReport, Migration, Step};
pub use mirror::{Mirror, MirrorHandle, MirrorUnfinished};
/// The core underneath, for backends, and for those who subscribe to changes without a device.
pub use mmu_notifier;
pub use mmu_notifier::{
    Event, EventKind, Fence, Owner, Released, SubscribeError, UnsubscribeError, VaRange, WouldBlock,
};
pub use page::{Order, PAGE_SHIFT, PAGE_SIZE, Page, PageRange, PageRangeError};
pub use pagemap::{DeviceBlock, DevicePagemap, PagemapOptions, StillResident};
pub use statistics::{MemoryStatistics, SpaceStatistics};
