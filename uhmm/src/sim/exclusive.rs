//! Exclusive access: pages that one device has, with the CPUs kept off until one touches them.

use std::time::Instant;

use mmu_notifier::{EventKind, Owner};

use super::fault::Space;
use super::page_table::{Announced, Concern, Entry, Sight, Target};
use super::state::{Found, State};
use super::vma::Vma;
use crate::address_space::SpaceId;
use crate::entry::Access;
use crate::error::{FaultError, StayReason};
use crate::page::{Order, Page, PageRange};

impl Space {
    /// Does what [`Backend::exclusive`](crate::Backend::exclusive) says.
    pub(super) fn take_exclusive(
        &self,
        range: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        // In pieces, so that a range that is mostly not mapped costs nothing but its error.
        for piece in range.blocks(Order::HUGE) {
            self.take_piece_exclusive(piece, owner, deadline)?;
        }
        Ok(())
    }

    fn take_piece_exclusive(
        &self,
        piece: PageRange,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<(), FaultError> {
        let mut rest: Vec<Page> = piece.iter().collect();
        while !rest.is_empty() {
            for &page in &rest {
                if !self.shared.lock().is_held(self.id, page, owner) {
                    self.fault_page(page, Access::Write, None, deadline)?;
                }
            }
            rest = self.hold(rest, owner, deadline)?;
            if !rest.is_empty() && deadline.is_some_and(|end| end <= Instant::now()) {
                return Err(FaultError::TimedOut { page: rest[0] });
            }
        }
        Ok(())
    }

    /// Holds those of `pages` that are still as the fault left them, and returns the others.
    fn hold(
        &self,
        pages: Vec<Page>,
        owner: Owner,
        deadline: Option<Instant>,
    ) -> Result<Vec<Page>, FaultError> {
        let find = |state: &State| {
            let mut concern = Concern::default();
            for &page in &pages {
                match state.holdable(self.id, page) {
                    Ok(Some(Entry { order, target: Target::Object { id, .. }, .. }))
                        if order > Order::PAGE =>
                    {
                        return Found::Split(id);
                    }
                    Ok(Some(_)) => concern.add(self.id, page.into()),
                    Ok(None) | Err(_) => {}
                }
            }
            Found::Concern(concern)
        };
        let kind = EventKind::Exclusive;
        let take = |state: &mut State, announced: &Announced<'_>| {
            let mut rest = Vec::new();
            for &page in &pages {
                if state.is_held(self.id, page, owner) {
                    continue;
                }
                match state.holdable(self.id, page) {
                    Ok(Some(_)) => state.table(self.id).change(page, announced, |entry| {
                        entry.sight = Sight::Exclusive(owner);
                    }),
                    Ok(None) => rest.push(page),
                    Err(reason) => return Err(FaultError::NotExclusive { page, reason }),
                }
            }
            Ok(rest)
        };
        let done = self.shared.change_until(deadline, kind, Some(owner), find, take);
        done.ok_or(FaultError::TimedOut { page: pages[0] })?
    }

    /// Does what [`Backend::end_exclusive`](crate::Backend::end_exclusive) says.
    pub(super) fn give_back(&self, range: PageRange, owner: Owner) {
        let held = |state: &State| -> Vec<Page> {
            let Some(space) = state.space(self.id) else { return Vec::new() };
            let entries = space.table.overlapping(range);
            let held = entries.filter(|(_, entry)| entry.holder() == Some(owner));
            held.map(|(page, _)| page).collect()
        };
        let find = |state: &State| {
            let mut concern = Concern::default();
            held(state).into_iter().for_each(|page| concern.add(self.id, page.into()));
            Found::Concern(concern)
        };
        self.shared.change(EventKind::Clear, None, find, |state, announced| {
            for page in held(state) {
                let table = state.table(self.id);
                table.change(page, announced, |entry| entry.sight = Sight::Visible);
            }
        });
    }
}

impl State {
    fn is_held(&self, space: SpaceId, page: Page, owner: Owner) -> bool {
        self.entry(space, page).is_some_and(|(_, entry)| entry.holder() == Some(owner))
    }

    /// Returns the entry at `page` if it can be held, nothing if it is to be faulted in first,
    /// and the reason if no fault will help.
    fn holdable(&self, space: SpaceId, page: Page) -> Result<Option<Entry>, StayReason> {
        let Some((_, &entry)) = self.entry(space, page) else { return Ok(None) };
        let Target::Object { id, .. } = entry.target else { return Ok(None) };
        let object = self.object(id);
        if !object.is_anonymous() {
            let private = self.vma(space, page).is_some_and(Vma::is_private);
            return if private { Ok(None) } else { Err(StayReason::FileBacked) };
        }
        if self.is_pinned(object) {
            return Err(StayReason::Pinned);
        }
        let usable = entry.sight == Sight::Visible
            && entry.writable
            && object.frame().is_some()
            && !object.is_shared();
        Ok(usable.then_some(entry))
    }
}
