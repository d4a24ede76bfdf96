//! What Rust's standard library changes for a program that it starts, undone.
//!
//! Before `main` the standard library ignores `SIGPIPE` and opens `/dev/null` where one of the
//! first three descriptors is closed; for a program that it starts it sets `SIGPIPE` to its default
//! and unblocks all signals. A supervisor is to pass on what it was given. So `note` looks before
//! the standard library does, and [`spawn`] puts that back between `fork` and `execve`.

use core::mem::MaybeUninit;
use core::ptr;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bit `s - 1`: signal `s` was ignored when the program started. The kernel has 64 signals.
static IGNORED: AtomicU64 = AtomicU64::new(0);

/// Bit `d`: descriptor `d` was closed, for the first three.
static CLOSED: AtomicU64 = AtomicU64::new(0);

/// How many signals there are.
const SIGNALS: i32 = 64;

/// Called by the loader before `main`, as all of `.init_array`.
#[used]
// SAFETY: what the loader calls from this section are functions without a result that may have
// arguments, which a function without any ignores in the C calling convention.
#[unsafe(link_section = ".init_array")]
static NOTE: extern "C" fn() = note;

/// Notes what the process was given. Makes system calls and nothing else, and changes nothing.
extern "C" fn note() {
    let ignored = (1..=SIGNALS).filter(|&signal| {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: nothing is installed, as the new action is null; `action` has room for the old
        // one.
        let asked = unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) };
        // SAFETY: all zeroes is a `sigaction`, and so is what the call has written.
        let action = unsafe { action.assume_init() };
        asked == 0 && action.sa_sigaction == libc::SIG_IGN
    });
    let ignored = ignored.fold(0, |mask, signal| mask | 1 << (signal - 1));
    let closed = (0..3).filter(|&descriptor| {
        // SAFETY: it asks for a flag, and changes nothing.
        unsafe { libc::fcntl(descriptor, libc::F_GETFD) == -1 }
    });
    let closed = closed.fold(0, |mask, descriptor| mask | 1 << descriptor);
    // Relaxed, and so where they are read: there is one thread now, and what started the others
    // orders this before them.
    IGNORED.store(ignored, Ordering::Relaxed);
    CLOSED.store(closed, Ordering::Relaxed);
}

/// Tells whether `signal` was ignored when this process started.
pub fn was_ignored(signal: i32) -> bool {
    (1..=SIGNALS).contains(&signal) && IGNORED.load(Ordering::Relaxed) >> (signal - 1) & 1 == 1
}

/// All signals, blocked in the thread that made this, until it is dropped.
#[derive(Debug)]
#[must_use = "signals are blocked for as long as this exists"]
pub struct Held {
    before: libc::sigset_t,
    /// What was blocked is that of a thread.
    thread: core::marker::PhantomData<*const ()>,
}

impl Held {
    fn all() -> io::Result<Held> {
        let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: `all` has room for a set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: `all` is a set, written by `sigfillset`, and `before` has room for one.
        let error =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: `pthread_sigmask` has written it.
        let before = unsafe { before.assume_init() };
        Ok(Held { before, thread: core::marker::PhantomData })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        set_mask(&self.before);
    }
}

/// Sets which signals are blocked in the calling thread. May be called between `fork` and `execve`.
fn set_mask(mask: &libc::sigset_t) {
    // SAFETY: `mask` is a set; the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut()) };
}

/// Starts `command` with the signals that this process was given: those ignored that were ignored,
/// and those blocked that are blocked in the calling thread; and without those of the first three
/// descriptors that were closed.
///
/// No signal is lost around it. Until the returned value is dropped all are blocked in the calling
/// thread, so that the caller can decide before what is done with them; in the program a signal has
/// the effect that it would have had without this process, which itself does not ignore `SIGCHLD`
/// any more: else the program's status would be lost. That needs, and is for the caller to see to,
/// that no handlers are installed yet.
///
/// # Errors
///
/// Those of [`Command::spawn`].
pub fn spawn(command: &mut Command) -> io::Result<(Child, Held)> {
    let held = Held::all()?;
    let mask = held.before;
    let changed = [libc::SIGPIPE, libc::SIGCHLD].map(|signal| (signal, was_ignored(signal)));
    if was_ignored(libc::SIGCHLD) {
        // SAFETY: the default is no handler, so nothing of ours is called.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    }
    let closed = CLOSED.load(Ordering::Relaxed);
    let restore = move || {
        for (signal, _) in changed.iter().filter(|(_, ignored)| *ignored) {
            // SAFETY: nothing of ours handles these signals.
            unsafe { libc::signal(*signal, libc::SIG_IGN) };
        }
        for descriptor in (0..3).filter(|descriptor| closed >> descriptor & 1 == 1) {
            // SAFETY: it was closed when the process started, and what the standard library has put
            // there is used by nobody in this child.
            unsafe { libc::close(descriptor) };
        }
        set_mask(&mask);
        Ok(())
    };
    // SAFETY: the closure calls `signal`, `close` and `pthread_sigmask`, which may be called in a
    // child of a process with threads (signal-safety(7)), and allocates nothing.
    unsafe { command.pre_exec(restore) };
    let child = command.spawn()?;
    Ok((child, held))
}

/// Ends this process by `signal`, without a core file. Where the signal ends nobody, it ends with
/// the status 128 and the signal's number, as shells have it.
pub fn end_by(signal: i32) -> ! {
    let limit = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    let no_core = rustix::process::setrlimit(rustix::process::Resource::Core, limit);
    let dumpable = rustix::process::DumpableBehavior::NotDumpable;
    // Where the core goes to a program, the limit is not asked.
    let _ = no_core.and(rustix::process::set_dumpable_behavior(dumpable));
    // SAFETY: the default is no handler, so nothing of ours is called.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    let mut only = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `only` has room for a set.
    unsafe { libc::sigemptyset(only.as_mut_ptr()) };
    // SAFETY: `only` is a set, written by `sigemptyset`; another number is an error and changes
    // nothing.
    unsafe { libc::sigaddset(only.as_mut_ptr(), signal) };
    // SAFETY: `only` is a set; the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, only.as_ptr(), ptr::null_mut()) };
    // SAFETY: it sends a signal to the calling thread.
    unsafe { libc::raise(signal) };
    std::process::exit(128 + signal)
}
