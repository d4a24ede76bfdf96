//! A thread that makes devices work: they load, store and add, pages move to them and home, they
//! take pages exclusively, their memory is taken away, and their mirrors end and begin again.

use std::sync::atomic::Ordering::SeqCst;

use uhmm::PageRange;

use super::gpu::Gpu;
use super::journal::{self, COUNTERS, Journal, Overlap, PAGES, SHARED, WORDS, WORKERS};
use super::random::Random;
use super::subject::{Live, Looks};

/// A driver between two rests.
pub(crate) struct Driver<'a> {
    actor: usize,
    journal: &'static Journal,
    live: &'a Live,
    looks: Looks<'a>,
    random: &'a mut Random,
    /// Which device it is the driver of.
    device: usize,
}

type Step = fn(&mut Driver<'_>);

const STEPS: &[(u32, (&str, Step))] = &[
    (60, ("device loads", |it| it.load())),
    (30, ("device looks at pages", |it| it.look())),
    (40, ("device counts", |it| it.count())),
    (40, ("device marks", |it| it.mark())),
    (30, ("device takes pages", |it| it.migrate())),
    (15, ("device takes pages slowly", |it| it.migrate_slowly())),
    (6, ("eviction", |it| it.evict())),
    (1, ("eviction of all", |it| it.evict_all())),
    (4, ("home", |it| it.home())),
    (10, ("device holds pages", |it| it.hold())),
    (1, ("mirror again", |it| it.mirror_again())),
    (2, ("failures", |it| it.fail())),
];

/// Returns the name of a step.
pub(crate) fn name(step: u64) -> &'static str {
    STEPS.get(step as usize).map_or("?", |&(_, (name, _))| name)
}

impl<'a> Driver<'a> {
    pub(crate) fn new(actor: usize, live: &'a Live, random: &'a mut Random) -> Driver<'a> {
        let (journal, looks) = (live.journal, Looks::new(live, actor));
        Driver { actor, journal, live, looks, random, device: (actor - WORKERS) % 2 }
    }

    /// Works until everybody is to come to rest.
    pub(crate) fn work(&mut self, round: u64) {
        let steps: Vec<(u32, usize)> = STEPS
            .iter()
            .enumerate()
            .filter(|(_, (_, (name, _)))| !self.live.without.iter().any(|not| not == name))
            .map(|(index, &(weight, _))| (weight, index))
            .collect();
        while self.journal.command.load(SeqCst) == round && !self.journal.has_failed() {
            let step = self.random.choose(&steps);
            let actor = &self.journal.actors[self.actor];
            actor.doing.store(step as u64, SeqCst);
            (STEPS[step].1.1)(self);
            actor.steps.fetch_add(1, SeqCst);
        }
    }

    fn gpu(&self) -> &'a dyn Gpu {
        &*self.live.gpus[self.device]
    }

    fn page(&mut self) -> usize {
        self.random.below(PAGES)
    }

    /// Chooses pages, of anybody.
    fn range(&mut self, most: usize) -> PageRange {
        let pages = 1 + self.random.below(most);
        journal::range(self.random.below(PAGES - pages + 1), pages)
    }

    fn load(&mut self) {
        for _ in 0..8 {
            let (page, word) = (self.page(), self.random.below(WORDS));
            self.looks.by_device(self.device, page, word);
        }
    }

    /// Looks at neighbours, and again and again, as long as the translations last.
    fn look(&mut self) {
        let first = self.random.below(PAGES - 8);
        for _ in 0..4 {
            for page in first..first + 8 {
                let word = self.random.below(WORDS);
                self.looks.by_device(self.device, page, word);
            }
        }
    }

    fn count(&mut self) {
        for _ in 0..4 {
            let (counter, by) = (self.random.below(COUNTERS), 1 + self.random.next() % 1000);
            self.journal.adding[self.actor][counter].store(by, SeqCst);
            let at = journal::counter(counter);
            if self.looks.device(self.device, |accesses| accesses.add(at, by)).is_some() {
                self.journal.added[self.actor][counter].fetch_add(by, SeqCst);
            }
            self.journal.adding[self.actor][counter].store(0, SeqCst);
        }
    }

    fn mark(&mut self) {
        for _ in 0..4 {
            let page = self.random.below(SHARED);
            let before = self.journal.stored[self.actor][page].load(SeqCst);
            let at = journal::shared_word(page, self.actor);
            self.journal.storing[self.actor][page].store(before + 1, SeqCst);
            let done = self.looks.device(self.device, |accesses| accesses.store(at, before + 1));
            if done.is_none() {
                self.journal.storing[self.actor][page].store(before, SeqCst);
                continue;
            }
            self.journal.stored[self.actor][page].store(before + 1, SeqCst);
            // Its own stores it sees at once.
            let seen = self.looks.device(self.device, |accesses| accesses.load(at));
            if seen.is_some_and(|seen| seen != before + 1) {
                let name = self.gpu().name();
                self.journal.complain(format_args!(
                    "{name} stored {} at {at:#x}, and loads {seen:?}",
                    before + 1
                ));
            }
        }
    }

    fn migrate(&mut self) {
        let most = if self.random.once_in(8) { 600 } else { 48 };
        let range = self.range(most);
        drop(self.live.process.migrate(range, self.gpu().pagemap()).run());
    }

    /// Has pages in transit for as long as others need to find out.
    fn migrate_slowly(&mut self) {
        let range = self.range(64);
        let isolated = self.live.process.migrate(range, self.gpu().pagemap());
        self.dawdle();
        if self.random.once_in(4) {
            return drop(isolated);
        }
        let copied = isolated.copy();
        self.dawdle();
        match self.random.once_in(4) {
            true => drop(copied),
            false => drop(copied.commit()),
        }
    }

    fn dawdle(&mut self) {
        for _ in 0..self.random.below(64) {
            std::thread::yield_now();
        }
    }

    fn evict(&mut self) {
        let pages = 1 + self.random.below(100) as u64;
        self.gpu().pagemap().evict(pages);
    }

    fn evict_all(&mut self) {
        let pagemap = self.gpu().pagemap();
        // Whether everything could be had, with everybody at work, is another matter.
        let _ = pagemap.evict_all();
        pagemap.reopen();
    }

    fn home(&mut self) {
        let range = self.range(64);
        self.live.process.migrate_home(range);
    }

    /// Holds counters exclusively, which CPUs add to as well.
    fn hold(&mut self) {
        let (counter, by) = (self.random.below(COUNTERS), 1 + self.random.next() % 1000);
        let at = journal::counter(counter);
        let page = PageRange::from(uhmm::Page::containing(at));
        let (gpu, device) = (self.gpu(), self.device);
        gpu.hold(page, &mut || {
            self.journal.adding[self.actor][counter].store(by, SeqCst);
            if self.looks.device(device, |accesses| accesses.add(at, by)).is_some() {
                self.journal.added[self.actor][counter].fetch_add(by, SeqCst);
            }
            self.journal.adding[self.actor][counter].store(0, SeqCst);
            for _ in 0..self.random.below(16) {
                std::thread::yield_now();
            }
        });
    }

    fn mirror_again(&mut self) {
        self.gpu().mirror_again(&self.live.process);
    }

    /// Makes steps of the device fail soon.
    fn fail(&mut self) {
        let steps = [
            "allocate",
            "copy",
            "clear",
            "late-flush",
            "spurious-fault",
            "overflow",
            "duplicate-fault",
        ];
        let step = steps[self.random.below(steps.len())];
        self.gpu().fail(step, self.random.next() % 16);
        self.journal.count(Overlap::failures, 1);
    }
}
