//! Deliberate breaks of the live backend, so that its tests can be seen to fail.
//!
//! `tests/mutants.txt` lists them, each with the test that must notice it, and `cargo xtask mutants
//! --live` runs them: in a build with `--cfg mutant="live"` the environment variable `UHMM_MUTANT`
//! chooses one. In every other build there are none.

/// Tells whether this run is to break the rule called `$name`.
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutant::is($name)
    };
}
pub(crate) use mutant;

/// Tells whether the mutant of this name is chosen.
#[cfg(not(mutant = "live"))]
#[inline(always)]
pub(crate) const fn is(_: &str) -> bool {
    false
}

/// Tells whether the mutant of this name is chosen.
#[cfg(mutant = "live")]
pub(crate) fn is(name: &str) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("UHMM_MUTANT").ok());
    CHOSEN.as_deref() == Some(name)
}

/// Gives everybody else some time where the break would show too seldom.
pub(crate) fn dawdle() {
    std::thread::sleep(std::time::Duration::from_millis(1));
}
