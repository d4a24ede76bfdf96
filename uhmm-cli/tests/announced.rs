//! Programs whose changes are announced (`--announced`): what they write and how they end is what it is
//! without, to the byte, and they were announced.
//!
//! All run with new privileges renounced, so that any user may install the filter.

mod common;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Folder, allowed, complains, output, run};
use serde_json::Value;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Says that this process is the program of many threads.
const PUPPET: &str = "UHMM_CLI_ANNOUNCED_PUPPET";

/// What a program is run under, from its start.
const START: [&str; 5] = ["--announced", "--attach-at", "start", "--budget", "256M"];

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(name)
}

/// Runs a program, with new privileges renounced.
fn run_plainly(command: &Command) -> Output {
    let mut plain = Command::new("setpriv");
    plain.arg("--no-new-privs").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => plain.env(name, value),
            None => plain.env_remove(name),
        };
    }
    output(&mut plain)
}

/// Runs a program with and without `uhmm run OPTIONS`, checks that nothing can tell which, and returns
/// what it wrote and the report.
#[track_caller]
fn same<W: AsRef<OsStr>>(options: &[&str], program: &[W]) -> (String, Value) {
    let folder = Folder::new();
    let expected = run_plainly(Command::new(&program[0]).args(&program[1..]));
    let path = folder.path("report");
    let mut all = vec!["--json", "--report", path.to_str().expect("text")];
    all.extend(options);
    let found = run_plainly(&run(&all, program));
    let errors = String::from_utf8_lossy(&found.stderr);
    assert_eq!(found.status, expected.status, "{errors}");
    assert!(found.stdout == expected.stdout, "it wrote something else");
    assert_eq!(errors, String::from_utf8_lossy(&expected.stderr));
    let report = std::fs::read_to_string(path).expect("it was written");
    let report: Value = serde_json::from_str(&report).expect("it is JSON");
    (String::from_utf8(found.stdout).expect("it is text"), report)
}

fn count(report: &Value, name: &str) -> u64 {
    let found = report.pointer(&format!("/counts/{name}")).and_then(Value::as_u64);
    found.unwrap_or_else(|| panic!("{name} in {report:#}"))
}

/// Checks that so many calls were announced.
#[track_caller]
fn was_announced(report: &Value, least: u64) {
    assert_eq!(report["announced"], true, "{report:#}");
    assert!(count(report, "announced") >= least, "{report:#}");
    assert_eq!(report["not_managed"], Value::Array(Vec::new()), "{report:#}");
}

/// Compiles a program, or says that there is no compiler.
fn compile(compiler: &str, words: &[&OsStr]) -> bool {
    match Command::new(compiler).args(words).output() {
        Ok(made) => {
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            true
        }
        Err(error) => {
            let required = std::env::var_os("UHMM_REQUIRE_PROGRAMS").is_some_and(|v| v == "1");
            assert!(!required, "{compiler}: {error}");
            eprintln!("SKIPPED: {compiler}: {error}");
            false
        }
    }
}

#[test]
fn a_compiler_writes_the_same() {
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let mut text = String::from("int printf(const char *, ...);\n");
    for i in 1..=150 {
        text.push_str(&format!(
            "int f{i}(int a, int b) {{ int s = a; for (int i = 0; i < b; i++) {{ s += (i * {i}) ^ (s \
             >> {}); if (s % 7 == 1) s ^= f{}(b, s & 15); }} return s; }}\n",
            i % 13 + 1,
            (i - 1).max(1)
        ));
    }
    let path = folder.file("source.c", text.as_bytes(), 0o644);
    let words = ["cc", "-O1", "-S", path.to_str().expect("text"), "-o", "-"];
    // The one that compiles: it is where the memory is.
    let (assembly, report) = same(&["--announced", "--budget", "256M"], &words);
    assert!(assembly.contains("f150:"));
    was_announced(&report, 10);
    // Also where pages are away that it unmaps and moves.
    let (again, report) = same(&["--announced", "--budget", "6M"], &words);
    assert!(again == assembly);
    was_announced(&report, 10);
    assert!(count(&report, "pages_out") > 500, "{report:#}");
}

#[test]
fn a_test_suite_in_python_finds_nothing() {
    if !allowed() {
        return;
    }
    // What is in PATH may be a script that looks for it.
    let asked = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    let Ok(asked) = asked else {
        assert!(!compile("python3", &[]));
        return;
    };
    let python = String::from_utf8(asked.stdout).expect("a path");
    let modules = std::env::var("UHMM_PYTHON_TESTS");
    let modules = modules.unwrap_or_else(|_| "test_dict test_list test_mmap".to_owned());
    let mut words = vec![OsString::from(python.trim_end()), source("suite.py").into_os_string()];
    words.extend(modules.split_whitespace().map(OsString::from));
    let (text, report) = same(&START, &words);
    assert!(text.contains("passed __main__.Memory.test_maps_come_and_go\n"), "{text}");
    was_announced(&report, 1000);
}

/// Changes memory by itself and by its allocator, and returns a sum of what it found.
fn work(seed: u64) -> u64 {
    let mut x = seed;
    let mut pieces: Vec<Vec<u64>> = Vec::new();
    for round in 0..2000_u64 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let words = (x >> 33) as usize % 50_000;
        match pieces.len() {
            // Some grow, which may move them.
            20.. => drop(pieces.swap_remove((x >> 40) as usize % pieces.len())),
            len @ 10.. => pieces[(x >> 50) as usize % len].extend_from_slice(&[x, round]),
            _ => pieces.push((0..words as u64).map(|word| word ^ x).collect()),
        }
        if round % 3 == 0 && !pieces.is_empty() {
            pieces.push(pieces[0].iter().rev().copied().collect());
        }
    }
    let words = pieces.iter().flatten();
    words.fold(seed, |sum, &word| sum.rotate_left(7).wrapping_add(word))
}

#[test]
fn threads_on_mimalloc_find_what_they_stored() {
    if std::env::var_os(PUPPET).is_some() {
        let threads: Vec<_> = (1..=4).map(|seed| std::thread::spawn(move || work(seed))).collect();
        for thread in threads {
            println!("sum {}", thread.join().expect("it does not panic"));
        }
        return;
    }
    if !allowed() {
        return;
    }
    let binary = std::env::current_exe().expect("it runs");
    let folder = Folder::new();
    let report = folder.path("report");
    let mut options = vec!["--json", "--report", report.to_str().expect("text")];
    options.extend(START);
    let test = "threads_on_mimalloc_find_what_they_stored";
    let program = [binary.to_str().expect("text"), "--exact", test, "--nocapture"];
    let found = run_plainly(run(&options, &program).env(PUPPET, "1"));
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    let text = String::from_utf8_lossy(&found.stdout);
    let sums: Vec<&str> = text.lines().filter(|line| line.starts_with("sum ")).collect();
    let expected: Vec<String> = (1..=4).map(|seed| format!("sum {}", work(seed))).collect();
    assert_eq!(sums, expected, "{text}");
    let report = std::fs::read_to_string(report).expect("it was written");
    was_announced(&serde_json::from_str(&report).expect("it is JSON"), 10);
}

#[test]
fn raw_system_calls_and_static_code_return_what_they_always_do() {
    if !allowed() {
        return;
    }
    let (folder, source) = (Folder::new(), source("raw.c"));
    let (dynamic, linked) = (folder.path("raw"), folder.path("raw-static"));
    let words = |to: &'static str| [OsStr::new("-O1"), OsStr::new("-pthread"), OsStr::new(to)];
    for (path, how) in [(&dynamic, "-fPIE"), (&linked, "-static")] {
        let mut all = words(how).to_vec();
        all.extend([source.as_os_str(), OsStr::new("-o"), path.as_os_str()]);
        if !compile("cc", &all) {
            return;
        }
    }
    let (text, report) = same(&START, &[&dynamic, &linked]);
    assert!(text.ends_with("it ends with 5\n"), "{text}");
    // 4 threads, 300 rounds, 6 calls that stop in each. The static program's are not announced.
    was_announced(&report, 4 * 300 * 6);
    assert!(count(&report, "announced") < 2 * 4 * 300 * 6, "{report:#}");
}

#[test]
fn a_program_in_go_writes_the_same() {
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let binary = folder.path("go");
    let mut go = Command::new("go");
    go.env("GO111MODULE", "off").env("GOCACHE", folder.path("cache"));
    go.args(["build", "-o"]).arg(&binary).arg(source("raw.go"));
    match go.output() {
        Ok(made) => assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr)),
        Err(_) => {
            assert!(!compile("go", &[]));
            return;
        }
    }
    let (text, report) = same(&START, &[&binary]);
    assert!(text.ends_with("a child\nexit status 3\n"), "{text}");
    // Two in each of 200 rounds.
    was_announced(&report, 400);
}

/// The counter counts announcements, and nothing else.
#[test]
fn nothing_is_announced_that_nobody_wants_announced() {
    if !allowed() {
        return;
    }
    let (folder, source) = (Folder::new(), source("raw.c"));
    let binary = folder.path("raw");
    let words = [source.as_os_str(), OsStr::new("-pthread"), OsStr::new("-o"), binary.as_os_str()];
    if !compile("cc", &words) {
        return;
    }
    let (_, report) = same(&["--attach-at", "start", "--budget", "256M"], &[&binary]);
    assert_eq!((count(&report, "announced"), &report["announced"]), (0, &Value::Bool(false)));
    assert_eq!(report["processes"]["managed"], 1, "{report:#}");
}

/// There can be one listener: who comes from a process that has it is observed, and the report says so.
#[test]
fn what_an_announced_program_starts_is_observed() {
    if !allowed() {
        return;
    }
    let script = "sh -c 'echo one; exit 4'; echo $?; exec sh -c 'echo two; exit 8'";
    let (text, report) = same(&START, &["sh", "-c", script]);
    assert_eq!(text, "one\n4\ntwo\n");
    assert_eq!(report["processes"]["managed"], 3, "{report:#}");
    let warning = &report["warnings"][0];
    assert_eq!(warning["count"], 2, "{report:#}");
    let reason = warning["reason"].as_str().expect("a text");
    assert!(
        reason.starts_with("changes are not announced in a process that comes from"),
        "{reason}"
    );
}

#[test]
fn without_the_right_to_filter_nothing_is_run() {
    if !allowed() || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can give up this right alone");
        return;
    }
    let uhmm = run(&["--announced"], &["true"]);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-sys_admin"]).arg(uhmm.get_program()).args(uhmm.get_args());
    complains(&mut command, 125, &["--announced", "setpriv --no-new-privs"]);
}

#[test]
fn a_wrong_size_to_attach_at_is_refused() {
    let mut command = run(&["--attach-at", "soon"], &["true"]);
    complains(&mut command, 125, &["--attach-at soon", "a number is missing"]);
}
