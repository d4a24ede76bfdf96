//! The mirror device as programs find it under `uhmm dmirror`. Each test is a program of its own: the
//! test runs itself with the device.

#[path = "../common/mod.rs"]
mod common;
mod device;
mod files;
mod fuzz;
mod gup;
mod processes;
mod requests;

use common::{allowed, complains, output, run, uhmm};

/// Says that this process has the device.
const PUPPET: &str = "UHMM_CLI_DMIRROR_PUPPET";

/// Runs `body` in a process that has the device: this one, if it has been started for that, or another
/// that does nothing but the test `name`.
#[track_caller]
pub(crate) fn with_device(name: &str, body: impl FnOnce()) {
    if std::env::var_os(PUPPET).is_some() {
        return body();
    }
    if !allowed() {
        return;
    }
    let found = output(&mut puppet(name));
    let text = String::from_utf8_lossy(&found.stdout);
    let errors = String::from_utf8_lossy(&found.stderr);
    assert!(found.status.success(), "{}\n{text}\n{errors}", found.status);
    // A name that is that of no test would do nothing.
    assert!(text.contains("1 passed"), "{text}");
}

/// The test `name`, with the device.
pub(crate) fn puppet(name: &str) -> std::process::Command {
    let mut command = uhmm();
    command.arg("dmirror").arg("--").arg(std::env::current_exe().expect("it runs"));
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(PUPPET, "1");
    command
}

#[test]
fn statuses_are_the_programs() {
    if !allowed() {
        return;
    }
    let run_sh = |script: &str| {
        let mut command = uhmm();
        output(command.args(["dmirror", "--", "sh", "-c", script]))
    };
    let found = run_sh("cat; echo to stderr >&2; exit 7");
    assert_eq!((found.status.code(), &*found.stderr), (Some(7), &b"to stderr\n"[..]));
    use std::os::unix::process::ExitStatusExt as _;
    assert_eq!(run_sh("kill -USR1 $$").status.signal(), Some(libc::SIGUSR1));
}

#[test]
fn what_cannot_be_run_is_said_in_one_line() {
    if !allowed() {
        return;
    }
    let program = |name: &str| {
        let mut command = uhmm();
        command.args(["dmirror", "--", name]);
        command
    };
    complains(&mut program("/nowhere/at/all"), 127, &["/nowhere/at/all"]);
    complains(&mut program("/etc/passwd"), 126, &["/etc/passwd"]);
    complains(uhmm().arg("dmirror"), 125, &["--help"]);
    complains(uhmm().arg("dmirror-broker"), 125, &["uhmm dmirror"]);
    let mut without = program("true");
    without.env("UHMM_DMIRROR_PRELOAD", "/nowhere/lib.so");
    complains(&mut without, 125, &["UHMM_DMIRROR_PRELOAD", "libuhmm_dmirror_preload.so"]);
}

#[test]
fn without_the_command_there_is_no_device() {
    if std::env::var_os(PUPPET).is_some() || !allowed() {
        return;
    }
    // Where the kernel's own is loaded there is one.
    if !std::path::Path::new("/dev/hmm_dmirror0").exists() {
        let opened = device::open("/dev/hmm_dmirror0", libc::O_RDWR);
        assert_eq!(opened, Err(libc::ENOENT));
        let found = output(&mut run(&["--quiet"], &["sh", "-c", ": < /dev/hmm_dmirror0"]));
        assert!(!found.status.success());
    }
}
