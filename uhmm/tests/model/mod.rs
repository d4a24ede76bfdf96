//! The sequential model of invariant 5, *Whole*: what every page holds and who may do what with it,
//! one operation after the other.
//!
//! The model knows the values that each address space sees and the answers that each operation must
//! give, exactly. Where a page may be is in [`places`]: it follows from where the page was seen
//! before the operation, and is a set of places where the layer is free to choose. A [`Session`]
//! does operations in a world and in the model at once, and compares them after each.

#![allow(dead_code, reason = "each test file uses a part of this")]

pub(crate) mod device;
pub(crate) mod places;
pub(crate) mod session;
pub(crate) mod world;

use std::collections::{BTreeMap, BTreeSet};

use uhmm::Access;
use uhmm::operations::{
    Advice, Answer, DeviceName, Memory, Operation, Pages, Refusal, SpaceName, Word,
};

/// The offsets of the words of a page that the model follows: one at each end, so that a page that
/// was copied in part is found out.
pub(crate) const OFFSETS: [u16; 2] = [0, 0xff8];

/// The values of those words.
pub(crate) type Words = [u64; 2];

/// What an address space has at one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    #[default]
    Hole,
    Mapped {
        access: Access,
        content: Content,
        /// Whether something may have taken away the right to store to the page where it is, while
        /// the mapping gives it: after that a store may move the page.
        guarded: bool,
    },
}

/// What holds the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Content {
    /// The address space alone.
    Private(Words),
    /// Shared memory: which, and which page of it.
    Shared(usize, usize),
}

/// What each address space holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Model {
    pub(crate) arena: u64,
    /// The devices, each with its pages.
    pub(crate) devices: Vec<(DeviceName, u64)>,
    pub(crate) spaces: BTreeMap<SpaceName, Vec<Slot>>,
    shared: Vec<Vec<Words>>,
    /// The mirrors that were ended: every other device mirrors every space.
    detached: BTreeSet<(SpaceName, DeviceName)>,
    /// Whether something may have been swapped out: then a page with contents may be nowhere.
    pub(crate) swapped: bool,
    /// Whether equal pages may have been merged: then any page may be shared.
    pub(crate) merged: bool,
}

impl Slot {
    pub(crate) fn access(self) -> Access {
        match self {
            Slot::Hole => Access::None,
            Slot::Mapped { access, .. } => access,
        }
    }

    pub(crate) fn is_shared_memory(self) -> bool {
        matches!(self, Slot::Mapped { content: Content::Shared(..), .. })
    }

    pub(crate) fn is_guarded(self) -> bool {
        matches!(self, Slot::Mapped { guarded: true, .. })
    }

    fn guard(&mut self, guard: bool) {
        if let Slot::Mapped { guarded, .. } = self {
            *guarded = guard;
        }
    }

    fn check(self, wanted: Access) -> Result<(), Refusal> {
        match self {
            Slot::Hole => Err(Refusal::Hole),
            Slot::Mapped { access, .. } if access < wanted.min(Access::Write) => {
                Err(Refusal::Denied)
            }
            Slot::Mapped { content: Content::Shared(..), .. } if wanted == Access::Atomic => {
                Err(Refusal::NotExclusive)
            }
            Slot::Mapped { .. } => Ok(()),
        }
    }
}

impl Model {
    pub(crate) fn new(arena: u64, devices: &[(DeviceName, u64)]) -> Model {
        Model { arena, devices: devices.to_vec(), ..Model::default() }
    }

    /// Does an operation, and returns what it must answer. `Where` is beyond it.
    pub(crate) fn perform(&mut self, operation: Operation) -> Answer {
        match self.try_perform(operation) {
            Ok(answer) => answer,
            Err(refusal) => Answer::Refused(refusal),
        }
    }

    fn try_perform(&mut self, operation: Operation) -> Result<Answer, Refusal> {
        use Operation::*;
        if let DeviceRead { device, space, .. }
        | DeviceWrite { device, space, .. }
        | DeviceAdd { device, space, .. }
        | DeviceFault { device, space, .. }
        | Exclusive { device, space, .. }
        | Detach { device, space } = operation
            && !self.is_attached(device, space)
        {
            return Err(Refusal::Ended);
        }
        match operation {
            Spawn { space } => {
                self.detached.retain(|&(of, _)| of != space);
                self.spaces.insert(space, vec![Slot::Hole; self.arena as usize]);
            }
            Fork { space, child } => self.fork(space, child)?,
            Exit { space } => {
                self.spaces.remove(&space).ok_or(Refusal::Ended)?;
            }
            Map { space, pages, memory, access } => self.map(space, pages, memory, access)?,
            Unmap { space, pages } => self.slots(space, pages)?.fill(Slot::Hole),
            Protect { space, pages, access } => {
                for slot in self.slots(space, pages)? {
                    if let Slot::Mapped { access: of, guarded, .. } = slot {
                        *guarded |= access < Access::Write;
                        *of = access;
                    }
                }
            }
            Remap { space, pages, to } => self.remap(space, pages, to)?,
            Discard { space, pages } => {
                for slot in self.slots(space, pages)? {
                    if let Slot::Mapped { access, content, guarded } = slot
                        && let Content::Private(words) = content
                    {
                        (*words, *guarded) = (Words::default(), *access < Access::Write);
                    }
                }
            }
            Advise { advice, space, .. } => {
                self.space(space)?;
                self.swapped |= advice == Advice::Reclaim;
                self.merged |= advice == Advice::Merge;
            }
            Read { space, word } | DeviceRead { space, word, .. } => {
                return self.load(space, word).map(Answer::Value);
            }
            Write { space, word, value } | DeviceWrite { space, word, value, .. } => {
                self.update(space, word, Access::Write, |_| value)?;
            }
            Add { space, word, value } => {
                let add = |old: u64| old.wrapping_add(value);
                return self.update(space, word, Access::Write, add).map(Answer::Value);
            }
            DeviceAdd { space, word, value, .. } => {
                let add = |old: u64| old.wrapping_add(value);
                return self.update(space, word, Access::Atomic, add).map(Answer::Value);
            }
            DeviceFault { space, page, access, .. } => {
                self.want(space, Pages::new(page, 1), access)?;
            }
            Exclusive { space, pages, .. } => self.want(space, pages, Access::Atomic)?,
            Migrate { space, .. } | Home { space, .. } | Release { space, .. } => {
                self.space(space)?;
            }
            Attach { device, space } => {
                self.space(space)?;
                self.detached.remove(&(space, device));
            }
            Detach { device, space } => _ = self.detached.insert((space, device)),
            Evict { .. } | Fail { .. } | Succeed => {}
            operation => panic!("the model does not know of `{operation}`"),
        }
        Ok(Answer::Done)
    }

    fn fork(&mut self, space: SpaceName, child: SpaceName) -> Result<(), Refusal> {
        let slots = self.spaces.get_mut(&space).ok_or(Refusal::Ended)?;
        slots.iter_mut().for_each(|slot| slot.guard(true));
        let copy = slots.clone();
        self.detached.retain(|&(of, _)| of != child);
        self.spaces.insert(child, copy);
        Ok(())
    }

    fn map(
        &mut self,
        space: SpaceName,
        pages: Pages,
        memory: Memory,
        access: Access,
    ) -> Result<(), Refusal> {
        let object = self.shared.len();
        let guarded = access < Access::Write;
        let content = |index: usize| match memory {
            Memory::Anonymous | Memory::Huge => Content::Private(Words::default()),
            Memory::Shared => Content::Shared(object, index),
            memory => panic!("the model does not know of `{memory}`"),
        };
        for (index, slot) in self.slots(space, pages)?.iter_mut().enumerate() {
            *slot = Slot::Mapped { access, content: content(index), guarded };
        }
        if memory == Memory::Shared {
            self.shared.push(vec![Words::default(); pages.count as usize]);
        }
        Ok(())
    }

    fn remap(&mut self, space: SpaceName, pages: Pages, to: u64) -> Result<(), Refusal> {
        let moved = self.mapped(space, pages)?.to_vec();
        self.slots(space, pages)?.fill(Slot::Hole);
        self.slots(space, Pages::new(to, pages.count))?.copy_from_slice(&moved);
        Ok(())
    }

    /// Checks that a device could have `wanted` at all pages, and notes that it does.
    fn want(&mut self, space: SpaceName, pages: Pages, wanted: Access) -> Result<(), Refusal> {
        let slots = self.slots(space, pages)?;
        // Pages are served in blocks of 2 MiB. In each it is found out first whether the mappings
        // allow it, for all pages.
        let mut rest = &slots[..];
        let mut block = (512 - pages.first as usize % 512).min(rest.len());
        while !rest.is_empty() {
            let (now, later) = rest.split_at(block);
            now.iter().try_for_each(|slot| slot.check(wanted.min(Access::Write)))?;
            now.iter().try_for_each(|slot| slot.check(wanted))?;
            (rest, block) = (later, later.len().min(512));
        }
        if wanted >= Access::Write {
            slots.iter_mut().for_each(|slot| slot.guard(false));
        }
        Ok(())
    }

    fn load(&self, space: SpaceName, word: Word) -> Result<u64, Refusal> {
        let slot = self.space(space)?[word.page as usize];
        slot.check(Access::Read)?;
        Ok(self.words(slot)[index_of(word.offset)])
    }

    fn update(
        &mut self,
        space: SpaceName,
        word: Word,
        access: Access,
        update: impl FnOnce(u64) -> u64,
    ) -> Result<u64, Refusal> {
        let slots = self.spaces.get_mut(&space).ok_or(Refusal::Ended)?;
        let slot = &mut slots[word.page as usize];
        slot.check(access)?;
        slot.guard(false);
        let words = match slot {
            Slot::Mapped { content: Content::Private(words), .. } => words,
            Slot::Mapped { content: Content::Shared(object, index), .. } => {
                &mut self.shared[*object][*index]
            }
            Slot::Hole => unreachable!("a hole gives no access"),
        };
        let value = &mut words[index_of(word.offset)];
        let old = *value;
        *value = update(old);
        Ok(old)
    }

    /// Returns the values that a slot shows.
    pub(crate) fn words(&self, slot: Slot) -> Words {
        match slot {
            Slot::Hole => Words::default(),
            Slot::Mapped { content: Content::Private(words), .. } => words,
            Slot::Mapped { content: Content::Shared(object, index), .. } => {
                self.shared[object][index]
            }
        }
    }

    pub(crate) fn is_attached(&self, device: DeviceName, space: SpaceName) -> bool {
        self.spaces.contains_key(&space) && !self.detached.contains(&(space, device))
    }

    pub(crate) fn slot(&self, space: SpaceName, page: u64) -> Slot {
        self.spaces.get(&space).map_or(Slot::Hole, |slots| slots[page as usize])
    }

    fn space(&self, space: SpaceName) -> Result<&Vec<Slot>, Refusal> {
        self.spaces.get(&space).ok_or(Refusal::Ended)
    }

    fn slots(&mut self, space: SpaceName, pages: Pages) -> Result<&mut [Slot], Refusal> {
        let slots = self.spaces.get_mut(&space).ok_or(Refusal::Ended)?;
        Ok(&mut slots[pages.first as usize..][..pages.count as usize])
    }

    fn mapped(&mut self, space: SpaceName, pages: Pages) -> Result<&mut [Slot], Refusal> {
        let slots = self.slots(space, pages)?;
        if slots.contains(&Slot::Hole) { Err(Refusal::Hole) } else { Ok(slots) }
    }
}

fn index_of(offset: u16) -> usize {
    OFFSETS.iter().position(|&known| known == offset).expect("a word that the model follows")
}
