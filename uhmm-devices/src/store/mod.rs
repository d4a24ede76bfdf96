//! Stores: memory for pages that nobody works on, which take less room there than in the memory
//! they come from.
//!
//! A store is a [`DeviceMemory`](uhmm::DeviceMemory) with no device: pages are migrated to it when
//! they are cold, and come home when somebody touches them. [`Compressed`] keeps them in memory, as
//! LZ4 blocks. [`FileStore`] keeps them in a file. [`Store`] is either, by the words that a user
//! writes.
//!
//! ```
//! use uhmm::DevicePagemap;
//! use uhmm_devices::store::{StoreOptions, StoreSpec, Verification};
//!
//! let spec: StoreSpec = "lz4:1G".parse()?;
//! let store = spec.open(StoreOptions::new().verification(Verification::Abort))?;
//! let pagemap = DevicePagemap::register(store.memory());
//! // `AddressSpace::migrate` moves pages there; a touch brings them home.
//! println!("{:?}", store.statistics());
//! # drop(pagemap);
//! # Ok::<(), uhmm_devices::store::StoreError>(())
//! ```
//!
//! # What holds
//!
//! * A page is in the store or at home, never at both and never at neither. What finds no room
//!   stays at home. What cannot be fetched stays in the store: the copy fails, and no other bytes
//!   are handed out in its stead.
//! * A page that comes home allocates nothing on its way. So it comes also when there is no memory
//!   left but that for itself.
//! * A block may come back in pieces of any size, and what each page took is given back with it.
//! * Slabs that are empty go back to the allocator, and extents that are not in use to the disk, but
//!   for a few.
//!
//! # In a live process
//!
//! A store takes its memory from the global allocator. Where the store's own process is the one
//! whose pages move, that has to be one whose memory never does, such as `uhmm_linux::Allocator`,
//! or the store would wait for itself.
//!
//! # Room
//!
//! A pagemap whose memory refuses a block moves others home to make room. With compressed memory
//! that does not happen: a block can always be had, and at the limit the copy fails. A file that is
//! full refuses blocks. Who does not want cold pages to come home for that looks at
//! [`Store::has_room`] first.
//!
//! Concurrency is argued at the head of each module: `frames`, `slabs`, `compressed`, `file`.

mod compressed;
mod content;
mod file;
mod frames;
mod options;
mod slabs;
mod spec;
mod statistics;

#[cfg(all(test, not(shuttle)))]
mod tests;

pub use compressed::Compressed;
pub use content::{Mismatch, Verification};
pub use file::FileStore;
pub use options::StoreOptions;
pub use spec::{Store, StoreError, StoreSpec, parse_bytes};
pub use statistics::StoreStatistics;
