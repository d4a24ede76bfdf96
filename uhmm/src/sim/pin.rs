//! Pins: pages that are used by reference, past all page tables.

use std::fmt;
use std::sync::Arc;

use super::error::SimError;
use super::fault::Space;
use super::page_table::{Sight, Target};
use super::ram::ZERO;
use super::state::{Shared, State};
use crate::address_space::SpaceId;
use crate::entry::{Access, Frame};
use crate::error::FaultError;
use crate::page::{Page, PageRange};

/// Pages that stay in system memory, in their frames, until this is dropped: what a direct
/// transfer of a disk or a network card works on.
///
/// A page that is unmapped meanwhile lives on for the pin alone.
#[must_use = "dropping the pin ends it"]
pub struct Pin {
    shared: Arc<Shared>,
    frames: Vec<Frame>,
}

impl Pin {
    /// Returns the frames, in the order of their pages.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }
}

impl Space {
    pub(super) fn pin(&self, range: PageRange) -> Result<Pin, SimError> {
        // Made first, so that a failure half-way unpins what was pinned.
        let mut pin = Pin { shared: Arc::clone(&self.shared), frames: Vec::new() };
        for page in range.iter() {
            let frame = loop {
                let access = self.shared.lock().pin_access(self.id, page)?;
                self.fault_page(page, access, None, None)?;
                if self.shared.lock().to_copy(self.id, page, access).is_some() {
                    if mmu_notifier::in_callback() {
                        return Err(FaultError::SelfWait { page }.into());
                    }
                    self.copy_shared(page, access, None)?;
                }
                let mut state = self.shared.lock();
                if let Some(frame) = state.pinnable(self.id, page, access) {
                    *state.pins.entry(frame).or_default() += 1;
                    break frame;
                }
            };
            pin.frames.push(frame);
        }
        Ok(pin)
    }
}

impl State {
    /// Returns what to fault a page for before it is pinned: for storing where that is allowed, so
    /// that no later store replaces the page.
    fn pin_access(&self, space: SpaceId, page: Page) -> Result<Access, FaultError> {
        let vma = self.vma(space, page).ok_or(FaultError::Hole { page })?;
        Ok(vma.rights.clamp(Access::Read, Access::Write))
    }

    fn pinnable(&self, space: SpaceId, page: Page, access: Access) -> Option<Frame> {
        let (first, entry) = self.entry(space, page)?;
        let through = access < Access::Write || entry.writable;
        if entry.sight != Sight::Visible || !through {
            return None;
        }
        match entry.target {
            Target::Zero => Some(ZERO),
            // The next store through a mapping of the page would leave the pin a page of others.
            Target::Object { .. } if self.to_copy(space, page, access).is_some() => None,
            Target::Object { .. } => self.frame_of(first, entry, page),
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        for frame in &self.frames {
            let count = state.pins.get_mut(frame).expect("a pin is counted until it is dropped");
            *count -= 1;
            if *count == 0 {
                state.pins.remove(frame);
                if state.orphans.remove(frame).is_some() {
                    state.ram.free(*frame);
                }
            }
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("frames", &self.frames).finish_non_exhaustive()
    }
}
