//! What a call is going to change.

use std::ffi::CString;

use mmu_notifier::EventKind;
use rustix::io::Errno;
use smallvec::{SmallVec, smallvec};
use uhmm::mmu_notifier::VaRange;
use uhmm::{PAGE_SIZE, PageRange};

use super::table::Call;
use crate::sys::maps::{Maps, Vma};
use crate::sys::proxy::{self, Common, Named};
use crate::sys::seccomp::Notification;

/// How many separate ranges one call is announced for; more are announced as one.
const MAX_RANGES: usize = 16;

/// The most pieces that process_madvise(2) takes.
const MAX_VECTOR: u64 = 1024;

/// A call, and what it is going to change.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) kind: EventKind,
    pub(super) ranges: SmallVec<[PageRange; 2]>,
    /// What it is made with.
    pub(super) arguments: [u64; 6],
    /// What the arguments point to, or name, of our own.
    _kept: Kept,
    /// Whether the thread has to make it, for want of what it alone has.
    pub(super) by_thread: bool,
}

#[derive(Debug)]
#[allow(dead_code, reason = "kept, and not looked at")]
enum Kept {
    Nothing,
    File(Named),
    Words(Vec<u64>),
    Path(CString),
}

/// Returns the pages that hold any of `bytes` bytes at `address`; none for no bytes, and where the
/// kernel is going to refuse.
fn span(address: u64, bytes: u64) -> Option<PageRange> {
    let last = address.checked_add(bytes.checked_sub(1)?)?;
    VaRange::from_bounds(address, last).map(PageRange::covering)
}

impl Change {
    fn new(kind: EventKind, call: &Notification, ranges: SmallVec<[PageRange; 2]>) -> Change {
        let arguments = call.arguments;
        Change { kind, ranges, arguments, _kept: Kept::Nothing, by_thread: false }
    }

    fn of(kind: EventKind, call: &Notification, address: u64, bytes: u64) -> Change {
        Change::new(kind, call, span(address, bytes).into_iter().collect())
    }

    /// Finds out what `call` is going to change.
    ///
    /// # Errors
    ///
    /// What the call fails with, without being made.
    pub(super) fn find(what: Call, call: &Notification) -> Result<Change, Errno> {
        let [a, b, c, d, e, _] = call.arguments;
        Ok(match what {
            Call::Munmap | Call::RemapFilePages => Change::of(EventKind::Unmap, call, a, b),
            Call::Mprotect | Call::PkeyMprotect => Change::of(EventKind::ProtectionVma, call, a, b),
            Call::Madvise => Change::of(EventKind::Clear, call, a, b),
            Call::Mremap => {
                let mut change = Change::of(EventKind::Unmap, call, a, b);
                if d & libc::MREMAP_FIXED as u64 != 0 {
                    change.ranges.extend(span(e, c));
                }
                change
            }
            Call::Mmap => {
                let mut change = Change::of(EventKind::Unmap, call, a, b);
                if d & libc::MAP_ANONYMOUS as u64 == 0 {
                    change.name_file(call, 4)?;
                }
                change
            }
            Call::Brk => {
                let now = proxy::make(libc::SYS_brk, [0; 6])?;
                let first = a.next_multiple_of(PAGE_SIZE as u64);
                Change::of(EventKind::Unmap, call, first, now.saturating_sub(first))
            }
            Call::Shmat => {
                // The segment is one that this thread may attach, by a number that is its own.
                if !proxy::is_alike(call.thread) {
                    return Err(Errno::ACCESS);
                }
                let bytes = proxy::segment_bytes(a as i32)?;
                Change::of(EventKind::Unmap, call, b & !(PAGE_SIZE as u64 - 1), bytes)
            }
            Call::Shmdt => Change::new(EventKind::Unmap, call, attached(a)?),
            Call::ProcessMadvise => vector(call, b, c)?,
            Call::Ftruncate => {
                let mut change = Change::new(EventKind::Clear, call, SmallVec::new());
                let inode = change.name_file(call, 0)?;
                change.ranges = of_file(inode, b, u64::MAX)?;
                change
            }
            Call::Fallocate => {
                let mut change = Change::new(EventKind::Clear, call, SmallVec::new());
                let inode = change.name_file(call, 0)?;
                // To cut a piece out or to put one in moves all that follows.
                let moves = b & 0x28 != 0;
                let end = if moves { u64::MAX } else { c.saturating_add(d) };
                change.ranges = of_file(inode, c, end)?;
                change
            }
            Call::Truncate => path(call)?,
        })
    }

    /// Has argument `index`, a descriptor of the thread's, name the same file for the calling thread,
    /// and returns that file's inode.
    fn name_file(&mut self, call: &Notification, index: usize) -> Result<u64, Errno> {
        let named = Named::by(call.thread, call.arguments[index] as i32)?;
        let inode = named.inode()?;
        self.arguments[index] = named.number() as u64;
        self._kept = Kept::File(named);
        Ok(inode)
    }
}

/// process_madvise(2): with a copy of the vector, which the program may change meanwhile.
fn vector(call: &Notification, at: u64, pieces: u64) -> Result<Change, Errno> {
    if pieces > MAX_VECTOR {
        return Err(Errno::INVAL);
    }
    let words = proxy::read_words(at, 2 * pieces as usize)?;
    let spans = words.chunks_exact(2).filter_map(|piece| span(piece[0], piece[1]));
    let mut change = Change::new(EventKind::Clear, call, few(spans));
    change.arguments[1] = words.as_ptr() as u64;
    change._kept = Kept::Words(words);
    Ok(change)
}

/// truncate(2): with a copy of the path, where the thread has the same directories and the same rights.
fn path(call: &Notification) -> Result<Change, Errno> {
    let path = proxy::read_path(call.arguments[0])?;
    let inode = proxy::inode_at(&path);
    let mut change = Change::new(EventKind::Clear, call, SmallVec::new());
    if let Ok(inode) = inode {
        change.ranges = of_file(inode, call.arguments[1], u64::MAX)?;
    }
    if !proxy::shares(call.thread, Common::FileSystem) || !proxy::is_alike(call.thread) {
        change.by_thread = true;
        return Ok(change);
    }
    change.arguments[0] = path.as_ptr() as u64;
    change._kept = Kept::Path(path);
    Ok(change)
}

/// Collects ranges; many as one that covers them.
fn few(ranges: impl Iterator<Item = PageRange>) -> SmallVec<[PageRange; 2]> {
    let all: SmallVec<[PageRange; 2]> = ranges.collect();
    if all.len() <= MAX_RANGES {
        return all;
    }
    let first = all.iter().map(|range| range.first()).min().expect("there are some");
    let last = all.iter().map(|range| range.last()).max().expect("there are some");
    smallvec![PageRange::from_bounds(first, last).expect("in order")]
}

/// Finds where the bytes from `from` to `end` of a file are mapped. Files of other file systems with
/// an inode of the same number are found too: what is announced for nothing is faulted in again.
fn of_file(inode: u64, from: u64, end: u64) -> Result<SmallVec<[PageRange; 2]>, Errno> {
    let parts =
        Maps::open()?.all()?.into_iter().filter(|vma| vma.inode == inode).filter_map(|vma| {
            let bytes = vma.range.pages() * PAGE_SIZE as u64;
            let first = from.saturating_sub(vma.offset).min(bytes);
            let past = end.saturating_sub(vma.offset).min(bytes);
            span(vma.range.address() + first, past.saturating_sub(first))
        });
    Ok(few(parts))
}

/// Finds what shmdt(2) of `address` unmaps: the mappings of the segment from there on.
fn attached(address: u64) -> Result<SmallVec<[PageRange; 2]>, Errno> {
    let all = Maps::open()?.all()?;
    let is_first = |vma: &&Vma| vma.range.address() == address && vma.inode != 0;
    let Some(inode) = all.iter().find(is_first).map(|vma| vma.inode) else {
        return Ok(SmallVec::new());
    };
    let parts = all.iter().filter(|vma| vma.inode == inode && vma.range.address() >= address);
    Ok(few(parts.map(|vma| vma.range)))
}
