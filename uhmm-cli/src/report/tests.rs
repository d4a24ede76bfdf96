use std::ffi::{OsStr, OsString};
use std::process::{Child, Command, Stdio};

use super::*;

fn arguments() -> args::Run {
    args::Run {
        budget: "64M".to_owned(),
        device: OsString::from("lz4"),
        policy: "second-chance".to_owned(),
        verify: false,
        announced: false,
        attach_at: None,
        json: false,
        report: None,
        quiet: false,
        progress: args::Progress::Never,
        program: ["sort", "-n"].map(OsString::from).to_vec(),
    }
}

fn config() -> Config {
    Config {
        budget: 64 << 20,
        device: OsString::from("lz4"),
        policy: "second-chance".to_owned(),
        verify: false,
        announced: false,
        attach_at: None,
    }
}

fn sleeper() -> Child {
    Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat starts")
}

/// A report of a program that has ended, one process of which goes on.
fn report() -> Report {
    let ledger = Ledger::create(&config()).expect("there is memory");
    let mut children = [sleeper(), sleeper()];
    let claim = |child: &Child| {
        let slot = ledger.claim(child.id(), OsStr::new("sort")).expect("there is room");
        slot.attached();
        slot
    };
    let slots = [claim(&children[0]), claim(&children[1])];
    let [slot, other] = &slots;
    slot.set(Gauge::Resident, 60 << 20);
    slot.set(Gauge::Away, 100 << 20);
    slot.set(Gauge::Stored, 25 << 20);
    slot.add(Counter::PagesOut, 1_234_567);
    slot.add(Counter::PagesHome, 1_000);
    slot.set(Gauge::Zero, 3 << 20);
    slot.set(Gauge::Incompressible, 1 << 20);
    slot.add(Counter::Unmapped, 3);
    other.add(Counter::ForkOverrun, 77);
    (0..90).for_each(|_| slot.fault_served(Duration::from_micros(10)));
    (0..10).for_each(|_| slot.fault_served(Duration::from_micros(90)));
    (0..3).for_each(|_| slot.waited(Duration::from_micros(10)));
    other.add(Counter::WentOver, 1);
    slot.set(Gauge::Files, 7 << 20);
    other.set(Gauge::Reserved, 1 << 20);
    slot.stayed(uhmm::StayReason::Locked, 5);
    slot.stayed(uhmm::StayReason::Pinned, 6);
    slot.warn("no filter");
    ledger.note(NoteKind::NotManaged, "no room");
    ledger.take_stock();
    children[0].kill().expect("it is ours");
    children[0].wait().expect("it ends");
    let ended = Ended { status: None, signal: Some(15) };
    let elapsed = Duration::from_millis(12_345);
    let report = Report::of(&ledger, &config(), &arguments(), ended, elapsed);
    children[1].kill().expect("it is ours");
    children[1].wait().expect("it ends");
    report
}

#[test]
fn people_read_what_happened() {
    let expected = "\
uhmm: sort: ended by SIGTERM after 12.3 s
  budget       64.0 MiB; at home at most 60.0 MiB; without a budget 160 MiB
  device       lz4: at most 100 MiB away, kept in 25.0 MiB (4.0 : 1); of this 3.0 MiB zeroes, 1.0 MiB \
incompressible
  unmanaged    at most 7.0 MiB of files, 1.0 MiB that serving a fault may need
  pages        1,234,567 moved out, 1,000 brought home
  invalidated  3 unmapped while away
  fork         77 pages came home for forks, whatever the budget
  stayed       6 pages: it is pinned
  stayed       5 pages: it is locked in memory
  faults       100: p50 < 16 us, p90 < 16 us, p99 < 131 us, max < 131 us
               <   16 us          90 ########################################
               <   32 us           0
               <   65 us           0
               <  131 us          10 #####
  waits        3 for room: p50 < 16 us, p90 < 16 us, p99 < 16 us, max < 16 us
               1 of them in vain: the program went on without
  processes    2 managed of 2
               1 go on; what they do from now on is in no report
  not managed  1: no room
  warning      no filter (1 times)
";
    let text = report().to_string();
    assert_eq!(text, expected, "{text}");
}

#[test]
fn a_budget_that_was_exceeded_is_named() {
    let mut report = report();
    for (peak, named) in [(64, false), (67, false), (68, true), (160, true)] {
        report.peak_bytes.insert(Gauge::Resident.name(), peak << 20);
        assert_eq!(report.to_string().contains("over budget"), named, "{peak} MiB of 64");
    }
    assert!(report.to_string().contains("over budget  by 96.0 MiB at most"), "{report}");
}

#[test]
fn programs_read_the_same() {
    let json: serde_json::Value = serde_json::from_str(&report().to_json()).expect("it is JSON");
    let rows = [
        ("/schema", 1.into()),
        ("/program/1", "-n".into()),
        ("/ended/signal", 15.into()),
        ("/ended/status", serde_json::Value::Null),
        ("/budget_bytes", (64_u64 << 20).into()),
        ("/peak_bytes/resident", (60_u64 << 20).into()),
        ("/peak_bytes/needed", (160_u64 << 20).into()),
        ("/peak_bytes/warm", 0.into()),
        ("/staying_bytes/files", (7_u64 << 20).into()),
        ("/room_waits/count", 3.into()),
        ("/compression/ratio", 4.0.into()),
        ("/compression/zero_bytes", (3 << 20).into()),
        ("/counts/pages_out", 1_234_567.into()),
        ("/counts/fork_overrun", 77.into()),
        ("/fault_latency/count", 100.into()),
        ("/fault_latency/percentiles_ns/p50", (1 << 14).into()),
        ("/fault_latency/histogram/0/below_ns", (1 << 14).into()),
        ("/fault_latency/histogram/0/count", 90.into()),
        ("/fault_latency/histogram/3/count", 10.into()),
        ("/stayed/0/reason", "it is pinned".into()),
        ("/processes/managed", 2.into()),
        ("/processes/going_on", 1.into()),
        ("/not_managed/0/reason", "no room".into()),
        ("/warnings/0/count", 1.into()),
    ];
    for (path, expected) in rows {
        assert_eq!(json.pointer(path), Some(&expected), "{path}");
    }
    let counts = json["counts"].as_object().expect("an object");
    assert_eq!(counts.len(), Counter::ALL.len());
}

#[test]
fn numbers_are_for_people() {
    let groups = [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")];
    for (number, text) in groups {
        assert_eq!(Grouped(number).to_string(), text);
    }
    let times = [(2, "2 ns"), (16_384, "16 us"), (33_554_432, "33 ms"), (1 << 40, "1099 s")];
    for (number, text) in times {
        assert_eq!(Nanoseconds(number).to_string(), text);
    }
}
