//! The seccomp filter that refuses what destroys memory without a word.
//!
//! Three system calls take contents away, or put something else in their place, and the kernel tells
//! no userfaultfd: `madvise(MADV_GUARD_INSTALL)`, also as
//! `process_madvise`, `shmat(SHM_REMAP)` and `remap_file_pages`. A page
//! that is away would come home after that with what it held before. So they fail with `EINVAL`, as
//! on a kernel that does not know them, and as programs expect.
//!
//! A filter has no listener, survives `fork` and `execve`, and cannot be taken back. One is enough
//! for a tree of processes: whether there is one already is found out by a call that does nothing
//! else.

use std::io;

/// `MADV_GUARD_INSTALL` (Linux 6.13).
const MADV_GUARD_INSTALL: u32 = 102;

/// What tells in a filter which processor's system calls are meant (`linux/audit.h`).
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
/// What tells in a filter which processor's system calls are meant (`linux/audit.h`).
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// Where in `struct seccomp_data` the number of the call is.
const NUMBER: u32 = 0;
/// Where the processor is.
const ARCH: u32 = 4;
/// Where the third argument is, its lower half: both processors are little-endian.
const THIRD: u32 = 32;
/// Where the fourth is.
const FOURTH: u32 = 40;

/// `BPF_LD | BPF_W | BPF_ABS`.
const LOAD: u16 = 0x20;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
const EQUAL: u16 = 0x15;
/// `BPF_JMP | BPF_JSET | BPF_K`.
const ANY_OF: u16 = 0x45;
/// `BPF_RET | BPF_K`.
const RETURN: u16 = 0x06;

/// Installs the filter for the calling thread and those that it makes, unless there is one.
///
/// # Errors
///
/// `EACCES` where the process has neither `CAP_SYS_ADMIN` nor `NO_NEW_PRIVS`, which is never set
/// here: it would break programs that are setuid. `ENOSYS` and `EINVAL` where the kernel has no
/// filters.
pub(crate) fn install() -> io::Result<()> {
    if is_refused() {
        return Ok(());
    }
    let mut filter = program();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).expect("a short program"),
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which lives until it has.
    let installed = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if installed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Tells whether guards are refused: the range is empty, so the kernel does nothing, and refuses
/// only advice that it does not know.
pub(crate) fn is_refused() -> bool {
    // SAFETY: an empty range.
    let advised =
        unsafe { libc::madvise(std::ptr::null_mut(), 0, MADV_GUARD_INSTALL.cast_signed()) };
    advised != 0
}

/// Makes the program.
fn program() -> Vec<libc::sock_filter> {
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let call =
        |number: libc::c_long| u32::try_from(number).expect("system calls are small numbers");
    let refused = libc::SECCOMP_RET_ERRNO | libc::EINVAL.unsigned_abs();
    // Jumps say how many steps are skipped, from the next one on.
    vec![
        /*  0 */ step(LOAD, ARCH, 0, 0),
        // Calls of another kind, of 32 bits, are let through.
        /*  1 */
        step(EQUAL, AUDIT_ARCH, 0, 12),
        /*  2 */ step(LOAD, NUMBER, 0, 0),
        /*  3 */ step(EQUAL, call(libc::SYS_remap_file_pages), 11, 0),
        /*  4 */ step(EQUAL, call(libc::SYS_madvise), 3, 0),
        /*  5 */ step(EQUAL, call(libc::SYS_shmat), 4, 0),
        /*  6 */ step(EQUAL, call(libc::SYS_process_madvise), 5, 0),
        /*  7 */ step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
        /*  8 */ step(LOAD, THIRD, 0, 0),
        /*  9 */ step(EQUAL, MADV_GUARD_INSTALL, 5, 4),
        /* 10 */ step(LOAD, THIRD, 0, 0),
        /* 11 */ step(ANY_OF, libc::SHM_REMAP.cast_unsigned(), 3, 2),
        /* 12 */ step(LOAD, FOURTH, 0, 0),
        /* 13 */ step(EQUAL, MADV_GUARD_INSTALL, 1, 0),
        /* 14 */ step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
        /* 15 */ step(RETURN, refused, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the number of the error, or 0.
    fn errno(failed: bool) -> i32 {
        if failed { io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 }
    }

    /// A filter is of one thread, and for ever: so this one has it.
    #[test]
    fn guards_and_replacing_shared_memory_are_refused_and_nothing_else() {
        std::thread::spawn(|| {
            // SAFETY: sets a flag of this thread.
            let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            assert_eq!(errno(set != 0), 0);
            // SAFETY: makes a segment of one page.
            let segment = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, 0o600) };
            assert!(segment >= 0);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the kernel chooses where.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, rights, flags, -1, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            install().expect("there are filters");
            assert!(is_refused());
            // A second time it is found there.
            install().expect("there is one");

            // SAFETY: nobody uses the page, here and in what follows.
            let guard = unsafe { libc::madvise(at, 4096, MADV_GUARD_INSTALL.cast_signed()) };
            assert_eq!(errno(guard != 0), libc::EINVAL);
            // SAFETY: as above.
            let dropped = unsafe { libc::madvise(at, 4096, libc::MADV_DONTNEED) };
            assert_eq!(errno(dropped != 0), 0);
            // SAFETY: as above.
            let over = unsafe { libc::shmat(segment, at, libc::SHM_REMAP) };
            assert_eq!(errno(over.addr() == usize::MAX), libc::EINVAL);
            // SAFETY: the kernel chooses where.
            let beside = unsafe { libc::shmat(segment, std::ptr::null(), 0) };
            assert_ne!(beside.addr(), usize::MAX);
            // SAFETY: nobody uses it; it goes away with its last user.
            unsafe { libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut()) };
            // SAFETY: it was attached above, and nobody uses it.
            unsafe { libc::shmdt(beside) };
        })
        .join()
        .expect("it is as it says");
    }
}
