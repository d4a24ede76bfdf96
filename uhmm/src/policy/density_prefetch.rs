//! What moves along with a page that a device faults on.

use super::{DeviceFault, DevicePlan, Location, Policy, join};
use crate::entry::Residency;
use crate::page::{Order, Page, PageRange};
use crate::primitive::{Mutex, lock};

/// Where most of a stretch of memory is on the device already, the rest of it comes along (F51).
///
/// Each block of 2 MiB is a binary tree over its pages. A fault grows to the largest subtree around
/// its page of which more than a certain share, 51 percent by default, is on the device, the pages
/// that are to be served anyway counted as there. So a device that walks through memory is served
/// by fewer and fewer faults, and one that picks single pages gets single pages. The subtree is
/// cut to the mirror, and to the pages around the fault that are mapped without a hole.
/// Pages in the memory of another device count as not there, and come along like the others.
///
/// The default is safe because it at most about doubles what the device has asked for itself:
/// what comes along is less than half of each subtree. Plans that leave the page in system memory
/// are left alone.
///
/// Looks at no more than the 512 pages of the block, and remembers nothing but its figures:
///
/// * `grown`: faults at which pages came along;
/// * `pages`: the pages that were asked to come along and were not on the device.
#[derive(Debug)]
pub struct DensityPrefetch {
    percent: u8,
    figures: Mutex<Figures>,
}

#[derive(Debug, Default)]
struct Figures {
    grown: u64,
    pages: u64,
}

/// The size of the tree: 2 MiB.
const TREE: Order = Order::HUGE;

impl DensityPrefetch {
    /// The default threshold, in percent.
    pub const PERCENT: u8 = 51;

    /// Makes the policy with the default threshold.
    pub fn new() -> DensityPrefetch {
        DensityPrefetch { percent: DensityPrefetch::PERCENT, figures: Mutex::default() }
    }

    /// Sets above which share a subtree comes along, in percent. With 0 all of the block does at the
    /// first fault; from 100 on nothing ever does.
    #[must_use]
    pub fn threshold(self, percent: u8) -> DensityPrefetch {
        DensityPrefetch { percent, ..self }
    }

    /// Returns the largest subtree around `page`, cut to `within`, that is dense enough; the page
    /// alone if none is.
    fn grow(&self, page: Page, within: PageRange, counts: impl Fn(Page) -> bool) -> PageRange {
        let dense = |subtree: &PageRange| {
            let pages = subtree.iter().filter(|&page| counts(page)).count() as u64;
            pages * 100 > subtree.pages() * u64::from(self.percent)
        };
        let orders = (0..=TREE.get()).rev().filter_map(Order::new);
        let subtrees = orders.filter_map(|order| page.block(order).intersection(within));
        subtrees.into_iter().find(dense).unwrap_or_else(|| page.into())
    }
}

impl Default for DensityPrefetch {
    fn default() -> DensityPrefetch {
        DensityPrefetch::new()
    }
}

impl Policy for DensityPrefetch {
    fn name(&self) -> &'static str {
        "density prefetch"
    }

    fn is_prompt(&self) -> bool {
        true
    }

    fn device_fault(&self, fault: &DeviceFault<'_>, plan: &mut DevicePlan) {
        let Some(block) = fault.page.block(TREE).intersection(fault.mirror) else { return };
        if plan.location == Location::System {
            return;
        }
        let entries = fault.snapshot(block);
        let residency = |page| block.index_of(page).map(|index| entries[index].residency);
        let is_there = |page| match residency(page) {
            Some(Residency::Device(at)) => at.owner == fault.owner,
            _ => false,
        };
        let is_mapped = |page| residency(page).is_some_and(|what| what != Residency::Hole);
        let within = run_around(fault.page, block, is_mapped);
        let planned = plan.range;
        let dense = self.grow(fault.page, within, |page| is_there(page) || planned.contains(page));
        plan.range = join(planned, dense);
        // A fault on a page that is there moves nothing: what grew is what is mapped at once.
        if is_there(fault.page) {
            return;
        }
        let came = |page: &Page| !planned.contains(*page) && !is_there(*page);
        let pages = dense.iter().filter(came).count() as u64;
        let mut figures = lock(&self.figures);
        figures.grown += u64::from(pages > 0);
        figures.pages += pages;
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let figures = lock(&self.figures);
        vec![("grown", figures.grown), ("pages", figures.pages)]
    }
}

/// Returns the longest run of pages around `page` within `block` of which each is one that `is`,
/// not asking about `page` itself.
fn run_around(page: Page, block: PageRange, is: impl Fn(Page) -> bool) -> PageRange {
    let before = block.iter().rev().skip_while(|&other| other >= page);
    let first = before.take_while(|&other| is(other)).last().unwrap_or(page);
    let after = block.iter().skip_while(|&other| other <= page);
    let last = after.take_while(|&other| is(other)).last().unwrap_or(page);
    PageRange::from_bounds(first, last).expect("a run around a page begins at it or before it")
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::time::Duration;

    use mmu_notifier::Owner;
    use proptest::prelude::*;

    use super::*;
    use crate::address_space::SpaceId;
    use crate::entry::{Access, DeviceFrame, DeviceLocation, Frame, PageEntry};
    use crate::policy::testing::page;

    /// What a page is, to this policy.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Is {
        Hole,
        System,
        Mine,
        Another,
    }

    fn entry(is: Is, mine: Owner, another: Owner) -> PageEntry {
        let device = |owner| Residency::Device(DeviceLocation { owner, frame: DeviceFrame(0) });
        let residency = match is {
            Is::Hole => Residency::Hole,
            Is::System => Residency::System(Frame(0)),
            Is::Mine => device(mine),
            Is::Another => device(another),
        };
        PageEntry { residency, ..PageEntry::default() }
    }

    /// Asks the policy about a fault on page `at`, where the pages are `pages` from page 0 on and
    /// nothing is mapped beyond.
    fn ask(policy: &DensityPrefetch, pages: &[Is], at: u64, mirror: PageRange) -> DevicePlan {
        let (mine, another) = (Owner::new(), Owner::new());
        let of = |page: Page| pages.get(page.number() as usize).copied().unwrap_or(Is::Hole);
        let snapshot = |range: PageRange| -> Vec<PageEntry> {
            assert!(mirror.covers(range), "it looks beyond the mirror");
            range.iter().map(|page| entry(of(page), mine, another)).collect()
        };
        let fault = DeviceFault {
            space: SpaceId::new(),
            owner: mine,
            page: page(at),
            access: Access::Write,
            mirror,
            now: Duration::ZERO,
            snapshot: &snapshot,
        };
        let range = PageRange::from(page(at));
        let mut plan = DevicePlan { location: Location::Device, range, nap: Duration::ZERO };
        policy.device_fault(&fault, &mut plan);
        plan
    }

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::from_pages(page(first), pages).expect("a small range")
    }

    #[test]
    fn a_walk_through_memory_takes_fewer_and_fewer_faults() {
        let policy = DensityPrefetch::new();
        let mut pages = vec![Is::System; 512];
        let mut grown = Vec::new();
        while let Some(next) = pages.iter().position(|&is| is == Is::System) {
            let plan = ask(&policy, &pages, next as u64, PageRange::ALL);
            plan.range.iter().for_each(|page| pages[page.number() as usize] = Is::Mine);
            grown.push(plan.range.pages());
        }
        // Above 51 percent: 1/1, 2/2, 3/4, 5/8, 9/16, 17/32 and 33/64, while of 128 pages it takes
        // 66, of 256 pages 131, and of 512 pages 262.
        assert_eq!(grown, [1, 2, 4, 8, 16, 32, 64, 1, 128, 1, 2, 256, 1, 2, 4, 8, 512]);
        let faults = grown.len() as u64;
        let came = policy.figures()[1].1;
        assert_eq!(came + faults, 512, "each page came by a fault of its own or along");
    }

    #[test]
    fn what_stays_in_system_memory_is_not_looked_at() {
        let policy = DensityPrefetch::new().threshold(0);
        let snapshot = |_: PageRange| -> Vec<PageEntry> { panic!("it looks") };
        let fault = DeviceFault {
            space: SpaceId::new(),
            owner: Owner::new(),
            page: page(3),
            access: Access::Read,
            mirror: PageRange::ALL,
            now: Duration::ZERO,
            snapshot: &snapshot,
        };
        let range = PageRange::from(page(3));
        let mut plan = DevicePlan { location: Location::System, range, nap: Duration::ZERO };
        policy.device_fault(&fault, &mut plan);
        assert_eq!(plan.range, range);
    }

    #[test]
    fn a_fault_on_a_page_that_is_there_brings_nothing_along() {
        let policy = DensityPrefetch::new();
        let pages = [Is::Mine, Is::Mine, Is::Mine, Is::System];
        assert_eq!(ask(&policy, &pages, 0, PageRange::ALL).range, range(0, 4));
        assert_eq!(policy.figures(), [("grown", 0), ("pages", 0)]);
    }

    #[test]
    fn a_threshold_of_100_turns_it_off_and_0_takes_all_that_is_mapped() {
        let mut pages = [Is::Mine; 512];
        pages[7] = Is::System;
        let off = DensityPrefetch::new().threshold(100);
        assert_eq!(ask(&off, &pages, 7, PageRange::ALL).range, range(7, 1));
        let all = DensityPrefetch::new().threshold(0);
        assert_eq!(ask(&all, &[Is::System; 300], 7, PageRange::ALL).range, range(0, 300));
        assert_eq!(all.figures(), [("grown", 1), ("pages", 299)]);
    }

    /// Tries each subtree by its definition, without the policy's shortcuts.
    fn brute_force(pages: &[Is], at: u64, mirror: PageRange, percent: u64) -> Vec<u64> {
        let of = |number: u64| pages.get(number as usize).copied().unwrap_or(Is::Hole);
        let usable = |number: u64| mirror.contains(page(number)) && of(number) != Is::Hole;
        let connected =
            |number: u64| (number.min(at)..=number.max(at)).all(|n| n == at || usable(n));
        let mut best = vec![at];
        for order in 0..=9u32 {
            let first = at >> order << order;
            let subtree: Vec<u64> =
                (first..first + (1 << order)).filter(|&n| connected(n)).collect();
            let full = subtree.iter().filter(|&&n| n == at || of(n) == Is::Mine).count() as u64;
            if full * 100 > subtree.len() as u64 * percent {
                best = subtree;
            }
        }
        best
    }

    fn some_pages() -> impl Strategy<Value = Vec<Is>> {
        let is = prop_oneof![
            1 => Just(Is::Hole), 8 => Just(Is::System), 8 => Just(Is::Mine), 2 => Just(Is::Another)
        ];
        let dense = prop_oneof![1 => Just(Is::System), 3 => Just(Is::Mine)];
        prop_oneof![prop::collection::vec(is, 1..1100), prop::collection::vec(dense, 1..1100),]
    }

    proptest! {
        #[test]
        fn the_range_is_that_of_the_definition(
            pages in some_pages(),
            at in 0u64..1100,
            mirror in (0u64..700, 1u64..1100),
            percent in prop_oneof![Just(51u8), 0u8..=101],
        ) {
            let (first, length) = mirror;
            let mirror = range(first, length);
            let at = first + at % length;
            let policy = DensityPrefetch::new().threshold(percent);
            let plan = ask(&policy, &pages, at, mirror);
            let expected = brute_force(&pages, at, mirror, percent.into());
            let numbers: Vec<u64> = plan.range.iter().map(Page::number).collect();
            prop_assert_eq!(&numbers, &expected);
            let is_mine = |&&number: &&u64| pages.get(number as usize) == Some(&Is::Mine);
            let others = expected.iter().filter(|&&number| number != at);
            let came = (others.clone().count() - others.filter(is_mine).count()) as u64;
            let came = if is_mine(&&at) { 0 } else { came };
            prop_assert_eq!(policy.figures(), [("grown", u64::from(came > 0)), ("pages", came)]);
        }
    }
}
