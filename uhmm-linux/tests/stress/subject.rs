//! The process under test: its threads, its devices, and how they come to rest.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use uhmm::{EventKind, PAGE_SIZE};
use uhmm_linux::{Options, Process};

use super::driver::Driver;
use super::gpu::{Accesses, Gpu, InPlace, Own, Refused};
use super::journal::{
    self, ACTORS, END, Journal, Overlap, PAGES, READABLE, SHARED, USUAL, WANTS_LARGE, WORDS,
    WORKERS, address,
};
use super::random::Random;
use super::worker::Worker;
use crate::common::leaks::holdings;
use crate::common::memory::{self, Backing, RW};
use crate::common::rig;
use crate::common::trap;

/// How long what changes were seen may take to be known to the devices, with nobody at work.
const MOMENT: Duration = Duration::from_secs(10);

/// How many pages are looked at by each device when everybody is at rest.
const SAMPLE: usize = 64;

/// The process while it is attached.
pub(crate) struct Live {
    pub(crate) journal: &'static Journal,
    pub(crate) process: Process,
    pub(crate) gpus: [Arc<dyn Gpu>; 2],
    /// The steps that are left out, by name.
    pub(crate) without: Vec<String>,
}

impl Live {
    fn attach(journal: &'static Journal) -> Live {
        let process = rig::attach_with(Options::new().staging_bytes(1 << 30));
        let own: Arc<dyn Gpu> = Arc::new(Own::start(&process, 2048, 700));
        let in_place: Arc<dyn Gpu> = Arc::new(InPlace::start(&process, 1200));
        let without = std::env::var("UHMM_STRESS_WITHOUT").unwrap_or_default();
        let without = without.split(',').map(|step| step.trim().to_owned()).collect();
        Live { journal, process, gpus: [own, in_place], without }
    }

    /// Detaches, with pages out.
    fn detach(self) {
        let Live { journal, process, gpus, .. } = self;
        gpus.iter().for_each(|gpu| gpu.stop());
        let before = process.statistics();
        if before.lost_staging > 0 {
            journal.complain(format_args!("staging was lost: {before:?}"));
        }
        if before.refused + before.replaced > 0 {
            journal.complain(format_args!("pages were given up: {before:?}"));
        }
        println!("{before:?}");
        let pagemaps = gpus.each_ref().map(|gpu| Arc::clone(gpu.pagemap()));
        drop(gpus);
        drop(process);
        for pagemap in &pagemaps {
            println!("{}: {:?}", pagemap.name(), pagemap.statistics());
            if pagemap.used() > 0 {
                let pages = pagemap.used();
                journal.complain(format_args!("{pages} pages are still in {}", pagemap.name()));
            }
        }
    }

    /// Notes what the process has counted by itself.
    fn note_overlaps(&self, so_far: &mut Vec<(Overlap, u64)>) {
        let counted = self.process.statistics();
        let now = [
            (Overlap::cpu_fault_in_transit, counted.faults_in_transit),
            (Overlap::unmapped_on_device, counted.unmapped_out),
            (Overlap::unmapped_in_transit, counted.unmapped_in_transit),
            (Overlap::removed_on_device, counted.discarded_out),
            (Overlap::removed_in_transit, counted.discarded_in_transit),
            (Overlap::moved_on_device, counted.remapped_out),
            (Overlap::moved_in_transit, counted.remapped_in_transit),
            (Overlap::retried, counted.retries),
            (Overlap::revoked, counted.revoked),
            (Overlap::fork_overrun, counted.fork_overrun),
            (Overlap::unforeseen_fork, counted.unforeseen_forks),
        ];
        for (overlap, count) in now {
            let before = so_far.iter().find(|(of, _)| *of == overlap).map_or(0, |&(_, of)| of);
            self.journal.count(overlap, count - before);
        }
        *so_far = now.to_vec();
    }
}

/// What an actor needs to look at pages, by CPU and by device.
pub(crate) struct Looks<'a> {
    live: &'a Live,
    journal: &'static Journal,
    actor: usize,
    contexts: [Option<Box<dyn Accesses>>; 2],
}

impl<'a> Looks<'a> {
    pub(crate) fn new(live: &'a Live, actor: usize) -> Looks<'a> {
        Looks { live, journal: live.journal, actor, contexts: [None, None] }
    }

    /// Has a device make an access; `None` if it was not made.
    pub(crate) fn device<R>(
        &mut self,
        device: usize,
        f: impl FnOnce(&dyn Accesses) -> Result<R, Refused>,
    ) -> Option<R> {
        let context = &mut self.contexts[device];
        if context.is_none() {
            *context = self.live.gpus[device].context();
        }
        match f(context.as_deref()?) {
            Ok(result) => Some(result),
            Err(Refused::Gone) => {
                *context = None;
                self.journal.count(Overlap::unregistered, 1);
                None
            }
            Err(refused @ Refused::Stuck(_)) => {
                let device = self.live.gpus[device].name();
                self.journal
                    .complain(format_args!("{device}, for actor {}: {refused:?}", self.actor));
                None
            }
            Err(_) => {
                self.journal.count(Overlap::refused, 1);
                None
            }
        }
    }

    /// Compares a word of anybody's.
    pub(crate) fn by_cpu(&self, page: usize, word: usize) {
        let Some(owner) = journal::owner(page) else { return };
        let sheet = &self.journal.pages[page];
        let Some(version) = sheet.quiet_version() else { return };
        if !sheet.has(READABLE) {
            return;
        }
        let found = trap::load(address(page, word));
        let expected = sheet.word(word);
        if sheet.quiet_version() != Some(version) {
            return;
        }
        self.journal.count(Overlap::exact_cpu_load, 1);
        if found != Ok(expected) {
            let (is, was) = (found.map(journal::parse), journal::parse(expected));
            self.journal.complain(format_args!(
                "actor {} loaded {found:x?} {is:?} from word {word} of page {page} of worker {owner} \
                 at {:#x}, and it was {expected:#x} {was:?}\n{:?}",
                self.actor,
                address(page, 0),
                self.live.process.snapshot(journal::range(page, 1))[0],
            ));
        }
    }

    /// Compares a whole page of anybody's, as `read` finds it.
    pub(crate) fn by_kernel(
        &self,
        page: usize,
        read: &mut dyn FnMut(u64) -> Result<(usize, [u8; PAGE_SIZE]), Errno>,
    ) {
        let Some(owner) = journal::owner(page) else { return };
        let sheet = &self.journal.pages[page];
        let Some(version) = sheet.quiet_version() else { return };
        if !sheet.has(READABLE) {
            return;
        }
        let found = read(address(page, 0));
        let mut wrong = None;
        if let Ok((PAGE_SIZE, bytes)) = &found {
            let words =
                bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8")));
            wrong = words.enumerate().find(|&(word, found)| found != sheet.word(word));
            if wrong.is_none() {
                return;
            }
        }
        if sheet.quiet_version() == Some(version) {
            let found = found.map(|(bytes, _)| bytes);
            self.journal.complain(format_args!(
                "a system call of actor {} got {found:?} {wrong:x?} of page {page} of worker {owner}",
                self.actor
            ));
        }
    }

    /// Compares a word of anybody's, as a device finds it; tells whether it is as it must be at last.
    pub(crate) fn by_device(&mut self, device: usize, page: usize, word: usize) -> bool {
        let Some(owner) = journal::owner(page) else { return true };
        let sheet = &self.journal.pages[page];
        let Some(version) = sheet.quiet_version() else { return true };
        let (announced, readable) = (sheet.is_announced(), sheet.has(READABLE));
        let mut refused = None;
        let found = self.device(device, |accesses| match accesses.load(address(page, word)) {
            Err(Refused::NotMapped) => {
                refused = Some(Refused::NotMapped);
                Err(Refused::NotMapped)
            }
            other => other,
        });
        let expected = sheet.word(word);
        if sheet.quiet_version() != Some(version) {
            return true;
        }
        let name = self.live.gpus[device].name();
        if readable && refused.is_some() {
            self.journal.complain(format_args!("{name} says that page {page} is not mapped"));
            return false;
        }
        let Some(found) = found else { return true };
        if found == expected && readable {
            self.journal.count(Overlap::exact_device_load, 1);
            return true;
        }
        // What it was told of before it was told that it is no more.
        let parsed = journal::parse(found);
        let newest = self.journal.actors[owner].sequence.load(SeqCst);
        let old = found == 0
            || matches!(parsed, Some((of, sequence, at))
            if of == owner && at == word && sequence <= newest);
        if old && (!announced || !readable) {
            self.journal.count(Overlap::stale_load, 1);
            return false;
        }
        self.journal.complain(format_args!(
            "{name}, for actor {}, loaded {found:#x} {parsed:?} from word {word} of page {page} of \
             worker {owner} at {:#x}, announced: {announced}, readable: {readable}, and it was \
             {expected:#x} {:?}\n{:?}",
            self.actor,
            address(page, 0),
            journal::parse(expected),
            self.live.process.snapshot(journal::range(page, 1))[0],
        ));
        false
    }

    /// Compares the words of a shared page by what each has stored there.
    pub(crate) fn at_shared(&self, page: usize) {
        for actor in 0..ACTORS {
            let least = self.journal.stored[actor][page].load(SeqCst);
            let found = trap::load(journal::shared_word(page, actor));
            let most = self.journal.storing[actor][page].load(SeqCst);
            if !found.is_ok_and(|found| (least..=most).contains(&found)) {
                self.journal.complain(format_args!(
                    "actor {} found {found:?} in the word of actor {actor} of shared page {page}, \
                     which is from {least} to {most}",
                    self.actor
                ));
            }
        }
    }
}

/// Is the process under test, until it is told to end.
pub(crate) fn run(journal: &'static Journal) {
    trap::install();
    prepare(journal);
    // Once for the caches of allocators and stacks.
    Live::attach(journal).detach();
    let live: RwLock<Option<Live>> = RwLock::new(None);
    std::thread::scope(|scope| {
        for actor in 0..ACTORS {
            let live = &live;
            scope.spawn(move || act(journal, actor, live));
        }
        coordinate(journal, &live);
    });
}

/// Maps everything, and enters that.
fn prepare(journal: &'static Journal) {
    for slot in (0..WORKERS).flat_map(journal::slots) {
        let (backing, state) = match slot.is_large() {
            true => (Backing::Huge, USUAL | WANTS_LARGE),
            false => (Backing::Anonymous, USUAL),
        };
        memory::map(journal::range(slot.first, slot.pages), backing, RW).expect("room");
        let sheets = &journal.pages[slot.first..slot.first + slot.pages];
        sheets.iter().for_each(|sheet| sheet.state.store(state, SeqCst));
    }
    for slot in journal::commons() {
        memory::map(journal::range(slot.first, slot.pages), Backing::Anonymous, RW).expect("room");
    }
}

/// Is one actor.
fn act(journal: &'static Journal, actor: usize, live: &RwLock<Option<Live>>) {
    let mut random = Random::new(journal.seed.load(SeqCst), actor as u64);
    loop {
        let command = journal.command.load(SeqCst);
        if command == END {
            return;
        }
        if command.is_multiple_of(2) && !journal.has_failed() {
            let live = live.read().unwrap_or_else(PoisonError::into_inner);
            // Nothing is attached yet, or not again.
            let Some(live) = live.as_ref() else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            if actor < WORKERS {
                Worker::new(actor, live, &mut random).work(command);
            } else {
                Driver::new(actor, live, &mut random).work(command);
            }
            continue;
        }
        journal.actors[actor].parked.store(command, SeqCst);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Brings everybody to rest when the watcher says so, compares, and goes on.
fn coordinate(journal: &'static Journal, live: &RwLock<Option<Live>>) {
    let mut so_far = Vec::new();
    let mut before = None;
    let mut done = 0;
    loop {
        let command = journal.command.load(SeqCst);
        if command == END {
            break;
        }
        if command.is_multiple_of(2) {
            let attached = live.read().unwrap_or_else(PoisonError::into_inner).is_some();
            if !attached {
                before.get_or_insert_with(holdings);
                so_far.clear();
                *live.write().unwrap_or_else(PoisonError::into_inner) = Some(Live::attach(journal));
            }
        } else if command != done && wait_for(journal, command, Wait::Parked) {
            settle(journal, live, &mut so_far, command);
            journal.settled.store(command, SeqCst);
            // Every other time.
            if command % 4 == 3 && wait_for(journal, command, Wait::Compared) {
                let before = before.as_ref().expect("it was attached");
                detach(journal, live, before);
                journal.detached.store(command, SeqCst);
            }
            done = command;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Some(live) = live.write().unwrap_or_else(PoisonError::into_inner).take() {
        live.detach();
    }
}

enum Wait {
    Parked,
    Compared,
}

/// Waits for others; `false` if something else is to be done.
fn wait_for(journal: &'static Journal, command: u64, what: Wait) -> bool {
    loop {
        let there = match what {
            Wait::Parked => journal.actors.iter().all(|actor| actor.parked.load(SeqCst) == command),
            Wait::Compared => journal.compared.load(SeqCst) == command,
        };
        if there || journal.command.load(SeqCst) != command {
            return there;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Compares what only this process can: what its devices see, and what they are left with.
fn settle(
    journal: &'static Journal,
    live: &RwLock<Option<Live>>,
    so_far: &mut Vec<(Overlap, u64)>,
    command: u64,
) {
    let live = live.read().unwrap_or_else(PoisonError::into_inner);
    let Some(live) = live.as_ref() else { return };
    live.note_overlaps(so_far);
    if live.without.iter().any(|not| not == "settle") {
        return;
    }
    let mut looks = Looks::new(live, ACTORS);
    let mut random = Random::new(journal.seed.load(SeqCst), command);
    for device in 0..2 {
        let deadline = Instant::now() + MOMENT;
        for _ in 0..SAMPLE {
            let (page, word) = (random.below(PAGES), random.below(WORDS));
            // A device that nobody tells anything must hear of what was done before, and soon.
            while !looks.by_device(device, page, word)
                && journal.pages[page].has(READABLE)
                && !journal.has_failed()
            {
                if Instant::now() > deadline {
                    let name = live.gpus[device].name();
                    journal
                        .complain(format_args!("{name} still sees what was in page {page} before"));
                }
                std::thread::yield_now();
            }
        }
        if let Err(violation) = live.gpus[device].check() {
            journal.complain(format_args!("{}: {violation}", live.gpus[device].name()));
        }
    }
    (0..SHARED).for_each(|page| looks.at_shared(page));
    live.process.change(journal::everything(), EventKind::Clear, || ());
    for sheet in &journal.pages {
        sheet.announced.store(sheet.changes.load(SeqCst), SeqCst);
    }
}

/// Detaches with pages out, and looks for what is left.
fn detach(
    journal: &'static Journal,
    live: &RwLock<Option<Live>>,
    before: &crate::common::leaks::Holdings,
) {
    let Some(live) = live.write().unwrap_or_else(PoisonError::into_inner).take() else { return };
    for (chunk, gpu) in journal::everything().blocks(uhmm::Order::HUGE).zip([0, 1, 0, 1, 0]) {
        if live.without.iter().any(|not| not == "settle") {
            break;
        }
        drop(live.process.migrate(chunk, live.gpus[gpu].pagemap()).run());
    }
    live.detach();
    journal.count(Overlap::attached_again, 1);
    let difference = holdings().difference(before);
    if !difference.is_empty() {
        journal.complain(format_args!("after it was detached: {difference}"));
    }
}
