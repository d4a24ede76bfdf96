use std::process::{Child, Command, Stdio};
use std::sync::Barrier;

use super::*;

fn config() -> Config {
    Config {
        budget: 1 << 20,
        device: OsString::from_vec(b"file:/tmp/\xff".to_vec()),
        policy: "second-chance".to_owned(),
        verify: true,
        announced: true,
        attach_at: Some(0),
    }
}

fn ledger() -> Ledger {
    Ledger::create(&config()).expect("there is memory for a ledger")
}

fn reopened(ledger: &Ledger) -> Ledger {
    let location = ledger.location().expect("it was made here");
    Ledger::open(OsStr::new(&location)).expect("it is there")
}

fn name() -> &'static OsStr {
    OsStr::new("program")
}

/// A process that lives until it is killed.
fn sleeper() -> Child {
    Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat starts")
}

fn kill(mut child: Child) {
    child.kill().expect("it is ours");
    child.wait().expect("it ends");
}

#[test]
fn what_the_supervisor_wants_is_read_back() {
    let ledger = ledger();
    assert_eq!(reopened(&ledger).config(), config());
    assert_eq!(reopened(&ledger).location(), None, "a location is for who keeps the file");

    let long = OsString::from("x".repeat(DEVICE_BYTES + 1));
    let refused = Ledger::create(&Config { device: long, ..config() }).expect_err("too long");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    let longest = OsString::from("x".repeat(DEVICE_BYTES));
    let taken = Ledger::create(&Config { device: longest.clone(), ..config() }).expect("it fits");
    assert_eq!(taken.config().device, longest);
}

#[test]
fn what_is_no_ledger_is_not_opened() {
    let ledger = ledger();
    let location = ledger.location().expect("it was made here");
    let (path, token) = location.split_once(':').expect("a token");
    let other_token = format!("{path}:{:016x}", !u64::from_str_radix(token, 16).expect("a number"));
    let open = |location: &str| Ledger::open(OsStr::new(location)).map(drop);
    let kind = |location: &str| open(location).expect_err("it is no ledger").kind();
    assert_eq!(kind(&other_token), io::ErrorKind::InvalidData);
    assert_eq!(kind(path), io::ErrorKind::InvalidInput);
    assert_eq!(kind(&format!("/dev/zero:{token}")), io::ErrorKind::InvalidData);
    assert_eq!(kind(&format!("/nowhere:{token}")), io::ErrorKind::NotFound);

    ledger.layout().version.store(VERSION + 1, Ordering::Relaxed);
    assert_eq!(kind(&location), io::ErrorKind::InvalidData);
    ledger.layout().version.store(VERSION, Ordering::Relaxed);
    open(&location).expect("now it is one");

    drop(ledger);
    assert!(open(&location).is_err(), "its maker has dropped it");
}

#[test]
fn what_could_shrink_is_not_mapped() {
    let ledger = ledger();
    let location = ledger.location().expect("it was made here");
    let (path, token) = location.split_once(':').expect("a token");
    // A ledger in all but the seals.
    let copy = rustix::fs::memfd_create("copy", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let copy = copy.expect("there is memory");
    let bytes = std::fs::read(path).expect("it can be read");
    let written = rustix::io::write(&copy, &bytes).expect("there is memory");
    assert_eq!(written, bytes.len());
    let location = format!("/proc/self/fd/{}:{token}", copy.as_raw_fd());
    let open = || Ledger::open(OsStr::new(&location)).map(drop);
    let refused = open().expect_err("it could shrink");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    rustix::fs::fcntl_add_seals(&copy, SealFlags::SHRINK).expect("it may be sealed");
    open().expect("now it cannot");
}

#[test]
fn what_a_process_counts_is_seen_by_others() {
    let supervisor = ledger();
    let agent = reopened(&supervisor);
    let slot = agent.claim(std::process::id(), name()).expect("there is room");
    slot.add(Counter::PagesOut, 3);
    slot.add(Counter::PagesOut, 4);
    slot.set_counter(Counter::Faults, 9);
    slot.set(Gauge::Resident, 4096);
    slot.set(Gauge::Resident, 1024);
    slot.stayed(uhmm::StayReason::Locked, 2);
    slot.fault_served(std::time::Duration::from_micros(10));

    let [record] = &supervisor.processes()[..] else { panic!("one process") };
    assert_eq!(record.state, State::Starting);
    slot.attached();
    let [record] = &supervisor.processes()[..] else { panic!("one process") };
    assert_eq!((record.pid, &*record.name), (std::process::id(), "program"));
    assert_eq!(record.state, State::Attached);
    assert_eq!(record.numbers.counter(Counter::PagesOut), 7);
    assert_eq!(record.numbers.counter(Counter::Faults), 9);
    assert_eq!(record.numbers.gauge(Gauge::Resident), 1024);
    assert_eq!(record.numbers.peak(Gauge::Resident), 4096);
    assert_eq!(record.numbers.stays().map(|(_, count)| count).collect::<Vec<_>>(), [2]);
    assert_eq!(record.numbers.latency().count(), 1);

    let totals = supervisor.totals();
    assert_eq!((totals.started, totals.attached), (1, 1));
    assert_eq!(totals.numbers.counter(Counter::PagesOut), 7);
}

#[test]
fn what_ended_processes_counted_is_kept() {
    let ledger = ledger();
    let child = sleeper();
    let slot = ledger.claim(child.id(), name()).expect("there is room");
    slot.attached();
    slot.add(Counter::PagesHome, 5);
    slot.stayed(uhmm::StayReason::Pinned, 1);
    slot.fault_served(std::time::Duration::from_micros(1));
    slot.set(Gauge::Away, 8192);
    assert_eq!(ledger.reap(), 0, "it lives");
    assert_eq!(ledger.take_stock().away, 8192);

    kill(child);
    assert_eq!(ledger.reap(), 1);
    assert_eq!(ledger.processes(), []);
    assert_eq!(ledger.take_stock(), Stock::default());
    let totals = ledger.totals();
    assert_eq!(totals.numbers.counter(Counter::PagesHome), 5);
    assert_eq!(totals.numbers.stays().map(|(_, count)| count).sum::<u64>(), 1);
    assert_eq!(totals.numbers.latency().count(), 1);
    assert_eq!(totals.numbers.gauge(Gauge::Away), 0);
    assert_eq!(totals.numbers.peak(Gauge::Away), 8192);

    // What it says after that, it says to nobody.
    slot.attached();
    assert_eq!((ledger.processes(), ledger.totals().attached), (vec![], 1));
}

#[test]
fn a_process_that_said_that_it_ends_is_reaped() {
    let ledger = ledger();
    let slot = ledger.claim(std::process::id(), name()).expect("there is room");
    slot.ended();
    assert_eq!(ledger.processes()[0].state, State::Ended);
    assert_eq!(ledger.reap(), 1);
}

#[test]
fn a_process_that_executes_another_program_keeps_what_it_counted() {
    let ledger = ledger();
    let before = ledger.claim(std::process::id(), name()).expect("there is room");
    before.attached();
    before.add(Counter::PagesOut, 1);
    before.set(Gauge::Resident, 4096);
    let after = ledger.claim(std::process::id(), OsStr::new("next")).expect("there is room");
    after.add(Counter::PagesOut, 2);

    let [record] = &ledger.processes()[..] else { panic!("one process") };
    assert_eq!((&*record.name, record.numbers.counter(Counter::PagesOut)), ("next", 2));
    assert_eq!(record.numbers.gauge(Gauge::Resident), 0);
    let totals = ledger.totals();
    assert_eq!((totals.started, totals.numbers.counter(Counter::PagesOut)), (2, 3));
}

#[test]
fn a_retirement_that_was_not_finished_is_finished_by_another() {
    let ledger = ledger();
    let (child, retirer) = (sleeper(), sleeper());
    let slot = ledger.claim(child.id(), name()).expect("there is room");
    slot.add(Counter::PagesOut, 1);
    slot.add(Counter::PagesHome, 2);
    // Somebody has begun, moved one number, and sleeps.
    let record = &ledger.layout().slots[0];
    let identity = proc::identity(retirer.id()).expect("it lives");
    record.word.store(Word::new(Phase::Retiring, identity).0, Ordering::Relaxed);
    let moved = record.record.counters[Counter::PagesOut as usize].swap(0, Ordering::Relaxed);
    ledger.layout().totals.counters[Counter::PagesOut as usize].store(moved, Ordering::Relaxed);
    kill(child);
    assert_eq!(ledger.reap(), 0, "it is left to who has begun");

    kill(retirer);
    assert_eq!(ledger.reap(), 1);
    let totals = ledger.totals().numbers;
    let counted = [Counter::PagesOut, Counter::PagesHome].map(|counter| totals.counter(counter));
    assert_eq!(counted, [1, 2]);
}

#[test]
fn more_processes_than_slots_are_counted() {
    let ledger = ledger();
    let children: Vec<Child> = (0..2).map(|_| sleeper()).collect();
    // All slots belong to a process that lives, but for none.
    let identity = proc::identity(std::process::id()).expect("this process");
    for slot in &ledger.layout().slots {
        slot.word.store(Word::new(Phase::Attached, identity).0, Ordering::Relaxed);
    }
    ledger.layout().slots_used.store(SLOTS as u64, Ordering::Relaxed);
    assert!(ledger.claim(children[0].id(), name()).is_none());
    assert!(ledger.claim(children[1].id(), name()).is_none());
    let totals = ledger.totals();
    assert_eq!((totals.started, totals.without_slot), (0, 2));
    let [note] = &totals.notes[..] else { panic!("one remark") };
    assert_eq!((note.kind, note.count), (NoteKind::NotManaged, 2));

    // One has died without a word: its slot is found.
    let gone = Identity { started: identity.started + 1, ..identity };
    ledger.layout().slots[7].word.store(Word::new(Phase::Attached, gone).0, Ordering::Relaxed);
    assert!(ledger.claim(children[0].id(), name()).is_some());
    children.into_iter().for_each(kill);
}

#[test]
fn a_process_of_another_namespace_gets_no_slot() {
    let ledger = ledger();
    ledger.layout().pid_namespace.fetch_add(1, Ordering::Relaxed);
    assert!(ledger.claim(std::process::id(), name()).is_none());
    assert!(ledger.totals().notes[0].text.contains("namespace"));
}

#[test]
fn remarks_are_counted_and_never_lost_silently() {
    let ledger = ledger();
    let slot = ledger.claim(std::process::id(), name()).expect("there is room");
    slot.warn("no filter");
    slot.warn("no filter");
    slot.not_managed("no filter");
    let long = "ü".repeat(300);
    ledger.note(NoteKind::Warning, &long);
    let notes = ledger.totals().notes;
    let rows: Vec<(NoteKind, &str, u64)> =
        notes.iter().map(|note| (note.kind, &*note.text, note.count)).collect();
    let expected = [
        (NoteKind::Warning, "no filter", 2),
        (NoteKind::NotManaged, "no filter", 1),
        (NoteKind::Warning, &long[..504], 1),
    ];
    assert_eq!(rows, expected);
    assert_eq!(ledger.processes()[0].state, State::NotManaged("no filter".to_owned()));

    for number in 0..layout::NOTES {
        ledger.note(NoteKind::Warning, &number.to_string());
    }
    let totals = ledger.totals();
    assert_eq!((totals.notes.len(), totals.notes_lost), (layout::NOTES, 3));
}

#[test]
fn the_sum_of_all_processes_has_a_peak_of_its_own() {
    let ledger = ledger();
    let children = [sleeper(), sleeper()];
    let slots = [0, 1].map(|which: usize| {
        let slot = ledger.claim(children[which].id(), name()).expect("there is room");
        slot.attached();
        slot
    });
    for [first, second] in [[100, 10], [10, 50], [70, 60]] {
        slots[0].set(Gauge::Resident, first);
        slots[1].set(Gauge::Resident, second);
        slots[1].set(Gauge::Away, 1000 - first);
        slots[1].set(Gauge::Stored, first);
        assert_eq!(ledger.take_stock().resident, first + second);
    }
    let totals = ledger.totals();
    assert_eq!(totals.numbers.peak(Gauge::Resident), 130);
    assert_eq!(totals.numbers.peak(Gauge::Away), 990);
    assert_eq!(totals.demand_peak, 1060);
    // What was stored while the most was away, and not the most that was stored.
    let Stock { resident, away, stored, .. } = totals.most_away;
    assert_eq!((resident, away, stored), (60, 990, 10));
    assert_eq!(totals.numbers.peak(Gauge::Stored), 100);
    assert_eq!(ledger.take_stock().attached, 2);
    children.into_iter().for_each(kill);
}

/// Threads of the same process play agents that come and go, while others reap: every count ends up
/// in the totals once, whoever moves it.
#[test]
fn nothing_is_lost_or_counted_twice_while_slots_come_and_go() {
    const ROUNDS: u64 = 2_000;
    const AGENTS: u64 = 3;
    let ledger = ledger();
    let children: Vec<Child> = (0..AGENTS).map(|_| sleeper()).collect();
    let barrier = Barrier::new(AGENTS as usize + 1);
    let overlaps = std::sync::atomic::AtomicU64::new(0);
    let done = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for child in &children {
            let (ledger, barrier, done) = (reopened(&ledger), &barrier, &done);
            let pid = child.id();
            scope.spawn(move || {
                barrier.wait();
                for _ in 0..ROUNDS {
                    let slot = ledger.claim(pid, name()).expect("there is room");
                    slot.attached();
                    slot.add(Counter::Sweeps, 1);
                    slot.ended();
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        barrier.wait();
        while done.load(Ordering::SeqCst) < AGENTS {
            overlaps.fetch_add(ledger.reap() as u64, Ordering::Relaxed);
        }
    });
    ledger.reap();
    let totals = ledger.totals();
    assert_eq!(totals.numbers.counter(Counter::Sweeps), AGENTS * ROUNDS);
    assert_eq!((totals.started, totals.attached), (AGENTS * ROUNDS, AGENTS * ROUNDS));
    assert!(overlaps.load(Ordering::Relaxed) > 0, "the reaper never met an agent's slot");
    children.into_iter().for_each(kill);
}

#[test]
fn a_child_and_its_parent_share_the_ledger() {
    // The puppet is this test binary: it opens the ledger by its location and counts.
    if let Some(location) = std::env::var_os("UHMM_LEDGER_PUPPET") {
        let ledger = Ledger::open(&location).expect("the parent has it");
        let slot = ledger.claim(std::process::id(), name()).expect("there is room");
        slot.attached();
        slot.add(Counter::PagesOut, 11);
        // As if it was killed: nothing is said at the end.
        return;
    }
    let ledger = ledger();
    let status = Command::new(std::env::current_exe().expect("it runs"))
        .args(["--exact", "ledger::tests::a_child_and_its_parent_share_the_ledger"])
        .env("UHMM_LEDGER_PUPPET", ledger.location().expect("it was made here"))
        .stdout(Stdio::null())
        .status()
        .expect("it starts");
    assert!(status.success());
    assert_eq!(ledger.totals().numbers.counter(Counter::PagesOut), 11);
    assert_eq!(ledger.reap(), 1);
    assert_eq!(ledger.totals().numbers.counter(Counter::PagesOut), 11);
}
