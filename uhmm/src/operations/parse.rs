//! Reading operation files.

use std::fmt;
use std::str::FromStr;

use super::{
    Advice, Answer, DeviceName, FileName, Injection, Line, Memory, Operation, OperationFile, Pages,
    Place, Refusal, SpaceName, Word, access_name,
};
use crate::entry::Access;
use crate::page::PAGE_SIZE;

/// A line that is no operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ParseError {
    /// The file, if it has a name.
    pub file: Option<String>,
    /// The number of the line, from 1.
    pub line: usize,
    /// What should have stood there.
    pub expected: String,
    /// What did; empty at the end of the line.
    pub found: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{file}:{}: ", self.line)?,
            None => write!(f, "line {}: ", self.line)?,
        }
        match self.found.as_str() {
            "" => write!(f, "expected {}, found the end of the line", self.expected),
            found => write!(f, "expected {}, found `{found}`", self.expected),
        }
    }
}

/// What a file has said of its scene.
struct Scene<'a>(&'a OperationFile);

/// The words of a line.
struct Words<'a> {
    rest: std::iter::Peekable<std::str::SplitWhitespace<'a>>,
    line: usize,
    /// What names and pages are checked against, in a file.
    scene: Option<Scene<'a>>,
}

type Parsed<T> = Result<T, ParseError>;

impl OperationFile {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`ParseError`] for the first line that is no operation, comes out of order, or names a page,
    /// device or file that the scene does not have.
    pub fn parse(name: &str, text: &str) -> Result<OperationFile, ParseError> {
        let mut file = OperationFile { name: name.to_owned(), ..OperationFile::default() };
        let parsed = text.lines().enumerate().try_for_each(|(index, line)| {
            let line = line.split('#').next().unwrap_or_default();
            if line.trim().is_empty() { Ok(()) } else { file.parse_line(index + 1, line) }
        });
        parsed
            .map(|()| file)
            .map_err(|error: ParseError| ParseError { file: Some(name.to_owned()), ..error })
    }

    fn parse_line(&mut self, number: usize, text: &str) -> Parsed<()> {
        let (operation, expected) = match text.split_once("=>") {
            Some((operation, expected)) => (operation, Some(expected)),
            None => (text, None),
        };
        let mut words = Words::new(operation, number);
        if expected.is_none() && self.parse_scene(&mut words)? {
            return words.end();
        }
        if self.arena == 0 {
            return Err(words.error("`arena` and a number of pages first", operation.trim()));
        }
        words.scene = Some(Scene(self));
        let operation = words.operation()?;
        words.end()?;
        let mut answers = Vec::new();
        for alternative in expected.into_iter().flat_map(|expected| expected.split('|')) {
            let mut words = Words::new(alternative, number);
            answers.push(words.answer()?);
            words.end()?;
        }
        self.lines.push(Line { number, operation, expected: answers });
        Ok(())
    }

    /// Reads a line of the scene, if it is one.
    fn parse_scene(&mut self, words: &mut Words<'_>) -> Parsed<bool> {
        let Some(&first @ ("arena" | "device" | "file")) = words.rest.peek() else {
            return Ok(false);
        };
        if !self.lines.is_empty() || (first == "arena") != (self.arena == 0) {
            return Err(
                words.error("`arena` once and first, then the scene, then operations", first)
            );
        }
        words.rest.next();
        match first {
            "arena" => self.arena = words.positive("how many pages the arena has")?,
            "device" => {
                let device = (words.device()?, words.positive("how many pages the device has")?);
                self.devices.push(device);
            }
            _ => {
                let file = (words.file()?, words.number("how many pages the file has")?);
                self.files.push(file);
            }
        }
        Ok(true)
    }
}

impl FromStr for Operation {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Operation, ParseError> {
        let mut words = Words::new(text, 1);
        let operation = words.operation()?;
        words.end()?;
        Ok(operation)
    }
}

impl FromStr for Answer {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Answer, ParseError> {
        let mut words = Words::new(text, 1);
        let answer = words.answer()?;
        words.end()?;
        Ok(answer)
    }
}

impl<'a> Words<'a> {
    fn new(text: &'a str, line: usize) -> Words<'a> {
        Words { rest: text.split_whitespace().peekable(), line, scene: None }
    }

    fn error(&self, expected: impl Into<String>, found: &str) -> ParseError {
        let (expected, found) = (expected.into(), found.to_owned());
        ParseError { file: None, line: self.line, expected, found }
    }

    /// Takes the next word, for `read` to make something of.
    fn next<T>(&mut self, expected: &str, read: impl FnOnce(&str) -> Option<T>) -> Parsed<T> {
        let word = self.rest.next().unwrap_or_default();
        read(word).ok_or_else(|| self.error(expected, word))
    }

    fn end(&mut self) -> Parsed<()> {
        match self.rest.next() {
            Some(word) => Err(self.error("the end of the line", word)),
            None => Ok(()),
        }
    }

    fn operation(&mut self) -> Parsed<Operation> {
        use Operation::*;
        let verb = self.rest.next().unwrap_or_default();
        Ok(match verb {
            "spawn" => Spawn { space: self.space()? },
            "fork" => Fork { space: self.space()?, child: self.space()? },
            "exit" => Exit { space: self.space()? },
            "map" => self.map()?,
            "unmap" => Unmap { space: self.space()?, pages: self.pages()? },
            "protect" => {
                let (space, pages) = (self.space()?, self.pages()?);
                Protect { space, pages, access: self.allowed()? }
            }
            "remap" => {
                let (space, pages) = (self.space()?, self.pages()?);
                let to = self.number("the page to move to")?;
                self.within(to, pages.count)?;
                Remap { space, pages, to }
            }
            "discard" => Discard { space: self.space()?, pages: self.pages()? },
            "read" => Read { space: self.space()?, word: self.word()? },
            "write" => Write { space: self.space()?, word: self.word()?, value: self.value()? },
            "add" => Add { space: self.space()?, word: self.word()?, value: self.value()? },
            "home" => Home { space: self.space()?, pages: self.pages()? },
            "where" => Where { space: self.space()?, page: self.page()? },
            "truncate" => Truncate { file: self.file()?, pages: self.number("pages")? },
            "punch" => {
                let file = self.file()?;
                let (first, count) = (self.number("a page")?, self.positive("how many pages")?);
                Punch { file, pages: Pages { first, count } }
            }
            "fail" => self.fail()?,
            "succeed" => Succeed,
            verb => match Advice::ALL.into_iter().find(|advice| advice.name() == verb) {
                Some(advice) => Advise { advice, space: self.space()?, pages: self.pages()? },
                None => self.device_operation(verb)?,
            },
        })
    }

    /// Reads an operation that begins with a device.
    fn device_operation(&mut self, verb: &str) -> Parsed<Operation> {
        use Operation::*;
        const VERBS: [&str; 10] = [
            "device-read",
            "device-write",
            "device-add",
            "device-fault",
            "migrate",
            "evict",
            "exclusive",
            "release",
            "attach",
            "detach",
        ];
        if !VERBS.contains(&verb) {
            return Err(self.error("an operation", verb));
        }
        let device = self.device()?;
        if verb == "evict" {
            return Ok(Evict { device, count: self.number("how many pages")? });
        }
        let space = self.space()?;
        Ok(match verb {
            "device-read" => DeviceRead { device, space, word: self.word()? },
            "device-write" => {
                DeviceWrite { device, space, word: self.word()?, value: self.value()? }
            }
            "device-add" => DeviceAdd { device, space, word: self.word()?, value: self.value()? },
            "device-fault" => {
                let page = self.page()?;
                DeviceFault { device, space, page, access: self.wanted()? }
            }
            "migrate" => Migrate { device, space, pages: self.pages()? },
            "exclusive" => Exclusive { device, space, pages: self.pages()? },
            "release" => Release { device, space, pages: self.pages()? },
            "attach" => Attach { device, space },
            _ => Detach { device, space },
        })
    }

    fn map(&mut self) -> Parsed<Operation> {
        let (space, pages) = (self.space()?, self.pages()?);
        let kind = self.next("`anon`, `huge`, `shared`, `file` or `private`", |word| {
            ["anon", "huge", "shared", "file", "private"].into_iter().find(|&kind| kind == word)
        })?;
        let memory = match kind {
            "anon" => Memory::Anonymous,
            "huge" => Memory::Huge,
            "shared" => Memory::Shared,
            _ => {
                let (file, first) = (self.file()?, self.number("a page of the file")?);
                match kind {
                    "file" => Memory::File { file, first },
                    _ => Memory::PrivateFile { file, first },
                }
            }
        };
        Ok(Operation::Map { space, pages, memory, access: self.allowed()? })
    }

    fn fail(&mut self) -> Parsed<Operation> {
        let injection = if self.rest.next_if_eq(&"system").is_some() {
            self.next("`frame` or `split`", |word| match word {
                "frame" => Some(Injection::Frame),
                "split" => Some(Injection::Split),
                _ => None,
            })?
        } else {
            let device = self.device()?;
            self.next("`allocate`, `copy` or `clear`", |word| match word {
                "allocate" => Some(Injection::Allocate(device)),
                "copy" => Some(Injection::Copy(device)),
                "clear" => Some(Injection::Clear(device)),
                _ => None,
            })?
        };
        let after = self.number("how many succeed before")?;
        Ok(Operation::Fail { injection, after })
    }

    fn space(&mut self) -> Parsed<SpaceName> {
        self.next("a space, `A` to `Z`", |word| {
            let mut letters = word.chars();
            let name = SpaceName::new(letters.next()?)?;
            letters.next().is_none().then_some(name)
        })
    }

    fn device(&mut self) -> Parsed<DeviceName> {
        let word = self.rest.peek().copied().unwrap_or_default();
        let device = self.next("a device such as `g0`", |word| {
            Some(DeviceName(index(word.strip_prefix('g')?)?))
        })?;
        let known = |scene: &Scene<'_>| scene.0.devices.iter().any(|&(name, _)| name == device);
        match self.scene.as_ref().is_none_or(known) {
            true => Ok(device),
            false => Err(self.error("a device of the scene", word)),
        }
    }

    fn file(&mut self) -> Parsed<FileName> {
        let word = self.rest.peek().copied().unwrap_or_default();
        let file = self
            .next("a file such as `f0`", |word| Some(FileName(index(word.strip_prefix('f')?)?)))?;
        let known = |scene: &Scene<'_>| scene.0.files.iter().any(|&(name, _)| name == file);
        match self.scene.as_ref().is_none_or(known) {
            true => Ok(file),
            false => Err(self.error("a file of the scene", word)),
        }
    }

    fn pages(&mut self) -> Parsed<Pages> {
        let first = self.number("a page")?;
        let count = self.positive("how many pages, at least one")?;
        self.within(first, count)?;
        Ok(Pages { first, count })
    }

    fn page(&mut self) -> Parsed<u64> {
        let page = self.number("a page")?;
        self.within(page, 1)?;
        Ok(page)
    }

    fn word(&mut self) -> Parsed<Word> {
        let word = self.next("a page, or a page and an offset such as `3+0x8`", |word| {
            let (page, offset) = word.split_once('+').unwrap_or((word, "0"));
            let (page, offset) = (number(page)?, number(offset)?);
            let fits = offset % 8 == 0 && offset < PAGE_SIZE as u64;
            fits.then_some(Word { page, offset: u16::try_from(offset).ok()? })
        })?;
        self.within(word.page, 1)?;
        Ok(word)
    }

    /// Checks that pages are within the arena.
    fn within(&self, first: u64, count: u64) -> Parsed<()> {
        let Some(Scene(file)) = self.scene else { return Ok(()) };
        match first.checked_add(count) {
            Some(end) if end <= file.arena => Ok(()),
            _ => {
                let expected = format!("a page below {}", file.arena);
                Err(self.error(expected, &first.saturating_add(count - 1).to_string()))
            }
        }
    }

    fn number(&mut self, what: &str) -> Parsed<u64> {
        self.next(what, number)
    }

    fn positive(&mut self, what: &str) -> Parsed<u64> {
        self.next(what, |word| number(word).filter(|&number| number > 0))
    }

    fn value(&mut self) -> Parsed<u64> {
        self.number("a value")
    }

    /// Reads what a mapping allows.
    fn allowed(&mut self) -> Parsed<Access> {
        self.access("`none`, `r` or `rw`", &[Access::None, Access::Read, Access::Write])
    }

    /// Reads what a device wants.
    fn wanted(&mut self) -> Parsed<Access> {
        self.access("`r`, `rw` or `atomic`", &[Access::Read, Access::Write, Access::Atomic])
    }

    fn access(&mut self, expected: &str, of: &[Access]) -> Parsed<Access> {
        self.next(expected, |word| of.iter().copied().find(|&access| access_name(access) == word))
    }

    fn answer(&mut self) -> Parsed<Answer> {
        let expected = "an answer";
        let word = self.rest.next().unwrap_or_default();
        let refusal = Refusal::ALL.into_iter().find(|refusal| refusal.name() == word);
        let answer = match word {
            "ok" => Some(Answer::Done),
            "none" => Some(Answer::At(Place::Nowhere)),
            "system" => Some(Answer::At(Place::System)),
            "held" => Some(Answer::At(Place::Held(self.device()?))),
            word if refusal.is_none() => match word.strip_prefix('g').and_then(index) {
                Some(device) => Some(Answer::At(Place::Device(DeviceName(device)))),
                None => number(word).map(Answer::Value),
            },
            _ => refusal.map(Answer::Refused),
        };
        answer.ok_or_else(|| self.error(expected, word))
    }
}

/// Reads a number as names have it: digits alone.
fn index(word: &str) -> Option<u8> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok()).flatten()
}

fn number(word: &str) -> Option<u64> {
    let (digits, radix) = match word.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (word, 10),
    };
    // The standard library would take a sign.
    let plain = digits.chars().all(|digit| digit.is_digit(radix));
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}
