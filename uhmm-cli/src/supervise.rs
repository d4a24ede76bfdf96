//! Being in the place of a program for those who started it: they see one job that stops, goes on
//! and ends as the program does.
//!
//! The program is in the same process group, so what the terminal says (`^C`, `^\`, `^Z`) it hears
//! by itself, and `uhmm` does nothing about it. What somebody sends to `uhmm` alone is sent on.
//! When the program stops, `uhmm` stops itself, so that the shell takes notice; when it goes on it
//! lets the program go on. No handler is installed before the program is started, and signals are
//! blocked until all are, so none falls between.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process, pidfd_open, pidfd_send_signal,
    waitpid,
};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use signal_hook::iterator::{Handle, SignalsInfo};
use signal_hook::low_level::siginfo::{Cause, Origin};
use uhmm_agent::launch::{Held, was_ignored};

/// The signals that are sent on.
const SENT_ON: [i32; 7] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2];

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Exited(u8),
    Killed(i32),
}

/// Waits for the program, and is its stand-in until it ends.
///
/// `held` are the signals, blocked since before the program was started. `stopping` is called
/// before this process stops.
///
/// # Errors
///
/// Where no signal can be handled, or the program is not ours to wait for. It runs on.
pub(crate) fn stand_in(pid: u32, held: Held, mut stopping: impl FnMut()) -> io::Result<Outcome> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    // It cannot be that of another process, even if the program has ended: it was not waited for.
    let program = pidfd_open(pid, PidfdFlags::empty())?;
    // What is ignored stays so: the program ignores it as well.
    let handled = SENT_ON.into_iter().filter(|&signal| !was_ignored(signal));
    let signals = SignalsInfo::<WithOrigin>::new(handled)?;
    let handle = signals.handle();
    drop(held);
    std::thread::scope(|scope| {
        let program = &program;
        let forwarder = std::thread::Builder::new().name("uhmm-signals".to_owned());
        let forwarder = forwarder.spawn_scoped(scope, move || send_on(signals, program));
        let _closed = Closed(handle);
        forwarder?;
        wait(pid, program, &mut stopping)
    })
}

/// Ends the forwarder, whatever happens.
struct Closed(Handle);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Sends on what somebody else than the terminal sends.
fn send_on(mut signals: SignalsInfo<WithOrigin>, program: &OwnedFd) {
    for Origin { signal, cause, .. } in &mut signals {
        // The terminal tells the whole group, a session's end whoever is in the foreground.
        let by_the_kernel = cause == Cause::Kernel;
        if let Some(signal) = Signal::from_named_raw(signal)
            && !by_the_kernel
        {
            // It may have ended: then nobody is to hear of it.
            let _ = pidfd_send_signal(program, signal);
        }
    }
}

fn wait(pid: Pid, program: &OwnedFd, stopping: &mut impl FnMut()) -> io::Result<Outcome> {
    let mut known = None;
    loop {
        let status = match known.take() {
            Some(status) => status,
            None => match next_status(pid, WaitOptions::UNTRACED)? {
                Some(status) => status,
                None => continue,
            },
        };
        if let Some(outcome) = ended(status) {
            return Ok(outcome);
        }
        if status.stopped() {
            stopping();
            // It may have gone on meanwhile.
            known = next_status(pid, LOOK)?;
            if known.is_some() {
                continue;
            }
            kill_process(rustix::process::getpid(), Signal::STOP)?;
            // Somebody lets this process go on, and may have let the program go on as well, as a
            // shell does, and stopped it again since. Nothing new is to be known only of a program
            // that is still in the stop that was told of.
            known = next_status(pid, LOOK)?;
            if known.is_none() {
                let _ = pidfd_send_signal(program, Signal::CONT);
            }
        }
    }
}

/// How it is found out what is new of the program. That it was continued is asked for, and not
/// whether it is stopped: `/proc` says so of a program that somebody is stopping, some of whose
/// threads still run, and `SIGCONT` would take that stop back.
const LOOK: WaitOptions =
    WaitOptions::UNTRACED.union(WaitOptions::CONTINUED).union(WaitOptions::NOHANG);

/// Waits for the program to end, to stop or to go on, as `options` say; nothing where nothing of
/// that has happened, or a signal has ended the waiting.
fn next_status(pid: Pid, options: WaitOptions) -> io::Result<Option<WaitStatus>> {
    match waitpid(Some(pid), options) {
        Ok(status) => Ok(status.map(|(_, status)| status)),
        Err(rustix::io::Errno::INTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn ended(status: WaitStatus) -> Option<Outcome> {
    let exited = status.exit_status().map(|code| Outcome::Exited((code & 0xff) as u8));
    exited.or(status.terminating_signal().map(Outcome::Killed))
}
