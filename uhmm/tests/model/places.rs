//! Where pages may be after an operation, given where they were before it.
//!
//! A page that an operation is not about stays where it is, unless it is a page of memory that
//! another address has too, or gives way on a full device.

use uhmm::Access;
use uhmm::operations::{Advice, DeviceName, Memory, Operation, Pages, SpaceName};

use super::world::{Seen, Sight};
use super::{Model, Slot};

/// A set of places, frames aside.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Places(u32);

const NO_PLACES: Places = Places(0);
const HOLE: Places = Places(1);
const EMPTY: Places = Places(2);
const SYSTEM: Places = Places(4);
const ZEROES: Places = Places(8);

fn held(device: DeviceName) -> Places {
    Places(0x10 << device.0)
}

fn on(device: DeviceName) -> Places {
    Places(0x10_0000 << device.0)
}

fn place_of(seen: Seen) -> Places {
    match seen {
        Seen::Hole => HOLE,
        Seen::Empty => EMPTY,
        Seen::Zeroes => ZEROES,
        Seen::System(_) => SYSTEM,
        Seen::Held(_, device) => held(device),
        Seen::Device(device, _) => on(device),
    }
}

impl std::ops::BitOr for Places {
    type Output = Places;

    fn bitor(self, other: Places) -> Places {
        Places(self.0 | other.0)
    }
}

impl Places {
    fn has(self, other: Places) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::fmt::Display for Places {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = [(HOLE, "hole"), (EMPTY, "empty"), (SYSTEM, "system"), (ZEROES, "zeroes")];
        for (place, name) in named {
            if self.has(place) {
                write!(f, "{name} ")?;
            }
        }
        for device in (0..8).map(DeviceName) {
            if self.has(held(device)) {
                write!(f, "held-by-{device} ")?;
            }
            if self.has(on(device)) {
                write!(f, "on-{device} ")?;
            }
        }
        Ok(())
    }
}

/// An operation, and what was there before it.
pub(crate) struct Transition<'a> {
    pub(crate) operation: Operation,
    /// What it answered: whether it was done.
    pub(crate) done: bool,
    pub(crate) model: &'a Model,
    pub(crate) before: &'a Sight,
    pub(crate) after: &'a Sight,
}

/// A page of an address space.
type Key = (SpaceName, u64);

impl Transition<'_> {
    /// Checks every page.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (&space, seen) in self.after {
            for (page, &now) in (0..).zip(seen) {
                let allowed = self.allowed((space, page));
                if !allowed.has(place_of(now)) {
                    return Err(format!(
                        "page {page} of {space} is {now:?}, after {:?}: allowed are {allowed}",
                        self.was((space, page)),
                    ));
                }
            }
        }
        self.check_eviction()
    }

    fn check_eviction(&self) -> Result<(), String> {
        let Operation::Evict { device, count } = self.operation else { return Ok(()) };
        let (before, after) = (on_device(self.before, device), on_device(self.after, device));
        match before - after >= count.min(before) {
            true => Ok(()),
            false => Err(format!("{before} pages were on {device}, and {after} are")),
        }
    }

    fn allowed(&self, key: Key) -> Places {
        let origin = self.origin(key);
        let stays = place_of(self.was(origin));
        let own = match self.is_target(key) {
            true => self.target(key, stays),
            false => self.bystander(origin, stays),
        };
        own | self.coupled(origin)
    }

    /// Returns the page that `key` was before the operation.
    fn origin(&self, key: Key) -> Key {
        let (space, page) = key;
        match self.operation {
            Operation::Fork { space: parent, child } if child == space => (parent, page),
            Operation::Remap { space: of, pages, to }
                if self.done
                    && of == space
                    && Pages::new(to, pages.count).iter().contains(&page) =>
            {
                (space, pages.first + (page - to))
            }
            _ => key,
        }
    }

    fn was(&self, (space, page): Key) -> Seen {
        self.before.get(&space).map_or(Seen::Hole, |seen| seen[page as usize])
    }

    /// Tells whether the operation is about the page.
    fn is_target(&self, (space, page): Key) -> bool {
        match targets(self.operation) {
            Some((of, pages)) => of == space && pages.iter().contains(&page),
            None => matches!(self.operation, Operation::Spawn { space: of } if of == space),
        }
    }

    /// Returns where a page may be that the operation is about.
    fn target(&self, key: Key, stays: Places) -> Places {
        use Operation::*;
        let slot = self.model.slot(key.0, key.1);
        match self.operation {
            Spawn { .. } => HOLE,
            Unmap { .. } => HOLE,
            Map { memory: Memory::Anonymous | Memory::Huge, .. } => EMPTY,
            Map { .. } => EMPTY | SYSTEM,
            Discard { .. } if slot == Slot::Hole => HOLE,
            Discard { .. } if !self.done => stays | EMPTY,
            Discard { .. } if slot.is_shared_memory() => EMPTY | SYSTEM,
            Discard { .. } => EMPTY,
            Protect { .. } => stays | self.unheld(key),
            Remap { .. } if !self.done => stays,
            Remap { .. } => HOLE,
            Advise { advice, .. } => self.advised(key, advice, stays),
            Read { .. } => self.read(stays, slot, None),
            DeviceRead { device, .. } => self.read(stays, slot, Some(device)),
            Write { .. } | Add { .. } if !self.done => stays,
            Write { .. } | Add { .. } => SYSTEM,
            DeviceWrite { .. } if !self.done => stays,
            DeviceWrite { device, .. } => self.written(key, device, stays, SYSTEM),
            DeviceAdd { device, .. } | Exclusive { device, .. } if !self.done => {
                let partly = if slot == Slot::Hole { HOLE } else { SYSTEM | stays };
                // What the device held before, the failed hold has ended.
                if stays.has(held(device)) { SYSTEM | stays } else { partly }
            }
            DeviceAdd { device, .. } | Exclusive { device, .. } => {
                self.written(key, device, stays, held(device))
            }
            DeviceFault { device, access, .. } => self.faulted(key, device, access, stays),
            Migrate { device, .. } => self.migrated(key, device, stays),
            Home { .. } if self.is_on_any(stays) => SYSTEM,
            Release { device, .. } if stays == held(device) => SYSTEM,
            Detach { .. } => stays | self.unheld(key),
            _ => stays,
        }
    }

    fn read(&self, stays: Places, slot: Slot, by: Option<DeviceName>) -> Places {
        if slot.access() == Access::None || !self.done {
            return stays;
        }
        match stays {
            // Zeroes need no page of their own.
            EMPTY | ZEROES => stays | ZEROES | SYSTEM,
            stays if by.is_some_and(|device| stays == on(device) || stays == held(device)) => stays,
            _ => SYSTEM,
        }
    }

    /// Returns where a page may be that a device has stored to: `else_at`, unless it was there.
    fn written(&self, key: Key, device: DeviceName, stays: Places, else_at: Places) -> Places {
        let in_place = !self.is_shared(key) && !self.model.slot(key.0, key.1).is_guarded();
        if stays == held(device) || stays == on(device) && in_place {
            stays
        } else if stays == on(device) {
            stays | else_at
        } else {
            else_at
        }
    }

    fn migrated(&self, key: Key, device: DeviceName, stays: Places) -> Places {
        let slot = self.model.slot(key.0, key.1);
        let there = on(device);
        if slot == Slot::Hole || slot.is_shared_memory() || self.is_held(stays) {
            return stays;
        }
        if stays == there {
            return if self.has_room(device) { stays } else { stays | SYSTEM };
        }
        let must = self.has_room_at_all(device)
            && slot.access() == Access::Write
            && !self.is_shared(key)
            && !self.model.merged
            && !(self.model.swapped && stays == EMPTY);
        if must { there } else { stays | there | SYSTEM }
    }

    fn faulted(&self, key: Key, device: DeviceName, access: Access, stays: Places) -> Places {
        let slot = self.model.slot(key.0, key.1);
        if stays == held(device) {
            return stays;
        }
        let moved = self.migrated(key, device, stays);
        if !self.done {
            let tried = if slot == Slot::Hole { HOLE } else { SYSTEM | ZEROES };
            return stays | moved | tried;
        }
        let in_place = if access == Access::Atomic { held(device) } else { SYSTEM };
        let stuck = self.is_held(stays) || slot.is_shared_memory();
        let in_place = if access == Access::Read { in_place | EMPTY | ZEROES } else { in_place };
        if stuck {
            in_place
        } else if moved == on(device)
            && (access == Access::Read || !self.is_shared(key) && !slot.is_guarded())
        {
            moved
        } else {
            on(device) | in_place
        }
    }

    fn advised(&self, key: Key, advice: Advice, stays: Places) -> Places {
        let fill = match advice {
            Advice::Reclaim if !self.is_on_any(stays) && stays != HOLE => EMPTY,
            Advice::SwapIn | Advice::Collapse if stays == EMPTY => SYSTEM,
            _ => NO_PLACES,
        };
        stays | fill | self.unheld(key)
    }

    /// Returns where a page may be that the operation is not about.
    fn bystander(&self, origin: Key, stays: Places) -> Places {
        use Operation::*;
        match self.operation {
            // What is held is given back: no holder may store to a page that is now shared.
            Fork { space, .. } if space == origin.0 => {
                // Of shared memory, only the mapping is copied.
                let shared = self.model.slot(origin.0, origin.1).is_shared_memory();
                let none = if shared { EMPTY } else { NO_PLACES };
                let kept = if self.is_held(stays) { SYSTEM } else { stays | self.home_of(stays) };
                kept | none
            }
            Evict { device, .. } if stays == on(device) => stays | SYSTEM,
            Migrate { device, .. } | DeviceFault { device, .. }
                if stays == on(device) && !self.has_room(device) =>
            {
                stays | SYSTEM
            }
            Advise { advice: Advice::Merge, .. } => stays | self.unheld(origin),
            Remap { .. } => stays | self.unheld(origin),
            // Brought back from swap for another space that has it.
            _ if self.model.swapped && stays == EMPTY => stays | SYSTEM,
            _ => stays,
        }
    }

    /// Returns where a page may go because another address of it is what the operation is about.
    fn coupled(&self, origin: Key) -> Places {
        let Some((space, pages)) = targets(self.operation) else { return NO_PLACES };
        let was = self.was(origin);
        let targets = pages.iter().map(|page| (space, page));
        let shared = targets.filter(|&key| key != origin && is_same_page(was, self.was(key)));
        if shared.count() == 0 {
            return NO_PLACES;
        }
        match self.operation {
            Operation::Migrate { device, .. } | Operation::DeviceFault { device, .. } => {
                SYSTEM | on(device)
            }
            Operation::Advise { advice: Advice::Reclaim, .. } => SYSTEM | EMPTY,
            _ => SYSTEM,
        }
    }

    /// Tells whether another address has the same page of memory.
    fn is_shared(&self, key: Key) -> bool {
        let was = self.was(key);
        let all = self.before.iter().flat_map(|(&space, seen)| {
            (0..).zip(seen).map(move |(page, &seen)| ((space, page), seen))
        });
        self.model.merged
            || all.filter(|&(other, seen)| other != key && is_same_page(was, seen)).count() > 0
    }

    /// Returns where a page goes that nobody holds any more, if it was held.
    fn unheld(&self, key: Key) -> Places {
        if self.is_held(place_of(self.was(key))) { SYSTEM } else { NO_PLACES }
    }

    fn home_of(&self, stays: Places) -> Places {
        if self.is_on_any(stays) { SYSTEM } else { NO_PLACES }
    }

    fn is_held(&self, place: Places) -> bool {
        self.model.devices.iter().any(|&(device, _)| held(device) == place)
    }

    fn is_on_any(&self, place: Places) -> bool {
        self.model.devices.iter().any(|&(device, _)| on(device) == place)
    }

    /// Returns how many pages the operation may bring to the device.
    fn coming(&self, device: DeviceName) -> u64 {
        let Some((space, pages)) = targets(self.operation) else { return 0 };
        let comes = |&page: &u64| {
            let key = (space, page);
            self.model.slot(key.0, key.1) != Slot::Hole && place_of(self.was(key)) != on(device)
        };
        pages.iter().filter(comes).count() as u64
    }

    /// Tells whether there is room without an eviction.
    fn has_room(&self, device: DeviceName) -> bool {
        on_device(self.before, device) + self.coming(device) <= self.capacity(device)
    }

    /// Tells whether there is room, after an eviction if need be.
    fn has_room_at_all(&self, device: DeviceName) -> bool {
        self.coming(device) <= self.capacity(device)
    }

    fn capacity(&self, device: DeviceName) -> u64 {
        let device = self.model.devices.iter().find(|&&(name, _)| name == device);
        device.expect("a device of the model").1
    }
}

/// Returns the pages that an operation is about.
fn targets(operation: Operation) -> Option<(SpaceName, Pages)> {
    use Operation::*;
    Some(match operation {
        Map { space, pages, .. }
        | Unmap { space, pages }
        | Protect { space, pages, .. }
        | Remap { space, pages, .. }
        | Discard { space, pages }
        | Advise { space, pages, .. }
        | Migrate { space, pages, .. }
        | Home { space, pages }
        | Exclusive { space, pages, .. }
        | Release { space, pages, .. } => (space, pages),
        Read { space, word }
        | Write { space, word, .. }
        | Add { space, word, .. }
        | DeviceRead { space, word, .. }
        | DeviceWrite { space, word, .. }
        | DeviceAdd { space, word, .. } => (space, Pages::new(word.page, 1)),
        DeviceFault { space, page, .. } => (space, Pages::new(page, 1)),
        _ => return None,
    })
}

/// Tells whether two sights are of one page of memory.
fn is_same_page(one: Seen, other: Seen) -> bool {
    match (one, other) {
        (Seen::System(frame) | Seen::Held(frame, _), Seen::System(of) | Seen::Held(of, _)) => {
            frame == of
        }
        (Seen::Device(..), Seen::Device(..)) => one == other,
        _ => false,
    }
}

/// Counts the pages of a device's memory.
fn on_device(sight: &Sight, device: DeviceName) -> u64 {
    let mut frames: Vec<_> = sight
        .values()
        .flatten()
        .filter(|seen| matches!(seen, Seen::Device(of, _) if *of == device))
        .collect();
    frames.sort_unstable();
    frames.dedup();
    frames.len() as u64
}
