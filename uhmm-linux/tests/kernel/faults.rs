//! A userfaultfd of the program's own, with a thread that answers it.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use uhmm::{PAGE_SIZE, PageRange};

use super::outcome;

const API: u64 = 0xc018_aa3f;
const REGISTER: u64 = 0xc020_aa00;
const COPY: u64 = 0xc028_aa03;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

/// What each word of a page holds that a [`Handler`] has filled in, but for the first, which is the
/// page's address.
pub(crate) const FILLING: u64 = 0x0b5e_55ed;

/// A thread that fills missing pages of some memory, each with words that are known: a page cache
/// of the program's own, say.
#[derive(Debug)]
pub(crate) struct Handler {
    uffd: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Handler {
    /// Opens a userfaultfd, without a thread that answers it.
    pub(crate) fn deaf() -> Handler {
        // SAFETY: a descriptor without ranges does nothing to memory.
        let uffd = unsafe {
            rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK)
        };
        let uffd = Arc::new(uffd.expect("the test has asked for a userfaultfd"));
        let mut api = [0xaa_u64, 0, 0];
        call(&uffd, API, &mut api).expect("the handshake");
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"));
        Handler { uffd, stop, answered: Arc::default(), thread: None }
    }

    /// Opens a userfaultfd, and answers it.
    pub(crate) fn new() -> Handler {
        let mut handler = Handler::deaf();
        handler.answer();
        handler
    }

    /// Begins to answer.
    pub(crate) fn answer(&mut self) {
        let (uffd, stop) = (Arc::clone(&self.uffd), Arc::clone(&self.stop));
        let answered = Arc::clone(&self.answered);
        let thread = std::thread::Builder::new().name("own-handler".into());
        let thread = thread.spawn(move || serve(&uffd, &stop, &answered));
        self.thread = Some(thread.expect("a thread can be had"));
    }

    /// Takes over the missing pages of `range`.
    pub(crate) fn register(&self, range: PageRange) -> Result<(), Errno> {
        let bytes = (range.pages() as usize * PAGE_SIZE) as u64;
        call(&self.uffd, REGISTER, &mut [range.address(), bytes, MODE_MISSING, 0])
    }

    /// Returns for how many faults it has filled in a page, or is about to.
    pub(crate) fn answered(&self) -> u64 {
        // Acquire: whoever sees a count sees what the handler did before; partner of the count.
        self.answered.load(Ordering::Acquire)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).expect("an eventfd can be written");
            thread.join().expect("the handler has not panicked");
        }
    }
}

fn serve(uffd: &OwnedFd, stop: &OwnedFd, answered: &AtomicU64) {
    let mut filling = Box::new(Aligned([FILLING; PAGE_SIZE / 8]));
    loop {
        let mut fds = [PollFd::new(uffd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
        let mut message = [0_u64; 4];
        // SAFETY: any bytes are words.
        let bytes = unsafe { message.align_to_mut::<u8>() }.1;
        match rustix::io::read(uffd, bytes) {
            Ok(32) => {}
            Err(Errno::AGAIN) => continue,
            other => panic!("a message has 32 bytes: {other:?}"),
        }
        assert_eq!(message[0] as u8, EVENT_PAGEFAULT, "it has asked for no events");
        let page = message[2] & !(PAGE_SIZE as u64 - 1);
        filling.0[0] = page;
        let source = filling.0.as_ptr() as u64;
        // Before who waits can go on, and look. Release: see `answered`.
        answered.fetch_add(1, Ordering::Release);
        let filled = call(uffd, COPY, &mut [page, source, PAGE_SIZE as u64, 0, 0]);
        assert!(matches!(filled, Ok(()) | Err(Errno::EXIST)), "{page:#x}: {filled:?}");
    }
}

#[repr(C, align(4096))]
struct Aligned([u64; PAGE_SIZE / 8]);

fn call<const N: usize>(uffd: &OwnedFd, number: u64, argument: &mut [u64; N]) -> Result<(), Errno> {
    // SAFETY: each argument here is as long as the number says, and what the calls do to memory is
    // to fill in pages that are missing.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), number, argument.as_mut_ptr()) };
    outcome(result.into()).map(drop)
}

/// Makes a userfaultfd that is not even greeted: it has no meaning but that it is open.
pub(crate) fn open() -> OwnedFd {
    // SAFETY: takes flags, and returns a descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = outcome(fd).expect("the test has asked for a userfaultfd");
    // SAFETY: the kernel has just made it, for us.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}
