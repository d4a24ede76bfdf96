//! How much memory a process has at home.
//!
//! To count it exactly takes a walk through its page tables: 13 ms for each GiB. The kernel's own
//! count of pages without a file costs a microsecond, and counts ours too, and what cannot move. So
//! an exact count tells by how much the kernel's differs, and until the next one the kernel's is
//! taken, less that, and less what the device has taken since.

use std::time::{Duration, Instant};

use uhmm::{PAGE_SIZE, PageRange};
use uhmm_linux::Process;

use super::hand::Hand;

/// A count may take one part in so many of the time.
const COUNTING: u32 = 16;

/// The memory of a process that is managed and at home, as far as it is known.
#[derive(Debug)]
pub(crate) struct Account {
    /// By how much the kernel counts more, when the device had `device` bytes in memory.
    others: u64,
    device: u64,
    current: u64,
    /// The kernel's own figures when they were last read.
    footprint: Footprint,
    /// When the next exact count may be.
    due: Instant,
}

/// What an exact count has found.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// What is in memory and may leave, in ascending order.
    pub(crate) runs: Vec<PageRange>,
    /// How many pages that is.
    pub(crate) pages: u64,
}

impl Survey {
    /// Looks at all memory.
    pub(crate) fn take(process: &Process) -> Survey {
        let mut runs = Vec::new();
        for range in process.movable() {
            process.resident(range, &mut runs);
        }
        let pages = runs.iter().map(|run| run.pages()).sum();
        Survey { runs, pages }
    }
}

impl Account {
    /// Counts for the first time.
    pub(crate) fn new(process: &Process) -> Account {
        let now = Instant::now();
        let footprint = Footprint::default();
        let mut account = Account { others: 0, device: 0, current: 0, footprint, due: now };
        account.note(&Survey::take(process), 0, now);
        account
    }

    /// Returns how much there is at home, in bytes, by the kernel's count.
    pub(crate) fn estimate(&mut self, device: u64) -> u64 {
        let others = (self.others + device).saturating_sub(self.device);
        self.footprint = Footprint::read();
        self.current = self.footprint.anonymous.saturating_sub(others);
        self.current
    }

    /// Returns the kernel's figures when they were last read.
    pub(crate) fn footprint(&self) -> Footprint {
        self.footprint
    }

    /// Notes that pages have left.
    pub(crate) fn left(&mut self, bytes: u64) {
        self.current = self.current.saturating_sub(bytes);
    }

    /// Counts exactly if it is time to, or if the hand has nothing left to go by; estimates
    /// otherwise. Returns how much there is at home.
    pub(crate) fn measure_if_due(
        &mut self,
        process: &Process,
        device: u64,
        hand: &mut Hand,
    ) -> u64 {
        let now = Instant::now();
        if now < self.due && !hand.needs_survey() {
            return self.estimate(device);
        }
        let survey = Survey::take(process);
        self.note(&survey, device, now);
        hand.set_survey(survey);
        self.current
    }

    fn note(&mut self, survey: &Survey, device: u64, began: Instant) {
        self.current = survey.pages * PAGE_SIZE as u64;
        self.footprint = Footprint::read();
        self.others = self.footprint.anonymous.saturating_sub(self.current);
        self.device = device;
        self.due = Instant::now() + (began.elapsed() * COUNTING).max(Duration::from_millis(10));
    }
}

/// What the kernel counts for this process, in bytes; 0 where it does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// What is mapped.
    pub(crate) mapped: u64,
    /// Memory without a file.
    pub(crate) anonymous: u64,
    /// Memory of files, and shared.
    pub(crate) others: u64,
}

impl Footprint {
    /// Reads it.
    pub(crate) fn read() -> Footprint {
        let mut text = [0_u8; 128];
        let read = std::fs::File::open("/proc/self/statm")
            .and_then(|mut file| std::io::Read::read(&mut file, &mut text));
        let text = str::from_utf8(&text[..read.unwrap_or(0)]).unwrap_or("");
        Footprint::parse(text).unwrap_or_default()
    }

    /// Finds it in the text of a `statm` file: the first field is what is mapped, the second what of
    /// that is in memory, the third what of that is of files and shared (proc_pid_statm(5)).
    fn parse(statm: &str) -> Option<Footprint> {
        let mut fields = statm.split(' ').map(|field| field.trim().parse::<u64>());
        let mut pages = || fields.next()?.ok();
        let (mapped, resident, shared) = (pages()?, pages()?, pages()?);
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        let anonymous = bytes(resident.saturating_sub(shared));
        Some(Footprint { mapped: bytes(mapped), anonymous, others: bytes(shared) })
    }
}

/// Returns how much memory the program has locked, in bytes; 0 where the kernel does not tell.
pub(crate) fn locked_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    locked_in(&status).unwrap_or(0)
}

/// Finds it in the text of a `status` file (proc_pid_status(5)).
fn locked_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Returns how much memory without a file the kernel counts for this process, in bytes; 0 where it
/// does not tell.
pub(crate) fn anonymous_bytes() -> u64 {
    Footprint::read().anonymous
}

/// Returns how much of `budget` is for a process that has `own` of `all` bytes: all that the others
/// leave, or where there is too much, its proportional part.
pub(crate) fn share(budget: u64, own: u64, all: u64) -> u64 {
    let all = all.max(own);
    if all <= budget {
        return budget - (all - own);
    }
    let part = u128::from(budget) * u128::from(own) / u128::from(all.max(1));
    u64::try_from(part).unwrap_or(budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_without_a_file_is_found_in_what_the_kernel_says() {
        let anonymous = |text| Footprint::parse(text).map(|found| found.anonymous);
        assert_eq!(anonymous("1000 300 120 5 0 400 0\n"), Some(180 * PAGE_SIZE as u64));
        assert_eq!(anonymous("1000 100 120 5 0 400 0\n"), Some(0));
        assert_eq!(anonymous("1000 300\n"), None);
        assert_eq!(anonymous("a b c"), None);
        let mapped = Footprint::parse("7 3 1").map(|found| found.mapped);
        assert_eq!(mapped, Some(7 * PAGE_SIZE as u64));
        assert!(anonymous_bytes() > 0);
    }

    #[test]
    fn locked_memory_is_found_in_what_the_kernel_says() {
        assert_eq!(locked_in("Name:\ta\nVmLck:\t      12 kB\nVmPin:\t 0 kB\n"), Some(12 << 10));
        assert_eq!(locked_in("Name:\ta\n"), None);
    }

    #[test]
    fn shares_fill_the_budget_and_no_more() {
        // Alone, with room.
        assert_eq!(share(100, 30, 30), 100);
        // What the others leave.
        assert_eq!(share(100, 30, 80), 50);
        // Too much: each its part, and the parts are the budget.
        assert_eq!(share(100, 150, 200) + share(100, 50, 200), 100);
        assert_eq!(share(100, 0, 0), 100);
        assert_eq!(share(100, 500, 10), 100);
    }
}
