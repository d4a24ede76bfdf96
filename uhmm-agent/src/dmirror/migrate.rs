//! Pages to a unit, and home.
//!
//! What moves to a unit is decided page by page, as the kernel's own driver does: pages of private
//! memory that no unit has. Pages of a file, of another unit, or that a device has exclusively are left
//! where they are, in silence; the request fails in the end, since the device has not got them.
//!
//! See [`mm`](super::mm) for what it means that a page is on a unit.

use std::time::Instant;

use rustix::io::Errno;
use uhmm::{Access, EventKind, Order, Page, PageRange, RangeFault, Residency, StayReason, Stayed};
use uhmm_linux::{Mapping, MappingKind, PageFlags};

use super::mm::{AT_ONCE, PATIENCE};
use super::walk::{Piece, joined, pieces};
use super::{Counts, OpenFile};

/// Where pages of a piece are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In system memory, or nowhere yet, and free to go.
    System,
    /// On the unit that this is an open of.
    Here,
    /// Where they stay.
    Elsewhere,
}

impl OpenFile {
    /// Moves what can be moved to the unit, and has the device load it all.
    pub(super) fn migrate_to_dev(
        &self,
        range: PageRange,
        output: &mut Vec<u8>,
    ) -> Result<Counts, Errno> {
        let _moving = self.mm.moving(self.unit);
        let mut fails = self.takes_failure();
        for piece in pieces(self.mm.process(), range) {
            let mapping = piece.migratable(self.mm.process()).ok_or(Errno::INVAL)?;
            self.piece_to_dev(piece, &mapping, &mut fails);
        }
        if fails {
            self.fail_next();
        }
        self.read_translated(range, output, Errno::NOENT)
    }

    /// Moves the pages of this unit home, and counts them.
    pub(super) fn migrate_to_sys(&self, range: PageRange) -> Result<Counts, Errno> {
        let _moving = self.mm.moving(self.unit);
        let mut fails = self.takes_failure();
        let mut counts = Counts::default();
        for piece in pieces(self.mm.process(), range) {
            piece.migratable(self.mm.process()).ok_or(Errno::INVAL)?;
            counts.cpages += self.piece_to_sys(piece, &mut fails);
        }
        if fails {
            self.fail_next();
        }
        Ok(counts)
    }

    fn piece_to_dev(&self, piece: Piece, mapping: &Mapping, fails: &mut bool) {
        let found = self.find(piece, mapping);
        let parts = |at| {
            let wanted = found.iter().filter(move |&&(_, is)| is == at);
            joined(wanted.map(|&(pages, _)| pages))
        };
        let mut here = parts(At::Here);
        for part in parts(At::System) {
            for part in self.without_failure(part, fails) {
                let stayed = self.move_to_unit(part);
                here.extend(without(part, &stayed));
            }
        }
        for part in here {
            // What has come home again by now is entered from there: it is the same page.
            let _ = self.mirror().range_fault(&RangeFault::snapshot(part));
        }
    }

    /// Says of each page of a piece where it is, in runs in ascending order.
    fn find(&self, piece: Piece, mapping: &Mapping) -> Vec<(PageRange, At)> {
        let range = piece.range;
        let mut flags = Vec::new();
        self.mm.process().page_flags(range, &mut flags);
        let mut at: Vec<At> = flags.iter().map(|&flags| may_leave(mapping, flags)).collect();
        let mut set = |part: PageRange, is: At| {
            let first = range.index_of(part.first()).expect("within the range");
            at[first..first + part.len()].fill(is);
        };
        for (part, residency, _) in self.mm.away(range) {
            set(
                part,
                match residency {
                    Residency::Device(at) if Some(at.owner) == self.mm.owner(self.unit) => At::Here,
                    // Somebody brings it home.
                    Residency::InTransit => At::System,
                    _ => At::Elsewhere,
                },
            );
        }
        for unit in super::Unit::ALL {
            let is = if unit == self.unit { At::Here } else { At::Elsewhere };
            self.mm.in_place(unit, range).into_iter().for_each(|part| set(part, is));
        }
        let mut runs: Vec<(PageRange, At)> = Vec::new();
        for (page, at) in range.iter().zip(at) {
            match runs.last_mut() {
                Some((run, same)) if *same == at => {
                    *run = PageRange::from_bounds(run.first(), page).expect("ascending");
                }
                _ => runs.push((page.into(), at)),
            }
        }
        runs
    }

    /// Returns the parts of `range` that are to move, where one allocation is to fail: not the first
    /// page, or, if that would move in a huge page, all of it in small ones.
    fn without_failure(&self, range: PageRange, fails: &mut bool) -> Vec<PageRange> {
        if !std::mem::take(fails) {
            return vec![range];
        }
        let first = PageRange::from(range.first());
        let rest = range.first().checked_add(1);
        let rest = rest.and_then(|next| PageRange::from_bounds(next, range.last()));
        match self.moves_huge(range) {
            true => [Some(first), rest].into_iter().flatten().collect(),
            false => rest.into_iter().collect(),
        }
    }

    /// Tells whether the first page of `range` is the first of a huge page, or of a place for one where
    /// nothing is yet, all of it in the range.
    fn moves_huge(&self, range: PageRange) -> bool {
        let block = range.first().block(Order::HUGE);
        if block.first() != range.first() || !range.covers(block) {
            return false;
        }
        let mut flags = Vec::new();
        self.mm.process().page_flags(block, &mut flags);
        let huge = |flags: &PageFlags| flags.contains(PageFlags::HUGE) || flags.is_empty();
        flags.iter().all(huge)
    }

    /// Moves the pages of `range` to the unit, and returns those that stayed.
    fn move_to_unit(&self, range: PageRange) -> Vec<PageRange> {
        let Some(pagemap) = &self.mm.place(self.unit).pagemap else {
            return self.put_in_place(range);
        };
        let began = Instant::now();
        let mut wanted: Vec<PageRange> = range.blocks(AT_ONCE).collect();
        let mut stayed = Vec::new();
        while !wanted.is_empty() {
            let process = self.mm.process();
            let reports = wanted.iter().map(|&part| process.migrate(part, pagemap).run());
            let left: Vec<Stayed> = reports.flat_map(|report| report.stayed).collect();
            wanted.clear();
            for Stayed { pages, reason } in left {
                match reason {
                    StayReason::Busy | StayReason::Changed | StayReason::InTransit
                        if began.elapsed() < PATIENCE =>
                    {
                        wanted.push(pages);
                    }
                    reason if is_for_good(reason) => stayed.extend(self.put_in_place(pages)),
                    StayReason::AlreadyThere => {}
                    _ => stayed.push(pages),
                }
            }
            if !wanted.is_empty() {
                std::thread::yield_now();
            }
        }
        stayed
    }

    /// Notes the pages of `range` as the unit's, where they are, and returns those that cannot be.
    fn put_in_place(&self, range: PageRange) -> Vec<PageRange> {
        let coherent = self.unit.is_coherent();
        let granted = if coherent { self.reserve(range.pages()) } else { range.pages() };
        let Ok(part) = PageRange::from_pages(range.first(), granted) else { return vec![range] };
        // Whoever has them translated has them where they were.
        self.mm.process().change(part, EventKind::Migrate, || ());
        let residents = &self.mm.place(self.unit).residents;
        let _ = residents.inspect(|table| table.make_room(granted));
        self.fault_residents(part);
        let left = residents.inspect(uhmm_devices::dmirror::ResidentTable::take_room).unwrap_or(0);
        if coherent && left > 0 {
            self.mm.units().give_back(self.unit, left);
        }
        without(range, &self.mm.in_place(self.unit, range))
    }

    /// Takes as many of `pages` pages of the unit into use as there are, and returns how many.
    fn reserve(&self, pages: u64) -> u64 {
        let (mut granted, mut step) = (0, pages);
        while step > 0 {
            match self.mm.units().reserve(self.unit, step) {
                Ok(()) => granted += step,
                Err(_) => step /= 2,
            }
            step = step.min(pages - granted);
        }
        granted
    }

    /// Faults pages in on behalf of those in place on the unit: with contents of their own where the
    /// mapping allows it. Pages that cannot be had are left out.
    fn fault_residents(&self, range: PageRange) {
        let process = self.mm.process();
        for piece in pieces(process, range) {
            let Some(mapping) = piece.mapping else { continue };
            let mut flags = Vec::new();
            process.page_flags(piece.range, &mut flags);
            let wanted: Vec<Access> = flags
                .iter()
                .map(|flags| {
                    let shared = flags.is_empty() || flags.contains(PageFlags::ZERO);
                    if mapping.writable && shared { Access::Write } else { Access::Read }
                })
                .collect();
            let mut parts = vec![piece.range];
            while let Some(part) = parts.pop() {
                let first = piece.range.index_of(part.first()).expect("within the piece");
                let wanted = &wanted[first..first + part.len()];
                let request = RangeFault::read(part).per_page(wanted);
                let faulted = self.mm.place(self.unit).residents.range_fault(&request);
                if faulted.is_err() && part.pages() > 1 {
                    parts.extend(halves(part));
                }
            }
        }
    }

    /// Moves the pages of a piece home that are on the unit, and counts them.
    fn piece_to_sys(&self, piece: Piece, fails: &mut bool) -> u64 {
        let mut in_place = self.mm.in_place(self.unit, piece.range);
        if let Some(first) = in_place.first().copied()
            && std::mem::take(fails)
        {
            in_place.splice(..1, self.without_failure(first, &mut true));
        }
        let stay = in_place.into_iter().map(|part| self.mm.forget_in_place(self.unit, part));
        let mut pages: u64 = stay.sum();
        let on_unit = |at: &Residency| match at {
            Residency::Device(at) => Some(at.owner) == self.mm.owner(self.unit),
            _ => false,
        };
        let away = self.mm.away(piece.range).into_iter();
        let away: Vec<_> = away.filter(|(_, at, _)| on_unit(at)).collect();
        let huge = away.first().is_some_and(|&(pages, _, order)| {
            order >= Order::HUGE && pages.pages() >= Order::HUGE.pages()
        });
        let mut parts = joined(away.into_iter().map(|(pages, ..)| pages));
        if let Some(first) = parts.first().copied()
            && std::mem::take(fails)
        {
            // The first page stays, or, of a huge page, comes home by itself, which splits it.
            let rest = first.first().checked_add(1);
            let rest = rest.and_then(|next| PageRange::from_bounds(next, first.last()));
            let alone = huge.then(|| PageRange::from(first.first()));
            parts.splice(..1, [alone, rest].into_iter().flatten());
        }
        for part in parts {
            pages += self.mm.migrate_home(part);
        }
        pages
    }
}

/// Says whether a page of a mapping may go to a unit, by what the page table says of it.
fn may_leave(mapping: &Mapping, flags: PageFlags) -> At {
    let never = PageFlags::FILE | PageFlags::SWAPPED | PageFlags::GUARD;
    let there = flags.contains(PageFlags::PRESENT);
    match mapping.kind {
        _ if mapping.shared || flags.intersects(never) => At::Elsewhere,
        // A page that was never touched is one of zeroes; in a file it is the file's.
        MappingKind::Anonymous => At::System,
        _ if there => At::System,
        _ => At::Elsewhere,
    }
}

/// Tells whether a page stays for as long as it is mapped the way it is, though the kernel's own device
/// would have it.
fn is_for_good(reason: StayReason) -> bool {
    matches!(
        reason,
        StayReason::ReadOnly
            | StayReason::FileBacked
            | StayReason::Locked
            | StayReason::Reserved
            | StayReason::Unsupported
            | StayReason::Shared
    )
}

/// Returns what is left of `range` without `parts`, in ascending order.
fn without(range: PageRange, parts: &[PageRange]) -> Vec<PageRange> {
    let mut parts: Vec<PageRange> =
        parts.iter().filter_map(|part| part.intersection(range)).collect();
    parts.sort_by_key(|part| part.first());
    let mut left = Vec::new();
    let mut next = Some(range.first());
    for part in parts {
        if let Some(first) = next.filter(|&first| first < part.first()) {
            let last = Page::new(part.first().number() - 1).expect("it is above another");
            left.extend(PageRange::from_bounds(first, last));
        }
        next = next.max(part.last().checked_add(1));
    }
    left.extend(next.and_then(|first| PageRange::from_bounds(first, range.last())));
    left
}

fn halves(range: PageRange) -> impl Iterator<Item = PageRange> {
    let half = range.pages() / 2;
    let second = range.first().checked_add(half).expect("within the range");
    let first = PageRange::from_pages(range.first(), half).ok();
    first.into_iter().chain(PageRange::from_bounds(second, range.last()))
}
