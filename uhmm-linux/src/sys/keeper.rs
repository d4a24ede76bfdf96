//! A process that answers for a process that is gone.
//!
//! A filter with a listener outlives the process that listens: children have it, and the program that
//! an exec puts in its place. When the last descriptor of the listener is closed their calls fail
//! (`ENOSYS`); while one is open and nobody answers they wait. So there is somebody who answers: the
//! *keeper*, a process of a few hundred instructions with a page of its own and nothing else, that is
//! not filtered itself. While the listening process lives it does nothing. When that has ended, or
//! has become another program, it lets every call through, first those that had been received and not
//! answered, and it ends when nobody is left who has the filter.
//!
//! How it knows:
//!
//! * The listening process has a thread with descriptors of its own, which holds a lock on a file
//!   (`F_SETLK`) that only it and the keeper have. Such a lock belongs to the table of descriptors. No
//!   child inherits it, nothing that other threads close ends it, and it ends with the thread, be it
//!   by an exit, a signal or an exec. The keeper waits for the lock.
//! * The same file has the calls that were received, each in the slot of its receiver. The kernel
//!   itself writes them there. A receiver that is killed in the middle may still write, so the keeper
//!   looks again for some seconds.
//! * The kernel says of the listener (`POLLHUP`, Linux 5.8) that nobody is left.
//!
//! The keeper is no child that the program could wait for, and has nothing of its: no memory, no
//! descriptors, no terminal, another session. Who kills it takes from the *children* what keeps them
//! going when their parent has ended, and from nobody else anything.

use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use super::seccomp::{Notification, Slot};

/// How many receivers have a slot.
pub(crate) const SLOTS: usize = 16;
/// How many bytes apart they are.
const STRIDE: usize = 128;
const BOARD_BYTES: usize = 4096;

/// Where the keeper is loaded.
const BASE: u64 = 0x40_0000;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const STACK: usize = 16 << 10;

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .rodata.uhmm_keeper, \"a\", @progbits",
    ".balign 8",
    ".hidden uhmm_keeper_begin",
    ".globl uhmm_keeper_begin",
    "uhmm_keeper_begin:",
    // A session of its own, and no folder of anybody's.
    "mov eax, {setsid}",
    "syscall",
    "lea rdi, [rip + 90f]",
    "mov eax, {chdir}",
    "syscall",
    // The listener comes by the socket; the end of the file says that there will be none.
    "lea rax, [rip + 95f]",
    "mov [rip + 94f + 16], rax",
    "lea rax, [rip + 96f]",
    "mov [rip + 94f + 32], rax",
    "lea rax, [rip + 98f]",
    "mov [rip + 95f], rax",
    "20:",
    "mov edi, [rip + 92f]",
    "lea rsi, [rip + 94f]",
    "xor edx, edx",
    "mov eax, {recvmsg}",
    "syscall",
    "cmp rax, -4",
    "je 20b",
    "cmp rax, 1",
    "jne 80f",
    "mov eax, [rip + 96f + 16]",
    "mov [rip + 97f], eax",
    // The lock.
    "21:",
    "mov edi, [rip + 91f]",
    "mov esi, {setlkw}",
    "lea rdx, [rip + 93f]",
    "mov eax, {fcntl}",
    "syscall",
    "cmp rax, -4",
    "je 21b",
    "test rax, rax",
    "jnz 80f",
    // What was received and not answered.
    "22:",
    "xor r12d, r12d",
    "23:",
    "mov edi, [rip + 91f]",
    "lea rsi, [rip + 89f]",
    "mov edx, 8",
    "mov r10, r12",
    "imul r10, r10, {stride}",
    "mov eax, {pread}",
    "syscall",
    "cmp rax, 8",
    "jne 24f",
    "cmp qword ptr [rip + 89f], 0",
    "je 24f",
    "call 70f",
    "24:",
    "inc r12d",
    "cmp r12d, {slots}",
    "jb 23b",
    // What is still to come.
    "30:",
    "lea rdi, [rip + 97f]",
    "mov esi, 1",
    "mov edx, [rip + 87f]",
    "mov eax, {poll}",
    "syscall",
    "test eax, eax",
    "jz 40f",
    "js 30b",
    "test word ptr [rip + 97f + 6], 0x38",
    "jnz 80f",
    "lea rdi, [rip + 99f]",
    "mov ecx, 10",
    "xor eax, eax",
    "rep stosq",
    "mov edi, [rip + 97f]",
    "mov esi, {receive}",
    "lea rdx, [rip + 99f]",
    "mov eax, {ioctl}",
    "syscall",
    "test eax, eax",
    "jnz 30b",
    "mov rax, [rip + 99f]",
    "mov [rip + 89f], rax",
    "call 70f",
    "jmp 30b",
    // Nothing for a while: looks at the slots again, so many times.
    "40:",
    "dec dword ptr [rip + 88f]",
    "jns 22b",
    "mov dword ptr [rip + 87f], -1",
    "jmp 22b",
    // Lets the call through whose number is at 89.
    "70:",
    "mov edi, [rip + 97f]",
    "mov esi, {send}",
    "lea rdx, [rip + 89f]",
    "mov eax, {ioctl}",
    "syscall",
    "ret",
    "80:",
    "xor edi, edi",
    "mov eax, {exit_group}",
    "syscall",
    ".balign 8",
    // How many milliseconds between looks, how many looks, and the response: id, 0, 0, continue.
    "87: .long 200",
    "88: .long 25",
    "89: .quad 0, 0",
    ".long 0, 1",
    "90: .asciz \"/\"",
    ".balign 8",
    ".hidden uhmm_keeper_lock",
    ".globl uhmm_keeper_lock",
    "uhmm_keeper_lock:",
    "91: .long -1",
    ".hidden uhmm_keeper_socket",
    ".globl uhmm_keeper_socket",
    "uhmm_keeper_socket:",
    "92: .long -1",
    // `struct flock`: a lock for writing, of all of the file.
    "93: .short 1, 0",
    ".long 0",
    ".quad 0, 0",
    ".quad 0",
    // `struct msghdr`, `struct iovec`, and room for one descriptor.
    "94: .quad 0, 0, 0, 1, 0, 24, 0",
    "95: .quad 0, 1",
    "96: .quad 0, 0, 0",
    // `struct pollfd`: the listener, for reading.
    "97: .long -1",
    ".short 1, 0",
    "98: .quad 0",
    "99: .quad 0, 0, 0, 0, 0, 0, 0, 0, 0, 0",
    ".hidden uhmm_keeper_end",
    ".globl uhmm_keeper_end",
    "uhmm_keeper_end:",
    ".popsection",
    setsid = const libc::SYS_setsid,
    chdir = const libc::SYS_chdir,
    recvmsg = const libc::SYS_recvmsg,
    fcntl = const libc::SYS_fcntl,
    setlkw = const libc::F_SETLKW,
    pread = const libc::SYS_pread64,
    poll = const libc::SYS_poll,
    ioctl = const libc::SYS_ioctl,
    exit_group = const libc::SYS_exit_group,
    receive = const super::seccomp::NOTIF_RECV,
    send = const super::seccomp::NOTIF_SEND,
    stride = const STRIDE,
    slots = const SLOTS,
);

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    static uhmm_keeper_begin: u8;
    static uhmm_keeper_end: u8;
    static uhmm_keeper_lock: u8;
    static uhmm_keeper_socket: u8;
}

/// The file that the keeper looks at: the slots of receivers. Mapped for as long as the process lives.
#[derive(Debug)]
pub(crate) struct Board {
    file: OwnedFd,
    slots: &'static [Padded; SLOTS],
}

/// A slot, and room up to the next.
#[repr(C, align(128))]
#[derive(Debug)]
struct Padded(core::cell::UnsafeCell<Notification>);

// SAFETY: each slot is given to one receiver (`Board::slot`), and nobody else here looks at it.
unsafe impl Sync for Padded {}

const _: () = assert!(size_of::<Padded>() == STRIDE && SLOTS * STRIDE <= BOARD_BYTES);

impl Board {
    /// Makes the file and maps it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `EMFILE`, `ENFILE`.
    pub(crate) fn new() -> Result<Board, Errno> {
        let file = rustix::fs::memfd_create("uhmm-board", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, BOARD_BYTES as u64)?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: maps the file where there is room, in memory that nobody has.
        let at = unsafe {
            let (null, shared) = (core::ptr::null_mut(), MapFlags::SHARED);
            rustix::mm::mmap(null, BOARD_BYTES, rights, shared, &file, 0)
        }?;
        // SAFETY: it is mapped for good, as long as said, and zeroes are slots. The keeper only reads.
        let slots = unsafe { &*at.cast::<[Padded; SLOTS]>() };
        Ok(Board { file, slots })
    }

    /// Returns the slot of receiver `index`, who alone may have it.
    pub(crate) fn slot(&self, index: usize) -> Slot<'_> {
        Slot(&self.slots[index].0)
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd as _;
        self.file.as_fd()
    }

    /// Takes the lock on the file, on behalf of the calling thread's table of descriptors.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if somebody has it.
    pub(crate) fn lock(&self) -> Result<(), Errno> {
        // SAFETY: all zeroes is a lock of the whole file.
        let mut lock: libc::flock = unsafe { core::mem::zeroed() };
        lock.l_type = libc::F_WRLCK as i16;
        // SAFETY: the kernel reads the lock.
        match unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLK, &raw const lock) } {
            0 => Ok(()),
            _ => Err(last_error()),
        }
    }
}

/// Starts the keeper. It does nothing until it is [told](Keeper::hand_over) of a listener, and ends
/// if it never is.
#[derive(Debug)]
pub(crate) struct Keeper(OwnedFd);

impl Keeper {
    /// Starts the process. The calling thread must hold the board's lock.
    ///
    /// # Errors
    ///
    /// `ENOSYS` where there is none for this processor; `EACCES` where files in memory may not be
    /// executed (`vm.memfd_noexec`); `EAGAIN`, `ENOMEM`.
    pub(crate) fn start(board: &Board) -> Result<Keeper, Errno> {
        let (ours, its) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let program = executable(&image(board.file().as_raw_fd(), its.as_raw_fd())?)?;
        spawn(&program, &[board.file().as_raw_fd(), its.as_raw_fd()])?;
        Ok(Keeper(ours))
    }

    /// Gives it the listener, which it keeps open from now on.
    ///
    /// # Errors
    ///
    /// `EPIPE` if it has been ended.
    pub(crate) fn hand_over(&self, listener: BorrowedFd<'_>) -> Result<(), Errno> {
        let fds = [listener];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::NOBUFS);
        }
        let byte = [std::io::IoSlice::new(&[0])];
        rustix::net::sendmsg(&self.0, &byte, &mut control, SendFlags::NOSIGNAL).map(drop)
    }
}

/// Makes the program: a header, one segment, and where its descriptors are.
#[cfg(target_arch = "x86_64")]
fn image(lock: i32, socket: i32) -> Result<Vec<u8>, Errno> {
    let begin = &raw const uhmm_keeper_begin;
    let at = |symbol: *const u8| symbol.addr() - begin.addr();
    let length = at(&raw const uhmm_keeper_end);
    // SAFETY: the two symbols are the ends of one piece of constant data.
    let code = unsafe { core::slice::from_raw_parts(begin, length) };
    let mut code = code.to_vec();
    let mut patch = |symbol: *const u8, fd: i32| {
        code[at(symbol)..][..4].copy_from_slice(&fd.to_le_bytes());
    };
    patch(&raw const uhmm_keeper_lock, lock);
    patch(&raw const uhmm_keeper_socket, socket);
    let headers = ELF_HEADER + PROGRAM_HEADER;
    let mut image = Vec::with_capacity(headers + length);
    let mut word = |value: u64, bytes: usize| {
        image.extend_from_slice(&value.to_le_bytes()[..bytes]);
    };
    // elf(5): the identification (64 bits, little end first, version 1), the type (executable), the
    // machine (x86-64), the version, the entry, where the program headers are and how large.
    word(0x0001_0102_464c_457f, 8);
    word(0, 8);
    for (value, bytes) in [(2, 2), (62, 2), (1, 4)] {
        word(value, bytes);
    }
    word(BASE + headers as u64, 8);
    word(ELF_HEADER as u64, 8);
    word(0, 8);
    for (value, bytes) in
        [(0, 4), (ELF_HEADER, 2), (PROGRAM_HEADER, 2), (1, 2), (0, 2), (0, 2), (0, 2)]
    {
        word(value as u64, bytes);
    }
    // One segment to load, for reading, storing and executing.
    let total = (headers + length) as u64;
    for (value, bytes) in
        [(1, 4), (7, 4), (0, 8), (BASE, 8), (BASE, 8), (total, 8), (total, 8), (4096, 8)]
    {
        word(value, bytes);
    }
    image.extend_from_slice(&code);
    Ok(image)
}

#[cfg(not(target_arch = "x86_64"))]
fn image(_lock: i32, _socket: i32) -> Result<Vec<u8>, Errno> {
    Err(Errno::NOSYS)
}

/// Makes a file in memory that can be executed.
fn executable(image: &[u8]) -> Result<OwnedFd, Errno> {
    // MFD_EXEC, Linux 6.3; before, all were.
    let may_run = MemfdFlags::from_bits_retain(0x10);
    let name = "uhmm-keeper";
    let file = match rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | may_run) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC),
        file => file,
    }?;
    let mut rest = image;
    while !rest.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, rest))?;
        rest = &rest[written..];
    }
    Ok(file)
}

/// What the two processes on the way to the keeper are told.
struct Order {
    program: c_int,
    kept: [c_int; 2],
    stack: *mut c_void,
    /// What went wrong.
    error: AtomicI32,
}

/// Starts `program` as nobody's child, with the descriptors `kept` of this thread's.
///
/// A process between here and there, which ends at once, makes it the child of whoever adopts
/// orphans. That one tells nobody of its end: it has no signal for it, and is waited for by its
/// number. Both run on this process's memory, while the calling thread waits (`CLONE_VFORK`).
fn spawn(program: &OwnedFd, kept: &[c_int; 2]) -> Result<(), Errno> {
    let mut stacks = vec![0_u128; 2 * STACK / 16];
    let bottom = stacks.as_mut_ptr().cast::<u8>();
    // SAFETY: within the stacks.
    let middle = unsafe { bottom.add(STACK) };
    // SAFETY: one past them.
    let top = unsafe { bottom.add(2 * STACK) };
    let order = Order {
        program: program.as_raw_fd(),
        kept: *kept,
        stack: middle.cast(),
        error: AtomicI32::new(0),
    };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    let argument = (&raw const order).cast_mut().cast();
    // SAFETY: the stack is this call's and lives until the process has ended or executes; `between`
    // makes system calls alone.
    let pid = unsafe { libc::clone(between, top.cast(), flags, argument) };
    if pid < 0 {
        return Err(last_error());
    }
    let mut status = 0;
    // SAFETY: there is room for the status.
    while unsafe { libc::waitpid(pid, &raw mut status, libc::__WCLONE) } < 0
        && last_error() == Errno::INTR
    {}
    // SeqCst: they have ended, or run other memory.
    match order.error.load(Ordering::SeqCst) {
        0 => Ok(()),
        error => Err(Errno::from_raw_os_error(error)),
    }
}

extern "C" fn between(argument: *mut c_void) -> c_int {
    // SAFETY: `spawn` waits until this process has ended.
    let order = unsafe { &*argument.cast::<Order>() };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: as in `spawn`.
    if unsafe { libc::clone(become_keeper, order.stack, flags, argument) } < 0 {
        order.error.store(last_error().raw_os_error(), Ordering::SeqCst);
    }
    // SAFETY: ends this process alone.
    unsafe { libc::_exit(0) }
}

extern "C" fn become_keeper(argument: *mut c_void) -> c_int {
    // SAFETY: `spawn` waits until this process has ended or executes.
    let order = unsafe { &*argument.cast::<Order>() };
    const NAME: &CStr = c"uhmm-keeper";
    for fd in order.kept {
        // SAFETY: takes numbers. The table is this process's own.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    }
    let arguments = [NAME.as_ptr(), core::ptr::null()];
    let environment = [core::ptr::null::<libc::c_char>()];
    // SAFETY: all are lists that end with null. On success nothing of this is left.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            order.program,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    order.error.store(last_error().raw_os_error(), Ordering::SeqCst);
    // SAFETY: ends this process alone.
    unsafe { libc::_exit(127) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
