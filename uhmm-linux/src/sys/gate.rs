//! A system-call instruction that no filter of ours stops.
//!
//! A seccomp filter cannot tell threads apart, and what serves the announcements of a process is
//! threads of that process. What it can tell is which instruction makes a call. So all calls of our
//! own that change mappings are made by one instruction, and the filter lets that one pass.
//!
//! It is no secret, and need not be: whoever jumps there deceives nobody but itself. After an exec
//! it is somewhere else, or nothing, and a child has it where its parent had it.

use std::ffi::c_void;

use rustix::io::Errno;

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .text.uhmm_gate, \"ax\", @progbits",
    ".hidden uhmm_gate",
    ".globl uhmm_gate",
    ".type uhmm_gate, @function",
    "uhmm_gate:",
    ".cfi_startproc",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "mov r8, r9",
    "mov r9, [rsp + 8]",
    "syscall",
    ".hidden uhmm_gate_after",
    ".globl uhmm_gate_after",
    "uhmm_gate_after:",
    "ret",
    ".cfi_endproc",
    ".size uhmm_gate, . - uhmm_gate",
    ".popsection",
);

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    /// Makes the system call `number`, by the instruction that ends at `uhmm_gate_after`.
    fn uhmm_gate(number: u64, a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> i64;
    fn uhmm_gate_after();
}

/// Returns what a filter sees as the place of the calls that are made here: the address after the
/// instruction. `None` on processors that have none.
pub(crate) fn address() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    return Some(uhmm_gate_after as *const () as u64);
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// Makes a system call that no filter of ours stops, and returns what it returned.
///
/// # Errors
///
/// What the kernel said.
///
/// # Safety
///
/// As for the system call.
pub(crate) unsafe fn call(number: i64, arguments: [u64; 6]) -> Result<u64, Errno> {
    let [a, b, c, d, e, f] = arguments;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the conditions of the call are the caller's.
    let result = unsafe { uhmm_gate(number as u64, a, b, c, d, e, f) };
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the conditions of the call are the caller's.
    let result = match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
        result => result,
    };
    match result {
        -4095..0 => Err(Errno::from_raw_os_error(-result as i32)),
        result => Ok(result as u64),
    }
}

/// madvise(2), by its numbers.
///
/// # Errors
///
/// What the kernel said.
///
/// # Safety
///
/// As for madvise(2): what the advice drops must be nobody's.
pub(super) unsafe fn madvise(at: *mut c_void, bytes: usize, advice: i32) -> Result<(), Errno> {
    let arguments = [at as u64, bytes as u64, advice as u64, 0, 0, 0];
    // SAFETY: the caller's.
    unsafe { call(libc::SYS_madvise, arguments) }.map(drop)
}

/// mprotect(2), by its numbers.
///
/// # Errors
///
/// What the kernel said.
///
/// # Safety
///
/// As for mprotect(2): nobody must count on the rights that end.
pub(super) unsafe fn mprotect(at: *mut c_void, bytes: usize, rights: i32) -> Result<(), Errno> {
    let arguments = [at as u64, bytes as u64, rights as u64, 0, 0, 0];
    // SAFETY: the caller's.
    unsafe { call(libc::SYS_mprotect, arguments) }.map(drop)
}

/// munmap(2).
///
/// # Errors
///
/// What the kernel said.
///
/// # Safety
///
/// As for munmap(2): what is mapped there must be nobody's.
pub(super) unsafe fn munmap(at: *mut c_void, bytes: usize) -> Result<(), Errno> {
    // SAFETY: the caller's.
    unsafe { call(libc::SYS_munmap, [at as u64, bytes as u64, 0, 0, 0, 0]) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_arguments_and_the_result_pass() {
        // SAFETY: maps new memory.
        let at = unsafe {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
            call(libc::SYS_mmap, [0, 8192, 3, flags, u64::MAX, 0])
        };
        let at = at.expect("there is memory") as *mut c_void;
        // SAFETY: it is this test's.
        unsafe { mprotect(at, 4096, libc::PROT_READ) }.expect("it is mapped");
        // SAFETY: it is this test's.
        unsafe { madvise(at, 8192, libc::MADV_DONTNEED) }.expect("it is mapped");
        // SAFETY: it is this test's.
        unsafe { munmap(at, 8192) }.expect("it is mapped");
        // SAFETY: nothing is mapped there.
        assert_eq!(unsafe { madvise(at, 8192, libc::MADV_DONTNEED) }, Err(Errno::NOMEM));
        // The sixth is there too: a file's offset.
        let flags = libc::MAP_PRIVATE as u64;
        // SAFETY: fails.
        let refused = unsafe { call(libc::SYS_mmap, [0, 4096, 1, flags, u64::MAX, 1]) };
        assert_eq!(refused, Err(Errno::INVAL));
    }
}
