//! Children: made in each way there is, and judged by how they end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use uhmm::{DevicePagemap, PageRange};
use uhmm_linux::Process;

use super::memory::{Backing, Mapping, RW};
use super::rig::{Gpu, TestMirror, is_out};
use super::{alarm, exit_now, fork, stacks};

/// How long a child may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// How a child is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// By fork(2) of the C library.
    Hooked,
    /// By a system call that the C library does not see.
    Raw,
}

/// Both ways.
pub(crate) const WAYS: [How; 2] = [How::Hooked, How::Raw];

/// How a child has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was satisfied.
    Well,
    /// It was not.
    Badly(i32),
    /// A signal ended it.
    Signal(i32),
}

/// Forks, in this way: the number of the child, or `None` in the child.
pub(crate) fn fork_by(how: How) -> Option<u32> {
    match how {
        How::Hooked => fork(),
        How::Raw => {
            // SAFETY: without a stack, and with no flags but the signal, this is a fork. What the C
            // library does not know of the child, tests do not use in it.
            let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
            assert!(pid >= 0, "clone: {}", std::io::Error::last_os_error());
            (pid > 0).then_some(pid as u32)
        }
    }
}

/// Makes a child that does this, and is satisfied or not.
pub(crate) fn child(how: How, body: impl FnOnce() -> bool) -> u32 {
    if let Some(pid) = fork_by(how) {
        return pid;
    }
    alarm(DEADLINE);
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(true) => exit_now(0),
        Ok(false) => exit_now(1),
        Err(_) => exit_now(2),
    }
}

/// Waits for the end of a child.
#[track_caller]
pub(crate) fn end_of(pid: u32) -> End {
    let pid = Pid::from_raw(pid as i32).expect("a process has a number");
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Ok(Some((_, status))) if status.signaled() => {
                return End::Signal(status.terminating_signal().expect("checked just now"));
            }
            Ok(Some((_, status))) => match status.exit_status() {
                Some(0) => return End::Well,
                Some(code) => return End::Badly(code),
                None => {}
            },
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("waitpid: {error}: {}", stacks::of_process(pid_number(pid))),
        }
    }
}

/// Sends a process a signal.
pub(crate) fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a process has a number");
    kill_process(pid, signal).expect("it has not been reaped");
}

fn pid_number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get() as u32
}

/// Words that this process shares with its children.
pub(crate) struct Board(Mapping);

impl Board {
    pub(crate) fn new() -> Board {
        Board(Mapping::new(1, Backing::Shared, RW))
    }

    /// Returns a word.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < 512, "there is one page of them");
        let at = self.0.word(0) as *const AtomicU64;
        // SAFETY: within the page, which is mapped while `self` is borrowed.
        let at = unsafe { at.add(index) };
        // SAFETY: the page is shared memory that is accessed by atomics alone, and zeroes at first.
        unsafe { &*at }
    }

    pub(crate) fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::SeqCst);
    }

    pub(crate) fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::SeqCst)
    }

    pub(crate) fn add(&self, index: usize, value: u64) -> u64 {
        self.word(index).fetch_add(value, Ordering::SeqCst)
    }
}

/// Memory of which each part is somewhere else.
pub(crate) struct Scattered {
    pub(crate) process: Process,
    pub(crate) gpu: Gpu,
    pub(crate) host: Arc<DevicePagemap>,
    pub(crate) mapping: Mapping,
    mirror: TestMirror,
}

impl Scattered {
    /// How many pages each part has.
    pub(crate) const PART: u64 = 8;
    /// How many pages there are.
    pub(crate) const PAGES: u64 = 5 * Scattered::PART;

    pub(crate) fn new(process: &Process) -> Scattered {
        let mapping = Mapping::anonymous(Scattered::PAGES);
        let gpu = Gpu::new(256);
        let host = DevicePagemap::register(process.host_memory(256));
        let mirror = gpu.mirror(process, mapping.range());
        Scattered { process: process.clone(), gpu, host, mapping, mirror }
    }

    /// Ends all but the mapping, and leaves the process to the caller.
    pub(crate) fn into_process(self) -> (Process, Mapping) {
        let Scattered { process, mapping, mirror, gpu, host } = self;
        drop((mirror, gpu, host));
        (process, mapping)
    }

    /// Returns a part: 0 on a copying device, 1 in host memory, 2 held exclusively, 3 at home, and
    /// 4 never touched.
    pub(crate) fn part(&self, part: u64) -> PageRange {
        self.mapping.part(part * Scattered::PART, Scattered::PART)
    }

    /// What page `index` holds when it was filled with this seed.
    pub(crate) fn value(index: u64, seed: u64) -> u64 {
        if index < 4 * Scattered::PART { seed * 1000 + index + 1 } else { 0 }
    }

    /// Stores to all pages but those of the last part.
    pub(crate) fn fill(&self, seed: u64) {
        for index in 0..4 * Scattered::PART {
            self.mapping.poke(index, Scattered::value(index, seed));
        }
    }

    /// Sends each part where it belongs, and returns how many pages are out.
    #[track_caller]
    pub(crate) fn scatter(&self) -> u64 {
        let report = self.process.migrate(self.part(0), &self.gpu.pagemap).run();
        assert_eq!(report.moved, Scattered::PART, "{report:?}");
        let report = self.process.migrate(self.part(1), &self.host).run();
        assert_eq!(report.moved, Scattered::PART, "{report:?}");
        let held = self.mirror.exclusive(self.part(2));
        let held = held.unwrap_or_else(|error| panic!("{error}"));
        assert!(held.is_held());
        // A hold that is leaked lasts until a CPU touches the page.
        std::mem::forget(held);
        let all_out = || self.part(0).iter().all(|page| is_out(&self.process, page));
        // A thread that a signal disturbs while it waits for a page faults once more, and who serves
        // that later finds the page away again, and brings it.
        assert!(super::eventually(|| {
            all_out() || {
                self.process.migrate(self.part(0), &self.gpu.pagemap).run();
                false
            }
        }));
        3 * Scattered::PART
    }

    /// Says what is wrong with the contents, if anything is.
    pub(crate) fn wrong(&self, seed: u64) -> Option<String> {
        (0..Scattered::PAGES).find_map(|index| {
            let found = super::trap::load(self.mapping.word(index));
            let expected = Scattered::value(index, seed);
            (found != Ok(expected)).then(|| format!("page {index}: {found:?}, not {expected}"))
        })
    }

    /// Tells whether the contents are right, and says what is wrong.
    pub(crate) fn is_right(&self, seed: u64) -> bool {
        let wrong = self.wrong(seed);
        if let Some(wrong) = &wrong {
            super::loudly(wrong);
        }
        wrong.is_none()
    }

    #[track_caller]
    pub(crate) fn check(&self, seed: u64) {
        assert_eq!(self.wrong(seed), None);
    }
}
