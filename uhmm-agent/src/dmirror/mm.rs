//! The address space of this process, as the units of the device see it.
//!
//! # Where a page can be
//!
//! * On a private unit, *away*: moved out of the page table to memory of this process that the unit has
//!   ([`Process::host_memory`]). A touch brings it home.
//! * On a coherent unit, *in place*: it stays where it is, and [`Residents`] notes whose it is.
//! * On a private unit, in place: what the kernel does not let move, and the kernel's own device would
//!   have moved (copies of pages of private files, locked memory, and what may only be read where
//!   changes are not announced). A touch of such a page is not noticed.
//!
//! # Locks
//!
//! One for each unit, `moving`, held by whoever moves pages to it or evicts them. It is held across
//! migrations and announcements, so nobody who is called by those takes it. Nothing else is locked
//! here.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use uhmm::policy::Policies;
use uhmm::{DevicePagemap, EventKind, Mirror, Order, Owner, PageRange, PagemapOptions, Residency};
use uhmm_devices::dmirror::{Dmirror, Residents};
use uhmm_linux::{AttachError, Options, Process};

use super::{OpenFile, Unit, Units};

/// How long what can only be in the way for a moment is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// How long an eviction goes on. Pages that are in transit by then come home by themselves.
const EVICTION: Duration = Duration::from_secs(10);

/// How many pages are in transit at a time, whatever is asked for: who touches one waits for all.
pub(super) const AT_ONCE: Order = Order::new(12).unwrap();

/// How many pages a private unit can have: as many as there is address space for.
const PRIVATE_PAGES: u64 = 1 << 40;

/// This process, attached, with one device for each unit.
///
/// In a child of the process all of it answers as if the address space had ended, and its drop does
/// nothing.
pub struct Mm {
    /// There until the drop.
    inner: Option<Inner>,
}

struct Inner {
    places: [Place; 4],
    device: Arc<Dmirror>,
    units: Arc<dyn Units>,
    /// How many forks there had been when pages in place were last looked at.
    forks: AtomicU64,
    process: Process,
}

/// What a unit has of this process.
pub(super) struct Place {
    /// The memory of a private one.
    pub(super) pagemap: Option<Arc<DevicePagemap>>,
    /// What is in place there.
    pub(super) residents: Mirror<Residents>,
    moving: Mutex<()>,
}

impl Mm {
    /// Attaches this process, with its changes [announced](Options::announced) where that may be: not
    /// where this user may have no filter, nor in a child of a process that announces. To be called
    /// once in each process, at its first open.
    ///
    /// # Errors
    ///
    /// `EBUSY`: something else has attached it. `ENOSYS`: there is no userfaultfd, or no `/proc`.
    /// `ENOMEM`: there is no room.
    pub fn attach(units: Arc<dyn Units>) -> Result<Arc<Mm>, Errno> {
        match Mm::attach_with(Arc::clone(&units), Options::new().announced(true)) {
            Err(Errno::PERM) => Mm::attach_with(units, Options::new()),
            attached => attached,
        }
    }

    /// Attaches this process with these options. The
    /// [announced](Options::announced) ones are told of exactly, and the filter for that stays for good.
    ///
    /// # Errors
    ///
    /// As [`Mm::attach`], and `EPERM` where changes were to be announced and cannot be.
    pub fn attach_with(units: Arc<dyn Units>, options: Options) -> Result<Arc<Mm>, Errno> {
        let process = Process::attach(options).map_err(|error| match error {
            AttachError::AlreadyAttached => Errno::BUSY,
            AttachError::Userfaultfd { .. } | AttachError::Proc { .. } => Errno::NOSYS,
            AttachError::NotAnnounced { .. } => Errno::PERM,
            _ => Errno::NOMEM,
        })?;
        let place = |unit| Place::new(unit, &process, &units);
        let [a, b, c, d] = Unit::ALL.map(place);
        let places = [a?, b?, c?, d?];
        let forks = AtomicU64::new(process.forks());
        let device = Arc::new(Dmirror::new());
        let inner = Inner { places, device, units, forks, process };
        Ok(Arc::new(Mm { inner: Some(inner) }))
    }

    /// Opens a unit.
    ///
    /// # Errors
    ///
    /// `ENODEV`: in a child of the process that attached. `ENOMEM`: there is no room.
    pub fn open(self: &Arc<Mm>, unit: Unit) -> Result<OpenFile, Errno> {
        if !self.is_here() {
            return Err(Errno::NODEV);
        }
        let process = &self.inner().process;
        let mirror = match &self.place(unit).pagemap {
            Some(pagemap) => process.mirror_with(&self.inner().device, PageRange::ALL, pagemap),
            None => process.mirror(&self.inner().device, PageRange::ALL),
        };
        let mirror = mirror.map_err(|_| Errno::NOMEM)?;
        Ok(OpenFile::new(Arc::clone(self), unit, mirror))
    }

    /// Brings home every page of this process that is on the unit, with its contents: for
    /// [`Command::Release`](super::Command::Release) and for the last close.
    ///
    /// On return none is there that was when this was called, but for those that somebody has had in
    /// transit for 10 seconds. Does nothing in a child of the process.
    pub fn evict(&self, unit: Unit) {
        if !self.is_here() {
            return;
        }
        let _moving = self.moving(unit);
        self.forget_in_place(unit, PageRange::ALL);
        let Some(pagemap) = &self.place(unit).pagemap else { return };
        let deadline = Instant::now() + EVICTION;
        while pagemap.evict_all().is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        pagemap.reopen();
    }

    /// Brings home the pages of `range` that are on a coherent unit: somebody pins them for long.
    pub fn long_term_pin(&self, range: PageRange) {
        if self.is_here() {
            for unit in Unit::ALL.into_iter().filter(|unit| unit.is_coherent()) {
                self.forget_in_place(unit, range);
            }
        }
    }

    /// Has the calling thread make what it needs here that is memory of the program's heap. From then on
    /// what it does here takes none, whatever the program does to its heap.
    pub fn prepare_this_thread(&self) {
        if self.is_here() {
            self.process().reserve_this_thread();
        }
    }

    fn inner(&self) -> &Inner {
        self.inner.as_ref().expect("it is there until the drop")
    }

    /// Tells whether this is the process that attached.
    pub(super) fn is_here(&self) -> bool {
        self.inner().process.is_here()
    }

    pub(super) fn process(&self) -> &Process {
        &self.inner().process
    }

    pub(super) fn units(&self) -> &dyn Units {
        &*self.inner().units
    }

    pub(super) fn place(&self, unit: Unit) -> &Place {
        &self.inner().places[unit.index()]
    }

    /// Keeps others from moving pages to the unit, or from it by eviction.
    pub(super) fn moving(&self, unit: Unit) -> MutexGuard<'_, ()> {
        self.place(unit).moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has everybody know what the program has done to its memory so far.
    ///
    /// After a fork pages are shared by two processes, so none is in place any more.
    pub(super) fn catch_up(&self) {
        self.inner().process.catch_up();
        let forks = self.inner().process.forks();
        // Relaxed: whoever comes first does it, and the tables have locks of their own.
        if self.inner().forks.swap(forks, Ordering::Relaxed) != forks {
            for unit in Unit::ALL {
                self.forget_in_place(unit, PageRange::ALL);
            }
        }
    }

    /// Returns the parts of `range` that are in place on the unit, in ascending order.
    pub(super) fn in_place(&self, unit: Unit, range: PageRange) -> Vec<PageRange> {
        self.place(unit).residents.inspect(|table| table.residents(range)).unwrap_or_default()
    }

    /// Ends the stay of what is in place on the unit in `range`, and returns how many pages that were.
    /// No device has them translated any more when this returns.
    pub(super) fn forget_in_place(&self, unit: Unit, range: PageRange) -> u64 {
        let mut pages = 0;
        for part in self.in_place(unit, range) {
            pages += part.pages();
            self.inner().process.change(part, EventKind::Migrate, || ());
        }
        pages
    }

    /// Brings home what of `range` is on private units, and returns how many pages that were.
    pub(super) fn migrate_home(&self, range: PageRange) -> u64 {
        let process = &self.inner().process;
        range.blocks(AT_ONCE).map(|part| process.migrate_home(part).moved).sum()
    }

    /// Returns the pages of `range` that are away, in ascending order.
    pub(super) fn away(&self, range: PageRange) -> Vec<(PageRange, Residency, Order)> {
        let mut away = Vec::new();
        self.inner().process.away(range, &mut away);
        away
    }

    /// Returns by whom the memory of a private unit is known.
    pub(super) fn owner(&self, unit: Unit) -> Option<Owner> {
        self.place(unit).pagemap.as_ref().map(|pagemap| pagemap.owner())
    }
}

impl Place {
    fn new(unit: Unit, process: &Process, units: &Arc<dyn Units>) -> Result<Place, Errno> {
        let pagemap = (!unit.is_coherent()).then(|| {
            // One page comes home at a touch, or one huge page; and nothing makes room by itself.
            let options = PagemapOptions::new()
                .name(format!("unit {}", unit.number()))
                .policies(Policies::none());
            DevicePagemap::register_with(process.host_memory(PRIVATE_PAGES), options)
        });
        let units = Arc::clone(units);
        let left = move |pages| {
            if unit.is_coherent() {
                units.give_back(unit, pages);
            }
        };
        let residents = process.mirror(&Arc::new(Residents::new(left)), PageRange::ALL);
        let residents = residents.map_err(|_| Errno::NOMEM)?;
        Ok(Place { pagemap, residents, moving: Mutex::new(()) })
    }
}

impl Drop for Mm {
    fn drop(&mut self) {
        if !self.is_here() {
            // Its locks may be held by threads that are not in this process.
            std::mem::forget(self.inner.take());
        }
    }
}

impl fmt::Debug for Mm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mm").field("here", &self.is_here()).finish_non_exhaustive()
    }
}
