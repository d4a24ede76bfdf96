//! How full the units are, in memory that the broker and all agents share.
//!
//! Each agent counts what it uses in a slot of its own, and what a unit uses is the sum. So nothing has
//! to be put right when a process dies in the middle: the broker empties its slot. Two agents that take
//! the last pages at the same moment may both be told that there is no room; never more is taken than
//! there is. Since each adds to its own slot before it looks at the others', one of two sees the other
//! (both steps are `SeqCst`).

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::call;
use crate::dmirror::{COHERENT_PAGES, NoRoom, Unit, Units};
use crate::edge::mapping::Mapping;

/// How many address spaces can have a unit open at a time.
pub(super) const SLOTS: usize = 1024;

/// The pages in use, by slot and unit.
#[repr(C)]
pub(crate) struct Usage {
    slots: [[AtomicU64; 4]; SLOTS],
}

impl fmt::Debug for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(Unit::ALL.map(|unit| self.of(unit))).finish()
    }
}

impl Usage {
    /// How many pages of a unit are in use.
    fn of(&self, unit: Unit) -> u64 {
        let unit = usize::from(unit.number());
        let used = self.slots.iter().map(|slot| slot[unit].load(Ordering::SeqCst));
        used.fold(0, u64::saturating_add)
    }

    /// Forgets what an agent used that is no more.
    pub(super) fn empty(&self, slot: usize) {
        self.slots[slot].iter().for_each(|used| used.store(0, Ordering::SeqCst));
    }
}

/// Makes the memory.
///
/// # Errors
///
/// Those of memfd_create(2) and ftruncate(2).
pub(super) fn create() -> Result<(OwnedFd, Mapping<Usage>), Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("uhmm-dmirror", flags)?;
    rustix::fs::ftruncate(&file, Mapping::<Usage>::BYTES as u64)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let mapping = Mapping::of(file.as_fd())?;
    Ok((file, mapping))
}

/// The units as one agent sees them.
#[derive(Debug)]
pub(super) struct SharedUnits {
    usage: Arc<Mapping<Usage>>,
    slot: usize,
}

impl SharedUnits {
    /// Those of the agent in `slot`.
    ///
    /// # Errors
    ///
    /// `EPROTO` if there is no such slot.
    pub(super) fn new(usage: Arc<Mapping<Usage>>, slot: u64) -> Result<SharedUnits, Errno> {
        let slot = usize::try_from(slot).ok().filter(|&slot| slot < SLOTS).ok_or(Errno::PROTO)?;
        Ok(SharedUnits { usage, slot })
    }

    /// The slot.
    pub(super) fn slot(&self) -> u64 {
        self.slot as u64
    }

    fn used(&self, unit: Unit) -> &AtomicU64 {
        &self.usage.slots[self.slot][usize::from(unit.number())]
    }
}

impl Units for SharedUnits {
    fn reserve(&self, unit: Unit, pages: u64) -> Result<(), NoRoom> {
        if unit.is_coherent() && pages > COHERENT_PAGES {
            return Err(NoRoom { unit, pages });
        }
        let used = self.used(unit);
        used.fetch_add(pages, Ordering::SeqCst);
        if unit.is_coherent() && self.usage.of(unit) > COHERENT_PAGES {
            used.fetch_sub(pages, Ordering::SeqCst);
            return Err(NoRoom { unit, pages });
        }
        Ok(())
    }

    fn give_back(&self, unit: Unit, pages: u64) {
        self.used(unit).fetch_sub(pages, Ordering::SeqCst);
    }

    fn release(&self, unit: Unit) {
        call::release(unit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agents() -> [SharedUnits; 2] {
        let (_file, usage) = create().expect("there is room");
        let usage = Arc::new(usage);
        [3, 4].map(|slot| SharedUnits::new(Arc::clone(&usage), slot).expect("there is one"))
    }

    #[test]
    fn a_coherent_unit_has_its_pages_and_no_more() {
        let [a, b] = agents();
        let unit = Unit::ALL[2];
        assert_eq!(a.reserve(unit, COHERENT_PAGES - 1), Ok(()));
        assert_eq!(b.reserve(unit, 2), Err(NoRoom { unit, pages: 2 }));
        assert_eq!(b.reserve(unit, 1), Ok(()));
        assert!(a.reserve(unit, 1).is_err());
        assert!(a.reserve(unit, u64::MAX).is_err());
        assert_eq!(b.reserve(Unit::ALL[3], COHERENT_PAGES), Ok(()), "units are separate");
        a.give_back(unit, 5);
        assert_eq!(b.reserve(unit, 5), Ok(()));
    }

    #[test]
    fn a_private_unit_takes_all() {
        let [a, _] = agents();
        for _ in 0..3 {
            assert_eq!(a.reserve(Unit::ALL[0], COHERENT_PAGES), Ok(()));
        }
    }

    #[test]
    fn what_a_dead_agent_had_is_free_again() {
        let [a, b] = agents();
        let unit = Unit::ALL[3];
        assert_eq!(a.reserve(unit, COHERENT_PAGES), Ok(()));
        assert!(b.reserve(unit, 1).is_err());
        a.usage.empty(a.slot);
        assert_eq!(b.reserve(unit, COHERENT_PAGES), Ok(()));
    }

    #[test]
    fn no_more_is_taken_than_there_is() {
        let [a, b] = agents();
        let unit = Unit::ALL[2];
        let take = |agent: &SharedUnits| {
            (0..COHERENT_PAGES).filter(|_| agent.reserve(unit, 1).is_ok()).count() as u64
        };
        let both = std::thread::scope(|scope| {
            let threads = [&a, &b].map(|agent| scope.spawn(move || take(agent)));
            threads.into_iter().map(|thread| thread.join().expect("it does not panic")).sum()
        });
        assert!((1..=COHERENT_PAGES).contains(&both), "{both}");
        assert_eq!(a.usage.of(unit), both);
    }

    #[test]
    fn there_are_only_so_many_slots() {
        let (_file, usage) = create().expect("there is room");
        assert!(SharedUnits::new(Arc::new(usage), SLOTS as u64).is_err());
    }
}
