//! What the tests of live processes share.

#![allow(dead_code, unused_imports, reason = "each test file uses a part of this")]

pub(crate) mod children;
/// The simulation's test device: it is made of what `uhmm` offers to any device.
#[path = "../../../uhmm/tests/model/device.rs"]
pub(crate) mod device;
pub(crate) mod leaks;
pub(crate) mod listener;
pub(crate) mod memory;
mod own_process;
pub(crate) mod rig;
pub(crate) mod stacks;
pub(crate) mod trap;

pub(crate) use own_process::{
    Faults, OwnProcess, alarm, die_with_parent, ends_within, in_own_process, is_own_process, loudly,
};

use std::time::{Duration, Instant};

/// Everything that Rust code allocates here stays where it is; what may move is what tests map.
#[global_allocator]
static ALLOCATOR: uhmm_linux::Allocator = uhmm_linux::Allocator::new();

/// How long a test waits for something that is to come about by itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `done` is true; `false` if it does not come to be so within [`PATIENCE`].
pub(crate) fn eventually(mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::yield_now();
    }
}

/// Calls fork(2) of the C library: the number of the child, or `None` in the child.
///
/// The child has the calling thread alone. What the others were in the middle of stays so, and a
/// lock of theirs is never unlocked.
pub(crate) fn fork() -> Option<u32> {
    // SAFETY: the C library and uhmm see to their own locks. Tests call this when no thread of
    // theirs holds one that the child uses.
    match unsafe { libc::fork() } {
        0 => None,
        pid if pid > 0 => Some(pid as u32),
        _ => panic!("fork: {}", std::io::Error::last_os_error()),
    }
}

/// Ends this process at once: nothing is flushed, dropped or called.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process, whatever it is in the middle of.
    unsafe { libc::_exit(code) }
}

/// Sends this thread a signal.
pub(crate) fn raise(signal: i32) {
    // SAFETY: accesses no memory.
    let result = unsafe { libc::raise(signal) };
    assert_eq!(result, 0, "signal {signal} can be sent");
}
