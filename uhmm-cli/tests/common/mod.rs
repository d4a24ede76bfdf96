//! What the tests of the command share.
#![allow(dead_code, reason = "no test uses all of it")]

pub(crate) mod install;

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, waitpid};

/// How long anything may take. Whoever waits longer has found a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often something is looked at that nobody tells of.
const LOOK: Duration = Duration::from_millis(5);

/// The command.
pub(crate) fn uhmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uhmm"));
    // What this test was started with is not what it is about.
    command.env_remove("LD_PRELOAD").env_remove("UHMM_RUN").env_remove("UHMM_PRELOAD");
    command
}

/// `uhmm run OPTIONS -- PROGRAM`
pub(crate) fn run<W: AsRef<OsStr>>(options: &[&str], program: &[W]) -> Command {
    let mut command = uhmm();
    command.arg("run").args(options).arg("--").args(program);
    command
}

/// `uhmm run OPTIONS -- sh -c SCRIPT`
pub(crate) fn run_sh(options: &[&str], script: &str) -> Command {
    run(options, &["sh", "-c", script])
}

/// Tells whether programs can be run here. Where they cannot, the test says so and does nothing,
/// unless
/// `UHMM_REQUIRE_UFFD=1` has it fail.
pub(crate) fn allowed() -> bool {
    let doctor = uhmm().arg("doctor").output().expect("it runs");
    let allowed = doctor.status.code() != Some(2);
    if !allowed {
        let found = String::from_utf8_lossy(&doctor.stdout).into_owned();
        assert!(std::env::var_os("UHMM_REQUIRE_UFFD").is_none_or(|value| value != "1"), "{found}");
        eprintln!("SKIPPED: programs cannot be run here:\n{found}");
    }
    allowed
}

/// A process that is killed when the test ends, however it ends.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    lines: Receiver<Vec<u8>>,
}

impl Running {
    /// Starts it, with pipes to write to and read from, in a process group of its own, as a shell
    /// starts a job. The standard error output is that of the test.
    /// Signals that this test was started to ignore, as jobs in the background are, are not ignored.
    pub(crate) fn start(command: &mut Command) -> Running {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let heed = || {
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGTSTP]
            {
                // SAFETY: may be called between fork and exec, and the action needs no handler.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls alone.
        let command = unsafe { command.pre_exec(heed) };
        let mut child = command.spawn().expect("it starts");
        let mut out = BufReader::new(child.stdout.take().expect("it is piped"));
        let (line, lines) = mpsc::channel();
        std::thread::spawn(move || {
            loop {
                let mut text = Vec::new();
                let bytes = out.read_until(b'\n', &mut text).expect("it can be read");
                // Nobody may want the rest.
                if bytes == 0 || line.send(text).is_err() {
                    break;
                }
            }
        });
        Running { child, lines }
    }

    pub(crate) fn pid(&self) -> Pid {
        pid_of(i32::try_from(self.child.id()).expect("numbers of processes are small"))
    }

    /// Reads a line of what it writes; nothing at the end.
    #[track_caller]
    pub(crate) fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Some(String::from_utf8_lossy(&line).trim_end().to_owned()),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("waited {PATIENCE:?} for a line"),
        }
    }

    /// Reads a line, which must be there.
    #[track_caller]
    pub(crate) fn expect_line(&mut self, expected: &str) {
        assert_eq!(self.line().as_deref(), Some(expected));
    }

    /// Writes a line for it to read.
    pub(crate) fn say(&mut self, line: &str) {
        let stdin: &mut ChildStdin = self.child.stdin.as_mut().expect("it was not closed");
        writeln!(stdin, "{line}").expect("somebody reads");
    }

    /// Presses a key, where it is a terminal.
    pub(crate) fn press(&mut self, key: &str) {
        let stdin: &mut ChildStdin = self.child.stdin.as_mut().expect("it was not closed");
        stdin.write_all(key.as_bytes()).expect("somebody reads");
    }

    /// Ends what it reads.
    pub(crate) fn hang_up(&mut self) {
        drop(self.child.stdin.take());
    }

    pub(crate) fn send(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Waits until it has ended.
    #[track_caller]
    pub(crate) fn end(&mut self) -> ExitStatus {
        self.end_within(PATIENCE)
    }

    /// Waits until it has ended, for as long as it may take.
    #[track_caller]
    pub(crate) fn end_within(&mut self, patience: Duration) -> ExitStatus {
        until_within(patience, "the process ends", || self.child.try_wait().expect("it is ours"))
    }

    /// Waits until it has stopped.
    #[track_caller]
    pub(crate) fn stopped(&mut self) {
        let look = WaitOptions::UNTRACED | WaitOptions::NOHANG;
        let status: WaitStatus = until("the process stops", || {
            waitpid(Some(self.pid()), look).expect("it is ours").map(|(_, status)| status)
        });
        assert!(status.stopped(), "it has ended: {status:?}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Where it has ended already there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn pid_of(pid: i32) -> Pid {
    Pid::from_raw(pid).expect("no process is number 0")
}

pub(crate) fn send(pid: Pid, signal: Signal) {
    rustix::process::kill_process(pid, signal).expect("it exists");
}

/// Looks until there is something.
#[track_caller]
pub(crate) fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, look)
}

/// Looks until there is something, for as long as that may take.
#[track_caller]
fn until_within<T>(patience: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {patience:?} until {what}");
        std::thread::sleep(LOOK);
    }
}

/// Returns the letter that `/proc` has for the state of a process; nothing if there is none.
pub(crate) fn state_of(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Runs it to its end.
#[track_caller]
pub(crate) fn output(command: &mut Command) -> Output {
    output_within(PATIENCE, command)
}

/// Runs it to its end, for as long as it may take.
#[track_caller]
pub(crate) fn output_within(patience: Duration, command: &mut Command) -> Output {
    let mut running = Running::start(command.stderr(Stdio::piped()));
    running.hang_up();
    let mut errors = running.child.stderr.take().expect("it is piped");
    let (said, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        errors.read_to_end(&mut text).expect("it can be read");
        // Nobody waits for it if the test has failed.
        let _ = said.send(text);
    });
    let status = running.end_within(patience);
    let mut stdout = Vec::new();
    while let Ok(line) = running.lines.recv_timeout(PATIENCE) {
        stdout.extend(line);
    }
    let stderr = heard.recv_timeout(PATIENCE).expect("nobody holds it open");
    Output { status, stdout, stderr }
}

/// Checks that a command said one line on the standard error output and nothing else, which has all
/// of
/// `words` in it, and ended with `status`.
#[track_caller]
pub(crate) fn complains(command: &mut Command, status: i32, words: &[&str]) {
    let Output { status: ended, stdout, stderr } = output(command);
    let text = String::from_utf8(stderr).expect("it is text");
    assert_eq!((ended.code(), ended.signal()), (Some(status), None), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("uhmm: ") && text.ends_with('\n'), "{text}");
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
    assert_eq!(stdout, b"");
}

/// A folder with files that goes away at the end.
#[derive(Debug)]
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        let folder = tempfile::Builder::new().prefix("uhmm-cli-").tempdir().expect("there is room");
        set_mode(folder.path(), 0o755);
        Folder(folder)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a file.
    pub(crate) fn file(&self, name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).expect("there is room");
        set_mode(&path, mode);
        path
    }
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, mode).expect("it is ours");
}
