//! What the space knows of the process: which pages are out, what is registered, who waits.
//!
//! All of it is behind one lock, [`Space::state`](super::Space). An *extent* is a block of pages
//! that the program's page table does not have: in transit, on a device, held by one, or parked in
//! our own memory because there was no page to put it in. Extents are blocks of two to the power of
//! their order, aligned, of at most 2 MiB; they never overlap.
//!
//! # Events and the lock
//!
//! Messages are read from the userfaultfd and applied here without letting go of the lock between,
//! by whoever needs it: a server that was woken by one, or a thread to which the kernel said
//! `EAGAIN` because one is unread. So whoever holds the lock and has just been let through by the
//! kernel knows that what stands here is true of the mappings. What an event calls for besides, to
//! tell devices and to free what they may still use, is done later, without the lock
//! ([`Aftermath`]): changes are *observed* here, not announced.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use mmu_notifier::{EventKind, Owner};
use rangemap::{RangeMap, RangeSet};
use smallvec::SmallVec;
use uhmm::{DeviceBlock, DeviceLocation, Order, Page, PageRange};

use super::fork::Child;
use super::hash::NumberMap;
use super::pool::PoolBlock;
use crate::mutant::mutant;
use crate::sys::fork::Wiped;
use crate::sys::userfaultfd::{Message, Messages};

/// A block of pages that are not in the program's page table.
#[derive(Debug)]
pub(super) struct Extent {
    pub(super) order: Order,
    /// Whether it was one page to the CPUs as well.
    pub(super) huge: bool,
    pub(super) place: Place,
}

/// Where the pages of an extent are.
#[derive(Debug)]
pub(super) enum Place {
    /// An isolation has them: the part from `offset` pages on of what it knows by `token`.
    Transit { isolation: IsolationId, token: Token, offset: u64 },
    /// On a device.
    Device(DeviceBlock),
    /// In staging, where a device works on them and nobody else.
    Held { owner: Owner, block: PoolBlock },
    /// In our own memory, since there was none for the program. The next touch tries again.
    Parked(PoolBlock),
}

/// Names an isolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct IsolationId(u64);

/// Names a page, or block of pages, of an isolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Token(u64);

/// How a range is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Registered {
    /// For its events alone.
    Watched,
    /// For its missing pages, and for its events.
    Missing,
}

/// A fault of a thread that sleeps until it is woken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) page: Page,
    /// Whose it is, as the kernel numbers threads.
    pub(super) thread: u32,
    /// Whether it is a store.
    pub(super) write: bool,
    /// Since when it could not be served.
    pub(super) failing_since: Option<Instant>,
    /// Since when it waits for room.
    pub(super) held_since: Option<Instant>,
}

/// What is left to do about events once the lock is free.
#[derive(Debug, Default)]
pub(super) struct Aftermath {
    /// What changed, for the devices.
    pub(super) changed: Vec<(EventKind, PageRange)>,
    /// What nobody has mapped any more. Freed after the devices have been told.
    pub(super) doomed: Vec<Place>,
    /// Whether children were born while pages were out.
    pub(super) children: bool,
    /// What is to be reported: whoever listens may take locks, and touch pages.
    pub(super) complaints: Vec<String>,
}

/// How many complaints are kept until they are reported. Later ones are dropped.
const COMPLAINTS: usize = 16;

impl Aftermath {
    pub(super) fn is_empty(&self) -> bool {
        let nothing = self.changed.is_empty() && self.doomed.is_empty() && !self.children;
        nothing && self.complaints.is_empty()
    }

    /// Has something reported once the lock is free.
    pub(super) fn complain(&mut self, complaint: impl FnOnce() -> String) {
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(complaint());
        }
    }
}

/// An isolation under way.
#[derive(Debug)]
pub(super) struct IsolationState {
    /// The thread that began it.
    pub(super) thread: u64,
    /// Whether an event changed where its pages are mapped.
    pub(super) disturbed: bool,
    /// Whether somebody sleeps in the kernel for one of its pages.
    pub(super) awaited: bool,
}

/// A change to mappings that we make ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OfOurMaking {
    /// Pages are put aside.
    Remap { from: PageRange, to: Page },
    /// What is there is replaced by pages that come back.
    Unmap(PageRange),
}

/// How many blocks were out when the program changed their mappings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Overtaken {
    pub(crate) unmapped: Met,
    pub(crate) discarded: Met,
    pub(crate) remapped: Met,
}

/// How many of them were at a place to stay, and how many in transit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Met {
    pub(crate) out: u64,
    pub(crate) in_transit: u64,
}

impl Met {
    fn note(&mut self, extents: &[(Page, Extent)]) {
        let transit = |(_, extent): &&(Page, Extent)| matches!(extent.place, Place::Transit { .. });
        let in_transit = extents.iter().filter(transit).count() as u64;
        self.in_transit += in_transit;
        self.out += extents.len() as u64 - in_transit;
    }
}

/// What is behind the lock. See the [module](self).
pub(super) struct State {
    out: BTreeMap<Page, Extent>,
    /// Where what is in transit by each name is: how far within it, and the first page of the extent,
    /// in ascending order. Mostly one; more once something was cut.
    parts: NumberMap<Token, SmallVec<[(u64, Page); 1]>>,
    /// Where the blocks of devices are mapped.
    located: NumberMap<DeviceLocation, Page>,
    /// How many pages are out in each chunk that has any.
    counts: NumberMap<u64, u64>,
    /// Chunks that had pages out and have none any more, and may still be registered.
    pub(super) emptied: BTreeSet<u64>,
    pub(super) registered: RangeMap<u64, Registered>,
    /// What devices have mapped, and must hear of when it goes.
    pub(super) watched: RangeSet<u64>,
    /// What of it is about to be given up, unless somebody asks for it in time.
    pub(super) unwatching: RangeSet<u64>,
    /// Pages that the program is discarding, that could not be dropped by us, and that must not move
    /// before they are gone.
    pub(super) doubtful: RangeSet<u64>,
    /// Pages that no access reaches until they have come home.
    pub(super) poisoned: RangeSet<u64>,
    /// Memory that serving a fault may need, and that therefore never moves.
    pub(super) reserved: RangeSet<u64>,
    /// Our own part of that, which never changes either, so that nobody need be told of changes.
    pub(super) own: RangeSet<u64>,
    /// What may move, if not everything.
    pub(super) managed: Option<RangeSet<u64>>,
    pub(super) isolations: NumberMap<IsolationId, IsolationState>,
    /// What threads wait for: the isolations, by the waiting thread.
    pub(super) waiting: BTreeMap<u64, IsolationId>,
    /// What threads that have an isolation of their own are having faulted in by the kernel.
    pub(super) populating: BTreeMap<u64, PageRange>,
    pub(super) faults: VecDeque<Fault>,
    /// Those that are to be tried again a little later.
    pub(super) retries: Vec<Fault>,
    /// Those that wait for room.
    pub(super) deferred: Vec<Fault>,
    /// Whether growth is held, so that all memory that may move is to be registered.
    pub(super) holding: bool,
    /// Whether it was, and what is registered for it has not been given up.
    pub(super) hold_ended: bool,
    pub(super) aftermath: Aftermath,
    /// How many threads are telling devices of changes that have been made.
    pub(super) settling: u32,
    /// Children that lack pages which are still on their way to them. What they lack is out.
    pub(super) children: Vec<Child>,
    /// What has been unregistered since there may have been a fork that has not been read of.
    pub(super) released: RangeSet<u64>,
    /// Whether forks are held back.
    pub(super) armed: bool,
    /// What is kept from the children of forks that are about to happen.
    pub(super) kept_from_child: Vec<PageRange>,
    /// A descriptor to be closed when there is no room for that of a child.
    pub(super) spare: Option<OwnedFd>,
    /// What a child finds wiped. Open while forks are held back.
    pub(super) wiped: Option<Wiped>,
    /// Since when there has been no room for the descriptor of a child.
    pub(super) crowded: Option<Instant>,
    /// Where the next page goes that only children still need.
    limbo: u64,
    pub(super) messages: Messages,
    /// Where mappings were moved to since no event was under way: an event that says that something
    /// was unmapped there may be of before, since who changes a mapping tells of it afterwards.
    pub(super) superseded: RangeSet<u64>,
    /// What such events said. To be decided when no event is under way.
    pub(super) disputed: Vec<PageRange>,
    /// What events are going to say of calls of our own, which change nothing for anybody.
    pub(super) of_our_making: Vec<OfOurMaking>,
    /// How many events have been applied.
    pub(super) epoch: u64,
    /// What they have met.
    pub(super) overtaken: Overtaken,
    /// How many forks are about to happen: nothing leaves meanwhile.
    pub(super) forking: u32,
    /// The address space has been taken apart.
    pub(super) over: bool,
    numbers: u64,
}

/// The first page of limbo: beyond what any processor addresses. Here are extents whose pages the
/// program has unmapped or discarded, and which a child still has to get.
const LIMBO: u64 = 1 << 46;

/// Tells whether a page is in limbo, so that nobody has it mapped.
pub(super) fn is_in_limbo(page: Page) -> bool {
    page.number() >= LIMBO
}

/// The size of the pieces that are registered: a huge page.
pub(super) const CHUNK: Order = Order::HUGE;

impl State {
    pub(super) fn new() -> State {
        State {
            out: BTreeMap::new(),
            parts: NumberMap::default(),
            located: NumberMap::default(),
            counts: NumberMap::default(),
            emptied: BTreeSet::new(),
            registered: RangeMap::new(),
            watched: RangeSet::new(),
            unwatching: RangeSet::new(),
            doubtful: RangeSet::new(),
            poisoned: RangeSet::new(),
            reserved: RangeSet::new(),
            own: RangeSet::new(),
            managed: None,
            isolations: NumberMap::default(),
            waiting: BTreeMap::new(),
            populating: BTreeMap::new(),
            faults: VecDeque::new(),
            retries: Vec::new(),
            deferred: Vec::new(),
            holding: false,
            hold_ended: false,
            aftermath: Aftermath::default(),
            settling: 0,
            children: Vec::new(),
            released: RangeSet::new(),
            armed: false,
            kept_from_child: Vec::new(),
            spare: None,
            wiped: None,
            crowded: None,
            limbo: LIMBO,
            messages: Messages::new(),
            superseded: RangeSet::new(),
            disputed: Vec::new(),
            of_our_making: Vec::new(),
            epoch: 0,
            overtaken: Overtaken::default(),
            forking: 0,
            over: false,
            numbers: 0,
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(super) fn token(&mut self) -> Token {
        Token(self.number())
    }

    /// Begins an isolation on behalf of the calling thread.
    pub(super) fn begin_isolation(&mut self) -> IsolationId {
        let id = IsolationId(self.number());
        let thread = mmu_notifier::thread_number();
        self.isolations.insert(id, IsolationState { thread, disturbed: false, awaited: false });
        id
    }

    /// Tells whether a device may still use what it had before a change that has been made: memory of
    /// a device, or staging, that is let go of now is to be [doomed](Aftermath::doomed).
    pub(super) fn is_unsettled(&self) -> bool {
        self.settling > 0 || !self.aftermath.changed.is_empty()
    }

    /// Tells whether the pages of an isolation may not be where it took them any more.
    pub(super) fn is_disturbed(&self, isolation: IsolationId) -> bool {
        self.isolations.get(&isolation).is_none_or(|state| state.disturbed)
    }

    /// Tells whether somebody sleeps in the kernel for a page of an isolation.
    pub(super) fn is_awaited(&self, isolation: IsolationId) -> bool {
        self.isolations.get(&isolation).is_some_and(|state| state.awaited)
    }

    /// Notes that somebody sleeps for a page of an isolation.
    pub(super) fn await_isolation(&mut self, isolation: IsolationId) {
        if let Some(state) = self.isolations.get_mut(&isolation) {
            state.awaited = true;
        }
    }

    /// Returns the extent that holds `page`, with its first page.
    pub(super) fn at(&self, page: Page) -> Option<(Page, &Extent)> {
        let (&first, extent) = self.out.range(..=page).next_back()?;
        first.block(extent.order).contains(page).then_some((first, extent))
    }

    /// Returns the extents that share a page with `range`, in ascending order.
    pub(super) fn overlapping(&self, range: PageRange) -> impl Iterator<Item = (Page, &Extent)> {
        let first = self.at(range.first()).map_or(range.first(), |(first, _)| first);
        self.out.range(first..=range.last()).map(|(&first, extent)| (first, extent))
    }

    /// Returns the parts of `range` that are not out, in ascending order.
    pub(super) fn gaps(&self, range: PageRange) -> SmallVec<[PageRange; 1]> {
        let mut gaps = SmallVec::new();
        let mut next = Some(range.first());
        for (first, extent) in self.overlapping(range) {
            let before = first.number().checked_sub(1).and_then(Page::new);
            if let (Some(from), Some(last)) = (next, before) {
                gaps.extend(PageRange::from_bounds(from, last));
            }
            next = first.block(extent.order).last().checked_add(1);
        }
        gaps.extend(next.and_then(|from| PageRange::from_bounds(from, range.last())));
        gaps
    }

    /// Tells whether anything is out.
    pub(super) fn is_anything_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// Returns how many pages are out.
    pub(super) fn pages_out(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Returns the first pages and orders of all extents.
    pub(super) fn extents(&self) -> impl Iterator<Item = (Page, &Extent)> {
        self.out.iter().map(|(&first, extent)| (first, extent))
    }

    /// Returns where a block of a device is mapped.
    pub(super) fn locate(&self, location: DeviceLocation) -> Option<Page> {
        self.located.get(&location).copied()
    }

    /// Enters an extent where there is none.
    pub(super) fn insert(&mut self, first: Page, extent: Extent) {
        self.index(first, &extent.place);
        *self.counts.entry(chunk_of(first)).or_default() += extent.order.pages();
        debug_assert!(self.overlapping(first.block(extent.order)).next().is_none());
        self.out.insert(first, extent);
    }

    /// Notes that the block at `first` was one page to the CPUs.
    pub(super) fn note_huge(&mut self, first: Page) {
        if let Some(extent) = self.out.get_mut(&first) {
            extent.huge = true;
        }
    }

    /// Takes the extent out that begins at `first`.
    pub(super) fn remove(&mut self, first: Page) -> Option<Extent> {
        let extent = self.out.remove(&first)?;
        self.unindex(first, &extent.place);
        let chunk = chunk_of(first);
        if let Some(count) = self.counts.get_mut(&chunk) {
            *count -= extent.order.pages();
            if *count == 0 {
                self.counts.remove(&chunk);
                self.emptied.insert(chunk);
            }
        }
        Some(extent)
    }

    /// Replaces the place of the extent that begins at `first`, and returns the one before.
    pub(super) fn replace(&mut self, first: Page, place: Place) -> Option<Place> {
        if !self.out.contains_key(&first) {
            return None;
        }
        self.index(first, &place);
        let extent = self.out.get_mut(&first)?;
        let before = std::mem::replace(&mut extent.place, place);
        self.unindex(first, &before);
        Some(before)
    }

    /// Notes where an extent is, by what it leads to.
    fn index(&mut self, first: Page, place: &Place) {
        match place {
            Place::Device(block) => {
                self.located.insert(block.location(), first);
            }
            &Place::Transit { token, offset, .. } => {
                let parts = self.parts.entry(token).or_default();
                let at = parts.partition_point(|&(other, _)| other < offset);
                parts.insert(at, (offset, first));
            }
            Place::Held { .. } | Place::Parked(_) => {}
        }
    }

    /// Forgets what [`index`](State::index) noted.
    fn unindex(&mut self, first: Page, place: &Place) {
        match place {
            Place::Device(block) => {
                self.located.remove(&block.location());
            }
            &Place::Transit { token, offset, .. } => {
                let Some(parts) = self.parts.get_mut(&token) else { return };
                if let Ok(at) = parts.binary_search(&(offset, first)) {
                    parts.remove(at);
                }
                if parts.is_empty() {
                    self.parts.remove(&token);
                }
            }
            Place::Held { .. } | Place::Parked(_) => {}
        }
    }

    /// Halves extents until none lies across an edge of `range`.
    pub(super) fn carve(&mut self, range: PageRange) {
        for edge in [range.first(), range.last()] {
            while let Some((first, extent)) = self.at(edge)
                && !range.covers(first.block(extent.order))
            {
                self.halve(first);
            }
        }
    }

    fn halve(&mut self, first: Page) {
        let Some(extent) = self.remove(first) else { return };
        self.disturb(&extent.place);
        let [low, high] = extent.halve();
        let second = first.checked_add(low.order.pages()).expect("within the extent");
        self.insert(first, low);
        self.insert(second, high);
    }

    /// Notes that the pages of an isolation are not where it took them any more, or in other
    /// pieces.
    fn disturb(&mut self, place: &Place) {
        if let Place::Transit { isolation, .. } = place
            && let Some(state) = self.isolations.get_mut(isolation)
        {
            state.disturbed = true;
        }
    }

    /// Takes out everything in `range`.
    fn take(&mut self, range: PageRange) -> Vec<(Page, Extent)> {
        self.carve(range);
        let firsts: Vec<Page> = self.overlapping(range).map(|(first, _)| first).collect();
        let taken = firsts.into_iter().filter_map(|first| Some((first, self.remove(first)?)));
        let taken: Vec<_> = taken.collect();
        taken.iter().for_each(|(_, extent)| self.disturb(&extent.place));
        taken
    }

    /// Returns the extents that hold what an isolation knows by `token`, in ascending order of
    /// their offset: first page, order, and offset of each.
    pub(super) fn of_token(&self, of: Token) -> SmallVec<[(Page, Order, u64); 1]> {
        self.of_token_from(of, 0).collect()
    }

    /// Returns those of them that begin `from` pages within it, or later.
    pub(super) fn of_token_from(
        &self,
        of: Token,
        from: u64,
    ) -> impl Iterator<Item = (Page, Order, u64)> {
        let parts = self.parts.get(&of).map_or(&[][..], |parts| &parts[..]);
        let from = parts.partition_point(|&(offset, _)| offset < from);
        parts[from..].iter().map(|&(offset, first)| (first, self.out[&first].order, offset))
    }

    /// Tells whether a message is of a change that we are making, and if so forgets that one.
    pub(super) fn is_of_our_making(&mut self, message: &Message) -> bool {
        let change = match *message {
            Message::Remap { from, to } => OfOurMaking::Remap { from, to },
            Message::Unmap(range) => OfOurMaking::Unmap(range),
            _ => return false,
        };
        if mutant!("our_own_changes_are_the_programs") {
            return false;
        }
        let found = self.of_our_making.iter().position(|&expected| expected == change);
        found.map(|at| self.of_our_making.swap_remove(at)).is_some()
    }

    /// Applies a message. Says whether somebody may have to be woken: threads that sleep for pages of
    /// the range find them gone.
    pub(super) fn apply(&mut self, message: Message) -> Option<PageRange> {
        match message {
            Message::Fault { address, thread, write, .. } => {
                let page = Page::containing(address);
                let fault = Fault { page, thread, write, failing_since: None, held_since: None };
                self.faults.push_back(fault);
                None
            }
            // Children are adopted before they come here.
            Message::Fork(_) => None,
            Message::Unmap(range) => {
                self.epoch += 1;
                let whole = numbers(range);
                let disputed: Vec<_> = self.superseded.overlapping(&whole).cloned().collect();
                for part in &disputed {
                    let part = part.start.max(whole.start)..part.end.min(whole.end);
                    self.disputed.push(range_of(part));
                }
                let parts: Vec<_> = self.superseded.gaps(&whole).collect();
                parts.into_iter().for_each(|part| self.unmap(range_of(part)));
                Some(range)
            }
            Message::Remove(range) => {
                self.epoch += 1;
                match mutant!("discarding_is_ignored") {
                    true => Some(range),
                    false => Some(self.lose(EventKind::Clear, range)),
                }
            }
            // A second mapping of shared memory: registered, of unknown length, and with nothing out.
            Message::Duplicate { .. } => None,
            Message::Remap { from, to } => {
                self.epoch += 1;
                if !mutant!("moving_is_ignored") {
                    self.remap(from, to);
                }
                // Whoever slept for a page there finds out what became of it.
                Some(from)
            }
        }
    }

    /// Forgets what there was in `range`.
    pub(super) fn unmap(&mut self, range: PageRange) {
        self.registered.remove(numbers(range));
        self.watched.remove(numbers(range));
        self.doubtful.remove(numbers(range));
        self.poisoned.remove(numbers(range));
        if !mutant!("unmapping_is_ignored") {
            self.lose(EventKind::Unmap, range);
        }
    }

    /// Drops what is out in `range`, which the program has unmapped or discarded.
    fn lose(&mut self, kind: EventKind, range: PageRange) -> PageRange {
        let lost = self.take(range);
        match kind {
            EventKind::Unmap => self.overtaken.unmapped.note(&lost),
            _ => self.overtaken.discarded.note(&lost),
        }
        for (first, extent) in lost {
            let block = numbers(first.block(extent.order));
            if self.children.iter().any(|child| child.lacks(&block)) {
                let to = self.place_in_limbo(extent.order);
                self.children.iter_mut().for_each(|child| child.follow(&block, to));
                self.insert(to, extent);
            } else {
                self.aftermath.doomed.push(extent.place);
            }
        }
        self.aftermath.changed.push((kind, range));
        range
    }

    /// Drops what is in limbo and no child lacks any more, since it has it, or will never run. Says
    /// whether there was anything. What is in transit is dropped when that ends.
    pub(super) fn empty_limbo(&mut self) -> bool {
        let Some(limbo) = Page::new(LIMBO) else { return false };
        if self.out.last_key_value().is_none_or(|(&last, _)| !is_in_limbo(last)) {
            return false;
        }
        let unneeded = |(first, extent): &(&Page, &Extent)| {
            let block = numbers(first.block(extent.order));
            let transit = matches!(extent.place, Place::Transit { .. });
            !transit && !self.children.iter().any(|child| child.lacks(&block))
        };
        let unneeded = self.out.range(limbo..).filter(unneeded).map(|(&first, _)| first);
        let unneeded: SmallVec<[Page; 4]> = unneeded.collect();
        for &first in &unneeded {
            let extent = self.remove(first);
            self.aftermath.doomed.extend(extent.map(|extent| extent.place));
        }
        !unneeded.is_empty()
    }

    fn place_in_limbo(&mut self, order: Order) -> Page {
        let first = self.limbo.next_multiple_of(order.pages());
        self.limbo = first + order.pages();
        Page::new(first).expect("limbo is larger than what leaves in a lifetime")
    }

    /// Moves what is out, and how it is registered, along with its mapping.
    fn remap(&mut self, from: PageRange, to: Page) {
        let target = PageRange::from_pages(to, from.pages()).expect("a mapping fits");
        let moved = |page: u64| page - from.first().number() + to.number();
        let pieces: Vec<_> = self.registered.overlapping(numbers(from)).collect();
        let pieces: Vec<_> = pieces
            .into_iter()
            .map(|(range, &how)| {
                let piece = range.start.max(numbers(from).start)..range.end.min(numbers(from).end);
                (moved(piece.start)..moved(piece.end), how)
            })
            .collect();
        self.registered.remove(numbers(target));
        for (range, how) in pieces {
            self.registered.insert(range, how);
        }
        for known in [&mut self.watched, &mut self.doubtful, &mut self.poisoned] {
            let parts: Vec<_> = known.overlapping(&numbers(from)).cloned().collect();
            known.remove(numbers(target));
            for part in parts {
                let part = part.start.max(numbers(from).start)..part.end.min(numbers(from).end);
                known.insert(moved(part.start)..moved(part.end));
            }
        }
        self.poisoned.remove(numbers(from));
        // What was reserved there is gone: the stack of a thread that has ended.
        let reserved: Vec<_> = self.own.gaps(&numbers(target)).collect();
        reserved.into_iter().for_each(|part| self.reserved.remove(part));
        // Whoever unmapped what was there before may not have said so yet. What it says then is not
        // about what comes now.
        let stale = self.lose(EventKind::Unmap, target);
        if !mutant!("superseded_mappings_are_not_noticed") {
            self.superseded.insert(numbers(stale));
        }
        self.children.iter_mut().for_each(|child| child.follow(&numbers(from), to));
        let taken = self.take(from);
        self.overtaken.remapped.note(&taken);
        for (first, extent) in taken {
            let first = Page::new(moved(first.number())).expect("a mapping fits");
            self.insert_realigned(first, extent);
        }
        self.aftermath.changed.push((EventKind::Unmap, from));
        self.aftermath.changed.push((EventKind::Unmap, target));
    }

    /// Enters an extent that may begin anywhere, in pieces that are aligned.
    pub(super) fn insert_realigned(&mut self, first: Page, extent: Extent) {
        if first.align_down(extent.order) == first {
            self.insert(first, extent);
            return;
        }
        let [low, high] = extent.halve();
        let second = first.checked_add(low.order.pages()).expect("a mapping fits");
        self.insert_realigned(first, low);
        self.insert_realigned(second, high);
    }

    /// Tells whether an isolation cannot end before `thread` does something: it is of that thread,
    /// or of one that waits, here or in the kernel, for such an isolation.
    pub(super) fn waits_for(&self, isolation: IsolationId, thread: u64) -> bool {
        let mut seen = BTreeSet::new();
        let mut next = vec![isolation];
        while let Some(isolation) = next.pop() {
            if !seen.insert(isolation) {
                continue;
            }
            let Some(of) = self.isolations.get(&isolation) else { continue };
            if of.thread == thread {
                return true;
            }
            next.extend(self.waiting.get(&of.thread));
            if let Some(&range) = self.populating.get(&of.thread) {
                next.extend(self.overlapping(range).filter_map(|(_, extent)| match extent.place {
                    Place::Transit { isolation, .. } => Some(isolation),
                    _ => None,
                }));
            }
        }
        false
    }
}

impl Place {
    pub(super) fn is_device(&self) -> bool {
        matches!(self, Place::Device(_))
    }
}

impl Extent {
    /// Makes a block of pages that the CPUs had as single ones.
    pub(super) fn new(order: Order, place: Place) -> Extent {
        Extent { order, huge: false, place }
    }

    /// Cuts a block of more than one page in two.
    fn halve(self) -> [Extent; 2] {
        let order = Order::new(self.order.get() - 1).expect("a single page has no halves");
        let places = match self.place {
            Place::Transit { isolation, token, offset } => [0, order.pages()]
                .map(|pages| Place::Transit { isolation, token, offset: offset + pages }),
            Place::Device(block) => block.halve().map(Place::Device),
            Place::Held { owner, block } => {
                halve_block(block, order).map(|block| Place::Held { owner, block })
            }
            Place::Parked(block) => halve_block(block, order).map(Place::Parked),
        };
        places.map(|place| Extent { order, huge: false, place })
    }
}

fn halve_block(block: PoolBlock, order: Order) -> [PoolBlock; 2] {
    let first = block.first();
    let second = first.checked_add(order.pages()).expect("within the block");
    let halves = block.cut(&[(first, order), (second, order)]);
    halves.try_into().expect("it was cut in two")
}

/// Returns the page numbers of a range.
pub(super) fn numbers(range: PageRange) -> std::ops::Range<u64> {
    range.first().number()..range.last().number() + 1
}

/// Returns the range of these page numbers.
pub(super) fn range_of(numbers: std::ops::Range<u64>) -> PageRange {
    let first = Page::new(numbers.start).expect("it came from a page");
    PageRange::from_pages(first, numbers.end - numbers.start).expect("ranges in maps are not empty")
}

/// Returns the number of the chunk that `page` is in.
pub(super) fn chunk_of(page: Page) -> u64 {
    page.number() >> CHUNK.get()
}

/// Returns the pages of a chunk.
pub(super) fn chunk_range(chunk: u64) -> PageRange {
    Page::new(chunk << CHUNK.get()).expect("it was made from a page").block(CHUNK)
}

#[cfg(test)]
mod tests;
