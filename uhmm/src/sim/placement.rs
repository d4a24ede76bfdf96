//! What an isolation holds of a page, and where the page is put at the end.

use super::object::{Location, ObjectId};
use super::page_table::{Entry, Target};
use super::state::State;
use crate::backend::{Committed, Placement, Source, SystemMemory};
use crate::entry::{Access, Frame};
use crate::page::Order;
use crate::pagemap::DeviceBlock;

/// What an isolation has of a page.
pub(super) struct Held {
    pub(super) object: ObjectId,
    pub(super) contents: Contents,
    /// Where it may come home to.
    pub(super) home: Option<Home>,
}

/// The system memory that a page may come home to.
#[derive(Clone, Copy)]
pub(super) enum Home {
    /// Allocated for it.
    New(Frame),
    /// That of the block that it is in.
    InPlace(Frame),
}

/// The one copy of an isolated page.
pub(super) enum Contents {
    /// Zeroes that nobody has written down; with whether an entry led to the shared frame of them.
    Zero(bool),
    System(Frame),
    Device(DeviceBlock),
}

/// Puts one page where it is to be, or frees it if nobody has it mapped any more.
pub(super) fn place(
    state: &mut State,
    memory: &dyn SystemMemory,
    order: Order,
    held: Held,
    placement: Placement,
) -> Committed {
    let new_home = held.new_home();
    let Held { object: id, contents, home } = held;
    let gone = state.object(id).mappings.is_empty();
    let zero = match contents {
        Contents::Zero(had_entry) => Some(had_entry),
        Contents::System(_) | Contents::Device(_) => None,
    };
    let (location, left, unused) = match (placement, home) {
        (Placement::Back, _) => (contents.location(), None, new_home),
        (Placement::Device(block), _) => {
            assert_eq!(block.order(), order, "a page is placed in a block of its own order");
            match contents {
                // The memory is the block's from here on.
                Contents::System(frame) if block.in_place(memory) == Some(frame) => {
                    state.ram.set_transit(frame, order, false);
                    (Some(Location::Device(block)), None, new_home)
                }
                contents => (Some(Location::Device(block)), Some(contents), new_home),
            }
        }
        (Placement::Home, Some(Home::New(home))) => {
            (Some(Location::System(home)), Some(contents), None)
        }
        (Placement::Home, Some(Home::InPlace(frame))) => {
            let home = state.ram.take_over(frame, order);
            (Some(Location::System(home)), Some(contents), None)
        }
        (Placement::Home, None) => panic!("no home was allocated for the page at this index"),
    };
    let left = left.and_then(Contents::location);
    for frame in [&location, &left].into_iter().flatten().filter_map(Location::frame) {
        state.ram.set_transit(frame, order, false);
    }
    if let Some(home) = unused {
        state.ram.set_transit(home, order, false);
        state.free_frames(home, order);
    }
    if let Some(left) = left {
        state.free_location(left, order);
    }
    match location {
        Some(location) if gone => state.free_location(location, order),
        Some(location) => {
            state.set_location(id, location);
            if zero.is_some() {
                state.open_to_stores(id);
            }
            state.arrive(id);
        }
        // A page without contents goes back to having never been touched.
        None => state.forget_zero(id, zero == Some(true)),
    }
    if gone {
        // Freed with the isolation itself, which nothing else refers to.
        state.objects.remove(&id);
        return Committed::Gone;
    }
    Committed::Placed
}

impl State {
    /// Lets the entries of an object be seen whose contents have come to rest. A large page that is
    /// not mapped whole any more everywhere is taken apart first.
    fn arrive(&mut self, id: ObjectId) {
        let object = self.object(id);
        let order = object.order;
        let whole = object.mappings.iter().all(|&(space, page)| {
            self.entry(space, page).is_some_and(|(_, entry)| entry.order == order)
        });
        if whole {
            self.show(id);
            return;
        }
        for part in self.split_object(id, None) {
            if self.objects.contains_key(&part) {
                self.show(part);
            }
        }
    }

    /// Lets stores through to zeroes that have become a page, wherever that is allowed now: it may
    /// be stored to at once, and counts as if it was.
    fn open_to_stores(&mut self, id: ObjectId) {
        for (space, page) in self.object(id).mappings.clone() {
            let rights = self.vma(space, page).map_or(Access::None, |vma| vma.rights);
            self.table(space).change_hidden(page, |entry| {
                if rights >= Access::Write && !entry.flags.write_protected {
                    entry.writable = true;
                    entry.flags.dirty = true;
                    entry.flags.soft_dirty = true;
                }
            });
        }
    }

    /// Undoes the taking of zeroes: the places are untouched again, or lead to the shared frame if
    /// they did. What was changed of their entries meanwhile stays so.
    fn forget_zero(&mut self, id: ObjectId, had_entry: bool) {
        for (space, page) in std::mem::take(&mut self.object_mut(id).mappings) {
            let table = self.table(space);
            if !had_entry {
                table.take_hidden(page);
                continue;
            }
            table.change_hidden(page, |entry| {
                *entry = Entry { flags: entry.flags, ..Entry::visible(Target::Zero, Order::PAGE) };
            });
        }
        self.objects.remove(&id);
    }
}

impl Held {
    /// Returns what was allocated for it to come home to.
    pub(super) fn new_home(&self) -> Option<Frame> {
        match self.home {
            Some(Home::New(frame)) => Some(frame),
            Some(Home::InPlace(_)) | None => None,
        }
    }
}

impl Contents {
    fn location(self) -> Option<Location> {
        match self {
            Contents::Zero(_) => None,
            Contents::System(frame) => Some(Location::System(frame)),
            Contents::Device(block) => Some(Location::Device(block)),
        }
    }

    pub(super) fn split(self, order: Order) -> Vec<(Contents, Source)> {
        let pages = 0..order.pages();
        match self {
            Contents::Zero(_) => pages.map(|_| (Contents::Zero(false), Source::Zero)).collect(),
            Contents::System(Frame(first)) => pages
                .map(|index| Frame(first + index))
                .map(|frame| (Contents::System(frame), Source::System(frame)))
                .collect(),
            Contents::Device(block) => {
                let part = |part: DeviceBlock| {
                    let source = Source::Device(part.location());
                    (Contents::Device(part), source)
                };
                block.split().into_iter().map(part).collect()
            }
        }
    }
}

impl Location {
    fn frame(&self) -> Option<Frame> {
        match self {
            Location::System(frame) => Some(*frame),
            _ => None,
        }
    }
}
