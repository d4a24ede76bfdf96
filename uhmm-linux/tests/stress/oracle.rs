//! The process that watches: it knows from the journal what every byte is to be, and looks.
//!
//! It looks from outside, by process_vm_readv(2), in two ways. When the threads have come to rest, it
//! reads every page, wherever it is, and compares all of it. And at any moment it stops the whole
//! process, with every thread in the middle of something and nobody to bring a page, and compares
//! those that are in the page table: whatever is there must be the one true copy.

use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uhmm::PAGE_SIZE;
use uhmm::primitive::lock;

use super::driver;
use super::journal::{
    self, ACTORS, COUNTERS, END, FILL, Journal, MAPPED, Overlap, PAGES, READABLE, SHARED, STORE,
    WORDS, WORKERS, WRITABLE, address, value,
};
use super::random::Random;
use super::system;
use super::worker;
use crate::common::{memory, stacks};

/// Tells the process under test that it is, and where the journal is.
pub(crate) const JOURNAL: &str = "UHMM_STRESS_JOURNAL";

/// How long a thread may be at one step before it counts as hanging. Beside many others on few
/// processors much of it is waiting for its turn.
const STEP: Duration = Duration::from_secs(90);

/// How long everybody works between two rests.
const ROUND: Duration = Duration::from_millis(1500);

/// How long to run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// At least so long,
    pub(crate) at_least: Duration,
    /// and at most so long, as long as something has not come together often enough.
    pub(crate) at_most: Duration,
}

struct Watch {
    journal: &'static Journal,
    child: Child,
    /// When the process is ended, whatever the watcher is in the middle of: it may be waiting for a
    /// page of it.
    limit: Arc<Mutex<Instant>>,
    random: Random,
    /// The steps of each actor, and since when there are so many.
    steps: Vec<(u64, Instant)>,
    stops: u64,
}

/// Starts the process under test and watches it.
pub(crate) fn watch(plan: Plan) {
    let (journal, file) = Journal::create();
    journal.seed.store(plan.seed, SeqCst);
    println!("UHMM_SEED={:#x}, for {:?} to {:?}", plan.seed, plan.at_least, plan.at_most);
    let child = Command::new(std::env::current_exe().expect("a program has a file"))
        .args(std::env::args_os().skip(1))
        .env(JOURNAL, file.as_raw_fd().to_string())
        .spawn()
        .expect("the program can be started again");
    let steps = vec![(0, Instant::now()); ACTORS];
    let random = Random::new(plan.seed, u64::MAX);
    let limit = Arc::new(Mutex::new(Instant::now() + STEP));
    end_at(child.id(), Arc::clone(&limit));
    let mut watch = Watch { journal, child, limit, random, steps, stops: 0 };
    let began = Instant::now();
    let mut command = 0;
    loop {
        watch.let_work(command);
        command += 1;
        watch.bring_to_rest(command);
        let enough = Overlap::ALL.iter().all(|&(overlap, least)| journal.counted(overlap) >= least);
        let elapsed = began.elapsed();
        if elapsed >= plan.at_least && (enough || elapsed >= plan.at_most) {
            break;
        }
        command += 1;
        watch.go_on(command);
    }
    journal.command.store(END, SeqCst);
    watch.end();
    println!("after {:?}, {} stops:\n{}", began.elapsed(), watch.stops, overlaps(journal));
    for &(overlap, least) in Overlap::ALL {
        let counted = journal.counted(overlap);
        assert!(counted >= least, "{overlap:?} happened {counted} times, and {least} is too few");
    }
}

/// Ends a process at a limit that may be put off.
fn end_at(pid: u32, limit: Arc<Mutex<Instant>>) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(100));
            if *lock(&limit) < Instant::now() {
                println!("process {pid} is ended:\n{}", stacks::of_process(pid));
                system::signal(pid, libc::SIGKILL);
                return;
            }
        }
    });
}

fn overlaps(journal: &Journal) -> String {
    let mut text = String::new();
    for &(overlap, least) in Overlap::ALL {
        let _ = writeln!(text, "{:>10} {overlap:?} (at least {least})", journal.counted(overlap));
    }
    text
}

impl Watch {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the test with what was wrong.
    #[track_caller]
    fn fail(&mut self, what: &str) -> ! {
        // Where it is, before it moves on.
        let stacks = stacks::of_process(self.pid());
        let mut actors = String::new();
        for (index, actor) in self.journal.actors.iter().enumerate() {
            let doing = actor.doing.load(SeqCst);
            let doing = if index < WORKERS { worker::name(doing) } else { driver::name(doing) };
            let steps = actor.steps.load(SeqCst);
            let _ = writeln!(actors, "actor {index}: {doing}, after {steps} steps");
        }
        let _ = self.child.kill();
        let overlaps = overlaps(self.journal);
        let seed = self.journal.seed.load(SeqCst);
        panic!("UHMM_SEED={seed:#x}: {what}\n{actors}{overlaps}{stacks}");
    }

    /// Fails if anybody has complained, hangs, or has ended the process.
    #[track_caller]
    fn look_after(&mut self) {
        if self.journal.has_failed() {
            let until = Instant::now() + Duration::from_secs(5);
            while self.journal.complaint().is_none() && Instant::now() < until {
                std::thread::yield_now();
            }
            let complaint = self.journal.complaint().unwrap_or_default();
            self.fail(&complaint);
        }
        if let Some(status) = self.child.try_wait().expect("it is ours") {
            self.fail(&format!("the process ended with {status}"));
        }
        for (index, (steps, since)) in self.steps.iter_mut().enumerate() {
            let now = self.journal.actors[index].steps.load(SeqCst);
            if now != *steps {
                (*steps, *since) = (now, Instant::now());
            }
        }
    }

    fn reset_patience(&mut self) {
        let now = Instant::now();
        *lock(&self.limit) = now + 3 * STEP;
        self.steps.iter_mut().for_each(|(_, since)| *since = now);
    }

    fn let_work(&mut self, command: u64) {
        let until = Instant::now() + ROUND;
        let mut stop_at = Instant::now() + Duration::from_millis(100);
        self.reset_patience();
        while Instant::now() < until || command == 0 && self.has_not_begun() {
            self.look_after();
            if let Some(index) = self.steps.iter().position(|(_, since)| since.elapsed() > STEP) {
                self.fail(&format!("actor {index} hangs"));
            }
            if Instant::now() > stop_at {
                self.compare_in_the_middle();
                let pause = 50 + self.random.next() % 200;
                stop_at = Instant::now() + Duration::from_millis(pause);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn has_not_begun(&self) -> bool {
        self.journal.actors.iter().any(|actor| actor.steps.load(SeqCst) == 0)
    }

    fn bring_to_rest(&mut self, command: u64) {
        self.reset_patience();
        self.journal.command.store(command, SeqCst);
        self.wait_until("does not come to rest", |journal| journal.settled.load(SeqCst) == command);
        self.compare_all("at rest");
        self.journal.compared.store(command, SeqCst);
        if command % 4 == 3 {
            self.wait_until("does not detach", |journal| journal.detached.load(SeqCst) == command);
            self.compare_all("when detached");
        }
    }

    fn go_on(&mut self, command: u64) {
        self.journal.command.store(command, SeqCst);
    }

    #[track_caller]
    fn wait_until(&mut self, complaint: &str, done: impl Fn(&Journal) -> bool) {
        let began = Instant::now();
        while !done(self.journal) {
            self.look_after();
            if began.elapsed() > 2 * STEP {
                self.fail(complaint);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.look_after();
    }

    fn end(&mut self) {
        let began = Instant::now();
        loop {
            match self.child.try_wait().expect("it is ours") {
                Some(status) if status.success() => break,
                Some(status) => self.fail(&format!("the process ended with {status}")),
                None if began.elapsed() > 2 * STEP => self.fail("the process does not end"),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        if let Some(complaint) = self.journal.complaint() {
            self.fail(&complaint);
        }
    }

    // At rest.

    /// Compares every byte of every page, and how each is mapped.
    fn compare_all(&mut self, when: &str) {
        self.reset_patience();
        if let Err(what) = self.compare_mappings().and_then(|()| self.compare_pages()) {
            self.fail(&format!("{when}: {what}"));
        }
    }

    fn compare_pages(&self) -> Result<(), String> {
        for page in 0..PAGES {
            let sheet = &self.journal.pages[page];
            let common = journal::owner(page).is_none();
            if !common && !sheet.has(READABLE) {
                continue;
            }
            let found = self.read_page(page)?;
            for (word, &found) in found.iter().enumerate() {
                let expected = if common { self.common_word(page, word) } else { sheet.word(word) };
                if found != expected {
                    return Err(format!(
                        "word {word} of page {page} of {:?} at {:#x} is {found:#x} {:?}, and was to \
                         be {expected:#x} {:?}",
                        journal::owner(page),
                        address(page, 0),
                        journal::parse(found),
                        journal::parse(expected),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Returns what a word is to be that everybody uses.
    fn common_word(&self, page: usize, word: usize) -> u64 {
        let at = address(page, word);
        let counter = (0..COUNTERS).find(|&counter| journal::counter(counter) == at);
        if let Some(counter) = counter {
            return self.journal.sums(counter).0;
        }
        let mut words = (0..SHARED).flat_map(|page| (0..ACTORS).map(move |actor| (page, actor)));
        let stored = words.find(|&(page, actor)| journal::shared_word(page, actor) == at);
        stored.map_or(0, |(page, actor)| self.journal.stored[actor][page].load(SeqCst))
    }

    fn read_page(&self, page: usize) -> Result<[u64; WORDS], String> {
        let mut bytes = [0; PAGE_SIZE];
        let at = address(page, 0);
        match system::read_process(self.pid(), at, &mut bytes) {
            Ok(PAGE_SIZE) => {}
            other => return Err(format!("page {page} at {at:#x} cannot be read: {other:?}")),
        }
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("a word has eight bytes"));
        }
        Ok(words)
    }

    /// Compares what is mapped, and with which rights.
    fn compare_mappings(&self) -> Result<(), String> {
        let path = format!("/proc/{}/maps", self.pid());
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        let mut found = vec![0; PAGES];
        for line in text.lines().filter_map(memory::Line::parse) {
            let letters = line.rights.as_bytes();
            let bits = MAPPED
                | if letters[0] == b'r' { READABLE } else { 0 }
                | if letters[1] == b'w' { WRITABLE } else { 0 };
            for (page, found) in found.iter_mut().enumerate() {
                if line.range.contains(&address(page, 0)) {
                    *found = bits;
                }
            }
        }
        let all = MAPPED | READABLE | WRITABLE;
        for (page, found) in found.into_iter().enumerate() {
            let expected = match journal::owner(page) {
                None => all,
                Some(_) => self.journal.pages[page].state() & all,
            };
            if found != expected {
                return Err(format!(
                    "page {page} is mapped as {found:#x}, and not as {expected:#x}"
                ));
            }
        }
        Ok(())
    }

    // In the middle.

    /// Stops the process, compares what is in its page table, and lets it go on.
    fn compare_in_the_middle(&mut self) {
        system::signal(self.pid(), libc::SIGSTOP);
        let result = match self.has_stopped() {
            true => self.compare_present(),
            false => Ok(()),
        };
        system::signal(self.pid(), libc::SIGCONT);
        if let Err(what) = result {
            self.fail(&format!("stopped in the middle: {what}"));
        }
        self.stops += 1;
        self.reset_patience();
    }

    /// Waits until no thread runs, or is about to.
    fn has_stopped(&self) -> bool {
        let until = Instant::now() + Duration::from_secs(2);
        let mut still = 0;
        // Who sleeps where no signal stops it may be on its way from there; so twice.
        while still < 2 && Instant::now() < until {
            let states = self.thread_states();
            let stopped =
                states.iter().all(|(state, _)| matches!(state, 'T' | 't' | 'D' | 'Z' | 'X'));
            still = if stopped { still + 1 } else { 0 };
            std::thread::sleep(Duration::from_millis(1));
            if still > 0 && self.thread_states() != states {
                still = 0;
            }
        }
        still >= 2
    }

    /// Returns of each thread its state, and how long it has run.
    fn thread_states(&self) -> Vec<(char, String)> {
        let folder = format!("/proc/{}/task", self.pid());
        let threads = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let state = |thread: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
            let (_, fields) = stat.rsplit_once(')')?;
            let fields: Vec<&str> = fields.split_whitespace().collect();
            Some((fields[0].chars().next()?, format!("{} {}", fields[11], fields[12])))
        };
        threads.filter_map(state).collect()
    }

    fn compare_present(&self) -> Result<(), String> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid()));
        let pagemap = pagemap.map_err(|error| error.to_string())?;
        let mut entries = vec![0; PAGES * 8];
        let offset = journal::BASE / PAGE_SIZE as u64 * 8;
        pagemap.read_exact_at(&mut entries, offset).map_err(|error| error.to_string())?;
        let present = |entry: &[u8]| entry[7] & 0x80 != 0;
        for (page, entry) in entries.chunks_exact(8).enumerate() {
            if journal::owner(page).is_some()
                && present(entry)
                && self.journal.pages[page].has(READABLE)
            {
                self.compare_stopped(page)?;
            }
        }
        Ok(())
    }

    fn compare_stopped(&self, page: usize) -> Result<(), String> {
        let sheet = &self.journal.pages[page];
        let owner = journal::owner(page).expect("the caller has looked");
        let actor = &self.journal.actors[owner];
        let intent = actor.intent.load(SeqCst);
        let at_it = sheet.quiet_version().is_none();
        let here = actor.page.load(SeqCst) == page as u64;
        if at_it && !(here && matches!(intent, STORE | FILL)) {
            // A mapping is being changed: it may be before or after.
            return Ok(());
        }
        let (at, new) = (actor.word.load(SeqCst) as usize, actor.value.load(SeqCst));
        let found = self.read_page(page)?;
        self.journal.count(Overlap::compared_while_stopped, 1);
        for (word, &found) in found.iter().enumerate() {
            let expected = sheet.word(word);
            let about = match intent {
                STORE if at_it && word == at => Some(new),
                FILL if at_it => Some(value(owner, new, word)),
                _ => None,
            };
            if found != expected && Some(found) != about {
                return Err(format!(
                    "word {word} of page {page} of worker {owner} at {:#x} is {found:#x} {:?}, and was \
                     to be {expected:#x} {:?}, or {about:x?}",
                    address(page, 0),
                    journal::parse(found),
                    journal::parse(expected),
                ));
            }
        }
        Ok(())
    }
}
