//! Programs that nobody here wrote, with a quarter of the memory that they would take: what they
//! write and how they end is what it is without `uhmm`, to the byte.
//!
//! A program that is missing is installed from Debian where that can be done, which is for root (see
//! `common/install.rs`). One that is missing still is told of and left out, unless
//! `UHMM_REQUIRE_PROGRAMS=1` has the test fail. The same programs at full size: `programs.sh`.

mod common;

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::{Folder, allowed, install, output_within, run};
use serde_json::Value;

/// The least budget that a program is given, in bytes: a program and its libraries want some.
const LEAST: u64 = 4 << 20;

/// How long a program may take. It moves all of its memory several times, which an agent without
/// optimisation on a busy machine takes a minute and more for.
const PATIENCE: Duration = Duration::from_secs(240);

/// Finds a program in `PATH`, or has it installed, or says that it is not there.
fn find(name: &str) -> Option<PathBuf> {
    let look = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|folder| folder.join(name)).find(|at| at.is_file())
    };
    let found = look().map(Ok).unwrap_or_else(|| {
        install::install().and_then(|()| look().ok_or("no package has it".to_owned()))
    });
    found
        .inspect_err(|why| {
            let required = std::env::var_os("UHMM_REQUIRE_PROGRAMS");
            let required = required.is_some_and(|value| value == "1");
            assert!(!required, "{name} is not installed: {why}");
            eprintln!("SKIPPED: {name} is not installed: {why}");
        })
        .ok()
}

/// Finds the interpreter itself: what is in `PATH` may be a script that looks for it.
fn find_python() -> Option<PathBuf> {
    let python = find("python3")?;
    let asked = output_within(
        PATIENCE,
        Command::new(python).args(["-c", "import sys; print(sys.executable)"]),
    );
    Some(PathBuf::from(String::from_utf8(asked.stdout).expect("a path").trim_end()))
}

fn script(name: &str) -> OsString {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(name).into_os_string()
}

/// Runs a program, and returns the most memory that it had, in bytes, beside what it wrote.
fn alone<W: AsRef<OsStr>>(program: &[W], folder: &Path) -> (Output, u64) {
    // Somebody else waits for it, so that nobody's peak is told but that of it and its children.
    let peak = folder.join("peak");
    let mut command = Command::new("python3");
    let code = "import os, resource, subprocess, sys\n\
                status = subprocess.call(sys.argv[2:])\n\
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n\
                open(sys.argv[1], 'w').write(str(peak))\n\
                status >= 0 or os.kill(os.getpid(), -status)\n\
                sys.exit(status)";
    let ended = output_within(
        PATIENCE,
        command.arg("-c").arg(code).arg(&peak).args(program).current_dir(folder),
    );
    let peak = std::fs::read_to_string(peak).expect("it was written");
    (ended, peak.parse::<u64>().expect("KiB") << 10)
}

/// Runs a program with and without `uhmm`, checks that nothing can tell which, and returns the report.
#[track_caller]
fn same<W: AsRef<OsStr>>(program: &[W], device: &str) -> Value {
    let (folder, other) = (Folder::new(), Folder::new());
    let (expected, peak) = alone(program, &folder.path(""));
    let budget = (peak / 4).max(LEAST).to_string();
    let report = folder.path("report");
    let report = report.to_str().expect("text");
    let options = ["--json", "--report", report, "--budget", &budget, "--device", device];
    let found = output_within(PATIENCE, run(&options, program).current_dir(other.path("")));
    let name = program[0].as_ref().display().to_string();
    let text = String::from_utf8_lossy(&found.stderr);
    assert_eq!(found.status, expected.status, "{name}: {text}");
    assert!(found.stdout == expected.stdout, "{name} wrote something else");
    assert_eq!(text, String::from_utf8_lossy(&expected.stderr), "{name}");
    let report = std::fs::read_to_string(report).expect("it was written");
    let json: Value = serde_json::from_str(&report).expect("it is JSON");
    json
}

fn count(report: &Value, name: &str) -> u64 {
    let found = report.pointer(&format!("/counts/{name}")).and_then(Value::as_u64);
    found.unwrap_or_else(|| panic!("{name} in {report:#}"))
}

/// Checks that the budget was too small, so that the test is one.
#[track_caller]
fn was_short(report: &Value) {
    assert!(count(report, "pages_out") > 500, "{report:#}");
    assert!(count(report, "pages_home") > 500, "{report:#}");
    assert_eq!(count(report, "faults_refused"), 0, "{report:#}");
}

#[test]
fn what_takes_no_memory_is_as_ever() {
    if !allowed() {
        return;
    }
    for program in [
        &["true"][..],
        &["false"],
        &["ls", "/"],
        &[
            "bash",
            "-c",
            "for i in 1 2 3; do echo $i | cat | (cat; exit $i); echo $?; done | tac; exit 9",
        ],
        &["sh", "-c", "echo to stderr >&2; kill -TERM $$"],
    ] {
        if find(program[0]).is_some() {
            same(program, "lz4");
        }
    }
}

#[test]
fn sort_sorts() {
    let Some(sort) = find("sort").filter(|_| allowed()) else { return };
    let folder = Folder::new();
    let path = folder.path("lines");
    let mut lines = std::io::BufWriter::new(std::fs::File::create(&path).expect("there is room"));
    let mut x = 1_u64;
    for _ in 0..150_000 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let length = (x >> 60) as usize * 4;
        writeln!(lines, "{x:016x} {:length$}", "").expect("there is room");
    }
    lines.into_inner().expect("there is room");
    let program = [sort.as_os_str(), "-S".as_ref(), "256M".as_ref(), path.as_os_str()];
    for device in ["lz4", "file:/var/tmp"] {
        was_short(&same(&program, device));
    }
}

#[test]
fn python_finds_what_it_put_in_dictionaries() {
    let Some(python) = find_python().filter(|_| allowed()) else { return };
    let program = [python.as_os_str(), &script("dict.py"), "60000".as_ref()];
    was_short(&same(&program, "lz4"));
}

#[test]
fn sqlite_in_memory_answers() {
    let Some(python) = find_python().filter(|_| allowed()) else { return };
    let program = [python.as_os_str(), &script("sqlite.py"), "120000".as_ref()];
    was_short(&same(&program, "soft"));
}

#[test]
fn a_daemon_that_closes_all_descriptors_and_forks_keeps_its_memory() {
    let Some(python) = find_python().filter(|_| allowed()) else { return };
    let program = [python.as_os_str(), &script("daemon.py"), "1000".as_ref()];
    let report = same(&program, "lz4");
    was_short(&report);
    assert!(count(&report, "fork_overrun") > 500, "{report:#}");
}

#[test]
fn a_guard_over_what_is_away_is_refused_and_drops_nothing() {
    let Some(python) = find_python().filter(|_| allowed()) else { return };
    let folder = Folder::new();
    let report = folder.path("report");
    // So that the filter can be installed by every user.
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", env!("CARGO_BIN_EXE_uhmm"), "run", "--json", "--report"]);
    command.arg(&report).args(["--budget", "8M", "--"]).arg(python).arg(script("guard.py"));
    let found = output_within(PATIENCE, &mut command);
    let text = String::from_utf8_lossy(&found.stdout);
    assert_eq!(text, "-1 EINVAL\nTrue\n", "{}", String::from_utf8_lossy(&found.stderr));
    let report = std::fs::read_to_string(report).expect("it was written");
    was_short(&serde_json::from_str(&report).expect("it is JSON"));
}

#[test]
fn gcc_compiles_to_the_same_object() {
    let Some(gcc) = find("gcc").filter(|_| allowed()) else { return };
    let folder = Folder::new();
    let mut source = String::from("int printf(const char *, ...);\n");
    for i in 1..=150 {
        source.push_str(&format!(
            "int f{i}(int a, int b) {{ int s = a; for (int i = 0; i < b; i++) {{ s += (i * {i}) ^ (s \
             >> {}); switch (s & 7) {{ case 1: s += 3; break; case 2: s ^= b; break; }} }} return s; }}\n",
            i % 13 + 1
        ));
    }
    let path = folder.file("source.c", source.as_bytes(), 0o644);
    let program: [&OsStr; 6] = [
        gcc.as_os_str(),
        "-O2".as_ref(),
        "-S".as_ref(),
        path.as_os_str(),
        "-o".as_ref(),
        "-".as_ref(),
    ];
    was_short(&same(&program, "lz4"));
}

#[test]
#[ignore = "takes minutes: programs.sh has it too"]
fn stress_ng_finds_every_byte() {
    let Some(stress) = find("stress-ng").filter(|_| allowed()) else { return };
    let options = [
        "--vm",
        "1",
        "--vm-bytes",
        "24M",
        "--vm-keep",
        "--vm-method",
        "flip",
        "--vm-ops",
        "20000",
        "--verify",
        "-q",
    ];
    let program: Vec<&OsStr> =
        [stress.as_os_str()].into_iter().chain(options.map(OsStr::new)).collect();
    was_short(&same(&program, "lz4"));
}

#[test]
fn redis_saves_in_the_background() {
    let (Some(_), Some(_)) = (find("redis-server"), find("redis-benchmark")) else { return };
    if !allowed() {
        return;
    }
    let (folder, library) = (Folder::new(), script("redis.sh"));
    let report = folder.path("report");
    let report = report.to_str().expect("text");
    let mut command = Command::new(library);
    command.env("FOLDER", folder.path("")).env("KEYS", "20000");
    command.args([
        env!("CARGO_BIN_EXE_uhmm"),
        "run",
        "--json",
        "--report",
        report,
        "--budget",
        "6M",
        "--",
    ]);
    let found = output_within(PATIENCE, &mut command);
    let text = String::from_utf8_lossy(&found.stdout);
    assert!(found.status.success(), "{text}{}", String::from_utf8_lossy(&found.stderr));
    let expected = "OK\nBackground saving started\nrdb_last_bgsave_status:ok\nstatus 0\n\
                    what was saved is what was there\n";
    assert_eq!(text.replace("\n\n", "\n"), expected);
    let report = std::fs::read_to_string(report).expect("it was written");
    let json: Value = serde_json::from_str(&report).expect("it is JSON");
    was_short(&json);
    assert!(count(&json, "fork_overrun") > 500, "{json:#}");
}
