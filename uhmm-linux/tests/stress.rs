//! Everything at once, for a time: threads that load, store, map, unmap, move, protect, discard, lock
//! and fork, while devices fault, take pages, hold them exclusively and leave. Another process knows
//! every byte.
//!
//! `cargo test` runs it for 15 seconds, and for longer, up to 90, where the machine is so busy that
//! too little has come together by then; `UHMM_STRESS_SECONDS` asks for more. `UHMM_SEED` is the
//! seed of an earlier run: the threads make the same choices then, in an order that only the
//! scheduler knows. `UHMM_STRESS_WITHOUT` names steps to leave out, to find out which it takes.
//!
//! The run fails if anything was lost, hangs or is left behind, and also if too little has come
//! together for that to mean much. `mutants.txt` lists breaks of the rules that it must find.

mod common;

mod stress {
    pub(crate) mod child;
    pub(crate) mod driver;
    pub(crate) mod gpu;
    pub(crate) mod journal;
    pub(crate) mod oracle;
    pub(crate) mod random;
    pub(crate) mod subject;
    pub(crate) mod system;
    pub(crate) mod worker;
}

use std::time::{Duration, SystemTime};

use common::OwnProcess;
use stress::journal::Journal;
use stress::oracle::{JOURNAL, Plan, watch};
use stress::subject;

/// Reads a number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

fn plan() -> Plan {
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = number("UHMM_SEED")
        .unwrap_or_else(|| now().expect("it is later than 1970").as_nanos() as u64 & 0xffff_ffff);
    let seconds = Duration::from_secs(number("UHMM_STRESS_SECONDS").unwrap_or(15));
    let whole = std::env::var_os("UHMM_STRESS_WITHOUT").is_none();
    let at_most = if whole { seconds.max(Duration::from_secs(90)) } else { seconds };
    Plan { seed, at_least: seconds, at_most }
}

#[test]
fn every_byte_is_where_it_must_be() {
    let plan = plan();
    // A hang is found out by those who watch; this is for theirs.
    let deadline = plan.at_most + Duration::from_secs(240);
    OwnProcess::new().deadline(deadline).run(|| match number(JOURNAL) {
        None => watch(plan),
        Some(file) => {
            subject::run(Journal::map(file as i32));
            std::process::exit(0);
        }
    });
}
