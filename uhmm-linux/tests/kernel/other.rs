//! Another process, which looks into this one.

use std::ffi::c_void;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;

use super::outcome;
use crate::common::memory::TERRITORY;
use crate::common::{die_with_parent, exit_now, fork};

/// How the other process accesses a word of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum By {
    /// `process_vm_readv` and `process_vm_writev`.
    ProcessVm,
    /// `/proc/PID/mem`, which ignores what mappings allow.
    ProcMem,
}

/// A process that was forked before anything of interest happened, and that does what it is told.
/// It ends with its owner.
#[derive(Debug)]
pub(crate) struct Other {
    socket: Option<UnixStream>,
    pid: u32,
}

const READ: u64 = 0;
const WRITE: u64 = 1;

impl Other {
    /// Forks it. To be called before this process attaches.
    pub(crate) fn new() -> Other {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let parent = std::process::id();
        match fork() {
            Some(pid) => Other { socket: Some(ours), pid },
            None => {
                drop(ours);
                die_with_parent(std::time::Duration::from_secs(120));
                serve(theirs, parent)
            }
        }
    }

    /// Reads a word of this process.
    pub(crate) fn read(&self, by: By, address: u64) -> Result<u64, Errno> {
        self.ask([READ, by as u64, address, 0])
    }

    /// Writes a word of this process, in the territory.
    pub(crate) fn write(&self, by: By, address: u64, value: u64) -> Result<(), Errno> {
        assert!(TERRITORY.contains(&address), "{address:#x} is not for tests to write to");
        self.ask([WRITE, by as u64, address, value]).map(drop)
    }

    fn ask(&self, request: [u64; 4]) -> Result<u64, Errno> {
        let mut socket = self.socket.as_ref().expect("it has not been dropped");
        let bytes = request.map(u64::to_ne_bytes).concat();
        socket.write_all(&bytes).expect("the other process reads");
        let [error, value] = words(&mut socket).expect("the other process answers");
        match error {
            0 => Ok(value),
            error => Err(Errno::from_raw_os_error(error as i32)),
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It reads the end of the file, and ends.
        drop(self.socket.take());
        let mut status = 0;
        // SAFETY: `status` is room for the status of the child, which is reaped once.
        unsafe { libc::waitpid(self.pid as i32, &mut status, 0) };
    }
}

fn words<const N: usize>(socket: &mut &UnixStream) -> Option<[u64; N]> {
    let mut words = [0; N];
    for word in &mut words {
        let mut bytes = [0; 8];
        socket.read_exact(&mut bytes).ok()?;
        *word = u64::from_ne_bytes(bytes);
    }
    Some(words)
}

/// Does what it is told, without allocating: other threads of the parent may have held locks.
fn serve(socket: UnixStream, parent: u32) -> ! {
    while let Some([what, by, address, value]) = words(&mut &socket) {
        let answer = match by {
            by if by == By::ProcessVm as u64 => by_process_vm(what, parent, address, value),
            _ => by_proc_mem(what, parent, address, value),
        };
        let answer = match answer {
            Ok(value) => [0, value],
            Err(error) => [error.raw_os_error() as u64, 0],
        };
        for word in answer {
            if (&socket).write_all(&word.to_ne_bytes()).is_err() {
                exit_now(1);
            }
        }
    }
    exit_now(0)
}

fn by_process_vm(what: u64, parent: u32, address: u64, mut value: u64) -> Result<u64, Errno> {
    let own = (&raw mut value).cast::<c_void>();
    let local = libc::iovec { iov_base: own, iov_len: 8 };
    let theirs = std::ptr::without_provenance_mut(address as usize);
    let remote = libc::iovec { iov_base: theirs, iov_len: 8 };
    let pid = parent as i32;
    let done = match what {
        // SAFETY: reads 8 bytes of the other process into `value`.
        READ => unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) },
        // SAFETY: writes 8 bytes of the other process where the test says that nobody else is.
        _ => unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) },
    };
    outcome(done as i64)?;
    Ok(value)
}

fn by_proc_mem(what: u64, parent: u32, address: u64, value: u64) -> Result<u64, Errno> {
    use rustix::fs::{Mode, OFlags};
    let mut path = [0_u8; 32];
    write!(&mut path[..], "/proc/{parent}/mem").expect("it fits");
    let end = path.iter().position(|&byte| byte == 0).expect("it fits");
    let file = rustix::fs::open(&path[..end], OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = value.to_ne_bytes();
    match what {
        READ => rustix::io::pread(&file, &mut bytes, address)?,
        _ => rustix::io::pwrite(&file, &bytes, address)?,
    };
    Ok(u64::from_ne_bytes(bytes))
}
