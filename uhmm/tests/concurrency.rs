//! Mirrors, faults, migrations, fork, exit and unregister all at once: in an ordinary build on the
//! system's threads, and under `--cfg shuttle` on few whose schedule is drawn at random.
//!
//! Either run begins with a line `UHMM_SEED=...`; with that in the environment it draws the same
//! again, under shuttle schedule by schedule. A failure under shuttle also prints the one schedule
//! that failed, for `shuttle::replay`.
//!
//! What is checked: words that CPUs and two devices add to at the same time, wherever their pages
//! are at that moment, hold the sum in the end (invariant *Whole*); a child that was forked sees
//! one moment; nothing is used after it was given up; nothing is left behind.
#![cfg(not(loom))]

mod common;

use std::sync::Arc;

use common::{Gpu, access, mirror, page, range, word};
use uhmm::policy::Policies;
use uhmm::primitive::atomic::{AtomicU64, Ordering::SeqCst};
use uhmm::primitive::thread;
use uhmm::sim::{Machine, Mapping, Process, SimError};
use uhmm::{Access, Clock, DevicePagemap, FaultError, Mirror, MirrorHandle, PagemapOptions};

/// How many pages hold a word that everybody adds to. One more comes and goes.
const PAGES: u64 = if cfg!(shuttle) { 2 } else { 6 };

/// How many pages each device has: too few.
const DEVICE_PAGES: usize = if cfg!(shuttle) { 1 } else { 4 };

/// How many things each thread does in a round.
const STEPS: usize = if cfg!(shuttle) { 4 } else { 200 };

/// Draws numbers: under shuttle its own, so that its seed is all that a replay needs.
struct Random {
    #[cfg(not(shuttle))]
    state: u64,
}

impl Random {
    #[cfg(shuttle)]
    fn new(_: u64) -> Random {
        Random {}
    }

    #[cfg(not(shuttle))]
    fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    #[cfg(shuttle)]
    fn below(&mut self, limit: u64) -> u64 {
        shuttle::rand::Rng::gen_range(&mut shuttle::rand::thread_rng(), 0..limit)
    }

    /// An xorshift generator.
    #[cfg(not(shuttle))]
    fn below(&mut self, limit: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % limit
    }
}

/// What is shared by the threads of a round.
struct World {
    machine: Machine,
    gpus: [Arc<Gpu>; 2],
    pagemaps: [Arc<DevicePagemap>; 2],
    /// What has been added to each word.
    added: Vec<AtomicU64>,
}

impl World {
    /// Makes a world whose devices have memory of their own, or in place: each as its bit of
    /// `in_place` says.
    fn new(in_place: u64) -> World {
        let machine = Machine::new();
        let gpu = |at: u64| match in_place >> at & 1 {
            0 => Gpu::new(DEVICE_PAGES),
            _ => Gpu::in_place(&machine, DEVICE_PAGES),
        };
        let gpus = [gpu(0), gpu(1)];
        let pagemap = |gpu: &Arc<Gpu>| {
            let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
            DevicePagemap::register_with(gpu.clone(), options)
        };
        World {
            machine,
            pagemaps: [pagemap(&gpus[0]), pagemap(&gpus[1])],
            gpus,
            added: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn note(&self, page: u64) {
        self.added[page as usize].fetch_add(1, SeqCst);
    }
}

/// A CPU: adds, reads, and gives up the page that comes and goes.
fn cpu(world: &World, process: &Process, random: &mut Random) {
    for _ in 0..STEPS {
        let page = random.below(PAGES);
        match random.below(6) {
            0 => {
                process.unmap(range(PAGES, 1));
                let anonymous = Mapping::anonymous(Access::Write);
                process.map(range(PAGES, 1), anonymous).expect("there is room");
            }
            1 => match process.load_u64(word(PAGES)) {
                Ok(value) => assert_eq!(value, 0, "a page that came anew is not empty"),
                Err(SimError::Fault(_)) => {}
                Err(error) => panic!("{error}"),
            },
            _ => match process.fetch_add_u64(word(page), 1) {
                Ok(_) => world.note(page),
                Err(SimError::Fault(FaultError::CopyFailed { .. })) => {}
                Err(error) => panic!("{error}"),
            },
        }
    }
}

/// A context of a device: adds and reads through its page table, and sometimes holds a page.
fn device(world: &World, mirror: &MirrorHandle<Gpu>, random: &mut Random) {
    for _ in 0..STEPS {
        let page = random.below(PAGES);
        let result = match random.below(6) {
            0 => access(mirror, word(PAGES), Access::Read, |old| old).map(|value| {
                assert_eq!(value, 0, "a stale page");
            }),
            1 => mirror.exclusive(range(page, 1)).map(drop),
            _ => {
                access(mirror, word(page), Access::Atomic, |old| old + 1).map(|_| world.note(page))
            }
        };
        match result {
            Ok(()) | Err(FaultError::CopyFailed { .. } | FaultError::Hole { .. }) => {}
            Err(FaultError::Released) => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Somebody who moves pages about, and lets copies fail.
fn mover(world: &World, process: &Process, random: &mut Random) {
    let space = process.address_space();
    for _ in 0..STEPS {
        let first = random.below(PAGES);
        let some = range(first, 1 + random.below(PAGES - first));
        let which = random.below(2) as usize;
        match random.below(8) {
            0 => _ = space.migrate_home(some),
            1 => drop(space.migrate(some, &world.pagemaps[which])),
            2 => drop(space.migrate(some, &world.pagemaps[which]).copy()),
            3 => _ = world.pagemaps[which].evict(1),
            4 => {
                let step = if random.below(2) == 0 { "copy" } else { "adopt" };
                world.gpus[which].injector.fail(step, random.below(3));
            }
            5 => _ = process.relocate(some),
            6 => _ = process.reclaim(some),
            _ => _ = space.migrate(some, &world.pagemaps[which]).run(),
        }
        world.machine.check().expect("the machine is whole");
    }
}

/// Somebody who forks: a child sees one moment, for ever.
fn forker(process: &Process, random: &mut Random) {
    for _ in 0..STEPS / 2 {
        let child = process.fork().expect("it can fork");
        let page = random.below(PAGES);
        let read = |child: &Process| loop {
            match child.load_u64(word(page)) {
                Ok(value) => break value,
                Err(SimError::Fault(FaultError::CopyFailed { .. })) => {}
                Err(error) => panic!("{error}"),
            }
        };
        let value = read(&child);
        thread::yield_now();
        assert_eq!(read(&child), value, "the parent writes to the child's page");
        child.store_u64(word(page), u64::MAX / 2).ok();
        child.exit();
    }
}

/// What a thread of a round does.
type Body = Box<dyn FnOnce(&World, &mut Random) + Send>;

/// How a round ends for the devices.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// They are unregistered when all is done.
    InPeace,
    /// They are unregistered in the middle of everything.
    Unregister,
    /// The process exits in the middle of everything, as far as the devices can tell.
    Exit,
}

fn round(seed: u64) {
    let mut random = Random::new(seed | 1);
    let end = [End::InPeace, End::Unregister, End::Exit][random.below(3) as usize];
    let world = Arc::new(World::new(random.below(4)));
    let process = world.machine.spawn();
    process.map(range(0, PAGES + 1), Mapping::anonymous(Access::Write)).expect("there is room");
    let mirrors = [0, 1].map(|at| mirror(&process, &world.gpus[at], &world.pagemaps[at]));
    let mut threads = Vec::new();
    let mut number = seed;
    let mut spawn = |f: Body| {
        let world = Arc::clone(&world);
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let seed = number | 1;
        threads.push(thread::spawn(move || f(&world, &mut Random::new(seed))));
    };
    for mirror in &mirrors {
        let handle = (**mirror).clone();
        spawn(Box::new(move |world, random| device(world, &handle, random)));
    }
    // Those who use the process besides its devices; where it is to exit early, they end early.
    let user = process.clone();
    spawn(Box::new(move |world, random| mover(world, &user, random)));
    if end != End::Exit {
        let user = process.clone();
        spawn(Box::new(move |world, random| cpu(world, &user, random)));
        let user = process.clone();
        spawn(Box::new(move |_, random| forker(&user, random)));
    }
    finish(end, world, process, mirrors, threads);
}

fn finish(
    end: End,
    world: Arc<World>,
    process: Process,
    mirrors: [Mirror<Gpu>; 2],
    threads: Vec<thread::JoinHandle<()>>,
) {
    let mirrors = match end {
        End::Unregister => {
            for mirror in mirrors {
                assert!(mirror.unregister().is_some(), "the process lives");
            }
            None
        }
        End::InPeace | End::Exit => Some(mirrors),
    };
    if end == End::Exit {
        process.exit();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        // Whoever was the last user has started the death, if not gone through it.
        drop(mirrors);
        while world.machine.frames() != 0 || world.pagemaps.iter().any(|map| map.used() != 0) {
            thread::yield_now();
        }
    } else {
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        world.gpus.iter().for_each(|gpu| gpu.injector.clear());
        for (index, added) in world.added.iter().enumerate() {
            let value = process.load_u64(word(index as u64)).expect("memory is there");
            assert_eq!(value, added.load(SeqCst), "page {} lost or gained", page(index as u64));
        }
        drop(mirrors);
        process.exit();
    }
    world.machine.check().expect("the machine is whole");
    assert_eq!(world.machine.frames(), 0, "system memory leaks");
    assert_eq!(world.machine.violations(), Vec::<String>::new());
    for pagemap in &world.pagemaps {
        assert_eq!(pagemap.used(), 0, "device memory leaks");
    }
}

/// The seed of this run: that of the environment, or one like no other.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    let seed = match std::env::var("UHMM_SEED") {
        Ok(seed) => seed.parse().expect("UHMM_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0),
    };
    eprintln!("UHMM_SEED={seed}");
    seed
}

#[cfg(not(shuttle))]
#[test]
fn everything_at_once() {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    let seed = seed();
    let (done, is_done) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let timeout = mpsc::RecvTimeoutError::Timeout;
        if is_done.recv_timeout(Duration::from_secs(120)) == Err(timeout) {
            eprintln!("UHMM_SEED={seed} hangs");
            std::process::abort();
        }
    });
    let end = Instant::now() + Duration::from_secs(3);
    let mut rounds = 0;
    while rounds < 6 || Instant::now() < end {
        round(seed.wrapping_add(rounds));
        rounds += 1;
    }
    drop(done);
    watchdog.join().expect("no panic");
}

#[cfg(shuttle)]
#[test]
fn everything_at_once() {
    use shuttle::scheduler::{PctScheduler, RandomScheduler};
    use shuttle::{Config, Runner};

    /// How many schedules are drawn, of each kind.
    const SCHEDULES: usize = 10_000;

    let seed = seed();
    let mut config = Config::new();
    config.silence_warnings = true;
    let random = RandomScheduler::new_from_seed(seed, SCHEDULES);
    Runner::new(random, config.clone()).run(|| round(0));
    let pct = PctScheduler::new_from_seed(seed, 3, SCHEDULES);
    Runner::new(pct, config).run(|| round(0));
}
