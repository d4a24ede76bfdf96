//! A process: what its threads, and an operating system on its behalf, do to its memory.

use std::fmt;
use std::sync::Arc;

use mmu_notifier::WouldBlock;

use super::error::SimError;
use super::fault::Space;
use super::file::File;
use super::machine::Machine;
use super::pin::Pin;
use super::vma::{Backing, Vma};
use crate::address_space::AddressSpace;
use crate::backend::Backend;
use crate::entry::Access;
use crate::page::{Page, PageRange};

/// A simulated process, or a thread's handle on it: a user of its address space. The drop of the
/// last user ends it.
///
/// Everything here may be called by any number of threads at a time. What changes an address space
/// announces as the kernel does; each method says with which [`EventKind`](crate::EventKind).
///
/// A change that needs a large page [split](Process::split) first announces that as a split: as
/// [`Clear`](crate::EventKind::Clear) of the large page, before its own announcement.
#[derive(Clone)]
pub struct Process {
    address_space: AddressSpace,
    space: Arc<Space>,
    machine: Machine,
}

/// What is to be mapped, and with what rights.
#[derive(Clone, Debug)]
pub struct Mapping {
    access: Access,
    huge: bool,
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Anonymous,
    Shared,
    File { file: File, first: u64, shared: bool },
}

/// What the page table notes of the use of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PageFlags {
    /// Somebody has stored to it, or was allowed to, since it was cleaned.
    pub dirty: bool,
    /// Somebody has used it, or was allowed to.
    pub young: bool,
    /// Somebody has stored to it, or was allowed to, since
    /// [`clear_soft_dirty`](Process::clear_soft_dirty).
    pub soft_dirty: bool,
    /// Nobody has stored to it since [`write_protect`](Process::write_protect).
    pub write_protected: bool,
}

impl Mapping {
    /// Private memory of zeroes.
    pub fn anonymous(access: Access) -> Mapping {
        Mapping { access, huge: false, source: Source::Anonymous }
    }

    /// Memory of zeroes that processes share after a fork: an unnamed file.
    pub fn shared(access: Access) -> Mapping {
        Mapping { access, huge: false, source: Source::Shared }
    }

    /// A file from page `first` on. Stores go to the file.
    pub fn file(file: &File, first: u64, access: Access) -> Mapping {
        let source = Source::File { file: file.clone(), first, shared: true };
        Mapping { access, huge: false, source }
    }

    /// A file from page `first` on. Stores make a copy of the page for this mapping.
    pub fn private_file(file: &File, first: u64, access: Access) -> Mapping {
        let source = Source::File { file: file.clone(), first, shared: false };
        Mapping { access, huge: false, source }
    }

    /// Chooses whether stores to untouched aligned blocks of 2 MiB make large pages, as far as
    /// there is room. Files never have large pages.
    #[must_use]
    pub fn huge(self, huge: bool) -> Mapping {
        Mapping { huge, ..self }
    }
}

impl Process {
    pub(super) fn new(space: Space) -> Process {
        let machine = Machine { shared: Arc::clone(&space.shared) };
        let space = Arc::new(space);
        let backend = Arc::clone(&space) as Arc<dyn Backend>;
        Process { address_space: AddressSpace::new(backend), space, machine }
    }

    /// Returns the address space, which devices mirror.
    pub fn address_space(&self) -> &AddressSpace {
        &self.address_space
    }

    /// Returns the machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Maps something at `range`, in the place of what was there (`MAP_FIXED`).
    ///
    /// Announces [`Unmap`](crate::EventKind::Unmap) if something was; large pages that reach out of
    /// `range` are split first.
    ///
    /// # Errors
    ///
    /// [`SimError::OutOfBounds`] if the file pages have no number. Nothing was changed.
    ///
    /// # Panics
    ///
    /// If the file is another machine's.
    #[doc(alias = "mmap")]
    pub fn map(&self, range: PageRange, mapping: Mapping) -> Result<(), SimError> {
        let Mapping { access, huge, source } = mapping;
        // Held until the mapping is a user of the file itself.
        let file = match &source {
            Source::Anonymous => None,
            Source::Shared => Some((self.machine.file(range.pages()), 0, true)),
            Source::File { file, first, shared } => Some((file.clone(), *first, *shared)),
        };
        let backing = match &file {
            None => Backing::Anonymous,
            Some((file, first, shared)) => {
                assert!(file.is_on(&self.machine.shared), "the file is another machine's");
                let bytes = range.va_range().len() as u64;
                let end = first.checked_add(range.pages());
                end.ok_or(SimError::OutOfBounds { address: *first, bytes })?;
                Backing::File { file: file.id(), first: *first, shared: *shared }
            }
        };
        let huge = huge && backing == Backing::Anonymous;
        self.space.map(Vma { range, rights: access.min(Access::Write), backing, huge });
        Ok(())
    }

    /// Unmaps whatever is mapped in `range`.
    ///
    /// Announces [`Unmap`](crate::EventKind::Unmap); large pages that
    /// reach out of `range` are [split](Process::split) first.
    #[doc(alias = "munmap")]
    pub fn unmap(&self, range: PageRange) {
        self.space.unmap(range);
    }

    /// Changes what the mappings in `range` allow. [`Access::Atomic`] is taken as
    /// [`Access::Write`].
    ///
    /// Announces [`ProtectionVma`](crate::EventKind::ProtectionVma); large pages that
    /// reach out of `range` are [split](Process::split) first.
    #[doc(alias = "mprotect")]
    pub fn protect(&self, range: PageRange, access: Access) {
        self.space.protect(range, access);
    }

    /// Moves what is mapped in `range` to `to`, in the place of what is there. Pages on devices and
    /// in transit come along.
    ///
    /// Announces [`Unmap`](crate::EventKind::Unmap) of both places; large pages that do not fit are
    /// split first.
    ///
    /// # Errors
    ///
    /// [`SimError::BadDestination`], and [`FaultError::Hole`](crate::FaultError::Hole) where
    /// nothing is mapped. Nothing was changed.
    #[doc(alias = "mremap")]
    pub fn remap(&self, range: PageRange, to: Page) -> Result<(), SimError> {
        self.space.remap(range, to)
    }

    /// Drops the pages of `range`: private memory is zeroes again, a file's pages stay in the file.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear); large pages that
    /// reach out of `range` are [split](Process::split) first.
    #[doc(alias = "MADV_DONTNEED")]
    pub fn discard(&self, range: PageRange) {
        self.space.discard(range);
    }

    /// Lets the next [`reclaim`](Process::reclaim) drop the private pages of `range` that nobody
    /// stores to before. Those swapped out are dropped at once, and those on devices or shared are
    /// left alone.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear); large pages that
    /// reach out of `range` are [split](Process::split) first.
    #[doc(alias = "MADV_FREE")]
    pub fn free(&self, range: PageRange) {
        self.space.free(range);
    }

    /// Swaps out the private pages of `range` that are in system memory, drops those that
    /// [`free`](Process::free) allows to, and unmaps file pages. Returns how many private pages
    /// left system memory. Large pages are split first; pinned and exclusively held pages stay.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear), in every address space that shares a page: once
    /// for each large page, and once for all else.
    pub fn reclaim(&self, range: PageRange) -> u64 {
        self.space.reclaim(range)
    }

    /// Brings in the pages of `range` that are swapped out, until there is no room. Returns how
    /// many came.
    ///
    /// Announces nothing: nobody can have a translation of such a page.
    pub fn swap_in(&self, range: PageRange) -> u64 {
        self.space.swap_in(range)
    }

    /// Moves the pages of `range` that are in system memory to other frames. Returns how many
    /// moved. Pinned and exclusively held pages stay, and those for which there is no room.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear), in every address space that shares a page.
    #[doc(alias = "compaction")]
    pub fn relocate(&self, range: PageRange) -> u64 {
        self.space.relocate(range)
    }

    /// Replaces single pages by large ones, in those aligned blocks of 2 MiB within `range` whose
    /// pages are all untouched or in system memory, private and used by nobody else. Returns how
    /// many large pages were made.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear) of those blocks.
    #[doc(alias = "khugepaged")]
    #[doc(alias = "MADV_COLLAPSE")]
    pub fn collapse(&self, range: PageRange) -> u64 {
        self.space.collapse(range)
    }

    /// Splits the large pages that `range` touches, wherever they are. Returns how many were split.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear) of each, in every address space that shares it.
    pub fn split(&self, range: PageRange) -> u64 {
        self.space.split_large(range)
    }

    /// Write-protects the pages of `range`. The first store to one goes through, and its
    /// [flag](PageFlags::write_protected) tells.
    ///
    /// Announces [`ProtectionVma`](crate::EventKind::ProtectionVma); large pages that
    /// reach out of `range` are [split](Process::split) first.
    #[doc(alias = "PM_SCAN_WP_MATCHING")]
    pub fn write_protect(&self, range: PageRange) {
        self.space.write_protect(range);
    }

    /// Clears the [soft-dirty flags](PageFlags::soft_dirty) of `range`.
    ///
    /// Announces [`SoftDirty`](crate::EventKind::SoftDirty); large pages that
    /// reach out of `range` are [split](Process::split) first.
    #[doc(alias = "clear_refs")]
    pub fn clear_soft_dirty(&self, range: PageRange) {
        self.space.clear_soft_dirty(range);
    }

    /// Drops all private anonymous memory of the process, without waiting for anybody. Returns how
    /// many pages there were.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear) without blocking.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`]: a device could not stop at once. Nothing was changed.
    pub fn oom_reap(&self) -> Result<u64, WouldBlock> {
        self.space.oom_reap()
    }

    /// Replaces a page of private memory by a copy whose first bytes are `bytes`, whatever the
    /// mapping's rights.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear) of the page.
    ///
    /// # Errors
    ///
    /// As a load, and [`SimError::NotPrivate`], [`SimError::Pinned`], [`SimError::OutOfMemory`],
    /// and [`SimError::OutOfBounds`] if the bytes do not fit a page.
    pub fn uprobe(&self, page: Page, bytes: &[u8]) -> Result<(), SimError> {
        self.space.uprobe(page, bytes)
    }

    /// Makes the pages of `range` usable by reference: they are in system memory, in frames that
    /// stay theirs until the pin is dropped. Pages on devices come home, and private ones that
    /// others share are copied first. Where the mapping allows no stores, zeroes never stored to
    /// and pages of a privately mapped file are pinned as they are: a store, once it is allowed,
    /// makes a copy that is not pinned.
    ///
    /// Announces [`Clear`](crate::EventKind::Clear) of pages that are copied.
    ///
    /// # Errors
    ///
    /// As a store, or as a load where the mapping allows no stores. Nothing is pinned.
    #[doc(alias = "pin_user_pages")]
    pub fn pin(&self, range: PageRange) -> Result<Pin, SimError> {
        self.space.pin(range)
    }

    /// Makes a child: private memory is shared until one of the two stores to it, also on devices,
    /// in transit and swapped out. Pinned pages are copied at once, and stay the parent's.
    ///
    /// Announces [`ProtectionPage`](crate::EventKind::ProtectionPage) to the parent's subscribers.
    ///
    /// # Errors
    ///
    /// [`SimError::OutOfMemory`]: no room for the copy of a pinned page. Nothing was changed.
    pub fn fork(&self) -> Result<Process, SimError> {
        self.space.fork().map(Process::new)
    }

    /// Drops this handle. If it was the last, the process ends.
    pub fn exit(self) {
        drop(self);
    }

    /// Loads bytes as a CPU does, each page in one step.
    ///
    /// # Errors
    ///
    /// [`SimError::Fault`] for the first page that cannot be had, and [`SimError::OutOfBounds`].
    pub fn load(&self, address: u64, bytes: &mut [u8]) -> Result<(), SimError> {
        self.space.load(address, bytes)
    }

    /// Stores bytes as a CPU does, each page in one step.
    ///
    /// # Errors
    ///
    /// As [`load`](Process::load). What is on pages before was stored.
    pub fn store(&self, address: u64, bytes: &[u8]) -> Result<(), SimError> {
        self.space.store(address, bytes)
    }

    /// Loads a 64-bit word in one step.
    ///
    /// # Errors
    ///
    /// As [`load`](Process::load), and [`SimError::Unaligned`].
    pub fn load_u64(&self, address: u64) -> Result<u64, SimError> {
        self.space.update(address, Access::Read, &mut |word| word)
    }

    /// Stores a 64-bit word in one step.
    ///
    /// # Errors
    ///
    /// As [`load`](Process::load), and [`SimError::Unaligned`].
    pub fn store_u64(&self, address: u64, value: u64) -> Result<(), SimError> {
        self.space.update(address, Access::Write, &mut |_| value).map(drop)
    }

    /// Adds to a 64-bit word in one step, wrapping, and returns what was there.
    ///
    /// # Errors
    ///
    /// As [`load`](Process::load), and [`SimError::Unaligned`].
    pub fn fetch_add_u64(&self, address: u64, value: u64) -> Result<u64, SimError> {
        self.space.update(address, Access::Write, &mut |word| word.wrapping_add(value))
    }

    /// Returns what the page table notes of `page`; `None` where it has no entry.
    pub fn flags(&self, page: Page) -> Option<PageFlags> {
        let state = self.space.shared.lock();
        state.entry(self.space.id, page).map(|(_, entry)| entry.flags)
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("address_space", &self.address_space).finish()
    }
}
