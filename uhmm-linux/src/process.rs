//! The calling process, attached.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use uhmm::{AddressSpace, Backend, PageRange};

use crate::announce::{Coverage, NoAnnouncement};
use crate::growth::Growth;
use crate::options::Options;
use crate::probe::{NoMigration, Plan, Probe, probe};
use crate::space::kernel::Kernel;
use crate::space::{Abilities, HostMemory, Immovable, Parts, Space};
use crate::sys::allocator;
use crate::sys::fork;
use crate::sys::maps::Maps;
use crate::sys::pagemap::Pagemap;
use crate::sys::thread;
use crate::sys::userfaultfd::{Features, Userfaultfd};

/// The [number](fork::process_number) of the process that is attached, or attaches; 0 if none is. A
/// child finds that of its parent, which is not its own.
static ATTACHED: AtomicU64 = AtomicU64::new(0);

/// The calling process as an address space, for as long as a clone of this exists.
///
/// It dereferences to an [`AddressSpace`], which has what devices need. The drop of the last user
/// detaches: devices are released, every page comes home, and the threads that served faults end.
#[derive(Clone)]
pub struct Process {
    address_space: AddressSpace,
    space: Arc<Space>,
    found: Arc<Found>,
}

/// What was found when the process attached.
struct Found {
    probe: Probe,
    migration: Result<(), NoMigration>,
}

/// Why a process cannot attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// This process is attached already.
    #[error("this process is attached already: use a clone of that `Process`")]
    AlreadyAttached,
    /// There is no userfaultfd, or not for this user.
    #[error(
        "userfaultfd is not available ({errno}): it takes a kernel with CONFIG_USERFAULTFD, and a \
         container that lets userfaultfd(2) through"
    )]
    Userfaultfd {
        /// What the kernel said.
        errno: Errno,
    },
    /// `/proc` does not tell what is mapped.
    #[error("/proc/self does not tell what is mapped ({errno}): mount /proc")]
    Proc {
        /// What the kernel said.
        errno: Errno,
    },
    /// Changes cannot be announced, as was [asked](Options::announced).
    #[error("changes cannot be announced: {why}")]
    NotAnnounced {
        /// Why not.
        why: NoAnnouncement,
    },
    /// There is no address space, no memory or no thread for it.
    #[error(
        "no room to attach ({errno}): raise RLIMIT_AS, RLIMIT_NPROC, or RLIMIT_MEMLOCK where \
         memory is locked as it is mapped, or lower `Options::staging_bytes`"
    )]
    NoRoom {
        /// What the kernel said.
        errno: Errno,
    },
}

/// Counts of what an attached process has seen. Each is exact by itself; they are not of one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessStatistics {
    /// Faults of CPUs on pages that were away, or next to some that were.
    pub faults: u64,
    /// Changes that the program made to its mappings, as far as they were of interest.
    pub events: u64,
    /// How often the kernel put an operation off until such a change had been looked at.
    pub retries: u64,
    /// Accesses of devices to mappings that were gone.
    pub stale_accesses: u64,
    /// Those on pages that were not away, which were filled with zeroes.
    pub zero_fills: u64,
    /// Those on pages that were on their way.
    pub faults_in_transit: u64,
    /// Those on pages that a device held exclusively.
    pub revoked: u64,
    /// Blocks of pages that were out when the program unmapped them, or mapped something over them.
    pub unmapped_out: u64,
    /// Blocks that were on their way when it did.
    pub unmapped_in_transit: u64,
    /// Blocks of pages that were out when the program discarded what was in them.
    pub discarded_out: u64,
    /// Blocks that were on their way when it did.
    pub discarded_in_transit: u64,
    /// Blocks of pages that were out when the program moved their mapping.
    pub remapped_out: u64,
    /// Blocks that were on their way when it did.
    pub remapped_in_transit: u64,
    /// Pages that came home because the process forked.
    pub fork_overrun: u64,
    /// Children made without the C library's `fork` while pages were away.
    pub unforeseen_forks: u64,
    /// Pages that had to be kept back for want of memory, once for each time.
    pub parked: u64,
    /// Accesses that failed since their page could not be brought home. It is still where it was.
    pub refused: u64,
    /// Pages of our own memory that are in use: for pages between the program and a device, in host
    /// memory, held exclusively, or parked.
    pub staging: u64,
    /// Pages of our own address space that could not be made usable again.
    pub lost_staging: u64,
    /// Pages that were dropped because the program had put something else in their place.
    pub replaced: u64,
    /// System calls of the program that were announced before they were made, and ended after
    /// ([`Options::announced`]).
    pub announced: u64,
}

impl Process {
    /// Attaches to the calling process.
    ///
    /// On return its memory is an address space that devices can mirror, and pages of it can move,
    /// unless [`migration`](Process::migration) says why not.
    /// Until then, and while nothing has moved and nothing is mirrored, nothing is different for the
    /// program. A child of it is not attached: in it this value answers that the address space
    /// has ended, and the child may attach by itself.
    ///
    /// # Errors
    ///
    /// [`AttachError`]. Nothing is left behind.
    pub fn attach(options: Options) -> Result<Process, AttachError> {
        let this = fork::process_number().map_err(|errno| AttachError::NoRoom { errno })?;
        // Of several threads one attaches.
        if ATTACHED.swap(this, Ordering::SeqCst) == this {
            return Err(AttachError::AlreadyAttached);
        }
        // What serves faults stays, wherever this is called.
        let process = allocator::private(|| Process::attach_once(options));
        if process.is_err() {
            detached();
        }
        process
    }

    fn attach_once(options: Options) -> Result<Process, AttachError> {
        let no_userfaultfd = |errno| AttachError::Userfaultfd { errno };
        let no_proc = |errno| AttachError::Proc { errno };
        if options.own_descriptors {
            thread::own_descriptors().map_err(|errno| AttachError::NoRoom { errno })?;
        }
        let probe = probe();
        let Plan { faults, features, migration } = probe.plan(options.only_hooked_forks);
        let uffd = Userfaultfd::open(faults, features).map_err(no_userfaultfd)?;
        let pagemap = Pagemap::open().map_err(no_proc)?;
        let maps = Maps::open().map_err(no_proc)?;
        let managed = match options.managed {
            None if allocator::is_installed() => None,
            managed => Some(managed.unwrap_or_default()),
        };
        let no_room = |errno| AttachError::NoRoom { errno };
        let kernel = Kernel::new(uffd, pagemap, maps, options.injector).map_err(no_room)?;
        let parts = Parts {
            kernel,
            staging_bytes: if migration.is_ok() { options.staging_bytes } else { 0 },
            abilities: Abilities {
                migrate: migration.is_ok(),
                sees_forks: features.contains(Features::EVENT_FORK),
            },
            max_registrations: options.max_registrations,
            managed,
            servers: options.servers,
            own_descriptors: options.own_descriptors,
            patience: options.patience,
        };
        let space = Space::new(parts).map_err(no_room)?;
        let address_space = AddressSpace::new(Arc::clone(&space) as Arc<dyn Backend>);
        if options.announced {
            space.begin_announcements().map_err(|why| AttachError::NotAnnounced { why })?;
        }
        let found = Arc::new(Found { probe, migration });
        Ok(Process { address_space, space, found })
    }

    /// Returns the address space.
    pub fn address_space(&self) -> &AddressSpace {
        &self.address_space
    }

    /// Tells whether pages of this process can move to devices.
    ///
    /// Where they cannot, everything else can be done: devices can mirror the process, fault its pages
    /// in and use them where they are. Migrations leave every page where it is, and exclusive access
    /// fails, both with [`StayReason::Unsupported`](uhmm::StayReason::Unsupported).
    ///
    /// # Errors
    ///
    /// Why they cannot, and what would have to be different.
    pub fn migration(&self) -> Result<(), NoMigration> {
        self.found.migration
    }

    /// Returns what the announcements of changes cover, where they were [asked
    /// for](Options::announced).
    pub fn coverage(&self) -> Option<Coverage> {
        self.space.coverage()
    }

    /// Returns the backend.
    pub(crate) fn space(&self) -> &Space {
        &self.space
    }

    /// Returns what was found when the process attached: every feature of the kernel's that is used
    /// or missing.
    pub fn probe(&self) -> &Probe {
        &self.found.probe
    }

    /// Makes device memory of at most `pages` pages out of the process's own memory. Pages move there
    /// and back without being copied. Register it as a [`DevicePagemap`](uhmm::DevicePagemap).
    pub fn host_memory(&self, pages: u64) -> Arc<HostMemory> {
        Arc::new(HostMemory::new(&self.space, pages))
    }

    /// Lets `range` move to devices, where not everything may anyway. The same promise as that of
    /// [`Options::manage`].
    pub fn manage(&self, range: PageRange) {
        self.space.manage(range);
    }

    /// Keeps the stack of the calling thread from moving to a device.
    ///
    /// Every thread that faults pages in for a device, moves or looks at them is kept so by itself.
    /// This is for those that do nothing but look into mirrors, or tell them of changes, before they
    /// do so for the first time: while they hold a mirror's lock, others may be waiting for it in
    /// order to bring a page home.
    pub fn reserve_this_thread(&self) {
        self.space.reserve_this_thread();
    }

    /// Returns the memory that may move to devices, in ascending order: private memory without a file
    /// that is mapped to be read and written, less what [stays](uhmm::StayReason::Reserved) since serving a
    /// fault may need it. What of it is there, [`resident`](Process::resident) tells.
    pub fn movable(&self) -> Vec<PageRange> {
        self.space.movable_ranges()
    }

    /// Appends the parts of `range` to `out` that take memory now, in ascending order: not what is
    /// away, was never touched, or is the page of zeroes that all share. Faults nothing in.
    ///
    /// It takes about 13 ms for each GiB of single pages, and next to nothing where none are.
    pub fn resident(&self, range: PageRange, out: &mut Vec<PageRange>) {
        self.space.resident_parts(range, out);
    }

    /// Returns how much memory of the process does not move and why: all that is there and that
    /// [`movable`](Process::movable) is without. Faults nothing in.
    ///
    /// It takes as long as [`resident`](Process::resident) does for all of it.
    pub fn immovable(&self) -> Immovable {
        self.space.immovable()
    }

    /// Has `growth` asked before the program gets more memory, from now until
    /// [`end_hold`](Process::end_hold) or the next fork: each first touch of a page of what is
    /// [movable](Process::movable) and mapped now waits until it is admitted. Returns how many pages
    /// could not be had so, for want of registrations or since their mappings changed.
    ///
    /// The kernel tells of no new mapping: what the program maps after this is not held, and a call
    /// once more holds that too. The first `growth` that is given stays for good. It goes on being
    /// asked, after the end of the hold too, about the pages for which a first touch is a fault of
    /// this process's servers anyway: those next to some that are away.
    ///
    /// While it lasts a first touch costs as much as a page that comes home, for all pages together
    /// that are admitted at once; calls that unmap, move or discard memory wait until they are heard;
    /// and there are no new huge pages. Whoever waits is not interrupted by signals, so that `growth`
    /// must have a limit.
    pub fn hold_growth(&self, growth: &Arc<dyn Growth>) -> u64 {
        self.space.hold_growth(growth)
    }

    /// Ends the hold on growth. Registrations are given up now, or when nothing is away any more.
    pub fn end_hold(&self) {
        self.space.end_hold();
    }

    /// Has those asked for again that wait for room, soon.
    pub fn resume_growth(&self) {
        self.space.resume_growth();
    }

    /// Writes to the standard error output of the program, as far as it has one: also from a thread
    /// that has [descriptors of its own](Options::own_descriptors).
    pub fn tell(text: &str) {
        thread::tell(text);
    }

    /// Keeps `range` from moving from now on, and brings home what of it is away: for memory that
    /// serving a fault may need, besides what is known to.
    ///
    /// To be called with nothing locked that a fault may need.
    pub fn reserve(&self, range: PageRange) {
        self.space.reserve(range);
    }

    /// Keeps what the dynamic loader has noted of loaded objects from moving, as far as it was loaded
    /// since this was last called, or since the process attached. Where this crate is in a shared
    /// library, serving a fault may need it: to be called before anything is moved that may lie in
    /// the C library's heap.
    pub fn reserve_loader(&self) {
        self.space.reserve_loader();
    }

    /// Keeps the arguments and the environment that the program was given from moving, so that others
    /// can read them as ever (`/proc/PID/cmdline`, `ps`).
    pub fn reserve_arguments(&self) {
        self.space.reserve_arguments();
    }

    /// Returns what happened so far.
    pub fn statistics(&self) -> ProcessStatistics {
        let counters = &self.space.counters;
        // Relaxed: each count is a number by itself.
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (staging, lost_staging) = self.space.staging_use();
        let overtaken = self.space.overtaken();
        ProcessStatistics {
            staging,
            lost_staging,
            refused: read(&counters.refused),
            faults: read(&counters.faults),
            events: read(&counters.events),
            retries: read(&counters.retries),
            stale_accesses: read(&counters.stale_accesses),
            zero_fills: read(&counters.zero_fills),
            faults_in_transit: read(&counters.faults_in_transit),
            revoked: read(&counters.revoked),
            unmapped_out: overtaken.unmapped.out,
            unmapped_in_transit: overtaken.unmapped.in_transit,
            discarded_out: overtaken.discarded.out,
            discarded_in_transit: overtaken.discarded.in_transit,
            remapped_out: overtaken.remapped.out,
            remapped_in_transit: overtaken.remapped.in_transit,
            fork_overrun: read(&counters.fork_overrun),
            unforeseen_forks: read(&counters.unforeseen_forks),
            parked: read(&counters.parked),
            replaced: read(&counters.replaced),
            announced: read(&counters.announced),
        }
    }
}

/// Notes that the process is not attached any more.
pub(crate) fn detached() {
    ATTACHED.store(0, Ordering::SeqCst);
}

impl Deref for Process {
    type Target = AddressSpace;

    fn deref(&self) -> &AddressSpace {
        &self.address_space
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("address_space", &self.address_space)
            .finish_non_exhaustive()
    }
}
