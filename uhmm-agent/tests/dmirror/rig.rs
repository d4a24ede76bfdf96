//! A process that has opened the device.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use uhmm::{PAGE_SIZE, PageRange};
use uhmm_agent::dmirror::{
    COHERENT_PAGES, Command, Counts, Errno, Mm, NoRoom, OpenFile, Request, Unit, Units,
};

use uhmm_linux::Options;

use super::common::memory::Mapping;

/// Has the tests run with changes announced.
const ANNOUNCED: &str = "UHMM_DMIRROR_ANNOUNCED";

/// The units of a tree of one process.
#[derive(Debug, Default)]
pub(crate) struct OneProcess {
    used: [AtomicU64; 4],
    mm: OnceLock<Weak<Mm>>,
}

impl OneProcess {
    pub(crate) fn used(&self, unit: Unit) -> u64 {
        self.used[usize::from(unit.number())].load(Ordering::SeqCst)
    }
}

impl Units for OneProcess {
    fn reserve(&self, unit: Unit, pages: u64) -> Result<(), NoRoom> {
        let used = &self.used[usize::from(unit.number())];
        let fits = |now: u64| Some(now + pages).filter(|&then| then <= COHERENT_PAGES);
        let done = used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits);
        done.map(drop).map_err(|_| NoRoom { unit, pages })
    }

    fn give_back(&self, unit: Unit, pages: u64) {
        let before = self.used[usize::from(unit.number())].fetch_sub(pages, Ordering::SeqCst);
        assert!(before >= pages, "{pages} pages come back of {before}");
    }

    fn release(&self, unit: Unit) {
        let mm = self.mm.get().and_then(Weak::upgrade).expect("whoever asks for it has it");
        mm.evict(unit);
    }
}

/// This process, with the device.
pub(crate) struct Rig {
    pub(crate) units: Arc<OneProcess>,
    pub(crate) mm: Arc<Mm>,
}

impl Rig {
    pub(crate) fn new() -> Rig {
        let announced = std::env::var_os(ANNOUNCED).is_some_and(|value| value == "1");
        match announced {
            // A child of a process that announces cannot do so itself.
            true => {
                Rig::attach(Options::new().announced(true)).or_else(|_| Rig::attach(Options::new()))
            }
            false => Rig::attach(Options::new()),
        }
        .expect("the process attaches")
    }

    pub(crate) fn attach(options: Options) -> Result<Rig, Errno> {
        let units = Arc::new(OneProcess::default());
        let mm = Mm::attach_with(units.clone(), options)?;
        units.mm.set(Arc::downgrade(&mm)).expect("it is the first");
        Ok(Rig { units, mm })
    }

    pub(crate) fn open(&self, unit: u8) -> OpenFile {
        self.mm.open(Unit::new(unit).expect("a unit")).expect("it opens")
    }

    /// Opens a unit of each sort: 0 and 2.
    pub(crate) fn variants(&self) -> [OpenFile; 2] {
        [self.open(0), self.open(2)]
    }
}

/// Asks for something of a range.
pub(crate) fn ask(
    file: &OpenFile,
    command: Command,
    range: PageRange,
) -> Result<(Counts, Vec<u8>), Errno> {
    let mut output = Vec::new();
    let request = Request { addr: range.address(), npages: range.pages() };
    file.ioctl(command, request, &[], &mut output).map(|counts| (counts, output))
}

/// Has the device store `value(index)` to the words at both ends of each page.
pub(crate) fn store(
    file: &OpenFile,
    range: PageRange,
    value: impl Fn(u64) -> u64,
) -> Result<Counts, Errno> {
    let request = Request { addr: range.address(), npages: range.pages() };
    let mut input = vec![0; range.len() * PAGE_SIZE];
    for (index, page) in input.chunks_exact_mut(PAGE_SIZE).enumerate() {
        let word = value(index as u64).to_ne_bytes();
        page[..8].copy_from_slice(&word);
        page[PAGE_SIZE - 8..].copy_from_slice(&word);
    }
    file.ioctl(Command::Write, request, &input, &mut Vec::new())
}

/// Asks for something that succeeds, and checks the counts: all pages, and so many faults.
#[track_caller]
pub(crate) fn asked(file: &OpenFile, command: Command, range: PageRange, faults: u64) -> Vec<u8> {
    let (counts, output) =
        ask(file, command, range).unwrap_or_else(|error| panic!("{command:?} of {range}: {error}"));
    assert_eq!(counts, Counts { cpages: range.pages(), faults }, "{command:?} of {range}");
    output
}

/// Returns the first word of each page of what the device has loaded.
#[track_caller]
pub(crate) fn words(output: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    output.chunks_exact(PAGE_SIZE).map(|page| word(&page[..8])).collect()
}

/// Has the device load the pages, with so many faults, and returns the first words.
#[track_caller]
pub(crate) fn load(file: &OpenFile, range: PageRange, faults: u64) -> Vec<u64> {
    words(&asked(file, Command::Read, range, faults))
}

/// Moves the pages to the device, all of them, and returns the first words.
#[track_caller]
pub(crate) fn to_dev(file: &OpenFile, range: PageRange) -> Vec<u64> {
    words(&asked(file, Command::MigrateToDev, range, 0))
}

/// Moves pages home, and returns how many.
#[track_caller]
pub(crate) fn to_sys(file: &OpenFile, range: PageRange) -> u64 {
    let (counts, output) = ask(file, Command::MigrateToSys, range).expect("pages come home");
    assert_eq!((counts.faults, output.len()), (0, 0));
    counts.cpages
}

/// Returns what the page table says.
#[track_caller]
pub(crate) fn snapshot(file: &OpenFile, range: PageRange) -> Vec<u8> {
    let output = asked(file, Command::Snapshot, range, 0);
    assert_eq!(output.len(), range.len(), "a byte for each page");
    output
}

/// The words 0, 1, 2, ... plus `base`.
pub(crate) fn counting(base: u64, pages: u64) -> Vec<u64> {
    (base..base + pages).collect()
}

/// Private memory, with the words `base` + index.
#[track_caller]
pub(crate) fn filled(pages: u64, base: u64) -> Mapping {
    let memory = Mapping::anonymous(pages);
    memory.fill(|index| base + index);
    memory
}

/// Loads the first word of each page, as a CPU.
#[track_caller]
pub(crate) fn peeked(memory: &Mapping) -> Vec<u64> {
    (0..memory.range().pages()).map(|index| memory.peek(index)).collect()
}
