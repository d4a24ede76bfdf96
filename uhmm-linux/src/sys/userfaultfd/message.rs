//! What a userfaultfd reports, and the buffer it is read into.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use uhmm::{Page, PageRange};

use super::super::abi::{self, UffdMsg};
use super::{Features, Userfaultfd};

/// What a userfaultfd reports: a fault that waits, or a change of the address space (an *event*).
///
/// Who makes a change waits in its system call until the event has been read; a fault waits until
/// it is woken, read or not. One read gives waiting faults first and then events in their order, so
/// a fault may be read before the event that explains its address. What an event says was true
/// when it was sent: of [`Message::Remove`] before the change, of all others after it, when the
/// range may be somebody else's already.
#[derive(Debug)]
pub(crate) enum Message {
    /// A thread waits for a page.
    #[doc(alias = "UFFD_EVENT_PAGEFAULT")]
    Fault {
        /// Where: the page's first byte, or the very byte with [`Features::EXACT_ADDRESS`].
        address: u64,
        /// Whether it is a store.
        write: bool,
        /// Whether the page is there, and write-protected.
        wp: bool,
        /// Whether the page is in the file's cache, and only not mapped.
        minor: bool,
        /// Who: the thread's number with [`Features::THREAD_ID`], else 0.
        thread: u32,
    },
    /// The process has forked. The child does not run before this has been read.
    ///
    /// The descriptor is the child's: faults in the child are read from it, here in the parent,
    /// and [`Userfaultfd::copy`] on it fills the child's memory from the parent's. MOVE on it is
    /// refused (`EINVAL`). If it is closed, missing pages of the child read as zeroes.
    #[doc(alias = "UFFD_EVENT_FORK")]
    Fork(Userfaultfd),
    /// mremap(2) has moved `from` to `to`, registration included. The length is that of the old
    /// mapping; what it grew by is registered too, without being said. Unless it was made with
    /// `MREMAP_DONTUNMAP`, an [`Message::Unmap`] of the old range follows.
    #[doc(alias = "UFFD_EVENT_REMAP")]
    Remap {
        /// Where it was.
        from: PageRange,
        /// Where it begins now.
        to: Page,
    },
    /// mremap(2) with an old length of 0 has mapped shared memory a second time. The kernel
    /// registers the new mapping as it registered the old one, and does not say how long it is.
    #[doc(alias = "UFFD_EVENT_REMAP")]
    Duplicate {
        /// The first page of the old mapping that was asked for.
        of: Page,
        /// Where the new mapping begins.
        at: Page,
    },
    /// madvise(2) is about to drop the pages (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`). They
    /// go after this has been read, at a time that is not announced; with `MADV_FREE` on shared
    /// memory not at all, because the call then fails.
    #[doc(alias = "UFFD_EVENT_REMOVE")]
    Remove(PageRange),
    /// The range was unmapped, by munmap(2), or by mmap(2), mremap(2) or brk(2) in passing. Only
    /// parts of it need have been registered.
    #[doc(alias = "UFFD_EVENT_UNMAP")]
    Unmap(PageRange),
}

/// A buffer for what one read brings.
///
/// # Invariants
///
/// 1. `next <= len <= CAPACITY`, and `raw[next..len]` are messages that the kernel wrote and that
///    nobody has taken: a descriptor in one of them belongs to this buffer.
#[derive(Debug)]
pub(crate) struct Messages {
    raw: [UffdMsg; Messages::CAPACITY],
    next: usize,
    len: usize,
    /// Those of the userfaultfd that was read last; children have them too.
    features: Features,
}

impl Messages {
    /// The most messages that one read brings.
    pub(crate) const CAPACITY: usize = 16;

    /// Makes an empty buffer.
    pub(crate) const fn new() -> Messages {
        let nothing = UffdMsg { event: 0, reserved: [0; 7], words: [0; 3] };
        let features = Features::empty();
        Messages { raw: [nothing; Messages::CAPACITY], next: 0, len: 0, features }
    }

    /// Returns how many messages are left to take.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len - self.next
    }

    /// Tells whether no message is left to take.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the oldest message.
    ///
    /// # Panics
    ///
    /// On an event that the kernel does not document: to pass over it would be to lose a change.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<Message> {
        let message = self.raw[..self.len].get(self.next)?;
        // INVARIANT: 1: what the message owns goes to the caller.
        self.next += 1;
        // SAFETY: the kernel wrote the message, and it is taken once.
        Some(unsafe { decode(message, self.features) })
    }

    /// Takes the messages, oldest first; those that the iterator does not come to stay.
    #[inline]
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Message> {
        std::iter::from_fn(|| self.take())
    }

    /// Reads from `from`, in place of all that is still in the buffer.
    #[inline]
    pub(super) fn fill(&mut self, from: &Userfaultfd) -> Result<usize, Errno> {
        self.clear();
        self.features = from.features();
        let start = self.raw.as_mut_ptr().cast::<u8>();
        let bytes = size_of_val(&self.raw);
        // SAFETY: these are the bytes of the array, borrowed mutably; all of them are initialized,
        // as the structure has no padding, and any bytes are a message.
        let buffer = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
        let read = rustix::io::retry_on_intr(|| rustix::io::read(from, &mut *buffer))?;
        // INVARIANT: 1: the kernel writes whole messages.
        self.len = read / size_of::<UffdMsg>();
        Ok(self.len)
    }

    /// Drops what was not taken, closing the descriptors of children.
    #[inline]
    fn clear(&mut self) {
        while self.take().is_some() {}
        (self.next, self.len) = (0, 0);
    }

    /// Makes a buffer of one message, as the kernel would write it.
    ///
    /// # Safety
    ///
    /// A descriptor in the message is owned by it.
    #[cfg(test)]
    pub(super) unsafe fn of(message: UffdMsg) -> Messages {
        let mut messages = Messages::new();
        messages.raw[0] = message;
        messages.len = 1;
        messages
    }
}

impl Default for Messages {
    fn default() -> Messages {
        Messages::new()
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Says what the kernel wrote.
///
/// # Safety
///
/// The kernel wrote the message, and it is decoded once: it may own a descriptor.
#[inline]
unsafe fn decode(message: &UffdMsg, features: Features) -> Message {
    let [first, second, third] = message.words;
    match message.event {
        abi::UFFD_EVENT_PAGEFAULT => Message::Fault {
            address: second,
            write: first & abi::UFFD_PAGEFAULT_FLAG_WRITE != 0,
            wp: first & abi::UFFD_PAGEFAULT_FLAG_WP != 0,
            minor: first & abi::UFFD_PAGEFAULT_FLAG_MINOR != 0,
            thread: third as u32,
        },
        abi::UFFD_EVENT_FORK => {
            // SAFETY: the kernel made this descriptor for whoever reads the message, and the
            // caller promises that this is the only time.
            let fd = unsafe { OwnedFd::from_raw_fd(first as u32 as RawFd) };
            Message::Fork(Userfaultfd::of_child(fd, features))
        }
        abi::UFFD_EVENT_REMAP if third == 0 => {
            Message::Duplicate { of: Page::containing(first), at: Page::containing(second) }
        }
        abi::UFFD_EVENT_REMAP => {
            Message::Remap { from: range(first, third), to: Page::containing(second) }
        }
        abi::UFFD_EVENT_REMOVE => Message::Remove(range(first, second - first)),
        abi::UFFD_EVENT_UNMAP => Message::Unmap(range(first, second - first)),
        event => unreachable!("the kernel sent event {event:#x}, which it does not document"),
    }
}

/// The range of an event. The calls that send one refuse or round what does not begin and end at
/// pages, and do nothing for an empty range.
fn range(start: u64, bytes: u64) -> PageRange {
    PageRange::new(start, bytes).expect("an event concerns whole pages")
}
