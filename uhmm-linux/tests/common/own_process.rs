//! One process per test.
//!
//! A test of a live process changes the process it runs in: its mappings, threads and signal
//! handlers, and it may hang in the kernel or die. So each runs in a process of its own: the test
//! starts the program again for itself alone, and judges how that ended.

use std::any::type_name;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::stacks;

/// Names the test that a process was made for.
const MADE_FOR: &str = "UHMM_TEST_IN_OWN_PROCESS";

/// Says that skipping is failing.
const REQUIRE: &str = "UHMM_REQUIRE_UFFD";

/// What a body that has come to its end says last.
const CAME_TO_ITS_END: &str = "the body of the test came to its end";

/// How a test gets a process of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnProcess {
    deadline: Duration,
    faults: Faults,
}

/// Whose faults a userfaultfd has to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    /// No test of userfaultfd at all.
    None,
    /// Those of user-space accesses, which any user may ask for.
    UserModeOnly,
    /// Those of system calls as well.
    All,
}

/// Runs the body in a process of its own. Must be the only thing that the test does.
///
/// ```text
/// #[test]
/// fn pages_come_home() {
///     in_own_process(|| ...);
/// }
/// ```
#[track_caller]
pub(crate) fn in_own_process<F: FnOnce()>(body: F) {
    OwnProcess::new().run(body);
}

impl OwnProcess {
    pub(crate) fn new() -> OwnProcess {
        OwnProcess { deadline: Duration::from_secs(60), faults: Faults::All }
    }

    /// Sets how long the test may take before it counts as hanging.
    pub(crate) fn deadline(self, deadline: Duration) -> OwnProcess {
        OwnProcess { deadline, ..self }
    }

    /// Sets what the test cannot run without.
    pub(crate) fn needs(self, faults: Faults) -> OwnProcess {
        OwnProcess { faults, ..self }
    }

    #[track_caller]
    pub(crate) fn run<F: FnOnce()>(self, body: F) {
        let name = name_of::<F>();
        if std::env::var(MADE_FOR).is_ok_and(|made_for| made_for == name) {
            die_with_parent(self.deadline * 2);
            body();
            // Past the capture of the test harness.
            writeln!(std::io::stdout(), "{CAME_TO_ITS_END}").expect("standard output is a file");
            return;
        }
        if let Some(reason) = unavailable(self.faults) {
            return skip(&name, &reason);
        }
        Running::start(&name).judge(&name, self.deadline);
    }
}

/// Tells whether this process was made for a test.
pub(crate) fn is_own_process() -> bool {
    std::env::var_os(MADE_FOR).is_some()
}

/// Returns how the harness calls the test whose body this is: the path of the function that the
/// closure is in, without the crate.
fn name_of<F>() -> String {
    let path = type_name::<F>();
    let (_, path) = path.split_once("::").expect("a closure is within a crate");
    path.split("::{{closure}}").next().unwrap_or(path).to_owned()
}

/// Says why the test cannot run here.
fn unavailable(faults: Faults) -> Option<String> {
    /// `UFFD_USER_MODE_ONLY` (Linux 5.11).
    const USER_MODE_ONLY: u32 = 1;
    let flags = match faults {
        Faults::None => return None,
        Faults::UserModeOnly => UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY),
        Faults::All => UserfaultfdFlags::empty(),
    };
    // SAFETY: the descriptor is closed at once, and nothing was registered with it.
    let Err(error) = (unsafe { rustix::mm::userfaultfd(flags | UserfaultfdFlags::CLOEXEC) }) else {
        return None;
    };
    if faults == Faults::All && File::open("/dev/userfaultfd").is_ok() {
        return None;
    }
    let remedy = match (error, faults) {
        (Errno::NOSYS, _) => "the kernel was built without CONFIG_USERFAULTFD",
        (_, Faults::All) => {
            "run as root, or `sysctl vm.unprivileged_userfaultfd=1`, or give access to \
             /dev/userfaultfd"
        }
        _ => "a security policy, such as a container's seccomp filter, refuses the system call",
    };
    Some(format!("userfaultfd: {error}: {remedy}"))
}

fn skip(name: &str, reason: &str) {
    let required = std::env::var_os(REQUIRE).is_some_and(|value| value == "1");
    assert!(!required, "{reason} ({REQUIRE}=1)");
    loudly(&format!("SKIPPED {name}: {reason}"));
}

/// Says what was not tested, past the capture of the test harness: a test that did not run must not
/// look as if it had.
pub(crate) fn loudly(what: &str) {
    let message = format!("{what}\n");
    std::io::stderr().write_all(message.as_bytes()).expect("standard error can be written to");
}

/// Sees to it that this process does not outlive the one that judges it, nor hang for ever.
pub(crate) fn die_with_parent(deadline: Duration) {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).expect("prctl");
    alarm(deadline);
}

/// Has this process killed by SIGALRM when it has taken so long.
pub(crate) fn alarm(deadline: Duration) {
    // SAFETY: accesses no memory; the signal's action is the default one.
    unsafe { libc::alarm(deadline.as_secs() as u32) };
}

/// The process of a test.
struct Running {
    child: Child,
    output: File,
}

impl Running {
    fn start(name: &str) -> Running {
        let output = rustix::fs::memfd_create("output", MemfdFlags::CLOEXEC).expect("memfd_create");
        let output = File::from(output);
        let stream = || Stdio::from(output.try_clone().expect("a descriptor"));
        let child = Command::new(std::env::current_exe().expect("a program has a file"))
            .args([name, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
            .env(MADE_FOR, name)
            .stdin(Stdio::null())
            .stdout(stream())
            .stderr(stream())
            // Whatever it starts is ended with it.
            .process_group(0)
            .spawn()
            .expect("the program can be started again");
        Running { child, output }
    }

    #[track_caller]
    fn judge(mut self, name: &str, deadline: Duration) {
        let group = self.child.id();
        let mut complaint = None;
        if !ends_within(group, deadline) {
            let stacks = stacks::of_group(group);
            complaint = Some(format!("it did not end within {deadline:?}:\n{stacks}"));
            kill(group);
        }
        let status = self.child.wait().expect("the process is ours");
        let output = self.output();
        if complaint.is_none() && !status.success() {
            complaint = Some(format!("it ended with {status}"));
        } else if complaint.is_none() && !output.contains(CAME_TO_ITS_END) {
            complaint = Some("it ended before the body of the test did, or never ran it".into());
        } else if complaint.is_none() && !stacks::members(group).is_empty() {
            let stacks = stacks::of_group(group);
            complaint = Some(format!("it left processes behind:\n{stacks}"));
        }
        kill(group);
        match complaint {
            None => print!("{output}"),
            Some(complaint) => panic!("the process of `{name}`: {complaint}\n{output}"),
        }
    }

    fn output(&mut self) -> String {
        let mut bytes = Vec::new();
        self.output.rewind().expect("a file in memory");
        self.output.read_to_end(&mut bytes).expect("a file in memory");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Waits for the end of a process that has not been reaped.
pub(crate) fn ends_within(pid: u32, deadline: Duration) -> bool {
    let pid = Pid::from_raw(pid as i32).expect("a process has a number");
    let process = pidfd_open(pid, PidfdFlags::empty()).expect("it has not been reaped");
    let timeout = Timespec::try_from(deadline).expect("a short time");
    loop {
        let mut polled = [PollFd::new(&process, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(ready) => return ready > 0,
            // The wait begins anew: nobody sends signals here but to end the process.
            Err(Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// Kills every process of a group that this process has made.
fn kill(group: u32) {
    let group = Pid::from_raw(group as i32).expect("a process has a number");
    match kill_process_group(group, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => panic!("the processes of a test cannot be killed: {error}"),
    }
}
