//! Policies: each changes what moves and when, as its page says, and none changes what is read.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Rig, page, range, word};
use proptest::prelude::*;
use uhmm::policy::{
    Candidate, CpuFault, DensityPrefetch, DeviceFault, DevicePlan, FaultAround, FirstIn, HomePlan,
    LeastRecentlyUsed, Location, MigrateCause, MinimumResidency, Moved, Policies, Policy,
    PreferredLocation, ThrashThrottle, Verdict,
};
use uhmm::primitive::{Mutex, lock};
use uhmm::sim::Mapping;
use uhmm::{Access, Order, PageRange, PagemapOptions};

/// Maps `pages` pages for a device of as much memory.
fn rig(pages: u64, policies: Policies) -> Rig {
    rig_of(pages, pages, policies)
}

fn rig_of(pages: u64, device_pages: u64, policies: Policies) -> Rig {
    Rig::with(pages, device_pages as usize, PagemapOptions::new().policies(policies))
}

/// Returns what the only policy of the device counted under `name`.
fn figure(rig: &Rig, name: &str) -> u64 {
    let figures = rig.pagemap.policies().figures();
    let [(_, figures)] = &figures[..] else { panic!("more than one policy: {figures:?}") };
    let found = figures.iter().find(|(other, _)| *other == name);
    found.unwrap_or_else(|| panic!("no `{name}` in {figures:?}")).1
}

fn on_device(rig: &Rig, pages: u64) -> Vec<u64> {
    (0..pages).filter(|&index| rig.on_device(index)).collect()
}

/// Lets the time of the policies go by.
fn pass(rig: &Rig, time: Duration) {
    rig.pagemap.clock().sleep(time);
}

/// Does something, and returns how much of the policies' time it took.
fn time_of(rig: &Rig, f: impl FnOnce()) -> Duration {
    let before = rig.pagemap.clock().now();
    f();
    rig.pagemap.clock().now() - before
}

fn migrate(rig: &Rig, pages: PageRange) {
    let report = rig.process.address_space().migrate(pages, &rig.pagemap).run();
    assert!(report.is_complete(), "{report:?}");
}

#[track_caller]
fn cpu_load(rig: &Rig, index: u64) -> u64 {
    rig.process.load_u64(word(index)).expect("memory is there")
}

#[track_caller]
fn device_load(rig: &Rig, index: u64) -> u64 {
    rig.device_load(word(index)).expect("the device has its fault served")
}

const MICROSECOND: Duration = Duration::from_micros(1);

#[test]
fn only_those_that_never_make_a_cpu_wait_are_prompt() {
    let prompt: [Arc<dyn Policy>; 4] = [
        Arc::new(FaultAround::new()),
        Arc::new(DensityPrefetch::new()),
        Arc::new(LeastRecentlyUsed),
        Arc::new(FirstIn),
    ];
    assert!(Policies::none().are_prompt());
    assert!(Policies::new(prompt.clone()).are_prompt());
    let others: [Arc<dyn Policy>; 2] =
        [Arc::new(MinimumResidency::new()), Arc::new(ThrashThrottle::new())];
    for other in others {
        let policies = Policies::new(prompt.clone()).and_shared(other);
        assert!(!policies.are_prompt(), "{policies:?} can make a CPU wait");
    }
    assert!(!Policies::default().are_prompt());
}

#[test]
fn without_a_policy_each_page_moves_by_its_own_fault() {
    let rig = rig(32, Policies::none());
    rig.fill(32, 100);
    let time = time_of(&rig, || {
        for round in 0..4 {
            for index in 0..32 {
                assert_eq!(device_load(&rig, index), 100 + index);
                assert_eq!(on_device(&rig, 32).len() as u64, index + 1);
            }
            for index in 0..32 {
                assert_eq!(cpu_load(&rig, index), 100 + index, "round {round}");
                assert_eq!(on_device(&rig, 32).len() as u64, 31 - index);
            }
        }
    });
    assert_eq!(time, Duration::ZERO);
    assert_eq!(rig.pagemap.statistics().throttles, 0);
    assert!(rig.pagemap.policies().figures().is_empty());
    rig.finish();
}

/// F51.
#[test]
fn a_walk_of_the_device_takes_a_fault_for_each_doubling() {
    let rig = rig(64, Policies::none().and(DensityPrefetch::new()));
    rig.fill(64, 100);
    let mut faulted = Vec::new();
    for index in 0..64 {
        if !rig.on_device(index) {
            faulted.push(index);
        }
        assert_eq!(device_load(&rig, index), 100 + index);
    }
    assert_eq!(faulted, [0, 1, 2, 4, 8, 16, 32]);
    assert_eq!((figure(&rig, "grown"), figure(&rig, "pages")), (5, 57));
    assert_eq!(rig.process.address_space().mm().statistics().device_faults, 7);
    assert_eq!(rig.pagemap.used(), 64);
    rig.finish();
}

/// F51: what comes along can be used at once, and is entered at once.
#[test]
fn what_came_along_is_in_the_device_s_page_table() {
    let rig = rig(64, Policies::none().and(DensityPrefetch::new().threshold(0)));
    rig.fill(64, 100);
    assert_eq!(device_load(&rig, 20), 120);
    let faults = rig.process.address_space().mm().statistics().device_faults;
    (0..64).for_each(|index| assert_eq!(device_load(&rig, index), 100 + index));
    assert_eq!(rig.process.address_space().mm().statistics().device_faults, faults);
    rig.finish();
}

#[test]
fn a_cpu_s_touch_brings_the_block_home_and_no_more() {
    let rig = rig(48, Policies::none().and(FaultAround::new()));
    rig.fill(48, 100);
    migrate(&rig, range(0, 48));
    assert_eq!(cpu_load(&rig, 20), 120);
    let left: Vec<u64> = (0..16).chain(32..48).collect();
    assert_eq!(on_device(&rig, 48), left);
    assert_eq!(rig.pagemap.statistics().home_by_cpu_fault, 16);
    // No page of the block takes a fault any more.
    (16..32).for_each(|index| assert_eq!(cpu_load(&rig, index), 100 + index));
    assert_eq!(rig.pagemap.statistics().cpu_faults, 1);
    assert_eq!(figure(&rig, "widened"), 1);
    rig.finish();
}

/// A large page comes home whole: the smaller block around the touch takes nothing away.
#[test]
fn a_large_page_is_not_cut_by_the_smaller_block() {
    let rig = rig(512, Policies::none().and(FaultAround::new()));
    let memory = Mapping::anonymous(Access::Write).huge(true);
    rig.process.map(range(0, 512), memory).expect("memory is mapped");
    rig.fill(512, 100);
    migrate(&rig, range(0, 512));
    assert_eq!(rig.process.address_space().snapshot(range(20, 1))[0].order, Order::HUGE);
    assert_eq!(cpu_load(&rig, 20), 120);
    assert_eq!((rig.pagemap.used(), figure(&rig, "widened")), (0, 0));
    rig.finish();
}

/// F48.
#[test]
fn a_cpu_waits_until_the_device_had_its_turn() {
    let rig = rig(2, Policies::none().and(MinimumResidency::new()));
    rig.fill(2, 100);
    device_load(&rig, 0);
    pass(&rig, 30 * MICROSECOND);
    assert_eq!(time_of(&rig, || _ = cpu_load(&rig, 0)), MinimumResidency::TIME - 30 * MICROSECOND);
    assert_eq!(time_of(&rig, || _ = cpu_load(&rig, 0)), Duration::ZERO, "it is home");
    // Later than that, or for pages that were moved on request, nobody waits.
    device_load(&rig, 0);
    pass(&rig, MinimumResidency::TIME);
    assert_eq!(time_of(&rig, || _ = cpu_load(&rig, 0)), Duration::ZERO);
    migrate(&rig, range(0, 2));
    assert_eq!(time_of(&rig, || _ = cpu_load(&rig, 1)), Duration::ZERO);
    assert_eq!((figure(&rig, "naps"), rig.pagemap.statistics().throttles), (1, 1));
    rig.finish();
}

/// F48: a full device gives up what has been there for longer, whatever else is said.
#[test]
fn what_has_just_arrived_is_evicted_last() {
    let left_first = |policies: Policies| {
        let rig = rig_of(3, 2, policies);
        rig.fill(3, 100);
        device_load(&rig, 0);
        pass(&rig, 150 * MICROSECOND);
        device_load(&rig, 1);
        pass(&rig, 20 * MICROSECOND);
        // Used last, but there for long.
        rig.mirror.handle_fault(page(0), Access::Read).expect("it is there");
        assert_eq!(device_load(&rig, 2), 102);
        let left = (0..3).find(|&index| !rig.on_device(index));
        (0..3).for_each(|index| assert_eq!(cpu_load(&rig, index), 100 + index));
        rig.finish();
        left
    };
    assert_eq!(left_first(Policies::none().and(LeastRecentlyUsed)), Some(1));
    let both = Policies::none().and(LeastRecentlyUsed).and(MinimumResidency::new());
    assert_eq!(left_first(both), Some(0));
    let both = Policies::none().and(MinimumResidency::new()).and(LeastRecentlyUsed);
    assert_eq!(left_first(both), Some(0));
}

#[test]
fn a_device_full_of_pages_that_have_just_arrived_still_gives_one_up() {
    let rig = rig_of(3, 2, Policies::none().and(MinimumResidency::new()));
    rig.fill(3, 100);
    let time = time_of(&rig, || {
        (0..3).for_each(|index| assert_eq!(device_load(&rig, index), 100 + index));
    });
    assert_eq!(time, Duration::ZERO);
    assert_eq!(on_device(&rig, 3), [1, 2]);
    assert_eq!(figure(&rig, "protected"), 2);
    rig.finish();
}

/// F52.
#[test]
fn a_page_that_goes_back_and_forth_makes_the_next_fault_wait() {
    let rig = rig(2, Policies::none().and(ThrashThrottle::new()));
    rig.fill(2, 100);
    let quick = time_of(&rig, || {
        device_load(&rig, 0);
        cpu_load(&rig, 0);
        device_load(&rig, 0);
    });
    assert_eq!(quick, Duration::ZERO);
    assert_eq!(time_of(&rig, || _ = cpu_load(&rig, 0)), ThrashThrottle::NAP);
    assert_eq!(time_of(&rig, || _ = device_load(&rig, 0)), ThrashThrottle::NAP);
    assert_eq!((figure(&rig, "thrashing"), figure(&rig, "naps")), (1, 2));
    // Another page is not concerned.
    assert_eq!(time_of(&rig, || _ = device_load(&rig, 1)), Duration::ZERO);
    assert_eq!(time_of(&rig, || _ = cpu_load(&rig, 1)), Duration::ZERO);
    // Nobody waits when the page had its rest.
    pass(&rig, ThrashThrottle::WINDOW);
    assert_eq!(time_of(&rig, || _ = cpu_load(&rig, 0)), Duration::ZERO);
    let of_the_device = rig.process.address_space().mm().statistics().throttles;
    assert_eq!((of_the_device, rig.pagemap.statistics().throttles), (1, 1));
    rig.finish();
}

/// F52: a page cannot go back and forth faster than the policy allows, for however long it is tried.
#[test]
fn thrashing_is_held_to_a_rate() {
    let moves = 200;
    let rig = rig(1, Policies::none().and(ThrashThrottle::new()));
    rig.fill(1, 100);
    let time = time_of(&rig, || {
        for _ in 0..moves / 2 {
            device_load(&rig, 0);
            cpu_load(&rig, 0);
        }
    });
    // Any window holds `EVENTS` moves at most, and the one that ends a nap begun in it.
    let windows = moves / (ThrashThrottle::EVENTS as u32 + 1);
    assert!(time >= (windows - 1) * ThrashThrottle::WINDOW, "{moves} moves took {time:?}");
    assert_eq!(figure(&rig, "thrashing"), 1);
    rig.finish();
}

#[test]
fn pages_that_move_slowly_are_not_thrashing() {
    let rig = rig(1, Policies::none().and(ThrashThrottle::new()));
    rig.fill(1, 100);
    for _ in 0..10 {
        for access in [device_load, cpu_load] {
            assert_eq!(time_of(&rig, || _ = access(&rig, 0)), Duration::ZERO);
            pass(&rig, ThrashThrottle::WINDOW / 2);
        }
    }
    assert_eq!((figure(&rig, "thrashing"), figure(&rig, "naps")), (0, 0));
    rig.finish();
}

/// F47: the order of eviction is a policy, and one is replaced by another.
#[test]
fn eviction_is_by_use_or_by_arrival() {
    let left_first = |policies: Policies| {
        let rig = rig_of(3, 2, policies);
        rig.fill(3, 100);
        for index in [0, 1, 0] {
            rig.mirror.handle_fault(page(index), Access::Read).expect("there is memory");
            pass(&rig, MICROSECOND);
        }
        assert_eq!(device_load(&rig, 2), 102);
        let left = (0..3).find(|&index| !rig.on_device(index));
        rig.finish();
        left
    };
    assert_eq!(left_first(Policies::none().and(LeastRecentlyUsed)), Some(1));
    assert_eq!(left_first(Policies::none().and(FirstIn)), Some(0));
    assert_eq!(left_first(Policies::none().and(LeastRecentlyUsed).and(FirstIn)), Some(0));
    assert_eq!(left_first(Policies::none()), Some(0));
}

/// F54.
#[test]
fn the_user_s_preference_decides_where_the_device_works() {
    let preferred = Arc::new(PreferredLocation::new());
    let rig = rig(8, Policies::none().and_shared(preferred.clone()));
    let space = rig.process.address_space().mm().id();
    rig.fill(8, 100);
    preferred.prefer(space, range(0, 4), Location::System);
    preferred.prefer(space, range(2, 4), Location::Device);
    for index in 0..8 {
        assert_eq!(rig.device_store(word(index), 200 + index), Ok(100 + index));
    }
    assert_eq!(on_device(&rig, 8), [2, 3, 4, 5, 6, 7]);
    assert_eq!(figure(&rig, "ranges"), 2);
    assert_eq!((figure(&rig, "system"), figure(&rig, "device")), (2, 4));
    (0..8).for_each(|index| assert_eq!(cpu_load(&rig, index), 200 + index));
    // It holds from the next fault on, and until it is cleared.
    preferred.clear(space, range(0, 8));
    assert_eq!(figure(&rig, "ranges"), 0);
    rig.process.relocate(range(0, 1));
    device_load(&rig, 0);
    assert!(rig.on_device(0));
    rig.finish();
}

/// F54 with F51: what comes along ends where something else is preferred.
#[test]
fn what_comes_along_ends_where_the_preference_differs() {
    let preferred = Arc::new(PreferredLocation::new());
    let policies = Policies::none()
        .and(DensityPrefetch::new().threshold(0))
        .and(FaultAround::new())
        .and_shared(preferred.clone());
    let rig = rig(64, policies);
    let space = rig.process.address_space().mm().id();
    rig.fill(64, 100);
    preferred.prefer(space, range(20, 4), Location::System);
    device_load(&rig, 40);
    assert_eq!(on_device(&rig, 64), (24..64).collect::<Vec<_>>());
    // And what goes home along with a page: the rest of its block is 34 to 47.
    preferred.prefer(space, range(32, 4), Location::Device);
    cpu_load(&rig, 38);
    let left: Vec<u64> = (24..36).chain(48..64).collect();
    assert_eq!(on_device(&rig, 64), left);
    (0..64).for_each(|index| assert_eq!(cpu_load(&rig, index), 100 + index));
    rig.finish();
}

/// A policy that writes down what it hears.
#[derive(Debug, Default)]
struct Recorder {
    heard: Mutex<Vec<Moved>>,
}

impl Policy for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }

    fn moved(&self, moved: &Moved) {
        lock(&self.heard).push(*moved);
    }
}

#[test]
fn policies_hear_of_every_move_and_its_cause() {
    let recorder = Arc::new(Recorder::default());
    let rig = rig_of(4, 2, Policies::none().and_shared(recorder.clone()));
    let space = Some(rig.process.address_space().mm().id());
    rig.fill(4, 100);
    let check = |expected: &[(Option<_>, u64, u64, Location, MigrateCause)]| {
        let heard: Vec<Moved> = std::mem::take(&mut *lock(&recorder.heard));
        let expected: Vec<Moved> = expected
            .iter()
            .map(|&(space, first, pages, to, cause)| Moved {
                space,
                pages: range(first, pages),
                owner: rig.pagemap.owner(),
                to,
                cause,
                now: rig.pagemap.clock().now(),
            })
            .collect();
        assert_eq!(heard, expected);
    };
    pass(&rig, MICROSECOND);
    migrate(&rig, range(0, 2));
    check(&[(space, 0, 2, Location::Device, MigrateCause::Request)]);
    cpu_load(&rig, 0);
    check(&[(space, 0, 1, Location::System, MigrateCause::CpuFault)]);
    pass(&rig, MICROSECOND);
    device_load(&rig, 2);
    check(&[(space, 2, 1, Location::Device, MigrateCause::DeviceFault)]);
    device_load(&rig, 3);
    check(&[
        (None, 1, 1, Location::System, MigrateCause::Eviction),
        (space, 3, 1, Location::Device, MigrateCause::DeviceFault),
    ]);
    // What did not move is not told of.
    device_load(&rig, 3);
    cpu_load(&rig, 1);
    check(&[]);
    rig.process.address_space().migrate_home(range(0, 4));
    check(&[(space, 2, 2, Location::System, MigrateCause::Request)]);
    rig.finish();
}

/// A policy that asks for nonsense.
#[derive(Debug, Default)]
struct Contrary {
    asked: Mutex<u64>,
}

impl Contrary {
    fn next(&self) -> u64 {
        let mut asked = lock(&self.asked);
        *asked += 1;
        *asked
    }
}

impl Policy for Contrary {
    fn name(&self) -> &'static str {
        "contrary"
    }

    fn device_fault(&self, fault: &DeviceFault<'_>, plan: &mut DevicePlan) {
        match self.next() % 4 {
            0 => plan.location = Location::System,
            1 => plan.range = range(3, 5),
            2 => plan.range = fault.page.block(Order::HUGE),
            _ => plan.range = range(1 << 21, 7),
        }
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        match self.next() % 3 {
            0 => plan.range = range(5, 1),
            1 => plan.range = fault.page.block(Order::HUGE),
            _ => plan.range = range(1 << 21, 7),
        }
    }

    fn victim(&self, _: &Candidate, verdict: &mut Verdict) {
        *verdict = Verdict { protected: self.next().is_multiple_of(3), rank: self.next() * 7 % 5 };
    }
}

/// One access to one page.
#[derive(Clone, Debug)]
enum Step {
    CpuLoad(u64),
    CpuAdd(u64),
    DeviceLoad(u64),
    DeviceAdd(u64),
    Prefer(u64, u64, Location),
    Pass(u64),
}

const PAGES: u64 = 24;

fn some_steps() -> impl Strategy<Value = Vec<Step>> {
    let location = prop_oneof![Just(Location::System), Just(Location::Device)];
    let step = prop_oneof![
        3 => (0..PAGES).prop_map(Step::CpuLoad),
        3 => (0..PAGES).prop_map(Step::CpuAdd),
        3 => (0..PAGES).prop_map(Step::DeviceLoad),
        3 => (0..PAGES).prop_map(Step::DeviceAdd),
        1 => (0..PAGES, 1..PAGES, location).prop_map(|(first, pages, to)| {
            Step::Prefer(first, pages, to)
        }),
        2 => (0u64..300).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 0..80)
}

fn run(rig: &Rig, preferred: &PreferredLocation, steps: &[Step]) {
    let space = rig.process.address_space().mm().id();
    let mut model: Vec<u64> = (100..100 + PAGES).collect();
    rig.fill(PAGES, 100);
    for step in steps {
        match *step {
            Step::CpuLoad(index) => assert_eq!(cpu_load(rig, index), model[index as usize]),
            Step::DeviceLoad(index) => assert_eq!(device_load(rig, index), model[index as usize]),
            Step::CpuAdd(index) => {
                let old = rig.process.fetch_add_u64(word(index), 1);
                assert_eq!(old, Ok(model[index as usize]));
                model[index as usize] += 1;
            }
            Step::DeviceAdd(index) => {
                let value = model[index as usize];
                assert_eq!(rig.device_store(word(index), value + 1), Ok(value));
                model[index as usize] += 1;
            }
            Step::Prefer(first, pages, to) => preferred.prefer(space, range(first, pages), to),
            Step::Pass(time) => pass(rig, Duration::from_micros(time)),
        }
        rig.machine.check().expect("the machine is whole");
    }
    (0..PAGES).for_each(|index| assert_eq!(cpu_load(rig, index), model[index as usize]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever policies say, every access finds the current value.
    #[test]
    fn no_policy_changes_what_is_read(
        which in 0usize..5, device_pages in prop_oneof![Just(0u64), 1u64..32], steps in some_steps()
    ) {
        let preferred = Arc::new(PreferredLocation::new());
        let policies = match which {
            0 => Policies::none(),
            1 => Policies::default(),
            2 => Policies::default().and_shared(preferred.clone()),
            3 => Policies::none().and(Contrary::default()),
            _ => Policies::none()
                .and(DensityPrefetch::new().threshold(0))
                .and(FaultAround::new().order(Order::HUGE))
                .and_shared(preferred.clone())
                .and(MinimumResidency::new().time(Duration::from_secs(1)))
                .and(ThrashThrottle::new().events(0))
                .and(FirstIn),
        };
        let rig = rig_of(PAGES, device_pages, policies);
        run(&rig, &preferred, &steps);
        rig.finish();
    }
}

#[test]
fn the_default_is_the_documented_list() {
    let names: Vec<_> = Policies::default().figures().into_iter().map(|(name, _)| name).collect();
    let expected = [
        "density prefetch",
        "fault around",
        "minimum residency",
        "thrash throttle",
        "least recently used",
    ];
    assert_eq!(names, expected);
    // Two devices that choose nothing do not share what their policies remember.
    let (one, other) = (rig(2, Policies::default()), rig(2, Policies::default()));
    one.fill(2, 0);
    device_load(&one, 0);
    cpu_load(&one, 0);
    let naps = |rig: &Rig| rig.pagemap.policies().figures()[2].1[0];
    assert_eq!((naps(&one), naps(&other)), (("naps", 1), ("naps", 0)));
    one.finish();
    other.finish();
}
