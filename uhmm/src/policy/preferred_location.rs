//! Where the user wants pages to be.

use std::collections::BTreeMap;

use super::{CpuFault, DeviceFault, DevicePlan, HomePlan, Location, Policy, join};
use crate::address_space::SpaceId;
use crate::page::{Page, PageRange};
use crate::primitive::{Mutex, lock};

/// The user says where pages should be, as by `madvise` (F54).
///
/// A preference holds for the addresses it was set for, whatever is mapped there, until it is set
/// anew or cleared, also in part. A device's fault on a page that is preferred
///
/// * in [`System`](Location::System) memory leaves it there: the device works on it in place, except
///   that a page that is on a device is not brought home by that;
/// * on the [`Device`](Location::Device) moves it there.
///
/// What comes along with a page, either way, ends where the preference differs. A CPU's touch always
/// brings its page home, and the block that is mapped with it; pages around it that are preferred
/// on the device stay.
///
/// Nothing is preferred at first, and then nothing changes, which is safe. It belongs at the end of
/// the list, so that the user's word is the last ([`Policies::and`](super::Policies::and)).
///
/// Remembers at most 4096 ranges in all; beyond that, the range that was set the longest ago is
/// forgotten. Neighbours of one preference are one range. Figures:
///
/// * `ranges`: the ranges remembered now;
/// * `system`, `device`: faults of devices that a preference decided;
/// * `forgotten`: ranges forgotten to stay within the limit.
#[derive(Debug)]
#[doc(alias = "madvise")]
pub struct PreferredLocation {
    state: Mutex<State>,
}

/// # Invariants
///
/// 1. The ranges of a space are disjoint, and none ends where another of the same location begins.
/// 2. There are at most `limit`.
#[derive(Debug)]
struct State {
    limit: usize,
    /// By the first page.
    ranges: BTreeMap<(SpaceId, Page), Preference>,
    /// How many were set so far.
    time: u64,
    system: u64,
    device: u64,
    forgotten: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Preference {
    last: Page,
    location: Location,
    /// When it was set, as a count.
    set: u64,
}

impl PreferredLocation {
    /// How many ranges are remembered.
    pub const LIMIT: usize = 4096;

    /// Makes the policy, with no preference for anything.
    pub fn new() -> PreferredLocation {
        PreferredLocation::with_limit(PreferredLocation::LIMIT)
    }

    fn with_limit(limit: usize) -> PreferredLocation {
        let state =
            State { limit, ranges: BTreeMap::new(), time: 0, system: 0, device: 0, forgotten: 0 };
        PreferredLocation { state: Mutex::new(state) }
    }

    /// Prefers the pages of `range` to be in `location`, whatever was preferred there before. Moves
    /// nothing by itself: it holds from the next fault on.
    pub fn prefer(&self, space: SpaceId, range: PageRange, location: Location) {
        let mut state = lock(&self.state);
        state.clear(space, range);
        state.set(space, range, location);
        state.forget();
    }

    /// Prefers nothing for the pages of `range` any more.
    pub fn clear(&self, space: SpaceId, range: PageRange) {
        let mut state = lock(&self.state);
        state.clear(space, range);
        state.forget();
    }

    /// Returns what is preferred for each page of `range`; `None` where nothing is, or not the same
    /// for each (F58).
    pub fn preferred(&self, space: SpaceId, range: PageRange) -> Option<Location> {
        let state = lock(&self.state);
        let (pages, preference) = state.overlapping(space, range).next()?;
        // Neighbours of one location are one range.
        pages.covers(range).then_some(preference.location)
    }
}

impl State {
    /// Returns the ranges that share a page with `range`, in descending order.
    fn overlapping(
        &self,
        space: SpaceId,
        range: PageRange,
    ) -> impl Iterator<Item = (PageRange, Preference)> {
        let before = (space, PageRange::ALL.first())..=(space, range.last());
        let pages = |(&(_, first), &preference): (&(SpaceId, Page), &Preference)| {
            let pages = PageRange::from_bounds(first, preference.last);
            (pages.expect("a preference is one of a range"), preference)
        };
        let all = self.ranges.range(before).rev().map(pages);
        all.take_while(move |(pages, _)| pages.overlaps(range))
    }

    /// Cuts `range` out of the ranges that hold a part of it.
    fn clear(&mut self, space: SpaceId, range: PageRange) {
        let cut: Vec<_> = self.overlapping(space, range).collect();
        for (pages, preference) in cut {
            self.ranges.remove(&(space, pages.first()));
            if pages.first() < range.first() {
                let last = before(range.first()).expect("there is a page before it");
                self.ranges.insert((space, pages.first()), Preference { last, ..preference });
            }
            if let Some(next) = range.last().checked_add(1).filter(|&next| next <= pages.last()) {
                self.ranges.insert((space, next), preference);
            }
        }
    }

    /// Enters a range that overlaps no other, joining it with its neighbours.
    fn set(&mut self, space: SpaceId, range: PageRange, location: Location) {
        self.time += 1;
        let mut whole = range;
        for neighbour in [before(range.first()), range.last().checked_add(1)].into_iter().flatten()
        {
            let found = self.overlapping(space, neighbour.into()).next();
            if let Some((pages, _)) = found.filter(|(_, found)| found.location == location) {
                self.ranges.remove(&(space, pages.first()));
                whole = join(whole, pages);
            }
        }
        let preference = Preference { last: whole.last(), location, set: self.time };
        self.ranges.insert((space, whole.first()), preference);
    }

    fn forget(&mut self) {
        while self.ranges.len() > self.limit {
            let oldest = self.ranges.iter().min_by_key(|(_, preference)| preference.set);
            let Some((&key, _)) = oldest else { return };
            self.ranges.remove(&key);
            self.forgotten += 1;
        }
    }

    /// Returns what is preferred for one page.
    fn at(&self, space: SpaceId, page: Page) -> Option<Location> {
        self.overlapping(space, page.into()).next().map(|(_, preference)| preference.location)
    }

    /// Cuts `range` around `page` where pages that are preferred elsewhere than `location` begin.
    fn cut(&self, space: SpaceId, range: PageRange, page: Page, location: Location) -> PageRange {
        let (mut first, mut last) = (range.first(), range.last());
        for (pages, preference) in self.overlapping(space, range) {
            if preference.location == location {
                continue;
            }
            if pages.last() > page {
                last = before(pages.first()).unwrap_or(page).max(page);
            }
            if pages.first() < page {
                first = pages.last().checked_add(1).unwrap_or(page).min(page);
                // The ranges come in descending order: this is the nearest before the page.
                break;
            }
        }
        PageRange::from_bounds(first, last).unwrap_or_else(|| page.into())
    }
}

impl Default for PreferredLocation {
    fn default() -> PreferredLocation {
        PreferredLocation::new()
    }
}

impl Policy for PreferredLocation {
    fn name(&self) -> &'static str {
        "preferred location"
    }

    fn device_fault(&self, fault: &DeviceFault<'_>, plan: &mut DevicePlan) {
        let mut state = lock(&self.state);
        if let Some(location) = state.at(fault.space, fault.page) {
            plan.location = location;
            match location {
                Location::System => state.system += 1,
                Location::Device => state.device += 1,
            }
        }
        plan.range = state.cut(fault.space, plan.range, fault.page, plan.location);
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        let state = lock(&self.state);
        let range = state.cut(fault.space, plan.range, fault.page, Location::System);
        // What is mapped as one comes home as one: to cut it would be to split it.
        let block = fault.page.block(fault.order);
        plan.range = join(range, block.intersection(plan.range).unwrap_or(range));
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let state = lock(&self.state);
        vec![
            ("ranges", state.ranges.len() as u64),
            ("system", state.system),
            ("device", state.device),
            ("forgotten", state.forgotten),
        ]
    }
}

/// Returns the page before this one; `None` for the first of the address space.
fn before(page: Page) -> Option<Page> {
    page.number().checked_sub(1).and_then(Page::new)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::page::Order;
    use crate::policy::testing::{cpu_fault, device_fault, page, space};

    /// Pages 0 to 63 of one space, one by one.
    type Model = [Option<Location>; 64];

    #[derive(Clone, Debug)]
    enum Step {
        Prefer(PageRange, Location),
        Clear(PageRange),
    }

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange::from_pages(page(first), pages).expect("a small range")
    }

    fn some_range() -> impl Strategy<Value = PageRange> {
        (0u64..64, 1u64..20).prop_map(|(first, pages)| range(first, pages.min(64 - first)))
    }

    fn some_location() -> impl Strategy<Value = Location> {
        prop_oneof![Just(Location::System), Just(Location::Device)]
    }

    fn some_steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (some_range(), some_location()).prop_map(|(range, to)| Step::Prefer(range, to)),
            1 => some_range().prop_map(Step::Clear),
        ];
        prop::collection::vec(step, 0..40)
    }

    fn apply(policy: &PreferredLocation, model: &mut Model, step: &Step) {
        let (range, location) = match *step {
            Step::Prefer(range, location) => {
                policy.prefer(space(), range, location);
                (range, Some(location))
            }
            Step::Clear(range) => {
                policy.clear(space(), range);
                (range, None)
            }
        };
        range.iter().for_each(|page| model[page.number() as usize] = location);
    }

    fn device_plan(policy: &PreferredLocation, at: u64, plan: DevicePlan) -> DevicePlan {
        let mut plan = plan;
        let snapshot = |_| unreachable!("it looks at no page");
        policy.device_fault(&device_fault(page(at), 0, &snapshot), &mut plan);
        plan
    }

    /// Returns the largest part of `range` around page `at` whose pages are each `allowed`.
    fn part(range: PageRange, at: u64, allowed: impl Fn(u64) -> bool) -> Vec<u64> {
        let connected = |&number: &u64| {
            (number.min(at)..=number.max(at)).all(|other| other == at || allowed(other))
        };
        range.iter().map(Page::number).filter(connected).collect()
    }

    proptest! {
        #[test]
        fn ranges_split_and_merge_as_a_map_of_pages_does(
            steps in some_steps(), asked in some_range()
        ) {
            let policy = PreferredLocation::new();
            let mut model: Model = [None; 64];
            for step in &steps {
                apply(&policy, &mut model, step);
                let state = lock(&policy.state);
                for number in 0..64 {
                    prop_assert_eq!(state.at(space(), page(number)), model[number as usize]);
                }
                // As few ranges as there are runs: neighbours are merged.
                let mut runs = model.to_vec();
                runs.dedup();
                prop_assert_eq!(state.ranges.len(), runs.iter().flatten().count());
            }
            let mut all: Vec<_> =
                asked.iter().map(|page| model[page.number() as usize]).collect();
            all.dedup();
            let expected = if let [location] = all[..] { location } else { None };
            prop_assert_eq!(policy.preferred(space(), asked), expected);
            prop_assert_eq!(policy.preferred(SpaceId::new(), asked), None);
        }

        #[test]
        fn plans_follow_the_preference_and_end_where_it_differs(
            steps in some_steps(), planned in some_range(), at in 0u64..64,
            location in some_location(), order in 0u8..7,
        ) {
            let policy = PreferredLocation::new();
            let mut model: Model = [None; 64];
            steps.iter().for_each(|step| apply(&policy, &mut model, step));
            let at = planned.first().number() + at % planned.pages();
            let plan = DevicePlan { location, range: planned, nap: Duration::ZERO };
            let plan = device_plan(&policy, at, plan);
            let expected = model[at as usize].unwrap_or(location);
            prop_assert_eq!(plan.location, expected);
            let allowed = |number: u64| model[number as usize].is_none_or(|other| other == expected);
            let pages: Vec<u64> = plan.range.iter().map(Page::number).collect();
            prop_assert_eq!(pages, part(planned, at, allowed));

            let order = Order::new(order).expect("an order");
            let block = page(at).block(order);
            let planned = join(planned, block);
            let mut plan = HomePlan { range: planned, nap: Duration::ZERO };
            policy.cpu_fault(&cpu_fault(page(at), order, 0), &mut plan);
            let allowed = |number: u64| model[number as usize] != Some(Location::Device);
            let part = part(planned, at, allowed);
            let part = PageRange::from_bounds(page(part[0]), page(part[part.len() - 1]));
            prop_assert_eq!(plan.range, join(part.expect("a range"), block));
        }

        #[test]
        fn the_oldest_ranges_are_forgotten_and_nothing_is_made_up(steps in some_steps()) {
            let policy = PreferredLocation::with_limit(3);
            let mut model: Model = [None; 64];
            for step in &steps {
                apply(&policy, &mut model, step);
                let state = lock(&policy.state);
                prop_assert!(state.ranges.len() <= 3);
                for number in 0..64 {
                    let remembered = state.at(space(), page(number));
                    prop_assert!(remembered.is_none() || remembered == model[number as usize]);
                }
                if let Step::Prefer(range, location) = *step {
                    drop(state);
                    prop_assert_eq!(policy.preferred(space(), range), Some(location));
                }
            }
        }
    }

    #[test]
    fn a_preference_may_hold_for_the_whole_address_space() {
        let policy = PreferredLocation::new();
        policy.prefer(space(), PageRange::ALL, Location::Device);
        policy.prefer(space(), Page::MAX.into(), Location::System);
        policy.clear(space(), page(0).into());
        assert_eq!(policy.preferred(space(), Page::MAX.into()), Some(Location::System));
        assert_eq!(policy.preferred(space(), page(1).into()), Some(Location::Device));
        assert_eq!(policy.preferred(space(), page(0).into()), None);
        assert_eq!(policy.preferred(space(), PageRange::ALL), None);
        assert_eq!(policy.figures()[0], ("ranges", 2));
    }

    #[test]
    fn without_a_preference_a_plan_is_left_as_it_is() {
        let policy = PreferredLocation::new();
        let plan = DevicePlan {
            location: Location::System,
            range: range(0, 64),
            nap: Duration::from_nanos(3),
        };
        assert_eq!(device_plan(&policy, 5, plan), plan);
        assert!(policy.figures().iter().all(|&(_, count)| count == 0));
    }

    #[test]
    fn the_figures_count_what_was_decided_and_forgotten() {
        let policy = PreferredLocation::with_limit(1);
        let plan =
            DevicePlan { location: Location::Device, range: range(0, 1), nap: Duration::ZERO };
        policy.prefer(space(), range(8, 1), Location::Device);
        policy.prefer(space(), range(0, 1), Location::System);
        assert_eq!(device_plan(&policy, 0, plan).location, Location::System);
        let figures = [("ranges", 1), ("system", 1), ("device", 0), ("forgotten", 1)];
        assert_eq!(policy.figures(), figures);
    }
}
