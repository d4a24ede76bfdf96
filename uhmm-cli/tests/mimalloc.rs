//! A program of many threads whose memory is another allocator's, with a quarter of what it takes.

mod common;

use std::collections::BTreeMap;

use common::{Folder, allowed, output, run};
use serde_json::Value;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Says that this process is the program.
const PUPPET: &str = "UHMM_CLI_MIMALLOC_PUPPET";

/// How many threads it has, and how many entries each keeps: 24 MiB in all.
const THREADS: u64 = 4;
const ENTRIES: u64 = 40_000;

/// Returns the next number of a linear congruential generator.
fn next(x: &mut u64) -> u64 {
    *x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *x >> 33
}

/// Keeps a table of strings, and replaces entries of it at random, and returns a sum of all.
fn work(seed: u64) -> u64 {
    let mut x = seed;
    let mut table: BTreeMap<u64, String> = BTreeMap::new();
    for key in 0..ENTRIES {
        table.insert(key, format!("{:>1$}", next(&mut x), 60 + (key % 80) as usize));
    }
    for _ in 0..ENTRIES / 16 {
        let key = next(&mut x) % ENTRIES;
        let with = next(&mut x).to_string().repeat(8);
        table.insert(key, with);
    }
    table.iter().fold(seed, |sum, (key, text)| {
        text.bytes().fold(sum ^ key, |sum, byte| sum.rotate_left(5).wrapping_add(u64::from(byte)))
    })
}

#[test]
fn threads_on_mimalloc_find_what_they_stored() {
    if std::env::var_os(PUPPET).is_some() {
        let threads: Vec<_> =
            (1..=THREADS).map(|seed| std::thread::spawn(move || work(seed))).collect();
        for thread in threads {
            println!("sum {}", thread.join().expect("it does not panic"));
        }
        return;
    }
    if !allowed() {
        return;
    }
    let expected: Vec<String> = (1..=THREADS).map(|seed| format!("sum {}", work(seed))).collect();
    let folder = Folder::new();
    let report = folder.path("report");
    let report = report.to_str().expect("text");
    let binary = std::env::current_exe().expect("it runs");
    let program = [
        binary.to_str().expect("text"),
        "--exact",
        "threads_on_mimalloc_find_what_they_stored",
        "--nocapture",
    ];
    let mut command = run(&["--json", "--report", report, "--budget", "6M"], &program);
    let found = output(command.env(PUPPET, "1"));
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    let text = String::from_utf8_lossy(&found.stdout);
    let sums: Vec<&str> = text.lines().filter(|line| line.starts_with("sum ")).collect();
    assert_eq!(sums, expected, "{text}");
    let report = std::fs::read_to_string(report).expect("it was written");
    let json: Value = serde_json::from_str(&report).expect("it is JSON");
    let out = json.pointer("/counts/pages_out").and_then(Value::as_u64);
    assert!(out.is_some_and(|pages| pages > 1000), "{json:#}");
}
