//! The answers, against what the kernel says when it is asked to do it.

use super::*;
use crate::sys::child::alone;

#[test]
fn what_this_kernel_has_is_found() {
    // The kernels that this crate needs all have them.
    assert_eq!(populate(), Ok(()));
    for killable in [false, true] {
        let answer = seccomp_notification(killable);
        assert!(matches!(answer, Ok(()) | Err(Errno::NOSYS | Errno::PERM)), "{answer:?}");
    }
}

#[test]
fn that_all_memory_will_be_locked_is_found_out_without_filling_any() {
    alone(
        module_path!(),
        "that_all_memory_will_be_locked_is_found_out_without_filling_any",
        || {
            let locked = || {
                let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
                let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
                line.expect("the kernel counts it").trim().to_owned()
            };
            assert!(!locks_future_mappings());
            // SAFETY: changes where memory is, and none of its contents.
            let result = unsafe { libc::mlockall(libc::MCL_FUTURE) };
            if result != 0 {
                return eprintln!("NOT TESTED: {}", std::io::Error::last_os_error());
            }
            let before = locked();
            assert!(locks_future_mappings());
            assert_eq!(locked(), before, "nothing is left behind");
            // SAFETY: as above.
            assert_eq!(unsafe { libc::munlockall() }, 0);
            assert!(!locks_future_mappings());
        },
    );
}
