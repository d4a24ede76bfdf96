//! What an address space must be able to do, so that everything else here can be built on it.
//!
//! [`sim`](crate::sim) is one backend, a live process is another. A backend owns the CPUs' page
//! tables and the pages, and announces each change to them; it knows nothing of mirrors, policies
//! or retries. What it promises:
//!
//! * An entry that a device could have been told of changes only within an announcement, made on
//!   [`notifiers`](Backend::notifiers), of every address space that has the page mapped. Filling in
//!   an empty entry is no such change, and neither is what becomes of a page
//!   [in transit](Residency::InTransit): nobody holds a translation to those. Announcements have no
//!   [owner](mmu_notifier::Owner), except those that take pages [exclusively](Backend::exclusive):
//!   whose device a page leaves or reaches must hear of it like all others.
//! * Every page has one current copy. Between [`isolate`](Backend::isolate) and the commit or drop
//!   of the [`Isolation`] nobody can reach its pages: CPUs that touch one sleep, devices are
//!   told that it is in transit.
//! * No call waits for an isolation while it holds anything that a commit needs, nor for the calling
//!   thread's own.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use mmu_notifier::{Owner, Subscriptions};

use crate::address_space::{Death, SpaceId};
#[cfg(doc)]
use crate::entry::Residency;
use crate::entry::{Access, DeviceLocation, Frame, PageEntry};
use crate::error::{FaultError, Stayed};
use crate::page::{Order, Page, PageRange};
use crate::pagemap::DeviceBlock;

/// How the changes to an address space become known, the weaker first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Coherence {
    /// Changes are seen after they were made: a device may use a stale page for a moment.
    Observed,
    /// Changes are announced before they are made and ended after: no device ever uses a stale
    /// page.
    Announced,
}

/// An address space as the platform provides it. See the [module](self) for what it promises.
pub trait Backend: Send + Sync + 'static {
    /// Returns the identity of the address space, which never changes.
    fn id(&self) -> SpaceId;

    /// Returns what the changes to this address space are announced on.
    fn notifiers(&self) -> &Arc<Subscriptions>;

    /// Returns how changes become known.
    fn coherence(&self) -> Coherence;

    /// Returns the system memory that the frames of entries are in.
    fn memory(&self) -> Arc<dyn SystemMemory>;

    /// Appends what the page tables say of each page of `range`, in order, and faults nothing. The
    /// order of an entry is that of the mapping, and may reach out of the range. The entries may be
    /// of different moments.
    fn snapshot(&self, range: PageRange, entries: &mut Vec<PageEntry>);

    /// Makes each page of `range` one that can be used for `access`, as if a CPU touched it, except
    /// that pages in the memory of `keep` stay there if the mapping there allows `access`.
    ///
    /// On success each page was usable at some moment; it may have changed again since. `access` is
    /// [`Access::Read`] or [`Access::Write`].
    ///
    /// # Errors
    ///
    /// The first page that cannot be had, and why. Pages before it were faulted.
    fn fault(
        &self,
        range: PageRange,
        access: Access,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError>;

    /// Takes pages out of every page table, so that they can be copied elsewhere. Best effort: what
    /// cannot be taken is listed with the reason. Waits for nobody but devices to stop, and announces
    /// nothing where there is nothing to take.
    ///
    /// The reasons: [`Hole`](crate::StayReason::Hole) and
    /// [`Elsewhere`](crate::StayReason::Elsewhere) for what a selection of device pages does not
    /// find there, [`AlreadyThere`](crate::StayReason::AlreadyThere) where pages in system memory are
    /// selected for those that are in the memory they are to go to, `Elsewhere` for those on other
    /// devices, and what stands in the way for all others:
    /// [`Reserved`](crate::StayReason::Reserved), [`Locked`](crate::StayReason::Locked),
    /// [`ReadOnly`](crate::StayReason::ReadOnly), [`Handled`](crate::StayReason::Handled) and
    /// [`Unsupported`](crate::StayReason::Unsupported) are those of pages that this backend will not
    /// take for as long as they are mapped the way they are. A page that is mapped several times in
    /// `range` is taken once: its other places are neither among the pages nor among those that
    /// stayed.
    ///
    /// A large page that `range` holds whole is taken whole. Of one that reaches out of `range` the
    /// backend takes the part within, splitting it, or nothing, as
    /// [`StayReason::LargePage`](crate::StayReason::LargePage).
    fn isolate(&self, range: PageRange, select: Select) -> Box<dyn Isolation>;

    /// Keeps the CPUs and all other devices off the pages of `range` until one touches them, on
    /// behalf of `owner`: faults each in for writing, and announces
    /// [`EventKind::Exclusive`](mmu_notifier::EventKind::Exclusive), by `owner` where each page stays
    /// in its frame, and by nobody where it does not.
    ///
    /// # Errors
    ///
    /// The first page that cannot be held, and why. Pages before it are held. A page in the memory of
    /// `owner` that the device may not store to, as after a fork, comes home and is held there.
    fn exclusive(
        &self,
        range: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError>;

    /// Gives back the pages of `range` that `owner` still holds, within an announcement.
    fn end_exclusive(&self, range: PageRange, owner: Owner);

    /// Takes note that a mirror of `range` has ended: nobody has to hear of changes there on its
    /// behalf any more. Others may mirror the same pages
    /// ([`Subscriptions::subscribed`](mmu_notifier::Subscriptions::subscribed) tells). It is called
    /// after the mirror's end, by whoever ends it, also in a callback and after the death of the
    /// address space, so it must not wait. The default does nothing.
    fn mirror_ended(&self, range: PageRange) {
        let _ = range;
    }

    /// Takes the address space apart: it has no users any more. Called once, after the release of
    /// [`notifiers`](Backend::notifiers). Evictions, which are no users, may still be under way: what
    /// they have in transit is freed by them.
    #[doc(alias = "exit_mmap")]
    fn exit(&self, death: Death);
}

/// System memory, as devices reach it.
///
/// The frames come from page entries. Using one outside the time for which the entry was true is
/// what this project exists to prevent; a simulated memory detects it.
pub trait SystemMemory: Send + Sync + 'static {
    /// Copies `bytes.len()` bytes out of `frame` and its successors, from `offset` bytes into it.
    fn read(&self, frame: Frame, offset: usize, bytes: &mut [u8]);

    /// Copies `bytes` into `frame` and its successors, from `offset` bytes into it.
    fn write(&self, frame: Frame, offset: usize, bytes: &[u8]);

    /// Does what [`read`](SystemMemory::read) does, and tells how many of the first bytes came from
    /// memory that is still what `frame` stood for, as far as that can be told. The default tells of
    /// all: it is for memory where a frame that is used in time cannot be gone.
    fn try_read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) -> usize {
        self.read(frame, offset, bytes);
        bytes.len()
    }

    /// Does what [`write`](SystemMemory::write) does, and tells how many of the first bytes went to
    /// memory that is still what `frame` stood for. The others went nowhere.
    fn try_write(&self, frame: Frame, offset: usize, bytes: &[u8]) -> usize {
        self.write(frame, offset, bytes);
        bytes.len()
    }

    /// Replaces the aligned 64-bit word at `offset` by `update` of it, in one step that no other
    /// access comes between, and returns what was there. `update` may be called several times.
    fn fetch_update(&self, frame: Frame, offset: usize, update: &mut dyn FnMut(u64) -> u64) -> u64;
}

/// Which pages to isolate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// Those in system memory, and places in a mapping that have no page yet.
    System {
        /// Whose memory they are to go to.
        to: Owner,
    },
    /// Those in the device memory of this owner.
    Device(Owner),
    /// Those in the device memory of anybody else than this owner.
    Foreign(Owner),
}

/// Pages that have been taken out of all page tables: nobody reaches them until they are committed
/// to a place, or put back by dropping this.
pub trait Isolation: Send + fmt::Debug {
    /// Returns the system memory that the frames of this isolation are in.
    fn memory(&self) -> Arc<dyn SystemMemory>;

    /// Returns the reverse map that these pages will be found by on a device.
    fn reverse_map(&self) -> Arc<dyn ReverseMap>;

    /// Returns the pages that were taken, in ascending order of address where they have one.
    fn pages(&self) -> &[IsolatedPage];

    /// Returns the device memory that the page at `index` is in, if it is on a device.
    fn block(&self, index: usize) -> Option<&DeviceBlock>;

    /// Returns the pages that were asked for and not taken, with the reason for each.
    fn stayed(&self) -> &[Stayed];

    /// Splits the large page at `index` into single ones, which take its place in
    /// [`pages`](Isolation::pages).
    ///
    /// # Errors
    ///
    /// [`CannotSplit`]: it stays as it was.
    fn split(&mut self, index: usize) -> Result<(), CannotSplit>;

    /// Allocates system memory for the page at `index` to come home to: a block of its order.
    /// Belongs to the isolation until it is committed there.
    ///
    /// Of a page on a device that is [in place](DeviceBlock::in_place) in system memory, that may be
    /// the frame where it is. Then there is nothing to copy, and the commit takes the memory over
    /// from the block before it drops it.
    ///
    /// # Errors
    ///
    /// [`OutOfSystemMemory`]. For a large page, splitting it may help.
    fn allocate_home(&mut self, index: usize) -> Result<Frame, OutOfSystemMemory>;

    /// Ends the isolation: page `i` is now where `placements[i]` says, with the contents that are
    /// there, and can be used again. Cannot fail: what was allocated for another place is freed,
    /// and what the page leaves is freed.
    ///
    /// A block of device memory that is [in place](DeviceBlock::in_place) at the frame that the page
    /// is in is no other place: the contents stay where they are, and the memory is the block's from
    /// now on. A block that adopted the frame and is not placed was dropped before this call, and
    /// before a drop of the isolation.
    ///
    /// Returns for each page whether there was somebody left to have it: a page that was unmapped
    /// meanwhile is dropped, wherever it was to go.
    fn commit(self: Box<Self>, placements: Vec<Placement>) -> Vec<Committed>;
}

/// A page that has been isolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsolatedPage {
    /// Its address in the address space that was asked; where it was found by the
    /// [`ReverseMap`], one of its addresses, for diagnostics.
    pub page: Page,
    /// Its size.
    pub order: Order,
    /// Where its contents are.
    pub source: Source,
}

/// Where the contents of an isolated page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: never touched, or the shared zero page. They are zeroes.
    Zero,
    /// In system memory.
    System(Frame),
    /// In device memory.
    Device(DeviceLocation),
}

/// Where an isolated page is to be from now on.
#[derive(Debug)]
pub enum Placement {
    /// Where it was.
    Back,
    /// In this block of device memory, of the page's order: a copy, or the frame itself where the
    /// block is [in place](DeviceBlock::in_place) there.
    Device(DeviceBlock),
    /// In the system memory that [`Isolation::allocate_home`] gave.
    Home,
}

/// What became of an isolated page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// It is where it was to go.
    Placed,
    /// It was unmapped meanwhile, and is no more.
    Gone,
}

/// A large page could not be split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the large page cannot be split")]
pub struct CannotSplit;

/// There is no free system memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no free system memory for the page to come home to")]
pub struct OutOfSystemMemory;

/// Finds device pages without looking at any address space (acceptance X09).
pub trait ReverseMap: Send + Sync + 'static {
    /// Does what [`Backend::isolate`] does for these pages of device memory, wherever they are
    /// mapped. A location that is not yet, or not any more, a page of the map is skipped in silence.
    /// If another page has come to be there meanwhile, it is that one that is taken.
    fn isolate(&self, locations: &[DeviceLocation]) -> Box<dyn Isolation>;
}
