//! What it costs that a CPU touches a page that is out.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use uhmm::DevicePagemap;
use uhmm::policy::{FaultAround, Policies};

use super::bare::{Handler, Memory, Wait, processor_time, processors, run_on};
use super::rig::Rig;
use super::rounds::{Effort, Side, median, row, table, take_turns, time};

/// Where the thread that faults and those that serve are let run.
struct Placement {
    name: &'static str,
    servers: Vec<usize>,
    faulting: Vec<usize>,
}

/// All the placements that the machine has.
fn placements() -> Vec<Placement> {
    let all = processors();
    let (first, last) = (vec![all[0]], vec![all[all.len() - 1]]);
    let on = |name, servers: &[usize], faulting: &[usize]| Placement {
        name,
        servers: servers.to_vec(),
        faulting: faulting.to_vec(),
    };
    let mut placements = vec![on("the same core", &first, &first), on("any core", &all, &all)];
    if all.len() > 1 {
        placements.insert(1, on("another core", &last, &first));
    }
    placements
}

pub(crate) fn run(effort: &Effort) {
    for placement in placements() {
        if effort.leaves_out(placement.name) {
            continue;
        }
        one_page(effort, &placement);
    }
    run_on(&processors_of_all());
    if !effort.leaves_out("sequence") {
        in_sequence(effort);
    }
}

/// The processors that this process began with.
fn processors_of_all() -> Vec<usize> {
    static ALL: std::sync::OnceLock<Vec<usize>> = std::sync::OnceLock::new();
    ALL.get_or_init(processors).clone()
}

/// Touches every page, and returns the median of what a touch took.
fn touch_each(memory: &Memory) -> f64 {
    let mut times: Vec<f64> = Vec::with_capacity(memory.pages());
    for page in 0..memory.pages() {
        let (taken, word) = time(|| memory.load(page));
        assert_eq!(word, page as u64, "a page came home as another");
        times.push(taken);
    }
    median(&mut times)
}

/// Memory with a place where its pages go, and a thread that brings them back, by system calls alone.
pub(crate) struct Bare {
    pub(crate) memory: Memory,
    pub(crate) away: Arc<Memory>,
    pub(crate) handler: Handler,
}

impl Bare {
    /// Makes memory whose pages are moved.
    pub(crate) fn moving(wait: Wait, pages: usize) -> Bare {
        let (memory, away) = (Memory::new(pages), Arc::new(Memory::new(pages)));
        let (from, to) = (memory.address(0), away.address(0));
        let handler = Handler::start(wait, false, move |uffd, address| {
            uffd.move_pages(to + (address - from), address, 1);
        });
        handler.uffd().register(memory.range());
        handler.uffd().register(away.range());
        let bare = Bare { memory, away, handler };
        (0..pages).for_each(|page| {
            bare.handler.uffd().copy(filler().address(0), bare.memory.address(page), 1)
        });
        bare.memory.fill();
        bare
    }

    /// Makes memory whose pages are copied.
    fn copying(wait: Wait, pages: usize) -> Bare {
        let (memory, away) = (Memory::new(pages), Arc::new(Memory::new(pages)));
        away.fill();
        let (from, to) = (memory.address(0), away.address(0));
        let handler = Handler::start(wait, false, move |uffd, address| {
            uffd.copy(to + (address - from), address, 1);
        });
        handler.uffd().register(memory.range());
        Bare { memory, away, handler }
    }

    fn move_away(&self) {
        for page in 0..self.memory.pages() {
            let (from, to) = (self.memory.address(page), self.away.address(page));
            self.handler.uffd().move_pages(from, to, 1);
        }
    }

    fn drop_all(&self) {
        self.memory.discard(self.memory.range());
    }
}

/// A page that is there, to copy from.
fn filler() -> &'static Memory {
    static FILLER: std::sync::OnceLock<Memory> = std::sync::OnceLock::new();
    FILLER.get_or_init(|| {
        let memory = Memory::new(1);
        memory.fill();
        memory
    })
}

fn one_page(effort: &Effort, placement: &Placement) {
    let pages = effort.samples;
    run_on(&placement.servers);
    let rig = Rig::new(4 * pages);
    let (read, polled) = (Bare::moving(Wait::Read, pages), Bare::moving(Wait::Poll, pages));
    let copied = Bare::copying(Wait::Read, pages);
    run_on(&placement.faulting);
    let [adopted, together, carried] = [(); 3].map(|()| Memory::new(pages));
    [&adopted, &together, &carried].into_iter().for_each(|memory| {
        memory.fill();
        rig.manage(memory);
    });
    let come_home = |memory, to: &Arc<DevicePagemap>| {
        rig.send_each(Memory::range(memory), to);
        touch_each(memory)
    };
    let series = take_turns(
        effort.rounds,
        vec![
            Side::new("in place", || come_home(&adopted, &rig.in_place)),
            Side::new("MOVE, read", || {
                read.move_away();
                touch_each(&read.memory)
            }),
            Side::new("MOVE, poll", || {
                polled.move_away();
                touch_each(&polled.memory)
            }),
            Side::new("in place, of a range sent at once", || {
                rig.send(together.range(), &rig.in_place);
                touch_each(&together)
            }),
            Side::new("by a copy", || come_home(&carried, &rig.copying)),
            Side::new("COPY, read", || {
                copied.drop_all();
                touch_each(&copied.memory)
            }),
        ],
    );
    table(&format!("A CPU touches a page that is out: served on {}", placement.name));
    row(&series[0], &[&series[1], &series[2]], Some(1.15));
    row(&series[2], &[&series[1]], None);
    row(&series[3], &[&series[1], &series[2]], Some(1.15));
    row(&series[4], &[&series[5]], None);
}

/// A CPU reads one page after the other.
fn in_sequence(effort: &Effort) {
    let pages = if effort.quick { 32 } else { 1024 };
    let walk = |memory: &Memory| {
        let (taken, ()) = time(|| {
            for page in 0..pages {
                assert_eq!(memory.load(page), page as u64, "a page came home as another");
            }
        });
        taken / pages as f64
    };
    let rig = Rig::new(4 * pages);
    let around = |policies: Policies| {
        let options = uhmm::PagemapOptions::new().policies(policies);
        DevicePagemap::register_with(rig.process.host_memory(pages as u64), options)
    };
    let one = around(Policies::none());
    let some = around(Policies::none().and(FaultAround::new()));
    let all = around(Policies::default());
    let memory = Memory::new(pages);
    memory.fill();
    rig.manage(&memory);
    let walk_home = |to: &Arc<DevicePagemap>| {
        rig.send(memory.range(), to);
        walk(&memory)
    };
    let walk_scattered = |to: &Arc<DevicePagemap>| {
        rig.send_each(memory.range(), to);
        walk(&memory)
    };
    let series = take_turns(
        effort.rounds_of(2),
        vec![
            Side::new("one at a time", || walk_home(&one)),
            Side::new("with fault-around", || walk_home(&some)),
            Side::new("with the default policies", || walk_home(&all)),
            Side::new("one at a time, sent so", || walk_scattered(&one)),
            Side::new("with fault-around, sent one by one", || walk_scattered(&some)),
        ],
    );
    table("A CPU reads one page after the other, for each page");
    row(&series[1], &[&series[0]], Some(0.2));
    row(&series[2], &[&series[0]], None);
    row(&series[4], &[&series[3]], Some(0.2));
}

/// Where servers should be.
pub(crate) fn run_placement(effort: &Effort) {
    let all = processors_of_all();
    let first = vec![all[0]];
    let pages = effort.samples;
    run_on(&all);
    let rig = Rig::new(4 * pages);
    run_on(&first);
    let (floor, there) = (Bare::moving(Wait::Read, pages), Bare::moving(Wait::Poll, pages));
    run_on(&all);
    let roaming = Bare::moving(Wait::Read, pages);
    let memory = Memory::new(pages);
    memory.fill();
    rig.manage(&memory);
    let mine = || {
        rig.send_each(memory.range(), &rig.in_place);
        touch_each(&memory)
    };
    let bare = |bare: &Bare| {
        bare.move_away();
        touch_each(&bare.memory)
    };
    let pinned = |run: &dyn Fn() -> f64| {
        run_on(&first);
        let taken = run();
        run_on(&all);
        taken
    };
    let series = take_turns(
        effort.rounds,
        vec![
            Side::new("floor: all on one core, read", || pinned(&|| bare(&floor))),
            Side::new("floor: all on one core, poll", || pinned(&|| bare(&there))),
            Side::new("one thread on one core", || pinned(&mine)),
            Side::new("one thread anywhere", mine),
            Side::new("bare handler, everything anywhere", || bare(&roaming)),
        ],
    );
    table("Placement: servers may be anywhere");
    let floors = [&series[0], &series[1]];
    series[2..].iter().for_each(|series| row(series, &floors, None));
    drop((floor, there, roaming));
    if all.len() > 1 {
        two_threads(effort, &rig, &all);
    }
    idle(effort, &rig, &memory);
}

/// Two threads fault at the same time, on a core each.
fn two_threads(effort: &Effort, rig: &Rig, all: &[usize]) {
    let pages = effort.samples;
    let memories = [Memory::new(pages), Memory::new(pages)];
    memories.iter().for_each(|memory| {
        memory.fill();
        rig.manage(memory);
    });
    let bare = [Bare::moving(Wait::Read, pages), Bare::moving(Wait::Read, pages)];
    let both = |memories: [&Memory; 2]| {
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            let threads = [(all[0], memories[0]), (all[all.len() - 1], memories[1])];
            let threads = threads.map(|(processor, memory)| {
                let start = &start;
                scope.spawn(move || {
                    run_on(&[processor]);
                    start.wait();
                    touch_each(memory)
                })
            });
            let taken = threads.map(|thread| thread.join().expect("no panic"));
            (taken[0] + taken[1]) / 2.0
        })
    };
    let series = take_turns(
        effort.rounds,
        vec![
            Side::new("two threads, on a core each", || {
                memories.iter().for_each(|memory| rig.send_each(memory.range(), &rig.in_place));
                both([&memories[0], &memories[1]])
            }),
            Side::new("two bare handlers, anywhere", || {
                bare.iter().for_each(Bare::move_away);
                both([&bare[0].memory, &bare[1].memory])
            }),
        ],
    );
    row(&series[0], &[&series[1]], None);
}

/// What an attached process uses when it does nothing.
fn idle(effort: &Effort, rig: &Rig, memory: &Memory) {
    let pause = if effort.quick { Duration::from_millis(10) } else { Duration::from_secs(1) };
    rig.send_each(memory.range(), &rig.in_place);
    touch_each(memory);
    let before = processor_time();
    std::thread::sleep(pause);
    let used = processor_time() - before;
    println!("\nIdle for {pause:?} after faults: {used:.0} us of processor time.");
}
