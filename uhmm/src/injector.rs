//! Failures on demand: every step that can fail asks whether it is to fail now.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::primitive::{Mutex, lock};

/// Makes chosen steps fail. Its copies are one injector.
///
/// A step has a name, such as `"copy"`, and asks [`fails`](Injector::fails) each time it runs. By
/// default nothing fails. Used by the simulated address space and the software devices; the names
/// that each knows are in its documentation.
///
/// ```
/// use uhmm::Injector;
///
/// let injector = Injector::new();
/// injector.fail("copy", 1);
/// assert!(!injector.fails("copy"));
/// assert!(injector.fails("copy"));
/// assert!(!injector.fails("copy"));
/// assert_eq!(injector.asked("copy"), 3);
/// ```
#[derive(Clone, Default)]
pub struct Injector(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    steps: BTreeMap<&'static str, Step>,
    /// How many steps, of whatever name, run before one fails.
    any: Option<u64>,
    /// How many steps ran.
    asked: u64,
}

#[derive(Default)]
struct Step {
    asked: u64,
    plan: Plan,
}

#[derive(Clone, Copy, Default)]
enum Plan {
    #[default]
    Never,
    /// Once, after so many more.
    After(u64),
    Always,
}

impl Injector {
    /// Makes an injector that lets everything succeed.
    pub fn new() -> Injector {
        Injector::default()
    }

    /// Lets the step called `name` succeed `after` more times, fail once, and succeed from then on.
    pub fn fail(&self, name: &'static str, after: u64) {
        lock(&self.0).steps.entry(name).or_default().plan = Plan::After(after);
    }

    /// Makes the step called `name` fail from now on.
    pub fn fail_always(&self, name: &'static str) {
        lock(&self.0).steps.entry(name).or_default().plan = Plan::Always;
    }

    /// Makes the step fail that comes after `after` more steps of whatever name, and no other.
    pub fn fail_any(&self, after: u64) {
        lock(&self.0).any = Some(after);
    }

    /// Lets everything succeed again.
    pub fn clear(&self) {
        let mut state = lock(&self.0);
        state.any = None;
        state.steps.values_mut().for_each(|step| step.plan = Plan::Never);
    }

    /// Tells whether the step called `name` is to fail now.
    pub fn fails(&self, name: &'static str) -> bool {
        let mut state = lock(&self.0);
        state.asked += 1;
        let any = match state.any {
            Some(0) => {
                state.any = None;
                true
            }
            Some(left) => {
                state.any = Some(left - 1);
                false
            }
            None => false,
        };
        let step = state.steps.entry(name).or_default();
        step.asked += 1;
        let this = match step.plan {
            Plan::Never => false,
            Plan::After(0) => {
                step.plan = Plan::Never;
                true
            }
            Plan::After(left) => {
                step.plan = Plan::After(left - 1);
                false
            }
            Plan::Always => true,
        };
        any || this
    }

    /// Returns how often the step called `name` ran.
    pub fn asked(&self, name: &'static str) -> u64 {
        lock(&self.0).steps.get(name).map_or(0, |step| step.asked)
    }

    /// Returns how many steps ran, of whatever name.
    pub fn asked_in_all(&self) -> u64 {
        lock(&self.0).asked
    }
}

impl fmt::Debug for Injector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.0);
        let asked = state.steps.iter().map(|(name, step)| (name, step.asked));
        f.debug_map().entries(asked).finish()
    }
}
