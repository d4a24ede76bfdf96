//! How long a page stays where it has just been brought.

use std::time::Duration;

use super::recent::Recent;
use super::{Candidate, CpuFault, HomePlan, Location, MigrateCause, Moved, Policy, Verdict};
use crate::primitive::{Mutex, lock};

/// What has just come to a device stays for a moment, so that the device gets to use it (F48).
///
/// A page that goes home between a device's fault and its access was moved for nothing, and two
/// sides that take it from each other at once may both go on for ever. For `time` after its
/// arrival,
///
/// * a block leaves a full device only if no older one can, and
/// * a CPU that touches a page which came by a fault of the device first sleeps for the rest of that
///   time. Pages that somebody asked to be moved are not waited for.
///
/// The default of 100 µs is long against the repetition of an access on a device, and short
/// against what the thread that waits has to notice. It is safe because it only ever delays: a CPU
/// waits at most `time` in one fault, and a full device still gives up what it must.
///
/// Remembers the last 1024 arrivals, each of a run of pages, for `time`. Figures:
///
/// * `naps`: faults of CPUs that waited;
/// * `protected`: times that a block was put behind the others in an eviction.
#[derive(Debug)]
#[doc(alias = "timeslice")]
pub struct MinimumResidency {
    time: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    arrivals: Recent,
    naps: u64,
    protected: u64,
}

impl MinimumResidency {
    /// The default time.
    pub const TIME: Duration = Duration::from_micros(100);

    /// Makes the policy with the default time.
    pub fn new() -> MinimumResidency {
        MinimumResidency { time: MinimumResidency::TIME, state: Mutex::default() }
    }

    /// Sets for how long a page stays. Zero turns the policy off.
    #[must_use]
    pub fn time(self, time: Duration) -> MinimumResidency {
        MinimumResidency { time, ..self }
    }
}

impl Default for MinimumResidency {
    fn default() -> MinimumResidency {
        MinimumResidency::new()
    }
}

impl Policy for MinimumResidency {
    fn name(&self) -> &'static str {
        "minimum residency"
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        let mut state = lock(&self.state);
        // The page is on the device now, so its newest arrival is the one that counts.
        let arrival = state
            .arrivals
            .of(fault.space, fault.page, fault.now, self.time)
            .find(|moved| moved.owner == fault.owner);
        let Some(arrival) = arrival else { return };
        if arrival.cause != MigrateCause::DeviceFault {
            return;
        }
        let rest = self.time - fault.now.saturating_sub(arrival.now);
        plan.nap = plan.nap.max(rest);
        state.naps += 1;
    }

    fn victim(&self, candidate: &Candidate, verdict: &mut Verdict) {
        if candidate.now.saturating_sub(candidate.arrived) < self.time {
            verdict.protected = true;
            lock(&self.state).protected += 1;
        }
    }

    fn moved(&self, moved: &Moved) {
        if moved.to == Location::Device && moved.space.is_some() {
            lock(&self.state).arrivals.note(*moved, self.time);
        }
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let state = lock(&self.state);
        vec![("naps", state.naps), ("protected", state.protected)]
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::{Order, PageRange};
    use crate::policy::testing::{candidate, cpu_fault, moved, page, victims};

    /// Returns how many nanoseconds a CPU that touches page `number` at `now` is to wait.
    fn touch(policy: &MinimumResidency, number: u64, now: u64) -> u64 {
        let mut plan = HomePlan { range: page(number).into(), nap: Duration::ZERO };
        policy.cpu_fault(&cpu_fault(page(number), Order::PAGE, now), &mut plan);
        assert_eq!(plan.range, PageRange::from(page(number)));
        u64::try_from(plan.nap.as_nanos()).expect("a short time")
    }

    fn policy(time: u64) -> MinimumResidency {
        MinimumResidency::new().time(Duration::from_nanos(time))
    }

    #[test]
    fn a_cpu_waits_for_the_rest_of_the_time_and_only_after_a_fault_of_the_device() {
        let policy = policy(100);
        policy.moved(&moved(0, 4, Location::Device, MigrateCause::DeviceFault, 1000));
        assert_eq!((touch(&policy, 3, 1000), touch(&policy, 3, 1040)), (100, 60));
        assert_eq!((touch(&policy, 3, 1099), touch(&policy, 3, 1100)), (1, 0));
        // By a thread that read the clock before the page arrived.
        assert_eq!(touch(&policy, 0, 990), 100);
        assert_eq!(touch(&policy, 4, 1000), 0);
        // It went home, and came back because somebody asked for it.
        policy.moved(&moved(3, 1, Location::System, MigrateCause::CpuFault, 1010));
        policy.moved(&moved(3, 1, Location::Device, MigrateCause::Request, 1020));
        assert_eq!((touch(&policy, 3, 1030), touch(&policy, 2, 1030)), (0, 70));
        assert_eq!(policy.figures(), [("naps", 5), ("protected", 0)]);
    }

    #[test]
    fn a_longer_nap_that_is_planned_stays() {
        let policy = policy(100);
        policy.moved(&moved(0, 1, Location::Device, MigrateCause::DeviceFault, 0));
        let mut plan = HomePlan { range: page(0).into(), nap: Duration::from_nanos(150) };
        policy.cpu_fault(&cpu_fault(page(0), Order::PAGE, 0), &mut plan);
        assert_eq!(plan.nap, Duration::from_nanos(150));
    }

    #[test]
    fn what_has_just_arrived_leaves_last_and_nothing_is_kept_for_ever() {
        let policy = policy(100);
        let candidates = [candidate(950, 950, 1000), candidate(20, 990, 1000)];
        let order = victims(&policy, &candidates);
        assert_eq!(order[0], candidates[1]);
        assert_eq!(order.len(), 2, "a protected block is still a candidate");
        assert_eq!(policy.figures(), [("naps", 0), ("protected", 1)]);
    }

    #[test]
    fn zero_turns_it_off() {
        let policy = policy(0);
        policy.moved(&moved(0, 1, Location::Device, MigrateCause::DeviceFault, 0));
        assert_eq!(touch(&policy, 0, 0), 0);
        let mut verdict = Verdict::default();
        policy.victim(&candidate(0, 0, 0), &mut verdict);
        assert!(!verdict.protected);
    }

    proptest! {
        /// The model keeps the last arrival of each page and nothing else.
        #[test]
        fn naps_are_those_of_a_map_from_each_page_to_its_last_arrival(
            steps in prop::collection::vec(
                (0u64..8, 1u64..5, 0u64..60, 0u8..4), 0..60
            )
        ) {
            let policy = policy(100);
            let mut last: [Option<(u64, bool)>; 16] = [None; 16];
            let mut now = 0;
            for (first, pages, later, what) in steps {
                now += later;
                if what == 0 {
                    let expected = match last[first as usize] {
                        Some((at, true)) => 100u64.saturating_sub(now - at),
                        _ => 0,
                    };
                    prop_assert_eq!(touch(&policy, first, now), expected);
                    continue;
                }
                let (to, cause) = match what {
                    1 => (Location::Device, MigrateCause::DeviceFault),
                    2 => (Location::Device, MigrateCause::Request),
                    _ => (Location::System, MigrateCause::CpuFault),
                };
                policy.moved(&moved(first, pages, to, cause, now));
                if to == Location::Device {
                    let arrival = Some((now, cause == MigrateCause::DeviceFault));
                    last[first as usize..][..pages as usize].fill(arrival);
                }
            }
        }
    }
}
