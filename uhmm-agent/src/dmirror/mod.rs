//! The mirror device of the kernel's HMM tests, for the process that opens it.
//!
//! [`Mm`] is this process: attached once, with one device for each [`Unit`]. [`OpenFile`] is one open
//! of a unit; everything is done by the thread that calls [`OpenFile::ioctl`], on the address space of
//! this process. What copies the structure and the buffer of a request, carries requests from other
//! processes here, and knows when the last open of a unit is closed, is built around it:
//!
//! * [`Units`] is the state that all processes share. [`Units::release`] calls [`Mm::evict`] in each
//!   process, this one too, possibly on another thread, and returns when all have.
//! * The last close of a unit calls [`Mm::evict`] in each process likewise.
//! * `Command::Write` takes as many bytes of input as [`Command::input_bytes`] says. What `output` holds
//!   on success is to be copied to the caller's pointer; where that fails the operation has been done
//!   and the caller gets `EFAULT`. On errors nothing is copied, neither output nor counts.
//! * In a child of the process, everything answers as if the address space had ended: each process
//!   attaches by itself.

pub mod abi;

mod file;
mod migrate;
mod mm;
mod snapshot;
mod transfer;
mod units;
mod walk;

pub use abi::{Command, Counts, Request};
pub use file::OpenFile;
pub use mm::Mm;
pub use rustix::io::Errno;
pub use units::{COHERENT_PAGES, NoRoom, Unit, Units};
