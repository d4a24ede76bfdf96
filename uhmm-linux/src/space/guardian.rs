//! A thread that keeps the others from being undone by the program.
//!
//! * A seccomp filter that the program installs for all its threads can end a server in the middle
//!   of a system call (`SECCOMP_RET_KILL_THREAD`). The kernel tells nobody, and whoever touches a
//!   page that is out would wait for ever. The guardian waits for the end of each server (a pidfd
//!   of a thread, Linux 6.9), in a system call that was let through before there was a filter, and
//!   ends the process.
//! * A program may close descriptors that are not its own, as daemons do. With the last descriptor
//!   of a userfaultfd its registrations go, and who waits for a page reads zeroes. The guardian has
//!   descriptors of its own, which nobody else can close; so the servers find theirs closed while
//!   everybody waits still, and end the process.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::serve::AbortOnPanic;
use super::{Space, fatal};
use crate::sys::pidfd::Pidfd;
use crate::sys::thread;

/// How long to attach may take for the guardian's sake.
const PATIENCE: Duration = Duration::from_secs(1);

impl Space {
    /// Starts the guardian of the threads that have been started, as far as the kernel can tell of
    /// their end, and waits until it watches.
    pub(super) fn start_guardian(&self) -> Result<(), Errno> {
        let lives = self.servers.lives();
        let (tell, told) = std::sync::mpsc::channel();
        self.start_server("uhmm-guardian", move |space| {
            // Whoever started it waits for this.
            let _ = tell.send(thread::gettid());
            drop(tell);
            space.guard(&lives);
        })?;
        let Ok(tid) = told.recv() else { return Ok(()) };
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            match thread::is_in_poll(tid) {
                Ok(Some(false)) => std::thread::yield_now(),
                Ok(_) => break,
                // A filter has come first.
                Err(error) => {
                    self.stop_servers();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn guard(&self, lives: &[Arc<Pidfd>]) {
        let abort = AbortOnPanic;
        let mut kept: Vec<BorrowedFd<'_>> = lives.iter().map(|life| life.as_fd()).collect();
        kept.extend([self.servers.stop.as_fd(), self.kernel.uffd().as_fd()]);
        kept.extend(self.sentinel.iter().map(|sentinel| sentinel.as_fd()));
        if let Err(error) = thread::keep_descriptors(&kept) {
            tracing::warn!(target: "uhmm", %error, "the program may close the userfaultfd");
        }
        let stop = PollFd::from_borrowed_fd(self.servers.stop.as_fd(), PollFlags::IN);
        let ends = lives.iter().map(|life| PollFd::from_borrowed_fd(life.as_fd(), PollFlags::IN));
        let mut fds: Vec<PollFd<'_>> = [stop].into_iter().chain(ends).collect();
        if let Err(error) = rustix::io::retry_on_intr(|| poll(&mut fds, None)) {
            fatal("the end of servers cannot be waited for", error);
        }
        // No system call more than it takes to say so: the filter is that of this thread too.
        if !self.servers.are_stopping() {
            fatal("a thread that serves faults has been ended", Errno::SRCH);
        }
        // Whoever waits for the end of this thread finds the userfaultfd closed when it is.
        let _ = thread::keep_descriptors(&[]);
        std::mem::forget(abort);
    }
}
