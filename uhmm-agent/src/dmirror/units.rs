//! The units of the device, and what the processes of a tree share of them.

/// One of the four units: `/dev/hmm_dmirror0` to `/dev/hmm_dmirror3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Unit(u8);

/// How many pages a coherent unit has: 256 MiB.
pub const COHERENT_PAGES: u64 = (256 << 20) / uhmm::PAGE_SIZE as u64;

/// A unit has no room for so many pages more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unit {} has no room for {pages} pages more", unit.number())]
pub struct NoRoom {
    /// Which.
    pub unit: Unit,
    /// How many were asked for.
    pub pages: u64,
}

/// State of the units that all processes of a tree share.
pub trait Units: Send + Sync {
    /// Takes so many pages of a unit into use, all or none.
    ///
    /// # Errors
    ///
    /// [`NoRoom`]: a coherent unit has [`COHERENT_PAGES`]. A private one takes as many as there is
    /// memory for.
    fn reserve(&self, unit: Unit, pages: u64) -> Result<(), NoRoom>;

    /// Gives back what was [reserved](Units::reserve). Waits for nobody: it is called while a page
    /// goes away.
    fn give_back(&self, unit: Unit, pages: u64);

    /// Has every process of the tree [evict](super::Mm::evict) the unit's pages, and returns when they
    /// have.
    fn release(&self, unit: Unit);
}

impl Unit {
    /// Every unit.
    pub const ALL: [Unit; 4] = [Unit(0), Unit(1), Unit(2), Unit(3)];

    /// Makes the unit of this number; `None` from 4 on.
    pub const fn new(number: u8) -> Option<Unit> {
        if number < 4 { Some(Unit(number)) } else { None }
    }

    /// Returns its number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Tells whether the CPUs reach its memory, so that pages in it stay mapped.
    pub const fn is_coherent(self) -> bool {
        self.0 >= 2
    }

    /// Returns its place in an array of all units.
    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }
}
