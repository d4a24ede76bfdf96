//! What must never happen, and did.

use std::fmt;
use std::sync::Arc;

use uhmm::primitive::{Mutex, lock};

/// How many are kept. The first say what went wrong; the rest follow from it.
const KEPT: usize = 100;

/// What is called with each violation.
pub(crate) type Alarm = Arc<dyn Fn(&str) + Send + Sync>;

/// The rules that were seen broken.
#[derive(Default)]
pub(crate) struct Violations {
    kept: Mutex<Vec<String>>,
    alarm: Option<Alarm>,
    /// Changes are seen after they were made, so entries may contradict what nobody has invalidated
    /// yet.
    pub(crate) observed: bool,
}

impl Violations {
    pub(crate) fn new(alarm: Option<Alarm>, observed: bool) -> Violations {
        Violations { kept: Mutex::default(), alarm, observed }
    }

    pub(crate) fn report(&self, violation: String) {
        tracing::error!(target: "uhmm", %violation, "violation");
        if let Some(alarm) = &self.alarm {
            alarm(&violation);
        }
        let mut kept = lock(&self.kept);
        if kept.len() < KEPT {
            kept.push(violation);
        }
    }

    pub(crate) fn list(&self) -> Vec<String> {
        lock(&self.kept).clone()
    }
}

impl fmt::Debug for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.list()).finish()
    }
}
