//! `--verify`: what comes back from a device, and what a device sees of the program, is what it was;
//! and where it is not, the run ends.

mod common;

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use common::{Folder, Running, allowed, pid_of, run, until};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use uhmm_agent::ledger::{Counter, Ledger};

/// How much memory the puppet has, in pages, and its budget.
const PAGES: u64 = 6 << 10;
const BUDGET: &str = "8M";

/// The words of a page.
const WORDS: usize = 512;

/// What each page of the puppet begins with, but for its number.
const MARK: u64 = 0x5eed_0fa9_a6e0_0000;

/// The puppet: this test binary under `uhmm`. It says where its memory is, waits, and says whether it
/// is what it wrote.
fn puppet() -> ! {
    let mut words = vec![0_u64; PAGES as usize * WORDS];
    for (page, number) in words.chunks_exact_mut(WORDS).zip(0..) {
        page[0] = MARK + number;
        page[1..].fill(number);
    }
    let ledger = std::env::var(uhmm_agent::LOCATION).expect("it is under uhmm");
    println!("PUPPET {} {:x} {ledger}", std::process::id(), words.as_ptr().addr());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("somebody writes");
    let pages = words.chunks_exact(WORDS).zip(0..);
    let wrong = pages.filter(|(page, number)| page[0] != MARK + number || page[511] != *number);
    let wrong = wrong.count();
    println!("WRONG {wrong}");
    std::process::exit(if wrong == 0 { 11 } else { 12 })
}

/// A puppet that has its memory, and most of it away.
struct Puppet {
    running: Running,
    pid: Pid,
    /// Where its memory begins.
    memory: u64,
    ledger: Ledger,
}

fn start(test: &str, device: &str, folder: &Folder) -> Puppet {
    let binary = std::env::current_exe().expect("it runs");
    let binary = binary.to_str().expect("its path is text");
    let report = folder.path("report");
    let report = report.to_str().expect("text");
    let options =
        ["--verify", "--json", "--report", report, "--budget", BUDGET, "--device", device];
    let mut command = run(&options, &[binary, "--exact", test, "--nocapture"]);
    let errors = File::create(folder.path("errors")).expect("there is room");
    let mut running = Running::start(command.env("UHMM_CLI_PUPPET", "1").stderr(errors));
    let (pid, memory, ledger) = loop {
        let line = running.line().expect("it says its number");
        // The harness writes too, and not always a whole line.
        let Some((_, said)) = line.split_once("PUPPET ") else { continue };
        let mut fields = said.split(' ');
        let mut field = || fields.next().expect("three fields");
        let pid = pid_of(field().parse().expect("a number"));
        let memory = u64::from_str_radix(field(), 16).expect("an address");
        break (pid, memory, Ledger::open(OsStr::new(field())).expect("it is of this build"));
    };
    until("half of its memory is away", || (marks(pid, memory).len() > 3000).then_some(()));
    Puppet { running, pid, memory, ledger }
}

/// Returns where pages of the puppet are that are not in its own memory.
fn marks(pid: Pid, memory: u64) -> Vec<u64> {
    let proc = format!("/proc/{}", pid.as_raw_nonzero());
    let maps = std::fs::read_to_string(format!("{proc}/maps")).expect("it runs");
    let content = File::open(format!("{proc}/mem")).expect("it is ours");
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let (range, _) = line.split_once(' ').expect("fields");
        let (first, end) = range.split_once('-').expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        let (first, end) = (number(first), number(end));
        // Not what is merely reserved, and not the puppet's own.
        let own = first <= memory + PAGES * 4096 && memory < end;
        if end - first > 1 << 30 || own {
            continue;
        }
        for at in (first..end).step_by(1 << 20) {
            let mut bytes = vec![0; (end - at).min(1 << 20) as usize];
            // A part that is away cannot be read so, and is no copy.
            if content.read_exact_at(&mut bytes, at).is_err() {
                continue;
            }
            let words = bytes.as_chunks::<8>().0.iter().zip(0..);
            let marked = words.filter(|(word, _)| {
                let word = u64::from_ne_bytes(**word);
                (MARK..MARK + PAGES).contains(&word)
            });
            found.extend(marked.map(|(_, index): (_, u64)| at + index * 8));
        }
    }
    found
}

fn report(folder: &Folder) -> Value {
    let report = std::fs::read_to_string(folder.path("report")).expect("it was written");
    serde_json::from_str(&report).expect("it is JSON")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("it was written")
}

/// Tells whether this is the puppet. It does not return then.
fn is_puppet() {
    if std::env::var_os("UHMM_CLI_PUPPET").is_some() {
        puppet();
    }
}

#[test]
fn the_gpu_sees_what_the_program_has_had() {
    is_puppet();
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let mut puppet = start("the_gpu_sees_what_the_program_has_had", "soft", &folder);
    // It reads while the program waits, and does not end: each page that is away several times.
    let verified = || puppet.ledger.totals().numbers.counter(Counter::PagesVerified);
    until("pages are verified", || (verified() > 4 * PAGES).then_some(()));
    puppet.running.say("now");
    assert_eq!(puppet.running.line().as_deref(), Some("WRONG 0"));
    assert_eq!(puppet.running.end().code(), Some(11));
    assert_eq!(read(&folder.path("errors")), "");
    let report = report(&folder);
    let verified = report.pointer("/counts/pages_verified").and_then(Value::as_u64);
    assert!(verified.is_some_and(|verified| verified > 4 * PAGES), "{report:#}");
}

#[test]
fn a_page_that_was_damaged_on_the_gpu_ends_the_run() {
    is_puppet();
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let mut puppet = start("a_page_that_was_damaged_on_the_gpu_ends_the_run", "soft", &folder);
    let memory = format!("/proc/{}/mem", puppet.pid.as_raw_nonzero());
    let memory = OpenOptions::new().write(true).open(memory).expect("it is ours");
    for at in marks(puppet.pid, puppet.memory) {
        // It may have ended by the first.
        if memory.write_all_at(&[0x55], at + 100).is_err() {
            break;
        }
    }
    // Nobody touches the page: it is seen from the device.
    assert_eq!(puppet.running.end().signal(), Some(Signal::ABORT.as_raw()));
    let said = read(&folder.path("errors"));
    assert!(said.contains("uhmm: --verify: "), "{said}");
    let report = report(&folder);
    let warnings = report["warnings"].as_array().expect("a list");
    let told = |warning: &Value| {
        warning["reason"].as_str().is_some_and(|reason| reason.contains("--verify has ended"))
    };
    assert!(warnings.iter().any(told), "{report:#}");
}
