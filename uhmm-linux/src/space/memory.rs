//! System memory, as devices reach it: a frame is a page of the process, by its number.

use std::sync::{Arc, Weak};

use uhmm::{Frame, PAGE_SHIFT, PAGE_SIZE, Page, SystemMemory};

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

    fn note_stale(&self) {
        if let Some(space) = self.space.upgrade() {
            count(&space.counters.stale_accesses, 1);
        }
    }
}

impl SystemMemory for ProcessMemory {
    fn read(&self, frame: Frame, offset: usize, bytes: &mut [u8]) {
        if let Some((pool, page)) = self.pool(frame) {
            return pool.read(page, offset, bytes);
        }
        let address = (frame.0 << PAGE_SHIFT) + offset as u64;
        let read = process_vm::read(address, bytes).unwrap_or(0);
        if read < bytes.len() {
            bytes[read..].fill(0);
            self.note_stale();
        }
    }

    fn write(&self, frame: Frame, offset: usize, bytes: &[u8]) {
        if let Some((pool, page)) = self.pool(frame) {
            return pool.write(page, offset, bytes);
        }
        let address = (frame.0 << PAGE_SHIFT) + offset as u64;
        if process_vm::write(address, bytes).unwrap_or(0) < bytes.len() {
            self.note_stale();
        }
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
