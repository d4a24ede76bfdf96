//! The buffers that pages pass through on their way to a file and back.

use std::ops::{Deref, DerefMut};

use uhmm::PAGE_SIZE;
use uhmm::primitive::{Mutex, lock};

/// How many pages a buffer holds.
pub(super) const BUFFER_PAGES: usize = 64;

/// How many buffers there are.
const BUFFERS: usize = 4;

/// A byte that is in no fresh memory.
const TOUCHED: u8 = 0xa5;

/// The buffers that are at rest. None is ever added, so to put one back allocates nothing.
pub(super) struct Buffers(Mutex<Vec<Box<[u8]>>>);

/// A buffer in use. Its drop puts it back.
pub(super) struct Buffer<'a> {
    bytes: Box<[u8]>,
    buffers: &'a Buffers,
}

impl Buffers {
    /// The bytes of all of them.
    pub(super) const BYTES: usize = BUFFERS * BUFFER_PAGES * PAGE_SIZE;

    /// Allocates all buffers, and touches them: memory that is not zeroes is there.
    pub(super) fn new() -> Buffers {
        let buffer = |_| vec![TOUCHED; BUFFER_PAGES * PAGE_SIZE].into_boxed_slice();
        Buffers(Mutex::new((0..BUFFERS).map(buffer).collect()))
    }

    /// Takes a buffer, if one is at rest. Waits for none.
    pub(super) fn take(&self) -> Option<Buffer<'_>> {
        let bytes = lock(&self.0).pop()?;
        Some(Buffer { bytes, buffers: self })
    }
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        lock(&self.buffers.0).push(bytes);
    }
}
