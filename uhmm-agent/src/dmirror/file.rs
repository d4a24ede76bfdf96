//! One open of a unit, and what can be asked of it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use uhmm::{Access, Mirror, PageRange, RangeFault, Residency};
use uhmm_devices::dmirror::{Dmirror, PageTable};

use super::abi::{self, FAIL_ALLOC};
use super::walk::{self, pieces};
use super::{Command, Counts, Mm, Request, Unit};

/// One open of a unit: its own page table of the address space. Its drop is the close of the file; the
/// unit's pages stay where they are (see [`Mm::evict`](super::Mm::evict)). In a child of the process
/// the drop does nothing.
pub struct OpenFile {
    pub(super) mm: Arc<Mm>,
    pub(super) unit: Unit,
    flags: AtomicU64,
    /// How many forks there had been when the page table was last looked at.
    forks: AtomicU64,
    /// There until the drop.
    mirror: Option<Mirror<Dmirror>>,
}

impl OpenFile {
    pub(super) fn new(mm: Arc<Mm>, unit: Unit, mirror: Mirror<Dmirror>) -> OpenFile {
        let forks = AtomicU64::new(mm.process().forks());
        OpenFile { mm, unit, flags: AtomicU64::new(0), forks, mirror: Some(mirror) }
    }

    /// Returns the unit that this is an open of.
    pub fn unit(&self) -> Unit {
        self.unit
    }

    /// Does what `command` says, in the calling thread. `input` is what [`Command::Write`] writes, as
    /// long as [`Command::input_bytes`] says. On success `output` holds what the caller's pointer is to
    /// receive, and nothing else; on errors it is empty. Whoever hands in the same one again spares the
    /// time to make it.
    ///
    /// Any number of threads may call this at once, while the program does to its memory what it likes.
    ///
    /// # Errors
    ///
    /// As `docs/dmirror.md` lists them for each command.
    pub fn ioctl(
        &self,
        command: Command,
        request: Request,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Counts, Errno> {
        let result = self.obey(command, request, input, output);
        if result.is_err() || !command.has_output() {
            output.clear();
        }
        result
    }

    fn obey(
        &self,
        command: Command,
        request: Request,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Counts, Errno> {
        let range = abi::check(request)?;
        if !self.mm.is_here() {
            return gone(command);
        }
        self.catch_up();
        match command {
            Command::Read => self.read(range, output),
            Command::Write => self.write(range, input),
            Command::MigrateToDev => self.migrate_to_dev(range, output),
            Command::MigrateToSys => self.migrate_to_sys(range),
            Command::Snapshot => self.snapshot(range, output),
            Command::Exclusive => self.exclusive(range, output),
            Command::CheckExclusive => self.check_exclusive(range),
            Command::Release => {
                self.mm.units().release(self.unit);
                Ok(Counts::default())
            }
            Command::Flags => {
                // Relaxed: a number by itself.
                self.flags.store(request.npages, Ordering::Relaxed);
                Ok(Counts::default())
            }
        }
    }

    pub(super) fn mirror(&self) -> &Mirror<Dmirror> {
        self.mirror.as_ref().expect("it is there until the drop")
    }

    /// Looks at the page table; `None` once the address space has ended.
    pub(super) fn table<R>(&self, look: impl FnOnce(&PageTable) -> R) -> Option<R> {
        self.mirror().inspect(look).ok()
    }

    /// Tells whether an allocation is to fail, and if so, lets the next ones succeed.
    pub(super) fn takes_failure(&self) -> bool {
        // Relaxed: a number by itself.
        self.flags.fetch_and(!FAIL_ALLOC, Ordering::Relaxed) & FAIL_ALLOC != 0
    }

    /// Makes the next allocation fail: this one was not made.
    pub(super) fn fail_next(&self) {
        // Relaxed: as above.
        self.flags.fetch_or(FAIL_ALLOC, Ordering::Relaxed);
    }

    /// Has the page table follow what the program has done to its memory so far.
    ///
    /// A fork takes back the right to store to private memory: the pages are shared. Nobody announces
    /// it, and a store goes through all the same, to a copy; but it is a fault by rights.
    fn catch_up(&self) {
        self.mm.catch_up();
        let forks = self.mm.process().forks();
        // Relaxed: whoever comes first does it, and the table has a lock of its own.
        if self.forks.swap(forks, Ordering::Relaxed) == forks {
            return;
        }
        let translated = self.table(|table| table.translated(PageRange::ALL)).unwrap_or_default();
        for (range, _) in translated {
            for piece in pieces(self.mm.process(), range) {
                if piece.mapping.is_none_or(|mapping| mapping.writable && !mapping.shared) {
                    self.table(|table| table.remove(piece.range));
                }
            }
        }
    }

    /// Takes the pages for this open alone.
    fn exclusive(&self, range: PageRange, output: &mut Vec<u8>) -> Result<Counts, Errno> {
        let writable = |piece: walk::Piece| piece.rights() == Access::Write;
        if !pieces(self.mm.process(), range).all(writable) {
            return Err(Errno::BUSY);
        }
        self.bring_home(range, |_| true);
        // What another open of the unit has is not this one's.
        self.end_exclusive_of_others(range);
        self.mirror().range_fault(&RangeFault::atomic(range)).map_err(|_| Errno::BUSY)?;
        self.read_translated(range, output, Errno::BUSY)
    }

    /// Brings home what is on private units, of those that `from` says.
    pub(super) fn bring_home(&self, range: PageRange, from: impl Fn(Unit) -> bool) {
        let units = Unit::ALL.into_iter().filter(|&unit| !unit.is_coherent() && from(unit));
        let away = self.mm.away(range);
        for unit in units {
            let there = away.iter().filter(|(_, at, _)| match at {
                Residency::Device(at) => Some(at.owner) == self.mm.owner(unit),
                _ => false,
            });
            for pages in walk::joined(there.map(|&(pages, ..)| pages)) {
                self.mm.migrate_home(pages);
            }
            self.mm.forget_in_place(unit, range);
        }
    }

    /// Gives back the pages of `range` that are held exclusively, and not in this open's table.
    fn end_exclusive_of_others(&self, range: PageRange) {
        let held = self.mm.away(range).into_iter();
        let held = held.filter(|(_, at, _)| matches!(at, Residency::Exclusive { .. }));
        let own = |pages| self.table(|table| table.has_exclusively(pages)).unwrap_or(false);
        for (pages, ..) in held.filter(|&(pages, ..)| !own(pages)) {
            self.end_exclusive(pages);
        }
    }

    /// Gives back the pages of `range` that any unit holds exclusively.
    pub(super) fn end_exclusive(&self, range: PageRange) {
        self.mm.process().backend().end_exclusive(range, self.mirror().owner());
    }

    fn check_exclusive(&self, range: PageRange) -> Result<Counts, Errno> {
        match self.table(|table| table.has_exclusively(range)) {
            Some(true) => Err(Errno::PERM),
            _ => Ok(Counts::default()),
        }
    }
}

/// Returns what each command says once the address space has ended.
fn gone(command: Command) -> Result<Counts, Errno> {
    match command {
        Command::Read | Command::Write => Err(Errno::FAULT),
        Command::MigrateToDev | Command::MigrateToSys | Command::Snapshot | Command::Exclusive => {
            Err(Errno::INVAL)
        }
        Command::CheckExclusive | Command::Release | Command::Flags => Ok(Counts::default()),
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if !self.mm.is_here() {
            // Its locks may be held by threads that are not in this process.
            std::mem::forget(self.mirror.take());
        }
    }
}

impl fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenFile").field("unit", &self.unit).finish_non_exhaustive()
    }
}
