//! What the kernel knows of a descriptor that a program has passed in, and of the thread that did.
//!
//! All of this may be called in a signal handler: it makes system calls and nothing else.

use core::ffi::{c_int, c_void};
use core::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;

/// Calls `f` with the address of the peer of socket `fd`, where that is a name without a file, less
/// the zero that it begins with. `None` where it has no such peer, or is none.
pub(crate) fn peer_name<R>(fd: c_int, f: impl FnOnce(&[u8]) -> R) -> Option<R> {
    let mut address = MaybeUninit::<libc::sockaddr_un>::zeroed();
    let mut length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: there is room for as many bytes as `length` says.
    let got = unsafe { libc::getpeername(fd, address.as_mut_ptr().cast(), &raw mut length) };
    if got != 0 {
        return None;
    }
    // SAFETY: all zeroes is an address, and so is what the call has written.
    let address = unsafe { address.assume_init() };
    if c_int::from(address.sun_family) != libc::AF_UNIX {
        return None;
    }
    let length =
        usize::try_from(length).ok()?.checked_sub(offset_of!(libc::sockaddr_un, sun_path))?;
    // SAFETY: `c_char` and `u8` have the same size, alignment and values.
    let path: &[u8; 108] = unsafe { &*(&raw const address.sun_path).cast() };
    match path.get(..length)? {
        [0, name @ ..] => Some(f(name)),
        _ => None,
    }
}

/// Returns a number that no other socket has while the system runs (`SO_COOKIE`).
///
/// # Errors
///
/// Those of getsockopt(2).
pub(crate) fn cookie(fd: c_int) -> Result<u64, Errno> {
    let mut value = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    let to: *mut c_void = (&raw mut value).cast();
    // SAFETY: there is room for as many bytes as `length` says.
    let got =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE, to, &raw mut length) };
    if got == 0 { Ok(value) } else { Err(last()) }
}

/// Returns the number that [`set_tag`] has left with the open file.
///
/// # Errors
///
/// Those of getsockopt(2).
pub(crate) fn tag(fd: c_int) -> Result<c_int, Errno> {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as libc::socklen_t;
    let to: *mut c_void = (&raw mut value).cast();
    // SAFETY: there is room for as many bytes as `length` says.
    let got =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PRIORITY, to, &raw mut length) };
    if got == 0 { Ok(value) } else { Err(last()) }
}

/// Leaves a number from 0 to 6 with a socket: its priority, which means nothing where no packets are
/// sent (socket(7)).
///
/// # Errors
///
/// `EPERM` for other numbers.
pub(crate) fn set_tag(fd: BorrowedFd<'_>, value: c_int) -> Result<(), Errno> {
    let from: *const c_void = (&raw const value).cast();
    let length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: `value` has as many bytes.
    let set = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY, from, length)
    };
    if set == 0 { Ok(()) } else { Err(last()) }
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// All signals, blocked in this thread until it is dropped.
#[derive(Debug)]
pub(crate) struct NoSignals {
    before: libc::sigset_t,
    /// What was blocked is that of a thread.
    thread: core::marker::PhantomData<*const ()>,
}

impl NoSignals {
    /// Blocks them.
    pub(crate) fn begin() -> NoSignals {
        NoSignals { before: super::process::block_signals(), thread: core::marker::PhantomData }
    }
}

impl Drop for NoSignals {
    fn drop(&mut self) {
        let before = &raw const self.before;
        // SAFETY: the set is one that `pthread_sigmask` has returned.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, core::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    #[test]
    fn a_socket_says_whom_it_is_connected_to() {
        let name = format!("uhmm-test-{}", std::process::id());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).expect("a short name");
        let (unix, kind, none) = (AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let listener = rustix::net::socket_with(unix, kind, none, None).expect("there is room");
        rustix::net::bind(&listener, &address).expect("it is free");
        rustix::net::listen(&listener, 1).expect("it is bound");
        let socket = rustix::net::socket_with(unix, kind, none, None).expect("there is room");
        let peer = |fd: c_int| peer_name(fd, <[u8]>::to_vec);
        assert_eq!(peer(socket.as_raw_fd()), None, "not connected");
        rustix::net::connect(&socket, &address).expect("somebody listens");
        assert_eq!(peer(socket.as_raw_fd()), Some(name.into_bytes()));
        assert_eq!(peer(-1), None);
        let file = std::fs::File::open("/dev/null").expect("there is one");
        assert_eq!(peer(file.as_raw_fd()), None);
        let again = rustix::io::dup(&socket).expect("there is room");
        assert_eq!(cookie(socket.as_raw_fd()), cookie(again.as_raw_fd()));
        assert_ne!(cookie(socket.as_raw_fd()), cookie(listener.as_raw_fd()));
        use std::os::fd::AsFd as _;
        set_tag(again.as_fd(), 2).expect("a small number");
        assert_eq!(tag(socket.as_raw_fd()), Ok(2));
    }
}
