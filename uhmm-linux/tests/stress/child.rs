//! Children, which compare what they have inherited.
//!
//! A child has the memory of its parent as it was at the fork, and the journal as it is now. What
//! its parent's thread owns it compares to the bit: that thread waits. Of what others own it
//! compares what has not changed since before the fork. It allocates nothing and takes no lock,
//! since another thread may have held one at the fork.

use std::sync::atomic::Ordering::SeqCst;

use super::journal::{self, COUNTERS, Journal, Overlap, PAGES, READABLE, WORDS, address};
use super::system;
use crate::common;
use crate::common::trap;

/// How long a child may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// How a child ends that has found everything as it was to be.
const RIGHT: i32 = 0;
/// How one ends that has complained.
const WRONG: i32 = 1;

/// Forks on behalf of a worker, has the child compare, and waits for it.
pub(crate) fn fork_and_compare(journal: &'static Journal, worker: usize, raw: bool) {
    for (page, version) in journal.before_fork[worker].iter().enumerate() {
        version.store(journal.pages[page].version.load(SeqCst), SeqCst);
    }
    for (counter, sum) in journal.counted_before_fork[worker].iter().enumerate() {
        sum.store(journal.sums(counter).0, SeqCst);
    }
    let child = if raw { system::raw_fork() } else { common::fork() };
    let Some(child) = child else {
        common::alarm(PATIENCE);
        common::exit_now(if compare(journal, worker, raw) { RIGHT } else { WRONG });
    };
    let status = system::wait(child);
    if status != 0 {
        journal.complain(format_args!(
            "a child of worker {worker} ended with status {status:#x}, raw clone: {raw}"
        ));
    }
    journal.count(Overlap::children, 1);
}

/// Compares everything, in the child.
fn compare(journal: &'static Journal, worker: usize, raw: bool) -> bool {
    let pages = (0..PAGES).all(|page| compare_page(journal, worker, page, raw));
    pages && (0..COUNTERS).all(|counter| compare_counter(journal, worker, counter, raw))
}

fn compare_page(journal: &'static Journal, worker: usize, page: usize, raw: bool) -> bool {
    let Some(owner) = journal::owner(page) else { return true };
    let sheet = &journal.pages[page];
    let before = journal.before_fork[worker][page].load(SeqCst);
    let unchanged = || sheet.quiet_version() == Some(before);
    if !unchanged() || !sheet.has(READABLE) {
        return true;
    }
    // All of what is its own, and some of what is not.
    let step = if owner == worker { 1 } else { 61 };
    for word in (0..WORDS).step_by(step) {
        let (expected, found) = (sheet.word(word), trap::load(address(page, word)));
        if found != Ok(expected) && unchanged() {
            let parsed = found.map(journal::parse);
            journal.complain(format_args!(
                "in a child of worker {worker} (raw clone: {raw}) word {word} of page {page} of \
                 worker {owner} is {found:x?} {parsed:?}, and was to be {expected:#x} {:?}",
                journal::parse(expected)
            ));
            return false;
        }
    }
    true
}

fn compare_counter(journal: &'static Journal, worker: usize, counter: usize, raw: bool) -> bool {
    let least = journal.counted_before_fork[worker][counter].load(SeqCst);
    let found = trap::load(journal::counter(counter));
    let most = journal.sums(counter).1;
    if found.is_ok_and(|found| (least..=most).contains(&found)) {
        return true;
    }
    journal.complain(format_args!(
        "in a child of worker {worker} (raw clone: {raw}) counter {counter} is {found:?}, and was \
         to be from {least} to {most}"
    ));
    false
}
