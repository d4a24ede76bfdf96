//! First touches of memory wait while growth is held, until whoever decides admits them.

mod common;
mod kernel;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use common::children::{End, WAYS, child, end_of};
use common::memory::{Backing, Mapping, RW, advise, map, mapped_in, protect};
use common::rig::{Gpu, attach, is_home};
use common::{eventually, in_own_process};
use kernel::faults::Handler;
use rustix::mm::ProtFlags;
use uhmm::PageRange;
use uhmm_linux::{FirstTouch, Growth, Process};

/// Admits so many touches as it is told to, each with so many pages from it on; elsewhere than in its
/// range all, since stacks are memory too.
#[derive(Debug)]
struct Valve {
    range: PageRange,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: u64,
    pages: u64,
    asked: VecDeque<FirstTouch>,
    admitted: u64,
    came: u64,
}

/// More touches than there are.
const OPEN: u64 = 1 << 40;

impl Valve {
    /// Makes one that admits `pages` pages for each touch of `mapping`, as long as it is open.
    fn new(mapping: &Mapping, pages: u64) -> Arc<Valve> {
        let state = State { open: OPEN, pages, ..State::default() };
        Arc::new(Valve { range: mapping.range(), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    fn open(&self, process: &Process, touches: u64) {
        self.state().open += touches;
        process.resume_growth();
    }

    /// Tells whether it was asked about a page of `range`.
    fn was_asked(&self, range: PageRange) -> bool {
        self.state().asked.iter().any(|touch| range.contains(touch.page))
    }
}

impl Growth for Valve {
    fn admit(&self, touch: &FirstTouch) -> Option<PageRange> {
        if !self.range.contains(touch.page) {
            return Some(touch.page.into());
        }
        let mut state = self.state();
        if state.asked.len() < 1000 {
            state.asked.push_back(*touch);
        }
        state.open = state.open.checked_sub(1)?;
        let range = PageRange::from_pages(touch.page, state.pages).expect("it fits");
        state.admitted += range.pages();
        Some(range)
    }

    fn came(&self, admitted: u64, came: u64) {
        // What is elsewhere comes one by one, and is not counted.
        if admitted > 1 || self.state().pages == 1 {
            let mut state = self.state();
            state.admitted -= (admitted - came).min(state.admitted);
            state.came += came;
        }
    }
}

fn hold(process: &Process, valve: &Arc<Valve>) {
    let growth: Arc<dyn Growth> = valve.clone();
    assert_eq!(process.hold_growth(&growth), 0, "all could be registered");
}

/// Returns how many pages of `range` are there.
fn there(process: &Process, range: PageRange) -> u64 {
    let mut found = Vec::new();
    process.resident(range, &mut found);
    found.iter().map(|part| part.pages()).sum()
}

#[test]
fn a_first_touch_waits_until_it_is_admitted() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(64);
        mapping.poke(1, 7);
        let valve = Valve::new(&mapping, 1);
        hold(&process, &valve);
        valve.state().open = 0;
        thread::scope(|scope| {
            let toucher = scope.spawn(|| mapping.poke(5, 9));
            assert!(eventually(|| valve.was_asked(mapping.page(5).into())));
            // What is there is touched as ever, and nobody is asked.
            mapping.poke(1, 8);
            assert!(!is_home(&process, mapping.page(5)) && !toucher.is_finished());
            assert!(
                eventually(|| valve.state().asked.iter().any(|touch| {
                    touch.page == mapping.page(5) && touch.waited > Duration::ZERO
                })),
                "it is asked again without being told"
            );
            valve.open(&process, 1);
            toucher.join().expect("it has what it wanted");
            valve.open(&process, OPEN);
        });
        assert_eq!((mapping.peek(5), mapping.peek(1)), (9, 8));
        assert!(!valve.was_asked(mapping.page(1).into()));
        let write = valve.state().asked.iter().any(|touch| touch.write);
        assert!(write, "a store is known as one");
    });
}

#[test]
fn as_many_pages_come_as_are_admitted() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let mapping = Mapping::anonymous(64);
        mapping.poke(12, 77);
        process.migrate(mapping.page(12).into(), &gpu.pagemap).run();
        let valve = Valve::new(&mapping, 8);
        hold(&process, &valve);
        mapping.poke(0, 1);
        assert_eq!(there(&process, mapping.part(0, 8)), 8);
        assert_eq!(there(&process, mapping.part(8, 4)), 0);
        // Up to what is away, which comes home as what it is.
        mapping.poke(9, 2);
        assert_eq!(there(&process, mapping.part(9, 8)), 3);
        assert_eq!(mapping.peek(12), 77);
        // Up to what is there.
        mapping.poke(31, 3);
        mapping.poke(27, 4);
        assert_eq!(there(&process, mapping.part(27, 4)), 4);
        let untouched = [1, 7, 10, 28].map(|index| mapping.peek(index));
        assert_eq!((untouched, mapping.peek(31)), ([0; 4], 3));
        // A server says so after it has filled the pages, and the program may be ahead of it.
        let settled = || {
            let state = valve.state();
            state.admitted == state.came
        };
        assert!(common::eventually(settled), "what did not come was given back");
    });
}

/// The kernel fills one mapping at a time, and says of two what it says of none.
#[test]
fn pages_of_two_mappings_do_not_come_together_and_do_come() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(64);
        let valve = Valve::new(&mapping, 16);
        hold(&process, &valve);
        // Mappings of their own, all of which are registered.
        protect(mapping.part(8, 4), ProtFlags::READ).expect("it is ours");
        mapping.poke(0, 1);
        mapping.poke(7, 2);
        assert_eq!(mapping.peek(9), 0);
        mapping.poke(12, 3);
        assert_eq!([0, 7, 12].map(|index| mapping.peek(index)), [1, 2, 3]);
    });
}

#[test]
fn what_is_mapped_later_is_held_from_the_next_call_on() {
    in_own_process(|| {
        let process = attach();
        let at = common::memory::place(16);
        let mapping = Mapping::at(at, Backing::Anonymous, RW);
        let valve = Valve::new(&mapping, 1);
        drop(mapping);
        hold(&process, &valve);
        let mapping = Mapping::at(at, Backing::Anonymous, RW);
        mapping.poke(0, 1);
        assert!(!valve.was_asked(mapping.range()));
        hold(&process, &valve);
        mapping.poke(1, 1);
        assert!(valve.was_asked(mapping.page(1).into()));
        // What the program discards is touched for the first time once more.
        advise(mapping.page(0).into(), libc::MADV_DONTNEED).expect("it is ours");
        assert_eq!(mapping.peek(0), 0);
        assert!(valve.was_asked(mapping.page(0).into()));
        // And what serving faults may need is not held.
        process.reserve(mapping.part(8, 8));
        hold(&process, &valve);
        mapping.poke(8, 1);
        assert!(!valve.was_asked(mapping.part(8, 8)));
    });
}

#[test]
fn the_end_of_the_hold_gives_everything_back() {
    in_own_process(|| {
        let process = attach();
        let handler = Handler::new();
        let mapping = Mapping::anonymous(2048);
        mapping.poke(600, 1);
        let valve = Valve::new(&mapping, 4);
        hold(&process, &valve);
        assert!(handler.register(mapping.range()).is_err(), "it is registered with us");
        valve.state().open = 0;
        thread::scope(|scope| {
            let toucher = scope.spawn(|| mapping.poke(5, 9));
            assert!(eventually(|| valve.was_asked(mapping.page(5).into())));
            process.end_hold();
            toucher.join().expect("it waits for nobody any more");
        });
        valve.state().open = OPEN;
        assert!(eventually(|| mapped_in(mapping.range()).len() == 1));
        assert!(eventually(|| handler.register(mapping.range()).is_ok()));
        assert_eq!((mapping.peek(5), mapping.peek(600)), (9, 1));
    });
}

/// While something is away nothing is given up; when it is home, all is.
#[test]
fn what_is_away_delays_the_end_of_the_hold_and_no_touch() {
    in_own_process(|| {
        let process = attach();
        let gpu = Gpu::new(64);
        let handler = Handler::new();
        let (mapping, other) = (Mapping::anonymous(16), Mapping::anonymous(16));
        mapping.poke(0, 77);
        let valve = Valve::new(&mapping, 1);
        hold(&process, &valve);
        process.migrate(mapping.page(0).into(), &gpu.pagemap).run();
        process.end_hold();
        other.poke(3, 5);
        assert!(handler.register(other.range()).is_err(), "it is registered with us");
        assert_eq!(mapping.peek(0), 77);
        assert!(eventually(|| handler.register(other.range()).is_ok()));
        assert_eq!(other.peek(3), 5);
    });
}

#[test]
fn a_fork_waits_for_nobody_who_waits_for_room() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(16);
        mapping.poke(0, 1);
        let valve = Valve::new(&mapping, 1);
        for (round, how) in WAYS.into_iter().enumerate() {
            hold(&process, &valve);
            valve.state().open = 0;
            let index = 5 + round as u64;
            thread::scope(|scope| {
                let toucher = scope.spawn(|| mapping.poke(index, 9));
                assert!(eventually(|| valve.was_asked(mapping.page(index).into())));
                let pid = child(how, || (mapping.peek(0), mapping.peek(12)) == (1, 0));
                assert_eq!(end_of(pid), End::Well, "{how:?}");
                // A fork that nobody announces ends no hold.
                valve.open(&process, OPEN);
                toucher.join().expect("it waits for nobody any more");
            });
        }
        // And after it growth is held again.
        hold(&process, &valve);
        mapping.poke(11, 1);
        assert!(valve.was_asked(mapping.page(11).into()));
    });
}

#[test]
fn who_waits_for_memory_that_is_replaced_has_what_comes_in_its_place() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(16);
        let valve = Valve::new(&mapping, 1);
        hold(&process, &valve);
        valve.state().open = 0;
        thread::scope(|scope| {
            let toucher = scope.spawn(|| mapping.poke(5, 9));
            assert!(eventually(|| valve.was_asked(mapping.page(5).into())));
            // The new mapping is not held.
            map(mapping.range(), Backing::Anonymous, RW).expect("it is ours");
            toucher.join().expect("it waits for nobody any more");
        });
        assert_eq!(mapping.peek(5), 9);
    });
}
