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
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;

use model::device::Defect;
use model::session::{Scene, Session};
use uhmm::Access;
use uhmm::operations::{DeviceName, Memory, Operation, OperationFile, Pages, SpaceName, Word};

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

fn scene(defect: Defect, in_place: &'static [DeviceName]) -> Scene<'static> {
    const ALL: [(DeviceName, u64); 2] = [(DeviceName(0), 2), (DeviceName(1), 2)];
    // The pages are every second one, so that they are all alike: each a mapping for itself.
    let arena = 2 * u64::from(PAGES);
    Scene { arena, devices: &ALL, in_place, defect, apart: false, places: true }
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
            let value = 0x1000 * (u64::from(page) + 1);
            operations.push(Operation::Write { space, word: Word::of(pages.first), value });
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

/// The steps that can fail, by name.
const STEPS: [&str; 5] = ["frame", "allocate", "copy", "clear", "adopt"];

/// Which operations of a sequence are looked at after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looking {
    /// The last: the others are the last ones of shorter sequences.
    AtTheLast,
    Always,
}

/// How sequences are run, each in a new world.
#[derive(Clone, Copy, Debug)]
struct Run {
    from: Start,
    /// The devices whose memory is the machine's.
    in_place: &'static [DeviceName],
    defect: Defect,
    looking: Looking,
    /// After how many steps that can fail one fails.
    fail_after: Option<u64>,
}

/// What a run was.
struct Ran {
    /// How many of each of the [`STEPS`] the moves took.
    steps: [u64; STEPS.len()],
    /// What things are like after the moves, if that was asked for.
    fingerprint: Vec<u8>,
}

impl Run {
    fn new(from: Start) -> Run {
        let (in_place, defect) = (&[], Defect::None);
        Run { from, in_place, defect, looking: Looking::AtTheLast, fail_after: None }
    }

    /// Runs a sequence to its end. What goes wrong is told as an operation file that shows it.
    fn run(self, moves: &[Move]) -> Result<Ran, String> {
        self.run_asking(moves, |_| Vec::new())
    }

    fn run_asking(
        self,
        moves: &[Move],
        fingerprint: impl Fn(&Session) -> Vec<u8>,
    ) -> Result<Ran, String> {
        let mut session = Session::new(scene(self.defect, self.in_place));
        let run = || self.run_in(&mut session, moves, fingerprint);
        let ran = catch_unwind(AssertUnwindSafe(run));
        let ran = ran.unwrap_or_else(|panic| Err(format!("panic: {}", message(&*panic))));
        ran.map_err(|what| match self.fail_after {
            Some(after) => session.report(&format!("{what}\nafter {after} steps one failed")),
            None => session.report(&what),
        })
    }

    fn run_in(
        self,
        session: &mut Session,
        moves: &[Move],
        fingerprint: impl Fn(&Session) -> Vec<u8>,
    ) -> Result<Ran, String> {
        start(self.from).into_iter().for_each(|operation| session.trust(operation));
        let before = STEPS.map(|step| session.steps_of(step));
        if let Some(after) = self.fail_after {
            session.fail_after(after);
        }
        if self.looking == Looking::Always {
            session.look();
        }
        for (index, &made) in moves.iter().enumerate() {
            let operation = operation(session, index, made);
            let last = index + 1 == moves.len();
            if last && self.looking == Looking::AtTheLast {
                session.look();
            }
            if last || self.looking == Looking::Always {
                session.step(operation)?;
            } else {
                session.trust(operation);
            }
        }
        let mut steps = STEPS.map(|step| session.steps_of(step));
        steps.iter_mut().zip(before).for_each(|(steps, before)| *steps -= before);
        if session.is_failing() {
            return Err("the step that was to fail was not taken".into());
        }
        let fingerprint = fingerprint(session);
        session.finish(moves.len() + steps.iter().sum::<u64>() as usize)?;
        Ok(Ran { steps, fingerprint })
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Does `work` on all items, on all processors, and returns the results in the order of the items.
/// Stops at an error.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, String> + Sync,
) -> Result<Vec<R>, String> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, results) = mpsc::channel();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            let (next, stop, work) = (&next, &stop, &work);
            scope.spawn(move || {
                // Relaxed, both: each thread takes other items, and joining them orders the rest.
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    let result = work(item);
                    stop.fetch_or(result.is_err(), Ordering::Relaxed);
                    sender.send((index, result)).expect("the receiver outlives the threads");
                }
            });
        }
    });
    drop(sender);
    let mut results: Vec<_> = results.into_iter().collect();
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Does `work` on all sequences of up to `length` moves, and returns how many of each length there
/// were.
fn all(
    length: usize,
    work: impl Fn(&[Move]) -> Result<(), String> + Sync,
) -> Result<Vec<usize>, String> {
    let mut counts = Vec::new();
    for length in 1..=length {
        let prefixes = Sequence::empty().extended(length - 1);
        let count = in_parallel(&prefixes, |prefix| {
            let next = prefix.next();
            next.iter().try_for_each(|&made| work(&prefix.with(made).moves))?;
            Ok(next.len())
        })?;
        counts.push(count.into_iter().sum());
    }
    Ok(counts)
}

fn run_all(run: Run, length: usize) -> Result<Vec<usize>, String> {
    all(length, |moves| run.run(moves).map(drop))
}

fn all_classes(length: usize) -> Vec<usize> {
    (1..=length).map(classes).collect()
}

#[test]
fn all_sequences_of_up_to_four_operations() {
    let counts = run_all(Run::new(Start::Written), 4).unwrap_or_else(|what| panic!("\n{what}"));
    assert_eq!(counts, all_classes(4));
}

#[test]
fn all_sequences_of_up_to_three_operations_on_untouched_memory() {
    let counts = run_all(Run::new(Start::Untouched), 3).unwrap_or_else(|what| panic!("\n{what}"));
    assert_eq!(counts, all_classes(3));
}

/// Every step that can fail fails once, in every sequence of up to three operations.
#[test]
fn all_sequences_with_each_step_failing() {
    let run = Run { looking: Looking::Always, ..Run::new(Start::Written) };
    // Of some 9000 sequences, each step is in a good part.
    let seldom = run_all_failing(run).into_iter().filter(|&(_, failed)| failed <= 100);
    assert_eq!(seldom.collect::<Vec<_>>(), [("adopt", 0)]);
}

/// The same with devices whose memory is the machine's, where nothing is copied.
#[test]
fn all_sequences_with_each_step_failing_in_place() {
    let in_place = &[DeviceName(0), DeviceName(1)];
    let run = Run { looking: Looking::Always, in_place, ..Run::new(Start::Written) };
    let failed = run_all_failing(run);
    println!("failures of each step: {failed:?}");
    assert!(failed.iter().all(|&(step, failed)| failed > 100 || step == "copy"), "{failed:?}");
}

/// One device has its memory in the machine's, and the other has its own.
#[test]
fn all_sequences_of_up_to_three_operations_with_one_device_in_place() {
    for in_place in [&[DeviceName(0)], &[DeviceName(1)]] {
        for from in [Start::Written, Start::Untouched] {
            let run = Run { in_place, ..Run::new(from) };
            let counts = run_all(run, 3).unwrap_or_else(|what| panic!("\n{what}"));
            assert_eq!(counts, all_classes(3));
        }
    }
}

/// Runs all sequences of up to three operations, with each step failing once, and returns how often
/// each failed.
fn run_all_failing(run: Run) -> Vec<(&'static str, u64)> {
    let failed: [AtomicU64; STEPS.len()] = Default::default();
    let counts = all(3, |moves| {
        let steps = run.run(moves)?.steps;
        for (failed, steps) in failed.iter().zip(steps) {
            // Relaxed: read when the threads have been joined.
            failed.fetch_add(steps, Ordering::Relaxed);
        }
        (0..steps.iter().sum())
            .try_for_each(|after| Run { fail_after: Some(after), ..run }.run(moves).map(drop))
    });
    assert_eq!(counts.unwrap_or_else(|what| panic!("\n{what}")), all_classes(3));
    STEPS.into_iter().zip(failed.map(AtomicU64::into_inner)).collect()
}

/// How many runs the longer sequences get, where the environment (`UHMM_EXHAUSTIVE_RUNS`) does not
/// say. Some 400000 go into every sequence of five.
const RUNS: usize = 400_000;

/// Sequences of five and six operations. Where two lead to the same state, as far as that can be
/// seen, one of them goes on. Where there are more states than there are runs left, those that go on
/// are evenly spread.
#[test]
fn longer_sequences_from_every_state() {
    let runs = std::env::var("UHMM_EXHAUSTIVE_RUNS").ok();
    let mut left = runs.map_or(RUNS, |runs| runs.parse().expect("a number of runs"));
    let (pages, devices) = (permutations(&[0, 2, 4]), permutations(&[0, 1]));
    let run = Run::new(Start::Written);
    let mut known = BTreeSet::new();
    let mut states = vec![Sequence::empty()];
    let mut levels = Vec::new();
    for length in 1..=6 {
        let moves = states.iter().map(|state| state.next().len()).sum::<usize>();
        // The last two lengths share what is left.
        let share = if length == 5 { left / 2 } else { left };
        let stride = moves.div_ceil(share.max(1)).max(1);
        let from: Vec<_> = states.iter().step_by(stride).collect();
        let reached = in_parallel(&from, |state| {
            let after = |made| {
                let longer = state.with(made);
                let ran =
                    run.run_asking(&longer.moves, |session| session.fingerprint(&pages, &devices));
                ran.map(|ran| (ran.fingerprint, longer))
            };
            state.next().into_iter().map(after).collect::<Result<Vec<_>, _>>()
        });
        let reached = reached.unwrap_or_else(|what| panic!("\n{what}"));
        let ran = reached.iter().map(Vec::len).sum::<usize>();
        let fresh = reached.into_iter().flatten();
        let fresh = fresh.filter(|(fingerprint, _)| known.insert(fingerprint.clone()));
        states = fresh.map(|(_, sequence)| sequence).collect();
        left = left.saturating_sub(ran);
        levels.push((ran, stride, states.len()));
    }
    println!("runs, one state in how many, new states, by length: {levels:?}");
    // Up to four no state is left out, and the last two lengths have been gone into.
    assert!(levels[..4].iter().all(|&(_, stride, _)| stride == 1), "{levels:?}");
    assert!(levels[4..].iter().all(|&(ran, _, fresh)| ran > 1000 && fresh > 1000), "{levels:?}");
    // Different states are told apart, and equal ones are not.
    assert_eq!(levels[0].0, classes(1));
    assert!(levels[3].2 * 20 < classes(4) && levels[3].2 > 1000, "{levels:?}");
}

/// Returns all orders of some things.
fn permutations<T: Copy + PartialEq>(of: &[T]) -> Vec<Vec<T>> {
    if of.is_empty() {
        return vec![Vec::new()];
    }
    let first = |&first: &T| {
        let rest: Vec<T> = of.iter().copied().filter(|&other| other != first).collect();
        let with_first = move |mut rest: Vec<T>| {
            rest.insert(0, first);
            rest
        };
        permutations(&rest).into_iter().map(with_first).collect::<Vec<_>>()
    };
    of.iter().flat_map(first).collect()
}

/// The oracle bites: whatever is wrong with a device, some short sequence shows it.
#[test]
fn every_defect_of_a_device_is_found() {
    const DEFECTS: [Defect; 5] = [
        Defect::LosesCopiesIn,
        Defect::LosesCopiesOut,
        Defect::LosesClears,
        Defect::KeepsTranslations,
        Defect::GivesOutTwice,
    ];
    for defect in DEFECTS {
        let run = Run { defect, ..Run::new(Start::Written) };
        let report = run_all(run, 3).expect_err(&format!("{defect:?} is not found"));
        let file = OperationFile::parse("report", &report);
        file.unwrap_or_else(|error| panic!("{defect:?}: {error} in\n{report}"));
    }
}
