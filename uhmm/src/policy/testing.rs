//! Faults, moves and candidates for the tests of policies, all of one space and one device.

use std::sync::OnceLock;
use std::time::Duration;

use mmu_notifier::Owner;

use super::*;
use crate::entry::DeviceFrame;

pub(super) fn space() -> SpaceId {
    static SPACE: OnceLock<SpaceId> = OnceLock::new();
    *SPACE.get_or_init(SpaceId::new)
}

pub(super) fn owner() -> Owner {
    static OWNER: OnceLock<Owner> = OnceLock::new();
    *OWNER.get_or_init(Owner::new)
}

pub(super) fn page(number: u64) -> Page {
    Page::new(number).expect("a test's page is a page")
}

pub(super) fn cpu_fault(page: Page, order: Order, now: u64) -> CpuFault {
    CpuFault { space: space(), owner: owner(), page, order, now: Duration::from_nanos(now) }
}

pub(super) fn device_fault<'a>(
    page: Page,
    now: u64,
    snapshot: &'a dyn Fn(PageRange) -> Vec<PageEntry>,
) -> DeviceFault<'a> {
    DeviceFault {
        space: space(),
        owner: owner(),
        page,
        access: Access::Write,
        mirror: PageRange::ALL,
        now: Duration::from_nanos(now),
        snapshot,
    }
}

pub(super) fn moved(first: u64, pages: u64, to: Location, cause: MigrateCause, now: u64) -> Moved {
    Moved {
        space: Some(space()),
        pages: PageRange::from_pages(page(first), pages).expect("a test's range is a range"),
        owner: owner(),
        to,
        cause,
        now: Duration::from_nanos(now),
    }
}

pub(super) fn candidate(arrived: u64, used: u64, now: u64) -> Candidate {
    Candidate {
        location: DeviceLocation { owner: owner(), frame: DeviceFrame(arrived) },
        order: Order::PAGE,
        arrived: Duration::from_nanos(arrived),
        used: Duration::from_nanos(used),
        now: Duration::from_nanos(now),
    }
}

/// Returns the candidates in the order in which they would leave.
pub(super) fn victims(policy: &dyn Policy, candidates: &[Candidate]) -> Vec<Candidate> {
    let mut candidates = candidates.to_vec();
    candidates.sort_by_cached_key(|candidate| {
        let mut verdict = Verdict { protected: false, rank: nanoseconds(candidate.arrived) };
        policy.victim(candidate, &mut verdict);
        verdict
    });
    candidates
}
