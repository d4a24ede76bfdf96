//! A world and the model side by side, compared after every operation.

use uhmm::Access;
use uhmm::operations::{
    Answer, DeviceName, Executor, Obstacle, Operation, OperationFile, Outcome, Refusal, SpaceName,
    Word,
};

use super::device::Defect;
use super::places::Transition;
use super::world::{Seen, Sight, World};
use super::{Model, OFFSETS, Slot};

/// A world and what should be true in it.
pub(crate) struct Session {
    pub(crate) world: World,
    pub(crate) model: Model,
    sight: Sight,
    /// When a step is to fail: after so many more.
    failing: Option<u64>,
}

/// What a session is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scene<'a> {
    pub(crate) arena: u64,
    pub(crate) devices: &'a [(DeviceName, u64)],
    pub(crate) defect: Defect,
}

impl Session {
    pub(crate) fn new(scene: Scene<'_>) -> Session {
        let mut world = World::with_defect(scene.defect);
        world.set_arena(scene.arena);
        scene.devices.iter().for_each(|&(name, pages)| world.add_device(name, pages));
        let model = Model::new(scene.arena, scene.devices);
        Session { world, model, sight: Sight::new(), failing: None }
    }

    /// Makes the step fail that comes after `after` more.
    pub(crate) fn fail_after(&mut self, after: u64) {
        self.world.injector.fail_any(after);
        self.failing = Some(after);
    }

    /// Returns how many steps that can fail were taken.
    pub(crate) fn steps(&self) -> u64 {
        self.world.injector.asked_in_all()
    }

    /// Tells whether a failure is still to come.
    pub(crate) fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// Does an operation without looking at what it did: for one that is looked at elsewhere.
    pub(crate) fn trust(&mut self, operation: Operation) {
        let got = operation.perform(&mut self.world);
        let expected = self.model.perform(operation);
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
        let before = self.steps();
        let got = operation.perform(&mut self.world);
        let failed = self.note_failure(self.steps() - before);
        let done = compare(expected, got, failed).map_err(described)?;
        let after = self.world.look();
        if !failed {
            let (model, before, after) = (&self.model, &self.sight, &after);
            Transition { operation, done, model, before, after }.check().map_err(described)?;
        }
        if done {
            self.model = next;
        }
        self.sight = after;
        self.check().map_err(described)
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
        self.world.check()
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
                    "page {page} of {space}, {seen:?}, holds {got:#x?} at {offset:#x} and should \
                     hold {expected:#x}"
                ));
            }
        }
        Ok(())
    }

    /// Loads everything once more as programs and devices do, ends everything, and checks that
    /// nothing is left. `turn` says who begins.
    pub(crate) fn finish(mut self, turn: usize) -> Result<(), String> {
        self.world.injector.clear();
        self.failing = None;
        let devices: Vec<_> = self.model.devices.iter().map(|&(device, _)| device).collect();
        let spaces: Vec<_> = self.model.spaces.keys().copied().collect();
        for (nth, &space) in spaces.iter().enumerate() {
            for page in 0..self.model.arena {
                let who = (turn + nth + page as usize) % (devices.len() + 1);
                let word = Word { page, offset: OFFSETS[turn % 2] };
                let load = match devices.get(who) {
                    Some(&device) => Operation::DeviceRead { device, space, word },
                    None => Operation::Read { space, word },
                };
                let expected = self.model.perform(load);
                match load.perform(&mut self.world) {
                    Ok(got) if got == expected => {}
                    got => return Err(format!("`{load}`: expected {expected}, got {got:?}")),
                }
            }
        }
        self.world.check().map_err(|what| format!("after the last loads: {what}"))?;
        self.world.finish().map_err(|what| format!("at the end: {what}"))
    }

    /// Writes operations down as a file, with the answers that the model gives.
    pub(crate) fn file(scene: Scene<'_>, operations: &[Operation]) -> OperationFile {
        let mut model = Model::new(scene.arena, scene.devices);
        let mut file = OperationFile {
            name: "minimal.ops".into(),
            arena: scene.arena,
            devices: scene.devices.to_vec(),
            ..OperationFile::default()
        };
        for &operation in operations {
            let expected = match operation {
                Operation::Fail { .. } | Operation::Succeed => Answer::Done,
                operation => model.perform(operation),
            };
            file.push(operation, if expected == Answer::Done { vec![] } else { vec![expected] });
        }
        file
    }

    /// Tells what the mapping of a page allows.
    pub(crate) fn access(&self, space: SpaceName, page: u64) -> Access {
        self.model.slot(space, page).access()
    }
}

/// Compares an answer with the expected one, and returns whether the operation was done. One that
/// met a failure may be refused for it.
fn compare(expected: Answer, got: Outcome<Answer>, failed: bool) -> Result<bool, String> {
    let got = got.map_err(|obstacle| match obstacle {
        Obstacle::Broken(what) => what,
        obstacle => format!("{obstacle:?}"),
    })?;
    let excuses = [Refusal::OutOfMemory, Refusal::CopyFailed].map(Answer::Refused);
    if got == expected {
        Ok(!matches!(got, Answer::Refused(_)))
    } else if failed && excuses.contains(&got) {
        Ok(false)
    } else {
        Err(format!("expected {expected}, got {got}"))
    }
}
