//! A world and the model side by side, compared after every operation.

use uhmm::Access;
use uhmm::operations::{
    Answer, DeviceName, Executor, Injection, Obstacle, Operation, OperationFile, Outcome, Refusal,
    SpaceName, Word,
};

use super::device::Defect;
use super::places::Transition;
use super::world::{Fact, Seen, Sight, World};
use super::{Model, OFFSETS, Slot};

/// A world and what should be true in it.
pub(crate) struct Session {
    pub(crate) world: World,
    pub(crate) model: Model,
    sight: Sight,
    /// When a step is to fail, of whatever name: after so many more.
    failing: Option<u64>,
    /// Which steps are to fail, each when it has been taken so often.
    pending: Vec<(Injection, u64)>,
    places: bool,
    in_place: Vec<DeviceName>,
    /// What was done, with the answers: those that were given, and for the last the expected one.
    log: Vec<(Operation, Answer)>,
}

/// What a session is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scene<'a> {
    pub(crate) arena: u64,
    pub(crate) devices: &'a [(DeviceName, u64)],
    /// Those of them whose memory is the machine's.
    pub(crate) in_place: &'a [DeviceName],
    pub(crate) defect: Defect,
    /// Whether each device's steps fail on their own, or all steps are one sequence.
    pub(crate) apart: bool,
    /// Whether where pages are is compared: not with large pages, which move whole.
    pub(crate) places: bool,
}

impl Session {
    pub(crate) fn new(scene: Scene<'_>) -> Session {
        let mut world = if scene.apart { World::new() } else { World::with_defect(scene.defect) };
        world.set_arena(scene.arena);
        for &(name, pages) in scene.devices {
            world.add_device(name, pages, scene.in_place.contains(&name));
        }
        let model = Model::new(scene.arena, scene.devices);
        let (pending, log) = (Vec::new(), Vec::new());
        let (places, in_place) = (scene.places, scene.in_place.to_vec());
        let sight = Sight::new();
        Session { world, model, sight, failing: None, pending, places, in_place, log }
    }

    /// Makes the step fail that comes after `after` more.
    pub(crate) fn fail_after(&mut self, after: u64) {
        self.world.injector.fail_any(after);
        self.failing = Some(after);
    }

    /// Returns how many steps of this name were taken.
    pub(crate) fn steps_of(&self, name: &'static str) -> u64 {
        self.world.injector.asked(name)
    }

    /// Tells whether a failure is still to come.
    pub(crate) fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// Does an operation without looking at what it did: for one that is looked at elsewhere.
    pub(crate) fn trust(&mut self, operation: Operation) {
        let expected = self.model.perform(operation);
        self.log.push((operation, expected));
        let got = operation.perform(&mut self.world);
        assert_eq!(got, Ok(expected), "`{operation}` answers differently than before");
    }

    /// Takes note of where everything is, after operations that were trusted.
    pub(crate) fn look(&mut self) {
        self.sight = self.world.look();
    }

    /// Does an operation, and compares its answer and everything after it.
    pub(crate) fn step(&mut self, operation: Operation) -> Result<(), String> {
        let described = |what: String| format!("`{operation}`: {what}");
        let mut next = self.model.clone();
        let expected = next.perform(operation);
        self.log.push((operation, expected));
        let before = self.world.injector.asked_in_all();
        let got = operation.perform(&mut self.world);
        let failed = self.note_failures(self.world.injector.asked_in_all() - before);
        let got = compare(expected, got, failed).map_err(described)?;
        self.log.last_mut().expect("pushed just now").1 = got;
        let done = !matches!(got, Answer::Refused(_));
        let after = self.world.look();
        if !failed && self.places {
            let (model, before, after) = (&self.model, &self.sight, &after);
            Transition { operation, done, model, before, after }.check().map_err(described)?;
        }
        if done {
            self.model = next;
        }
        if let Operation::Fail { injection, after } = operation {
            self.pending.retain(|&(other, _)| other != injection);
            self.pending.push((injection, self.world.asked(injection) + after));
        }
        self.sight = after;
        self.check().map_err(described)
    }

    /// Notes which failures have come, after `steps` steps, and tells whether any has.
    fn note_failures(&mut self, steps: u64) -> bool {
        let before = self.pending.len();
        self.pending.retain(|&(injection, after)| self.world.asked(injection) <= after);
        self.pending.len() < before || self.note_failure(steps)
    }

    fn note_failure(&mut self, steps: u64) -> bool {
        match self.failing {
            Some(after) if after < steps => {
                self.failing = None;
                true
            }
            Some(after) => {
                self.failing = Some(after - steps);
                false
            }
            None => false,
        }
    }

    /// Compares everything with the model, and disturbs nothing.
    fn check(&mut self) -> Result<(), String> {
        if !self.sight.keys().eq(self.model.spaces.keys()) {
            return Err(format!("the spaces are {:?}", self.sight.keys()));
        }
        for (&space, seen) in &self.sight {
            for (page, &seen) in (0..).zip(seen) {
                self.check_page(space, page, seen)?;
            }
        }
        self.world.check_against(&self.sight)
    }

    fn check_page(&self, space: SpaceName, page: u64, seen: Seen) -> Result<(), String> {
        let slot = self.model.slot(space, page);
        if (seen == Seen::Hole) != (slot == Slot::Hole) {
            return Err(format!("page {page} of {space} is {seen:?}, and should be {slot:?}"));
        }
        for (offset, expected) in OFFSETS.into_iter().zip(self.model.words(slot)) {
            let got = self.world.peek(space, seen, offset);
            // Without memory it is zeroes, or in the swap: a load will tell.
            let unseen = self.model.swapped || slot.is_shared_memory();
            if got.unwrap_or(if unseen { expected } else { 0 }) != expected {
                return Err(format!(
                    "page {page} of {space}, {seen:?}, holds {got:x?} at {offset:#x} and should \
                     hold {expected:#x}"
                ));
            }
        }
        Ok(())
    }

    /// Loads everything once more as programs and devices do, ends everything, and checks that
    /// nothing is left. `turn` says who begins.
    pub(crate) fn finish(&mut self, turn: usize) -> Result<(), String> {
        self.failing = None;
        if self.pending.is_empty() {
            self.world.injector.clear();
        } else {
            self.pending.clear();
            self.step(Operation::Succeed)?;
        }
        let devices: Vec<_> = self.model.devices.iter().map(|&(device, _)| device).collect();
        let spaces: Vec<_> = self.model.spaces.keys().copied().collect();
        for (nth, &space) in spaces.iter().enumerate() {
            let mapped = (0..self.model.arena)
                .filter(|&page| self.model.slot(space, page) != Slot::Hole)
                .collect::<Vec<_>>();
            for page in mapped {
                let who = (turn + nth + page as usize) % (devices.len() + 1);
                let word = Word { page, offset: OFFSETS[turn % 2] };
                let load = match devices.get(who) {
                    Some(&device) if self.model.is_attached(device, space) => {
                        Operation::DeviceRead { device, space, word }
                    }
                    _ => Operation::Read { space, word },
                };
                let expected = self.model.perform(load);
                self.log.push((load, expected));
                match load.perform(&mut self.world) {
                    Ok(got) if got == expected => {}
                    got => return Err(format!("`{load}`: expected {expected}, got {got:?}")),
                }
            }
        }
        let sight = self.world.look();
        self.world.check_against(&sight).map_err(|what| format!("after the last loads: {what}"))?;
        self.world.finish().map_err(|what| format!("at the end: {what}"))
    }

    /// Returns what decides how things go on, as far as it can be seen, where pages and devices have
    /// no names: two sessions with the same are one as far as this test can tell. `pages` and
    /// `devices` are all their orders.
    pub(crate) fn fingerprint(&self, pages: &[Vec<u64>], devices: &[Vec<usize>]) -> Vec<u8> {
        let facts = self.world.facts();
        let orders = pages.iter().flat_map(|pages| devices.iter().map(move |of| (pages, of)));
        let keys = orders.map(|(pages, devices)| self.key(&facts, pages, devices));
        keys.min().unwrap_or_default()
    }

    /// Writes down facts: pages and devices in the order given, frames of system memory and values by
    /// first appearance.
    fn key(&self, facts: &[Vec<Fact>], pages: &[u64], devices: &[usize]) -> Vec<u8> {
        let mut key = Vec::with_capacity(128);
        let (mut frames, mut values) = (Vec::new(), vec![0]);
        let names = devices.iter().map(|&device| self.model.devices[device].0).collect::<Vec<_>>();
        let name = |device| rank(&mut names.clone(), device);
        for ((space, slots), facts) in self.model.spaces.iter().zip(facts) {
            key.push(space.to_string().as_bytes()[0]);
            for &page in pages {
                let (slot, fact) = (slots[page as usize], &facts[page as usize]);
                key.extend(match fact.seen {
                    Seen::Hole => [0, 0, 0],
                    Seen::Empty => [1, 0, 0],
                    Seen::Zeroes => [2, 0, 0],
                    Seen::System(frame) => [3, rank(&mut frames, frame), 0],
                    Seen::Held(frame, device) => [4, rank(&mut frames, frame), name(device)],
                    // By its number: eviction goes by that.
                    Seen::Device(device, frame) => [5, frame.0 as u8, name(device)],
                });
                key.extend([fact.access as u8, slot.access() as u8, u8::from(slot.is_guarded())]);
                key.extend(devices.iter().map(|&device| fact.by_device[device] as u8));
                key.extend(self.model.words(slot).map(|value| rank(&mut values, value)));
            }
        }
        key
    }

    /// Writes down what was done, as a file, and what is wrong about it.
    pub(crate) fn report(&self, what: &str) -> String {
        let mut file = OperationFile {
            arena: self.model.arena,
            devices: self.model.devices.clone(),
            ..OperationFile::default()
        };
        for &(operation, answer) in &self.log {
            file.push(operation, if answer == Answer::Done { vec![] } else { vec![answer] });
        }
        let in_place = match self.in_place.as_slice() {
            [] => String::new(),
            devices => format!("\nin place: {devices:?}"),
        };
        format!("# {}\n{file}", format!("{what}{in_place}").replace('\n', "\n# "))
    }

    /// Tells what the mapping of a page allows.
    pub(crate) fn access(&self, space: SpaceName, page: u64) -> Access {
        self.model.slot(space, page).access()
    }
}

/// Returns when `item` first appeared, from 0.
fn rank<T: PartialEq>(seen: &mut Vec<T>, item: T) -> u8 {
    let known = seen.iter().position(|known| *known == item);
    known.unwrap_or_else(|| {
        seen.push(item);
        seen.len() - 1
    }) as u8
}

/// Compares an answer with the expected one, and returns it. An operation that met a failure may be
/// refused for it.
fn compare(expected: Answer, got: Outcome<Answer>, failed: bool) -> Result<Answer, String> {
    let got = got.map_err(|obstacle| match obstacle {
        Obstacle::Broken(what) => what,
        obstacle => format!("{obstacle:?}"),
    })?;
    let excuses = [Refusal::OutOfMemory, Refusal::CopyFailed].map(Answer::Refused);
    match got == expected || failed && excuses.contains(&got) {
        true => Ok(got),
        false => Err(format!("expected {expected}, got {got}")),
    }
}
