//! What is mapped and what is there, as the CPUs have it: for devices that show it to somebody.
//!
//! These are looks at one moment of each page. They fault nothing in, wait for no page, and have no
//! part in any protocol: to let a device use a page takes a range fault.

use bitflags::bitflags;
use uhmm::{Access, Order, PAGE_SIZE, Page, PageRange, Residency};

use crate::process::Process;
use crate::sys::maps::{Kind, Vma};

/// A mapping of the process: addresses in a row with the same rights, backed by the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mapping {
    /// Where it is.
    pub range: PageRange,
    /// What its rights let a device do. Memory that may be written and not read is nothing to it.
    pub rights: Access,
    /// Whether it may be written, whatever else.
    pub writable: bool,
    /// Whether others see what is written.
    pub shared: bool,
    /// The size of its smallest pages.
    pub page_order: Order,
    /// What backs it.
    pub kind: MappingKind,
}

/// What backs a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MappingKind {
    /// Private memory without a file.
    Anonymous,
    /// A file, which may be one of tmpfs, or a device.
    File,
    /// Shared memory that has no name in a file system, though it be mapped privately.
    Shmem,
    /// Pages that the kernel has taken out of its own sight (`memfd_secret`).
    Secret,
    /// Huge pages that were set aside for this.
    Hugetlb,
    /// The kernel's own: vdso, vvar and others.
    Special,
}

bitflags! {
    /// What the page table says of a page.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PageFlags: u8 {
        /// It is in memory and mapped.
        const PRESENT = 1 << 0;
        /// It is the page of zeroes that all share.
        const ZERO = 1 << 1;
        /// It is a part of a huge page that is mapped as one.
        const HUGE = 1 << 2;
        /// It belongs to a file, or to shared memory.
        const FILE = 1 << 3;
        /// It is swapped out.
        const SWAPPED = 1 << 4;
        /// It is a guard.
        const GUARD = 1 << 5;
        /// Nobody else has it mapped.
        const EXCLUSIVE = 1 << 6;
    }
}

impl Process {
    /// Returns the mapping that holds `page`, or the next one above it; `None` if there is none, or if
    /// it cannot be told. Takes about half a microsecond on Linux 6.11 and later.
    pub fn mapping(&self, page: Page) -> Option<Mapping> {
        self.space().mapping(page)
    }

    /// Returns the name that `/proc/self/maps` has for the mapping that holds `page`: a path, or
    /// a word in brackets; empty if there is none, if it is longer than 255 bytes, or nothing is mapped.
    pub fn mapping_name(&self, page: Page) -> Vec<u8> {
        self.space().mapping_name(page)
    }

    /// Appends what the page table says of each page of `range`, in order. Nothing is said of a page
    /// that is away, and of one that the kernel cannot be asked about.
    pub fn page_flags(&self, range: PageRange, out: &mut Vec<PageFlags>) {
        self.space().page_flags(range, out);
    }

    /// Appends the parts of `range` that are not in the page table because they are on a device, held by
    /// one, or on their way, in ascending order, each with where its first page is and the size of the
    /// block that it is in. Neighbours are not joined. [`snapshot`](uhmm::AddressSpace::snapshot) says
    /// the same and more, and has the kernel watch what it says it of; this does not.
    pub fn away(&self, range: PageRange, out: &mut Vec<(PageRange, Residency, Order)>) {
        self.space().away(range, out);
    }

    /// Tells whether this is the process that attached, and not a child that has a copy of this
    /// value. In a child nothing else of it is to be used or dropped: locks may be held by threads
    /// that the child does not have.
    pub fn is_here(&self) -> bool {
        self.space().is_here()
    }

    /// Returns how many times this process has made a child that got a copy of its memory, as far as
    /// is known: by `fork` of the C library, or while memory was out or mirrored. A fork that was known
    /// by both may count twice. Who compares two answers knows whether there was one between.
    pub fn forks(&self) -> u64 {
        self.space().forks()
    }

    /// Returns when every device has been told of what the program had done to its mappings before
    /// this was called, as far as the kernel tells of it.
    ///
    /// The kernel lets the program go on when it has told; devices are told a moment later. To be
    /// called with nothing held that a device needs to stop, and not in a callback.
    pub fn catch_up(&self) {
        self.space().catch_up();
    }
}

impl Mapping {
    pub(crate) fn of(vma: &Vma) -> Mapping {
        let kind = match vma.kind {
            Kind::Anonymous | Kind::Heap | Kind::Stack => MappingKind::Anonymous,
            Kind::File => MappingKind::File,
            Kind::Shmem => MappingKind::Shmem,
            Kind::Secret => MappingKind::Secret,
            Kind::Hugetlb => MappingKind::Hugetlb,
            Kind::Special => MappingKind::Special,
        };
        let (rights, writable, shared) = (vma.rights(), vma.writable, vma.shared);
        let order = (vma.page_size / PAGE_SIZE as u64).checked_ilog2().unwrap_or(0);
        let page_order = u8::try_from(order).ok().and_then(Order::new).unwrap_or(Order::MAX);
        Mapping { range: vma.range, rights, writable, shared, page_order, kind }
    }
}
