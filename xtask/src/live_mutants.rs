//! Mutants of the live process: deliberate breaks that a test on a real kernel must notice.
//!
//! `uhmm-linux/tests/mutants.txt` has the format of the models' table ([`crate::mutants`]), with a
//! test in the place of a model: `binary::name`, where the binary `lib` holds the library's own
//! tests. All of them are in one build, and an environment variable chooses. What such a mutant breaks
//! is an order of events, so a test may miss it in one run: it has [`TRIES`].

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use crate::mutants::{Mutant, read_table, select};
use crate::step::{CommandLine, Failure, Outcome, failed, target_dir};

/// Where the mutants are listed, and where they are, from the repository root.
const TABLE: &str = "uhmm-linux/tests/mutants.txt";
const SOURCE: &str = "uhmm-linux/src";

/// The environment variable that chooses one.
const VARIABLE: &str = "UHMM_MUTANT";

/// How often a test may miss a mutant.
const TRIES: u32 = 4;

/// How long the stress runs in one try, in seconds.
const STRESS_SECONDS: u32 = 60;

/// How long a test may take. One that is not over by then hangs, which on a real kernel is how some
/// of these breaks show.
const LIMIT: Duration = Duration::from_secs(400);
const BUILD_LIMIT: Duration = Duration::from_secs(1800);

/// The exit code of a test binary in which a test failed.
const TEST_FAILED: i32 = 101;

/// Prints the table.
pub(crate) fn list() -> Result<(), Failure> {
    for Mutant { name, check, sentence } in read_table(TABLE)? {
        println!("{name}\n    must be killed by {}\n    {sentence}", check.model().unwrap_or("?"));
    }
    Ok(())
}

/// Runs the mutants in `names`, or all if there are none, and fails if one survives.
pub(crate) fn run(names: &[String]) -> Result<(), Failure> {
    let wanted = select(TABLE, SOURCE, names)?;
    let binaries = build(&wanted)?;
    let line = |mutant: &Mutant| test_line(&binaries, test_of(mutant));
    let mut passed: Vec<String> = Vec::new();
    let mut survivors = Vec::new();
    for mutant in &wanted {
        let line = line(mutant)?;
        // What is checked against a mutant must hold without one, or the failure shows nothing.
        if !passed.contains(&line.to_string()) {
            check_unbroken(&line)?;
            passed.push(line.to_string());
        }
        if !kill(mutant, &line)? {
            survivors.push(mutant.name.as_str());
        }
    }
    match survivors.is_empty() {
        true => Ok(()),
        false => failed(format!("mutants survived: {}", survivors.join(", "))),
    }
}

/// Runs the test against a mutant until it notices, and tells whether it has.
fn kill(mutant: &Mutant, line: &CommandLine) -> Result<bool, Failure> {
    let Mutant { name, sentence, .. } = mutant;
    let line = line.clone().variable(VARIABLE, name);
    for run in 1..=TRIES {
        let outcome = line.capture(LIMIT)?;
        if noticed(&outcome) {
            println!("killed    {name}  in run {run}  {:.1} s", outcome.seconds);
            return Ok(true);
        }
    }
    println!("SURVIVED  {name}  {TRIES} runs\n    {sentence}\n    {line}");
    Ok(false)
}

/// Tells whether the one test that ran has failed, has been ended by a signal, or hangs.
fn noticed(outcome: &Outcome) -> bool {
    let one = outcome.stdout.lines().any(|line| line == "running 1 test");
    let failed = |code| code == Some(TEST_FAILED) && outcome.stdout.contains("0 passed; 1 failed");
    one && outcome.status.is_none_or(|status| failed(status.code()) || status.signal().is_some())
}

fn check_unbroken(line: &CommandLine) -> Result<(), Failure> {
    let outcome = line.capture(LIMIT)?;
    if outcome.status.is_some_and(|status| status.success())
        && outcome.stdout.contains("ok. 1 passed; 0 failed")
    {
        println!("passed    without a mutant  {:.1} s  {line}", outcome.seconds);
        return Ok(());
    }
    failed(format!("the test itself fails\n{}\n{}\n{line}", outcome.stdout, outcome.stderr))
}

/// Returns the test that must notice a mutant.
fn test_of(mutant: &Mutant) -> &str {
    mutant.check.model().unwrap_or_default()
}

/// Builds the tests that are wanted, and returns the path of each binary by its name.
fn build(wanted: &[Mutant]) -> Result<BTreeMap<String, String>, Failure> {
    let binaries: BTreeSet<&str> =
        wanted.iter().filter_map(|mutant| Some(test_of(mutant).split_once("::")?.0)).collect();
    let targets = binaries.into_iter().map(|binary| match binary {
        "lib" => "--lib".to_owned(),
        test => format!("--test={test}"),
    });
    let line = CommandLine::cargo("test -p uhmm-linux --no-run")
        .arguments(targets)
        .arguments(["--message-format=json-render-diagnostics"])
        .variable("RUSTFLAGS", "--cfg mutant=\"live\"")
        .variable("CARGO_TARGET_DIR", target_dir("mutants-live"));
    println!("==> build: {line}");
    let outcome = line.capture(BUILD_LIMIT)?;
    if !outcome.status.is_some_and(|status| status.success()) {
        return failed(format!("the tests do not build\n{}", outcome.stderr));
    }
    Ok(outcome.stdout.lines().filter_map(executable).collect())
}

/// The test binary in one of cargo's messages, with its name.
fn executable(message: &str) -> Option<(String, String)> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let path = message["executable"].as_str()?.to_owned();
    let is_library = message["target"]["kind"].as_array()?.iter().any(|kind| kind == "lib");
    let name = if is_library { "lib" } else { message["target"]["name"].as_str()? };
    Some((name.to_owned(), path))
}

/// The command that runs `test`, which is `binary::name`.
fn test_line(binaries: &BTreeMap<String, String>, test: &str) -> Result<CommandLine, Failure> {
    let Some((binary, name)) = test.split_once("::") else {
        return failed(format!("`{test}` is no test: want `binary::name`"));
    };
    let Some(path) = binaries.get(binary) else {
        return failed(format!("there is no test binary `{binary}`, for `{test}`"));
    };
    Ok(CommandLine::new(path)
        .words("--exact --include-ignored")
        .arguments([name])
        .variable("UHMM_REQUIRE_UFFD", "1")
        .variable("UHMM_STRESS_SECONDS", STRESS_SECONDS.to_string()))
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    fn ended(raw: Option<i32>, stdout: &str) -> Outcome {
        Outcome {
            status: raw.map(ExitStatus::from_raw),
            stdout: stdout.to_owned(),
            stderr: String::new(),
            seconds: 0.0,
        }
    }

    #[test]
    fn a_failed_test_a_signal_and_a_hang_count_and_nothing_else() {
        let failed = "running 1 test\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n";
        let passed = "running 1 test\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        assert!(noticed(&ended(Some(101 << 8), failed)));
        assert!(noticed(&ended(Some(6), "running 1 test\n")));
        assert!(noticed(&ended(None, "running 1 test\n")));
        assert!(!noticed(&ended(Some(0), passed)));
        // A usage error; no test, or several.
        assert!(!noticed(&ended(Some(101 << 8), "running 1 test\n")));
        assert!(!noticed(&ended(Some(101 << 8), "running 0 tests\n")));
        assert!(!noticed(&ended(None, "running 2 tests\n")));
    }

    #[test]
    fn binaries_are_found_among_messages() {
        let test = r#"{"target":{"name":"stress","kind":["test"]},"executable":"/t/stress-1"}"#;
        let lib = r#"{"target":{"name":"uhmm_linux","kind":["lib"]},"executable":"/t/uhmm-2"}"#;
        let other = r#"{"target":{"name":"loom","kind":["lib"]},"executable":null}"#;
        assert_eq!(executable(test), Some(("stress".to_owned(), "/t/stress-1".to_owned())));
        assert_eq!(executable(lib), Some(("lib".to_owned(), "/t/uhmm-2".to_owned())));
        assert_eq!(executable(other), None);
        assert_eq!(executable("not json"), None);
    }
}
