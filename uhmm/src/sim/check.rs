//! Whole: what must hold of a machine whenever its lock is free.

use std::collections::{BTreeMap, BTreeSet};

use super::object::{Location, ObjectId, PageObject};
use super::page_table::{Entry, Sight, Target};
use super::ram::Holder;
use super::state::State;
use crate::address_space::SpaceId;
use crate::backend::SystemMemory;
use crate::entry::{Access, Frame};
use crate::page::{Order, Page, PageRange};

impl State {
    /// Says what does not hold, if anything.
    pub(super) fn check(&self, memory: &dyn SystemMemory) -> Result<(), String> {
        let mut found: BTreeMap<ObjectId, BTreeSet<(SpaceId, Page)>> = BTreeMap::new();
        for (&space, state) in &self.spaces {
            for (page, entry) in state.table.overlapping(PageRange::ALL) {
                self.check_entry(space, page, entry)?;
                if let Some(id) = entry.object() {
                    found.entry(id).or_default().insert((space, page));
                }
            }
        }
        let (mut owners, mut of_devices) = (BTreeMap::new(), BTreeMap::new());
        for (&id, object) in &self.objects {
            let entries = found.remove(&id).unwrap_or_default();
            if entries != object.mappings {
                return Err(format!(
                    "the reverse map of {id:?} says {:?}, and the page tables {entries:?}",
                    object.mappings
                ));
            }
            self.check_object(id, object)?;
            let (frame, owners) = match &object.location {
                Location::System(frame) => (Some(*frame), &mut owners),
                Location::Device(block) => (block.in_place(memory), &mut of_devices),
                Location::Swap(_) | Location::Transit(_) => continue,
            };
            for frame in frame.iter().flat_map(|&Frame(first)| first..first + object.order.pages())
            {
                if let Some(other) = owners.insert(frame, format!("{id:?}")) {
                    return Err(format!("frame {frame} belongs to {other} and to {id:?}"));
                }
            }
        }
        if let Some((id, entries)) = found.first_key_value() {
            return Err(format!("{entries:?} lead to {id:?}, which is no more"));
        }
        self.check_frames(owners, of_devices)
    }

    fn check_entry(&self, space: SpaceId, page: Page, entry: &Entry) -> Result<(), String> {
        let at = format!("the entry at {page} of {space:?}");
        let Some(vma) = self.vma(space, page) else {
            return Err(format!("{at} is in no mapping"));
        };
        if !vma.range.covers(page.block(entry.order)) {
            return Err(format!("{at} reaches out of its mapping {}", vma.range));
        }
        if entry.writable && vma.rights < Access::Write {
            return Err(format!("{at} lets stores through, and its mapping does not"));
        }
        let Target::Object { id, index } = entry.target else {
            let fits = !entry.writable && entry.sight == Sight::Visible;
            return if fits { Ok(()) } else { Err(format!("{at} leads to the zeroes: {entry:?}")) };
        };
        let Some(object) = self.objects.get(&id) else { return Ok(()) };
        let hidden = matches!(object.location, Location::Swap(_) | Location::Transit(_));
        if hidden != entry.is_hidden() {
            return Err(format!(
                "{at} is {:?}, and its page is {:?}",
                entry.sight, object.location
            ));
        }
        let in_transit = matches!(object.location, Location::Transit(_));
        if (index != 0 || entry.order != object.order) && !in_transit {
            return Err(format!("{at} leads to a part of {id:?}, which is not in transit"));
        }
        // The parts of one large page that was taken apart in transit are no sharers of it.
        let shared = object.mappings.iter().any(|&(other, at)| {
            let part = self.entry(other, at).map(|(_, entry)| entry.target);
            (other, at) != (space, page) && part == Some(entry.target)
        });
        if entry.writable && shared && vma.is_private() {
            return Err(format!("{at} lets stores through to {id:?}, which others share"));
        }
        if entry.writable && !object.is_anonymous() && vma.is_private() {
            return Err(format!("{at} of a private mapping lets stores through to a file"));
        }
        let plain = object.is_anonymous() && !object.is_shared() && object.order == Order::PAGE;
        if entry.holder().is_some() && !(plain && object.frame().is_some()) {
            return Err(format!("{at} is held exclusively, and its page cannot be"));
        }
        Ok(())
    }

    fn check_object(&self, id: ObjectId, object: &PageObject) -> Result<(), String> {
        let cached = object.file.is_some_and(|(file, index)| {
            self.files.get(&file).is_some_and(|file| file.pages.get(&index) == Some(&id))
        });
        if object.file.is_some() && !cached {
            return Err(format!("{id:?} is a page of a file that does not have it"));
        }
        let in_transit = matches!(object.location, Location::Transit(_));
        if object.mappings.is_empty() && !cached && !in_transit {
            return Err(format!("{id:?} is leaked: nobody has it mapped"));
        }
        match &object.location {
            Location::Device(block) => {
                if block.order() != object.order {
                    return Err(format!("{id:?} of {:?} is in {block:?}", object.order));
                }
                if self.object_at(block.location()) != Some(id) {
                    return Err(format!("{id:?} is in {block:?}, which is not found there"));
                }
            }
            Location::System(_) | Location::Swap(_) => {}
            Location::Transit(isolation) => {
                if !self.isolations.contains_key(isolation) {
                    return Err(format!("{id:?} is in transit for ever: {isolation:?} is over"));
                }
            }
        }
        Ok(())
    }

    /// Checks that each frame has just one of those who can have one. `owners` are the pages in
    /// system memory, and `of_devices` those on devices whose memory is system memory.
    fn check_frames(
        &self,
        mut owners: BTreeMap<u64, String>,
        mut of_devices: BTreeMap<u64, String>,
    ) -> Result<(), String> {
        for (&Frame(frame), ()) in &self.orphans {
            if let Some(other) = owners.insert(frame, String::from("a pin alone")) {
                return Err(format!("frame {frame} belongs to a pin alone and to {other}"));
            }
        }
        let mut in_transit_for = BTreeMap::new();
        for (id, isolation) in &self.isolations {
            for &frame in &isolation.frames {
                if let Some(other) = in_transit_for.insert(frame, id) {
                    return Err(format!("frame {frame} belongs to {other:?} and to {id:?}"));
                }
            }
        }
        for (frame, holder) in self.ram.list() {
            match (owners.remove(&frame), of_devices.remove(&frame), holder) {
                (Some(_), None, Holder::Page) | (None, Some(_), Holder::Block) => {}
                (None, None, Holder::Isolation | Holder::Adopted)
                    if in_transit_for.remove(&frame).is_some() => {}
                // Of a page that is on its way, or about to be freed: the device's accounts know.
                (None, None, Holder::Block | Holder::Left) => {}
                (None, None, _) => {
                    return Err(format!("frame {frame} is leaked: no page is in it"));
                }
                (Some(owner), ..) | (None, Some(owner), _) => {
                    return Err(format!("frame {frame} of {owner} counts as that of a {holder:?}"));
                }
            }
        }
        owners.append(&mut of_devices);
        if let Some((frame, id)) = in_transit_for.first_key_value() {
            return Err(format!("frame {frame} of {id:?} is not in transit"));
        }
        match owners.first_key_value() {
            Some((frame, owner)) => Err(format!("frame {frame} of {owner} is free")),
            None => Ok(()),
        }
    }
}
