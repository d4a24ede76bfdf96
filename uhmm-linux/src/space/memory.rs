//! System memory, as devices reach it: a frame is a page of the process, by its number.

use std::sync::{Arc, Weak};

use rustix::io::Errno;
use uhmm::{Frame, PAGE_SHIFT, PAGE_SIZE, Page, PageRange, SystemMemory};

use super::pool::Pool;
use super::{Space, count};
use crate::sys::process_vm;

/// The memory of the attached process.
///
/// Pages of the program are reached through the kernel, which checks that they are there and what
/// their mapping allows. Changes are only observed, so a translation may be stale for a moment: a
/// load through one that leads nowhere any more gives zeroes, a store is lost, and both are counted.
/// They never reach memory that was freed, since what is at an address is looked up each time.
pub(super) struct ProcessMemory {
    staging: Arc<Pool>,
    buffers: Arc<Pool>,
    space: Weak<Space>,
}

impl ProcessMemory {
    pub(super) fn new(
        staging: &Arc<Pool>,
        buffers: &Arc<Pool>,
        space: Weak<Space>,
    ) -> ProcessMemory {
        ProcessMemory { staging: Arc::clone(staging), buffers: Arc::clone(buffers), space }
    }

    /// Returns the pool that a frame is in, if it is in one.
    fn pool(&self, frame: Frame) -> Option<(&Pool, Page)> {
        let page = Page::new(frame.0)?;
        let pools = [&self.staging, &self.buffers];
        let pool = pools.into_iter().find(|pool| pool.range().contains(page))?;
        Some((pool, page))
    }

    /// Makes an access by way of the kernel, of as many bytes as it returns.
    ///
    /// A page that is out is not one that a device has a translation to: it was told before the page
    /// left, and this one is that of a mapping which another has replaced. To wait for the page could
    /// be to wait for this very access to end.
    fn access(
        &self,
        frame: Frame,
        offset: usize,
        bytes: usize,
        run: impl FnOnce() -> Result<usize, Errno>,
    ) -> usize {
        let Some(space) = self.space.upgrade().filter(|space| space.is_here()) else { return 0 };
        space.reserve_this_thread();
        let pages = (offset + bytes).div_ceil(PAGE_SIZE).max(1) as u64;
        let pages = Page::new(frame.0).and_then(|first| PageRange::from_pages(first, pages).ok());
        let done = match pages {
            Some(pages) if space.is_home(pages) => run().unwrap_or(0),
            _ => 0,
        };
        if done < bytes {
            count(&space.counters.stale_accesses, 1);
        }
        done
    }
}

impl SystemMemory for ProcessMemory {
    fn read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) {
        let read = self.try_read(frame, offset, bytes);
        bytes[read..].fill(0);
    }

    fn write(&self, frame: Frame, offset: usize, bytes: &[u8]) {
        self.try_write(frame, offset, bytes);
    }

    fn try_read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) -> usize {
        if let Some((pool, page)) = self.pool(frame) {
            pool.read(page, offset, bytes);
            return bytes.len();
        }
        let address = (frame.0 << PAGE_SHIFT) + offset as u64;
        self.access(frame, offset, bytes.len(), || process_vm::read(address, bytes))
    }

    fn try_write(&self, frame: Frame, offset: usize, bytes: &[u8]) -> usize {
        if let Some((pool, page)) = self.pool(frame) {
            pool.write(page, offset, bytes);
            return bytes.len();
        }
        let address = (frame.0 << PAGE_SHIFT) + offset as u64;
        self.access(frame, offset, bytes.len(), || process_vm::write(address, bytes))
    }

    fn fetch_update(&self, frame: Frame, offset: usize, update: &mut dyn FnMut(u64) -> u64) -> u64 {
        assert!(offset.is_multiple_of(8) && offset < PAGE_SIZE, "an aligned word of the frame");
        match self.pool(frame) {
            Some((pool, page)) => pool.fetch_update(page, offset, update),
            // Only what a device holds can be updated in one step, and that is in staging.
            None => panic!("an atomic access to frame {:#x}, which no device holds", frame.0),
        }
    }
}
