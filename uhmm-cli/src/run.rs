//! `uhmm run`.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::Instant;

use rustix::io::Errno;
use uhmm_agent::LOCATION;
use uhmm_agent::launch;
use uhmm_agent::ledger::{Config, Ledger};

use crate::args;
use crate::failure::Failure;
use crate::report::{Ended, Report};
use crate::size::{Bytes, Size};
use crate::supervise::{Outcome, stand_in};
use crate::watch::{self, Watch};
use crate::{complain, device, doctor, preload, program};

/// The least budget: below it a program's stacks and the pages that one instruction touches leave
/// no choice of what to move.
const LEAST_BUDGET: u64 = 4 << 20;

/// Runs a program. Ends as it ends.
///
/// # Errors
///
/// Where it could not be started.
pub(crate) fn run(arguments: &args::Run) -> Result<ExitCode, Failure> {
    let mut command = command(&arguments.program)?;
    let library = preload::find(&preload::RUN)?;
    system_allows()?;
    if arguments.announced && !doctor::may_filter() {
        return Err(Failure::own(
            "--announced: a filter of system calls takes CAP_SYS_ADMIN, or a program that can gain no \
             privileges: setpriv --no-new-privs uhmm run --announced ...",
        ));
    }
    let config = config(arguments)?;
    let mut destination = Destination::open(arguments)?;
    let ledger = Ledger::create(&config)
        .map_err(|error| Failure::own(format!("no memory for the ledger: {error}")))?;
    let location = ledger.location().ok_or_else(|| Failure::own("the ledger has no location"))?;
    let before = std::env::var_os("LD_PRELOAD");
    command.env("LD_PRELOAD", preload::ld_preload(&library, before.as_deref()));
    command.env(LOCATION, location);

    let began = Instant::now();
    let (child, held) =
        launch::spawn(&mut command).map_err(|error| not_started(&arguments.program[0], &error))?;
    let watch = Watch::begin(&ledger, arguments.progress).inspect_err(|error| {
        complain(&format!("there is no progress to see ({error})"));
    });
    let outcome = stand_in(child.id(), held, watch::wipe)
        .map_err(|error| Failure::own(format!("the program runs on unattended: {error}")))?;
    drop(watch);

    let report = Report::of(&ledger, &config, arguments, ended(outcome), began.elapsed());
    destination.write(&report);
    match outcome {
        Outcome::Exited(status) => Ok(ExitCode::from(status)),
        Outcome::Killed(signal) => launch::end_by(signal),
    }
}

fn ended(outcome: Outcome) -> Ended {
    match outcome {
        Outcome::Exited(status) => Ended { status: Some(status), signal: None },
        Outcome::Killed(signal) => Ended { status: None, signal: Some(signal) },
    }
}

/// Reads what the program is to be run under.
fn config(arguments: &args::Run) -> Result<Config, Failure> {
    let budget = size("--budget", &arguments.budget)?;
    if budget < LEAST_BUDGET {
        return Err(Failure::own(format!(
            "--budget {}: no program runs in so little: give it {} at least",
            arguments.budget,
            Bytes(LEAST_BUDGET)
        )));
    }
    let attach_at = match arguments.attach_at.as_deref() {
        None => None,
        Some("start" | "0") => Some(0),
        Some(text) => Some(size("--attach-at", text)?),
    };
    Ok(Config {
        budget,
        device: device::checked(&arguments.device)?,
        policy: arguments.policy.clone(),
        verify: arguments.verify,
        announced: arguments.announced,
        attach_at,
    })
}

/// Reads the value of an option that is an amount of memory, in bytes.
fn size(option: &str, text: &str) -> Result<u64, Failure> {
    let size: Size =
        text.parse().map_err(|error| Failure::own(format!("{option} {text}: {error}")))?;
    Ok(size.bytes(memory()))
}

/// Returns how much memory the machine has.
fn memory() -> u64 {
    let system = rustix::system::sysinfo();
    system.totalram.saturating_mul(u64::from(system.mem_unit))
}

/// Finds the program, and makes sure that the agent is loaded with it.
pub(crate) fn command(program: &[OsString]) -> Result<Command, Failure> {
    let [name, arguments @ ..] = program else {
        return Err(Failure::own("name a program after `--`"));
    };
    let path = program::find(name)?;
    program::check(&path)?;
    let mut command = Command::new(path);
    command.arg0(name).args(arguments);
    Ok(command)
}

/// Makes sure that pages can move: a program that runs on without a budget would be a surprise.
pub(crate) fn system_allows() -> Result<(), Failure> {
    let migration = uhmm_linux::probe().migration();
    migration.map_err(|why| {
        let why = doctor::remedy(why);
        Failure::own(format!("this system does not let memory move: {why}; see uhmm doctor"))
    })
}

pub(crate) fn not_started(name: &OsString, error: &io::Error) -> Failure {
    let line = format!("{}: {error}", name.display());
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => {
            Failure::not_found(format!("{line}: it, or its interpreter, does not exist"))
        }
        Some(Errno::AGAIN | Errno::NOMEM) => {
            Failure::own(format!("{line}: raise the limits on processes or memory"))
        }
        _ => Failure::cannot_invoke(line),
    }
}

/// Where the report goes.
enum Destination {
    Nowhere,
    StandardError { json: bool },
    File { json: bool, file: std::fs::File, path: std::path::PathBuf },
}

impl Destination {
    /// Opens it before the program runs, so that a mistake is known before it.
    fn open(arguments: &args::Run) -> Result<Destination, Failure> {
        let json = arguments.json;
        match &arguments.report {
            _ if arguments.quiet => Ok(Destination::Nowhere),
            None => Ok(Destination::StandardError { json }),
            Some(path) => {
                let file = std::fs::File::create(path).map_err(|error| {
                    let path = path.display();
                    Failure::own(format!("--report {path}: {error}: name a file to be written"))
                })?;
                Ok(Destination::File { json, file, path: path.clone() })
            }
        }
    }

    /// Writes the report. The program has ended, with its own status; that the report is lost
    /// changes nothing about it.
    fn write(&mut self, report: &Report) {
        let text = |json: bool| if json { report.to_json() } else { report.to_string() };
        match self {
            Destination::Nowhere => {}
            Destination::StandardError { json } => {
                let _ = io::stderr().write_all(text(*json).as_bytes());
            }
            Destination::File { json, file, path } => {
                if let Err(error) = file.write_all(text(*json).as_bytes()) {
                    complain(&format!("--report {}: {error}: the report is lost", path.display()));
                }
            }
        }
    }
}
