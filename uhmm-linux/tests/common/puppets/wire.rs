//! What is said between the process that has a story done and those that do it: lines of text.
//!
//! A request is any number of lines `fail ...`, in the words of operation files, each a step that is
//! to fail while this request is done; then one line that asks. The answer is any number of lines
//! `fail ...` that say how often each of those steps ran; then one line that answers. So a step
//! fails once in all processes together, as it does in the simulation.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::Duration;

use uhmm::operations::{Answer, FileName, Injection, Operation, SpaceName};

/// What is asked of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// To do this in its space.
    Do(Operation),
    /// To announce a change of what this file's mappings show.
    Hold(FileName),
    /// That the change which it has announced is made.
    Over,
    /// To reap a child that has ended.
    Reap(u32),
    /// To check what must be true after every operation.
    Check,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Answer(Answer),
    Unsupported(String),
    Broken(String),
}

/// Steps that are to fail, each after so many that succeed; or how often each ran.
pub(crate) type Steps = Vec<(Injection, u64)>;

/// One end of a conversation.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: BufReader<UnixStream>,
}

impl Wire {
    pub(crate) fn new(stream: UnixStream) -> Wire {
        Wire { stream: BufReader::new(stream) }
    }

    /// Connects to whoever listens under this abstract name.
    pub(crate) fn connect(name: &str) -> io::Result<Wire> {
        let address = SocketAddr::from_abstract_name(name)?;
        UnixStream::connect_addr(&address).map(Wire::new)
    }

    /// Sets how long an answer may take.
    pub(crate) fn patience(&self, patience: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(patience))
    }

    /// Says which space a process has become.
    pub(crate) fn hello(&mut self, space: SpaceName) -> io::Result<()> {
        self.line(&format!("{space} {}", std::process::id()))
    }

    /// Hears which space a process has become, and its number.
    pub(crate) fn heard_hello(&mut self) -> io::Result<(SpaceName, u32)> {
        let line = self.read()?;
        let parsed = line.split_once(' ').and_then(|(space, pid)| {
            let space = SpaceName::new(space.chars().next()?)?;
            Some((space, pid.parse().ok()?))
        });
        parsed.ok_or_else(|| unexpected(&line))
    }

    /// Says what the scene is: text whose lines are none of them empty.
    pub(crate) fn tell_scene(&mut self, scene: &str) -> io::Result<()> {
        self.line(&format!("{}\n", scene.trim_end()))
    }

    /// Hears what the scene is.
    pub(crate) fn hear_scene(&mut self) -> io::Result<String> {
        let mut scene = String::new();
        loop {
            match self.read()?.as_str() {
                "" => return Ok(scene),
                line => scene += &format!("{line}\n"),
            }
        }
    }

    pub(crate) fn ask(&mut self, fail: &Steps, ask: Ask) -> io::Result<()> {
        let ask = match ask {
            Ask::Do(operation) => format!("do {operation}"),
            Ask::Hold(file) => format!("hold {file}"),
            Ask::Over => "over".to_owned(),
            Ask::Reap(pid) => format!("reap {pid}"),
            Ask::Check => "check".to_owned(),
        };
        self.line(&format!("{}{ask}", steps_text(fail)))
    }

    /// Returns what is asked; `None` where nobody is left to ask.
    pub(crate) fn asked(&mut self) -> io::Result<Option<(Steps, Ask)>> {
        let mut fail = Steps::new();
        loop {
            let line = match self.read() {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                line => line?,
            };
            if push_step(&mut fail, &line) {
                continue;
            }
            let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
            let ask = match verb {
                "do" => rest.parse().ok().map(Ask::Do),
                // The name of a file stands in operations, and nowhere alone.
                "hold" => match format!("truncate {rest} 0").parse() {
                    Ok(Operation::Truncate { file, .. }) => Some(Ask::Hold(file)),
                    _ => None,
                },
                "over" => Some(Ask::Over),
                "reap" => rest.parse().ok().map(Ask::Reap),
                "check" => Some(Ask::Check),
                _ => None,
            };
            let ask = ask.ok_or_else(|| unexpected(&line))?;
            return Ok(Some((fail, ask)));
        }
    }

    pub(crate) fn say(&mut self, ran: &Steps, said: &Said) -> io::Result<()> {
        let one_line = |text: &str| text.replace('\n', "; ");
        let said = match said {
            Said::Answer(answer) => format!("answer {answer}"),
            Said::Unsupported(what) => format!("unsupported {}", one_line(what)),
            Said::Broken(what) => format!("broken {}", one_line(what)),
        };
        self.line(&format!("{}{said}", steps_text(ran)))
    }

    pub(crate) fn said(&mut self) -> io::Result<(Steps, Said)> {
        let mut ran = Steps::new();
        loop {
            let line = self.read()?;
            if push_step(&mut ran, &line) {
                continue;
            }
            let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
            let said = match verb {
                "answer" => rest.parse().ok().map(Said::Answer),
                "unsupported" => Some(Said::Unsupported(rest.to_owned())),
                "broken" => Some(Said::Broken(rest.to_owned())),
                _ => None,
            };
            return said.map(|said| (ran, said)).ok_or_else(|| unexpected(&line));
        }
    }

    fn line(&mut self, line: &str) -> io::Result<()> {
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())
    }

    fn read(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end_matches('\n').to_owned()),
        }
    }
}

fn steps_text(steps: &Steps) -> String {
    let text = |&(injection, after): &(Injection, u64)| {
        format!("{}\n", Operation::Fail { injection, after })
    };
    steps.iter().map(text).collect()
}

fn push_step(steps: &mut Steps, line: &str) -> bool {
    match line.parse() {
        Ok(Operation::Fail { injection, after }) => {
            steps.push((injection, after));
            true
        }
        _ => false,
    }
}

fn unexpected(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("nobody says `{line}` here"))
}
