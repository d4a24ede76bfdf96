//! What must never happen, and did.

use std::fmt;

use uhmm::primitive::{Mutex, lock};

/// How many are kept. The first say what went wrong; the rest follow from it.
const KEPT: usize = 100;

/// The rules that were seen broken.
#[derive(Default)]
pub(crate) struct Violations(Mutex<Vec<String>>);

impl Violations {
    pub(crate) fn report(&self, violation: String) {
        tracing::error!(target: "uhmm", %violation, "violation");
        let mut kept = lock(&self.0);
        if kept.len() < KEPT {
            kept.push(violation);
        }
    }

    pub(crate) fn list(&self) -> Vec<String> {
        lock(&self.0).clone()
    }
}

impl fmt::Debug for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.list()).finish()
    }
}
