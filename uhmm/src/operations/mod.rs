//! Operation files: what programs and devices do to address spaces, as data.
//!
//! An operation file tells one story, and says what each step must answer. Whoever can do what an
//! [`Executor`] does can [`run`] it: the simulated address space here, a live process elsewhere.
//! All must give the same answers, so what an answer may say is what a program or a device can see:
//! a value, or why there is none.
//!
//! # The format
//!
//! One line is one operation; `#` begins a comment. First comes the scene:
//!
//! ```text
//! arena 8             # pages 0 to 7 of every address space, wherever a backend puts them
//! device g0 4         # a device with four pages of memory of its own
//! file f0 2           # a memory-backed file of two pages of zeroes
//! ```
//!
//! Then the operations. A space is a capital letter, a device `g` and a number, a file `f` and a
//! number. A `word` is a page, or a page and an offset in bytes: `3`, `3+0xff8`. A number is decimal,
//! or hexadecimal with `0x`.
//!
//! | line | what it does |
//! | --- | --- |
//! | `spawn A` | makes an address space with nothing in it, which every device mirrors |
//! | `fork A B` | copies an address space; every device mirrors the copy |
//! | `exit B` | ends an address space, with everything in it |
//! | `map A 0 8 anon rw` | maps pages, in place of what is there: `anon`, `huge` (anonymous, in large pages where they fit), `shared`, `file f0 0` or `private f0 0`, the number being the file's first page; for `none`, `r` or `rw` |
//! | `unmap A 0 8` | takes mappings away |
//! | `protect A 0 8 r` | changes what mappings allow |
//! | `remap A 0 2 6` | moves mappings from page 0 on to page 6 on, in place of what is there |
//! | `discard A 0 8` | drops contents: private memory is zeroes again |
//! | `reclaim A 0 8`, `swap-in A 0 8`, `relocate A 0 8`, `merge A 0 8`, `collapse A 0 8`, `split A 0 8` | asks for something that no program can see; a backend may do nothing |
//! | `read A 3` | a CPU loads the word: answers its value |
//! | `write A 3 0x42` | a CPU stores the word |
//! | `add A 3 1` | a CPU adds to the word in one step: answers the value before |
//! | `device-read g0 A 3`, `device-write g0 A 3 7`, `device-add g0 A 3 1` | the same by a device, which leaves the page where it is if it can use it there |
//! | `device-fault g0 A 3 rw` | the device faults on the page for `r`, `rw` or `atomic`, and has it moved to its memory if that can be |
//! | `migrate g0 A 0 4` | moves to a device what can be moved |
//! | `home A 0 4` | moves to system memory what is on any device |
//! | `evict g0 4` | makes a device give up at least so many pages |
//! | `exclusive g0 A 2 1` | keeps CPUs and other devices off, until one of them touches the pages |
//! | `release g0 A 2 1` | ends what `exclusive` began |
//! | `detach g0 A`, `attach g0 A` | ends a mirror; makes one |
//! | `where A 3` | answers where the page is: `system`, `g0`, `held g0` (in system memory, exclusively), `none` (not in memory at all). For use where the answer is the same on every backend |
//! | `truncate f0 1` | cuts a file, or lengthens it |
//! | `punch f0 0 1` | drops pages of a file, which are zeroes again |
//! | `fail g0 copy 0` | makes a step of a device fail: `allocate`, `copy` or `clear`, after so many that succeed |
//! | `fail system frame 0` | makes a step of the system fail: `frame` or `split` |
//! | `succeed` | lets every step succeed again |
//!
//! After `=>` stands what the operation must answer, or several answers of which one must come,
//! with `|` between them: `ok`, a value, a place, or one of the refusals [`Refusal`] lists. Without
//! it any answer will do that is no refusal.
//!
//! ```
//! use uhmm::operations::{Operation, OperationFile};
//!
//! let file = OperationFile::parse("story.ops", "
//!     arena 4
//!     device g0 2
//!     spawn A
//!     map A 0 4 anon rw
//!     write A 3 0x42
//!     migrate g0 A 3 1
//!     read A 3            => 0x42    # and home it came
//!     where A 3           => system
//!     read A 9            => hole
//! ").expect_err("page 9 is beyond the arena");
//! assert_eq!(file.to_string(), "story.ops:10: expected a page below 4, found `9`");
//! assert_eq!("read A 3+8".parse::<Operation>()?.to_string(), "read A 3+0x8");
//! # Ok::<(), uhmm::operations::ParseError>(())
//! ```

mod parse;
mod run;

use std::fmt;

pub use parse::ParseError;
pub use run::{Executor, Mismatch, Obstacle, Outcome, Record, RunError, Transcript, run};

use crate::entry::Access;

/// The name of an address space: `A` to `Z`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceName(u8);

/// The name of a device: `g0`, `g1` and so on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceName(pub u8);

/// The name of a file: `f0`, `f1` and so on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(pub u8);

/// Pages of the arena, by index.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pages {
    /// The index of the first.
    pub first: u64,
    /// How many there are: at least one.
    pub count: u64,
}

/// A 64-bit word of the arena.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word {
    /// The index of its page.
    pub page: u64,
    /// How many bytes into the page it begins: a multiple of 8.
    pub offset: u16,
}

/// What memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// Private and anonymous.
    Anonymous,
    /// Private and anonymous, in large pages where they fit. The arena begins at the edge of one.
    Huge,
    /// Anonymous, and shared with children.
    Shared,
    /// A file's, shared.
    File {
        /// Which file.
        file: FileName,
        /// The page of the file that the first page maps.
        first: u64,
    },
    /// A private copy of a file's.
    PrivateFile {
        /// Which file.
        file: FileName,
        /// The page of the file that the first page maps.
        first: u64,
    },
}

/// What a backend may be asked for although no program can see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Advice {
    /// Swap out.
    Reclaim,
    /// Bring back from swap.
    SwapIn,
    /// Move within system memory.
    Relocate,
    /// Merge pages of equal contents.
    Merge,
    /// Make large pages.
    Collapse,
    /// Make single pages of large ones.
    Split,
}

/// A step that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Injection {
    /// The system allocates memory.
    Frame,
    /// The system splits a large page.
    Split,
    /// A device allocates memory.
    Allocate(DeviceName),
    /// A device copies a page.
    Copy(DeviceName),
    /// A device fills a page with zeroes.
    Clear(DeviceName),
}

/// One operation. What each does stands at the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the table at the module explains each with its operands")]
pub enum Operation {
    Spawn { space: SpaceName },
    Fork { space: SpaceName, child: SpaceName },
    Exit { space: SpaceName },
    Map { space: SpaceName, pages: Pages, memory: Memory, access: Access },
    Unmap { space: SpaceName, pages: Pages },
    Protect { space: SpaceName, pages: Pages, access: Access },
    Remap { space: SpaceName, pages: Pages, to: u64 },
    Discard { space: SpaceName, pages: Pages },
    Advise { advice: Advice, space: SpaceName, pages: Pages },
    Read { space: SpaceName, word: Word },
    Write { space: SpaceName, word: Word, value: u64 },
    Add { space: SpaceName, word: Word, value: u64 },
    DeviceRead { device: DeviceName, space: SpaceName, word: Word },
    DeviceWrite { device: DeviceName, space: SpaceName, word: Word, value: u64 },
    DeviceAdd { device: DeviceName, space: SpaceName, word: Word, value: u64 },
    DeviceFault { device: DeviceName, space: SpaceName, page: u64, access: Access },
    Migrate { device: DeviceName, space: SpaceName, pages: Pages },
    Home { space: SpaceName, pages: Pages },
    Evict { device: DeviceName, count: u64 },
    Exclusive { device: DeviceName, space: SpaceName, pages: Pages },
    Release { device: DeviceName, space: SpaceName, pages: Pages },
    Attach { device: DeviceName, space: SpaceName },
    Detach { device: DeviceName, space: SpaceName },
    Where { space: SpaceName, page: u64 },
    Truncate { file: FileName, pages: u64 },
    Punch { file: FileName, pages: Pages },
    Fail { injection: Injection, after: u64 },
    Succeed,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Not in memory: unmapped, never touched, or swapped out.
    Nowhere,
    /// In system memory.
    System,
    /// In the memory of a device.
    Device(DeviceName),
    /// In system memory, held by a device.
    Held(DeviceName),
}

/// Why an operation was refused. The words in the files are those of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// `hole`: nothing is mapped there.
    Hole,
    /// `denied`: the mapping does not allow it.
    Denied,
    /// `end-of-file`: the file ends before the page.
    EndOfFile,
    /// `out-of-memory`: there is no system memory for it.
    OutOfMemory,
    /// `copy-failed`: the device could not copy the page home.
    CopyFailed,
    /// `not-exclusive`: pages of this kind cannot be held exclusively.
    NotExclusive,
    /// `ended`: the address space or the mirror does not exist.
    Ended,
}

/// What an operation answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It was done.
    Done,
    /// The value that was there.
    Value(u64),
    /// Where the page is.
    At(Place),
    /// It was not done.
    Refused(Refusal),
}

/// One line of operations in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The number of the line, from 1.
    pub number: usize,
    /// What is to be done.
    pub operation: Operation,
    /// The answers of which one must come. If there are none, any will do that is no refusal.
    pub expected: Vec<Answer>,
}

/// A file of operations: a scene, and what happens there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationFile {
    /// What the file is called in reports.
    pub name: String,
    /// How many pages the arena has.
    pub arena: u64,
    /// The devices, each with its pages of memory.
    pub devices: Vec<(DeviceName, u64)>,
    /// The files, each with its pages.
    pub files: Vec<(FileName, u64)>,
    /// What happens, in order.
    pub lines: Vec<Line>,
}

impl SpaceName {
    /// The first space.
    pub const A: SpaceName = SpaceName(b'A');
    /// The second space.
    pub const B: SpaceName = SpaceName(b'B');
    /// The third space.
    pub const C: SpaceName = SpaceName(b'C');

    /// Makes the name of this letter; `None` where it is none from `A` to `Z`.
    pub fn new(letter: char) -> Option<SpaceName> {
        letter.is_ascii_uppercase().then_some(SpaceName(letter as u8))
    }
}

impl Pages {
    /// Makes the range of `count` pages from `first`.
    pub const fn new(first: u64, count: u64) -> Pages {
        Pages { first, count }
    }

    /// Returns the indexes in ascending order.
    pub fn iter(self) -> std::ops::Range<u64> {
        self.first..self.first + self.count
    }
}

impl Word {
    /// Makes the first word of a page.
    pub const fn of(page: u64) -> Word {
        Word { page, offset: 0 }
    }
}

impl Advice {
    /// Every advice there is.
    pub const ALL: [Advice; 6] = [
        Advice::Reclaim,
        Advice::SwapIn,
        Advice::Relocate,
        Advice::Merge,
        Advice::Collapse,
        Advice::Split,
    ];

    /// Returns the word for it.
    pub fn name(self) -> &'static str {
        match self {
            Advice::Reclaim => "reclaim",
            Advice::SwapIn => "swap-in",
            Advice::Relocate => "relocate",
            Advice::Merge => "merge",
            Advice::Collapse => "collapse",
            Advice::Split => "split",
        }
    }
}

impl Injection {
    /// Returns the name of the step, as an [`Injector`](crate::Injector) knows it.
    pub fn step(self) -> &'static str {
        match self {
            Injection::Frame => "frame",
            Injection::Split => "split",
            Injection::Allocate(_) => "allocate",
            Injection::Copy(_) => "copy",
            Injection::Clear(_) => "clear",
        }
    }

    /// Returns the device whose step it is, if it is a device's.
    pub fn device(self) -> Option<DeviceName> {
        match self {
            Injection::Frame | Injection::Split => None,
            Injection::Allocate(device) | Injection::Copy(device) | Injection::Clear(device) => {
                Some(device)
            }
        }
    }
}

impl Refusal {
    /// Every refusal there is.
    pub const ALL: [Refusal; 7] = [
        Refusal::Hole,
        Refusal::Denied,
        Refusal::EndOfFile,
        Refusal::OutOfMemory,
        Refusal::CopyFailed,
        Refusal::NotExclusive,
        Refusal::Ended,
    ];

    /// Returns the word for it.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::Hole => "hole",
            Refusal::Denied => "denied",
            Refusal::EndOfFile => "end-of-file",
            Refusal::OutOfMemory => "out-of-memory",
            Refusal::CopyFailed => "copy-failed",
            Refusal::NotExclusive => "not-exclusive",
            Refusal::Ended => "ended",
        }
    }
}

impl OperationFile {
    /// Appends an operation, and returns its line's place in [`lines`](OperationFile::lines).
    pub fn push(&mut self, operation: Operation, expected: Vec<Answer>) -> usize {
        let before = 1 + self.devices.len() + self.files.len() + self.lines.len();
        self.lines.push(Line { number: before + 1, operation, expected });
        self.lines.len() - 1
    }
}

impl Line {
    /// Tells whether `answer` is one that the line allows.
    pub fn allows(&self, answer: Answer) -> bool {
        match self.expected.as_slice() {
            [] => !matches!(answer, Answer::Refused(_)),
            expected => expected.contains(&answer),
        }
    }
}

/// Returns the word for what a mapping allows, or what a device wants.
fn access_name(access: Access) -> &'static str {
    match access {
        Access::None => "none",
        Access::Read => "r",
        Access::Write => "rw",
        Access::Atomic => "atomic",
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Operation::*;
        match *self {
            Spawn { space } => write!(f, "spawn {space}"),
            Fork { space, child } => write!(f, "fork {space} {child}"),
            Exit { space } => write!(f, "exit {space}"),
            Map { space, pages, memory, access } => {
                write!(f, "map {space} {pages} {memory} {}", access_name(access))
            }
            Unmap { space, pages } => write!(f, "unmap {space} {pages}"),
            Protect { space, pages, access } => {
                write!(f, "protect {space} {pages} {}", access_name(access))
            }
            Remap { space, pages, to } => write!(f, "remap {space} {pages} {to}"),
            Discard { space, pages } => write!(f, "discard {space} {pages}"),
            Advise { advice, space, pages } => write!(f, "{} {space} {pages}", advice.name()),
            Read { space, word } => write!(f, "read {space} {word}"),
            Write { space, word, value } => write!(f, "write {space} {word} {value:#x}"),
            Add { space, word, value } => write!(f, "add {space} {word} {value:#x}"),
            DeviceRead { device, space, word } => write!(f, "device-read {device} {space} {word}"),
            DeviceWrite { device, space, word, value } => {
                write!(f, "device-write {device} {space} {word} {value:#x}")
            }
            DeviceAdd { device, space, word, value } => {
                write!(f, "device-add {device} {space} {word} {value:#x}")
            }
            DeviceFault { device, space, page, access } => {
                write!(f, "device-fault {device} {space} {page} {}", access_name(access))
            }
            Migrate { device, space, pages } => write!(f, "migrate {device} {space} {pages}"),
            Home { space, pages } => write!(f, "home {space} {pages}"),
            Evict { device, count } => write!(f, "evict {device} {count}"),
            Exclusive { device, space, pages } => write!(f, "exclusive {device} {space} {pages}"),
            Release { device, space, pages } => write!(f, "release {device} {space} {pages}"),
            Attach { device, space } => write!(f, "attach {device} {space}"),
            Detach { device, space } => write!(f, "detach {device} {space}"),
            Where { space, page } => write!(f, "where {space} {page}"),
            Truncate { file, pages } => write!(f, "truncate {file} {pages}"),
            Punch { file, pages } => write!(f, "punch {file} {pages}"),
            Fail { injection, after } => match injection.device() {
                Some(device) => write!(f, "fail {device} {} {after}", injection.step()),
                None => write!(f, "fail system {} {after}", injection.step()),
            },
            Succeed => write!(f, "succeed"),
        }
    }
}

impl fmt::Display for OperationFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "arena {}", self.arena)?;
        for (device, pages) in &self.devices {
            writeln!(f, "device {device} {pages}")?;
        }
        for (file, pages) in &self.files {
            writeln!(f, "file {file} {pages}")?;
        }
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = self.operation.to_string();
        if self.expected.is_empty() {
            return write!(f, "{operation}");
        }
        write!(f, "{operation:<28} => ")?;
        for (index, answer) in self.expected.iter().enumerate() {
            let between = if index > 0 { " | " } else { "" };
            write!(f, "{between}{answer}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Answer::Done => write!(f, "ok"),
            Answer::Value(value) => write!(f, "{value:#x}"),
            Answer::At(place) => write!(f, "{place}"),
            Answer::Refused(refusal) => write!(f, "{refusal}"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Place::Nowhere => write!(f, "none"),
            Place::System => write!(f, "system"),
            Place::Device(device) => write!(f, "{device}"),
            Place::Held(device) => write!(f, "held {device}"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Memory::Anonymous => write!(f, "anon"),
            Memory::Huge => write!(f, "huge"),
            Memory::Shared => write!(f, "shared"),
            Memory::File { file, first } => write!(f, "file {file} {first}"),
            Memory::PrivateFile { file, first } => write!(f, "private {file} {first}"),
        }
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.first, self.count)
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            0 => write!(f, "{}", self.page),
            offset => write!(f, "{}+{offset:#x}", self.page),
        }
    }
}

/// Writes `Display` and a `Debug` that is the same, for what has a name.
macro_rules! named {
    ($type:ty, |$name:ident, $f:ident| $write:expr) => {
        impl fmt::Display for $type {
            fn fmt(&self, $f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let $name = self;
                $write
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

named!(SpaceName, |name, f| write!(f, "{}", char::from(name.0)));
named!(DeviceName, |name, f| write!(f, "g{}", name.0));
named!(FileName, |name, f| write!(f, "f{}", name.0));

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages from {}", self.count, self.first)
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
