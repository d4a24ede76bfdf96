//! Why `uhmm` itself ends without having run a program to its end.

use std::fmt;

/// The statuses of `uhmm` itself are those of env(1).
pub(crate) mod status {
    /// `uhmm` failed, or was used wrongly.
    pub(crate) const FAILED: u8 = 125;
    /// The program was found and cannot be run this way.
    pub(crate) const CANNOT_INVOKE: u8 = 126;
    /// There is no such program.
    pub(crate) const NOT_FOUND: u8 = 127;
}

/// One line that says what is wrong and what to do, and the status to end with.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    message: String,
    status: u8,
}

impl Failure {
    /// `uhmm` cannot do its work.
    pub(crate) fn own(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), status: status::FAILED }
    }

    /// The program cannot be run this way.
    pub(crate) fn cannot_invoke(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), status: status::CANNOT_INVOKE }
    }

    /// There is no such program.
    pub(crate) fn not_found(message: impl fmt::Display) -> Failure {
        Failure { message: message.to_string(), status: status::NOT_FOUND }
    }

    /// Returns the status to end with.
    pub(crate) fn status(&self) -> u8 {
        self.status
    }
}
