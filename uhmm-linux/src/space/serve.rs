//! The servers: threads that bring pages to those who sleep for them.
//!
//! One of them is the leader. It alone waits for messages, and serves what nobody can delay: a page
//! that is not out is filled with zeroes, a page in our own memory is put back, and so is one in
//! memory that is prompt, if nobody else waits. What takes a device or an announcement, which wait
//! for others, it does after another server has become the leader.
//! So there is always a thread that fills a hole, and a device that is told to stop can finish an
//! access that sleeps for one. If all others are at work, the leader leaves such faults in a
//! backlog, for the first that is done.
//!
//! All signals are blocked, and the stacks are reserved: a server never sleeps for a page.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mmu_notifier::Owner;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use smallvec::SmallVec;
use uhmm::{DevicePagemap, FaultError, Order, Page, PageRange};

use super::placement::Placement;
use super::state::{Aftermath, Fault, Place, State, chunk_of};
use super::{Space, count, fatal, lock};
use crate::mutant::mutant;
use crate::sys::pidfd::Pidfd;
use crate::sys::thread::{self, BusCode};
use crate::sys::userfaultfd::Messages;

/// How long a chunk that has become empty stays registered, and a fault waits that could not be
/// served.
const PAUSE: Duration = Duration::from_millis(10);

/// How long a page may fail to come home before whoever touches it is told by a signal.
const PATIENCE: Duration = Duration::from_secs(5);

/// The servers of a space.
pub(super) struct Servers {
    /// Can be read when the servers are to end.
    pub(super) stop: OwnedFd,
    /// Can be read when the leader is to look what there is to do.
    bell: OwnedFd,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
    /// Each of them, as far as the kernel tells of its end.
    lives: Mutex<Vec<Arc<Pidfd>>>,
    /// Whether they are to end.
    stopping: AtomicBool,
    placement: Mutex<Placement>,
    team: Mutex<Team>,
    turn: Condvar,
}

#[derive(Default)]
struct Team {
    led: bool,
    /// How many wait to become the leader.
    idle: usize,
    backlog: VecDeque<Task>,
    stopping: bool,
}

/// What a fault takes that others may delay.
enum Task {
    Home { pagemap: Arc<DevicePagemap>, page: Page, order: Order, fault: Fault, in_place: bool },
    Revoke(Fault),
    Settle,
    Unwatch,
}

/// Why a page does not come home.
#[derive(Clone, Copy)]
enum Failure {
    /// There is no memory for it.
    Memory,
    /// Its device does not give it.
    Device,
}

thread_local! {
    /// Whether this thread is the leader, which must not wait for anybody.
    static LEADING: Cell<bool> = const { Cell::new(false) };

    /// Whether this thread is a server.
    static SERVER: Cell<bool> = const { Cell::new(false) };
}

type Tasks = SmallVec<[Task; 4]>;

/// Tells whether the calling thread is the leader, which waits for no device.
pub(super) fn is_leading() -> bool {
    LEADING.get()
}

/// What a server is to do next.
enum Turn {
    Lead,
    Perform(Task),
    End,
}

impl Servers {
    pub(super) fn new() -> Result<Servers, Errno> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Servers {
            stop,
            bell,
            threads: Mutex::default(),
            lives: Mutex::default(),
            stopping: AtomicBool::new(false),
            placement: Mutex::new(Placement::new()),
            team: Mutex::default(),
            turn: Condvar::new(),
        })
    }

    /// Returns a descriptor that means nothing to anybody else.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Tells whether the threads may end.
    pub(super) fn are_stopping(&self) -> bool {
        // Acquire: whoever has seen one end sees why; partner of the store in `stop_servers`.
        self.stopping.load(Ordering::Acquire)
    }

    /// Returns what tells of the end of each thread.
    pub(super) fn lives(&self) -> Vec<Arc<Pidfd>> {
        lock(&self.lives).clone()
    }

    fn ring(&self) {
        // If this fails it is because it has been rung, and not been heard yet.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Waits for something to do: to lead, or a task that the leader could give to nobody.
    fn wait_for_turn(&self) -> Turn {
        let mut team = lock(&self.team);
        loop {
            if team.stopping {
                return Turn::End;
            }
            if !team.led {
                team.led = true;
                return Turn::Lead;
            }
            // Looked at under the lock under which a leader that finds nobody idle leaves it.
            if let Some(task) = team.backlog.pop_front() {
                return Turn::Perform(task);
            }
            team.idle += 1;
            team = self.turn.wait(team).unwrap_or_else(PoisonError::into_inner);
            team.idle -= 1;
        }
    }

    /// Lets another server lead, so that this one can do the first of `tasks`; the others are for whoever
    /// has time. If nobody has, so is the first.
    fn hand_over(&self, tasks: Tasks) -> Option<Task> {
        let mut team = lock(&self.team);
        if team.idle == 0 {
            team.backlog.extend(tasks);
            return None;
        }
        team.led = false;
        // Each by itself: one may have to wait for another.
        let mut tasks = tasks.into_iter();
        let own = tasks.next()?;
        team.backlog.extend(tasks);
        let others = !team.backlog.is_empty();
        // Whoever is woken would wait for this lock.
        drop(team);
        match others {
            true => self.turn.notify_all(),
            false => self.turn.notify_one(),
        }
        Some(own)
    }
}

impl Space {
    pub(super) fn start_servers(&self, servers: usize) -> Result<(), Errno> {
        for _ in 0..servers.max(2) {
            self.start_server("uhmm-server", |space| {
                lock(&space.servers.placement).add(thread::gettid());
                space.serve();
            })?;
        }
        Ok(())
    }

    /// Starts a thread, and waits until it is ready to work.
    ///
    /// What it does before may call the C library's `malloc`, whose locks a thread holds that forks;
    /// and such a thread waits for the servers.
    pub(super) fn start_server(
        &self,
        name: &str,
        work: impl FnOnce(&Space) + Send + 'static,
    ) -> Result<(), Errno> {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let space = self.this();
        let started = thread::spawn(name, move || {
            space.reserve_this_thread();
            // Whoever started it waits for this, or has ended.
            let _ = ready.send(Pidfd::open_thread(thread::gettid()).ok());
            drop(ready);
            work(&space);
        });
        match started {
            Ok(thread) => lock(&self.servers.threads).push(thread),
            Err(error) => {
                self.stop_servers();
                return Err(error);
            }
        }
        // It ends without a word only by a panic, of which it tells itself.
        if let Ok(Some(life)) = is_ready.recv() {
            lock(&self.servers.lives).push(Arc::new(life));
        }
        Ok(())
    }

    /// Ends the servers, and waits for those that are not the calling thread.
    pub(super) fn stop_servers(&self) {
        // Release: before any ends, so that the guardian knows; partner of `are_stopping`.
        self.servers.stopping.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.servers.stop, &1_u64.to_ne_bytes()) {
            fatal("the servers cannot be told to end", error);
        }
        lock(&self.servers.team).stopping = true;
        self.servers.turn.notify_all();
        self.servers.ring();
        self.desk.iter().for_each(|desk| desk.close());
        let this = std::thread::current().id();
        for thread in std::mem::take(&mut *lock(&self.servers.threads)) {
            if thread.thread().id() != this && thread.join().is_err() {
                fatal("a server has panicked", Errno::FAULT);
            }
        }
        // Not by the guardian, which has descriptors of its own.
        lock(&self.servers.lives).clear();
    }

    fn serve(&self) {
        SERVER.set(true);
        // Whoever sleeps for a page that a server was about to bring would sleep for ever.
        let abort = AbortOnPanic;
        loop {
            match self.servers.wait_for_turn() {
                Turn::Lead => {
                    LEADING.set(true);
                    let task = self.lead();
                    LEADING.set(false);
                    let Some(task) = task else { break };
                    self.perform(task);
                }
                Turn::Perform(task) => self.perform(task),
                Turn::End => break,
            }
        }
        std::mem::forget(abort);
    }

    /// Reads and serves until there is something to do for which another has taken the lead; `None`
    /// at the end.
    ///
    /// It waits only when there was nothing to read: a thread that has got its page has mostly
    /// touched the next one by now, and to read is less work than to be woken.
    fn lead(&self) -> Option<Task> {
        let mut due: Option<Instant> = None;
        let mut slept = false;
        loop {
            let mut tasks = Tasks::new();
            let early = self.read_outside_the_lock();
            let (found, faulting) = {
                let mut state = self.lock();
                let state = &mut *state;
                if let Some(mut early) = early {
                    std::mem::swap(&mut state.messages, &mut early);
                    self.apply_messages(state);
                }
                let found = self.read_messages(state);
                let faulting = state.faults.front().map(|fault| fault.thread);
                if !state.superseded.is_empty() {
                    self.drain(state);
                }
                self.resume_deferred(state, false);
                self.serve_quickly(state, &mut tasks);
                if due.take_if(|due| *due <= Instant::now()).is_some() {
                    self.sweep(state);
                    if self.has_watches_to_review() && !state.is_anything_out() {
                        tasks.push(Task::Unwatch);
                    }
                    state.faults.extend(state.retries.drain(..));
                    self.resume_deferred(state, true);
                    self.serve_quickly(state, &mut tasks);
                }
                if !state.aftermath.is_empty() && !self.is_settling() {
                    tasks.push(Task::Settle);
                }
                let idle = self.is_registered_in_vain(state);
                let unfinished = idle || !state.retries.is_empty() || !state.deferred.is_empty();
                due = due.filter(|_| unfinished);
                if unfinished && due.is_none() {
                    due = Some(Instant::now() + PAUSE);
                }
                (found, faulting)
            };
            let wanted = tasks.len();
            // Others who wait for a copy are quicker served by several.
            tasks.retain(|task| !self.perform_at_once(task, wanted == 1));
            let performed = tasks.len() < wanted;
            if let Some(thread) = faulting.filter(|_| slept) {
                lock(&self.servers.placement).note(thread);
            }
            if !tasks.is_empty()
                && let Some(task) = self.servers.hand_over(tasks)
            {
                return Some(task);
            }
            slept = !found && !performed;
            if slept && !self.wait_for_message(due) {
                return None;
            }
        }
    }

    /// Reads what there is to read as nobody must: a mutant, and nothing in every other build.
    fn read_outside_the_lock(&self) -> Option<Messages> {
        mutant!("events_are_read_outside_the_lock").then(|| {
            let mut messages = Messages::new();
            // If there is nothing, then there is nothing to apply.
            let _ = self.kernel.read(&mut messages);
            std::thread::yield_now();
            messages
        })
    }

    /// Waits for a message, or until `due`; `false` if the servers are to end.
    fn wait_for_message(&self, due: Option<Instant>) -> bool {
        let timeout = due.map(|due| {
            let pause = due.saturating_duration_since(Instant::now());
            Timespec::try_from(pause).expect("a pause is short")
        });
        let (uffd, bell) = (self.kernel.uffd().as_fd(), self.servers.bell.as_fd());
        let both = [uffd, bell];
        let mut fds = both.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => fatal("the userfaultfd cannot be waited for", error),
            }
        }
        if fds[1].revents().is_empty() {
            return true;
        }
        // What rang before this read is seen by the look that follows it.
        let _ = rustix::io::read(&self.servers.bell, &mut [0; 8]);
        !lock(&self.servers.team).stopping
    }

    /// Serves the faults that have been read, as far as nobody can delay it.
    fn serve_quickly(&self, state: &mut State, tasks: &mut Tasks) {
        while let Some(fault) = state.faults.pop_front() {
            count(&self.counters.faults, 1);
            let Some((first, extent)) = state.at(fault.page) else {
                self.serve_hole(state, fault);
                continue;
            };
            match &extent.place {
                Place::Transit { isolation, .. } => {
                    count(&self.counters.faults_in_transit, 1);
                    let isolation = *isolation;
                    state.await_isolation(isolation);
                }
                Place::Device(block) => {
                    let in_place = block.in_place(&*self.memory).is_some();
                    let (pagemap, order) = (Arc::clone(block.pagemap()), self.mapped_order(extent));
                    tasks.push(Task::Home { pagemap, page: fault.page, order, fault, in_place });
                }
                Place::Held { .. } => {
                    count(&self.counters.revoked, 1);
                    tasks.push(Task::Revoke(fault));
                }
                Place::Parked(_) => {
                    if self.release_block(state, first).parked > 0 {
                        self.retry(state, fault, Failure::Memory);
                    }
                }
            }
        }
    }

    /// Serves a fault on a page that is not out: it is untouched, or was discarded.
    fn serve_hole(&self, state: &mut State, fault: Fault) {
        let Fault { page, .. } = fault;
        let range = PageRange::from(page);
        if state.poisoned.contains(&page.number()) {
            self.lift_poison(state, fault);
            return;
        }
        if self.staging.range().contains(page) {
            self.staging.fill(range);
        } else if self.is_registered_missing(state, range) {
            // What `mremap` has grown is registered without our knowing, and would not be released.
            // The kernel fills it, and all others, by itself.
            if self.release_chunk(state, chunk_of(page)) {
                return;
            }
            // Who waits for a page of what is reserved may be who makes room.
            let growth = self.growth.get().filter(|_| !state.reserved.contains(&page.number()));
            if let Some(growth) = growth {
                self.grow(state, &**growth, fault);
                return;
            }
        }
        self.fill_hole(state, fault);
    }

    /// Fills a hole with zeroes.
    pub(super) fn fill_hole(&self, state: &mut State, fault: Fault) {
        let range = PageRange::from(fault.page);
        let result = self.kernel.zeropage(range).result;
        if result.is_ok() {
            // It was gone, if it had been there: what comes now is later.
            state.doubtful.remove(super::state::numbers(range));
        }
        self.judge_hole(state, fault, result);
    }

    /// Goes on with a fault on a hole after the attempt to fill it.
    pub(super) fn judge_hole(&self, state: &mut State, fault: Fault, filled: Result<(), Errno>) {
        let range = PageRange::from(fault.page);
        match filled {
            Ok(()) => count(&self.counters.zero_fills, 1),
            Err(Errno::AGAIN) => {
                self.drain(state);
                state.faults.push_back(fault);
            }
            // Another has filled it, or it is not mapped any more: the thread finds out.
            Err(Errno::EXIST | Errno::NOENT | Errno::INVAL | Errno::SRCH) => self.wake(range),
            Err(_) => self.retry(state, fault, Failure::Memory),
        }
    }

    /// Lets a page be touched again that was poisoned and is not out: it is zeroes.
    fn lift_poison(&self, state: &mut State, fault: Fault) {
        let range = PageRange::from(fault.page);
        match self.kernel.copy_home(self.zeroes.first(), range).result {
            Err(Errno::AGAIN) => {
                self.drain(state);
                state.faults.push_back(fault);
            }
            Err(Errno::NOMEM) => self.retry(state, fault, Failure::Memory),
            // It is there, or was replaced, or is gone.
            Ok(()) | Err(_) => {
                state.poisoned.remove(super::state::numbers(range));
                self.wake(range);
            }
        }
    }

    /// Tries a fault again a little later, or lets the access fail.
    fn retry(&self, state: &mut State, fault: Fault, why: Failure) {
        let since = fault.failing_since.unwrap_or_else(Instant::now);
        if since.elapsed() < self.patience {
            self.try_later(state, Fault { failing_since: Some(since), ..fault });
        } else {
            self.refuse(state, fault, why);
        }
    }

    /// Lets an access fail, as the kernel does where it cannot bring a page: a load or store by
    /// `SIGBUS`, a system call by `EFAULT`. The page stays where it is.
    ///
    /// A thread of the program gets a signal, and the next touch is a new fault. Where a signal would
    /// not do, which is in a system call and where `SIGBUS` is blocked, the page is poisoned until it
    /// has come home after all.
    fn refuse(&self, state: &mut State, fault: Fault, why: Failure) {
        let Fault { page, thread, .. } = fault;
        count(&self.counters.refused, 1);
        let code = match why {
            Failure::Memory => BusCode::NoMemory,
            Failure::Device => BusCode::Hardware,
        };
        if thread::takes_sigbus(thread) && thread::send_sigbus(thread, page.address(), code).is_ok()
        {
            return;
        }
        state.poisoned.insert(super::state::numbers(page.into()));
        if self.kernel.uffd().poison(page.into(), true).result.is_err() {
            self.wake(page.into());
        }
        // It may come home by itself.
        self.try_later(state, Fault { failing_since: Some(Instant::now()), ..fault });
    }

    fn try_later(&self, state: &mut State, fault: Fault) {
        state.retries.push(fault);
        self.call_leader();
    }

    /// Makes the leader look at the state: it may be waiting without a limit.
    pub(super) fn call_leader(&self) {
        self.servers.ring();
    }

    /// Does a task if that takes nobody else. `alone` says that there is no other.
    fn perform_at_once(&self, task: &Task, alone: bool) -> bool {
        let Task::Home { pagemap, page, order, fault, in_place } = task else { return false };
        // Nothing to copy or soon copied, nobody to tell, and nobody to ask who may take a while.
        let soon = *in_place || (alone && pagemap.memory().is_prompt());
        if !soon || self.notifiers.live() > 0 || !pagemap.policies().are_prompt() {
            return false;
        }
        self.bring(pagemap, *page, *order, *fault);
        true
    }

    fn perform(&self, task: Task) {
        match task {
            Task::Home { pagemap, page, order, fault, .. } => {
                self.bring(&pagemap, page, order, fault)
            }
            Task::Revoke(fault) => match self.revoke(fault.page).parked {
                0 => self.look_after(fault.page),
                _ => self.retry(&mut self.lock(), fault, Failure::Memory),
            },
            Task::Settle => {}
            Task::Unwatch => self.unwatch(),
        }
        self.settle();
        let idle = self.is_registered_in_vain(&self.lock());
        if idle {
            // The leader may be waiting without a limit, from before this was so.
            self.call_leader();
        }
    }

    /// Tells whether something may be registered that need not be, and can be given up now.
    pub(super) fn is_registered_in_vain(&self, state: &State) -> bool {
        let chunks = !state.emptied.is_empty() && !state.holding;
        let any = chunks || state.hold_ended || self.has_watches_to_review();
        any && !state.is_anything_out()
    }

    fn bring(&self, pagemap: &Arc<DevicePagemap>, page: Page, order: Order, fault: Fault) {
        match pagemap.bring_home(self, page, order) {
            // Home, and whoever slept for it is awake; or on its way, and then its arrival wakes
            // them. If it is neither, the thread is to look again.
            Ok(()) => self.look_after(page),
            Err(FaultError::Released) => {}
            Err(error) => {
                let complaint = || format!("{page} does not come home: {error}");
                self.lock().aftermath.complain(complaint);
                let why = match error {
                    FaultError::OutOfMemory { .. } => Failure::Memory,
                    _ => Failure::Device,
                };
                self.retry(&mut self.lock(), fault, why);
            }
        }
    }

    /// Sees to a page after somebody was to bring it home: it may have moved on meanwhile.
    fn look_after(&self, page: Page) {
        let mut state = self.lock();
        match state.at(page) {
            None => {}
            Some((_, extent)) => match &extent.place {
                Place::Transit { isolation, .. } => {
                    let isolation = *isolation;
                    state.await_isolation(isolation);
                }
                _ => self.wake(page.into()),
            },
        }
    }

    /// Tells whether what events have left to do is for the leader: all that it has read itself, of
    /// which no message will remind it, and children, whose parent waits.
    pub(super) fn leaves_aftermath(&self, state: &State) -> bool {
        state.aftermath.children || (LEADING.get() && !state.aftermath.is_empty())
    }

    /// Takes what events have left to do, as far as it is for this thread.
    pub(super) fn take_aftermath(&self, state: &mut State) -> Aftermath {
        let mut aftermath = std::mem::take(&mut state.aftermath);
        if aftermath.children && !SERVER.get() {
            (aftermath.children, state.aftermath.children) = (false, true);
            self.call_leader();
        }
        aftermath
    }

    /// Does what events have left to do, unless this is the leader, who does it after it has handed
    /// over.
    pub(super) fn settle_unless_leading(&self) {
        if !LEADING.get() {
            self.settle();
        }
    }

    /// Does what [`Backend::exit`](uhmm::Backend::exit) says: brings everything home, gives up all
    /// registrations, and ends the servers.
    ///
    /// What cannot come home keeps its servers: a process that cannot detach is better off than one
    /// that has lost a page.
    pub(super) fn take_apart(&self) {
        if !self.is_here() {
            return;
        }
        self.reserve_this_thread();
        // Nothing leaves any more.
        self.lock().over = true;
        let began = Instant::now();
        while !self.bring_everything_home() {
            if began.elapsed() > PATIENCE {
                let pages = self.lock().pages_out();
                tracing::error!(target: "uhmm", pages, "cannot be brought home: uhmm stays attached");
                return;
            }
            std::thread::sleep(PAUSE);
        }
        let mut state = self.lock();
        // Also what the kernel registered as a part of what grew.
        for vma in self.kernel.vmas() {
            // What was not registered is refused, and that is all.
            let _ = self.kernel.uffd().unregister(vma.range);
        }
        let registered: Vec<_> = state.registered.iter().map(|(range, _)| range.clone()).collect();
        for range in registered {
            // Closing the userfaultfd does what is left.
            let _ = self.kernel.unregister(super::state::range_of(range.clone()));
            state.registered.remove(range.clone());
            self.note_released(&mut state, range);
        }
        self.end_forks(&mut state);
        drop(state);
        self.stop_servers();
        self.staging.release();
        // From here on the kernel has nobody to wait for. A child may still have the descriptor, so
        // this alone would not be enough.
        if let Err(error) = self.kernel.uffd().retire(self.servers.bell()) {
            fatal("the userfaultfd cannot be closed", error);
        }
        self.settle();
        crate::process::detached();
    }

    /// Brings home what is out, as far as it can be had now, and tells whether that was all.
    pub(super) fn bring_everything_home(&self) -> bool {
        // No device has an owner made just now, so all are foreign to it.
        let nobody = Some(Owner::new());
        loop {
            let found = {
                let state = self.lock();
                let mut extents = state.extents();
                extents.next().map(|(first, extent)| (first, extent.order))
            };
            let Some((first, order)) = found else { return true };
            let range = first.block(order);
            let deadline = Some(Instant::now() + PATIENCE);
            if self.fetch_home(range, nobody, deadline).is_err() {
                return false;
            }
        }
    }
}

/// Tells whether the calling thread is a server.
pub(super) fn is_server() -> bool {
    SERVER.get()
}

/// Ends the process if it is dropped.
pub(super) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        fatal("a server has panicked", Errno::FAULT);
    }
}
