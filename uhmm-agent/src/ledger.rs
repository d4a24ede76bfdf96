//! What the supervisor and the agents of a tree of processes tell each other.
//!
//! The supervisor makes the ledger in memory of its own (`memfd_create`), writes down there what it
//! wants, and gives the [location](Ledger::location) to the program by the environment. Each
//! process of the tree opens it, reads the [configuration](Ledger::config), and [takes a
//! slot](Ledger::claim) in which it counts. There is no file to clean up: the ledger is gone when
//! nobody has it mapped.
//!
//! # Concurrency
//!
//! Anybody may be killed at any instruction, so nobody holds a lock. A slot has one *word*, which
//! names its process and its phase:
//!
//! ```text
//!  free ──claim──▶ starting ──▶ attached | not managed ──▶ ended
//!    ▲                │                  │                   │
//!    └── retiring ◀───┴──── process is dead, or executes ────┘
//! ```
//!
//! Each arrow is one compare-and-exchange of that word. The process in the word is the only one
//! that writes the numbers of the slot, until somebody else has made the word `retiring`; it does
//! so for processes that do not exist any more, and a process for the one that it was before it
//! executed another program. While a slot retires the word names who does it, and when that process
//! is killed, the next one goes on: the numbers are moved one by one, each by a swap with zero, so
//! nothing is counted twice.
//!
//! A process that was found dead must be dead: else two would write in one slot. It is known by its
//! number and the time of its start, as `/proc` has them, and only within one process-id namespace:
//! a process of another is not given a slot. What it reads in the ledger nobody trusts further than
//! a number can mislead: lengths are checked, places looked up.

pub(crate) mod layout;
mod numbers;
mod proc;
mod slot;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use self::layout::{Identity, Layout, MAGIC, NOT_SAID, Phase, VERSION, Word};
use crate::edge::mapping::Mapping;

pub use self::layout::{DEVICE_BYTES, SLOTS};
pub use self::numbers::{BUCKETS, Counter, Gauge, Latency, Numbers};
pub use self::slot::Slot;

/// What the supervisor wants of the agents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How much memory all processes may have at home together, in bytes, of what is managed.
    pub budget: u64,
    /// Where pages go: as `--device` had it.
    pub device: OsString,
    /// How it is decided which: as `--policy` had it.
    pub policy: String,
    /// Whether every page is compared with a second copy.
    pub verify: bool,
    /// Whether what programs do to their mappings is announced before it is done.
    pub announced: bool,
    /// How much private memory a process must have before it is managed, in bytes; 0 for at once,
    /// before `main`. The agent chooses if nobody says.
    pub attach_at: Option<u64>,
}

/// The ledger of a tree of processes. Clones are of the same.
#[derive(Clone)]
pub struct Ledger {
    shared: Arc<Shared>,
}

struct Shared {
    layout: Mapping<Layout>,
    /// What keeps the location valid, in the supervisor.
    file: Option<OwnedFd>,
}

/// Of what sort a remark is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoteKind {
    /// Why processes are not managed.
    NotManaged,
    /// Something that the user should know.
    Warning,
}

/// A remark, and how often it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Of what sort.
    pub kind: NoteKind,
    /// What was said.
    pub text: String,
    /// How often.
    pub count: u64,
}

/// How far a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It has taken a slot.
    Starting,
    /// It is managed.
    Attached,
    /// It is not, for this reason.
    NotManaged(String),
    /// It has ended.
    Ended,
}

/// What is known of a process that is in the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: u32,
    /// The name of its program.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// What it counted.
    pub numbers: Numbers,
}

/// What there is at one moment, of all processes together, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stock {
    /// Memory that is managed and at home. The budget is a limit on this.
    pub resident: u64,
    /// Memory that is on the device.
    pub away: u64,
    /// What the device keeps for that.
    pub stored: u64,
    /// Of what is away, pages of zeroes.
    pub zero: u64,
    /// Of what is away, pages that repeat one word.
    pub same_filled: u64,
    /// Of what is away, pages that compression gains nothing on.
    pub incompressible: u64,
    /// What the agents take.
    pub agent: u64,
    /// How many processes are attached.
    pub attached: u64,
}

/// What all processes counted, those that have ended among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many processes took a slot. One that executes another program counts once more.
    pub started: u64,
    /// How many of them attached.
    pub attached: u64,
    /// How many found no slot, and were not managed.
    pub without_slot: u64,
    /// The most that was at home and away together, in bytes, as
    /// [`take_stock`](Ledger::take_stock) saw it: what the tree would have needed.
    pub demand_peak: u64,
    /// The most that was at home while the tree was warm, in bytes: from when it was first brought
    /// within its budget, except from when a process joins or forks until it is brought so again.
    pub warm_peak: u64,
    /// What there was when the most was away that [`take_stock`](Ledger::take_stock) saw, without
    /// the number of processes.
    pub most_away: Stock,
    /// The numbers.
    pub numbers: Numbers,
    /// The remarks.
    pub notes: Vec<Note>,
    /// How many remarks there was no room for.
    pub notes_lost: u64,
}

impl Stock {
    fn new(gauges: &[u64; Gauge::COUNT], attached: u64) -> Stock {
        let gauge = |gauge: Gauge| gauges[gauge as usize];
        Stock {
            resident: gauge(Gauge::Resident),
            away: gauge(Gauge::Away),
            stored: gauge(Gauge::Stored),
            zero: gauge(Gauge::Zero),
            same_filled: gauge(Gauge::SameFilled),
            incompressible: gauge(Gauge::Incompressible),
            agent: gauge(Gauge::Agent),
            attached,
        }
    }
}

impl Ledger {
    /// Makes a ledger. The caller must keep it for as long as processes are to open it.
    ///
    /// # Errors
    ///
    /// `InvalidInput` where the device or the policy is too long ([`DEVICE_BYTES`], 256 bytes),
    /// else what the system said: no memory, no descriptor, no `/proc`.
    pub fn create(config: &Config) -> io::Result<Ledger> {
        if config.device.len() > DEVICE_BYTES || config.policy.len() > 256 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is too long"));
        }
        let file = memfd()?;
        rustix::fs::ftruncate(&file, Mapping::<Layout>::BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let layout = Mapping::<Layout>::of(file.as_fd())?;
        layout.token.store(token()?, Ordering::Relaxed);
        layout.pid_namespace.store(proc::pid_namespace()?, Ordering::Relaxed);
        layout.budget.store(config.budget, Ordering::Relaxed);
        layout.verify.store(u64::from(config.verify), Ordering::Relaxed);
        layout.announced.store(u64::from(config.announced), Ordering::Relaxed);
        layout.attach_at.store(config.attach_at.unwrap_or(NOT_SAID), Ordering::Relaxed);
        layout.device.write(config.device.as_bytes());
        layout.policy.write(config.policy.as_bytes());
        layout.version.store(VERSION, Ordering::Relaxed);
        // Release: whoever sees it (Acquire in `open`) sees all of the above.
        layout.magic.store(MAGIC, Ordering::Release);
        Ok(Ledger { shared: Arc::new(Shared { layout, file: Some(file) }) })
    }

    /// Returns where the ledger is: something to [open](Ledger::open) it by, as long as the process
    /// that made it lives and has it. Nothing where this process has not made it.
    pub fn location(&self) -> Option<String> {
        let file = self.shared.file.as_ref()?;
        let pid = std::process::id();
        let token = self.layout().token.load(Ordering::Relaxed);
        Some(format!("/proc/{pid}/fd/{}:{token:016x}", file.as_raw_fd()))
    }

    /// Opens the ledger at `location`. No descriptor stays open for it.
    ///
    /// # Errors
    ///
    /// `InvalidInput` where this is no location; `InvalidData` where something else is there, or
    /// the ledger of another version. Else what the system said: `NotFound` where the supervisor
    /// has ended, `PermissionDenied` where it belongs to another user.
    pub fn open(location: &OsStr) -> io::Result<Ledger> {
        let invalid = |kind, text: &str| io::Error::new(kind, text.to_owned());
        let (path, token) = location
            .to_str()
            .and_then(|location| location.rsplit_once(':'))
            .and_then(|(path, token)| Some((path, u64::from_str_radix(token, 16).ok()?)))
            .ok_or_else(|| {
                invalid(io::ErrorKind::InvalidInput, "this is no location of a ledger")
            })?;
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let layout = Mapping::<Layout>::of(file.as_fd()).map_err(|errno| match errno {
            Errno::INVAL => invalid(io::ErrorKind::InvalidData, "there is something else"),
            errno => errno.into(),
        })?;
        // Acquire: the store in `create`.
        let magic = layout.magic.load(Ordering::Acquire);
        if magic != MAGIC || layout.token.load(Ordering::Relaxed) != token {
            return Err(invalid(io::ErrorKind::InvalidData, "there is another ledger, or none"));
        }
        if layout.version.load(Ordering::Relaxed) != VERSION {
            return Err(invalid(io::ErrorKind::InvalidData, "the ledger is of another version"));
        }
        Ok(Ledger { shared: Arc::new(Shared { layout, file: None }) })
    }

    /// Returns the budget, in bytes.
    pub(crate) fn config_budget(&self) -> u64 {
        self.layout().budget.load(Ordering::Relaxed)
    }

    /// Returns what the supervisor wants.
    pub fn config(&self) -> Config {
        let layout = self.layout();
        Config {
            budget: layout.budget.load(Ordering::Relaxed),
            device: OsString::from_vec(layout.device.read()),
            policy: String::from_utf8_lossy(&layout.policy.read()).into_owned(),
            verify: layout.verify.load(Ordering::Relaxed) != 0,
            announced: layout.announced.load(Ordering::Relaxed) != 0,
            attach_at: Some(layout.attach_at.load(Ordering::Relaxed)).filter(|&at| at != NOT_SAID),
        }
    }

    /// Takes a slot for the process `pid`, whose program is called `name`. What it counted before
    /// it executed this program goes to the totals.
    ///
    /// `None`, and a remark in the ledger, where all [`SLOTS`] are taken, the process is in another
    /// process-id namespace, or `/proc` does not tell of it.
    pub fn claim(&self, pid: u32, name: &OsStr) -> Option<Slot> {
        let layout = self.layout();
        let claimed = match proc::pid_namespace() {
            Ok(namespace) if namespace != layout.pid_namespace.load(Ordering::Relaxed) => {
                Err("it is in a process-id namespace of its own".to_owned())
            }
            Err(error) => Err(format!("/proc is not to be read ({error})")),
            Ok(_) => match proc::identity(pid) {
                Some(identity) => self.claim_for(identity, name),
                None => Err("/proc does not tell of it".to_owned()),
            },
        };
        claimed
            .inspect_err(|why| {
                layout.without_slot.fetch_add(1, Ordering::Relaxed);
                self.note(NoteKind::NotManaged, why);
            })
            .ok()
    }

    fn claim_for(&self, identity: Identity, name: &OsStr) -> Result<Slot, String> {
        self.retire_where(|word| word.identity().pid == identity.pid);
        let taken = self.take_free(identity).or_else(|| {
            self.reap();
            self.take_free(identity)
        });
        let index = taken.ok_or_else(|| format!("there are {SLOTS} processes already"))?;
        self.layout().slots[index].name.write(name.as_bytes());
        self.layout().started.fetch_add(1, Ordering::Relaxed);
        Ok(Slot::new(self.clone(), index, identity))
    }

    /// Makes a free slot that of `identity`.
    fn take_free(&self, identity: Identity) -> Option<usize> {
        let layout = self.layout();
        let starting = Word::new(Phase::Starting, identity);
        let index = layout.slots.iter().position(|slot| {
            // Acquire: the numbers are zero, as whoever retired the slot left them (Release there).
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            slot.word.compare_exchange(Word::FREE.0, starting.0, success, failure).is_ok()
        })?;
        layout.slots_used.fetch_max(index as u64 + 1, Ordering::Relaxed);
        Some(index)
    }

    /// Moves what dead processes counted to the totals, and frees their slots. Returns how many.
    ///
    /// The supervisor does so now and then. It looks up each process in `/proc`: some microseconds
    /// for each.
    pub fn reap(&self) -> usize {
        self.retire_where(|word| word.phase() == Phase::Ended || !proc::lives(word.identity()))
    }

    /// Retires the slots whose words are so. A slot that somebody else retires is left to them,
    /// unless they are dead.
    fn retire_where(&self, chosen: impl Fn(Word) -> bool) -> usize {
        let Some(own) = proc::identity(std::process::id()) else { return 0 };
        let retiring = Word::new(Phase::Retiring, own);
        let mut retired = 0;
        for slot in self.slots_used() {
            let word = Word(slot.word.load(Ordering::Relaxed));
            let take = match word.phase() {
                Phase::Free => false,
                Phase::Retiring => !proc::lives(word.identity()),
                _ => chosen(word),
            };
            // Acquire: what the slot's owner, or who began to retire it, has written.
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            if !take || slot.word.compare_exchange(word.0, retiring.0, success, failure).is_err() {
                continue;
            }
            slot.record.retire_into(&self.layout().totals);
            slot.reason.store(0, Ordering::Relaxed);
            slot.promised.store(0, Ordering::Relaxed);
            slot.name.write(b"");
            // Release: who takes the slot (Acquire in `take_free`) finds it empty.
            slot.word.store(Word::FREE.0, Ordering::Release);
            retired += 1;
        }
        retired
    }

    /// Makes a remark, or counts it if it was made before. It is cut to 504 bytes.
    pub fn note(&self, kind: NoteKind, text: &str) {
        self.note_place(kind, text);
    }

    /// Makes a remark, and returns where it is; nothing if there is no room.
    fn note_place(&self, kind: NoteKind, text: &str) -> Option<usize> {
        let cut = (0..=text.len().min(504)).rev().find(|&cut| text.is_char_boundary(cut));
        let cut = cut.unwrap_or(0);
        let text = &text.as_bytes()[..cut];
        for (place, note) in self.layout().notes.iter().enumerate() {
            // Acquire: the text, which was written before the state became 2 (Release below).
            match note.state.compare_exchange(0, 1, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => {
                    note.kind.store(kind as u64, Ordering::Relaxed);
                    note.text.write(text);
                    note.count.fetch_add(1, Ordering::Relaxed);
                    note.state.store(2, Ordering::Release);
                    return Some(place);
                }
                // Two may make the same remark at once, in two places: readers put them together.
                Err(2)
                    if note.kind.load(Ordering::Relaxed) == kind as u64
                        && note.text.read() == text =>
                {
                    note.count.fetch_add(1, Ordering::Relaxed);
                    return Some(place);
                }
                Err(_) => {}
            }
        }
        self.layout().notes_lost.fetch_add(1, Ordering::Relaxed);
        None
    }

    /// Returns what there is now, of all processes together, and notes the peaks. Those that died
    /// and were not [reaped](Ledger::reap) yet count.
    ///
    /// It reads a few words of each slot that was ever used, and makes no system call.
    pub fn take_stock(&self) -> Stock {
        let mut gauges = [0_u64; Gauge::COUNT];
        let mut attached = 0;
        for slot in self.slots_used() {
            let phase = Word(slot.word.load(Ordering::Relaxed)).phase();
            if !matches!(phase, Phase::Attached | Phase::Starting) {
                continue;
            }
            attached += u64::from(phase == Phase::Attached);
            for (sum, gauge) in gauges.iter_mut().zip(&slot.record.gauges) {
                *sum = sum.saturating_add(gauge.load(Ordering::Relaxed));
            }
        }
        self.note_peaks(&gauges);
        Stock::new(&gauges, attached)
    }

    fn note_peaks(&self, gauges: &[u64; Gauge::COUNT]) {
        let layout = self.layout();
        let mut before = [0_u64; Gauge::COUNT];
        for ((peak, &bytes), before) in layout.totals.peaks.iter().zip(gauges).zip(&mut before) {
            *before = peak.fetch_max(bytes, Ordering::Relaxed);
        }
        let away = gauges[Gauge::Away as usize];
        if away > before[Gauge::Away as usize] {
            let notes = layout.most_away.iter().zip(gauges);
            notes.for_each(|(note, &bytes)| note.store(bytes, Ordering::Relaxed));
        }
        let demand = gauges[Gauge::Resident as usize].saturating_add(away);
        layout.demand_peak.fetch_max(demand, Ordering::Relaxed);
        if layout.warm.load(Ordering::Relaxed) != 0 {
            let resident = gauges[Gauge::Resident as usize];
            layout.warm_peak.fetch_max(resident, Ordering::Relaxed);
        }
    }

    /// Says whether the tree is warm: it was brought within its budget, and no process has joined or
    /// forked since.
    pub(crate) fn set_warm(&self, warm: bool) {
        self.layout().warm.store(u64::from(warm), Ordering::Relaxed);
    }

    /// Returns how much all processes but that of slot `index` have at home or may have before they
    /// ask again, and how many they are.
    fn promised_to_others(&self, index: usize) -> (u64, u64) {
        let others = self.slots_used().iter().enumerate().filter(|&(place, slot)| {
            place != index && Word(slot.word.load(Ordering::Relaxed)).phase() == Phase::Attached
        });
        others.fold((0, 0), |(bytes, processes), (_, slot)| {
            // SeqCst: see `Slot::promise`.
            let promised = slot.promised.load(Ordering::SeqCst);
            let resident = slot.record.gauges[Gauge::Resident as usize].load(Ordering::SeqCst);
            (promised.max(resident).saturating_add(bytes), processes + 1)
        })
    }

    /// Returns what is known of each process that is in the ledger now.
    pub fn processes(&self) -> Vec<ProcessRecord> {
        let records = self.slots_used().iter().filter_map(|slot| {
            // Acquire: what its owner wrote before it said so.
            let word = Word(slot.word.load(Ordering::Acquire));
            let state = match word.phase() {
                Phase::Free | Phase::Retiring => return None,
                Phase::Starting => State::Starting,
                Phase::Attached => State::Attached,
                Phase::NotManaged => State::NotManaged(self.reason(slot)),
                Phase::Ended => State::Ended,
            };
            let name = String::from_utf8_lossy(&slot.name.read()).into_owned();
            Some(ProcessRecord {
                pid: word.identity().pid,
                name,
                state,
                numbers: slot.record.read(),
            })
        });
        records.collect()
    }

    fn reason(&self, slot: &layout::SlotRecord) -> String {
        let place = slot.reason.load(Ordering::Relaxed).checked_sub(1);
        let note = place.and_then(|place| self.layout().notes.get(usize::try_from(place).ok()?));
        let text = note.map(|note| note.text.read()).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Returns what all processes counted so far. While a slot is being retired, one of its numbers
    /// may be missing for a moment.
    pub fn totals(&self) -> Totals {
        let layout = self.layout();
        let mut numbers = layout.totals.read();
        for slot in self.slots_used() {
            let word = Word(slot.word.load(Ordering::Relaxed));
            if word.phase() != Phase::Free {
                numbers.add(&slot.record.read());
            }
        }
        Totals {
            started: layout.started.load(Ordering::Relaxed),
            attached: layout.attached.load(Ordering::Relaxed),
            without_slot: layout.without_slot.load(Ordering::Relaxed),
            demand_peak: layout.demand_peak.load(Ordering::Relaxed),
            warm_peak: layout.warm_peak.load(Ordering::Relaxed),
            most_away: Stock::new(
                &std::array::from_fn(|place| layout.most_away[place].load(Ordering::Relaxed)),
                0,
            ),
            numbers,
            notes: self.notes(),
            notes_lost: layout.notes_lost.load(Ordering::Relaxed),
        }
    }

    fn notes(&self) -> Vec<Note> {
        let mut notes: Vec<Note> = Vec::new();
        for note in &self.layout().notes {
            // Acquire: the text, as in `note_place`.
            if note.state.load(Ordering::Acquire) != 2 {
                continue;
            }
            let kind = match note.kind.load(Ordering::Relaxed) {
                0 => NoteKind::NotManaged,
                _ => NoteKind::Warning,
            };
            let text = String::from_utf8_lossy(&note.text.read()).into_owned();
            let count = note.count.load(Ordering::Relaxed);
            match notes.iter_mut().find(|known| known.kind == kind && known.text == text) {
                Some(known) => known.count += count,
                None => notes.push(Note { kind, text, count }),
            }
        }
        notes
    }

    fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// The slots that were ever used.
    fn slots_used(&self) -> &[layout::SlotRecord] {
        let used = self.layout().slots_used.load(Ordering::Relaxed);
        &self.layout().slots[..usize::try_from(used).unwrap_or(SLOTS).min(SLOTS)]
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").field("location", &self.location()).finish_non_exhaustive()
    }
}

/// Makes the file. Linux before 6.3 does not know that it is nothing to execute.
fn memfd() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create("uhmm-ledger", flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create("uhmm-ledger", flags),
        made => made,
    }
}

fn token() -> Result<u64, Errno> {
    let mut bytes = [0_u8; 8];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if got < bytes.len() { Err(Errno::IO) } else { Ok(u64::from_ne_bytes(bytes)) }
}

#[cfg(test)]
mod tests;
