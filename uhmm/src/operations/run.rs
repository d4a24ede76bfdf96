//! Doing what an operation file says, and comparing the answers.

use std::fmt;

use super::{
    Advice, Answer, DeviceName, FileName, Injection, Line, Memory, Operation, OperationFile, Pages,
    Place, Refusal, SpaceName, Word,
};
use crate::entry::Access;

/// Whatever can do the operations: a backend, with devices.
///
/// One method is one operation; what each does stands at the [module](super). Spaces and mirrors
/// that do not exist are [`Refusal::Ended`].
#[expect(missing_docs, reason = "the table at the module explains each operation")]
pub trait Executor {
    /// Sets the scene: an arena, devices and files, and no address space yet.
    fn begin(&mut self, file: &OperationFile) -> Outcome<()>;

    fn spawn(&mut self, space: SpaceName) -> Outcome<()>;
    fn fork(&mut self, space: SpaceName, child: SpaceName) -> Outcome<()>;
    fn exit(&mut self, space: SpaceName) -> Outcome<()>;

    fn map(
        &mut self,
        space: SpaceName,
        pages: Pages,
        memory: Memory,
        access: Access,
    ) -> Outcome<()>;
    fn unmap(&mut self, space: SpaceName, pages: Pages) -> Outcome<()>;
    fn protect(&mut self, space: SpaceName, pages: Pages, access: Access) -> Outcome<()>;
    fn remap(&mut self, space: SpaceName, pages: Pages, to: u64) -> Outcome<()>;
    fn discard(&mut self, space: SpaceName, pages: Pages) -> Outcome<()>;
    fn advise(&mut self, advice: Advice, space: SpaceName, pages: Pages) -> Outcome<()>;

    fn read(&mut self, space: SpaceName, word: Word) -> Outcome<u64>;
    fn write(&mut self, space: SpaceName, word: Word, value: u64) -> Outcome<()>;
    /// Answers the value before.
    fn add(&mut self, space: SpaceName, word: Word, value: u64) -> Outcome<u64>;

    fn device_read(&mut self, device: DeviceName, space: SpaceName, word: Word) -> Outcome<u64>;
    fn device_write(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<()>;
    /// Answers the value before.
    fn device_add(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        word: Word,
        value: u64,
    ) -> Outcome<u64>;
    fn device_fault(
        &mut self,
        device: DeviceName,
        space: SpaceName,
        page: u64,
        access: Access,
    ) -> Outcome<()>;

    fn migrate(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()>;
    fn home(&mut self, space: SpaceName, pages: Pages) -> Outcome<()>;
    fn evict(&mut self, device: DeviceName, count: u64) -> Outcome<()>;
    fn exclusive(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()>;
    fn release(&mut self, device: DeviceName, space: SpaceName, pages: Pages) -> Outcome<()>;
    fn attach(&mut self, device: DeviceName, space: SpaceName) -> Outcome<()>;
    fn detach(&mut self, device: DeviceName, space: SpaceName) -> Outcome<()>;
    fn locate(&mut self, space: SpaceName, page: u64) -> Outcome<Place>;

    fn truncate(&mut self, file: FileName, pages: u64) -> Outcome<()>;
    fn punch(&mut self, file: FileName, pages: Pages) -> Outcome<()>;

    fn fail(&mut self, injection: Injection, after: u64) -> Outcome<()>;
    fn succeed(&mut self) -> Outcome<()>;

    /// Checks what must be true after every operation. The default knows of nothing.
    ///
    /// # Errors
    ///
    /// What is not.
    fn check(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Ends everything that still lives, and checks that nothing is left of it.
    ///
    /// # Errors
    ///
    /// What is left.
    fn finish(&mut self) -> Result<(), String>;
}

/// What an operation gives where it is done.
pub type Outcome<T> = Result<T, Obstacle>;

/// Why an operation was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// It was refused, which is an answer.
    Refused(Refusal),
    /// This executor cannot do it, so it cannot run the file.
    Unsupported(String),
    /// Something went wrong that is no answer.
    Broken(String),
}

/// What was done, and what it answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The number of the line in the file.
    pub line: usize,
    /// What was done.
    pub operation: Operation,
    /// What it answered.
    pub answer: Answer,
}

/// Everything that was done. Displayed, it is the lines of a file with the answers that came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript(pub Vec<Record>);

/// An operation answered something that its line does not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The line.
    pub line: Line,
    /// What it answered.
    pub got: Answer,
}

/// Why a run of a file ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The answer was not the expected one.
    #[error("{file}:{}: {mismatch}", mismatch.line.number)]
    Mismatch {
        /// The file.
        file: String,
        /// What was expected, and what came.
        mismatch: Box<Mismatch>,
    },
    /// The executor cannot do an operation of the file.
    #[error("{file}:{line}: this executor cannot do it: {what}")]
    Unsupported {
        /// The file.
        file: String,
        /// The number of the line; 0 for the scene.
        line: usize,
        /// What it cannot do.
        what: String,
    },
    /// Something was wrong after an operation, or at the end.
    #[error("{file}:{line}: {what}")]
    Broken {
        /// The file.
        file: String,
        /// The number of the line; 0 for the scene, one past the last for the end.
        line: usize,
        /// What was wrong.
        what: String,
    },
}

/// Does what a file says, in order, until an answer is not as expected.
///
/// On success every line answered as expected, every [check](Executor::check) passed, and nothing
/// is left of what was made.
///
/// # Errors
///
/// [`RunError`], with the line.
pub fn run(file: &OperationFile, executor: &mut dyn Executor) -> Result<Transcript, RunError> {
    let mut transcript = Transcript::default();
    let name = || file.name.clone();
    executor.begin(file).map_err(|obstacle| obstacle.at(file, 0))?;
    for line in &file.lines {
        let got = match perform(line.operation, executor) {
            Ok(answer) => answer,
            Err(Obstacle::Refused(refusal)) => Answer::Refused(refusal),
            Err(obstacle) => return Err(obstacle.at(file, line.number)),
        };
        transcript.0.push(Record { line: line.number, operation: line.operation, answer: got });
        if !line.allows(got) {
            let mismatch = Box::new(Mismatch { line: line.clone(), got });
            return Err(RunError::Mismatch { file: name(), mismatch });
        }
        let broken = |what| RunError::Broken { file: name(), line: line.number, what };
        executor.check().map_err(broken)?;
    }
    let line = file.lines.last().map_or(0, |line| line.number) + 1;
    executor.finish().map_err(|what| RunError::Broken { file: name(), line, what })?;
    Ok(transcript)
}

/// Does one operation.
///
/// # Errors
///
/// [`Obstacle`].
pub(super) fn perform(operation: Operation, to: &mut dyn Executor) -> Outcome<Answer> {
    use Operation::*;
    let done = match operation {
        Read { space, word } => return to.read(space, word).map(Answer::Value),
        Add { space, word, value } => return to.add(space, word, value).map(Answer::Value),
        DeviceRead { device, space, word } => {
            return to.device_read(device, space, word).map(Answer::Value);
        }
        DeviceAdd { device, space, word, value } => {
            return to.device_add(device, space, word, value).map(Answer::Value);
        }
        Where { space, page } => return to.locate(space, page).map(Answer::At),
        Spawn { space } => to.spawn(space),
        Fork { space, child } => to.fork(space, child),
        Exit { space } => to.exit(space),
        Map { space, pages, memory, access } => to.map(space, pages, memory, access),
        Unmap { space, pages } => to.unmap(space, pages),
        Protect { space, pages, access } => to.protect(space, pages, access),
        Remap { space, pages, to: target } => to.remap(space, pages, target),
        Discard { space, pages } => to.discard(space, pages),
        Advise { advice, space, pages } => to.advise(advice, space, pages),
        Write { space, word, value } => to.write(space, word, value),
        DeviceWrite { device, space, word, value } => to.device_write(device, space, word, value),
        DeviceFault { device, space, page, access } => to.device_fault(device, space, page, access),
        Migrate { device, space, pages } => to.migrate(device, space, pages),
        Home { space, pages } => to.home(space, pages),
        Evict { device, count } => to.evict(device, count),
        Exclusive { device, space, pages } => to.exclusive(device, space, pages),
        Release { device, space, pages } => to.release(device, space, pages),
        Attach { device, space } => to.attach(device, space),
        Detach { device, space } => to.detach(device, space),
        Truncate { file, pages } => to.truncate(file, pages),
        Punch { file, pages } => to.punch(file, pages),
        Fail { injection, after } => to.fail(injection, after),
        Succeed => to.succeed(),
    };
    done.map(|()| Answer::Done)
}

impl Operation {
    /// Does the operation.
    ///
    /// # Errors
    ///
    /// [`Obstacle::Unsupported`] and [`Obstacle::Broken`]; a refusal is an answer.
    pub fn perform(self, executor: &mut dyn Executor) -> Outcome<Answer> {
        match perform(self, executor) {
            Err(Obstacle::Refused(refusal)) => Ok(Answer::Refused(refusal)),
            outcome => outcome,
        }
    }
}

impl Obstacle {
    fn at(self, file: &OperationFile, line: usize) -> RunError {
        let file = file.name.clone();
        match self {
            Obstacle::Unsupported(what) => RunError::Unsupported { file, line, what },
            Obstacle::Broken(what) => RunError::Broken { file, line, what },
            Obstacle::Refused(refusal) => {
                RunError::Broken { file, line, what: format!("refused: {refusal}") }
            }
        }
    }
}

impl From<Refusal> for Obstacle {
    fn from(refusal: Refusal) -> Obstacle {
        Obstacle::Refused(refusal)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expected: Vec<_> = self.line.expected.iter().map(Answer::to_string).collect();
        let expected = match expected.as_slice() {
            [] => "anything but a refusal".to_owned(),
            expected => expected.join(" or "),
        };
        write!(f, "`{}`: expected {expected}, got {}", self.line.operation, self.got)
    }
}

impl fmt::Display for Transcript {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|record| {
            let operation = record.operation.to_string();
            writeln!(f, "{operation:<28} => {}", record.answer)
        })
    }
}
