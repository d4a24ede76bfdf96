//! Long random sequences of operations on several spaces and devices, with failures, beside the
//! sequential model (invariant 5, *Whole*). What fails is printed as an operation file, shrunk.
#![cfg(not(any(loom, shuttle)))]

mod model;

use std::panic::{AssertUnwindSafe, catch_unwind};

use model::device::Defect;
use model::session::{Scene, Session};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use uhmm::Access;
use uhmm::operations::{
    Advice, DeviceName, Injection, Memory, Operation, OperationFile, Pages, SpaceName, Word, run,
};

const SPACES: [SpaceName; 3] = [SpaceName::A, SpaceName::B, SpaceName::C];

/// Where sequences take place.
#[derive(Clone, Copy)]
struct Stage {
    scene: Scene<'static>,
    memory: Memory,
    /// What the numbers of a draw stand for.
    pages: [u64; 8],
    counts: [u64; 4],
}

/// A few pages, and devices that are soon full.
const SMALL: Stage = Stage {
    scene: Scene {
        arena: 8,
        devices: &[(DeviceName(0), 3), (DeviceName(1), 5)],
        in_place: &[],
        defect: Defect::None,
        apart: true,
        places: true,
    },
    memory: Memory::Anonymous,
    pages: [0, 1, 2, 3, 4, 5, 6, 7],
    counts: [1, 2, 3, 4],
};

/// Two large pages, and devices with room for one and a half and for a part of one. What happens
/// is at the edges and in the middle.
const LARGE: Stage = Stage {
    scene: Scene {
        arena: 1024,
        devices: &[(DeviceName(0), 800), (DeviceName(1), 300)],
        places: false,
        ..SMALL.scene
    },
    memory: Memory::Huge,
    pages: [0, 1, 255, 511, 512, 513, 900, 1023],
    counts: [1, 3, 256, 512],
};

/// What kind of operation comes next. Listed as often as it is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Map,
    MapOther,
    Unmap,
    Protect,
    Remap,
    Discard,
    Advise,
    Read,
    Write,
    Add,
    DeviceRead,
    DeviceWrite,
    DeviceAdd,
    DeviceFault,
    Migrate,
    Home,
    Evict,
    Exclusive,
    Release,
    Mirror,
    Fork,
    Spawn,
    Exit,
    Fail,
}

const KINDS: [(u32, Kind); 24] = [
    (5, Kind::Map),
    (2, Kind::MapOther),
    (2, Kind::Unmap),
    (3, Kind::Protect),
    (3, Kind::Remap),
    (2, Kind::Discard),
    (2, Kind::Advise),
    (3, Kind::Read),
    (6, Kind::Write),
    (2, Kind::Add),
    (4, Kind::DeviceRead),
    (6, Kind::DeviceWrite),
    (3, Kind::DeviceAdd),
    (5, Kind::DeviceFault),
    (8, Kind::Migrate),
    (2, Kind::Home),
    (2, Kind::Evict),
    (4, Kind::Exclusive),
    (1, Kind::Release),
    (1, Kind::Mirror),
    (3, Kind::Fork),
    (1, Kind::Spawn),
    (1, Kind::Exit),
    (4, Kind::Fail),
];

/// Numbers that an operation is made of, whatever there is by then.
#[derive(Clone, Copy, Debug)]
struct Draw {
    kind: Kind,
    space: usize,
    page: usize,
    count: usize,
    device: usize,
    other: usize,
}

fn draw() -> impl Strategy<Value = Draw> {
    let kinds = KINDS.map(|(weight, kind)| (weight, Just(kind).boxed())).to_vec();
    let kind = prop::strategy::Union::new_weighted(kinds);
    (kind, 0..6_usize, 0..8_usize, 0..4_usize, 0..2_usize, 0..12_usize).prop_map(
        |(kind, space, page, count, device, other)| Draw {
            kind,
            space,
            page,
            count,
            device,
            other,
        },
    )
}

/// What happens in one test. Shown by number alone: what it comes to is told as operations.
#[derive(Clone)]
struct Draws(Vec<Draw>);

impl std::fmt::Debug for Draws {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} draws", self.0.len())
    }
}

fn draws(length: std::ops::Range<usize>) -> impl Strategy<Value = Draws> {
    prop::collection::vec(draw(), length).prop_map(Draws)
}

impl Stage {
    /// Gives the devices that the bits of `which` say memory in that of the machine.
    fn in_place(self, which: usize) -> Stage {
        const WHICH: [&[DeviceName]; 4] =
            [&[], &[DeviceName(0)], &[DeviceName(1)], &[DeviceName(0), DeviceName(1)]];
        Stage { scene: Scene { in_place: WHICH[which], ..self.scene }, ..self }
    }

    fn with(self, defect: Defect) -> Stage {
        Stage { scene: Scene { defect, apart: false, ..self.scene }, ..self }
    }

    fn pages(&self, draw: Draw) -> Pages {
        let first = self.pages[draw.page];
        Pages::new(first, self.counts[draw.count].min(self.scene.arena - first))
    }

    fn word(&self, draw: Draw) -> Word {
        Word { page: self.pages[draw.page], offset: model::OFFSETS[draw.other % 2] }
    }

    fn device(&self, draw: Draw) -> DeviceName {
        self.scene.devices[draw.device].0
    }
}

/// Makes an operation of a draw, as things are now; nothing where it would make no sense.
fn operation(stage: &Stage, draw: Draw, index: usize, session: &Session) -> Option<Operation> {
    let alive: Vec<_> = session.model.spaces.keys().copied().collect();
    let fresh = SPACES.into_iter().find(|space| !alive.contains(space));
    if let (Kind::Spawn, Some(space)) = (draw.kind, fresh) {
        return Some(Operation::Spawn { space });
    }
    let Some(&space) = alive.get(draw.space % alive.len().max(1)) else {
        return fresh.map(|space| Operation::Spawn { space });
    };
    Some(match draw.kind {
        Kind::Fork => Operation::Fork { space, child: fresh? },
        Kind::Spawn => return None,
        // Not too soon, or there is nothing to end.
        Kind::Exit if index < 10 => return None,
        Kind::Exit => Operation::Exit { space },
        kind if is_by_device(kind) => by_device(stage, draw, index, space, session)?,
        _ => by_system(stage, draw, index, space, session)?,
    })
}

fn is_by_device(kind: Kind) -> bool {
    use Kind::*;
    matches!(
        kind,
        DeviceRead
            | DeviceWrite
            | DeviceAdd
            | DeviceFault
            | Migrate
            | Evict
            | Exclusive
            | Release
            | Mirror
            | Fail
    )
}

fn by_system(
    stage: &Stage,
    draw: Draw,
    index: usize,
    space: SpaceName,
    session: &Session,
) -> Option<Operation> {
    let (pages, word, value) = (stage.pages(draw), stage.word(draw), 0x100 + index as u64);
    let (memory, access) = (stage.memory, Access::Write);
    Some(match draw.kind {
        Kind::Map => Operation::Map { space, pages, memory, access },
        Kind::MapOther => {
            let memory = if draw.other.is_multiple_of(3) { memory } else { Memory::Shared };
            let access = if draw.other % 3 == 1 { access } else { Access::Read };
            Operation::Map { space, pages, memory, access }
        }
        Kind::Unmap => Operation::Unmap { space, pages },
        Kind::Protect => {
            let access = [Access::Read, Access::Write, Access::None, Access::Write];
            Operation::Protect { space, pages, access: access[draw.other % 4] }
        }
        Kind::Remap => {
            let to = stage.pages[draw.other % stage.pages.len()];
            let apart = to + pages.count <= pages.first || pages.first + pages.count <= to;
            let mapped =
                pages.iter().all(|page| session.model.slot(space, page) != model::Slot::Hole);
            if !apart || !mapped || to + pages.count > stage.scene.arena {
                return None;
            }
            Operation::Remap { space, pages, to }
        }
        Kind::Discard => Operation::Discard { space, pages },
        Kind::Advise => Operation::Advise { advice: Advice::ALL[draw.other % 6], space, pages },
        Kind::Read => Operation::Read { space, word },
        Kind::Write => Operation::Write { space, word, value },
        Kind::Add => Operation::Add { space, word, value },
        _ => Operation::Home { space, pages },
    })
}

fn by_device(
    stage: &Stage,
    draw: Draw,
    index: usize,
    space: SpaceName,
    session: &Session,
) -> Option<Operation> {
    let (pages, word, value) = (stage.pages(draw), stage.word(draw), 0x100 + index as u64);
    let device = stage.device(draw);
    Some(match draw.kind {
        Kind::DeviceRead => Operation::DeviceRead { device, space, word },
        Kind::DeviceWrite => Operation::DeviceWrite { device, space, word, value },
        Kind::DeviceAdd => Operation::DeviceAdd { device, space, word, value },
        Kind::DeviceFault => {
            let access = [Access::Read, Access::Write, Access::Atomic][draw.other % 3];
            Operation::DeviceFault { device, space, page: word.page, access }
        }
        Kind::Migrate => Operation::Migrate { device, space, pages },
        Kind::Evict => Operation::Evict { device, count: stage.counts[draw.count] },
        Kind::Exclusive => Operation::Exclusive { device, space, pages },
        Kind::Release => Operation::Release { device, space, pages },
        Kind::Mirror if session.model.is_attached(device, space) => {
            Operation::Detach { device, space }
        }
        Kind::Mirror => Operation::Attach { device, space },
        _ => {
            let injection = match draw.other % 4 {
                0 => Injection::Frame,
                1 => Injection::Allocate(device),
                2 => Injection::Copy(device),
                _ => Injection::Clear(device),
            };
            Operation::Fail { injection, after: draw.count as u64 }
        }
    })
}

/// Does what the draws say, and returns the session, and what is wrong.
fn play(Draws(draws): &Draws, stage: &Stage) -> (Session, Result<(), String>) {
    let mut session = Session::new(stage.scene);
    let played = catch_unwind(AssertUnwindSafe(|| {
        session.step(Operation::Spawn { space: SpaceName::A })?;
        // Three quarters of the arena, so that there are holes.
        let pages = Pages::new(0, stage.scene.arena / 4 * 3);
        let (memory, access) = (stage.memory, Access::Write);
        session.step(Operation::Map { space: SpaceName::A, pages, memory, access })?;
        for (index, &draw) in draws.iter().enumerate() {
            if let Some(operation) = operation(stage, draw, index, &session) {
                session.step(operation)?;
            }
        }
        session.finish(draws.len())
    }));
    let played = played.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(format!("panic: {}", text.unwrap_or_default()))
    });
    (session, played)
}

/// Asks for this many cases, unless the environment (`PROPTEST_CASES`) says how many.
fn config(cases: u32) -> Config {
    let default = Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    Config { cases, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn any_sequence_does_what_the_model_does(draws in draws(0..60), in_place in 0..4_usize) {
        let (session, played) = play(&draws, &SMALL.in_place(in_place));
        if let Err(what) = played {
            return Err(TestCaseError::fail(format!("as an operation file:\n{}", session.report(&what))));
        }
    }

    /// The answers are in the log, so what was played is an operation file that anybody can run.
    #[test]
    fn what_was_played_can_be_run_as_a_file(draws in draws(0..40)) {
        let (session, played) = play(&draws, &SMALL);
        if let Err(what) = played {
            return Err(TestCaseError::fail(session.report(&what)));
        }
        let file = OperationFile::parse("played", &session.report("played"));
        let file = file.map_err(|error| TestCaseError::fail(error.to_string()))?;
        let ran = run(&file, &mut model::world::World::new());
        ran.map_err(|error| TestCaseError::fail(format!("{error}\n{file}")))?;
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn any_sequence_on_large_pages_does_what_the_model_does(
        draws in draws(0..40),
        in_place in 0..4_usize,
    ) {
        let (session, played) = play(&draws, &LARGE.in_place(in_place));
        if let Err(what) = played {
            return Err(TestCaseError::fail(session.report(&what)));
        }
    }
}

/// The oracle bites, and what it reports is short enough to read.
#[test]
fn what_is_wrong_with_a_device_is_found_and_shrunk() {
    for defect in [Defect::LosesCopiesOut, Defect::StoresAnyway] {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(config(400), rng);
        let found = runner.run(&draws(0..60), |draws| {
            let (session, played) = play(&draws, &SMALL.with(defect));
            played.map_err(|what| TestCaseError::fail(session.report(&what)))
        });
        let Err(TestError::Fail(report, _)) = found else { panic!("{defect:?}: {found:?}") };
        let file = OperationFile::parse("report", report.message());
        let file = file.expect("the report is an operation file");
        // Two lines of beginning, up to nine of loads at the end.
        assert!(file.lines.len() <= 16, "{defect:?} is not shrunk:\n{report}");
    }
}
