//! What the CPU's page table says, a byte for each page.
//!
//! Nothing of it is remembered: it is what the kernel says of the mapping and of the page when it is
//! asked, and which unit has the page.

use rustix::io::Errno;
use uhmm::{Access, Order, Page, PageRange, Residency};
use uhmm_linux::{Mapping, MappingKind, PageFlags};

use super::walk::{Piece, is_writable, pieces};
use super::{Counts, OpenFile, Unit};

/// Nothing that a device could use.
const ERROR: u8 = 0xff;
/// Not there.
const NONE: u8 = 0x00;
const READ: u8 = 0x01;
const WRITE: u8 = 0x02;
/// It is a part of a huge page of 2 MiB that is mapped as one.
const PMD: u8 = 0x04;
/// The same, of 1 GiB.
const PUD: u8 = 0x08;
/// It is the page of zeroes.
const ZERO: u8 = 0x10;
/// It is on this unit, which is private.
const PRIVATE: u8 = 0x20;
/// It is on this unit, which is coherent.
const COHERENT: u8 = 0x40;
/// It is on another coherent unit.
const COHERENT_ELSEWHERE: u8 = 0x50;

/// The kernel's driver asks for so many pages at a time, which shows at the end of the address space.
const BATCH: u64 = 64;

/// How many pages are looked at in one go.
const LOOKED_AT_ONCE: u64 = 1 << 15;

/// How many pages can be described: 1 TiB of addresses.
const MOST: u64 = 1 << 28;

impl OpenFile {
    /// Describes the pages.
    pub(super) fn snapshot(&self, range: PageRange, output: &mut Vec<u8>) -> Result<Counts, Errno> {
        let end = range.first().number() + range.pages().next_multiple_of(BATCH);
        if end > Page::MAX.number() {
            return Err(Errno::OVERFLOW);
        }
        let room = usize::try_from(range.pages()).map_err(|_| Errno::NOMEM)?;
        output.clear();
        if range.pages() > MOST || output.try_reserve_exact(room).is_err() {
            return Err(Errno::NOMEM);
        }
        for piece in pieces(self.mm.process(), range) {
            self.describe(piece, output);
        }
        Ok(Counts { cpages: range.pages(), faults: 0 })
    }

    fn describe(&self, piece: Piece, output: &mut Vec<u8>) {
        let start = output.len();
        output.resize(start + piece.range.len(), ERROR);
        let Some(mapping) = piece.mapping.filter(|mapping| mapping.rights > Access::None) else {
            return;
        };
        let name = || self.mm.process().mapping_name(piece.range.first());
        if mapping.kind == MappingKind::Special && name() != b"[vdso]" {
            return;
        }
        let mut start = start;
        let mut next = Some(piece.range.first());
        while let Some(page) = next.filter(|&page| page <= piece.range.last()) {
            let rest = PageRange::from_bounds(page, piece.range.last()).expect("not empty");
            let pages = rest.pages().min(LOOKED_AT_ONCE);
            let some = PageRange::from_pages(page, pages).expect("a part of the rest");
            self.describe_some(some, &mapping, &mut output[start..start + some.len()]);
            start += some.len();
            next = some.last().checked_add(1);
        }
    }

    fn describe_some(&self, range: PageRange, mapping: &Mapping, output: &mut [u8]) {
        let mut flags = Vec::new();
        self.mm.process().page_flags(range, &mut flags);
        for (byte, &flags) in output.iter_mut().zip(&flags) {
            *byte = of_page(mapping, flags);
        }
        for unit in Unit::ALL {
            for part in self.mm.in_place(unit, range) {
                for page in part.iter() {
                    let index = range.index_of(page).expect("within the range");
                    output[index] = self.of_resident(unit, mapping, flags[index]);
                }
            }
        }
        for (part, residency, order) in self.mm.away(range) {
            let byte = self.of_absent(part.first(), residency, order, mapping);
            let first = range.index_of(part.first()).expect("within the range");
            output[first..first + part.len()].fill(byte);
        }
    }

    /// Describes a page that is in place on a unit.
    fn of_resident(&self, unit: Unit, mapping: &Mapping, flags: PageFlags) -> u8 {
        let place = match unit.is_coherent() {
            true if unit == self.unit => COHERENT,
            true => COHERENT_ELSEWHERE,
            false if unit == self.unit => PRIVATE,
            false => return NONE,
        };
        match of_page(mapping, flags) {
            NONE => NONE,
            // The device's copy of it is a page like any other.
            byte => byte & !ZERO | place,
        }
    }

    /// Describes a page that is not in the page table.
    fn of_absent(&self, page: Page, at: Residency, order: Order, mapping: &Mapping) -> u8 {
        match at {
            Residency::Device(at) if Some(at.owner) == self.mm.owner(self.unit) => {
                let whole = order >= Order::HUGE && mapping.range.covers(page.block(Order::HUGE));
                PRIVATE | if mapping.writable { WRITE } else { READ } | if whole { PMD } else { 0 }
            }
            _ => NONE,
        }
    }
}

/// Describes a page by what the page table says of it.
fn of_page(mapping: &Mapping, flags: PageFlags) -> u8 {
    if !flags.contains(PageFlags::PRESENT) || flags.contains(PageFlags::GUARD) {
        return NONE;
    }
    let size = match flags.contains(PageFlags::HUGE) {
        true if mapping.page_order > Order::HUGE => PUD,
        true => PMD,
        false => 0,
    };
    let zero = if flags.contains(PageFlags::ZERO) { ZERO } else { 0 };
    size | zero | if is_writable(mapping, flags) { WRITE } else { READ }
}
