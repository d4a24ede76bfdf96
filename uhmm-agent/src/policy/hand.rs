//! What leaves: the hand of a clock.

use std::sync::Arc;

use uhmm::{DevicePagemap, MigrateReport, Page, PageRange, StayReason};
use uhmm_linux::Process;

use super::account::Survey;
use super::recall::Recall;
use crate::ledger::{Counter, Slot};
use crate::verify::{Book, moves_of};

/// How many pages leave together. Who touches one of them waits until all have left.
const BATCH: u64 = 64;

/// Goes round the memory, in the order of addresses.
#[derive(Debug)]
pub(crate) struct Hand {
    survey: Survey,
    /// Which part of the survey comes next, and from which page on.
    next: usize,
    from: Option<Page>,
    /// How many parts of the survey have been passed.
    passed: usize,
    recall: Arc<Recall>,
    /// Where it is noted what leaves, if somebody verifies that.
    book: Option<Arc<Book>>,
}

impl Hand {
    pub(crate) fn new(recall: Arc<Recall>, book: Option<Arc<Book>>) -> Hand {
        Hand { survey: Survey::default(), next: 0, from: None, passed: 0, recall, book }
    }

    /// Tells whether all that the survey has found was passed.
    pub(crate) fn needs_survey(&self) -> bool {
        self.passed >= self.survey.runs.len()
    }

    /// Goes on by another survey, from where the hand is.
    pub(crate) fn set_survey(&mut self, survey: Survey) {
        let at = self.from.or_else(|| Some(self.survey.runs.get(self.next)?.first()));
        self.next = at.map_or(0, |at| survey.runs.partition_point(|run| run.last() < at));
        self.from = at;
        self.passed = 0;
        self.survey = survey;
    }

    /// Moves at least `pages` pages to the device, as far as the survey goes, and returns how many
    /// left.
    pub(crate) fn evict(
        &mut self,
        process: &Process,
        to: &Arc<DevicePagemap>,
        slot: &Slot,
        pages: u64,
    ) -> u64 {
        let mut moved = 0;
        // Twice round: the first time, all may have a second chance.
        let mut rounds = 0;
        while moved < pages && rounds < 2 && !self.survey.runs.is_empty() {
            let Some(batch) = self.next_batch(&mut rounds, pages - moved) else { continue };
            let report = self.take(process, batch, to);
            moved += report.moved;
            if self.recall.left(report.moved) {
                process.resume_growth();
            }
            let busy =
                report.stayed.first().is_some_and(|stayed| stayed.reason == StayReason::Busy);
            slot.add(Counter::PagesOut, report.moved);
            // What has gone or left meanwhile was not kept by anything.
            let passing = [StayReason::AlreadyThere, StayReason::Gone, StayReason::Hole];
            for stayed in report.stayed.iter().filter(|stayed| !passing.contains(&stayed.reason)) {
                slot.stayed(stayed.reason, stayed.pages.pages());
            }
            if busy && report.moved == 0 {
                // The process forks: nothing leaves before that is over.
                break;
            }
        }
        if rounds > 0 {
            slot.add(Counter::Sweeps, rounds);
            self.passed = self.survey.runs.len();
        }
        moved
    }

    /// Moves pages to the device, and notes what is in them where that is asked for.
    fn take(&self, process: &Process, pages: PageRange, to: &Arc<DevicePagemap>) -> MigrateReport {
        let Some(book) = &self.book else { return process.migrate(pages, to).run() };
        // Before the pages are taken: see `verify`.
        let moves = moves_of(process);
        let migration = process.migrate(pages, to);
        migration.for_each_page(|page, bytes| book.note(page, bytes, moves));
        migration.run()
    }

    /// Returns pages that are to leave, and moves on; `None` if what comes next stays.
    fn next_batch(&mut self, rounds: &mut u64, most: u64) -> Option<PageRange> {
        if self.next >= self.survey.runs.len() {
            (self.next, self.from) = (0, None);
            *rounds += 1;
            return None;
        }
        let run = self.survey.runs[self.next];
        let first = self.from.map_or(run.first(), |from| from.max(run.first()));
        let rest = PageRange::from_bounds(first, run.last());
        let Some(rest) = rest else {
            self.pass();
            return None;
        };
        let (part, leaves) = self.recall.judge(rest, BATCH.min(most.max(1)));
        match part.last().checked_add(1).filter(|&next| next <= run.last()) {
            Some(next) => self.from = Some(next),
            None => self.pass(),
        }
        leaves.then_some(part)
    }

    fn pass(&mut self) {
        self.next += 1;
        self.passed += 1;
        self.from = None;
    }
}
