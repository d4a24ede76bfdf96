//! seccomp filters that tell of system calls before they are made, and wait for what becomes of them
//! (user notification, Linux 5.0).
//!
//! `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV` (Linux 5.19) is asked for always: without it a signal
//! makes the kernel begin a call again that has been told of, and is being made in its place, so that
//! it is made twice. `SECCOMP_FILTER_FLAG_TSYNC_ESRCH` (5.7) lets one filter be for all threads, and
//! have a listener. With `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` (6.6), where it is to be had, both sides
//! wake each other on the processor that they are on.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};

const IOC_MAGIC: u8 = b'!';
pub(super) const NOTIF_RECV: Opcode = opcode::read_write::<Notification>(IOC_MAGIC, 0);
pub(super) const NOTIF_SEND: Opcode = opcode::read_write::<Response>(IOC_MAGIC, 1);
const NOTIF_SET_FLAGS: Opcode = opcode::write::<u64>(IOC_MAGIC, 4);

const GET_NOTIF_SIZES: u32 = 3;
const FLAG_WAIT_KILLABLE_RECV: u64 = 1 << 5;
const FD_SYNC_WAKE_UP: u64 = 1;
const RESPONSE_CONTINUE: u32 = 1;

/// The number by which the kernel names the architecture of this program's own calls.
#[cfg(target_arch = "x86_64")]
pub(crate) const NATIVE: u32 = 0xc000_003e;
/// The number by which the kernel names the architecture of this program's own calls.
#[cfg(target_arch = "aarch64")]
pub(crate) const NATIVE: u32 = 0xc000_00b7;
/// The number by which the kernel names the architecture of this program's own calls.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) const NATIVE: u32 = 0;

/// A system call that has been told of: `struct seccomp_notif`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Notification {
    /// What it is answered by.
    pub(crate) id: u64,
    /// The thread that makes it, by its number here; 0 if it has none here.
    pub(crate) thread: u32,
    flags: u32,
    /// The call, by its number in the table of `architecture`.
    pub(crate) number: i32,
    /// Whose table.
    pub(crate) architecture: u32,
    /// The address after the instruction that makes it.
    pub(crate) instruction: u64,
    /// Its arguments.
    pub(crate) arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// `struct seccomp_notif_sizes`.
#[repr(C)]
#[derive(Default)]
struct Sizes {
    notification: u16,
    response: u16,
    data: u16,
}

/// What becomes of a call that was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It returns what it returned to us, who made it.
    Made(Result<u64, Errno>),
    /// The thread makes it itself.
    Continue,
}

/// One instruction of a filter: `struct sock_filter`.
pub(crate) type Instruction = libc::sock_filter;

/// The side that is told.
#[derive(Debug)]
pub(crate) struct Listener(OwnedFd);

impl Listener {
    /// Installs `program` for all threads of this process, and for all that they start: other
    /// programs too. There is no way back.
    ///
    /// # Errors
    ///
    /// `EACCES` without `CAP_SYS_ADMIN` where new privileges have not been renounced, `EBUSY` if a
    /// filter of this process has a listener already, `ESRCH` if a thread has a filter that the
    /// others do not have, `EINVAL` before Linux 5.19.
    pub(crate) fn install(program: &mut [Instruction]) -> Result<Listener, Errno> {
        let mut sizes = Sizes::default();
        // SAFETY: the kernel stores three words, for which there is room.
        let got = unsafe { libc::syscall(libc::SYS_seccomp, GET_NOTIF_SIZES, 0, &raw mut sizes) };
        outcome(got)?;
        let fits = usize::from(sizes.notification) <= size_of::<Notification>()
            && usize::from(sizes.response) <= size_of::<Response>();
        if !fits {
            return Err(Errno::NOSYS);
        }
        let length = u16::try_from(program.len()).map_err(|_| Errno::INVAL)?;
        let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
            | libc::SECCOMP_FILTER_FLAG_TSYNC
            | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH
            | FLAG_WAIT_KILLABLE_RECV;
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the kernel copies the program, which is as long as it says. What the filter stops is
        // answered by this module's user.
        let fd = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
        let fd = outcome(fd)? as i32;
        // SAFETY: the call has just opened it.
        let listener = Listener(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: takes a number. Where the kernel does not have it, it is slower.
        let _ = unsafe { libc::ioctl(fd, NOTIF_SET_FLAGS.into(), FD_SYNC_WAKE_UP) };
        Ok(listener)
    }

    /// Makes a listener of a descriptor of one.
    pub(crate) fn from_fd(fd: OwnedFd) -> Listener {
        Listener(fd)
    }

    /// Waits for a call, and stores it in `to`, so that whoever looks there sees it before it is
    /// answered.
    ///
    /// # Errors
    ///
    /// `ENOENT` if the one that was there has gone, `EINTR`; `EBADF` and `ENOTTY` if the program has
    /// closed the descriptor.
    pub(crate) fn receive(&self, to: &Slot<'_>) -> Result<Notification, Errno> {
        to.clear();
        // SAFETY: the slot is as large as a notification, writable, and all zeroes, which the kernel
        // demands.
        let got = unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_RECV.into(), to.0.get()) };
        outcome(got.into())?;
        // SAFETY: the kernel has stored it, and nobody else stores there.
        Ok(unsafe { to.0.get().read_volatile() })
    }

    /// Answers a call.
    ///
    /// # Errors
    ///
    /// `ENOENT` if the thread that made it is gone; `EBADF` and `ENOTTY` as above.
    pub(crate) fn answer(&self, id: u64, answer: Answer) -> Result<(), Errno> {
        let mut response = Response { id, value: 0, error: 0, flags: 0 };
        match answer {
            Answer::Made(Ok(value)) => response.value = value as i64,
            Answer::Made(Err(error)) => response.error = -error.raw_os_error(),
            Answer::Continue => response.flags = RESPONSE_CONTINUE,
        }
        // SAFETY: the kernel reads the response.
        let sent = unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_SEND.into(), &raw mut response) };
        outcome(sent.into()).map(drop)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where one receiver has the call that it is at, for others to see.
#[derive(Debug)]
pub(crate) struct Slot<'a>(pub(super) &'a core::cell::UnsafeCell<Notification>);

impl Slot<'_> {
    fn clear(&self) {
        // SAFETY: nobody else stores there, and readers are other processes.
        unsafe { self.0.get().write_volatile(Notification::default()) };
    }
}

/// Reads what a system call returned.
fn outcome(result: i64) -> Result<u64, Errno> {
    if result >= 0 {
        return Ok(result as u64);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
