//! Forks.
//!
//! A child has what its parent had mapped, and nothing else: pages that are out are holes in its
//! page table, and nobody there serves them. So before a fork that the C library announces
//! everything comes home, and nothing leaves until it is over. A fork that nobody announces, a raw
//! `clone`, is told of by the kernel when the page table has been copied: then the pages come home
//! as well, and each is put into the child before it is put into the parent, so that the child has
//! it as it was at the fork.
//!
//! In a child the bookkeeping is a copy without servers, and [`Space::is_here`] says so: everything
//! there answers that the address space has ended.

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use rangemap::RangeSet;
use rustix::io::Errno;
use uhmm::{Page, PageRange};

use super::state::{State, numbers, range_of};
use super::{Space, count, lock};
use crate::sys::userfaultfd::{Message, Messages, Userfaultfd};
use crate::sys::fork;

/// How long a fork waits for pages that somebody has in transit.
const PATIENCE: Duration = Duration::from_secs(5);

/// The space whose process forks.
static CURRENT: Mutex<Weak<Space>> = Mutex::new(Weak::new());

/// A child that was born while pages were out.
#[derive(Debug)]
pub(super) struct Child {
    uffd: Userfaultfd,
    /// The pages that it lacks.
    missing: RangeSet<u64>,
    messages: Messages,
}

impl Space {
    /// Makes forks of this process bring its pages home first.
    pub(super) fn hook_forks(&self) -> Result<(), Errno> {
        *lock(&CURRENT) = Weak::clone(&self.this);
        fork::hooks(prepare, parent, child)
    }

    /// Tells whether the space that is noted is that of a parent of this process.
    pub(crate) fn current_is_inherited() -> bool {
        lock(&CURRENT).upgrade().is_some_and(|space| !space.is_here())
    }

    fn before_fork(&self) {
        self.reserve_this_thread();
        let out = {
            let mut state = self.lock();
            state.forking += 1;
            state.pages_out()
        };
        if out == 0 {
            return;
        }
        count(&self.counters.fork_overrun, out);
        tracing::info!(target: "uhmm", pages = out, "come home for a fork");
        let began = Instant::now();
        while !self.bring_everything_home() && began.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        let left = self.lock().pages_out();
        if left > 0 {
            // The child gets them by way of the event.
            tracing::warn!(target: "uhmm", pages = left, "are still out at a fork");
        }
    }

    fn after_fork(&self) {
        let mut state = self.lock();
        state.forking = state.forking.saturating_sub(1);
        self.announce_arrivals();
    }

    /// Notes a child that was born while pages were out. From here on no page is put into the
    /// parent's page table before the child has it.
    pub(super) fn adopt_child(&self, state: &mut State, uffd: Userfaultfd) {
        let missing = state.extents().map(|(first, extent)| numbers(first.block(extent.order)));
        let missing: RangeSet<u64> = missing.collect();
        count(&self.counters.unforeseen_forks, 1);
        state.children.push(Child { uffd, missing, messages: Messages::new() });
        state.aftermath.children = true;
    }

    /// Gives the children what they lack, by bringing everything home. With no lock held.
    pub(super) fn supply_children(&self) {
        let began = Instant::now();
        loop {
            let home = self.bring_everything_home();
            let mut state = self.lock();
            for child in &mut state.children {
                child.read();
            }
            // To close its descriptor makes a child's memory its own.
            state.children.retain(|child| !child.missing.is_empty());
            if state.children.is_empty() {
                return;
            }
            if home || began.elapsed() > PATIENCE {
                let children = std::mem::take(&mut state.children);
                children.into_iter().for_each(Child::give_up);
                return;
            }
            drop(state);
            std::thread::yield_now();
        }
    }
}

impl Child {
    /// Puts the pages `from`, of our own memory, where the child lacks the pages `to`.
    pub(super) fn supply(&mut self, from: Option<PageRange>, to: PageRange) {
        let whole = numbers(to);
        let mut rest = self.next_missing(&whole);
        while let Some(part) = rest {
            let offset = part.start - whole.start;
            let target = range_of(part.clone());
            let progress = match from {
                Some(from) => {
                    let source = from.first().checked_add(offset).expect("as many as `to`");
                    self.uffd.copy(source, target, true)
                }
                None => self.uffd.zeropage(target, true),
            };
            let done = part.start..part.start + progress.pages;
            if !done.is_empty() {
                self.missing.remove(done);
            }
            match progress.result {
                Ok(()) => self.missing.remove(part),
                Err(_) if progress.pages > 0 => {}
                Err(Errno::AGAIN) => self.read(),
                // It has something else there by now, or nothing, or has ended.
                Err(Errno::EXIST | Errno::NOENT | Errno::INVAL | Errno::SRCH) => {
                    self.missing.remove(part.start..part.start + 1);
                }
                Err(error) => {
                    tracing::error!(target: "uhmm", %error, "a child does not get its pages");
                    self.poison(part.clone());
                    self.missing.remove(part);
                }
            }
            rest = self.next_missing(&whole);
        }
    }

    fn next_missing(&self, whole: &std::ops::Range<u64>) -> Option<std::ops::Range<u64>> {
        let part = self.missing.overlapping(whole).next()?;
        Some(part.start.max(whole.start)..part.end.min(whole.end))
    }

    /// Reads what the child does to its mappings: it waits for that.
    fn read(&mut self) {
        while self.uffd.read_now(&mut self.messages).is_ok_and(|read| read > 0) {
            while let Some(message) = self.messages.take() {
                match message {
                    Message::Unmap(range) | Message::Remove(range) => {
                        self.missing.remove(numbers(range));
                    }
                    Message::Remap { from, to } => self.remap(from, to),
                    // A child of the child: what it lacks it never gets, and it must not take zeroes
                    // for that.
                    Message::Fork(uffd) => {
                        let missing = self.missing.clone();
                        Child { uffd, missing, messages: Messages::new() }.give_up();
                    }
                    // Shared memory is none of what it lacks.
                    Message::Fault { .. } | Message::Duplicate { .. } => {}
                }
            }
        }
        std::thread::yield_now();
    }

    fn remap(&mut self, from: PageRange, to: Page) {
        let whole = numbers(from);
        let parts: Vec<_> = self.missing.overlapping(&whole).cloned().collect();
        self.missing.remove(whole.clone());
        for part in parts {
            let part = part.start.max(whole.start)..part.end.min(whole.end);
            let moved = |page: u64| page - whole.start + to.number();
            self.missing.insert(moved(part.start)..moved(part.end));
        }
    }

    /// Makes sure that the child does not take zeroes for what it lacks: it gets a signal.
    fn give_up(self) {
        for part in self.missing.iter() {
            self.poison(part.clone());
        }
    }

    fn poison(&self, part: std::ops::Range<u64>) {
        let poisoned = self.uffd.poison(range_of(part), true);
        if let Err(error) = poisoned.result
            && !matches!(error, Errno::SRCH | Errno::NOENT | Errno::EXIST)
        {
            tracing::error!(target: "uhmm", %error, "a child may read zeroes for pages it lacks");
        }
    }
}

thread_local! {
    /// Keeps [`CURRENT`] locked across the fork of this thread: a child must not inherit it locked.
    static HELD: RefCell<Option<MutexGuard<'static, Weak<Space>>>> = const { RefCell::new(None) };
}

fn prepare() {
    let current = lock(&CURRENT);
    if let Some(space) = current.upgrade().filter(|space| space.is_here()) {
        space.before_fork();
    }
    HELD.set(Some(current));
}

fn parent() {
    let current = HELD.take();
    let space = current.as_ref().and_then(|current| current.upgrade());
    if let Some(space) = space.filter(|space| space.is_here()) {
        space.after_fork();
    }
}

fn child() {
    drop(HELD.take());
}
