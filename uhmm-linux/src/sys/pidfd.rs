//! Processes whose end can be waited for.

#![allow(dead_code, reason = "for address spaces of other processes")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

/// A process, held so that its number cannot come to mean another one (`pidfd_open`, Linux 5.3).
/// Its descriptor can be polled: it is readable from the end of the process on.
#[derive(Debug)]
pub(crate) struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens the process numbered `pid`. Nothing is inherited by programs that are executed.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is none, `ENOSYS` before Linux 5.3, `EMFILE` and `ENFILE`.
    pub(crate) fn open(pid: u32) -> Result<Pidfd, Errno> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).map(Pidfd)
    }

    /// Opens thread `tid` of this process (`PIDFD_THREAD`, Linux 6.9): its descriptor is readable
    /// from the end of that thread on.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is none, `EINVAL` before Linux 6.9, `EMFILE` and `ENFILE`.
    #[doc(alias = "PIDFD_THREAD")]
    pub(crate) fn open_thread(tid: u32) -> Result<Pidfd, Errno> {
        // The kernel's `PIDFD_THREAD` is `O_EXCL`.
        let flags = PidfdFlags::from_bits_retain(rustix::fs::OFlags::EXCL.bits());
        let tid = i32::try_from(tid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        rustix::process::pidfd_open(tid, flags).map(Pidfd)
    }

    /// Tells whether every thread of the process has ended. Does not wait.
    ///
    /// # Errors
    ///
    /// What `poll` said, `ENOMEM`.
    pub(crate) fn has_exited(&self) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&now)))?;
        Ok(fds[0].revents().contains(PollFlags::IN))
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests;
