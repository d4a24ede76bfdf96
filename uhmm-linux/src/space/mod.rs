//! The calling process as a backend: what [`Process`](crate::Process) attaches.
//!
//! # Who may do what, and why nothing hangs
//!
//! A thread that touches a page that is out sleeps in the kernel until a *server* has brought it.
//! So what a server needs must never be out, and no server may wait for somebody who can touch such
//! a page while holding what the server needs. From this follows everything here:
//!
//! * Memory that servers use never moves ([`reserved`]).
//! * The lock of the state is held across calls to the kernel that fill or empty page tables by
//!   userfaultfd, which do not sleep for pages, and across nothing else: not across an
//!   announcement, a device, a policy, or a touch of the program's memory. `MADV_POPULATE` and
//!   `process_vm_readv` may sleep for a server, so they are called without it.
//! * The thread that reads the userfaultfd, the *leader*, serves by itself what takes no device
//!   and no announcement that anybody may answer late. Before it does more it makes another thread
//!   the leader ([`serve`]). So a device that is told to stop can finish an access that sleeps for a
//!   page that the program has just discarded.
//! * An event wakes the thread that caused it when it is read. Nobody waits for such a thread but
//!   for it to run on within the kernel ([`Space::drain`]).
//!
//! # Why no page is lost
//!
//! Contents are in one place at each instant: in the page table, in a block of staging or of
//! buffers, or in a block of a device; and the extent in the state owns, or leads to, that block. A
//! page leaves the page table by `UFFDIO_MOVE`, which is atomic against the CPUs, and
//! under the lock, with no event unread, so that it is the page of the mapping that the state
//! speaks of. (What may only be read takes another way, where changes are announced:
//! [`read_only`].) It comes back by `UFFDIO_MOVE` or `UFFDIO_COPY`, which fill holes and never
//! overwrite. A page that cannot be put back for want of memory is parked in ours.

mod bits;
mod buddy;
mod desk;
mod exclusive;
mod fault;
mod fork;
mod growth;
mod guardian;
mod hash;
mod home;
mod host;
mod inspect;
mod isolation;
pub(crate) mod kernel;

mod memory;
mod placement;
mod pool;
mod read_only;
mod registration;
mod reserved;
mod residency;
mod serve;
mod snapshot;
mod state;
mod take;
pub(crate) mod turns;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use mmu_notifier::{Event, EventKind, Owner, RangeInvalidation, Subscriptions};
use rustix::io::Errno;
use uhmm::backend::{Backend, Isolation, Select};
use uhmm::{
    Access, Coherence, Death, FaultError, PAGE_SIZE, Page, PageEntry, PageRange, SpaceId,
    SystemMemory,
};

pub use host::HostMemory;
use kernel::Kernel;
use memory::ProcessMemory;
use pool::{Pool, PoolBlock};
pub use residency::Immovable;
use serve::Servers;
use state::State;
use turns::Turns;

use crate::announce::{self, Coverage, NoAnnouncement};
use crate::growth::Growth;
use crate::mutant::mutant;
use crate::sys::region::{Region, RegionOptions};
use crate::sys::sentinel::Sentinel;
use crate::sys::userfaultfd::{Message, Messages};

/// The calling process, as a backend. See the [module](self).
pub(crate) struct Space {
    id: SpaceId,
    notifiers: Arc<Subscriptions>,
    kernel: Arc<Kernel>,
    staging: Arc<Pool>,
    buffers: Arc<Pool>,
    /// Where nothing can be read.
    unreadable: Region,
    /// Where no page is, for as many pages as a block has, in memory that nobody locks; `None` where
    /// the kernel has no such memory. If `mlockall` has filled it, what asking moves from here is a
    /// zero for a page that was never touched.
    nothing: Option<Region>,
    /// Pages of zeroes.
    zeroes: PoolBlock,
    /// Who decides about first touches.
    growth: OnceLock<Arc<dyn Growth>>,
    /// Whether those are to be asked about again that wait for room.
    growth_resumes: AtomicBool,
    /// How long a page may fail to come home before the access to it fails.
    patience: Duration,
    memory: Arc<ProcessMemory>,
    state: Mutex<State>,
    /// Whose turn it is to do what events have left to do.
    settling: Mutex<()>,
    /// Whether a mirror has ended, so that there may be something that nobody has to be told of.
    watches_in_doubt: AtomicBool,
    /// Whose turn it is to find that out.
    unwatching: Mutex<()>,
    /// Somebody's pages may have arrived.
    arrivals: Condvar,
    servers: Servers,
    /// Holds forks back until children have what they need.
    sentinel: Option<Sentinel>,
    /// Where threads ask that fork and have other descriptors.
    desk: Option<desk::Desk>,
    abilities: Abilities,
    /// How many ranges may be registered.
    max_registrations: usize,
    /// How often objects had been loaded when what the loader keeps was reserved.
    loaded: AtomicU64,
    this: Weak<Space>,
    /// What is announced before it is done.
    coverage: OnceLock<Coverage>,
    /// Which announced changes are being made.
    pub(crate) turns: Turns,
    pub(crate) counters: Counters,
}

/// What the kernel lets the space do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// Pages can leave, and whoever touches them, also in a system call, waits for them.
    pub(crate) migrate: bool,
    /// The kernel tells of forks.
    pub(crate) sees_forks: bool,
}

/// What the space is made from.
pub(crate) struct Parts {
    pub(crate) kernel: kernel::Kernel,
    pub(crate) staging_bytes: usize,
    pub(crate) abilities: Abilities,
    pub(crate) max_registrations: usize,
    pub(crate) managed: Option<Vec<PageRange>>,
    pub(crate) servers: usize,
    pub(crate) own_descriptors: bool,
    pub(crate) patience: Duration,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts what happened. Relaxed everywhere: each is a number by itself.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: AtomicU64,)*
        }
    };
}

counters! {
    /// Faults of CPUs that were served.
    faults,
    /// Faults on pages that were not out, filled with zeroes.
    zero_fills,
    /// Faults on pages that were in transit.
    faults_in_transit,
    /// Pages that a CPU took back from a device that held them.
    revoked,
    /// Events applied.
    events,
    /// How often the kernel refused to fill since an event was unread.
    retries,
    /// Accesses of devices to mappings that were gone.
    stale_accesses,
    /// Pages that came home because the process forked.
    fork_overrun,
    /// Children that got their pages from us, since the fork was not foreseen.
    unforeseen_forks,
    /// Pages of ours that are kept since there was no memory to put them in.
    parked,
    /// Accesses that failed, since the page could not be brought home.
    refused,
    /// Pages dropped since the program put something else in their place.
    replaced,
    /// Calls of the program that were announced.
    announced,
    /// Children that were made, as far as is known.
    forks,
    /// Pages that may only be read, and went back since they were pinned.
    given_back,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    // Relaxed: see `Counters`.
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Locks; a panic under a lock here leaves nothing half done that another thread could not see
/// as it is, or ends the process.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Space {
    /// Makes the space and starts its servers.
    pub(crate) fn new(parts: Parts) -> Result<Arc<Space>, Errno> {
        let kernel = Arc::new(parts.kernel);
        let staging = Pool::staging(parts.staging_bytes, MIN_STAGING, &kernel)?;
        let buffers = Pool::buffers(parts.staging_bytes, MIN_STAGING)?;
        let inaccessible =
            RegionOptions { dont_fork: true, grows: true, ..RegionOptions::default() };
        let unreadable = Region::reserve(PAGE_SIZE, inaccessible)?;
        let nothing = registration::nothing(&kernel);
        let zeroes = growth::zeroes(&buffers)?;
        // It is there from now on: a copy from it is no fault.
        buffers.write(zeroes.first(), 0, &[0; 8]);
        let mut state = State::new();
        state.managed =
            parts.managed.map(|ranges| ranges.into_iter().map(state::numbers).collect());
        for range in reserved::loaded_objects() {
            state.reserved.insert(state::numbers(range));
        }
        let regions = [staging.range(), buffers.range(), kernel.own_memory()].into_iter();
        let regions = regions.chain(nothing.as_ref().map(Region::range));
        for range in regions.chain(reserved::arena()) {
            state.reserved.insert(state::numbers(range));
            state.own.insert(state::numbers(range));
        }
        let Abilities { migrate, sees_forks } = parts.abilities;
        let sentinel = (migrate && sees_forks).then(Sentinel::new).transpose()?;
        if let Some(sentinel) = &sentinel {
            state.reserved.insert(fork::above(sentinel));
        }
        let servers = Servers::new()?;
        let space = Arc::new_cyclic(|this: &Weak<Space>| Space {
            id: SpaceId::new(),
            notifiers: Subscriptions::new(),
            memory: Arc::new(ProcessMemory::new(&staging, &buffers, Weak::clone(this))),
            kernel,
            staging,
            buffers,
            unreadable,
            nothing,
            zeroes,
            growth: OnceLock::new(),
            growth_resumes: AtomicBool::new(false),
            patience: parts.patience,
            state: Mutex::new(state),
            settling: Mutex::new(()),
            watches_in_doubt: AtomicBool::new(false),
            unwatching: Mutex::new(()),
            arrivals: Condvar::new(),
            servers,
            sentinel,
            desk: parts.own_descriptors.then(desk::Desk::default),
            abilities: parts.abilities,
            max_registrations: parts.max_registrations,
            loaded: AtomicU64::new(u64::MAX),
            this: Weak::clone(this),
            coverage: OnceLock::new(),
            turns: Turns::default(),
            counters: Counters::default(),
        });
        space.reserve_loader();
        space.start_servers(parts.servers)?;
        if space.desk.is_some() {
            space.start_server("uhmm-desk", Space::attend)?;
        }
        space.hook_forks()?;
        space.watch_forks()?;
        space.start_guardian()?;
        Ok(space)
    }

    /// Has the program's changes announced from now on.
    pub(crate) fn begin_announcements(&self) -> Result<(), NoAnnouncement> {
        let coverage = announce::announce_to(&self.this())?;
        self.coverage.get_or_init(|| coverage);
        Ok(())
    }

    /// Returns what is announced before it is done.
    pub(crate) fn coverage(&self) -> Option<Coverage> {
        self.coverage.get().copied()
    }

    /// Announces a change that the program is about to make.
    pub(crate) fn announce(&self, kind: EventKind, range: PageRange) -> RangeInvalidation<'_> {
        self.notifiers.invalidate_range_start(Event::new(kind, range.va_range()))
    }

    /// Announces a change that nobody can be interested in, so that everything that a thread needs for
    /// it has been made.
    pub(crate) fn try_announcement(&self) {
        self.make_thread_locals();
        drop(self.announce(EventKind::Clear, self.unreadable.range()));
    }

    /// Has the calling thread make what it needs to find subscribers, where there are none too.
    ///
    /// That is a thread-local variable with a destructor, of which the C library notes in its heap.
    /// The heap may be away when there is somebody to be found, and who finds them is who would bring
    /// it home.
    pub(crate) fn make_thread_locals(&self) {
        self.notifiers.subscribed(self.unreadable.range().va_range());
    }

    /// Returns what the program's changes have met.
    pub(crate) fn overtaken(&self) -> state::Overtaken {
        self.lock().overtaken
    }

    pub(crate) fn this(&self) -> Arc<Space> {
        self.this.upgrade().expect("a space that is used exists")
    }

    /// Tells whether nothing of `range` is out.
    fn is_home(&self, range: PageRange) -> bool {
        self.lock().overlapping(range).next().is_none()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Tells whether this is the process that attached, and not a child that inherited the bookkeeping
    /// without the servers, and that the space still exists.
    pub(crate) fn is_here(&self) -> bool {
        self.kernel.is_here()
    }

    /// Reads and applies what there is to read, and waits until no event is under way: from here the
    /// kernel lets pages move, until the next event.
    ///
    /// An event is under way until the thread that caused it has woken, which takes that thread no
    /// more than to be scheduled. Faults that are read here are for the leader to serve, who does not
    /// find them in the userfaultfd any more.
    fn drain(&self, state: &mut State) {
        loop {
            self.read_messages(state);
            if !self.kernel.uffd().changing() && self.decide_disputes(state) {
                break;
            }
            std::thread::yield_now();
        }
        // Whatever forked is known by now.
        state.released.clear();
        if !state.faults.is_empty() || self.leaves_aftermath(state) {
            self.call_leader();
        }
    }

    /// Finds out whether what was said to be unmapped is what was moved there later, while no event
    /// is under way; `false` if one has begun.
    fn decide_disputes(&self, state: &mut State) -> bool {
        while let Some(range) = state.disputed.pop() {
            let mut next = Some(range.first());
            while let Some(page) = next.filter(|&page| page <= range.last()) {
                let rest = PageRange::from_bounds(page, range.last()).expect("checked just now");
                let Some(part) = self.decide_first(state, rest) else {
                    state.disputed.push(rest);
                    return false;
                };
                next = part.last().checked_add(1);
            }
        }
        state.superseded = rangemap::RangeSet::new();
        true
    }

    /// Decides about the first pages of a range, as far as they are in one mapping, or in none, and
    /// returns them; `None` if an event has begun.
    fn decide_first(&self, state: &mut State, range: PageRange) -> Option<PageRange> {
        let first = range.first();
        let until = |next: Page| {
            let last = Page::new(next.number() - 1).expect("it is after another");
            PageRange::from_bounds(first, last).expect("it is after another")
        };
        let (part, mapped) = match self.kernel.vma(first).map(|vma| vma.map(|vma| vma.range)) {
            Ok(Some(vma)) if vma.contains(first) => (vma.intersection(range)?, true),
            Ok(Some(vma)) if range.contains(vma.first()) => (until(vma.first()), false),
            Ok(_) => (range, false),
            Err(_) => (first.into(), true),
        };
        // What was moved there has brought its registration along.
        let ours =
            mapped && self.kernel.is_registered(self.unreadable.range().first(), first).ok()?;
        // Now, and not after: what is gone from there may have moved on, and not said so.
        if self.kernel.uffd().changing() {
            return None;
        }
        if !ours {
            state.unmap(part);
        }
        Some(part)
    }

    /// Reads and applies what there is to read, without waiting, and tells whether there was
    /// anything.
    fn read_messages(&self, state: &mut State) -> bool {
        let mut found = false;
        loop {
            let read = self.kernel.read(&mut state.messages);
            found |= self.apply_messages(state);
            match read {
                Ok(Messages::CAPACITY) => {}
                // The kernel had no more.
                Ok(_) | Err(Errno::AGAIN) => return found,
                Err(Errno::INTR) => {}
                Err(error @ (Errno::MFILE | Errno::NFILE)) => self.make_room(state, error),
                Err(error) => fatal("the userfaultfd cannot be read", error),
            }
        }
    }

    /// Applies what has been read, and tells whether there was anything.
    fn apply_messages(&self, state: &mut State) -> bool {
        let mut found = false;
        while let Some(message) = state.messages.take() {
            found = true;
            if state.is_of_our_making(&message) {
                continue;
            }
            if let Message::Fork(child) = message {
                count(&self.counters.events, 1);
                self.adopt_child(state, child);
                continue;
            }
            let discarded = match message {
                Message::Remove(range) => Some(range),
                _ => None,
            };
            if let Some(range) = state.apply(message) {
                count(&self.counters.events, 1);
                // Whoever slept for a page of it finds out what became of the mapping.
                self.wake(range);
            }
            if let Some(range) = discarded {
                self.doubt(state, range);
            }
        }
        found
    }

    /// Wakes who sleeps for a page of `range`, to look again.
    fn wake(&self, range: PageRange) {
        let mut tries = 0;
        while let Err(error) = self.kernel.wake(range) {
            match error {
                Errno::AGAIN | Errno::INTR if tries < TRIES_TO_WAKE => tries += 1,
                // There is no such mapping any more, and nobody sleeps for it.
                Errno::INVAL | Errno::NOENT => return,
                // Whoever is not woken sleeps for ever.
                error => fatal("threads cannot be woken", error),
            }
        }
    }

    /// Does what events have left to do. With no lock held, and outside callbacks.
    ///
    /// A device may take its time to stop, or wait for the program. One server waits with it; the
    /// others leave to that one what comes meanwhile, and go on to bring pages.
    fn settle(&self) {
        while !self.lock().aftermath.is_empty() {
            // One after the other: what is doomed in the middle of this is freed by the next, and
            // only when this one has told every device.
            let turn = match self.settling.try_lock() {
                Ok(turn) => turn,
                Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
                // Whoever has the turn looks again when it is over.
                Err(TryLockError::WouldBlock) if serve::is_server() => return,
                Err(TryLockError::WouldBlock) => lock(&self.settling),
            };
            self.settle_once(turn);
            if !serve::is_server() {
                if !self.lock().aftermath.is_empty() {
                    self.call_leader();
                }
                return;
            }
        }
    }

    /// Does what events have left to do by now, and ends the turn.
    fn settle_once(&self, turn: MutexGuard<'_, ()>) {
        let aftermath = {
            let mut state = self.lock();
            state.settling += 1;
            self.take_aftermath(&mut state)
        };
        let told = |_: &(EventKind, PageRange)| !mutant!("devices_are_not_told");
        for (kind, range) in aftermath.changed.into_iter().filter(told) {
            drop(self.notifiers.invalidate_range_start(Event::new(kind, range.va_range())));
        }
        self.lock().settling -= 1;
        // The devices have stopped using it.
        drop(aftermath.doomed);
        drop(turn);
        for complaint in aftermath.complaints {
            tracing::warn!(target: "uhmm", "{complaint}");
        }
        if aftermath.children {
            self.supply_children();
        }
    }

    /// Tells whether somebody does what events have left to do, and will look again before long. Asked
    /// with the lock held.
    fn is_settling(&self) -> bool {
        matches!(self.settling.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// Tells those who wait here, and not in the kernel, that pages have arrived.
    fn announce_arrivals(&self) {
        self.arrivals.notify_all();
    }
}

/// How often the kernel may put off to wake threads. No kernel so far does.
const TRIES_TO_WAKE: u32 = 1000;

/// The least staging that is of any use.
const MIN_STAGING: usize = 16 << 20;

/// Ends the process: threads sleep for pages that nobody can bring any more, and to let them read
/// zeroes would be worse.
pub(crate) fn fatal(what: &str, error: Errno) -> ! {
    crate::sys::thread::tell(&format!(
        "uhmm: {what}: {error}. Pages of this process cannot be brought home: it ends here.\n"
    ));
    std::process::abort()
}

impl Backend for Space {
    fn id(&self) -> SpaceId {
        self.id
    }

    fn notifiers(&self) -> &Arc<Subscriptions> {
        &self.notifiers
    }

    fn coherence(&self) -> Coherence {
        match self.coverage.get() {
            Some(_) => Coherence::Announced,
            None => Coherence::Observed,
        }
    }

    fn memory(&self) -> Arc<dyn SystemMemory> {
        Arc::clone(&self.memory) as Arc<dyn SystemMemory>
    }

    fn snapshot(&self, range: PageRange, entries: &mut Vec<PageEntry>) {
        self.look(range, entries);
    }

    fn fault(
        &self,
        range: PageRange,
        access: Access,
        keep: Option<Owner>,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        self.fault_in(range, access, keep, deadline)
    }

    fn isolate(&self, range: PageRange, select: Select) -> Box<dyn Isolation> {
        Box::new(match select {
            Select::System { to } => self.take_from_system(range, to),
            Select::Device(owner) => self.take_from_devices(range, owner, false),
            Select::Foreign(owner) => self.take_from_devices(range, owner, true),
        })
    }

    fn exclusive(
        &self,
        range: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        self.hold(range, owner, deadline)
    }

    fn end_exclusive(&self, range: PageRange, owner: Owner) {
        self.give_back(range, owner);
    }

    fn mirror_ended(&self, _: PageRange) {
        // In a child the bell is its parent's.
        if self.is_here() {
            self.review_watches();
        }
    }

    fn exit(&self, _: Death) {
        self.take_apart();
    }
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").field("id", &self.id).finish_non_exhaustive()
    }
}
