//! What it costs to move pages out and home by a call, in place.

use uhmm::{Order, PageRange};

use super::bare::{Memory, Uffd, Wait};
use super::rig::Rig;
use super::rounds::{Effort, Side, row, table, take_turns, time};

const HUGE: usize = Order::HUGE.pages() as usize;

/// Memory whose pages are moved to and fro by system calls alone.
pub(crate) struct Bare {
    uffd: Uffd,
    pub(crate) memory: Memory,
    away: Memory,
}

impl Bare {
    pub(crate) fn new(pages: usize, huge: bool) -> Bare {
        let memory = if huge { Memory::huge(pages) } else { Memory::new(pages) };
        memory.fill();
        let (uffd, away) = (Uffd::open(Wait::Read, false), Memory::new(pages));
        uffd.register(memory.range());
        uffd.register(away.range());
        Bare { uffd, memory, away }
    }

    pub(crate) fn send(&self) {
        self.uffd.move_pages(self.memory.address(0), self.away.address(0), self.memory.pages());
    }

    pub(crate) fn fetch(&self) {
        self.uffd.move_pages(self.away.address(0), self.memory.address(0), self.memory.pages());
    }
}

/// What is moved at once.
struct Load {
    name: &'static str,
    pages: usize,
    huge: bool,
    goal: f64,
    /// How many times it is moved in a round.
    times: usize,
}

pub(crate) fn run(effort: &Effort) {
    let many = if effort.quick { HUGE } else { 32 * HUGE };
    let load = |name, pages, huge, goal, times| Load { name, pages, huge, goal, times };
    for load in [
        load("64 MiB of 4 KiB pages", many, false, 1.25, 1),
        load("2 MiB of 4 KiB pages", HUGE, false, 1.25, 16),
        load("64 KiB of 4 KiB pages", 16, false, 1.25, 64),
        load("one page of 4 KiB", 1, false, 1.25, 64),
        load("64 MiB of 2 MiB pages", many, true, 1.5, 4),
        load("one page of 2 MiB", HUGE, true, 1.5, 64),
    ] {
        if effort.leaves_out(load.name) {
            continue;
        }
        there_and_back(effort, &load);
    }
}

fn there_and_back(effort: &Effort, load: &Load) {
    let rig = Rig::new(load.pages);
    let bare = Bare::new(load.pages, load.huge);
    let memory = if load.huge { Memory::huge(load.pages) } else { Memory::new(load.pages) };
    memory.fill();
    rig.manage(&memory);
    let range: PageRange = memory.range();
    let times = if effort.quick { 1 } else { load.times };
    let average = |out: &dyn Fn(), home: &dyn Fn(), wanted: fn((f64, f64)) -> f64| {
        let mut sum = (0.0, 0.0);
        for _ in 0..times {
            sum.0 += time(out).0;
            sum.1 += time(home).0;
        }
        wanted(sum) / times as f64
    };
    let (send, fetch) = (|| rig.send(range, &rig.in_place), || rig.fetch(range));
    let (bare_send, bare_fetch) = (|| bare.send(), || bare.fetch());
    let series = take_turns(
        effort.rounds,
        vec![
            Side::new("to the device", || average(&send, &fetch, |(out, _)| out)),
            Side::new("MOVE", || average(&bare_send, &bare_fetch, |(out, _)| out)),
            Side::new("home", || average(&send, &fetch, |(_, home)| home)),
            Side::new("MOVE home", || average(&bare_send, &bare_fetch, |(_, home)| home)),
        ],
    );
    table(&format!("{}, in place", load.name));
    row(&series[0], &[&series[1]], Some(load.goal));
    row(&series[2], &[&series[3]], Some(load.goal));
}
