//! Why an access of a kernel failed.

use uhmm::{Access, FaultError, StayReason};

/// An access that the device could not make: what a kernel ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device's {access:?} access at {address:#x} failed: {reason}")]
pub struct KernelFault {
    /// Why.
    pub reason: FaultReason,
    /// The address of the access, which for one of several pages is in the page that failed.
    pub address: u64,
    /// What was to be done there.
    pub access: Access,
}

/// Why a fault cannot be served (feature F63).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum FaultReason {
    /// Nothing is there: no mapping, beyond the end of a file, or not within the mirror.
    #[error("nothing is mapped there")]
    Address,
    /// The mapping does not allow it.
    #[error("the mapping does not allow it")]
    Permission,
    /// The page cannot be used in this way: an atomic operation on memory that the device cannot
    /// have to itself.
    #[error("the page cannot be used in this way")]
    Type,
    /// There is no memory for the page.
    #[error("there is no memory for the page")]
    OutOfMemory,
    /// Serving the fault kept failing, although nothing is wrong with the access.
    #[error("the fault could not be served")]
    Internal,
    /// The operation itself is wrong: not aligned, or past the top of the address space.
    #[error("the operation is not aligned or wraps")]
    Operation,
    /// The address space has died, or the mirror was unregistered.
    #[error("the address space is gone")]
    Gone,
    /// The device's fault service was stopped.
    #[error("the device was stopped")]
    Stopped,
    /// The access had no outcome for as long as the context had patience: nobody served its fault,
    /// or the buffer was full all the time.
    #[error("the fault was not served in time")]
    Unserved,
}

/// What to do about an error in serving a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may pass: replay, a limited number of times.
    Retry,
    /// It will not: cancel.
    Fatal(FaultReason),
}

impl Verdict {
    pub(crate) fn of(error: &FaultError) -> Verdict {
        match error {
            FaultError::Collided { .. }
            | FaultError::TimedOut { .. }
            // The page is whole, on a device that could not copy it this time.
            | FaultError::CopyFailed { .. } => Verdict::Retry,
            FaultError::Stuck { reason, .. } => match Verdict::of_stay(*reason) {
                memory @ Verdict::Fatal(FaultReason::OutOfMemory) => memory,
                _ => Verdict::Retry,
            },
            FaultError::Hole { .. }
            | FaultError::OutOfRange { .. }
            | FaultError::EndOfFile { .. } => Verdict::Fatal(FaultReason::Address),
            FaultError::Denied { .. } => Verdict::Fatal(FaultReason::Permission),
            FaultError::NotExclusive { reason, .. } => Verdict::of_stay(*reason),
            FaultError::OutOfMemory { .. } => Verdict::Fatal(FaultReason::OutOfMemory),
            FaultError::Released => Verdict::Fatal(FaultReason::Gone),
            _ => Verdict::Fatal(FaultReason::Internal),
        }
    }

    /// A page that could not be had because of what it is, or because of what goes on with it.
    fn of_stay(reason: StayReason) -> Verdict {
        match reason {
            StayReason::Hole => Verdict::Fatal(FaultReason::Address),
            StayReason::Denied | StayReason::ReadOnly => Verdict::Fatal(FaultReason::Permission),
            StayReason::FileBacked
            | StayReason::Shared
            | StayReason::Locked
            | StayReason::Reserved
            | StayReason::Handled
            | StayReason::Unsupported => Verdict::Fatal(FaultReason::Type),
            StayReason::OutOfDeviceMemory | StayReason::OutOfSystemMemory => {
                Verdict::Fatal(FaultReason::OutOfMemory)
            }
            // Pins end, copies and splits are tried again, and the others are moments of a move.
            StayReason::Pinned
            | StayReason::InTransit
            | StayReason::Exclusive
            | StayReason::SwappedOut
            | StayReason::AlreadyThere
            | StayReason::Elsewhere
            | StayReason::Changed
            | StayReason::Busy
            | StayReason::LargePage
            | StayReason::CopyFailed
            | StayReason::Gone
            | StayReason::Policy => Verdict::Retry,
            _ => Verdict::Fatal(FaultReason::Internal),
        }
    }
}
