//! Kernels, the fault service, an address space that changes, migrations and ends all at once: in an
//! ordinary build on the system's threads, and under `--cfg shuttle` on few whose schedule is drawn
//! at random.
//!
//! Either run begins with a line `UHMM_SEED=...`; with that in the environment it draws the same
//! again, under shuttle schedule by schedule. A failure under shuttle also prints the one schedule
//! that failed, for `shuttle::replay`.
//!
//! What is checked: words that kernels and a CPU add to hold the sum in the end, wherever their pages
//! were; a kernel fails for the reason there is and for no other, and always comes to its end; no
//! translation is used after its time; a GPU that does not flush is found out. The same goes for
//! words whose pages two stores take, one compressed and one in a file.
#![cfg(not(loom))]

mod common;
#[cfg(target_os = "linux")]
#[path = "concurrency/stores.rs"]
mod stores;

use std::sync::Arc;

use common::{MIRRORED, options, page, range, word};
use uhmm::primitive::atomic::{AtomicU64, Ordering::SeqCst};
use uhmm::primitive::thread;
use uhmm::sim::{Machine, Mapping, Process, SimError};
use uhmm::{Access, DevicePagemap, FaultError};
use uhmm_devices::gpu::{
    Context, DeviceMemoryView, FaultReason, KernelFault, ReplayPolicy, SoftGpu,
};

/// How many pages hold a word that everybody adds to. One more comes and goes.
const PAGES: u64 = if cfg!(shuttle) { 2 } else { 6 };

/// How many pages the GPU has: too few.
const DEVICE_PAGES: u64 = if cfg!(shuttle) { 1 } else { 4 };

/// How many contexts there are.
const CONTEXTS: usize = if cfg!(shuttle) { 2 } else { 4 };

/// How many things each thread does in a round.
const STEPS: usize = if cfg!(shuttle) { 3 } else { 150 };

/// Steps that are made to fail now and then. None may change an answer.
const FAILURES: [&str; 7] =
    ["allocate", "copy", "clear", "late-flush", "spurious-fault", "duplicate-fault", "overflow"];

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

    /// SplitMix64.
    #[cfg(not(shuttle))]
    fn below(&mut self, limit: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// How a round ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    InPeace,
    Unregister,
    Exit,
    /// The fault service is stopped.
    Stop,
}

/// What the threads of a round share.
struct World {
    machine: Machine,
    gpu: Arc<SoftGpu>,
    /// What has been added to each word.
    added: Vec<AtomicU64>,
}

impl World {
    fn new(random: &mut Random) -> World {
        let policies = [
            ReplayPolicy::Block,
            ReplayPolicy::Batch,
            ReplayPolicy::BatchFlush,
            ReplayPolicy::Once,
        ];
        let options = options(DEVICE_PAGES)
            .tlb_entries(4)
            .fault_buffer(1 + random.below(3) as usize)
            .batch(1 + random.below(2) as usize)
            .replay(policies[random.below(4) as usize]);
        World {
            machine: Machine::new(),
            gpu: SoftGpu::new(options),
            added: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn pagemap(&self) -> &Arc<DevicePagemap> {
        self.gpu.pagemap().expect("it has memory")
    }
}

/// What a kernel does until it is done or fails.
fn kernel(
    world: &World,
    view: &DeviceMemoryView<'_>,
    random: &mut Random,
) -> Result<(), KernelFault> {
    for _ in 0..STEPS {
        let page = random.below(PAGES);
        match random.below(8) {
            0 => match view.load::<u64>(word(PAGES)) {
                Ok(value) => assert_eq!(value, 0, "a page that came anew is not empty"),
                // It comes and goes.
                Err(KernelFault { reason: FaultReason::Address, .. }) => {}
                Err(fault) => return Err(fault),
            },
            1 => drop(view.load::<u64>(word(page))?),
            2 => {
                let fault = view.store(word(MIRRORED), 1_u64).expect_err("beyond the mirror");
                assert!(fault.address == word(MIRRORED) && fault.access == Access::Write);
                if fault.reason != FaultReason::Address {
                    return Err(fault);
                }
            }
            3 => {
                let failure = FAILURES[random.below(FAILURES.len() as u64) as usize];
                world.gpu.injector().fail(failure, random.below(3));
            }
            _ => {
                view.fetch_add_u64(word(page), 1)?;
                world.added[page as usize].fetch_add(1, SeqCst);
            }
        }
    }
    Ok(())
}

fn run_kernel(world: &World, context: &Context, mut random: Random, end: End) {
    let result = context.run(|view| kernel(world, view, &mut random));
    let Err(fault) = result else { return };
    let expected = match end {
        End::InPeace => panic!("{fault}"),
        End::Unregister | End::Exit => FaultReason::Gone,
        End::Stop => FaultReason::Stopped,
    };
    assert_eq!(fault.reason, expected, "{fault} in a round that ends by {end:?}");
}

/// The CPU: adds, and gives up the page that comes and goes.
fn cpu(world: &World, process: &Process, random: &mut Random) {
    for _ in 0..STEPS {
        let page = random.below(PAGES);
        match random.below(4) {
            0 => {
                process.unmap(range(PAGES, 1));
                let anonymous = Mapping::anonymous(Access::Write);
                process.map(range(PAGES, 1), anonymous).expect("there is room");
            }
            _ => match process.fetch_add_u64(word(page), 1) {
                Ok(_) => drop(world.added[page as usize].fetch_add(1, SeqCst)),
                Err(SimError::Fault(FaultError::CopyFailed { .. })) => {}
                Err(error) => panic!("{error}"),
            },
        }
    }
}

/// Somebody who serves faults beside the service.
fn helper(world: &World) {
    for _ in 0..STEPS {
        world.gpu.service_once();
        thread::yield_now();
    }
}

/// Somebody who moves pages about.
fn mover(world: &World, process: &Process, random: &mut Random) {
    let space = process.address_space();
    for _ in 0..STEPS {
        let first = random.below(PAGES + 1);
        let pages = range(first, 1 + random.below(PAGES + 1 - first));
        match random.below(6) {
            0 | 1 => drop(space.migrate(pages, world.pagemap()).run()),
            2 => drop(space.migrate_home(pages)),
            3 => drop(process.relocate(pages)),
            4 => drop(process.reclaim(pages)),
            _ => process.write_protect(pages),
        }
    }
}

fn round(seed: u64) {
    let mut random = Random::new(seed);
    let world = Arc::new(World::new(&mut random));
    let ends = [End::InPeace, End::Unregister, End::Exit, End::Stop];
    let end = ends[random.below(4) as usize];
    let process = world.machine.spawn();
    process.map(range(0, PAGES + 1), Mapping::anonymous(Access::Write)).expect("there is room");
    let mirror = common::mirror(&world.gpu, &process);
    let service = world.gpu.start_service().expect("nobody serves");
    let mut threads = Vec::new();
    let mut spawn = |work: Box<dyn FnOnce(&World) + Send>| {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || work(&world)));
    };
    for number in 0..CONTEXTS {
        let context = world.gpu.context(&mirror).expect("the mirror lives");
        let random = Random::new(seed.wrapping_mul(31).wrapping_add(number as u64));
        spawn(Box::new(move |world| run_kernel(world, &context, random, end)));
    }
    for _ in 0..random.below(3) {
        spawn(Box::new(helper));
    }
    let (user, mut own) = (process.clone(), Random::new(!seed));
    spawn(Box::new(move |world| cpu(world, &user, &mut own)));
    let (user, mut own) = (process.clone(), Random::new(seed.rotate_left(7)));
    spawn(Box::new(move |world| mover(world, &user, &mut own)));

    let (mut mirror, mut process, mut service) = (Some(mirror), Some(process), Some(service));
    match end {
        End::InPeace => {}
        End::Unregister => {
            let ended = mirror.take().and_then(uhmm::Mirror::unregister);
            assert!(ended.is_some(), "the process lives");
        }
        End::Exit => drop(process.take()),
        End::Stop => drop(service.take()),
    }
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    world.gpu.injector().clear();
    if let Some(process) = &process {
        for (index, added) in (0..).zip(&world.added) {
            let value = process.load_u64(word(index)).expect("memory is there");
            assert_eq!(value, added.load(SeqCst), "{} lost or gained", page(index));
        }
        world.gpu.check(mirror.as_deref()).expect("the GPU is whole");
    }
    drop((mirror, process, service));
    finish(&world);
}

/// Checks that nothing is left of a round.
fn finish(world: &World) {
    // Whoever was the last user has started the death, if not gone through it.
    while world.machine.frames() != 0 || common::used(&world.gpu) != 0 {
        thread::yield_now();
    }
    assert_eq!((world.gpu.pending_faults(), world.gpu.stalled_contexts()), (0, 0));
    common::check_empty(&world.machine, &world.gpu);
}

/// A kernel reads a page that goes away under a GPU that does not flush: whether that is noticed.
#[cfg(shuttle)]
fn lost_flush() -> bool {
    use uhmm::primitive::atomic::AtomicBool;

    let machine = Machine::with(uhmm::sim::MachineOptions::new().count_violations());
    let process = machine.spawn();
    process.map(range(0, 1), Mapping::anonymous(Access::Write)).expect("there is room");
    process.store_u64(word(0), 1).expect("memory is there");
    let gpu = SoftGpu::new(options(0).break_flush());
    let mirror = common::mirror(&gpu, &process);
    let service = gpu.start_service().expect("nobody serves");
    let context = gpu.context(&mirror).expect("the mirror lives");
    let begun = Arc::new(AtomicBool::new(false));
    let begins = Arc::clone(&begun);
    let reader = context.spawn(move |view| {
        for _ in 0..4 {
            view.load::<u64>(word(0))?;
            begins.store(true, SeqCst);
        }
        Ok(())
    });
    common::until(|| begun.load(SeqCst));
    process.unmap(range(0, 1));
    reader.join().expect("a GPU that does not flush finds no hole");
    drop((service, mirror));
    !machine.violations().is_empty()
}

/// A kernel stores to a page that goes home from a GPU that does not flush: whether a store that
/// came after the copy, and before the page had its new place, is noticed.
#[cfg(shuttle)]
fn lost_store() -> bool {
    use uhmm::primitive::atomic::AtomicBool;

    let machine = Machine::new();
    let process = machine.spawn();
    process.map(range(0, 1), Mapping::anonymous(Access::Write)).expect("there is room");
    let gpu = SoftGpu::new(options(1).break_flush());
    let mirror = common::mirror(&gpu, &process);
    let service = gpu.start_service().expect("nobody serves");
    let context = gpu.context(&mirror).expect("the mirror lives");
    let begun = Arc::new(AtomicBool::new(false));
    let begins = Arc::clone(&begun);
    let writer = context.spawn(move |view| {
        for value in 0..8_u64 {
            view.store(word(0), value)?;
            begins.store(true, SeqCst);
        }
        Ok(())
    });
    common::until(|| begun.load(SeqCst));
    process.address_space().migrate_home(range(0, 1));
    writer.join().expect("a GPU that does not flush finds no hole");
    drop((service, mirror));
    gpu.violations().iter().any(|violation| violation.contains("after it was copied out"))
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
    for_a_while(round);
}

#[cfg(all(target_os = "linux", not(shuttle)))]
#[test]
fn stores_at_once() {
    for_a_while(stores::round);
}

#[cfg(all(target_os = "linux", not(shuttle)))]
#[test]
fn compaction_at_once() {
    for_a_while(stores::compaction);
}

#[cfg(not(shuttle))]
fn for_a_while(round: fn(u64)) {
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
    while rounds < 8 || Instant::now() < end {
        round(seed.wrapping_add(rounds));
        rounds += 1;
    }
    drop(done);
    watchdog.join().expect("no panic");
}

#[cfg(shuttle)]
#[test]
fn everything_at_once() {
    under_shuttle(|| round(0));
}

#[cfg(all(target_os = "linux", shuttle))]
#[test]
fn stores_at_once() {
    under_shuttle(|| stores::round(0));
}

#[cfg(all(target_os = "linux", shuttle))]
#[test]
fn compaction_at_once() {
    under_shuttle(|| stores::compaction(0));
}

#[cfg(shuttle)]
fn under_shuttle(round: fn()) {
    use shuttle::scheduler::{PctScheduler, RandomScheduler};
    use shuttle::{Config, Runner};

    /// How many schedules are drawn, of each kind.
    const SCHEDULES: usize = 1_000;

    let seed = seed();
    let mut config = Config::new();
    config.silence_warnings = true;
    let random = RandomScheduler::new_from_seed(seed, SCHEDULES);
    Runner::new(random, config.clone()).run(round);
    let pct = PctScheduler::new_from_seed(seed, 3, SCHEDULES);
    Runner::new(pct, config).run(round);
}

/// The schedules that find a defect are drawn.
#[cfg(shuttle)]
#[test]
fn a_lost_flush_is_found_among_schedules() {
    found_among_schedules(lost_flush);
    found_among_schedules(lost_store);
}

#[cfg(shuttle)]
fn found_among_schedules(finds: fn() -> bool) {
    use std::sync::atomic::{AtomicUsize, Ordering};

    let found = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&found);
    shuttle::check_random(
        move || {
            // Relaxed: the schedules of a check are drawn by one thread.
            counted.fetch_add(usize::from(finds()), Ordering::Relaxed);
        },
        1_000,
    );
    assert!(found.load(Ordering::Relaxed) > 0, "a GPU that does not flush is found out");
}
