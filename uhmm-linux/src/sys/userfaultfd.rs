//! userfaultfd(2): threads that touch a missing page wait, and somebody else brings it.
//!
//! Everything here may be called by several threads at once; the kernel orders the calls.
//! Two things are not the kernel's to order, and the caller's to know:
//!
//! * **While the address space changes, nothing can be filled in.** From before a change that
//!   sends an event begins until its caller has woken up again, every operation that fills or
//!   protects pages, on any range, says `EAGAIN` and does nothing. [`Userfaultfd::changing`] asks
//!   just that. Within this time there need not be an event to read: it may not have been sent
//!   yet, or the caller may not be awake yet. `EAGAIN` therefore means: read what there is, look
//!   again at what one was about to do, and try again.
//! * **Who reads must not change.** A thread that unmaps, discards or moves registered memory
//!   waits for its event to be read; so does one that forks. The only reader must do none of it,
//!   nor touch a missing page. Only SIGKILL ends such a wait.
//!
//! The structures are described in [`super::abi`], the interface in userfaultfd(2) and
//! ioctl_userfaultfd(2), and `Documentation/admin-guide/mm/userfaultfd.rst` of the kernel.
#![allow(dead_code, reason = "the interface is wrapped and tested whole, and used in part")]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use bitflags::bitflags;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode};
use rustix::mm::UserfaultfdFlags;
use uhmm::{PAGE_SHIFT, Page, PageRange};

use super::abi::{self, Argument, UffdioRange, UffdioUnregister, UffdioWake, len_of};
use crate::mutant::mutant;

mod message;

pub(crate) use message::{Message, Messages};

bitflags! {
    /// What a userfaultfd can be asked to do, and the Linux version that brought it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub(crate) struct Features: u64 {
        /// Faults say whether they are of a write-protected page (5.7).
        const PAGEFAULT_FLAG_WP = abi::UFFD_FEATURE_PAGEFAULT_FLAG_WP;
        /// [`Message::Fork`] (4.11). To ask for it takes `CAP_SYS_PTRACE`, else it is `EPERM`.
        const EVENT_FORK = abi::UFFD_FEATURE_EVENT_FORK;
        /// [`Message::Remap`] and [`Message::Duplicate`] (4.11). Without it, what mremap(2) moves
        /// is no longer registered.
        const EVENT_REMAP = abi::UFFD_FEATURE_EVENT_REMAP;
        /// [`Message::Remove`] (4.11).
        const EVENT_REMOVE = abi::UFFD_FEATURE_EVENT_REMOVE;
        /// Missing pages of hugetlbfs (4.11). Needs not be asked for.
        const MISSING_HUGETLBFS = abi::UFFD_FEATURE_MISSING_HUGETLBFS;
        /// Missing pages of shared memory (4.11). Needs not be asked for.
        const MISSING_SHMEM = abi::UFFD_FEATURE_MISSING_SHMEM;
        /// [`Message::Unmap`] (4.11).
        const EVENT_UNMAP = abi::UFFD_FEATURE_EVENT_UNMAP;
        /// Faults raise SIGBUS and are not reported (4.14).
        const SIGBUS = abi::UFFD_FEATURE_SIGBUS;
        /// Faults say which thread waits (4.14).
        const THREAD_ID = abi::UFFD_FEATURE_THREAD_ID;
        /// [`Modes::MINOR`] for hugetlbfs (5.13). Needs not be asked for.
        const MINOR_HUGETLBFS = abi::UFFD_FEATURE_MINOR_HUGETLBFS;
        /// [`Modes::MINOR`] for shared memory (5.14). Needs not be asked for.
        const MINOR_SHMEM = abi::UFFD_FEATURE_MINOR_SHMEM;
        /// Faults say the byte and not only the page (5.18).
        const EXACT_ADDRESS = abi::UFFD_FEATURE_EXACT_ADDRESS;
        /// [`Modes::WP`] for shared memory and hugetlbfs (5.19).
        const WP_HUGETLBFS_SHMEM = abi::UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        /// Write protection of anonymous pages that are not there yet (6.4).
        const WP_UNPOPULATED = abi::UFFD_FEATURE_WP_UNPOPULATED;
        /// [`Userfaultfd::poison`] (6.6). Needs not be asked for.
        const POISON = abi::UFFD_FEATURE_POISON;
        /// Faults of write-protected pages are resolved by the kernel and not reported; with it,
        /// files can be registered in [`Modes::WP`] (6.7). Brings [`Features::WP_UNPOPULATED`].
        const WP_ASYNC = abi::UFFD_FEATURE_WP_ASYNC;
        /// [`Userfaultfd::move_pages`] (6.8). Needs not be asked for.
        const MOVE = abi::UFFD_FEATURE_MOVE;
    }
}

bitflags! {
    /// Which faults of a range are reported.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub(crate) struct Modes: u64 {
        /// Of pages that are not there (4.3).
        const MISSING = abi::UFFDIO_REGISTER_MODE_MISSING;
        /// Of stores to pages that [`Userfaultfd::write_protect`] protects (5.7).
        const WP = abi::UFFDIO_REGISTER_MODE_WP;
        /// Of pages that are in the file and not in the page table (5.13).
        const MINOR = abi::UFFDIO_REGISTER_MODE_MINOR;
    }
}

/// Whose faults are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    /// Everybody's. Takes `CAP_SYS_PTRACE`, or the sysctl `vm.unprivileged_userfaultfd`, or the
    /// right to open `/dev/userfaultfd`.
    All,
    /// Those of code outside the kernel; a system call that touches a missing page fails
    /// (`EFAULT`). Everybody may (5.11).
    #[doc(alias = "UFFD_USER_MODE_ONLY")]
    UserModeOnly,
}

/// A userfaultfd, past its handshake: of this process, or of a child that it forked.
///
/// When it is dropped, its ranges are unregistered, and who waits sees zeroes.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fd: OwnedFd,
    features: Features,
    /// Whether the descriptor has been given another meaning.
    retired: AtomicBool,
}

/// How [`Userfaultfd::move_pages`] moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MoveOptions {
    /// Wake the threads that wait for the pages moved.
    pub(crate) wake: bool,
    /// Pass over what is missing in the source, and count it as moved.
    pub(crate) allow_holes: bool,
}

/// How far an operation on a range came.
///
/// The kernel does not say why it stopped in the middle: after some pages the error is `EAGAIN`,
/// whatever it was. To try again from the first page that is not done brings the true reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Progress {
    /// How many pages are done, from the first of the range on.
    pub(crate) pages: u64,
    /// `Ok` if that is all of them.
    pub(crate) result: Result<(), Errno>,
}

impl Userfaultfd {
    /// Makes a userfaultfd for the calling process that does what `wanted` says.
    ///
    /// The descriptor is closed by exec, and never waits in read(2): poll(2) works on no other.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the kernel lacks one of `wanted`; `EPERM` if it is not permitted; `ENOSYS`.
    pub(crate) fn open(faults: Faults, wanted: Features) -> Result<Userfaultfd, Errno> {
        let fd = create(faults)?;
        handshake(&fd, wanted)?;
        let implied = match wanted.contains(Features::WP_ASYNC) {
            true => Features::WP_UNPOPULATED,
            false => Features::empty(),
        };
        Ok(Userfaultfd { fd, features: wanted | implied, retired: AtomicBool::new(false) })
    }

    /// Returns what the kernel can do, permitted or not.
    ///
    /// # Errors
    ///
    /// `EPERM`, `ENOSYS`.
    pub(crate) fn offered(faults: Faults) -> Result<Features, Errno> {
        let fd = create(faults)?;
        Ok(Features::from_bits_truncate(handshake(&fd, Features::empty())?))
    }

    /// Takes over the descriptor of a [`Message::Fork`]; the child has its parent's features.
    fn of_child(fd: OwnedFd, features: Features) -> Userfaultfd {
        Userfaultfd { fd, features, retired: AtomicBool::new(false) }
    }

    /// Returns what the userfaultfd does.
    #[inline]
    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// Closes the userfaultfd as its drop would, while others still refer to it: its ranges are
    /// unregistered, and whoever waits goes on. Whatever it is asked from now on fails with
    /// `ENOTTY`, and a read brings no message.
    ///
    /// The descriptor is not free until the drop, so that none of those who still have it can meet
    /// another file there: it is that of `instead` meanwhile, an eventfd, out of which nothing can be
    /// read that is as long as a message. This cannot run out of anything.
    pub(crate) fn retire(&self, instead: BorrowedFd<'_>) -> Result<(), Errno> {
        // SAFETY: the descriptor is ours, and stays open: it only refers to another file.
        let replaced =
            unsafe { libc::dup3(instead.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) };
        if replaced < 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        // SeqCst, like the load: whoever sees it leaves the kernel alone, whoever does not gets
        // `ENOTTY`.
        self.retired.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Tells whether it has been [retired](Userfaultfd::retire).
    #[inline]
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::SeqCst)
    }

    /// Asks for reports of faults in what is mapped in `range`, and of its changes. What was
    /// registered before is registered in `modes` instead. What is mapped there later is not
    /// registered.
    ///
    /// # Errors
    ///
    /// `EINVAL` if nothing is mapped there, or if one mapping in it cannot be registered so;
    /// `EBUSY` if another userfaultfd has one of them; `EPERM` for shared memory that may not be
    /// written to. These leave all as it was. `ENOMEM` if there would be too many mappings: the
    /// range may then be registered in part.
    #[doc(alias = "UFFDIO_REGISTER")]
    pub(crate) fn register(&self, range: PageRange, modes: Modes) -> Result<(), Errno> {
        let mode = modes.bits();
        self.call(&mut abi::UffdioRegister { range: range.into(), mode, ioctls: 0 })
    }

    /// Ends reports from `range`, and wakes who waits for a page in it.
    ///
    /// The kernel wakes by itself those that wait when it takes the registration away; a thread
    /// that faulted before that, and begins to wait after it, it leaves asleep for good (seen in
    /// 6.18 in most of the trials that aimed at it). It is on the list of waiters by the time the
    /// call has returned, so that waking once more reaches it.
    ///
    /// # Errors
    ///
    /// `EINVAL` if nothing is mapped there, or something that could not be registered. Who waits is
    /// woken all the same.
    #[doc(alias = "UFFDIO_UNREGISTER")]
    pub(crate) fn unregister(&self, range: PageRange) -> Result<(), Errno> {
        let unregistered = self.call(&mut UffdioUnregister(range.into()));
        if mutant!("nobody_is_woken_after_unregistering") {
            return unregistered;
        }
        let woken = self.wake(range);
        unregistered.and(woken)
    }

    /// Wakes who waits for a page of `range`, to try again.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is no memory that a program can have.
    #[doc(alias = "UFFDIO_WAKE")]
    #[inline]
    pub(crate) fn wake(&self, range: PageRange) -> Result<(), Errno> {
        self.call(&mut UffdioWake(range.into()))
    }

    /// Moves private anonymous pages from `from` to the missing pages from `to` on, without a copy
    /// (6.8). `to` is registered; what is moved is missing at `from` afterwards, at once for every
    /// thread, and no event is sent. A huge page stays one where both ends are aligned to it.
    ///
    /// # Errors
    ///
    /// `EINVAL` if a mapping does not allow it (both must be writable, private, anonymous, locked
    /// both or not at all, and `to` registered); `ENOENT` if a page of `from` is missing and holes
    /// are not allowed, or if a range is not all mapped; `EEXIST` if one of `to` is there, or is
    /// marked write-protected; `EBUSY` if a page is shared with a child or pinned; `EAGAIN`.
    #[doc(alias = "UFFDIO_MOVE")]
    #[inline]
    pub(crate) fn move_pages(&self, from: PageRange, to: Page, options: MoveOptions) -> Progress {
        let holes = match options.allow_holes {
            true => abi::UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
            false => 0,
        };
        let mode = holes | unless(options.wake, abi::UFFDIO_MOVE_MODE_DONTWAKE);
        let (dst, src, len) = (to.address(), from.address(), len_of(from));
        let mut argument = abi::UffdioMove { dst, src, len, mode, moved: 0 };
        let result = self.call(&mut argument);
        Progress::new(argument.moved, result)
    }

    /// Fills the missing pages of `to`, all registered, with copies of the pages from `from` on,
    /// which are memory of the calling process. Protection does not stop it.
    ///
    /// # Errors
    ///
    /// `ENOENT` if `to` is not registered; `EEXIST` if one of its pages is there; `EFAULT` if
    /// `from` cannot be read; `EAGAIN`.
    #[doc(alias = "UFFDIO_COPY")]
    #[inline]
    pub(crate) fn copy(&self, from: Page, to: PageRange, wake: bool) -> Progress {
        let mode = unless(wake, abi::UFFDIO_COPY_MODE_DONTWAKE);
        let (dst, src, len) = (to.address(), from.address(), len_of(to));
        let mut argument = abi::UffdioCopy { dst, src, len, mode, copy: 0 };
        let result = self.call(&mut argument);
        Progress::new(argument.copy, result)
    }

    /// Fills the missing pages of `range`, all registered and none of hugetlbfs, with zeroes.
    ///
    /// # Errors
    ///
    /// `ENOENT` if it is not registered; `EEXIST` if a page is there, or is marked write-protected;
    /// `EAGAIN`.
    #[doc(alias = "UFFDIO_ZEROPAGE")]
    #[inline]
    pub(crate) fn zeropage(&self, range: PageRange, wake: bool) -> Progress {
        let mode = unless(wake, abi::UFFDIO_ZEROPAGE_MODE_DONTWAKE);
        let mut argument = abi::UffdioZeropage { range: range.into(), mode, zeropage: 0 };
        let result = self.call(&mut argument);
        Progress::new(argument.zeropage, result)
    }

    /// Protects the pages of `range`, registered in [`Modes::WP`], against stores, or allows them
    /// again. To allow them can wake who waits; to protect wakes nobody.
    ///
    /// # Errors
    ///
    /// `ENOENT` if it is not registered in that mode; `EAGAIN`.
    #[doc(alias = "UFFDIO_WRITEPROTECT")]
    pub(crate) fn write_protect(
        &self,
        range: PageRange,
        on: bool,
        wake: bool,
    ) -> Result<(), Errno> {
        let mode = match on {
            true => abi::UFFDIO_WRITEPROTECT_MODE_WP,
            false => unless(wake, abi::UFFDIO_WRITEPROTECT_MODE_DONTWAKE),
        };
        self.call(&mut abi::UffdioWriteprotect { range: range.into(), mode })
    }

    /// Maps the pages of `range`, registered in [`Modes::MINOR`], that the file has (5.13).
    ///
    /// # Errors
    ///
    /// `ENOENT` if it is not registered; `EFAULT` if the file has no such page; `EEXIST` if one is
    /// mapped; `EAGAIN`.
    #[doc(alias = "UFFDIO_CONTINUE")]
    pub(crate) fn continue_(&self, range: PageRange, wake: bool) -> Progress {
        let mode = unless(wake, abi::UFFDIO_CONTINUE_MODE_DONTWAKE);
        let mut argument = abi::UffdioContinue { range: range.into(), mode, mapped: 0 };
        let result = self.call(&mut argument);
        Progress::new(argument.mapped, result)
    }

    /// Makes the missing pages of `range`, all registered, fail: a thread that touches one gets
    /// SIGBUS, a system call `EHWPOISON` or `EFAULT` (6.6). `MADV_DONTNEED` ends it.
    ///
    /// # Errors
    ///
    /// `ENOENT` if it is not registered; `EEXIST` if a page is there; `EAGAIN`.
    #[doc(alias = "UFFDIO_POISON")]
    pub(crate) fn poison(&self, range: PageRange, wake: bool) -> Progress {
        let mode = unless(wake, abi::UFFDIO_POISON_MODE_DONTWAKE);
        let mut argument = abi::UffdioPoison { range: range.into(), mode, updated: 0 };
        let result = self.call(&mut argument);
        Progress::new(argument.updated, result)
    }

    /// Tells whether a change that sends an event is under way; see the head of the module.
    ///
    /// `true` from before the change begins until its caller, whose event has been read, has woken
    /// up. The answer is old when it comes: `false` says that there was such a moment since the
    /// call. Needs no event of a certain kind, and changes nothing.
    #[inline]
    pub(crate) fn changing(&self) -> bool {
        // An empty range is refused (`EINVAL`). That the address space changes is found earlier.
        let range = UffdioRange { start: 0, len: 0 };
        self.call(&mut abi::UffdioWriteprotect { range, mode: 0 }) == Err(Errno::AGAIN)
    }

    /// Reads what there is, at most [`Messages::CAPACITY`], and waits if there is nothing. Returns
    /// how many there are. What was left in `messages` is dropped.
    ///
    /// # Errors
    ///
    /// `EMFILE` and `ENFILE` if a child's descriptor does not fit; the event stays to be read.
    #[inline]
    pub(crate) fn read(&self, messages: &mut Messages) -> Result<usize, Errno> {
        loop {
            match self.read_now(messages) {
                Err(Errno::AGAIN) => self.wait(None)?,
                done => return done,
            };
        }
    }

    /// Reads like [`Userfaultfd::read`], and never waits.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if there is nothing; those of [`Userfaultfd::read`].
    #[inline]
    pub(crate) fn read_now(&self, messages: &mut Messages) -> Result<usize, Errno> {
        messages.fill(self)
    }

    /// Waits until there is something to read (`true`), or else `stop` can be read (`false`).
    ///
    /// Another thread may read it first. Who waits is on the kernel's list of those to be woken
    /// for each message: let one thread wait at a time.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn wait(&self, stop: Option<BorrowedFd<'_>>) -> Result<bool, Errno> {
        let own = self.fd.as_fd();
        let mut fds =
            [own, stop.unwrap_or(own)].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))?;
        Ok(!fds[0].revents().is_empty())
    }

    /// Makes one of userfaultfd's own ioctls.
    #[inline]
    fn call<T: Argument>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: 1: the structures of userfaultfd have no field for the kernel to write through.
        // 2: see the head of `sys`.
        unsafe { abi::call(&self.fd, argument) }.map(drop)
    }
}

impl AsFd for Userfaultfd {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Progress {
    /// Reads the field in which the kernel tells how many bytes are done. It holds the error's
    /// negative number instead if there are none, and is untouched if the kernel gave up earlier.
    #[inline]
    fn new(bytes: i64, result: Result<(), Errno>) -> Progress {
        Progress { pages: bytes.max(0).cast_unsigned() >> PAGE_SHIFT, result }
    }
}

/// Returns the mode that keeps the kernel from waking, unless it is to wake.
#[inline]
const fn unless(wake: bool, dont_wake: u64) -> u64 {
    if wake { 0 } else { dont_wake }
}

/// Makes a descriptor: by the system call, or where that is not permitted by the device, whose
/// permissions an administrator can set (6.1).
fn create(faults: Faults) -> Result<OwnedFd, Errno> {
    let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if faults == Faults::UserModeOnly {
        flags |= UserfaultfdFlags::from_bits_retain(abi::UFFD_USER_MODE_ONLY);
    }
    // SAFETY: a descriptor without ranges does nothing to memory.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        // What the system call said is what there is to say: the device is optional.
        Err(errno @ Errno::PERM) => create_by_device(flags).map_err(|_| errno),
        done => done,
    }
}

/// Makes a descriptor by `/dev/userfaultfd`.
fn create_by_device(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    let access = OFlags::RDWR | OFlags::CLOEXEC;
    let device = rustix::fs::open("/dev/userfaultfd", access, Mode::empty())?;
    // SAFETY: as in `create`.
    unsafe { ioctl::ioctl(device, New(flags)) }
}

/// Agrees with the kernel on what the descriptor does, and returns what it could do.
fn handshake(fd: &OwnedFd, wanted: Features) -> Result<u64, Errno> {
    let mut api = abi::UffdioApi { api: abi::UFFD_API, features: wanted.bits(), ioctls: 0 };
    // SAFETY: 1: the structure has no field for the kernel to write through. 2: a descriptor
    // without ranges does nothing to memory.
    unsafe { abi::call(fd, &mut api) }?;
    Ok(api.features)
}

/// `USERFAULTFD_IOC_NEW`.
struct New(UserfaultfdFlags);

// SAFETY: the ioctl takes its flags in the place of a pointer, and returns a descriptor.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        abi::USERFAULTFD_IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::without_provenance_mut(self.0.bits() as usize)
    }

    unsafe fn output_from_ptr(new: IoctlOutput, _: *mut c_void) -> Result<OwnedFd, Errno> {
        // SAFETY: the kernel has just made the descriptor, for this call.
        Ok(unsafe { OwnedFd::from_raw_fd(new) })
    }
}

#[cfg(test)]
mod tests;
