//! Eviction of what arrived first.

use super::{Candidate, Policy, Verdict};

/// The block that arrived first leaves a full device first (F47).
///
/// Takes the place of [`LeastRecentlyUsed`](super::LeastRecentlyUsed) where uses cannot be told or
/// say nothing, as when a device passes over its data once. It is also what happens without any
/// policy. Remembers nothing, and has no figures.
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "fifo")]
pub struct FirstIn;

impl Policy for FirstIn {
    fn name(&self) -> &'static str {
        "first in"
    }

    fn is_prompt(&self) -> bool {
        true
    }

    fn victim(&self, candidate: &Candidate, verdict: &mut Verdict) {
        verdict.rank = super::nanoseconds(candidate.arrived);
    }
}
