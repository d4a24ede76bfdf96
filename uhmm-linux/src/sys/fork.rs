//! Being copied: what runs around `fork`, and how a copy knows that it is one.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uhmm::{PAGE_SIZE, PageRange};

use super::region::{Region, RegionOptions};
use super::thread::errno;

/// What runs around each `fork` of this process.
#[derive(Clone, Copy)]
struct Hooks {
    prepare: fn(),
    parent: fn(),
    child: fn(),
}

/// The hooks, once there are any.
static HOOKS: OnceLock<Hooks> = OnceLock::new();

/// Held while hooks are registered, and says whether they are.
static REGISTERED: Mutex<bool> = Mutex::new(false);

/// Makes `prepare` run before each `fork` of this process, and `parent` and `child` after it in the
/// one and in the other, by way of `pthread_atfork`. Children inherit them. The first call counts:
/// later ones change nothing.
///
/// `fork` of the C library calls them; a raw `clone` does not, see [`ForkMark`]. They cannot be
/// taken back, and a panic in one aborts the process.
///
/// # Errors
///
/// `ENOMEM`; nothing is registered then, and it can be tried again.
pub(crate) fn hooks(prepare: fn(), parent: fn(), child: fn()) -> Result<(), Errno> {
    extern "C" fn before() {
        run(|hooks| hooks.prepare);
    }
    extern "C" fn in_parent() {
        run(|hooks| hooks.parent);
    }
    extern "C" fn in_child() {
        run(|hooks| hooks.child);
    }
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    HOOKS.get_or_init(|| Hooks { prepare, parent, child });
    if !*registered {
        // SAFETY: the three functions may be called at any time for as long as the program runs.
        errno(unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) })?;
        *registered = true;
    }
    Ok(())
}

/// Runs one of the hooks.
fn run(which: impl FnOnce(&Hooks) -> fn()) {
    if let Some(hooks) = HOOKS.get() {
        which(hooks)();
    }
}

/// Knows whether this process is the one that made it, or a copy of that.
///
/// It is a page that the kernel wipes in a child (`MADV_WIPEONFORK`, Linux 4.14), so it is right in
/// every child that has memory of its own, however it was made. A child that shares its parent's
/// memory (`vfork`) is no copy: what the parent serves, it serves for both.
#[derive(Debug)]
pub(crate) struct ForkMark(Region);

impl ForkMark {
    /// Makes a mark of this process.
    ///
    /// # Errors
    ///
    /// Those of [`Region::reserve`].
    pub(crate) fn new() -> Result<ForkMark, Errno> {
        let options =
            RegionOptions { wipe_on_fork: true, huge: Some(false), ..RegionOptions::default() };
        let region = Region::reserve(PAGE_SIZE, options)?;
        region.write(region.range().first(), 0, &1_u64.to_ne_bytes());
        Ok(ForkMark(region))
    }

    /// Tells whether this process made the mark: one load from memory.
    pub(crate) fn is_ours(&self) -> bool {
        self.0.first_word() != 0
    }
}

/// Tells what a child finds wiped (`MADV_WIPEONFORK`): by `/proc/self/smaps`, since no faster
/// interface says so. That walks all page tables.
#[derive(Debug)]
pub(crate) struct Wiped(OwnedFd);

impl Wiped {
    /// Opens the file, so that to read it takes no descriptor.
    ///
    /// # Errors
    ///
    /// `EMFILE` and `ENFILE`; `ENOENT` where there is no `/proc`.
    pub(crate) fn open() -> Result<Wiped, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Wiped(rustix::fs::open("/proc/self/smaps", flags, Mode::empty())?))
    }

    /// Returns the ranges, as they are now.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn ranges(&self) -> Result<Vec<PageRange>, Errno> {
        let mut text = Vec::new();
        let mut part = [0; 4096];
        loop {
            match rustix::io::pread(&self.0, &mut part, text.len() as u64) {
                Ok(0) => break,
                Ok(read) => text.extend_from_slice(&part[..read]),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(wiped_in(&String::from_utf8_lossy(&text)))
    }
}

/// Finds the ranges in the text of a `smaps` file: a line with the addresses of a mapping, lines
/// with its properties, and a last one with its flags.
fn wiped_in(smaps: &str) -> Vec<PageRange> {
    let mut ranges = Vec::new();
    let mut mapping = None;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let number = |text| u64::from_str_radix(text, 16).ok();
            mapping = number(start).zip(number(end));
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split(' ').any(|flag| flag == "wf")
            && let Some((start, end)) = mapping
        {
            ranges.extend(PageRange::new(start, end - start));
        }
    }
    ranges
}

#[cfg(test)]
mod tests;
