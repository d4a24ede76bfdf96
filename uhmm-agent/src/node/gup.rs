//! `/sys/kernel/debug/gup_test`: pages of the caller's are got and pinned, as a driver does.
//!
//! The commands are the ones that get or pin pages and let go of them again at once. What tells whether
//! that works is done by the kernel itself: a plain get is process_vm_readv(2), which pins each page for
//! the time of a copy, after the page was faulted in for writing if that was asked for; a pin for long
//! is a buffer registered with an `io_uring`, which moves pages to where they may stay. Pages of a
//! coherent unit are in system memory as far as the kernel knows, so it is for us to move them.
//!
//! The three commands that keep pins for other tests (`PIN_LONGTERM_TEST_*`) and the one that prints to
//! the kernel's log are not there (`EINVAL`).

use std::time::Instant;

use rustix::io::Errno;
use uhmm::{PAGE_SIZE, PageRange};

use super::agent::AGENT;
use crate::edge::ring::{self, Pinned};
use crate::edge::{copy, populate};

/// The bytes of `struct gup_test`: four 64-bit and eleven 32-bit numbers, and what aligns it.
const BYTES: usize = 80;

/// `_IOWR('g', n, struct gup_test)`, but for the number.
const COMMANDS: u32 = 0xc050_6700;

/// Flags of the request (`FOLL_WRITE`, `FOLL_LONGTERM`).
const WRITE: u32 = 0x1;
const LONGTERM: u32 = 0x100;

const PAGE: u64 = PAGE_SIZE as u64;

/// How a command takes pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// It gets them, for a short time.
    Get,
    /// It pins them.
    Pin,
    /// It pins them for long.
    PinForLong,
}

impl How {
    fn of(number: u32) -> Option<How> {
        match number.checked_sub(COMMANDS)? {
            1 | 4 => Some(How::Get),
            2 | 5 => Some(How::Pin),
            3 => Some(How::PinForLong),
            _ => None,
        }
    }
}

/// A request, as far as it is looked at.
#[derive(Clone, Copy, Debug)]
struct Request {
    address: u64,
    size: u64,
    pages_per_call: u32,
    flags: u32,
}

/// Does an `ioctl(2)` of this node.
///
/// # Errors
///
/// `EINVAL`: there is no such command; `EFAULT`: the structure cannot be reached; `ENOMEM`: it asks for
/// more pages than a machine has. That pages could not be had is no error: the size that is returned
/// ends there.
pub(super) fn ioctl(number: u32, argument: u64) -> Result<(), Errno> {
    let how = How::of(number).ok_or(Errno::INVAL)?;
    let mut bytes = [0_u8; BYTES];
    copy::read(argument, &mut bytes)?;
    let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let half = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let request =
        Request { address: word(16), size: word(24), pages_per_call: half(32), flags: half(36) };
    if request.size > super::call::total_memory() {
        return Err(Errno::NOMEM);
    }
    let began = Instant::now();
    let (pins, reached) = take_all(how, request)?;
    let took = began.elapsed();
    let began = Instant::now();
    drop(pins);
    let gave_back = began.elapsed();
    let micros = |time: core::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let results = [(0, micros(took)), (8, micros(gave_back)), (24, reached)];
    for (at, value) in results {
        bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }
    copy::write(argument, &bytes)
}

/// Takes the pages, as many in a call as was asked for, until some cannot be had. Returns what holds
/// them, and how many bytes were gone through: with the call that failed, as the kernel counts.
fn take_all(how: How, request: Request) -> Result<(Vec<Pinned>, u64), Errno> {
    let Request { address, size, pages_per_call, flags } = request;
    let (mut pins, mut reached) = (Vec::new(), 0);
    let step = u64::from(pages_per_call) * PAGE;
    while reached < size {
        if step == 0 {
            // No page in a call: it gets none, and ends.
            break;
        }
        let bytes = step.min(size - reached);
        let start = address.wrapping_add(reached);
        reached += bytes;
        match take(how, start, bytes / PAGE * PAGE, flags) {
            Ok(pin) => pins.extend(pin),
            // Not the pages' fault: nothing can be pinned here.
            Err(errno @ (Errno::PERM | Errno::NOSYS)) => return Err(errno),
            Err(_) => break,
        }
        if bytes < step {
            break;
        }
    }
    Ok((pins, reached))
}

/// Takes some pages.
fn take(how: How, address: u64, bytes: u64, flags: u32) -> Result<Option<Pinned>, Errno> {
    let for_long = how == How::PinForLong || flags & LONGTERM != 0;
    if for_long && how == How::Get {
        return Err(Errno::INVAL);
    }
    let address = address & !(PAGE - 1);
    let range = PageRange::new(address, bytes).map_err(|_| Errno::FAULT)?;
    let write = flags & WRITE != 0;
    populate::populate(address, bytes, write).map_err(|_| Errno::FAULT)?;
    if for_long && let Some(agent) = AGENT.get() {
        agent.mm().long_term_pin(range);
    }
    if for_long && write {
        if bytes > ring::MOST {
            return Err(Errno::NOMEM);
        }
        return Pinned::new(address, bytes).map(Some);
    }
    // One byte of each page will do.
    let mut byte = [0];
    for page in (address..address + bytes).step_by(PAGE_SIZE) {
        copy::read(page, &mut byte)?;
    }
    Ok(None)
}
