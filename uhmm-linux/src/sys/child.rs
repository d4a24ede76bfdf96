//! Processes for tests: one of its own for a test that forks, and its children.
//!
//! A test that forks would have every userfaultfd of every other test in the process see it. It
//! runs [`alone`] instead, in a process that does nothing else.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

/// What tells a process that it was started for one test alone.
const ALONE: &str = "UHMM_TEST_ALONE";

/// How long a child may take, in seconds. Then a signal ends it.
const CHILD_SECONDS: u32 = 30;

/// How a child is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fork {
    /// By the C library, which runs the hooks.
    Hooked,
    /// By the system call, of which the C library knows nothing.
    Raw,
    /// The same, as the first process of a namespace of process IDs of its own (pid_namespaces(7)).
    FirstOfMany,
}

/// A child of this process.
#[derive(Debug)]
pub(super) struct Child(libc::pid_t);

/// How a child has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It returned this.
    Returned(bool),
    /// It panicked.
    Panicked,
    /// This signal has ended it.
    Signal(i32),
}

/// Runs the test `name` of `module` (`module_path!()`) in a process of its own.
#[track_caller]
pub(super) fn alone(module: &str, name: &str, test: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        test();
        return;
    }
    let (_, module) = module.split_once("::").expect("a module of this crate");
    let output = Command::new(std::env::current_exe().expect("the test knows its program"))
        .args([&format!("{module}::{name}"), "--exact", "--nocapture", "--test-threads=1"])
        .env(ALONE, "1")
        .output()
        .expect("the program can be started");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}\n{errors}", output.status);
    assert!(text.contains("1 passed"), "no such test: {module}::{name}\n{text}");
    eprint!("{errors}");
}

/// Runs `f` in a child.
pub(super) fn start(how: Fork, f: impl FnOnce() -> bool) -> Child {
    let pid = match how {
        // SAFETY: the child runs what a test wants to see at work after a fork, and nothing else.
        Fork::Hooked => unsafe { libc::fork() },
        Fork::Raw => clone(0),
        // The right to make one comes with a namespace of users.
        Fork::FirstOfMany => match clone(libc::CLONE_NEWPID) {
            -1 => clone(libc::CLONE_NEWPID | libc::CLONE_NEWUSER),
            pid => pid,
        },
    };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid != 0 {
        return Child(pid);
    }
    // SAFETY: no conditions; the default action of the signal is to end the process.
    unsafe { libc::alarm(CHILD_SECONDS) };
    let code = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(_) => 101,
    };
    // SAFETY: no conditions. What the parent would do at its exit is the parent's to do.
    unsafe { libc::_exit(code) }
}

/// Forks by the system call, with namespaces of the child's own.
fn clone(namespaces: libc::c_int) -> libc::pid_t {
    let flags = libc::SIGCHLD | namespaces;
    // SAFETY: without a stack and with no flags but the signal and namespaces this is a fork.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    pid as libc::pid_t
}

/// Tells whether this user may make namespaces of process IDs. If not it says so aloud.
pub(super) fn may_make_namespaces() -> bool {
    let may = match clone(libc::CLONE_NEWPID) {
        -1 => clone(libc::CLONE_NEWPID | libc::CLONE_NEWUSER),
        pid => pid,
    };
    match may {
        -1 => {
            let error = std::io::Error::last_os_error();
            eprintln!("SKIPPED: no namespace of process IDs: {error}: run as root");
            false
        }
        // SAFETY: ends the child, which has done nothing.
        0 => unsafe { libc::_exit(0) },
        pid => Child(pid).end() == End::Returned(true),
    }
}

impl Child {
    /// Waits for the end.
    pub(super) fn end(self) -> End {
        let mut status = 0;
        // SAFETY: there is room for the status.
        while unsafe { libc::waitpid(self.0, &raw mut status, 0) } != self.0 {
            let error = std::io::Error::last_os_error();
            assert_eq!(error.kind(), std::io::ErrorKind::Interrupted, "waitpid: {error}");
        }
        if libc::WIFSIGNALED(status) {
            return End::Signal(libc::WTERMSIG(status));
        }
        match libc::WEXITSTATUS(status) {
            0 => End::Returned(true),
            1 => End::Returned(false),
            _ => End::Panicked,
        }
    }
}
