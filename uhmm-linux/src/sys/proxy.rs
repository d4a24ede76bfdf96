//! What it takes to make a system call in the place of another thread of this process.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::process::PidfdGetfdFlags;

use super::pidfd::Pidfd;
use super::{gate, process_vm};

/// What two threads may have in common: the kernel's `KCMP_` numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Common {
    /// The address space.
    Memory = 1,
    /// The table of descriptors.
    Files = 2,
    /// The current and the root directory, and the file mode mask.
    FileSystem = 3,
}

/// The longest path, in bytes, with its end.
const PATH_MAX: usize = 4096;

/// Tells whether `tid` is a thread of this process.
pub(crate) fn is_thread_here(tid: u32) -> bool {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: signal 0 is none.
    unsafe { libc::syscall(libc::SYS_tgkill, process, tid, 0) == 0 }
}

/// Tells whether thread `tid`, of whatever process, has something in common with the calling thread;
/// `false` also where the kernel does not say (kcmp(2)).
pub(crate) fn shares(tid: u32, what: Common) -> bool {
    let this = super::thread::gettid();
    // SAFETY: takes numbers.
    unsafe { libc::syscall(libc::SYS_kcmp, this, tid, what as i32, 0, 0) == 0 }
}

/// Tells whether thread `tid` of this process may do what the calling thread may, and means the same by
/// names: neither has credentials or namespaces for itself alone (proc_pid_status(5), namespaces(7)).
/// `false` also where `/proc` does not say.
pub(crate) fn is_alike(tid: u32) -> bool {
    let identity = |task: &str| -> Option<(Vec<String>, Vec<PathBuf>)> {
        let status = std::fs::read_to_string(format!("{task}/status")).ok()?;
        let said = |line: &&str| {
            ["Uid:", "Gid:", "Groups:", "CapEff:"].iter().any(|name| line.starts_with(name))
        };
        let lines = status.lines().filter(said).map(str::to_owned).collect();
        let namespaces =
            ["ipc", "mnt", "user"].map(|name| std::fs::read_link(format!("{task}/ns/{name}")));
        Some((lines, namespaces.into_iter().collect::<Result<_, _>>().ok()?))
    };
    let theirs = identity(&format!("/proc/self/task/{tid}"));
    theirs.is_some() && theirs == identity("/proc/thread-self")
}

/// Gets a descriptor of thread `tid`, as one of the calling thread's (pidfd_getfd(2), Linux 5.6; of
/// a thread, 6.9).
///
/// # Errors
///
/// `EBADF` if it is none; `ESRCH`, `EMFILE`, `ENFILE`, `EPERM`.
pub(crate) fn fetch(tid: u32, fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    let thread = Pidfd::open_thread(tid)?;
    rustix::process::pidfd_getfd(thread, fd, PidfdGetfdFlags::empty())
}

/// A descriptor as a call is to name it.
#[derive(Debug)]
pub(crate) enum Named {
    /// By the number it has with the calling thread too.
    Same(RawFd),
    /// By one of our own.
    Own(OwnedFd),
}

impl Named {
    /// Finds what thread `tid` means by `fd`.
    ///
    /// # Errors
    ///
    /// As for [`fetch`].
    pub(crate) fn by(tid: u32, fd: RawFd) -> Result<Named, Errno> {
        if shares(tid, Common::Files) {
            Ok(Named::Same(fd))
        } else {
            fetch(tid, fd).map(Named::Own)
        }
    }

    /// Returns the number.
    pub(crate) fn number(&self) -> RawFd {
        match self {
            Named::Same(fd) => *fd,
            Named::Own(fd) => fd.as_raw_fd(),
        }
    }

    /// Returns the number of the file's inode.
    ///
    /// # Errors
    ///
    /// `EBADF`.
    pub(crate) fn inode(&self) -> Result<u64, Errno> {
        if self.number() < 0 {
            return Err(Errno::BADF);
        }
        // SAFETY: used for one call, which says if it is none.
        let fd = unsafe { BorrowedFd::borrow_raw(self.number()) };
        rustix::fs::fstat(fd).map(|stat| stat.st_ino)
    }
}

/// Returns the number of the inode of the file at `path`.
///
/// # Errors
///
/// `ENOENT` and its like.
pub(crate) fn inode_at(path: &CStr) -> Result<u64, Errno> {
    rustix::fs::statat(CWD, path, rustix::fs::AtFlags::empty()).map(|stat| stat.st_ino)
}

/// Reads words of this process.
///
/// # Errors
///
/// `EFAULT`.
pub(crate) fn read_words(address: u64, count: usize) -> Result<Vec<u64>, Errno> {
    let mut bytes = vec![0; count * 8];
    if process_vm::read(address, &mut bytes)? < bytes.len() {
        return Err(Errno::FAULT);
    }
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight"));
    Ok(bytes.chunks_exact(8).map(word).collect())
}

/// Reads a path of this process.
///
/// # Errors
///
/// `EFAULT`, `ENAMETOOLONG`.
pub(crate) fn read_path(address: u64) -> Result<CString, Errno> {
    let mut path = Vec::new();
    // Up to the end of a page at a time: what comes after may not be mapped.
    while path.len() < PATH_MAX {
        let at = address + path.len() as u64;
        let mut piece = vec![0; (4096 - at % 4096) as usize];
        let read = process_vm::read(at, &mut piece)?;
        if read == 0 {
            return Err(Errno::FAULT);
        }
        if let Some(end) = piece[..read].iter().position(|&byte| byte == 0) {
            path.extend_from_slice(&piece[..end]);
            return CString::new(path).map_err(|_| Errno::INVAL);
        }
        path.extend_from_slice(&piece[..read]);
    }
    Err(Errno::NAMETOOLONG)
}

/// Returns how large a segment of System V shared memory is, in bytes.
///
/// # Errors
///
/// `EINVAL`, `EIDRM`, `EACCES`.
pub(crate) fn segment_bytes(id: i32) -> Result<u64, Errno> {
    let mut about = MaybeUninit::<libc::shmid_ds>::zeroed();
    // SAFETY: there is room for what is asked for.
    if unsafe { libc::shmctl(id, libc::IPC_STAT, about.as_mut_ptr()) } != 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    // SAFETY: the call has filled it.
    Ok(unsafe { about.assume_init() }.shm_segsz as u64)
}

/// Makes a system call that a thread of this process wants made.
///
/// What it does to memory is what the program does: see the fourth reason in the [folder](super).
///
/// # Errors
///
/// What the kernel said.
pub(crate) fn make(number: i64, arguments: [u64; 6]) -> Result<u64, Errno> {
    // SAFETY: the program makes it: that it may be made is the program's business, here as without us.
    unsafe { gate::call(number, arguments) }
}
