//! Forks.
//!
//! A child has what its parent had mapped, and nothing else: pages that are out are holes in its
//! page table, nobody there serves them, and once the last userfaultfd that knows of them is closed
//! they are zeroes. So a child must not run before it has them all.
//!
//! Before a fork that the C library announces, everything comes home, and nothing leaves until it is
//! over. That is for the child's sake no more than a short cut: what is out all the same, and what
//! is out at a fork that nobody announces, such as a raw `clone`, the child is given by way of the
//! kernel's fork event. It comes when the page table has been copied. The pages come home, and each
//! is put into the child before it is put into the parent, so that the child has it as it was at the
//! fork. Meanwhile neither the child nor the thread that forked runs: the fork is held back by the
//! [`Sentinel`], whose event is read when the child lacks nothing ([`Space::watch_forks`]). If the
//! parent is killed before that, there never is a child.
//!
//! What a child lacks is out, until it has it: [`Child`] follows the pages when the program moves
//! their mapping, and what the program unmaps or discards stays in limbo until the child has a copy.
//!
//! A child is *released* before it runs: its memory is unregistered, explicitly, since another child
//! may have been born with a copy of the descriptor, which keeps the userfaultfd open when it is
//! closed here. What cannot be had within [`PATIENCE`] is poisoned in the child, which gets a signal
//! if it touches it.
//!
//! One thing is not as if nothing were out. A device that stores to its own memory after the fork,
//! and before that is brought home, stores for both: the child sees it if that is before it runs.
//! So who forks by a raw `clone` stops its devices first, as far as that matters.
//!
//! In a child the bookkeeping is a copy without servers, and [`Space::is_here`] says so: everything
//! there answers that the address space has ended.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use mmu_notifier::{EventKind, Owner, thread_number};
use rangemap::{RangeMap, RangeSet};
use rustix::io::Errno;
use uhmm::{Order, Page, PageRange};

use super::desk::Errand;
use super::serve::AbortOnPanic;
use super::state::{Place, State, is_in_limbo, numbers, range_of};
use super::{Space, count, fatal, lock};
use crate::mutant::mutant;
use crate::sys::advise;
use crate::sys::allocator;
use crate::sys::fork::{self, Wiped};
use crate::sys::maps;
use crate::sys::sentinel::Sentinel;
use crate::sys::userfaultfd::Userfaultfd;

/// How long a fork waits for pages that somebody has in transit.
const PATIENCE: Duration = Duration::from_secs(5);

/// The space whose process forks.
static CURRENT: Mutex<Weak<Space>> = Mutex::new(Weak::new());

/// A child that was born while pages were out, and does not run yet.
#[derive(Debug)]
pub(super) struct Child {
    uffd: Userfaultfd,
    /// The pages that it lacks, by their numbers in the parent now; and by how much those in the
    /// child are larger, modulo 2^64.
    lacks: RangeMap<u64, u64>,
    /// What was registered when it was born.
    registered: Vec<Range<u64>>,
    /// Why it did not get something.
    failure: Option<Errno>,
}

/// Returns the numbers of the pages that must not move, so that the sentinel is above all that does.
pub(super) fn above(sentinel: &Sentinel) -> Range<u64> {
    sentinel.page().number()..Page::MAX.number() + 1
}

impl Space {
    /// Makes forks of this process bring its pages home first.
    pub(super) fn hook_forks(&self) -> Result<(), Errno> {
        *lock(&CURRENT) = Weak::clone(&self.this);
        fork::hooks(prepare, parent, child)
    }

    pub(super) fn before_fork(&self) {
        self.reserve_this_thread();
        count(&self.counters.forks, 1);
        let out = {
            let mut state = self.lock();
            state.forking += 1;
            state.pages_out()
        };
        if out > 0 {
            count(&self.counters.fork_overrun, out);
            tracing::info!(target: "uhmm", pages = out, "come home for a fork");
            self.bring_home_for_fork();
        }
        self.keep_from_child();
        self.be_silent();
    }

    /// Gives up what is registered, so that the kernel tells nobody of the fork, and nobody has to
    /// read that.
    ///
    /// The C library holds the locks of `malloc` while it forks. If the fork waits for a server, and
    /// the server for memory, neither goes on. So this is not done for speed alone. What a device has
    /// mapped stays registered where servers have an allocator of their own; where they do not, the
    /// device has to fault it in again.
    fn be_silent(&self) {
        let mut state = self.lock();
        let state = &mut *state;
        self.release_hold(state);
        state.faults.extend(state.deferred.drain(..));
        self.sweep(state);
        if !allocator::is_installed() && !state.is_anything_out() {
            let pieces: Vec<_> = state.registered.iter().map(|(piece, _)| piece.clone()).collect();
            for piece in pieces {
                if self.kernel.unregister(range_of(piece.clone())).is_ok() {
                    state.registered.remove(piece.clone());
                    state.watched.remove(piece.clone());
                    self.note_released(state, piece.clone());
                    state.aftermath.changed.push((EventKind::Clear, range_of(piece)));
                }
            }
        }
        self.disarm(state);
        self.drain(state);
    }

    /// Brings everything home, as far as it can be had.
    fn bring_home_for_fork(&self) {
        let began = Instant::now();
        while !self.bring_everything_home() && began.elapsed() < PATIENCE && !self.is_in_own_way() {
            std::thread::yield_now();
        }
        // What is left the child gets by way of the event.
    }

    /// Tells whether something is out that only the calling thread can bring home, by going on.
    fn is_in_own_way(&self) -> bool {
        let thread = thread_number();
        let state = self.lock();
        let mut extents = state.extents();
        extents.any(|(_, extent)| match extent.place {
            Place::Transit { isolation, .. } => state.waits_for(isolation, thread),
            _ => false,
        })
    }

    /// Keeps what is still out from a child that nobody will tell of, which therefore cannot be given
    /// it: where the child touches it, it gets a signal, and not a zero.
    fn keep_from_child(&self) {
        if self.abilities.sees_forks {
            return;
        }
        let out: Vec<PageRange> = {
            let state = self.lock();
            state.extents().map(|(first, extent)| first.block(extent.order)).collect()
        };
        for range in out {
            let kept = maps::is_kept_from_children(range.first());
            match kept.and_then(|kept| if kept { Ok(()) } else { advise::dontfork(range) }) {
                Ok(()) if kept == Ok(true) => {}
                Ok(()) => self.lock().kept_from_child.push(range),
                // Nothing is mapped there any more.
                Err(_) if matches!(self.kernel.vma(range.first()), Ok(None)) => {}
                Err(error) => fatal("a child would read zeroes for pages that are away", error),
            }
        }
    }

    pub(super) fn after_fork(&self) {
        let kept = std::mem::take(&mut self.lock().kept_from_child);
        for range in kept {
            // If it fails the next child lacks the range too, and gets a signal.
            if let Err(error) = advise::dofork(range) {
                tracing::warn!(target: "uhmm", %range, %error, "children do not get it any more");
            }
        }
        let mut state = self.lock();
        state.forking = state.forking.saturating_sub(1);
        self.announce_arrivals();
        drop(state);
        self.settle();
    }

    /// Starts the thread that lets forks go.
    pub(super) fn watch_forks(&self) -> Result<(), Errno> {
        if self.sentinel.is_none() {
            return Ok(());
        }
        self.start_server("uhmm-forks", Space::hold_forks)
    }

    fn hold_forks(&self) {
        let abort = AbortOnPanic;
        let sentinel = self.sentinel.as_ref().expect("this thread is its");
        loop {
            match sentinel.wait(self.servers.stop.as_fd()) {
                Ok(true) => self.let_forks_go(sentinel),
                Ok(false) => break,
                Err(error) => fatal("forks cannot be waited for", error),
            }
        }
        std::mem::forget(abort);
    }

    /// Lets the forks go that are held back, once all children that are known lack nothing.
    ///
    /// A fork is held back here after its event at the other userfaultfd has been read, and the
    /// lock is held from that until its child is known. So under the lock, while no child is
    /// wanting, those that are held back have what they need.
    fn let_forks_go(&self, sentinel: &Sentinel) {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !state.children.is_empty() && !mutant!("forks_are_not_held_back") {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.give_up_children(&mut state);
                break;
            }
            let woken = self.arrivals.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        while let Err(error) = sentinel.let_go() {
            match error {
                Errno::MFILE | Errno::NFILE => self.make_room(&mut state, error),
                error => fatal("forks cannot be let go", error),
            }
        }
        self.keep_spare(&mut state);
    }

    /// Has forks held back from here on, which is before anything is registered.
    pub(super) fn arm(&self, state: &mut State) -> Result<(), Errno> {
        if let Some(sentinel) = &self.sentinel
            && !state.armed
        {
            state.wiped = Some(Wiped::open()?);
            sentinel.arm()?;
            state.armed = true;
        }
        self.keep_spare(state);
        Ok(())
    }

    /// Lets forks pass if nothing is registered.
    pub(super) fn disarm(&self, state: &mut State) {
        if let Some(sentinel) = &self.sentinel
            && state.armed
            && state.registered.is_empty()
            && sentinel.disarm().is_ok()
        {
            state.armed = false;
            (state.wiped, state.spare) = (None, None);
        }
    }

    /// Has a descriptor in hand that can be closed to make room for another.
    fn keep_spare(&self, state: &mut State) {
        if state.spare.is_none() {
            state.spare = rustix::io::fcntl_dupfd_cloexec(&self.servers.stop, 0).ok();
        }
    }

    /// Makes room for the descriptor of a child, or at least some time for others to make it.
    pub(super) fn make_room(&self, state: &mut State, error: Errno) {
        if state.spare.take().is_some() {
            return;
        }
        if !state.children.is_empty() {
            // The program has taken the room. A child with a signal is better than no fork any more.
            self.give_up_children(state);
            return;
        }
        let since = *state.crowded.get_or_insert_with(Instant::now);
        if since.elapsed() > PATIENCE {
            fatal("there is no room for a descriptor", error);
        }
        std::thread::yield_now();
    }

    /// Notes what was unregistered: a child may have it registered whose birth is not known yet.
    pub(super) fn note_released(&self, state: &mut State, range: Range<u64>) {
        if self.kernel.uffd().changing() {
            state.released.insert(range);
        }
    }

    /// Notes a child. From here on no page is put into the parent's page table before the child has
    /// it.
    pub(super) fn adopt_child(&self, state: &mut State, uffd: Userfaultfd) {
        count(&self.counters.forks, 1);
        let mut registered: Vec<_> =
            state.registered.iter().map(|(range, _)| range.clone()).collect();
        registered.extend(state.released.iter().cloned());
        let out = state.extents().map(|(first, extent)| first.block(extent.order));
        let out = out.filter(|block| !is_in_limbo(block.first()));
        let lacks: RangeMap<u64, u64> = out.map(|block| (numbers(block), 0)).collect();
        let lacks = if mutant!("children_lack_pages") { RangeMap::new() } else { lacks };
        let mut child = Child { uffd, lacks, registered, failure: None };
        state.crowded = None;
        if let Some(wiped) = state.wiped.as_ref().filter(|_| !child.lacks.is_empty()) {
            match wiped.ranges() {
                Ok(ranges) => {
                    ranges.into_iter().for_each(|range| child.lacks.remove(numbers(range)))
                }
                Err(error) => fatal("it cannot be known what a child must not see", error),
            }
        }
        if child.lacks.is_empty() {
            child.release(state);
            return;
        }
        count(&self.counters.unforeseen_forks, 1);
        state.children.push(child);
        state.aftermath.children = true;
    }

    /// Gives the children what they lack, by bringing that home. With no lock held, by a server: any
    /// other thread may have some of it in transit itself.
    pub(super) fn supply_children(&self) {
        let deadline = Instant::now() + PATIENCE;
        let nobody = Some(Owner::new());
        // What cannot be had at the moment, so that it does not keep the rest from them.
        let mut failed = BTreeSet::new();
        loop {
            let next = {
                let mut state = self.lock();
                let next = self.next_for_children(&mut state, &failed);
                if next.is_none() && (failed.is_empty() || Instant::now() > deadline) {
                    // They have it by now, since it never left; or it cannot be had.
                    self.give_up_children(&mut state);
                    return;
                }
                next
            };
            let Some((first, order)) = next else {
                failed.clear();
                std::thread::yield_now();
                continue;
            };
            if let Err(error) = self.fetch_home(first.block(order), nobody, Some(deadline)) {
                tracing::debug!(target: "uhmm", %error, "a child does not get a page");
                failed.insert(first);
            }
        }
    }

    /// Finds something that is out and that a child lacks.
    fn next_for_children(
        &self,
        state: &mut State,
        failed: &BTreeSet<Page>,
    ) -> Option<(Page, Order)> {
        let served = |child: &mut Child| child.lacks.is_empty();
        let done: Vec<Child> = state.children.extract_if(.., served).collect();
        done.into_iter().for_each(|child| child.release(state));
        self.empty_limbo(state);
        self.announce_arrivals();
        state.children.iter().find_map(|child| {
            child.lacks.iter().find_map(|(part, _)| {
                let mut out = state.overlapping(range_of(part.clone()));
                let (first, extent) = out.find(|(first, _)| !failed.contains(first))?;
                Some((first, extent.order))
            })
        })
    }

    fn give_up_children(&self, state: &mut State) {
        for child in std::mem::take(&mut state.children) {
            child.poison();
            child.release(state);
        }
        self.empty_limbo(state);
        self.announce_arrivals();
    }

    /// Drops what was kept for children that do not need it any more.
    pub(super) fn empty_limbo(&self, state: &mut State) {
        if state.empty_limbo() {
            self.call_leader();
        }
    }

    /// Sees to it that no fork is under way which the kernel tells us of, with nothing registered.
    pub(super) fn end_forks(&self, state: &mut State) {
        self.disarm(state);
        while let Some(sentinel) = &self.sentinel {
            // Lets the other userfaultfd's event pass first.
            self.drain(state);
            if !state.children.is_empty() {
                self.give_up_children(state);
            }
            if !sentinel.forking() {
                return;
            }
            match sentinel.let_go() {
                Ok(_) => std::thread::yield_now(),
                Err(Errno::MFILE | Errno::NFILE) => self.make_room(state, Errno::MFILE),
                Err(error) => fatal("forks cannot be let go", error),
            }
        }
    }
}

impl Child {
    /// Tells whether it lacks any of those pages of the parent.
    pub(super) fn lacks(&self, pages: &Range<u64>) -> bool {
        self.lacks.overlaps(pages)
    }

    /// Notes that what the parent had in `pages` it has from `to` on now.
    pub(super) fn follow(&mut self, pages: &Range<u64>, to: Page) {
        let parts: Vec<_> = self
            .lacks
            .overlapping(pages.clone())
            .map(|(part, &further)| (cut(part, pages), further))
            .collect();
        self.lacks.remove(pages.clone());
        let by = to.number().wrapping_sub(pages.start);
        for (part, further) in parts {
            let moved = part.start.wrapping_add(by)..part.end.wrapping_add(by);
            self.lacks.insert(moved, further.wrapping_sub(by));
        }
    }

    /// Notes that pages of the parent's were not out at the fork, though they were about to be: what
    /// was there the child has, also if that is nothing.
    pub(super) fn has(&mut self, pages: &RangeSet<u64>) {
        pages.iter().for_each(|part| self.lacks.remove(part.clone()));
    }

    /// Puts the pages `from`, of our own memory, or zeroes, where the child lacks what its parent has
    /// in `to`.
    pub(super) fn supply(&mut self, from: Option<PageRange>, to: PageRange) {
        let whole = numbers(to);
        let mut tries = 0;
        while let Some((part, target)) = self.next_lacking(&whole) {
            let progress = match from {
                Some(from) => {
                    let offset = part.start - whole.start;
                    let source = from.first().checked_add(offset).expect("as many as `to`");
                    self.uffd.copy(source, target, true)
                }
                None => self.uffd.zeropage(target, true),
            };
            let done = part.start..part.start + progress.pages;
            if !done.is_empty() {
                self.lacks.remove(done.clone());
            }
            match progress.result {
                Ok(()) => self.lacks.remove(part),
                Err(_) if !done.is_empty() => {}
                Err(Errno::AGAIN) if tries < TRIES => tries += 1,
                // It had something else there, or nothing.
                Err(Errno::EXIST | Errno::NOENT | Errno::INVAL) => {
                    self.lacks.remove(part.start..part.start + 1);
                }
                // It was killed before it began.
                Err(Errno::SRCH) => self.lacks = RangeMap::new(),
                Err(error) => {
                    self.failure = Some(error);
                    self.poison_pages(target);
                    self.lacks.remove(part);
                }
            }
        }
    }

    /// Finds pages that the child lacks, by their numbers in the parent, and where they are in it.
    fn next_lacking(&self, whole: &Range<u64>) -> Option<(Range<u64>, PageRange)> {
        let (part, further) = self.lacks.overlapping(whole.clone()).next()?;
        let part = cut(part, whole);
        let target = part.start.wrapping_add(*further)..part.end.wrapping_add(*further);
        Some((part, range_of(target)))
    }

    /// Makes sure that the child does not take zeroes for what it lacks: it gets a signal.
    fn poison(&self) {
        for (part, further) in self.lacks.iter() {
            self.poison_pages(range_of(
                part.start.wrapping_add(*further)..part.end.wrapping_add(*further),
            ));
        }
    }

    /// Poisons those of the pages that are missing.
    fn poison_pages(&self, pages: PageRange) {
        let mut next = Some(pages.first());
        let mut tries = 0;
        while let Some(rest) = next.and_then(|page| PageRange::from_bounds(page, pages.last())) {
            let progress = self.uffd.poison(rest, true);
            if progress.pages > 0 {
                next = rest.first().checked_add(progress.pages);
                continue;
            }
            match progress.result {
                Ok(()) | Err(Errno::SRCH) => return,
                Err(Errno::EXIST | Errno::NOENT | Errno::INVAL) => {}
                Err(_) if tries < TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                    continue;
                }
                // To let it run would be to let it read zeroes.
                Err(error) => fatal("a child lacks pages that cannot be marked", error),
            }
            next = rest.first().checked_add(1);
        }
    }

    /// Makes the child's memory its own.
    fn release(self, state: &mut State) {
        if let Some(error) = self.failure {
            let complaint = || format!("a child gets a signal where it lacks pages: {error}");
            state.aftermath.complain(complaint);
        }
        for range in &self.registered {
            self.unregister(range_of(range.clone()));
        }
    }

    fn unregister(&self, range: PageRange) {
        match self.uffd.unregister(range) {
            // One mapping in it that cannot be registered spoils it all: by halves, then.
            Err(Errno::INVAL) if range.pages() > 1 => {
                let half = range.first().checked_add(range.pages() / 2).expect("within the range");
                let last = Page::new(half.number() - 1).expect("within the range");
                for part in [(range.first(), last), (half, range.last())] {
                    self.unregister(PageRange::from_bounds(part.0, part.1).expect("halves"));
                }
            }
            // Nothing is there, or the child is gone.
            _ => {}
        }
    }
}

/// How often the kernel may put off to put something into a child.
const TRIES: u32 = 10_000;

/// Returns what two ranges share, if they share anything.
fn cut(part: &Range<u64>, whole: &Range<u64>) -> Range<u64> {
    part.start.max(whole.start)..part.end.min(whole.end)
}

thread_local! {
    /// Keeps [`CURRENT`] locked across the fork of this thread: a child must not inherit it locked.
    static HELD: RefCell<Option<MutexGuard<'static, Weak<Space>>>> = const { RefCell::new(None) };
}

fn prepare() {
    let current = lock(&CURRENT);
    if let Some(space) = current.upgrade().filter(|space| space.is_here()) {
        space.see_to_fork(Errand::BeforeFork);
    }
    HELD.set(Some(current));
}

fn parent() {
    let current = HELD.take();
    let space = current.as_ref().and_then(|current| current.upgrade());
    if let Some(space) = space.filter(|space| space.is_here()) {
        space.see_to_fork(Errand::AfterFork);
    }
}

fn child() {
    drop(HELD.take());
}
