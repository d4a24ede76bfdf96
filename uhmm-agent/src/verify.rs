//! `--verify` with the software GPU: its view of the program is compared with what the program had.
//!
//! When pages leave, the keeper [notes](Book::note) what is in each: nobody can change a page that is
//! on its way. While they are away the *checker*, a thread, has the GPU mirror the memory around them,
//! enters their translations by range faults, and reads them as a kernel would, through page tables
//! and TLB. What it reads must be what was noted. A page that was damaged in the device's memory, a
//! page in another's place, and a translation that outlives its page are found so; and the GPU by
//! itself notices accesses to memory that is free or leaving.
//!
//! # When the two must be the same
//!
//! The program goes on meanwhile. A page may come home, be written to and leave again, be unmapped,
//! or be moved to another address. So a reading counts only if
//!
//! * the page table has the same translation before and after it, to a frame of the GPU in the same
//!   use ([`Stamp`](uhmm_devices::gpu::Stamp)): then the page has not left that frame;
//! * the note is the same before and after it;
//! * the program had moved no mapping since the note, as far as the kernel has told, and it tells
//!   before such a page is to be found at its new address. A page at another address than that which
//!   it left from has no note, and is not compared until it has left again.
//!
//! Pages at home that are mapped around are read too, and what is there is not compared: that fills
//! the TLB with translations that must be gone when their pages leave.
//!
//! # Locks
//!
//! The book's is held for a few instructions, and nothing is locked, touched or called under it.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use uhmm::{
    Access, Mirror, Order, PAGE_SHIFT, PAGE_SIZE, Page, PageEntry, PageRange, RangeFault, Residency,
};
use uhmm_devices::gpu::{Context, KernelFault, SoftGpu, Target, Translation};
use uhmm_linux::Process;

use crate::edge::process::start_thread;

/// How many pages are noted at most: 4 GiB of them. When there are more, all are forgotten, and
/// those that leave from then on are noted.
const MOST_NOTED: usize = 1 << 20;

/// How many pieces of memory are mirrored at a time.
const MIRRORS: usize = 4;

/// How often a piece is read before another one takes its place.
const ROUNDS: u32 = 16;

/// How many pages at home are read of a piece each time.
const AT_HOME: usize = 64;

/// How long a range fault may take. Then the piece is left for the next time.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long the checker rests after each reading of a piece, and where there is nothing to read.
const REST: Duration = Duration::from_micros(500);
const LONG_REST: Duration = Duration::from_millis(20);

/// How many translations the checker's TLBs hold.
pub const TLB_ENTRIES: usize = 1024;

/// What was in pages when they left. See the [module](self).
#[derive(Debug, Default)]
pub struct Book {
    notes: Mutex<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    /// By the number of the page.
    pages: BTreeMap<u64, Note>,
    serial: u64,
}

/// What is known of one page that has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    /// Which note: no other has the same.
    serial: u64,
    /// The checksum of what was in the page.
    checksum: u32,
    /// How many blocks had been moved to other addresses then.
    moves: u64,
}

impl Book {
    /// Notes that a page is leaving, and what is in it, while nobody can change that. `moves` is what
    /// [`moves_of`] said before the page was taken.
    pub fn note(&self, page: Page, bytes: &[u8; PAGE_SIZE], moves: u64) {
        let checksum = crc32fast::hash(bytes);
        let mut notes = self.lock();
        if notes.pages.len() >= MOST_NOTED {
            notes.pages.clear();
        }
        notes.serial += 1;
        let serial = notes.serial;
        notes.pages.insert(page.number(), Note { serial, checksum, moves });
    }

    /// Returns what is noted of the pages of `range`.
    fn notes_of(&self, range: PageRange) -> Vec<(Page, Note)> {
        let notes = self.lock();
        let numbers = range.first().number()..=range.last().number();
        let known = notes.pages.range(numbers);
        known.filter_map(|(&number, &note)| Some((Page::new(number)?, note))).collect()
    }

    /// Returns the first noted page after `page`, or else the first of all.
    fn after(&self, page: Page) -> Option<Page> {
        let notes = self.lock();
        let mut later = notes.pages.range((Bound::Excluded(page.number()), Bound::Unbounded));
        let found = later.next().or_else(|| notes.pages.first_key_value())?;
        Page::new(*found.0)
    }

    /// Tells whether `note` is still what is noted of `page`.
    fn has(&self, page: Page, note: Note) -> bool {
        self.lock().pages.get(&page.number()) == Some(&note)
    }

    /// Forgets a note, if it is still the page's.
    fn forget(&self, page: Page, note: Note) {
        let mut notes = self.lock();
        if notes.pages.get(&page.number()) == Some(&note) {
            notes.pages.remove(&page.number());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        // Nothing under it panics half way.
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the checker tells of what it finds.
pub trait Findings: Send + 'static {
    /// So many pages were what they were to be.
    fn confirmed(&self, pages: u64);

    /// A page was not.
    fn differs(&self, what: &str);
}

/// Reads what is away through the page tables of a GPU. See the [module](self).
pub struct Checker<F> {
    process: Process,
    gpu: Arc<SoftGpu>,
    book: Arc<Book>,
    findings: F,
    pieces: Vec<Piece>,
    /// Where the last piece began.
    at: Page,
}

/// A piece of memory that is mirrored: 2 MiB, or what of them is in the address space.
struct Piece {
    // Before the mirror: it goes first.
    context: Context,
    mirror: Mirror<SoftGpu>,
    rounds: u32,
}

impl<F: Findings> Checker<F> {
    /// Makes a checker of what `book` says of `process`, whose pages leave to the memory of `gpu`.
    /// The GPU serves no faults from here on: the checker reads what is mapped, and nothing else.
    pub fn new(process: &Process, gpu: &Arc<SoftGpu>, book: &Arc<Book>, findings: F) -> Checker<F> {
        // Begun and ended: from now on an access without a translation fails, and does not wait.
        drop(gpu.start_service());
        Checker {
            process: process.clone(),
            gpu: Arc::clone(gpu),
            book: Arc::clone(book),
            findings,
            pieces: Vec::new(),
            at: PageRange::ALL.first(),
        }
    }

    /// Starts the thread, which runs for as long as the process. To be called before anything has
    /// moved: on return its stack is reserved. While it reserves that it has locks which a server
    /// needs, and must not find a part of it away.
    ///
    /// # Errors
    ///
    /// `EAGAIN` above all.
    pub fn start(mut self) -> std::io::Result<()> {
        let (reserving, reserved) = mpsc::channel::<()>();
        start_thread("uhmm-checker", move || {
            self.process.reserve_this_thread();
            drop(reserving);
            loop {
                let pause = if self.round() { REST } else { LONG_REST };
                std::thread::sleep(pause);
            }
        })?;
        // Nobody sends anything: it ends when the thread drops its side.
        let _ = reserved.recv();
        Ok(())
    }

    /// Reads each piece once, and tells whether there was anything.
    pub fn round(&mut self) -> bool {
        self.pieces.retain(|piece| piece.rounds < ROUNDS);
        if self.pieces.len() < MIRRORS
            && let Some(piece) = self.next_piece()
        {
            self.pieces.push(piece);
        }
        let mut pieces = std::mem::take(&mut self.pieces);
        for piece in &mut pieces {
            piece.rounds += 1;
            self.read(piece);
        }
        self.pieces = pieces;
        !self.pieces.is_empty()
    }

    /// Mirrors the next piece in which something is away.
    fn next_piece(&mut self) -> Option<Piece> {
        let found = self.book.after(self.at)?;
        let range = found.block(Order::HUGE);
        self.at = range.last();
        if self.pieces.iter().any(|piece| piece.mirror.range() == range) {
            return None;
        }
        let mirror = self.gpu.mirror(self.process.address_space(), range).ok()?;
        let context = self.gpu.context(&mirror).ok()?;
        Some(Piece { context, mirror, rounds: 0 })
    }

    /// Reads what is away of a piece, and some of what is at home.
    fn read(&self, piece: &Piece) {
        let range = piece.mirror.range();
        let noted = self.book.notes_of(range);
        let request = RangeFault::snapshot(range).deadline(Instant::now() + PATIENCE);
        let Ok(faulted) = piece.mirror.range_fault(&request) else { return };
        let mut confirmed = 0;
        for (page, note) in noted {
            let Some(index) = range.index_of(page) else { continue };
            match faulted.entries[index].residency {
                Residency::Device(_) => confirmed += u64::from(self.compare(piece, page, note)),
                Residency::InTransit => {}
                // It came home, or there is no such page any more.
                _ => self.book.forget(page, note),
            }
        }
        if confirmed > 0 {
            self.findings.confirmed(confirmed);
        }
        let at_home = |entry: &PageEntry| {
            entry.access >= Access::Read && matches!(entry.residency, Residency::System(_))
        };
        let mut bytes = [0; PAGE_SIZE];
        let pages = range.iter().zip(&faulted.entries).filter(|(_, entry)| at_home(entry));
        for (page, _) in pages.take(AT_HOME) {
            // Where it has gone meanwhile, there is nothing to be read.
            let _ = load(piece, page, &mut bytes);
        }
    }

    /// Compares a page that is away with its note, and tells whether it could be and was the same.
    fn compare(&self, piece: &Piece, page: Page, note: Note) -> bool {
        let Some(before) = local(piece, page) else { return false };
        let mut bytes = [0; PAGE_SIZE];
        let read = load(piece, page, &mut bytes);
        let same_translation = local(piece, page) == Some(before);
        let moves = moves_of(&self.process);
        if read.is_err() || !same_translation || moves != note.moves || !self.book.has(page, note) {
            return false;
        }
        let found = crc32fast::hash(&bytes);
        if found != note.checksum {
            self.findings.differs(&format!(
                "the software GPU does not see at {page} what was there when it left: it reads a \
                 page with the checksum {found:#010x}, which was {:#010x}, by a translation to \
                 {:?}",
                note.checksum, before.target
            ));
        }
        found == note.checksum
    }
}

/// Returns how many blocks of pages the program has moved to other addresses that were away, or on
/// their way.
pub fn moves_of(process: &Process) -> u64 {
    let happened = process.statistics();
    happened.remapped_out + happened.remapped_in_transit
}

/// Reads a page as a kernel does.
fn load(piece: &Piece, page: Page, bytes: &mut [u8; PAGE_SIZE]) -> Result<(), KernelFault> {
    piece.context.run(|view| view.read(page.number() << PAGE_SHIFT, bytes))
}

/// Returns the translation of a page, if it leads to the GPU's own memory.
fn local(piece: &Piece, page: Page) -> Option<Translation> {
    let translation = piece.mirror.inspect(|table| table.translation(page)).ok()??;
    matches!(translation.target, Target::Local(..)).then_some(translation)
}

impl<F> std::fmt::Debug for Checker<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checker").field("pieces", &self.pieces.len()).finish_non_exhaustive()
    }
}
