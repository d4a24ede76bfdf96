//! Every short sequence of operations, beside the sequential model (invariant 5, *Whole*).
//!
//! Three pages, two devices with room for two pages each, and two address spaces, of which the second
//! is forked from the first or made anew. The pages lie apart, and the devices are alike, so
//! sequences that differ only in the names of pages and devices are one: of each such class the
//! sequence is run in which pages and devices appear in order of their names. How many there are is
//! counted a second time, by Burnside's lemma, which knows nothing of how they are made.
#![cfg(not(any(loom, shuttle)))]

mod model;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use model::device::Defect;
use model::session::{Scene, Session};
use uhmm::Access;
use uhmm::operations::{DeviceName, Memory, Operation, Pages, SpaceName, Word};

const PAGES: u8 = 3;
const DEVICES: u8 = 2;
const SPACES: [SpaceName; 2] = [SpaceName::A, SpaceName::B];

/// What can happen to a page of a space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnPage {
    Map,
    Unmap,
    /// Takes the right to store away, or gives it back.
    Protect,
    Discard,
    Write,
    Home,
}

/// What a device can do with a page of a space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByDevice {
    Write,
    Migrate,
    Exclusive,
}

const ON_PAGE: [OnPage; 6] =
    [OnPage::Map, OnPage::Unmap, OnPage::Protect, OnPage::Discard, OnPage::Write, OnPage::Home];
const BY_DEVICE: [ByDevice; 3] = [ByDevice::Write, ByDevice::Migrate, ByDevice::Exclusive];

/// One step of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    Page(OnPage, SpaceName, u8),
    Device(ByDevice, SpaceName, u8, u8),
    Evict(u8),
    Fork,
    Spawn,
    Exit(SpaceName),
}

/// Which spaces there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alive([bool; 2]);

impl Alive {
    /// Only the first.
    const FIRST: Alive = Alive([true, false]);

    fn spaces(self) -> impl Iterator<Item = SpaceName> {
        SPACES.into_iter().zip(self.0).filter_map(|(space, alive)| alive.then_some(space))
    }

    fn after(self, made: Move) -> Alive {
        let Alive([a, b]) = self;
        match made {
            Move::Fork | Move::Spawn => Alive([a, true]),
            Move::Exit(SpaceName::A) => Alive([false, b]),
            Move::Exit(_) => Alive([a, false]),
            _ => self,
        }
    }
}

/// A sequence, and what may come next.
#[derive(Clone, Debug)]
struct Sequence {
    moves: Vec<Move>,
    alive: Alive,
    /// How many pages and devices have appeared.
    pages: u8,
    devices: u8,
}

impl Sequence {
    fn empty() -> Sequence {
        Sequence { moves: Vec::new(), alive: Alive::FIRST, pages: 0, devices: 0 }
    }

    /// Returns every move that may come next: of the pages and devices that have not appeared yet,
    /// with the first alone.
    fn next(&self) -> Vec<Move> {
        let pages = 0..PAGES.min(self.pages + 1);
        let devices = 0..DEVICES.min(self.devices + 1);
        let mut moves = Vec::new();
        for space in self.alive.spaces() {
            for page in pages.clone() {
                moves.extend(ON_PAGE.map(|kind| Move::Page(kind, space, page)));
                for device in devices.clone() {
                    moves.extend(BY_DEVICE.map(|kind| Move::Device(kind, space, page, device)));
                }
            }
            moves.push(Move::Exit(space));
        }
        moves.extend(devices.map(Move::Evict));
        if !self.alive.0[1] {
            moves.push(Move::Spawn);
            if self.alive.0[0] {
                moves.push(Move::Fork);
            }
        }
        moves
    }

    fn with(&self, made: Move) -> Sequence {
        let mut longer = self.clone();
        longer.moves.push(made);
        longer.alive = self.alive.after(made);
        let (page, device) = match made {
            Move::Page(_, _, page) => (Some(page), None),
            Move::Device(_, _, page, device) => (Some(page), Some(device)),
            Move::Evict(device) => (None, Some(device)),
            Move::Fork | Move::Spawn | Move::Exit(_) => (None, None),
        };
        longer.pages = longer.pages.max(page.map_or(0, |page| page + 1));
        longer.devices = longer.devices.max(device.map_or(0, |device| device + 1));
        longer
    }

    /// Returns every sequence of `length` more moves.
    fn extended(&self, length: usize) -> Vec<Sequence> {
        let mut sequences = vec![self.clone()];
        for _ in 0..length {
            sequences = sequences
                .iter()
                .flat_map(|sequence| sequence.next().into_iter().map(|made| sequence.with(made)))
                .collect();
        }
        sequences
    }
}

/// Counts the sequences of `length` moves whose pages and devices are named in order of appearance:
/// the classes of all sequences under renaming. By Burnside's lemma there are as many as a renaming
/// leaves sequences alone, on average.
fn classes(length: usize) -> usize {
    // How many renamings of three pages leave how many pages alone, and of two devices.
    let renamings_of_pages = [(1, 3), (3, 1), (2, 0)];
    let renamings_of_devices = [(1, 2), (1, 0)];
    let mut left_alone = 0;
    let mut renamings = 0;
    for (count, pages) in renamings_of_pages {
        for (other, devices) in renamings_of_devices {
            left_alone += count * other * fixed(length, pages, devices, Alive::FIRST);
            renamings += count * other;
        }
    }
    assert_eq!(left_alone % renamings, 0, "an average of orbits is whole");
    left_alone / renamings
}

/// Counts the sequences that name these many pages and devices alone.
fn fixed(length: usize, pages: usize, devices: usize, alive: Alive) -> usize {
    if length == 0 {
        return 1;
    }
    let Alive([a, b]) = alive;
    let spaces = usize::from(a) + usize::from(b);
    let staying = spaces * pages * (ON_PAGE.len() + devices * BY_DEVICE.len()) + devices;
    let mut count = staying * fixed(length - 1, pages, devices, alive);
    let mut leading_to = |alive| count += fixed(length - 1, pages, devices, alive);
    if a {
        leading_to(Alive([false, b]));
    }
    if b {
        leading_to(Alive([a, false]));
    } else {
        leading_to(Alive([a, true]));
        if a {
            leading_to(Alive([a, true]));
        }
    }
    count
}

/// How things are before the first move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// The first space's pages are mapped, and were never touched.
    Untouched,
    /// They have contents.
    Written,
}

fn scene(defect: Defect) -> Scene<'static> {
    const ALL: [(DeviceName, u64); 2] = [(DeviceName(0), 2), (DeviceName(1), 2)];
    // The pages are every second one, so that they are all alike: each a mapping for itself.
    Scene { arena: 2 * u64::from(PAGES), devices: &ALL, defect }
}

fn place(page: u8) -> Pages {
    Pages::new(2 * u64::from(page), 1)
}

fn start(start: Start) -> Vec<Operation> {
    let space = SpaceName::A;
    let (memory, access) = (Memory::Anonymous, Access::Write);
    let mut operations = vec![Operation::Spawn { space }];
    for page in 0..PAGES {
        let pages = place(page);
        operations.push(Operation::Map { space, pages, memory, access });
        if start == Start::Written {
            for offset in model::OFFSETS {
                let value = 0x1000 * (u64::from(page) + 1) + u64::from(offset);
                let word = Word { page: pages.first, offset };
                operations.push(Operation::Write { space, word, value });
            }
        }
    }
    operations
}

/// Makes the `index`th operation of a sequence of a move. Each stores a value of its own.
fn operation(session: &Session, index: usize, made: Move) -> Operation {
    let value = 0x10 + index as u64;
    let (memory, access) = (Memory::Anonymous, Access::Write);
    match made {
        Move::Page(kind, space, page) => {
            let pages = place(page);
            match kind {
                OnPage::Map => Operation::Map { space, pages, memory, access },
                OnPage::Unmap => Operation::Unmap { space, pages },
                OnPage::Protect => {
                    let access = match session.access(space, pages.first) {
                        Access::Write => Access::Read,
                        _ => Access::Write,
                    };
                    Operation::Protect { space, pages, access }
                }
                OnPage::Discard => Operation::Discard { space, pages },
                OnPage::Write => Operation::Write { space, word: Word::of(pages.first), value },
                OnPage::Home => Operation::Home { space, pages },
            }
        }
        Move::Device(kind, space, page, device) => {
            let (pages, device) = (place(page), DeviceName(device));
            match kind {
                ByDevice::Write => {
                    // The last word of the page, where a CPU stores to the first.
                    let word = Word { page: pages.first, offset: model::OFFSETS[1] };
                    Operation::DeviceWrite { device, space, word, value }
                }
                ByDevice::Migrate => Operation::Migrate { device, space, pages },
                ByDevice::Exclusive => Operation::Exclusive { device, space, pages },
            }
        }
        Move::Evict(device) => Operation::Evict { device: DeviceName(device), count: 1 },
        Move::Fork => Operation::Fork { space: SpaceName::A, child: SpaceName::B },
        Move::Spawn => Operation::Spawn { space: SpaceName::B },
        Move::Exit(space) => Operation::Exit { space },
    }
}

/// Which operations of a sequence are looked at after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looking {
    /// The last: the others are the last ones of shorter sequences.
    AtTheLast,
    Always,
}

/// A run of a sequence in a new world.
struct Run {
    from: Start,
    defect: Defect,
    looking: Looking,
    /// After how many steps that can fail one fails.
    fail_after: Option<u64>,
}

impl Run {
    fn new(from: Start) -> Run {
        Run { from, defect: Defect::None, looking: Looking::AtTheLast, fail_after: None }
    }

    /// Runs a sequence to its end, and returns how many steps that can fail its moves took.
    fn run(&self, moves: &[Move]) -> Result<u64, String> {
        let mut done = start(self.from);
        let steps = catch_unwind(AssertUnwindSafe(|| self.run_noting(moves, &mut done)));
        let steps = steps.unwrap_or_else(|panic| Err(format!("panic: {}", message(&*panic))));
        steps.map_err(|what| {
            let file = Session::file(scene(self.defect), &done);
            format!("{what}\nafter {} steps failing: {:?}\n{file}", moves.len(), self.fail_after)
        })
    }

    fn run_noting(&self, moves: &[Move], done: &mut Vec<Operation>) -> Result<u64, String> {
        let mut session = Session::new(scene(self.defect));
        done.iter().for_each(|&operation| session.trust(operation));
        let before = session.steps();
        if let Some(after) = self.fail_after {
            session.fail_after(after);
        }
        for (index, &made) in moves.iter().enumerate() {
            let operation = operation(&session, index, made);
            done.push(operation);
            let last = index + 1 == moves.len();
            if self.looking == Looking::Always || last {
                if index == 0 || self.looking == Looking::AtTheLast {
                    session.look();
                }
                session.step(operation)?;
            } else {
                session.trust(operation);
            }
        }
        let steps = session.steps() - before;
        if session.is_failing() {
            return Err("the step that was to fail was not taken".into());
        }
        session.finish(moves.len() + steps as usize)?;
        Ok(steps)
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Does `work` on all items, on all processors, and adds the results up. Stops at the first error.
fn in_parallel<T: Sync>(
    items: &[T],
    work: impl Fn(&T) -> Result<usize, String> + Sync,
) -> Result<usize, String> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, results) = mpsc::channel();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            let (next, stop, work) = (&next, &stop, &work);
            scope.spawn(move || {
                // Relaxed: each thread takes other items, and joining them orders the rest.
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed))
                    && !stop.load(Ordering::Relaxed)
                {
                    let result = work(item);
                    stop.fetch_or(result.is_err(), Ordering::Relaxed);
                    sender.send(result).expect("the receiver is there until the threads end");
                }
            });
        }
    });
    drop(sender);
    results.into_iter().sum()
}

/// Runs all sequences of up to `length` moves, and returns how many of each length there were.
fn run_all(run: &Run, length: usize) -> Result<Vec<usize>, String> {
    let mut counts = Vec::new();
    for length in 1..=length {
        let prefixes = Sequence::empty().extended(length - 1);
        let count = in_parallel(&prefixes, |prefix| {
            let next = prefix.next();
            for &made in &next {
                run.run(&prefix.with(made).moves)?;
            }
            Ok(next.len())
        })?;
        counts.push(count);
    }
    Ok(counts)
}

#[test]
fn all_sequences_of_up_to_four_operations() {
    let counts = run_all(&Run::new(Start::Written), 4).unwrap_or_else(|what| panic!("{what}"));
    assert_eq!(counts, (1..=4).map(classes).collect::<Vec<_>>());
}

#[test]
fn all_sequences_of_up_to_three_operations_on_untouched_memory() {
    let counts = run_all(&Run::new(Start::Untouched), 3).unwrap_or_else(|what| panic!("{what}"));
    assert_eq!(counts, (1..=3).map(classes).collect::<Vec<_>>());
}
