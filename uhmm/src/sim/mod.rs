//! A complete simulated machine: system memory, files, and processes whose memory devices share.
//!
//! It is a [`Backend`](crate::Backend) without a kernel, for testing: drivers and policies on it,
//! and this crate itself. It has everything that changes an address space behind a device's back,
//! announces each as the kernel does, and finds out whoever works on memory that is free or in
//! transit:
//!
//! * No frame number is used twice, so a device that uses a translation after the page has left
//!   hits a frame that is free or in transit. That panics with the frame and the reason, or is
//!   listed in [`Machine::violations`] where [`MachineOptions::count_violations`] says so. A device
//!   that goes on storing through a translation that has become read-only, as by a fork, while the
//!   page stays where it is, is not found out.
//! * [`Machine::check`] says whether every page has exactly one copy, every frame one owner, and
//!   every reverse map is true.
//! * A device's memory can be a part of the machine's ([`Machine::host_memory`]): pages change hands
//!   and are not copied. Coming home they get new frame numbers, so stale translations are found out
//!   there too.
//! * An [`Injector`](crate::Injector) makes allocations (`"frame"`) and splits of large pages
//!   (`"split"`) fail.
//!
//! Nothing depends on time or on addresses, so under a deterministic scheduler a run repeats.
//!
//! # Locks
//!
//! A machine has one lock, over all page tables and all pages, and no lock beside it that is held
//! for longer than one access to memory. Each change of what can be seen is made in four parts:
//!
//! 1. Under the lock, *find* which entries of which address spaces it is about: a page that was
//!    shared by fork or merged is in several.
//! 2. Without the lock, *announce* all of them, which waits until every device has stopped.
//! 3. Under the lock, find again. If that was all announced, make the change, in one step. If not,
//!    end the announcements and begin again: somebody was faster.
//! 4. End the announcements.
//!
//! So whoever holds the lock sees no change half done, and nobody is called under it: no device, no
//! policy and no subscriber. Announcing in (2) cannot deadlock with the lock, since it is not held
//! there and nobody who holds it waits for anything but the locks below it. Whoever sleeps
//! until a page arrives holds neither the lock nor an announcement, and who has the page in transit
//! needs only the lock to end that. It may hold isolations itself, though. So a thread that would
//! sleep for an isolation of its own, or for that of a thread that in the end sleeps for one of its
//! own, is told so ([`FaultError::SelfWait`](crate::FaultError::SelfWait)). An isolation counts as
//! that of the thread that began it.
//!
//! The order of locks is: announcement, machine, then the accounts of a device's memory (when a
//! block is split or settled) and system memory, whose lock covers one access. Device memory that
//! is freed is given back after the machine's lock is released.
//!
//! # That nothing changes unannounced
//!
//! The page table is a type of its own, which gives out an entry that can be seen for changing only
//! against an `Announced`. There is no other way to make one of those than to announce, and each
//! change is checked to be within it; one that is not panics with the page. What nobody can see
//! (places never touched, swapped out, in transit) may be filled in without, and a store may be let
//! through where only loads were: what devices were told before stays true.
//!
//! # Examples
//!
//! A device that mirrors a process, in full: its page table is a map, and it reads through it.
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::Arc;
//! use uhmm::sim::{Machine, Mapping};
//! use uhmm::{
//!     Access, Device, Event, Frame, Page, PageEntry, PageRange, RangeFault, Residency,
//!     SystemMemory,
//! };
//!
//! struct Toy;
//!
//! struct PageTable {
//!     memory: Arc<dyn SystemMemory>,
//!     frames: BTreeMap<Page, Frame>,
//! }
//!
//! impl Device for Toy {
//!     type PageTable = PageTable;
//!     type Fence = ();
//!
//!     fn page_table(&self, _: PageRange, memory: &Arc<dyn SystemMemory>) -> PageTable {
//!         PageTable { memory: Arc::clone(memory), frames: BTreeMap::new() }
//!     }
//!
//!     fn map(&self, table: &mut PageTable, range: PageRange, entries: &[PageEntry]) {
//!         for (page, entry) in range.iter().zip(entries) {
//!             match entry.residency {
//!                 Residency::System(frame) if entry.access >= Access::Read => {
//!                     table.frames.insert(page, frame);
//!                 }
//!                 _ => drop(table.frames.remove(&page)),
//!             }
//!         }
//!     }
//!
//!     // Leave this empty, and the last read of this example panics: it finds a freed frame.
//!     fn invalidate(&self, table: &mut PageTable, event: &Event) {
//!         table.frames.retain(|page, _| !event.range().contains(page.address()));
//!     }
//! }
//!
//! let machine = Machine::new();
//! let process = machine.spawn();
//! let range = PageRange::new(0x10000, 0x4000)?;
//! process.map(range, Mapping::anonymous(Access::Write))?;
//! process.store_u64(0x10000, 42)?;
//!
//! let mirror = process.address_space().mirror(&Arc::new(Toy), range)?;
//! let read = || -> Option<u64> {
//!     let read = |table: &PageTable| {
//!         let mut word = [0; 8];
//!         table.memory.read(*table.frames.get(&range.first())?, 0, &mut word);
//!         Some(u64::from_ne_bytes(word))
//!     };
//!     mirror.inspect(read).expect("the process lives")
//! };
//! assert_eq!(read(), None);
//! mirror.range_fault(&RangeFault::read(range))?;
//! assert_eq!(read(), Some(42));
//!
//! // The page is swapped out: the device hears of it before it happens, and faults it in again.
//! assert_eq!(process.reclaim(range), 1);
//! assert_eq!(read(), None);
//! mirror.range_fault(&RangeFault::read(range))?;
//! assert_eq!(read(), Some(42));
//!
//! // After a fork, a store of the parent goes to a new page, and so does the device's next read.
//! let child = process.fork()?;
//! process.store_u64(0x10000, 43)?;
//! mirror.range_fault(&RangeFault::read(range))?;
//! assert_eq!((read(), child.load_u64(0x10000)?), (Some(43), 42));
//!
//! drop((mirror, process, child));
//! assert_eq!(machine.frames(), 0);
//! machine.check()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod access;
mod check;
mod error;
mod exclusive;
mod fault;
mod file;
mod fork;
mod host_memory;
mod isolation;
mod machine;
mod mapping;
mod object;
mod page_table;
mod pin;
mod placement;
mod process;
mod ram;
mod reclaim;
mod space;
mod state;
mod vma;

pub use error::SimError;
pub use file::File;
pub use host_memory::HostMemory;
pub use machine::{Machine, MachineOptions};
pub use pin::Pin;
pub use process::{Mapping, PageFlags, Process};
