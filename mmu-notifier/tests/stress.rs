//! Everything at once, on many threads: in an ordinary build on those of the system, and under
//! `--cfg shuttle` on a few whose schedule is drawn at random.
//!
//! An ordinary run is repeated, as far as it can be, with `STRESS_SEED=...` from its output; a
//! failure under shuttle prints the schedule that `shuttle::replay` takes. Besides, a few races
//! that were once lost, each by itself.
#![cfg(not(loom))]

use std::sync::Arc;
use std::time::Instant;

use mmu_notifier::{
    Class, DeviceHandle, DeviceRef, Event, EventKind, Fence, Handle, Notifier, Owner,
    PairedNotifier, SubscribeError, SubscribeOptions, Subscription, Subscriptions, VaRange,
    WouldBlock,
};

#[cfg(not(shuttle))]
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
};

#[cfg(shuttle)]
use shuttle::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
};

// Sizes.

/// How many pages the address space has.
const PAGES: usize = if cfg!(shuttle) { 3 } else { 16 };

/// How many threads there are.
const THREADS: usize = if cfg!(shuttle) { 4 } else { 16 };

/// How many things each thread does in a round.
const STEPS: usize = if cfg!(shuttle) { 12 } else { 300 };

/// How many subscriptions a thread has at a time, at most.
const OWNED: usize = if cfg!(shuttle) { 2 } else { 4 };

/// How deep changes nest.
const NESTED: usize = if cfg!(shuttle) { 2 } else { 3 };

/// How many owners there are whose migrations their own subscriptions need not hear of.
const OWNERS: usize = 2;

// Chance.

/// Draws numbers: under shuttle its own, so that a schedule is all that a replay needs.
struct Random {
    #[cfg(not(shuttle))]
    state: u64,
}

impl Random {
    fn new(seed: u64) -> Random {
        #[cfg(shuttle)]
        let _ = seed;
        Random {
            #[cfg(not(shuttle))]
            state: seed,
        }
    }

    #[cfg(shuttle)]
    fn next(&mut self) -> u64 {
        shuttle::rand::RngCore::next_u64(&mut shuttle::rand::thread_rng())
    }

    /// SplitMix64.
    #[cfg(not(shuttle))]
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// A page, or two neighbours, or a few.
    fn pages(&mut self, most: usize) -> (usize, usize) {
        let first = self.below(PAGES);
        (first, (first + self.below(most)).min(PAGES - 1))
    }
}

// The address space and its devices.

const PAGE: u64 = 4096;

fn span((first, last): (usize, usize)) -> VaRange {
    VaRange::from_bounds(first as u64 * PAGE, last as u64 * PAGE + PAGE - 1).unwrap()
}

fn page_overlaps(page: usize, range: VaRange) -> bool {
    span((page, page)).overlaps(range)
}

/// The page table of the CPU: how often each page has changed.
///
/// A migration by an owner is no change to the devices of that owner, so these are counted apart.
/// Relaxed throughout: that one thread sees what another changed is what is tested.
#[derive(Default)]
struct Cpu {
    changes: [AtomicU64; PAGES],
    migrations: [[AtomicU64; PAGES]; OWNERS],
}

impl Cpu {
    /// The generation of a page, as a device of `owner` sees it.
    fn look_up(&self, page: usize, owner: Option<usize>) -> u64 {
        let others = (0..OWNERS).filter(|&by| Some(by) != owner);
        let migrations: u64 = others.map(|by| self.migrations[by][page].load(Relaxed)).sum();
        self.changes[page].load(Relaxed) + migrations
    }

    /// Makes a change; a migration if it is somebody's.
    fn change(&self, page: usize, by: Option<usize>) {
        match by {
            None => self.changes[page].fetch_add(1, Relaxed),
            Some(owner) => self.migrations[owner][page].fetch_add(1, Relaxed),
        };
    }
}

/// What a device uses: one more than the generation, or zero. It is emptied by a fence, after the
/// table from which it was filled.
#[derive(Default)]
struct Tlb([AtomicU64; PAGES]);

impl Tlb {
    fn flush(&self, range: VaRange) {
        for page in (0..PAGES).filter(|&page| page_overlaps(page, range)) {
            self.0[page].store(0, Relaxed);
        }
    }

    fn uses_any(&self, range: VaRange) -> bool {
        (0..PAGES).any(|page| page_overlaps(page, range) && self.0[page].load(Relaxed) != 0)
    }
}

/// A device. Its registers are plain memory, which is written when nobody refers to it any more.
struct Device {
    registers: Vec<u64>,
}

/// How the notifiers of a round began and ended.
#[derive(Default)]
struct Census {
    subscribed: AtomicU64,
    /// Never subscribed, and handed back.
    refused: AtomicU64,
    handed_back: AtomicU64,
    released: AtomicU64,
    /// Ended by dropping their subscriptions.
    dropped: AtomicU64,
    /// Destroyed, however they ended.
    gone: AtomicU64,
}

/// How a notifier ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Not,
    HandedBack,
    Released,
    Refused,
}

/// A device's view of the address space.
struct Mirror {
    /// The translations: the generation of each page that is mapped.
    table: Vec<Option<u64>>,
    tlb: Arc<Tlb>,
    device: DeviceRef<Device>,
    owner: Option<usize>,
    /// Refuses sometimes.
    random: Random,
    /// Changes of whose start it heard and of whose end it did not; only if it hears of ends.
    under_way: u64,
    /// What it drops in its next callback.
    doomed: Option<Subscription<Mirror>>,
    end: End,
    census: Arc<Census>,
}

impl Mirror {
    /// Forgets the range, and says whether there was anything to forget.
    fn forget(&mut self, range: VaRange) -> bool {
        assert_eq!(self.end, End::Not, "called after its end");
        assert_eq!(self.device.registers[0], 0, "the device is in use");
        let mut any = false;
        for (page, entry) in self.table.iter_mut().enumerate() {
            if page_overlaps(page, range) {
                any |= entry.take().is_some();
            }
        }
        any || self.tlb.uses_any(range)
    }

    fn stop(&mut self, event: &Event) -> Option<Flush> {
        self.doomed = None;
        // A claim that ends has no end of its own, unless it is that on a part of the range.
        if event.kind() != EventKind::Release {
            self.under_way += 1;
        }
        let flush = Flush { tlb: Arc::clone(&self.tlb), range: event.range() };
        self.forget(event.range()).then_some(flush)
    }

    /// Notes how it ended; the memory is free from here.
    fn ends(mut self, end: End) {
        assert_eq!(self.end, End::Not, "ended twice");
        self.end = end;
    }

    /// *Current*: what is mapped is true.
    fn check(&self, cpu: &Cpu) {
        for (page, entry) in self.table.iter().enumerate() {
            if let Some(generation) = *entry {
                let now = cpu.look_up(page, self.owner);
                assert_eq!(generation, now, "a stale translation of page {page}");
            }
        }
    }

    fn maps_any(&self, range: VaRange) -> bool {
        (0..PAGES).any(|page| page_overlaps(page, range) && self.table[page].is_some())
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(!self.maps_any(VaRange::ALL), "it ended, and its device still translates");
            assert!(!self.tlb.uses_any(VaRange::ALL), "it ended, and its device still runs");
        }
        let census = &self.census;
        let end = match self.end {
            End::Not => &census.dropped,
            End::HandedBack => &census.handed_back,
            End::Released => &census.released,
            End::Refused => &census.refused,
        };
        end.fetch_add(1, Relaxed);
        census.gone.fetch_add(1, Relaxed);
    }
}

/// Empties what the device uses.
struct Flush {
    tlb: Arc<Tlb>,
    range: VaRange,
}

impl Fence for Flush {
    fn wait(self) {
        self.tlb.flush(self.range);
    }
}

impl Notifier for Mirror {
    type Fence = Option<Flush>;

    fn invalidate(&mut self, event: &Event) -> Option<Flush> {
        self.stop(event)
    }

    fn try_invalidate(&mut self, event: &Event) -> Result<Option<Flush>, WouldBlock> {
        if self.random.one_in(4) { Err(WouldBlock) } else { Ok(self.stop(event)) }
    }

    fn release(self) {
        self.ends(End::Released);
    }
}

impl PairedNotifier for Mirror {
    fn invalidate_range_end(&mut self, event: &Event) {
        assert_eq!(self.end, End::Not, "called after its end");
        assert_eq!(self.device.registers[0], 0, "the device is in use");
        if event.kind() != EventKind::Release {
            self.under_way = self.under_way.checked_sub(1).expect("an end without its start");
        }
    }
}

// The threads.

/// A subscription, as those see it who do not own it.
#[derive(Clone)]
struct Known {
    mirror: Handle<Mirror>,
    tlb: Arc<Tlb>,
    owner: Option<usize>,
}

/// What all threads of a round share.
struct World {
    space: Arc<Subscriptions>,
    cpu: Cpu,
    device: DeviceHandle<Device>,
    owners: [Owner; OWNERS],
    /// Everybody's subscriptions: some for each thread, and as many again for those that are to be
    /// dropped in a callback. The lock is not held while anybody is called.
    directory: Mutex<Vec<Option<Known>>>,
    census: Arc<Census>,
    /// The address space dies, or has died.
    releasing: AtomicBool,
}

/// One thread of a round.
struct Worker {
    world: Arc<World>,
    number: usize,
    random: Random,
    owned: Vec<Owned>,
    depth: usize,
}

/// A subscription, and where it is in the directory.
struct Owned {
    subscription: Subscription<Mirror>,
    place: usize,
    /// May be given subscriptions to drop. It is never itself dropped in a callback, so that nobody
    /// waits in a circle.
    keeps: bool,
}

impl Worker {
    fn run(mut self) {
        for _ in 0..STEPS {
            self.step();
        }
        while !self.owned.is_empty() {
            self.unsubscribe(0);
        }
    }

    fn step(&mut self) {
        match self.random.below(20) {
            0..=4 => self.change(),
            5..=10 => self.fault(),
            11..=12 => self.use_device(),
            13..=14 => self.subscribe(),
            15 if !self.owned.is_empty() => {
                let which = self.random.below(self.owned.len());
                self.unsubscribe(which);
            }
            16 => self.doom(),
            17 => self.set_range(),
            18 => self.operate(),
            _ => self.find(),
        }
    }

    /// Somebody's subscription, whether it still lives or not.
    fn anybody(&mut self) -> Option<Known> {
        let directory = self.world.directory.lock().unwrap();
        let known: Vec<_> = directory.iter().flatten().cloned().collect();
        // What is cloned and not chosen may be all that is left of a subscription: it goes here,
        // which calls nobody.
        drop(directory);
        let which = self.random.below(known.len().max(1));
        known.into_iter().nth(which)
    }

    // Changes.

    fn change(&mut self) {
        let pages = self.random.pages(2);
        let range = span(pages);
        let by = self.random.one_in(3).then(|| self.random.below(OWNERS));
        let event = match by {
            None if self.random.one_in(2) => Event::new(EventKind::Unmap, range),
            None => Event::new(EventKind::Clear, range),
            Some(by) => Event::new(EventKind::Migrate, range).owned_by(self.world.owners[by]),
        };
        let world = Arc::clone(&self.world);
        let change = if self.random.one_in(4) {
            let Ok(change) = world.space.try_invalidate_range_start(event) else { return };
            change
        } else {
            world.space.invalidate_range_start(event)
        };
        self.check_announced(range, by);
        for page in pages.0..=pages.1 {
            world.cpu.change(page, by);
        }
        self.depth += 1;
        if self.depth < NESTED {
            // Under an announcement everything goes, but waiting for oneself.
            match self.random.below(8) {
                0 => self.change(),
                1 => self.subscribe(),
                2 if !self.owned.is_empty() => {
                    let which = self.random.below(self.owned.len());
                    self.unsubscribe(which);
                }
                3 => self.set_range(),
                4 => self.use_device(),
                _ => {}
            }
        }
        self.depth -= 1;
        self.check_announced(range, by);
        drop(change);
    }

    /// *Announced*: no device uses what is being changed, but for those of who changes it.
    fn check_announced(&self, range: VaRange, by: Option<usize>) {
        let known: Vec<_> = {
            let directory = self.world.directory.lock().unwrap();
            directory.iter().flatten().cloned().collect()
        };
        for known in known.iter().filter(|known| by.is_none() || known.owner != by) {
            let maps = known.mirror.inspect(|mirror| mirror.maps_any(range));
            assert_ne!(maps, Ok(true), "a device maps what is being changed");
            assert!(!known.tlb.uses_any(range), "a device uses what is being changed");
        }
    }

    // Devices at work.

    /// Serves a fault of somebody's device: one try.
    fn fault(&mut self) {
        let Some(known) = self.anybody() else { return };
        let Ok(section) = read_begin(&known.mirror) else { return };
        let pages = self.random.pages(2);
        let found =
            (pages.0..=pages.1).map(|page| (page, self.world.cpu.look_up(page, known.owner)));
        let found: Vec<_> = found.collect();
        if self.random.one_in(4) {
            thread::yield_now();
        }
        if self.random.one_in(8) {
            return; // gives it up
        }
        let Ok(mut mirror) = section.commit() else { return };
        let range = mirror.range();
        for (page, generation) in found {
            if range.covers(span((page, page))) {
                mirror.table[page] = Some(generation);
                mirror.tlb.0[page].store(generation + 1, Relaxed);
            }
        }
    }

    /// *Current*, at any time, of anybody.
    fn use_device(&mut self) {
        let Some(known) = self.anybody() else { return };
        let _ = known.mirror.inspect(|mirror| mirror.check(&self.world.cpu));
    }

    fn find(&mut self) {
        let (page, _) = self.random.pages(1);
        if let Some(mirror) = self.world.space.find::<Mirror>(page as u64 * PAGE) {
            let _ = mirror.inspect(|mirror| mirror.check(&self.world.cpu));
        }
    }

    // Subscriptions.

    /// A new subscription, or the end of one where there are enough.
    fn subscribe(&mut self) {
        let mut places = self.number * OWNED..(self.number + 1) * OWNED;
        let free = places.find(|&place| self.owned.iter().all(|owned| owned.place != place));
        let Some(place) = free else { return self.unsubscribe(0) };
        let keeps = self.random.one_in(2);
        if let Some(subscription) = self.new_subscription(place) {
            self.owned.push(Owned { subscription, place, keeps });
        }
    }

    fn new_mirror(&mut self, owner: Option<usize>) -> Mirror {
        Mirror {
            table: vec![None; PAGES],
            tlb: Arc::default(),
            device: self.world.device.reference(),
            owner,
            random: Random::new(self.random.next()),
            under_way: 0,
            doomed: None,
            end: End::Not,
            census: Arc::clone(&self.world.census),
        }
    }

    /// Subscribes somebody who hears of everything, starts and ends.
    fn witness(&mut self) -> Subscription<Mirror> {
        let mirror = self.new_mirror(None);
        self.world.census.subscribed.fetch_add(1, Relaxed);
        let options = SubscribeOptions::new().class(Class::List);
        self.world.space.subscribe_paired(VaRange::ALL, mirror, options).unwrap()
    }

    fn new_subscription(&mut self, place: usize) -> Option<Subscription<Mirror>> {
        let owner = self.random.one_in(2).then(|| self.random.below(OWNERS));
        let mirror = self.new_mirror(owner);
        let tlb = Arc::clone(&mirror.tlb);
        let range = span(self.random.pages(PAGES));
        let mut options = SubscribeOptions::new();
        if let Some(owner) = owner {
            options = options.owner(self.world.owners[owner]);
        }
        if self.random.one_in(4) {
            options = options.class(Class::List);
        }
        let result = if self.random.one_in(3) {
            self.world.space.subscribe_paired(range, mirror, options)
        } else {
            self.world.space.subscribe_with(range, mirror, options)
        };
        match result {
            Ok(subscription) => {
                self.world.census.subscribed.fetch_add(1, Relaxed);
                let mirror = Handle::clone(&subscription);
                self.enter(place, Some(Known { mirror, tlb, owner }));
                Some(subscription)
            }
            Err(refused) => {
                assert_eq!(refused.reason, SubscribeError::Released);
                assert!(self.world.releasing.load(Relaxed), "nobody releases");
                refused.notifier.ends(End::Refused);
                None
            }
        }
    }

    /// Writes into the directory.
    fn enter(&self, place: usize, known: Option<Known>) {
        let before = {
            let mut directory = self.world.directory.lock().unwrap();
            std::mem::replace(&mut directory[place], known)
        };
        drop(before);
    }

    fn unsubscribe(&mut self, which: usize) {
        let Owned { subscription, place, .. } = self.owned.swap_remove(which);
        let known = Handle::clone(&subscription);
        if self.random.one_in(3) {
            drop(subscription);
        } else {
            match subscription.unsubscribe() {
                Some(mirror) => mirror.ends(End::HandedBack),
                None => assert!(self.world.releasing.load(Relaxed), "nobody releases"),
            }
        }
        assert!(known.inspect(|_| ()).is_err(), "it has ended");
        assert!(known.read_begin().is_err(), "it has ended");
        drop(known);
        self.enter(place, None);
    }

    /// Gives a subscription away, to be dropped in a callback of another.
    fn doom(&mut self) {
        let keepers: Vec<_> = (0..self.owned.len()).filter(|&n| self.owned[n].keeps).collect();
        if keepers.is_empty() {
            return;
        }
        let keeper = keepers[self.random.below(keepers.len())];
        let place = (THREADS + self.number) * OWNED;
        let Some(doomed) = self.new_subscription(place) else { return };
        let keeper = &self.owned[keeper].subscription;
        let kept = match read_begin(keeper).map(|section| section.commit()) {
            Ok(Ok(mut mirror)) if mirror.doomed.is_none() => {
                mirror.doomed = Some(doomed);
                None
            }
            // Not under the update, which nobody's end may be waited for under.
            _ => Some(doomed),
        };
        drop(kept);
    }

    fn set_range(&mut self) {
        let range = span(self.random.pages(PAGES));
        if self.owned.is_empty() {
            return;
        }
        let which = self.random.below(self.owned.len());
        let subscription = &mut self.owned[which].subscription;
        match subscription.set_range(range) {
            Ok(()) => assert_eq!(subscription.range(), range),
            Err(_) => assert!(self.world.releasing.load(Relaxed), "nobody releases"),
        }
    }

    /// An operation under way holds the end of everything off, and may announce changes.
    fn operate(&mut self) {
        if self.owned.is_empty() || self.depth > 0 {
            return;
        }
        let which = self.random.below(self.owned.len());
        let mirror = Handle::clone(&self.owned[which].subscription);
        let Ok(operation) = mirror.begin_operation() else { return };
        let pages = self.random.pages(1);
        let event = Event::new(EventKind::ProtectionPage, span(pages));
        let change = operation.space().invalidate_range_start(event);
        self.check_announced(span(pages), None);
        self.world.cpu.change(pages.0, None);
        drop(change);
        assert!(mirror.inspect(|_| ()).is_ok(), "it cannot end meanwhile");
    }
}

/// Begins a read section; in an ordinary build, it fails where that takes too long.
#[cfg(not(shuttle))]
fn read_begin(
    mirror: &Handle<Mirror>,
) -> Result<mmu_notifier::ReadSection<'_, Mirror>, mmu_notifier::Released> {
    use mmu_notifier::ReadBeginError::Released;
    match mirror.read_begin_deadline(Instant::now() + PATIENCE) {
        Ok(section) => Ok(section),
        Err(Released(released)) => Err(released),
        Err(error) => panic!("{error}: {:#?}", mirror.space()),
    }
}

/// Begins a read section; shuttle notices by itself where nobody can go on.
#[cfg(shuttle)]
fn read_begin(
    mirror: &Handle<Mirror>,
) -> Result<mmu_notifier::ReadSection<'_, Mirror>, mmu_notifier::Released> {
    mirror.read_begin()
}

/// One address space, from its beginning to its end. Where `release` is set, it dies while it is in
/// use.
fn round(seed: u64, release: bool) {
    let world = Arc::new(World {
        space: Subscriptions::new(),
        cpu: Cpu::default(),
        device: DeviceHandle::register(Device { registers: vec![0; 4] }),
        owners: std::array::from_fn(|_| Owner::new()),
        directory: Mutex::new(vec![None; 2 * THREADS * OWNED]),
        census: Arc::default(),
        releasing: AtomicBool::new(false),
    });
    #[cfg(not(shuttle))]
    watch(&world.space);
    let worker = |number: usize| {
        let random = Random::new(seed.wrapping_mul(31).wrapping_add(number as u64));
        Worker { world: Arc::clone(&world), number, random, owned: Vec::new(), depth: 0 }
    };
    let mut witness = worker(THREADS);
    let witnessed = witness.random.one_in(3).then(|| witness.witness());
    let mut threads = Vec::new();
    for number in 0..THREADS {
        let worker = worker(number);
        threads.push(thread::spawn(move || worker.run()));
    }
    if release {
        let world = Arc::clone(&world);
        let mut random = Random::new(!seed);
        threads.push(thread::spawn(move || {
            // Some way into the round, counted in what happens and not in time.
            let late = random.below(if cfg!(shuttle) { 4 } else { 100 });
            for _ in 0..500 {
                if world.census.subscribed.load(Relaxed) >= late as u64 {
                    break;
                }
                thread::yield_now();
            }
            world.releasing.store(true, Relaxed);
            // Not at once: it gives up where it would have to wait, and is called again.
            for _ in 0..random.below(4) {
                let _ = world.space.release_deadline(Instant::now());
                thread::yield_now();
            }
            world.space.release();
            assert!(world.space.find::<Mirror>(0).is_none(), "all have ended");
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    if let Some(mirror) = witnessed.and_then(Subscription::unsubscribe) {
        assert_eq!(mirror.under_way, 0, "a start without its end");
        mirror.ends(End::HandedBack);
    }
    drop(witness);
    let world = Arc::into_inner(world).expect("the threads have ended");
    let World { space, device, directory, census, .. } = world;
    drop(directory);
    assert_eq!(space.live(), 0, "somebody has been left behind: {space:#?}");
    let mut device = device.try_unregister().expect("nobody refers to the device");
    device.registers.fill(1);
    let count = |counter: &AtomicU64| counter.load(Relaxed);
    let ends = count(&census.handed_back) + count(&census.released) + count(&census.dropped);
    assert_eq!(ends, count(&census.subscribed), "each ends once");
    assert_eq!(ends + count(&census.refused), count(&census.gone), "and is gone");
    assert!(release || count(&census.released) + count(&census.refused) == 0);
}

// The runs.

/// How long anything may take.
#[cfg(not(shuttle))]
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

/// The address space of this round, for the dump of a run that hangs.
#[cfg(not(shuttle))]
static WATCHED: Mutex<std::sync::Weak<Subscriptions>> = Mutex::new(std::sync::Weak::new());

#[cfg(not(shuttle))]
fn watch(space: &Arc<Subscriptions>) {
    *WATCHED.lock().unwrap() = Arc::downgrade(space);
}

/// Whatever sixteen threads do to one address space and its devices: no device uses what is being
/// changed, what is mapped is true, each notifier ends once, nobody is called after that, and the
/// device is free at once (A12, C09).
#[cfg(not(shuttle))]
#[test]
fn a12_c09_sixteen_threads() {
    use std::hash::{BuildHasher, RandomState};
    use std::sync::mpsc;
    use std::time::Duration;

    let seed = match std::env::var("STRESS_SEED") {
        Ok(seed) => seed.parse().expect("STRESS_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0),
    };
    eprintln!("STRESS_SEED={seed}");
    let (done, is_done) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if is_done.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("STRESS_SEED={seed} hangs: {:#?}", WATCHED.lock().unwrap().upgrade());
            std::process::abort();
        }
    });
    let end = Instant::now() + Duration::from_secs(2);
    let mut rounds = 0;
    while rounds < 6 || Instant::now() < end {
        round(seed.wrapping_add(rounds), rounds % 3 == 2);
        rounds += 1;
    }
    drop(done);
    watchdog.join().unwrap();
}

/// The same, on a few threads and under many schedules (A12, C09).
#[cfg(shuttle)]
#[test]
fn a12_c09_sixteen_threads() {
    use shuttle::scheduler::{PctScheduler, RandomScheduler};
    use shuttle::{Config, Runner};

    let mut config = Config::new();
    config.silence_warnings = true;
    let check = || {
        let release = Random::new(0).one_in(2);
        round(0, release);
    };
    Runner::new(RandomScheduler::new(SCHEDULES), config.clone()).run(check);
    Runner::new(PctScheduler::new(3, SCHEDULES), config).run(check);
}

/// How many schedules are drawn, of each kind.
#[cfg(shuttle)]
const SCHEDULES: usize = 20_000;

/// Races that were lost once, each played in the order in which it was.
#[cfg(not(shuttle))]
mod races {
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    use mmu_notifier::{
        Event, EventKind, Fence, Handle, Notifier, ReadBeginError, Subscription, Subscriptions,
        TimedOut, VaRange,
    };

    use super::PATIENCE;

    /// A table of pages, that can be held up in its next invalidation.
    #[derive(Debug, Default)]
    struct Table {
        pages: Vec<u64>,
        held_up: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
    }

    impl Notifier for Table {
        type Fence = ();

        fn invalidate(&mut self, event: &Event) {
            if let Some((entered, go_on)) = self.held_up.take() {
                entered.send(()).unwrap();
                go_on.recv_timeout(PATIENCE).unwrap();
            }
            self.pages.retain(|&page| !event.range().contains(page));
        }
    }

    /// How long to wait for what must not happen.
    const MOMENT: Duration = Duration::from_millis(20);

    fn soon() -> Instant {
        Instant::now() + MOMENT
    }

    fn page(number: u64) -> VaRange {
        VaRange::new(number * 4096, 4096).unwrap()
    }

    /// Calls `during` while another thread changes `range`.
    fn while_changing(space: &Subscriptions, range: VaRange, during: impl FnOnce()) {
        let (started, start) = mpsc::channel();
        let (finish, finished) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                let _change = space.invalidate_range_start(Event::new(EventKind::Unmap, range));
                started.send(()).unwrap();
                // Whether told to or not: a panic of `during` ends the change too.
                let _ = finished.recv_timeout(PATIENCE);
            });
            start.recv_timeout(PATIENCE).unwrap();
            during();
            drop(finish);
        });
    }

    fn commits(subscription: &Subscription<Table>) -> bool {
        subscription.read_begin_deadline(Instant::now() + PATIENCE).unwrap().commit().is_ok()
    }

    /// Who gave up waiting for a change leaves nothing behind: when the change is over, the next
    /// read section commits.
    #[test]
    fn e10_a_reader_that_gave_up_leaves_no_trace() {
        let space = Subscriptions::new();
        let subscription = space.subscribe(page(0), Table::default()).unwrap();
        while_changing(&space, page(0), || {
            let refused = subscription.read_begin_deadline(Instant::now()).unwrap_err();
            assert_eq!(refused, ReadBeginError::TimedOut(TimedOut));
        });
        assert!(commits(&subscription), "nothing is under way: {space:#?}");
    }

    /// A deadline that passes while the reader sleeps is reported as such.
    #[test]
    fn e10_a_deadline_that_passes_in_the_wait_is_reported() {
        let space = Subscriptions::new();
        let subscription = space.subscribe(page(0), Table::default()).unwrap();
        while_changing(&space, page(0), || {
            let result = subscription.read_begin_deadline(soon()).map(|_| ());
            assert_eq!(result, Err(ReadBeginError::TimedOut(TimedOut)));
        });
        assert!(commits(&subscription), "nothing is under way: {space:#?}");
    }

    /// Who unsubscribes while a release is telling the devices one after the other to stop is out
    /// of the index only when its own device has stopped: else a change is announced to nobody.
    #[test]
    fn b13_unsubscribing_under_a_release_stops_the_device_first() {
        let space = Subscriptions::new();
        let (entered, is_inside) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel();
        let slow = Table { pages: Vec::new(), held_up: Some((entered, may_go_on)) };
        let slow = space.subscribe(page(0), slow).unwrap();
        let fast = space.subscribe(page(1), Table::default()).unwrap();
        fast.read_begin().unwrap().commit().unwrap().pages.push(4096);
        let handle = Handle::clone(&fast);
        thread::scope(|scope| {
            let release = scope.spawn(|| space.release());
            is_inside.recv_timeout(PATIENCE).unwrap();
            // The release is at `slow` and will be for a while.
            let unfinished = fast.unsubscribe_deadline(soon());
            let change = space.invalidate_range_start(Event::new(EventKind::Unmap, page(1)));
            let pages = handle.inspect(|table| table.pages.clone()).unwrap_or_default();
            drop(change);
            go_on.send(()).unwrap();
            release.join().unwrap();
            drop(unfinished);
            drop(slow);
            assert!(pages.is_empty(), "the page is changed, and its device uses it still");
        });
    }

    /// Stops only when it is let.
    #[derive(Debug)]
    struct Slow(Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>);

    struct Stopping(mpsc::Sender<()>, mpsc::Receiver<()>);

    impl Fence for Stopping {
        fn wait(self) {
            self.0.send(()).unwrap();
            self.1.recv_timeout(PATIENCE).unwrap();
        }
    }

    impl Notifier for Slow {
        type Fence = Option<Stopping>;

        fn invalidate(&mut self, _: &Event) -> Option<Stopping> {
            self.0.take().map(|(stopping, stop)| Stopping(stopping, stop))
        }
    }

    /// A change of range that a release overtakes, and which then gives up, leaves the subscription
    /// at one range and counted at one range: what is done next with it finds it whole.
    #[test]
    fn a_change_of_range_overtaken_by_a_release_that_gives_up_leaves_the_counts_right() {
        let space = Subscriptions::new();
        let (stopping, is_stopping) = mpsc::channel();
        let (stop, may_stop) = mpsc::channel();
        let slow = Slow(Some((stopping, may_stop)));
        let mut subscription = space.subscribe(page(0), slow).unwrap();
        // The release is not going to come to its end.
        let operation = subscription.begin_operation().unwrap();
        thread::scope(|scope| {
            let subscription = &mut subscription;
            let space = &space;
            let moving = scope.spawn(move || subscription.set_range(page(1)));
            is_stopping.recv_timeout(PATIENCE).unwrap();
            let deadline = Instant::now() + 25 * MOMENT;
            let releasing = scope.spawn(move || space.release_deadline(deadline));
            // Until the release has come to the subscription, or has given up already.
            while space.find::<Slow>(0).is_some() && !releasing.is_finished() {
                thread::yield_now();
            }
            stop.send(()).unwrap();
            // It may say either.
            let _ = moving.join().unwrap();
            assert_eq!(releasing.join().unwrap(), Err(TimedOut));
        });
        let change = space.invalidate_range_start(Event::new(EventKind::Unmap, page(1)));
        let _ = subscription.set_range(page(2));
        drop(change);
        let dump = format!("{space:#?}");
        assert!(dump.contains("changes_under_way: 0"), "the change is over: {dump}");
        drop(operation);
        assert!(subscription.unsubscribe().is_some(), "no release came to its end: {dump}");
    }
}
