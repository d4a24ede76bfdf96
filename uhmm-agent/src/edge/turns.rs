//! How soon a thread that has slept gets a processor.

use core::mem::MaybeUninit;

/// The shortest turn that the kernel gives, in nanoseconds.
const SHORTEST: u64 = 100_000;

/// Asks for short turns for the calling thread and for those that it makes from now on: then it gets
/// one sooner after it has slept, where others want the processors too, and no more of them in all
/// (`sched_runtime` of sched_setattr(2), for ordinary threads since Linux 6.12; before that, nothing
/// is different). Where it is refused, turns stay as they are.
pub(crate) fn take_short_turns() {
    let mut attributes = MaybeUninit::<libc::sched_attr>::zeroed();
    let size = size_of::<libc::sched_attr>() as libc::c_uint;
    // SAFETY: there is room for as many bytes as it is told of.
    let told =
        unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attributes.as_mut_ptr(), size, 0) };
    // SAFETY: it was written, or is still zeroes, of which all numbers may be.
    let mut attributes = unsafe { attributes.assume_init() };
    let ordinary = [libc::SCHED_OTHER, libc::SCHED_BATCH].map(libc::c_int::cast_unsigned);
    if told != 0 || !ordinary.contains(&attributes.sched_policy) {
        return;
    }
    attributes.sched_runtime = SHORTEST;
    // SAFETY: it reads the structure, whose size is in it.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_with_short_turns_is_as_ordinary_as_before() {
        let stat = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("/proc is there");
            let fields: Vec<String> = stat.rsplit_once(')').map_or_else(Vec::new, |(_, rest)| {
                rest.split_whitespace().map(str::to_owned).collect()
            });
            // Its niceness, and its policy (proc_pid_stat(5), fields 19 and 41).
            (fields[19 - 3].clone(), fields[41 - 3].clone())
        };
        let before = stat();
        take_short_turns();
        assert_eq!(stat(), before);
    }
}
