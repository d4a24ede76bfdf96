//! What can go wrong with an operation of a simulated process.

use crate::error::FaultError;
use crate::page::{Page, PageRange};

/// Why an operation on a simulated process or file was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// A page could not be had: what a CPU would be sent a signal for, unless there is no memory.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// A 64-bit word does not begin at a multiple of its size.
    #[error("the word at {address:#x} is not aligned: use an address that is a multiple of 8")]
    Unaligned {
        /// Where.
        address: u64,
    },
    /// The bytes asked for go past the top of the address space, or past the end of the file.
    #[error("the {bytes:#x} bytes at {address:#x} do not fit: the last one is out of bounds")]
    OutOfBounds {
        /// The first address, or offset in the file.
        address: u64,
        /// How many bytes.
        bytes: u64,
    },
    /// A mapping was to be moved to a place that overlaps it, or that does not exist.
    #[error("{from} cannot be moved to {to}: the places overlap, or the new one is out of bounds")]
    BadDestination {
        /// What was to be moved.
        from: PageRange,
        /// Where to.
        to: Page,
    },
    /// The page belongs to a mapping that others share, where the operation would be seen by them.
    #[error("{page} is mapped shared: map it private to change this mapping alone")]
    NotPrivate {
        /// Where.
        page: Page,
    },
    /// The page is used by reference, and would be another one after the operation.
    #[error("{page} is pinned: drop the pin to replace the page")]
    Pinned {
        /// Where.
        page: Page,
    },
    /// There is no system memory for what the operation needs.
    #[error("there is no free system memory: raise `MachineOptions::system_pages` or free some")]
    OutOfMemory,
}
