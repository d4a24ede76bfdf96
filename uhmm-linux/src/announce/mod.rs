//! Announcements: what the program does to its mappings is told before it is done, and ended after.
//!
//! A seccomp filter stops every system call that changes mappings, of any thread, of whatever code
//! makes it. A thread of this process, an *executor*, is told. It announces the change
//! (`invalidate_range_start`), so that no device uses the range any more, makes the call itself, which
//! has the same effect since it has the same memory, ends the announcement, and hands the result to
//! the thread that was stopped. So when `munmap` returns, no device has used the old translation since
//! before the mapping went. [`table`] says which calls these are.
//!
//! What could go wrong, and does not:
//!
//! * *A signal* arrives while a call is under way. The kernel would begin the call again, and it would
//!   be made twice. The filter is one whose calls cannot be interrupted once they have been received
//!   (`WAIT_KILLABLE_RECV`); before that they have not been made at all.
//! * *The executors' own calls* would stop too: filters are for all threads. Those that change mappings
//!   are made by one instruction, which the filter lets pass ([`gate`]), as are those of this crate's
//!   own memory, which may be made under locks.
//! * *A thread waits for an executor, and that for the thread.* An announcement takes the locks of the
//!   notifiers and of mirrors, and calls devices. So whoever holds one of those locks, or is what a
//!   device waits for, must make no call that stops. This crate's own memory does not come from the
//!   program's allocator (without [`Allocator`](crate::Allocator) nothing is announced:
//!   [`NoAnnouncement::Allocator`]), and the rest is the device's author's to keep.
//! * *An executor is busy.* A call may wait for the servers, when it unmaps what is away; servers make no
//!   calls that stop. It may wait for a device, or for a file system. There are several, and another
//!   one takes over ([`relay`]).
//! * *A child* has the filter and shares nothing else. Its calls are told of here, and continued: they
//!   are recognised by the number of the thread, which is none of this process. To make one here would
//!   change the wrong memory. A child that shares the memory (`vfork`) is as good as a thread.
//! * *This process ends, or becomes another program*, and children or the program go on, with a filter
//!   that nobody answers. Then the [`keeper`] does.
//! * *The program closes* the listener, with all its descriptors. A thread with descriptors of its own
//!   has another, and executors fetch it from there.
//!
//! The filter stays for as long as the process lives, and so do the executors: after the process has
//! detached they let calls continue, and when it attaches again they announce.
//!
//! [`gate`]: crate::sys::gate
//! [`keeper`]: crate::sys::keeper

mod filter;
mod ranges;
mod relay;
#[cfg(test)]
mod relay_tests;
mod sync;
pub(crate) mod table;

use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use rustix::io::Errno;
use smallvec::SmallVec;

use self::ranges::Change;
use self::relay::Relay;
use self::table::Call;
use crate::mutant::{dawdle, mutant};
use crate::space::{Space, fatal, lock};
use crate::sys::fork::ForkMark;
use crate::sys::keeper::{Board, Keeper, SLOTS};
use crate::sys::seccomp::{Answer, Listener, NATIVE, Notification, Slot};
use crate::sys::{allocator, gate, proxy, thread};

/// How many threads make calls.
const EXECUTORS: usize = 6;

const _: () = assert!(EXECUTORS <= SLOTS);

/// Why the changes that a program makes cannot be announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoAnnouncement {
    /// The program's allocator is not ours.
    #[error(
        "what announcing a change needs may lie in the program's heap, whose changes would wait for \
         their own announcement: make `uhmm_linux::Allocator` the global allocator"
    )]
    Allocator,
    /// The filter may not be installed.
    #[error(
        "a filter takes CAP_SYS_ADMIN, or a process that has renounced new privileges, after which \
         it cannot start setuid programs: prctl(PR_SET_NO_NEW_PRIVS) before attaching, or setpriv \
         --no-new-privs PROGRAM"
    )]
    Permission,
    /// There is a listener already: that of a parent, or of a supervisor.
    #[error(
        "a filter of this process has a listener already, that of a parent which announces or of a \
         supervisor: there can be one"
    )]
    Listened,
    /// A thread has a filter that others do not have.
    #[error("a thread has a seccomp filter that others do not have: attach before it is installed")]
    OtherFilter,
    /// The kernel or the processor does not have what it takes.
    #[error("it takes Linux 6.9 with CONFIG_SECCOMP_FILTER, on x86-64 ({errno})")]
    Missing {
        /// What the kernel said.
        errno: Errno,
    },
    /// Something else is missing.
    #[error(
        "threads or a process could not be started, or a file in memory not executed ({errno}): raise \
         RLIMIT_NPROC, or set vm.memfd_noexec=0"
    )]
    NoRoom {
        /// What the kernel said.
        errno: Errno,
    },
}

/// What is covered by the announcements of a process, and what is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Coverage {
    /// Whether the calls of all threads are, those of the future too.
    pub threads: bool,
    /// Whether those of code that is linked statically, or made by no compiler, are.
    pub static_code: bool,
    /// Whether those are that are made without the C library.
    pub raw_system_calls: bool,
    /// What is not announced, and what becomes of it.
    pub exceptions: &'static [Exception],
}

/// Something that is not announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exception {
    /// `IORING_OP_MADVISE`: the kernel makes it by itself. It is observed.
    IoUring,
    /// What a debugger has a thread do, or stores to its memory.
    Ptrace,
    /// Files truncated or punched by other processes, and system calls on the memory of this one that
    /// others make (`process_madvise`). The latter are observed.
    OtherProcesses,
    /// `open` with `O_TRUNC` of a file that is mapped here.
    TruncatingOpen,
    /// Children: they are not mirrored.
    Children,
    /// A `truncate` by a thread that has directories of its own: announced, and its end is not seen.
    OwnDirectories,
}

impl Coverage {
    const FULL: Coverage = Coverage {
        threads: true,
        static_code: true,
        raw_system_calls: true,
        exceptions: &[
            Exception::IoUring,
            Exception::Ptrace,
            Exception::OtherProcesses,
            Exception::TruncatingOpen,
            Exception::Children,
            Exception::OwnDirectories,
        ],
    };
}

/// What announces the changes of this process. There is one, for ever.
#[derive(Debug)]
struct Announcer {
    mark: ForkMark,
    /// Whom to announce to, while the process is attached.
    space: Mutex<Weak<Space>>,
    /// The descriptor of the listener, as executors know it.
    listener: Mutex<Arc<Listener>>,
    /// Who has one that nobody closes: the thread, and its number there.
    source: (u32, RawFd),
    relay: Relay,
    /// Two threads that set the end of the heap see where it was one after the other.
    brk: Mutex<()>,
}

static ANNOUNCER: OnceLock<Announcer> = OnceLock::new();

/// Held while the announcer is made.
static MAKING: Mutex<()> = Mutex::new(());

/// Has the changes of this process announced to `space` from now on.
///
/// # Errors
///
/// [`NoAnnouncement`].
pub(crate) fn announce_to(space: &Arc<Space>) -> Result<Coverage, NoAnnouncement> {
    if !allocator::is_installed() {
        return Err(NoAnnouncement::Allocator);
    }
    let making = lock(&MAKING);
    let announcer = match ANNOUNCER.get() {
        // That of a parent: the lock in it may never be released here.
        Some(announcer) if !announcer.mark.is_ours() => return Err(NoAnnouncement::Listened),
        Some(announcer) => announcer,
        None => start(space)?,
    };
    *lock(&announcer.space) = Arc::downgrade(space);
    drop(making);
    Ok(Coverage::FULL)
}

/// Starts the executors and the keeper, and installs the filter.
fn start(space: &Arc<Space>) -> Result<&'static Announcer, NoAnnouncement> {
    let no_room = |errno| NoAnnouncement::NoRoom { errno };
    let gate = gate::address().ok_or(NoAnnouncement::Missing { errno: Errno::NOSYS })?;
    let mark = ForkMark::new().map_err(no_room)?;
    // The threads first: to start one takes calls that will stop.
    let mut executors = Vec::new();
    for index in 0..EXECUTORS {
        let (begin, told) = channel::<Arc<Board>>();
        let space = Arc::clone(space);
        let (warm, is_warm) = channel();
        thread::spawn("uhmm-executor", move || execute(index, space, &warm, &told))
            .map_err(no_room)?;
        // It ends without a word if it panics, of which it tells itself.
        let _ = is_warm.recv();
        executors.push(begin);
    }
    let (tell, told) = channel();
    thread::spawn("uhmm-listener", move || listen(gate, &tell)).map_err(no_room)?;
    let Installed { source, board } = told.recv().map_err(|_| no_room(Errno::CHILD))??;
    // From here on calls stop. This thread makes none before there is somebody to answer.
    let listener = match proxy::fetch(source.0, source.1) {
        Ok(fd) => Listener::from_fd(fd),
        Err(error) => fatal("the announcements of changes cannot begin", error),
    };
    let announcer = Announcer {
        mark,
        space: Mutex::new(Weak::new()),
        listener: Mutex::new(Arc::new(listener)),
        source,
        relay: Relay::default(),
        brk: Mutex::new(()),
    };
    let announcer = ANNOUNCER.get_or_init(|| announcer);
    for begin in executors {
        // It is there: it waits for this.
        let _ = begin.send(Arc::clone(&board));
    }
    Ok(announcer)
}

/// What the thread with descriptors of its own has to say.
struct Installed {
    /// The listener: that thread, and the number it has there.
    source: (u32, RawFd),
    board: Arc<Board>,
}

/// The thread that has descriptors of its own. It starts the keeper and installs the filter. Then it
/// has the listener and the lock for as long as the process lives and is this program.
fn listen(gate: u64, tell: &Sender<Result<Installed, NoAnnouncement>>) {
    match install(gate) {
        Ok((listener, keeper, board)) => {
            let source = (thread::gettid(), listener.as_fd().as_raw_fd());
            // Whoever started this thread waits.
            let _ = tell.send(Ok(Installed { source, board }));
            let _kept = (listener, keeper);
            loop {
                std::thread::park();
            }
        }
        Err(error) => {
            let _ = tell.send(Err(error));
        }
    }
}

fn install(gate: u64) -> Result<(Listener, Keeper, Arc<Board>), NoAnnouncement> {
    let no_room = |errno| NoAnnouncement::NoRoom { errno };
    thread::keep_descriptors(&[]).map_err(no_room)?;
    let board = Arc::new(Board::new().map_err(no_room)?);
    board.lock().map_err(no_room)?;
    let keeper = Keeper::start(&board).map_err(|errno| match errno {
        Errno::NOSYS => NoAnnouncement::Missing { errno },
        errno => NoAnnouncement::NoRoom { errno },
    })?;
    let mut program = filter::build(gate);
    let listener = Listener::install(&mut program).map_err(|errno| match errno {
        Errno::ACCESS | Errno::PERM => NoAnnouncement::Permission,
        Errno::BUSY => NoAnnouncement::Listened,
        Errno::SRCH => NoAnnouncement::OtherFilter,
        Errno::NOMEM => NoAnnouncement::NoRoom { errno },
        errno => NoAnnouncement::Missing { errno },
    })?;
    if let Err(error) = keeper.hand_over(listener.as_fd()) {
        // Somebody has killed it in this moment. The filter is there.
        fatal("the keeper of the filter has ended", error);
    }
    Ok((listener, keeper, board))
}

/// An executor. It has done everything once that might have to be made for a thread, before there is a
/// filter that it would stop at.
fn execute(index: usize, space: Arc<Space>, warm: &Sender<()>, told: &Receiver<Arc<Board>>) {
    space.reserve_this_thread();
    space.try_announcement();
    // It lives longer than the process is attached.
    drop(space);
    let _ = warm.send(());
    // Nothing comes if there is no filter.
    let Ok(board) = told.recv() else { return };
    let announcer = ANNOUNCER.get().expect("it was made before anybody was told");
    // A device has panicked, or we have. The thread whose call this was would wait for ever, and nobody
    // knows what the device still uses.
    let ended = catch_unwind(AssertUnwindSafe(|| announcer.execute(&board.slot(index))));
    match ended {
        Err(_) => fatal("an executor has panicked", Errno::FAULT),
    }
}

impl Announcer {
    fn execute(&self, slot: &Slot<'_>) -> ! {
        loop {
            let lead = self.relay.wait_for_lead();
            let mut leads = true;
            while leads {
                let listener = self.listener();
                match listener.receive(slot) {
                    Ok(call) => {
                        let number = self.relay.begin(lead);
                        let answer = self.handle(&call);
                        leads = self.relay.end(number, lead);
                        self.reply(call.id, answer);
                    }
                    Err(Errno::NOENT | Errno::INTR) => {}
                    Err(error) => self.renew(&listener, error),
                }
            }
        }
    }

    fn listener(&self) -> Arc<Listener> {
        Arc::clone(&lock(&self.listener))
    }

    fn reply(&self, id: u64, answer: Answer) {
        loop {
            let listener = self.listener();
            match listener.answer(id, answer) {
                // The thread is gone, or the keeper was faster.
                Ok(()) | Err(Errno::NOENT | Errno::INPROGRESS) => return,
                Err(Errno::INTR) => {}
                Err(error) => self.renew(&listener, error),
            }
        }
    }

    /// Gets the listener again, since the program has closed it.
    fn renew(&self, stale: &Arc<Listener>, error: Errno) {
        if !matches!(error, Errno::BADF | Errno::NOTTY | Errno::INVAL) {
            fatal("the announcements of changes cannot go on", error);
        }
        let mut current = lock(&self.listener);
        if !Arc::ptr_eq(&current, stale) {
            return;
        }
        match proxy::fetch(self.source.0, self.source.1) {
            // The number may be that of something of the program's by now, and is not closed.
            Ok(fd) => {
                std::mem::forget(std::mem::replace(&mut *current, Arc::new(Listener::from_fd(fd))))
            }
            Err(Errno::MFILE | Errno::NFILE) => std::thread::yield_now(),
            Err(error) => fatal("the announcements of changes cannot go on", error),
        }
    }

    /// Decides about a call.
    fn handle(&self, call: &Notification) -> Answer {
        let here = proxy::is_thread_here(call.thread)
            || call.thread != 0 && proxy::shares(call.thread, proxy::Common::Memory);
        if !here {
            return Answer::Continue;
        }
        let space = lock(&self.space).upgrade();
        let (Some(space), Some(row)) = (space, table::find(call)) else {
            // Of another kind than the system's own: what it says is not looked at.
            let foreign = call.architecture != NATIVE || table::is_x32(call);
            return if foreign { Answer::Made(Err(Errno::NOSYS)) } else { Answer::Continue };
        };
        self.make(&space, row.call, call)
    }

    fn make(&self, space: &Space, what: Call, call: &Notification) -> Answer {
        if mutant!("nothing_is_announced") {
            return Answer::Continue;
        }
        let _one: Option<MutexGuard<'_, ()>> = (what == Call::Brk).then(|| lock(&self.brk));
        let change = match Change::find(what, call) {
            Ok(change) => change,
            Err(error) => return Answer::Made(Err(error)),
        };
        let mut announced: SmallVec<[_; 2]> =
            change.ranges.iter().map(|&range| space.announce(change.kind, range)).collect();
        if mutant!("announcements_end_before_the_call") {
            announced.clear();
            dawdle();
        }
        // After the announcement: what keeps a change waiting may itself be announcing.
        let turn = space.turns.change(&change.ranges);
        let answer = match change.by_thread {
            true => Answer::Continue,
            false => Answer::Made(proxy::make(i64::from(call.number), change.arguments)),
        };
        drop((turn, announced));
        // Relaxed: a number.
        space.counters.announced.fetch_add(1, Ordering::Relaxed);
        answer
    }
}
