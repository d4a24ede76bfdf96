//! What a store needs of a file.

use std::fs::File;
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags, fallocate, statx};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// How often a call that a signal interrupts is made again.
const TRIES: usize = 100;

/// Bytes by their offset, and room for them.
pub(super) trait Backing: FileExt + Send + Sync {
    /// Reserves room, so that writing there later does not fail for lack of it. Where that cannot
    /// be known, does nothing.
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Gives room back. What was there is gone.
    fn release(&self, offset: u64, bytes: u64) -> io::Result<()>;
}

/// A file without a name.
///
/// A program may close descriptors that are not its own, as daemons do, and the next file that it
/// opens gets the number. So each call looks whether the file is still this one. Between the look
/// and the call the program may do the same once more, which only a call of its own could exclude.
pub(super) struct Unnamed {
    /// There until the drop.
    file: Option<File>,
    identity: Identity,
}

/// What tells a file from all others. Its number does not alone: when the last descriptor of a file
/// without a name is closed, the next file that is made gets the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: (u32, u32),
    number: u64,
    /// How many names it has.
    names: u32,
    /// When it was made, in seconds and nanoseconds, where the file system knows.
    made: Option<(i64, u32)>,
}

impl Unnamed {
    /// Makes one in `path`, a directory, or else in the directory that a file called `path` would
    /// be in.
    pub(super) fn create(path: &Path) -> io::Result<Unnamed> {
        let file = tempfile::tempfile_in(directory(path)?)?;
        let identity = Identity::of(&file)?;
        Ok(Unnamed { file: Some(file), identity })
    }

    /// Returns the file, if the program has not closed it.
    fn file(&self) -> io::Result<&File> {
        let own = |file: &&File| Identity::of(file).is_ok_and(|found| found == self.identity);
        self.file.as_ref().filter(own).ok_or_else(|| {
            io::Error::other("the program has closed the file that its pages are in")
        })
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if self.file().is_err() {
            // What has the number now is somebody else's.
            self.file.take().map(IntoRawFd::into_raw_fd);
        }
    }
}

impl Backing for Unnamed {
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        check_limit(offset + bytes)?;
        match self.allocate(FallocateFlags::empty(), offset, bytes) {
            // The file system cannot. Then a write may fail, and the page stays all the same.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            reserved => reserved,
        }
    }

    fn release(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocate(hole, offset, bytes)
    }
}

impl Unnamed {
    fn allocate(&self, flags: FallocateFlags, offset: u64, bytes: u64) -> io::Result<()> {
        let file = self.file()?;
        let mut result = Err(Errno::INTR);
        for _ in 0..TRIES {
            result = fallocate(file, flags, offset, bytes);
            if result != Err(Errno::INTR) {
                break;
            }
        }
        Ok(result?)
    }
}

impl FileExt for Unnamed {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file()?.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        check_limit(offset + bytes.len() as u64)?;
        self.file()?.write_at(bytes, offset)
    }
}

impl Identity {
    fn of(file: &File) -> io::Result<Identity> {
        // Nothing else is asked for: who has seen the time of the last change makes the next write
        // enter a new one, on the disk (multigrain timestamps, Linux 6.13).
        let wanted = StatxFlags::INO | StatxFlags::NLINK | StatxFlags::BTIME;
        let found = statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
        let known = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
        let made = known.then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec));
        let device = (found.stx_dev_major, found.stx_dev_minor);
        Ok(Identity { device, number: found.stx_ino, names: found.stx_nlink, made })
    }
}

/// Fails where a file may not be so large. The kernel would send a signal besides, which by default
/// ends the program: setrlimit(2), `RLIMIT_FSIZE`.
fn check_limit(end: u64) -> io::Result<()> {
    match getrlimit(Resource::Fsize).current {
        Some(limit) if end > limit => Err(io::ErrorKind::FileTooLarge.into()),
        _ => Ok(()),
    }
}

/// Returns the directory of a file that is to be made for `path`.
fn directory(path: &Path) -> io::Result<PathBuf> {
    match path.metadata() {
        Ok(found) if found.is_dir() => Ok(path.to_owned()),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is a file of that name, which is left as it is: give a directory, or a name \
             that is free",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Ok(PathBuf::from(".")),
            Some(parent) => Ok(parent.to_owned()),
            None => Err(error),
        },
        Err(error) => Err(error),
    }
}
