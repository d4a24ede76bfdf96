//! Being copied: what runs around `fork`, and how a copy knows that it is one.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicPtr, Ordering};
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

/// The page that has the number of this process, once somebody has asked for it; never unmapped.
///
/// No lock guards it: a child would inherit one that another thread holds.
static PAGE: AtomicPtr<Region> = AtomicPtr::new(std::ptr::null_mut());

/// Returns the page that a child finds wiped (`MADV_WIPEONFORK`, Linux 4.14), so that what it says
/// is right in every child that has memory of its own, however it was made.
fn page() -> Result<&'static Region, Errno> {
    // Acquire: whoever sees the page sees it made; partner of the exchange below.
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        let options =
            RegionOptions { wipe_on_fork: true, huge: Some(false), ..RegionOptions::default() };
        let own = Box::into_raw(Box::new(Region::reserve(PAGE_SIZE, options)?));
        // Release: partner of the load above; acquire: as there.
        let put = PAGE.compare_exchange(page, own, Ordering::AcqRel, Ordering::Acquire);
        page = match put {
            Ok(_) => own,
            Err(first) => {
                // SAFETY: it was made just now, and nobody else has seen it.
                drop(unsafe { Box::from_raw(own) });
                first
            }
        };
    }
    // SAFETY: what is put there was made from a box, and is never freed.
    Ok(unsafe { &*page })
}

/// Returns a number that no other process has: that of its parents neither, although a child may
/// have the process ID of its parent where there are several namespaces of them
/// (pid_namespaces(7)).
///
/// It is drawn at random. A number that was counted could be drawn twice: a child is made of pages
/// that are copied one after the other, while other threads of its parent go on counting.
///
/// # Errors
///
/// Those of [`Region::reserve`], and of getrandom(2).
pub(crate) fn process_number() -> Result<u64, Errno> {
    let region = page()?;
    let known = region.first_word();
    if known != 0 {
        return Ok(known);
    }
    let drawn = random()?;
    let mut keep = |word| if word == 0 { drawn } else { word };
    let before = region.fetch_update(region.range().first(), 0, &mut keep);
    Ok(if before == 0 { drawn } else { before })
}

/// Draws a number that is not zero.
fn random() -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    loop {
        // SAFETY: there is room for as many bytes.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match (got, u64::from_ne_bytes(bytes)) {
            (8, number) if number != 0 => return Ok(number),
            (0.., _) => {}
            (..0, _) => match Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                error => return Err(error.unwrap_or(Errno::IO)),
            },
        }
    }
}

/// Knows whether this process is the one that made it, or a copy of that.
///
/// A child that shares its parent's memory (`vfork`) is no copy: what the parent serves, it serves
/// for both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForkMark {
    page: &'static Region,
    process: u64,
}

impl ForkMark {
    /// Makes a mark of this process.
    ///
    /// # Errors
    ///
    /// Those of [`process_number`].
    pub(crate) fn new() -> Result<ForkMark, Errno> {
        Ok(ForkMark { page: page()?, process: process_number()? })
    }

    /// Returns where it is. What looks at it must never wait for it.
    pub(crate) fn range(&self) -> PageRange {
        self.page.range()
    }

    /// Tells whether this process made the mark: one load from memory.
    pub(crate) fn is_ours(&self) -> bool {
        self.page.first_word() == self.process
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
