//! Who decides when a process may have more memory.

use std::fmt;
use std::time::Duration;

use uhmm::{Page, PageRange};

/// The first touch of a page that is not there, and was never away: the process grows by it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FirstTouch {
    /// The page.
    pub page: Page,
    /// Whether it is a store. A load takes no memory by itself: it finds a page of zeroes that all
    /// share, and a store to it later is not told of.
    pub write: bool,
    /// Whose touch it is, as the kernel numbers threads (`gettid`).
    pub thread: u32,
    /// How long the thread has been waiting for room.
    pub waited: Duration,
}

impl FirstTouch {
    /// Makes one, for who tests its [`Growth`].
    pub fn new(page: Page, write: bool, thread: u32, waited: Duration) -> FirstTouch {
        FirstTouch { page, write, thread, waited }
    }
}

/// Decides when a process may have more memory. See [`Process::hold_growth`].
///
/// It is asked by the thread that serves all faults, under a lock: it must not wait for anybody who
/// waits for a page, touch memory of the program, or call the process it decides about.
///
/// [`Process::hold_growth`]: crate::Process::hold_growth
pub trait Growth: fmt::Debug + Send + Sync {
    /// Returns which pages may come, those around the touched page among them; `None` if the thread
    /// is to wait. Then it is asked again: when [`Process::resume_growth`] is called, and every 10 ms.
    /// Of the pages returned those come that are not there yet, in the same mapping.
    ///
    /// [`Process::resume_growth`]: crate::Process::resume_growth
    fn admit(&self, touch: &FirstTouch) -> Option<PageRange>;

    /// Is told how many pages have come, of `admitted` that it let come just now.
    fn came(&self, admitted: u64, came: u64);
}
