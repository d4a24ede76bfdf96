//! Command lines: shown so that one can repeat them by hand, run, and judged.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The environment variable that selects a mutant in a model checker's build.
pub(crate) const MUTANT_VARIABLE: &str = "MMU_NOTIFIER_MUTANT";

/// Variables that no command inherits: the first two would silently win over the `RUSTFLAGS` and
/// `RUSTDOCFLAGS` of a step, the third would break the algorithm in a step that means it whole.
const NEVER_INHERITED: [&str; 3] =
    ["CARGO_ENCODED_RUSTFLAGS", "CARGO_ENCODED_RUSTDOCFLAGS", MUTANT_VARIABLE];

/// How often a child with a deadline is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Why a command of xtask did not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A check ran and said no.
    Failed(String),
    /// A check could not be run at all, which is not success.
    CouldNotRun(String),
}

/// A check ran and said no.
pub(crate) fn failed<T>(message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Failed(message.into()))
}

/// The repository root, where every command runs.
pub(crate) fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("xtask lies in a folder of the repository")
}

/// The target directory of one kind of build, apart from the ordinary one, so that different
/// flags do not throw away each other's artefacts.
pub(crate) fn target_dir(kind: &str) -> String {
    let base = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_owned());
    format!("{base}/{kind}")
}

/// A program, its arguments and the variables it is given.
#[derive(Clone, Debug)]
pub(crate) struct CommandLine {
    variables: Vec<(&'static str, String)>,
    program: String,
    arguments: Vec<String>,
}

impl CommandLine {
    /// A program without arguments.
    pub(crate) fn new(program: impl Into<String>) -> Self {
        Self { variables: Vec::new(), program: program.into(), arguments: Vec::new() }
    }

    /// `cargo` with the words of `words`, which are separated by spaces.
    pub(crate) fn cargo(words: &str) -> Self {
        Self::new("cargo").words(words)
    }

    /// Adds the words of `words`, which are separated by spaces.
    pub(crate) fn words(self, words: &str) -> Self {
        self.arguments(words.split_whitespace())
    }

    /// Adds arguments.
    pub(crate) fn arguments<A: Into<String>>(mut self, more: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(more.into_iter().map(Into::into));
        self
    }

    /// Adds a variable.
    pub(crate) fn variable(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.variables.push((name, value.into()));
        self
    }

    /// Runs the command while passing its output through, and returns how many tests each test
    /// binary ran.
    pub(crate) fn run(&self) -> Result<(ExitStatus, Vec<usize>), Failure> {
        let mut child = self.spawn(Stdio::piped(), Stdio::inherit())?;
        let mut from_child = child.stdout.take().expect("the child's stdout is a pipe");
        let mut seen = Vec::new();
        let mut chunk = [0; 8192];
        let mut pass_on = || -> io::Result<()> {
            loop {
                let length = match from_child.read(&mut chunk) {
                    Ok(0) => return Ok(()),
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                };
                seen.extend_from_slice(&chunk[..length]);
                io::stdout().write_all(&chunk[..length])?;
                io::stdout().flush()?;
            }
        };
        // The child is waited for in any case, so that none is left behind.
        let passed_on = pass_on();
        let status = child.wait().or_else(|error| self.could_not("wait for", &error))?;
        passed_on.or_else(|error| self.could_not("pass on the output of", &error))?;
        Ok((status, tests_passed(&String::from_utf8_lossy(&seen))))
    }

    /// Runs the command silently, for `limit` at most, and returns what it said.
    pub(crate) fn capture(&self, limit: Duration) -> Result<Outcome, Failure> {
        let start = Instant::now();
        let mut child = self.spawn(Stdio::piped(), Stdio::piped())?;
        let stdout = collect(child.stdout.take().expect("the child's stdout is a pipe"));
        let stderr = collect(child.stderr.take().expect("the child's stderr is a pipe"));
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if start.elapsed() < limit => thread::sleep(POLL),
                Ok(None) => {
                    // An error means that the child has ended meanwhile. It was late all the same.
                    let _ = child.kill();
                    child.wait().or_else(|error| self.could_not("wait for", &error))?;
                    break None;
                }
                Err(error) => return self.could_not("wait for", &error),
            }
        };
        Ok(Outcome {
            status,
            stdout: stdout.join().expect("a reader of a pipe does not panic"),
            stderr: stderr.join().expect("a reader of a pipe does not panic"),
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn spawn(&self, stdout: Stdio, stderr: Stdio) -> Result<std::process::Child, Failure> {
        let mut command = Command::new(&self.program);
        for name in NEVER_INHERITED {
            command.env_remove(name);
        }
        command
            .args(&self.arguments)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(root())
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        command.spawn().or_else(|error| self.could_not("start", &error))
    }

    fn could_not<T>(&self, what: &str, error: &io::Error) -> Result<T, Failure> {
        Err(Failure::CouldNotRun(format!("cannot {what} `{self}`: {error}")))
    }
}

/// The line that one types to get the same run.
impl fmt::Display for CommandLine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.variables {
            write!(out, "{name}={} ", quoted(value))?;
        }
        out.write_str(&quoted(&self.program))?;
        for argument in &self.arguments {
            write!(out, " {}", quoted(argument))?;
        }
        Ok(())
    }
}

/// What became of a command that ran silently.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// How it ended; `None` when its time was over and it was killed.
    pub(crate) status: Option<ExitStatus>,
    /// What it wrote to its standard output.
    pub(crate) stdout: String,
    /// What it wrote to its standard error.
    pub(crate) stderr: String,
    /// How long it ran.
    pub(crate) seconds: f64,
}

/// One step of a series.
#[derive(Debug)]
pub(crate) struct Step {
    /// The name under which `--skip` knows it.
    pub(crate) name: &'static str,
    /// What it runs.
    pub(crate) line: CommandLine,
    /// How many test binaries must each have run a test: a filter or a cfg that misses is not
    /// success.
    pub(crate) test_binaries: usize,
}

/// Runs `steps` in order, except those named in `skip`, and stops at the first that fails.
///
/// The last line printed says how many steps passed and how many failed.
pub(crate) fn run_all(steps: &[Step], skip: &[String]) -> Result<(), Failure> {
    let mut table = Vec::new();
    let mut passed = 0;
    let mut failure = None;
    for step in steps {
        let name = step.name;
        if failure.is_some() || skip.iter().any(|skipped| skipped == name) {
            let why = if failure.is_some() { "not run" } else { "skipped" };
            table.push(format!("{name:<16} {why:<8} {:>8} {:>6}", "-", "-"));
            continue;
        }
        println!("==> {name}: {}", step.line);
        let start = Instant::now();
        let verdict = run_one(step);
        let seconds = start.elapsed().as_secs_f64();
        let (word, tests) = match &verdict {
            Ok(0) => ("passed", "-".to_owned()),
            Ok(tests) => ("passed", tests.to_string()),
            Err(_) => ("FAILED", "-".to_owned()),
        };
        println!("<== {name}: {word} after {seconds:.1} s\n");
        table.push(format!("{name:<16} {word:<8} {seconds:>8.1} {tests:>6}"));
        match verdict {
            Ok(_) => passed += 1,
            Err(error) => failure = Some(error),
        }
    }
    println!("{:<16} {:<8} {:>8} {:>6}", "step", "result", "seconds", "tests");
    for row in table {
        println!("{row}");
    }
    println!("\n{passed} passed, {} failed", usize::from(failure.is_some()));
    failure.map_or(Ok(()), Err)
}

fn run_one(step: &Step) -> Result<usize, Failure> {
    let Step { name, line, .. } = step;
    let (status, tests) = line.run()?;
    if !status.success() {
        return failed(format!("step `{name}` failed ({status}); to repeat it alone:\n  {line}"));
    }
    judge(step, &tests)
}

/// Sums up how many tests each test binary ran, if enough of them ran any.
fn judge(Step { name, line, test_binaries }: &Step, tests: &[usize]) -> Result<usize, Failure> {
    let ran = tests.iter().filter(|&&passed| passed > 0).count();
    if ran < *test_binaries {
        return failed(format!(
            "step `{name}` ran tests of {ran} test binaries, and {test_binaries} are due; to \
             repeat it alone:\n  {line}"
        ));
    }
    Ok(tests.iter().sum())
}

/// How many tests passed in each test binary, by the summaries that they print.
fn tests_passed(output: &str) -> Vec<usize> {
    let summaries = output.lines().filter_map(|line| line.strip_prefix("test result: ok. "));
    summaries.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is still worth judging.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// `word`, so that a shell reads it as one word.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=+:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_is_shown_as_a_shell_reads_it() {
        let line = CommandLine::cargo("check -p mmu-notifier")
            .variable("RUSTFLAGS", r#"--cfg mutant="x""#)
            .arguments(["it's"]);
        let shown = r#"RUSTFLAGS='--cfg mutant="x"' cargo check -p mmu-notifier 'it'\''s'"#;
        assert_eq!(line.to_string(), shown);
    }

    #[test]
    fn passed_tests_are_counted_for_each_binary() {
        let output = "running 2 tests\ntest result: ok. 2 passed; 0 failed; 0 ignored\n\
                      running 0 tests\ntest result: ok. 0 passed; 0 failed\n\
                      test result: ok. 11 passed; 0 failed\n";
        assert_eq!(tests_passed(output), [2, 0, 11]);
        assert_eq!(tests_passed("nothing of the kind"), [0; 0]);
    }

    #[test]
    fn a_child_that_is_late_is_killed() {
        let outcome = CommandLine::new("sleep").words("60").capture(Duration::from_millis(20));
        assert!(outcome.expect("sleep starts").status.is_none());
    }

    #[test]
    fn a_step_that_runs_no_test_fails_only_where_tests_are_due() {
        let step =
            |test_binaries| Step { name: "s", line: CommandLine::new("true"), test_binaries };
        assert!(run_one(&step(0)).is_ok());
        assert!(matches!(run_one(&step(1)), Err(Failure::Failed(_))));
    }

    #[test]
    fn every_test_binary_that_is_due_must_run_a_test() {
        let step =
            |test_binaries| Step { name: "s", line: CommandLine::new("true"), test_binaries };
        assert_eq!(judge(&step(2), &[3, 0, 4]).ok(), Some(7));
        assert!(matches!(judge(&step(2), &[3, 0]), Err(Failure::Failed(_))));
    }

    #[test]
    fn the_first_failing_step_ends_the_series() {
        let step =
            |name, program: &str| Step { name, line: CommandLine::new(program), test_binaries: 0 };
        // The third step would report a program that cannot be started, if it were reached.
        let steps = [step("one", "true"), step("two", "false"), step("three", "no such program")];
        assert!(matches!(run_all(&steps, &[]), Err(Failure::Failed(_))));
        assert!(matches!(run_all(&steps, &["two".to_owned()]), Err(Failure::CouldNotRun(_))));
        assert!(run_all(&steps[..1], &[]).is_ok());
    }
}
