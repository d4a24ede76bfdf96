//! seccomp filters of the program's own.

use rustix::io::Errno;

use super::outcome;

/// What becomes of a system call that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It fails.
    Errno(Errno),
    /// The thread that makes it ends.
    KillThread,
    /// The process ends, by SIGSYS.
    KillProcess,
}

/// Whom a filter is installed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread, and those that it makes.
    This,
    /// All there are.
    All,
}

impl Verdict {
    fn bits(self) -> u32 {
        match self {
            Verdict::Errno(errno) => libc::SECCOMP_RET_ERRNO | errno.raw_os_error() as u32,
            Verdict::KillThread => libc::SECCOMP_RET_KILL_THREAD,
            Verdict::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }
}

/// Installs a filter that forbids some system calls. There is no way back.
pub(crate) fn forbid(calls: &[i64], verdict: Verdict, threads: Threads) {
    // The number of the call is the first word that a filter sees.
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = vec![step(LOAD, 0, 0, 0)];
    for &call in calls {
        program.push(step(IF_EQUAL, 0, 1, call as u32));
        program.push(step(RETURN, 0, 0, verdict.bits()));
    }
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: takes numbers, and accesses no memory.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    outcome(privileges.into()).expect("new privileges can be renounced");
    let flags = match threads {
        Threads::This => 0,
        Threads::All => libc::SECCOMP_FILTER_FLAG_TSYNC,
    };
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies the program, which is as long as it says.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    // With TSYNC a positive number would be that of a thread that could not take it.
    assert_eq!(outcome(result), Ok(0), "a filter can be installed");
}
