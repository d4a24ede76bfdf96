//! One run of one program.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::limits::Group;

/// How long a run may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(2);

/// What a run has taken.
#[derive(Debug)]
pub(crate) struct Taken {
    /// From its start to its end, in seconds.
    pub(crate) wall: f64,
    /// Of processors, in seconds: the program's, the kernel's for it, and `uhmm`'s.
    pub(crate) processor: f64,
    /// The most memory at a time, in bytes: what is charged to its cgroup, and what is in swap.
    pub(crate) peak: u64,
    /// What it has written.
    pub(crate) output: Vec<u8>,
}

/// Why there is nothing to tell of a run.
#[derive(Debug)]
pub(crate) enum Failure {
    /// `SIGKILL` has ended it, which with a limit the kernel sends.
    Killed,
    /// It cannot be run, has failed, or took too long: which.
    Other(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Failure {
        Failure::Other(message)
    }
}

impl From<Failure> for String {
    fn from(failure: Failure) -> String {
        match failure {
            Failure::Killed => "a program was killed: there is too little memory".into(),
            Failure::Other(message) => message,
        }
    }
}

/// Runs a program, in a cgroup if there is one.
///
/// # Errors
///
/// [`Failure`].
pub(crate) fn run(program: &[OsString], group: Option<&Group>) -> Result<Taken, Failure> {
    let name = program[0].display().to_string();
    let mut command = Command::new("sh");
    match group {
        Some(group) => command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(group.members()),
        None => command.args(["-c", "exec \"$@\"", "sh"]),
    };
    let before = of_children();
    let began = Instant::now();
    let mut child = command
        .args(program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{name}: {error}"))?;
    let mut peak = 0;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| format!("{name}: {error}"))? {
            break status;
        }
        peak = peak.max(group.map_or(0, Group::taken));
        if began.elapsed() > PATIENCE {
            end(&mut child);
            return Err(Failure::Other(format!("{name} took longer than {PATIENCE:?}")));
        }
        std::thread::sleep(PAUSE);
    };
    let wall = began.elapsed().as_secs_f64();
    let processor = of_children() - before;
    let mut output = Vec::new();
    let mut said = child.stdout.take().expect("it is a pipe");
    std::io::Read::read_to_end(&mut said, &mut output).map_err(|error| error.to_string())?;
    if status.signal() == Some(Signal::KILL.as_raw()) {
        return Err(Failure::Killed);
    }
    if !status.success() {
        return Err(Failure::Other(format!("{name}: {status}")));
    }
    Ok(Taken { wall, processor, peak, output })
}

/// Ends a program that takes too long. `uhmm` passes the first signal on; if that does not help, its
/// cgroup's keeper ends what is left.
fn end(child: &mut Child) {
    _ = kill_process(Pid::from_child(child), Signal::TERM);
    let began = Instant::now();
    while matches!(child.try_wait(), Ok(None)) && began.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(PAUSE);
    }
    _ = child.kill();
    _ = child.wait();
}

/// Returns the words that run a program under `uhmm`, with a budget.
pub(crate) fn under_uhmm(program: &[OsString], budget: &str, report: &Path) -> Vec<OsString> {
    let words = ["run", "--progress", "never", "--json", "--budget", budget, "--report"];
    let mut all = vec![OsString::from(env!("CARGO_BIN_EXE_uhmm"))];
    all.extend(words.map(OsString::from));
    all.extend([report.as_os_str().to_owned(), OsString::from("--")]);
    all.extend(program.iter().cloned());
    all
}

/// Returns how long processors have worked for children that have been waited for, and for theirs, in
/// seconds (proc_pid_stat(5): fields 16 and 17, in hundredths).
fn of_children() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may have spaces, comes field 3.
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let field = |number: usize| {
        let field = rest.split(' ').nth(number - 3).and_then(|field| field.parse::<f64>().ok());
        field.unwrap_or(0.0)
    };
    (field(16) + field(17)) / 100.0
}
