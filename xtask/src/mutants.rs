//! Mutants: deliberate breaks of the algorithm that a model, or the compiler, must refuse.
//!
//! A test that has never been seen to fail shows little. Each mutant stays in the source behind a
//! switch, and `mmu-notifier/tests/mutants.txt` says which check must notice it:
//!
//! ```text
//! name | model_that_must_fail | what is broken, in one sentence
//! name | compile:E0502        | what is broken, in one sentence
//! ```
//!
//! A mutant that several models must notice has a line for each; every model must notice one.
//! Blank lines and lines that begin with `#` say nothing. A mutant of the first kind is switched
//! on at run time (`mutant!("name")` in the source), one of the second kind at compile time
//! (`cfg(mutant = "name")`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use crate::step::{CommandLine, Failure, MUTANT_VARIABLE, Outcome, failed, root, target_dir};
use crate::{loom_line, max_preemptions};

/// Where the mutants are listed, from the repository root.
const TABLE: &str = "mmu-notifier/tests/mutants.txt";
/// Where the mutants are, from the repository root.
const SOURCE: &str = "mmu-notifier/src";

/// How long a model may take to notice a mutant. A run that is not over by then counts as not
/// killed: a hang may be the mutant's work, or a slow machine's, and nobody could tell which.
const MUTANT_LIMIT: Duration = Duration::from_secs(120);
/// How long a model may take on the unbroken algorithm, which it searches to the end.
const MODEL_LIMIT: Duration = Duration::from_secs(900);
/// How long a build may take.
const BUILD_LIMIT: Duration = Duration::from_secs(1800);

/// The exit code of a test binary in which a test failed.
const TEST_FAILED: i32 = 101;
/// The signal of `std::process::abort`.
const SIGABRT: i32 = 6;

/// A deliberate break and the check that must notice it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mutant {
    pub(crate) name: String,
    pub(crate) check: Check,
    pub(crate) sentence: String,
}

/// What must notice a mutant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Check {
    /// The loom model of this name fails.
    Model(String),
    /// The compiler refuses with this error code.
    Compile(String),
}

/// Prints the table of mutants.
pub(crate) fn list() -> Result<(), Failure> {
    for Mutant { name, check, sentence } in read_table(TABLE)? {
        let by = match check {
            Check::Model(model) => model,
            Check::Compile(code) => format!("the compiler, {code}"),
        };
        println!("{name}\n    must be killed by {by}\n    {sentence}");
    }
    Ok(())
}

/// Runs the mutants in `names`, or all if there are none, and fails if one survives.
pub(crate) fn run(names: &[String]) -> Result<(), Failure> {
    let wanted = select(TABLE, SOURCE, names)?;
    let models: BTreeSet<&str> = wanted.iter().filter_map(|mutant| mutant.model()).collect();

    // What is checked against a mutant must hold without one, or the failure shows nothing.
    let binary = if models.is_empty() { String::new() } else { build_models()? };
    if names.is_empty() {
        check_every_model_bites(&binary, &models)?;
    }
    for model in models {
        check_unbroken_model(&binary, model)?;
    }
    if wanted.iter().any(|mutant| mutant.model().is_none()) {
        check_unbroken_build()?;
    }

    let mut survivors = Vec::new();
    for mutant in &wanted {
        let name = &mutant.name;
        let (line, limit) = mutant.line(&binary);
        let outcome = line.capture(limit)?;
        let (by, verdict) = match &mutant.check {
            Check::Model(model) => (model.as_str(), judge_model(&outcome)),
            Check::Compile(code) => (code.as_str(), judge_compiler(&outcome, code)),
        };
        let seconds = outcome.seconds;
        match verdict {
            Ok(()) => println!("killed    {name}  by {by}  {seconds:.1} s"),
            Err(reason) => {
                println!("SURVIVED  {name}  not by {by}  {seconds:.1} s: {reason}");
                println!("    {}\n    {line}", mutant.sentence);
                survivors.push(name.as_str());
            }
        }
    }
    println!("\n{} mutants killed, {} survived", wanted.len() - survivors.len(), survivors.len());
    if survivors.is_empty() {
        Ok(())
    } else {
        failed(format!("mutants survived: {}", survivors.join(", ")))
    }
}

impl Check {
    /// The name of the model, or of the test, if it is one.
    pub(crate) fn model(&self) -> Option<&str> {
        match self {
            Check::Model(model) => Some(model),
            Check::Compile(_) => None,
        }
    }
}

impl Mutant {
    fn model(&self) -> Option<&str> {
        self.check.model()
    }

    /// The command that must fail, and how long it may take.
    fn line(&self, binary: &str) -> (CommandLine, Duration) {
        match &self.check {
            Check::Model(model) => {
                let line = model_line(binary, model).variable(MUTANT_VARIABLE, &self.name);
                (line, MUTANT_LIMIT)
            }
            Check::Compile(_) => {
                let flags = format!("--cfg mutant=\"{}\"", self.name);
                (check_line().variable("RUSTFLAGS", flags), BUILD_LIMIT)
            }
        }
    }
}

// The table.

/// Reads a table, by its place from the repository root.
pub(crate) fn read_table(table: &str) -> Result<Vec<Mutant>, Failure> {
    let path = root().join(table);
    let text = fs::read_to_string(&path)
        .or_else(|error| failed(format!("cannot read {}: {error}", path.display())))?;
    let mutants = parse(&text).or_else(|error| failed(format!("{table}:{error}")))?;
    if mutants.is_empty() { failed(format!("{table} lists no mutant")) } else { Ok(mutants) }
}

/// Reads a table of mutants. The error begins with the number of the line.
fn parse(text: &str) -> Result<Vec<Mutant>, String> {
    let mut mutants = Vec::new();
    let mut seen = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mutant = parse_line(line).map_err(|error| format!("{number}: {error}"))?;
        if let Some(first) = seen.insert((mutant.name.clone(), mutant.check.clone()), number) {
            return Err(format!(
                "{number}: `{}` with this model is on line {first} already",
                mutant.name
            ));
        }
        mutants.push(mutant);
    }
    Ok(mutants)
}

fn parse_line(line: &str) -> Result<Mutant, String> {
    let columns: Vec<&str> = line.splitn(3, '|').map(str::trim).collect();
    let &[name, check, sentence] = columns.as_slice() else {
        return Err("want three columns, `name | model | sentence`".to_owned());
    };
    if !is_name(name) {
        return Err(format!("`{name}` is no name of a mutant"));
    }
    if sentence.is_empty() {
        return Err(format!("`{name}` does not say what it breaks"));
    }
    let check = match check.strip_prefix("compile") {
        Some(code) if code.is_empty() || code.starts_with(':') => {
            let code = code.strip_prefix(':').unwrap_or(code);
            if !is_error_code(code) {
                return Err(format!("`{name}` wants an error code, as in `compile:E0502`"));
            }
            Check::Compile(code.to_owned())
        }
        _ if is_name(check) => Check::Model(check.to_owned()),
        _ => return Err(format!("`{check}` is no name of a model")),
    };
    Ok(Mutant { name: name.to_owned(), check, sentence: sentence.to_owned() })
}

fn is_name(word: &str) -> bool {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-' || c == ':';
    !word.is_empty() && word.chars().all(part)
}

fn is_error_code(word: &str) -> bool {
    let digits = word.strip_prefix('E').unwrap_or_default();
    digits.len() == 4 && digits.chars().all(|c| c.is_ascii_digit())
}

/// Reads a table that agrees with the source in `folder`, and returns the mutants in `names`, or all
/// if there are none.
pub(crate) fn select(table: &str, folder: &str, names: &[String]) -> Result<Vec<Mutant>, Failure> {
    let mut mutants = read_table(table)?;
    check_consistency(&mutants, &names_in_source(&root().join(folder))?, table, folder)?;
    if let Some(unknown) = names.iter().find(|name| mutants.iter().all(|m| m.name != **name)) {
        return failed(format!("no mutant is called `{unknown}`; `--list` shows them all"));
    }
    mutants.retain(|mutant| names.is_empty() || names.contains(&mutant.name));
    Ok(mutants)
}

// The table against the source.

/// Fails unless the table and the source name the same mutants.
fn check_consistency(
    mutants: &[Mutant],
    source: &BTreeSet<String>,
    table: &str,
    folder: &str,
) -> Result<(), Failure> {
    let listed: BTreeSet<String> = mutants.iter().map(|mutant| mutant.name.clone()).collect();
    let only = |these: &BTreeSet<String>, others: &BTreeSet<String>| {
        these.difference(others).cloned().collect::<Vec<_>>().join(", ")
    };
    let missing_in_source = only(&listed, source);
    let missing_in_table = only(source, &listed);
    let mut errors = Vec::new();
    if !missing_in_source.is_empty() {
        errors.push(format!("in {table} but not in {folder}: {missing_in_source}"));
    }
    if !missing_in_table.is_empty() {
        errors.push(format!("in {folder} but not in {table}: {missing_in_table}"));
    }
    if errors.is_empty() { Ok(()) } else { failed(errors.join("\n")) }
}

/// The names of all mutants in the Rust files under `folder`.
fn names_in_source(folder: &Path) -> Result<BTreeSet<String>, Failure> {
    let unreadable = |error| Failure::Failed(format!("cannot read {}: {error}", folder.display()));
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_dir() {
            names.append(&mut names_in_source(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)
                .or_else(|error| failed(format!("cannot read {}: {error}", path.display())))?;
            names.append(&mut names_in_text(&text));
        }
    }
    Ok(names)
}

/// The names in `mutant!("name")` and `mutant = "name"`, except in lines that are comments.
fn names_in_text(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = code.collect::<Vec<_>>().join("\n");
    let named = |(at, word): (usize, &str)| {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            return None;
        }
        let rest = code[at + word.len()..].trim_start();
        let rest = match rest.strip_prefix('!') {
            Some(rest) => rest.trim_start().strip_prefix('(')?,
            None => rest.strip_prefix('=')?,
        };
        let (name, _) = rest.trim_start().strip_prefix('"')?.split_once('"')?;
        Some(name.to_owned())
    };
    code.match_indices("mutant").filter_map(named).collect()
}

// The runs.

/// Builds the models and returns the path of the test binary.
fn build_models() -> Result<String, Failure> {
    let line = loom_line().words("--no-run --message-format=json-render-diagnostics");
    println!("==> build: {line}");
    let outcome = line.capture(BUILD_LIMIT)?;
    if !outcome.status.is_some_and(|status| status.success()) {
        return failed(format!("the models do not build\n{}", outcome.stderr));
    }
    let executable = outcome.stdout.lines().find_map(executable_of_models);
    executable.map_or_else(|| failed("cargo names no executable for the test `models`"), Ok)
}

/// The executable in one of cargo's messages, if it is the one of the models.
fn executable_of_models(message: &str) -> Option<String> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    (message["target"]["name"] == "models")
        .then(|| message["executable"].as_str().map(str::to_owned))
        .flatten()
}

fn model_line(binary: &str, model: &str) -> CommandLine {
    CommandLine::new(binary)
        .words("--exact")
        .arguments([model])
        .variable("LOOM_MAX_PREEMPTIONS", max_preemptions())
}

fn check_line() -> CommandLine {
    CommandLine::cargo("check -p mmu-notifier").variable("CARGO_TARGET_DIR", target_dir("mutants"))
}

/// Fails if a model of the binary has no mutant: nobody would know that it can fail.
fn check_every_model_bites(binary: &str, with_mutant: &BTreeSet<&str>) -> Result<(), Failure> {
    let listed = CommandLine::new(binary).words("--list --format terse").capture(MUTANT_LIMIT)?;
    let models = listed.stdout.lines().filter_map(|line| line.strip_suffix(": test"));
    let toothless: Vec<&str> = models.filter(|model| !with_mutant.contains(model)).collect();
    if toothless.is_empty() {
        Ok(())
    } else {
        failed(format!("models that no mutant of {TABLE} shows to bite: {}", toothless.join(", ")))
    }
}

fn check_unbroken_model(binary: &str, model: &str) -> Result<(), Failure> {
    let line = model_line(binary, model);
    let outcome = line.capture(MODEL_LIMIT)?;
    let explain =
        |what: &str| failed(format!("{what}\n{}\n{}\n{line}", outcome.stdout, outcome.stderr));
    if !ran_one_test(&outcome) {
        return explain(&format!("the run of `{model}` did not consist of exactly one test"));
    }
    match outcome.status {
        None => explain(&format!("the model itself takes over {MODEL_LIMIT:?}: `{model}`")),
        // An ignored test is a success of libtest's, too.
        Some(status) if status.success() && outcome.stdout.contains("ok. 1 passed; 0 failed") => {
            println!("passed    {model}  without a mutant  {:.1} s", outcome.seconds);
            Ok(())
        }
        Some(_) => explain(&format!("the model itself fails: `{model}`")),
    }
}

fn check_unbroken_build() -> Result<(), Failure> {
    let line = check_line();
    let outcome = line.capture(BUILD_LIMIT)?;
    if outcome.status.is_some_and(|status| status.success()) {
        println!("passed    cargo check  without a mutant  {:.1} s", outcome.seconds);
        return Ok(());
    }
    failed(format!("the crate itself does not compile\n{}\n{line}", outcome.stderr))
}

/// `Ok` if the model noticed the mutant, else the reason why this run does not count.
fn judge_model(outcome: &Outcome) -> Result<(), String> {
    if !ran_one_test(outcome) {
        return Err("the run did not consist of exactly one test".to_owned());
    }
    let Some(status) = outcome.status else {
        return Err(format!("not over after {MUTANT_LIMIT:?}, which is not counted as killed"));
    };
    if status.success() {
        return Err("the model passed".to_owned());
    }
    let one_failed = outcome.stdout.contains("FAILED. 0 passed; 1 failed");
    if (status.code() == Some(TEST_FAILED) && one_failed) || status.signal() == Some(SIGABRT) {
        return Ok(());
    }
    Err(format!("{status} is neither a failed test nor an abort"))
}

/// `Ok` if the compiler refused the mutant with `code`, else the reason why not.
fn judge_compiler(outcome: &Outcome, code: &str) -> Result<(), String> {
    match outcome.status {
        None => Err(format!("not over after {BUILD_LIMIT:?}")),
        Some(status) if status.success() => Err("it compiles".to_owned()),
        Some(_) if outcome.stderr.contains(&format!("error[{code}]")) => Ok(()),
        Some(_) => Err(format!("refused, but not with {code}\n{}", outcome.stderr)),
    }
}

fn ran_one_test(outcome: &Outcome) -> bool {
    outcome.stdout.lines().any(|line| line == "running 1 test")
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    fn mutant(name: &str) -> Mutant {
        Mutant {
            name: name.to_owned(),
            check: Check::Model("model".to_owned()),
            sentence: "Broken.".to_owned(),
        }
    }

    /// `raw` is a wait status: the exit code in the second byte, a signal in the first.
    fn ended(raw: i32, stdout: &str, stderr: &str) -> Outcome {
        Outcome {
            status: Some(ExitStatus::from_raw(raw)),
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            seconds: 0.0,
        }
    }

    #[test]
    fn a_table_is_read() {
        let text = "# comment\n\n skip_wait | a_model | Does not wait | at all.\n\
                    held | compile:E0502 | Calls out under the lock.\n";
        let table = parse(text).expect("the table is right");
        assert_eq!(table.len(), 2);
        assert_eq!(table[0].name, "skip_wait");
        assert_eq!(table[0].check, Check::Model("a_model".to_owned()));
        assert_eq!(table[0].sentence, "Does not wait | at all.");
        assert_eq!(table[1].check, Check::Compile("E0502".to_owned()));
    }

    #[test]
    fn a_model_may_be_called_compile_something() {
        let table = parse("a | compiled_fences | Sentence.").expect("the table is right");
        assert_eq!(table[0].check, Check::Model("compiled_fences".to_owned()));
    }

    #[test]
    fn a_bad_line_is_refused_with_its_number() {
        for (text, error) in [
            ("\n#\nname | model", "3: want three columns"),
            ("| model | Sentence.", "1: `` is no name of a mutant"),
            ("a b | model | Sentence.", "1: `a b` is no name of a mutant"),
            ("a | | Sentence.", "1: `` is no name of a model"),
            ("a | model |", "1: `a` does not say what it breaks"),
            ("a | compile | Sentence.", "1: `a` wants an error code"),
            ("a | compile:502 | Sentence.", "1: `a` wants an error code"),
            ("a | m | S.\na | n | S.\na | m | S.", "3: `a` with this model is on line 1"),
        ] {
            let found = parse(text).expect_err(text);
            assert!(found.starts_with(error), "{text:?}: {found}");
        }
    }

    #[test]
    fn names_are_found_in_source() {
        let text = r#"
            // if mutant!("in_a_comment") {}
            /// mutant = "in_a_doc"
            macro_rules! mutant { ($name:literal) => { false }; }
            if mutant!("at_run_time") { return; }
            #[cfg(not(mutant = "at_compile_time"))]
            if mutant!(
                "on_its_own_line"
            ) {}
            let no_mutant = "another_word";
        "#;
        let found = names_in_text(text);
        let expected = ["at_compile_time", "at_run_time", "on_its_own_line"];
        assert_eq!(found, expected.map(str::to_owned).into());
    }

    #[test]
    fn a_difference_between_table_and_source_is_named() {
        let table = [mutant("both"), mutant("only_listed")];
        let source = ["both", "only_there"].map(str::to_owned).into();
        let Err(Failure::Failed(error)) = check_consistency(&table, &source, TABLE, SOURCE) else {
            panic!("the difference is not seen");
        };
        assert!(error.contains("not in mmu-notifier/src: only_listed"), "{error}");
        assert!(error.contains("not in mmu-notifier/tests/mutants.txt: only_there"), "{error}");
        assert!(check_consistency(&table[..1], &["both".to_owned()].into(), TABLE, SOURCE).is_ok());
    }

    #[test]
    fn only_a_failed_test_or_an_abort_kills() {
        let failed = "running 1 test\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n";
        let passed = "running 1 test\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        let exit_101 = 101 << 8;
        for (outcome, killed) in [
            (ended(exit_101, failed, ""), true),
            (ended(SIGABRT, "running 1 test\n", ""), true),
            (ended(0, passed, ""), false),
            // A usage error of the test binary, a segmentation fault, another exit code.
            (ended(exit_101, "running 1 test\n", ""), false),
            (ended(11, "running 1 test\n", ""), false),
            (ended(2 << 8, failed, ""), false),
            // Not the model, or not only the model.
            (ended(exit_101, "running 0 tests\n", ""), false),
            (ended(SIGABRT, "running 11 tests\n", ""), false),
            (Outcome { status: None, ..ended(0, "running 1 test\n", "") }, false),
        ] {
            assert_eq!(judge_model(&outcome).is_ok(), killed, "{outcome:?}");
        }
    }

    #[test]
    fn only_the_right_error_code_kills() {
        let exit_101 = 101 << 8;
        assert!(judge_compiler(&ended(exit_101, "", "error[E0502]: no"), "E0502").is_ok());
        assert!(judge_compiler(&ended(exit_101, "", "error[E0499]: no"), "E0502").is_err());
        assert!(judge_compiler(&ended(0, "", "error[E0502]"), "E0502").is_err());
    }

    #[test]
    fn the_executable_of_the_models_is_found_among_messages() {
        let other = r#"{"reason":"compiler-artifact","target":{"name":"loom"},"executable":null}"#;
        let models = r#"{"target":{"name":"models"},"executable":"/t/models-1"}"#;
        assert_eq!(executable_of_models(other), None);
        assert_eq!(executable_of_models("not json"), None);
        assert_eq!(executable_of_models(models).as_deref(), Some("/t/models-1"));
    }
}
