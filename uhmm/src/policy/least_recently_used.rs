//! Eviction of what has not been used for the longest time.

use super::{Candidate, Policy, Verdict};

/// The block whose last use is the longest ago leaves a full device first (F47).
///
/// A use is a fault of the device at the block, its arrival, or what the device's author reports by
/// [`DevicePagemap::touch`](crate::DevicePagemap::touch). A device that reports nothing and seldom
/// faults is served as by [`FirstIn`](super::FirstIn), which is what happens without any policy, so
/// this one is never the worse choice by much. Remembers nothing, and has no figures.
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "lru")]
pub struct LeastRecentlyUsed;

impl Policy for LeastRecentlyUsed {
    fn name(&self) -> &'static str {
        "least recently used"
    }

    fn is_prompt(&self) -> bool {
        true
    }

    fn victim(&self, candidate: &Candidate, verdict: &mut Verdict) {
        verdict.rank = super::nanoseconds(candidate.used);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::FirstIn;
    use crate::policy::testing::{candidate, victims};

    proptest! {
        #[test]
        fn the_order_is_that_of_use_and_the_other_policy_s_that_of_arrival(
            times in prop::collection::vec((0u64..1000, 0u64..1000), 0..20)
        ) {
            let candidates: Vec<Candidate> = times
                .iter()
                .map(|&(arrived, later)| candidate(arrived, arrived + later, 5000))
                .collect();
            let used: Vec<_> = victims(&LeastRecentlyUsed, &candidates);
            prop_assert!(used.is_sorted_by_key(|candidate| candidate.used));
            let arrived: Vec<_> = victims(&FirstIn, &candidates);
            prop_assert!(arrived.is_sorted_by_key(|candidate| candidate.arrived));
        }
    }

    #[test]
    fn protection_by_an_earlier_policy_stays() {
        let mut verdict = Verdict { protected: true, rank: 0 };
        LeastRecentlyUsed.victim(&candidate(1, 7, 9), &mut verdict);
        assert_eq!(verdict, Verdict { protected: true, rank: 7 });
        FirstIn.victim(&candidate(1, 7, 9), &mut verdict);
        assert_eq!(verdict, Verdict { protected: true, rank: 1 });
    }
}
