//! The userfaultfd of an attached process, with failures on demand.
//!
//! Everything that the space asks of the kernel and that can fail goes through here, so that a test
//! can make each step fail (the step names are those of
//! [`Options::injector`](crate::Options::injector)).
//!
//! A child inherits the descriptor, and with it the power over its parent's memory. So in a child
//! every step fails.

use rustix::io::Errno;
use uhmm::{Injector, Page, PageRange};

use crate::sys::advise;
use crate::sys::fork::ForkMark;
use crate::sys::maps::{Maps, Vma};
use crate::sys::pagemap::{Categories, Pagemap};
use crate::sys::userfaultfd::{Messages, Modes, MoveOptions, Progress, Userfaultfd};

/// What the space knows of the kernel.
pub(crate) struct Kernel {
    uffd: Userfaultfd,
    pagemap: Pagemap,
    maps: Maps,
    injector: Option<Injector>,
    /// Tells the process that attached from its children.
    mark: ForkMark,
}

impl Kernel {
    pub(crate) fn new(
        uffd: Userfaultfd,
        pagemap: Pagemap,
        maps: Maps,
        injector: Option<Injector>,
    ) -> Result<Kernel, Errno> {
        Ok(Kernel { uffd, pagemap, maps, injector, mark: ForkMark::new()? })
    }

    /// Tells whether this is the process whose kernel this is, and not a child of it.
    pub(super) fn is_here(&self) -> bool {
        self.mark.is_ours()
    }

    /// Returns what memory this takes that is looked at by servers.
    pub(super) fn own_memory(&self) -> PageRange {
        self.mark.range()
    }

    /// Fails where a test wants it.
    fn step(&self, name: &'static str, error: Errno) -> Result<(), Errno> {
        match &self.injector {
            _ if !self.is_here() => Err(Errno::SRCH),
            Some(injector) if injector.fails(name) => Err(error),
            _ => Ok(()),
        }
    }

    /// Tells whether a step that is none of the kernel's may succeed.
    pub(super) fn allows(&self, name: &'static str) -> bool {
        self.step(name, Errno::NOMEM).is_ok()
    }

    fn progress(
        &self,
        name: &'static str,
        error: Errno,
        run: impl FnOnce() -> Progress,
    ) -> Progress {
        match self.step(name, error) {
            Ok(()) => run(),
            result => Progress { pages: 0, result },
        }
    }

    pub(super) fn uffd(&self) -> &Userfaultfd {
        &self.uffd
    }

    pub(super) fn register(&self, range: PageRange, modes: Modes) -> Result<(), Errno> {
        self.step("register", Errno::NOMEM)?;
        self.uffd.register(range, modes)
    }

    pub(super) fn unregister(&self, range: PageRange) -> Result<(), Errno> {
        self.step("unregister", Errno::NOMEM)?;
        self.uffd.unregister(range)
    }

    pub(super) fn wake(&self, range: PageRange) -> Result<(), Errno> {
        self.step("wake", Errno::AGAIN)?;
        self.uffd.wake(range)
    }

    /// Moves pages and wakes nobody.
    pub(super) fn move_out(&self, from: PageRange, to: Page) -> Progress {
        let options = MoveOptions { wake: false, allow_holes: false };
        self.progress("move", Errno::NOMEM, || self.uffd.move_pages(from, to, options))
    }

    /// Moves pages and wakes whoever waits for them.
    pub(super) fn move_home(&self, from: PageRange, to: Page) -> Progress {
        let options = MoveOptions { wake: true, allow_holes: false };
        self.progress("move", Errno::NOMEM, || self.uffd.move_pages(from, to, options))
    }

    /// Asks whether `range` is one mapping, registered with us, that pages can move to, by moving
    /// nothing there: pages that do not exist, from `nothing` on.
    ///
    /// EINVAL says that it is not, ENOENT that there is no mapping, EAGAIN that mappings change now.
    pub(super) fn ask(&self, nothing: Page, range: PageRange) -> Result<(), Errno> {
        let options = MoveOptions { wake: false, allow_holes: true };
        let nothing = PageRange::from_pages(nothing, range.pages()).expect("as many pages");
        let progress = self.uffd.move_pages(nothing, range.first(), options);
        match progress.result {
            // It came as far as to a page that is there.
            Err(_) if progress.pages > 0 => Ok(()),
            Err(Errno::EXIST) => Ok(()),
            result => result,
        }
    }

    /// Tells whether `page` is of a mapping that is registered with us, whatever that mapping allows,
    /// by copying there from where nothing can be read.
    ///
    /// # Errors
    ///
    /// EAGAIN: mappings change now, so it cannot be told.
    pub(super) fn is_registered(&self, unreadable: Page, page: Page) -> Result<bool, Errno> {
        match self.uffd.copy(unreadable, page.into(), false).result {
            Err(Errno::FAULT | Errno::EXIST) => Ok(true),
            // The kernel looks for the mapping first: it may just have moved.
            Err(Errno::NOENT) if self.uffd.changing() => Err(Errno::AGAIN),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
            Ok(()) => unreachable!("what cannot be read cannot be copied"),
        }
    }

    pub(super) fn copy_home(&self, from: Page, to: PageRange) -> Progress {
        self.progress("copy", Errno::NOMEM, || self.uffd.copy(from, to, true))
    }

    pub(super) fn zeropage(&self, range: PageRange) -> Progress {
        self.progress("zeropage", Errno::NOMEM, || self.uffd.zeropage(range, true))
    }

    pub(super) fn populate(&self, range: PageRange, write: bool) -> Result<(), Errno> {
        self.step("populate", Errno::NOMEM)?;
        self.step("interrupt", Errno::INTR)?;
        match write {
            true => advise::populate_write(range),
            false => advise::populate_read(range),
        }
    }

    pub(super) fn scan(
        &self,
        range: PageRange,
        any_of: Categories,
        out: &mut Vec<(PageRange, Categories)>,
    ) -> Result<(), Errno> {
        self.step("scan", Errno::NOMEM)?;
        let report = Categories::PRESENT
            | Categories::SWAPPED
            | Categories::PFNZERO
            | Categories::HUGE
            | Categories::FILE
            | Categories::GUARD;
        self.pagemap.scan(range, any_of, report, out)
    }

    /// Reads the page table's entries of the pages of `range`.
    pub(super) fn pagemap_entries(&self, range: PageRange, out: &mut [u64]) -> Result<(), Errno> {
        self.step("scan", Errno::NOMEM)?;
        self.pagemap.entries(range, out)
    }

    /// Tells whether a page is locked in memory.
    pub(super) fn is_locked(&self, page: Page) -> bool {
        advise::is_locked(page.into())
    }

    /// Returns what is mapped, as far as it can be told.
    pub(super) fn vmas(&self) -> Vec<Vma> {
        self.maps.all().unwrap_or_default()
    }

    pub(super) fn vma(&self, page: Page) -> Result<Option<Vma>, Errno> {
        self.maps.at_or_after(page)
    }

    pub(super) fn mapping_name(&self, page: Page) -> Result<Vec<u8>, Errno> {
        self.maps.name(page)
    }

    pub(super) fn read(&self, messages: &mut Messages) -> Result<usize, Errno> {
        self.uffd.read_now(messages)
    }
}
