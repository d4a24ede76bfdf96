//! What is printed: reports, progress, the doctor, completions and man pages.

mod common;

use std::process::{Command, Output, Stdio};
use std::time::Instant;

use common::{Folder, allowed, output, run, run_sh, uhmm};
use serde_json::Value;
use uhmm_agent::ledger::{Counter, Ledger};

/// Memory that the puppet has, and its budget.
const WORDS: usize = 3 << 20;
const BUDGET: &str = "8M";

/// The puppet: this test binary under `uhmm`, with more memory than its budget.
fn is_puppet() {
    if std::env::var_os("UHMM_CLI_PUPPET").is_none() {
        return;
    }
    let word = |index: usize| (index as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words: Vec<u64> = (0..WORDS).map(word).collect();
    // The ledger tells when enough has left and come home.
    let location = std::env::var_os("UHMM_RUN").expect("it runs under uhmm");
    let ledger = Ledger::open(&location).expect("uhmm has it");
    let deadline = Instant::now() + common::PATIENCE;
    let enough = (WORDS * 8 / 4096 / 3) as u64;
    loop {
        let wrong =
            words.iter().enumerate().filter(|&(index, &found)| found != word(index)).count();
        let numbers = ledger.totals().numbers;
        let moved = [Counter::PagesOut, Counter::PagesHome].map(|counter| numbers.counter(counter));
        let faults = numbers.latency().count();
        if wrong > 0 || Instant::now() > deadline {
            eprintln!("{wrong} words are wrong, {moved:?} pages moved, {faults} faults");
            std::process::exit(12);
        }
        if moved.iter().all(|&pages| pages > enough) && faults > 0 {
            std::process::exit(0);
        }
    }
}

fn run_puppet(test: &str, options: &[&str]) -> Output {
    let binary = std::env::current_exe().expect("it runs");
    let mut command =
        run(options, &[binary.to_str().expect("text"), "--exact", test, "--nocapture"]);
    output(command.env("UHMM_CLI_PUPPET", "1"))
}

fn number(json: &Value, path: &str) -> u64 {
    json.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {json:#}"))
}

#[test]
fn a_report_as_json_tells_of_a_program_that_is_larger_than_its_budget() {
    is_puppet();
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let path = folder.path("report");
    let path = path.to_str().expect("text");
    let test = "a_report_as_json_tells_of_a_program_that_is_larger_than_its_budget";
    for device in ["lz4", "soft", "file:/tmp"] {
        let options = ["--json", "--report", path, "--budget", BUDGET, "--device", device];
        let ended = run_puppet(test, &options);
        assert_eq!(ended.status.code(), Some(0), "{device}: {ended:?}");
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "", "{device}");
        let text = std::fs::read_to_string(path).expect("it was written");
        let json: Value = serde_json::from_str(&text).expect("it is JSON");
        assert_eq!(json["device"], device);
        assert_eq!(number(&json, "/budget_bytes"), 8 << 20);
        assert_eq!(number(&json, "/ended/status"), 0);
        assert_eq!(number(&json, "/processes/managed"), 1);
        assert_eq!(number(&json, "/processes/going_on"), 0);
        // The puppet has seen that much.
        let pages = (WORDS * 8 / 4096) as u64;
        assert!(number(&json, "/counts/pages_out") > pages / 3, "{json:#}");
        assert!(number(&json, "/counts/pages_home") > pages / 3, "{json:#}");
        assert!(number(&json, "/peak_bytes/away") > 0, "{json:#}");
        assert!(number(&json, "/peak_bytes/needed") >= (WORDS * 8) as u64, "{json:#}");
        assert!(number(&json, "/peak_bytes/stored") > 0, "{json:#}");
        assert!(number(&json, "/fault_latency/count") > 0, "{json:#}");
        let ratio = json["compression"]["ratio"].as_f64();
        if device == "lz4" {
            // Eight words of each line are the same.
            assert!(ratio.is_some_and(|ratio| ratio > 1.5), "{json:#}");
        }
    }
}

#[test]
fn a_report_is_where_it_was_asked_for() {
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let path = folder.path("report");
    let quiet = output(&mut run_sh(&["--quiet"], "exit 3"));
    assert_eq!(quiet.stderr, b"");
    let to_file = output(run_sh(&[], "exit 3").args(["unused"]));
    assert!(String::from_utf8_lossy(&to_file.stderr).starts_with("uhmm: sh: exit status 3 after"));

    let options = ["--report", path.to_str().expect("text")];
    let to_file = output(&mut run_sh(&options, "exit 3"));
    assert_eq!((to_file.status.code(), &*to_file.stderr), (Some(3), &b""[..]));
    let text = std::fs::read_to_string(&path).expect("it was written");
    assert!(text.starts_with("uhmm: sh: exit status 3 after"), "{text}");

    let json = output(&mut run_sh(&["--json"], "kill -TERM $$"));
    let json: Value = serde_json::from_slice(&json.stderr).expect("it is JSON");
    assert_eq!((&json["ended"]["signal"], &json["ended"]["status"]), (&15.into(), &Value::Null));
}

#[test]
fn a_line_of_progress_is_wiped() {
    if !allowed() {
        return;
    }
    // It shows at least once: the program goes on until it was seen.
    let script = "i=0; while [ $i -lt 15 ]; do sleep 0.1; i=$((i+1)); done";
    let shown = output(&mut run_sh(&["--progress=always"], script));
    let text = String::from_utf8_lossy(&shown.stderr).into_owned();
    let (line, rest) = text.rsplit_once("\r\x1b[K").unwrap_or_else(|| panic!("{text:?}"));
    assert!(line.starts_with("\ruhmm: ") && line.contains("at home"), "{text:?}");
    assert!(rest.starts_with("uhmm: sh: exit status 0"), "{text:?}");

    for options in [&["--progress=never"][..], &[]] {
        let hidden = output(&mut run_sh(options, script));
        assert!(!hidden.stderr.contains(&b'\r'), "{hidden:?}");
    }
}

#[test]
fn the_doctor_says_the_same_in_both_ways() {
    let [text, json] =
        [&["doctor"][..], &["doctor", "--json"]].map(|words| output(uhmm().args(words)));
    let words = String::from_utf8(text.stdout).expect("it is text");
    let diagnosis: Value = serde_json::from_slice(&json.stdout).expect("it is JSON");
    assert_eq!(text.status, json.status);
    let (verdict, sentence) = match text.status.code() {
        Some(0) => ("all", "nothing is lost"),
        Some(1) => ("with-losses", "with the losses"),
        Some(2) => ("cannot-run", "cannot be run"),
        other => panic!("{other:?}"),
    };
    assert_eq!(diagnosis["verdict"], verdict);
    assert!(words.contains(sentence), "{words}");
    for feature in diagnosis["features"].as_array().expect("a list") {
        assert!(words.contains(feature["name"].as_str().expect("text")), "{words}");
    }
    let losses = diagnosis["losses"].as_array().expect("a list");
    assert_eq!(losses.is_empty(), verdict == "all");
    for loss in losses {
        assert!(words.contains(loss["remedy"].as_str().expect("text")), "{words}");
    }
}

#[test]
fn the_doctor_finds_that_the_library_is_missing() {
    let told = output(uhmm().args(["doctor", "--json"]).env("UHMM_PRELOAD", "/no/library.so"));
    assert_eq!(told.status.code(), Some(2));
    let diagnosis: Value = serde_json::from_slice(&told.stdout).expect("it is JSON");
    let losses = diagnosis["losses"].as_array().expect("a list");
    let missing = losses.iter().find(|loss| loss["subject"] == "the library to be preloaded");
    assert_eq!(missing.map(|loss| &loss["prevents"]), Some(&Value::Bool(true)), "{diagnosis:#}");
}

#[test]
fn completions_and_pages_come_from_the_same_definition() {
    let help = output(uhmm().args(["run", "--help"]));
    let help = String::from_utf8(help.stdout).expect("it is text");
    let options: Vec<&str> =
        help.split_whitespace().filter(|word| word.starts_with("--") && word.len() > 3).collect();
    assert!(options.len() > 6, "{help}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = output(uhmm().args(["completions", shell]));
        let text = String::from_utf8(text.stdout).expect("it is text");
        for name in ["budget", "device", "verify", "progress"] {
            assert!(text.contains(name), "{shell}: {name}");
        }
    }
    let page = output(uhmm().args(["man", "run"]));
    let page = String::from_utf8(page.stdout).expect("it is text").replace("\\-", "-");
    for name in ["--budget", "--device", "--verify", "--json", "--report"] {
        assert!(page.contains(name) && help.contains(name), "{name}");
    }
    assert!(page.contains(".TH uhmm-run 1"), "{page}");
    let whole = output(uhmm().arg("man"));
    assert!(String::from_utf8_lossy(&whole.stdout).contains(".TH uhmm 1"));
}

#[test]
fn bash_understands_its_completions() {
    let text = output(uhmm().args(["completions", "bash"]));
    let folder = Folder::new();
    let file = folder.file("completions", &text.stdout, 0o644);
    let checked = Command::new("bash").arg("-n").arg(&file).stderr(Stdio::inherit()).status();
    assert!(checked.expect("it runs").success());
}
