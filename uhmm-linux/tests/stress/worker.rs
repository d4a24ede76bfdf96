//! A thread of the program: it loads, stores, maps, unmaps, moves, protects, discards, advises and
//! forks, as the owner of its pages, and looks at those of others.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;

use rustix::io::Errno;
use uhmm::{EventKind, PAGE_SIZE, PageRange, Residency};

use super::child;
use super::journal::{
    self, Actor, CHANGE, COUNTERS, DISCARDED, FILL, Journal, LOCKED, MAPPED, Overlap, READABLE,
    SHARED, STORE, Sheet, Slot, USUAL, WANTS_LARGE, WANTS_SMALL, WORDS, WORKERS, WRITABLE, address,
    value,
};
use super::random::Random;
use super::subject::{Live, Looks};
use super::system;
use crate::common::memory::{self, Backing, NONE, R, RW};
use crate::common::trap;

/// One fork at a time: each stops everybody else from migrating for a moment.
static FORKS: Mutex<()> = Mutex::new(());

/// A worker between two rests.
pub(crate) struct Worker<'a> {
    pub(crate) index: usize,
    pub(crate) journal: &'static Journal,
    pub(crate) live: &'a Live,
    pub(crate) looks: Looks<'a>,
    pub(crate) random: &'a mut Random,
    slots: Vec<Slot>,
    /// A page of it is what system calls copy from and to.
    file: OwnedFd,
}

/// What a worker can do.
type Step = fn(&mut Worker<'_>);

/// Each, by its weight and with its name.
const STEPS: &[(u32, (&str, Step))] = &[
    (240, ("store", |it| it.store())),
    (50, ("fill", |it| it.fill())),
    (60, ("check", |it| it.check_own())),
    (200, ("look", |it| it.look())),
    (40, ("look through the kernel", |it| it.look_through_the_kernel())),
    (80, ("count", |it| it.count())),
    (80, ("mark", |it| it.mark())),
    (40, ("discard", |it| it.discard())),
    (20, ("unmap", |it| it.unmap())),
    (30, ("map", |it| it.map())),
    (25, ("move", |it| it.relocate())),
    (12, ("move and leave", |it| it.relocate_leaving())),
    (20, ("protect", |it| it.protect())),
    (8, ("lock", |it| it.lock())),
    (10, ("free", |it| it.free())),
    (10, ("advise", |it| it.advise())),
    (50, ("migrate", |it| it.migrate())),
    (30, ("have a device store", |it| it.device_store())),
    (20, ("have a device add", |it| it.device_add())),
    (20, ("announce", |it| it.announce())),
    (4, ("fork", |it| it.fork())),
    (1, ("spawn", |it| it.spawn())),
];

/// Returns the name of a step.
pub(crate) fn name(step: u64) -> &'static str {
    STEPS.get(step as usize).map_or("?", |&(_, (name, _))| name)
}

impl<'a> Worker<'a> {
    pub(crate) fn new(index: usize, live: &'a Live, random: &'a mut Random) -> Worker<'a> {
        let journal = live.journal;
        let looks = Looks::new(live, index);
        let (slots, file) = (journal::slots(index), memory::memory_file(1));
        Worker { index, journal, live, looks, random, slots, file }
    }

    fn actor(&self) -> &'static Actor {
        &self.journal.actors[self.index]
    }

    fn sheet(&self, page: usize) -> &'static Sheet {
        &self.journal.pages[page]
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
            self.actor().doing.store(step as u64, SeqCst);
            (STEPS[step].1.1)(self);
            self.actor().steps.fetch_add(1, SeqCst);
        }
    }

    /// Complains, if nobody has yet.
    fn complain(&self, page: usize, what: std::fmt::Arguments<'_>) {
        let sheet = self.sheet(page);
        let (state, doing) = (sheet.state(), name(self.actor().doing.load(SeqCst)));
        let entry = self.live.process.snapshot(journal::range(page, 1))[0];
        self.journal.complain(format_args!(
            "worker {} ({doing}), page {page} at {:#x} in state {state:#x}: {what}\n{entry:?}",
            self.index,
            address(page, 0),
        ));
    }

    // Choices.

    fn slot(&mut self) -> Slot {
        let index = self.random.below(self.slots.len());
        self.slots[index]
    }

    /// Chooses pages of its own: all of a slot, or some.
    fn pages(&mut self) -> (usize, usize) {
        let slot = self.slot();
        if self.random.once_in(3) {
            return (slot.first, slot.pages);
        }
        let pages = 1 + self.random.below(slot.pages.min(32));
        (slot.first + self.random.below(slot.pages - pages + 1), pages)
    }

    /// Chooses a page of its own that allows everything; maps it anew if it does not.
    fn usual_page(&mut self) -> usize {
        let slot = self.slot();
        let page = slot.first + self.random.below(slot.pages);
        if !self.sheet(page).has(USUAL) {
            self.map_at(page, 1);
        }
        page
    }

    fn all_have(&self, (first, pages): (usize, usize), bits: u64) -> bool {
        (first..first + pages).all(|page| self.sheet(page).has(bits))
    }

    fn sequence(&self) -> u64 {
        self.actor().sequence.fetch_add(1, SeqCst) + 1
    }

    // Stores.

    /// Stores a word.
    fn store(&mut self) {
        let page = self.usual_page();
        self.store_in(page);
    }

    fn store_in(&mut self, page: usize) {
        let (word, sheet) = (self.random.below(WORDS), self.sheet(page));
        let new = value(self.index, self.sequence(), word);
        sheet.begin();
        self.actor().intend(STORE, page, word, new);
        let at = address(page, word);
        let done = match self.random.below(4) {
            0 => system::write_process(at, &new.to_ne_bytes()).map(drop).map_err(|e| e.to_string()),
            _ => trap::store(at, new).map_err(|trap| trap.to_string()),
        };
        sheet.words[word].store(new, SeqCst);
        self.actor().done();
        sheet.end();
        if let Err(error) = done {
            self.complain(page, format_args!("a store to word {word} got {error}"));
        }
        self.compare_word(page, word);
    }

    /// Stores all words of a page.
    fn fill(&mut self) {
        let page = self.usual_page();
        self.fill_page(page);
    }

    fn fill_page(&mut self, page: usize) {
        let (sequence, sheet) = (self.sequence(), self.sheet(page));
        sheet.begin();
        self.actor().intend(FILL, page, 0, sequence);
        let done = match self.random.below(3) {
            0 => self.fill_by_words(page, sequence),
            which => self.fill_by_the_kernel(page, sequence, which == 1),
        };
        for (word, to) in sheet.words.iter().enumerate() {
            to.store(value(self.index, sequence, word), SeqCst);
        }
        self.actor().done();
        sheet.end();
        if let Err(error) = done {
            self.complain(page, format_args!("a store to all of it got {error}"));
        }
        self.compare_page(page);
    }

    fn fill_by_words(&self, page: usize, sequence: u64) -> Result<(), String> {
        (0..WORDS).try_for_each(|word| {
            let new = value(self.index, sequence, word);
            trap::store(address(page, word), new).map_err(|trap| trap.to_string())
        })
    }

    fn fill_by_the_kernel(&self, page: usize, sequence: u64, by_file: bool) -> Result<(), String> {
        let mut bytes = [0; PAGE_SIZE];
        for (word, to) in bytes.chunks_exact_mut(8).enumerate() {
            to.copy_from_slice(&value(self.index, sequence, word).to_ne_bytes());
        }
        let at = address(page, 0);
        let done = if by_file {
            rustix::io::pwrite(&self.file, &bytes, 0).expect("a file in memory takes a page");
            system::read_file(self.file.as_fd(), at, PAGE_SIZE)
        } else {
            system::write_process(at, &bytes)
        };
        match done {
            Ok(PAGE_SIZE) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }

    // Comparisons.

    fn check_own(&mut self) {
        let slot = self.slot();
        let page = slot.first + self.random.below(slot.pages);
        if self.sheet(page).has(READABLE) {
            self.compare_page(page);
        }
    }

    fn compare_word(&self, page: usize, word: usize) {
        let (expected, at) = (self.sheet(page).word(word), address(page, word));
        match trap::load(at) {
            Ok(found) if found == expected => {}
            Ok(found) => self.complain(
                page,
                format_args!(
                    "word {word} is {found:#x} {:?} and was to be {expected:#x} {:?}",
                    journal::parse(found),
                    journal::parse(expected),
                ),
            ),
            Err(trap) => self.complain(page, format_args!("a load of word {word} got {trap}")),
        }
    }

    /// Compares a page of its own.
    fn compare_page(&self, page: usize) {
        (0..WORDS).for_each(|word| self.compare_word(page, word));
    }

    /// Looks at words of others.
    fn look(&mut self) {
        for _ in 0..4 {
            let page = self.random.below(journal::PAGES);
            let word = self.random.below(WORDS);
            self.looks.by_cpu(page, word);
        }
    }

    /// Looks at a whole page of somebody by way of system calls.
    fn look_through_the_kernel(&mut self) {
        let page = self.random.below(journal::PAGES);
        let mut bytes = [0; PAGE_SIZE];
        let by_file = self.random.once_in(2);
        let file = self.file.as_fd();
        self.looks.by_kernel(page, &mut |at| {
            if by_file {
                let written = system::write_file(file, at, PAGE_SIZE)?;
                rustix::io::pread(file, &mut bytes, 0)?;
                return Ok((written, bytes));
            }
            let read = system::read_process(std::process::id(), at, &mut bytes)?;
            Ok((read, bytes))
        });
    }

    // What everybody adds to.

    fn count(&mut self) {
        for _ in 0..4 {
            let (counter, by) = (self.random.below(COUNTERS), 1 + self.random.next() % 1000);
            self.journal.adding[self.index][counter].store(by, SeqCst);
            let done = trap::add(journal::counter(counter), by);
            if let Err(trap) = done {
                self.journal.complain(format_args!("an addition to counter {counter} got {trap}"));
            }
            self.journal.added[self.index][counter].fetch_add(by, SeqCst);
            self.journal.adding[self.index][counter].store(0, SeqCst);
        }
    }

    /// Stores to its word of a shared page.
    fn mark(&mut self) {
        let page = self.random.below(SHARED);
        let next = self.journal.stored[self.index][page].load(SeqCst) + 1;
        self.journal.storing[self.index][page].store(next, SeqCst);
        if let Err(trap) = trap::store(journal::shared_word(page, self.index), next) {
            self.journal.complain(format_args!("a store to shared page {page} got {trap}"));
        }
        self.journal.stored[self.index][page].store(next, SeqCst);
        self.looks.at_shared(page);
    }

    // Changes of mappings.

    /// Makes a change to pages of its own, and enters what they are afterwards.
    fn change(
        &mut self,
        (first, pages): (usize, usize),
        kind: EventKind,
        f: &mut dyn FnMut() -> Result<(), Errno>,
        enter: &dyn Fn(&Sheet),
    ) -> Result<(), Errno> {
        let sheets = &self.journal.pages[first..first + pages];
        let announced = self.random.once_in(3);
        self.actor().intend(CHANGE, first, pages, 0);
        for sheet in sheets {
            sheet.begin();
            sheet.changes.fetch_add(1, SeqCst);
        }
        let done = match announced {
            true => self.live.process.change(journal::range(first, pages), kind, f),
            false => f(),
        };
        for sheet in sheets {
            if done.is_ok() {
                enter(sheet);
            }
            if announced {
                sheet.announced.store(sheet.changes.load(SeqCst), SeqCst);
            }
        }
        sheets.iter().for_each(Sheet::end);
        self.actor().done();
        done
    }

    fn must(&self, page: usize, done: Result<(), Errno>) {
        if let Err(error) = done {
            self.complain(page, format_args!("got {error}"));
        }
    }

    /// Drops what is in some pages.
    fn discard(&mut self) {
        let pages = self.pages();
        let locked = (pages.0..pages.0 + pages.1).any(|page| self.sheet(page).has(LOCKED));
        if locked || !self.all_have(pages, MAPPED) {
            return;
        }
        let range = journal::range(pages.0, pages.1);
        let mut advise = || memory::advise(range, libc::MADV_DONTNEED);
        let done = self.change(pages, EventKind::Clear, &mut advise, &|sheet| {
            sheet.state.fetch_or(DISCARDED, SeqCst);
            sheet.clear();
        });
        self.must(pages.0, done);
        let page = pages.0 + self.random.below(pages.1);
        if self.sheet(page).has(READABLE) {
            self.compare_page(page);
        }
    }

    fn unmap(&mut self) {
        let pages = self.pages();
        let range = journal::range(pages.0, pages.1);
        let mut unmap = || {
            memory::unmap(range);
            Ok(())
        };
        let done = self.change(pages, EventKind::Unmap, &mut unmap, &|sheet| {
            sheet.state.store(0, SeqCst);
            sheet.clear();
        });
        self.must(pages.0, done);
    }

    /// Maps pages in place of what is there.
    fn map(&mut self) {
        let pages = self.pages();
        self.map_at(pages.0, pages.1);
    }

    fn map_at(&mut self, first: usize, pages: usize) {
        let range = journal::range(first, pages);
        let transit = self.is_in_transit(range);
        let large = pages > 256;
        let mut map = || match large {
            true => memory::map(range, Backing::Huge, RW),
            false => memory::map(range, Backing::Anonymous, RW),
        };
        let state = if large { USUAL | WANTS_LARGE } else { USUAL };
        let done = self.change((first, pages), EventKind::Unmap, &mut map, &|sheet| {
            sheet.state.store(state, SeqCst);
            sheet.clear();
        });
        self.must(first, done);
        if transit {
            self.journal.count(Overlap::evicted_and_replaced, 1);
        }
        if large || self.random.once_in(4) {
            self.store_in(first + pages - 1);
        }
    }

    fn is_in_transit(&mut self, range: PageRange) -> bool {
        if self.live.without.iter().any(|not| not == "snapshot") {
            return false;
        }
        let entries = self.live.process.snapshot(range);
        entries.iter().any(|entry| entry.residency == Residency::InTransit)
    }

    /// Chooses pages to move, and as many to move them to, in two slots of its own.
    fn two_places(&mut self) -> Option<(usize, usize, usize)> {
        let (from, to) = (self.slot(), self.slot());
        if from == to || from.is_large() || to.is_large() {
            return None;
        }
        let pages = 1 + self.random.below(from.pages);
        let first = from.first + self.random.below(from.pages - pages + 1);
        let target = to.first + self.random.below(to.pages - pages + 1);
        let state = self.sheet(first).state();
        let alike = |page| (self.sheet(page).state() ^ state) & !DISCARDED == 0;
        let alike = state & MAPPED != 0 && (first..first + pages).all(alike);
        alike.then_some((first, target, pages))
    }

    /// Moves pages to another place, in place of what is there.
    fn relocate(&mut self) {
        self.relocate_by(false);
    }

    /// Moves what is in some pages, which stay mapped.
    fn relocate_leaving(&mut self) {
        self.relocate_by(true);
    }

    fn relocate_by(&mut self, leaving: bool) {
        let Some((first, target, pages)) = self.two_places() else { return };
        let (from, to) = (journal::range(first, pages), journal::range(target, pages));
        let journal = self.journal;
        let sheets = &journal.pages[first..first + pages];
        let targets = &journal.pages[target..target + pages];
        let all = || sheets.iter().chain(targets);
        let announced = self.random.once_in(3);
        self.actor().intend(CHANGE, first, pages, target as u64);
        for sheet in all() {
            sheet.begin();
            sheet.changes.fetch_add(1, SeqCst);
        }
        let relocate = || match leaving {
            true => system::remap_leaving(from, to.first()),
            false => memory::remap(from, to.first()),
        };
        let process = &self.live.process;
        let done = match announced {
            true => process
                .change(from, EventKind::Unmap, || process.change(to, EventKind::Unmap, relocate)),
            false => relocate(),
        };
        if done.is_ok() {
            sheets.iter().zip(targets).for_each(|(from, to)| enter_move(from, to, leaving));
        } else {
            // They were not one mapping, and nobody says how far the kernel came.
            self.journal.count(Overlap::moves_refused, 1);
            for range in [from, to] {
                let mapped = memory::map(range, Backing::Anonymous, RW);
                self.must(first, mapped);
            }
            for sheet in all() {
                sheet.state.store(USUAL, SeqCst);
                sheet.clear();
            }
        }
        if announced && done.is_ok() {
            all().for_each(|sheet| sheet.announced.store(sheet.changes.load(SeqCst), SeqCst));
        }
        all().for_each(Sheet::end);
        self.actor().done();
    }

    fn protect(&mut self) {
        let pages = self.pages();
        if !self.all_have(pages, MAPPED) {
            return;
        }
        let (rights, bits) = self.random.choose(&[
            (2, (R, READABLE)),
            (1, (NONE, 0)),
            (4, (RW, READABLE | WRITABLE)),
        ]);
        let range = journal::range(pages.0, pages.1);
        let mut protect = || memory::protect(range, rights);
        let done = self.change(pages, EventKind::ProtectionVma, &mut protect, &|sheet| {
            let others = sheet.state() & !(READABLE | WRITABLE);
            sheet.state.store(others | bits, SeqCst);
        });
        self.must(pages.0, done);
    }

    fn lock(&mut self) {
        let pages = self.pages();
        if pages.1 > 64 || !self.all_have(pages, USUAL) {
            return;
        }
        let range = journal::range(pages.0, pages.1);
        let lock = !self.sheet(pages.0).has(LOCKED);
        let mut change = || if lock { memory::lock(range) } else { memory::unlock(range) };
        let done = self.change(pages, EventKind::SoftDirty, &mut change, &|sheet| {
            match lock {
                true => sheet.state.fetch_or(LOCKED, SeqCst),
                false => sheet.state.fetch_and(!LOCKED, SeqCst),
            };
        });
        self.must(pages.0, done);
        self.compare_page(pages.0);
    }

    /// Says that what is in some pages is not needed, and stores to them. What is in a page in
    /// between is either; so it is filled.
    fn free(&mut self) {
        let slot = self.slot();
        let page = slot.first + self.random.below(slot.pages);
        if !self.sheet(page).has(USUAL) || self.sheet(page).has(LOCKED) {
            return;
        }
        let (range, sequence) = (journal::range(page, 1), self.sequence());
        let mut refused = None;
        let worker = self.index;
        let mut free = || {
            memory::advise(range, libc::MADV_FREE)?;
            for word in 0..WORDS {
                let stored = trap::store(address(page, word), value(worker, sequence, word));
                refused = refused.take().or(stored.err());
            }
            Ok(())
        };
        let done = self.change((page, 1), EventKind::Clear, &mut free, &|sheet| {
            sheet.state.fetch_or(DISCARDED, SeqCst);
            for (word, to) in sheet.words.iter().enumerate() {
                to.store(value(worker, sequence, word), SeqCst);
            }
        });
        self.must(page, done);
        if let Some(trap) = refused {
            self.complain(page, format_args!("a store after MADV_FREE got {trap}"));
        }
        self.compare_page(page);
    }

    fn advise(&mut self) {
        let pages = self.pages();
        if !self.all_have(pages, MAPPED) {
            return;
        }
        let (advice, bits) = self.random.choose(&[
            (1, (libc::MADV_HUGEPAGE, WANTS_LARGE)),
            (1, (libc::MADV_NOHUGEPAGE, WANTS_SMALL)),
            (1, (libc::MADV_COLD, 0)),
            (1, (libc::MADV_PAGEOUT, 0)),
            (1, (libc::MADV_WILLNEED, 0)),
        ]);
        let locked = (pages.0..pages.0 + pages.1).any(|page| self.sheet(page).has(LOCKED));
        if bits == 0 {
            // No change of what is there, nor of how it is mapped.
            let done = memory::advise(journal::range(pages.0, pages.1), advice);
            // Not of what is locked; and whether anonymous memory will be needed nobody knows.
            if !locked && advice != libc::MADV_WILLNEED {
                self.must(pages.0, done);
            }
            return;
        }
        let range = journal::range(pages.0, pages.1);
        let mut advise = || memory::advise(range, advice);
        let done = self.change(pages, EventKind::SoftDirty, &mut advise, &|sheet| {
            let others = sheet.state() & !(WANTS_LARGE | WANTS_SMALL);
            sheet.state.store(others | bits, SeqCst);
        });
        self.must(pages.0, done);
    }

    // Devices.

    fn migrate(&mut self) {
        let (first, pages) = self.pages();
        let gpu = &self.live.gpus[self.random.below(2)];
        let migration = self.live.process.migrate(journal::range(first, pages), gpu.pagemap());
        drop(migration.run());
    }

    /// Tells the devices of all that was done to some pages.
    fn announce(&mut self) {
        let pages = self.pages();
        self.announce_pages(pages);
    }

    fn announce_pages(&mut self, (first, pages): (usize, usize)) {
        self.live.process.change(journal::range(first, pages), EventKind::Clear, || ());
        for sheet in &self.journal.pages[first..first + pages] {
            sheet.announced.store(sheet.changes.load(SeqCst), SeqCst);
        }
    }

    /// Has a device store to a page of its own, that it can count on.
    fn device_store(&mut self) {
        let page = self.usual_page();
        if !self.sheet(page).is_announced() {
            self.announce_pages((page, 1));
        }
        let (word, sheet) = (self.random.below(WORDS), self.sheet(page));
        let new = value(self.index, self.sequence(), word);
        let device = self.random.below(2);
        sheet.begin();
        self.actor().intend(STORE, page, word, new);
        let done = self.looks.device(device, |accesses| accesses.store(address(page, word), new));
        if done.is_some() {
            sheet.words[word].store(new, SeqCst);
        }
        self.actor().done();
        sheet.end();
        self.compare_word(page, word);
    }

    /// Has a device replace a word of its own by another in one step.
    fn device_add(&mut self) {
        let page = self.usual_page();
        // What is locked, or in doubt, a device cannot have to itself.
        if self.sheet(page).state() & (LOCKED | DISCARDED) != 0 {
            return;
        }
        if !self.sheet(page).is_announced() {
            self.announce_pages((page, 1));
        }
        let (word, sheet) = (self.random.below(WORDS), self.sheet(page));
        let new = value(self.index, self.sequence(), word);
        let old = sheet.word(word);
        let device = self.random.below(2);
        sheet.begin();
        self.actor().intend(STORE, page, word, new);
        let by = new.wrapping_sub(old);
        let done = self.looks.device(device, |accesses| accesses.add(address(page, word), by));
        if done.is_some() {
            sheet.words[word].store(new, SeqCst);
        }
        self.actor().done();
        sheet.end();
        if let Some(found) = done
            && found != old
        {
            let device = self.live.gpus[device].name();
            self.complain(
                page,
                format_args!(
                    "{device} added to {found:#x} {:?}, and it was {old:#x} {:?}",
                    journal::parse(found),
                    journal::parse(old),
                ),
            );
        }
        self.compare_word(page, word);
    }

    // Other processes.

    fn fork(&mut self) {
        let Ok(_one) = FORKS.try_lock() else { return };
        let raw = self.random.once_in(2) && !self.live.without.iter().any(|not| not == "raw fork");
        child::fork_and_compare(self.journal, self.index, raw);
    }

    fn spawn(&mut self) {
        let Ok(_one) = FORKS.try_lock() else { return };
        let status = std::process::Command::new("/bin/true").status();
        if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            self.journal.complain(format_args!("/bin/true ended with {status:?}"));
        }
    }
}

/// Enters that a page has moved.
fn enter_move(from: &Sheet, to: &Sheet, leaving: bool) {
    // A lock does not stay behind, nor does what was locked come unlocked.
    let left = if leaving { from.state() & !LOCKED } else { 0 };
    to.state.store(from.state(), SeqCst);
    from.state.store(left, SeqCst);
    for (from, to) in from.words.iter().zip(&to.words) {
        to.store(from.load(SeqCst), SeqCst);
    }
    from.clear();
}

const _: () = assert!(WORKERS <= 16, "values have four bits for the worker");
