//! Page tables, and the one rule about them as a type.
//!
//! An entry that a device could have been told of is *visible*. Whoever changes one must show an
//! [`Announced`], which cannot be had without announcing, and whose range must hold the entry: no
//! function here hands out a visible entry otherwise (regression of CVE-2022-48991). What is not
//! there yet, or is hidden because its page is swapped out or in transit, may be filled in without:
//! nobody holds a translation of it. Allowing more than before, and noting that a page was used,
//! need none either: a device holds at most what it was told.

use std::collections::BTreeMap;
use std::sync::Arc;

use mmu_notifier::{Event, EventKind, Owner, RangeInvalidation, Subscriptions, WouldBlock};

use super::PageFlags;
use super::object::ObjectId;
use crate::address_space::SpaceId;
use crate::entry::Access;
use crate::page::{Order, Page, PageRange};

/// What is mapped at one page, or at one large page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) target: Target,
    pub(super) sight: Sight,
    /// Whether stores go through at once. Otherwise they fault, for whatever reason there is.
    pub(super) writable: bool,
    /// Whether the contents may be dropped rather than swapped out, until the next store.
    pub(super) lazy: bool,
    pub(super) flags: PageFlags,
    pub(super) order: Order,
}

/// What an entry leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The shared frame of zeroes.
    Zero,
    /// Page `index` of an object. It is 0 and the orders are equal, except where a large object was
    /// taken apart while it was in transit.
    Object { id: ObjectId, index: u64 },
}

/// Who can see an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// CPUs and devices.
    Visible,
    /// The device of this owner, alone.
    Exclusive(Owner),
    /// Nobody: the page is swapped out or in transit.
    Hidden,
}

impl Entry {
    /// Returns the object it leads to.
    pub(super) fn object(&self) -> Option<ObjectId> {
        match self.target {
            Target::Zero => None,
            Target::Object { id, .. } => Some(id),
        }
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.sight == Sight::Hidden
    }

    /// Returns the owner of the device that holds it exclusively.
    pub(super) fn holder(&self) -> Option<Owner> {
        match self.sight {
            Sight::Exclusive(owner) => Some(owner),
            _ => None,
        }
    }
}

/// The page table of one address space: entries by their first pages, none overlapping another.
pub(super) struct PageTable {
    space: SpaceId,
    entries: BTreeMap<Page, Entry>,
}

impl PageTable {
    pub(super) fn new(space: SpaceId) -> PageTable {
        PageTable { space, entries: BTreeMap::new() }
    }

    /// Returns the entry that maps `page`, and where it begins.
    pub(super) fn find(&self, page: Page) -> Option<(Page, &Entry)> {
        let (&first, entry) = self.entries.range(..=page).next_back()?;
        first.block(entry.order).contains(page).then_some((first, entry))
    }

    /// Returns the entries that map pages of `range`, also where they reach out of it.
    pub(super) fn overlapping(&self, range: PageRange) -> impl Iterator<Item = (Page, &Entry)> {
        let before = self.find(range.first()).map(|(first, _)| first);
        let start = before.unwrap_or(range.first());
        self.entries.range(start..=range.last()).map(|(&page, entry)| (page, entry))
    }

    /// Lists the first pages of the entries that map pages of `range`.
    pub(super) fn pages(&self, range: PageRange) -> Vec<Page> {
        self.overlapping(range).map(|(page, _)| page).collect()
    }

    /// Tells whether nothing of `range` has an entry.
    pub(super) fn is_empty_at(&self, range: PageRange) -> bool {
        self.overlapping(range).next().is_none()
    }

    /// Enters something where nothing was.
    pub(super) fn fill(&mut self, page: Page, entry: Entry) {
        let block = page.block(entry.order);
        assert_eq!(block.first(), page, "an entry of {:?} begins at its multiple", entry.order);
        assert!(self.is_empty_at(block), "{page} is filled in twice");
        self.entries.insert(page, entry);
    }

    /// Changes the entry that begins at `page`.
    ///
    /// # Panics
    ///
    /// If the entry is visible and the change of it was not announced.
    pub(super) fn change(
        &mut self,
        page: Page,
        announced: &Announced<'_>,
        f: impl FnOnce(&mut Entry),
    ) {
        self.demand(page, Some(announced));
        f(self.entries.get_mut(&page).expect("looked up just now"));
    }

    /// Removes the entry that begins at `page`.
    ///
    /// # Panics
    ///
    /// As [`change`](PageTable::change).
    pub(super) fn take(&mut self, page: Page, announced: &Announced<'_>) -> Entry {
        self.demand(page, Some(announced));
        self.entries.remove(&page).expect("looked up just now")
    }

    /// Changes an entry that nobody can see.
    pub(super) fn change_hidden(&mut self, page: Page, f: impl FnOnce(&mut Entry)) {
        self.demand(page, None);
        f(self.entries.get_mut(&page).expect("looked up just now"));
    }

    /// Removes an entry that nobody can see.
    pub(super) fn take_hidden(&mut self, page: Page) -> Entry {
        self.demand(page, None);
        self.entries.remove(&page).expect("looked up just now")
    }

    /// Cuts the large entry that begins at `page` into single ones. They lead to pages of the same
    /// object.
    pub(super) fn split(&mut self, page: Page, announced: Option<&Announced<'_>>) {
        self.demand(page, announced);
        let whole = self.entries.remove(&page).expect("looked up just now");
        for (part, index) in page.block(whole.order).iter().zip(0..) {
            let target = match whole.target {
                Target::Zero => Target::Zero,
                Target::Object { id, index: first } => Target::Object { id, index: first + index },
            };
            self.entries.insert(part, Entry { target, order: Order::PAGE, ..whole });
        }
    }

    /// Notes an access, and lets stores through from now on if it is one. The entry must be one
    /// that this page may be written through: what devices were told of it stays true.
    pub(super) fn touch(&mut self, page: Page, access: Access) {
        let entry = self.entries.get_mut(&page).expect("only an entry can be touched");
        entry.flags.young = true;
        if access >= Access::Write {
            entry.writable = true;
            entry.lazy = false;
            entry.flags.dirty = true;
            entry.flags.soft_dirty = true;
            entry.flags.write_protected = false;
        }
    }

    fn demand(&self, page: Page, announced: Option<&Announced<'_>>) {
        let entry = self.entries.get(&page).unwrap_or_else(|| panic!("nothing begins at {page}"));
        if entry.is_hidden() {
            return;
        }
        let covered = announced
            .is_some_and(|some| some.covers(self.space, page.block(entry.order), entry.holder()));
        assert!(
            covered,
            "the entry at {page} of {:?} is changed outside an announcement that covers it: \
             add it to what the change finds before it announces",
            self.space
        );
    }
}

/// The ranges of address spaces that a change is about.
#[derive(Clone, Debug, Default)]
pub(super) struct Concern(BTreeMap<SpaceId, Vec<PageRange>>);

impl Concern {
    pub(super) fn new(space: SpaceId, range: PageRange) -> Concern {
        let mut concern = Concern::default();
        concern.add(space, range);
        concern
    }

    pub(super) fn add(&mut self, space: SpaceId, range: PageRange) {
        self.0.entry(space).or_default().push(range);
    }

    /// Adds what `other` is about.
    pub(super) fn join(&mut self, other: Concern) {
        for (space, range) in other.runs() {
            self.add(space, range);
        }
    }

    /// Returns the ranges, as few as hold the same pages.
    pub(super) fn runs(mut self) -> Vec<(SpaceId, PageRange)> {
        let mut runs = Vec::new();
        for (space, ranges) in &mut self.0 {
            ranges.sort_by_key(|range| range.first());
            let mut run: Option<PageRange> = None;
            for &range in &*ranges {
                run = match run {
                    Some(run) => match join(run, range) {
                        Some(longer) => Some(longer),
                        None => {
                            runs.push((*space, run));
                            Some(range)
                        }
                    },
                    None => Some(range),
                };
            }
            runs.extend(run.map(|run| (*space, run)));
        }
        runs
    }
}

/// Joins two ranges, the second not before the first, that touch or overlap.
fn join(run: PageRange, range: PageRange) -> Option<PageRange> {
    let touches = run.overlaps(range) || run.last().checked_add(1) == Some(range.first());
    if !touches {
        return None;
    }
    PageRange::from_bounds(run.first(), run.last().max(range.last()))
}

/// Where a change is announced: one range of one address space.
pub(super) type Place = (SpaceId, Arc<Subscriptions>, PageRange);

/// What is announced to be changing, as long as this exists.
pub(super) struct Announced<'a> {
    ranges: Vec<(SpaceId, PageRange, RangeInvalidation<'a>)>,
}

impl<'a> Announced<'a> {
    /// Announces, waits until every device has stopped, and returns the proof. Must be called with
    /// no lock held.
    pub(super) fn announce(
        places: &'a [Place],
        kind: EventKind,
        owner: Option<Owner>,
    ) -> Announced<'a> {
        let announce = |(space, notifiers, range): &'a Place| {
            let event = Event::new(kind, range.va_range());
            let event = owner.map_or(event, |owner| event.owned_by(owner));
            (*space, *range, notifiers.invalidate_range_start(event))
        };
        Announced { ranges: places.iter().map(announce).collect() }
    }

    /// Announces without sleeping, or not at all.
    pub(super) fn try_announce(
        places: &'a [Place],
        kind: EventKind,
    ) -> Result<Announced<'a>, WouldBlock> {
        let announce = |(space, notifiers, range): &'a Place| {
            let event = Event::new(kind, range.va_range());
            Ok((*space, *range, notifiers.try_invalidate_range_start(event)?))
        };
        Ok(Announced { ranges: places.iter().map(announce).collect::<Result<_, _>>()? })
    }

    /// Tells whether a change of `range` was announced, to `holder` as well as to all others.
    pub(super) fn covers(&self, space: SpaceId, range: PageRange, holder: Option<Owner>) -> bool {
        self.ranges.iter().any(|(of, covered, announcement)| {
            let deaf = announcement.event().owner();
            let heard = holder.is_none() || deaf != holder;
            *of == space && covered.covers(range) && heard
        })
    }

    /// Tells whether all of `concern` was announced.
    pub(super) fn covers_all(&self, concern: Concern) -> bool {
        concern.runs().into_iter().all(|(space, range)| self.covers(space, range, None))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const PAGE: Page = Page::containing(0x5000);

    fn table(sight: Sight) -> (SpaceId, PageTable) {
        let space = SpaceId::new();
        let mut table = PageTable::new(space);
        table.fill(PAGE, Entry { sight, ..Entry::visible(Target::Zero, Order::PAGE) });
        (space, table)
    }

    fn place(space: SpaceId, range: PageRange) -> [Place; 1] {
        [(space, Subscriptions::new(), range)]
    }

    #[test]
    fn a_change_within_its_announcement_is_made() {
        let (space, mut table) = table(Sight::Visible);
        let places = place(space, PAGE.into());
        let announced = Announced::announce(&places, EventKind::Clear, None);
        table.change(PAGE, &announced, |entry| entry.writable = true);
        assert!(table.take(PAGE, &announced).writable);
    }

    #[test]
    #[should_panic(expected = "the entry at 0x5000")]
    fn a_change_outside_the_announced_range_names_the_page() {
        let (space, mut table) = table(Sight::Visible);
        let beside = Page::containing(0x6000);
        let places = place(space, beside.into());
        let announced = Announced::announce(&places, EventKind::Clear, None);
        table.take(PAGE, &announced);
    }

    #[test]
    #[should_panic(expected = "is changed outside an announcement that covers it")]
    fn an_announcement_to_another_address_space_does_not_do() {
        let (_, mut table) = table(Sight::Visible);
        let places = place(SpaceId::new(), PageRange::ALL);
        let announced = Announced::announce(&places, EventKind::Clear, None);
        table.change(PAGE, &announced, |_| ());
    }

    #[test]
    #[should_panic(expected = "is changed outside an announcement that covers it")]
    fn an_announcement_that_the_holder_does_not_hear_does_not_do() {
        let owner = Owner::new();
        let (space, mut table) = table(Sight::Exclusive(owner));
        let places = place(space, PAGE.into());
        let announced = Announced::announce(&places, EventKind::Exclusive, Some(owner));
        table.change(PAGE, &announced, |_| ());
    }

    #[test]
    #[should_panic(expected = "is changed outside an announcement that covers it")]
    fn what_can_be_seen_is_not_taken_for_hidden() {
        let (_, mut table) = table(Sight::Visible);
        table.change_hidden(PAGE, |_| ());
    }

    #[test]
    fn what_nobody_can_see_is_changed_without_an_announcement() {
        let (_, mut table) = table(Sight::Hidden);
        table.change_hidden(PAGE, |entry| entry.sight = Sight::Visible);
        assert_eq!(table.find(PAGE).unwrap().1.sight, Sight::Visible);
    }

    #[test]
    fn ranges_that_touch_are_announced_as_one() {
        let (space, other) = (SpaceId::new(), SpaceId::new());
        let range = |first, pages| PageRange::from_pages(Page::new(first).unwrap(), pages).unwrap();
        let mut concern = Concern::default();
        for (of, piece) in [
            (space, range(4, 2)),
            (other, range(3, 1)),
            (space, range(2, 2)),
            (space, range(3, 1)),
            (space, range(9, 1)),
        ] {
            concern.add(of, piece);
        }
        let runs = [(space, range(2, 4)), (space, range(9, 1)), (other, range(3, 1))];
        assert_eq!(concern.runs(), runs);
    }
}
