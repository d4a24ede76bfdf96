//! The project's own commands, run as `cargo xtask ...`.
//!
//! `cargo xtask test` is the whole check of a change. The other commands are parts of it, or need
//! a toolchain that not everybody has. Each prints the command lines that it runs, so that one
//! can repeat a step by hand.

#![forbid(unsafe_code)]

mod live_mutants;
mod mutants;
mod step;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};

use crate::step::{CommandLine, Failure, Step, run_all, target_dir};

/// How long a toolchain may take to say its version.
const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// The tests with many threads: ordinary ones, which are also run under checkers that judge how the
/// threads interleave. Each is a test binary of one crate.
const CONCURRENT: [(&str, &str); 3] =
    [("mmu-notifier", "stress"), ("uhmm", "concurrency"), ("uhmm-devices", "concurrency")];

/// The crates whose tests need no live process.
const SIMULATED: [&str; 4] = ["mmu-notifier", "uhmm", "uhmm-devices", "xtask"];

/// The names of the steps of `test`, in order.
const STEP_NAMES: [&str; 11] = [
    "fmt",
    "clippy",
    "clippy-shuttle",
    "clippy-loom",
    "doc",
    "tests",
    "doctests",
    "release",
    "shuttle",
    "loom",
    "mutants",
];

/// The project's own commands: tests, models, mutants, sanitizers.
///
/// Every command prints the command lines that it runs. The exit status is 0 if all went well, 1
/// if a check failed, and 2 if a check could not be run.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run every check that the stable toolchain can run.
    ///
    /// The steps are formatting, lints (also of what only the checkers build), documentation, the
    /// tests with debug checks (examples and benchmarks included, each once), the tests of the
    /// documentation, the tests without debug checks but for those of live processes, and then `shuttle`, `loom` and `mutants`. The
    /// first step that fails ends the run. At the end stands a table of the steps and a line `N
    /// passed, 0 failed`, where N counts steps.
    Test {
        /// Leave a step out; may be given several times.
        #[arg(long, value_name = "STEP", value_parser = PossibleValuesParser::new(STEP_NAMES))]
        skip: Vec<String>,
        /// Print the steps with their command lines, and run nothing.
        #[arg(long)]
        list: bool,
    },
    /// Run the concurrent tests of all crates under shuttle, which draws schedules at random.
    ///
    /// Builds with `--cfg shuttle` into target/shuttle.
    Shuttle {
        /// Arguments of the test binaries.
        #[arg(last = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Run the models under loom, which goes through all schedules within a bound.
    ///
    /// Builds with `--cfg loom` into target/loom. The bound is the number of times a thread may
    /// be preempted; it is 2 unless the environment variable LOOM_MAX_PREEMPTIONS says otherwise.
    Loom {
        /// Run only the models whose names contain this.
        filter: Option<String>,
        /// Arguments of the test binary.
        #[arg(last = true, value_name = "ARGS")]
        arguments: Vec<String>,
    },
    /// Break the algorithm on purpose, and see that the models notice.
    ///
    /// The mutants stand in mmu-notifier/tests/mutants.txt, each with the model that must fail or
    /// the compiler's error code that must come. A mutant is killed if its model fails or aborts
    /// within 120 s, or the compiler refuses it with that code. A run that takes longer does not
    /// count as killed. Each model must first pass without a mutant. LOOM_MAX_PREEMPTIONS works
    /// as for `loom`.
    Mutants {
        /// Run only the mutants of these names.
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Print the mutants and what must kill them, and run nothing.
        #[arg(long)]
        list: bool,
        /// Those of the live process instead: each is killed by a test on this kernel.
        ///
        /// They stand in uhmm-linux/tests/mutants.txt. What they break is an order of events, so a test
        /// has four runs to fail in. Takes about half an hour, and is no step of `test`.
        #[arg(long)]
        live: bool,
    },
    /// Run the ordinary tests under Miri, once with each of its models of borrowing.
    ///
    /// Miri interprets the program and reports undefined behaviour. It needs a nightly toolchain
    /// with the components miri and rust-src; the exit status is 2 where they are missing.
    Miri,
    /// Run the concurrent tests of all crates under ThreadSanitizer, which reports data races.
    ///
    /// The standard library is built with the sanitizer too, into target/tsan. This needs a
    /// nightly toolchain with the component rust-src; the exit status is 2 where it is missing.
    Tsan,
}

fn main() -> ExitCode {
    let (message, status) = match run(Arguments::parse().command) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Failed(message)) => (message, 1),
        Err(Failure::CouldNotRun(message)) => (message, 2),
    };
    eprintln!("xtask: {message}");
    ExitCode::from(status)
}

fn run(task: Task) -> Result<(), Failure> {
    match task {
        Task::Test { list: true, .. } => {
            for step in test_steps() {
                println!("{:<14} {}", step.name, step.line);
            }
            Ok(())
        }
        Task::Test { skip, list: false } => run_all(&test_steps(), &skip),
        Task::Shuttle { arguments } => run_all(&[shuttle_step(&arguments)], &[]),
        Task::Loom { filter, arguments } => run_all(&[loom_step(filter, &arguments)], &[]),
        Task::Mutants { list: true, live: false, .. } => mutants::list(),
        Task::Mutants { names, list: false, live: false } => mutants::run(&names),
        Task::Mutants { list: true, live: true, .. } => live_mutants::list(),
        Task::Mutants { names, list: false, live: true } => live_mutants::run(&names),
        Task::Miri => {
            need_nightly(&["miri", "rust-src"])?;
            run_all(&miri_steps(), &[])
        }
        Task::Tsan => {
            need_nightly(&["rust-src"])?;
            run_all(&[tsan_step()], &[])
        }
    }
}

/// The steps of `cargo xtask test`, in the order of [`STEP_NAMES`].
fn test_steps() -> Vec<Step> {
    let cargo = CommandLine::cargo;
    let plain = |name, line| Step { name, line, test_binaries: 0 };
    let tests = |name, line| Step { name, line, test_binaries: 1 };
    vec![
        plain("fmt", cargo("fmt --all --check")),
        plain("clippy", cargo("clippy --workspace --all-targets -- -D warnings")),
        plain("clippy-shuttle", clippy_under("shuttle", &CONCURRENT)),
        plain("clippy-loom", clippy_under("loom", &[("mmu-notifier", "models")])),
        plain("doc", cargo("doc --workspace --no-deps").variable("RUSTDOCFLAGS", "-D warnings")),
        // `--all-targets` includes the benchmarks, which run each measured body once, and leaves
        // the documentation's tests out, which are the step after.
        tests("tests", cargo("test --workspace --all-targets")),
        tests("doctests", cargo("test --workspace --doc")),
        // What the kernel does to a live process does not depend on debug checks, and takes long.
        tests("release", cargo(&format!("test{} --tests --release", packages(&SIMULATED)))),
        shuttle_step(&[]),
        loom_step(None, &[]),
        plain("mutants", cargo("xtask mutants")),
    ]
}

/// Lints of what is only built under a checker: the libraries as they are there, and their tests.
fn clippy_under(checker: &str, tests: &[(&str, &str)]) -> CommandLine {
    let words = format!("clippy --release --lib{} -- -D warnings", selection(tests));
    CommandLine::cargo(&words)
        .variable("RUSTFLAGS", format!("--cfg {checker}"))
        .variable("CARGO_TARGET_DIR", target_dir(checker))
}

/// The words by which cargo selects packages.
fn packages(names: &[&str]) -> String {
    names.iter().map(|name| format!(" -p {name}")).collect()
}

/// The words by which cargo selects test binaries, each given by its crate and its name. A name
/// that several crates have is said once.
fn selection(tests: &[(&str, &str)]) -> String {
    let mut words = String::new();
    for (package, _) in tests {
        words += &format!(" -p {package}");
    }
    let names: BTreeSet<&str> = tests.iter().map(|&(_, name)| name).collect();
    for name in names {
        words += &format!(" --test {name}");
    }
    words
}

fn shuttle_step(arguments: &[String]) -> Step {
    let line = CommandLine::cargo(&format!("test --release{}", selection(&CONCURRENT)))
        .variable("RUSTFLAGS", "--cfg shuttle")
        .variable("CARGO_TARGET_DIR", target_dir("shuttle"));
    test_binary_step("shuttle", line, CONCURRENT.len(), arguments)
}

fn loom_step(filter: Option<String>, arguments: &[String]) -> Step {
    let line = loom_line().variable("LOOM_MAX_PREEMPTIONS", max_preemptions()).arguments(filter);
    test_binary_step("loom", line, 1, arguments)
}

fn test_binary_step(
    name: &'static str,
    line: CommandLine,
    test_binaries: usize,
    arguments: &[String],
) -> Step {
    if arguments.is_empty() {
        return Step { name, line, test_binaries };
    }
    // With arguments of their own the user may want a list, and no test to run.
    Step { name, line: line.words("--").arguments(arguments), test_binaries: 0 }
}

/// The command that builds and runs the models.
fn loom_line() -> CommandLine {
    CommandLine::cargo("test -p mmu-notifier --release --test models")
        .variable("RUSTFLAGS", "--cfg loom")
        .variable("CARGO_TARGET_DIR", target_dir("loom"))
}

/// How often loom may preempt a thread: what the user says, else 2. Without a bound the number of
/// schedules grows beyond what a test run can wait for.
fn max_preemptions() -> String {
    std::env::var("LOOM_MAX_PREEMPTIONS").unwrap_or_else(|_| "2".to_owned())
}

fn miri_steps() -> [Step; 2] {
    let step = |name, flags| Step {
        name,
        line: CommandLine::cargo(
            "+nightly miri test -p mmu-notifier -p uhmm --lib --test protocol",
        )
        .variable("MIRIFLAGS", flags),
        // The libraries' own tests, and `protocol`.
        test_binaries: 3,
    };
    [
        step("stacked-borrows", "-Zmiri-strict-provenance"),
        step("tree-borrows", "-Zmiri-strict-provenance -Zmiri-tree-borrows"),
    ]
}

fn tsan_step() -> Step {
    let words = format!(
        "+nightly test -Zbuild-std --target x86_64-unknown-linux-gnu --release{}",
        selection(&CONCURRENT)
    );
    let line = CommandLine::cargo(&words)
        .variable("RUSTFLAGS", "-Zsanitizer=thread")
        .variable("CARGO_TARGET_DIR", target_dir("tsan"));
    Step { name: "tsan", line, test_binaries: CONCURRENT.len() }
}

/// Fails, with the command that helps, unless a nightly toolchain with `components` is installed.
fn need_nightly(components: &[&str]) -> Result<(), Failure> {
    let Some(sysroot) = probe("rustc", "+nightly --print sysroot") else {
        return Err(Failure::CouldNotRun(format!(
            "there is no nightly toolchain; this installs it:\n  \
             rustup toolchain install nightly --profile minimal --component {}",
            components.join(",")
        )));
    };
    let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/Cargo.toml");
    let is_there = |component: &str| match component {
        "rust-src" => library.exists(),
        _ => probe("cargo", &format!("+nightly {component} --version")).is_some(),
    };
    let missing: Vec<&str> = components.iter().copied().filter(|&c| !is_there(c)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::CouldNotRun(format!(
        "the nightly toolchain lacks {}; this installs it:\n  \
         rustup component add --toolchain nightly {}",
        missing.join(" and "),
        missing.join(" ")
    )))
}

/// What `program` says, if it starts and succeeds. Nothing is installed on the way.
fn probe(program: &str, words: &str) -> Option<String> {
    let line = CommandLine::new(program).words(words).variable("RUSTUP_AUTO_INSTALL", "0");
    let outcome = line.capture(PROBE_LIMIT).ok()?;
    outcome.status.is_some_and(|status| status.success()).then_some(outcome.stdout)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn skip_knows_every_step() {
        let names: Vec<&str> = test_steps().iter().map(|step| step.name).collect();
        assert_eq!(names, STEP_NAMES);
    }

    #[test]
    fn arguments_of_the_test_binary_come_last() {
        let step = loom_step(Some("seed".to_owned()), &["--nocapture".to_owned()]);
        assert!(step.line.to_string().ends_with("--test models seed -- --nocapture"));
        assert_eq!(step.test_binaries, 0);
    }

    #[test]
    fn one_command_runs_the_concurrent_tests_of_all_crates() {
        let step = shuttle_step(&[]);
        assert!(step.line.to_string().ends_with(
            "cargo test --release -p mmu-notifier -p uhmm -p uhmm-devices --test concurrency \
             --test stress"
        ));
        assert_eq!(step.test_binaries, 3);
    }
}
