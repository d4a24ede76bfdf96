//! Loads and stores that may fault: the CPU's own, with the signal as an answer.
//!
//! An access here is one instruction at a known address. When it raises SIGSEGV or SIGBUS the
//! handler goes on behind it and leaves the signal as its result. So a test accesses memory as any
//! program does, faults and all, and outlives what the mapping does not allow.

use std::arch::global_asm;
use std::fmt;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::TERRITORY;

/// What an access got instead of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trap {
    /// SIGSEGV, `SEGV_MAPERR`: nothing is mapped there.
    Unmapped,
    /// SIGSEGV, `SEGV_ACCERR`: the mapping does not allow it.
    Denied,
    /// SIGSEGV, `SEGV_PKUERR`: the protection key does not allow it.
    Key,
    /// SIGBUS, `BUS_ADRERR`: the mapping has no page there.
    NoPage,
    /// SIGBUS, `BUS_OBJERR`: what has the page does not give it.
    Hardware,
    /// SIGBUS, `BUS_MCEERR_AR`: the page is marked as bad.
    Poisoned,
    /// Another signal or code.
    Other {
        /// The signal.
        signal: u16,
        /// Its code.
        code: u16,
    },
}

/// What an access leaves in the registers that a C function returns two words in.
#[repr(C)]
struct Raw {
    value: u64,
    /// 0, or the signal shifted left by 16 bits, and its code.
    trap: u64,
}

// Each access is the instruction at the label that its name ends in `_at`. Everything before it
// only moves registers, so when the handler sets the trap's register and goes on at the common
// `ret`, the function returns as if the access had been made.
global_asm!(
    ".pushsection .text.uhmm_trap, \"ax\", @progbits",
    ".globl uhmm_trap_load, uhmm_trap_load_at",
    "uhmm_trap_load:",
    "uhmm_trap_load_at: mov rax, [rdi]",
    "xor edx, edx",
    "ret",
    ".globl uhmm_trap_store, uhmm_trap_store_at",
    "uhmm_trap_store:",
    "xor eax, eax",
    "uhmm_trap_store_at: mov [rdi], rsi",
    "xor edx, edx",
    "ret",
    ".globl uhmm_trap_add, uhmm_trap_add_at",
    "uhmm_trap_add:",
    "mov rax, rsi",
    "uhmm_trap_add_at: lock xadd [rdi], rax",
    "xor edx, edx",
    ".globl uhmm_trap_return",
    "uhmm_trap_return: ret",
    ".popsection",
);

// SAFETY: the assembly above defines these with the calling convention of C. What they access is
// the caller's to answer for; the labels are code, and only their addresses are used.
unsafe extern "C" {
    fn uhmm_trap_load(address: u64) -> Raw;
    fn uhmm_trap_store(address: u64, value: u64) -> Raw;
    fn uhmm_trap_add(address: u64, value: u64) -> Raw;
    fn uhmm_trap_load_at();
    fn uhmm_trap_store_at();
    fn uhmm_trap_add_at();
    fn uhmm_trap_return();
}

/// How many signals the handler has seen: those of accesses made here, and any other.
static SIGNALS: AtomicU64 = AtomicU64::new(0);

/// Loads the word at `address`.
pub(crate) fn load(address: u64) -> Result<u64, Trap> {
    install();
    check(address);
    // SAFETY: reads an aligned word of memory that is mapped, or traps; the result is not
    // interpreted. That others write to it is what a machine load is for.
    Raw::result(unsafe { uhmm_trap_load(address) })
}

/// Stores `value` at `address`, which must be within [`TERRITORY`].
pub(crate) fn store(address: u64, value: u64) -> Result<(), Trap> {
    install();
    check(address);
    check_own(address);
    // SAFETY: writes an aligned word where no Rust object lives (`check_own`), or traps.
    Raw::result(unsafe { uhmm_trap_store(address, value) }).map(drop)
}

/// Adds `value` to the word at `address` in one step, and returns what was there. The address must
/// be within [`TERRITORY`].
pub(crate) fn add(address: u64, value: u64) -> Result<u64, Trap> {
    install();
    check(address);
    check_own(address);
    // SAFETY: as for `store`.
    Raw::result(unsafe { uhmm_trap_add(address, value) })
}

/// Returns how many faults have raised a signal in this process since [`install`].
pub(crate) fn signals() -> u64 {
    // Relaxed: asked on the thread that might have got them, or after joining it.
    SIGNALS.load(Ordering::Relaxed)
}

/// Installs the handler, once. A fault of any other code ends the process as if it were not there.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            // SAFETY: all zeroes is a valid `sigaction`.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            // SAFETY: the handler only looks at its arguments and its own statics, and may
            // interrupt anything.
            let result = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
            assert_eq!(result, 0, "a handler can be installed");
        }
    });
}

#[track_caller]
fn check(address: u64) {
    assert!(address.is_multiple_of(8), "{address:#x} is no aligned word");
}

#[track_caller]
fn check_own(address: u64) {
    assert!(TERRITORY.contains(&address), "{address:#x} is not for tests to store to");
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // Relaxed: a count.
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel hands the handler a context that is its own until it returns.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as usize;
    let ours = [
        uhmm_trap_load_at as *const (),
        uhmm_trap_store_at as *const (),
        uhmm_trap_add_at as *const (),
    ];
    if ours.iter().any(|&label| label as usize == at) {
        // SAFETY: as the context.
        let info = unsafe { &*info };
        let (code, errno) = (info.si_code, info.si_errno);
        // The kernel lets nobody send its own codes to another thread; uhmm says by `errno` which it
        // would be.
        let code = match (code, errno) {
            (libc::SI_QUEUE, libc::EIO) => libc::BUS_OBJERR,
            (libc::SI_QUEUE, libc::ENOMEM) => libc::BUS_ADRERR,
            (code, _) => code,
        };
        let trap = (signal as u64) << 16 | u64::from(code as u16);
        registers[libc::REG_RDX as usize] = trap as i64;
        registers[libc::REG_RIP as usize] = uhmm_trap_return as *const () as usize as i64;
        return;
    }
    // Not for us: the access is made again when this returns, and ends the process.
    // SAFETY: may be called in a handler; the default action needs nothing.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

impl Raw {
    fn result(self) -> Result<u64, Trap> {
        const SEGV: u64 = libc::SIGSEGV as u64;
        const BUS: u64 = libc::SIGBUS as u64;
        let (signal, code) = (self.trap >> 16, self.trap as u16);
        Err(match (signal, i32::from(code)) {
            (0, _) => return Ok(self.value),
            (SEGV, 1) => Trap::Unmapped,
            (SEGV, 2) => Trap::Denied,
            (SEGV, 4) => Trap::Key,
            (BUS, libc::BUS_ADRERR) => Trap::NoPage,
            (BUS, libc::BUS_OBJERR) => Trap::Hardware,
            (BUS, libc::BUS_MCEERR_AR) => Trap::Poisoned,
            _ => Trap::Other { signal: signal as u16, code },
        })
    }
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trap::Unmapped => write!(f, "SIGSEGV (SEGV_MAPERR)"),
            Trap::Denied => write!(f, "SIGSEGV (SEGV_ACCERR)"),
            Trap::Key => write!(f, "SIGSEGV (SEGV_PKUERR)"),
            Trap::NoPage => write!(f, "SIGBUS (BUS_ADRERR)"),
            Trap::Hardware => write!(f, "SIGBUS (BUS_OBJERR)"),
            Trap::Poisoned => write!(f, "SIGBUS (BUS_MCEERR_AR)"),
            Trap::Other { signal, code } => write!(f, "signal {signal}, code {code}"),
        }
    }
}
