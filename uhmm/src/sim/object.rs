//! Pages as objects, and where the one copy of each is.

use std::collections::BTreeSet;

use crate::address_space::SpaceId;
use crate::entry::Frame;
use crate::page::{Order, Page};
use crate::pagemap::DeviceBlock;

/// The number of an object, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ObjectId(pub(super) u64);

/// The number of a file, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileId(pub(super) u64);

/// The number of an isolation, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct IsolationId(pub(super) u64);

/// A page, or a large page: contents, and who has them mapped.
#[derive(Debug)]
pub(super) struct PageObject {
    pub(super) order: Order,
    /// The file it is page so-and-so of; `None` for anonymous memory.
    pub(super) file: Option<(FileId, u64)>,
    pub(super) location: Location,
    /// Whether a page of a file was stored to since it was written back, as far as no entry notes
    /// it: by a system call, or through an entry that is no more.
    pub(super) dirty: bool,
    /// The entries that lead to it, by where they begin: the reverse map.
    pub(super) mappings: BTreeSet<(SpaceId, Page)>,
}

/// Where an object's contents are. There is no second place to disagree with it.
#[derive(Debug)]
pub(super) enum Location {
    /// In system memory.
    System(Frame),
    /// In device memory.
    Device(DeviceBlock),
    /// In a swap slot; `None` is zeroes.
    Swap(Option<Box<[u8]>>),
    /// Wherever the isolation has them.
    Transit(IsolationId),
}

impl PageObject {
    pub(super) fn anonymous(order: Order, location: Location) -> PageObject {
        PageObject { order, file: None, location, dirty: false, mappings: BTreeSet::new() }
    }

    /// Returns its frame, if it is in system memory.
    pub(super) fn frame(&self) -> Option<Frame> {
        match self.location {
            Location::System(frame) => Some(frame),
            _ => None,
        }
    }

    pub(super) fn is_anonymous(&self) -> bool {
        self.file.is_none()
    }

    /// Tells whether more than one entry leads to it, so that none may store to it.
    pub(super) fn is_shared(&self) -> bool {
        self.mappings.len() > 1
    }
}
