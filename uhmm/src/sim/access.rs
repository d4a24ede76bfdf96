//! What a CPU does: loads, stores, and read-modify-write operations.

use super::error::SimError;
use super::fault::Space;
use crate::entry::{Access, Frame};
use crate::page::{PAGE_SIZE, Page};

impl Space {
    pub(super) fn load(&self, address: u64, bytes: &mut [u8]) -> Result<(), SimError> {
        check_bounds(address, bytes.len())?;
        let mut rest = bytes;
        for (page, offset, length) in pieces(address, rest.len()) {
            let (piece, after) = rest.split_at_mut(length);
            self.with_frame(page, Access::Read, |space, frame| {
                space.shared.ram.load(frame, offset, piece);
            })?;
            rest = after;
        }
        Ok(())
    }

    pub(super) fn store(&self, address: u64, bytes: &[u8]) -> Result<(), SimError> {
        check_bounds(address, bytes.len())?;
        let mut rest = bytes;
        for (page, offset, length) in pieces(address, rest.len()) {
            let (piece, after) = rest.split_at(length);
            self.with_frame(page, Access::Write, |space, frame| {
                space.shared.ram.store(frame, offset, piece);
            })?;
            rest = after;
        }
        Ok(())
    }

    pub(super) fn update(
        &self,
        address: u64,
        access: Access,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, SimError> {
        if !address.is_multiple_of(8) {
            return Err(SimError::Unaligned { address });
        }
        let offset = (address % PAGE_SIZE as u64) as usize;
        self.with_frame(Page::containing(address), access, |space, frame| match access {
            Access::None | Access::Read => {
                let mut bytes = [0; 8];
                space.shared.ram.load(frame, offset, &mut bytes);
                u64::from_ne_bytes(bytes)
            }
            Access::Write | Access::Atomic => space.shared.ram.update(frame, offset, update),
        })
    }

    /// Translates and accesses in one step under the machine's lock, after as many faults as it
    /// takes.
    fn with_frame<R>(
        &self,
        page: Page,
        access: Access,
        f: impl FnOnce(&Space, Frame) -> R,
    ) -> Result<R, SimError> {
        loop {
            {
                let mut state = self.shared.lock();
                if let Some(frame) = state.translate(self.id, page, access) {
                    return Ok(f(self, frame));
                }
            }
            self.fault_page(page, access, None, None)?;
        }
    }
}

fn check_bounds(address: u64, bytes: usize) -> Result<(), SimError> {
    let bytes = bytes as u64;
    match address.checked_add(bytes.saturating_sub(1)) {
        Some(_) => Ok(()),
        None => Err(SimError::OutOfBounds { address, bytes }),
    }
}

/// Cuts `length` bytes at `address` at the edges of pages.
fn pieces(address: u64, length: usize) -> impl Iterator<Item = (Page, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = address + done as u64;
        let offset = (at % PAGE_SIZE as u64) as usize;
        let piece = (PAGE_SIZE - offset).min(length - done);
        done += piece;
        Some((Page::containing(at), offset, piece))
    })
}
