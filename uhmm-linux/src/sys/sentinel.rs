//! A page that no fork passes unseen.
//!
//! When a process forks, the kernel sends a fork event to each userfaultfd that has memory
//! registered in what the child gets, in the order of the addresses; it sends the next when the one
//! before has been read, and the child starts, and the parent goes on, when all have been (seen in
//! 6.18, and so since 4.11). So whoever has a second userfaultfd, with memory registered above all
//! that the first has, keeps a child from running its first instruction, and the forking thread from
//! returning, for as long as the second event is unread. Both are undone if the parent is killed
//! meanwhile: then the fork fails and there never is a child.
//!
//! The second userfaultfd is the [`Sentinel`]'s. It is told of forks alone, and its memory is one
//! page that nobody may access.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm::{PAGE_SIZE, Page};

use super::gate;
use super::userfaultfd::{Faults, Features, Messages, Modes, Userfaultfd};

/// How large address spaces are, in bits: those that processors of today give to programs.
const ADDRESS_BITS: [u32; 8] = [57, 56, 52, 48, 47, 46, 42, 39];

/// How many pages are tried from the top of an address space of each size.
const TRIES: u64 = 16;

/// A page near the top of the address space, and its userfaultfd. Its drop unmaps it.
///
/// # Invariants
///
/// 1. `page` is mapped, inaccessible, and nobody else knows of it.
#[derive(Debug)]
pub(crate) struct Sentinel {
    uffd: Userfaultfd,
    page: Page,
}

impl Sentinel {
    /// Maps the page, as far up as there is room, and opens the userfaultfd. Forks are not told
    /// of until it is [armed](Sentinel::arm).
    ///
    /// # Errors
    ///
    /// Those of [`Userfaultfd::open`]; `EEXIST` if the highest pages of the address space are all
    /// in use.
    pub(crate) fn new() -> Result<Sentinel, Errno> {
        let uffd = Userfaultfd::open(Faults::All, Features::EVENT_FORK)?;
        let page = map_highest()?;
        // INVARIANT: 1: it was mapped just now.
        Ok(Sentinel { uffd, page })
    }

    /// Returns the page: the forks of a process are told of here last if all other registered
    /// memory is below.
    pub(crate) fn page(&self) -> Page {
        self.page
    }

    /// Has forks told of.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn arm(&self) -> Result<(), Errno> {
        self.uffd.register(self.page.into(), Modes::MISSING)
    }

    /// Has forks that begin from now on not told of.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn disarm(&self) -> Result<(), Errno> {
        self.uffd.unregister(self.page.into())
    }

    /// Waits until there is a fork that is held back (`true`), or else `stop` can be read (`false`).
    ///
    /// # Errors
    ///
    /// Those of [`Userfaultfd::wait`].
    pub(crate) fn wait(&self, stop: BorrowedFd<'_>) -> Result<bool, Errno> {
        self.uffd.wait(Some(stop))
    }

    /// Lets all go that are held back, and returns how many they were.
    ///
    /// # Errors
    ///
    /// EMFILE and ENFILE if there is no room for a descriptor for a moment.
    pub(crate) fn let_go(&self) -> Result<usize, Errno> {
        let mut messages = Messages::new();
        let mut all = 0;
        loop {
            match self.uffd.read_now(&mut messages) {
                // The next read closes the descriptors, or the drop of the buffer does.
                Ok(read) => all += read,
                Err(Errno::AGAIN) => return Ok(all),
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells whether a fork is under way of which this has been, or will be, told.
    pub(crate) fn forking(&self) -> bool {
        self.uffd.changing()
    }
}

impl AsFd for Sentinel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let at = pointer(self.page.address());
        // SAFETY: the page is ours (invariant 1), and nobody accesses it.
        let unmapped = unsafe { gate::munmap(at, PAGE_SIZE) };
        debug_assert_eq!(unmapped, Ok(()), "munmap of a page of our own");
    }
}

/// Maps the highest page that is free.
fn map_highest() -> Result<Page, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
    let mut result = Err(Errno::NOMEM);
    for bits in ADDRESS_BITS {
        for page in 1..=TRIES {
            let address = (1_u64 << bits) - page * PAGE_SIZE as u64;
            let at = pointer(address);
            // SAFETY: nothing that is mapped is replaced.
            match unsafe { rustix::mm::mmap_anonymous(at, PAGE_SIZE, ProtFlags::empty(), flags) } {
                Ok(mapped) if mapped == at => return Ok(Page::containing(address)),
                // A kernel before 4.17 takes the address for a wish; uffd is older, MOVE is not.
                Ok(mapped) => {
                    // SAFETY: it was mapped just now, and nobody knows of it.
                    let _ = unsafe { gate::munmap(mapped, PAGE_SIZE) };
                    result = Err(Errno::EXIST);
                }
                Err(error @ Errno::EXIST) => result = Err(error),
                // Beyond the end of the address space.
                Err(_) => {}
            }
        }
        if result == Err(Errno::EXIST) {
            break;
        }
    }
    result
}

/// Returns the address as system calls want it.
fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}
