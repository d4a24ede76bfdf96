//! What a request to the mirror device is made of: the numbers and structures of its `ioctl(2)`, and
//! the checks that come before anything is done.
//!
//! The numbers are those of the kernel's test driver (`lib/test_hmm_uapi.h`): programs that were
//! built for that one are to work with this one as they are.

use rustix::io::Errno;
use uhmm::{PAGE_SIZE, PageRange};

/// The bytes of the structure that every command takes: five 64-bit numbers, native endian.
pub const STRUCT_BYTES: usize = 40;

/// The number of the first command: `_IOWR('H', 0, struct)`.
const FIRST: u32 = 0xc028_4800;

/// What the device is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// The device loads from the pages.
    Read,
    /// The device stores to the pages.
    Write,
    /// The pages move to the device, which then loads from them.
    MigrateToDev,
    /// The pages come home from the device.
    MigrateToSys,
    /// What the CPU's page table says of each page.
    Snapshot,
    /// The device takes the pages exclusively, then loads from them.
    Exclusive,
    /// Is none of the pages the device's exclusively any more?
    CheckExclusive,
    /// Everything in the device's memory comes home.
    Release,
    /// The number of pages is a set of flags: see [`FAIL_ALLOC`].
    Flags,
}

/// A flag: the next allocation of device memory, or of system memory to come home to, fails once.
pub const FAIL_ALLOC: u64 = 1;

/// The part of the structure that the device is given. The pointer is the caller's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The first address, in the address space of whoever opened the device.
    pub addr: u64,
    /// How many pages.
    pub npages: u64,
}

/// The part of the structure that the device fills in where it succeeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// How many pages were read, written, moved or described.
    pub cpages: u64,
    /// How many times the device had to fault.
    pub faults: u64,
}

impl Command {
    /// Every command, by its number.
    pub const ALL: [Command; 9] = [
        Command::Read,
        Command::Write,
        Command::MigrateToDev,
        Command::MigrateToSys,
        Command::Snapshot,
        Command::Exclusive,
        Command::CheckExclusive,
        Command::Release,
        Command::Flags,
    ];

    /// Returns the command of this `ioctl(2)` number.
    ///
    /// # Errors
    ///
    /// `EINVAL`: there is none. The numbers differ in their size and direction too, and all of it
    /// counts.
    pub fn of(number: u32) -> Result<Command, Errno> {
        let index = number.checked_sub(FIRST).and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| Command::ALL.get(index)).copied().ok_or(Errno::INVAL)
    }

    /// Returns the number of `ioctl(2)`.
    pub fn number(self) -> u32 {
        FIRST + self as u32
    }

    /// Tells whether the caller's pointer receives anything.
    pub fn has_output(self) -> bool {
        matches!(
            self,
            Command::Read | Command::MigrateToDev | Command::Snapshot | Command::Exclusive
        )
    }

    /// Returns how many bytes the caller's pointer leads to that the device is to have:
    /// [`Command::Write`] takes all pages, the others nothing. To be copied before anything is done
    /// (`EFAULT`).
    ///
    /// # Errors
    ///
    /// `EINVAL` as [`check`]; `ENOMEM` where this is more than the system's memory.
    pub fn input_bytes(self, request: Request) -> Result<usize, Errno> {
        let range = check(request)?;
        match self {
            Command::Write => buffer_bytes(range),
            _ => Ok(0),
        }
    }
}

/// Makes the checks that are the same for each command, in the order of the kernel's, and returns the
/// pages. They hold for commands that ignore the address, too.
///
/// # Errors
///
/// `EINVAL`: the address is none of a page, there are no pages, or they reach the end of the address
/// space.
pub fn check(request: Request) -> Result<PageRange, Errno> {
    let Request { addr, npages } = request;
    if !addr.is_multiple_of(PAGE_SIZE as u64) {
        return Err(Errno::INVAL);
    }
    // Modulo 2^64, as the kernel has it: what wraps around past its beginning is a range.
    let end = addr.wrapping_add(npages.wrapping_mul(PAGE_SIZE as u64));
    if end <= addr {
        return Err(Errno::INVAL);
    }
    PageRange::new(addr, end - addr).map_err(|_| Errno::INVAL)
}

/// Returns how many bytes a copy of these pages takes.
///
/// # Errors
///
/// `ENOMEM`: more than the system has, which the kernel does not allocate either.
pub(super) fn buffer_bytes(range: PageRange) -> Result<usize, Errno> {
    let memory = rustix::system::sysinfo();
    let memory = memory.totalram.saturating_mul(u64::from(memory.mem_unit));
    match range.pages().checked_mul(PAGE_SIZE as u64) {
        Some(bytes) if bytes <= memory => usize::try_from(bytes).map_err(|_| Errno::NOMEM),
        _ => Err(Errno::NOMEM),
    }
}
