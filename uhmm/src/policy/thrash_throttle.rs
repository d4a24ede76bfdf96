//! What becomes of pages that two sides take from each other.

use std::collections::VecDeque;
use std::time::Duration;

use super::recent::Recent;
use super::{CpuFault, DeviceFault, DevicePlan, HomePlan, Location, MigrateCause, Moved, Policy};
use crate::address_space::SpaceId;
use crate::entry::Residency;
use crate::page::Page;
use crate::primitive::{Mutex, lock};

/// A page that goes back and forth too fast makes whoever wants it next wait (F52).
///
/// A page that changed direction `events` times within `window`, moved each time by a fault, is
/// thrashing. Whoever faults on it then sleeps for `nap` first, device or CPU, so the other side has
/// the page for at least as long and gets work done in one piece. Nothing is pinned and no request
/// is refused; moves that somebody asked for, and evictions, do not count.
///
/// The defaults, three events within 500 µs and a nap of 250 µs, are safe because a page that
/// moves less often is never delayed, and one that does is delayed by a bounded time a fault. The
/// history decays by itself: only the last `window` counts, and a nap uses up half of it.
///
/// Remembers the last 1024 moves, each of a run of pages, for `window`, and the last 1024 pages that
/// thrashed. Figures:
///
/// * `thrashing`: pages found to be thrashing, each once until it has had no nap for `window`;
/// * `naps`: faults that waited.
#[derive(Debug)]
pub struct ThrashThrottle {
    events: usize,
    window: Duration,
    nap: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    moves: Recent,
    /// Pages that thrash, each with the end of its last nap: at most [`Recent::LIMIT`], in the order
    /// of their last naps.
    thrashing: VecDeque<(SpaceId, Page, Duration)>,
    detected: u64,
    naps: u64,
}

impl ThrashThrottle {
    /// The default number of changes of direction.
    pub const EVENTS: usize = 3;

    /// The default time within which they happen.
    pub const WINDOW: Duration = Duration::from_micros(500);

    /// The default time for which a fault waits.
    pub const NAP: Duration = Duration::from_micros(250);

    /// Makes the policy with the defaults.
    pub fn new() -> ThrashThrottle {
        ThrashThrottle {
            events: ThrashThrottle::EVENTS,
            window: ThrashThrottle::WINDOW,
            nap: ThrashThrottle::NAP,
            state: Mutex::default(),
        }
    }

    /// Sets how many changes of direction mean thrashing. Fewer than two are taken as two: one
    /// move is none.
    #[must_use]
    pub fn events(self, events: usize) -> ThrashThrottle {
        ThrashThrottle { events: events.max(2), ..self }
    }

    /// Sets within what time they must happen.
    #[must_use]
    pub fn window(self, window: Duration) -> ThrashThrottle {
        ThrashThrottle { window, ..self }
    }

    /// Sets how long a fault on a page that thrashes waits. Zero turns the policy off.
    #[must_use]
    pub fn nap(self, nap: Duration) -> ThrashThrottle {
        ThrashThrottle { nap, ..self }
    }

    /// Tells whether the page thrashes.
    fn is_thrashing(&self, space: SpaceId, page: Page, now: Duration) -> bool {
        let state = lock(&self.state);
        let mut changes = 0;
        let mut newer = None;
        for moved in state.moves.of(space, page, now, self.window) {
            // Two moves in one direction are one change: the move between them was not by a fault.
            changes += usize::from(newer != Some(moved.to));
            newer = Some(moved.to);
        }
        changes >= self.events && !self.nap.is_zero()
    }

    /// Counts a nap, and returns it.
    fn give_nap(&self, space: SpaceId, page: Page, now: Duration) -> Duration {
        let state = &mut *lock(&self.state);
        let known = state.thrashing.iter().position(|&(of, at, _)| (of, at) == (space, page));
        let before = known.and_then(|index| state.thrashing.remove(index));
        let is_new = before.is_none_or(|(.., end)| now.saturating_sub(end) >= self.window);
        while state.thrashing.len() >= Recent::LIMIT {
            state.thrashing.pop_front();
        }
        state.thrashing.push_back((space, page, now.saturating_add(self.nap)));
        state.detected += u64::from(is_new);
        state.naps += 1;
        self.nap
    }
}

impl Default for ThrashThrottle {
    fn default() -> ThrashThrottle {
        ThrashThrottle::new()
    }
}

impl Policy for ThrashThrottle {
    fn name(&self) -> &'static str {
        "thrash throttle"
    }

    fn device_fault(&self, fault: &DeviceFault<'_>, plan: &mut DevicePlan) {
        if plan.location == Location::System
            || !self.is_thrashing(fault.space, fault.page, fault.now)
        {
            return;
        }
        // Asked with no lock held. A page that is there already is not taken from anybody.
        let entries = fault.snapshot(fault.page.into());
        if matches!(entries[0].residency, Residency::Device(at) if at.owner == fault.owner) {
            return;
        }
        plan.nap = plan.nap.max(self.give_nap(fault.space, fault.page, fault.now));
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        if self.is_thrashing(fault.space, fault.page, fault.now) {
            plan.nap = plan.nap.max(self.give_nap(fault.space, fault.page, fault.now));
        }
    }

    fn moved(&self, moved: &Moved) {
        let by_fault = matches!(
            moved.cause,
            MigrateCause::DeviceFault | MigrateCause::CpuFault | MigrateCause::PeerFault
        );
        if by_fault && moved.space.is_some() {
            lock(&self.state).moves.note(*moved, self.window);
        }
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let state = lock(&self.state);
        vec![("thrashing", state.detected), ("naps", state.naps)]
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::entry::{DeviceFrame, DeviceLocation, Frame, PageEntry};
    use crate::page::Order;
    use crate::policy::testing::{cpu_fault, device_fault, moved, owner, page};

    fn policy() -> ThrashThrottle {
        ThrashThrottle::new().window(Duration::from_nanos(500)).nap(Duration::from_nanos(250))
    }

    /// Returns how many nanoseconds a CPU that touches page `number` at `now` is to wait.
    fn touch(policy: &ThrashThrottle, number: u64, now: u64) -> u64 {
        let mut plan = HomePlan { range: page(number).into(), nap: Duration::ZERO };
        policy.cpu_fault(&cpu_fault(page(number), Order::PAGE, now), &mut plan);
        u64::try_from(plan.nap.as_nanos()).expect("a short time")
    }

    /// The same for a device that faults on a page with this residency.
    fn fault(policy: &ThrashThrottle, plan: Location, residency: Residency, now: u64) -> u64 {
        let snapshot = |_| vec![PageEntry { residency, ..PageEntry::default() }];
        let fault = device_fault(page(0), now, &snapshot);
        let range = page(0).into();
        let mut plan = DevicePlan { location: plan, range, nap: Duration::ZERO };
        policy.device_fault(&fault, &mut plan);
        u64::try_from(plan.nap.as_nanos()).expect("a short time")
    }

    fn there(policy: &ThrashThrottle, now: u64) {
        policy.moved(&moved(0, 1, Location::Device, MigrateCause::DeviceFault, now));
    }

    fn home(policy: &ThrashThrottle, now: u64) {
        policy.moved(&moved(0, 1, Location::System, MigrateCause::CpuFault, now));
    }

    #[test]
    fn three_changes_within_the_window_make_the_next_fault_wait() {
        let policy = policy();
        there(&policy, 0);
        home(&policy, 100);
        let system = Residency::System(Frame(0));
        assert_eq!(fault(&policy, Location::Device, system, 150), 0);
        there(&policy, 200);
        assert_eq!((touch(&policy, 0, 250), touch(&policy, 1, 250)), (250, 0));
        assert_eq!((touch(&policy, 0, 499), touch(&policy, 0, 500)), (250, 0));
        assert_eq!(policy.figures(), [("thrashing", 1), ("naps", 2)]);
        // After the window without a nap it is found anew.
        there(&policy, 2000);
        there(&policy, 2200);
        home(&policy, 2100);
        assert_eq!(touch(&policy, 0, 2250), 0, "out of order: the newest two are one direction");
        home(&policy, 2300);
        there(&policy, 2310);
        home(&policy, 2320);
        assert_eq!(fault(&policy, Location::Device, system, 2330), 250);
        assert_eq!(policy.figures(), [("thrashing", 2), ("naps", 3)]);
    }

    #[test]
    fn a_device_does_not_wait_for_what_it_has_or_will_not_get() {
        let policy = policy();
        there(&policy, 0);
        home(&policy, 1);
        there(&policy, 2);
        let own = Residency::Device(DeviceLocation { owner: owner(), frame: DeviceFrame(0) });
        assert_eq!(fault(&policy, Location::Device, own, 3), 0);
        let system = Residency::System(Frame(0));
        assert_eq!(fault(&policy, Location::System, system, 3), 0);
        assert_eq!(fault(&policy, Location::Device, system, 3), 250);
    }

    #[test]
    fn moves_that_were_asked_for_and_evictions_do_not_count() {
        let policy = policy();
        for now in 0..10 {
            there(&policy, now);
            policy.moved(&moved(0, 1, Location::System, MigrateCause::Request, now));
            let evicted = moved(0, 1, Location::System, MigrateCause::Eviction, now);
            policy.moved(&Moved { space: None, ..evicted });
        }
        assert_eq!(touch(&policy, 0, 10), 0);
        assert_eq!(policy.figures(), [("thrashing", 0), ("naps", 0)]);
    }

    #[test]
    fn what_it_remembers_is_bounded() {
        let policy = policy();
        let pages = Recent::LIMIT as u64 + 10;
        let all = |to, cause, now| policy.moved(&moved(0, pages, to, cause, now));
        all(Location::Device, MigrateCause::DeviceFault, 0);
        all(Location::System, MigrateCause::CpuFault, 1);
        all(Location::Device, MigrateCause::DeviceFault, 2);
        (0..pages).for_each(|number| assert_eq!(touch(&policy, number, 3), 250));
        assert_eq!(lock(&policy.state).thrashing.len(), Recent::LIMIT);
        assert_eq!(policy.figures(), [("thrashing", pages), ("naps", pages)]);
    }

    proptest! {
        /// The model keeps the whole history of each page.
        #[test]
        fn naps_are_those_of_each_page_s_whole_history(
            events in 0usize..6,
            steps in prop::collection::vec(
                (0u64..8, 1u64..5, 0u64..120, 0u8..3), 0..80
            )
        ) {
            let policy = policy().events(events);
            let mut history: Vec<Vec<(u64, bool)>> = vec![Vec::new(); 16];
            let (mut now, mut naps) = (0, 0);
            for (first, pages, later, what) in steps {
                now += later;
                if what == 0 {
                    let within = history[first as usize].iter().filter(|(at, _)| now - at < 500);
                    let mut directions: Vec<bool> = within.map(|&(_, to)| to).collect();
                    directions.dedup();
                    let expected = if directions.len() >= events.max(2) { 250 } else { 0 };
                    prop_assert_eq!(touch(&policy, first, now), expected);
                    naps += u64::from(expected > 0);
                    continue;
                }
                let (to, cause) = match what {
                    1 => (Location::Device, MigrateCause::DeviceFault),
                    _ => (Location::System, MigrateCause::CpuFault),
                };
                policy.moved(&moved(first, pages, to, cause, now));
                for history in &mut history[first as usize..][..pages as usize] {
                    history.push((now, to == Location::Device));
                }
            }
            prop_assert_eq!(policy.figures()[1], ("naps", naps));
        }
    }
}
