//! The budget of `uhmm run` holds, for programs that grow, that touch more than it in any order, that
//! are many, and that map and unmap all the time. What is asserted are counts and amounts, no times.

mod common;

use std::hint::black_box;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use common::{Folder, allowed, output, run};
use serde_json::Value;

/// What the program is to do, where this process is the program.
const PUPPET: &str = "UHMM_CLI_BUDGET_PUPPET";

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// A linear congruential generator.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) as usize % end
    }
}

/// Memory of which each page knows its number.
struct Field {
    words: Vec<u64>,
}

impl Field {
    const WORDS: usize = PAGE / 8;

    /// The last word that is used. The allocator has its own in front of all, so that those at the end
    /// are in the next page.
    const LAST: usize = Field::WORDS / 2;

    /// Touches so much memory for the first time, page by page. Zeroes are mapped, and not written.
    fn grow(mebibytes: usize) -> Field {
        let mut field = Field { words: vec![0; mebibytes * MIB / 8] };
        (0..field.pages()).for_each(|page| field.write(page));
        field
    }

    fn pages(&self) -> usize {
        self.words.len() / Field::WORDS
    }

    fn write(&mut self, page: usize) {
        let mut numbers = Numbers(page as u64);
        let words = &mut self.words[page * Field::WORDS..][..Field::WORDS];
        words.fill_with(|| numbers.below(1000) as u64);
        words[Field::LAST] = page as u64;
    }

    fn check(&self, page: usize) {
        let mut numbers = Numbers(page as u64);
        let words = &self.words[page * Field::WORDS..][..Field::WORDS];
        let expected = (numbers.below(1000) as u64, page as u64);
        assert_eq!((words[0], words[Field::LAST]), expected, "page {page}");
    }

    /// Looks at `touches` of the first `of` pages, at random.
    fn visit(&self, touches: usize, of: usize) {
        let mut numbers = Numbers(7);
        (0..touches).for_each(|_| self.check(numbers.below(of)));
    }
}

/// Is the program.
fn perform(task: &str) {
    let mut words = task.split(' ');
    let name = words.next().unwrap_or_default();
    let numbers: Vec<usize> = words.map(|word| word.parse().expect("a number")).collect();
    match (name, &numbers[..]) {
        ("grow", &[mebibytes]) => {
            let field = Field::grow(mebibytes);
            (0..field.pages()).step_by(97).for_each(|page| field.check(page));
        }
        // Grows, and visits some of its memory at random.
        ("visit", &[mebibytes, of, touches]) => {
            let field = Field::grow(mebibytes);
            field.visit(touches, of * MIB / PAGE);
        }
        ("several", &[processes, mebibytes]) => {
            let task = format!("meet {mebibytes} 1000");
            let start = |_| {
                let mut command = puppet(&task);
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
                command.spawn().expect("it starts")
            };
            let mut children: Vec<_> = (0..processes).map(start).collect();
            // All have grown before the first goes on: they need it all together.
            for child in &mut children {
                let said = BufReader::new(child.stdout.as_mut().expect("it is piped")).lines();
                assert!(said.map_while(Result::ok).any(|line| line == "grown"));
            }
            for mut child in children {
                drop(child.stdin.take());
                assert!(child.wait().expect("it is ours").success());
            }
        }
        // Grows, and waits for the end of what it reads.
        ("meet", &[mebibytes, touches]) => {
            let field = Field::grow(mebibytes);
            println!("grown");
            std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).expect("it can be read");
            field.visit(touches, field.pages());
        }
        // Keeps some, and allocates and frees more, each time a mapping of its own.
        ("churn", &[kept, passing, times]) => {
            let field = Field::grow(kept);
            for _ in 0..times {
                let other = Field::grow(passing);
                other.check(black_box(other.pages() / 2));
            }
            field.visit(2000, field.pages());
        }
        _ => panic!("what is {task}?"),
    }
    println!("done");
}

/// Returns the command that is the program.
fn puppet(task: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("it runs"));
    command.args(["--exact", "the_program", "--nocapture"]).env(PUPPET, task);
    command
}

#[test]
fn the_program() {
    if let Some(task) = std::env::var_os(PUPPET) {
        perform(task.to_str().expect("text"));
    }
}

/// Runs the program within a budget of so many MiB, and returns the report; `None` where it cannot be run.
#[track_caller]
fn report_of(budget: u64, task: &str) -> Option<Value> {
    if !allowed() {
        return None;
    }
    let folder = Folder::new();
    let report = folder.path("report");
    let report = report.to_str().expect("text");
    let budget = format!("{budget}M");
    let puppet = puppet(task);
    let program: Vec<_> = [puppet.get_program()].into_iter().chain(puppet.get_args()).collect();
    let mut command = run(&["--json", "--report", report, "--budget", &budget], &program);
    let found = output(command.env(PUPPET, task));
    let errors = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(found.status.success(), "{errors}");
    assert!(String::from_utf8_lossy(&found.stdout).contains("done"), "{errors}");
    let text = std::fs::read_to_string(report).expect("it was written");
    Some(serde_json::from_str(&text).expect("it is JSON"))
}

fn number(report: &Value, pointer: &str) -> u64 {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no {pointer}: {report:#}"))
}

/// Checks that the budget was reached, and exceeded by 5 per cent at most once warm.
#[track_caller]
fn kept_to(report: &Value) {
    let budget = number(report, "/budget_bytes");
    let (warm, needed) = (number(report, "/peak_bytes/warm"), number(report, "/peak_bytes/needed"));
    assert!(needed > budget * 5 / 4, "it would have fitted: {report:#}");
    assert!(warm > budget * 3 / 4, "it was never warm: {report:#}");
    assert!(warm <= budget + budget / 20, "{} % of the budget: {report:#}", warm * 100 / budget);
}

#[test]
fn a_program_that_grows_keeps_to_the_budget() {
    let Some(report) = report_of(48, "grow 112") else { return };
    kept_to(&report);
    assert!(number(&report, "/room_waits/count") > 0, "it never waited for room: {report:#}");
}

#[test]
fn a_program_that_touches_three_times_the_budget_at_random_keeps_to_it() {
    let Some(report) = report_of(32, "visit 96 96 5000") else { return };
    kept_to(&report);
}

#[test]
fn several_programs_keep_to_the_budget_together() {
    let Some(report) = report_of(48, "several 3 32") else { return };
    kept_to(&report);
}

#[test]
fn a_program_that_allocates_and_frees_keeps_to_the_budget() {
    let Some(report) = report_of(128, "churn 104 60 3") else { return };
    kept_to(&report);
}

/// Returns how many pages come home for `touches` touches of the first `of` of so many MiB, after as
/// many before, within a budget of 32 MiB.
fn pages_home_for(mebibytes: usize, of: usize, touches: usize) -> Option<u64> {
    let home = |times: usize| -> Option<u64> {
        let report = report_of(32, &format!("visit {mebibytes} {of} {}", touches * times))?;
        Some(number(&report, "/counts/pages_touched"))
    };
    Some(home(2)?.saturating_sub(home(1)?))
}

#[test]
fn a_working_set_that_fits_comes_home_once() {
    // 4096 pages are in it, of which 5 per cent are touched in the second half alone.
    let Some(home) = pages_home_for(48, 16, 12_000) else { return };
    assert!(home < 500, "{home} pages came home for 12000 touches after the first 12000");
}

#[test]
fn one_that_does_not_fit_misses_as_often_as_it_is_larger() {
    for (of, touches) in [(40, 4000), (64, 4000)] {
        let Some(home) = pages_home_for(of, of, touches) else { return };
        let expected = touches as u64 * (of as u64 - 32) / of as u64;
        assert!(
            (expected / 2..=expected * 3 / 2).contains(&home),
            "{home} pages came home for {touches} touches of {of} MiB, and not {expected}"
        );
    }
}
