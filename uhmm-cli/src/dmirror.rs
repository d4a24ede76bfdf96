//! `uhmm dmirror`.
//!
//! The broker is a process of its own: programs that outlive the command, as daemons do, keep the
//! device for as long as they have it open. It gets its sockets, and the news of this command's end,
//! through its standard input.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use uhmm_agent::launch;
use uhmm_agent::node::{Broker, LOCATION};

use crate::args;
use crate::failure::Failure;
use crate::supervise::{Outcome, stand_in};
use crate::{preload, run};

/// Runs a program with the device. Ends as it ends.
///
/// # Errors
///
/// Where it could not be started.
pub(crate) fn dmirror(arguments: &args::Dmirror) -> Result<ExitCode, Failure> {
    let mut command = run::command(&arguments.program)?;
    let library = preload::find(&preload::DMIRROR)?;
    run::system_allows()?;
    let no_broker = |error: io::Error| Failure::own(format!("the device has no broker: {error}"));
    let (_lifeline, location) = broker().map_err(no_broker)?;
    let before = std::env::var_os("LD_PRELOAD");
    command.env("LD_PRELOAD", preload::ld_preload(&library, before.as_deref()));
    command.env(LOCATION, location);
    let (child, held) = launch::spawn(&mut command)
        .map_err(|error| run::not_started(&arguments.program[0], &error))?;
    let outcome = stand_in(child.id(), held, || {})
        .map_err(|error| Failure::own(format!("the program runs on unattended: {error}")))?;
    match outcome {
        Outcome::Exited(status) => Ok(ExitCode::from(status)),
        Outcome::Killed(signal) => launch::end_by(signal),
    }
}

/// Starts the broker, and returns what it lives on, and where it is.
fn broker() -> io::Result<(std::os::fd::OwnedFd, String)> {
    let (sockets, location) = Broker::listen()?;
    let kind = SocketType::SEQPACKET;
    let (lifeline, other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("uhmm").arg("dmirror-broker").stdin(other);
    // Neither the terminal's signals nor its output are the broker's, nor a folder or what reads this
    // command's output.
    command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).current_dir("/");
    // It is not waited for: it ends when everybody else has, and often after this command.
    drop(command.spawn()?);
    Broker::hand_over(sockets, &lifeline)?;
    Ok((lifeline, location))
}

/// Is the broker.
///
/// # Errors
///
/// Where it was not started by [`dmirror`], or the system has no room.
pub(crate) fn serve() -> Result<ExitCode, Failure> {
    let failed = |error: io::Error| {
        Failure::own(format!("{error}: this is for `uhmm dmirror`, which starts it by itself"))
    };
    let lifeline = rustix::io::dup(rustix::stdio::stdin()).map_err(|error| failed(error.into()))?;
    Broker::take_over(lifeline).and_then(Broker::run).map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}
