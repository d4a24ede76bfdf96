//! Threads that serve, and what they stand on.
//!
//! A thread that serves faults must never wait for a fault itself. No signal handler of the program
//! may run on it (it could touch anything), and its stack and its thread-local variables must never
//! move to a device: [`spawn`] sees to the first, [`stack_of_this_thread`] and
//! [`tls_of_this_thread`] tell what must stay.

use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, UnshareFlags};
use uhmm::PageRange;
use uhmm::mmu_notifier::VaRange;

use super::allocator;

/// How far around the thread pointer its variables are taken to be, in bytes.
const TLS_BYTES: u64 = 64 << 10;

/// The field of `/proc/self/task/TID/stat` with the processor that a thread last ran on, counted
/// from the one after the name (proc_pid_stat(5), field 39).
const PROCESSOR_FIELD: usize = 39 - 3;

/// Starts a thread that no signal reaches: all are blocked from before its first instruction,
/// except the two that the C library keeps for itself (`setuid` of another thread waits for one of
/// them).
///
/// # Errors
///
/// What `pthread_create` or `pthread_sigmask` said, `EAGAIN` above all.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, Errno> {
    // A thread begins with the signal mask of the one that makes it.
    let before = SignalMask::block_all()?;
    // What the standard library keeps for the thread is as little to move as its stack.
    let thread = allocator::private(|| std::thread::Builder::new().name(name.to_owned()).spawn(f));
    drop(before);
    thread.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
}

/// The signal mask that a thread had; dropping it restores it.
struct SignalMask(libc::sigset_t);

impl SignalMask {
    /// Blocks every signal that the C library lets a program block.
    fn block_all() -> Result<SignalMask, Errno> {
        let mut all = MaybeUninit::uninit();
        // SAFETY: `sigfillset` initialises the set that it is given.
        let filled = unsafe { libc::sigfillset(all.as_mut_ptr()) };
        debug_assert_eq!(filled, 0, "sigfillset fails only for bad pointers");
        let mut before = MaybeUninit::uninit();
        // SAFETY: `all` was initialised above, and `before` is room for a set.
        let outcome =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr()) };
        errno(outcome)?;
        // SAFETY: on success `pthread_sigmask` has stored the mask that was.
        Ok(SignalMask(unsafe { before.assume_init() }))
    }
}

impl Drop for SignalMask {
    fn drop(&mut self) {
        // SAFETY: the set is one that `pthread_sigmask` has returned.
        let restored =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, core::ptr::null_mut()) };
        debug_assert_eq!(restored, 0, "pthread_sigmask fails only for bad arguments");
    }
}

/// Returns the stack of the calling thread: all of what it may grow to, without the guard.
///
/// Of the main thread this is what `RLIMIT_STACK` allows now. The C library may allocate memory to
/// find that out.
///
/// # Errors
///
/// What `pthread_getattr_np` said.
pub(crate) fn stack_of_this_thread() -> Result<PageRange, Errno> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: `pthread_self` has no conditions.
    let this = unsafe { libc::pthread_self() };
    // SAFETY: the thread is the calling one, so it lives, and `attributes` has room.
    errno(unsafe { libc::pthread_getattr_np(this, attributes.as_mut_ptr()) })?;
    let (mut start, mut bytes) = (core::ptr::null_mut(), 0);
    // SAFETY: `attributes` was initialised by the call that succeeded.
    let got =
        unsafe { libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut start, &raw mut bytes) };
    // SAFETY: as above, and it is destroyed once.
    let destroyed = unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    errno(got)?;
    errno(destroyed)?;
    covering(start.addr() as u64, bytes as u64).ok_or(Errno::RANGE)
}

/// Returns the 64 KiB on each side of the calling thread's thread pointer: its control block and
/// its thread-local variables of the objects that were loaded when the program began. Those of
/// objects loaded later are told by
/// [`thread_local_segments`](super::objects::thread_local_segments).
pub(crate) fn tls_of_this_thread() -> PageRange {
    // SAFETY: `pthread_self` has no conditions.
    let this = unsafe { libc::pthread_self() } as u64;
    let first = this.saturating_sub(TLS_BYTES);
    covering(first, 2 * TLS_BYTES).expect("a thread pointer is not at the top of the address space")
}

/// Returns where the calling thread finds the thread-local variables of a shared library: the
/// table (`dtv`) that its thread pointer leads to, which the loader keeps in the C library's heap.
/// `None` where the C library is not glibc, which alone is known to have it there.
#[cfg(all(target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn tls_table_of_this_thread() -> Option<PageRange> {
    /// The thread control block, as far as it is known: where the table is (the ABI for
    /// thread-local storage, variants I and II; glibc's `tcbhead_t`).
    const TABLE: usize = if cfg!(target_arch = "x86_64") { 1 } else { 0 };
    /// The size of an entry. The one before the first tells how many there are.
    const ENTRY: u64 = 16;
    let control = thread_pointer();
    // SAFETY: the thread control block of this thread has this word, on the word's boundary.
    let table = unsafe { control.add(TABLE) };
    // SAFETY: as above; only this thread changes it.
    let entries = unsafe { table.read() };
    let count = entries.wrapping_sub(ENTRY);
    let counted: *const u64 = std::ptr::with_exposed_provenance(count as usize);
    // SAFETY: glibc keeps the number of entries in the one before the first.
    let length = unsafe { counted.read() };
    // The entry of the generation comes first, and is not counted.
    covering(count, length.saturating_add(2).saturating_mul(ENTRY))
}

/// Returns where the calling thread's control block is.
#[cfg(all(target_env = "gnu", target_arch = "x86_64"))]
fn thread_pointer() -> *const u64 {
    // SAFETY: `pthread_self` has no conditions. What it returns is the thread pointer on x86-64.
    let this = unsafe { libc::pthread_self() };
    std::ptr::with_exposed_provenance(this as usize)
}

/// Returns where the calling thread's control block is.
#[cfg(all(target_env = "gnu", target_arch = "aarch64"))]
fn thread_pointer() -> *const u64 {
    let this: usize;
    // SAFETY: reads a register that every program may read.
    unsafe { core::arch::asm!("mrs {}, tpidr_el0", out(reg) this, options(nomem, nostack)) };
    std::ptr::with_exposed_provenance(this)
}

/// Returns nothing: where this C library keeps them is not known.
#[cfg(not(all(target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(crate) fn tls_table_of_this_thread() -> Option<PageRange> {
    None
}

/// Returns the number of the calling thread, as the kernel counts threads.
pub(crate) fn gettid() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}

/// Lets thread `tid` of this process run on the processors `cpus` only.
///
/// # Errors
///
/// `ESRCH` if there is no such thread, `EINVAL` if none of the processors is there for this process
/// or one is numbered 1024 or more.
pub(crate) fn set_affinity(tid: u32, cpus: &[u32]) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        let cpu = usize::try_from(cpu).map_err(|_| Errno::INVAL)?;
        if cpu >= CpuSet::MAX_CPU {
            return Err(Errno::INVAL);
        }
        set.set(cpu);
    }
    let tid = i32::try_from(tid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    rustix::thread::sched_setaffinity(Some(tid), &set)
}

/// What a `SIGBUS` says went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BusCode {
    /// `ENOMEM`: there is no memory for the page.
    NoMemory,
    /// `EIO`: what has the page does not give it.
    Hardware,
}

/// Tells whether a signal would end a wait of thread `tid` of this process for a page: it waits in
/// its own code and not in a system call, and does not block `SIGBUS`. Allocates nothing.
pub(crate) fn takes_sigbus(tid: u32) -> bool {
    let mut text = [0_u8; 4096];
    // Where it waits in its own code, the number of its system call is -1.
    let outside =
        read_of(tid, "syscall", &mut text).is_ok_and(|length| text[..length].starts_with(b"-1 "));
    outside
        && read_of(tid, "status", &mut text)
            .ok()
            .and_then(|length| blocked_in(&text[..length]))
            .is_some_and(|blocked| blocked & (1 << (libc::SIGBUS - 1)) == 0)
}

/// Finds the set of blocked signals in the text of a `status` file.
fn blocked_in(status: &[u8]) -> Option<u64> {
    let mut lines = status.split(|&byte| byte == b'\n');
    let digits = lines.find_map(|line| line.strip_prefix(b"SigBlk:\t"))?;
    u64::from_str_radix(str::from_utf8(digits).ok()?.trim(), 16).ok()
}

/// Sends thread `tid` of this process the signal that the kernel sends where it cannot bring a
/// page, with the address, the code `SI_QUEUE`, and the reason as `si_errno`.
///
/// # Errors
///
/// `ESRCH` if there is no such thread; `EAGAIN` if too many signals are queued.
pub(crate) fn send_sigbus(tid: u32, address: u64, code: BusCode) -> Result<(), Errno> {
    let tid = i32::try_from(tid).map_err(|_| Errno::SRCH)?;
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: all zeroes are a `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { core::mem::zeroed() };
    info.si_signo = libc::SIGBUS;
    // The codes of the kernel's own signals are the kernel's to send.
    info.si_code = libc::SI_QUEUE;
    info.si_errno = match code {
        BusCode::NoMemory => libc::ENOMEM,
        BusCode::Hardware => libc::EIO,
    };
    let fields = (&raw mut info).cast::<u64>();
    // SAFETY: the address is the first of the fields that depend on the signal, 16 bytes into a
    // structure of 128 (sigaction(2), x86-64 and all other 64-bit machines).
    let si_addr = unsafe { fields.add(2) };
    // SAFETY: it lies within `info`, and is aligned like it.
    unsafe { si_addr.write(address) };
    // SAFETY: the kernel reads `info`. A thread that does not expect the signal ends, like one for
    // which the kernel itself cannot bring a page.
    let sent = unsafe {
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, tid, libc::SIGBUS, &raw const info)
    };
    match sent {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// Reads a file of thread `tid` of this process, as much of it as there is room for.
fn read_of(tid: u32, name: &str, text: &mut [u8]) -> Result<usize, Errno> {
    let mut path = [0_u8; 48];
    let mut rest = &mut path[..];
    write!(rest, "/proc/self/task/{tid}/{name}").map_err(|_| Errno::NAMETOOLONG)?;
    let length = path.iter().position(|&byte| byte == 0).unwrap_or(path.len());
    let file = rustix::fs::open(&path[..length], OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::read(&file, text)
}

/// Returns the processor that the calling thread runs on, or did a moment ago.
#[cfg(test)]
fn getcpu() -> u32 {
    u32::try_from(rustix::thread::sched_getcpu()).expect("processors are numbered by 32 bits")
}

/// Returns the processor that thread `tid` of this process last ran on. Allocates nothing.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` if there is no such thread; `EIO` if `/proc` says something unheard of.
pub(crate) fn processor_of(tid: u32) -> Result<u32, Errno> {
    // The name in the second field is at most 64 bytes, each of the others a number.
    let mut text = [0_u8; 2048];
    let length = read_of(tid, "stat", &mut text)?;
    processor_in(&text[..length]).ok_or(Errno::IO)
}

/// Gives the calling thread descriptors of its own, and closes all of them but `kept`: whatever the
/// others close, what is behind those stays open while this thread lives (`CLONE_FILES` of
/// unshare(2), and close_range(2), Linux 5.9).
///
/// Nothing that this thread uses after this may be among the others.
///
/// # Errors
///
/// `ENOMEM`, `EMFILE`; `ENOSYS` before Linux 5.9; `EPERM` where a sandbox forbids it. The thread
/// may have descriptors of its own then, and all of them.
pub(crate) fn keep_descriptors(kept: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    // SAFETY: the numbers mean the same as before, in a table of this thread's own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES) }?;
    let mut kept: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut next = 0;
    for fd in kept.into_iter().map(Some).chain([None]) {
        let last = fd.map_or(Some(u32::MAX), |fd| fd.checked_sub(1));
        if let Some(last) = last.filter(|&last| next <= last) {
            // SAFETY: in the table of this thread alone, where nobody uses them.
            let closed = unsafe { libc::syscall(libc::SYS_close_range, next, last, 0) };
            if closed != 0 {
                let error = std::io::Error::last_os_error();
                return Err(Errno::from_io_error(&error).unwrap_or(Errno::BADF));
            }
        }
        next = fd.map_or(next, |fd| fd + 1);
    }
    Ok(())
}

/// Whether some thread has given itself descriptors of its own.
static OWN_DESCRIPTORS: AtomicBool = AtomicBool::new(false);

/// Gives the calling thread, and those that it makes from now on, descriptors of their own: none but
/// `/dev/null` as 0, 1 and 2, so that nothing that is opened later is taken for those.
///
/// # Errors
///
/// As [`keep_descriptors`]; what open(2) said of `/dev/null`.
pub(crate) fn own_descriptors() -> Result<(), Errno> {
    keep_descriptors(&[])?;
    // Relaxed: it is read to find a better way to say something, and no more.
    OWN_DESCRIPTORS.store(true, Ordering::Relaxed);
    for _ in 0..3 {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
        std::mem::forget(null);
    }
    Ok(())
}

/// Writes to the program's standard error, as far as it has one.
pub(crate) fn tell(text: &str) {
    // Relaxed: see `own_descriptors`.
    if OWN_DESCRIPTORS.load(Ordering::Relaxed) {
        // That of the first thread, which has the program's.
        let stderr = std::fs::OpenOptions::new().append(true).open("/proc/self/fd/2");
        if stderr.is_ok_and(|mut stderr| stderr.write_all(text.as_bytes()).is_ok()) {
            return;
        }
    }
    eprint!("{text}");
}

/// Tells whether thread `tid` of this process sleeps in poll(2). `None` where the kernel does not
/// say.
///
/// # Errors
///
/// `ENOENT` or `ESRCH` if there is no such thread.
pub(crate) fn is_in_poll(tid: u32) -> Result<Option<bool>, Errno> {
    let calls = [libc::SYS_poll, libc::SYS_ppoll];
    match std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")) {
        Ok(text) => {
            let call = text.split_whitespace().next().and_then(|call| call.parse().ok());
            Ok(Some(call.is_some_and(|call| calls.contains(&call))))
        }
        Err(error) => match Errno::from_io_error(&error) {
            Some(errno @ (Errno::SRCH | Errno::NOENT)) => Err(errno),
            _ => Ok(None),
        },
    }
}

/// Finds the processor in the text of a `stat` file. The name, which may hold spaces and
/// parentheses of its own, ends at the last parenthesis.
fn processor_in(stat: &[u8]) -> Option<u32> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let fields = stat[name_end + 1..].split(|byte| byte.is_ascii_whitespace());
    let field = fields.filter(|field| !field.is_empty()).nth(PROCESSOR_FIELD)?;
    str::from_utf8(field).ok()?.parse().ok()
}

/// Returns the pages that hold any of `bytes` bytes at `address`.
pub(super) fn covering(address: u64, bytes: u64) -> Option<PageRange> {
    let last = address.checked_add(bytes.checked_sub(1)?)?;
    VaRange::from_bounds(address, last).map(PageRange::covering)
}

/// Reads the outcome of a function of the C library that returns its error.
pub(super) fn errno(outcome: i32) -> Result<(), Errno> {
    if outcome == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(outcome)) }
}

#[cfg(test)]
mod tests;
